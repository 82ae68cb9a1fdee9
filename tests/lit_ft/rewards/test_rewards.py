"""Rewards: how they are asked for, what a function is given and may return, a judge's scores, and weighted sums."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lit_ft.data.packing import Layout
from lit_ft.errors import UserError
from lit_ft.models.judge import scalar_head
from lit_ft.models.kinds.lora import apply_lora
from lit_ft.models.roles import add_role, role_parameters
from lit_ft.models.score import use_packed_attention
from lit_ft.rewards.base import Reward, RewardSpec, Sample, parse_rewards
from lit_ft.rewards.function import RewardFunction
from lit_ft.rewards.judge import JudgeReward
from lit_ft.rewards.weighted import WeightedReward
from tests import tiny

PAD = 3


def sample(text: str = "abc", prompt: Any = "q", row: dict[str, Any] | None = None, **ids: Any) -> Sample:
    made: dict[str, Any] = {"prompt": (5, 6), "completion": tuple(range(10, 11 + len(text))), "ended": True}
    return Sample(**(made | ids), prompt_text=prompt, completion_text=text, row=row)


# What is asked for.


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "omegaconf"])
def test_rewards_that_may_be_asked_for(plain: bool) -> None:
    asked = ["tone", {"reward": "brief@v12", "weight": -2}, {"reward": "rules:polite"}, "pack.age.rules:_kind"]
    wanted = [
        RewardSpec("judge", "tone", 1.0),
        RewardSpec("judge", "brief@v12", -2.0),
        RewardSpec("function", "rules:polite", 1.0),
        RewardSpec("function", "pack.age.rules:_kind", 1.0),
    ]
    assert parse_rewards("reward", asked if plain else OmegaConf.create(asked)) == wanted
    assert parse_rewards("reward", "tone@v1") == [RewardSpec("judge", "tone@v1")]
    assert parse_rewards("reward", "rules:polite") == [RewardSpec("function", "rules:polite")]


@pytest.mark.parametrize("nothing", [None, "", "???", [], (), OmegaConf.create([])])
def test_no_reward(nothing: Any) -> None:
    with pytest.raises(UserError, match=r"judge=.*experiment=reward name=judge.*judge=package.module:function"):
        parse_rewards("judge", nothing)


WRONG: dict[str, tuple[Any, str]] = {
    "a number": (3, "reward=3 is no reward: give NAME or NAME@vN"),
    "a path": ("adapters/tone", "reward='adapters/tone' is no reward"),
    "a version that is none": ("tone@3", "reward='tone@3' is no reward"),
    "an empty entry": (["tone", ""], "reward='' is no reward"),
    "a list in a list": ([["tone"]], "is no reward"),
    "a file": ("my/rules.py:polite", "reward=my.rules:polite, and start from the folder"),
    "a file here": ("./rules.py:polite", "reward=rules:polite, and start"),
    "no function": ("rules:", "is no reward"),
    "no module": (":polite", "is no reward"),
    "a mapping alone": ({"reward": "tone"}, "is no list"),
    "an unknown key": ([{"reward": "tone", "wieght": 1}], "unknown key 'wieght'; known are reward and weight"),
    "no name": ([{"weight": 1}], "lacks the key reward"),
    "weight 0": ([{"reward": "tone", "weight": 0}], "weight 0 of tone must be a finite number other than 0"),
    "weight NaN": ([{"reward": "tone", "weight": float("nan")}], "weight nan of tone must be"),
    "weight inf": ([{"reward": "tone", "weight": float("inf")}], "weight inf of tone must be"),
    "weight true": ([{"reward": "tone", "weight": True}], "weight True of tone must be"),
    "weight as text": ([{"reward": "tone", "weight": "half"}], "weight 'half' of tone must be"),
    "weight null": ([{"reward": "tone", "weight": None}], "weight None of tone must be"),
    "twice": (["tone", {"reward": "tone", "weight": 2}], "tone is given twice"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rewards_that_are_none(name: str) -> None:
    value, reason = WRONG[name]
    with pytest.raises(UserError, match=re.escape(reason)):
        parse_rewards("reward", value)


# A person's function.


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes `rules.py` where Python finds it; forgets it afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rules", raising=False)

    def write(text: str) -> Path:
        sys.modules.pop("rules", None)
        path = tmp_path / "rules.py"
        path.write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        return path

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return write


def test_a_function_is_called_as_trl_does(written: Any) -> None:
    """Prompts and completions in the form of the data, columns as lists; the names are the convention's."""
    written(
        "seen = []\n"
        "def length(prompts, completions, completion_ids, **columns):\n"
        "    seen.append((prompts, completions, completion_ids, columns))\n"
        "    return [len(c) for c in completions]\n"
    )
    rows = [{"prompt": "q", "completion": "old", "answer": "4", "prompts": 1}, {"answer": "5", "topic": "sums"}]
    reward = RewardFunction("rules:length")
    assert reward([sample("ab", row=rows[0]), sample("abcd", prompt="p", row=rows[1])]) == [2.0, 4.0]
    (prompts, completions, ids, columns), *more = sys.modules["rules"].seen
    assert not more
    assert (prompts, completions) == (["q", "p"], ["ab", "abcd"])
    assert ids == [[10, 11, 12], [10, 11, 12, 13, 14]]
    assert columns == {"answer": ["4", "5"], "topic": [None, "sums"]}
    assert reward.name == "rules:length"
    assert reward.parts([sample()]) == {} and reward([]) == []


def test_conversations_are_given_as_messages(written: Any) -> None:
    written(
        "def one(prompts, completions):\n"
        "    return [len(p) + len(c[0]['content']) for p, c in zip(prompts, completions)]"
    )
    asked = [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}]
    assert RewardFunction("rules:one")([sample("abc", prompt=asked)]) == [5.0]
    written(
        "def two(completions, **_):\n    return [c == [{'role': 'assistant', 'content': 'abc'}] for c in completions]"
    )
    assert RewardFunction("rules:two")([sample("abc", prompt=asked)]) == [1.0]


def test_only_columns_that_the_signature_takes(written: Any) -> None:
    written(
        "def right(completions, answer, topic='none', *, level=0):\n"
        "    return [c == a for c, a in zip(completions, answer)]"
    )
    rows = [{"answer": "4", "other": 1, "prompt": "q"}, {"answer": "5"}]
    assert RewardFunction("rules:right")([sample("4", row=rows[0]), sample("4", row=rows[1])]) == [1.0, 0.0]


def test_a_column_that_no_row_has(written: Any) -> None:
    written("def right(completions, solution):\n    return [0] * len(completions)")
    with pytest.raises(UserError, match="rules:right wants solution, and the rows of the data have answer, level"):
        RewardFunction("rules:right")([sample(row={"prompt": "q", "answer": 1, "level": 2})])
    with pytest.raises(UserError, match="wants solution, and the rows of the data have no other columns"):
        RewardFunction("rules:right")([sample()])
    # The prompt of the row is not what was asked, so it is no column.
    written("def right(completions, prompt):\n    return [0] * len(completions)")
    with pytest.raises(UserError, match="wants prompt"):
        RewardFunction("rules:right")([sample(row={"prompt": "q"})])


def test_the_data_stay_as_they_are_whatever_a_function_does(written: Any) -> None:
    written(
        "def spoil(prompts, completions, tags):\n"
        "    prompts[0].pop(); prompts[1][0]['content'] = 'x'; tags[0].clear()\n"
        "    return [0, 0]\n"
    )
    asked, row = [{"role": "user", "content": "q"}], {"tags": ["a"]}
    RewardFunction("rules:spoil")([sample(prompt=asked, row=row), sample(prompt=asked, row=row)])
    assert (asked, row) == ([{"role": "user", "content": "q"}], {"tags": ["a"]})


RESULTS: dict[str, Any] = {
    "list": [1, 0.5],
    "tuple": (1, 0.5),
    "numpy": np.array([1, 0.5]),
    "numpy of integers": (np.array([2, 1]), [2.0, 1.0]),
    "numpy of bools": (np.array([True, False]), [1.0, 0.0]),
    "tensor": torch.tensor([1, 0.5]),
    "bf16 with a gradient": torch.tensor([1, 0.5], dtype=torch.bfloat16, requires_grad=True),
    "numpy's numbers": [np.float32(1), np.float64(0.5)],
    "numpy's bools": ([np.bool_(True), np.int64(3)], [1.0, 3.0]),
    "tensors of one number": [torch.tensor(1.0), torch.tensor(0.5)],
    "bools": ([True, False], [1.0, 0.0]),
}


def returning(written: Any, result: Any) -> RewardFunction:
    written("result = None\ndef back(completions):\n    return result")
    reward = RewardFunction("rules:back")
    sys.modules["rules"].result = result  # type: ignore[attr-defined]
    return reward


@pytest.mark.parametrize("name", RESULTS)
def test_numbers_in_any_form(written: Any, name: str) -> None:
    result = RESULTS[name]
    result, wanted = result if isinstance(result, tuple) and isinstance(result[1], list) else (result, [1.0, 0.5])
    found = returning(written, result)([sample(), sample()])
    assert found == wanted and all(type(score) is float for score in found)


BAD: dict[str, tuple[Any, str]] = {
    "None": (None, "returned None, and not a list of one number for each of the 2 completions"),
    "a number": (0.5, "returned a float, and not a list"),
    "a tensor of one number": (torch.tensor(0.5), "returned a Tensor, and not a list"),
    "text": ("ab", "returned a str, and not a list"),
    "a mapping": ({0: 1, 1: 2}, "returned a dict, and not a list"),
    "a set": ({1, 2}, "returned a set, and not a list"),
    "a generator": ((k for k in (1, 2)), "returned a generator, and not a list"),
    "too few": ([1], "returned 1 scores for 2 completions"),
    "too many": (np.ones(3), "returned 3 scores for 2 completions"),
    "none at all": ([], "returned 0 scores for 2 completions"),
    "a missing one": ([1, None], "gives None for completion 1 of 2, 'second"),
    "NaN": ([float("nan"), 1], "gives nan for completion 0 of 2, 'first"),
    "NaN in a tensor": (torch.tensor([1, float("nan")]), "gives nan for completion 1 of 2"),
    "infinite": ([1, float("-inf")], "gives -inf for completion 1 of 2, 'second"),
    "beyond floats": ([1, 10**400], "gives inf for completion 1 of 2"),
    "a digit": ([1, "2"], "gives a str ('2') for completion 1 of 2"),
    "complex": ([1, 1j], "gives a complex (1j) for completion 1 of 2"),
    "columns": (np.ones((2, 1)), "gives a list ([1.0]) for completion 0 of 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_whatever_else_comes_back_is_refused(written: Any, name: str) -> None:
    result, reason = BAD[name]
    with pytest.raises(UserError, match=re.escape(f"rules:back {reason}")):
        returning(written, result)([sample("first " * 40), sample("second " * 40)])


def test_the_message_quotes_only_a_beginning(written: Any) -> None:
    with pytest.raises(UserError) as raised:
        returning(written, [None])([sample("x" * 5000)])
    assert len(str(raised.value)) < 300


def test_a_function_that_raises(written: Any) -> None:
    path = written(
        "import json\n"
        "def right(completions):\n"
        "    return [one(c) for c in completions]\n"
        "def one(text):\n"
        "    return json.loads(text)\n"
    )
    with pytest.raises(UserError) as raised:
        RewardFunction("rules:right")([sample("{oh no")])
    text = str(raised.value)
    assert "rules:right raised JSONDecodeError: Expecting property name" in text
    assert f"({path}, line 5)" in text  # the last line of the function's own file, not one of json's
    assert "'{oh no'" in text
    assert type(raised.value.__cause__).__name__ == "JSONDecodeError"


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("raise ValueError('first\\nsecond')", "raised ValueError: first ("),
        ("raise KeyError", "raised KeyError ("),
        ("import sys; sys.exit(0)", "raised SystemExit: 0 ("),
        ("assert False", "raised AssertionError ("),
    ],
)
def test_what_a_function_raised(written: Any, statement: str, said: str) -> None:
    path = written(f"def right(completions):\n    {statement}\n")
    with pytest.raises(UserError, match=re.escape(said + f"{path}, line 2)")):
        RewardFunction("rules:right")([sample()])


def test_an_interrupt_is_no_failure(written: Any) -> None:
    written("def right(completions):\n    raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        RewardFunction("rules:right")([sample()])


def test_functions_that_are_not_there(written: Any) -> None:
    with pytest.raises(UserError, match=r"no module no_such_rules in .*PYTHONPATH"):
        RewardFunction("no_such_rules:polite")
    with pytest.raises(UserError, match=r"there is no module json\.no_such in"):
        RewardFunction("json.no_such:polite")
    path = written("def kind(completions): ...\ndef _hidden(completions): ...\nlimit = 3\n")
    with pytest.raises(UserError, match=re.escape(f"{path} has no polite. Its functions are kind.")):
        RewardFunction("rules:polite")
    with pytest.raises(UserError, match="rules:limit is no function but a int"):
        RewardFunction("rules:limit")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_package\n", "importing rules raised ModuleNotFoundError: No module named 'no_such_package'"),
        ("x = 1 / 0\n", "importing rules raised ZeroDivisionError: division by zero"),
        ("def (:\n", "importing rules raised SyntaxError: "),
        ("raise SystemExit(3)\n", "importing rules raised SystemExit: 3"),
    ],
)
def test_modules_that_cannot_be_imported(written: Any, text: str, said: str) -> None:
    path = written(text)
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        RewardFunction("rules:polite")
    assert f"({path}, line 1)" in str(raised.value)


@pytest.mark.parametrize(
    "head", ["answers", "prompts", "completions, /", "*completions", "prompts, /, completions", ""]
)
def test_functions_that_cannot_be_called_by_these_names(written: Any, head: str) -> None:
    written(f"def polite({head}):\n    return [0]")
    with pytest.raises(UserError, match=r"is called with names: write def function\(prompts, completions"):
        RewardFunction("rules:polite")


def test_async_functions_are_refused(written: Any) -> None:
    written("async def polite(completions):\n    return [0]")
    with pytest.raises(UserError, match="write `def`"):
        RewardFunction("rules:polite")


def test_objects_that_can_be_called(written: Any) -> None:
    path = written(
        "import functools\n"
        "class Long:\n"
        "    def __call__(self, completions):\n"
        "        return [len(c) / 0 if c == 'no' else len(c) for c in completions]\n"
        "long = Long()\n"
        "def over(completions, limit):\n"
        "    return [len(c) > limit for c in completions]\n"
        "over_two = functools.partial(over, limit=2)\n"
    )
    assert RewardFunction("rules:long")([sample("abc")]) == [3.0]
    assert RewardFunction("rules:over_two")([sample("abc"), sample("ab")]) == [1.0, 0.0]
    with pytest.raises(UserError, match=re.escape(f"({path}, line 4)")):
        RewardFunction("rules:long")([sample("no")])


# Weighted sums.


class Given(Reward):
    """Says what it was told to, and counts how often it was asked."""

    def __init__(self, name: str, scores: Sequence[float]) -> None:
        self.name, self.scores, self.asked = name, list(scores), 0

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        self.asked += 1
        return self.scores[: len(samples)]


def test_weighted_sum() -> None:
    tone, length = Given("tone", [1.0, -2.0]), Given("length", [10.0, 30.0])
    both = WeightedReward([(tone, 2.0), (length, -0.5)])
    samples = [sample(), sample()]
    assert both(samples) == [2 - 5, -4 - 15]
    assert (tone.asked, length.asked) == (1, 1)
    assert both.parts(samples) == {"tone": [2.0, -4.0], "length": [-5.0, -15.0]}
    assert (tone.asked, length.asked) == (2, 2)
    assert both([]) == []


def test_weighted_rewards_have_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="names that differ, got tone, tone"):
        WeightedReward([(Given("tone", []), 1.0), (Given("tone", []), 1.0)])
    with pytest.raises(ValueError, match="got none"):
        WeightedReward([])


# A judge.


def judged() -> Any:
    """A policy and a judge on one tiny base, both of which do something."""
    model = apply_lora(tiny.model("llama"), r=2, target_modules=["q_proj", "v_proj"], dropout=0.3)
    assert use_packed_attention(model) is None
    add_role(model, "judge")
    generator = torch.Generator().manual_seed(5)
    for role in ("default", "judge"):
        for parameter in role_parameters(model, role):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return model


HEAD = scalar_head(32)
MANY = [
    Sample((7, 8, 9, *range(20, 31)), (40, 41, 2), True, "a", "x", None),
    Sample((50, 51), (60, 2), True, "b", "y", None),
    Sample((7, 8, 9, *range(20, 31)), (42,), False, "a", "z", None),
    Sample((50, 51), (60, 2), True, "b", "y again", None),
    Sample((7, 8, 9, *range(20, 31)), (43, 44, 45, 46, 47), False, "a", "w", None),
]


def judge(model: Any, layout: Layout = "packed", max_tokens: int = 1000, **more: Any) -> JudgeReward:
    settings: dict[str, Any] = {"layout": layout, "max_tokens": max_tokens, "pad_id": PAD}
    return JudgeReward("tone@v1", model, "judge", HEAD, 0.25, 2.0, **(settings | more))


@torch.no_grad()
def expected(model: Any) -> list[float]:
    """One completion at a time through PEFT's own switch: the head at its last token, then normalised."""
    alone = copy.deepcopy(model)
    alone.set_adapter("judge")
    alone.eval()
    alone.get_base_model().set_attn_implementation("eager")
    found = []
    for one in MANY:
        ids = torch.tensor([[*one.prompt, *one.completion]])
        state = alone.get_base_model().model(input_ids=ids).last_hidden_state[0, -1]
        found.append((float(HEAD(state)) - 0.25) / 2.0)
    return found


@pytest.mark.parametrize("max_tokens", [1, 18, 1000])
@pytest.mark.parametrize("layout", ["packed", "apart", "padded"])
def test_a_judge_scores_each_completion_at_its_last_token(layout: Layout, max_tokens: int) -> None:
    """In the order of the samples, whatever the batches: all in one, or the completions of a prompt divided."""
    model = judged()
    if layout == "padded":
        model.get_base_model().set_attn_implementation("sdpa")
    model.train()
    found = judge(model, layout, max_tokens)(MANY)
    assert found == pytest.approx(expected(model), abs=1e-5)
    assert found[1] == pytest.approx(found[3], abs=1e-6) and len({round(x, 4) for x in found}) == 4


def test_a_judge_keeps_within_max_tokens_and_shares_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    import lit_ft.judging as module

    sizes: list[int] = []
    plain = module.completion_scores

    def watched(model: Any, head: Any, batch: Any) -> Any:
        sizes.append(batch.input_ids.numel())
        return plain(model, head, batch)

    monkeypatch.setattr(module, "completion_scores", watched)
    model = judged()
    judge(model)(MANY)
    assert sizes == [14 + 3 + 1 + 5 + 2 + 2 + 2]  # each prompt once
    sizes.clear()
    judge(model, max_tokens=19)(MANY)
    assert len(sizes) > 1 and max(sizes) <= 19


def test_a_judge_leaves_no_trace() -> None:
    """The policy computes again, in training mode, with its weights trained and their gradients as they were."""
    model = judged()
    model.train()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for parameter in role_parameters(model, "default"):
        parameter.grad = torch.ones_like(parameter)
    ids = torch.arange(10, 20)[None]
    model.eval()
    with model.disable_adapter(), torch.no_grad():
        base = model(input_ids=ids).logits
    with torch.no_grad():
        before = model(input_ids=ids).logits
    model.train()
    scores = judge(model)(MANY)
    assert model.training and all(type(score) is float for score in scores)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert all(bool((p.grad == 1).all()) for p in role_parameters(model, "default"))
    assert all(p.grad is None for p in role_parameters(model, "judge"))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    assert not torch.allclose(before, base)
    assert judge(model)(MANY) == scores and not model.training


def test_a_judge_in_mixed_precision() -> None:
    model = judged()
    exact, rough = judge(model)(MANY), judge(model, autocast=torch.bfloat16)(MANY)
    assert rough != exact and rough == pytest.approx(exact, abs=0.2)


def test_a_judge_that_gives_no_number_is_no_judge() -> None:
    model = judged()
    # All of them: a query that is NaN does not show through flash attention's exponential on every processor.
    for parameter in role_parameters(model, "judge"):
        parameter.data.fill_(float("nan"))
    model.train()
    with pytest.raises(UserError, match="judge tone@v1 gives nan for completion 0, 'x'"):
        judge(model)(MANY)
    assert model.training
