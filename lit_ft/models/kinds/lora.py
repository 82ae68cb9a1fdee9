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
    check_numbers,
    config_in,
    default_config,
    loaded,
    lora_layers,
    why_not_among,
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

    lora = True
    beside_others = True

    def __init__(
        self,
        *,
        r: int = 16,
        alpha: int = 32,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
        use_rslora: bool = False,
    ) -> None:
        check_numbers(r=r, alpha=alpha, dropout=dropout)
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

    def why_not_from(self, folder: Path) -> str | None:
        return why_not_among(folder, ["lora"], "a LoRA")

    def go_on(self, model: Any, folder: Path, ref: str) -> Any:
        self.check_goes_on(folder, ref)
        config = config_in(folder)
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

    def why_not_from(self, folder: Path) -> str | None:
        return why_not_among(folder, ["lora", "dora"], "a DoRA")

    def go_on(self, model: Any, folder: Path, ref: str) -> Any:
        """From a DoRA; or exactly from a LoRA, whose adapted weight has lengths and directions as well."""
        self.check_goes_on(folder, ref)
        config = config_in(folder)
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
    beside_others = False

    def __init__(self, *, niter: int | None = 16, **lora: Any) -> None:
        super().__init__(**lora)
        self.niter = niter
        self._began: dict[str, tuple[Tensor, Tensor]] = {}
        """A and B as they began, by module."""

    def begin(self, model: Any) -> Any:
        if getattr(model, "is_quantized", False):
            raise UserError(
                "peft=pissa takes the base's weights apart, and cannot where they are quantized: peft=lora."
            )
        made = adapted(model, self.config())
        layers = lora_layers(made)
        if any(len(getattr(module, "lora_embedding_A", ())) for module in made.modules()):
            raise UserError("peft=pissa takes linear layers apart: leave embeddings out of peft.target_modules.")
        if any(min(layer.get_base_layer().weight.shape) < self.r for _, layer in layers):
            raise UserError(
                f"peft.r={self.r} is above the smaller side of some of the weights, which have no more singular "
                "values: lower it, or choose others with peft.target_modules."
            )
        for name, layer in layers:
            self._began[name] = self._take_apart(layer)
        use_fused_lora(made)
        return made

    @torch.no_grad()
    def _take_apart(self, layer: Any) -> tuple[Tensor, Tensor]:
        """Move the weight's largest singular values into A and B, and return these.

        As PEFT's `pissa_init`, which for a base in bf16 rounds A and B after it took their product from the weight:
        the model then begins as another than the base, by what is lost of its largest part.
        """
        weight = layer.get_base_layer().weight
        whole = (weight.T if layer.fan_in_fan_out else weight).float()
        if self.niter is None:
            u, s, v = torch.linalg.svd(whole, full_matrices=False)
            u, s, v = u[:, : self.r], s[: self.r], v[: self.r]
        else:
            u, s, v = torch.svd_lowrank(whole, self.r, niter=self.niter)
            v = v.T
        scaling = layer.scaling["default"]
        root = (s / scaling).sqrt()
        a, b = root[:, None] * v, u * root
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
        taken = scaling * (b @ a)
        add_(weight, -(taken.T if layer.fan_in_fan_out else taken))
        return a, b

    def why_not_from(self, folder: Path) -> str:
        return (
            "is not what PiSSA begins with, which is the base's own weights. What it published is a LoRA: go on with "
            "peft=lora, or give start_from=none."
        )

    def go_on(self, model: Any, folder: Path, ref: str) -> Any:
        raise UserError(f"{ref} {self.why_not_from(folder)}")

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
