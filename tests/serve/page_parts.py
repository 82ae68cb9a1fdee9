"""What the pages stand on, made for tests: a fleet of checked adapters on the stub engine, and an empty vote store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from lit_ft.adapter import Adapter
from lit_ft.errors import UserError
from serve.base import Base
from serve.client import EngineClient
from serve.fleet import Fleet
from serve.gateway import Gateway
from serve.limits import Limits
from serve.metrics import Metrics
from serve.pages.parts import Parts
from serve.votes import VoteStore
from tests.serve.published import BASE_HASH
from tests.serve.stub_engine import API_KEY, Stub

VOTER = "somebody"

REMOVED = "Your account here has been removed."


class Ready:
    """An engine that has every adapter already; it notes what it is told."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.unloaded: list[str] = []

    async def load(self, adapter: Adapter) -> None:
        self.loaded.append(adapter.ref)

    async def unload(self, ref: str) -> None:
        self.unloaded.append(ref)


def made(
    tmp_path: Path,
    stub: Stub,
    adapters: Sequence[Adapter] = (),
    *,
    base_name: str = "base",
    max_model_len: int = 256,
    limits: Limits | None = None,
    votes: VoteStore | None = None,
) -> Parts:
    """Parts in which `adapters` are ready; the stub must know their names. Everybody is `VOTER`."""
    fleet = Fleet(Ready(), base_name, room=8)

    def fill() -> None:
        for adapter in adapters:
            passed(fleet, adapter)

    in_a_loop(fill)
    metrics = Metrics()
    return Parts(
        gateway=Gateway(EngineClient(stub.base_url, API_KEY), fleet, limits or Limits(), metrics),
        fleet=fleet,
        votes=votes or VoteStore(tmp_path / "votes.db"),
        metrics=metrics,
        base=Base("bundled", "", BASE_HASH),
        base_text="SmolLM2.",
        max_model_len=max_model_len,
        who=lambda request: VOTER,
    )


def passed(fleet: Fleet, adapter: Adapter) -> None:
    """It has been found, checked and loaded. Call it in an event loop."""
    version = fleet.found(adapter.ref, adapter)
    version.resident = True
    fleet.passed(version)


def in_a_loop(work: Callable[[], object]) -> None:
    """Call `work` in an event loop of its own, also where the caller's thread has one (as Playwright's does)."""

    async def run() -> None:
        work()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, run()).result()


def with_weights(adapter: Adapter, weights: str) -> Adapter:
    """As if these were the weights that were published under its name."""
    return replace(adapter, card=replace(adapter.card, weights_sha256=weights))


def removed(request: object) -> str:
    """In place of `Parts.who`: as for an account that has been removed."""
    raise UserError(REMOVED)
