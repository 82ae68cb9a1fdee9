"""`fail_if`: conditions on a report under which automation must not ship the adapter."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from lit_ft.errors import UserError
from lit_ft.evaluation.report import Report
from lit_ft.evaluation.section import Figure, Section, Verdict

SECTIONS = ("gain", "forgetting", "overfitting", "bias", "cost")
# The figures that a section can have, whatever the rows; those of tasks of lm-evaluation-harness are named after them.
FIGURES: dict[str, tuple[str, ...]] = {
    "gain": ("loss", "perplexity", "accuracy", "margin", "reward_accuracy", "reward_margin", "metric"),
    "forgetting": ("text_loss", "instruction_loss", "kl"),
    "overfitting": (
        "train_loss",
        "held_out_loss",
        "gap",
        "last_over_best",
        "published_over_best",
        "duplicates",
        "memorised_train",
        "memorised_held_out",
        "by_heart",
    ),
    "bias": ("rate", "difference"),
    "cost": (
        "trainable",
        "trainable_share",
        "seconds",
        "tokens",
        "speed",
        "adapter_size",
        "energy",
        "peak_memory",
    ),
}
TASKS = "lm_eval."
FIELDS = ("before", "after", "change", "low", "high", "rows")
ANY = "any"
_ORDERS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_VERDICTS: tuple[str, ...] = get_args(Verdict)
# The last relation parts the two sides: a figure named after a category of somebody's data may hold another.
_FORM = re.compile(r"\s*(?P<what>.+?)\s*(?P<relation><=|>=|!=|==|=|<|>)\s*(?P<value>[^<>=!]+?)\s*", re.DOTALL)
_FORMS = "SECTION=VERDICT, SECTION!=VERDICT or SECTION.FIGURE.FIELD>NUMBER (<, <=, >, >=)"


@dataclass(frozen=True)
class Condition:
    """One thing that must not be so."""

    text: str
    """As it was given."""
    section: str
    """The key of a section, or `any`."""
    relation: str
    """`=` or `!=` for a verdict; `<`, `<=`, `>` or `>=` for a figure."""
    verdict: str = ""
    """What the section's verdict is compared with, unless there is a figure."""
    figure: str = ""
    field: str = ""
    """Which number of the figure."""
    bound: float = 0.0
    """What that number is compared with."""


def conditions(
    given: str | Sequence[str], made: Sequence[str] = SECTIONS, absent: Mapping[str, str] | None = None
) -> list[Condition]:
    """What `fail_if` says, checked as far as it can be before anything is measured.

    Args:
        given: a list, or one string with commas between the conditions.
        made: the sections that the report will have.
        absent: figures that it will not have, as `SECTION.FIGURE`, and why not; `gain.lm_eval.` are all of tasks.

    Raises:
        UserError: a condition is none, or names a section, verdict, figure or field that the report will not have.
    """
    texts = given.split(",") if isinstance(given, str) else given
    found = [_condition(str(text).strip()) for text in texts if str(text).strip()]
    for condition in found:
        if condition.section not in (*made, ANY):
            raise _no_section(condition, made)
        of_task = condition.section == "gain" and condition.figure.startswith(TASKS)
        name = f"{condition.section}.{TASKS if of_task else condition.figure}"
        if why := (absent or {}).get(name):
            raise UserError(f"fail_if: {condition.text!r} needs a figure that this report will not have: {why}.")
    return found


def _no_section(condition: Condition, there: Sequence[str]) -> UserError:
    return UserError(
        f"fail_if: {condition.text!r} needs the section {condition.section}, and this report has "
        f"{', '.join(there) or 'none'}: let it be made, or drop the condition."
    )


def _condition(text: str) -> Condition:
    found = _FORM.fullmatch(text)
    if found is None:
        raise UserError(
            f"fail_if: {text!r} is no condition. Write {_FORMS}, such as forgetting=worse, any=worse or "
            "forgetting.text_loss.change>0.02."
        )
    what, relation, value = found["what"], found["relation"].replace("==", "="), found["value"]
    section, _, rest = what.partition(".")
    if section not in (*SECTIONS, ANY):
        raise UserError(
            f"fail_if: {text!r} names the section {section!r}; there are {', '.join(SECTIONS)}, and {ANY} for "
            "whichever."
        )
    if not rest:
        return _about_verdict(text, section, relation, value)
    figure, _, field = rest.rpartition(".")
    if section == ANY or not figure or field not in FIELDS:
        raise UserError(
            f"fail_if: {text!r} names no number of a figure. Write SECTION.FIGURE.FIELD, where FIELD is one "
            f"of {', '.join(FIELDS)}, such as gain.loss.change."
        )
    if figure not in FIGURES[section] and not (section == "gain" and figure.startswith(TASKS)):
        tasks = f", and {TASKS}TASK.METRIC" if section == "gain" else ""
        raise UserError(
            f"fail_if: {text!r} names the figure {figure!r}; {section} can have {', '.join(FIGURES[section])}{tasks}."
        )
    if relation not in _ORDERS:
        raise UserError(f"fail_if: {text!r} compares a number with {relation}; use <, <=, > or >=.")
    try:
        bound = float(value)
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise UserError(f"fail_if: {text!r} compares with {value!r}, which is no number; write one like 0.02.")
    return Condition(text, section, relation, figure=figure, field=field, bound=bound)


def _about_verdict(text: str, section: str, relation: str, value: str) -> Condition:
    if relation in _ORDERS:
        raise UserError(
            f"fail_if: {text!r} compares a verdict with {relation}; use {section}=worse or {section}!=better, "
            f"or name a number, {section}.FIGURE.FIELD{relation}{value}."
        )
    if value not in _VERDICTS:
        raise UserError(f"fail_if: {text!r} asks for the verdict {value!r}; there are {', '.join(_VERDICTS)}.")
    if section == "cost" and value not in ("unjudged", "unknown"):
        raise UserError(
            f"fail_if: {text!r} asks for a verdict on cost, which is not judged: name a number, such as "
            "cost.seconds.after>3600."
        )
    return Condition(text, section, relation, verdict=value)


def reasons(wanted: Sequence[Condition], report: Report) -> list[str]:
    """Why the adapter must not be shipped: a line for each condition that holds, none if it may.

    What could not be measured never passes: a condition on a section or figure that is unknown holds too, and so does
    `any` where a section could not be made. A section that is `unknown` by its nature does not make `any=worse` hold;
    one that is `unjudged` does not count for `any`.

    Raises:
        UserError: a condition names a section or figure that this report has not.
    """
    return [f"{condition.text}: {why}" for condition in wanted for why in _why(condition, report)]


def _why(condition: Condition, report: Report) -> list[str]:
    if condition.section == ANY:
        held = [(section, _by_verdict(condition, section)) for section in report.sections]
        return [f"{section.key}: {why}" for section, why in held if why]
    section = next((section for section in report.sections if section.key == condition.section), None)
    if section is None:
        raise _no_section(condition, [section.key for section in report.sections])
    why = _by_figure(condition, section) if condition.figure else _by_verdict(condition, section)
    return [why] if why else []


def _by_verdict(condition: Condition, section: Section) -> str:
    """Why the condition holds, or nothing."""
    if section.error is not None:
        return f"could not be measured: {section.error}"
    if section.verdict == "unjudged" and condition.section == ANY:
        return ""
    if (section.verdict == condition.verdict) == (condition.relation == "="):
        return f"{section.verdict}. {section.sentence}".rstrip()
    if section.verdict == "unknown" and condition.section != ANY and condition.relation == "=":
        return f"unknown, so it may be {condition.verdict}. {section.sentence}".rstrip()
    return ""


def _by_figure(condition: Condition, section: Section) -> str:
    """Why the condition holds, or nothing."""
    if section.error is not None:
        return f"could not be measured: {section.error}"
    figure = next((figure for figure in section.figures if figure.name == condition.figure), None)
    if figure is None:
        there = ", ".join(figure.name for figure in section.figures) or "none"
        raise UserError(
            f"fail_if: {condition.text!r} names the figure {condition.figure!r}; {section.key} has {there}."
        )
    value = _number(figure, condition.field)
    if value is None or not math.isfinite(value):
        return f"{condition.field} was not measured"
    return f"it is {value:.6g}" if _ORDERS[condition.relation](value, condition.bound) else ""


def _number(figure: Figure, field: str) -> float | None:
    numbers: dict[str, float | None] = {
        "before": figure.before,
        "after": figure.after,
        "change": figure.change,
        "low": figure.low,
        "high": figure.high,
        "rows": figure.rows,
    }
    return numbers[field]
