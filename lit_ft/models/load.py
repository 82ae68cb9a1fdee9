"""Loading a causal language model and its tokenizer, with errors that say what to do."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from lit_ft.errors import UserError
from lit_ft.models.four_bits import check_widths, keep_trainable, nf4
from lit_ft.models.resolve import resolve_model, unreachable


def load_tokenizer(model_id: str) -> Any:
    """The tokenizer of `bundled`, a folder or a Hub id; a padding token is added by name if it has none.

    Raises:
        UserError: it cannot be reached.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(model_id))
    except (OSError, ValueError) as error:
        raise unreachable(model_id, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked out everywhere, so any token serves
    return tokenizer


def load_model(
    model_id: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    tiny: bool = False,
    four_bits: bool = False,
) -> Any:
    """The model in `dtype`, without dropout changes, on the CPU.

    Args:
        model_id: `bundled`, a folder or a Hub id.
        dtype: of its weights.
        attention: transformers' `attn_implementation`; `flash_attention_2` falls back to SDPA where it is missing.
        tiny: keep the architecture and the vocabulary but make it two narrow layers with random weights, so that a
            configuration can be tried in seconds (`debug` runs and tests).
        four_bits: keep the linear layers' weights in 4 bits (NF4, its constants quantized too) and compute in `dtype`.

    Raises:
        UserError: it cannot be reached, or is no causal language model; or bitsandbytes is missing or does not run
            here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    where = resolve_model(model_id)
    attention = usable_attention(attention)
    quantization = None
    if four_bits:
        check_quantizable(load_config(model_id), model_id)
        quantization = nf4(dtype)
    logging.disable_progress_bar()
    try:
        if tiny:
            config = shrink(AutoConfig.from_pretrained(where))
            model = _from_config(config, dtype=dtype, attention=attention, quantization=quantization)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, attn_implementation=attention, quantization_config=quantization
            )
    except (OSError, ValueError) as error:
        raise unreachable(model_id, error) from error
    finally:
        logging.enable_progress_bar()
    keep_trainable(model)
    if four_bits:
        check_widths(model, model_id)
    return model


def _from_config(config: Any, *, dtype: torch.dtype, attention: str | None, quantization: Any) -> Any:
    """A model with random weights, quantized if asked."""
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if quantization is None:
        return made
    # Only loading quantizes.
    return type(made).from_pretrained(
        None,
        config=made.config,
        state_dict=made.state_dict(),
        dtype=dtype,
        attn_implementation=attention,
        quantization_config=quantization,
    )


def load_config(model_id: str, tiny: bool = False) -> Any:
    """The model's config alone, which costs no weights.

    Raises:
        UserError: it cannot be reached.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolve_model(model_id))
    except (OSError, ValueError) as error:
        raise unreachable(model_id, error) from error
    return shrink(config) if tiny else config


def shrink(config: Any) -> Any:
    """`config` with two layers of width 64: same architecture, same vocabulary."""
    heads = 4
    narrow = {
        "hidden_size": 64,
        "n_embd": 64,
        "word_embed_proj_dim": 64,
        "intermediate_size": 128,
        "ffn_dim": 128,
        "n_inner": 128,
        "num_hidden_layers": 2,
        "n_layer": 2,
        "num_attention_heads": heads,
        "n_head": heads,
        "num_key_value_heads": min(2, getattr(config, "num_key_value_heads", None) or 2),
        "head_dim": 16,
    }
    for key, value in narrow.items():
        if getattr(config, key, None) is not None:
            setattr(config, key, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return config


def usable_attention(attention: str | None) -> str | None:
    """`attention`, but SDPA for `flash_attention_2` where that is missing."""
    return "sdpa" if attention == "flash_attention_2" and not _has_flash_attention() else attention


def _has_flash_attention() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


def context_length(model: Any) -> int | None:
    """How many tokens the model's positions reach, or None if it does not say."""
    return getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)


def check_not_quantized(model: Any) -> None:
    """Raise UserError for a base that cannot be trained in full."""
    if getattr(model, "is_quantized", False):
        raise UserError("peft=full cannot train quantized weights; use peft=lora or an unquantized model.")


def check_quantizable(config: Any, model_id: str) -> None:
    """Raise UserError for a base whose weights are stored in fewer bits already."""
    if getattr(config, "quantization_config", None):
        raise UserError(f"The weights of {model_id} are quantized already: train on them as they are, with peft=lora.")
