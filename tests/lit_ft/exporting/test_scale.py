"""`scale=`: between the base and what was trained, in every form, for every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_ft.adapter import read
from tests.lit_ft.exporting.test_merged import read_whole
from tests.lit_ft.made import Export, adapter, bases, export, logits, published, read_peft

pytestmark = pytest.mark.slow

__all__ = ["bases", "export"]

KINDS = ("lora", "rslora", "dora", "pissa", "adalora", "ia3")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().double() for name, weight in model.named_parameters()}


def between(trained: torch.nn.Module, base: Path, scale: float) -> torch.nn.Module:
    """The model whose weights lie between the base's and the trained ones', from the definition."""
    made = trained.float().merge_and_unload()  # type: ignore[operator]
    before = weights(read_whole(base))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.copy_((1 - scale) * before[name] + scale * weight.double())
    return made


# (IA)³ has no LoRA form.
@pytest.mark.parametrize(
    ("how", "to"), [(how, to) for how in KINDS for to in ("lora", "merged") if (how, to) != ("ia3", "lora")]
)
def test_weights_lie_between(how: str, to: str, export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    trained = adapter(tmp_path / "a", base, how)
    more = ["rank=64"] if (how, to) == ("dora", "lora") else []  # the whole difference, so that it is exact
    done = export(f"adapter={tmp_path / 'a'}", f"model={base}", f"to={to}", "output=out", "scale=0.25", *more)
    assert done.code == 0, done.err
    assert "at 0.25 of its strength" in done.err
    full = logits(trained)
    expected = logits(between(trained, base, 0.25))
    assert (full - expected).abs().max() > 0.1, "the strength must show"
    made = logits(read_peft(Path("out"), base) if to == "lora" else read_whole("out"))
    assert (made - expected).abs().max() < 5e-5


def test_a_weaker_version_is_published_beside_the_first(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    first, _ = published(tmp_path / "adapters", bases["llama"])
    second = tmp_path / "adapters" / "support" / "v2"
    done = export(f"adapter={first.path}", "to=lora", f"output={second}", "scale=0.5")
    assert done.code == 0, done.err
    card = read(second).card
    assert card.ref == "support@v2" and "at 0.5 of its strength" in str(card.converted)
    assert card.metrics == {}, "what was measured in training is another adapter"
    assert card.canary is not None


def test_a_strength_of_one_changes_nothing(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter(tmp_path / "a", bases["llama"])
    done = export(f"adapter={tmp_path / 'a'}", "to=lora", "output=out", "scale=1")
    assert done.code == 0, done.err
    weights = "adapter_model.safetensors"
    assert Path("out", weights).read_bytes() == (tmp_path / "a" / weights).read_bytes()
    assert json.loads(Path("out", "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["to=lora", "scale=0"], "scale=0 must be above 0"),
        (["to=merged", "scale=-1"], "scale=-1 must be above 0"),
        (["to=gguf", "scale=nan"], "must be above 0"),
        (["to=lora", "scale=much"], "scale"),
    ],
)
def test_what_is_no_strength(words: list[str], said: str, export: Export, tmp_path: Path) -> None:
    done = export(f"adapter={tmp_path / 'a'}", "output=out", *words)
    assert done.code == 2 and said in done.err
    assert not Path("out").exists()


def test_the_hub_gets_what_is_there(export: Export, tmp_path: Path) -> None:
    done = export(f"adapter={tmp_path / 'a'}", "to=hub", "repo=a/b", "scale=0.5")
    assert done.code == 2 and "scale= has no effect with to=hub" in done.err
