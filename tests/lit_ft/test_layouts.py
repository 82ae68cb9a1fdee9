"""Packed and padded rows say the same: log-probabilities and gradients, on four architectures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_ft.batches import Batch, Completion, Example, pack, pad
from lit_ft.losses.logprobs import sum_by_completion
from lit_ft.models.score import completion_logprobs, score, use_packed_attention
from tests import tiny

KINDS = ["llama", "qwen2", "gpt2", "opt"]
PAD = 3


def ids(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, 260, (count,), generator=generator).tolist())


def completion(count: int, seed: int, untrained: int = 0) -> Completion:
    """A completion of which the first `untrained` tokens are not trained on."""
    return Completion(ids(count, seed), (False,) * untrained + (True,) * (count - untrained))


def examples() -> list[Example]:
    """K = 3, 2 and 1 completions of a prompt; prompts and completions of one token; a mask with a gap; no prompt."""
    gap = Completion(ids(6, 9), (True, True, False, False, True, True))
    return [
        Example(ids(7, 0), (completion(5, 1), completion(9, 2, untrained=3), completion(1, 3)), 0),
        Example(ids(1, 4), (completion(1, 5), completion(4, 6)), 1),
        Example(ids(12, 7), (completion(3, 8),), 2),
        Example(ids(1, 10), (completion(1, 11),), 3),
        Example(ids(4, 12), (gap, completion(2, 13)), 4),
        Example((), (completion(5, 14),), 5),
    ]


def models(kind: str) -> tuple[Any, Any]:
    """Twins: one with packed attention, one with transformers' own, so that the two paths share nothing."""
    packed, padded = tiny.model(kind), tiny.model(kind)
    assert use_packed_attention(packed) is None
    return packed, padded


def logps_and_gradient(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """`(C,)` log-probabilities, and the gradient of an uneven sum of them, over all weights in one vector."""
    model.zero_grad()
    logps = completion_logprobs(model, batch)
    generator = torch.Generator().manual_seed(99)
    # Drawn per example's place, so that the order of the examples does not change what is differentiated.
    table = torch.randn(10, 10, generator=generator)
    weights = torch.cat(
        [table[int(e), : int(k)] for e, k in zip(batch.examples, batch.completions_per_example, strict=True)]
    )
    (logps * weights).sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """To 1e-5 of their size: sums of log-probabilities around 50, a gradient with a norm around 100."""
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    assert float((found[1] - wanted[1]).norm() / wanted[1].norm()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_padded_equals_more_padding(kind: str) -> None:
    packed, padded = models(kind)
    rows = examples()
    wanted = logps_and_gradient(padded, pad(rows, PAD))
    assert_same(logps_and_gradient(packed, pack(rows)), wanted)
    assert_same(logps_and_gradient(padded, pad(rows, PAD, extra=17)), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_equals_whole_logits(kind: str) -> None:
    """Every target against log_softmax of the model's own logits, one completion at a time, no batch at all."""
    packed, padded = models(kind)
    rows = examples()
    wanted = []
    with torch.no_grad():
        for row in rows:
            for answer in row.completions:
                whole = torch.tensor([[*row.prompt, *answer.ids]])
                logprobs = padded(input_ids=whole).logits.log_softmax(-1)[0]
                first = len(row.prompt)
                for k, trained in enumerate(answer.mask):
                    if trained and first + k > 0:
                        wanted.append(logprobs[first + k - 1, answer.ids[k]])
        for model, batch in ((packed, pack(rows)), (padded, pad(rows, PAD))):
            torch.testing.assert_close(score(model, batch).logprobs, torch.stack(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_any_order(kind: str) -> None:
    packed, _ = models(kind)
    rows = examples()
    straight = logps_and_gradient(packed, pack(rows))
    order = [4, 1, 5, 0, 3, 2]
    turned = logps_and_gradient(packed, pack([rows[k] for k in order]))
    by_example = dict(zip(order, turned[0].split([len(rows[k].completions) for k in order]), strict=True))
    assert_same((torch.cat([by_example[k] for k in range(len(rows))]), turned[1]), straight)


def test_siblings_in_any_order() -> None:
    """A completion's log-probability does not depend on where among its siblings it stands."""
    packed, _ = models("llama")
    row = examples()[0]
    with torch.no_grad():
        straight = completion_logprobs(packed, pack([row]))
        turned = completion_logprobs(packed, pack([replace(row, completions=row.completions[::-1])]))
    torch.testing.assert_close(straight, turned.flip(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_neighbour_changes_nothing(kind: str, layout: str) -> None:
    """Other tokens in one example, or in one completion: all others keep their log-probabilities to the bit."""
    packed, padded = models(kind)
    rows = examples()
    changed = list(rows)
    changed[1] = Example(ids(1, 20), (completion(1, 21), completion(4, 22)), 1)
    # The middle one of three completions of a shared prompt.
    first = rows[0].completions
    changed[0] = replace(rows[0], completions=(first[0], completion(9, 23, untrained=3), first[2]))
    touched = {1, 3, 4}
    with torch.no_grad():
        if layout == "packed":
            before, after = (completion_logprobs(packed, pack(group)) for group in (rows, changed))
        else:
            before, after = (completion_logprobs(padded, pad(group, PAD)) for group in (rows, changed))
    same = [k for k in range(len(before)) if k not in touched]
    assert torch.equal(before[same], after[same])
    assert (before[sorted(touched)] != after[sorted(touched)]).all()


def test_targets_are_the_same_in_both_layouts() -> None:
    """What losses see besides the log-probabilities; 3 of the 9 tokens and 2 of the gap's 6 are not trained on."""
    rows = examples()
    packed, padded = pack(rows), pad(rows, PAD)
    for name in ("target_ids", "target_completion", "completion_lengths", "completions_per_example", "examples"):
        assert torch.equal(getattr(packed, name), getattr(padded, name))
    # The example without a prompt has nothing that could predict its first token.
    assert packed.completion_lengths.tolist() == [5, 6, 1, 1, 4, 3, 1, 4, 2, 4]
    assert [row.targets for row in rows] == [12, 5, 3, 1, 6, 4]
    assert packed.tokens == padded.tokens == int(padded.attention_mask.sum())  # type: ignore[union-attr]
    # Shared once, each prompt is there once.
    assert packed.input_ids.shape == (1, sum(row.tokens for row in rows))


def test_accumulated_micro_batches_are_one_batch() -> None:
    """Gradients of two packed rows add up to that of one row with all examples."""
    packed, _ = models("llama")
    rows = examples()
    wanted = logps_and_gradient(packed, pack(rows))
    parts = [logps_and_gradient(packed, pack(group)) for group in (rows[:2], rows[2:])]
    assert_same((torch.cat([parts[0][0], parts[1][0]]), parts[0][1] + parts[1][1]), wanted)


def test_sums_belong_to_their_completion() -> None:
    _, padded = models("llama")
    batch = pad(examples(), PAD)
    with torch.no_grad():
        tokens = score(padded, batch).logprobs
        whole = completion_logprobs(padded, batch)
    assert torch.equal(sum_by_completion(tokens, batch.target_completion, batch.num_completions), whole)
    ends = batch.completion_lengths.cumsum(0).tolist()
    for k, end in enumerate(ends):
        torch.testing.assert_close(whole[k], tokens[end - int(batch.completion_lengths[k]) : end].sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_model_generates_as_before(kind: str) -> None:
    """Training switches the attention for good; previews afterwards generate from prompts padded on the left."""
    packed, own = models(kind)
    prompts = torch.tensor([[PAD] * 4 + list(ids(5, 30)), list(ids(9, 31))])
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    options: Any = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(
            packed.generate(prompts, **options, pad_token_id=PAD), own.generate(prompts, **options, pad_token_id=PAD)
        )


def test_a_packed_model_goes_on_from_a_cache() -> None:
    """Several tokens after cached ones: each sees the whole cache and the tokens before it."""
    packed, own = models("llama")
    tokens = torch.tensor([ids(12, 32)])
    with torch.no_grad():
        whole = own(tokens).logits[:, 8:]
        cache = packed(tokens[:, :8], use_cache=True).past_key_values
        rest = packed(tokens[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole, rtol=1e-5, atol=1e-5)
