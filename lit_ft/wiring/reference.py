"""The reference of preference training: read from the cache, or computed and kept there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from lit_ft.adapter import Adapter, Base
from lit_ft.config import Config
from lit_ft.data.datamodule import Prepared
from lit_ft.distributed.processes import agree, rank
from lit_ft.errors import UserError
from lit_ft.models.kinds import AdapterKind
from lit_ft.models.precision import Precision
from lit_ft.models.resolve import cache_folder
from lit_ft.progress import say
from lit_ft.reference import attach, read_cached, reference_key, write_cached
from lit_ft.wiring.identity import versions


def with_reference(
    cfg: Config,
    kind: AdapterKind,
    make: Callable[..., list[tuple[float, ...]]],
    data: Prepared,
    val: Prepared | None,
    start: Adapter | None,
    base: Base,
    precision: Precision,
) -> tuple[Prepared, Prepared | None]:
    """The examples with the reference's log-probabilities, from the cache where it has them, else from `make`.

    Args:
        cfg: says which reference.
        kind, start, base, precision: of the policy.
        make: computes them for examples, with its adapters off if `disable_adapter`.
        data, val: the training rows and the held-out ones.

    Raises:
        UserError: the base is asked for, and the kind leaves none below what it trains.
    """
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
            versions=versions(kind),
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
