"""Chunked log-probabilities against `log_softmax` of whole logits: values, gradients, and what is kept in memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_ft.losses.logprobs import (
    likeliest_tokens,
    mask_of,
    places_in_completion,
    rows_by_completion,
    sum_by_completion,
    token_entropies,
    token_scores,
)

N, H, V = 23, 8, 61
# Under LoRA weight and bias are frozen, and gradients are formed in the forward pass; where they are trained, logits
# are formed again in the backward pass. Whatever holds of one holds of the other.
both_ways = pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])


def inputs(
    dtype: torch.dtype = torch.float32, n: int = N, trained: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden (wanting a gradient), weight, bias (both if `trained`), targets, and weights for an uneven gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((n, H), (V, H), (V,)))
    targets = torch.randint(V, (n,), generator=generator)
    by = torch.randn(n, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(trained), bias.requires_grad_(trained), targets, by


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def gradients(loss: Tensor, *given: Tensor) -> list[Tensor]:
    """Those of the given that want one."""
    return list(torch.autograd.grad(loss, [value for value in given if value.requires_grad]))


def exactly(*given: Tensor) -> list[Tensor]:
    """The same numbers in float64, wanting gradients as before."""
    return [value.detach().double().requires_grad_(value.requires_grad) for value in given]


# Logits of size ~10 in float32: a few units in the seventh digit.
CLOSE: Any = {"rtol": 1e-5, "atol": 5e-6, "check_dtype": False}


KINDS: list[tuple[float | None, bool]] = [(None, True), (2.0, False), (None, False), (2.0, True)]  # softcap, with_bias
CHUNKS, TILES = (1, 4, N - 1, 256), (1, 7, V, 10_000)


@both_ways
@pytest.mark.parametrize(
    ("chunk", "tile", "softcap", "with_bias"),
    # A Latin square: each kind of vocabulary meets every chunk and every tile, and each chunk every tile.
    [(chunk, TILES[(j + k) % 4], *kind) for j, chunk in enumerate(CHUNKS) for k, kind in enumerate(KINDS)],
)
def test_equals_log_softmax(trained: bool, chunk: int, tile: int, softcap: float | None, with_bias: bool) -> None:
    """Values and all gradients against float64, which is exact by comparison.

    The function computes in float32 whatever it is given, so finite differences (gradcheck) would measure only its
    rounding; autograd through the plain formula in float64 is the sharper judge.
    """
    hidden, weight, bias, targets, by = inputs(trained=trained)
    given = [hidden, weight, bias] if with_bias else [hidden, weight]
    scores = token_scores(hidden, weight, targets, bias if with_bias else None, softcap=softcap, chunk=chunk, tile=tile)
    exact = exactly(*given)
    wanted = naive(exact[0], exact[1], targets, exact[2] if with_bias else None, softcap)
    torch.testing.assert_close(scores.logprobs, wanted, **CLOSE)
    found = gradients((scores.logprobs * by).sum(), *given)
    assert len(found) == (len(given) if trained else 1)
    for one, other in zip(found, gradients((wanted * by).sum(), *exact), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("wants", [(0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_any_of_the_three_may_be_frozen(wants: tuple[int, ...], softcap: float | None) -> None:
    """(hidden, weight, bias): a trained bias with a frozen weight, a trained head on a frozen body."""
    *given, targets, by = inputs()
    for value, wanted in zip(given, wants, strict=True):
        value.requires_grad_(bool(wanted))
    hidden, weight, bias = given
    exact = exactly(*given)
    scores = token_scores(hidden, weight, targets, bias, softcap=softcap, chunk=5, tile=7)
    (scores.logprobs * by).sum().backward()
    (naive(exact[0], exact[1], targets, exact[2], softcap) * by).sum().backward()
    for one, other in zip(given, exact, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, **CLOSE)


@both_ways
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_blocks_change_nothing(trained: bool, softcap: float | None) -> None:
    """One block, many, or one per target and entry: the same values and gradients to rounding."""
    results = []
    for chunk, tile in ((1, 1), (5, 1000), (1000, 7), (1000, 1000), (None, None)):
        hidden, weight, bias, targets, by = inputs(n=9, trained=trained)
        scores = token_scores(hidden, weight, targets, bias, softcap=softcap, chunk=chunk, tile=tile)
        found = gradients((scores.logprobs * by).sum(), hidden, weight, bias)
        results.append((scores.logprobs, scores.is_top1, *found))
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=5e-6)


def preference(logprobs: Tensor) -> Tensor:
    """As DPO has it: four completions of uneven length, two pairs, a sigmoid of each pair's difference of sums."""
    completion = torch.tensor([0] * 5 + [1] * 3 + [2] * 9 + [3] * (N - 17))
    sums = sum_by_completion(logprobs, completion, 4)
    return -F.logsigmoid(0.1 * (sums[0::2] - sums[1::2])).sum()


def clipped(logprobs: Tensor) -> Tensor:
    """As PPO has it: a ratio, which no gradient crosses where it is clipped."""
    return (logprobs + 3.0).exp().clamp(max=1.2).square().sum()


@both_ways
@pytest.mark.parametrize("loss", [preference, clipped])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_any_loss_of_log_probabilities(trained: bool, loss: Callable[[Tensor], Tensor], softcap: float | None) -> None:
    """The factor of each target is not known before all of them are: the loss is not a sum of log-probabilities."""
    hidden, weight, bias, targets, _ = inputs(trained=trained)
    exact = exactly(hidden, weight, bias)
    found = loss(token_scores(hidden, weight, targets, bias, softcap=softcap, chunk=4, tile=7).logprobs)
    wanted = loss(naive(exact[0], exact[1], targets, exact[2], softcap))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, check_dtype=False)
    for one, other in zip(gradients(found, hidden, weight, bias), gradients(wanted, *exact), strict=True):
        assert other.any()
        # The factors themselves, exponentials of errors in the sixth digit, add their share.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()), check_dtype=False)


@both_ways
def test_going_back_twice(trained: bool) -> None:
    """What the forward pass keeps is not used up: the second gradient is that of its own factors."""
    hidden, weight, bias, targets, by = inputs(trained=trained)
    logprobs = token_scores(hidden, weight, targets, bias, chunk=4, tile=7).logprobs
    given = [value for value in (hidden, weight, bias) if value.requires_grad]
    first = torch.autograd.grad(logprobs, given, by, retain_graph=True)
    torch.autograd.grad(logprobs, given, by * 7, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(logprobs, given, by), strict=True):
        assert torch.equal(one, other)


@both_ways
def test_agrees_with_finite_differences(trained: bool) -> None:
    """Central differences of float32 values: a step of 1e-2 leaves 1e-4 of curvature and 1e-4 of rounding."""
    hidden, weight, bias, targets, by = inputs(n=3, trained=trained)
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


@both_ways
@pytest.mark.parametrize("tile", [1, 7, V, 10_000])
def test_is_top1(trained: bool, tile: int) -> None:
    hidden, weight, bias, _, _ = inputs(trained=trained)
    likeliest = (hidden @ weight.T + bias).argmax(-1)
    assert len(set((likeliest // 7).tolist())) > 3  # in several of the tiles of seven
    assert token_scores(hidden, weight, likeliest, bias, chunk=5, tile=tile).is_top1.all()
    for shift in (1, 7, V - 1):
        assert not token_scores(hidden, weight, (likeliest + shift) % V, bias, chunk=5, tile=tile).is_top1.any()


@both_ways
@pytest.mark.parametrize("tile", [1, 2, 7, 60, V])
def test_every_entry_as_a_target(trained: bool, tile: int) -> None:
    """Among them the first and the last of each tile, and of the vocabulary."""
    hidden, weight, bias, _, by = inputs(n=V, trained=trained)
    targets = torch.arange(V)
    exact = exactly(hidden, weight, bias)
    scores = token_scores(hidden, weight, targets, bias, chunk=9, tile=tile)
    wanted = naive(exact[0], exact[1], targets, exact[2], None)
    torch.testing.assert_close(scores.logprobs, wanted, **CLOSE)
    assert torch.equal(scores.is_top1, (exact[0] @ exact[1].T + exact[2]).argmax(-1) == targets)
    found = gradients((scores.logprobs * by).sum(), hidden, weight, bias)
    for one, other in zip(found, gradients((wanted * by).sum(), *exact), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@both_ways
@pytest.mark.parametrize("tile", [1, 2, 3, 10])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_extreme_logits(trained: bool, tile: int, order: tuple[int, ...]) -> None:
    """Logits 1e4, −1e4 and 0, met in any order: all of the probability is the first's, to the last bit.

    Log-probabilities are then differences of logits, and the gradient of hidden the difference of two embeddings.
    """
    weight = torch.tensor([1e4, -1e4, 0.0])[list(order)][:, None].requires_grad_(trained)
    hidden = torch.ones(3, 1, requires_grad=True)
    targets = torch.tensor([order.index(k) for k in range(3)])
    scores = token_scores(hidden, weight, targets, chunk=2, tile=tile)
    assert scores.logprobs.tolist() == [0.0, -2e4, -1e4]
    assert scores.is_top1.tolist() == [True, False, False]
    scores.logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [0.0, -2e4, -1e4]
    if trained:  # +1 where a target is, −1 at the largest for each: (1 − 3, 1, 1)
        assert weight.grad is not None
        assert weight.grad.flatten()[targets].tolist() == [-2.0, 1.0, 1.0]


@both_ways
@pytest.mark.parametrize("tile", [7, 10_000])
def test_bf16(trained: bool, tile: int) -> None:
    """bf16 keeps 8 bits: logits of size L are off by L · 2⁻⁹, gradients by about that share of their norm."""
    hidden, weight, bias, targets, by = inputs(torch.bfloat16, trained=trained)
    scores = token_scores(hidden, weight, targets, bias, chunk=7, tile=tile)
    assert scores.logprobs.dtype == torch.float32
    found = gradients((scores.logprobs * by).sum(), hidden, weight, bias)
    exact = exactly(hidden, weight, bias)
    wanted = naive(exact[0], exact[1], targets, exact[2], None)
    size = float((exact[0] @ exact[1].T).detach().abs().max())
    # The target's logit and the logsumexp are each off by at most one rounding.
    torch.testing.assert_close(scores.logprobs, wanted, rtol=0, atol=2 * size * 2**-9, check_dtype=False)
    for one, other in zip(found, gradients((wanted * by).sum(), *exact), strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one - other).norm() / other.norm()) < 0.02


@both_ways
def test_float32_states_and_a_bf16_weight(trained: bool) -> None:
    """As under autocast: each gradient comes back in the format of what it belongs to."""
    hidden, weight, bias, targets, by = inputs(trained=trained)
    half = weight.detach().bfloat16().requires_grad_(trained)
    exact = exactly(hidden.bfloat16().detach().requires_grad_(), half, bias)
    scores = token_scores(hidden, half, targets, bias, chunk=7, tile=7)
    found = gradients((scores.logprobs * by).sum(), hidden, half, bias)
    assert [one.dtype for one in found] == [value.dtype for value in (hidden, half, bias) if value.requires_grad]
    wanted = gradients((naive(exact[0], exact[1], targets, exact[2], None) * by).sum(), *exact)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02  # as in `test_bf16`


def test_weight_gradient_is_summed_in_float32() -> None:
    """512 chunks of gradient ½ each: a running sum in bf16 would stop growing at 128, its spacing there being 1."""
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    scores = token_scores(hidden, weight, torch.zeros(512, dtype=torch.long), chunk=1)
    scores.logprobs.sum().backward()
    # d logp/d logit is ½ for the target and −½ for the other.
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [256.0, -256.0]


@both_ways
def test_mean_embedding_is_summed_in_float32(trained: bool) -> None:
    """1024 tiles of embedding 1: a running sum in bf16 would stop at 256, its spacing there being 2.

    All entries are equal, so that a target's embedding less the mean one is 0.
    """
    weight = torch.ones(1024, 1, dtype=torch.bfloat16, requires_grad=trained)
    hidden = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    token_scores(hidden, weight, torch.tensor([5]), tile=1).logprobs.sum().backward()
    assert hidden.grad is not None
    # Trained: −1/1024 a thousand times and 1 − 1/1024 once, all exact in float32.
    assert hidden.grad.item() == pytest.approx(0.0, abs=1e-3)


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, bias, targets, _ = inputs(trained=False)
    token_scores(hidden, weight, targets, bias).logprobs.sum().backward()
    assert weight.grad is None
    assert bias.grad is None
    assert hidden.grad is not None


@both_ways
def test_no_targets(trained: bool) -> None:
    hidden, weight, bias, targets, _ = inputs(n=0, trained=trained)
    scores = token_scores(hidden, weight, targets, bias)
    assert scores.logprobs.shape == scores.is_top1.shape == (0,)
    scores.logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, H)
    if trained:
        assert weight.grad is not None
        assert not weight.grad.any()


def test_shapes_are_checked() -> None:
    hidden, weight, _, targets, _ = inputs()
    with pytest.raises(ValueError, match=r"expected hidden \(N, H\) and targets \(N,\), got \(23, 8\), \(22,\)"):
        token_scores(hidden, weight, targets[:-1])


class Watch(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes, and counts matrix products by name."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.products: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        name = func.overloadpacket.__name__
        if name.rstrip("_") in ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "einsum", "mv", "addmv"):
            self.products[name] += 1
        return out


@both_ways
@pytest.mark.parametrize(("n", "chunk", "tile"), [(200, 30, 16), (40, 20, 30), (40, 9, 9)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_no_tensor_is_as_large_as_the_vocabulary_times_the_targets(
    trained: bool, n: int, chunk: int, tile: int, softcap: float | None
) -> None:
    """In neither pass; between them the frozen way keeps `(N, H)` and nothing else, the other one its inputs."""
    hidden, weight, bias, targets, by = inputs(n=n, trained=trained)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with Watch() as seen:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = token_scores(hidden, weight, targets, bias, softcap=softcap, chunk=chunk, tile=tile)
        # Past the hooks: a tensor that hangs on the node itself would live as long.
        assert not any(isinstance(value, Tensor) for value in vars(scores.logprobs.grad_fn).values())
        (scores.logprobs * by).sum().backward()
    assert sorted(kept) == sorted([(n, H), (V, H), (V,), (n,), (n,)] if trained else [(n, H)])
    assert seen.numel == max(chunk * tile, n * H, V * H if trained else 0) < n * V


@pytest.mark.parametrize(("n", "chunk", "tile"), [(N, 4, 7), (N, N, V), (N, 1, V), (N, 256, 10_000), (N, 5, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_frozen_vocabulary_is_met_once(n: int, chunk: int, tile: int, softcap: float | None) -> None:
    """Per block one product for the logits and one for the mean embedding, and none in the backward pass."""
    hidden, weight, bias, targets, by = inputs(n=n, trained=False)
    blocks = math.ceil(n / chunk) * math.ceil(V / tile)
    with Watch() as forward:
        logprobs = token_scores(hidden, weight, targets, bias, softcap=softcap, chunk=chunk, tile=tile).logprobs
    assert forward.products == {"mm": blocks, "addmm_": blocks}
    with Watch() as backward:
        (logprobs * by).sum().backward()
    assert backward.products == {}
    assert hidden.grad is not None


def test_a_trained_vocabulary_is_met_again() -> None:
    """Forward the logits only; backward the logits again, and a product for each gradient that is wanted."""
    blocks = math.ceil(N / 4) * math.ceil(V / 7)
    for wants_hidden in (True, False):
        hidden, weight, bias, targets, by = inputs()
        hidden.requires_grad_(wants_hidden)
        with Watch() as forward:
            logprobs = token_scores(hidden, weight, targets, bias, chunk=4, tile=7).logprobs
        assert forward.products == {"mm": blocks}
        with Watch() as backward:
            (logprobs * by).sum().backward()
        assert backward.products == {"mm": blocks * (3 if wants_hidden else 2)}


def test_without_a_gradient_no_mean_embedding_is_formed() -> None:
    """Evaluation and a reference model's scores cost one product per block."""
    hidden, weight, bias, targets, _ = inputs(trained=False)
    wanted = token_scores(hidden, weight, targets, bias).logprobs.detach()
    with Watch() as seen, torch.no_grad():
        scores = token_scores(hidden * 1, weight, targets, bias, chunk=4, tile=7)  # states made under no_grad
    assert seen.products == {"mm": math.ceil(N / 4) * math.ceil(V / 7)}
    assert not scores.logprobs.requires_grad
    torch.testing.assert_close(scores.logprobs, wanted, **CLOSE)


def test_states_made_with_a_gradient_but_scored_without_one() -> None:
    hidden, weight, bias, targets, _ = inputs(trained=False)
    with Watch() as seen, torch.no_grad():
        token_scores(hidden, weight, targets, bias, chunk=4, tile=7)
    assert "addmm_" not in seen.products


@pytest.mark.parametrize("tile", [2, 7, V])
def test_entries_excluded_by_their_bias(tile: int) -> None:
    """A bias of −inf takes entries out, be they the whole first tile."""
    hidden, weight, bias, targets, by = inputs(trained=False)
    bias = bias.clone()
    bias[:3] = -torch.inf
    targets = targets.clamp(min=3)
    scores = token_scores(hidden, weight, targets, bias, tile=tile)
    exact = hidden.detach().double().requires_grad_()
    wanted = naive(exact, weight.double(), targets, bias.double(), None)
    torch.testing.assert_close(scores.logprobs, wanted, **CLOSE)
    (found,) = torch.autograd.grad((scores.logprobs * by).sum(), hidden)
    torch.testing.assert_close(found, torch.autograd.grad((wanted * by).sum(), exact)[0], **CLOSE)


def test_sum_by_completion() -> None:
    """Completion 1 has no targets, so its sum is 0; gradients go back to the tokens they came from."""
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    sums = sum_by_completion(values, torch.tensor([0, 2, 0]), 3)
    assert sums.tolist() == [5.0, 0.0, 2.0]
    (gradient,) = torch.autograd.grad((sums * torch.tensor([1.0, 10.0, 100.0])).sum(), values)
    assert gradient.tolist() == [1.0, 100.0, 1.0]


# Entropies.


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(("softcap", "with_bias"), KINDS)
def test_entropies(chunk: int, softcap: float | None, with_bias: bool) -> None:
    """PyTorch's own entropy of a categorical distribution, in float64 from whole logits."""
    hidden, weight, bias, *_ = exactly(*inputs()[:3])
    logits = hidden @ weight.T + (bias if with_bias else 0)
    wanted = torch.distributions.Categorical(
        logits=logits if softcap is None else softcap * torch.tanh(logits / softcap)
    ).entropy()
    given = inputs()
    found = token_entropies(given[0], given[1], given[2] if with_bias else None, softcap=softcap, chunk=chunk)
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted.detach(), **CLOSE)


def test_entropies_by_hand() -> None:
    """Equal logits: log V. One far above all: 0. Two of three equal and one excluded: log 2."""
    weight = torch.eye(3)
    hidden = torch.tensor([[2.0, 2.0, 2.0], [90.0, 0.0, 0.0]])
    torch.testing.assert_close(token_entropies(hidden, weight), torch.tensor([math.log(3), 0.0]), rtol=1e-6, atol=1e-6)
    excluded = token_entropies(hidden[:1], weight, torch.tensor([0.0, 0.0, -math.inf]))
    torch.testing.assert_close(excluded, torch.tensor([math.log(2)]), rtol=1e-6, atol=1e-6)
    assert token_entropies(hidden[:0], weight).shape == (0,)


def test_entropies_of_half_precision_are_in_float32() -> None:
    hidden, weight, bias, *_ = inputs(torch.bfloat16)
    found = token_entropies(hidden, weight, bias)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, token_entropies(hidden.float(), weight.float(), bias.float()), rtol=0.05, atol=0.02
    )


# Rows of completions.


def test_rows_by_completion() -> None:
    """Completions of 2, 0, 3 and 1 targets; zeros after each end."""
    lengths = torch.tensor([2, 0, 3, 1])
    completion = torch.tensor([0, 0, 2, 2, 2, 3])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], requires_grad=True)
    rows = rows_by_completion(values, completion, lengths)
    assert rows.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5], [6, 0, 0]]
    assert places_in_completion(completion, lengths).tolist() == [0, 1, 0, 1, 2, 0]
    mask = mask_of(lengths)
    assert mask.tolist() == [[True, True, False], [False] * 3, [True] * 3, [True, False, False]]
    assert torch.equal(rows[mask], values)
    torch.testing.assert_close(rows.sum(1), sum_by_completion(values, completion, 4))
    weights = torch.arange(12.0).view(4, 3)
    (rows * weights).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [0, 1, 6, 7, 8, 9]


def test_no_rows() -> None:
    none, whole = torch.empty(0), torch.empty(0, dtype=torch.long)
    assert rows_by_completion(none, whole, whole).shape == mask_of(whole).shape == (0, 0)
    zero = torch.tensor([0, 0])
    assert rows_by_completion(none, whole, zero).shape == mask_of(zero).shape == (2, 0)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_likeliest_tokens_are_those_of_whole_logits(chunk: int, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(size, generator=generator) for size in ((N, H), (V, H), (V,)))
    logits = hidden @ weight.T + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    assert torch.equal(likeliest_tokens(hidden, weight, bias, softcap, chunk=chunk), logits.argmax(-1))
    assert likeliest_tokens(hidden[:0], weight).shape == (0,)


def test_of_equal_logits_the_first_token_is_the_likeliest() -> None:
    """As greedy decoding chooses; `is_top1` is true of both."""
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [1.0], [1.0]])
    assert likeliest_tokens(hidden, weight).tolist() == [1, 1]
    assert token_scores(hidden, weight, torch.tensor([1, 2])).is_top1.tolist() == [True, True]
