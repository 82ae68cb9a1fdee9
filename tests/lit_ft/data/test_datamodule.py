"""From a source to examples: what is kept, what is dropped and why, when it is too much, and how sources mix."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lit_ft.adapter import DataSource
from lit_ft.batches import Completion, Example
from lit_ft.data.chat import ChatEncoder
from lit_ft.data.datamodule import Mix, Prepared, load_examples, mixed, prepare
from lit_ft.data.files import open_source
from lit_ft.data.formats import Kind
from lit_ft.errors import UserError
from tests import tiny

# "q" as a user's turn and the opening of the answer, then one token per letter and the end.
PROMPT = len("user\n") + len("assistant\n") + len("\n") + 3 + 1


def row(answer: str = "abc", prompt: str = "q") -> dict[str, str]:
    return {"prompt": prompt, "completion": answer}


def pair(chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": "q", "chosen": chosen, "rejected": rejected}


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(tiny.tokenizer())


def prepared(rows: Any, encoder: ChatEncoder, kind: Kind = "sft", **options: Any) -> Prepared:
    return prepare(open_source(rows), encoder, kind, **({"max_length": 100} | options))


def answers(made: Prepared | None) -> list[str]:
    assert made is not None
    decode = tiny.tokenizer().decode
    return [decode(example.completions[0].ids).removesuffix("<|im_end|>") for example in made.examples]


def test_kept_rows_are_numbered_and_counted(encoder: ChatEncoder) -> None:
    made = prepared([row("a"), row(""), row("bcd")], encoder, max_dropped=0.5)
    assert answers(made) == ["a", "bcd"]
    assert [example.index for example in made.examples] == [0, 1]
    assert made.dropped == Counter({"empty answer": 1})
    assert made.sources == [DataSource("python", 2, open_source([row("a"), row(""), row("bcd")]).hash)]
    assert made.tokens == 2 * PROMPT + 2 + 4
    assert made.targets == 2 + 4
    assert made.summary() == (
        f"2 rows kept, 1 dropped (1 empty answer); {made.tokens} tokens, 6 trained on; median length {PROMPT + 3}"
    )
    assert prepared([row()], encoder).summary().startswith("1 rows kept, 0 dropped; ")


def test_max_rows(encoder: ChatEncoder) -> None:
    assert answers(prepared([row("a"), row("b"), row("c")], encoder, max_rows=2)) == ["a", "b"]
    assert answers(prepared([row("a"), row("b")], encoder, max_rows=9)) == ["a", "b"]


def test_up_to_a_tenth_may_be_dropped(encoder: ChatEncoder) -> None:
    rows = [row()] * 9
    assert len(prepared([*rows, row("")], encoder).examples) == 9
    with pytest.raises(UserError) as raised:
        prepared([*rows, row(""), {"text": 3}, {"question": "q"}], encoder)
    text = str(raised.value)
    assert text.startswith("python: 3 of 12 rows cannot be used (")
    assert "1 empty answer, first row 10" in text
    assert "1 text is not text, first row 11" in text
    assert "1 with unknown keys, first row 12" in text
    assert "at most 10% may be dropped" in text
    assert "data.max_dropped" in text
    assert "row 12 has the keys question" in text
    assert "\n" not in text
    assert len(prepared([*rows, row(""), row("")], encoder, max_dropped=0.2).examples) == 9
    with pytest.raises(UserError, match="1 of 10 rows cannot be used"):
        prepared([*rows, row("")], encoder, max_dropped=0.0)


def test_nothing_left_is_an_error_however_much_may_be_dropped(encoder: ChatEncoder) -> None:
    with pytest.raises(UserError, match="2 of 2 rows cannot be used"):
        prepared([row(""), row(" ")], encoder, max_dropped=1.0)


def test_the_place_of_a_bad_row_in_a_file(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (row(), row(""), row(), row(" "))))
    with pytest.raises(UserError, match=rf"2 empty answer, first {re.escape(str(path))}:2\)"):
        prepared(str(path), encoder)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json"])
def test_no_rows(tmp_path: Path, encoder: ChatEncoder, name: str) -> None:
    (tmp_path / name).write_text({"rows.csv": "prompt,completion\n", "rows.json": "[]", "rows.jsonl": "\n"}[name])
    with pytest.raises(UserError, match=rf"^{name} holds no rows\.$"):
        prepared(str(tmp_path / name), encoder)
    with pytest.raises(UserError, match=r"^python holds no rows\.$"):
        prepared([], encoder)


def test_unknown_keys_name_what_was_found_and_what_is_accepted(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"question": "q", "reply": "a"}\n')
    with pytest.raises(UserError) as raised:
        prepared(str(path), encoder)
    assert str(raised.value) == (
        f"{path}:2 has the keys question, reply, which is no known sft format. Accepted are messages: messages; "
        "sharegpt: conversations; alpaca: instruction, output; prompt-completion: prompt, completion; text: text. "
        "Other names are mapped with data.columns, e.g. 'data.columns={prompt: question, completion: answer}'."
    )
    assert answers(prepared(str(path), encoder, columns={"prompt": "question", "completion": "reply"})) == ["a"]
    with pytest.raises(UserError, match=r"row 1 has no keys, .*preference: prompt, chosen, rejected; .*"):
        prepared([{}], encoder, "preference")
    with pytest.raises(UserError, match="row 1 has the keys prompt, completion, which is no known preference format"):
        prepared([row()], encoder, "preference")


def test_a_null_is_not_called_an_unknown_key(encoder: ChatEncoder) -> None:
    with pytest.raises(UserError, match=r"1 of 1 rows cannot be used \(1 without a value in completion, first row 1"):
        prepared([{"prompt": "q", "completion": None}], encoder)


def test_values_of_every_wrong_kind_are_dropped_and_counted(encoder: ChatEncoder) -> None:
    odd: list[Any] = [None, float("nan"), float("inf"), 3, True, [], {}, [3], [None], ["a"], b"a", "\ud800"]
    for key in ("prompt", "completion"):
        rows = [row() | {key: value} for value in odd]
        made = prepared([*rows, row()], encoder, max_dropped=1.0)
        assert answers(made) == ["abc"]
        assert sum(made.dropped.values()) == len(odd)
    for key in ("instruction", "output", "input", "history", "system"):
        rows = [{"instruction": "q", "output": "a"} | {key: value} for value in odd]
        made = prepared([*rows, row()], encoder, max_dropped=1.0)
        assert len(made.examples) + sum(made.dropped.values()) == len(odd) + 1
    rows = [{"messages": value} for value in odd]
    rows += [{"messages": [{"role": "user", "content": value}, {"role": "assistant", "content": "a"}]} for value in odd]
    rows += [
        {"messages": [{"role": value, "content": "q"}, {"role": "assistant", "content": "a"}]} for value in odd[:-1]
    ]
    assert answers(prepared([*rows, row()], encoder, max_dropped=1.0)) == ["abc"]


def test_rows_longer_than_the_limit(encoder: ChatEncoder) -> None:
    fits = PROMPT + 4
    assert answers(prepared([row("abc")], encoder, max_length=fits)) == ["abc"]
    rows = [row("abc"), row("abcd"), row("abc", prompt="q" * 5)]
    made = prepared(rows, encoder, max_length=fits, max_dropped=1.0)
    assert answers(made) == ["abc"]
    assert made.dropped == Counter({f"longer than {fits} tokens": 1, f"with a prompt of {fits} tokens or more": 1})
    with pytest.raises(UserError, match=rf"raise data\.max_length \(now {fits}\) or set data\.overflow=truncate"):
        prepared(rows, encoder, max_length=fits)


def test_truncation_cuts_answers_and_never_prompts(encoder: ChatEncoder) -> None:
    limit = PROMPT + 3
    made = prepared(
        [row("abc"), row("abcdef"), row("a", "qqqqqq")], encoder, max_length=limit, overflow="truncate", max_dropped=1.0
    )
    assert answers(made) == ["abc", "abc"]
    assert [example.longest for example in made.examples] == [limit, limit]
    assert made.dropped == Counter({f"with a prompt of {limit} tokens or more": 1})


def test_truncation_of_pairs(encoder: ChatEncoder) -> None:
    limit = PROMPT + 3
    rows = [pair("abcdef", "x"), pair("abcdef", "abcxyz"), pair("ab", "cd")]
    made = prepared(rows, encoder, "preference", max_length=limit, overflow="truncate", max_dropped=1.0)
    assert [[len(completion.ids) for completion in example.completions] for example in made.examples] == [
        [3, 2],
        [3, 3],
    ]
    assert made.dropped == Counter({"with equal completions once cut": 1})  # there is nothing left to prefer


def test_truncation_within_a_later_question(encoder: ChatEncoder) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "q" * 50},
        {"role": "assistant", "content": "b"},
    ]
    asked = {"prompt": messages[:1], "chosen": messages[1:], "rejected": [{"role": "assistant", "content": "c"}]}
    made = prepared([asked], encoder, "preference", max_length=PROMPT + 5, overflow="truncate")
    assert [sum(completion.mask) for completion in made.examples[0].completions] == [2, 2]
    assert made.examples[0].longest == PROMPT + 5


def test_the_encoders_errors_are_not_counted_as_rows() -> None:
    bare = ChatEncoder(tiny.tokenizer(chat=False))
    with pytest.raises(UserError, match="has no chat template"):
        prepared([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}], bare)


# Held-out rows


def fill(folder: Path, **files: list[dict[str, str]]) -> str:
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(folder)


def letters(count: int, start: str = "a") -> list[dict[str, str]]:
    return [row(chr(ord(start) + k)) for k in range(count)]


def test_held_out_rows_beside_the_training_rows(tmp_path: Path, encoder: ChatEncoder) -> None:
    folder = fill(tmp_path, train=letters(3), heldout=letters(2, "x"))
    train, val = load_examples(folder, encoder, "sft", max_length=100)
    assert (answers(train), answers(val)) == (["a", "b", "c"], ["x", "y"])
    _, val = load_examples(folder, encoder, "sft", max_length=100, max_val_rows=1, max_rows=2)
    assert answers(val) == ["x"]
    _, val = load_examples(folder, encoder, "sft", max_length=100, val_path=letters(1, "v"))
    assert answers(val) == ["v"]  # what is asked for comes first


def test_held_out_rows_drawn_from_the_training_rows(encoder: ChatEncoder) -> None:
    rows = letters(20)
    train, val = load_examples(rows, encoder, "sft", val_split=0.25, seed=1, max_length=100)
    assert val is not None
    assert (len(train.examples), len(val.examples)) == (15, 5)
    assert sorted(answers(train) + answers(val)) == [one["completion"] for one in rows]
    assert [example.index for example in train.examples] == list(range(15))
    assert [example.index for example in val.examples] == list(range(5))
    assert (train.sources[0].rows, val.sources[0].rows) == (15, 5)
    again, _ = load_examples(rows, encoder, "sft", val_split=0.25, seed=1, max_length=100)
    other, _ = load_examples(rows, encoder, "sft", val_split=0.25, seed=2, max_length=100)
    assert answers(again) == answers(train) != answers(other)
    _, val = load_examples(rows, encoder, "sft", val_split=0.25, max_val_rows=2, max_length=100)
    assert len(answers(val)) == 2


@pytest.mark.parametrize(
    ("count", "share", "held_out"), [(10, 0.0, 0), (1, 0.5, 0), (2, 0.01, 1), (3, 0.34, 1), (2, 0.99, 1)]
)
def test_neither_part_is_ever_empty(encoder: ChatEncoder, count: int, share: float, held_out: int) -> None:
    train, val = load_examples(letters(count), encoder, "sft", val_split=share, max_length=100)
    assert len(train.examples) == count - held_out
    assert (len(val.examples) if val else 0) == held_out
    assert load_examples(letters(count), encoder, "sft", val_split=share, max_val_rows=0, max_length=100)[1] is None


# Mixing


def single(token: int) -> Example:
    return Example((1,), (Completion((token,), (True,)),))


def some(name: str, *tokens: int) -> Prepared:
    return Prepared([single(token) for token in tokens], [DataSource(name, len(tokens), "sha256:0")])


def tokens_of(made: Prepared) -> list[int]:
    return [example.completions[0].ids[0] for example in made.examples]


def test_mixed_draws_rows_by_weight() -> None:
    main, other = some("main", *range(10)), some("other", *range(100, 120))
    made = mixed(main, [(other, 0.5)], seed=0)
    found = tokens_of(made)
    assert found[:10] == list(range(10))
    assert len(found) == 15
    assert len(set(found[10:])) == 5
    assert set(found[10:]) <= set(range(100, 120))
    assert [example.index for example in made.examples] == list(range(15))
    assert [(source.source, source.rows) for source in made.sources] == [("main", 10), ("other", 5)]
    assert tokens_of(mixed(main, [(other, 0.5)], seed=0)) == found
    assert tokens_of(mixed(main, [(other, 0.5)], seed=1)) != found


def test_mixed_takes_a_small_source_over_again_evenly() -> None:
    made = mixed(some("main", *range(10)), [(some("other", 100, 101, 102), 0.7)], seed=0)
    assert sorted(Counter(tokens_of(made)[10:]).values()) == [2, 2, 3]


def test_mixed_with_several_sources_and_none() -> None:
    main = some("main", *range(4))
    made = mixed(main, [(some("one", 10), 1.0), (some("two", 20), 0.5), (some("off", 30), 0.0)], seed=0)
    assert tokens_of(made) == [0, 1, 2, 3, 10, 10, 10, 10, 20, 20]
    assert [source.rows for source in made.sources] == [4, 4, 2, 0]
    assert tokens_of(mixed(main, [], seed=0)) == [0, 1, 2, 3]


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_mixed_refuses_weights_that_are_none(weight: float) -> None:
    with pytest.raises(UserError, match=r"data\.mix: weight=.* of other is not a number from 0 on"):
        mixed(some("main", 1), [(some("other", 2), weight)], seed=0)


def test_load_examples_mixes_into_the_training_rows_only(tmp_path: Path, encoder: ChatEncoder) -> None:
    other = tmp_path / "general.jsonl"
    other.write_text("".join(json.dumps({"text": f"{k} general"}) + "\n" for k in range(4)))
    train, val = load_examples(
        letters(10), encoder, "sft", val_split=0.2, mix=[Mix(str(other), 0.5)], max_length=100, max_rows=10
    )
    assert len(train.examples) == 8 + 4
    assert sorted(answers(train)[8:]) == [" general"] * 4  # the first token of a text is its prompt
    assert len(answers(val)) == 2
    assert [(source.source, source.rows) for source in train.sources] == [("python", 8), ("general.jsonl", 4)]
    with pytest.raises(UserError, match="no such file"):
        load_examples(letters(2), encoder, "sft", mix=[Mix("missing.jsonl", 1.0)], max_length=100)


# Questions, and rankings.


def test_questions_keep_their_rows_and_have_no_completions(encoder: ChatEncoder) -> None:
    rows = [{"prompt": "q", "answer": "4", "tags": ["sum"]}, {"prompt": " "}, {"prompt": "qq", "completion": "x"}]
    made = prepared(rows, encoder, "prompt", max_dropped=0.5)
    assert [example.row for example in made.examples] == [rows[0], rows[2]]
    assert [example.completions for example in made.examples] == [(), ()]
    assert [example.index for example in made.examples] == [0, 1]
    # What is asked is what an answer would have been trained to follow.
    (trained,) = prepared([row()], encoder).examples
    assert made.examples[0].prompt == trained.prompt
    assert made.targets == 0 and made.tokens == 2 * PROMPT + 1
    assert made.summary() == (
        f"2 rows kept, 1 dropped (1 empty prompt); {made.tokens} tokens, 0 trained on; median length {PROMPT + 0.5:.0f}"
    )
    assert trained.row is None


def test_plain_questions(encoder: ChatEncoder) -> None:
    plain = ChatEncoder(tiny.tokenizer(chat=False))
    (example,) = prepared([{"prompt": "once upon"}], plain, "prompt").examples
    assert tiny.tokenizer().decode(example.prompt) == "once upon"
    with pytest.raises(UserError, match="the prompt does not end with a user's turn"):
        prepared(
            [{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}], encoder, "prompt"
        )


def test_questions_leave_room_for_an_answer(encoder: ChatEncoder) -> None:
    """A prompt of n tokens and an answer of up to `room` more fit into max_length, to the token."""
    rows = [{"prompt": "q" * count} for count in (1, 2, 3)]
    for room, kept in ((10, 3), (11, 2), (12, 1)):
        made = prepared(rows, encoder, "prompt", max_length=PROMPT + 2 + 10, room=room, max_dropped=0.9)
        assert len(made.examples) == kept
        if kept < 3:
            reason = f"with less than {room} of {PROMPT + 12} tokens left for an answer"
            assert made.dropped == Counter({reason: 3 - kept})
    with pytest.raises(UserError, match=r"3 of 3 rows cannot be used .* tokens left for an answer.*data\.max_length"):
        prepared(rows, encoder, "prompt", max_length=PROMPT + 12, room=20)
    # Where no answer is to be made, a prompt may fill the context.
    assert len(prepared(rows[:1], encoder, "prompt", max_length=PROMPT).examples) == 1


def test_truncating_does_not_make_room(encoder: ChatEncoder) -> None:
    with pytest.raises(UserError, match="tokens left for an answer"):
        prepared([{"prompt": "q" * 50}], encoder, "prompt", max_length=PROMPT + 40, room=5, overflow="truncate")


def test_held_out_questions_leave_room_as_well(encoder: ChatEncoder) -> None:
    rows = [{"prompt": "q" * (k % 3 + 1), "k": k} for k in range(10)]
    train, val = load_examples(rows, encoder, "prompt", val_split=0.2, max_length=PROMPT + 12, room=10)
    assert val is not None and (len(train.examples), len(val.examples)) == (8, 2)
    assert sorted(e.row["k"] for e in [*train.examples, *val.examples] if e.row is not None) == list(range(10))
    with pytest.raises(UserError, match="tokens left for an answer"):
        load_examples(rows, encoder, "prompt", val_path=[{"prompt": "q" * 9}], max_length=PROMPT + 12, room=10)


def test_rankings_keep_order_and_margin(encoder: ChatEncoder) -> None:
    rows = [
        {"prompt": "q", "completions": ["best", "good", "bad"]},
        {"prompt": "q", "chosen": "yes", "rejected": "no", "margin": 1.5},
    ]
    made = prepared(rows, encoder, "ranked")
    decode = tiny.tokenizer().decode
    texts = [[decode(c.ids).removesuffix("<|im_end|>") for c in example.completions] for example in made.examples]
    assert texts == [["best", "good", "bad"], ["yes", "no"]]
    assert [example.margin for example in made.examples] == [None, 1.5]
    assert all(example.row is None for example in made.examples)


def test_cut_rankings_must_still_differ(encoder: ChatEncoder) -> None:
    rows = [{"prompt": "q", "completions": ["aaaa", "bbbb", "aaac"]}]
    kept = prepared(rows, encoder, "ranked", max_length=PROMPT + 4, overflow="truncate")
    assert [len(c.ids) for c in kept.examples[0].completions] == [4, 4, 4]
    with pytest.raises(UserError, match="with equal completions once cut"):
        prepared(rows, encoder, "ranked", max_length=PROMPT + 3, overflow="truncate")


def test_no_held_out_rows_if_none_are_wanted(tmp_path: Path) -> None:
    """Also where a file of them lies beside."""
    for name in ("train", "heldout"):
        rows = [json.dumps({"prompt": f"{name} {k}", "completion": "yes"}) for k in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    encoder = ChatEncoder(tiny.tokenizer())
    data, val = load_examples(str(tmp_path), encoder, "sft", max_val_rows=0, max_length=512)
    assert len(data.examples) == 4 and val is None
    _, val = load_examples(str(tmp_path), encoder, "sft", max_val_rows=3, max_length=512)
    assert val is not None and len(val.examples) == 3
