"""From a configuration to a published adapter: the one place where the pieces are wired together."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from lit_ft import adapter as folder
from lit_ft.adapter import Adapter, Base, Draft
from lit_ft.allocator import keep_freed_memory
from lit_ft.callbacks.interrupt import FinishStepOnSignal, Interrupted, stopping_on_signals
from lit_ft.checkpoint import Resumed, SafeCheckpointIO, find_checkpoint
from lit_ft.checkpoint import before as checkpoint_before
from lit_ft.checks import SHARDED, check_settings
from lit_ft.config import Algorithm, Config, FloatFormat, Packing, Peft, Strategy
from lit_ft.data.chat import ChatEncoder, set_chat_template, show
from lit_ft.data.datamodule import ExamplesDataModule, Mix, Prepared, load_examples
from lit_ft.data.formats import Kind
from lit_ft.data.packing import Layout
from lit_ft.distributed import Ranks, agree, first_process_first, join, leave, lost_another, rank
from lit_ft.errors import UserError
from lit_ft.launch import LOST_ANOTHER, end_with_launcher, launched_by_us
from lit_ft.machine import Threads, choose_threads, tokens_per_pass
from lit_ft.memory import account, explain, is_out_of_memory
from lit_ft.models import adapt
from lit_ft.models.load import check_not_quantized, context_length, load_model, load_tokenizer
from lit_ft.models.precision import Precision, choose_precision
from lit_ft.models.resolve import cache_folder, model_fingerprint
from lit_ft.models.score import attention_backend, check_scoring, score_gathered, use_packed_attention
from lit_ft.models.shard import bytes_held, shard
from lit_ft.progress import say
from lit_ft.reference import attach, read_cached, reference_key, reference_logprobs, write_cached
from lit_ft.sweep import write_result

# Seconds that the others wait with a mistake, for the first process to say it: they are stopped as soon as one ends.
_FIRST_SPEAKS = 5


def train(cfg: Config) -> Adapter:
    """Run the configured training and return the adapter it published.

    On several devices this is one of as many processes (`lit_ft.launch`, torchrun or Slurm start them).

    Raises:
        UserError: a mistake in the configuration, the data or the machine's state.
        SystemExit: the run was interrupted (130 for Ctrl-C, 143 for SIGTERM) or lost a process, and nothing is
            published; or this is one of several processes, of which one reports.
    """
    _quiet()
    run = _run_folder()
    devices = check_settings(cfg)
    end_with_launcher()
    try:
        with stopping_on_signals():
            adapter = _train(cfg, run, devices)
    except Interrupted as stop:
        say("Stopped; nothing was published.")
        if stop.checkpoint is not None:
            say(f"Go on with the same command and resume={stop.checkpoint} (or resume=last).")
        raise SystemExit(stop.exit_code) from None
    except UserError:
        if rank() and launched_by_us():
            time.sleep(_FIRST_SPEAKS)
        raise
    except Exception as error:
        if lost_another(error):
            raise SystemExit(LOST_ANOTHER) from None
        raise
    finally:
        leave()
        if {path.name for path in run.glob("*")} <= {"hydra", "processes"}:
            shutil.rmtree(run, ignore_errors=True)  # it ended before it began, or is not the first of several
    if rank() or launched_by_us():
        raise SystemExit(0)  # whoever started them reports
    return adapter


def _train(cfg: Config, run: Path, devices: int) -> Adapter:
    import lightning as L

    device = _device(cfg.trainer.accelerator)
    ranks = join(device.type, devices, cfg.trainer.num_nodes)
    run = agree(lambda: run)
    L.seed_everything(cfg.seed, verbose=False)
    folder.check_name(cfg.name)
    adapters = Path(cfg.adapters)
    resumed = agree(lambda: find_checkpoint(cfg.resume, Path(cfg.runs, cfg.name), cfg.algorithm.kind.value))
    start = agree(lambda: _start(cfg, adapters, resumed))
    if device.type == "cuda":
        device = torch.device("cuda", ranks.local_rank)
    else:
        keep_freed_memory()
    threads = choose_threads(cfg.trainer.threads, device, ranks.local_size)
    torch.set_num_threads(threads.count)
    precision = agree(lambda: choose_precision(cfg.trainer.precision, device))
    max_tokens = cfg.data.max_tokens or tokens_per_pass(device)
    with first_process_first():  # it fills the caches
        base_hash = "sha256:tiny" if cfg.model.tiny else model_fingerprint(cfg.model.id)

    tokenizer = load_tokenizer(cfg.model.id)
    set_chat_template(tokenizer, cfg.data.chat_template)
    data, val = _examples(cfg, tokenizer)
    model = _model(cfg, start, precision)
    layout, why_padded = _layout(cfg, model, device)
    if layout != "padded":
        rows = "packed, attention by " + attention_backend(model, device, precision.trainer == "bf16-mixed")
    else:
        rows = f"padded ({why_padded})"
    rows += f", up to {max_tokens:,} tokens a pass"
    mesh = _mesh(cfg, device, ranks)
    replica, replicas = (mesh["data_parallel"].get_local_rank(), mesh["data_parallel"].size()) if mesh else ranks[:2]
    _first_lines(cfg, model, start, precision, threads, rows, data, val, tokenizer)
    if mesh is not None:
        _shard(cfg, model, mesh)
    if ranks.size > 1:
        say(_devices_line(cfg, model, ranks))
        # Not the same random numbers everywhere; but those who share a model's tensors must drop the same ones.
        torch.manual_seed(1_000_003 * cfg.seed + replica)

    base = Base(_base_id(cfg.model.id), base_hash)
    identity = _identity(cfg, base, data)
    if resumed is not None:
        resumed.must_be(identity)
    if cfg.algorithm.kind is Algorithm.dpo:
        if mesh is None:
            model.to(device)
        make = partial(
            reference_logprobs,
            model,
            max_tokens=max_tokens,
            layout=layout,
            pad_id=tokenizer.pad_token_id,
            autocast=torch.bfloat16 if precision.trainer == "bf16-mixed" else None,
            device=device,
            rank=replica,
            processes=replicas,
        )
        data, val = _with_reference(cfg, make, data, val, start, base, precision)
    module = _module(cfg, model)
    module.parent = start.ref if start else None
    module.identity = identity
    datamodule = ExamplesDataModule(
        data.examples,
        val.examples if val else None,
        batch_size=cfg.data.batch_size,
        max_tokens=max_tokens,
        layout=layout,
        pad_id=tokenizer.pad_token_id,
        shuffle=cfg.data.shuffle,
        seed=cfg.seed,
    )
    # A resumed run goes on in its own folder, where the best checkpoint so far lies.
    last = resumed.path.with_name("last.ckpt") if resumed else run / "checkpoints" / "last.ckpt"
    best, stopper, callbacks = _callbacks(cfg, module, last, validates=val is not None)
    if cfg.trainer.profile and ranks.rank == 0:
        from lit_ft.callbacks.profile import ProfileSteps

        callbacks.insert(0, ProfileSteps(run))  # first, so that a step ends before others save or stop
    trainer = _trainer(cfg, precision, callbacks, run, devices, ranks)

    before: list[Any] = []
    try:
        if val and cfg.trainer.validate_first:
            before = [resumed.before] if resumed else trainer.validate(module, datamodule, verbose=False)
            module.before = dict(before[0])
            say("held out before training: " + _metric_line(before[0]))
        trainer.fit(
            module, datamodule, ckpt_path=resumed.path if resumed else None, weights_only=True if resumed else None
        )
    except Exception as error:
        if isinstance(error, ValueError) and "val_check_interval" in str(error):
            raise UserError(f"trainer.val_check_interval={cfg.trainer.val_check_interval}: {error}") from error
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # what they hold is in the way of saying it
        raise UserError(_what_filled_memory(cfg, error, module, trainer, precision, max_tokens, device)) from error
    trainer.save_checkpoint(last)  # should publishing fail, a resume from it publishes without training anew
    if stopper.received is not None:
        raise Interrupted(stopper.received, last)

    metrics = _best_metrics(module, best, trainer, datamodule if val else None)
    metrics |= {f"before/{key.removeprefix('eval/')}": float(value) for key, value in module.before.items()}
    reason = "it has random weights (model.tiny)" if cfg.model.tiny else adapt.why_not_servable(module.model)
    draft = Draft(
        name=cfg.name,
        base=base,
        algorithm=cfg.algorithm.kind.value,
        peft=cfg.peft.kind.value,
        rank=adapt.lora_rank(module.model),
        data=data.sources,
        parent=start.ref if start else None,
        metrics=metrics,
        versions=_versions(),
        servable=reason is None,
        not_servable_reason=reason,
    )
    write = _writer(cfg, module.model, tokenizer, adapt.trained_state(module.model))
    published = agree(lambda: folder.publish(adapters, draft, write))
    if ranks.rank == 0:
        for path in (last, checkpoint_before(last)):
            path.unlink(missing_ok=True)  # there is nothing left to resume
        write_result(run, published)
    say(f"published {published.ref}: " + _metric_line(metrics))
    return published


def _mesh(cfg: Config, device: torch.device, ranks: Ranks) -> Any:
    """The devices in two dimensions, for a strategy that shards; else None."""
    if cfg.strategy.kind not in SHARDED:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    parts = cfg.strategy.tensor_parallel_size
    names = ("data_parallel", "tensor_parallel")
    return init_device_mesh(device.type, (ranks.size // parts, parts), mesh_dim_names=names)


def _shard(cfg: Config, model: Any, mesh: Any) -> None:
    formats = {None: None, FloatFormat.bf16: torch.bfloat16, FloatFormat.fp32: torch.float32}
    shard(
        model,
        mesh,
        score_gathered,
        cpu_offload=cfg.strategy.cpu_offload,
        reshard_after_forward=cfg.strategy.reshard_after_forward,
        param_dtype=formats[cfg.strategy.param_dtype],
        reduce_dtype=formats[cfg.strategy.reduce_dtype],
    )


def _devices_line(cfg: Config, model: Any, ranks: Ranks) -> str:
    held, whole = bytes_held(model)
    kind = "ddp" if cfg.strategy.kind is Strategy.auto else cfg.strategy.kind.value
    return (
        f"devices    {ranks.size} processes, {kind}: each holds {held / 1e6:,.1f} of {whole / 1e6:,.1f} MB of weights"
    )


def _quiet() -> None:
    """Leave out messages that the reader can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # That gathering over two dimensions of devices takes two exchanges.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    ours = (
        r".*does not have many workers.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*You are using `torch.load` with `weights_only=False`.*",
        r".*no CUDA.*",
        r".*It is recommended to use `self\.log\(.*sync_dist=True.*",  # metrics are reduced before they are logged
        r".*Using ModelCheckpoint with manual optimization.*",
        r".*Total length of `list` across ranks is zero.*",
        r".*GPU available but not used.*",
        r".*`broadcast_buffers` is deprecated.*",  # its successor came with PyTorch 2.13
    )
    for message in ours:
        warnings.filterwarnings("ignore", message=message)


def _run_folder() -> Path:
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def _start(cfg: Config, adapters: Path, resumed: Resumed | None) -> Adapter | None:
    """The adapter that training begins with, or None for the base."""
    if resumed is not None:
        # What the interrupted run began with, even if newer adapters were published meanwhile.
        return folder.find(adapters, resumed.parent) if resumed.parent else None
    if cfg.start_from == "none":
        return None
    if cfg.start_from == "auto":
        if cfg.algorithm.kind is not Algorithm.dpo or cfg.peft.kind is not Peft.lora:
            return None
        start = folder.newest(adapters, cfg.name, "sft", on_broken=lambda reason: say(f"left out   {reason}"))
    else:
        start = folder.find(adapters, cfg.start_from)
    if start is not None and start.card.peft != cfg.peft.kind.value:
        raise UserError(f"start_from: {start.ref} was made with peft={start.card.peft}, not {cfg.peft.kind.value}.")
    if start is not None and not cfg.model.tiny and start.card.base.hash != model_fingerprint(cfg.model.id):
        raise UserError(
            f"{start.ref} was trained on {start.card.base.id}, and model.id={cfg.model.id} is another model. "
            "Choose that model, another name, or start_from=none."
        )
    return start


def _identity(cfg: Config, base: Base, data: Prepared) -> dict[str, str]:
    """What a checkpoint must have in common with the run that resumes it."""
    return {
        "algorithm": cfg.algorithm.kind.value,
        "peft": cfg.peft.kind.value,
        "model": base.hash,
        "data": ", ".join(f"{d.source} {d.hash} {d.rows}" for d in data.sources),
        "data.batch_size": str(cfg.data.batch_size),
        "data.max_length": str(cfg.data.max_length),
        "seed": str(cfg.seed),
    }


def _device(accelerator: str) -> torch.device:
    usable = torch.cuda.is_available() and accelerator in {"auto", "gpu", "cuda"}
    return torch.device("cuda" if usable else "cpu")


def _examples(cfg: Config, tokenizer: Any) -> tuple[Prepared, Prepared | None]:
    encoder = ChatEncoder(tokenizer, cfg.data.train_on.value, cfg.data.as_chat)
    kind: Kind = "preference" if cfg.algorithm.kind is Algorithm.dpo else "sft"
    return load_examples(
        cfg.data.path,
        encoder,
        kind,
        val_path=cfg.data.val_path,
        val_split=cfg.data.val_split,
        split=cfg.data.split,
        held_out_split=cfg.data.held_out_split,
        mix=[Mix(part.path, part.weight, part.split) for part in cfg.data.mix],
        max_val_rows=cfg.data.max_val_rows,
        max_rows=cfg.data.max_rows,
        seed=cfg.seed,
        max_length=cfg.data.max_length,
        columns=_mapping("data.columns", cfg.data.columns),
        overflow=cfg.data.overflow.value,
        max_dropped=cfg.data.max_dropped,
    )


def _mapping(key: str, value: Any) -> dict[str, Any]:
    """A setting that is a mapping or null (a typed one could not be given on the command line)."""
    if value is None:
        return {}
    if not OmegaConf.is_dict(value):
        raise UserError(f"{key}={value} is not a mapping: give it as '{key}={{name: value}}'.")
    return dict(value)


def _model(cfg: Config, start: Adapter | None, precision: Precision) -> Any:
    full = cfg.peft.kind is Peft.full
    model = load_model(
        cfg.model.id,
        dtype=torch.float32 if full else precision.weights,
        attention=cfg.model.attention,
        tiny=cfg.model.tiny,
    )
    reach = context_length(model)
    if reach is not None and cfg.data.max_length > reach:
        raise UserError(f"data.max_length={cfg.data.max_length} is beyond the model's context of {reach} tokens.")
    if cfg.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if full:
        check_not_quantized(model)
        return adapt.train_all(model)
    if start is not None:
        return adapt.continue_adapter(model, start.path, dropout=cfg.peft.dropout)
    targets = cfg.peft.target_modules
    return adapt.apply_lora(
        model,
        r=cfg.peft.r,
        alpha=cfg.peft.alpha,
        dropout=cfg.peft.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=cfg.peft.use_rslora,
    )


def _layout(cfg: Config, model: Any, device: torch.device) -> tuple[Layout, str]:
    """How rows are laid out, and why if they are padded."""
    check_scoring(model)
    if cfg.data.packing is Packing.off:
        return "padded", "as asked"
    reason = use_packed_attention(model)
    if reason is None:
        # The kernel for CUDA gathers a copy of shared keys for every example that goes on from them.
        return ("apart" if device.type == "cuda" else "packed"), ""
    if cfg.data.packing is Packing.on:
        raise UserError(f"data.packing=on: this model cannot be packed ({reason}). Use data.packing=auto.")
    return "padded", reason


def _base_id(model_id: str) -> str:
    return Path(model_id).name if Path(model_id).is_dir() else model_id


def _first_lines(
    cfg: Config,
    model: Any,
    start: Adapter | None,
    precision: Precision,
    threads: Threads,
    rows: str,
    data: Prepared,
    val: Prepared | None,
    tokenizer: Any,
) -> None:
    """What the run is about to do, so that a mistake shows before it costs anything."""
    trained, total = adapt.parameter_counts(model)
    rank = adapt.lora_rank(model)
    lora = f", LoRA r={rank}" if rank else ""
    if start is not None and rank != cfg.peft.r:
        lora += f", as {start.ref} has it"
    say(f"model      {cfg.model.id}: {total:,} parameters, {trained:,} trained ({trained / total:.2%}{lora})")
    say(f"start      {f'adapter {start.ref} ({start.card.algorithm})' if start else 'the base model'}")
    say(f"arithmetic {precision.trainer} ({precision.why})")
    say(f"threads    {threads.count} ({threads.why})")
    say(f"rows       {rows}")
    say(f"training   {cfg.data.path}: {data.summary()}")
    say(f"held out   {val.summary() if val else 'nothing'}")
    example = data.examples[0]
    if len(example.completions) > 1:
        say("example    the trained parts between ⟦ ⟧, chosen then rejected:")
    else:
        say("example    the trained part between ⟦ ⟧:")
    say("  | " + show(tokenizer, example).replace("\n", "\n  | "))


def _with_reference(
    cfg: Config,
    make: Callable[..., list[tuple[float, ...]]],
    data: Prepared,
    val: Prepared | None,
    start: Adapter | None,
    base: Base,
    precision: Precision,
) -> tuple[Prepared, Prepared | None]:
    """The examples with the reference's log-probabilities, from the cache where it has them, else from `make`."""
    use_base = cfg.algorithm.reference.value == "base"  # type: ignore[attr-defined]
    if use_base and cfg.peft.kind is Peft.full:
        raise UserError("algorithm.reference=base with peft=full: there is no base below the trained weights.")
    # A new adapter changes nothing yet, so its reference is the base.
    adapter_hash = None if use_base or start is None else _adapter_hash(start)
    kept = cache_folder() / "reference"

    def of(split: Prepared) -> Prepared:
        key = reference_key(
            split.examples,
            base=base.hash,
            adapter=adapter_hash,
            # Random weights differ from run to run: their seed is part of what they are.
            tiny=cfg.seed if cfg.model.tiny else None,
            precision=precision.trainer,
            weights=str(precision.weights),
            model=cfg.model.id if cfg.model.tiny else None,
            # What computes them may change from one version to the next.
            versions=_versions(),
        )
        known = agree(lambda: read_cached(kept, key))
        if known is None:
            known = make(split.examples, disable_adapter=use_base)
            if not rank():
                try:
                    write_cached(kept, key, known)
                except OSError as error:  # a cache saves time; without it the run goes on
                    say(f"reference  log-probabilities could not be kept in {kept}: {error.strerror or error}")
        else:
            say(f"reference  log-probabilities of {len(known)} pairs read from the cache")
        return Prepared(attach(split.examples, known), split.sources, split.dropped)

    return of(data), of(val) if val else None


def _adapter_hash(start: Adapter) -> str:
    """Of the adapter's weights and of its configuration, whose scaling changes what the weights do."""
    config = (start.path / "adapter_config.json").read_bytes()
    return hashlib.sha256(start.card.weights_sha256.encode() + config).hexdigest()


def _module(cfg: Config, model: Any) -> Any:
    from lit_ft.modules import DPOModule, SFTModule

    algorithm = cfg.algorithm
    shared: dict[str, Any] = {
        "learning_rate": algorithm.learning_rate,
        "lr_scheduler_type": algorithm.lr_scheduler_type,
        "warmup_ratio": algorithm.warmup_ratio,
        "weight_decay": algorithm.weight_decay,
        "adam_beta1": algorithm.adam_beta1,
        "adam_beta2": algorithm.adam_beta2,
        "adam_epsilon": algorithm.adam_epsilon,
        "max_grad_norm": algorithm.max_grad_norm,
    }
    if algorithm.kind is Algorithm.sft:
        return SFTModule(model, **shared)
    return DPOModule(
        model,
        beta=algorithm.beta,  # type: ignore[attr-defined]
        loss_type=algorithm.loss_type.value,  # type: ignore[attr-defined]
        label_smoothing=algorithm.label_smoothing,  # type: ignore[attr-defined]
        reference=algorithm.reference.value,  # type: ignore[attr-defined]
        **shared,
    )


def _callbacks(cfg: Config, module: Any, last: Path, *, validates: bool) -> tuple[Any, FinishStepOnSignal, list[Any]]:
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    from lit_ft.callbacks.progress_bar import TrainingBar

    best = ModelCheckpoint(
        dirpath=last.parent,
        filename="best",
        monitor=module.monitor if validates else None,
        save_top_k=1,
        auto_insert_metric_name=False,
        enable_version_counter=False,
        save_on_train_epoch_end=not validates,
    )
    regular = ModelCheckpoint(
        dirpath=last.parent,
        filename="last",
        every_n_train_steps=cfg.trainer.save_every_n_steps,
        save_top_k=1,
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )
    stopper = FinishStepOnSignal(last)
    callbacks: list[Any] = [best, regular, stopper]
    if cfg.trainer.progress:
        callbacks.append(TrainingBar())
    if cfg.trainer.early_stopping is not None:
        if not validates:
            raise UserError("trainer.early_stopping needs held-out rows: set data.val_path or data.val_split.")
        callbacks.append(EarlyStopping(module.monitor, patience=cfg.trainer.early_stopping))
    return best, stopper, callbacks


def _strategy(cfg: Config, ranks: Ranks) -> Any:
    from lit_ft.strategy import ShardedStrategy, ddp

    wanted, extra = cfg.strategy, _mapping("strategy.extra", cfg.strategy.extra)
    if wanted.kind in SHARDED:
        parts = wanted.tensor_parallel_size
        return ShardedStrategy(ranks.size // parts, parts, cpu_offload=wanted.cpu_offload, **extra)
    if wanted.kind is Strategy.ddp or ranks.size > 1:
        return ddp(**extra)
    return "auto"


def _trainer(cfg: Config, precision: Precision, callbacks: list[Any], run: Path, devices: int, ranks: Ranks) -> Any:
    import lightning as L
    from hydra.utils import instantiate
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    def third_party(group: Any) -> list[Any]:
        parts = [] if group is None else [group] if "_target_" in group else list(group.values())
        return [instantiate(part) for part in parts if part.get("_target_")]

    t = cfg.trainer
    extra = _mapping("trainer.extra", t.extra)
    for key, ours in (("accumulate_grad_batches", "data.batch_size"), ("gradient_clip_val", "algorithm.max_grad_norm")):
        if key in extra:
            raise UserError(f"trainer.extra.{key} has no effect here, where steps are taken by hand: use {ours}.")
    try:
        strategy = _strategy(cfg, ranks)
        loggers = third_party(cfg.logger)
        return L.Trainer(
            accelerator=t.accelerator,
            devices=devices if t.devices in ("auto", -1, "-1") else t.devices,
            num_nodes=t.num_nodes,
            strategy=strategy,
            plugins=[SafeCheckpointIO()],
            precision=precision.trainer,
            max_epochs=t.max_epochs if t.max_steps < 0 else -1,
            max_steps=t.max_steps,
            val_check_interval=t.val_check_interval,
            log_every_n_steps=t.log_every_n_steps,
            deterministic=t.deterministic,
            callbacks=callbacks,
            logger=loggers or False,
            default_root_dir=run,
            enable_model_summary=False,
            enable_progress_bar=t.progress,
            num_sanity_val_steps=0,
            **extra,
        )
    except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
        raise UserError(f"The trainer cannot be set up: {' '.join(str(error).split())}") from error


def _what_filled_memory(
    cfg: Config,
    error: Exception,
    module: Any,
    trainer: Any,
    precision: Precision,
    max_tokens: int,
    device: torch.device,
) -> str:
    """Which part of a step took how much, and what to lower."""
    used = account(
        module.model,
        next(iter(trainer.optimizers), None),
        module.largest,
        mixed=torch.bfloat16 if precision.trainer == "bf16-mixed" else None,
        device=device,
        offloaded=cfg.strategy.cpu_offload,
    )
    return explain(
        used,
        error,
        max_tokens=max_tokens,
        max_length=cfg.data.max_length,
        gradient_checkpointing=cfg.model.gradient_checkpointing,
        precision=precision.trainer,
        peft=cfg.peft.kind.value,
        r=adapt.lora_rank(module.model),
        strategy=cfg.strategy.kind.value,
        cpu_offload=cfg.strategy.cpu_offload,
    )


def _best_metrics(module: Any, best: Any, trainer: Any, datamodule: Any) -> dict[str, float]:
    """Put the best weights into the module, the last ones among the candidates, and return their held-out metrics."""
    if datamodule is None:
        return {"step": float(trainer.global_step)}
    score = best.best_model_score
    if module.validated_at != trainer.global_step:  # the run ended between two validations
        final = {k: float(v) for k, v in trainer.validate(module, datamodule, verbose=False)[0].items()}
        if score is None or final[module.monitor] < float(score):
            return {**final, "step": float(trainer.global_step)}
    if not Path(best.best_model_path).is_file():  # it could not be written: the disk was full
        say("The best weights could not be kept while training: the last ones are published.")
        return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("eval/")} | {
            "step": float(trainer.global_step)
        }
    kept = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    from lit_ft.strategy import load_trained

    load_trained(module, kept["state_dict"])
    return {**kept["lit_ft"]["metrics"], "step": float(kept["global_step"])}


def _metric_line(metrics: Any) -> str:
    wanted = ("loss", "mean_token_accuracy", "rewards/accuracies", "rewards/margins")
    return ", ".join(f"eval/{k} {metrics[f'eval/{k}']:.4f}" for k in wanted if f"eval/{k}" in metrics) or "no metrics"


def _versions() -> dict[str, str]:
    found = {}
    for name in ("lit_ft", "torch", "lightning", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source"
    return found


def _writer(cfg: Config, model: Any, tokenizer: Any, state: dict[str, Any] | None) -> Callable[[Path], None]:
    resolved = OmegaConf.to_yaml(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))  # type: ignore[arg-type]

    def write(target: Path) -> None:
        adapt.save_trained(model, target, state)
        tokenizer.save_pretrained(str(target))
        (target / "config.yaml").write_text(resolved, encoding="utf-8")

    return write
