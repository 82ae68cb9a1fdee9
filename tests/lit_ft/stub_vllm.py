"""What stands for the engine of `serve` in tests of rollouts: a web server in a thread, and all that it was asked."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_ft.errors import UserError

KEY = "a-key"
STOP = 9


class Died(Exception):
    """Raised by a stub's behaviour: the process is gone, and with it every connection."""


def echo(body: dict[str, Any]) -> dict[str, Any]:
    """Tokens that say whom they answer: the prompt's first, which completion, a stop token."""
    choices = [
        {"index": k, "token_ids": [body["prompt"][0], k, STOP], "finish_reason": "stop", "stop_reason": STOP}
        for k in reversed(range(body["n"]))  # vLLM's order is nobody's promise
    ]
    return {"choices": choices}


class StubEngine:
    """As `serve.engine.Engine`, with a web server in a thread in the place of vLLM."""

    def __init__(self, stubs: Stubs) -> None:
        self.stubs, self.api_key = stubs, KEY
        self.loaded: dict[str, str] = {}
        self.broken = threading.Event()
        self.connections: set[socket.socket] = set()
        engine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                engine.connections.add(self.connection)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.headers["Authorization"] == f"Bearer {KEY}"
                try:
                    status, reply = engine.answer(self.path, body)
                except Died:
                    engine.break_off()
                    return
                text = (json.dumps(reply) if isinstance(reply, dict) else reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                with contextlib.suppress(OSError):  # who asked may have given up
                    self.wfile.write(text)

            def log_message(self, *_: Any) -> None: ...

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None: ...

        self.server = Server(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self.stubs.lock:
            self.stubs.asked.append((path, body))
            count = len(self.stubs.asked)
        if self.stubs.behave is not None and (reply := self.stubs.behave(self, path, body, count)) is not None:
            return reply
        if path == "/v1/load_lora_adapter":
            assert (Path(body["lora_path"]) / "weights").is_file() and body["lora_name"] not in self.loaded
            self.loaded[body["lora_name"]] = body["lora_path"]
            return 200, "Success: added."
        if path == "/v1/unload_lora_adapter":
            assert Path(self.loaded.pop(body["lora_name"])).is_dir()  # vLLM may still look there
            return 200, "Success: removed."
        assert path == "/v1/completions"
        if body["model"] != "base" and body["model"] not in self.loaded:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        with self.stubs.lock:
            self.stubs.answered.append(body["seed"])
        return 200, echo(body)

    def break_off(self) -> None:
        """Like kill -9: every connection is reset, the port closed."""
        if self.broken.is_set():
            return
        self.broken.set()
        for connection in list(self.connections):  # its threads still add and remove
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server.shutdown()
        self.server.server_close()

    def alive(self) -> bool:
        return not self.broken.is_set()

    def dead(self) -> bool:
        return self.broken.is_set()

    def tail(self, lines: int = 15) -> list[str]:
        return ["RuntimeError: the last line of the log"]

    def stop(self) -> None:
        self.break_off()


Behaviour = Callable[[StubEngine, str, dict[str, Any], int], tuple[int, Any] | None]


@dataclass
class Stubs:
    """Every engine that was started, and what all of them were asked."""

    engines: list[StubEngine] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    behave: Behaviour | None = None
    refuse_start_from: int = 100
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, model: str, **settings: Any) -> StubEngine:
        if len(self.settings) >= self.refuse_start_from:
            self.settings.append(settings)
            raise UserError("vLLM ended while starting.")
        self.settings.append({"model": model, **settings})
        self.engines.append(StubEngine(self))
        return self.engines[-1]

    def of(self, path: str) -> list[dict[str, Any]]:
        return [body for at, body in self.asked if at == f"/v1/{path}"]

    def nothing_runs(self) -> bool:
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("rollouts")]
        return not threads and not any(engine.alive() for engine in self.engines)
