"""The example data keeps its promises: sizes, no leak into the held-out rows, one house style, nothing dropped."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from lit_ft.data.chat import ChatEncoder
from lit_ft.data.datamodule import load_examples
from lit_ft.data.files import examples_folder, open_source
from tests import tiny

Rows = list[dict[str, Any]]


def rows(path: str) -> Rows:
    return [row for _, row in open_source(str(examples_folder() / path)).rows]


SFT, SFT_HELD = rows("support_sft/train.jsonl"), rows("support_sft/heldout.jsonl")
PAIRS, PAIRS_HELD = rows("support_preferences/train.jsonl"), rows("support_preferences/heldout.jsonl")
CONVERSATIONS, ALL_PAIRS = SFT + SFT_HELD, PAIRS + PAIRS_HELD


def asked(found: Rows) -> list[str]:
    """Every question that a customer asks in these rows, follow-ups included."""
    turns = [m["content"] for row in found for m in row.get("messages", []) if m["role"] == "user"]
    return turns + [row["prompt"] for row in found if "prompt" in row]


GOOD = [m["content"] for row in CONVERSATIONS for m in row["messages"] if m["role"] == "assistant"]
GOOD += [row["chosen"] for row in ALL_PAIRS]


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))


def alike(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def test_sizes() -> None:
    assert len(SFT) >= 300
    assert len(PAIRS) >= 200
    assert len(SFT_HELD) == len(PAIRS_HELD) == 40
    assert sum(len(row["messages"]) > 2 for row in SFT) >= len(SFT) / 10
    assert sum(len(row["messages"]) > 2 for row in SFT_HELD) >= len(SFT_HELD) / 10
    assert len(rows("article_preferences/train.jsonl")) == 3


def test_conversations_alternate_and_end_with_an_answer() -> None:
    for row in CONVERSATIONS:
        assert list(row) == ["messages"]
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
    for row in ALL_PAIRS:
        assert list(row) == ["prompt", "chosen", "rejected"]
    for text in [*asked(CONVERSATIONS + ALL_PAIRS), *GOOD, *(row["rejected"] for row in ALL_PAIRS)]:
        assert text == text.strip() != ""


@pytest.mark.parametrize("train", [SFT, PAIRS], ids=["sft", "preferences"])
@pytest.mark.parametrize("held_out", [SFT_HELD, PAIRS_HELD], ids=["held-out sft", "held-out preferences"])
def test_no_held_out_question_is_trained_on_nor_one_much_like_it(train: Rows, held_out: Rows) -> None:
    """Within a set and across the two: DPO goes on from what SFT has seen."""
    seen = [(words(text), text) for text in asked(train)]
    for text in asked(held_out):
        mine = words(text)
        assert max((alike(mine, theirs), found) for theirs, found in seen)[0] <= 0.55, text


def test_questions_differ_within_each_set() -> None:
    for found in (CONVERSATIONS, ALL_PAIRS):
        bags = [words(text) for text in asked(found)]
        assert max(alike(a, b) for a, b in itertools.combinations(bags, 2)) <= 0.6


def test_held_out_answers_are_not_copies() -> None:
    trained = [m["content"] for row in SFT for m in row["messages"] if m["role"] == "assistant"]
    trained += [row["chosen"] for row in PAIRS]
    bags = [words(text) for text in trained]
    held_out = [m["content"] for row in SFT_HELD for m in row["messages"] if m["role"] == "assistant"]
    for text in held_out + [row["chosen"] for row in PAIRS_HELD]:
        mine = words(text)
        assert max(alike(mine, bag) for bag in bags) <= 0.7, text
    assert len(set(GOOD)) == len(GOOD)


def test_house_style() -> None:
    """Short and plain: a direct answer, numbered steps if any, and one next step on the last line."""
    for text in GOOD:
        lines = text.split("\n")
        assert [line.startswith("Next: ") for line in lines] == [False] * (len(lines) - 1) + [True], text
        assert text.endswith("."), text
        assert 50 <= len(text.split()) <= 90, text
        assert "!" not in text and "—" not in text, text
        assert text.replace("£", "").isascii(), text
        assert not re.search(r"\*\*|__|^#|^[-*] |`", text, re.MULTILINE), text
        numbers = [int(found) for found in re.findall(r"^(\d+)\. ", text, re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1)), text
        assert len(numbers) in (0, 2, 3, 4), text


def test_rejected_answers_are_of_another_kind() -> None:
    for row in ALL_PAIRS:
        assert "Next: " not in row["rejected"]
        assert alike(words(row["chosen"]), words(row["rejected"])) < 0.5, row["prompt"]
    # Length must not give the preference away.
    ratio = sum(len(row["chosen"]) for row in ALL_PAIRS) / sum(len(row["rejected"]) for row in ALL_PAIRS)
    assert 0.8 <= ratio <= 1.25


@pytest.mark.parametrize(("name", "kind"), [("sft", "sft"), ("preferences", "preference")])
def test_everything_encodes_and_nothing_is_dropped(name: str, kind: Any) -> None:
    """In bytes, so about four times as long as with a real tokenizer."""
    encoder = ChatEncoder(tiny.tokenizer())
    train, val = load_examples(f"examples:support_{name}", encoder, kind, max_length=4096, max_dropped=0.0)
    assert val is not None
    assert (len(train.examples), len(val.examples)) == ((300, 40) if kind == "sft" else (200, 40))
    assert not train.dropped and not val.dropped
    assert all(len(example.completions) == (1 if kind == "sft" else 2) for example in train.examples)


def test_the_articles_rows_encode() -> None:
    encoder = ChatEncoder(tiny.tokenizer())
    train, val = load_examples("examples:article_preferences", encoder, "preference", max_length=512, val_split=0.34)
    assert (len(train.examples), len(val.examples) if val else 0) == (2, 1)
