"""The rehearsal of a step against the step itself: the same tensors, counted the same way, with numbers in them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from lit_ft.batches import Batch, Completion, Example, pack, pad
from lit_ft.losses.logprobs import rows_by_completion
from lit_ft.models.adapt import causal_lm
from lit_ft.models.judge import head_values, scalar_head
from lit_ft.models.kinds import KINDS
from lit_ft.models.roles import POLICY, add_role, train_only
from lit_ft.models.score import score, score_gathered, use_packed_attention
from lit_ft.models.shard import decoder_layers
from lit_ft.resources.estimate import (
    LOGPROBS,
    PARTS,
    Estimate,
    Setting,
    _Held,
    _marking,
    _rehearse,
    bytes_of_rows,
    rehearse,
    with_completions,
)
from lit_ft.rollouts import Sampling
from lit_ft.rollouts.transformers import TransformersRollouts
from tests import tiny
from tests.lit_ft.modules.test_online import online
from tests.lit_ft.resources.test_memory import llama

pytestmark = pytest.mark.slow

GIB = 2**30


def batch_of(rows: int, tokens: int, *, padded: bool = False) -> Batch:
    """Rows of `tokens` tokens, of unequal content, the second half of which is predicted."""
    half = tokens // 2

    def ids(count: int, seed: int) -> tuple[int, ...]:
        return tuple(4 + (31 * seed + 7 * k) % 250 for k in range(count))

    examples = [
        Example(ids(tokens - half - k, k), (Completion(ids(half, 9 + k), (True,) * half),), k) for k in range(rows)
    ]
    return pad(examples, 3) if padded else pack(examples)


def really_held(model: Any, batch: Batch, setting: Setting, penalty: Any) -> dict[str, Counter[str]]:
    """What a real pass holds, by the rehearsal's own count."""
    held = _Held(64)
    held.weights = {id(p) for p in model.parameters()}
    held.known |= {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    lm = causal_lm(model)
    hooks = [p.register_post_accumulate_grad_hook(held.is_gradient) for p in model.parameters() if p.requires_grad]
    hooks += _marking(lm, decoder_layers(lm), held)
    with held, torch.autocast("cpu", torch.bfloat16, enabled=setting.mixed):
        held.enter("forward pass", "activations")
        loss = score(model, batch).logprobs.sum()
        held.enter("log-probabilities backward", "log-probabilities")
        if penalty is not None and (more := penalty(model)) is not None:
            loss = loss + more
        loss.backward()
        held.enter("between", "backward pass")
    held.fullest.pop("between")
    for hook in hooks:
        hook.remove()
    return held.fullest


def built(family: str, kind: str, setting: Setting, *, meta: bool, padded: bool = False) -> Any:
    with torch.device("meta" if meta else "cpu"):
        model = llama(64, 2, 4, 2, 160) if family == "small llama" else tiny.model(family)
        if setting.mixed and kind != "full":
            model = model.bfloat16()
        if setting.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        adapter = KINDS[kind](**({"r": 4} if kind in ("lora", "dora", "pissa") else {}))
        model = adapter.begin(model)
    if not padded:
        assert use_packed_attention(model) is None
    return model.train(), adapter.penalty


MIXED, PLAIN = Setting(mixed=True), Setting()


@pytest.mark.parametrize(
    ("family", "kind", "setting"),
    [
        *[("llama", kind, setting) for kind in ("lora", "dora", "ia3", "full") for setting in (PLAIN, MIXED)],
        ("llama", "adalora", PLAIN),
        ("llama", "pissa", PLAIN),
        ("llama", "lora", Setting(checkpointing=True)),
        ("llama", "full", Setting(mixed=True, checkpointing=True)),
        ("qwen2", "lora", MIXED),
        ("gpt2", "lora", PLAIN),
        ("gpt2", "full", PLAIN),
        ("opt", "lora", PLAIN),
        ("opt", "ia3", MIXED),
    ],
)
def test_a_rehearsed_step_holds_what_a_real_one_does(family: str, kind: str, setting: Setting) -> None:
    batch = batch_of(2, 60)
    real, penalty = built(family, kind, setting, meta=False)
    wanted = really_held(real, batch, setting, penalty)
    fake, penalty = built(family, kind, setting, meta=True)
    found = _rehearse(fake, causal_lm(fake), batch, setting, False, penalty)
    assert found.keys() == wanted.keys()
    for stage, parts in wanted.items():
        assert sum(found[stage].values()) == pytest.approx(sum(parts.values()), rel=0.02, abs=512), stage
        for part in PARTS:
            assert found[stage][part] == pytest.approx(parts[part], rel=0.03, abs=1024), (stage, part)


@pytest.mark.parametrize("kind", ["lora", "full", "adalora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_are_alike_are_counted_without_rehearsing_all(kind: str, checkpointing: bool) -> None:
    with torch.device("meta"):
        model = llama(64, 9, 4, 2, 160)
        adapter = KINDS[kind]()
        model = adapter.begin(model)
    assert use_packed_attention(model) is None
    setting, batch = Setting(checkpointing=checkpointing), batch_of(2, 40)
    lm = causal_lm(model)
    whole = _rehearse(model, lm, batch, setting, False, adapter.penalty)
    few = rehearse(model, batch, setting, penalty=adapter.penalty)
    assert len(decoder_layers(lm)) == 9, "it is left as it was"
    for stage, parts in few.moments.items():
        assert sum(parts.values()) == pytest.approx(sum(whole[stage].values()), rel=1e-3), stage
    most = max(sum(parts.values()) for stage, parts in few.moments.items())
    assert most == pytest.approx(max(sum(parts.values()) for parts in whole.values()), rel=1e-3)


def test_layers_that_differ_are_all_rehearsed() -> None:
    with torch.device("meta"):
        model = KINDS["lora"]().begin(llama(64, 5, 4, 2, 160))
        plain = KINDS["lora"](target_modules=r".*layers\.0\..*_proj").begin(llama(64, 5, 4, 2, 160))
    batch = batch_of(2, 40)
    for one in (model, plain):
        assert use_packed_attention(one) is None
    whole = _rehearse(plain, causal_lm(plain), batch, PLAIN, False, None)
    assert rehearse(plain, batch, PLAIN).moments == whole
    assert rehearse(model, batch, PLAIN).estimate().sum > rehearse(plain, batch, PLAIN).estimate().sum


def test_the_model_is_left_as_it_was() -> None:
    model, _ = built("llama", "lora", PLAIN, meta=True)
    model.eval()
    before = {name: id(p) for name, p in [*model.named_parameters(), *model.named_buffers()]}
    formats = {name: p.dtype for name, p in model.named_parameters()}
    rehearse(model, batch_of(1, 20), Setting("cuda", True, True), accumulates=True)
    assert {name: id(p) for name, p in [*model.named_parameters(), *model.named_buffers()]} == before
    assert {name: p.dtype for name, p in model.named_parameters()} == formats
    assert not model.training and not causal_lm(model).is_gradient_checkpointing
    assert all(p.grad is None and p.device.type == "meta" for p in model.parameters())
    real = tiny.model("llama")  # what it registered for the rehearsal is gone, too
    assert use_packed_attention(real) is None
    assert torch.isfinite(score(real, batch_of(1, 20)).logprobs).all()


def test_parts_that_are_sums_of_sizes() -> None:
    model, _ = built("llama", "lora", PLAIN, meta=True)
    lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    found = rehearse(model, batch_of(2, 60), PLAIN, accumulates=True).estimate(rows=77, reference=5)
    assert (found.parts["weights"], found.parts["adapters"]) == (4 * base, 4 * lora)
    assert (found.parts["optimizer"], found.parts["rows"], found.parts["reference"]) == (8 * lora, 77, 5)
    assert found.parts["gradients"] == pytest.approx(4 * lora, rel=0.05), "those of the pass before"
    half = rehearse(model, batch_of(2, 60), MIXED).estimate()
    assert half.parts["weights"] == 2 * base and half.parts["adapters"] == 4 * lora
    averages = rehearse(model, batch_of(1, 20), PLAIN, allocates_ranks=True).estimate()
    assert averages.parts["allocator of ranks"] == 8 * lora


def test_full_fine_tuning_is_fullest_where_gradients_and_states_meet() -> None:
    model, _ = built("llama", "full", PLAIN, meta=True)
    numbers = sum(p.numel() for p in model.parameters())
    found = rehearse(model, batch_of(1, 8), PLAIN).estimate()
    assert found.moment == "optimizer step"
    largest = max(p.numel() for p in model.parameters())
    assert found.sum == 4 * 4 * numbers + 8 * largest


def test_sharding_divides_what_lies_still_and_gathers_what_runs() -> None:
    with torch.device("meta"):
        model = KINDS["lora"]().begin(llama(64, 8, 4, 2, 160))
    assert use_packed_attention(model) is None
    step = rehearse(model, batch_of(1, 20), PLAIN)
    one, four, off = step.estimate(), step.estimate(4), step.estimate(4, offloaded=True)
    assert four.parts["weights"] == pytest.approx(one.parts["weights"] / 4, abs=1)
    assert four.parts["optimizer"] == pytest.approx(one.parts["optimizer"] / 4, abs=1)
    # The fullest moment may be another one, since some gradients are there only at the end.
    assert four.parts["activations"] == pytest.approx(one.parts["activations"], rel=0.1)
    assert one.parts["gathered"] == 0 < four.parts["gathered"] < one.parts["weights"]
    assert off.parts["weights"] == off.parts["optimizer"] == 0


def test_more_tokens_and_checkpointing() -> None:
    model, _ = built("small llama", "lora", PLAIN, meta=True)
    short, long = (rehearse(model, batch_of(1, n), PLAIN).estimate() for n in (200, 400))
    assert long.parts["activations"] == pytest.approx(2 * short.parts["activations"], rel=0.02)
    assert rehearse(model, batch_of(1, 400), Setting(checkpointing=True)).estimate().sum < long.sum


def test_padded_rows() -> None:
    batch = batch_of(2, 60, padded=True)
    real, _ = built("llama", "lora", PLAIN, meta=False, padded=True)
    fake, _ = built("llama", "lora", PLAIN, meta=True, padded=True)
    wanted = max(sum(parts.values()) for parts in really_held(real, batch, PLAIN, None).values())
    found = max(sum(parts.values()) for parts in rehearse(fake, batch, PLAIN).moments.values())
    assert found == pytest.approx(wanted, rel=0.05)


def test_on_a_gpu_its_blocks_and_its_attention_count() -> None:
    """The kernel keeps keys as they are, the CPU's too; logits come in larger blocks."""
    model, _ = built("small llama", "lora", MIXED, meta=True)
    batch = batch_of(2, 1400)
    cpu, gpu = (rehearse(model, batch, Setting(device, True)).estimate() for device in ("cpu", "cuda"))
    assert gpu.parts["log-probabilities"] > cpu.parts["log-probabilities"] + 4 * 500 * 512
    assert gpu.parts["activations"] == pytest.approx(cpu.parts["activations"], rel=0.1)
    assert gpu.wanted > gpu.sum and cpu.wanted == cpu.sum


def test_what_fits() -> None:
    assert Estimate("cpu", {"weights": 8 * GIB}, "").fits(8 * GIB)
    assert not Estimate("cuda", {"weights": 8 * GIB}, "").fits(8 * GIB), "CUDA itself takes some"
    assert Estimate("cuda", {"weights": 6 * GIB}, "").fits(8 * GIB)


def test_rows_are_counted_as_python_keeps_them() -> None:
    ids = tuple(1000 + k for k in range(50))
    example = Example(ids, (Completion(ids, (True,) * 50),), 0)
    assert bytes_of_rows([example, example]) == 2 * (100 * 40 + 50 * 8)


# PPO's update, and the making of completions.


def held_by(model: Any, act: Any) -> int:
    """Bytes that `act` holds at its fullest moment beside the weights of `model`."""
    held = _Held(64)
    held.weights = {id(p) for p in model.parameters()}
    held.known |= {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    with held:
        held.enter("all of it", "activations")
        act()
    return sum(held.fullest["all of it"].values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_rehearsed_update_of_ppo_holds_what_a_real_one_does(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy and value model, forward both and then backward both, as the module does it."""
    setting, batch = Setting(checkpointing=checkpointing), batch_of(2, 60)
    real, _ = built("small llama", "lora", setting, meta=False)
    module = online("ppo", real)
    # There is no trainer; the old values of a policy that was just asked.
    monkeypatch.setattr(module, "manual_backward", lambda tensor, gradient: tensor.backward(gradient=gradient))
    count, most = batch.num_completions, int(batch.completion_lengths.max())
    old = {key: torch.zeros(count, most) for key in ("logps", "advantages")}
    old |= {"mask": torch.ones(count, most, dtype=torch.bool), "value_mask": torch.ones(count, most + 1).bool()}
    old |= {key: torch.zeros(count, most + 1) for key in ("values", "returns")}

    def update() -> None:
        flat = score_gathered(real, batch).logprobs
        logps = rows_by_completion(flat, batch.target_completion, batch.completion_lengths)
        module._backward(batch, logps, old, {"completions": count, "tokens": count * most})

    wanted = held_by(real.train(), update)

    fake, _ = built("small llama", "lora", setting, meta=True)
    with torch.device("meta"):
        add_role(fake, "value")
        heads = torch.nn.ModuleList([scalar_head(64, bias=True)])
    train_only(fake, [POLICY, "value"])

    def values(model: Any, batch: Batch) -> torch.Tensor:
        return head_values(model, heads[0], batch, torch.cat([batch.target_sources, batch.completion_ends]))

    found = rehearse(fake, batch, setting, passes={**LOGPROBS, "value": values}, heads=heads)
    assert max(sum(parts.values()) for parts in found.moments.values()) == pytest.approx(wanted, rel=0.03)
    alone = rehearse(fake, batch, setting)
    assert found.activations == pytest.approx(2 * alone.activations, rel=0.1), "of both models at once"
    assert heads[0].weight.device.type == "meta" and list(fake.peft_config) == [POLICY, "value"]


def test_rehearsed_completions_hold_what_real_ones_do() -> None:
    """Two prompts that get twelve tokens each: keys and values grow to the last of them."""
    real, _ = built("small llama", "lora", PLAIN, meta=False)
    prompts, sampling = [tuple(range(4, 34)), tuple(range(40, 70))], Sampling(max_new_tokens=12)
    engine = TransformersRollouts(real, sampling, pad_id=3, max_tokens=1000)
    wanted = held_by(real, lambda: engine.generate(prompts, 1, 0))
    fake, _ = built("small llama", "lora", PLAIN, meta=True)
    update = rehearse(fake, batch_of(1, 20), PLAIN)
    found = with_completions(update, fake, rows=2, width=30, more=12)
    made = {stage: parts for stage, parts in found.moments.items() if stage.startswith("making completions")}
    most = max(sum(parts.values()) - parts["gradients"] for parts in made.values())
    assert most == pytest.approx(wanted, rel=0.1)
    # The last token is drawn from the logits of the one before it: 41 of 42 have keys and values.
    layers, heads, width, numbers = 2, 2, 16, 2 * (30 + 11)
    kept = max(parts["keys and values"] for parts in made.values())
    whole = 2 * layers * heads * width * numbers * 4
    assert kept == pytest.approx(whole, rel=0.02), "the allocator rounds"
    assert fake.training and {p.device.type for p in fake.parameters()} == {"meta"}
