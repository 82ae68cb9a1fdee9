"""Lightning's Trainer as the settings describe it: strategy, callbacks, loggers; and the best of what it kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_ft.callbacks.interrupt import FinishStepOnSignal
from lit_ft.checkpoint import SafeCheckpointIO
from lit_ft.config import Config, FloatFormat, Strategy
from lit_ft.distributed.processes import Ranks, agree
from lit_ft.errors import UserError
from lit_ft.models.kinds import AdapterKind
from lit_ft.models.precision import Precision
from lit_ft.models.score import score_gathered
from lit_ft.models.shard import shard
from lit_ft.wiring.checks import SHARDED
from lit_ft.wiring.settings import mapping


class Callbacks(NamedTuple):
    """Those of a run.

    Attributes:
        best: keeps the best weights.
        stopper: watches for signals.
        history: what happened, step by step.
        average: averages the weights, or None.
        every: all, these among them.
    """

    best: Any
    stopper: FinishStepOnSignal
    history: Any
    average: Any
    every: list[Any]


def make_callbacks(
    cfg: Config,
    module: Any,
    kind: AdapterKind,
    last: Path,
    *,
    validates: bool,
    gpus: Sequence[int] = (),
    profile: Path | None = None,
) -> Callbacks:
    """The callbacks that the settings ask for.

    Args:
        cfg: says which.
        module: that is trained.
        kind: of its adapter.
        last: where the last checkpoint goes; the best one goes beside it.
        validates: whether there are held-out rows.
        gpus: whose energy is counted.
        profile: the folder for the profile of the steps, or None for none.

    Raises:
        UserError: a setting needs held-out rows, and there are none.
    """
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    from lit_ft.callbacks.adapter_kind import BestCheckpoint, FollowKind
    from lit_ft.callbacks.averaging import AverageWeights
    from lit_ft.callbacks.history import History
    from lit_ft.callbacks.progress_bar import TrainingBar

    best = BestCheckpoint(
        kind,
        dirpath=last.parent,
        filename="best",
        monitor=module.monitor if validates else None,
        mode=module.monitor_mode,
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
    history = History(gpus)
    # Before those that save, so that a checkpoint holds what led to it.
    callbacks: list[Any] = [FollowKind(kind), history, best, regular, stopper]
    average = None
    if cfg.trainer.ema_decay is not None:
        average = AverageWeights(cfg.trainer.ema_decay)
        callbacks.insert(callbacks.index(best) + 1, average)  # after a validation `best` saves what it puts away
    if cfg.trainer.progress:
        callbacks.append(TrainingBar())
    if cfg.trainer.kl_weight and not validates:
        raise UserError("trainer.kl_weight needs held-out rows: set data.val_path or data.val_split.")
    if cfg.trainer.early_stopping is not None:
        if not validates:
            raise UserError("trainer.early_stopping needs held-out rows: set data.val_path or data.val_split.")
        callbacks.append(EarlyStopping(module.monitor, mode=module.monitor_mode, patience=cfg.trainer.early_stopping))
    if profile is not None:
        from lit_ft.callbacks.profile import ProfileSteps

        callbacks.insert(0, ProfileSteps(profile))  # first, so that a step ends before others save or stop
    return Callbacks(best, stopper, history, average, callbacks)


def make_strategy(cfg: Config, ranks: Ranks) -> Any:
    """Lightning's strategy, or its name."""
    from lit_ft.distributed.strategy import ShardedStrategy, ddp

    wanted, extra = cfg.strategy, mapping("strategy.extra", cfg.strategy.extra)
    if set_already := {"timeout", "process_group_backend"} & set(extra):
        raise UserError(f"strategy.extra.{min(set_already)} has no effect: the processes have met before.")
    if wanted.kind in SHARDED:
        parts = wanted.tensor_parallel_size
        return ShardedStrategy(ranks.size // parts, parts, cpu_offload=wanted.cpu_offload, **extra)
    if wanted.kind is Strategy.ddp or ranks.size > 1:
        return ddp(**extra)
    return "auto"


def make_trainer(cfg: Config, precision: Precision, callbacks: list[Any], run: Path, devices: int, ranks: Ranks) -> Any:
    """The Trainer.

    Raises:
        UserError: Lightning refuses the settings.
    """
    import lightning as L
    from hydra.utils import instantiate
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    def third_party(group: Any) -> list[Any]:
        parts = [] if group is None else [group] if "_target_" in group else list(group.values())
        return [instantiate(part) for part in parts if part.get("_target_")]

    t = cfg.trainer
    extra = mapping("trainer.extra", t.extra)
    for key, ours in (("accumulate_grad_batches", "data.batch_size"), ("gradient_clip_val", "algorithm.max_grad_norm")):
        if key in extra:
            raise UserError(f"trainer.extra.{key} has no effect here, where steps are taken by hand: use {ours}.")
    try:
        strategy = make_strategy(cfg, ranks)
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
            # FSDP keeps what it gathers, and training cannot go on with tensors made in inference mode.
            inference_mode=cfg.strategy.kind not in SHARDED,
            **extra,
        )
    except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
        raise UserError(f"The trainer cannot be set up: {' '.join(str(error).split())}") from error


def make_mesh(cfg: Config, device: torch.device, ranks: Ranks) -> Any:
    """The devices in two dimensions, for a strategy that shards; else None."""
    if cfg.strategy.kind not in SHARDED:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    parts = cfg.strategy.tensor_parallel_size
    names = ("data_parallel", "tensor_parallel")
    return init_device_mesh(device.type, (ranks.size // parts, parts), mesh_dim_names=names)


def shard_model(cfg: Config, model: Any, mesh: Any) -> None:
    """Shard `model` over `mesh`, in place, as the settings say."""
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


def best_metrics(module: Any, best: Any, trainer: Any, datamodule: Any) -> dict[str, float]:
    """Put the best weights into the module, the last ones among the candidates, and return their held-out metrics."""
    if datamodule is None:
        return {"step": float(trainer.global_step)}
    from lit_ft.distributed.strategy import load_trained

    # What the file says, and not the callback: where the disk was full the file is of an earlier step, or not there.
    path = Path(best.best_model_path)
    there = agree(path.is_file)  # as the first process sees it: shared disks may show others something else
    kept = torch.load(path, map_location="cpu", weights_only=True) if there else None
    final = trainer.callback_metrics
    if module.validated_at != trainer.global_step:  # the run ended between two validations
        final = trainer.validate(module, datamodule, verbose=False)[0]
    final = {key: float(value) for key, value in final.items() if key.startswith("eval/")}
    sign = -1 if module.monitor_mode == "max" else 1
    better = kept is None or agree(
        lambda: sign * final[module.monitor] < sign * kept["lit_ft"]["metrics"][module.monitor]
    )
    if kept is None or better:
        return {**final, "step": float(trainer.global_step)}
    load_trained(module, kept["state_dict"])
    return {**kept["lit_ft"]["metrics"], "step": float(kept["global_step"])}
