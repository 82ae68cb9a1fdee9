"""The wiring of a report: loads the two models and the rows, and has the sections made."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lit_ft.adapter import ADAPTER_WEIGHTS, HISTORY, Card, DataSource, weights_sha256
from lit_ft.adapter import Base as CardBase
from lit_ft.batches import Example
from lit_ft.data.chat import ChatEncoder
from lit_ft.data.datamodule import load_examples
from lit_ft.data.files import examples_folder, open_source
from lit_ft.data.votes import read_votes
from lit_ft.errors import UserError
from lit_ft.evaluation.bias import bias, read_pairs
from lit_ft.evaluation.cost import Cost, cost
from lit_ft.evaluation.forgetting import forgetting
from lit_ft.evaluation.gain import Metric, exact_match, gain
from lit_ft.evaluation.general import instruction_examples, rows_by_category
from lit_ft.evaluation.harness import Tasks, add_tasks
from lit_ft.evaluation.overfitting import overfitting
from lit_ft.evaluation.report import Report
from lit_ft.evaluation.section import Section
from lit_ft.evaluation.subject import Kept, Subject
from lit_ft.exporting.adapted import load_adapted, load_base, load_tokenizer, read_model
from lit_ft.exporting.source import Base, Source, find_base
from lit_ft.models.adapt import causal_lm
from lit_ft.models.kinds.base import config_in
from lit_ft.models.load import context_length
from lit_ft.models.precision import PRECISIONS, Precision, choose_precision
from lit_ft.models.resolve import cache_folder
from lit_ft.models.roles import POLICY, add_role
from lit_ft.progress import say

_ONLINE = ("ppo", "grpo")


@dataclass(frozen=True)
class Rows:
    """What a report measures on."""

    train: list[Example]
    held_out: list[Example]
    unknown: str | None = None
    """Why nobody can say which rows were trained on; `train` is then what would be trained on today."""
    doubtful: bool = False
    """Whether, for that reason, rows of `held_out` may have been trained on."""


@dataclass(frozen=True)
class Asked:
    """What a report is to hold; each attribute is a key of conf/evaluate.yaml, where they are explained."""

    sections: tuple[str, ...]
    model: str | None
    data_path: str | None
    val_path: str | None
    columns: Mapping[str, str] | None
    rows: int
    metric: str | None
    metric_rows: int
    answered: int
    max_new_tokens: int
    texts: str | None
    instructions: str | None
    pairs: str | None
    own_answers: int
    kl_threshold: float | None
    probed: int
    max_tokens: int
    precision: str = "32-true"
    lm_eval: Tasks | None = None


def compare(source: Source, other: Source | None, asked: Asked) -> Report:
    """The report on `source`, beside its base or beside `other`.

    A section that cannot be made says why, and the others are made all the same.

    Raises:
        UserError: there is no base for the adapter, it is a judge, or the two do not belong together.
    """
    for one in (source, other):
        if one is not None and one.card is not None and one.card.algorithm == "reward":
            raise UserError(f"{one.name} is a judge: it answers nothing. How often it is right, its card says.")
    metric = find_metric(asked.metric)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_precision(asked.precision)
    precision = choose_precision(asked.precision, device)
    base = find_base(source, asked.model)
    if other is not None and find_base(other, asked.model).hash != base.hash:
        raise UserError(f"{source.name} and {other.name} were made for different bases: give two of one base.")
    tokenizer = load_tokenizer(source, base)
    before, tuned = _subjects(source, other, base, tokenizer, asked.max_tokens, device, precision)
    settings = _settings(source)
    given: list[Rows] = []

    def rows() -> Rows:
        if not given:
            given.append(_rows(source, base, tokenizer, settings, asked))
            if given[0].unknown is not None:
                say(f"warning    {given[0].unknown}")
        return given[0]

    def gain_on_rows() -> Section:
        found = rows()
        made = gain(
            before,
            tuned,
            found.held_out,
            metric=metric,
            scored=asked.rows,
            metric_rows=asked.metric_rows,
            max_new_tokens=asked.max_new_tokens,
            answered=asked.answered,
        )
        if not found.doubtful:
            return made
        warning = f"{found.unknown} Rows that are held out here may have been trained on."
        return replace(made, warnings=(warning, *made.warnings))

    def made_gain() -> Section:
        if asked.lm_eval is None:
            return gain_on_rows()
        return add_tasks(_made("gain", "Gain", gain_on_rows, quiet=True), before, tuned, asked.lm_eval)

    def made_forgetting() -> Section:
        keys = ("prompt", "completion")
        instructions = rows_by_category("instructions", asked.instructions, "general/instructions.jsonl", keys)
        texts = rows_by_category("texts", asked.texts, "general/text.jsonl", ("text",))
        context = context_length(causal_lm(before.model))
        where = f"instructions={asked.instructions}" if asked.instructions else "the project's general instructions"
        examples, left_out = instruction_examples(
            instructions, ChatEncoder(tokenizer), min(1024, context or 1024), where
        )
        # One of each category after the other; categories may differ in size.
        drawn = [
            (category, example.prompt)
            for several in zip_longest(*examples.values())
            for category, example in zip(examples, several, strict=True)
            if example
        ][: asked.own_answers]
        section = forgetting(
            before,
            tuned,
            texts={category: [str(row["text"]) for row in several] for category, several in texts.items()},
            instructions=examples,
            prompts=[prompt for _, prompt in drawn],
            categories=[category for category, _ in drawn],
            max_new_tokens=asked.max_new_tokens,
            kl_threshold=asked.kl_threshold,
        )
        return replace(section, warnings=(*section.warnings, *left_out))

    def made_overfitting() -> Section:
        found = rows()
        if found.unknown is not None:
            raise UserError(f"{found.unknown} Overfitting is what training rows show beyond others.")
        curves, damaged = _curves(source)
        made = overfitting(
            before,
            tuned,
            found.train,
            found.held_out,
            curves=curves,
            published=None if source.card is None else source.card.metrics.get("step"),
            scored=asked.rows,
            probed=asked.probed,
        )
        return replace(made, warnings=(*made.warnings, damaged)) if damaged else made

    def made_bias() -> Section:
        path = Path(asked.pairs) if asked.pairs else examples_folder() / "counterfactual_pairs" / "pairs.csv"
        return bias(before, tuned, read_pairs(path))

    makers: dict[str, tuple[str, Callable[[], Section]]] = {
        "gain": ("Gain", made_gain),
        "forgetting": ("Forgetting", made_forgetting),
        "overfitting": ("Overfitting", made_overfitting),
        "bias": ("Bias", made_bias),
        "cost": ("Cost", lambda: cost(_cost(source, tuned))),
    }
    return Report(
        adapter=source.name,
        base=base.id,
        against="base" if other is None else other.name,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        sections=tuple(_made(key, *makers[key]) for key in asked.sections),
        versions={
            **{name: version(name) for name in ("torch", "transformers", "peft")},
            "arithmetic": precision.trainer,
        },
    )


def _made(key: str, title: str, make: Callable[[], Section], *, quiet: bool = False) -> Section:
    if not quiet:
        say(f"section    {title.lower()}")
    try:
        return make()
    except UserError as error:
        why = str(error)
    except Exception as error:  # a mistake of ours, or memory that ran out: the other sections are not to be lost by it
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}".rstrip(": ")
        why = f"{why}{'' if why.endswith('.') else '.'} Where that happened was written to standard error."
        say(f"warning    {title.lower()} could not be made: {why}")
    return Section(key, title, "unknown", "This could not be measured.", error=why)


def _subjects(
    source: Source,
    other: Source | None,
    base: Base,
    tokenizer: Any,
    max_tokens: int,
    device: torch.device,
    precision: Precision,
) -> tuple[Subject, Subject]:
    """What is compared against, and what the report is about; on one base where that is possible."""

    def kept(one: Source | None) -> Kept:
        weights = None if one is None else weights_sha256(one.path)
        return Kept(cache_folder() / "evaluation", {"base": base.hash, "weights": weights})

    def subject(one: Source | None, model: Any, role: str | None) -> Subject:
        name = "base" if one is None else one.name
        _frozen_as(model, precision.weights)
        return Subject(name, model.to(device), tokenizer, role, max_tokens, autocast=precision.autocast, kept=kept(one))

    def alone(one: Source | None) -> Subject:
        if one is None:
            return subject(None, load_base(base), None)
        if one.whole:
            return subject(one, read_model(str(one.path), one.name), None)
        return subject(one, load_adapted(one, base).model, POLICY)

    if source.whole:
        return alone(other), alone(source)
    adapted = load_adapted(source, base)
    tuned = subject(source, adapted.model, POLICY)
    if adapted.began:  # then what lies below the adapter is not the base
        return alone(other), tuned
    if other is None:
        return subject(None, adapted.model, None), tuned
    if not other.whole:
        config = config_in(other.path)
        if config.peft_type == config_in(source.path).peft_type and not isinstance(config.init_lora_weights, str):
            add_role(adapted.model, "against", config, load_file(other.path / ADAPTER_WEIGHTS))
            return subject(other, adapted.model, "against"), tuned
    return alone(other), tuned


def _frozen_as(model: Any, dtype: torch.dtype) -> None:
    """The base's weights in `dtype`, as training had them; those of adapters stay in float32."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.")
    }
    for parameter in model.parameters():
        if id(parameter) not in adapters and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)


def _settings(source: Source) -> Mapping[str, Any]:
    """The training's settings; empty for a folder that has none."""
    import yaml

    try:
        found = yaml.safe_load((source.path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("data"), dict) else {}


def _rows(source: Source, base: Base, tokenizer: Any, settings: Mapping[str, Any], asked: Asked) -> Rows:
    """Training and held-out rows, divided as they were in training: of pairs, the preferred answer comes first.

    The card tells by a hash and a number whether those are the rows that training saw.

    Raises:
        UserError: they are not there, have no known format, or were not said.
    """
    data: dict[str, Any] = dict(settings.get("data", {}))
    card = source.card
    path = asked.data_path or data.get("path")
    if path is None:
        raise UserError(f"{source.name} does not say what it was trained on: give rows with data.path=FILE.")
    encoder = ChatEncoder(tokenizer, data.get("train_on", "assistant"), data.get("as_chat"))
    options: dict[str, Any] = {
        "columns": asked.columns,
        "max_length": data.get("max_length", 1024),
        "overflow": data.get("overflow", "drop"),
        "max_dropped": 1.0,
        "seed": settings.get("seed", 0),
    }
    algorithm = settings.get("algorithm")
    if card is not None and card.algorithm in _ONLINE and isinstance(algorithm, dict):
        options["room"] = algorithm.get("max_new_tokens", 0)  # rows that left no room were dropped
    divided: dict[str, Any] = {"val_path": asked.val_path}
    opened: Any = path
    if asked.data_path is None or _trained_on(card, path, data):
        # The very same rows must be held out, so nothing here may differ from training. Where its rows still are, they
        # are read from there: a file of a folder does not say what lies beside it.
        if asked.data_path is not None and data.get("path") and _trained_on(card, data["path"], data):
            opened = path = data["path"]
        options |= {
            "columns": asked.columns or data.get("columns") or None,
            "split": data.get("split", "train"),
            "held_out_split": data.get("held_out_split", "validation"),
            "max_val_rows": data.get("max_val_rows"),
            "max_rows": data.get("max_rows"),
        }
        divided = {"val_path": data.get("val_path"), "val_split": data.get("val_split", 0.1)}
        if "min_votes" in data and card is not None:
            split = 0 if divided["val_path"] is not None else data.get("val_split", 0.2)
            votes = read_votes(str(path), CardBase(base.id, base.hash), min_votes=1, val_split=split)
            opened = votes.train
            divided = {"val_path": votes.held_out or divided["val_path"], "val_split": 0}
    pairs = card is not None and card.algorithm in ("dpo", *_ONLINE)
    mistake: UserError | None = None
    for kind in ("preference", "sft") if pairs else ("sft", "preference"):
        try:
            train, held_out = load_examples(opened, encoder, kind, **divided, **options)  # type: ignore[arg-type]
            # Votes are held out by prompt, and new ones may change which.
            drawn = held_out is not None and (opened is not path or held_out.sources[0].hash == train.sources[0].hash)
            if asked.val_path is not None and asked.val_path != divided["val_path"]:
                # What training held out it was not trained on, whatever is held out today.
                other = {**options, "val_path": asked.val_path, "max_val_rows": None}
                held_out, drawn = load_examples(opened, encoder, kind, **other)[1], False  # type: ignore[arg-type]
        except UserError as error:
            mistake = mistake or error
            continue
        if held_out is None:
            raise UserError(
                f"No rows of {path} are held out: give some that were not trained on with data.val_path=FILE."
            )
        unknown = _not_what_it_was(source, str(path), train.sources[0])
        return Rows(train.examples, held_out.examples, unknown, unknown is not None and drawn)
    assert mistake is not None
    raise UserError(f"{mistake} Other rows are given with data.path=FILE.") from mistake


def _trained_on(card: Card | None, path: str, data: Mapping[str, Any]) -> bool:
    """Whether a file that was given holds what the adapter was trained on, perhaps under another name."""
    if card is None or not card.data:
        return False
    with contextlib.suppress(UserError):
        return open_source(path, data.get("split", "train")).hash == card.data[0].hash
    return False


def _not_what_it_was(source: Source, path: str, now: DataSource) -> str | None:
    """Why the rows of `path` are not those that `source` was trained on; None where they are, or no card tells."""
    if source.card is None or not source.card.data:
        return None
    then = source.card.data[0]  # what was mixed in comes after it
    if now.hash != then.hash:
        return (
            f"{path} is not what {source.name} was trained on, or has changed since (its hash is {now.hash[:19]}…, the "
            f"card says {then.hash[:19]}…): nobody can say which of its rows were trained on."
        )
    if now.rows != then.rows:
        return (
            f"Of {path} {now.rows} rows would be trained on today, and {source.name} was trained on {then.rows}: the "
            "rows are read or divided otherwise than then, so nobody can say which were trained on."
        )
    return None


def check_precision(name: str) -> None:
    """Raise UserError for an arithmetic that there is not."""
    if name not in PRECISIONS:
        raise UserError(f"precision={name} is not offered: there are {', '.join(PRECISIONS)}.")


def find_metric(name: str | None) -> Metric | None:
    """`exact_match`, or a function of a module; raises UserError where there is none."""
    if name is None:
        return None
    if name == "exact_match":
        return Metric("exact match", exact_match)
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise UserError(f"metric={name} is neither exact_match nor package.module:function.")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of the user's own may raise anything
        raise UserError(f"metric={name} cannot be imported ({type(error).__name__}: {error}).") from error
    if not callable(function):
        raise UserError(f"metric={name} is no function.")
    return Metric(attribute, function)


def _cost(source: Source, tuned: Subject) -> Cost:
    """What the folder and its card tell."""
    files = sorted(source.path.glob("*.safetensors"))
    history = _history(source)
    return Cost(
        # What is published may be more than was trained: PiSSA's difference has twice its rank.
        trainable=_published(files) if (trained := _number(history, "trainable")) is None else trained,
        parameters=sum(parameter.numel() for parameter in tuned.model.parameters()),
        seconds=_number(history, "seconds"),
        tokens=_number(history, "num_tokens"),
        peak_bytes=_number(history, "peak_bytes"),
        estimated_bytes=_number(history, "estimated_bytes"),
        adapter_bytes=sum(path.stat().st_size for path in files),
        joules=_number(history, "joules"),
        meters=_names(history, "meters"),
        unmetered=_names(history, "unmetered"),
    )


def _published(files: Sequence[Path]) -> int:
    """How many numbers the weight files hold; they are not read."""
    found = 0
    for path in files:
        with safe_open(path, framework="pt") as weights:
            found += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return found


def _number(history: Mapping[str, Any], key: str) -> Any:
    """A number that the run left; None where it left none, or something else."""
    value = history.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _names(history: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = history.get(key)
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _history(source: Source) -> Mapping[str, Any]:
    """What the run left; empty for a folder that has none, such as one that others made."""
    try:
        found = json.loads((source.path / HISTORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _curves(source: Source) -> tuple[dict[str, list[tuple[float, float]]] | None, str | None]:
    """The losses while training, by name, or why they are not shown; neither where the run left none."""
    curves = _history(source).get("curves")
    if curves is None:
        return None, None
    try:
        found = {str(name): [(_real(step), _real(loss)) for step, loss in points] for name, points in curves.items()}
    except (AttributeError, TypeError, ValueError):
        why = (
            f"The curves in {source.path / HISTORY} are damaged (expected pairs of step and loss by name), so they are "
            "not shown, and no step is compared with another."
        )
        say(f"warning    {why}")
        return None, why
    return found, None


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    return value
