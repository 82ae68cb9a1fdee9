"""The one forward path of every algorithm: a batch in, log-probabilities at its targets out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_ft.batches import Batch
from lit_ft.errors import UserError
from lit_ft.losses.divergence import Predictions, token_kl
from lit_ft.losses.logprobs import TokenScores, sum_by_completion, token_entropies, token_scores
from lit_ft.models.adapt import causal_lm
from lit_ft.models.attention import PACKED, Plan, backend, register_packed_attention, why_not_packable
from lit_ft.models.roles import using
from lit_ft.models.shard import is_sharded
from lit_ft.models.trial import why_wrong


def use_packed_attention(model: Any) -> str | None:
    """Switch `model` to packed attention and return None, or return why it cannot be packed (it is left as it was)."""
    lm = causal_lm(model)
    reason = why_not_packable(lm) or why_wrong(lm, _logprobs, packed=_pack_attention)
    if reason is None:
        _pack_attention(lm)
    return reason


def check_scoring(model: Any) -> None:
    """Raise UserError if even padded rows of this architecture are not scored rightly."""
    lm = causal_lm(model)
    if reason := why_wrong(lm, _logprobs):
        raise UserError(
            f"{type(lm).__name__} cannot be trained here: {reason}. It makes its logits in a way that lit_ft does not "
            "know; another model of the same size will do."
        )


def _pack_attention(lm: Any) -> None:
    register_packed_attention()
    lm.set_attn_implementation(PACKED)


def attention_backend(model: Any, device: torch.device, mixed: bool) -> str:
    """In words, what computes the attention of packed rows of `model` on `device`, in bf16 if `mixed`."""
    config = causal_lm(model).config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return backend(device, torch.bfloat16 if mixed else torch.float32, head_dim)


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """`(B·T, H)` last hidden states of the batch, without the vocabulary-wide output layer."""
    lm = causal_lm(model)
    kwargs: dict[str, Any] = {"position_ids": batch.position_ids, "use_cache": False}
    if batch.pieces is not None:
        if lm.config._attn_implementation != PACKED:
            # Any other attention would let packed examples see each other, silently.
            raise UserError("A packed batch needs packed attention: call use_packed_attention(model), or pad the rows.")
        kwargs["plan"] = Plan(batch.pieces, batch.input_ids.device)
    else:
        kwargs["attention_mask"] = batch.attention_mask
    out = lm.base_model(input_ids=batch.input_ids, **kwargs).last_hidden_state
    return out.reshape(-1, out.shape[-1])


def score(model: Any, batch: Batch) -> TokenScores:
    """Log-probabilities (N,) of the batch's targets; only the positions that predict one meet the vocabulary."""
    if is_sharded(model):
        return causal_lm(model).score_sharded(batch)  # FSDP gathers the weights and runs `score_gathered`
    return score_gathered(model, batch)


def score_gathered(model: Any, batch: Batch, temperature: float = 1.0) -> TokenScores:
    """`score` of a model whose weights are all on this device, under softmax(logits / temperature)."""
    hidden = hidden_states(model, batch).index_select(0, batch.target_sources)
    states, weight, bias, softcap = before_softmax(model, hidden, temperature)
    return token_scores(states, weight, batch.target_ids, bias, softcap=softcap)


@torch.no_grad()
def score_with_entropy(model: Any, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`(N,)` log-probabilities of the targets and entropies of the distributions they were drawn from, without
    gradient; one forward pass."""
    hidden = hidden_states(model, batch).index_select(0, batch.target_sources)
    states, weight, bias, softcap = before_softmax(model, hidden, temperature)
    scores = token_scores(states, weight, batch.target_ids, bias, softcap=softcap)
    return scores.logprobs, token_entropies(states, weight, bias, softcap=softcap)


def predictions(model: Any, batch: Batch) -> Predictions:
    """What the model predicts at the batch's targets."""
    return before_softmax(model, hidden_states(model, batch).index_select(0, batch.target_sources), 1.0)


def kl_from_base(model: Any, batch: Batch) -> Tensor:
    """`(N,)` KL(base ‖ model) at the batch's targets; the base is what is left with the adapters switched off.

    It is differentiable in the adapter. Two forward passes, that of the base without gradient.
    """
    with torch.no_grad(), using(model, None):
        base = predictions(model, batch)
    return token_kl(base, predictions(model, batch))


def before_softmax(model: Any, hidden: Tensor, temperature: float) -> Predictions:
    """States, output embedding, bias and softcap whose product is logits / temperature."""
    lm = causal_lm(model)
    head = _plain_head(lm)
    states, weight, bias = hidden * (_logit_scale(lm.config) / temperature), head.weight, head.bias
    if torch.is_autocast_enabled(states.device.type):
        dtype = torch.get_autocast_dtype(states.device.type)
        states, weight = states.to(dtype), weight.to(dtype)  # once, and not block by block
    softcap = getattr(lm.config, "final_logit_softcapping", None)
    if temperature != 1:
        bias = None if bias is None else bias / temperature
        softcap = None if softcap is None else softcap / temperature  # c·tanh(z/c)/T = (c/T)·tanh((z/T)/(c/T))
    return Predictions(states, weight, bias, softcap)


def _logprobs(model: Any, batch: Batch) -> Tensor:
    return score(model, batch).logprobs


def completion_logprobs(model: Any, batch: Batch) -> Tensor:
    """`(C,)` log-probabilities of the batch's completions, summed over their targets."""
    return sum_by_completion(score(model, batch).logprobs, batch.target_completion, batch.num_completions)


def _plain_head(lm: Any) -> nn.Linear:
    head = lm.get_output_embeddings()
    head = getattr(head, "base_layer", head) if not hasattr(head, "lora_A") else head
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"The output layer of {type(lm).__name__} is a {type(head).__name__}, which cannot be scored in chunks: "
            "leave it out of peft.target_modules."
        )
    return head


def _logit_scale(config: Any) -> float:
    """What the architecture multiplies its logits by (Cohere) or divides them by (Granite)."""
    if (scale := getattr(config, "logit_scale", None)) is not None:
        return float(scale)
    return 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)
