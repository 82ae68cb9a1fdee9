"""The command line: composes the configuration with Hydra and turns mistakes into one paragraph and exit code 2.

The only place that knows Hydra.
"""

from __future__ import annotations

import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from lit_ft.errors import UserError

_PACKAGE = Path(__file__).resolve().parent


def conf_folder() -> Path:
    """The YAML folder: inside the installed package, or beside it in a checkout."""
    inside = _PACKAGE / "conf"
    return inside if inside.is_dir() else _PACKAGE.parent / "conf"


def launch(task: Callable[[Any], int | None], config_name: str, schema: type) -> NoReturn:
    """Compose `config_name` from the YAML folder over `schema`, run `task(cfg)` and exit.

    Exit codes: what `task` returns (None is 0), 2 for a mistake that the user can mend, 130 for Ctrl-C.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    # Hydra would print its own abridged traceback and exit with 1; with this it raises, and we say it below.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    debug = any(argument.removeprefix("+") in {"debug=true", "debug=True"} for argument in sys.argv[1:])
    outcome: list[int] = []
    mistakes: list[UserError] = []

    def job(cfg: Any) -> None:
        try:
            outcome.append(task(cfg) or 0)
        except UserError as error:  # kept from Hydra, which would print lines of its own before ours
            mistakes.append(error)

    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)(job)()
        if mistakes:
            raise mistakes[0]
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if debug:
            traceback.print_exc()
        _complain(_first_words(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        if not debug:
            logging.getLogger(__name__).error("This is a defect of lit_ft, not of your input; please report it.")
        raise
    sys.exit(max(outcome, default=0))


def _first_words(error: Exception) -> str:
    """One paragraph for `error`; Hydra's and OmegaConf's messages are joined and shortened to what helps."""
    if isinstance(error, UserError):
        return str(error)
    causes: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        # OmegaConf appends the place as indented lines: `full_key: …` names the key, the rest is for its developers.
        lines = [line.strip() for line in str(seen).splitlines() if line.strip()]
        for line in lines:
            if line.startswith(("object_type=", "reference_type=", "full_key:")):
                continue
            if line not in causes and not any(line in cause for cause in causes):
                causes.append(line)
        seen = seen.__cause__
    text = " ".join(causes)
    if override := getattr(error, "override", None):
        text = f"{override!r} cannot be read: {text}"
    key = getattr(error, "full_key", None)
    place = f" (key: {key})" if key and key not in text else ""
    return f"{text}{place} See `python -m {_command()} --help` for what there is."


def _command() -> str:
    """The package that was started: `lit_ft` or `serve`."""
    return "serve" if Path(sys.argv[0]).parent.name == "serve" else "lit_ft"


def _complain(text: str) -> None:
    paragraph = text if "\n" in text else textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)
    print(f"\nerror: {paragraph}", file=sys.stderr)  # noqa: T201


def main() -> NoReturn:
    """Train: `python -m lit_ft +experiment=sft`."""
    from lit_ft.config import Config, register_schemas

    def task(cfg: Any) -> None:
        from lit_ft.train import train

        print(train(cfg).path)  # noqa: T201

    register_schemas()
    launch(task, "config", Config)
