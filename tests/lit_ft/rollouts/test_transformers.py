"""Rollouts by the model in training: drawn from softmax(logits / T) exactly, and the model left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lit_ft.batches import Completion, Example, pack
from lit_ft.errors import UserError
from lit_ft.models.adapt import causal_lm
from lit_ft.models.attention import PACKED
from lit_ft.models.kinds import KINDS
from lit_ft.models.score import score, use_packed_attention
from lit_ft.rollouts import Rollout, RolloutEngine, RolloutError, Sampling
from lit_ft.rollouts.base import as_rollout
from lit_ft.rollouts.transformers import TransformersRollouts
from tests import tiny

COLD = 1e-4
"""At this temperature a token that leads by 0.01 is drawn surely."""

PAD = 3
# Of many lengths, so that most are padded.
PROMPTS = [tuple((7 * k + 11 * length + 5) % 250 + 4 for k in range(length)) for length in (4, 1, 17, 4, 9)]


def engine(model: Any, sampling: Sampling, pad_id: int = PAD, max_tokens: int = 10_000, **more: Any) -> RolloutEngine:
    return TransformersRollouts(model, sampling, pad_id, max_tokens, **more)


def greedy(model: Any, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The most probable next token, `count` times; the whole text anew each time, alone and without a cache."""
    lm = copy.deepcopy(causal_lm(model)).eval()
    lm.set_attn_implementation("eager")
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def completions(found: list[list[Rollout]]) -> list[list[tuple[int, ...]]]:
    return [[rollout.completion for rollout in of_prompt] for of_prompt in found]


# --- what is drawn ---------------------------------------------------------------------------------------------------


def surprises(drawn: list[int], expected: torch.Tensor) -> int:
    """Tokens whose frequency is over 5 standard deviations (and 3 draws) from the expected one."""
    n = len(drawn)
    frequency = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / n
    bound = 5 * (expected * (1 - expected) / n).sqrt() + 3 / n
    return int(((frequency - expected).abs() > bound).sum())


@pytest.mark.parametrize(("temperature", "other"), [(1.0, 0.7), (0.7, 1.0)])
def test_first_tokens_come_as_often_as_the_policy_says(temperature: float, other: float) -> None:
    """Whatever the model's own settings for generation are: those of chat models often cut and penalise."""
    model = tiny.model()
    own = model.generation_config
    own.update(top_k=3, top_p=0.5, min_p=0.2, repetition_penalty=4.0, suppress_tokens=list(range(0, 260, 2)))
    own.update(no_repeat_ngram_size=1, min_new_tokens=1, bad_words_ids=[[9]], renormalize_logits=False)
    kept = own.to_dict()
    prompt = PROMPTS[4]
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    drawer = engine(model, Sampling(temperature, 1, (2,)), max_tokens=30_000)
    drawn = [rollout.completion[0] for rollout in drawer.generate([prompt], 4000, 1)[0]]
    assert surprises(drawn, (logits / temperature).softmax(-1)) == 0
    assert surprises(drawn, (logits / other).softmax(-1)) > 3  # the bound can tell
    assert model.generation_config is own and own.to_dict() == kept


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "gpt2"])
def test_padding_changes_nothing(kind: str) -> None:
    """Prompts of five lengths in one batch go on as each does alone."""
    model = tiny.model(kind)
    found = completions(engine(model, Sampling(COLD, 8)).generate(PROMPTS, 2, 0))
    assert found == [[greedy(model, prompt, 8)] * 2 for prompt in PROMPTS]


@pytest.mark.parametrize("pad_is_stop", [True, False])
def test_a_completion_ends_with_its_first_stop_token(pad_is_stop: bool) -> None:
    """Also where the same token pads, and where prompts hold it: at their start, inside and at the end."""
    model = tiny.model()
    whole = [greedy(model, prompt, 10) for prompt in PROMPTS]
    stop = whole[2][3]
    with_stops = [*PROMPTS, (stop, stop, *PROMPTS[0]), (*PROMPTS[0][:2], stop, *PROMPTS[0][2:]), (*PROMPTS[4], stop)]
    sampling = Sampling(COLD, 10, (stop, 1))
    found = engine(model, sampling, pad_id=stop if pad_is_stop else PAD).generate(with_stops, 1, 0)
    for prompt, (rollout,) in zip(with_stops, found, strict=True):
        expected = greedy(model, prompt, 10)
        end = next((k for k, token in enumerate(expected) if token in (stop, 1)), None)
        assert rollout.prompt == prompt
        assert rollout.ended is (end is not None)
        assert rollout.completion == (expected if end is None else expected[: end + 1])
    assert found[2][0].ended and len(found[2][0].completion) <= 4
    assert not all(rollout.ended for (rollout,) in found)


def test_cutting_by_hand() -> None:
    two = Sampling(1.0, 4, (7, 8))
    assert as_rollout((1,), [5, 6], two) == Rollout((1,), (5, 6), False)
    assert as_rollout((1,), [5, 8, 7, 7], two) == Rollout((1,), (5, 8), True)
    assert as_rollout((7,), [7], two) == Rollout((7,), (7,), True)
    assert as_rollout((1,), [1, 2, 3, 4, 7], two) == Rollout((1,), (1, 2, 3, 4), False)  # the limit comes first
    assert as_rollout((1,), [5, 6], Sampling(1.0, 4)) == Rollout((1,), (5, 6), False)
    with pytest.raises(ValueError, match="no token"):
        as_rollout((1,), [], two)


# --- randomness ------------------------------------------------------------------------------------------------------


def test_the_seed_decides_and_nothing_else() -> None:
    model = tiny.model()
    drawer = engine(model, Sampling(1.0, 6), max_tokens=60)  # several batches
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = drawer.generate(PROMPTS, 3, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(456)
    torch.rand(10)
    assert drawer.generate(PROMPTS, 3, 5) == first
    assert drawer.generate(PROMPTS, 3, 6) != first
    assert len(set(completions(first)[0])) == 3  # a prompt's completions are drawn apart
    assert completions(first)[0] != completions(first)[3]


def test_draws_depend_on_the_place_and_not_on_what_is_drawn_beside() -> None:
    """So processes that share prompts out, or a smaller budget of tokens, make the same completions."""
    model = tiny.model()
    whole = engine(model, Sampling(1.0, 6)).generate(PROMPTS, 3, 5)
    assert engine(model, Sampling(1.0, 6), max_tokens=1).generate(PROMPTS, 3, 5) == whole
    drawer = engine(model, Sampling(1.0, 6))
    for rank in range(2):
        mine = drawer.generate(PROMPTS[rank::2], 3, 5, places=range(rank, len(PROMPTS), 2))
        assert mine == whole[rank::2]
    assert drawer.generate(PROMPTS, 3, 5, places=[9, 8, 7, 6, 5]) != whole


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 40, 56, 10_000])
def test_the_budget_holds_and_every_prompt_is_answered_in_its_place(
    max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model()
    shapes: list[torch.Size] = []
    generate = model.generate

    def spy(**inputs: Any) -> Any:
        shapes.append(inputs["input_ids"].shape)
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", spy)
    done: list[int] = []
    found = engine(model, Sampling(COLD, 3), max_tokens=max_tokens).generate(PROMPTS, 3, 0, done.append)
    assert completions(found) == [[greedy(model, prompt, 3)] * 3 for prompt in PROMPTS]
    assert sum(rows for rows, _ in shapes) == 15
    assert all(rows == 1 or rows * (width + 3) <= max_tokens for rows, width in shapes)
    assert done == sorted(done) and done[-1] == 15 and len(done) == len(shapes)
    assert (len(shapes) == 1) is (max_tokens == 10_000) and (len(shapes) == 15) is (max_tokens == 1)


def test_no_prompts_are_no_rollouts() -> None:
    assert engine(tiny.model(), Sampling()).generate([], 2, 0) == []


# --- the model is as it was ------------------------------------------------------------------------------------------


def state(model: Any) -> tuple[Any, ...]:
    lm = causal_lm(model)
    return [module.training for module in model.modules()], lm.config._attn_implementation, id(lm.generation_config)


def in_training() -> Any:
    """Packed attention, gradient checkpointing, adapters; one part in eval mode for good."""
    model = KINDS["lora"](r=4).begin(tiny.model())
    assert use_packed_attention(model) is None
    lm = causal_lm(model)
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    lm.enable_input_require_grads()
    lm.config.use_cache = False
    model.train()
    lm.model.norm.eval()
    return model


def packed() -> Any:
    rest = Completion(tuple(range(20, 26)), (True,) * 6)
    return pack([Example(tuple(range(5, 12)), (rest,)), Example(tuple(range(30, 33)), (rest,))])


def test_a_model_in_training_generates_and_trains_on() -> None:
    model = in_training()
    before, scored = state(model), score(model, packed()).logprobs.detach()
    assert before[1] == PACKED
    found = engine(model, Sampling(COLD, 6)).generate(PROMPTS, 1, 0)
    assert completions(found) == [[greedy(model, prompt, 6)] for prompt in PROMPTS]
    assert state(model) == before and causal_lm(model).config.use_cache is False
    again = score(model, packed()).logprobs
    torch.testing.assert_close(again.detach(), scored, rtol=0, atol=0)
    again.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(error: BaseException) -> None:
    model = in_training()
    before, random = state(model), torch.get_rng_state()

    def fail(done: int) -> None:
        assert not model.training and causal_lm(model).config._attn_implementation != PACKED
        raise error

    with pytest.raises(type(error)):
        engine(model, Sampling(1.0, 4), max_tokens=30).generate(PROMPTS, 2, 0, fail)
    assert state(model) == before and torch.equal(torch.get_rng_state(), random)


def test_an_attention_that_can_generate_is_kept() -> None:
    model = tiny.model()
    model.set_attn_implementation("eager")
    seen: list[str] = []
    engine(model, Sampling(1.0, 2)).generate(PROMPTS, 1, 0, lambda done: seen.append(model.config._attn_implementation))
    assert seen == ["eager"] and model.config._attn_implementation == "eager"


def test_dropout_is_off_while_generating() -> None:
    model = tiny.model("gpt2").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    found = completions(engine(model, Sampling(COLD, 5)).generate(PROMPTS, 1, 0))
    assert found == [[greedy(model, prompt, 5)] for prompt in PROMPTS]
    assert all(module.training for module in model.modules())


def test_it_computes_in_the_format_of_mixed_precision() -> None:
    model = tiny.model()
    seen: set[torch.dtype] = set()
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    engine(model, Sampling(1.0, 3), autocast=torch.bfloat16).generate(PROMPTS, 1, 0)
    assert seen == {torch.bfloat16}
    seen.clear()
    engine(model, Sampling(1.0, 3)).generate(PROMPTS, 1, 0)
    assert seen == {torch.float32}


# --- the policy is the active adapter --------------------------------------------------------------------------------


def stirred(model: Any, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f"lora_B.{name}" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_what_generates_is_the_active_adapter_as_it_is_now() -> None:
    """Beside it lies another one, as the value model does in PPO."""
    base = tiny.model()
    of_base = [[greedy(base, prompt, 6)] for prompt in PROMPTS]
    model = KINDS["lora"](r=4).begin(base)
    drawer = engine(model, Sampling(COLD, 6))
    model.add_adapter("value", copy.deepcopy(model.peft_config["default"]))
    stirred(model, "value", 7)
    assert completions(drawer.generate(PROMPTS, 1, 0)) == of_base  # B is zero
    stirred(model, "default", 8)
    drawer.update()
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default"])
    of_policy = [[greedy(merged, prompt, 6)] for prompt in PROMPTS]
    assert completions(drawer.generate(PROMPTS, 1, 0)) == of_policy
    assert sum(one != other for one, other in zip(of_policy, of_base, strict=True)) >= 3


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_prompt_without_room_to_answer_is_named() -> None:
    model = tiny.model()
    drawer = engine(model, Sampling(1.0, 48))
    assert len(drawer.generate([(5,) * 2000], 1, 0)[0][0].completion) == 48  # 2048 tokens: just enough
    with pytest.raises(UserError, match=r"2001 tokens.*2049.*2048.*algorithm\.max_new_tokens.*data\.max_length"):
        drawer.generate([PROMPTS[0], (5,) * 2001], 1, 0)


@pytest.mark.parametrize(("prompts", "n", "error"), [([PROMPTS[0], ()], 1, UserError), ([PROMPTS[0]], 0, ValueError)])
def test_nothing_to_complete_is_refused(prompts: Any, n: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        engine(tiny.model(), Sampling()).generate(prompts, n, 0)


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: Sampling(temperature=0.0), "temperature=0.0"),
        (lambda: Sampling(temperature=-1.0), "temperature=-1.0"),
        (lambda: Sampling(temperature=float("nan")), "temperature=nan"),
        (lambda: Sampling(temperature=float("inf")), "temperature=inf"),
        (lambda: Sampling(max_new_tokens=0), "max_new_tokens=0"),
    ],
)
def test_settings_that_draw_nothing_are_refused(make: Callable[[], Sampling], setting: str) -> None:
    with pytest.raises(UserError, match=setting):
        make()


def test_a_sharded_model_is_refused() -> None:
    model = tiny.model()
    model.score_sharded = lambda batch: None
    with pytest.raises(UserError, match="strategy=ddp"):
        engine(model, Sampling())


def test_engines_close_themselves() -> None:
    closed: list[bool] = []

    class Closing(TransformersRollouts):
        def close(self) -> None:
            closed.append(True)

    with pytest.raises(RolloutError), Closing(tiny.model(), Sampling(), PAD, 100):
        raise RolloutError("it failed")
    assert closed == [True]
