"""The supervisor: an engine that ends, hangs, or never comes back; with doubles, and with a real process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from lit_ft.errors import UserError
from serve import engine as engine_module
from serve import supervisor as supervisor_module
from serve.engine import Engine
from serve.errors import EngineGoneError
from serve.fleet import Fleet
from serve.snapshots import Snapshots
from serve.supervisor import EngineLostError, Supervisor
from tests.serve.published import adapter


class Process:
    """An engine without vLLM."""

    def __init__(self, tmp_path: Path) -> None:
        self.log_path = tmp_path / "engine.log"
        self.runs, self.answers, self.starts, self.stops = True, True, 0, 0
        self.failing_starts = 0
        self.says_so = False
        self.slow = threading.Event()
        self.slow.set()
        self._stopped = threading.Event()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{1000 + self.starts}/v1"

    def alive(self) -> bool:
        return self.runs

    def healthy(self) -> bool:
        return self.answers

    def dead(self) -> bool:
        return self.says_so

    def tail(self) -> list[str]:
        return [f"the last line of run {self.starts}"]

    def stop(self) -> None:
        self.stops += 1
        self.runs = False
        self._stopped.set()

    def start(self) -> None:
        self._stopped.clear()
        self.starts += 1
        while not self.slow.wait(0.01):
            if self._stopped.is_set():
                raise UserError("vLLM ended while starting, after 0 s.")
        if self.failing_starts:
            self.failing_starts -= 1
            raise UserError("vLLM ended while starting, after 1 s. The last lines\n    of its log")
        self.runs = self.answers = True
        self.says_so = False


class Client:
    """Remembers where it is and what was loaded there."""

    def __init__(self) -> None:
        self.url = ""
        self.loaded: list[str] = []
        self.on_load: Callable[[], None] = lambda: None

    async def connect(self, base_url: str) -> None:
        self.url = base_url

    async def load(self, ref: str, path: Path) -> None:
        assert path.is_dir()
        self.on_load()
        self.loaded.append(f"{self.url} {ref}")

    async def unload(self, ref: str) -> None: ...


class Parts:
    def __init__(self, tmp_path: Path) -> None:
        self.engine: Any = Process(tmp_path)
        self.client: Any = Client()
        self.snapshots = Snapshots(self.client, tmp_path / "copies")
        self.fleet = Fleet(self.snapshots, "base", room=8)
        self.restarted, self.said = 0, []  # type: int, list[str]
        self.supervisor = Supervisor(self.engine, self.client, self.fleet, self.snapshots, self.count, self.said.append)

    def count(self) -> None:
        self.restarted += 1

    async def publish(self, made: Any) -> None:
        version = self.fleet.found(made.ref, made)
        await self.fleet.try_out(version)
        self.fleet.passed(version)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "POLL_S", 0.01)
    monkeypatch.setattr(supervisor_module, "HEALTH_S", 0.02)


def run(task: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(task, 20))


async def until(right: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not right():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_an_engine_that_ended_is_started_again_and_given_its_adapters(tmp_path: Path, parts: Parts) -> None:
    async def task() -> None:
        await parts.publish(adapter(tmp_path / "adapters"))
        supervising = asyncio.create_task(parts.supervisor.run())
        await asyncio.sleep(0.05)
        assert parts.engine.starts == 0 and parts.fleet.up
        parts.engine.slow.clear()
        parts.engine.runs = False
        await until(lambda: not parts.fleet.up)
        assert (
            "being started again" in parts.fleet.down_reason and "Nothing you wrote is lost" in parts.fleet.down_reason
        )
        parts.engine.slow.set()
        await until(lambda: parts.restarted == 1)
        assert parts.fleet.up and parts.supervisor.restarts == 1
        assert parts.client.url == parts.engine.base_url == "http://127.0.0.1:1001/v1"
        assert parts.client.loaded == [" support@v1", "http://127.0.0.1:1001/v1 support@v1"]
        assert len(list(parts.snapshots.folder.iterdir())) == 1, "the copy for the engine that ended is gone"
        assert "ended" in parts.said[0] and "the last line of run 0" in parts.said[0]
        assert "runs again" in parts.said[1]
        async with parts.fleet.lease("support") as ref:
            assert ref == "support@v1"
        await cancelled(supervising)

    run(task())


def test_an_engine_that_hangs_is_started_again(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "UNHEALTHY_S", 0.3)

    async def task() -> None:
        supervising = asyncio.create_task(parts.supervisor.run())
        parts.engine.answers = False
        await asyncio.sleep(0.1)
        parts.engine.answers = True
        await asyncio.sleep(0.4)
        assert parts.engine.starts == 0, "it was only busy"
        parts.engine.answers = False
        await until(lambda: parts.restarted == 1)
        assert "has not answered for" in parts.said[0]
        await cancelled(supervising)

    run(task())


def test_an_engine_whose_server_outlives_it_is_not_waited_for(parts: Parts) -> None:
    async def task() -> None:
        supervising = asyncio.create_task(parts.supervisor.run())
        parts.engine.answers, parts.engine.says_so = False, True  # its process still runs
        began = time.monotonic()
        await until(lambda: parts.restarted == 1)
        assert time.monotonic() - began < supervisor_module.UNHEALTHY_S / 10
        assert "The engine ended" in parts.said[0]
        await cancelled(supervising)

    run(task())


def test_a_start_that_fails_is_tried_again(parts: Parts) -> None:
    async def task() -> None:
        parts.engine.failing_starts = 2
        supervising = asyncio.create_task(parts.supervisor.run())
        parts.engine.runs = False
        await until(lambda: parts.restarted == 1)
        assert parts.engine.starts == 3 and parts.supervisor.restarts == 1
        await cancelled(supervising)

    run(task())


def test_it_gives_up_after_three_and_says_the_last_lines_of_the_log(parts: Parts) -> None:
    async def task() -> None:
        parts.engine.failing_starts = 99
        parts.engine.runs = False
        with pytest.raises(EngineLostError, match=r"did not start .* 4 times in a row") as told:
            await parts.supervisor.run()
        assert parts.engine.starts == 3
        assert "the last line of run 3" in str(told.value) and str(parts.engine.log_path) in str(told.value)
        assert not parts.fleet.up and parts.restarted == 0

    run(task())


@pytest.mark.parametrize("steady", [False, True])
def test_deaths_in_a_row_are_counted_unless_it_ran_for_long(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, steady: bool
) -> None:
    if steady:
        monkeypatch.setattr(supervisor_module, "STEADY_S", 0.0)

    async def task() -> None:
        supervising = asyncio.create_task(parts.supervisor.run())
        for count in (1, 2, 3):
            parts.engine.runs = False
            await until(lambda count=count: parts.restarted == count)  # type: ignore[misc]
        parts.engine.runs = False
        if steady:
            await until(lambda: parts.restarted == 4)
            await cancelled(supervising)
        else:
            with pytest.raises(EngineLostError, match="ended 4 times"):
                await supervising

    run(task())


def test_an_engine_that_ends_while_it_is_given_its_adapters(tmp_path: Path, parts: Parts) -> None:
    async def task() -> None:
        await parts.publish(adapter(tmp_path / "adapters"))
        deaths = iter([EngineGoneError("gone")])

        def on_load() -> None:
            if problem := next(deaths, None):
                raise problem

        parts.client.on_load = on_load
        supervising = asyncio.create_task(parts.supervisor.run())
        parts.engine.runs = False
        await until(lambda: parts.restarted == 1)
        assert parts.engine.starts == 2 and "given its adapters" in parts.said[1]
        assert parts.fleet.resolve("support") == "support@v1", "it is not blamed"
        await cancelled(supervising)

    run(task())


@pytest.mark.parametrize("count", [1, 2])
def test_adapters_that_end_the_engine_whenever_they_are_loaded_do_not_end_the_server(
    tmp_path: Path, parts: Parts, count: int
) -> None:
    async def task() -> None:
        for name in ("deadly1", "deadly2", "good"):
            await parts.publish(adapter(tmp_path / "adapters", name))
        load = parts.client.load

        async def loading(ref: str, path: Path) -> None:
            if ref in [f"deadly{i}@v1" for i in range(1, count + 1)]:
                parts.engine.runs = False
                raise EngineGoneError("gone")
            await load(ref, path)

        parts.client.load = loading
        supervising = asyncio.create_task(parts.supervisor.run())
        parts.engine.runs = False
        await until(lambda: parts.restarted == 1)
        assert parts.engine.starts == 2 * count + 1 and not supervising.done()
        reasons = {v.ref: v.problem for v in parts.fleet.versions() if v.problem}
        assert set(reasons) == {f"deadly{i}@v1" for i in range(1, count + 1)}
        assert set(reasons.values()) == {"The engine ended 2 times in a row while it was loaded."}
        assert parts.fleet.resolve("good") == "good@v1"
        await cancelled(supervising)

    run(task())


def test_an_engine_that_no_adapter_can_be_loaded_into_is_given_up(tmp_path: Path, parts: Parts) -> None:
    async def task() -> None:
        for i in range(9):
            await parts.publish(adapter(tmp_path / "adapters", f"n{i}"))

        def on_load() -> None:
            raise EngineGoneError("gone")

        parts.client.on_load = on_load
        parts.engine.runs = False
        with pytest.raises(EngineLostError, match="given its adapters"):
            await parts.supervisor.run()
        assert parts.engine.starts < 9

    run(task())


def test_the_log_is_read_in_a_thread(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[threading.Thread] = []

    def tail() -> list[str]:
        where.append(threading.current_thread())
        assert not parts.fleet.up, "people are told before"
        return ["the end"]

    async def task() -> None:
        monkeypatch.setattr(parts.engine, "tail", tail)
        supervising = asyncio.create_task(parts.supervisor.run())
        parts.engine.runs = False
        await until(lambda: parts.restarted == 1)
        assert where and threading.main_thread() not in where and "the end" in parts.said[0]
        await cancelled(supervising)

    run(task())


def test_it_can_be_cancelled_while_the_engine_is_starting(parts: Parts) -> None:
    async def task() -> None:
        supervising = asyncio.create_task(parts.supervisor.run())
        parts.engine.slow.clear()  # for ever
        parts.engine.runs = False
        await until(lambda: parts.engine.starts == 1)
        await cancelled(supervising)
        assert parts.engine.stops and not parts.engine.runs
        assert parts.restarted == 0

    began = time.monotonic()
    run(task())
    assert time.monotonic() - began < 5, "no thread is left to wait for"


SERVER = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{"data": [{"id": "base"}]}')
    def log_message(self, *_): print("asked", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has asked after."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_real_process_that_is_killed_or_stopped(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    """As `Engine` starts vLLM: a keeper, and the server below it."""
    monkeypatch.setattr(engine_module, "require_vllm", lambda cpu: None)
    monkeypatch.setattr(
        engine_module,
        "build_command",
        lambda *args, port, **options: [sys.executable, "-I", "-S", "-c", SERVER, str(port)],
    )
    monkeypatch.setattr(engine_module, "HEALTH_TIMEOUT_S", 0.2)
    monkeypatch.setattr(engine_module.keeper, "GRACE_S", 1)
    monkeypatch.setattr(supervisor_module, "UNHEALTHY_S", 0.6)
    engine = Engine(
        "model", served_name="base", max_loras=1, max_lora_rank=8, max_model_len=9, dtype="float32",
        log_path=tmp_path / "engine.log", start_timeout=10,
    )  # fmt: skip

    def server() -> int:
        assert engine._process
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(engine._process.pid)], capture_output=True, text=True)
        return int(found.stdout.split()[0])

    async def task() -> None:
        await asyncio.to_thread(engine.start)
        first, url = server(), engine.base_url
        parts.supervisor.engine = engine
        supervising = asyncio.create_task(parts.supervisor.run())
        os.kill(first, how)
        await until(lambda: parts.restarted == 1)
        assert server() != first and engine.base_url != url and parts.client.url == engine.base_url
        assert engine.healthy()
        await until(lambda: ended(first))
        await cancelled(supervising)

    try:
        run(task())
    finally:
        engine.stop()
