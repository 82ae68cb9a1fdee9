"""The memory that a run is expected to take: its preview's estimate, made from what the run has at hand already."""

from __future__ import annotations

import contextlib
import io

import torch

from lit_ft.adapter import Adapter
from lit_ft.config import Config
from lit_ft.data.datamodule import Prepared
from lit_ft.data.packing import Layout
from lit_ft.models.kinds import AdapterKind
from lit_ft.models.score import use_packed_attention
from lit_ft.previewing.step import Step
from lit_ft.previewing.weightless import weightless
from lit_ft.resources.estimate import Setting
from lit_ft.wiring.place import Place


def expected_bytes(
    cfg: Config,
    kind: AdapterKind,
    start: Adapter | None,
    place: Place,
    data: Prepared,
    val: Prepared | None,
    *,
    layout: Layout,
    pad_id: int,
    resident: int | None,
) -> int | None:
    """Bytes at the run's fullest moment, in the terms of `lit_ft.resources.memory.peak_memory`; None if nobody can say.

    Args:
        cfg, start, place, data, val, layout, pad_id: of the run.
        kind: made anew, since it will be told to begin.
        resident: main memory of this process before it loaded a model, its rows and tokenizer among it. It counts on a
            CPU, where the peak is that of all that is resident.
    """
    state = torch.get_rng_state()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what a model says of its settings it has said already
            model = weightless(cfg, kind, start, place.precision)
            if layout != "padded":
                use_packed_attention(model)
            step = Step(cfg, kind, model, data, val, layout=layout, pad_id=pad_id, processes=place.ranks.size)
            here = Setting(place.device.type, place.precision.mixed, cfg.model.gradient_checkpointing)
            beside = step.main_memory(here) | {"rows": 0, "tokenizer": 0}  # they are resident
            own = step.rehearsal(here).estimate(step.shards, offloaded=cfg.strategy.cpu_offload, **beside).sum
    except Exception:  # a model's code may ask what is in a tensor; a run goes on without an estimate
        return None
    finally:
        torch.set_rng_state(state)
    if place.device.type != "cpu":
        return own
    return None if resident is None else own + resident
