"""A reward model as a LightningModule: a scalar head that ranks completions as people did."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lit_ft.batches import Batch
from lit_ft.errors import UserError
from lit_ft.losses.reward import pair_weights, ranked_pairs, reward_loss
from lit_ft.models.adapt import without_dropout
from lit_ft.models.judge import completion_scores, hidden_size, scalar_head
from lit_ft.modules.base import FineTuneModule, Step


class RewardModule(FineTuneModule):
    """Bradley and Terry's loss over all pairs of each prompt's ranked completions, a mean over prompts.

    The completions of a prompt share it in one packed example. Dropout is off, so that two scores are of one kind.

    Logged beside TRL's metrics is `accuracy/longer`: how often the longer completion of a pair is the preferred one. A
    judge that is not better than this may have learned nothing else. `min_reward` and `max_reward` are, as TRL's, means
    over batches of each one's extremes.

    Args:
        center_coefficient: weight of the term that keeps scores around 0 (TRL's `center_rewards_coefficient`).
        optimizer: arguments of `FineTuneModule`.
    """

    normalised_by = "examples"
    headline = ("loss", "accuracy", "accuracy/longer")

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        *,
        center_coefficient: float = 0.0,
        learning_rate: float = 1e-4,
        **optimizer: Any,
    ) -> None:
        super().__init__(model, learning_rate=learning_rate, **optimizer)
        if not 0 <= center_coefficient < math.inf:
            raise UserError(f"algorithm.center_rewards_coefficient={center_coefficient} must be a number from 0 on.")
        self.center_coefficient = center_coefficient
        self.head: nn.Linear | None = None
        if self.model is not None:
            self.head = scalar_head(hidden_size(self.model))

    def configure_model(self) -> None:
        super().configure_model()
        if self.head is None:
            self.head = scalar_head(hidden_size(self.model))
        without_dropout(self.model)

    def scores(self, batch: Batch) -> torch.Tensor:
        """`(C,)` raw scores of the batch's completions."""
        assert self.head is not None
        return completion_scores(self.model, self.head, batch)

    def step(self, batch: Batch, total: int) -> Step:
        scores = self.scores(batch)
        pairs = ranked_pairs(batch.completions_per_example)
        weights = pair_weights(batch.completions_per_example)
        losses = reward_loss(scores, pairs, batch.margins_of(pairs), self.center_coefficient)
        with torch.no_grad():
            winner, loser = pairs[:, 0], pairs[:, 1]
            margins = scores[winner] - scores[loser]
            lengths = batch.completion_lengths
            longer = (lengths[winner] > lengths[loser]).float() + 0.5 * (lengths[winner] == lengths[loser]).float()
            count, scored = len(pairs), len(scores)
            sums = {
                "accuracy": ((margins > 0).float().sum(), count),
                "accuracy/longer": (longer.sum(), count),
                "margin": (margins.sum(), count),
                "mean_reward": (scores.sum(), scored),
                "min_reward": (scores.min(), 1),
                "max_reward": (scores.max(), 1),
                "mean_square_reward": (scores.square().sum(), scored),
            }
        return Step((losses * weights).sum() / total, sums)
