"""One conversation: what was said, by which model and how fast; what the engine gets of it and what the page shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serve.votes import Sampling


@dataclass(frozen=True)
class Origin:
    """How a reply came to be: what a vote on it records."""

    ref: str
    hash: str
    """Of the weights that had this name as the reply began; empty: unknown."""

    prompt: Sequence[dict[str, str]]
    """As the engine got it: replies before it may have been edited since."""

    sampling: Sampling


@dataclass(frozen=True)
class Message:
    """One turn, exactly as typed or as streamed. The page's widget reformats text, so it is never read back."""

    role: Literal["user", "assistant"]
    text: str
    label: str = ""
    """Who wrote it, for the line under a reply."""

    note: str = ""
    """How it went ('0.41 s to first token · 38 tokens/s'), for the same line."""

    origin: Origin | None = None
    streamed: str | None = None
    """The whole reply as the model wrote it, once it is whole; `text` may have been edited since."""

    ballot: str = ""
    """Of a thumb up or down, once there is one."""


def for_engine(system: str, history: Sequence[Message]) -> list[dict[str, str]]:
    """The request's messages: roles and raw text, nothing that the page adds."""
    messages = [{"role": "system", "content": system}] if system.strip() else []
    return messages + [{"role": message.role, "content": message.text} for message in history]


def for_page(history: Sequence[Message]) -> list[dict[str, Any]]:
    """The widget's value: one entry for each message, so that its indices are ours."""
    return [{"role": message.role, "content": _content(message)} for message in history]


def up_to_question(history: Sequence[Message], index: int) -> tuple[list[Message], str] | None:
    """What came before the question at or before `index`, and the question; None where there is none."""
    for i in range(min(index, len(history) - 1), -1, -1):
        if history[i].role == "user":
            return list(history[:i]), history[i].text
    return None


def _content(message: Message) -> list[dict[str, str]]:
    # A dict of type text is shown as it is; a bare string would be dedented first.
    parts = [{"type": "text", "text": literal(message.text)}]
    if message.role == "assistant":
        # A part of its own: a code fence that the reply leaves open cannot swallow it.
        # Plain text, since it goes along when the reply is copied; page.css makes it small.
        parts.append({"type": "text", "text": " · ".join(part for part in (message.label, message.note) if part)})
    return parts


def literal(text: str) -> str:
    """Markdown that shows tags as they were written: the widget would run or drop them. A picture becomes a link.

    A picture would be fetched from wherever the model says, which tells its host who reads and what was said.
    """
    # Only what Markdown would take for a tag or an entity: `a < b` stays readable where it is edited or copied.
    return _outside_code(text, lambda part: _TAG.sub("&lt;", _ENTITY.sub("&amp;", part)).replace("![", "&#33;["))


def as_typed(text: str) -> str:
    """The inverse of `literal`: what a person meant by text that the widget gave them to edit."""
    return _outside_code(text, lambda part: part.replace("&#33;[", "![").replace("&lt;", "<").replace("&amp;", "&"))


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """Apply `change` to all but fenced blocks and inline code, which Markdown escapes by itself."""
    lines: list[str] = []
    fence = ""
    for line in text.split("\n"):
        opening = _FENCE.match(line)
        if fence:
            if opening and opening[1].startswith(fence) and not opening[2].strip():
                fence = ""
            lines.append(line)
        elif opening and not (opening[1][0] == "`" and "`" in opening[2]):
            fence = opening[1]
            lines.append(line)
        else:
            lines.append(_PIECE.sub(lambda piece: piece["span"] or change(piece[0]), line))
    return "\n".join(lines)


_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_PIECE = re.compile(r"(?P<span>(?<!`)(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`))|[^`]+|`+")
