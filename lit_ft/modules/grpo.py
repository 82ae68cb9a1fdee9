"""Group relative policy optimization as a LightningModule: PPO's loop without a value model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lit_ft.errors import UserError
from lit_ft.losses.grpo import GRPOLossType, RewardScale, group_advantages, grpo_loss
from lit_ft.losses.ppo import missing_end_penalty
from lit_ft.modules.experience import Rows
from lit_ft.modules.online import OnlineModule, Sums


class GRPOModule(OnlineModule):
    """GRPO (Shao et al. 2024, arXiv:2402.03300): each completion's advantage is over the others of its prompt.

    Args:
        beta: weight of the KL to the reference in the loss.
        epsilon, epsilon_high: the clip range; None above is as below.
        loss_type, scale_rewards, use_bias_correction_kl: see `lit_ft.losses.grpo`.
        mask_truncated_completions: leave those that did not end out of the loss, but not out of their group's mean
            (DAPO, arXiv:2503.14476, section 3.4; TRL's name).
        max_new_tokens: the length that `dr_grpo` divides by.
        online: arguments of `OnlineModule`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_generations: int = 8,
        num_epochs: int = 1,
        beta: float = 0.0,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        loss_type: GRPOLossType = "dapo",
        scale_rewards: RewardScale = "group",
        use_bias_correction_kl: bool = True,
        mask_truncated_completions: bool = False,
        max_new_tokens: int = 64,
        **online: Any,
    ) -> None:
        super().__init__(model, num_generations=num_generations, num_epochs=num_epochs, **online)
        if num_generations < 2:
            raise UserError(
                f"algorithm.num_generations={num_generations}: GRPO compares the completions of a prompt, so it needs "
                "at least 2 of them."
            )
        if not beta >= 0 or not epsilon > 0 or (epsilon_high is not None and not epsilon_high > 0):
            raise UserError("algorithm.beta must not be below 0, and algorithm.epsilon and epsilon_high be above 0.")
        self.beta, self.epsilon, self.epsilon_high = beta, epsilon, epsilon_high
        self.loss_type: GRPOLossType = loss_type
        self.scale_rewards: RewardScale = scale_rewards
        self.use_bias_correction_kl = use_bias_correction_kl
        self.mask_truncated_completions = mask_truncated_completions
        self.max_new_tokens = max_new_tokens

    def targets(self, rows: Rows) -> tuple[dict[str, Tensor], dict[str, float]]:
        scores = missing_end_penalty(rows.scores, rows.ended, self.missing_eos_penalty)
        advantages = group_advantages(scores, rows.completions_per_example, self.scale_rewards)
        groups = scores.split(rows.completions_per_example.tolist())
        same = sum(float(group.max() - group.min()) < 1e-6 for group in groups) / len(groups)
        found = {"advantages": advantages, "reference": rows.reference}
        if self.mask_truncated_completions:
            found["mask"] = rows.mask & rows.ended[:, None]
        return found, {"frac_reward_zero_std": same}

    def loss(
        self, logps: Tensor, values: Tensor | None, old: Mapping[str, Tensor], totals: Mapping[str, int]
    ) -> tuple[Tensor, Sums]:
        found = grpo_loss(
            logps,
            old["logps"],
            old["reference"] if self.beta else None,
            old["advantages"],
            old["mask"],
            total_completions=totals["completions"],
            total_tokens=totals["tokens"],
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            beta=self.beta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            loss_type=self.loss_type,
            max_completion_length=self.max_new_tokens,
        )
        tokens = totals["tokens"]
        ratio = ((logps.detach() - old["logps"]) * old["mask"]).exp()
        sums = {
            "loss/policy": found.loss,
            "clip_ratio/low_mean": found.low_clipped / tokens,
            "clip_ratio/high_mean": found.high_clipped / tokens,
            "policy/clipfrac": (found.low_clipped + found.high_clipped) / tokens,
            "policy/approxkl": 0.5 * ((logps.detach() - old["logps"]) * old["mask"]).square().sum() / tokens,
            "val/ratio": (ratio * old["mask"]).sum() / tokens,
        }
        return found.loss, sums

    @property
    def kl_weight(self) -> float:
        return self.beta
