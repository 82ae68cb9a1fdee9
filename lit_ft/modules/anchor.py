"""What holds a policy to its base in training: KL(base ‖ policy) on the base's own answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lit_ft.batches import Batch, Example
from lit_ft.data.packing import Layout, lay_out, share_by_tokens, split_by_tokens


@dataclass(frozen=True)
class Anchor:
    """Rows of the base's own answers, and how much the KL on them counts.

    The KL to a model on what that model says itself is the most direct measure of what a fine-tune changes where it
    should not. As a term of the loss it holds the policy back there (Li & Hoiem 2016, arXiv:1606.09282, with the base
    for the old model); beside the held-out loss it chooses among steps.

    Attributes:
        trained: rows whose KL is a term of the loss.
        held_out: other rows, on which it is measured at each validation.
        kl_coef: its weight in the loss, where the loss is a mean over the step and the KL over targets.
        weight: its weight beside the held-out loss, by which steps are compared; 0 leaves that to the loss alone.
        batch_size: rows of each optimizer step, over all processes.
        max_tokens, layout, pad_id: how rows are put into batches.
        seed: of the rows' order.
    """

    trained: Sequence[Example] = field(repr=False)
    held_out: Sequence[Example] = field(repr=False)
    kl_coef: float = 0.0
    weight: float = 0.0
    batch_size: int = 4
    max_tokens: int = 4096
    layout: Layout = "packed"
    pad_id: int = 0
    seed: int = 0

    def step(self, number: int, replica: int, replicas: int) -> tuple[list[Batch], int]:
        """This process's batches of optimizer step `number` (from 0), and the targets of all processes' together.

        Rows come in rounds, each once in a round and in an order of its own; a step that a round's end falls into goes
        on with the next round's first rows. The rows depend on the number alone, so that a resumed run sees what an
        uninterrupted one would.
        """
        count = len(self.trained)
        size = min(self.batch_size, count)
        places = range(number * size, (number + 1) * size)  # in the sequence of all rounds
        orders = {turn: self._order(turn) for turn in {place // count for place in places}}
        chosen = [self.trained[orders[place // count][place % count]] for place in places]
        return self._laid_out(chosen, replica, replicas), sum(example.targets for example in chosen)

    def _order(self, turn: int) -> list[int]:
        """The rows' numbers as they come in round `turn`."""
        order = list(range(len(self.trained)))
        random.Random(repr((self.seed, "anchor", turn))).shuffle(order)
        return order

    def measured(self, replica: int, replicas: int) -> list[Batch]:
        """This process's batches of the held-out rows."""
        return self._laid_out(self.held_out, replica, replicas)

    def _laid_out(self, examples: Sequence[Example], replica: int, replicas: int) -> list[Batch]:
        numbered = [replace(example, index=k) for k, example in enumerate(examples)]
        mine = share_by_tokens(numbered, replicas)[replica]
        groups = split_by_tokens(mine, self.max_tokens, self.layout) if mine else []
        return [lay_out(group, self.layout, self.pad_id) for group in groups]
