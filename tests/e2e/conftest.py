"""The real headless Chromium of this machine, for all tests here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on PATH: the page needs a browser to be tested in")
    playwright = pytest.importorskip("playwright.sync_api", reason="the playwright package is not installed")
    # Five seconds by default: replies of a real engine take longer on a machine that has more to do. Tests of what must
    # be quick say how quick.
    playwright.expect.set_options(timeout=30_000)
    with playwright.sync_playwright() as started:
        # Containers seldom allow Chromium's own sandbox; the page is ours.
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
