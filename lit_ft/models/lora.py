"""LoRA's linear layer as one differentiable operation: the base's product, to which the adapter's is added in place.

PEFT's layer makes `base(x) + B(A(x)) · scaling` out of five operations, three of which write a whole activation; here
the scaled low-rank product is accumulated by the matrix product itself, forward and backward. The layers stay PEFT's:
their parameters, names and everything but this arithmetic. Weights in 4 bits (QLoRA) become numbers for the time of a
product, and again for that of its gradient.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_ft.models.four_bits import dequantized


def use_fused_lora(model: nn.Module) -> int:
    """Let every plain LoRA layer of `model` compute in one operation; returns how many there are.

    Layers with dropout while training, several active adapters, merged or disabled ones, and LoRA's variants go on as
    PEFT computes them, decided call by call.
    """
    plain = {parent: _fused_class(name) for name, parent in _plain_classes().items()}
    found = [module for module in model.modules() if type(module) in plain]
    for module in found:
        module.__class__ = plain[type(module)]
    return len(found)


def _plain_classes() -> dict[str, type[nn.Module]]:
    """PEFT's layers of plain LoRA, by the names of their fused counterparts; that on 4 bits wants bitsandbytes."""
    from peft.tuners.lora import bnb, layer

    found = {"FusedLoraLinear": layer.Linear}
    return found | ({"FusedLoraLinear4bit": bnb.Linear4bit} if hasattr(bnb, "Linear4bit") else {})


@cache
def _fused_class(name: str) -> type[nn.Module]:
    class Fused(_plain_classes()[name]):  # type: ignore[misc]
        """PEFT's LoRA layer with this file's arithmetic where it applies."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            parts = None if args or kwargs else _plain_parts(self, x)
            return super().forward(x, *args, **kwargs) if parts is None else _LoraLinear.apply(x, *parts)

    # Found again by name when a model is unpickled.
    Fused.__name__ = Fused.__qualname__ = name
    return Fused


def __getattr__(name: str) -> Any:
    if name in ("FusedLoraLinear", "FusedLoraLinear4bit"):
        return _fused_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _plain_parts(layer: Any, x: Tensor) -> tuple[Tensor, Any, Tensor | None, Tensor, Tensor, float] | None:
    """The weight, bias, A, B and scaling; None where the layer is anything but plain LoRA.

    The weight is `(out, in)`, and None stands behind it; or it is in 4 bits, and behind it stands what they mean.
    """
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
    kind, state = type(base), getattr(base.weight, "quant_state", None)
    if state is None and kind not in (nn.Linear, Conv1D):
        return None
    if type(a) is not nn.Linear or type(b) is not nn.Linear or b.bias is not None:
        return None
    if hasattr(base.weight, "placements") or hasattr(b.weight, "placements"):  # split over devices: a DTensor
        return None
    weight = base.weight.T if kind is Conv1D else base.weight
    dtype = weight.dtype if state is None else state.dtype
    mixed = torch.is_autocast_enabled(x.device.type)
    if not mixed and a.weight.dtype != dtype:  # PEFT then adds in the adapter's finer format
        return None
    if dtype != (torch.get_autocast_dtype(x.device.type) if mixed else x.dtype) or weight.requires_grad:
        return None
    if base.bias is not None and base.bias.requires_grad:
        return None
    return weight, state, base.bias, a.weight, b.weight, layer.scaling[name]


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s · (x Aᵀ) Bᵀ with W and b frozen (Hu et al. 2021, arXiv:2106.09685, equation 3)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, state: Any, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            w = _numbers(weight, state)
            rows = x.reshape(-1, x.shape[-1]).to(w.dtype)
            low = rows @ a.to(w.dtype).T
            out = rows @ w.T if bias is None else torch.addmm(bias.to(w.dtype), rows, w.T)
            out.addmm_(low, b.to(w.dtype).T, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.state, ctx.scaling, ctx.shape, ctx.dtype = state, scaling, x.shape, x.dtype
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, a, b = ctx.saved_tensors
        needs_x, _, _, _, needs_a, needs_b = ctx.needs_input_grad[:6]
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.reshape(-1, grad.shape[-1]).to(rows.dtype)
            d_low = (grad @ b.to(grad.dtype)) * ctx.scaling
            d_a = (d_low.T @ rows).to(a.dtype) if needs_a else None
            d_b = (grad.T @ low).to(b.dtype) * ctx.scaling if needs_b else None
            d_x = None
            if needs_x:
                d_x = grad @ _numbers(weight, ctx.state)
                d_x = d_x.addmm_(d_low, a.to(grad.dtype)).view(ctx.shape).to(ctx.dtype)
        return d_x, None, None, None, d_a, d_b, None


def _numbers(weight: Tensor, state: Any) -> Tensor:
    return weight if state is None else dequantized(weight, state)
