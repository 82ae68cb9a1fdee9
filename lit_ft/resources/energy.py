"""The energy that the machine's own meters count: processors' (RAPL, as Linux's powercap shows it) and NVIDIA GPUs'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
PROCESSORS, GPUS = "processors (RAPL)", "GPUs (NVML)"


class Meter(Protocol):
    """What counts the energy of one kind of device."""

    name: str

    def read(self) -> float | None:
        """Joules since it was made; None where nothing can be read."""


class EnergyMeter:
    """Joules since it was made, over all meters that can be read.

    It counts everything that ran on these devices meanwhile, whoever ran it, and nothing of the rest of the machine.

    Attributes:
        names: of the meters that count, for a reader.
        missing: of those that a run uses and that cannot be read.

    Args:
        gpus: the GPUs that a run uses, as PyTorch numbers them.
        root: where Linux shows the processors' meters.
    """

    def __init__(self, gpus: Sequence[int] = (), root: Path = POWERCAP) -> None:
        meters: list[Meter] = [Processors(root), *([Gpus(gpus)] if gpus else [])]
        self._meters = [meter for meter in meters if meter.read() is not None]
        self.names = tuple(meter.name for meter in self._meters)
        self.missing = tuple(meter.name for meter in meters if meter.name not in self.names)

    def read(self) -> float | None:
        """Joules so far; None where nothing can be read, or a meter cannot any more."""
        found = [meter.read() for meter in self._meters]
        return sum(found) if found and None not in found else None  # type: ignore[arg-type]


class Processors:
    """All packages that have a readable meter.

    The meters count microjoules and begin anew at `max_energy_range_uj`, after about an hour under load: read them more
    often than that. See "Power Capping Framework" in Linux's documentation. Many machines let only root read them
    (CVE-2020-8694), and virtual ones have none.
    """

    name = PROCESSORS

    def __init__(self, root: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package (AMD's, too); intel-rapl:0:0 is a part of it.
        self._last = {}
        for zone in sorted(root.glob("*rapl:*")):
            value, wraps_at = _number(zone / "energy_uj"), _number(zone / "max_energy_range_uj")
            if zone.name.count(":") == 1 and value is not None and wraps_at:
                self._last[zone] = (value, wraps_at)
        self._microjoules = 0

    def read(self) -> float | None:
        for zone, (before, wraps_at) in self._last.items():
            now = _number(zone / "energy_uj")
            if now is not None:
                self._microjoules += now - before if now >= before else now + wraps_at - before
                self._last[zone] = (now, wraps_at)
        return self._microjoules / 1e6 if self._last else None


class Gpus:
    """NVIDIA GPUs, each with all that is on its board.

    NVML counts millijoules since its driver was loaded, on Volta and newer (`nvmlDeviceGetTotalEnergyConsumption`); a
    part of a GPU (MIG) has no meter. PyTorch shows the power of a moment only, so NVML is asked through `pynvml` (the
    package nvidia-ml-py), where there is one.

    Args:
        numbers: as PyTorch numbers them. NVML knows nothing of CUDA_VISIBLE_DEVICES, so it gets their UUIDs.
    """

    name = GPUS

    def __init__(self, numbers: Sequence[int]) -> None:
        self._nvml: Any = None
        self._begun: list[tuple[Any, int]] = []
        try:
            import pynvml
            import torch

            pynvml.nvmlInit()
            for number in numbers:
                uuid = str(torch.cuda.get_device_properties(number).uuid)
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
                self._begun.append((handle, pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)))
            self._nvml = pynvml
        except Exception:  # no package, no driver, no such meter, an older PyTorch: a run goes on without
            self._begun = []

    def read(self) -> float | None:
        if not self._begun:
            return None
        try:
            now = [self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle, _ in self._begun]
        except self._nvml.NVMLError:
            return None
        return sum(value - before for value, (_, before) in zip(now, self._begun, strict=True)) / 1e3


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
