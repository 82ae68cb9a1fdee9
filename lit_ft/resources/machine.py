"""What this machine can do, measured: the rate of a matrix product, and how many threads train fastest."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_ft.errors import UserError

Shape = tuple[int, int, int]

# Products of a small model's layers on a CPU; on a GPU these would measure how fast kernels start.
_CPU_SHAPE: Shape = (256, 576, 1536)
_CUDA_SHAPE: Shape = (8192, 8192, 8192)

# A CPU quota is handed out anew every 100 ms: a shorter measurement could be over before the quota ran out.
_SECONDS_PER_COUNT = 0.11
_CLOSE = 0.25


def matrix_rate(device: torch.device, dtype: torch.dtype, shape: Shape | None = None, seconds: float = 0.05) -> float:
    """FLOP/s of one matrix product, the best of the tries that fit into `seconds` (at least one, after a first unseen).

    Args:
        device, dtype: where, and in which format.
        shape: (m, k, n) of the product (m, k) @ (k, n), which is 2·m·k·n operations; None: (256, 576, 1536) on a CPU,
            8192 each on a GPU.
        seconds: how long to try.
    """
    m, k, n = shape or (_CUDA_SHAPE if device.type == "cuda" else _CPU_SHAPE)
    # A generator of its own: measuring must not change what a seed gives. And no constants: a GPU multiplies those
    # with less power, hence faster, than anything real.
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(m, k, dtype=dtype, device=device, generator=generator)
    b = torch.randn(k, n, dtype=dtype, device=device, generator=generator)

    def once() -> float:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.no_grad():
        once()
        stop = time.perf_counter() + seconds
        best = once()
        while time.perf_counter() < stop:
            best = min(best, once())
    return 2.0 * m * k * n / best


def tokens_per_pass(device: torch.device) -> int:
    """Tokens of one forward pass that use `device` well.

    On a CPU activations of about a thousand tokens stay in its cache from one operation to the next; a GPU wants more
    at once.
    """
    return 16_384 if device.type == "cuda" else 1024


@dataclass(frozen=True)
class Threads:
    """How many threads torch should compute with, and a few words on why, for a run's first lines."""

    count: int
    why: str


def choose_threads(wanted: int | None, device: torch.device, processes: int = 1) -> Threads:
    """As many threads as wanted, as the environment says, or as train fastest here.

    Measured are torch's own number, the CPUs this process may run on, half of them (two hardware threads share one
    core's arithmetic), and the container's CPU quota; together in about half a second at most. Torch's own number is
    kept unless another is more than a quarter faster: what others do on the machine for a moment should not decide.
    Nothing is set: give `count` to `torch.set_num_threads`.

    Args:
        wanted: the setting trainer.threads; None measures.
        device: what the model trains on; on a GPU nothing is measured.
        processes: of this run on this machine; several divide its CPUs, and nothing is measured.

    Raises:
        UserError: fewer than one thread is wanted.
    """
    own = torch.get_num_threads()
    if wanted is not None:
        if wanted < 1:
            raise UserError(f"trainer.threads={wanted} must be at least 1; null chooses by measuring.")
        return Threads(wanted, "as asked")
    if os.environ.get("OMP_NUM_THREADS"):
        return Threads(own, "OMP_NUM_THREADS")
    if device.type == "cuda":
        return Threads(own, "the GPU computes")
    if processes > 1:
        cpus = min(_usable_cpus(), cpu_quota() or math.inf)
        return Threads(max(1, int(cpus // processes)), f"{processes} processes share {cpus:g} CPUs")
    counts = _candidates(own, _usable_cpus(), cpu_quota())
    if len(counts) == 1:
        return Threads(own, "the only choice")
    rates = {count: _training_rate(count) for count in counts}
    best = max(counts, key=lambda count: rates[count])
    chosen = best if rates[best] > (1 + _CLOSE) * rates[own] else own
    others = sorted((count for count in counts if count != chosen), key=lambda count: -rates[count])
    slower = ", ".join(f"{rates[count] / 1e9:.0f} with {count}" for count in others)
    return Threads(chosen, f"measured {rates[chosen] / 1e9:.0f} GFLOP/s with {chosen}, {slower}")


def _candidates(own: int, usable: int, quota: float | None) -> list[int]:
    """Thread counts worth measuring, torch's own first, each once."""
    counts = [own, usable, usable // 2]
    if quota is not None:
        counts.append(math.ceil(quota))
    return list(dict.fromkeys(count for count in counts if count >= 1))


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs' worth of time that the control groups of this process allow it, or None where nothing limits it.

    Reads `cpu.max` (version 2) or `cpu.cfs_quota_us` (version 1) of the group and of all groups above it; the least
    holds (https://docs.kernel.org/admin-guide/cgroup-v2.html, "cpu.max").

    Args:
        root: where control groups are mounted.
        membership: the file that says which groups the process is in (`N:controllers:/path` a line).
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "cpu" if controllers else root
        group = mount / path.lstrip("/")
        # In a container the path may be the host's, which is not there; its top folder then is the container's own.
        for folder in (group, *group.parents):
            if (quota := _quota_of(folder)) is not None:
                quotas.append(quota)
            if folder == mount:
                break
    return min(quotas, default=None)


def _quota_of(folder: Path) -> float | None:
    """CPUs that one control group allows: quota over period, both in microseconds."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
        return int(quota) / int(period) if quota not in {"max", "-1"} else None
    except (OSError, ValueError):
        return None


def _training_rate(threads: int, seconds: float = _SECONDS_PER_COUNT) -> float:
    """FLOP/s of a small model's layer products, forward and backward, with an elementwise operation between them.

    A mean and not the best: under a quota, threads beyond it run well until the quota is spent, then all of them wait.
    """
    former = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 576, generator=generator)
    weight = torch.randn(576, 1536, generator=generator)
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            _layer(x, weight)  # starts the threads
            start, rounds = time.perf_counter(), 0
            while (gone := time.perf_counter() - start) < seconds or not rounds:
                _layer(x, weight)
                rounds += 1
    finally:
        torch.set_num_threads(former)
    return rounds * 2 * 2.0 * 512 * 576 * 1536 / gone  # two products of 2·m·k·n each


def _layer(x: Tensor, weight: Tensor) -> Tensor:
    """Into a layer (512, 576) → (512, 1536), its activation, and back as the gradient of its input goes."""
    return F.silu(x @ weight) @ weight.T
