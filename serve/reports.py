"""The report in an adapter's folder, as far as a card shows it: verdicts and headline numbers."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_ft.adapter import REPORT

VERDICTS = ("better", "unchanged", "worse", "unjudged", "unknown")
# The figure that says most of a section: the first of these that it has. Where a section's verdict is of one figure, it
# is that one.
_HEADLINES = {
    "gain": ("metric", "accuracy", "loss"),
    "forgetting": ("instruction_loss", "text_loss", "kl"),
    "overfitting": ("gap",),
    "bias": ("rate",),
}
# A report is some hundred kilobytes; what is larger is none.
_LARGEST = 16 << 20


@dataclass(frozen=True)
class Headline:
    """A figure of a section, as the report measured it."""

    label: str
    unit: str
    before: float | None
    after: float
    change: float | None


@dataclass(frozen=True)
class Finding:
    """A section of a report: what it is about, its verdict, and its headline where it has one."""

    title: str
    verdict: str
    headline: Headline | None


@dataclass(frozen=True)
class Findings:
    """What was compared with what, when, and what came out; cost, which is not judged, is left out."""

    against: str
    date: str
    sections: tuple[Finding, ...]


def findings(folder: Path) -> Findings | None:
    """What the report on the adapter in `folder` found; None where there is none that can be read.

    A folder's report is written anew at will and by others, so nothing in it is taken for granted: what is not as
    `lit_ft.evaluation.page.as_json` writes it is left out.
    """
    path = folder / REPORT / "report.json"
    try:
        found = path.stat()
    except OSError:
        return None
    return _read(path, found.st_mtime_ns, found.st_size) if found.st_size <= _LARGEST else None


@functools.lru_cache(maxsize=256)
def _read(path: Path, changed: int, size: int) -> Findings | None:
    """One version of the file; a page asks for it at every look at a card."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    sections = report.get("sections") if isinstance(report, dict) else None
    if not isinstance(sections, dict):
        return None
    made = [_finding(key, section) for key, section in sections.items() if key in _HEADLINES]
    known = tuple(one for one in made if one is not None)
    return Findings(_words(report.get("against")) or "base", _words(report.get("date")), known) if known else None


def _finding(key: str, section: Any) -> Finding | None:
    if not isinstance(section, dict) or section.get("verdict") not in VERDICTS:
        return None
    figures = section.get("figures")
    there = figures if isinstance(figures, dict) and section.get("error") is None else {}
    headlines = [_headline(there[name]) for name in _HEADLINES[key] if name in there]
    first = next((one for one in headlines if one is not None), None)
    return Finding(_words(section.get("title")) or key.capitalize(), section["verdict"], first)


def _headline(figure: Any) -> Headline | None:
    if not isinstance(figure, Mapping) or (after := _number(figure.get("after"))) is None:
        return None
    return Headline(
        label=_words(figure.get("label")),
        unit=_words(figure.get("unit")),
        before=_number(figure.get("before")),
        after=after,
        change=_number(figure.get("change")),
    )


def _number(value: Any) -> float | None:
    """A finite number; to Python true is one, and a whole one may be too large for a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _words(value: Any) -> str:
    return " ".join(value.split())[:200] if isinstance(value, str) else ""
