"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.warm import ROOT, Warm


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """One for all tests of this process."""
    one = Warm(tmp_path_factory.mktemp("warm"))
    yield one
    one.stop()


@pytest.fixture
def from_warm(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that is called in this process, at the project's root, starts its own processes from the warm one."""
    monkeypatch.setattr(subprocess, "run", warm.run)
    monkeypatch.chdir(ROOT)
