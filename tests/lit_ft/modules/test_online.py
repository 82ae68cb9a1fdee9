"""PPO and GRPO: an iteration against plain loops, what must not change it, what it learns, and where it ends."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lit_ft.batches import Completion, Example
from lit_ft.data.datamodule import ExamplesDataModule
from lit_ft.data.packing import divided
from lit_ft.errors import UserError
from lit_ft.losses.ppo import MAX_PROPORTIONAL_ERROR
from lit_ft.models.judge import hidden_size, scalar_head
from lit_ft.models.roles import POLICY, add_role, copy_role, role_parameters, train_only
from lit_ft.modules import GRPOModule, PPOModule
from lit_ft.modules.online import OnlineModule
from lit_ft.rewards.base import Reward, Sample
from lit_ft.rewards.weighted import WeightedReward
from lit_ft.rollouts.base import Rollout, RolloutEngine, RolloutError, Sampling
from lit_ft.rollouts.transformers import TransformersRollouts
from tests import tiny
from tests.lit_ft.modules.test_modules import adapted, trainer_for
from tests.processes import ROOT, free_ports

PAD, END = 3, 2
CONSTANT: dict[str, Any] = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}


class Scripted(RolloutEngine):
    """Completions that depend on the prompt (and on which iteration it is) alone: 1 to 5 tokens, half of them ended."""

    def __init__(self) -> None:
        self.updates = self.closed = 0
        self.seeds: list[int] = []

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        n: int,
        seed: int,
        progress: Callable[[int], None] = lambda done: None,
        places: Sequence[int] | None = None,
    ) -> list[list[Rollout]]:
        self.seeds.append(seed)
        progress(len(prompts) * n)
        return [[self._one(prompt, k) for k in range(n)] for prompt in prompts]

    def _one(self, prompt: tuple[int, ...], k: int) -> Rollout:
        draw = random.Random(repr((prompt, k, self.updates)))
        ids = [draw.randrange(4, 260) for _ in range(draw.randint(1, 4))]
        ended = draw.random() < 0.5
        return Rollout(prompt, (*ids, END) if ended else tuple(ids), ended)

    def update(self) -> None:
        self.updates += 1

    def close(self) -> None:
        self.closed += 1


class Scored(Reward):
    """What a function says of each sample."""

    def __init__(self, score: Callable[[Sample], float], name: str = "scored") -> None:
        self.score, self.name = score, name
        self.asked: list[list[Sample]] = []

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        self.asked.append(list(samples))
        return [self.score(sample) for sample in samples]


def spread(sample: Sample) -> float:
    """Between -1 and 1, by the tokens."""
    return (sum(sample.completion) % 41) / 20 - 1


def prompts(count: int, vocabulary: int = 260) -> list[Example]:
    draw = random.Random(0)
    ids = [tuple(draw.randrange(4, vocabulary) for _ in range(1 + k % 5)) for k in range(count)]
    return [Example(each, (), index=k) for k, each in enumerate(ids)]


def stirred(model: Any, role: str, seed: int = 11) -> None:
    """Give an adapter a B that is not zero, as if it had been trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in role_parameters(model, role):
            parameter.add_(0.1 * torch.randn_like(parameter))


def online(
    kind: str = "ppo",
    model: Any = None,
    *,
    trained: bool = False,
    packed: bool = True,
    value: float | None = None,
    **settings: Any,
) -> OnlineModule:
    """A module on a tiny model with scripted completions.

    Args:
        trained: the policy begins as an adapter that does something.
        value: PPO's value model begins as one that does something, with a head of this size.
    """
    model = adapted(trained=trained, packed=packed) if model is None else model
    common: dict[str, Any] = {
        "engine": Scripted(),
        "reward": Scored(spread),
        "decode": lambda ids: " ".join(map(str, ids)),
        "ask": lambda example: " ".join(map(str, example.prompt)),
        "layout": "packed" if packed else "padded",
        "pad_id": PAD,
        "learning_rate": 1e-2,
        **CONSTANT,
    }
    if kind == "grpo":
        train_only(model, [POLICY])
        return GRPOModule(model, **{**common, "num_generations": 4, **settings})
    torch.manual_seed(3)
    add_role(model, "value")
    head = scalar_head(hidden_size(model), bias=True, zero=True)
    if value is not None:
        stirred(model, "value")
        with torch.no_grad():
            head.weight.normal_(std=value)
            head.bias.fill_(value)
    train_only(model, [POLICY, "value"])
    return PPOModule(model, value_head=head, **{**common, "adam_epsilon": 1e-5, **settings})


class Iterations(L.Callback):
    """What each iteration logged."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.held_out: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.logged.append(_named(trainer, "train/"))

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.held_out.append(_named(trainer, "eval/"))


def _named(trainer: L.Trainer, prefix: str) -> dict[str, float]:
    return {k.removeprefix(prefix): float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}


def fit(
    module: OnlineModule,
    examples: Sequence[Example] | None = None,
    *,
    steps: int = 1,
    batch_size: int = 8,
    val: Sequence[Example] | None = None,
    **options: Any,
) -> Iterations:
    seen = Iterations()
    data = ExamplesDataModule(
        prompts(8) if examples is None else examples, val, batch_size=batch_size, prompts=True, shuffle=False
    )
    if val is not None:
        options = {"val_check_interval": 1, **options}
    trainer_for(steps, seen, **options).fit(module, data)
    return seen


def weights(module: OnlineModule) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys() and ours
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}")


def assert_same_metrics(ours: dict[str, float], theirs: dict[str, float], tolerance: float = 2e-5) -> None:
    """All that does not depend on the clock."""
    keys = {key for key in theirs if not key.startswith("seconds/")}
    assert keys == {key for key in ours if not key.startswith("seconds/")}
    for key in keys:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=tolerance), key


# Before the first update.


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_new_adapter_begins_at_its_reference(kind: str) -> None:
    """KL 0 and ratio 1, exactly: one minibatch, one epoch, so that nothing was updated before it was measured."""
    (first,) = fit(online(kind, num_epochs=1)).logged
    assert first["objective/kl"] == first["objective/non_score_reward"] == 0
    assert first["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert first["policy/approxkl"] == pytest.approx(0, abs=1e-10) and first["policy/clipfrac"] == 0
    # Of random weights each token is one of many: ln 260 = 5.6 at most.
    assert 2 < first["policy/entropy"] < math.log(260)
    # A value model from zero says 0, so what it explains of the returns is nothing.
    if kind == "ppo":
        assert first["val/mean"] == 0 and first["val/explained_variance"] == pytest.approx(0, abs=1e-6)


def test_the_reference_is_the_adapter_that_training_began_with_or_the_base() -> None:
    """A copy stays what it was while the policy moves."""
    model = adapted(trained=True)
    copy_role(model, POLICY, "reference")
    begun = [parameter.clone() for parameter in role_parameters(model, "reference")]
    module = online(model=model, reference="reference", num_epochs=1, kl_coef=0.5)
    first, second = fit(module, steps=2, batch_size=4).logged
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(second["objective/kl"]) > 1e-2, "the policy has moved"
    for now, then in zip(role_parameters(model, "reference"), begun, strict=True):
        assert torch.equal(now, then)
    (from_base,) = fit(online(trained=True, num_epochs=1, kl_coef=0.5)).logged
    assert abs(from_base["objective/kl"]) > 0.02
    assert from_base["objective/non_score_reward"] == pytest.approx(-0.5 * from_base["objective/kl"], rel=1e-5)
    summed = from_base["objective/scores"] + from_base["objective/non_score_reward"]
    assert from_base["objective/rlhf_reward"] == pytest.approx(summed, abs=1e-6)


def test_a_policy_that_changes_between_the_two_passes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a dropout that nobody found: here by weights."""
    module = online()
    update = module._update

    def meddle(*arguments: Any) -> dict[str, float]:
        stirred(module.model, POLICY)
        return update(*arguments)

    monkeypatch.setattr(module, "_update", meddle)
    with pytest.raises(UserError, match=r"first update of iteration 1 .* ratio is not 1.* dropout"):
        fit(module)


@pytest.mark.parametrize(
    ("apart", "float32", "bf16"),
    [
        ([0.0] * 40, True, True),
        # What a run met in its eleventh iteration: one short row in another batch than before, in bf16.
        ([0.0] * 1150 + [0.05] * 39 + [0.235], False, True),
        ([0.05] * 40, False, True),
        ([0.3] * 40, False, False),
        ([0.0] * 40 + [3.0], False, False),
        ([0.0] * 40 + [math.nan], False, False),
    ],
)
def test_how_far_rounding_may_lead(apart: list[float], float32: bool, bf16: bool) -> None:
    module: Any = online()
    for mixed, passes in ((False, float32), (True, bf16)):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=mixed),
            contextlib.nullcontext() if passes else pytest.raises(UserError, match="the ratio is not 1"),
        ):
            module._must_be_on_policy(torch.tensor(apart))


def test_dropout_is_off() -> None:
    (first,) = fit(online(model=adapted(dropout=0.5), num_epochs=1)).logged
    assert first["objective/kl"] == 0 and first["val/ratio"] == pytest.approx(1, abs=1e-6)


# What must not change an iteration.

SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"num_epochs": 2, "num_mini_batches": 2, "num_generations": 3, "missing_eos_penalty": 0.5},
    "grpo": {"num_epochs": 2, "num_mini_batches": 2, "num_generations": 3, "beta": 0.1},
}


def of_usual_settings(kind: str, **more: Any) -> OnlineModule:
    return online(kind, trained=True, **{**SETTINGS[kind], **({"value": 0.3} if kind == "ppo" else {}), **more})


@pytest.fixture(scope="module")
def usual() -> dict[str, tuple[list[dict[str, float]], dict[str, Tensor]]]:
    """Two iterations of four and three prompts each, by algorithm: what they logged, and the weights."""
    found = {}
    for kind in SETTINGS:
        module = of_usual_settings(kind)
        found[kind] = (fit(module, prompts(7), steps=2, batch_size=4).logged, weights(module))
    return found


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(
    "other", [{"packed": False}, {"max_tokens": 12}, {"packed": False, "max_tokens": 12}, {"layout": "apart"}], ids=str
)
def test_how_rows_are_laid_out_changes_nothing(kind: str, other: dict[str, Any], usual: Any) -> None:
    """12 tokens hold no prompt with its three completions: they are divided, too."""
    module = of_usual_settings(kind, **other)
    logged = fit(module, prompts(7), steps=2, batch_size=4).logged
    expected, after = usual[kind]
    for ours, theirs in zip(logged, expected, strict=True):
        assert_same_metrics(ours, theirs, tolerance=2e-4)
    assert_near(weights(module), after, tolerance=2e-4)
    largest = module.largest
    assert largest is not None
    if "max_tokens" in other:
        assert largest.input_ids.numel() <= 12


@pytest.mark.parametrize("kind", SETTINGS)
def test_gradient_checkpointing_changes_nothing(kind: str, usual: Any) -> None:
    """A backward pass then runs the layers again: the value model's with its own adapter, not the policy's."""
    from lit_ft.models.adapt import causal_lm

    model = adapted(trained=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert causal_lm(model).is_gradient_checkpointing
    module = of_usual_settings(kind, model=model)
    logged = fit(module, prompts(7), steps=2, batch_size=4).logged
    for ours, theirs in zip(logged, usual[kind][0], strict=True):
        assert_same_metrics(ours, theirs)
    assert_near(weights(module), usual[kind][1])


@pytest.mark.parametrize(("minibatches", "steps"), [(1, 1), (3, 3), (20, 7)])
def test_minibatches_cover_every_prompt_once_an_epoch(
    minibatches: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of seven prompts; more minibatches than prompts are as many as there are prompts."""
    module = online("ppo", num_mini_batches=minibatches, num_epochs=3)
    train, seen = module._minibatch, []

    def watch(experience: Any, chosen: list[int], *rest: Any, **named: Any) -> dict[str, float]:
        seen.append(list(chosen))
        return train(experience, chosen, *rest, **named)

    monkeypatch.setattr(module, "_minibatch", watch)
    trained = fit(module, prompts(7), batch_size=7)
    assert len(trained.logged) == 1 and len(seen) == 3 * steps
    epochs = [[k for chosen in seen[e * steps : (e + 1) * steps] for k in chosen] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1], "shuffled anew"
    assert max(map(len, seen)) - min(map(len, seen)) <= 1


def test_completions_are_divided_by_tokens_and_none_is_lost() -> None:
    def several(prompt: int, lengths: Sequence[int]) -> Example:
        return Example((5,) * prompt, tuple(Completion((k,) * n, (True,) * n) for k, n in enumerate(lengths)))

    examples = [several(4, [3, 3, 3]), several(2, [1]), several(4, [30, 1])]
    for layout, expected in {
        # 4 + 3 + 3 = 10 tokens packed, and so the third stands alone; padded two rows of 7 are too many.
        "packed": [[0, 1], [2], [3], [4], [5]],
        "padded": [[0], [1], [2], [3], [4], [5]],
    }.items():
        parts, members = divided(examples, 10, layout)  # type: ignore[arg-type]
        assert members == expected
        assert [part.index for part in parts] == list(range(len(parts)))
        whole = [completion for example in examples for completion in example.completions]
        assert [c for part in parts for c in part.completions] == whole
        assert all(part.tokens <= 10 or len(part.completions) == 1 for part in parts)


# One iteration against plain loops over tokens, with a model that knows nothing of packing.


class Plain:
    """The same algorithms written down again: one row per completion, all logits, numbers in lists."""

    def __init__(self, model: Any, head: Any, temperature: float) -> None:
        self.model, self.head, self.temperature = model, head, temperature

    @contextlib.contextmanager
    def _as(self, role: str | None) -> Iterator[None]:
        """PEFT's own switches, which also change what is trained: that is put back."""
        trained = {name: p.requires_grad for name, p in self.model.named_parameters()}
        if role is None:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(role)
            yield
            self.model.set_adapter(POLICY)
        for name, p in self.model.named_parameters():
            p.requires_grad_(trained[name])

    def logps(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> list[Tensor]:
        logits = self.model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        rows = (logits / self.temperature).log_softmax(-1)
        return [rows[len(prompt) - 1 + t, token] for t, token in enumerate(answer)]

    def reference(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> list[float]:
        with self._as(None), torch.no_grad():
            return [float(one) for one in self.logps(prompt, answer)]

    def values(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> list[Tensor]:
        """Before each token, and after the last."""
        with self._as("value"):
            out = self.model(input_ids=torch.tensor([prompt + answer]), use_cache=False, output_hidden_states=True)
        states = out.hidden_states[-1][0]
        return [self.head(states[len(prompt) - 1 + t])[0] for t in range(len(answer) + 1)]


def whitened(rows: list[list[float]], shift: bool) -> list[list[float]]:
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat) + 1e-8)
    return [[(x - mean) / deviation + (0 if shift else mean) for x in row] for row in rows]


def generalized(rewards: list[float], values: list[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    advantages = [0.0] * len(rewards)
    for t in reversed(range(len(rewards))):
        after = values[t + 1] if t + 1 < len(values) else 0.0
        later = advantages[t + 1] if t + 1 < len(rewards) else 0.0
        advantages[t] = rewards[t] + gamma * after - values[t] + gamma * lam * later
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def samples_of(examples: list[Example], n: int) -> list[tuple[tuple[int, ...], Rollout]]:
    engine = Scripted()
    engine.update()
    made = engine.generate([example.prompt for example in examples], n, 0)
    return [(example.prompt, one) for example, several in zip(examples, made, strict=True) for one in several]


def scored(made: list[tuple[tuple[int, ...], Rollout]], penalty: float | None) -> list[float]:
    scores = []
    for prompt, one in made:
        score = spread(Sample(prompt, one.completion, one.ended, "", "", None))
        scores.append(score if one.ended or penalty is None else score - penalty)
    return scores


PPO_CASES: list[dict[str, Any]] = [
    {},
    {"value_at_end": False},
    {"whiten_rewards": True, "missing_eos_penalty": 0.7},
    {"value_at_end": False, "whiten_rewards": True, "whiten_advantages": False, "temperature": 0.7},
    {"kl_estimator": "k3", "gamma": 0.9, "lam": 0.5, "missing_eos_penalty": 0.7, "temperature": 0.7},
]


@pytest.mark.parametrize("case", PPO_CASES, ids=str)
def test_ppo_is_what_plain_loops_make_of_it(case: dict[str, Any]) -> None:
    """Two epochs, so two Adam steps: in the second the ratio is not 1, and with a clip range of 0.02 terms are cut."""
    settings: dict[str, Any] = {"kl_coef": 0.1, "vf_coef": 0.5, "cliprange": 0.02, "cliprange_value": 0.05, **case}
    examples = prompts(5)
    module: Any = online(trained=True, value=0.3, num_epochs=2, **settings)
    plain = Plain(copy.deepcopy(module.model), copy.deepcopy(module.value_head), settings.get("temperature", 1.0))
    (logged,) = fit(module, examples).logged

    made = samples_of(examples, 1)
    with torch.no_grad():
        old = [[float(x) for x in plain.logps(p, r.completion)] for p, r in made]
        before = [[float(x) for x in plain.values(p, r.completion)] for p, r in made]
    reference = [plain.reference(p, r.completion) for p, r in made]
    scores = scored(made, settings.get("missing_eos_penalty"))
    at_end = settings.get("value_at_end", True)
    rewards = []
    for score, now, then in zip(scores, old, reference, strict=True):
        apart = [a - b for a, b in zip(now, then, strict=True)]
        if settings.get("kl_estimator") == "k3":
            apart = [math.exp(-x) - 1 + x for x in apart]
        row = [-0.1 * x for x in apart] + ([0.0] if at_end else [])
        row[-1] += score
        rewards.append(row)
    if settings.get("whiten_rewards"):
        rewards = whitened(rewards, shift=False)
    before = [row if at_end else row[:-1] for row in before]
    gamma, lam = settings.get("gamma", 1.0), settings.get("lam", 0.95)
    found = [generalized(r, v, gamma, lam) for r, v in zip(rewards, before, strict=True)]
    returns = [each for _, each in found]
    advantages = [row[: len(now)] for (row, _), now in zip(found, old, strict=True)]
    if settings.get("whiten_advantages", True):
        advantages = whitened(advantages, shift=True)

    trained = [p for p in plain.model.parameters() if p.requires_grad] + list(plain.head.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-5, weight_decay=0.0)
    policy_losses, value_losses, clipped = [], [], 0
    for _ in range(2):
        policy, value = [], []
        for (prompt, one), was, gain, stood, wanted in zip(made, old, advantages, before, returns, strict=True):
            for now, then, a in zip(plain.logps(prompt, one.completion), was, gain, strict=True):
                ratio = torch.exp(now - then)
                near = torch.clamp(ratio, 0.98, 1.02)
                policy.append(torch.max(-a * ratio, -a * near))
                clipped += int(-a * near > -a * ratio)
            states = plain.values(prompt, one.completion)[: len(stood)]
            for now, then, r in zip(states, stood, wanted, strict=True):
                near = torch.clamp(now, then - 0.05, then + 0.05)
                value.append(0.5 * torch.max((now - r) ** 2, (near - r) ** 2))
        policy_loss, value_loss = torch.stack(policy).mean(), torch.stack(value).mean()
        optimizer.zero_grad()
        (policy_loss + 0.5 * value_loss).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        policy_losses.append(float(policy_loss.detach()))
        value_losses.append(float(value_loss.detach()))
    assert clipped > 0 and logged["policy/clipfrac"] == pytest.approx(clipped / 2 / sum(map(len, old)), abs=1e-6)
    assert logged["loss/policy"] == pytest.approx(sum(policy_losses) / 2, abs=2e-5)
    assert logged["loss/value"] == pytest.approx(sum(value_losses) / 2, abs=2e-5)
    kl = sum(a - b for x, y in zip(old, reference, strict=True) for a, b in zip(x, y, strict=True)) / len(made)
    assert logged["objective/kl"] == pytest.approx(kl, abs=1e-4)
    assert logged["objective/scores"] == pytest.approx(sum(scores) / len(scores), abs=1e-5)
    theirs = {f"model.{name}": p for name, p in plain.model.named_parameters() if p.requires_grad}
    theirs |= {f"value_head.{name}": p for name, p in plain.head.named_parameters()}
    assert_near(weights(module), {name: p.detach() for name, p in theirs.items()}, tolerance=1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_grpo_is_what_plain_loops_make_of_it(loss_type: str) -> None:
    settings: dict[str, Any] = {"beta": 0.2, "epsilon": 0.02, "epsilon_high": 0.03, "temperature": 0.7}
    examples = prompts(4)
    module: Any = online(
        "grpo",
        trained=True,
        num_epochs=2,
        num_generations=3,
        loss_type=loss_type,
        max_new_tokens=6,
        missing_eos_penalty=0.3,
        adam_epsilon=1e-5,
        **settings,
    )
    plain = Plain(copy.deepcopy(module.model), None, 0.7)
    (logged,) = fit(module, examples).logged

    made = samples_of(examples, 3)
    with torch.no_grad():
        old = [[float(x) for x in plain.logps(p, r.completion)] for p, r in made]
    reference = [plain.reference(p, r.completion) for p, r in made]
    scores = scored(made, 0.3)
    advantages = []
    for k in range(0, len(scores), 3):
        group = scores[k : k + 3]
        mean = sum(group) / 3
        deviation = math.sqrt(sum((x - mean) ** 2 for x in group) / 2)
        advantages += [(x - mean) / (deviation + 1e-4) for x in group]
    trained = [p for p in plain.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-5, weight_decay=0.0)
    losses = []
    for _ in range(2):
        rows = []
        for (prompt, one), was, then, a in zip(made, old, reference, advantages, strict=True):
            row = []
            for now, before, away in zip(plain.logps(prompt, one.completion), was, then, strict=True):
                ratio = torch.exp(now - before)
                kl = (torch.exp(away - now) - 1 - (away - now)) * ratio
                row.append(-torch.min(a * ratio, a * torch.clamp(ratio, 0.98, 1.03)) + 0.2 * kl)
            rows.append(torch.stack(row))
        if loss_type == "grpo":
            loss = torch.stack([row.mean() for row in rows]).mean()
        else:
            loss = torch.cat(rows).sum() / (len(rows) * 6 if loss_type == "dr_grpo" else len(torch.cat(rows)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert logged["loss/policy"] == pytest.approx(sum(losses) / 2, abs=5e-5)
    theirs = {f"model.{name}": p.detach() for name, p in plain.model.named_parameters() if p.requires_grad}
    assert_near(weights(module), theirs, tolerance=1e-4)


def test_completions_that_did_not_end_can_be_left_out_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: their tokens are none of those that the loss sums and divides by; their scores count in the mean."""
    from lit_ft.modules import grpo

    given: list[dict[str, Any]] = []
    loss = grpo.grpo_loss

    def spy(*args: Any, **named: Any) -> Any:
        given.append({"advantages": args[3], "mask": args[4], **named})
        return loss(*args, **named)

    monkeypatch.setattr(grpo, "grpo_loss", spy)
    examples = prompts(4)
    settings: dict[str, Any] = {"trained": True, "num_generations": 3, "max_tokens": 10_000}
    made = samples_of(examples, 3)
    ended = [one.ended for _, one in made]
    assert 0 < sum(ended) < len(ended)
    for masked in (False, True):
        fit(online("grpo", mask_truncated_completions=masked, **settings), examples)
    everything, some = given
    lengths = [len(one.completion) for _, one in made]
    assert everything["total_tokens"] == sum(lengths) == int(everything["mask"].sum())
    left = sum(length for length, end in zip(lengths, ended, strict=True) if end)
    assert some["total_tokens"] == left == int(some["mask"].sum()) < sum(lengths)
    assert torch.equal(some["advantages"].sort().values, everything["advantages"].sort().values)
    assert some["total_completions"] == everything["total_completions"] == 12


def test_an_iteration_in_which_nothing_ended_changes_nothing() -> None:
    class Endless(Scripted):
        def _one(self, prompt: tuple[int, ...], k: int) -> Rollout:
            return Rollout(prompt, (5 + k, 6), False)

    module = online("grpo", mask_truncated_completions=True, engine=Endless(), weight_decay=0.0)
    before = {name: value.clone() for name, value in weights(module).items()}
    fit(module, prompts(4))
    assert_near(weights(module), before, tolerance=0)


def test_what_the_engine_drew_with_is_compared_with_the_policy(capsys: pytest.CaptureFixture[str]) -> None:
    """An engine that is behind by a policy is told of; its log-probabilities are never trained on."""

    class Saying(Scripted):
        def __init__(self, module_of: Callable[[], Any], off: float) -> None:
            super().__init__()
            self.module_of, self.off = module_of, off

        def generate(self, prompts: Any, n: int, *more: Any, **named: Any) -> Any:
            found = super().generate(prompts, n, *more, **named)
            plain = Plain(self.module_of().model, None, 1.0)
            with torch.no_grad():
                return [
                    [
                        replace(one, logps=tuple(float(x) + self.off for x in plain.logps(one.prompt, one.completion)))
                        for one in several
                    ]
                    for several in found
                ]

    after = []
    for off in (0.0, 0.5):
        module: Any = online("grpo", trained=True, engine=Saying(lambda: module, off))  # noqa: B023
        (logged,) = fit(module, prompts(4)).logged
        assert logged["sampling/sampling_logp_difference/mean"] == pytest.approx(off, abs=1e-3)
        assert logged["sampling/sampling_logp_difference/max"] == pytest.approx(off, abs=1e-2)
        said = capsys.readouterr().err
        assert ("0.50 nats a token away from the policy" in said) is (off > 0)
        after.append({name: value.clone() for name, value in weights(module).items()})
    assert_near(after[0], after[1], tolerance=0)


def test_validations_are_compared_by_one_kl_coefficient() -> None:
    """β is adapted between them, or else the best checkpoint would be the one whose β happened to be small."""
    module: Any = online(trained=True, kl_coef=0.1, kl_target=1e-4, kl_horizon=4, num_epochs=1)
    seen = fit(module, prompts(8), steps=2, batch_size=4, val=prompts(3))
    last = seen.held_out[-1]
    assert abs(module.kl.coef - 0.1) > 0.01 and abs(last["objective/kl"]) > 1e-3
    assert last["objective/non_score_reward"] == pytest.approx(-0.1 * last["objective/kl"], rel=1e-5)


def test_what_is_slow_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lit_ft import progress

    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    fit(online("ppo", num_epochs=2, num_mini_batches=2), prompts(4))
    said = capsys.readouterr().err
    assert "completions 4/4 ·" in said and "updates 4/4 ·" in said and "scoring 4/4 ·" in said


# What it learns, and what it must not.

VOCABULARY = 32


def begins_with(token: int) -> Scored:
    return Scored(lambda sample: float(sample.completion[0] == token))


def small(seed: int) -> Any:
    """A model of few tokens, so that chance finds the target now and then."""
    from lit_ft.models.kinds.lora import apply_lora

    torch.manual_seed(seed)
    model = tiny.model(seed=seed, vocab_size=VOCABULARY)
    with torch.no_grad():  # or else no state of the last layer makes one token certain: that is normed
        model.lm_head.weight.mul_(1.6)
    return apply_lora(model, r=4, alpha=8, dropout=0.0)


@torch.no_grad()
def first_probabilities(model: Any, examples: Sequence[Example]) -> Tensor:
    """`(prompts, V)` of the completion's first token, by the model's own forward pass."""
    rows = [model(input_ids=torch.tensor([e.prompt]), use_cache=False).logits[0, -1] for e in examples]
    return torch.stack(rows).softmax(-1)


def likeliest(model: Any, examples: Sequence[Example]) -> int:
    """The token that is found soonest by chance, whichever the prompt; what never is found is not learned either."""
    return 4 + int(first_probabilities(model, examples)[:, 4:].min(0).values.argmax())


def learner(kind: str, seed: int, **settings: Any) -> OnlineModule:
    """It is paid for beginning with the token that `likeliest` names."""
    model = small(seed)
    reward = begins_with(likeliest(model, prompts(4, VOCABULARY)))
    # Two tokens, so that what follows the one that counts is there to be ignored.
    engine = TransformersRollouts(model, Sampling(1.0, 2, (END,)), PAD, 4096)
    usual: dict[str, Any] = {"engine": engine, "reward": reward, "seed": seed, "num_generations": 16}
    # So short rows are quicker padded.
    return online(kind, model, packed=False, **{**usual, "learning_rate": 2e-2, "num_epochs": 2, **settings})


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_tiny_model_learns_what_is_rewarded(kind: str, seed: int) -> None:
    """Of 32 tokens one is paid for: after each of four prompts it becomes more than nine times in ten the first."""
    module = learner(kind, seed, **({"kl_coef": 0.0} if kind == "ppo" else {}))
    examples = prompts(4, VOCABULARY)
    target = likeliest(module.model, examples)
    before = first_probabilities(copy.deepcopy(module.model), examples)[:, target]
    assert float(before.max()) < 0.5
    logged = fit(module, examples, steps=24).logged
    after = first_probabilities(module.model, examples)[:, target]
    assert float(after.min()) > 0.9, after
    assert logged[0]["objective/scores"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "pull", "bound"), [("ppo", {"kl_coef": 1e3}, 0.1), ("grpo", {"beta": 1e3}, 0.03)])
def test_a_huge_kl_coefficient_holds_the_policy(kind: str, pull: dict[str, float], bound: float) -> None:
    """The reward is the one that is learnt above, in fewer steps; PPO's estimate of KL is the noisier one."""
    held, free = (
        learner(kind, 0, learning_rate=2e-3, **{key: each * on for key, each in pull.items()}) for on in (1, 0)
    )
    examples = prompts(4, VOCABULARY)
    before = first_probabilities(copy.deepcopy(held.model), examples)
    moved, apart = [], []
    for module in (held, free):
        fit(module, examples, steps=12)
        after = first_probabilities(module.model, examples)
        moved.append(float((after - before).abs().max()))
        apart.append(float((after * (after / before).log()).sum(1).max()))
    assert moved[0] < bound < 0.8 < moved[1], moved
    assert 50 * apart[0] < apart[1], f"the exact KL of the first token, of the worst prompt: {apart}"


# The KL coefficient, checkpoints, and the end.


def test_the_kl_coefficient_steers_towards_its_target() -> None:
    """Ziegler et al.: β grows by at most 0.2 · n / horizon where KL is above the target, and shrinks below it."""
    above = online(trained=True, kl_coef=0.1, kl_target=1e-3, kl_horizon=32)
    first, second = fit(above, steps=2, batch_size=4, examples=prompts(8)).logged
    assert first["objective/kl_coef"] == pytest.approx(0.1), "what the iteration was trained with"
    error = max(-MAX_PROPORTIONAL_ERROR, min(MAX_PROPORTIONAL_ERROR, (first["objective/kl"] - 1e-3) / 1e-3))
    assert second["objective/kl_coef"] == pytest.approx(0.1 * (1 + error * 4 / 32), rel=1e-6)
    below: Any = online(kl_coef=0.1, kl_target=1e3, kl_horizon=32)
    fit(below, prompts(4), batch_size=4)
    assert below.kl.coef == pytest.approx(0.1 * (1 - 0.2 * 4 / 32))


def test_a_horizon_that_is_too_short_is_refused() -> None:
    with pytest.raises(UserError, match=r"algorithm.kl_horizon.*iteration 1.*8 completions"):
        fit(online(kl_target=1.0, kl_horizon=1.0))


def resumable(kind: str, **more: Any) -> OnlineModule:
    module = of_usual_settings(kind, **more)
    module.engine = TransformersRollouts(module.model, Sampling(1.0, 3, (END,)), PAD, 4096)
    return module


ROWS = [Example(e.prompt, (Completion((60 + e.index, 61, END), (True,) * 3),), e.index) for e in prompts(9)]


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_resume_is_exact(kind: str, tmp_path: Path) -> None:
    """To the bit: draws, minibatches, ptx rows, the KL coefficient, Adam's moments."""
    more: dict[str, Any] = {"ptx": ROWS, "ptx_coef": 0.5, "ptx_batch_size": 2}
    if kind == "ppo":
        more |= {"kl_target": 0.01, "kl_horizon": 40}
    whole = resumable(kind, **more)
    expected = fit(whole, steps=4, batch_size=4, val=prompts(3))
    stopped = resumable(kind, **more)
    fit(stopped, steps=2, batch_size=4, val=prompts(3))
    stopped.trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed = resumable(kind, **more)
    with torch.no_grad():  # what a new process has by chance is of no account
        for parameter in resumed.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    seen = Iterations()
    data = ExamplesDataModule(prompts(8), prompts(3), batch_size=4, prompts=True, shuffle=False)
    torch.manual_seed(123)
    trainer_for(4, seen, val_check_interval=1).fit(resumed, data, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    for ours, theirs in zip(seen.logged, expected.logged[2:], strict=True):
        assert_same_metrics(ours, theirs, tolerance=0)
    assert seen.held_out[-1] == expected.held_out[-1]
    assert_near(weights(resumed), weights(whole), tolerance=0)
    if kind == "ppo":
        assert resumed.kl_weight == whole.kl_weight != stopped.kl_weight
    ours, theirs = (one.trainer.optimizers[0].state_dict() for one in (resumed, whole))
    for number, state in theirs["state"].items():
        assert torch.equal(ours["state"][number]["exp_avg_sq"], state["exp_avg_sq"])


def test_an_engine_hears_of_each_policy_once_and_is_closed() -> None:
    module: Any = online(num_epochs=1)
    fit(module, steps=3, batch_size=4, val=prompts(2))
    # Before the first iteration, and after each: the validation between two iterations has the same policy as both.
    assert module.engine.updates == 4 and module.engine.closed == 1
    trainings, validations = module.engine.seeds[::2], module.engine.seeds[1::2]
    assert len(set(trainings)) == 3, "other draws in each iteration"
    assert len(set(validations)) == 1, "the same for every validation"


def test_after_its_end_an_engine_is_given_the_policy_anew() -> None:
    module: Any = online(num_epochs=1)
    fit(module, batch_size=4, val=prompts(2))
    before = module.engine.updates
    data = ExamplesDataModule(prompts(4), prompts(2), batch_size=4, prompts=True)
    module.trainer.validate(module, data, verbose=False)
    assert module.engine.updates == before + 1


# Other terms.


def silent(sample: Sample) -> float:
    return 0.0


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_ptx_moves_the_policy_towards_its_rows(kind: str) -> None:
    """Scores of 0, no KL, no value loss: there is nothing else that moves it."""
    settings: dict[str, Any] = {"reward": Scored(silent), "num_epochs": 2}
    settings |= {"kl_coef": 0.0, "vf_coef": 0.0, "whiten_advantages": False} if kind == "ppo" else {}
    still = online(kind, **settings)
    before = weights(still)
    fit(still, steps=2, batch_size=4)
    assert_near(weights(still), before, tolerance=1e-7)
    moved = online(kind, **settings, ptx=ROWS, ptx_coef=1.0, ptx_batch_size=3)
    logged = fit(moved, [*prompts(8)] * 3, steps=6, batch_size=4).logged
    assert logged[-1]["loss/ptx"] < 0.8 * logged[0]["loss/ptx"]


def test_ptx_draws_other_rows_in_each_optimizer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(random_state: int, max_tokens: int = 1024) -> list[list[int]]:
        module: Any = online(ptx=ROWS, ptx_coef=1.0, ptx_batch_size=3, num_mini_batches=2, max_tokens=max_tokens)
        seen: dict[tuple[int, ...], list[int]] = {}
        step, ptx = module.step, module._ptx
        now: list[Any] = []

        def watch(batch: Any, total: int) -> Any:
            last = batch.input_ids[0].tolist()
            seen.setdefault(now[-1], []).extend(token for token in last if 60 <= token < 60 + len(ROWS) and token != 61)
            return step(batch, total)

        def number(at: tuple[int, int]) -> Tensor:
            now.append((module.global_step, *at))
            return ptx(at)

        monkeypatch.setattr(module, "step", watch)
        monkeypatch.setattr(module, "_ptx", number)
        torch.manual_seed(random_state)
        fit(module, steps=2, batch_size=4)
        return [sorted(rows) for rows in seen.values()]

    once = drawn(0)
    assert len(once) == 2 * 4 * 2
    assert len({tuple(rows) for rows in once}) > 8, "other rows in each step"
    assert drawn(99) == once, "whatever the global random state"


def test_ptx_without_rows_is_refused() -> None:
    for settings in ({"ptx_coef": 0.5}, {"ptx_coef": -0.5, "ptx": ROWS}):
        with pytest.raises(UserError, match=r"algorithm\.ptx_coef"):
            online(**settings)  # type: ignore[arg-type]


# Held-out completions.


def test_a_judge_scores_held_out_completions_only() -> None:
    shown: list[Any] = []
    judge = Scored(lambda sample: 7.0 + len(sample.completion), "judge")
    module: Any = online(judge=judge, show=lambda samples, step: shown.append(samples), num_epochs=1)
    held_out = [Example((200 + k, 5), (), k) for k in range(3)]
    seen = fit(module, prompts(8), steps=2, batch_size=4, val=held_out)
    asked = {sample.prompt for samples in judge.asked for sample in samples}
    assert asked == {example.prompt for example in held_out}, "never of what is trained on"
    lengths = [len(sample.completion) for samples in judge.asked[-1:] for sample in samples]
    last = seen.held_out[-1]
    assert last["judge/scores"] == pytest.approx(7 + sum(lengths) / 3)
    assert last["loss"] == -last["objective/rlhf_reward"]
    assert not any(key.startswith("judge/") for key in seen.logged[-1])
    # The same weights come out without a judge.
    without = online(num_epochs=1)
    fit(without, prompts(8), steps=2, batch_size=4, val=held_out)
    assert_near(weights(without), weights(module), tolerance=0)
    # A table at each validation: question, answer, score, whether it ended.
    assert [len(table) for table in shown] == [3, 3]
    prompt, text, score, ended = shown[-1][0]
    assert prompt == "200 5" and text and isinstance(ended, bool) and -1 <= score <= 1


METRICS = {
    *(f"objective/{key}" for key in ("kl", "entropy", "rlhf_reward", "scores", "scores_std", "non_score_reward")),
    "policy/approxkl",
    "policy/clipfrac",
    "policy/entropy",
    "loss/policy",
    "val/ratio",
    "completions/mean_length",
    "completions/ended",
    "learning_rate",
    "grad_norm",
    "num_tokens",
    *(f"seconds/{key}" for key in ("generation", "rewards", "scoring", "updates")),
}


@pytest.mark.parametrize(
    ("kind", "more"), [("ppo", {"loss/value", "val/clipfrac", "objective/kl_coef"}), ("grpo", {"frac_reward_zero_std"})]
)
def test_the_metrics_have_their_names(kind: str, more: set[str]) -> None:
    parts = WeightedReward([(Scored(spread, "one"), 1.0), (Scored(lambda s: float(s.ended), "two"), -0.5)])
    module = online(kind, reward=parts, num_epochs=1)
    seen = fit(module, val=prompts(3))
    (first,) = seen.logged
    assert METRICS | more | {"rewards/one", "rewards/two"} <= set(first)
    assert first["objective/scores"] == pytest.approx(first["rewards/one"] + first["rewards/two"], abs=1e-6)
    ended = [one.ended for _, one in samples_of(prompts(8), 1 if kind == "ppo" else 4)]
    assert first["completions/ended"] == pytest.approx(sum(ended) / len(ended))
    assert first["rewards/two"] == pytest.approx(-0.5 * first["completions/ended"])
    assert {f"objective/{key}" for key in ("kl", "rlhf_reward", "scores")} <= set(seen.held_out[0])


# Bad settings.


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("ppo", {"num_epochs": 0}, "num_epochs=0"),
        ("ppo", {"num_mini_batches": 0}, "num_mini_batches=0"),
        ("ppo", {"num_generations": 0}, "num_generations=0"),
        ("grpo", {"num_generations": 1}, "num_generations=1.*at least 2"),
        ("ppo", {"temperature": 0.0}, "temperature=0.0"),
        ("ppo", {"temperature": math.nan}, "temperature=nan"),
        ("ppo", {"missing_eos_penalty": -1.0}, "missing_eos_penalty=-1"),
        ("ppo", {"gamma": 1.1}, "gamma=1.1.*at most 1"),
        ("ppo", {"lam": -0.1}, "lam=-0.1"),
        ("ppo", {"vf_coef": -1.0}, "vf_coef=-1"),
        ("ppo", {"cliprange": 0.0}, "cliprange=0"),
        ("ppo", {"cliprange_value": -0.2}, "cliprange_value=-0.2"),
        ("ppo", {"kl_coef": -0.1}, "kl_coef"),
        ("ppo", {"kl_coef": 0.0, "kl_target": 6.0}, "kl_coef"),
        ("ppo", {"kl_target": 0.0}, "kl_target"),
        ("grpo", {"beta": -0.1}, "beta"),
        ("grpo", {"epsilon": 0.0}, "epsilon"),
        ("grpo", {"epsilon_high": -0.1}, "epsilon_high"),
        ("ppo", {"ptx_batch_size": 0}, "ptx_batch_size=0.*at least 1"),
        ("ppo", {"gamma": math.nan}, "gamma=nan"),
        ("ppo", {"vf_coef": math.nan}, "vf_coef=nan"),
        ("ppo", {"ptx_coef": math.nan}, "ptx_coef=nan"),
        ("grpo", {"beta": math.nan}, "beta"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(kind: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        online(kind, **settings)


def test_an_engine_that_fails_ends_the_run() -> None:
    class Dead(Scripted):
        def generate(self, *_: Any) -> Any:
            raise RolloutError("vLLM died three times.")

    with pytest.raises(RolloutError, match="three times"):
        fit(online(engine=Dead()))


# Two processes.


def in_each_process(kind: str, folder: Path) -> None:
    """Train as in `usual`; one of two processes if LOCAL_RANK is set. Writes what came of it."""
    module = of_usual_settings(kind, ptx=ROWS, ptx_coef=0.5, max_tokens=40)
    rank = os.environ.get("LOCAL_RANK")
    options: dict[str, Any] = {}
    if rank is not None:
        from lit_ft.distributed.strategy import ddp

        options = {"strategy": ddp(), "devices": 2}
    # Seven prompts in windows of three, so that of the last window the second process has none.
    seen = fit(module, prompts(7), steps=3, batch_size=3, val=prompts(3), **options)
    if rank in (None, "0"):
        name = f"{kind}-{'one' if rank is None else 'two'}"
        torch.save(weights(module), folder / f"{name}.pt")
        (folder / f"{name}.json").write_text(json.dumps([seen.logged, seen.held_out]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_two_processes_make_the_update_of_one(kind: str, tmp_path: Path) -> None:
    in_each_process(kind, tmp_path)
    (port,) = free_ports(1)
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.lit_ft.modules.test_online", kind, str(tmp_path)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen(command, cwd=tmp_path, env={**env, "LOCAL_RANK": str(k), "NODE_RANK": "0"}, **pipes)
        for k in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(said)
    one, two = (torch.load(tmp_path / f"{kind}-{name}.pt", weights_only=True) for name in ("one", "two"))
    assert_near(two, one, tolerance=1e-4)
    alone, together = (json.loads((tmp_path / f"{kind}-{name}.json").read_text()) for name in ("one", "two"))
    for ours, theirs in zip(together, alone, strict=True):
        assert len(ours) == len(theirs) == 3
        for mine, other in zip(ours, theirs, strict=True):
            assert_same_metrics(mine, other, tolerance=1e-4)


if __name__ == "__main__":
    in_each_process(sys.argv[1], Path(sys.argv[2]))
