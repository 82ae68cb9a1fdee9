"""`to=merged`: a whole model that answers as the adapter on its base, for every kind of adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ft.adapter import Base, Draft, publish
from tests import tiny
from tests.lit_ft.made import Export, adapter, bases, export, left, logits, published, said

pytestmark = pytest.mark.slow

__all__ = ["bases", "export"]


def read_whole(folder: Path | str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("how", ["lora", "rslora", "dora", "pissa", "adalora", "ia3"])
def test_it_answers_as_the_adapter_on_its_base(
    how: str, kind: str, export: Export, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Against PEFT's own forward, and against its own merge of the same adapter, in float64."""
    trained = adapter(tmp_path / "a", bases[kind], how, kind)
    done = export(f"adapter={tmp_path / 'a'}", f"model={bases[kind]}", "to=merged", "output=out", "dtype=float32")
    assert done.code == 0, done.err
    assert done.out == "out\n" and not Path("out/adapter_config.json").exists()
    expected, base = logits(trained), logits(read_whole(bases[kind]))
    merged = logits(read_whole("out"))
    assert (expected - base).abs().max() > 0.1, "the adapter must do something"
    # A float32 weight of a size around 1 is rounded by 6e-8; two layers of width 32 make 1e-5 of it.
    assert (merged - expected).abs().max() < 5e-5
    assert (merged - logits(trained.merge_and_unload())).abs().max() < 5e-5


def test_the_type_is_the_bases_own_and_the_difference_is_stated(export: Export, tmp_path: Path) -> None:
    """A bfloat16 base: merged in float32 and rounded once, which is the nearest that bfloat16 has."""
    base = tmp_path / "half"
    tiny.model().to(torch.bfloat16).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    trained = adapter(tmp_path / "a", base)
    done = export(f"adapter={tmp_path / 'a'}", f"model={base}", "to=merged", "output=out")
    assert done.code == 0, done.err
    config = json.loads(Path("out/config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"
    from safetensors.torch import load_file

    stored = load_file("out/model.safetensors")
    exact = trained.merge_and_unload().state_dict()
    for name, weight in stored.items():
        assert weight.dtype == torch.bfloat16
        # One bit of the 8 more or less where PEFT's float32 sum ends on the other side of a half.
        assert torch.allclose(weight.float(), exact[name].to(torch.bfloat16).float(), rtol=2**-7, atol=0), name
        assert (weight == exact[name].to(torch.bfloat16)).float().mean() > 0.999
    assert "stored in bfloat16: log-probabilities of a text of" in done.err
    assert "stored in bfloat16" in Path("out/README.md").read_text(encoding="utf-8")


def test_a_published_adapter_finds_its_base_and_brings_its_tokenizer(
    export: Export, bases: dict[str, Path], tmp_path: Path
) -> None:
    """By name and version, by name alone, and by folder; the chat template is the one of its training."""
    made, trained = published(Path("adapters"), bases["llama"])
    template = made.path / "chat_template.jinja"
    template.write_text("{{ messages[0]['content'] }} as trained", encoding="utf-8")
    expected = logits(trained)
    for k, ref in enumerate(("support@v1", "support", "adapters/support/v1", made.path.resolve())):
        done = export(f"adapter={ref}", "to=merged", f"output=out{k}", "dtype=float32")
        assert done.code == 0, done.err
        assert (logits(read_whole(f"out{k}")) - expected).abs().max() < 5e-5
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(f"out{k}")
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert rendered == "Hi as trained"
    assert "support@v1" in Path("out0/README.md").read_text(encoding="utf-8")


def test_trained_biases_and_whole_modules_are_merged_too(
    export: Export, bases: dict[str, Path], tmp_path: Path
) -> None:
    """What no plain LoRA holds has a place in a whole model."""
    for name, more in (
        ("bias", {"bias": "lora_only", "target_modules": ["q_proj"]}),
        ("whole", {"modules_to_save": ["norm"]}),
    ):
        trained = adapter(tmp_path / name, bases["qwen2"], "lora", "qwen2", **more)
        done = export(
            f"adapter={tmp_path / name}", f"model={bases['qwen2']}", "to=merged", f"output={name}", "dtype=float32"
        )
        assert done.code == 0, done.err
        assert (logits(read_whole(name)) - logits(trained)).abs().max() < 5e-5


def test_full_is_copied(export: Export, bases: dict[str, Path]) -> None:
    done = export(f"adapter={bases['llama']}", "to=merged", "output=out")
    assert done.code == 0, done.err
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert Path("out", name).read_bytes() == (bases["llama"] / name).read_bytes()


def test_a_published_whole_model_is_copied_as_it_is(export: Export, bases: dict[str, Path]) -> None:
    """Its card stays behind, since it speaks of another place; there is no base to look for."""

    def write(folder: Path) -> None:
        tiny.model(seed=5).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)

    values = {"algorithm": "sft", "peft": "full", "rank": None, "data": [], "parent": None}
    made = publish(Path("adapters"), Draft("whole", Base("gone", "sha256:0"), **values), write)
    done = export("adapter=whole", "to=merged", "output=out")
    assert done.code == 0, done.err
    assert Path("out/model.safetensors").read_bytes() == (made.path / "model.safetensors").read_bytes()
    assert not Path("out/card.json").exists() and "whole@v1" in Path("out/README.md").read_text(encoding="utf-8")
    message = said(export("adapter=whole", "to=lora", "output=lora"))
    assert "whole model" in message and "to=merged" in message


def test_an_adapter_of_a_base_in_4_bits_says_so(export: Export, bases: dict[str, Path]) -> None:
    published(Path("adapters"), bases["llama"], peft="qlora")
    done = export("adapter=support", "to=merged", "output=out")
    assert done.code == 0 and "4 bits" in done.err


def test_full_in_another_type(export: Export, bases: dict[str, Path]) -> None:
    done = export(f"adapter={bases['llama']}", "to=merged", "output=out", "dtype=float16")
    assert done.code == 0, done.err
    read, base = read_whole("out").state_dict(), read_whole(bases["llama"]).state_dict()
    assert all(torch.equal(read[name], weight.half().float()) for name, weight in base.items())


def test_weights_that_leave_the_range(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter(tmp_path / "a", bases["llama"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: weight * 1000 for name, weight in load_file(path).items()}, path)
    args = (f"adapter={tmp_path / 'a'}", f"model={bases['llama']}", "to=merged", "output=out")
    message = said(export(*args, "dtype=float16"))
    assert "float16" in message and "dtype=bfloat16" in message
    assert left(Path()) == []


def test_weights_that_are_no_numbers(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter(tmp_path / "a", bases["llama"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, path)
    assert "not finite" in said(
        export(f"adapter={tmp_path / 'a'}", f"model={bases['llama']}", "to=merged", "output=out")
    )
    assert left(Path()) == []


def test_tied_embeddings_are_not_merged_into_another_model(export: Export, tmp_path: Path) -> None:
    """An adapter on the output layer alone would change the input layer with it: said, and not written."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = tmp_path / "tied"
    small = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    adapter(tmp_path / "a", base, "lora", target_modules=["lm_head"])
    message = said(export(f"adapter={tmp_path / 'a'}", f"model={base}", "to=merged", "output=out"))
    assert "tied" in message
    assert left(Path()) == []


def test_kinds_that_do_not_merge(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter(tmp_path / "a", bases["llama"])
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"peft_type": "LORA"', '"peft_type": "PROMPT_TUNING"'))
    for to in ("merged", "gguf", "lora"):
        message = said(export(f"adapter={tmp_path / 'a'}", f"model={bases['llama']}", f"to={to}", "output=out"))
        assert "PROMPT_TUNING" in message and "AdaLoRA" in message
