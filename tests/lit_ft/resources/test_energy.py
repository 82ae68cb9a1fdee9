"""The machine's meters of energy: they add up, wrapping around is no loss, and what cannot be read is no zero."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lit_ft.resources.energy import GPUS, PROCESSORS, EnergyMeter


def zone(root: Path, name: str, microjoules: int, wraps_at: int = 1_000_000) -> Path:
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    return folder


def test_packages_add_up_and_their_parts_do_not_count_twice(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        zone(tmp_path, name, 100)
    meter = EnergyMeter(root=tmp_path)
    assert meter.read() == 0
    zone(tmp_path, "intel-rapl:0", 100 + 250_000)
    zone(tmp_path, "intel-rapl:1", 100 + 500_000)
    zone(tmp_path, "intel-rapl:0:0", 100 + 90_000)
    assert meter.read() == 0.75


def test_a_meter_that_begins_anew_has_lost_nothing(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 900_000)
    meter = EnergyMeter(root=tmp_path)
    zone(tmp_path, "intel-rapl:0", 300_000)
    assert meter.read() == 0.4
    zone(tmp_path, "intel-rapl:0", 400_000)
    assert meter.read() == 0.5


def test_no_meter_is_no_zero(tmp_path: Path) -> None:
    assert EnergyMeter(root=tmp_path).read() is None
    assert EnergyMeter(root=tmp_path).missing == (PROCESSORS,)
    assert EnergyMeter(root=tmp_path / "missing").read() is None
    (zone(tmp_path, "intel-rapl:0", 5) / "energy_uj").unlink()
    assert EnergyMeter(root=tmp_path).read() is None


class Nvml(ModuleType):
    """A stand-in for pynvml: the boards' millijoules by UUID; one that is not there has no meter."""

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules: dict[str, int]) -> None:
        super().__init__("pynvml")
        self.millijoules, self.begun = millijoules, False

    def nvmlInit(self) -> None:
        self.begun = True

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert self.begun
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if handle not in self.millijoules:
            raise self.NVMLError("Not Supported")
        return self.millijoules[handle]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    """Two boards with a meter. PyTorch's GPU 0 is the second, as CUDA_VISIBLE_DEVICES may have it; GPU 2 has none."""
    made = Nvml({"GPU-a": 7_000_000, "GPU-b": 1_000})
    monkeypatch.setitem(sys.modules, "pynvml", made)
    uuids = {0: "b", 1: "a", 2: "c"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=uuids[number]))
    return made


def test_gpus_count_beside_processors(nvml: Nvml, tmp_path: Path) -> None:
    """250,000 µJ are 0.25 J, 4,000 mJ are 4 J; the other board's 9,000 J are none of this run's."""
    zone(tmp_path, "intel-rapl:0", 100)
    meter = EnergyMeter([0], tmp_path)
    assert meter.read() == 0
    zone(tmp_path, "intel-rapl:0", 100 + 250_000)
    nvml.millijoules["GPU-b"] += 4_000
    nvml.millijoules["GPU-a"] += 9_000_000
    assert meter.read() == 4.25
    assert meter.names == (PROCESSORS, GPUS) and meter.missing == ()


def test_several_gpus_add_up(nvml: Nvml, tmp_path: Path) -> None:
    meter = EnergyMeter([0, 1], tmp_path)
    nvml.millijoules["GPU-a"] += 1_500
    nvml.millijoules["GPU-b"] += 500
    assert meter.read() == 2
    assert (meter.names, meter.missing) == ((GPUS,), (PROCESSORS,))


def test_a_gpu_without_a_meter_leaves_the_processors(nvml: Nvml, tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 100)
    meter = EnergyMeter([0, 2], tmp_path)
    zone(tmp_path, "intel-rapl:0", 100 + 1_000_000 - 200)
    assert (meter.names, meter.missing, meter.read()) == ((PROCESSORS,), (GPUS,), pytest.approx(0.9998))


def test_a_meter_that_is_lost_leaves_the_whole_uncounted(nvml: Nvml, tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 100)
    meter = EnergyMeter([0], tmp_path)
    del nvml.millijoules["GPU-b"]
    assert meter.read() is None


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = EnergyMeter([0], tmp_path)
    assert meter.read() is None and meter.missing == (PROCESSORS, GPUS)
