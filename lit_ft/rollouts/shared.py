"""One engine for all processes of a run: the first has it, the others hand it their prompts and get the completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import chain

from lit_ft.distributed.processes import agree, gathered, group_with_patience
from lit_ft.rollouts.base import Rollout, RolloutEngine

# How long the others wait for the first one's engine, which may be started again meanwhile. If the first process itself
# is lost, its connections break and they notice at once.
_ROUND = timedelta(days=1)


class SharedRollouts(RolloutEngine):
    """An engine that would not be there once per process, such as a vLLM beside the trainer.

    Every process calls `generate` and `update` equally often, if only with no prompts; whatever ends the engine ends
    all of them, in the same words. Completions depend on their places alone, so they are those that one process would
    have got.
    """

    def __init__(self, start: Callable[[], RolloutEngine]) -> None:
        """All processes call this.

        Args:
            start: makes the engine, in the first process only.

        Raises:
            UserError: it does not start; in all processes.
        """
        self._engine: RolloutEngine | None = None
        self._group = group_with_patience(_ROUND)

        def begin() -> None:
            self._engine = start()

        agree(begin, self._group)

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        n: int,
        seed: int,
        progress: Callable[[int], None] = lambda done: None,
        places: Sequence[int] | None = None,
    ) -> list[list[Rollout]]:
        """Complete every prompt `n` times; see `RolloutEngine.generate`.

        `places` None: the indices of the prompts of all processes, one process after the other.
        """
        before, asked = self._asked(prompts, places)
        everything = [prompt for prompt, _ in asked]

        def make() -> list[list[Rollout]]:
            assert self._engine is not None
            # What the first process shows is its own share of it.
            mine = len(prompts) / max(1, len(everything))
            return self._engine.generate(
                everything, n, seed, lambda done: progress(round(done * mine)), [place for _, place in asked]
            )

        found = agree(make, self._group)
        return found[before : before + len(prompts)]

    def _asked(
        self, prompts: Sequence[tuple[int, ...]], places: Sequence[int] | None
    ) -> tuple[int, list[tuple[tuple[int, ...], int]]]:
        """Prompts of all processes with their places, and how many of them stand before this one's."""
        import torch.distributed as dist

        parts = gathered((list(prompts), None if places is None else list(places)), self._group)
        before = sum(len(part) for part, _ in parts[: dist.get_rank()])
        everything = list(chain.from_iterable(part for part, _ in parts))
        given = list(chain.from_iterable(own or () for _, own in parts))
        return before, list(zip(everything, range(len(everything)) if places is None else given, strict=True))

    def update(self) -> None:
        """The policy has changed, in all processes alike: the first one's is written and loaded."""

        def change() -> None:
            assert self._engine is not None
            self._engine.update()

        agree(change, self._group)

    def close(self) -> None:
        """End the engine, in the first process; the others have none. It waits for nobody."""
        if self._engine is not None:
            self._engine.close()
