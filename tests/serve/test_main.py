"""`python -m serve` without vLLM: its refusals, its choices, and that signals end all of it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lit_ft.errors import UserError
from serve.__main__ import bypass_proxies, check_host, check_port
from tests.serve.published import adapter

ROOT = Path(__file__).resolve().parents[2]

# The real command with an engine that is the stub, in a process of its own as vLLM is.
PROGRAM = """
import subprocess, sys, time
from pathlib import Path
import serve.engine, serve.__main__ as main
from serve.config import ServeConfig
import lit_ft.models.resolve as resolve
resolve.resolve_model = lambda model_id: model_id
resolve.model_fingerprint = lambda model_id: "sha256:" + "ba5e" * 16

class Engine:
    base_url, api_key, process = "http://127.0.0.1:9/v1", "key", None
    def __init__(self, model, adapters, **settings):
        self.seconds = float(sys.argv[2])
    def start(self, on_progress):
        self.process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({self.seconds})"])
        Path("engine.pid").write_text(str(self.process.pid))
        for second in range(int(sys.argv[3])):
            on_progress("loading the weights", second)
            time.sleep(1)
    def alive(self):
        return self.process.poll() is None
    def tail(self):
        return ["out of memory"]
    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()

serve.engine.Engine = Engine
sys.exit(main.serve(ServeConfig(adapters="adapters", port=int(sys.argv[1]))))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, port: int, *, lives_s: float = 600, starts_s: int = 1) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(port), str(lives_s), str(starts_s)]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
        assert page.status == 200
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "", err
    assert "serving  support@v1 (sft)" in err and "refused  legal/v1: " in err
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


def test_the_death_of_the_engine_is_said(tmp_path: Path) -> None:
    process = start(tmp_path, free_port(), lives_s=4)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the engine stopped unexpectedly" in err and "out of memory" in err


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost"])
def test_loopback_hosts(host: str) -> None:
    check_host(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org", "", "127.0.0.1.example.org"])
def test_other_hosts_are_refused(host: str) -> None:
    with pytest.raises(UserError, match="no login"):
        check_host(host)


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
