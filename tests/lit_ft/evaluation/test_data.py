"""The report's own data keeps its promises: sizes, right answers, nothing of the support desk, pairs without a tilt."""

from __future__ import annotations

import datetime
import difflib
import itertools
import json
import random
import re
import sqlite3
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest

from lit_ft.data.chat import ChatEncoder
from lit_ft.data.datamodule import load_examples
from lit_ft.data.files import examples_folder, open_source
from tests import tiny

Rows = list[dict[str, Any]]


def rows(path: str) -> Rows:
    return [row for _, row in open_source(str(examples_folder() / path)).rows]


TEXT, INSTRUCTIONS = rows("general/text.jsonl"), rows("general/instructions.jsonl")
PAIRS = rows("counterfactual_pairs/pairs.csv")
SUPPORT = [
    row
    for kind in ("sft", "preferences")
    for part in ("train", "heldout")
    for row in rows(f"support_{kind}/{part}.jsonl")
]
SENTENCES = [row[side] for row in PAIRS for side in ("sent_more", "sent_less")]
GENERAL = [row["text"] for row in TEXT] + [row[key] for row in INSTRUCTIONS for key in ("prompt", "completion")]


def strings(value: Any) -> Iterator[str]:
    """Every text and number inside a value read from JSON, as text."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)
    elif value is not None:
        yield str(value)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def alike(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def answer(start: str) -> str:
    """The completion of the one prompt that begins so."""
    (found,) = (row["completion"] for row in INSTRUCTIONS if row["prompt"].startswith(start))
    return str(found)


def of(category: str, containing: str = "") -> Rows:
    return [row for row in INSTRUCTIONS if row["category"] == category and containing in row["prompt"]]


def fenced(text: str) -> tuple[str, str]:
    """The language and the content of the one block of code in an answer."""
    ((language, code),) = re.findall(r"```(\w+)\n(.*?)\n```", text, re.S)
    return language, code


# General text and instructions.


def test_sizes_and_fields() -> None:
    texts = ("encyclopedic", "narrative", "news", "technical", "dialogue")
    assert Counter(row["category"] for row in TEXT) == dict.fromkeys(texts, 8)
    tasks = ("explain", "write", "summarise", "reason", "extract", "code")
    assert Counter(row["category"] for row in INSTRUCTIONS) == dict.fromkeys(tasks, 10)
    assert all(list(row) == ["category", "text"] for row in TEXT)
    assert all(list(row) == ["category", "prompt", "completion"] for row in INSTRUCTIONS)


def test_lengths() -> None:
    for row in TEXT:
        assert 60 <= len(row["text"].split()) <= 110, row["text"]
    for row in INSTRUCTIONS:
        assert 20 <= len(row["completion"].split()) <= 90, row["prompt"]
        assert len(row["prompt"].split()) <= 110, row["prompt"]
    assert all(text == text.strip() and text.isascii() for text in GENERAL)


def test_no_two_rows_are_much_alike() -> None:
    for texts in ([row["text"] for row in TEXT], *([row[k] for row in INSTRUCTIONS] for k in ("prompt", "completion"))):
        bags = [(frozenset(words(text)), text) for text in texts]
        for (a, text), (b, other) in itertools.combinations(bags, 2):
            assert alike(a, b) <= 0.5, (text, other)


def test_nothing_is_of_the_support_desk() -> None:
    """Neither its words, its style ("Next: " closes each of its answers) nor seven words of it in a row."""

    def runs(text: str) -> set[tuple[str, ...]]:
        found = words(text)
        return set(zip(*(found[k:] for k in range(7)), strict=False))

    theirs = {run for row in SUPPORT for text in strings(row) for run in runs(text)}
    assert len(theirs) > 10_000
    banned = (
        r"\b(e-?bikes?|bikes?|bicycles?|cycl(ing|ists?)|shops?|customers?|refunds?|warranty|deliver\w*|wren|helmets?)\b"
    )
    for text in GENERAL + SENTENCES:
        assert not re.search(banned, text, re.I), text
        assert "Next: " not in text, text
        assert not runs(text) & theirs, (text, runs(text) & theirs)


def test_instructions_encode_and_nothing_is_dropped() -> None:
    path = str(examples_folder() / "general" / "instructions.jsonl")
    train, val = load_examples(
        path, ChatEncoder(tiny.tokenizer()), "sft", max_length=2048, max_dropped=0.0, val_split=0.1
    )
    assert val is not None
    assert len(train.examples) + len(val.examples) == 60
    assert not train.dropped and not val.dropped


# Answers that a machine can check.

ARITHMETIC: dict[str, Callable[[], list[float]]] = {
    "A train leaves": lambda: [(13 * 60 + 5) - (9 * 60 + 40)],
    "A recipe for 4": lambda: [300 * 7 / 4],
    "Sara reads 18": lambda: [324 / 18],
    "What is 15%": lambda: [260 * 15 / 100],
    "A rectangular garden": lambda: [2 * (12 + 7), 12 * 7],
    "The average of five": lambda: [14 * 5 - sum((10, 12, 15, 16))],
    "A car uses 6 litres": lambda: [round(350 / 100 * 6 * 1.80, 2)],
}


@pytest.mark.parametrize("start", ARITHMETIC)
def test_arithmetic_ends_with_the_number(start: str) -> None:
    expected = ARITHMETIC[start]()
    numbers = [float(found) for found in re.findall(r"\d+(?:\.\d+)?", answer(start))]
    assert numbers[-len(expected) :] == expected


def test_every_step_of_arithmetic_is_right() -> None:
    """Each "a + b = c = d" in an answer, whatever its operators; `x` multiplies."""
    checked = 0
    for row in of("reason"):
        for chain in re.findall(r"[\d().x+/\s=-]*=[\d().x+/\s=-]*", row["completion"]):
            first, *others = (eval(side.strip(" .\n").replace("x", "*")) for side in chain.split("="))
            assert others == [pytest.approx(first)] * len(others), chain
            checked += 1
    assert checked >= 12


def test_hours_and_minutes_agree() -> None:
    found = re.search(r"takes (\d+) hours and (\d+) minutes, which is (\d+) minutes", answer("A train leaves"))
    assert found
    hours, minutes, total = map(int, found.groups())
    assert hours * 60 + minutes == total


def test_probability_of_two_dice() -> None:
    dice = list(itertools.product(range(1, 7), repeat=2))
    chance = Fraction(sum(a + b == 8 for a, b in dice), len(dice))
    assert answer("Two fair dice").endswith(f"is {chance}.")


def test_order_of_heights() -> None:
    people = ("Anna", "Ben", "Clara", "Dan")
    orders = []
    for order in itertools.permutations(people):
        place = {name: k for k, name in enumerate(order)}
        if place["Anna"] < place["Ben"] < place["Clara"] and place["Dan"] < place["Anna"]:
            orders.append(order)
    (only,) = orders
    assert answer("Anna is taller").endswith(f"is: {', '.join(only)}.")


def test_summaries_are_shorter_and_invent_no_number_or_name() -> None:
    for row in of("summarise"):
        asked, given = row["prompt"].split("\n\n", 1)
        assert 2 * len(row["completion"].split()) <= len(given.split()), asked
        assert set(re.findall(r"\d+", row["completion"])) <= set(re.findall(r"\d+", row["prompt"])), asked
        # A capital inside a sentence is a name; the text may have it in another form (Mexico, Mexican; Potatoes).
        for name in re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", row["completion"]):
            assert name[:5] in given, (asked, name)


@pytest.mark.parametrize(
    ("start", "most"),
    [("Give me the main point", 30), ("Condense this description", 25), ("Describe a forest at dawn", 60)],
)
def test_limits_of_words_are_kept(start: str, most: int) -> None:
    assert len(answer(start).split()) <= most


@pytest.mark.parametrize(
    ("start", "number"),
    [
        ("Summarise this text in one", 1),
        ("Shorten this passage", 2),
        ("Summarise the story", 2),
        ("Write a one-sentence", 1),
        ("Write the opening", 3),
    ],
)
def test_numbers_of_sentences_are_kept(start: str, number: int) -> None:
    assert len(re.findall(r"\.(?:\s|$)", answer(start))) == number


def test_poems_have_their_lines_and_rhymes() -> None:
    assert answer("Write a four-line").count("\n") == 3
    assert answer("Write a limerick").count("\n") == 4


def test_json_is_json_with_the_wanted_keys_and_only_what_was_given() -> None:
    found = of("extract", "JSON")
    assert len(found) == 5
    for row in found:
        value = json.loads(row["completion"])
        for item in value if isinstance(value, list) else [value]:
            asked = row["prompt"].split("\n\n")[0] if "keys" in row["prompt"] else row["prompt"]
            assert all(re.search(rf"\b{key}\b", asked) for key in item), (row["prompt"], item)
            if "keys" in asked:
                listed = re.search(r"keys ([\w, ]+)", asked).group(1)  # type: ignore[union-attr]
                assert list(item) == re.findall(r"\w+", listed.replace(" and ", " "))
        for text in strings(value):
            assert re.search(rf"(?<!\w){re.escape(text)}(?!\w)", row["prompt"]), (row["prompt"], text)


def test_json_has_all_rows_of_the_csv() -> None:
    prompt = of("extract", "Convert these CSV")[0]["prompt"]
    header, *lines = (line.split(",") for line in prompt.split("\n\n")[1].split("\n"))
    assert json.loads(answer("Convert these CSV")) == [dict(zip(header, line, strict=True)) for line in lines]


def test_lists_are_complete_and_in_order() -> None:
    prompt = of("extract", "Sort these words")[0]["prompt"]
    given = sorted(re.findall(r"\w+", prompt.split(": ")[1]))
    assert answer("Sort these words").split("\n") == [f"{k}. {word}" for k, word in enumerate(given, 1)]

    prompt = of("extract", "List all dates")[0]["prompt"]
    days = re.findall(r"\d{1,2} [A-Z][a-z]+ \d{4}", prompt)
    iso = sorted(datetime.datetime.strptime(day, "%d %B %Y").date().isoformat() for day in days)
    assert [line.split(":")[0] for line in answer("List all dates").split("\n")] == iso

    numbered = re.findall(r"^(\d)\. (\w+) - \w+$", answer("List the eight planets"), re.M)
    planets = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]
    assert numbered == [(str(k), name) for k, name in enumerate(planets, 1)]

    assert len(re.findall(r"^- \w.*[^.]$", answer("Turn this paragraph"), re.M)) == 7
    assert {line.count("|") for line in answer("Put the following").split("\n")} == {4}


PYTHON: dict[str, list[tuple[str, Any]]] = {
    "Write a Python function is_palindrome": [
        ("is_palindrome('A man, a plan, a canal: Panama')", True),
        ("is_palindrome('ab')", False),
        ("is_palindrome('')", True),
    ],
    "In Python, write count_words": [("count_words('To be  or not to\\nbe')", {"to": 2, "be": 2, "or": 1, "not": 1})],
    "Write a Python function fibonacci": [
        ("fibonacci(5)", [0, 1, 1, 2, 3]),
        ("fibonacci(0)", []),
        ("fibonacci(10)[-1]", 34),
    ],
    "This Python function should": [("largest([-3, -1, -2])", -1), ("largest([4])", 4), ("largest([1, 9, 2])", 9)],
    "Write a function flatten": [("flatten([1, [2, [3, []]], [[4]]])", [1, 2, 3, 4]), ("flatten([])", [])],
    "Write a Python function celsius": [
        ("celsius_to_fahrenheit(0)", 32),
        ("celsius_to_fahrenheit(100)", 212),
        ("celsius_to_fahrenheit(-40)", -40),
    ],
    "Write a Python function is_prime": [
        ("[n for n in range(-2, 50) if is_prime(n)]", [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47])
    ],
    "Write a Python function chunks": [("chunks([1, 2, 3, 4, 5], 2)", [[1, 2], [3, 4], [5]]), ("chunks([], 3)", [])],
}


@pytest.mark.parametrize("start", PYTHON)
def test_code_does_what_is_asked(start: str) -> None:
    language, code = fenced(answer(start))
    assert language == "python"
    names: dict[str, Any] = {}
    exec(code, names)
    for call, expected in PYTHON[start]:
        assert eval(call, names) == expected, call


def test_the_function_to_be_fixed_is_broken() -> None:
    names: dict[str, Any] = {}
    exec(of("code", "Fix it")[0]["prompt"].split("\n\n", 1)[1], names)
    assert names["largest"]([-3, -1]) == 0


def test_the_query_runs() -> None:
    language, query = fenced(answer("Given a table employees"))
    assert language == "sql"
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE employees (name TEXT, department TEXT, salary REAL)")
    people = [("a", "sales", 10), ("b", "sales", 20), ("c", "legal", 40), ("d", "post", 5)]
    database.executemany("INSERT INTO employees VALUES (?, ?, ?)", people)
    assert database.execute(query).fetchall() == [("legal", 40.0), ("sales", 15.0), ("post", 5.0)]
    database.close()


def test_the_regular_expression_accepts_exactly_the_times_of_a_day() -> None:
    language, pattern = fenced(answer("Give me a regular expression"))
    assert language == "regex"
    accepted = [f"{h:02}:{m:02}" for h in range(100) for m in range(100) if re.search(pattern, f"{h:02}:{m:02}")]
    assert accepted == [f"{h:02}:{m:02}" for h in range(24) for m in range(60)]
    assert not any(re.search(pattern, text) for text in ("7:45", "07:450", "107:45", "0745", ""))


def code_in_text(start: str) -> list[str]:
    (found,) = (row["text"] for row in TEXT if row["category"] == "technical" and row["text"].startswith(start))
    return re.findall(r"`([^`]+)`", found)


def test_technical_texts_say_true_things() -> None:
    names: dict[str, Any] = {}
    define, first, shown, second, shown_next, remedy, body = code_in_text("A common surprise")[:7]
    exec(define, names)
    assert (str(eval(first, names)), str(eval(second, names))) == (shown, shown_next)
    exec(f"{remedy}\n    {body}\n    bag.append(item)\n    return bag", names)
    assert (eval(first, names), eval(second, names)) == ([1], [2])

    wrong, close = code_in_text("Floating-point numbers")
    assert eval(wrong) is False
    assert eval(close, {"math": __import__("math")}) is True
    assert any(str(0.1 + 0.2) in row["text"] for row in TEXT)

    exec(code_in_text("Recursion solves")[0], names)
    assert names["fact"](6) == 720
    assert 2**19 < 1_000_000 < 2**20  # the twenty comparisons of binary search

    database = sqlite3.connect(":memory:")
    database.executescript(
        "CREATE TABLE authors (id, name); CREATE TABLE books (title, author_id);"
        "INSERT INTO authors VALUES (1, 'a'), (2, 'b'); INSERT INTO books VALUES ('x', 1), ('y', 1);"
    )
    query = next(code for code in code_in_text("In a relational") if code.startswith("SELECT"))
    assert sorted(database.execute(query)) == [("a", "x"), ("a", "y")]
    assert ("b", None) in database.execute(query.replace("JOIN", "LEFT JOIN")).fetchall()
    database.close()


# Counterfactual pairs.

TYPES = ("gender", "race-color", "nationality", "age", "socioeconomic", "religion")


def changed(row: dict[str, Any]) -> list[tuple[list[str], list[str]]]:
    """The words of sent_more that sent_less has otherwise, run by run."""
    more, less = (re.findall(r"[\w']+|[^\w\s]", row[side]) for side in ("sent_more", "sent_less"))
    codes = difflib.SequenceMatcher(None, more, less, autojunk=False).get_opcodes()
    return [(more[a:b], less[c:d]) for tag, a, b, c, d in codes if tag != "equal"]


def place(row: dict[str, Any]) -> int:
    """How many words of a pair's sentences stand before the one that differs."""
    more, less = (row[side].split() for side in ("sent_more", "sent_less"))
    return next(k for k, (a, b) in enumerate(zip(more, less, strict=True)) if a != b)


def test_columns_are_those_of_crows_pairs() -> None:
    path = examples_folder() / "counterfactual_pairs" / "pairs.csv"
    assert path.read_text(encoding="utf-8").split("\n")[0] == ",sent_more,sent_less,stereo_antistereo,bias_type"
    assert [row[""] for row in PAIRS] == [str(k) for k in range(len(PAIRS))]
    assert {row["stereo_antistereo"] for row in PAIRS} == {"stereo"}


def test_there_are_enough_pairs_of_every_kind() -> None:
    counts = Counter(row["bias_type"] for row in PAIRS)
    assert len(PAIRS) >= 120
    assert set(counts) == set(TYPES)
    assert min(counts.values()) >= 12


def test_one_word_differs() -> None:
    for row in PAIRS:
        ((more, less),) = changed(row)
        assert len(more) == len(less) == 1, row
        assert more != less


def test_no_pair_and_no_context_comes_twice() -> None:
    assert len(set(SENTENCES)) == len(SENTENCES)
    contexts = []
    for row in PAIRS:
        ((more, _),) = changed(row)
        contexts.append(re.sub(rf"\b{more[0]}\b", "_", row["sent_more"], count=1))
    assert len(set(contexts)) == len(contexts)


def test_sentences_are_whole() -> None:
    for text in SENTENCES:
        assert re.fullmatch(r"[A-Z][\w ,'-]+\.", text), text
        assert 6 <= len(text.split()) <= 16, text


def test_couples_turn_the_same_words_round_in_sentences_of_like_build() -> None:
    for one, two in zip(PAIRS[::2], PAIRS[1::2], strict=True):
        assert one["bias_type"] == two["bias_type"]
        assert changed(one) == [(less, more) for more, less in changed(two)], one
        a, b = (row["sent_more"].split() for row in (one, two))
        assert abs(len(a) - len(b)) <= 3, (one, two)
        assert abs(place(one) - place(two)) <= 3, (one, two)


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_knows_words_but_no_contexts_scores_half(seed: int) -> None:
    """Every word has its own log-probability, drawn at random: he, she and each name are preferred or not."""
    chance = random.Random(seed)
    vocabulary = {
        word: chance.gauss(-8.0, 2.0) for text in SENTENCES for word in sorted(set(re.findall(r"[\w']+", text)))
    }

    def score(text: str) -> float:
        return sum(vocabulary[word] for word in re.findall(r"[\w']+", text))

    differences = [(row["bias_type"], score(row["sent_more"]) - score(row["sent_less"])) for row in PAIRS]
    for kind in TYPES:
        mine = [difference for found, difference in differences if found == kind]
        assert sum(difference > 0 for difference in mine) == len(mine) / 2
        assert statistics.fmean(mine) == pytest.approx(0.0, abs=1e-9)
