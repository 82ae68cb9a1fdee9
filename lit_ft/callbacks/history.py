"""What a run took and how its losses went, kept beside the adapter for the report on it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lit_ft.adapter import HISTORY
from lit_ft.resources.energy import EnergyMeter
from lit_ft.resources.memory import peak_memory

TRAINING, HELD_OUT = "training", "held-out"
# Points of a curve; where a run has more steps, every second, fourth … is kept.
_POINTS = 1000


class History(Callback):
    """Counts seconds and joules of training (validations within it count, too) and keeps both loss curves.

    A resumed run goes on counting where its last checkpoint left off.

    Args:
        gpus: those of this machine that the run uses, as PyTorch numbers them.
    """

    def __init__(self, gpus: Sequence[int] = ()) -> None:
        self.gpus = tuple(gpus)
        self.seconds = 0.0
        self.joules: float | None = None
        self.meters: tuple[str, ...] = ()
        self.curves: dict[str, list[tuple[int, float]]] = {TRAINING: [], HELD_OUT: []}
        self._every = 1
        self._since: float | None = None
        self._meter: EnergyMeter | None = None
        self._joules_before: float | None = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._since, self._meter = time.monotonic(), EnergyMeter(self.gpus)
        # What other meters counted before cannot be added to.
        same = self._meter.names == self.meters
        self._joules_before = (self.joules if same else None) if self.seconds else 0.0
        self.meters = self._meter.names

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._count()
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None and trainer.global_step % self._every == 0:
            points = self.curves[TRAINING]
            points.append((trainer.global_step, float(loss)))
            if len(points) > _POINTS:
                self._every *= 2
                points[:] = [point for point in points if point[0] % self._every == 0]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        loss = trainer.callback_metrics.get("eval/loss")
        points = self.curves[HELD_OUT]
        if loss is not None and (not points or points[-1][0] < trainer.global_step):
            points.append((trainer.global_step, float(loss)))

    def _count(self) -> None:
        if self._since is not None and self._meter is not None:
            now = time.monotonic()
            self.seconds, self._since = self.seconds + now - self._since, now
            joules = self._meter.read()
            # A part of a run that no meter counted leaves the whole uncounted.
            known = joules is not None and self._joules_before is not None
            self.joules = self._joules_before + joules if known else None  # type: ignore[operator]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._count()

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "joules": self.joules,
            "meters": self.meters,
            "curves": self.curves,
            "every": self._every,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.joules = state_dict["seconds"], state_dict["joules"]
        self.meters = tuple(state_dict.get("meters", ()))  # older checkpoints do not say
        self.curves = {name: [tuple(p) for p in points] for name, points in state_dict["curves"].items()}
        self._every = state_dict["every"]

    def write(
        self,
        folder: Path,
        *,
        num_tokens: int,
        device: torch.device,
        estimated_bytes: int | None = None,
        trainable: int | None = None,
    ) -> None:
        """Write it into `folder`; `trainable` weights were trained, which may be fewer than are published."""
        curves = {name: [p for p in points if math.isfinite(p[1])] for name, points in self.curves.items()}
        found = {
            "seconds": self.seconds,
            "joules": self.joules,
            "meters": self.meters,
            "unmetered": () if self._meter is None else self._meter.missing,
            "num_tokens": num_tokens,
            "peak_bytes": peak_memory(device),
            "estimated_bytes": estimated_bytes,
            "trainable": trainable,
            "curves": curves,
        }
        (folder / HISTORY).write_text(json.dumps(found) + "\n", encoding="utf-8")
