"""Sharding a model over devices: FSDP2 over the data-parallel ones, tensor parallelism over the rest.

FSDP2: Zhao et al. 2023 (arXiv:2304.11277), `torch.distributed.fsdp.fully_shard`. Every decoder layer is one unit:
its weights are gathered before it runs and given back after; what lies outside the layers (embeddings, last norm,
output layer) stays gathered during a step. Frozen weights are gathered in the format they are kept in (half the traffic
in bfloat16), adapters in float32; gradients, with adapters theirs alone, are reduced in float32.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lit_ft.errors import UserError
from lit_ft.models.adapt import causal_lm, is_adapted
from lit_ft.models.tensor_parallel import parallelize


def shard(
    model: Any,
    mesh: Any,
    score: Callable[[Any, Any], Any],
    *,
    cpu_offload: bool = False,
    reshard_after_forward: bool = True,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> Any:
    """Shard `model` in place and return it; a model that is sharded already is left as it is.

    Args:
        model: a causal language model, with or without PEFT adapters; the same on every process.
        mesh: a device mesh with the dimensions `data_parallel` and `tensor_parallel`.
        score: the pass to run, `(model, batch) → tuple of tensors`. FSDP knows a model's `forward`, which makes logits
            of every position; ours does not go that way. FSDP finds the tensors in a (named) tuple only.
        cpu_offload: keep the shards in main memory and bring each layer to the GPU when it runs.
        reshard_after_forward: give a layer's weights back after its forward pass, and gather them again for the
            backward pass; without it, less traffic and more memory.
        param_dtype: gather trained and frozen weights in this format; None: as they are kept.
        reduce_dtype: reduce gradients in this format; None: float32.

    Raises:
        UserError: tensor parallelism does not fit this model.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    lm = causal_lm(model)
    if is_sharded(model):
        return model
    if mesh["tensor_parallel"].size() > 1:
        parallelize(lm, mesh["tensor_parallel"])
    options: dict[str, Any] = {
        "mesh": mesh["data_parallel"],
        "reshard_after_forward": reshard_after_forward,
        # Left to PyTorch, gradients would be summed, over micro-batches too, in the format of the gathered weights.
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype or torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy(),
    }
    layers: list[Any] = decoder_layers(lm)
    for layer in layers:
        fully_shard(layer, **options)
    # None: gathered from the forward pass to the end of the backward pass, which would begin by gathering it again.
    fully_shard(lm, **{**options, "reshard_after_forward": None})
    lm.score_sharded = types.MethodType(lambda self, batch: score(model, batch), lm)
    register_fsdp_forward_method(lm, "score_sharded")
    gathering = lm.score_sharded

    def score_sharded(batch: Any) -> Any:
        scores = gathering(batch)
        if not torch.is_grad_enabled():
            for part in (*layers, lm):
                part.reshard()  # no backward pass will
        return scores

    lm.score_sharded = score_sharded
    return model


def is_sharded(model: Any) -> bool:
    """Whether `shard` has been here."""
    return hasattr(causal_lm(model), "score_sharded")


def decoder_layers(lm: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer.

    Raises:
        UserError: there are none to be found.
    """
    names = set(getattr(lm, "_no_split_modules", None) or ())
    layers = [module for module in lm.modules() if type(module).__name__ in names]
    if not layers:
        lists = [list(module) for module in lm.modules() if isinstance(module, nn.ModuleList)]
        layers = max(lists, key=len, default=[])
    if not layers:
        raise UserError(f"{type(lm).__name__} has no list of layers to shard by: use strategy=ddp.")
    return layers


def synchronising(model: Any, wrapped: Any, *, last: bool) -> AbstractContextManager[None]:
    """Around a backward pass: exchange the gradients of adapters only if it is the `last` of a step.

    Args:
        model: the model that is trained.
        wrapped: what the strategy wraps it in.
    """
    from torch.nn.parallel import DistributedDataParallel

    if last:
        return nullcontext()
    if isinstance(wrapped, DistributedDataParallel):
        return wrapped.no_sync()
    # FSDP keeps whole gradients until it may exchange them: nothing beside the weights if they are those of adapters,
    # but a second model if all weights are trained. That one exchanges each time.
    return _keeping_gradients(causal_lm(model)) if is_sharded(model) and is_adapted(model) else nullcontext()


@contextmanager
def _keeping_gradients(lm: Any) -> Any:
    lm.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        lm.set_requires_gradient_sync(True)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a global norm of `max_norm` and return what it was: a scalar, equal on all processes.

    As `torch.nn.utils.clip_grad_norm_`, which refuses gradients that are sharded over different meshes.
    """
    from torch.distributed.tensor import DTensor

    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    by_mesh: dict[Any, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
    norms = [torch.nn.utils.get_total_norm(group) for group in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack([norm.to(whole[0].device) for norm in whole]))
    if max_norm == float("inf"):
        return total
    for group in by_mesh.values():
        coefficient = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        torch._foreach_mul_(group, coefficient.to(group[0].device))
    return total


def bytes_held(model: nn.Module) -> tuple[int, int]:
    """Bytes of weights that this process holds, and of the whole model."""
    from torch.distributed.tensor import DTensor

    held = whole = 0
    for p in model.parameters():
        local = p.to_local() if isinstance(p, DTensor) else p
        held += local.numel() * local.element_size()
        whole += p.numel() * p.element_size()
    return held, whole
