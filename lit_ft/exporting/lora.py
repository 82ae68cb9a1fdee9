"""`to=lora`: a plain LoRA, which vLLM serves beside others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lit_ft.adapter import ADAPTER_WEIGHTS
from lit_ft.adapter import Base as CardBase
from lit_ft.errors import UserError
from lit_ft.exporting.cards import as_published, write_card, write_readme
from lit_ft.exporting.place import copy, staged
from lit_ft.exporting.source import CONFIG, KINDS, Base, Source, card_id, find_base, takes_from_base, tokenizer_files
from lit_ft.progress import Progress, say

if TYPE_CHECKING:
    from torch import Tensor

    from lit_ft.exporting.adapted import Adapted
    from lit_ft.models.convert import Factors

# Of what an adapter adds to the weights; above, a person should think of another way.
_MUCH = 0.1

Way = Literal["copy", "factors", "nearest"]

# vLLM's own list of beginnings that leave the base as it is.
_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# What an adapter may hold beside A and B: in words, where it is set.
_MORE = {
    "modules_to_save": "whole modules",
    "lora_bias": "biases of its own",
    "trainable_token_indices": "embeddings of single tokens",
    "layer_replication": "layers used several times",
    "target_parameters": "factors of mixture-of-experts weights",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "factors made for a quantized base",
    "alora_invocation_tokens": "a text from which on alone it acts",
}


def check(source: Source, rank: int | None) -> Way:
    """How `source` becomes a plain LoRA: it is one, it has such factors, or there is only a nearest one.

    Raises:
        UserError: it has no such form, or `rank` is none.
    """
    merge = f"Merge it into its base instead: python -m lit_ft.export adapter={source.path} to=merged output=FOLDER."
    config = source.config
    if config is None:
        raise UserError(f"{source.name} is a whole model: every weight was trained, and there is no LoRA form. {merge}")
    if source.kind == "(IA)³":
        raise UserError(f"{source.name} is an (IA)³ adapter: it scales whole rows, which no LoRA form has. {merge}")
    if config["peft_type"] not in ("LORA", "ADALORA"):
        raise UserError(f"{source.name} is a {source.kind} adapter, which cannot be exported. Kinds: {KINDS}.")
    more = [words for key, words in _MORE.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        more.append("trained biases")
    if more:
        raise UserError(f"{source.name} holds {' and '.join(more)}, which no plain LoRA has. {merge}")
    from lit_ft.models.adapt import MAX_SERVABLE_RANK

    if rank is not None and not 1 <= rank <= MAX_SERVABLE_RANK:
        raise UserError(f"rank={rank}: vLLM serves LoRA of rank 1 to {MAX_SERVABLE_RANK}.")
    if config["peft_type"] == "ADALORA":
        return "factors"
    if takes_from_base(source):
        if config.get("use_dora"):
            raise UserError(f"{source.name} is a DoRA that began with parts of its base. {merge}")
        return "factors"
    if config.get("use_dora"):
        return "nearest"
    begun = config.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.lower() not in _BEGINNINGS:
        raise UserError(f"{source.name} has init_lora_weights={begun}, which this version does not know.")
    highest = rank_of(config)
    if rank is not None:
        return "nearest" if rank < highest else "copy"
    if highest > MAX_SERVABLE_RANK:
        raise UserError(
            f"{source.name} has rank {highest}, above vLLM's maximum of {MAX_SERVABLE_RANK}. Take the nearest adapter "
            f"of a lower rank (rank={MAX_SERVABLE_RANK}), or merge it (to=merged)."
        )
    return "copy"


def rank_of(config: Mapping[str, Any]) -> int:
    """The highest rank in an adapter's configuration; of AdaLoRA the one it began with."""
    try:
        if config["peft_type"] == "ADALORA":
            return int(config["init_r"])
        return max(int(config["r"]), *(int(r) for r in (config.get("rank_pattern") or {}).values()), 1)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{CONFIG} names no rank ({type(error).__name__}: {error}): the adapter is damaged.") from error


class Converted(NamedTuple):
    """LoRA's factors of every layer, whether they are exactly what the adapter does, and what was done in words."""

    factors: Factors
    exact: bool
    words: str


def export(source: Source, output: Path, *, model: str | None, rank: int | None, scale: float = 1.0) -> None:
    """Write `source` as a plain LoRA to the folder `output`.

    Where `output` ends in NAME/vN it gets a card, with which `python -m serve` serves it as NAME@vN. With another
    `scale` than 1 it adds that much of what it adds to the weights.

    Raises:
        UserError: it has no such form, or does not fit its base; or `output` cannot be written.
    """
    way = check(source, rank)
    if way == "copy" and scale != 1:
        way = "factors"
    ref = as_published(output)
    if way == "copy" and ref and source.card is None and model is None:
        raise UserError(
            f"output={output} is where {ref[0]}@v{ref[1]} would be served from, and its card names its base: give "
            "model=FOLDER. Without a card, choose another place."
        )
    with staged(output) as folder:
        base = find_base(source, model) if way != "copy" or model is not None else None
        canary, rank_now, metrics = None, None, True
        if base is None or way == "copy":
            text = "copied: it is a plain LoRA already"
            copy([source.path / CONFIG, source.path / ADAPTER_WEIGHTS, *tokenizer_files(source, base)], folder)
            canary, rank_now = source.card.canary if source.card else None, rank_of(source.config or {})
        else:
            text, canary, rank_now, metrics = _convert(source, base, folder, rank, way, scale)
        say(f"adapter    {source.name}: {text}")
        if ref is None:
            write_readme(folder, source, "peft", f"A plain LoRA made of {source.name}: {text}.")
            return
        named = CardBase(card_id(base), base.hash) if base else source.card.base if source.card else None
        if named is None:
            raise ValueError("a card names a base")
        write_card(folder, source, ref, named, converted=text, rank=rank_now, canary=canary, metrics=metrics)


def _convert(
    source: Source, base: Base, folder: Path, rank: int | None, way: Way, scale: float
) -> tuple[str, Any, int | None, bool]:
    """Write it; returns what was done, its canary, its rank, and whether it still is what was measured in training."""
    from lit_ft.exporting.adapted import load_adapted, load_tokenizer
    from lit_ft.exporting.measure import ROUNDING, difference, outputs
    from lit_ft.models.adapt import lora_rank, save_trained, weaken
    from lit_ft.models.canary import canary
    from lit_ft.models.convert import as_plain_lora

    say("weights    read in float32")
    tokenizer = load_tokenizer(source, base)
    adapted = load_adapted(source, base)
    _check_layers(source, adapted)
    before = outputs(adapted.model, tokenizer)
    config = next(iter(adapted.model.peft_config.values()))
    made = converted(source, adapted, rank, way)
    adapted.give_back()
    plain = as_plain_lora(adapted.model.unload(), made.factors, config)
    found = difference(before, outputs(plain, tokenizer))
    if made.exact and not found.mean <= ROUNDING:
        raise UserError(
            f"{source.name} was not converted: {made.words}, which should change nothing, but {found}. "
            "This is a defect of lit_ft; merge the adapter instead (to=merged)."
        )
    words = made.words
    if scale != 1:
        words += f", at {scale:g} of its strength"
        weaken(plain, scale)
    save_trained(plain, folder)
    copy(tokenizer_files(source, base), folder)
    return f"{words}; {found}", canary(plain, tokenizer), lora_rank(plain), made.exact and scale == 1


def _check_layers(source: Source, adapted: Adapted) -> None:
    """Raise UserError where something else than linear layers is adapted."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from lit_ft.exporting.adapted import lora_layers

    for name, layer in lora_layers(adapted.model):
        if not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            raise UserError(
                f"{source.name} adapts {name}, a {type(layer.get_base_layer()).__name__}: only linear layers become "
                "plain LoRA. Merge it into its base instead (to=merged)."
            )


def converted(source: Source, adapted: Adapted, rank: int | None, way: Way) -> Converted:
    """What every layer's adapter adds to its weight, as LoRA's factors.

    Args:
        source: where it comes from.
        adapted: it, on its base.
        rank: the highest that the factors may have; None leaves exact ones as they are, and otherwise is twice the
            adapter's, as far as vLLM takes it.
        way: whether there are such factors, or only nearest ones.

    Raises:
        UserError: exact ones have a rank that vLLM does not take.
    """
    from lit_ft.exporting.adapted import lora_layers
    from lit_ft.models import convert
    from lit_ft.models.adapt import MAX_SERVABLE_RANK

    layers = dict(lora_layers(adapted.model))
    if way == "nearest":
        delta = convert.dora_delta if source.kind == "DoRA" else convert.lora_delta
        most = rank or min(2 * max(layer.r["default"] for layer in layers.values()), MAX_SERVABLE_RANK)
        return _nearest(source.kind, list(layers), lambda name: delta(layers[name]), most)
    exact = {}
    for name, layer in layers.items():
        if source.kind == "AdaLoRA":
            a, e, b = (getattr(layer, part)["default"].detach() for part in ("lora_A", "lora_E", "lora_B"))
            # PEFT divides by the rank that it began with plus this.
            scaling = float(layer.scaling["default"] / (layer.ranknum["default"] + 1e-5))
            exact[name] = convert.adalora_factors(a, e, b, e[:, 0] != 0, scaling)
        else:
            a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
            exact[name] = a, b * layer.scaling["default"]
            if name in adapted.began:
                exact[name] = convert.without_beginning(exact[name], adapted.began[name])
    kind = "LoRA that began with parts of its base" if adapted.began else source.kind
    highest = max(a.shape[0] for a, _ in exact.values())
    if rank is None and highest > MAX_SERVABLE_RANK:
        raise UserError(
            f"{source.name} is a plain LoRA of rank {highest}, above the maximum of {MAX_SERVABLE_RANK} in vLLM. Take "
            f"the nearest of a lower rank (rank={MAX_SERVABLE_RANK}), or merge it (to=merged)."
        )
    if rank is not None and rank < highest:
        return _nearest(kind, list(exact), lambda name: exact[name][1] @ exact[name][0], rank)
    return Converted(exact, True, f"{kind} to plain LoRA of rank {max(1, highest)}, exactly")


def _nearest(kind: str, names: list[str], delta: Callable[[str], Tensor], rank: int) -> Converted:
    from lit_ft.models.convert import nearest

    factors, whole, lost, worst = {}, 0.0, 0.0, 0.0
    for name in Progress.over(names, "singular value decomposition"):
        change = delta(name)
        a, b, error = nearest(change, rank)
        factors[name] = (a, b)
        size = float(change.double().square().sum())
        whole, lost, worst = whole + size, lost + error**2 * size, max(worst, error)
    error = (lost / whole) ** 0.5 if whole else 0.0
    rank = max(a.shape[0] for a, _ in factors.values())  # no more than the weights have
    words = (
        f"{kind} to the nearest plain LoRA of rank {rank} by singular value decomposition, relative error of what is "
        f"added to the weights {error:.2%} (of a single weight {worst:.2%} at most)"
    )
    if error > _MUCH:
        say(f"attention  {error:.0%} of the adapter is lost at rank {rank}: give a higher rank=, or to=merged")
    return Converted(factors, False, words)
