"""Proximal policy optimization of a language model: rewards of tokens, advantages, the clipped losses, KL control.

Schulman et al. 2017 (PPO), arXiv:1707.06347; Schulman et al. 2016 (GAE), arXiv:1506.02438; Ziegler et al. 2019,
arXiv:1909.08593, whose code is https://github.com/openai/lm-human-preferences; Ouyang et al. 2022 (InstructGPT),
arXiv:2203.02155; Huang et al. 2024 ("The N+ implementation details"), arXiv:2403.17031.

Values per token are `(C, T)`: C completions, T tokens of the longest. `mask` `(C, T)` is True at a completion's tokens;
what stands elsewhere is never read, be it NaN, and what is returned there is 0. Sums, not means, are returned where
micro-batches have to add up: the caller divides by the tokens of the whole accumulation window.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

KLKind = Literal["k1", "k2", "k3"]

# How far from its target a KL may be counted (Ziegler et al. 2019, section 2.2).
MAX_PROPORTIONAL_ERROR = 0.2

INFINITE = float("inf")


class PolicyLoss(NamedTuple):
    """Sums over the masked tokens, each `()`; only `loss` has a gradient.

    Divided by the number of tokens, `approxkl` is Huang et al.'s estimate ½(log π − log π_old)² of how far the policy
    moved in this update, `clipfrac` the share of tokens whose clipped term was the larger, `ratio` the mean π/π_old.
    """

    loss: Tensor
    approxkl: Tensor
    clipfrac: Tensor
    ratio: Tensor


class ValueLoss(NamedTuple):
    """Sums over the masked tokens, each `()`; only `loss` has a gradient. `clipfrac` as in `PolicyLoss`."""

    loss: Tensor
    clipfrac: Tensor


class Advantages(NamedTuple):
    """Of every token, both `(C, T)`, detached: its advantage, and the return that its value is to predict."""

    advantages: Tensor
    returns: Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the masked `values`, `()`; both of one shape. Not a product with the mask: NaN · 0 is NaN."""
    check_per_token(mask, values=values)
    return torch.where(mask, values, 0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the masked `values`, `()`; both of one shape. Of none it is 0, and can be backpropagated."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`values` with variance 1 over the masked tokens; outside the mask 0.

        (x − mean) / √(variance + 1e−8), plus the mean again unless `shift_mean`

    As `whiten` of lm-human-preferences, the variance is that of the population (divided by n; TRL's PPO, now gone,
    divided by n − 1). Advantages are whitened so; rewards with `shift_mean=False`, since a shift of every token's
    reward would pay for length (Huang et al. 2024). Give it all tokens of the rollout at once.

    Args:
        values, mask: of one shape.
        shift_mean: True for a mean of 0, False to keep the mean.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)


def kl_estimate(logps: Tensor, reference: Tensor, kind: KLKind = "k1") -> Tensor:
    """Estimate of KL(π ‖ π_ref) from each sampled token, of the shape of `logps`.

    Schulman 2020, http://joschu.net/blog/kl-approx.html, with Δ = log π − log π_ref of a token drawn from π:

        k1  Δ              unbiased; of either sign
        k2  ½ Δ²           biased, with a low variance
        k3  e^(−Δ) − 1 + Δ unbiased; never negative (GRPO's)

    Args:
        logps: log-probabilities of the sampled tokens under the policy that they were drawn from.
        reference: the same under the reference.
        kind: see above.

    Raises:
        ValueError: an unknown kind, or different shapes.
    """
    if logps.shape != reference.shape:
        raise ValueError(f"expected one shape, got logps {tuple(logps.shape)}, reference {tuple(reference.shape)}")
    delta = logps - reference
    if kind == "k1":
        return delta
    if kind == "k2":
        return 0.5 * delta.square()
    if kind == "k3":
        return torch.expm1(-delta) + delta
    raise ValueError(f"kind must be one of {', '.join(get_args(KLKind))}, not {kind!r}")


def missing_end_penalty(scores: Tensor, ended: Tensor, penalty: float | None) -> Tensor:
    """`scores` less `penalty` where a completion did not end, `(C,)`.

    TRL's `missing_eos_penalty`: subtracted, so that of two unfinished completions the better stays the better. (Huang
    et al. 2024 give all of them one fixed low score instead.)

    Args:
        scores: `(C,)` the judge's.
        ended: `(C,)` bool, whether the completion has its end of text.
        penalty: in units of the scores, at least 0; None for none.

    Raises:
        ValueError: a negative penalty, or other shapes.
    """
    if scores.ndim != 1 or ended.shape != scores.shape or ended.dtype != torch.bool:
        raise ValueError(
            f"expected scores (C,) and ended (C,) of torch.bool, got {tuple(scores.shape)} and {tuple(ended.shape)} of "
            f"{ended.dtype}"
        )
    if penalty is None:
        return scores
    if not penalty >= 0:
        raise ValueError(f"the penalty is subtracted, so it must be at least 0, not {penalty}")
    return torch.where(ended, scores, scores - penalty)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of each token, `(C, T)`: −`kl_coef` · `kl`, and at the completion's last token its score on top.

    Ziegler et al. 2019, eq. 2, written per token as in their code and InstructGPT's eq. 2.

    Args:
        scores: `(C,)` what the judge gave the completions.
        kl: `(C, T)` of each token, see `kl_estimate`.
        mask: `(C, T)`; its last True is the last token.
        kl_coef: β, see `FixedKL` and `AdaptiveKL`.

    Raises:
        ValueError: other shapes, or a completion without a token, whose score would be lost.
    """
    check_per_token(mask, kl=kl)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"expected one score for each of {len(mask)} completions, got {tuple(scores.shape)}")
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"completion {empty[0]} has no token that its score could be given to")
    rewards = torch.where(mask, -kl_coef * kl, 0)
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, places, -1).amax(1, keepdim=True)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> Advantages:
    """Generalized advantage estimation, Schulman et al. 2016, eq. 16, over the masked tokens of each completion.

        δ_t = r_t + γ V_{t+1} − V_t
        A_t = δ_t + γ λ A_{t+1}
        R_t = A_t + V_t

    After the last token the episode has ended: V and A are 0 there. λ = 0 gives the residuals δ, λ = 1 the (discounted)
    sum of the rewards to come less the value. Tokens outside the mask are stepped over, wherever they stand.

    Huang et al. 2024 let values be one token longer than the completion: then extend `mask` by a token, with a KL of 0
    there, for this function, `token_rewards` and `value_loss`.

    Args:
        rewards, values: `(C, T)`.
        mask: `(C, T)`.
        gamma: discount γ.
        lam: λ.
    """
    check_per_token(mask, rewards=rewards, values=values)
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(mask.shape[1])):
        here = mask[:, t]
        residual = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(here, residual + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, next_advantage, 0)
    return Advantages(advantages, torch.where(mask, advantages + values, 0))


def policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_range: float = 0.2
) -> PolicyLoss:
    """PPO's clipped surrogate, summed over the masked tokens (Schulman et al. 2017, eq. 7).

        max(−A ρ, −A clip(ρ, 1−ε, 1+ε)),  ρ = π / π_old

    Where ρ has left the clip range on the side that A asks for, the gradient is 0.

    Args:
        logps: `(C, T)` log-probabilities under the policy.
        old_logps: `(C, T)` the same before this rollout's first update.
        advantages: `(C, T)`.
        mask: `(C, T)`.
        clip_range: ε.
    """
    check_per_token(mask, logps=logps, old_logps=old_logps, advantages=advantages)
    # Masked before exp: what overflowed in the padding would make its gradient NaN, even times 0.
    log_ratio = torch.where(mask, logps - old_logps, 0)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return PolicyLoss(
        masked_sum(torch.max(plain, clipped), mask),
        0.5 * log_ratio.detach().square().sum(),
        masked_sum((clipped > plain).float(), mask),
        masked_sum(ratio.detach(), mask),
    )


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float = 0.2) -> ValueLoss:
    """Squared error of the values, clipped as the policy is, summed over the masked tokens.

        ½ max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²)

    As in lm-human-preferences and Huang et al. 2024. ε is in units of the returns.

    Args:
        values: `(C, T)` as the value model gives them now.
        old_values: `(C, T)` as it gave them before this rollout's first update.
        returns: `(C, T)` of `gae`.
        mask: `(C, T)`.
        clip_range: ε.
    """
    check_per_token(mask, values=values, old_values=old_values, returns=returns)
    # Masked before they meet: the gradient of a square is a product with what was squared, and 0 · NaN is NaN.
    values, old_values, returns = (torch.where(mask, given, 0) for given in (values, old_values, returns))
    # Not old + clip(difference), whose rounding would count values as clipped that are within the range.
    near = values.clamp(old_values - clip_range, old_values + clip_range)
    plain, clipped = (values - returns).square(), (near - returns).square()
    return ValueLoss(0.5 * masked_sum(torch.max(plain, clipped), mask), masked_sum((clipped > plain).float(), mask))


class FixedKL:
    """A KL coefficient β that stays what it is (InstructGPT).

    Raises:
        ValueError: `coef` is negative or not finite.
    """

    def __init__(self, coef: float) -> None:
        self.coef = _coefficient(coef)

    def update(self, kl: float, n: int) -> None:
        """Nothing to adapt; arguments as in `AdaptiveKL.update`."""

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = _coefficient(state["coef"])


class AdaptiveKL:
    """A KL coefficient β that steers towards a KL (Ziegler et al. 2019, section 2.2).

        e = clip((KL − target) / target, −0.2, 0.2)
        β ← β (1 + e · n / horizon)

    where n counts the completions of an update, as the paper's code does (its K_β is n / horizon).

    Args:
        coef: β to begin with. Not 0, from which a factor never leads away.
        target: the KL of a completion (the sum over its tokens) to keep to, in nats.
        horizon: completions over which an error takes full effect.

    Raises:
        ValueError: one of them is not positive and finite.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        self.coef = _positive("coef", coef)
        self.target, self.horizon = _positive("target", target), _positive("horizon", horizon)

    def update(self, kl: float, n: int) -> None:
        """Adapt to an update's mean `kl` over its `n` completions.

        Raises:
            ValueError: `kl` is not finite, or `n` is so large beside the horizon that β could change its sign.
        """
        if not abs(kl) < INFINITE:  # NaN is not below it either
            raise ValueError(f"the KL to adapt to is {kl}")
        if not 0 <= n * MAX_PROPORTIONAL_ERROR < self.horizon:
            raise ValueError(
                f"{n} completions in one update need a horizon above {n * MAX_PROPORTIONAL_ERROR:g}, not "
                f"{self.horizon:g}: beyond that the KL coefficient could become negative"
            )
        error = (kl - self.target) / self.target
        error = max(-MAX_PROPORTIONAL_ERROR, min(MAX_PROPORTIONAL_ERROR, error))
        self.coef *= 1 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What has been adapted; target and horizon are settings of the run."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = _positive("coef", state["coef"])


def check_per_token(mask: Tensor, **values: Tensor) -> None:
    """That all `values` have the mask's shape: broadcast silently, a `(C,)` would weigh tokens instead of completions.

    Raises:
        ValueError: one has another shape, or the mask is not of torch.bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a mask of torch.bool, got {mask.dtype}")
    for name, value in values.items():
        if value.shape != mask.shape:
            raise ValueError(f"expected {name} of the mask's shape {tuple(mask.shape)}, got {tuple(value.shape)}")


def _coefficient(coef: float) -> float:
    if not 0 <= coef < INFINITE:
        raise ValueError(f"a KL coefficient must be at least 0 and finite, not {coef}")
    return float(coef)


def _positive(name: str, value: float) -> float:
    if not 0 < value < INFINITE:
        raise ValueError(f"{name} of an adaptive KL coefficient must be above 0 and finite, not {value}")
    return float(value)
