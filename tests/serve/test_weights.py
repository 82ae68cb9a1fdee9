"""The look for numbers that are not finite: every type, and files that are made to mislead the reader."""

from __future__ import annotations

import json
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lit_ft.adapter import ADAPTER_WEIGHTS
from serve import weights
from serve.weights import not_finite

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def crafted(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file of that header, which may be bytes, and these tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    (folder / ADAPTER_WEIGHTS).write_bytes(size + text + data)
    return folder


def one(begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": [1], "data_offsets": [begin, end]}}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    bad = torch.ones(7, 5, dtype=dtype)
    bad[6, 4] = value  # the very last one
    save_file({"a.good": torch.ones(3, dtype=dtype), "b.bad": bad}, tmp_path / ADAPTER_WEIGHTS)
    assert "b.bad holds numbers that are not finite" in not_finite(tmp_path)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_largest_and_smallest_numbers_are_fine(tmp_path: Path, dtype: torch.dtype) -> None:
    edges = torch.finfo(dtype)
    good = torch.tensor([edges.max, edges.min, edges.tiny, edges.smallest_normal / 2, 0.0, -0.0, 1.0], dtype=dtype)
    save_file({"a": good, "b": torch.tensor([1, -1]), "empty": torch.empty(0, dtype=dtype)}, tmp_path / ADAPTER_WEIGHTS)
    assert not_finite(tmp_path) == ""


def test_past_the_first_piece_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK", 64)
    long = torch.zeros(1000)
    save_file({"a": long}, tmp_path / ADAPTER_WEIGHTS)
    assert not_finite(tmp_path) == ""
    long[999] = float("nan")
    save_file({"a": long}, tmp_path / ADAPTER_WEIGHTS)
    assert "not finite" in not_finite(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 7, 8, 40, -1])
def test_a_file_that_was_cut_short(tmp_path: Path, keep: int) -> None:
    save_file({"a": torch.ones(64)}, tmp_path / ADAPTER_WEIGHTS)
    whole = (tmp_path / ADAPTER_WEIGHTS).read_bytes()
    (tmp_path / ADAPTER_WEIGHTS).write_bytes(whole[:keep])
    assert "cannot be read" in not_finite(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        one(0, 8),  # beyond the file
        one(0, 1 << 62),
        one(-4, 0),
        one(4, 0),
        one(0, -4),
        one(0, 3),  # no whole numbers
        one(0.0, 4.0),
        one("0", "4"),
        one(None, 4),
        one([], 4),
        one(float("nan"), 4),
        one(0, float("inf")),
        one(0, 4, dtype=["F32"]),
        {"a": {"dtype": "F32"}},
        {"a": {"data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "data_offsets": [0]}},
        {"a": {"dtype": "F32", "data_offsets": 4}},
        {"a": None},
        {"a": []},
        {"a": "F32"},
        {**one(0, 4), "b": one(0, 4)["a"]},  # one over the other: a thousand of them would take for ever
        [],
        [one(0, 4)],
        None,
        7,
        "text",
        b"",
        b"{",
        b"\xff\xfe",
        b"{} {}",
        b"[" * 200_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda header: repr(header)[:40],
)
def test_a_header_that_lies(tmp_path: Path, header: Any) -> None:
    assert "cannot be read as safetensors" in not_finite(crafted(tmp_path, header, b"\0\0\0\0"))


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_wrong_length_of_the_header_takes_no_memory(tmp_path: Path, length: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "cannot be read" in not_finite(crafted(tmp_path, one(0, 4), b"\0\0\0\0", length))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_huge_file_of_one_tensor_takes_little_memory(tmp_path: Path) -> None:
    size = 1 << 28
    crafted(tmp_path, one(0, size))
    with (tmp_path / ADAPTER_WEIGHTS).open("r+b") as file:
        file.seek(0, 2)
        file.truncate(file.tell() + size)  # a hole: it takes no disk
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert not_finite(tmp_path) == ""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert time.monotonic() - began < 10


def test_a_huge_header_in_a_huge_file(tmp_path: Path) -> None:
    crafted(tmp_path, b"", length=weights.MAX_HEADER + 1)
    with (tmp_path / ADAPTER_WEIGHTS).open("r+b") as file:
        file.truncate(1 << 34)
    assert "longer than" in not_finite(tmp_path)


def test_no_file_and_a_folder_in_its_place(tmp_path: Path) -> None:
    reason = not_finite(tmp_path)
    assert "cannot be read" in reason and str(tmp_path) not in reason, "it is shown on the page"
    (tmp_path / ADAPTER_WEIGHTS).mkdir()
    reason = not_finite(tmp_path)
    assert "cannot be read" in reason and str(tmp_path) not in reason


def test_numbers_of_other_types_and_the_files_own_words_are_passed_over(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, **one(0, 4, dtype="I32")}
    assert not_finite(crafted(tmp_path, header, b"\xff\xff\xff\xff")) == ""
