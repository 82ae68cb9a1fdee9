"""What a report is made of: sections of a verdict, figures, tables, pictures and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

# `unjudged`: the section shows something of which neither less nor more is better, such as cost.
Verdict = Literal["better", "unchanged", "worse", "unjudged", "unknown"]


@dataclass(frozen=True)
class Figure:
    """One number with its interval, base beside tuned."""

    name: str
    """The key in JSON, such as `loss`; no two figures of a section share one."""
    label: str
    """For a reader, such as "loss on held-out rows"."""
    unit: str
    """`nats per token`, `%`, or nothing for a plain number."""
    before: float | None
    """Of the model compared against; None where it was not measured."""
    after: float | None
    """Of the tuned model."""
    change: float | None
    """`after - before`."""
    low: float | None
    """Where the 95% interval of the change begins; None where there is none, as with a single row."""
    high: float | None
    """Where it ends."""
    rows: int | None = None
    """How many rows it was measured on."""


@dataclass(frozen=True)
class Table:
    """Words and numbers in rows, each cell as it is to be shown."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """Each as long as the header."""


@dataclass(frozen=True)
class Curve:
    """A picture: lines over x."""

    title: str
    x: str
    """What the horizontal axis counts."""
    y: str
    """What the vertical axis measures, with its unit."""
    lines: Mapping[str, Sequence[tuple[float, float]]]
    """The `(x, y)` points of each line, by its name, in the order they are joined."""


@dataclass(frozen=True)
class Sample:
    """Answers to one prompt, side by side."""

    prompt: str
    before: str
    """From the model compared against."""
    after: str
    """From the tuned model."""
    wanted: str | None = None
    """The answer in the data, where there is one."""


@dataclass(frozen=True)
class Section:
    """One question about the adapter and the answer to it."""

    key: str
    """gain, forgetting, overfitting, bias or cost."""
    title: str
    verdict: Verdict
    sentence: str
    """The verdict line, with the threshold used."""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    curves: tuple[Curve, ...] = ()
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()
    """Limits, said plainly."""
    warnings: tuple[str, ...] = ()
    """What was found that makes the section's own numbers doubtful, such as rows that are there twice."""
    error: str | None = None
    """Why the section could not be made, or not all of it; its verdict is then `unknown`."""
