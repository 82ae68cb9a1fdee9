"""The loader of windows: deterministic for a seed, resumable in the middle of an epoch, without workers.

Examples are token ids in memory, so building a batch costs microseconds; what DataLoader's workers are for is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lit_ft.batches import Example, Prompts, Window
from lit_ft.data.packing import Layout, lay_out, share_by_tokens, split_by_tokens


class WindowLoader:
    """Yields one `Window` per optimizer step; every example comes once per epoch over all processes.

    The windows are the same for any number of processes, which divide each by tokens, and all processes have equally
    many batches in each: who would have fewer gets fillers.

    Args:
        examples: the data set.
        batch_size: examples per optimizer step, over all processes: what the optimizer sees.
        max_tokens: tokens per forward pass: what the memory sees. It does not change the result.
        layout: `packed`, `apart` or `padded`, see `lit_ft.data.packing`.
        pad_id: token that fills padded rows.
        shuffle, seed: order of the examples, anew each epoch.
        rank, processes: this process and how many there are.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        max_tokens: int,
        layout: Layout = "packed",
        pad_id: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.layout: Layout = layout
        self.pad_id = pad_id
        self.shuffle = shuffle
        self.seed = seed
        self.rank, self.processes = rank, processes
        self._epoch = -1
        self._position = 0
        self._resumed = False

    @property
    def untouched(self) -> bool:
        """Whether no window was asked for yet."""
        return self._epoch < 0

    def __len__(self) -> int:
        return len(self.windows(0))

    def __iter__(self) -> Iterator[Any]:
        if not self._resumed or self._position >= len(self):
            self._epoch, self._position = self._epoch + 1, 0
        self._resumed = False
        windows = self.windows(self._epoch)
        while self._position < len(windows):
            self._position += 1
            yield self._window([self.examples[k] for k in windows[self._position - 1]])

    def windows(self, epoch: int) -> list[list[int]]:
        order = list(range(len(self.examples)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        return [order[k : k + self.batch_size] for k in range(0, len(order), self.batch_size)]

    def _window(self, examples: list[Example]) -> Any:
        shares = share_by_tokens(examples, self.processes)
        groups = [split_by_tokens(share, self.max_tokens, self.layout) for share in shares]
        fillers = max(map(len, groups)) - len(groups[self.rank])
        cheapest = min(examples, key=lambda example: example.tokens)
        batches = [lay_out(group, self.layout, self.pad_id) for group in groups[self.rank]]
        return Window(
            batches=(*batches, *[lay_out([cheapest], self.layout, self.pad_id)] * fillers),
            targets=sum(example.targets for example in examples),
            examples=len(examples),
            fillers=fillers,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is (Lightning puts it into checkpoints)."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the window that `state` was taken at."""
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._resumed = True


class PromptLoader(WindowLoader):
    """Yields one `Prompts` per iteration of reinforcement learning; every process gets each n-th prompt of it."""

    def _window(self, examples: list[Example]) -> Prompts:
        return Prompts(tuple(examples[self.rank :: self.processes]), len(examples))
