"""`python -m serve`: adapters, then the engine, then the web server; stops all of it on Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lit_ft.adapter import scan
from lit_ft.cli import launch, model_is_no_group
from lit_ft.errors import UserError
from serve import base as bases
from serve.access import Access, check_access
from serve.config import ServeConfig
from serve.registry import Rules, rules_for, template_in

if TYPE_CHECKING:
    import gradio as gr

    from serve.engine import Engine
    from serve.votes import VoteStore

BASE_NAME = "base"
LOOPBACK = "127.0.0.1,localhost,::1"
RUNS = Path("runs", "serve")

FIRST_PASS_S = 30.0
"""The address is printed once the adapters that were there are checked, or after this time: the rest follows."""

THREADS = 32
BALLOT_DAYS = 30.0
"""How long the server waits for a vote on replies that it has shown."""


class Stopped(BaseException):
    """A signal asked for the end. Not an Exception, so that nothing on the way takes it for a failure."""


def serve(cfg: ServeConfig) -> int:
    """Serve until a signal (0), or until the engine cannot be kept running (2).

    Raises:
        UserError: the port, host, login or votes file cannot be used, the model cannot be found, the engine does not
            start or ends again and again.
    """
    auth = cfg.auth
    access = check_access(
        cfg.host,
        users=auth.users,
        header=auth.header,
        trusted_proxies=auth.trusted_proxies,
        api_keys=auth.api_keys,
        names=auth.names,
    )
    check_port(cfg.host, cfg.port)
    bypass_proxies()
    for name in ("httpx", "httpx2", "openai"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a line for each request says nothing to a person
    try:
        with raising_on_signals(), alone(cfg.port):
            return _serve(cfg, access)
    except Stopped:
        say("Stopped.")
        return 0


def _serve(cfg: ServeConfig, access: Access) -> int:
    from serve.votes import VoteStore

    began = time.monotonic()
    votes = VoteStore(Path(cfg.votes))
    root = Path(cfg.adapters)
    # Weights are hashed when each is checked, which may take minutes for many; the cards suffice to choose the base.
    folders = scan(root, verify=False)
    base = bases.given(cfg.model.id) if cfg.model.id else bases.of_adapters(folders)
    rules = rules_for(folders, root, base.hash, template_in(Path(base.place)), cfg.max_lora_rank)
    say(f"Base model: {base.id}")
    if not folders:
        say(
            f"No adapter in {root} yet: this is the base model alone. "
            "Train one with: python -m lit_ft +experiment=sft. It is served as soon as it is published."
        )

    from serve.engine import Engine

    engine = Engine(
        base.place,
        served_name=BASE_NAME,
        max_loras=cfg.max_loras,
        max_cpu_loras=cfg.max_cpu_loras,
        max_lora_rank=rules.max_rank,
        max_model_len=cfg.max_model_len,
        dtype=cfg.dtype,
        chat_template=_template_file(rules, cfg.port),
        log_path=RUNS / f"engine-{cfg.port}.log",
        start_timeout=cfg.start_timeout,
    )
    try:
        with progress_line() as progress:
            engine.start(progress)
        return asyncio.run(_run(cfg, access, base, rules, engine, votes, began))
    finally:
        ignore_signals()  # a second Ctrl-C must not leave half of it running
        engine.stop()
        votes.close()


async def _run(
    cfg: ServeConfig, access: Access, base: bases.Base, rules: Rules, engine: Engine, votes: VoteStore, began: float
) -> int:
    """The pages, the endpoint, the watcher and the supervisor, until a signal or the engine's last end."""
    from serve import api, app, web
    from serve.access import Guard, VoterCookie, Voters
    from serve.choices import Choices
    from serve.client import EngineClient
    from serve.fleet import Fleet
    from serve.gateway import Gateway
    from serve.limits import Limits
    from serve.metrics import Metrics
    from serve.pages.parts import Parts
    from serve.snapshots import Snapshots
    from serve.supervisor import Supervisor
    from serve.watcher import Watcher

    importlib.import_module("openai")  # a second that the first chat should not wait
    # Hashing, votes and the engine's health wait in threads; a slow disk for one must not hold up the others.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    root = Path(cfg.adapters)
    metrics = Metrics()
    client = EngineClient(engine.base_url, engine.api_key)
    snapshots = Snapshots(client, RUNS / f"adapters-{cfg.port}")
    fleet = Fleet(
        snapshots,
        BASE_NAME,
        room=engine.max_cpu_loras,
        keep_versions=cfg.keep_versions,
        choices=Choices.read(root / ".serving.json"),
        on_swap=metrics.swapped,
    )
    limits = Limits(
        cfg.limits.requests_per_minute,
        cfg.limits.requests_per_minute_in_all,
        cfg.limits.streams,
        cfg.limits.streams_in_all,
        cfg.limits.characters,
    )
    gateway = Gateway(client, fleet, limits, metrics)
    voters = Voters(votes.path.with_name(f"{votes.path.name}.secret"))
    admins = cfg.auth.admins

    def who(request: gr.Request) -> str:
        if not access.still(request.username):
            raise UserError("Your account here has been removed. Ask whoever runs this server.")
        return voters.voter_id(request.username, request.cookies)

    parts = Parts(
        gateway=gateway,
        fleet=fleet,
        votes=votes,
        metrics=metrics,
        base=base,
        base_text=bases.describe(base, cfg.max_model_len),
        max_model_len=cfg.max_model_len,
        who=who,
        may_manage=lambda request: admins is None or request.username in admins,
    )
    application = web.assemble(
        app.build(cfg.title, parts),
        fleet,
        metrics,
        routers=[api.router(gateway, fleet, access.keys)],
        middleware=[(Guard, {"access": access}), *([(VoterCookie, {})] if access.mode == "open" else [])],
        may_read_metrics=access.has_key,
        login=access.gradio(),
        account=access.account,
    )
    watcher = Watcher(root, fleet, client, rules, say)
    supervisor = Supervisor(engine, client, fleet, snapshots, metrics.engine_restarted, say)
    async with web.listening(application, cfg.host, cfg.port):
        works = (stop.wait(), supervisor.run(), watcher.run(), _prune_daily(votes))
        ended = [loop.create_task(work) for work in works]
        try:
            first = loop.create_task(watcher.first_pass.wait())
            await asyncio.wait({first, *ended}, timeout=FIRST_PASS_S, return_when=asyncio.FIRST_COMPLETED)
            first.cancel()
            if not any(task.done() for task in ended):
                announce(cfg, time.monotonic() - began)
            await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                say("Stopped.")
                return 0
            for task in ended:
                if task.done():
                    task.result()  # raises what ended it
            return 1
        finally:
            for task in ended:
                task.cancel()
            await asyncio.gather(*ended, return_exceptions=True)
            await asyncio.to_thread(engine.stop)
            with contextlib.suppress(Exception):
                await gateway.close()
            snapshots.clear()


async def _prune_daily(votes: VoteStore) -> None:
    """Forget replies that nobody voted on."""
    while True:
        try:
            await asyncio.to_thread(votes.prune, BALLOT_DAYS)
        except UserError as error:
            say(f"Replies without votes could not be removed: {error}")
        await asyncio.sleep(24 * 3600)


def announce(cfg: ServeConfig, seconds: float) -> None:
    """The address, alone on standard output for programs; the rest for people."""
    host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    sys.stdout.write(f"http://{host}:{cfg.port}\n")
    sys.stdout.flush()
    say(f"Ready after {seconds:.0f} s: open the address above in a browser; Ctrl-C stops it.")


@contextmanager
def alone(port: int) -> Iterator[None]:
    """Hold what this server writes in `RUNS` for itself, until the block ends or the process does.

    Raises:
        UserError: another server in this folder has it: it would lose its engine's copies of adapters.
    """
    path = RUNS / f"server-{port}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"Another `python -m serve` with port={port} runs in this folder, or is starting. "
                f"Stop that one, or choose another port (port={port + 1})."
            ) from error
        yield


def _template_file(rules: Rules, port: int) -> Path | None:
    """An adapter's chat template where the engine finds it for as long as it runs; None leaves the base's own."""
    if rules.template_of == "the base" or rules.template is None:
        return None
    path = RUNS / f"chat_template-{port}.jinja"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rules.template, encoding="utf-8")
    except OSError as error:
        raise UserError(f"The chat template cannot be written to {path}: {error.strerror or error}.") from error
    return path.resolve()


def check_port(host: str, port: int) -> None:
    """Raise UserError unless `port` can be listened on. Done first: the engine takes a minute to start."""
    if not 0 < port < 65536:
        raise UserError(f"port={port} is not a port: use a number from 1 to 65535.")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
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
    model_is_no_group()
    launch(serve, "serve", ServeConfig)
