"""From a configuration to a published adapter: the one place where the pieces are wired together."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from lit_ft import adapter as folder
from lit_ft.adapter import Adapter, Base, Canary, Draft
from lit_ft.allocator import keep_freed_memory
from lit_ft.announce import devices_line, first_lines, quiet
from lit_ft.batches import Example
from lit_ft.callbacks.interrupt import Interrupted, stopping_on_signals
from lit_ft.checkpoint import Resumed, find_checkpoint
from lit_ft.checkpoint import before as checkpoint_before
from lit_ft.checks import ONLINE, SHARDED, check_settings, device_number
from lit_ft.config import Algorithm, Config, Packing, trains_on_votes
from lit_ft.data.chat import ChatEncoder, set_chat_template
from lit_ft.data.datamodule import ExamplesDataModule, Mix, Prepared, load_examples, mixed
from lit_ft.data.formats import Kind
from lit_ft.data.packing import Layout
from lit_ft.data.votes import Votes, read_votes
from lit_ft.distributed import (
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
from lit_ft.forecast import expected_bytes
from lit_ft.judging import raw_scores
from lit_ft.launched import LOST_ANOTHER, end_with_launcher, how_to_go_on, launched_by_us
from lit_ft.machine import choose_threads, tokens_per_pass
from lit_ft.memory import account, explain, is_out_of_memory
from lit_ft.models import adapt
from lit_ft.models.canary import canary
from lit_ft.models.judge import normalisation, save_judge
from lit_ft.models.kinds import KINDS, AdapterKind, Report
from lit_ft.models.load import context_length, load_model, load_tokenizer
from lit_ft.models.precision import Precision, choose_precision
from lit_ft.models.resolve import cache_folder, model_fingerprint
from lit_ft.models.roles import leave_only
from lit_ft.models.score import attention_backend, check_scoring, use_packed_attention
from lit_ft.modules.anchor import Anchor
from lit_ft.preview import resident_bytes
from lit_ft.progress import metric_line, say
from lit_ft.reference import attach, read_cached, reference_key, reference_logprobs, write_cached
from lit_ft.replay import Replayed, base_answers, replayed
from lit_ft.rlhf import Roles, online_module
from lit_ft.sweep import write_result
from lit_ft.trainer import best_metrics, make_callbacks, make_mesh, make_trainer, mapping, shard_model

# Seconds that the others wait with a mistake, for the first process to say it: they are stopped as soon as one ends.
_FIRST_SPEAKS = 5
# Seconds of training from which on a run's memory is estimated as well, for the report: that takes some itself.
_LONG = 60


def train(cfg: Config) -> Adapter:
    """Run the configured training and return the adapter it published.

    On several devices this is one of as many processes (`lit_ft.launch`, torchrun or Slurm start them).

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
        if {path.name for path in run.glob("*")} <= {"hydra"}:
            shutil.rmtree(run, ignore_errors=True)  # it ended before it began, or is not the first of several
    if rank() or launched_by_us():
        raise SystemExit(0)  # whoever started them reports
    return adapter


def _train_or_explain(cfg: Config, run: Path, devices: int) -> Adapter:
    """Train; where memory runs out, say what filled it; where completions cannot be made or scored, how to go on."""
    begun: dict[str, Any] = {}
    try:
        return _train(cfg, run, devices, begun)
    except UserError:
        if cfg.algorithm.kind in ONLINE and (last := begun.get("last")) is not None and last.exists():
            say(how_to_go_on(last, Path(cfg.runs, cfg.name)))
        raise
    except Exception as error:
        if not is_out_of_memory(error) or "model" not in begun:
            raise
        traceback.clear_frames(error.__traceback__)  # what they hold is in the way of saying it
        begun.pop("last", None)
        raise UserError(_what_filled_memory(cfg, error, **begun)) from error
    finally:
        if cfg.algorithm.kind in ONLINE and "module" in begun:
            begun["module"].close()


def _train(cfg: Config, run: Path, devices: int, begun: dict[str, Any]) -> Adapter:
    import lightning as L

    device = _device(cfg.trainer.accelerator)
    ranks = join(device.type, devices, cfg.trainer.num_nodes, alone=cfg.strategy.kind in SHARDED)
    run = agree(lambda: run)
    L.seed_everything(cfg.seed, verbose=False)
    folder.check_name(cfg.name)
    adapters = Path(cfg.adapters)
    resumed = agree(lambda: find_checkpoint(cfg.resume, Path(cfg.runs, cfg.name), cfg.algorithm.kind.value))
    kind = _kind(cfg)
    start = agree(lambda: _start(cfg, kind, adapters, resumed))
    if device.type == "cuda":
        device = torch.device("cuda", device_number(cfg.trainer.devices, ranks.local_rank))
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    threads = choose_threads(cfg.trainer.threads, device, ranks.local_size)
    torch.set_num_threads(threads.count)
    precision = agree(lambda: choose_precision(cfg.trainer.precision, device))
    max_tokens = cfg.data.max_tokens or tokens_per_pass(device)
    with first_process_first():  # it fills the caches
        base_hash = "sha256:tiny" if cfg.model.tiny else model_fingerprint(cfg.model.id)

    base = Base(_base_id(cfg.model.id), base_hash)
    votes = agree(lambda: _votes(cfg, base, resumed)) if trains_on_votes(cfg) else None
    tokenizer = load_tokenizer(cfg.model.id)
    set_chat_template(tokenizer, cfg.data.chat_template)
    encoder = ChatEncoder(tokenizer, cfg.data.train_on.value, cfg.data.as_chat)
    data, val = _examples(cfg, encoder, votes)
    resident = resident_bytes()
    model = _model(cfg, kind, start, precision)
    roles = None
    if cfg.algorithm.kind in ONLINE:
        roles = Roles(cfg, model, start, base, resumed.identity if resumed else None)
    begun |= {"model": model, "precision": precision, "max_tokens": max_tokens, "device": device}
    if adapt.is_adapted(model):
        as_in_the_first(p for p in model.parameters() if p.requires_grad)
    layout, why_padded = _layout(cfg, model, device)
    if layout != "padded":
        rows = "packed, attention by " + attention_backend(model, device, precision.trainer == "bf16-mixed")
    else:
        rows = f"padded ({why_padded})"
    rows += f", up to {max_tokens:,} tokens a pass"
    own = replayed(
        cfg,
        kind,
        encoder,
        data.examples,
        partial(_answers_of_base, cfg, model, tokenizer, base.hash, precision, device),
    )
    if own.mixed is not None:
        data = mixed(data, [(own.mixed, cfg.replay.weight)], cfg.seed)
    mesh = make_mesh(cfg, device, ranks)
    replica, replicas = (mesh["data_parallel"].get_local_rank(), mesh["data_parallel"].size()) if mesh else ranks[:2]
    first_lines(cfg, model, start, precision, threads, rows, data, val, tokenizer)
    trainable, _ = adapt.parameter_counts(model)
    forecast = partial(
        expected_bytes,
        cfg,
        _kind(cfg),
        start,
        precision,
        data,
        val,
        layout=layout,
        pad_id=tokenizer.pad_token_id,
        device=device,
        processes=ranks.size,
        resident=resident,
    )
    if mesh is not None:
        shard_model(cfg, model, mesh)
    if ranks.size > 1:
        say(devices_line(cfg, model, ranks))

    identity = _identity(cfg, base, data, votes) | dict(own.identity) | (roles.identity if roles else {})
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
        data, val = _with_reference(cfg, kind, make, data, val, start, base, precision)
    batches: dict[str, Any] = {"layout": layout, "max_tokens": max_tokens, "pad_id": tokenizer.pad_token_id}
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
            shared=_shared(cfg, kind),
            **batches,
        )
    else:
        module = _module(cfg, model, kind, _anchor(cfg, own, batches))
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
    gpus = [device_number(cfg.trainer.devices, number) for number in local]
    best, stopper, history, average, callbacks = make_callbacks(
        cfg, module, kind, last, validates=val is not None, gpus=gpus
    )
    if cfg.trainer.profile and ranks.rank == 0:
        from lit_ft.callbacks.profile import ProfileSteps

        callbacks.insert(0, ProfileSteps(run))  # first, so that a step ends before others save or stop
    trainer = make_trainer(cfg, precision, callbacks, run, devices, ranks)
    begun |= {"module": module, "trainer": trainer, "last": last}

    before: list[Any] = []
    try:
        if val and cfg.trainer.validate_first:
            before = [resumed.before] if resumed else trainer.validate(module, datamodule, verbose=False)
            module.before = dict(before[0])
            say("held out before training: " + metric_line(before[0], module.headline))
        trainer.fit(
            module, datamodule, ckpt_path=resumed.path if resumed else None, weights_only=True if resumed else None
        )
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        raise UserError(f"trainer.val_check_interval={cfg.trainer.val_check_interval}: {error}") from error
    trainer.save_checkpoint(last)  # should publishing fail, a resume from it publishes without training anew
    if stopped := greatest(stopper.received or 0):
        raise Interrupted(stopped, last)

    if average is not None:
        average.publish(module)
    metrics = best_metrics(module, best, trainer, datamodule if val else None)
    metrics |= {f"before/{key.removeprefix('eval/')}": float(value) for key, value in module.before.items()}
    report = kind.report()
    if report is not None:
        say(report.table)
        if ranks.rank == 0:
            _keep_report(run, report)
    if roles is not None:
        leave_only(module.model)
    judge = None
    if cfg.algorithm.kind is Algorithm.reward:
        judge = _normalised(module, data, precision, device, **batches)
        metrics |= {"judge/mean": judge[0], "judge/std": judge[1]}
    done = kind.published(module.model)
    if cfg.scale != 1:
        adapt.weaken(done.model, cfg.scale)
        done = replace(
            done, converted=f"{done.converted + '; ' if done.converted else ''}at {cfg.scale:g} of its strength"
        )
        if val is not None:
            module.model = done.model  # what is published is what is measured
            again = trainer.validate(module, datamodule, verbose=False)[0]
            metrics |= {key: float(value) for key, value in again.items() if key.startswith("eval/")}
    if done.converted:
        say(f"converted  {done.converted}")
    reason = "it has random weights (model.tiny)" if cfg.model.tiny else adapt.why_not_servable(done.model)
    if judge is not None:
        reason = f"it is a judge of answers, not a chat model: train a policy with it, reward={cfg.name}"
    draft = Draft(
        name=cfg.name,
        base=base,
        algorithm=cfg.algorithm.kind.value,
        peft=cfg.peft.kind.value,
        rank=adapt.lora_rank(done.model),
        converted=done.converted,
        data=data.sources,
        parent=start.ref if start else None,
        metrics=metrics,
        versions=_versions(kind),
        servable=reason is None,
        not_servable_reason=reason,
        canary=_canary(cfg, done.model, tokenizer, precision, device) if reason is None else None,
    )
    state = adapt.trained_state(done.model)
    expected = None
    if ranks.rank == 0 and roles is None and history.seconds >= _LONG:  # what rollouts take is not estimated
        expected = forecast()

    def save(target: Path) -> None:
        if judge is None:
            adapt.save_trained(done.model, target, state)
        else:
            save_judge(done.model, module.head, target, mean=judge[0], std=judge[1])
        history.write(
            target, num_tokens=module.num_tokens, device=device, estimated_bytes=expected, trainable=trainable
        )

    write = _writer(cfg, save, tokenizer, report)
    published = agree(lambda: folder.publish(adapters, draft, write))
    if ranks.rank == 0:
        for path in (last, checkpoint_before(last)):
            path.unlink(missing_ok=True)  # there is nothing left to resume
        write_result(run, published)
    size = sum(path.stat().st_size for path in published.path.glob("*.safetensors"))
    say(f"published {published.ref} ({size:,} bytes of weights): " + metric_line(metrics, module.headline))
    return published


def _keep_report(run: Path, report: Report) -> None:
    """Into the run's folder; a full disk is no reason to lose what was trained."""
    try:
        (run / f"{report.name}.txt").write_text(report.table + "\n", encoding="utf-8")
        (run / f"{report.name}.svg").write_text(report.picture, encoding="utf-8")
    except OSError as error:
        say(f"{report.name:<10} could not be kept in {run}: {error.strerror or error}")


def _run_folder() -> Path:
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def _start(cfg: Config, kind: AdapterKind, adapters: Path, resumed: Resumed | None) -> Adapter | None:
    """The adapter that training begins with, or None for the base."""
    if resumed is not None:
        # What the interrupted run began with, even if newer adapters were published meanwhile.
        return folder.find(adapters, resumed.parent) if resumed.parent else None
    if cfg.start_from == "none":
        return None
    if cfg.start_from == "auto":
        if cfg.algorithm.kind in (Algorithm.sft, Algorithm.reward):
            return None
        both = trains_on_votes(cfg) or cfg.algorithm.kind in ONLINE
        start = _newest(adapters, cfg.name, ("sft", "dpo") if both else ("sft",), kind)
    else:
        start = folder.find(adapters, cfg.start_from)
    if start is not None and start.card.algorithm == "reward":
        raise UserError(
            f"{start.ref} is a judge, which cannot go on as anything else: give another start_from, or start_from=none."
        )
    if start is not None and not cfg.model.tiny and start.card.base.hash != model_fingerprint(cfg.model.id):
        raise UserError(
            f"{start.ref} was trained on {start.card.base.id}, and model.id={cfg.model.id} is another model. "
            "Choose that model, another name, or start_from=none."
        )
    return start


def _newest(adapters: Path, name: str, algorithms: Sequence[str], kind: AdapterKind) -> Adapter | None:
    """The newest readable version of `name` that one of `algorithms` made and `kind` goes on from.

    Says what it passes over; several versions that cannot be gone on from share a line with the newest one's reason.
    """
    left: list[str] = []
    found, reason = None, ""
    for _, _, path in reversed(folder.version_folders(adapters, name)):
        try:
            one = folder.read(path)
            why_not = kind.why_not_from(path) if one.card.algorithm in algorithms else None
        except UserError as error:
            say(f"left out   {error}")
            continue
        if one.card.algorithm not in algorithms:
            continue
        if why_not is None:
            found = one
            break
        left.append(one.ref)
        reason = reason or why_not
    if left:
        older = f" (and {', '.join(left[1:])})" if left[1:] else ""
        say(f"left out   {left[0]}{older} {reason}")
    return found


def _votes(cfg: Config, base: Base, resumed: Resumed | None) -> Votes:
    """The votes to train on; for a resumed run those that there were when it began."""
    until = resumed.identity.get("votes.until") if resumed else None
    votes = read_votes(
        cfg.data.path,
        base,
        min_votes=cfg.data.min_votes,  # type: ignore[attr-defined]
        val_split=0 if cfg.data.val_path is not None or cfg.data.max_val_rows == 0 else cfg.data.val_split,
        until=int(until) if until else None,
        any_weights=cfg.model.tiny,
    )
    say(f"votes      {votes.summary}")
    return votes


def _identity(cfg: Config, base: Base, data: Prepared, votes: Votes | None) -> dict[str, str]:
    """What a checkpoint must have in common with the run that resumes it."""
    chosen = {
        f"{group}.{key!s}": str(value)
        for group, settings in (("algorithm", cfg.algorithm), ("peft", cfg.peft))
        for key, value in OmegaConf.to_container(settings).items()  # type: ignore[union-attr, arg-type]
    }
    return {
        **chosen,
        "algorithm": cfg.algorithm.kind.value,
        "model": base.hash,
        "data": ", ".join(f"{d.source} {d.hash} {d.rows}" for d in data.sources),
        "data.batch_size": str(cfg.data.batch_size),
        "data.max_length": str(cfg.data.max_length),
        "data.train_on": cfg.data.train_on.value,
        "data.chat_template": str(cfg.data.chat_template),
        "data.shuffle": str(cfg.data.shuffle),
        "replay": cfg.replay.kind.value,
        "trainer.kl_weight": str(cfg.trainer.kl_weight),
        "trainer.ema_decay": str(cfg.trainer.ema_decay),
        "seed": str(cfg.seed),
        **({"votes.until": str(votes.newest)} if votes else {}),
    }


def _device(accelerator: str) -> torch.device:
    usable = torch.cuda.is_available() and accelerator in {"auto", "gpu", "cuda"}
    return torch.device("cuda" if usable else "cpu")


# What rows are to give, by what is trained on them.
_ROWS: dict[Algorithm, Kind] = {
    Algorithm.sft: "sft",
    Algorithm.dpo: "preference",
    Algorithm.reward: "ranked",
    Algorithm.ppo: "prompt",
    Algorithm.grpo: "prompt",
}


def _examples(cfg: Config, encoder: ChatEncoder, votes: Votes | None) -> tuple[Prepared, Prepared | None]:
    kind = _ROWS[cfg.algorithm.kind]
    return load_examples(
        votes.train if votes else cfg.data.path,
        encoder,
        kind,
        val_path=votes.held_out if votes and votes.held_out else cfg.data.val_path,
        val_split=0 if votes else cfg.data.val_split,  # votes come split, by prompt
        split=cfg.data.split,
        held_out_split=cfg.data.held_out_split,
        mix=[Mix(part.path, part.weight, part.split) for part in cfg.data.mix],
        max_val_rows=cfg.data.max_val_rows,
        max_rows=cfg.data.max_rows,
        seed=cfg.seed,
        max_length=cfg.data.max_length,
        columns=mapping("data.columns", cfg.data.columns),
        overflow=cfg.data.overflow.value,
        max_dropped=cfg.data.max_dropped,
        room=getattr(cfg.algorithm, "max_new_tokens", 0),
    )


def _kind(cfg: Config) -> AdapterKind:
    """The adapter's kind with its settings."""
    own = {"kind", "learning_rate_factor", "loraplus_lr_ratio"}  # not the adapter's: the optimizer's
    settings = {key: value for key, value in mapping("peft", cfg.peft).items() if key not in own}
    return KINDS[cfg.peft.kind.value](**{key: _plain(value) for key, value in settings.items()})


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _model(cfg: Config, kind: AdapterKind, start: Adapter | None, precision: Precision) -> Any:
    model = load_model(
        cfg.model.id,
        dtype=torch.float32 if kind.whole_model else precision.weights,
        attention=cfg.model.attention,
        tiny=cfg.model.tiny,
        four_bits=kind.quantized,
    )
    reach = context_length(model)
    if reach is not None and cfg.data.max_length > reach:
        raise UserError(f"data.max_length={cfg.data.max_length} is beyond the model's context of {reach} tokens.")
    if cfg.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return kind.go_on(model, start.path, start.ref) if start is not None else kind.begin(model)


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


def _with_reference(
    cfg: Config,
    kind: AdapterKind,
    make: Callable[..., list[tuple[float, ...]]],
    data: Prepared,
    val: Prepared | None,
    start: Adapter | None,
    base: Base,
    precision: Precision,
) -> tuple[Prepared, Prepared | None]:
    """The examples with the reference's log-probabilities, from the cache where it has them, else from `make`."""
    use_base = cfg.algorithm.reference.value == "base"  # type: ignore[attr-defined]
    if use_base and (kind.whole_model or kind.changes_base):
        raise UserError(
            f"algorithm.reference=base with peft={cfg.peft.kind.value}: there is no base below the trained weights. "
            "Training begins with the base itself, so use algorithm.reference=initial."
        )
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
            gathered_as=str(cfg.strategy.param_dtype),
            model=cfg.model.id if cfg.model.tiny else None,
            # What computes them may change from one version to the next.
            versions=_versions(kind),
            # What these begin with differs from the base by rounding, to 4 bits or of what is left of a weight.
            begun_as=cfg.peft.kind.value if kind.quantized or kind.changes_base else None,
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


def _shared(cfg: Config, kind: AdapterKind) -> dict[str, Any]:
    """Arguments that every module takes."""
    algorithm = cfg.algorithm
    return {
        "learning_rate": algorithm.learning_rate * cfg.peft.learning_rate_factor,
        "loraplus_lr_ratio": getattr(cfg.peft, "loraplus_lr_ratio", 1.0),
        "penalty": kind.penalty,
        "lr_scheduler_type": algorithm.lr_scheduler_type,
        "warmup_ratio": algorithm.warmup_ratio,
        "weight_decay": algorithm.weight_decay,
        "adam_beta1": algorithm.adam_beta1,
        "adam_beta2": algorithm.adam_beta2,
        "adam_epsilon": algorithm.adam_epsilon,
        "max_grad_norm": algorithm.max_grad_norm,
    }


def _answers_of_base(
    cfg: Config,
    model: Any,
    tokenizer: Any,
    base_hash: str,
    precision: Precision,
    device: torch.device,
    prompts: list[tuple[int, ...]],
    below: bool,
) -> list[Example]:
    autocast = torch.bfloat16 if precision.trainer == "bf16-mixed" else None
    # Random weights differ from run to run: their seed is part of what they are.
    tiny = [cfg.seed, cfg.model.id] if cfg.model.tiny else None

    def make() -> list[Example]:
        return base_answers(
            model.to(device),
            tokenizer,
            prompts,
            max_new_tokens=cfg.replay.max_new_tokens,
            kept=cache_folder() / "replay",
            depends_on=[
                base_hash,
                tiny,
                precision.trainer,
                str(precision.weights),
                device.type,
                *(["4 bits"] if KINDS[cfg.peft.kind.value].quantized else []),
            ],
            below=below,
            autocast=autocast,
        )

    return agree(make)


def _anchor(cfg: Config, own: Replayed, batches: dict[str, Any]) -> Anchor | None:
    """What holds the policy to its base, or None."""
    if not (own.trained or own.held_out):
        return None
    algorithm: Any = cfg.algorithm
    return Anchor(
        own.trained,
        own.held_out,
        kl_coef=algorithm.kl_coef,
        weight=cfg.trainer.kl_weight,
        batch_size=algorithm.kl_batch_size,
        seed=cfg.seed,
        **batches,
    )


def _module(cfg: Config, model: Any, kind: AdapterKind, anchor: Anchor | None) -> Any:
    from lit_ft.modules import DPOModule, RewardModule, SFTModule

    algorithm, shared = cfg.algorithm, _shared(cfg, kind)
    if algorithm.kind is Algorithm.sft:
        return SFTModule(model, anchor=anchor, **shared)
    if algorithm.kind is Algorithm.reward:
        center = algorithm.center_rewards_coefficient  # type: ignore[attr-defined]
        return RewardModule(model, center_coefficient=center, **shared)
    return DPOModule(
        model,
        beta=algorithm.beta,  # type: ignore[attr-defined]
        loss_type=algorithm.loss_type.value,  # type: ignore[attr-defined]
        label_smoothing=algorithm.label_smoothing,  # type: ignore[attr-defined]
        reference=algorithm.reference.value,  # type: ignore[attr-defined]
        anchor=anchor,
        **shared,
    )


def _normalised(
    module: Any, data: Prepared, precision: Precision, device: torch.device, **batches: Any
) -> tuple[float, float]:
    """Mean and deviation of a judge's scores over the completions that it was trained on."""
    left_in = next(module.parameters()).device
    module.to(device)
    autocast = torch.bfloat16 if precision.trainer == "bf16-mixed" else None
    scores = raw_scores(module.model, module.head, data.examples, autocast=autocast, **batches)
    module.to(left_in)
    return normalisation([score for several in scores for score in several])


def _canary(cfg: Config, model: Any, tokenizer: Any, precision: Precision, device: torch.device) -> Canary | None:
    """The canary of what is published, or None where none could be made: that is no reason to lose what was trained."""
    left_in = next(model.parameters()).device  # Lightning brings weights back to main memory
    moved = left_in != device and not cfg.strategy.cpu_offload
    try:
        if moved:
            model.to(device)
        autocast = torch.bfloat16 if precision.trainer == "bf16-mixed" else None
        return canary(model, tokenizer, autocast=autocast, device=device)
    except Exception as error:
        if lost_another(error):
            raise
        first = next(iter(str(error).splitlines()), "")
        say(f"canary     left out, serving cannot check what it loads by it ({type(error).__name__}: {first})")
        return None
    finally:
        if moved:
            model.to(left_in)


def _what_filled_memory(
    cfg: Config,
    error: Exception,
    *,
    model: Any,
    precision: Precision,
    max_tokens: int,
    device: torch.device,
    module: Any = None,
    trainer: Any = None,
) -> str:
    """Which part of a step took how much, and what to lower."""
    used = account(
        model,
        next(iter(trainer.optimizers), None) if trainer is not None else None,
        module.largest if module is not None else None,
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
        r=adapt.lora_rank(model),
        strategy=cfg.strategy.kind.value,
        cpu_offload=cfg.strategy.cpu_offload,
    )


def _versions(kind: AdapterKind) -> dict[str, str]:
    found = {}
    for name in ("lit_ft", "torch", "lightning", "transformers", "peft", *(["bitsandbytes"] if kind.quantized else [])):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source"
    return found


def _writer(cfg: Config, save: Callable[[Path], None], tokenizer: Any, report: Report | None) -> Callable[[Path], None]:
    resolved = OmegaConf.to_yaml(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))  # type: ignore[arg-type]

    def write(target: Path) -> None:
        save(target)
        tokenizer.save_pretrained(str(target))
        (target / "config.yaml").write_text(resolved, encoding="utf-8")
        if report is not None:
            values = json.dumps(dict(report.values), indent=2) + "\n"
            (target / f"{report.name}.json").write_text(values, encoding="utf-8")

    return write
