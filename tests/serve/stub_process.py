"""`python -m serve` with the stub in the place of vLLM, in a process of its own as vLLM is.

`python -m tests.serve.stub_process key=value …` takes the server's own settings. The file `engine.json` in the working
folder tells the engine how to behave, at each start: `starts_s`, `lives_s`, `delay_s`, `fails` (how many starts fail).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_ft.errors import UserError

BEHAVIOUR = Path("engine.json")
BASE_HASH = "sha256:" + "ba5e" * 16


class StubEngine:
    """The stub, started and ended as `serve.engine.Engine` is."""

    def __init__(self, model: str, **settings: Any) -> None:
        self.model = model
        self.settings = settings
        self.max_cpu_loras = int(settings["max_cpu_loras"])
        self.log_path = Path(settings["log_path"])
        self.api_key = "stub-key"
        self.base_url = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self, on_progress: Callable[[str, float], None] = lambda stage, seconds: None) -> None:
        self.stop()
        behaviour = json.loads(BEHAVIOUR.read_text()) if BEHAVIOUR.exists() else {}
        self.starts += 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{port}/v1"
        command = [sys.executable, "-m", "tests.serve.stub_process", "--stub", str(port), str(os.getpid())]
        self.process = subprocess.Popen([*command, str(behaviour.get("delay_s", 0))])
        Path("engine.pid").write_text(str(self.process.pid))
        for second in range(behaviour.get("starts_s", 1)):
            on_progress("loading the weights", second)
            time.sleep(1)
        if self.starts > 1 and behaviour.get("fails"):
            self.stop()
            raise UserError("vLLM ended while starting.")
        while not self.healthy():
            if not self.alive():
                raise UserError("vLLM ended while starting.")
            time.sleep(0.05)
        if lives_s := behaviour.get("lives_s"):
            subprocess.Popen(["sh", "-c", f"sleep {lives_s}; kill -9 {self.process.pid}"])

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def healthy(self) -> bool:
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            return bool(opener.open(self.base_url.removesuffix("/v1") + "/health", timeout=5).status == 200)
        except OSError:
            return False

    def dead(self) -> bool:
        return False

    def tail(self, lines: int = 15) -> list[str]:
        return ["out of memory"]

    def stop(self) -> None:
        process, self.process = self.process, None
        if process:
            process.kill()
            process.wait()


def main(arguments: list[str]) -> int:
    """The stub itself, or the server that starts it."""
    if arguments[:1] == ["--stub"]:
        from tests.serve.stub_engine import running

        port, parent, delay_s = int(arguments[1]), int(arguments[2]), float(arguments[3])
        with running(["base"], port=port, delay_s=delay_s, max_model_len=2048):
            while os.getppid() == parent:
                time.sleep(0.1)
        return 0
    import lit_ft.models.resolve as resolve
    import serve.engine
    from lit_ft.cli import launch
    from serve.__main__ import serve as command
    from serve.config import ServeConfig

    resolve.resolve_model = lambda model_id: model_id
    resolve.model_fingerprint = lambda model_id: BASE_HASH
    serve.engine.Engine = StubEngine  # type: ignore[misc, assignment]
    sys.argv[1:] = arguments
    launch(command, "serve", ServeConfig)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
