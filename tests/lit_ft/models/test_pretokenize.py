"""How the tokenizer of a GGUF file cuts text: by the file's own name for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_ft.models.pretokenize import cut_as_named, read_name
from lit_ft.models.resolve import resolve_model


def byte_level(*merges: tuple[str, str]) -> Any:
    """A tokenizer as transformers reads one whose way of cutting it does not know: GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={token: k for k, token in enumerate(tokens)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize(
    ("text", "before", "pieces"),
    [
        ("12", ["12"], ["1", "2"]),
        ("a 12", ["a", "Ġ", "12"], ["a", "Ġ", "1", "2"]),
        ("\n\n12.", ["Ċ", "Ċ", "12", "."], ["ĊĊ", "1", "2", "."]),
    ],
)
def test_smollm_cuts_numbers_into_digits(text: str, before: list[str], pieces: list[str]) -> None:
    """And white space before them is left whole. Here both `12` and two line feeds are tokens."""
    tokenizer = byte_level(("1", "2"), ("Ċ", "Ċ"))
    assert tokenizer.tokenize(text) == before
    cut_as_named(tokenizer, "smollm")
    assert tokenizer.tokenize(text) == pieces


def test_llama_3_takes_a_word_that_is_a_token_as_it_is() -> None:
    """`the` is a token that no merge makes from `t` and `he`."""
    tokenizer = byte_level(("t", "h"), ("h", "e"), ("t", "he"))
    assert tokenizer.tokenize("the") == ["th", "e"]
    cut_as_named(tokenizer, "llama-bpe")
    assert tokenizer.tokenize("the") == ["the"]


@pytest.mark.parametrize("name", ["gpt-2", "qwen2", None])
def test_other_names_are_left_to_transformers(name: str | None) -> None:
    tokenizer = byte_level(("1", "2"))
    before = tokenizer.backend_tokenizer.to_str()
    cut_as_named(tokenizer, name)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_the_name_is_read_from_the_file(tmp_path: Path) -> None:
    import gguf

    for name in ("smollm", None):
        writer = gguf.GGUFWriter(path := tmp_path / f"{name}.gguf", "llama")
        if name:
            writer.add_tokenizer_pre(name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        assert read_name(path) == name


@pytest.mark.slow
def test_the_bundled_tokenizer_cuts_as_its_file_says() -> None:
    """Its file says `smollm`: digits, and the white space before them, are pieces of their own."""
    from lit_ft.models.load import load_tokenizer

    tokenizer = load_tokenizer("bundled")
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert tokenizer.tokenize("one:\n\n1. a  17") == ["one", ":", "ĊĊ", "1", ".", "Ġa", "ĠĠ", "1", "7"]
    texts = ("In 2024, 1.5 x10²\n\n  33", "東京 ½ ٣٤", "for k in range(10):\n    x[k] += 0x1F\n", "<|im_start|>1\n2")
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_the_bundled_tokenizer_is_the_same_when_a_run_reads_it_from_a_published_folder(tmp_path: Path) -> None:
    """Saved and read again it cuts as before: adapters carry their tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("bundled"))
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.tokenize("\n\n17") == tokenizer.tokenize("\n\n17") == ["ĊĊ", "1", "7"]
