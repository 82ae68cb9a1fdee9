"""How much one user, and all together, may ask for: requests, length, and open streams."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lit_ft.errors import UserError

RETRY_STREAM_S = 5.0
"""When to try again where every stream is taken: nobody can say when one ends."""

ALL = ""
"""The key of what everybody shares."""


class TooMuch(UserError):  # noqa: N818 - a refusal, not an error
    """More than is allowed; the text is for whoever asked."""

    def __init__(self, message: str, retry_after_s: float | None) -> None:
        """`retry_after_s` is when the same request may pass; None means that it never will."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Rate:
    """So many events a minute for each key: all of them at once at most, and from then on evenly spread.

    The generic cell rate algorithm: a token bucket that needs one number for each key, the instant at which its bucket
    is full again. A key whose instant has passed is as good as unknown, and is forgotten.
    """

    MAX_KEYS = 100_000
    """Above it the longest unused key is forgotten, whatever it has used: a million visitors must not fill memory."""

    def __init__(self, per_minute: float, burst: float | None = None, clock: Callable[[], float] = time.monotonic):
        """`burst` is how many may come at once; None is a minute's worth."""
        self._interval = 60.0 / per_minute
        self._burst_s = max(1.0, per_minute if burst is None else burst) * self._interval
        self._clock = clock
        self._full_at: OrderedDict[Hashable, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def wait_s(self, key: Hashable) -> float:
        """Seconds until one more is allowed; 0 is now."""
        now = self._clock()
        wait = self._at(key, now) + self._interval - self._burst_s - now
        return wait if wait > 1e-6 else 0.0  # whoever has waited as told must not fail by rounding

    def count(self, key: Hashable) -> None:
        """One more has come."""
        now = self._clock()
        self._full_at[key] = min(self._at(key, now) + self._interval, now + self._burst_s)
        self._full_at.move_to_end(key)
        self._forget(now)

    def refund(self, key: Hashable) -> None:
        """One that was counted is not to be."""
        if key in self._full_at:
            self._full_at[key] -= self._interval

    def _at(self, key: Hashable, now: float) -> float:
        full_at = max(self._full_at.get(key, now), now)
        if full_at > now + self._burst_s:  # a clock that went back must not shut anybody out for as long
            full_at = self._full_at[key] = now + self._burst_s
        return full_at

    def _forget(self, now: float) -> None:
        # Two for each one that comes, from the longest unused on: in the end all that can be forgotten are.
        for _ in range(2):
            key, full_at = next(iter(self._full_at.items()))
            in_use = now < full_at <= now + self._burst_s
            if len(self._full_at) == 1 or (in_use and len(self._full_at) <= self.MAX_KEYS):
                return
            del self._full_at[key]


class Limits:
    """Lets requests in, or says why not. Use it within one event loop."""

    def __init__(
        self,
        requests_per_minute: float | None = None,
        requests_per_minute_in_all: float | None = None,
        streams: int | None = None,
        streams_in_all: int | None = None,
        characters: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """None or 0 is no limit.

        Args:
            requests_per_minute: of one user; that many may come at once.
            requests_per_minute_in_all: of all users together.
            streams: replies of one user that may be in progress.
            streams_in_all: of all users together.
            characters: length of a request, the whole conversation.
            clock: seconds, for tests.
        """
        self._rate = Rate(requests_per_minute, clock=clock) if requests_per_minute else None
        self._rate_in_all = Rate(requests_per_minute_in_all, clock=clock) if requests_per_minute_in_all else None
        self._per_minute, self._per_minute_in_all = requests_per_minute, requests_per_minute_in_all
        self._streams, self._streams_in_all, self._characters = streams, streams_in_all, characters
        self._open: dict[str, int] = {}
        self.open_in_all = 0
        """Replies in progress."""

    @contextmanager
    def admit(self, user: str, characters: int) -> Iterator[None]:
        """Hold one stream of `user` for as long as the block runs. What is refused counts for nothing.

        Raises:
            TooMuch: on entering, if a limit is reached.
        """
        self._check_length(characters)
        self._check_streams(user)
        self._check_rates(user)
        for rate, key in ((self._rate, user), (self._rate_in_all, ALL)):
            if rate is not None:
                rate.count(key)
        self._open[user] = self._open.get(user, 0) + 1
        self.open_in_all += 1
        try:
            yield
        finally:
            self.open_in_all -= 1
            self._open[user] -= 1
            if not self._open[user]:
                del self._open[user]

    def _check_length(self, characters: int) -> None:
        if self._characters and characters > self._characters:
            raise TooMuch(
                f"This conversation is {characters:,} characters long; at most {self._characters:,} are allowed. "
                "Please shorten the message, or start a new conversation.",
                None,
            )

    def _check_streams(self, user: str) -> None:
        mine = self._open.get(user, 0)
        if self._streams and mine >= self._streams:
            raise TooMuch(
                f"{_replies(mine)} being written for you already, which is as many as one person may have at once. "
                "Please wait until one has ended, or stop one.",
                RETRY_STREAM_S,
            )
        if self._streams_in_all and self.open_in_all >= self._streams_in_all:
            raise TooMuch(
                f"This server is busy: {_replies(self.open_in_all)} being written, which is as many as it allows at "
                f"once. Please try again in {RETRY_STREAM_S:.0f} seconds.",
                RETRY_STREAM_S,
            )

    def _check_rates(self, user: str) -> None:
        if self._rate is not None and (wait := self._rate.wait_s(user)):
            raise TooMuch(
                f"You have sent {_requests(self._per_minute)} within a minute, which is as many as one person may. "
                f"Please try again in {_seconds(wait)}.",
                wait,
            )
        if self._rate_in_all is not None and (wait := self._rate_in_all.wait_s(ALL)):
            raise TooMuch(
                f"This server is busy: it takes {_requests(self._per_minute_in_all)} a minute from all its users "
                f"together. Please try again in {_seconds(wait)}.",
                wait,
            )


def characters_of(messages: Iterable[Mapping[str, Any]]) -> int:
    """The length of a conversation: all contents, be they strings or lists of text parts."""
    total = 0
    for message in messages:
        content = message["content"]
        total += len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
    return total


def _replies(number: int) -> str:
    return "1 reply is" if number == 1 else f"{number:,} replies are"


def _requests(number: float | None) -> str:
    return "1 request" if number == 1 else f"{number or 0:,.4g} requests"


def _seconds(wait: float) -> str:
    whole = math.ceil(wait)
    return "1 second" if whole == 1 else f"{whole} seconds"
