"""An iteration of PPO or GRPO: its completions, the passes of its updates, and what they hold in memory."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_ft.batches import Batch, Completion, Example
from lit_ft.config import Algorithm, Rollout
from lit_ft.data.loader import PromptLoader
from lit_ft.data.packing import divided, lay_out, share_by_tokens, split_by_tokens
from lit_ft.models.judge import head_values
from lit_ft.models.roles import POLICY
from lit_ft.models.score import score_gathered
from lit_ft.previewing.step import Step
from lit_ft.resources.estimate import LOGPROBS, Rehearsal, Setting, with_completions
from lit_ft.wiring.online import rollout_tokens

# Iterations whose batches are laid out in search of the largest: those with the most tokens.
_LAID_OUT = 20


@dataclass(eq=False, kw_only=True)
class Iteration(Step):
    """The completions do not exist yet: each is taken to be as long as `algorithm.max_new_tokens` lets it be.

    Attributes:
        value_head: of PPO's value model, or None.
        ptx: the rows whose loss is added, `ptx_batch_size` at a time.
    """

    value_head: nn.Linear | None
    ptx: Sequence[Example]
    ptx_batch_size: int

    def passes(self, device: str, *, later: bool = False) -> tuple[Batch, int, float]:
        cfg: Any = self.cfg
        algorithm, budget = cfg.algorithm, self.budget(device)
        layout = self.layout_on(device)
        loader = PromptLoader(
            self.data.examples,
            batch_size=cfg.data.batch_size,
            max_tokens=budget,
            shuffle=cfg.data.shuffle,
            seed=cfg.seed,
        )
        windows = [[self._completed(self.data.examples[k]) for k in window] for window in loader.windows(0)]
        windows.sort(key=lambda window: -sum(example.tokens for example in window))
        groups: list[list[Example]] = []
        counts = []
        for number, window in enumerate(windows[:_LAID_OUT]):
            order = list(range(len(window)))
            random.Random(number).shuffle(order)
            wanted = min(algorithm.num_mini_batches, len(window))
            for minibatch in range(wanted):
                parts, _ = divided([window[k] for k in order[minibatch::wanted]], budget, layout)
                split = [split_by_tokens(share, budget, layout) for share in share_by_tokens(parts, self.processes)]
                counts.append(max(map(len, split)))
                groups += [group for share in split for group in share]
        likely = sorted(groups, key=lambda group: -sum(example.tokens for example in group))[:3]
        batches = [lay_out(group, layout, self.pad_id) for group in likely]
        return max(batches, key=lambda batch: batch.input_ids.numel()), max(counts), sum(counts) / len(counts)

    def _completed(self, example: Example) -> Example:
        algorithm: Any = self.cfg.algorithm
        ids = (self.pad_id,) * algorithm.max_new_tokens
        return replace(example, completions=(Completion(ids, (True,) * len(ids)),) * algorithm.num_generations)

    def prompts_at_once(self, device: str) -> tuple[int, int]:
        """Rows of the largest batch that completions are made in, and the tokens of its prompts."""
        algorithm: Any = self.cfg.algorithm
        width = max(len(example.prompt) for example in self.data.examples)
        prompts = -(-min(self.cfg.data.batch_size, len(self.data.examples)) // self.processes)
        most = max(1, rollout_tokens(self.cfg, device) // (width + algorithm.max_new_tokens))
        return min(most, prompts * algorithm.num_generations), width

    def computed(self) -> dict[str, Any]:
        algorithm: Any = self.cfg.algorithm

        def logprobs(model: Any, batch: Batch) -> Tensor:
            return score_gathered(model, batch, algorithm.temperature).logprobs

        if algorithm.kind is Algorithm.grpo:
            return {"passes": {POLICY: logprobs}}
        heads = torch.nn.ModuleList([self.value_head])

        def values(model: Any, batch: Batch) -> Tensor:
            places = torch.cat([batch.target_sources, batch.completion_ends])
            return head_values(model, heads[0], batch, places)  # type: ignore[arg-type]

        return {"passes": {POLICY: logprobs, "value": values}, "heads": heads}

    def rehearsal(self, setting: Setting) -> Rehearsal:
        cfg: Any = self.cfg
        batch, most, _ = self.passes(setting.device)
        found = self.rehearsed(batch, setting, most > 1)
        if rows := self._ptx_batch(setting.device):
            beside = self.rehearsed(rows, setting, True, passes=LOGPROBS)
            found = replace(found, moments=found.moments | {f"{k}, ptx": v for k, v in beside.moments.items()})
        if cfg.rollout.kind is not Rollout.transformers:
            return found
        count, width = self.prompts_at_once(setting.device)
        return with_completions(
            found,
            self.model,
            rows=count,
            width=width,
            more=cfg.algorithm.max_new_tokens,
            temperature=cfg.algorithm.temperature,
            four_bits=self.kind.quantized,
        )

    def _ptx_batch(self, device: str) -> Batch | None:
        """The largest one of rows whose loss is added."""
        if not self.ptx:
            return None
        layout = self.layout_on(device)
        longest = sorted(self.ptx, key=lambda e: -e.tokens)[: self.ptx_batch_size]
        numbered = [replace(example, index=k) for k, example in enumerate(longest)]
        groups = split_by_tokens(numbered, self.budget(device), layout)
        largest = max(groups, key=lambda group: sum(example.tokens for example in group))
        return lay_out(largest, layout, self.pad_id)
