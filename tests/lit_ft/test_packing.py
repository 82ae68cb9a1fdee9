"""Batches: the packed and the padded layout by hand, and how examples are divided into them."""

from __future__ import annotations

import random

import pytest
import torch

from lit_ft.batches import Batch, Completion, Example, Segment, pack, pad
from lit_ft.data.packing import Layout, lay_out, share_by_tokens, split_by_tokens

# A prompt of two with completions of two and one (the first token of the first is not trained on), then one of one.
PAIR = Example(
    (10, 11), (Completion((20, 21), (False, True)), Completion((30,), (True,))), index=5, reference=(-1.0, -2.0)
)
SINGLE = Example((40,), (Completion((50, 51), (True, True)),), index=6, reference=(-3.0,))


def example(prompt: int, *completions: int, index: int = 0) -> Example:
    return Example((1,) * prompt, tuple(Completion((2,) * n, (True,) * n) for n in completions), index)


def some_examples(seed: int, count: int) -> list[Example]:
    draw = random.Random(seed)
    return [
        example(draw.randint(1, 30), *(draw.randint(1, 40) for _ in range(draw.choice((1, 2)))), index=k)
        for k in range(count)
    ]


def test_a_packed_row_by_hand() -> None:
    batch = pack([PAIR, SINGLE])
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 30, 40, 50, 51]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2]]  # each completion goes on from its prompt
    assert batch.attention_mask is None
    assert batch.segments == (Segment(0, 2, (4, 5)), Segment(5, 6, (8,)))
    assert batch.target_ids.tolist() == [21, 30, 50, 51]
    assert batch.target_sources.tolist() == [2, 1, 5, 6]  # 30 is foretold by the end of the prompt
    assert batch.target_completion.tolist() == [0, 1, 2, 2]
    assert batch.completion_lengths.tolist() == [1, 1, 2]
    assert batch.completions_per_example.tolist() == [2, 1]
    assert batch.examples.tolist() == [5, 6]
    assert batch.reference is not None and batch.reference.tolist() == [-1.0, -2.0, -3.0]
    assert batch.tokens == 4 + 3 + 3  # the shared prompt counts with each completion
    assert (batch.num_completions, batch.num_examples) == (3, 2)


@pytest.mark.parametrize("extra", [0, 3])
def test_padded_rows_by_hand(extra: int) -> None:
    batch = pad([PAIR, SINGLE], pad_id=99, extra=extra)
    fill = [99] * extra
    width = 4 + extra
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, *fill], [10, 11, 30, 99, *fill], [40, 50, 51, 99, *fill]]
    assert batch.position_ids.tolist() == [list(range(width))] * 3
    none = [0] * extra
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, *none], [1, 1, 1, 0, *none], [1, 1, 1, 0, *none]]
    assert batch.segments is None
    assert batch.target_ids.tolist() == [21, 30, 50, 51]
    assert batch.target_sources.tolist() == [2, width + 1, 2 * width, 2 * width + 1]
    assert batch.tokens == 10


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_first_token_without_a_prompt_is_no_target(layout: Layout) -> None:
    bare = Example((), (Completion((7, 8, 9), (True, True, True)),))
    batch = lay_out([SINGLE, bare], layout, pad_id=0)
    assert batch.target_ids.tolist() == [50, 51, 8, 9]
    assert batch.completion_lengths.tolist() == [2, 2]
    assert bare.targets == 2
    flat = batch.input_ids.flatten()
    assert flat[batch.target_sources].tolist() == [40, 50, 7, 8]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_targets_follow_their_sources_in_every_layout(layout: Layout) -> None:
    """Distinct ids, so that the token before each target can be told from the examples alone."""
    fresh = iter(range(1, 10_000))
    draw = random.Random(0)
    examples = []
    expected: list[tuple[int, int]] = []
    for index in range(20):
        prompt = tuple(next(fresh) for _ in range(draw.randint(1, 9)))
        completions = []
        for _ in range(2):
            ids = tuple(next(fresh) for _ in range(draw.randint(1, 9)))
            mask = tuple(draw.random() < 0.6 for _ in ids)
            completions.append(Completion(ids, mask))
            before = (prompt[-1], *ids)
            expected += [(before[k], ids[k]) for k in range(len(ids)) if mask[k]]
        examples.append(Example(prompt, tuple(completions), index))
    batch = lay_out(examples, layout, pad_id=0)
    sources = batch.input_ids.flatten()[batch.target_sources].tolist()
    assert list(zip(sources, batch.target_ids.tolist(), strict=True)) == expected
    assert len(expected) == sum(one.targets for one in examples) == int(batch.completion_lengths.sum())


def test_references_are_all_or_none() -> None:
    assert pack([PAIR, example(1, 1)]).reference is None
    assert pack([example(1, 1)]).reference is None


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a completion of 2 ids has a mask of 1"):
        Completion((1, 2), (True,))


def test_to_moves_every_tensor() -> None:
    moved = pad([PAIR], 0).to("meta")
    tensors = [value for value in moved.__dict__.values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 10
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.tokens == 7


def test_packing_by_hand() -> None:
    """Best fit, longest first: 9 alone; 8; 5; 4 beside the 5 (room 5, not 2); 2 beside the 8; 1 beside 9."""
    examples = [example(1, n - 1, index=k) for k, n in enumerate((2, 5, 8, 4, 9))] + [example(0, 1, index=5)]
    groups = split_by_tokens(examples, max_tokens=10, layout="packed")
    assert [[one.tokens for one in group] for group in groups] == [[9, 1], [8, 2], [5, 4]]


def test_padding_by_hand() -> None:
    """Like lengths together, each row as wide as the group's longest: 2·9 > 12, 2·5 ≤ 12 but 3·5 > 12."""
    examples = [example(1, n - 1, index=k) for k, n in enumerate((5, 9, 2, 4, 3))]
    groups = split_by_tokens(examples, max_tokens=12, layout="padded")
    assert [[one.longest for one in group] for group in groups] == [[9], [5, 4], [3, 2]]
    # A pair takes two rows.
    pairs = [example(1, 3, 2, index=k) for k in range(3)]
    assert [len(group) for group in split_by_tokens(pairs, max_tokens=16, layout="padded")] == [2, 1]


def cost(group: list[Example], layout: Layout) -> int:
    if layout == "packed":
        return sum(one.tokens for one in group)
    return sum(len(one.completions) for one in group) * max(one.longest for one in group)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("max_tokens", [1, 50, 128, 10_000])
def test_no_batch_is_above_the_budget_and_none_is_lost(layout: Layout, max_tokens: int) -> None:
    for seed in range(10):
        examples = some_examples(seed, 40)
        groups = split_by_tokens(examples, max_tokens, layout)
        assert sorted(one.index for group in groups for one in group) == list(range(40))
        assert all(cost(group, layout) <= max_tokens or len(group) == 1 for group in groups)
        shuffled = random.Random(seed).sample(examples, len(examples))
        assert split_by_tokens(shuffled, max_tokens, layout) == groups  # whatever the order they come in


def test_sharing_by_hand() -> None:
    examples = [example(1, n - 1, index=k) for k, n in enumerate((3, 7, 5, 4))]
    assert [[one.tokens for one in share] for share in share_by_tokens(examples, 2)] == [[7, 3], [5, 4]]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_are_whole_and_even(processes: int) -> None:
    for seed in range(10):
        examples = some_examples(seed, 8 + seed)
        shares = share_by_tokens(examples, processes)
        assert len(shares) == processes
        assert all(shares)
        assert sorted(one.index for share in shares for one in share) == list(range(8 + seed))
        loads = [sum(one.tokens for one in share) for share in shares]
        assert max(loads) - min(loads) <= max(one.tokens for one in examples)


def test_nothing_gives_nothing() -> None:
    for layout in ("packed", "padded"):
        assert split_by_tokens([], 10, layout) == []  # type: ignore[arg-type]
    assert share_by_tokens([], 2) == [[], []]
    assert isinstance(pack([SINGLE]), Batch)
