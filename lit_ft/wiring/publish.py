"""From what was trained to the published folder: which weights, what the card says of them, and what lies beside."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lit_ft import adapter as folder
from lit_ft.adapter import Adapter, Base, Canary, Draft
from lit_ft.config import Algorithm, Config
from lit_ft.data.datamodule import Prepared
from lit_ft.distributed.processes import agree, lost_another
from lit_ft.judging import raw_scores
from lit_ft.models import adapt
from lit_ft.models.canary import canary
from lit_ft.models.judge import normalisation, save_judge
from lit_ft.models.kinds import AdapterKind, Published, Report
from lit_ft.models.roles import leave_only
from lit_ft.progress import say
from lit_ft.wiring.checks import ONLINE
from lit_ft.wiring.identity import versions
from lit_ft.wiring.place import Place
from lit_ft.wiring.trainer import Callbacks, best_metrics

# Seconds of training from which on a run's memory is estimated as well, for the report: that takes some itself.
_LONG = 60


@dataclass(frozen=True)
class Trained:
    """What a run has trained, and with what.

    Attributes:
        folder: the run's.
        kind, start, base, tokenizer: of the model.
        data: the rows that it was trained on.
        batches: how they were laid out: `layout`, `max_tokens`, `pad_id`.
        module, trainer, callbacks: of Lightning.
        held_out: the data module where it has held-out rows, or None.
        trainable: parameters that were trained.
    """

    folder: Path
    kind: AdapterKind
    start: Adapter | None
    base: Base
    tokenizer: Any
    data: Prepared
    batches: dict[str, Any]
    module: Any
    trainer: Any
    callbacks: Callbacks
    held_out: Any
    trainable: int


def publish(cfg: Config, run: Trained, place: Place, estimate: Callable[[], int | None]) -> Adapter:
    """Publish the best of what a run trained; all processes call it, and the first one writes.

    Args:
        cfg: the run's settings.
        run: what was trained.
        place: where.
        estimate: of the run's memory. It is asked for after runs that took long.

    Raises:
        UserError: the folder of the adapters cannot be written.
    """
    module, first = run.module, place.ranks.rank == 0
    if run.callbacks.average is not None:
        run.callbacks.average.publish(module)
    metrics = best_metrics(module, run.callbacks.best, run.trainer, run.held_out)
    metrics |= {f"before/{key.removeprefix('eval/')}": float(value) for key, value in module.before.items()}
    report = run.kind.report()
    if report is not None:
        say(report.table)
        if first:
            _keep_report(run.folder, report)
    if cfg.algorithm.kind in ONLINE:
        leave_only(module.model)
    judge = None
    if cfg.algorithm.kind is Algorithm.reward:
        judge = _normalised(run, place)
        metrics |= {"judge/mean": judge[0], "judge/std": judge[1]}
    done = run.kind.published(module.model)
    if cfg.scale != 1:
        done = _weakened(done, cfg.scale)
        if run.held_out is not None:
            module.model = done.model  # what is published is what is measured
            again = run.trainer.validate(module, run.held_out, verbose=False)[0]
            metrics |= {key: float(value) for key, value in again.items() if key.startswith("eval/")}
    if done.converted:
        say(f"converted  {done.converted}")
    reason = _why_not_served(cfg, done.model)
    draft = Draft(
        name=cfg.name,
        base=run.base,
        algorithm=cfg.algorithm.kind.value,
        peft=cfg.peft.kind.value,
        rank=adapt.lora_rank(done.model),
        converted=done.converted,
        data=run.data.sources,
        parent=run.start.ref if run.start else None,
        metrics=metrics,
        versions=versions(run.kind),
        servable=reason is None,
        not_servable_reason=reason,
        canary=_canary(cfg, done.model, run.tokenizer, place) if reason is None else None,
    )
    state = adapt.trained_state(done.model)
    # What rollouts take is not estimated.
    estimated = first and cfg.algorithm.kind not in ONLINE and run.callbacks.history.seconds >= _LONG
    expected = estimate() if estimated else None

    resolved = OmegaConf.to_yaml(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))  # type: ignore[arg-type]

    def write(target: Path) -> None:
        if judge is None:
            adapt.save_trained(done.model, target, state)
        else:
            save_judge(done.model, module.head, target, mean=judge[0], std=judge[1])
        run.callbacks.history.write(
            target,
            num_tokens=module.num_tokens,
            device=place.device,
            estimated_bytes=expected,
            trainable=run.trainable,
        )
        run.tokenizer.save_pretrained(str(target))
        (target / "config.yaml").write_text(resolved, encoding="utf-8")
        if report is not None:
            values = json.dumps(dict(report.values), indent=2) + "\n"
            (target / f"{report.name}.json").write_text(values, encoding="utf-8")

    return agree(lambda: folder.publish(Path(cfg.adapters), draft, write))


def _keep_report(run: Path, report: Report) -> None:
    """Into the run's folder; a full disk is no reason to lose what was trained."""
    try:
        (run / f"{report.name}.txt").write_text(report.table + "\n", encoding="utf-8")
        (run / f"{report.name}.svg").write_text(report.picture, encoding="utf-8")
    except OSError as error:
        say(f"{report.name:<10} could not be kept in {run}: {error.strerror or error}")


def _normalised(run: Trained, place: Place) -> tuple[float, float]:
    """Mean and deviation of a judge's scores over the completions that it was trained on."""
    module = run.module
    left_in = next(module.parameters()).device
    module.to(place.device)
    scores = raw_scores(module.model, module.head, run.data.examples, autocast=place.precision.autocast, **run.batches)
    module.to(left_in)
    return normalisation([score for several in scores for score in several])


def _weakened(done: Published, scale: float) -> Published:
    adapt.weaken(done.model, scale)
    before = f"{done.converted}; " if done.converted else ""
    return replace(done, converted=f"{before}at {scale:g} of its strength")


def _why_not_served(cfg: Config, model: Any) -> str | None:
    if cfg.algorithm.kind is Algorithm.reward:
        return f"it is a judge of answers, not a chat model: train a policy with it, reward={cfg.name}"
    return "it has random weights (model.tiny)" if cfg.model.tiny else adapt.why_not_servable(model)


def _canary(cfg: Config, model: Any, tokenizer: Any, place: Place) -> Canary | None:
    """The canary of what is published, or None where none could be made: that is no reason to lose what was trained."""
    left_in = next(model.parameters()).device  # Lightning brings weights back to main memory
    moved = left_in != place.device and not cfg.strategy.cpu_offload
    try:
        if moved:
            model.to(place.device)
        return canary(model, tokenizer, autocast=place.precision.autocast, device=place.device)
    except Exception as error:
        if lost_another(error):
            raise
        first = next(iter(str(error).splitlines()), "")
        say(f"canary     left out, serving cannot check what it loads by it ({type(error).__name__}: {first})")
        return None
    finally:
        if moved:
            model.to(left_in)
