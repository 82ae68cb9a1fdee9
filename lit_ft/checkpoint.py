"""Checkpoint files: written whole or not at all, the one before kept; which one a run resumes from, and whether it may.

Beside `last.ckpt` lies `last-1.ckpt`, the one before it.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from lit_ft.errors import UserError
from lit_ft.progress import say


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes beside, flushes, renames; keeps the checkpoint before; goes on training where the disk is full."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replace `path` by `checkpoint`, or leave it as it was and say why."""
        path = Path(path)
        beside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.stem == "last" and path.exists():
                _replace_by_link(path, before(path))
            beside.replace(path)
        except (OSError, RuntimeError) as error:  # RuntimeError: what torch makes of a full disk
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            kept = f"the one before stays: {path}" if path.exists() else "there is none yet"
            reason = getattr(error, "strerror", None) or "the file could not be written"
            say(f"checkpoint of step {checkpoint.get('global_step')} was not written ({reason}); {kept}.")
        finally:
            beside.unlink(missing_ok=True)


def before(path: Path) -> Path:
    """Where the checkpoint before `path` lies."""
    return path.with_name(f"{path.stem}-1{path.suffix}")


def _replace_by_link(path: Path, target: Path) -> None:
    """Let `target` be what `path` is now, with no moment at which neither is there."""
    beside = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        os.link(path, beside)
        beside.replace(target)
    except OSError:  # a file system without links: for a moment only the one before is there
        path.replace(target)
    finally:
        beside.unlink(missing_ok=True)


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from.

    Attributes:
        path: the file.
        parent: the adapter that its run began with, or None for the base.
        identity: what the run was: algorithm, model, data and what else must not change.
        before: held-out metrics before its first step.
        step: optimizer steps taken.
    """

    path: Path
    parent: str | None
    identity: dict[str, str]
    before: dict[str, float]
    step: int

    def must_be(self, identity: Mapping[str, str]) -> None:
        """Raise UserError if this checkpoint is of another run than `identity` describes."""
        if changed := sorted(key for key in identity if self.identity.get(key) != identity[key]):
            raise UserError(
                f"{self.path} is of another run: {', '.join(changed)} changed since. Repeat the command with which it "
                "was begun, with resume=last, or leave resume out to begin anew."
            )


def find_checkpoint(resume: str | None, runs: Path, algorithm: str) -> Resumed | None:
    """The checkpoint that `resume` names: None, a file, a run's folder, or `last`.

    `last` is the newest unfinished run of `algorithm` in `runs`; a finished run leaves no last checkpoint.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if resume is None:
        return None
    if resume == "last":
        found = sorted(runs.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in found:
            resumed = read_checkpoint(path)
            if resumed.identity.get("algorithm") == algorithm:
                return resumed
        raise UserError(f"resume=last: no unfinished {algorithm} run in {runs} has left a checkpoint.")
    path = Path(resume).expanduser()
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"resume={resume}: there is no checkpoint {path}.")
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> Resumed:
    """What `path` says of its run.

    Raises:
        UserError: it is no checkpoint of lit_ft, or was cut short; the one before it is named if that can be read.
    """
    try:
        return _read(path)
    except Exception as error:
        advice = "Give another with resume=PATH."
        with contextlib.suppress(Exception):
            step = _read(before(path)).step
            advice = f"The one before it is whole (step {step}): resume={before(path)}"
        raise UserError(
            f"{path} is not a readable checkpoint of lit_ft ({type(error).__name__}): it may have been cut short. "
            + advice
        ) from error


def _read(path: Path) -> Resumed:
    whole: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    own = whole["lit_ft"]
    return Resumed(path.resolve(), own["parent"], dict(own["identity"]), dict(own["before"]), whole["global_step"])
