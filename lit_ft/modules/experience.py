"""What an iteration of reinforcement learning works on: completions with scores and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_ft.batches import Example
from lit_ft.losses.logprobs import mask_of


@dataclass(frozen=True)
class Experience:
    """One prompt's completions, all of whose tokens are targets. Tensors lie in main memory and have no gradient.

    Attributes:
        example: the prompt and its n completions; `index` is its place in the iteration.
        scores: of each completion, what the rewards gave.
        parts: the same by the name of each reward.
        ended: whether each completion came to its end.
        logps, reference, entropies: per completion `(T_c,)` log-probabilities of its tokens under the policy that drew
            them and under the reference, and the entropy of what they were drawn from.
        values: per completion `(T_c + 1,)`, of the states before each token and after the last; None without a value
            model.
    """

    example: Example
    scores: tuple[float, ...]
    parts: dict[str, tuple[float, ...]]
    ended: tuple[bool, ...]
    logps: tuple[Tensor, ...]
    reference: tuple[Tensor, ...]
    entropies: tuple[Tensor, ...]
    values: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Rows:
    """All completions of an iteration, in the order of their examples. C completions, T tokens of the longest.

    Attributes:
        first: the row of each example's first completion.
        scores, ended: `(C,)`.
        mask: `(C, T)` true at a completion's tokens.
        logps, reference: `(C, T)`.
        values: `(C, T + 1)`, or None.
        completions_per_example: `(E,)`.
    """

    first: list[int]
    scores: Tensor
    ended: Tensor
    mask: Tensor
    logps: Tensor
    reference: Tensor
    values: Tensor | None
    completions_per_example: Tensor

    @property
    def lengths(self) -> Tensor:
        """`(C,)` tokens of each completion."""
        return self.mask.sum(1)


def rows_of(experience: Sequence[Experience]) -> Rows:
    """Lay the completions of all examples out as rows."""
    counts = torch.tensor([len(one.scores) for one in experience])
    logps = [tensor for one in experience for tensor in one.logps]
    lengths = torch.tensor([len(tensor) for tensor in logps])
    values = [tensor for one in experience for tensor in one.values or ()]
    return Rows(
        first=(torch.cumsum(counts, 0) - counts).tolist(),
        scores=torch.tensor([score for one in experience for score in one.scores], dtype=torch.float32),
        ended=torch.tensor([ended for one in experience for ended in one.ended]),
        mask=mask_of(lengths),
        logps=pad_sequence(logps, batch_first=True),
        reference=pad_sequence([tensor for one in experience for tensor in one.reference], batch_first=True),
        values=pad_sequence(values, batch_first=True) if values else None,
        completions_per_example=counts,
    )


def dealt(parts: Sequence[Sequence[Experience]]) -> list[Experience]:
    """What processes that were dealt the prompts in turn have made of them, in the prompts' order.

    So minibatches hold the same prompts for any number of processes.
    """
    return [one for turn in zip_longest(*parts) for one in turn if one is not None]
