"""What an exported folder says of itself: a model card, and for a plain LoRA that is to be served a card.json."""

from __future__ import annotations

import dataclasses
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lit_ft.adapter import CARD, Base, Card, as_json, check_name, model_card, weights_sha256
from lit_ft.errors import UserError
from lit_ft.exporting.source import Source, hub_id

_VERSION = re.compile(r"v([1-9][0-9]{0,8})")


def as_published(output: Path) -> tuple[str, int] | None:
    """NAME and N where `output` is a place NAME/vN, as published adapters have it."""
    path = Path(os.path.abspath(output.expanduser()))  # noqa: PTH100
    version = _VERSION.fullmatch(path.name)
    if version is None:
        return None
    try:
        return check_name(path.parent.name), int(version.group(1))
    except UserError:
        return None


def write_card(
    folder: Path,
    source: Source,
    ref: tuple[str, int],
    base: Base,
    *,
    converted: str,
    rank: int | None,
    canary: Any,
    metrics: bool,
) -> None:
    """Write card.json and README.md of a plain LoRA that stands as `ref`.

    Args:
        folder: where its weights lie already.
        source: what it was made of.
        ref: name and version.
        base: what it belongs to.
        converted: what was done, in words.
        rank: of the LoRA.
        canary: see `lit_ft.adapter.Canary`, or None.
        metrics: whether what was measured in training still holds.
    """
    changes: dict[str, Any] = {
        "name": ref[0],
        "version": ref[1],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": base,
        "peft": "lora",
        "rank": rank,
        "parent": source.name,
        "weights_sha256": weights_sha256(folder),
        "servable": True,
        "not_servable_reason": None,
        "canary": canary,
        "converted": converted,
    }
    if source.card is None:
        card = Card(algorithm="imported", data=[], metrics={}, versions={}, **changes)
    else:
        if not metrics:
            changes["metrics"] = {}
        card = dataclasses.replace(source.card, **changes)
    (folder / CARD).write_text(as_json(card), encoding="utf-8")
    (folder / "README.md").write_text(model_card(card), encoding="utf-8")


def write_readme(folder: Path, source: Source, library: str | None, text: str) -> None:
    """Write a model card that says in `text` what the folder holds."""
    (folder / "README.md").write_text(readme(source, library, text), encoding="utf-8")


def readme(source: Source, library: str | None, text: str) -> str:
    """A model card in the Hub's form; the base is named only by an id that the Hub knows."""
    base = hub_id(source.base_name)
    head = [f"base_model: {base}"] if base else []
    head += [f"library_name: {library}"] if library else []
    head += ["pipeline_tag: text-generation", "tags: [lit_ft]"]
    trained = ""
    if source.card is not None:
        card = source.card
        trained = f"{card.algorithm.upper()} ({card.peft}) on `{card.base.id}`, published {card.created}.\n\n"
    lines = "\n".join(head)
    return f"---\n{lines}\n---\n\n# {source.name}\n\n{trained}{text}\n"
