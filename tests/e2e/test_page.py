"""A person's path through the page, in a real headless Chromium, against the stub engine."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from serve import app
from serve.client import EngineClient
from serve.registry import Refused
from tests.e2e.visit import Visit
from tests.serve.published import adapter
from tests.serve.stub_engine import API_KEY, Stub, running

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    with running(["base", "support@v1", "support@v2"], max_model_len=120) as stub:
        yield stub


@pytest.fixture(scope="module")
def url(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("adapters")
    adapters = [adapter(root, version=1), adapter(root, version=2, algorithm="dpo", parent="support@v1")]
    refused = [Refused("legal@v1", "It was trained on another base.")]
    client = EngineClient(stub.base_url, API_KEY)
    page = app.build("Support desk", client, "base", "SmolLM2.", adapters, refused, max_model_len=120)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app.launch(page, "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


@pytest.fixture
def visit(browser: Browser, url: str, stub: Stub) -> Iterator[Visit]:
    stub.delay_s, stub.reply = 0.0, None
    stub.requests.clear()
    visit = Visit(browser, url)
    yield visit
    visit.context.close()


def asked(stub: Stub) -> list[str]:
    """The texts of the last request."""
    return [message["content"] for message in stub.requests[-1]["messages"]]


def test_ask_switch_ask_and_see_another_card_and_answer(visit: Visit, stub: Stub) -> None:
    from playwright.sync_api import expect

    page = visit.page
    expect(page).to_have_title("Support desk")
    card = page.locator("#card")
    expect(card).to_contain_text("support@v2")
    expect(card).to_contain_text("DPO")
    assert "I am support@v2. You wrote: Hello" in visit.ask("Hello")

    visit.choose("Base model")
    expect(card).to_contain_text("SmolLM2.")
    assert "I am base. You wrote: And you?" in visit.ask("And you?")

    visit.choose("support@v1")
    expect(card).to_contain_text("SFT")
    assert "I am support@v1" in visit.ask("And you too?")

    # Who wrote what stays to be seen, and was never sent to a model.
    lines = [visit.messages.nth(i).inner_text() for i in (1, 3, 5)]
    assert ["support@v2 · DPO" in lines[0], "Base model" in lines[1], "support@v1 · SFT" in lines[2]] == [True] * 3
    sent = ["Hello", "I am support@v2. You wrote: Hello", "And you?", "I am base. You wrote: And you?", "And you too?"]
    assert asked(stub) == sent
    page.locator("#refused button").first.click()
    expect(page.locator("#refused")).to_contain_text("It was trained on another base.")
    assert visit.complaints == [] and visit.outside == []


def test_retry_and_edit(visit: Visit, stub: Stub) -> None:
    from playwright.sync_api import expect

    visit.ask("First")
    visit.ask("Second")
    visit.choose("Base model")
    visit.button("Retry").last.click()
    expect(visit.messages.nth(3)).to_contain_text("I am base. You wrote: Second")
    expect(visit.messages.nth(3)).to_contain_text("to first token")
    visit.idle()
    assert asked(stub) == ["First", "I am support@v2. You wrote: First", "Second"]

    visit.button("Edit").first.click()
    visit.page.locator("#chat textarea").fill("First <b>again</b>")
    visit.button("Submit").click()
    expect(visit.messages.nth(1)).to_contain_text("I am base. You wrote: First <b>again</b>")
    expect(visit.messages).to_have_count(2)
    assert asked(stub) == ["First <b>again</b>"]
    assert visit.complaints == []


def test_stop_keeps_what_was_written(visit: Visit, stub: Stub) -> None:
    from playwright.sync_api import expect

    stub.delay_s, stub.reply, aborted = 0.3, " ".join("abcdefghijklmnopqrstuvwxyz" * 3), stub.aborted
    visit.send("Go on and on")
    expect(visit.messages.nth(1)).to_contain_text("a b c")
    visit.box.fill("My next thought")
    visit.page.locator("#stop").click()
    expect(visit.messages.nth(1)).to_contain_text("stopped")
    visit.idle()
    assert visit.box.input_value() == "My next thought"
    stub.delay_s, stub.reply = 0.0, None
    visit.ask("Next")
    assert asked(stub)[1].startswith("a b c") and "stopped" not in asked(stub)[1]
    assert stub.aborted == aborted + 1


def test_retry_while_a_reply_is_written_leaves_it_alone(visit: Visit, stub: Stub) -> None:
    from playwright.sync_api import expect

    visit.ask("First")
    stub.delay_s, stub.reply = 0.3, " ".join("abcdefghijklmnopqrstuvwxyz" * 3)
    count = len(stub.requests)
    visit.send("Go on and on")
    expect(visit.messages.nth(3)).to_contain_text("a b c")
    visit.button("Retry").last.click(force=True)
    visit.page.wait_for_timeout(700)
    assert len(stub.requests) == count + 1
    visit.page.locator("#stop").click()
    expect(visit.messages.nth(3)).to_contain_text("stopped")
    visit.idle()
    expect(visit.messages).to_have_count(4)
    stub.delay_s, stub.reply = 0.0, None
    visit.ask("Next")


def test_stop_before_the_first_word_gives_the_question_back(visit: Visit, stub: Stub) -> None:
    from playwright.sync_api import expect

    stub.delay_s = 20
    visit.send("Slow one")
    visit.page.locator("#stop").click()
    visit.idle()
    expect(visit.box).to_have_value("Slow one")
    expect(visit.messages).to_have_count(0)


def test_clear_also_in_the_middle_of_a_reply(visit: Visit, stub: Stub) -> None:
    from playwright.sync_api import expect

    visit.ask("First")
    stub.delay_s, stub.reply = 0.2, " ".join("abcdefghijklmnopqrstuvwxyz" * 3)
    visit.send("Go on and on")
    expect(visit.messages.nth(3)).to_contain_text("a b")
    visit.page.locator("#clear").click()
    expect(visit.messages).to_have_count(0)
    stub.delay_s, stub.reply = 0.0, None
    visit.idle()
    visit.ask("Fresh")
    assert asked(stub) == ["Fresh"]


def test_leaving_the_page_aborts_the_request(visit: Visit, stub: Stub) -> None:
    from playwright.sync_api import expect

    stub.delay_s, stub.reply, aborted = 0.3, " ".join("abcdefghijklmnopqrstuvwxyz" * 8), stub.aborted
    visit.send("Go on and on")
    expect(visit.messages.nth(1)).to_contain_text("a b")
    visit.page.close()
    visit.page = visit.context.new_page()
    for _ in range(100):
        visit.page.wait_for_timeout(200)
        if stub.aborted > aborted:
            return
    pytest.fail("the engine still works for nobody")


def test_an_empty_message_does_nothing(visit: Visit, stub: Stub) -> None:
    visit.send("  \n ")
    visit.page.locator("#send").click()
    visit.page.wait_for_timeout(1500)
    assert visit.messages.count() == 0 and stub.requests == []


def test_a_message_that_is_too_long_is_explained_and_kept(visit: Visit) -> None:
    from playwright.sync_api import expect

    visit.ask("First")
    words = "word " * 150
    visit.send(words)
    expect(visit.notice).to_contain_text("at most 120")
    expect(visit.box).to_have_value(words)
    expect(visit.messages).to_have_count(2)
    expect(visit.page.locator("#send")).to_be_in_viewport()
    visit.idle()
    visit.ask("Shorter")
    expect(visit.notice).to_have_count(0)
    assert visit.complaints == []


def test_the_settings_are_sent(visit: Visit, stub: Stub) -> None:
    from playwright.sync_api import expect

    page = visit.page
    visit.open_settings()
    page.locator("#system textarea").fill("Answer in one word.")
    page.locator("#temperature input[type=number]").fill("0.25")
    page.locator("#temperature input[type=number]").press("Tab")
    page.locator("#max-tokens input[type=number]").fill("3")
    page.locator("#max-tokens input[type=number]").press("Tab")
    page.locator("#seed input, #seed textarea").fill("11")
    visit.ask("Hello")
    sent = stub.requests[-1]
    assert asked(stub) == ["Answer in one word.", "Hello"]
    assert (sent["temperature"], sent["max_tokens"], sent["seed"]) == (0.25, 3, 11)

    page.locator("#seed input, #seed textarea").fill("x")
    visit.send("Again")
    expect(visit.notice).to_contain_text("not a whole number")
    expect(visit.box).to_have_value("Again")


def test_html_of_a_model_is_shown_and_never_run(visit: Visit, stub: Stub) -> None:
    stub.reply = (
        "<img src=x onerror=\"document.title='pwned'\"> <think>hm</think> <b>bold</b> & `<i>`\n\n```\n<u> left open"
    )
    text = visit.ask("Attack <i>me</i>")
    for part in ("<img src=x", "<think>hm</think>", "<b>bold</b>", "<i>", "<u> left open", "to first token"):
        assert part in text
    assert "<i>me</i>" in visit.messages.nth(0).inner_text()
    assert visit.page.title() == "Support desk"
    assert visit.outside == []


def test_sessions_do_not_see_each_other(visit: Visit, browser: Browser, url: str, stub: Stub) -> None:
    visit.ask("A secret")
    other = Visit(browser, url)
    other.ask("Hello")
    assert asked(stub) == ["Hello"]
    assert other.messages.count() == 2
    other.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser: Browser, url: str, stub: Stub, scheme: str) -> None:
    from playwright.sync_api import expect

    stub.delay_s, stub.reply = 0.0, "A long line of reply " * 10 + "`" + "x" * 200 + "`"
    phone = Visit(
        browser,
        url,
        viewport={"width": 390, "height": 844},
        color_scheme=scheme,
        is_mobile=True,
        has_touch=True,
    )
    phone.ask("Hello")
    page = phone.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for place in ("#model", "#box", "#send"):
        expect(page.locator(place).first).to_be_in_viewport(ratio=0.9)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert (sum(light) > 3 * 128) == (scheme == "light")
    assert phone.complaints == [] and phone.outside == []
    phone.context.close()
    stub.reply = None


def test_an_engine_that_is_gone_is_said_and_the_text_kept(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from playwright.sync_api import expect

    with running(["base"]) as mortal:
        page = app.build("Mortal", EngineClient(mortal.base_url, API_KEY), "base", "A base.", [], [], 120)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        app.launch(page, "127.0.0.1", port)
        try:
            visit = Visit(browser, f"http://127.0.0.1:{port}")
            assert "I am base" in visit.ask("Hello")
            mortal.kill()
            visit.send("Anybody?")
            expect(visit.notice).to_contain_text("engine")
            expect(visit.box).to_have_value("Anybody?")
            expect(visit.messages).to_have_count(2)
            visit.context.close()
        finally:
            page.close(verbose=False)


def test_the_page_names_no_other_host(url: str) -> None:
    """Link previews aside, which a browser does not load, the document refers to nothing outside."""
    import urllib.request

    with urllib.request.urlopen(url) as answer:
        document = answer.read().decode()
    loaded = re.findall(
        r"""(?:<(?:script|link|img|iframe)[^>]+(?:src|href)=|@import |url\()["']?(https?://[^"')\s]+)""", document
    )
    assert [found for found in loaded if not found.startswith(url)] == []
    assert Path(app.__file__).with_name("page.css").read_text().count("http") == 0
