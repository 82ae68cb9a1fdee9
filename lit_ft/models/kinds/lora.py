"""LoRA and what differs from it by its beginning, its scaling or its base: rsLoRA, LoRA+, DoRA, PiSSA, QLoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_ft.errors import UserError
from lit_ft.models.convert import as_plain_lora, lora_delta
from lit_ft.models.kinds.base import (
    AdapterKind,
    Published,
    adapted,
    add_,
    as_targets,
    config_in,
    default_config,
    loaded,
)
from lit_ft.models.lora import use_fused_lora


class Lora(AdapterKind):
    """LoRA (Hu et al. 2021, arXiv:2106.09685), with rsLoRA's scaling if asked (Kalajdzievski 2023, arXiv:2312.03732).

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) is the same adapter with another learning rate for B, which is the
    optimizer's business.

    Args:
        r: rank.
        alpha: the product is scaled by alpha/r, or alpha/√r.
        dropout: of the adapter's input, while training.
        target_modules: `all-linear`, a regular expression, or ends of names.
        use_rslora: scale by alpha/√r.
    """

    def __init__(
        self,
        *,
        r: int = 16,
        alpha: int = 32,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
        use_rslora: bool = False,
    ) -> None:
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.target_modules, self.use_rslora = target_modules, use_rslora

    def config(self, **more: Any) -> Any:
        """PEFT's configuration."""
        from peft import LoraConfig, TaskType

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=as_targets(self.target_modules),
            use_rslora=self.use_rslora,
            bias="none",
            task_type=TaskType.CAUSAL_LM,
            **more,
        )

    def begin(self, model: Any) -> Any:
        made = adapted(model, self.config())
        use_fused_lora(made)
        return made

    def go_on(self, model: Any, folder: Path, ref: str) -> Any:
        config = config_in(folder)
        if config.peft_type != "LORA" or config.use_dora:
            kind = "DoRA" if config.peft_type == "LORA" else config.peft_type
            raise UserError(
                f"{ref} is a {kind} adapter, and a LoRA cannot go on from it. Train with peft={kind.lower()}, or give "
                "start_from=none."
            )
        config.lora_dropout = self.dropout
        made = loaded(model, folder, config)
        use_fused_lora(made)
        return made


class QLora(Lora):
    """LoRA on a base whose frozen weights are kept in 4 bits, NF4 (Dettmers et al. 2023, arXiv:2305.14314)."""

    sharded = False
    quantized = True


class Dora(Lora):
    """DoRA: the length of each row of the adapted weight is trained apart from its direction (arXiv:2402.09353)."""

    sharded = False

    def config(self, **more: Any) -> Any:
        return super().config(use_dora=True, **more)

    def begin(self, model: Any) -> Any:
        return adapted(model, self.config())

    def go_on(self, model: Any, folder: Path, ref: str) -> Any:
        """From a DoRA; or exactly from a LoRA, whose adapted weight has lengths and directions as well."""
        config = config_in(folder)
        if config.peft_type != "LORA":
            raise UserError(f"{ref} is a {config.peft_type} adapter, and a DoRA cannot go on from it: start_from=none.")
        config.lora_dropout = self.dropout
        if config.use_dora:
            return loaded(model, folder, config)
        plain = loaded(model, folder, config)
        factors = {name: (layer.lora_A["default"].weight.data.clone(), layer.lora_B["default"].weight.data.clone())
                   for name, layer in lora_layers(plain)}  # fmt: skip
        config.use_dora = True
        made = adapted(plain.unload(), config)
        with torch.no_grad():
            for name, layer in lora_layers(made):
                layer.lora_A["default"].weight.copy_(factors[name][0])
                layer.lora_B["default"].weight.copy_(factors[name][1])
                weight = layer.get_base_layer().weight.float()
                weight = (weight.T if layer.fan_in_fan_out else weight) + lora_delta(layer)
                layer.lora_magnitude_vector["default"].weight.copy_(torch.linalg.norm(weight, dim=1))
        return made


class Pissa(Lora):
    """PiSSA: LoRA that begins with each weight's largest singular values (Meng et al. 2024, arXiv:2404.02948).

    The base keeps what is left of the weight, so the trained adapter does not fit the base that everybody has. It is
    published as a LoRA of twice the rank, the difference of what it became and what it began as.

    Args:
        niter: iterations of the randomised decomposition; None computes it in full, which takes minutes for large
            models.
        lora: arguments of `Lora`.
    """

    sharded = False
    changes_base = True

    def __init__(self, *, niter: int | None = 16, **lora: Any) -> None:
        super().__init__(**lora)
        self.niter = niter
        self._began: dict[str, tuple[Tensor, Tensor]] = {}
        """A and B as they began, by module."""

    def begin(self, model: Any) -> Any:
        how = "pissa" if self.niter is None else f"pissa_niter_{self.niter}"
        made = adapted(model, self.config(init_lora_weights=how))
        for name, layer in lora_layers(made):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            self._began[name] = (a.detach().clone(), b.detach().clone())
        use_fused_lora(made)
        return made

    def go_on(self, model: Any, folder: Path, ref: str) -> Any:
        raise UserError(
            f"PiSSA begins with the base's own weights, so peft=pissa cannot go on from {ref}. What it published is a "
            "LoRA: go on with peft=lora, or give start_from=none."
        )

    def published(self, model: Any) -> Published:
        """ΔW = s·(B·A − B₀·A₀) = [B, −B₀]·[A; A₀]·s, on the base's own weights."""
        factors = {}
        for name, layer in lora_layers(model):
            a, b = (part["default"].weight.detach().float().cpu() for part in (layer.lora_A, layer.lora_B))
            a0, b0 = (part.float().cpu() for part in self._began[name])
            scaling = layer.scaling["default"]
            factors[name] = (torch.cat([a, a0]), torch.cat([b, -b0], dim=1) * scaling)
            weight = layer.get_base_layer().weight
            taken = (b0 @ a0 * scaling).to(weight.device)
            add_(weight, taken.T if layer.fan_in_fan_out else taken)
        made = as_plain_lora(model.unload(), factors, default_config(model))
        return Published(made, f"PiSSA of rank {self.r} to LoRA of rank {2 * self.r}, exactly")


def apply_lora(model: Any, **settings: Any) -> Any:
    """`model` with a new LoRA adapter; the settings are those of `Lora`, whose defaults hold."""
    return Lora(**settings).begin(model)


def lora_layers(model: Any) -> list[tuple[str, Any]]:
    """Every adapted linear layer and its name below PEFT's wrapping."""
    return [
        (name, module)
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    ]
