"""What is asked of an adapted model, whatever the kind: its parts, its size, its files, whether vLLM serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_ft.models.four_bits import numel

# The largest rank that vLLM 0.32 has room for (vllm/config/lora.py).
MAX_SERVABLE_RANK = 512
# What a LoRA may hold that vLLM 0.32 refuses (vllm/lora/peft_helper.py; single tokens where it reads the weights), and
# no export makes a LoRA of: PEFT's key, and what it is.
_REFUSED = {
    "lora_bias": "biases of its own",
    "trainable_token_indices": "embeddings of single tokens",
    "layer_replication": "layers used several times",
    "alora_invocation_tokens": "a text from which on alone it acts",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "factors made for a quantized base",
}
# PEFT's beginnings that leave the base as it is; after others the adapter belongs to a base that nobody else has.
_PLAIN_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


def is_adapted(model: Any) -> bool:
    """Whether `model` carries PEFT adapters."""
    return hasattr(model, "peft_config")


def causal_lm(model: Any) -> Any:
    """The causal language model below PEFT's wrapping, adapters in place."""
    return model.get_base_model() if is_adapted(model) else model


def without_dropout(model: nn.Module) -> None:
    """Set every dropout's rate to zero, for good.

    Many models (OPT, Llama, …) hold rates as plain numbers, which they give to functions: `module.dropout = 0.1`.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        rates = [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
        for name in rates:
            setattr(module, name, 0.0)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters, all parameters."""
    sizes = [(numel(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def trained_state(model: Any) -> dict[str, torch.Tensor] | None:
    """The whole trained weights of a sharded model, in main memory of the first process; None if nothing is sharded.

    All processes must call this together.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor import DTensor

    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=is_adapted(model))
    return get_model_state_dict(model, options=options)


def save_trained(model: Any, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write what PEFT, vLLM and the Hub expect of an adapter, or a whole model after full fine-tuning.

    Args:
        model: the trained model.
        folder: where to write.
        state: what `trained_state` gave, for a sharded model.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    if is_adapted(model):
        for config in model.peft_config.values():
            config.inference_mode = True
            # A folder on one machine says nothing on another; the card names the base by id and hash.
            if (base := config.base_model_name_or_path) and Path(base).is_absolute():
                config.base_model_name_or_path = Path(base).name
        # save_embedding_layers: "auto" may ask the Hub whether the vocabulary grew; ours never does.
        # Only the first adapter: others may stand beside it while it is trained.
        first = [next(iter(model.peft_config))]
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False, selected_adapters=first)
        (folder / "README.md").unlink(missing_ok=True)
    elif state is None:
        model.to(torch.bfloat16).save_pretrained(str(folder))
    else:
        # An unsharded twin without weights of its own takes them, so that tied ones are written once.
        with torch.device("meta"):
            twin = type(model)(model.config)
        halves = {name: value.to(torch.bfloat16) for name, value in state.items()}
        twin.load_state_dict(halves, assign=True, strict=False)
        twin.tie_weights()
        twin.to(torch.bfloat16).save_pretrained(str(folder))


def why_not_servable(model: Any) -> str | None:
    """None if vLLM serves this adapter beside others, else the reason and what to do."""
    if not is_adapted(model):
        return "it is a whole model, not an adapter: serve it as a base of its own (model=FOLDER)"
    config = next(iter(model.peft_config.values()))
    if config.peft_type != "LORA":
        return f"vLLM serves LoRA only, this is {config.peft_type.value}: merge it, python -m lit_ft.export to=merged"
    if getattr(config, "use_dora", False):
        return "vLLM does not serve DoRA: python -m lit_ft.export to=lora makes the nearest LoRA, to=merged a model"
    begun = config.init_lora_weights
    if isinstance(begun, str) and begun.lower() not in _PLAIN_BEGINNINGS:
        helps = "python -m lit_ft.export to=lora" if begun.lower() in ("pissa", "olora") else "train without"
        return f"it began with a part of its base, which lacks it (init_lora_weights={begun}): {helps}"
    if config.modules_to_save:
        return "vLLM does not serve whole modules (modules_to_save): merge it, python -m lit_ft.export to=merged"
    if config.bias != "none":
        return "vLLM does not serve trained biases: merge it, python -m lit_ft.export to=merged"
    for key, what in _REFUSED.items():
        if getattr(config, key, None):
            return f"vLLM does not serve adapters with {what} ({key}): train without"
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if max(ranks) > MAX_SERVABLE_RANK:
        return (
            f"its rank {max(ranks)} is above vLLM's maximum of {MAX_SERVABLE_RANK}: python -m lit_ft.export to=lora "
            f"rank={MAX_SERVABLE_RANK} makes the nearest of that rank, to=merged a model"
        )
    return None


@torch.no_grad()
def weaken(model: Any, scale: float) -> None:
    """Bring an adapted model to W₀ + scale·(W − W₀), W₀ being the base's weights (WiSE-FT, arXiv:2109.01903), exactly.

    Args:
        model: with a LoRA or an (IA)³, in place. A DoRA's rows are scaled by what was added to them: of those, the
            weights themselves must be interpolated (`lit_ft.exporting.merged`).
        scale: 1 leaves it as it is, 0 is the base.

    Raises:
        ValueError: another kind of adapter, or none.
    """
    config = next(iter(model.peft_config.values())) if is_adapted(model) else None
    kind = "none" if config is None else config.peft_type.value
    if kind not in ("LORA", "IA3") or getattr(config, "use_dora", False):
        raise ValueError(f"expected a LoRA or an (IA)³, got {kind}")
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or ".lora_embedding_B." in name:
            parameter.mul_(scale)
        elif ".ia3_l." in name:
            parameter.copy_(1 + scale * (parameter - 1))


def lora_rank(model: Any) -> int | None:
    """The rank of the model's LoRA adapter, of AdaLoRA the one it begins with; None if it has none."""
    config = next(iter(model.peft_config.values())) if is_adapted(model) else None
    return getattr(config, "init_r", None) or getattr(config, "r", None)
