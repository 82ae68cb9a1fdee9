"""Reward models: the loss of ranked completions, and the pairs that a ranking consists of.

Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155, section 3.5, eq. 1; the margin: Touvron et al. 2023 (Llama 2),
arXiv:2307.09288, eq. 2; the centring term: Eisenstein et al. 2023, arXiv:2312.09244, which TRL has as
`center_rewards_coefficient`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ranked_pairs(completions_per_example: Tensor) -> Tensor:
    """All pairs of each example's completions, `(P, 2)` int64: the index of the winner, then the loser's.

    Completions of an example stand together and best first, so of K completions all K·(K−1)/2 pairs count the earlier
    as the winner. An example with one completion ranks nothing and has no pair. How many pairs there are depends on
    the values, so this waits for a GPU that holds them.

    Args:
        completions_per_example: `(E,)` integers, each at least 1.

    Raises:
        ValueError: the argument is not of that form.
    """
    pairs, first = [], 0
    for count in _counts(completions_per_example):
        pairs.append(torch.triu_indices(count, count, offset=1).T + first)
        first += count
    found = torch.cat(pairs) if pairs else torch.empty(0, 2, dtype=torch.int64)
    return found.to(completions_per_example.device)


def pair_weights(completions_per_example: Tensor) -> Tensor:
    """What each pair of `ranked_pairs` counts, `(P,)` fp32: 1 / (K choose 2), so that each prompt counts once.

    InstructGPT's eq. 1. Without it a prompt with nine ranked completions would weigh as much as 36 prompts with two.
    Their sum is the number of examples that have a pair: the mean loss of the prompts is the weighted sum of the pairs
    divided by it.

    Args:
        completions_per_example: as in `ranked_pairs`.

    Raises:
        ValueError: as in `ranked_pairs`.
    """
    pairs_of = [count * (count - 1) // 2 for count in _counts(completions_per_example)]
    weights = [1 / number for number in pairs_of for _ in range(number)]
    return torch.tensor(weights, dtype=torch.float32, device=completions_per_example.device)


def reward_loss(
    scores: Tensor, pairs: Tensor, margins: Tensor | None = None, center_coefficient: float = 0.0
) -> Tensor:
    """Loss of each pair under Bradley and Terry's model, `(P,)`; of no pairs an empty one that can be backpropagated.

        −log σ(s_w − s_l − m) + c · (s_w + s_l)²

    The first term knows scores only up to a constant; the second draws that constant to where scores are around 0.

    Args:
        scores: `(C,)` one score per completion.
        pairs: `(P, 2)` int64, the winner's and the loser's place among the scores.
        margins: `(P,)` by how much each winner must win (m), or None for 0.
        center_coefficient: c.

    Raises:
        ValueError: shapes other than these.
    """
    if scores.ndim != 1 or pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"expected scores (C,) and pairs (P, 2), got {tuple(scores.shape)} and {tuple(pairs.shape)}")
    if margins is not None and margins.shape != pairs.shape[:1]:
        raise ValueError(f"expected one margin for each of {len(pairs)} pairs, got {tuple(margins.shape)}")
    winner, loser = scores[pairs[:, 0]], scores[pairs[:, 1]]
    ahead = winner - loser
    if margins is not None:
        ahead = ahead - margins
    losses = -F.logsigmoid(ahead)
    if center_coefficient:
        losses = losses + center_coefficient * (winner + loser).square()
    return losses


def _counts(completions_per_example: Tensor) -> list[int]:
    if completions_per_example.ndim != 1 or completions_per_example.is_floating_point():
        raise ValueError(
            f"expected completions_per_example (E,) of integers, got {tuple(completions_per_example.shape)} of "
            f"{completions_per_example.dtype}"
        )
    counts = completions_per_example.tolist()
    if any(count < 1 for count in counts):
        raise ValueError(f"each example has at least one completion, not {min(counts)}")
    return counts
