"""The preview's word on memory: what this run takes by its parts, whether it fits, and what it would take elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from lit_ft.config import Algorithm
from lit_ft.errors import UserError
from lit_ft.models.precision import Precision
from lit_ft.previewing.page import Line, Section, columns, plain
from lit_ft.previewing.step import Step
from lit_ft.resources.estimate import Estimate, Rehearsal, Setting
from lit_ft.resources.memory import machine_memory, resident_bytes, size_in_words
from lit_ft.wiring.checks import WHOLE

# Sizes in which GPUs are sold, in GiB.
_GPUS = (8, 16, 24, 48, 80)
_PART_NAMES = {
    "weights": "weights",
    "adapters": "adapters",
    "copies": "copies of weights in another format",
    "gathered": "weights gathered from other devices",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "allocator of ranks": "AdaLoRA's averages",
    "activations": "activations",
    "holes": "holes between them that the allocator leaves",
    "log-probabilities": "log-probabilities, in chunks",
    "backward pass": "what an operation makes and gives back",
    "keys and values": "keys and values of completions",
    "reference": "reference",
    "rows": "rows, tokenized",
    "tokenizer": "tokenizer",
}

# Device, mixed precision, gradient checkpointing.
_TABLE = (
    ("cpu", False, False),
    ("cpu", False, True),
    ("cpu", True, False),
    ("cpu", True, True),
    ("cuda", True, False),
    ("cuda", True, True),
)


def memory_sections(step: Step, device: torch.device, precision: Precision, beside: Sequence[str]) -> Iterator[Section]:
    """This run's memory on `device`, with what else there is to say of it, and that of its like on other devices."""
    cfg = step.cfg
    here = Setting(device.type, precision.mixed, cfg.model.gradient_checkpointing)
    wanted = [Setting(*chosen) for chosen in _TABLE]
    try:
        rehearsals = {setting: step.rehearsal(setting) for setting in dict.fromkeys([here, *wanted])}
    except UserError:
        raise
    except Exception as error:  # a model's code may ask what is in a tensor; its run will do without the estimate
        first = (str(error).splitlines() or [""])[0]
        yield Section(
            "Memory", plain(f"not estimated: this model cannot be rehearsed ({type(error).__name__}: {first})")
        )
        return
    own = rehearsals[here].estimate(step.shards, offloaded=cfg.strategy.cpu_offload, **step.main_memory(here))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = [*_parts(own, dpo=cfg.algorithm.kind is Algorithm.dpo), *_fits(own, device, step.processes)]
    yield Section(f"Memory of this run on the {name}, estimated", [*lines, *plain(*beside)])
    yield Section("Memory on other devices, per device", _table(step, rehearsals, wanted))


def _parts(own: Estimate, *, dpo: bool) -> list[Line]:
    rows = [("part", "")]
    for part, size in own.parts.items():
        if part == "reference":
            note = " (log-probabilities, made once before; no second model)"
            rows += [(_PART_NAMES[part] + note, size_in_words(size))] if dpo else []
        elif size or part in ("weights", "gradients", "optimizer", "activations"):
            rows.append((_PART_NAMES[part], size_in_words(size)))
    lines = columns([*rows, ("in all", size_in_words(own.sum))])
    return lines + plain(f"at the fullest moment of a step: {own.moment}")


def _fits(own: Estimate, device: torch.device, processes: int) -> Iterator[Line]:
    """Whether it fits this machine, whose main memory `processes` share."""
    if own.device == "cpu":
        where, has, libraries = "main memory", machine_memory(), resident_bytes()
        needs = processes * (own.sum + (libraries or 0))
        if libraries is not None:
            yield from plain(f"Python and its libraries take {size_in_words(libraries)} beside it.")
    else:
        where, has, needs = "GPU", torch.cuda.get_device_properties(device).total_memory, own.wanted
        yield from plain(f"with what CUDA takes and some to spare: {size_in_words(needs)}")
    if has is not None:
        no = "IT DOES NOT FIT: see model.gradient_checkpointing and data.max_tokens"
        yield from plain(f"This machine's {where} has {size_in_words(has)}: {'it fits' if needs <= has else no}.")


def _table(step: Step, rehearsals: Mapping[Setting, Rehearsal], wanted: Sequence[Setting]) -> list[Line]:
    header = ("", "tokens", "1 device", "2, fsdp", "4, fsdp", "fits GPUs of")
    rows: list[Sequence[str]] = [header]
    sharded = step.kind.sharded and step.cfg.algorithm.kind not in WHOLE  # whether FSDP would take this run
    for setting in wanted:
        cells = []
        for shards in (1, 2, 4):
            kept = rehearsals[setting].estimate(shards, **step.main_memory(setting))
            cells.append(size_in_words(kept.sum) if shards == 1 or sharded else "-")
        alone = rehearsals[setting].estimate(1)
        gpus = [size for size in _GPUS if alone.fits(size * 2**30)]
        fits = "-" if setting.device == "cpu" else " ".join(map(str, gpus)) + " GB" if gpus else "none"
        device = "GPU" if setting.device == "cuda" else "CPU"
        how = f"{device} {'bf16-mixed' if setting.mixed else '32-true'}"
        how += ", gradient checkpointing" if setting.checkpointing else ""
        rows.append((how, f"{step.passes(setting.device)[0].input_ids.numel():,}", *cells, fits))
    return columns(rows)
