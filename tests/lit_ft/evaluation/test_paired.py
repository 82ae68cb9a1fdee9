"""Changes between two models on the same rows: means by hand, intervals that cover what they should, verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lit_ft.errors import UserError
from lit_ft.evaluation.paired import Change, few_rows, figure, paired_change, paired_rate, verdict


def made(low: float | None, high: float | None) -> Change:
    return Change(before=1.0, after=1.0, change=0.0, low=low, high=high, rows=2)


def test_a_model_against_itself() -> None:
    scores = list(np.random.default_rng(1).normal(2, 1, 37))
    weights = list(np.random.default_rng(2).integers(1, 90, 37))
    found = paired_change(scores, scores, weights)
    assert (found.change, found.low, found.high, found.rows) == (0.0, 0.0, 0.0, 37)
    assert found.before == found.after


def test_weighted_means() -> None:
    """1 token at 4 and 3 at 2: (4 + 6) / 4; after (2 + 3) / 4. A row without tokens does not count."""
    found = paired_change([4.0, 2.0, 99.0], [2.0, 1.0, math.nan], [1, 3, 0])
    assert (found.before, found.after, found.change, found.rows) == (2.5, 1.25, -1.25, 2)


def test_an_interval_by_hand() -> None:
    """Of eight rows one changes by 8: means of resamples are binomial (8, 1/8), above 2 in 6.7%, above 3 in 1.1%."""
    found = paired_change([0.0] * 8, [8.0] + [0.0] * 7, draws=100_000)
    assert (found.change, found.low, found.high) == (1.0, 0.0, 3.0)


def test_rows_that_belong_together_are_drawn_together() -> None:
    """Each group has +1 and -1, which cancel whenever it is drawn; drawn one by one they would not."""
    before, after = [0.0] * 20, [1.0, -1.0] * 10
    groups = [k // 2 for k in range(20)]
    found = paired_change(before, after, groups=groups)
    assert (found.change, found.low, found.high, found.rows) == (0.0, 0.0, 0.0, 20)
    alone = paired_change(before, after)
    assert alone.low is not None and alone.low < -0.2
    # Twice the same row says no more than once: the interval is that of ten rows.
    drawn = list(np.random.default_rng(0).normal(0, 1, 10))
    once, twice = (
        paired_change([0.0] * 10, drawn),
        paired_change([0.0] * 20, [d for d in drawn for _ in (0, 1)], groups=groups),
    )
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    assert paired_change(before, after, [0.0] * 6 + [1.0] * 14, groups=groups).low is None  # seven groups are left
    with pytest.raises(ValueError, match="scores and groups"):
        paired_change(before, after, groups=[0])


def test_pairing_cancels_what_is_hard_for_both() -> None:
    """Rows differ by tens, the two models by 0.1 on every row: the interval knows."""
    before = np.random.default_rng(0).normal(0, 30, 50)
    found = paired_change(list(before), list(before + 0.1))
    assert found.low == pytest.approx(0.1, abs=1e-9)
    assert found.high == pytest.approx(0.1, abs=1e-9)


def test_the_order_of_the_two_models() -> None:
    old, new = [1.0, 2.0, 4.0, 3.0] * 2, [1.5, 1.0, 4.25, 5.0] * 2
    there, back = paired_change(old, new, seed=3), paired_change(new, old, seed=3)
    assert there.low is not None and there.high is not None
    assert (back.change, back.low, back.high) == pytest.approx((-there.change, -there.high, -there.low))


def test_the_same_again() -> None:
    before, after = list(np.random.default_rng(0).normal(2, 1, 30)), list(np.random.default_rng(1).normal(2, 1, 30))
    assert paired_change(before, after) == paired_change(before, after)
    assert paired_change(before, after, seed=1) != paired_change(before, after, seed=2)


def test_weights_have_no_scale() -> None:
    before, after, weights = [1.0, 2.0, 4.0, 3.0] * 2, [1.5, 1.0, 4.0, 5.0] * 2, np.array([1.0, 2.0, 4.0, 8.0] * 2)
    assert paired_change(before, after, list(weights * 1e300)) == paired_change(before, after, list(weights))


def test_the_bootstrap_covers() -> None:
    """95% intervals hold the true change in about 95 of 100 samples; 60 rows with lengths from 1 to 40, 400 samples.

    The standard error of the rate is 1.1 points, and percentiles of 60 rows fall short by about one.
    """
    rng = np.random.default_rng(5)
    held = 0
    for trial in range(400):
        weights = rng.integers(1, 41, 60)
        before = rng.normal(2, 1, 60)
        after = before + 0.3 + rng.normal(0, 0.5, 60)
        found = paired_change(list(before), list(after), list(weights), draws=400, seed=trial)
        assert found.low is not None and found.high is not None
        held += found.low <= 0.3 <= found.high
    assert 0.90 <= held / 400 <= 0.98


def test_many_rows_are_drawn_in_parts() -> None:
    """Above 2^20 values a resample at a time; the interval is the normal one: ±1.96·σ/√N."""
    differences = np.random.default_rng(0).normal(0, 1, 20_000)
    found = paired_change([0.0] * 20_000, list(differences), draws=500)
    assert found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(20_000), rel=0.15)


def test_few_rows_have_no_interval() -> None:
    assert paired_change([2.0], [1.0]) == Change(2.0, 1.0, -1.0, None, None, 1)
    assert paired_change([2.0, 5.0], [1.0, 5.0], [3, 0]) == Change(2.0, 1.0, -1.0, None, None, 1)
    assert paired_change([2.0] * 7, [1.0] * 7) == Change(2.0, 1.0, -1.0, None, None, 7)
    assert paired_rate([False] * 7, [True] * 7) == Change(0.0, 1.0, 1.0, None, None, 7)
    for eight in (paired_change([2.0] * 8, [1.0] * 8), paired_rate([True] * 8, [False] * 8)):
        assert eight.low is not None and verdict(eight, threshold=0.1, lower_is_better=False) == "worse"


def test_few_rows_are_said() -> None:
    assert few_rows(30) is None
    assert few_rows(29) == "29 held-out rows are few: intervals are wide, and still a little too narrow."
    assert few_rows(7, "pairs") == "7 pairs are too few for an interval: 8 are needed. Give more, to learn of a change."


def test_nothing_to_compare() -> None:
    with pytest.raises(UserError, match="no row to compare"):
        paired_change([], [])
    with pytest.raises(UserError, match="no row to compare"):
        paired_change([1.0], [1.0], [0.0])
    with pytest.raises(UserError, match="no row to compare"):
        paired_rate([], [])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(UserError, match="Row 3 of 4 scored 1 before and"):
        paired_change([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, bad, 1.0], [1.0, 0.0, 1.0, 1.0])


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        paired_change([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="differ in shape"):
        paired_change([1.0, 2.0], [1.0, 2.0], [1.0])
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weights"):
            paired_change([1.0, 2.0], [1.0, 2.0], [1.0, weight])
    with pytest.raises(ValueError, match="draws=0"):
        paired_change([1.0, 2.0], [1.0, 2.0], draws=0)
    with pytest.raises(ValueError, match="2 rows before and 1 after"):
        paired_rate([True, False], [True])


def test_rates_by_hand() -> None:
    """No yes among 10 rows, either time: Wilson's upper limit of 0 is z²/(n + z²), and φ is 0 where a margin is."""
    reach = 1.959964**2 / (10 + 1.959964**2)
    found = paired_rate([False] * 10, [False] * 10)
    assert (found.before, found.after, found.change, found.rows) == (0.0, 0.0, 0.0, 10)
    assert (found.low, found.high) == pytest.approx((-reach, reach), rel=1e-6)
    # From none to all: the interval ends at 1 and begins √2 of Wilson's limit below.
    found = paired_rate([False] * 10, [True] * 10)
    assert (found.low, found.high) == pytest.approx((1 - math.sqrt(2) * reach, 1.0), rel=1e-6)
    assert found.change == 1.0


def test_rates_of_a_model_against_itself() -> None:
    found = paired_rate([True, False] * 20, [True, False] * 20)
    assert found.low is not None and found.high is not None
    assert found.change == 0 and found.low < 0 < found.high
    # Agreeing rows say more than two groups that happen to have the same rate.
    apart = paired_rate([True, False] * 20, [False, True] * 20)
    assert apart.low is not None and apart.low < 3 * found.low


def test_the_intervals_of_rates_cover() -> None:
    """True rates 5% and 12%, correlated, 40 rows: where a bootstrap falls short."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        shared = rng.random(40)
        found = paired_rate(list(shared < 0.05), list(shared < 0.12))
        assert found.low is not None and found.high is not None
        held += found.low <= 0.07 <= found.high
    assert 0.93 <= held / 1000 <= 1.0


@pytest.mark.parametrize(
    ("low", "high", "threshold", "loss_says", "rate_says"),
    [
        (-0.5, -0.3, 0.2, "better", "worse"),
        (0.3, 0.5, 0.2, "worse", "better"),
        (-0.5, -0.1, 0.2, "unchanged", "unchanged"),
        (0.1, 0.5, 0.2, "unchanged", "unchanged"),
        (-0.5, 0.5, 0.2, "unchanged", "unchanged"),
        (0.2, 0.5, 0.2, "unchanged", "unchanged"),
        (0.0, 0.0, 0.0, "unchanged", "unchanged"),
        (0.001, 0.5, 0.0, "worse", "better"),
        (None, None, 0.0, "unchanged", "unchanged"),
    ],
)
def test_verdicts(low: float | None, high: float | None, threshold: float, loss_says: str, rate_says: str) -> None:
    assert verdict(made(low, high), threshold=threshold, lower_is_better=True) == loss_says
    assert verdict(made(low, high), threshold=threshold, lower_is_better=False) == rate_says


@pytest.mark.parametrize("threshold", [-0.1, math.nan])
def test_thresholds_below_nothing(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        verdict(made(0.0, 1.0), threshold=threshold, lower_is_better=True)


def test_a_share_as_a_figure() -> None:
    found = figure("exact", "right answers", Change(0.25, 0.5, 0.25, 0.125, None, 8), unit="%", times=100)
    assert (found.name, found.label, found.unit, found.rows) == ("exact", "right answers", "%", 8)
    assert (found.before, found.after, found.change, found.low, found.high) == (25, 50, 25, 12.5, None)
