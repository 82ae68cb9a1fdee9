"""The engine's own copies of adapters: what happens to a published folder later cannot reach a running engine.

vLLM reads an adapter again whenever it has dropped it from its cache, inside a step, and a folder that is gone or
changed by then can end the whole engine. So it is given a copy, whose hash is checked while it is made.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Protocol

from lit_ft.adapter import ADAPTER_WEIGHTS, Adapter
from lit_ft.errors import UserError
from serve.errors import UnavailableError

CONFIG = "adapter_config.json"
CHUNK = 1 << 20


class Loads(Protocol):
    """The part of the engine's client that loads adapters."""

    async def load(self, ref: str, path: Path) -> None: ...

    async def unload(self, ref: str) -> None: ...


class ChangedError(UserError):
    """The folder does not hold what was published there."""


class Snapshots:
    """Loads copies of adapters into the engine, and removes them once it has let go of them."""

    def __init__(self, client: Loads, folder: Path) -> None:
        """`folder` is this server's alone; what an earlier server left there is removed."""
        self._client = client
        self.folder = folder.resolve()
        self._paths: dict[str, Path] = {}
        shutil.rmtree(self.folder, ignore_errors=True)

    async def load(self, adapter: Adapter) -> None:
        """Copy and load.

        Raises:
            ChangedError: the weights are not those of the card.
            UnavailableError: there is no room for the copy now, or the engine is gone.
            UserError: they cannot be read, or the engine refuses them.
        """
        path = await asyncio.to_thread(self._take, adapter)
        try:
            await self._client.load(adapter.ref, path)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        self._paths[adapter.ref] = path

    async def unload(self, ref: str) -> None:
        """Have the engine let go of it, then remove the copy."""
        await self._client.unload(ref)
        if path := self._paths.pop(ref, None):
            await asyncio.to_thread(shutil.rmtree, path, True)

    def clear(self) -> None:
        """No engine runs: remove all copies."""
        self._paths.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take(self, adapter: Adapter) -> Path:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A new place each time: never the path of something that the engine has known before.
            target = Path(tempfile.mkdtemp(prefix=f"{adapter.ref}-", dir=self.folder))
        except OSError as error:
            raise UnavailableError(f"No copy can be made in {self.folder}: {error.strerror or error}.") from error
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
