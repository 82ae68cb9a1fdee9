"""What the pages stand on, and what they say of models: labels, cards, choices for a list."""

from __future__ import annotations

import html
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.context import Context

from lit_ft.adapter import Adapter
from lit_ft.errors import UserError
from serve import cards
from serve.base import Base
from serve.client import Timing
from serve.fleet import Fleet
from serve.gateway import Gateway
from serve.metrics import Metrics
from serve.votes import Side, VoteStore

REPLIES = 1000
"""Replies that Gradio runs at once: so many that the server's own limits, which answer politely, are reached first."""

EVENTS = 32
"""Of each event that is over at once."""

# For events that write a reply, and for those that are over at once.
STREAMING: dict[str, Any] = {
    "concurrency_id": "replies",
    "concurrency_limit": REPLIES,
    "show_progress": "hidden",
    "api_visibility": "private",
}
QUICK: dict[str, Any] = {"concurrency_limit": EVENTS, "show_progress": "hidden", "api_visibility": "private"}
# What changed while the page was being drawn anew is drawn after that; else the click would count for nothing.
REFRESH: dict[str, Any] = {**QUICK, "trigger_mode": "always_last"}


@dataclass(frozen=True)
class Look:
    """What a page draws at its load and when the server has changed; `app` draws all pages in one event."""

    draw: Callable[..., Awaitable[dict[Any, Any]]]
    """Gets the request and then the inputs' values; returns updates by component."""

    inputs: Sequence[Any] = ()
    outputs: Sequence[Any] = ()

    then: Callable[[Callable[..., Any]], Any] = lambda when: None
    """Attaches what comes after it, in an event of its own, which sees what is chosen by then."""


@dataclass(frozen=True)
class Parts:
    """Handed to each page when it is built."""

    gateway: Gateway
    fleet: Fleet
    votes: VoteStore
    metrics: Metrics
    base: Base
    base_text: str
    """What the panel says about the base, a paragraph per line."""

    max_model_len: int
    """Tokens of context; bounds the length of a reply."""

    who: Callable[[gr.Request], str]
    """The opaque id of the person behind a request: votes are theirs, and limits count by it."""

    may_manage: Callable[[gr.Request], bool] = lambda request: True
    """Whether that person may pin, retire and set the default."""

    def adapter(self, ref: str) -> Adapter | None:
        """None for the base, and for what has gone."""
        version = self.fleet.get(ref)
        return version.adapter if version else None

    def label(self, ref: str) -> str:
        """`support@v2 · DPO`, or the base's."""
        if ref == self.fleet.base_name:
            return cards.BASE
        adapter = self.adapter(ref)
        return f"{ref} · {adapter.card.algorithm.upper()}" if adapter else ref

    def card(self, ref: str) -> str:
        """The panel beside a conversation."""
        if ref == self.fleet.base_name:
            return cards.base_card(cards.BASE, self.base_text)
        adapter = self.adapter(ref)
        return cards.adapter_card(adapter) if adapter else ""

    def choices(self, *keep: str) -> list[tuple[str, str]]:
        """(label, full name) of every model that can be asked, the default first; `keep` stay in it though gone."""
        refs = [version.ref for version in self.fleet.askable()] + [self.fleet.base_name]
        first = self.fleet.default
        ordered = [first, *(ref for ref in refs if ref != first), *(ref for ref in keep if ref and ref not in refs)]
        newest_only = {ref for ref in refs if self.fleet.newer(ref) is None}
        return [(self.label(ref) + ("" if ref in newest_only else " (older)"), ref) for ref in dict.fromkeys(ordered)]

    def hash_of(self, ref: str) -> str:
        """Of the weights that answer under this full name now: another folder may take it later. Empty: unknown."""
        if ref == self.fleet.base_name:
            return self.base.hash
        adapter = self.adapter(ref)
        return adapter.card.weights_sha256 if adapter else ""


def as_side(ref: str, weights: str, reply: str) -> Side:
    """A reply as it goes into a ballot; `weights` is `Parts.hash_of` as the reply began.

    Raises:
        UserError: it is not known which weights answered.
    """
    if not weights:
        raise UserError(f"Nothing was stored: it is not known which weights of {ref} gave this reply. Ask again.")
    return Side(ref, weights, reply)


def room_for_all() -> None:
    """Give the Blocks that are open workers for every reply and, beside them, for what is over at once.

    Without it Gradio runs 40 events in all, and so many long replies would hold up every button.
    """
    if Context.root_block is not None:
        Context.root_block.max_threads = REPLIES + 8 * EVENTS


def how_it_went(timing: Timing | None, reason: str) -> str:
    """The line under a reply, after who wrote it."""
    parts = []
    if timing is not None:
        parts.append(f"{timing.ttft_s:.2f} s to first token")
        if timing.tokens_per_s:  # a single token has no rate
            parts.append(f"{timing.tokens_per_s:.0f} tokens/s")
    if reason == "length":
        parts.append("cut at the longest reply allowed")
    return " · ".join(parts)


def notice(text: str, kind: str = "error") -> Any:
    """A line above the box to write in: an `error`, or a `note`. Empty text hides it."""
    role = "alert" if kind == "error" else "status"
    return gr.update(value=f"<p role='{role}'>{html.escape(text)}</p>" if text else "", visible=bool(text))


def told(error: Exception) -> str:
    """What went wrong, for the person at the page."""
    return str(error) if isinstance(error, UserError) else "That failed; the server's log says why."
