"""The model of a run without its weights: shapes on the meta device, adapters in place, and what those will weigh."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from typing import Any

import torch

from lit_ft.adapter import Adapter
from lit_ft.config import Config
from lit_ft.models.adapt import is_adapted
from lit_ft.models.four_bits import check_widths, nf4
from lit_ft.models.kinds import AdapterKind
from lit_ft.models.load import check_quantizable, load_config, usable_attention
from lit_ft.models.precision import Precision
from lit_ft.models.resolve import unreachable
from lit_ft.wiring.model import adapted, weights_dtype


def weightless(cfg: Config, kind: AdapterKind, start: Adapter | None, precision: Precision) -> Any:
    """The model that would be trained, its adapters in place, on the meta device: shapes and no numbers.

    Raises:
        UserError: as `make_model` raises it for the real one.
    """
    from transformers import AutoModelForCausalLM

    dtype = weights_dtype(kind, precision)
    if kind.quantized:
        check_quantizable(load_config(cfg.model.id), cfg.model.id)
        nf4(dtype)
    config = load_config(cfg.model.id, cfg.model.tiny)
    attention = usable_attention(cfg.model.attention)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError) as error:
        raise unreachable(cfg.model.id, error) from error
    if kind.quantized:
        check_widths(model, cfg.model.id)
    if getattr(config, "quantization_config", None):
        model.is_quantized = True
    with torch.device("meta"), warnings.catch_warnings():
        # That nothing is copied into tensors without content.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
        return adapted(cfg, kind, start, model)


def target_modules(model: Any) -> Counter[str]:
    """How many modules carry an adapter, by the last parts of their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return Counter(name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))


def published_bytes(model: Any, cfg: Config) -> tuple[int, str]:
    """The size of the weights' file that publishing will write, and what it is."""
    if not is_adapted(model):
        return sum(2 * p.numel() for p in model.parameters()), "weights: a whole model in bf16"
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    header = {name: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [10**8] * 2} for name, t in state.items()}
    size = sum(4 * t.numel() for t in state.values()) + len(json.dumps(header, separators=(",", ":")))
    if cfg.peft.kind.value == "pissa":
        return 2 * size, "adapter: a LoRA of twice the rank"
    if cfg.peft.kind.value == "adalora":
        share = cfg.peft.target_r / cfg.peft.init_r  # type: ignore[attr-defined]
        return round(share * size), "adapter, about: a LoRA of the ranks that are left"
    return size, "adapter"
