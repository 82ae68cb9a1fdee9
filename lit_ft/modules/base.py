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
from lit_ft.distributed.processes import gathered
from lit_ft.errors import UserError
from lit_ft.models.score import kl_from_base, score_gathered
from lit_ft.models.shard import clip_grad_norm, is_sharded, shard, synchronising
from lit_ft.modules.anchor import Anchor

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
        loraplus_lr_ratio: the learning rate of LoRA's B over that of everything else (LoRA+, arXiv:2402.12354).
        penalty: of the model, added to the loss once per optimizer step, or None there.
        anchor: what holds the policy to its base, or None.
    """

    # By what steps are compared.
    monitor: str = "eval/loss"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"
    # The held-out metrics that say most.
    headline: ClassVar[tuple[str, ...]] = ("loss", "kl", "mean_token_accuracy", "rewards/accuracies", "rewards/margins")
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
        loraplus_lr_ratio: float = 1.0,
        penalty: Callable[[Any], Tensor | None] = lambda model: None,
        anchor: Anchor | None = None,
    ) -> None:
        super().__init__()
        if loraplus_lr_ratio <= 0:
            raise UserError(f"peft.loraplus_lr_ratio={loraplus_lr_ratio} must be above 0; LoRA+ takes 2 to 16.")
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
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.penalty = penalty
        self.anchor = anchor
        if anchor is not None and anchor.weight:
            self.monitor = "eval/combined"
        self.num_tokens = 0
        # The adapter that training began with (`name@vN`), kept in checkpoints so that a resume begins with it too.
        self.parent: str | None = None
        # What a resume must have in common with this run; and the held-out metrics before the first step.
        self.identity: dict[str, str] = {}
        self.before: dict[str, float] = {}
        self.validated_at = -1
        # After a resume, the step at which the interrupted run had validated last.
        self._validated_before: int | None = None
        # The batch with the most tokens that was tried: what a step took at most, should memory run out.
        self.largest: Batch | None = None
        self._eval: Sums = {}
        self._eval_total = 0
        self._rng: dict[str, Any] | None = None
        self._draw_anew = False  # after a resume by another number of processes, which has no states of its own

    @abstractmethod
    def step(self, batch: Batch, total: int) -> Step:
        """Loss and metrics of one batch; the loss is a sum over the batch divided by `total`."""

    def configure_model(self) -> None:
        """Build the model, and shard it under `ModelParallelStrategy`, if that is still to be done.

        Lightning may call this more than once.
        """
        if self.model is None:
            assert self._build is not None
            self.model = self._build()
        if self._device_mesh is not None and not is_sharded(self.model):
            shard(self.model, self._device_mesh, score_gathered)
        # from_pretrained leaves eval mode, and Lightning does not change it: checkpointing would be silently off.
        self.model.train()

    def training_step(self, window: Window, _: int) -> None:
        """One optimizer step."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        total = getattr(window, self.normalised_by)
        replicas = self._replicas()
        # First, so that the window's last backward pass is the step's last.
        sums: Sums = self._hold_to_base(replicas)
        penalties: dict[str, float] = {}
        for number, batch in enumerate(window.batches):
            counted = number < len(window.batches) - window.fillers
            last = number == len(window.batches) - 1
            with synchronising(self.model, self.trainer.strategy.model, last=last):
                self._note(batch)
                step = self.step(batch, total)
                # Strategies average gradients over processes, but `total` already counts all of them.
                loss = step.loss * (replicas if counted else 0)
                if last and (penalty := self.penalty(self.model)) is not None:
                    loss, penalties = loss + penalty, {"penalty": float(penalty.detach())}
                self.manual_backward(loss)
            _add(sums, {**step.sums, "loss": (step.loss, 0), "tokens": (torch.tensor(float(batch.tokens)), 0)}, counted)
        sums = self._over_processes(sums)
        norm = self._clip()
        scheduler: Any = self.lr_schedulers()
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        self.num_tokens += int(sums.pop("tokens")[0])
        values = {key: (value / count if count else value) for key, (value, count) in sums.items()}
        values |= {"grad_norm": norm, "learning_rate": rate, "num_tokens": float(self.num_tokens), **penalties}
        self.log_dict({f"train/{key}": float(value) for key, value in values.items()})

    def _hold_to_base(self, replicas: int) -> Sums:
        """Backpropagate the KL to the base on a few of its answers, others in each step; returns it to be logged."""
        if self.anchor is None or not self.anchor.kl_coef:
            return {}
        batches, total = self.anchor.step(self.global_step, self._replica(), replicas)
        kl, count = torch.zeros((), device=self.device), 0
        for batch in (one.to(self.device) for one in batches):
            with synchronising(self.model, self.trainer.strategy.model, last=False):
                self._note(batch)
                found = kl_from_base(self.model, batch).sum()
                self.manual_backward(self.anchor.kl_coef * replicas / total * found)
            kl, count = kl + found.detach(), count + len(batch.target_ids)
        return {"kl": (kl, count)}

    def _measure_from_base(self) -> Sums:
        """The KL to the base on its held-out answers."""
        if self.anchor is None or not self.anchor.held_out:
            return {}
        kl, count = torch.zeros((), device=self.device, dtype=torch.float64), 0
        for batch in self.anchor.measured(self._replica(), self._replicas()):
            kl = kl + kl_from_base(self.model, batch.to(self.device)).sum()
            count += len(batch.target_ids)
        return {"kl": (kl, count)}

    def _note(self, batch: Batch) -> None:
        if self.largest is None or batch.input_ids.numel() > self.largest.input_ids.numel():
            self.largest = batch

    def _replicas(self) -> int:
        """How many processes share the examples; those that share a model's tensors count as one."""
        return getattr(self.trainer.strategy, "distributed_sampler_kwargs", {}).get("num_replicas", 1)

    def _replica(self) -> int:
        """Which of them this process is."""
        return getattr(self.trainer.strategy, "distributed_sampler_kwargs", {}).get("rank", 0)

    def _over_processes(self, sums: Sums) -> Sums:
        """`sums` over all processes, in one exchange."""
        if self.trainer.world_size == 1:
            return sums
        mine = torch.stack([value.detach().double().to(self.device) for value, _ in sums.values()])
        counts = torch.tensor([count for _, count in sums.values()], dtype=mine.dtype, device=self.device)
        both = self.trainer.strategy.reduce(torch.stack([mine, counts]), reduce_op="sum")
        both = both * self._replicas() / self.trainer.world_size  # once for all that see the same examples
        counted = both[1].round().long().tolist()
        return {key: (value, count) for key, value, count in zip(sums, both[0], counted, strict=True)}

    def _clip(self) -> Tensor:
        return clip_grad_norm(self.parameters(), self.max_grad_norm if self.max_grad_norm > 0 else float("inf"))

    def on_validation_epoch_start(self) -> None:
        self._eval, self._eval_total = {}, 0

    def validation_step(self, window: Window, _: int) -> None:
        """Add the window's metrics to the epoch's; the loss is a mean over all targets or examples."""
        for number, batch in enumerate(window.batches):
            self._note(batch)
            step = self.step(batch, 1)
            counted = number < len(window.batches) - window.fillers
            found: Sums = {**step.sums, "loss": (step.loss, 0)}
            # A held-out set is long: its sums are kept in double precision.
            exact = {key: (torch.tensor(float(value), dtype=torch.float64), n) for key, (value, n) in found.items()}
            _add(self._eval, exact, counted)
        self._eval_total += getattr(window, self.normalised_by)

    def on_validation_epoch_end(self) -> None:
        """Log `eval/NAME`: exact means over the whole held-out set and all processes."""
        sums = self._over_processes(self._eval | self._measure_from_base())
        sums["loss"] = (sums["loss"][0], self._eval_total)  # the total counts all processes already
        found = {key: float(value) / count for key, (value, count) in sums.items()}
        if self.anchor is not None and "kl" in found:
            found["combined"] = found["loss"] + self.anchor.weight * found["kl"]
        self.log_dict({f"eval/{key}": value for key, value in found.items()})
        self.validated_at = self.global_step

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the trained weights, with a schedule over the run's real number of steps."""
        from transformers import get_scheduler

        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": [p for _, p in trained]}]
        if self.loraplus_lr_ratio != 1:
            faster = {name for name, _ in trained if ".lora_B." in name}
            groups = [
                {"params": [p for name, p in trained if name not in faster]},
                {
                    "params": [p for name, p in trained if name in faster],
                    "lr": self.learning_rate * self.loraplus_lr_ratio,
                },
            ]
        optimizer = torch.optim.AdamW(
            groups, lr=self.learning_rate, betas=self.adam_betas, eps=self.adam_epsilon, weight_decay=self.weight_decay
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
        if not is_sharded(self.model):  # PyTorch adds the frozen ones before it comes here, and ours were compared
            self.check_state_dict(state_dict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raise UserError if `state_dict` holds other weights, or of other shapes, than this model trains."""
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random state of every process, so that dropout goes on as it would have."""
        rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
        device = self.trainer.strategy.root_device  # the module's own is the CPU where weights are offloaded
        if device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(device)
        held_out = {k: float(v) for k, v in self.trainer.callback_metrics.items() if k.startswith("eval/")}
        checkpoint["lit_ft"] = {
            "rng": gathered(rng),
            "replicas": self._replicas(),
            "num_tokens": self.num_tokens,
            "parent": self.parent,
            "identity": self.identity,
            "before": self.before,
            "metrics": held_out,
            "validated_at": self.validated_at,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint.get("lit_ft", {})
        self.num_tokens = own.get("num_tokens", 0)
        self._validated_before = int(own.get("validated_at", -1))
        states = own.get("rng", [])
        same = len(states) == self.trainer.world_size and own.get("replicas") == self._replicas()
        self._rng = states[self.trainer.global_rank] if same else None
        self._draw_anew = not same

    def on_train_start(self) -> None:
        """Give each replica random numbers of its own; processes that share a model's tensors must draw the same."""
        if (self.trainer.world_size > 1 and self._rng is None) or self._draw_anew:
            ranks = getattr(self.trainer.strategy, "distributed_sampler_kwargs", {})
            torch.manual_seed(torch.initial_seed() + 1_000_003 * (ranks.get("rank", 0) + 1) + 7919 * self.global_step)
            self._draw_anew = False
        before, self._validated_before = self._validated_before, None
        if before is not None and before != self.global_step and self.trainer.enable_validation:
            self._validate_as_if_uninterrupted()

    def _validate_as_if_uninterrupted(self) -> None:
        """Make up for the validation that an interruption came before: the step may be the best one.

        A checkpoint is written before the validation of its step, and Lightning goes on with the next step.
        """
        loop, every = self.trainer.fit_loop.epoch_loop, self.trainer.val_check_batch
        by_epoch = self.trainer.check_val_every_n_epoch is not None
        taken = loop.batch_progress.current.ready if by_epoch else loop.batch_progress.total.ready
        if taken and every and taken % every == 0:
            self.trainer.validating = True
            loop.val_loop.run()
            self.trainer.training = True

    def on_train_batch_start(self, *_: Any) -> None:
        """Restore the random state just before the first step after a resume: what ran since must not count."""
        if self._rng is not None:
            torch.set_rng_state(self._rng["cpu"].cpu())
            device = self.trainer.strategy.root_device
            if "cuda" in self._rng and device.type == "cuda":
                torch.cuda.set_rng_state(self._rng["cuda"].cpu(), device)
            self._rng = None


def _add(into: Sums, sums: Sums, counted: bool = True) -> None:
    """Add `sums` to `into`; those that do not count leave their keys there, so that all processes have the same."""
    for key, (value, count) in sums.items():
        held, held_count = into.get(key, (torch.zeros_like(value), 0))
        into[key] = (held + value.detach(), held_count + count) if counted else (held, held_count)
