"""Settings of a free form, as plain Python."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from lit_ft.errors import UserError


def mapping(key: str, value: Any) -> dict[str, Any]:
    """A setting that is a mapping or null (a typed one could not be given on the command line).

    Raises:
        UserError: it is neither.
    """
    if value is None:
        return {}
    if not OmegaConf.is_dict(value):
        raise UserError(f"{key}={value} is not a mapping: give it as '{key}={{name: value}}'.")
    return dict(value)


def plain(value: Any) -> Any:
    """A value without OmegaConf's containers."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
