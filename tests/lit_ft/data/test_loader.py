"""The loader of windows: whole epochs, the same order for a seed, and resumption from any place."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from lit_ft.batches import Completion, Example, Prompts, Window
from lit_ft.data.datamodule import ExamplesDataModule
from lit_ft.data.loader import PromptLoader, WindowLoader


def examples(count: int) -> list[Example]:
    draw = random.Random(count)
    return [
        Example((k + 1,) * draw.randint(1, 20), (Completion((k + 1,) * (n := draw.randint(1, 20)), (True,) * n),), k)
        for k in range(count)
    ]


def loader(count: int = 23, **changes: Any) -> WindowLoader:
    return WindowLoader(examples(count), **({"batch_size": 4, "max_tokens": 64} | changes))


def indices(window: Window) -> list[int]:
    counted = window.batches[: len(window.batches) - window.fillers]
    return sorted(index for batch in counted for index in batch.examples.tolist())


def epochs(made: WindowLoader, count: int) -> list[list[int]]:
    return [indices(window) for _ in range(count) for window in made]


@pytest.mark.parametrize("count", [1, 4, 7, 8, 23])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_once_per_epoch_over_all_processes(
    count: int, processes: int, batch_size: int, shuffle: bool
) -> None:
    ranks = [
        loader(count, rank=rank, processes=processes, batch_size=batch_size, shuffle=shuffle)
        for rank in range(processes)
    ]
    for _ in range(3):
        steps = list(zip(*ranks, strict=True))  # every process takes the same number of steps
        assert len(steps) == len(ranks[0])
        seen = []
        for windows in steps:
            shares = [indices(window) for window in windows]
            together = sorted(itertools.chain.from_iterable(shares))
            # Each process knows the totals of all, by which the loss is divided.
            for window in windows:
                assert window.examples == len(together)
                assert window.targets == sum(examples(count)[k].targets for k in together)
            seen += together
        assert sorted(seen) == list(range(count))


def test_windows_have_the_size_asked_for() -> None:
    assert [len(window) for window in epochs(loader(23), 1)] == [4, 4, 4, 4, 4, 3]
    assert len(loader(23)) == 6


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_windows_are_the_same_for_any_number_of_processes(batch_size: int) -> None:
    alone = [(window.examples, window.targets, indices(window)) for window in loader(13, batch_size=batch_size)]
    for processes in (2, 3):
        ranks = [loader(13, batch_size=batch_size, processes=processes, rank=rank) for rank in range(processes)]
        together = [
            (windows[0].examples, windows[0].targets, sorted(itertools.chain.from_iterable(map(indices, windows))))
            for windows in zip(*ranks, strict=True)
        ]
        assert together == alone


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("max_tokens", [1, 20, 30])
def test_all_processes_have_equally_many_batches(layout: Any, max_tokens: int) -> None:
    """Sharded models gather each layer's weights together: a process that came too seldom would stop them all."""
    made: dict[str, Any] = {"layout": layout, "max_tokens": max_tokens, "batch_size": 5, "processes": 3}
    fillers = 0
    for windows in zip(*[loader(rank=rank, **made) for rank in range(3)], strict=True):
        assert len({len(window.batches) for window in windows}) == 1
        cheapest = min(examples(23)[k].tokens for window in windows for k in indices(window))
        for window in windows:
            fillers += window.fillers
            for filler in window.batches[len(window.batches) - window.fillers :]:
                assert filler.num_examples == 1 and filler.tokens == cheapest
    assert fillers > 0
    assert all(window.fillers == 0 for window in loader(layout=layout, max_tokens=max_tokens))


def test_processes_share_by_tokens() -> None:
    """No process has more than the others by more than the window's longest example."""
    for windows in zip(*[loader(batch_size=12, processes=2, rank=rank) for rank in range(2)], strict=True):
        tokens = [sum(examples(23)[k].tokens for k in indices(window)) for window in windows]
        longest = max(examples(23)[k].tokens for window in windows for k in indices(window))
        assert abs(tokens[0] - tokens[1]) <= longest


def test_without_shuffling_the_order_is_the_datas() -> None:
    assert epochs(loader(9, shuffle=False), 2) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]] * 2


def test_the_order_is_that_of_the_seed_and_new_each_epoch() -> None:
    first = epochs(loader(seed=1), 3)
    assert epochs(loader(seed=1), 3) == first
    assert epochs(loader(seed=2), 3) != first
    assert first[:6] != first[6:12] != first[12:]
    assert first[:6] != epochs(loader(shuffle=False), 1)
    # One seed's second epoch is not another seed's first.
    assert epochs(loader(seed=2), 1) != first[6:12]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_windows_do_not_depend_on_the_token_budget(layout: Any) -> None:
    expected = [(window.targets, window.examples, indices(window)) for window in loader(max_tokens=10_000)]
    for max_tokens in (1, 40, 100):
        made = loader(max_tokens=max_tokens, layout=layout)
        windows = list(made)
        assert [(window.targets, window.examples, indices(window)) for window in windows] == expected
        for window in windows:
            assert sum(len(batch.target_ids) for batch in window.batches) == window.targets
            for batch in window.batches:
                assert batch.input_ids.numel() <= max_tokens or batch.num_examples == 1
    assert all(len(window.batches) == window.examples for window in loader(max_tokens=1, layout=layout))
    assert all(len(window.batches) == 1 for window in loader(max_tokens=10_000, layout=layout))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("processes", [1, 2])
def test_resume_from_any_place_is_the_uninterrupted_sequence(shuffle: bool, processes: int) -> None:
    """Three epochs of six windows; stopped after each of the first fourteen."""
    made: dict[str, Any] = {"shuffle": shuffle, "processes": processes, "rank": processes - 1}
    whole = epochs(loader(**made), 3)
    assert len(whole) == 18
    for taken in range(1, 15):
        first = loader(**made)
        stream = itertools.chain.from_iterable(first for _ in range(3))
        before = [indices(window) for window in itertools.islice(stream, taken)]
        second = loader(**made)
        second.load_state_dict(first.state_dict())
        after = [indices(window) for _ in range(4) for window in second][: 18 - taken]
        assert before + after == whole


def test_the_rest_of_an_epoch_is_one_pass() -> None:
    first = loader()
    for _ in zip(range(2), first, strict=False):
        pass
    # zip() asks its second argument only after the first has given, so two windows were taken.
    assert first.state_dict() == {"epoch": 0, "position": 2}
    second = loader()
    second.load_state_dict(first.state_dict())
    assert [len(list(second)) for _ in range(3)] == [4, 6, 6]
    # At the end of an epoch the next pass is the next epoch, not an empty one.
    third = loader()
    third.load_state_dict({"epoch": 0, "position": 6})
    assert [indices(window) for window in third] == epochs(loader(), 2)[6:]


def test_loading_a_state_is_not_taken_twice() -> None:
    made = loader()
    made.load_state_dict({"epoch": 1, "position": 3})
    state = made.state_dict()
    assert state == {"epoch": 1, "position": 3}
    resumed = [indices(window) for window in made]
    assert resumed == epochs(loader(), 2)[9:]
    assert made.state_dict() == {"epoch": 1, "position": 6}


def test_a_pass_that_was_broken_off_begins_the_next_epoch() -> None:
    """Lightning leaves an epoch early for limit_train_batches; what follows is the next epoch from its beginning."""
    made = loader()
    next(iter(made))
    assert [indices(window) for window in made] == epochs(loader(), 2)[6:]


def test_the_data_module_shuffles_training_rows_only() -> None:
    module = ExamplesDataModule(examples(9), examples(5), batch_size=4, max_tokens=64, seed=3)
    assert [indices(window) for window in module.train_dataloader()] == epochs(loader(9, seed=3), 1)
    assert [indices(window) for window in module.val_dataloader()] == [[0, 1, 2, 3], [4]]
    assert ExamplesDataModule(examples(9)).val_dataloader() == []


def test_to_moves_all_batches() -> None:
    window = next(iter(loader(max_tokens=1))).to("meta")
    assert [batch.input_ids.device.type for batch in window.batches] == ["meta"] * 4


# Prompts.


def prompts(count: int = 23, **changes: Any) -> PromptLoader:
    asked = [Example((k + 1, 7), (), k, row={"k": k}) for k in range(count)]
    return PromptLoader(asked, **({"batch_size": 4, "max_tokens": 64} | changes))


def asked(iteration: Prompts) -> list[int]:
    return [example.index for example in iteration.examples]


@pytest.mark.parametrize("count", [1, 4, 7, 23])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_prompt_once_per_epoch_over_all_processes(count: int, processes: int, batch_size: int) -> None:
    """In the order that one process alone has, dealt out in turn, so that no process has two more than another."""
    alone = prompts(count, batch_size=batch_size)
    ranks = [prompts(count, batch_size=batch_size, rank=rank, processes=processes) for rank in range(processes)]
    for _ in range(2):
        seen = []
        for whole, *shares in zip(alone, *ranks, strict=True):
            assert whole.total == len(whole.examples) <= batch_size
            assert [share.total for share in shares] == [whole.total] * processes
            for rank, share in enumerate(shares):
                assert asked(share) == asked(whole)[rank::processes]
            sizes = [len(share.examples) for share in shares]
            assert sum(sizes) == whole.total and max(sizes) - min(sizes) <= 1
            seen += asked(whole)
        assert sorted(seen) == list(range(count))


def test_prompts_are_shuffled_as_windows_are() -> None:
    for settings in ({"seed": 1}, {"seed": 2}, {"shuffle": False}):
        made = prompts(**settings)
        assert [sorted(asked(one)) for _ in range(2) for one in made] == epochs(loader(**settings), 2)


def test_prompts_resume_where_they_were() -> None:
    made = prompts()
    whole = [asked(one) for _ in range(2) for one in made]
    for taken in (1, 5, 6, 8):
        first = prompts()
        stream = itertools.chain.from_iterable(first for _ in range(2))
        before = [asked(one) for one in itertools.islice(stream, taken)]
        second = prompts()
        second.load_state_dict(first.state_dict())
        assert before + [asked(one) for _ in range(3) for one in second][: 12 - taken] == whole


def test_the_data_module_gives_prompts_if_asked() -> None:
    made = [Example((k + 1, 7), (), k, row={"k": k}) for k in range(9)]
    module = ExamplesDataModule(made, made[:5], batch_size=4, seed=3, prompts=True)
    training = list(module.train_dataloader())
    assert [asked(one) for one in training] == [asked(one) for one in prompts(9, seed=3)]
    assert [asked(one) for one in module.val_dataloader()] == [[0, 1, 2, 3], [4]]
    assert training[0].examples[0].row == {"k": training[0].examples[0].index}
    assert training[0].to("meta") is training[0]
