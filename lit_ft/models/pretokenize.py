"""How the tokenizer of a GGUF file cuts text before merging, where transformers' reader passes over what the file says.

Files name it in `tokenizer.ggml.pre`; what a name means stands in llama.cpp's llama-vocab.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_name(path: Path) -> str | None:
    """llama.cpp's name for the way in which the tokenizer of the file `path` cuts text, or None if it has none."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


def cut_as_named(tokenizer: Any, name: str | None) -> None:
    """Make `tokenizer`, as transformers read it, cut text as llama.cpp does under `name`.

    Args:
        tokenizer: a byte-level BPE; changed in place.
        name: `tokenizer.ggml.pre`. Of other names than these transformers takes care itself.
    """
    from tokenizers import pre_tokenizers

    core = tokenizer.backend_tokenizer
    if name == "smollm":
        # As SmolLM2's own tokenizer.json has it. Each digit is a piece, and so is the white space before it, from which
        # GPT-2's expression would take the last for the digit: "\n\n1" is "\n\n", "1" and not "\n", "\n", "1".
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
    elif name == "llama-bpe":
        core.model.ignore_merges = True  # a word that is a token is taken as it is
