"""The reward model's module: its loss beside TRL's on the same tokens and weights, what it logs, and that it learns."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ft.batches import Batch, Completion, Example, pack, pad
from lit_ft.data.chat import ChatEncoder
from lit_ft.data.formats import to_record
from lit_ft.errors import UserError
from lit_ft.models.kinds.full import train_all
from lit_ft.models.kinds.lora import apply_lora
from lit_ft.models.score import use_packed_attention
from lit_ft.modules.reward import RewardModule
from tests import tiny
from tests.lit_ft.modules.test_modules import PAD, example, fit

TEXTS = [("hello ", "there", "you two"), ("what is it? ", "a parcel", "nothing at all"), ("so? ", "no, never", "yes")]


def module(model: Any = None, **settings: Any) -> RewardModule:
    torch.manual_seed(2)
    if model is None:
        model = apply_lora(tiny.model(), r=4)
        assert use_packed_attention(model) is None
    made = RewardModule(model, **settings)
    made.configure_model()
    return made


def loss_of(made: RewardModule, batch: Batch, total: int | None = None) -> torch.Tensor:
    return made.step(batch, batch.num_examples if total is None else total).loss


def metrics(made: RewardModule, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        found = made.step(batch, batch.num_examples)
    return {key: float(value) / count for key, (value, count) in found.sums.items()}


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 2.0]], ids=["", "margin"])
@pytest.mark.parametrize("coefficient", [None, 0.05], ids=["", "centred"])
def test_trl(layout: str, margins: list[float] | None, coefficient: float | None, tmp_path: Path) -> None:
    """RewardTrainer's loss, gradients and metrics on a classifier of the same base with the same head.

    Rows go through both data pipelines, ours prompt and answer apart, TRL's as whole texts.
    """
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    model = train_all(tiny.model())
    if layout == "packed":
        assert use_packed_attention(model) is None
    made = module(model, center_coefficient=coefficient or 0.0)
    assert made.head is not None
    tiny.folder(tmp_path / "base", chat=False)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, dtype=torch.float32
    )
    with torch.no_grad():
        classifier.score.weight.copy_(made.head.weight)
    rows: list[dict[str, Any]] = [{"prompt": p, "chosen": best, "rejected": worst} for p, best, worst in TEXTS]
    if margins is not None:
        rows = [{**row, "margin": margin} for row, margin in zip(rows, margins, strict=True)]
    trainer = RewardTrainer(
        classifier,
        args=RewardConfig(
            output_dir=str(tmp_path / "out"),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            center_rewards_coefficient=coefficient,
            per_device_train_batch_size=len(rows),
            train_sampling_strategy="sequential",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(chat=False),
    )
    (theirs,) = trainer.get_train_dataloader()

    encoder = ChatEncoder(tiny.tokenizer(chat=False))
    examples = []
    for k, (prompt, best, worst) in enumerate(TEXTS):
        row = {"prompt": prompt, "chosen": best, "rejected": worst} | ({"margin": margins[k]} if margins else {})
        record = to_record(row, "ranked")
        assert record is not None
        examples.append(encoder.encode(record, k))
    # TRL collates all chosen texts, then all rejected ones.
    texts = [[*e.prompt, *e.completions[which].ids] for which in (0, 1) for e in examples]
    rows_of_theirs = zip(theirs["input_ids"], theirs["attention_mask"], strict=True)
    assert texts == [ids[mask.bool()].tolist() for ids, mask in rows_of_theirs]

    wanted = trainer.compute_loss(trainer.model, dict(theirs))
    batch = pack(examples) if layout == "packed" else pad(examples, PAD)
    found = made.step(batch, len(examples))
    torch.testing.assert_close(found.loss, wanted, rtol=1e-5, atol=1e-6)
    wanted.backward()
    found.loss.backward()
    assert made.head.weight.grad is not None
    torch.testing.assert_close(made.head.weight.grad, trainer.model.score.weight.grad, rtol=1e-4, atol=1e-5)
    for name in ("layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight", "embed_tokens.weight"):
        one, other = (whole.get_parameter(f"model.{name}").grad for whole in (model, trainer.model))
        assert float(other.norm()) > 0 and float((one - other).norm() / other.norm()) < 1e-4

    logged = {key: float(value) / count for key, (value, count) in found.sums.items()}
    for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert logged[name] == pytest.approx(trainer._metrics["eval"][name][0], rel=1e-4, abs=1e-5), name


def test_packed_equals_padded() -> None:
    ranked = [example(k, 2 + k % 3) for k in range(6)]
    packed, padded = module(), module(apply_lora(tiny.model(), r=4))
    for one, other in zip(packed.parameters(), padded.parameters(), strict=True):
        other.data.copy_(one.data)
    losses = loss_of(packed, pack(ranked)), loss_of(padded, pad(ranked, PAD))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_each_prompt_weighs_the_same_however_many_completions_it_has() -> None:
    """The loss of a prompt with four ranked completions beside one with two: the mean of each alone."""
    made = module()
    four, two = example(1, 4), example(2, 2)
    with torch.no_grad():
        alone = [float(loss_of(made, pack([one]))) for one in (four, two)]
        pairs = [
            float(loss_of(made, pack([replace(four, completions=(four.completions[a], four.completions[b]))])))
            for a in range(4)
            for b in range(a + 1, 4)
        ]
        together = float(loss_of(made, pack([four, two])))
    assert alone[0] == pytest.approx(sum(pairs) / 6, rel=1e-5)
    assert together == pytest.approx(sum(alone) / 2, rel=1e-5)
    assert abs(alone[0] - alone[1]) > 1e-2


def test_every_pair_of_a_prompt_has_its_margin() -> None:
    made = module()
    three, two = example(1, 3), example(2, 2)
    with torch.no_grad():
        scores = made.scores(pack([three, two])).tolist()
        found = float(loss_of(made, pack([replace(three, margin=0.7), two])))

    def loss(ahead: float) -> float:
        return math.log(1 + math.exp(-ahead))

    a, b, c, d, e = scores
    of_three = (loss(a - b - 0.7) + loss(a - c - 0.7) + loss(b - c - 0.7)) / 3
    assert found == pytest.approx((of_three + loss(d - e)) / 2, rel=1e-5)


def test_a_swapped_pair_has_the_negated_margin() -> None:
    made = module()
    pair = example(3, 2)
    swapped = replace(pair, completions=pair.completions[::-1])
    one, other = metrics(made, pack([pair])), metrics(made, pack([swapped]))
    assert one["margin"] == pytest.approx(-other["margin"], abs=1e-6) and abs(one["margin"]) > 1e-3
    assert one["accuracy"] + other["accuracy"] == 1
    assert one["mean_reward"] == pytest.approx(other["mean_reward"], abs=1e-6)


def test_longest_wins() -> None:
    """Of lengths 5, 3, 3, best first: 5 over 3 twice right, 3 over 3 half. Then 1 over 4: wrong. 2.5 of 4 pairs."""
    made = module()

    def answers(*lengths: int) -> tuple[Completion, ...]:
        return tuple(Completion(tuple(range(9 + k, 9 + k + n)), (True,) * n) for k, n in enumerate(lengths))

    batch = pack([Example((4, 5), answers(5, 3, 3), 0), Example((6,), answers(1, 4), 1)])
    assert metrics(made, batch)["accuracy/longer"] == 2.5 / 4


def test_mean_and_square_of_scores() -> None:
    made = module()
    batch = pack([example(1, 3), example(2, 2)])
    with torch.no_grad():
        scores = made.scores(batch)
    found = metrics(made, batch)
    assert found["mean_reward"] == pytest.approx(float(scores.mean()), rel=1e-5)
    assert found["mean_square_reward"] == pytest.approx(float(scores.square().mean()), rel=1e-5)


def test_dropout_is_off() -> None:
    """Also the adapter's, and while training: two scores of one text must be one."""
    model = apply_lora(tiny.model(), r=4, dropout=0.5)
    assert use_packed_attention(model) is None
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    made = module(model)
    assert model.training
    batch = pack([example(1, 3)])
    with torch.no_grad():
        assert torch.equal(made.scores(batch), made.scores(batch))


def test_micro_batches_change_nothing() -> None:
    """One batch or many per optimizer step, packed or padded: the same losses and the same weights after two steps."""
    ranked = [example(k, 2 + k % 2) for k in range(8)]
    results = []
    for max_tokens, layout in ((4096, "packed"), (30, "packed"), (40, "padded")):
        model = apply_lora(tiny.model(), r=4)
        torch.manual_seed(7)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if layout == "packed":
            assert use_packed_attention(model) is None
        made = module(model, learning_rate=1e-2, warmup_ratio=0.0, center_coefficient=0.01)
        seen = fit(made, ranked, steps=2, max_tokens=max_tokens, layout=layout)  # type: ignore[arg-type]
        assert made.head is not None
        results.append((seen, made.head.weight.detach().clone()))
    (one, weight), *others = results
    for seen, head in others:
        assert seen.micro_batches[0] > one.micro_batches[0] == 1
        for first, second in zip(one.logged, seen.logged, strict=True):
            for key in ("loss", "accuracy", "accuracy/longer", "margin", "mean_reward", "grad_norm"):
                assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-4), key
        torch.testing.assert_close(head, weight, rtol=1e-3, atol=1e-4)


def ranked_by_a_token(count: int, seed: int) -> list[Example]:
    """The preferred answer holds token 9, the other one 10; lengths say nothing."""
    draw = random.Random(seed)

    def answer(token: int) -> Completion:
        ids = [draw.randint(20, 250) for _ in range(draw.randint(1, 6))]
        ids.insert(draw.randint(0, len(ids)), token)
        return Completion((*ids, 2), (True,) * (len(ids) + 1))

    return [
        Example(tuple(draw.randint(20, 250) for _ in range(4)), (answer(9), answer(10)), index=k) for k in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_it_learns_what_is_preferred(seed: int) -> None:
    """On held-out pairs above nine tenths, where the longer answer is right half of the time."""
    made = module(learning_rate=1e-2)
    held_out = pack(ranked_by_a_token(100, seed + 50))
    fit(made, ranked_by_a_token(256, seed), steps=60, batch_size=16)
    found = metrics(made, held_out)
    assert found["accuracy"] > 0.9
    assert found["accuracy/longer"] == pytest.approx(0.5, abs=0.15)


def test_checkpoints_hold_head_and_adapter_only() -> None:
    made = module()
    names = set(made.state_dict())
    assert "head.weight" in names
    assert all("lora_" in name for name in names - {"head.weight"}) and len(names) == 1 + 28


def test_a_model_that_is_built_late_has_its_head() -> None:
    def build() -> Any:
        model = apply_lora(tiny.model(), r=4)
        assert use_packed_attention(model) is None
        return model

    made = RewardModule(build)
    assert made.head is None
    made.configure_model()
    head = made.head
    assert head is not None and head.weight.requires_grad
    made.configure_model()
    assert made.head is head
    assert "head.weight" in made.state_dict()
    seen = fit(made, [example(k, 2) for k in range(4)], steps=1, batch_size=4)
    assert seen.logged[0]["loss"] > 0


@pytest.mark.parametrize("coefficient", [-0.01, math.nan, math.inf])
def test_coefficients_that_are_none(coefficient: float) -> None:
    with pytest.raises(UserError, match=r"algorithm\.center_rewards_coefficient=.* must be a number from 0 on"):
        module(center_coefficient=coefficient)
