"""The benchmark itself: what it calls a disagreement, what it sums up, and a whole run on a tiny model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import training
from tests.benchmarks.rows import data_tokens, random_rows, rows_of_length
from tests.benchmarks.training import Result

ROOT = Path(__file__).parents[2]


def result(system: str = "lit_ft", variant: str = "", number: int = 0, **changes: Any) -> Result:
    usual: dict[str, Any] = {
        "tokens": 1000,
        "seconds": 10.0,
        "peak_bytes": 4,
        "matrix_rate": 100.0,
        "flops": 600.0,
        "losses": [2.0, 1.0],
        "grad_norms": [1.0, 0.5],
    }
    return Result(system, variant, number, **{**usual, **changes})


def test_equal_losses_agree() -> None:
    assert training.disagreements([result(), result("TRL", "padded"), result("TRL", "flat")], "sft", 1e-3) == []


@pytest.mark.parametrize("losses", [[2.0, 1.01], [2.0, math.nan], [2.0]])
def test_other_losses_do_not(losses: list[float]) -> None:
    found = training.disagreements([result(losses=losses), result("TRL", "padded")], "sft", 1e-3)
    assert len(found) == 1
    assert "padded" in found[0]


@pytest.mark.parametrize("norm", [0.0, math.nan])
def test_a_gradient_that_is_zero_or_no_number_is_wrong(norm: float) -> None:
    found = training.disagreements([result(grad_norms=[1.0, norm]), result("TRL", "padded")], "dpo", 1e-3)
    assert f"dpo: lit_ft has a gradient of {norm} at step 2" in found


def test_losses_of_other_batches_are_no_comparison() -> None:
    """TRL's packed rows hold other examples together: with nothing else run, nothing was compared."""
    packed = result("TRL", "packed", losses=[9.0, 9.0])
    assert "not compared" in training.disagreements([result(), packed], "sft", 1e-3)[0]
    assert training.disagreements([result(), packed, result("TRL", "flat")], "sft", 1e-3) == []


def test_the_summary_by_hand() -> None:
    """Against the fastest setting only, ratios taken within each round, then their median."""
    results = [
        result("TRL", "padded", 0, seconds=100.0, peak_bytes=40),
        result("TRL", "flat", 0, seconds=40.0, peak_bytes=10),
        result(number=0, seconds=10.0),  # 100 tokens/s beside 25
        result("TRL", "flat", 1, seconds=20.0, peak_bytes=10),
        result(number=1, seconds=10.0),  # 100 beside 50
        result("TRL", "flat", 2, seconds=30.0, peak_bytes=10),
        result(number=2, seconds=10.0),  # 100 beside 33.3
    ]
    assert training.summarize(results) == {
        "ratio": 3.0,
        "tokens_per_s": 100.0,
        "trl_tokens_per_s": 33.3,
        "peak_ratio": 0.4,
        "roofline": 0.6,  # 600 operations in 10 s beside a rate of 100 in one
    }


def test_data_is_told_apart_by_its_rows() -> None:
    folder = ROOT / "examples" / "data"
    files = [folder / name / "train.jsonl" for name in ("support_preferences", "support_sft")]
    options = training.parse(["--data", *map(str, files)])
    assert options.files == {"dpo": files[0], "sft": files[1]}
    assert training.parse(["--data", str(files[0])]).algorithms == ["dpo"]


def test_random_rows() -> None:
    pairs = random_rows("preference", 500, 50, 256)
    assert pairs == random_rows("preference", 500, 50, 256)
    assert all(len(pair.completions) == 2 and pair.longest <= 256 for pair in pairs)
    assert data_tokens(pairs[:1]) == 2 * len(pairs[0].prompt) + sum(len(c.ids) for c in pairs[0].completions)
    assert [example.tokens for example in rows_of_length(64, 500, 3)] == [64] * 3


@pytest.mark.slow
def test_a_whole_run_on_a_tiny_model() -> None:
    """Both algorithms, each in processes of its own: the last line is the promised JSON, and losses agree (exit 0)."""
    command = [sys.executable, "-m", "tests.benchmarks.training", "--model", "tiny", "--rows", "8", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--max-length", "128", "--variants", "flat"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    keys = {"ratio", "tokens_per_s", "trl_tokens_per_s", "peak_ratio", "roofline"}
    assert set(last) == {"sft", "dpo"}
    assert all(set(values) == keys and all(v > 0 for v in values.values()) for values in last.values())
    assert "TRL flat" in done.stderr and "DPO" in done.stderr
