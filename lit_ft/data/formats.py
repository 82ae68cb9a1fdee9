"""The shapes in which people keep conversations and preferences, each turned into one record.

A new format is one function and one line in `SFT_FORMATS` or `PREFERENCE_FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, str]
Text = list[Message] | str
Kind = Literal["sft", "preference"]

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "prompter": "user"}
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class RowError(ValueError):
    """A row that cannot be used; its text is the reason under which it is counted."""


@dataclass(frozen=True)
class Record:
    """A prompt (messages, or plain text) and its completions, the preferred one first.

    A conversation has an empty prompt and is itself the one completion: its assistant turns are trained on.
    """

    prompt: Text
    completions: tuple[Text, ...]


@dataclass(frozen=True)
class Format:
    """A known shape: its name, the keys that mark it, and its reader (which raises RowError)."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Record]


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
        out.append({"role": _ROLES.get(role, role), "content": content})
    return out


def _text(value: Any) -> Text:
    """A string as it is, or messages."""
    return value if isinstance(value, str) else messages_of(value)


def _answer(value: Any) -> Text:
    answer = _text(value)
    if not answer or (isinstance(answer, str) and not answer.strip()):
        raise RowError("empty answer")
    return answer


def _conversation(row: Mapping[str, Any], key: str) -> Record:
    messages = messages_of(row[key])
    if isinstance(system := row.get("system"), str) and system and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise RowError("no assistant turn")
    return Record([], (messages,))


def _alpaca_prompt(row: Mapping[str, Any]) -> list[Message]:
    question = "\n".join(part for part in (row.get("instruction"), row.get("input")) if part)
    if not question.strip():
        raise RowError("empty instruction")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for asked, answered in row.get("history") or []:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}]


def _alpaca(row: Mapping[str, Any]) -> Record:
    answer = _answer(row["output"])
    return Record(_alpaca_prompt(row), (answer,))


def _prompt_completion(row: Mapping[str, Any]) -> Record:
    return Record(_text(row["prompt"]), (_answer(row["completion"]),))


def _plain(row: Mapping[str, Any]) -> Record:
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise RowError("empty text")
    return Record("", (row["text"],))


def _differ(record: Record) -> Record:
    if record.completions[0] == record.completions[1]:
        raise RowError("chosen equals rejected")
    return record


def _preference(row: Mapping[str, Any]) -> Record:
    return _differ(Record(_text(row["prompt"]), (_answer(row["chosen"]), _answer(row["rejected"]))))


def _sharegpt_preference(row: Mapping[str, Any]) -> Record:
    prompt = messages_of(row["conversations"])
    return _differ(Record(prompt, (_answer(row["chosen"]), _answer(row["rejected"]))))


def _implicit_prompt(row: Mapping[str, Any]) -> Record:
    """The prompt is what `chosen` and `rejected` have in common (TRL's `extract_prompt`)."""
    from trl.data_utils import extract_prompt

    chosen, rejected = _answer(row["chosen"]), _answer(row["rejected"])
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
    return _differ(Record(found["prompt"], (_answer(found["chosen"]), _answer(found["rejected"]))))


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
    Format("implicit prompt", ("chosen", "rejected"), _implicit_prompt),
)


def formats(kind: Kind) -> tuple[Format, ...]:
    """The formats that serve `kind`, in the order in which they are tried."""
    return SFT_FORMATS if kind == "sft" else PREFERENCE_FORMATS


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
        if all(row.get(key) is not None for key in known.keys):
            return known.read(row)
    return None
