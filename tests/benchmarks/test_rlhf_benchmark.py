"""The benchmark of RLHF on a tiny model: every part of it, with completions by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.benchmarks import rlhf


def test_the_tables_by_hand() -> None:
    row = {"generation": 4.0, "rewards": 1.0, "scoring": 2.0, "updates": 3.0, "algorithm": "ppo", "rollout": "vllm"}
    assert rlhf.time_table([row])[1].split() == ["ppo", "vllm", "4.0", "1.0", "2.0", "3.0", "10.0"]
    policy = {"kl": 1.5, "score": 0.2, "trained_on": 0.4, "gain": (-0.1, 0.3), "length": 20.0, "ended": 0.5}
    policy["alone"] = (0.05, 0.25)
    assert rlhf.quality_table({"PPO": policy})[1].split() == (
        ["PPO", "1.50", "0.400", "0.200", "-0.100", "…", "+0.300", "+0.050", "…", "+0.250", "20.0", "50%"]
    )


def test_scores_are_rewards_as_in_training() -> None:
    """Of two completions that do not end half the penalty is taken if one does, all of it if none does."""
    judged = {"b": [1.0, 2.0, 3.0], "ended": [1.0, 0.5, 0.0]}
    assert rlhf.rewards(judged, "b", 2.0) == [1.0, 1.0, 1.0]
    assert rlhf.rewards(judged, "b", 0.0) == [1.0, 2.0, 3.0]


def test_results_of_other_options_are_not_taken_up(tmp_path: Path) -> None:
    options = rlhf.parse(["--pairs", "8", "--betas", "0.1", "--out", str(tmp_path)])
    rlhf.must_be_as_before(tmp_path, options, but=("out", "jobs"))
    rlhf.must_be_as_before(tmp_path, rlhf.parse(["--pairs", "8", "--betas", "0.1", "--jobs", "9"]), but=("out", "jobs"))
    with pytest.raises(SystemExit, match=r"results of --pairs 8, and now it is 9: give another --out"):
        rlhf.must_be_as_before(tmp_path, rlhf.parse(["--pairs", "9", "--betas", "0.1"]), but=("out", "jobs"))


@pytest.mark.slow
@pytest.mark.usefixtures("from_warm")
@pytest.mark.timeout(900)
def test_a_whole_run_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.folder(tmp_path / "tiny")
    rows = [{"prompt": f"{k}?", "chosen": "Yes, it is.", "rejected": "No." if k % 2 else "No, and no, no, no, and no."}
            for k in range(12)]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model", str(model), "--out", str(tmp_path / "out")]
    arguments += ["--pairs", "8", "--sft-rows", "8", "--iterations", "1", "--prompts", "4", "--max-new-tokens", "8"]
    arguments += ["--preferences", str(tmp_path / "pairs.jsonl"), "--betas", "0.1", "--draws", "1", "--folds", "2"]
    arguments += ["--rollouts", "transformers", "--max-length", "2048"]
    assert rlhf.main(arguments) in (0, 1)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["algorithm"] for row in found["time"]] == ["ppo", "grpo"]
    assert all(row["generation"] > 0 and row["updates"] > 0 for row in found["time"])
    assert found["memory"]["ppo"]["peak"] > 2**20 < found["memory"]["separate"]["peak"]
    quality = found["quality"]
    assert set(quality) == {"SFT", "DPO β=0.1", "PPO", "GRPO"}
    assert quality["SFT"]["kl"] == pytest.approx(0, abs=1e-5) and quality["SFT"]["gain"] == [0.0, 0.0]
    pairs = found["judges"]["pairs"]
    parts = [(tmp_path / "out" / f"preferences-heldout-{fold}.jsonl").read_text().splitlines() for fold in range(2)]
    assert [len(part) for part in parts] == [6, 6] and sorted(parts[0] + parts[1]) == sorted(map(json.dumps, rows))
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / 12
    assert pairs["pairs"] == 12 and 0 < pairs["tokens"] == pairs["characters"] == longer < 1
    assert found["judges"]["the desk's"]["characters"] == 0.85
    assert (tmp_path / "out" / "reward_kl.svg").read_text().startswith("<svg")
