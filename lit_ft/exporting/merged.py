"""`to=merged`: base and adapter as one whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_ft.errors import UserError
from lit_ft.exporting.cards import write_readme
from lit_ft.exporting.place import copy, staged
from lit_ft.exporting.source import KINDS, Base, Source, find_base, takes_from_base, tokenizer_files
from lit_ft.progress import say

if TYPE_CHECKING:
    from lit_ft.adapter import Canary
    from lit_ft.exporting.measure import Difference, Outputs

MERGES = ("LORA", "ADALORA", "IA3")


def check(source: Source) -> None:
    """Raise UserError if `source` cannot be merged."""
    if source.config is None:
        return
    if source.config["peft_type"] not in MERGES:
        raise UserError(f"{source.name} is a {source.kind} adapter, which cannot be exported. Kinds: {KINDS}.")
    if source.config.get("alora_invocation_tokens"):
        raise UserError(f"{source.name} acts only from a certain text on (aLoRA), which no merged model can.")
    takes_from_base(source)


def export(source: Source, output: Path, *, model: str | None, dtype: str | None, scale: float = 1.0) -> None:
    """Write base and adapter as one model, in safetensors with tokenizer and chat template, to the folder `output`.

    Args:
        source: the adapter, or a whole model, which is copied.
        output: a folder that is not there yet.
        model: the base, where the card does not say.
        dtype: `float32`, `float16` or `bfloat16`; None is the base's own.
        scale: the strength of what was trained (`interpolate`).

    Raises:
        UserError: it cannot be merged or does not fit its base; or `output` cannot be written.
    """
    check(source)
    with staged(output) as folder:
        if source.whole and scale == 1 and dtype in (None, _stored(source.path)):
            files = [path for path in sorted(source.path.iterdir()) if _of_model(path)]
            copy([*files, *tokenizer_files(source, None)], folder)
            text = "A whole model already: copied."
        else:
            text = _write(source, folder, model, dtype, scale)
        say(f"model      {text}")
        write_readme(folder, source, "transformers", text)


def _stored(folder: Path) -> str | None:
    """The number type in a model's config.json, where it says so."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config.get("dtype") or config.get("torch_dtype"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}): the model is damaged.") from error


def _of_model(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name in (
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    )


def _write(source: Source, folder: Path, model: str | None, dtype: str | None, scale: float) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    from lit_ft.exporting.adapted import dtype_of, load_tokenizer, quietly
    from lit_ft.exporting.measure import difference, outputs

    base = None if source.whole and scale == 1 else find_base(source, model)
    stored = getattr(torch, dtype) if dtype else dtype_of(base.place if base else source.path)
    tokenizer = load_tokenizer(source, base)
    whole, before, merged = merge(source, base, tokenizer, scale=scale)
    name = str(stored).removeprefix("torch.")
    say(f"model      written in {name}")
    whole.to(stored)
    if bad := [name for name, value in whole.state_dict().items() if not value.isfinite().all()]:
        raise UserError(f"The weights in {bad[0]} leave the range of {name}: give dtype=bfloat16 or dtype=float32.")
    with quietly():
        whole.save_pretrained(str(folder))
        copy(tokenizer_files(source, base), folder)
        del whole
        # What was written, in float32: how it is stored is measured, and not how a machine computes in that type.
        again = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    found = difference(before, outputs(again, tokenizer))
    strength = f", at {scale:g} of its strength" if scale != 1 else ""
    if base is None or source.whole:
        return f"{source.name}{strength}, stored in {name}: {found}."
    return (
        f"{source.name} ({source.kind}{strength}) merged into {base.id} in float32 (largest difference of a "
        f"log-probability {merged.logprob:.1g}), stored in {name}: {found}."
    )


def interpolate(model: Any, base: Base, scale: float) -> None:
    """Bring `model` to W₀ + scale·(W − W₀), W₀ being the weights of `base`: 0 is the base, 1 leaves the model.

    Between the two much of what was gained stays while what was forgotten comes back (WiSE-FT: Wortsman et al. 2022,
    arXiv:2109.01903).
    """
    import torch

    from lit_ft.exporting.adapted import load_base

    before = dict(load_base(base).named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():  # tied ones come once
            weight.copy_(torch.lerp(before[name].to(weight), weight, scale))


def merge(source: Source, base: Base | None, tokenizer: Any, *, scale: float = 1.0) -> tuple[Any, Outputs, Difference]:
    """The merged model in float32, what it should put out, and how much it differs from the adapter on its base.

    Args:
        source: an adapter or a whole model.
        base: may be None for a whole model at its full strength.
        tokenizer: of both.
        scale: see `interpolate`; the outputs are those of the model at this strength.

    Raises:
        UserError: it does not fit its base, or the merged model is another one.
    """
    from lit_ft.exporting.adapted import load_adapted, quietly, read_model
    from lit_ft.exporting.measure import ROUNDING, difference, outputs

    say("weights    read in float32")
    if base is None or source.whole:
        whole = read_model(str(source.path.resolve()), source.name)
        if base is not None:
            interpolate(whole, base, scale)
        before = outputs(whole, tokenizer)
        return whole, before, difference(before, before)
    adapted = load_adapted(source, base)
    if source.card is not None and source.card.peft == "qlora":
        say(f"adapter    {_off_four_bits(source.card.canary, adapted.model)}")
    before = outputs(adapted.model, tokenizer)
    say(f"merging    {source.name} ({source.kind}) into {base.id}")
    try:
        with quietly():
            whole = adapted.model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{source.name} cannot be merged into {base.id}: {error}.") from error
    found = difference(before, outputs(whole, tokenizer))
    if not found.mean <= ROUNDING:
        tied = getattr(whole.config, "tie_word_embeddings", False)
        why = " It adapts weights that the model uses twice (tied embeddings)." if tied else ""
        raise UserError(f"{source.name} merged into {base.id} is another model: {found}.{why} It was not written.")
    if scale != 1:
        interpolate(whole, base, scale)
        before = outputs(whole, tokenizer)
    return whole, before, found


def _off_four_bits(recorded: Canary | None, model: Any) -> str:
    """That the adapter was trained on another base than `model` has, and how far apart the two answer.

    It is merged into the base's own weights and not into those that 4 bits stand for: so it is the model that vLLM
    serves with this adapter, and its base is the one that all others have.
    """
    from lit_ft.exporting.measure import token_logprobs

    said = "was trained on the base in 4 bits; it is merged into the base's own weights, as it is served on them"
    if recorded is None:
        return said
    with model.disable_adapter():
        base = token_logprobs(model, recorded.tokens)
    apart, of_bases = (
        (found - found.new_tensor(then)).abs().mean()
        for found, then in (
            (token_logprobs(model, recorded.tokens), recorded.logprobs),
            (base, recorded.base_logprobs),
        )
    )
    return (
        f"{said}: log-probabilities of a text of {len(recorded.tokens)} tokens differ from those in training by "
        f"{apart:.2g} on average (without the adapter by {of_bases:.2g})"
    )
