"""The canary of an adapter: what it makes of a fixed text, for a server to compare with what it computes itself."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from lit_ft.adapter import CANARY_TOKENS, Canary
from lit_ft.batches import Completion, Example, pad
from lit_ft.models.adapt import causal_lm
from lit_ft.models.load import context_length
from lit_ft.models.score import score

# Of every kind a little, early, since a tokenizer of single bytes reaches no further than the first sentence. A card
# holds the tokens themselves: another text here leaves published canaries as good as they were.
TEXT = (
    "At 17:45 a café in Zürich sold 12 teas for €38.20: not bad!\n"
    "def add(a, b):\n    return a + b  # 2\n"
    "“東京 or Москва?” asked nobody. It rained, so the answer came only when the next train had left."
)


@torch.no_grad()
def canary(
    model: Any, tokenizer: Any, *, autocast: torch.dtype | None = None, device: torch.device | None = None
) -> Canary:
    """Log-probabilities of a fixed text under `model`'s adapter as it is now, and with the adapter switched off.

    All processes of a sharded model must call this together; each computes the same.

    Args:
        model: a causal language model with a PEFT adapter.
        tokenizer: its tokenizer; no chat template is used.
        autocast: dtype of mixed precision, or None.
        device: where the model computes; None: where its weights are.

    Raises:
        ValueError: the text has fewer than two tokens, or log-probabilities that are not finite.
    """
    device = device or next(model.parameters()).device
    # A server generates a token after those it is given.
    most = min(CANARY_TOKENS, (context_length(causal_lm(model)) or CANARY_TOKENS + 1) - 1)
    tokens = [int(token) for token in tokenizer(TEXT)["input_ids"][:most]]
    if len(tokens) < 2:
        raise ValueError(f"the tokenizer makes {len(tokens)} tokens of the text")
    rest = Completion(tuple(tokens[1:]), (True,) * len(tokens[1:]))
    batch = pad([Example(tuple(tokens[:1]), (rest,))], pad_id=0).to(device)
    was_training = model.training

    def logprobs() -> list[float]:
        with torch.autocast(device.type, autocast) if autocast is not None else contextlib.nullcontext():
            # Not above 0, where float32 sums may end by a hair.
            return [round(min(value, 0.0), 6) for value in score(model, batch).logprobs.tolist()]

    model.eval()
    try:
        adapted = logprobs()
        with model.disable_adapter():
            return Canary(tokens, adapted, logprobs())
    finally:
        model.train(was_training)
