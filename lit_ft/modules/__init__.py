"""LightningModules: a shared base, and one thin module per algorithm."""

from lit_ft.modules.dpo import DPOModule
from lit_ft.modules.sft import SFTModule

__all__ = ["DPOModule", "SFTModule"]
