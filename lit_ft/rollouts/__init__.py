"""Rollouts for reinforcement learning: the interface, and one file per engine that generates them."""

from lit_ft.rollouts.base import Rollout, RolloutEngine, RolloutError, Sampling

__all__ = ["Rollout", "RolloutEngine", "RolloutError", "Sampling"]
