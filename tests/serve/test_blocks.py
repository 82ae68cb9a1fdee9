"""Blocks that leave skipped components alone: the same results as Gradio's own, and no component made anew."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import gradio as gr
import pytest
from gradio.components import _Keywords
from gradio.state_holder import SessionState

from serve.blocks import Blocks

SKIP = gr.skip()


def pages(kind: type[gr.Blocks]) -> gr.Blocks:
    """A text, a list of choices, a state and a chat, all written by one event."""
    with kind(analytics_enabled=False) as page:
        outputs = [gr.Textbox("", elem_id="box"), gr.Dropdown(["a", "b"], value="a"), gr.State(list), gr.Chatbot()]
        gr.Button().click(lambda: None, None, outputs)
    return page


def after(kind: type[gr.Blocks], predictions: Any, by_component: bool = False) -> tuple[list[Any], list[Any]]:
    """What the event gives the browser, and what its session then knows of each component."""
    page = pages(kind)
    event = next(fn for fn in page.fns.values() if len(fn.outputs) == 4)
    predictions = copy.deepcopy(predictions)  # Gradio takes them apart
    if by_component:
        predictions = {event.outputs[i]: value for i, value in predictions.items()}
    state = SessionState(page)
    shown = asyncio.run(page.postprocess_data(event, predictions, state))
    box, choice, said, chat = (state[output._id] for output in event.outputs)
    return shown, [box.visible, choice.choices, said, type(chat)]


TALK = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    "predictions",
    [
        ["new", "b", [1], TALK],
        [SKIP, SKIP, SKIP, TALK],
        [SKIP, SKIP, [1], SKIP],
        [SKIP, SKIP, SKIP, SKIP],
        ["new", gr.update(choices=["c", "d"], value="d"), SKIP, SKIP],
        [gr.update(visible=False), SKIP, [1, 2], TALK],
        SKIP,
        [_Keywords.FINISHED_ITERATING] * 4,
    ],
)
def test_results_are_those_of_gradio(predictions: Any) -> None:
    assert after(Blocks, predictions) == after(gr.Blocks, predictions)


@pytest.mark.parametrize("predictions", [{0: "new"}, {2: [5], 3: TALK}, {1: gr.update(choices=["z"], value="z")}])
def test_results_by_component_are_those_of_gradio(predictions: dict[int, Any]) -> None:
    assert after(Blocks, predictions, True) == after(gr.Blocks, predictions, True)


def test_a_wrong_number_of_values_is_refused_as_before() -> None:
    for kind in (Blocks, gr.Blocks):
        with pytest.raises(ValueError, match="output"):
            after(kind, ["only one", SKIP])


def test_what_is_skipped_is_not_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    setitem = SessionState.__setitem__

    def noting(self: SessionState, key: int, value: Any) -> None:
        made.append(type(value).__name__)
        setitem(self, key, value)

    monkeypatch.setattr(SessionState, "__setitem__", noting)
    after(Blocks, [SKIP, SKIP, SKIP, TALK])
    assert "Textbox" not in made and "Dropdown" not in made
