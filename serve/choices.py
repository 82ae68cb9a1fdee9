"""What people chose on the Adapters page (pins, retirements, the default), kept over restarts in one small file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass
class Choices:
    """Versions by their full names. Those of versions that are gone are kept: they may come back."""

    path: Path | None = None
    pinned: set[str] = field(default_factory=set)
    retired: set[str] = field(default_factory=set)
    default: str | None = None

    @classmethod
    def read(cls, path: Path | None) -> Choices:
        """From its file, where there is one that can be read."""
        found = cls(path)
        if path is None:
            return found
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found.pinned, found.retired = set(map(str, values["pinned"])), set(map(str, values["retired"]))
            found.default = None if values["default"] is None else str(values["default"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            logger.warning("%s cannot be read (%r): pins, retirements and the default are forgotten.", path, error)
            return cls(path)
        return found

    def write(self) -> None:
        """Beside its place, then renamed; where that fails they hold until the server ends."""
        if self.path is None:
            return
        values = {"pinned": sorted(self.pinned), "retired": sorted(self.retired), "default": self.default}
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            beside.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            beside.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink()
            logger.warning(
                "Pins, retirements and the default hold until the server ends: %s cannot be written (%s).",
                self.path,
                error.strerror or error,
            )
