"""Where a training step's time goes: a few steps under torch's profiler, and one table that adds up to their wall time.

Attribution is pure (`attribute`): each instant of a step belongs to the innermost operation that runs in it, so that
nothing counts twice and the rows sum to the wall time.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lit_ft.batches import Batch, Window
from lit_ft.losses.logprobs import PROFILED
from lit_ft.progress import say
from lit_ft.resources.flops import computed_tokens, step_flops
from lit_ft.resources.machine import matrix_rate
from lit_ft.resources.memory import peak_memory

MATRIX = "matrix products"
ATTENTION = "attention"
VOCABULARY = "vocabulary: log-probabilities"
ELEMENTWISE = "elementwise and reductions"
COPIES = "copies, casts, look-ups"
MEMORY = "memory: allocate and fill"
OPTIMIZER = "optimizer"
BETWEEN = "between steps: data, logging"
REST = "rest: Python, autograd, waiting"
ROWS = (MATRIX, ATTENTION, VOCABULARY, ELEMENTWISE, COPIES, MEMORY, OPTIMIZER, BETWEEN, REST)

_STEP_RANGE = "lit_ft: step"

# Large enough that a product runs at the machine's best; (m, k, n) on a CPU. On a GPU matrix_rate's own is.
_CPU_PRODUCT = (2048, 2048, 2048)
_SLOW = 5e9  # FLOP/s

# What runs inside of these belongs to them, whatever it is.
_WHOLE = (
    (VOCABULARY, re.compile(rf"^{re.escape(PROFILED)}")),
    (OPTIMIZER, re.compile(r"^Optimizer\.")),
    # SDPA in all its forms, flash, variable length, flex, and their backward nodes. Eager attention is made of
    # ordinary operations and counts as these.
    (ATTENTION, re.compile(r"attention|flash|varlen|fmha|cudnn_sdpa", re.IGNORECASE)),
)
# What is left is named by its operator, without namespace and the underscore of in-place forms.
_BY_OPERATOR = (
    (MATRIX, re.compile(r"(^|_)(mm|bmm|addmm|baddbmm|addbmm|matmul|linear|einsum|dot|mv|addmv)(_|$)")),
    (
        COPIES,
        re.compile(
            r"(_?to_copy|to|copy|cat|_cat|concat|stack|contiguous|clone|_?index.*|gather.*|scatter.*|embedding.*|repeat"
            r"|repeat_interleave|masked_(select|scatter)|nonzero|take.*|roll|pad|constant_pad_nd|slice_backward"
            r"|select_backward|_pin_memory|pin_memory)"
        ),
    ),
    (MEMORY, re.compile(r"(new_)?(empty|zeros?|ones|full|fill)(_like|_strided|_permuted)?|resize|set")),
    # Views move nothing; what they take is the dispatcher's time, as is that of waiting for a number.
    (
        REST,
        re.compile(
            r"view(_as)?|_unsafe_view|reshape|_reshape_alias|t|transpose|permute|movedim|as_strided|expand(_as)?|slice"
            r"|select|narrow|(un)?(safe_)?split.*|chunk|unbind|(un)?squeeze|(un)?flatten|unfold|detach|alias|lift_fresh"
            r"|result_type|resolve_(conj|neg)|item|_local_scalar_dense|is_nonzero|numpy_T"
        ),
    ),
)
# Kernels that no known operator launched (compiled code): by the kernel's name.
_BY_KERNEL = (
    (ATTENTION, re.compile(r"attention|flash|fmha", re.IGNORECASE)),
    (MATRIX, re.compile(r"gemm|cutlass|cublas|nvjet|splitk|_mm_", re.IGNORECASE)),
    (COPIES, re.compile(r"^Memcpy|copy", re.IGNORECASE)),
    (MEMORY, re.compile(r"^Memset|fill", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Event:
    """One operation or range that the profiler saw on the CPU; times in µs.

    `kernels` are the names and durations of what it launched on the GPU itself, not through operations inside of it.
    """

    name: str
    thread: int
    start: float
    end: float
    kernels: tuple[tuple[str, float], ...] = ()


Span = tuple[float, float, str]  # start, end, row


def attribute(
    events: Iterable[Event], steps: Sequence[tuple[float, float]], thread: int, on_gpu: bool
) -> dict[str, float]:
    """µs of the steps' time in each of `ROWS` (but `BETWEEN`, which lies outside of steps); they sum to the steps'.

    On a CPU an instant belongs to the innermost operation of `thread`, or where that one only waits, of another (the
    backward pass may run in its own). On a GPU the time of every kernel belongs to the operation that launched it, and
    `REST` is the time in which no kernel ran.

    Args:
        events: what ran, in any order; operations of one thread lie apart or within each other.
        steps: (start, end) of each step, in order, in µs of the events' clock.
        thread: the one that runs the steps.
        on_gpu: whether kernels count, or the CPU's time.
    """
    threads: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        threads[event.thread].append(event)
    totals = dict.fromkeys(ROWS, 0.0)
    taken: list[Span] = []
    for name in sorted(threads, key=lambda name: (name != thread, name)):
        spans, kernels = _innermost(threads[name], steps)
        if on_gpu:
            for row, duration in kernels:
                totals[row] += duration
        else:
            busy = [piece for piece in spans if piece[2] != REST]
            fresh = _outside(_inside(busy, steps), taken)
            for start, end, row in fresh:
                totals[row] += end - start
            taken = sorted(taken + fresh)
    wall = sum(end - start for start, end in steps)
    busy_time = sum(totals.values())
    if busy_time > wall:  # kernels that ran side by side
        totals = {row: value * wall / busy_time for row, value in totals.items()}
    totals[REST] = max(wall - sum(value for row, value in totals.items() if row != REST), 0.0)
    return totals


def _row(name: str) -> str:
    """The row of an operation, by its name alone."""
    for row, pattern in _WHOLE:
        if pattern.search(name):
            return row
    namespace, _, operator = name.rpartition("::")
    if not namespace or "autograd" in namespace:
        return REST  # a range, or a node of autograd: bookkeeping around operations
    operator = operator.rstrip("_")
    for row, pattern in _BY_OPERATOR:
        if (pattern.search if row == MATRIX else pattern.fullmatch)(operator):
            return row
    return ELEMENTWISE


def _row_of_kernel(row: str, kernel: str) -> str:
    if row != REST:
        return row
    return next((found for found, pattern in _BY_KERNEL if pattern.search(kernel)), ELEMENTWISE)


def _innermost(
    events: Iterable[Event], steps: Sequence[tuple[float, float]]
) -> tuple[list[Span], list[tuple[str, float]]]:
    """One thread's time as spans of the innermost operation, in order; and (row, µs) of kernels launched in steps."""
    whole = {row for row, _ in _WHOLE}
    rows: dict[str, str] = {}
    spans: list[Span] = []
    kernels: list[tuple[str, float]] = []
    stack: list[tuple[float, str]] = []  # (end, row) of the operations around
    now = float("-inf")

    def until(moment: float) -> None:
        nonlocal now
        while stack:
            end, row = stack[-1]
            if (stop := min(end, moment)) > now:
                spans.append((now, stop, row))
                now = stop
            if end > moment:
                break
            stack.pop()
        now = max(now, moment)

    step = 0
    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        until(event.start)
        row = rows.get(event.name) or rows.setdefault(event.name, _row(event.name))
        if stack:
            # Inside of a whole everything is its; and a child never outlasts its parent, but for rounding.
            row = stack[-1][1] if stack[-1][1] in whole else row
            stack.append((min(event.end, stack[-1][0]), row))
        else:
            stack.append((event.end, row))
        while step < len(steps) and steps[step][1] < event.start:
            step += 1
        if event.kernels and step < len(steps) and event.start >= steps[step][0]:
            kernels += [(_row_of_kernel(row, kernel), duration) for kernel, duration in event.kernels]
    until(float("inf"))
    return spans, kernels


def _inside(spans: Sequence[Span], steps: Sequence[tuple[float, float]]) -> list[Span]:
    """The parts of `spans` (in order) that lie in one of `steps` (in order, apart)."""
    kept, first = [], 0
    for start, end, row in spans:
        while first < len(steps) and steps[first][1] <= start:
            first += 1
        for low, high in steps[first:]:
            if low >= end:
                break
            kept.append((max(start, low), min(end, high), row))
    return kept


def _outside(spans: Sequence[Span], taken: Sequence[Span]) -> list[Span]:
    """The parts of `spans` (in order) that lie in none of `taken` (in order, apart)."""
    kept, first = [], 0
    for start, end, row in spans:
        while first < len(taken) and taken[first][1] <= start:
            first += 1
        k = first
        while k < len(taken) and taken[k][0] < end:
            if taken[k][0] > start:
                kept.append((start, taken[k][0], row))
            start = max(start, taken[k][1])
            k += 1
        if start < end:
            kept.append((start, end, row))
    return kept


@dataclass(frozen=True)
class Report:
    """What a profile found; times are seconds per step, means over `steps`.

    Attributes:
        rows: seconds per step in each of `ROWS`; they sum to `wall`.
        wall: seconds per step, from the end of the step before to the end of the step.
        steps, first: how many steps were profiled, and which was the first (counted from 1, in this run).
        tokens: the data set's tokens per step; `computed`: those that the model computed (`lit_ft.resources.flops`).
        flops: operations that a step needs.
        product_rate: FLOP/s of a large matrix product on the same device, or None where it could not be measured.
        dtype: what matrix products ran in.
        where: the device in words.
        peak_memory: bytes, up to the last profiled step.
    """

    rows: dict[str, float]
    wall: float
    steps: int
    first: int
    tokens: float
    computed: float
    flops: float
    product_rate: float | None
    dtype: torch.dtype
    where: str
    on_gpu: bool
    peak_memory: int
    processes: int = 1

    def __str__(self) -> str:
        last = self.first + self.steps - 1
        which = f"step {self.first}" if self.steps == 1 else f"steps {self.first} to {last}"
        number = str(self.dtype).removeprefix("torch.")
        clock = "time of the GPU" if self.on_gpu else "wall time"
        lines = [f"Where the time of training {which} went ({clock}; {number} on {self.where})", ""]
        width = max(map(len, ROWS)) + 4
        lines.append(f"{'':{width}}{'ms per step':>12}{'share':>9}")
        lines += [f"{row:{width}}{1e3 * self.rows[row]:12,.1f}{self.rows[row] / self.wall:9.1%}" for row in ROWS]
        lines += [f"{'a step':{width}}{1e3 * self.wall:12,.1f}{1:9.1%}", ""]
        rate, unit = self.flops / self.wall, 1e12 if self.on_gpu else 1e9
        prefix = "TFLOP" if self.on_gpu else "GFLOP"
        achieved = f"{rate / unit:,.1f} {prefix}/s"
        if self.product_rate:
            best = f"{self.product_rate / unit:,.1f} {prefix}/s"
            achieved += f", {rate / self.product_rate:.1%} of the {best} that a large {number} product reaches here"
        held = "allocated on the GPU" if self.on_gpu else "of this process (resident)"
        facts = {
            "speed": f"{self.tokens / self.wall:,.1f} tokens/s of the data set ({self.tokens:,.0f} per step)",
            "tokens computed": f"{self.computed:,.0f} per step (shared prompts once, no padding)",
            "arithmetic": f"{self.flops / unit:,.3f} {prefix} per step, what forward and backward need",
            "achieved": achieved,
            "peak memory": f"{self.peak_memory / 2**30:,.2f} GiB {held} since it began",
        }
        lines += [f"{key:17}{value}" for key, value in facts.items()]
        notes = ["Measured under the profiler, which makes steps of many small operations slower."]
        if self.processes > 1:
            notes.append(f"One of {self.processes} processes; tokens and arithmetic are its own.")
        return "\n".join([*lines, "", *notes])


@dataclass
class _Running:
    """A profile under way: the profiler, and what of the steps it cannot know."""

    profiler: Any
    first: int
    gaps: list[float] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    range: Any = None


class ProfileSteps(Callback):
    """Profile a few training steps and say where their time went.

    Writes the table to `profile.txt` and the events of the steps to `trace.json.gz` (chrome://tracing and
    https://ui.perfetto.dev open it as it is), both into `folder`. Only the first process does. A validation ends the
    profile early, and a run shorter than that is profiled as far as it goes.

    Args:
        folder: where the two files go; made if it is not there.
        skip: steps before the first that is profiled, in which memory and caches are still being set up.
        steps: how many are profiled.
    """

    def __init__(self, folder: Path, skip: int = 1, steps: int = 3) -> None:
        self.folder, self.skip, self.steps = folder, skip, max(steps, 1)
        self.report: Report | None = None
        self._running: _Running | None = None
        self._seen = 0
        self._last_end: float | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Window, batch_idx: int) -> None:
        if not trainer.is_global_zero or self.report is not None or self._seen < self.skip:
            return
        gap = time.perf_counter() - self._last_end if self._last_end is not None else 0.0
        if self._running is None:
            self._running = _Running(_started(pl_module.device), first=self._seen + 1)
        _synchronize(pl_module.device)
        self._running.gaps.append(gap)
        self._running.windows.append(batch)
        self._running.range = torch.profiler.record_function(_STEP_RANGE)
        self._running.range.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._seen += 1
        if self._running is not None:
            _synchronize(pl_module.device)
            self._running.range.__exit__(None, None, None)
            self._running.range = None
            if len(self._running.windows) == self.steps:
                self._finish(trainer, pl_module)
        self._last_end = time.perf_counter()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._running is not None:
            self._finish(trainer, pl_module)
        self._last_end = None  # held-out rows are no part of the time between two steps

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._running is not None:
            self._finish(trainer, pl_module)
        elif trainer.is_global_zero and self.report is None:
            say(f"No step was profiled: the run had {self._seen}, and the first {self.skip} are left out.")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """An error or an interruption in a profiled step: leave no profiler behind."""
        if self._running is not None:
            running, self._running = self._running, None
            if running.range is not None:
                running.range.__exit__(None, None, None)
            running.profiler.stop()

    def _finish(self, trainer: Any, pl_module: Any) -> None:
        assert self._running is not None
        running, self._running = self._running, None
        device: torch.device = pl_module.device
        on_gpu = device.type == "cuda"
        memory = peak_memory(device)  # the profiler's own results are still to come
        running.profiler.stop()
        events, steps, thread = _read(running.profiler.events())
        totals = attribute(events, steps, thread, on_gpu)
        totals[BETWEEN] = 1e6 * sum(running.gaps)
        count = len(steps)
        rows = {row: totals[row] / 1e6 / count for row in ROWS}
        batches: list[Batch] = [batch for window in running.windows for batch in window.batches]
        dtype = _product_dtype(trainer.precision, pl_module.model)
        self.report = Report(
            rows=rows,
            wall=sum(rows.values()),
            steps=count,
            first=running.first,
            tokens=sum(batch.tokens for batch in batches) / count,
            computed=sum(computed_tokens(batch) for batch in batches) / count,
            flops=sum(step_flops(pl_module.model, batch) for batch in batches) / count,
            product_rate=_product_rate(device, dtype),
            dtype=dtype,
            where=_where(device),
            on_gpu=on_gpu,
            peak_memory=memory,
            processes=trainer.world_size,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        text = str(self.report)
        if on_gpu and not any(event.kernels for event in events):
            text += "\nNo GPU events were recorded: CUPTI does not work here (KINETO_LOG_LEVEL=0 shows why)."
        (self.folder / "profile.txt").write_text(text + "\n", encoding="utf-8")
        trace = self.folder / "trace.json.gz"
        _write_trace(running.profiler, trace)
        say(f"\n{text}\nEvents of these steps: {trace}\n")


def _started(device: torch.device) -> Any:
    # Level 5 are marks for a system tracer, two lines on standard error at every start and stop. Read at first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    profiler.start()
    return profiler


def _write_trace(profiler: Any, path: Path) -> None:
    """The events as gzipped JSON, written beside and renamed.

    A model's three steps are 100 MB of text and 7 MB of gzip. torch writes a name that ends in .gz line by line at
    gzip's level 9: 20 s where this takes one.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:
        text, packed = Path(beside) / "trace.json", Path(beside) / path.name
        profiler.export_chrome_trace(str(text))
        with text.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
            shutil.copyfileobj(source, target, 2**20)
        packed.replace(path)


def _read(seen: Iterable[Any]) -> tuple[list[Event], list[tuple[float, float]], int]:
    """Torch's events as `Event`s, the steps' (start, end), and the thread that ran them."""
    events, steps, thread = [], [], 0
    for one in seen:
        if one.device_type != torch.autograd.DeviceType.CPU or one.is_async:
            continue
        if one.name == _STEP_RANGE:
            steps.append((one.time_range.start, one.time_range.end))
            thread = one.thread
        # A range comes back as a kernel of the same name, as long as all in it: no kernel of its own.
        kernels = tuple((kernel.name, kernel.duration) for kernel in one.kernels if kernel.name != one.name)
        events.append(Event(one.name, one.thread, one.time_range.start, one.time_range.end, kernels))
    return events, sorted(steps), thread


def _synchronize(device: torch.device) -> None:
    """Wait for the GPU, so that a step's kernels lie between its start and its end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product_dtype(precision: str, model: torch.nn.Module) -> torch.dtype:
    """What the model's matrix products run in: autocast's format, or that of most weights."""
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if precision in mixed:
        return mixed[precision]
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a large product, or None where the GPU has no memory left for it."""
    if device.type == "cuda":
        try:
            return matrix_rate(device, dtype, seconds=0.5)
        except torch.OutOfMemoryError:
            return None
    small = matrix_rate(device, dtype)
    # A format that the CPU only emulates would take half a minute for a large product.
    return small if small < _SLOW else matrix_rate(device, dtype, _CPU_PRODUCT, seconds=0.5)


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
