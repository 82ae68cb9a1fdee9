"""The preview of PPO and GRPO: what stands on the base, what scores completions, what an iteration does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lit_ft.adapter import Base
from lit_ft.batches import Example
from lit_ft.checkpoint import Resumed
from lit_ft.config import Rollout
from lit_ft.models.roles import POLICY, role_parameters
from lit_ft.previewing.iteration import Iteration
from lit_ft.previewing.offline import Preview
from lit_ft.previewing.page import Section, plain
from lit_ft.rewards.base import parse_rewards
from lit_ft.wiring.model import layout_words
from lit_ft.wiring.module import shared_arguments
from lit_ft.wiring.online import Roles, online_module
from lit_ft.wiring.place import pass_tokens


class OnlinePreview(Preview):
    """As `Preview`, with an `Iteration` for a step."""

    step: Iteration

    steps_title = "Iterations"

    @property
    def names_judges(self) -> bool:
        judged = parse_rewards("judge", self.cfg.judge) if self.cfg.judge is not None else []
        return any(spec.kind == "judge" for spec in [*parse_rewards("reward", self.cfg.reward), *judged])

    def put_roles(self, base: Base, resumed: Resumed | None) -> dict[str, str]:
        with torch.device("meta"), warnings.catch_warnings():
            # Judges' weights are read, which says whether they are whole, and not kept.
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
            self.roles = Roles(self.cfg, self.model, self.start, base, resumed.identity if resumed else None)
        return self.roles.identity

    def make_module(self, run: Path) -> Any:
        return online_module(
            self.cfg,
            self.model,
            self.roles,
            self.tokenizer,
            self.encoder,
            run=run,
            device=self.device,
            precision=self.precision,
            shared=shared_arguments(self.cfg, self.kind),
            vllm={"start": _not_started},
            layout=self.layout,
            max_tokens=pass_tokens(self.cfg, self.device),
            pad_id=self.tokenizer.pad_token_id,
        )

    def sections(self) -> list[Section]:
        found = super().sections()
        found.insert(2, Section("Roles, adapters on one base", plain(*self._role_lines())))
        return found

    def _role_lines(self) -> Iterator[str]:
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

    def example_words(self, shown: Sequence[Example]) -> tuple[str, str]:
        return ("prompt" if len(shown) == 1 else f"{len(shown)} prompts"), ""

    def row_words(self, example: Example) -> str:
        return f"{len(example.prompt)} tokens of prompt"

    def _step_lines(self) -> Iterator[str]:
        cfg: Any = self.cfg
        algorithm, rows = cfg.algorithm, len(self.data.examples)
        batch, most, mean = self.step.passes(self.device.type)
        prompts = min(cfg.data.batch_size, rows)
        minibatches = min(algorithm.num_mini_batches, prompts)
        yield f"iterations {self.steps_per_epoch:,} per epoch, {self.steps:,} in all"
        yield (
            f"each       {prompts} prompts × {algorithm.num_generations} = {prompts * algorithm.num_generations} "
            f"completions of up to {algorithm.max_new_tokens} tokens, at a temperature of {algorithm.temperature:g}"
        )
        if cfg.rollout.kind is Rollout.transformers:
            count, width = self.step.prompts_at_once(self.device.type)
            yield f"made by    the model itself, up to {count} at a time beside prompts of up to {width} tokens"
        else:
            yield "made by    a vLLM that is started for it, whose memory is not counted here"
        yield (
            f"updates    {algorithm.num_epochs} × {minibatches} of {-(-prompts // minibatches)} prompts, each in "
            f"{mean:.1f} passes (at most {most})"
        )
        tokens, targets = batch.input_ids.numel(), len(batch.target_ids)
        yield (
            f"each pass  {layout_words(self.layout, self.why_padded)}; the largest has {tokens:,} tokens, "
            f"{targets:,} of completions, if all are as long as they may be"
        )
        if algorithm.ptx_coef:
            yield f"ptx        {algorithm.ptx_batch_size} rows of {algorithm.ptx_path} beside each update"
        if self.processes > 1:
            yield f"devices    {self.processes}, which share the prompts of each iteration"

    def memory_notes(self) -> list[str]:
        cfg: Any = self.cfg
        if cfg.rollout.kind is Rollout.vllm:
            return ["vLLM takes its own beside it: the base's weights once more, and a cache."]
        return []

    def make_step(self) -> Iteration:
        module = self.module
        return Iteration(
            self.cfg,
            self.kind,
            self.model,
            self.data,
            self.val,
            **self.laid_out(),
            value_head=self.roles.value_head,
            ptx=module.ptx,
            ptx_batch_size=module.ptx_batch_size,
        )


class _NoEngine:
    """Stands where a vLLM would: nothing is asked of it."""

    def stop(self) -> None:
        return


def _not_started(*_: Any, **__: Any) -> Any:
    """What could be said of vLLM before it is started, is said."""
    from serve.engine import on_cpu, require_vllm

    require_vllm(on_cpu())
    return _NoEngine()
