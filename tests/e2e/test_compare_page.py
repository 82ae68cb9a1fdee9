"""Comparing, voting and the results in a real headless Chromium, against the stub engine."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from serve.client import EngineClient
from serve.gateway import Gateway
from serve.limits import Limits
from serve.pages.parts import Parts
from tests.e2e.pages import serving
from tests.e2e.visit import PATIENCE_MS, Visit
from tests.serve.page_parts import VOTER, made
from tests.serve.published import adapter
from tests.serve.stub_engine import API_KEY, Stub, running

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

pytestmark = pytest.mark.browser

LABELS = {"base": "Base model", "support@v2": "support@v2 · DPO", "legal@v1": "legal@v1 · SFT"}
NAMES = ("support@", "legal@", "Base model", "tokens/s", "first token")
REPLY = "It **depends**. <img src=x onerror=\"document.title='pwned'\"> `x < y`"

# Keeps what the server sends: DevTools gives no body of a stream.
LISTEN_JS = """() => {
  window.wire = [];
  const real = window.fetch;
  window.fetch = async (...request) => {
    const answer = await real(...request);
    (async () => {
      const decoder = new TextDecoder();
      for await (const piece of answer.clone().body) window.wire.push(decoder.decode(piece, { stream: true }));
    })().catch(() => {});
    return answer;
  };
}"""


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    with running(["base", "support@v1", "support@v2", "legal@v1"]) as stub:
        yield stub


@pytest.fixture(scope="module")
def parts(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    root = tmp_path_factory.mktemp("adapters")
    adapters = [adapter(root, version=1), adapter(root, version=2, algorithm="dpo"), adapter(root, "legal")]
    return made(tmp_path_factory.mktemp("votes"), stub, adapters)


@pytest.fixture(scope="module")
def url(parts: Parts) -> Iterator[str]:
    with serving(parts) as pages:
        yield pages.url


@pytest.fixture
def duel(browser: Browser, url: str, stub: Stub, parts: Parts) -> Iterator[Duel]:
    stub.delay_s, stub.reply = 0.0, REPLY
    stub.requests.clear()
    with sqlite3.connect(parts.votes.path) as db:
        db.execute("DELETE FROM votes")
        db.execute("DELETE FROM ballots")
    duel = Duel(browser, url)
    yield duel
    duel.context.close()


class Duel(Visit):
    """A session at the compare page, that keeps what the server sends."""

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        super().__init__(browser, url, **context)
        self.page.evaluate(LISTEN_JS)
        self.open("Compare")

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab).click()
        self.settle()

    @property
    def box(self) -> Locator:
        return self.page.locator("#duel-box textarea, #box textarea").locator("visible=true")

    @property
    def told(self) -> Locator:
        return self.page.locator("#duel-notice")

    def compare(self, text: str) -> None:
        """Ask both and wait for the ballot."""
        from playwright.sync_api import expect

        self.send(text)
        expect(self.verdict("Left better")).to_be_enabled(timeout=PATIENCE_MS)
        self.settle()

    def verdict(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=re.compile(name))

    def vote(self, name: str) -> None:
        from playwright.sync_api import expect

        self.verdict(name).click()
        expect(self.told).to_contain_text("Thank you")

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").click()
        self.settle()

    def head(self, side: str) -> str:
        return self.page.locator(f"#{side}-head").inner_text()


def stored(parts: Parts) -> list[dict[str, Any]]:
    with sqlite3.connect(parts.votes.path) as db:
        db.row_factory = sqlite3.Row
        query = "SELECT * FROM votes JOIN ballots ON id = ballot ORDER BY number"
        return [dict(row) for row in db.execute(query)]


def test_a_blind_vote_from_the_question_to_the_names(duel: Duel, parts: Parts, stub: Stub) -> None:
    duel.page.evaluate("() => { window.wire = [] }")
    duel.compare("What is <b>best</b>?")
    for side in ("left", "right"):
        pane = duel.page.locator(f"#{side}-pane")
        assert "It depends. <img src=x onerror" in pane.inner_text()
        markup = duel.page.locator(f"#{side}-side").evaluate("element => element.outerHTML")
        assert not any(name in markup for name in NAMES)
    wire = duel.page.evaluate("() => window.wire.join('')")
    assert "It **depends**" in wire and "What is" in wire
    assert not any(name in wire for name in NAMES)
    assert "hidden until you vote" in duel.head("left")

    duel.page.locator("#comment textarea, #comment input").fill("It was clearer.")
    duel.vote("Right better")
    assert "to first token" in duel.page.evaluate("() => window.wire.join('')")
    (row,) = stored(parts)
    assert row["verdict"] == "right" and row["comment"] == "It was clearer." and row["voter"] == VOTER
    assert row["left_reply"] == row["right_reply"] == REPLY and row["blind"] == 1
    assert json.loads(row["prompt"]) == [{"role": "user", "content": "What is <b>best</b>?"}]
    for side in ("left", "right"):
        assert LABELS[row[f"{side}_ref"]] in duel.head(side) and "to first token" in duel.head(side)
    assert {request["model"] for request in stub.requests} == {row["left_ref"], row["right_ref"]}
    assert duel.verdict("Tie").is_disabled()
    assert duel.page.title() == "Support desk" and duel.outside == []
    assert [one for one in duel.complaints if one != "x" and "404" not in one] == []


def test_every_verdict_and_next(duel: Duel, parts: Parts) -> None:
    from playwright.sync_api import expect

    for name in ("Left better", "Tie", "Both bad", "Right better"):
        duel.compare(f"About {name}")
        duel.vote(name)
        expect(duel.verdict(name)).to_contain_text("✓")
        duel.press("Next")
        expect(duel.page.locator("#left-pane .message-row")).to_have_count(0)
        assert duel.head("left") == "Left"
    assert [row["verdict"] for row in stored(parts)] == ["left", "tie", "both_bad", "right"]


def test_continue_goes_on_from_the_better_reply(duel: Duel, parts: Parts, stub: Stub) -> None:
    stub.reply = None
    duel.compare("First")
    duel.vote("Right better")
    duel.press("Continue the conversation")
    duel.compare("Second")
    duel.vote("Left better")
    first, second = stored(parts)
    contents = [message["content"] for message in json.loads(second["prompt"])]
    assert contents == ["First", first["right_reply"], "Second"]
    assert (first["left_ref"], first["right_ref"]) == (second["left_ref"], second["right_ref"])


def test_a_double_click_counts_once(duel: Duel, parts: Parts) -> None:
    duel.compare("Hello")
    duel.verdict("Tie").dblclick(force=True)
    duel.settle()
    duel.settle()
    assert [row["verdict"] for row in stored(parts)] == ["tie"]


def test_voting_by_keyboard(duel: Duel, parts: Parts) -> None:
    from playwright.sync_api import expect

    duel.compare("Hello")
    duel.verdict("Left better").focus()
    duel.page.keyboard.press("Tab")
    expect(duel.verdict("Tie")).to_be_focused()
    duel.page.keyboard.press("Enter")
    expect(duel.told).to_contain_text("Thank you")
    assert [row["verdict"] for row in stored(parts)] == ["tie"]


def test_named_models(duel: Duel, parts: Parts) -> None:
    duel.page.get_by_label("Blind", exact=True).click()
    duel.settle()
    for place, label in (("#left-model", "Base model"), ("#right-model", "support@v1")):
        duel.page.locator(f"{place} input").click()
        duel.page.get_by_role("option", name=re.compile(label)).click()
        duel.settle()  # while the list closes its options are still there
    duel.compare("Hello")
    assert "Base model" in duel.head("left") and "support@v1" in duel.head("right")
    duel.vote("Left better")
    (row,) = stored(parts)
    assert (row["left_ref"], row["right_ref"], row["blind"]) == ("base", "support@v1", 0)


def test_stop_gives_the_text_back(duel: Duel, parts: Parts, stub: Stub) -> None:
    from playwright.sync_api import expect

    stub.delay_s, stub.reply = 0.2, " ".join("abcdefghijklmnopqrstuvwxyz" * 3)
    duel.send("Go on and on")
    expect(duel.page.locator("#right-pane")).to_contain_text("a b c")
    duel.page.locator("#duel-stop").click()
    expect(duel.told).to_contain_text("nothing to vote on")
    expect(duel.box).to_have_value("Go on and on")
    assert duel.verdict("Tie").is_disabled()


def test_an_open_page_votes_after_the_server_was_started_again(
    browser: Browser, stub: Stub, parts: Parts, url: str
) -> None:
    stub.delay_s, stub.reply = 0.0, REPLY
    before = len(stored(parts))

    def afresh() -> Parts:
        """A server has connections of its own, which live in its event loop."""
        client = EngineClient(stub.base_url, API_KEY)
        return replace(parts, gateway=Gateway(client, parts.fleet, Limits(), parts.metrics))

    with serving(afresh()) as own:
        duel = Duel(browser, own.url)
        duel.compare("Hello")
    with serving(afresh(), port=int(own.url.rpartition(":")[2])):
        duel.vote("Tie")
        row = stored(parts)[before]
        assert LABELS[row["left_ref"]] in duel.head("left") and LABELS[row["right_ref"]] in duel.head("right")
        assert duel.page.locator("#continue").locator("visible=true").count() == 0
        duel.context.close()


def test_the_results_show_the_votes_and_the_export_trains(duel: Duel, parts: Parts, tmp_path: Path, stub: Stub) -> None:
    from playwright.sync_api import expect

    duel.open("Results")
    expect(duel.page.locator("#results")).to_contain_text("No votes yet")
    stub.reply = None
    duel.open("Compare")
    duel.compare("Hello")
    duel.vote("Left better")
    (row,) = stored(parts)
    duel.open("Results")
    results = duel.page.locator("#results")
    expect(results).to_contain_text("Bradley–Terry ranking")
    for side in ("left", "right"):
        expect(results).to_contain_text(LABELS[row[f"{side}_ref"]])

    with duel.page.expect_download(timeout=PATIENCE_MS) as download:
        duel.page.get_by_role("button", name="Export pairs (JSONL)").click()
    path = tmp_path / "preferences.jsonl"
    download.value.save_as(path)
    assert download.value.suggested_filename == "preferences.jsonl"
    expect(duel.page.locator("#results-notice")).to_contain_text("Exported 1 decisive")
    from datasets import load_dataset
    from trl.data_utils import is_conversational

    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert data.num_rows == 1 and is_conversational(data[0])
    assert data[0]["chosen"] == [{"role": "assistant", "content": row["left_reply"]}]
    assert data[0]["rejected"] == [{"role": "assistant", "content": row["right_reply"]}]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_pages_fit_a_phone(browser: Browser, url: str, stub: Stub, scheme: str) -> None:
    stub.delay_s, stub.reply = 0.0, "A long line of reply " * 10 + "`" + "x" * 200 + "`"
    phone = Duel(
        browser,
        url,
        viewport={"width": 390, "height": 844},
        color_scheme=scheme,
        is_mobile=True,
        has_touch=True,
    )
    phone.compare("Hello")
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    phone.vote("Tie")
    phone.open("Results")
    phone.settle()
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert phone.complaints == [] and phone.outside == []
    phone.context.close()
