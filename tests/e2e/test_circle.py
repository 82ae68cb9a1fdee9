"""The whole circle with the real parts: train, serve, vote in a browser, train on the votes, see the result there."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from serve.votes import VoteStore
from tests.e2e.server import Server, served, trained
from tests.e2e.visit import Visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [pytest.mark.engine, pytest.mark.browser, pytest.mark.timeout(1500)]

# Enough to change the model: what changes nothing is not served.
SHORT = [
    "data.max_rows=16",
    "data.max_val_rows=4",
    "trainer.max_steps=3",
    "algorithm.learning_rate=1e-3",
    "logger=none",
]
QUESTIONS = ("How long does charging take?", "Can I ride in the rain?", "Where is my order?", "How do I pay?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("circle")


@pytest.fixture(scope="module")
def server(folder: Path, browser: Browser) -> Iterator[Server]:
    assert trained(folder, "+experiment=sft", *SHORT).ref == "support@v1"
    with served(folder, "max_model_len=512") as server:
        yield server


@pytest.fixture(scope="module")
def visit(server: Server, browser: Browser) -> Iterator[Visit]:
    """One session for all that follows: nobody reloads the page."""
    visit = Visit(browser, server.url)
    visit.page.set_default_timeout(120_000)
    yield visit
    visit.context.close()


def get(server: Server, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.url}{path}", timeout=30) as answer:
        return dict(json.load(answer))


def short(visit: Visit, prefix: str = "") -> None:
    """Replies of a few tokens, and chance so that two differ."""
    visit.page.locator(f"#{prefix}settings button").first.click()
    tokens = visit.page.locator(f"#{prefix}max-tokens input[type=number]")
    tokens.wait_for()
    visit.settle()
    tokens.fill("16")
    tokens.press("Tab")


def test_votes_in_a_browser_train_the_next_version_that_appears_there(
    visit: Visit, server: Server, folder: Path
) -> None:
    from playwright.sync_api import expect

    page = visit.page
    expect(page.locator("#card")).to_contain_text("support@v1")
    short(visit)
    reply = visit.ask(QUESTIONS[0])
    assert "support@v1 · SFT" in reply
    # Blind votes: two models, four prompts.
    page.get_by_role("tab", name="Compare").click()
    page.locator("#duel-box textarea").wait_for()
    short(visit, "duel-")
    verdicts = ("left", "right", "left", "right")
    for question, verdict in zip(QUESTIONS, verdicts, strict=True):
        page.locator("#duel-box textarea").fill(question)
        page.locator("#duel-send").click()
        button = page.locator(f"#vote-{verdict}")
        expect(button).to_be_enabled()
        button.click()
        expect(page.locator("#left-head, #right-head").filter(has_text="support@v1")).to_have_count(1)
        expect(page.locator("#left-head, #right-head").filter(has_text="Base model")).to_have_count(1)
        page.locator("#next").click()
    # And a better answer, written by hand.
    page.get_by_role("tab", name="Chat").click()
    visit.button("Edit").last.click()
    page.locator("#chat textarea").first.fill("Four to five hours from empty.\nNext: plug it in tonight.")
    visit.button("Submit").first.click()
    expect(visit.messages.nth(1)).to_contain_text("edited by you")

    store = VoteStore(folder / "votes.db")
    rows = store.rows()
    assert [row.kind for row in rows] == ["edit", *["compare"] * 4]
    assert [row.verdict for row in reversed(rows[1:])] == list(verdicts)
    assert {side.ref for row in rows[1:] for side in (row.ballot.left, row.ballot.right) if side} == {
        "base",
        "support@v1",
    }
    store.close()

    before = time.monotonic()
    made = trained(
        folder,
        "+experiment=dpo",
        "data=votes",
        "data.min_votes=3",
        "trainer.max_steps=2",
        "algorithm.learning_rate=5e-4",
        "logger=none",
    )
    published = time.monotonic()
    assert made.ref == "support@v2" and made.card.parent == "support@v1" and made.card.algorithm == "dpo"
    assert sum(source.rows for source in made.card.data) <= 5
    assert made.card.canary is not None
    # In the same browser, never reloaded: the old chat goes on with its version, and says that there is a newer one.
    expect(page.locator("#newer")).to_contain_text("support@v2 is newer", timeout=10_000)
    assert published - before < 600
    reply = visit.ask("And then?")
    assert "support@v1 · SFT" in reply
    visit.choose("support@v2")
    expect(page.locator("#card")).to_contain_text("DPO")
    assert "support@v2 · DPO" in visit.ask("Who are you?")
    page.get_by_role("tab", name="Adapters").click()
    expect(page.locator("#versions")).to_contain_text("support@v2")
    assert visit.complaints == [] and visit.outside == []


def test_an_engine_that_is_killed_in_the_middle_of_a_reply_comes_back(visit: Visit, server: Server) -> None:
    from playwright.sync_api import expect

    page = visit.page
    page.get_by_role("tab", name="Chat").click()
    page.locator("#max-tokens input[type=number]").fill("400")
    page.locator("#max-tokens input[type=number]").press("Tab")
    count = visit.messages.count()
    visit.send("Tell me everything about batteries, at length.")
    expect(visit.messages.nth(count + 1)).to_contain_text(re.compile(r"\w+ \w+"))
    os.kill(server.named("VLLM::EngineCore"), signal.SIGKILL)
    # The conversation is as it was, the words are back in the box, and the page says what is going on.
    expect(visit.notice.first).to_contain_text(re.compile("engine", re.IGNORECASE))
    expect(visit.box).to_have_value("Tell me everything about batteries, at length.")
    expect(visit.messages).to_have_count(count)
    expect(page.locator("#state")).to_contain_text("being started again")
    expect(page.locator("#state")).to_contain_text("on one base model", timeout=180_000)
    page.locator("#max-tokens input[type=number]").fill("16")
    page.locator("#max-tokens input[type=number]").press("Tab")
    assert "support@v2 · DPO" in visit.ask("Are you there?")
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        assert b"lit_ft_engine_restarts_total 1.0" in answer.read()
    # A browser logs the refused requests of that minute; nothing else.
    assert [line for line in visit.complaints if "503" not in line] == []


def test_the_endpoint_with_openais_own_client(server: Server) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert {"base", "support", "support@v1", "support@v2"} <= {model.id for model in client.models.list()}
    question = [{"role": "user", "content": QUESTIONS[1]}]
    said = {}
    for name in ("base", "support", "support@v1", "support@v2"):
        reply = client.chat.completions.create(model=name, messages=question, max_tokens=12, temperature=0)
        said[name] = reply.choices[0].message.content
        assert reply.model == {"support": "support@v2"}.get(name, name)
    assert said["support"] == said["support@v2"] != said["base"]
    pieces = client.chat.completions.create(
        model="support", messages=question, max_tokens=12, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices) == said["support"]
    with pytest.raises(openai.NotFoundError, match="support@v2"):
        client.chat.completions.create(model="support@v9", messages=question)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="../../etc/passwd", messages=question)


def test_sigterm_leaves_no_process(server: Server) -> None:
    children = server.children()
    assert len(children) >= 3, "the engine runs as processes of its own"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0, server.log.read_text()
    deadline = time.monotonic() + 20
    alive = children
    while alive and time.monotonic() < deadline:
        alive = [pid for pid in children if Path(f"/proc/{pid}").exists()]
        time.sleep(0.2)
    assert not alive
    # An engine that was killed has its last words, indented, in the log; a traceback of this program would stand alone.
    assert "\nTraceback" not in server.log.read_text()
    with pytest.raises(urllib.error.URLError):
        get(server, "/healthz")
