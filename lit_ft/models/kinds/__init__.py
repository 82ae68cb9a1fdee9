"""The kinds of adapter: how each begins, goes on from a published one, and is published. One file per family.

A new kind is one file here, one line in `KINDS`, its name in `lit_ft.config` and one YAML in `conf/peft`.
"""

from __future__ import annotations

from lit_ft.models.kinds.adalora import AdaLora
from lit_ft.models.kinds.base import AdapterKind, Published, Report
from lit_ft.models.kinds.full import Full
from lit_ft.models.kinds.ia3 import IA3
from lit_ft.models.kinds.lora import Dora, Lora, Pissa, QLora

KINDS: dict[str, type[AdapterKind]] = {
    "lora": Lora,
    "rslora": Lora,
    "lora_plus": Lora,
    "dora": Dora,
    "pissa": Pissa,
    "qlora": QLora,
    "adalora": AdaLora,
    "ia3": IA3,
    "full": Full,
}

__all__ = ["KINDS", "AdapterKind", "Published", "Report"]
