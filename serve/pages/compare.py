"""The compare page: one prompt, two models side by side, named or blind, and a vote on which reply is better."""

from __future__ import annotations

import asyncio
import html
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from lit_ft.errors import UserError
from serve import votes
from serve.client import Timing
from serve.conversation import Message, for_engine, for_page
from serve.errors import UnknownModelError
from serve.pace import Pace
from serve.pages.parts import (
    QUICK,
    STREAMING,
    Look,
    Parts,
    as_side,
    how_it_went,
    notice,
    told,
)
from serve.pages.settings import length_and_seed, randomness, read_sampling
from serve.stopping import Stop, until
from serve.votes import COMMENT_LIMIT, Ballot, Sampling

logger = logging.getLogger(__name__)

# Both panes are redrawn at once, and never at the pace of one of them.
REDRAW_S = 0.08

SIDES = ("Left", "Right")

LEFT, RIGHT, TIE, BOTH_BAD = votes.VERDICTS["compare"]

# In the order shown, as the panes stand: what is stored, what the button says, what is said after it.
VERDICTS = (
    (LEFT, "← Left better", "left better"),
    (TIE, "Tie", "a tie"),
    (BOTH_BAD, "Both bad", "both bad"),
    (RIGHT, "Right better →", "right better"),
)

TOO_FEW = (
    "There is only one model here, and a comparison needs two. Publish an adapter, for example with "
    "python -m lit_ft +experiment=sft: it appears here within seconds."
)
HIDDEN_FAILURE = (
    "One of the two models cannot answer at this moment, so the other was stopped. Send your message again: two "
    "models are drawn anew."
)


@dataclass(frozen=True)
class Match:
    """Two models side by side. It stays on the server: while they are hidden nothing in the browser may tell them."""

    refs: tuple[str, str]
    """Full names, left and right."""

    hidden: bool
    """Whether the names are to be told only after the vote."""

    said: tuple[Message, ...] = ()
    """What both go on from."""

    question: Message | None = None
    halves: tuple[Half, Half] | None = None
    """The replies to `question`."""

    ballot: str = ""
    """Once both replies are whole."""

    verdict: str = ""


@dataclass(frozen=True)
class Half:
    """One of the two replies, as far as it has come."""

    hash: str = ""
    """Of the weights that had its model's name as it began; empty: unknown."""

    text: str = ""
    timing: Timing | None = None
    reason: str = ""


def build(parts: Parts) -> Look:
    """The page's components and events; see `serve.pages.chat.build`."""
    match_state = gr.State(None)
    stop = gr.State(Stop())
    # Not in a gr.State: a page that was open while the server was started again can still vote.
    ballot = gr.Textbox("", label="Ballot", elem_id="ballot-id", visible="hidden")
    with gr.Column(elem_id="duel"):
        with gr.Row(elem_id="pair"):
            blind = gr.Checkbox(
                True,
                label="Blind",
                info="Two drawn by lot, named after the vote",
                elem_id="blind",
                scale=3,
                min_width=240,
            )
            pool = gr.Dropdown(
                [],
                value=[],
                multiselect=True,
                label="Draw from (none chosen: the newest versions and the base)",
                elem_id="pool",
                allow_custom_value=True,
                scale=7,
                min_width=260,
            )
            # Custom values for the reason that the chat page gives.
            left, right = (
                gr.Dropdown(
                    [],
                    value=None,
                    label=side,
                    elem_id=f"{side.lower()}-model",
                    allow_custom_value=True,
                    visible=False,
                    scale=4,
                    min_width=150,
                )
                for side in SIDES
            )
        with gr.Row(elem_id="panes"):
            heads, panes = [], []
            for side in SIDES:
                with gr.Column(elem_id=f"{side.lower()}-side", elem_classes="side", min_width=280):
                    heads.append(gr.HTML(_head(side), elem_id=f"{side.lower()}-head", container=False, padding=False))
                    panes.append(
                        gr.Chatbot(
                            elem_id=f"{side.lower()}-pane",
                            elem_classes="pane",
                            label=f"{side} replies",
                            show_label=False,
                            sanitize_html=True,
                            allow_tags=False,
                            buttons=[],
                            layout="bubble",
                            feedback_options=None,
                            placeholder="**Ask both.** Write a message below and see two replies to it."
                            if side == "Left"
                            else "**Say which is better.** Your votes rank the models, and train the next one.",
                        )
                    )
        with gr.Row(elem_id="ballot"):
            buttons = {
                verdict: gr.Button(text, elem_id=f"vote-{verdict.replace('_', '-')}", interactive=False, min_width=110)
                for verdict, text, _ in VERDICTS
            }
        comment = gr.Textbox(
            "",
            placeholder="Why? Goes along with your vote (optional)",
            label="Comment",
            show_label=False,
            container=False,
            max_length=COMMENT_LIMIT,
            lines=1,
            max_lines=3,
            elem_id="comment",
            visible=False,
        )
        line = gr.HTML(elem_id="duel-notice", elem_classes="line", visible=False, container=False, padding=False)
        with gr.Row(elem_id="ways", visible=False) as ways:
            on = gr.Button("Continue the conversation", variant="primary", elem_id="continue", visible=False)
            following = gr.Button("Next", elem_id="next")
        with gr.Row(elem_id="duel-ask") as composer:
            box = gr.Textbox(
                "",
                placeholder="Write a message to both, Enter sends it",
                lines=1,
                max_lines=8,
                label="Message to both",
                show_label=False,
                container=False,
                elem_id="duel-box",
                scale=10,
            )
            send = gr.Button("Send", variant="primary", elem_id="duel-send")
            stop_button = gr.Button("Stop", variant="stop", elem_id="duel-stop", visible=False)
            leave = gr.Button("Next", elem_id="leave", visible=False)
    with gr.Accordion("Settings, the same for both", open=False, elem_id="duel-settings"):
        system = gr.Textbox("", label="System prompt", lines=3, placeholder="None", elem_id="duel-system")
        with gr.Row():
            temperature, top_p = randomness("duel-")
        with gr.Row():
            max_tokens, seed = length_and_seed(parts.max_model_len, "duel-")

    pickers = [blind, pool, left, right]
    settings = [system, temperature, top_p, max_tokens, seed]

    def drawn(match: Match | None) -> dict[Any, Any]:
        """Both panes and their headings."""
        shown = view(parts, match)
        return dict(zip([*heads, *panes], [*(head for head, _ in shown), *(talk for _, talk in shown)], strict=True))

    def stage(match: Match | None, writing: bool = False) -> dict[Any, Any]:
        """What can be done now: ask, stop, vote, or go on; one thing at a time."""
        open_ballot = match is not None and bool(match.ballot) and not match.verdict
        voted = match is not None and bool(match.verdict)
        asking = not (open_ballot or voted)
        updates: dict[Any, Any] = {
            composer: gr.update(visible=asking),
            send: gr.update(visible=not writing),
            stop_button: gr.update(visible=writing),
            leave: gr.update(visible=asking and not writing and match is not None),
            ways: gr.update(visible=not asking),
            on: gr.update(visible=voted),
            following: gr.update(value="Next" if voted else "Skip"),
            comment: gr.update(visible=open_ballot),
        }
        for verdict, text, _ in VERDICTS:
            chosen = match is not None and match.verdict == verdict
            updates[buttons[verdict]] = gr.update(
                value=f"✓ {text.strip('←→ ')}" if chosen else text,
                interactive=open_ballot,
                variant="primary" if chosen else "secondary",
            )
        # While two models are under way, which they are is settled.
        return updates | {picker: gr.update(interactive=match is None and not writing) for picker in pickers}

    async def on_send(
        request: gr.Request,
        question: str,
        stop: Stop,
        match: Match | None,
        blind: bool,
        pool: list[str] | None,
        left: str | None,
        right: str | None,
        *chosen: Any,
    ) -> AsyncIterator[dict[Any, Any]]:
        if not question.strip() or (match is not None and match.ballot) or not await stop.begin():
            yield {line: gr.skip()}
            return
        before, kept = match, question
        try:
            try:
                if match is None:
                    match = begin(parts, blind, pool or [], left, right)
                sampling = read_sampling(*chosen[1:])
                async with aclosing(write(request, stop, match, question, chosen[0], sampling, before)) as updates:
                    async for update in updates:
                        yield update
            except Exception as error:
                if not isinstance(error, UserError):
                    logger.exception("A comparison failed.")
                # The words typed are the user's work: they go back into the box.
                yield {
                    match_state: before,
                    box: kept,
                    line: notice(hiding(error, match)),
                    **drawn(before),
                    **stage(before),
                }
        finally:
            stop.end()

    async def write(
        request: gr.Request,
        stop: Stop,
        match: Match,
        question: str,
        system: str,
        sampling: Sampling,
        before: Match | None,
    ) -> AsyncGenerator[dict[Any, Any], None]:
        """Both replies as they grow, and the ballot on them when they are whole."""
        voter = parts.who(request)
        match = replace(match, question=Message("user", question), halves=(Half(), Half()))
        asked = for_engine(system, [*match.said, Message("user", question)])
        yield {box: "", line: notice(""), **drawn(match), **stage(match, writing=True)}
        growing = both(parts, voter, asked, match.refs, sampling)
        async with aclosing(until(growing, stop.asked)) as states:
            async for halves in states:
                match = replace(match, halves=halves)
                yield drawn(match)
        if stop.asked.is_set():
            text = (
                "Stopped before both replies were whole, so there is nothing to vote on. Your message is below again."
            )
            # What was written stays in sight, and a new message that was begun is left alone.
            yield {box: stop.typed or question, line: notice(text, "note"), **drawn(match), **stage(before)}
            return
        match = replace(
            match, ballot=await asyncio.to_thread(parts.votes.issue, as_ballot(parts, voter, match, asked, sampling))
        )
        text = "Which reply is better?"
        yield {
            match_state: match,
            ballot: match.ballot,
            comment: "",
            line: notice(text, "note"),
            **drawn(match),
            **stage(match),
        }

    def voting(verdict: str, said: str) -> Callable[..., Any]:
        async def on_vote(request: gr.Request, ballot: str, comment: str, match: Match | None) -> dict[Any, Any]:
            try:
                revealed = await asyncio.to_thread(parts.votes.vote, ballot, parts.who(request), verdict, comment or "")
            except Exception as error:
                if not isinstance(error, UserError):
                    logger.exception("A vote failed.")
                return {line: notice(told(error))}
            if not revealed.repeated:
                parts.metrics.voted("compare", verdict)
            thanks = f"Thank you: counted as {said}."
            if match is not None and match.ballot == ballot:
                match = replace(match, hidden=False, verdict=verdict)
                from_left = " Continuing goes on from the left reply, in both." if verdict in (TIE, BOTH_BAD) else ""
                return {
                    match_state: match,
                    line: notice(thanks + from_left, "note"),
                    **drawn(match),
                    **stage(match),
                }
            # The server was started again since: it knows the vote's models, and no longer the conversation.
            names = [parts.label(ref) for ref in (revealed.left, revealed.right or "")]
            closed = stage(Match((revealed.left, revealed.right or ""), False, ballot=ballot, verdict=verdict))
            closed[on] = gr.update(visible=False)
            heads_now = {head: _head(side, name) for head, side, name in zip(heads, SIDES, names, strict=True)}
            return {line: notice(thanks, "note"), **heads_now, **closed}

        return on_vote

    async def on_continue(match: Match | None) -> dict[Any, Any]:
        going = go_on(parts, match)
        text = "Both go on from the reply above." if going else ""
        return {
            match_state: going,
            ballot: "",
            comment: "",
            line: notice(text, "note"),
            **drawn(going),
            **stage(going),
        }

    async def on_next() -> dict[Any, Any]:
        return {match_state: None, ballot: "", comment: "", line: notice(""), **drawn(None), **stage(None)}

    # Asynchronous: an asyncio.Event may be set in its own thread only.
    async def on_stop(text: str, stop: Stop) -> None:
        stop.ask(typed=text)

    async def on_blind(blind: bool) -> dict[Any, Any]:
        return {pool: gr.update(visible=blind), left: gr.update(visible=not blind), right: gr.update(visible=not blind)}

    async def on_refresh(match: Match | None, pooled: list[str] | None, one: str | None, two: str | None) -> Any:
        """The lists of models, and what to do where there is only one."""
        choices = parts.choices(*(pooled or []), one or "", two or "")
        refs = [ref for _, ref in choices]
        # A value is sent only where there is none: a choice may be made meanwhile.
        first = {} if one else {"value": refs[0]}
        second = {} if two else {"value": next((ref for ref in refs if ref != (one or refs[0])), refs[0])}
        few = (
            notice(TOO_FEW, "note") if len(refs) < 2 else notice("") if match is None and len(refs) == 2 else gr.skip()
        )
        return {
            pool: gr.update(choices=choices),
            left: gr.update(choices=choices, **first),
            right: gr.update(choices=choices, **second),
            line: few,
        }

    outputs = [
        *(match_state, ballot, comment, box, line),
        *(composer, send, stop_button, leave, ways, on, following),
        *(*buttons.values(), *pickers, *heads, *panes),
    ]
    gr.on([box.submit, send.click], on_send, [box, stop, match_state, *pickers, *settings], outputs, **STREAMING)
    for verdict, _, said in VERDICTS:
        # Not queued: a vote is acknowledged at once, however busy the server is with replies.
        buttons[verdict].click(voting(verdict, said), [ballot, comment, match_state], outputs, queue=False, **QUICK)
    stop_button.click(on_stop, [box, stop], None, **QUICK)
    on.click(on_continue, match_state, outputs, **QUICK)
    gr.on([following.click, leave.click], on_next, None, outputs, **QUICK)
    blind.change(on_blind, blind, pickers, **QUICK)

    async def draw_lists(request: gr.Request, *values: Any) -> dict[Any, Any]:
        return dict(await on_refresh(*values))

    return Look(draw_lists, [match_state, pool, left, right], [pool, left, right, line])


def begin(parts: Parts, blind: bool, pool: Sequence[str], left: str | None, right: str | None) -> Match:
    """The two models of a new comparison: those chosen, or two drawn by lot.

    Raises:
        UserError: there are not two, or one cannot be asked.
    """
    if len(parts.choices()) < 2:
        raise UserError(TOO_FEW)
    if blind:
        return Match(draw(drawable(parts, pool)), hidden=True)
    if not left or not right or left == right:
        raise UserError("Choose two different models to compare, or tick Blind to have two drawn.")
    return Match((parts.fleet.resolve(left), parts.fleet.resolve(right)), hidden=False)


def drawable(parts: Parts, chosen: Sequence[str]) -> list[str]:
    """What a blind comparison is drawn from: those chosen that can be asked, else the newest versions and the base.

    Raises:
        UserError: fewer than two.
    """
    refs = [ref for _, ref in parts.choices()]
    pool = [ref for ref in refs if (ref in chosen if chosen else parts.fleet.newer(ref) is None)]
    if len(pool) < 2:
        raise UserError(
            "Choose at least two models to draw from that can be asked now, or none to draw from the newest versions "
            "and the base."
        )
    return pool


def draw(pool: Sequence[str]) -> tuple[str, str]:
    """Two different ones, each equally likely on each side, by the system's randomness: nobody can foresee them."""
    left, right = random.SystemRandom().sample(list(pool), 2)
    return left, right


async def both(
    parts: Parts, user: str, asked: Sequence[dict[str, str]], refs: tuple[str, str], sampling: Sampling
) -> AsyncGenerator[tuple[Half, Half], None]:
    """The replies of two models to the same messages, requested together, as they grow.

    The last pair is whole. When one fails the other is aborted, and so are both when this is closed.
    """
    halves = [Half(), Half()]

    async def fill(side: int) -> None:
        # The weights that answer now: others may have taken the name when both replies are whole.
        halves[side] = Half(parts.hash_of(refs[side]))
        async with aclosing(parts.gateway.chat(user, refs[side], asked, **vars(sampling))) as deltas:
            async for delta in deltas:
                half = halves[side]
                halves[side] = replace(
                    half,
                    text=half.text + delta.text,
                    timing=delta.timing or half.timing,
                    reason=delta.finish_reason or half.reason,
                )

    tasks = [asyncio.ensure_future(fill(side)) for side in (0, 1)]
    drawn, pace = list(halves), Pace(REDRAW_S)
    try:
        pending = set(tasks)
        while pending:
            wait_s = max(pace.wait_s, REDRAW_S / 2)
            done, pending = await asyncio.wait(tasks, timeout=wait_s, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            if not pending or halves != drawn:
                drawn = list(halves)
                with pace.drawing():
                    yield halves[0], halves[1]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def as_ballot(parts: Parts, voter: str, match: Match, asked: Sequence[dict[str, str]], sampling: Sampling) -> Ballot:
    """What the voter saw: both replies as streamed, and on which side each stood.

    Raises:
        UserError: it is not known which weights gave one of them.
    """
    assert match.halves is not None
    left, right = (as_side(ref, half.hash, half.text) for ref, half in zip(match.refs, match.halves, strict=True))
    return Ballot(
        voter=voter,
        base_id=parts.base.id,
        base_hash=parts.base.hash,
        prompt=asked,
        left=left,
        right=right,
        sampling=sampling,
        blind=match.hidden,
    )


def go_on(parts: Parts, match: Match | None) -> Match | None:
    """The same two models after the better reply, as in any conversation: a ballot has one prompt for both.

    After a tie, or two bad ones, they go on from the left reply. From here on the names are known.
    """
    if match is None or match.question is None or match.halves is None or not match.verdict:
        return None
    better = 1 if match.verdict == RIGHT else 0
    reply = Message("assistant", match.halves[better].text, parts.label(match.refs[better]))
    return Match(match.refs, hidden=False, said=(*match.said, match.question, reply))


def view(parts: Parts, match: Match | None) -> list[tuple[str, list[dict[str, Any]]]]:
    """Left and right: the heading, and the value of the widget. Without a name or a speed while they are hidden."""
    if match is None:
        return [(_head(side), []) for side in SIDES]
    shown = []
    for i, side in enumerate(SIDES):
        name = "" if match.hidden else parts.label(match.refs[i])
        talk, speed = list(match.said), ""
        if match.question is not None and match.halves is not None:
            half = match.halves[i]
            talk.append(match.question)
            if half.text or half.reason:
                # A speed can give a model away: base and adapters differ in it.
                talk.append(Message("assistant", half.text, name or side, how_it_went(None, half.reason)))
            speed = "" if match.hidden else how_it_went(half.timing, "")
        shown.append((_head(side, name, speed, match.hidden), for_page(talk)))
    return shown


def hiding(error: Exception, match: Match | None) -> str:
    """What went wrong, in words that do not tell who the two are while they are hidden."""
    text = told(error)
    if match is None or not match.hidden:
        return text
    names = {part for ref in match.refs for part in (ref, ref.partition("@")[0])}
    return HIDDEN_FAILURE if isinstance(error, UnknownModelError) or any(name in text for name in names) else text


def _head(side: str, name: str = "", speed: str = "", hidden: bool = False) -> str:
    """The line above a pane."""
    rest = f"<strong>{html.escape(name)}</strong>" if name else "<em>hidden until you vote</em>" if hidden else ""
    small = f"<small>{html.escape(speed)}</small>" if speed else ""
    return f"<h3><span class='badge'>{side}</span> {rest}{small}</h3>"
