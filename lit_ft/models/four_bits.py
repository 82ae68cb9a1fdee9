"""A base in 4 bits: QLoRA's format, whether it can be had here, and its weights as numbers again."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from lit_ft.errors import UserError

INSTALL = "pip install 'lit_ft[qlora]'"
_WITHOUT = "Without it, peft=lora model.gradient_checkpointing=true takes the least memory."


def nf4(dtype: torch.dtype) -> Any:
    """transformers' configuration of QLoRA's format: NF4, its constants quantized too, computed in `dtype`.

    Dettmers et al. 2023, arXiv:2305.14314, section 3.

    Raises:
        UserError: bitsandbytes is missing, or cannot be used here.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"peft=qlora keeps the base in 4 bits with bitsandbytes, which is not installed: {INSTALL}. {_WITHOUT}"
        )
    from transformers import BitsAndBytesConfig

    try:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        _try(config)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            "peft=qlora keeps the base in 4 bits with bitsandbytes, which is installed and does not run here "
            f"({first.rstrip('.')}). {INSTALL} brings a version that was tried. {_WITHOUT}"
        ) from error
    return config


def _try(config: Any) -> None:
    """Raise whatever transformers or bitsandbytes say against this machine: too old, no such device, no library."""
    from transformers.quantizers import AutoHfQuantizer

    AutoHfQuantizer.from_config(config, pre_quantized=False).validate_environment()
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    # Where transformers quantizes.
    weight = torch.ones(64, 64, device="cuda" if torch.cuda.is_available() else "cpu")
    dequantize_4bit(*quantize_4bit(weight, compress_statistics=True, quant_type="nf4"))


def keep_trainable(model: nn.Module) -> None:
    """Have bitsandbytes compute with the 4 bits as they are, in evaluation as in training.

    On a CPU with bf16 instructions its layers rearrange their weights for good when they first answer in evaluation
    mode: for a product in bf16, whatever `dtype` says, which has no gradient for what lies below it and wants widths
    that are multiples of 32 and 64. Held-out rows before the first step would so spoil the training without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_widths(model: Any, model_id: str) -> None:
    """Raise UserError where bitsandbytes would not give the weights back: tried on a few rows of each width.

    Its 0.50 takes another number's scale on a CPU unless a row is a multiple of the 64 numbers that share one.

    Args:
        model: the causal language model, quantized or as it will be.
        model_id: for the message.
    """
    from bitsandbytes.functional import quantize_4bit
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for width in sorted({m.in_features if isinstance(m, nn.Linear) else m.nx for m in linear}):
        rows = torch.linspace(-1, 1, 64 * width, device=device).roll(width).view(64, width)
        found = dequantized(*quantize_4bit(rows, compress_statistics=True, quant_type="nf4"))
        # Half of the widest gap between NF4's values is 0.152 of the largest number; its scale is rounded, too.
        if not ((found - rows).abs() <= 0.2 * rows.abs().max()).all():
            raise UserError(
                f"peft=qlora cannot be used with {model_id} here: bitsandbytes does not read back what it made of "
                f"weights whose rows have {width} numbers, which is no multiple of 64. Use peft=lora, or another model."
            )


def numel(weight: Tensor) -> int:
    """How many numbers a weight stands for; in 4 bits two of them share a byte."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else state.shape.numel()


def dequantized(weight: Tensor, state: Any) -> Tensor:
    """The numbers that 4 bits stand for, in the format that they were quantized from: `(out, in)`."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, state)
