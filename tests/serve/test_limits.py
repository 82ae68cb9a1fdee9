"""Limits by a clock that the test moves: what is let in, what is said, and what is remembered."""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest

from serve.limits import Limits, Rate, TooMuch, characters_of


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def ask(limits: Limits, user: str = "ann", characters: int = 1) -> bool:
    try:
        with limits.admit(user, characters):
            return True
    except TooMuch:
        return False


def refusal(limits: Limits, user: str = "ann", characters: int = 1) -> TooMuch:
    with pytest.raises(TooMuch) as raised, limits.admit(user, characters):
        pass
    return raised.value


def test_a_minutes_worth_at_once_and_then_evenly() -> None:
    """Six a minute: six at once; the next 60 / 6 = 10 s later."""
    clock = Clock()
    limits = Limits(requests_per_minute=6, clock=clock)
    assert [ask(limits) for _ in range(7)] == [True] * 6 + [False]
    error = refusal(limits)
    assert error.retry_after_s == pytest.approx(10, abs=1e-3)
    assert "6 requests within a minute" in str(error) and "10 seconds" in str(error)
    clock.now += 9.9
    assert not ask(limits)
    assert refusal(limits).retry_after_s == pytest.approx(0.1, abs=1e-3)
    assert "1 second." in str(refusal(limits))
    clock.now += 0.1
    assert ask(limits) and not ask(limits)
    clock.now += 3600
    assert [ask(limits) for _ in range(7)] == [True] * 6 + [False]  # an idle hour saves up no more than a minute


def test_whoever_waits_as_told_is_let_in() -> None:
    clock = Clock()
    limits = Limits(requests_per_minute=7, requests_per_minute_in_all=23, clock=clock)
    chance = random.Random(1)
    for _ in range(2000):
        user = chance.choice("abcde")
        try:
            with limits.admit(user, 1):
                pass
        except TooMuch as error:
            assert error.retry_after_s is not None and error.retry_after_s > 0
            clock.now += error.retry_after_s
            # One limit was said; the other may have to be waited for as well.
            again = None if ask(limits, user) else refusal(limits, user)
            if again is not None:
                assert again.retry_after_s is not None
                clock.now += again.retry_after_s
                assert ask(limits, user)
        clock.now += chance.random()


def test_never_more_than_two_minutes_worth_in_any_minute() -> None:
    """At most the burst and what a minute refills: 10 + 10, whatever the pattern."""
    clock = Clock()
    limits = Limits(requests_per_minute=10, clock=clock)
    chance = random.Random(2)
    times = []
    for _ in range(5000):
        clock.now += chance.choice([0, 0, 0.1, 1, 20])
        if ask(limits):
            times.append(clock.now)
    assert len(times) > 500
    for start in times:
        assert sum(start <= moment < start + 60 for moment in times) <= 20


def test_users_do_not_share_but_all_together_do() -> None:
    clock = Clock()
    limits = Limits(requests_per_minute=2, requests_per_minute_in_all=3, clock=clock)
    users = ("ann", "ann", "ann", "bob", "bob", "cy")
    assert [ask(limits, user) for user in users] == [True, True, False, True, False, False]
    assert "all its users" in str(refusal(limits, "cy"))
    clock.now += 20  # 60 / 3: one more for all; cy was refused, and has lost nothing by it
    assert ask(limits, "cy") and not ask(limits, "cy")


def test_open_streams() -> None:
    limits = Limits(streams=2, streams_in_all=3)
    with ExitStack() as first, ExitStack() as rest:
        first.enter_context(limits.admit("ann", 1))
        rest.enter_context(limits.admit("ann", 1))
        assert "2 replies are being written for you" in str(refusal(limits))
        assert (refusal(limits).retry_after_s or 0) > 0
        rest.enter_context(limits.admit("bob", 1))
        assert "3 replies are being written" in str(refusal(limits, "cy"))
        assert limits.open_in_all == 3
        first.close()
        assert limits.open_in_all == 2 and ask(limits, "ann") and ask(limits, "cy")
    assert limits.open_in_all == 0 and limits._open == {}


def test_a_stream_that_fails_is_closed() -> None:
    limits = Limits(streams=1)
    for _ in range(3):
        with pytest.raises(RuntimeError), limits.admit("ann", 1):
            raise RuntimeError
    assert ask(limits) and limits.open_in_all == 0


def test_length() -> None:
    limits = Limits(requests_per_minute=1, characters=1000)
    error = refusal(limits, characters=1001)
    assert error.retry_after_s is None  # waiting does not shorten it
    assert "1,001 characters" in str(error) and "1,000" in str(error)
    assert ask(limits, characters=1000)  # and the refused one was not counted


@pytest.mark.parametrize("none", [None, 0])
def test_no_limits(none: int | None) -> None:
    limits = Limits(none, none, none, none, none)
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(limits.admit("ann", 10**9))
        assert limits.open_in_all == 1000


def test_less_than_one_a_minute() -> None:
    clock = Clock()
    limits = Limits(requests_per_minute=0.5, clock=clock)
    assert ask(limits) and not ask(limits)
    clock.now += 120
    assert ask(limits)


def test_a_clock_that_goes_back_shuts_nobody_out() -> None:
    clock = Clock()
    limits = Limits(requests_per_minute=6, clock=clock)
    assert [ask(limits) for _ in range(7)] == [True] * 6 + [False]
    clock.now -= 86_400
    assert not ask(limits)  # nor does it let anybody in
    assert (refusal(limits).retry_after_s or 0) <= 10.001
    clock.now += 10
    assert ask(limits) and not ask(limits)
    clock.now += 86_400 * 365
    assert [ask(limits) for _ in range(7)] == [True] * 6 + [False]


def test_idle_users_are_forgotten() -> None:
    clock = Clock()
    rate = Rate(60, clock=clock)
    for number in range(10_000):
        rate.count(number)
        clock.now += 0.01
    # Each is full again 1 s after its request, in which time 100 more come.
    assert len(rate) <= 110


def test_a_million_users_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rate, "MAX_KEYS", 1000)
    limits = Limits(requests_per_minute=60, streams=4, clock=Clock())
    for number in range(20_000):  # all within one instant, so that none is idle
        assert ask(limits, str(number))
    assert limits._rate is not None and len(limits._rate) <= 1000 and limits._open == {}
    assert [ask(limits, "19999") for _ in range(60)] == [True] * 59 + [False]  # the newest are remembered


def test_a_refund_gives_back_one() -> None:
    clock = Clock()
    rate = Rate(60, burst=1, clock=clock)
    rate.count("ann")
    assert rate.wait_s("ann") > 0
    rate.refund("ann")
    rate.refund("nobody")
    assert rate.wait_s("ann") == 0
    rate.refund("ann")
    rate.count("ann")
    assert rate.wait_s("ann") > 0  # refunds beyond what was counted save up nothing


def test_the_length_of_a_conversation() -> None:
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "cde"}]
    assert characters_of([{"role": "system", "content": "xyz"}, {"role": "user", "content": parts}]) == 8
    assert characters_of([]) == 0
