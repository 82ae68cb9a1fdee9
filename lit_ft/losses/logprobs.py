"""Log-probabilities of target tokens, and their gradient, without ever holding an `(N, vocabulary)` tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

# Targets by vocabulary entries that exist at a time. On a CPU 4 MB, which its cache holds, so that one block is
# multiplied, exponentiated and multiplied again before it leaves; on a GPU enough to keep it busy.
BLOCK = {"cpu": (512, 2048), "cuda": (4096, 16_384)}
# The name under which `trainer.profile` finds this file's work.
PROFILED = "lit_ft: log-probabilities"


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
    chunk: int | None = None,
    tile: int | None = None,
) -> TokenScores:
    """Score `targets` under `log_softmax(hidden @ weightᵀ + bias)`.

    Logits exist for `chunk` targets and `tile` vocabulary entries at a time. Softmax is taken online over the tiles
    (Milakov & Gimelshein 2018, arXiv:1805.02867), and with it the mean embedding under it: since
    `∂ log p_t / ∂ hidden = weight_t − Σ_v p_v · weight_v`, each target's gradient up to the factor that the loss will
    give it is known when the forward pass ends. So the vocabulary is met once, whatever the loss, as in fused linear
    cross-entropy but for losses that are not sums of log-probabilities as well. Only where `weight` or `bias` are
    trained, whose gradients mix the targets, logits are formed again in the backward pass.

    Args:
        hidden: `(N, H)` the states that predict the targets.
        weight: `(V, H)` the output embedding; it receives a gradient only if it requires one.
        targets: `(N,)` int64 token ids.
        bias: `(V,)` or None.
        softcap: Gemma 2's `softcap · tanh(logits / softcap)`, or None.
        chunk, tile: the block; None for what suits the device.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(f"expected hidden (N, H) and targets (N,), got {tuple(hidden.shape)}, {tuple(targets.shape)}")
    usual = BLOCK.get(hidden.device.type, BLOCK["cuda"])
    block = chunk or usual[0], tile or usual[1]
    # Asked here: inside an autograd function gradients are always off.
    wanted = torch.is_grad_enabled()
    logprobs, is_top1 = _LogProbs.apply(hidden, weight, bias, targets, softcap, *block, wanted)
    return TokenScores(logprobs, is_top1)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        chunk: int,
        tile: int,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        ctx.softcap, ctx.chunk, ctx.tile = softcap, chunk, tile
        gradient = hidden.new_empty(hidden.shape, dtype=torch.float32) if needs_hidden and wanted else None
        if needs_weight or needs_bias:
            gradient = None
        lse = hidden.new_empty(len(hidden), dtype=torch.float32)
        of_targets = torch.empty_like(lse)
        is_top1 = torch.empty_like(lse, dtype=torch.bool)
        with record_function(PROFILED), torch.autocast(hidden.device.type, enabled=False):
            for rows in slices(len(hidden), chunk):
                part = hidden[rows].to(weight.dtype)
                mean = None if gradient is None else gradient[rows]
                lse[rows], of_targets[rows], top = _scan(part, weight, bias, targets[rows], softcap, tile, mean)
                is_top1[rows] = of_targets[rows] >= top
        ctx.mark_non_differentiable(is_top1)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.dtype = hidden.dtype
        return of_targets - lse, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if not any(ctx.needs_input_grad[1:3]):
            (gradient,) = ctx.saved_tensors
            return (gradient * grad[:, None]).to(ctx.dtype), *[None] * 7
        with record_function(PROFILED), torch.autocast(grad.device.type, enabled=False):
            hidden, weight, bias, targets, lse = ctx.saved_tensors
            d_hidden, d_weight, d_bias = _backward_through_weight(
                hidden, weight, bias, targets, lse, grad, ctx.softcap, ctx.chunk, ctx.tile, ctx.needs_input_grad
            )
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def _scan(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    tile: int,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, the target's logit and the largest logit, each `(n,)`, of a chunk `hidden` `(n, H)`.

    `gradient` `(n, H)` fp32, if given, is filled with the gradient of each target's log-probability.
    """
    n = len(hidden)
    # Not −inf, from which a tile of logits that are all −inf (excluded by their bias) would make NaN.
    top = hidden.new_full((n, 1), torch.finfo(torch.float32).min, dtype=torch.float32)
    total = torch.zeros_like(top)
    of_target = torch.zeros_like(top)
    if gradient is not None:
        gradient.zero_()
    for entries in slices(len(weight), tile):
        part = weight[entries]
        logits = logits_of(hidden, part, bias, entries, softcap)
        inside = (targets >= entries.start) & (targets < entries.stop)
        here = logits.gather(1, (targets - entries.start).clamp(0, logits.shape[1] - 1)[:, None])
        of_target = torch.where(inside[:, None], here, of_target)
        damping = None if softcap is None or gradient is None else 1 - (logits / softcap).square()
        higher = torch.maximum(top, logits.amax(1, keepdim=True))
        shrink = torch.exp(top - higher)
        shares = logits.sub_(higher).exp_()
        total = total * shrink + shares.sum(1, keepdim=True)
        if gradient is not None:
            if damping is not None:
                shares *= damping
            gradient.mul_(shrink)
            if part.dtype == torch.float32:
                gradient.addmm_(shares, part)
            else:  # summed over the tiles in fp32: a bf16 running sum would lose the small terms
                gradient += shares.to(part.dtype) @ part
        top = higher
    if gradient is not None:
        toward = weight[targets].float()
        if softcap is not None:
            toward *= 1 - (of_target / softcap).square()
        gradient.div_(-total).add_(toward)
    return (top + total.log()).squeeze(1), of_target.squeeze(1), top.squeeze(1)


def _backward_through_weight(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    softcap: float | None,
    chunk: int,
    tile: int,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, from `∂ log p_t / ∂ logit_v = [v = t] − softmax(logits)_v`."""
    d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs[0] else None
    # Summed in fp32, for the reason above.
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
    d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] and bias is not None else None
    for rows in slices(len(hidden), chunk):
        states = hidden[rows].to(weight.dtype)
        for entries in slices(len(weight), tile):
            part = weight[entries]
            logits = logits_of(states, part, bias, entries, softcap)
            damping = None if softcap is None else 1 - (logits / softcap).square()
            d_logits = logits.sub_(lse[rows, None]).exp_().neg_()
            inside = ((targets[rows] >= entries.start) & (targets[rows] < entries.stop))[:, None].float()
            at = (targets[rows] - entries.start).clamp(0, d_logits.shape[1] - 1)[:, None]
            d_logits.scatter_add_(1, at, inside)
            d_logits *= grad[rows, None]
            if damping is not None:
                d_logits *= damping
            if d_bias is not None:
                d_bias[entries] += d_logits.sum(0)
            d_logits = d_logits.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[rows] += d_logits @ part
            if d_weight is not None:
                d_weight[entries] += d_logits.T @ states
    return (
        d_hidden.to(hidden.dtype) if d_hidden is not None else None,
        d_weight.to(weight.dtype) if d_weight is not None else None,
        d_bias.to(bias.dtype) if d_bias is not None and bias is not None else None,
    )


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, entries: slice, softcap: float | None) -> Tensor:
    logits = (hidden @ weight.T).float()  # (n, tile)
    if bias is not None:
        logits += bias[entries].float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def sum_by_completion(values: Tensor, completion: Tensor, num_completions: int) -> Tensor:
    """Sum `(N,)` token values into `(C,)` by the completion each belongs to."""
    return values.new_zeros(num_completions).index_add(0, completion, values)


def rows_by_completion(values: Tensor, completion: Tensor, lengths: Tensor) -> Tensor:
    """Lay `(N,)` token values, in the order of their completions, out as `(C, T)`, T the longest; zeros after the end.

    Args:
        values: one per target.
        completion: `(N,)` the completion of each.
        lengths: `(C,)` how many each has.
    """
    out = values.new_zeros(len(lengths), int(lengths.max()) if len(lengths) else 0)
    return out.index_put((completion, places_in_completion(completion, lengths)), values)


def places_in_completion(completion: Tensor, lengths: Tensor) -> Tensor:
    """`(N,)` the how manieth target of its completion each is, from 0."""
    firsts = torch.cumsum(lengths, 0) - lengths
    return torch.arange(len(completion), device=completion.device) - firsts[completion]


def mask_of(lengths: Tensor) -> Tensor:
    """`(C, T)` true where a completion of `lengths` has a token."""
    return torch.arange(int(lengths.max()) if len(lengths) else 0, device=lengths.device) < lengths[:, None]


@torch.no_grad()
def token_entropies(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, softcap: float | None = None, chunk: int = 64
) -> Tensor:
    """`(N,)` entropy in nats of the distribution over the vocabulary at each state; `chunk` states at a time."""
    found = hidden.new_empty(len(hidden), dtype=torch.float32)
    for rows in slices(len(hidden), chunk):
        shares = logits_of(hidden[rows].to(weight.dtype), weight, bias, slice(None), softcap).softmax(-1)
        found[rows] = torch.special.entr(shares).sum(-1)  # 0 where a token is excluded, which −p·log p is not
    return found


@torch.no_grad()
def likeliest_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None, *, chunk: int = 64
) -> Tensor:
    """`(N,)` int64, the likeliest token at each state; of equals the first, as in greedy decoding.

    `TokenScores.is_top1` says yes to each of them, and logits in bf16 are equal often. `chunk` states at a time.
    """
    found = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
    for rows in slices(len(hidden), chunk):
        found[rows] = logits_of(hidden[rows].to(weight.dtype), weight, bias, slice(None), softcap).argmax(-1)
    return found
