"""The chat page without a browser: what the engine gets, what is shown of it, what becomes a vote, who answers next."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from lit_ft.errors import UserError
from serve.conversation import Message, as_typed, for_engine, for_page, literal, up_to_question
from serve.limits import Limits
from serve.pages import chat
from serve.pages.parts import Parts
from serve.stopping import Stop, until
from tests.serve.page_parts import REMOVED, VOTER, made, passed, removed, with_weights
from tests.serve.published import BASE_HASH, adapter
from tests.serve.stub_engine import Stub, running

CHOSEN: dict[str, Any] = {
    "model": "support@v1",
    "system": "",
    "temperature": 0.7,
    "top_p": 0.9,
    "max_tokens": 50,
    "seed": "",
}
TALK = [
    Message("user", "  indented\n  text "),
    Message("assistant", "a <b>reply</b>", "support@v1 · SFT", "0.10 s to first token"),
    Message("user", "and <i>then</i>?"),
]
SKIPPED = {"__type__": "update"}


@pytest.fixture(scope="module")
def running_stub() -> Iterator[Stub]:
    with running(["base", "support@v1", "support@v2"], max_model_len=60) as stub:
        yield stub


@pytest.fixture
def stub(running_stub: Stub) -> Stub:
    running_stub.delay_s, running_stub.reply = 0.0, None
    return running_stub


@pytest.fixture
def parts(stub: Stub, tmp_path: Path) -> Parts:
    return made(tmp_path, stub, [adapter(tmp_path / "adapters")], max_model_len=60)


def run(task: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(task, 30))


def reply(parts: Parts, asked: list[Message], **settings: Any) -> list[list[Message]]:
    """Every state that the page would draw."""

    async def collect() -> list[list[Message]]:
        growing = chat.replies(parts, VOTER, asked, **{**CHOSEN, **settings})
        async with aclosing(growing) as states:
            return [state async for state in states]

    return run(collect())


class Session:
    """One person at the page: its events are called as the page calls them, and what they return is kept."""

    def __init__(self, parts: Parts) -> None:
        with gr.Blocks() as page:
            chat.build(parts)
        self.events: dict[str, Any] = {e.fn.__name__: e.fn for e in page.fns.values() if e.fn is not None}
        self.page = page
        self.stop = Stop()
        self.said: list[Message] = []
        self.line = self.box = ""
        self.model: Any = None
        self.picked = False
        self.choices: list[tuple[str, str]] = []
        self.card = self.newer = ""

    async def send(self, text: str, **settings: Any) -> None:
        await self._ask("on_send", text, **settings)

    async def retry(self, index: int, **settings: Any) -> None:
        await self._ask("on_retry", SimpleNamespace(index=index), **settings)

    async def edit(self, index: int, text: str, *, previous: str | None = None, **settings: Any) -> None:
        previous = literal(self.said[index].text) if previous is None else previous
        data = SimpleNamespace(index=index, value=text, previous_value=previous)
        await self._ask("on_edit", data, **settings)

    async def like(self, index: Any, liked: Any) -> None:
        said, line = await self.events["on_like"](SimpleNamespace(index=index, liked=liked), None, self.said)
        self.said = self.said if said == SKIPPED else said
        self._told(line)

    async def refresh(self) -> None:
        update = await self.events["on_refresh"](self.model, self.picked, self.said)
        self.choices, self.model = update["choices"], update.get("value", self.model)
        self.card, newer = await self.events["on_model"](self.model, self.said)
        self._newer(newer)

    async def pick(self, model: str) -> None:
        self.model, self.picked = model, True
        self.card, newer = await self.events["on_model"](model, self.said)
        self._newer(newer)

    def _newer(self, newer: dict[str, Any]) -> None:
        self.newer = newer["value"] if newer["visible"] else ""

    async def _ask(self, event: str, data: Any, **settings: Any) -> None:
        chosen = {**CHOSEN, **({"model": self.model} if self.model else {}), **settings}
        first = (None, data) if event == "on_send" else (data, None)
        async with aclosing(self.events[event](*first, self.stop, self.said, *chosen.values())) as updates:
            async for shown, said, box, line, *_ in updates:
                self.said = self.said if said == SKIPPED else said
                assert shown in (for_page(self.said), SKIPPED)
                self.box = self.box if box == SKIPPED else box
                self._told(line)

    def _told(self, line: dict[str, Any]) -> None:
        self.line = line.get("value", self.line)


# --- the conversation ---


def test_the_engine_gets_raw_text_and_nothing_of_the_page() -> None:
    assert for_engine("", TALK) == [
        {"role": "user", "content": "  indented\n  text "},
        {"role": "assistant", "content": "a <b>reply</b>"},
        {"role": "user", "content": "and <i>then</i>?"},
    ]


def test_a_system_prompt_goes_first_and_a_blank_one_nowhere() -> None:
    assert for_engine("Be kind.", TALK)[0] == {"role": "system", "content": "Be kind."}
    assert len(for_engine(" \n", TALK)) == len(TALK)


def test_the_page_shows_a_line_under_each_reply_as_a_part_of_its_own() -> None:
    shown = for_page(TALK)
    assert [len(message["content"]) for message in shown] == [1, 2, 1]
    assert shown[1]["content"][1]["text"] == "support@v1 · SFT · 0.10 s to first token"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a <b>x</b>", "a &lt;b>x&lt;/b>"),
        ("<script>alert(1)</script>", "&lt;script>alert(1)&lt;/script>"),
        ("<think>hm</think>", "&lt;think>hm&lt;/think>"),
        ("1 < 2 & 3", "1 < 2 & 3"),
        ("&lt; stays", "&amp;lt; stays"),
        ("`<b>` and <b>", "`<b>` and &lt;b>"),
        ("`` a`<b> `` <b>", "`` a`<b> `` &lt;b>"),
        ("` <b>", "` &lt;b>"),
        ("```html\n<b>\n```\n<b>", "```html\n<b>\n```\n&lt;b>"),
        ("~~~\n```\n<b>\n~~~\n<b>", "~~~\n```\n<b>\n~~~\n&lt;b>"),
        ("```\n<b> still open", "```\n<b> still open"),
        ("![a](https://x.example/y.png) `![b](c)`", "&#33;[a](https://x.example/y.png) `![b](c)`"),
        ("&#33;[a](b) ![", "&amp;#33;[a](b) &#33;["),
        ("", ""),
    ],
)
def test_tags_are_shown_not_run_and_code_is_left_alone(text: str, shown: str) -> None:
    assert literal(text) == shown
    assert as_typed(shown) == text


def test_the_question_to_ask_again() -> None:
    assert up_to_question(TALK, 2) == (TALK[:2], "and <i>then</i>?")
    assert up_to_question(TALK, 1) == ([], "  indented\n  text ")
    assert up_to_question(TALK, 99) == (TALK[:2], "and <i>then</i>?")
    assert up_to_question([], 0) is None


# --- a reply ---


def test_a_reply_grows_and_ends_with_its_speed(parts: Parts, stub: Stub) -> None:
    states = reply(parts, [Message("user", "where is my parcel?")])
    last = states[-1][-1]
    assert last.text == "I am support@v1. You wrote: where is my parcel?"
    assert last.label == "support@v1 · SFT"
    assert "s to first token" in last.note and "tokens/s" in last.note
    assert all(last.text.startswith(state[-1].text) for state in states)


def test_the_settings_reach_the_engine(parts: Parts, stub: Stub) -> None:
    asked = [*TALK[:2], Message("user", "go on")]
    reply(parts, asked, model="base", system="Be kind.", temperature=0.1, top_p=0.5, max_tokens=7.0, seed=" 42 ")
    sent = stub.requests[-1]
    assert sent["model"] == "base" and sent["messages"] == for_engine("Be kind.", asked)
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"], sent["seed"]) == (0.1, 0.5, 7, 42)


def test_without_a_seed_none_is_sent(parts: Parts, stub: Stub) -> None:
    reply(parts, TALK[:1])
    assert stub.requests[-1].get("seed") is None


def test_a_seed_that_is_no_number(parts: Parts, stub: Stub) -> None:
    with pytest.raises(UserError, match="'lucky' is not a whole number"):
        reply(parts, TALK[:1], seed="lucky")


def test_a_conversation_longer_than_the_context(parts: Parts, stub: Stub) -> None:
    with pytest.raises(UserError, match="60"):
        reply(parts, [Message("user", "word " * 100)])


def test_closing_a_reply_aborts_the_request(parts: Parts, stub: Stub) -> None:
    stub.delay_s, before = 0.1, stub.aborted

    async def leave() -> None:
        states = chat.replies(parts, VOTER, TALK[:1], **CHOSEN)
        async with aclosing(states):
            async for _ in states:
                break
        for _ in range(50):
            await asyncio.sleep(0.1)
            if stub.aborted > before:
                return

    run(leave())
    assert stub.aborted == before + 1


def test_what_is_streamed_is_kept_to_the_letter(parts: Parts, stub: Stub) -> None:
    stub.reply = "  <b>\x00\x1b[31m  \n\n ```\n\u202e " + "x" * 5000
    *growing, last = [state[-1] for state in reply(parts, TALK[:1], max_tokens=5000)]
    assert last.streamed == last.text == stub.reply
    assert all(state.streamed is None for state in growing), "only a whole reply can be judged"


# --- stopping ---


def test_until_ends_while_it_waits_and_closes_the_stream() -> None:
    closed: list[bool] = []

    async def slow() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await asyncio.sleep(60)
            yield 2
        finally:
            closed.append(True)

    async def main() -> list[int]:
        stop, seen = Stop(), []
        asyncio.get_running_loop().call_later(0.05, stop.ask)
        async with aclosing(until(slow(), stop.asked)) as items:
            async for item in items:
                seen.append(item)
        return seen

    assert asyncio.run(asyncio.wait_for(main(), 5)) == [1]
    assert closed == [True]


def test_until_passes_all_items_and_errors_on() -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        yield 2
        raise UserError("no")

    async def main() -> list[int]:
        seen: list[int] = []
        with pytest.raises(UserError, match="no"):
            async for item in until(failing(), asyncio.Event()):
                seen.append(item)
        return seen

    assert asyncio.run(main()) == [1, 2]


def test_a_new_reply_forgets_older_wishes() -> None:
    stop = Stop()
    stop.ask(typed="x", clear=True)
    assert asyncio.run(stop.begin())
    assert not stop.asked.is_set() and not stop.clear and stop.typed == ""


def test_one_reply_at_a_time_and_after_a_clear_the_next_waits_for_its_end() -> None:
    async def main() -> None:
        stop = Stop()
        assert await stop.begin()
        assert not await stop.begin()
        stop.ask(typed="x")  # ending, but its last words are to be written
        assert not await stop.begin()
        stop.ask(clear=True)
        begun = asyncio.ensure_future(stop.begin())
        await asyncio.sleep(0.01)
        assert not begun.done() and stop.asked.is_set()
        stop.end()
        assert await begun
        assert not stop.asked.is_set() and not await stop.begin()

    asyncio.run(asyncio.wait_for(main(), 5))


@pytest.mark.parametrize("other", ["on_send", "on_retry", "on_edit"])
def test_another_event_does_not_detach_the_reply_in_progress(parts: Parts, stub: Stub, other: str) -> None:
    events, chosen = Session(parts).events, ("base", "", 0.7, 0.9, 50, "")
    data: dict[str, tuple[Any, ...]] = {
        "on_send": (None, "More"),
        "on_retry": (SimpleNamespace(index=0), None),
        "on_edit": (SimpleNamespace(index=0, value="Other", previous_value="Hello"), None),
    }
    stub.delay_s, stub.reply, asked = 0.05, "a b c d e f g h " * 20, len(stub.requests)

    async def main() -> tuple[list[Any], list[Any]]:
        stop = Stop()
        running, meanwhile = [], []
        async with aclosing(events["on_send"](None, "Hello", stop, [], *chosen)) as updates:
            async for update in updates:
                running.append(update)
                said = update[1]
                if len(running) == 3:  # the third shows some of the reply
                    meanwhile = [one async for one in events[other](*data[other], stop, said, *chosen)]
                    stop.ask()  # and the one in progress can still be stopped
        return running, meanwhile

    running, meanwhile = run(main())
    assert len(stub.requests) == asked + 1, "nothing else was asked"
    assert running[-1][1][-1].note == "stopped"
    [update] = meanwhile
    assert update[0] == for_page(running[2][1]), "an edited message is shown as it was"
    assert all(value == SKIPPED for value in update[1:])


def test_after_a_reply_another_may_begin(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.send("One", model="base")
        await session.send("Two", model="base", seed="no number")  # this one fails
        assert [m.text for m in session.said] == ["One", "I am base. You wrote: One"]
        assert session.box == "Two" and "not a whole number" in session.line
        await session.send("Three", model="base")
        assert session.said[-1].text == "I am base. You wrote: Three" and session.line == ""

    run(main())


def test_limits_are_told_and_the_words_kept(stub: Stub, tmp_path: Path) -> None:
    parts = made(tmp_path, stub, limits=Limits(requests_per_minute=1))

    async def main() -> None:
        session = Session(parts)
        await session.send("One", model="base")
        await session.send("Two <b>", model="base")
        assert len(session.said) == 2 and session.box == "Two <b>" and "role='alert'" in session.line

    run(main())


# --- votes ---


def votes(parts: Parts, view: str) -> list[dict[str, Any]]:
    """What training would read, straight from the file."""
    with sqlite3.connect(parts.votes.path) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute(f"SELECT * FROM {view}")]


def ballots(parts: Parts) -> list[dict[str, Any]]:
    return votes(parts, "ballots")


def test_a_thumb_is_stored_with_what_was_asked_and_streamed(parts: Parts, stub: Stub) -> None:
    made_by = parts.adapter("support@v1")
    assert made_by is not None

    async def main() -> None:
        session = Session(parts)
        await session.send("First", system="Be kind.")
        stub.reply = "  raw <b>text</b>\n"
        settings = {"temperature": 0.25, "top_p": 0.5, "max_tokens": 33.0, "seed": "7"}
        await session.send("Second", system="Be kind.", **settings)
        await session.like(3, True)
        assert "role='status'" in session.line and "thumb up" in session.line

    run(main())
    [vote] = votes(parts, "unpaired_preferences")
    assert vote["completion"] == "  raw <b>text</b>\n" and vote["label"] == 1
    assert json.loads(vote["prompt"]) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": "I am support@v1. You wrote: First"},
        {"role": "user", "content": "Second"},
    ]
    assert (vote["ref"], vote["hash"]) == ("support@v1", made_by.card.weights_sha256)
    assert (vote["base_id"], vote["base_hash"], vote["voter"]) == ("bundled", BASE_HASH, VOTER)
    [ballot] = ballots(parts)
    assert json.loads(ballot["sampling"]) == {"temperature": 0.25, "top_p": 0.5, "max_tokens": 33, "seed": 7}
    assert ballot["kind"] == "thumbs" and not ballot["blind"] and len(ballot["id"]) >= 22
    assert b'lit_ft_votes_total{kind="thumbs",verdict="up"} 1.0' in parts.metrics.text()


@pytest.mark.parametrize("then", ["deleted", "published again"])
def test_a_vote_names_the_weights_that_answered_whatever_has_the_name_by_then(
    parts: Parts, tmp_path: Path, then: str
) -> None:
    version = parts.fleet.get("support@v1")
    assert version is not None and version.adapter is not None
    answered = version.adapter.card.weights_sha256

    async def main() -> None:
        session = Session(parts)
        await session.send("Hello")
        await parts.fleet.forget(version)
        if then == "published again":
            passed(parts.fleet, with_weights(adapter(tmp_path / "again"), "sha256:others"))
            assert parts.hash_of("support@v1") == "sha256:others"
        await session.like(1, True)
        await session.edit(1, "Better.")

    run(main())
    [thumb], [pair] = votes(parts, "unpaired_preferences"), votes(parts, "preference_pairs")
    assert thumb["hash"] == pair["rejected_hash"] == answered


def test_a_reply_of_unknown_weights_is_not_rated(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        session = Session(parts)
        with monkeypatch.context() as patch:
            patch.setattr(Parts, "adapter", lambda self, ref: None)
            await session.send("Hello")
        await session.like(1, True)
        assert "role='alert'" in session.line and "not known which weights" in session.line
        await session.edit(1, "Better.")
        assert "not known which weights" in session.line

    run(main())
    assert ballots(parts) == []


def test_an_account_that_was_removed_is_told_so(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.send("Hello")
        gone = Session(replace(parts, who=removed))
        gone.said = session.said
        await gone.like(1, True)
        assert REMOVED in gone.line and "role='alert'" in gone.line
        await gone.edit(1, "Better.")
        assert REMOVED in gone.line
        await gone.send("More")
        assert REMOVED in gone.line and gone.box == "More"

    run(main())
    assert ballots(parts) == []


def test_the_bases_reply_carries_the_bases_hash(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.send("Hello", model="base")
        await session.like(1, False)

    run(main())
    [vote] = votes(parts, "unpaired_preferences")
    assert (vote["ref"], vote["hash"], vote["label"]) == ("base", BASE_HASH, 0)


def test_a_thumb_counts_once_and_cannot_be_turned(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.send("Hello")
        await session.like(1, True)
        await session.like(1, True)
        assert "role='status'" in session.line, "the same again is the same vote"
        await session.like(1, False)
        assert "role='alert'" in session.line
        await session.like(1, "")  # the thumb is taken back on the page: the vote stays
        await session.like(1, None)

    run(main())
    assert [vote["label"] for vote in votes(parts, "unpaired_preferences")] == [1]
    assert b'lit_ft_votes_total{kind="thumbs",verdict="up"} 1.0' in parts.metrics.text()


def test_a_thumb_under_the_second_part_of_a_message_is_about_that_message(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.send("Hello")
        await session.like([1, 1], True)

    run(main())
    [vote] = votes(parts, "unpaired_preferences")
    assert vote["completion"] == "I am support@v1. You wrote: Hello"


@pytest.mark.parametrize("index", [0, 2, 99, -1])
def test_a_thumb_on_anything_else_is_none(parts: Parts, index: int) -> None:
    """The question, and places where nothing is: a request can be made by hand."""

    async def main() -> None:
        session = Session(parts)
        await session.send("Hello")
        await session.like(index, True)

    run(main())
    assert ballots(parts) == []


def test_a_stopped_reply_cannot_be_rated_nor_bettered(parts: Parts, stub: Stub) -> None:
    stub.delay_s, stub.reply = 0.05, "a b c d e f g h " * 20

    async def main() -> None:
        session = Session(parts)
        asyncio.get_running_loop().call_later(0.5, session.stop.ask)
        await session.send("Hello")
        assert session.said[-1].note == "stopped" and session.said[-1].streamed is None
        await session.like(1, True)
        assert "role='alert'" in session.line and "stopped before its end" in session.line
        text = session.said[1].text
        await session.edit(1, "A better one.")
        assert "role='alert'" in session.line and session.said[1].text == text

    run(main())
    assert ballots(parts) == []


def test_a_better_answer_is_preferred_over_the_models(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.send("Hello", system="Be kind.", seed="3")
        await session.edit(1, "A <b>better</b> one & `<i>`.")
        assert "role='status'" in session.line
        assert session.said[1].note == "edited by you"
        await session.send("And then?")

    run(main())
    [pair] = votes(parts, "preference_pairs")
    assert pair["chosen"] == "A <b>better</b> one & `<i>`." and pair["chosen_ref"] == "human"
    assert pair["rejected"] == "I am support@v1. You wrote: Hello" and pair["rejected_ref"] == "support@v1"
    assert pair["voter"] == VOTER and pair["kind"] == "edit" and pair["base_hash"] == BASE_HASH
    assert json.loads(pair["prompt"]) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
    ]
    assert json.loads(ballots(parts)[0]["sampling"])["seed"] == 3
    assert b'lit_ft_votes_total{kind="edit",verdict="right"} 1.0' in parts.metrics.text()


def test_the_conversation_goes_on_with_the_better_answer(parts: Parts, stub: Stub) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.send("Hello")
        await session.edit(1, "Better.")
        await session.send("And then?")

    run(main())
    assert [m["content"] for m in stub.requests[-1]["messages"]] == ["Hello", "Better.", "And then?"]


def test_a_second_edit_is_still_preferred_over_the_models_own(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.send("Hello")
        await session.edit(1, "Better.")
        await session.edit(1, "Best.")
        await session.edit(1, "Best.")  # the same again
        assert session.said[1].text == "Best."

    run(main())
    [pair] = votes(parts, "preference_pairs")
    assert (pair["chosen"], pair["rejected"]) == ("Best.", "I am support@v1. You wrote: Hello")
    assert b'lit_ft_votes_total{kind="edit",verdict="right"} 1.0' in parts.metrics.text()


def test_the_line_below_a_reply_is_no_better_answer(parts: Parts) -> None:
    """The widget sends an edit for each part of a message: the text, and the line that says who wrote it."""

    async def main() -> None:
        session = Session(parts)
        await session.send("Hello")
        line = for_page(session.said)[1]["content"][1]["text"]
        await session.edit(1, "Better.")
        await session.edit(1, line, previous=line)
        assert session.said[1].text == "Better."

    run(main())
    assert [pair["chosen"] for pair in votes(parts, "preference_pairs")] == ["Better."]


@pytest.mark.parametrize("text", ["", "  \n", "I am support@v1. You wrote: Hello"])
def test_an_edit_that_betters_nothing_is_none(parts: Parts, text: str) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.send("Hello")
        await session.edit(1, text)
        assert "role='alert'" in session.line
        assert session.said[1].text == "I am support@v1. You wrote: Hello"

    run(main())
    assert ballots(parts) == []


def test_a_thumb_on_an_edited_reply_is_about_what_the_model_wrote(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.send("Hello")
        await session.edit(1, "Better.")
        await session.like(1, False)

    run(main())
    [vote] = votes(parts, "unpaired_preferences")
    assert vote["completion"] == "I am support@v1. You wrote: Hello"


def test_the_prompt_of_a_vote_is_what_the_model_read_whatever_was_edited_since(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.send("First")
        await session.send("Second")
        await session.edit(1, "Better.")  # the second reply was given to the first one as it was
        await session.like(3, True)
        await session.send("Third")  # and the third reply to the edited one
        await session.like(5, True)

    run(main())
    second, third = [json.loads(vote["prompt"]) for vote in votes(parts, "unpaired_preferences")]
    assert second[1]["content"] == "I am support@v1. You wrote: First"
    assert third[1]["content"] == "Better."


def test_a_retried_reply_is_rated_anew(parts: Parts, stub: Stub) -> None:
    async def main() -> None:
        session = Session(parts)
        stub.reply = "One"
        await session.send("Hello")
        await session.like(1, False)
        stub.reply = "Two"
        await session.retry(1)
        await session.like(1, True)

    run(main())
    found = [(vote["completion"], vote["label"]) for vote in votes(parts, "unpaired_preferences")]
    assert found == [("One", 0), ("Two", 1)]


def test_a_vote_that_cannot_be_stored_is_told(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.send("Hello")

        def full(*arguments: Any) -> None:
            raise UserError("Nothing was stored. The disk is full.")

        monkeypatch.setattr(parts.votes, "vote", full)
        monkeypatch.setattr(parts.votes, "improve", full)
        await session.like(1, True)
        assert "disk is full" in session.line
        await session.edit(1, "Better.")
        assert "disk is full" in session.line and session.said[1].text != "Better."

    run(main())


# --- which model ---


def publish(parts: Parts, root: Path, version: int, **changes: Any) -> None:
    """A new version has been found and checked."""
    passed(parts.fleet, adapter(root, version=version, **changes))


def values(session: Session) -> list[str]:
    return [ref for _, ref in session.choices]


def test_the_list_of_models_follows_the_fleet(parts: Parts, tmp_path: Path) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.refresh()
        assert session.choices == [("support@v1 · SFT", "support@v1"), ("Base model", "base")]
        assert session.model == "support@v1" and "support@v1" in session.card

        publish(parts, tmp_path / "adapters", 2, algorithm="dpo")
        await session.refresh()
        assert session.choices == [
            ("support@v2 · DPO", "support@v2"),
            ("support@v1 · SFT (older)", "support@v1"),
            ("Base model", "base"),
        ]
        # Nothing was said and nothing chosen: a new chat begins with the newest.
        assert session.model == "support@v2" and "DPO" in session.card and session.newer == ""

        version = parts.fleet.get("support@v2")
        assert version is not None
        parts.fleet.quarantine(version, "Broken.")
        await session.refresh()
        assert session.model == "support@v1" and "support@v2" not in values(session)

    run(main())


def test_the_base_alone(stub: Stub, tmp_path: Path) -> None:
    async def main() -> None:
        session = Session(made(tmp_path, stub))
        await session.refresh()
        assert session.choices == [("Base model", "base")] and session.model == "base"
        assert "SmolLM2." in session.card

    run(main())


def test_a_chat_keeps_the_version_it_began_with_and_is_told_of_a_newer_one(parts: Parts, tmp_path: Path) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.refresh()
        await session.send("Hello")
        assert session.newer == ""
        publish(parts, tmp_path / "adapters", 2)
        await session.refresh()
        assert session.model == "support@v1" and "support@v1" in session.card
        assert "support@v2 is newer" in session.newer and "goes on with support@v1" in session.newer
        await session.send("Still you?")
        assert session.said[-1].text == "I am support@v1. You wrote: Still you?"

        await session.pick("support@v2")
        assert session.newer == ""
        await session.send("And now?")
        assert session.said[-1].text == "I am support@v2. You wrote: And now?"
        assert [m.label for m in session.said if m.role == "assistant"][-1] == "support@v2 · SFT"

    run(main())


def test_another_adapters_new_version_is_no_news(parts: Parts, tmp_path: Path) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.refresh()
        await session.send("Hello")
        passed(parts.fleet, adapter(tmp_path / "adapters", "legal", 7))
        await session.refresh()
        assert session.model == "support@v1" and session.newer == "" and "legal@v7" in values(session)
        await session.pick("base")
        assert session.newer == ""

    run(main())


def test_a_picked_model_stays_picked(parts: Parts, tmp_path: Path) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.refresh()
        await session.pick("base")
        publish(parts, tmp_path / "adapters", 2)
        await session.refresh()
        assert session.model == "base" and "SmolLM2." in session.card
        await session.pick("support@v1")
        await session.refresh()
        assert session.model == "support@v1" and "Chosen here is support@v1" in session.newer

    run(main())


def test_a_new_chat_begins_with_the_default_that_was_set(parts: Parts, tmp_path: Path) -> None:
    async def main() -> None:
        publish(parts, tmp_path / "adapters", 2)
        parts.fleet.set_default("support@v1")
        session = Session(parts)
        await session.refresh()
        assert session.model == "support@v1" and session.choices[0][1] == "support@v1"

    run(main())


def test_a_version_that_goes_is_still_named_and_says_so_when_asked(parts: Parts, stub: Stub) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.refresh()
        await session.send("Hello")
        parts.fleet.retire("support@v1")
        await session.refresh()
        assert session.model == "support@v1" and "support@v1" in values(session), "a list must hold its own value"
        asked = len(stub.requests)
        await session.send("Are you there?")
        assert len(stub.requests) == asked and session.box == "Are you there?"
        assert "support@v1 cannot be asked now" in session.line and "Retired" in session.line
        await session.pick("base")
        await session.send("Then you")
        assert session.said[-1].text == "I am base. You wrote: Then you"

    run(main())


def test_clearing_goes_back_to_the_default(parts: Parts, tmp_path: Path) -> None:
    """Nothing said any more: the next chat begins with the newest, unless a model was picked."""

    async def main() -> None:
        session = Session(parts)
        await session.refresh()
        await session.send("Hello")
        publish(parts, tmp_path / "adapters", 2)
        shown = await session.events["on_clear"](session.stop)
        assert shown[0] == shown[1] == []
        session.said = shown[1]
        await session.refresh()
        assert session.model == "support@v2" and session.newer == ""

    run(main())


def test_while_the_engine_is_away_it_is_said_and_the_words_kept(parts: Parts, stub: Stub) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.send("Hello")
        parts.fleet.engine_lost("The engine is being started again.")
        asked = len(stub.requests)
        await session.send("Anybody?")
        assert session.box == "Anybody?" and "being started again" in session.line
        assert len(session.said) == 2 and len(stub.requests) == asked
        await parts.fleet.engine_back()
        await session.send("Anybody?")
        assert session.said[-1].text == "I am support@v1. You wrote: Anybody?" and session.line == ""

    run(main())
