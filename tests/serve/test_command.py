"""`python -m serve` as a command that is given something wrong: what it says, how it exits, what it leaves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from serve.config import ServeConfig

ROOT = Path(__file__).resolve().parents[2]


def refused(folder: Path, *args: str) -> str:
    """What the command says on its way out, having checked that it goes as it should."""
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", *args],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LIT_FT_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert out == "" and "Traceback" not in err
    said = err.strip()
    assert said.startswith("error: ") and "\n\n" not in said
    with pytest.raises(ProcessLookupError):  # its group is empty
        os.killpg(process.pid, 0)
    assert [path.name for path in folder.rglob("*") if path.is_dir() and path.name not in ("runs", "serve")] == []
    return " ".join(said.split())


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"Port {port} on 127.0.0.1 is already in use" in refused(tmp_path, f"port={port}")


def test_an_unknown_key(tmp_path: Path) -> None:
    assert "prot" in refused(tmp_path, "prot=1")


def test_a_host_that_others_could_reach(tmp_path: Path) -> None:
    assert "no login" in refused(tmp_path, "host=0.0.0.0")


def test_a_model_folder_that_is_missing(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = refused(tmp_path, "model=./missing", f"port={port}")
    assert "missing" in said and "config.json" in said and "override" not in said, said


def test_the_two_places_of_the_defaults_agree() -> None:
    written = yaml.safe_load((ROOT / "conf" / "serve.yaml").read_text())
    settings = {key: value for key, value in written.items() if key not in ("defaults", "hydra")}
    assert settings == asdict(ServeConfig())
    assert settings["title"] == "lit_ft chat"
