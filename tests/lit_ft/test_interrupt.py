"""Interrupted and resumed training equals uninterrupted training, to the bit; real signals to a real process.

Kill -9, several processes and full disks: test_faults.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

ARGS = (
    "data.max_length=2048",
    "data.max_rows=24",
    "data.max_val_rows=4",
    "data.batch_size=2",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "trainer.validate_first=false",
    "logger=none",
    # Dropout draws random numbers: the resume must go on with the same ones.
    "peft.dropout=0.3",
)


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lit_ft", *ARGS, *args],
        cwd=folder,
        env={**os.environ, "LIT_FT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapters" / "support" / "v1" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    _, err = (process := start(folder, f"model.id={llama_folder}")).communicate(timeout=300)
    assert process.returncode == 0, err
    return weights(folder)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_the_last_checkpoint_and_resume_is_exact(
    tmp_path: Path, llama_folder: Path, uninterrupted: dict[str, torch.Tensor], signum: int, code: int
) -> None:
    # Slowed down by writing a checkpoint each step, so that the signal arrives in the middle.
    process = start(tmp_path, f"model.id={llama_folder}", "trainer.save_every_n_steps=1")
    checkpoint_folder = tmp_path / "runs" / "support"
    deadline = time.monotonic() + 200
    while not list(checkpoint_folder.glob("*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert out == "" and not (tmp_path / "adapters").exists(), "an interrupted run publishes nothing"
    assert "resume=" in err and "Traceback" not in err
    (kept,) = checkpoint_folder.glob("*/checkpoints/last.ckpt")
    step = torch.load(kept, weights_only=True)["global_step"]
    assert 0 < step < 24
    resumed = start(tmp_path, f"model.id={llama_folder}", "resume=last")
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert out == "adapters/support/v1\n"
    found = weights(tmp_path)
    assert found.keys() == uninterrupted.keys()
    for key, value in found.items():
        assert torch.equal(value, uninterrupted[key]), key
