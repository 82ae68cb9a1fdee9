"""The adapter folder, the contract between training and serving: write, read, scan, find.

`<root>/<name>/v<N>/` is immutable. It is written beside its place, flushed and renamed, so that a reader sees a whole
folder or none. Everything here is plain Python (no torch): serving reads folders in milliseconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lit_ft.errors import UserError

CARD = "card.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What the run took and how its losses went, for the report on the adapter.
HISTORY = "history.json"
# The report itself, where one was made: `report.html` and `report.json` in it.
REPORT = "report"
# The most tokens of a canary: enough to tell adapters apart, few enough that checking costs a server nothing.
CANARY_TOKENS = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_VERSION = re.compile(r"v([1-9][0-9]{0,8})")


class AdapterError(UserError):
    """An adapter folder that cannot be used, with the reason."""


@dataclass(frozen=True)
class Base:
    """The model an adapter was trained on: its id ("bundled", a Hub id, a folder's name) and its content's hash."""

    id: str
    hash: str


@dataclass(frozen=True)
class DataSource:
    """One source of training rows: where it came from, how many rows were kept, the hash of its content."""

    source: str
    rows: int
    hash: str


@dataclass(frozen=True)
class Canary:
    """What the published weights make of a fixed text: a server that finds the same serves what was trained.

    Attributes:
        tokens: ids of the text, 2 to `CANARY_TOKENS`.
        logprobs: natural logarithm of the probability of each token but the first after those before it, with the
            adapter.
        base_logprobs: the same without the adapter.

    Raises:
        TypeError, ValueError: these are no such numbers, or not as many.
    """

    tokens: list[int]
    logprobs: list[float]
    base_logprobs: list[float]

    def __post_init__(self) -> None:
        for key, kind in (("tokens", int), ("logprobs", int | float), ("base_logprobs", int | float)):
            values = getattr(self, key)
            # To Python true is a number.
            if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, kind) for v in values):
                raise TypeError(f"canary.{key} is not a list of numbers")
        count = len(self.tokens)
        if not 2 <= count <= CANARY_TOKENS:
            raise ValueError(f"canary.tokens are {count}, expected 2 to {CANARY_TOKENS}")
        if min(self.tokens) < 0:
            raise ValueError("canary.tokens holds a negative id")
        for key in ("logprobs", "base_logprobs"):
            if len(getattr(self, key)) != count - 1:
                raise ValueError(f"canary.{key} are {len(getattr(self, key))}, expected {count - 1}")
            if not all(map(math.isfinite, getattr(self, key))):
                raise ValueError(f"canary.{key} holds a value that is not finite")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Canary:
        """Build a canary from its part of card.json; raises KeyError, TypeError or ValueError on a wrong shape."""
        return cls(*(values[key] for key in cls.__dataclass_fields__))


@dataclass(frozen=True)
class Card:
    """Everything that a person or a server wants to know of an adapter without opening its weights."""

    name: str
    version: int
    created: str
    base: Base
    algorithm: str
    peft: str
    rank: int | None
    data: list[DataSource]
    parent: str | None
    metrics: dict[str, float]
    versions: dict[str, str]
    weights_sha256: str
    servable: bool
    not_servable_reason: str | None = None
    canary: Canary | None = None
    converted: str | None = None
    """What was done to the trained adapter so that it can be served, in words."""

    @property
    def ref(self) -> str:
        """`name@vN`, the adapter's full name."""
        return f"{self.name}@v{self.version}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Card:
        """Build a card from the content of card.json; raises KeyError or TypeError on a wrong shape."""
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        known["base"] = Base(id=str(values["base"]["id"]), hash=str(values["base"]["hash"]))
        known["data"] = [DataSource(str(d["source"]), int(d["rows"]), str(d["hash"])) for d in values["data"]]
        known["version"] = int(values["version"])
        known["metrics"] = {str(key): float(value) for key, value in dict(values["metrics"]).items()}
        if (canary := values.get("canary")) is not None:
            known["canary"] = Canary.from_dict(canary)
        for key, described in cls.__dataclass_fields__.items():
            if described.default is MISSING and key not in known:
                raise KeyError(key)
        return cls(**known)


@dataclass(frozen=True)
class Adapter:
    """A published adapter: its folder and its card."""

    path: Path
    card: Card

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def version(self) -> int:
        return self.card.version

    @property
    def ref(self) -> str:
        return self.card.ref


@dataclass(frozen=True)
class Broken:
    """A folder that stands where an adapter should be and cannot be read as one."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Draft:
    """What the trainer knows of a new adapter; version, date and hash are added when it is published."""

    name: str
    base: Base
    algorithm: str
    peft: str
    rank: int | None
    data: list[DataSource]
    parent: str | None
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    servable: bool = True
    not_servable_reason: str | None = None
    canary: Canary | None = None
    converted: str | None = None


def check_name(name: str) -> str:
    """Return `name` if it may be an adapter's name; raises UserError otherwise."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"name={name!r} cannot be an adapter's name: use 1 to 64 letters, digits, '-', '_' or '.', "
            "beginning with a letter or a digit."
        )
    return name


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_sha256(folder: Path) -> str:
    """One SHA-256 over all weight files of the folder, in the order of their names; raises AdapterError if none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{folder} holds no *.safetensors weights.")
    if len(files) == 1:
        return sha256_file(files[0])
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def read(path: Path, verify: bool = True) -> Adapter:
    """Read and check one adapter folder; without `verify` the weights are not hashed, for a first look at many.

    Raises:
        AdapterError: the folder is missing, incomplete, unreadable, not where its card says, or its weights are not
            those that were published.
    """
    try:
        return _read(path, verify)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read(path: Path, verify: bool) -> Adapter:
    if not path.is_dir():
        raise AdapterError(f"{path} is not a folder.")
    if not (path / CARD).is_file():
        raise AdapterError(f"{path} has no {CARD}: it was not published by lit_ft, or only in part.")
    try:
        card = Card.from_dict(json.loads((path / CARD).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
        raise AdapterError(f"{path / CARD} {reason}.") from error
    if (path.parent.name, path.name) != (card.name, f"v{card.version}"):
        raise AdapterError(f"{path} holds the card of {card.ref}: the folder was moved or copied by hand.")
    wanted = ["adapter_config.json", ADAPTER_WEIGHTS] if card.peft != "full" else ["config.json"]
    if missing := [name for name in wanted if not (path / name).is_file()]:
        raise AdapterError(f"{path} is incomplete: {', '.join(missing)} missing.")
    if verify and weights_sha256(path) != card.weights_sha256:
        raise AdapterError(f"{path}: the weights are not those that were published (SHA-256 differs from the card).")
    return Adapter(path=path, card=card)


def version_folders(root: Path, name: str | None = None) -> list[tuple[str, int, Path]]:
    """Every `<name>/v<N>` folder below `root` (name, number, path), sorted.

    Hidden ones are left out, and what stands in a folder that cannot be read.
    """
    if not root.is_dir():
        return []
    found = []
    for one in [name] if name else [folder for folder in _folders(root) if not folder.startswith(".")]:
        with contextlib.suppress(OSError):
            for version in _folders(root / one):
                if match := _VERSION.fullmatch(version):
                    found.append((one, int(match.group(1)), root / one / version))
    return sorted(found)


def _folders(path: Path) -> list[str]:
    """The names of the folders in `path`; quick, since a server looks through thousands twice a second."""
    names = []
    with os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # a link in a circle
                if entry.is_dir():
                    names.append(entry.name)
    return names


def scan(root: Path, verify: bool = True) -> list[Adapter | Broken]:
    """Every `<name>/v<N>` folder below `root`, sorted by name and version; hidden folders are left out. See `read`."""
    found: list[Adapter | Broken] = []
    for _, _, path in version_folders(root):
        try:
            found.append(read(path, verify))
        except AdapterError as error:
            found.append(Broken(path=path, reason=str(error)))
    return found


def find(root: Path, ref: str) -> Adapter:
    """The adapter named `name@vN`, or the newest version of `name`.

    Raises:
        AdapterError: there is none, or it cannot be read.
    """
    name, _, version = ref.partition("@")
    folders = [(number, path) for _, number, path in version_folders(root, check_name(name))]
    if version:
        folders = [(number, path) for number, path in folders if f"v{number}" == version]
    if not folders:
        names = sorted({found for found, _, _ in version_folders(root)})
        there = f"There are: {', '.join(names)}." if names else "There are none yet."
        raise AdapterError(f"No adapter {ref!r} in {root}. {there}")
    return read(folders[-1][1])


def publish(root: Path, draft: Draft, write: Callable[[Path], None]) -> Adapter:
    """Publish a new version of `draft.name` under `root`.

    `write(folder)` puts the weights, the tokenizer and whatever else belongs to them into an empty folder; the card
    and the model card (README.md) are added here. On any error nothing is left behind.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    name = check_name(draft.name)
    staging = root / f".{name}-{uuid.uuid4().hex[:12]}"
    try:
        staging.mkdir(parents=True)
        write(staging)
        digest = weights_sha256(staging)
        while True:
            versions = _taken(root / name)
            card = Card(
                **{key: getattr(draft, key) for key in draft.__dataclass_fields__},
                version=max(versions, default=0) + 1,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                weights_sha256=digest,
            )
            (staging / CARD).write_text(as_json(card), "utf-8")
            (staging / "README.md").write_text(model_card(card), "utf-8")
            flush_all(staging)
            target = root / name / f"v{card.version}"
            target.parent.mkdir(exist_ok=True)
            try:
                staging.rename(target)
            except OSError:
                if os.path.lexists(target):  # another run published this number meanwhile: take the next one
                    continue
                raise
            with contextlib.suppress(OSError):  # it is there for all to see: too late to say that nothing was left
                _flush(target.parent)
                _flush(root)
            return Adapter(path=target, card=card)
    except Exception as error:
        if (reason := system_reason(error)) is None:
            raise
        raise UserError(
            f"The adapter could not be published in {root}: {reason}. Nothing was left there. "
            "Free some space or choose another folder with adapters=FOLDER; the last checkpoint is kept, "
            "so resume=last publishes it again without training anew."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def as_json(card: Card) -> str:
    """The content of card.json; a list of numbers takes one line, and not one line per number."""
    text = json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n"
    # No text of the card can look like that: a line break inside of it is written as \n.
    return re.sub(r"\[\n([-+.,\deE\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def _taken(folder: Path) -> list[int]:
    """The version numbers that stand in `folder`, whatever it is that bears them."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [int(match.group(1)) for match in map(_VERSION.fullmatch, names) if match]


def system_reason(error: Exception) -> str | None:
    """What the operating system complained of, also where a library in Rust (safetensors) quotes it; else None."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(quoted.group(1))) if quoted else None


def flush_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    """Have the content of a file, or the names in a folder, written to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def model_card(card: Card) -> str:
    """The README.md of an adapter, in the Hub's model-card form."""
    metrics = "\n".join(f"| {key} | {value:.4g} |" for key, value in sorted(card.metrics.items()))
    sources = "\n".join(f"- {d.source}: {d.rows} rows (`{d.hash[:19]}`)" for d in card.data)
    tags = ["lit_ft", card.algorithm, card.peft]
    return (
        "---\n"
        f"base_model: {card.base.id}\n"
        f"library_name: {'peft' if card.peft != 'full' else 'transformers'}\n"
        "pipeline_tag: text-generation\n"
        f"tags: [{', '.join(tags)}]\n"
        "---\n\n"
        f"# {card.ref}\n\n"
        f"{card.algorithm.upper()} ({card.peft}{f', rank {card.rank}' if card.rank else ''}) on `{card.base.id}`, "
        f"published {card.created}, trained from {card.parent or 'the base model'}.\n\n"
        f"## Data\n\n{sources or '- none recorded'}\n\n"
        f"## Held-out metrics\n\n| metric | value |\n| --- | --- |\n{metrics}\n"
        + (f"\n## Converted\n\n{card.converted}.\n" if card.converted else "")
        + ("" if card.servable else f"\n## Not servable\n\n{card.not_servable_reason}\n")
    )
