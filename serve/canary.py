"""The canary: does the engine compute with an adapter what training recorded, and anything else than the base?

vLLM accepts adapters of which no module matches, and then silently serves the base. So before a version is listed the
engine scores a fixed text with it, and the log-probabilities are compared with the base's and with those in its card.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from lit_ft.adapter import Adapter

# Tokens for cards of before there was a canary; any ids that every vocabulary has.
FALLBACK_TOKENS = tuple(range(100, 148))

SAME = 1e-5
"""Mean difference in log-probability below which two models are one: float32 in another order of summation."""

ROUNDING = 2e-3
"""The difference allowed besides what the base itself shows between training and engine: the adapter's own rounding."""

SHARE = 0.15
"""The part of the adapter's recorded effect by which it may differ: half precision computes a large effect coarsely."""


class Scores(Protocol):
    """The part of the engine's client that scores tokens."""

    async def logprobs(self, model: str, tokens: Sequence[int]) -> list[float]: ...


async def objection(client: Scores, adapter: Adapter, base_name: str, known: dict[tuple[int, ...], list[float]]) -> str:
    """Why the engine must not offer this adapter, which it has loaded; empty where there is no reason.

    `known` remembers the base's log-probabilities from one call to the next.
    """
    canary = adapter.card.canary
    tokens = tuple(canary.tokens) if canary else FALLBACK_TOKENS
    base = known.get(tokens) or await client.logprobs(base_name, tokens)
    if all(map(math.isfinite, base)):
        known[tokens] = base
    served = await client.logprobs(adapter.ref, tokens)
    recorded = (canary.logprobs, canary.base_logprobs) if canary else None
    return judge(served, base, recorded)


def judge(
    served: Sequence[float],
    base: Sequence[float],
    recorded: tuple[Sequence[float], Sequence[float]] | None = None,
) -> str:
    """The same, of the log-probabilities themselves, each of shape [tokens - 1].

    The engine's base against the recorded base shows by how much the two compute differently anyway (number types,
    kernels): the adapter may differ by three times that (in bfloat16 random ones were seen to differ by 2.4 times as
    much as their base), by rounding, and by a share of its own effect.
    """
    if not all(map(math.isfinite, served)):
        return "With it the engine computes numbers that are not finite (NaN or infinite): its weights are broken."
    if not all(map(math.isfinite, base)):
        return "Without any adapter the engine computes numbers that are not finite, so this one cannot be checked."
    if apart(served, base) <= SAME:
        return (
            "The engine computes with it exactly what it computes without it: none of its layers took effect, or its "
            "training changed nothing. Train it again, with target modules that this base has."
        )
    if recorded is None:
        return ""
    if len(recorded[0]) != len(served) or len(recorded[1]) != len(base):
        return "The canary in its card does not fit its own tokens. Publish it again."
    effect = apart(recorded[0], recorded[1])
    allowed = 3 * apart(base, recorded[1]) + ROUNDING + SHARE * effect
    seen = apart(served, recorded[0])
    if seen > allowed:
        return (
            f"It does not answer as it did when it was published: log-probabilities of a fixed text differ by "
            f"{seen:.3g} on average, where {allowed:.3g} is allowed. The base, the weights or their configuration "
            "are not those it was trained with."
        )
    return ""


def apart(left: Sequence[float], right: Sequence[float]) -> float:
    """The mean absolute difference."""
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / max(1, len(left))
