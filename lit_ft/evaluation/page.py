"""The report as JSON, as one HTML page that needs nothing else, and as lines for a terminal."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lit_ft.evaluation.report import Report
from lit_ft.evaluation.section import Curve, Figure, Section
from lit_ft.previewing.page import visible

Point = tuple[float, float]

# Besides control characters: halves of a character, which no file can hold, and two code points that XML forbids.
_UNWRITABLE = re.compile("[\ud800-\udfff\ufffe\uffff]")
_MARKS = {"better": "▲", "unchanged": "=", "worse": "▼", "unjudged": "–", "unknown": "?"}
# What a reader needs to know of the words and numbers on the page: in short, and word by word behind a click.
_IN_SHORT = (
    "Better and worse: the whole 95% interval of the change lies beyond the threshold. Unchanged: not the whole of it "
    "does, since little changed or since there were too few rows to tell. Of losses, in nats, lower is better; of KL, "
    "a distance, lower is nearer."
)
_LEGEND = {
    "better, worse": (
        "The change is larger than the threshold named beside it, to the good or to the bad side, and so is its whole "
        "95% interval."
    ),
    "unchanged": (
        "Within the interval: at least a part of it lies inside the threshold. Either little changed, or there were "
        "too few rows to tell; the width of the interval says which."
    ),
    "unjudged": "Shown only: neither more nor less of it is good or bad in itself.",
    "unknown": "It could not be measured.",
    "95% interval": (
        "Where the change would lie with other rows of the same kind, in about 95 of 100 such reports. With very few "
        "rows there is none."
    ),
    "nats per token": (
        "The unit of a loss: how much a text surprises the model, per piece of a word. Lower is better; 0.1 less makes "
        "each token about 10% more probable. Perplexity is the same on another scale."
    ),
    "KL": (
        "How far the tuned model is from the one it is compared with, in nats per token of that one's own answers. 0 "
        "is no difference and lower is nearer; all training makes it grow, which is not by itself bad."
    ),
    "other figures": (
        "Right answers and chosen answers: higher is better. Gaps between held-out and training rows, duplicates and "
        "answers completed verbatim: lower is better. Stereotypes: nearer to 50% is better."
    ),
}
_LINES = 6
# Samples shown at once; the others are behind a click.
_SAMPLES = 3
# In units of the pictures, which are about as wide as a phone: letters keep their size there.
_WIDTH = 340
_LETTER = 6.0
# Points of a line beyond which a picture of that width shows no more.
_POINTS = 400
_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --soft: #f2f4f7; --edge: #d4d9e0; --faint: #5b6470;
  --better: #176b2c; --better-soft: #d9f2df; --worse: #a11d2b; --worse-soft: #fbdfe1; --unknown: #7a4d00;
  --unknown-soft: #fdeccb; --c0: #1b6ca8; --c1: #c2410c; --c2: #2e7d32; --c3: #7b4fa3; --c4: #00798c; --c5: #8d5524; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --soft: #1e2329; --edge: #3a424d; --faint: #a3adba;
  --better: #8fdea2; --better-soft: #173d22; --worse: #ff9ea6; --worse-soft: #4d1a20; --unknown: #f7c873;
  --unknown-soft: #463309; --c0: #6cb6ee; --c1: #ff9a66; --c2: #84d089; --c3: #c7a2ea; --c4: #5fcfdf; --c5: #d8a878; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem;
  background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 0 0 0.4rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 0.4rem; }
h4 { font-size: 0.85rem; margin: 0 0 0.2rem; color: var(--faint); }
section { border-top: 1px solid var(--edge); margin-top: 2rem; padding-top: 1.2rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.1rem 1rem; margin: 0.6rem 0; }
dt, .faint, figcaption, footer { color: var(--faint); }
dd { margin: 0; }
.scroll { overflow-x: auto; margin: 0.4rem 0; }
table { border-collapse: collapse; overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 1rem 0.35rem 0; border-bottom: 1px solid var(--edge); }
thead th { color: var(--faint); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 500; }
.figures tbody th { min-width: 9rem; max-width: 22rem; }
td.long { min-width: 16rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.summary { width: 100%; }
.summary tbody th { width: 9.5rem; }
.summary td { overflow-wrap: anywhere; }
.verdict { display: inline-block; padding: 0 0.5rem; border-radius: 0.7rem; font-weight: 600; white-space: nowrap;
  background: var(--soft); border: 1px solid currentColor; }
.better { color: var(--better); background: var(--better-soft); }
.worse { color: var(--worse); background: var(--worse-soft); }
.unknown { color: var(--unknown); background: var(--unknown-soft); border-style: dashed; }
.key { font-size: 0.9rem; margin-top: 1rem; }
.key p { margin: 0.4rem 0; }
.key dt { font-weight: 600; }
.error, .warning { border-left: 4px solid var(--unknown); background: var(--unknown-soft); padding: 0.5rem 0.8rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: start; }
figure { margin: 0.8rem 0; flex: 0 1 28rem; min-width: 0; }
figcaption { font-size: 0.9rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
.grid { stroke: var(--edge); }
.zero { stroke: currentColor; stroke-width: 1.5; }
.whisker { stroke: var(--c0); stroke-width: 2.5; }
.dot { fill: var(--c0); stroke: var(--c0); }
.label { paint-order: stroke; stroke: var(--page); stroke-width: 5; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1.2rem; margin: 0.2rem 0; padding: 0;
  font-size: 0.85rem; }
.legend svg { display: inline-block; width: 30px; height: 10px; margin-right: 0.4rem; vertical-align: middle; }
.sample { background: var(--soft); border-radius: 0.5rem; padding: 0.8rem; margin: 0.8rem 0; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0.8rem; margin-top: 0.6rem; }
pre { font: 13px/1.45 ui-monospace, monospace; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
footer { border-top: 1px solid var(--edge); margin-top: 2rem; padding-top: 0.6rem; font-size: 0.85rem; }
@media (max-width: 40rem) { .pair { grid-template-columns: minmax(0, 1fr); } .summary tbody th { width: 6.8rem; }
  .key dl { display: block; } .key dt { margin-top: 0.5rem; } }
"""
_CLASSES = [f".s{k} {{ stroke: var(--c{k}); }} .f{k} {{ fill: var(--c{k}); }}" for k in range(_LINES)]
# By colour, so that lines differ without it too.
_DASHES = ("", "6 3", "2 3", "9 3 2 3", "12 4", "1 2")


def as_json(report: Report) -> dict[str, Any]:
    """The whole report for a program: `sections` and their `figures` by key, what is not a finite number as None.

    Texts are as they were given, so they may hold any character: write them with `json.dumps`' own ASCII escapes.
    """
    return {
        "adapter": report.adapter,
        "base": report.base,
        "against": report.against,
        "date": report.date,
        "versions": dict(report.versions),
        "sections": {section.key: _section(section) for section in report.sections},
    }


def _section(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "verdict": section.verdict,
        "sentence": section.sentence,
        "error": section.error,
        "figures": {figure.name: _figure(figure) for figure in section.figures},
        "tables": [
            {"title": table.title, "header": list(table.header), "rows": [list(row) for row in table.rows]}
            for table in section.tables
        ],
        "curves": [_curve(curve) for curve in section.curves],
        "samples": [
            {"prompt": sample.prompt, "before": sample.before, "after": sample.after, "wanted": sample.wanted}
            for sample in section.samples
        ],
        "notes": list(section.notes),
        "warnings": list(section.warnings),
    }


def _figure(figure: Figure) -> dict[str, Any]:
    return {
        "label": figure.label,
        "unit": figure.unit,
        "before": _finite(figure.before),
        "after": _finite(figure.after),
        "change": _finite(figure.change),
        "low": _finite(figure.low),
        "high": _finite(figure.high),
        "rows": None if figure.rows is None else int(figure.rows),
    }


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "title": curve.title,
        "x": curve.x,
        "y": curve.y,
        "lines": {name: [[_finite(a), _finite(b)] for a, b in points] for name, points in curve.lines.items()},
    }


def _finite(value: float | None) -> float | None:
    """A plain float; JSON has neither NaN nor infinity."""
    return float(value) if value is not None and math.isfinite(value) else None


def as_text(report: Report) -> list[str]:
    """A verdict line for each section, aligned."""
    titles = [_one_line(section.title) for section in report.sections]
    widest = max(map(len, titles), default=0)
    return [
        f"{title.ljust(widest)}  {section.verdict:<9}  {_one_line(_said(section.sentence, section.error))}".rstrip()
        for title, section in zip(titles, report.sections, strict=True)
    ]


def as_html(report: Report) -> str:
    """One page that needs nothing else: no script, and its policy lets a browser fetch nothing.

    What it shows is read from `as_json`. An element with a number has its place there as `data-key`, such as
    `gain.loss.after`, and the number, rounded, as its text: Python's `float` reads it once the commas between
    thousands are gone. A number that is not there is a dash. `gain.verdict` is the verdict's word.
    """
    shown = as_json(report)
    names = ("base" if shown["against"] == "base" else "before", "tuned")
    title = f"What became of {shown['adapter']}"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>\n<style>{_STYLE}{' '.join(_CLASSES)}\n</style>\n</head>\n<body>",
        f"<header>\n<h1>{_text(title)}</h1>",
        _pairs({"Base model": shown["base"], "Compared with": shown["against"], "Made": shown["date"]}),
        "</header>",
        _summary(shown["sections"]),
        f'<div class="key">\n<p>{_IN_SHORT}</p>\n<details><summary>How to read this</summary>\n{_pairs(_LEGEND)}',
        "</details>\n</div>",
        *(_section_html(key, section, names) for key, section in shown["sections"].items()),
    ]
    if shown["versions"]:
        versions = ", ".join(f"{name} {version}" for name, version in shown["versions"].items())
        parts.append(f"<footer>Made with {_text(versions)}</footer>")
    return "\n".join([*parts, "</body>\n</html>\n"])


def _written(text: object) -> str:
    """Without characters that steer a terminal or that a file cannot hold: those are spelled out."""
    return _UNWRITABLE.sub(lambda found: f"<U+{ord(found[0]):04X}>", visible(str(text)))


def _one_line(text: str) -> str:
    return " ".join(_written(text).split())


def _text(text: object) -> str:
    return html.escape(_written(text))


def _said(sentence: str, error: str | None) -> str:
    """The verdict line, or why there is none."""
    return sentence or ("" if error is None else f"Could not be made: {error}")


def _pairs(texts: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in texts.items()) + "</dl>"


def _verdict(verdict: str, key: str = "") -> str:
    mark = f'<span aria-hidden="true">{_MARKS[verdict]}</span>'
    word = f'<span data-key="{_text(key)}.verdict">{verdict}</span>' if key else verdict
    return f'<span class="verdict {verdict}">{mark} {word}</span>'


def _summary(sections: Mapping[str, dict[str, Any]]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row"><a href="#{_text(key)}">{_text(section["title"])}</a><br>'
        f"{_verdict(section['verdict'], key)}</th><td>{_text(_said(section['sentence'], section['error']))}</td></tr>"
        for key, section in sections.items()
    )
    return (
        '<table class="summary">\n<thead><tr><th scope="col">Verdict</th><th scope="col">Why</th></tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table>"
    )


def _section_html(key: str, section: dict[str, Any], names: tuple[str, str]) -> str:
    parts = [
        f'<section id="{_text(key)}">\n<h2>{_text(section["title"])} {_verdict(section["verdict"])}</h2>',
        f"<p>{_text(section['sentence'])}</p>" if section["sentence"] else "",
    ]
    if section["error"] is not None:
        what = "Not all of this section could be made" if section["figures"] else "This section could not be made"
        parts.append(f'<p class="error">{what}: {_text(section["error"])}</p>')
    parts += [f'<p class="warning">{_text(warning)}</p>' for warning in section["warnings"]]
    parts.append(_figures(key, section["figures"], names))
    pictures = [*_intervals(section["figures"]), *(_lines(curve) for curve in section["curves"])]
    if pictures:
        parts.append('<div class="pictures">' + "\n".join(pictures) + "</div>")
    parts += [_table(table) for table in section["tables"]]
    parts.append(_samples(section["samples"], names))
    if section["notes"]:
        notes = "".join(f"<li>{_text(note)}</li>" for note in section["notes"])
        parts.append(f"<h3>What this does not say</h3>\n<ul>{notes}</ul>")
    return "\n".join([*filter(None, parts), "</section>"])


def _scrolling(label: str, table: str) -> str:
    """A wide table scrolls within itself, by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(label)}">\n{table}\n</div>'


def _figures(key: str, figures: Mapping[str, dict[str, Any]], names: tuple[str, str]) -> str:
    if not figures:
        return ""
    heads = "".join(
        f'<th scope="col" class="number">{name}</th>' for name in (*names, "change", "95% interval", "rows")
    )
    rows = []
    for name, figure in figures.items():

        def number(
            field: str, form: Callable[[float], str], at: str = f"{key}.{name}", of: dict[str, Any] = figure
        ) -> str:
            value = of[field]
            text = form(value) if value is not None else '<span aria-label="none">–</span>'
            return f'<span data-key="{_text(at)}.{field}">{text}</span>'

        level = _format([figure["before"], figure["after"]])
        # Changes are small beside what changed: they have digits of their own.
        step = _format([figure["change"], figure["low"], figure["high"]], signed=True)
        if figure["low"] is None and figure["high"] is None:
            interval = f'<span data-key="{_text(f"{key}.{name}")}.low">{number("high", step)}</span>'
        else:
            interval = f"{number('low', step)} to {number('high', step)}"
        cells = [
            number("before", level),
            number("after", level),
            number("change", step),
            interval,
            number("rows", "{:,}".format),
        ]
        unit = f' <span class="faint">{_text(figure["unit"])}</span>' if figure["unit"] else ""
        rows.append(
            f'<tr><th scope="row">{_text(figure["label"])}{unit}</th>'
            + "".join(f'<td class="number">{cell}</td>' for cell in cells)
            + "</tr>"
        )
    head = f'<thead><tr><th scope="col">Figure</th>{heads}</tr></thead>'
    body = "\n".join(rows)
    return _scrolling("Figures", f'<table class="figures">\n{head}\n<tbody>\n{body}\n</tbody>\n</table>')


def _format(values: Sequence[float | None], *, signed: bool = False) -> Callable[[float], str]:
    """How to write numbers that belong together: the largest with four digits, or three if `signed`; whole ones whole.

    What is too small to be written out with nine decimals, or too large for fifteen digits, has an exponent.
    """
    there = [abs(value) for value in values if value is not None]
    top = max(there, default=0.0)
    sign, digits = ("+", 3) if signed else ("", 4)
    if top and not 1e-7 <= top < 1e15:
        written = f"{sign}.{digits - 1}e"
    else:
        whole = all(value == int(value) for value in there)
        decimals = 0 if whole or not top else max(0, digits - 1 - math.floor(math.log10(top)))
        written = f"{sign},.{decimals}f"

    def form(value: float) -> str:
        text = format(value, written)
        # What rounds to nothing has no sign.
        return text.lstrip("+-") if not re.search("[1-9]", text.split("e")[0]) else text

    return form


def _table(table: dict[str, Any]) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table["header"])
    rows = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table["rows"])
    whole = f"<table>\n<caption>{_text(table['title'])}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n"
    return _scrolling(table["title"], f"{whole}</tbody>\n</table>")


def _cell(text: str) -> str:
    # A sentence would be squeezed into a word's width before the table scrolls.
    return f'<td class="long">{_text(text)}</td>' if len(text) > 30 else f"<td>{_text(text)}</td>"


def _samples(samples: Sequence[dict[str, Any]], names: tuple[str, str]) -> str:
    if not samples:
        return ""
    written = []
    for sample in samples:
        answers = [(names[0], sample["before"]), (names[1], sample["after"])]
        wanted = [("wanted", sample["wanted"])] if sample["wanted"] is not None else []
        written.append(
            f'<article class="sample">{_quoted("prompt", sample["prompt"])}'
            f'<div class="pair">{"".join(_quoted(*answer) for answer in [*answers, *wanted])}</div></article>'
        )
    first, more = written[:_SAMPLES], written[_SAMPLES:]
    rest = [f"<details><summary>{len(more)} more</summary>", *more, "</details>"] if more else []
    return "\n".join(["<h3>Answers side by side</h3>", *first, *rest])


def _quoted(head: str, text: str) -> str:
    # A line break right after <pre> would be dropped.
    body = f'<pre dir="auto">\n{_text(text)}</pre>' if text else '<p class="faint">(empty)</p>'
    return f"<div><h4>{head}</h4>{body}</div>"


def _intervals(figures: Mapping[str, dict[str, Any]]) -> list[str]:
    """Changes with their intervals around a zero line: a picture for each unit, since units share no scale."""
    by_unit: dict[str, list[dict[str, Any]]] = {}
    for figure in figures.values():
        if None not in (figure["low"], figure["change"], figure["high"]):
            by_unit.setdefault(figure["unit"], []).append(figure)
    return [_interval_plot(unit, group) for unit, group in by_unit.items()]


def _interval_plot(unit: str, figures: Sequence[dict[str, Any]]) -> str:
    """A row per figure: its label above a dot and a whisker."""
    ends = [figure[field] for figure in figures for field in ("low", "change", "high")]
    scale = _ticks([0.0, *ends])
    across = _axis(scale, 24.0, _WIDTH - 24.0)
    row = 36
    bottom = row * len(figures) + 4
    parts = []
    for at, label in _labels(scale, across):
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 14}" text-anchor="middle">{label}</text>')
    parts.append(f'<line class="zero" x1="{across(0):.1f}" x2="{across(0):.1f}" y1="0" y2="{bottom}"/>')
    for k, figure in enumerate(figures):
        middle = k * row + 27
        parts.append(f'<text class="label" x="2" y="{k * row + 14}">{_text(_cut(figure["label"]))}</text>')
        a, b = across(figure["low"]), across(figure["high"])
        ends_at = f"M{a:.1f} {middle - 5}V{middle + 5}M{b:.1f} {middle - 5}V{middle + 5}"
        parts.append(f'<path class="whisker" d="M{a:.1f} {middle}H{b:.1f}{ends_at}"/>')
        parts.append(f'<circle class="dot" cx="{across(figure["change"]):.1f}" cy="{middle}" r="4"/>')
    caption = "Change and its 95% interval" + (f", {unit}" if unit else "")
    return _picture(caption, bottom + 20, parts)


def _lines(curve: dict[str, Any]) -> str:
    """Lines over x; a point that is not finite breaks its line."""
    runs = {name: _runs(points) for name, points in curve["lines"].items()}
    every = [point for found in runs.values() for run in found for point in run]
    if not every:
        return f"<figure><figcaption>{_text(curve['title'])}: nothing to draw.</figcaption></figure>"
    xs, ys = _ticks([point[0] for point in every]), _ticks([point[1] for point in every])
    top, bottom, height = 24, 184, 222
    left = 10 + _LETTER * max(len(_tick(value)) for value in ys)
    right = _WIDTH - 12 - _LETTER / 2 * len(_tick(xs[-1]))
    across, up = _axis(xs, left, right), _axis(ys, bottom, top)
    parts = [f'<text x="2" y="12">{_text(_cut(curve["y"]))}</text>']
    for value in ys:
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
        parts.append(f'<text x="{left - 5}" y="{up(value) + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
    for at, label in _labels(xs, across):
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
    parts.append(
        f'<text x="{(left + right) / 2}" y="{height - 6}" text-anchor="middle">{_text(_cut(curve["x"]))}</text>'
    )
    legend = []
    for k, (name, found) in enumerate(runs.items()):
        look = f'class="line s{k % _LINES}" stroke-dasharray="{_DASHES[k % _LINES]}"'
        for run in found:
            placed = [(across(a), up(b)) for a, b in _thinned(run)]
            if len(placed) > 1:
                parts.append(f'<polyline {look} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in placed)}"/>')
            # Few points are measurements that the eye should find; many are a line.
            if len(placed) <= 20:
                parts += [f'<circle class="f{k % _LINES}" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in placed]
        key = f'<svg viewBox="0 0 30 10" aria-hidden="true"><path {look} d="M0 5H30"/></svg>'
        legend.append(f"<li>{key}{_text(name)}</li>")
    return _picture(curve["title"], height, parts, f'<ul class="legend">{"".join(legend)}</ul>')


def _picture(title: str, height: int, parts: Sequence[str], below: str = "") -> str:
    drawn = "\n".join(parts)
    svg = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{_text(title)}">\n{drawn}\n</svg>'
    return f"<figure>\n<figcaption>{_text(title)}</figcaption>\n{svg}{below}\n</figure>"


def _runs(points: Sequence[Sequence[float | None]]) -> list[list[Point]]:
    """The points between those that cannot be drawn."""
    runs: list[list[Point]] = [[]]
    for a, b in points:
        # Beyond this, the difference of two is no float.
        if a is None or b is None or max(abs(a), abs(b)) > 1e300:
            runs.append([])
        else:
            runs[-1].append((a, b))
    return [run for run in runs if run]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most `_POINTS` and the two ends: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= _POINTS:
        return list(points)
    kept = {0, len(points) - 1}
    stretches = _POINTS // 2
    for k in range(stretches):
        stretch = range(k * len(points) // stretches, (k + 1) * len(points) // stretches)
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _ticks(values: Sequence[float]) -> list[float]:
    """Three to six round numbers from at or below the least value to at or above the greatest."""
    values = [min(1e300, max(-1e300, value)) for value in values]
    low, high = min(values), max(values)
    # Values that a float hardly tells apart, or that a power of ten cannot measure, count as one.
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-290):
        around = max(abs(low) / 2, 1e-3) if low else 0.5
        low, high = low - around, high + around
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10, 20) if m * power >= rough)
    return [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _tick(value: float) -> str:
    return f"{value:.10g}"


def _axis(scale: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """From a value to a place, `scale` reaching from `start` to `end`."""
    first, span = scale[0], scale[-1] - scale[0]

    def place(value: float) -> float:
        return start + (min(1e300, max(-1e300, value)) - first) / span * (end - start)

    return place


def _labels(scale: Sequence[float], across: Callable[[float], float]) -> list[tuple[float, str]]:
    """Place and text of the ticks of a horizontal axis: every so many that the texts keep apart, 0 among them."""
    widest = _LETTER * max(len(_tick(value)) for value in scale) + 10
    every = max(1, math.ceil(widest / (across(scale[1]) - across(scale[0]))))
    first = next((k for k, value in enumerate(scale) if value == 0), 0) % every
    return [(across(value), _tick(value)) for value in scale[first::every]]


def _cut(text: str) -> str:
    """What fits into the width of a picture."""
    most = round(_WIDTH / _LETTER) - 2
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
