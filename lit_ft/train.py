"""From a configuration to a published adapter: the one place where the pieces are wired together."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from lit_ft import adapter as folder
from lit_ft.adapter import Adapter, Base, Draft
from lit_ft.allocator import keep_freed_memory
from lit_ft.callbacks.interrupt import FinishStepOnSignal, Interrupted
from lit_ft.config import Algorithm, Config, Packing, Peft
from lit_ft.data.chat import ChatEncoder, set_chat_template, show
from lit_ft.data.datamodule import ExamplesDataModule, Mix, Prepared, load_examples
from lit_ft.data.formats import Kind
from lit_ft.data.packing import Layout
from lit_ft.errors import UserError
from lit_ft.models import adapt
from lit_ft.models.load import check_not_quantized, context_length, load_model, load_tokenizer
from lit_ft.models.precision import Precision, choose_precision
from lit_ft.models.resolve import cache_folder, model_fingerprint
from lit_ft.models.score import use_packed_attention
from lit_ft.progress import say
from lit_ft.reference import attach, read_cached, reference_key, reference_logprobs, write_cached


def train(cfg: Config) -> Adapter:
    """Run the configured training and return the adapter it published.

    Raises:
        UserError: a mistake in the configuration, the data or the machine's state.
        SystemExit: the run was interrupted (130 for Ctrl-C, 143 for SIGTERM); nothing is published.
    """
    import lightning as L

    _quiet()
    L.seed_everything(cfg.seed, verbose=False)
    folder.check_name(cfg.name)
    adapters, run = Path(cfg.adapters), _run_folder()
    resume = _checkpoint_to_resume(cfg)
    start = _start(cfg, adapters, resume)
    device = _device(cfg.trainer.accelerator)
    if device.type == "cpu":
        keep_freed_memory()
    precision = choose_precision(cfg.trainer.precision.value, device)

    tokenizer = load_tokenizer(cfg.model.id)
    set_chat_template(tokenizer, cfg.data.chat_template)
    data, val = _examples(cfg, tokenizer)
    model = _model(cfg, start, precision)
    layout = _layout(cfg, model)
    _first_lines(cfg, model, start, precision, layout, data, val, tokenizer)

    base = Base(_base_id(cfg.model.id), "sha256:tiny" if cfg.model.tiny else model_fingerprint(cfg.model.id))
    if cfg.algorithm.kind is Algorithm.dpo:
        data, val = _with_reference(cfg, model.to(device), data, val, start, base, precision, layout, tokenizer)
    module = _module(cfg, model)
    datamodule = ExamplesDataModule(
        data.examples,
        val.examples if val else None,
        batch_size=cfg.data.batch_size,
        max_tokens=cfg.data.max_tokens,
        layout=layout,
        pad_id=tokenizer.pad_token_id,
        shuffle=cfg.data.shuffle,
        seed=cfg.seed,
    )
    last = run / "checkpoints" / "last.ckpt"
    best, stopper, callbacks = _callbacks(cfg, module, last, validates=val is not None)
    trainer = _trainer(cfg, precision, callbacks, run)
    module.parent = start.ref if start else None

    before = trainer.validate(module, datamodule, verbose=False) if val and cfg.trainer.validate_first else []
    if before and not resume:
        say("held out before training: " + _metric_line(before[0]))
    try:
        trainer.fit(module, datamodule, ckpt_path=resume, weights_only=True if resume else None)
        if stopper.received is not None:
            trainer.save_checkpoint(last)
            raise Interrupted(stopper.received, last)
    except Interrupted as stop:
        say(
            "Stopped; nothing was published. "
            f"Go on with the same command and resume={stop.checkpoint} (or resume=last)."
        )
        raise SystemExit(stop.exit_code) from None
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Out of GPU memory: lower data.max_tokens (now {cfg.data.max_tokens}), which changes no result, set "
            f"model.gradient_checkpointing=true, or lower data.max_length. ({str(error).splitlines()[0]})"
        ) from error

    metrics = _published_metrics(module, best, trainer, datamodule, before)
    draft = Draft(
        name=cfg.name,
        base=base,
        algorithm=cfg.algorithm.kind.value,
        peft=cfg.peft.kind.value,
        rank=cfg.peft.r if cfg.peft.kind is Peft.lora else None,
        data=data.sources,
        parent=start.ref if start else None,
        metrics=metrics,
        versions=_versions(),
        servable=adapt.why_not_servable(module.model) is None,
        not_servable_reason=adapt.why_not_servable(module.model),
    )
    published: Adapter | None = None
    if trainer.is_global_zero:
        published = folder.publish(adapters, draft, _writer(cfg, module.model, tokenizer))
    trainer.strategy.barrier()
    if published is None:
        raise SystemExit(0)  # only the first process publishes and prints
    say(f"published {published.ref}: " + _metric_line(metrics))
    return published


def _quiet() -> None:
    """Leave out messages that the reader can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    ours = (
        r".*does not have many workers.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*You are using `torch.load` with `weights_only=False`.*",
        r".*no CUDA.*",
        r".*GPU available but not used.*",
    )
    for message in ours:
        warnings.filterwarnings("ignore", message=message)


def _run_folder() -> Path:
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def _checkpoint_to_resume(cfg: Config) -> Path | None:
    if cfg.resume is None:
        return None
    if cfg.resume == "last":
        found = sorted(Path(cfg.runs, cfg.name).glob("*/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise UserError(f"resume=last: no run of {cfg.name!r} in {cfg.runs} has left a checkpoint.")
        return found[-1]
    path = Path(cfg.resume).expanduser()
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"resume={cfg.resume}: there is no checkpoint {path}.")
    return path


def _start(cfg: Config, adapters: Path, resume: Path | None) -> Adapter | None:
    """The adapter that training begins with, or None for the base."""
    if resume is not None:
        # What the interrupted run began with, even if newer adapters were published meanwhile.
        try:
            parent = torch.load(resume, map_location="cpu", weights_only=True)["lit_ft"]["parent"]
        except Exception as error:
            raise UserError(
                f"{resume} is not a readable checkpoint of lit_ft ({type(error).__name__}): it may have been cut "
                "short. Give another with resume=PATH."
            ) from error
        return folder.find(adapters, parent) if parent else None
    if cfg.start_from == "none":
        return None
    if cfg.start_from == "auto":
        if cfg.algorithm.kind is not Algorithm.dpo or cfg.peft.kind is not Peft.lora:
            return None
        start = folder.newest(adapters, cfg.name, "sft")
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
        mix=[Mix(part.path, part.weight, part.split) for part in cfg.data.mix],
        max_val_rows=cfg.data.max_val_rows,
        max_rows=cfg.data.max_rows,
        seed=cfg.seed,
        max_length=cfg.data.max_length,
        columns=dict(cfg.data.columns),
        overflow=cfg.data.overflow.value,
        max_dropped=cfg.data.max_dropped,
    )


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


def _layout(cfg: Config, model: Any) -> Layout:
    if cfg.data.packing is Packing.off:
        return "padded"
    reason = use_packed_attention(model)
    if reason is None:
        return "packed"
    if cfg.data.packing is Packing.on:
        raise UserError(f"data.packing=on: this model cannot be packed ({reason}). Use data.packing=auto.")
    say(f"rows are padded: {reason}")
    return "padded"


def _base_id(model_id: str) -> str:
    return Path(model_id).name if Path(model_id).is_dir() else model_id


def _first_lines(
    cfg: Config,
    model: Any,
    start: Adapter | None,
    precision: Precision,
    layout: Layout,
    data: Prepared,
    val: Prepared | None,
    tokenizer: Any,
) -> None:
    """What the run is about to do, so that a mistake shows before it costs anything."""
    trained, total = adapt.parameter_counts(model)
    lora = f", LoRA r={cfg.peft.r}" if cfg.peft.kind is Peft.lora else ""
    say(f"model      {cfg.model.id}: {total:,} parameters, {trained:,} trained ({trained / total:.2%}{lora})")
    say(f"start      {f'adapter {start.ref} ({start.card.algorithm})' if start else 'the base model'}")
    say(f"arithmetic {precision.trainer} ({precision.why}); rows {layout}")
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
    model: Any,
    data: Prepared,
    val: Prepared | None,
    start: Adapter | None,
    base: Base,
    precision: Precision,
    layout: Layout,
    tokenizer: Any,
) -> tuple[Prepared, Prepared | None]:
    """The examples with the reference's log-probabilities, from the cache where it has them."""
    use_base = cfg.algorithm.reference.value == "base"  # type: ignore[attr-defined]
    if use_base and cfg.peft.kind is Peft.full:
        raise UserError("algorithm.reference=base with peft=full: there is no base below the trained weights.")
    # A new adapter changes nothing yet, so its reference is the base.
    adapter_hash = None if use_base or start is None else start.card.weights_sha256
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
        )
        known = read_cached(kept, key)
        if known is None:
            known = reference_logprobs(
                model,
                split.examples,
                disable_adapter=use_base,
                max_tokens=cfg.data.max_tokens,
                layout=layout,
                pad_id=tokenizer.pad_token_id,
                autocast=torch.bfloat16 if precision.trainer == "bf16-mixed" else None,
            )
            write_cached(kept, key, known)
        else:
            say(f"reference  log-probabilities of {len(known)} pairs read from the cache")
        return Prepared(attach(split.examples, known), split.sources, split.dropped)

    return of(data), of(val) if val else None


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


def _trainer(cfg: Config, precision: Precision, callbacks: list[Any], run: Path) -> Any:
    import lightning as L
    from hydra.utils import instantiate
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    def third_party(group: Any) -> list[Any]:
        parts = [] if group is None else [group] if "_target_" in group else list(group.values())
        return [instantiate(part) for part in parts if part.get("_target_")]

    t = cfg.trainer
    try:
        strategy = third_party(cfg.strategy)
        loggers = third_party(cfg.logger)
        return L.Trainer(
            accelerator=t.accelerator,
            devices=t.devices,
            num_nodes=t.num_nodes,
            strategy=strategy[0] if strategy else "auto",
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
            **t.extra,
        )
    except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
        raise UserError(f"The trainer cannot be set up: {' '.join(str(error).split())}") from error


def _published_metrics(module: Any, best: Any, trainer: Any, datamodule: Any, before: list[Any]) -> dict[str, float]:
    """Put the best checkpoint's weights into the module; held-out metrics of those weights, and before training."""
    metrics: dict[str, float] = {}
    if best.best_model_path:
        kept = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
        module.load_state_dict(kept["state_dict"])
        metrics = dict(kept["lit_ft"]["metrics"])
        metrics["step"] = float(kept["global_step"])
    elif datamodule.val:
        # Too few steps for a validation on the way: measure what is published.
        metrics = dict(trainer.validate(module, datamodule, verbose=False)[0])
    if before:
        metrics |= {f"before/{key.removeprefix('eval/')}": float(value) for key, value in before[0].items()}
    return metrics


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


def _writer(cfg: Config, model: Any, tokenizer: Any) -> Callable[[Path], None]:
    resolved = OmegaConf.to_yaml(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))  # type: ignore[arg-type]

    def write(target: Path) -> None:
        adapt.save_trained(model, target)
        tokenizer.save_pretrained(str(target))
        (target / "config.yaml").write_text(resolved, encoding="utf-8")

    return write
