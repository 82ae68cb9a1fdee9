"""(IA)³: vectors that scale keys, values and what enters a feed-forward layer's last product."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_ft.errors import UserError
from lit_ft.models.kinds.base import (
    AdapterKind,
    adapted,
    as_targets,
    config_in,
    linear_names,
    loaded,
    modules_named,
    spelled,
    why_not_among,
)

# How models call the projections to keys and values (some compute the query along with them), and the last product of
# a feed-forward layer. PEFT's own table scales queries instead of keys in several models; the paper scales keys.
_KEYS_VALUES = ("k_proj", "v_proj", "key", "value", "query_key_value", "qkv_proj", "c_attn", "Wqkv")
_FEEDFORWARD = ("down_proj", "fc2", "dense_4h_to_h", "fc_out", "w2", "mlp.c_proj", "output.dense")


class IA3(AdapterKind):
    """(IA)³ (Liu et al. 2022, arXiv:2205.05638, section 3.3): one number for each output of keys and values, and for
    each input of the feed-forward layer's last product.

    Where queries, keys and values are one product (GPT-2, GPT-NeoX) all its outputs are scaled, as PEFT does it.

    Args:
        target_modules: `auto` finds them by name; or a regular expression, or ends of names.
        feedforward_modules: those of them whose inputs are scaled instead of their outputs; null finds them.
    """

    split = False

    def __init__(
        self, *, target_modules: str | Sequence[str] = "auto", feedforward_modules: Sequence[str] | None = None
    ) -> None:
        self.target_modules, self.feedforward_modules = target_modules, feedforward_modules

    def begin(self, model: Any) -> Any:
        from peft import IA3Config, TaskType

        targets, feedforward = self._modules(model)
        unknown = [end for end in feedforward if not modules_named(model, end)]
        if unknown or (not isinstance(targets, str) and not set(feedforward) <= set(targets)):
            raise UserError(
                f"peft.feedforward_modules={spelled(feedforward)} must be among those that are scaled, "
                f"peft.target_modules={spelled(targets)}. The model's linear modules are "
                f"{', '.join(linear_names(model))}."
            )
        config = IA3Config(target_modules=targets, feedforward_modules=feedforward, task_type=TaskType.CAUSAL_LM)
        return adapted(model, config)

    def why_not_from(self, folder: Path) -> str | None:
        return why_not_among(folder, ["ia3"], "(IA)³")

    def go_on(self, model: Any, folder: Path, ref: str) -> Any:
        self.check_goes_on(folder, ref)
        return loaded(model, folder, config_in(folder))

    def _modules(self, model: Any) -> tuple[str | list[str], list[str]]:
        def there(ends: Sequence[str]) -> list[str]:
            return [end for end in ends if modules_named(model, end)]

        if self.target_modules == "auto":
            keys_values, last = there(_KEYS_VALUES), there(_FEEDFORWARD)
            if not keys_values or not last:
                what = "keys and values" if not keys_values else "a feed-forward layer's last product"
                raise UserError(
                    f"peft=ia3 does not find {what} in {type(model).__name__}. Name them with peft.target_modules and "
                    f"peft.feedforward_modules; its linear modules are {', '.join(linear_names(model))}."
                )
            targets: str | list[str] = [*keys_values, *last]
        else:
            targets, last = as_targets(self.target_modules), list(_FEEDFORWARD)
        if self.feedforward_modules is not None:
            given = self.feedforward_modules
            return targets, [] if not given else as_ends(given)
        if not isinstance(targets, str):
            return targets, [end for end in targets if any(end == one or end.endswith(f".{one}") for one in last)]
        if targets == "all-linear":
            return targets, there(last)
        try:
            named = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
        except re.error:
            named = []  # PEFT will say so
        return targets, [end for end in last if any(name == end or name.endswith(f".{end}") for name in named)]


def as_ends(given: str | Sequence[str]) -> list[str]:
    """The ends of names that are given, one or several."""
    ends = as_targets(given, "feedforward_modules")
    return [ends] if isinstance(ends, str) else ends
