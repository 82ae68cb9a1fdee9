"""Lightning's strategies as they suit adapters: DDP, and FSDP2 with tensor parallelism; one checkpoint format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lit_ft.distributed.processes import PATIENCE
from lit_ft.models.shard import is_sharded

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def ddp(**extra: Any) -> DDPStrategy:
    """One copy of the model per device; the gradients of trained weights travel, and nothing else.

    DDP would otherwise send every weight when it begins and every buffer before each pass: all processes load the same
    files, and no buffer here changes in training.
    """
    options: dict[str, Any] = {
        "broadcast_buffers": False,
        "init_sync": False,
        "gradient_as_bucket_view": True,
        "timeout": PATIENCE,
    }
    return DDPStrategy(**{**options, **extra})


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 and tensor parallelism, with checkpoints in the format that single-process and DDP runs write.

    Lightning numbers the optimizer's states by all weights here and by the trained ones elsewhere, so that one kind of
    run could not go on from the checkpoint of another.

    Args:
        data_parallel_size, tensor_parallel_size: their product is the number of processes.
        cpu_offload: the model's shards stay in main memory.
    """

    def __init__(
        self, data_parallel_size: int, tensor_parallel_size: int, *, cpu_offload: bool = False, **extra: Any
    ) -> None:
        super().__init__(
            data_parallel_size,
            tensor_parallel_size,
            save_distributed_checkpoint=False,
            **{"timeout": PATIENCE, **extra},
        )
        self._cpu_offload = cpu_offload

    def model_to_device(self) -> None:
        """Move what is not sharded; FSDP moves offloaded shards itself."""
        if not self._cpu_offload:
            super().model_to_device()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The whole state in main memory, numbered by trained weights; empty but on the first process."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        named = get_optimizer_state_dict(_module(self), optimizer, options=_WHOLE)
        if self.global_rank != 0:
            return {}
        names = [name for group in named["param_groups"] for name in group["params"]]
        number = {name: k for k, name in enumerate(names)}
        groups = [{**group, "params": [number[n] for n in group["params"]]} for group in named["param_groups"]]
        return {"state": {number[name]: state for name, state in named["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file on every process (mapped, not copied) and give each its share of weights and states."""
        path = Path(self.broadcast(str(checkpoint_path)))
        kept = torch.load(path, map_location="cpu", weights_only=bool(weights_only), mmap=True)
        module: Any = _module(self)
        load_trained(module, kept["state_dict"])
        for optimizer, state in zip(self.optimizers, kept["optimizer_states"], strict=False):
            set_optimizer_state_dict(
                module, optimizer, _by_name(module, optimizer, state), options=StateDictOptions(full_state_dict=True)
            )
        return kept


def load_trained(module: Any, state: Mapping[str, Any]) -> None:
    """Put whole trained weights into `module`, sharded or not; all processes call this together.

    Raises:
        UserError: they are not the weights that this module trains.
    """
    if not is_sharded(module.model):
        module.load_state_dict(state)
        return
    module.check_state_dict(state)
    # Weights that are not in the file are the frozen ones.
    set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True, strict=False))


def _module(strategy: ModelParallelStrategy) -> nn.Module:
    assert strategy.model is not None
    return strategy.model


def _by_name(module: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state with its weights' names instead of their numbers."""
    names = {id(p): name for name, p in module.named_parameters()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    groups = [{**group, "params": [ordered[k] for k in group["params"]]} for group in state["param_groups"]]
    return {"state": {ordered[k]: values for k, values in state["state"].items()}, "param_groups": groups}
