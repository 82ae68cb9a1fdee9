"""(IA)³: vectors that scale keys, values and what enters a feed-forward layer's last product."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_ft.errors import UserError
from lit_ft.models.kinds.base import AdapterKind, adapted, config_in, linear_names, loaded

# How models call the projections to keys and values (some compute the query along with them), and the last product of
# a feed-forward layer. PEFT's own table scales queries instead of keys in several models; the paper scales keys.
_KEYS_VALUES = ("k_proj", "v_proj", "key", "value", "query_key_value", "qkv_proj", "c_attn", "Wqkv")
_FEEDFORWARD = ("down_proj", "fc2", "dense_4h_to_h", "fc_out", "w2", "mlp.c_proj", "output.dense")


class IA3(AdapterKind):
    """(IA)³ (Liu et al. 2022, arXiv:2205.05638, section 3.3): one number for each output of keys and values, and for
    each input of the feed-forward layer's last product.

    Args:
        target_modules: `auto` finds them by name; or a regular expression, or ends of names.
        feedforward_modules: those of them whose inputs are scaled instead of their outputs; null finds them.
    """

    def __init__(
        self, *, target_modules: str | Sequence[str] = "auto", feedforward_modules: Sequence[str] | None = None
    ) -> None:
        self.target_modules, self.feedforward_modules = target_modules, feedforward_modules

    def begin(self, model: Any) -> Any:
        from peft import IA3Config, TaskType

        targets, feedforward = self._modules(model)
        config = IA3Config(target_modules=targets, feedforward_modules=feedforward, task_type=TaskType.CAUSAL_LM)
        return adapted(model, config)

    def go_on(self, model: Any, folder: Path, ref: str) -> Any:
        config = config_in(folder)
        if config.peft_type != "IA3":
            raise UserError(f"{ref} is no (IA)³ adapter, and peft=ia3 cannot go on from it: start_from=none.")
        return loaded(model, folder, config)

    def _modules(self, model: Any) -> tuple[str | list[str], list[str]]:
        names = [name for name, _ in model.named_modules()]

        def there(ends: Sequence[str]) -> list[str]:
            return [end for end in ends if any(name == end or name.endswith(f".{end}") for name in names)]

        ends = there(_FEEDFORWARD)
        if self.target_modules == "auto":
            keys_values = there(_KEYS_VALUES)
            if not keys_values or not ends:
                what = "keys and values" if not keys_values else "a feed-forward layer's last product"
                raise UserError(
                    f"peft=ia3 does not find {what} in {type(model).__name__}. Name them with peft.target_modules and "
                    f"peft.feedforward_modules; its linear modules are {', '.join(linear_names(model))}."
                )
            return [*keys_values, *ends], list(self.feedforward_modules or ends)
        if isinstance(self.target_modules, str):
            given = [name for name in names if re.fullmatch(self.target_modules, name)]
            fitting = [end for end in ends if any(name == end or name.endswith(f".{end}") for name in given)]
            targets: str | list[str] = self.target_modules
        else:
            targets = list(self.target_modules)
            fitting = [end for end in targets if end in ends]
        return targets, list(self.feedforward_modules if self.feedforward_modules is not None else fitting)
