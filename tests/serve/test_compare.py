"""The compare page without a browser: its events against the stub engine, and what it stores."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from lit_ft.errors import UserError
from serve import votes
from serve.client import Timing
from serve.conversation import Message
from serve.errors import UnknownModelError
from serve.limits import Limits
from serve.pages import compare
from serve.pages.compare import Half, Match
from serve.pages.parts import Parts
from serve.stopping import Stop
from serve.votes import Ballot, Sampling, Side
from tests.serve.page_parts import REMOVED, VOTER, made, passed, removed, with_weights
from tests.serve.published import BASE_HASH, adapter
from tests.serve.stub_engine import Stub, running

NAMES = ("support", "legal", "Base model", "DPO", "SFT")
REPLY = "  **Yes**,\n\n<script>alert(1)</script> & `no`  "


@pytest.fixture
def stub() -> Iterator[Stub]:
    with running(["base", "support@v1", "support@v2", "legal@v1"], reply=REPLY) as stub:
        yield stub


@pytest.fixture
def parts(tmp_path: Path, stub: Stub) -> Parts:
    root = tmp_path / "adapters"
    adapters = [adapter(root, version=1), adapter(root, version=2, algorithm="dpo"), adapter(root, "legal")]
    return made(tmp_path, stub, adapters)


class Session:
    """One browser's page: what its fields hold, and every update that came to it."""

    def __init__(self, parts: Parts) -> None:
        with gr.Blocks() as self.page:
            self.look = compare.build(parts)
        self.stop = Stop()
        self.forget()
        self.fields: dict[str, Any] = {}
        self.shown: dict[str, dict[str, Any]] = {}
        self.sent: list[Any] = []
        """All that went over the wire."""

    def forget(self) -> None:
        """What the server knows of the session is gone, as after it was started again."""
        self.match: Match | None = None

    def event(self, name: str, which: int = 0) -> Any:
        return [fn for fn in self.page.fns.values() if fn.name == name][which].fn

    def take(self, update: dict[Any, Any]) -> None:
        for component, value in update.items():
            if isinstance(component, gr.State):
                self.match = value
                continue
            self.sent.append(value)
            is_update = isinstance(value, dict) and value.get("__type__") == "update"
            self.shown.setdefault(component.elem_id, {}).update(value if is_update else {"value": value})

    def value(self, elem_id: str) -> Any:
        return self.shown[elem_id].get("value")

    async def send(self, text: str, **chosen: Any) -> None:
        fields = {
            "blind": True,
            "pool": [],
            "left": None,
            "right": None,
            "system": "",
            "temperature": 0.7,
            "top_p": 0.9,
            "max_tokens": 50,
            "seed": "",
            **chosen,
        }
        on_send = self.event("on_send")
        async for update in on_send(SimpleNamespace(), text, self.stop, self.match, *fields.values()):
            self.take(update)

    async def vote(self, verdict: str, comment: str = "") -> None:
        which = [one for one, _, _ in compare.VERDICTS].index(verdict)
        on_vote = self.event("on_vote", which)
        self.take(await on_vote(SimpleNamespace(), self.value("ballot-id"), comment, self.match))

    async def go_on(self) -> None:
        self.take(await self.event("on_continue")(self.match))

    async def next(self) -> None:
        self.take(await self.event("on_next")())

    @property
    def usable(self) -> list[str]:
        """The verdicts that can be given now."""
        ids = {f"vote-{verdict.replace('_', '-')}": verdict for verdict, _, _ in compare.VERDICTS}
        return [verdict for elem_id, verdict in ids.items() if self.shown[elem_id].get("interactive")]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def stored(parts: Parts, table: str = "votes JOIN ballots ON id = ballot") -> list[dict[str, Any]]:
    with sqlite3.connect(parts.votes.path) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute(f"SELECT * FROM {table}")]


# --- a blind comparison ---


def test_nothing_tells_the_names_before_the_vote_and_everything_after(parts: Parts, stub: Stub) -> None:
    async def story() -> None:
        session = Session(parts)
        await session.send("Which <i>one</i>?", system="Be brief.", seed="7")
        assert not any(name in repr(session.sent) for name in (*NAMES, "tokens/s", "first token"))
        assert session.match is not None
        refs = session.match.refs
        assert len(set(refs)) == 2 and {request["model"] for request in stub.requests} == set(refs)
        assert session.usable == ["left", "tie", "both_bad", "right"]
        assert stored(parts) == []

        await session.vote("right", "clearer")
        for ref, side in zip(refs, ("left", "right"), strict=True):
            assert parts.label(ref) in session.value(f"{side}-head")
            assert "to first token" in session.value(f"{side}-head")
        assert session.usable == [] and session.shown["continue"]["visible"] and session.shown["ways"]["visible"]

        (row,) = stored(parts)
        assert (row["left_ref"], row["right_ref"]) == refs
        assert (row["verdict"], row["comment"], row["blind"], row["voter"]) == ("right", "clearer", 1, VOTER)
        assert row["left_reply"] == row["right_reply"] == REPLY
        assert row["base_hash"] == BASE_HASH
        assert json.loads(row["prompt"]) == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Which <i>one</i>?"},
        ]
        assert json.loads(row["sampling"]) == {"temperature": 0.7, "top_p": 0.9, "max_tokens": 50, "seed": 7}

    run(story())


def test_both_are_asked_the_same_at_once_and_drawn_together(parts: Parts, stub: Stub) -> None:
    stub.delay_s, stub.reply = 0.1, "a b c d e f g h i j"

    async def story() -> None:
        session = Session(parts)
        sending = asyncio.ensure_future(session.send("Hello"))
        while len(stub.requests) < 2 or stub.finished:
            await asyncio.sleep(0.01)
            assert not stub.finished
        await sending
        one, two = stub.requests
        assert {**one, "model": ""} == {**two, "model": ""}
        panes = [value for value in session.sent if isinstance(value, list) and len(value) == 2]
        # Two panes an update, and both had begun long before either was whole.
        assert len(panes) > 6 and session.usable

    run(story())


@pytest.mark.parametrize("verdict", ["left", "right", "tie", "both_bad"])
def test_every_verdict_is_counted_once_and_is_final(parts: Parts, verdict: str) -> None:
    async def story() -> None:
        session = Session(parts)
        await session.send("Hello")
        await asyncio.gather(session.vote(verdict), session.vote(verdict))
        await session.vote(verdict)
        assert "Thank you" in session.value("duel-notice")
        other = "tie" if verdict != "tie" else "left"
        await session.vote(other)
        assert "already voted" in session.value("duel-notice")
        assert [row["verdict"] for row in stored(parts)] == [verdict]
        assert f'lit_ft_votes_total{{kind="compare",verdict="{verdict}"}} 1.0' in parts.metrics.text().decode()

    run(story())


def test_a_page_that_outlived_the_server_can_still_vote(parts: Parts) -> None:
    async def story() -> None:
        session = Session(parts)
        await session.send("Hello")
        assert session.match is not None
        refs = session.match.refs
        session.forget()
        await session.vote("left")
        assert [row["left_ref"] for row in stored(parts)] == [refs[0]]
        assert parts.label(refs[0]) in session.value("left-head")
        assert parts.label(refs[1]) in session.value("right-head")
        assert session.shown["ways"]["visible"] and not session.shown["continue"]["visible"]
        await session.next()
        await session.send("Again")
        assert session.usable

    run(story())


def test_a_forged_or_anothers_ballot_does_not_count(parts: Parts) -> None:
    side = Side("base", BASE_HASH, "x")
    ballot = Ballot("somebody else", "bundled", BASE_HASH, [], side, side, Sampling(1, 1, 1, None))

    async def story() -> None:
        session = Session(parts)
        for forged in ("", "no-such-ballot", parts.votes.issue(ballot)):
            session.shown["ballot-id"] = {"value": forged}
            await session.vote("left")
            assert "not counted" in session.value("duel-notice")
        assert stored(parts) == []

    run(story())


def test_every_verdict_of_the_store_has_its_button() -> None:
    assert {verdict for verdict, _, _ in compare.VERDICTS} == set(votes.VERDICTS["compare"])


@pytest.mark.parametrize("then", ["deleted", "published again"])
def test_a_ballot_names_the_weights_that_answered_whatever_has_the_name_by_then(
    parts: Parts, stub: Stub, tmp_path: Path, then: str
) -> None:
    version = parts.fleet.get("legal@v1")
    assert version is not None and version.adapter is not None
    answered = version.adapter.card.weights_sha256
    stub.delay_s, stub.reply = 0.1, "a b c d e f"

    async def story() -> None:
        session = Session(parts)
        sending = asyncio.ensure_future(session.send("Hello", blind=False, left="legal@v1", right="base"))
        while len(stub.requests) < 2:
            await asyncio.sleep(0.01)
        await parts.fleet.forget(version)  # while the replies come: the ballot is issued at their end
        if then == "published again":
            passed(parts.fleet, with_weights(adapter(tmp_path / "again", "legal"), "sha256:others"))
        await sending
        await session.vote("left")
        (row,) = stored(parts)
        assert (row["left_hash"], row["right_hash"]) == (answered, BASE_HASH)

    run(story())


def test_replies_of_unknown_weights_are_not_put_to_the_vote(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        session = Session(parts)
        monkeypatch.setattr(Parts, "hash_of", lambda self, ref: "")
        await session.send("Hello", blind=False, left="legal@v1", right="base")
        assert "not known which weights" in session.value("duel-notice") and session.value("duel-box") == "Hello"
        assert session.usable == [] and stored(parts, "ballots") == []

    run(story())


def test_an_account_that_was_removed_is_told_so(parts: Parts, stub: Stub) -> None:
    async def story() -> None:
        session = Session(parts)
        await session.send("Hello")
        gone = Session(replace(parts, who=removed))
        gone.match, gone.shown = session.match, session.shown
        await gone.vote("left")
        assert REMOVED in gone.value("duel-notice") and stored(parts) == []
        asked = len(stub.requests)
        gone = Session(replace(parts, who=removed))
        await gone.send("More")
        assert REMOVED in gone.value("duel-notice") and gone.value("duel-box") == "More"
        assert len(stub.requests) == asked

    run(story())


# --- going on ---


@pytest.mark.parametrize("verdict, side", [("left", 0), ("right", 1), ("tie", 0), ("both_bad", 0)])
def test_both_go_on_from_the_better_reply(parts: Parts, stub: Stub, verdict: str, side: int) -> None:
    stub.reply = None  # says who it is

    async def story() -> None:
        session = Session(parts)
        await session.send("First")
        assert session.match is not None
        refs = session.match.refs
        await session.vote(verdict)
        assert ("from the left reply" in session.value("duel-notice")) == (verdict in ("tie", "both_bad"))
        await session.go_on()
        assert session.value("ballot-id") == "" and session.usable == []
        await session.send("Second")
        history = ["First", f"I am {refs[side]}. You wrote: First", "Second"]
        for request in stub.requests[-2:]:
            assert [message["content"] for message in request["messages"]] == history
        await session.vote("left")
        first, second = stored(parts)
        assert (second["left_ref"], second["right_ref"]) == refs
        # The names were known by then.
        assert (first["blind"], second["blind"]) == (1, 0)
        assert [message["content"] for message in json.loads(second["prompt"])] == history

    run(story())


def test_next_begins_anew(parts: Parts, stub: Stub) -> None:
    async def story() -> None:
        session = Session(parts)
        await session.send("First")
        await session.next()
        assert session.match is None and session.value("left-pane") == [] and "hidden" not in session.value("left-head")
        await session.send("Second")
        assert [message["content"] for message in stub.requests[-1]["messages"]] == ["Second"]

    run(story())


def test_nothing_can_be_asked_while_a_vote_is_open(parts: Parts, stub: Stub) -> None:
    async def story() -> None:
        session = Session(parts)
        await session.send("   ")
        await session.send("First")
        await session.send("Second")
        assert len(stub.requests) == 2

    run(story())


# --- what goes wrong ---


def test_a_stopped_comparison_has_no_ballot_and_gives_the_text_back(parts: Parts, stub: Stub) -> None:
    stub.delay_s, stub.reply = 0.05, " ".join("abcdefghijklmnopqrstuvwxyz")

    async def story() -> None:
        session = Session(parts)
        sending = asyncio.ensure_future(session.send("Go on"))
        while not any("a b" in repr(value) for value in session.sent):
            await asyncio.sleep(0.02)
        await session.event("on_stop")("", session.stop)
        await sending
        assert session.value("duel-box") == "Go on" and "nothing to vote on" in session.value("duel-notice")
        assert session.usable == [] and session.match is None and stored(parts, "ballots") == []
        assert "a b" in repr(session.value("left-pane"))  # what was written stays in sight
        for _ in range(100):
            if stub.aborted == 2:
                break
            await asyncio.sleep(0.02)
        assert stub.aborted == 2

    run(story())


def test_when_one_fails_the_other_is_stopped_and_no_name_is_told(parts: Parts, stub: Stub) -> None:
    stub.delay_s, stub.reply = 0.05, "a " * 200
    stub.models.remove("legal@v1")

    async def story() -> None:
        session = Session(parts)
        await session.send("Hello", pool=["legal@v1", "support@v1"], max_tokens=250)
        assert session.value("duel-notice") and "One of the two" in session.value("duel-notice")
        assert not any(name in repr(session.sent) for name in NAMES)
        assert session.value("duel-box") == "Hello" and session.value("left-pane") == []
        assert session.match is None and stored(parts, "ballots") == []
        for _ in range(100):
            if stub.aborted:
                break
            await asyncio.sleep(0.02)
        assert (stub.aborted, stub.finished) == (1, 0)

    run(story())


def test_a_model_that_has_gone_meanwhile_is_explained(parts: Parts) -> None:
    async def story() -> None:
        session = Session(parts)
        await session.send("Hello", blind=False, left="base", right="legal@v1")
        await session.vote("tie")
        await session.go_on()
        version = parts.fleet.get("legal@v1")
        assert version is not None
        parts.fleet.quarantine(version, "Its folder has changed.")
        await session.send("And now?")
        assert "legal@v1 cannot be asked now" in session.value("duel-notice")
        assert session.value("duel-box") == "And now?" and session.shown["leave"]["visible"]

    run(story())


def test_a_vote_that_cannot_be_stored_is_said_and_can_be_cast_again(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise UserError("votes.db: nothing was stored. The disk is full: make room and try again.")

    async def story() -> None:
        session = Session(parts)
        with monkeypatch.context() as patch:
            patch.setattr(parts.votes, "issue", full)
            await session.send("Hello")
            assert "disk is full" in session.value("duel-notice") and session.value("duel-box") == "Hello"
        await session.send("Hello")
        with monkeypatch.context() as patch:
            patch.setattr(parts.votes, "vote", full)
            await session.vote("left")
            assert "disk is full" in session.value("duel-notice") and session.usable
        await session.vote("left")
        assert len(stored(parts)) == 1

    run(story())


def test_limits_and_settings_are_explained(tmp_path: Path, stub: Stub) -> None:
    parts = made(tmp_path, stub, [adapter(tmp_path / "adapters")], limits=Limits(streams=1))

    async def story() -> None:
        session = Session(parts)
        await session.send("Hello")
        assert "as many as one person may have at once" in session.value("duel-notice")
        await session.send("Hello", seed="x")
        assert "not a whole number" in session.value("duel-notice")

    run(story())


# --- which two ---


def test_with_one_model_the_page_says_what_to_do(tmp_path: Path, stub: Stub) -> None:
    parts = made(tmp_path, stub)

    async def story() -> None:
        session = Session(parts)
        session.take(await session.look.draw(None, None, [], None, None))
        assert "Publish an adapter" in session.value("duel-notice")
        await session.send("Hello")
        assert "Publish an adapter" in session.value("duel-notice") and session.value("duel-box") == "Hello"
        assert stub.requests == []

    run(story())


def test_the_draw_is_of_the_newest_and_the_base_unless_limited(parts: Parts) -> None:
    assert set(compare.drawable(parts, [])) == {"support@v2", "legal@v1", "base"}
    assert set(compare.drawable(parts, ["support@v1", "base"])) == {"support@v1", "base"}
    for pool in (["base"], ["base", "gone@v1"]):
        with pytest.raises(UserError, match="at least two"):
            compare.drawable(parts, pool)


def test_every_ordered_pair_is_drawn_and_about_as_often() -> None:
    drawn = Counter(compare.draw(["a", "b", "c"]) for _ in range(6000))
    assert set(drawn) == {(x, y) for x in "abc" for y in "abc" if x != y}
    # 1,000 each on average with a standard deviation of 29.
    assert all(850 < count < 1150 for count in drawn.values())


@pytest.mark.parametrize("left, right", [("base", "base"), ("", "base"), (None, None)])
def test_named_models_must_be_two(parts: Parts, left: str | None, right: str | None) -> None:
    with pytest.raises(UserError, match="two different models"):
        compare.begin(parts, False, [], left, right)


def test_named_models_are_those_chosen_and_shown_at_once(parts: Parts) -> None:
    async def story() -> None:
        session = Session(parts)
        await session.send("Hello", blind=False, left="support@v1", right="base")
        assert "support@v1 · SFT" in session.value("left-head") and "Base model" in session.value("right-head")
        await session.vote("left")
        (row,) = stored(parts)
        assert (row["left_ref"], row["right_ref"], row["blind"]) == ("support@v1", "base", 0)

    run(story())


# --- what is shown ---


def test_hidden_panes_hold_neither_name_nor_speed_nor_live_markup(parts: Parts) -> None:
    timing = Timing(0.1, 12, 34.0)
    match = Match(("base", "support@v1"), True, (), Message("user", "Q"), (Half("h", REPLY, timing, "length"), Half()))
    (head, talk), (_, waiting) = compare.view(parts, match)
    assert "hidden until you vote" in head and "34" not in repr((head, talk))
    assert "<script" not in repr(talk) and "cut at the longest reply" in repr(talk)
    assert len(waiting) == 1  # the question: nothing has come yet
    revealed = compare.view(parts, Match(match.refs, False, (), match.question, match.halves, "id", "left"))
    assert "34 tokens/s" in revealed[0][0] and "Base model" in revealed[0][0]


@pytest.mark.parametrize(
    "error, told",
    [
        (UnknownModelError("There is no model 'x' here."), compare.HIDDEN_FAILURE),
        (UserError("The engine could not load support@v1: out of memory"), compare.HIDDEN_FAILURE),
        (UserError("You have sent 9 requests."), "You have sent 9 requests."),
        (RuntimeError("support@v1"), "That failed; the server's log says why."),
    ],
)
def test_an_error_does_not_tell_the_names(error: Exception, told: str) -> None:
    assert compare.hiding(error, Match(("base", "support@v1"), hidden=True)) == told
    if isinstance(error, UserError):
        assert compare.hiding(error, Match(("base", "support@v1"), hidden=False)) == str(error)
