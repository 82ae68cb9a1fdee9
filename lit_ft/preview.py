"""`python -m lit_ft.preview +experiment=sft …`: what a run would do, before any weights are loaded.

It takes every argument of `python -m lit_ft`, and `html=FILE` for the same as a page. Mistakes are refused as training
would refuse them. Nothing is trained, published or kept, and no processes are started.
"""

from __future__ import annotations

import os
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lit_ft.config import Config, register_schemas
from lit_ft.errors import UserError
from lit_ft.previewing.page import Section, as_html, as_text

if TYPE_CHECKING:
    from lit_ft.previewing.offline import Preview


@dataclass
class PreviewConfig(Config):
    """The settings of a training run, and where to write its preview."""

    html: str | None = None
    """A file that the preview is written to as well, as a page."""


def main() -> NoReturn:
    """Preview: `python -m lit_ft.preview +experiment=sft`."""
    from lit_ft.cli import launch

    register_schemas()
    with tempfile.TemporaryDirectory(prefix="lit_ft-preview-") as nowhere:
        # The run's folder, which Hydra makes before anything else, goes when this ends.
        arguments = sys.argv
        sys.argv = [
            *arguments,
            f"hydra.run.dir='{nowhere}'",
            f"hydra.sweep.dir='{nowhere}'",
            "hydra.output_subdir=null",
        ]
        try:
            launch(_show, "config", PreviewConfig)
        finally:
            sys.argv = arguments


def register_preview() -> None:
    """Tell Hydra of `html` beside a run's settings, as `main` does."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="config_schema", node=PreviewConfig)


def _show(cfg: PreviewConfig) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if HydraConfig.get().mode is RunMode.MULTIRUN:
        raise UserError("A preview is of one run: leave out -m, and give every setting one value.")
    target = None if cfg.html is None else _page(cfg.html)
    sections = preview(cfg)
    sys.stdout.write(as_text(sections, colours=_colours()))
    if target is not None:
        _write(target, as_html(f"Preview of {cfg.name}", sections))


def _colours() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _page(given: str) -> Path:
    target = Path(given).expanduser()
    if target.is_dir():
        raise UserError(f"html={given} is a folder: name a file in it, such as html={target / 'preview.html'}.")
    if not target.parent.is_dir():
        raise UserError(f"html={given}: there is no folder {target.parent}. Make it, or name another.")
    return target


def _write(target: Path, page: str) -> None:
    beside = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        beside.write_text(page, encoding="utf-8")
        beside.replace(target)
    except OSError as error:
        raise UserError(f"html={target} cannot be written: {error.strerror or error}.") from error
    finally:
        beside.unlink(missing_ok=True)


def preview(cfg: Config) -> list[Section]:
    """All that is shown.

    Raises:
        UserError: what training would refuse, in the same words.
    """
    from lit_ft.wiring.announce import quiet
    from lit_ft.wiring.checks import check_settings

    quiet()
    devices = check_settings(cfg)
    import torch

    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    try:
        return preview_of(cfg, devices).sections()
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def preview_of(cfg: Config, devices: int) -> Preview:
    """The preview of a run on so many devices."""
    from lit_ft.wiring.checks import ONLINE

    if cfg.algorithm.kind in ONLINE:
        from lit_ft.previewing.online import OnlinePreview

        return OnlinePreview(cfg, devices)
    from lit_ft.previewing.offline import Preview

    return Preview(cfg, devices)


if __name__ == "__main__":
    main()
