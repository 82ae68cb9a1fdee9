"""The results page: which model people prefer and how sure that is, and the votes to take away."""

from __future__ import annotations

import asyncio
import html
import logging
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from lit_ft.errors import UserError
from serve import ranking
from serve.pages import plots
from serve.pages.parts import QUICK, Parts, notice, told
from serve.votes import Filters

logger = logging.getLogger(__name__)

# An exported file is needed for as long as its download takes.
EXPORT_S = 600.0

HERE, EVERYWHERE = "Served here", "Any"

# The link's address is known to the page only after the file has been written.
DOWNLOAD_JS = """(file) => {
  if (!file) return;
  const link = document.createElement("a");
  link.href = file.url;
  link.download = file.orig_name || "";
  document.body.append(link);
  link.click();
  link.remove();
}"""

HOW_TO_VOTE = (
    "<div class='empty'><h3>No votes yet</h3><p>Open <strong>Compare</strong>, send a message, and say which of the "
    "two replies is better. Thumbs and better answers are given on the <strong>Chat</strong> page.</p></div>"
)
NOTHING_FITS = "<div class='empty'><h3>No votes fit these filters</h3><p>Remove one of them to see more.</p></div>"


def build(parts: Parts) -> None:
    """The page's components and events; the results are drawn when their tab is opened."""
    tab = Context.block
    with gr.Row(elem_id="filters"):
        models = gr.Dropdown(
            [], value=[], multiselect=True, label="Votes with any of", elem_id="results-models", scale=4, min_width=220
        )
        base = gr.Dropdown([HERE, EVERYWHERE], value=HERE, label="Base", elem_id="results-base", scale=2, min_width=150)
        since, until = (
            gr.DateTime(
                include_time=False,
                type="string",
                label=f"{label} (UTC day)",
                elem_id=f"results-{label.lower()}",
                scale=2,
                min_width=150,
            )
            for label in ("Since", "Until")
        )
        blind_only = gr.Checkbox(False, label="Blind votes only", elem_id="results-blind", scale=1, min_width=160)
    with gr.Row(elem_id="results-actions"):
        again = gr.Button("Refresh", elem_id="results-refresh", size="sm")
        pairs = gr.Button("Export pairs (JSONL)", elem_id="export-pairs", size="sm")
        thumbs = gr.Button("Export thumbs (JSONL)", elem_id="export-thumbs", size="sm")
    file = gr.DownloadButton("Download", elem_id="export-file", visible="hidden")
    line = gr.HTML(elem_id="results-notice", elem_classes="line", visible=False, container=False, padding=False)
    body = gr.HTML(HOW_TO_VOTE, elem_id="results", container=False, padding=False)

    chosen = [models, base, since, until, blind_only]

    async def on_show(request: gr.Request, *values: Any) -> dict[Any, Any]:
        try:
            parts.who(request)
            filters = read_filters(parts.base.hash, *values)
            shown, refs = await asyncio.to_thread(report, parts, filters)
        except Exception as error:
            if not isinstance(error, UserError):
                logger.exception("The results could not be drawn.")
            return {line: notice(told(error))}
        # One that has been chosen stays in the list, so that it can be removed from the choice.
        choices = [(parts.label(ref), ref) for ref in sorted({*refs, *(values[0] or [])})]
        return {body: shown, line: notice(""), models: gr.update(choices=choices)}

    def exporting(paired: bool) -> Callable[..., Any]:
        async def on_export(request: gr.Request, *values: Any) -> dict[Any, Any]:
            folder = Path(file.GRADIO_CACHE) / "exports"
            try:
                parts.who(request)
                filters = read_filters(parts.base.hash, *values)
                path, rows = await asyncio.to_thread(export, parts, filters, paired, folder)
            except Exception as error:
                if not isinstance(error, UserError):
                    logger.exception("An export failed.")
                return {file: gr.update(value=None), line: notice(told(error))}
            asyncio.get_running_loop().call_later(EXPORT_S, shutil.rmtree, path.parent, True)
            what = "decisive votes and edits" if paired else "thumbs"
            if not rows:
                text = f"There is nothing to export: no {what} fit these filters."
                return {file: gr.update(value=None), line: notice(text, "note")}
            return {file: gr.update(value=str(path)), line: notice(f"Exported {rows:,} {what}.", "note")}

        return on_export

    shown = (chosen, [body, line, models])
    gr.on(
        [again.click, base.change, models.change, since.change, until.change, blind_only.change],
        on_show,
        *shown,
        **QUICK,
    )
    if isinstance(tab, gr.Tab):
        tab.select(on_show, *shown, **QUICK)
    for button, paired in ((pairs, True), (thumbs, False)):
        button.click(exporting(paired), chosen, [file, line], **QUICK).then(None, file, None, js=DOWNLOAD_JS)


def read_filters(
    base_hash: str, models: Sequence[str] | None, base: str | None, since: str | None, until: str | None, blind: bool
) -> Filters:
    """What the page's fields mean.

    Raises:
        UserError: a day cannot be read, or they end before they begin.
    """
    first, last = read_day(since, "Since"), read_day(until, "Until")
    if first and last and last < first:
        raise UserError(f"Until ({last:%Y-%m-%d}) is before Since ({first:%Y-%m-%d}): choose a later day, or none.")
    return Filters(
        base_hash=None if base == EVERYWHERE else base_hash,
        refs=tuple(models or ()),
        since=first,
        until=last + timedelta(days=1) if last else None,  # that day belongs to it
        blind_only=bool(blind),
    )


def read_day(text: str | None, field: str) -> datetime | None:
    """The beginning of a day in UTC; raises UserError for what is none."""
    if not text or not text.strip():
        return None
    try:
        day = date.fromisoformat(text.strip()[:10])
        moment = datetime.combine(day, time_of_day(), UTC)
        moment + timedelta(days=1)  # the last day that a date can name has none after it
    except (ValueError, OverflowError):
        raise UserError(
            f"{field} {text.strip()[:40]!r} is no day. Write it as 2026-11-23, or leave it empty."
        ) from None
    return moment


def report(parts: Parts, filters: Filters) -> tuple[str, list[str]]:
    """The page's body, and the models that its list offers. Blocks: call it in a thread."""
    votes = parts.votes.comparisons(filters)
    counts = parts.votes.counts()
    listed = votes
    if filters.refs:
        listed = parts.votes.comparisons(Filters(base_hash=filters.base_hash))
    refs = list(dict.fromkeys(ref for vote in listed for ref in (vote.left.ref, vote.right.ref)))
    if not any(sum(verdicts.values()) for verdicts in counts.values()):
        return HOW_TO_VOTE, refs
    anchor = ranking.Model(parts.fleet.base_name, parts.base.hash)
    sections = draw(votes, names(parts, votes), anchor) if votes else NOTHING_FITS
    return sections + other_votes(counts), refs


def names(parts: Parts, votes: Sequence[ranking.Vote]) -> Callable[[ranking.Model], str]:
    """What each model is called: its label, and a piece of its hash where another had the same full name."""
    models = {model for vote in votes for model in (vote.left, vote.right)}
    alike = Counter(model.ref for model in models)

    def name(model: ranking.Model) -> str:
        here = model.ref == parts.fleet.base_name or model.hash == parts.hash_of(model.ref)
        label = parts.label(model.ref) if here else model.ref  # how another one was trained is not known
        return f"{label} ({short(model.hash)})" if alike[model.ref] > 1 else label

    return name


def short(digest: str) -> str:
    """Enough of a hash to tell two apart at a glance."""
    return digest.removeprefix("sha256:")[:8] or "unknown"


def draw(votes: Sequence[ranking.Vote], name: Callable[[ranking.Model], str], anchor: ranking.Model) -> str:
    """All that comparisons say, as HTML. There must be one at least."""
    return "".join(
        [
            tiles(votes),
            "<div class='two'>",
            f"<section>{win_rates(votes, name)}</section><section>{strengths(votes, name, anchor)}</section>",
            "</div>",
            f"<section>{over_time(votes)}</section>",
        ]
    )


def tiles(votes: Sequence[ranking.Vote]) -> str:
    """The figures that stand above the plots."""
    voters = len({vote.voter for vote in votes})
    decisive = sum(vote.verdict in ("left", "right") for vote in votes)
    found = [
        ("Comparisons", f"{len(votes):,}", f"by {voters:,} {'person' if voters == 1 else 'people'}"),
        ("Decisive", f"{decisive / len(votes):.0%}", f"{len(votes) - decisive:,} ties or both bad"),
    ]
    bias = ranking.position_bias(votes)
    if bias is None:
        found.append(("Left preferred", "–", "no decisive vote yet"))
    else:
        fair = bias.low <= 0.5 <= bias.high
        words = "no sign of a position bias" if fair else "more one-sided than chance allows"
        found.append(("Left preferred", f"{bias.rate:.0%}", f"{bias.low:.0%} to {bias.high:.0%}: {words}"))
    agreed = ranking.agreement(votes)
    if agreed.share is None:
        found.append(("Agreement", "–", "no two people have judged the same yet"))
    else:
        alpha = "" if agreed.alpha is None else f" · Krippendorff's α {agreed.alpha:.2f}"
        found.append(("Agreement", f"{agreed.share:.0%}", f"of {_number(agreed.pairs, 'pair')} of votes{alpha}"))
    return _tiles(found)


def other_votes(counts: dict[str, dict[str, int]]) -> str:
    """What is stored beside comparisons."""
    edits = counts["edit"]["right"]
    thumbs = counts["thumbs"]
    compare = counts["compare"]
    found = [
        ("Comparisons", f"{sum(compare.values()):,}", f"{compare['left'] + compare['right']:,} decisive"),
        ("Thumbs up", f"{thumbs['up']:,}", "on the Chat page"),
        ("Thumbs down", f"{thumbs['down']:,}", "on the Chat page"),
        ("Better answers", f"{edits:,}", "written by people, each a pair to train on"),
    ]
    return f"<section><h3>All that is stored, whatever the filters</h3>{_tiles(found)}</section>"


def win_rates(votes: Sequence[ranking.Vote], name: Callable[[ranking.Model], str]) -> str:
    """The plot of win rates."""
    rates = [
        plots.Estimate(name(one.model), one.rate, one.low, one.high, one.votes) for one in ranking.win_rates(votes)
    ]
    return (
        plots.intervals("Win rate", "95% interval", rates, plots.SHARES)
        + "<p class='note'>Of all comparisons of a model, whoever the other was. A tie, or both bad, is half a win.</p>"
    )


def strengths(votes: Sequence[ranking.Vote], name: Callable[[ranking.Model], str], anchor: ranking.Model) -> str:
    """The Bradley–Terry ranking; models that no votes connect stand in plots of their own."""
    found = ranking.bradley_terry(votes, anchor)
    parts = []
    for group in found.groups:
        members = [one for one in found.strengths if one.model in group]
        estimates = [plots.Estimate(name(one.model), one.strength, one.low, one.high, one.votes) for one in members]
        axis = plots.around(estimates, ranking.MEAN, lambda value: f"{value:.0f}")
        caption = "Bradley–Terry ranking" if group == found.groups[0] else "Never compared with those above"
        parts.append(plots.intervals(caption, "95% interval", estimates, axis))
    middle = f"{name(anchor)} is {ranking.MEAN:.0f}" if anchor in found.groups[0] else "Their mean is 1000"
    return (
        "".join(parts)
        + f"<p class='note'>Takes into account who each model was compared with. {html.escape(middle)}; 100 points "
        "more mean winning 64% of the comparisons. Where intervals overlap, more votes are needed.</p>"
    )


def over_time(votes: Sequence[ranking.Vote]) -> str:
    """The plot of votes over time."""
    moments = [vote.voted for vote in votes]
    bucket = plots.bucket_for(max(moments) - min(moments))
    return plots.bars(f"Comparisons by {bucket}", ranking.over_time(votes, bucket), bucket)


def export(parts: Parts, filters: Filters, paired: bool, folder: Path) -> tuple[Path, int]:
    """Write the votes as JSONL into a folder of its own below `folder`; how many lines. Blocks: call it in a thread.

    Raises:
        UserError: it cannot be written, or the votes not be read.
    """
    name = "preferences.jsonl" if paired else "thumbs.jsonl"
    rows = 0
    try:
        remove_old(folder)
        # Whoever knows a file's address can fetch it: it is not to be guessed.
        path = folder / secrets.token_urlsafe(18) / name
        path.parent.mkdir(parents=True)
        with path.open("w", encoding="utf-8") as lines:
            for line in parts.votes.export_jsonl(filters, paired=paired):
                lines.write(line)
                rows += 1
    except OSError as error:
        raise UserError(
            f"The export could not be written: {error.strerror or error}. Make room and try again."
        ) from error
    return path, rows


def remove_old(folder: Path) -> None:
    """Exports that a server which has ended since did not remove."""
    if folder.is_dir():
        for one in folder.iterdir():
            if time.time() - one.stat().st_mtime > EXPORT_S:
                shutil.rmtree(one, ignore_errors=True)


def _tiles(found: Iterable[tuple[str, str, str]]) -> str:
    return (
        "<dl class='tiles'>"
        + "".join(
            f"<div><dt>{html.escape(title)}</dt>"
            f"<dd>{html.escape(figure)} <small>{html.escape(words)}</small></dd></div>"
            for title, figure, words in found
        )
        + "</dl>"
    )


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
