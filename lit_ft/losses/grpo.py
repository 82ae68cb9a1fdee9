"""Group relative policy optimization: advantages within a prompt's completions, and PPO's clipped loss under them.

Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300, eq. 3 and 4; the ways to normalise: Liu et al. 2025 (Dr. GRPO),
arXiv:2503.20783; Yu et al. 2025 (DAPO), arXiv:2503.14476; the KL term's correction: DeepSeek-AI 2025 (DeepSeek-V3.2),
arXiv:2512.02556. Names, defaults and constants are those of TRL's GRPOTrainer (1.16).
Per-token values and masks as in `lit_ft.losses.ppo`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_ft.losses.ppo import check_per_token, kl_estimate, masked_sum

GRPOLossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
RewardScale = Literal["group", "batch", "none"]

# Added to a standard deviation before it divides; TRL's.
EPSILON = 1e-4


class GRPOLoss(NamedTuple):
    """This micro-batch's share of the window's loss, and sums over its masked tokens; each `()`, metrics detached.

    `kl`: the estimate of the KL to the reference as the loss has it; None without a reference. `low_clipped`,
    `high_clipped`: tokens whose ratio is below the clip range under a negative advantage, above it under a positive
    one. Divided by the window's tokens they are TRL's `kl`, `clip_ratio/low_mean` and `clip_ratio/high_mean` (and both
    clipped together `clip_ratio/region_mean`).
    """

    loss: Tensor
    kl: Tensor | None
    low_clipped: Tensor
    high_clipped: Tensor


def group_advantages(rewards: Tensor, completions_per_example: Tensor, scale: RewardScale = "group") -> Tensor:
    """Advantage of each completion over the others of its prompt, `(C,)`, the same for all its tokens.

        (r − mean of its group) / (s + 1e−4)

    with s the standard deviation (divided by n − 1) of its group, `group`, or of all rewards, `batch`; `none` does not
    divide (Dr. GRPO, which shows that dividing by the group's favours prompts that are nearly solved or nearly
    hopeless). A prompt with one completion has nobody to be compared with: its advantage is 0.

    Args:
        rewards: `(C,)`, finite, integers too; completions of an example stand together.
        completions_per_example: `(E,)` integers that add up to C. Groups may differ in size.
        scale: see above.

    Raises:
        ValueError: an unknown scale, other shapes, or a reward that is not finite.
    """
    if rewards.ndim != 1 or completions_per_example.ndim != 1 or int(completions_per_example.sum()) != len(rewards):
        raise ValueError(
            f"expected rewards (C,) and completions_per_example (E,) that add up to C, got {tuple(rewards.shape)} and "
            f"{completions_per_example.tolist()}"
        )
    wrong = (~rewards.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"the reward of completion {wrong[0]} is {rewards[wrong[0]].item()}; every one must be finite")
    if not rewards.is_floating_point():  # right or wrong, as 1 or 0
        rewards = rewards.float()
    examples = len(completions_per_example)
    group = torch.arange(examples, device=rewards.device).repeat_interleave(completions_per_example)
    zeros = rewards.new_zeros(examples)
    # Seen from the group's first reward: rewards that are equal then have a mean without rounding and advantages of
    # exactly 0, where 1e−4 alone would not hide the rounding of large ones.
    first = completions_per_example.cumsum(0) - completions_per_example
    shifted = rewards - rewards[first[group]]
    means = zeros.index_add(0, group, shifted) / completions_per_example.clamp(min=1)
    advantages = shifted - means[group]
    if scale == "none":
        return advantages
    if scale == "group":
        variances = zeros.index_add(0, group, advantages.square()) / (completions_per_example - 1).clamp(min=1)
        return advantages / (variances.sqrt()[group] + EPSILON)
    if scale == "batch":
        deviation = rewards.std() if len(rewards) > 1 else 0.0
        return advantages / (deviation + EPSILON)
    raise ValueError(f"scale must be one of {', '.join(get_args(RewardScale))}, not {scale!r}")


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    total_completions: int | Tensor,
    total_tokens: int | Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    loss_type: GRPOLossType = "dapo",
    max_completion_length: int | None = None,
) -> GRPOLoss:
    """A micro-batch's share of the loss: the shares of an accumulation window add up to the window's loss.

    Of a token of completion c, with ρ = π / π_old and the KL estimate k3 of `lit_ft.losses.ppo.kl_estimate`:

        ℓ = −min(A_c ρ, A_c clip(ρ, 1 − ε, 1 + ε_high)) + β · ρ k3        (or β · k3, without the correction)

    and of C completions with N tokens in the whole window:

        grpo          Σ_c (Σ_t ℓ / tokens of c) / C   every completion counts alike (DeepSeekMath)
        dr_grpo       Σ_c Σ_t ℓ / (C · L)             L = max_completion_length, so that length is not favoured
        dapo, bnpo    Σ_c Σ_t ℓ / N                   every token counts alike

    `bnpo` is TRL's name for dividing by the tokens of a micro-batch; since a split into micro-batches must not change
    the loss here, it is the same as `dapo`.

    Args:
        logps: `(C, T)` log-probabilities under the policy.
        old_logps: `(C, T)` the same before this rollout's first update.
        reference: `(C, T)` the same under the reference; None if there is none, which needs β = 0.
        advantages: `(C,)` of `group_advantages`.
        mask: `(C, T)`. A completion without a True (a truncated one that is left out) adds 0, but counts in C.
        total_completions: completions of the accumulation window over all processes.
        total_tokens: masked tokens of that window.
        epsilon: ε.
        epsilon_high: None for ε; DAPO recommends 0.28.
        beta: β.
        use_bias_correction_kl: whether ρ weighs the KL. Tokens were drawn from π_old, so this makes its expectation the
            KL of today's policy; and since ρ has a gradient, even at 1, it makes the expected gradient the KL's own,
            which that of k3 alone is not.
        loss_type: see above.
        max_completion_length: L, for `dr_grpo` only.

    Raises:
        ValueError: an unknown loss type, other shapes, β without a reference, `dr_grpo` without a length, or a total
            that is not positive (tensors are not looked at: reading them waits for a GPU).
    """
    check_per_token(mask, logps=logps, old_logps=old_logps)
    if advantages.shape != mask.shape[:1]:
        raise ValueError(f"expected one advantage for each of {len(mask)} completions, got {tuple(advantages.shape)}")
    if beta and reference is None:
        raise ValueError(f"beta={beta} is a pull towards a reference, and there is none; pass it, or beta=0")
    for name, total in (("total_completions", total_completions), ("total_tokens", total_tokens)):
        if not isinstance(total, Tensor) and total <= 0:
            raise ValueError(f"{name} is {total}: a mean over nothing is not defined")
    high = epsilon if epsilon_high is None else epsilon_high
    # Masked before exp, as in `policy_loss`.
    ratio = torch.where(mask, logps - old_logps, 0).exp()
    gain = advantages[:, None]
    losses = -torch.min(gain * ratio, gain * ratio.clamp(1 - epsilon, 1 + high))
    kl = None
    if reference is not None:
        check_per_token(mask, reference=reference)
        kl = kl_estimate(torch.where(mask, logps, 0), torch.where(mask, reference, 0), "k3")
        if use_bias_correction_kl:
            kl = kl * ratio
        if beta:
            losses = losses + beta * kl
    losses = torch.where(mask, losses, 0)
    if loss_type == "grpo":
        loss = (losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / total_completions
    elif loss_type == "dr_grpo":
        if max_completion_length is None or max_completion_length <= 0:
            raise ValueError(f"loss_type=dr_grpo needs a positive max_completion_length, not {max_completion_length}")
        loss = losses.sum() / (total_completions * max_completion_length)
    elif loss_type in ("dapo", "bnpo"):
        loss = losses.sum() / total_tokens
    else:
        raise ValueError(f"loss_type must be one of {', '.join(get_args(GRPOLossType))}, not {loss_type!r}")
    low_clipped, high_clipped = (ratio < 1 - epsilon) & (gain < 0), (ratio > 1 + high) & (gain > 0)
    return GRPOLoss(
        loss,
        None if kl is None else kl.detach().sum(),
        masked_sum(low_clipped.float(), mask),
        masked_sum(high_clipped.float(), mask),
    )
