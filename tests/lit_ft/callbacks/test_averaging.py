"""The average of the trained weights: what it is, which checkpoint holds it, what is published, what a resume gives."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from lit_ft import adapter
from lit_ft.errors import UserError
from lit_ft.models import adapt
from lit_ft.modules.base import FineTuneModule
from tests.conftest import Outcome

# Twelve rows are three steps an epoch.
FEW = (
    "data.path=rows.jsonl",
    "data.val_path=held.jsonl",
    "data.max_length=256",
    "data.batch_size=4",
    "algorithm.learning_rate=1e-2",
    "algorithm.lr_scheduler_type=constant",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=6",
    "trainer.ema_decay=0.6",
    "logger=none",
    "name=desk",
)
UNMEASURED = ("data.val_path=null", "data.val_split=0")

Run = Callable[..., Outcome]
Weights = dict[str, Tensor]


@pytest.fixture
def run(cli: Run, own_cache: Path, llama_folder: Path) -> Run:
    rows = [{"prompt": f"{k} bikes?", "chosen": f"{2 * k} wheels.", "rejected": f"{k}."} for k in range(16)]
    sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    for name, kind in (("", sft), ("pairs-", rows)):
        Path(f"{name}rows.jsonl").write_text("\n".join(map(json.dumps, kind[:12])))
        Path(f"{name}held.jsonl").write_text("\n".join(map(json.dumps, kind[12:])))
    return lambda *args: cli(f"model.id={llama_folder}", *FEW, *args)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """`weights`: those trained, before the first optimizer step of the last run and after each; `module`: it."""
    found = SimpleNamespace(weights=[], module=None)
    configure = FineTuneModule.configure_optimizers

    def configure_optimizers(self: FineTuneModule) -> Any:
        found.module, found.weights = self, [trained(self)]
        return configure(self)

    monkeypatch.setattr(FineTuneModule, "configure_optimizers", configure_optimizers)
    hook = register_optimizer_step_post_hook(lambda *_: found.weights.append(trained(found.module)))
    yield found
    hook.remove()


def trained(module: Any) -> Weights:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def average(weights: list[Weights], decay: float = 0.6) -> Weights:
    """By hand, in float64."""
    found = {name: value.double() for name, value in weights[0].items()}
    for t, now in enumerate(weights[1:], start=1):
        d = min(decay, (1 + t) / (10 + t))
        found = {name: d * found[name] + (1 - d) * value.double() for name, value in now.items()}
    return {name: value.float() for name, value in found.items()}


def published(version: int = 1) -> Weights:
    """Under the names that the module has."""
    (file,) = Path("adapters", "desk", f"v{version}").glob("*model.safetensors")
    found = load_file(file)
    whole = file.name == "model.safetensors"
    return {
        f"model.{name}" if whole else f"model.{name.replace('.weight', '.default.weight')}": value
        for name, value in found.items()
    }


def checkpoint(name: str) -> dict[str, Any]:
    (path,) = Path("runs").glob(f"**/{name}.ckpt")
    kept: dict[str, Any] = torch.load(path, weights_only=True)
    return kept


def assert_close(found: Weights, wanted: Weights) -> None:
    """To float32's rounding, or to that of bfloat16, in which whole models are published."""
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        rtol = 1e-5 if value.dtype is torch.float32 else 2**-8
        torch.testing.assert_close(value.float(), wanted[name], rtol=rtol, atol=1e-7)


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the next run receive Ctrl-C in this step."""
    train_step = FineTuneModule.training_step

    def training_step(self: FineTuneModule, window: Any, index: int) -> None:
        if self.global_step + 1 == step:
            monkeypatch.setattr(FineTuneModule, "training_step", train_step)
            signal.raise_signal(signal.SIGINT)
        train_step(self, window, index)

    monkeypatch.setattr(FineTuneModule, "training_step", training_step)


PAIRS = ("+experiment=dpo", "data.path=pairs-rows.jsonl")


@pytest.mark.parametrize("settings", [(), PAIRS, ("peft=full",)], ids=["sft", "dpo", "full"])
def test_the_published_weights_are_the_average_of_those_after_each_step(
    run: Run, seen: SimpleNamespace, settings: tuple[str, ...]
) -> None:
    done = run(*settings, *UNMEASURED)
    assert done.code == 0, done.err
    assert len(seen.weights) == 7
    found, last = published(), seen.weights[-1]
    assert_close(found, average(seen.weights))
    assert any((found[name] - value).abs().max() > 1e-3 for name, value in last.items())


def test_steps_of_an_iteration_count_one_by_one(run: Run, seen: SimpleNamespace) -> None:
    done = run(
        "+experiment=grpo",
        "reward=tests.lit_ft.callbacks.test_averaging:short",
        "data.max_length=64",
        "algorithm.max_new_tokens=4",
        "algorithm.num_generations=2",
        "algorithm.num_epochs=2",
        "trainer.max_steps=2",
        *UNMEASURED,
    )
    assert done.code == 0, done.err
    assert len(seen.weights) == 5
    assert_close(published(), average(seen.weights))


def short(completions: list[str], **_: Any) -> list[float]:
    return [-float(len(completion)) for completion in completions]


def test_held_out_metrics_are_those_of_what_is_published(run: Run) -> None:
    assert run("trainer.val_check_interval=1").code == 0
    again = run("start_from=desk@v1", "algorithm.learning_rate=0", "trainer.max_steps=1")
    assert again.code == 0, again.err
    first, second = (adapter.find(Path("adapters"), f"desk@v{version}").card.metrics for version in (1, 2))
    assert second["before/loss"] == pytest.approx(first["eval/loss"], rel=1e-6)
    assert first["eval/loss"] < first["before/loss"]
    assert run("trainer.val_check_interval=1", "trainer.ema_decay=null").code == 0
    weights = adapter.find(Path("adapters"), "desk@v3").card.metrics
    assert abs(weights["eval/loss"] - first["eval/loss"]) > 1e-3


def test_steps_after_the_last_validation_are_measured_as_the_average(run: Run, seen: SimpleNamespace) -> None:
    assert run("trainer.max_steps=5").code == 0  # an epoch has three
    card = adapter.find(Path("adapters"), "desk").card
    assert card.metrics["step"] == 5
    assert_close(published(), average(seen.weights))
    assert run("start_from=desk@v1", "algorithm.learning_rate=0", "trainer.max_steps=1").code == 0
    again = adapter.find(Path("adapters"), "desk@v2").card.metrics["before/loss"]
    assert card.metrics["eval/loss"] == pytest.approx(again, rel=1e-6)


def test_the_best_checkpoint_holds_the_average_and_the_last_the_weights(
    run: Run, seen: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 5)
    stopped = run("trainer.val_check_interval=1", "trainer.save_every_n_steps=4")
    assert stopped.code == 130, stopped.err
    best, last, before = checkpoint("best"), checkpoint("last"), checkpoint("last-1")
    step = best["global_step"]
    assert step > 0
    assert_close(best["state_dict"], average(seen.weights[: step + 1]))
    for kept, taken in ((last, 5), (before, 4)):
        assert kept["global_step"] == taken
        assert all(torch.equal(value, seen.weights[taken][name]) for name, value in kept["state_dict"].items())
        state = kept["callbacks"]["AverageWeights"]
        assert state["steps"] == taken and not state["swapped"]
        assert_close(state["aside"], average(seen.weights[: taken + 1]))
    now = trained(seen.module)
    assert all(torch.equal(now[name], value) for name, value in seen.weights[-1].items())


def test_an_error_in_a_validation_leaves_the_weights(
    run: Run, seen: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Weights] = []
    validate = FineTuneModule.validation_step

    def validation_step(self: FineTuneModule, window: Any, index: int) -> None:
        if self.global_step:
            held.append(trained(self))
            raise UserError("no more")
        validate(self, window, index)

    monkeypatch.setattr(FineTuneModule, "validation_step", validation_step)
    assert run().code == 2
    assert_close(held[0], average(seen.weights))
    now = trained(seen.module)
    assert all(torch.equal(now[name], value) for name, value in seen.weights[-1].items())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["last", "best"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    run: Run, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    settings = ("peft.dropout=0.3", "trainer.val_check_interval=1")
    assert run(*settings).code == 0
    interrupt(monkeypatch, 4)
    assert run(*settings).code == 130
    (last,) = Path("runs").glob("**/last.ckpt")
    resumed = run(*settings, f"resume={last.with_name(f'{source}.ckpt')}")
    assert resumed.code == 0, resumed.err
    first, second = published(1), published(2)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    metrics = [adapter.find(Path("adapters"), f"desk@v{version}").card.metrics for version in (1, 2)]
    assert metrics[0] == metrics[1]


def test_a_resume_that_only_publishes_publishes_the_average(
    run: Run, seen: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def no_space(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(adapt, "save_trained", no_space)
        assert run(*UNMEASURED).code == 2
    weights = seen.weights
    again = run(*UNMEASURED, "resume=last")
    assert again.code == 0, again.err
    assert len(seen.weights) == 1, "trained anew"
    assert_close(published(), average(weights))


def test_another_decay_is_another_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 2)
    assert run().code == 130
    refused = run("resume=last", "trainer.ema_decay=0.9")
    assert refused.code == 2 and "trainer.ema_decay changed since" in " ".join(refused.err.split())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["trainer.ema_decay=1"], ["trainer.ema_decay=1.0 must be above 0 and below 1", "Leave it out"]),
        (["trainer.ema_decay=0"], ["trainer.ema_decay=0.0 must be above 0 and below 1"]),
        (["trainer.ema_decay=nan"], ["must be above 0 and below 1"]),
        (["strategy=fsdp", "trainer.devices=2"], ["strategy=fsdp shards them", "use strategy=ddp"]),
        (["strategy=fsdp_tp", "trainer.devices=2"], ["strategy=fsdp_tp shards them", "use strategy=ddp"]),
        (["peft=adalora"], ["peft=adalora takes away", "Use peft=lora"]),
        (["+experiment=grpo", "rollout=vllm", "reward=judge"], ["rollout=vllm", "use rollout=transformers"]),
        (["+experiment=ppo", "rollout=vllm", "reward=judge"], ["rollout=vllm", "use rollout=transformers"]),
    ],
)
def test_what_cannot_be_averaged_is_refused_before_anything_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, settings: list[str], words: list[str]
) -> None:
    from lit_ft import train

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("too late: the model is being loaded")

    monkeypatch.setattr(train, "make_model", loaded)
    refused = run(*settings)
    said = " ".join(refused.err.split())
    assert refused.code == 2 and said.startswith("error: ") and all(word in said for word in words), refused.err
    assert not Path("adapters").exists()
