"""`fail_if`: conditions that hold, that do not, that cannot be decided, and that are none."""

from __future__ import annotations

import pytest

from lit_ft.errors import UserError
from lit_ft.evaluation.gate import conditions, reasons
from lit_ft.evaluation.report import Report
from lit_ft.evaluation.section import Figure, Section


def report(**changed: Section) -> Report:
    general = Figure("general_loss", "loss", "nats per token", 2.0, 2.03, 0.03, None, 0.04, 50)
    sections = {
        "gain": Section("gain", "Gain", "better", "It gained.", (Figure("a.b=c", "odd", "", 1, 2, 1, 0, 2),)),
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
        ("forgetting.general_loss.change>0.02", True),
        ("forgetting.general_loss.change>0.03", False),
        ("forgetting.general_loss.change>=0.03", True),
        ("forgetting.general_loss.change<0.03", False),
        ("forgetting.general_loss.before<=2", True),
        ("forgetting.general_loss.after>2.02", True),
        ("forgetting.general_loss.high > 4e-2", False),
        ("forgetting.general_loss.rows<100", True),
        # The name of a category may hold what parts the others.
        ("gain.a.b=c.change>0.5", True),
        ("gain.a.b=c.change<-0.5", False),
    ],
)
def test_conditions(text: str, holds: bool) -> None:
    found = reasons(conditions([text]), report())
    assert bool(found) == holds
    assert all(reason.startswith(f"{text}: ") for reason in found)


def test_reasons_say_what_was_found() -> None:
    wanted = conditions("forgetting=worse, forgetting.general_loss.change>0.02,, gain=worse")
    assert reasons(wanted, report()) == [
        "forgetting=worse: worse. It forgot.",
        "forgetting.general_loss.change>0.02: it is 0.03",
    ]


def test_any_names_each_section() -> None:
    found = reasons(conditions(["any!=better"]), report())
    assert [reason.split(": ")[1] for reason in found] == ["forgetting", "bias", "cost"]


def test_what_cannot_be_decided_does_not_pass() -> None:
    broken = report(bias=Section("bias", "Bias", "unknown", "", error="no column sent_less"))
    for text in ("bias=worse", "bias!=better", "bias.mean.change>0.1"):
        assert reasons(conditions([text]), broken) == [f"{text}: could not be measured: no column sent_less"]
    fine = report(forgetting=Section("forgetting", "Forgetting", "unchanged", ""))
    assert reasons(conditions(["any=worse"]), fine) == []
    fine_but_broken = Report("made@v1", "tiny", "base", "today", (*fine.sections[:2], broken.sections[2]))
    assert len(reasons(conditions(["any=worse"]), fine_but_broken)) == 1
    assert reasons(conditions(["cost=worse"]), report()) == ["cost=worse: unknown, so it may be worse. No estimate."]
    text = "forgetting.general_loss.low>0.02"
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
        ("forgetting=bad", "there are better, unchanged, worse, unknown"),
        ("forgetting>worse", "compares a verdict with >"),
        ("forgetting.general_loss>0.1", "one of before, after, change, low, high, rows"),
        ("forgetting.general_loss.delta>0.1", "one of before, after, change, low, high, rows"),
        ("any.loss.change>0.1", "SECTION.FIGURE.FIELD"),
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
    with pytest.raises(UserError, match="'general'; forgetting has general_loss"):
        reasons(conditions(["forgetting.general.change>0.1"]), report())
    with pytest.raises(UserError, match="overfitting, and this report has gain, forgetting, bias, cost"):
        reasons(conditions(["overfitting=worse"]), report())
