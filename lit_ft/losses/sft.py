"""Supervised fine-tuning: the cross-entropy of the trained tokens."""

from __future__ import annotations

from torch import Tensor


def sft_loss(logprobs: Tensor, num_targets: int | Tensor) -> Tensor:
    """−Σ log p / `num_targets`.

    Args:
        logprobs: `(N,)` log-probabilities of the targets at hand; of none (N = 0) the loss is a zero that can be
            backpropagated, as a process needs it whose part of the window has none.
        num_targets: targets of the whole accumulation window over all processes. A mean per micro-batch would weigh
            tokens of short batches more (TRL's `num_items_in_batch` serves the same end).

    Raises:
        ValueError: `num_targets` is not positive (a tensor is looked at only where N = 0: reading it waits for a GPU).
    """
    if (not isinstance(num_targets, Tensor) or logprobs.numel() == 0) and num_targets <= 0:
        raise ValueError(
            f"num_targets is {int(num_targets)}: a mean over no targets is not defined. Pass the number of trained "
            "tokens of the whole accumulation window, and leave out windows that have none."
        )
    return -logprobs.sum() / num_targets
