"""The benchmark of several processes: what it complains about, what it sums up, and whole runs on a tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import distributed

ROOT = Path(__file__).parents[2]


def process(seconds: float = 1.0, sent: int = 0, least: int = 0, **changes: Any) -> dict[str, Any]:
    traffic = {"bytes": sent, "by_kind": {"all_reduce": sent}, "calls": {"all_reduce": 1}}
    usual: dict[str, Any] = {
        "s_per_step": seconds,
        "tokens_per_s": 100.0 / seconds,
        "peak_bytes": 5_000_000,
        "bytes_held": 1_000_000,
        "losses": [2.0, 1.0],
        "traffic": {**traffic, "small_bytes": 100, "small_calls": 2},
        "minimum": {"all_reduce": least},
        "micro_batches": 1,
        "loopback_bytes": 7.0,
    }
    return {**usual, **changes}


def test_what_ddp_may_send() -> None:
    """The gradients of the adapters, and a few numbers; a whole model is a thousand times that."""
    fits = {"one": [process()], "ddp": [process(sent=1_000_100, least=1_000_000)] * 2}
    assert distributed.complaints([fits], "32-true") == []
    twice = {"one": [process()], "ddp": [process(sent=2_000_000, least=1_000_000)] * 2}
    (found,) = distributed.complaints([twice], "32-true")
    assert "2,000,000 bytes" in found and "1,000,000" in found


def test_ddp_that_gathers_is_wrong() -> None:
    other = process(sent=1000, least=1000)
    other["traffic"]["by_kind"] = {"all_reduce": 500, "broadcast": 500}
    (found,) = distributed.complaints([{"one": [process()], "ddp": [other]}], "32-true")
    assert "broadcast" in found


def test_losses_must_agree() -> None:
    other = process(losses=[2.0, 1.5])
    (found,) = distributed.complaints([{"one": [process()], "fsdp": [other]}], "32-true")
    assert "1.5" in found and "step 2" in found


def test_the_summary_by_hand() -> None:
    """Ratios within each round, then their median; the slower of two processes counts."""
    rounds = [
        {"one": [process(4.0)], "ddp": [process(1.0, 110, 100), process(2.0, 110, 100)]},  # 2
        {"one": [process(3.0)], "ddp": [process(1.0, 110, 100), process(1.0, 110, 100)]},  # 3
        {"one": [process(9.0)], "ddp": [process(5.0, 110, 100), process(9.0, 110, 100)]},  # 1
    ]
    summary = distributed.summarize(rounds)
    assert summary["one"]["s_per_step"] == 4.0
    assert summary["ddp"]["s_per_step"] == 2.0
    assert summary["ddp"]["speedup"] == 2.0
    assert (summary["ddp"]["bytes_per_step"], summary["ddp"]["minimum_bytes"]) == (110, 100)
    assert summary["ddp"]["ratio"] == 1.1
    assert "1.100" in distributed.table(rounds, summary)


def test_strategies_that_do_not_fit_are_left_out() -> None:
    options = distributed.parse(["--model", "135m"])
    assert "num_attention_heads=9" in str(distributed.why_not("fsdp_tp", options))
    assert distributed.why_not("fsdp", options) is None
    assert distributed.why_not("fsdp_tp", distributed.parse(["--model", "tiny"])) is None
    with pytest.raises(SystemExit):
        distributed.parse(["--strategies", "ddp,zero"])


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks.distributed", "--model", "tiny", "--precision", "32-true"]
    settings = ["--rows", "8", "--rounds", "1", "--steps", "1", *arguments]
    return subprocess.run([*command, *settings], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_whole_run_on_a_tiny_model() -> None:
    """Every strategy, several passes per step: gradients travel with the last only, and losses agree (exit 0)."""
    done = benchmark("--max-tokens", "256")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert set(last) == {"one", "ddp", "fsdp", "fsdp_tp"}
    assert last["one"]["s_per_step"] > 0 and last["one"]["tokens_per_s"] > 0
    for kind in ("ddp", "fsdp", "fsdp_tp"):
        found = last[kind]
        assert found["micro_batches"] > 1, kind
        assert found["speedup"] > 0 and found["peak_mb"] > 0
        assert found["ratio"] == pytest.approx(found["bytes_per_step"] / found["minimum_bytes"], rel=1e-3)
    # Rank 16 of seven linear layers in two blocks of width 64 and 128 (keys and values 32 wide), in float32.
    rank, layers = 16, 2
    ends = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    adapters = 4 * layers * sum(rank * (a + b) for a, b in ends)
    assert last["ddp"]["minimum_bytes"] == 2 * adapters  # sent, and received
    assert last["ddp"]["by_kind"] == {"all_reduce": 2 * adapters}
    assert 0 < last["ddp"]["small_bytes"] < 1000
    # It was really sent, by all that this machine's network shows (where it shows anything).
    assert last["ddp"]["loopback_bytes"] == 0 or last["ddp"]["loopback_bytes"] > last["ddp"]["minimum_bytes"]
    assert last["fsdp"]["by_kind"].keys() == {"all_gather", "reduce_scatter"}
    assert last["fsdp"]["ratio"] == pytest.approx(1, abs=0.02)
    assert last["fsdp"]["weights_mb"] == pytest.approx(last["one"]["weights_mb"] / 2, rel=0.02)
    assert last["fsdp_tp"]["weights_mb"] < last["one"]["weights_mb"]
    assert "speed-up" in done.stderr


@pytest.mark.slow
def test_preference_pairs_under_ddp() -> None:
    done = benchmark("--algorithm", "dpo", "--strategies", "ddp", "--max-length", "256")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert set(last) == {"one", "ddp"}
    assert last["ddp"]["ratio"] < 1.02


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("signum", [signal.SIGKILL])
def test_stopped_it_leaves_no_process_behind(signum: signal.Signals) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.distributed", "--model", "tiny", "--rounds", "9"]
    running = subprocess.Popen(
        [*command, "--strategies", "ddp", "--precision", "32-true"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and not (found := children.read_text().split()):
            time.sleep(0.1)
        assert found
        time.sleep(8)  # until it has begun, and is not only importing
        running.send_signal(signum)
        running.communicate(timeout=60)
        assert running.returncode == (128 + signum if signum == signal.SIGTERM else -signum)
        until = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in found):
            assert time.monotonic() < until, f"{found} live on"
            time.sleep(0.1)
    finally:
        running.kill()
