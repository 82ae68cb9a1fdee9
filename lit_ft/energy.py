"""The energy that the machine's own meters count: the processors' (RAPL, as Linux's powercap shows it)."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since it was made, over all packages that have a readable meter.

    The meters count microjoules and begin anew at `max_energy_range_uj`, after about an hour under load: read it more
    often than that. See "Power Capping Framework" in Linux's documentation. Many machines let only root read them
    (CVE-2020-8694), and virtual ones have none.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package (AMD's, too); intel-rapl:0:0 is a part of it.
        self._last = {}
        for zone in sorted(root.glob("*rapl:*")):
            value, wraps_at = _number(zone / "energy_uj"), _number(zone / "max_energy_range_uj")
            if zone.name.count(":") == 1 and value is not None and wraps_at:
                self._last[zone] = (value, wraps_at)
        self._microjoules = 0

    def read(self) -> float | None:
        """Joules so far; None where nothing can be read."""
        for zone, (before, wraps_at) in self._last.items():
            now = _number(zone / "energy_uj")
            if now is not None:
                self._microjoules += now - before if now >= before else now + wraps_at - before
                self._last[zone] = (now, wraps_at)
        return self._microjoules / 1e6 if self._last else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
