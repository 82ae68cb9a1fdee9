"""The DPO losses against values worked out by hand, and the facts that hold for every pair."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_ft.losses.dpo import dpo_loss, dpo_rewards

# Float32 keeps about seven digits; the values below are given to nine.
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def pair(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


# log π(y_w) = −1, log π(y_l) = −3, both −2 under the reference: log-ratios 1 and −1, so Δ = 2.
PAIR = pair(-1.0, -3.0, -2.0, -2.0)


def test_sigmoid() -> None:
    """β = 0.1: βΔ = 0.2 and −log σ(0.2) = log(1 + e^−0.2) = log 1.818730753 = 0.598138869."""
    torch.testing.assert_close(dpo_loss(*PAIR, beta=0.1), torch.tensor([0.598138869]), **CLOSE)


def test_sigmoid_with_another_beta() -> None:
    """β = 0.5: βΔ = 1 and log(1 + e^−1) = log 1.367879441 = 0.313261688."""
    torch.testing.assert_close(dpo_loss(*PAIR, beta=0.5), torch.tensor([0.313261688]), **CLOSE)


def test_label_smoothing() -> None:
    """ε = 0.1: −log σ(−0.2) = 0.2 + 0.598138869, so 0.9 · 0.598138869 + 0.1 · 0.798138869 = 0.618138869."""
    torch.testing.assert_close(dpo_loss(*PAIR, beta=0.1, label_smoothing=0.1), torch.tensor([0.618138869]), **CLOSE)


def test_hinge() -> None:
    """β = 0.1: 1 − 0.2 = 0.8. β = 0.5: 1 − 1 = 0. β = 1: 1 − 2 < 0, so 0."""
    found = [dpo_loss(*PAIR, beta=beta, loss_type="hinge").item() for beta in (0.1, 0.5, 1.0)]
    assert found == pytest.approx([0.8, 0.0, 0.0], abs=1e-7)


def test_ipo() -> None:
    """β = 0.1, 2 and 4 tokens: Δ̄ = 1/2 − (−1/4) = 0.75, 1/(2β) = 5 and (0.75 − 5)² = 18.0625."""
    lengths: Any = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([4])}
    torch.testing.assert_close(dpo_loss(*PAIR, beta=0.1, loss_type="ipo", **lengths), torch.tensor([18.0625]), **CLOSE)


def test_ipo_of_a_completion_without_targets_is_finite() -> None:
    """Nothing of it is trained on, so its log-ratio is 0 and its length counts as 1: (0 − 0 − 5)² = 25."""
    lengths: Any = {"chosen_lengths": torch.tensor([0]), "rejected_lengths": torch.tensor([0])}
    assert dpo_loss(*pair(0.0, 0.0, 0.0, 0.0), loss_type="ipo", **lengths).item() == 25.0


def test_gradient_of_sigmoid() -> None:
    """d/d log π(y_w) = −βσ(−βΔ) = −0.1 · (1 − σ(0.2)) = −0.1 · 0.450166003, and its opposite for y_l."""
    chosen, rejected, *reference = (value.clone() for value in PAIR)
    chosen.requires_grad_()
    rejected.requires_grad_()
    dpo_loss(chosen, rejected, *reference, beta=0.1).sum().backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([-0.0450166003]), **CLOSE)
    torch.testing.assert_close(rejected.grad, torch.tensor([0.0450166003]), **CLOSE)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_equal_to_the_reference_is_ln_2(label_smoothing: float) -> None:
    """Δ = 0, so both terms are −log σ(0) = ln 2, whatever β and ε are."""
    logps = torch.tensor([-3.0, -40.0]), torch.tensor([-5.0, -0.1])
    for beta in (0.01, 0.1, 5.0):
        losses = dpo_loss(*logps, *logps, beta=beta, label_smoothing=label_smoothing)
        torch.testing.assert_close(losses, torch.full((2,), math.log(2)), **CLOSE)


def test_equal_to_the_reference_under_the_other_losses() -> None:
    """Hinge: 1 − 0 = 1. IPO with β = 0.1: (0 − 5)² = 25."""
    logps = torch.tensor([-3.0]), torch.tensor([-5.0])
    lengths: Any = {"chosen_lengths": torch.tensor([3]), "rejected_lengths": torch.tensor([2])}
    assert dpo_loss(*logps, *logps, loss_type="hinge").item() == 1.0
    assert dpo_loss(*logps, *logps, loss_type="ipo", **lengths).item() == pytest.approx(25.0)


def test_rewards() -> None:
    """β times the log-ratios: 0.1 · 1 and 0.1 · −1; no gradient flows through them."""
    chosen = PAIR[0].clone().requires_grad_()
    rewards = dpo_rewards(chosen, PAIR[1], PAIR[2], PAIR[3], beta=0.1)
    torch.testing.assert_close(rewards.chosen, torch.tensor([0.1]), **CLOSE)
    torch.testing.assert_close(rewards.rejected, torch.tensor([-0.1]), **CLOSE)
    assert not rewards.chosen.requires_grad


def test_swapping_a_pair_negates_its_margin() -> None:
    """And a label that is wrong with probability ½ could not tell the two apart."""
    torch.manual_seed(0)
    chosen, rejected, reference_chosen, reference_rejected = torch.randn(4, 16)
    straight = dpo_rewards(chosen, rejected, reference_chosen, reference_rejected, beta=0.3)
    swapped = dpo_rewards(rejected, chosen, reference_rejected, reference_chosen, beta=0.3)
    assert torch.equal(straight.chosen - straight.rejected, -(swapped.chosen - swapped.rejected))
    half = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, label_smoothing=0.5)
    torch.testing.assert_close(
        half, dpo_loss(rejected, chosen, reference_rejected, reference_chosen, label_smoothing=0.5), **CLOSE
    )


def test_losses_are_per_pair() -> None:
    """Pairs do not mix: the loss of two is the losses of each."""
    torch.manual_seed(1)
    quad = torch.randn(4, 2)
    lengths = torch.tensor([3, 7]), torch.tensor([2, 5])
    for kind in ("sigmoid", "hinge", "ipo"):
        options: Any = {"loss_type": kind}
        both = dpo_loss(*quad, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **options)
        for k in range(2):
            one = dpo_loss(
                *quad[:, k : k + 1],
                chosen_lengths=lengths[0][k : k + 1],
                rejected_lengths=lengths[1][k : k + 1],
                **options,
            )
            assert torch.equal(one, both[k : k + 1])


def test_far_margins_stay_finite() -> None:
    """log σ of a far negative margin is the margin itself; exp would overflow."""
    losses = dpo_loss(*pair(-5000.0, 0.0, 0.0, 0.0), beta=1.0)
    assert losses.item() == pytest.approx(5000.0)


@pytest.mark.parametrize("kind", ["hinge", "ipo"])
def test_label_smoothing_is_refused_elsewhere(kind: Any) -> None:
    with pytest.raises(ValueError, match=rf"label_smoothing is defined for loss_type=sigmoid, not {kind}"):
        dpo_loss(*PAIR, loss_type=kind, label_smoothing=0.1)


def test_ipo_needs_lengths() -> None:
    with pytest.raises(ValueError, match="needs chosen_lengths and rejected_lengths"):
        dpo_loss(*PAIR, loss_type="ipo", chosen_lengths=torch.tensor([2]))


def test_unknown_loss() -> None:
    kind: Any = "sigmund"
    with pytest.raises(ValueError, match="must be one of sigmoid, ipo, hinge, not 'sigmund'"):
        dpo_loss(*PAIR, loss_type=kind)
