"""What a resume goes on from, what it refuses, and which weights are published in the end."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_ft import adapter
from lit_ft.models import adapt
from tests.conftest import Outcome

FEW = ("data.max_length=2048", "data.max_rows=8", "data.max_val_rows=2", "data.batch_size=4", "trainer.accelerator=cpu")
# A rate that destroys the model: the best held-out loss comes early.
DESTRUCTIVE = ("algorithm.learning_rate=0.3", "algorithm.lr_scheduler_type=constant", "algorithm.max_grad_norm=0")

Run = Callable[..., Outcome]


@pytest.fixture
def run(cli: Run, own_cache: Path, llama_folder: Path) -> Run:
    return lambda *args: cli(f"model.id={llama_folder}", "logger=none", *FEW, *args)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the next run receive Ctrl-C in the step given."""
    import signal

    from lit_ft.modules.base import FineTuneModule

    train_step = FineTuneModule.training_step

    def at(step: int) -> None:
        def training_step(self: FineTuneModule, window: object, index: int) -> None:
            if self.global_step + 1 == step:
                monkeypatch.setattr(FineTuneModule, "training_step", train_step)
                signal.raise_signal(signal.SIGINT)
            train_step(self, window, index)  # type: ignore[arg-type]

        monkeypatch.setattr(FineTuneModule, "training_step", training_step)

    return at


def losses(err: str) -> list[float]:
    lines = [line for line in err.splitlines() if line.startswith("held out at step")]
    return [float(line.split("eval/loss ")[1].split(",")[0]) for line in lines]


def test_the_best_score_outlives_an_interruption(
    run: Run, interrupted: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_ft.modules.base import FineTuneModule

    def worse_each_time(self: FineTuneModule, *_: object) -> None:
        self._eval, self._eval_total = {"loss": (torch.tensor(float(self.global_step)), 0)}, 1

    monkeypatch.setattr(FineTuneModule, "validation_step", worse_each_time)
    interrupted(7)  # in the fourth of six epochs
    first = run("trainer.max_epochs=6")
    assert first.code == 130 and losses(first.err) == [2, 4, 6], first.err
    second = run("trainer.max_epochs=6", "resume=last")
    assert second.code == 0 and losses(second.err) == [8, 10, 12], second.err
    metrics = adapter.find(Path("adapters"), "support").card.metrics
    assert metrics["step"] == metrics["eval/loss"] == 2
    assert "dirpath" not in second.err


def test_the_validation_that_an_interruption_came_before_is_made_up_for(
    run: Run, interrupted: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_ft.modules.base import FineTuneModule

    def best_at_six(self: FineTuneModule, *_: object) -> None:
        self._eval, self._eval_total = {"loss": (torch.tensor(1.0 + abs(self.global_step - 6)), 0)}, 1

    monkeypatch.setattr(FineTuneModule, "validation_step", best_at_six)
    interrupted(6)  # in the last step of the third epoch
    first = run("trainer.max_epochs=6")
    assert first.code == 130 and losses(first.err) == [5, 3], first.err
    second = run("trainer.max_epochs=6", "resume=last")
    assert second.code == 0 and losses(second.err) == [1, 3, 5, 7], second.err
    assert adapter.find(Path("adapters"), "support").card.metrics["step"] == 6


def test_sft_does_not_resume_a_dpo_run(run: Run, interrupted: Callable[[int], None]) -> None:
    interrupted(2)
    stopped = run("+experiment=dpo", "trainer.max_steps=4")
    assert stopped.code == 130, stopped.err
    refused = run("+experiment=sft", "trainer.max_steps=4", "resume=last")
    assert refused.code == 2 and "no unfinished sft run" in refused.err
    (checkpoint,) = Path("runs").glob("**/last.ckpt")
    named = run("+experiment=sft", "trainer.max_steps=4", f"resume={checkpoint}")
    assert named.code == 2 and "of another run: algorithm" in named.err
    assert run("+experiment=dpo", "trainer.max_steps=4", "resume=last").code == 0


def test_other_data_is_refused(run: Run, interrupted: Callable[[int], None], tmp_path: Path) -> None:
    interrupted(2)
    assert run("trainer.max_steps=4").code == 130
    rows = [{"prompt": f"{k}?", "completion": f"{k}."} for k in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    outcome = run("trainer.max_steps=4", "resume=last", f"data.path={tmp_path / 'rows.jsonl'}")
    assert outcome.code == 2 and "data changed since" in " ".join(outcome.err.split())


def test_a_finished_run_is_not_resumed(run: Run) -> None:
    assert run("trainer.max_steps=2").code == 0
    assert "no unfinished sft run" in run("trainer.max_steps=2", "resume=last").err


def test_after_a_full_disk_a_resume_publishes_without_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def no_space(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(adapt, "save_trained", no_space)
        full = run("trainer.max_epochs=1")
    assert full.code == 2 and "No space left" in full.err and not list(Path("adapters").glob("*/*"))
    again = run("trainer.max_epochs=1", "resume=last")
    assert again.code == 0, again.err
    assert "training: step" not in again.err.replace("training: step 2/2", ""), "trained anew"
    assert adapter.find(Path("adapters"), "support").card.metrics["step"] == 2


def test_steps_after_the_last_validation_count(run: Run) -> None:
    # An epoch has two steps: the third follows the only validation on the way.
    outcome = run("trainer.max_steps=3", "algorithm.learning_rate=1e-2", "algorithm.lr_scheduler_type=constant")
    assert outcome.code == 0, outcome.err
    assert adapter.find(Path("adapters"), "support").card.metrics["step"] == 3


def test_worse_steps_after_the_last_validation_do_not(run: Run) -> None:
    outcome = run("trainer.max_steps=3", *DESTRUCTIVE)
    card = adapter.find(Path("adapters"), "support").card
    seen = losses(outcome.err)
    assert card.metrics["eval/loss"] == pytest.approx(min(seen), abs=1e-4)


def test_ctrl_c_before_training_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    from lit_ft.modules.base import FineTuneModule

    monkeypatch.setattr(FineTuneModule, "validation_step", lambda *_: signal.raise_signal(signal.SIGINT))
    outcome = run("trainer.max_steps=2")
    assert outcome.code == 130 and "nothing was published" in outcome.err
    assert not Path("adapters").exists() and not list(Path("runs").glob("*/*")), "an empty run leaves no folder"


def test_dpo_keeps_the_rank_of_the_adapter_it_goes_on_from(run: Run) -> None:
    assert run("peft.r=4", "trainer.max_steps=1").code == 0
    outcome = run("+experiment=dpo", "trainer.max_steps=1")
    assert outcome.code == 0 and "r=4 as support@v1 has it" in outcome.err
    assert adapter.find(Path("adapters"), "support@v2").card.rank == 4
