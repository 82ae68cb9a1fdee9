"""A published judge as a reward: its adapter and head on the base that the policy has, asked without gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lit_ft.batches import Completion, Example
from lit_ft.data.packing import Layout, divided
from lit_ft.errors import UserError
from lit_ft.judging import raw_scores
from lit_ft.models.roles import using
from lit_ft.rewards.base import Reward, Sample


class JudgeReward(Reward):
    """(raw score − mean) / deviation, which over the completions that the judge was trained on are around 0 and 1.

    Args:
        name: of the judge, for a reader.
        model: PEFT's, with the judge's adapter on it.
        role: that adapter's name there.
        head: the judge's.
        mean, std: of its raw scores.
        layout, max_tokens, pad_id: how completions are put into batches.
        autocast: dtype of mixed precision, or None.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        role: str,
        head: nn.Linear,
        mean: float,
        std: float,
        *,
        layout: Layout,
        max_tokens: int,
        pad_id: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.name = name
        self.model, self.role, self.head = model, role, head
        self.mean, self.std = mean, std
        self.layout: Layout = layout
        self.max_tokens, self.pad_id = max_tokens, pad_id
        self.autocast = autocast

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        examples, order = _by_prompt(samples)
        parts, members = divided(examples, self.max_tokens, self.layout)
        self.head.to(next(self.model.parameters()).device)
        with using(self.model, self.role):
            raw = raw_scores(
                self.model,
                self.head,
                parts,
                layout=self.layout,
                max_tokens=self.max_tokens,
                pad_id=self.pad_id,
                autocast=self.autocast,
            )
        found = [math.nan] * len(samples)
        for several, scores in zip(members, raw, strict=True):
            for k, score in zip(several, scores, strict=True):
                found[order[k]] = (score - self.mean) / self.std
        if (bad := next((k for k, score in enumerate(found) if not math.isfinite(score)), None)) is not None:
            raise UserError(
                f"The judge {self.name} gives {found[bad]} for completion {bad}, "
                f"{samples[bad].completion_text[:60]!r}: its weights are damaged, or "
                "the model overflows in this precision."
            )
        return found


def _by_prompt(samples: Sequence[Sample]) -> tuple[list[Example], list[int]]:
    """Examples in which completions share their prompt, and the samples that their completions are, in order."""
    members: dict[tuple[int, ...], list[int]] = {}
    for k, sample in enumerate(samples):
        members.setdefault(sample.prompt, []).append(k)
    completions = [[samples[k].completion for k in several] for several in members.values()]
    examples = [
        Example(prompt, tuple(Completion(ids, (True,) * len(ids)) for ids in answers), index)
        for index, (prompt, answers) in enumerate(zip(members, completions, strict=True))
    ]
    return examples, [k for several in members.values() for k in several]
