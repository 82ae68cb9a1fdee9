"""How often a growing reply is drawn, with a clock of the test's own."""

from __future__ import annotations

import pytest

from serve.pace import PATIENCE, Pace


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_first_is_drawn_at_once_and_the_next_after_the_least_time() -> None:
    clock = Clock()
    pace = Pace(0.05, clock)
    assert pace.wait_s <= 0
    with pace.drawing():
        clock.now += 0.001
    assert pace.wait_s == pytest.approx(0.05)
    clock.now += 0.05
    assert pace.wait_s == pytest.approx(0, abs=1e-9)


def test_where_drawing_takes_long_it_takes_no_more_than_a_share_of_the_time() -> None:
    """Drawn whenever it may be, for a minute of which each drawing takes a second: (1 + 4) s apart."""
    clock = Clock()
    pace, drawn = Pace(0.05, clock), 0
    while clock.now < 160:
        clock.now += max(0.0, pace.wait_s)
        with pace.drawing():
            clock.now += 1.0
        drawn += 1
    assert 60 / (1 + PATIENCE) <= drawn <= 60 / (1 + PATIENCE) + 1


def test_it_recovers_when_there_is_time_again() -> None:
    clock = Clock()
    pace = Pace(0.05, clock)
    with pace.drawing():
        clock.now += 2.0
    assert pace.wait_s == pytest.approx(8.0)
    clock.now += 8.0
    with pace.drawing():
        clock.now += 0.002
    assert pace.wait_s == pytest.approx(0.05)
