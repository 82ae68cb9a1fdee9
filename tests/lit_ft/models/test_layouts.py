"""Packed and padded rows say the same: log-probabilities and gradients, on four architectures."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_ft.batches import Batch, Completion, Example, pack, pad
from lit_ft.data.packing import Layout, lay_out, split_by_tokens
from lit_ft.losses.logprobs import rows_by_completion, sum_by_completion
from lit_ft.models.attention import flash_cpu
from lit_ft.models.kinds.lora import apply_lora
from lit_ft.models.score import (
    completion_logprobs,
    score,
    score_gathered,
    score_with_entropy,
    use_packed_attention,
)
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


def related() -> list[Example]:
    """Prompts that begin alike, spread over the row so that those that share something do not stand together.

    A system prompt of 20 in three examples (0, 4, 9), of which one has four completions; identical prompts of 11 (1
    and 5); a prompt of 9 (7) that is the beginning of one of 17 (2), which is the beginning of one of 27 (6); a prompt
    of one token (3), and none (8).
    """
    system, same = ids(20, 40), ids(11, 41)
    short = ids(9, 42)
    longer = short + ids(8, 43)
    return [
        Example(system + ids(5, 44), (completion(6, 45),), 0),
        Example(same, (completion(1, 46),), 1),
        Example(longer, (completion(3, 47), completion(5, 48, untrained=2)), 2),
        Example(ids(1, 49), (completion(2, 50), completion(1, 51)), 3),
        Example(system + ids(1, 52), (completion(4, 53), completion(1, 54), completion(7, 55), completion(2, 56)), 4),
        Example(same, (completion(4, 57), completion(1, 58)), 5),
        Example(longer + ids(10, 59), (completion(2, 60),), 6),
        Example(short, (completion(3, 61),), 7),
        Example((), (completion(4, 62), completion(3, 63)), 8),
        Example(system + ids(9, 64), (completion(5, 65), completion(3, 66, untrained=1)), 9),
    ]


# Of the system prompt two copies, of the identical prompts one, of 9 and 17 tokens what three and two begin with.
SAVED = 2 * 20 + 11 + 2 * 9 + 8


def by_example(values: Tensor, rows: Sequence[Example]) -> dict[int, Tensor]:
    """The completions' values (C,) as those of each example, by its place in the data."""
    parts = values.split([len(row.completions) for row in rows])
    return {row.index: part for row, part in zip(rows, parts, strict=True)}


def in_data_order(values: Tensor, rows: Sequence[Example]) -> Tensor:
    parts = by_example(values, rows)
    return torch.cat([parts[index] for index in sorted(parts)])


@cache
def models(kind: str) -> tuple[Any, Any]:
    """Twins: one with packed attention, one with transformers' own, so that the two paths share nothing.

    Made once: tests leave all but their gradients as it is, or take a `copy.deepcopy`.
    """
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
    turned_rows = [rows[k] for k in (4, 1, 5, 0, 3, 2)]
    turned = logps_and_gradient(packed, pack(turned_rows))
    assert_same((in_data_order(turned[0], turned_rows), turned[1]), straight)


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


@pytest.fixture(params=["flash kernel", "SDPA"])
def any_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute packed attention on a CPU; the second is for what the first cannot do."""
    if request.param == "SDPA":
        monkeypatch.setattr(flash_cpu, "usable", lambda query: False)
    elif not flash_cpu.usable(torch.empty(1)):
        pytest.skip("this PyTorch has no flash kernel for CPUs")
    return str(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_share_beginnings_equal_padded_ones(kind: str, any_backend: str) -> None:
    packed, padded = models(kind)
    rows = related()
    row = pack(rows)
    assert row.input_ids.shape[1] == sum(one.tokens for one in rows) - SAVED
    assert_same(logps_and_gradient(packed, row), logps_and_gradient(padded, pad(rows, PAD)))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_share_beginnings_in_any_order(kind: str, any_backend: str) -> None:
    packed, padded = models(kind)
    rows = related()
    wanted = logps_and_gradient(padded, pad(rows, PAD))
    for seed in range(4):
        turned = random.Random(seed).sample(rows, len(rows))
        row = pack(turned)
        assert row.input_ids.shape[1] == sum(one.tokens for one in rows) - SAVED
        found = logps_and_gradient(packed, row)
        assert_same((in_data_order(found[0], turned), found[1]), wanted)


def test_each_pair_that_shares_equals_each_alone() -> None:
    """Two by two: what is shared changes neither, whichever stands first."""
    packed, _ = models("llama")
    rows = related()
    with torch.no_grad():
        alone = [completion_logprobs(packed, pack([row])) for row in rows]
        for one, other in [(0, 4), (9, 0), (1, 5), (2, 7), (7, 2), (2, 6), (6, 7)]:
            pair = [rows[one], rows[other]]
            row = pack(pair)
            assert row.input_ids.shape[1] < pair[0].tokens + pair[1].tokens
            torch.testing.assert_close(
                completion_logprobs(packed, row), torch.cat([alone[one], alone[other]]), rtol=1e-5, atol=1e-5
            )


def another(example: Example, *, prompt_from: int | None = None, completions: Sequence[int] = ()) -> Example:
    """The same but for other tokens: in the prompt from a place on, and in some of the completions."""
    prompt, answers = example.prompt, list(example.completions)
    if prompt_from is not None:
        prompt = prompt[:prompt_from] + ids(len(prompt) - prompt_from, 80)
    for k in completions:
        answers[k] = Completion(ids(len(answers[k].ids), 81 + k), answers[k].mask)
    return replace(example, prompt=prompt, completions=tuple(answers))


# Which example is changed and how; lengths stay, and so does what is shared.
CHANGES: dict[str, tuple[int, dict[str, Any]]] = {
    "the only completion behind the system prompt": (0, {"completions": [0]}),
    "a question behind the system prompt": (0, {"prompt_from": 20}),
    "a question and its completions behind the system prompt": (9, {"prompt_from": 20, "completions": [0, 1]}),
    "a question of four completions": (4, {"prompt_from": 20}),
    "the completion of one of two identical prompts": (1, {"completions": [0]}),
    "the completions of the other": (5, {"completions": [0, 1]}),
    "the completion of the shortest of three": (7, {"completions": [0]}),
    "the completions of the middle one": (2, {"completions": [0, 1]}),
    "the end of the longest": (6, {"prompt_from": 17}),
    "an example that shares nothing": (3, {"prompt_from": 0, "completions": [0, 1]}),
    "an example without a prompt": (8, {"completions": [0, 1]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_neighbour_that_shares_a_beginning_changes_nothing(kind: str, any_backend: str) -> None:
    """Other tokens behind what is shared: all other examples keep their log-probabilities to the bit."""
    packed, _ = models(kind)
    rows = related()
    with torch.no_grad():
        before = by_example(completion_logprobs(packed, pack(rows)), rows)
        for what, (place, change) in CHANGES.items():
            changed = [another(row, **change) if row.index == place else row for row in rows]
            assert pack(changed).pieces == pack(rows).pieces, "sums of other lengths may be added up otherwise"
            after = by_example(completion_logprobs(packed, pack(changed)), changed)
            for index in before:
                if index == place:
                    assert (before[index] != after[index]).all(), what
                else:
                    assert torch.equal(before[index], after[index]), (what, index)


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_four_completions_changes_nothing_else(kind: str, any_backend: str) -> None:
    packed, _ = models(kind)
    rows = related()
    changed = [another(row, completions=[2]) if row.index == 4 else row for row in rows]
    with torch.no_grad():
        before, after = (completion_logprobs(packed, pack(group)) for group in (rows, changed))
    # Completions before those of example 4: 1 + 1 + 2 + 2.
    assert (before != after).nonzero().flatten().tolist() == [6 + 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, 1, 2, 7])
def test_a_neighbour_that_no_longer_shares_changes_nothing(kind: str, place: int) -> None:
    """Another prompt altogether: the row is laid out anew, and the others say the same to rounding."""
    packed, _ = models(kind)
    rows = related()
    changed = [another(row, prompt_from=0) if row.index == place else row for row in rows]
    assert pack(changed).input_ids.shape[1] > pack(rows).input_ids.shape[1]
    with torch.no_grad():
        before, after = (by_example(completion_logprobs(packed, pack(group)), rows) for group in (rows, changed))
    for index in before:
        if index == place:
            assert (before[index] != after[index]).all()
        else:
            torch.testing.assert_close(before[index], after[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_an_example_above_the_budget_is_a_batch_of_its_own(kind: str, layout: Layout) -> None:
    """At most 30 tokens a batch: the longest examples have more, and all values are those of one batch."""
    packed, padded = models(kind)
    rows = related()
    wanted = logps_and_gradient(padded, pad(rows, PAD))
    groups = split_by_tokens(rows, 30, layout)
    alone = {group[0].index for group in groups if group[0].tokens > 30}
    assert alone == {0, 4, 9} and all(len(group) == 1 for group in groups if group[0].index in alone)
    assert any(len(group) > 1 for group in groups)
    model = packed if layout == "packed" else padded
    parts = [logps_and_gradient(model, lay_out(group, layout, PAD)) for group in groups]
    in_turn = [row for group in groups for row in group]
    logps = in_data_order(torch.cat([logps for logps, _ in parts]), in_turn)
    assert_same((logps, torch.stack([gradient for _, gradient in parts]).sum(0)), wanted)


def drop_attention(model: Any, share: float) -> None:
    """Set the dropout of attention, wherever the architecture keeps it."""
    for module in model.modules():
        for name in ("attention_dropout", "dropout"):  # Llama and Qwen; OPT's attention
            if "Attention" in type(module).__name__ and isinstance(getattr(module, name, None), float):
                setattr(module, name, share)
        if isinstance(getattr(module, "attn_dropout", None), torch.nn.Dropout):  # GPT-2
            module.attn_dropout.p = share


@pytest.mark.parametrize("kind", KINDS)
def test_attention_dropout_keeps_examples_apart(kind: str) -> None:
    """Its random numbers depend on the row's layout alone: with the same seed, only what is changed changes."""
    packed = copy.deepcopy(models(kind)[0])
    drop_attention(packed, 0.5)
    packed.train()
    rows = related()

    def logps(group: Sequence[Example], seed: int = 0) -> dict[int, Tensor]:
        torch.manual_seed(seed)
        with torch.no_grad():
            return by_example(completion_logprobs(packed, pack(group)), group)

    before = logps(rows)
    for place, change in CHANGES.values():
        changed = [another(row, **change) if row.index == place else row for row in rows]
        after = logps(changed)
        assert [index for index in before if not torch.equal(before[index], after[index])] == [place]
    # It does drop: in training every draw is another, and in evaluation there is none.
    assert all((before[index] != other).any() for index, other in logps(rows, seed=1).items())
    packed.eval()
    evaluated = logps(rows)
    assert all(torch.equal(evaluated[index], other) for index, other in logps(rows, seed=1).items())


def test_gradients_flow_through_attention_dropout() -> None:
    """A packed step in training with dropout: finite, and every layer's projections learn."""
    packed = copy.deepcopy(models("llama")[0])
    drop_attention(packed, 0.1)
    packed.train()
    torch.manual_seed(0)
    _, gradient = logps_and_gradient(packed, pack(related()))
    assert gradient.isfinite().all()
    for layer in packed.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert getattr(layer.self_attn, name).weight.grad.norm() > 0


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


@pytest.mark.parametrize("kind", KINDS)
def test_examples_laid_apart_share_nothing_and_say_the_same(kind: str) -> None:
    """The layout for kernels that copy shared keys: completions share their prompt, examples nothing."""
    packed, padded = models(kind)
    rows = related()
    apart = pack(rows, across=False)
    assert apart.input_ids.shape[1] == sum(row.tokens for row in rows) > pack(rows).input_ids.shape[1]
    assert_same(logps_and_gradient(packed, apart), logps_and_gradient(padded, pad(rows, PAD)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_precision_packed_is_as_exact_as_padded(checkpointing: bool) -> None:
    """bf16 weights, fused float32 adapters, autocast: against the same adapted model in float32 and padded rows.

    bf16 keeps 8 bits, so both are off by about a hundredth; the packed way may not be off by much more.
    """
    exact = apply_lora(tiny.model("llama"), r=4, alpha=8, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in exact.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
        else:
            parameter.data = parameter.data.bfloat16().float()
    rows = related()
    wanted = logps_and_gradient(exact, pad(rows, PAD))
    errors = []
    for layout in ("packed", "padded"):
        mixed = copy.deepcopy(exact)
        for name, parameter in mixed.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
        if layout == "packed":
            assert use_packed_attention(mixed) is None
        mixed.train()
        if checkpointing:
            mixed.enable_input_require_grads()
            mixed.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16):
            found = logps_and_gradient(mixed, pack(rows) if layout == "packed" else pad(rows, PAD))
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)])
    for packed_error, padded_error in zip(*errors, strict=True):
        assert packed_error < 0.05
        assert packed_error < 2 * padded_error + 1e-3


# At another temperature, and with entropies.


def gemma() -> Any:
    """Gemma 2 bounds its logits: 30·tanh(logits / 30) by default, here 3, which bends all of them."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    settings = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": 3.0}
    model = Gemma2ForCausalLM(Gemma2Config(**settings, **heads, attn_implementation="eager", pad_token_id=PAD))
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    return model.eval()


def biased() -> Any:
    """A head with a bias, as Phi has one."""
    model = tiny.model("llama")
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.randn(260, generator=torch.Generator().manual_seed(1)) * 2)
    return model.eval()


def cohere() -> Any:
    """Cohere multiplies its logits by `logit_scale`."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    settings = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "logit_scale": 0.25, "pad_token_id": PAD}
    model = CohereForCausalLM(CohereConfig(**settings, **heads, bos_token_id=1, eos_token_id=2))
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    return model.eval()


HEADS = {"llama": lambda: tiny.model("llama").eval(), "gemma": gemma, "biased": biased, "cohere": cohere}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_scores_at_a_temperature_are_log_softmax_of_the_models_logits_over_it(kind: str, temperature: float) -> None:
    """And the entropies those of the distributions that tokens are drawn from at this temperature."""
    model = HEADS[kind]()
    batch = pad(examples(), PAD)
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
    logits = out.logits.flatten(0, 1).index_select(0, batch.target_sources) / temperature
    wanted = logits.log_softmax(-1).gather(-1, batch.target_ids[:, None]).squeeze(-1)
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    found = score_gathered(model, batch, temperature)
    torch.testing.assert_close(found.logprobs, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.is_top1, logits.argmax(-1) == batch.target_ids)
    both = score_with_entropy(model, batch, temperature)
    assert torch.equal(both[0], found.logprobs)
    torch.testing.assert_close(both[1], entropies, rtol=1e-5, atol=1e-5)
    if temperature == 1:
        assert torch.equal(score(model, batch).logprobs, found.logprobs)
    else:
        assert float((found.logprobs - score(model, batch).logprobs).abs().max()) > 0.1


def test_gradients_at_a_temperature() -> None:
    """Through the chunked scores and through whole logits, of a model whose logits are bounded."""
    one, other = gemma(), gemma()
    batch = pad(examples(), PAD)
    score_gathered(one, batch, 0.6).logprobs.sum().backward()
    out = other(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
    logits = out.logits.flatten(0, 1).index_select(0, batch.target_sources) / 0.6
    logits.log_softmax(-1).gather(-1, batch.target_ids[:, None]).sum().backward()
    for found, wanted in zip(one.parameters(), other.parameters(), strict=True):
        assert found.grad is not None and wanted.grad is not None
        assert float((found.grad - wanted.grad).norm()) <= 1e-4 * float(wanted.grad.norm()) + 1e-6


def test_scoring_with_entropies_leaves_no_gradient() -> None:
    model = tiny.model("llama")
    for value in score_with_entropy(model, pad(examples(), PAD)):
        assert not value.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_entropies_and_rows_are_the_same_packed(kind: str) -> None:
    packed, padded = models(kind)
    rows = related()
    batches = pack(rows), pad(rows, PAD)
    found = [
        [
            rows_by_completion(values, batch.target_completion, batch.completion_lengths)
            for values in score_with_entropy(model, batch, 0.8)
        ]
        for model, batch in zip((packed, padded), batches, strict=True)
    ]
    for one, other in zip(*found, strict=True):
        assert one.shape == (len(batches[0].completion_lengths), int(batches[0].completion_lengths.max()))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [pack, lambda rows: pack(rows, across=False), lambda rows: pad(rows, PAD)])
def test_targets_are_predicted_at_the_token_before(make: Any) -> None:
    """Wherever in the row that lies."""
    for rows in (examples(), related()):
        batch = make(rows)
        flat = batch.input_ids.flatten()
        # (text before the target and with it) of every target
        known = [
            (row.prompt + answer.ids)[: len(row.prompt) + k + 1]
            for row in rows
            for answer in row.completions
            for k, trained in enumerate(answer.mask)
            if trained and len(row.prompt) + k
        ]
        assert batch.target_ids.tolist() == [text[-1] for text in known]
        assert flat[batch.target_sources].tolist() == [text[-2] for text in known]
        last = torch.tensor([answer.ids[-1] for row in rows for answer in row.completions])
        assert torch.equal(flat[batch.completion_ends], last)
        positions = batch.position_ids.flatten()
        assert positions[batch.target_sources].tolist() == [len(text) - 2 for text in known]
        whole = torch.tensor([len(row.prompt) + len(answer.ids) for row in rows for answer in row.completions])
        assert torch.equal(positions[batch.completion_ends] + 1, whole)


def test_margins_stand_with_their_examples() -> None:
    """Three completions have three pairs of one margin; an example without one has 0; none at all is None."""
    rows = examples()
    first, second, third = replace(rows[0], margin=0.5), rows[1], replace(rows[2], margin=2.0)
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2], [3, 4]])
    for batch in (pack([first, second, third]), pad([first, second, third], PAD)):
        assert batch.margins is not None and batch.margins.tolist() == [0.5, 0.0, 2.0]
        assert batch.margins_of(pairs).tolist() == [0.5, 0.5, 0.5, 0.0]  # type: ignore[union-attr]
    assert pack([second]).margins is None and pack([second]).margins_of(torch.tensor([[0, 1]])) is None
