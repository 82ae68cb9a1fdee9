"""The options of `python -m serve`, checked when the command line is composed; the values are in conf/serve.yaml."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ServeConfig:
    """One field for each key of conf/serve.yaml."""

    adapters: str = "./adapters"
    """The folder of published adapters."""

    model: str | None = None
    """The base model; None is the base of the newest adapter, or `bundled` where there is none."""

    host: str = "127.0.0.1"
    """Where the page listens; loopback only."""

    port: int = 7860
    """The page's port."""

    max_loras: int = 4
    """Adapters that may be in one batch."""

    max_lora_rank: int | None = None
    """Adapters above this rank are refused; None makes room for those found."""

    max_model_len: int = 2048
    """Tokens of context: the conversation and the reply together."""

    dtype: str = "auto"
    """The engine's number type."""

    start_timeout: float = 600.0
    """Seconds to wait for the engine."""

    title: str = "lit_ft chat"
    """The page's title."""

    debug: bool = False
    """Show tracebacks."""
