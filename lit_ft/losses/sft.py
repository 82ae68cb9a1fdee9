"""Supervised fine-tuning: the cross-entropy of the trained tokens."""

from __future__ import annotations

from torch import Tensor


def sft_loss(logprobs: Tensor, num_targets: int | Tensor) -> Tensor:
    """−Σ log p / `num_targets`.

    Args:
        logprobs: `(N,)` log-probabilities of the targets at hand.
        num_targets: targets of the whole accumulation window over all processes. A mean per micro-batch would weigh
            tokens of short batches more (TRL's `num_items_in_batch` serves the same end).
    """
    return -logprobs.sum() / num_targets
