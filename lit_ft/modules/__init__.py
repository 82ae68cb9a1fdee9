"""LightningModules: a shared base, and one thin module per algorithm."""

from lit_ft.modules.dpo import DPOModule
from lit_ft.modules.grpo import GRPOModule
from lit_ft.modules.ppo import PPOModule
from lit_ft.modules.reward import RewardModule
from lit_ft.modules.sft import SFTModule

__all__ = ["DPOModule", "GRPOModule", "PPOModule", "RewardModule", "SFTModule"]
