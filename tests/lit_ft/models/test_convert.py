"""Adapters' algebra on plain tensors: against whole decompositions, and values found by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_ft.models.convert import adalora_factors, dora_delta, nearest, singular, without_beginning


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_nearest_is_the_truncated_singular_value_decomposition(shape: tuple[int, int], rank: int) -> None:
    delta = random(*shape)
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    a, b, lost = nearest(delta, rank)
    assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank)
    assert torch.allclose((b @ a).double(), u[:, :rank] * s[:rank] @ v[:rank], atol=1e-5)
    assert lost == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-7)


def test_nearest_of_a_low_rank_is_it_and_of_nothing_nothing() -> None:
    delta = random(8, 2) @ random(2, 12)
    a, b, lost = nearest(delta, 5)
    assert torch.allclose(b @ a, delta, atol=1e-5) and lost < 1e-6
    a, b, lost = nearest(torch.zeros(4, 6), 2)
    assert not (b @ a).any() and lost == 0 and a.isfinite().all() and b.isfinite().all()


def test_nearest_gives_no_more_ranks_than_there_are() -> None:
    a, b, lost = nearest(random(3, 9), 64)
    assert a.shape == (3, 9) and b.shape == (3, 3) and lost < 1e-6


def test_nearest_splits_the_size_evenly() -> None:
    """3 · e₁·e₂ᵀ: both factors have the length √3."""
    delta = torch.zeros(2, 3)
    delta[0, 1] = 3.0
    a, b, _ = nearest(delta, 1)
    assert a.norm() == pytest.approx(3**0.5) and b.norm() == pytest.approx(3**0.5)


def layer(weight: Tensor, a: Tensor, b: Tensor, scaling: float, length: Tensor, turned: bool = False) -> Any:
    """What PEFT's DoRA layer holds; `turned`: GPT-2's Conv1D, which keeps `(in, out)`."""
    base = nn.Linear(1, 1)
    base.weight = nn.Parameter(weight.T.clone() if turned else weight)
    return SimpleNamespace(
        get_base_layer=lambda: base,
        fan_in_fan_out=turned,
        lora_A={"default": SimpleNamespace(weight=a)},
        lora_B={"default": SimpleNamespace(weight=b)},
        scaling={"default": scaling},
        lora_magnitude_vector={"default": SimpleNamespace(weight=length)},
    )


@pytest.mark.parametrize("turned", [False, True])
def test_dora_by_hand(turned: bool) -> None:
    """W = [[3, 0], [0, 2]], s·B·A = [[0, 4], [0, 0]]: the rows (3, 4) and (0, 2) have the lengths 5 and 2.

    With the magnitudes 10 and 1 they become (6, 8) and (0, 1), so [[3, 8], [0, −1]] is added.
    """
    a, b = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0], [0.0]])
    made = layer(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), a, b, 2.0, torch.tensor([10.0, 1.0]), turned)
    assert torch.allclose(dora_delta(made), torch.tensor([[3.0, 8.0], [0.0, -1.0]]))


def test_a_dora_that_has_not_begun_adds_nothing() -> None:
    weight = random(5, 4)
    made = layer(weight, random(2, 4), torch.zeros(5, 2), 1.0, weight.norm(dim=1))
    assert dora_delta(made).abs().max() < 1e-6


def test_without_beginning() -> None:
    """What has not moved adds nothing, and else the product's change is added."""
    a0, b0, a, b = random(2, 5), random(3, 2), random(2, 5) + 1, random(3, 2) + 1
    made_a, made_b = without_beginning((a, b), (a0, b0))
    assert made_a.shape == (4, 5) and made_b.shape == (3, 4)
    assert torch.allclose(made_b @ made_a, b @ a - b0 @ a0, atol=1e-5)
    made_a, made_b = without_beginning((a0, b0), (a0, b0))
    assert (made_b @ made_a).abs().max() < 1e-6


def test_adaloras_triplets() -> None:
    """P·Λ·Q of those kept, and only those, times the scaling."""
    q, values, p = random(3, 6), torch.tensor([[2.0], [5.0], [-1.0]]), random(4, 3)
    keep = torch.tensor([True, False, True])
    a, b = adalora_factors(q, values, p, keep, 0.5)
    expected = 0.5 * (2.0 * torch.outer(p[:, 0], q[0]) - torch.outer(p[:, 2], q[2]))
    assert a.shape == (2, 6) and torch.allclose(b @ a, expected, atol=1e-6)


def test_singular_values_of_a_product() -> None:
    a, b = random(3, 8), random(5, 3)
    u, s, v = singular(a, b)
    assert torch.allclose(u * s @ v, b @ a, atol=1e-5)
    assert torch.allclose(s, torch.linalg.svdvals((b @ a).double())[:3].float(), atol=1e-5)
    assert torch.allclose(u.T @ u, torch.eye(3), atol=1e-5) and torch.allclose(v @ v.T, torch.eye(3), atol=1e-5)
