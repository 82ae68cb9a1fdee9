"""How much two forms of a model differ, on a fixed text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_ft.models.canary import TEXT
from lit_ft.models.load import context_length

# Nats that log-probabilities may differ by on average where the same is computed in another order, in float32. Usual
# is 1e-6; a model with huge activations has more, and a part that is left out a hundred times as much.
ROUNDING = 5e-4


class Outputs(NamedTuple):
    """What a model makes of a text: its ids `(T,)` and the logits after each of them `(T, V)` in float32."""

    tokens: Tensor
    logits: Tensor

    @property
    def logprobs(self) -> Tensor:
        """`(T-1,)`, of each token but the first after those before it."""
        return torch.log_softmax(self.logits[:-1], dim=-1).gather(1, self.tokens[1:, None])[:, 0]


class Difference(NamedTuple):
    """Of two models' outputs.

    Attributes:
        logit: the largest of all logits' differences.
        logprob: the largest difference of the log-probabilities of the text's tokens, in nats.
        mean: their mean.
        agreed: at how many places both find the same token most probable.
        places: of how many.
    """

    logit: float
    logprob: float
    mean: float
    agreed: int
    places: int

    def __str__(self) -> str:
        return (
            f"log-probabilities of a text of {self.places} tokens differ by {self.mean:.2g} on average and by "
            f"{self.logprob:.2g} at most, the most probable token is the same {self.agreed} times"
        )


@torch.no_grad()
def outputs(model: Any, tokenizer: Any) -> Outputs:
    """The outputs of `model`, in evaluation mode from here on, for the text whose tokens `tokenizer` makes."""
    model.eval()
    device = next(model.parameters()).device
    most = context_length(model)
    tokens = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"][:most], device=device)
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    return Outputs(tokens.cpu(), logits.float().cpu())


@torch.no_grad()
def token_logprobs(model: Any, tokens: Sequence[int]) -> Tensor:
    """`(T-1,)` log-probabilities in float32 of each token but the first after those before it."""
    ids = torch.tensor(list(tokens), device=next(model.parameters()).device)
    logits = model.eval()(input_ids=ids[None], use_cache=False).logits[0].float().cpu()
    return Outputs(ids.cpu(), logits).logprobs


def difference(one: Outputs, other: Outputs) -> Difference:
    """Of two outputs for the same tokens."""
    if not torch.equal(one.tokens, other.tokens):
        raise ValueError("the outputs are of different texts")
    apart = (one.logprobs - other.logprobs).abs()
    same = one.logits.argmax(dim=-1) == other.logits.argmax(dim=-1)
    return Difference(
        logit=float((one.logits - other.logits).abs().max()),
        logprob=float(apart.max()),
        mean=float(apart.mean()),
        agreed=int(same.sum()),
        places=len(same),
    )
