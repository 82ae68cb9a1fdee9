"""The settings of a reply that the chat and the comparison have alike: how it is drawn, and how long it may be."""

from __future__ import annotations

import gradio as gr

from lit_ft.errors import UserError
from serve.votes import Sampling

# Tokens that a reply has at most, unless the reader asks for more.
LONGEST_REPLY = 256


def randomness(prefix: str = "") -> tuple[gr.Slider, gr.Slider]:
    """Temperature and top-p; the ids of their elements begin with `prefix`."""
    return (
        gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", elem_id=f"{prefix}temperature"),
        gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p", elem_id=f"{prefix}top-p"),
    )


def length_and_seed(max_model_len: int, prefix: str = "") -> tuple[gr.Slider, gr.Textbox]:
    """The longest reply, of a model with so many tokens of context, and the seed."""
    longest = max(1, max_model_len - 1)
    chosen = min(LONGEST_REPLY, longest)
    label = "Longest reply, in tokens"
    return (
        gr.Slider(1, longest, chosen, step=1, label=label, elem_id=f"{prefix}max-tokens"),
        gr.Textbox("", label="Seed", placeholder="Random each time", max_lines=1, elem_id=f"{prefix}seed"),
    )


def read_sampling(temperature: float, top_p: float, max_tokens: float, seed: str) -> Sampling:
    """The settings of the page; raises UserError for a seed that is no number."""
    return Sampling(temperature, top_p, int(max_tokens), read_seed(seed))


def read_seed(text: str) -> int | None:
    """A text box, because Gradio's number box turns an empty one into 0."""
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"The seed {text.strip()!r} is not a whole number. Write one in the settings, or leave the seed empty."
        ) from None
