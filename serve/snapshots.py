"""The engine's own copies of adapters: what happens to a published folder later cannot reach a running engine.

vLLM reads an adapter again whenever it has dropped it from its cache, inside a step, and a folder that is gone or
changed by then can end the whole engine. So it is given a copy, whose hash is checked while it is made.

An unload takes the name from vLLM's API server; its engine process is not told, and nobody hears when it has done the
last step with that adapter. Since no new request can name the copy, it is let lie for a time that no step takes.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import shutil
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Protocol

from lit_ft.adapter import ADAPTER_WEIGHTS, Adapter
from lit_ft.errors import UserError
from serve.errors import UnavailableError

CONFIG = "adapter_config.json"
CHUNK = 1 << 20

DELAY_S = 120.0
"""How long a copy is kept after the engine was told to let go of it."""


class Loads(Protocol):
    """The part of the engine's client that loads adapters."""

    async def load(self, ref: str, path: Path) -> None: ...

    async def unload(self, ref: str) -> None: ...


class ChangedError(UserError):
    """The folder does not hold what was published there."""


class Snapshots:
    """Loads copies of adapters into the engine, and removes them some time after it was told to let go of them."""

    def __init__(self, client: Loads, folder: Path) -> None:
        """`folder` is this server's alone; what an earlier server left there is removed."""
        self._client = client
        self.folder = folder.resolve()
        self._paths: dict[str, Path] = {}
        self._left: deque[tuple[float, Path]] = deque()
        """Copies that are let lie, with the time since when."""

        shutil.rmtree(self.folder, ignore_errors=True)

    async def load(self, adapter: Adapter) -> None:
        """Copy and load.

        Raises:
            ChangedError: the weights are not those of the card.
            UnavailableError: there is no room for the copy now, or the engine is gone.
            UserError: they cannot be read, or the engine refuses them.
        """
        await self._sweep()
        path = await asyncio.to_thread(self._take, adapter)
        try:
            await self._client.load(adapter.ref, path)
        except BaseException as error:
            if isinstance(error, UserError) and not isinstance(error, UnavailableError):
                shutil.rmtree(path, ignore_errors=True)  # refused, so it does not hold it
            else:
                self._leave(path)
            raise
        self._paths[adapter.ref] = path

    async def unload(self, ref: str) -> None:
        """Have the engine let go of it; the copy is removed `DELAY_S` later, or by `clear`."""
        await self._client.unload(ref)
        if path := self._paths.pop(ref, None):
            self._leave(path)
        await self._sweep()

    def clear(self) -> None:
        """No engine runs: remove all copies."""
        self._paths.clear()
        self._left.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _leave(self, path: Path) -> None:
        self._left.append((time.monotonic(), path))
        loop = asyncio.get_running_loop()
        loop.call_later(DELAY_S, lambda: loop.run_in_executor(None, _remove, self._due()))

    def _due(self) -> list[Path]:
        """Those that have lain long enough, and are now forgotten."""
        found = []
        while self._left and time.monotonic() - self._left[0][0] >= DELAY_S:
            found.append(self._left.popleft()[1])
        return found

    async def _sweep(self) -> None:
        if due := self._due():
            await asyncio.to_thread(_remove, due)

    def _take(self, adapter: Adapter) -> Path:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A new place each time: never the path of something that the engine has known before.
            target = Path(tempfile.mkdtemp(prefix=f"{adapter.ref}-", dir=self.folder))
        except OSError as error:
            raise UnavailableError(f"No copy for the engine can be made: {error.strerror or error}.") from error
        try:
            (target / CONFIG).write_bytes((adapter.path / CONFIG).read_bytes())
            digest = hashlib.sha256()
            with (adapter.path / ADAPTER_WEIGHTS).open("rb") as source, (target / ADAPTER_WEIGHTS).open("wb") as copy:
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    copy.write(chunk)
        except OSError as error:
            shutil.rmtree(target, ignore_errors=True)
            # A full disk passes; a file that cannot be read is the folder's own matter.
            kind = UnavailableError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else UserError
            raise kind(f"{adapter.ref} cannot be copied for the engine: {error.strerror or error}.") from error
        if digest.hexdigest() != adapter.card.weights_sha256:
            shutil.rmtree(target, ignore_errors=True)
            raise ChangedError(
                f"The weights of {adapter.ref} are not those that were published (SHA-256 differs from the card). "
                "Publish it again, as a new version."
            )
        return target


def _remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
