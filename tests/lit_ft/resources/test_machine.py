"""What the machine can do: rates are plausible, and the choice of threads follows what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_ft.errors import UserError
from lit_ft.models import precision
from lit_ft.models.precision import choose_precision
from lit_ft.resources import machine
from lit_ft.resources.machine import Threads, choose_threads, cpu_quota, matrix_rate

CPU = torch.device("cpu")
MEASURED = precision._rates  # what measures, which tests have replaced


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rate_is_that_of_a_processor(dtype: torch.dtype) -> None:
    """Between a 1980s workstation and a room of GPUs; and measuring leaves the random state alone."""
    before = torch.get_rng_state()
    assert 1e6 < matrix_rate(CPU, dtype, (64, 64, 64), seconds=0.01) < 1e15
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rate_is_operations_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks 2 s a reading, a product of 2·2·3·5 = 60 operations runs at 30 FLOP/s."""
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: float(next(now)))
    assert matrix_rate(CPU, torch.float32, (2, 3, 5), seconds=1.0) == 30.0


def test_precision_by_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 has to be half as fast again, not just faster."""
    rates = {torch.float32: 80e9, torch.bfloat16: 119e9}
    monkeypatch.setattr(precision, "matrix_rate", lambda device, dtype: rates[dtype])
    monkeypatch.setattr(precision, "_rates", MEASURED.__wrapped__)  # not what an earlier run has measured
    slow = choose_precision("auto", CPU)
    assert (slow.trainer, slow.weights) == ("32-true", torch.float32)
    assert slow.why == "measured 119 GFLOP/s in bf16, 80 in fp32"
    rates[torch.bfloat16] = 121e9
    fast = choose_precision("auto", CPU)
    assert (fast.trainer, fast.weights) == ("bf16-mixed", torch.bfloat16)


def test_rates_are_measured_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[torch.dtype] = []
    monkeypatch.setattr(precision, "matrix_rate", lambda device, dtype: measured.append(dtype) or 1e9)
    monkeypatch.setattr(precision, "_rates", MEASURED)
    MEASURED.cache_clear()
    try:
        assert choose_precision("auto", CPU) == choose_precision("auto", CPU)
    finally:
        MEASURED.cache_clear()
    assert measured == [torch.float32, torch.bfloat16]


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Four CPUs, torch's own number 4, no quota, nothing in the environment; the rates that will be measured."""
    rates = {4: 100e9, 2: 80e9}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(machine, "_usable_cpus", lambda: 4)
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    monkeypatch.setattr(machine, "_training_rate", lambda count: rates[count])
    return rates


def test_the_fastest_number_of_threads_is_taken(four_cpus: dict[int, float]) -> None:
    four_cpus[2] = 150e9
    assert choose_threads(None, CPU) == Threads(2, "measured 150 GFLOP/s with 2, 100 with 4")


def test_torchs_own_number_stays_where_others_are_hardly_faster(four_cpus: dict[int, float]) -> None:
    four_cpus[2] = 120e9
    assert choose_threads(None, CPU) == Threads(4, "measured 100 GFLOP/s with 4, 120 with 2")


def test_a_quota_is_rounded_up_and_measured(four_cpus: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: 2.5)
    four_cpus[3] = 140e9
    assert choose_threads(None, CPU) == Threads(3, "measured 140 GFLOP/s with 3, 100 with 4, 80 with 2")


def test_one_cpu_is_not_measured(four_cpus: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(machine, "_usable_cpus", lambda: 1)
    four_cpus.clear()
    assert choose_threads(None, CPU) == Threads(1, "the only choice")


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")])
def test_what_is_asked_for_is_taken(four_cpus: dict[int, float], device: torch.device) -> None:
    four_cpus.clear()
    assert choose_threads(7, device) == Threads(7, "as asked")
    with pytest.raises(UserError, match=r"trainer\.threads=0 must be at least 1"):
        choose_threads(0, device)


def test_the_environment_and_the_gpu_decide_without_measuring(
    four_cpus: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    four_cpus.clear()
    assert choose_threads(None, torch.device("cuda")) == Threads(4, "the GPU computes")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert choose_threads(None, CPU) == Threads(4, "OMP_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    with pytest.raises(KeyError):  # empty is unset: it would measure
        choose_threads(None, CPU)


def test_measuring_leaves_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    assert machine._training_rate(2, seconds=0.01) > 1e6
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("files", "membership", "quota"),
    [
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"cpu.max": "250000 100000\n"}, "0::/\n", 2.5),
        # A group above limits as well, and the least holds.
        ({"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "300000 100000\n"}, "0::/a/b\n", 1.0),
        ({"cpu.max": "400000 100000\n"}, "0::/of/the/host\n", 4.0),
        (
            {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            "3:cpuset:/\n1:cpu,cpuacct:/\n",
            1.5,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "1:cpu:/\n0::/\n", None),
        ({}, "9:name=systemd:/\n", None),
        ({}, None, None),
    ],
)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], membership: str | None, quota: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    if membership is not None:
        (tmp_path / "membership").write_text(membership, encoding="utf-8")
    assert cpu_quota(tmp_path, tmp_path / "membership") == quota
