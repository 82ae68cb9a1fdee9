"""The engine's own copies: always a new path, whole or not at all, and out of reach of whatever happens later."""

from __future__ import annotations

import asyncio
import errno
import io
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from lit_ft.adapter import ADAPTER_WEIGHTS, sha256_file
from lit_ft.errors import UserError
from serve import snapshots as snapshots_module
from serve.errors import EngineGoneError, UnavailableError
from serve.snapshots import ChangedError, Snapshots
from tests.serve.published import adapter


class Loader:
    """Remembers what it was given; `problem` is raised by the next load."""

    def __init__(self) -> None:
        self.loaded: dict[str, Path] = {}
        self.paths: list[Path] = []
        self.problem: BaseException | None = None

    async def load(self, ref: str, path: Path) -> None:
        self.paths.append(path)
        if self.problem:
            raise self.problem
        self.loaded[ref] = path

    async def unload(self, ref: str) -> None:
        assert self.loaded[ref].is_dir(), "the engine may read it until it has let go"
        del self.loaded[ref]


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def copies(tmp_path: Path, loader: Loader) -> Snapshots:
    return Snapshots(loader, tmp_path / "copies")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_copy_of_what_the_engine_reads_and_of_nothing_else(tmp_path: Path, loader: Loader, copies: Snapshots) -> None:
    made = adapter(tmp_path / "adapters")
    (made.path / "run_me.py").write_text("")
    asyncio.run(copies.load(made))
    copy = loader.loaded["support@v1"]
    assert copy.parent == copies.folder and copy.is_absolute()
    assert set(contents(copy)) == {"adapter_config.json", ADAPTER_WEIGHTS}
    assert all(contents(made.path)[name] == data for name, data in contents(copy).items())


def test_a_path_never_used_before(
    tmp_path: Path, loader: Loader, copies: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots_module, "DELAY_S", 0.0)
    made = adapter(tmp_path / "adapters")

    async def task() -> None:
        for _ in range(20):
            await copies.load(made)
            await copies.unload("support@v1")
            assert list(copies.folder.iterdir()) == []

    asyncio.run(task())
    assert len(set(loader.paths)) == 20


def test_a_copy_is_left_for_a_while_after_the_engine_was_told_to_let_go(
    tmp_path: Path, loader: Loader, copies: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots_module, "DELAY_S", 0.2)
    made = adapter(tmp_path / "adapters")

    async def task() -> None:
        await copies.load(made)
        first = loader.loaded["support@v1"]
        await copies.unload("support@v1")
        await copies.load(made)
        second = loader.loaded["support@v1"]
        assert sorted(contents(first)) == sorted(contents(second)), "a step under way may read it yet"
        await asyncio.sleep(0.4)
        assert not first.exists() and second.is_dir(), "removed by itself"

    asyncio.run(task())


def test_copies_whose_time_came_while_nobody_looked_are_removed_with_the_next_load(
    tmp_path: Path, loader: Loader, copies: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter(tmp_path / "adapters")
    asyncio.run(copies.load(made))
    asyncio.run(copies.unload("support@v1"))
    assert len(list(copies.folder.iterdir())) == 1
    monkeypatch.setattr(snapshots_module, "DELAY_S", 0.0)
    asyncio.run(copies.load(made))
    assert list(copies.folder.iterdir()) == [loader.loaded["support@v1"]]


def test_all_copies_are_removed_when_no_engine_runs(tmp_path: Path, loader: Loader, copies: Snapshots) -> None:
    made = adapter(tmp_path / "adapters")
    asyncio.run(copies.load(made))
    asyncio.run(copies.unload("support@v1"))
    copies.clear()
    assert not copies.folder.exists()


def test_a_copy_that_the_engine_refuses_to_let_go_of_stays(
    tmp_path: Path, loader: Loader, copies: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots_module, "DELAY_S", 0.0)
    made = adapter(tmp_path / "adapters")
    asyncio.run(copies.load(made))

    async def refuse(ref: str) -> None:
        raise UserError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(loader, "unload", refuse)
        with pytest.raises(UserError, match="refused"):
            asyncio.run(copies.unload("support@v1"))
        assert loader.loaded["support@v1"].is_dir()
    asyncio.run(copies.unload("support@v1"))
    assert list(copies.folder.iterdir()) == []


@pytest.mark.parametrize("problem", [EngineGoneError("gone, or slow to answer"), asyncio.CancelledError()])
def test_a_load_whose_end_is_not_known_leaves_the_copy_for_a_while(
    tmp_path: Path, loader: Loader, copies: Snapshots, problem: BaseException
) -> None:
    loader.problem = problem
    with pytest.raises(type(problem)):
        asyncio.run(copies.load(adapter(tmp_path / "adapters")))
    assert list(copies.folder.iterdir()) == loader.paths


@pytest.mark.parametrize("change", ["deleted", "truncated", "replaced", "overwritten"])
def test_what_happens_to_the_published_folder_later_changes_nothing(
    tmp_path: Path, loader: Loader, copies: Snapshots, change: str
) -> None:
    made = adapter(tmp_path / "adapters")
    asyncio.run(copies.load(made))
    before = contents(loader.loaded["support@v1"])
    if change == "deleted":
        shutil.rmtree(made.path)
    elif change == "truncated":
        with (made.path / ADAPTER_WEIGHTS).open("r+b") as file:
            file.truncate(10)
    elif change == "replaced":
        shutil.rmtree(made.path)
        adapter(tmp_path / "adapters", lora={"r": 4})
    else:
        for path in made.path.iterdir():
            path.write_bytes(b"x" * path.stat().st_size)
    assert contents(loader.loaded["support@v1"]) == before
    assert sha256_file(loader.loaded["support@v1"] / ADAPTER_WEIGHTS) == made.card.weights_sha256


def test_other_weights_than_the_cards(tmp_path: Path, loader: Loader, copies: Snapshots) -> None:
    made = adapter(tmp_path / "adapters")
    with (made.path / ADAPTER_WEIGHTS).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ChangedError, match="not those that were published"):
        asyncio.run(copies.load(made))
    assert loader.paths == [] and list(copies.folder.iterdir()) == []


@pytest.mark.parametrize("name", ["adapter_config.json", ADAPTER_WEIGHTS])
def test_a_file_that_is_gone(tmp_path: Path, loader: Loader, copies: Snapshots, name: str) -> None:
    made = adapter(tmp_path / "adapters")
    (made.path / name).unlink()
    with pytest.raises(UserError, match="support@v1 cannot be copied for the engine: No such file") as told:
        asyncio.run(copies.load(made))
    assert not isinstance(told.value, UnavailableError), "trying again would not help"
    assert list(copies.folder.iterdir()) == []


def test_a_full_disk(tmp_path: Path, loader: Loader, copies: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    made = adapter(tmp_path / "adapters")
    there = Path.open

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = there(self, mode, *args, **options)  # it is there, and empty
        if self.name != ADAPTER_WEIGHTS or "w" not in mode:
            return file
        file.close()
        return Full()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        with pytest.raises(UnavailableError, match="No space left on device"):
            asyncio.run(copies.load(made))
    assert loader.paths == [] and list(copies.folder.iterdir()) == []
    asyncio.run(copies.load(made))
    assert "support@v1" in loader.loaded


def test_a_limit_on_the_size_of_files(tmp_path: Path, loader: Loader, copies: Snapshots) -> None:
    made = adapter(tmp_path / "adapters")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))  # the configuration fits, the weights do not
    try:
        with pytest.raises(UnavailableError, match="File too large"):
            asyncio.run(copies.load(made))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert loader.paths == [] and list(copies.folder.iterdir()) == []


def test_no_place_for_the_copies(
    tmp_path: Path, loader: Loader, copies: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter(tmp_path / "adapters")

    def full(**options: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(UnavailableError, match="No copy for the engine can be made"):
        asyncio.run(copies.load(made))


def test_refused_by_the_engine(tmp_path: Path, loader: Loader, copies: Snapshots) -> None:
    made = adapter(tmp_path / "adapters")
    loader.problem = UserError("refused")
    with pytest.raises(UserError, match="refused"):
        asyncio.run(copies.load(made))
    assert list(copies.folder.iterdir()) == []


def test_leftovers_of_an_earlier_server_are_removed(tmp_path: Path, loader: Loader) -> None:
    (tmp_path / "copies" / "support@v1-old").mkdir(parents=True)
    (tmp_path / "copies" / "file").write_text("")
    (tmp_path / "beside").mkdir()
    copies = Snapshots(loader, tmp_path / "copies")
    assert not copies.folder.exists() and (tmp_path / "beside").is_dir()
    made = adapter(tmp_path / "adapters")
    asyncio.run(copies.load(made))
    copies.clear()
    assert not copies.folder.exists()
    asyncio.run(copies.load(made))
    assert loader.loaded["support@v1"].is_dir()
