"""The model of a run: its kind of adapter, its base, and how rows are laid out for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lit_ft.adapter import Adapter, Base
from lit_ft.config import Config, Packing
from lit_ft.data.packing import Layout
from lit_ft.errors import UserError
from lit_ft.models.kinds import KINDS, AdapterKind
from lit_ft.models.load import context_length, load_model
from lit_ft.models.precision import Precision
from lit_ft.models.resolve import model_fingerprint
from lit_ft.models.score import attention_backend, check_scoring, use_packed_attention
from lit_ft.wiring.settings import mapping, plain


def adapter_kind(cfg: Config) -> AdapterKind:
    """The adapter's kind with its settings."""
    own = {"kind", "learning_rate_factor", "loraplus_lr_ratio"}  # not the adapter's: the optimizer's
    settings = {key: value for key, value in mapping("peft", cfg.peft).items() if key not in own}
    return KINDS[cfg.peft.kind.value](**{key: plain(value) for key, value in settings.items()})


def base_of(cfg: Config, known: str | None = None) -> Base:
    """The base model's name and the hash of its weights, which is computed if it is not `known`."""
    model_id = cfg.model.id
    weights = known or ("sha256:tiny" if cfg.model.tiny else model_fingerprint(model_id))
    return Base(Path(model_id).name if Path(model_id).is_dir() else model_id, weights)


def make_model(cfg: Config, kind: AdapterKind, start: Adapter | None, precision: Precision) -> Any:
    """The base with its adapter: `start`'s, or a new one.

    Raises:
        UserError: it cannot be had, or `data.max_length` is beyond its context.
    """
    model = load_model(
        cfg.model.id,
        dtype=weights_dtype(kind, precision),
        attention=cfg.model.attention,
        tiny=cfg.model.tiny,
        four_bits=kind.quantized,
    )
    return adapted(cfg, kind, start, model)


def weights_dtype(kind: AdapterKind, precision: Precision) -> torch.dtype:
    """The format that the base's weights are loaded in: float32 where they are trained themselves."""
    return torch.float32 if kind.whole_model else precision.weights


def adapted(cfg: Config, kind: AdapterKind, start: Adapter | None, model: Any) -> Any:
    """`model` as it is trained, with the adapter of `start` or a new one; its numbers are not looked at.

    Raises:
        UserError: `data.max_length` is beyond its context, or the kind cannot begin with it.
    """
    reach = context_length(model)
    if reach is not None and cfg.data.max_length > reach:
        raise UserError(f"data.max_length={cfg.data.max_length} is beyond the model's context of {reach} tokens.")
    if cfg.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return kind.go_on(model, start.path, start.ref) if start is not None else kind.begin(model)


def choose_layout(cfg: Config, model: Any, device: torch.device) -> tuple[Layout, str]:
    """How rows are laid out, and why if they are padded.

    Raises:
        UserError: the model cannot be scored, or not packed as `data.packing=on` asks.
    """
    check_scoring(model)
    if cfg.data.packing is Packing.off:
        return "padded", "as asked"
    reason = use_packed_attention(model)
    if reason is None:
        return packed_on(device.type), ""
    if cfg.data.packing is Packing.on:
        raise UserError(f"data.packing=on: this model cannot be packed ({reason}). Use data.packing=auto.")
    return "padded", reason


def packed_on(device: str) -> Layout:
    """How rows are packed on `cpu` or `cuda`."""
    # The kernel for CUDA gathers a copy of shared keys for every example that goes on from them.
    return "apart" if device == "cuda" else "packed"


def layout_words(layout: Layout, why_padded: str) -> str:
    """How rows are laid out, for a person."""
    return f"padded ({why_padded})" if layout == "padded" else "packed"


def layout_line(layout: Layout, why_padded: str, model: Any, device: torch.device, precision: Precision) -> str:
    """The same, with what computes attention over packed rows."""
    words = layout_words(layout, why_padded)
    return words if layout == "padded" else f"{words}, attention by {attention_backend(model, device, precision.mixed)}"
