"""Real faults of real processes: kill -9, signals, a full disk. What is left is whole, and a resume from it is exact.

One run of two processes is ended five times, each time otherwise, and gone on with under another strategy; one of a
single process is killed and then meets a full disk.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.lit_ft.distributed.test_strategies import write_rows
from tests.processes import ROOT, run_together

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]

STEPS = 100
COMMON = (
    "+experiment=sft",
    "logger=none",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.validate_first=false",
    "trainer.save_every_n_steps=1",
    f"trainer.max_steps={STEPS}",
    "data.path=rows.jsonl",
    "data.batch_size=4",
)
# Absolute, of the adapter: two processes sum a window's gradients in another order than one.
TOLERANCE = 1e-5
# Seconds in which the others must have ended once one is killed.
PROMPT = 60
# Enough for two processes to begin on a machine that does other things, too.
PATIENCE = 240


@dataclass
class Command:
    """A run in `folder`, started by the command line, and what became of it."""

    folder: Path
    process: subprocess.Popen[bytes]
    log: Path
    workers: dict[int, int] = field(default_factory=dict)
    code: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, folder: Path, *args: str) -> Command:
        log = folder / f"{time.monotonic_ns()}.txt"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LIT_FT_CACHE": str(folder / "cache")}
        env["TMPDIR"] = str(folder / "tmp")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "lit_ft", *COMMON, *args],
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # a terminal's Ctrl-C goes to a whole group
            )
        return cls(folder, process, log)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def until(self, runs: Path, step: int) -> int:
        """Wait for the checkpoint of `step` in the newest run of `runs`; returns the step it was."""
        deadline = time.monotonic() + PATIENCE
        while (now := step_of(runs)) < step:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.005)
        self.workers = _children(self.process.pid)
        return now

    def wait(self) -> None:
        """Until the command and every process it started are gone."""
        begun = time.monotonic()
        self.code = self.process.wait(PATIENCE)
        while left := [pid for pid in self.workers.values() if _alive(pid)]:
            assert time.monotonic() - begun < PROMPT, f"{left} still run: {self.said}"
            time.sleep(0.02)
        self.seconds = time.monotonic() - begun

    def end(self) -> None:
        for pid in (self.process.pid, *self.workers.values(), *_children(self.process.pid).values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> dict[int, int]:
    """The processes that `pid` started, by their rank."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            if rank := re.search(rb"\0LOCAL_RANK=(\d+)", Path(f"/proc/{child}/environ").read_bytes()):
                found[int(rank[1])] = int(child)
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def checkpoints(runs: Path) -> Path:
    """The folder in which the run's checkpoints lie: a resumed run goes on in that of the first."""
    folders = list(runs.glob("*/checkpoints"))
    assert len(folders) <= 1, folders
    return folders[0] if folders else runs / "none"


def step_of(runs: Path) -> int:
    """The step of the last checkpoint, 0 if there is none yet. It is whole at any time."""
    last = checkpoints(runs) / "last.ckpt"
    return int(torch.load(last, weights_only=True)["global_step"]) if last.exists() else 0


def adapter(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapters" / name / "v1" / "adapter_model.safetensors")


def apart(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).abs().max()) for key in right)


@pytest.fixture(scope="module")
def draw() -> random.Random:
    seed = int(os.environ.get("FAULTS_SEED", time.time_ns() % 100_000))
    print(f"FAULTS_SEED={seed} repeats the steps at which these runs are ended")
    return random.Random(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("faults")
    write_rows(made)
    (made / "tmp").mkdir()
    return made


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, llama_folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What one process trains that nothing happens to: with dropout, which draws random numbers, and without."""
    dropout = {"plain": 0, "dropout": 0.3}
    commands = [[*COMMON, f"model.id={llama_folder}", f"name={n}", f"peft.dropout={p}"] for n, p in dropout.items()]
    ended = run_together(folder, commands, processes=1)
    assert [one.code for one in ended] == [0, 0], "\n".join(one.err for one in ended)
    return {name: adapter(folder, name) for name in dropout}


# How a run of two processes is ended, and under which strategy it runs then.
ENDS = {
    "kill -9 of the second process": "fsdp",
    "kill -9 of the first process": "ddp",
    "SIGTERM to the command": "ddp",
    "Ctrl-C": "fsdp",
    "kill -9 of the command": "ddp",
}


@dataclass
class Ended:
    """A command that was ended: at which step it was last seen, and what its last checkpoint was then."""

    command: Command
    seen: int
    left: int
    files: list[str]


@pytest.fixture(scope="module")
def chain(folder: Path, llama_folder: Path, draw: random.Random) -> dict[str, Ended]:
    """A run that is ended in each of the ways, and gone on with after each."""
    runs, found, begun = folder / "runs" / "chain", {}, 0
    for how, strategy in ENDS.items():
        settings = [f"model.id={llama_folder}", "name=chain", "trainer.devices=2", f"strategy={strategy}"]
        command = Command.start(folder, *settings, *(["resume=last"] if begun else []))
        try:
            seen = command.until(runs, begun + draw.randint(1, 3))
            time.sleep(draw.uniform(0, 0.2))  # somewhere in a step, or while it is written
            assert set(command.workers) == {0, 1}, command.said
            if how.startswith("kill -9"):
                victims = {"second process": command.workers[1], "first process": command.workers[0]}
                os.kill(victims.get(how.removeprefix("kill -9 of the "), command.process.pid), signal.SIGKILL)
            elif how == "Ctrl-C":
                os.killpg(command.process.pid, signal.SIGINT)
            else:
                command.process.terminate()
            command.wait()
        finally:
            command.end()
        begun = step_of(runs)
        found[how] = Ended(command, seen, begun, sorted(path.name for path in checkpoints(runs).iterdir()))
    return found


@pytest.mark.parametrize("how", ENDS)
def test_the_others_end_soon_and_say_how_to_go_on(chain: dict[str, Ended], how: str, folder: Path) -> None:
    ended = chain[how]
    said, command = ended.command.said, ended.command
    codes = {"SIGTERM to the command": 143, "Ctrl-C": 130, "kill -9 of the command": -signal.SIGKILL}
    assert command.code == codes.get(how, 137), said
    assert command.seconds < PROMPT
    assert ended.seen <= ended.left < STEPS
    advice = f"resume={checkpoints(folder / 'runs' / 'chain') / 'last.ckpt'}"
    assert said.count("Go on with the same command and ") == 1 and advice in said, said
    if "process" in how:
        number = 1 if "first" in how else 2
        assert f"Process {number} of 2 was ended by SIGKILL" in said and "the others were stopped" in said
    else:
        assert said.count("Stopped; nothing was published.") == 1
    # A person's words alone: nothing of the agent's log, no process's traceback.
    assert "Traceback" not in said and "elastic" not in said and "Error" not in said, said
    assert not (folder / "adapters" / "chain").exists()


def test_whole_checkpoints_are_all_that_is_left(chain: dict[str, Ended], folder: Path) -> None:
    for how, ended in chain.items():
        # What is killed in the middle of writing leaves a part of a file, which the next run removes.
        hidden = [name for name in ended.files if name.startswith(".")]
        # The one before is kept beside the last; a run ended in its second step has written only one.
        whole = {"last.ckpt", "last-1.ckpt"} if ended.left > 1 else {"last.ckpt"}
        assert whole <= set(ended.files), how
        assert not hidden or "first process" in how, (how, hidden)
    empty = [run for run in (folder / "runs" / "chain").iterdir() if {path.name for path in run.iterdir()} <= {"hydra"}]
    assert not empty and not list((folder / "tmp").iterdir())


def test_a_run_ended_five_times_trains_what_an_uninterrupted_one_does(
    chain: dict[str, Ended], folder: Path, llama_folder: Path, uninterrupted: dict[str, dict[str, torch.Tensor]]
) -> None:
    (run,) = {path.parent for path in (folder / "runs" / "chain").glob("*/checkpoints")}
    commands = {}
    for name, more in {"one": [], "two": ["trainer.devices=2", "strategy=fsdp"]}.items():
        copy = folder / "copies" / name
        shutil.copytree(run, copy)
        commands[name] = [*COMMON, f"model.id={llama_folder}", f"name={name}", f"resume={copy}", *more]
    ended = run_together(folder, [commands["one"]], processes=1) + run_together(folder, [commands["two"]])
    assert [one.code for one in ended] == [0, 0], "\n".join(one.err for one in ended)
    for name in commands:
        assert apart(adapter(folder, name), uninterrupted["plain"]) <= TOLERANCE, name
    nothing = {key: torch.zeros_like(value) for key, value in uninterrupted["plain"].items() if "lora_B" in key}
    assert apart({key: uninterrupted["plain"][key] for key in nothing}, nothing) > 1e-3, "it learned nothing"


class Disk:
    """A folder on a disk that can be filled: a real small one where we may mount it, else a limit on file sizes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
        self.mounted = shutil.which("mount") is not None and not subprocess.run(mount, capture_output=True).returncode
        self._filler = folder / "filler"
        self.reason = "No space left on device" if self.mounted else "File too large"

    def fill(self, pid: int) -> None:
        if not self.mounted:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
            return
        with self._filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self, pid: int) -> None:
        if not self.mounted:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        self._filler.unlink(missing_ok=True)

    def unmount(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture
def disk(folder: Path) -> Iterator[Disk]:
    made = Disk(folder / "disk")
    yield made
    made.unmount()


def test_a_single_process_that_is_killed_and_meets_a_full_disk(
    folder: Path, llama_folder: Path, disk: Disk, draw: random.Random, uninterrupted: dict[str, dict[str, torch.Tensor]]
) -> None:
    settings = [f"model.id={llama_folder}", "name=alone", "peft.dropout=0.3", f"runs={disk.folder}"]
    runs = disk.folder / "alone"
    killed = Command.start(folder, *settings)
    try:
        killed.until(runs, draw.randint(1, 12))
        time.sleep(draw.uniform(0, 0.05))
    finally:
        killed.end()
    killed.wait()
    assert killed.code == -signal.SIGKILL, killed.said

    resumed = Command.start(folder, *settings, "resume=last")
    try:
        resumed.until(runs, step_of(runs) + 2)
        disk.fill(resumed.process.pid)
        deadline = time.monotonic() + PATIENCE
        while resumed.said.count("last.ckpt.\n") < 3 and time.monotonic() < deadline:
            assert resumed.process.poll() is None, resumed.said
            time.sleep(0.005)
        os.kill(resumed.process.pid, signal.SIGSTOP)  # to look at leisure
        kept = sorted(path.name for path in checkpoints(runs).iterdir() if not path.name.startswith("."))
        step = step_of(runs)
        disk.free(resumed.process.pid)
        os.kill(resumed.process.pid, signal.SIGCONT)
        resumed.wait()
    finally:
        resumed.end()
    missed = [int(number) for number in re.findall(r"last\.ckpt of step (\d+) was not written", resumed.said)]
    assert missed == list(range(missed[0], missed[0] + len(missed))) and len(missed) >= 3, resumed.said
    assert disk.reason in resumed.said and "the one before stays: " in resumed.said
    assert kept == ["best.ckpt", "last-1.ckpt", "last.ckpt"]
    assert step == missed[0] - 1, "the one before was not kept"
    # It went on, to the end; and from the kill on exactly as it would have.
    assert resumed.code == 0, resumed.said
    assert [path.name for path in checkpoints(runs).iterdir()] == ["best.ckpt"], "debris"
    assert apart(adapter(folder, "alone"), uninterrupted["dropout"]) == 0


@pytest.mark.parametrize("mistake", ["data.max_length=4096", "strategy=fsdp_tp strategy.tensor_parallel_size=3"])
def test_a_mistake_is_told_once_and_leaves_nothing(folder: Path, llama_folder: Path, mistake: str) -> None:
    """Found by each of the processes, or before they are started."""
    settings = [f"model.id={llama_folder}", "name=mistake", "trainer.devices=2", "strategy=fsdp", *mistake.split()]
    command = Command.start(folder, *settings)
    try:
        command.wait()
    finally:
        command.end()
    assert command.code == 2 and command.said.count("error: ") == 1, command.said
    assert "Traceback" not in command.said and "elastic" not in command.said
    assert not list((folder / "runs").glob("mistake/*")) and not (folder / "adapters" / "mistake").exists()
