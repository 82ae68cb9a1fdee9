"""The report in a real browser: at a desk's width and a phone's, with nothing in the console and nothing fetched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lit_ft.evaluation.page import as_html
from lit_ft.evaluation.write import write_report
from tests.e2e.pages import serving
from tests.lit_ft.evaluation.test_page import FULL
from tests.serve.page_parts import made
from tests.serve.published import adapter
from tests.serve.stub_engine import running

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "light"), (360, "dark")])
def test_the_report_is_read_at_any_width(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(as_html(FULL), encoding="utf-8")
    complaints: list[str] = []
    asked: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    for section in FULL.sections:
        assert page.get_by_role("heading", name=section.title, exact=False).first.is_visible()
    # Wide tables scroll within themselves; the page does not.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for picture in page.locator("figure svg:not(.legend svg)").all():
        box = picture.bounding_box()
        assert box is not None and box["width"] > 100 and box["x"] >= 0 and box["x"] + box["width"] <= width
    # Words can be told from what they stand on.
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert ink != paper
    assert complaints == [] and asked == [path.as_uri()]
    context.close()


def test_the_report_as_the_server_serves_it_is_read_on_a_phone(browser: Browser, tmp_path: Path) -> None:
    """The server's own headers must not stop what a file may do, nor the page ask the server for anything more."""
    with running(["base", "support@v1"]) as stub:
        parts = made(tmp_path, stub, [one := adapter(tmp_path / "adapters")])
        write_report(FULL, one.path / "report")
        with serving(parts) as pages:
            complaints: list[str] = []
            asked: list[str] = []
            context = browser.new_context(viewport={"width": 360, "height": 800})
            page = context.new_page()
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            answer = page.goto(f"{pages.url}/report/support@v1")
            assert answer is not None and answer.status == 200
            for section in FULL.sections:
                assert page.get_by_role("heading", name=section.title, exact=False).first.is_visible()
            assert page.get_by_text("How to read this").is_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            # The styles are there: the policy lets them be.
            assert page.evaluate("getComputedStyle(document.querySelector('.verdict')).display") == "inline-block"
            assert complaints == [] and asked == [f"{pages.url}/report/support@v1"]
            context.close()
