"""Rows → examples with a report of what was dropped and why; and the LightningDataModule over them."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import lightning as L

from lit_ft.adapter import DataSource
from lit_ft.batches import Completion, Example
from lit_ft.data.chat import ChatEncoder
from lit_ft.data.files import Row, Source, hash_rows, held_out_source, open_source
from lit_ft.data.formats import Kind, RowError, formats, to_record
from lit_ft.data.loader import PromptLoader, WindowLoader
from lit_ft.data.packing import Layout
from lit_ft.errors import UserError
from lit_ft.progress import Progress

Overflow = Literal["drop", "truncate"]


@dataclass
class Prepared:
    """Encoded examples of one split, and the account of how they came to be."""

    examples: list[Example]
    sources: list[DataSource]
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        return sum(example.tokens for example in self.examples)

    @property
    def targets(self) -> int:
        return sum(example.targets for example in self.examples)

    def summary(self) -> str:
        """One line: rows kept and dropped with reasons, tokens, trained tokens, typical length."""
        drops = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        median = statistics.median(example.longest for example in self.examples)
        return (
            f"{len(self.examples)} rows kept, {sum(self.dropped.values())} dropped{f' ({drops})' if drops else ''}; "
            f"{self.tokens:,} tokens, {self.targets:,} trained on; median length {median:.0f}"
        )


@dataclass(frozen=True)
class Mix:
    """Another source mixed into the training rows: `weight` rows of it per row of the main source."""

    path: str
    weight: float
    split: str = "train"


def prepare(
    source: Source,
    encoder: ChatEncoder,
    kind: Kind,
    *,
    max_length: int,
    columns: Mapping[str, str] | None = None,
    overflow: Overflow = "drop",
    max_dropped: float = 0.1,
    max_rows: int | None = None,
    room: int = 0,
) -> Prepared:
    """Encode the rows of one source; of a row that is a prompt alone the example keeps the row.

    `room` is how many of the `max_length` tokens are left for an answer that is still to be made.

    Raises:
        UserError: no row has the keys of a known format, none is left, or more than `max_dropped` of them are dropped.
    """
    examples: list[Example] = []
    kept: list[Row] = []
    dropped: Counter[str] = Counter()
    rows = source.rows if max_rows is None else [source.rows[k] for k in range(min(max_rows, len(source.rows)))]
    first: dict[str, str] = {}
    first_unknown = ""
    for where, row in Progress.over(rows, f"tokenizing {source.name}"):
        try:
            record = to_record(row, kind, columns)
            if record is None:
                first_unknown = first_unknown or f"{where} has {_listed(row)}"
                raise RowError("with unknown keys")
            example = encoder.encode(record, index=len(examples))
            if kind == "prompt":
                example = replace(example, row=row)
            examples.append(_fit(example, max_length, overflow, room))
            if source.live:
                kept.append(row)
        except RowError as reason:
            dropped[str(reason)] += 1
            first.setdefault(str(reason), where)
    total = len(rows)
    if not total:
        raise UserError(f"{source.name} holds no rows.")
    if dropped["with unknown keys"] == total:
        accepted = "; ".join(f"{known.name}: {', '.join(known.keys)}" for known in formats(kind))
        raise UserError(
            f"{first_unknown}, which is no known {kind} format. Accepted are {accepted}. Other names are mapped with "
            "data.columns, e.g. 'data.columns={prompt: question, completion: answer}'."
        )
    content = hash_rows(kept) if source.live else source.hash
    result = Prepared(examples, [DataSource(source.name, len(examples), content)], dropped)
    if not examples or sum(dropped.values()) > max_dropped * total:
        reasons = "; ".join(f"{count} {reason}, first {first[reason]}" for reason, count in dropped.most_common())
        raise UserError(
            f"{source.name}: {sum(dropped.values())} of {total} rows cannot be used ({reasons}); at most "
            f"{max_dropped:.0%} may be dropped. Mend the data, raise data.max_length (now {max_length}) or set "
            "data.overflow=truncate for long rows, or allow more with data.max_dropped."
            + (f" The first with unknown keys: {first_unknown}." if first_unknown else "")
        )
    return result


def _listed(row: Row) -> str:
    return f"the keys {', '.join(map(str, row))}" if row else "no keys"


def _fit(example: Example, max_length: int, overflow: Overflow, room: int) -> Example:
    """The example, if it fits into `max_length` tokens, or cut to fit; raises RowError."""
    if room and len(example.prompt) + room > max_length:
        raise RowError(f"with less than {room} of {max_length} tokens left for an answer")
    if example.longest <= max_length:
        return example
    if len(example.prompt) >= max_length:
        raise RowError(f"with a prompt of {max_length} tokens or more")
    if overflow == "drop":
        raise RowError(f"longer than {max_length} tokens")
    room = max_length - len(example.prompt)
    cut = replace(example, completions=tuple(Completion(c.ids[:room], c.mask[:room]) for c in example.completions))
    if len(set(cut.completions)) < len(cut.completions):
        raise RowError("with equal completions once cut")
    return cut


def mixed(main: Prepared, others: Sequence[tuple[Prepared, float]], seed: int) -> Prepared:
    """`main` with `weight · len(main)` rows drawn from each other source (over again where it has too few).

    Raises:
        UserError: a weight is negative or no number.
    """
    examples = list(main.examples)
    sources, dropped = list(main.sources), Counter(main.dropped)
    for number, (other, weight) in enumerate(others):
        if not 0 <= weight < math.inf:
            raise UserError(f"data.mix: weight={weight} of {other.sources[0].source} is not a number from 0 on.")
        wanted = round(weight * len(main.examples))
        order: list[Example] = []
        draw = random.Random(f"{seed}-{number}")
        while len(order) < wanted:
            order.extend(draw.sample(other.examples, min(len(other.examples), wanted - len(order))))
        examples.extend(order)
        sources.append(replace(other.sources[0], rows=wanted))
        dropped.update(other.dropped)
    return Prepared([replace(e, index=k) for k, e in enumerate(examples)], sources, dropped)


def load_examples(
    path: str | Sequence[Row] | Source,
    encoder: ChatEncoder,
    kind: Kind,
    *,
    val_path: str | Sequence[Row] | Source | None = None,
    val_split: float = 0.1,
    split: str = "train",
    held_out_split: str = "validation",
    mix: Sequence[Mix] = (),
    max_val_rows: int | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Prepared, Prepared | None]:
    """Training and held-out examples.

    Held-out rows are those of `val_path` (of its `held_out_split`, for a Hub id); else those beside `train.*` in a
    folder (`heldout.*`, `validation.*`); else `val_split` of the rows, drawn with `seed`; at most `max_val_rows`, with
    0 none. `options` go to `prepare`.
    """
    source = open_source(path, split)
    main = prepare(source, encoder, kind, **options)
    held_out: Source | None = None
    if val_path is None:
        held_out = held_out_source(path) if isinstance(path, str) else None
    else:
        beside = held_out_source(val_path) if isinstance(val_path, str) else None
        held_out = beside or open_source(val_path, held_out_split)
        if held_out.hash == source.hash:
            raise UserError(f"data.val_path={val_path} holds the same rows as data.path: nothing would be held out.")
    val: Prepared | None = None
    if held_out is not None and max_val_rows != 0:
        val = prepare(held_out, encoder, kind, **{**options, "max_rows": max_val_rows})
    elif val_split > 0 and len(main.examples) > 1 and max_val_rows != 0:
        most = len(main.examples) - 1 if max_val_rows is None else min(max_val_rows, len(main.examples) - 1)
        count = min(max(1, round(val_split * len(main.examples))), most)
        chosen = set(random.Random(seed).sample(range(len(main.examples)), count))
        kept = [e for k, e in enumerate(main.examples) if k not in chosen]
        out = [e for k, e in enumerate(main.examples) if k in chosen]
        origin = main.sources[0]
        val = Prepared([replace(e, index=k) for k, e in enumerate(out)], [replace(origin, rows=len(out))])
        main = Prepared(
            [replace(e, index=k) for k, e in enumerate(kept)], [replace(origin, rows=len(kept))], main.dropped
        )
    others = [
        (prepare(open_source(part.path, part.split), encoder, kind, **{**options, "max_rows": None}), part.weight)
        for part in mix
    ]
    return mixed(main, others, seed) if others else main, val


class ExamplesDataModule(L.LightningDataModule):
    """Windows of examples for Lightning; arguments as of `WindowLoader`. With `prompts`, `Prompts` instead."""

    def __init__(
        self,
        train: Sequence[Example],
        val: Sequence[Example] | None = None,
        *,
        batch_size: int = 8,
        max_tokens: int = 4096,
        layout: Layout = "packed",
        pad_id: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        prompts: bool = False,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.prompts = prompts
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.layout, self.pad_id = layout, pad_id
        self.shuffle, self.seed = shuffle, seed
        self._training: WindowLoader | None = None
        self._resume_at: dict[str, Any] | None = None

    def train_dataloader(self) -> WindowLoader:
        self._training = self._loader(self.train, self.shuffle)
        if self._resume_at is not None:
            self._training.load_state_dict(self._resume_at)
            self._resume_at = None
        return self._training

    # Lightning restores a stateful loader only in some of its restart cases; a datamodule always.

    def state_dict(self) -> dict[str, Any]:
        return self._training.state_dict() if self._training is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._training is not None and self._training.untouched:
            # Strategies that load late have asked for the loader already, to know how many steps there are.
            self._training.load_state_dict(state_dict)
        else:
            self._resume_at = state_dict or None

    def val_dataloader(self) -> WindowLoader | list[Any]:
        return self._loader(self.val, False) if self.val else []

    def _loader(self, examples: Sequence[Example], shuffle: bool) -> WindowLoader:
        # Processes that share a model's tensors see the same examples: they count as one.
        ranks = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None) if self.trainer else None
        return (PromptLoader if self.prompts else WindowLoader)(
            examples,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            layout=self.layout,
            pad_id=self.pad_id,
            shuffle=shuffle,
            seed=self.seed,
            rank=ranks["rank"] if ranks else 0,
            processes=ranks["num_replicas"] if ranks else 1,
        )
