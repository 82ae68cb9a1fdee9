"""KL divergence between what two models predict, exact over the vocabulary, and its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_ft.losses.logprobs import logits_of, slices

# Targets whose distributions exist at a time: with 150,000 entries, five tensors of them take 200 MB.
CHUNK = 64


class Predictions(NamedTuple):
    """What a model predicts at N places, as it stands before the softmax: logits are `states @ weightᵀ + bias`.

    Attributes:
        states: `(N, H)`.
        weight: `(V, H)` the output embedding.
        bias: `(V,)` or None.
        softcap: Gemma 2's `softcap · tanh(logits / softcap)`, or None.
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


def token_kl(reference: Predictions, policy: Predictions, *, chunk: int = CHUNK) -> Tensor:
    """`(N,)` KL(reference ‖ policy) = Σ_v p_v · (log p_v − log q_v) in nats, float32, p being the reference's.

    On answers that the reference drew its mean estimates how far the policy is from it without the noise that the
    ratio of the drawn tokens alone has. As a loss it is distillation to the reference (Hinton et al. 2015,
    arXiv:1503.02531, at temperature 1; against forgetting: Li & Hoiem 2016, arXiv:1606.09282): its gradient at the
    logits is q − p. It is differentiable in `policy.states` alone, and that gradient is formed with the value, so that
    the vocabulary is met once.

    Args:
        reference: it gets no gradient. A token that it excludes (a bias of −inf) adds nothing.
        policy: of as many places and entries.
        chunk: places whose distributions exist at a time.

    Raises:
        ValueError: shapes differ, or the policy's output embedding is trained, whose gradient is not formed here.
    """
    if len(reference.states) != len(policy.states) or len(reference.weight) != len(policy.weight):
        raise ValueError(
            f"expected predictions at the same places over the same vocabulary, got {len(reference.states)} places and "
            f"{len(reference.weight)} entries beside {len(policy.states)} and {len(policy.weight)}"
        )
    wanted = torch.is_grad_enabled()
    if wanted and (policy.weight.requires_grad or (policy.bias is not None and policy.bias.requires_grad)):
        raise ValueError("the policy's output embedding is trained: its gradient is not formed here")
    found: Tensor = _TokenKL.apply(policy.states, policy[1:], reference, chunk, wanted)
    return found


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: tuple[Any, ...], reference: Predictions, chunk: int, wanted: bool
    ) -> Tensor:
        weight, _, softcap = head
        found = states.new_empty(len(states), dtype=torch.float32)
        needed = wanted and ctx.needs_input_grad[0]
        gradient = states.new_empty(states.shape, dtype=torch.float32) if needed else None
        with torch.autocast(states.device.type, enabled=False):
            for rows in slices(len(states), chunk):
                expected = _logits(reference.states[rows], *reference[1:]).log_softmax(-1).to(states.device)
                logits = _logits(states[rows], *head)
                predicted = logits.log_softmax(-1)
                shares = expected.exp()
                found[rows] = torch.where(shares > 0, shares * (expected - predicted), 0.0).sum(-1)
                if gradient is not None:
                    apart = predicted.exp_().sub_(shares)
                    if softcap is not None:
                        apart *= 1 - (logits / softcap).square()
                    gradient[rows] = (apart.to(weight.dtype) @ weight).float()
        ctx.dtype = states.dtype
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None]).to(ctx.dtype), None, None, None, None


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """`(n, V)` float32."""
    return logits_of(states.to(weight.dtype), weight, bias, slice(None), softcap)
