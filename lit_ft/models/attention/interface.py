"""Packed attention as transformers' attention interface knows it: the name, the function, which models can use it.

Registered under the name `lit_ft_packed`; any model that goes through that interface works unchanged. What the pieces
of the row are travels as a keyword argument of the model's forward, `plan`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_ft.models.attention import flash_cpu, varlen_cuda
from lit_ft.models.attention.by_piece import attend_by_piece, causal_mask, repeat_heads
from lit_ft.models.attention.plan import Plan

PACKED = "lit_ft_packed"

# What models may ask of their attention by keyword and the ways here do not do.
NOT_DONE = ("softcap", "s_aux", "sliding_window", "position_bias", "indices", "block_indices", "block_mask")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: Plan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention in which each token sees its own piece up to itself, and all that the piece goes on from.

    Args:
        query: `(1, heads, T, D)`; key, value: `(1, kv_heads, T, D)`.
        plan: the row's pieces; without them this is plain causal SDPA under `attention_mask` (generation).

    Returns:
        `(1, T, heads, D)` as transformers expects, and None for the weights.

    Raises:
        ValueError: the model asks for something of its attention that is not done here.
    """
    dropout = dropout if module.training else 0.0
    if plan is None:
        key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
        if attention_mask is None:  # the last query sees every key, cached ones included
            attention_mask = causal_mask(query.shape[2], key.shape[2], query.device)
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    asked = sorted(name for name in NOT_DONE if others.get(name) is not None)
    if asked or attention_mask is not None:
        raise ValueError(f"packed attention knows no {', '.join(asked) or 'mask of the model'}")
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave float32 queries beside bf16 values; autocast itself casts for SDPA only.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    # The fast kernels want one width for all three (DeepSeek's values have another).
    plain = not dropout and query.shape[-1] == key.shape[-1] == value.shape[-1]
    if plain and flash_cpu.usable(query):
        return flash_cpu.attend_flash_cpu(query, key, value, plan, scale=scaling), None
    if plain and varlen_cuda.usable(query):
        return varlen_cuda.attend_varlen(query, key, value, plan, scale=scaling), None
    return attend_by_piece(query, key, value, plan, scale=scaling, dropout=dropout), None


def backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """In words, what computes packed attention there, without dropout."""
    example = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    if flash_cpu.usable(example):
        return "flash kernel, piece by piece"
    if varlen_cuda.usable(example):
        return "variable-length flash kernel"
    return "SDPA, piece by piece"


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """None for a packed row, whose pieces say it all (transformers would read its positions as one sequence).

    A packed row comes without a padding mask; whoever gives one (generation does) gets SDPA's mask.
    """
    from transformers.masking_utils import sdpa_mask

    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def register_packed_attention() -> None:
    """Make `lit_ft_packed` known to transformers; calling it twice does no harm."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(PACKED, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, _mask)


def why_not_packable(model: nn.Module) -> str | None:
    """None if `model` can score packed rows, else the reason in a few words."""
    import inspect

    config = model.config
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"it has layers of kind {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it attends in a sliding window"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it takes no position_ids"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "absolute") == "alibi":
        return "its positions are attention biases (ALiBi)"
    return None
