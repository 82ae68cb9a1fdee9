"""Adapters of other kinds as plain LoRA: exactly where that is possible, else the nearest of a given rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""By module: A `(r, in)` and B `(out, r)`, whose product B·A is what is added to the weight. Ranks may differ."""


def as_plain_lora(base: Any, factors: Factors, like: Any) -> Any:
    """`base` with a LoRA adapter made of `factors`, filled up with zeros to one rank, scaled by 1.

    Args:
        base: the model without adapters, its modules named as in `factors`.
        factors: of every module that `like` targets.
        like: the PEFT configuration of the adapter that it is made of: which modules it targets, its base and task are
            kept.
    """
    from peft import LoraConfig, get_peft_model

    from lit_ft.models.lora import use_fused_lora

    rank = max(1, *(a.shape[0] for a, _ in factors.values()))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=like.target_modules,
        exclude_modules=like.exclude_modules,
        layers_to_transform=like.layers_to_transform,
        layers_pattern=like.layers_pattern,
        fan_in_fan_out=like.fan_in_fan_out,
        base_model_name_or_path=like.base_model_name_or_path,
        bias="none",
        task_type=like.task_type,
    )
    made = get_peft_model(base, config, autocast_adapter_dtype=True)
    layers = {name: m for name, m in made.get_base_model().named_modules() if hasattr(m, "lora_A")}
    if layers.keys() != factors.keys():
        raise ValueError(f"the factors are of other modules: {sorted(layers.keys() ^ factors.keys())[:3]}")
    with torch.no_grad():
        for name, layer in layers.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.zero_()
            b.zero_()
            given_a, given_b = factors[name]
            a[: given_a.shape[0]] = given_a.to(a)
            b[:, : given_b.shape[1]] = given_b.to(b)
    use_fused_lora(made)
    return made


def adalora_factors(a: Tensor, e: Tensor, b: Tensor, keep: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """AdaLoRA's triplets (Zhang et al. 2023, arXiv:2303.10512, equation 3) as LoRA's factors, exactly.

    Args:
        a: right singular vectors Q, `(r, in)`.
        e: singular values Λ, `(r, 1)`.
        b: left singular vectors P, `(out, r)`.
        keep: which of them are kept, `(r,)` of bool.
        scaling: of the product, PEFT's alpha / (r + 1e-5).
    """
    return (a * e)[keep], b[:, keep] * scaling


def lora_delta(layer: Any, adapter: str = "default") -> Tensor:
    """What a plain LoRA layer adds to its weight, `(out, in)` in float32: scaling · B·A."""
    a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
    return layer.scaling[adapter] * (b @ a)


def singular(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of B·A without making the product: P `(out, r)`, Λ `(r,)`, Q `(r, in)`.

    By QR of both factors: B = Q_b·R_b, Aᵀ = Q_a·R_a, and R_b·R_aᵀ is only r × r. Computed in float64.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    return (q_b @ u).to(b), s.to(b), (v @ q_a.T).to(a)


def nearest(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The LoRA factors of that rank nearest to `delta` `(out, in)`, and the relative error (Frobenius norm).

    By the truncated singular value decomposition, which is the best there is (Eckart and Young 1936). The vectors of
    the shorter side are the eigenvectors of Δ·Δᵀ (or Δᵀ·Δ), which is several times faster to find than the whole
    decomposition; in float64, since that squares the singular values.
    """
    wide = delta.shape[0] <= delta.shape[1]
    d = delta.double() if wide else delta.double().T
    rank = min(rank, len(d))
    squares, vectors = torch.linalg.eigh(d @ d.T)
    u = vectors[:, -rank:].flip(1)
    rest = u.T @ d
    # Half of each singular value to either factor, so that both are of one size.
    root = squares[-rank:].flip(0).clamp_min(torch.finfo(torch.float32).tiny).pow(0.25)
    left, right = u * root, rest / root[:, None]
    whole = float(torch.linalg.norm(d))
    lost = float(torch.linalg.norm(d - u @ rest)) / whole if whole else 0.0
    a, b = (right, left) if wide else (left.T, right.T)
    return a.to(delta), b.to(delta), lost


def dora_delta(layer: Any, adapter: str = "default") -> Tensor:
    """What a DoRA layer adds to its weight, `(out, in)` in float32.

    The adapted weight is m · (W + s·B·A) / ‖W + s·B·A‖, row by row (Liu et al. 2024, arXiv:2402.09353, equation 5).
    """
    weight = layer.get_base_layer().weight.detach().float()
    weight = weight.T if layer.fan_in_fan_out else weight
    turned = weight + lora_delta(layer, adapter)
    length = layer.lora_magnitude_vector[adapter].weight.detach().float()
    return turned * (length / torch.linalg.norm(turned, dim=1))[:, None] - weight


def without_beginning(now: tuple[Tensor, Tensor], began: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The factors of B·A − B₀·A₀ = [B, −B₀]·[A; A₀]: an adapter that began with a part of the base's weight, which the
    base lacks while it is trained (PiSSA, Meng et al. 2024, arXiv:2404.02948), as one on the whole base."""
    (a, b), (a0, b0) = now, began
    return torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
