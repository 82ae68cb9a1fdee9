"""Completions kept on disk under a key of all they depend on, so that they are drawn once."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path

from lit_ft.rollouts.base import Rollout


def read_kept(folder: Path, key: str, prompts: Sequence[tuple[int, ...]]) -> list[list[Rollout]] | None:
    """The completions of `prompts` under `key`; None if there are none, or what is there is cut or foreign."""
    try:
        kept = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        return [
            [Rollout(prompt, tuple(ids), bool(ended)) for ids, ended in rows]
            for prompt, rows in zip(prompts, kept, strict=True)
        ]
    except (OSError, ValueError, TypeError):
        return None


def write_kept(folder: Path, key: str, found: Sequence[Sequence[Rollout]]) -> None:
    """Keep the completions of each prompt under `key`, whole or not at all; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{key}-{uuid.uuid4().hex[:8]}"
    try:
        beside.write_text(json.dumps([[(r.completion, r.ended) for r in rows] for rows in found]), encoding="utf-8")
        beside.replace(folder / f"{key}.json")
    finally:
        beside.unlink(missing_ok=True)
