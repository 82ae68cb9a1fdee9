"""Packed attention on a CPU by PyTorch's flash kernel, without masks and without copying shared keys.

A row's attention falls apart into causal products of each piece with itself, and full products of everything that goes
on from a piece with that piece. Each gives a partial output and its log-sum-exp, which merge exactly; and because
flash attention's backward needs only the final output and log-sum-exp, the gradients of the parts simply add up
(Dao et al. 2022, arXiv:2205.14135, section 3.1 and appendix B).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_ft.models.attention.by_piece import repeat_heads
from lit_ft.models.attention.plan import Plan

_forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def usable(query: Tensor) -> bool:
    """Whether this PyTorch has the kernel for `query`."""
    known = (torch.float32, torch.bfloat16, torch.float16)
    return query.device.type == "cpu" and query.dtype in known and None not in (_forward, _backward)


def attend_flash_cpu(query: Tensor, key: Tensor, value: Tensor, plan: Plan, *, scale: float | None) -> Tensor:
    """`(1, T, heads, D)`; query `(1, heads, T, D)`, key and value `(1, kv_heads, T, D)`."""
    out: Tensor = _FlashOverPieces.apply(query, key, value, plan, scale)
    return out.transpose(1, 2)


class _FlashOverPieces(torch.autograd.Function):
    """Key and value heads are repeated here, so that they are kept once and their gradients summed in one place."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float | None) -> Tensor:
        heads = query.shape[1]
        k, v = repeat_heads(key, heads), repeat_heads(value, heads)
        # Merged in fp32: each level of a forest would round anew.
        merged = any(piece.until > piece.end for piece in plan.pieces)
        kept = torch.float32 if merged else query.dtype
        # As transformers wants it afterwards: (1, T, heads, D) in memory.
        out = query.new_empty(1, query.shape[2], heads, query.shape[3], dtype=kept).transpose(1, 2)
        lse = query.new_empty(1, heads, query.shape[2], dtype=torch.float32)
        for piece in plan.pieces:
            own = slice(piece.start, piece.end)
            out[:, :, own], lse[:, :, own] = _attend(query[:, :, own], k[:, :, own], v[:, :, own], True, scale)
        for piece in plan.pieces:
            if piece.until > piece.end:
                own, rest = slice(piece.start, piece.end), slice(piece.end, piece.until)
                o, one = _attend(query[:, :, rest], k[:, :, own], v[:, :, own], False, scale)
                both = torch.logaddexp(lse[:, :, rest], one)
                part = out[:, :, rest]
                part.mul_((lse[:, :, rest] - both).exp_()[..., None])
                part.add_(o * (one - both).exp_()[..., None])
                lse[:, :, rest] = both
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        heads = query.shape[1]
        k, v = repeat_heads(key, heads), repeat_heads(value, heads)
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(k), torch.empty_like(v)

        def backward(rows: slice, seen: slice, causal: bool) -> Any:
            parts = (query[:, :, rows], k[:, :, seen], v[:, :, seen], out[:, :, rows])
            return _backward(grad[:, :, rows], *parts, lse[:, :, rows], 0.0, causal, scale=ctx.scale)  # type: ignore[misc]

        for piece in ctx.plan.pieces:
            own = slice(piece.start, piece.end)
            d_query[:, :, own], d_key[:, :, own], d_value[:, :, own] = backward(own, own, True)
        for piece in ctx.plan.pieces:
            if piece.until > piece.end:
                own, rest = slice(piece.start, piece.end), slice(piece.end, piece.until)
                dq, dk, dv = backward(rest, own, False)
                d_query[:, :, rest] += dq
                d_key[:, :, own] += dk
                d_value[:, :, own] += dv
        return d_query, _sum_heads(d_key, key.shape[1]), _sum_heads(d_value, key.shape[1]), None, None


def _attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output `(1, heads, Q, D)` and log-sum-exp `(1, heads, Q)`."""
    out, lse = _forward(query, key, value, 0.0, causal, scale=scale)  # type: ignore[misc]
    return out, lse


def _sum_heads(grad: Tensor, kv_heads: int) -> Tensor:
    """The gradient of `repeat_heads`."""
    _, heads, tokens, width = grad.shape
    return grad if heads == kv_heads else grad.view(1, kv_heads, heads // kv_heads, tokens, width).sum(2)
