"""`to=lora`: what becomes a plain LoRA, how exactly, and what is said of what does not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from lit_ft.adapter import read
from tests.lit_ft.made import (
    Export,
    adapter,
    bases,
    export,
    left,
    logits,
    published,
    read_peft,
    said,
)

pytestmark = pytest.mark.slow

__all__ = ["bases", "export"]

KINDS = ("llama", "qwen2", "gpt2")


def plain(folder: Path) -> dict[str, object]:
    """The configuration of an exported LoRA, which is one that vLLM takes."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA" and config["init_lora_weights"] is True and config["bias"] == "none"
    assert not config["use_dora"] and not config["modules_to_save"] and not config["rank_pattern"]
    return config


@pytest.mark.parametrize(
    ("how", "kind"),
    [(how, kind) for how in ("adalora", "pissa", "olora") for kind in KINDS if (how, kind) != ("olora", "gpt2")],
)
def test_what_has_factors_is_exact(how: str, kind: str, export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    """Against the model in memory that PEFT saved, in float64: only what is stored in float32 differs.

    And RMSNorm, which transformers computes in float32 always: so the error is a share of the largest logit.
    """
    trained = adapter(tmp_path / "a", bases[kind], how, kind)
    done = export(f"adapter={tmp_path / 'a'}", f"model={bases[kind]}", "to=lora", f"output={tmp_path / 'out'}")
    assert done.code == 0, done.err
    assert done.out == f"{tmp_path / 'out'}\n"
    made = read_peft(tmp_path / "out", bases[kind])
    expected = logits(trained)
    apart = (logits(made) - expected).abs().max() / expected.abs().max()
    assert apart <= (1e-6 if how == "adalora" else 1e-5)
    base = logits(made.unload())
    assert (expected - base).abs().max() > 0.1, "the adapter must do something"
    config = plain(tmp_path / "out")
    if how != "adalora":
        assert config["r"] == 8
    assert "exactly" in done.err


def test_adalora_of_peft_keeps_the_ranks_that_peft_left(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter(tmp_path / "a", bases["llama"], "adalora")
    pattern = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))["rank_pattern"]
    ranks = {name: sum(kept) for name, kept in pattern.items()}
    assert len(set(ranks.values())) > 1 and max(ranks.values()) > 3, "PEFT allotted ranks unevenly"
    assert export(f"adapter={tmp_path / 'a'}", f"model={bases['llama']}", "to=lora", "output=out").code == 0
    assert plain(Path("out"))["r"] == max(ranks.values())


@pytest.mark.parametrize("how", ["lora", "rslora"])
def test_a_plain_lora_is_copied(how: str, export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    """It needs no base, and stays what it is to the byte."""
    adapter(tmp_path / "a", bases["llama"], how)
    done = export(f"adapter={tmp_path / 'a'}", "to=lora", "output=out")
    assert done.code == 0, done.err
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == Path("out", name).read_bytes()
    assert json.loads(Path("out/adapter_config.json").read_text())["use_rslora"] is (how == "rslora")


@pytest.mark.parametrize("kind", KINDS)
def test_dora_of_full_rank_is_exact(kind: str, export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    """At the rank of the weights themselves nothing is cut off, so what is left is rounding."""
    trained = adapter(tmp_path / "a", bases[kind], "dora", kind)
    done = export(f"adapter={tmp_path / 'a'}", f"model={bases[kind]}", "to=lora", "rank=64", "output=out")
    assert done.code == 0, done.err
    assert (logits(read_peft(Path("out"), bases[kind])) - logits(trained)).abs().max() < 1e-4
    assert "0.00%" in done.err and "attention" not in done.err


def test_dora_says_how_much_is_lost(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    """By default at twice its rank; the stated error is that of a whole singular value decomposition, made here."""
    trained = adapter(tmp_path / "a", bases["llama"], "dora")
    merged = {name: weight.detach().clone() for name, weight in trained.merge_and_unload().state_dict().items()}
    base = read_peft(tmp_path / "a", bases["llama"]).unload().state_dict()
    whole = lost = 0.0
    for name, weight in base.items():
        values = torch.linalg.svdvals((merged[name] - weight).double()) if weight.ndim == 2 else torch.zeros(1)
        whole, lost = whole + float(values.square().sum()), lost + float(values[8:].square().sum())
    done = export(f"adapter={tmp_path / 'a'}", f"model={bases['llama']}", "to=lora", "output=out")
    assert done.code == 0, done.err
    assert plain(Path("out"))["r"] == 8
    stated = float(re.search(r"added to the weights ([\d.]+)%", done.err)[1])
    assert stated == pytest.approx(100 * (lost / whole) ** 0.5, abs=0.01)
    assert "log-probabilities of a text of" in done.err
    assert f"attention  {stated:.0f}% of the adapter is lost" in done.err


def test_more_rank_loses_less(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    trained = adapter(tmp_path / "a", bases["llama"], "dora")
    expected, apart = logits(trained), []
    for rank in (1, 4, 16, 32):
        done = export(
            f"adapter={tmp_path / 'a'}", f"model={bases['llama']}", "to=lora", f"rank={rank}", f"output=r{rank}"
        )
        assert done.code == 0, done.err
        apart.append(float((logits(read_peft(Path(f"r{rank}"), bases["llama"])) - expected).norm()))
    assert apart == sorted(apart, reverse=True) and apart[-1] < 1e-3 < apart[0]


def test_a_plain_lora_to_a_lower_rank(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    """One whose fourth direction is empty loses nothing at rank 3, and something at rank 2."""
    from safetensors.torch import load_file, save_file

    adapter(tmp_path / "a", bases["llama"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if "lora_A" in name:
            weight[3] = 0
    save_file(weights, path)
    expected = logits(read_peft(tmp_path / "a", bases["llama"]))
    apart = []
    for rank in (3, 2):
        args = (f"adapter={tmp_path / 'a'}", f"model={bases['llama']}", "to=lora", f"rank={rank}", f"output=r{rank}")
        assert export(*args).code == 0
        assert plain(Path(f"r{rank}"))["r"] == rank
        apart.append(float((logits(read_peft(Path(f"r{rank}"), bases["llama"])) - expected).abs().max()))
    assert apart[0] < 1e-4 and apart[1] > 1e-2


def test_olora_on_weights_that_lie_the_other_way(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT takes OLoRA's beginning from the wrong side of GPT-2's weights: nothing right can be made of it."""
    adapter(tmp_path / "a", bases["gpt2"], "lora", "gpt2")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "olora"'))
    assert "OLoRA" in said(export(f"adapter={tmp_path / 'a'}", f"model={bases['gpt2']}", "to=lora", "output=out"))


def test_what_is_exported_as_a_version_can_be_served(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    """NAME/vN gets a card that the server's reader takes; a canary, and no metrics where something was lost."""
    made, trained = published(tmp_path / "adapters", bases["llama"], "dora", peft="dora", servable=False)
    target = tmp_path / "adapters" / "support-lora" / "v1"
    done = export(f"adapter={made.path}", "to=lora", f"output={target}", "rank=32")
    assert done.code == 0, done.err
    card = read(target).card
    assert (card.ref, card.parent, card.peft, card.rank) == ("support-lora@v1", "support@v1", "lora", 32)
    assert card.servable and card.base == made.card.base and "singular value" in card.converted
    assert card.metrics == {} and made.card.metrics
    trained.float()
    ids = torch.tensor([card.canary.tokens])
    with torch.no_grad():
        theirs = torch.log_softmax(trained(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(theirs, torch.tensor(card.canary.logprobs), atol=1e-3)
    assert (target / "tokenizer.json").is_file()


def test_others_adapters_can_be_served_with_their_base(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter(tmp_path / "a", bases["llama"])
    assert "model=FOLDER" in said(export(f"adapter={tmp_path / 'a'}", "to=lora", "output=adapters/theirs/v1"))
    assert not Path("adapters").exists()
    done = export(f"adapter={tmp_path / 'a'}", f"model={bases['llama']}", "to=lora", "output=adapters/theirs/v1")
    assert done.code == 0, done.err
    assert read(Path("adapters/theirs/v1").resolve()).card.base.id == "tiny-llama"


@pytest.mark.parametrize("how", ["ia3", "full"])
def test_what_has_no_lora_form_says_so(how: str, export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    folder = bases["llama"]
    if how == "ia3":
        adapter(folder := tmp_path / "a", bases["llama"], how)
    message = said(export(f"adapter={folder}", f"model={bases['llama']}", "to=lora", "output=out"))
    assert "no LoRA form" in message and "to=merged" in message
    assert left(Path()) == []


@pytest.mark.parametrize(
    ("how", "more", "words"),
    [
        ("lora", {"bias": "lora_only"}, "trained biases"),
        ("lora", {"modules_to_save": ["norm"]}, "whole modules"),
        ("lora", {"lora_bias": True}, "biases of its own"),
    ],
)
def test_what_no_plain_lora_holds(
    how: str, more: dict[str, object], words: str, export: Export, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter(tmp_path / "a", bases["llama"], how, **more)
    message = said(export(f"adapter={tmp_path / 'a'}", f"model={bases['llama']}", "to=lora", "output=out"))
    assert words in message and "to=merged" in message


@pytest.mark.parametrize("how", ["pissa_niter_4", "corda", "loftq"])
@pytest.mark.parametrize("to", ["lora", "merged"])
def test_a_base_that_cannot_be_made_again(
    how: str, to: str, export: Export, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter(tmp_path / "a", bases["llama"])
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": "{how}"'))
    message = said(export(f"adapter={tmp_path / 'a'}", f"model={bases['llama']}", f"to={to}", "output=out"))
    assert how in message and "path_initial_model_for_weight_conversion" in message
    assert left(Path()) == []


def test_ranks_beyond_what_is_served(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter(tmp_path / "a", bases["llama"], "lora", r=600)
    args = (f"adapter={tmp_path / 'a'}", f"model={bases['llama']}", "to=lora", "output=out")
    message = said(export(*args))
    assert "600" in message and "512" in message and "rank=512" in message
    assert "rank=513" in said(export(*args, "rank=513"))
    assert "rank=0" in said(export(*args, "rank=0"))
    assert export(*args, "rank=32").code == 0


def test_an_exact_form_of_too_high_a_rank(
    export: Export, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PiSSA of rank 4 is a LoRA of rank 8; where only 6 is served, the nearest of that rank is offered and taken."""
    monkeypatch.setattr("lit_ft.models.adapt.MAX_SERVABLE_RANK", 6)
    adapter(tmp_path / "a", bases["llama"], "pissa")
    args = (f"adapter={tmp_path / 'a'}", f"model={bases['llama']}", "to=lora")
    message = said(export(*args, "output=out"))
    assert "rank 8" in message and "rank=6" in message and left(Path()) == []
    assert export(*args, "rank=6", "output=out").code == 0
    assert plain(Path("out"))["r"] == 6


@pytest.mark.parametrize("rank", ['"many"', "null", "[]"])
def test_a_configuration_without_a_rank(rank: str, export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter(tmp_path / "a", bases["llama"])
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', f'"r": {rank}'))
    assert "names no rank" in said(export(f"adapter={tmp_path / 'a'}", "to=lora", "output=out"))


def test_an_embedding_has_no_plain_form(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter(tmp_path / "a", bases["llama"], "dora", target_modules=["q_proj", "embed_tokens"])
    message = said(export(f"adapter={tmp_path / 'a'}", f"model={bases['llama']}", "to=lora", "output=out"))
    assert "embed_tokens" in message and "to=merged" in message
    assert left(Path()) == []


def test_the_installed_vllm_takes_what_is_exported(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    """vLLM's own check of an adapter's configuration, before and after."""
    helper = pytest.importorskip("vllm.lora.peft_helper").PEFTHelper
    for how, begins in (("lora", True), ("rslora", True), ("dora", False), ("pissa", False), ("olora", False)):
        adapter(tmp_path / how, bases["llama"], how)
        done = export(f"adapter={tmp_path / how}", f"model={bases['llama']}", "to=lora", f"output={how}")
        assert done.code == 0, done.err
        before, after = (json.loads((at / "adapter_config.json").read_text()) for at in (tmp_path / how, Path(how)))
        assert (not helper.from_dict(before)._validate_features()) is begins, how
        assert not helper.from_dict(after)._validate_features(), how
