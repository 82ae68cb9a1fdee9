"""The training bar on standard error: step, loss, tokens per second, time left."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch.callbacks import ProgressBar

from lit_ft.progress import Progress, metric_line, say


class TrainingBar(ProgressBar):
    """A bar where a person watches, a line every ten seconds elsewhere; one line after each validation."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Progress | None = None
        self._held_out: Progress | None = None
        self._on = True
        self._clock = (0.0, 0)

    def disable(self) -> None:
        self._on = False

    def enable(self) -> None:
        self._on = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._on and trainer.is_global_zero:
            total = int(trainer.estimated_stepping_batches)
            self._bar = Progress("training: step", total, done=trainer.global_step)
            self._clock = (time.monotonic(), pl_module.num_tokens)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self._bar is not None:
            self._bar.show(trainer.global_step, self._note(trainer, pl_module))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._on and trainer.is_global_zero:
            batches = sum(int(count) for count in trainer.num_val_batches)
            self._held_out = Progress("held out: batch", batches)

    def on_validation_batch_end(self, *_: Any) -> None:
        if self._held_out is not None:
            self._held_out.advance()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._held_out is not None:
            self._held_out.close()
        if self._bar is not None and not trainer.sanity_checking:
            shown = metric_line(trainer.callback_metrics, pl_module.headline)
            say(f"held out at step {trainer.global_step}: {shown}")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._bar is not None:
            self._bar.close(self._note(trainer, pl_module), always=True)

    def _note(self, trainer: Any, pl_module: Any) -> str:
        start, tokens = self._clock
        rate = (pl_module.num_tokens - tokens) / max(time.monotonic() - start, 1e-9)
        said = ""
        for name in ("loss", "objective/scores"):
            if (value := trainer.callback_metrics.get(f"train/{name}")) is not None:
                said += f"{name.removeprefix('objective/')} {float(value):.4f} · "
        return f"{said}{rate:,.0f} tokens/s"
