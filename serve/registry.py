"""Which published adapters a server can serve, and for each of the others the reason why not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_ft.adapter import Adapter, Broken
from serve.origin import on_a_local_model
from serve.votes import HUMAN

# The largest rank that vLLM 0.32 accepts for --max-lora-rank.
ENGINE_MAX_RANK = 512

MIN_RANK = 16
"""Room made for adapters that are published later, where none is there yet: the rank that `peft=lora` trains."""

# The name becomes a model name in requests and text on a page: no slashes, no leading dot, nothing odd.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Rules:
    """What one server can serve; fixed when its engine starts."""

    base_hash: str
    """The fingerprint of its base."""

    max_rank: int
    """The largest LoRA rank that it made room for."""

    template: str | None
    """The chat template that it applies to every request; None where there is none."""

    template_of: str
    """Whose that is, for a sentence: `support@v2`, or `the base`."""

    base_name: str = "base"
    """The base's name in requests, which no adapter may have."""


def rules_for(
    folders: Iterable[Adapter | Broken], root: Path, base_hash: str, base_template: str | None, max_rank: int | None
) -> Rules:
    """The rules under which the newest adapter can be served, and as many others as possible.

    Args:
        folders: what `lit_ft.adapter.scan` found; the weights need not have been verified.
        root: the folder that was scanned.
        base_hash: the fingerprint of the base model that will be served.
        base_template: the base's own chat template.
        max_rank: the largest LoRA rank to make room for; None makes room for those found, and for MIN_RANK.
    """
    open_to_all = Rules(base_hash, ENGINE_MAX_RANK if max_rank is None else max_rank, None, "")
    adapters = [found for found in folders if isinstance(found, Adapter)]
    fit = sorted((one for one in adapters if next(_objections(one, root, open_to_all), None) is None), key=newest_first)
    rank = max_rank if max_rank is not None else max([MIN_RANK, *(_rank(one) or 0 for one in fit)])
    # The newest decides, since it is the one that the page offers first.
    for adapter in fit:
        if (template := chat_template(adapter)) is not None:
            return Rules(base_hash, rank, template, adapter.ref)
    return Rules(base_hash, rank, base_template, "the base")


def objection(adapter: Adapter, root: Path, rules: Rules) -> str:
    """Why a server under these rules must not serve it, in a sentence for whom published it; empty if it may."""
    reason = next(_objections(adapter, root, rules), None)
    template = chat_template(adapter)
    if reason is None and template is not None and template != rules.template:
        reason = (
            f"It was trained with another chat template than {rules.template_of}, and a server has one template for "
            "all: with the wrong one its answers would suffer. Put it into an adapters folder of its own and serve "
            "that with a second server: python -m serve adapters=FOLDER port=7861."
        )
    return reason or ""


def template_in(folder: Path) -> str | None:
    """The chat template in a model's or adapter's folder, where transformers keeps it; None if there is none."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError):
        pass
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = config.get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return template if isinstance(template, str) else None


def chat_template(adapter: Adapter) -> str | None:
    """The template that the adapter was trained with; None where it brings none."""
    return template_in(adapter.path)


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


def _objections(adapter: Adapter, root: Path, rules: Rules) -> Iterator[str]:
    card = adapter.card
    if adapter.name in (rules.base_name, HUMAN):
        what = "the base itself" if adapter.name == rules.base_name else "replies that people wrote"
        yield f"The name {adapter.name!r} stands for {what} here. Publish it under another name (name=NAME)."
    if not NAME.fullmatch(adapter.name) or not _named_as_its_folder(adapter):
        yield (
            f"Its card names it {adapter.ref!r}, but its folder is {adapter.path.parent.name}/{adapter.path.name}; "
            "names are letters, digits, '.', '_' and '-', and must be those of the folder. Publish it again."
        )
        return
    try:
        inside = [adapter.path, *adapter.path.iterdir()] if adapter.path.is_dir() else [adapter.path]
    except OSError as error:
        yield f"Its folder cannot be read: {error.strerror or error}."
        return
    # Not Path.resolve, which raises on links in a circle.
    if not all(Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)) for path in inside):
        yield "It is, or holds, a link that leads out of the adapters folder. Copy the files there instead."
    if not card.servable:
        yield card.not_servable_reason or "Its card says that it cannot be served as an adapter; it gives no reason."
    if card.base.hash != rules.base_hash:
        if on_a_local_model(adapter):
            which, remedy = (
                f"the local model {card.base.id!r}",
                "Give that model's folder with model=FOLDER to serve it",
            )
        else:
            which, remedy = card.base.id, f"Serve it with model={card.base.id}"
        yield (
            f"It was trained on another base: {which} ({_short(card.base.hash)}), "
            f"while this one is {_short(rules.base_hash)}. {remedy}."
        )
    config = _config(adapter)
    rank, limit = _rank(adapter), min(rules.max_rank, ENGINE_MAX_RANK)
    if rank is None:
        yield "Its adapter_config.json gives no rank that can be read. Publish it again."
    elif rank > limit:
        remedy = f"Start with max_lora_rank={rank}" if rank <= ENGINE_MAX_RANK else "Train a smaller rank or merge it"
        yield f"Its rank {rank} is above the maximum of {limit}. {remedy}."
    for key, fine, what in _REFUSED_BY_ENGINE:
        if config.get(key) not in fine:
            given = f"{key}={json.dumps(config[key])}"
            yield f"vLLM does not serve {what} ({given}). Merge it into its base, or train without."


# What vLLM 0.32 refuses, or computes without: the key of adapter_config.json, the values that are fine, a name.
_REFUSED_BY_ENGINE: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("peft_type", ("LORA", None), "adapters other than LoRA"),
    ("use_dora", (False, None), "DoRA"),
    ("bias", ("none", None), "trained biases"),
    ("modules_to_save", (None, []), "whole modules trained beside the adapter"),
    ("alora_invocation_tokens", (None, []), "activated LoRA"),
    ("lora_bias", (False, None), "biases of factors"),
    ("trainable_token_indices", (None, [], {}), "embeddings of single tokens"),
    ("layer_replication", (None, []), "layers used several times"),
    ("use_bdlora", (False, None, {}), "block-diagonal factors"),
    ("use_qalora", (False, None), "factors made for a quantized base"),
    (
        "init_lora_weights",
        (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga"),
        "adapters that change their base",
    ),
)


def _config(adapter: Adapter) -> dict[str, Any]:
    try:
        config = json.loads((adapter.path / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _rank(adapter: Adapter) -> int | None:
    """The largest rank of any layer: what the engine must make room for. The card's number is only the usual one."""
    config = _config(adapter)
    try:
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values(), adapter.card.rank or 0]
        return max(int(rank) for rank in ranks)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _named_as_its_folder(adapter: Adapter) -> bool:
    return (adapter.name, f"v{adapter.version}") == (adapter.path.parent.name, adapter.path.name)


def _short(digest: str) -> str:
    """Enough of a hash to tell two apart at a glance."""
    return digest[:15]
