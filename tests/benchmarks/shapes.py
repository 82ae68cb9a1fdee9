"""Llama models with random weights, named by their size, so that a benchmark needs no download."""

from __future__ import annotations

from typing import Any

import torch

# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "135m": (576, 1536, 30, 9, 3, 49_152, True),  # SmolLM2-135M
    "1b": (2048, 8192, 16, 32, 8, 128_256, True),  # Llama-3.2-1B
    "8b": (4096, 14_336, 32, 32, 8, 128_256, False),  # Llama-3.1-8B
    "tiny": (64, 128, 2, 4, 2, 512, True),  # to try the benchmark itself
}


def random_model(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of the named shape with the same weights every time it is asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32_768,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
