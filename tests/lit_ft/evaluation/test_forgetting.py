"""The section on what was forgotten: a model against itself, one that drifts, and numbers derived by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from lit_ft.batches import Completion, Example
from lit_ft.errors import UserError
from lit_ft.evaluation.forgetting import forgetting, kl_change, own_answers
from lit_ft.evaluation.gate import conditions, reasons
from lit_ft.evaluation.report import Report
from lit_ft.evaluation.section import Figure, Section
from lit_ft.evaluation.subject import Subject
from lit_ft.models.kinds.lora import apply_lora
from lit_ft.rollouts import Rollout
from tests import tiny

TOKENIZER = tiny.tokenizer()
WEATHER = ["Rain fell all night.", "The wind turned.", "Snow lay deep.", "Fog came up.", "It froze.", "The sun set."]
TEXTS = {"weather": WEATHER, "stone": ["Granite is hard."] * 2}
PROMPTS = [(5, 6, 7), (8, 9), (10,) * 6, (40, 41), (50, 51), (60,), (70, 71, 72), (80, 81)]


def instruction(prompt: tuple[int, ...], answer: tuple[int, ...]) -> Example:
    return Example(prompt, (Completion(answer, (True,) * len(answer)),))


INSTRUCTIONS = {"sums": [instruction((k, k + 1), (k + 2, k + 3)) for k in range(5, 13)]}
EVERYTHING: dict[str, Any] = {
    "texts": TEXTS,
    "instructions": INSTRUCTIONS,
    "prompts": PROMPTS,
    "answers": 2,
    "max_new_tokens": 6,
}


@pytest.fixture(scope="module")
def base() -> Subject:
    model = apply_lora(tiny.model(), r=4, alpha=8, dropout=0.0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return Subject("base", model, TOKENIZER)


@pytest.fixture(scope="module")
def tuned(base: Subject) -> Subject:
    """Random changes to every layer: nothing of what the base knew can be better known."""
    return replace(base, name="tuned", role="default")


def named(section: Section) -> dict[str, Figure]:
    return {figure.name: figure for figure in section.figures}


def test_a_model_against_itself(base: Subject) -> None:
    section = forgetting(base, replace(base, name="tuned"), **EVERYTHING)
    assert section.verdict == "unchanged"
    assert list(named(section)) == ["text_loss", "instruction_loss", "kl"]
    for found in section.figures:
        assert (found.change, found.low, found.high) == (0, 0, 0)
    # Of the two kinds of texts neither has eight rows.
    nothing, few = ("+0.000", "+0.000 to +0.000"), ("+0.000", "too few rows")
    assert [row[5:] for row in section.tables[0].rows] == [few, few, nothing]


def test_a_drifted_model(base: Subject, tuned: Subject) -> None:
    """KL per token is the mean over the tokens of the base's own answers; here it is far from the base."""
    section = forgetting(base, tuned, **EVERYTHING)
    assert section.verdict == "worse" and "threshold 0.02" in section.sentence
    assert "far from the base above 0.5" in section.sentence
    kl = named(section)["kl"]
    rows = tuned.kl_from(base, own_answers(base, PROMPTS, 2, 6, 0))
    assert len(rows) == 8
    assert kl.after == pytest.approx(sum(value for value, _ in rows) / sum(count for _, count in rows))
    assert kl.before == 0 and kl.rows == 8 and kl.low is not None and kl.low > 0.02
    # The same drift beside thresholds below and above it, and beside none; that of the losses is another.
    alone = {"prompts": PROMPTS, "max_new_tokens": 6}
    assert forgetting(base, tuned, **alone, threshold=50.0, kl_threshold=kl.low / 2).verdict == "worse"
    assert forgetting(base, tuned, **alone, threshold=0.0, kl_threshold=50.0).verdict == "unchanged"
    shown = forgetting(base, tuned, **alone, kl_threshold=None)
    assert shown.verdict == "unjudged" and "shown and not judged" in shown.sentence


def test_its_own_answers_are_those_of_the_base(base: Subject, tuned: Subject) -> None:
    """Scored with the token that ended them; the tuned model's own would be others."""
    answers = own_answers(base, PROMPTS, 2, 6, 3)
    drawn = base.complete(PROMPTS, 2, max_new_tokens=6, temperature=1.0, seed=3)
    assert [[c.ids for c in e.completions] for e in answers] == [[r.completion for r in rows] for rows in drawn]
    assert all(all(c.mask) for e in answers for c in e.completions)
    assert answers != own_answers(tuned, PROMPTS, 2, 6, 3)


def test_kl_is_weighted_by_tokens() -> None:
    """(3 + 1)/(1 + 3) and not (3 + 1/3)/2; rows without a token do not count."""
    found = kl_change([(3.0, 1), (1.0, 3), (0.0, 0)])
    assert (found.before, found.after, found.rows) == (0.0, 1.0, 2)


class Told:
    """A subject that gives each text one score, and is as far from every other as it is told."""

    def __init__(self, per_token: dict[str, float], distance: float = 0.0) -> None:
        self.per_token, self.distance = per_token, distance

    def text_logprobs(self, texts: list[str]) -> list[tuple[float, int]]:
        return [(self.per_token[text] * len(text), len(text)) for text in texts]

    def fits(self, prompt: tuple[int, ...], max_new_tokens: int) -> bool:
        return True

    def complete(self, prompts: list[tuple[int, ...]], n: int, **_: Any) -> list[list[Rollout]]:
        return [[Rollout(prompt, (7, 2), True)] * n for prompt in prompts]

    def kl_from(self, other: Subject, examples: list[Example]) -> list[tuple[float, int]]:
        return [(self.distance * 2, 2) for _ in examples]


def test_categories_and_all_of_them() -> None:
    """Of 4 and 2 tokens a row: loss 1 → 2 in `b`, 3 → 3 in `a`; together 8·(4·1 + 2·3)/48 = 5/3 and 7/3."""
    texts = {"b": ["bbbb"] * 8, "a": ["aa"] * 8, "none": []}
    before, after = Told({"bbbb": -1.0, "aa": -3.0}), Told({"bbbb": -2.0, "aa": -3.0})
    section = forgetting(cast(Subject, before), cast(Subject, after), texts=texts)
    found = named(section)["text_loss"]
    assert (found.before, found.after, found.rows) == (pytest.approx(5 / 3), pytest.approx(7 / 3), 16)
    assert section.tables[0].rows == (
        ("texts", "a", "8", "3.000", "3.000", "+0.000", "+0.000 to +0.000"),
        ("texts", "b", "8", "1.000", "2.000", "+1.000", "+1.000 to +1.000"),
    )


@pytest.mark.parametrize(
    ("change", "found"), [(0.03, "worse"), (0.019, "unchanged"), (-0.019, "unchanged"), (-0.03, "better")]
)
def test_the_threshold_in_both_directions(change: float, found: str) -> None:
    before, after = Told({"abcd": -1.0, "ef": -3.0}), Told({"abcd": -1.0 - change, "ef": -3.0 - change})
    section = forgetting(cast(Subject, before), cast(Subject, after), texts={"a": ["abcd", "ef"] * 4})
    assert section.verdict == found


def test_few_rows_have_no_interval_and_prove_nothing() -> None:
    """However much the loss grew."""
    before, after = cast(Subject, Told({"abcd": -1.0})), cast(Subject, Told({"abcd": -9.0}))
    section = forgetting(before, after, texts={"a": ["abcd"] * 7})
    assert section.verdict == "unchanged" and section.tables[0].rows[0][-1] == "too few rows"
    assert "too few rows for an interval" in section.sentence
    assert any("7 general texts are too few for an interval" in note for note in section.notes)
    enough = forgetting(before, after, texts={"a": ["abcd"] * 8})
    assert enough.verdict == "worse" and any("8 general texts are few" in note for note in enough.notes)
    assert not any("few" in note for note in forgetting(before, after, texts={"a": ["abcd"] * 30}).notes)


def passes(section: Section, *given: str) -> bool:
    return not reasons(conditions(given), Report("made@v1", "tiny", "base", "today", (section,)))


@pytest.mark.parametrize(("distance", "found"), [(0.1, "unchanged"), (0.45, "unchanged"), (0.6, "worse")])
def test_a_remedied_adapter_passes_the_gate(distance: float, found: str) -> None:
    """Its losses are as they were, and it is 0.1 nats from its base: those measured were at 0.087 to 0.273."""
    texts = {"a": ["abcd", "ef"] * 8}
    before, after = Told({"abcd": -1.0, "ef": -3.0}), Told({"abcd": -1.0, "ef": -3.0}, distance)
    section = forgetting(cast(Subject, before), cast(Subject, after), texts=texts, prompts=PROMPTS)
    assert section.verdict == found
    assert passes(section, "forgetting=worse") == (found == "unchanged")
    # Whoever wants it nearer says how near.
    assert not passes(section, "forgetting.kl.after>0.05")
    assert passes(section, "forgetting.kl.after>0.7", "forgetting.kl.low>0.7")


def test_a_loss_that_grew_is_worse_however_near_the_base() -> None:
    before, after = Told({"abcd": -1.0}), Told({"abcd": -1.1}, 0.01)
    section = forgetting(cast(Subject, before), cast(Subject, after), texts={"a": ["abcd"] * 8}, prompts=PROMPTS)
    assert section.verdict == "worse" and not passes(section, "forgetting=worse")


def test_a_category_that_is_worse_by_itself_is_named() -> None:
    """Loss grows by 0.3 in `code` and 0.1 in `law`, and falls by 0.4 in `news`: the mean is no worse."""
    before = Told({"code": -1.0, "laws": -1.0, "news": -1.0})
    after = Told({"code": -1.3, "laws": -1.1, "news": -0.6})
    texts = {"programs": ["code"] * 8, "law": ["laws"] * 8, "papers": ["news"] * 8}
    section = forgetting(cast(Subject, before), cast(Subject, after), texts=texts)
    assert section.verdict == "unchanged"
    assert "Worse by itself, of 3 categories of texts: programs (change +0.3," in section.sentence
    assert "law" not in section.sentence
    # Where the mean is worse, too, that says it.
    worse = forgetting(cast(Subject, before), cast(Subject, after), texts={"programs": ["code"] * 8, "law": ["laws"]})
    assert worse.verdict == "worse" and "by itself" not in worse.sentence


def test_the_distance_by_category(base: Subject, tuned: Subject) -> None:
    """Each category has the mean over the tokens of its own answers; a prompt without room takes its own along."""
    options = {"max_new_tokens": 6, "categories": ["a", "gone", "b", "a", "a"]}
    prompts = [PROMPTS[0], (5,) * 2048, *PROMPTS[1:4]]
    section = forgetting(base, tuned, prompts=prompts, **options)
    apart = tuned.kl_from(base, own_answers(base, PROMPTS[:4], 1, 6, 0))  # answers to what fits
    a = [apart[k] for k in (0, 2, 3)]
    of_a, of_b = section.tables[0].rows
    assert of_a[:3] == ("own answers, KL", "a", "3") and of_b[1:3] == ("b", "1")
    assert of_a[4] == f"{sum(value for value, _ in a) / sum(count for _, count in a):.3f}"
    assert of_b[-1] == "too few rows"


def test_prompts_without_room_are_left_out(base: Subject) -> None:
    section = forgetting(base, base, prompts=[*PROMPTS, (5,) * 2048, ()], max_new_tokens=2)
    assert named(section)["kl"].rows == 8
    assert any("2 prompts leave no room" in note for note in section.notes)


@pytest.mark.parametrize(
    "empty", [{}, {"texts": {}}, {"texts": {"a": []}, "instructions": {"b": []}}, {"prompts": [()]}]
)
def test_nothing_to_measure_on(base: Subject, empty: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no general texts, instructions or prompts"):
        forgetting(base, base, **empty)


def test_an_instruction_without_an_answer(base: Subject) -> None:
    with pytest.raises(UserError, match="1 of 9 general instructions have no answer"):
        forgetting(base, base, instructions={**INSTRUCTIONS, "empty": [Example((5,), ())]})
