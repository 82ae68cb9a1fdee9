"""What a part of the serving benchmark found, and the statistics that its parts share."""

from __future__ import annotations

import math
import resource
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Findings:
    """Of one part."""

    summary: dict[str, Any]
    """Goes into the last line."""

    lines: list[str] = field(default_factory=list)
    """For a person: what was measured, and how."""

    wrong: list[str] = field(default_factory=list)
    """Promises that were broken."""


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed (nearest rank); NaN without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def spread(values: Sequence[float], unit: str = "s") -> str:
    """Median, 95th percentile and largest value in words."""
    if not values:
        return "none"
    median, late = statistics.median(values), percentile(values, 0.95)
    return (
        f"median {median:.3f} {unit}, 95% within {late:.3f} {unit}, at most {max(values):.3f} {unit} ({len(values):,})"
    )


def rounded(value: float, digits: int = 3) -> float | None:
    """For JSON, which has no NaN."""
    return round(value, digits) if math.isfinite(value) else None


def allow_many_connections() -> None:
    """As many files as this user may have open, for this process and those it starts."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
