"""Asked to stop: the request is never lost, whenever in a step it comes."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from lit_ft.callbacks import interrupt
from lit_ft.callbacks.interrupt import FinishStepOnSignal, Interrupted


class Saves:
    """As much of a trainer as is needed."""

    def save_checkpoint(self, path: Path) -> None:
        path.write_text("whole")


@pytest.fixture
def stopper(tmp_path: Path) -> Any:
    callback = FinishStepOnSignal(tmp_path / "last.ckpt")
    callback.on_train_start(None, None)
    yield callback
    callback.teardown(None, None, "fit")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step(stopper: FinishStepOnSignal, signum: int) -> None:
    stopper.on_train_batch_end(Saves())
    signal.raise_signal(signum)
    with pytest.raises(Interrupted) as stop:
        stopper.on_train_batch_end(Saves())
    assert stop.value.exit_code == 128 + signum and stop.value.checkpoint == stopper.checkpoint
    assert stopper.checkpoint.read_text() == "whole"


def test_a_signal_that_comes_while_the_processes_agree_is_for_the_next_step(
    stopper: FinishStepOnSignal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def agree(mine: int) -> int:
        signal.raise_signal(signal.SIGTERM)  # after this process has said that nobody asked it
        return mine

    with monkeypatch.context() as patch:
        patch.setattr(interrupt, "greatest", agree)
        stopper.on_train_batch_end(Saves())
    with pytest.raises(Interrupted) as stop:
        stopper.on_train_batch_end(Saves())
    assert stop.value.exit_code == 128 + signal.SIGTERM


def test_another_process_was_asked(stopper: FinishStepOnSignal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "greatest", lambda mine: int(signal.SIGINT))
    with pytest.raises(Interrupted) as stop:
        stopper.on_train_batch_end(Saves())
    assert stop.value.exit_code == 130 and stopper.received == signal.SIGINT
