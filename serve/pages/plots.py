"""Plots as SVG and HTML, without a script: intervals beside their numbers, bars over time. Pure functions.

A plot's width is the page's: places are percentages, while text and strokes keep their size. Colours are classes, which
page.css fills from the theme's variables. Names come from outside, so every text is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from serve.ranking import Bucket, Period

ROW_PX = 28
BARS_PX = 140

# Percent of a plot's width that stays free on each side: half of a label at the end of an axis, and a cap.
MARGIN = 5.0

LENGTH: dict[Bucket, timedelta] = {
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(days=7),
    "month": timedelta(days=30),
}


@dataclass(frozen=True)
class Estimate:
    """A model's number with its 95% interval."""

    label: str
    value: float
    low: float
    high: float
    votes: int


@dataclass(frozen=True)
class Axis:
    """What a plot spans, where it is marked, and how its numbers are written."""

    low: float
    high: float
    ticks: Sequence[float]
    write: Callable[[float], str]
    reference: float
    """Where neither better nor worse is: a line of its own."""

    def place(self, value: float) -> float:
        """Percent of the width; what lies outside is moved to the edge."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return MARGIN + (100 - 2 * MARGIN) * share


SHARES = Axis(0.0, 1.0, (0, 0.25, 0.5, 0.75, 1), lambda share: f"{share:.0%}", 0.5)


def around(estimates: Sequence[Estimate], reference: float, write: Callable[[float], str]) -> Axis:
    """An axis with round ticks, whole numbers, that holds every interval and the reference."""
    low = min([reference, *(one.low for one in estimates)])
    high = max([reference, *(one.high for one in estimates)])
    step = _round_up(max((high - low) / 4, 1.0))
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        first, last = first - 1, last + 1
    return Axis(first * step, last * step, [i * step for i in range(first, last + 1)], write, reference)


def intervals(caption: str, heading: str, estimates: Sequence[Estimate], axis: Axis) -> str:
    """A table with a row for each model: its number as a dot with whiskers, and in figures."""
    marks = "".join(
        f"<text class='tick' x='{axis.place(tick):.2f}%' y='12'>{html.escape(axis.write(tick))}</text>"
        for tick in axis.ticks
    )
    rows = "".join(_interval_row(rank, one, axis) for rank, one in enumerate(estimates, 1))
    return (
        f"<table class='intervals'><caption>{html.escape(caption)}</caption><thead><tr>"
        "<th class='rank' scope='col'><span class='unseen'>Rank</span></th><th scope='col'>Model</th>"
        f"<th class='plot'><svg width='100%' height='16' aria-hidden='true'>{marks}</svg></th>"
        f"<th class='figure' scope='col'>{html.escape(heading)}</th><th class='figure' scope='col'>Votes</th>"
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )


def _interval_row(rank: int, one: Estimate, axis: Axis) -> str:
    value, low, high = axis.write(one.value), axis.write(one.low), axis.write(one.high)
    middle, x, left, right = ROW_PX / 2, axis.place(one.value), axis.place(one.low), axis.place(one.high)
    grid = "".join(
        f"<line class='grid' x1='{place:.2f}%' x2='{place:.2f}%' y1='0' y2='{ROW_PX}'/>"
        for place in map(axis.place, axis.ticks)
    )
    at = axis.place(axis.reference)
    whisker = "".join(
        f"<line class='whisker' x1='{a:.2f}%' x2='{b:.2f}%' y1='{middle - y}' y2='{middle + y}'/>"
        for a, b, y in ((left, right, 0), (left, left, 5), (right, right, 5))
    )
    # The one that the others are measured against has no interval of its own.
    span = f"{low} to {high}" if one.high - one.low > 1e-6 * (axis.high - axis.low) else "by definition"
    told = html.escape(f"{one.label}: {value}, {span}", quote=True)
    return (
        f"<tr><td class='rank'>{rank}</td><th scope='row'>{html.escape(one.label)}</th>"
        f"<td class='plot'><svg width='100%' height='{ROW_PX}' role='img' aria-label='{told}'>{grid}"
        f"<line class='reference' x1='{at:.2f}%' x2='{at:.2f}%' y1='0' y2='{ROW_PX}'/>"
        f"{whisker}<circle class='dot' cx='{x:.2f}%' cy='{middle}' r='5'/></svg></td>"
        f"<td class='figure'>{html.escape(value)} <small>{html.escape(span)}</small></td>"
        f"<td class='figure'>{one.votes:,}</td></tr>"
    )


def bucket_for(periods: timedelta) -> Bucket:
    """The period that gives such a span a readable number of bars: at most about a hundred."""
    if periods <= timedelta(days=2):
        return "hour"
    if periods <= timedelta(days=90):
        return "day"
    return "week" if periods <= timedelta(days=730) else "month"


def bars(caption: str, periods: Sequence[Period], bucket: Bucket) -> str:
    """Votes over time: a bar for each period, the decisive ones filled; the same as a table that can be opened."""
    first, end = periods[0].start, periods[-1].start + LENGTH[bucket]
    most = max(period.votes for period in periods)
    drawn = "".join(_bar(period, bucket, first, end, most) for period in periods)
    total = sum(period.votes for period in periods)
    ends = "".join(f"<span>{name(moment, bucket)}</span>" for moment in dict.fromkeys((first, periods[-1].start)))
    told = f"{caption}: {total:,} from {name(first, bucket)} to {name(periods[-1].start, bucket)}, at most {most:,}"
    rows = "".join(
        f"<tr><th scope='row'>{name(period.start, bucket)}</th><td class='figure'>{period.votes:,}</td>"
        f"<td class='figure'>{period.decisive:,}</td></tr>"
        for period in reversed(periods)
    )
    return (
        f"<figure class='bars'><figcaption>{html.escape(caption)}</figcaption>"
        f"<div class='frame'><span class='most'>{most:,}</span>"
        f"<svg width='100%' height='{BARS_PX}' role='img' aria-label='{html.escape(told, quote=True)}'>{drawn}</svg>"
        f"</div><div class='ends'>{ends}</div>"
        "<p class='legend'><i class='decisive'></i>one was better <i class='undecided'></i>tie or both bad</p>"
        "<details><summary>As a table</summary><table class='plain'><thead><tr><th scope='col'>From (UTC)</th>"
        "<th class='figure' scope='col'>Votes</th><th class='figure' scope='col'>Decisive</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></details></figure>"
    )


def _bar(period: Period, bucket: Bucket, first: datetime, end: datetime, most: int) -> str:
    span = (end - first).total_seconds()
    x = 100 * (period.start - first).total_seconds() / span
    # A single day is no wall, and a gap tells neighbours apart.
    width = min(100 * LENGTH[bucket].total_seconds() / span, 6.0) * 0.86
    told = f"{name(period.start, bucket)}: {period.votes:,}, {period.decisive:,} decisive"
    rects = "".join(
        f"<rect class='{kind}' x='{x:.2f}%' width='{width:.2f}%' y='{BARS_PX - height:.1f}' height='{height:.1f}'/>"
        for kind, height in (
            ("undecided", BARS_PX * period.votes / most),
            ("decisive", BARS_PX * period.decisive / most),
        )
    )
    return f"<g><title>{told}</title>{rects}</g>"


def name(moment: datetime, bucket: Bucket) -> str:
    """A period by its beginning: `23 Nov 2026, 14:00`, `23 Nov 2026`, `Nov 2026`."""
    if bucket == "month":
        return f"{moment:%b %Y}"
    return f"{moment.day} {moment:%b %Y}" + (f", {moment:%H:%M}" if bucket == "hour" else "")


def _round_up(step: float) -> float:
    """The next of 1, 2, 5, 10, 20, …"""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))
