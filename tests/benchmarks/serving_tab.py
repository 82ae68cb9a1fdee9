"""A headless Chromium tab at the server's chat page that notes when the page offers which version."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.async_api import Page

PATIENCE_MS = 60_000
POLL_S = 0.1

# A chat that has not begun, with no model chosen, is offered what was published last: the first of the page's list.
OFFERED_JS = "document.querySelector('#model input')?.value ?? ''"


@dataclass
class Tab:
    """What the page showed."""

    why_not: str = "no tab was opened"
    """Why there is no tab; empty where there is one."""

    offered: dict[str, float] = field(default_factory=dict)
    """When each version was first offered to a new chat."""

    options: list[str] = field(default_factory=list)
    """What the model list holds at the end."""

    trouble: str = ""
    """Why it was not looked at to the end."""

    def shown(self, ref: str) -> float | None:
        """When the page's list held `ref`: with it or a newer one as the first, since a page that draws a newer version
        draws those before it as well."""
        return min((at for other, at in self.offered.items() if _number(other) >= _number(ref)), default=None)


def _number(ref: str) -> int:
    return int(ref.rpartition("@v")[2])


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[Tab]:
    """A tab at the page, looked at until the block ends; it has no `why_not` once the page is there."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.async_api import async_playwright
    except ImportError:
        yield Tab("the playwright package is not installed")
        return
    if chromium is None:
        yield Tab("no Chromium on the PATH")
        return
    async with async_playwright() as playwright:
        # Containers seldom allow Chromium's own sandbox; the page is ours.
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = await browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        await page.goto(url)
        await page.wait_for_function(f"({OFFERED_JS}).includes('@v')")
        tab = Tab("")
        looking = asyncio.create_task(_look(page, tab))
        try:
            yield tab
        finally:
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking
            with contextlib.suppress(Exception):  # then the list is empty, which is judged
                await page.locator("#model input").click()
                await page.get_by_role("option").first.wait_for()
                tab.options = [text.strip(" ✓\n\t") for text in await page.get_by_role("option").all_inner_texts()]
            await browser.close()


async def _look(page: Page, tab: Tab) -> None:
    while True:
        try:
            ref = str(await page.evaluate(OFFERED_JS)).partition(" ")[0]
        except Exception as error:
            tab.trouble = f"{type(error).__name__}: {error}"[:200]
            return
        if "@v" in ref:
            tab.offered.setdefault(ref, time.monotonic())
        await asyncio.sleep(POLL_S)
