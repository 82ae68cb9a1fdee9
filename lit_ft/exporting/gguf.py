"""`to=gguf`: one file that llama.cpp reads, checked by reading it back through transformers.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The names of tensors come from the `gguf`
package's own map, what else llama.cpp expects of an architecture from its converter (convert_hf_to_gguf.py).
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_ft.errors import UserError
from lit_ft.exporting import merged
from lit_ft.exporting.cards import write_readme
from lit_ft.exporting.place import staged
from lit_ft.exporting.source import Source, find_base
from lit_ft.progress import Progress, say

if TYPE_CHECKING:
    import numpy as np
    import torch

# Of transformers' model types those that both the `gguf` package and transformers' reader know, tried here.
ARCHITECTURES = ("llama", "qwen2", "qwen3")

# How far a tensor may be from what was written, relative to its norm: rounding to 11 bits, or to 8 bits by blocks.
_ROUNDING = {"f16": 1e-3, "q8_0": 2e-2}
# How far log-probabilities may be on average, in nats. A wrong reading of the file is off by much more.
_APART = {"f16": 0.02, "q8_0": 0.2}

# What a configuration that was read back has in common with the one that was written.
_SAME = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)

# The regular expressions by which tokenizers of these families cut text, and llama.cpp's names for them.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


class Vocabulary(NamedTuple):
    """A byte-level BPE tokenizer as GGUF has it.

    Attributes:
        pre: llama.cpp's name of the way in which text is cut before merging.
        tokens: by id, as many as the model has embeddings.
        types: of each, `gguf.TokenType`.
        merges: the pairs that are merged, best first.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]


def check(config: Any, name: str) -> None:
    """Raise UserError if a model with this configuration cannot be written as GGUF and read again."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{name} is a {kind} model, and to=gguf writes {', '.join(ARCHITECTURES)} only: those are read back and "
            "checked. Merge it (to=merged) and convert that folder with llama.cpp's convert_hf_to_gguf.py."
        )
    rope = _rope(config)
    odd = []
    if rope.get("rope_type", "default") not in (("default", "llama3") if kind == "llama" else ("default",)):
        odd.append(f"positions scaled as {rope['rope_type']}")
    if getattr(config, "hidden_act", "silu") != "silu":
        odd.append(f"the activation {config.hidden_act}")
    if getattr(config, "mlp_bias", False) or (kind != "qwen2" and getattr(config, "attention_bias", False)):
        odd.append("biases in its layers")
    if getattr(config, "use_sliding_window", False):
        odd.append("a sliding window")
    if odd:
        raise UserError(
            f"{name} has {' and '.join(odd)}, which to=gguf does not write. Merge it (to=merged) and convert that "
            "folder with llama.cpp's convert_hf_to_gguf.py."
        )


def export(source: Source, output: Path, *, model: str | None, quantization: str, scale: float = 1.0) -> None:
    """Write the merged model as one GGUF file into the folder `output`.

    Args:
        source: an adapter or a whole model.
        output: a folder that is not there yet.
        model: the base, where the card does not say.
        quantization: `f16`, or `q8_0` (8 bits and a 16-bit scale for each 32 weights).
        scale: the strength of what was trained (`merged.interpolate`).

    Raises:
        UserError: the architecture or the tokenizer is none that can be checked, the file read back is another model;
            or what `merged.export` raises.
    """
    merged.check(source)
    with staged(output) as folder:
        base = None if source.whole and scale == 1 else find_base(source, model)
        from lit_ft.exporting.adapted import load_tokenizer
        from lit_ft.models.load import load_config

        config = load_config(base.place if base else str(source.path.resolve()))
        check(config, base.id if base else source.name)
        tokenizer = load_tokenizer(source, base)
        vocabulary = read_vocabulary(tokenizer, config.vocab_size)
        whole, before, _ = merged.merge(source, base, tokenizer, scale=scale)
        path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', source.name)}-{quantization}.gguf"
        write(path, whole, tokenizer, vocabulary, name=source.name, quantization=quantization)
        found = _check_read_back(path, whole, tokenizer, vocabulary, before, quantization)
        size = path.stat().st_size / 1e6
        strength = f" at {scale:g} of its strength" if scale != 1 else ""
        text = f"{source.name}{strength} as GGUF ({quantization}), read back through transformers: {found}."
        say(f"model      {text}")
        say(f"file       {path.name}, {size:,.0f} MB")
        template = "" if tokenizer.chat_template else "\n\nThe tokenizer has no chat template."
        write_readme(folder, source, None, f"{text}\n\nTo try it: `llama-cli -m {path.name}`.{template}")


def write(path: Path, model: Any, tokenizer: Any, vocabulary: Vocabulary, *, name: str, quantization: str) -> None:
    """Write the file.

    Args:
        path: of the file.
        model: in float32.
        tokenizer: the ids of its special tokens and its chat template are written.
        vocabulary: what `read_vocabulary` made of it.
        name: what the model is called.
        quantization: of its matrices; vectors stay in float32, as llama.cpp wants them.

    Raises:
        UserError: a weight is too large for float16.
    """
    import gguf
    import numpy as np

    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells of every file that its bytes are little-endian
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    try:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        eight = quantization == "q8_0"
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if eight else gguf.LlamaFileType.MOSTLY_F16)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(float(_rope(config)["rope_theta"]))
        writer.add_vocab_size(config.vocab_size)
        _add_tokenizer(writer, tokenizer, vocabulary)
        table = list(tensors(model, quantization))
        for tensor, shape, kind, _ in table:
            writer.add_tensor_info(tensor, shape, np.dtype(np.float32), _bytes(shape, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, _, kind, weight in Progress.over(table, f"writing {path.name}"):
            writer.write_tensor_data(_stored(weight, kind, tensor))
    finally:
        writer.close()


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", 10000.0)})


def tensors(model: Any, quantization: str) -> Iterator[tuple[str, tuple[int, ...], Any, torch.Tensor]]:
    """Of each tensor of the file: name, shape as stored, type, and the weight in float32 as llama.cpp has it."""
    import gguf

    config = model.config
    kinds = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[config.model_type], config.num_hidden_layers)
    plain, half = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
    small = gguf.GGMLQuantizationType.Q8_0 if quantization == "q8_0" else half
    if _rope(config).get("rope_type") == "llama3":
        factors = rope_factors(model)
        yield "rope_freqs.weight", tuple(factors.shape), plain, factors
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"{key} has no place in a GGUF file of a {config.model_type} model: this is a variant.")
        if config.model_type == "llama" and ".self_attn.q_proj." in key:
            weight = permuted(weight, config.num_attention_heads)
        elif config.model_type == "llama" and ".self_attn.k_proj." in key:
            weight = permuted(weight, config.num_key_value_heads)
        kind = plain if weight.ndim == 1 else small if weight.shape[-1] % 32 == 0 else half
        yield name, tuple(weight.shape), kind, weight


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key projection `(out, in)`, so that the two numbers that rotary positions turn together
    are neighbours, as llama.cpp has them, and not half a head apart (convert_hf_to_gguf.py, `LlamaModel.permute`)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def rope_factors(model: Any) -> torch.Tensor:
    """By how much Llama 3 slows each frequency of its positions down, `(head_dim/2,)`."""
    import torch

    scaled = model.get_decoder().rotary_emb.inv_freq.float().cpu()
    theta = float(_rope(model.config)["rope_theta"])
    plain = 1.0 / theta ** (torch.arange(len(scaled), dtype=torch.float32) / len(scaled))
    return plain / scaled


def _bytes(shape: tuple[int, ...], kind: Any) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = 1
    for length in shape:
        count *= length
    return count // block * size


def _stored(weight: torch.Tensor, kind: Any, name: str) -> np.ndarray:
    import gguf
    import numpy as np

    values = weight.detach().float().cpu().contiguous().numpy()
    if kind.name != "F32" and not np.abs(values).max() <= np.finfo(np.float16).max:
        raise UserError(
            f"{name} holds weights beyond what float16 can hold, in which GGUF stores them (or their scale)."
        )
    return gguf.quants.quantize(values, kind)


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """What GGUF holds of `tokenizer`, filled up to `size` tokens.

    Raises:
        UserError: it is no byte-level BPE, cuts text in a way that llama.cpp has no name for here, or has more tokens
            than `size`.
    """
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "unknown"}}
    model = parts["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or not _named(parts.get("pre_tokenizer"), "ByteLevel"):
        raise UserError(
            f"The tokenizer is no byte-level BPE (it is {model['type']}), and to=gguf writes only those (as SmolLM2, "
            "Llama 3 and Qwen have). Merge it (to=merged) and convert that folder with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not merges:
        raise UserError("The tokenizer has no merges, without which llama.cpp reads no byte-level BPE.")
    added = {token["id"]: token for token in parts["added_tokens"]}
    known = {index: token for token, index in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    if max(known) >= size:
        raise UserError(f"The tokenizer has ids up to {max(known)}, and the model {size} embeddings: they do not fit.")
    tokens, types = [], []
    for index in range(size):
        tokens.append(known.get(index, f"[PAD{index}]"))
        if index not in known:
            types.append(gguf.TokenType.UNUSED)
        elif index in added:
            types.append(gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    return Vocabulary(_pre(parts), tokens, [int(kind) for kind in types], merges)


def _pre(parts: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which the tokenizer cuts text (llama-vocab.cpp, `LLAMA_VOCAB_PRE_TYPE`)."""
    cut = parts["pre_tokenizer"]
    steps = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    kinds = [step["type"] for step in steps]
    last = steps[-1]
    if not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex"):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and last.get("use_regex") and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex") and steps[0].get("behavior") == "Isolated":
            by = steps[0]["pattern"].get("Regex")
            # llama.cpp takes a word that is a token as it is under this name.
            if by == _LLAMA3 and parts["model"].get("ignore_merges"):
                return "llama-bpe"
            if by == _QWEN2 and not parts["model"].get("ignore_merges"):
                return "qwen2"
    raise UserError(
        "The tokenizer cuts text in a way that to=gguf does not know (it knows GPT-2's, SmolLM's, Llama 3's and "
        "Qwen2's). Merge it (to=merged) and convert that folder with llama.cpp's convert_hf_to_gguf.py."
    )


def _named(part: Any, name: str) -> bool:
    """Whether a part of a tokenizer is, or holds, one called `name`."""
    if not isinstance(part, dict):
        return False
    return part.get("type") == name or any(_named(step, name) for step in part.get("pretokenizers", []))


def _add_tokenizer(writer: Any, tokenizer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    plain, full = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and full[0] == tokenizer.bos_token_id != plain[0])
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and full[-1] == tokenizer.eos_token_id != plain[-1])
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _check_read_back(
    path: Path, model: Any, tokenizer: Any, vocabulary: Vocabulary, before: Any, quantization: str
) -> str:
    """Read the file through transformers, compare, and return in words what was found; raises UserError."""
    from lit_ft.exporting.measure import difference, outputs

    say("check      reading the file back through transformers")
    again, words = read_back(path, model.config, tokenizer, vocabulary)
    if again is None:
        raise UserError(f"The file does not pass its check, and was not kept: {words}. This is a defect of lit_ft.")
    theirs = again.state_dict()
    for name, weight in model.state_dict().items():
        if name not in theirs or theirs[name].shape != weight.shape:
            words = f"{name} is missing or of another shape"
        else:
            apart = float((theirs[name] - weight).norm() / weight.norm().clamp_min(1e-12))
            words = "" if apart <= _ROUNDING[quantization] else f"{name} is off by {apart:.1%}"
        if words:
            raise UserError(f"The file does not pass its check, and was not kept: {words}. This is a defect of lit_ft.")
    found = difference(before, outputs(again, tokenizer))
    if not found.mean <= _APART[quantization]:
        raise UserError(f"The file does not pass its check, and was not kept: {found}.")
    return str(found)


def read_back(path: Path, config: Any, tokenizer: Any, vocabulary: Vocabulary) -> tuple[Any, str]:
    """The model in the file in float32, and ""; or None, and what differs in its metadata or its tokenizer.

    The reader passes over what it has no use for itself: Llama 3's slowed positions and Qwen3's length of a head, which
    are taken from `config`, and that SmolLM cuts numbers into digits, of which `cut_as_named` takes care.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lit_ft.exporting.adapted import quietly

    with quietly():
        theirs = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        for key in _SAME:
            if getattr(theirs, key) != getattr(config, key):
                return None, f"{key} is {getattr(theirs, key)} and not {getattr(config, key)}"
        for key, one, other in (
            ("rms_norm_eps", theirs.rms_norm_eps, config.rms_norm_eps),
            ("rope_theta", _rope(theirs)["rope_theta"], _rope(config)["rope_theta"]),
        ):
            if abs(one - other) > 1e-6 * abs(other):
                return None, f"{key} is {one} and not {other}"
        if _rope(config).get("rope_type") == "llama3":
            theirs.rope_parameters = config.rope_parameters
        if config.model_type == "qwen3":
            theirs.head_dim = config.head_dim
        reader = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        if words := _tokenizers_differ(tokenizer, reader, vocabulary):
            return None, words
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, config=theirs, dtype=torch.float32
        )
    return model, ""


def _tokenizers_differ(tokenizer: Any, reader: Any, vocabulary: Vocabulary) -> str:
    """In what two tokenizers differ on a fixed text, or ""."""
    from lit_ft.models.canary import TEXT
    from lit_ft.models.pretokenize import cut_as_named

    cut_as_named(reader, vocabulary.pre)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, key) != getattr(reader, key):
            return f"{key} is {getattr(reader, key)} and not {getattr(tokenizer, key)}"
    if (tokenizer.chat_template or None) != (reader.chat_template or None):
        return "the chat template is another one"
    # llama.cpp puts no accents together, so the text has none apart.
    text = unicodedata.normalize("NFC", TEXT)
    special = "".join(token for token in tokenizer.all_special_tokens)
    for part in (text, f"{special}  12345 {text}{special}"):
        ours, theirs = (one(part, add_special_tokens=False)["input_ids"] for one in (tokenizer, reader))
        if ours != theirs:
            place = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            return f"the tokenizer makes other tokens of a fixed text, from place {place} on"
        if tokenizer.decode(ours) != reader.decode(theirs):
            return "the tokenizer reads tokens back as another text"
    return ""
