"""Fixtures shared by all tests: tiny model folders, a cache of their own, the command line in this process."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Nothing here may reach out: the Hub's libraries fail at once instead of trying.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny matrices: a second thread would only wait for the first, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests import tiny

# A collection goes through all that torch and transformers have made, and takes a tenth of a tiny run otherwise.
gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True)
def not_marked_as_one_of_several() -> Iterator[None]:
    """What a run in this process leaves behind must not make the next one wait for processes that nobody started."""
    yield
    left = [name for name in ("LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if os.environ.pop(name, None)]
    assert not left, f"left in the environment: {', '.join(left)}"


@pytest.fixture(autouse=True)
def the_same_precision_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """`trainer.precision=auto` is float32 in this process, whatever this machine multiplies fastest.

    Tests that compare weights or losses would otherwise mean one thing on one processor and another on the next. bf16
    has tests of its own, which ask for it.
    """
    from lit_ft.models import precision

    monkeypatch.setattr(precision, "_rates", lambda device, threads: (100.0, 100.0))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def opt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OPT has no chat template."""
    return tiny.folder(tmp_path_factory.mktemp("models") / "tiny-opt", "opt", chat=False)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test: fingerprints and reference log-probabilities are made anew."""
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where it is not installed."""
    import importlib.util

    # These remember for the whole process whether it is there.
    import peft  # noqa: F401
    import transformers.utils

    transformers.utils.is_bitsandbytes_available()
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else found(name, *more)
    )


@dataclass
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def in_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Callable[..., Outcome]]]:
    """Runs a command's `main` in this process, as `started` with arguments: in no time, and counted in coverage."""
    from hydra._internal.hydra import Hydra
    from hydra.core.global_hydra import GlobalHydra

    # Hydra composes the whole configuration once more, only to read a hydra.mode that nothing here sets: a sixth of a
    # run on a tiny model. Processes that tests start do it as ever.
    mode = Hydra.get_mode
    monkeypatch.setattr(
        Hydra,
        "get_mode",
        lambda self, config_name, overrides: (
            mode(self, config_name, overrides) if any("hydra.mode" in one for one in overrides) else None
        ),
    )

    def command(main: Callable[[], Any], started: str) -> Callable[..., Outcome]:
        def run(*args: object) -> Outcome:
            GlobalHydra.instance().clear()
            capfd.readouterr()
            monkeypatch.setattr(sys, "argv", [started, *map(str, args)])
            with pytest.raises(SystemExit) as ended:
                main()
            printed = capfd.readouterr()
            code = ended.value.code
            return Outcome(code if isinstance(code, int) else 0 if code is None else 1, printed.out, printed.err)

        return run

    yield command
    GlobalHydra.instance().clear()


@pytest.fixture
def cli(
    in_process: Callable[..., Callable[..., Outcome]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Outcome]:
    """`python -m lit_ft ARGS`, in an empty folder."""
    from lit_ft.cli import main

    (tmp_path / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")
    return in_process(main, "lit_ft")
