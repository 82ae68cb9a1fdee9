"""The page without a browser: what is sent to the engine, what is shown of it, and how it is put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_ft.errors import UserError
from serve import app, cards
from serve.client import EngineClient
from serve.conversation import Message, as_typed, for_engine, for_page, literal, up_to_question
from serve.registry import Refused
from serve.stopping import Stop, until
from tests.serve.published import adapter
from tests.serve.stub_engine import API_KEY, Stub, running

LABELS = {"base": "Base model", "support@v1": "support@v1 · SFT"}
TALK = [
    Message("user", "  indented\n  text "),
    Message("assistant", "a <b>reply</b>", "support@v1 · SFT", "0.10 s to first token"),
    Message("user", "and <i>then</i>?"),
]


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    with running(["base", "support@v1"], max_model_len=60) as stub:
        yield stub


def reply(stub: Stub, asked: list[Message], **settings: Any) -> list[list[Message]]:
    """Every state that the page would draw."""
    chosen = {"model": "support@v1", "system": "", "temperature": 0.7, "top_p": 0.9, "max_tokens": 50, "seed": ""}

    async def collect() -> list[list[Message]]:
        client = EngineClient(stub.base_url, API_KEY)
        async with aclosing(app.replies(client, LABELS, asked, **{**chosen, **settings})) as states:
            return [state async for state in states]

    return asyncio.run(collect())


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


def test_a_reply_grows_and_ends_with_its_speed(stub: Stub) -> None:
    states = reply(stub, [Message("user", "where is my parcel?")])
    last = states[-1][-1]
    assert last.text == "I am support@v1. You wrote: where is my parcel?"
    assert last.label == "support@v1 · SFT"
    assert "s to first token" in last.note and "tokens/s" in last.note
    assert all(last.text.startswith(state[-1].text) for state in states)


def test_the_settings_reach_the_engine(stub: Stub) -> None:
    asked = [*TALK[:2], Message("user", "go on")]
    reply(stub, asked, model="base", system="Be kind.", temperature=0.1, top_p=0.5, max_tokens=7.0, seed=" 42 ")
    sent = stub.requests[-1]
    assert sent["model"] == "base" and sent["messages"] == for_engine("Be kind.", asked)
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"], sent["seed"]) == (0.1, 0.5, 7, 42)


def test_without_a_seed_none_is_sent(stub: Stub) -> None:
    reply(stub, TALK[:1])
    assert stub.requests[-1].get("seed") is None


def test_a_seed_that_is_no_number(stub: Stub) -> None:
    with pytest.raises(UserError, match="'lucky' is not a whole number"):
        reply(stub, TALK[:1], seed="lucky")


def test_a_conversation_longer_than_the_context(stub: Stub) -> None:
    with pytest.raises(UserError, match="60"):
        reply(stub, [Message("user", "word " * 100)])


def test_closing_a_reply_aborts_the_request(stub: Stub) -> None:
    stub.delay_s, before = 0.1, stub.aborted

    async def leave() -> None:
        client = EngineClient(stub.base_url, API_KEY)
        states = app.replies(client, LABELS, TALK[:1], "base", "", 0.7, 0.9, 50, "")
        async with aclosing(states):
            async for _ in states:
                break
        for _ in range(50):
            await asyncio.sleep(0.1)
            if stub.aborted > before:
                return

    asyncio.run(leave())
    stub.delay_s = 0.0
    assert stub.aborted == before + 1


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
def test_another_event_does_not_detach_the_reply_in_progress(stub: Stub, other: str) -> None:
    page = app.build("A title", EngineClient(stub.base_url, API_KEY), "base", "A base.", [], [], 60)
    events = {event.fn.__name__: event.fn for event in page.fns.values() if event.fn is not None}
    chosen = ("base", "", 0.7, 0.9, 50, "")
    data = {"on_send": "More", "on_retry": SimpleNamespace(index=0), "on_edit": SimpleNamespace(index=0, value="Other")}
    stub.delay_s, stub.reply, asked = 0.05, "a b c d e f g h " * 20, len(stub.requests)

    async def main() -> tuple[list[Any], list[Any]]:
        stop = Stop()
        running, meanwhile = [], []
        async with aclosing(events["on_send"]("Hello", stop, [], *chosen)) as updates:
            async for update in updates:
                running.append(update)
                said = update[1]
                if len(running) == 3:  # the third shows some of the reply
                    meanwhile = [one async for one in events[other](data[other], stop, said, *chosen)]
                    stop.ask()  # and the one in progress can still be stopped
        return running, meanwhile

    try:
        running, meanwhile = asyncio.run(asyncio.wait_for(main(), 20))
    finally:
        stub.delay_s, stub.reply = 0.0, None
    assert len(stub.requests) == asked + 1, "nothing else was asked"
    assert running[-1][1][-1].note == "stopped"
    [update] = meanwhile
    assert update[0] == for_page(running[2][1]), "an edited message is shown as it was"
    assert all(value == {"__type__": "update"} for value in update[1:])


def test_after_a_reply_another_may_begin(stub: Stub) -> None:
    page = app.build("A title", EngineClient(stub.base_url, API_KEY), "base", "A base.", [], [], 60)
    events = {event.fn.__name__: event.fn for event in page.fns.values() if event.fn is not None}

    async def main() -> list[str]:
        stop, said, told = Stop(), [], []
        for text, seed in (("One", ""), ("Two", "no number"), ("Three", "")):  # the second fails
            async for update in events["on_send"](text, stop, said, "base", "", 0.7, 0.9, 50, seed):
                said = update[1]
            told.append(said[-1].text)
        return told

    assert asyncio.run(main()) == ["I am base. You wrote: One"] * 2 + ["I am base. You wrote: Three"]


# --- the panel ---


def test_the_card_says_what_an_adapter_is_made_of(tmp_path: Path) -> None:
    made = adapter(
        tmp_path,
        version=2,
        algorithm="dpo",
        parent="support@v1",
        created="2026-03-02T14:05:00+02:00",
        data=[{"source": str(tmp_path / "pairs.jsonl"), "rows": 1204, "hash": "sha256:1"}],
        metrics={
            "eval/rewards/accuracies": 0.875,
            "eval/loss": 0.41237,
            "before/loss": 1.5,
            "eval/logps/chosen": -77.0,
        },
    )
    text = cards.adapter_card(made)
    for part in ("support@v2", "DPO", "bundled", "2 Mar 2026, 12:05 UTC", "support@v1", "pairs.jsonl", "1,204 rows"):
        assert part in text
    for part in ("Prefers the chosen reply", "88%", "Held-out loss", "0.4124", "Loss before training", "1.5"):
        assert part in text
    assert "-77" not in text, "only what a stakeholder can use"
    assert str(tmp_path) not in text


def test_everything_in_the_panel_is_escaped(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    made = adapter(
        tmp_path,
        algorithm=evil,
        parent=evil,
        created=evil,
        base={"id": evil, "hash": evil},
        metrics={"eval/loss": 1.0},
        data=[{"source": evil, "rows": 1, "hash": ""}],
    )
    assert "<img" not in cards.adapter_card(made)
    assert "<img" not in cards.base_card(evil, evil)
    assert "<img" not in cards.refused_list([Refused(evil, evil)])


# --- the page ---


def build(tmp_path: Path, refused: list[Refused]) -> Any:
    made = [adapter(tmp_path, version=1), adapter(tmp_path, version=2, algorithm="dpo")]
    client = EngineClient("http://127.0.0.1:9/v1", "key")
    return app.build("A title", client, "base", "A base.", made, refused, max_model_len=512)


def component(page: Any, elem_id: str) -> Any:
    return next(block for block in page.blocks.values() if block.elem_id == elem_id)


def test_the_newest_adapter_is_chosen_and_the_base_is_last(tmp_path: Path) -> None:
    model = component(build(tmp_path, []), "model")
    assert model.choices == [
        ("support@v2 · DPO", "support@v2"),
        ("support@v1 · SFT", "support@v1"),
        ("Base model", "base"),
    ]
    assert model.value == "support@v2"


def test_the_base_alone() -> None:
    page = app.build("A title", EngineClient("http://127.0.0.1:9/v1", "key"), "base", "A base.", [], [], 512)
    assert component(page, "model").value == "base"
    assert "A base." in component(page, "card").value


def test_refused_adapters_have_their_place_only_if_there_are_any(tmp_path: Path) -> None:
    ids = {block.elem_id for block in build(tmp_path / "a", []).blocks.values()}
    assert "refused" not in ids
    panel = component(build(tmp_path / "b", [Refused("legal@v1", "Another base.")]), "refused")
    assert "Another base." in panel.children[0].value


def test_every_event_is_limited_private_and_the_queue_has_an_end(tmp_path: Path) -> None:
    page = build(tmp_path, [])
    assert page._queue.max_size == app.QUEUE
    for event in page.fns.values():
        if event.fn is not None and event.fn not in (list, Stop):
            assert event.concurrency_limit == app.CONCURRENT_CHATS
            assert event.api_visibility == "private", event.name


def test_no_telemetry_and_safe_markdown(tmp_path: Path) -> None:
    page = build(tmp_path, [])
    chat = component(page, "chat")
    assert page.analytics_enabled is False
    assert chat.sanitize_html is True and chat.allow_tags is False
