"""A Lightning logger that notes when each step's metrics came, for the tokens per second of a real run."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch.loggers.logger import Logger

# (when, in seconds; tokens trained on so far) per step of the run in this process.
TICKS: list[tuple[float, float]] = []
# Everything that was logged of each step.
METRICS: list[dict[str, float]] = []


class Clock(Logger):
    """Given as `logger=none logger._target_=tests.benchmarks.clock.Clock` with `trainer.log_every_n_steps=1`."""

    name = "clock"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "train/num_tokens" in metrics:
            TICKS.append((time.perf_counter(), float(metrics["train/num_tokens"])))
            METRICS.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Lightning asks for it."""


def tokens_per_second() -> float:
    """From the end of the first step, which warms up, to the end of the last."""
    (begun, before), (ended, after) = TICKS[0], TICKS[-1]
    return (after - before) / (ended - begun)
