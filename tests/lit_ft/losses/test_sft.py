"""The loss of supervised fine-tuning: divided by the window's targets, of which there must be some."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_ft.losses.sft import sft_loss


def test_sft_loss_is_divided_by_the_window() -> None:
    """−(−1 − 2) / 6 = 0.5: the micro-batch holds two of the window's six targets."""
    assert sft_loss(torch.tensor([-1.0, -2.0]), 6).item() == 0.5
    assert sft_loss(torch.tensor([-1.0, -2.0]), torch.tensor(6)).item() == 0.5


@pytest.mark.parametrize("total", [6, torch.tensor(6)], ids=["a number", "a tensor"])
def test_no_targets_here_but_elsewhere_in_the_window(total: int | Tensor) -> None:
    """A zero, with a gradient of zeros behind it: the other processes wait for this one's."""
    weight = torch.ones(3, requires_grad=True)
    loss = sft_loss(weight[:0] * 2, total)
    assert loss.item() == 0.0
    loss.backward()
    assert weight.grad is not None and weight.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("total", [0, torch.tensor(0), torch.tensor(0.0), -1])
def test_a_window_without_targets_is_refused(total: int | Tensor) -> None:
    """0/0 would be NaN, which an optimizer writes into every weight."""
    with pytest.raises(ValueError, match=r"num_targets is -?\d: a mean over no targets .* leave out windows that have"):
        sft_loss(torch.zeros(0, requires_grad=True), total)


def test_targets_without_a_total_are_refused() -> None:
    with pytest.raises(ValueError, match="num_targets is 0"):
        sft_loss(torch.tensor([-1.0]), 0)
