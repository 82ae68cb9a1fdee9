"""`python -m lit_ft.evaluate`: the report on an adapter, beside its base or another adapter."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_ft.adapter import REPORT
from lit_ft.cli import launch, model_is_no_group
from lit_ft.errors import UserError
from lit_ft.evaluation.gate import SECTIONS, conditions, reasons
from lit_ft.evaluation.report import Report
from lit_ft.progress import say


@dataclass
class ModelConfig:
    id: str | None = None


@dataclass
class DataConfig:
    path: str | None = None
    val_path: str | None = None
    columns: Any = None


@dataclass
class LmEvalConfig:
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    apply_chat_template: bool = False


@dataclass
class EvaluateConfig:
    """One field for each key of conf/evaluate.yaml, where they are explained."""

    adapter: str | None = None
    against: str = "base"
    adapters: str = "./adapters"
    output: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    sections: list[str] = field(default_factory=lambda: list(SECTIONS))
    fail_if: Any = None
    data: DataConfig = field(default_factory=DataConfig)
    rows: int = 48
    metric: str | None = None
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)
    answered: int = 6
    max_new_tokens: int = 64
    texts: str | None = None
    instructions: str | None = None
    pairs: str | None = None
    own_answers: int = 12
    probed: int = 12
    max_tokens: int = 2048
    precision: str = "32-true"
    debug: bool = False


def evaluate(cfg: EvaluateConfig) -> int:
    """Measure and write the report; the page's place is the one line on standard output.

    Returns:
        0; 3 if a condition of `fail_if` holds.

    Raises:
        UserError: something is missing or does not fit. Where only some sections cannot be made, the report with the
            others is written before.
    """
    _check(cfg)
    wanted = conditions(_listed(cfg.fail_if), cfg.sections)
    report, page = write_about(cfg)
    print(page)  # noqa: T201
    if failed := [section for section in report.sections if section.error is not None]:
        raise UserError(
            f"{len(failed)} of {len(report.sections)} sections could not be made; the others are in {page}. "
            + " ".join(f"{section.title}: {section.error}" for section in failed)
        )
    if found := reasons(wanted, report):
        say("\n".join(f"fail_if    {reason}" for reason in found))
        return 3
    return 0


def _check(cfg: EvaluateConfig) -> None:
    if cfg.adapter is None:
        raise UserError("Give what the report is to be about: python -m lit_ft.evaluate adapter=FOLDER.")
    if unknown := [name for name in cfg.sections if name not in SECTIONS]:
        raise UserError(f"sections={unknown[0]}: there is no such section; there are {', '.join(SECTIONS)}.")
    if not cfg.sections:
        raise UserError(f"sections=[] leaves nothing to report; there are {', '.join(SECTIONS)}.")
    for key in ("rows", "max_new_tokens", "max_tokens"):
        if getattr(cfg, key) < 1:
            raise UserError(f"{key}={getattr(cfg, key)} must be at least 1.")
    for key in ("answered", "own_answers", "probed"):
        if getattr(cfg, key) < 0:
            raise UserError(f"{key}={getattr(cfg, key)} must not be negative.")
    if cfg.lm_eval.tasks and "gain" not in cfg.sections:
        raise UserError("lm_eval.tasks are measured in the section gain: add it to sections, or leave them out.")
    if cfg.lm_eval.limit is not None and cfg.lm_eval.limit < 1:
        raise UserError(f"lm_eval.limit={cfg.lm_eval.limit} must be at least 1; leave it out for all rows.")
    if cfg.lm_eval.num_fewshot is not None and cfg.lm_eval.num_fewshot < 0:
        raise UserError(f"lm_eval.num_fewshot={cfg.lm_eval.num_fewshot} must not be negative.")


def write_about(cfg: EvaluateConfig) -> tuple[Report, Path]:
    """Measure, write the report and say its verdicts; returns it and the page's place.

    Raises:
        UserError: something is missing or does not fit; what fails within a section is said there.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from lit_ft.evaluation.compare import Asked, compare
    from lit_ft.evaluation.harness import Tasks, check_tasks
    from lit_ft.evaluation.page import as_text
    from lit_ft.evaluation.write import write_report
    from lit_ft.exporting.source import find_source

    assert cfg.adapter is not None
    harness = None
    if cfg.lm_eval.tasks:
        own = cfg.lm_eval
        harness = Tasks(tuple(own.tasks), own.limit, own.num_fewshot, own.include_path, own.apply_chat_template)
        check_tasks(harness)
    root = Path(cfg.adapters)
    source = find_source(cfg.adapter, root)
    other = None if cfg.against == "base" else find_source(cfg.against, root)
    asked = Asked(
        sections=tuple(name for name in SECTIONS if name in cfg.sections),
        model=cfg.model.id,
        data_path=cfg.data.path,
        val_path=cfg.data.val_path,
        columns=dict(cfg.data.columns) if cfg.data.columns else None,
        rows=cfg.rows,
        metric=cfg.metric,
        answered=cfg.answered,
        max_new_tokens=cfg.max_new_tokens,
        texts=cfg.texts,
        instructions=cfg.instructions,
        pairs=cfg.pairs,
        own_answers=cfg.own_answers,
        probed=cfg.probed,
        max_tokens=cfg.max_tokens,
        precision=cfg.precision,
        lm_eval=harness,
    )
    report = compare(source, other, asked)
    page = write_report(report, Path(cfg.output) if cfg.output is not None else source.path / REPORT)
    for line in as_text(report):
        say(line)
    return report, page


def _listed(given: Any) -> str | Sequence[str]:
    if given is None:
        return ()
    return given if isinstance(given, str) else [str(one) for one in given]


def _quoted(argument: str) -> str:
    """`fail_if=a=b` as Hydra reads it: its grammar wants quotes around a value with `=`, `<` or `>`."""
    key, _, value = argument.partition("=")
    return f'{key}="{value}"' if key == "fail_if" and value and value[0] not in "[\"'" else argument


def main() -> Any:
    """The command line."""
    model_is_no_group()
    sys.argv[1:] = [_quoted(argument) for argument in sys.argv[1:]]
    launch(evaluate, "evaluate", EvaluateConfig)


if __name__ == "__main__":
    main()
