"""Supervised fine-tuning as a LightningModule."""

from __future__ import annotations

from lit_ft.batches import Batch
from lit_ft.losses.sft import sft_loss
from lit_ft.models.score import score
from lit_ft.modules.base import FineTuneModule, Step


class SFTModule(FineTuneModule):
    """Cross-entropy of the trained tokens, a mean over all targets of the window."""

    normalised_by = "targets"

    def step(self, batch: Batch, total: int) -> Step:
        scores = score(self.model, batch)
        sums = {"mean_token_accuracy": (scores.is_top1.sum().float(), len(scores.is_top1))}
        return Step(sft_loss(scores.logprobs, total), sums)
