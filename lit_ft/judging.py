"""What a judge says of many completions, in batches that share their prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lit_ft.batches import Example
from lit_ft.data.packing import Layout, lay_out, split_by_tokens
from lit_ft.models.judge import completion_scores
from lit_ft.progress import Progress


@torch.no_grad()
def raw_scores(
    model: Any,
    head: nn.Linear,
    examples: Sequence[Example],
    *,
    layout: Layout,
    max_tokens: int,
    pad_id: int = 0,
    autocast: torch.dtype | None = None,
) -> list[tuple[float, ...]]:
    """Raw scores of every example's completions, in order, under the adapter that computes now."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    mixed = torch.autocast(device.type, autocast) if autocast is not None else contextlib.nullcontext()
    found: dict[int, tuple[float, ...]] = {}
    numbered = [replace(example, index=k) for k, example in enumerate(examples)]
    progress = Progress("scores", len(numbered))
    try:
        with mixed:
            for group in split_by_tokens(numbered, max_tokens, layout):
                scores = completion_scores(model, head, lay_out(group, layout, pad_id).to(device)).tolist()
                for example in group:
                    count = len(example.completions)
                    found[example.index], scores = tuple(scores[:count]), scores[count:]
                progress.advance(len(group))
    finally:
        model.train(was_training)
    progress.close()
    return [found[k] for k in range(len(numbered))]
