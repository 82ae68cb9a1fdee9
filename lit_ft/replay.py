"""The base's own answers to prompts: drawn once, kept, and used to hold a fine-tune to what the base would say.

They need no data but prompts, and since the base drew them, their loss is least, and KL(base ‖ policy) 0, where the
policy still is the base. With written answers that is not so.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lit_ft.adapter import DataSource
from lit_ft.batches import Completion, Example
from lit_ft.checks import ANCHORED
from lit_ft.config import Config, Prompts, Replay
from lit_ft.data.chat import ChatEncoder
from lit_ft.data.datamodule import Prepared, load_examples
from lit_ft.errors import UserError
from lit_ft.models.adapt import causal_lm, is_adapted
from lit_ft.models.kinds import AdapterKind
from lit_ft.models.roles import using
from lit_ft.progress import Progress, say
from lit_ft.reference import reference_key
from lit_ft.rollouts.base import Rollout, Sampling, stop_ids
from lit_ft.rollouts.kept import read_kept, write_kept
from lit_ft.rollouts.transformers import TransformersRollouts


def base_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    kept: Path,
    depends_on: Any,
    below: bool = True,
    max_tokens: int = 4096,
    autocast: torch.dtype | None = None,
) -> list[Example]:
    """One answer of the base to each prompt, drawn at temperature 1; all its tokens are targets.

    Args:
        model: whole on this device.
        tokenizer: of the model.
        prompts: token ids.
        max_new_tokens: after so many an answer is cut.
        kept: the folder of the cache.
        depends_on: what makes the base what it is, such as the hash of its files and its arithmetic.
        below: whether the base is what is left with the adapters switched off; else the model is the base as it is.
        max_tokens: of key-value cache at once.
        autocast: dtype of mixed precision, or None.
    """
    lm = causal_lm(model)
    sampling = Sampling(1.0, max_new_tokens, stop_ids(lm, tokenizer))
    asked = [Example(tuple(prompt), ()) for prompt in prompts]
    key = reference_key(asked, answers=[max_new_tokens, *sampling.stop_ids], base=depends_on)
    found = read_kept(kept, key, prompts)
    if found is None:
        engine = TransformersRollouts(model, sampling, tokenizer.pad_token_id, max_tokens, autocast=autocast)
        progress = Progress("answers of the base", len(prompts))
        with using(model, None) if below and is_adapted(model) else nullcontext():
            found = engine.generate(prompts, 1, 0, progress=progress.show)
        progress.close()
        try:
            write_kept(kept, key, found)
        except OSError as error:  # a cache saves time; without it the run goes on
            say(f"replay     answers could not be kept in {kept}: {error.strerror or error}")
    return [_example(k, rollout) for k, (rollout,) in enumerate(found)]


def stand_ins(prompts: Sequence[tuple[int, ...]], max_new_tokens: int) -> list[Example]:
    """Answers of the greatest length that they may have, where there is no model to ask."""
    return [_example(k, Rollout(prompt, (0,) * max_new_tokens, False)) for k, prompt in enumerate(prompts)]


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


def replayed(
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
        asked = _drawn(prompts, cfg.replay.max_prompts)
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


def _drawn(prompts: Sequence[Example], most: int) -> list[tuple[int, ...]]:
    """The token ids of at most `most` different prompts: whatever a run's seed the same, which are answered once."""
    different = list(dict.fromkeys(example.prompt for example in prompts))
    return random.Random("replay").sample(different, min(most, len(different)))


def _prepared(answers: Sequence[Example], prompts: str) -> Prepared:
    """The answers as rows of a source, which `prompts` names."""
    source = DataSource(f"the base's own answers to {prompts}", len(answers), f"sha256:{_hash(answers)}")
    return Prepared(list(answers), [source])


def _hash(answers: Sequence[Example]) -> str:
    return hashlib.sha256(repr([(e.prompt, e.completions[0].ids) for e in answers]).encode()).hexdigest()


def _example(index: int, rollout: Rollout) -> Example:
    completion = Completion(rollout.completion, (True,) * len(rollout.completion))
    return Example(rollout.prompt, (completion,), index=index)
