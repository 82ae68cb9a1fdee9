"""Rollouts by the model in training itself, with transformers' `generate`: nothing to start, nothing to copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_ft.errors import UserError
from lit_ft.models.adapt import causal_lm
from lit_ft.models.attention import PACKED
from lit_ft.models.load import context_length
from lit_ft.models.shard import is_sharded
from lit_ft.rollouts.base import Rollout, RolloutEngine, Sampling, as_rollout, check_prompts, seed_of


class TransformersRollouts(RolloutEngine):
    """The policy is the model with its active adapter, so there is nothing to update.

    Prompts of like length are padded on the left to one width. After each `generate` the model is as it was: its
    modules' training modes, its attention, its generation settings; and the global random state was neither read nor
    moved: each completion is drawn with a generator of its own, so that the same ones come whatever shares a batch.
    """

    def __init__(
        self, model: Any, sampling: Sampling, pad_id: int, max_tokens: int, *, autocast: torch.dtype | None = None
    ) -> None:
        """Nothing is computed yet.

        Args:
            model: a causal language model, with PEFT adapters or without, in training.
            sampling: how completions are drawn.
            pad_id: any token of the vocabulary, also one that ends a text.
            max_tokens: at most this many tokens of key-value cache at once: rows · (width + max_new_tokens); a single
                row above it is completed alone.
            autocast: dtype of mixed precision, or None.

        Raises:
            UserError: the model is sharded over processes.
        """
        if is_sharded(model):
            raise UserError(
                "rollout=transformers generates with weights that are whole on each device, and this model is sharded "
                "over several. Use a strategy that does not shard, strategy=ddp."
            )
        self._model, self._sampling, self._pad_id = model, sampling, pad_id
        self._max_tokens, self._autocast = max_tokens, autocast

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        n: int,
        seed: int,
        progress: Callable[[int], None] = lambda done: None,
        places: Sequence[int] | None = None,
    ) -> list[list[Rollout]]:
        """Complete every prompt `n` times; see `RolloutEngine.generate`."""
        lm = causal_lm(self._model)
        check_prompts(prompts, n, self._sampling, context_length(lm))
        device = lm.get_input_embeddings().weight.device
        found: list[list[Rollout]] = [[] for _ in prompts]
        done = 0
        seeds = [seed_of(seed, place) for place in (range(len(prompts)) if places is None else places)]
        with generating(self._model, self._settings()):
            for rows in self._batches(prompts, n):
                drawn = [seeds[index] + k for index, k in rows]
                generated = self._complete(lm, [prompts[index] for index, _ in rows], drawn, device)
                for (index, _), tokens in zip(rows, generated.tolist(), strict=True):
                    found[index].append(as_rollout(prompts[index], tokens, self._sampling))
                done += len(rows)
                progress(done)
        return found

    def _batches(self, prompts: Sequence[tuple[int, ...]], n: int) -> Iterator[list[tuple[int, int]]]:
        """(index of a prompt, number of its completion); longest first, so that too little memory shows at once."""
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        rows = [(index, k) for index in order for k in range(n)]
        while rows:
            width = len(prompts[rows[0][0]]) + self._sampling.max_new_tokens
            most = max(1, self._max_tokens // width)
            yield rows[:most]
            rows = rows[most:]

    def _complete(self, lm: Any, prompts: list[tuple[int, ...]], seeds: list[int], device: torch.device) -> Tensor:
        """`(B, ≤ max_new_tokens)`: what follows each prompt; after its first stop token a row holds anything."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)  # (B, T)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        mixed = torch.autocast(device.type, self._autocast) if self._autocast is not None else contextlib.nullcontext()
        with torch.no_grad(), mixed:
            whole: Tensor = lm.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=lm.generation_config,
                logits_processor=self._processors(seeds, device),
            )
        return whole[:, width:]

    def _processors(self, seeds: list[int], device: torch.device) -> list[Any]:
        """What chooses the tokens; without any it is the likeliest one each time."""
        return [Drawn(seeds, self._sampling, device)]

    def _settings(self) -> Any:
        """Nothing that changes the logits; `Drawn` has drawn already, and the greedy choice is what it drew."""
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=False,
            max_new_tokens=self._sampling.max_new_tokens,
            eos_token_id=list(self._sampling.stop_ids) or None,
            pad_token_id=self._pad_id,
            use_cache=True,
        )


class Drawn:
    """A logits processor that leaves the drawn tokens only: of each row by the inverse of its distribution function.

    Each row has uniform numbers of its own, made beforehand from its own seed, where transformers' sampling draws a
    whole batch from one generator. In float64: cumulated in float32, rare tokens of a large vocabulary get nothing.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self._temperature = sampling.temperature
        rows = [
            torch.rand(sampling.max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        self._numbers = torch.stack(rows, dim=1).to(device)  # (max_new_tokens, B)
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        below = (scores.double() / self._temperature).softmax(-1).cumsum(-1)  # (B, V)
        wanted = self._numbers[self._step, :, None] * below[:, -1:]
        self._step += 1
        drawn = torch.searchsorted(below, wanted, right=True).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


@contextlib.contextmanager
def generating(model: Any, settings: Any) -> Iterator[None]:
    """`model` in eval mode, able to generate by `settings` alone; all of it put back at the end.

    transformers fills what a call's settings leave open from the model's own (a repetition penalty, tokens to
    suppress), so these are replaced and not merely overridden.
    """
    lm = causal_lm(model)
    modes = [(module, module.training) for module in model.modules()]
    attention, own = lm.config._attn_implementation, lm.generation_config
    try:
        if attention == PACKED:  # it has neither a cache nor a mask for padding
            lm.set_attn_implementation("sdpa" if getattr(lm, "_supports_sdpa", False) else "eager")
        lm.generation_config = settings
        model.eval()
        yield
    finally:
        for module, training in modes:  # one by one: a part may be in eval mode for good
            module.training = training
        lm.generation_config = own
        if attention == PACKED:
            lm.set_attn_implementation(PACKED)
