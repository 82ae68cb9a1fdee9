"""Which number format the weights and the arithmetic get, chosen by measuring this machine."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from lit_ft.errors import UserError
from lit_ft.resources.machine import matrix_rate

PRECISIONS = ("auto", "bf16-mixed", "32-true")


@dataclass(frozen=True)
class Precision:
    """`trainer` is Lightning's name, `weights` the dtype of frozen weights, `why` a few words for a run's first lines.

    Trained weights are float32 always: never `bf16-true`, which would cast the adapters down.
    """

    trainer: Literal["bf16-mixed", "32-true"]
    weights: torch.dtype
    why: str

    @property
    def mixed(self) -> bool:
        """Whether the arithmetic is in another format than the trained weights."""
        return self.trainer == "bf16-mixed"

    @property
    def autocast(self) -> torch.dtype | None:
        """The format of mixed arithmetic, or None."""
        return torch.bfloat16 if self.mixed else None


def check_precision(wanted: str) -> None:
    """Raise UserError for a precision that is not offered."""
    if wanted in PRECISIONS:
        return
    why = "it would round the trained weights themselves" if wanted.endswith("-true") else "it is not supported"
    nearest = "bf16-mixed" if "16" in wanted else "auto"
    raise UserError(
        f"trainer.precision={wanted}: {why}. Use trainer.precision={nearest} (there are {', '.join(PRECISIONS)})."
    )


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """`bf16-mixed` or `32-true` as wanted, or for `auto` bf16 where this device multiplies it faster than fp32.

    Raises:
        UserError: any other precision; `bf16-true` and `16-true` would cast the trained weights down.
    """
    check_precision(wanted)
    if wanted == "32-true":
        return Precision("32-true", torch.float32, "as asked")
    if wanted == "bf16-mixed":
        return Precision("bf16-mixed", torch.bfloat16, "as asked")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16-mixed", torch.bfloat16, "the GPU computes in bf16")
        return Precision("32-true", torch.float32, "the GPU has no bf16")
    fp32, bf16 = _rates(device, torch.get_num_threads())
    measured = f"measured {bf16:.0f} GFLOP/s in bf16, {fp32:.0f} in fp32"
    # Mixed precision adds casts; it has to be clearly faster to pay.
    if bf16 > 1.5 * fp32:
        return Precision("bf16-mixed", torch.bfloat16, measured)
    return Precision("32-true", torch.float32, measured)


@functools.cache
def _rates(device: torch.device, threads: int) -> tuple[float, float]:
    """GFLOP/s in fp32 and in bf16 with so many threads, measured once per process: the runs of a sweep choose alike."""
    return matrix_rate(device, torch.float32) / 1e9, matrix_rate(device, torch.bfloat16) / 1e9
