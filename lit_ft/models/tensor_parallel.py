"""Tensor parallelism: the linear layers of a transformer split over devices, with their LoRA adapters.

Shoeybi et al. 2019 (Megatron-LM, arXiv:1909.08053): what fans out (q, k, v, gate, up) is split by its outputs, what
comes together (o, down) by its inputs. An adapter B·A follows its layer: of a layer split by outputs B is split and A
whole, of one split by inputs A is split and B whole. Embeddings, norms and the output layer stay whole on every device
(FSDP shards them). Which layer is which comes from the model's own plan in transformers.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lit_ft.errors import UserError

_OUTPUTS, _INPUTS = "colwise", "rowwise"
# Whole on every device, where a gradient would be each device's part only.
_PARTIAL_GRADIENT = "replicated_with_grad_allreduce"
# What transformers does with embeddings that are the output layer, too. Here they are whole like all others.
_EMBEDDING = "embedding_rowwise"


def why_not_divisible(config: Any, parts: int) -> str | None:
    """None if a model of `config` can be split into `parts`, else the reason and what would do."""
    if parts == 1:
        return None
    plan = getattr(config, "base_model_tp_plan", None)
    kind = getattr(config, "model_type", type(config).__name__)
    if not plan:
        return f"transformers has no tensor-parallel plan for {kind} models: use strategy=fsdp"
    if unknown := sorted(set(plan.values()) - {_OUTPUTS, _INPUTS, _PARTIAL_GRADIENT, _EMBEDDING}):
        return f"{kind} models are split in ways that lit_ft does not know ({', '.join(unknown)}): use strategy=fsdp"
    sizes = {
        name: size
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        if (size := getattr(config, name, None)) is not None
    }
    odd = [f"{name}={size}" for name, size in sizes.items() if size % parts]
    if not odd:
        return None
    fitting = [n for n in range(2, min(sizes.values()) + 1) if all(size % n == 0 for size in sizes.values())]
    advice = f"sizes that do: {', '.join(map(str, fitting))}; or use strategy=fsdp" if fitting else "use strategy=fsdp"
    return f"strategy.tensor_parallel_size={parts} does not divide the model's {', '.join(odd)} ({advice})"


def parallelize(lm: Any, mesh: Any) -> None:
    """Split the linear layers of `lm` (in place) over the one-dimensional `mesh`.

    Raises:
        UserError: the model cannot be split so.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if reason := why_not_divisible(lm.config, mesh.size()):
        raise UserError(f"{reason}.")
    styles = [(_pattern(name), style) for name, style in lm.config.base_model_tp_plan.items()]
    for name, module in lm.base_model.named_modules():
        style = next((style for pattern, style in styles if pattern.fullmatch(name)), None)
        if style == _PARTIAL_GRADIENT and any(p.requires_grad for p in module.parameters()):
            raise UserError(
                f"{name} would have to be trained in parts on every device, which lit_ft does not do: use peft=lora "
                "with strategy=fsdp_tp, or strategy=fsdp."
            )
        if style not in (_OUTPUTS, _INPUTS):
            continue
        by_outputs = style == _OUTPUTS
        whole = module.base_layer if hasattr(module, "base_layer") else module
        parallelize_module(whole, mesh, ColwiseParallel() if by_outputs else RowwiseParallel())
        for part in (getattr(module, "lora_B", {}) if by_outputs else getattr(module, "lora_A", {})).values():
            if not isinstance(part, nn.Linear):
                raise UserError(f"The adapter of {name} is not plain LoRA and cannot be split: use strategy=fsdp.")
            parallelize_module(part, mesh, ColwiseParallel() if by_outputs else RowwiseParallel())


def _pattern(name: str) -> re.Pattern[str]:
    """transformers writes `layers.*.self_attn.q_proj`, where * is one number."""
    return re.compile(re.escape(name).replace(r"\*", r"\d+"))
