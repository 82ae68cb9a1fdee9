"""The wiring of a report: loads the two models and the rows, and has the sections made."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lit_ft.adapter import ADAPTER_WEIGHTS, HISTORY, weights_sha256
from lit_ft.adapter import Base as CardBase
from lit_ft.batches import Example
from lit_ft.data.chat import ChatEncoder
from lit_ft.data.datamodule import load_examples
from lit_ft.data.files import examples_folder
from lit_ft.data.votes import read_votes
from lit_ft.errors import UserError
from lit_ft.evaluation.bias import bias, read_pairs
from lit_ft.evaluation.cost import Cost, cost
from lit_ft.evaluation.forgetting import forgetting
from lit_ft.evaluation.gain import Metric, exact_match, gain
from lit_ft.evaluation.harness import Tasks, add_tasks
from lit_ft.evaluation.overfitting import overfitting
from lit_ft.evaluation.report import Report
from lit_ft.evaluation.section import Section
from lit_ft.evaluation.subject import Kept, Subject
from lit_ft.exporting.adapted import load_adapted, load_base, load_tokenizer, read_model
from lit_ft.exporting.source import Base, Source, find_base
from lit_ft.models.kinds.base import config_in
from lit_ft.models.precision import PRECISIONS, Precision, choose_precision
from lit_ft.models.resolve import cache_folder
from lit_ft.models.roles import POLICY, add_role
from lit_ft.progress import say

Rows = tuple[list[Example], list[Example]]


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
    answered: int
    max_new_tokens: int
    texts: str | None
    instructions: str | None
    pairs: str | None
    own_answers: int
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
    metric = _metric(asked.metric)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.precision not in PRECISIONS:
        raise UserError(f"precision={asked.precision} is not offered: there are {', '.join(PRECISIONS)}.")
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
        return given[0]

    def gain_on_rows() -> Section:
        held_out = rows()[1][: asked.rows]
        return gain(
            before, tuned, held_out, metric=metric, max_new_tokens=asked.max_new_tokens, answered=asked.answered
        )

    def made_gain() -> Section:
        if asked.lm_eval is None:
            return gain_on_rows()
        return add_tasks(_made("gain", "Gain", gain_on_rows, quiet=True), before, tuned, asked.lm_eval)

    def made_forgetting() -> Section:
        encoder = ChatEncoder(tokenizer)
        instructions = _by_category(asked.instructions, "general/instructions.jsonl", ("prompt", "completion"))
        examples = {
            category: load_examples(several, encoder, "sft", val_split=0, max_length=1024)[0].examples
            for category, several in instructions.items()
        }
        # One of each category after the other; categories may differ in size.
        drawn = [
            (category, example.prompt)
            for several in zip_longest(*examples.values())
            for category, example in zip(examples, several, strict=True)
            if example
        ][: asked.own_answers]
        texts = _by_category(asked.texts, "general/text.jsonl", ("text",))
        return forgetting(
            before,
            tuned,
            texts={category: [str(row["text"]) for row in several] for category, several in texts.items()},
            instructions=examples,
            prompts=[prompt for _, prompt in drawn],
            categories=[category for category, _ in drawn],
            max_new_tokens=asked.max_new_tokens,
        )

    def made_overfitting() -> Section:
        train, held_out = rows()
        curves = _history(source).get("curves")
        return overfitting(before, tuned, train, held_out, curves=curves, scored=asked.rows, probed=asked.probed)

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
        return Section(key, title, "unknown", "This could not be measured.", error=str(error))


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
    autocast = torch.bfloat16 if precision.trainer == "bf16-mixed" else None

    def kept(one: Source | None) -> Kept:
        weights = None if one is None else weights_sha256(one.path)
        return Kept(cache_folder() / "evaluation", {"base": base.hash, "weights": weights})

    def subject(one: Source | None, model: Any, role: str | None) -> Subject:
        name = "base" if one is None else one.name
        _frozen_as(model, precision.weights)
        return Subject(name, model.to(device), tokenizer, role, max_tokens, autocast=autocast, kept=kept(one))

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

    Raises:
        UserError: they are not there, have no known format, or were not said.
    """
    data: dict[str, Any] = dict(settings.get("data", {}))
    path = asked.data_path or data.get("path")
    if path is None:
        raise UserError(f"{source.name} does not say what it was trained on: give rows with data.path=FILE.")
    encoder = ChatEncoder(tokenizer, data.get("train_on", "assistant"), data.get("as_chat"))
    options: dict[str, Any] = {
        "val_path": asked.val_path,
        "columns": asked.columns,
        "max_length": data.get("max_length", 1024),
        "overflow": data.get("overflow", "drop"),
        "max_dropped": 1.0,
        "seed": settings.get("seed", 0),
    }
    if asked.data_path is None:
        # The very same rows must be held out, so nothing here may differ from training.
        options |= {
            "val_path": asked.val_path or data.get("val_path"),
            "columns": asked.columns or data.get("columns") or None,
            "val_split": data.get("val_split", 0.1),
            "split": data.get("split", "train"),
            "held_out_split": data.get("held_out_split", "validation"),
            "max_val_rows": data.get("max_val_rows"),
            "max_rows": data.get("max_rows"),
        }
        if "min_votes" in data and source.card is not None:
            split = 0 if options["val_path"] is not None else data.get("val_split", 0.2)
            votes = read_votes(str(path), CardBase(base.id, base.hash), min_votes=1, val_split=split)
            path = votes.train
            options |= {"val_path": votes.held_out or options["val_path"], "val_split": 0}
    pairs = source.card is not None and source.card.algorithm in ("dpo", "ppo", "grpo")
    mistake: UserError | None = None
    for kind in ("preference", "sft") if pairs else ("sft", "preference"):
        try:
            train, held_out = load_examples(path, encoder, kind, **options)  # type: ignore[arg-type]
        except UserError as error:
            mistake = mistake or error
            continue
        if held_out is None:
            raise UserError(
                f"No rows of {path} are held out: give some that were not trained on with data.val_path=FILE."
            )
        return train.examples, held_out.examples
    assert mistake is not None
    raise UserError(f"{mistake} Other rows are given with data.path=FILE.") from mistake


def _by_category(path: str | None, own: str, keys: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows of a JSONL file by their `category`, which may be missing; raises UserError naming the line."""
    file = Path(path) if path else examples_folder() / own
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number}, is no JSON ({error}).") from error
        if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in keys):
            raise UserError(f"{file}, line {number}, lacks one of {', '.join(keys)} as a text.")
        found.setdefault(str(row.get("category", "all")), []).append(row)
    if not found:
        raise UserError(f"{file} holds no rows.")
    return found


def _metric(name: str | None) -> Metric | None:
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
    trained = 0
    for path in files:
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                size = 1
                for side in weights.get_slice(name).get_shape():
                    size *= side
                trained += size
    history = _history(source)
    return Cost(
        trainable=trained,
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
