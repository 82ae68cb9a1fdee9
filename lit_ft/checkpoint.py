"""Which checkpoint a run resumes from, and whether it is one of the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_ft.errors import UserError


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from.

    Attributes:
        path: the file.
        parent: the adapter that its run began with, or None for the base.
        identity: what the run was: algorithm, model, data and what else must not change.
        before: held-out metrics before its first step.
    """

    path: Path
    parent: str | None
    identity: dict[str, str]
    before: dict[str, float]

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
        UserError: it is no checkpoint of lit_ft, or was cut short.
    """
    try:
        own: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["lit_ft"]
        return Resumed(path.resolve(), own["parent"], dict(own["identity"]), dict(own["before"]))
    except Exception as error:
        raise UserError(
            f"{path} is not a readable checkpoint of lit_ft ({type(error).__name__}): it may have been cut short. "
            "Give another with resume=PATH."
        ) from error
