"""QLoRA: the base in 4 bits by bitsandbytes, beside what transformers and PEFT make of it, from loading to merging."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_ft import adapter
from lit_ft.batches import Batch, Completion, Example, pack, pad
from lit_ft.errors import UserError
from lit_ft.models import four_bits, lora
from lit_ft.models.adapt import causal_lm, parameter_counts, save_trained
from lit_ft.models.kinds.lora import Lora, QLora
from lit_ft.models.load import _from_config, load_model, shrink
from lit_ft.models.score import score, use_packed_attention
from lit_ft.modules import SFTModule
from lit_ft.resources.estimate import Setting, rehearse
from tests import tiny
from tests.conftest import Outcome
from tests.lit_ft.models.test_lora import randomize
from tests.lit_ft.resources.test_estimate import batch_of, really_held
from tests.lit_ft.resources.test_memory import llama

bnb = pytest.importorskip("bitsandbytes")

Run = Callable[..., Outcome]
LINEAR = 14
IDS = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(5))


def plain_model(architecture: str = "llama") -> Any:
    """A tiny model whose rows are multiples of the 64 numbers that share a scale, which bitsandbytes wants on a CPU."""
    small = tiny.model(architecture)
    torch.manual_seed(0)
    model = type(small)(shrink(small.config)).float()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # as in `tiny.model`, so that logits differ visibly
            nn.init.normal_(parameter, std=0.15)
    return model


def model_folder(path: Path, architecture: str = "llama") -> Path:
    plain_model(architecture).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


def in_four_bits(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(str(folder), dtype=dtype, four_bits=True)


def by_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The base as transformers alone quantizes it, in training mode.

    That is its own reference: in evaluation mode bitsandbytes may rearrange weights for good (`keep_trainable`).
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config).train()


def quantized(model: nn.Module) -> dict[str, Any]:
    """The weights in 4 bits, by the names of their layers in the base."""
    return {
        name.removesuffix(".base_layer"): module.weight
        for name, module in causal_lm(model).named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


def content(weight: Any) -> list[Tensor]:
    """All of a weight in 4 bits, its constants and theirs."""
    state = weight.quant_state
    return [weight.data, state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code]


def gradients(model: Any) -> dict[str, Tensor]:
    """The loss on fixed tokens and the gradients that it leaves, by name."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}}


def off(found: Tensor, wanted: Tensor) -> float:
    """The error as a share of the norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# The weights.


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_linear_layers_are_in_nf4_quantized_twice(architecture: str, tmp_path: Path) -> None:
    """As transformers has them, bit by bit; and no further from the weights than NF4's grid is wide."""
    folder = model_folder(tmp_path / "model", architecture)
    model, plain = in_four_bits(folder), plain_model(architecture)
    found, wanted = quantized(model), quantized(by_transformers(folder))
    linear = {"llama": LINEAR, "gpt2": 8, "opt": 12}[architecture]
    assert found.keys() == wanted.keys() and len(found) == linear
    for name, weight in found.items():
        state = weight.quant_state
        assert type(weight) is bnb.nn.Params4bit and not weight.requires_grad
        assert (weight.dtype, weight.numel()) == (torch.uint8, state.shape.numel() // 2)
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
        assert all(torch.equal(a, b) for a, b in zip(content(weight), content(wanted[name]), strict=True))
        original = plain.get_submodule(name).weight.detach()
        original = original.T if architecture == "gpt2" else original
        blocks = original.reshape(-1, 64)
        apart = (four_bits.dequantized(weight, state).reshape(-1, 64) - blocks).abs()
        # Half of the widest gap between two of the 16 values, -1 and -0.696, is 0.152; the scale is rounded to 8 bits.
        assert (apart <= 0.16 * blocks.abs().max(dim=1, keepdim=True).values).all() and apart.any()
    for name, p in model.named_parameters():
        if name.removesuffix(".weight") not in found:
            assert p.dtype == torch.float32 and torch.equal(p, plain.get_parameter(name)), name


def test_a_tiny_model_is_quantized_too(llama_folder: Path) -> None:
    """model.tiny tries a configuration: in 4 bits as well."""
    model = load_model(str(llama_folder), tiny=True, four_bits=True)
    assert len(quantized(model)) == LINEAR and model.is_quantized


def test_numbers_are_counted_and_not_bytes(llama_folder: Path) -> None:
    found = parameter_counts(QLora(r=4).begin(in_four_bits(llama_folder)))
    assert found == parameter_counts(Lora(r=4).begin(plain_model()))


# The arithmetic.


def both(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The same adapted model twice, ours and PEFT's; ours has answered before, and must train as if it had not."""
    ours = randomize(QLora(r=4, alpha=8).begin(in_four_bits(folder, dtype)))
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = randomize(get_peft_model(by_transformers(folder, dtype), config)).train()
    assert sum(type(m) is lora.FusedLoraLinear4bit for m in ours.modules()) == len(quantized(ours))
    return ours, theirs


@torch.no_grad()
def answers(model: Any) -> tuple[Tensor, Tensor]:
    """Logits with the adapter and without."""
    with_adapter = model(input_ids=IDS).logits
    with model.disable_adapter():
        return with_adapter, model(input_ids=IDS).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_losses_and_gradients_are_those_of_peft(architecture: str, tmp_path: Path) -> None:
    ours, theirs = both(model_folder(tmp_path / "model", architecture))
    before = {name: [part.clone() for part in content(weight)] for name, weight in quantized(ours).items()}
    answered = answers(ours.eval())
    wanted, found = gradients(theirs), gradients(ours.train())
    # Float32 keeps 6e-8 of each number; the two ways round in another order in each of a dozen layers.
    assert all(off(one, other) < 2e-6 for one, other in zip(answered, answers(theirs), strict=True))
    assert found.keys() == wanted.keys() and len(found) == 1 + 2 * len(before)
    for name, value in wanted.items():
        assert value.any() and off(found[name], value) < 5e-6, name
    for name, weight in quantized(ours).items():
        assert all(torch.equal(a, b) for a, b in zip(content(weight), before[name], strict=True))


def test_mixed_precision_is_that_of_lora(llama_folder: Path) -> None:
    """To the bit what peft=lora computes in bf16 on the weights that 4 bits stand for."""
    ours, _ = both(llama_folder, torch.bfloat16)
    numbers = as_numbers(ours)
    for parameter in numbers.parameters():  # and no buffers: those of positions stay in float32
        parameter.data = parameter.data.bfloat16()
    plain = randomize(Lora(r=4, alpha=8).begin(numbers))

    def found(model: Any) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = answers(model.eval())[0]
            return gradients(model.train()) | {"logits": logits}

    one, other = found(ours), found(plain)
    assert one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())


def as_numbers(model: Any) -> Any:
    """A Llama in float32 with the weights that those in 4 bits of `model` stand for."""
    plain, there = plain_model(), quantized(model)
    for name, parameter in causal_lm(model).named_parameters():
        if "lora_" not in name:
            layer = name.removesuffix(".weight").removesuffix(".base_layer")
            weight = there.get(layer)
            value = parameter if weight is None else four_bits.dequantized(weight, weight.quant_state)
            plain.get_submodule(layer).weight.data = value.detach().float().clone()
    return plain


def test_what_is_not_plain_goes_peft_s_way(llama_folder: Path) -> None:
    """Dropout in training; a LoRA that leaves most of the layers out."""
    dropped = randomize(QLora(r=4, dropout=0.5).begin(in_four_bits(llama_folder)))
    torch.manual_seed(0)
    first = gradients(dropped.train())
    torch.manual_seed(1)
    assert off(gradients(dropped)["loss"], first["loss"]) > 1e-4
    few = randomize(QLora(r=4, target_modules=["q_proj"]).begin(in_four_bits(llama_folder)))
    theirs = get_peft_model(by_transformers(llama_folder), LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"]))
    with torch.no_grad():
        few.eval()(input_ids=IDS)
    wanted, found = gradients(randomize(theirs).train()), gradients(few.train())
    assert all(off(found[name], value) < 5e-6 for name, value in wanted.items())


def test_packed_and_padded_rows_agree(llama_folder: Path) -> None:
    examples = [
        Example((5, 6, 7), (Completion((8, 9), (True, True)), Completion((10, 11, 12), (False, True, True)))),
        Example((20, 21), (Completion((22, 23, 24, 25), (True,) * 4),), 1),
    ]

    def logprobs(packed: bool) -> Tensor:
        model = randomize(QLora(r=4).begin(in_four_bits(llama_folder))).eval()
        if packed:
            assert use_packed_attention(model) is None
        with torch.no_grad():
            return score(model, pack(examples) if packed else pad(examples, 3)).logprobs

    torch.testing.assert_close(logprobs(True), logprobs(False), rtol=0, atol=2e-5)


def test_gradient_checkpointing_changes_nothing(llama_folder: Path) -> None:
    def found(checkpointing: bool) -> dict[str, Tensor]:
        model = in_four_bits(llama_folder)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return gradients(randomize(QLora(r=4).begin(model)).train())

    plain, checkpointed = found(False), found(True)
    assert all(torch.equal(checkpointed[name], value) for name, value in plain.items())


def test_training_moves_the_adapter_alone(llama_folder: Path) -> None:
    """With held-out rows measured in between, the loss falls as that of the same LoRA on the weights as numbers."""

    def trained(model: Any) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        losses = []
        for _ in range(8):
            with torch.no_grad():
                model.eval()(input_ids=IDS)
            optimizer.zero_grad()
            loss = model.train()(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    torch.manual_seed(0)
    model = QLora(r=4).begin(in_four_bits(llama_folder))
    frozen = {name: [part.clone() for part in content(weight)] for name, weight in quantized(model).items()}
    others = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    numbers = as_numbers(model)
    torch.manual_seed(0)
    wanted = trained(Lora(r=4).begin(numbers))
    losses = trained(model)
    assert losses[-1] < losses[0] - 1
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if not p.requires_grad)
    for name, weight in quantized(model).items():
        assert all(torch.equal(a, b) for a, b in zip(content(weight), frozen[name], strict=True))


# Memory.


def wide(four: bool) -> Any:
    """A model whose weights are large enough that 1 kB of tables for each of them does not matter."""
    config = llama(256, 2, 4, 2, 704).config
    torch.manual_seed(0)
    quantization = four_bits.nf4(torch.float32) if four else None
    model = _from_config(config, dtype=torch.float32, attention=None, quantization=quantization)
    model = (QLora if four else Lora)(r=4).begin(model)
    assert use_packed_attention(model) is None
    return model.train()


def test_memory_is_smaller_and_foreseen() -> None:
    """The preview's estimate against the bytes that are there, and the rehearsed step against a real one."""
    batch: Batch = batch_of(2, 60)
    model, setting = wide(True), Setting()
    real = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    real += sum(t.numel() * t.element_size() for w in quantized(model).values() for t in constants(w))
    with torch.device("meta"):
        fake = Lora(r=4).begin(llama(256, 2, 4, 2, 704))
    assert use_packed_attention(fake) is None
    foreseen, plain = (rehearse(fake, batch, setting, four_bits=four) for four in (True, False))
    assert foreseen.frozen == pytest.approx(real, rel=1e-3)
    # 7 weights per layer: all but the embeddings and what makes logits are 32 / 4.127 times as small.
    linear = sum(four_bits.numel(weight) for weight in quantized(model).values())
    assert plain.frozen - foreseen.frozen == pytest.approx(linear * (4 - 4.127 / 8), rel=1e-6)
    held = really_held(model, batch, setting, None)
    assert foreseen.moments.keys() == held.keys()
    # One weight at a time is there as numbers, which need not be at the fullest moment of a stage.
    largest = max(4 * four_bits.numel(weight) for weight in quantized(model).values())
    for stage, parts in held.items():
        found, wanted = sum(foreseen.moments[stage].values()), sum(parts.values())
        assert 0.98 * wanted < found < 1.02 * wanted + largest, stage


def constants(weight: Any) -> list[Tensor]:
    """What grows with a weight in 4 bits beside its bytes: the scale of each block, and that of 256 scales."""
    return [weight.quant_state.absmax, weight.quant_state.state2.absmax]


# From training to what others read.


def test_peft_reads_what_is_published(llama_folder: Path, tmp_path: Path) -> None:
    """On the base in 4 bits it gives what was trained; on the base's own weights it is the same LoRA."""
    kind = QLora(r=4)
    model = randomize(kind.begin(in_four_bits(llama_folder)))
    done = kind.published(model)
    assert done.converted is None
    save_trained(done.model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and "quant" not in json.dumps(config).replace("use_qalora", "")
    with torch.no_grad():
        wanted = model.eval()(input_ids=IDS).logits
        there = PeftModel.from_pretrained(by_transformers(llama_folder), str(tmp_path))
        assert off(there.train()(input_ids=IDS).logits, wanted) < 2e-6
        served = PeftModel.from_pretrained(plain_model(), str(tmp_path)).eval()(input_ids=IDS).logits
    assert 1e-3 < off(served, wanted) < 0.5  # rounding to 4 bits, and no other adapter
    again = kind.go_on(in_four_bits(llama_folder), tmp_path, "x@v1")
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=IDS).logits, wanted)
    assert sum(type(m) is lora.FusedLoraLinear4bit for m in again.modules()) == LINEAR


@pytest.fixture
def run(cli: Run, own_cache: Path, llama_folder: Path, tmp_path: Path) -> Run:
    """`python -m lit_ft peft=qlora ARGS` on a few rows, in an empty folder."""
    words = ["wheel", "chain", "a bell", "two spokes", "brake pads", "oil", "light"]
    rows = [
        {
            "prompt": " ".join(words[: 1 + k % 5]),
            "completion": words[k % 7] + ".",
            "chosen": words[k % 7] + ".",
            "rejected": words[(k + 1) % 7],
        }
        for k in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        f"model.id={llama_folder}",
        f"data.path={tmp_path / 'rows.jsonl'}",
        "peft=qlora",
        "peft.r=4",
        "logger=none",
        "trainer.accelerator=cpu",
        "trainer.progress=false",
        "trainer.max_steps=2",
        "data.max_val_rows=1",
        "data.batch_size=2",
        "algorithm.learning_rate=1e-2",
    )
    return lambda *args: cli(*settings, *args)


def merged_with(difference: str) -> tuple[float, ...]:
    """The two numbers of the sentence about training in 4 bits."""
    words = " ".join(difference.split()).split("differ from those in training by ")[1]
    return float(words.split(" on average")[0]), float(words.split("without the adapter by ")[1].split(")")[0])


def test_trained_merged_and_preferred(run: Run, in_process: Callable[..., Run], llama_folder: Path) -> None:
    """SFT in 4 bits, its export, and DPO that goes on from it with either reference."""
    from transformers import AutoModelForCausalLM

    from lit_ft.export import main

    sft = run()
    assert sft.code == 0, sft.err
    card = adapter.find(Path("adapters"), "support").card
    assert card.peft == "qlora" and card.servable and "bitsandbytes" in card.versions and card.canary is not None

    done = in_process(main, "lit_ft/export.py")("adapter=support", "to=merged", "output=out")
    assert done.code == 0, done.err
    whole = AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain_model(), "adapters/support/v1").eval()
    with torch.no_grad():
        assert off(whole(input_ids=IDS).logits, expected(input_ids=IDS).logits) < 1e-5
        with_adapter, base = (
            (logprobs(model, card.canary.tokens) - torch.tensor(then)).abs().mean().item()
            for model, then in ((whole, card.canary.logprobs), (plain_model().eval(), card.canary.base_logprobs))
        )
    assert merged_with(done.err) == pytest.approx((with_adapter, base), rel=0.05)  # said with two digits

    dpo = ("+experiment=dpo", "trainer.validate_first=true", "trainer.max_steps=1")
    for reference in ("initial", "base"):
        begun = run(*dpo, "start_from=none", f"algorithm.reference={reference}", "name=new")
        assert begun.code == 0, begun.err
        assert adapter.find(Path("adapters"), "new").card.metrics["before/loss"] == pytest.approx(math.log(2), abs=1e-5)
    gone_on = run(*dpo, "algorithm.reference=initial")
    assert gone_on.code == 0 and "start      adapter support@v1 (sft)" in gone_on.err
    after = adapter.find(Path("adapters"), "support").card
    assert after.parent == "support@v1" and after.metrics["before/loss"] == pytest.approx(math.log(2), abs=1e-5)
    plain = run(*dpo, "peft=lora", "peft.r=4", "start_from=none", "name=plain")
    assert plain.code == 0 and "read from the cache" not in plain.err  # the base's own are others


def logprobs(model: Any, tokens: list[int]) -> Tensor:
    ids = torch.tensor(tokens)
    return model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def test_a_resume_is_exact(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("trainer.max_steps=3", "trainer.validate_first=true")
    assert run(*settings, "name=whole").code == 0
    step = SFTModule.training_step

    def stopping(self: Any, window: Any, index: int) -> None:
        if self.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
        step(self, window, index)

    with monkeypatch.context() as patch:
        patch.setattr(SFTModule, "training_step", stopping)
        assert run(*settings, "name=cut").code == 143
    (path,) = Path("runs/cut").glob("*/checkpoints/last.ckpt")
    kept = torch.load(path, weights_only=True)["state_dict"]
    assert kept and all("lora_" in name for name in kept)  # the base is quantized anew, and comes out the same
    resumed = run(*settings, "name=cut", "resume=last")
    assert resumed.code == 0, resumed.err
    first, second = (load_file(f"adapters/{one}/v1/adapter_model.safetensors") for one in ("whole", "cut"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_judge_and_a_policy_share_a_base_in_4_bits(run: Run) -> None:
    judge = run("+experiment=reward", "name=judge")
    assert judge.code == 0, judge.err
    small = ("algorithm.max_new_tokens=4", "data.max_rows=4", "start_from=none")
    policy = run("+experiment=ppo", "trainer.max_steps=1", "reward=judge", *small)
    assert policy.code == 0, policy.err  # which stops if the first minibatch's ratio is not 1
    assert adapter.find(Path("adapters"), "support").card.peft == "qlora"


def test_answers_of_the_base_in_4_bits_are_its_own(run: Run, own_cache: Path) -> None:
    """replay=self keeps them under another key than those of the base's own weights."""
    settings = ("replay=self", "replay.max_new_tokens=4", "replay.max_prompts=4", "trainer.max_steps=1")
    kept = []
    for peft in ("qlora", "lora"):
        outcome = run(*settings, f"peft={peft}", "peft.r=4", "name=other")
        assert outcome.code == 0, outcome.err
        kept.append(len(list((own_cache / "replay").iterdir())))
    assert kept[0] < kept[1]


# Refusals.


def test_a_bitsandbytes_that_does_not_run_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(config: Any) -> None:
        raise RuntimeError("None of the available devices are supported.\nSee the documentation.")

    monkeypatch.setattr(four_bits, "_try", fails)
    outcome = run()
    said = " ".join(outcome.err.split())
    assert outcome.code == 2 and "does not run here (None of the available devices are supported)" in said
    assert "pip install 'lit_ft[qlora]'" in said and "peft=lora model.gradient_checkpointing=true" in said


def test_weights_that_are_quantized_already_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantized already: .* peft=lora"):
        in_four_bits(folder)


def test_weights_that_are_not_read_back_are_refused(tmp_path: Path) -> None:
    """Rows of 32 numbers: on a CPU bitsandbytes 0.50 takes the scale of other numbers, and says nothing."""
    folder = tiny.folder(tmp_path / "narrow")
    weight = tiny.model().model.layers[0].mlp.up_proj.weight.detach()
    found = four_bits.dequantized(*bnb.functional.quantize_4bit(weight, quant_type="nf4"))
    right = bool(((found - weight).abs() <= 0.16 * weight.abs().max()).all())
    if right:  # mended since, or on a GPU
        assert len(quantized(in_four_bits(folder))) == LINEAR
    else:
        with pytest.raises(UserError, match=r"rows have 32 numbers.* Use peft=lora, or another model"):
            in_four_bits(folder)
