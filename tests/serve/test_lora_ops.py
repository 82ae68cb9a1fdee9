"""The grouped LoRA operators against a loop over rows, against vLLM's own class, and as a plugin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve import lora_ops
from serve.lora_ops import Groups, expand, group, linear, shrink

SLOTS, RANK, IN = 3, 4, 20
WIDTHS = (12, 6, 6)

# Each is a step's mapping from rows to slots; -1 is the base.
MAPPINGS = {
    "one adapter": [1] * 7,
    "one row": [2],
    "one base row": [-1],
    "all base": [-1] * 5,
    "adapters in a row": [0, 0, 0, 2, 2, 1],
    "base between": [0, 0, -1, -1, 2, -1],
    "interleaved": [2, -1, 0, 2, 1, -1, 0, 0, -1, 2],
    "base first and last": [-1, 1, 1, -1],
    "last slot only, interleaved with base": [-1, 2, -1, 2],
}
mappings = pytest.mark.parametrize("indices", MAPPINGS.values(), ids=MAPPINGS.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def stack(out: int, inside: int, dtype: torch.dtype, four: bool = True) -> torch.Tensor:
    weights = torch.randn(SLOTS, out, inside, dtype=torch.float64).to(dtype)
    return weights.unsqueeze(1) if four else weights


def plain(stacked: torch.Tensor, slot: int) -> torch.Tensor:
    """The slot's matrix in double precision."""
    return stacked.reshape(SLOTS, *stacked.shape[-2:])[slot].double()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.15}[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@mappings
def test_groups_hold_every_adapter_row_once_and_no_base_row(indices: list[int]) -> None:
    groups = group(indices)
    seen = {}
    for slot, start, stop in groups.segments:
        rows = range(start, stop) if groups.rows is None else groups.rows[start:stop].tolist()
        for row in rows:
            assert row not in seen
            seen[row] = slot
    assert seen == {row: slot for row, slot in enumerate(indices) if slot >= 0}
    assert groups.count == len(indices)
    assert len(groups.segments) == len({slot for slot in indices if slot >= 0})  # one product per adapter present


@mappings
@dtypes
@pytest.mark.parametrize("four", [True, False])
def test_shrink_equals_a_loop_over_rows(indices: list[int], dtype: torch.dtype, four: bool) -> None:
    x, a = torch.randn(len(indices), IN).to(dtype), stack(RANK, IN, dtype, four)
    y = torch.full((len(indices), RANK + 2), 7.0)  # the buffer is float32 in vLLM, and may be wider than the rank
    shrink(y, x, a, group(indices), 0.5)
    expected = torch.full((len(indices), RANK + 2), 7.0, dtype=torch.float64)
    for row, slot in enumerate(indices):
        expected[row, :RANK] = 0.5 * plain(a, slot) @ x[row].double() if slot >= 0 else 0.0
    close(y, expected)


@mappings
@dtypes
@pytest.mark.parametrize("add_inputs", [True, False])
@pytest.mark.parametrize("offset", [0, 3])
def test_expand_equals_a_loop_over_rows(indices: list[int], dtype: torch.dtype, add_inputs: bool, offset: int) -> None:
    parts = [torch.randn(len(indices), RANK) for _ in WIDTHS]
    stacks = [stack(width, RANK, dtype) for width in WIDTHS]
    before = torch.randn(len(indices), offset + sum(WIDTHS) + 1).to(dtype)
    y = before.clone()
    expand(y, parts, stacks, WIDTHS, offset, group(indices), add_inputs=add_inputs)
    expected = before.double()
    for row, slot in enumerate(indices):
        at = offset
        for part, b, width in zip(parts, stacks, WIDTHS, strict=True):
            if slot >= 0:
                delta = plain(b, slot) @ part[row].to(dtype).double()
                expected[row, at : at + width] = delta + (expected[row, at : at + width] if add_inputs else 0.0)
            at += width
    close(y, expected)
    base = [row for row, slot in enumerate(indices) if slot < 0]
    assert torch.equal(y[base], before[base])


@mappings
@dtypes
@pytest.mark.parametrize("widths", [WIDTHS, (16,)])
def test_linear_equals_a_loop_over_rows_and_leaves_base_rows_alone(
    indices: list[int], dtype: torch.dtype, widths: tuple[int, ...]
) -> None:
    x = torch.randn(len(indices), IN).to(dtype)
    a, b = [stack(RANK, IN, dtype) for _ in widths], [stack(width, RANK, dtype) for width in widths]
    before = torch.randn(len(indices), sum(widths)).to(dtype)
    y = before.clone()
    linear(y, x, a, b, 2.0, widths, group(indices))
    expected = before.double()
    for row, slot in enumerate(indices):
        at = 0
        for a_stack, b_stack, width in zip(a, b, widths, strict=True):
            if slot >= 0:
                expected[row, at : at + width] += 2.0 * plain(b_stack, slot) @ plain(a_stack, slot) @ x[row].double()
            at += width
    if dtype == torch.bfloat16:  # sums of 20 x 4 products of size one
        torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.5)
    else:
        close(y, expected)
    base = [row for row, slot in enumerate(indices) if slot < 0]
    assert torch.equal(y[base], before[base])


def test_expand_writes_only_the_columns_that_output_and_weights_share() -> None:
    """The model and the adapter may pad the vocabulary differently."""
    b = stack(10, RANK, torch.float32)
    for columns in (8, 12):
        y, part = torch.zeros(2, columns), torch.randn(2, RANK)
        expand(y, [part], [b], [10], 0, group([0, 1]))
        shared = min(10, columns)
        torch.testing.assert_close(y[:, :shared], torch.stack([b[i, 0, :shared] @ part[i] for i in (0, 1)]))
        assert not y[:, shared:].any()


def test_one_index_stands_for_all_rows_and_other_mismatches_are_errors() -> None:
    x, a = torch.randn(5, IN), stack(RANK, IN, torch.float32)
    y = torch.empty(5, RANK)
    shrink(y, x, a, group([1]), 1.0)
    torch.testing.assert_close(y, x @ a[1, 0].T)
    with pytest.raises(ValueError, match="5 rows"):
        shrink(y, x, a, group([1, 0]), 1.0)


def mapping(rows: list[int], samples: list[int]) -> Any:
    """vLLM's mapping: adapter ids, of which slot i has id i + 1; 0 is the base."""
    return SimpleNamespace(
        index_mapping=tuple(slot + 1 for slot in rows),
        prompt_mapping=tuple(slot + 1 for slot in samples),
        is_prefill=len(rows) != len(samples),
    )


@pytest.fixture
def wrappers(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """vLLM's CPU wrapper (vLLM's mistake and all) and ours."""
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    punica_cpu = pytest.importorskip("vllm.lora.punica_wrapper.punica_cpu")
    original = punica_cpu.PunicaWrapperCPU
    while original.__name__ == "GroupedPunicaWrapperCPU":
        original = original.__mro__[1]
    made = lora_ops._wrapper(original)
    return original(64, 64, torch.device("cpu")), made(64, 64, torch.device("cpu"))


# vLLM's own operators are right where no row is the base's.
@pytest.mark.parametrize("rows", [[1], [0, 0, 0], [2, 0, 1, 1, 0]])
@pytest.mark.parametrize("prefill", [True, False])
def test_the_wrapper_agrees_with_vllm_where_vllm_is_right(
    wrappers: tuple[Any, Any], rows: list[int], prefill: bool
) -> None:
    if prefill:
        rows = [slot for slot in rows for _ in range(3)]
    samples = rows[::3] if prefill else rows
    x = torch.randn(len(rows), IN)
    a = tuple(stack(RANK, IN, torch.float32) for _ in WIDTHS)
    b = tuple(stack(width, RANK, torch.float32) for width in WIDTHS)
    head_a, head_b = stack(RANK, IN, torch.float32), stack(30, RANK, torch.float32)
    start, logits = torch.randn(len(rows), sum(WIDTHS)), torch.randn(len(samples), 30)
    results = []
    for wrapper in wrappers:
        wrapper.update_metadata(mapping(rows, samples), [1, 2, 3], SLOTS + 1, 100)
        fused, two_steps, embedded, head = start.clone(), start.clone(), start.clone(), logits.clone()
        wrapper.add_lora_linear(fused, x, a, b, 1.5, WIDTHS)
        buffer = torch.zeros(len(WIDTHS), len(rows), RANK)
        wrapper.add_shrink(buffer, x, a, 1.5)
        wrapper.add_expand(two_steps, buffer, b, WIDTHS, offset_start=0, add_input=True)
        wrapper.add_lora_embedding(embedded, buffer[0], stack_of(b[0], sum(WIDTHS)), add_input=True)
        wrapper.add_lora_logits(head, x[: len(samples)], head_a, head_b, 1.0)
        results.append((fused, two_steps, buffer, embedded, head))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def stack_of(b: torch.Tensor, width: int) -> torch.Tensor:
    """B repeated downwards to the given width."""
    return b.repeat(1, 1, -(-width // b.shape[2]), 1)[:, :, :width].contiguous()


@pytest.mark.parametrize("prefill", [True, False])
def test_base_rows_of_a_mixed_batch_are_bit_for_bit_those_without_lora(
    wrappers: tuple[Any, Any], prefill: bool
) -> None:
    samples = [-1, 2, -1, 0, 2]
    rows = [slot for slot in samples for _ in range(4)] if prefill else samples
    x, start = torch.randn(len(rows), IN), torch.randn(len(rows), sum(WIDTHS))
    a = tuple(stack(RANK, IN, torch.float32) for _ in WIDTHS)
    b = tuple(stack(width, RANK, torch.float32) for width in WIDTHS)
    base = [row for row, slot in enumerate(rows) if slot < 0]
    wrong, right = (start.clone() for _ in wrappers)
    for wrapper, y in zip(wrappers, (wrong, right), strict=True):
        wrapper.update_metadata(mapping(rows, samples), [1, 2, 3], SLOTS + 1, 100)
        wrapper.add_lora_linear(y, x, a, b, 1.0, WIDTHS)
    assert torch.equal(right[base], start[base])
    assert not torch.allclose(wrong[base], start[base])  # the mistake that this plugin is for

    # The same request alone: the same, to rounding.
    alone = start.clone()
    row = rows.index(2)
    right_wrapper = wrappers[1]
    right_wrapper.update_metadata(mapping([2], [2]), [1, 2, 3], SLOTS + 1, 100)
    right_wrapper.add_lora_linear(alone[row : row + 1], x[row : row + 1], a, b, 1.0, WIDTHS)
    torch.testing.assert_close(alone[row], right[row], rtol=1e-5, atol=1e-5)


def test_a_fully_replaced_head_keeps_base_rows(wrappers: tuple[Any, Any]) -> None:
    """`apply_lora_full_linear`: adapters that bring a whole classification head."""
    slots = [-1, 1, 0]
    x, start = torch.randn(3, IN), torch.randn(3, 5)
    weight, bias = stack(5, IN, torch.float32), torch.randn(SLOTS, 5)
    enabled = torch.tensor([True, True, False])
    wrapper = wrappers[1]
    wrapper.update_metadata(mapping(slots, slots), [1, 2, 3], SLOTS + 1, 100)
    y = start.clone()
    wrapper.apply_lora_full_linear(y, x, weight, bias, enabled)
    expected = torch.stack([start[0], weight[1, 0] @ x[1] + bias[1], weight[0, 0] @ x[2] + bias[0]])
    torch.testing.assert_close(y, expected)


def test_register_replaces_once_and_only_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    punica_cpu = pytest.importorskip("vllm.lora.punica_wrapper.punica_cpu")
    platforms = pytest.importorskip("vllm.platforms")
    original = punica_cpu.PunicaWrapperCPU
    monkeypatch.setattr(punica_cpu, "PunicaWrapperCPU", original)  # put back after the test
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_cpu=lambda: False), raising=False)
    lora_ops.register()
    assert punica_cpu.PunicaWrapperCPU is original

    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_cpu=lambda: True), raising=False)

    class Changed(original):  # type: ignore[misc, valid-type]
        def add_shrink(self, y: Any, x: Any, weights: Any) -> None: ...

    monkeypatch.setattr(punica_cpu, "PunicaWrapperCPU", Changed)
    with pytest.raises(RuntimeError, match=r"add_shrink has other parameters.*Known to work: vLLM 0\.32\.0") as told:
        lora_ops.register()
    assert "\n" not in str(told.value)
    assert punica_cpu.PunicaWrapperCPU is Changed
    with monkeypatch.context() as gone:
        gone.delattr(punica_cpu, "PunicaWrapperCPU")
        with pytest.raises(RuntimeError, match="Known to work"):
            lora_ops.register()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(platforms, "current_platform", SimpleNamespace(is_cpu=lambda: False), raising=False)
        lora_ops.register()  # a changed wrapper is nothing to a GPU
    assert punica_cpu.PunicaWrapperCPU is Changed

    monkeypatch.setattr(punica_cpu, "PunicaWrapperCPU", original)
    lora_ops.register()
    replaced = punica_cpu.PunicaWrapperCPU
    assert replaced is not original and issubclass(replaced, original)
    lora_ops.register()
    assert punica_cpu.PunicaWrapperCPU is replaced


def test_vllm_does_not_start_where_the_operators_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM passes on what a plugin raises, and does not merely log it."""
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    punica_cpu = pytest.importorskip("vllm.lora.punica_wrapper.punica_cpu")
    plugins = pytest.importorskip("vllm.plugins")
    platforms = pytest.importorskip("vllm.platforms")
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_cpu=lambda: True), raising=False)
    monkeypatch.setattr(punica_cpu, "PunicaWrapperCPU", type("PunicaWrapperCPU", (), {}))
    monkeypatch.setattr(plugins, "plugins_loaded", False)
    monkeypatch.setattr(plugins, "load_plugins_by_group", lambda group: {"lit_ft_lora_ops": lora_ops.register})
    with pytest.raises(RuntimeError, match="update_metadata is gone"):
        plugins.load_general_plugins()


def test_an_empty_plan_touches_nothing() -> None:
    y = torch.randn(3, 5)
    before = y.clone()
    linear(y, torch.randn(3, IN), [stack(RANK, IN, torch.float32)], [stack(5, RANK, torch.float32)], 1.0, [5],
           Groups(3, (), None))  # fmt: skip
    assert torch.equal(y, before)
