"""Rows from files: what each kind of file gives, and what each kind of broken file is told."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lit_ft.data.files import examples_folder, held_out_source, open_source
from lit_ft.errors import UserError

ROWS = [{"prompt": "Où?", "completion": "Là."}, {"prompt": 'Two\nlines, "quoted"', "completion": "8 €"}]


def rows_of(origin: Any, split: str = "train") -> list[dict[str, Any]]:
    return [row for _, row in open_source(origin, split).rows]


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)


WRITERS = {
    "rows.jsonl": lambda path: path.write_text(lines(*ROWS), encoding="utf-8"),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8"),
    "columns.json": lambda path: path.write_text(json.dumps({k: [row[k] for row in ROWS] for k in ROWS[0]}), "utf-8"),
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    source = open_source(str(path))
    assert [row for _, row in source.rows] == ROWS
    assert source.name == name
    assert source.hash == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "columns.json", "rows.csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert rows_of(str(path)) == ROWS


def test_where_each_row_stands(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n\n  \n{"text": "4"}')
    (tmp_path / "a.json").write_text('[{"text": "1"}, {"text": "2"}]')
    (tmp_path / "a.csv").write_text('text\n"1\nand more"\n3\n')
    assert [where for where, _ in open_source(str(tmp_path / "a.jsonl")).rows] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:4",
    ]
    assert [where for where, _ in open_source(str(tmp_path / "a.json")).rows] == [
        f"{tmp_path}/a.json:item 1",
        f"{tmp_path}/a.json:item 2",
    ]
    assert [where for where, _ in open_source(str(tmp_path / "a.csv")).rows] == [
        f"{tmp_path}/a.csv:3",  # the line on which the row ends
        f"{tmp_path}/a.csv:4",
    ]
    assert [where for where, _ in open_source([{"text": "1"}]).rows] == ["row 1"]


def test_line_ends_within_a_json_string_do_not_cut_the_line(tmp_path: Path) -> None:
    """JSON allows these characters as they are, and Python's splitlines() would cut there."""
    row = {"text": "a\u2028b\u2029c\u0085d\x0ce\x1cf"}
    path = tmp_path / "a.jsonl"
    path.write_text(lines(row, row), encoding="utf-8")
    assert "\u2028" in path.read_text(encoding="utf-8")
    assert rows_of(str(path)) == [row, row]


def test_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "1"}\r\n{"text": "2"}\r\n')
    (tmp_path / "a.csv").write_bytes(b'text,note\r\n"1\r\n2",x\r\n')
    assert rows_of(str(tmp_path / "a.jsonl")) == [{"text": "1"}, {"text": "2"}]
    assert rows_of(str(tmp_path / "a.csv")) == [{"text": "1\r\n2", "note": "x"}]


def test_a_csv_field_longer_than_the_modules_limit(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(rows_of(str(tmp_path / "a.csv"))[0]["text"]) == 200_000


def test_rows_from_python() -> None:
    source = open_source(ROWS)
    assert [row for _, row in source.rows] == ROWS
    assert source.name == "python"
    assert source.hash == open_source([dict(reversed(list(row.items()))) for row in ROWS]).hash
    assert source.hash != open_source(ROWS[:1]).hash
    with pytest.raises(UserError, match="row 2: expected an object with named fields, found str"):
        open_source([{"text": "a"}, "b"])  # type: ignore[list-item]


def test_a_folder_gives_the_file_of_the_split(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.csv", "heldout.json"):
        (tmp_path / name).write_text({"j": lines({"text": name}), "c": f"text\n{name}\n"}[name.split(".")[1][0]])
    (tmp_path / "heldout.json").write_text('[{"text": "heldout.json"}]')
    assert rows_of(str(tmp_path)) == [{"text": "train.jsonl"}]
    assert rows_of(str(tmp_path), "test") == [{"text": "test.csv"}]
    held_out = held_out_source(str(tmp_path))
    assert held_out is not None and [row for _, row in held_out.rows] == [{"text": "heldout.json"}]
    (tmp_path / "heldout.json").unlink()
    held_out = held_out_source(str(tmp_path))
    assert held_out is not None and held_out.name == "test.csv"
    (tmp_path / "test.csv").unlink()
    assert held_out_source(str(tmp_path)) is None
    assert held_out_source(str(tmp_path / "train.jsonl")) is None


def test_a_folder_without_the_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the folder holds no train\.jsonl, \.json, \.csv or \.parquet"):
        open_source(str(tmp_path))


def test_the_projects_own_data() -> None:
    assert open_source("examples:support_sft").name == "examples:support_sft"
    names = sorted(path.parent.name for path in examples_folder().glob("*/train.*"))
    assert "general" not in names  # a set that reports measure on, not one to train on
    for bad in ("nothing", "..", ".", "", "../../etc", "/", str(examples_folder())):
        with pytest.raises(UserError, match=f"no such example data. There are: {', '.join(names)}."):
            open_source(f"examples:{bad}")


MISSING = ["rows.jsonl", "missing/rows.jsonl", "./missing", "../missing.csv", "/missing/rows.json", "a/b/c", "squad"]


@pytest.mark.parametrize("origin", MISSING)
def test_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^data\.path={re.escape(origin)}: there is no such file or folder"):
        open_source(origin)


def test_a_mistyped_folder_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no such file or folder"):
        open_source("data/trian")


def test_a_hub_id_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data\.path=someone/something: .*could not be had from the Hub .*data\.split"):
        open_source("someone/something")


def test_rows_of_a_hub_set_are_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or data)
    source = open_source("someone/something", "test_sft")
    assert asked == [("someone/something", "test_sft")]
    assert source.name == "someone/something:test_sft"
    assert list(source.rows) == [(f"someone/something:row {k}", row) for k, row in enumerate(ROWS, 1)]
    assert source.rows[1] == ("someone/something:row 2", ROWS[1])


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "half a line": (
        "a.jsonl",
        b'{"text": "a"}\n\n{"text": \n',
        "{path}:3: not a line of JSON (Expecting value at colu",
    ),
    "single quotes": ("a.jsonl", b"{'text': 'a'}\n", "{path}:1: not a line of JSON (Expecting property name"),
    "two objects": (
        "a.jsonl",
        b'{"text": "a"}{"text": "b"}\n',
        "{path}:1: not a line of JSON (Extra data at column 14",
    ),
    "a JSON list": ("a.jsonl", b'{"text": "a"}\n["b"]\n', "{path}:2: expected an object with named fields, found list"),
    "a number": ("a.jsonl", b"3\n", "{path}:1: expected an object with named fields, found int"),
    "null": ("a.jsonl", b"null\n", "{path}:1: expected an object with named fields, found NoneType"),
    "not UTF-8": ("a.jsonl", '{"text": "é"}\n'.encode("latin-1"), "{path}: not UTF-8 text (invalid"),
    "UTF-16": ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "{path}: not UTF-8 text (invalid start byte at byte 0"),
    "half JSON": ("a.json", b'[\n{"text": "a"},\n{"text"\n]', "{path}:4: not JSON (Expecting ':' delimiter"),
    "empty JSON": ("a.json", b"", "{path}:1: not JSON (Expecting value at column 1)"),
    "JSON of text": ("a.json", b'"text"', "{path}: expected a list of objects or an object of columns, found str"),
    "JSON of one row": ("a.json", b'{"text": "a"}', "{path}: expected a list of objects or an object of columns"),
    "JSON lines as JSON": ("a.json", b'{"text": "a"}\n{"text": "b"}', "{path}:2: not JSON (Extra data"),
    "odd items": ("a.json", b'[{"text": "a"}, "b"]', "{path}:item 2: expected an object with named fields, found str"),
    "uneven columns": ("a.json", b'{"a": ["1"], "b": []}', "{path}: the columns have different lengths ({'a': 1, 'b'"),
    "JSON not UTF-8": ("a.json", b'[{"text": "\xe9"}]', "{path}: not UTF-8 text (invalid continuation byte at byte 11"),
    "a long CSV line": ("a.csv", b"a,b\n1,2\n1,2,3\n", "{path}:3: this line has another number of fields than the"),
    "a short CSV line": ("a.csv", b"a,b\n1\n", "{path}:2: this line has another number of fields than the header"),
    "an open quote": ("a.csv", b'a,b\n1,2\n3,"4\n5,6\n', "{path}:3: not a line of CSV (unexpected end of data"),
    "a quote gone wrong": ("a.csv", b'a,b\n1,"2"3\n4,5\n', "{path}:2: not a line of CSV (',' expected after"),
    "CSV not UTF-8": ("a.csv", b"a,b\n1,\xe9\n", "{path}: not UTF-8 text (invalid continuation byte at byte 6"),
    "no Parquet": ("a.parquet", b"PAR1 but not for long", "{path}: not a Parquet file ("),
    "empty Parquet": ("a.parquet", b"", "{path}: not a Parquet file ("),
    "another ending": (
        "a.txt",
        b"hello",
        "data.path={path}: the ending '.txt' is none of .jsonl, .json, .csv, .parquet",
    ),
    "no ending": ("rows", b"hello", "data.path={path}: the ending '' is none of"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, name: str) -> None:
    ending, content, expected = BROKEN[name]
    path = tmp_path / ending
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        open_source(str(path))
    assert str(raised.value).startswith(expected.replace("{path}", str(path)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    for content in ("", "\n\n", "\n" if name == "a.jsonl" else "prompt,completion\n"):
        (tmp_path / name).write_text(content)
        assert rows_of(str(tmp_path / name)) == []


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("{}")

    def refuse(_: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lit_ft.data.files.sha256_file", refuse)
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read \(Permission denied\)"):
        open_source(str(tmp_path / "a.jsonl"))
