"""The pages on a loopback port as `python -m serve` serves them, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from serve import app, web
from serve.pages.parts import Parts

START_S = 60


@dataclass
class Pages:
    """Pages that are being served."""

    url: str
    parts: Parts
    loop: asyncio.AbstractEventLoop

    def do(self, change: Callable[[], Any]) -> Any:
        """Call `change` where the fleet lives, as the watcher would; gives what it returns."""

        async def call() -> Any:
            return change()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(START_S)


@contextmanager
def serving(parts: Parts, title: str = "Support desk", port: int = 0, **settings: Any) -> Iterator[Pages]:
    """Serve until the block ends, on a free port unless one is given; `settings` are those of `serve.web.assemble`."""
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    loop = asyncio.new_event_loop()
    started, ending = threading.Event(), asyncio.Event()
    failed: list[BaseException] = []

    async def main() -> None:
        application = web.assemble(app.build(title, parts), parts.fleet, parts.metrics, **settings)
        async with web.listening(application, "127.0.0.1", port):
            started.set()
            await ending.wait()

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(main())
        except BaseException as error:
            failed.append(error)
            started.set()
        finally:
            # As asyncio.run does: what Gradio leaves running would complain in the midst of a later test.
            for task in (left := asyncio.all_tasks(loop)):
                task.cancel()
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(START_S), "the pages did not start"
    if failed:
        raise failed[0]
    try:
        yield Pages(f"http://127.0.0.1:{port}", parts, loop)
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join(web.GRACE_S + 10)
