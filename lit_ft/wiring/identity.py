"""What a run is, so that another can go on with it, and by which versions of the libraries it was made."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from omegaconf import OmegaConf

from lit_ft.adapter import Base
from lit_ft.config import Config
from lit_ft.data.datamodule import Prepared
from lit_ft.data.votes import Votes
from lit_ft.models.kinds import AdapterKind


def identity_of(cfg: Config, base: Base, data: Prepared, votes: Votes | None) -> dict[str, str]:
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


def versions(kind: AdapterKind) -> dict[str, str]:
    """Of the libraries that compute what is trained, by their names."""
    found = {}
    for name in ("lit_ft", "torch", "lightning", "transformers", "peft", *(["bitsandbytes"] if kind.quantized else [])):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source"
    return found
