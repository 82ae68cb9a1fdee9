"""The section on what was gained: its numbers from scores chosen by hand, and a tiny model against itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from lit_ft.batches import Completion, Example
from lit_ft.errors import UserError
from lit_ft.evaluation.gain import Metric, exact_match, gain, loss_change
from lit_ft.evaluation.section import Figure, Section
from lit_ft.evaluation.subject import Scored, Subject
from lit_ft.rollouts import Rollout
from tests import tiny

TOKENIZER = tiny.tokenizer()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text)["input_ids"])


def example(prompt: str, *answers: str, **row: Any) -> Example:
    return Example(ids(prompt), tuple(Completion(ids(a), (True,) * len(a)) for a in answers), row=row or None)


class Told:
    """A subject that says what a test has it say."""

    def __init__(self, scores: Sequence[Sequence[Scored]], answers: Mapping[str, str] | None = None) -> None:
        self.scores, self.answers = scores, answers or {}

    def token_logprobs(self, examples: Sequence[Example]) -> list[list[Scored]]:
        assert len(examples) == len(self.scores)
        return [list(scores) for scores in self.scores]

    def complete(self, prompts: Sequence[tuple[int, ...]], n: int = 1, **options: Any) -> list[list[Rollout]]:
        return [[Rollout(p, ids(self.answers[self.decode(p)]), True)] for p in prompts]

    def fits(self, prompt: Sequence[int], max_new_tokens: int) -> bool:
        return self.decode(prompt) in self.answers

    def decode(self, given: Sequence[int]) -> str:
        return str(TOKENIZER.decode(list(given)))


def told(scores: Sequence[Sequence[Scored]], answers: Mapping[str, str] | None = None) -> Subject:
    return cast(Subject, Told(scores, answers))


def named(section: Section) -> dict[str, Figure]:
    return {figure.name: figure for figure in section.figures}


def test_loss_is_weighted_by_tokens() -> None:
    """(2 + 6 + 12) nats on (1 + 3 + 4) tokens make 2.5, and (1 + 3 + 12)/8 = 2; the means over rows, 7/3 and 5/3, would
    give every row the same weight."""
    rows = [example("a", "b")] * 3
    before = [[(-2.0, 1)], [(-6.0, 3)], [(-12.0, 4)]]
    after = [[(-1.0, 1)], [(-3.0, 3)], [(-12.0, 4)]]
    figures = named(gain(told(before), told(after), rows))
    loss = figures["loss"]
    assert (loss.before, loss.after, loss.change) == pytest.approx((2.5, 2.0, -0.5))
    assert loss.rows == 3 and loss.unit == "nats per token"
    assert figures["perplexity"].before == pytest.approx(math.exp(2.5))
    assert figures["perplexity"].change == pytest.approx(math.exp(2.0) - math.exp(2.5))


@pytest.mark.parametrize(("after", "found"), [(-1.0, "better"), (-3.0, "worse"), (-2.0, "unchanged")])
def test_the_verdict_is_of_the_loss(after: float, found: str) -> None:
    rows = [example("a", "b")] * 8
    section = gain(told([[(-2.0, 1)]] * 8), told([[(after, 1)]] * 8), rows, threshold=0.1)
    assert section.verdict == found
    assert "threshold 0.1" in section.sentence and "8 rows" in section.sentence


def test_a_change_within_the_threshold_is_none() -> None:
    rows = [example("a", "b")] * 8
    assert gain(told([[(-2.0, 1)]] * 8), told([[(-1.0, 1)]] * 8), rows, threshold=1.0).verdict == "unchanged"


def test_few_rows_prove_nothing() -> None:
    rows = [example("a", "b")] * 7
    section = gain(told([[(-2.0, 1)]] * 7), told([[(-1.0, 1)]] * 7), rows)
    assert section.verdict == "unchanged" and "too few rows for an interval" in section.sentence
    assert "7 held-out rows are too few for an interval" in section.notes[0]


def test_pairs() -> None:
    """Margins before: 1, −2, −1, 3; after: 4, 1, −3, 3. So likelier in 2 and then 3 of 4; moved by 3, 3, −2 and 0, that
    is towards the chosen one in 2 of 4, by (3 + 3 − 2 + 0)/4 = 1 in the mean."""
    rows = [example("a", "b", "c")] * 4
    before = [[(-1.0, 1), (-2.0, 1)], [(-3.0, 1), (-1.0, 1)], [(-2.0, 1), (-1.0, 1)], [(-1.0, 1), (-4.0, 1)]]
    after = [[(-1.0, 1), (-5.0, 1)], [(-2.0, 1), (-3.0, 1)], [(-4.0, 1), (-1.0, 1)], [(-1.0, 1), (-4.0, 1)]]
    section = gain(told(before), told(after), rows)
    figures = named(section)
    assert (figures["accuracy"].before, figures["accuracy"].after) == (50.0, 75.0)
    assert (figures["margin"].before, figures["margin"].after) == (0.25, 1.25)
    assert (figures["reward_accuracy"].before, figures["reward_accuracy"].after) == (None, 50.0)
    assert (figures["reward_margin"].before, figures["reward_margin"].after) == (0.0, 1.0)
    # The loss is of the chosen completions alone: 7/4 and 8/4.
    assert (figures["loss"].before, figures["loss"].after) == (1.75, 2.0)
    assert section.verdict == "unchanged" and "75 %" in section.sentence and "50 %" in section.sentence


def test_pairs_that_turn_are_better() -> None:
    rows = [example("a", "b", "c")] * 20
    wrong, right = [[(-2.0, 1), (-1.0, 1)]] * 20, [[(-2.0, 1), (-3.0, 1)]] * 20
    assert gain(told(wrong), told(right), rows).verdict == "better"
    assert gain(told(right), told(wrong), rows).verdict == "worse"


ANSWERED = [example(f"question {k}", f"answer {k}", part=k % 2) for k in range(8)]
SCORES = [[(-2.0, 8)]] * 8
RIGHT = {f"question {k}": f" answer {k}\n" for k in range(8)}
WRONG = {f"question {k}": f"answer {k}!" for k in range(8)}


def test_exact_match_of_greedy_answers() -> None:
    metric = Metric("exact match", exact_match)
    section = gain(told(SCORES, WRONG), told(SCORES, RIGHT), ANSWERED, metric=metric)
    found = named(section)["metric"]
    assert (found.before, found.after, found.rows) == (0.0, 1.0, 8)
    assert section.verdict == "better" and section.sentence.startswith("exact match")
    # The loss is there, too, and does not decide.
    assert "loss 0.250 nats per token" in section.sentence and "does not count for the verdict" in section.sentence
    one = section.samples[0]
    assert (one.prompt, one.before, one.after, one.wanted) == ("question 0", "answer 0!", " answer 0\n", "answer 0")
    assert len(section.samples) == 6


def test_a_metric_sees_prompt_answer_and_row() -> None:
    seen: list[Any] = []

    def function(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        seen.append((prompt, answer, dict(row)))
        return len(answer) + row["part"]

    found = named(gain(told(SCORES, WRONG), told(SCORES, RIGHT), ANSWERED, metric=Metric("length", function)))["metric"]
    assert seen[1] == ("question 1", "answer 1!", {"part": 1, "wanted": "answer 1"})
    assert (found.before, found.after) == (9.5, 10.5)


def test_only_so_many_rows_are_answered_and_only_where_there_is_room() -> None:
    few = {key: value for key, value in RIGHT.items() if key != "question 0"}
    metric = Metric("e", exact_match)
    section = gain(told(SCORES, few), told(SCORES, RIGHT), ANSWERED, metric=metric, metric_rows=5, answered=7)
    assert named(section)["metric"].rows == 5 and len(section.samples) == 7
    assert section.samples[0].prompt == "question 1"
    assert named(gain(told(SCORES, few), told(SCORES, RIGHT), ANSWERED, metric=metric))["metric"].rows == 7
    none = gain(told(SCORES), told(SCORES), ANSWERED, metric=Metric("e", exact_match))
    assert "metric" not in named(none) and none.samples == ()
    assert any("e was not measured" in note for note in none.notes)


def raising(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
    raise KeyError("label")


def test_the_metric_has_rows_of_its_own() -> None:
    """The loss is taken of 8 of 40 rows, the metric of 36, and two are shown; the note counts what decides."""
    prompts = {f"question {k}": f"answer {k}" for k in range(40)}
    rows = [example(prompt, answer) for prompt, answer in prompts.items()]
    metric = Metric("e", exact_match)
    section = gain(
        told(SCORES, prompts), told(SCORES, prompts), rows, metric=metric, scored=8, metric_rows=36, answered=2
    )
    found = named(section)
    assert (found["loss"].rows, found["metric"].rows, len(section.samples)) == (8, 36, 2)
    assert not any("few" in note for note in section.notes)
    fewer = gain(told(SCORES, prompts), told(SCORES, prompts), rows, metric=metric, scored=8, metric_rows=12)
    assert fewer.notes[0].startswith("12 answered rows are few")
    assert named(gain(told(SCORES, prompts), told(SCORES, prompts), rows, metric=metric, scored=8))["metric"].rows == 40


def test_none_are_shown() -> None:
    """Nor answered, where no metric wants them: this subject knows no answer."""
    assert gain(told(SCORES), told(SCORES), ANSWERED, answered=0).samples == ()
    silent = Told(SCORES, RIGHT)
    silent.complete = None  # type: ignore[assignment]
    assert gain(cast(Subject, silent), cast(Subject, silent), ANSWERED, answered=0).samples == ()
    measured = gain(told(SCORES, WRONG), told(SCORES, RIGHT), ANSWERED, metric=Metric("e", exact_match), answered=0)
    assert measured.samples == () and named(measured)["metric"].rows == 8


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (raising, "The metric m raised KeyError: 'label' for held-out row 1, answer 'answer 0!'"),
        (lambda prompt, answer, row: math.nan, "The metric m gives nan for held-out row 1"),
        (lambda prompt, answer, row: "good", "The metric m raised ValueError"),
        (lambda answer: 1.0, "The metric m raised TypeError"),
    ],
)
def test_a_metric_that_gives_no_number(function: Any, says: str) -> None:
    """It loses neither the loss nor the answers; only a verdict there is none."""
    section = gain(told(SCORES, WRONG), told(SCORES, RIGHT), ANSWERED, metric=Metric("m", function))
    assert section.error is not None and says in section.error
    assert section.verdict == "unknown" and section.sentence.startswith("m could not be measured")
    assert list(named(section)) == ["loss", "perplexity"] and "0.250 nats per token" in section.sentence
    assert len(section.samples) == 6


@pytest.mark.parametrize("rows", [[], [Example((5,), ())]])
def test_nothing_held_out(rows: list[Example]) -> None:
    with pytest.raises(UserError, match="no held-out rows with an answer"):
        gain(told([]), told([]), rows)


def test_scores_of_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="different tokens"):
        loss_change([(-1.0, 2)], [(-1.0, 3)])


def test_a_perplexity_that_no_float_holds_is_absent() -> None:
    found = named(gain(told([[(-2.0, 1)]] * 2), told([[(-800.0, 1)]] * 2), [example("a", "b")] * 2))["perplexity"]
    assert found.after is None and found.change is None


def test_a_model_against_itself() -> None:
    base = Subject("base", tiny.model(), TOKENIZER)
    rows = [example(f"question {k}", f"yes {k}", f"no {k}") for k in range(4)]
    section = gain(base, replace(base, name="tuned"), rows, metric=Metric("e", exact_match), max_new_tokens=4)
    assert section.verdict == "unchanged"
    for found in section.figures:
        if found.name == "reward_accuracy":
            assert found.after == 0
            continue
        assert found.change == 0 and found.before == found.after
        assert found.low is None or (found.high is not None and found.low <= 0 <= found.high)
    assert [sample.before == sample.after for sample in section.samples] == [True] * 4
