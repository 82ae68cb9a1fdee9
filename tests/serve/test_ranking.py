"""Statistics of votes, against values derived by hand, published examples and another optimiser."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from serve.ranking import (
    PRIOR,
    Model,
    Verdict,
    Vote,
    agreement,
    bradley_terry,
    krippendorff_alpha,
    over_time,
    position_bias,
    wilson,
    win_rates,
)

NOW = datetime(2026, 3, 4, 12, 30, tzinfo=UTC)


def vote(left: str, right: str, verdict: Verdict, voter: str = "ann", prompt: str = "?", voted: datetime = NOW) -> Vote:
    return Vote(model(left), model(right), verdict, voter, prompt, voted)


def model(name: str) -> Model:
    return Model(name, f"hash of {name}")


def strengths(votes: list[Vote], anchor: str | None = None) -> dict[str, float]:
    return {one.model.ref: one.strength for one in bradley_terry(votes, model(anchor) if anchor else None).strengths}


def margin(votes: list[Vote], name: str, anchor: str | None = None) -> float:
    found = bradley_terry(votes, model(anchor) if anchor else None).strengths
    [one] = [one for one in found if one.model.ref == name]
    assert math.isclose(one.high - one.strength, one.strength - one.low)
    return one.high - one.strength


def arena(models: dict[str, float], n: int, seed: int, ties: float = 0.0) -> list[Vote]:
    """Votes drawn from the Bradley–Terry model itself, by strengths in log-odds."""
    rng, drawn = random.Random(seed), []
    for _ in range(n):
        left, right = rng.sample(sorted(models), 2)
        won = rng.random() < 1 / (1 + math.exp(models[right] - models[left]))
        drawn.append(vote(left, right, "tie" if rng.random() < ties else "left" if won else "right"))
    return drawn


def test_wilson_by_hand() -> None:
    # n=10, p=0.8, z=1.96: centre 0.8 + 3.8416/20 = 0.99208, half 1.96 √(0.016 + 3.8416/400) = 0.31362,
    # both over 1 + 0.38416.
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94331), abs=2e-5)
    # At p = 0 the interval is (0, z²/(n+z²)).
    assert wilson(0, 5) == pytest.approx((0, 3.8416 / 8.8416))
    assert wilson(5, 5) == pytest.approx((5 / 8.8416, 1))
    assert wilson(0, 0) == (0, 1)
    assert wilson(50, 100, z=0) == (0.5, 0.5)


def test_wilson_solves_its_equation() -> None:
    """The bounds are the rates p₀ with |p − p₀| = z √(p₀(1−p₀)/n): where the score test just rejects."""
    for wins, n in ((3, 7), (0.5, 2), (99, 100), (4000, 10_000)):
        for bound in wilson(wins, n):
            assert abs(wins / n - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / n))


@pytest.mark.parametrize(("wins", "n"), [(-1, 3), (4, 3), (1, 0), (math.nan, 3)])
def test_wilson_refuses_what_is_no_share(wins: float, n: int) -> None:
    with pytest.raises(ValueError, match="wins must be"):
        wilson(wins, n)


def test_win_rates_by_hand() -> None:
    votes = [
        vote("a", "b", "left"),
        vote("b", "a", "right"),
        vote("a", "b", "tie"),
        vote("c", "a", "both_bad"),
        vote("a", "a", "left"),  # says nothing
    ]
    rates = win_rates(votes)
    assert [(one.model.ref, one.wins, one.votes) for one in rates] == [("a", 3.0, 4), ("c", 0.5, 1), ("b", 0.5, 3)]
    assert rates[0].rate == 0.75 and (rates[0].low, rates[0].high) == wilson(3, 4)
    assert win_rates([]) == []


def test_two_models_by_hand() -> None:
    """θ = ±d/2 solves wins − n σ(d) = (d/2) / PRIOR²; for many votes d is the log-odds, 190.85 points at 3 to 1."""
    votes = [vote("a", "b", "left")] * 3 + [vote("a", "b", "right")]
    many = strengths(votes * 10_000)
    assert many["a"] - many["b"] == pytest.approx(400 * math.log10(3), abs=0.01)
    few = strengths(votes)
    d = (few["a"] - few["b"]) * math.log(10) / 400
    assert 3 - 4 / (1 + math.exp(-d)) == pytest.approx(d / 2 / PRIOR**2, abs=1e-7)


def test_interval_by_hand() -> None:
    """Equal models, n votes: the information on d is n/4, plus the prior's 1 / 2·PRIOR²; so var d is the inverse."""
    votes = [vote("a", "b", "left"), vote("a", "b", "right")] * 50
    expected = 1.96 * (400 / math.log(10)) / math.sqrt(100 / 4 + 1 / (2 * PRIOR**2))
    assert margin(votes, "a", anchor="b") == pytest.approx(expected)
    assert margin(votes, "b", anchor="b") == pytest.approx(0, abs=1e-9)
    # From the mean of two each is half as far as from the other.
    assert margin(votes, "a") == pytest.approx(expected / 2)


@pytest.mark.parametrize("seed", range(3))
def test_another_optimiser_finds_the_same(seed: int) -> None:
    votes = arena({"a": 2.0, "b": 0.5, "c": 0.0, "d": -1.5, "e": -6.0}, 200, seed, ties=0.2)
    names = sorted({one.left.ref for one in votes} | {one.right.ref for one in votes})
    left = torch.tensor([names.index(one.left.ref) for one in votes])
    right = torch.tensor([names.index(one.right.ref) for one in votes])
    score = torch.tensor([{"left": 1.0, "right": 0.0}.get(one.verdict, 0.5) for one in votes], dtype=torch.float64)
    theta = torch.zeros(len(names), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss(at: torch.Tensor) -> torch.Tensor:
        logits = at[left] - at[right]
        return F.binary_cross_entropy_with_logits(logits, score, reduction="sum") + (at**2).sum() / 2 / PRIOR**2

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    optimiser.step(closure)
    best = theta.detach()
    points = 400 / math.log(10)
    found = {one.model.ref: one for one in bradley_terry(votes).strengths}
    assert [found[name].strength for name in names] == pytest.approx((1000 + points * best).tolist(), abs=1e-3)
    centre = torch.eye(len(names), dtype=torch.float64) - 1 / len(names)
    covariance = centre @ torch.linalg.inv(torch.autograd.functional.hessian(loss, best)) @ centre
    expected = (1.96 * points * covariance.diagonal().sqrt()).tolist()
    assert [found[name].high - found[name].strength for name in names] == pytest.approx(expected, rel=1e-5)


def test_intervals_cover_what_is_true() -> None:
    """About 95% of them, in arenas of 150 votes among five models."""
    true = {"a": 1.0, "b": 0.5, "c": 0.0, "d": -0.5, "e": -1.0}
    inside = total = 0
    for seed in range(300):
        for one in bradley_terry(arena(true, 150, seed)).strengths:
            inside += one.low <= 1000 + 400 / math.log(10) * true[one.model.ref] <= one.high
            total += 1
    assert 0.93 < inside / total < 0.975


def test_the_anchor_and_the_mean_are_at_1000() -> None:
    votes = arena({"a": 1.0, "b": 0.0, "c": -1.0}, 60, 0)
    free, fixed = strengths(votes), strengths(votes, anchor="b")
    assert sum(free.values()) / 3 == pytest.approx(1000)
    assert fixed["b"] == pytest.approx(1000)
    for model in "ac":
        assert fixed[model] - fixed["b"] == pytest.approx(free[model] - free["b"])
    assert strengths(votes, anchor="nobody") == free


def test_sides_and_order_do_not_matter() -> None:
    votes = arena({"a": 1.0, "b": 0.0, "c": -1.0}, 60, 1, ties=0.3)
    swap: dict[Verdict, Verdict] = {"left": "right", "right": "left"}
    mirrored = [vote(one.right.ref, one.left.ref, swap.get(one.verdict, one.verdict)) for one in reversed(votes)]
    assert strengths(mirrored) == pytest.approx(strengths(votes))


def test_unbeaten_models_stay_finite_and_more_wins_are_stronger() -> None:
    gained = [strengths([vote("a", "b", "left")] * n)["a"] for n in (1, 5, 50, 100_000)]
    assert all(before < after < 3000 for before, after in pairwise([1000, *gained]))
    # A handful of wins proves little: the interval of the difference still holds "equal".
    [best, _] = bradley_terry([vote("a", "b", "left")] * 2, anchor=model("b")).strengths
    assert best.model == model("a") and best.low < 1000 < best.high


def test_chains_of_unbeaten_models_converge() -> None:
    """Far apart, where full Newton steps overshoot."""
    names = [f"m{i:02}" for i in range(20)]
    votes = [vote(better, worse, "left") for better, worse in pairwise(names) for _ in range(10_000)]
    found = bradley_terry(votes)
    assert [one.model.ref for one in found.strengths] == names
    assert all(math.isfinite(one.low) and one.low < one.high for one in found.strengths)


def test_groups_that_no_vote_connects() -> None:
    votes = [
        *[vote("a", "b", "left"), vote("b", "c", "left"), vote("c", "a", "left")],
        *[vote("x", "y", "tie")],
        *[vote("lonely", "lonely", "left")],
    ]
    found = bradley_terry(votes, anchor=model("c"))
    assert found.groups == (tuple(map(model, "abc")), tuple(map(model, "xy")))
    values = {one.model.ref: one.strength for one in found.strengths}
    assert values == pytest.approx(dict.fromkeys("abcxy", 1000.0))
    # What happens in one group does not move the other.
    more = strengths([*votes, *[vote("x", "y", "left")] * 9], anchor="c")
    assert more["x"] > 1000 > more["y"] and more["a"] == pytest.approx(values["a"])


def test_one_name_of_two_weights_is_two_models() -> None:
    """`base` of two bases, or a version that was published again."""
    old, new = Model("base", "1"), Model("base", "2")
    votes = [Vote(old, new, "left", voter, "?", NOW) for voter in ("ann", "bob")]
    assert [(one.model, one.wins, one.votes) for one in win_rates(votes)] == [(old, 2, 2), (new, 0, 2)]
    assert [one.model for one in bradley_terry(votes, anchor=new).strengths] == [old, new]
    assert agreement(votes).share == 1


def test_no_votes_rank_nothing() -> None:
    assert bradley_terry([]).strengths == () == bradley_terry([vote("a", "a", "tie")], anchor=model("a")).groups


def test_krippendorffs_own_example() -> None:
    """Krippendorff 2011, section C: four observers, twelve units, values missing; nominal alpha is 0.743."""
    units = ["111", "2232", "3333", "3333", "2222", "1234", "4444", "1121", "2222", "555", "11", "3"]
    alpha = krippendorff_alpha(units)
    assert alpha is not None and round(alpha, 3) == 0.743


def test_alpha_by_hand() -> None:
    assert krippendorff_alpha(["aa", "bb"]) == 1
    # D_o = 2 + 0, n = 4 of which three are a: D_e = 2·3·1 / 3 = 2.
    assert krippendorff_alpha(["ab", "aa"]) == 0
    assert krippendorff_alpha(["aa", "aa"]) is None
    assert krippendorff_alpha(["a", "b"]) is None
    assert krippendorff_alpha([]) is None


def test_agreement_is_about_the_same_prompt_and_pair_on_any_side() -> None:
    votes = [
        *[vote("a", "b", "left", "ann"), vote("b", "a", "right", "bob"), vote("a", "b", "tie", "cho")],
        *[vote("a", "b", "both_bad", "ann", "2"), vote("b", "a", "both_bad", "bob", "2")],
        *[vote("a", "b", "left", "ann", "alone"), vote("a", "c", "left", "bob", "alone")],
        *[vote("a", "a", "left", "ann", "self"), vote("a", "a", "left", "bob", "self")],
    ]
    found = agreement(votes)
    # Item 1: of three pairs one agrees; item 2: its only one.
    assert (found.items, found.votes, found.pairs, found.agreeing, found.share) == (2, 5, 4, 2, 0.5)
    # Values a, a, tie | bad, bad. D_o = 4/2 + 0; n = 5, D_e = (25 − 4 − 1 − 4) / 4 = 4.
    assert found.alpha == pytest.approx(0.5)


def test_a_voters_last_word_on_an_item_counts_and_nobody_agrees_with_themselves() -> None:
    votes = [vote("a", "b", "left", "ann"), vote("a", "b", "right", "ann")]
    assert agreement(votes).items == 0 and agreement(votes).share is None and agreement(votes).alpha is None
    votes.append(vote("a", "b", "right", "bob"))
    assert agreement(votes).share == 1


def test_position_bias() -> None:
    votes = [vote("a", "b", "left")] * 6 + [vote("a", "b", "right")] * 2 + [vote("a", "b", "tie")] * 9
    found = position_bias(votes)
    assert found is not None
    assert (found.wins, found.votes, found.rate) == (6, 8, 0.75) and (found.low, found.high) == wilson(6, 8)
    assert position_bias([vote("a", "b", "both_bad")]) is None and position_bias([]) is None


def test_over_time() -> None:
    tokyo = timezone(timedelta(hours=9))
    moments = {
        datetime(2026, 3, 1, 23, 59, tzinfo=UTC): "left",  # a Sunday
        datetime(2026, 3, 2, 8, 0, tzinfo=tokyo): "tie",  # still Sunday, in UTC
        datetime(2026, 3, 2, 0, 0, tzinfo=UTC): "right",
        datetime(2026, 2, 28, 5, 1, tzinfo=UTC): "both_bad",
    }
    votes = [vote("a", "b", verdict, voted=moment) for moment, verdict in moments.items()]  # type: ignore[arg-type]

    def counted(bucket: str) -> list[tuple[str, int, int]]:
        found = over_time(votes, bucket)  # type: ignore[arg-type]
        return [(f"{one.start:%m-%d %H:%M}", one.votes, one.decisive) for one in found]

    assert counted("day") == [("02-28 00:00", 1, 0), ("03-01 00:00", 2, 1), ("03-02 00:00", 1, 1)]
    assert counted("week") == [("02-23 00:00", 3, 1), ("03-02 00:00", 1, 1)]
    assert counted("month") == [("02-01 00:00", 1, 0), ("03-01 00:00", 3, 2)]
    assert [start for start, *_ in counted("hour")] == ["02-28 05:00", "03-01 23:00", "03-02 00:00"]
    assert over_time([]) == []


def test_thumbs_are_no_comparison() -> None:
    for function in (win_rates, bradley_terry):
        with pytest.raises(KeyError):
            function([vote("a", "b", "up")])  # type: ignore[arg-type]
