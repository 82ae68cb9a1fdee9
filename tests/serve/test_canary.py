"""The canary: which log-probabilities mean that the engine serves what was trained; expected values by hand."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from lit_ft.errors import UserError
from serve.canary import FALLBACK_TOKENS, apart, judge, objection
from serve.client import ChatError, EngineClient
from tests.serve.published import CANARY, adapter
from tests.serve.stub_engine import API_KEY, running

BASE = [-2.0, -3.0, -4.0, -5.0]
TRAINED = [-1.0, -2.5, -4.5, -5.0]  # its effect: (1 + 0.5 + 0.5 + 0) / 4 = 0.5


def off(values: Sequence[float], by: float) -> list[float]:
    """Every value differs by `by`, up and down in turn."""
    return [value + (by if i % 2 else -by) for i, value in enumerate(values)]


def test_the_mean_difference() -> None:
    assert apart(TRAINED, BASE) == 0.5
    assert apart([], []) == 0.0
    with pytest.raises(ValueError):
        apart([1.0], [])


def test_what_was_recorded_is_accepted() -> None:
    assert judge(TRAINED, BASE, (TRAINED, BASE)) == ""


def test_the_same_as_the_base_is_no_adapter() -> None:
    assert "exactly what it computes without it" in judge(BASE, BASE, (TRAINED, BASE))
    assert "exactly what it computes without it" in judge(off(BASE, 9e-6), BASE)
    assert judge(off(BASE, 1.1e-5), BASE) == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(value: float) -> None:
    assert "not finite" in judge([*TRAINED[:3], value], BASE, (TRAINED, BASE))
    assert "not finite" in judge([*TRAINED[:3], value], BASE)
    assert "Without any adapter" in judge(TRAINED, [*BASE[:3], value], (TRAINED, BASE))


def test_the_tolerance_is_of_rounding_and_a_share_of_the_effect() -> None:
    # The base agrees, so 0.002 + 0.15 * 0.5 = 0.077 is allowed.
    assert judge(off(TRAINED, 0.0769), BASE, (TRAINED, BASE)) == ""
    reason = judge(off(TRAINED, 0.0771), BASE, (TRAINED, BASE))
    assert "differ by 0.0771 on average, where 0.077 is allowed" in reason


def test_half_precision_is_allowed_three_times_what_the_base_shows() -> None:
    # The base differs by 0.02: 3 * 0.02 + 0.002 + 0.15 * 0.5 = 0.137.
    base = off(BASE, 0.02)
    assert judge(off(TRAINED, 0.1369), base, (TRAINED, BASE)) == ""
    assert "0.137 is allowed" in judge(off(TRAINED, 0.1371), base, (TRAINED, BASE))


@pytest.mark.parametrize("seed", range(20))
def test_noise_as_of_bfloat16_on_both_is_tolerated(seed: int) -> None:
    draw = random.Random(seed)
    base = [draw.uniform(-12, 0) for _ in range(47)]
    trained = [value + draw.gauss(0, 0.05) for value in base]
    # bfloat16 keeps 8 bits, so logits of about 16 are off by some hundredths.
    noisy = [[value + draw.gauss(0, 0.03) for value in values] for values in (trained, base)]
    assert judge(noisy[0], noisy[1], (trained, base)) == ""


def test_another_adapter_is_refused() -> None:
    other = [-3.0, -3.5, -3.5, -5.0]  # as far from the base, the other way round: differs by 2 * 0.5 = 1
    assert "does not answer as it did" in judge(other, BASE, (TRAINED, BASE))


def test_another_base_is_not_excused_by_its_difference() -> None:
    # Everything 1 lower: the base shows 1, so 3 is allowed; the adapter is 5 off.
    assert "does not answer" in judge(off(TRAINED, 5.0), off(BASE, 1.0), (TRAINED, BASE))


def test_a_tiny_effect_is_accepted_within_rounding_and_refused_if_it_is_none() -> None:
    trained = off(BASE, 0.0005)
    assert judge(off(BASE, 0.0004), BASE, (trained, BASE)) == ""
    assert "exactly what it computes without it" in judge(BASE, BASE, (trained, BASE))


def test_a_card_without_a_canary_is_compared_with_the_base_alone() -> None:
    assert judge(off(BASE, 5.0), BASE) == ""


@pytest.mark.parametrize("recorded", [(TRAINED[:3], BASE), (TRAINED, BASE[:3]), ([], []), (TRAINED * 2, BASE)])
def test_lengths_that_do_not_fit(recorded: tuple[list[float], list[float]]) -> None:
    assert "does not fit its own tokens" in judge(TRAINED, BASE, recorded)


# --- asked of an engine ----------------------------------------------------------------------------------------------


def ask(tmp_path: Path, logprobs: dict[str, list[float]], canary: object, times: int = 1) -> tuple[str, int]:
    """The objection, and how many texts were scored."""
    made = adapter(tmp_path, canary=canary)
    scored = []

    async def task() -> str:
        client = EngineClient(stub.base_url, API_KEY)
        known: dict[tuple[int, ...], list[float]] = {}

        class Counting:
            async def logprobs(self, model: str, tokens: Sequence[int]) -> list[float]:
                scored.append(model)
                return await client.logprobs(model, tokens)

        try:
            return [await objection(Counting(), made, "base", known) for _ in range(times)][-1]
        finally:
            await client.close()

    with running(["base", "support@v1"], logprobs=logprobs) as stub:
        return asyncio.run(asyncio.wait_for(task(), 20)), len(scored)


def test_the_engine_agrees(tmp_path: Path) -> None:
    served = {"base": CANARY["base_logprobs"], "support@v1": CANARY["logprobs"]}
    assert ask(tmp_path, served, CANARY, times=3) == ("", 1 + 3), "the base is scored once for all"


def test_the_engine_disagrees(tmp_path: Path) -> None:
    reason, _ = ask(tmp_path, {"base": CANARY["base_logprobs"], "support@v1": [-9.0, -9.0]}, CANARY)
    assert "does not answer as it did" in reason


def test_the_engine_serves_the_base_in_its_place(tmp_path: Path) -> None:
    same = {"base": CANARY["base_logprobs"], "support@v1": CANARY["base_logprobs"]}
    assert "exactly what" in ask(tmp_path, same, CANARY)[0]


def test_an_old_card(tmp_path: Path) -> None:
    count = len(FALLBACK_TOKENS) - 1
    assert ask(tmp_path / "a", {"base": [-1.0] * count, "support@v1": [-1.5] * count}, None) == ("", 2)
    assert "exactly" in ask(tmp_path / "b", {"base": [-1.0] * count, "support@v1": [-1.0] * count}, None)[0]


def test_a_model_that_the_engine_does_not_know(tmp_path: Path) -> None:
    made = adapter(tmp_path, "other", canary=CANARY)

    async def task() -> None:
        client = EngineClient(stub.base_url, API_KEY)
        try:
            with pytest.raises(ChatError, match="could not score a text with other@v1"):
                await objection(client, made, "base", {})
        finally:
            await client.close()

    with running(["base"]) as stub:
        asyncio.run(task())
    with pytest.raises(UserError):
        asyncio.run(task())  # nobody listens there now
