"""Token ids and the mask of what is trained on, made together so that they cannot drift apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError, TemplateSyntaxError

from lit_ft.batches import Completion, Example
from lit_ft.data.formats import Message, Record, RowError, Text
from lit_ft.errors import UserError

TrainOn = Literal["assistant", "all"]
TEMPLATES = Path(__file__).with_name("templates")


class _Ids:
    """Ids and mask under construction; `add` is the only way in."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.mask: list[bool] = []

    def add(self, ids: Sequence[int], trained: bool) -> None:
        self.ids.extend(ids)
        self.mask.extend([trained] * len(ids))


def set_chat_template(tokenizer: Any, template: str | None) -> None:
    """Give `tokenizer` the template named (`chatml`, `plain`) or in the file given; None leaves its own.

    Raises:
        UserError: there is no such template or file.
    """
    if template is None:
        return
    path = TEMPLATES / f"{template}.jinja"
    path = path if path.is_file() else Path(template).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise UserError(f"data.chat_template={template}: no such file, and not one of the built-in ones ({names}).")
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template={template}: {path} cannot be read ({error}).") from error


class ChatEncoder:
    """Turns records into examples for one tokenizer.

    Prompt and answer are tokenized apart, since that is how they meet when the model is used: the prompt is there
    before the first token of the answer exists. The end-of-sequence token of each answer is trained on; what a
    template writes after it (a line break, mostly) is not.

    Args:
        tokenizer: any Hugging Face tokenizer.
        train_on: `assistant` trains on assistant turns, `all` on every token.
        as_chat: whether plain strings are a user's and an assistant's turn (True), or text as it is, with the
            end-of-sequence token after the answer (False, as TRL does). None: True if there is a chat template.
    """

    def __init__(self, tokenizer: Any, train_on: TrainOn = "assistant", as_chat: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.as_chat = bool(tokenizer.chat_template) if as_chat is None else as_chat
        if tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-sequence token, so a model could never learn to stop.")
        self._template: str | None = None
        self._template = self._training_template() if tokenizer.chat_template else None

    def _training_template(self) -> str | None:
        """TRL's version of a known template that rewrites earlier turns (Qwen3 drops their thoughts), else None."""
        asked: list[Message] = [{"role": "user", "content": "a"}]
        answered: list[Message] = [*asked, {"role": "assistant", "content": "b"}]
        try:
            if self._render([*answered, *asked], True).startswith(self._render(answered, False)):
                return None
            from trl.chat_template_utils import get_training_chat_template

            return get_training_chat_template(self.tokenizer)
        except (RowError, UserError, ValueError):  # unknown to TRL, or faulty: said where a row needs it
            return None

    def encode(self, record: Record, index: int = 0) -> Example:
        """The example of one record.

        Raises:
            RowError: nothing in it (or in one of its completions) is trained on, or the chat template refuses it.
            UserError: it holds messages and the tokenizer has no chat template, or one that rewrites earlier turns.
        """
        prompt, completions = record.prompt, record.completions
        if isinstance(prompt, list) and not prompt and len(completions) == 1:
            example = self._conversation(completions[0], index)
        elif self.as_chat and (isinstance(prompt, list) or prompt):
            example = self._chat(prompt, completions, index)
        elif isinstance(prompt, str) and all(isinstance(c, str) for c in completions):
            example = self._text(prompt, [str(c) for c in completions], index)
        else:
            example = self._chat(prompt, completions, index)
        if not all(replace(example, completions=(completion,)).targets for completion in example.completions):
            raise RowError("nothing to train on")
        return example if record.margin is None else replace(example, margin=record.margin)

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, prompt: str, completions: Sequence[str], index: int) -> Example:
        # With special tokens: where a tokenizer begins every text with one, so does this.
        prompt_ids = list(self.tokenizer(prompt)["input_ids"]) if prompt else []
        if prompt_ids and prompt_ids[-1] == self.tokenizer.eos_token_id:
            prompt_ids.pop()  # some tokenizers end every text, but the answer is still to come
        encoded = []
        for completion in completions:
            ids = self._tokenize(completion) if prompt_ids else list(self.tokenizer(completion)["input_ids"])
            if not ids or ids[-1] != self.tokenizer.eos_token_id:
                ids.append(self.tokenizer.eos_token_id)
            encoded.append(Completion(tuple(ids), (True,) * len(ids)))
        if not prompt_ids and len(encoded) == 1:
            # The first token has nothing before it that could predict it: it is the prompt.
            only = encoded[0]
            return Example(only.ids[:1], (Completion(only.ids[1:], only.mask[1:]),), index)
        if self.train_on == "all" and len(encoded) == 1:
            whole = Completion(tuple(prompt_ids) + encoded[0].ids, (True,) * (len(prompt_ids) + len(encoded[0].ids)))
            return Example(whole.ids[:1], (Completion(whole.ids[1:], whole.mask[1:]),), index)
        return Example(tuple(prompt_ids), tuple(encoded), index)

    def _chat(self, prompt: Text, completions: Sequence[Text], index: int) -> Example:
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not before or before[-1]["role"] == "assistant":
            raise RowError("the prompt does not end with a user's turn")
        if self.train_on == "all" and len(completions) == 1:
            return self._conversation([*before, *_turns(completions[0])], index)
        prompt_ids = self._tokenize(self._render(before, True))
        encoded = []
        for completion in completions:
            whole = self._segments([*before, *_turns(completion)], skip=len(before))
            encoded.append(Completion(tuple(whole.ids), tuple(whole.mask)))
        return Example(tuple(prompt_ids), tuple(encoded), index)

    def _conversation(self, messages: Text, index: int) -> Example:
        if isinstance(messages, str):
            return self._text("", [messages], index)
        whole = self._segments(messages, skip=0)
        if self.train_on == "all":
            whole.mask = [True] * len(whole.mask)
        if True not in whole.mask:
            raise RowError("no assistant turn")
        first = max(whole.mask.index(True), 1)
        return Example(
            tuple(whole.ids[:first]), (Completion(tuple(whole.ids[first:]), tuple(whole.mask[first:])),), index
        )

    def _segments(self, messages: Sequence[Message], skip: int) -> _Ids:
        """Ids of the turns from `skip` to the last answer; those before are the prompt, which ends with its opening."""
        out = _Ids()
        last = max((k for k, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        done = self._render(messages[:skip], True) if skip else ""
        for k in range(skip, last + 1):
            if messages[k]["role"] != "assistant":
                continue
            answered = self._render(messages[: k + 1], False)
            opening = self._render(messages[:k], True) if k else self._first_opening(answered)
            if not opening.startswith(done) or not answered.startswith(opening):
                raise UserError(
                    "The tokenizer's chat template writes an earlier turn differently once a later one follows, so "
                    "the trained part of a conversation cannot be told apart. Give a template that does not with "
                    "data.chat_template=FILE, or chatml."
                )
            if len(opening) > len(done):
                out.add(self._tokenize(opening[len(done) :]), False)
            answer = self._tokenize(answered[len(opening) :])
            final = k == last
            end = _last_index(answer, self.tokenizer.eos_token_id)
            if end is None and final:
                answer, end = [*answer, self.tokenizer.eos_token_id], len(answer)
            end = len(answer) - 1 if end is None else end
            out.add(answer[: end + 1], True)
            if not final:
                out.add(answer[end + 1 :], False)
            done = answered
        return out

    def _render(self, messages: Sequence[Message], opening: bool) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                "The data holds conversations, but the model's tokenizer has no chat template. Choose one with "
                "data.chat_template=chatml (or plain, or a Jinja file), or give data as prompt and completion strings."
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=opening, chat_template=self._template
                )
            )
        except TemplateSyntaxError as error:
            raise UserError(f"The chat template has a mistake in line {error.lineno}: {error.message}.") from error
        except TemplateError as error:
            # Templates refuse what their models were not trained on: a system's turn, two user's turns in a row.
            raise RowError(f"refused by the chat template ({error})") from error

    def _first_opening(self, answered: str) -> str:
        """What stands before the answer in a conversation that the assistant begins, such as with a greeting."""
        asked: list[Message] = [{"role": "user", "content": "?"}]
        header = self._render(asked, True).removeprefix(self._render(asked, False))
        if not header or header not in answered:
            raise RowError("begun by the assistant, which the chat template does not mark")
        return answered[: answered.index(header) + len(header)]


def _turns(completion: Text) -> list[Message]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _last_index(ids: Sequence[int], wanted: int) -> int | None:
    return next((k for k in range(len(ids) - 1, -1, -1) if ids[k] == wanted), None)


def show(tokenizer: Any, example: Example) -> str:
    """The example as text, the trained part between ⟦ and ⟧."""
    pieces = [tokenizer.decode(example.prompt)]
    for completion in example.completions:
        start = 0
        for k in range(1, len(completion.ids) + 1):
            if k == len(completion.ids) or completion.mask[k] != completion.mask[start]:
                text = tokenizer.decode(completion.ids[start:k])
                pieces.append(f"⟦{text}⟧" if completion.mask[start] else text)
                start = k
    return "".join(pieces)
