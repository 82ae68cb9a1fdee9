"""Ctrl-C and SIGTERM: the step at hand is finished, the last checkpoint written, then the run ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch.callbacks import Callback

from lit_ft.distributed.launched import ending, tell_launcher
from lit_ft.distributed.processes import greatest
from lit_ft.progress import say

# Seconds in which several signals are one request: the launcher's end may be told more than once (`ending`).
_AT_ONCE = 1.0


class Interrupted(BaseException):
    """The run was asked to stop. Not an Exception: nothing should swallow it.

    `checkpoint` is what was kept, or None where there was nothing to keep yet.
    """

    def __init__(self, signum: int, checkpoint: Path | None) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum
        self.checkpoint = checkpoint


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`: Lightning would end with exit code 1, or 0, and say nothing."""

    asked_at = float("-inf")

    def stop(signum: int, _: FrameType | None) -> None:
        nonlocal asked_at
        if time.monotonic() - asked_at > _AT_ONCE:
            asked_at = time.monotonic()
            ending()
            raise Interrupted(signum, None)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class FinishStepOnSignal(Callback):
    """Wait for the end of the step, so that the checkpoint is one from which a resume is exact.

    A second signal ends the run at once.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.received: int | None = None
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # After Lightning has put its own SIGTERM handler, which would end the run with exit code 0.
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._receive)
        tell_launcher(self.checkpoint)

    def _receive(self, signum: int, _: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._received_at > _AT_ONCE:
                signal.signal(signum, signal.SIG_DFL)
                signal.raise_signal(signum)
            return
        self.received, self._received_at = signum, time.monotonic()
        ending()
        say("\nStopping after this step (once more to stop at once) …")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        # One process may have been asked alone, or the others a step later: they stop together.
        # `received` itself is left alone: a signal may come while they agree, and is then for the next step.
        if received := greatest(self.received or 0):
            self.received = received
            trainer.save_checkpoint(self.checkpoint)
            tell_launcher(None)  # train() says how to go on
            raise Interrupted(received, self.checkpoint if self.checkpoint.exists() else None)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}
        if self.received is not None:
            tell_launcher(None)
