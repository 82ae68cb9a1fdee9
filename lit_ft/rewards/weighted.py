"""Several rewards as one: their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

from lit_ft.rewards.base import Reward, Sample


class WeightedReward(Reward):
    """Σ weight · score over `rewards`.

    Args:
        rewards: each with its weight; their names differ.

    Raises:
        ValueError: there are none, or two have the same name.
    """

    def __init__(self, rewards: Sequence[tuple[Reward, float]]) -> None:
        names = [reward.name for reward, _ in rewards]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"expected rewards with names that differ, got {', '.join(names) or 'none'}")
        self.rewards = list(rewards)
        self.name = " + ".join(names)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [sum(of_sample) for of_sample in zip(*self.parts(samples).values(), strict=True)]

    def parts(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        """By name, the weighted scores of each reward, which is asked once; their sum is what calling this gives."""
        return {reward.name: [weight * score for score in reward(samples)] for reward, weight in self.rewards}
