"""A process and the one that launched it: they end together, and one leaves word for the other of how to go on."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path

from lit_ft.distributed.processes import rank

# Set in the processes that `lit_ft.distributed.launch` starts: by whom.
OURS = "LIT_FT_LAUNCHED"
# A file in which the first of them leaves the place of its last checkpoint, until it has said itself how to go on.
NOTE = "LIT_FT_LAST"
# What a process ends with that lost another one: not the cause, which the agent then finds elsewhere. EX_TEMPFAIL.
LOST_ANOTHER = 75


def launched_by_us() -> bool:
    """Whether `run_processes` started this process."""
    return OURS in os.environ


def end_with_launcher() -> None:
    """Have this process asked to stop (SIGTERM) when the one that launched it is gone, whatever ended that one."""
    if not launched_by_us() or sys.platform != "linux":
        return
    _signal_with_launcher(signal.SIGTERM)
    launcher = int(os.environ[OURS])
    logs = Path(os.environ[NOTE]).parent

    def tidy() -> None:  # what the launcher would have removed
        if not rank() and os.getppid() != launcher:
            shutil.rmtree(logs, ignore_errors=True)

    atexit.register(tidy)
    if os.getppid() != launcher:  # it ended before this was set
        os.kill(os.getpid(), signal.SIGTERM)


def _signal_with_launcher(signum: int) -> None:
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(signum))


def ending() -> None:
    """This process was asked to stop: that its launcher ends, too, is no further request.

    Linux would send one for each thread of the launcher that another one outlives.
    """
    if launched_by_us() and sys.platform == "linux":
        _signal_with_launcher(0)


def tell_launcher(last: Path | None) -> None:
    """Leave word of where the run's last checkpoint lies, for whoever has to say how to go on; None: it is said."""
    if launched_by_us() and not rank():
        with contextlib.suppress(OSError):  # the disk is full
            Path(os.environ[NOTE]).write_text(str(last or ""), encoding="utf-8")


def how_to_go_on(last: Path, runs: Path) -> str:
    """What to tell somebody whose run left the checkpoint `last`; `runs` is where `resume=last` looks."""
    shorter = " (or resume=last)" if runs.resolve() in last.resolve().parents[2:3] else ""
    return f"Go on with the same command and resume={last}{shorter}."
