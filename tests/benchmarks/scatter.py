"""A scatter plot as SVG: what was gained against what it cost, a point per run and a mark per group's mean."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 40, 55
COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#edae49", "#7b4fa3", "#00798c", "#8d5524", "#5c677d", "#e377c2", "#17202a")

Point = tuple[float, float]


def scatter(points: Mapping[str, Sequence[Point]], *, title: str, x: str, y: str, joined: bool = False) -> str:
    """An SVG picture.

    Args:
        points: by the name of the group, `(x, y)` of each run; values that are not finite are left out.
        title, x, y: texts.
        joined: draw a line through the points of a group, in the order given, instead of marking their mean.
    """
    groups = {name: [p for p in given if all(map(math.isfinite, p))] for name, given in points.items()}
    groups = {name: given for name, given in groups.items() if given}
    everything = [p for given in groups.values() for p in given] or [(0.0, 0.0)]
    xs, ys = ticks([p[0] for p in everything]), ticks([p[1] for p in everything])

    def place(point: Point) -> Point:
        across = (point[0] - xs[0]) / (xs[-1] - xs[0])
        up = (point[1] - ys[0]) / (ys[-1] - ys[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{html.escape(title)}</text>',
    ]
    for value in xs:
        at = place((value, ys[0]))[0]
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    for value in ys:
        at = place((xs[0], value))[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 14}" text-anchor="middle">{html.escape(x)}</text>')
    parts.append(
        f'<text x="18" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 18 {HEIGHT / 2})">'
        f"{html.escape(y)}</text>"
    )
    for k, (name, given) in enumerate(groups.items()):
        colour = COLOURS[k % len(COLOURS)]
        found = [place(p) for p in given]
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}" opacity="0.6"/>' for a, b in found]
        if joined:
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in found)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" opacity="0.6"/>')
        else:
            a, b = place((sum(p[0] for p in given) / len(given), sum(p[1] for p in given) / len(given)))
            parts.append(
                f'<path d="M{a - 7:.1f} {b:.1f}H{a + 7:.1f}M{a:.1f} {b - 7:.1f}V{b + 7:.1f}" stroke="{colour}" '
                'stroke-width="2.5"/>'
            )
        row = TOP + 10 + 20 * k
        parts.append(f'<circle cx="{WIDTH - RIGHT + 22}" cy="{row}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 34}" y="{row + 4}">{html.escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])


def ticks(values: Sequence[float]) -> list[float]:
    """Four to nine round numbers from at or below the least value to at or above the greatest."""
    low, high = min(values), max(values)
    if high == low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(k * step, 12) for k in range(first, last + 1)]
