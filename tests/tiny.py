"""Tiny models and a tokenizer made on the spot, so that tests need no network and no large file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]


def tokenizer(chat: bool = True) -> Any:
    """A byte-level BPE tokenizer of 259 entries and ChatML's special tokens; every text is representable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: k for k, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>", unk_token="<|endoftext|>"
    )
    if chat:
        made.chat_template = CHATML
    return made


def model(kind: str = "llama", seed: int = 0, vocab_size: int = 260) -> Any:
    """A two-layer model of width 32 in float32 with random weights: `llama`, `qwen2`, `opt` or `gpt2`."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.manual_seed(seed)
    ids = {"pad_token_id": 3, "eos_token_id": 2, "bos_token_id": 1, "vocab_size": vocab_size}
    rotary = {
        **ids,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    if kind == "llama":
        made: Any = LlamaForCausalLM(LlamaConfig(**rotary))
    elif kind == "qwen2":
        made = Qwen2ForCausalLM(Qwen2Config(**rotary))
    elif kind == "opt":
        made = OPTForCausalLM(
            OPTConfig(
                **ids,
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=2048,
                word_embed_proj_dim=32,
                dropout=0.0,
                attention_dropout=0.0,
            )
        )
    elif kind == "gpt2":
        made = GPT2LMHeadModel(
            GPT2Config(
                **ids, n_embd=32, n_layer=2, n_head=4, n_positions=2048, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
            )
        )
    else:
        raise ValueError(kind)
    # Wider than the usual initialisation, so that logits differ visibly between tokens.
    for parameter in made.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return made.float()


def folder(path: Path, kind: str = "llama", chat: bool = True) -> Path:
    """A model folder as the Hub has it: weights, config and tokenizer."""
    model(kind).save_pretrained(path)
    tokenizer(chat).save_pretrained(path)
    return path
