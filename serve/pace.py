"""How often a growing reply is drawn: often while the server has time, seldom while it has not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 4.0
"""Times as long as the last drawing took is waited until the next: a reply takes at most a fifth of its time so."""


class Pace:
    """Of one reply. With a hundred at once each drawing waits for the others', and so there are fewer of them."""

    def __init__(self, least_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`least_s` passes between two drawings at least: more than that the eye does not see."""
        self._least_s, self._clock = least_s, clock
        self._due = -float("inf")

    @property
    def wait_s(self) -> float:
        """Until the next may be drawn; 0 or less: now."""
        return self._due - self._clock()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Around the `yield` that hands out what is to be drawn: it returns when that is done."""
        began = self._clock()
        yield
        now = self._clock()
        self._due = now + max(self._least_s, PATIENCE * (now - began))
