"""Progress on standard error: a bar where a person watches, a line every few seconds where a file does.

Of several processes only the first one speaks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TypeVar

from lit_ft.distributed.processes import rank

T = TypeVar("T")
_QUIET_SECONDS = 2.0
_LINE_EVERY_SECONDS = 10.0


class Progress:
    """One task of known length. Nothing is shown in its first two seconds."""

    def __init__(self, label: str, total: int, *, done: int = 0) -> None:
        self.label, self.total = label, max(total, 1)
        self.done, self._begun_at = done, done
        self._start = time.monotonic()
        self._shown_at = self._start + _QUIET_SECONDS - _LINE_EVERY_SECONDS
        self._watched = sys.stderr.isatty()
        self._width = 0

    @classmethod
    def over(cls, items: Iterable[T], label: str) -> Iterator[T]:
        """Iterate `items` (which have a length) under a progress line."""
        progress = cls(label, len(items) if isinstance(items, Sized) else 1)
        for item in items:
            yield item
            progress.advance()
        progress.close()

    def advance(self, by: int = 1, note: str = "") -> None:
        """Count `by` more as done; `note` follows the label."""
        self.show(self.done + by, note)

    def show(self, done: int, note: str = "") -> None:
        """Say that `done` of the total are done, if it is time to say anything."""
        self.done = done
        now = time.monotonic()
        if now - self._start < _QUIET_SECONDS:
            return
        if now - self._shown_at < (0.2 if self._watched else _LINE_EVERY_SECONDS):
            return
        self._shown_at = now
        self._write(self._line(now, note))

    def close(self, note: str = "", *, always: bool = False) -> None:
        """Show the last state and end the line, if it took over two seconds or `always` asks for it."""
        now = time.monotonic()
        if always or now - self._start >= _QUIET_SECONDS:
            self._write(self._line(now, note))
            if self._watched and not rank():
                sys.stderr.write("\n")
                sys.stderr.flush()
                self._width = 0

    def _line(self, now: float, note: str) -> str:
        elapsed, fresh = now - self._start, self.done - self._begun_at
        left = elapsed / fresh * (self.total - self.done) if fresh > 0 else float("nan")
        parts = [f"{self.label} {self.done}/{self.total}", _bar(self.done / self.total) if self._watched else "", note]
        parts.append(f"{clock(elapsed)} gone, {clock(left)} left" if fresh > 0 else f"{clock(elapsed)} gone")
        return " · ".join(part for part in parts if part)

    def _write(self, line: str) -> None:
        if rank():
            return
        if self._watched:
            sys.stderr.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _bar(share: float, width: int = 20) -> str:
    filled = round(min(share, 1.0) * width)
    return "█" * filled + "░" * (width - filled)


def clock(seconds: float) -> str:
    """`mm:ss`, or `h:mm:ss` from an hour on."""
    if seconds != seconds:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def say(text: Any = "") -> None:
    """A line for the person who runs the command, on standard error."""
    if not rank():
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def metric_line(metrics: Mapping[str, Any], headline: Iterable[str]) -> str:
    """Those held-out metrics of `headline` that there are, or that there are none."""
    found = [f"{key} {float(metrics[key]):.4f}" for name in headline if (key := f"eval/{name}") in metrics]
    return ", ".join(found) or "no metrics"
