"""Log-probabilities of target tokens, computed in chunks so that no `(N, vocabulary)` tensor is ever whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenScores(NamedTuple):
    """Per target, all `(N,)`: its log-probability (fp32, differentiable) and whether it was the likeliest token."""

    logprobs: Tensor
    is_top1: Tensor


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    chunk: int = 256,
) -> TokenScores:
    """Score `targets` under `log_softmax(hidden @ weightᵀ + bias)`.

    Logits exist for `chunk` targets at a time, once in the forward and once more in the backward pass; the forward
    pass keeps only `logsumexp`. Peak memory is `chunk · V` whatever N is.

    Args:
        hidden: `(N, H)` the states that predict the targets.
        weight: `(V, H)` the output embedding; it receives a gradient only if it requires one.
        targets: `(N,)` int64 token ids.
        bias: `(V,)` or None.
        softcap: Gemma 2's `softcap · tanh(logits / softcap)`, or None.
        chunk: targets per chunk.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(f"expected hidden (N, H) and targets (N,), got {tuple(hidden.shape)}, {tuple(targets.shape)}")
    logprobs, is_top1 = _ChunkedLogProbs.apply(hidden, weight, bias, targets, softcap, chunk)
    return TokenScores(logprobs, is_top1)


class _ChunkedLogProbs(torch.autograd.Function):
    """d logp_t / d logit_v = [v = t] − softmax(logits)_v, formed chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        n = hidden.shape[0]
        logprobs = hidden.new_empty(n, dtype=torch.float32)
        lse = torch.empty_like(logprobs)
        is_top1 = torch.empty(n, dtype=torch.bool, device=hidden.device)
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, bias, softcap)
            lse[part] = torch.logsumexp(logits, dim=-1)
            target_logits = logits.gather(-1, targets[part, None]).squeeze(-1)
            logprobs[part] = target_logits - lse[part]
            is_top1[part] = target_logits >= logits.amax(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.softcap, ctx.chunk = softcap, chunk
        ctx.mark_non_differentiable(is_top1)
        return logprobs, is_top1

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Summed in fp32: a bf16 running sum over many chunks would lose the small terms.
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = _logits(hidden[part], weight, bias, ctx.softcap)
            d_logits = torch.exp(logits - lse[part, None]).neg_()
            d_logits.scatter_add_(-1, targets[part, None], torch.ones_like(lse[part, None]))
            d_logits *= grad[part, None]
            if ctx.softcap is not None:
                d_logits *= 1 - (logits / ctx.softcap).square()
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[part] = (d_logits @ weight).to(hidden.dtype)
            if d_weight is not None:
                d_weight += d_logits.T @ hidden[part].to(weight.dtype)
        return (
            d_hidden,
            d_weight.to(weight.dtype) if d_weight is not None else None,
            d_bias.to(bias.dtype) if d_bias is not None else None,
            None,
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = (hidden.to(weight.dtype) @ weight.T).float()  # (chunk, V)
    if bias is not None:
        logits += bias.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def sum_by_completion(values: Tensor, completion: Tensor, num_completions: int) -> Tensor:
    """Sum `(N,)` token values into `(C,)` by the completion each belongs to."""
    return values.new_zeros(num_completions).index_add(0, completion, values)
