"""Making a model trainable: new LoRA adapters, those of a published adapter, or all of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_ft.errors import UserError
from lit_ft.models.lora import use_fused_lora

# vLLM's maximum ranks; publishing records a rank above the last as not servable.
MAX_SERVABLE_RANK = 512


def apply_lora(
    model: Any,
    *,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    use_rslora: bool = False,
) -> Any:
    """Wrap `model` with a new LoRA adapter (Hu et al. 2021, arXiv:2106.09685), in float32, everything else frozen.

    Raises:
        UserError: no module's name matches `target_modules`.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        use_rslora=use_rslora,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"peft.target_modules={target_modules} matches nothing in {type(model).__name__} "
            f"({str(error).splitlines()[0]}). Its linear modules are {', '.join(linear)}."
        ) from error
    use_fused_lora(adapted)
    return _float32(adapted)


def continue_adapter(model: Any, folder: Path, *, dropout: float | None = None) -> Any:
    """Wrap `model` with a published adapter and go on training it.

    Raises:
        UserError: its weights do not belong to this model.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    if dropout is not None and hasattr(config, "lora_dropout"):
        config.lora_dropout = dropout
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"The adapter in {folder} does not fit the model ({str(error).splitlines()[0]}). "
            "Choose the model it was trained on, or start_from=none."
        ) from error
    use_fused_lora(adapted)
    return _float32(adapted)


def train_all(model: Any) -> Any:
    """Full fine-tuning: every weight trained, in float32."""
    model = model.float()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def _float32(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


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
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
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
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
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
        return f"vLLM serves LoRA only, this is {config.peft_type}"
    if getattr(config, "use_dora", False):
        return "vLLM does not serve DoRA"
    if config.modules_to_save:
        return "vLLM does not serve adapters with whole modules (modules_to_save)"
    if config.bias != "none":
        return "vLLM does not serve adapters with biases"
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if max(ranks) > MAX_SERVABLE_RANK:
        return f"its rank {max(ranks)} is above vLLM's maximum of {MAX_SERVABLE_RANK}"
    return None


def lora_rank(model: Any) -> int | None:
    """The rank of the model's LoRA adapter, or None if it has none."""
    config = next(iter(model.peft_config.values())) if is_adapted(model) else None
    return getattr(config, "r", None)
