"""The memory that a run is expected to take: its preview's estimate, made from what the run has at hand already."""

from __future__ import annotations

import contextlib
import io

import torch

from lit_ft.adapter import Adapter
from lit_ft.config import Config, Strategy
from lit_ft.data.datamodule import Prepared
from lit_ft.data.packing import Layout
from lit_ft.models.kinds import AdapterKind
from lit_ft.models.precision import Precision
from lit_ft.models.score import use_packed_attention
from lit_ft.preview import Preview, weightless


class _AtHand(Preview):
    """A preview of a run that has read its rows, and chosen its arithmetic and its layout."""

    def __init__(
        self,
        cfg: Config,
        kind: AdapterKind,
        start: Adapter | None,
        precision: Precision,
        data: Prepared,
        val: Prepared | None,
        layout: Layout,
        pad_id: int,
        device: torch.device,
        processes: int,
    ) -> None:
        self.cfg, self.kind, self.start, self.precision = cfg, kind, start, precision
        self.data, self.val, self.layout = data, val, layout
        self.device, self.processes = device, processes
        self.tokenizer = _Padding(pad_id)
        self.tokenizer_bytes = 0
        self.model = weightless(cfg, kind, start, precision)
        if layout != "padded":
            use_packed_attention(self.model)


class _Padding:
    """All that an estimate asks of a tokenizer."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id


def expected_bytes(
    cfg: Config,
    kind: AdapterKind,
    start: Adapter | None,
    precision: Precision,
    data: Prepared,
    val: Prepared | None,
    *,
    layout: Layout,
    pad_id: int,
    device: torch.device,
    processes: int,
    resident: int | None,
) -> int | None:
    """Bytes at the run's fullest moment, in the terms of `lit_ft.memory.peak_memory`; None where nobody can say.

    Args:
        cfg, start, precision, data, val, layout, pad_id, device: of the run.
        kind: made anew, since it will be told to begin.
        processes: that share the work.
        resident: main memory of this process before it loaded a model, its rows and tokenizer among it. It counts on a
            CPU, where the peak is that of all that is resident.
    """
    from lit_ft.estimate import Setting

    state = torch.get_rng_state()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what a model says of its settings it has said already
            run = _AtHand(cfg, kind, start, precision, data, val, layout, pad_id, device, processes)
            here = Setting(device.type, precision.trainer == "bf16-mixed", cfg.model.gradient_checkpointing)
            shards = processes if cfg.strategy.kind in (Strategy.fsdp, Strategy.fsdp_tp) else 1
            beside = run.main_memory(here) | {"rows": 0, "tokenizer": 0}  # they are resident
            own = run.rehearsal(here).estimate(shards, offloaded=cfg.strategy.cpu_offload, **beside).sum
    except Exception:  # a model's code may ask what is in a tensor; a run goes on without an estimate
        return None
    finally:
        torch.set_rng_state(state)
    if device.type != "cpu":
        return own
    return None if resident is None else own + resident
