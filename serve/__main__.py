"""`python -m serve`: adapters, then the engine, then the web page; stops all of it on Ctrl-C or SIGTERM."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lit_ft.adapter import scan
from lit_ft.cli import launch
from lit_ft.errors import UserError
from serve import base as bases
from serve.config import ServeConfig
from serve.registry import Survey, judge

BASE_NAME = "base"
LOOPBACK = "127.0.0.1,localhost,::1"


class Stopped(BaseException):
    """A signal asked for the end. Not an Exception, so that nothing on the way takes it for a failure."""


def serve(cfg: ServeConfig) -> int:
    """Serve until a signal (0) or the engine's death (1).

    Raises:
        UserError: the port or host cannot be used, the model cannot be found, the engine does not start.
    """
    check_host(cfg.host)
    check_port(cfg.host, cfg.port)
    bypass_proxies()
    for name in ("httpx", "httpx2", "openai"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a line for each request says nothing to a person
    try:
        with raising_on_signals():
            return _serve(cfg)
    except Stopped:
        say("Stopped.")
        return 0


def _serve(cfg: ServeConfig) -> int:
    began = time.monotonic()
    root = Path(cfg.adapters)
    folders = scan(root)
    base = bases.given(cfg.model) if cfg.model else bases.of_adapters(folders)
    survey = judge(folders, root, base.hash, cfg.max_lora_rank)
    report(survey, root, base.id)

    from serve.engine import Engine

    log_path = Path("runs", "serve", f"engine-{cfg.port}.log")
    engine = Engine(
        base.place,
        survey.served,
        served_name=BASE_NAME,
        max_loras=cfg.max_loras,
        max_lora_rank=cfg.max_lora_rank,
        max_model_len=cfg.max_model_len,
        dtype=cfg.dtype,
        log_path=log_path,
        start_timeout=cfg.start_timeout,
    )
    page = None
    try:
        with progress_line() as progress:
            engine.start(progress)
        from serve import app
        from serve.client import EngineClient

        client = EngineClient(engine.base_url, engine.api_key)
        about = bases.describe(base, cfg.max_model_len)
        page = app.build(
            cfg.title, client, BASE_NAME, about, survey.served, survey.refused, max_model_len=cfg.max_model_len
        )
        app.launch(page, cfg.host, cfg.port)
        sys.stdout.write(f"http://{cfg.host}:{cfg.port}\n")
        sys.stdout.flush()
        seconds = time.monotonic() - began
        say(f"Ready after {seconds:.0f} s: open the address above in a browser; Ctrl-C stops it.")
        while engine.alive():
            time.sleep(0.5)
        last = "\n".join(engine.tail())
        say(f"error: the engine stopped unexpectedly. The last lines of {log_path}:\n{last}")
        return 1
    finally:
        ignore_signals()  # a second Ctrl-C must not leave half of it running
        if page is not None:
            page.close(verbose=False)
        engine.stop()


def check_host(host: str) -> None:
    """Raise UserError unless `host` is this machine talking to itself: the page has no login yet."""
    try:
        loopback = host == "localhost" or ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise UserError(
            f"host={host} is not a loopback address. The page has no login yet, so it is only served on this machine: "
            "use host=127.0.0.1, and from elsewhere an SSH tunnel (ssh -L 7860:127.0.0.1:7860 MACHINE)."
        )


def check_port(host: str, port: int) -> None:
    """Raise UserError unless `port` can be listened on. Done first: the engine takes a minute to start."""
    if not 0 < port < 65536:
        raise UserError(f"port={port} is not a port: use a number from 1 to 65535.")
    with socket.socket() as probe:
        # As the web server does, so that connections of a run that has just ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except PermissionError as error:
            raise UserError(
                f"Port {port} needs rights that you do not have; use one above 1023 (port=7860)."
            ) from error
        except OSError as error:
            raise UserError(
                f"Port {port} on {host} is already in use, perhaps by another `python -m serve`. "
                f"Stop that one, or choose another port (port={port + 1 if port < 65535 else 7860})."
            ) from error


def bypass_proxies() -> None:
    """Keep requests to this machine away from a proxy named in the environment."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(part for part in (os.environ.get(name), LOOPBACK) if part)


def report(survey: Survey, root: Path, model_id: str) -> None:
    """One line for each adapter."""
    say(f"Base model: {model_id}")
    for adapter in survey.served:
        say(f"  serving  {adapter.ref} ({adapter.card.algorithm})")
    for refused in survey.refused:
        say(f"  refused  {refused.ref_or_path}: {refused.reason}")
    if not survey.served:
        say(
            f"No adapter to serve in {root}: this is the base model alone. "
            "Train one with: python -m lit_ft +experiment=sft"
        )


@contextmanager
def progress_line() -> Iterator[Progress]:
    """A line on stderr that is rewritten in place on a terminal, and else written now and then."""
    progress = Progress()
    try:
        yield progress
    finally:
        progress.end()


class Progress:
    """Called with what the engine is doing and for how many seconds it has been starting."""

    QUIET_S = 10.0

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._text = ""
        self._said = -self.QUIET_S
        self._open = False

    def __call__(self, text: str, seconds: float) -> None:
        if self._live:
            sys.stderr.write(f"\r\x1b[K{text} ({seconds:.0f} s)"[:120])
            sys.stderr.flush()
            self._open = True
        elif text != self._text or seconds - self._said >= self.QUIET_S:
            say(f"{text} ({seconds:.0f} s)")
            self._text, self._said = text, seconds

    def end(self) -> None:
        if self._open:
            say("")


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into Stopped in the main thread: starting the engine blocks, and must be stoppable."""

    def stop(signum: int, frame: FrameType | None) -> None:
        ignore_signals()
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """From here on the end is under way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def say(text: str) -> None:
    """To the person who serves: standard error, at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    launch(serve, "serve", ServeConfig)
