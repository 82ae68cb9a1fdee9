"""Adapters as PEFT writes them, with weights that do something, and what the adapted model answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ft.adapter import Adapter, Base, Draft, publish
from lit_ft.models.resolve import model_fingerprint
from tests import tiny
from tests.conftest import Outcome

TOKENS = torch.arange(5, 45)[None] * 7 % 251
GPT2 = ["c_attn", "c_proj", "c_fc"]
ROTARY = ["q_proj", "v_proj", "down_proj"]


def base_folder(path: Path, kind: str = "llama") -> Path:
    return path if path.exists() else tiny.folder(path, kind)


def config(how: str, kind: str = "llama", **more: Any) -> Any:
    """A PEFT configuration: `lora`, `rslora`, `dora`, `pissa`, `olora`, `adalora`, `ia3`, …"""
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    targets = GPT2 if kind == "gpt2" else ROTARY
    if how == "ia3":
        keys, last = (["c_attn"], "mlp.c_proj") if kind == "gpt2" else (["k_proj", "v_proj"], "down_proj")
        return IA3Config(target_modules=[*keys, last], feedforward_modules=[last], task_type="CAUSAL_LM")
    if how == "adalora":
        settings = {"init_r": 6, "target_r": 3, "lora_alpha": 12, "total_step": 12, "tinit": 2, "tfinal": 3}
        return AdaLoraConfig(target_modules=targets, task_type="CAUSAL_LM", **(settings | more))
    own: dict[str, Any] = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}.get(how, {})
    if how not in ("lora", "rslora", "dora"):
        own = {"init_lora_weights": how}
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    return LoraConfig(task_type="CAUSAL_LM", **(settings | own | more))


def adapter(folder: Path, base: Path, how: str = "lora", kind: str = "llama", **more: Any) -> Any:
    """Write an adapter as others would; returns the model that it was saved from, in memory."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config(how, kind, **more)
        )
        if how == "adalora":
            _trained_by_peft(model)
        _stirred(model)
        model.eval()
        model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()
    return model


def _stirred(model: Any) -> None:
    """Weights away from where they began, so that whatever is left out shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn_like(parameter)
            if "magnitude" in name or "ia3_l" in name:
                parameter.mul_(1 + 0.3 * noise)
            elif "lora_E" in name:
                parameter.copy_(torch.where(parameter == 0, 0.0, 2 * noise))
            else:
                parameter.add_(0.1 * noise)


def _trained_by_peft(model: Any) -> None:
    """AdaLoRA's ranks allotted by PEFT itself, so that the folder holds a `rank_pattern` of its making."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for step in range(1, 13):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """In float64, so that only what is stored differs and not how it is multiplied."""
    return model.double().eval()(input_ids=TOKENS).logits[0]


def read_peft(folder: Path, base: Path) -> Any:
    """An adapter folder as PEFT reads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder))


def published(root: Path, on: Path, how: str = "lora", name: str = "support", **changes: Any) -> tuple[Adapter, Any]:
    """An adapter as lit_ft publishes it, and the model in memory."""
    kept: list[Any] = []
    values: dict[str, Any] = {
        "name": name,
        "base": Base(on.name, model_fingerprint(str(on))),
        "algorithm": "sft",
        "peft": how,
        "rank": 4,
        "data": [],
        "parent": None,
        "metrics": {"eval/loss": 1.5},
    }

    def write(folder: Path) -> None:
        kept.append(adapter(folder, on, how))
        tiny.tokenizer().save_pretrained(folder)
        (folder / "config.yaml").write_text(f"model:\n  id: {on}\n", encoding="utf-8")

    return publish(root, Draft(**(values | changes)), write), kept[0]


Export = Callable[..., Outcome]


@pytest.fixture
def export(in_process: Callable[..., Export], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Export:
    """`python -m lit_ft.export ARGS`, in an empty folder."""
    from lit_ft.export import main

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))
    return in_process(main, "lit_ft/export.py")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each architecture."""
    root = tmp_path_factory.mktemp("bases")
    return {kind: tiny.folder(root / f"tiny-{kind}", kind) for kind in ("llama", "qwen2", "gpt2")}


def said(outcome: Outcome) -> str:
    """The complaint of a command that was refused, as one line."""
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err and outcome.out == ""
    return " ".join(outcome.err.split("error: ", 1)[1].split())


def left(folder: Path) -> list[str]:
    """What lies below a folder, hidden or not."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
