"""The adapters page: every version with its state, its use and its card; pin, retire, set as default."""

from __future__ import annotations

import html
from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr
from gradio.context import Context

from lit_ft.errors import UserError
from serve import cards
from serve.fleet import Fleet, Served, State, Version
from serve.pages.parts import QUICK, Look, Parts, notice, told

HEADERS = ["Version", "State", "Requests", "First token", "Tokens/s", "Trained with", "Published", "Why"]
WIDTHS = ["120px", "100px", "78px", "62px", "74px", "72px", "96px", "190px"]

READ_ONLY = "Only those whom this server's configuration names (auth.admins) may change what is served."


def build(parts: Parts) -> Look:
    """The page's components and events, in the Blocks and Tab that are open; returns what `app` has it draw."""
    tab = Context.block
    chosen = gr.State("")
    with gr.Row():
        with gr.Column(scale=7, min_width=320):
            table = gr.Dataframe(
                headers=HEADERS,
                column_widths=WIDTHS,
                datatype="str",
                interactive=False,
                show_search="filter",
                show_label=False,
                wrap=True,
                max_height=640,
                elem_id="versions",
            )
        with gr.Column(scale=3, min_width=280):
            card = gr.HTML("<p class='hint'>Choose a version to see its card.</p>", elem_id="version", padding=True)
            with gr.Row(elem_id="manage"):
                pin = gr.Button("Pin", size="sm", interactive=False, elem_id="pin")
                default = gr.Button("Set as default", size="sm", interactive=False, elem_id="default")
                retire = gr.Button("Retire", size="sm", variant="stop", interactive=False, elem_id="retire")
            line = gr.HTML(elem_id="managed", visible=False, container=False, padding=False)

    seen = [table, card, pin, default, retire]

    def drawn(ref: str, request: gr.Request) -> tuple[Any, ...]:
        return rows(parts), *_panel(parts, ref, parts.may_manage(request))

    def refused(error: UserError) -> tuple[Any, ...]:
        return *(gr.skip() for _ in seen), notice(told(error))

    async def on_refresh(ref: str, request: gr.Request) -> tuple[Any, ...]:
        try:
            parts.who(request)
        except UserError as error:
            return refused(error)
        return *drawn(ref, request), gr.skip()  # what a button said stays

    async def on_select(data: gr.SelectData, request: gr.Request) -> tuple[Any, ...]:
        try:
            parts.who(request)
        except UserError as error:
            return refused(error)
        # The row's own values: the table may be sorted, filtered or older than the fleet.
        ref = str(data.row_value[0]).removeprefix("★ ") if data.row_value else ""
        ref = parts.fleet.base_name if ref == cards.BASE else ref
        return ref, *_panel(parts, ref, parts.may_manage(request)), notice("")

    def acting(act: Callable[[str], str]) -> Callable[..., Any]:
        async def on_click(ref: str, request: gr.Request) -> tuple[Any, ...]:
            try:
                parts.who(request)
            except UserError as error:
                return refused(error)
            if not parts.may_manage(request):
                return *drawn(ref, request), notice(READ_ONLY)
            try:
                said = act(ref)
            except UserError as error:
                return *drawn(ref, request), notice(told(error))
            return *drawn(ref, request), notice(said, "note")

        return on_click

    table.select(on_select, None, [chosen, card, pin, default, retire, line], **QUICK)
    for button, act in ((pin, _pin), (default, _set_default), (retire, _retire)):
        button.click(acting(partial(act, parts.fleet)), chosen, [*seen, line], **QUICK)
    looked = [*seen, line]
    if isinstance(tab, gr.Tab):
        # Requests change the figures and not the revision, so the table is drawn anew when it comes into sight.
        tab.select(on_refresh, chosen, looked, **QUICK)

    async def draw(request: gr.Request, ref: str) -> dict[Any, Any]:
        return dict(zip(looked, await on_refresh(ref, request), strict=True))

    return Look(draw, [chosen], looked)


def rows(parts: Parts) -> list[list[str]]:
    """The table: the base, then every version by name, the newest first."""
    fleet = parts.fleet
    base = State.READY if fleet.up else State.LOADING
    found = [_row(fleet, cards.BASE, base.value, fleet.base_served, "", "", "", fleet.default == fleet.base_name)]
    for version in fleet.versions():
        adapter, state = version.adapter, fleet.state(version).value
        state += " · pinned" if version.pinned else ""
        algorithm = adapter.card.algorithm.upper() if adapter else ""
        published = cards.date(adapter.card.created) if adapter else ""
        why = fleet.reason(version)
        is_default = fleet.default == version.ref
        found.append(_row(fleet, version.ref, state, version.served, algorithm, published, why, is_default))
    return found


def _row(
    fleet: Fleet, ref: str, state: str, served: Served, algorithm: str, published: str, why: str, is_default: bool
) -> list[str]:
    requests = f"{served.requests:,}" + (f" ({served.failed:,} failed)" if served.failed else "")
    ttft, rate = served.median_ttft_s, served.median_tokens_per_s
    return [
        f"★ {ref}" if is_default else ref,
        state,
        requests,
        f"{ttft:.2f} s" if ttft is not None else "",
        f"{rate:.0f}" if rate is not None else "",
        algorithm,
        published,
        why,
    ]


def _panel(parts: Parts, ref: str, may: bool) -> tuple[Any, ...]:
    """The card of the chosen version, and what can be done with it."""
    fleet = parts.fleet
    if not ref:
        return gr.skip(), *(gr.update(interactive=False) for _ in range(3))
    if ref == fleet.base_name:
        pin, retire = gr.update(value="Pin", interactive=False), gr.update(value="Retire", interactive=False)
        return parts.card(ref), pin, gr.update(value=_default_label(fleet, ref), interactive=may), retire
    version = fleet.get(ref)
    if version is None:
        return "<p class='hint'>This version is gone.</p>", *(gr.update(interactive=False) for _ in range(3))
    why = fleet.reason(version)
    text = parts.card(ref) or f"<h3>{html.escape(ref)}</h3>"
    if why:
        text = f"<p class='why' role='note'>{html.escape(why)}</p>{text}"
    known = may and version.adapter is not None
    return (
        text,
        gr.update(value="Unpin" if version.pinned else "Pin", interactive=known and not version.problem),
        gr.update(value=_default_label(fleet, ref), interactive=known and version.askable),
        gr.update(value="Bring back" if version.withdrawn else "Retire", interactive=known and not version.problem),
    )


def _default_label(fleet: Fleet, ref: str) -> str:
    """Of the button that sets the default, and lets it go again."""
    return "Let the newest be default" if fleet.default_is_set and fleet.default == ref else "Set as default"


def _pin(fleet: Fleet, ref: str) -> str:
    version = _known(fleet, ref)
    fleet.pin(ref, not version.pinned)
    return f"{ref} is kept loaded when newer versions come." if version.pinned else f"{ref} is no longer pinned."


def _retire(fleet: Fleet, ref: str) -> str:
    version = _known(fleet, ref)
    fleet.retire(ref, not version.withdrawn)
    return f"{ref} is no longer served; requests in progress end first." if version.withdrawn else f"{ref} is back."


def _set_default(fleet: Fleet, ref: str) -> str:
    if fleet.default_is_set and fleet.default == ref:
        fleet.set_default(None)
        return "New chats begin with the adapter published last."
    fleet.set_default(ref)
    return f"New chats begin with {ref}."


def _known(fleet: Fleet, ref: str) -> Version:
    version = fleet.get(ref)
    if version is None:
        raise UserError(f"{ref or 'This version'} is gone. Choose another.")
    return version
