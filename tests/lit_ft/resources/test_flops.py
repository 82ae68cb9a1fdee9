"""The arithmetic a step needs: counted by hand for a tiny model, and against torch's own counter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_ft.batches import Batch, Completion, Example, pack, pad
from lit_ft.models.adapt import causal_lm
from lit_ft.models.kinds.full import train_all
from lit_ft.models.kinds.lora import apply_lora
from lit_ft.resources.flops import attention_flops, computed_tokens, forward_flops, step_flops, visible_pairs
from tests import tiny

# The tiny Llama: width 32, MLP 64, 2 layers, 4 heads of 8 (2 for keys and values), 260 tokens.
LAYERS, HEADS, HEAD_DIM = 2, 4, 8
# q and o 32 x 32, k and v 32 x 16, gate, up and down 32 x 64: weights of all layers together.
BODY = LAYERS * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
# LoRA of rank 4 adds r·(in + out) to each.
LORA = LAYERS * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
HEAD = 32 * 260


def completion(length: int, trained: int) -> Completion:
    """`length` tokens, the last `trained` of which are targets."""
    return Completion((7,) * length, (False,) * (length - trained) + (True,) * trained)


# A prompt of 5 with completions of 3 and 4 (2 + 4 targets), and one of 2 with one of 6 (1 target).
EXAMPLES = [
    Example((5,) * 5, (completion(3, 2), completion(4, 4))),
    Example((5,) * 2, (completion(6, 1),)),
]
TARGETS = 2 + 4 + 1
# Packed, the prompt of 5 is there once; padded, with each of its completions.
TOKENS = {"packed": 5 + 3 + 4 + 2 + 6, "padded": 8 + 9 + 8}
# Packed: the prompt causally (15), each completion's token sees the prompt and itself causally (3·5 + 6, 4·5 + 10),
# and a causal row of 8 (36). Padded: causal rows of 8, 9 and 8.
PAIRS = {"packed": 15 + 21 + 30 + 36, "padded": 36 + 45 + 36}


def batch(layout: str) -> Batch:
    return pack(EXAMPLES) if layout == "packed" else pad(EXAMPLES, pad_id=3, extra=4)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_tokens_and_pairs(layout: str) -> None:
    assert computed_tokens(batch(layout)) == TOKENS[layout]
    assert visible_pairs(batch(layout)) == PAIRS[layout]
    assert len(batch(layout).target_ids) == TARGETS


def test_a_sliding_window_sees_less() -> None:
    """Rows of 8, 9 and 8 in a window of 3: 1 + 2 + 3 + 3 + …"""
    assert visible_pairs(batch("padded"), reach=3) == (3 + 6 * 3) + (3 + 7 * 3) + (3 + 6 * 3)
    assert visible_pairs(batch("padded"), reach=100) == PAIRS["padded"]
    model = tiny.model()
    whole = attention_flops(model, batch("padded"))
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.sliding_window = 3
    assert attention_flops(model, batch("padded")) == whole / 2 + 4 * HEAD_DIM * HEADS * 66


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_all_weights_trained(layout: str) -> None:
    """Three products per weight: forward, the input's gradient, the weight's."""
    tokens, attention = TOKENS[layout], 4 * HEAD_DIM * HEADS * LAYERS * PAIRS[layout]
    model = train_all(tiny.model())
    assert step_flops(model, batch(layout)) == 6 * BODY * tokens + 6 * HEAD * TARGETS + 3 * attention
    assert forward_flops(model, batch(layout)) == 2 * BODY * tokens + 2 * HEAD * TARGETS + attention


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_lora(layout: str) -> None:
    """Frozen weights need two products, those of LoRA three; a switched-off adapter none."""
    tokens, attention = TOKENS[layout], 4 * HEAD_DIM * HEADS * LAYERS * PAIRS[layout]
    model = apply_lora(tiny.model(), r=4)
    wanted = 4 * BODY * tokens + 6 * LORA * tokens + 4 * HEAD * TARGETS + 3 * attention
    assert step_flops(model, batch(layout)) == wanted
    base = 2 * BODY * tokens + 2 * HEAD * TARGETS + attention
    assert forward_flops(model, batch(layout)) == base + 2 * LORA * tokens
    with model.disable_adapter():
        assert forward_flops(model, batch(layout)) == base


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "gpt2"])
@pytest.mark.parametrize(
    ("build", "fused"),
    [
        (train_all, False),
        # With dropout PEFT's own layers compute.
        (lambda model: apply_lora(model, r=4, dropout=0.1), False),
        (lambda model: apply_lora(model, r=4, dropout=0.0), True),
    ],
    ids=["full", "lora", "fused lora"],
)
def test_as_torch_counts(kind: str, build: Any, fused: bool) -> None:
    """Layers and output layer agree with torch's FlopCounterMode to the last operation.

    Made comparable: rows without padding; every position a target, since the model's own forward scores them all; the
    embeddings' output requires a gradient, so that the first layer's inputs get theirs as well. Attention is left out
    on both sides (torch counts the masked half too): eager attention multiplies with bmm, layers with mm and addmm.
    """
    model = build(tiny.model(kind))
    lm = causal_lm(model)
    lm.set_attn_implementation("eager")
    lm.enable_input_require_grads()
    rows = pad([Example((5,) * 4, (completion(6, 6),))] * 3, pad_id=3)
    count = rows.input_ids.numel()
    everywhere = replace(rows, target_sources=torch.arange(count), target_ids=torch.zeros(count, dtype=torch.long))
    # The fused layers' in-place products, which torch's counter does not know.
    in_place: Any = {torch.ops.aten.addmm_: lambda out, left, right, **_: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(input_ids=rows.input_ids, use_cache=False).logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    layers = sum(n for op, n in counts.items() if str(op) in {"aten.mm", "aten.addmm", "aten.addmm_"})
    assert (torch.ops.aten.addmm_ in counts) == fused
    assert layers == step_flops(model, everywhere) - 3 * attention_flops(model, everywhere)
