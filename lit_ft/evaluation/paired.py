"""Two models on the same rows: means, their change with a 95% interval, and the verdict that follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_ft.errors import UserError
from lit_ft.evaluation.section import Figure, Verdict

# The normal distribution's 97.5% point.
_Z = 1.959963984540054
# Rows below which there is no interval: the bootstrap of a few finds a change wherever they happen to agree in sign.
FEWEST = 8
# Rows below which the bootstrap's interval is still a little too narrow.
FEW = 30
# Values of a resample held at a time: 8 MiB.
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Change:
    """Of a mean or a rate, over the same rows."""

    before: float
    after: float
    change: float
    """`after - before`."""
    low: float | None
    """Where the 95% interval of the change begins; None where the rows are too few to say."""
    high: float | None
    rows: int
    """Those with a weight."""


def paired_change(
    before: Sequence[float],
    after: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    groups: Sequence[int] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Change:
    """Change of the weighted mean Σ wᵢ·xᵢ / Σ wᵢ from `before` to `after`.

    With xᵢ the mean over the wᵢ tokens of a row this is the mean over all tokens. The interval is the bootstrap's by
    percentiles (Efron 1979, "Bootstrap Methods: Another Look at the Jackknife"): rows are drawn with replacement, each
    with both its scores and its weight (Koehn 2004, "Statistical Significance Tests for Machine Translation
    Evaluation"), so what makes a row hard for both models cancels. Below some thirty rows it is a little too narrow,
    and where every row changed alike it has no width; for yes and no take `paired_rate`. The same input gives the same
    interval; equal scores give exactly [0, 0].

    Args:
        before, after: a score per row, `(N,)`, in the same order.
        weights: per row, at least 0, `(N,)`; None: all alike. Rows without weight do not count.
        groups: a number per row, `(N,)`; rows of one number say much the same, and are drawn together (the cluster
            bootstrap: Davison & Hinkley 1997, "Bootstrap Methods and their Application", 3.8). None: each by itself.
        draws: resamples.
        seed: of the draws.

    Returns:
        With fewer than `FEWEST` rows (or groups), `low` and `high` are None: too little says how much others differ.

    Raises:
        UserError: no row, no weight, or a score that is not finite.
        ValueError: lengths differ, or a weight is negative or not finite.
    """
    x, y = np.asarray(before, np.float64), np.asarray(after, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    if not x.shape == y.shape == w.shape:
        raise ValueError(f"scores and weights of the same rows differ in shape: {x.shape}, {y.shape}, {w.shape}")
    which = np.arange(len(x)) if groups is None else np.asarray(groups)
    if which.shape != x.shape:
        raise ValueError(f"scores and groups of the same rows differ in shape: {x.shape}, {which.shape}")
    if not np.all(np.isfinite(w) & (w >= 0)):
        raise ValueError("weights must be finite and at least 0")
    if draws < 1:
        raise ValueError(f"draws={draws}: at least one is needed")
    x, y, numbers, which, w = x[w > 0], y[w > 0], np.flatnonzero(w > 0), which[w > 0], w[w > 0]
    if not len(w):
        raise UserError("There is no row to compare the two models on. Give rows that have an answer to score.")
    if not np.all(finite := np.isfinite(x) & np.isfinite(y)):
        k = int(np.argmin(finite))
        raise UserError(
            f"Row {numbers[k] + 1} of {len(weights if weights is not None else before)} scored {x[k]:g} before and "
            f"{y[k]:g} after, which is no number to take a mean of: look at that row, and at the run that trained the "
            "adapter."
        )
    # Scaled, so that neither huge nor tiny weights leave the range of a float.
    w = w / w.max()
    # Of the differences and not of the two means: equal scores then give 0, however the sums round.
    differences = w * (y - x)
    _, group = np.unique(which, return_inverse=True)
    parts, sizes = np.bincount(group, differences), np.bincount(group, w)  # (groups,)
    low, high = _percentiles(parts, sizes, draws, seed) if len(sizes) >= FEWEST else (None, None)
    total = w.sum()
    return Change(
        before=float((w * x).sum() / total),
        after=float((w * y).sum() / total),
        change=float(differences.sum() / total),
        low=low,
        high=high,
        rows=len(w),
    )


def _percentiles(parts: np.ndarray, weights: np.ndarray, draws: int, seed: int) -> tuple[float, float]:
    """2.5% and 97.5% points of Σ parts / Σ weights over resampled rows."""
    rng = np.random.default_rng(seed)
    rows, found = len(parts), []
    for start in range(0, draws, at_once := max(1, _AT_ONCE // rows)):
        drawn = rng.integers(0, rows, size=(min(at_once, draws - start), rows))  # (draws, N)
        found.append(parts[drawn].sum(1) / weights[drawn].sum(1))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return float(low), float(high)


def paired_rate(before: Sequence[bool], after: Sequence[bool]) -> Change:
    """Change of the share of rows that say yes, from 0 to 1.

    The interval is Newcombe's for paired proportions (Newcombe 1998, "Improved confidence intervals for the difference
    between binomial proportions based on paired data", method 10): Wilson's limits of both shares, joined by their
    correlation φ. Unlike the bootstrap's it keeps a width where all rows agree: no yes among ten rows does not show
    that there are none among others. With fewer than `FEWEST` rows there is none, as with `paired_change`.

    Args:
        before, after: yes or no per row, `(N,)`, in the same order.

    Raises:
        UserError: no row.
        ValueError: lengths differ.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} rows before and {len(after)} after: give both for every row")
    rows = len(before)
    if not rows:
        raise UserError("There is no row to compare the two models on. Give rows that can be answered right or wrong.")
    few = rows < FEWEST
    both = sum(1 for b, a in zip(before, after, strict=True) if b and a)
    old, new = sum(map(bool, before)), sum(map(bool, after))
    neither = rows - old - new + both
    p, q = old / rows, new / rows
    (p_low, p_high), (q_low, q_high) = _wilson(old, rows), _wilson(new, rows)
    # φ of the 2 x 2 table, its numerator corrected for continuity where it is positive.
    agreement: float = both * neither - (old - both) * (new - both)
    if agreement > 0:
        agreement = max(0, agreement - rows / 2)
    spread = math.sqrt(old * (rows - old) * new * (rows - new))
    phi = agreement / spread if spread else 0.0

    def joined(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return Change(
        before=p,
        after=q,
        change=(new - old) / rows,
        low=None if few else (new - old) / rows - joined(q - q_low, p_high - p),
        high=None if few else (new - old) / rows + joined(q_high - q, p - p_low),
        rows=rows,
    )


def _wilson(yes: int, rows: int) -> tuple[float, float]:
    """95% limits of a share (Wilson 1927)."""
    share = yes / rows
    middle = (2 * yes + _Z**2) / (2 * (rows + _Z**2))
    reach = _Z * math.sqrt(_Z**2 + 4 * yes * (1 - share)) / (2 * (rows + _Z**2))
    # The limits of 0 and 1 are those themselves; rounding must not put them beyond.
    return min(share, middle - reach), max(share, middle + reach)


def verdict(change: Change, *, threshold: float, lower_is_better: bool) -> Verdict:
    """`better` or `worse` where the whole interval lies beyond `threshold` on that side of 0, else `unchanged`.

    `unchanged` is so two things: that little changed, and that too few rows were there to tell.

    Args:
        change: with its interval; without one, rows being too few for it, the verdict is `unchanged`.
        threshold: at least 0, in the unit of the change. What is at most this far from 0 does not matter.
        lower_is_better: for losses and for rates of what is unwanted.

    Raises:
        ValueError: the threshold is negative or not a number.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold}: give 0 or more")
    if change.low is None or change.high is None:
        return "unchanged"
    if change.high < -threshold:
        return "better" if lower_is_better else "worse"
    if change.low > threshold:
        return "worse" if lower_is_better else "better"
    return "unchanged"


def few_rows(rows: int, what: str = "held-out rows") -> str | None:
    """The note on a number of rows that is small, or None where it is not."""
    if rows >= FEW:
        return None
    if rows < FEWEST:
        return f"{rows} {what} are too few for an interval: {FEWEST} are needed. Give more, to learn of a change."
    return f"{rows} {what} are few: intervals are wide, and still a little too narrow."


def figure(name: str, label: str, change: Change, *, unit: str = "", times: float = 1.0) -> Figure:
    """The change as a figure of a section.

    Args:
        name, label, unit: see `Figure`.
        times: of every value, such as 100 for a share to be shown in %; above 0.
    """

    def scaled(value: float | None) -> float | None:
        return None if value is None else value * times

    return Figure(
        name=name,
        label=label,
        unit=unit,
        before=scaled(change.before),
        after=scaled(change.after),
        change=scaled(change.change),
        low=scaled(change.low),
        high=scaled(change.high),
        rows=change.rows,
    )
