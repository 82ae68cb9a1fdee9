"""Every shape in which people keep conversations and preferences, and what is said of rows that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest

from lit_ft.data.formats import Kind, Record, RowError, formats, to_record, transcript

NAN = float("nan")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def said(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


CHAT = [user("Hi"), assistant("Hello.")]

SFT: dict[str, tuple[dict[str, Any], Record]] = {
    "messages": ({"messages": CHAT}, Record([], (CHAT,))),
    "messages, with other fields": (
        {"messages": [{**user("Hi"), "name": None}, assistant("Hello.")], "prompt": "Hi", "prompt_id": 3},
        Record([], (CHAT,)),
    ),
    "messages and a system column": (
        {"messages": CHAT, "system": "Be brief."},
        Record([], ([system("Be brief."), *CHAT],)),
    ),
    "a system turn goes before the column": (
        {"messages": [system("Be long."), *CHAT], "system": "Be brief."},
        Record([], ([system("Be long."), *CHAT],)),
    ),
    "sharegpt": (
        {"conversations": [said("system", "S"), said("human", "Hi"), said("gpt", "Hello.")]},
        Record([], ([system("S"), *CHAT],)),
    ),
    "sharegpt with a system column": (
        {"conversations": [said("human", "Hi"), said("gpt", "Hello.")], "system": "S", "tools": ""},
        Record([], ([system("S"), *CHAT],)),
    ),
    "conversations in OpenAI's words": ({"conversations": CHAT}, Record([], (CHAT,))),
    "other names of roles": (
        {"conversations": [said("prompter", "Hi"), said("bot", "Hello."), said("user", "So?"), said("model", "So.")]},
        Record([], ([*CHAT, user("So?"), assistant("So.")],)),
    ),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello."}, Record("Hi", ("Hello.",))),
    "prompt and completion of messages": (
        {"prompt": [system("S"), user("Hi")], "completion": [assistant("Hello.")]},
        Record([system("S"), user("Hi")], ([assistant("Hello.")],)),
    ),
    "a prompt of messages, a string": (
        {"prompt": [user("Hi")], "completion": "Hello."},
        Record([user("Hi")], ("Hello.",)),
    ),
    "alpaca": ({"instruction": "Hi", "output": "Hello."}, Record([user("Hi")], ("Hello.",))),
    "alpaca with input": (
        {"instruction": "Translate.", "input": "chat", "output": "cat"},
        Record([user("Translate.\nchat")], ("cat",)),
    ),
    "alpaca with empty input": (
        {"instruction": "Hi", "input": "", "output": "Hello.", "history": None, "system": NAN},
        Record([user("Hi")], ("Hello.",)),
    ),
    "alpaca with only input": (
        {"instruction": "", "input": "Hi", "output": "Hello."},
        Record([user("Hi")], ("Hello.",)),
    ),
    "alpaca with history and system": (
        {
            "instruction": "And now?",
            "input": "",
            "output": "Six.",
            "system": "Tell the time.",
            "history": [["What time is it?", "Five."], ["Sure?", "Yes."]],
        },
        Record(
            [
                system("Tell the time."),
                user("What time is it?"),
                assistant("Five."),
                user("Sure?"),
                assistant("Yes."),
                user("And now?"),
            ],
            ("Six.",),
        ),
    ),
    "text": ({"text": "Once upon a time"}, Record("", ("Once upon a time",))),
    "text beside an empty messages column": ({"messages": None, "text": "Once"}, Record("", ("Once",))),
    "text beside pandas' empty cell": ({"messages": NAN, "text": "Once"}, Record("", ("Once",))),
}

PREFERENCE: dict[str, tuple[dict[str, Any], Record]] = {
    "strings": ({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}, Record("Hi", ("Hello.", "No."))),
    "messages": (
        {"prompt": [user("Hi")], "chosen": [assistant("Hello.")], "rejected": [assistant("No.")]},
        Record([user("Hi")], ([assistant("Hello.")], [assistant("No.")])),
    ),
    "a string and messages": (
        {"prompt": "Hi", "chosen": [assistant("Hello.")], "rejected": [assistant("No.")]},
        Record("Hi", ([assistant("Hello.")], [assistant("No.")])),
    ),
    "a prompt that chosen and rejected hold again": (
        {"prompt": "Hi", "chosen": CHAT, "rejected": [user("Hi"), assistant("No.")], "score_chosen": 8.0},
        Record([user("Hi")], ([assistant("Hello.")], [assistant("No.")])),
    ),
    "sharegpt, answers as objects (LLaMA-Factory)": (
        {
            "conversations": [said("human", "Hi"), said("gpt", "Hello."), said("human", "So?")],
            "chosen": said("gpt", "So."),
            "rejected": said("gpt", "What?"),
        },
        Record([*CHAT, user("So?")], ([assistant("So.")], [assistant("What?")])),
    ),
    "sharegpt, answers as lists and a system column": (
        {
            "conversations": [said("human", "Hi")],
            "chosen": [said("gpt", "Hello.")],
            "rejected": [said("gpt", "No.")],
            "system": "S",
        },
        Record([system("S"), user("Hi")], ([assistant("Hello.")], [assistant("No.")])),
    ),
    "sharegpt, answers as strings": (
        {"conversations": [said("human", "Hi")], "chosen": "Hello.", "rejected": "No."},
        Record([user("Hi")], ("Hello.", "No.")),
    ),
    "alpaca": (
        {"instruction": "Hi", "input": "", "chosen": "Hello you.", "rejected": "Hello me."},
        Record([user("Hi")], ("Hello you.", "Hello me.")),
    ),
    "implicit, messages": (
        {"chosen": [*CHAT, user("So?"), assistant("So.")], "rejected": [*CHAT, user("So?"), assistant("What?")]},
        Record([*CHAT, user("So?")], ([assistant("So.")], [assistant("What?")])),
    ),
    "implicit, longer than one turn": (
        {"chosen": [user("Hi"), assistant("A"), user("B"), assistant("C")], "rejected": [user("Hi"), assistant("No.")]},
        Record([user("Hi")], ([assistant("A"), user("B"), assistant("C")], [assistant("No.")])),
    ),
    "implicit, strings": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        Record("The sky is", (" blue.", " green.")),
    ),
    "implicit, transcripts": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: So?\n\nAssistant: So it is.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: So?\n\nAssistant: So what?",
        },
        # The common prefix of the strings would end within the answers.
        Record([*CHAT, user("So?")], ([assistant("So it is.")], [assistant("So what?")])),
    ),
}


RANKED: dict[str, tuple[dict[str, Any], Record]] = {
    "three answers, the best first": (
        {"prompt": "Hi", "completions": ["Hello.", "Hey.", "No."]},
        Record("Hi", ("Hello.", "Hey.", "No.")),
    ),
    "answers of messages": (
        {"prompt": [user("Hi")], "completions": [[assistant("Hello.")], [assistant("No.")]]},
        Record([user("Hi")], ([assistant("Hello.")], [assistant("No.")])),
    ),
    "answers before a pair": (
        {"prompt": "Hi", "completions": ["A", "B", "C"], "chosen": "A", "rejected": "C"},
        Record("Hi", ("A", "B", "C")),
    ),
    "a pair": ({"prompt": "Hi", "chosen": "A", "rejected": "B"}, Record("Hi", ("A", "B"))),
    "a margin": ({"prompt": "Hi", "chosen": "A", "rejected": "B", "margin": 2}, Record("Hi", ("A", "B"), 2.0)),
    "a margin of ranked answers": (
        {"prompt": "Hi", "completions": ["A", "B", "C"], "margin": 0.5},
        Record("Hi", ("A", "B", "C"), 0.5),
    ),
    "a margin below 0": (
        {"prompt": "Hi", "chosen": "A", "rejected": "B", "margin": -1},
        Record("Hi", ("A", "B"), -1.0),
    ),
    "no margin in this row": (
        {"prompt": "Hi", "chosen": "A", "rejected": "B", "margin": None},
        Record("Hi", ("A", "B")),
    ),
    "pandas' empty cell": ({"prompt": "Hi", "chosen": "A", "rejected": "B", "margin": NAN}, Record("Hi", ("A", "B"))),
    "implicit prompt": (
        {"chosen": [user("Hi"), assistant("A")], "rejected": [user("Hi"), assistant("B")], "margin": 1},
        Record([user("Hi")], ([assistant("A")], [assistant("B")]), 1.0),
    ),
}

LONGER = [user("Hi"), assistant("Hello."), user("So?")]
PROMPT: dict[str, tuple[dict[str, Any], Record]] = {
    "text": ({"prompt": "Hi"}, Record("Hi", ())),
    "messages": ({"prompt": LONGER}, Record(LONGER, ())),
    "beside an answer, which is left out": ({"prompt": "Hi", "completion": "Hello."}, Record("Hi", ())),
    "beside a pair": ({"prompt": "Hi", "chosen": "A", "rejected": "B"}, Record("Hi", ())),
    "alpaca": ({"instruction": "Translate.", "input": "chat"}, Record([user("Translate.\nchat")], ())),
    "alpaca with all": (
        {"instruction": "So?", "output": "x", "system": "S", "history": [["Hi", "Hello."]]},
        Record([system("S"), *LONGER], ()),
    ),
    "a conversation up to its last question": (
        {"messages": [*LONGER, assistant("So."), assistant("Yes.")]},
        Record(LONGER, ()),
    ),
    "a conversation without an answer": ({"messages": LONGER, "system": "S"}, Record([system("S"), *LONGER], ())),
    "sharegpt": (
        {"conversations": [said("human", "Hi"), said("gpt", "Hello.")]},
        Record([user("Hi")], ()),
    ),
    "what a pair has in common": (
        {"chosen": [*LONGER, assistant("A")], "rejected": [*LONGER, assistant("B")]},
        Record(LONGER, ()),
    ),
    "margins are nothing to a question": ({"prompt": "Hi", "margin": "much"}, Record("Hi", ())),
}


@pytest.mark.parametrize("name", RANKED)
def test_ranked_formats(name: str) -> None:
    row, expected = RANKED[name]
    assert to_record(row, "ranked") == expected


@pytest.mark.parametrize("name", PROMPT)
def test_prompt_formats(name: str) -> None:
    row, expected = PROMPT[name]
    assert to_record(row, "prompt") == expected


def test_only_rankings_have_margins() -> None:
    row = {"prompt": "Hi", "chosen": "A", "rejected": "B", "margin": 2}
    record = to_record(row, "preference")
    assert record is not None and record.margin is None


def test_every_preference_is_a_ranking_and_a_question() -> None:
    for row, record in PREFERENCE.values():
        assert to_record(row, "ranked") == record
        asked = to_record(row, "prompt")
        assert asked is not None and asked.completions == () and asked.prompt


def test_columns_of_rankings_and_questions() -> None:
    row = {"question": "Hi", "answers": ["A", "B"], "by": 3}
    columns = {"prompt": "question", "completions": "answers", "margin": "by"}
    assert to_record(row, "ranked", columns) == Record("Hi", ("A", "B"), 3.0)
    assert to_record(row, "prompt", columns) == Record("Hi", ())
    assert to_record(row, "prompt") is None


@pytest.mark.parametrize("name", SFT)
def test_sft_formats(name: str) -> None:
    row, expected = SFT[name]
    assert to_record(row, "sft") == expected


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_formats(name: str) -> None:
    row, expected = PREFERENCE[name]
    assert to_record(row, "preference") == expected


def test_columns_give_our_names_to_others() -> None:
    row = {"question": "Hi", "good": "Hello.", "bad": "No.", "id": 3}
    assert to_record(row, "sft", {"prompt": "question", "completion": "good"}) == Record("Hi", ("Hello.",))
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert to_record(row, "preference", columns) == Record("Hi", ("Hello.", "No."))
    assert to_record({"dialogue": CHAT}, "sft", {"messages": "dialogue"}) == Record([], (CHAT,))
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    pair = {"prompt": "Hi", "chosen": "No.", "rejected": "Hello."}
    assert to_record(pair, "preference", swapped) == Record("Hi", ("Hello.", "No."))
    assert to_record(row, "sft", {"prompt": "query", "completion": "good"}) is None
    assert row == {"question": "Hi", "good": "Hello.", "bad": "No.", "id": 3}


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_other_keys_are_no_format(kind: Kind) -> None:
    for row in ({}, {"question": "Hi", "answer": "Hello."}, {"prompt": "Hi"}, {"chosen": "a"}):
        assert to_record(row, kind) is None
    assert to_record({"prompt": "a", "chosen": "b", "rejected": "c"}, "sft") is None
    assert to_record({"prompt": "a", "completion": "b"}, "preference") is None


def test_keys_of_formats_are_distinct() -> None:
    for kind in ("sft", "preference", "ranked", "prompt"):
        assert len({known.keys for known in formats(kind)}) == len(formats(kind))  # type: ignore[arg-type]


ONE = [user("Hi")]
UNUSABLE: dict[str, tuple[Kind, dict[str, Any], str]] = {
    "messages without an assistant": ("sft", {"messages": ONE}, "no assistant turn"),
    "an assistant without a word": ("sft", {"messages": [*ONE, assistant(" \n")]}, "no assistant turn"),
    "no messages": ("sft", {"messages": []}, "no assistant turn"),
    "messages are a string": ("sft", {"messages": '[{"role": "user"}]'}, "messages are not a list of objects"),
    "messages are strings": ("sft", {"messages": ["Hi", "Hello."]}, "messages are not a list of objects"),
    "a message without content": ("sft", {"messages": [{"role": "user"}]}, "a message without role and text"),
    "a message without role": ("sft", {"messages": [{"content": "Hi"}]}, "a message without role and text"),
    "null content": ("sft", {"messages": [{"role": "user", "content": None}]}, "a message without role and text"),
    "content is a number": ("sft", {"messages": [{"role": "user", "content": 3}]}, "a message without role and text"),
    "content is parts": ("sft", {"messages": [{"role": "user", "content": [{}]}]}, "a message without role and text"),
    "half of a character": ("sft", {"messages": [user("\ud83d"), assistant("a")]}, "a message is not Unicode text"),
    "half of a character in text": ("sft", {"text": "\ud83d"}, "text is not Unicode text"),
    "empty text": ("sft", {"text": " \n\t"}, "empty text"),
    "text is a number": ("sft", {"text": 3}, "text is not text"),
    "text is null": ("sft", {"text": None}, "without a value in text"),
    "text is NaN": ("sft", {"text": NAN}, "without a value in text"),
    "empty completion": ("sft", {"prompt": "Hi", "completion": "  "}, "empty answer"),
    "completion of no messages": ("sft", {"prompt": "Hi", "completion": []}, "empty answer"),
    "completion by the user": ("sft", {"prompt": "Hi", "completion": ONE}, "empty answer"),
    "completion that asks first": ("sft", {"prompt": "Hi", "completion": CHAT}, "the answer does not begin with"),
    "completion is null": ("sft", {"prompt": "Hi", "completion": None}, "without a value in completion"),
    "both are null": ("sft", {"prompt": None, "completion": NAN}, "without a value in prompt, completion"),
    "completion is a number": ("sft", {"prompt": "2+2?", "completion": 4}, "completion is not text"),
    "prompt is a truth value": ("sft", {"prompt": True, "completion": "a"}, "prompt is not text"),
    "empty prompt": ("sft", {"prompt": "", "completion": "a"}, "empty prompt"),
    "prompt of no messages": ("sft", {"prompt": [], "completion": "a"}, "empty prompt"),
    "empty instruction": ("sft", {"instruction": "", "output": "a"}, "empty prompt"),
    "instruction is a number": ("sft", {"instruction": 3, "output": "a"}, "instruction is not text"),
    "input is a list": ("sft", {"instruction": "a", "input": ["b"], "output": "c"}, "input is not text"),
    "output is a number": ("sft", {"instruction": "2+2?", "output": 4}, "output is not text"),
    "system is an object": ("sft", {"instruction": "a", "system": {}, "output": "b"}, "system is not text"),
    "history is text": ("sft", {"instruction": "a", "history": "[]", "output": "b"}, "history is not a list"),
    "history is odd": ("sft", {"instruction": "a", "history": [["b"]], "output": "c"}, "history is not a list"),
    "history of nulls": ("sft", {"instruction": "a", "history": [["b", None]], "output": "c"}, "history is not text"),
    "equal answers": ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen equals rejected"),
    "no question": ("preference", {"prompt": " ", "chosen": "b", "rejected": "c"}, "empty prompt"),
    "rejected is empty": ("preference", {"prompt": "a", "chosen": "b", "rejected": ""}, "empty answer"),
    "rejected is null": ("preference", {"prompt": "a", "chosen": "b", "rejected": None}, "without a value in rejected"),
    "chosen is NaN": ("preference", {"prompt": "a", "chosen": NAN, "rejected": "b"}, "without a value in chosen"),
    "chosen is a number": ("preference", {"prompt": "a", "chosen": 1, "rejected": "b"}, "chosen is not text"),
    "equal conversations": ("preference", {"chosen": CHAT, "rejected": CHAT}, "chosen equals rejected"),
    "a conversation and a string": ("preference", {"chosen": CHAT, "rejected": "No."}, "chosen and rejected differ in"),
    "one goes on": (
        "preference",
        {"chosen": [*CHAT, user("a"), assistant("b")], "rejected": CHAT},
        "one of chosen and rejected is a part of the other",
    ),
    "other questions": (
        "preference",
        {"chosen": CHAT, "rejected": [user("Ho"), assistant("Hello.")]},
        "chosen and rejected have no prompt in common",
    ),
    "questions part later": (
        "preference",
        {"chosen": [*CHAT, user("a"), assistant("b")], "rejected": [*CHAT, user("c"), assistant("d")]},
        "the answer does not begin with the assistant's turn",
    ),
    "strings with nothing in common": (
        "preference",
        {"chosen": "Yes.", "rejected": "No."},
        "chosen and rejected have no prompt in common",
    ),
    "a transcript that ends with a question": (
        "preference",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"},
        "empty answer",
    ),
    "one ranked answer": ("ranked", {"prompt": "a", "completions": ["b"]}, "not a list of two answers or more"),
    "ranked answers as text": ("ranked", {"prompt": "a", "completions": "bc"}, "not a list of two answers or more"),
    "an empty ranked answer": ("ranked", {"prompt": "a", "completions": ["b", " ", "c"]}, "empty answer"),
    "ranked answers that come twice": (
        "ranked",
        {"prompt": "a", "completions": ["b", "c", "b"]},
        "with two equal answers",
    ),
    "ranked answers to nothing": ("ranked", {"prompt": " ", "completions": ["b", "c"]}, "empty prompt"),
    "a margin as text": (
        "ranked",
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "2"},
        "margin is not a num",
    ),
    "margin true": (
        "ranked",
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": True},
        "margin is not a number",
    ),
    "an infinite margin": (
        "ranked",
        {"prompt": "a", "completions": ["b", "c"], "margin": float("inf")},
        "margin is not a number",
    ),
    "an empty question": ("prompt", {"prompt": " "}, "empty prompt"),
    "a question of null": ("prompt", {"prompt": None}, "without a value in prompt"),
    "a question of numbers": ("prompt", {"prompt": 4}, "prompt is not text"),
    "a conversation that asks nothing": ("prompt", {"messages": [assistant("Hello.")]}, "empty prompt"),
    "an empty conversation": ("prompt", {"messages": []}, "empty prompt"),
    "no instruction": ("prompt", {"instruction": ""}, "empty prompt"),
    "half a transcript": (
        "preference",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "something else"},
        "a transcript that does not begin with Human: or Assistant:",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_rows_that_cannot_be_used_say_why(name: str) -> None:
    kind, row, reason = UNUSABLE[name]
    with pytest.raises(RowError, match=reason):
        to_record(row, kind)


def test_transcript() -> None:
    assert transcript("\n\nHuman: Hi\n\nAssistant: One.\n\nTwo.\n\nHuman: So?\n\nAssistant:") == [
        user("Hi"),
        assistant("One.\n\nTwo."),
        user("So?"),
        assistant(""),
    ]
    assert transcript("Human: Hi") == transcript("\n\nHuman: Hi") == [user("Hi")]
    assert transcript("\n\nAssistant: a\n\nAssistant: b") == [assistant("a"), assistant("b")]
    assert transcript("\n\nHuman: what is a Human: label?") == [user("what is a Human: label?")]
