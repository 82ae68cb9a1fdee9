"""Checkpoint files: a disk that is full, a file that was cut short or is missing, and what a person is told."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_ft.checkpoint import SafeCheckpointIO, before, find_checkpoint, read_checkpoint
from lit_ft.errors import UserError
from tests.conftest import Outcome

VALUES = 100_000


def checkpoint(step: int, algorithm: str = "sft") -> dict[str, Any]:
    own = {"parent": None, "identity": {"algorithm": algorithm}, "before": {}}
    return {"global_step": step, "lit_ft": own, "state_dict": {"w": torch.full((VALUES,), float(step))}}


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """The last of two checkpoints of a run, of steps 1 and 2."""
    path = tmp_path / "runs" / "2026" / "checkpoints" / "last.ckpt"
    for step in (1, 2):
        SafeCheckpointIO().save_checkpoint(checkpoint(step), path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def flip(path: Path) -> None:
    """Another byte in the middle of the weights."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: cut(path, 0),
    "one byte": lambda path: cut(path, 1),
    "half": lambda path: cut(path, path.stat().st_size // 2),
    "all but one byte": lambda path: cut(path, path.stat().st_size - 1),
    "another byte": flip,
}


@pytest.fixture(params=["a disk of its own", "a limit", "no room for any"])
def full(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A folder, how to have no room left in it, and how to have room again."""
    folder = tmp_path / "disk"
    folder.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if request.param == "a disk of its own":
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a file system cannot be mounted here")
        room = 4 << 20

        def fill() -> None:
            (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - room // 16))

        yield folder, fill, (folder / "filler").unlink
        subprocess.run(["umount", str(folder)], check=True)
        return
    most = 200_000 if request.param == "a limit" else 0
    yield (
        folder,
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_what_was_there(
    full: tuple[Path, Callable[[], None], Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fill, free = full
    said: list[str] = []
    monkeypatch.setattr("lit_ft.checkpoint.say", said.append)
    writer, path = SafeCheckpointIO(), folder / "runs" / "last.ckpt"
    best = path.with_name("best.ckpt")
    fill()
    writer.save_checkpoint(checkpoint(1), path)
    assert re.fullmatch(
        r"last\.ckpt of step 1 was not written \((No space left on device|File too large)\); there is none yet\.",
        said.pop(),
    )
    free()
    for step in (2, 3):
        writer.save_checkpoint(checkpoint(step), path)
    writer.save_checkpoint(checkpoint(3), best)
    assert not said
    fill()
    for target in (path, best):
        writer.save_checkpoint(checkpoint(4), target)
        (line,) = said
        assert "step 4 was not written" in line and line.endswith(f"the one before stays: {target}.")
        said.clear()
    assert [read_checkpoint(one).step for one in (path, before(path), best)] == [3, 2, 3]
    assert names(path.parent) == ["best.ckpt", "last-1.ckpt", "last.ckpt"], "debris"
    free()
    writer.save_checkpoint(checkpoint(5), path)
    assert [read_checkpoint(one).step for one in (path, before(path))] == [5, 3]
    assert names(path.parent) == ["best.ckpt", "last-1.ckpt", "last.ckpt"] and not said


def test_what_is_not_about_the_disk_is_raised(last: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        SafeCheckpointIO().save_checkpoint({**checkpoint(3), "more": lambda: 0}, last)
    assert names(last.parent) == ["last-1.ckpt", "last.ckpt"]

    class Refuses:
        def __reduce__(self) -> Any:
            raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        SafeCheckpointIO().save_checkpoint({**checkpoint(3), "more": Refuses()}, last)
    assert names(last.parent) == ["last-1.ckpt", "last.ckpt"]


def test_a_file_system_without_links(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    SafeCheckpointIO().save_checkpoint(checkpoint(3), last)
    assert [read_checkpoint(one).step for one in (last, before(last))] == [3, 2]
    assert names(last.parent) == ["last-1.ckpt", "last.ckpt"]


def test_what_a_killed_writer_left_is_removed(last: Path) -> None:
    for name in (".last.ckpt-0123abcd", ".best.ckpt-4567cdef", ".last-1.ckpt-89abef01"):
        last.with_name(name).write_bytes(b"part")
    SafeCheckpointIO().save_checkpoint(checkpoint(3), last)
    assert names(last.parent) == ["last-1.ckpt", "last.ckpt"]


def test_lightning_removes_a_checkpoint_and_not_the_one_before(last: Path) -> None:
    writer = SafeCheckpointIO()
    for _ in range(2):  # one that is gone already, too
        writer.remove_checkpoint(last)
        assert names(last.parent) == ["last-1.ckpt"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_recognised(last: Path, tmp_path: Path, damage: str) -> None:
    DAMAGES[damage](last)
    for resume in ("last", str(last), str(last.parents[1])):
        with pytest.raises(UserError) as refused:
            find_checkpoint(resume, tmp_path / "runs", "sft")
        said = str(refused.value)
        assert said.startswith(f"{last} cannot be resumed from: ")
        assert said.endswith(f"The one before it is whole (step 1): resume={before(last)}")
    resumed = find_checkpoint(str(before(last)), tmp_path / "runs", "sft")
    assert resumed is not None and resumed.step == 1
    # Going on from there, what was cut short does not take the place of what was gone on from.
    SafeCheckpointIO().save_checkpoint(checkpoint(2), last)
    assert read_checkpoint(last).step == 2
    if damage != "another byte":  # looking for that each time would take as long as writing
        assert read_checkpoint(before(last)).step == 1


def test_where_both_are_damaged_another_must_be_given(last: Path, tmp_path: Path) -> None:
    for path in (last, before(last)):
        cut(path, 100)
    with pytest.raises(UserError, match=r"or was cut short\. Give another with resume=PATH\.$"):
        find_checkpoint("last", tmp_path / "runs", "sft")


def test_files_that_are_something_else(tmp_path: Path, last: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="it is no checkpoint of lit_ft, or was cut short"):
        read_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="Is a directory"):
        read_checkpoint(tmp_path)


def test_the_one_before_counts_where_the_last_is_missing(last: Path, tmp_path: Path) -> None:
    """Killed between two renames, on a file system without links."""
    last.unlink()
    for resume in ("last", str(last.parents[1])):
        resumed = find_checkpoint(resume, tmp_path / "runs", "sft")
        assert resumed is not None and resumed.path == before(last) and resumed.step == 1
    SafeCheckpointIO().save_checkpoint(checkpoint(2), last)
    assert [read_checkpoint(one).step for one in (last, before(last))] == [2, 1]
    with pytest.raises(UserError, match="there is no checkpoint"):
        find_checkpoint(str(tmp_path), tmp_path / "runs", "sft")


def test_the_newest_run_of_the_algorithm_is_taken(last: Path, tmp_path: Path) -> None:
    for number, algorithm in enumerate(("sft", "dpo")):
        path = tmp_path / "runs" / f"later-{number}" / "checkpoints" / "last.ckpt"
        SafeCheckpointIO().save_checkpoint(checkpoint(7 + number, algorithm), path)
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 10 + number))
    found = [find_checkpoint("last", tmp_path / "runs", algorithm) for algorithm in ("sft", "dpo")]
    assert [one.step for one in found if one] == [7, 8]


@pytest.mark.slow
def test_the_command_refuses_a_damaged_one_and_the_one_it_offers_is_exact(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_ft.modules.base import FineTuneModule

    settings = (
        f"model.id={llama_folder}",
        "logger=none",
        "trainer.accelerator=cpu",
        "trainer.max_steps=6",
        "trainer.save_every_n_steps=1",
        "data.max_length=2048",
        "data.max_rows=8",
        "data.max_val_rows=2",
        "data.batch_size=4",
        "peft.dropout=0.3",
    )
    assert cli(*settings).code == 0
    train_step = FineTuneModule.training_step

    def training_step(self: FineTuneModule, window: Any, index: int) -> None:
        if self.global_step == 3:
            signal.raise_signal(signal.SIGTERM)
        train_step(self, window, index)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuneModule, "training_step", training_step)
        assert cli(*settings).code == 143
    (last,) = Path("runs").glob("support/*/checkpoints/last.ckpt")
    whole = last.read_bytes()
    for damage, do in DAMAGES.items():
        last.write_bytes(whole)
        do(last)
        refused = cli(*settings, "resume=last")
        assert refused.code == 2, damage
        assert str(last) in refused.err and "(step 3): resume=" in " ".join(refused.err.split()), damage
        assert len(list(Path("runs/support").iterdir())) == 2, "the refused run left its folder"
    offered = re.findall(r"resume=\S+last-1\.ckpt", refused.err)
    outcome = cli(*settings, *offered)
    assert outcome.code == 0, outcome.err
    first, second = (load_file(f"adapters/support/v{number}/adapter_model.safetensors") for number in (1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not last.exists() and not before(last).exists()
