"""Tasks of lm-evaluation-harness (package lm_eval) on both models: more figures for the section on what was gained."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import logging
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_ft.errors import UserError
from lit_ft.evaluation.paired import FEWEST, Change, figure, paired_change, paired_rate, verdict
from lit_ft.evaluation.section import Figure, Section, Table
from lit_ft.evaluation.subject import Subject
from lit_ft.progress import say

# The harness pads the rows of a batch, and makes logits of all their tokens: few rows keep those within bounds.
_TOKENS_A_ROW = 512


@dataclass(frozen=True)
class Tasks:
    """Which tasks, and how; each attribute is a key of `lm_eval` in conf/evaluate.yaml, where they are explained."""

    names: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    apply_chat_template: bool = False


@dataclass(frozen=True)
class Measured:
    """One metric of one task, or of a group of tasks, on both models.

    Attributes:
        task, metric: as the harness calls them; a filter of the answers is part of the metric's name.
        change: without an interval where the metric is no mean over rows.
        higher_is_better: None where the task does not say.
    """

    task: str
    metric: str
    change: Change
    higher_is_better: bool | None


def check_tasks(asked: Tasks) -> None:
    """Refuse what can be refused before anything is measured.

    Raises:
        UserError: the package or a task is not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "lm_eval.tasks needs lm-evaluation-harness, which is not installed: pip install 'lit_ft[lm_eval]'."
        )
    if asked.include_path is not None and not Path(asked.include_path).is_dir():
        raise UserError(f"lm_eval.include_path={asked.include_path} is not a folder: give one with your tasks' YAML.")
    _expanded(asked)


def add_tasks(section: Section, base: Subject, tuned: Subject, asked: Tasks) -> Section:
    """The section with the tasks' figures; where they cannot be measured it says why, and keeps what it has."""
    try:
        found = measured(base, tuned, asked)
    except UserError as error:
        both = " ".join(filter(None, (section.error, str(error))))
        return replace(section, verdict="unknown", error=both)
    rows = tuple(_row(one) for one in found)
    header = ("task", "metric", "rows", "before", "after", "change", "95% interval", "verdict")
    how = f"lm-evaluation-harness {version('lm_eval')}"
    notes = [
        "Tasks of lm-evaluation-harness do not count for this section's verdict; each has its own in their table "
        "(threshold 0)."
    ]
    if asked.limit is not None:
        notes.append(f"At most {asked.limit} rows of each task were taken, so these are not a task's official figures.")
    return replace(
        section,
        figures=(*section.figures, *map(_figure, found)),
        tables=(*section.tables, Table(f"Tasks, by {how}", header, rows)),
        notes=(*section.notes, *notes),
    )


def measured(base: Subject, tuned: Subject, asked: Tasks) -> list[Measured]:
    """Every metric of every task on both models.

    The harness is asked through its own model class, so that its figures are those that it would publish. Where a
    figure is the mean of what the harness gives each row, the change is paired by row; of others, such as a perplexity
    over words, before and after are all that there is.

    Raises:
        UserError: a task is not there, its data cannot be had, or it fails on these models.
    """
    names = _expanded(asked)
    before, after = _results(base, names, asked), _results(tuned, names, asked)
    found = []
    for task, results in after["results"].items():
        better = after["higher_is_better"].get(task) or {}
        for key, value in results.items():
            metric, _, chosen = key.partition(",")
            old = before["results"][task].get(key)
            if not chosen or metric.endswith("_stderr") or not (_is_number(value) and _is_number(old)):
                continue
            change = _change(_rows(before, task, metric, chosen), _rows(after, task, metric, chosen), old, value)
            shown = metric if chosen == "none" else f"{metric} ({chosen})"
            found.append(Measured(task, shown, change, better.get(metric)))
    if not found:
        raise UserError(f"lm_eval.tasks={','.join(asked.names)} gave no number: choose tasks that have a metric.")
    return found


def _results(subject: Subject, names: Sequence[str], asked: Tasks) -> Mapping[str, Any]:
    """What the harness says of one model; raises UserError where it cannot."""
    say(f"lm_eval    {', '.join(asked.names)}: {subject.name}")
    with _as_before(), subject.computing():
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            model = HFLM(
                subject.model,
                # A copy: the harness gives it a padding token and another side to pad on.
                tokenizer=copy.deepcopy(subject.tokenizer),
                batch_size=max(1, subject.max_tokens // _TOKENS_A_ROW),
            )
            found = simple_evaluate(
                model,
                tasks=list(names),
                num_fewshot=asked.num_fewshot,
                limit=asked.limit,
                apply_chat_template=asked.apply_chat_template,
                task_manager=_manager(asked.include_path),
                use_cache=_cache(subject),
                bootstrap_iters=0,  # its intervals are of one model; ours are of the change
                log_samples=True,
            )
        except Exception as error:  # tasks hold code of their own, and fetch their data from elsewhere
            raise UserError(
                f"lm_eval.tasks={','.join(asked.names)} could not be run on {subject.name}: {_first(error)}. Tasks "
                "fetch their data from the Hub; without a network give tasks over files, with lm_eval.include_path."
            ) from error
    assert found is not None  # None is for all but the first of several processes
    return found


def _rows(results: Mapping[str, Any], task: str, metric: str, chosen: str) -> dict[tuple[str, int], Any]:
    """What the harness gave each row: of a group, the rows of all its tasks."""
    if children := results.get("group_subtasks", {}).get(task):
        return {key: value for child in children for key, value in _rows(results, child, metric, chosen).items()}
    samples = results.get("samples", {}).get(task, ())
    return {(task, one["doc_id"]): one[metric] for one in samples if one["filter"] == chosen and metric in one}


def _change(before: Mapping[Any, Any], after: Mapping[Any, Any], old: float, new: float) -> Change:
    """From `old` to `new`; paired by row where these are means over the rows."""
    keys = [key for key in after if key in before and _is_number(before[key]) and _is_number(after[key])]
    if keys and len(keys) == len(before) == len(after):
        x, y = [float(before[key]) for key in keys], [float(after[key]) for key in keys]
        if all(math.isclose(sum(v) / len(v), m, rel_tol=1e-6, abs_tol=1e-9) for v, m in ((x, old), (y, new))):
            if set(x) | set(y) <= {0.0, 1.0}:
                return paired_rate([value == 1 for value in x], [value == 1 for value in y])
            return paired_change(x, y)
    return Change(float(old), float(new), float(new) - float(old), None, None, len(after))


def _figure(one: Measured) -> Figure:
    metric, _, chosen = one.metric.partition(" (")
    name = ".".join(filter(None, ("lm_eval", one.task, metric, chosen.rstrip(")"))))
    return figure(name, f"{one.task}: {one.metric}", one.change)


def _row(one: Measured) -> tuple[str, ...]:
    change = one.change
    interval = "-" if change.low is None else f"{change.low:+.3f} to {change.high:+.3f}"
    found = "unknown"
    # Without an interval nothing is known, unless it is for too few rows, which is as elsewhere.
    if one.higher_is_better is not None and (change.low is not None or change.rows < FEWEST):
        found = verdict(change, threshold=0, lower_is_better=not one.higher_is_better)
    numbers = (f"{change.before:.3f}", f"{change.after:.3f}", f"{change.change:+.3f}")
    return (one.task, one.metric, str(change.rows), *numbers, interval, found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def _expanded(asked: Tasks) -> list[str]:
    """The tasks' names, patterns such as `mmlu_*` written out; raises UserError for one that there is not."""
    found: list[str] = []
    for name in asked.names:
        try:
            known = _manager(asked.include_path).match_tasks([name])
        except Exception as error:  # a YAML of the user's own may be anything
            raise UserError(f"lm_eval: its tasks cannot be read: {_first(error)}.") from error
        if not known:
            raise UserError(
                f"lm_eval.tasks: there is no task {name}. `lm_eval ls tasks` lists what there is; a folder with your "
                "own is given with lm_eval.include_path."
            )
        found += [one for one in known if one not in found]
    return found


@functools.cache
def _manager(include_path: str | None) -> Any:
    """Knows all tasks by name; made once, since it reads thousands of files."""
    with _quietly():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=include_path)


def _cache(subject: Subject) -> str | None:
    """The beginning of the path at which the harness keeps what this model answered, request by request."""
    if subject.kept is None:
        return None
    try:
        subject.kept.folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(subject.kept.folder / f"lm_eval-{subject.key_of([], lm_eval=version('lm_eval'))}")


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Random states as they were at the end: the harness seeds them all."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), _quietly():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the harness's log, and without its progress bars where nobody would see them move."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def _first(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}".rstrip(": .")
