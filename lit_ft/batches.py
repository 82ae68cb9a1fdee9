"""The typed values that travel between the stages: an example, and the packed or padded batch made of examples.

Every algorithm scores completions of a prompt: SFT one, DPO two, a reward model K. So there is one example type and one
batch type. A *packed* batch is a single row without padding in which the completions of a prompt share one copy of it;
a *padded* batch has one row per completion. Both say the same of their targets, so that losses need not know which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Completion:
    """Token ids that follow a prompt, and which of them are trained on (same length)."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.mask):
            raise ValueError(f"a completion of {len(self.ids)} ids has a mask of {len(self.mask)}")


@dataclass(frozen=True)
class Example:
    """A prompt with one or more completions.

    `index` is its place in the data set. `reference` holds one summed log-probability per completion under the
    reference model, where an algorithm needs it.
    """

    prompt: tuple[int, ...]
    completions: tuple[Completion, ...]
    index: int = 0
    reference: tuple[float, ...] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of this example when its completions share the prompt."""
        return len(self.prompt) + sum(len(c.ids) for c in self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion: what the model's context must hold."""
        return len(self.prompt) + max(len(c.ids) for c in self.completions)

    @property
    def targets(self) -> int:
        """Tokens that are trained on, over all completions."""
        return sum(sum(c.mask[0 if self.prompt else 1 :]) for c in self.completions)


@dataclass(frozen=True)
class Segment:
    """Where one example lies in a packed row: its prompt `[start, prompt_end)`, then its completions, end to end."""

    start: int
    prompt_end: int
    completion_ends: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """One forward pass. B rows of T tokens (B = 1 when packed), N targets, C completions, E examples.

    Attributes:
        input_ids, position_ids: `(B, T)` int64. Positions of every completion continue from its prompt.
        attention_mask: `(B, T)` int64, 1 at real tokens; None when packed.
        segments: the examples of a packed row; None when padded.
        target_sources: `(N,)` index into the flattened `B·T` hidden states: the position that predicts the target.
        target_ids: `(N,)` the token predicted there.
        target_completion: `(N,)` which of the C completions the target belongs to.
        completion_lengths: `(C,)` number of completion tokens that are targets.
        completions_per_example: `(E,)`; completions of an example stand together, in the data's order.
        examples: `(E,)` place of each example in the data set.
        reference: `(C,)` summed reference log-probabilities, or None.
        tokens: tokens of the data set in this batch, prompts counted with each completion.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segments: tuple[Segment, ...] | None
    target_sources: Tensor
    target_ids: Tensor
    target_completion: Tensor
    completion_lengths: Tensor
    completions_per_example: Tensor
    examples: Tensor
    reference: Tensor | None
    tokens: int

    @property
    def num_completions(self) -> int:
        return len(self.completion_lengths)

    @property
    def num_examples(self) -> int:
        return len(self.completions_per_example)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with all its tensors on `device` (Lightning calls this)."""
        tensors = {key: value for key, value in self.__dict__.items() if isinstance(value, Tensor)}
        return replace(self, **{key: value.to(device, non_blocking=True) for key, value in tensors.items()})


@dataclass(frozen=True)
class Window:
    """What one optimizer step sees: micro-batches whose gradients are summed.

    Attributes:
        batches: the micro-batches of this process, none above the token budget.
        targets, examples: totals of the whole window over all processes; losses are divided by one of them, so that
            neither accumulation nor the number of devices changes the result.
    """

    batches: tuple[Batch, ...]
    targets: int
    examples: int

    def to(self, device: torch.device | str) -> Window:
        """The same window on `device` (Lightning calls this)."""
        return replace(self, batches=tuple(batch.to(device) for batch in self.batches))


def pack(examples: Sequence[Example]) -> Batch:
    """One row without padding; completions share their prompt."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    targets = _Targets()
    for example in examples:
        start = len(ids)
        ids.extend(example.prompt)
        positions.extend(range(len(example.prompt)))
        prompt_end = len(ids)
        ends = []
        for completion in example.completions:
            # The first completion token is predicted by the prompt's last one, the others by the token before them.
            before = [prompt_end - 1 if example.prompt else -1, *range(len(ids), len(ids) + len(completion.ids) - 1)]
            targets.add(completion, before)
            positions.extend(range(len(example.prompt), len(example.prompt) + len(completion.ids)))
            ids.extend(completion.ids)
            ends.append(len(ids))
        segments.append(Segment(start, prompt_end, tuple(ends)))
    return Batch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        attention_mask=None,
        segments=tuple(segments),
        **targets.tensors(examples),
    )


def pad(examples: Sequence[Example], pad_id: int, extra: int = 0) -> Batch:
    """One row per completion, padded on the right with `pad_id` to the longest (plus `extra`, for tests)."""
    rows = [(example, completion) for example in examples for completion in example.completions]
    width = max(len(example.prompt) + len(completion.ids) for example, completion in rows) + extra
    input_ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    targets = _Targets()
    for row, (example, completion) in enumerate(rows):
        ids = example.prompt + completion.ids
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
        first = row * width + len(example.prompt) - 1
        before = [first if example.prompt else -1, *range(first + 1, first + len(completion.ids))]
        targets.add(completion, before)
    positions = torch.arange(width).expand(len(rows), width).contiguous()
    return Batch(
        input_ids=input_ids,
        position_ids=positions,
        attention_mask=mask,
        segments=None,
        **targets.tensors(examples),
    )


class _Targets:
    """Collects targets completion by completion, so that packed and padded batches cannot differ in them."""

    def __init__(self) -> None:
        self.sources: list[int] = []
        self.ids: list[int] = []
        self.completion: list[int] = []
        self.lengths: list[int] = []

    def add(self, completion: Completion, before: Sequence[int]) -> None:
        chosen = [k for k, trained in enumerate(completion.mask) if trained and before[k] >= 0]
        self.sources.extend(before[k] for k in chosen)
        self.ids.extend(completion.ids[k] for k in chosen)
        self.completion.extend([len(self.lengths)] * len(chosen))
        self.lengths.append(len(chosen))

    def tensors(self, examples: Sequence[Example]) -> dict[str, Any]:
        known = [example.reference for example in examples]
        flat = [value for values in known if values is not None for value in values]
        return {
            "target_sources": torch.tensor(self.sources, dtype=torch.long),
            "target_ids": torch.tensor(self.ids, dtype=torch.long),
            "target_completion": torch.tensor(self.completion, dtype=torch.long),
            "completion_lengths": torch.tensor(self.lengths),
            "completions_per_example": torch.tensor([len(example.completions) for example in examples]),
            "examples": torch.tensor([example.index for example in examples]),
            "reference": torch.tensor(flat) if len(flat) == len(self.lengths) else None,
            "tokens": sum(len(e.prompt) + len(c.ids) for e in examples for c in e.completions),
        }
