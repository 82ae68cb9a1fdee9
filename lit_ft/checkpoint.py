"""Checkpoint files: written whole or not at all, the one before kept; which one a run resumes from, and whether it may.

Beside `last.ckpt` lies `last-1.ckpt`, the one before it. A name with a dot in front is one that is being written.
"""

from __future__ import annotations

import contextlib
import os
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from lit_ft.errors import UserError
from lit_ft.progress import say

# What torch or zipfile say of such a file is about pickles and archives.
_CUT_SHORT = "it is no checkpoint of lit_ft, or was cut short"


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes beside, flushes, renames; keeps the checkpoint before; goes on training where the disk is full."""

    def __init__(self) -> None:
        super().__init__()
        self._cleared: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replace `path` by `checkpoint`, or leave it as it was and say why."""
        path = Path(path)
        beside = _beside(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._clear(path.parent)
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            # One that was cut short must not take the place of the one before it, from which this run may come.
            if path.stem == "last" and zipfile.is_zipfile(path):
                _replace_by_link(path, before(path))
            beside.replace(path)
        except (OSError, RuntimeError) as error:
            if (reason := _reason(error)) is None:
                raise
            there = next((one for one in (path, before(path)) if one.exists()), None)
            kept = f"the one before stays: {there}" if there else "there is none yet"
            say(f"{path.name} of step {checkpoint.get('global_step')} was not written ({reason}); {kept}.")
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)

    def _clear(self, folder: Path) -> None:
        """Remove what a process left there that was killed while it wrote."""
        if folder not in self._cleared:
            self._cleared.add(folder)
            for left in folder.glob(".*.ckpt-*"):
                with contextlib.suppress(OSError):
                    left.unlink()


def _beside(path: Path) -> Path:
    """A fresh name under which `path` is written."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")


def _reason(error: BaseException) -> str | None:
    """What the system said against writing, or None if `error` is about something else.

    Of a full disk torch makes a RuntimeError about positions in the file, with the system's own behind it, or none.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen.strerror or str(seen)
        seen = seen.__cause__ or seen.__context__
    from_writer = any(words in str(error) for words in ("PytorchStreamWriter", "inline_container"))
    return "the file could not be written; is the disk full?" if from_writer else None


def before(path: Path) -> Path:
    """Where the checkpoint before `path` lies."""
    return path.with_name(f"{path.stem}-1{path.suffix}")


def _replace_by_link(path: Path, target: Path) -> None:
    """Let `target` be what `path` is now, with no moment at which neither is there."""
    beside = _beside(target)
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
        found = {path for folder in runs.glob("*/checkpoints") if (path := _newest(folder)).exists()}
        for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
            resumed = read_checkpoint(path)
            if resumed.identity.get("algorithm") == algorithm:
                return resumed
        raise UserError(f"resume=last: no unfinished {algorithm} run in {runs} has left a checkpoint.")
    path = Path(resume).expanduser()
    path = _newest(path / "checkpoints") if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"resume={resume}: there is no checkpoint {path}.")
    return read_checkpoint(path)


def _newest(folder: Path) -> Path:
    """The last checkpoint in `folder`, or the one before where the run was killed as it put another in its place."""
    last = folder / "last.ckpt"
    return before(last) if not last.exists() and before(last).exists() else last


def read_checkpoint(path: Path) -> Resumed:
    """What `path` says of its run.

    Raises:
        UserError: it is no checkpoint of lit_ft, or not as it was written; the one before it is named if that can be
            read.
    """
    try:
        return _read(path)
    except Exception as error:
        told = isinstance(error, (OSError, UserError))
        why = (getattr(error, "strerror", None) or str(error)) if told else _CUT_SHORT
        advice = "Give another with resume=PATH."
        with contextlib.suppress(Exception):
            step = _read(before(path)).step
            advice = f"The one before it is whole (step {step}): resume={before(path)}"
        raise UserError(f"{path} cannot be resumed from: {why}. {advice}") from error


def _read(path: Path) -> Resumed:
    # torch reads what it finds; only the checksums beside the tensors tell whether it is what was written.
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise UserError("it is damaged: its checksums do not fit")
    whole: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    own = whole["lit_ft"]
    return Resumed(path.resolve(), own["parent"], dict(own["identity"]), dict(own["before"]), whole["global_step"])
