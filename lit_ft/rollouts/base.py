"""What a rollout is, how it is drawn, and what every engine that generates rollouts can do."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from lit_ft.errors import UserError

E = TypeVar("E", bound="RolloutEngine")


class RolloutError(UserError):
    """An engine could not generate, although it tried again; the text says what happened and what to do."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: from softmax(logits / temperature), whole.

    There is no top-p and no top-k: what they let through is another policy's, whose log-probabilities nobody computes.

    Attributes:
        temperature: above 0; the trainer scores at the same one.
        max_new_tokens: after so many a completion is cut.
        stop_ids: tokens that end a completion; it includes the one that ended it.

    Raises:
        UserError: a temperature or a number of tokens that nothing can be drawn with.
    """

    temperature: float = 1.0
    max_new_tokens: int = 64
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(
                f"Rollouts are drawn at algorithm.temperature={self.temperature}; it must be a number above 0, "
                "1 for the policy as it is."
            )
        if self.max_new_tokens < 1:
            raise UserError(f"algorithm.max_new_tokens={self.max_new_tokens} leaves nothing to generate: at least 1.")


@dataclass(frozen=True)
class Rollout:
    """A prompt and one completion of it, as token ids.

    Attributes:
        prompt: what was completed.
        completion: at least one token; cut at, and including, its first stop token.
        ended: whether a stop token ended it, and not the limit of tokens.
        logps: the log-probabilities that the engine says it drew the completion's tokens with, or None. Never trained
            on: they show whether the engine has the policy that the trainer has.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    ended: bool
    logps: tuple[float, ...] | None = None


def as_rollout(
    prompt: tuple[int, ...],
    generated: Iterable[int],
    sampling: Sampling,
    logps: Sequence[float] | None = None,
) -> Rollout:
    """Cut what an engine generated, where it may have gone on (or padded) after the first stop token.

    By position and not by looking for pads: many models pad with the token that ends a text.

    Raises:
        ValueError: nothing was generated.
    """
    tokens = tuple(int(token) for token in generated)[: sampling.max_new_tokens]
    if not tokens:
        raise ValueError("an engine generated no token at all")
    first = next((k for k, token in enumerate(tokens) if token in sampling.stop_ids), None)
    kept = tokens if first is None else tokens[: first + 1]
    known = None if logps is None or len(logps) < len(kept) else tuple(logps[: len(kept)])
    return Rollout(prompt, kept, first is not None, known)


def check_prompts(prompts: Iterable[tuple[int, ...]], n: int, sampling: Sampling, context: int | None) -> None:
    """Refuse what cannot be completed, before anything is generated.

    Args:
        prompts: token ids.
        n: completions of each.
        sampling: holds how long an answer may be.
        context: how many tokens the model reaches; None: it does not say.

    Raises:
        UserError: a prompt is empty or leaves no room to answer.
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"n={n} completions of each prompt: at least 1")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(
                f"Prompt {index} of the batch has no tokens, so there is nothing to complete. Look in data for rows "
                "with an empty prompt, and for a chat template that writes nothing."
            )
        if context is not None and len(prompt) + sampling.max_new_tokens > context:
            raise UserError(
                f"A prompt of {len(prompt)} tokens leaves no room to answer: with algorithm.max_new_tokens="
                f"{sampling.max_new_tokens} it needs {len(prompt) + sampling.max_new_tokens} tokens, and the context "
                f"holds {context}. Lower algorithm.max_new_tokens, or data.max_length so that longer prompts are "
                "dropped."
            )


def seed_of(seed: int, place: int) -> int:
    """The seed of one prompt's draws, 62 bits; its k-th completion is drawn from this plus k.

    A hash, and not a sum: the draws of neighbours would be each other's.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest(), "big") >> 2


class RolloutEngine(ABC):
    """Generates completions with the policy as it is now. A context manager that closes itself."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        n: int,
        seed: int,
        progress: Callable[[int], None] = lambda done: None,
        places: Sequence[int] | None = None,
    ) -> list[list[Rollout]]:
        """Complete every prompt `n` times, independently.

        Args:
            prompts: token ids, of any lengths; the same one may come twice.
            n: completions of each prompt.
            seed: of this call's draws; the same seed, prompts and policy give the same rollouts, as far as the engine
                computes the same logits.
            progress: called with the number of completions that are done.
            places: a number for each prompt; its draws depend on `seed` and on this alone, whatever else is drawn with
                it. Processes that share prompts out give what one would. None: the prompts' indices.

        Returns:
            For each prompt, in their order, its `n` rollouts.

        Raises:
            UserError: a prompt is empty or leaves no room to answer.
            RolloutError: the engine failed for good.
            ValueError: n below 1.
        """

    def update(self) -> None:
        """The policy has changed: use its present weights from the next `generate` on."""
        return

    def close(self) -> None:
        """Give back what the engine holds. May be called more than once."""
        return

    def __enter__(self: E) -> E:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """What ends a completion: the tokenizer's end of text and those of the model's own settings for generation."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = given if isinstance(given, list) else [given]
    return tuple(sorted({tokenizer.eos_token_id, *(int(token) for token in own if token is not None)}))
