"""Where and how a run computes: its device and processes, threads, number format, and tokens of a pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lit_ft.config import Config
from lit_ft.distributed.processes import Ranks, agree
from lit_ft.models.precision import Precision, choose_precision
from lit_ft.resources.allocator import keep_freed_memory
from lit_ft.resources.machine import Threads, choose_threads, tokens_per_pass
from lit_ft.wiring.checks import device_number


@dataclass(frozen=True)
class Place:
    """`max_tokens` are those of a pass at most; `ranks` say which of the processes this is."""

    device: torch.device
    ranks: Ranks
    threads: Threads
    precision: Precision
    max_tokens: int


def device_of(accelerator: str) -> torch.device:
    """The kind of device that `trainer.accelerator` means on this machine."""
    usable = torch.cuda.is_available() and accelerator in {"auto", "gpu", "cuda"}
    return torch.device("cuda" if usable else "cpu")


def pass_tokens(cfg: Config, device: torch.device) -> int:
    """Tokens of a pass at most, on `device`."""
    return cfg.data.max_tokens or tokens_per_pass(device)


def take_place(cfg: Config, device: torch.device, ranks: Ranks) -> Place:
    """Choose, measuring where that decides, and set it up for this process: its GPU or its threads and memory."""
    if device.type == "cuda":
        device = torch.device("cuda", device_number(cfg.trainer.devices, ranks.local_rank))
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    threads = choose_threads(cfg.trainer.threads, device, ranks.local_size)
    torch.set_num_threads(threads.count)
    precision = agree(lambda: choose_precision(cfg.trainer.precision, device))
    return Place(device, ranks, threads, precision, pass_tokens(cfg, device))
