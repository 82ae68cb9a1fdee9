"""Attention over packed rows: the interface to transformers, and one file per way to compute it."""

from lit_ft.models.attention.interface import PACKED, backend, register_packed_attention, why_not_packable
from lit_ft.models.attention.plan import Plan

__all__ = ["PACKED", "Plan", "backend", "register_packed_attention", "why_not_packable"]
