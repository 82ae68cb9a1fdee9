"""`fail_if`: conditions that hold, that do not, that cannot be decided, and that are none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lit_ft.errors import UserError
from lit_ft.evaluation import gate
from lit_ft.evaluation.gate import FIGURES, SECTIONS, conditions, reasons
from lit_ft.evaluation.report import Report
from lit_ft.evaluation.section import Figure, Section


def report(**changed: Section) -> Report:
    general = Figure("text_loss", "loss", "nats per token", 2.0, 2.03, 0.03, None, 0.04, 50)
    sections = {
        "gain": Section("gain", "Gain", "better", "It gained.", (Figure("lm_eval.b=c.acc", "odd", "", 1, 2, 1, 0, 2),)),
        "forgetting": Section("forgetting", "Forgetting", "worse", "It forgot.", (general,)),
        "bias": Section("bias", "Bias", "unchanged", "As before."),
        "cost": Section("cost", "Cost", "unknown", "No estimate."),
        **changed,
    }
    return Report("made@v1", "tiny", "base", "today", tuple(sections.values()))


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("forgetting=worse", True),
        ("forgetting == worse", True),
        ("forgetting!=worse", False),
        ("gain!=better", False),
        ("gain=better", True),
        ("gain=worse", False),
        ("bias=worse", False),
        ("cost=unknown", True),
        ("any=worse", True),
        ("forgetting.text_loss.change>0.02", True),
        ("forgetting.text_loss.change>0.03", False),
        ("forgetting.text_loss.change>=0.03", True),
        ("forgetting.text_loss.change<0.03", False),
        ("forgetting.text_loss.before<=2", True),
        ("forgetting.text_loss.after>2.02", True),
        ("forgetting.text_loss.high > 4e-2", False),
        ("forgetting.text_loss.rows<100", True),
        # The name of somebody's task may hold what parts the others.
        ("gain.lm_eval.b=c.acc.change>0.5", True),
        ("gain.lm_eval.b=c.acc.change<-0.5", False),
    ],
)
def test_conditions(text: str, holds: bool) -> None:
    found = reasons(conditions([text]), report())
    assert bool(found) == holds
    assert all(reason.startswith(f"{text}: ") for reason in found)


def test_reasons_say_what_was_found() -> None:
    wanted = conditions("forgetting=worse, forgetting.text_loss.change>0.02,, gain=worse")
    assert reasons(wanted, report()) == [
        "forgetting=worse: worse. It forgot.",
        "forgetting.text_loss.change>0.02: it is 0.03",
    ]


def test_any_names_each_section() -> None:
    found = reasons(conditions(["any!=better"]), report())
    assert [reason.split(": ")[1] for reason in found] == ["forgetting", "bias", "cost"]


def test_what_cannot_be_decided_does_not_pass() -> None:
    broken = report(bias=Section("bias", "Bias", "unknown", "", error="no column sent_less"))
    for text in ("bias=worse", "bias!=better", "bias.rate.change>0.1"):
        assert reasons(conditions([text]), broken) == [f"{text}: could not be measured: no column sent_less"]
    fine = report(forgetting=Section("forgetting", "Forgetting", "unchanged", ""))
    assert reasons(conditions(["any=worse"]), fine) == []
    fine_but_broken = Report("made@v1", "tiny", "base", "today", (*fine.sections[:2], broken.sections[2]))
    assert len(reasons(conditions(["any=worse"]), fine_but_broken)) == 1
    unsure = report(bias=Section("bias", "Bias", "unknown", "No pairs."))
    assert reasons(conditions(["bias=worse"]), unsure) == ["bias=worse: unknown, so it may be worse. No pairs."]
    text = "forgetting.text_loss.low>0.02"
    assert reasons(conditions([text]), report()) == [f"{text}: low was not measured"]


def test_nothing_asked() -> None:
    assert conditions("") == conditions([]) == conditions(" , ") == []
    assert reasons([], report()) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("forgetting", "is no condition"),
        ("=worse", "is no condition"),
        ("forgetting=", "is no condition"),
        ("forgeting=worse", "there are gain, forgetting, overfitting, bias, cost, and any"),
        ("forgetting=bad", "there are better, unchanged, worse, unjudged, unknown"),
        ("forgetting>worse", "compares a verdict with >"),
        ("forgetting.text_loss>0.1", "one of before, after, change, low, high, rows"),
        ("forgetting.text_loss.delta>0.1", "one of before, after, change, low, high, rows"),
        ("any.loss.change>0.1", "SECTION.FIGURE.FIELD"),
        ("gain.los.change>0.1", "the figure 'los'; gain can have loss, perplexity, accuracy"),
        ("forgetting.loss.change>0.1", "forgetting can have text_loss, instruction_loss, kl."),
        ("bias.lm_eval.arc.acc.change>0.1", "bias can have rate, difference."),
        ("cost=worse", "cost, which is not judged"),
        ("cost!=unchanged", "cost.seconds.after>3600"),
        ("gain.loss.change=0.1", "use <, <=, > or >="),
        ("gain.loss.change>much", "'much', which is no number"),
        ("gain.loss.change>nan", "'nan', which is no number"),
        ("gain.loss.change>inf", "'inf', which is no number"),
    ],
)
def test_what_is_no_condition(text: str, told: str) -> None:
    """Found before anything is measured, with what is allowed."""
    with pytest.raises(UserError) as found:
        conditions([text])
    assert told in str(found.value)
    assert text in str(found.value)


def test_what_the_report_has_not() -> None:
    with pytest.raises(UserError, match="'kl'; forgetting has text_loss"):
        reasons(conditions(["forgetting.kl.change>0.1"]), report())
    with pytest.raises(UserError, match="overfitting, and this report has gain, forgetting, bias, cost"):
        reasons(conditions(["overfitting=worse"]), report())


def test_what_is_shown_and_not_judged_does_not_count_for_any() -> None:
    cost = report(cost=Section("cost", "Cost", "unjudged", "12 s."))
    found = reasons(conditions(["any!=better"]), cost)
    assert [reason.split(": ")[1] for reason in found] == ["forgetting", "bias"]


def test_figures_that_will_not_be_measured() -> None:
    absent = {"gain.metric": "there is no metric", "gain.lm_eval.": "there are no tasks"}
    for text, why in (("gain.metric.after<0.5", "there is no metric"), ("gain.lm_eval.arc.acc.after<1", "no tasks")):
        with pytest.raises(UserError, match=f"will not have: .*{why}"):
            conditions([text], absent=absent)
        assert conditions([text])
    assert conditions(["gain.loss.after>1"], absent=absent)


@pytest.mark.parametrize("section", SECTIONS)
def test_all_figures_of_a_section_are_known(section: str) -> None:
    """Read from the code: a new one that is missing here would be refused before anything is measured."""
    code = (Path(gate.__file__).parent / f"{section}.py").read_text(encoding="utf-8")
    named = set(re.findall(r'(?i:figure|perplexity)\(\s*"([a-z_]+)"', code))
    named |= set(re.findall(r'^        \("([a-z_]+)", "', code, re.M))  # those of loops over names and labels
    assert named and named <= set(FIGURES[section])
