"""The reward model's loss: by hand, facts that hold for every ranking, and beside TRL's RewardTrainer."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_ft.losses.reward import pair_weights, ranked_pairs, reward_loss
from tests import tiny

CLOSE: Any = {"rtol": 1e-6, "atol": 1e-7}
ONE_PAIR = torch.tensor([[0, 1]])


def test_pairs_of_rankings() -> None:
    """Three, one and two completions: places 0-2, 3 and 4-5; the second example ranks nothing."""
    counts = torch.tensor([3, 1, 2])
    assert ranked_pairs(counts).tolist() == [[0, 1], [0, 2], [1, 2], [4, 5]]
    torch.testing.assert_close(pair_weights(counts), torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]), **CLOSE)


@pytest.mark.parametrize("counts", [[4, 9, 2, 5], [1], [2, 2, 2], [1, 7, 1]])
def test_every_pair_is_there_once_with_the_better_first(counts: list[int]) -> None:
    wanted, start = set(), 0
    for count in counts:
        wanted |= set(combinations(range(start, start + count), 2))
        start += count
    pairs = [(winner, loser) for winner, loser in ranked_pairs(torch.tensor(counts)).tolist()]
    assert len(pairs) == len(wanted) and set(pairs) == wanted


def test_each_prompt_counts_once() -> None:
    """The weighted sum is the sum of each prompt's mean over its pairs, however many pairs it has."""
    counts, scores = torch.tensor([4, 1, 9, 2]), torch.randn(16, generator=torch.Generator().manual_seed(0))
    found = (pair_weights(counts) * reward_loss(scores, ranked_pairs(counts))).sum()
    of_prompts = [
        reward_loss(part, ranked_pairs(torch.tensor([len(part)]))).mean()
        for part in scores.split(counts.tolist())
        if len(part) > 1
    ]
    torch.testing.assert_close(found, torch.stack(of_prompts).sum(), **CLOSE)
    assert pair_weights(counts).sum().item() == pytest.approx(3)  # of four prompts one has no pair


def test_loss() -> None:
    """s = 2 and 1: −log σ(1) = log(1 + e^−1) = 0.313261688."""
    torch.testing.assert_close(reward_loss(torch.tensor([2.0, 1.0]), ONE_PAIR), torch.tensor([0.313261688]), **CLOSE)


def test_margin() -> None:
    """It must win by 0.5 and wins by 1: −log σ(0.5) = log(1 + e^−0.5) = log 1.606530660 = 0.474076984."""
    found = reward_loss(torch.tensor([2.0, 1.0]), ONE_PAIR, torch.tensor([0.5]))
    torch.testing.assert_close(found, torch.tensor([0.474076984]), **CLOSE)


def test_centring() -> None:
    """c = 0.01: 0.313261688 + 0.01 · (2 + 1)² = 0.403261688."""
    found = reward_loss(torch.tensor([2.0, 1.0]), ONE_PAIR, center_coefficient=0.01)
    torch.testing.assert_close(found, torch.tensor([0.403261688]), **CLOSE)


def test_gradient() -> None:
    """d/ds_w = −σ(−1) + 2c(s_w + s_l) = −0.268941421 + 0.06, d/ds_l = +0.268941421 + 0.06."""
    scores = torch.tensor([2.0, 1.0], requires_grad=True)
    reward_loss(scores, ONE_PAIR, center_coefficient=0.01).sum().backward()
    torch.testing.assert_close(scores.grad, torch.tensor([-0.208941421, 0.328941421]), **CLOSE)


def test_equal_scores_are_ln_2_for_every_pair() -> None:
    losses = reward_loss(torch.full((5,), 3.0), ranked_pairs(torch.tensor([5])))
    torch.testing.assert_close(losses, torch.full((10,), math.log(2)), **CLOSE)


def test_only_centring_sees_a_constant() -> None:
    scores, pairs = torch.tensor([1.0, -2.0, 0.5]), ranked_pairs(torch.tensor([3]))
    torch.testing.assert_close(reward_loss(scores + 8, pairs), reward_loss(scores, pairs), rtol=1e-5, atol=1e-6)
    scores.requires_grad_()
    reward_loss(scores + 8, pairs, center_coefficient=1.0).sum().backward()
    assert (scores.grad > 0).all()  # all are drawn down to where they are around 0


def test_far_scores_stay_finite() -> None:
    assert reward_loss(torch.tensor([-4000.0, 1000.0]), ONE_PAIR).item() == pytest.approx(5000.0)


def test_no_pairs() -> None:
    """A micro-batch of examples with one completion each: an empty loss that a process can still backpropagate."""
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    counts = torch.tensor([1, 1])
    losses = reward_loss(scores, ranked_pairs(counts), torch.empty(0), center_coefficient=0.1)
    assert losses.shape == pair_weights(counts).shape == (0,)
    (losses * pair_weights(counts)).sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [0.0, 0.0]
    assert ranked_pairs(torch.empty(0, dtype=torch.int64)).shape == (0, 2)


@pytest.mark.parametrize("counts", [torch.tensor([2, 0]), torch.tensor([-1])])
def test_examples_without_completions(counts: Tensor) -> None:
    for of in (ranked_pairs, pair_weights):
        with pytest.raises(ValueError, match="each example has at least one completion, not"):
            of(counts)


@pytest.mark.parametrize("counts", [torch.tensor([[2]]), torch.tensor([2.0])])
def test_counts_of_another_form(counts: Tensor) -> None:
    for of in (ranked_pairs, pair_weights):
        with pytest.raises(ValueError, match=r"expected completions_per_example \(E,\) of integers"):
            of(counts)


def test_other_shapes() -> None:
    """A column of scores, as a head gives them, would broadcast to every pair with every pair."""
    scores = torch.tensor([2.0, 1.0])
    with pytest.raises(ValueError, match=r"got \(2, 1\) and \(1, 2\)"):
        reward_loss(scores[:, None], ONE_PAIR)
    with pytest.raises(ValueError, match=r"got \(2,\) and \(2,\)"):
        reward_loss(scores, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"one margin for each of 1 pairs, got \(2,\)"):
        reward_loss(scores, ONE_PAIR, torch.zeros(2))


TEXTS = [("hello ", "there", "you"), ("what is it? ", "a parcel", "nothing at all"), ("so? ", "yes", "no, never")]


@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 2.0]], ids=["", "margin"])
@pytest.mark.parametrize("coefficient", [None, 0.05], ids=["", "centred"])
def test_trl(tmp_path: Path, margins: list[float] | None, coefficient: float | None) -> None:
    """RewardTrainer's own loss and gradient on a tiny classifier, from its own collated batch; ours from its scores."""
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    config = tiny.model("llama").config
    config.num_labels = 1
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight, std=0.5)  # so that scores differ by more than rounding
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "chosen": prompt + best, "rejected": prompt + worst} for prompt, best, worst in TEXTS
    ]
    if margins is not None:
        rows = [{**row, "margin": margin} for row, margin in zip(rows, margins, strict=True)]
    trainer = RewardTrainer(
        model,
        args=RewardConfig(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_dropout=True,
            center_rewards_coefficient=coefficient,
            per_device_train_batch_size=len(rows),
            train_sampling_strategy="sequential",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    (batch,) = trainer.get_train_dataloader()
    assert ("margin" in batch) == (margins is not None)
    wanted, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)

    # It collates all chosen texts, then all rejected ones.
    scores = outputs.logits.squeeze(-1)
    assert scores.std() > 0.05
    pairs = torch.stack([torch.arange(3), torch.arange(3, 6)], dim=1)
    losses = reward_loss(scores, pairs, batch.get("margin"), coefficient or 0.0)
    torch.testing.assert_close(losses.mean(), wanted, **CLOSE)

    weight = trainer.model.score.weight
    (one,) = torch.autograd.grad(wanted, weight, retain_graph=True)
    (other,) = torch.autograd.grad(losses.mean(), weight)
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)
