"""One engine for two processes: the completions and the losses of one process, and failures that end both alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ft.distributed.processes import join, leave
from lit_ft.errors import UserError
from lit_ft.rewards.base import Sample
from lit_ft.rollouts import RolloutEngine, Sampling
from lit_ft.rollouts.shared import SharedRollouts
from lit_ft.rollouts.vllm import VllmRollouts
from tests.lit_ft.modules.test_online import (
    Scored,
    assert_near,
    assert_same_metrics,
    fit,
    online,
    prompts,
    spread,
    weights,
)
from tests.lit_ft.rollouts.test_vllm import write
from tests.lit_ft.stub_vllm import STOP, Died, StubEngine, Stubs
from tests.processes import ROOT, free_ports

TRAINING: dict[str, Any] = {"num_mini_batches": 2, "num_generations": 2, "num_epochs": 2, "max_tokens": 40}


def seeded(engine: StubEngine, path: str, body: dict[str, Any], count: int) -> tuple[int, Any] | None:
    """Completions that depend on their draws and on which policy was loaded last, as vLLM's would."""
    if path != "/v1/completions":
        return None
    version = int(body["model"].removeprefix("policy-"))
    draws = [body["seed"] + k for k in range(body["n"])]
    return 200, {
        "choices": [
            {
                "index": k,
                "token_ids": [10 + (draw + version) % 200, 10 + draw // 7 % 200, *([STOP] if draw % 2 else [11])],
                "finish_reason": "stop" if draw % 2 else "length",
                "stop_reason": STOP if draw % 2 else None,
            }
            for k, draw in enumerate(draws)
        ]
    }


def dead_from_the_second_policy(engine: StubEngine, path: str, body: dict[str, Any], count: int) -> Any:
    if path == "/v1/completions" and body["model"] != "policy-000001":
        raise Died
    return seeded(engine, path, body, count)


def engine_of(stubs: Stubs, folder: Path) -> RolloutEngine:
    def start() -> RolloutEngine:
        return VllmRollouts(
            "a-model",
            write,
            Sampling(1.0, 3, (STOP,)),
            folder=folder,
            max_lora_rank=8,
            max_model_len=64,
            retries=1,
            start=stubs.start,
        )

    return SharedRollouts(start) if "LOCAL_RANK" in os.environ else start()


def trained(stubs: Stubs, folder: Path, score: Any = spread, **settings: Any) -> dict[str, Any]:
    """Train a tiny model with an engine; what came of it."""
    from lit_ft.distributed.strategy import ddp

    several = {"strategy": ddp(), "devices": 2} if "LOCAL_RANK" in os.environ else {}
    engine = engine_of(stubs, folder)
    module = online("ppo", value=0.5, engine=engine, reward=Scored(score), **TRAINING, **settings)
    try:
        # Three prompts in windows of two, held out too: the second process has none of the last.
        seen = fit(module, prompts(5), steps=3, batch_size=3, val=prompts(1), **several)
    finally:
        engine.close()
    return {"weights": weights(module), "logged": seen.logged, "held_out": seen.held_out}


def fails_in_the_second_process(sample: Sample) -> float:
    if os.environ.get("LOCAL_RANK") == "1":
        raise UserError("The reward of the second process fails.")
    return 0.0


def in_each_process(folder: Path) -> None:
    """Every case in turn; each process writes what came of them."""
    rank = os.environ["LOCAL_RANK"]
    join("cpu", 2, 1)
    stubs = Stubs(behave=seeded)
    found: dict[str, Any] = {"well": trained(stubs, folder / "well")}
    found["engines"] = [len(stubs.engines), len(stubs.of("load_lora_adapter")), stubs.nothing_runs()]

    def refused(name: str, stubs: Stubs, **settings: Any) -> None:
        with pytest.raises(UserError) as raised:
            trained(stubs, folder / name, **settings)
        found[name] = str(raised.value)
        found[f"{name}: nothing runs"] = stubs.nothing_runs()

    refused("does not start", Stubs(refuse_start_from=0))
    refused("dies for good", Stubs(behave=dead_from_the_second_policy))
    refused("a reward fails", Stubs(behave=seeded), score=fails_in_the_second_process)
    torch.save(found, folder / f"{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("shared")
    (port,) = free_ports(1)
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.lit_ft.rollouts.test_shared", str(folder)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen(command, cwd=folder, env={**env, "LOCAL_RANK": str(k), "NODE_RANK": "0"}, **pipes)
        for k in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(outcomes: Sequence[dict[str, Any]], tmp_path: Path) -> None:
    """From the same completions, which one engine made: losses, held-out metrics and weights."""
    stubs = Stubs(behave=seeded)
    alone = trained(stubs, tmp_path)
    assert len({json.dumps(body["seed"]) for body in stubs.of("completions")}) > 8, "draws differ"
    for together in (each["well"] for each in outcomes):
        # Sums are taken in another order, which Adam's division by small gradients makes larger.
        assert_near(together["weights"], alone["weights"], tolerance=1e-4)
    for key in ("logged", "held_out"):
        assert len(alone[key]) == 3
        for ours, theirs in zip(outcomes[0]["well"][key], alone[key], strict=True):
            assert_same_metrics(ours, theirs, tolerance=1e-4)


@pytest.mark.slow
def test_only_the_first_process_has_an_engine(outcomes: Sequence[dict[str, Any]]) -> None:
    """And gives it each policy once: before the first iteration, and after each."""
    assert [each["engines"] for each in outcomes] == [[1, 4, True], [0, 0, True]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("does not start", "vLLM ended while starting."),
        ("dies for good", "vLLM failed 2 times while generating rollouts"),
        ("a reward fails", "The reward of the second process fails."),
    ],
)
def test_what_ends_one_process_ends_both_in_the_same_words(
    outcomes: Sequence[dict[str, Any]], case: str, words: str
) -> None:
    one, two = (each[case] for each in outcomes)
    assert words in one and one == two
    assert all(each[f"{case}: nothing runs"] for each in outcomes)


if __name__ == "__main__":
    in_each_process(Path(sys.argv[1]))
