"""The adapter folder: what is published, what a reader refuses, and what is left when publishing goes wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_ft.adapter import (
    Adapter,
    AdapterError,
    Base,
    Broken,
    DataSource,
    Draft,
    check_name,
    find,
    publish,
    read,
    scan,
    weights_sha256,
)
from lit_ft.errors import UserError

WEIGHTS = b"sixteen tons, and what do you get"


def draft(name: str = "support", **changes: Any) -> Draft:
    values: dict[str, Any] = {
        "name": name,
        "base": Base("bundled", "sha256:aaaa"),
        "algorithm": "sft",
        "peft": "lora",
        "rank": 16,
        "data": [DataSource("train.jsonl", 300, "sha256:0123456789abcdef")],
        "parent": None,
        "metrics": {"eval/loss": 1.25},
    }
    return Draft(**(values | changes))


def write(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"r": 16}')
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# Publishing


def test_publish_writes_exactly_these_files(tmp_path: Path) -> None:
    made = publish(tmp_path, draft(), write)
    assert made.ref == "support@v1"
    assert listing(tmp_path) == [
        "support",
        "support/v1",
        "support/v1/README.md",
        "support/v1/adapter_config.json",
        "support/v1/adapter_model.safetensors",
        "support/v1/card.json",
    ]


def test_the_card_says_what_was_published(tmp_path: Path) -> None:
    made = publish(tmp_path, draft(parent="support@v1", not_servable_reason="DoRA", servable=False), write)
    card = json.loads((made.path / "card.json").read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", card.pop("created"))
    assert card == {
        "name": "support",
        "version": 1,
        "base": {"id": "bundled", "hash": "sha256:aaaa"},
        "algorithm": "sft",
        "peft": "lora",
        "rank": 16,
        "data": [{"source": "train.jsonl", "rows": 300, "hash": "sha256:0123456789abcdef"}],
        "parent": "support@v1",
        "metrics": {"eval/loss": 1.25},
        "versions": {},
        "weights_sha256": hashlib.sha256(WEIGHTS).hexdigest(),
        "servable": False,
        "not_servable_reason": "DoRA",
        "canary": None,
        "converted": None,
    }
    assert read(made.path) == made


def test_what_was_converted_is_told(tmp_path: Path) -> None:
    made = publish(tmp_path, draft(converted="AdaLoRA to LoRA, exactly"), write)
    assert read(made.path).card.converted == "AdaLoRA to LoRA, exactly"
    assert "## Converted\n\nAdaLoRA to LoRA, exactly.\n" in (made.path / "README.md").read_text(encoding="utf-8")


def test_the_model_card_is_readable_by_the_hub(tmp_path: Path) -> None:
    text = (publish(tmp_path, draft(), write).path / "README.md").read_text(encoding="utf-8")
    front = text.split("---\n")[1]
    assert front == (
        "base_model: bundled\nlibrary_name: peft\npipeline_tag: text-generation\ntags: [lit_ft, sft, lora]\n"
    )
    assert "- train.jsonl: 300 rows" in text
    assert "| eval/loss | 1.25 |" in text
    assert "Not servable" not in text


def test_versions_count_up_and_leave_gaps_alone(tmp_path: Path) -> None:
    assert [publish(tmp_path, draft(), write).version for _ in range(3)] == [1, 2, 3]
    assert publish(tmp_path, draft("other"), write).version == 1
    for path in (tmp_path / "support" / "v2").iterdir():
        path.unlink()
    (tmp_path / "support" / "v2").rmdir()
    assert publish(tmp_path, draft(), write).version == 4
    (tmp_path / "support" / "v9").mkdir()
    assert publish(tmp_path, draft(), write).version == 10  # compared as numbers


@pytest.mark.parametrize("link", [False, True])
def test_something_else_under_the_next_name_is_stepped_over(tmp_path: Path, link: bool) -> None:
    (tmp_path / "support").mkdir()
    if link:
        (tmp_path / "support" / "v1").symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / "support" / "v1").write_text("a file")
    assert publish(tmp_path, draft(), write).ref == "support@v2"


def test_a_file_under_the_adapters_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "support").write_text("not a folder")
    with pytest.raises(UserError, match="could not be published"):
        publish(tmp_path, draft(), write)
    assert listing(tmp_path) == ["support"]


NO_SPACE = os.strerror(errno.ENOSPC)


class QuotedError(Exception):
    """As safetensors and tokenizers report the system's errors: only in the text."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, NO_SPACE),
        QuotedError(f"Error while serializing: I/O error: {NO_SPACE} (os error {errno.ENOSPC})"),
    ],
)
def test_disk_full_while_writing_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    publish(tmp_path, draft(), write)
    before = listing(tmp_path)

    def fill_up(folder: Path) -> None:
        write(folder)
        raise error

    with pytest.raises(UserError, match=rf"could not be published in .*{NO_SPACE}\. .*adapters=FOLDER.*resume=last"):
        publish(tmp_path, draft(), fill_up)
    assert listing(tmp_path) == before


def test_disk_full_as_safetensors_itself_reports_it(tmp_path: Path) -> None:
    """Past the limit on a file's size, the library gives the system's error in the text of its own."""
    import torch

    child = multiprocessing.get_context("fork").Process(target=_publish_within, args=(tmp_path, torch))
    child.start()
    child.join(60)
    assert child.exitcode == 2
    assert listing(tmp_path) == []


def _publish_within(root: Path, torch: Any) -> None:
    import resource

    from safetensors.torch import save_file

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        publish(root, draft(), lambda folder: save_file({"a": torch.zeros(1000)}, folder / "a.safetensors"))
    except UserError as error:
        os._exit(2 if os.strerror(errno.EFBIG) in str(error) else 3)
    os._exit(1)


@pytest.mark.parametrize("where", ["_flush", "model_card"])
def test_disk_full_in_the_last_steps_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: Any) -> str:
        raise OSError(errno.ENOSPC, NO_SPACE)

    monkeypatch.setattr(f"lit_ft.adapter.{where}", fail)
    with pytest.raises(UserError, match=NO_SPACE):
        publish(tmp_path, draft(), write)
    assert listing(tmp_path) == []


def test_what_is_visible_counts_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_ft import adapter

    flush = adapter._flush

    def fail_outside(path: Path) -> None:
        if not path.is_relative_to(next(tmp_path.glob(".support-*"), path / "no")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(path)

    monkeypatch.setattr(adapter, "_flush", fail_outside)
    assert publish(tmp_path, draft(), write).ref == "support@v1"
    assert [path.name for path in tmp_path.iterdir()] == ["support"]


def test_other_errors_pass_unchanged_and_leave_nothing(tmp_path: Path) -> None:
    def break_off(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, draft(), break_off)
    with pytest.raises(ZeroDivisionError):
        publish(tmp_path, draft(), lambda folder: folder.write_text(str(1 / 0)) and None)
    with pytest.raises(AdapterError, match=r"holds no \*\.safetensors"):
        publish(tmp_path, draft(), lambda _: None)
    assert listing(tmp_path) == []


BAD_NAMES = ["", ".", "..", "../up", "a/b", "/etc", ".hidden", "-x", "a b", "a\n", "a\0b", "é", "a" * 65, "v1@v2", "~"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_no_names(tmp_path: Path, name: str) -> None:
    root = tmp_path / "inside"
    root.mkdir()
    with pytest.raises(UserError, match="cannot be an adapter's name"):
        publish(root, draft(name), write)
    assert listing(tmp_path) == ["inside"]
    if "@" not in name:
        with pytest.raises(UserError, match="cannot be an adapter's name"):
            find(root, name)
        with pytest.raises(UserError, match="cannot be an adapter's name"):
            find(root, f"{name}@v1")


@pytest.mark.parametrize("name", ["a", "support", "Support-2_x.y", "7b", "a..b", "a" * 64])
def test_names_that_are(name: str) -> None:
    assert check_name(name) == name


def _publish_many(root: Path, count: int) -> None:
    for _ in range(count):
        publish(root, draft(), write)


def test_processes_that_publish_at_once_get_distinct_versions(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_publish_many, args=(tmp_path, 5)) for _ in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 6
    found = scan(tmp_path)
    assert [adapter.version for adapter in found if isinstance(adapter, Adapter)] == list(range(1, 31))
    assert [path.name for path in tmp_path.iterdir()] == ["support"]


def _publish_and_wait(root: Path, ready: Any) -> None:
    def half(folder: Path) -> None:
        write(folder)
        ready.set()
        time.sleep(60)

    publish(root, draft(), half)


def test_killed_while_publishing_leaves_no_version(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=_publish_and_wait, args=(tmp_path, ready))
    child.start()
    assert ready.wait(30)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert scan(tmp_path) == []
    with pytest.raises(AdapterError, match="There are none yet"):
        find(tmp_path, "support")
    # What the dead one left does not stand in the next one's way.
    assert publish(tmp_path, draft(), write).ref == "support@v1"
    assert [found.path.name for found in scan(tmp_path)] == ["v1"]


# Finding


def test_find_takes_the_newest_or_the_one_named(tmp_path: Path) -> None:
    for _ in range(11):
        publish(tmp_path, draft(), write)
    assert find(tmp_path, "support").ref == "support@v11"
    assert find(tmp_path, "support@v2").ref == "support@v2"
    publish(tmp_path, draft("other"), write)
    for ref in ("support@v12", "support@2", "support@v02", "support@latest", "support@v1/../v2", "nobody"):
        with pytest.raises(AdapterError, match=r"No adapter .* There are: other, support\."):
            find(tmp_path, ref)
    with pytest.raises(AdapterError, match="There are none yet"):
        find(tmp_path / "missing", "support")


def test_scan_sorts_and_ignores_what_is_no_version(tmp_path: Path) -> None:
    assert scan(tmp_path / "missing") == []
    for name in ("beta", "alpha", "alpha"):
        publish(tmp_path, draft(name), write)
    (tmp_path / ".alpha-123").mkdir()
    (tmp_path / ".alpha-123" / "v7").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for odd in ("v0", "v01", "v", "latest", "V3"):
        (tmp_path / "alpha" / odd).mkdir()
    found = scan(tmp_path)
    assert [one.ref for one in found if isinstance(one, Adapter)] == ["alpha@v1", "alpha@v2", "beta@v1"]
    assert len(found) == 3


# Broken folders


def edit_card(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        card = json.loads((folder / "card.json").read_text())
        card.update(changes)
        (folder / "card.json").write_text(json.dumps({k: v for k, v in card.items() if v is not ...}, default=str))

    return change


def without(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        card = json.loads((folder / "card.json").read_text())
        del card[key]
        (folder / "card.json").write_text(json.dumps(card))

    return change


def card_text(text: str | bytes) -> Callable[[Path], None]:
    content = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / "card.json").write_bytes(content) and None


def replaced_by_folder(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no card": (lambda f: (f / "card.json").unlink(), "no card.json"),
    "card is a folder": (replaced_by_folder("card.json"), "no card.json"),
    "empty card": (card_text(""), "cannot be read"),
    "half a card": (card_text('{"name": "supp'), "cannot be read"),
    "card is a list": (card_text("[]"), "cannot be read"),
    "card is null": (card_text("null"), "cannot be read"),
    "card is not UTF-8": (card_text(b'{"name": "\xff"}'), "cannot be read"),
    "card is a bottomless list": (card_text("[" * 100_000), "cannot be read"),
    "no base": (without("base"), "lacks 'base'"),
    "no weights' hash": (without("weights_sha256"), "lacks 'weights_sha256'"),
    "no rank": (without("rank"), "lacks 'rank'"),
    "base is a string": (edit_card(base="bundled"), "cannot be read"),
    "base is null": (edit_card(base=None), "cannot be read"),
    "data is a number": (edit_card(data=3), "cannot be read"),
    "metrics is a list": (edit_card(metrics=[1]), "cannot be read"),
    "a metric is text": (edit_card(metrics={"loss": "low"}), "cannot be read"),
    "version is text": (edit_card(version="newest"), "cannot be read"),
    "version is infinite": (edit_card(version=float("inf")), "cannot be read"),
    "another version": (edit_card(version=7), "holds the card of support@v7"),
    "another name": (edit_card(name="sales"), "holds the card of sales@v1"),
    "name with a path": (edit_card(name="../support"), "holds the card of"),
    "name is a number": (edit_card(name=7), "holds the card of"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors missing"),
    "weights are a folder": (replaced_by_folder("adapter_model.safetensors"), "adapter_model.safetensors missing"),
    "no adapter config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json missing"),
    "other weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "SHA-256 differs"),
    "cut weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(WEIGHTS[:-1]), "SHA-256 differs"),
    "more weights": (lambda f: (f / "more.safetensors").write_bytes(b"x"), "SHA-256 differs"),
    "a folder named as weights": (replaced_by_folder("more.safetensors"), "cannot be read: Is a directory"),
    "a link to nowhere": (lambda f: (f / "a.safetensors").symlink_to(f / "gone"), "cannot be read: No such file"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_folder_is_listed_with_its_reason(tmp_path: Path, name: str) -> None:
    damage, reason = BREAKAGES[name]
    publish(tmp_path, draft(), write)
    good = publish(tmp_path, draft(), write)
    damage(tmp_path / "support" / "v1")
    broken, other = scan(tmp_path)
    assert isinstance(broken, Broken)
    assert broken.path == tmp_path / "support" / "v1"
    assert reason in broken.reason
    assert "\n" not in broken.reason
    assert other == good
    with pytest.raises(AdapterError, match=re.escape(reason)):
        find(tmp_path, "support@v1")


def test_an_unreadable_file_is_a_reason_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = publish(tmp_path, draft(), write)

    def refuse(_: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("lit_ft.adapter.sha256_file", refuse)
    assert scan(tmp_path) == [Broken(made.path, f"{made.path} cannot be read: Permission denied.")]


def test_read_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is not a folder"):
        read(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="is not a folder"):
        read(tmp_path / "file")


def test_a_copied_folder_is_not_taken_for_another_version(tmp_path: Path) -> None:
    import shutil

    publish(tmp_path, draft(), write)
    shutil.copytree(tmp_path / "support" / "v1", tmp_path / "support" / "v2")
    shutil.copytree(tmp_path / "support" / "v1", tmp_path / "sales" / "v1")
    refs = {str(found.path.relative_to(tmp_path)): isinstance(found, Adapter) for found in scan(tmp_path)}
    assert refs == {"sales/v1": False, "support/v1": True, "support/v2": False}


def test_fields_that_a_newer_version_adds_do_no_harm(tmp_path: Path) -> None:
    made = publish(tmp_path, draft(), write)
    edit_card(licence="Apache-2.0")(made.path)
    assert read(made.path) == made


def test_a_full_model_needs_its_config_and_any_weights(tmp_path: Path) -> None:
    def write_full(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model-00001.safetensors").write_bytes(b"one")
        (folder / "model-00002.safetensors").write_bytes(b"two")

    made = publish(tmp_path, draft(peft="full", rank=None), write_full)
    assert read(made.path) == made
    lines = "".join(
        f"model-0000{k}.safetensors:{hashlib.sha256(part).hexdigest()}\n" for k, part in ((1, b"one"), (2, b"two"))
    )
    assert made.card.weights_sha256 == weights_sha256(made.path) == hashlib.sha256(lines.encode()).hexdigest()
    assert "library_name: transformers" in (made.path / "README.md").read_text()
    (made.path / "config.json").unlink()
    with pytest.raises(AdapterError, match=r"config\.json missing"):
        read(made.path)
