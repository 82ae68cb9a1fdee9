"""The typed values that travel between the stages: an example, and the packed or padded batch made of examples.

Every algorithm scores completions of a prompt: SFT one, DPO two, a reward model K. So there is one example type and one
batch type. A *packed* batch is a single row without padding in which whatever prompts have in common is there once: the
completions of a prompt share it, and so do examples with the same system prompt or the same question. A *padded* batch
has one row per completion. Both say the same of their targets, so that losses need not know which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

# Prompts that agree in fewer tokens than this are laid out apart: a piece of its own costs about as much.
SHARED_FROM = 8


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
    """A prompt with its completions: one or more, or none where the model is to make them.

    Attributes:
        index: its place in the data set.
        reference: one summed log-probability per completion under the reference model, where an algorithm needs it.
        margin: by how much a preferred completion should win, where the data say so.
        row: the row of the data, where an algorithm needs it.
    """

    prompt: tuple[int, ...]
    completions: tuple[Completion, ...]
    index: int = 0
    reference: tuple[float, ...] | None = None
    margin: float | None = None
    row: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """Tokens of this example when its completions share the prompt."""
        return len(self.prompt) + sum(len(c.ids) for c in self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion: what the model's context must hold."""
        return len(self.prompt) + max((len(c.ids) for c in self.completions), default=0)

    @property
    def targets(self) -> int:
        """Tokens that are trained on, over all completions."""
        return sum(sum(c.mask[0 if self.prompt else 1 :]) for c in self.completions)


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a packed row, and which later ones go on from them.

    Tokens `[start, end)` see each other causally; tokens `[end, until)` see all of them. Pieces stand in the order of
    their tokens and cover the row; `[start, until)` holds a piece with everything that goes on from it, so that the
    pieces of a row are a forest in depth-first order.
    """

    start: int
    end: int
    until: int


@dataclass(frozen=True)
class Batch:
    """One forward pass. B rows of T tokens (B = 1 when packed), N targets, C completions, E examples.

    Attributes:
        input_ids, position_ids: `(B, T)` int64. Positions of every completion continue from its prompt.
        attention_mask: `(B, T)` int64, 1 at real tokens; None when packed.
        pieces: what sees what in a packed row; None when padded.
        target_sources: `(N,)` index into the flattened `B·T` hidden states: the position that predicts the target.
        target_ids: `(N,)` the token predicted there.
        target_completion: `(N,)` which of the C completions the target belongs to.
        completion_lengths: `(C,)` number of completion tokens that are targets.
        completion_ends: `(C,)` index into the flattened `B·T` hidden states: where each completion's last token lies,
            target or not; of an empty completion the token before it.
        completions_per_example: `(E,)`; completions of an example stand together, in the data's order.
        examples: `(E,)` place of each example in the data set.
        reference: `(C,)` summed reference log-probabilities, or None.
        margins: `(E,)` by how much preferred completions should win, or None.
        tokens: tokens of the data set in this batch, prompts counted with each completion.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    pieces: tuple[Piece, ...] | None
    target_sources: Tensor
    target_ids: Tensor
    target_completion: Tensor
    completion_lengths: Tensor
    completion_ends: Tensor
    completions_per_example: Tensor
    examples: Tensor
    reference: Tensor | None
    margins: Tensor | None
    tokens: int

    @property
    def num_completions(self) -> int:
        return len(self.completion_lengths)

    @property
    def num_examples(self) -> int:
        return len(self.completions_per_example)

    def margins_of(self, pairs: Tensor) -> Tensor | None:
        """`(P,)` the margins of pairs of completions `(P, 2)`, each that of its example; None if there are none."""
        if self.margins is None:
            return None
        return self.margins.repeat_interleave(self.completions_per_example)[pairs[:, 0]]

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
        fillers: how many of the last batches are there only because other processes have more: sharded models run in
            step. They count for nothing.
    """

    batches: tuple[Batch, ...]
    targets: int
    examples: int
    fillers: int = 0

    def to(self, device: torch.device | str) -> Window:
        """The same window on `device` (Lightning calls this)."""
        return replace(self, batches=tuple(batch.to(device) for batch in self.batches))


@dataclass(frozen=True)
class Prompts:
    """What one iteration of reinforcement learning begins with.

    Attributes:
        examples: the prompts of this process, without completions; `index` is the row in the data.
        total: prompts of the iteration over all processes.
    """

    examples: tuple[Example, ...]
    total: int

    def to(self, device: torch.device | str) -> Prompts:
        """The same prompts."""
        return self


def pack(examples: Sequence[Example], *, across: bool = True) -> Batch:
    """One row without padding, in which common beginnings of prompts (from `SHARED_FROM` tokens on) stand once.

    With `across=False` completions share their prompt, and examples nothing.

    Completions, targets and examples are listed in the order given, wherever in the row they lie.
    """
    row = _Row(examples, across)
    targets = _Targets()
    for example, places in zip(examples, row.places, strict=True):
        for completion, (before, start) in zip(example.completions, places, strict=True):
            # The first completion token is predicted by the prompt's last one, the others by the token before them.
            targets.add(completion, [before, *range(start, start + len(completion.ids) - 1)], start)
    return Batch(
        input_ids=torch.tensor([row.ids]),
        position_ids=torch.tensor([row.positions]),
        attention_mask=None,
        pieces=tuple(row.pieces),
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
        targets.add(completion, before, row * width + len(example.prompt))
    positions = torch.arange(width).expand(len(rows), width).contiguous()
    return Batch(
        input_ids=input_ids,
        position_ids=positions,
        attention_mask=mask,
        pieces=None,
        **targets.tensors(examples),
    )


class _Row:
    """A packed row in the making.

    `places` holds, for each example, `(before, start)` per completion: where the token before it and its first token
    lie in the row; `before` is -1 where there is none.
    """

    def __init__(self, examples: Sequence[Example], across: bool) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.pieces: list[Piece] = []
        self.places: list[list[tuple[int, int]]] = [[] for _ in examples]
        self._examples = examples
        if across:
            self._place(list(range(len(examples))), shared=0)
        else:
            for k in range(len(examples)):
                self._place([k], shared=0)

    def _place(self, members: list[int], shared: int) -> None:
        """Lay out examples whose prompts agree in their first `shared` tokens, with which the row ends so far."""
        before = len(self.ids) - 1 if shared else -1
        groups: dict[Any, list[int]] = {}
        for k in members:
            rest = self._examples[k].prompt[shared : shared + SHARED_FROM]
            groups.setdefault(rest if len(rest) in (0, SHARED_FROM) else k, []).append(k)
        for beginning, group in groups.items():
            if beginning == ():  # these prompts end here
                for k in group:
                    self._completions(k, before, shared)
            elif len(group) == 1:
                self._alone(group[0], shared)
            else:
                prompts = [self._examples[k].prompt for k in group]
                common = _common_length(prompts)
                with self._followed(prompts[0][shared:common], shared):
                    self._place(group, common)

    def _alone(self, k: int, shared: int) -> None:
        """The rest of a prompt and its completions; an only completion makes one piece with it."""
        example = self._examples[k]
        rest = example.prompt[shared:]
        if len(example.completions) == 1:
            start = self._write(rest + example.completions[0].ids, shared) + len(rest)
            self.places[k].append((start - 1, start))
        else:
            with self._followed(rest, shared):
                self._completions(k, len(self.ids) - 1, len(example.prompt))

    def _completions(self, k: int, before: int, position: int) -> None:
        for completion in self._examples[k].completions:
            self.places[k].append((before, self._write(completion.ids, position)))

    def _write(self, ids: Sequence[int], position: int) -> int:
        """A piece that nothing goes on from; returns where it starts."""
        with self._followed(ids, position):
            return len(self.ids) - len(ids)

    @contextmanager
    def _followed(self, ids: Sequence[int], position: int) -> Iterator[None]:
        """A piece; what is written inside the `with` goes on from it."""
        start, number = len(self.ids), len(self.pieces)
        self.ids.extend(ids)
        self.positions.extend(range(position, position + len(ids)))
        end = len(self.ids)
        if ids:
            self.pieces.append(Piece(start, end, end))
        yield
        if ids:
            self.pieces[number] = Piece(start, end, len(self.ids))


def _common_length(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many first elements all of them agree in."""
    first, last = min(sequences), max(sequences)  # the two that differ earliest
    for k, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return k
    return min(len(first), len(last))


class _Targets:
    """Collects targets completion by completion, so that packed and padded batches cannot differ in them."""

    def __init__(self) -> None:
        self.sources: list[int] = []
        self.ids: list[int] = []
        self.completion: list[int] = []
        self.lengths: list[int] = []
        self.ends: list[int] = []

    def add(self, completion: Completion, before: Sequence[int], start: int) -> None:
        """A completion that begins at `start`; `before` holds the place before each of its tokens, -1 for none."""
        chosen = [k for k, trained in enumerate(completion.mask) if trained and before[k] >= 0]
        self.sources.extend(before[k] for k in chosen)
        self.ids.extend(completion.ids[k] for k in chosen)
        self.completion.extend([len(self.lengths)] * len(chosen))
        self.lengths.append(len(chosen))
        self.ends.append(start + len(completion.ids) - 1 if completion.ids else before[0])

    def tensors(self, examples: Sequence[Example]) -> dict[str, Any]:
        known = [example.reference for example in examples]
        flat = [value for values in known if values is not None for value in values]
        margins = [example.margin for example in examples]
        return {
            "target_sources": torch.tensor(self.sources, dtype=torch.long),
            "target_ids": torch.tensor(self.ids, dtype=torch.long),
            "target_completion": torch.tensor(self.completion, dtype=torch.long),
            "completion_lengths": torch.tensor(self.lengths),
            "completion_ends": torch.tensor(self.ends, dtype=torch.long),
            "completions_per_example": torch.tensor([len(example.completions) for example in examples]),
            "examples": torch.tensor([example.index for example in examples]),
            "reference": torch.tensor(flat) if len(flat) == len(self.lengths) else None,
            "margins": None if set(margins) <= {None} else torch.tensor([margin or 0.0 for margin in margins]),
            "tokens": sum(len(e.prompt) + len(c.ids) for e in examples for c in e.completions),
        }
