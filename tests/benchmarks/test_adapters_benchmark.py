"""The benchmark of adapters: which learning rate counts, when AdaLoRA has lost, its plot, and a run on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.benchmarks import adapters, rlhf
from tests.benchmarks.adapters import Run, adalora_loses, at_best_rate
from tests.benchmarks.scatter import scatter, ticks


def run(kind: str, loss: float, **changes: Any) -> Run:
    usual: dict[str, Any] = {"data": "support", "rate": 1.0, "seed": 0, "before": 3.0, "general": 1.6}
    return Run(**{**usual, "kind": kind, "loss": loss, "parameters": 10, "size": 40, "served": "yes", **changes})


def test_each_kind_is_shown_at_its_best_rate() -> None:
    runs = [run("lora", 2.0, seed=k) for k in range(2)] + [run("lora", 1.9, rate=0.5, seed=k) for k in range(2)]
    best = at_best_rate([*runs, run("ia3", 2.5)])
    assert {kind: {r.rate for r in group} for kind, group in best.items()} == {"lora": {0.5}, "ia3": {1.0}}


@pytest.mark.parametrize(("losses", "lost"), [((2.30, 2.31), True), ((2.02, 2.04), False), ((1.9, 1.95), False)])
def test_adalora_has_lost_beyond_the_spread_over_seeds(losses: tuple[float, float], lost: bool) -> None:
    lora = [run("lora", loss, seed=k) for k, loss in enumerate((1.95, 2.05))]  # deviation 0.07
    assert adalora_loses([*lora, *(run("adalora", loss, seed=k) for k, loss in enumerate(losses))]) is lost
    assert adalora_loses(lora) is False


def test_the_table_by_hand() -> None:
    groups = {"lora": [run("lora", 2.0, general=1.61), run("lora", 2.2, seed=1, general=1.63)]}
    speeds = {"lora": [{"tokens_per_s": 90.0, "peak": 2**30}, {"tokens_per_s": 110.0, "peak": 3 * 2**30}]}
    lines = adapters.table("support", groups, 1.6, speeds, {"lora": {"unmerged": 1.3, "merged": 1.004}})
    cells = lines[2].split()
    assert cells[:3] == ["lora", "2.100", "±"] and cells[3] == "0.141"  # of 2.0 and 2.2
    assert "+0.0200" in lines[2] and "±0.0141" in lines[2].replace("± ", "±")
    assert " 100 " in lines[2] and "3.00 GiB" in lines[2] and "1.300" in lines[2] and "1.004" in lines[2]


def test_ticks_are_round_and_enclose() -> None:
    assert ticks([0.13, 0.97]) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks([-0.003, 0.004])[0] <= -0.003 and ticks([-0.003, 0.004])[-1] >= 0.004
    assert len(ticks([5.0])) >= 2


def test_the_plot_places_points_by_their_values() -> None:
    picture = scatter({"a<b": [(0.0, 0.0), (1.0, 1.0), (float("nan"), 1.0)]}, title="t", x="x", y="y")
    (x0, y0), (x1, y1) = (
        tuple(map(float, found)) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="3', picture)
    )
    assert x0 < x1 and y0 > y1  # right is more, and so is up
    assert "a&lt;b" in picture and "a<b" not in picture


def test_bootstrap_interval() -> None:
    low, high = rlhf.interval([1.0] * 20)
    assert (low, high) == (1.0, 1.0)
    low, high = rlhf.interval([-1.0, 1.0] * 50)
    assert -0.25 < low < -0.1 and 0.1 < high < 0.25  # ±1.96/10 by the normal approximation


def test_halves_of_pairs_have_nothing_in_common(tmp_path: Path) -> None:
    rlhf.make_halves(tmp_path, 50)
    a, b = (set((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in "ab")
    assert len(a) == len(b) == 50 and not a & b


@pytest.mark.slow
@pytest.mark.usefixtures("from_warm")
@pytest.mark.timeout(600)
def test_a_whole_run_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.folder(tmp_path / "tiny")
    (tmp_path / "general.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"What is {k}?", "completion": f"It is {k}."}) for k in range(8))
    )
    arguments = ["--model", str(model), "--data", "support"]
    arguments += ["--kinds", "lora", "adalora", "ia3", "--rows", "8", "--seeds", "1", "--rounds", "1", "--rank", "4"]
    arguments += ["--speed-steps", "3", "--general", str(tmp_path / "general.jsonl"), "--general-rows", "4"]
    arguments += ["--out", str(tmp_path / "out"), "--jobs", "2"]
    assert adapters.main(arguments) in (0, 1)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_kind = {one["kind"]: one for one in found["runs"]}
    assert by_kind["lora"]["served"] == "yes" and by_kind["ia3"]["served"] == "merged"
    assert "LoRA" in by_kind["adalora"]["served"]
    assert by_kind["ia3"]["parameters"] < by_kind["lora"]["parameters"] < by_kind["adalora"]["parameters"]
    assert all(one["before"] == by_kind["lora"]["before"] for one in by_kind.values())
    assert all(speeds[0]["tokens_per_s"] > 0 and speeds[0]["peak"] > 2**20 for speeds in found["speeds"].values())
    assert found["latency"]["lora"]["merged"] > 0
    assert (tmp_path / "out" / "support.svg").read_text().startswith("<svg")
    adapters.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found  # nothing was run twice
