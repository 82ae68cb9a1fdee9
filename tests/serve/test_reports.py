"""What a card shows of the report in an adapter's folder, and that no damaged report harms it."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_ft.adapter import Adapter
from lit_ft.evaluation.page import as_json
from lit_ft.evaluation.report import Report
from lit_ft.evaluation.section import Figure, Section
from lit_ft.evaluation.write import write_report
from serve.cards import adapter_card
from serve.reports import findings
from tests.serve import published

GAIN = Section(
    "gain",
    "Gain",
    "better",
    "Loss fell.",
    figures=(Figure("loss", "loss on held-out rows", "nats per token", 3.79312, 2.35449, -1.43863, -1.6, -1.3, 40),),
)
FORGETTING = Section(
    "forgetting",
    "Forgetting",
    "worse",
    "It forgot.",
    figures=(
        Figure("text_loss", "loss on general texts", "nats per token", 3.0, 3.1, 0.1, 0.05, 0.15, 40),
        Figure("kl", "KL(base ‖ tuned)", "nats per token", 0.0, 0.25, 0.25, 0.2, 0.3, 12),
    ),
)
BIAS = Section(
    "bias", "Bias", "unchanged", "", figures=(Figure("rate", "stereotype likelier", "%", 51.0, 52.5, 1.5, -3, 6, 90),)
)
OVERFITTING = Section("overfitting", "Overfitting", "unknown", "", error="There are no training rows.")
COST = Section("cost", "Cost", "unchanged", "", figures=(Figure("seconds", "time", "s", None, 9.0, None, None, None),))
REPORT = Report("support@v1", "bundled", "base", "2026-03-01 14:05 UTC", (GAIN, FORGETTING, OVERFITTING, BIAS, COST))


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return published.adapter(tmp_path / "adapters")


def shown(adapter: Adapter) -> str:
    """The card as a person reads it."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", adapter_card(adapter))).split())


def test_the_card_shows_verdicts_and_numbers_of_the_report(adapter: Adapter) -> None:
    assert "beside" not in shown(adapter)
    write_report(REPORT, adapter.path / "report")
    text = shown(adapter)
    assert "Results beside the base" in text
    assert "Gain better loss on held-out rows 2.354, before 3.793 (nats per token)" in text
    assert "Forgetting worse loss on general texts 3.1, before 3 (nats per token)" in text
    assert "Overfitting unknown not measured" in text
    assert "Bias unchanged stereotype likelier 52.5%, before 51%" in text
    assert "Cost" not in text
    # What training itself measured stays beside it.
    assert "Results in training" in text


def test_a_new_report_is_seen(adapter: Adapter) -> None:
    write_report(REPORT, adapter.path / "report")
    assert "Gain better" in shown(adapter)
    other = replace(REPORT, against="support@v9", sections=(replace(GAIN, verdict="unchanged"),))
    write_report(other, adapter.path / "report")
    assert "Results beside support@v9 Gain unchanged" in shown(adapter)


def test_nothing_of_a_report_is_markup(adapter: Adapter) -> None:
    figure = replace(GAIN.figures[0], label="<script>alert(1)</script>", unit="<b>")
    write_report(
        replace(REPORT, against="<img src=x>", sections=(replace(GAIN, title="<i>Gain</i>", figures=(figure,)),)),
        adapter.path / "report",
    )
    card = adapter_card(adapter)
    assert "&lt;script&gt;" in card and "&lt;img" in card
    assert not re.search("<script|<img|<i>|<b>", card)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"sections": []}', '{"sections": {"gain": 3}}', '{"sections": {}}', "[" * 100_000, "\x00"],
)
def test_a_damaged_report_is_none(adapter: Adapter, text: str) -> None:
    before = adapter_card(adapter)
    (adapter.path / "report").mkdir()
    (adapter.path / "report" / "report.json").write_text(text)
    assert findings(adapter.path) is None and adapter_card(adapter) == before


@pytest.mark.parametrize(
    ("field", "value", "seen"),
    [
        ("after", None, "Gain better"),
        ("after", "2", "Gain better"),
        ("after", True, "Gain better"),
        ("after", 10**400, "Gain better"),
        ("before", float("nan"), "Gain better loss on held-out rows 2.354 (nats per token)"),
        ("label", ["loss"], "Gain better 2.354, before 3.793"),
    ],
)
def test_a_damaged_figure_is_left_out(adapter: Adapter, field: str, value: Any, seen: str) -> None:
    written = as_json(replace(REPORT, sections=(GAIN, BIAS)))
    written["sections"]["gain"]["figures"]["loss"][field] = value
    (adapter.path / "report").mkdir()
    (adapter.path / "report" / "report.json").write_text(json.dumps(written))
    assert seen in shown(adapter) and "Bias unchanged stereotype likelier 52.5%, before 51%" in shown(adapter)


def test_an_unknown_verdict_is_left_out(adapter: Adapter) -> None:
    written = as_json(replace(REPORT, sections=(GAIN, BIAS)))
    written["sections"]["gain"]["verdict"] = "<b>splendid</b>"
    (adapter.path / "report").mkdir()
    (adapter.path / "report" / "report.json").write_text(json.dumps(written))
    assert "Gain" not in shown(adapter) and "Bias unchanged" in shown(adapter)
