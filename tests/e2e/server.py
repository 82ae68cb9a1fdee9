"""`python -m serve` with a real vLLM, as a user starts it; and training beside it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_ft import adapter


@dataclass
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def children(self) -> list[int]:
        """Every process below the server's, its own included."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except OSError:  # it ended meanwhile
                    continue
        found = [self.process.pid]
        for pid in found:
            found.extend(child for child, parent in parents.items() if parent == pid)
        return found

    def named(self, name: str) -> int:
        """The process below the server's that calls itself so."""
        for pid in self.children():
            with contextlib.suppress(OSError):
                if name in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "):
                    return pid
        raise LookupError(name)


@contextlib.contextmanager
def served(folder: Path, *settings: str) -> Iterator[Server]:
    """Serve the adapters in `folder`, from when the address is printed until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "serve.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", f"port={port}", *settings],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # printed when the page is there
        assert line == f"http://127.0.0.1:{port}\n", log.read_text()
        yield Server(line.strip(), process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def trained(folder: Path, *args: str) -> adapter.Adapter:
    """What `python -m lit_ft` publishes when it is run in `folder`."""
    # All cores: this is real training, unlike the tiny models of the other tests.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "lit_ft", *args], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return adapter.read(folder / done.stdout.strip())
