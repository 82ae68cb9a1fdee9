"""Many people at the pages at once, before a stand-in for vLLM that writes as fast as vLLM on a GPU.

Each session is a tab: it loads the page with all its first events, keeps its heartbeat open, asks every second whether
something changed and then has the page drawn anew, and sends messages with pauses, over Gradio's own protocol and at
most six connections, as browsers do. Three versions are published meanwhile, so that all pages draw themselves anew.
The server has no limits on requests, since more come here in a minute than people send. All sessions stay open until
the last one has its last reply.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.findings import Findings, percentile, rounded, spread
from tests.benchmarks.page_client import Event, Page, PageError
from tests.benchmarks.served import Process, app, stub
from tests.processes import free_ports

if TYPE_CHECKING:
    import aiohttp

WORDS, DELAY_S = 40, 0.025
"""Of a reply, besides the question in it; 40 tokens a second."""

CONNECTIONS = 6
RESENT = 0.02
"""Of the requests may be sent again; see `_resending`."""

PUBLISHED = 3
"""New versions while people chat."""

SETTLE_S = 8.0
"""After the last one: the server lists it within 5 s, and pages ask every second."""

REVISION_S = 1.0
CATCH_UP_S = 60.0


@dataclass
class Seen:
    """What all sessions saw."""

    loads: list[Event] = field(default_factory=list)
    chats: list[Event] = field(default_factory=list)
    pages_s: list[float] = field(default_factory=list)
    """From opening the tab to the end of its first events."""

    revisions_s: list[float] = field(default_factory=list)
    redraws: list[Event] = field(default_factory=list)
    revision: int = -1
    """The last that any session heard of."""

    stale: int = 0
    """Pages that did not show it in the end."""

    requests: int = 0
    resent: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    overtime_s: list[float] = field(default_factory=list)
    """Of chat events: to completion, less the time that the stand-in took to write the reply."""


def measure(options: argparse.Namespace) -> Findings:
    """The whole part."""
    with (
        tempfile.TemporaryDirectory() as name,
        serving_stub(Path(name), words=WORDS, delay_s=DELAY_S) as server,
        server as url,
    ):
        seen = asyncio.run(visit(url, options, Path(name)))
    return judge(seen, options)


@contextmanager
def serving_stub(folder: Path, **behaviour: float) -> Iterator[Process]:
    """Our web app, not yet started, before a stand-in for vLLM; it has two adapters and a port of its own."""
    from tests.serve import published
    from tests.serve.stub_engine import API_KEY

    for name in ("support", "tone"):
        published.folder(folder / "adapters", name)
    base = {"id": "bundled", "place": "", "hash": published.BASE_HASH}
    (port,) = free_ports(1)
    with Process(stub(["base"], **behaviour), folder) as engine:
        server = Process(app(engine, API_KEY, port, base), folder)
        try:
            yield server
        finally:
            server.stop()


async def visit(url: str, options: argparse.Namespace, folder: Path) -> Seen:
    """All sessions, which begin within `--ramp` seconds; `folder` is the server's."""
    seen = Seen()
    asked = asyncio.Barrier(options.sessions + 1)
    sessions = (_session(url, number, options, seen, asked) for number in range(options.sessions))
    await asyncio.gather(_publish(folder, options, asked), *sessions)
    return seen


async def _publish(folder: Path, options: argparse.Namespace, asked: asyncio.Barrier) -> None:
    """New versions, evenly spread over the time in which most sessions chat."""
    from tests.serve import published

    try:
        for version in range(2, 2 + PUBLISHED):
            await asyncio.sleep((options.ramp + options.messages * options.pause) / (PUBLISHED + 1))
            whole = await asyncio.to_thread(published.folder, folder / "prepared", "support", version)
            whole.rename(folder / "adapters" / "support" / whole.name)
        await asyncio.sleep(SETTLE_S)
    finally:
        await asked.wait()


async def _session(url: str, number: int, options: argparse.Namespace, seen: Seen, asked: asyncio.Barrier) -> None:
    import aiohttp

    chance = random.Random(number)
    await asyncio.sleep(options.ramp * number / options.sessions)
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    jar = aiohttp.CookieJar(unsafe=True)  # takes cookies from an address, which has no name
    async with aiohttp.ClientSession(
        trust_env=False,
        connector=connector,
        cookie_jar=jar,
        middlewares=(_resending(seen),),
        trace_configs=[_noting_reuse()],
    ) as http:
        page = Page(http, url)
        polling: asyncio.Task[None] | None = None
        try:
            try:
                began = time.monotonic()
                seen.loads += await page.load()
                seen.pages_s.append(time.monotonic() - began)
                polling = asyncio.create_task(_poll(page, seen))
                for turn in range(options.messages):
                    await asyncio.sleep(chance.uniform(0, 2 * options.pause))
                    await _chat(page, f"Question {turn} of session {number}?", seen)
            except Exception as error:
                seen.errors[f"{type(error).__name__}: {error}"[:200]] += 1
            await asked.wait()  # not where the whole is being stopped: the others will not come
            if polling is not None:
                await _catch_up(page, seen)
        finally:
            if polling is not None:
                polling.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await polling
            await page.close()


_reused: ContextVar[bool] = ContextVar("_reused", default=False)
"""Whether the connection of the request at hand had served another one before."""


def _noting_reuse() -> aiohttp.TraceConfig:
    import aiohttp

    async def reused(*_: object) -> None:
        _reused.set(True)

    config = aiohttp.TraceConfig()
    config.on_connection_reuseconn.append(reused)
    return config


def _resending(seen: Seen) -> Any:
    """Send again what the server did not get, since it closed an idle connection at that moment: browsers do.

    That is: on a connection that was used before, and not a byte of the answer has come. Anything else is an error.
    """
    import aiohttp

    async def middleware(request: Any, handler: Any) -> Any:
        seen.requests += 1
        while True:
            _reused.set(False)
            try:
                return await handler(request)
            except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
                begun = isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str)
                if begun or not _reused.get():
                    # As an error of another kind: aiohttp would send some requests again by itself.
                    raise PageError(f"{request.url.path}: {type(error).__name__}: {error}") from error
                seen.resent += 1

    return middleware


async def _chat(page: Page, question: str, seen: Seen) -> None:
    assert page.layout is not None
    event = await page.fire(page.layout.event("send", "click"), "chat", {"box": question})
    seen.chats.append(event)
    seen.overtime_s.append(event.done_s - DELAY_S * (WORDS + len(f"I am MODEL. You wrote: {question}".split())))
    last = str(event.outputs["chat"][-1]["content"])
    if f"You wrote: {question}" not in last:
        seen.errors[f"a reply to something else: {last[:80]}"] += 1


async def _catch_up(page: Page, seen: Seen) -> None:
    """Wait until the page shows all that was published."""
    end = time.monotonic() + CATCH_UP_S
    while int(page.drawn or -1) < seen.revision:
        if time.monotonic() >= end:
            seen.stale += 1
            return
        await asyncio.sleep(REVISION_S / 10)


async def _poll(page: Page, seen: Seen) -> None:
    """As `live.js`: drawn once for each revision, since drawing takes a moment."""
    pressed = ""
    while True:
        try:
            revision, seconds = await page.revision()
            seen.revisions_s.append(seconds)
            seen.revision = max(seen.revision, int(revision))
            if revision not in (page.drawn, pressed):
                pressed = revision
                seen.redraws += await page.redraw()
        except Exception as error:
            seen.errors[f"revision: {type(error).__name__}: {error}"[:200]] += 1
        await asyncio.sleep(REVISION_S)


def judge(seen: Seen, options: argparse.Namespace) -> Findings:
    """The figures; any error is wrong."""
    errors = seen.errors.total()
    first = [event.first_s for event in (*seen.loads, *seen.redraws, *seen.chats)]
    late = percentile(first, 0.95)
    lines = [
        f"sessions            {options.sessions}, {options.messages} messages each, pauses of {options.pause:g} s on "
        f"average, begun within {options.ramp:g} s; no limits; p95_s is of all events, to the first update",
        f"page loaded         {spread(seen.pages_s)}",
        f"load events         {spread([event.done_s for event in seen.loads])}",
        f"redraw events       {spread([event.done_s for event in seen.redraws])}, after {PUBLISHED} publications",
        f"chat, first update  {spread([event.first_s for event in seen.chats])}",
        f"chat, whole reply   {spread(seen.overtime_s)}, beyond the engine's own time",
        f"revision            {spread(seen.revisions_s)}",
        f"sent again          {seen.resent} of {seen.requests:,} requests, on connections that had been idle until the "
        f"server closed them, before a byte of the answer",
    ]
    wrong = [f"page: {count} x {text}" for text, count in seen.errors.most_common(5)]
    if len(seen.chats) < options.sessions * options.messages and not wrong:
        wrong.append(f"page: {len(seen.chats)} replies, {options.sessions * options.messages} expected")
    if seen.resent > RESENT * seen.requests:
        wrong.append(f"page: {seen.resent} of {seen.requests:,} requests were sent again, {RESENT:.0%} allowed")
    if seen.stale or not seen.redraws:
        wrong.append(f"page: {seen.stale} pages do not show the last publication; {len(seen.redraws)} redraw events")
    summary = {"sessions": options.sessions, "errors": errors, "p95_s": rounded(late), "resent": seen.resent}
    return Findings(summary, lines, wrong)
