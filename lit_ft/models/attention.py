"""Attention over packed rows: examples never see each other, completions see their prompt and themselves.

Registered with transformers' attention interface under the name `lit_ft_packed`; any model that goes through that
interface works unchanged. The segments of the row travel as a keyword argument of the model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_ft.batches import Segment

PACKED = "lit_ft_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Sequence[Segment] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each segment of one packed row.

    Args:
        query: `(1, heads, T, D)`; key, value: `(1, kv_heads, T, D)`.
        segments: where the examples lie; without them this is plain causal SDPA under `attention_mask` (generation).

    Returns:
        `(1, T, heads, D)` as transformers expects, and None for the weights.
    """
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    dropout = dropout if module.training else 0.0
    if segments is None:
        if attention_mask is None:  # the last query sees every key, cached ones included
            attention_mask = _completion_mask(query.shape[2], key.shape[2], query.device)
        plain = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
        return plain.transpose(1, 2).contiguous(), None

    # Split once and not sliced segment by segment: the gradient of a slice is a full row of zeros, that of a split is
    # one concatenation.
    lengths = [length for segment in segments for length in _pieces(segment)]
    pieces = list(zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=mask is None, scale=scaling)

    out: list[Tensor] = []
    for segment in segments:
        (q, prompt_k, prompt_v), *completions = pieces[: len(_pieces(segment))]
        del pieces[: len(_pieces(segment))]
        out.append(attend(q, prompt_k, prompt_v, None))
        for q, k, v in completions:
            mask = _completion_mask(q.shape[2], prompt_k.shape[2] + k.shape[2], q.device)
            out.append(attend(q, torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2), mask))
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def _pieces(segment: Segment) -> list[int]:
    """Lengths of what is attended apart: prompt and only completion as one causal sequence, else each by itself."""
    if len(segment.completion_ends) == 1:
        return [segment.completion_ends[0] - segment.start]
    starts = (segment.prompt_end, *segment.completion_ends[:-1])
    completions = [end - start for start, end in zip(starts, segment.completion_ends, strict=True)]
    return [segment.prompt_end - segment.start, *completions]


def _completion_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """`(queries, keys)` True where a completion's token may look: the whole prompt, then itself causally."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """None for a packed row, whose segments say it all (transformers would read its positions as one sequence).

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
