"""What every kind of adapter can do, for the wiring that knows none of them by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_ft.errors import UserError


@dataclass(frozen=True)
class Published:
    """The model in the form in which it is published.

    Attributes:
        model: it, possibly the trained one itself.
        converted: what was done to it, in words; None where nothing was.
    """

    model: Any
    converted: str | None = None


class AdapterKind(ABC):
    """One way to make a model trainable. Its settings are the arguments of its constructor."""

    sharded: ClassVar[bool] = True
    """Whether its weights can be sharded over devices (strategy=fsdp)."""

    changes_base: ClassVar[bool] = False
    """Whether switching the adapter off leaves another model than the base."""

    whole_model: ClassVar[bool] = False
    """Whether all weights are trained, and published."""

    quantized: ClassVar[bool] = False
    """Whether the base is to be loaded in 4 bits."""

    @abstractmethod
    def begin(self, model: Any) -> Any:
        """Make `model` trainable, so that it still computes what it did.

        Raises:
            UserError: the settings do not fit the model.
        """

    @abstractmethod
    def go_on(self, model: Any, folder: Path, ref: str) -> Any:
        """Make `model` trainable from the published adapter in `folder`, so that it computes what that one does.

        Raises:
            UserError: this kind cannot go on from it.
        """

    def published(self, model: Any) -> Published:
        """`model` as it is published: as vLLM can serve it, where an exact form exists."""
        return Published(model)

    def schedule(self, steps: int) -> None:  # noqa: B027 - most kinds have none
        """Hear how many optimizer steps the run has; raises UserError if they are too few."""

    def penalty(self, model: Any) -> Tensor | None:
        """What is added to the loss of an optimizer step, or None."""
        return None

    def after_step(self, model: Any, step: int) -> None:  # noqa: B027
        """Look at what optimizer step `step` (the first is 1) did, while the gradients are still there."""

    def may_be_published(self, step: int) -> bool:
        """Whether the weights after so many steps are what this kind promises."""
        return True

    def report(self, model: Any) -> str | None:
        """What it decided while training, as text, or None."""
        return None

    def picture(self, model: Any) -> str | None:
        """The same as an SVG, or None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs beside the weights."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from `state_dict`."""


def adapted(model: Any, config: Any) -> Any:
    """`model` with a new PEFT adapter in float32, everything else frozen.

    Raises:
        UserError: no module fits `target_modules`, or PEFT refuses them.
    """
    from peft import get_peft_model

    try:
        made = get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise UserError(
            f"peft.target_modules={spelled(config.target_modules)} cannot be used with {type(model).__name__} "
            f"({str(error).splitlines()[0]}). Its linear modules are {', '.join(linear_names(model))}."
        ) from error
    return float32(made)


def loaded(model: Any, folder: Path, config: Any) -> Any:
    """`model` with the adapter in `folder`, to be trained further.

    Raises:
        UserError: its weights do not belong to this model.
    """
    from peft import PeftModel

    config.inference_mode = False
    try:
        return float32(PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=True))
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"The adapter in {folder} does not fit the model ({str(error).splitlines()[0]}). "
            "Choose the model it was trained on, or start_from=none."
        ) from error


def config_in(folder: Path) -> Any:
    """The PEFT configuration of an adapter folder; raises UserError."""
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"The adapter in {folder} cannot be read ({str(error).splitlines()[0]}).") from error


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear modules, sorted."""
    from transformers.pytorch_utils import Conv1D

    return sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})


def spelled(targets: str | Sequence[str] | set[str] | None) -> str:
    """As they are given on the command line."""
    return targets if isinstance(targets, str) or targets is None else f"[{','.join(sorted(targets))}]"


def as_targets(targets: str | Sequence[str]) -> str | list[str]:
    """For PEFT, which takes a regular expression or a list."""
    return targets if isinstance(targets, str) else list(targets)


def float32(model: Any) -> Any:
    """Trained weights in float32, whatever the base has."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def default_config(model: Any) -> Any:
    """The PEFT configuration of the model's one adapter."""
    return next(iter(model.peft_config.values()))


def add_(weight: Tensor, delta: Tensor) -> None:
    """Add to a weight in place, in float32, and round once."""
    with torch.no_grad():
        weight.copy_((weight.float() + delta.float()).to(weight.dtype))
