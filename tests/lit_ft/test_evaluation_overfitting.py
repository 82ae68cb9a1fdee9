"""The section on overfitting: an adapter overfitted on purpose, planted duplicates and answers, and sums by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from lit_ft.batches import Completion, Example
from lit_ft.errors import UserError
from lit_ft.evaluation.overfitting import (
    best_and_last,
    difference,
    exact_duplicates,
    memorised,
    near_duplicates,
    overfitting,
)
from lit_ft.evaluation.paired import Change
from lit_ft.evaluation.section import Figure, Section
from lit_ft.evaluation.subject import Subject
from lit_ft.models.kinds.lora import apply_lora
from tests import tiny

TOKENIZER = tiny.tokenizer()


def row(k: int) -> Example:
    """A prompt of 3 and an answer of 24 random letters: nothing in one row helps with another."""
    drawn = random.Random(k)
    answer = tuple(drawn.randint(60, 90) for _ in range(24))
    return Example(tuple(drawn.randint(60, 90) for _ in range(3)), (Completion(answer, (True,) * 24),))


TRAIN, HELD_OUT = [row(k) for k in range(6)], [row(k) for k in range(100, 106)]


@pytest.fixture(scope="module")
def model() -> Any:
    """Trained on the six rows until it knows them by heart."""
    made = apply_lora(tiny.model(), r=32, alpha=64, dropout=0.0)
    ids = torch.tensor([e.prompt + e.completions[0].ids for e in TRAIN])
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=0.01)
    for _ in range(100):
        logits = made(input_ids=ids).logits[:, 2:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 3:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # The output layer cannot say any token with more than about e^-0.8: its logits have narrow bounds.
    assert float(loss.detach()) < 0.9
    return made


@pytest.fixture(scope="module")
def base(model: Any) -> Subject:
    return Subject("base", model, TOKENIZER)


@pytest.fixture(scope="module")
def tuned(base: Subject) -> Subject:
    return replace(base, name="tuned", role="default")


def named(section: Section) -> dict[str, Figure]:
    return {figure.name: figure for figure in section.figures}


def test_an_overfitted_adapter_is_called_so(base: Subject, tuned: Subject) -> None:
    section = overfitting(base, tuned, TRAIN, HELD_OUT)
    assert section.verdict == "worse" and "thresholds 0.1 and 5 points" in section.sentence
    found = named(section)
    assert found["gap"].low is not None and found["gap"].low > 1
    gap = found["held_out_loss"].after, found["train_loss"].after
    assert found["gap"].after == pytest.approx(gap[0] - gap[1])  # type: ignore[operator]
    assert (found["memorised_train"].before, found["memorised_train"].after) == (0, 100)
    assert found["memorised_held_out"].after == 0
    assert found["duplicates"].after == 0


def test_a_model_against_itself(base: Subject) -> None:
    section = overfitting(base, replace(base, name="tuned"), TRAIN, HELD_OUT)
    assert section.verdict == "unchanged"
    for found in section.figures:
        assert found.change in (0, None)
        assert found.low is None or (found.high is not None and found.low <= 0 <= found.high)


def test_a_planted_duplicate_is_found(base: Subject) -> None:
    section = overfitting(base, base, TRAIN, [*HELD_OUT[:3], TRAIN[4]])
    assert named(section)["duplicates"].after == 25
    assert any("1 of 4 held-out rows" in note and "1 of them exactly" in note for note in section.notes)
    assert section.tables[0].rows == (("4", "5", "1.00"),)


def test_a_planted_verbatim_answer_is_counted(base: Subject, tuned: Subject) -> None:
    """One held-out row is a training row: 1 of 4 is then completed verbatim."""
    found = memorised(base, tuned, [*HELD_OUT[:3], TRAIN[2]], 10)
    assert found is not None and (found.before, found.after, found.rows) == (0, 0.25, 4)


def test_answers_that_differ_at_the_last_probed_token_do_not_count(base: Subject, tuned: Subject) -> None:
    def changed(place: int) -> Example:
        ids = list(TRAIN[0].completions[0].ids)
        ids[place] = 200
        return replace(TRAIN[0], completions=(Completion(tuple(ids), (True,) * 24),))

    last = memorised(base, tuned, [changed(23), TRAIN[1]], 10)
    assert last is not None and last.after == 0.5
    shorter = memorised(base, tuned, [changed(23), TRAIN[1]], 10, following=15)
    assert shorter is not None and shorter.after == 1


def test_short_answers_are_not_probed(base: Subject) -> None:
    short = [replace(e, completions=(Completion(e.completions[0].ids[:23], (True,) * 23),)) for e in TRAIN]
    assert memorised(base, base, short, 10) is None
    section = overfitting(base, base, short, HELD_OUT)
    assert any("No training answer has 24 tokens" in note for note in section.notes)
    assert "memorised_train" not in named(section)


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def test_near_duplicates_by_hand() -> None:
    """Of 12 words there are 8 shingles. Another last word changes one of them: 7/9 < 0.8. One word more: 8/9."""
    text = " ".join(WORDS)
    train = ["nothing of the kind is here at all", text]
    assert near_duplicates(train, [" ".join([*WORDS[:-1], "other"])]) == []
    [pair] = near_duplicates(train, ["quite another text", f"{text.upper()}, thirteen!"])
    assert (pair.held_out, pair.train, pair.similarity) == (1, 1, pytest.approx(8 / 9))
    assert [p.similarity for p in near_duplicates(train, [text])] == [1.0]
    [pair] = near_duplicates(train, [" ".join([*WORDS[:-1], "other"])], threshold=7 / 9)
    assert pair.similarity == 7 / 9


def test_short_and_empty_texts() -> None:
    assert [(p.held_out, p.train) for p in near_duplicates(["", "Yes."], ["", "yes", "...", "no"])] == [(1, 1)]
    assert near_duplicates([], ["a"]) == [] == near_duplicates(["a"], [])


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_the_filter_loses_nothing(threshold: float) -> None:
    """Against every pair, on texts of few words that overlap much."""
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices("abc", k=drawn.randint(1, 9))) for _ in range(120)]
    train, held_out = texts[:80], texts[80:]

    def shingles(text: str) -> set[str]:
        words = text.split()
        return {" ".join(words[k : k + 2]) for k in range(max(1, len(words) - 1))}

    wanted = {}
    for k, text in enumerate(held_out):
        alike = [len(shingles(text) & shingles(t)) / len(shingles(text) | shingles(t)) for t in train]
        if max(alike) >= threshold:
            wanted[k] = (alike.index(max(alike)), max(alike))
    found = near_duplicates(train, held_out, size=2, threshold=threshold)
    assert {p.held_out: (p.train, p.similarity) for p in found} == wanted and wanted


def test_a_shared_beginning_makes_no_duplicates(base: Subject) -> None:
    """A system prompt of 40 words before answers that differ."""

    def said(text: str) -> Example:
        ids = (
            tuple(TOKENIZER(" ".join(f"word{k}" for k in range(40)) + " ")["input_ids"]),
            tuple(TOKENIZER(text)["input_ids"]),
        )
        return Example(ids[0], (Completion(ids[1], (True,) * len(ids[1])),))

    section = overfitting(base, base, [said("it rains"), said("it snows")], [said("wind"), said("it thaws")])
    assert named(section)["duplicates"].after == 0


def test_exact_duplicates_have_prompt_and_answer_alike() -> None:
    other = replace(TRAIN[0], prompt=(1,))
    assert exact_duplicates(TRAIN, [other, TRAIN[3], HELD_OUT[0]]) == {1}


def test_curves() -> None:
    points = [(10, 2.0), (30, 1.5), (20, 1.2), (40, 1.2)]
    assert best_and_last(points) == ((20, 1.2), (40, 1.2))
    assert best_and_last(points[:3]) == ((20, 1.2), (30, 1.5))


@pytest.mark.parametrize(("last", "found"), [(1.05, "unchanged"), (1.2, "worse")])
def test_the_last_step_beside_the_best(base: Subject, last: float, found: str) -> None:
    curves = {"training": [(1, 2.0), (3, 0.5)], "held-out": [(1, 2.0), (2, 1.0), (3, last), (4, math.nan)]}
    section = overfitting(base, base, TRAIN, HELD_OUT, curves=curves)
    assert section.verdict == found
    figure = named(section)["last_over_best"]
    assert (figure.before, figure.after) == (1.0, last) and "(3)" in figure.label and "(2)" in figure.label
    assert section.curves[0].lines["held-out"] == [(1, 2.0), (2, 1.0), (3, last)]


def test_difference_of_changes() -> None:
    """3-4-5: the lower end is √(3² + 4²) below 2 − 1, the upper √(6² + 8²) above."""
    one, other = Change(1.0, 3.0, 2.0, -1.0, 8.0, 5), Change(0.0, 1.0, 1.0, -7.0, 5.0, 7)
    assert difference(one, other) == Change(1.0, 2.0, 1.0, -4.0, 11.0, 12)
    assert difference(one, replace(other, low=None, high=None)).low is None


def test_only_so_many_rows_are_scored(base: Subject) -> None:
    found = named(overfitting(base, base, TRAIN, HELD_OUT, scored=3, probed=2))
    assert (found["train_loss"].rows, found["gap"].rows, found["memorised_train"].rows) == (3, 6, 2)


@pytest.mark.parametrize(("train", "held_out", "which"), [([], HELD_OUT, "training"), (TRAIN, [], "held-out")])
def test_rows_that_are_missing(base: Subject, train: list[Example], held_out: list[Example], which: str) -> None:
    with pytest.raises(UserError, match=f"no {which} rows with an answer"):
        overfitting(base, base, train, held_out)
