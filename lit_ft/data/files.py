"""Rows from where people keep them: JSONL, JSON, CSV, Parquet, a folder of these, a Hub id, or a list in Python."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_ft.adapter import sha256_file
from lit_ft.errors import UserError

Row = dict[str, Any]
ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
# Preference stores, which lit_ft/data/votes.py reads.
DATABASES = (".db", ".sqlite", ".sqlite3")
# Names under which a folder's held-out rows are found, beside `train.*`.
HELD_OUT = ("heldout", "validation", "val", "test")
EXAMPLES = "examples:"


@dataclass(frozen=True)
class Source:
    """Rows of one origin, with the place of each (`file:line`), and a hash of the whole.

    `live` where the origin goes on growing: what was trained on is then told by the hash of the rows kept.
    """

    name: str
    hash: str
    rows: Sequence[tuple[str, Row]]
    live: bool = False


def hash_rows(rows: Iterable[Row]) -> str:
    """`sha256:…` over the content of rows, whatever the order of their keys."""
    text = json.dumps(list(rows), sort_keys=True, default=str).encode()
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def examples_folder() -> Path:
    """The project's example data: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "examples" / "data"
    return inside if inside.is_dir() else package.parent / "examples" / "data"


def open_source(origin: str | Sequence[Row] | Source, split: str = "train") -> Source:
    """Read one origin.

    Args:
        origin: a file, a folder with `train.*`, `examples:NAME` for the project's own data, a Hub id, rows, or a
            source that is open already.
        split: which file of a folder, or which split of a Hub data set.

    Raises:
        UserError: the file does not exist, a line cannot be read (with its number), or the Hub cannot be reached.
    """
    if isinstance(origin, Source):
        return origin
    if not isinstance(origin, str):
        rows = [(where, _need_object(row, where)) for where, row in _placed("row ", origin)]
        return Source("python", hash_rows(row for _, row in rows), rows)
    path = _local(origin)
    if path is None:
        return _from_hub(origin, split)
    if path.is_dir():
        path = _in_folder(path, (split,))
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}.get(path.suffix)
    if reader is None:
        votes = " A server's votes are read with data=votes data.path=FILE." if path.suffix in DATABASES else ""
        raise UserError(f"data.path={origin}: the ending {path.suffix!r} is none of {', '.join(ENDINGS)}.{votes}")
    name = origin if origin.startswith(EXAMPLES) else path.name
    try:
        return Source(name, f"sha256:{sha256_file(path)}", reader(path))
    except OSError as error:
        raise UserError(f"data.path={origin}: {path} cannot be read ({error.strerror or error}).") from error


def held_out_source(origin: str) -> Source | None:
    """The held-out rows that stand beside `train.*` in a folder, or None where there are none."""
    path = _local(origin)
    if path is None or not path.is_dir():
        return None
    found = _first(path, HELD_OUT)
    return open_source(str(found)) if found else None


def _local(origin: str) -> Path | None:
    """The path that `origin` means, or None for a Hub id."""
    if origin.startswith(EXAMPLES):
        # Those without train.* are sets that reports measure on.
        folders = {path.parent.name: path.parent for path in sorted(examples_folder().glob("*/train.*"))}
        if (name := origin.removeprefix(EXAMPLES)) not in folders:
            raise UserError(f"data.path={origin}: there is no such example data. There are: {', '.join(folders)}.")
        return folders[name]
    path = Path(origin).expanduser()
    if path.exists():
        return path
    looks_like_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", origin) and path.suffix not in ENDINGS
    if looks_like_hub_id and not path.parent.is_dir():
        return None
    raise UserError(f"data.path={origin}: there is no such file or folder (looked in {Path.cwd()}).")


def _first(folder: Path, stems: Sequence[str]) -> Path | None:
    candidates = (folder / f"{stem}{ending}" for stem in stems for ending in ENDINGS)
    return next((path for path in candidates if path.is_file()), None)


def _in_folder(folder: Path, stems: Sequence[str]) -> Path:
    found = _first(folder, stems)
    if found is None:
        raise UserError(f"data.path={folder}: the folder holds no {stems[0]}.jsonl, .json, .csv or .parquet.")
    return found


def _placed(prefix: str, rows: Sequence[Any], first: int = 1) -> list[tuple[str, Row]]:
    return [(f"{prefix}{number}", row) for number, row in enumerate(rows, first)]


def _need_object(value: Any, where: str) -> Row:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected an object with named fields, found {type(value).__name__}.")
    return dict(value)


def _read_jsonl(path: Path) -> list[tuple[str, Row]]:
    rows = []
    try:
        # Not splitlines(), which also cuts at characters that JSON allows within a string (U+2028, U+0085).
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    rows.append((where, _need_object(json.loads(line), where)))
                except json.JSONDecodeError as error:
                    raise UserError(f"{where}: not a line of JSON ({error.msg} at column {error.colno}).") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    return rows


def _read_json(path: Path) -> list[tuple[str, Row]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}).") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    if isinstance(content, dict) and content and all(isinstance(v, list) for v in content.values()):
        lengths = {key: len(values) for key, values in content.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"{path}: the columns have different lengths ({lengths}).")
        content = [dict(zip(content, row, strict=True)) for row in zip(*content.values(), strict=True)]
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of objects or an object of columns, found {type(content).__name__}.")
    return [(where, _need_object(row, where)) for where, row in _placed(f"{path}:item ", content)]


def _read_csv(path: Path) -> list[tuple[str, Row]]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 128 KiB is less than a long document
    rows = []
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="_more", strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if "_more" in row or None in row.values():
                raise UserError(f"{where}: this line has another number of fields than the header.")
            rows.append((where, dict(row)))
    except csv.Error as error:
        # The line on which the broken row begins: an open quote swallows all that follow.
        raise UserError(f"{path}:{reader.line_num + 1}: not a line of CSV ({error}).") from error
    return rows


def _read_parquet(path: Path) -> list[tuple[str, Row]]:
    import pyarrow.parquet as pq
    from pyarrow.lib import ArrowException

    try:
        return _placed(f"{path}:row ", pq.read_table(path).to_pylist())
    except ArrowException as error:
        raise UserError(f"{path}: not a Parquet file ({error}).") from error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).")


@dataclass(frozen=True)
class _HubRows(Sequence[tuple[str, Row]]):
    """Rows read from the data set's memory-mapped files one by one."""

    name: str
    data: Any

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        return f"{self.name}:row {index + 1}", self.data[index]

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        return (self[index] for index in range(len(self)))


def _from_hub(name: str, split: str) -> Source:
    from datasets import load_dataset

    try:
        data = load_dataset(name, split=split)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"data.path={name}: no such file here, and the data set could not be had from the Hub ({first}). "
            "Check the name, the split (data.split) and the network, or give a file."
        ) from error
    return Source(f"{name}:{split}", f"hub:{data._fingerprint}", _HubRows(name, data))
