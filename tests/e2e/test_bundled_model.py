"""The default commands on the bundled model, with part of the data: what is learnt is what the README promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_ft import adapter

pytestmark = pytest.mark.alone


def train(folder: Path, *args: str) -> adapter.Adapter:
    # All cores: this is real training, unlike the tiny models of the other tests.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "lit_ft", *args], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return adapter.read(folder / done.stdout.strip())


@pytest.mark.timeout(1500)
def test_sft_lowers_the_loss_by_a_third_and_dpo_prefers_the_chosen(tmp_path: Path) -> None:
    sft = train(tmp_path, "+experiment=sft", "data.max_rows=160").card
    assert sft.base.id == "bundled" and sft.servable
    assert sft.metrics["eval/loss"] <= 0.7 * sft.metrics["before/loss"]
    dpo = train(tmp_path, "+experiment=dpo", "data.max_rows=32", "data.max_val_rows=20").card
    assert dpo.parent == "support@v1"
    assert dpo.metrics["eval/rewards/accuracies"] >= 0.8
