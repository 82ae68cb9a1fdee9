"""The benchmark of forgetting: what counts as drift, when the aim is reached, and a run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.benchmarks import forgetting
from tests.benchmarks.forgetting import METHODS, PLAIN, REMEDIES, SCALED, claims, curated, lima_table, slug, within_aim


def runs(gain: float, text: float, instruction: float, kl: float = 0.1) -> list[dict[str, float]]:
    """Three seeds around these values."""
    return [
        {"gain": gain + k, "text": text + k, "instruction": instruction + k, "kl": kl} for k in (-0.001, 0.0, 0.001)
    ]


def test_the_aim_wants_gain_and_little_drift() -> None:
    results = {PLAIN: runs(1.0, 0.05, 0.11)}
    assert within_aim(results) == []
    results |= {"mix": runs(0.94, 0.0, 0.0), "kl_coef=1": runs(0.96, 0.01, 0.025), "scale=0.7": runs(0.96, 0.019, -0.1)}
    assert within_aim(results) == ["scale=0.7"]
    assert within_aim({"scale=0.7": runs(1.0, 0.0, 0.0)}) == [], "there is nothing to compare with"


def test_claims_are_seed_by_seed() -> None:
    results = {"full": runs(0.9, 0.0, 0.015), PLAIN: runs(1.0, 0.05, 0.11), "mix": runs(1.0, 0.0, 0.01)}
    first, second, last = claims(results)
    assert first == "LoRA forgets less than full fine-tuning: no (+0.0950 nats, gain 1.000 against 0.900)"
    assert second == "mix forgets less than LoRA alone: yes (-0.1000 nats, gain 1.000 against 1.000)"
    assert last.endswith(": mix")
    results["mix"] = [*results[PLAIN][:2], {**results[PLAIN][2], "instruction": 0.0, "text": 0.0}]
    assert "not with every seed" in claims(results)[1]


def test_the_table_by_hand() -> None:
    lines = forgetting.table({PLAIN: runs(1.0, 0.05, 0.11), "mix": runs(0.5, 0.0, -0.01)})
    assert lines[1].split()[:3] == ["LoRA", "r=16", "+1.0000"] and "±0.0010" in lines[1] and "100%" in lines[1]
    assert " 50%" in lines[2] and "-0.0100" in lines[2]


def test_what_is_made_of_another_run_is_known() -> None:
    assert {name for name, given in REMEDIES.items() if not given} == set(SCALED)
    assert {origin for origin, _ in SCALED.values()} <= {*METHODS, *REMEDIES}
    names = [slug(name, 0) for name in (*METHODS, *REMEDIES)]
    assert len(set(names)) == len(names) and slug("(IA)³", 2) == "ia-s2" and slug("kl_coef=0.3", 0) == "kl-coef-0-3-s0"


def test_what_forgetting_is_measured_on_is_not_trained_on(tmp_path: Path) -> None:
    rows = [{"instruction": f"Q{k}", "input": "in" * (k % 2), "output": "x" * (k * 100)} for k in range(10)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    given = ["--unfiltered", str(tmp_path / "rows.json"), "--general-rows", "3"]
    forgetting.split_general(tmp_path, forgetting.parse(given))
    held = [json.loads(line) for line in (tmp_path / forgetting.HELD_OUT).read_text().splitlines()]
    left = json.loads((tmp_path / forgetting.TRAINED_ON).read_text())
    assert len(held) == 3 and len(left) == 7
    assert all(len(row["completion"]) <= forgetting.SHORT for row in held)
    numbers = {int(row["prompt"].split("\n")[0][1:]) for row in held}
    assert numbers.isdisjoint(int(row["instruction"][1:]) for row in left)
    assert all(
        row["prompt"] == (f"Q{k}\nin" if k % 2 else f"Q{k}") for row, k in zip(held, sorted(numbers), strict=True)
    )


def test_curated_rows_have_the_longest_answers() -> None:
    rows = [{"instruction": str(k), "output": "x" * (k * 7 % 11)} for k in range(11)]
    assert [len(row["output"]) for row in curated(rows, 3)] == [10, 9, 8]


def test_the_table_of_rows() -> None:
    found = {
        kind: [{"before": 1.0, "after": after + k / 100, "tokens": 100.0} for k in range(3)]
        for kind, after in (("curated", 0.8), ("unfiltered", 0.9))
    }
    assert lima_table(found)[-1].endswith("yes (-0.1000 nats)")
    found["curated"][0]["after"] = 2.0
    assert "not with every seed" in lima_table(found)[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "scale=0.7"], "is made of LoRA r=16: name both"),
        (["--unfiltered", "nowhere.json"], "there is no file nowhere.json"),
        (["--methods", "other"], "invalid choice"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        forgetting.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("from_warm")
@pytest.mark.timeout(900)
def test_a_whole_run_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.folder(tmp_path / "tiny")
    rows = [{"instruction": f"What is {k}?", "input": "", "output": f"It is {k}. " * (1 + k % 5)} for k in range(24)]
    (tmp_path / "general.json").write_text(json.dumps(rows))
    arguments = ["--model", str(model), "--rows", "16"]
    arguments += ["--methods", PLAIN, "full", "mix", "replay=self", "kl_coef=1", "scale=0.7", "kl_coef=1, scale=0.8"]
    arguments += ["kl_weight=1", "ema_decay=0.9"]
    arguments += ["--seeds", "1", "--lima-rows", "8", "--unfiltered", str(tmp_path / "general.json"), "--jobs", "2"]
    arguments += ["--general-rows", "8"]
    arguments += ["--set", "data.max_val_rows=4", "trainer.validate_first=false"]
    arguments += ["replay.max_new_tokens=12", "replay.max_prompts=8"]
    arguments += ["data.max_length=2048", "--out", str(tmp_path / "out")]
    assert forgetting.main(arguments) in (0, 1)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_name = {name: one for name, (one,) in found["methods"].items()}
    assert by_name[PLAIN]["gain"] > by_name["scale=0.7"]["gain"] > 0
    assert 0 < by_name["scale=0.7"]["kl"] < by_name[PLAIN]["kl"]
    assert 0 < by_name["kl_coef=1, scale=0.8"]["kl"] < by_name["kl_coef=1"]["kl"]
    trained = {name: one["gain"] for name, one in by_name.items() if name != "kl_weight=1"}  # which only chooses
    assert len(set(trained.values())) == len(trained), "each differs from every other"
    assert found["lima"]["curated"][0]["tokens"] > found["lima"]["unfiltered"][0]["tokens"]
    assert (tmp_path / "out" / "forgetting.svg").read_text().startswith("<svg")
    forgetting.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found  # nothing was run twice
