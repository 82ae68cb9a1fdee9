"""LoRA's linear layer as one differentiable operation: the base's product, to which the adapter's is added in place.

PEFT's layer makes `base(x) + B(A(x)) · scaling` out of five operations, three of which write a whole activation; here
the scaled low-rank product is accumulated by the matrix product itself, forward and backward. The layers stay PEFT's:
their parameters, names and everything but this arithmetic.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def use_fused_lora(model: nn.Module) -> int:
    """Let every plain LoRA layer of `model` compute in one operation; returns how many there are.

    Layers with dropout while training, several active adapters, merged or disabled ones, and LoRA's variants go on as
    PEFT computes them, decided call by call.
    """
    from peft.tuners.lora.layer import Linear

    plain = [module for module in model.modules() if type(module) is Linear]
    for module in plain:
        module.__class__ = _fused_class()
    return len(plain)


@cache
def _fused_class() -> type[nn.Module]:
    from peft.tuners.lora.layer import Linear

    class FusedLoraLinear(Linear):  # type: ignore[misc]
        """PEFT's LoRA layer with this file's arithmetic where it applies."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            parts = None if args or kwargs else _plain_parts(self, x)
            return super().forward(x, *args, **kwargs) if parts is None else _LoraLinear.apply(x, *parts)

    # Found again by name when a model is unpickled.
    FusedLoraLinear.__qualname__ = "FusedLoraLinear"
    return FusedLoraLinear


def __getattr__(name: str) -> Any:
    if name == "FusedLoraLinear":
        return _fused_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _plain_parts(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float] | None:
    """The weight as `(out, in)`, bias, A, B and scaling; None where the layer is anything but plain LoRA."""
    from transformers.pytorch_utils import Conv1D

    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant:
        return None
    dropout, a, b = layer.lora_dropout[name], layer.lora_A[name], layer.lora_B[name]
    if layer.training and getattr(dropout, "p", 0.0) > 0:
        return None
    base = layer.base_layer
    kind = type(base)
    if kind not in (nn.Linear, Conv1D) or type(a) is not nn.Linear or type(b) is not nn.Linear or b.bias is not None:
        return None
    if hasattr(base.weight, "placements") or hasattr(b.weight, "placements"):  # split over devices: a DTensor
        return None
    weight = base.weight.T if kind is Conv1D else base.weight
    mixed = torch.is_autocast_enabled(x.device.type)
    if not mixed and a.weight.dtype != weight.dtype:  # PEFT then adds in the adapter's finer format
        return None
    if weight.dtype != (torch.get_autocast_dtype(x.device.type) if mixed else x.dtype) or weight.requires_grad:
        return None
    if base.bias is not None and base.bias.requires_grad:
        return None
    return weight, base.bias, a.weight, b.weight, layer.scaling[name]


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s · (x Aᵀ) Bᵀ with W and b frozen (Hu et al. 2021, arXiv:2106.09685, equation 3)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
            low = rows @ a.to(weight.dtype).T
            out = rows @ weight.T if bias is None else torch.addmm(bias.to(weight.dtype), rows, weight.T)
            out.addmm_(low, b.to(weight.dtype).T, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling, ctx.shape, ctx.dtype = scaling, x.shape, x.dtype
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, a, b = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b = ctx.needs_input_grad[:5]
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.reshape(-1, grad.shape[-1]).to(weight.dtype)
            d_low = (grad @ b.to(weight.dtype)) * ctx.scaling
            d_a = (d_low.T @ rows).to(a.dtype) if needs_a else None
            d_b = (grad.T @ low).to(b.dtype) * ctx.scaling if needs_b else None
            d_x = None
            if needs_x:
                d_x = (grad @ weight).addmm_(d_low, a.to(weight.dtype)).view(ctx.shape).to(ctx.dtype)
        return d_x, None, None, d_a, d_b, None
