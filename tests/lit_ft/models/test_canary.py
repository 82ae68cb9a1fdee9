"""The canary: the numbers that PEFT finds in the published folder, under every strategy; what a reader refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ft import adapter
from lit_ft.adapter import Adapter, AdapterError, Canary, find, publish, read
from lit_ft.models.adapt import causal_lm
from lit_ft.models.canary import TEXT, canary
from lit_ft.models.kinds.lora import apply_lora
from tests import tiny
from tests.conftest import Outcome
from tests.lit_ft.test_adapter import draft, write
from tests.lit_ft.test_published import ARGS
from tests.processes import run_together

GOOD = Canary([5, 17, 40], [-1.25, -0.5], [-3.5, -2.75])
# Float32 sums in another order, of logits in the tens, and six decimals in the card.
FLOAT32 = 1e-5
# Three digits in every layer, of logits in the tens: 0.03 was seen, where training had moved them by 4.6.
BFLOAT16 = 0.15


def stirred(model: Any) -> Any:
    """The model with adapters that change what it says: as they begin, they change nothing."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def by_hand(model: Any, tokens: list[int], mixed: bool = False) -> list[float]:
    """Log-probabilities as anyone takes them from a model's logits."""
    ids = torch.tensor([tokens])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        logits = model(ids).logits[0].float()
    every = torch.log_softmax(logits, -1)
    return [float(every[k, token]) for k, token in enumerate(tokens[1:])]


# What is recorded


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "gpt2"])
def test_it_is_what_the_model_itself_says_with_and_without_its_adapter(kind: str, tokenizer: Any) -> None:
    alone = tiny.model(kind).eval()
    model = stirred(apply_lora(tiny.model(kind))).eval()
    found = canary(model, tokenizer)
    assert found.tokens == tokenizer(TEXT)["input_ids"][:64]
    assert len(found.tokens) == 64, "a token a byte: there are more"
    assert found.logprobs == pytest.approx(by_hand(model, found.tokens), abs=FLOAT32)
    assert found.base_logprobs == pytest.approx(by_hand(alone, found.tokens), abs=FLOAT32)
    assert max(abs(a - b) for a, b in zip(found.logprobs, found.base_logprobs, strict=True)) > 0.5


def test_an_adapter_that_has_learned_nothing_is_the_base(tokenizer: Any) -> None:
    found = canary(apply_lora(tiny.model()), tokenizer)
    assert found.logprobs == pytest.approx(found.base_logprobs, abs=FLOAT32)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(tokenizer: Any, training: bool) -> None:
    model = stirred(apply_lora(tiny.model(), dropout=0.5)).train(training)
    still = canary(stirred(apply_lora(tiny.model())).eval(), tokenizer)

    def state() -> tuple[Any, ...]:
        modules = [(name, m.training, getattr(m, "p", None)) for name, m in model.named_modules()]
        parameters = [(name, p.requires_grad, p.grad, p.dtype) for name, p in model.named_parameters()]
        return modules, parameters, torch.get_rng_state().tolist()

    before = state()
    assert canary(model, tokenizer) == still, "nothing is dropped"
    assert state() == before
    assert not any(p.is_inference() for p in model.parameters())

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    hook = causal_lm(model).register_forward_pre_hook(fail)
    inner = causal_lm(model).base_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        canary(model, tokenizer)
    hook.remove(), inner.remove()
    assert state() == before
    assert canary(model, tokenizer) == still


def test_the_tokenizer_decides_how_a_text_begins(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    begins = tiny.tokenizer()
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    model = apply_lora(tiny.model())
    plain, with_first = canary(model, tokenizer).tokens, canary(model, begins).tokens
    assert with_first == [0, *plain[:63]]
    assert 1 not in plain, "<|im_start|>: no chat template"


def test_a_short_context_is_left_room_for_an_answer(tokenizer: Any) -> None:
    model = apply_lora(tiny.model())
    causal_lm(model).config.max_position_embeddings = 24
    assert len(canary(model, tokenizer).tokens) == 23


def test_no_canary_of_nothing_or_of_no_numbers(tokenizer: Any) -> None:
    model = apply_lora(tiny.model())
    for ids in ([], [7]):
        with pytest.raises(ValueError, match=f"makes {len(ids)} tokens"):
            canary(model, lambda text, ids=ids: {"input_ids": ids})
    torch.nn.init.constant_(next(p for name, p in model.named_parameters() if "lora_B" in name), math.nan)
    with pytest.raises(ValueError, match=r"canary\.logprobs holds a value that is not finite"):
        canary(model, tokenizer)


# What is published


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", FLOAT32), ("bf16-mixed", BFLOAT16)])
def test_peft_finds_the_same_in_what_sft_and_dpo_publish(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path, precision: str, tolerance: float
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mixed = precision == "bf16-mixed"
    settings = [f"model.id={llama_folder}", *ARGS, f"trainer.precision={precision}", "peft.dropout=0.1"]
    for experiment in ("sft", "dpo"):  # the second goes on from the first
        ended = cli(f"+experiment={experiment}", *settings)
        assert ended.code == 0, ended.err
        published = find(Path("adapters"), "support")
        recorded = published.card.canary
        assert published.card.algorithm == experiment and recorded is not None, ended.err
        assert "canary" not in ended.err

        dtype = torch.bfloat16 if mixed else torch.float32
        base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=dtype).eval()
        without = by_hand(base, recorded.tokens, mixed)
        loaded = PeftModel.from_pretrained(base, published.path).eval()
        assert recorded.tokens == AutoTokenizer.from_pretrained(published.path)(TEXT)["input_ids"][:64]
        assert recorded.base_logprobs == pytest.approx(without, abs=tolerance)
        assert recorded.logprobs == pytest.approx(by_hand(loaded, recorded.tokens, mixed), abs=tolerance)
        moved = [abs(a - b) for a, b in zip(recorded.logprobs, recorded.base_logprobs, strict=True)]
        assert max(moved) > 3 * tolerance, "training changed nothing: the comparison would show nothing"
        first = published.path.parent / "v1"
        if experiment == "dpo":
            assert recorded.base_logprobs == pytest.approx(read(first).card.canary.base_logprobs, abs=tolerance)
            assert recorded.logprobs != read(first).card.canary.logprobs


@pytest.mark.parametrize("settings", [["peft=full"], ["model.tiny=true"]])
def test_what_is_not_served_has_none(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path, settings: list[str]
) -> None:
    ended = cli(f"model.id={llama_folder}", *ARGS, *settings)
    assert ended.code == 0, ended.err
    card = find(Path("adapters"), "support").card
    assert card.canary is None and not card.servable
    assert "canary" not in ended.err


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_a_model_it_cannot_be_made_of_is_published_without(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """What breaks is the pass itself, in the middle of a model that may lie in shards."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    from lit_ft.wiring import publish

    def breaking(*args: Any, **kwargs: Any) -> Canary:
        def fail(*_: Any) -> None:
            raise RuntimeError("strange model\nwith much to say")

        with monkeypatch.context() as patch:
            patch.setattr(LlamaMLP, "forward", fail)
            return canary(*args, **kwargs)

    words = [f"model.id={llama_folder}", *ARGS, "trainer.precision=32-true", f"strategy={strategy}"]
    good = cli(*words, "name=good")
    monkeypatch.setattr(publish, "canary", breaking)
    ended = cli(*words, "name=bad")
    assert (good.code, ended.code) == (0, 0), good.err + ended.err
    said = [line for line in ended.err.splitlines() if "canary" in line]
    assert said == [
        "canary     left out, serving cannot check what it loads by it (RuntimeError: strange model)",
    ]
    whole, lacking = find(Path("adapters"), "good").card, find(Path("adapters"), "bad").card
    assert whole.canary is not None and lacking.canary is None
    assert lacking.weights_sha256 == whole.weights_sha256, "the same weights, whatever happened on the way"


@pytest.mark.slow
def test_two_processes_record_what_one_does(tmp_path: Path, llama_folder: Path) -> None:
    rows = [{"prompt": f"How many is {k}?", "completion": f"As many as {k * k}."} for k in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    usual = ["+experiment=sft", f"model.id={llama_folder}", "data.path=rows.jsonl", "data.max_val_rows=2", "peft=lora"]
    usual += ["trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.progress=false", "logger=none"]
    # Few small steps: what two processes sum in another order stays small beside what is compared.
    usual += ["trainer.max_steps=2", "data.batch_size=3", "algorithm.learning_rate=1e-3"]
    strategies = {"ddp": "ddp", "fsdp": "fsdp", "tp": "fsdp_tp"}
    together = [[*usual, "trainer.devices=2", f"strategy={s}", f"name={name}"] for name, s in strategies.items()]
    ended = run_together(tmp_path, [[*usual, "name=one"]], processes=1) + run_together(tmp_path, together)
    assert [one.code for one in ended] == [0] * 4, "\n".join(one.err for one in ended)
    expected = find(tmp_path / "adapters", "one").card.canary
    assert expected is not None
    moved = [abs(a - b) for a, b in zip(expected.logprobs, expected.base_logprobs, strict=True)]
    assert max(moved) > 1e-3, "training changed nothing: the comparison would show nothing"
    for name in strategies:
        found = find(tmp_path / "adapters", name).card.canary
        assert found is not None, name
        assert found.tokens == expected.tokens
        assert found.logprobs == pytest.approx(expected.logprobs, rel=0, abs=1e-5), name
        assert found.base_logprobs == pytest.approx(expected.base_logprobs, rel=0, abs=1e-5), name


# What is read


def published_with(root: Path, change: Callable[[dict[str, Any]], Any]) -> Adapter:
    made = publish(root, draft(canary=GOOD), write)
    card = json.loads((made.path / "card.json").read_text(encoding="utf-8"))
    change(card)
    (made.path / "card.json").write_text(json.dumps(card), encoding="utf-8")
    return read(made.path)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = publish(tmp_path, draft(canary=GOOD), write)
    assert made.card.canary == GOOD
    assert read(made.path) == made


def test_a_card_with_a_canary_can_be_read_by_people(tmp_path: Path) -> None:
    long = Canary(list(range(64)), [-1.5e-6] * 63, [-12.345678] * 63)
    # Text that looks like what is brought together stays as it is.
    made = publish(tmp_path, draft(canary=long, parent="[\n  1,\n  2\n]", metrics={"[ 1 ]": 2.5}), write)
    text = (made.path / "card.json").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    assert f'    "tokens": [{", ".join(str(k) for k in range(64))}],\n' in text
    assert read(made.path) == made
    assert (made.card.parent, made.card.canary) == ("[\n  1,\n  2\n]", long)


@pytest.mark.parametrize("change", [lambda card: card.pop("canary"), lambda card: card.update(canary=None)])
def test_older_cards_have_none(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    assert published_with(tmp_path, change).card.canary is None


def test_what_a_later_version_may_add_is_passed_over(tmp_path: Path) -> None:
    assert published_with(tmp_path, lambda card: card["canary"].update(text="hello")).card.canary == GOOD


def test_whole_numbers_are_numbers(tmp_path: Path) -> None:
    found = published_with(tmp_path, lambda card: card["canary"].update(logprobs=[-1, 0])).card.canary
    assert found is not None and found.logprobs == [-1.0, 0.0]


BAD: dict[str, tuple[Any, str]] = {
    "a text": ("canary", "cannot be read"),
    "a list": ([GOOD.tokens, GOOD.logprobs, GOOD.base_logprobs], "cannot be read"),
    "false": (False, "cannot be read"),
    "empty": ({}, "lacks 'tokens'"),
    "no tokens": ({"tokens": ...}, "lacks 'tokens'"),
    "no log-probabilities": ({"logprobs": ...}, "lacks 'logprobs'"),
    "none of the base": ({"base_logprobs": ...}, "lacks 'base_logprobs'"),
    "tokens are null": ({"tokens": None}, "canary.tokens is not a list of numbers"),
    "tokens are a text": ({"tokens": "abc"}, "canary.tokens is not a list of numbers"),
    "a token is a text": ({"tokens": [5, "17", 40]}, "canary.tokens is not a list of numbers"),
    "a token is a fraction": ({"tokens": [5, 17.0, 40]}, "canary.tokens is not a list of numbers"),
    "a token is true": ({"tokens": [5, True, 40]}, "canary.tokens is not a list of numbers"),
    "a token is negative": ({"tokens": [5, -17, 40]}, "canary.tokens holds a negative id"),
    "one token": ({"tokens": [5], "logprobs": [], "base_logprobs": []}, "canary.tokens are 1, expected 2 to 64"),
    "too many tokens": (
        {"tokens": [5] * 65, "logprobs": [-1.0] * 64, "base_logprobs": [-1.0] * 64},
        "canary.tokens are 65, expected 2 to 64",
    ),
    "too few": ({"logprobs": [-1.25]}, "canary.logprobs are 1, expected 2"),
    "too many": ({"base_logprobs": [-3.5, -2.75, -1.0]}, "canary.base_logprobs are 3, expected 2"),
    "as many as tokens": ({"logprobs": [0.0, -1.25, -0.5]}, "canary.logprobs are 3, expected 2"),
    "a number is a text": ({"logprobs": [-1.25, "-0.5"]}, "canary.logprobs is not a list of numbers"),
    "a number is null": ({"base_logprobs": [None, -2.75]}, "canary.base_logprobs is not a list of numbers"),
    "a number is a list": ({"logprobs": [[-1.25], [-0.5]]}, "canary.logprobs is not a list of numbers"),
    "NaN": ({"logprobs": [-1.25, math.nan]}, "canary.logprobs holds a value that is not finite"),
    "infinity": ({"base_logprobs": [-math.inf, -2.75]}, "canary.base_logprobs holds a value that is not finite"),
    "beyond any float": ({"logprobs": [-1.25, -(10**400)]}, "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_canary_makes_a_card_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    given, reason = BAD[name]

    def change(card: dict[str, Any]) -> None:
        whole = {**card["canary"], **given} if isinstance(given, dict) and given else given
        card["canary"] = {k: v for k, v in whole.items() if v is not ...} if isinstance(whole, dict) else whole

    with pytest.raises(AdapterError) as refused:
        published_with(tmp_path, change)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    (broken,) = adapter.scan(tmp_path)
    assert isinstance(broken, adapter.Broken) and broken.reason == str(refused.value)


def test_a_wrong_canary_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Canary(GOOD.tokens, [-1.25, math.nan], GOOD.base_logprobs)
    with pytest.raises(TypeError, match="not a list of numbers"):
        Canary(GOOD.tokens, (-1.25, -0.5), GOOD.base_logprobs)  # type: ignore[arg-type]


def test_the_made_up_one_of_the_servers_tests_is_one(tmp_path: Path) -> None:
    from tests.serve import published

    assert published.adapter(tmp_path, canary=published.CANARY).card.canary == GOOD
    assert published.adapter(tmp_path, version=2).card.canary is None
