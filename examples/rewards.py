"""Reward functions for PPO and GRPO: python -m lit_ft +experiment=grpo reward=examples.rewards:brief

A reward function gets lists of prompts and completions, in the form that they have in the data, and whichever other
columns of the data it names; it returns a number for each completion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

WORDS = 40


def text_of(completion: Any) -> str:
    """A completion's text, be it a string or a list of messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def brief(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """1 for an answer of up to 40 words, less by the share of words above that."""
    counts = [len(text_of(completion).split()) for completion in completions]
    return [min(1.0, WORDS / max(count, 1)) for count in counts]


def right_number(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str]) -> list[float]:
    """1 where the last number of the completion is that of the column `answer` (as in GSM8K, after ####), else 0."""
    wanted = [one.rsplit("####", 1)[-1].strip().replace(",", "") for one in answer]
    numbers = [re.findall(r"-?[\d,]*\.?\d+", text_of(completion)) for completion in completions]
    return [
        float(bool(found) and found[-1].replace(",", "") == one) for found, one in zip(numbers, wanted, strict=True)
    ]
