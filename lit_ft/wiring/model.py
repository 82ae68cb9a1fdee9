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


def base_of(cfg: Config, hash: str | None = None) -> Base:
    """The base model's name and the hash of its weights, which is computed if it is not given."""
    model_id = cfg.model.id
    if hash is None:
        hash = "sha256:tiny" if cfg.model.tiny else model_fingerprint(model_id)
    return Base(Path(model_id).name if Path(model_id).is_dir() else model_id, hash)


def make_model(cfg: Config, kind: AdapterKind, start: Adapter | None, precision: Precision) -> Any:
    """The base with its adapter: `start`'s, or a new one.

    Raises:
        UserError: it cannot be had, or `data.max_length` is beyond its context.
    """
    model = load_model(
        cfg.model.id,
        dtype=torch.float32 if kind.whole_model else precision.weights,
        attention=cfg.model.attention,
        tiny=cfg.model.tiny,
        four_bits=kind.quantized,
    )
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
        # The kernel for CUDA gathers a copy of shared keys for every example that goes on from them.
        return ("apart" if device.type == "cuda" else "packed"), ""
    if cfg.data.packing is Packing.on:
        raise UserError(f"data.packing=on: this model cannot be packed ({reason}). Use data.packing=auto.")
    return "padded", reason


def layout_line(layout: Layout, why_padded: str, model: Any, device: torch.device, precision: Precision) -> str:
    """How rows are laid out, for a person."""
    if layout == "padded":
        return f"padded ({why_padded})"
    return "packed, attention by " + attention_backend(model, device, precision.mixed)
