"""`python -m lit_ft.export`: a trained adapter as plain LoRA, as a merged model, as a GGUF file, or on the Hub."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from lit_ft.cli import launch, model_is_no_group
from lit_ft.errors import UserError


class Target(Enum):
    lora = "lora"
    merged = "merged"
    gguf = "gguf"
    hub = "hub"


class NumberType(Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Quantization(Enum):
    f16 = "f16"
    q8_0 = "q8_0"


@dataclass
class ModelConfig:
    id: str | None = None


@dataclass
class ExportConfig:
    """One field for each key of conf/export.yaml, where they are explained."""

    adapter: str | None = None
    to: Target | None = None
    output: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    adapters: str = "./adapters"
    rank: int | None = None
    scale: float = 1.0
    dtype: NumberType | None = None
    quantization: Quantization | None = None
    repo: str | None = None
    upload: bool = False
    private: bool = True
    debug: bool = False


# What only one target has a use for.
_ONLY = {
    "rank": Target.lora,
    "dtype": Target.merged,
    "quantization": Target.gguf,
    "repo": Target.hub,
    "upload": Target.hub,
}


def export(cfg: ExportConfig) -> None:
    """Export as asked; the place of what was made is the one line on standard output.

    Raises:
        UserError: something is missing, does not fit, is damaged, or cannot be written or sent.
    """
    made = _export(cfg)
    if made is not None:
        print(made)  # noqa: T201


def _export(cfg: ExportConfig) -> Path | str | None:
    if cfg.adapter is None or cfg.to is None:
        raise UserError(
            "Give what to export and as what: python -m lit_ft.export adapter=FOLDER to=lora|merged|gguf|hub "
            "output=FOLDER."
        )
    to = cfg.to
    for key, only in _ONLY.items():
        if getattr(cfg, key) not in (None, False) and to is not only:
            raise UserError(f"{key}= has no effect with to={to.value}, only with to={only.value}.")
    if cfg.scale != 1:
        if to is Target.hub:
            raise UserError("scale= has no effect with to=hub: export it with to=lora first, and upload that.")
        if not (math.isfinite(cfg.scale) and cfg.scale > 0):
            raise UserError(f"scale={cfg.scale:g} must be above 0: 1 is the adapter as it was trained, 0 its base.")
    # Hub ids and folders are looked up before anything is loaded; transformers shall not ask for more.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from lit_ft.exporting.place import check_free
    from lit_ft.exporting.source import find_source

    if to is Target.hub:
        from lit_ft.exporting import hub

        if cfg.output is not None:
            raise UserError("output= has no effect with to=hub: nothing is written here.")
        if cfg.model.id is not None:
            raise UserError("model= has no effect with to=hub: the base is named as the adapter's card has it.")
        source = find_source(cfg.adapter, Path(cfg.adapters), any_model=True)
        return hub.export(source, repo=cfg.repo, upload=cfg.upload, private=cfg.private)
    if cfg.output is None:
        raise UserError(f"Give the folder to write to, which is not there yet: output=FOLDER (to={to.value}).")
    output = Path(cfg.output)
    check_free(output)
    source = find_source(cfg.adapter, Path(cfg.adapters))
    if to is Target.lora:
        from lit_ft.exporting import lora

        lora.export(source, output, model=cfg.model.id, rank=cfg.rank, scale=cfg.scale)
    elif to is Target.merged:
        from lit_ft.exporting import merged

        merged.export(source, output, model=cfg.model.id, dtype=cfg.dtype.value if cfg.dtype else None, scale=cfg.scale)
    else:
        from lit_ft.exporting import gguf

        gguf.export(
            source,
            output,
            model=cfg.model.id,
            quantization=cfg.quantization.value if cfg.quantization else "f16",
            scale=cfg.scale,
        )
    return output


def main() -> Any:
    """The command line."""
    model_is_no_group()
    launch(export, "export", ExportConfig)


if __name__ == "__main__":
    main()
