"""Packed attention by PyTorch's own SDPA, piece by piece: for every device, number format and dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_ft.models.attention.plan import Plan


def attend_by_piece(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, *, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """`(1, T, heads, D)`; query `(1, heads, T, D)`, key and value `(1, kv_heads, T, D)`.

    A piece attends to what it goes on from and to itself under a dense mask.
    """
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    # Split once and not sliced piece by piece: the gradient of a slice is a full row of zeros, that of a split is one
    # concatenation.
    lengths = [piece.end - piece.start for piece in plan.pieces]
    queries, keys, values = (tensor.split(lengths, 2) for tensor in (query, key, value))
    number = {piece.start: k for k, piece in enumerate(plan.pieces)}
    out: list[Tensor] = []
    for k, (q, ranges) in enumerate(zip(queries, plan.ancestors, strict=True)):
        above: list[int] = []
        for start, end in ranges:
            while start < end:
                above.append(number[start])
                start = plan.pieces[number[start]].end
        if not above:
            out.append(F.scaled_dot_product_attention(q, keys[k], values[k], None, dropout, True, scale=scale))
            continue
        seen_keys = torch.cat([keys[j] for j in (*above, k)], 2)
        seen_values = torch.cat([values[j] for j in (*above, k)], 2)
        mask = causal_mask(q.shape[2], seen_keys.shape[2], q.device)
        out.append(F.scaled_dot_product_attention(q, seen_keys, seen_values, mask, dropout, scale=scale))
    return torch.cat(out, 2).transpose(1, 2).contiguous()


def repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """`(1, kv_heads, T, D)` → `(1, heads, T, D)`, each head as often as query heads share it."""
    groups = heads // tensor.shape[1]
    return tensor.repeat_interleave(groups, 1) if groups > 1 else tensor


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """`(queries, keys)` True where a token may look: every key before the queries, then causally."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
