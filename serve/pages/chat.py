"""The chat page: choose a model, talk to it, see what it is made of, say whether a reply was good or write a better."""

from __future__ import annotations

import asyncio
import html
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import gradio as gr

from lit_ft.errors import UserError
from serve.client import Timing
from serve.conversation import Message, Origin, as_typed, for_engine, for_page, literal, up_to_question
from serve.pace import Pace
from serve.pages.parts import (
    QUICK,
    REFRESH,
    STREAMING,
    Look,
    Parts,
    as_side,
    how_it_went,
    notice,
    room_for_all,
    told,
)
from serve.pages.settings import length_and_seed, randomness, read_sampling
from serve.stopping import Stop, until
from serve.votes import Ballot

logger = logging.getLogger(__name__)

# Redrawing the whole conversation for each token costs more than the eye gains.
REDRAW_S = 0.05


def build(parts: Parts) -> Look:
    """The page's components and events, in the Blocks and Tab that are open; returns what `app` has it draw."""
    room_for_all()
    fleet = parts.fleet
    # Every session gets a copy. A callable would do as well, in an event of its own at each load.
    history = gr.State([])
    stop = gr.State(Stop())
    picked = gr.State(False)  # whether the person chose the model, rather than the page
    with gr.Row():
        with gr.Column(scale=7, min_width=320, elem_id="talk"):
            # Custom values: Gradio would check a choice against the list it sent last, and a server that was started
            # again has sent none. What may be asked is the fleet's to say.
            model = gr.Dropdown([], value=None, label="Model", elem_id="model", allow_custom_value=True)
            newer = gr.HTML(elem_id="newer", visible=False, container=False, padding=False)
            chat = gr.Chatbot(
                elem_id="chat",
                show_label=False,
                sanitize_html=True,
                allow_tags=False,
                editable="all",
                buttons=["copy"],
                layout="bubble",
                feedback_options=["Like", "Dislike"],
                placeholder="**Ask anything.** You can change the model between messages: each reply says who wrote "
                "it. Rate a reply with the thumbs below it, or edit it into a better one.",
            )
            line = gr.HTML(elem_id="notice", visible=False, container=False, padding=False)
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
            card = gr.HTML("", elem_id="card", container=True, padding=True)
            with gr.Accordion("Settings", open=False, elem_id="settings"):
                system = gr.Textbox("", label="System prompt", lines=3, placeholder="None", elem_id="system")
                temperature, top_p = randomness()
                max_tokens, seed = length_and_seed(parts.max_model_len)

    settings = [model, system, temperature, top_p, max_tokens, seed]
    shown = [chat, history, box, line, send, stop_button]

    async def answer(
        request: gr.Request, stop: Stop, before: list[Message], question: str, kept: list[Message], *chosen: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Ask `question` after `before`, redrawing as the reply comes; on an error go back to `kept`.

        Does nothing while another reply is being written.
        """
        if not await stop.begin():
            # An edited message goes back to what it was; the words typed into the box stay there.
            yield for_page(kept), *(gr.skip() for _ in shown[1:])
            return
        try:
            async with aclosing(write(request, stop, before, question, kept, *chosen)) as updates:
                async for update in updates:
                    yield update
        finally:
            stop.end()

    async def write(
        request: gr.Request, stop: Stop, before: list[Message], question: str, kept: list[Message], *chosen: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """As `answer`, when it may."""
        state = [*before, Message("user", question)]
        yield *_conversation(state), "", notice(""), *_buttons(busy=True)
        back: Any = gr.skip()
        try:
            growing = replies(parts, parts.who(request), state, *chosen)
            async with aclosing(until(growing, stop.asked)) as states:
                async for state in states:
                    yield *_conversation(state), gr.skip(), gr.skip(), gr.skip(), gr.skip()
        except Exception as error:
            if not isinstance(error, UserError):
                logger.exception("A reply failed.")
            # The words typed are the user's work: they go back into the box.
            yield *_conversation(kept), question, notice(told(error)), *_buttons(busy=False)
            return
        if stop.clear:
            state = []
        elif stop.asked.is_set() and state[-1].role == "assistant":
            state = [*state[:-1], replace(state[-1], note=" · ".join(filter(None, (state[-1].note, "stopped"))))]
        elif stop.asked.is_set():
            # Nothing has been written: hand the question back, unless a new one is begun.
            state, back = before, stop.typed or question
        yield *_conversation(state), back, gr.skip(), *_buttons(busy=False)

    async def on_send(
        request: gr.Request, text: str, stop: Stop, said: list[Message], *chosen: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        if not text.strip():
            yield tuple(gr.skip() for _ in shown)
            return
        async with aclosing(answer(request, stop, said, text, said, *chosen)) as updates:
            async for update in updates:
                yield update

    async def on_retry(
        data: gr.RetryData, request: gr.Request, stop: Stop, said: list[Message], *chosen: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        found = up_to_question(said, _index(data.index))
        if found is None:
            yield tuple(gr.skip() for _ in shown)
            return
        async with aclosing(answer(request, stop, *found, said, *chosen)) as updates:
            async for update in updates:
                yield update

    async def on_edit(
        data: gr.EditData, request: gr.Request, stop: Stop, said: list[Message], *chosen: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        index, text = _index(data.index), as_typed(str(data.value))
        if 0 <= index < len(said) and said[index].role == "assistant":
            if _is_line_below(str(data.previous_value), said[index]):
                yield tuple(gr.skip() for _ in shown)
                return
            yield await better(request, said, index, text)
            return
        found = up_to_question(said, index)
        if found is None or not text.strip():
            yield *_conversation(said), *(gr.skip() for _ in shown[2:])
            return
        async with aclosing(answer(request, stop, found[0], text, said, *chosen)) as updates:
            async for update in updates:
                yield update

    async def better(request: gr.Request, said: list[Message], index: int, text: str) -> tuple[Any, ...]:
        """An edited reply is preferred over the one it was made from; the conversation goes on with it."""
        rest = (gr.skip(), gr.skip())
        try:
            ballot = _ballot(parts, parts.who(request), said[index])
            revealed = await asyncio.to_thread(parts.votes.improve, ballot, text)
        except UserError as error:
            return *_conversation(said), gr.skip(), notice(told(error)), *rest
        if not revealed.repeated:
            parts.metrics.voted("edit", revealed.verdict)
        changed = list(said)
        # What it is preferred over stays the model's own reply, however often it is edited.
        changed[index] = replace(said[index], text=text, note="edited by you")
        thanks = notice("Thank you: your answer counts as preferred over the model's.", "note")
        return *_conversation(changed), gr.skip(), thanks, *rest

    async def on_like(data: gr.LikeData, request: gr.Request, said: list[Message]) -> tuple[Any, ...]:
        index = _index(data.index)
        if not (0 <= index < len(said) and said[index].role == "assistant") or data.liked not in (True, False):
            return gr.skip(), gr.skip()
        verdict, message = "up" if data.liked else "down", said[index]
        try:
            voter = parts.who(request)
            if not message.ballot:
                ballot = await asyncio.to_thread(parts.votes.issue, _ballot(parts, voter, message))
                message = replace(message, ballot=ballot)
            revealed = await asyncio.to_thread(parts.votes.vote, message.ballot, voter, verdict)
        except UserError as error:
            return said, notice(told(error))
        if not revealed.repeated:
            parts.metrics.voted("thumbs", verdict)
        thanks = notice(f"Thank you: counted as a thumb {verdict}.", "note")
        return [*said[:index], message, *said[index + 1 :]], thanks

    # Both asynchronous: an asyncio.Event may be set in its own thread only.
    async def on_stop(text: str, stop: Stop) -> None:
        stop.ask(typed=text)

    async def on_clear(stop: Stop) -> tuple[Any, ...]:
        stop.ask(clear=True)
        return *_conversation([]), gr.skip(), notice(""), *_buttons(busy=False)

    async def on_refresh(chosen: str | None, picked: bool, said: list[Message]) -> Any:
        """The list of models. Its value is sent only where it is to change: a choice may be made meanwhile."""
        if chosen and (picked or said):
            return gr.update(choices=parts.choices(chosen))
        choices = parts.choices()
        return gr.update(choices=choices, value=choices[0][1])

    async def on_model(chosen: str | None, said: list[Message]) -> tuple[Any, ...]:
        chosen = chosen or fleet.default
        return parts.card(chosen), _newer(parts, chosen, said)

    asked = [stop, history, *settings]
    gr.on([box.submit, send.click], on_send, [box, *asked], shown, **STREAMING)
    chat.retry(on_retry, asked, shown, **STREAMING)
    chat.edit(on_edit, asked, shown, **STREAMING)
    chat.like(on_like, history, [history, line], **QUICK)
    stop_button.click(on_stop, [box, stop], None, **QUICK)
    cleared = gr.on([clear.click, chat.clear], on_clear, stop, shown, **QUICK)
    model.change(on_model, [model, history], [card, newer], **QUICK)
    model.input(lambda: True, None, picked, **QUICK)

    looked = [model, picked, history]

    async def draw(request: gr.Request, *values: Any) -> dict[Any, Any]:
        return {model: await on_refresh(*values)}

    def then(when: Callable[..., Any]) -> None:
        when(on_model, [model, history], [card, newer], **QUICK)

    then(cleared.then(on_refresh, looked, model, **REFRESH).then)
    return Look(draw, looked, [model], then)


async def replies(
    parts: Parts,
    user: str,
    asked: list[Message],
    model: str,
    system: str,
    temperature: float,
    top_p: float,
    max_tokens: float,
    seed: str,
) -> AsyncGenerator[list[Message], None]:
    """The conversation as the reply to its last message grows. Closing this aborts the request to the engine."""
    text, pace = "", Pace(REDRAW_S)
    timing: Timing | None = None
    reason = ""
    ref = parts.fleet.resolve(model)
    sampling = read_sampling(temperature, top_p, max_tokens, seed)
    prompt = for_engine(system, asked)
    # The weights that answer now: when a vote comes, others may have taken the name, or nothing has it any more.
    reply = Message("assistant", "", parts.label(ref), origin=Origin(ref, parts.hash_of(ref), prompt, sampling))
    async with aclosing(parts.gateway.chat(user, ref, prompt, **vars(sampling))) as deltas:
        async for delta in deltas:
            text += delta.text
            timing = delta.timing or timing
            reason = delta.finish_reason or reason
            if delta.text and pace.wait_s <= 0:
                with pace.drawing():
                    yield [*asked, replace(reply, text=text)]
    yield [*asked, replace(reply, text=text, note=how_it_went(timing, reason), streamed=text)]


def _ballot(parts: Parts, voter: str, message: Message) -> Ballot:
    """The reply with what it answered, as the model wrote it.

    Raises:
        UserError: it was stopped before its end, so that there is nothing to judge, or its weights are not known.
    """
    if message.origin is None or message.streamed is None:
        raise UserError("This reply was stopped before its end, so it cannot be rated. Ask again for a whole one.")
    return Ballot(
        voter=voter,
        base_id=parts.base.id,
        base_hash=parts.base.hash,
        prompt=message.origin.prompt,
        left=as_side(message.origin.ref, message.origin.hash, message.streamed),
        right=None,
        sampling=message.origin.sampling,
    )


def _newer(parts: Parts, ref: str, said: Sequence[Message]) -> Any:
    """That a newer version exists than the one this chat goes on with."""
    newest = parts.fleet.newer(ref)
    if newest is None:
        return gr.update(value="", visible=False)
    goes_on = f"This chat goes on with {ref}" if said else f"Chosen here is {ref}"
    text = f"{newest} is newer. {goes_on}; choose {newest} above to change."
    return gr.update(value=f"<p role='status'>{html.escape(text)}</p>", visible=True)


def _conversation(history: list[Message]) -> tuple[Any, list[Message]]:
    return for_page(history), history


def _buttons(busy: bool) -> tuple[Any, Any]:
    """Send and Stop share one place."""
    return gr.update(visible=not busy), gr.update(visible=busy)


def _is_line_below(text: str, message: Message) -> bool:
    """Whether an edit is of the line that says who wrote the reply: the widget sends one for each part of a message."""
    return text != literal(message.text) and (text == message.label or text.startswith(f"{message.label} · "))


def _index(index: int | Sequence[int]) -> int:
    """The message's place; the widget gives a pair where a message has parts."""
    return int(index) if isinstance(index, int | float) else int(index[0])
