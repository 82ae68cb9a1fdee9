"""The adapters page without a browser: its rows, its buttons, and who may press them."""

from __future__ import annotations

import asyncio
import html
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from serve.pages import adapters
from serve.pages.parts import Parts
from tests.serve.page_parts import REMOVED, made, passed, removed
from tests.serve.published import adapter
from tests.serve.stub_engine import Stub

NOWHERE = Stub(["base"], base_url="http://127.0.0.1:9/v1")
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    root = tmp_path / "adapters"
    return made(tmp_path, NOWHERE, [adapter(root, version=1), adapter(root, version=2, algorithm="dpo")])


def run(task: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(task, 30))


def row(parts: Parts, ref: str) -> dict[str, str]:
    found = [dict(zip(adapters.HEADERS, one, strict=True)) for one in adapters.rows(parts)]
    return next(one for one in found if one["Version"].removeprefix("★ ") == ref)


class Session:
    """One person at the page: its events are called as the page calls them, and what they return is kept."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        with gr.Blocks() as page:
            self.look = adapters.build(parts)
        ids = {block._id: block.elem_id for block in page.blocks.values()}
        # Three buttons share one function's name: they are told apart by what triggers them.
        self.events: dict[str, Any] = {
            str(ids[target]): event.fn for event in page.fns.values() for target, _ in event.targets
        }
        self.chosen = ""
        self.card = self.line = ""
        self.rows: list[list[str]] = []
        self.labels = {"pin": "Pin", "default": "Set as default", "retire": "Retire"}
        self.may: dict[str, bool] = dict.fromkeys(self.labels, False)

    async def choose(self, label: str) -> None:
        data = SimpleNamespace(row_value=[label, *[""] * 7])
        chosen, *panel, line = await self.events["versions"](data, None)
        self.chosen = self.chosen if chosen == gr.skip() else chosen
        self._show(panel)
        self.line = line["value"]

    async def press(self, button: str) -> None:
        rows, *panel, line = await self.events[button](self.chosen, None)
        self.rows = self.rows if rows == gr.skip() else rows
        self._show(panel)
        self.line = line["value"]

    async def refresh(self) -> None:
        rows, *panel, line = (await self.look.draw(None, self.chosen)).values()
        self.rows = self.rows if rows == gr.skip() else rows
        self._show(panel)
        self.line = line.get("value", self.line)

    def _show(self, panel: list[Any]) -> None:
        card, *buttons = panel
        self.card = card if isinstance(card, str) else self.card
        for name, update in zip(self.labels, buttons, strict=True):
            self.labels[name] = update.get("value", self.labels[name])
            self.may[name] = update.get("interactive", self.may[name])


# --- the rows ---


def test_the_base_comes_first_then_each_name_with_its_newest_version(parts: Parts, tmp_path: Path) -> None:
    async def main() -> None:
        passed(parts.fleet, adapter(tmp_path / "adapters", "legal", 1, created="2026-05-01T12:00:00+00:00"))
        parts.fleet.found("odd/v1", None)
        names = [one[0] for one in adapters.rows(parts)]
        assert names == ["Base model", "★ legal@v1", "support@v2", "support@v1", "odd/v1"]
        assert all(len(one) == len(adapters.HEADERS) == len(adapters.WIDTHS) for one in adapters.rows(parts))

    run(main())


def test_what_a_row_says(parts: Parts) -> None:
    found = row(parts, "support@v2")
    assert found["State"] == "ready" and found["Requests"] == "0"
    assert found["Trained with"] == "DPO" and found["Published"] == "2 Mar 2026, 12:00 UTC"
    assert found["First token"] == found["Tokens/s"] == found["Why"] == ""


def test_use_is_counted_and_its_medians_are_shown(parts: Parts) -> None:
    served = parts.fleet.stats("support@v2")
    for ttft, rate in ((0.1, 10.0), (0.3, 50.0), (0.2, 30.0)):
        served.add(False, ttft, rate)
    served.add(True)
    for _ in range(1200):
        parts.fleet.base_served.add(False)
    found = row(parts, "support@v2")
    assert (found["Requests"], found["First token"], found["Tokens/s"]) == ("4 (1 failed)", "0.20 s", "30")
    assert row(parts, "Base model")["Requests"] == "1,200"
    assert row(parts, "support@v1")["Requests"] == "0"


def test_every_state_has_its_word_and_its_reason(parts: Parts, tmp_path: Path) -> None:
    async def main() -> None:
        fleet, root = parts.fleet, tmp_path / "adapters"
        fleet.found("support@v3", adapter(root, version=3))
        broken = fleet.found("legal@v1", adapter(root, "legal", 1))
        fleet.quarantine(broken, "It was trained on another base.")
        await asyncio.sleep(0.01)  # what nobody needs is unloaded
        assert row(parts, "support@v3")["State"] == "loading"
        assert row(parts, "support@v2")["State"] == "ready"
        assert row(parts, "support@v1")["State"] == "retired"
        assert "support@v2 took its place" in row(parts, "support@v1")["Why"]
        assert row(parts, "legal@v1")["State"] == "quarantined"
        assert row(parts, "legal@v1")["Why"] == "It was trained on another base."

        fleet.pin("support@v2", True)
        fleet.retire("support@v1")
        assert row(parts, "support@v2")["State"] == "ready · pinned"
        assert row(parts, "support@v1")["Why"] == "Retired by hand."
        assert row(parts, "Base model")["State"] == "ready"
        fleet.engine_lost("Away.")
        assert row(parts, "Base model")["State"] == "loading"

    run(main())


def test_the_star_is_at_what_new_chats_begin_with(parts: Parts) -> None:
    def starred() -> list[str]:
        return [one[0] for one in adapters.rows(parts) if one[0].startswith("★")]

    async def main() -> None:
        assert starred() == ["★ support@v2"]
        parts.fleet.set_default("support@v1")
        assert starred() == ["★ support@v1"]
        parts.fleet.set_default("base")
        assert starred() == ["★ Base model"]

    run(main())


# --- the panel ---


def test_a_chosen_version_shows_its_card_and_what_can_be_done(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.choose("★ support@v2")
        assert session.chosen == "support@v2" and "DPO" in session.card and "class='card'" in session.card
        assert session.may == {"pin": True, "default": True, "retire": True}
        await session.choose("Base model")
        assert session.chosen == "base" and "SmolLM2." in session.card
        assert session.may == {"pin": False, "default": True, "retire": False}

    run(main())


def test_what_is_quarantined_can_only_be_read(parts: Parts, tmp_path: Path) -> None:
    async def main() -> None:
        broken = parts.fleet.found("legal@v1", adapter(tmp_path / "adapters", "legal", 1))
        parts.fleet.quarantine(broken, f"Its rank is too high. {EVIL}")
        nameless = parts.fleet.found(EVIL, None)
        parts.fleet.quarantine(nameless, "It has no card.")
        session = Session(parts)
        for label, why in (("legal@v1", "Its rank is too high."), (EVIL, "It has no card.")):
            await session.choose(label)
            assert why in session.card and "<img" not in session.card
            assert not any(session.may.values())

    run(main())


def test_a_version_that_is_gone_is_said_to_be(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.choose("support@v1")
        version = parts.fleet.get("support@v1")
        assert version is not None
        await parts.fleet.forget(version)
        await session.refresh()
        assert "gone" in session.card and not any(session.may.values())
        for button in ("pin", "retire", "default"):
            await session.press(button)
            assert "role='alert'" in session.line

    run(main())


# --- the buttons ---


def test_pinning_keeps_a_version_loaded_until_it_is_unpinned(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.choose("support@v1")
        await session.press("pin")
        assert session.labels["pin"] == "Unpin" and "is kept loaded" in session.line
        await asyncio.sleep(0.01)
        assert row(parts, "support@v1")["State"] == "ready · pinned"
        await session.press("pin")
        assert session.labels["pin"] == "Pin" and "no longer pinned" in session.line
        await asyncio.sleep(0.01)
        assert row(parts, "support@v1")["State"] == "retired"

    run(main())


def test_retiring_takes_a_version_out_of_service_and_back(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.choose("★ support@v2")
        await session.press("retire")
        assert session.labels["retire"] == "Bring back" and "no longer served" in session.line
        assert [ref for _, ref in parts.choices()] == ["support@v1", "base"]
        assert not session.may["default"], "what is not served cannot be the default"
        await session.press("retire")
        assert session.labels["retire"] == "Retire" and "is back" in session.line
        assert parts.choices()[0][1] == "support@v2"

    run(main())


def test_the_default_is_set_and_let_go(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.choose("support@v1")
        await session.press("default")
        assert parts.fleet.default == "support@v1" and "begin with support@v1" in session.line
        assert session.labels["default"] != "Set as default"
        await session.press("default")
        assert parts.fleet.default == "support@v2" and "published last" in session.line
        assert session.labels["default"] == "Set as default"

    run(main())


def test_the_base_can_be_the_default_and_another_again(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.choose("Base model")
        await session.press("default")
        assert parts.fleet.default == "base" and "role='alert'" not in session.line
        await session.press("default")  # the way back is where the way there was
        assert parts.fleet.default == "support@v2"

    run(main())


def test_who_may_not_manage_sees_all_and_changes_nothing(parts: Parts) -> None:
    async def main() -> None:
        session = Session(replace(parts, may_manage=lambda request: False))
        await session.refresh()
        assert len(session.rows) == 3
        for label in ("support@v1", "Base model"):
            await session.choose(label)
            assert session.card and not any(session.may.values())
        await session.choose("support@v1")
        revision = parts.fleet.revision
        for button in ("pin", "retire", "default"):  # a request can be made by hand
            await session.press(button)
            assert adapters.READ_ONLY in html.unescape(session.line) and "role='alert'" in session.line
        version = parts.fleet.get("support@v1")
        assert version is not None and not version.pinned and not version.withdrawn
        assert not parts.fleet.default_is_set and parts.fleet.revision == revision

    run(main())


def test_an_account_that_was_removed_is_told_so_and_shown_and_changes_nothing(parts: Parts) -> None:
    async def main() -> None:
        session = Session(replace(parts, who=removed))
        await session.refresh()
        assert session.rows == [] and REMOVED in session.line
        await session.choose("support@v1")
        assert (session.chosen, session.card) == ("", "") and REMOVED in session.line
        session.chosen, revision = "support@v1", parts.fleet.revision
        for button in ("pin", "retire", "default"):
            session.line = ""
            await session.press(button)
            assert REMOVED in session.line and "role='alert'" in session.line and session.rows == []
        assert parts.fleet.revision == revision

    run(main())


def test_what_a_button_said_stays_when_the_table_is_drawn_anew(parts: Parts) -> None:
    async def main() -> None:
        session = Session(parts)
        await session.choose("support@v1")
        await session.press("pin")
        parts.fleet.stats("support@v1").add(False)
        await session.refresh()
        assert "is kept loaded" in session.line
        assert next(one for one in session.rows if one[0] == "support@v1")[2] == "1"

    run(main())


def test_the_table_is_drawn_anew_when_its_tab_is_chosen(parts: Parts) -> None:
    with gr.Blocks() as page, gr.Tabs(), gr.Tab("Adapters") as tab:
        adapters.build(parts)
    selected = [event.fn for event in page.fns.values() if (tab._id, "select") in event.targets]
    assert [fn.__name__ for fn in selected if fn is not None] == ["on_refresh"]
