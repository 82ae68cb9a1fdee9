"""`python -m lit_ft.evaluate`: the report on an adapter, beside its base or another adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_ft.adapter import REPORT
from lit_ft.cli import launch, model_is_no_group, quote_conditions
from lit_ft.errors import UserError
from lit_ft.evaluation.gate import SECTIONS, Condition, conditions, reasons
from lit_ft.evaluation.report import Report
from lit_ft.progress import say

if TYPE_CHECKING:
    from lit_ft.evaluation.harness import Tasks


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
    metric_rows: int = 48
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)
    answered: int = 6
    max_new_tokens: int = 64
    texts: str | None = None
    instructions: str | None = None
    pairs: str | None = None
    own_answers: int = 12
    kl_threshold: float | None = 0.5
    probed: int = 300
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
    wanted = check(cfg)
    report, page = write_about(cfg)
    print(page)  # noqa: T201
    return outcome(wanted, report, page)


def outcome(wanted: Sequence[Condition], report: Report, page: Path) -> int:
    """0; 3, once it is said why, if one of the conditions holds.

    Raises:
        UserError: a section could not be made, or a condition names a figure that the report has not.
    """
    if failed := [section for section in report.sections if section.error is not None]:
        raise UserError(
            f"{len(failed)} of {len(report.sections)} sections could not be made, or not wholly; the others are in "
            f"{page}. " + " ".join(f"{section.title}: {section.error}" for section in failed)
        )
    if found := reasons(wanted, report):
        say("\n".join(f"fail_if    {reason}" for reason in found))
        return 3
    return 0


def check(cfg: EvaluateConfig) -> list[Condition]:
    """The conditions of `fail_if`, once all settings that can be checked without a model are.

    Raises:
        UserError: a setting cannot be, or a condition could never be decided.
    """
    if cfg.adapter is None:
        raise UserError("Give what the report is to be about: python -m lit_ft.evaluate adapter=FOLDER.")
    if unknown := [name for name in cfg.sections if name not in SECTIONS]:
        raise UserError(f"sections={unknown[0]}: there is no such section; there are {', '.join(SECTIONS)}.")
    if not cfg.sections:
        raise UserError(f"sections=[] leaves nothing to report; there are {', '.join(SECTIONS)}.")
    for key in ("rows", "metric_rows", "max_new_tokens", "max_tokens"):
        if getattr(cfg, key) < 1:
            raise UserError(f"{key}={getattr(cfg, key)} must be at least 1.")
    for key in ("answered", "own_answers", "probed"):
        if getattr(cfg, key) < 0:
            raise UserError(f"{key}={getattr(cfg, key)} must not be negative.")
    if cfg.kl_threshold is not None and not (math.isfinite(cfg.kl_threshold) and cfg.kl_threshold >= 0):
        raise UserError(
            f"kl_threshold={cfg.kl_threshold} must be a number from 0 on; with null the KL is shown and not judged."
        )
    if cfg.lm_eval.tasks and "gain" not in cfg.sections:
        raise UserError("lm_eval.tasks are measured in the section gain: add it to sections, or leave them out.")
    if cfg.lm_eval.limit is not None and cfg.lm_eval.limit < 1:
        raise UserError(f"lm_eval.limit={cfg.lm_eval.limit} must be at least 1; leave it out for all rows.")
    if cfg.lm_eval.num_fewshot is not None and cfg.lm_eval.num_fewshot < 0:
        raise UserError(f"lm_eval.num_fewshot={cfg.lm_eval.num_fewshot} must not be negative.")
    absent = {}
    if cfg.metric is None:
        absent["gain.metric"] = "there is no metric=exact_match or metric=package.module:function"
    if not cfg.lm_eval.tasks:
        absent["gain.lm_eval."] = "there are no lm_eval.tasks"
    if not cfg.own_answers:
        absent["forgetting.kl"] = "own_answers=0 leaves nothing to measure it on"
    if not cfg.probed:
        absent |= dict.fromkeys(
            (f"overfitting.{name}" for name in ("memorised_train", "memorised_held_out", "by_heart")), "probed=0"
        )
    return conditions(_listed(cfg.fail_if), cfg.sections, absent)


# Of a report at the end of a run these are the run's own, or nothing's.
_OF_THE_RUN = ("adapter", "adapters", "model", "debug")


def after_training(given: Any, *, adapters: str, model: str) -> tuple[EvaluateConfig, list[Condition] | None] | None:
    """The report that a run wants when its adapter is published, and its conditions; None where it wants none.

    With a mere `true` there are none, not even that all sections could be made: the report itself says so.

    Everything is checked now that can be before there is an adapter: hours later nobody wants to hear of a wrong key.

    Args:
        given: the run's setting `evaluate`: whether, or a mapping of settings of this command.
        adapters, model: the run's folder of adapters and its base; `against` is looked up there now, since the newest
            version of a name may be the run's own when it ends.

    Raises:
        UserError: it is neither, or a setting cannot be.
    """
    from omegaconf import BooleanNode, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(given, Mapping):
        try:
            wanted = BooleanNode(given)._value()
        except OmegaConfBaseException as error:
            raise UserError(
                f"evaluate={given} is neither true nor false nor settings of lit_ft.evaluate: write evaluate=true, or "
                "+evaluate.fail_if=forgetting=worse, or both and more as evaluate='{against: support@v1, rows: 100}'."
            ) from error
        return (EvaluateConfig(adapters=adapters), None) if wanted else None
    if own := [key for key in _OF_THE_RUN if key in given]:
        raise UserError(f"evaluate.{own[0]} is the run's own and cannot be given: leave it out.")
    try:
        cfg: EvaluateConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(EvaluateConfig), given))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = f".{error.full_key}" if getattr(error, "full_key", None) else ""
        said = str(error).splitlines()[0]
        raise UserError(
            f"evaluate{key}: {said}. `python -m lit_ft.evaluate --help` shows the settings that there are."
        ) from error
    cfg.adapter, cfg.adapters = "the run's own", adapters
    wanted = check(cfg)
    from lit_ft.evaluation.compare import check_precision, find_metric

    find_metric(cfg.metric)
    check_precision(cfg.precision)
    _check_tasks(cfg)
    for key, path in (("texts", cfg.texts), ("instructions", cfg.instructions), ("pairs", cfg.pairs)):
        if path is not None and not Path(path).is_file():
            raise UserError(f"evaluate.{key}={path}: there is no such file (looked in {Path.cwd()}).")
    if cfg.against != "base":
        from lit_ft.exporting.source import find_base, find_source

        other = find_source(cfg.against, Path(adapters))
        find_base(other, model)
        cfg.against = str(other.path)
    return cfg, wanted


def write_about(cfg: EvaluateConfig) -> tuple[Report, Path]:
    """Measure, write the report and say its verdicts; returns it and the page's place.

    Raises:
        UserError: something is missing or does not fit; what fails within a section is said there.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from lit_ft.evaluation.compare import Asked, compare
    from lit_ft.evaluation.page import as_text
    from lit_ft.evaluation.write import write_report
    from lit_ft.exporting.source import find_source

    assert cfg.adapter is not None
    harness = _check_tasks(cfg)
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
        metric_rows=cfg.metric_rows,
        answered=cfg.answered,
        max_new_tokens=cfg.max_new_tokens,
        texts=cfg.texts,
        instructions=cfg.instructions,
        pairs=cfg.pairs,
        own_answers=cfg.own_answers,
        kl_threshold=cfg.kl_threshold,
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


def _check_tasks(cfg: EvaluateConfig) -> Tasks | None:
    """The tasks of lm-evaluation-harness, if there are any; raises UserError where they cannot be had."""
    from lit_ft.evaluation.harness import Tasks, check_tasks

    own = cfg.lm_eval
    if not own.tasks:
        return None
    tasks = Tasks(tuple(own.tasks), own.limit, own.num_fewshot, own.include_path, own.apply_chat_template)
    check_tasks(tasks)
    return tasks


def _listed(given: Any) -> str | Sequence[str]:
    if given is None:
        return ()
    return given if isinstance(given, str) else [str(one) for one in given]


def main() -> Any:
    """The command line."""
    model_is_no_group()
    quote_conditions()
    launch(evaluate, "evaluate", EvaluateConfig)


if __name__ == "__main__":
    main()
