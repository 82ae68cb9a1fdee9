"""Ending a reply that is still being written, from the page's side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

Item = TypeVar("Item")


class Stop:
    """One session's wish to end its reply in progress.

    Gradio's own cancelling does not wait for the cancelled event to end, so its last update could come after, and
    over, the one that says 'stopped'. With this the reply ends itself, and is the only one to write the conversation.
    """

    def __init__(self) -> None:
        self._idle = asyncio.Event()
        self._idle.set()
        self._reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> Stop:
        """A session's own: Gradio copies what a page begins with."""
        return Stop()

    def _reset(self) -> None:
        self.asked = asyncio.Event()
        self.typed = ""
        """What was in the box by then: not to be overwritten."""

        self.clear = False
        """Whether the conversation goes as well."""

    async def begin(self) -> bool:
        """Whether a new reply may start; if so it counts as in progress until `end`, and older wishes are void.

        It may not while another is being written: the two would write one conversation, and only one could be
        stopped. After a clear it only waits for the other's end, which is near.
        """
        while not self._idle.is_set():
            if not self.clear:
                return False
            await self._idle.wait()
        self._idle.clear()
        self._reset()
        return True

    def end(self) -> None:
        """The reply that began is over."""
        self._idle.set()

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
