"""The shapes in which people keep conversations and preferences, each turned into one record.

A new format is one function and one line in `SFT_FORMATS`, `PREFERENCE_FORMATS`, `RANKED_FORMATS` or `PROMPT_FORMATS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Message = dict[str, str]
Text = list[Message] | str
# What rows are to give: an answer, a pair, two or more answers with the best first, or a question alone.
Kind = Literal["sft", "preference", "ranked", "prompt"]

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "prompter": "user"}
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class RowError(ValueError):
    """A row that cannot be used; its text is the reason under which it is counted."""


@dataclass(frozen=True)
class Record:
    """A prompt (messages, or plain text) and its completions, the preferred one first.

    A conversation has an empty prompt and is itself the one completion: its assistant turns are trained on. `margin` is
    by how much the preferred completion should win.
    """

    prompt: Text
    completions: tuple[Text, ...]
    margin: float | None = None


@dataclass(frozen=True)
class Format:
    """A known shape: its name, the keys that mark it, and its reader (which raises RowError)."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Record]


def _absent(value: Any) -> bool:
    """None, and the NaN that pandas puts where there is no value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{what} is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON's escapes can spell half of a character
        raise RowError(f"{what} is not Unicode text") from error
    return value


def _optional(row: Mapping[str, Any], key: str) -> str:
    return "" if _absent(row.get(key)) else _string(row[key], key)


def messages_of(value: Any) -> list[Message]:
    """Messages in OpenAI's (`role`, `content`) or ShareGPT's (`from`, `value`) form, roles made uniform."""
    found = [value] if isinstance(value, Mapping) else value
    if not isinstance(found, list) or not all(isinstance(m, Mapping) for m in found):
        raise RowError("messages are not a list of objects")
    out = []
    for message in found:
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowError("a message without role and text")
        out.append({"role": _ROLES.get(role, role), "content": _string(content, "a message")})
    return out


def _text(value: Any, what: str) -> Text:
    """A string as it is, or messages."""
    return messages_of(value) if isinstance(value, (list, Mapping)) else _string(value, what)


def _answered(text: Text) -> bool:
    if isinstance(text, str):
        return bool(text.strip())
    return any(message["role"] == "assistant" and message["content"].strip() for message in text)


def _answer(value: Any, what: str) -> Text:
    answer = _text(value, what)
    if not _answered(answer):
        raise RowError("empty answer")
    return answer


def _record(prompt: Text, *completions: Text) -> Record:
    """The record of a prompt and its answers; raises RowError where they cannot follow each other."""
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise RowError("empty prompt")
    for completion in completions:
        if not isinstance(completion, str) and completion[0]["role"] != "assistant":
            raise RowError("the answer does not begin with the assistant's turn")
    if len(completions) > 1 and completions[0] == completions[1]:
        raise RowError("chosen equals rejected")
    return Record(prompt, completions)


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """`messages` after the system prompt of the column `system`, unless they have their own."""
    system = _optional(row, "system")
    if system and messages and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _conversation(row: Mapping[str, Any], key: str) -> Record:
    messages = messages_of(row[key])
    if not _answered(messages):
        raise RowError("no assistant turn")
    return Record([], (_with_system(row, messages),))


def _alpaca_prompt(row: Mapping[str, Any]) -> list[Message]:
    question = "\n".join(part for key in ("instruction", "input") if (part := _optional(row, key)))
    if not question.strip():
        raise RowError("empty prompt")
    messages: list[Message] = []
    history = [] if _absent(row.get("history")) else row["history"] or []
    if not isinstance(history, list) or not all(isinstance(t, (list, tuple)) and len(t) == 2 for t in history):
        raise RowError("history is not a list of questions with answers")
    for asked, answered in history:
        messages.append({"role": "user", "content": _string(asked, "history")})
        messages.append({"role": "assistant", "content": _string(answered, "history")})
    return _with_system(row, [*messages, {"role": "user", "content": question}])


def _alpaca(row: Mapping[str, Any]) -> Record:
    return _record(_alpaca_prompt(row), _answer(row["output"], "output"))


def _prompt_completion(row: Mapping[str, Any]) -> Record:
    return _record(_text(row["prompt"], "prompt"), _answer(row["completion"], "completion"))


def _plain(row: Mapping[str, Any]) -> Record:
    text = _string(row["text"], "text")
    if not text.strip():
        raise RowError("empty text")
    return Record("", (text,))


def _pair(row: Mapping[str, Any]) -> tuple[Text, Text]:
    return _answer(row["chosen"], "chosen"), _answer(row["rejected"], "rejected")


def _preference(row: Mapping[str, Any]) -> Record:
    chosen, rejected = _pair(row)
    if isinstance(chosen, list) and chosen[0]["role"] != "assistant":
        return _implicit_prompt(row)  # whole conversations, beside which `prompt` says the question again
    return _record(_text(row["prompt"], "prompt"), chosen, rejected)


def _alpaca_preference(row: Mapping[str, Any]) -> Record:
    return _record(_alpaca_prompt(row), *_pair(row))


def _sharegpt_preference(row: Mapping[str, Any]) -> Record:
    return _record(_with_system(row, messages_of(row["conversations"])), *_pair(row))


def _implicit_prompt(row: Mapping[str, Any]) -> Record:
    """The prompt is what `chosen` and `rejected` have in common (TRL's `extract_prompt`)."""
    from trl.data_utils import extract_prompt

    chosen, rejected = _pair(row)
    if isinstance(chosen, str) and isinstance(rejected, str) and _HUMAN in chosen and _ASSISTANT in chosen:
        chosen, rejected = transcript(chosen), transcript(rejected)
    if type(chosen) is not type(rejected) or chosen == rejected:
        raise RowError("chosen equals rejected" if chosen == rejected else "chosen and rejected differ in kind")
    if isinstance(chosen, list):
        shortest = min(len(chosen), len(rejected))
        if chosen[:shortest] == rejected[:shortest]:
            raise RowError("one of chosen and rejected is a part of the other")
    found = extract_prompt({"chosen": chosen, "rejected": rejected})
    if not found["prompt"]:
        raise RowError("chosen and rejected have no prompt in common")
    return _record(found["prompt"], *_pair(found))


def _ranked(row: Mapping[str, Any]) -> Record:
    """Two or more answers, the best first."""
    answers = row["completions"]
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowError("completions are not a list of two answers or more")
    found = [_answer(answer, "an answer") for answer in answers]
    if any(one == other for k, one in enumerate(found) for other in found[:k]):
        raise RowError("with two equal answers")
    return _record(_text(row["prompt"], "prompt"), *found)


def _last_question(row: Mapping[str, Any], key: str) -> Record:
    """A conversation up to its last question."""
    messages = _with_system(row, messages_of(row[key]))
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return _record(messages)


def _margin(row: Mapping[str, Any]) -> float | None:
    """The column `margin`, as TRL's reward trainer reads it."""
    value = row.get("margin")
    if _absent(value):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RowError("margin is not a number")
    return float(value)


def transcript(text: str) -> list[Message]:
    r"""Messages of a transcript of the form ``\n\nHuman: … \n\nAssistant: …`` (Anthropic's hh-rlhf)."""
    messages = []
    rest = text if text.startswith("\n\n") else "\n\n" + text
    while rest:
        mark, role = (_HUMAN, "user") if rest.startswith(_HUMAN) else (_ASSISTANT, "assistant")
        if not rest.startswith(mark):
            raise RowError("a transcript that does not begin with Human: or Assistant:")
        rest = rest[len(mark) :]
        ends = [end for end in (rest.find(_HUMAN), rest.find(_ASSISTANT)) if end >= 0]
        end = min(ends, default=len(rest))
        messages.append({"role": role, "content": rest[:end].strip()})
        rest = rest[end:]
    return messages


SFT_FORMATS = (
    Format("messages", ("messages",), lambda row: _conversation(row, "messages")),
    Format("sharegpt", ("conversations",), lambda row: _conversation(row, "conversations")),
    Format("alpaca", ("instruction", "output"), _alpaca),
    Format("prompt-completion", ("prompt", "completion"), _prompt_completion),
    Format("text", ("text",), _plain),
)
PREFERENCE_FORMATS = (
    Format("sharegpt preference", ("conversations", "chosen", "rejected"), _sharegpt_preference),
    Format("preference", ("prompt", "chosen", "rejected"), _preference),
    Format("alpaca preference", ("instruction", "chosen", "rejected"), _alpaca_preference),
    Format("implicit prompt", ("chosen", "rejected"), _implicit_prompt),
)


RANKED_FORMATS = (Format("ranked", ("prompt", "completions"), _ranked), *PREFERENCE_FORMATS)
PROMPT_FORMATS = (
    Format("prompt", ("prompt",), lambda row: _record(_text(row["prompt"], "prompt"))),
    Format("alpaca", ("instruction",), lambda row: _record(_alpaca_prompt(row))),
    Format("messages", ("messages",), lambda row: _last_question(row, "messages")),
    Format("sharegpt", ("conversations",), lambda row: _last_question(row, "conversations")),
    Format("implicit prompt", ("chosen", "rejected"), lambda row: Record(_implicit_prompt(row).prompt, ())),
)
FORMATS: dict[Kind, tuple[Format, ...]] = {
    "sft": SFT_FORMATS,
    "preference": PREFERENCE_FORMATS,
    "ranked": RANKED_FORMATS,
    "prompt": PROMPT_FORMATS,
}


def formats(kind: Kind) -> tuple[Format, ...]:
    """The formats that serve `kind`, in the order in which they are tried."""
    return FORMATS[kind]


def to_record(row: Mapping[str, Any], kind: Kind, columns: Mapping[str, str] | None = None) -> Record | None:
    """Read a row in the first format whose keys it has, or None if it has none's.

    Args:
        row: the row as read.
        kind: what it is to train.
        columns: for custom names, from the name expected here to the name in the data: `{"prompt": "question"}`.

    Raises:
        RowError: the keys are there but the row cannot be used.
    """
    if columns:
        row = {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}
    for known in formats(kind):
        if not any(_absent(row.get(key)) for key in known.keys):
            record = known.read(row)
            return replace(record, margin=_margin(row)) if kind == "ranked" else record
    for known in formats(kind):
        if all(key in row for key in known.keys):
            raise RowError(f"without a value in {', '.join(key for key in known.keys if _absent(row[key]))}")
    return None
