"""Makes published adapter folders by hand, as serving finds them: tiny weights, and any field of the card to choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lit_ft.adapter import Adapter, read, sha256_file

BASE_HASH = "sha256:" + "ba5e" * 16
# What a card may hold as its `canary`, which those made here lack unless it is given.
CANARY: dict[str, Any] = {"tokens": [5, 17, 40], "logprobs": [-1.25, -0.5], "base_logprobs": [-3.5, -2.75]}


def folder(root: Path, name: str = "support", version: int = 1, **changes: Any) -> Path:
    """`root/name/vVERSION`, servable unless `changes` to the card say otherwise; `lora` changes adapter_config.json."""
    path = root / name / f"v{version}"
    path.mkdir(parents=True)
    lora = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **changes.pop("lora", {})}
    (path / "adapter_config.json").write_text(json.dumps(lora))
    save_file(
        {"base_model.model.q_proj.lora_A.weight": torch.full((8, 4), float(version))},
        path / "adapter_model.safetensors",
    )
    card = {
        "name": name,
        "version": version,
        "created": f"2026-03-0{version}T12:00:00+00:00",
        "base": {"id": "bundled", "hash": BASE_HASH},
        "algorithm": "sft",
        "peft": "lora",
        "rank": 8,
        "data": [{"source": "support.jsonl", "rows": 300, "hash": "sha256:1"}],
        "parent": None,
        "metrics": {"eval/loss": 1.5},
        "versions": {},
        "weights_sha256": sha256_file(path / "adapter_model.safetensors"),
        "servable": True,
        "not_servable_reason": None,
    }
    (path / "card.json").write_text(json.dumps({**card, **changes}))
    return path


def adapter(root: Path, name: str = "support", version: int = 1, **changes: Any) -> Adapter:
    """The same, read."""
    return read(folder(root, name, version, **changes))
