"""What votes say: win rates, a Bradley–Terry ranking, agreement between voters, position bias. Pure functions."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple

import numpy as np

Verdict = Literal["left", "right", "tie", "both_bad"]
Bucket = Literal["hour", "day", "week", "month"]

# What the left one gets of a vote. Ties and "both bad" are half a win for each, as in Chatbot Arena (FastChat's
# fastchat/serve/monitor/elo_analysis.py; Chiang et al. 2024, arXiv:2403.04132).
SCORE: dict[Verdict, float] = {"left": 1.0, "right": 0.0, "tie": 0.5, "both_bad": 0.5}

# The normal distribution's two-sided 95% point.
Z = 1.96

# One unit of log-odds on the Elo scale, where 400 points are odds of 10 to 1.
ELO = 400 / math.log(10)

MEAN = 1000.0

# The standard deviation, in log-odds, of the normal prior on strengths: 400 Elo points. Its precision, 0.19, is less
# than what one vote between equals tells (0.25), so it matters only where votes alone give no finite answer.
PRIOR = math.log(10)

# Newton's method ends at steps below this, in log-odds; it takes about ten.
TOLERANCE = 1e-8
MAX_STEPS = 100


class Model(NamedTuple):
    """Who gave a reply. A name alone is not enough: there are several bases, and a version may be published again."""

    ref: str
    """`support@v3`, or the base's name."""

    hash: str
    """Of its weights."""


@dataclass(frozen=True)
class Vote:
    """One verdict on two models, with what stood on which side."""

    left: Model
    right: Model
    verdict: Verdict
    voter: str
    prompt: str
    voted: datetime


@dataclass(frozen=True)
class Share:
    """Wins out of votes, with the 95% interval of the rate."""

    wins: float
    votes: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate(Share):
    """The share of a model in its votes."""

    model: Model


@dataclass(frozen=True)
class Strength:
    """A model's Bradley–Terry strength on the Elo scale, with its 95% interval."""

    model: Model
    strength: float
    low: float
    high: float
    votes: int


@dataclass(frozen=True)
class Ranking:
    """The strengths, best first, and which of them can be compared."""

    strengths: tuple[Strength, ...]

    groups: tuple[tuple[Model, ...], ...]
    """Models that votes connect, the largest group first: strengths compare within a group, never across."""


@dataclass(frozen=True)
class Agreement:
    """How far voters agree on the items that two or more of them judged."""

    items: int
    votes: int

    pairs: int
    """Pairs of votes on the same item."""

    agreeing: int

    share: float | None
    """Agreeing out of all pairs; None where there is none."""

    alpha: float | None
    """Krippendorff's alpha: 1 is perfect, 0 is chance; None where all votes are equal, or there are none."""


@dataclass(frozen=True)
class Period:
    """The votes of one hour, day, week or month, which begins at `start` (UTC)."""

    start: datetime
    votes: int
    decisive: int


def wilson(wins: float, n: int, z: float = Z) -> tuple[float, float]:
    """The score interval of a share `p = wins/n`: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n).

    Wilson 1927, JASA 22(158), pp. 209–212. It holds at small n, and at shares of 0 and 1. With half wins it is
    conservative: a vote worth a half varies less than one that is won or lost. No votes: (0, 1).
    """
    if not 0 <= wins <= n:
        raise ValueError(f"wins must be between 0 and n={n}, not {wins}")
    if n == 0:
        return 0.0, 1.0
    p = wins / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def win_rates(votes: Iterable[Vote]) -> list[WinRate]:
    """Each model's wins out of its votes, best first; ties count as in `SCORE`. A model against itself is left out."""
    wins: defaultdict[Model, float] = defaultdict(float)
    count: Counter[Model] = Counter()
    for vote in votes:
        if vote.left != vote.right:
            score = SCORE[vote.verdict]
            wins[vote.left] += score
            wins[vote.right] += 1 - score
            count.update((vote.left, vote.right))
    rates = [WinRate(wins[m], n, wins[m] / n, *wilson(wins[m], n), model=m) for m, n in count.items()]
    return sorted(rates, key=lambda one: (-one.rate, one.model))


def bradley_terry(votes: Iterable[Vote], anchor: Model | None = None) -> Ranking:
    """Strengths θ with P(i beats j) = 1 / (1 + exp(θ_j − θ_i)), as `1000 + 400 log₁₀ e · θ`.

    Bradley & Terry 1952, Biometrika 39, pp. 324–345. Ties are half wins. The maximum likelihood is finite and unique
    only if every model can be reached from every other through wins (Ford 1957; Hunter 2004, Annals of Statistics 32,
    pp. 384–406, assumption 1), which an unbeaten one breaks; so a weak normal prior (`PRIOR`) is added. The objective
    is then strictly convex, and Newton's method, which also gives the Hessian, takes the place of Hunter's MM steps.

    Intervals come from the inverse Hessian, for the difference to the anchor. The sandwich and the bootstrap, usual for
    large arenas, all but collapse for a model that won each of its few votes; the Hessian's stay wide there. Ties make
    them wider than need be. Votes count as independent: where few voters cast many each, they are too narrow.

    Args:
        votes: the verdicts; a model against itself is left out.
        anchor: the model at 1000. None, and in groups that it is not in: the group's mean is 1000.
    """
    scored = [(vote.left, vote.right, SCORE[vote.verdict]) for vote in votes if vote.left != vote.right]
    models = sorted({model for left, right, _ in scored for model in (left, right)})
    index = {model: i for i, model in enumerate(models)}
    wins = np.zeros((len(models), len(models)))  # (M, M): of the row over the column
    for left, right, score in scored:
        wins[index[left], index[right]] += score
        wins[index[right], index[left]] += 1 - score
    games = wins + wins.T
    theta, hessian = _fit(wins)

    groups = _connected(games > 0)
    contrast = np.eye(len(models))  # (M, M): takes the anchor's strength, or the group's mean, from each
    for group in groups:
        base = [index[anchor]] if anchor in index and index[anchor] in group else group
        contrast[np.ix_(group, base)] -= 1 / len(base)
    strength = MEAN + ELO * (contrast @ theta)
    variance = np.diag(contrast @ np.linalg.inv(hessian) @ contrast.T)
    margin = Z * ELO * np.sqrt(variance.clip(min=0))  # the anchor's own is 0, up to rounding
    strengths = [
        Strength(model, float(s), float(s - m), float(s + m), int(n))
        for model, s, m, n in zip(models, strength, margin, games.sum(1), strict=True)
    ]
    return Ranking(
        tuple(sorted(strengths, key=lambda one: (-one.strength, one.model))),
        tuple(tuple(models[i] for i in group) for group in groups),
    )


def _fit(wins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The strengths `(M,)` that minimise −Σ w_ij log σ(θ_i − θ_j) + Σ θ_i² / 2·PRIOR², and the Hessian there."""
    games, size = wins + wins.T, len(wins)
    precision = 1 / PRIOR**2

    def loss(theta: np.ndarray) -> float:
        apart = theta[:, None] - theta[None]
        return float((wins * np.logaddexp(0, -apart)).sum() + precision * (theta**2).sum() / 2)

    theta, step = np.zeros(size), np.ones(size)
    for _ in range(MAX_STEPS):
        # tanh does not overflow, as exp would.
        p = (1 + np.tanh((theta[:, None] - theta[None]) / 2)) / 2
        information = games * p * (1 - p)
        hessian = np.diag(information.sum(1) + precision) - information
        if not np.abs(step).max(initial=0) > TOLERANCE:
            break
        step = np.linalg.solve(hessian, wins.sum(1) - (games * p).sum(1) - precision * theta)
        # Far from the minimum a full step can overshoot. Near it the loss cannot tell better from worse.
        while np.abs(step).max() > TOLERANCE and loss(theta + step) > loss(theta) * (1 + 1e-12):
            step = step / 2
        theta = theta + step
    return theta, hessian


def _connected(edges: np.ndarray) -> list[list[int]]:
    """The connected components of an undirected graph `(M, M)`, the largest first."""
    left, found = set(range(len(edges))), []
    while left:
        group, border = set(), {min(left)}
        while border:
            group |= border
            border = {int(j) for i in border for j in np.flatnonzero(edges[i])} - group
        left -= group
        found.append(sorted(group))
    return sorted(found, key=lambda group: (-len(group), group))


def agreement(votes: Iterable[Vote]) -> Agreement:
    """Agreement on items: the same prompt, and the same two models on whichever side.

    Tie and "both bad" are verdicts of their own. Of several votes by one voter on an item the last one counts.
    Where replies were sampled, two voters may have judged different texts of the same models.
    """
    items: defaultdict[Hashable, dict[str, str]] = defaultdict(dict)
    for vote in votes:
        if vote.left != vote.right:
            first, second = sorted((vote.left, vote.right))
            swapped = {"left": "right", "right": "left"} if vote.left != first else {}
            items[vote.prompt, first, second][vote.voter] = swapped.get(vote.verdict, vote.verdict)
    units = [list(item.values()) for item in items.values() if len(item) > 1]
    pairs = sum(math.comb(len(unit), 2) for unit in units)
    agreeing = sum(math.comb(same, 2) for unit in units for same in Counter(unit).values())
    share = agreeing / pairs if pairs else None
    return Agreement(len(units), sum(map(len, units)), pairs, agreeing, share, krippendorff_alpha(units))


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Nominal alpha, 1 − D_o/D_e, of units with the values that their judges gave; any number of judges each.

        D_o = Σ_u (ordered pairs in u that differ) / (m_u − 1),    D_e = Σ_{c≠k} n_c n_k / (n − 1)

    for m_u values in unit u, n in all, n_c of them c; units with one value are left out. Krippendorff 2011,
    "Computing Krippendorff's Alpha-Reliability". None where D_e is 0: with no variation there is nothing to agree on.
    """
    totals: Counter[Hashable] = Counter()
    observed = 0.0
    for unit in units:
        if (m := len(unit)) > 1:
            counts = Counter(unit)
            totals += counts
            observed += (m * m - sum(c * c for c in counts.values())) / (m - 1)
    n = totals.total()
    differing = n * n - sum(c * c for c in totals.values())
    return 1 - observed * (n - 1) / differing if differing else None


def position_bias(votes: Iterable[Vote]) -> Share | None:
    """The share of decisive votes that went to the left; a half is no bias, if sides were drawn by lot."""
    sides = Counter(vote.verdict for vote in votes)
    n = sides["left"] + sides["right"]
    return Share(sides["left"], n, sides["left"] / n, *wilson(sides["left"], n)) if n else None


def over_time(votes: Iterable[Vote], bucket: Bucket = "day") -> list[Period]:
    """Votes by period, in order of time; periods without votes are left out. Weeks begin on Monday."""
    count: Counter[datetime] = Counter()
    decisive: Counter[datetime] = Counter()
    for vote in votes:
        start = _start(vote.voted.astimezone(UTC), bucket)
        count[start] += 1
        decisive[start] += vote.verdict in ("left", "right")
    return [Period(start, count[start], decisive[start]) for start in sorted(count)]


def _start(moment: datetime, bucket: Bucket) -> datetime:
    hour = moment.replace(minute=0, second=0, microsecond=0)
    day = hour.replace(hour=0)
    return {
        "hour": hour,
        "day": day,
        "week": day - timedelta(days=day.weekday()),
        "month": day.replace(day=1),
    }[bucket]
