"""The scripts in examples/ run as they are, on a tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["train_sft.py", "train_dpo.py"])
def test_script_trains_an_adapter(script: str, tmp_path: Path, llama_folder: Path) -> None:
    from peft import PeftConfig

    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), str(llama_folder), "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "my-adapter"
    assert PeftConfig.from_pretrained(str(tmp_path / "my-adapter")).r == 16


def test_answers_of_base_and_adapters(tmp_path: Path, llama_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lit_ft.models.adapt import save_trained
    from lit_ft.models.kinds.lora import apply_lora

    save_trained(apply_lora(AutoModelForCausalLM.from_pretrained(llama_folder)), tmp_path / "my-adapter")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "answers.py"), f"model={llama_folder}", "my-adapter"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> **") == 3 and done.stdout.count("*base*") == done.stdout.count("*my-adapter*") == 3


def test_every_script_is_tested() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {
        "train_sft.py", "train_dpo.py", "answers.py", "rewards.py",
    }  # fmt: skip


def test_the_examples_of_reward_functions_by_hand() -> None:
    from examples.rewards import brief, right_number

    said = [[{"role": "assistant", "content": "word " * count}] for count in (10, 40, 80)]
    assert brief(["?"] * 3, said) == [1.0, 1.0, 0.5]
    answers = ["So 2+3=5.\n#### 5", "#### 1,200", "#### 7"]
    assert right_number(["?"] * 3, ["It is 5.", "1200", "none"], answer=answers) == [1.0, 1.0, 0.0]
