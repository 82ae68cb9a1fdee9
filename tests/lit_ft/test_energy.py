"""The machine's meters of energy: packages add up, wrapping around is no loss, what cannot be read is no zero."""

from __future__ import annotations

from pathlib import Path

from lit_ft.energy import EnergyMeter


def zone(root: Path, name: str, microjoules: int, wraps_at: int = 1_000_000) -> Path:
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    return folder


def test_packages_add_up_and_their_parts_do_not_count_twice(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        zone(tmp_path, name, 100)
    meter = EnergyMeter(tmp_path)
    assert meter.read() == 0
    zone(tmp_path, "intel-rapl:0", 100 + 250_000)
    zone(tmp_path, "intel-rapl:1", 100 + 500_000)
    zone(tmp_path, "intel-rapl:0:0", 100 + 90_000)
    assert meter.read() == 0.75


def test_a_meter_that_begins_anew_has_lost_nothing(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 900_000)
    meter = EnergyMeter(tmp_path)
    zone(tmp_path, "intel-rapl:0", 300_000)
    assert meter.read() == 0.4
    zone(tmp_path, "intel-rapl:0", 400_000)
    assert meter.read() == 0.5


def test_no_meter_is_no_zero(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path).read() is None
    assert EnergyMeter(tmp_path / "missing").read() is None
    (zone(tmp_path, "intel-rapl:0", 5) / "energy_uj").unlink()
    assert EnergyMeter(tmp_path).read() is None
