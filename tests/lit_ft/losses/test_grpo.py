"""GRPO's advantages and loss: by hand, under any split into micro-batches, and beside TRL's GRPOTrainer."""

from __future__ import annotations

import inspect
import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lit_ft.losses.grpo import GRPOLossType, RewardScale, group_advantages, grpo_loss
from lit_ft.losses.ppo import kl_estimate, policy_loss
from tests import tiny

CLOSE: Any = {"rtol": 1e-5, "atol": 1e-6}
NAN = math.nan
LOSSES, SCALES = get_args(GRPOLossType), get_args(RewardScale)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Advantages


def test_advantages_of_groups() -> None:
    """1, 3: mean 2, deviation √2 (over n − 1). 0, 0, 6: mean 2, deviation √((4 + 4 + 16) / 2) = √12."""
    found = group_advantages(torch.tensor([1.0, 3.0, 0.0, 0.0, 6.0]), torch.tensor([2, 3]))
    first, second = math.sqrt(2) + 1e-4, math.sqrt(12) + 1e-4
    torch.testing.assert_close(
        found, torch.tensor([-1 / first, 1 / first, -2 / second, -2 / second, 4 / second]), **CLOSE
    )


def test_advantages_of_the_batch_and_unscaled() -> None:
    """All five have mean 2 and deviation √((1 + 1 + 4 + 4 + 16) / 4) = √6.5; means are the groups' all the same."""
    rewards, counts = torch.tensor([1.0, 3.0, 0.0, 0.0, 6.0]), torch.tensor([2, 3])
    apart = torch.tensor([-1.0, 1.0, -2.0, -2.0, 4.0])
    torch.testing.assert_close(group_advantages(rewards, counts, "none"), apart, **CLOSE)
    wanted = apart / (math.sqrt(6.5) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, counts, "batch"), wanted, **CLOSE)
    # A group that is better as a whole: its mean goes, but counts in the batch's deviation.
    lifted = rewards + torch.tensor([10.0, 10.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(group_advantages(lifted, counts, "none"), apart, **CLOSE)
    wanted = apart / (lifted.std() + 1e-4)
    torch.testing.assert_close(group_advantages(lifted, counts, "batch"), wanted, **CLOSE)


@pytest.mark.parametrize("scale", SCALES)
def test_a_group_that_agrees_has_no_advantage(scale: Any) -> None:
    """Nobody did better: exactly 0, also where a mean of large rewards would be rounded, and for a group of one."""
    rewards = torch.tensor([12345.678] * 3 + [0.1] * 7 + [5.0, 1.0, 2.0])
    found = group_advantages(rewards, torch.tensor([3, 7, 1, 2]), scale)
    assert not found[:11].any() and found[11:].all()
    assert group_advantages(torch.tensor([7.0]), torch.tensor([1]), scale).tolist() == [0.0]


def test_scaled_advantages_do_not_know_the_scale_of_rewards() -> None:
    rewards, counts = noise(12), torch.tensor([4, 3, 5])
    for scale in ("group", "batch"):
        one = group_advantages(1e3 * rewards, counts, scale)  # type: ignore[arg-type]
        other = group_advantages(1e3 * (1e2 * rewards + 7), counts, scale)  # type: ignore[arg-type]
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.stack([g.sum() for g in one.split([4, 3, 5])]), torch.zeros(3), **CLOSE)


def test_rewards_of_right_and_wrong() -> None:
    """As integers, which a function that checks answers returns."""
    counts = torch.tensor([3, 2])
    found = group_advantages(torch.tensor([1, 0, 0, 1, 1]), counts)
    assert torch.equal(found, group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), counts))
    assert found[0] > 0 > found[1] and found[3] == 0


def test_bad_rewards() -> None:
    counts = torch.tensor([2, 2])
    for wrong in (NAN, math.inf):
        with pytest.raises(ValueError, match=f"the reward of completion 2 is {wrong}"):
            group_advantages(torch.tensor([1.0, 2.0, wrong, 3.0]), counts)
    with pytest.raises(ValueError, match=r"got \(3,\) and \[2, 2\]"):
        group_advantages(torch.ones(3), counts)
    with pytest.raises(ValueError, match=r"got \(2, 2\) and \[2, 2\]"):
        group_advantages(torch.ones(2, 2), counts)
    scale: Any = "groups"
    with pytest.raises(ValueError, match="must be one of group, batch, none, not 'groups'"):
        group_advantages(torch.ones(4), counts, scale)


# The loss by hand: completions of 1 and 3 tokens, A = 1 and −1, π_old = 1 everywhere. Ratios 1.5 (clipped to 1.2);
# 1.5 (not clipped under A < 0), 0.5 (clipped to 0.8), 1. So −min(Aρ, A clip(ρ)) = −1.2; 1.5, 0.8, 1.
MASK = torch.tensor([[True, False, False], [True, True, True]])
RATIOS = torch.tensor([[1.5, 1.0, 1.0], [1.5, 0.5, 1.0]])
ADVANTAGES = torch.tensor([1.0, -1.0])
TOTALS: Any = {"total_completions": 2, "total_tokens": 4}


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("grpo", (-1.2 + 3.3 / 3) / 2),
        ("dapo", 2.1 / 4),
        ("bnpo", 2.1 / 4),
        ("dr_grpo", 2.1 / (2 * 10)),
    ],
)
def test_loss(kind: Any, wanted: float) -> None:
    logps = RATIOS.log().requires_grad_()
    zeros = torch.zeros(2, 3)
    found = grpo_loss(
        logps, zeros, None, ADVANTAGES, MASK, loss_type=kind, max_completion_length=10, epsilon=0.2, **TOTALS
    )
    assert found.loss.item() == pytest.approx(wanted, rel=1e-5)
    assert (found.low_clipped.item(), found.high_clipped.item(), found.kl) == (1, 1, None)
    found.loss.backward()
    assert logps.grad is not None
    slopes = logps.grad[MASK].tolist()
    assert slopes[0] == slopes[2] == 0 and slopes[1] > 0 and slopes[3] > 0  # zero where clipped
    assert not logps.grad[~MASK].any()


def test_the_default_is_trls() -> None:
    """dapo, ε = 0.2 on both sides, β = 0, a corrected KL."""
    from trl import GRPOConfig

    logps, zeros = RATIOS.log(), torch.zeros(2, 3)
    usual = grpo_loss(logps, zeros, None, ADVANTAGES, MASK, **TOTALS)
    fields, taken = GRPOConfig.__dataclass_fields__, inspect.signature(grpo_loss).parameters
    for name in ("loss_type", "epsilon", "epsilon_high", "beta", "use_bias_correction_kl"):
        assert taken[name].default == fields[name].default, name
    assert usual.loss.item() == pytest.approx(2.1 / 4)


def test_a_higher_upper_bound() -> None:
    """DAPO's ε_high = 0.6 leaves 1.5 alone, and the lower bound where it was."""
    found = grpo_loss(RATIOS.log(), torch.zeros(2, 3), None, ADVANTAGES, MASK, epsilon_high=0.6, **TOTALS)
    assert found.loss.item() == pytest.approx((-1.5 + 3.3) / 4, rel=1e-5)
    assert (found.low_clipped.item(), found.high_clipped.item()) == (1, 0)


def test_pull_towards_the_reference() -> None:
    """β · k3 of each token on top, with its gradient by log π: 1 − e^−Δ; times ρ, which is 1, it is Δ."""
    logps, reference = noise(2, 3).requires_grad_(), noise(2, 3, seed=1)
    old = logps.detach()
    options: Any = {"beta": 0.3, **TOTALS}
    found = grpo_loss(logps, old, reference, torch.zeros(2), MASK, use_bias_correction_kl=False, **options)
    wanted = kl_estimate(old, reference, "k3")[MASK].sum()
    torch.testing.assert_close(found.kl, wanted, **CLOSE)
    torch.testing.assert_close(found.loss, 0.3 * wanted / 4, **CLOSE)
    (slopes,) = torch.autograd.grad(found.loss, logps)
    torch.testing.assert_close(slopes, 0.3 * (1 - (reference - old).exp()) * MASK / 4, **CLOSE)
    corrected = grpo_loss(logps, old, reference, torch.zeros(2), MASK, **options)
    assert torch.equal(corrected.loss, found.loss)
    (slopes,) = torch.autograd.grad(corrected.loss, logps)
    torch.testing.assert_close(slopes, 0.3 * (old - reference) * MASK / 4, **CLOSE)
    # Without a pull the KL is still measured.
    free = grpo_loss(logps, old, reference, ADVANTAGES, MASK, **TOTALS)
    torch.testing.assert_close(free.kl, wanted, **CLOSE)
    assert free.kl is not None and not free.kl.requires_grad
    assert free.loss.item() == pytest.approx(0.5)  # ratio 1: (−1 + 3) / 4


def test_corrected_kl_is_the_kl_of_todays_policy() -> None:
    """In expectation over tokens of π_old: its value and its gradient by the logits are the exact KL's.

    By enumeration: a completion of one token for each of the vocabulary, weighed by its probability under π_old.
    """
    logits = noise(6).double().requires_grad_()
    old, reference = noise(6, seed=1).double().log_softmax(0), noise(6, seed=2).double().log_softmax(0)
    policy = logits.log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    (slopes,) = torch.autograd.grad(exact, logits, retain_graph=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    sums = []
    for corrected in (True, False):
        parts = [
            old[v].exp()
            * grpo_loss(
                policy[v].view(1, 1),
                old[v].view(1, 1),
                reference[v].view(1, 1),
                torch.zeros(1).double(),
                one,
                beta=1.0,
                use_bias_correction_kl=corrected,
                total_completions=1,
                total_tokens=1,
            ).loss
            for v in range(6)
        ]
        sums.append(torch.stack(parts).sum())
    torch.testing.assert_close(sums[0], exact)
    torch.testing.assert_close(torch.autograd.grad(sums[0], logits, retain_graph=True)[0], slopes)
    assert not torch.allclose(torch.autograd.grad(sums[1], logits)[0], slopes, rtol=0.1)


def ragged() -> dict[str, Any]:
    """Seven completions of 0 to 6 tokens, moved by enough to be clipped on both sides."""
    lengths = torch.tensor([3, 6, 1, 0, 5, 2, 6])
    logps = -2 + noise(7, 6)
    return {
        "logps": logps,
        "old_logps": logps + 0.4 * noise(7, 6, seed=1),
        "reference": logps + 0.4 * noise(7, 6, seed=2),
        "advantages": noise(7, seed=3),
        "mask": torch.arange(6) < lengths[:, None],
    }


@pytest.mark.parametrize("kind", LOSSES)
def test_micro_batches_add_up(kind: Any) -> None:
    """To the window's loss, gradient and metrics, however unevenly it is split."""
    given = ragged()
    totals: Any = {"total_completions": 7, "total_tokens": int(given["mask"].sum())}
    options: Any = {"loss_type": kind, "beta": 0.1, "max_completion_length": 8, **totals}
    given["logps"].requires_grad_()
    whole = grpo_loss(**given, **options)
    (wanted,) = torch.autograd.grad(whole.loss, given["logps"])
    assert whole.low_clipped > 0 and whole.high_clipped > 0
    for cuts in ([3, 4], [1, 1, 5], [1] * 7):
        pieces = [
            dict(zip(given, parts, strict=True))
            for parts in zip(*(value.split(cuts) for value in given.values()), strict=True)
        ]
        found = [grpo_loss(**piece, **options) for piece in pieces]
        for one, *others in zip(whole, *found, strict=True):
            assert one is not None
            torch.testing.assert_close(torch.stack([other for other in others if other is not None]).sum(), one)
        (gradient,) = torch.autograd.grad(sum(one.loss for one in found), given["logps"])
        torch.testing.assert_close(gradient, wanted)
    # On a GPU totals are tensors that nobody waits for.
    tensors = {name: torch.tensor(value) for name, value in totals.items()}
    assert torch.equal(grpo_loss(**given, **{**options, **tensors}).loss, whole.loss)


@pytest.mark.parametrize("kind", LOSSES)
def test_padding_is_never_read(kind: Any) -> None:
    given = ragged()
    options: Any = {"loss_type": kind, "beta": 0.1, "max_completion_length": 8}
    options |= {"total_completions": 7, "total_tokens": 23}
    seen = []
    for wrong in (0.0, NAN, 1e4):
        filled = {
            name: given[name].masked_fill(~given["mask"], wrong * sign)
            for name, sign in (("logps", 1), ("old_logps", -1), ("reference", 2))
        }
        filled["logps"].requires_grad_()
        found = grpo_loss(**{**given, **filled}, **options)
        (gradient,) = torch.autograd.grad(found.loss, filled["logps"])
        assert not gradient[~given["mask"]].any()
        seen.append((*(value.item() for value in found if value is not None), *gradient.flatten().tolist()))
    assert seen[0] == seen[1] == seen[2]


def test_bad_input() -> None:
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="must be one of grpo, bnpo, dr_grpo, dapo, not 'gspo'"):
        grpo_loss(zeros, zeros, None, ADVANTAGES, MASK, loss_type="gspo", **TOTALS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a positive max_completion_length, not None"):
        grpo_loss(zeros, zeros, None, ADVANTAGES, MASK, loss_type="dr_grpo", **TOTALS)
    with pytest.raises(ValueError, match=r"beta=0\.1 is a pull towards a reference, and there is none"):
        grpo_loss(zeros, zeros, None, ADVANTAGES, MASK, beta=0.1, **TOTALS)
    with pytest.raises(ValueError, match=r"one advantage for each of 2 completions, got \(2, 3\)"):
        grpo_loss(zeros, zeros, None, zeros, MASK, **TOTALS)
    with pytest.raises(ValueError, match=r"expected reference of the mask's shape \(2, 3\), got \(2,\)"):
        grpo_loss(zeros, zeros, torch.zeros(2), ADVANTAGES, MASK, **TOTALS)
    for name in TOTALS:
        with pytest.raises(ValueError, match=f"{name} is 0: a mean over nothing"):
            grpo_loss(zeros, zeros, None, ADVANTAGES, MASK, **{**TOTALS, name: 0})


# Beside TRL

GROUP, PROMPTS = 3, 4
C, T = GROUP * PROMPTS, 6
# Prompts of other rewards, one of which all completions share.
REWARDS = [1.0, 0.0, 0.5, 2.0, 2.0, 2.0, -3.0, 0.25, 7.0, 0.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real GRPOTrainer on a tiny model; what a test changes of it is what the constructor copies from its config."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer(
        tiny.model("llama"),
        reward_funcs=lambda completions, **_: REWARDS[: len(completions)],
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=C // 2,
            gradient_accumulation_steps=2,
            num_generations=GROUP,
            max_completion_length=T,
            beta=0.0,  # with another it would load a reference by the model's name
            epsilon_high=0.28,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{k}?"} for k in range(PROMPTS)]),
        processing_class=tiny.tokenizer(),
    )


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_are_trls(trl: Any, scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of completions that it samples and has rewarded itself."""
    monkeypatch.setattr(trl, "scale_rewards", scale)
    trl.model.train()
    sampled = trl._generate_and_score_completions([{"prompt": f"{k // GROUP}?"} for k in range(C)])
    found = group_advantages(torch.tensor(REWARDS), torch.tensor([GROUP] * PROMPTS), scale)
    assert sampled["advantages"].abs().max() > 0.5
    torch.testing.assert_close(found, sampled["advantages"], rtol=1e-6, atol=1e-6)


def test_advantage_of_a_group_of_one_is_trls(trl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes up in TRL's evaluation only."""
    monkeypatch.setattr(trl, "num_generations_eval", 1)
    trl.model.eval()
    sampled = trl._generate_and_score_completions([{"prompt": f"{k}?"} for k in range(3)])
    found = group_advantages(torch.tensor(REWARDS[:3]), torch.ones(3, dtype=torch.int64))
    assert torch.equal(found, sampled["advantages"]) and not found.any()


@pytest.fixture(scope="module")
def rollout(trl: Any) -> dict[str, Tensor]:
    """Ragged completions after prompts of two lengths, from a policy that has moved since; as TRL holds them."""
    lengths = torch.tensor([6, 2, 1, 4, 3, 6, 5, 1, 2, 6, 4, 3])
    mask = (torch.arange(T) < lengths[:, None]).long()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(4, 260, (C, 4), generator=generator)
    prompt_mask = torch.ones_like(prompts)
    prompts[::2, 0], prompt_mask[::2, 0] = 3, 0
    given = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(4, 260, (C, T), generator=generator).masked_fill(mask == 0, 3),
        "completion_mask": mask,
        "advantages": torch.randn(C, generator=generator),
        "num_items_in_batch": mask.sum(),
    }
    logps = our_logps(trl, given).detach()
    given["old_per_token_logps"] = logps + 0.4 * torch.randn(C, T, generator=generator)
    given["ref_per_token_logps"] = logps + 0.4 * torch.randn(C, T, generator=generator)
    return given


def our_logps(trl: Any, given: dict[str, Tensor]) -> Tensor:
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    logits = trl.model(input_ids=ids, attention_mask=torch.cat([given["prompt_mask"], given["completion_mask"]], 1))
    return logits.logits[:, -T - 1 : -1].log_softmax(-1).gather(-1, given["completion_ids"][..., None]).squeeze(-1)


def our_loss(
    trl: Any, given: dict[str, Tensor], kind: Any, beta: float, window: dict[str, Tensor], corrected: bool = True
) -> Any:
    return grpo_loss(
        our_logps(trl, given),
        given["old_per_token_logps"],
        given["ref_per_token_logps"],
        given["advantages"],
        given["completion_mask"].bool(),
        epsilon=0.2,
        epsilon_high=0.28,
        beta=beta,
        use_bias_correction_kl=corrected,
        loss_type=kind,
        max_completion_length=T,
        total_completions=len(window["advantages"]),
        total_tokens=window["num_items_in_batch"],
    )


def gradients(trl: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(trl.model.parameters())))


@pytest.mark.parametrize(("beta", "corrected"), [(0.0, True), (0.1, True), (0.1, False)])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_is_trls(
    trl: Any, rollout: dict[str, Tensor], kind: Any, beta: float, corrected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its value, its gradient by all weights and its metrics, for a batch that is a window of its own."""
    monkeypatch.setattr(trl, "loss_type", kind)
    monkeypatch.setattr(trl, "beta", beta)
    monkeypatch.setattr(trl.args, "use_bias_correction_kl", corrected)
    trl.model.eval()
    trl._metrics["eval"].clear()
    wanted = trl._compute_loss(trl.model, rollout)
    found = our_loss(trl, rollout, kind, beta, rollout, corrected)
    torch.testing.assert_close(found.loss, wanted, **CLOSE)
    for one, other in zip(gradients(trl, found.loss), gradients(trl, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    logged = {name: values[-1] for name, values in trl._metrics["eval"].items()}
    tokens = rollout["num_items_in_batch"].item()
    low, high = found.low_clipped.item() / tokens, found.high_clipped.item() / tokens
    assert low > 0.05 and high > 0.05
    assert logged["clip_ratio/low_mean"] == pytest.approx(low)
    assert logged["clip_ratio/high_mean"] == pytest.approx(high)
    assert logged["clip_ratio/region_mean"] == pytest.approx(low + high)
    if beta:
        assert logged["kl"] == pytest.approx(found.kl.item() / tokens, rel=1e-4)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_accumulated_loss_is_trls(
    trl: Any, rollout: dict[str, Tensor], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches of equal size, of which TRL and we add up the same loss; but for bnpo.

    TRL divides that by the tokens of each micro-batch, so that its loss depends on the split, and ours must not.
    """
    monkeypatch.setattr(trl, "loss_type", kind)
    monkeypatch.setattr(trl, "beta", 0.1)
    monkeypatch.setattr(trl, "current_gradient_accumulation_steps", 2, raising=False)
    assert trl.args.steps_per_generation == 2
    trl.model.train()
    wanted, found = torch.tensor(0.0), torch.tensor(0.0)
    for rows in (slice(0, C // 2), slice(C // 2, C)):
        part = {name: value if value.ndim == 0 else value[rows] for name, value in rollout.items()}
        wanted = wanted + trl._compute_loss(trl.model, part)
        found = found + our_loss(trl, part, kind, 0.1, rollout).loss
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(found, our_loss(trl, rollout, kind, 0.1, rollout).loss, **CLOSE)


def test_ppos_policy_loss_is_trls(trl: Any, rollout: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPOTrainer takes advantages per token too, and is then PPO's surrogate: a mean over tokens under dapo."""
    for name, value in {"loss_type": "dapo", "beta": 0.0, "epsilon_high": 0.2}.items():
        monkeypatch.setattr(trl, name, value)
    trl.model.eval()
    trl._metrics["eval"].clear()
    given = {**rollout, "advantages": noise(C, T, seed=5)}
    wanted = trl._compute_loss(trl.model, given)
    found = policy_loss(
        our_logps(trl, given), given["old_per_token_logps"], given["advantages"], given["completion_mask"].bool()
    )
    tokens = given["num_items_in_batch"]
    torch.testing.assert_close(found.loss / tokens, wanted, **CLOSE)
    for one, other in zip(gradients(trl, found.loss / tokens), gradients(trl, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert found.clipfrac.item() > 2
    (clipped,) = trl._metrics["eval"]["clip_ratio/region_mean"]
    assert clipped == pytest.approx((found.clipfrac / tokens).item())
