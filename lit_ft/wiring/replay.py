"""The base's own answers as a run's settings ask for them: to mix in, and to hold the policy to the base."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_ft.adapter import DataSource
from lit_ft.batches import Example
from lit_ft.config import Config, Prompts, Replay
from lit_ft.data.chat import ChatEncoder
from lit_ft.data.datamodule import Prepared, load_examples, mixed
from lit_ft.distributed.processes import agree
from lit_ft.errors import UserError
from lit_ft.models.kinds import KINDS, AdapterKind
from lit_ft.models.resolve import cache_folder
from lit_ft.modules.anchor import Anchor
from lit_ft.progress import say
from lit_ft.replay import base_answers
from lit_ft.wiring.checks import ANCHORED
from lit_ft.wiring.place import Place


@dataclass(frozen=True)
class Replayed:
    """The base's own answers as a run's settings ask for them.

    Attributes:
        mixed: rows to mix into the training rows, or None.
        trained, held_out: rows to hold the policy to the base with, and to measure how far it went.
        identity: what a resumed run must have in common with this one.
    """

    mixed: Prepared | None = None
    trained: tuple[Example, ...] = ()
    held_out: tuple[Example, ...] = ()
    identity: Mapping[str, str] = field(default_factory=dict)

    def among(self, rows: Prepared, weight: float, seed: int) -> Prepared:
        """The training rows with the base's answers among them, as many as `weight` says."""
        return rows if self.mixed is None else mixed(rows, [(self.mixed, weight)], seed)


def replay(
    cfg: Config,
    kind: AdapterKind,
    encoder: ChatEncoder,
    task: Sequence[Example],
    answer: Callable[[list[tuple[int, ...]], bool], list[Example]],
) -> Replayed:
    """Have the base answer what the settings ask for; nothing if they ask for nothing.

    Args:
        cfg: says which.
        kind: of the adapter.
        encoder: of the prompts.
        task: the training rows.
        answer: makes the base's answers to prompts, given whether the base is what is left without the adapter.

    Raises:
        UserError: the prompts cannot be used.
    """
    mixes = cfg.replay.kind is Replay.self
    kl_coef = cfg.algorithm.kl_coef if cfg.algorithm.kind in ANCHORED else 0.0  # type: ignore[attr-defined]
    if not (mixes or kl_coef or cfg.trainer.kl_weight):
        return Replayed()
    # Kinds that leave no base below what they train begin with the base itself, and with nothing else.
    below = not (kind.whole_model or kind.changes_base)

    def answers(prompts: Sequence[Example]) -> list[Example]:
        asked = drawn(prompts, cfg.replay.max_prompts)
        if len(asked) < 2:
            raise UserError(
                f"replay.path={cfg.replay.path} gives {len(asked)} prompts, and one in four is left out of training: "
                "give more."
            )
        return answer(asked, below)

    identity: dict[str, str] = {}
    on_task = bool(kl_coef) and cfg.algorithm.kl_prompts is Prompts.task  # type: ignore[attr-defined]
    general: list[Example] = []
    if mixes or cfg.trainer.kl_weight or not on_task:
        prompts, _ = load_examples(
            cfg.replay.path,
            encoder,
            "prompt",
            val_split=0,
            max_length=cfg.data.max_length,
            max_dropped=cfg.data.max_dropped,
            room=cfg.replay.max_new_tokens,
        )
        general = answers(prompts.examples)
    own = general
    if on_task:
        room = cfg.data.max_length - cfg.replay.max_new_tokens
        own = answers([example for example in task if 0 < len(example.prompt) <= room])
        identity["replay.task"] = _hash(own)
    if general:
        identity["replay.general"] = _hash(general)
    parts = {"general prompts": general, "prompts of the task": own if on_task else []}
    said = " and ".join(f"{len(rows)} {name}" for name, rows in parts.items() if rows)
    say(f"replay     the base's own answers to {said}, one in four for measuring")
    measured = general or own
    return Replayed(
        mixed=_prepared(_trained(general), cfg.replay.path) if mixes else None,
        trained=tuple(_trained(own)) if kl_coef else (),
        held_out=tuple(measured[::4]) if below else (),
        identity=identity,
    )


def _trained(answers: Sequence[Example]) -> list[Example]:
    return [example for k, example in enumerate(answers) if k % 4]


def drawn(prompts: Sequence[Example], most: int) -> list[tuple[int, ...]]:
    """The token ids of at most `most` different prompts: whatever a run's seed the same, which are answered once."""
    different = list(dict.fromkeys(example.prompt for example in prompts))
    return random.Random("replay").sample(different, min(most, len(different)))


def _prepared(answers: Sequence[Example], prompts: str) -> Prepared:
    """The answers as rows of a source, which `prompts` names."""
    source = DataSource(f"the base's own answers to {prompts}", len(answers), f"sha256:{_hash(answers)}")
    return Prepared(list(answers), [source])


def _hash(answers: Sequence[Example]) -> str:
    return hashlib.sha256(repr([(e.prompt, e.completions[0].ids) for e in answers]).encode()).hexdigest()


def answers_of_base(
    cfg: Config, model: Any, tokenizer: Any, base_hash: str, place: Place, prompts: list[tuple[int, ...]], below: bool
) -> list[Example]:
    """What `replay` asks for, from the model before it is trained; the same in all processes."""
    # Random weights differ from run to run: their seed is part of what they are.
    tiny = [cfg.seed, cfg.model.id] if cfg.model.tiny else None
    precision = place.precision

    def make() -> list[Example]:
        return base_answers(
            model.to(place.device),
            tokenizer,
            prompts,
            max_new_tokens=cfg.replay.max_new_tokens,
            kept=cache_folder() / "replay",
            depends_on=[
                base_hash,
                tiny,
                precision.trainer,
                str(precision.weights),
                place.device.type,
                *(["4 bits"] if KINDS[cfg.peft.kind.value].quantized else []),
            ],
            below=below,
            autocast=precision.autocast,
        )

    return agree(make)


def make_anchor(cfg: Config, own: Replayed, batches: dict[str, Any]) -> Anchor | None:
    """What holds the policy to its base, or None."""
    if not (own.trained or own.held_out):
        return None
    algorithm: Any = cfg.algorithm
    return Anchor(
        own.trained,
        own.held_out,
        kl_coef=algorithm.kl_coef,
        weight=cfg.trainer.kl_weight,
        batch_size=algorithm.kl_batch_size,
        seed=cfg.seed,
        **batches,
    )
