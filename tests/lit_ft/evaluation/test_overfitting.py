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
    by_heart,
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


TRAIN, HELD_OUT = [row(k) for k in range(8)], [row(k) for k in range(100, 108)]


@pytest.fixture(scope="module")
def model() -> Any:
    """Trained on the eight rows until it knows them by heart."""
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
    assert "8 of 8 training answers completed verbatim, 8 by heart" in section.sentence
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
    assert any("1 of 4 held-out rows" in said and "1 of them exactly" in said for said in section.warnings)
    assert section.tables[0].rows == (("4", "5", "1.00"),)


def test_a_planted_verbatim_answer_is_counted(base: Subject, tuned: Subject) -> None:
    """One held-out row is a training row: 1 of 4 is then completed verbatim."""
    found = memorised(base, tuned, [*HELD_OUT[:3], TRAIN[2]], 10)
    assert found is not None and (found.change.before, found.change.after, found.change.rows) == (0, 0.25, 4)


def test_one_forward_pass_says_what_generating_says(base: Subject, tuned: Subject) -> None:
    """Of rows that the model knows and others, of prefixes of what it says, and of such with one token changed."""
    rows = [*TRAIN, *HELD_OUT]
    prompts = [e.prompt + e.completions[0].ids[:8] for e in rows]
    said = [one[0].completion for one in tuned.complete(prompts, max_new_tokens=16)]
    asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for prompt, e, words in zip(prompts, rows, said, strict=True):
        changed = (*words[:-1], words[-1] + 1)
        asked += [(prompt, e.completions[0].ids[8:24]), (prompt, words), (prompt, words[:5]), (prompt, changed)]
    wanted = [
        rollouts[0].completion[: len(ids)] == ids
        for (_, ids), rollouts in zip(asked, tuned.complete([p for p, _ in asked], max_new_tokens=16), strict=True)
    ]
    examples = [Example(prompt, (Completion(ids, (True,) * len(ids)),)) for prompt, ids in asked]
    assert tuned.says(examples) == wanted and sum(wanted) == len(TRAIN) + 2 * len(rows)
    padded = replace(tuned, layout="padded", max_tokens=100)
    assert padded.says(examples) == wanted, "in other batches"
    assert base.says(examples) != wanted, "or the adapter is not asked"
    # A mask says what is trained on, and not what is to be said.
    unmasked = [replace(e, completions=(replace(e.completions[0], mask=(False,) * 16),)) for e in examples[3:4]]
    assert tuned.says(unmasked) == [False]


def test_what_ends_an_answer_ends_it(tuned: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation stops at a token that ends answers: what comes after is not said, whatever is the likeliest."""
    ids = TRAIN[0].completions[0].ids
    end = ids[12]
    assert end not in ids[8:12]
    monkeypatch.setattr("lit_ft.evaluation.subject.stop_ids", lambda model, tokenizer: (end,))
    prompt = TRAIN[0].prompt + ids[:8]
    assert tuned.complete([prompt], max_new_tokens=16)[0][0].completion == ids[8:13]
    long, short = (Example(prompt, (Completion(ids[8:k], (True,) * (k - 8)),)) for k in (24, 13))
    assert tuned.says([long, short]) == [False, True]


def test_one_planted_answer_among_many_rows_is_found(base: Subject, tuned: Subject) -> None:
    """By the settings of a report; no rate of one in 250 would show it."""
    from lit_ft.evaluate import EvaluateConfig

    settings: Any = {"scored": 16, "probed": EvaluateConfig().probed}
    others, unseen = [row(k) for k in range(1000, 1249)], [row(k) for k in range(2000, 2040)]
    section = overfitting(base, tuned, [*others[:100], TRAIN[2], *others[100:]], unseen, **settings)
    found = named(section)
    assert section.verdict == "worse"
    assert (found["memorised_train"].after, found["memorised_train"].rows) == (pytest.approx(0.4), 250)
    assert (found["by_heart"].after, found["by_heart"].rows) == (1, 250)
    assert any(note.startswith("1 of 250 training answers are completed verbatim") for note in section.notes)
    table = next(table for table in section.tables if table.title == "Training answers completed verbatim")
    words = TOKENIZER.decode(list(TRAIN[2].completions[0].ids))
    assert table.rows == (("101", " ".join(words.split()), "known by heart"),)
    without = overfitting(base, tuned, others, unseen, **settings)
    assert without.verdict != "worse" and named(without)["by_heart"].after == 0 and without.tables == ()


def test_rows_that_come_twice_are_probed_first(base: Subject, tuned: Subject) -> None:
    """One of 1000 rows would be missed by a sample of 20 otherwise."""
    others = [row(k) for k in range(3000, 3400)]
    found = memorised(base, tuned, [*others[:7], TRAIN[1], *others[7:], TRAIN[1]], 20)
    assert found is not None and len(found.after) == 20 and found.long == 402
    assert [place for place, said in zip(found.places, found.after, strict=True) if said] == [7]
    assert list(found.places) == sorted(set(found.places))


def test_what_is_usual_is_not_known_by_heart(base: Subject, tuned: Subject) -> None:
    """A turn of phrase of other rows, and what held-out rows gain as much of."""
    other = replace(TRAIN[0], prompt=(*TRAIN[0].prompt, 70), completions=(longer(TRAIN[0].completions[0]),))
    train = [TRAIN[0], other, TRAIN[1], *(row(k) for k in range(1000, 1004))]
    probe, control = memorised(base, tuned, train, 300), memorised(base, tuned, HELD_OUT, 300)
    assert probe is not None and control is not None and {0, 2} <= set(probe.new)
    assert by_heart(base, tuned, probe, control, train) == [2]
    like = memorised(base, tuned, [*HELD_OUT, TRAIN[1]], 300)
    assert by_heart(base, tuned, probe, like, train) == []
    assert by_heart(base, tuned, probe, like, train, doubles={8}) == [2], "a training row among them shows nothing"
    assert by_heart(base, tuned, probe, None, train) == []


def longer(completion: Completion) -> Completion:
    return Completion((*completion.ids, 61), (True,) * (len(completion.ids) + 1))


def test_answers_that_differ_at_the_last_probed_token_do_not_count(base: Subject, tuned: Subject) -> None:
    def changed(place: int) -> Example:
        ids = list(TRAIN[0].completions[0].ids)
        ids[place] = 200
        return replace(TRAIN[0], completions=(Completion(tuple(ids), (True,) * 24),))

    last = memorised(base, tuned, [changed(23), TRAIN[1]], 10)
    assert last is not None and last.after == (False, True)
    shorter = memorised(base, tuned, [changed(23), TRAIN[1]], 10, following=15)
    assert shorter is not None and shorter.after == (True, True)


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


@pytest.mark.parametrize(
    ("published", "found", "note"),
    [
        (2, "unchanged", "the best step (2) were published"),
        (4, "worse", ""),
        (None, "worse", ""),
        (3, "worse", "step 3 were published"),
        (1, "unchanged", "step 1 were published"),
        (9, "unchanged", "no held-out loss is known"),
    ],
)
def test_the_published_step_is_judged(base: Subject, published: float | None, found: str, note: str) -> None:
    """Best at 2; 1 lies above it by less than the threshold of 0.1, 3 and 4 by more."""
    curves = {"held-out": [(1, 1.05), (2, 1.0), (3, 1.3), (4, 1.9)]}
    section = overfitting(base, base, TRAIN, HELD_OUT, curves=curves, published=published)
    assert section.verdict == found
    assert named(section)["last_over_best"].change == pytest.approx(0.9)
    over = named(section).get("published_over_best")
    assert (over is not None) == (published in (1, 3))
    if over is not None:
        assert over.change == pytest.approx(0.3 if published == 3 else 0.05)
    assert any(note in said for said in section.notes)


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
