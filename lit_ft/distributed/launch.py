"""Several devices: the command starts itself once per device under torchrun's own agent, and speaks for all of them.

Lightning's launcher would start the others only when training begins, after the first process has tokenized and loaded
on its own; would repeat a whole sweep in each of them; and would leave them running were the first one killed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_ft.adapter import Adapter, read
from lit_ft.distributed.launched import LOST_ANOTHER, NOTE, OURS, how_to_go_on
from lit_ft.progress import say
from lit_ft.sweep import RESULT, remove_if_unused

# Seconds between the request to stop and the end by force: time to finish a step and write a checkpoint.
_GRACE = 50
# Exit codes of runs that were asked to stop.
_ASKED = frozenset({128 + signal.SIGINT, 128 + signal.SIGTERM})


def run_processes(count: int, command: Sequence[str], logs: Path, result: Path) -> None:
    """Run `command` in `count` processes on this machine until all have ended well.

    The first one's output goes where this process's goes, the others' into files below `logs`. If one fails the others
    are stopped; a signal to this process goes to all of them. `result` is what is written last: who fails when it is
    there has failed to end, no more.

    Raises:
        SystemExit: a process failed, with its exit code (128 + N for signal N), or this one was asked to stop.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # its warnings tell what is told below
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        run_id="processes",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(str(logs), redirects=dict.fromkeys(range(1, count), Std.ALL)),
        shutdown_timeout=_GRACE,
        signals_to_handle="SIGTERM,SIGINT",
    )
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    os.environ.update({OURS: str(os.getpid()), NOTE: str((logs / "last").resolve())})
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        if result.exists():
            return
        raise SystemExit(_explain(error, count, logs)) from None
    except SignalException as stopped:
        raise SystemExit(128 + int(stopped.sigval)) from None
    finally:
        del os.environ[OURS], os.environ[NOTE]
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def train_in_processes(processes: int, runs: Path) -> Adapter:
    """Repeat this command, of a single run even inside a sweep, once per device; returns what they published.

    Args:
        processes: how many.
        runs: the folder in which `resume=last` looks for runs.

    Raises:
        SystemExit: a process failed, or the run was interrupted.
    """
    from hydra.core.hydra_config import HydraConfig

    run = Path(HydraConfig.get().runtime.output_dir)
    # Not in the run's folder, which a process removes that ends before it began: its last words would go with it.
    logs = Path(tempfile.mkdtemp(prefix="lit_ft-"))
    try:
        (run / RESULT).unlink(missing_ok=True)  # of an earlier run in the same folder
        run_processes(processes, _same_command(run), logs, run / RESULT)
        return read(Path(json.loads((run / RESULT).read_text(encoding="utf-8"))["path"]))
    except SystemExit as ended:
        note = logs / "last"
        last = note.read_text(encoding="utf-8") if note.exists() else ""
        if last and Path(last).exists():
            if ended.code in _ASKED:
                say("Stopped before the step was finished; nothing was published.")
            say(how_to_go_on(Path(last), runs))
        raise
    finally:
        shutil.rmtree(logs, ignore_errors=True)
        remove_if_unused(run)


def _same_command(run: Path) -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    settings = HydraConfig.get()
    of_sweeps = ("hydra.mode", "hydra.sweep", "hydra/sweeper", "hydra/launcher", "hydra.launcher", "hydra.run.dir")
    ours = [override for override in settings.overrides.hydra if not override.lstrip("+~").startswith(of_sweeps)]
    given = [source.path for source in settings.runtime.config_sources if source.provider == "command-line"]
    # Absolute and quoted: a folder's name may hold what Hydra would read as its own signs.
    place = f"hydra.run.dir='{run.resolve()}'"
    flags = [f"--config-dir={folder}" for folder in given]
    return [sys.executable, "-m", "lit_ft", *flags, *settings.overrides.task, *ours, place]


def _explain(error: Any, count: int, logs: Path) -> int:
    """Say which process failed and why, and return the exit code."""
    failures = error.failures.items()
    # Those that were stopped by the agent, or lost another one, are not the cause.
    consequences = {LOST_ANOTHER, -int(signal.SIGTERM), 128 + int(signal.SIGTERM)}
    causes = [(rank, f) for rank, f in failures if f.exitcode not in consequences] or list(failures)
    # Killed before aborted (NCCL's watchdog aborts who lost another one), and that before failed.
    rank, cause = min(causes, key=lambda item: (item[1].exitcode > 0, item[1].exitcode == -signal.SIGABRT, item[0]))
    if cause.exitcode < 0:
        name = signal.Signals(-cause.exitcode).name
        why = " (the system does so when memory runs out)" if -cause.exitcode == signal.SIGKILL else ""
        say(f"Process {rank + 1} of {count} was ended by {name}{why}; the others were stopped.")
        return 128 - cause.exitcode
    if rank > 0:  # the first one's words were seen
        if said := _last_words(logs, rank):
            say(f"Process {rank + 1} of {count} failed, and the others were stopped. Its last words:\n{said}")
        else:
            say(f"Process {rank + 1} of {count} failed with exit code {cause.exitcode}; the others were stopped.")
    return int(cause.exitcode)


def _last_words(logs: Path, rank: int, lines: int = 25) -> str:
    for path in sorted(logs.glob(f"*/attempt_*/{rank}/stderr.log")):
        words = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join(f"  | {line}" for line in words[-lines:])
    return ""
