"""The preview of SFT, DPO and judges: rows, steps and memory, and what training itself would refuse."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from lit_ft import adapter as folder
from lit_ft.adapter import Adapter, Base
from lit_ft.batches import Example
from lit_ft.checkpoint import Resumed, find_checkpoint
from lit_ft.config import Algorithm, Config, Replay, trains_on_votes
from lit_ft.data.chat import ChatEncoder, set_chat_template
from lit_ft.data.datamodule import Prepared
from lit_ft.data.packing import Layout
from lit_ft.distributed.processes import Ranks
from lit_ft.models.adapt import causal_lm, lora_rank, parameter_counts
from lit_ft.models.kinds import AdapterKind
from lit_ft.models.load import load_tokenizer
from lit_ft.models.precision import Precision, choose_precision
from lit_ft.previewing.memory import memory_sections
from lit_ft.previewing.page import Line, Piece, Section, plain
from lit_ft.previewing.settings import settings
from lit_ft.previewing.step import Step
from lit_ft.previewing.weightless import published_bytes, target_modules, weightless
from lit_ft.replay import stand_ins
from lit_ft.resources.machine import choose_threads
from lit_ft.resources.memory import resident_bytes, size_in_words
from lit_ft.wiring.identity import identity_of
from lit_ft.wiring.model import adapter_kind, base_of, choose_layout, layout_words
from lit_ft.wiring.module import make_module
from lit_ft.wiring.place import device_of
from lit_ft.wiring.reference import with_reference
from lit_ft.wiring.replay import replay
from lit_ft.wiring.rows import read_rows, votes_of
from lit_ft.wiring.start import starting_adapter
from lit_ft.wiring.trainer import make_callbacks, make_trainer

_ROWS = 3


class _NotNowError(Exception):
    """What training would compute now."""


class Preview:
    """Follows `lit_ft.train` up to where weights would be loaded, and puts a model without any in their place."""

    def __init__(self, cfg: Config, devices: int) -> None:
        self.cfg = cfg
        self.processes = devices * cfg.trainer.num_nodes
        self.device = device_of(cfg.trainer.accelerator)
        folder.check_name(cfg.name)
        self.kind: AdapterKind = adapter_kind(cfg)
        resumed = find_checkpoint(cfg.resume, Path(cfg.runs, cfg.name), cfg.algorithm.kind.value)
        self.start: Adapter | None = starting_adapter(cfg, self.kind, resumed)
        threads = choose_threads(cfg.trainer.threads, self.device, devices)
        torch.set_num_threads(threads.count)
        self.precision: Precision = choose_precision(cfg.trainer.precision, self.device)
        base = base_of(cfg, self._known_hash(resumed is not None))
        votes = votes_of(cfg, base, resumed) if trains_on_votes(cfg) else None
        before = resident_bytes()
        self.tokenizer = load_tokenizer(cfg.model.id)
        self.tokenizer_bytes = max(0, (resident_bytes() or 0) - (before or 0))
        set_chat_template(self.tokenizer, cfg.data.chat_template)
        self.data: Prepared
        self.val: Prepared | None
        encoder = ChatEncoder(self.tokenizer, cfg.data.train_on.value, cfg.data.as_chat)
        self.data, self.val = read_rows(cfg, encoder, votes)
        self.model = weightless(cfg, self.kind, self.start, self.precision)
        others = self.put_roles(base, resumed)
        self.layout: Layout
        self.layout, self.why_padded = choose_layout(cfg, self.model, self.device)
        if resumed is not None:
            known = identity_of(cfg, base, self.data, votes) | others
            # What the base answers is not known here.
            resumed.must_be({k: v for k, v in known.items() if k != "data" or cfg.replay.kind is not Replay.self})
        self.encoder = encoder
        self._replay(encoder)
        if cfg.algorithm.kind is Algorithm.dpo:
            self._check_reference(base)
        self.steps_per_epoch, self.steps = self._count_steps()
        self.kind.schedule(self.steps)
        self._check_trainer()
        self.step = self.make_step()

    def put_roles(self, base: Base, resumed: Resumed | None) -> dict[str, str]:
        """Put what stands beside the trained adapter on the model; returns what it adds to the run's identity."""
        return {}

    def _replay(self, encoder: ChatEncoder) -> None:
        """Put stand-ins for the base's own answers among the training rows, if they are asked for."""

        def answer(prompts: list[tuple[int, ...]], below: bool) -> list[Example]:
            return stand_ins(prompts, self.cfg.replay.max_new_tokens)

        own = replay(self.cfg, self.kind, encoder, self.data.examples, answer)
        self.data = own.among(self.data, self.cfg.replay.weight, self.cfg.seed)

    def _known_hash(self, resumed: bool) -> str | None:
        """What stands for the hash of the base's weights where nothing depends on it: that takes a look at them all."""
        needed = self.cfg.model.tiny or resumed or trains_on_votes(self.cfg) or self.names_judges
        return None if needed else "sha256:not needed"

    @property
    def names_judges(self) -> bool:
        """Whether published judges are used, which must be of this base."""
        return False

    def _check_reference(self, base: Any) -> None:
        """Let training's own code object to the reference; what it would compute is not computed."""

        def make(*args: Any, **kwargs: Any) -> Any:
            raise _NotNowError

        with contextlib.suppress(_NotNowError):
            with_reference(self.cfg, self.kind, make, self.data, None, self.start, base, self.precision)

    def _check_trainer(self) -> None:
        """Let training's own code object to the settings of the optimizer, the callbacks and the trainer."""
        cfg = OmegaConf.merge(self.cfg, {"logger": None, "trainer": {"progress": False}})
        with tempfile.TemporaryDirectory(prefix="lit_ft-preview-") as nowhere:
            self.module = self.make_module(Path(nowhere))
            module = self.module
            last = Path(nowhere, "checkpoints", "last.ckpt")
            callbacks = make_callbacks(cfg, module, self.kind, last, validates=self.val is not None)  # type: ignore[arg-type]
            if self.processes == 1:
                make_trainer(cfg, self.precision, callbacks.every, Path(nowhere), 1, Ranks(0, 1, 0, 1))  # type: ignore[arg-type]

    def make_module(self, run: Path) -> Any:
        """The LightningModule that would be trained, as training makes it; `run` is a folder that will be gone."""
        return make_module(self.cfg, self.model, self.kind, None)

    def make_step(self) -> Step:
        """What is rehearsed."""
        return Step(self.cfg, self.kind, self.model, self.data, self.val, **self.laid_out())

    def laid_out(self) -> dict[str, Any]:
        """How rows are laid out and shared, and their tokenizer's size, as arguments of a `Step`."""
        return {
            "layout": self.layout,
            "pad_id": self.tokenizer.pad_token_id,
            "processes": self.processes,
            "tokenizer_bytes": self.tokenizer_bytes,
        }

    def _count_steps(self) -> tuple[int, int]:
        trainer, rows = self.cfg.trainer, len(self.data.examples)
        each = -(-rows // self.cfg.data.batch_size)
        extra = trainer.extra or {}
        if (limit := extra.get("limit_train_batches")) is not None:
            each = min(each, limit) if isinstance(limit, int) else int(each * limit)
        return each, trainer.max_steps if trainer.max_steps >= 0 else each * trainer.max_epochs

    def sections(self) -> list[Section]:
        """All that is shown, in its order."""
        return [
            Section("Settings (changed from the defaults: those with a default beside them)", settings(self.cfg)),
            Section("Model and adapter", plain(*self._model_lines())),
            Section("Rows", plain(*self._row_lines())),
            self._example_section(),
            Section(self.steps_title, plain(*self._step_lines())),
            *memory_sections(self.step, self.device, self.precision, self.memory_notes()),
        ]

    steps_title = "Steps"

    def memory_notes(self) -> list[str]:
        """What else there is to say of the run's memory."""
        return []

    def _model_lines(self) -> Iterator[str]:
        cfg = self.cfg
        trained, total = parameter_counts(self.model)
        rank = lora_rank(self.model)
        yield f"model      {cfg.model.id}: {type(causal_lm(self.model)).__name__}, {total:,} parameters"
        start = f"adapter {self.start.ref} ({self.start.card.algorithm})" if self.start else "the base model"
        yield f"start      {start}"
        yield f"adapter    {cfg.peft.kind.value}{f', r={rank}' if rank else ''}"
        yield f"trained    {trained:,} of {total:,} parameters ({trained / total:.2%})"
        matched = target_modules(self.model)
        if matched:
            names = ", ".join(f"{name} {count}" for name, count in sorted(matched.items()))
            yield f"targets    {sum(matched.values())} modules: {names}"
        else:
            yield "targets    every weight"
        size, what = published_bytes(self.model, self.cfg)
        yield f"publishes  {size_in_words(size)} of {what}"
        yield f"arithmetic {self.precision.trainer} ({self.precision.why})"

    def _row_lines(self) -> Iterator[str]:
        yield f"training   {self.cfg.data.path}: {self.data.summary()}"
        yield f"held out   {self.val.summary() if self.val else 'nothing'}"

    def _example_section(self) -> Section:
        shown = self.data.examples[:_ROWS]
        lines: list[Line] = []
        for number, example in enumerate(shown, 1):
            faint = f"row {number}: {self.row_words(example)}"
            lines += [[Piece(faint, "faint")], [*decoded(self.tokenizer, example)], []]
        few, more = self.example_words(shown)
        return Section(f"The first {few} as the model sees them{more}", lines[:-1])

    def example_words(self, shown: Sequence[Example]) -> tuple[str, str]:
        """What the first rows are, and what there is to say of how they are shown."""
        most = max(len(example.completions) for example in shown)
        order = "" if most < 2 else ", chosen then rejected" if most == 2 else ", the best completion first"
        return ("row" if len(shown) == 1 else f"{len(shown)} rows"), f", the trained part marked{order}"

    def row_words(self, example: Example) -> str:
        """The size of a row."""
        return f"{len(example.prompt)} tokens of prompt, {example.targets} trained on"

    def _step_lines(self) -> Iterator[str]:
        cfg, data = self.cfg, self.data
        batch, most, mean = self.step.passes(self.device.type)
        per_step = sum(e.tokens for e in data.examples) / max(1, -(-len(data.examples) // cfg.data.batch_size))
        trained = data.targets / max(1, -(-len(data.examples) // cfg.data.batch_size))
        yield f"steps      {self.steps_per_epoch:,} per epoch, {self.steps:,} in all"
        yield (
            f"each step  {min(cfg.data.batch_size, len(data.examples))} rows, {per_step:,.0f} tokens on average, "
            f"{trained:,.0f} of them trained on, in {mean:.1f} passes (at most {most})"
        )
        tokens, targets = batch.input_ids.numel(), len(batch.target_ids)
        judged = self.cfg.algorithm.kind is Algorithm.reward
        seen = f"{batch.num_completions:,} completions to score" if judged else f"{targets:,} of them predicted"
        yield f"each pass  {layout_words(self.layout, self.why_padded)}; the largest has {tokens:,} tokens, {seen}"
        if self.processes > 1:
            yield f"devices    {self.processes}, which share the rows of each step"


def decoded(tokenizer: Any, example: Example) -> list[Piece]:
    """An example as text, its prompt and then its completions; what is trained on is a piece of its own."""
    pieces = [Piece(tokenizer.decode(example.prompt))]
    for completion in example.completions:
        for trained, group in groupby(zip(completion.ids, completion.mask, strict=True), key=lambda pair: pair[1]):
            text = tokenizer.decode([token for token, _ in group])
            pieces.append(Piece(text, "trained" if trained else ""))
    return pieces
