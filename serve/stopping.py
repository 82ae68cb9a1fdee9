"""Ending a reply that is still being written, from the page's side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar

Item = TypeVar("Item")


class Stop:
    """One session's wish to end its reply in progress.

    Gradio's own cancelling does not wait for the cancelled event to end, so its last update could come after, and
    over, the one that says 'stopped'. With this the reply ends itself, and is the only one to write the conversation.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.typed = ""
        """What was in the box by then: not to be overwritten."""

        self.clear = False
        """Whether the conversation goes as well."""

    def begin(self) -> None:
        """A new reply starts: wishes about older ones are void."""
        self.__init__()  # type: ignore[misc]

    def ask(self, typed: str = "", clear: bool = False) -> None:
        """End the reply in progress, if there is one."""
        self.typed, self.clear = typed, clear
        self.asked.set()


async def until(stream: AsyncGenerator[Item, None], asked: asyncio.Event) -> AsyncGenerator[Item, None]:
    """The stream's items until `asked` is set, even while it waits for one; then, or when closed, closes it."""
    waiting = asyncio.ensure_future(asked.wait())
    step: asyncio.Future[Item] | None = None
    try:
        while not asked.is_set():
            step = asyncio.ensure_future(anext(stream))
            await asyncio.wait({step, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                return
            try:
                item = step.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        waiting.cancel()
        if step is not None and not step.done():
            step.cancel()
            await asyncio.wait({step})
        await stream.aclose()
