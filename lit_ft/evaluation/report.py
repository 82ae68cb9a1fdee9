"""The report on an adapter: whom it is about, and its sections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lit_ft.evaluation.section import Section


@dataclass(frozen=True)
class Report:
    """What is written as `report.json` and `report.html`.

    Raises:
        ValueError: two sections share a key, two figures of a section a name, or a section that could not be made has
            a verdict: one of them would be lost or wrong without a word.
    """

    adapter: str
    """The tuned model, such as `support@v3`."""
    base: str
    """Id of the base model."""
    against: str
    """What it is compared with: `base`, or another adapter."""
    date: str
    """As it is to be shown, such as `2026-03-01 14:05 UTC`."""
    sections: tuple[Section, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the libraries, by name."""

    def __post_init__(self) -> None:
        _check_once("section", (section.key for section in self.sections))
        for section in self.sections:
            _check_once(f"figure of {section.key}", (figure.name for figure in section.figures))
            if section.error is not None and section.verdict != "unknown":
                raise ValueError(f"{section.key} could not be made, and its verdict is {section.verdict}")


def _check_once(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"the {what} {name} is there twice")
        seen.add(name)
