"""Sweeps (`-m`): what each run leaves for the comparison, and the table of all runs at the end.

Runs may end in other processes or on other machines, so everything is read from the sweep's folder:
`<run>/result.json` and `<run>/hydra/overrides.yaml`.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lit_ft.adapter import Adapter
from lit_ft.errors import UserError
from lit_ft.progress import say

RESULT = "result.json"
_OVERRIDES = "overrides.yaml"  # in Hydra's folder of a run
_NO_RESULT = "left no result: it was killed, or still runs"


class Begun(Callback):
    """Remembers the sweep that this process began (conf/config.yaml names this class), for the table at its end.

    The table itself is not printed from here: Hydra calls on_multirun_end only after sweeps that nothing cut short.
    """

    config: ClassVar[DictConfig | None] = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        Begun.config = config


def remove_if_unused(run: Path) -> None:
    """Remove the folder of a run that left nothing in it: one that ended before it began."""
    if {path.name for path in run.glob("*")} <= {"hydra"}:
        shutil.rmtree(run, ignore_errors=True)


def write_result(run: Path, adapter: Adapter) -> None:
    """Leave in the folder `run` what the run made, once its adapter is published."""
    _write(run, {"adapter": adapter.ref, "path": str(adapter.path), "metrics": adapter.card.metrics})


def read_result(run: Path) -> dict[str, Any]:
    """What a run left in its folder: adapter, path and metrics, or error; empty if nothing."""
    path = run / RESULT
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write_failure(run: Path, reason: str, overrides: list[str]) -> None:
    """Leave in the folder `run` why there is no result, also where the folder went with a run that never began."""
    _write(run, {**read_result(run), "error": reason})
    if not list(run.glob(f"*/{_OVERRIDES}")):
        (run / "hydra").mkdir(exist_ok=True)
        OmegaConf.save(OmegaConf.create(overrides), run / "hydra" / _OVERRIDES)


def failed(run: Path) -> bool:
    """Whether a reason was left there already."""
    return "error" in read_result(run)


def forget(run: Path) -> None:
    """Remove what an earlier run left in the same folder."""
    (run / RESULT).unlink(missing_ok=True)


def score(run: Path, objective: str) -> float | None:
    """The number that a sweeper minimises, or None if the run has no finite one.

    `objective` is a held-out metric; a leading minus turns it, for metrics of which more is better.

    Raises:
        UserError: the run measured other metrics, and not this one.
    """
    metrics = read_result(run).get("metrics", {})
    name = objective.removeprefix("-")
    if name not in metrics:
        raise UserError(f"objective={objective}: this run measured {', '.join(sorted(metrics)) or 'nothing'}.")
    value = float(metrics[name])
    if not math.isfinite(value):
        return None
    return -value if objective.startswith("-") else value


@dataclass(frozen=True)
class Row:
    """One run of a sweep.

    Attributes:
        run: its folder's name in the sweep's.
        overrides: what was asked of it, by key.
        value: the metric, or None if it has none.
        adapter: `name@vN`, or empty.
        path: the adapter's folder, or empty.
        error: why it failed, or empty.
    """

    run: str
    overrides: dict[str, str]
    value: float | None
    adapter: str
    path: str
    error: str


def read_rows(sweep: Path, objective: str) -> list[Row]:
    """The runs in the folder `sweep`, by number."""
    runs = {path.parent for path in sweep.rglob(RESULT)} | {path.parent.parent for path in sweep.rglob(_OVERRIDES)}
    rows = []
    for run in sorted(runs, key=lambda path: (len(path.name), path.name)):  # 2 before 10
        result = read_result(run)
        value = result.get("metrics", {}).get(objective.removeprefix("-"))
        rows.append(
            Row(
                run=str(run.relative_to(sweep)),
                overrides=_overrides(run),
                value=None if value is None else float(value),
                adapter=result.get("adapter", ""),
                path=result.get("path", ""),
                error=result.get("error", "") if result else _NO_RESULT,
            )
        )
    return rows


def best_of(rows: list[Row], objective: str) -> Row | None:
    """The run with the least value, or with the greatest if `objective` has a leading minus."""
    finite = [(row.value, row) for row in rows if row.value is not None and math.isfinite(row.value) and not row.error]
    if not finite:
        return None
    chosen = max if objective.startswith("-") else min
    return chosen(finite, key=lambda pair: pair[0])[1]


def differing(rows: list[Row]) -> list[str]:
    """The keys whose values differ between runs, in the order of their appearance."""
    keys = dict.fromkeys(key for row in rows for key in row.overrides)
    return [key for key in keys if len({row.overrides.get(key) for row in rows}) > 1]


def table(rows: list[Row], objective: str) -> str:
    """One line a run: its folder, what was asked of it, the metric, the adapter, and which is best or why it failed."""
    keys, best = differing(rows), best_of(rows, objective)
    lines = [["run", *keys, objective.removeprefix("-"), "adapter", ""]]
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.4f}"
        note = "best" if row is best else textwrap.shorten(row.error, 100, placeholder=" …")
        asked = [textwrap.shorten(row.overrides.get(key, ""), 40, placeholder=" …") for key in keys]
        lines.append([row.run, *asked, value, row.adapter or "-", note])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def write_csv(path: Path, rows: list[Row], objective: str) -> None:
    """The table for programs, with whole reasons and the adapters' folders."""
    keys, best = differing(rows), best_of(rows, objective)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *keys, objective.removeprefix("-"), "adapter", "path", "best", "error"])
        for row in rows:
            asked = [row.overrides.get(key, "") for key in keys]
            value = "" if row.value is None else row.value
            writer.writerow([row.run, *asked, value, row.adapter, row.path, row is best or "", row.error])


def finish() -> int:
    """Show and write the table of the sweep that this process began, if it did; returns how many runs failed."""
    config, Begun.config = Begun.config, None
    if config is None:
        return 0
    folder, objective = Path(config.hydra.sweep.dir), config.objective
    rows = read_rows(folder, objective)
    if not rows:
        return 0
    better = "higher" if objective.startswith("-") else "lower"
    write_csv(folder / "runs.csv", rows, objective)
    say(f"\nRuns of {folder} (also in its runs.csv); {better} {objective.removeprefix('-')} is better:\n")
    say(table(rows, objective))
    return sum(bool(row.error) for row in rows)


def _write(run: Path, content: dict[str, Any]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    whole = run / f"{RESULT}.part"
    whole.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    whole.replace(run / RESULT)


def _overrides(run: Path) -> dict[str, str]:
    """What was asked of a run, by key; texts without Hydra's quotes and backslashes."""
    for path in run.glob(f"*/{_OVERRIDES}"):
        lines = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        asked = OverridesParser.create().parse_overrides([str(line) for line in lines or []])
        values = ((one.key_or_group, None if one.is_delete() else one.value(), one) for one in asked)
        return {key: value if isinstance(value, str) else one.get_value_string() for key, value, one in values}
    return {}
