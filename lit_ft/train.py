"""From a configuration to a published adapter: the one place where the parts of a run are put together."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lit_ft import adapter as folder
from lit_ft.adapter import Adapter
from lit_ft.callbacks.interrupt import Interrupted, stopping_on_signals
from lit_ft.checkpoint import Resumed, find_checkpoint
from lit_ft.checkpoint import before as checkpoint_before
from lit_ft.config import Algorithm, Config, trains_on_votes
from lit_ft.data.chat import ChatEncoder, set_chat_template
from lit_ft.data.datamodule import ExamplesDataModule
from lit_ft.distributed.launched import LOST_ANOTHER, end_with_launcher, how_to_go_on, launched_by_us
from lit_ft.distributed.processes import (
    agree,
    as_in_the_first,
    first_process_first,
    greatest,
    join,
    leave,
    lost_another,
    marks_removed,
    rank,
)
from lit_ft.errors import UserError
from lit_ft.models import adapt
from lit_ft.models.load import load_tokenizer
from lit_ft.previewing.forecast import expected_bytes
from lit_ft.progress import metric_line, say
from lit_ft.reference import reference_logprobs
from lit_ft.resources.memory import account, explain, is_out_of_memory, resident_bytes
from lit_ft.sweep import remove_if_unused, write_result
from lit_ft.wiring.announce import devices_line, first_lines, quiet
from lit_ft.wiring.checks import ONLINE, SHARDED, check_settings, device_number
from lit_ft.wiring.identity import identity_of
from lit_ft.wiring.model import adapter_kind, base_of, choose_layout, layout_line, make_model
from lit_ft.wiring.module import make_module, shared_arguments
from lit_ft.wiring.online import Roles, online_module
from lit_ft.wiring.place import Place, device_of, take_place
from lit_ft.wiring.publish import Trained, publish
from lit_ft.wiring.reference import with_reference
from lit_ft.wiring.replay import answers_of_base, make_anchor, replay
from lit_ft.wiring.rows import read_rows, votes_of
from lit_ft.wiring.start import starting_adapter
from lit_ft.wiring.trainer import make_callbacks, make_mesh, make_trainer, shard_model

# Seconds that the others wait with a mistake, for the first process to say it: they are stopped as soon as one ends.
_FIRST_SPEAKS = 5


def train(cfg: Config) -> Adapter:
    """Run the configured training and return the adapter it published.

    On several devices this is one of as many processes (`lit_ft.distributed.launch`, torchrun or Slurm start them).

    Raises:
        UserError: a mistake in the configuration, the data or the machine's state.
        SystemExit: the run was interrupted (130 for Ctrl-C, 143 for SIGTERM) or lost a process, and nothing is
            published; or this is one of several processes, of which one reports.
    """
    quiet()
    run = _run_folder()
    devices = check_settings(cfg)
    try:
        with stopping_on_signals(), marks_removed():
            end_with_launcher()
            adapter = _train_or_explain(cfg, run, devices)
    except Interrupted as stop:
        say("Stopped; nothing was published.")
        last = stop.checkpoint or run / "checkpoints" / "last.ckpt"  # stopped between the last step and publishing
        if last.exists():
            say(how_to_go_on(last, Path(cfg.runs, cfg.name)))
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
        remove_if_unused(run)  # or this process is not the first of several
    if rank() or launched_by_us():
        raise SystemExit(0)  # whoever started them reports
    return adapter


@dataclass
class _Begun:
    """What there is of a run as it ends too early: what it holds in memory, and where it can be gone on from."""

    place: Place | None = None
    model: Any = None
    module: Any = None
    trainer: Any = None
    last: Path | None = None


def _train_or_explain(cfg: Config, run: Path, devices: int) -> Adapter:
    """Train; where memory runs out, say what filled it; where completions cannot be made or scored, how to go on."""
    begun = _Begun()
    try:
        return _train(cfg, run, devices, begun)
    except UserError:
        if cfg.algorithm.kind in ONLINE and begun.last is not None and begun.last.exists():
            say(how_to_go_on(begun.last, Path(cfg.runs, cfg.name)))
        raise
    except Exception as error:
        if not is_out_of_memory(error) or begun.model is None:
            raise
        traceback.clear_frames(error.__traceback__)  # what they hold is in the way of saying it
        raise UserError(_what_filled_memory(cfg, error, begun)) from error
    finally:
        if cfg.algorithm.kind in ONLINE and begun.module is not None:
            begun.module.close()


def _train(cfg: Config, run: Path, devices: int, begun: _Begun) -> Adapter:
    import lightning as L

    # Who takes part, and what the run begins with.
    device = device_of(cfg.trainer.accelerator)
    ranks = join(device.type, devices, cfg.trainer.num_nodes, alone=cfg.strategy.kind in SHARDED)
    run = agree(lambda: run)
    L.seed_everything(cfg.seed, verbose=False)
    folder.check_name(cfg.name)
    resumed = agree(lambda: find_checkpoint(cfg.resume, Path(cfg.runs, cfg.name), cfg.algorithm.kind.value))
    kind = adapter_kind(cfg)
    start = agree(lambda: starting_adapter(cfg, kind, resumed))
    place = begun.place = take_place(cfg, device, ranks)
    device, precision = place.device, place.precision
    with first_process_first():  # it fills the caches
        base = base_of(cfg)

    # Its rows.
    votes = agree(lambda: votes_of(cfg, base, resumed)) if trains_on_votes(cfg) else None
    tokenizer = load_tokenizer(cfg.model.id)
    set_chat_template(tokenizer, cfg.data.chat_template)
    encoder = ChatEncoder(tokenizer, cfg.data.train_on.value, cfg.data.as_chat)
    data, val = read_rows(cfg, encoder, votes)

    # Its model.
    resident = resident_bytes()
    model = begun.model = make_model(cfg, kind, start, precision)
    roles = None
    if cfg.algorithm.kind in ONLINE:
        roles = Roles(cfg, model, start, base, resumed.identity if resumed else None)
    if adapt.is_adapted(model):
        as_in_the_first(p for p in model.parameters() if p.requires_grad)
    layout, why_padded = choose_layout(cfg, model, device)
    batches: dict[str, Any] = {"layout": layout, "max_tokens": place.max_tokens, "pad_id": tokenizer.pad_token_id}
    own = replay(cfg, kind, encoder, data.examples, partial(answers_of_base, cfg, model, tokenizer, base.hash, place))
    data = own.among(data, cfg.replay.weight, cfg.seed)
    mesh = make_mesh(cfg, device, ranks)
    first_lines(
        cfg, model, start, place, layout_line(layout, why_padded, model, device, precision), data, val, tokenizer
    )
    trainable, _ = adapt.parameter_counts(model)
    forecast = partial(
        expected_bytes,
        cfg,
        adapter_kind(cfg),
        start,
        place,
        data,
        val,
        layout=layout,
        pad_id=tokenizer.pad_token_id,
        resident=resident,
    )
    if mesh is not None:
        shard_model(cfg, model, mesh)
    if ranks.size > 1:
        say(devices_line(cfg, model, ranks))

    # What is trained on them.
    identity = identity_of(cfg, base, data, votes) | dict(own.identity) | (roles.identity if roles else {})
    if resumed is not None:
        resumed.must_be(identity)
    if cfg.algorithm.kind is Algorithm.dpo:
        if mesh is None:
            model.to(device)
        replica, replicas = ranks[:2]
        if mesh is not None:
            replica, replicas = mesh["data_parallel"].get_local_rank(), mesh["data_parallel"].size()
        make = partial(
            reference_logprobs,
            model,
            autocast=precision.autocast,
            device=device,
            rank=replica,
            processes=replicas,
            **batches,
        )
        data, val = with_reference(cfg, kind, make, data, val, start, base, precision)
    if roles is not None:
        module = online_module(
            cfg,
            model,
            roles,
            tokenizer,
            encoder,
            run=run,
            device=device,
            precision=precision,
            shared=shared_arguments(cfg, kind),
            **batches,
        )
    else:
        module = make_module(cfg, model, kind, make_anchor(cfg, own, batches))
    begun.module = module
    module.parent = start.ref if start else None
    module.identity = identity
    datamodule = ExamplesDataModule(
        data.examples,
        val.examples if val else None,
        batch_size=cfg.data.batch_size,
        shuffle=cfg.data.shuffle,
        seed=cfg.seed,
        prompts=roles is not None,
        **batches,
    )
    # A resumed run goes on in its own folder, where the best checkpoint so far lies.
    last = resumed.path.with_name("last.ckpt") if resumed else run / "checkpoints" / "last.ckpt"
    local = range(ranks.local_size if device.type == "cuda" else 0)
    callbacks = make_callbacks(
        cfg,
        module,
        kind,
        last,
        validates=val is not None,
        gpus=[device_number(cfg.trainer.devices, number) for number in local],
        profile=run if cfg.trainer.profile and ranks.rank == 0 else None,
    )
    trainer = make_trainer(cfg, precision, callbacks.every, run, devices, ranks)
    begun.trainer, begun.last = trainer, last

    _fit(cfg, trainer, module, datamodule, resumed, validates=bool(val))
    trainer.save_checkpoint(last)  # should publishing fail, a resume from it publishes without training anew
    if stopped := greatest(callbacks.stopper.received or 0):
        raise Interrupted(stopped, last)
    trained = Trained(
        folder=run,
        kind=kind,
        start=start,
        base=base,
        tokenizer=tokenizer,
        data=data,
        batches=batches,
        module=module,
        trainer=trainer,
        callbacks=callbacks,
        held_out=datamodule if val else None,
        trainable=trainable,
    )
    published = publish(cfg, trained, place, forecast)
    if ranks.rank == 0:
        for path in (last, checkpoint_before(last)):
            path.unlink(missing_ok=True)  # there is nothing left to resume
        write_result(run, published)
    size = sum(path.stat().st_size for path in published.path.glob("*.safetensors"))
    metrics = metric_line(published.card.metrics, module.headline)
    say(f"published {published.ref} ({size:,} bytes of weights): {metrics}")
    return published


def _fit(cfg: Config, trainer: Any, module: Any, datamodule: Any, resumed: Resumed | None, *, validates: bool) -> None:
    """Measure the held-out rows before the first step, and train."""
    try:
        if validates and cfg.trainer.validate_first:
            before = resumed.before if resumed else trainer.validate(module, datamodule, verbose=False)[0]
            module.before = dict(before)
            say("held out before training: " + metric_line(before, module.headline))
        trainer.fit(
            module, datamodule, ckpt_path=resumed.path if resumed else None, weights_only=True if resumed else None
        )
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        raise UserError(f"trainer.val_check_interval={cfg.trainer.val_check_interval}: {error}") from error


def _run_folder() -> Path:
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def _what_filled_memory(cfg: Config, error: Exception, begun: _Begun) -> str:
    """Which part of a step took how much, and what to lower."""
    place = begun.place
    assert place is not None  # the model came after it
    used = account(
        begun.model,
        next(iter(begun.trainer.optimizers), None) if begun.trainer is not None else None,
        begun.module.largest if begun.module is not None else None,
        mixed=place.precision.autocast,
        device=place.device,
        offloaded=cfg.strategy.cpu_offload,
    )
    return explain(
        used,
        error,
        max_tokens=place.max_tokens,
        max_length=cfg.data.max_length,
        gradient_checkpointing=cfg.model.gradient_checkpointing,
        precision=place.precision.trainer,
        peft=cfg.peft.kind.value,
        r=adapt.lora_rank(begun.model),
        strategy=cfg.strategy.kind.value,
        cpu_offload=cfg.strategy.cpu_offload,
    )
