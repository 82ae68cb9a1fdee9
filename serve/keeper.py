"""Runs a command so that none of it outlives the program that asked: `python keeper.py PARENT_PID COMMAND…`.

vLLM's engine and worker processes live on when their API server is killed hard. So this small process leads their
process group, watches its own parent, and at the end kills the whole group. Standard library only: `serve.engine`
starts this file by its path.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

GRACE_S = 8.0
"""How long the command has after SIGTERM to end by itself and remove its shared memory."""

POLL_S = 0.2


def main(parent: int, command: list[str]) -> None:
    """Run the command until it ends, SIGTERM comes or the parent is gone; then kill whatever is left of the group."""
    asked_to_stop = False

    def stop(*_: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    # A process whose parent is gone, even by kill -9, gets another parent. (Linux's own signal for this follows the
    # thread that started the process, not the program, and would reach only one process of the group.)
    while child.poll() is None and not asked_to_stop and os.getppid() == parent:
        time.sleep(POLL_S)
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    sys.stderr.write(f"The engine's process ended with code {child.poll()}.\n")
    sys.stderr.flush()
    os.killpg(os.getpgrp(), signal.SIGKILL)  # this process too


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
