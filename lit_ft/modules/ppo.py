"""Proximal policy optimization as a LightningModule: policy, value and reference are adapters on one base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_ft.errors import UserError
from lit_ft.losses.ppo import (
    AdaptiveKL,
    FixedKL,
    KLKind,
    gae,
    kl_estimate,
    masked_whiten,
    missing_end_penalty,
    policy_loss,
    token_rewards,
    value_loss,
)
from lit_ft.modules.experience import Rows
from lit_ft.modules.online import OnlineModule, Sums


class PPOModule(OnlineModule):
    """PPO (Schulman et al. 2017, arXiv:1707.06347) as InstructGPT has it (Ouyang et al. 2022, arXiv:2203.02155).

    Of each completion every token but the last is paid −β·KL, the last one the score as well. Advantages by GAE with
    the value adapter, both losses clipped, the value's weighed by `vf_coef`.

    Args:
        model: with the value model as PEFT's adapter `value`.
        value_head: its scalar head, with a bias.
        kl_coef: β, per token.
        kl_target, kl_horizon: nats of a completion's KL that β is adapted to, and over how many completions (Ziegler et
            al. 2019, arXiv:1909.08593); a target of None keeps it fixed.
        kl_estimator: `k1` as in InstructGPT, or Schulman's `k2`, `k3`.
        gamma, lam: of GAE; InstructGPT's γ is 1, λ 0.95.
        cliprange, cliprange_value: 0.2 in all of the sources.
        vf_coef: 0.1 in lm-human-preferences.
        whiten_advantages: to mean 0 and deviation 1 over the tokens of the iteration.
        whiten_rewards: to deviation 1, their mean left (Huang et al. 2024).
        value_at_end: the state after the last token has a value, too, and the score is paid there (Huang et al. 2024,
            "value mask one token longer"); False pays it on the last token.
        online: arguments of `OnlineModule`.
    """

    trains_values: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        *,
        value_head: nn.Linear,
        kl_coef: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: float = 10_000,
        kl_estimator: KLKind = "k1",
        gamma: float = 1.0,
        lam: float = 0.95,
        cliprange: float = 0.2,
        cliprange_value: float = 0.2,
        vf_coef: float = 0.1,
        whiten_advantages: bool = True,
        whiten_rewards: bool = False,
        value_at_end: bool = True,
        **online: Any,
    ) -> None:
        super().__init__(model, **online)
        self.value_head = value_head
        for key, value, most in (("gamma", gamma, 1), ("lam", lam, 1), ("vf_coef", vf_coef, None)):
            if not (value >= 0 and (most is None or value <= most)):  # NaN is not
                upto = f" and at most {most}" if most is not None else ""
                raise UserError(f"algorithm.{key}={value} must be at least 0{upto}.")
        for key, value in (("cliprange", cliprange), ("cliprange_value", cliprange_value)):
            if not value > 0:
                raise UserError(f"algorithm.{key}={value} must be above 0.")
        try:
            self.kl: FixedKL | AdaptiveKL
            self.kl = FixedKL(kl_coef) if kl_target is None else AdaptiveKL(kl_coef, kl_target, kl_horizon)
        except ValueError as error:
            raise UserError(f"algorithm.kl_coef, kl_target, kl_horizon: {error}.") from error
        self.kl_coef, self.kl_estimator = kl_coef, kl_estimator
        self.gamma, self.lam = gamma, lam
        self.cliprange, self.cliprange_value, self.vf_coef = cliprange, cliprange_value, vf_coef
        self.whiten_advantages, self.whiten_rewards = whiten_advantages, whiten_rewards
        self.value_at_end = value_at_end

    def targets(self, rows: Rows) -> tuple[dict[str, Tensor], dict[str, float]]:
        assert rows.values is not None
        count, width = rows.mask.shape
        scores = missing_end_penalty(rows.scores, rows.ended, self.missing_eos_penalty)
        # One place more than tokens: the state after a completion's last.
        places = torch.arange(width + 1)
        mask = places < (rows.lengths + int(self.value_at_end))[:, None]
        kl = rows.values.new_zeros(count, width + 1)
        kl[:, :width] = torch.where(rows.mask, kl_estimate(rows.logps, rows.reference, self.kl_estimator), 0)
        rewards = token_rewards(scores, kl, mask, self.kl.coef)
        if self.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rows.values, mask, self.gamma, self.lam)
        advantages = torch.where(rows.mask, advantages[:, :width], 0)
        metrics = {
            "val/explained_variance": float(
                1 - (returns - rows.values)[mask].var(correction=0) / returns[mask].var(correction=0).clamp_min(1e-8)
            ),
            "val/mean": float(rows.values[mask].mean()),
            "objective/kl_coef": self.kl.coef,
        }
        if self.whiten_advantages:
            advantages = masked_whiten(advantages, rows.mask)
        found = {"advantages": advantages, "returns": returns, "values": rows.values, "value_mask": mask}
        return found, metrics

    def loss(
        self, logps: Tensor, values: Tensor | None, old: Mapping[str, Tensor], totals: Mapping[str, int]
    ) -> tuple[Tensor, Sums]:
        assert values is not None
        tokens = totals["tokens"]
        states = tokens + totals["completions"] * int(self.value_at_end)
        policy = policy_loss(logps, old["logps"], old["advantages"], old["mask"], self.cliprange)
        value = value_loss(values, old["values"], old["returns"], old["value_mask"], self.cliprange_value)
        loss = policy.loss / tokens + self.vf_coef * value.loss / states
        return loss, {
            "loss/policy": policy.loss / tokens,
            "loss/value": value.loss / states,
            "policy/approxkl": policy.approxkl / tokens,
            "policy/clipfrac": policy.clipfrac / tokens,
            "val/ratio": policy.ratio / tokens,
            "val/clipfrac": value.clipfrac / states,
        }

    def after_iteration(self, rows: Rows) -> None:
        kl = (kl_estimate(rows.logps, rows.reference) * rows.mask).sum(1).mean()
        try:
            self.kl.update(float(kl), len(rows.scores))
        except ValueError as error:
            raise UserError(f"algorithm.kl_horizon, in iteration {self.global_step}: {error}.") from error

    @property
    def kl_weight(self) -> float:
        return self.kl.coef

    @property
    def first_kl_weight(self) -> float:
        return self.kl_coef

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["lit_ft"]["kl"] = self.kl.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if state := checkpoint.get("lit_ft", {}).get("kl"):
            self.kl.load_state_dict(state)
