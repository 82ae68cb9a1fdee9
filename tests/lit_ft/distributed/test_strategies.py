"""Every strategy trains what one process trains: the same losses, the same adapters, from any checkpoint of another."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.processes import ROOT, run_together

pytestmark = pytest.mark.slow

# Nine examples in windows of four: the last window holds one, which two processes cannot share.
SETTINGS = [
    "logger=default",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "data.path=rows.jsonl",
    "data.max_val_rows=3",
    "data.batch_size=4",
    # So few that processes need several passes for a window, and not equally many.
    "data.max_tokens=150",
    "trainer.max_epochs=2",
    "algorithm.lr_scheduler_type=constant",
    "algorithm.warmup_ratio=0",
]
ALGORITHMS = {
    "sft": ["+experiment=sft", "algorithm.learning_rate=1e-3"],
    "dpo": ["+experiment=dpo", "algorithm.learning_rate=1e-3", "start_from=none"],
}
PEFT = {"lora": ["peft=lora"], "full": ["peft=full"]}  # which takes a tenth of the learning rate
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
STRATEGIES = {
    "one": [],
    "ddp": ["trainer.devices=2", "strategy=ddp"],
    "fsdp": ["trainer.devices=2", "strategy=fsdp"],
    "tp": ["trainer.devices=2", "strategy=fsdp_tp"],
}
# Absolute, of weights and losses after six steps. bf16 has three digits, and tensor parallelism rounds each device's
# part of a sum to them before it adds: Adam, whose first steps look at little but a gradient's sign, then takes another
# way here and there. So in bf16 the matrices B, which began at zero, are compared as a whole: 1-5% apart were seen.
TOLERANCE = 1e-5
APART = 0.1
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}

Case = tuple[str, str, str]
CASES: list[Case] = [
    (algorithm, peft, precision)
    for algorithm in ALGORITHMS
    for peft in PEFT
    for precision in PRECISIONS
    if not (peft == "full" and precision == "bf16")
]


def arguments(case: Case, strategy: str, folder: Path) -> list[str]:
    algorithm, peft, precision = case
    settings = [*ALGORITHMS[algorithm], *SETTINGS, *PEFT[peft], f"trainer.precision={PRECISIONS[precision]}"]
    # Each strategy computes its references itself.
    words = [f"model.id={folder}", f"name={name(case, strategy)}", f"cache=cache-{strategy}"]
    return [*settings, *words, *STRATEGIES[strategy]]


def name(case: Case, strategy: str) -> str:
    return "-".join((*case, strategy))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("models") / "llama")


def write_rows(folder: Path) -> None:
    """Twelve short rows, three of them held out. Sums of few logarithms: of 3,000 nats fp32 would know but 2e-4."""
    draw = random.Random(0)
    words = ["wheel", "chain", "a bell", "two spokes", "the frame", "brake pads", "oil", "light"]

    def some(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    rows = [{"prompt": some(9), "completion": some(6), "chosen": some(6), "rejected": some(6)} for _ in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder in which every case was trained under every strategy."""
    folder = tmp_path_factory.mktemp("trained")
    write_rows(folder)
    alone = [arguments(case, "one", model) for case in CASES]
    together = [arguments(case, strategy, model) for strategy in ("ddp", "fsdp", "tp") for case in CASES]
    found = run_together(folder, alone, processes=1) + run_together(folder, together)
    assert [one.code for one in found] == [0] * len(found), "\n".join(one.err for one in found if one.code)
    return folder


def test_fsdp_where_the_group_is_as_on_gpus(tmp_path: Path, trained: Path, model: Path) -> None:
    """Lightning validates in inference mode there, and FSDP must not: it would train with what it had gathered."""
    write_rows(tmp_path)
    case = ("sft", "lora", "fp32")
    (ended,) = run_together(tmp_path, [[*arguments(case, "fsdp", model), "as_on_cuda"]])
    assert ended.code == 0, ended.err
    assert_same(published(tmp_path, name(case, "fsdp")), published(trained, name(case, "one")), TOLERANCE)


def metrics(folder: Path, run: str) -> dict[str, list[float]]:
    """Every logged value of a run, step by step."""
    (path,) = (folder / "runs" / run).glob("*/csv/metrics.csv")
    found: dict[str, list[float]] = {}
    for row in csv.DictReader(path.open()):
        for key, value in row.items():
            if value and key not in ("step", "epoch"):
                found.setdefault(key, []).append(float(value))
    return found


def checkpoint(folder: Path, run: str, which: str = "best") -> dict[str, Any]:
    (path,) = (folder / "runs" / run).glob(f"*/checkpoints/{which}.ckpt")
    return torch.load(path, weights_only=True)


def published(folder: Path, run: str) -> dict[str, torch.Tensor]:
    (path,) = (folder / "adapters" / run / "v1").glob("*.safetensors")
    return load_file(path)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and ours[key].shape == value.shape, key
        torch.testing.assert_close(ours[key].float(), value.float(), rtol=0, atol=tolerance, msg=key)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp"])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_strategy_trains_what_one_process_does(trained: Path, case: Case, strategy: str) -> None:
    precision = case[2]
    expected, found = metrics(trained, name(case, "one")), metrics(trained, name(case, strategy))
    assert expected.keys() == found.keys()
    assert len(expected["train/loss"]) == 6
    for key in ("train/loss", "eval/loss", "train/num_tokens", "train/learning_rate"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6, abs=LOSS_TOLERANCE[precision]), key
    if precision == "fp32":  # whatever else is logged, too: gradient norms, accuracies, rewards
        for key, values in expected.items():
            # Before the first step both completions have reward 0: a hair decides which is preferred.
            since = 1 if key == "train/rewards/accuracies" else 0
            assert found[key][since:] == pytest.approx(values[since:], rel=1e-4, abs=2e-5), key
    ours, theirs = (checkpoint(trained, name(case, one))["state_dict"] for one in (strategy, "one"))
    published_ours, published_theirs = (published(trained, name(case, one)) for one in (strategy, "one"))
    if precision == "fp32":
        assert_same(ours, theirs, TOLERANCE)
        # What is published of a whole model is in bf16: where a value lies between two of its numbers, a hair decides.
        assert_same(published_ours, published_theirs, 2.0**-8 if case[1] == "full" else TOLERANCE)
    else:
        for left, right in ((ours, theirs), (published_ours, published_theirs)):
            grown = [key for key in right if "lora_B" in key]
            apart = torch.stack([(left[key] - right[key]).square().sum() for key in grown]).sum().sqrt()
            assert float(apart) <= APART * float(torch.stack([right[key].square().sum() for key in grown]).sum().sqrt())
    assert all(value.dtype == torch.float32 for value in theirs.values())
    start = {f"model.{key}": value for key, value in tiny.model("llama").state_dict().items()}
    moved = {key: float((value - start.get(key, torch.zeros(()))).abs().max()) for key, value in theirs.items()}
    assert min(moved.values()) > 1e-4, "training changed nothing: the comparison would show nothing"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_checkpoints_hold_what_is_trained(trained: Path, model: Path, case: Case, strategy: str) -> None:
    (path,) = (trained / "runs" / name(case, strategy)).glob("*/checkpoints/best.ckpt")
    kept = torch.load(path, weights_only=True)
    size = sum(value.numel() * value.element_size() for value in kept["state_dict"].values())
    assert path.stat().st_size < 3.2 * size + 100_000  # what is not weights does not grow with them
    names = {key.removeprefix("model.") for key in kept["state_dict"]}
    whole = tiny.model("llama").state_dict().keys()
    assert names == set(whole) if case[1] == "full" else all("lora_" in key for key in names)
    # The optimizer's states are numbered alike whatever wrote them: one strategy goes on from another's checkpoint.
    assert set(kept["optimizer_states"][0]["state"]) == set(range(len(kept["state_dict"])))
    shapes = [value.shape for value in kept["state_dict"].values()]
    moments = [state["exp_avg"].shape for _, state in sorted(kept["optimizer_states"][0]["state"].items())]
    assert moments == shapes
    assert len(kept["lit_ft"]["rng"]) == (1 if strategy == "one" else 2)


# From which checkpoint, under what, it goes on.
RESUMES = [("one", "fsdp"), ("ddp", "one"), ("fsdp", "fsdp"), ("fsdp", "one"), ("fsdp", "tp"), ("tp", "ddp")]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder with interrupted runs, and copies of them that were gone on with under another strategy."""
    folder = tmp_path_factory.mktemp("resumed")
    write_rows(folder)
    case = ("dpo", "lora", "fp32")
    asked = {one: [*arguments(case, one, model), "stop_in_step=5"] for one in {source for source, _ in RESUMES}}
    alone = [command for one, command in asked.items() if one == "one"]
    stopped = run_together(folder, alone, processes=1)
    stopped += run_together(folder, [command for one, command in asked.items() if one != "one"])
    assert [one.code for one in stopped] == [143] * len(stopped), "\n".join(one.err for one in stopped)
    assert not (folder / "adapters").exists()
    commands = []
    for source, target in RESUMES:
        (run,) = (folder / "runs" / name(case, source)).glob("*")
        copy = folder / "copies" / f"{source}-{target}"
        shutil.copytree(run, copy)
        commands.append([*arguments(case, target, model), f"name={source}-{target}", f"resume={copy}"])
    alone = [command for (_, target), command in zip(RESUMES, commands, strict=True) if target == "one"]
    together = [command for (_, target), command in zip(RESUMES, commands, strict=True) if target != "one"]
    ended = run_together(folder, alone, processes=1) + run_together(folder, together)
    assert [one.code for one in ended] == [0] * len(ended), "\n".join(one.err for one in ended)
    return folder


@pytest.mark.parametrize(("source", "target"), RESUMES)
def test_one_strategy_goes_on_from_the_checkpoint_of_another(
    trained: Path, resumed: Path, source: str, target: str
) -> None:
    """Stopped by SIGTERM in the fifth of six steps, in the middle of the second epoch; one process got the signal."""
    uninterrupted = published(trained, name(("dpo", "lora", "fp32"), "one"))
    assert_same(published(resumed, f"{source}-{target}"), uninterrupted, 1e-5)


def test_the_torchrun_example(tmp_path: Path, trained: Path, model: Path) -> None:
    case = ("sft", "lora", "fp32")
    write_rows(tmp_path)
    words = [word for word in arguments(case, "fsdp", model) if not word.startswith("cache=")]
    words += [f"adapters={tmp_path}/adapters", f"data.path={tmp_path}/rows.jsonl"]
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "torchrun" / "train.sh"), *words],
        cwd=tmp_path,
        env={**os.environ, "NPROC": "2", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/adapters/{name(case, 'fsdp')}/v1\n", "one of the processes says it"
    assert done.stderr.count("devices    2 processes, fsdp") == 1
    assert_same(published(tmp_path, name(case, "fsdp")), published(trained, name(case, "one")), TOLERANCE)
    (run,) = (tmp_path / "runs" / "torchrun").iterdir()
    assert (run / "result.json").is_file()


def test_a_resume_with_dropout_under_tensor_parallelism(tmp_path: Path, model: Path) -> None:
    """Processes that share a model's tensors must drop the same inputs, before and after; the way there is the same."""
    write_rows(tmp_path)
    usual = [*arguments(("sft", "lora", "fp32"), "tp", model), "peft.dropout=0.3"]
    whole, stopped = run_together(tmp_path, [[*usual, "name=whole"], [*usual, "name=stopped", "stop_in_step=5"]])
    assert (whole.code, stopped.code) == (0, 143), whole.err + stopped.err
    (run,) = (tmp_path / "runs" / "stopped").glob("*")
    (ended,) = run_together(tmp_path, [[*usual, "name=resumed", f"resume={run}"]])
    assert ended.code == 0, ended.err
    assert_same(published(tmp_path, "resumed"), published(tmp_path, "whole"), TOLERANCE)
