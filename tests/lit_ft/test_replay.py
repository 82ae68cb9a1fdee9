"""replay=self, algorithm.kl_coef, trainer.kl_weight: the base answers once, and what is trained and chosen by it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_ft import adapter, replay
from lit_ft.batches import Example
from lit_ft.rollouts.transformers import TransformersRollouts
from lit_ft.wiring.replay import drawn
from tests import tiny
from tests.conftest import Outcome
from tests.lit_ft.test_resume import interrupted as interrupted
from tests.processes import run_together

Run = Callable[..., Outcome]
PROMPTS = 8
# Six prompts of eight are trained on; two are for measuring.
FEW = [
    "data.max_length=2048",
    "data.max_rows=8",
    "data.max_val_rows=2",
    "data.batch_size=4",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
    "replay.max_new_tokens=12",
    "algorithm.learning_rate=1e-2",
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Tell me about number {k}."}) + "\n" for k in range(PROMPTS)))
    return path


@pytest.fixture
def run(cli: Run, own_cache: Path, llama_folder: Path, prompts: Path) -> Run:
    return lambda *args: cli(f"model.id={llama_folder}", "logger=none", f"replay.path={prompts}", *FEW, *args)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts were answered, each time that something was generated."""
    asked: list[int] = []
    generate = TransformersRollouts.generate

    def counting(self: Any, prompts: Any, *args: Any, **more: Any) -> Any:
        asked.append(len(prompts))
        return generate(self, prompts, *args, **more)

    monkeypatch.setattr(TransformersRollouts, "generate", counting)
    return asked


def card(name: str = "support") -> adapter.Card:
    return adapter.find(Path("adapters"), name).card


def test_answers_of_the_base_are_mixed_in(run: Run, generated: list[int]) -> None:
    outcome = run("replay=self", "replay.weight=0.5")
    assert outcome.code == 0, outcome.err
    main, own = card().data
    assert own.source.startswith("the base's own answers to ") and own.rows == 4 and main.rows == 8
    assert generated == [PROMPTS]
    metrics = card().metrics
    assert metrics["before/kl"] == pytest.approx(0, abs=1e-5) and metrics["eval/kl"] > 1e-4
    assert "12 rows kept" in outcome.err and "6 general prompts" not in outcome.err
    assert f"answers to {PROMPTS} general prompts" in outcome.err


def test_they_are_made_once(run: Run, generated: list[int]) -> None:
    assert run("replay=self").code == 0
    for more in (["seed=1"], ["replay=self", "name=other", "+experiment=dpo", "replay=none", "algorithm.kl_coef=1"]):
        assert run("algorithm.kl_coef=0.1", "start_from=none", *more).code == 0
    assert generated == [PROMPTS], "whatever the seed and whatever they are for"
    assert run("replay=self", "replay.max_new_tokens=6").code == 0
    assert generated == [PROMPTS, PROMPTS], "but not at another length"


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    run: Run, generated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replay, "write_kept", full)
    outcome = run("replay=self")
    assert outcome.code == 0 and "answers could not be kept" in outcome.err


@pytest.mark.parametrize("peft", ["lora", "pissa", "full", "ia3", "adalora"])
def test_they_are_the_base_s_whatever_is_trained(
    run: Run, own_cache: Path, llama_folder: Path, peft: str, prompts: Path
) -> None:
    """PiSSA takes the adapter's beginning out of the base, and with peft=full there is no adapter to switch off."""
    settings = ["trainer.max_epochs=4"] if peft == "adalora" else []  # whose schedule needs steps
    outcome = run("replay=self", f"peft={peft}", *settings)
    assert outcome.code == 0, outcome.err
    (kept,) = (own_cache / "replay").glob("*.json")
    model, tokenizer = tiny.model(), tiny.tokenizer()
    rows = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    texts = [
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row}], add_generation_prompt=True, return_dict=False
            )
        )
        for row in rows
    ]
    asked = drawn([Example(text, ()) for text in texts], PROMPTS)
    own = replay.base_answers(
        model, tokenizer, asked, max_new_tokens=12, kept=own_cache / "plain", depends_on="plain", below=False
    )
    assert [list(one.completions[0].ids) for one in own] == [ids for ((ids, _),) in json.loads(kept.read_text())]
    assert ("eval/kl" in card().metrics) is not (peft in ("pissa", "full")), (
        "where no base is left, nothing is measured"
    )


def test_adapters_are_switched_off_meanwhile(tmp_path: Path) -> None:
    from lit_ft.models.kinds.lora import apply_lora

    tokenizer = tiny.tokenizer()
    asked = [(5, 6, 7), (8, 9, 10, 11)]
    options: dict[str, Any] = {"max_new_tokens": 8, "depends_on": "base"}
    expected = replay.base_answers(tiny.model(), tokenizer, asked, kept=tmp_path / "a", below=False, **options)
    model = apply_lora(tiny.model(), r=4, alpha=8, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    assert replay.base_answers(model, tokenizer, asked, kept=tmp_path / "b", **options) == expected
    adapted = replay.base_answers(model, tokenizer, asked, kept=tmp_path / "c", below=False, **options)
    assert adapted != expected, "the adapter does nothing: the comparison shows nothing"
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


@pytest.mark.slow
def test_kl_coef_holds_the_policy(run: Run) -> None:
    for name, coefficient in (("free", 0.001), ("held", 300.0)):
        assert run(f"name={name}", f"algorithm.kl_coef={coefficient}", "trainer.max_epochs=4").code == 0
    free, held = card("free").metrics, card("held").metrics
    assert held["eval/kl"] < 0.2 * free["eval/kl"]
    assert free["eval/loss"] < held["eval/loss"] < held["before/loss"]


def test_on_prompts_of_the_task(run: Run, generated: list[int]) -> None:
    outcome = run("algorithm.kl_coef=0.1", "algorithm.kl_prompts=task")
    assert outcome.code == 0, outcome.err
    assert "8 prompts of the task" in outcome.err and "general" not in outcome.err.split("replay  ")[1].split("\n")[0]
    assert generated == [8] and "eval/kl" in card().metrics


@pytest.mark.slow
def test_steps_are_compared_by_both(run: Run) -> None:
    """At a rate that destroys the model far from the base, a heavy weight publishes the earlier step."""
    settings = ["trainer.max_epochs=6", "algorithm.lr_scheduler_type=constant"]
    assert run("name=loss", "algorithm.kl_coef=1e-6", *settings).code == 0
    assert run("name=both", "trainer.kl_weight=1000", *settings).code == 0
    by_loss, by_both = card("loss").metrics, card("both").metrics
    assert by_both["step"] < by_loss["step"]
    assert by_both["eval/combined"] == pytest.approx(by_both["eval/loss"] + 1000 * by_both["eval/kl"])
    assert by_loss["eval/loss"] < by_both["eval/loss"] and by_loss["eval/kl"] > by_both["eval/kl"]


@pytest.mark.slow
def test_early_stopping_ends_a_run_that_drifts(run: Run) -> None:
    settings = ["trainer.max_epochs=8", "algorithm.lr_scheduler_type=constant", "trainer.early_stopping=2"]
    long = run("name=loss", "algorithm.kl_coef=1e-6", *settings)
    short = run("name=both", "trainer.kl_weight=1000", *settings)
    assert long.code == short.code == 0
    validations = [len(re.findall("^held out at step", one.err, re.M)) for one in (long, short)]
    assert validations[1] == 3 < validations[0]  # the first is the best, and two more were waited for


def test_a_resume_is_exact(run: Run, interrupted: Callable[[int], None]) -> None:
    settings = ["replay=self", "algorithm.kl_coef=0.3", "trainer.kl_weight=1", "trainer.max_epochs=2"]
    assert run("name=whole", *settings).code == 0
    interrupted(4)
    assert run("name=parts", *settings).code == 130
    refused = run("name=parts", *settings, "trainer.kl_weight=2", "resume=last")
    assert refused.code == 2 and "trainer.kl_weight changed since" in refused.err
    again = run("name=parts", *settings, "resume=last")
    assert again.code == 0, again.err
    whole, parts = (load_file(f"adapters/{name}/v1/adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path, llama_folder: Path, prompts: Path) -> None:
    common = [f"model.id={llama_folder}", "logger=none", f"replay.path={prompts}", *FEW, "replay=self"]
    common += ["algorithm.kl_coef=0.5", "trainer.kl_weight=1", "data.max_tokens=300", "trainer.progress=false"]
    common += ["algorithm.learning_rate=1e-3", "algorithm.kl_batch_size=3", "trainer.precision=32-true"]
    found = run_together(tmp_path, [[*common, "name=one", "cache=one"]], processes=1)
    found += run_together(tmp_path, [[*common, "name=two", "cache=two", "trainer.devices=2", "strategy=ddp"]])
    assert [one.code for one in found] == [0, 0], "\n".join(one.err for one in found)
    one, two = (load_file(tmp_path / f"adapters/{name}/v1/adapter_model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5, msg=key)
    metrics = [
        json.loads((tmp_path / f"adapters/{name}/v1/card.json").read_text())["metrics"] for name in ("one", "two")
    ]
    for key in ("eval/loss", "eval/kl", "eval/combined"):
        assert metrics[0][key] == pytest.approx(metrics[1][key], rel=1e-4), key


REFUSED = [
    (["replay=self", "+experiment=dpo"], "replay=self mixes answers of the base into rows that have one answer each"),
    (["algorithm.kl_coef=-1"], "algorithm.kl_coef=-1.0 must be a number from 0 on"),
    (["algorithm.kl_coef=nan"], "algorithm.kl_coef=nan must be a number from 0 on"),
    (["trainer.kl_weight=-0.5"], "trainer.kl_weight=-0.5 must be"),
    (["replay=self", "replay.weight=inf"], "replay.weight=inf must be"),
    (["replay.max_prompts=3"], "replay.max_prompts=3 must be at least 4"),
    (["replay.max_new_tokens=0"], "replay.max_new_tokens=0 must be at least 1"),
    (["algorithm.kl_batch_size=0"], "algorithm.kl_batch_size=0 must be at least 1"),
    (["algorithm.kl_coef=0.1", "peft=full"], "algorithm.kl_coef needs the base below the adapter, and with peft=full"),
    (["trainer.kl_weight=1", "peft=pissa"], "trainer.kl_weight needs the base below the adapter, and with peft=pissa"),
    (["trainer.kl_weight=1", "+experiment=reward"], "trainer.kl_weight compares the steps of SFT and DPO"),
    (["replay=self", "strategy=fsdp", "trainer.devices=2"], "strategy=fsdp shards it: use strategy=ddp"),
    (["trainer.kl_weight=1", "data.max_val_rows=0"], "trainer.kl_weight needs held-out rows"),
    (["replay=self", "replay.path=nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
    (["replay=self", "replay.max_new_tokens=2040"], "tokens left for an answer"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(one) for one, _ in REFUSED])
def test_what_cannot_be(run: Run, arguments: list[str], message: str) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2 and message in " ".join(outcome.err.split()), outcome.err
    assert not list(Path("adapters").glob("*/*"))


def test_too_few_prompts(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "Only this."}\n{"prompt": "Only this."}\n')
    outcome = run("replay=self", f"replay.path={path}")
    assert outcome.code == 2 and "gives 1 prompts, and one in four" in " ".join(outcome.err.split())


@pytest.mark.slow
def test_the_preview_counts_them_without_asking_anybody(
    in_process: Callable[..., Run], generated: list[int], own_cache: Path, llama_folder: Path, prompts: Path
) -> None:
    from lit_ft.preview import main

    preview = in_process(main, "lit_ft.preview")
    common = [f"model.id={llama_folder}", "logger=none", f"replay.path={prompts}", *FEW]
    without, with_replay = preview(*common), preview(*common, "replay=self", "replay.weight=1")
    assert without.code == with_replay.code == 0, with_replay.err
    assert "2 per epoch" in without.out and "4 per epoch" in with_replay.out
    assert generated == []
