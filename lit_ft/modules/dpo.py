"""Direct preference optimization as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from lit_ft.batches import Batch
from lit_ft.errors import UserError
from lit_ft.losses.dpo import DPOLossType, dpo_loss, dpo_rewards
from lit_ft.losses.logprobs import sum_by_completion
from lit_ft.models.adapt import without_dropout
from lit_ft.models.score import score
from lit_ft.modules.base import FineTuneModule, Step

Reference = Literal["initial", "base"]


class DPOModule(FineTuneModule):
    """The DPO loss, a mean over pairs. Batches carry the reference's log-probabilities (see `lit_ft.reference`).

    Dropout is off, as in TRL: the policy's and the reference's log-probabilities must be of one kind.

    Args:
        beta, loss_type, label_smoothing: see `lit_ft.losses.dpo.dpo_loss`.
        reference: what the batches' log-probabilities were made with. With `initial` the first step must find the
            policy equal to its reference (the loss is ln 2), and the run stops if it does not.
        optimizer: arguments of `FineTuneModule`.
    """

    normalised_by = "examples"

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        *,
        beta: float = 0.1,
        loss_type: DPOLossType = "sigmoid",
        label_smoothing: float = 0.0,
        reference: Reference = "initial",
        learning_rate: float = 1e-5,
        **optimizer: Any,
    ) -> None:
        super().__init__(model, learning_rate=learning_rate, **optimizer)
        if label_smoothing and loss_type != "sigmoid":
            raise UserError(f"algorithm.label_smoothing is defined for loss_type=sigmoid, not for {loss_type}.")
        if not 0 <= label_smoothing < 0.5:
            raise UserError(f"algorithm.label_smoothing={label_smoothing} must be at least 0 and below 0.5.")
        self.beta, self.label_smoothing = beta, label_smoothing
        self.loss_type: DPOLossType = loss_type
        self.reference: Reference = reference

    def configure_model(self) -> None:
        super().configure_model()
        without_dropout(self.model)

    def step(self, batch: Batch, total: int) -> Step:
        if batch.reference is None:
            raise UserError(
                "DPO needs reference log-probabilities in its examples: call lit_ft.reference.attach first."
            )
        scores = score(self.model, batch)
        logps = sum_by_completion(scores.logprobs, batch.target_completion, batch.num_completions)
        if self.training and self.global_step == 0 and self.reference == "initial":
            self._must_equal_reference(logps.detach(), batch.reference)
        pairs = logps.view(-1, 2)
        reference = batch.reference.view(-1, 2)
        lengths = batch.completion_lengths.view(-1, 2)
        quad = (pairs[:, 0], pairs[:, 1], reference[:, 0], reference[:, 1])
        losses = dpo_loss(
            *quad,
            beta=self.beta,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1],
        )
        with torch.no_grad():
            rewards = dpo_rewards(*quad, beta=self.beta)
            of_chosen = batch.target_completion % 2 == 0
            n = batch.num_examples
            sums = {
                "rewards/chosen": (rewards.chosen.sum(), n),
                "rewards/rejected": (rewards.rejected.sum(), n),
                "rewards/accuracies": ((rewards.chosen > rewards.rejected).float().sum(), n),
                "rewards/margins": ((rewards.chosen - rewards.rejected).sum(), n),
                "logps/chosen": (pairs[:, 0].sum(), n),
                "logps/rejected": (pairs[:, 1].sum(), n),
                "mean_token_accuracy": ((scores.is_top1 & of_chosen).sum().float(), int(of_chosen.sum())),
            }
        return Step(losses.sum() / total, sums)

    def _must_equal_reference(self, logps: torch.Tensor, reference: torch.Tensor) -> None:
        # Rounding depends on how rows were grouped; bf16 keeps 8 bits of every hidden state.
        mixed = torch.is_autocast_enabled(logps.device.type)
        allowed = 0.5 + 0.02 * reference.abs() if mixed else 0.05 + 1e-4 * reference.abs()
        # Written so that NaN is refused as well.
        if not bool(((logps - reference).abs() <= allowed).all()):
            worst = float((logps - reference).abs().max())
            raise UserError(
                "Before the first step the policy differs from its reference (log-probabilities by up to "
                f"{worst:.3g}), so the loss is not ln 2: the reference was made with another model or other data. "
                "Delete the cached reference (the folder `reference` in lit_ft's cache) and start again."
            )
