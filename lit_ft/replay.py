"""The base's own answers to prompts: drawn once, kept, and used to hold a fine-tune to what the base would say.

They need no data but prompts, and since the base drew them, their loss is least, and KL(base ‖ policy) 0, where the
policy still is the base. With written answers that is not so.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lit_ft.batches import Completion, Example
from lit_ft.models.adapt import causal_lm, is_adapted
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


def _example(index: int, rollout: Rollout) -> Example:
    completion = Completion(rollout.completion, (True,) * len(rollout.completion))
    return Example(rollout.prompt, (completion,), index=index)
