"""Several adapters on one frozen base: which of them computes, which are trained, which are published.

Of RLHF's four models (policy, value, reward, reference) each is an adapter here, and the base is there once. The
policy is PEFT's `default`, so that everything else of lit_ft sees an adapted model as ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from lit_ft.models.kinds.base import float32

POLICY = "default"


@contextmanager
def using(model: Any, role: str | None) -> Iterator[None]:
    """Let the adapter called `role` compute, or with None the base alone; what is trained stays as it is.

    PEFT's own `set_adapter` and `disable_adapter` change `requires_grad` as they go, which would end the training of a
    policy each time that its reference is asked.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            if role is None:
                layer._disable_adapters = True
            else:
                layer._active_adapter, layer._disable_adapters = [role], False
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def add_role(model: Any, role: str, config: Any = None, weights: Mapping[str, Tensor] | None = None) -> None:
    """Put another adapter beside the policy's; it is not trained unless `train_only` says so.

    Args:
        model: PEFT's, with the policy on it.
        role: its name.
        config: PEFT's configuration of it; None for the policy's.
        weights: as PEFT keeps them in a file (without the adapter's name); None for a new adapter, which changes
            nothing yet.

    Raises:
        ValueError, RuntimeError: the weights do not belong to this model, or PEFT has no two adapters of this kind.
    """
    from peft import set_peft_model_state_dict

    config = deepcopy(config if config is not None else model.peft_config[POLICY])
    config.inference_mode = False
    # Beginnings such as PiSSA's take their weights out of the base, which is everybody's here.
    for beginning in ("init_lora_weights", "init_ia3_weights"):
        if hasattr(config, beginning):
            setattr(config, beginning, True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_adapter(role, config)
    if weights is not None:
        found = set_peft_model_state_dict(model, dict(weights), adapter_name=role)
        if found.unexpected_keys:
            raise ValueError(f"weights of modules that the model does not have, such as {found.unexpected_keys[0]}")
        if missing := [name for name in found.missing_keys if _of(role, name)]:
            raise ValueError(f"no weights for modules that the model has, such as {missing[0]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        if _of(role, name):
            parameter.data = parameter.data.float()
    float32(model)


def copy_role(model: Any, source: str, role: str) -> None:
    """Put a copy of adapter `source` beside it, as it is now; it is not trained."""
    add_role(model, role, model.peft_config[source])
    with torch.no_grad():
        for copied, parameter in zip(role_parameters(model, role), role_parameters(model, source), strict=True):
            copied.copy_(parameter)


def train_only(model: Any, roles: Iterable[str]) -> None:
    """Let the weights of these adapters be trained, and no others."""
    wanted = list(roles)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(_of(role, name) for role in wanted))


def leave_only(model: Any, role: str = POLICY) -> None:
    """Take every other adapter off the model."""
    for other in [name for name in model.peft_config if name != role]:
        model.delete_adapter(other)
    model.set_adapter(role)


def role_parameters(model: Any, role: str) -> list[Tensor]:
    """The weights of one adapter."""
    return [parameter for name, parameter in model.named_parameters() if _of(role, name)]


def _of(role: str, name: str) -> bool:
    """Whether parameter `name` is of adapter `role`, named after `lora_A`, `ia3_l`, …: modules may be called so too."""
    return re.search(rf"\.(lora_|ia3_)\w+\.{re.escape(role)}(\.|$)", name) is not None
