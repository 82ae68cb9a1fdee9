"""Whether an architecture is scored rightly, tried on a small twin of it before anything is trained.

A model may hand its attention less than it was given, scale its logits in a way of its own, or mix tokens outside of
attention. None of that raises an error; all of it would train on wrong numbers. So a twin with two narrow layers and
random weights scores a few rows, and its own logits say what is right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_ft.batches import SHARED_FROM, Batch, Completion, Example, pack, pad
from lit_ft.models.load import shrink

Score = Callable[[Any, Batch], Tensor]

# Float32 sums in another order; a neighbour's tokens change nothing at all.
_RIGHT = 1e-3
_SAME = 1e-5


def why_wrong(model: Any, score: Score, *, packed: Callable[[Any], Any] | None = None) -> str | None:
    """None if rows of `model`'s architecture are scored rightly, else what is wrong in a few words.

    Args:
        model: the causal language model, without adapters; it is not touched.
        score: log-probabilities of a batch's targets under a model.
        packed: switches a model to packed attention; None tries padded rows.
    """
    key = type(model), model.config.to_json_string(use_diff=False), score, packed
    if key not in _tried:
        _tried[key] = _try(_twin(model), score, packed)
    return _tried[key]


# What was found, by architecture and configuration.
_tried: dict[Any, str | None] = {}


def _try(twin: Any | None, score: Score, packed: Callable[[Any], Any] | None) -> str | None:
    if twin is None:  # padded rows are as transformers has them; packed ones are ours to answer for
        return None if packed is None else "no small twin of it could be made to try"
    rows, changed = _examples(twin.config.vocab_size)
    lay_out: Callable[[Sequence[Example]], Batch] = pack if packed else lambda examples: pad(examples, 0, extra=2)
    try:
        with torch.no_grad():
            wanted = torch.cat([_own(twin, example, c) for example in rows for c in example.completions])
    except Exception:
        return None  # a model that wants other inputs: training will say so
    try:
        with torch.no_grad():
            if packed is not None:
                packed(twin)
            found = score(twin, lay_out(rows)).float()
            beside = score(twin, lay_out(changed)).float()
    except Exception as error:
        return None if packed is None else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    kept = torch.tensor([c is d for one, other in zip(rows, changed, strict=True) for c, d in _pairs(one, other)])
    of_completion = lay_out(rows).target_completion
    if not torch.allclose(found[kept[of_completion]], beside[kept[of_completion]], rtol=0, atol=_SAME):
        return "examples see each other"
    if not torch.allclose(found, wanted, rtol=_RIGHT, atol=_RIGHT):
        worst = float((found - wanted).abs().max())
        return f"log-probabilities differ from those of the model's own logits by {worst:.2g}"
    return None


def _twin(model: Any) -> Any | None:
    """Two narrow layers of the same architecture on the CPU, or None where it cannot be made smaller."""
    try:
        config = shrink(copy.deepcopy(model.config))
        config.vocab_size = min(config.vocab_size, 512)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if hasattr(config, name):
                setattr(config, name, 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            twin = type(model)(config).float().eval()
            for parameter in twin.parameters():
                if parameter.ndim == 2:  # wider than usual, so that what is wrong shows
                    torch.nn.init.normal_(parameter, std=0.2)
        return twin
    except Exception:
        return None


def _examples(vocabulary: int) -> tuple[list[Example], list[Example]]:
    """Rows that share beginnings, one with two completions; and the same with other tokens in some of them."""

    def ids(count: int, seed: int) -> tuple[int, ...]:
        return tuple(3 + (seed * 31 + k * 17 + k * k * 7) % (min(vocabulary, 500) - 3) for k in range(count))

    def answer(count: int, seed: int) -> Completion:
        return Completion(ids(count, seed), (True,) * count)

    system = ids(SHARED_FROM, 1)
    rows = [
        Example(system + ids(3, 2), (answer(4, 3), answer(2, 4)), 0),
        Example(system + ids(1, 5), (answer(3, 6),), 1),
        Example(ids(4, 7), (answer(5, 8),), 2),
    ]
    first, second, _ = rows
    changed = [
        replace(first, completions=(first.completions[0], answer(2, 9))),
        second,
        Example(ids(4, 10), (answer(5, 11),), 2),
    ]
    return rows, changed


def _pairs(one: Example, other: Example) -> zip[tuple[Completion, Completion]]:
    return zip(one.completions, other.completions, strict=True)


def _own(twin: Any, example: Example, completion: Completion) -> Tensor:
    """Log-probabilities of one completion by the model itself, alone in a row."""
    whole = torch.tensor([[*example.prompt, *completion.ids]])
    logprobs = twin(input_ids=whole, use_cache=False).logits[0].float().log_softmax(-1)
    first = len(example.prompt) - 1
    return logprobs[first:-1].gather(1, whole[0, first + 1 :, None]).squeeze(1)
