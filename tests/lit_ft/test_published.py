"""The published folder: exactly the files promised, readable by PEFT, with the logits of the trained module."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ft import adapter
from lit_ft.models.resolve import model_fingerprint
from tests.conftest import Outcome

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "card.json",
    "chat_template.jinja",
    "config.yaml",
    "history.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
ARGS = (
    "data.max_length=2048",
    "data.max_rows=8",
    "data.max_val_rows=2",
    "data.batch_size=4",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "algorithm.learning_rate=1e-2",
    "logger=none",
)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Where the wiring's module is caught as it is published."""
    from lit_ft.models import adapt

    caught: dict[str, Any] = {}
    save = adapt.save_trained

    def spy(model: Any, folder: Path, state: Any = None) -> None:
        caught["model"] = model
        save(model, folder, state)

    monkeypatch.setattr(adapt, "save_trained", spy)
    return caught


@pytest.mark.parametrize("rslora", ["false", "true"])
def test_peft_loads_what_was_trained(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path, trained: dict[str, Any], rslora: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    outcome = cli(f"model.id={llama_folder}", f"peft.use_rslora={rslora}", *ARGS)
    assert outcome.code == 0, outcome.err
    folder = Path(outcome.out.splitlines()[-1])
    assert json.loads((folder / "adapter_config.json").read_text())["use_rslora"] is (rslora == "true")
    assert {path.name for path in folder.iterdir()} == FILES

    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("Where is my bike?")["input_ids"]])
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    with torch.no_grad():
        plain = base(ids).logits
        loaded = PeftModel.from_pretrained(base, folder).eval()(ids).logits
        module = trained["model"].eval()
        module.get_base_model().set_attn_implementation("sdpa")
        ours = module(ids).logits
    torch.testing.assert_close(loaded, ours, rtol=1e-5, atol=1e-5)
    assert (loaded - plain).abs().max() > 0.01, "training changed nothing"


def test_the_card_tells_where_it_comes_from(cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path) -> None:
    outcome = cli(f"model.id={llama_folder}", "name=desk", *ARGS)
    card = adapter.find(Path("adapters"), "desk").card
    assert (card.ref, card.algorithm, card.peft, card.rank, card.parent) == ("desk@v1", "sft", "lora", 16, None)
    assert card.base == adapter.Base("tiny-llama", model_fingerprint(str(llama_folder)))
    assert [(d.source, d.rows) for d in card.data] == [("examples:support_sft", 8)]
    assert card.data[0].hash.startswith("sha256:")
    assert {"eval/loss", "eval/mean_token_accuracy", "before/loss", "step"} <= card.metrics.keys()
    assert card.metrics["eval/loss"] < card.metrics["before/loss"]
    assert card.versions["torch"] == torch.__version__
    assert card.servable and card.not_servable_reason is None
    config = json.loads(Path(outcome.out.strip(), "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama", "no path of this machine"
    assert str(llama_folder.parent) not in Path(outcome.out.strip(), "README.md").read_text()


def test_the_best_weights_are_published_not_the_last(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path
) -> None:
    # A rate that destroys the model after the first epoch: the best held-out loss comes early.
    outcome = cli(
        f"model.id={llama_folder}",
        *[a for a in ARGS if "learning_rate" not in a and "epochs" not in a],
        "trainer.max_epochs=6",
        "algorithm.learning_rate=0.3",
        "algorithm.lr_scheduler_type=constant",
        "algorithm.max_grad_norm=0",
    )
    assert outcome.code == 0, outcome.err
    losses = [float(line.split("eval/loss ")[1].split(",")[0]) for line in outcome.err.splitlines()
              if line.startswith("held out at step")]  # fmt: skip
    card = adapter.find(Path("adapters"), "support").card
    assert len(losses) == 6
    assert card.metrics["eval/loss"] == pytest.approx(min(losses), abs=1e-4)
    assert card.metrics["step"] == 2 * (1 + losses.index(min(losses)))
