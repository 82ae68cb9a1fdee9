"""What `/metrics` shows: Prometheus counters of requests, tokens, swaps, restarts and votes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

Outcome = Literal["ok", "failed", "aborted", "refused"]
Swap = Literal["loaded", "unloaded", "quarantined"]

OUTCOMES = ("ok", "failed", "aborted", "refused")
SWAPS = ("loaded", "unloaded", "quarantined")
VERDICTS = {
    "compare": ("left", "right", "tie", "both_bad"),
    "thumbs": ("up", "down"),
    "edit": ("right",),
}
OTHER = "other"
"""The label of what has none of its own: every label value is a time series for ever, so clients choose none."""

LATENCY_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)


class Metrics:
    """One server's numbers, in a registry of its own. Every method may be called from any thread."""

    MAX_MODELS = 500
    """Models with labels of their own. The versions of a year fit; a folder of thousands does not take the memory."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._models: set[str] = set()
        self._requests = Counter(
            "lit_ft_requests", "Chat requests that have ended.", ["model", "outcome"], registry=registry
        )
        self._seconds = Histogram(
            "lit_ft_request_seconds",
            "From a request to the end of its reply, where there was one.",
            ["model"],
            buckets=LATENCY_S,
            registry=registry,
        )
        self._ttft = Histogram(
            "lit_ft_time_to_first_token_seconds",
            "From a request to the first piece of its reply.",
            ["model"],
            buckets=TTFT_S,
            registry=registry,
        )
        self._tokens = Counter("lit_ft_tokens", "Tokens generated.", ["model"], registry=registry)
        self._open = Gauge("lit_ft_open_streams", "Replies in progress.", registry=registry)
        self._swaps = Counter("lit_ft_swaps", "Adapter versions by what became of them.", ["what"], registry=registry)
        self._restarts = Counter("lit_ft_engine_restarts", "Times the engine was started again.", registry=registry)
        self._up = Gauge("lit_ft_engine_up", "1 while the engine answers.", registry=registry)
        self._votes = Counter("lit_ft_votes", "Votes stored.", ["kind", "verdict"], registry=registry)
        for what in SWAPS:  # a series that appears with its first event hides that event from rate()
            self._swaps.labels(what)
        for kind, verdicts in VERDICTS.items():
            for verdict in verdicts:
                self._votes.labels(kind, verdict)
        ProcessCollector(registry=registry)

    def know(self, refs: Iterable[str]) -> None:
        """From now on these models have labels of their own. Name only what the server itself serves."""
        for ref in refs:
            if ref in self._models or len(self._models) >= self.MAX_MODELS:
                continue
            self._models.add(ref)
            for outcome in OUTCOMES:
                self._requests.labels(ref, outcome)

    def finished(
        self, ref: str, outcome: Outcome, seconds: float, ttft_s: float | None = None, tokens: int = 0
    ) -> None:
        """A request has ended. `ttft_s` is None where no text came; a refused one has no latency to speak of."""
        if outcome not in OUTCOMES:
            raise ValueError(f"{outcome!r} is none of {OUTCOMES}")
        model = ref if ref in self._models else OTHER
        self._requests.labels(model, outcome).inc()
        if outcome != "refused":
            self._seconds.labels(model).observe(max(0.0, seconds))
        if ttft_s is not None:
            self._ttft.labels(model).observe(max(0.0, ttft_s))
        if tokens > 0:
            self._tokens.labels(model).inc(tokens)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A reply is in progress for as long as the block runs."""
        self._open.inc()
        try:
            yield
        finally:
            self._open.dec()

    def swapped(self, what: Swap) -> None:
        """An adapter version was loaded, unloaded or quarantined."""
        if what not in SWAPS:
            raise ValueError(f"{what!r} is none of {SWAPS}")
        self._swaps.labels(what).inc()

    def engine_restarted(self) -> None:
        """The engine had died and is started again."""
        self._restarts.inc()

    def engine_up(self, up: bool) -> None:
        """Whether the engine answers."""
        self._up.set(1 if up else 0)

    def voted(self, kind: str, verdict: str) -> None:
        """A vote was stored."""
        if verdict not in VERDICTS.get(kind, ()):
            kind = verdict = OTHER
        self._votes.labels(kind, verdict).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it; see `content_type`."""
        return generate_latest(self._registry)
