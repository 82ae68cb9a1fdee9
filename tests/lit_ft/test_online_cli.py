"""PPO and GRPO through the command line: what is published, what a resume gives, and what is refused."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_ft import adapter
from lit_ft.adapter import Adapter, Base, Draft
from lit_ft.models.judge import save_judge, scalar_head
from lit_ft.models.kinds.lora import apply_lora
from lit_ft.models.resolve import model_fingerprint
from lit_ft.modules.online import OnlineModule
from lit_ft.rollouts.base import RolloutError
from lit_ft.rollouts.transformers import TransformersRollouts
from lit_ft.rollouts.vllm import VllmRollouts
from tests import tiny
from tests.conftest import Outcome
from tests.lit_ft import made
from tests.lit_ft.stub_vllm import Died, StubEngine, Stubs
from tests.processes import ROOT, run_together
from tests.serve.test_engine import gone

HERE = "tests.lit_ft.test_online_cli"
FEW = (
    "data.path=rows.jsonl",
    "data.val_path=held.jsonl",
    "data.max_length=128",
    "data.batch_size=4",
    "algorithm.max_new_tokens=4",
    "algorithm.num_epochs=1",
    "algorithm.learning_rate=1e-2",
    "algorithm.lr_scheduler_type=constant",
    "trainer.max_steps=3",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "logger=none",
)
LETTERS = f"reward={HERE}:letters"

Run = Callable[..., Outcome]

# Rewards that a command line can name. Of one process each: how often they were asked.
asked = 0


def letters(completions: list[str], **_: Any) -> list[float]:
    """Short answers are better; and an environment variable says at which question the process is to die."""
    global asked
    asked += 1
    if str(asked) == os.environ.get("DIE_WHEN_ASKED"):
        os.kill(os.getpid(), signal.SIGKILL)
    return [-float(len(completion)) for completion in completions]


def worse_each_time(completions: list[str], **_: Any) -> list[float]:
    global asked
    asked += 1
    return [-100.0 * asked] * len(completions)


def _from_the_second_iteration(completions: list[str], wrong: Callable[[], Any]) -> Any:
    """Asked for held-out completions before training, for the first iteration, held out, and then for the second."""
    scores = letters(completions)
    return wrong() if asked >= 4 else scores


def raises(completions: list[str], **_: Any) -> Any:
    return _from_the_second_iteration(completions, lambda: 1 // 0)


def not_a_number(completions: list[str], **_: Any) -> Any:
    return _from_the_second_iteration(completions, lambda: [float("nan")] * len(completions))


def one_too_few(completions: list[str], **_: Any) -> Any:
    return _from_the_second_iteration(completions, lambda: [0.0] * (len(completions) - 1))


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    global asked
    asked = 0
    yield
    asked = 0


def write_rows(folder: Path, count: int = 12) -> None:
    rows = [{"prompt": f"{k} wheels?"} for k in range(count)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "held.jsonl").write_text("\n".join(json.dumps({"prompt": f"{k} bells?"}) for k in range(4)))


def publish_judge(root: Path, on: Path, name: str = "judge", seed: int = 0, width: int = 32) -> Adapter:
    """A judge as `+experiment=reward` publishes it, with weights by chance."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = apply_lora(AutoModelForCausalLM.from_pretrained(on, dtype=torch.float32), r=4, alpha=8, dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    head = scalar_head(width)

    def write(folder: Path) -> None:
        save_judge(model, head, folder, mean=0.25, std=2.0)
        tiny.tokenizer().save_pretrained(folder)

    draft = Draft(
        name=name,
        base=Base(on.name, model_fingerprint(str(on))),
        algorithm="reward",
        peft="lora",
        rank=4,
        data=[],
        parent=None,
        metrics={"eval/loss": 0.5},
        servable=False,
        not_servable_reason="it is a judge",
    )
    return adapter.publish(root, draft, write)


@pytest.fixture
def run(cli: Run, own_cache: Path, llama_folder: Path) -> Run:
    write_rows(Path())
    return lambda *args: cli("+experiment=ppo", f"model.id={llama_folder}", *FEW, *args)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the next run receive Ctrl-C in the iteration given."""
    iterate = OnlineModule.training_step

    def at(step: int) -> None:
        def training_step(self: OnlineModule, prompts: Any, index: int) -> None:
            if self.global_step + 1 == step:
                monkeypatch.setattr(OnlineModule, "training_step", iterate)
                signal.raise_signal(signal.SIGINT)
            iterate(self, prompts, index)

        monkeypatch.setattr(OnlineModule, "training_step", training_step)

    return at


def held_out(err: str) -> dict[int, str]:
    """What was said of each validation, by its step."""
    lines = [line for line in err.splitlines() if line.startswith("held out at step")]
    return {int(line.split()[4].rstrip(":/").split("/")[0]): line for line in lines}


def policy(path: Path) -> dict[str, torch.Tensor]:
    """The policy's weights in a checkpoint, under the names that a published adapter has."""
    kept = torch.load(path, weights_only=True)["state_dict"]
    return {
        key.removeprefix("model.").replace(".default", ""): value for key, value in kept.items() if ".default." in key
    }


# What is published.


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_what_is_published_is_a_plain_adapter(run: Run, llama_folder: Path, algorithm: str) -> None:
    """Scored by a judge, checked by a function on held-out completions; the policy goes on from an adapter."""
    publish_judge(Path("adapters"), llama_folder)
    made.published(Path("adapters"), llama_folder)
    settings = ["algorithm.value_from=reward", "algorithm.kl_target=6"] if algorithm == "ppo" else []
    settings += ["algorithm.num_generations=3"] if algorithm == "grpo" else []
    done = run(f"algorithm={algorithm}", f"judge={HERE}:letters", *settings)
    assert done.code == 0, done.err
    assert done.out == "adapters/support/v2\n"
    published = adapter.read(Path("adapters/support/v2"))
    card = published.card
    assert (card.algorithm, card.parent, card.servable) == (algorithm, "support@v1", True)
    metrics = {"objective/kl", "objective/rlhf_reward", "objective/scores", "judge/scores", "completions/ended"}
    assert {f"eval/{key}" for key in metrics} | {f"before/{key}" for key in metrics} <= set(card.metrics)
    assert -16 <= card.metrics["eval/judge/scores"] <= 0, "by letters, not by the judge that is trained on"
    assert abs(card.metrics["before/objective/kl"]) < 1e-5
    assert done.err.count("samples    score  ended  completion") == 4, "before training, and at each step"
    assert "bells? ▸" in done.err
    # No value model, no reference, no judge.
    weights = load_file(published.path / "adapter_model.safetensors")
    start = load_file(Path("adapters/support/v1/adapter_model.safetensors"))
    assert weights.keys() == start.keys()
    assert max(float((weights[key] - start[key]).abs().max()) for key in start) > 1e-4
    assert {path.name for path in published.path.iterdir()}.isdisjoint({"judge.json", "value", "reference"})
    model = made.read_peft(published.path, llama_folder)
    assert made.logits(model).isfinite().all() and list(model.peft_config) == ["default"]


def test_the_best_of_the_held_out_rewards_is_published(run: Run) -> None:
    """Which here falls from validation to validation: the first step's."""
    exactly = "algorithm.missing_eos_penalty=null"
    done = run(f"reward={HERE}:worse_each_time", "trainer.validate_first=false", exactly)
    assert done.code == 0, done.err
    published = adapter.find(Path("adapters"), "support")
    assert published.card.metrics["step"] == 1
    assert published.card.metrics["eval/objective/scores"] == -200
    (best,) = Path("runs").glob("support/*/checkpoints/best.ckpt")
    kept, there = policy(best), load_file(published.path / "adapter_model.safetensors")
    assert kept.keys() == there.keys()
    assert all(torch.equal(kept[key], value) for key, value in there.items())


# Going on.


def assert_same_published(ours: str, theirs: str) -> None:
    one, other = (adapter.find(Path("adapters"), name) for name in (ours, theirs))
    left, right = (load_file(each.path / "adapter_model.safetensors") for each in (one, other))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert one.card.metrics == other.card.metrics, "the best of the same validations"


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    run: Run, interrupted: Callable[[int], None], llama_folder: Path, algorithm: str
) -> None:
    """Although a newer judge was published meanwhile: the run keeps its own."""
    publish_judge(Path("adapters"), llama_folder)
    usual = [f"algorithm={algorithm}", "algorithm.num_mini_batches=2", "algorithm.num_generations=2"]
    usual += ["algorithm.kl_target=0.01", "algorithm.kl_horizon=40"] if algorithm == "ppo" else []
    whole = run(*usual, "name=whole")
    assert whole.code == 0, whole.err
    interrupted(2)
    stopped = run(*usual, "name=stopped")
    assert stopped.code == 130 and "Go on with the same command and resume=" in stopped.err
    publish_judge(Path("adapters"), llama_folder, seed=1)
    resumed = run(*usual, "name=stopped", "resume=last")
    assert resumed.code == 0, resumed.err
    assert "judge@v1" in resumed.err and "judge@v2" not in resumed.err
    assert_same_published("stopped", "whole")
    validated = held_out(whole.err)
    assert set(validated) == {1, 2, 3} and {**held_out(stopped.err), **held_out(resumed.err)} == validated


def test_another_reward_is_another_run(run: Run, interrupted: Callable[[int], None]) -> None:
    interrupted(2)
    assert run(LETTERS).code == 130
    other = run(f"reward=[{HERE}:letters,{HERE}:worse_each_time]", "resume=last")
    assert "of another run: reward changed since" in made.said(other)
    other = run(LETTERS, f"judge={HERE}:worse_each_time", "resume=last")
    assert "of another run: judge changed since" in made.said(other)


@pytest.mark.slow
def test_a_process_that_is_killed_is_gone_on_with(tmp_path: Path, llama_folder: Path) -> None:
    """SIGKILL in the third iteration, while it asks for rewards."""
    write_rows(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LIT_FT_CACHE": str(tmp_path / "cache")}

    def process(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lit_ft", "+experiment=ppo", f"model.id={llama_folder}", *FEW, LETTERS, *words]
        return subprocess.run(command, cwd=tmp_path, env={**env, **more}, capture_output=True, text=True, timeout=300)

    whole = process("name=whole")
    assert whole.returncode == 0, whole.stderr
    killed = process("name=killed", DIE_WHEN_ASKED="6")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "adapters" / "killed").exists()
    resumed = process("name=killed", "resume=last")
    assert resumed.returncode == 0, resumed.stderr
    left, right = (load_file(tmp_path / "adapters" / one / "v1" / "adapter_model.safetensors")
                   for one in ("killed", "whole"))  # fmt: skip
    assert all(torch.equal(left[key], right[key]) for key in right)


@pytest.mark.slow
def test_two_processes_publish_the_adapter_of_one(tmp_path: Path, llama_folder: Path) -> None:
    write_rows(tmp_path)
    usual = ["+experiment=ppo", f"model.id={llama_folder}", *FEW, "trainer.devices=2", "strategy=ddp"]
    usual += ["algorithm.num_mini_batches=2"]
    well, badly = run_together(tmp_path, [[*usual, LETTERS], [*usual, f"reward={HERE}:nowhere", "name=other"]])
    (alone,) = run_together(tmp_path, [[*usual[:-3], *usual[-1:], LETTERS, "name=alone"]], processes=1)
    assert alone.code == 0, alone.err
    one, two = (load_file(tmp_path / "adapters" / name / "v1" / "adapter_model.safetensors")
                for name in ("alone", "support"))  # fmt: skip
    # The same completions, whichever process draws them: others would move weights by the learning rate, 1e-2. Sums are
    # taken in another order, which Adam's division by small gradients makes larger.
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, rtol=0, atol=1e-4)
    assert well.code == 0, well.err
    assert well.out == "adapters/support/v1\n" and "devices    2 processes" in well.err
    assert adapter.find(tmp_path / "adapters", "support").card.algorithm == "ppo"
    assert badly.code == 2 and "has no nowhere" in " ".join(badly.err.split()), badly.err


# Refused before or while training: exit code 2, and nothing is published.


def refused(outcome: Outcome) -> str:
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err and outcome.out == ""
    assert not list(Path("adapters").glob("support/*"))
    return " ".join(outcome.err.split("error: ", 1)[1].split())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["reward=null"], "reward= says nothing to score completions with. Train a judge"),
        (["reward=[]"], "reward= says nothing to score completions with"),
        (["reward=judge"], "A judge is trained with python -m lit_ft +experiment=reward name=judge"),
        ([f"reward={HERE}:nowhere"], "has no nowhere. Its functions are"),
        (["reward=no_such_module:good"], "there is no module no_such_module"),
        ([LETTERS, "judge=nobody"], "+experiment=reward name=nobody"),
        ([LETTERS, "algorithm.value_from=reward"], "value_from=reward needs a judge among reward="),
        ([LETTERS, "strategy=fsdp"], "strategy=fsdp cannot shard algorithm=ppo, where states that scalar heads read"),
        ([LETTERS, "strategy=fsdp", "algorithm=grpo"], "need the whole model: use strategy=ddp"),
        ([LETTERS, "strategy=fsdp_tp"], "strategy=fsdp_tp cannot shard algorithm=ppo"),
        ([LETTERS, "peft=full"], "algorithm=ppo keeps its models as LoRA adapters on one base, and peft=full is none"),
        ([LETTERS, "peft=ia3"], "and peft=ia3 is none"),
        ([LETTERS, "peft=adalora"], "which peft=adalora cannot: use peft=lora"),
        ([LETTERS, "peft=pissa"], "which peft=pissa cannot: use peft=lora"),
        ([LETTERS, "rollout=vllm", "model.tiny=true"], "model.tiny has random ones: use transformers"),
        ([LETTERS, "algorithm.max_new_tokens=128"], "leaves no room for prompts within data.max_length=128"),
        ([LETTERS, "algorithm.max_new_tokens=120"], "with less than 120 of 128 tokens left for an answer"),
        ([LETTERS, "algorithm.max_new_tokens=0"], "algorithm.max_new_tokens=0 leaves nothing to generate"),
        ([LETTERS, "algorithm.ptx_coef=0.5"], "needs rows with answers: algorithm.ptx_path=FILE"),
        ([LETTERS, "algorithm.ptx_coef=0.5", "algorithm.ptx_path=nowhere.jsonl"], "nowhere.jsonl"),
        ([LETTERS, "algorithm.temperature=0"], "algorithm.temperature=0.0"),
        ([LETTERS, "algorithm.kl_target=6", "algorithm.kl_horizon=0.5"], "kl_horizon=0.5 is too short"),
        ([LETTERS, "algorithm=grpo", "algorithm.num_generations=1"], "needs at least 2 of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_cannot_work_are_refused(run: Run, words: list[str], complaint: str) -> None:
    outcome = run(*words)
    assert complaint in refused(outcome)
    assert not list(Path("runs").glob("*/*")), "an empty run leaves no folder"


def test_an_adapter_that_is_no_judge_is_refused(run: Run, llama_folder: Path) -> None:
    made.published(Path("adapters"), llama_folder, name="chat")
    outcome = run("reward=chat")
    assert "chat@v1 is no judge but an adapter made by sft" in refused(outcome)


def test_a_judge_of_another_base_is_refused(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "tiny-other"
    tiny.model(seed=7).save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    publish_judge(Path("adapters"), other)
    said = refused(run("reward=judge"))
    assert "The judge judge@v1 was trained on tiny-other" in said and "Train a judge on this one" in said


def test_a_damaged_judge_is_refused(run: Run, llama_folder: Path) -> None:
    judge = publish_judge(Path("adapters"), llama_folder)
    (judge.path / "judge.json").write_text('{"mean": 0.0, "std": 0.0}')
    outcome = run("reward=judge")
    assert outcome.code == 2 and "judge@v1" in outcome.err and not Path("adapters/support").exists()


@pytest.mark.parametrize(
    ("reward", "complaint"),
    [
        ("raises", "raised ZeroDivisionError"),
        ("not_a_number", "gives nan for completion 0 of 4"),
        ("one_too_few", "returned 3 scores for 4 completions"),
    ],
)
def test_a_reward_that_fails_on_the_way_leaves_a_checkpoint(run: Run, reward: str, complaint: str) -> None:
    outcome = run(f"reward={HERE}:{reward}")
    assert complaint in refused(outcome)
    (last,) = Path("runs").glob("support/*/checkpoints/last.ckpt")
    assert re.search(r"Go on with the same command and resume=\S*/last\.ckpt", outcome.err)
    assert torch.load(last, weights_only=True)["global_step"] == 1
    if reward != "raises":
        return
    # Still broken, and the way to go on is still said; then mended.
    global asked
    asked = 3
    again = run(f"reward={HERE}:{reward}", "resume=last")
    assert complaint in refused(again) and f"resume={last.resolve()}" in again.err
    asked = -100
    assert run(f"reward={HERE}:{reward}", "resume=last").code == 0
    assert adapter.find(Path("adapters"), "support").card.metrics["eval/objective/scores"] <= 0


def test_an_engine_that_fails_for_good_leaves_a_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, closed, calls = TransformersRollouts.generate, [], []

    def dying(self: Any, *args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) >= 4:
            raise RolloutError("vLLM could not be kept alive: it ended three times. Its log is runs/vllm.log.")
        return generate(self, *args, **named)

    monkeypatch.setattr(TransformersRollouts, "generate", dying)
    monkeypatch.setattr(TransformersRollouts, "close", lambda self: closed.append(1))
    outcome = run(LETTERS)
    assert "vLLM could not be kept alive: it ended three times." in refused(outcome)
    assert "Go on with the same command and resume=" in outcome.err
    assert closed, "no process is left behind"


def test_the_judge_that_is_for_held_out_completions_does_not_begin_the_value_model(
    run: Run, llama_folder: Path
) -> None:
    publish_judge(Path("adapters"), llama_folder)
    outcome = run(LETTERS, "judge=judge", "algorithm.value_from=reward")
    assert "value_from=reward needs a judge among reward=" in refused(outcome)


# Completions by vLLM, whose place a web server takes here; and by the real one.


def test_each_policy_reaches_vllm_under_a_name_of_its_own(
    run: Run,
    stubs: Stubs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the command line: three iterations, with an engine that is lost in the second."""
    versions: list[str] = []

    def behave(engine: StubEngine, path: str, body: dict[str, Any], count: int) -> tuple[int, Any] | None:
        if path == "/v1/load_lora_adapter":
            assert (Path(body["lora_path"]) / "adapter_model.safetensors").is_file()
            versions.append(body["lora_name"])
            return 200, "Success: added."
        if path == "/v1/unload_lora_adapter":
            return 200, "Success: removed."
        if body["model"] == "policy-000002" and len(stubs.engines) == 1:
            raise Died
        choices = [
            {"index": k, "token_ids": [5, 6 + k, 7, 8], "finish_reason": "length", "stop_reason": None}
            for k in range(body["n"])
        ]
        return 200, {"choices": choices}

    stubs.behave = behave
    monkeypatch.setattr("lit_ft.rollouts.vllm.VllmRollouts", partial(VllmRollouts, start=stubs.start))
    outcome = run(LETTERS, "rollout=vllm", "trainer.validate_first=false", "data.max_val_rows=0", "rollout.retries=1")
    assert outcome.code == 0, outcome.err
    assert versions == ["policy-000001", "policy-000002", "policy-000002", "policy-000003"]
    assert "vLLM failed while generating rollouts" in outcome.err and "Starting it again (1 of 1)" in outcome.err
    asked_of = [body["model"] for body in stubs.of("completions")]
    assert asked_of[:4] == ["policy-000001"] * 4 and asked_of[-4:] == ["policy-000003"] * 4
    assert stubs.nothing_runs() and adapter.find(Path("adapters"), "support").card.algorithm == "ppo"


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_vllm_that_is_killed_in_the_middle_of_training_is_started_again(tmp_path: Path) -> None:
    """With the bundled model: vLLM takes no tiny one."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    write_rows(tmp_path)
    command = [sys.executable, "-m", "lit_ft", "+experiment=grpo", "model.id=bundled", *FEW]
    command += [f"reward={HERE}:letters", "rollout=vllm", "algorithm.num_generations=2", "data.max_val_rows=0"]
    command += ["trainer.validate_first=false", "trainer.max_steps=4", "logger=default", "trainer.log_every_n_steps=1"]
    command += ["algorithm.learning_rate=1e-3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [one for one in command if one != "logger=none"], cwd=tmp_path, env=environment, stdout=said, stderr=said
        )
        try:
            killed = None
            while process.poll() is None:
                time.sleep(0.05)
                if killed is None and list(tmp_path.glob("runs/*/*/rollouts/policy-000002")):
                    # Its first process and what that one started: as the machine does when memory is short.
                    killed = engine_of(process.pid)
                    os.killpg(killed, signal.SIGKILL)
            assert killed is not None and process.returncode == 0, (tmp_path / "said").read_text()
        finally:
            if process.poll() is None:
                process.kill()
    text = (tmp_path / "said").read_text()
    assert "Starting it again (1 of 2)" in text
    assert gone(killed)
    published = adapter.find(tmp_path / "adapters", "support")
    assert published.card.algorithm == "grpo" and published.card.metrics["step"] == 4
    (metrics,) = tmp_path.glob("runs/*/*/csv/metrics.csv")
    rows = [row for row in csv.DictReader(metrics.open()) if row["train/sampling/sampling_logp_difference/mean"]]
    assert len(rows) == 4
    # vLLM has the policy of each iteration; it computes in bf16, and the trainer in float32.
    apart = [float(row["train/sampling/sampling_logp_difference/mean"]) for row in rows]
    assert max(apart) < 0.15 and "away from the policy" not in text, apart


def engine_of(pid: int) -> int:
    """The process group of the vLLM that process `pid` started; it leads a session of its own."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid and int(fields[2]) == int(entry.name):
                    return int(entry.name)
    raise AssertionError(f"process {pid} has no child that leads a group")
