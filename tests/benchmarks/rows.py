"""The rows that both systems train on, as token ids: from a file, or random ones with lengths like real data's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_ft.batches import Completion, Example
from lit_ft.data.formats import Kind

# Medians of the answers and prompts of instruction data and of multi-turn preference data (SmolLM2's tokenizer).
LENGTHS: dict[Kind, tuple[int, int]] = {"sft": (49, 151), "preference": (330, 300)}


def real_rows(path: Path, kind: Kind, tokenizer: Any, count: int, max_length: int) -> list[Example]:
    """The first `count` rows of `path` that fit into `max_length` tokens.

    Raises:
        SystemExit: there are fewer.
    """
    from lit_ft.data.chat import ChatEncoder
    from lit_ft.data.datamodule import load_examples

    # Rows are read generously: some are too long and dropped.
    prepared, _ = load_examples(
        str(path), ChatEncoder(tokenizer), kind, max_length=max_length, max_rows=4 * count + 50, max_dropped=0.9
    )
    if len(prepared.examples) < count:
        raise SystemExit(f"{path}: only {len(prepared.examples)} rows of at most {max_length} tokens.")
    return prepared.examples[:count]


def random_rows(kind: Kind, vocabulary: int, count: int, max_length: int) -> list[Example]:
    """`count` examples of random ids whose lengths scatter as real ones do (log-normal)."""
    draw = random.Random(0)
    prompt_median, answer_median = LENGTHS[kind]

    def length(median: int, limit: int) -> int:
        return max(2, min(limit, round(draw.lognormvariate(0, 0.6) * median)))

    def ids(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocabulary) for _ in range(n))

    found = []
    for index in range(count):
        prompt = ids(length(prompt_median, max_length // 2))
        answers = [ids(length(answer_median, max_length // 2)) for _ in range(1 if kind == "sft" else 2)]
        found.append(Example(prompt, tuple(Completion(a, (True,) * len(a)) for a in answers), index))
    return found


def rows_of_length(tokens: int, vocabulary: int, count: int) -> list[Example]:
    """`count` single-answer examples of exactly `tokens` tokens, a quarter of them prompt."""
    draw = random.Random(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocabulary) for _ in range(n))

    prompt = tokens // 4
    return [
        Example(ids(prompt), (Completion(ids(tokens - prompt), (True,) * (tokens - prompt)),), index)
        for index in range(count)
    ]


def data_tokens(examples: Sequence[Example]) -> int:
    """The data set's tokens: the prompt counted with each completion, padding never."""
    return sum(len(e.prompt) + len(c.ids) for e in examples for c in e.completions)
