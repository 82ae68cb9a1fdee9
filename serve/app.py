"""The pages side by side in one Gradio app: chat, compare, adapters, results."""

from __future__ import annotations

import html
import os
from itertools import islice
from typing import Any

import gradio as gr

from serve.blocks import Blocks
from serve.pages import adapters, chat, compare, results
from serve.pages.parts import QUICK, REFRESH, Look, Parts
from serve.theme import TOGGLE_DARK_JS

SESSIONS = 2000
"""Pages that the server remembers, the latest ones: about a third of a megabyte each."""

QUEUE = 512
"""Events that may wait; past it people are told that the server is busy."""


def build(title: str, parts: Parts) -> gr.Blocks:
    """The pages, not yet served (see `serve.web`)."""
    # Gradio sends some of its telemetry by this variable, not by the argument below.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with Blocks(title=title, analytics_enabled=False) as page:
        with gr.Row(elem_id="top"):
            gr.HTML(f"<h1>{html.escape(title)}</h1>", elem_id="title", container=False)
            state = gr.HTML("", elem_id="state", container=False)
            dark = gr.Button("◐", elem_id="dark", variant="secondary", size="sm")
        # Pressed by live.js when the server has changed; never seen.
        refresh = gr.Button("refresh", elem_id="refresh", visible="hidden")
        looks: list[Look] = []
        with gr.Tabs(elem_id="pages"):
            for name, module in (("Chat", chat), ("Compare", compare), ("Adapters", adapters), ("Results", results)):
                with gr.Tab(name, id=name.lower()):
                    if look := module.build(parts):
                        looks.append(look)

        # One event for all pages: what an event costs the server is mostly not what it draws.
        async def on_look(request: gr.Request, *values: Any) -> dict[Any, Any]:
            updates: dict[Any, Any] = {state: state_line(parts)}
            given = iter(values)
            for look in looks:
                updates |= await look.draw(request, *islice(given, len(look.inputs)))
            return updates

        inputs = [part for look in looks for part in look.inputs]
        outputs = [state, *(part for look in looks for part in look.outputs)]
        for looked in (
            refresh.click(on_look, inputs, outputs, **REFRESH),
            page.load(on_look, inputs, outputs, **QUICK),
        ):
            for look in looks:
                look.then(looked.then)
        dark.click(None, js=TOGGLE_DARK_JS)
    # Also the events that Gradio makes itself, to give each session its own State.
    for event in page.fns.values():
        event.api_visibility = "private"
    page.state_session_capacity = SESSIONS
    page.queue(max_size=QUEUE, default_concurrency_limit=QUICK["concurrency_limit"])
    return page


def state_line(parts: Parts) -> str:
    """Under the title: what is served, or that the engine is away; `live.js` reads the revision."""
    fleet = parts.fleet
    names = {version.adapter.name for version in fleet.askable() if version.adapter}
    count = f"{len(names)} adapter{'' if len(names) == 1 else 's'} on one base model"
    text, kind = (count, "fine") if fleet.up else (fleet.down_reason, "away")
    role: Any = "" if fleet.up else " role='alert'"
    return f"<p class='{kind}' data-revision='{fleet.revision}'{role}>{html.escape(text)}</p>"
