"""The trial before training: which architectures are packed, padded or refused, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lit_ft.batches import Batch, pack
from lit_ft.errors import UserError
from lit_ft.models import score as scoring
from lit_ft.models.attention import PACKED
from lit_ft.models.load import shrink
from lit_ft.models.score import check_scoring, use_packed_attention
from lit_ft.models.trial import _examples, why_wrong
from tests import tiny


def small(name: str, **changes: Any) -> Any:
    """A two-layer model of transformers' class `name`ForCausalLM with random weights."""
    config = shrink(getattr(transformers, f"{name}Config")(**changes))
    config.vocab_size = 300
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize(
    "name", ["Llama", "Qwen3", "Gemma", "Phi3", "Olmo2", "SmolLM3", "GPTNeoX", "Mixtral", "DeepseekV3"]
)
def test_these_are_packed(name: str) -> None:
    model = small(name)
    assert use_packed_attention(model) is None
    assert model.config._attn_implementation == PACKED
    check_scoring(model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Mistral", "sliding window"),
        ("Gemma2", "sliding_attention"),
        ("Bloom", "attention interface"),
        # It masks more than what is not before a token.
        ("Doge", "knows no mask of the model"),
    ],
)
def test_these_are_padded(name: str, reason: str) -> None:
    model = small(name)
    before = model.config._attn_implementation
    assert reason in str(use_packed_attention(model))
    assert model.config._attn_implementation == before
    check_scoring(model)


def test_a_model_whose_attention_is_not_told_is_padded() -> None:
    """Nemotron's layers do not hand on what the forward was given: packed, its examples would see each other."""
    assert use_packed_attention(small("Nemotron", num_key_value_heads=2)) == "examples see each other"


def test_scaled_logits_are_known_or_refused() -> None:
    """Granite divides its logits, Cohere multiplies them, and lit_ft too; HyperCLOVAX multiplies by Granite's name."""
    for known in (small("Granite", logits_scaling=4.0), small("Cohere", logit_scale=0.25)):
        check_scoring(known)
    other = small("HyperCLOVAX", logits_scaling=4.0)
    with pytest.raises(UserError, match=r"log-probabilities differ .* by [0-9]"):
        check_scoring(other)
    assert "differ from those of the model's own logits" in str(use_packed_attention(other))


def test_capped_logits_of_an_unknown_kind_are_refused() -> None:
    with pytest.raises(UserError, match="RecurrentGemmaForCausalLM cannot be trained here"):
        check_scoring(small("RecurrentGemma"))


def test_a_model_without_a_twin_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_ft.models.trial._twin", lambda _: None)
    model = tiny.model(vocab_size=271)  # one that no other test has tried
    assert use_packed_attention(model) == "no small twin of it could be made to try"
    check_scoring(model)


def test_the_random_state_and_the_model_are_left_alone() -> None:
    model = tiny.model(vocab_size=272)
    before, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    assert why_wrong(model, scoring._logprobs, packed=scoring._pack_attention) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert model.config._attn_implementation != PACKED


def test_wrong_scores_are_found() -> None:
    """One completion off by a little; and one that depends on the row's other examples."""
    model = tiny.model(vocab_size=273)

    def off(twin: Any, batch: Batch) -> Tensor:
        return scoring._logprobs(twin, batch) + 0.1 * (batch.target_completion == 2)

    def leaking(twin: Any, batch: Batch) -> Tensor:
        return scoring._logprobs(twin, batch) + 1e-4 * batch.input_ids.float().mean()

    assert "by 0.1" in str(why_wrong(model, off, packed=scoring._pack_attention))
    assert why_wrong(model, leaking, packed=scoring._pack_attention) == "examples see each other"


def test_the_rows_tried_share_what_can_be_shared() -> None:
    rows, changed = _examples(300)
    batch = pack(rows)
    assert batch.input_ids.shape[1] < sum(row.tokens for row in rows)
    assert pack(changed).pieces == batch.pieces
    assert {len(row.completions) for row in rows} == {1, 2}
