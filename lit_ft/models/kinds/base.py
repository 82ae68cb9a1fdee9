"""What every kind of adapter can do, for the wiring that knows none of them by name."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Report:
    """What a kind decided while training.

    Attributes:
        name: of the files that hold it, without their ending.
        table: as text.
        picture: as an SVG.
        values: by module.
    """

    name: str
    table: str
    picture: str
    values: Mapping[str, int]


class AdapterKind(ABC):
    """One way to make a model trainable. Its settings are the arguments of its constructor."""

    sharded: ClassVar[bool] = True
    """Whether its weights can be sharded over devices (strategy=fsdp)."""

    split: ClassVar[bool] = True
    """Whether it goes on layers that are split over devices (strategy=fsdp_tp)."""

    changes_base: ClassVar[bool] = False
    """Whether switching the adapter off leaves another model than the base."""

    whole_model: ClassVar[bool] = False
    """Whether all weights are trained, and published."""

    quantized: ClassVar[bool] = False
    """Whether the base is to be loaded in 4 bits."""

    lora: ClassVar[bool] = False
    """Whether what it publishes is a LoRA or a DoRA, which others of that kind can stand beside on one base."""

    beside_others: ClassVar[bool] = False
    """Whether it can be trained while others stand beside it on the same base."""

    scheduled: ClassVar[bool] = False
    """Whether it must know how many steps the run takes, so that nothing may end it earlier."""

    @abstractmethod
    def begin(self, model: Any) -> Any:
        """Make `model` trainable, so that it still computes what it did.

        Raises:
            UserError: the settings do not fit the model.
        """

    @abstractmethod
    def why_not_from(self, folder: Path) -> str | None:
        """None if this kind goes on from the published adapter in `folder`, else why not and what to do.

        The reason goes on from the adapter's name: "is a DoRA adapter, …".
        """

    def check_goes_on(self, folder: Path, ref: str) -> None:
        """Raise UserError with the reason if this kind cannot go on from the adapter in `folder`."""
        if reason := self.why_not_from(folder):
            raise UserError(f"{ref} {reason}")

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

    def report(self) -> Report | None:
        """What it decided while training, or None."""
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

    targets = config.target_modules
    # PEFT is content if one of them is there.
    unknown = [] if isinstance(targets, str) else [end for end in sorted(targets) if not modules_named(model, end)]
    if unknown:
        raise UserError(
            f"peft.target_modules={spelled(targets)}: {type(model).__name__} has no module {', '.join(unknown)}. "
            f"Its linear modules are {', '.join(linear_names(model))}."
        )
    try:
        made = get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, re.error) as error:
        raise UserError(
            f"peft.target_modules={spelled(targets)} cannot be used with {type(model).__name__} "
            f"({str(error).splitlines()[0]}). Its linear modules are {', '.join(linear_names(model))}."
        ) from error
    return float32(made)


def loaded(model: Any, folder: Path, config: Any) -> Any:
    """`model` with the adapter in `folder`, to be trained further.

    Raises:
        UserError: its weights do not belong to this model, or are not finite.
    """
    from peft import PeftModel

    config.inference_mode = False
    try:
        made = float32(PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=True))
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"The adapter in {folder} does not fit the model ({str(error).splitlines()[0]}). "
            "Choose the model it was trained on, or start_from=none."
        ) from error
    # Asked here: on some processors PyTorch's attention makes finite outputs of queries that are NaN.
    for name, weight in made.named_parameters():
        if weight.requires_grad and not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise UserError(
                f"The adapter in {folder} holds values that are not finite, in {name}: it is damaged, or its training "
                "had diverged. Give another version with start_from=NAME@vN, or start_from=none."
            )
    return made


def config_in(folder: Path) -> Any:
    """The PEFT configuration of an adapter folder; raises UserError."""
    from peft import PeftConfig

    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter: go on from a whole model with model.id={folder} start_from=none.")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"The adapter in {folder} cannot be read ({str(error).splitlines()[0]}).") from error


def kind_in(folder: Path) -> str:
    """What `folder` holds: `lora`, `dora`, `ia3` or another of PEFT's names in small letters; `full` if no adapter.

    Raises:
        UserError: its configuration cannot be read.
    """
    if not (folder / "adapter_config.json").is_file():
        return "full"
    config = config_in(folder)
    return "dora" if getattr(config, "use_dora", False) else str(config.peft_type.value).lower()


def why_not_among(folder: Path, kinds: Sequence[str], ours: str) -> str | None:
    """None if `folder` holds one of `kinds`, else why training cannot go on from it, as `why_not_from` says it.

    Args:
        ours: the kind that is to go on, for a reader.
    """
    there = kind_in(folder)
    if there in kinds:
        return None
    if there == "full":
        return f"is a whole model, not an adapter: go on from it with model.id={folder} start_from=none."
    names = {"lora": "a LoRA", "dora": "a DoRA", "ia3": "an (IA)³"}
    return (
        f"is {names.get(there, f'a {there}')} adapter, and {ours} cannot go on from it. Train with peft={there}, or "
        "give start_from=none."
    )


def modules_named(model: nn.Module, end: str) -> list[str]:
    """The names of the modules that `end` names as PEFT understands it: in full, or their last parts."""
    return [name for name, _ in model.named_modules() if name == end or name.endswith(f".{end}")]


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear modules, sorted."""
    from transformers.pytorch_utils import Conv1D

    return sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})


def spelled(targets: str | Sequence[str] | set[str]) -> str:
    """As they are given on the command line."""
    return targets if isinstance(targets, str) else f"[{','.join(sorted(targets))}]"


def as_targets(targets: str | Sequence[str], key: str = "target_modules") -> str | list[str]:
    """For PEFT, which takes a regular expression or a list; raises UserError for anything else, and for nothing."""
    names = [targets] if isinstance(targets, str) else list(targets) if isinstance(targets, Sequence) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(
            f"peft.{key}={targets} names no modules: give a regular expression, or a list of the ends of their names "
            "such as [q_proj,v_proj]."
        )
    return targets if isinstance(targets, str) else names


def check_numbers(*, alpha: int, dropout: float, **ranks: int) -> None:
    """Raise UserError for ranks and scalings below 1 and for a dropout that is no probability below 1."""
    for key, value in {**ranks, "alpha": alpha}.items():
        if value < 1:
            raise UserError(f"peft.{key}={value} must be at least 1.")
    if not 0 <= dropout < 1:
        raise UserError(f"peft.dropout={dropout} must be at least 0 and below 1.")


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


def lora_layers(model: Any) -> list[tuple[str, Any]]:
    """Every layer with LoRA's or AdaLoRA's factors and its name below PEFT's wrapping."""
    return [
        (name, module)
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    ]
