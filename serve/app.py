"""The chat page: choose a model, talk to it, see what it is made of.

Imports the client and the registry, never vllm.
"""

from __future__ import annotations

import html
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import gradio as gr

from lit_ft.adapter import Adapter
from lit_ft.errors import UserError
from serve import cards
from serve.client import EngineClient, Timing
from serve.conversation import Message, as_typed, for_engine, for_page, up_to_question
from serve.registry import Refused, newest_first
from serve.stopping import Stop, until
from serve.theme import CSS, TOGGLE_DARK_JS, theme

logger = logging.getLogger(__name__)

BASE_LABEL = "Base model"

# As many at once as the engine is happy to batch; the rest wait their turn, and past QUEUE they are told so.
CONCURRENT_CHATS = 32
QUEUE = 128

# Redrawing the whole conversation for each token costs more than the eye gains.
REDRAW_S = 0.05


def build(
    title: str,
    client: EngineClient,
    base_name: str,
    base_card_text: str,
    adapters: Sequence[Adapter],
    refused: Sequence[Refused],
    max_model_len: int,
) -> gr.Blocks:
    """The page, not yet served (see `launch`).

    Args:
        title: shown at the top and in the browser's tab.
        client: where replies come from.
        base_name: the base's model name in the engine.
        base_card_text: what the panel says about the base, a paragraph per line.
        adapters: the adapters that the engine serves.
        refused: the adapters found that it does not, with the reasons.
        max_model_len: tokens of context; bounds the length of a reply.
    """
    # Gradio sends some of its telemetry by this variable, not by the argument below.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    adapters = sorted(adapters, key=newest_first)
    labels = {one.ref: f"{one.ref} · {one.card.algorithm.upper()}" for one in adapters} | {base_name: BASE_LABEL}
    panels = {one.ref: cards.adapter_card(one) for one in adapters}
    panels[base_name] = cards.base_card(BASE_LABEL, base_card_text)
    first = next(iter(labels))

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        # Callables: every session gets its own.
        history = gr.State(list)
        stop = gr.State(Stop)
        with gr.Row(elem_id="top"):
            count = f"{len(adapters)} adapter{'' if len(adapters) == 1 else 's'} on one base model"
            gr.HTML(f"<h1>{html.escape(title)}</h1><p>{count}</p>", elem_id="title", container=False)
            dark = gr.Button("◐", elem_id="dark", variant="secondary", size="sm")
        with gr.Row():
            with gr.Column(scale=7, min_width=320, elem_id="talk"):
                model = gr.Dropdown(
                    [(label, name) for name, label in labels.items()],
                    value=first,
                    label="Model",
                    elem_id="model",
                    filterable=len(labels) > 8,
                )
                chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    sanitize_html=True,
                    allow_tags=False,
                    editable="user",
                    buttons=["copy"],
                    layout="bubble",
                    placeholder="**Ask anything.** You can change the model between messages: "
                    "each reply says who wrote it.",
                )
                notice = gr.HTML(elem_id="notice", visible=False, container=False, padding=False)
                with gr.Row(elem_id="ask"):
                    box = gr.Textbox(
                        "",
                        placeholder="Write a message, Enter sends it",
                        lines=1,
                        max_lines=8,
                        show_label=False,
                        container=False,
                        autofocus=True,
                        elem_id="box",
                        scale=10,
                    )
                    send = gr.Button("Send", variant="primary", elem_id="send")
                    stop_button = gr.Button("Stop", variant="stop", elem_id="stop", visible=False)
                    clear = gr.Button("Clear", elem_id="clear")
            with gr.Column(scale=3, min_width=280):
                card = gr.HTML(panels[first], elem_id="card", container=True, padding=True)
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    system = gr.Textbox("", label="System prompt", lines=3, placeholder="None", elem_id="system")
                    temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", elem_id="temperature")
                    top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p", elem_id="top-p")
                    longest = max(1, max_model_len - 1)
                    max_tokens = gr.Slider(
                        1, longest, min(256, longest), step=1, label="Longest reply, in tokens", elem_id="max-tokens"
                    )
                    seed = gr.Textbox("", label="Seed", placeholder="Random each time", max_lines=1, elem_id="seed")
                if refused:
                    with gr.Accordion(f"Not served ({len(refused)})", open=False, elem_id="refused"):
                        gr.HTML(cards.refused_list(refused))

        settings = [model, system, temperature, top_p, max_tokens, seed]
        shown = [chat, history, box, notice, send, stop_button]

        async def answer(
            stop: Stop, before: list[Message], question: str, kept: list[Message], *chosen: Any
        ) -> AsyncGenerator[tuple[Any, ...], None]:
            """Ask `question` after `before`, redrawing as the reply comes; on an error go back to `kept`.

            Does nothing while another reply is being written.
            """
            if not await stop.begin():
                # An edited message goes back to what it was; the words typed into the box stay there.
                yield for_page(kept), *(gr.skip() for _ in shown[1:])
                return
            try:
                async with aclosing(write(stop, before, question, kept, *chosen)) as updates:
                    async for update in updates:
                        yield update
            finally:
                stop.end()

        async def write(
            stop: Stop, before: list[Message], question: str, kept: list[Message], *chosen: Any
        ) -> AsyncGenerator[tuple[Any, ...], None]:
            """As `answer`, when it may."""
            state = [*before, Message("user", question)]
            yield *_conversation(state), "", _notice(""), *_buttons(busy=True)
            back: Any = gr.skip()
            try:
                async with aclosing(until(replies(client, labels, state, *chosen), stop.asked)) as states:
                    async for state in states:
                        yield *_conversation(state), gr.skip(), gr.skip(), gr.skip(), gr.skip()
            except Exception as error:
                if not isinstance(error, UserError):
                    logger.exception("A reply failed.")
                told = str(error) if isinstance(error, UserError) else "The reply failed; the server's log says why."
                # The words typed are the user's work: they go back into the box.
                yield *_conversation(kept), question, _notice(told), *_buttons(busy=False)
                return
            if stop.clear:
                state = []
            elif stop.asked.is_set() and state[-1].role == "assistant":
                state = [*state[:-1], replace(state[-1], note=" · ".join(filter(None, (state[-1].note, "stopped"))))]
            elif stop.asked.is_set():
                # Nothing has been written: hand the question back, unless a new one is begun.
                state, back = before, stop.typed or question
            yield *_conversation(state), back, gr.skip(), *_buttons(busy=False)

        async def on_send(text: str, stop: Stop, said: list[Message], *chosen: Any) -> AsyncIterator[tuple[Any, ...]]:
            if not text.strip():
                yield tuple(gr.skip() for _ in shown)
                return
            async with aclosing(answer(stop, said, text, said, *chosen)) as updates:
                async for update in updates:
                    yield update

        async def on_retry(
            data: gr.RetryData, stop: Stop, said: list[Message], *chosen: Any
        ) -> AsyncIterator[tuple[Any, ...]]:
            found = up_to_question(said, _index(data.index))
            if found is None:
                yield tuple(gr.skip() for _ in shown)
                return
            async with aclosing(answer(stop, *found, said, *chosen)) as updates:
                async for update in updates:
                    yield update

        async def on_edit(
            data: gr.EditData, stop: Stop, said: list[Message], *chosen: Any
        ) -> AsyncIterator[tuple[Any, ...]]:
            found, question = up_to_question(said, _index(data.index)), as_typed(str(data.value))
            if found is None or not question.strip():
                yield *_conversation(said), *(gr.skip() for _ in shown[2:])
                return
            async with aclosing(answer(stop, found[0], question, said, *chosen)) as updates:
                async for update in updates:
                    yield update

        # Both asynchronous: an asyncio.Event may be set in its own thread only.
        async def on_stop(text: str, stop: Stop) -> None:
            stop.ask(typed=text)

        async def on_clear(stop: Stop) -> tuple[Any, ...]:
            stop.ask(clear=True)
            return *_conversation([]), gr.skip(), _notice(""), *_buttons(busy=False)

        streams: dict[str, Any] = {"concurrency_id": "chat", "concurrency_limit": CONCURRENT_CHATS}
        quick: dict[str, Any] = {"concurrency_limit": CONCURRENT_CHATS}
        for limits in (streams, quick):
            limits |= {"show_progress": "hidden", "api_visibility": "private"}
        asked = [stop, history, *settings]
        gr.on([box.submit, send.click], on_send, [box, *asked], shown, **streams)
        chat.retry(on_retry, asked, shown, **streams)
        chat.edit(on_edit, asked, shown, **streams)
        stop_button.click(on_stop, [box, stop], None, **quick)
        gr.on([clear.click, chat.clear], on_clear, stop, shown, **quick)
        model.change(lambda name: panels[name], model, card, **quick)
        dark.click(None, js=TOGGLE_DARK_JS)

    page.queue(max_size=QUEUE, default_concurrency_limit=CONCURRENT_CHATS)
    return page


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page in the background of this process; `page.close()` ends it."""
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        inbrowser=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        allowed_paths=[],
        theme=theme(),
        css_paths=[CSS],
    )


async def replies(
    client: EngineClient,
    labels: Mapping[str, str],
    asked: list[Message],
    model: str,
    system: str,
    temperature: float,
    top_p: float,
    max_tokens: float,
    seed: str,
) -> AsyncGenerator[list[Message], None]:
    """The conversation as the reply to its last message grows. Closing this aborts the request to the engine."""
    text, drawn = "", 0.0
    timing: Timing | None = None
    reason = ""
    stream = client.chat(
        model,
        for_engine(system, asked),
        temperature=temperature,
        top_p=top_p,
        max_tokens=int(max_tokens),
        seed=_seed(seed),
    )
    async with aclosing(stream) as deltas:
        async for delta in deltas:
            text += delta.text
            timing = delta.timing or timing
            reason = delta.finish_reason or reason
            if delta.text and time.monotonic() - drawn >= REDRAW_S:
                drawn = time.monotonic()
                yield [*asked, Message("assistant", text, labels[model])]
    yield [*asked, Message("assistant", text, labels[model], _note(timing, reason))]


def _seed(text: str) -> int | None:
    """A text box, because Gradio's number box turns an empty one into 0."""
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"The seed {text.strip()!r} is not a whole number. Write one in the settings, or leave the seed empty."
        ) from None


def _note(timing: Timing | None, reason: str) -> str:
    parts = []
    if timing is not None:
        parts.append(f"{timing.ttft_s:.2f} s to first token")
        if timing.tokens_per_s:  # a single token has no rate
            parts.append(f"{timing.tokens_per_s:.0f} tokens/s")
    if reason == "length":
        parts.append("cut at the longest reply allowed")
    return " · ".join(parts)


def _conversation(history: list[Message]) -> tuple[Any, list[Message]]:
    return for_page(history), history


def _notice(text: str) -> Any:
    return gr.update(value=f"<p role='alert'>{html.escape(text)}</p>" if text else "", visible=bool(text))


def _buttons(busy: bool) -> tuple[Any, Any]:
    """Send and Stop share one place."""
    return gr.update(visible=not busy), gr.update(visible=busy)


def _index(index: int | Sequence[int]) -> int:
    """The message's place; the widget gives a pair where a message has parts."""
    return int(index) if isinstance(index, int | float) else int(index[0])
