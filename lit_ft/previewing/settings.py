"""The resolved configuration as YAML, with the default beside what differs from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from hydra import compose
from omegaconf import OmegaConf

from lit_ft.config import Config
from lit_ft.previewing.page import Line, Piece


def settings(cfg: Config) -> list[Line]:
    """The resolved configuration as YAML, with the default beside what differs from it."""
    return list(_yaml(_container(cfg), _container(compose("config")), ""))


def _container(cfg: Any) -> dict[str, Any]:
    copied = OmegaConf.create(cfg)
    # A logger's folder is the run's own, which a preview has none of.
    logger = OmegaConf.to_container(copied.logger, resolve=False) if copied.logger is not None else None
    plain_cfg = OmegaConf.merge(cfg, {"logger": None})
    content: dict[str, Any] = OmegaConf.to_container(plain_cfg, resolve=True, enum_to_str=True)  # type: ignore[assignment]
    content.pop("html", None)
    return {**content, "logger": logger}


_MISSING = object()


def _yaml(content: dict[Any, Any], default: Any, indent: str) -> Iterator[Line]:
    for key, value in content.items():
        before = default.get(key, _MISSING) if isinstance(default, dict) else _MISSING
        if isinstance(value, dict) and value:
            yield [Piece(f"{indent}{_scalar(key)}:")]
            yield from _yaml(value, before, indent + "  ")
            continue
        text = f"{indent}{_scalar(key)}: {_scalar(value)}"
        if value == before:
            yield [Piece(text)]
        else:
            was = "no default" if before is _MISSING else f"default: {_scalar(before)}"
            yield [Piece(text, "changed"), Piece(f"  # {was}", "faint")]


def _scalar(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
