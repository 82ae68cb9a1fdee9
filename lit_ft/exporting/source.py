"""What is exported, and the base it belongs to: a published adapter, others' PEFT folder, or a whole model.

No torch here: a mistake is found before anything heavy is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_ft.adapter import ADAPTER_WEIGHTS, CARD, Card, find, read
from lit_ft.errors import UserError
from lit_ft.models.resolve import BUNDLED, model_fingerprint, resolve_model
from lit_ft.progress import say

CONFIG = "adapter_config.json"
# Bytes that take longer to hash than a person waits without a word.
_LARGE = 1 << 30
KINDS = "LoRA (rsLoRA, DoRA, PiSSA, OLoRA), AdaLoRA, (IA)³ and whole models"
_NAMES = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "IA3": "(IA)³"}
# A tokenizer and its chat template, as transformers writes them.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Source:
    """A folder that can be exported.

    Attributes:
        path: it.
        name: what a person calls it: `support@v3`, or the folder's name.
        card: of a folder that lit_ft published, else None.
        config: adapter_config.json; None for a whole model.
    """

    path: Path
    name: str
    card: Card | None
    config: Mapping[str, Any] | None

    @property
    def whole(self) -> bool:
        """Whether it is a whole model rather than an adapter."""
        return self.config is None

    @property
    def base_name(self) -> str | None:
        """What its card, or else its configuration, calls the base; None where nothing does."""
        if self.card is not None:
            return self.card.base.id
        named = self.config.get("base_model_name_or_path") if self.config else None
        return str(named) if named else None

    @property
    def kind(self) -> str:
        """The kind of adapter, in words."""
        if self.config is None:
            return "a whole model"
        kind = str(self.config["peft_type"])
        if kind == "LORA" and self.config.get("use_dora"):
            return "DoRA"
        return _NAMES.get(kind, kind)


@dataclass(frozen=True)
class Base:
    """A base model that is there, and is the one that the adapter was trained on as far as a card tells.

    Attributes:
        id: as a person gives it: `bundled`, a Hub id, a folder.
        place: a folder or a Hub id, for transformers.
        hash: its fingerprint.
    """

    id: str
    place: str
    hash: str


def find_source(adapter: str, root: Path, *, any_model: bool = False) -> Source:
    """The folder `adapter`, or the published adapter NAME or NAME@vN below `root`; with `any_model` also GGUF files.

    Raises:
        UserError: there is none; or it is incomplete, damaged, or not what was published.
    """
    folder = Path(adapter).expanduser()
    pathlike = os.sep in adapter or adapter.startswith((".", "~"))
    if not pathlike and not any((folder / name).is_file() for name in (CARD, CONFIG, "config.json")):
        found = find(root, adapter)
        return _checked(Source(found.path, found.ref, found.card, _config(found.path)))
    if not folder.is_dir():
        what = "is a file: give the folder it lies in" if folder.is_file() else "is not a folder"
        raise UserError(
            f"adapter={adapter} {what}. Give an adapter's folder (adapter={root}/NAME/v1), or NAME or NAME@v1 of one "
            f"in adapters={root}."
        )
    if any_model and list(folder.glob("*.gguf")):
        return Source(folder, folder.resolve().name, None, None)
    if (folder / CARD).is_file():
        if sum(path.stat().st_size for path in folder.glob("*.safetensors")) > _LARGE:
            say(f"checking   the weights in {folder}")
        published = read(folder.resolve())
        return _checked(Source(folder, published.ref, published.card, _config(folder)))
    return _checked(Source(folder, folder.resolve().name, None, _config(folder)))


def _config(folder: Path) -> dict[str, Any] | None:
    """adapter_config.json, or None where a whole model lies instead."""
    path = folder / CONFIG
    if not path.is_file():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is neither an adapter (no {CONFIG}) nor a model (no config.json).")
        if not list(folder.glob("*.safetensors")):
            raise UserError(f"The model in {folder} is incomplete: it has no *.safetensors weights.")
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config["peft_type"], str):
            raise TypeError("peft_type is no text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
        raise UserError(f"{path} {reason}: the adapter is damaged, or no PEFT adapter.") from error
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = " Its adapter_model.bin is a pickle, which may run code when read: save it anew with PEFT."
        raise UserError(f"{folder} is incomplete: {ADAPTER_WEIGHTS} missing.{why if pickled else ''}")
    return dict(config)


def _checked(source: Source) -> Source:
    """`source`, if its weight files are whole; their headers say how long they are."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(source.path.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged and cannot be read ({error}). Copy or train it again.") from error
    return source


def find_base(source: Source, model: str | None) -> Base:
    """The base of `source`: `model` if it is given, else what the card names.

    Raises:
        UserError: it cannot be had, or is another model than the adapter was trained on.
    """
    if source.card is None:
        if model is None:
            hint = f" (its {CONFIG} names {source.base_name!r})" if source.base_name else ""
            raise UserError(f"{source.name} has no card that says which base it belongs to{hint}: give model=FOLDER.")
        return _base(model)
    trained_on = source.card.base
    base = _base(model if model is not None else _place(source))
    if base.hash != trained_on.hash:
        raise UserError(
            f"{source.name} was trained on {trained_on.id} ({_short(trained_on.hash)}), and {base.id} is another model "
            f"({_short(base.hash)}). Give the folder of the one it was trained on: model=FOLDER."
        )
    return base


def _base(model: str) -> Base:
    place = resolve_model(model)
    say(f"base       {model}")
    if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        raise UserError(f"model={model} is not a model folder: it has no config.json.")
    return Base(model, place, model_fingerprint(place))


def _place(source: Source) -> str:
    """Where the base that the card names is: its id, or the folder of a local model, if it is still there."""
    if source.card is None:
        raise ValueError("only a card names a base")
    name = source.card.base.id
    if name == BUNDLED or "/" in name:
        return name
    folder = trained_on(source)
    if folder == name and not Path(name).is_dir():
        return name  # one of the Hub's oldest models, which have no owner in their id
    if folder is None or not (Path(folder).expanduser() / "config.json").is_file():
        was = f" It was in {folder}, where there is no model now." if folder else ""
        raise UserError(f"{source.name} was trained on the local model {name!r}.{was} Give its folder: model=FOLDER.")
    return str(Path(folder).expanduser())


def trained_on(source: Source) -> str | None:
    """`model.id` of the training, from the folder's config.yaml; None where it cannot be read. A hint, no more."""
    import yaml

    try:
        model_id = yaml.safe_load((source.path / "config.yaml").read_text(encoding="utf-8"))["model"]["id"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return model_id if isinstance(model_id, str) and model_id else None


def takes_from_base(source: Source) -> bool:
    """Whether the adapter began with parts of the base's weights that the base then lacks, and that can be found again.

    Raises:
        UserError: they cannot.
    """
    begun = source.config.get("init_lora_weights") if source.config else None
    begun = begun.lower() if isinstance(begun, str) else ""
    if begun in ("pissa", "olora"):
        return True
    if begun.startswith("pissa") or begun in ("corda", "loftq"):
        how = "by chance" if begun.startswith("pissa") else "from data" if begun == "corda" else "by quantizing"
        raise UserError(
            f"{source.name} was trained on a base that init_lora_weights={begun} had changed, {how}: nobody can make "
            f"that base from the original and this folder, so neither to=lora nor to=merged can be right. Whoever "
            "trained it can save it as a plain LoRA (PEFT's path_initial_model_for_weight_conversion). If you have the "
            "changed base, set init_lora_weights to true in adapter_config.json and give its folder: model=FOLDER."
        )
    return False


def card_id(base: Base) -> str:
    """The base's id as a card has it: of a folder only the name, since where it lies says nothing elsewhere."""
    return Path(base.id).name if Path(base.id).is_dir() else base.id


def hub_id(name: str | None) -> str | None:
    """The Hub id of a base with the card's id `name`, or None if it has none."""
    if name == BUNDLED:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return name if name and name.count("/") == 1 and not name.startswith((".", "/", "~")) else None


def _short(digest: str) -> str:
    return f"{digest[:19]}…"


def tokenizer_files(source: Source, base: Base | None) -> list[Path]:
    """The files of the tokenizer and chat template that it was trained with: its own, else the base's."""
    from lit_ft.models.resolve import model_files

    for folder in (source.path, model_files(base.place) if base else None):
        if folder is not None:
            found = [folder / name for name in _TOKENIZER if (folder / name).is_file()]
            if any(path.name != "chat_template.jinja" for path in found):
                return found
    return []
