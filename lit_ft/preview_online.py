"""The preview of PPO and GRPO: what stands on the base, what scores completions, what an iteration makes and holds."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_ft.config import Algorithm, Rollout
from lit_ft.preview import Preview, decoded
from lit_ft.preview_page import Line, Piece, Section, plain

if TYPE_CHECKING:
    from torch import Tensor

    from lit_ft.adapter import Base
    from lit_ft.batches import Batch, Example
    from lit_ft.checkpoint import Resumed
    from lit_ft.estimate import Estimate, Rehearsal, Setting

_ROWS = 3
# Iterations whose batches are laid out in search of the largest: those with the most tokens.
_LAID_OUT = 20


class OnlinePreview(Preview):
    """The completions do not exist yet: each is taken to be as long as `algorithm.max_new_tokens` lets it be."""

    steps_title = "Iterations"

    @property
    def names_judges(self) -> bool:
        from lit_ft.rewards.base import parse_rewards

        judged = parse_rewards("judge", self.cfg.judge) if self.cfg.judge is not None else []
        return any(spec.kind == "judge" for spec in [*parse_rewards("reward", self.cfg.reward), *judged])

    def put_roles(self, base: Base, resumed: Resumed | None) -> dict[str, str]:
        import torch

        from lit_ft.rlhf import Roles

        with torch.device("meta"), warnings.catch_warnings():
            # Judges' weights are read, which says whether they are whole, and not kept.
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
            self.roles = Roles(self.cfg, self.model, self.start, base, resumed.identity if resumed else None)
        return self.roles.identity

    def make_module(self, run: Path) -> Any:
        from lit_ft.rlhf import online_module
        from lit_ft.train import _shared

        return online_module(
            self.cfg,
            self.model,
            self.roles,
            self.tokenizer,
            self.encoder,
            run=run,
            device=self.device,
            precision=self.precision,
            shared=_shared(self.cfg, self.kind),
            vllm={"start": _not_started},
            layout=self.layout,
            max_tokens=self.budget(self.device.type),
            pad_id=self.tokenizer.pad_token_id,
        )

    # What is shown.

    def sections(self) -> list[Section]:
        found = super().sections()
        found.insert(2, Section("Roles, adapters on one base", plain(*self._role_lines())))
        return found

    def _role_lines(self) -> Iterator[str]:
        from lit_ft.models.roles import POLICY, role_parameters

        def size(role: str) -> str:
            return f"{sum(p.numel() for p in role_parameters(self.model, role)):,}"

        cfg, roles = self.cfg, self.roles
        yield f"policy     {size(POLICY)} parameters, trained"
        if roles.value_head is not None:
            head = sum(p.numel() for p in roles.value_head.parameters())
            begins = cfg.algorithm.value_from.value  # type: ignore[attr-defined]
            words = "from zero" if begins == "zero" else "as the first judge of reward="
            yield f"value      {size('value')} and a head of {head:,}, trained; begins {words}"
        if roles.reference is not None and self.start is not None:
            yield f"reference  {size('reference')}, frozen: {self.start.ref} as it is now"
        else:
            yield "reference  the base, with no adapter"
        for name, (role, _, _) in roles.judges.items():
            yield f"judge      {size(role)}, frozen: {roles.found[name].ref}"
        yield f"reward     {roles.identity['reward']}"
        yield f"held out   {roles.identity['judge'] or 'scored by the same'}{' beside it' if cfg.judge else ''}"

    def _example_section(self) -> Section:
        shown = self.data.examples[:_ROWS]
        lines: list[Line] = []
        for number, example in enumerate(shown, 1):
            faint = f"row {number}: {len(example.prompt)} tokens of prompt"
            lines += [[Piece(faint, "faint")], [*decoded(self.tokenizer, example)], []]
        few = "prompt" if len(shown) == 1 else f"{len(shown)} prompts"
        return Section(f"The first {few} as the model sees them", lines[:-1])

    def _step_lines(self) -> Iterator[str]:
        cfg: Any = self.cfg
        algorithm, rows = cfg.algorithm, len(self.data.examples)
        batch, most, mean = self.passes(self.device.type)
        prompts = min(cfg.data.batch_size, rows)
        minibatches = min(algorithm.num_mini_batches, prompts)
        layout = "packed" if self.layout != "padded" else f"padded ({self.why_padded})"
        yield f"iterations {self.steps_per_epoch:,} per epoch, {self.steps:,} in all"
        yield (
            f"each       {prompts} prompts × {algorithm.num_generations} = {prompts * algorithm.num_generations} "
            f"completions of up to {algorithm.max_new_tokens} tokens, at a temperature of {algorithm.temperature:g}"
        )
        if cfg.rollout.kind is Rollout.transformers:
            count, width = self._prompts_at_once(self.device.type)
            yield f"made by    the model itself, up to {count} at a time beside prompts of up to {width} tokens"
        else:
            yield "made by    a vLLM that is started for it, whose memory is not counted here"
        yield (
            f"updates    {algorithm.num_epochs} × {minibatches} of {-(-prompts // minibatches)} prompts, each in "
            f"{mean:.1f} passes (at most {most})"
        )
        tokens, targets = batch.input_ids.numel(), len(batch.target_ids)
        yield (
            f"each pass  {layout}; the largest has {tokens:,} tokens, {targets:,} of completions, if all are as "
            "long as they may be"
        )
        if algorithm.ptx_coef:
            yield f"ptx        {algorithm.ptx_batch_size} rows of {algorithm.ptx_path} beside each update"
        if self.processes > 1:
            yield f"devices    {self.processes}, which share the prompts of each iteration"

    def _own_memory(self, own: Estimate) -> list[Line]:
        lines = super()._own_memory(own)
        if self.cfg.rollout is not None and self.cfg.rollout.kind is Rollout.vllm:
            lines += plain("vLLM takes its own beside it: the base's weights once more, and a cache.")
        return lines

    # What an iteration holds.

    def passes(self, device: str, *, later: bool = False) -> tuple[Batch, int, float]:
        from lit_ft.data.loader import PromptLoader
        from lit_ft.data.packing import divided, lay_out, share_by_tokens, split_by_tokens

        cfg: Any = self.cfg
        algorithm, budget = cfg.algorithm, self.budget(device)
        layout = self.layout if self.layout == "padded" else "apart" if device == "cuda" else "packed"
        loader = PromptLoader(
            self.data.examples,
            batch_size=cfg.data.batch_size,
            max_tokens=budget,
            shuffle=cfg.data.shuffle,
            seed=cfg.seed,
        )
        windows = [[self._completed(self.data.examples[k]) for k in window] for window in loader._windows(0)]
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
        batches = [lay_out(group, layout, self.tokenizer.pad_token_id) for group in likely]
        return max(batches, key=lambda batch: batch.input_ids.numel()), max(counts), sum(counts) / len(counts)

    def _completed(self, example: Example) -> Example:
        from lit_ft.batches import Completion

        algorithm: Any = self.cfg.algorithm
        ids = (self.tokenizer.pad_token_id,) * algorithm.max_new_tokens
        return replace(example, completions=(Completion(ids, (True,) * len(ids)),) * algorithm.num_generations)

    def _prompts_at_once(self, device: str) -> tuple[int, int]:
        """Rows of the largest batch that completions are made in, and the tokens of its prompts."""
        from lit_ft.rlhf import rollout_tokens

        algorithm: Any = self.cfg.algorithm
        width = max(len(example.prompt) for example in self.data.examples)
        prompts = -(-min(self.cfg.data.batch_size, len(self.data.examples)) // self.processes)
        most = max(1, rollout_tokens(self.cfg, device) // (width + algorithm.max_new_tokens))
        return min(most, prompts * algorithm.num_generations), width

    def computed(self) -> dict[str, Any]:
        import torch

        from lit_ft.models.judge import head_values
        from lit_ft.models.roles import POLICY
        from lit_ft.models.score import score_gathered

        algorithm: Any = self.cfg.algorithm

        def logprobs(model: Any, batch: Batch) -> Tensor:
            return score_gathered(model, batch, algorithm.temperature).logprobs

        if algorithm.kind is Algorithm.grpo:
            return {"passes": {POLICY: logprobs}}
        heads = torch.nn.ModuleList([self.module.value_head])

        def values(model: Any, batch: Batch) -> Tensor:
            places = torch.cat([batch.target_sources, batch.completion_ends])
            return head_values(model, heads[0], batch, places)  # type: ignore[arg-type]

        return {"passes": {POLICY: logprobs, "value": values}, "heads": heads}

    def rehearsal(self, setting: Setting) -> Rehearsal:
        from lit_ft.estimate import LOGPROBS, with_completions

        cfg: Any = self.cfg
        batch, most, _ = self.passes(setting.device)
        found = self.rehearsed(batch, setting, most > 1)
        if rows := self._ptx_batch(setting.device):
            beside = self.rehearsed(rows, setting, True, passes=LOGPROBS)
            found = replace(found, moments=found.moments | {f"{k}, ptx": v for k, v in beside.moments.items()})
        if cfg.rollout.kind is not Rollout.transformers:
            return found
        count, width = self._prompts_at_once(setting.device)
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
        from lit_ft.data.packing import lay_out, split_by_tokens

        if not self.module.ptx:
            return None
        layout = self.layout if self.layout == "padded" else "apart" if device == "cuda" else "packed"
        longest = sorted(self.module.ptx, key=lambda e: -e.tokens)[: self.module.ptx_batch_size]
        numbered = [replace(example, index=k) for k, example in enumerate(longest)]
        groups = split_by_tokens(numbered, self.budget(device), layout)
        largest = max(groups, key=lambda group: sum(example.tokens for example in group))
        return lay_out(largest, layout, self.tokenizer.pad_token_id)


class _NoEngine:
    """Stands where a vLLM would: nothing is asked of it."""

    def stop(self) -> None:
        return


def _not_started(*_: Any, **__: Any) -> Any:
    """What could be said of vLLM before it is started, is said."""
    from serve.engine import _require_vllm, on_cpu

    _require_vllm(on_cpu())
    return _NoEngine()
