"""The options of `python -m serve`, checked when the command line is composed; the values are in conf/serve.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class AuthConfig:
    """Who may use the server. All empty: only this machine may, without a login."""

    users: str | None = None
    """A file of names and hashed passwords (`python -m serve.accounts add NAME --file FILE`)."""

    header: str | None = None
    """The header in which a proxy that has done the login names the user."""

    trusted_proxies: list[str] = field(default_factory=list)
    """Addresses from which that header counts."""

    api_keys: str | None = None
    """A file of hashed API keys (`python -m serve.accounts key NAME --file FILE`)."""

    names: list[str] = field(default_factory=list)
    """Host names that the server is reached by, where it has no login of its own: others are refused."""

    admins: list[str] | None = None
    """Users who may pin, retire and set the default; None: everyone who may use the server."""


@dataclass
class LimitsConfig:
    """What one user may ask, and all together; 0 is no limit."""

    requests_per_minute: float = 60
    requests_per_minute_in_all: float = 1200
    streams: int = 8
    """Replies being written at once."""

    streams_in_all: int = 128
    characters: int = 100_000
    """Of one request: the whole conversation."""


@dataclass
class ModelConfig:
    id: str | None = None
    """The base model; None is the base of the newest adapter, or `bundled` where there is none."""


@dataclass
class ServeConfig:
    """One field for each key of conf/serve.yaml."""

    adapters: str = "./adapters"
    """The folder of published adapters."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """`model=FOLDER` is short for `model.id=FOLDER`."""

    host: str = "127.0.0.1"
    """Where the server listens; beyond loopback it needs a login and API keys (`auth`)."""

    port: int = 7860
    """The page's port."""

    max_loras: int = 4
    """Adapters that may be in one batch."""

    max_cpu_loras: int = 32
    """Adapters that the engine holds in memory; more are loaded when they are asked for."""

    max_lora_rank: int | None = None
    """Adapters above this rank are refused; None makes room for those found, and at least for rank 16."""

    keep_versions: int = 1
    """Of each adapter, so many of the newest versions stay loaded."""

    max_model_len: int = 2048
    """Tokens of context: the conversation and the reply together."""

    dtype: str = "auto"
    """The engine's number type."""

    start_timeout: float = 600.0
    """Seconds to wait for the engine."""

    title: str = "lit_ft chat"
    """The page's title."""

    votes: str = "./votes.db"
    """The preference store: what people said of replies."""

    auth: AuthConfig = field(default_factory=AuthConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    debug: bool = False
    """Show tracebacks."""
