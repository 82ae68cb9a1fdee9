"""The wheel holds the YAML and the example data, and trains from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lit_ft import adapter

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as pip lays it out; built by the same back end, without a network."""
    out = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    target = out / "site"
    with zipfile.ZipFile(out / done.stdout.strip().splitlines()[-1]) as wheel:
        wheel.extractall(target)
    return target


def run(unpacked: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    # -P and PYTHONPATH: only the wheel's copy can be found, not the checkout's.
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "LIT_FT_CACHE": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-P", *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_wheel_is_what_runs(unpacked: Path, tmp_path: Path) -> None:
    done = run(unpacked, tmp_path, "-c", "import lit_ft, serve; print(lit_ft.__file__, serve.__file__)")
    assert done.stdout.split() == [str(unpacked / "lit_ft/__init__.py"), str(unpacked / "serve/__init__.py")]


@pytest.mark.parametrize("experiment", ["sft", "dpo"])
def test_training_from_an_empty_folder(unpacked: Path, tmp_path: Path, llama_folder: Path, experiment: str) -> None:
    done = run(
        unpacked,
        tmp_path,
        *("-m", "lit_ft", f"+experiment={experiment}", f"model.id={llama_folder}"),
        *("data.max_length=2048", "data.max_dropped=1", "trainer.max_steps=2", "trainer.accelerator=cpu"),
    )
    assert done.returncode == 0, done.stderr
    assert adapter.read(tmp_path / done.stdout.strip()).card.algorithm == experiment


def test_the_wheel_carries_no_tests_and_no_python_in_conf(unpacked: Path) -> None:
    assert not (unpacked / "tests").exists()
    assert {p.suffix for p in (unpacked / "lit_ft" / "conf").rglob("*") if p.is_file()} == {".yaml"}
    assert (unpacked / "lit_ft/data/templates/chatml.jinja").is_file()
    assert (unpacked / "serve/page.css").is_file()
