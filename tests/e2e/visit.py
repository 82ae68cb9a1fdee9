"""A browser session at the chat page: what a person does there, and what the console or a network log would show."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

# Two shared cores and a cold page: slow is not wrong.
PATIENCE_MS = 30_000


class Visit:
    """A fresh browser session at the page, that notes whatever a console or a network log would show."""

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.complaints: list[str] = []
        self.outside: list[str] = []
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._check(request.url, url))
        self.page.on("requestfailed", lambda request: self._forgive(request.url, request.failure))
        self.page.goto(url)
        self.box.wait_for()
        self.settle()

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def _check(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "data:", "blob:")):
            self.outside.append(asked)

    def _forgive(self, asked: str, failure: str | None) -> None:
        """What the page's own policy stops never leaves the browser."""
        if failure == "csp" and asked in self.outside:
            self.outside.remove(asked)

    @property
    def box(self) -> Locator:
        return self.page.locator("#box textarea")

    @property
    def messages(self) -> Locator:
        return self.page.locator("#chat .message-row")

    @property
    def notice(self) -> Locator:
        return self.page.get_by_role("alert")

    def settle(self) -> None:
        """Wait as a person would before typing into what has just appeared.

        Gradio writes a field's first value a moment after the field is visible, over anything typed in between.
        """
        self.page.wait_for_timeout(500)

    def open_settings(self) -> None:
        self.page.locator("#settings button").first.click()
        self.page.locator("#seed input, #seed textarea").wait_for()
        self.settle()

    def send(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def ask(self, text: str) -> str:
        """Ask and wait for the end of the reply."""
        from playwright.sync_api import expect

        count = self.messages.count()
        self.send(text)
        reply = self.messages.nth(count + 1)
        expect(reply).to_contain_text("to first token", timeout=PATIENCE_MS)
        self.idle()
        return reply.inner_text()

    def idle(self) -> None:
        """Wait until the page takes the next message."""
        self.page.locator("#send").wait_for(state="visible")
        self.page.wait_for_timeout(300)

    def choose(self, label: str) -> None:
        self.page.locator("#model input").click()
        self.page.get_by_role("option", name=re.compile(re.escape(label))).click()

    def button(self, name: str) -> Locator:
        """A button in the chat itself: Retry, Edit, Submit."""
        return self.page.locator(f"#chat button[aria-label='{name}'], #chat button[title='{name}']")
