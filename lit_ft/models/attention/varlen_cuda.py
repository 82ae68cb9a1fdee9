"""Packed attention on CUDA by PyTorch's variable-length flash kernel: one call per layer, no mask and no compilation.

Each piece is a sequence of its own: its queries against the keys that it goes on from followed by its own, aligned at
the end (queries fewer than keys are the last ones, as flash attention 2.1 and later has it).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lit_ft.batches import Piece
from lit_ft.models.attention.by_piece import attend_by_piece
from lit_ft.models.attention.plan import Plan
from lit_ft.progress import say

CAUSAL = (-1, 0)


def usable(query: Tensor) -> bool:
    """Whether the kernel takes `query`: half precision, a GPU from Ampere on, and right in a trial on this machine."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return _tried(query.device.index or 0, query.dtype, query.shape[-1])


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, plan: Plan, *, scale: float | None) -> Tensor:
    """`(1, T, heads, D)`; query `(1, heads, T, D)`, key and value `(1, kv_heads, T, D)`."""
    from torch.nn.attention.varlen import varlen_attn

    index = plan.varlen
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, D)
    if len(index.keys) > len(queries):  # otherwise no piece goes on from another, and keys stand in place
        keys, values = keys.index_select(0, index.keys), values.index_select(0, index.keys)
    out = varlen_attn(
        queries.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        index.cu_queries,
        index.cu_keys,
        index.max_queries,
        index.max_keys,
        scale=scale,
        window_size=CAUSAL,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]


@cache
def _tried(device: int, dtype: torch.dtype, width: int) -> bool:
    """Compare with SDPA on a small row with shared pieces, once: kernels differ in how they align unequal lengths."""
    where = torch.device("cuda", device)
    plan = Plan((Piece(0, 5, 12), Piece(5, 9, 9), Piece(9, 12, 12), Piece(12, 19, 19)), where)
    generator = torch.Generator(where).manual_seed(0)
    inputs = [
        torch.randn(1, heads, 19, width, dtype=dtype, device=where, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    ]
    results = []
    try:
        for attend in (attend_varlen, attend_by_piece):
            with torch.enable_grad():
                out = attend(inputs[0], inputs[1], inputs[2], plan, scale=None)
                results.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)))
    except (RuntimeError, ImportError, ValueError, TypeError) as error:  # TypeError: PyTorch 2.10 knows fewer arguments
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        say(f"attention  no variable-length kernel here ({reason}): SDPA piece by piece")
        return False
    # bf16 keeps 8 bits, of the sums over a few keys as of the inputs.
    close = all(
        torch.allclose(one.float(), other.float(), atol=2e-2 * float(other.abs().max()), rtol=0)
        for one, other in zip(*results, strict=True)
    )
    if not close:
        say("attention  the variable-length kernel disagrees with SDPA here: SDPA piece by piece")
    return close
