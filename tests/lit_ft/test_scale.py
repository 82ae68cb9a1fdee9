"""`scale=`: an adapter published at a part of its strength is the one trained, interpolated, and measured as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_ft import adapter
from lit_ft.models.adapt import weaken
from tests import tiny
from tests.conftest import Outcome

Run = Callable[..., Outcome]
FEW = (
    "data.max_length=2048",
    "data.max_rows=16",
    "data.max_val_rows=4",
    "data.batch_size=4",
    "trainer.accelerator=cpu",
    "algorithm.learning_rate=1e-2",
    "logger=none",
)


@pytest.fixture
def run(cli: Run, own_cache: Path, llama_folder: Path) -> Run:
    return lambda *args: cli(f"model.id={llama_folder}", *FEW, *args)


def weights(name: str) -> dict[str, torch.Tensor]:
    return load_file(f"adapters/{name}/v1/adapter_model.safetensors")


@pytest.mark.parametrize("peft", ["lora", "rslora", "pissa", "adalora", "ia3"])
def test_what_is_published(run: Run, peft: str) -> None:
    assert run("name=whole", f"peft={peft}").code == 0
    outcome = run("name=part", f"peft={peft}", "scale=0.25")
    assert outcome.code == 0, outcome.err
    whole, part = weights("whole"), weights("part")
    for key, value in whole.items():
        if "lora_B" in key:
            expected = 0.25 * value
        elif "ia3_l" in key:
            expected = 1 + 0.25 * (value - 1)
        else:
            expected = value
        torch.testing.assert_close(part[key], expected, rtol=1e-6, atol=0)
    full, less = (adapter.find(Path("adapters"), name).card for name in ("whole", "part"))
    assert less.metrics["eval/loss"] != full.metrics["eval/loss"]
    assert full.metrics["eval/loss"] < less.metrics["eval/loss"] < less.metrics["before/loss"], "measured as published"
    assert less.converted is not None and less.converted.endswith("at 0.25 of its strength")
    assert "published part@v1" in outcome.err and f"{less.metrics['eval/loss']:.4f}" in outcome.err


def test_without_held_out_rows(run: Run) -> None:
    assert run("scale=0.5", "data.max_val_rows=0").code == 0
    assert "eval/loss" not in adapter.find(Path("adapters"), "support").card.metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scale=0"], "scale=0 must be above 0"),
        (["scale=-1"], "scale=-1 must be above 0"),
        (["scale=nan"], "scale=nan must be above 0"),
        (["scale=0.5", "peft=dora"], "needs the base's weights beside the trained ones: export it so"),
        (["scale=0.5", "peft=full"], "python -m lit_ft.export scale=0.5"),
        (["scale=0.5", "+experiment=reward"], "scale=0.5 is for SFT and DPO; algorithm=reward"),
        (["scale=0.5", "strategy=fsdp", "trainer.devices=2"], "has not been made for strategy=fsdp"),
    ],
)
def test_what_cannot_be(run: Run, arguments: list[str], message: str) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2 and message in " ".join(outcome.err.split()), outcome.err


def test_weaken_knows_what_it_can() -> None:
    with pytest.raises(ValueError, match="expected a LoRA or an"):
        weaken(tiny.model(), 0.5)
