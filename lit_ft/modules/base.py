"""What every fine-tuning LightningModule shares: the step over a window, metrics, optimizer, lean checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_ft.batches import Batch, Window
from lit_ft.errors import UserError

Sums = dict[str, tuple[Tensor, int]]


@dataclass(frozen=True)
class Step:
    """What one batch contributes: its share of the window's loss, and metrics as (sum, count)."""

    loss: Tensor
    sums: Sums


class FineTuneModule(L.LightningModule, ABC):
    """Base of `SFTModule` and `DPOModule`.

    A training step is one optimizer step: the gradients of the window's micro-batches are summed, each divided by the
    totals of the whole window, so that neither accumulation nor the number of devices changes the result (Lightning's
    own accumulation averages per-micro-batch means). Optimization is manual for that reason; leave the Trainer's
    `accumulate_grad_batches` and `gradient_clip_val` alone and set `batch_size`, `max_tokens` and `max_grad_norm`.

    Logged as `train/NAME` and `eval/NAME`, the names that TRL's runs have in TensorBoard.

    Args:
        model: the model to train, or a function that builds it (called once, in `configure_model`).
        learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon: of AdamW.
        lr_scheduler_type: a name that transformers' `get_scheduler` knows.
        warmup_ratio: share of all steps in which the rate rises linearly from 0.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
    """

    monitor: ClassVar[str] = "eval/loss"
    # What a window's loss is divided by.
    normalised_by: ClassVar[Literal["targets", "examples"]]

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        *,
        learning_rate: float = 2e-4,
        lr_scheduler_type: str = "linear",
        warmup_ratio: float = 0.03,
        weight_decay: float = 0.0,
        adam_beta1: float = 0.9,
        adam_beta2: float = 0.999,
        adam_epsilon: float = 1e-8,
        max_grad_norm: float = 1.0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model: Any = model if isinstance(model, nn.Module) else None
        self._build = None if isinstance(model, nn.Module) else model
        self.learning_rate = learning_rate
        self.lr_scheduler_type = lr_scheduler_type
        self.warmup_ratio = warmup_ratio
        self.weight_decay = weight_decay
        self.adam_betas = (adam_beta1, adam_beta2)
        self.adam_epsilon = adam_epsilon
        self.max_grad_norm = max_grad_norm
        self.num_tokens = 0
        # The adapter that training began with (`name@vN`), kept in checkpoints so that a resume begins with it too.
        self.parent: str | None = None
        # What a resume must have in common with this run; and the held-out metrics before the first step.
        self.identity: dict[str, str] = {}
        self.before: dict[str, float] = {}
        self.validated_at = -1
        self._eval: dict[str, list[float]] = {}
        self._rng: dict[str, Any] | None = None

    @abstractmethod
    def step(self, batch: Batch, total: int) -> Step:
        """Loss and metrics of one batch; the loss is a sum over the batch divided by `total`."""

    def configure_model(self) -> None:
        """Build the model if that is still to be done; Lightning may call this more than once."""
        if self.model is None:
            assert self._build is not None
            self.model = self._build()
        # from_pretrained leaves eval mode, and Lightning does not change it: checkpointing would be silently off.
        self.model.train()

    def training_step(self, window: Window, _: int) -> None:
        """One optimizer step."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        total = getattr(window, self.normalised_by)
        sums: Sums = {}
        for number, batch in enumerate(window.batches):
            # DDP averages gradients over processes, but `total` already counts all of them.
            with self._sync(last=number == len(window.batches) - 1):
                step = self.step(batch, total)
                self.manual_backward(step.loss * self.trainer.world_size)
            _add(sums, step.sums)
            _add(sums, {"loss": (step.loss.detach(), 0)})
            self.num_tokens += batch.tokens
        norm = self._clip()
        scheduler: Any = self.lr_schedulers()
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        values = {key: (value / count if count else value) for key, (value, count) in sums.items()}
        values |= {"grad_norm": norm, "learning_rate": rate, "num_tokens": float(self.num_tokens)}
        self.log_dict({f"train/{key}": value for key, value in values.items()})

    def _sync(self, last: bool) -> Any:
        """Exchange gradients only with the window's last batch, where the strategy can wait."""
        import contextlib

        strategy = self.trainer.strategy
        control = getattr(strategy, "_backward_sync_control", None)
        if last or control is None or self.trainer.world_size == 1:
            return contextlib.nullcontext()
        return control.no_backward_sync(strategy.model, True)

    def _clip(self) -> Tensor:
        trained = [p for p in self.parameters() if p.grad is not None]
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        return torch.nn.utils.clip_grad_norm_(trained, limit)

    def on_validation_epoch_start(self) -> None:
        self._eval = {}

    def validation_step(self, window: Window, _: int) -> None:
        """Add the window's metrics to the epoch's; the loss is a mean over all targets or examples."""
        total = getattr(window, self.normalised_by)
        for batch in window.batches:
            step = self.step(batch, 1)
            for key, (value, count) in {**step.sums, "loss": (step.loss, 0)}.items():
                held = self._eval.setdefault(key, [0.0, 0.0])
                held[0] += float(value)
                held[1] += count
        # The window's total counts all processes: it is added once, by the first.
        if self.trainer.is_global_zero:
            self._eval["loss"][1] += total

    def on_validation_epoch_end(self) -> None:
        """Log `eval/NAME`: exact means over the whole held-out set and all processes."""
        held = torch.tensor(list(self._eval.values()), device=self.device, dtype=torch.float64)
        held = self.trainer.strategy.reduce(held, reduce_op="sum")
        means = (held[:, 0] / held[:, 1]).tolist()
        self.log_dict({f"eval/{key}": value for key, value in zip(self._eval, means, strict=True)})
        self.validated_at = self.global_step

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the trained weights, with a schedule over the run's real number of steps."""
        from transformers import get_scheduler

        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=self.learning_rate, betas=self.adam_betas, eps=self.adam_epsilon, weight_decay=self.weight_decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(self.warmup_ratio * steps)
        scheduler = get_scheduler(self.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Checkpoints hold what is trained, never the frozen base.

    @property
    def strict_loading(self) -> bool:
        return False

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The trained weights only."""
        whole = super().state_dict(*args, **kwargs)
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {key: value for key, value in whole.items() if key in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load trained weights; a non-strict load would hide that some are missing, so names and shapes are compared.

        Raises:
            UserError: the checkpoint holds other weights than this model trains.
        """
        trained = {(name, p.shape) for name, p in self.named_parameters() if p.requires_grad}
        given = {(name, value.shape) for name, value in state_dict.items()}
        if trained != given:
            missing, extra = sorted(trained - given), sorted(given - trained)
            name, shape = (missing or extra)[0]
            raise UserError(
                f"The checkpoint does not fit this run: {len(missing)} trained weights are missing from it and "
                f"{len(extra)} are unknown here (for example {name} of shape {tuple(shape)}). Resume with the "
                "model, peft and start_from that it was made with."
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random state, so that dropout goes on as it would have."""
        rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        held_out = {k: float(v) for k, v in self.trainer.callback_metrics.items() if k.startswith("eval/")}
        checkpoint["lit_ft"] = {
            "rng": rng,
            "num_tokens": self.num_tokens,
            "parent": self.parent,
            "identity": self.identity,
            "before": self.before,
            "metrics": held_out,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint.get("lit_ft", {})
        self.num_tokens = own.get("num_tokens", 0)
        self._rng = own.get("rng")

    def on_train_batch_start(self, *_: Any) -> None:
        """Restore the random state just before the first step after a resume: what ran since must not count."""
        if self._rng is not None:
            torch.set_rng_state(self._rng["cpu"].cpu())
            if "cuda" in self._rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(self._rng["cuda"].cpu(), self.device)
            self._rng = None


def _add(into: Sums, sums: Sums) -> None:
    for key, (value, count) in sums.items():
        held, held_count = into.get(key, (torch.zeros_like(value), 0))
        into[key] = (held + value.detach(), held_count + count)
