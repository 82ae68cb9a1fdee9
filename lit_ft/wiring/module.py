"""The LightningModule of a run, with the settings that are its own."""

from __future__ import annotations

from typing import Any

from lit_ft.config import Algorithm, Config
from lit_ft.models.kinds import AdapterKind
from lit_ft.modules import DPOModule, RewardModule, SFTModule
from lit_ft.modules.anchor import Anchor


def make_module(cfg: Config, model: Any, kind: AdapterKind, anchor: Anchor | None) -> Any:
    """The module of SFT, DPO or a judge; `anchor` holds it to its base, if anything does."""
    algorithm, shared = cfg.algorithm, shared_arguments(cfg, kind)
    if algorithm.kind is Algorithm.sft:
        return SFTModule(model, anchor=anchor, **shared)
    if algorithm.kind is Algorithm.reward:
        center = algorithm.center_rewards_coefficient  # type: ignore[attr-defined]
        return RewardModule(model, center_coefficient=center, **shared)
    return DPOModule(
        model,
        beta=algorithm.beta,  # type: ignore[attr-defined]
        loss_type=algorithm.loss_type.value,  # type: ignore[attr-defined]
        label_smoothing=algorithm.label_smoothing,  # type: ignore[attr-defined]
        reference=algorithm.reference.value,  # type: ignore[attr-defined]
        anchor=anchor,
        **shared,
    )


def shared_arguments(cfg: Config, kind: AdapterKind) -> dict[str, Any]:
    """Arguments that every module takes."""
    algorithm = cfg.algorithm
    return {
        "learning_rate": algorithm.learning_rate * cfg.peft.learning_rate_factor,
        "loraplus_lr_ratio": getattr(cfg.peft, "loraplus_lr_ratio", 1.0),
        "penalty": kind.penalty,
        "lr_scheduler_type": algorithm.lr_scheduler_type,
        "warmup_ratio": algorithm.warmup_ratio,
        "weight_decay": algorithm.weight_decay,
        "adam_beta1": algorithm.adam_beta1,
        "adam_beta2": algorithm.adam_beta2,
        "adam_epsilon": algorithm.adam_epsilon,
        "max_grad_norm": algorithm.max_grad_norm,
    }
