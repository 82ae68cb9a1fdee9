"""The arithmetic that a training step needs, counted from the model and the batch, so that a rate can be stated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lit_ft.batches import Batch
from lit_ft.models.adapt import causal_lm


def step_flops(model: Any, batch: Batch) -> float:
    """Floating point operations of the matrix products that forward and backward of `batch` need.

    A multiply-add is two operations. Only what the result needs is counted, however it is computed: no padding, no
    activation or logit computed twice, no prompt copied, no score of a masked pair. With T tokens computed (a shared
    prompt once), N targets, and P query-key pairs that see each other:

    - a linear layer (in → out), LoRA's A and B among them: 2·in·out·T forward, the same for the gradient of its input,
      and the same again for that of its weight if the weight is trained;
    - the output layer, likewise with N for T: only positions that predict a target meet the vocabulary;
    - attention: 4·head_dim·heads·P per layer forward (scores and weighted values), twice that backward.

    The gradient of the input is counted for every layer, though below the first trained weight none is needed: with
    LoRA that overstates the first layer's projections by their input gradients, one layer in many. Embeddings,
    normalisation, activations and the optimizer are not matrix products. Mixtures of experts, whose tokens do not
    meet every weight, and layers that are neither full nor sliding-window attention are not counted rightly.

    Args:
        model: the causal language model, with PEFT's adapters or without.
        batch: packed or padded.
    """
    return _linear_flops(model, batch, backward=True) + 3 * attention_flops(model, batch)


def forward_flops(model: Any, batch: Batch) -> float:
    """Floating point operations of the matrix products that a pass without gradients needs (see `step_flops`)."""
    return _linear_flops(model, batch, backward=False) + attention_flops(model, batch)


def attention_flops(model: Any, batch: Batch) -> float:
    """The share of `forward_flops` that is attention: 4·head_dim·heads per visible pair and layer."""
    config = causal_lm(model).config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = sum(visible_pairs(batch, reach) for reach in _reaches(config))
    return 4.0 * head_dim * heads * pairs


def computed_tokens(batch: Batch) -> int:
    """Tokens that a forward pass has to compute: a shared prompt once, padding never."""
    if batch.pieces is not None:
        return batch.input_ids.shape[1]
    assert batch.attention_mask is not None
    return int(batch.attention_mask.sum())


def visible_pairs(batch: Batch, reach: int | None = None) -> int:
    """Query-key pairs that see each other: causal within a piece or row, and all that a piece goes on from.

    Args:
        batch: packed or padded.
        reach: how many keys a query sees at most, itself among them (sliding windows); None: all before it. Packed
            rows are always seen whole.
    """
    if batch.pieces is not None:
        return sum(
            _causal(piece.end - piece.start) + (piece.until - piece.end) * (piece.end - piece.start)
            for piece in batch.pieces
        )
    assert batch.attention_mask is not None
    return sum(_causal(length, reach) for length in batch.attention_mask.sum(1).tolist())


def _causal(length: int, reach: int | None = None) -> int:
    """Pairs of a causal sequence: 1 + 2 + … + length, where no query sees more than `reach` keys."""
    if reach is None or reach >= length:
        return length * (length + 1) // 2
    return reach * (reach + 1) // 2 + (length - reach) * reach


def _reaches(config: Any) -> Iterator[int | None]:
    """For each attention layer how many keys a query sees at most, or None for all."""
    window = getattr(config, "sliding_window", None)
    everywhere = "sliding_attention" if window else "full_attention"
    for kind in getattr(config, "layer_types", None) or [everywhere] * config.num_hidden_layers:
        if kind == "full_attention":
            yield None
        elif kind == "sliding_attention":
            yield window


def _linear_flops(model: Any, batch: Batch, *, backward: bool) -> float:
    lm = causal_lm(model)
    head = lm.get_output_embeddings()
    in_head = set(head.modules())
    body = [module for module in _used(lm.base_model) if module not in in_head]
    return computed_tokens(batch) * sum(_per_row(module, backward) for module in body) + len(batch.target_ids) * sum(
        _per_row(module, backward) for module in _used(head)
    )


def _per_row(module: nn.Module, backward: bool) -> float:
    """Operations per row of input: a product forward, one for the input's gradient, one for a trained weight's."""
    size = _sizes(module)
    if size is None:
        return 0.0
    trained = bool(module.weight.requires_grad)  # type: ignore[union-attr]
    return 2.0 * size[0] * size[1] * (2 + trained if backward else 1)


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a layer that multiplies by a matrix, else None; a quantized weight would not say."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):  # GPT-2's linear layer, its weight transposed
        return module.nx, module.nf
    return None


def _used(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and what lies in it, each once, but no adapter that is switched off."""
    off = set()
    for layer in module.modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "active_adapters"):
            active = [] if layer.disable_adapters else layer.active_adapters
            for name in set(layer.lora_A) - set(active):
                off |= {layer.lora_A[name], layer.lora_B[name]}
    yield from (layer for layer in module.modules() if layer not in off)
