"""What a run begins with: the base, or a published adapter that its kind goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_ft import adapter as folder
from lit_ft.adapter import Adapter
from lit_ft.checkpoint import Resumed
from lit_ft.config import Algorithm, Config, trains_on_votes
from lit_ft.errors import UserError
from lit_ft.models.kinds import AdapterKind
from lit_ft.models.resolve import model_fingerprint
from lit_ft.progress import say
from lit_ft.wiring.checks import ONLINE


def starting_adapter(cfg: Config, kind: AdapterKind, resumed: Resumed | None) -> Adapter | None:
    """The adapter that training begins with, or None for the base.

    Raises:
        UserError: it is not there, is a judge, or is of another base.
    """
    adapters = Path(cfg.adapters)
    if resumed is not None:
        # What the interrupted run began with, even if newer adapters were published meanwhile.
        return folder.find(adapters, resumed.parent) if resumed.parent else None
    if cfg.start_from == "none":
        return None
    if cfg.start_from == "auto":
        if cfg.algorithm.kind in (Algorithm.sft, Algorithm.reward):
            return None
        both = trains_on_votes(cfg) or cfg.algorithm.kind in ONLINE
        start = newest(adapters, cfg.name, ("sft", "dpo") if both else ("sft",), kind)
    else:
        start = folder.find(adapters, cfg.start_from)
    if start is not None and start.card.algorithm == "reward":
        raise UserError(
            f"{start.ref} is a judge, which cannot go on as anything else: give another start_from, or start_from=none."
        )
    if start is not None and not cfg.model.tiny and start.card.base.hash != model_fingerprint(cfg.model.id):
        raise UserError(
            f"{start.ref} was trained on {start.card.base.id}, and model.id={cfg.model.id} is another model. "
            "Choose that model, another name, or start_from=none."
        )
    return start


def newest(adapters: Path, name: str, algorithms: Sequence[str], kind: AdapterKind) -> Adapter | None:
    """The newest readable version of `name` that one of `algorithms` made and `kind` goes on from.

    Says what it passes over; several versions that cannot be gone on from share a line with the newest one's reason.
    """
    left: list[str] = []
    found, reason = None, ""
    for _, _, path in reversed(folder.version_folders(adapters, name)):
        try:
            one = folder.read(path)
            why_not = kind.why_not_from(path) if one.card.algorithm in algorithms else None
        except UserError as error:
            say(f"left out   {error}")
            continue
        if one.card.algorithm not in algorithms:
            continue
        if why_not is None:
            found = one
            break
        left.append(one.ref)
        reason = reason or why_not
    if left:
        older = f" (and {', '.join(left[1:])})" if left[1:] else ""
        say(f"left out   {left[0]}{older} {reason}")
    return found
