"""An exponential moving average of the trained weights: what is validated, kept as the best, and published."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor


class AverageWeights(Checkpoint):
    """average ← d·average + (1 − d)·weights after each optimizer step t, where d = min(decay, (1 + t)/(10 + t)).

    It begins with the weights before the first step, of which the growing d (that of TensorFlow's
    ExponentialMovingAverage) soon leaves little. While the module is validated it holds the averages, so that held-out
    metrics, early stopping and the best checkpoint are theirs; other checkpoints hold the weights, and the averages as
    this callback's state. Lightning's WeightAveraging copies the whole module, the frozen base as well.

    LoRA's A and B are averaged apart, and the product of averages is not the average of the products: they differ by
    the covariance of B and A among the averaged steps. Such averages work in practice (Onal et al. 2024,
    arXiv:2405.03425, has them as the mean of SWAG over LoRA), and what is measured is what is published.

    A Checkpoint, since Lightning puts these behind other callbacks and keeps their order: the best checkpoint must come
    before this one in the list. Trained weights are taken to be float32, and whole on every device.

    Args:
        decay: within (0, 1); about 1 / (1 − decay) steps count.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        # By name, the averages; while the module holds those, the weights.
        self._aside: dict[str, Tensor] = {}
        self._swapped = False
        self._hook: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, or go on from a checkpoint; as Lightning calls it, before the module's own, which may validate."""
        trained = _trained(pl_module)
        begin = self._aside or trained
        self._aside = {
            name: begin[name].detach().to(weight.device, torch.float32, copy=True) for name, weight in trained.items()
        }
        if self._swapped:  # resumed from the best checkpoint
            self._swap(pl_module)
        averages, weights = list(self._aside.values()), list(trained.values())
        # Not on_train_batch_end: PPO and GRPO take several steps in a batch, and others save there before this one.
        (optimizer,) = trainer.optimizers
        self._hook = optimizer.register_step_post_hook(lambda *_: self._follow(averages, weights))

    @torch.no_grad()
    def _follow(self, averages: list[Tensor], weights: list[Tensor]) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, weights, alpha=1 - decay)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._aside and not self._swapped:
            self._swap(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._swapped:
            self._swap(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the weights, wherever in a validation it came."""
        self.on_validation_end(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @torch.no_grad()
    def _swap(self, module: Any) -> None:
        for name, weight in _trained(module).items():
            held = weight.detach().clone()
            weight.copy_(self._aside[name])
            self._aside[name].copy_(held)
        self._swapped = not self._swapped

    def publish(self, module: Any) -> None:
        """Put the averages into `module` for good: from here on nothing is swapped."""
        if self._aside and not self._swapped:
            self._swap(module)
        self._aside, self._swapped = {}, False

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "aside": self._aside, "swapped": self._swapped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self._aside, self._swapped = state_dict["steps"], state_dict["aside"], state_dict["swapped"]


def _trained(module: Any) -> dict[str, Any]:
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
