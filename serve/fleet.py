"""Every adapter version that the server knows: its state, who uses it now, which one a name means.

A version is lent out (`lease`) for each request, so that it is never unloaded under one. Everything here runs in one
event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Protocol

from lit_ft.adapter import Adapter, Card
from lit_ft.errors import UserError
from serve.choices import Choices
from serve.errors import EngineGoneError, UnavailableError, UnknownModelError
from serve.metrics import Swap
from serve.registry import newest_first

logger = logging.getLogger(__name__)

RECENT = 200
"""How many requests the medians of the Adapters page look back."""

WAIT_FOR_ROOM_S = 30.0
"""How long a request waits until the engine has room for its adapter."""

AGAIN_S = 10.0
"""How long until the engine is asked again to unload what it refused to."""

DEATHS = 2
"""So many ends of the engine in a row, each while it loaded one version and nothing else, are that version's fault."""


class State(StrEnum):
    """Of a version, as the Adapters page names it."""

    LOADING = "loading"
    """Found, and being checked."""

    READY = "ready"
    """Checked: it can be asked."""

    QUARANTINED = "quarantined"
    """It failed a check; the reason stands beside it."""

    RETIRED = "retired"
    """A newer one took its place (it can still be asked by its full name), or a person retired it (it cannot)."""


@dataclass(frozen=True)
class Listed:
    """A model that can be asked for."""

    id: str
    """`support@v3`; `support`, the newest of that name; or the base's name."""

    created: int
    """Seconds since 1970."""

    root: str
    """What answers: `support@v3` for `support`, else the id itself."""

    parent: str | None
    """The base's name; None for the base."""

    card: Card | None
    """None for the base."""


class Engine(Protocol):
    """What the fleet asks of the engine."""

    async def load(self, adapter: Adapter) -> None: ...

    async def unload(self, ref: str) -> None: ...


@dataclass
class Served:
    """What requests to one model were like: totals, and the last few for medians."""

    requests: int = 0
    failed: int = 0
    ttft_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    tokens_per_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def add(self, failed: bool, ttft_s: float | None = None, tokens_per_s: float | None = None) -> None:
        """One more request; a rate of 0 is none."""
        self.requests += 1
        self.failed += failed
        if ttft_s is not None:
            self.ttft_s.append(ttft_s)
        if tokens_per_s:
            self.tokens_per_s.append(tokens_per_s)

    @property
    def median_ttft_s(self) -> float | None:
        return statistics.median(self.ttft_s) if self.ttft_s else None

    @property
    def median_tokens_per_s(self) -> float | None:
        return statistics.median(self.tokens_per_s) if self.tokens_per_s else None


@dataclass(eq=False)
class Version:
    """One folder below the adapters folder."""

    ref: str
    """`support@v3`; where no card could be read, the folder's path below the adapters folder."""

    adapter: Adapter | None
    checked: bool = False
    problem: str = ""
    """Why it is quarantined."""

    note: str = ""
    """What else is to be said of it while it is in service."""

    doubtful: bool = False
    """Its folder has changed: it is not loaded from there until it has been checked again."""

    withdrawn: bool = False
    """Retired by a person."""

    pinned: bool = False
    resident: bool = False
    """Whether the engine holds it."""

    refused: float = -math.inf
    """When the engine last refused to unload it."""

    deaths: int = 0
    """How often in a row the engine ended while it loaded this and nothing else."""

    leases: int = 0
    used: float = 0.0
    served: Served = field(default_factory=Served)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def askable(self) -> bool:
        """Whether a request that names it in full is answered."""
        return self.checked and not self.problem and not self.withdrawn

    @property
    def number(self) -> int:
        return _number(self.ref)


class Fleet:
    """All versions, and the base."""

    def __init__(
        self,
        engine: Engine,
        base_name: str,
        *,
        room: int,
        keep_versions: int = 1,
        choices: Choices | None = None,
        on_swap: Callable[[Swap], None] = lambda what: None,
    ) -> None:
        """Knows the base only, and takes the engine for ready.

        Args:
            engine: loads and unloads.
            base_name: the base's name in requests.
            room: adapters that the engine holds at once.
            keep_versions: of each name, so many of the newest stay loaded; older ones are unloaded when nobody uses
                them, and loaded again when they are asked for.
            choices: pins, retirements and the default.
            on_swap: called with "loaded", "unloaded" or "quarantined".
        """
        self.base_name = base_name
        self.base_served = Served()
        self.blamed = 0
        """How many versions were quarantined since they had ended the engine."""

        # No two servers begin alike: a page that is open while its server is started again sees that it was.
        self.revision = secrets.randbelow(2**40)
        self._engine = engine
        self._room = max(1, room)
        self._keep = max(1, keep_versions)
        self._on_swap = on_swap
        self._versions: dict[str, Version] = {}
        self._leaving: set[Version] = set()
        """Their folders are gone or have changed, but the engine still holds them."""

        self._ranked: tuple[int, dict[str, list[Version]]] = (-1, {})
        self._tasks: set[asyncio.Task[None]] = set()
        self._loading = self._loads = 0
        """How many adapters the engine is loading now, and how many loads were begun."""

        self._up = True
        self._down_reason = ""
        self._freed = asyncio.Event()
        self._tidying: asyncio.Task[None] | None = None
        self._untidy = False
        self._choices = choices or Choices()

    # --- what there is ---

    def versions(self) -> list[Version]:
        """All, by name, the newest version of each first; folders without a card at the end."""
        return sorted(self._versions.values(), key=_by_name)

    def get(self, ref: str) -> Version | None:
        """The version of that full name."""
        return self._versions.get(ref)

    def askable(self) -> list[Version]:
        """Those that a request may name: the newest of each name first, by when they were published, then the rest."""
        ranked = self._by_number().values()
        newest = {alike[0].ref for alike in ranked}
        found = [v for alike in ranked for v in alike]
        return sorted(found, key=lambda v: (v.ref not in newest, newest_first(v.adapter)))  # type: ignore[arg-type]

    def state(self, version: Version) -> State:
        """As the Adapters page shows it."""
        if version.problem:
            return State.QUARANTINED
        if version.withdrawn:
            return State.RETIRED
        if not version.checked:
            return State.LOADING
        return State.READY if self._wanted(version) else State.RETIRED

    def reason(self, version: Version) -> str:
        """Why it is in its state, where that needs saying."""
        if version.problem or version.withdrawn:
            return version.problem or "Retired by hand."
        if self.state(version) is State.RETIRED and (newer := self.newer(version.ref)):
            return f"{newer} took its place. It is loaded again when it is asked for by its full name."
        return version.note if self.state(version) is State.READY else ""

    def newest(self, name: str) -> Version | None:
        """The newest version of `name` that can be asked."""
        return next(iter(self._by_number().get(name, ())), None)

    def _by_number(self) -> dict[str, list[Version]]:
        """The versions of each name that can be asked, the newest first. Kept until something changes."""
        if self._ranked[0] != self.revision:
            ranked: dict[str, list[Version]] = {}
            for version in self._versions.values():
                if version.askable and version.adapter:
                    ranked.setdefault(version.adapter.name, []).append(version)
            for alike in ranked.values():
                alike.sort(key=lambda v: -v.number)
            self._ranked = (self.revision, ranked)
        return self._ranked[1]

    def newer(self, ref: str) -> str | None:
        """The newest version of the same name, where that is newer than `ref`."""
        name = ref.partition("@")[0]
        newest, here = self.newest(name), self._versions.get(ref)
        number = here.number if here else _number(ref)
        return newest.ref if newest and number and newest.number > number else None

    def listed(self) -> list[Listed]:
        """What a request may name: the base, each adapter's name (its newest version), and every version."""
        found = [Listed(self.base_name, 0, self.base_name, None, None)]
        cards = [version.adapter.card for version in self.askable() if version.adapter]
        for name in dict.fromkeys(card.name for card in cards):
            if newest := self.newest(name):
                card = newest.adapter.card  # type: ignore[union-attr]
                found.append(Listed(name, timestamp(card.created), newest.ref, self.base_name, card))
        return found + [Listed(c.ref, timestamp(c.created), c.ref, self.base_name, c) for c in cards]

    @property
    def default(self) -> str:
        """What a new chat begins with: the one set, else the adapter published last, else the base."""
        if self.default_is_set:
            return str(self._choices.default)
        return next((v.ref for v in self.askable()), self.base_name)

    def resolve(self, model: str) -> str:
        """The full name of what `model` asks for: a name means its newest version.

        Raises:
            UnknownModelError: there is none, or it may not be asked.
        """
        if model == self.base_name:
            return model
        version = self._versions.get(model)
        if version is None and "@" not in model:
            alike = [v for v in self._versions.values() if v.ref.partition("@")[0] == model]
            version = self.newest(model) or max(alike, key=lambda v: v.number or _number(v.ref), default=None)
        if version is not None and version.askable:
            return version.ref
        if version is not None:
            why = self.reason(version) or "It is being checked; try again in a moment."
            raise UnknownModelError(f"{version.ref} cannot be asked now. {why} {self._there_are()}")
        raise UnknownModelError(f"There is no model {model[:80]!r} here. {self._there_are()}")

    def _there_are(self) -> str:
        names = list(dict.fromkeys(v.adapter.name for v in self.askable() if v.adapter))
        shown = [self.base_name, *names[:8], *(["…"] if len(names) > 8 else [])]
        return f"There are: {', '.join(shown)}."

    def stats(self, ref: str) -> Served:
        """What requests to `ref` were like."""
        leaving = next((v for v in self._leaving if v.ref == ref and v.leases), None)
        version = leaving or self._versions.get(ref)
        return version.served if version else self.base_served

    # --- use ---

    @contextlib.asynccontextmanager
    async def lease(self, model: str) -> AsyncIterator[str]:
        """Hold what `model` asks for in use; gives its full name. It is loaded first where it was unloaded.

        Raises:
            UnknownModelError: see `resolve`.
            UnavailableError: the engine is being started again, or holds as many other adapters as it can.
            UserError: the engine refused to load it.
        """
        ref = self.resolve(model)
        if not self._up:
            raise UnavailableError(self._down_reason)
        version = self._versions.get(ref)
        if version is None:
            yield ref
            return
        version.leases += 1
        try:
            await self._make_resident(version)
            yield ref
        finally:
            version.leases -= 1
            version.used = time.monotonic()
            self._freed.set()
            self.tidy()

    async def try_out(self, version: Version) -> None:
        """Load a version that is being checked, for its canary. Raises as `lease`, but does not wait for room."""
        await self._make_resident(version, patient=False)

    async def _make_resident(self, version: Version, patient: bool = True) -> None:
        if version.resident and not version.lock.locked():
            return
        # In a task of its own: whoever asked may go away, and after a load that was broken off half-way nobody would
        # know what the engine holds.
        await asyncio.shield(self._begin(self._load(version, patient)))
        if not version.resident:  # lost in the moment in between
            raise UnavailableError(self._down_reason)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do it in a task: the event loop itself does not hold on to one."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, version: Version, patient: bool) -> None:
        async with version.lock:
            if version.resident:
                return
            deadline = time.monotonic() + WAIT_FOR_ROOM_S
            while True:
                # Asked again after each wait: much may have happened meanwhile.
                if not self._up:
                    raise UnavailableError(self._down_reason)
                if version.adapter is None or self._versions.get(version.ref) is not version:
                    raise UnknownModelError(f"{version.ref} is not here any more. {self._there_are()}")
                if version.doubtful:
                    raise UnavailableError(f"{version.ref} is being checked again. Try again in a moment.")
                # Never in place: what the engine holds under this name must go first.
                same = [v for v in self._leaving if v.ref == version.ref]
                if not same and len(self._resident()) < self._room:
                    break
                unused = [v for v in same or self._resident() if not _busy(v)]
                idle = [v for v in unused if not v.lock.locked() and not _refused(v)]
                if idle:
                    await self._unload(min(idle, key=lambda v: (v.pinned, self._wanted(v), v.used)))
                    continue
                # Even without patience, what is just being unloaded is waited for.
                if time.monotonic() >= deadline or not (patient or any(v.lock.locked() for v in unused)):
                    if same:
                        raise UnavailableError(
                            f"{version.ref} is in use at this moment as it was before its folder changed. "
                            "Try again in a minute."
                        )
                    raise UnavailableError(
                        f"{self._room} other adapters are in use at this moment, as many as the engine holds. "
                        "Try again in a minute."
                    )
                self._freed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._freed.wait(), deadline - time.monotonic())
            version.resident = True  # counts while it is being loaded: others must not take its room
            self._loading, self._loads = self._loading + 1, self._loads + 1
            try:
                await self._engine.load(version.adapter)
            except BaseException:
                version.resident = False
                self._leaving.discard(version)
                self._freed.set()
                raise
            finally:
                self._loading -= 1
            if not version.resident:  # into an engine that was lost meanwhile
                raise UnavailableError(self._down_reason)
            version.used, version.deaths = time.monotonic(), 0
            self._freed.set()  # who waits for room may take this one's, if nobody uses it after all
            self._on_swap("loaded")

    async def _unload(self, version: Version) -> None:
        async with version.lock:
            if not version.resident:
                self._leaving.discard(version)
            if version.leases or not version.resident:
                return
            try:
                await self._engine.unload(version.ref)
            except EngineGoneError as error:  # and the adapter with it
                logger.warning("%s", error)
            except UserError as error:  # it holds it still, and takes room for it
                logger.warning("%s It is asked again in %.0f s.", error, AGAIN_S)
                version.refused = time.monotonic()
                asyncio.get_running_loop().call_later(AGAIN_S, self.tidy)
                return
            version.resident = False
            self._leaving.discard(version)
            self._freed.set()
            self._on_swap("unloaded")

    def _wanted(self, version: Version) -> bool:
        """Whether it stays loaded when nobody uses it."""
        if not version.askable or version.adapter is None:
            return False
        if version.pinned or self._choices.default == version.ref:
            return True
        return version in self._by_number().get(version.adapter.name, [])[: self._keep]

    def _resident(self) -> list[Version]:
        """What takes room in the engine."""
        return [v for v in (*self._versions.values(), *self._leaving) if v.resident]

    def tidy(self) -> None:
        """Soon unload what nobody uses and nothing keeps."""
        self._untidy = True
        if self._tidying is None or self._tidying.done():
            self._tidying = asyncio.get_running_loop().create_task(self._tidy())

    async def _tidy(self) -> None:
        while self._untidy:  # again where something became idle behind this pass
            self._untidy = False
            for version in self._resident():
                if not _busy(version) and not self._wanted(version) and not _refused(version):
                    await self._unload(version)

    # --- what the watcher finds ---

    def found(self, ref: str, adapter: Adapter | None) -> Version:
        """A new folder, to be checked."""
        version = Version(ref, adapter)
        version.pinned = ref in self._choices.pinned
        version.withdrawn = ref in self._choices.retired
        self._versions[ref] = version
        self.changed()
        return version

    def passed(self, version: Version) -> None:
        """It may be asked from now on; what it replaces is unloaded when its last request has ended."""
        version.checked, version.problem = True, ""
        self._freed.set()
        self.changed()
        self.tidy()

    def quarantine(self, version: Version, reason: str) -> None:
        """It may not be asked; requests under way end as they may."""
        version.problem = reason
        self._freed.set()
        self._on_swap("quarantined")
        self.changed()
        self.tidy()

    def forget(self, version: Version) -> asyncio.Task[None]:
        """Its folder is gone. Requests under way go on: the engine has a copy.

        Gives the task that unloads it, which need not be waited for and may take as long as a load.
        """
        version.checked, version.problem = False, "Its folder is gone."
        if self._versions.get(version.ref) is version:
            del self._versions[version.ref]
        if version.resident:
            self._leaving.add(version)
        self._freed.set()  # it may be waiting for room itself
        self.changed()
        return self._begin(self._unload(version))

    # --- what people choose on the Adapters page ---

    def pin(self, ref: str, pinned: bool) -> None:
        """Keep a version loaded when newer ones come, for as long as there is room; it is the last to go."""
        if version := self._versions.get(ref):
            version.pinned = pinned
            _put(self._choices.pinned, ref, pinned)
            self._chose()

    def retire(self, ref: str, retired: bool = True) -> None:
        """Take a version out of service, or back in."""
        if version := self._versions.get(ref):
            version.withdrawn = retired
            _put(self._choices.retired, ref, retired)
            if retired and self._choices.default == ref:
                self._choices.default = None
            self._chose()

    def set_default(self, ref: str | None) -> None:
        """What a new chat begins with; None goes back to the adapter published last."""
        self._choices.default = None if ref is None else self.resolve(ref)
        self._chose()

    @property
    def default_is_set(self) -> bool:
        """Whether a person chose the default, and it can be asked."""
        chosen = self._choices.default
        return chosen == self.base_name or (chosen in self._versions and self._versions[chosen].askable)

    def _chose(self) -> None:
        self._choices.write()
        self.changed()
        self.tidy()

    # --- the engine's end and return ---

    @property
    def up(self) -> bool:
        return self._up

    @property
    def down_reason(self) -> str:
        """What to tell people while the engine is away; empty when it is there."""
        return "" if self._up else self._down_reason

    def engine_lost(self, reason: str) -> None:
        """Nothing is loaded any more, and nothing can be."""
        self._up, self._down_reason = False, reason
        for version in self._resident():
            version.resident = False
        self._leaving.clear()
        self._freed.set()
        self.changed()

    async def engine_back(self) -> None:
        """Load again what should be, and take requests.

        Raises:
            EngineGoneError: it ended again. A version that was being loaded alone at `DEATHS` ends in a row is
                quarantined, so that the next attempt does without it.
        """
        self._up = True
        try:
            wanted = [v for v in self.askable() if self._wanted(v)]
            for version in wanted[: self._room]:
                begun, alone = self._loads, not self._loading
                try:
                    await self._make_resident(version)
                except EngineGoneError:
                    if alone and self._loads == begun + 1:
                        self._blame(version)
                    raise
                except UnavailableError as error:  # a full disk: it is loaded when it is asked for
                    logger.warning("%s", error)
                except UserError as error:
                    self.quarantine(version, str(error))
        finally:
            self.changed()

    def _blame(self, version: Version) -> None:
        version.deaths += 1
        if version.deaths >= DEATHS:
            self.blamed += 1
            self.quarantine(version, f"The engine ended {version.deaths} times in a row while it was loaded.")

    def changed(self) -> None:
        """Something that the page shows is different now."""
        self.revision += 1


def timestamp(created: str) -> int:
    """A card's date as OpenAI's clients want it; 0 where it cannot be read."""
    try:
        moment = datetime.fromisoformat(created)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        return 0


def _by_name(version: Version) -> tuple[bool, str, int]:
    return (not version.number, version.ref.partition("@")[0], -version.number)


def _busy(version: Version) -> bool:
    """Whether requests use it, or its canary may be under way."""
    return bool(version.leases) or (not version.checked and not version.problem)


def _refused(version: Version) -> bool:
    """Whether the engine refused just now to unload it."""
    return time.monotonic() - version.refused < AGAIN_S


def _number(ref: str) -> int:
    digits = ref.partition("@v")[2]
    return int(digits) if digits.isdecimal() else 0


def _put(refs: set[str], ref: str, there: bool) -> None:
    refs.add(ref) if there else refs.discard(ref)
