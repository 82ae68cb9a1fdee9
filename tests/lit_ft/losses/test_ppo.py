"""PPO's pieces by hand, at their limits, and by the facts that hold for every rollout.

Beside TRL, whose GRPOTrainer has the same clipped surrogate: `test_losses_grpo.py`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_ft.losses.ppo import (
    AdaptiveKL,
    FixedKL,
    gae,
    kl_estimate,
    masked_mean,
    masked_sum,
    masked_whiten,
    missing_end_penalty,
    policy_loss,
    token_rewards,
    value_loss,
)

CLOSE: Any = {"rtol": 1e-6, "atol": 1e-6}
NAN = math.nan

# Completions of 5, 1 and 3 tokens; one that starts late; one with a token in its midst that is not its own.
RAGGED = torch.tensor(
    [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 0, 1, 0]], dtype=torch.bool
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_of(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def spoiled(values: Tensor) -> Tensor:
    """NaN wherever RAGGED has no token."""
    return values.masked_fill(~RAGGED, NAN)


# Means and whitening


def test_masked_mean() -> None:
    """(1 + 2 + 6) / 3; what is masked may be anything."""
    values, mask = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert masked_sum(values, mask).item() == 9 and masked_mean(values, mask).item() == 3


def test_mean_of_nothing_can_be_backpropagated() -> None:
    values = torch.ones(1, 2, requires_grad=True)
    mean = masked_mean(values, torch.zeros(1, 2, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0 and values.grad is not None and values.grad.tolist() == [[0, 0]]


def test_whiten() -> None:
    """1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5 of the population; divided by √3.5 = 1.870828693."""
    values, mask = torch.tensor([[1.0, 2.0, 100.0], [3.0, 6.0, NAN]]), torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()
    wanted = torch.tensor([[-2.0, -1.0, 0.0], [0.0, 3.0, 0.0]]) / 1.870828693
    torch.testing.assert_close(masked_whiten(values, mask), wanted, **CLOSE)
    # As rewards are: the mean comes back, outside the mask nothing does.
    torch.testing.assert_close(masked_whiten(values, mask, shift_mean=False), wanted + 3 * mask, **CLOSE)


def test_whitened_values_have_mean_0_and_variance_1() -> None:
    found = masked_whiten(5 + 3 * noise(*RAGGED.shape), RAGGED)
    assert found[RAGGED].mean().item() == pytest.approx(0, abs=1e-6)
    assert found[RAGGED].var(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert not found[~RAGGED].any()


def test_whitening_what_does_not_vary() -> None:
    """One token, or the same value at all: nothing to scale, and no division by 0."""
    value = torch.tensor([[2.0]])
    assert masked_whiten(value, all_of(value)).item() == 0
    assert masked_whiten(value, all_of(value), shift_mean=False).item() == 2


# KL estimates


def test_kl_estimates_in_expectation() -> None:
    """Over all tokens of a known distribution k1 and k3 are the KL; k2 is half the mean square instead."""
    policy, reference = noise(7, seed=1).double().log_softmax(0), noise(7, seed=2).double().log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    assert exact > 0.1
    means = {kind: (policy.exp() * kl_estimate(policy, reference, kind)).sum() for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(means["k1"], exact)
    torch.testing.assert_close(means["k3"], exact)
    torch.testing.assert_close(means["k2"], 0.5 * (policy.exp() * (policy - reference).square()).sum())


def test_kl_estimates() -> None:
    """Δ = ln 2 and −ln 2: ±0.693147181; ½Δ² = 0.240226507; e^−Δ − 1 + Δ = 0.193147181 and 0.306852819."""
    logps, reference = torch.tensor([0.0, -math.log(2)]), torch.tensor([-math.log(2), 0.0])
    torch.testing.assert_close(kl_estimate(logps, reference, "k1"), torch.tensor([0.693147181, -0.693147181]), **CLOSE)
    torch.testing.assert_close(kl_estimate(logps, reference, "k2"), torch.tensor([0.240226507] * 2), **CLOSE)
    torch.testing.assert_close(kl_estimate(logps, reference, "k3"), torch.tensor([0.193147181, 0.306852819]), **CLOSE)
    assert torch.equal(kl_estimate(logps, reference), kl_estimate(logps, reference, "k1"))


def test_k3_is_never_negative() -> None:
    """Nor where the two almost agree, and exp(−Δ) − 1 would be rounding only."""
    logps = -1 - noise(1000, seed=3).abs()
    for size in (1e-7, 1e-4, 1.0):
        assert (kl_estimate(logps, logps + size * noise(1000, seed=4), "k3") >= 0).all()
    for kind in ("k1", "k2", "k3"):
        assert not kl_estimate(logps, logps, kind).any()  # type: ignore[arg-type]


def test_kl_of_another_kind_or_shape() -> None:
    kind: Any = "k4"
    with pytest.raises(ValueError, match="must be one of k1, k2, k3, not 'k4'"):
        kl_estimate(torch.zeros(2), torch.zeros(2), kind)
    with pytest.raises(ValueError, match=r"got logps \(2, 3\), reference \(3,\)"):
        kl_estimate(torch.zeros(2, 3), torch.zeros(3))


# Rewards of tokens


def test_penalty_of_completions_without_end() -> None:
    scores, ended = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([True, False, False])
    assert missing_end_penalty(scores, ended, 1.5).tolist() == [1.0, 0.5, -2.5]
    assert missing_end_penalty(scores, ended, None).tolist() == scores.tolist()
    assert scores.tolist() == [1.0, 2.0, -1.0]
    for penalty in (-1.0, NAN):
        with pytest.raises(ValueError, match="must be at least 0"):
            missing_end_penalty(scores, ended, penalty)
    with pytest.raises(ValueError, match=r"got \(3,\) and \(3,\) of torch.float32"):
        missing_end_penalty(scores, ended.float(), 1.0)


def test_token_rewards() -> None:
    """β = 0.1; the score goes to the last token of each completion, wherever that is."""
    kl = torch.tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN], [NAN, 5.0, NAN]])
    mask = ~kl.isnan()
    found = token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, 0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.1, -0.2, 9.7], [19.6, 0, 0], [0, 29.5, 0]]), **CLOSE)


def test_scores_without_kl_and_kl_without_scores() -> None:
    scores, kl = noise(5), noise(5, 5)
    alone = token_rewards(scores, kl, RAGGED, 0.0)
    torch.testing.assert_close(alone.sum(1), scores, **CLOSE)
    assert (alone != 0).sum() == 5
    torch.testing.assert_close(token_rewards(torch.zeros(5), kl, RAGGED, 2.0), -2 * kl * RAGGED, **CLOSE)


def test_a_completion_without_tokens_cannot_be_rewarded() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match="completion 1 has no token"):
        token_rewards(torch.ones(2), torch.zeros(2, 2), mask, 0.1)
    with pytest.raises(ValueError, match=r"one score for each of 2 completions, got \(2, 1\)"):
        token_rewards(torch.ones(2, 1), torch.zeros(2, 2), mask, 0.1)


# Advantages

REWARDS, VALUES = torch.tensor([[-0.1, 0.2, 1.0]]), torch.tensor([[0.5, 0.4, 0.3]])


def test_gae() -> None:
    """γ = 1, λ = 0.95: δ = −0.1 + 0.4 − 0.5, 0.2 + 0.3 − 0.4, 1 − 0.3 = −0.2, 0.1, 0.7. Backwards A = 0.7,
    0.1 + 0.95 · 0.7 = 0.765, −0.2 + 0.95 · 0.765 = 0.52675; returns are A + V.
    """
    found = gae(REWARDS, VALUES, all_of(VALUES))
    torch.testing.assert_close(found.advantages, torch.tensor([[0.52675, 0.765, 0.7]]), **CLOSE)
    torch.testing.assert_close(found.returns, torch.tensor([[1.02675, 1.165, 1.0]]), **CLOSE)


def test_gae_with_discount() -> None:
    """γ = 0.9, λ = 0.5: δ = −0.24, 0.07, 0.7; A = 0.7, 0.07 + 0.45 · 0.7 = 0.385, −0.24 + 0.45 · 0.385 = −0.06675."""
    found = gae(REWARDS, VALUES, all_of(VALUES), gamma=0.9, lam=0.5)
    torch.testing.assert_close(found.advantages, torch.tensor([[-0.06675, 0.385, 0.7]]), **CLOSE)


def test_gae_without_lambda_is_the_residual() -> None:
    found = gae(REWARDS, VALUES, all_of(VALUES), lam=0.0)
    torch.testing.assert_close(found.advantages, torch.tensor([[-0.2, 0.1, 0.7]]), **CLOSE)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_gae_with_lambda_1_is_the_return_less_the_value(gamma: float) -> None:
    """Returns are then what was really earned from there on, and do not depend on the values."""
    earned = torch.tensor([[-0.1 + gamma * (0.2 + gamma), 0.2 + gamma, 1.0]])
    found = gae(REWARDS, VALUES, all_of(VALUES), gamma=gamma, lam=1.0)
    torch.testing.assert_close(found.advantages, earned - VALUES, **CLOSE)
    torch.testing.assert_close(found.returns, earned, **CLOSE)
    torch.testing.assert_close(gae(REWARDS, 7 * VALUES, all_of(VALUES), gamma, 1.0).returns, earned, **CLOSE)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.7, 1.0)])
def test_gae_of_ragged_completions(gamma: float, lam: float) -> None:
    """Each as if it were alone, by the sum that defines it: A_t = Σ_l (γλ)^l δ_{t+l}; padding is never read."""
    rewards, values = noise(5, 5, seed=5), noise(5, 5, seed=6)
    found = gae(spoiled(rewards), spoiled(values), RAGGED, gamma, lam)
    assert not found.advantages[~RAGGED].any() and not found.returns[~RAGGED].any()
    for row, mask in enumerate(RAGGED):
        r, v = rewards[row, mask].tolist(), [*values[row, mask].tolist(), 0.0]
        residuals = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        wanted = [sum((gamma * lam) ** k * d for k, d in enumerate(residuals[t:])) for t in range(len(r))]
        assert found.advantages[row, mask].tolist() == pytest.approx(wanted, abs=1e-5)
        assert found.returns[row, mask].tolist() == pytest.approx(
            [a + b for a, b in zip(wanted, v, strict=False)], abs=1e-5
        )


def test_a_perfect_value_leaves_no_advantage() -> None:
    """V_t = the rewards to come: every residual is 0, whatever λ is."""
    rewards = noise(2, 6, seed=7)
    values = rewards.flip(1).cumsum(1).flip(1)
    for lam in (0.0, 0.95, 1.0):
        found = gae(rewards, values, all_of(values), lam=lam)
        torch.testing.assert_close(found.advantages, torch.zeros(2, 6), rtol=0, atol=1e-5)


def test_the_first_return_is_the_score_less_the_kl() -> None:
    """γ = λ = 1: what a completion earns in all, with β = 0.3, is its score − 0.3 · ΣKL."""
    scores, kl = noise(5, seed=8), noise(5, 5, seed=9)
    returns = gae(token_rewards(scores, spoiled(kl), RAGGED, 0.3), noise(5, 5), RAGGED, lam=1.0).returns
    first = RAGGED.float().argmax(1)
    wanted = scores - 0.3 * (kl * RAGGED).sum(1)
    torch.testing.assert_close(returns[torch.arange(5), first], wanted, **CLOSE)


def test_values_one_token_longer() -> None:
    """Huang et al.: the mask reaches one token past the completion, where the score then is and the KL is 0."""
    longer = torch.ones(1, 4, dtype=torch.bool)
    rewards = token_rewards(torch.tensor([1.0]), torch.tensor([[1.0, 1.0, 1.0, 0.0]]), longer, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, -0.1, -0.1, 1.0]]), **CLOSE)
    found = gae(rewards, torch.tensor([[0.0, 0.0, 0.0, 0.4]]), longer, lam=0.0)
    torch.testing.assert_close(found.advantages, torch.tensor([[-0.1, -0.1, 0.3, 0.6]]), **CLOSE)


def test_no_gradient_flows_through_advantages() -> None:
    """Returns are targets: a value model that could move them would agree with itself."""
    values = VALUES.clone().requires_grad_()
    assert not any(found.requires_grad for found in gae(REWARDS, values, all_of(VALUES)))


# The policy's loss

# Ratios and advantages; what ε = 0.2 makes of max(−Aρ, −A clip(ρ)); and its derivative by log π, −Aρ or 0.
CASES = [
    (1.5, 1.0, -1.2, 0.0),  # too likely already, and wanted more: clipped
    (0.5, 1.0, -0.5, -0.5),  # unlikely and wanted: on its way back, so not clipped
    (1.5, -1.0, 1.5, 1.5),  # likely and not wanted
    (0.5, -1.0, 0.8, 0.0),  # too unlikely already, and wanted less: clipped
    (1.1, 1.0, -1.1, -1.1),
    (0.9, -2.0, 1.8, 1.8),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), CASES)
def test_policy_loss(ratio: float, advantage: float, loss: float, slope: float) -> None:
    old = torch.tensor([[-2.0]])
    logps = (old + math.log(ratio)).requires_grad_()
    found = policy_loss(logps, old, torch.tensor([[advantage]]), all_of(old))
    found.loss.backward()
    assert logps.grad is not None
    assert found.loss.item() == pytest.approx(loss, rel=1e-5)
    assert logps.grad.item() == pytest.approx(slope, rel=1e-5)
    assert found.clipfrac.item() == float(slope == 0)
    assert found.ratio.item() == pytest.approx(ratio, rel=1e-5)
    assert found.approxkl.item() == pytest.approx(0.5 * math.log(ratio) ** 2, rel=1e-4)


def test_policy_loss_is_a_sum_over_tokens() -> None:
    ratios, advantages, losses, _ = (torch.tensor([column]) for column in zip(*CASES, strict=True))
    logps = ratios.log().requires_grad_()
    found = policy_loss(logps, torch.zeros_like(logps), advantages, all_of(logps))
    torch.testing.assert_close(found.loss, losses.sum(), **CLOSE)
    assert found.clipfrac.item() == 2 and found.ratio.item() == pytest.approx(6.0)
    assert [value.requires_grad for value in found] == [True, False, False, False]


def test_clip_range() -> None:
    """ε = 0.6 leaves a ratio of 1.5 alone, ε = 0.4 makes 1.4 of it."""
    old, one = torch.zeros(1, 1), torch.ones(1, 1)
    for clip_range, wanted in ((0.6, -1.5), (0.4, -1.4)):
        found = policy_loss(torch.tensor([[1.5]]).log(), old, one, all_of(one), clip_range)
        assert found.loss.item() == pytest.approx(wanted)


def test_first_update() -> None:
    """The policy has not moved: ratio 1, nothing clipped, and the gradient is policy gradient's −A."""
    logps, advantages = noise(5, 5).requires_grad_(), noise(5, 5, seed=1)
    found = policy_loss(logps, logps.detach(), advantages, RAGGED)
    found.loss.backward()
    assert found.ratio.item() == RAGGED.sum() and found.clipfrac.item() == found.approxkl.item() == 0
    torch.testing.assert_close(found.loss, -advantages[RAGGED].sum(), **CLOSE)
    torch.testing.assert_close(logps.grad, -advantages * RAGGED, **CLOSE)


# The value's loss


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        (0.5, 0.32, 0.0),  # moved by more than 0.2 towards 1: counted as 0.2, ½ · 0.8²
        (1.5, 0.32, 0.0),  # past it
        (-0.5, 1.125, -1.5),  # away from it: ½ · 1.5², and on its way back
        (0.1, 0.405, -0.9),  # within the range: ½ · 0.9²
    ],
)
def test_value_loss(value: float, loss: float, slope: float) -> None:
    """It was 0, the return is 1, ε = 0.2."""
    values = torch.tensor([[value]], requires_grad=True)
    found = value_loss(values, torch.zeros(1, 1), torch.ones(1, 1), all_of(values))
    found.loss.backward()
    assert values.grad is not None
    assert found.loss.item() == pytest.approx(loss, rel=1e-5)
    assert values.grad.item() == pytest.approx(slope, rel=1e-5)
    assert found.clipfrac.item() == float(slope == 0) and not found.clipfrac.requires_grad


def test_value_loss_with_a_wide_range_is_the_squared_error() -> None:
    values, old, returns = noise(5, 5), noise(5, 5, seed=1), noise(5, 5, seed=2)
    found = value_loss(values, old, returns, RAGGED, clip_range=100.0)
    wanted = 0.5 * torch.nn.functional.mse_loss(values[RAGGED], returns[RAGGED], reduction="sum")
    torch.testing.assert_close(found.loss, wanted, **CLOSE)
    assert found.clipfrac.item() == 0


# Both


def test_micro_batches_add_up() -> None:
    logps, old, given = noise(5, 5), noise(5, 5, seed=1), noise(5, 5, seed=2)
    for loss in (policy_loss, value_loss):
        whole = loss(logps, old, given, RAGGED)
        parts = [loss(logps[rows], old[rows], given[rows], RAGGED[rows]) for rows in (slice(0, 2), slice(2, 5))]
        for one, *others in zip(whole, *parts, strict=True):
            torch.testing.assert_close(torch.stack(others).sum(), one, **CLOSE)
        assert 0 < whole.clipfrac < RAGGED.sum()


def test_padding_is_never_read() -> None:
    """Neither by values nor by gradients: NaN and numbers whose exp overflows change nothing."""
    old, given = noise(5, 5, seed=1), noise(5, 5, seed=2)
    for loss in (policy_loss, value_loss):
        for wrong in (NAN, 1e4):
            logps = noise(5, 5).requires_grad_()
            clean = loss(logps, old, given, RAGGED)
            (wanted,) = torch.autograd.grad(clean.loss, logps)
            filled = logps.detach().masked_fill(~RAGGED, wrong).requires_grad_()
            found = loss(filled, spoiled(old), spoiled(given), RAGGED)
            (gradient,) = torch.autograd.grad(found.loss, filled)
            assert torch.equal(gradient, wanted) and not gradient[~RAGGED].any()
            assert [value.item() for value in found] == [value.item() for value in clean]


def test_other_shapes() -> None:
    square, mask = torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"expected advantages of the mask's shape \(3, 3\), got \(3,\)"):
        policy_loss(square, square, torch.zeros(3), mask)
    with pytest.raises(ValueError, match=r"expected returns of the mask's shape \(3, 3\), got \(3, 1\)"):
        value_loss(square, square, torch.zeros(3, 1), mask)
    with pytest.raises(ValueError, match=r"expected values of the mask's shape \(3, 3\), got \(3, 4\)"):
        gae(square, torch.zeros(3, 4), mask)
    with pytest.raises(ValueError, match=r"expected a mask of torch\.bool, got torch\.int64"):
        masked_whiten(square, mask.long())


# The KL coefficient


def test_adaptive_coefficient() -> None:
    """Target 6, horizon 1000, 100 completions. KL 6.6: e = 0.1, times 1 + 0.1 · 0.1. KL 5.7: e = −0.05."""
    control = AdaptiveKL(0.2, target=6.0, horizon=1000)
    control.update(6.6, 100)
    assert control.coef == pytest.approx(0.2 * 1.01)
    control.update(5.7, 100)
    assert control.coef == pytest.approx(0.2 * 1.01 * 0.995)


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 1.0), (7.2, 1.02), (7.3, 1.02), (600.0, 1.02), (4.8, 0.98), (0.0, 0.98), (-3.0, 0.98)]
)
def test_adaptive_coefficient_moves_by_at_most_a_fifth_of_n_over_horizon(kl: float, factor: float) -> None:
    """An estimate below 0 counts as far below the target, too."""
    control = AdaptiveKL(0.2, target=6.0, horizon=1000)
    control.update(kl, 100)
    assert control.coef == pytest.approx(0.2 * factor, rel=1e-9)


def test_adaptive_coefficient_finds_its_target() -> None:
    """Where KL = 1/β, it settles at β = 1/6 from either side."""
    for start in (10.0, 0.001):
        control = AdaptiveKL(start, target=6.0, horizon=100)
        for _ in range(1000):
            control.update(1 / control.coef, 50)
        assert control.coef == pytest.approx(1 / 6, rel=1e-3)


def test_fixed_coefficient() -> None:
    control = FixedKL(0.05)
    control.update(1e9, 1000)
    assert control.coef == 0.05
    assert FixedKL(0).coef == 0


def test_a_coefficient_goes_on_where_it_was() -> None:
    before, after = (AdaptiveKL(coef, target=6.0, horizon=1000) for coef in (0.2, 0.7))
    before.update(8.0, 100)
    after.load_state_dict(before.state_dict())
    for control in (before, after):
        control.update(3.0, 50)
    assert after.coef == before.coef != 0.2
    fixed = FixedKL(0.3)
    fixed.load_state_dict(FixedKL(0.1).state_dict())
    assert fixed.coef == 0.1


@pytest.mark.parametrize("wrong", [0.0, -1.0, NAN, math.inf])
@pytest.mark.parametrize("name", ["coef", "target", "horizon"])
def test_bad_settings_of_the_adaptive_coefficient(name: str, wrong: float) -> None:
    settings = {"coef": 0.2, "target": 6.0, "horizon": 1000.0, name: wrong}
    with pytest.raises(ValueError, match=f"{name} of an adaptive KL coefficient must be above 0 and finite"):
        AdaptiveKL(**settings)


@pytest.mark.parametrize("wrong", [-0.1, NAN, math.inf])
def test_bad_fixed_coefficient(wrong: float) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and finite"):
        FixedKL(wrong)


def test_bad_updates() -> None:
    """Nothing has been adapted when one is refused; and a state that does not fit is refused as a setting is."""
    control = AdaptiveKL(0.2, target=6.0, horizon=100)
    for kl in (NAN, math.inf):
        with pytest.raises(ValueError, match="the KL to adapt to is"):
            control.update(kl, 10)
    with pytest.raises(ValueError, match="500 completions in one update need a horizon above 100, not 100"):
        control.update(1.0, 500)
    with pytest.raises(ValueError, match="coef of an adaptive KL coefficient must be above 0"):
        control.load_state_dict(FixedKL(0).state_dict())
    assert control.coef == 0.2
