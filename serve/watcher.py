"""Watches the adapters folder: what is published there is checked and taken into service, without a restart."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lit_ft.adapter import Adapter, AdapterError, read, sha256_file, version_folders
from lit_ft.errors import UserError
from serve import canary
from serve.canary import Scores
from serve.errors import EngineGoneError, UnavailableError
from serve.fleet import Fleet, Version
from serve.registry import Rules, objection
from serve.weights import not_finite

logger = logging.getLogger(__name__)

INTERVAL_S = 0.5
AGAIN_S = 5.0
"""How long until a version is tried again that failed for a passing reason: no room, a full disk."""

ATTEMPTS = 2

NO_CANARY = "No canary in its card: checked against the base only."

SMALL = ("card.json", "adapter_config.json", "chat_template.jinja", "tokenizer_config.json")
"""What is read of a version besides its weights; whatever else lies in its folder (README.md) may change."""

Signature = tuple[tuple[str, int, int, int], ...]


@dataclass(eq=False)
class _Seen:
    """A folder as it was when it was last looked at; another one whenever it has changed."""

    signature: Signature
    version: Version
    small: str = ""
    """The hash of its small files, as they were when it was taken into service."""

    attempts: int = 0
    """How often the engine ended while it was tried out."""

    waited: bool = False
    """Whether it was said that it has to wait."""

    shelved: bool = False
    """Not tried out, since it is retired."""


@dataclass
class Watcher:
    """Finds new, changed and vanished versions. `run` goes on until it is cancelled.

    Args:
        root: the adapters folder.
        fleet: told of what is found.
        client: scores the canary.
        rules: what this server can serve.
        say: hears a line for each version that comes, fails or goes.
    """

    root: Path
    fleet: Fleet
    client: Scores
    rules: Rules
    say: Callable[[str], None] = lambda line: None
    _seen: dict[Path, _Seen] = field(default_factory=dict)
    _waiting: list[Path] = field(default_factory=list)
    _base_logprobs: dict[tuple[int, ...], list[float]] = field(default_factory=dict)
    _looked: bool = False
    first_pass: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Look and check until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look_always())
            tasks.create_task(self._check_always())

    async def _look_always(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:  # a folder that cannot be read now may be readable in a moment
                logger.exception("The adapters folder could not be looked through.")
            await asyncio.sleep(INTERVAL_S)

    async def _check_always(self) -> None:
        while True:
            if self._looked and not self._waiting:
                self.first_pass.set()
            if not self._waiting or not self.fleet.up:
                await asyncio.sleep(INTERVAL_S / 5)
                continue
            path = self._waiting.pop(0)
            seen = self._seen.get(path)
            if seen is None:
                continue
            try:
                await self._check(path, seen)
            except EngineGoneError:
                seen.attempts += 1
                if seen.attempts < ATTEMPTS:  # it may not have been this adapter's fault
                    self._later(path)  # not at once: that it has ended is noticed in a moment
                else:
                    self._fail(seen.version, f"The engine ended {ATTEMPTS} times while it was tried out.")
            except UnavailableError as error:  # the engine or the disk is full: later
                if not seen.waited:
                    self.say(f"  waiting  {seen.version.ref}: {error}")
                seen.waited = True
                self._later(path)
            except Exception:
                if self._seen.get(path) is not seen:
                    continue
                logger.exception("%s could not be checked.", seen.version.ref)
                self._fail(seen.version, "Checking it failed; the server's log says how.")

    def _later(self, path: Path) -> None:
        """Not to be waited for here: what is published meanwhile is checked first."""
        asyncio.get_running_loop().call_later(AGAIN_S, self._wait_again, path)

    def _wait_again(self, path: Path) -> None:
        if path in self._seen and path not in self._waiting:
            self._waiting.append(path)

    async def look(self) -> None:
        """Compare the folders with what they were; what is new or changed is checked next, the newest first."""
        now = await asyncio.to_thread(_signatures, self.root)
        for path in [path for path in self._seen if path not in now]:
            gone = self._seen.pop(path)
            self.say(f"  gone     {gone.version.ref}")
            self.fleet.forget(gone.version)
        new = []
        for path, signature in now.items():
            seen = self._seen.get(path)
            if seen is not None and seen.signature == signature:
                if seen.shelved and not seen.version.withdrawn:
                    seen.shelved = False
                    new.append((signature, path))
                continue
            if seen is not None and seen.version.askable:  # the engine has a copy, which serves on until it is checked
                seen.version.doubtful = True
                self._seen[path] = _Seen(signature, seen.version, seen.small)
            else:
                self._seen[path] = _Seen(signature, self._anew(path, seen))
            new.append((signature, path))
        # By the time they came to be where they are. The clock may be wrong: then the order is, nothing else.
        newest_first = sorted(new, key=lambda one: max((part[2] for part in one[0]), default=0), reverse=True)
        fresh = {path: None for _, path in newest_first}
        self._waiting = [*fresh, *(path for path in self._waiting if path not in fresh)]
        self._looked = True

    def _anew(self, path: Path, seen: _Seen | None) -> Version:
        """A version to be checked in place of the one that the folder held."""
        if seen is not None:
            self.fleet.forget(seen.version)
        return self.fleet.found(_plain(f"{path.parent.name}@{path.name}"), None)

    async def _check(self, path: Path, seen: _Seen) -> None:
        """Check a version; leaves it to a later check where the folder changes or vanishes meanwhile."""
        version = seen.version
        try:
            small = await asyncio.to_thread(_small, path)
            adapter: Adapter = await asyncio.to_thread(read, path)
        except AdapterError as error:
            if self._seen.get(path) is seen:
                self._fail(version, str(error).replace(f"{self.root}{os.sep}", ""))
            return
        reason = await asyncio.to_thread(objection, adapter, self.root, self.rules)
        reason = reason or await asyncio.to_thread(not_finite, adapter.path)
        if self._seen.get(path) is not seen:
            return
        if not version.checked:
            version.adapter = adapter
        if reason:
            return self._fail(version, reason)
        if version.checked:
            if not version.problem and small == seen.small:  # the files were touched, and are what they were
                version.doubtful = False
                return
            version = seen.version = self._anew(path, seen)
            version.adapter = adapter
        if version.withdrawn:  # it is tried out when a person takes it back into service
            seen.shelved = True
            return
        try:
            await self.fleet.try_out(version)
            reason = await canary.objection(self.client, adapter, self.fleet.base_name, self._base_logprobs)
        except UnavailableError:
            raise
        except UserError as error:
            reason = str(error)
        if self._seen.get(path) is not seen:
            return
        if reason:
            return self._fail(version, reason)
        seen.small = small
        version.note = "" if adapter.card.canary else NO_CANARY
        self.fleet.passed(version)
        self.say(f"  serving  {version.ref} ({adapter.card.algorithm})")

    def _fail(self, version: Version, reason: str) -> None:
        reason = _plain(reason.replace("\n", " "))
        self.fleet.quarantine(version, reason)
        self.say(f"  refused  {version.ref}: {reason}")


def _small(path: Path) -> str:
    """A hash of the small files; what cannot be read is left out, and reading the adapter says so where it matters."""
    digest = hashlib.sha256()
    for name in SMALL:
        with contextlib.suppress(OSError):
            digest.update(f"{name}:{sha256_file(path / name)}\n".encode())
    return digest.hexdigest()


def _signatures(root: Path) -> dict[Path, Signature]:
    """What each version's served files look like from outside: a changed one has another size, time or inode."""
    found: dict[Path, Signature] = {}
    for _, _, path in version_folders(root):
        files = []
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name not in SMALL and not entry.name.endswith(".safetensors"):
                        continue
                    try:
                        stat = entry.stat()
                    except OSError:  # a link to nowhere
                        stat = entry.stat(follow_symlinks=False)
                    files.append((entry.name, stat.st_size, stat.st_mtime_ns, stat.st_ino))
        except OSError:
            pass  # vanished, or unreadable: reading it will say so
        found[path] = tuple(sorted(files))
    return found


def _plain(text: str) -> str:
    """Text that can be shown and sent: folders may have any name, with line breaks or bytes that are no text at all."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
