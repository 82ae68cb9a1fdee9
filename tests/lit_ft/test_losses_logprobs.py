"""Chunked log-probabilities against `log_softmax` of whole logits: values, gradients, and what is kept in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_ft.losses.logprobs import sum_by_completion, token_scores
from lit_ft.losses.sft import sft_loss

N, H, V = 23, 8, 61


def inputs(dtype: torch.dtype = torch.float32, n: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias (all wanting gradients), targets, and weights that make the gradient not uniform."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in ((n, H), (V, H), (V,))
    )
    targets = torch.randint(V, (n,), generator=generator)
    return hidden, weight, bias, targets, torch.randn(n, generator=generator)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@pytest.mark.parametrize("chunk", [1, 4, N - 1, N, 256])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_log_softmax(chunk: int, softcap: float | None, with_bias: bool) -> None:
    """Values and all gradients against float64, which is exact by comparison.

    The function computes in float32 whatever it is given, so finite differences (gradcheck) would measure only its
    rounding; autograd through the plain formula in float64 is the sharper judge.
    """
    hidden, weight, bias, targets, by = inputs()
    given = [hidden, weight, bias] if with_bias else [hidden, weight]
    scores = token_scores(hidden, weight, targets, bias if with_bias else None, softcap=softcap, chunk=chunk)
    found = torch.autograd.grad((scores.logprobs * by).sum(), given)

    exact = [value.detach().double().requires_grad_() for value in given]
    wanted = naive(exact[0], exact[1], targets, exact[2] if with_bias else None, softcap)
    gradients = torch.autograd.grad((wanted * by).sum(), exact)

    # Logits of size ~10 in float32: a few units in the seventh digit.
    close: Any = {"rtol": 1e-5, "atol": 5e-6, "check_dtype": False}
    torch.testing.assert_close(scores.logprobs, wanted, **close)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_chunks_change_nothing(softcap: float | None) -> None:
    """One chunk, many, or one per target: the same values and gradients to rounding."""
    results = []
    for chunk in (1, 5, 1000):
        hidden, weight, bias, targets, by = inputs()
        scores = token_scores(hidden, weight, targets, bias, softcap=softcap, chunk=chunk)
        gradients = torch.autograd.grad((scores.logprobs * by).sum(), (hidden, weight, bias))
        results.append((scores.logprobs, scores.is_top1, *gradients))
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=5e-6)


def test_agrees_with_finite_differences() -> None:
    """Central differences of float32 values: a step of 1e-2 leaves 1e-4 of curvature and 1e-4 of rounding."""
    hidden, weight, bias, targets, by = inputs(n=3)
    for softcap in (None, 2.0):
        scores = token_scores(hidden, weight, targets, bias, softcap=softcap, chunk=2)
        (gradient,) = torch.autograd.grad((scores.logprobs * by).sum(), hidden)
        step = 1e-2
        with torch.no_grad():
            for row, column in ((0, 0), (1, 3), (2, 7)):
                moved = torch.zeros_like(hidden)
                moved[row, column] = step
                up, down = (
                    (token_scores(hidden + sign * moved, weight, targets, bias, softcap=softcap).logprobs * by).sum()
                    for sign in (1, -1)
                )
                assert float(gradient[row, column]) == pytest.approx(float(up - down) / (2 * step), abs=2e-3)


def test_is_top1() -> None:
    hidden, weight, bias, _, _ = inputs()
    likeliest = (hidden @ weight.T + bias).argmax(-1)
    assert token_scores(hidden, weight, likeliest, bias, chunk=5).is_top1.all()
    assert not token_scores(hidden, weight, (likeliest + 1) % V, bias, chunk=5).is_top1.any()


def test_bf16() -> None:
    """bf16 keeps 8 bits: logits of size L are off by L · 2⁻⁹, gradients by about that share of their norm."""
    hidden, weight, bias, targets, by = inputs(torch.bfloat16)
    scores = token_scores(hidden, weight, targets, bias, chunk=7)
    assert scores.logprobs.dtype == torch.float32
    found = torch.autograd.grad((scores.logprobs * by).sum(), (hidden, weight, bias))
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight, bias)]
    wanted = naive(exact[0], exact[1], targets, exact[2], None)
    size = float((exact[0] @ exact[1].T).detach().abs().max())
    # The target's logit and the logsumexp are each off by at most one rounding.
    torch.testing.assert_close(scores.logprobs, wanted, rtol=0, atol=2 * size * 2**-9, check_dtype=False)
    for one, other in zip(found, torch.autograd.grad((wanted * by).sum(), exact), strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one - other).norm() / other.norm()) < 0.02


def test_weight_gradient_is_summed_in_float32() -> None:
    """512 chunks of gradient ½ each: a running sum in bf16 would stop growing at 128, its spacing there being 1."""
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    scores = token_scores(hidden, weight, torch.zeros(512, dtype=torch.long), chunk=1)
    scores.logprobs.sum().backward()
    # d logp/d logit is ½ for the target and −½ for the other.
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [256.0, -256.0]


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, _, targets, _ = inputs()
    weight.requires_grad_(False)
    token_scores(hidden, weight, targets).logprobs.sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_no_targets() -> None:
    hidden, weight, bias, targets, _ = inputs(n=0)
    scores = token_scores(hidden, weight, targets, bias)
    assert scores.logprobs.shape == scores.is_top1.shape == (0,)
    scores.logprobs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_shapes_are_checked() -> None:
    hidden, weight, _, targets, _ = inputs()
    with pytest.raises(ValueError, match=r"expected hidden \(N, H\) and targets \(N,\), got \(23, 8\), \(22,\)"):
        token_scores(hidden, weight, targets[:-1])


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_no_tensor_is_as_large_as_the_vocabulary_times_the_targets() -> None:
    """In neither pass; and between them only what is `(N, H)`, `(V, H)`, `(V,)` or `(N,)` is kept."""
    n, chunk = 400, 10
    hidden, weight, bias, targets, by = inputs(n=n)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with Largest() as seen:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = token_scores(hidden, weight, targets, bias, chunk=chunk)
        (scores.logprobs * by).sum().backward()
    assert set(kept) == {(n, H), (V, H), (V,), (n,)}
    assert seen.numel == max(chunk * V, n * H, V * H) < n * V


def test_sum_by_completion() -> None:
    """Completion 1 has no targets, so its sum is 0; gradients go back to the tokens they came from."""
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    sums = sum_by_completion(values, torch.tensor([0, 2, 0]), 3)
    assert sums.tolist() == [5.0, 0.0, 2.0]
    (gradient,) = torch.autograd.grad((sums * torch.tensor([1.0, 10.0, 100.0])).sum(), values)
    assert gradient.tolist() == [1.0, 100.0, 1.0]


def test_sft_loss_is_divided_by_the_window() -> None:
    """−(−1 − 2) / 6 = 0.5: the micro-batch holds two of the window's six targets."""
    assert sft_loss(torch.tensor([-1.0, -2.0]), 6).item() == 0.5
