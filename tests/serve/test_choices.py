"""What people chose on the Adapters page: kept over a restart; a file that is broken or cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.choices import Choices


def test_kept_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "made" / "choices.json"
    Choices(path, {"support@v2", "a@v1"}, {"support@v1"}, "support@v2").write()
    assert Choices.read(path) == Choices(path, {"support@v2", "a@v1"}, {"support@v1"}, "support@v2")
    assert [one.name for one in path.parent.iterdir()] == ["choices.json"], "nothing is left beside it"


def test_no_file_is_no_choice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Choices.read(tmp_path / "none") == Choices(tmp_path / "none")
    assert Choices.read(None) == Choices()
    assert caplog.text == ""


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b"{}",
        b'{"pinned": [], "retired": []}',
        b'{"pinned": 3, "retired": [], "default": null}',
        b'{"pinned": null, "retired": [], "default": null}',
        b"\xff\xfe",
        b"[" * 200_000,
    ],
    ids=lambda content: repr(content[:30]),
)
def test_a_broken_file_is_no_choice_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = tmp_path / "choices.json"
    path.write_bytes(content)
    assert Choices.read(path) == Choices(path)
    assert "are forgotten" in caplog.text
    Choices(path, {"a@v1"}).write()
    assert Choices.read(path).pinned == {"a@v1"}


def test_a_folder_in_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Choices.read(tmp_path) == Choices(tmp_path)
    Choices(tmp_path, {"a@v1"}).write()
    assert "hold until the server ends" in caplog.text
    assert list(tmp_path.parent.glob(f"{tmp_path.name}.*")) == [], "nothing is left beside it"


def test_a_place_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    Choices(tmp_path / "file" / "choices.json", {"a@v1"}).write()
    assert "cannot be written" in caplog.text


def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "choices.json"
    Choices(path, {"a@v1"}).write()

    def full(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    Choices(path, {"b@v1"}).write()
    assert "No space left on device" in caplog.text
    assert Choices.read(path).pinned == {"a@v1"}
    assert [one.name for one in tmp_path.iterdir()] == ["choices.json"]


def test_it_is_plain_json_that_a_person_can_read(tmp_path: Path) -> None:
    Choices(tmp_path / "c", {"b@v1", "a@v1"}, set(), None).write()
    assert json.loads((tmp_path / "c").read_text()) == {"pinned": ["a@v1", "b@v1"], "retired": [], "default": None}
