"""Batches: the packed and the padded layout by hand, and how examples are divided into them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch

from lit_ft.batches import SHARED_FROM, Batch, Completion, Example, Piece, pack, pad
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
    # The prompt, with two completions that go on from it; then a prompt and its only completion in one piece.
    assert batch.pieces == (Piece(0, 2, 5), Piece(2, 4, 4), Piece(4, 5, 5), Piece(5, 8, 8))
    assert batch.target_ids.tolist() == [21, 30, 50, 51]
    assert batch.target_sources.tolist() == [2, 1, 5, 6]  # 30 is foretold by the end of the prompt
    assert batch.target_completion.tolist() == [0, 1, 2, 2]
    assert batch.completion_lengths.tolist() == [1, 1, 2]
    assert batch.completions_per_example.tolist() == [2, 1]
    assert batch.examples.tolist() == [5, 6]
    assert batch.reference is not None and batch.reference.tolist() == [-1.0, -2.0, -3.0]
    assert batch.tokens == 4 + 3 + 3  # the shared prompt counts with each completion
    assert (batch.num_completions, batch.num_examples) == (3, 2)


def trained(*ids: int) -> Completion:
    return Completion(ids, (True,) * len(ids))


COMMON = (1, 2, 3, 4, 5, 6, 7, 8)


def test_a_shared_beginning_by_hand() -> None:
    """The first and the last example begin alike: that stands once, and the one between them lies behind both."""
    first = Example((*COMMON, 9), (trained(20, 21),), index=4)
    between = Example((50,), (trained(51),), index=5)
    last = Example((*COMMON, 10, 11), (trained(30), trained(31, 32)), index=6)
    batch = pack([first, between, last])
    assert batch.input_ids.tolist() == [[*COMMON, 9, 20, 21, 10, 11, 30, 31, 32, 50, 51]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 8, 9, 10, 10, 11, 0, 1]]
    assert batch.pieces == (
        Piece(0, 8, 16),  # what both have in common
        Piece(8, 11, 11),  # the first goes on with 9 20 21
        Piece(11, 13, 16),  # the last with 10 11, and from there
        Piece(13, 14, 14),  # with 30
        Piece(14, 16, 16),  # or with 31 32
        Piece(16, 18, 18),
    )
    # Targets stand in the order of the examples, not of the row.
    assert batch.target_ids.tolist() == [20, 21, 51, 30, 31, 32]
    assert batch.target_sources.tolist() == [8, 9, 16, 12, 12, 14]
    assert batch.target_completion.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.completion_lengths.tolist() == [2, 1, 1, 2]
    assert batch.completions_per_example.tolist() == [1, 1, 2]
    assert batch.examples.tolist() == [4, 5, 6]
    assert batch.tokens == 11 + 2 + 11 + 12  # what is shared counts with each completion


def test_identical_prompts_by_hand() -> None:
    batch = pack([Example(COMMON, (trained(20),)), Example(COMMON, (trained(30, 31),))])
    assert batch.input_ids.tolist() == [[*COMMON, 20, 30, 31]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9]]
    assert batch.pieces == (Piece(0, 8, 11), Piece(8, 9, 9), Piece(9, 11, 11))
    assert batch.target_ids.tolist() == [20, 30, 31]
    assert batch.target_sources.tolist() == [7, 7, 9]  # the end of the prompt foretells both beginnings


@pytest.mark.parametrize("longer_first", [True, False])
def test_a_prompt_that_is_the_beginning_of_another_by_hand(longer_first: bool) -> None:
    longer, shorter = Example((*COMMON, 9, 10), (trained(30),)), Example(COMMON, (trained(20),))
    batch = pack([longer, shorter] if longer_first else [shorter, longer])
    if longer_first:
        assert batch.input_ids.tolist() == [[*COMMON, 9, 10, 30, 20]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 8]]
        assert batch.pieces == (Piece(0, 8, 12), Piece(8, 11, 11), Piece(11, 12, 12))
        assert (batch.target_ids.tolist(), batch.target_sources.tolist()) == ([30, 20], [9, 7])
    else:
        assert batch.input_ids.tolist() == [[*COMMON, 20, 9, 10, 30]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10]]
        assert batch.pieces == (Piece(0, 8, 12), Piece(8, 9, 9), Piece(9, 12, 12))
        assert (batch.target_ids.tolist(), batch.target_sources.tolist()) == ([20, 30], [7, 10])


def test_seven_common_tokens_are_not_shared_and_eight_are() -> None:
    assert SHARED_FROM == 8
    seven, other = Example((*COMMON[:7], 9), (trained(20),)), Example((*COMMON[:7], 10), (trained(30),))
    batch = pack([seven, other])
    assert batch.input_ids.tolist() == [[*COMMON[:7], 9, 20, *COMMON[:7], 10, 30]]
    assert batch.pieces == (Piece(0, 9, 9), Piece(9, 18, 18))
    # Identical prompts of seven are too short as well.
    assert pack([Example(COMMON[:7], (trained(20),))] * 2).pieces == (Piece(0, 8, 8), Piece(8, 16, 16))
    eight, other = Example((*COMMON, 9), (trained(20),)), Example((*COMMON, 10), (trained(30),))
    batch = pack([eight, other])
    assert batch.input_ids.tolist() == [[*COMMON, 9, 20, 10, 30]]
    assert batch.pieces == (Piece(0, 8, 12), Piece(8, 10, 10), Piece(10, 12, 12))


def test_three_levels_by_hand() -> None:
    """A system prompt of three conversations, a first question of two of them, and answers; beside a stranger."""
    question = (11, 12, 13, 14, 15, 16, 17, 18)
    asks_again = Example((*COMMON, *question, 21), (trained(40),))
    stranger = Example((90, 91), (trained(92),))
    asks_once = Example((*COMMON, *question), (trained(50), trained(60, 61)))
    asks_else = Example((*COMMON, 31), (trained(70),))
    batch = pack([asks_again, stranger, asks_once, asks_else])
    assert batch.input_ids.tolist() == [[*COMMON, *question, 21, 40, 50, 60, 61, 31, 70, 90, 91, 92]]
    assert batch.position_ids.tolist() == [[*range(16), 16, 17, 16, 16, 17, 8, 9, 0, 1, 2]]
    assert batch.pieces == (
        Piece(0, 8, 23),  # the system prompt
        Piece(8, 16, 21),  # the question
        Piece(16, 18, 18),  # 21 40
        Piece(18, 19, 19),  # 50
        Piece(19, 21, 21),  # 60 61
        Piece(21, 23, 23),  # 31 70, which has not seen the question
        Piece(23, 26, 26),  # the stranger
    )
    assert batch.target_ids.tolist() == [40, 92, 50, 60, 61, 70]
    assert batch.target_sources.tolist() == [16, 24, 15, 15, 19, 21]


def test_examples_without_a_prompt_by_hand() -> None:
    """Beside a prompt of two examples; their completions are apart, however alike they begin."""
    bare = Example((), (trained(*COMMON, 9), trained(*COMMON, 10)))
    batch = pack([Example(COMMON, (trained(20),)), bare, Example(COMMON, (trained(30),))])
    assert batch.input_ids.tolist() == [[*COMMON, 20, 30, *COMMON, 9, *COMMON, 10]]
    assert batch.position_ids.tolist() == [[*range(8), 8, 8, *range(9), *range(9)]]
    assert batch.pieces == (Piece(0, 8, 10), Piece(8, 9, 9), Piece(9, 10, 10), Piece(10, 19, 19), Piece(19, 28, 28))
    # Nothing foretells the first token of a completion without a prompt.
    assert batch.target_ids.tolist() == [20, *COMMON[1:], 9, *COMMON[1:], 10, 30]
    assert batch.target_sources.tolist() == [7, *range(10, 18), *range(19, 27), 7]


def related_examples(draw: random.Random) -> list[Example]:
    """Prompts that often go on from the beginning of an earlier one; of two letters, so that others agree by chance."""
    prompts: list[tuple[int, ...]] = []
    for _ in range(draw.randint(1, 12)):
        kept: tuple[int, ...] = ()
        if prompts and draw.random() < 0.7:
            earlier = draw.choice(prompts)
            kept = earlier[: draw.randint(0, len(earlier))]
        prompts.append(kept + tuple(draw.randint(1, 2) for _ in range(draw.choice((0, 0, 1, 5, 12, 25)))))
    examples = []
    for index, prompt in enumerate(prompts):
        completions = []
        for _ in range(draw.randint(1, 3)):
            length = draw.randint(1, 10)
            ids = tuple(draw.randint(1, 2) for _ in range(length))
            completions.append(Completion(ids, tuple(draw.random() < 0.7 for _ in ids)))
        examples.append(Example(prompt, tuple(completions), index))
    return examples


def agreement(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many first tokens two prompts have in common."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


RELATED = [related_examples(random.Random(seed)) for seed in range(200)]


def of_all_related(check: Callable[[list[Example]], None]) -> Callable[[int], None]:
    """Tests of twenty groups each: a test apiece would cost pytest more than the checks do."""

    @pytest.mark.parametrize("first", range(0, len(RELATED), 20))
    def test(first: int) -> None:
        for examples in RELATED[first : first + 20]:
            check(examples)

    test.__doc__ = check.__doc__
    return test


def test_related_examples_are_what_they_should_be() -> None:
    """Some rows share nothing, some share at several depths; there are empty prompts and identical ones."""
    depths = []
    for examples in RELATED:
        pieces = pack(examples).pieces or ()
        depths.append(max(sum(a.end <= b.start < a.until for a in pieces) for b in pieces))
    # A prompt with its completions is one level of its own.
    assert {0, 1, 2, 3, 4} <= set(depths)
    prompts = [[example.prompt for example in examples] for examples in RELATED]
    assert any(() in group for group in prompts)
    assert any(len({p for p in group if len(p) >= 8}) < sum(len(p) >= 8 for p in group) for group in prompts)


@of_all_related
def test_every_target_is_foretold_by_exactly_its_own_sequence(examples: list[Example]) -> None:
    """What a target's source sees, by the pieces alone, is the prompt and the completion up to the target."""
    batch = pack(examples)
    assert batch.pieces is not None
    row, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    expected = [
        (number, (example.prompt + answer.ids)[: len(example.prompt) + k], answer.ids[k])
        for number, (example, answer) in enumerate((one, answer) for one in examples for answer in one.completions)
        for k, is_trained in enumerate(answer.mask)
        if is_trained and len(example.prompt) + k > 0
    ]
    found = []
    sources, targets = batch.target_sources.tolist(), batch.target_ids.tolist()
    for number, source, target in zip(batch.target_completion.tolist(), sources, targets, strict=True):
        (own,) = (piece for piece in batch.pieces if piece.start <= source < piece.end)
        above = [piece for piece in batch.pieces if piece.end <= own.start < piece.until]
        seen = [k for piece in above for k in range(piece.start, piece.end)] + list(range(own.start, source + 1))
        assert [positions[k] for k in seen] == list(range(len(seen)))
        found.append((number, tuple(row[k] for k in seen), target))
    assert found == expected


@of_all_related
def test_pieces_are_a_forest_that_leaves_nothing_long_twice(examples: list[Example]) -> None:
    batch = pack(examples)
    assert batch.pieces is not None
    length = batch.input_ids.shape[1]
    assert [piece.start for piece in batch.pieces] == [0, *(piece.end for piece in batch.pieces[:-1])]
    assert batch.pieces[-1].end == length
    ends = {piece.end for piece in batch.pieces}
    for k, piece in enumerate(batch.pieces):
        assert piece.start < piece.end <= piece.until and piece.until in ends
        for later in batch.pieces[k + 1 :]:
            assert later.until <= piece.until or later.start >= piece.until, "they overlap"

    saved = sum(example.tokens for example in examples) - length
    prompts = [example.prompt for example in examples]
    longest = max((agreement(a, b) for k, a in enumerate(prompts) for b in prompts[:k]), default=0)
    if longest < SHARED_FROM:
        assert saved == 0
    else:
        # The two that agree most share at least that, but for an end too short for a piece of its own.
        assert saved >= max(longest - SHARED_FROM + 1, SHARED_FROM)


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
    assert batch.pieces is None
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
    assert len(tensors) == 11
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.tokens == 7


def test_packing_by_hand() -> None:
    """Best fit, longest first: 9 alone; 8; 5; 4 beside the 5 (room 5, not 2); 2 beside the 8; 1 beside 9."""
    examples = [example(1, n - 1, index=k) for k, n in enumerate((2, 5, 8, 4, 9))] + [example(0, 1, index=5)]
    groups = split_by_tokens(examples, max_tokens=10, layout="packed")
    assert [[one.tokens for one in group] for group in groups] == [[9, 1], [8, 2], [5, 4]]


def plain_best_fit(examples: list[Example], max_tokens: int) -> list[list[Example]]:
    """Each example, longest first, into the fullest group that still has room for it: by looking at all of them."""
    groups: list[list[Example]] = []
    for example in sorted(examples, key=lambda one: (-one.tokens, one.index)):
        fits = [group for group in groups if cost(group, "packed") + example.tokens <= max_tokens]
        if fits:
            max(fits, key=lambda group: cost(group, "packed")).append(example)  # the first of equals
        else:
            groups.append([example])
    return groups


@pytest.mark.parametrize("max_tokens", [1, 20, 71, 100, 512, 10_000])
def test_best_fit_is_that_of_a_plain_search(max_tokens: int) -> None:
    """Also where examples are above the budget: those have up to 110 tokens."""
    for seed in range(20):
        examples = some_examples(seed, 60)
        assert split_by_tokens(examples, max_tokens, "packed") == plain_best_fit(examples, max_tokens)


def test_a_whole_data_set_is_grouped_in_no_time() -> None:
    """The pass for reference log-probabilities groups all rows at once: 20,000 in under 2 s of this process's time.

    A search through all open groups (here some 10,000) would take 10⁸ looks, many seconds.
    """
    draw = random.Random(0)
    examples = [example(draw.randint(1, 500), draw.randint(1, 500), index=k) for k in range(20_000)]
    start = time.process_time()
    groups = split_by_tokens(examples, 1024, "packed")
    assert time.process_time() - start < 2
    assert sum(map(len, groups)) == 20_000


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
