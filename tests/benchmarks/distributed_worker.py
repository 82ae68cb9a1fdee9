"""One process of a distributed benchmark run: python -m tests.benchmarks.distributed_worker SETTINGS.json RESULT.json

`Traffic` counts what collectives carry; the rest trains a few steps as `lit_ft.train` would and writes what it saw.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The operators below PyTorch's collectives, whoever calls them: DDP's reducer (C++), FSDP2, tensor parallelism.
KINDS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::allreduce_coalesced_": "all_reduce",
    "c10d::allgather_": "all_gather",
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::broadcast_": "broadcast",
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_reduce_": "all_reduce",
    "_c10d_functional::all_reduce_coalesced": "all_reduce",
    "_c10d_functional::all_reduce_coalesced_": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::broadcast": "broadcast",
    "_c10d_functional::broadcast_": "broadcast",
}
SILENT = frozenset(
    {
        "c10d::barrier",
        "c10d::monitored_barrier_",
        "_c10d_functional::wait_tensor",
        "_c10d_functional::_wrap_tensor_autograd",
    }
)
# Metrics, gradient norms and the flag that ends a run: told apart from weights and activations by their size.
SMALL = 4096


class Traffic(TorchDispatchMode):
    """Counts the collectives of this thread (on a CPU backward passes run in it, too) and the bytes they carry.

    `carried[kind, small]` holds bytes that each process must send and receive, as the fewest that any algorithm needs:
    of a tensor of n bytes in a group of P, 4·n·(P-1)/P for an all-reduce (every process sends and receives what it does
    not have, once to sum and once to tell) and 2·n·(P-1)/P for all else, n being the whole on either side.

    Raises:
        NotImplementedError: on a collective that it does not know: nothing travels uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.carried: Counter[tuple[str, bool]] = Counter()
        self.calls: Counter[tuple[str, bool]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again as what it is made of
        name = func._schema.name
        out = func(*args, **(kwargs or {}))
        if name.startswith(("c10d::", "_c10d_functional::")) and name not in SILENT:
            if name not in KINDS:
                raise NotImplementedError(f"Traffic does not know {name}")
            # Functional ones return what was gathered, the others write it into an argument.
            returned = _flat([out]) if name.startswith("_c10d_functional::") else ()
            self._count(KINDS[name], [*_flat(args), *_flat(kwargs or {})], [*returned])
        return out

    def _count(self, kind: str, given: list[Any], returned: list[Any]) -> None:
        size = next(size for value in given if (size := _group_size(value)))
        if kind in ("all_reduce", "broadcast"):
            whole = sum(_bytes(given))
        else:  # the whole is one tensor beside a share of it, or as many shares as there are processes
            sizes = sorted(_bytes([*given, *returned]), reverse=True)
            whole = sizes[0] if sizes[0] > sizes[1] or size == 1 else sizes[0] * size
        key = (kind, whole < SMALL)
        self.calls[key] += 1
        self.carried[key] += round((4 if kind == "all_reduce" else 2) * whole * (size - 1) / size)

    def summary(self) -> dict[str, Any]:
        """Bytes and calls by kind; `small` apart."""
        kinds = sorted({kind for (kind, small) in self.calls if not small})
        return {
            "by_kind": {kind: self.carried[kind, False] for kind in kinds},
            "calls": {kind: self.calls[kind, False] for kind in kinds},
            "small_bytes": sum(n for (_, small), n in self.carried.items() if small),
            "small_calls": sum(n for (_, small), n in self.calls.items() if small),
            "bytes": sum(self.carried.values()),
        }


def _flat(values: Any) -> Iterator[Any]:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, list | tuple | dict):
            yield from _flat(value)
        elif value is not None:
            yield value


def _bytes(values: list[Any]) -> list[int]:
    return [value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor)]


def _group_size(value: Any) -> int:
    """How many processes are in the group that `value` names; 0 if it names none."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _resolve_process_group

    if isinstance(value, str):
        try:
            return _resolve_process_group(value).size()
        except (RuntimeError, ValueError):
            return 0
    if isinstance(value, dist.ProcessGroup):
        return value.size()
    if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
        return dist.ProcessGroup.unbox(value).size()
    return 0


def loopback_bytes() -> int:
    """What the machine's loopback interface has sent so far, whoever sent it; 0 where that is not told."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:")), 0)


def main() -> None:
    settings, result = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(settings["threads"])
    from lit_ft.distributed.processes import gathered, join, leave

    end_with(settings.get("parent"))
    ranks = join("cpu", settings["processes"], 1)
    found = gathered(measure(settings, ranks))
    if ranks.rank == 0:
        result.write_text(json.dumps(found))
    leave()
    # All is written. An orderly end now and then aborts: gloo's threads still hold what the count's Python objects are
    # in, and ask an interpreter for its lock that is going down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def end_with(parent: int | None) -> None:
    """Have this process killed when the one that started it is gone, whatever ended that one."""
    if parent is None or sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL))
    if os.getppid() != parent:  # it ended before this was set
        raise SystemExit(1)


def measure(settings: dict[str, Any], ranks: Any) -> dict[str, Any]:
    """Train a step to warm up, the timed ones, and one more in which collectives are counted, which takes time."""
    import lightning as L
    from lightning.pytorch.callbacks import Callback

    from lit_ft.callbacks.interrupt import FinishStepOnSignal
    from lit_ft.data.datamodule import ExamplesDataModule
    from lit_ft.models.kinds.lora import apply_lora
    from lit_ft.models.score import use_packed_attention
    from lit_ft.models.shard import bytes_held
    from lit_ft.modules import DPOModule, SFTModule
    from lit_ft.reference import attach, reference_logprobs
    from lit_ft.resources.allocator import keep_freed_memory
    from tests.benchmarks import systems, worker

    keep_freed_memory()
    bf16 = settings["precision"] == "bf16-mixed"
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = apply_lora(worker.load(settings, dtype, torch.device("cpu")), r=systems.RANK, alpha=systems.ALPHA)
    systems.set_adapter(model)
    if (reason := use_packed_attention(model)) is not None:
        raise SystemExit(f"not packable: {reason}")
    least = minimum(model, settings)
    examples = worker.load_rows(settings)
    optimizer: dict[str, Any] = {
        "learning_rate": systems.RATE[settings["algorithm"]],
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
    }
    if settings["algorithm"] == "dpo":
        logps = reference_logprobs(
            model,
            examples,
            disable_adapter=True,
            max_tokens=settings["max_tokens"],
            layout="packed",
            autocast=torch.bfloat16 if bf16 else None,
            rank=ranks.rank,
            processes=ranks.size,
        )
        examples = attach(examples, logps)
        module: Any = DPOModule(model, beta=systems.BETA, reference="base", **optimizer)
    else:
        module = SFTModule(model, **optimizer)
    timed, traffic = settings["steps"], Traffic()

    class Watch(Callback):
        """Each step lasts from the end of the one before it to its own, so that nothing is left out."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []
            self.tokens: list[float] = []
            self.loopback: list[int] = []
            self.counted: Any = None

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, window: Any, index: int) -> None:
            self.ends.append(time.perf_counter())
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.tokens.append(float(trainer.callback_metrics["train/num_tokens"]))
            self.loopback.append(loopback_bytes())
            if len(self.ends) == timed + 1:
                traffic.__enter__()
            elif len(self.ends) == timed + 2:
                traffic.__exit__(None, None, None)
                self.counted = window

    watch = Watch()
    data = ExamplesDataModule(
        examples, batch_size=settings["batch_size"], max_tokens=settings["max_tokens"], shuffle=False
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=ranks.size,
            strategy=strategy(settings["strategy"], ranks.size),
            precision=settings["precision"],
            max_epochs=-1,
            max_steps=timed + 2,
            # In real runs, too, processes tell each other after each step whether one was asked to stop.
            callbacks=[FinishStepOnSignal(Path(folder, "last.ckpt")), watch],
            logger=False,
            default_root_dir=folder,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        worker.reset_peak(torch.device("cpu"))
        trainer.fit(module, data)
    seconds = [b - a for a, b in zip(watch.ends[:timed], watch.ends[1 : timed + 1], strict=True)]
    batches = watch.counted.batches
    return {
        "s_per_step": statistics.median(seconds),
        "seconds": seconds,
        "tokens_per_s": (watch.tokens[timed] - watch.tokens[0]) / sum(seconds),
        "peak_bytes": worker.peak_bytes(torch.device("cpu")),
        "losses": watch.losses,
        "bytes_held": bytes_held(module.model)[0],
        "traffic": traffic.summary(),
        "minimum": least(len(batches), sum(batch.input_ids.numel() for batch in batches)),
        "micro_batches": len(batches),
        # All processes' sending over the timed steps; what one sends and receives is twice its part.
        "loopback_bytes": 2 * (watch.loopback[timed] - watch.loopback[0]) / timed / ranks.size,
    }


def minimum(model: Any, settings: dict[str, Any]) -> Any:
    """`(micro_batches, tokens) →` the fewest bytes that a process must send and receive in a step, by kind.

    DDP: the sum of the trained weights' float32 gradients, once. FSDP: the weights of every layer, in the format they
    are kept in, before each forward and each backward pass, what lies outside the layers once for both, and the
    gradients summed to where they belong. Tensor parallelism (Megatron-LM): one sum of activations after attention and
    one after the MLP, and as many of gradients in the backward pass.
    """
    from lit_ft.models.adapt import causal_lm
    from lit_ft.models.shard import decoder_layers

    parts = 1 if settings["strategy"] == "one" else settings["processes"]
    share = 2 * (parts - 1) / parts
    layers = decoder_layers(causal_lm(model))
    in_layers = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    width = causal_lm(model).config.hidden_size * (2 if settings["precision"] == "bf16-mixed" else 4)

    def least(micro_batches: int, tokens: int) -> dict[str, float]:
        if settings["strategy"] == "one":
            return {}
        if settings["strategy"] == "ddp":
            return {"all_reduce": 2 * share * gradients}
        if settings["strategy"] == "fsdp":
            gathered = share * micro_batches * (in_layers + whole)
            return {"all_gather": gathered, "reduce_scatter": share * gradients}
        return {"all_reduce": 2 * share * 4 * len(layers) * tokens * width}

    return least


def strategy(kind: str, processes: int) -> Any:
    from lit_ft.distributed.strategy import ShardedStrategy, ddp

    if kind == "one":
        return "auto"
    if kind == "ddp":
        return ddp()
    return ShardedStrategy(processes, 1) if kind == "fsdp" else ShardedStrategy(1, processes)


if __name__ == "__main__":
    main()
