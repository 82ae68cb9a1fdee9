"""The grouped LoRA operators against a loop over rows, against vLLM's own class, and as a plugin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve import lora_ops
from serve.lora_ops import Groups, Layer, expand, group, join, linear, shrink

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
    linear(y, x, Layer(a, b, widths), 2.0, group(indices))
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
        wrapper.add_lora_logits(head, x[: len(samples)].clone(), head_a, head_b, 1.0)
        results.append((fused, two_steps, buffer, embedded, head))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("piece", [slice(0, 5), slice(5, 9), slice(3, 4), slice(2, 8)])
def test_the_head_of_a_prompts_rows_takes_the_adapter_of_those_rows(wrappers: tuple[Any, Any], piece: slice) -> None:
    """For the log-probabilities of a prompt vLLM passes a slice of the step's tokens, as many as it likes."""
    rows, samples = [2, 2, 2, 2, 2, 0, 0, -1, 1], [2, 0, -1, 1]
    x, logits = torch.randn(len(rows), IN), torch.randn(len(rows), 30)
    head_a, head_b = stack(RANK, IN, torch.float32), stack(30, RANK, torch.float32)
    wrapper = wrappers[1]
    wrapper.update_metadata(mapping(rows, samples), [1, 2, 3], SLOTS + 1, 100)
    found = logits[piece].clone()
    wrapper.add_lora_logits(found, x[piece], head_a, head_b, 0.5)
    expected = logits.clone()
    for i, slot in enumerate(rows):
        if slot >= 0:
            expected[i] += (0.5 * plain(head_b, slot) @ plain(head_a, slot) @ x[i].double()).float()
    torch.testing.assert_close(found, expected[piece], rtol=2e-5, atol=2e-5)
    # The requests' own rows are gathered, and are mapped as requests.
    last = torch.tensor([4, 6, 7, 8])
    sampled = logits[last].clone()
    wrapper.add_lora_logits(sampled, x[last], head_a, head_b, 0.5)
    torch.testing.assert_close(sampled, expected[last], rtol=2e-5, atol=2e-5)


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
    linear(y, torch.randn(3, IN), layer(widths=(5,)), 1.0, Groups(3, (), None))
    assert torch.equal(y, before)


def layer(widths: tuple[int, ...] = WIDTHS, dtype: torch.dtype = torch.float32) -> Layer:
    """A layer with full stacks, as vLLM makes them."""
    return Layer([stack(RANK, IN, dtype) for _ in widths], [stack(width, RANK, dtype) for width in widths], widths)


def dense(of: Layer, slot: int) -> torch.Tensor:
    """What the slot's adapter adds to the layer's weight, (out, in), in double precision."""
    return torch.cat([plain(b, slot) @ plain(a, slot) for a, b in zip(of.a, of.b, strict=True)])


def agrees(of: Layer, indices: list[int]) -> None:
    """A step with these rows gives what the stacks hold now."""
    x, before = torch.randn(len(indices), IN), torch.randn(len(indices), of.width)
    y = before.clone()
    linear(y, x, of, 1.0, group(indices))
    for row, slot in enumerate(indices):
        expected = before[row].double() + (dense(of, slot) @ x[row].double() if slot >= 0 else 0.0)
        torch.testing.assert_close(y[row].double(), expected, rtol=2e-5, atol=2e-5)
        if slot < 0:
            assert torch.equal(y[row], before[row])


MIXED = [2, -1, 0, 2, 1, -1, 0, 0, -1, 2, 1, 1, 1]


def write(of: Layer, slot: int, rank: int, *, slices: tuple[int, ...] = (0, 1, 2)) -> None:
    """Another adapter in the slot, as vLLM's set_lora writes it: zeros, then the adapter's own part."""
    for i, (a, b) in enumerate(zip(of.a, of.b, strict=True)):
        a[slot] = 0
        b[slot] = 0
        if i in slices:
            a[slot, 0, :rank, :IN].copy_(torch.randn(rank, IN), non_blocking=True)
            b[slot, 0, : b.shape[2], :rank].copy_(torch.randn(b.shape[2], rank), non_blocking=True)


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_a_slot_that_gets_another_adapter_is_never_served_with_the_old_one(inference: bool) -> None:
    """vLLM writes into the stacks in place, some of it in inference mode."""
    made = layer()
    agrees(made, MIXED)
    with torch.inference_mode(inference):
        write(made, 0, RANK)
        agrees(made, MIXED)
        write(made, 0, 1, slices=(1,))
        agrees(made, MIXED)
        # One write into one slice, without the zeros before it.
        made.b[2][1, 0, 3, 2] += 1.0
        agrees(made, MIXED)


def test_an_unloaded_adapter_adds_nothing_and_its_slot_can_be_used_again() -> None:
    made = layer()
    agrees(made, [1] * 3)
    for stacked in (*made.a, *made.b):
        stacked[1] = 0  # reset_lora
    assert made.weights(1, torch.float32) is None
    y = torch.randn(5, made.width)
    before = y.clone()
    linear(y, torch.randn(5, IN), made, 1.0, group([1] * 5))
    assert torch.equal(y, before)
    agrees(made, MIXED)  # beside others that are loaded
    write(made, 1, 2)
    agrees(made, MIXED)


@pytest.mark.parametrize("rows", [1, 3, 9], ids=["one row", "few rows", "many rows"])
def test_adapters_of_other_ranks_and_slices_share_a_layer(rows: int) -> None:
    made = layer()
    write(made, 0, 1)
    write(made, 1, 3, slices=(0, 2))
    write(made, 2, RANK, slices=(1,))
    for slot in range(SLOTS):
        agrees(made, [slot] * rows)
    agrees(made, [0, 1, 2] * rows)
    agrees(made, [-1, 2, 1, 0] * rows)


def test_joined_weights_hold_the_adapters_own_ranks_only() -> None:
    made = layer()
    write(made, 0, 2, slices=(0, 2))
    weights = made.weights(0, torch.float32)
    assert weights is not None
    assert weights.a.shape == (IN, 4) and weights.b.shape == (4, sum(WIDTHS))  # two slices of rank 2
    assert [columns for _, columns, _ in weights.blocks] == [slice(0, 12), slice(18, 24)]
    torch.testing.assert_close((weights.a @ weights.b).T.double(), dense(made, 0), rtol=1e-5, atol=1e-5)
    assert made.weights(0, torch.float32) is weights  # joined once


def test_a_rank_adds_nothing_if_a_or_b_is_zero_and_nan_is_not_zero() -> None:
    a, b = stack(RANK, IN, torch.float32), stack(5, RANK, torch.float32)
    b[0, 0, :, 1] = 0
    a[0, 0, 2] = 0
    b[1] = 0  # an adapter at the start of its training
    a[2, 0, 0, 0] = torch.nan
    kept = join([a], [b], [5], 0, torch.float32)
    assert kept is not None and torch.equal(kept.a.T, a[0, 0, [0, 3]])
    assert join([a], [b], [5], 1, torch.float32) is None
    y = torch.zeros(1, 5)
    linear(y, torch.randn(1, IN), Layer([a], [b], [5]), 1.0, group([2]))
    assert y.isnan().all()


def test_weights_are_kept_for_each_type_of_output() -> None:
    made = layer(dtype=torch.bfloat16)
    x = torch.randn(2, IN)
    for dtype, tolerance in (
        (torch.float32, 2e-5),
        (torch.float64, 1e-12),
        (torch.bfloat16, 0.1),
        (torch.float32, 2e-5),
    ):
        y = torch.zeros(2, made.width, dtype=dtype)
        linear(y, x.to(dtype), made, 1.0, group([0, 0]))
        expected = x.to(dtype).double() @ dense(made, 0).T
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=10 * tolerance)


def test_stacks_whose_writes_are_not_counted_are_read_each_time() -> None:
    with torch.inference_mode():
        made = layer()
        agrees(made, MIXED)
        write(made, 0, RANK)
        agrees(made, MIXED)


def test_logits_follow_the_requests_and_skip_adapters_without_a_head(wrappers: tuple[Any, Any]) -> None:
    """Each request has one row here, whatever the number of its tokens; the model may pad the vocabulary."""
    wrapper = wrappers[1]
    a, b = stack(RANK, IN, torch.float32), stack(30, RANK, torch.float32)
    b[0] = 0
    x = torch.randn(4, IN)
    wrapper.update_metadata(mapping([0, 0, 0, -1, 1, 1, 2], [0, -1, 1, 2]), [1, 2, 3], SLOTS + 1, 100)
    for columns in (28, 30, 32):
        logits = torch.randn(4, columns)
        y = logits.clone()
        wrapper.add_lora_logits(y, x, a, b, 1.0)
        shared = min(30, columns)
        for row, slot in ((2, 1), (3, 2)):
            expected = logits[row, :shared] + b[slot, 0, :shared] @ (a[slot, 0] @ x[row])
            torch.testing.assert_close(y[row, :shared], expected, rtol=2e-5, atol=2e-5)
        assert torch.equal(y[:2], logits[:2]) and torch.equal(y[:, shared:], logits[:, shared:])


def test_vllms_own_layers_and_slots(wrappers: tuple[Any, Any]) -> None:
    """Through the code that vLLM itself writes adapters with: set_lora and reset_lora of a merged layer."""
    layers = pytest.importorskip("vllm.lora.layers.column_parallel_linear")
    merged = layers.MergedColumnParallelLinearWithLoRA.__new__(layers.MergedColumnParallelLinearWithLoRA)
    torch.nn.Module.__init__(merged)
    merged.n_slices, merged.tp_size = len(WIDTHS), 1
    merged.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, RANK, IN) for _ in WIDTHS)
    merged.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, width, RANK) for width in WIDTHS)
    wrapper = wrappers[1]
    rows = [0, -1, 0]
    wrapper.update_metadata(mapping(rows, rows), [1, None, None], SLOTS + 1, 100)

    def step() -> torch.Tensor:
        y = torch.zeros(3, sum(WIDTHS))
        wrapper.add_lora_linear(y, torch.ones(3, IN), merged.lora_a_stacked, merged.lora_b_stacked, 1.0, WIDTHS)
        return y

    assert not step().any()
    for rank in (2, 4, 1):  # three adapters, one after another, in the same slot
        a = [torch.randn(rank, IN), None, torch.randn(rank, IN)]
        b = [torch.randn(WIDTHS[0], rank), None, torch.randn(WIDTHS[2], rank)]
        with torch.inference_mode():
            merged.set_lora(0, a, b)
            y = step()
        expected = torch.cat([b[0] @ a[0].sum(1), torch.zeros(WIDTHS[1]), b[2] @ a[2].sum(1)])
        torch.testing.assert_close(y[0], expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(y[2], expected, rtol=2e-5, atol=2e-5)
        assert not y[1].any()
    merged.reset_lora(0)
    assert not step().any()
