"""Several command lines, one after the other, in several processes that train together: imports are paid for once.

    outcomes = run_together(folder, [["+experiment=sft", "trainer.devices=2"], …])

starts `python -m tests.processes` once per process, as torchrun would; the first process's outcomes are returned.
Words that are not the command's: `stop_in_step=N`, the last process gets a SIGTERM in that step; `cache=NAME`, a cache
of its own; `as_on_cuda`, the group has two backends, by which Lightning tells a CPU from a GPU.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import Outcome

ROOT = Path(__file__).parents[1]


def run_together(folder: Path, commands: list[list[str]], processes: int = 2, timeout: int = 300) -> list[Outcome]:
    """Run every command in all processes, in `folder`; returns what the first process printed and ended with."""
    (folder / "commands.json").write_text(json.dumps(commands))
    ports = free_ports(len(commands))
    started = []
    for rank in range(processes):
        env = {
            **os.environ,
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
            "LIT_FT_CACHE": os.environ.get("LIT_FT_CACHE", str(folder / "cache")),
        }
        words: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, "-m", "tests.processes", json.dumps(ports)]
        started.append(subprocess.Popen(command, cwd=folder, env=env, **words))
    try:
        said = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(said)
    return [Outcome(**one) for one in json.loads((folder / "outcomes.json").read_text())]


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on, at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextlib.contextmanager
def _group(as_on_cuda: bool) -> Iterator[None]:
    """Open the next group with two backends, as a run on GPUs does."""
    import torch.distributed as dist

    init = dist.init_process_group

    def with_two(backend: str, **options: Any) -> None:
        init("cpu:gloo,cuda:gloo" if as_on_cuda else backend, **options)

    dist.init_process_group = with_two
    try:
        yield
    finally:
        dist.init_process_group = init


@contextlib.contextmanager
def _stopping(step: int | None) -> Iterator[None]:
    """Send this process a SIGTERM in the middle of `step`, if it is the last of the run."""
    from lit_ft.distributed.processes import size
    from lit_ft.modules.base import FineTuneModule

    train_step = FineTuneModule.training_step

    def training_step(self: Any, window: Any, index: int) -> None:
        if self.global_step + 1 == step and int(os.environ["LOCAL_RANK"]) == size() - 1:
            signal.raise_signal(signal.SIGTERM)
        train_step(self, window, index)

    FineTuneModule.training_step = training_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        FineTuneModule.training_step = train_step  # type: ignore[method-assign]


def main() -> None:
    """One of the processes."""
    from hydra.core.global_hydra import GlobalHydra

    from lit_ft import cli

    ports = json.loads(sys.argv[1])
    outcomes = []
    before = dict(os.environ)
    for port, command in zip(ports, json.loads(Path("commands.json").read_text()), strict=True):
        os.environ.clear()
        os.environ.update(before, MASTER_PORT=str(port))
        GlobalHydra.instance().clear()
        sys.argv = ["lit_ft", *[word for word in command if not word.startswith(("stop_in_step=", "cache=", "as_on"))]]
        for word in command:
            if word.startswith("cache="):
                os.environ["LIT_FT_CACHE"] = str(Path(word.removeprefix("cache=")).resolve())
        stop = next((int(word.split("=")[1]) for word in command if word.startswith("stop_in_step=")), None)
        out, err = io.StringIO(), io.StringIO()
        code: Any = 1
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):  # noqa: SIM117
                with _stopping(stop), _group("as_on_cuda" in command):
                    cli.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except Exception as error:
            err.write(f"{type(error).__name__}: {error}")
        outcomes.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
        if code:  # the others may wait for this one
            sys.stderr.write(err.getvalue())
    if os.environ["LOCAL_RANK"] == "0":
        Path("outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
