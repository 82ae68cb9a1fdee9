"""Which of the published adapters this base can serve, and for each of the others the reason why not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_ft.adapter import Adapter, Broken
from serve.origin import on_a_local_model

# The largest rank that vLLM 0.32 accepts for --max-lora-rank.
ENGINE_MAX_RANK = 512

# The name becomes a model name in requests and text on a page: no slashes, no leading dot, nothing odd.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Refused:
    """An adapter that is not served."""

    ref_or_path: str
    """`support@v3` where the card could be trusted for that, else the folder."""

    reason: str
    """A sentence for the person who published it."""


@dataclass(frozen=True)
class Survey:
    """Every adapter folder found, in one of two lists."""

    served: list[Adapter]
    """Newest first."""

    refused: list[Refused]


def judge(folders: Iterable[Adapter | Broken], adapters_root: Path, base_hash: str, max_rank: int | None) -> Survey:
    """Sort scanned folders into served and refused; no single bad one stops the others.

    Args:
        folders: what `lit_ft.adapter.scan` found (it hashes all weights, so it is done once, by the caller).
        adapters_root: the folder that was scanned.
        base_hash: the fingerprint of the base model that will be served.
        max_rank: the largest LoRA rank to make room for; None means as large as the engine can.
    """
    served: list[Adapter] = []
    refused: list[Refused] = []
    for found in folders:
        if isinstance(found, Broken):
            refused.append(Refused(_relative(found.path, adapters_root), found.reason))
            continue
        reason = next(_objections(found, adapters_root, base_hash, max_rank), None)
        if reason is None:
            served.append(found)
        elif _named_as_its_folder(found):
            refused.append(Refused(found.ref, reason))
        else:
            refused.append(Refused(_relative(found.path, adapters_root), reason))
    served.sort(key=newest_first)
    # The newest decides, since it is the one that the page offers first.
    alike = [one for one in served if chat_template(one) == chat_template(served[0])]
    refused += [Refused(one.ref, _other_template(served[0])) for one in served if one not in alike]
    return Survey(alike, refused)


def chat_template(adapter: Adapter) -> bytes | None:
    """The template that the adapter was trained with; None where it brings none."""
    try:
        return (adapter.path / "chat_template.jinja").read_bytes()
    except OSError:
        return None


def _other_template(newest: Adapter) -> str:
    return (
        f"It was trained with another chat template than {newest.ref}, the newest one here, and a server has one "
        "template for all: with the wrong one its answers would suffer. Put it into an adapters folder of its own "
        "and serve that with a second server: python -m serve adapters=FOLDER port=7861."
    )


def newest_first(adapter: Adapter) -> tuple[float, str, int]:
    """Sort key. ISO 8601 may come with any offset, so compare instants; an unreadable date is the oldest."""
    from datetime import UTC, datetime

    try:
        created = datetime.fromisoformat(adapter.card.created)
    except ValueError:
        return (0.0, adapter.name, -adapter.version)
    if created.tzinfo is None:
        created = created.replace(tzinfo=UTC)
    return (-created.timestamp(), adapter.name, -adapter.version)


def _objections(adapter: Adapter, root: Path, base_hash: str, max_rank: int | None) -> Iterator[str]:
    card = adapter.card
    if not NAME.fullmatch(adapter.name) or not _named_as_its_folder(adapter):
        yield (
            f"Its card names it {adapter.ref!r}, but its folder is {adapter.path.parent.name}/{adapter.path.name}; "
            "names are letters, digits, '.', '_' and '-', and must be those of the folder. Publish it again."
        )
        return
    if not adapter.path.resolve().is_relative_to(root.resolve()):
        yield "Its folder is a link that leads out of the adapters folder. Copy the files there instead."
    if not card.servable:
        yield card.not_servable_reason or "Its card says that it cannot be served as an adapter; it gives no reason."
    if card.base.hash != base_hash:
        if on_a_local_model(adapter):
            which, remedy = (
                f"the local model {card.base.id!r}",
                "Give that model's folder with model=FOLDER to serve it",
            )
        else:
            which, remedy = card.base.id, f"Serve it with model={card.base.id}"
        yield (
            f"It was trained on another base: {which} ({_short(card.base.hash)}), "
            f"while this one is {_short(base_hash)}. {remedy}."
        )
    rank, limit = _rank(adapter), ENGINE_MAX_RANK if max_rank is None else min(max_rank, ENGINE_MAX_RANK)
    if rank is None:
        yield "Its adapter_config.json gives no rank that can be read. Publish it again."
    elif rank > limit:
        remedy = f"Start with max_lora_rank={rank}" if rank <= ENGINE_MAX_RANK else "Train a smaller rank or merge it"
        yield f"Its rank {rank} is above the maximum of {limit}. {remedy}."


def _rank(adapter: Adapter) -> int | None:
    """The largest rank of any layer: what the engine must make room for. The card's number is only the usual one."""
    try:
        config = json.loads((adapter.path / "adapter_config.json").read_text(encoding="utf-8"))
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values(), adapter.card.rank or 0]
        return max(int(rank) for rank in ranks)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _named_as_its_folder(adapter: Adapter) -> bool:
    return (adapter.name, f"v{adapter.version}") == (adapter.path.parent.name, adapter.path.name)


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _short(digest: str) -> str:
    """Enough of a hash to tell two apart at a glance."""
    return digest[:15]
