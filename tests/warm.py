"""Commands of this project in processes of their own that have imported everything before they begin.

A process of a benchmark spends most of its time on imports when the model is tiny. `Warm` starts one that imports and
then waits; for every command it forks, so that each still has a process, a memory and an end of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Seconds that the process has to end, once it is told to.
_END = 10


class Warm:
    """Runs `python -m MODULE ARGUMENT…` as `subprocess.run` would, sooner."""

    def __init__(self, folder: Path) -> None:
        """Start the process that waits; its socket is in `folder`."""
        self._socket = folder / "warm.sock"
        self._waiting = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(self._socket)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self._waiting.stdout is not None
        assert self._waiting.stdout.readline() == "ready\n"

    def run(
        self,
        command: Sequence[str],
        *,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        capture_output: bool = True,
        text: bool = True,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """What `command` printed and ended with; several threads may ask at once."""
        assert list(command[:2]) == [sys.executable, "-m"] and capture_output and text and not check, command
        asked = {"argv": command[2:], "cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ)}
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._socket))
            connection.sendall(json.dumps(asked).encode() + b"\n")
            with connection.makefile() as answers:
                said = json.loads(answers.readline())
        return subprocess.CompletedProcess(command, said["code"], said["out"], said["err"])

    def stop(self) -> None:
        self._waiting.terminate()
        self._waiting.wait(_END)


def _serve(path: str) -> list[str]:
    """Fork for every command; returns in the processes that are to run one, with its words."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(64)
        server.settimeout(1)
        parent = os.getppid()
        print("ready", flush=True)
        while True:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                if os.getppid() != parent:
                    sys.exit()  # whoever started it was killed
                continue
            if os.fork():
                connection.close()
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass
                continue
            with connection, connection.makefile() as lines:
                asked: dict[str, Any] = json.loads(lines.readline())
                with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
                    child = os.fork()
                    if not child:
                        os.dup2(out.fileno(), 1)
                        os.dup2(err.fileno(), 2)
                        os.environ.clear()
                        os.environ.update(asked["env"])
                        os.chdir(asked["cwd"])
                        return list(asked["argv"])
                    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    texts = []
                    for file in (out, err):
                        file.seek(0)
                        texts.append(file.read())
                connection.sendall(json.dumps({"code": code, "out": texts[0], "err": texts[1]}).encode() + b"\n")
            os._exit(0)


def main() -> None:
    """The process that waits, and in its children the command."""
    import_module("torch._inductor.compile_fx")  # what bitsandbytes brings, and peft it
    for name in ("lightning.pytorch.callbacks", "peft", "trl", "transformers.models.llama.modeling_llama"):
        import_module(name)
    for name in ("cli", "train", "evaluate", "modules", "evaluation.compare", "distributed.strategy"):
        import_module(f"lit_ft.{name}")
    for name in ("adapter_kind", "averaging", "history", "progress_bar"):
        import_module(f"lit_ft.callbacks.{name}")
    for name in ("adapters_run", "rlhf_run"):
        import_module(f"tests.benchmarks.{name}")
    from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model  # noqa: F401 - as they are asked for, late

    sys.argv = _serve(sys.argv[1])
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
