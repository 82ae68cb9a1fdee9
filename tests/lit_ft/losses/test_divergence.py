"""KL divergence over the vocabulary: values by hand and torch's own, and its gradient beside autograd's."""

from __future__ import annotations

import math

import pytest
import torch

from lit_ft.losses.divergence import Predictions, token_kl


def some(places: int = 7, *, bias: bool = False, softcap: float | None = None, seed: int = 0) -> Predictions:
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(places, 5, generator=draw)
    weight = torch.randn(11, 5, generator=draw)
    return Predictions(states, weight, torch.randn(11, generator=draw) if bias else None, softcap)


def plainly(of: Predictions) -> torch.Tensor:
    logits = of.states @ of.weight.T
    if of.bias is not None:
        logits = logits + of.bias
    return (logits if of.softcap is None else of.softcap * torch.tanh(logits / of.softcap)).log_softmax(-1)


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, None), (True, 2.0)])
def test_value_and_gradient_are_torchs_own(bias: bool, softcap: float | None, chunk: int) -> None:
    reference, policy = some(bias=bias, softcap=softcap), some(bias=bias, softcap=softcap, seed=1)
    factors = torch.linspace(-1, 2, 7)  # every place gets a gradient of its own
    ours, theirs = (policy.states.clone().requires_grad_() for _ in range(2))
    found = token_kl(reference, policy._replace(states=ours), chunk=chunk)
    expected = torch.nn.functional.kl_div(
        plainly(policy._replace(states=theirs)), plainly(reference), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(found, expected)
    (found * factors).sum().backward()
    (expected * factors).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert float(found.detach().min()) > 0


def test_by_hand_where_tokens_are_excluded() -> None:
    """0·log 0 is 0: half and half, and two tokens that it excludes, against a half and two quarters.

    KL = ½·ln(0.5/0.5) + ½·ln(0.5/0.25).
    """
    nothing = torch.zeros(1, 2)

    def distribution(*shares: float) -> Predictions:
        return Predictions(nothing, torch.zeros(4, 2), torch.tensor(shares).log())

    found = token_kl(distribution(0.5, 0.5, 0.0, 0.0), distribution(0.5, 0.25, 0.0, 0.25))
    assert found.tolist() == pytest.approx([0.5 * math.log(2)])


def test_a_model_is_at_no_distance_from_itself() -> None:
    states = (one := some()).states.clone().requires_grad_()
    found = token_kl(one, one._replace(states=states))
    assert found.tolist() == [0.0] * 7
    found.sum().backward()
    assert states.grad is not None and float(states.grad.abs().max()) < 1e-6


def test_of_no_places() -> None:
    states = torch.zeros(0, 5, requires_grad=True)
    found = token_kl(some(0), some(0)._replace(states=states))
    found.sum().backward()
    assert found.shape == (0,) and states.grad is not None


def test_without_gradients_nothing_is_kept() -> None:
    with torch.no_grad():
        found = token_kl(some(), some(seed=1)._replace(weight=some(seed=1).weight.requires_grad_()))
    assert not found.requires_grad


def test_in_bf16_it_stays_near() -> None:
    reference, policy = some(), some(seed=1)
    exact = token_kl(reference, policy)
    rough = token_kl(
        *(of._replace(states=of.states.bfloat16(), weight=of.weight.bfloat16()) for of in (reference, policy))
    )
    # bf16 keeps 8 bits of states and logits.
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.05)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="7 places and 11 entries beside 6 and 11"):
        token_kl(some(), some(6))
    trained = some(seed=1).weight.requires_grad_()
    with pytest.raises(ValueError, match="output embedding is trained"):
        token_kl(some(), some(seed=1)._replace(weight=trained))
