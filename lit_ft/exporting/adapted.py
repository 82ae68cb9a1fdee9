"""A base in float32 with an adapter on it, whoever made the adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_ft.adapter import ADAPTER_WEIGHTS
from lit_ft.errors import UserError
from lit_ft.exporting.source import Base, Source, takes_from_base, tokenizer_files
from lit_ft.models.kinds.base import config_in
from lit_ft.models.load import load_config, load_model


@dataclass
class Adapted:
    """A base with one adapter, on the CPU in float32.

    Attributes:
        model: PEFT's.
        began: by module, the factors A `(r, in)` and B `(out, r)` that the adapter began with and that were taken from
            the base's weight, scaled; empty where the base is as everybody has it.
    """

    model: Any
    began: dict[str, tuple[Tensor, Tensor]]

    def give_back(self) -> None:
        """Add to the base's weights what was taken from them at the beginning."""
        for name, (a, b) in self.began.items():
            layer = self.model.get_base_model().get_submodule(name)
            taken = b @ a
            layer.get_base_layer().weight.data += taken.T if layer.fan_in_fan_out else taken


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers' progress bars, and PEFT's warnings of what is checked here anyway, from a person."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.enable_progress_bar()


def load_base(base: Base) -> Any:
    """The base in float32.

    Raises:
        UserError: its weights are damaged, or quantized.
    """
    if getattr(load_config(base.place), "quantization_config", None):
        raise UserError(
            f"The weights of {base.id} are quantized, and adapters are exported with the weights that they were made "
            "from: give that model's folder with model=FOLDER."
        )
    return read_model(base.place, base.id)


def read_model(place: str, name: str) -> Any:
    """A whole model in float32; raises UserError where its weights are damaged."""
    from safetensors import SafetensorError

    try:
        return load_model(place, dtype=torch.float32)
    except SafetensorError as error:
        raise UserError(f"The weights of {name} in {place} are damaged ({error}). Copy or download them again.") from (
            error
        )


def load_tokenizer(source: Source, base: Base | None) -> Any:
    """The tokenizer that the adapter was trained with; raises UserError if there is none."""
    from transformers import AutoTokenizer

    files = tokenizer_files(source, base)
    if not files:
        raise UserError(f"{source.name} has no tokenizer, and neither has its base: copy its files into one of them.")
    try:
        return AutoTokenizer.from_pretrained(str(files[0].parent))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The tokenizer in {files[0].parent} cannot be read ({_first(error)}).") from error


def load_adapted(source: Source, base: Base) -> Adapted:
    """`base` with the adapter in `source` on it, in the state in which PEFT would answer with it.

    PiSSA and OLoRA begin with parts of the base's weights and take these from the base. They are made again here, as
    PEFT makes them when it loads such an adapter, but in float32: exact but for the rounding of the base's rest in the
    number type in which it was trained.

    Raises:
        UserError: the adapter does not fit the base, is damaged, or holds values that are not finite.
    """
    from peft import get_peft_model
    from peft.utils import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = config_in(source.path)
    config.inference_mode = True
    try:
        weights = load_file(source.path / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{source.path / ADAPTER_WEIGHTS} is damaged and cannot be read ({error}).") from error
    if bad := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise UserError(f"{source.name} holds values that are not finite, in {bad[0]}: its training had diverged.")
    model = load_base(base)
    takes = takes_from_base(source)
    try:
        with quietly():
            made = get_peft_model(model, config, autocast_adapter_dtype=True)
            began = _beginning(made, source) if takes else {}
            result = set_peft_model_state_dict(made, {name: value.float() for name, value in weights.items()})
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{source.name} does not fit {base.id} ({_first(error)}).") from error
    missing = [name for name in result.missing_keys if ".default" in name and "ranknum" not in name]
    if lost := [*missing, *result.unexpected_keys]:
        raise UserError(
            f"{source.name} does not fit {base.id}: they do not agree on {lost[0]} and {len(lost) - 1} more."
        )
    return Adapted(made.float(), began)


def lora_layers(model: Any) -> list[tuple[str, Any]]:
    """Every layer with a LoRA, DoRA or AdaLoRA and its name below PEFT's wrapping; embeddings, too, to refuse them."""
    return [(name, module) for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]


def _beginning(model: Any, source: Source) -> dict[str, tuple[Tensor, Tensor]]:
    """By module, A and scaled B as PEFT has just begun with them."""
    began = {}
    for name, layer in lora_layers(model):
        if layer.fan_in_fan_out and str(source.config and source.config["init_lora_weights"]).lower() == "olora":
            raise UserError(
                f"{source.name} is an OLoRA on {name}, a Conv1D, whose weight PEFT takes the wrong way round at the "
                "beginning: nothing right can be made of it."
            )
        a, b = (part["default"].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))
        began[name] = (a, b * layer.scaling["default"])
    return began


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch says in its first line only that there is something to say.
    return lines[1] if len(lines) > 1 and lines[0].endswith(":") else next(iter(lines), type(error).__name__)


def dtype_of(place: str | Path) -> torch.dtype:
    """The number type in which a model is stored, by its config; float32 where that does not say."""
    return getattr(load_config(str(place)), "dtype", None) or torch.float32
