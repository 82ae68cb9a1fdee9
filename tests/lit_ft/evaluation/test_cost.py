"""The section on cost: units by hand, nothing judged, and nothing made up that was not measured."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lit_ft.errors import UserError
from lit_ft.evaluation.cost import Cost, cost
from lit_ft.evaluation.section import Figure, Section

RUN = Cost(
    trainable=2_000,
    parameters=400_000,
    seconds=90.0,
    tokens=45_000,
    peak_bytes=3 << 20,
    estimated_bytes=4 << 20,
    adapter_bytes=1 << 19,
    joules=7_200.0,
    meters=("processors (RAPL)",),
    unmetered=("GPUs (NVML)",),
)


def named(section: Section) -> dict[str, Figure]:
    return {figure.name: figure for figure in section.figures}


def test_units() -> None:
    """2,000 of 400,000 are 0.5 %; 45,000 tokens in 90 s are 500 a second; 7,200 J are 2 Wh."""
    section = cost(RUN)
    found = {name: figure.after for name, figure in named(section).items()}
    assert found == {
        "trainable": 2_000,
        "trainable_share": pytest.approx(0.5),
        "seconds": 90,
        "tokens": 45_000,
        "speed": 500,
        "adapter_size": 0.5,
        "energy": 2,
        "peak_memory": 3,
    }
    peak = named(section)["peak_memory"]
    assert (peak.before, peak.change, peak.unit) == (4, -1, "MiB")
    assert section.verdict == "unjudged" and "not judged" in section.sentence
    assert "2,000 trained parameters (0.5 %)" in section.sentence and "01:30 of training" in section.sentence


def test_nothing_is_made_up() -> None:
    section = cost(Cost(seconds=10.0, peak_bytes=1 << 20))
    assert set(named(section)) == {"seconds", "peak_memory"}
    assert named(section)["peak_memory"].change is None
    assert any("Energy was not counted" in note for note in section.notes)
    empty = cost(Cost())
    assert (empty.verdict, empty.figures) == ("unknown", ())


def test_which_meters_were_read_is_said() -> None:
    (note,) = cost(RUN).notes
    assert "the meters of processors (RAPL) counted" in note and "GPUs (NVML) could not be read" in note
    (note,) = cost(replace(RUN, joules=None, meters=(), unmetered=("processors (RAPL)",))).notes
    assert "not counted: no meter could be read" in note and "processors (RAPL) could not be read" in note
    (note,) = cost(replace(RUN, joules=None)).notes
    assert "resumed with other meters" in note


def test_nothing_is_divided_by_zero() -> None:
    assert "speed" not in named(cost(Cost(tokens=5, seconds=0.0)))


@pytest.mark.parametrize("wrong", [{"seconds": -1.0}, {"joules": math.nan}, {"tokens": -5}, {"seconds": math.inf}])
def test_impossible_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}=.*must be a number from 0 on"):
        cost(Cost(**wrong))
