"""Our web app without its engine, or the stand-in for vLLM, each as a process of its own, that a benchmark starts.

    with Process(app(folder, port, engine_url, key), folder) as url: …

`python -m tests.benchmarks.served` reads what to be from its standard input, prints its address when it answers, and
ends when that input does: with the process that started it, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.config import ServeConfig

ROOT = Path(__file__).parents[2]

NO_LIMITS = {"requests_per_minute": 0, "requests_per_minute_in_all": 0, "streams": 0, "streams_in_all": 0}
"""All load comes from one address, which would count as one user."""

PATIENCE_S = 30.0


class Process:
    """A process that prints its address when it can be asked, started anew by each `start`."""

    def __init__(self, settings: Mapping[str, Any], folder: Path) -> None:
        """It runs in `folder`."""
        self._settings = settings
        self._folder = folder
        self._command = [sys.executable, "-m", "tests.benchmarks.served"]
        self.log = folder / f"{settings['kind']}.log"
        self._running: subprocess.Popen[str] | None = None

    def start(self) -> str:
        """Start it, and wait for its address.

        Raises:
            SystemExit: it ended before; its last lines are shown.
        """
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        pipe = subprocess.PIPE
        with self.log.open("ab") as log:
            self._running = subprocess.Popen(
                self._command, cwd=self._folder, env=env, stdin=pipe, stdout=pipe, stderr=log, text=True
            )
        assert self._running.stdin is not None and self._running.stdout is not None
        self._running.stdin.write(json.dumps(self._settings) + "\n")
        self._running.stdin.flush()
        address = self._running.stdout.readline().strip()
        if not address:
            self.kill()
            raise SystemExit(f"{' '.join(self._command[1:])} ended:\n{self.last_lines()}")
        return address

    def alive(self) -> bool:
        """Whether it runs."""
        return self._running is not None and self._running.poll() is None

    def kill(self) -> None:
        """As `kill -9`; at once, and without a chance to put anything in order."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """As Ctrl-C does, and harder if that does not help."""
        self._end(signal.SIGTERM)

    def last_lines(self) -> str:
        """Of what it complained about."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def _end(self, number: signal.Signals) -> None:
        process, self._running = self._running, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                stream and stream.close()

    def __enter__(self) -> str:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def stub(models: Sequence[str], **behaviour: Any) -> dict[str, Any]:
    """Settings of a stand-in for vLLM; `behaviour` are fields of `tests.serve.stub_engine.Stub`.

    And `words`, the length of the replies beside the question that they repeat.
    """
    return {"kind": "stub", "models": list(models), "behaviour": behaviour}


def app(
    engine_url: str, key: str, port: int, base: Mapping[str, str], limits: Mapping[str, float] = NO_LIMITS
) -> dict[str, Any]:
    """Settings of our web app: its adapters and votes are in its folder, the engine is at `engine_url` already.

    `base` holds the fields of `serve.base.Base`.
    """
    return {"kind": "app", "url": engine_url, "key": key, "port": port, "base": dict(base), "limits": dict(limits)}


def main() -> None:
    """One of the processes."""
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    {"app": _serve_app, "stub": _serve_stub}[settings.pop("kind")](**settings)


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


def _serve_stub(models: list[str], behaviour: dict[str, Any]) -> None:
    from tests.serve import stub_engine

    echo, more = stub_engine.reply_text, " word" * int(behaviour.pop("words", 0))
    stub_engine.reply_text = lambda model, messages: echo(model, messages) + more
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with stub_engine.running(models, **behaviour) as engine:
        print(engine.base_url, flush=True)
        ended.wait()


def _serve_app(url: str, key: str, port: int, base: dict[str, str], limits: dict[str, float]) -> None:
    """All of `python -m serve` but the start of the engine: its own function puts the rest together."""
    import asyncio

    from lit_ft.adapter import scan
    from serve import __main__ as command
    from serve.access import check_access
    from serve.base import Base
    from serve.config import LimitsConfig, ServeConfig
    from serve.registry import rules_for
    from serve.votes import VoteStore

    began = time.monotonic()
    cfg: ServeConfig = ServeConfig(port=port, limits=LimitsConfig(**limits))  # type: ignore[arg-type]
    command.bypass_proxies()
    root, model = Path(cfg.adapters), Base(**base)
    rules = rules_for(scan(root, verify=False), root, model.hash, None, None)
    engine: Any = Elsewhere(url, key, cfg.max_cpu_loras)
    votes = VoteStore(Path(cfg.votes))
    sys.exit(asyncio.run(command._run(cfg, check_access(cfg.host), model, rules, engine, votes, began)))


class Elsewhere:
    """What `serve.engine.Engine` is to the web app and its supervisor, of an engine that is started by others."""

    log_path = Path("elsewhere")

    def __init__(self, url: str, key: str, max_cpu_loras: int) -> None:
        self.base_url, self.api_key, self.max_cpu_loras = url, key, max_cpu_loras

    def alive(self) -> bool:
        """Whoever started it sees to that."""
        return True

    healthy = alive

    def dead(self) -> bool:
        """It is not."""
        return False

    def tail(self) -> list[str]:
        """Of no log."""
        return []

    def stop(self) -> None:
        """Not this one's to stop."""


if __name__ == "__main__":
    main()
