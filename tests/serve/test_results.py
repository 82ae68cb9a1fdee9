"""The results page without a browser: filters, figures and plots from votes, and the files to take away."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from lit_ft.errors import UserError
from serve import ranking
from serve.pages import plots, results
from serve.pages.parts import Parts
from serve.ranking import Model, Period, Vote
from serve.votes import EVERYTHING, Ballot, Sampling, Side, VoteStore
from tests.serve.page_parts import REMOVED, in_a_loop, made, passed, removed, with_weights
from tests.serve.published import BASE_HASH, adapter
from tests.serve.stub_engine import Stub

HOSTILE = "<script>alert('x')</script>\"&"
BASE = Model("base", "h")
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return made(tmp_path, Stub(models=["base"], base_url="http://127.0.0.1:9/v1"))


def cast(
    store: VoteStore,
    left: str,
    right: str | None,
    verdict: str,
    *,
    voter: str = "a",
    prompt: str = "Q",
    base_hash: str = BASE_HASH,
    blind: bool = True,
    hashes: dict[str, str] | None = None,
) -> None:
    """A vote, as the pages store it."""
    known = {"base": base_hash, **(hashes or {})}
    one = Side(left, known.get(left, "h"), f"by {left}")
    sides = one, Side(right, known.get(right, "h"), f"by {right}") if right else None
    messages = [{"role": "user", "content": prompt}]
    ballot = Ballot(voter, "bundled", base_hash, messages, *sides, Sampling(1, 1, 9, None), blind)
    store.vote(store.issue(ballot), voter, verdict)


def shown(parts: Parts, **changes: Any) -> tuple[str, list[str]]:
    """The page's body as HTML, and the models offered."""
    fields = {"models": [], "base": results.HERE, "since": None, "until": None, "blind": False, **changes}
    return results.report(parts, results.read_filters(parts.base.hash, **fields))


def text(markup: str) -> str:
    """What a person reads; fails on markup that is not well-formed."""
    return " ".join(ElementTree.fromstring(f"<div>{markup}</div>").itertext())


def votes(pairs: Iterable[tuple[str, str, Any]]) -> list[Vote]:
    return [Vote(Model(left, "h"), Model(right, "h"), verdict, "a", "Q", NOON) for left, right, verdict in pairs]


def name(model: Model) -> str:
    return model.ref


# --- filters ---


def test_days_are_utc_and_the_last_one_belongs_to_them() -> None:
    filters = results.read_filters("h", ["a"], results.HERE, "2026-11-01", "2026-11-02", True)
    assert filters.since == datetime(2026, 11, 1, tzinfo=UTC)
    assert filters.until == datetime(2026, 11, 3, tzinfo=UTC)
    assert (filters.base_hash, filters.refs, filters.blind_only) == ("h", ("a",), True)
    assert results.read_filters("h", None, results.EVERYWHERE, "", " ", False) == EVERYTHING


@pytest.mark.parametrize("day", ["soon", "2026-13-01", "23.11.2026", "9999-12-31"])
def test_what_is_no_day_is_said(day: str) -> None:
    with pytest.raises(UserError, match=r"Since .* is no day"):
        results.read_filters("h", [], results.HERE, day, None, False)


def test_days_in_the_wrong_order_are_said() -> None:
    with pytest.raises(UserError, match="before Since"):
        results.read_filters("h", [], results.HERE, "2026-11-02", "2026-11-01", False)


def test_the_filters_choose_the_votes(parts: Parts) -> None:
    store = parts.votes
    cast(store, "base", "a@v1", "right")
    cast(store, "a@v1", "b@v1", "left", blind=False)
    cast(store, "c@v1", "base", "tie", base_hash="another")
    assert tile(shown(parts)[0], "Comparisons") == "2"
    assert set(shown(parts)[1]) == {"base", "a@v1", "b@v1"}
    assert tile(shown(parts, base=results.EVERYWHERE)[0], "Comparisons") == "3"
    assert tile(shown(parts, blind=True)[0], "Comparisons") == "1"
    assert tile(shown(parts, models=["b@v1"])[0], "Comparisons") == "1"
    # The list does not shrink to what has been chosen from it.
    assert set(shown(parts, models=["b@v1"])[1]) == {"base", "a@v1", "b@v1"}
    assert "No votes fit these filters" in shown(parts, until="2001-01-01")[0]


def tile(markup: str, title: str) -> str:
    """The figure under that title."""
    found = re.search(f"<dt>{title}</dt>\\s*<dd>([^<]*?) <small>", markup)
    assert found
    return found[1]


# --- figures and plots ---


def test_without_votes_it_says_how_to_vote(parts: Parts) -> None:
    body, refs = shown(parts)
    assert "No votes yet" in body and "Compare" in body and refs == []


def test_figures_by_hand(parts: Parts) -> None:
    # Two people agree on the first prompt and not on the second; "a" took the left in 2 of 3 decisive votes.
    for voter, prompt, verdict in (("x", "1", "left"), ("y", "1", "left"), ("x", "2", "right"), ("y", "2", "tie")):
        cast(parts.votes, "a@v1", "base", verdict, voter=voter, prompt=prompt)
    cast(parts.votes, "base", None, "up")
    cast(parts.votes, "base", None, "down")
    cast(parts.votes, "base", None, "up")
    body, _ = shown(parts)
    assert tile(body, "Comparisons") == "4" and "by 2 people" in body
    assert tile(body, "Decisive") == "75%"
    assert tile(body, "Left preferred") == "67%" and "no sign of a position bias" in body
    assert tile(body, "Agreement") == "50%" and "of 2 pairs" in body
    assert (tile(body, "Thumbs up"), tile(body, "Thumbs down"), tile(body, "Better answers")) == ("2", "1", "0")
    # 2 wins and a tie out of 4; the base has the rest.
    low, high = ranking.wilson(2.5, 4)
    words = text(body)
    assert "62%" in words and f"{low:.0%} to {high:.0%}" in words
    assert words.index("a@v1") < words.index("Base model")


def test_one_name_of_several_weights_is_several_models(parts: Parts, tmp_path: Path) -> None:
    again = with_weights(adapter(tmp_path), "sha256:" + "a" * 64)
    in_a_loop(lambda: passed(parts.fleet, again))
    for weights, verdict in (("a" * 64, "left"), ("b" * 64, "right")):
        cast(parts.votes, "support@v1", "base", verdict, hashes={"support@v1": f"sha256:{weights}"})
    cast(parts.votes, "legal@v1", "base", "tie", base_hash="sha256:" + "c" * 64)
    here = text(shown(parts)[0])
    # Won one, lost one: as one model it would stand at 50%.
    assert "support@v1 · SFT (aaaaaaaa)" in here and "support@v1 (bbbbbbbb)" in here
    assert here.index("(aaaaaaaa)") < here.index("Base model") < here.index("(bbbbbbbb)")
    assert "Base model (" not in here and "Base model is 1000" in here
    everywhere = text(shown(parts, base=results.EVERYWHERE)[0])
    assert "Base model (cccccccc)" in everywhere and f"Base model ({BASE_HASH[7:15]}) is 1000" in everywhere
    assert "legal@v1 (" not in everywhere
    assert set(shown(parts)[1]) == {"support@v1", "base"}, "the filter is of names"


def test_an_account_that_was_removed_is_shown_and_given_nothing(parts: Parts) -> None:
    cast(parts.votes, "a@v1", "base", "left")
    with gr.Blocks() as page:
        results.build(replace(parts, who=removed))
    fields: tuple[Any, ...] = ([], results.HERE, None, None, False)
    events = [fn.fn for fn in page.fns.values() if fn.name in ("on_export", "on_show") and fn.fn is not None]
    assert len({event.__name__ for event in events}) == 2
    for event in events:
        said = {component.elem_id: value for component, value in asyncio.run(event(None, *fields)).items()}
        assert REMOVED in said.pop("results-notice")["value"]
        assert [value["value"] for value in said.values()] in ([], [None])


def test_names_from_outside_are_text(parts: Parts) -> None:
    cast(parts.votes, HOSTILE, "base", "left")
    body, _ = shown(parts)
    assert "<script" not in body and HOSTILE in text(body)


def test_the_anchor_has_no_interval_and_groups_stand_apart() -> None:
    drawn = results.strengths(votes([("base", "a", "left"), ("x", "y", "left"), ("a", "base", "tie")]), name, BASE)
    words = text(drawn)
    assert "1000  by definition" in words and "base is 1000" in words
    assert words.index("Never compared with those above") < words.index("x")
    assert text(results.strengths(votes([("a", "b", "left")]), name, BASE)).count("mean is 1000") == 1


def test_a_whisker_lies_where_its_numbers_say() -> None:
    svg = plots.intervals("C", "H", [plots.Estimate("m", 0.5, 0.25, 1.0, 8)], plots.SHARES)
    root = ElementTree.fromstring(svg)
    whisker = next(line for line in root.iter("line") if line.get("class") == "whisker")
    # The axis takes 5% to 95% of the width.
    assert (whisker.get("x1"), whisker.get("x2")) == ("27.50%", "95.00%")
    assert next(root.iter("circle")).get("cx") == "50.00%"
    assert any("m: 50%, 25% to 100%" in (one.get("aria-label") or "") for one in root.iter("svg"))


@pytest.mark.parametrize("low, high", [(1000, 1000), (999.9, 1000.1), (400, 1100), (-3000, 9000)])
def test_an_axis_holds_everything_and_has_few_round_ticks(low: float, high: float) -> None:
    axis = plots.around([plots.Estimate("m", (low + high) / 2, low, high, 1)], 1000, str)
    assert axis.low <= low and high <= axis.high and axis.low <= 1000 <= axis.high
    assert 2 <= len(axis.ticks) <= 6 and (axis.ticks[0], axis.ticks[-1]) == pytest.approx((axis.low, axis.high))
    assert 0 <= axis.place(low) <= axis.place(high) <= 100


def test_bars_are_as_high_as_their_counts_and_told_as_a_table() -> None:
    day = NOON.replace(hour=0)
    drawn = plots.bars("Votes", [Period(day, 4, 1), Period(day + timedelta(days=3), 2, 2)], "day")
    root = ElementTree.fromstring(drawn)
    heights = [(rect.get("class"), rect.get("height"), rect.get("x")) for rect in root.iter("rect")]
    assert heights == [
        ("undecided", "140.0", "0.00%"),
        ("decisive", "35.0", "0.00%"),
        ("undecided", "70.0", "75.00%"),
        ("decisive", "70.0", "75.00%"),
    ]
    rows = [[cell.text for cell in row] for row in root.iter("tr")]
    assert rows[1:] == [["26 Nov 2026", "2", "2"], ["23 Nov 2026", "4", "1"]]


@pytest.mark.parametrize(
    "days, bucket", [(0, "hour"), (2, "hour"), (3, "day"), (90, "day"), (91, "week"), (800, "month")]
)
def test_a_span_gets_a_readable_number_of_bars(days: int, bucket: str) -> None:
    assert plots.bucket_for(timedelta(days=days)) == bucket


def test_one_vote_can_be_drawn() -> None:
    for verdict in ("left", "tie"):
        assert "23 Nov 2026" in text(results.draw(votes([("a", "b", verdict)]), name, BASE))


def test_ten_thousand_votes_are_drawn_while_one_waits() -> None:
    models = [Model(one, "h") for one in "abcd"]
    many = [
        Vote(models[i % 4], models[(i + 1 + i % 3) % 4], ("left", "right", "tie")[i % 3], str(i % 50), str(i % 900), at)
        for i in range(10_000)
        for at in [NOON - timedelta(hours=i % 1000)]
    ]
    began = time.perf_counter()
    results.draw(many, name, models[0])
    assert time.perf_counter() - began < 5  # about 0.4 s on a free core


# --- export ---


def test_an_export_is_what_the_store_says_and_is_removed(parts: Parts, tmp_path: Path) -> None:
    cast(parts.votes, "a@v1", "base", "left", prompt="ünï")
    cast(parts.votes, "a@v1", "base", "tie")
    cast(parts.votes, "a@v1", None, "down")
    folder = tmp_path / "exports"
    path, rows = results.export(parts, EVERYTHING, True, folder)
    assert rows == 1 and path.name == "preferences.jsonl"
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "prompt": [{"role": "user", "content": "ünï"}],
        "chosen": [{"role": "assistant", "content": "by a@v1"}],
        "rejected": [{"role": "assistant", "content": "by base"}],
    }
    os.utime(path.parent, (0, 0))
    thumbs, rows = results.export(parts, EVERYTHING, False, folder)
    assert rows == 1 and json.loads(thumbs.read_text(encoding="utf-8"))["label"] is False
    assert not path.exists() and thumbs.exists()


def test_an_export_that_cannot_be_written_is_said(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        results.export(parts, EVERYTHING, True, tmp_path / "file" / "exports")


def test_the_page_exports_into_gradios_own_folder_or_says_that_there_is_nothing(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    with gr.Blocks() as page:
        results.build(parts)
    events = {name: [fn.fn for fn in page.fns.values() if fn.name == name] for name in ("on_export", "on_show")}
    fields: tuple[Any, ...] = ([], results.HERE, None, None, False)

    def said(update: dict[Any, Any]) -> SimpleNamespace:
        return SimpleNamespace(**{component.elem_id.replace("-", "_"): value for component, value in update.items()})

    nothing = said(asyncio.run(events["on_export"][0](None, *fields)))
    assert nothing.export_file["value"] is None and "nothing to export" in nothing.results_notice["value"]
    cast(parts.votes, "a@v1", "base", "left")
    found = said(asyncio.run(events["on_export"][0](None, *fields)))
    assert Path(found.export_file["value"]).is_relative_to(tmp_path / "gradio")
    wrong = said(asyncio.run(events["on_show"][0](None, *fields[:2], "soon", None, False)))
    assert "is no day" in wrong.results_notice["value"]
