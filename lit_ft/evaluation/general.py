"""General texts and instructions, on which forgetting is measured: rows of JSONL files by category."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_ft.batches import Completion, Example
from lit_ft.data.chat import ChatEncoder
from lit_ft.data.files import examples_folder
from lit_ft.data.formats import RowError, to_record
from lit_ft.errors import UserError

Categories = dict[str, list[dict[str, Any]]]
# The share of a file's rows that may be unusable.
MAX_DROPPED = 0.1


def rows_by_category(setting: str, path: str | None, own: str, keys: Sequence[str]) -> Categories:
    """Rows of a JSONL file by their `category`, which may be missing.

    Args:
        setting: by which the file is given, for the errors: `texts` or `instructions`.
        path: the file; None: `own`, of the data written for this project.
        keys: what each row must hold as a text.

    Raises:
        UserError: the file cannot be read, has no rows, or has one that is no such row.
    """
    file = Path(path) if path else examples_folder() / own
    wanted = f"a JSON object in each line, with {' and '.join(keys)}, and category if you like"
    mend = f"Give {wanted}; without {setting}= the project's own rows are taken."
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}={file} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    found: Categories = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{setting}={file}: line {number} is no JSON ({error}). {mend}") from error
        if not isinstance(row, dict):
            raise UserError(f"{setting}={file}: line {number} is no JSON object. {mend}")
        if missing := [key for key in keys if not isinstance(row.get(key), str)]:
            raise UserError(
                f"{setting}={file}: line {number} lacks {' and '.join(missing)} as a text; it has "
                f"{', '.join(map(str, row)) or 'nothing'}. {mend}"
            )
        found.setdefault(str(row.get("category", "all")), []).append(row)
    if not found:
        raise UserError(f"{setting}={file} holds no rows. {mend}")
    return found


def instruction_examples(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], encoder: ChatEncoder, max_length: int, where: str
) -> tuple[dict[str, list[Example]], list[str]]:
    """Instructions as examples by category, answers cut to `max_length` tokens with their prompt.

    Args:
        rows: with `prompt` and `completion`.
        encoder: of the model's tokenizer.
        max_length: of a prompt with its answer, in tokens.
        where: the rows are from, for what is said: `instructions=FILE`.

    Returns:
        The examples, without categories of which no row can be used; and what is to be said of rows left out.

    Raises:
        UserError: more than `MAX_DROPPED` of the rows cannot be used.
    """
    found: dict[str, list[Example]] = {}
    dropped: Counter[str] = Counter()
    for category, several in rows.items():
        for row in several:
            try:
                found.setdefault(category, []).append(_cut(encoder.encode(_record(row)), max_length))
            except RowError as reason:
                dropped[str(reason)] += 1
    total, lost = sum(map(len, rows.values())), sum(dropped.values())
    if not lost:
        return found, []
    reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    if lost > MAX_DROPPED * total:
        raise UserError(
            f"{where}: {lost} of {total} rows cannot be used ({reasons}). Mend these rows of the file, or take them "
            f"out; at most {MAX_DROPPED:.0%} may be unusable."
        )
    return {key: several for key, several in found.items() if several}, [
        f"{lost} of {total} rows of {where} could not be used and were left out ({reasons})."
    ]


def _record(row: Mapping[str, Any]) -> Any:
    """The record of a prompt and its answer alone: other columns of the row are somebody's own."""
    record = to_record({key: row[key] for key in ("prompt", "completion")}, "sft", None)
    assert record is not None
    return record


def _cut(example: Example, max_length: int) -> Example:
    room = max_length - len(example.prompt)
    if room < 1:
        raise RowError(f"with a prompt of {max_length} tokens or more")
    (only,) = example.completions
    return replace(example, completions=(Completion(only.ids[:room], only.mask[:room]),))
