"""What the fine-tune took: parameters, time, tokens, memory, bytes and energy, as they were measured elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from lit_ft.errors import UserError
from lit_ft.evaluation.section import Figure, Section
from lit_ft.progress import clock

MIB = 1 << 20


@dataclass(frozen=True)
class Cost:
    """Numbers of a run; None for what was not measured.

    Attributes:
        trainable, parameters: numbers of weights, trained and altogether.
        seconds: of training.
        tokens: that training has seen, each as often as it was seen.
        peak_bytes, estimated_bytes: of memory at most, as measured and as estimated before.
        adapter_bytes: of the published weights.
        joules: that the machine's meters counted while training.
        meters, unmetered: which meters those were, and which of the devices that the run used have none that can be
            read; both empty where nothing is known.

    Raises:
        UserError: a number is negative or not finite.
    """

    trainable: int | None = None
    parameters: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    peak_bytes: int | None = None
    estimated_bytes: int | None = None
    adapter_bytes: int | None = None
    joules: float | None = None
    meters: tuple[str, ...] = ()
    unmetered: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                continue
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"The run's cost says {field.name}={value}: it must be a number from 0 on, or missing.")


def cost(run: Cost) -> Section:
    """The section on cost. Nothing is judged: it is `unjudged` if anything was measured, else `unknown`."""
    share = _ratio(run.trainable, run.parameters)
    speed = _ratio(run.tokens, run.seconds)
    shown = (
        ("trainable", "trained parameters", "", run.trainable),
        ("trainable_share", "trained share of all parameters", "%", _times(share, 100)),
        ("seconds", "training time", "s", run.seconds),
        ("tokens", "tokens seen", "", run.tokens),
        ("speed", "speed", "tokens per second", speed),
        ("adapter_size", "size of the adapter", "MiB", _times(run.adapter_bytes, 1 / MIB)),
        ("energy", "energy", "Wh", _times(run.joules, 1 / 3600)),
    )
    figures = [_alone(*one) for one in shown if one[3] is not None]
    # Estimate beside measurement: the one place where a cost has a before.
    peak, estimate = _times(run.peak_bytes, 1 / MIB), _times(run.estimated_bytes, 1 / MIB)
    if peak is not None or estimate is not None:
        change = None if peak is None or estimate is None else peak - estimate
        label = "peak memory, estimated and measured"
        figures.append(Figure("peak_memory", label, "MiB", estimate, peak, change, None, None))
    said = []
    if run.trainable is not None:
        said.append(f"{run.trainable:,} trained parameters" + ("" if share is None else f" ({100 * share:.2g} %)"))
    if run.seconds is not None:
        said.append(f"{clock(run.seconds)} of training")
    if peak is not None:
        said.append(f"{peak:,.0f} MiB of memory at most")
    if not figures:
        sentence = "The run left no numbers about its cost."
    else:
        sentence = (
            f"{', '.join(said) or 'Some numbers of the run are known'}; cost is shown and not judged (no threshold)."
        )
    notes = list(_about_energy(run)) if figures else []
    return Section(
        key="cost",
        title="Cost",
        verdict="unjudged" if figures else "unknown",
        sentence=sentence,
        figures=tuple(figures),
        notes=tuple(notes),
    )


def _about_energy(run: Cost) -> Iterator[str]:
    """Which meters were read, and what they do not count."""
    without = f"; {' and '.join(run.unmetered)} could not be read" if run.unmetered else ""
    if run.joules is None:
        why = "the run was resumed with other meters, or lost one" if run.meters else "no meter could be read"
        yield f"Energy was not counted: {why} where it was trained{without}."
        return
    which = " and ".join(run.meters) or "meters that the run did not name"
    yield (
        f"Energy is what the meters of {which} counted while it was trained, other programs' work on the same devices "
        f"included; main memory, fans, power supply and other machines are not in it{without}."
    )


def _alone(name: str, label: str, unit: str, value: float | None) -> Figure:
    return Figure(name, label, unit, None, value, None, None, None)


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
