"""Which base model to serve: the one asked for, else that of the newest adapter whose base can be had."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lit_ft.adapter import Adapter, Broken
from lit_ft.errors import UserError
from serve.origin import BUNDLED, on_a_local_model, trained_on
from serve.registry import newest_first


@dataclass(frozen=True)
class Base:
    """A base model that is there."""

    id: str
    """As a person gives it: `bundled`, a Hub id or a folder."""

    place: str
    """What the engine gets: a folder or a Hub id."""

    hash: str
    """The fingerprint that adapters' cards are compared with."""


def given(model_id: str) -> Base:
    """The model of that id or folder.

    Raises:
        UserError: it cannot be had.
    """
    from lit_ft.models.resolve import model_fingerprint, resolve_model

    try:
        place = resolve_model(model_id)
        if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
            raise UserError(
                f"model={model_id} is not a model folder: it has no config.json. Give another: model=FOLDER."
            )
        return Base(model_id, place, model_fingerprint(place))
    except UserError as error:
        # Training's key is model.id; here it is model.
        raise UserError(str(error).replace("model.id=", "model=")) from error


def of_adapters(folders: Iterable[Adapter | Broken]) -> Base:
    """The base of the newest servable adapter, or of the next one where that is lost; bundled without adapters.

    Raises:
        UserError: none can be had; the text is about the newest adapter's.
    """
    groups: dict[tuple[str, str], list[Adapter]] = {}
    servable = [found for found in folders if isinstance(found, Adapter) and found.card.servable]
    for adapter in sorted(servable, key=newest_first):
        groups.setdefault((adapter.card.base.id, adapter.card.base.hash), []).append(adapter)
    if not groups:
        return given(BUNDLED)
    errors: list[UserError] = []
    for (model_id, _), adapters in groups.items():
        try:
            return _local(adapters) if on_a_local_model(adapters[0]) else given(model_id)
        except UserError as error:
            errors.append(error)
            if len(errors) < len(groups):
                sys.stderr.write(
                    f"The base {model_id} of {adapters[0].ref} cannot be had, so another adapter's is taken: {error}\n"
                )
    raise errors[0]


def _local(adapters: list[Adapter]) -> Base:
    """The folder that these adapters, all of one base, were trained on: if it is still there and still the same."""
    name, digest = adapters[0].card.base.id, adapters[0].card.base.hash
    seen = ""
    for folder in dict.fromkeys(filter(None, map(trained_on, adapters))):
        if not (Path(folder).expanduser() / "config.json").is_file():
            seen = seen or f" It was in {folder}, where there is no model now."
            continue
        found = given(str(Path(folder).expanduser()))
        if found.hash == digest:
            return found
        seen = seen or f" In {folder} there is another model now."
    refs = ", ".join(adapter.ref for adapter in adapters[:3]) + (", …" if len(adapters) > 3 else "")
    raise UserError(
        f"The adapters were trained on the local model {name!r} ({refs}).{seen} Give its folder with model=FOLDER."
    )


def describe(base: Base, max_model_len: int) -> str:
    """The panel's text; a folder by its name, not where it lies on the server."""
    name = "SmolLM2-135M-Instruct (bundled)" if base.id == BUNDLED else base.id
    name = Path(name).name if Path(name).is_dir() else name
    return (
        f"{name}, as it was before any training here.\n"
        f"Context: {max_model_len:,} tokens.\nContent: {base.hash.removeprefix('sha256:')[:16]}…"
    )
