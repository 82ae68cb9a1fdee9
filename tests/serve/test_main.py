"""`python -m serve` without vLLM: its refusals, its choices, and that signals end all of it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_ft.errors import UserError
from serve.__main__ import alone, bypass_proxies, check_port
from tests.serve.published import adapter

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, port: int, *settings: str, **engine: float) -> subprocess.Popen[str]:
    """The real command, with the stub as its engine."""
    (folder / "engine.json").write_text(json.dumps(engine))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.serve.stub_process", "adapters=adapters", f"port={port}", *settings]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def get(port: int, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_page_and_engine(tmp_path: Path, number: signal.Signals) -> None:
    adapter(tmp_path / "adapters")
    (tmp_path / "adapters" / "legal" / "v1").mkdir(parents=True)
    port = free_port()
    process = start(tmp_path, port)
    assert process.stdout is not None
    assert process.stdout.readline() == f"http://127.0.0.1:{port}\n"  # once it is said, it answers
    assert get(port, "/")[0] == 200
    assert get(port, "/healthz") == (200, b'{"status":"ok"}')
    listed = [model["id"] for model in json.loads(get(port, "/v1/models")[1])["data"]]
    assert listed == ["base", "support", "support@v1"]
    assert b'lit_ft_swaps_total{what="quarantined"} 1.0' in get(port, "/metrics")[1]
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "", err
    assert "serving  support@v1 (sft)" in err and "refused  legal@v1: legal/v1 has no card.json" in err
    assert "loading the weights (0 s)" in err and err.rstrip().endswith("Stopped.")
    assert "Traceback" not in err
    assert re.search(r"^Ready after \d+ s: open ", err, re.MULTILINE)
    assert gone(int((tmp_path / "engine.pid").read_text()))
    check_port("127.0.0.1", port)


def test_a_signal_while_the_engine_starts(tmp_path: Path) -> None:
    process = start(tmp_path, free_port(), starts_s=600)
    deadline = time.monotonic() + 60
    while not (tmp_path / "engine.pid").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "" and "Traceback" not in err
    assert "python -m lit_ft +experiment=sft" in err  # there are no adapters: how to get one
    assert gone(int((tmp_path / "engine.pid").read_text()))


def test_a_dead_engine_is_started_again_with_its_adapters(tmp_path: Path) -> None:
    adapter(tmp_path / "adapters")
    port = free_port()
    process = start(tmp_path, port, starts_s=2)
    assert process.stdout is not None
    assert process.stdout.readline()
    first = int((tmp_path / "engine.pid").read_text())
    os.kill(first, signal.SIGKILL)
    until(lambda: get(port, "/healthz")[0] == 503)
    status, body = get(port, "/v1/models")  # what is served is known all the same
    assert status == 200 and b"support@v1" in body
    until(lambda: get(port, "/healthz")[0] == 200)
    request = {"model": "support", "messages": [{"role": "user", "content": "hello"}]}
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps({**request, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert b"support@v1" in answer.read()
    assert b"lit_ft_engine_restarts_total 1.0" in get(port, "/metrics")[1]
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in err
    assert "The engine ended; it is started again." in err and "out of memory" in err
    assert "The engine runs again" in err


def test_an_engine_that_ends_again_and_again_ends_the_server(tmp_path: Path) -> None:
    process = start(tmp_path, free_port(), starts_s=0, lives_s=3, fails=1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    last = err[err.index("error: ") :]
    assert "4 times in a row" in last and "out of memory" in last and "Traceback" not in err


def test_what_a_server_writes_is_its_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with alone(7860):
        with alone(7861):
            pass
        with pytest.raises(UserError, match=r"port=7860 runs in this folder.*port=7861"), alone(7860):
            pass
    with alone(7860):
        pass
    (tmp_path / "runs" / "serve" / "server-7862.lock").mkdir()
    with pytest.raises(UserError, match="cannot be written"), alone(7862):
        pass


def test_a_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"{port} on 127.0.0.1 is already in use.*port="):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_numbers_that_are_no_ports(port: int) -> None:
    with pytest.raises(UserError, match="1 to 65535"):
        check_port("127.0.0.1", port)


def test_proxies_are_bypassed_and_what_was_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "")
    bypass_proxies()
    assert os.environ["no_proxy"] == "example.org,127.0.0.1,localhost,::1"
    assert os.environ["NO_PROXY"] == "127.0.0.1,localhost,::1"
