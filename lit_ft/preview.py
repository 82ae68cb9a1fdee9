"""`python -m lit_ft.preview +experiment=sft …`: what a run would do, before any weights are loaded.

It takes every argument of `python -m lit_ft`, and `html=FILE` for the same as a page. Mistakes are refused as training
would refuse them. Nothing is trained, published or kept, and no processes are started.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lit_ft.config import Algorithm, Config, Replay, Strategy, register_schemas, trains_on_votes
from lit_ft.errors import UserError
from lit_ft.preview_page import Line, Piece, Section, as_html, as_text, columns, plain

if TYPE_CHECKING:
    import torch

    from lit_ft.adapter import Adapter, Base
    from lit_ft.batches import Batch, Example
    from lit_ft.checkpoint import Resumed
    from lit_ft.data.chat import ChatEncoder
    from lit_ft.data.datamodule import Prepared
    from lit_ft.data.packing import Layout
    from lit_ft.estimate import Estimate, Rehearsal, Setting
    from lit_ft.models.kinds import AdapterKind
    from lit_ft.models.precision import Precision
    from lit_ft.replay import Replayed

_ROWS = 3
# Sizes in which GPUs are sold, in GiB.
_GPUS = (8, 16, 24, 48, 80)
_PART_NAMES = {
    "weights": "weights",
    "adapters": "adapters",
    "copies": "copies of weights in another format",
    "gathered": "weights gathered from other devices",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "allocator of ranks": "AdaLoRA's averages",
    "activations": "activations",
    "holes": "holes between them that the allocator leaves",
    "log-probabilities": "log-probabilities, in chunks",
    "backward pass": "what an operation makes and gives back",
    "keys and values": "keys and values of completions",
    "reference": "reference",
    "rows": "rows, tokenized",
    "tokenizer": "tokenizer",
}


@dataclass
class PreviewConfig(Config):
    """The settings of a training run, and where to write its preview."""

    html: str | None = None
    """A file that the preview is written to as well, as a page."""


def main() -> NoReturn:
    """Preview: `python -m lit_ft.preview +experiment=sft`."""
    from lit_ft.cli import launch

    register_schemas()
    with tempfile.TemporaryDirectory(prefix="lit_ft-preview-") as nowhere:
        # The run's folder, which Hydra makes before anything else, goes when this ends.
        arguments = sys.argv
        sys.argv = [
            *arguments,
            f"hydra.run.dir='{nowhere}'",
            f"hydra.sweep.dir='{nowhere}'",
            "hydra.output_subdir=null",
        ]
        try:
            launch(_show, "config", PreviewConfig)
        finally:
            sys.argv = arguments


def register_preview() -> None:
    """Tell Hydra of `html` beside a run's settings, as `main` does."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="config_schema", node=PreviewConfig)


def _show(cfg: PreviewConfig) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if HydraConfig.get().mode is RunMode.MULTIRUN:
        raise UserError("A preview is of one run: leave out -m, and give every setting one value.")
    target = None if cfg.html is None else _page(cfg.html)
    sections = preview(cfg)
    sys.stdout.write(as_text(sections, colours=_colours()))
    if target is not None:
        _write(target, as_html(f"Preview of {cfg.name}", sections))


def _colours() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _page(given: str) -> Path:
    target = Path(given).expanduser()
    if target.is_dir():
        raise UserError(f"html={given} is a folder: name a file in it, such as html={target / 'preview.html'}.")
    if not target.parent.is_dir():
        raise UserError(f"html={given}: there is no folder {target.parent}. Make it, or name another.")
    return target


def _write(target: Path, page: str) -> None:
    beside = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        beside.write_text(page, encoding="utf-8")
        beside.replace(target)
    except OSError as error:
        raise UserError(f"html={target} cannot be written: {error.strerror or error}.") from error
    finally:
        beside.unlink(missing_ok=True)


def preview(cfg: Config) -> list[Section]:
    """All that is shown.

    Raises:
        UserError: what training would refuse, in the same words.
    """
    from lit_ft.announce import quiet
    from lit_ft.checks import check_settings

    quiet()
    devices = check_settings(cfg)
    import torch

    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    try:
        return preview_of(cfg, devices).sections()
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def preview_of(cfg: Config, devices: int) -> Preview:
    """The preview of a run on so many devices."""
    from lit_ft.checks import ONLINE
    from lit_ft.preview_online import OnlinePreview

    return (OnlinePreview if cfg.algorithm.kind in ONLINE else Preview)(cfg, devices)


class _NotNowError(Exception):
    """What training would compute now."""


class Preview:
    """Follows `lit_ft.train` up to where weights would be loaded, and puts a model without any in their place."""

    def __init__(self, cfg: Config, devices: int) -> None:
        import torch

        from lit_ft import adapter as folder
        from lit_ft import train
        from lit_ft.checkpoint import find_checkpoint
        from lit_ft.data.chat import ChatEncoder, set_chat_template
        from lit_ft.machine import choose_threads
        from lit_ft.models.load import load_tokenizer
        from lit_ft.models.precision import choose_precision

        self.cfg = cfg
        self.processes = devices * cfg.trainer.num_nodes
        self.device = train._device(cfg.trainer.accelerator)
        folder.check_name(cfg.name)
        self.kind: AdapterKind = train._kind(cfg)
        resumed = find_checkpoint(cfg.resume, Path(cfg.runs, cfg.name), cfg.algorithm.kind.value)
        self.start: Adapter | None = train._start(cfg, self.kind, Path(cfg.adapters), resumed)
        threads = choose_threads(cfg.trainer.threads, self.device, devices)
        torch.set_num_threads(threads.count)
        self.precision: Precision = choose_precision(cfg.trainer.precision, self.device)
        base = folder.Base(train._base_id(cfg.model.id), self._base_hash(resumed is not None))
        votes = train._votes(cfg, base, resumed) if trains_on_votes(cfg) else None
        before = resident_bytes()
        self.tokenizer = load_tokenizer(cfg.model.id)
        self.tokenizer_bytes = max(0, (resident_bytes() or 0) - (before or 0))
        set_chat_template(self.tokenizer, cfg.data.chat_template)
        self.data: Prepared
        self.val: Prepared | None
        encoder = ChatEncoder(self.tokenizer, cfg.data.train_on.value, cfg.data.as_chat)
        self.data, self.val = train._examples(cfg, encoder, votes)
        self.model = weightless(cfg, self.kind, self.start, self.precision)
        others = self.put_roles(base, resumed)
        self.layout: Layout
        self.layout, self.why_padded = train._layout(cfg, self.model, self.device)
        if resumed is not None:
            known = train._identity(cfg, base, self.data, votes) | others
            # What the base answers is not known here.
            resumed.must_be({k: v for k, v in known.items() if k != "data" or cfg.replay.kind is not Replay.self})
        self.encoder = encoder
        self.own = self._replayed(encoder)
        if cfg.algorithm.kind is Algorithm.dpo:
            self._check_reference(base)
        self.steps_per_epoch, self.steps = self._count_steps()
        self.kind.schedule(self.steps)
        self._check_trainer()

    def put_roles(self, base: Base, resumed: Resumed | None) -> dict[str, str]:
        """Put what stands beside the trained adapter on the model; returns what it adds to the run's identity."""
        return {}

    def _replayed(self, encoder: ChatEncoder) -> Replayed:
        """Stand-ins for the base's own answers, which are among the training rows from here on."""
        from lit_ft.data.datamodule import mixed
        from lit_ft.replay import replayed, stand_ins

        def answer(prompts: list[tuple[int, ...]], below: bool) -> list[Example]:
            return stand_ins(prompts, self.cfg.replay.max_new_tokens)

        own = replayed(self.cfg, self.kind, encoder, self.data.examples, answer)
        if own.mixed is not None:
            self.data = mixed(self.data, [(own.mixed, self.cfg.replay.weight)], self.cfg.seed)
        return own

    def _base_hash(self, resumed: bool) -> str:
        """Of the base's weights, where something depends on it: it takes a look at all of them."""
        from lit_ft.models.resolve import model_fingerprint

        if self.cfg.model.tiny:
            return "sha256:tiny"
        needed = resumed or trains_on_votes(self.cfg) or self.names_judges
        return model_fingerprint(self.cfg.model.id) if needed else "sha256:not needed"

    @property
    def names_judges(self) -> bool:
        """Whether published judges are used, which must be of this base."""
        return False

    def _check_reference(self, base: Any) -> None:
        """Let training's own code object to the reference; what it would compute is not computed."""
        from lit_ft import train

        def make(*args: Any, **kwargs: Any) -> Any:
            raise _NotNowError

        with contextlib.suppress(_NotNowError):
            train._with_reference(self.cfg, self.kind, make, self.data, None, self.start, base, self.precision)

    def _check_trainer(self) -> None:
        """Let training's own code object to the settings of the optimizer, the callbacks and the trainer."""
        from omegaconf import OmegaConf

        from lit_ft.distributed import Ranks
        from lit_ft.trainer import make_callbacks, make_trainer

        cfg = OmegaConf.merge(self.cfg, {"logger": None, "trainer": {"progress": False}})
        with tempfile.TemporaryDirectory(prefix="lit_ft-preview-") as nowhere:
            self.module = self.make_module(Path(nowhere))
            module = self.module
            last = Path(nowhere, "checkpoints", "last.ckpt")
            *_, callbacks = make_callbacks(cfg, module, self.kind, last, validates=self.val is not None)  # type: ignore[arg-type]
            if self.processes == 1:
                make_trainer(cfg, self.precision, callbacks, Path(nowhere), 1, Ranks(0, 1, 0, 1))  # type: ignore[arg-type]

    def make_module(self, run: Path) -> Any:
        """The LightningModule that would be trained, as training makes it; `run` is a folder that will be gone."""
        from lit_ft.train import _module

        return _module(self.cfg, self.model, self.kind, None)

    def _count_steps(self) -> tuple[int, int]:
        trainer, rows = self.cfg.trainer, len(self.data.examples)
        each = -(-rows // self.cfg.data.batch_size)
        extra = trainer.extra or {}
        if (limit := extra.get("limit_train_batches")) is not None:
            each = min(each, limit) if isinstance(limit, int) else int(each * limit)
        return each, trainer.max_steps if trainer.max_steps >= 0 else each * trainer.max_epochs

    def budget(self, device: str) -> int:
        """Tokens of a pass at most."""
        import torch

        from lit_ft.machine import tokens_per_pass

        return self.cfg.data.max_tokens or tokens_per_pass(torch.device(device))

    def passes(self, device: str, *, later: bool = False) -> tuple[Batch, int, float]:
        """The largest batch that a pass gets on a device, how many passes a step has at most, and on average.

        With `later`, the largest one that is not the first of its step, if steps have more than one.
        """
        from lit_ft.data.loader import WindowLoader
        from lit_ft.data.packing import lay_out, share_by_tokens, split_by_tokens

        data, budget = self.cfg.data, self.budget(device)
        layout = self.layout if self.layout == "padded" else "apart" if device == "cuda" else "packed"
        replicas = self.processes // self.cfg.strategy.tensor_parallel_size
        loader = WindowLoader(
            self.data.examples, batch_size=data.batch_size, max_tokens=budget, shuffle=data.shuffle, seed=self.cfg.seed
        )
        groups: list[list[Example]] = []
        counts = []
        for window in loader._windows(0):
            shares = share_by_tokens([self.data.examples[k] for k in window], replicas)
            split = [split_by_tokens(share, budget, layout) for share in shares]
            counts.append(max(map(len, split)))
            groups += [group for share in split for group in share[int(later) :]]

        def size(group: list[Example]) -> int:
            if layout != "padded":
                return sum(example.tokens for example in group)
            return sum(len(e.completions) for e in group) * max(e.longest for e in group)

        # What examples share is known only once they are laid out.
        likely = sorted(groups, key=size, reverse=True)[:3]
        batches = [lay_out(group, layout, self.tokenizer.pad_token_id) for group in likely]
        largest = max(batches, key=lambda batch: batch.input_ids.numel())
        return largest, max(counts), sum(counts) / len(counts)

    def sections(self) -> list[Section]:
        return [
            Section("Settings (changed from the defaults: those with a default beside them)", settings(self.cfg)),
            Section("Model and adapter", plain(*self._model_lines())),
            Section("Rows", plain(*self._row_lines())),
            self._example_section(),
            Section(self.steps_title, plain(*self._step_lines())),
            *self._memory_sections(),
        ]

    steps_title = "Steps"

    def _model_lines(self) -> Iterator[str]:
        from lit_ft.models.adapt import causal_lm, lora_rank, parameter_counts

        cfg, trained_total = self.cfg, parameter_counts(self.model)
        trained, total = trained_total
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
        yield f"publishes  {_size(size)} of {what}"
        yield f"arithmetic {self.precision.trainer} ({self.precision.why})"

    def _row_lines(self) -> Iterator[str]:
        yield f"training   {self.cfg.data.path}: {self.data.summary()}"
        yield f"held out   {self.val.summary() if self.val else 'nothing'}"

    def _example_section(self) -> Section:
        shown = self.data.examples[:_ROWS]
        most = max(len(example.completions) for example in shown)
        lines: list[Line] = []
        for number, example in enumerate(shown, 1):
            faint = f"row {number}: {len(example.prompt)} tokens of prompt, {example.targets} trained on"
            lines += [[Piece(faint, "faint")], [*decoded(self.tokenizer, example)], []]
        order = "" if most < 2 else ", chosen then rejected" if most == 2 else ", the best completion first"
        few = "row" if len(shown) == 1 else f"{len(shown)} rows"
        return Section(f"The first {few} as the model sees them, the trained part marked{order}", lines[:-1])

    def _step_lines(self) -> Iterator[str]:
        cfg, data = self.cfg, self.data
        batch, most, mean = self.passes(self.device.type)
        rows = "packed" if self.layout != "padded" else f"padded ({self.why_padded})"
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
        yield f"each pass  {rows}; the largest has {tokens:,} tokens, {seen}"
        if self.processes > 1:
            yield f"devices    {self.processes}, which share the rows of each step"

    def _memory_sections(self) -> Iterator[Section]:
        import torch

        from lit_ft.estimate import Setting

        cfg = self.cfg
        mixed = self.precision.trainer == "bf16-mixed"
        here = Setting(self.device.type, mixed, cfg.model.gradient_checkpointing)
        wanted = [Setting(*chosen) for chosen in _TABLE]
        try:
            rehearsals = {setting: self.rehearsal(setting) for setting in dict.fromkeys([here, *wanted])}
        except UserError:
            raise
        except Exception as error:  # a model's code may ask what is in a tensor; its run will do without the estimate
            first = (str(error).splitlines() or [""])[0]
            yield Section(
                "Memory", plain(f"not estimated: this model cannot be rehearsed ({type(error).__name__}: {first})")
            )
            return
        shards = self.processes if cfg.strategy.kind in (Strategy.fsdp, Strategy.fsdp_tp) else 1
        own = rehearsals[here].estimate(shards, offloaded=cfg.strategy.cpu_offload, **self.main_memory(here))
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        yield Section(f"Memory of this run on the {name}, estimated", self._own_memory(own))
        yield Section("Memory on other devices, per device", self._table(rehearsals, wanted))

    def main_memory(self, setting: Setting) -> dict[str, Any]:
        """Bytes beside the model's, as `Rehearsal.estimate` takes them."""
        import torch

        from lit_ft.estimate import bytes_of_rows
        from lit_ft.models.load import load_config

        examples = [example for part in (self.data, self.val) if part for example in part.examples]
        pairs = sum(len(example.completions) for example in examples) if self.cfg.algorithm.kind is Algorithm.dpo else 0
        kept = getattr(load_config(self.cfg.model.id), "dtype", None)
        kept = kept if isinstance(kept, torch.dtype) else torch.float32
        loaded = torch.bfloat16 if setting.mixed and not self.kind.whole_model else torch.float32
        base = [p for p in self.model.parameters() if p.requires_grad == self.kind.whole_model]
        numbers = 0 if self.cfg.model.tiny else sum(p.numel() for p in base)
        return {
            "rows": bytes_of_rows(examples),
            "reference": pairs * (24 + 8 + 56),  # a float of Python's, its place, and a tuple's own
            "tokenizer": self.tokenizer_bytes,
            "stored": numbers * kept.itemsize if kept != loaded or self.kind.quantized else 0,
        }

    def rehearsal(self, setting: Setting) -> Rehearsal:
        """A step of this run on the device and in the precision of `setting`."""
        batch, most, _ = self.passes(setting.device)

        def of(one: Batch, accumulates: bool) -> Rehearsal:
            return self.rehearsed(one, setting, accumulates)

        if most == 1 or not self.kind.whole_model:
            return of(batch, most > 1)
        # Gradients as large as the model are there from the second pass of a step on, and the first is the largest.
        later, _, _ = self.passes(setting.device, later=True)
        return max((of(batch, False), of(later, True)), key=lambda one: one.estimate().sum)

    def rehearsed(self, batch: Batch, setting: Setting, accumulates: bool, **what: Any) -> Rehearsal:
        """A pass over `batch`; `what` it computes, as `rehearse` takes it, if that is not the algorithm's."""
        from lit_ft.estimate import rehearse
        from lit_ft.models.kinds.adalora import AdaLora

        return rehearse(
            self.model,
            batch,
            setting,
            accumulates=accumulates,
            penalty=self.kind.penalty,
            four_bits=self.kind.quantized,
            allocates_ranks=isinstance(self.kind, AdaLora),
            **(what or self.computed()),
        )

    def computed(self) -> dict[str, Any]:
        """What a pass of this algorithm computes, as arguments of `rehearse`."""
        if self.cfg.algorithm.kind is not Algorithm.reward:
            return {}
        import torch

        from lit_ft.models.judge import completion_scores, hidden_size, scalar_head
        from lit_ft.models.roles import POLICY

        with torch.device("meta"):
            heads = torch.nn.ModuleList([scalar_head(hidden_size(self.model))])
        return {"passes": {POLICY: lambda model, batch: completion_scores(model, heads[0], batch)}, "heads": heads}

    @property
    def sharded(self) -> bool:
        """Whether FSDP would take this run."""
        from lit_ft.checks import WHOLE

        return self.kind.sharded and self.cfg.algorithm.kind not in WHOLE

    def _own_memory(self, own: Estimate) -> list[Line]:
        from lit_ft.memory import machine_memory

        dpo = self.cfg.algorithm.kind is Algorithm.dpo
        rows = [("part", "")]
        for part, size in own.parts.items():
            if part == "reference":
                note = "" if not dpo else " (log-probabilities, made once before; no second model)"
                rows += [(_PART_NAMES[part] + note, _size(size))] if dpo else []
            elif size or part in ("weights", "gradients", "optimizer", "activations"):
                rows.append((_PART_NAMES[part], _size(size)))
        lines = columns([*rows, ("in all", _size(own.sum))])
        lines += plain(f"at the fullest moment of a step: {own.moment}")
        has = machine_memory() if own.device == "cpu" else _gpu_bytes(self.device)
        if own.device == "cpu":
            libraries = resident_bytes()
            copies = self.processes if self.processes > 1 else 1
            needs = copies * (own.sum + (libraries or 0))
            if libraries is not None:
                lines += plain(f"Python and its libraries take {_size(libraries)} beside it.")
        else:
            needs = own.wanted
            lines += plain(f"with what CUDA takes and some to spare: {_size(needs)}")
        if has is not None:
            fits = (
                "it fits" if needs <= has else "IT DOES NOT FIT: see model.gradient_checkpointing and data.max_tokens"
            )
            lines += plain(
                f"This machine's {'main memory' if own.device == 'cpu' else 'GPU'} has {_size(has)}: {fits}."
            )
        return lines

    def _table(self, rehearsals: dict[Setting, Rehearsal], wanted: Sequence[Setting]) -> list[Line]:
        header = ("", "tokens", "1 device", "2, fsdp", "4, fsdp", "fits GPUs of")
        rows: list[Sequence[str]] = [header]
        for setting in wanted:
            cells = []
            for shards in (1, 2, 4):
                kept = rehearsals[setting].estimate(shards, **self.main_memory(setting))
                cells.append(_size(kept.sum) if shards == 1 or self.sharded else "-")
            alone = rehearsals[setting].estimate(1)
            gpus = [size for size in _GPUS if alone.fits(size * 2**30)]
            fits = "-" if setting.device == "cpu" else " ".join(map(str, gpus)) + " GB" if gpus else "none"
            device = "GPU" if setting.device == "cuda" else "CPU"
            how = f"{device} {'bf16-mixed' if setting.mixed else '32-true'}"
            how += ", gradient checkpointing" if setting.checkpointing else ""
            rows.append((how, f"{self.passes(setting.device)[0].input_ids.numel():,}", *cells, fits))
        return columns(rows)


# Device, mixed precision, gradient checkpointing.
_TABLE = (
    ("cpu", False, False),
    ("cpu", False, True),
    ("cpu", True, False),
    ("cpu", True, True),
    ("cuda", True, False),
    ("cuda", True, True),
)


def weightless(cfg: Config, kind: AdapterKind, start: Adapter | None, precision: Precision) -> Any:
    """The model that would be trained, its adapters in place, on the meta device: shapes and no numbers.

    Raises:
        UserError: as `lit_ft.train` raises it for the real one.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from lit_ft.models.four_bits import check_widths, nf4
    from lit_ft.models.load import _has_flash_attention, check_quantizable, context_length, load_config
    from lit_ft.models.resolve import unreachable

    dtype = torch.float32 if kind.whole_model else precision.weights
    if kind.quantized:
        check_quantizable(load_config(cfg.model.id), cfg.model.id)
        nf4(dtype)
    config = load_config(cfg.model.id, cfg.model.tiny)
    attention = cfg.model.attention
    if attention == "flash_attention_2" and not _has_flash_attention():
        attention = "sdpa"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError) as error:
        raise unreachable(cfg.model.id, error) from error
    if kind.quantized:
        check_widths(model, cfg.model.id)
    if getattr(config, "quantization_config", None):
        model.is_quantized = True
    reach = context_length(model)
    if reach is not None and cfg.data.max_length > reach:
        raise UserError(f"data.max_length={cfg.data.max_length} is beyond the model's context of {reach} tokens.")
    if cfg.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.device("meta"), warnings.catch_warnings():
        # That nothing is copied into tensors without content.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
        if start is not None:
            return kind.go_on(model, start.path, start.ref)
        return kind.begin(model)


def target_modules(model: Any) -> Counter[str]:
    """How many modules carry an adapter, by the last parts of their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return Counter(name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))


def published_bytes(model: Any, cfg: Config) -> tuple[int, str]:
    """The size of the weights' file that publishing will write, and what it is."""
    from lit_ft.models.adapt import is_adapted

    if not is_adapted(model):
        return sum(2 * p.numel() for p in model.parameters()), "weights: a whole model in bf16"
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    header = {name: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [10**8] * 2} for name, t in state.items()}
    size = sum(4 * t.numel() for t in state.values()) + len(json.dumps(header, separators=(",", ":")))
    if cfg.peft.kind.value == "pissa":
        return 2 * size, "adapter: a LoRA of twice the rank"
    if cfg.peft.kind.value == "adalora":
        share = cfg.peft.target_r / cfg.peft.init_r  # type: ignore[attr-defined]
        return round(share * size), "adapter, about: a LoRA of the ranks that are left"
    return size, "adapter"


def decoded(tokenizer: Any, example: Example) -> list[Piece]:
    """An example as text, its prompt and then its completions; what is trained on is a piece of its own."""
    pieces = [Piece(tokenizer.decode(example.prompt))]
    for completion in example.completions:
        for trained, group in groupby(zip(completion.ids, completion.mask, strict=True), key=lambda pair: pair[1]):
            text = tokenizer.decode([token for token, _ in group])
            pieces.append(Piece(text, "trained" if trained else ""))
    return pieces


def settings(cfg: Config) -> list[Line]:
    """The resolved configuration as YAML, with the default beside what differs from it."""
    from hydra import compose

    return list(_yaml(_container(cfg), _container(compose("config")), ""))


def _container(cfg: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    copied = OmegaConf.create(cfg)
    # A logger's folder is the run's own, which a preview has none of.
    logger = OmegaConf.to_container(copied.logger, resolve=False) if copied.logger is not None else None
    plain_cfg = OmegaConf.merge(cfg, {"logger": None})
    content: dict[str, Any] = OmegaConf.to_container(plain_cfg, resolve=True, enum_to_str=True)  # type: ignore[assignment]
    content.pop("html", None)
    return {**content, "logger": logger}


_MISSING = object()


def _yaml(content: dict[Any, Any], default: Any, indent: str) -> Iterator[Line]:
    for key, value in content.items():
        before = default.get(key, _MISSING) if isinstance(default, dict) else _MISSING
        if isinstance(value, dict) and value:
            yield [Piece(f"{indent}{_scalar(key)}:")]
            yield from _yaml(value, before, indent + "  ")
            continue
        text = f"{indent}{_scalar(key)}: {_scalar(value)}"
        if value == before:
            yield [Piece(text)]
        else:
            was = "no default" if before is _MISSING else f"default: {_scalar(before)}"
            yield [Piece(text, "changed"), Piece(f"  # {was}", "faint")]


def _scalar(value: Any) -> str:
    """A value in one line of YAML."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def resident_bytes() -> int | None:
    """Main memory that this process has now; None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _gpu_bytes(device: torch.device) -> int | None:
    import torch

    return torch.cuda.get_device_properties(device).total_memory


def _size(size: int) -> str:
    from lit_ft.memory import size_in_words

    return size_in_words(size)


if __name__ == "__main__":
    main()
