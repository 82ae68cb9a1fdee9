"""Direct preference optimization: the loss of pairs and the rewards it implies.

Rafailov et al. 2023, arXiv:2305.18290, eq. 7; IPO: Azar et al. 2023, arXiv:2310.12036, eq. 17, normalised per token as
its authors advise and TRL does; hinge: Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425; label smoothing (cDPO):
Mitchell 2023, https://ericmitchell.ai/cdpo.pdf.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

DPOLossType = Literal["sigmoid", "ipo", "hinge"]


class DPORewards(NamedTuple):
    """The rewards `β · (log π − log π_ref)` that a policy gives the pair's completions, each `(P,)`, detached."""

    chosen: Tensor
    rejected: Tensor


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    loss_type: DPOLossType = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """Loss of each pair, `(P,)`.

    With Δ = (log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l)) and smoothing ε:

        sigmoid  −(1−ε) log σ(βΔ) − ε log σ(−βΔ)
        hinge    max(0, 1 − βΔ)
        ipo      (Δ̄ − 1/(2β))², Δ̄ with each log-ratio divided by its completion's number of tokens

    Args:
        chosen, rejected: `(P,)` log-probabilities of the completions under the policy, summed over their tokens.
        reference_chosen, reference_rejected: the same under the reference.
        beta: strength of the pull towards the reference.
        loss_type: see above.
        label_smoothing: probability that a label is wrong, 0 ≤ ε < 0.5; only with `sigmoid`.
        chosen_lengths, rejected_lengths: `(P,)` numbers of tokens; needed by `ipo` only.
    """
    chosen_ratio, rejected_ratio = chosen - reference_chosen, rejected - reference_rejected
    if loss_type == "sigmoid":
        margin = beta * (chosen_ratio - rejected_ratio)
        return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    if label_smoothing:
        raise ValueError(f"label_smoothing is defined for loss_type=sigmoid, not {loss_type}")
    if loss_type == "hinge":
        return torch.relu(1 - beta * (chosen_ratio - rejected_ratio))
    if loss_type == "ipo":
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError("loss_type=ipo needs chosen_lengths and rejected_lengths")
        delta = chosen_ratio / chosen_lengths.clamp(min=1) - rejected_ratio / rejected_lengths.clamp(min=1)
        return (delta - 1 / (2 * beta)).square()
    raise ValueError(f"loss_type must be one of {', '.join(get_args(DPOLossType))}, not {loss_type!r}")


def dpo_rewards(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> DPORewards:
    """Implicit rewards of both completions; arguments as in `dpo_loss`."""
    return DPORewards(
        (beta * (chosen - reference_chosen)).detach(),
        (beta * (rejected - reference_rejected)).detach(),
    )
