"""The panel beside the chat, as HTML: an adapter's card, or the base's."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import PureWindowsPath
from urllib.parse import quote

from lit_ft.adapter import REPORT, Adapter
from serve.reports import Finding, findings

BASE = "Base model"
"""What people call it."""

# `owner/name`, or a name alone; neither begins with a dot.
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# What a path to data ends in, and no dataset's id does.
DATA_FILE = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet|arrow|db|sqlite3?)(\.\w{2,3})?", re.IGNORECASE)

# The metrics that a stakeholder can use, in the order shown: what each is called, and whether it is a share. The names
# are TRL's, after the split; the whole list is in the adapter's model card.
METRICS = {
    "before/loss": ("Loss before training", False),
    "eval/loss": ("Held-out loss", False),
    "eval/mean_token_accuracy": ("Tokens predicted", True),
    "eval/rewards/accuracies": ("Prefers the chosen reply", True),
    "eval/rewards/margins": ("Reward margin", False),
}


def adapter_card(adapter: Adapter) -> str:
    """What it was made of, and how well it did."""
    card = adapter.card
    facts = [
        ("Base", source_name(card.base.id)),
        ("Trained", date(card.created)),
        ("Starts from", card.parent or "the base"),
    ]
    if card.rank is not None:
        facts.append(("LoRA rank", str(card.rank)))
    rows = [(source_name(part.source), f"{part.rows:,} rows") for part in card.data]
    metrics = [metric(name, card.metrics[name]) for name in METRICS if name in card.metrics]
    return (
        f"<div class='card'>{_head(adapter.ref, card.algorithm.upper())}{_pairs(facts)}"
        f"{_section('Data', rows)}{_found(adapter)}"
        f"{_section('Results in training', metrics)}{_link(adapter)}</div>"
    )


def _found(adapter: Adapter) -> str:
    """The verdicts and headline numbers of the report; nothing where none can be read."""
    found = findings(adapter.path)
    if found is None:
        return ""
    against = "the base" if found.against == "base" else found.against
    shown = "".join(
        f"<dt>{html.escape(one.title)}</dt>"
        f"<dd><span class='badge'>{one.verdict}</span> {html.escape(in_words(one))}</dd>"
        for one in found.sections
    )
    return f"<h4>{html.escape(f'Results beside {against}')}</h4><dl>{shown}</dl>"


def in_words(finding: Finding) -> str:
    """The headline of a section: `loss on held-out rows 2.354, before 3.793 (nats per token)`."""
    one = finding.headline
    if one is None:
        return "not measured" if finding.verdict == "unknown" else ""
    unit = "%" if one.unit == "%" else ""
    before = "" if one.before is None else f", before {one.before:.4g}{unit}"
    named = f" ({one.unit})" if one.unit and not unit else ""
    return f"{one.label} {one.after:.4g}{unit}{before}{named}"


def _link(adapter: Adapter) -> str:
    if not (adapter.path / REPORT / "report.html").is_file():
        return ""
    link = f"report/{quote(adapter.ref)}"  # beside the page, which may lie below a proxy's folder
    words = "Report: what it gained, what it forgot, what it cost"
    return f"<p><a href='{link}' target='_blank' rel='noopener'>{words}</a></p>"


def base_card(title: str, text: str) -> str:
    """The base model, as the server describes it."""
    paragraphs = "".join(f"<p>{html.escape(line)}</p>" for line in text.splitlines() if line.strip())
    return f"<div class='card'>{_head(title, 'base')}{paragraphs}</div>"


def metric(name: str, value: float) -> tuple[str, str]:
    """A metric as people read it: `eval/rewards/accuracies`, 0.8333 -> `Prefers the chosen reply`, `83%`."""
    label, share = METRICS[name]
    return label, f"{value:.0%}" if share else f"{value:.4g}"


def date(created: str) -> str:
    """`23 Nov 2026, 00:12 UTC`; an unreadable one as it is."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    moment = moment.astimezone(UTC) if moment.tzinfo else moment
    return f"{moment.day} {moment:%b %Y, %H:%M} UTC"


def source_name(source: str) -> str:
    """A file or folder by its name: where it lies on the server is nobody's business. A Hub id stays whole."""
    if HUB_ID.fullmatch(source) and not DATA_FILE.search(source):
        return source
    # Knows both separators; the scheme ends where a file's name may begin.
    return PureWindowsPath(re.sub("^file:", "/", source, flags=re.IGNORECASE)).name or source.strip("/\\")


def _head(title: str, badge: str) -> str:
    return f"<h3>{html.escape(title)} <span class='badge'>{html.escape(badge)}</span></h3>"


def _section(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    return f"<h4>{title}</h4>{_pairs(pairs)}" if pairs else ""


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>' for k, v in pairs)}</dl>"
