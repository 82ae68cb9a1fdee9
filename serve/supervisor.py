"""Keeps the engine running: when it ends or stops answering it is started again, and given its adapters."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lit_ft.errors import UserError
from serve.client import EngineClient
from serve.engine import Engine
from serve.errors import UnavailableError
from serve.fleet import Fleet
from serve.snapshots import Snapshots

logger = logging.getLogger(__name__)

POLL_S = 0.2
HEALTH_S = 1.0
UNHEALTHY_S = 60.0
"""How long it may not answer before it counts as hung: one step over long prompts takes seconds on a CPU."""

ATTEMPTS = 3
STEADY_S = 300.0
"""An engine that ran as long is not failing at its start, and the count of attempts begins anew."""


class EngineLostError(UserError):
    """It ended again and again."""


@dataclass
class Supervisor:
    """Watches one engine, which runs already.

    Args:
        engine: started.
        client: told of its new address.
        fleet: told when it is gone and when it is back.
        snapshots: cleared when it is gone.
        on_restart: called once it runs again.
        say: hears what happens, in lines for the log.
    """

    engine: Engine
    client: EngineClient
    fleet: Fleet
    snapshots: Snapshots
    on_restart: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda line: None
    restarts: int = 0
    _since: float = field(default_factory=time.monotonic)
    _failures: int = 0

    async def run(self) -> None:
        """Until cancelled.

        Raises:
            EngineLostError: it could not be kept running, with the last lines of its log.
        """
        answered = checked = time.monotonic()
        while True:
            await asyncio.sleep(POLL_S)
            now = time.monotonic()
            if self.engine.alive() and now - checked >= HEALTH_S:
                checked = now
                if await asyncio.to_thread(self.engine.healthy):
                    answered = time.monotonic()
                elif await asyncio.to_thread(self.engine.dead):
                    await self._again("ended")
                    answered = checked = time.monotonic()
                    continue
            if self.engine.alive() and time.monotonic() - answered < UNHEALTHY_S:
                continue
            await self._again("ended" if not self.engine.alive() else f"has not answered for {UNHEALTHY_S:.0f} s")
            answered = checked = time.monotonic()

    async def _again(self, what: str) -> None:
        if time.monotonic() - self._since > STEADY_S:
            self._failures = 0
        while True:
            self._failures += 1
            self.fleet.engine_lost(
                "The engine that runs the models stopped and is being started again, which takes about a minute. "
                "Nothing you wrote is lost; send it again then."
            )
            # In a thread: the log may be long, and requests are being answered.
            last = "\n".join(f"    {line[:400]}" for line in await asyncio.to_thread(self.engine.tail))
            if self._failures > ATTEMPTS:
                raise EngineLostError(
                    f"The engine {what} {self._failures} times in a row, so it is not started again. "
                    f"The last lines of {self.engine.log_path}:\n{last}"
                )
            self.say(f"The engine {what}; it is started again. The last lines of its log:\n{last}")
            began, blamed = time.monotonic(), self.fleet.blamed
            try:
                await self._start()
                self.snapshots.clear()
                await self.client.connect(self.engine.base_url)
                await self.fleet.engine_back()
            except UnavailableError:
                what = "ended while it was given its adapters"
                self._failures -= self.fleet.blamed > blamed  # the next attempt does without that one
                continue
            except UserError as error:
                what = f"did not start ({str(error).splitlines()[0]})"
                continue
            self.restarts += 1
            self._since = time.monotonic()
            self.on_restart()
            self.say(f"The engine runs again, after {time.monotonic() - began:.0f} s.")
            return

    async def _start(self) -> None:
        """Start it in a thread. When this is cancelled, that thread and the engine have ended."""
        starting = asyncio.ensure_future(asyncio.to_thread(self.engine.start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            while not starting.done():
                await asyncio.to_thread(self.engine.stop)
                await asyncio.wait([starting], timeout=POLL_S)
            self.engine.stop()
            with contextlib.suppress(Exception):
                starting.result()
            raise
