"""What the pages stand on, and what they say of models: labels, cards, choices for a list."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lit_ft.adapter import Adapter
from serve import cards
from serve.base import Base
from serve.fleet import Fleet
from serve.gateway import Gateway
from serve.metrics import Metrics
from serve.votes import Side, VoteStore

STREAMS = 32
"""Replies that Gradio runs at once; the limits of the server come on top."""

# For events that write a reply, and for those that are over at once.
STREAMING: dict[str, Any] = {
    "concurrency_id": "replies",
    "concurrency_limit": STREAMS,
    "show_progress": "hidden",
    "api_visibility": "private",
}
QUICK: dict[str, Any] = {"concurrency_limit": STREAMS, "show_progress": "hidden", "api_visibility": "private"}


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

    def side(self, ref: str, reply: str) -> Side:
        """A reply as it goes into a ballot."""
        adapter = self.adapter(ref)
        return Side(ref, adapter.card.weights_sha256 if adapter else self.base.hash, reply)


def notice(text: str, kind: str = "error") -> Any:
    """A line above the box to write in: an `error`, or a `note`. Empty text hides it."""
    role = "alert" if kind == "error" else "status"
    return gr.update(value=f"<p role='{role}'>{html.escape(text)}</p>" if text else "", visible=bool(text))


def told(error: Exception) -> str:
    """What went wrong, for the person at the page."""
    from lit_ft.errors import UserError

    return str(error) if isinstance(error, UserError) else "That failed; the server's log says why."
