"""The votes of a preference store (SQLite, written by the server) as rows: those of one base, each pair once, split
by prompt.

The contract is the store's view `preference_pairs`. It is read while the server may be writing to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_ft.adapter import Base
from lit_ft.data.files import Row, Source, hash_rows
from lit_ft.errors import UserError

VIEW = "preference_pairs"
_READ = ("ballot", "prompt", "chosen", "rejected")
_COLUMNS = (*_READ, "number", "base_id", "base_hash")
# Seconds to wait for a writer that shuts readers out. In WAL mode, as the server writes, none does.
_PATIENCE = 10.0
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_NO_DATABASE = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


@dataclass(frozen=True)
class Votes:
    """What one base's votes give to train on.

    Attributes:
        train: rows of the prompts that are trained on.
        held_out: rows of the others, or None where none are wanted.
        newest: the number of the newest of these votes. `read_votes(until=newest)` reads the same ones again.
        summary: how the votes became pairs, and what was left out, in one line.
    """

    train: Source
    held_out: Source | None
    newest: int
    summary: str


@dataclass
class _Pair:
    """The votes on two replies to one prompt, by which of them was chosen."""

    prompt: list[Any]
    key: str
    ballots: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def decided(self) -> tuple[str, Row] | None:
        """The ballot that first said what most of them say, and its row; None where they are even."""
        (most, ballots), *others = sorted(self.ballots.items(), key=lambda item: len(item[1]), reverse=True)
        if others and len(others[0][1]) == len(ballots):
            return None
        chosen, rejected = ([{"role": "assistant", "content": reply}] for reply in most)
        return ballots[0], {"prompt": self.prompt, "chosen": chosen, "rejected": rejected}


def check_store(origin: str) -> None:
    """Raise UserError if `origin` is not a preference store that can be read."""
    with _opened(origin):
        pass


def read_votes(
    origin: str,
    base: Base,
    *,
    min_votes: int = 20,
    val_split: float = 0.2,
    until: int | None = None,
    any_weights: bool = False,
) -> Votes:
    """Read the decisive votes of `base`.

    The same verdict on the same replies to the same prompt counts once; of contradictory ones the majority counts, and
    none where they are even. Whether a prompt is held out depends on its hash, so that it stays where it is as votes
    grow: what was once trained on is never held out.

    Args:
        origin: the SQLite file.
        base: the model that is to be trained; votes on other models are counted and left out.
        min_votes: how many different pairs there must be.
        val_split: the share of prompts that is held out; 0 holds out none.
        until: leave out votes cast after the one of this number.
        any_weights: take every base of this id, whatever its hash, for a trial with made-up weights (model.tiny).

    Raises:
        UserError: the file is no preference store or cannot be read, or holds too few votes of this base.
    """
    with _opened(origin) as (path, store):
        column, value = ("base_id", base.id) if any_weights else ("base_hash", base.hash)
        ours = f"{column} = ? AND (? IS NULL OR number <= ?)"
        wanted = (value, until, until)
        count, newest = store.execute(f"SELECT count(*), max(number) FROM {VIEW} WHERE {ours}", wanted).fetchone()
        others = store.execute(
            f"SELECT base_id, base_hash, count(*) FROM {VIEW} WHERE {column} IS NOT ? GROUP BY 1, 2 ORDER BY 3 DESC, 1",
            (value,),
        ).fetchall()
        query = f"SELECT {', '.join(_READ)} FROM {VIEW} WHERE {ours} ORDER BY number"
        rows = _rows(path, store, query, wanted) if count else []

    pairs = _pairs(path.name, rows)
    decided = [(pair, *found) for pair in pairs if (found := pair.decided()) is not None]
    named = f"{base.id} ({_short(base.hash)})" if not any_weights else base.id
    elsewhere = ", ".join(f"{number} of {there} ({_short(its_hash)})" for there, its_hash, number in others)
    told = f"{_counted(count, 'decisive vote')} of {named}: {_counted(len(decided), 'different pair')}"
    if even := len(pairs) - len(decided):
        told += f", {even} more on which they are even"
    if len(decided) < max(min_votes, 1):
        advice = "Collect more on the server's Compare page (python -m serve)"
        advice += f", or train on these with data.min_votes={len(decided)}" if decided else ""
        advice += ", or choose with model= the base whose votes there are" if others else ""
        raise UserError(
            f"data.path={origin} holds too few votes: {told}; data.min_votes={min_votes}. "
            f"Votes of other bases: {elsewhere or 'none'}. {advice}."
        )

    held_out = _held_out([pair.key for pair, _, _ in decided], val_split, origin)
    sides: tuple[list[tuple[str, Row]], list[tuple[str, Row]]] = ([], [])
    for pair, ballot, row in decided:
        sides[pair.key in held_out].append((_place(path.name, ballot), row))
    train, val = (Source(path.name, hash_rows(row for _, row in side), side, live=True) for side in sides)
    summary = f"{told}; {len(train.rows)} to train on, {len(val.rows)} held out with their prompts"
    if elsewhere:
        summary += f"; left out, on other bases: {elsewhere}"
    return Votes(train, val if val.rows else None, newest, summary)


@contextmanager
def _opened(origin: str) -> Iterator[tuple[Path, sqlite3.Connection]]:
    """The store, read-only and as it is at this moment; raises UserError for whatever SQLite says against it."""
    path = Path(origin).expanduser().resolve()
    if not path.is_file():
        there = "this is a folder" if path.is_dir() else "there is no such file"
        raise UserError(
            f"data.path={origin}: {there} (looked for {path}). Votes are collected by python -m serve; name its file "
            "with data.path=FILE."
        )
    address = f"{path.as_uri()}?mode=ro"
    if not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists():
        # Nobody is writing, and there is no room for the files that a reader in WAL mode puts beside it.
        address += "&immutable=1"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=_PATIENCE, isolation_level=None)) as store:
            store.execute("BEGIN")  # counts and rows are of one moment, though votes arrive meanwhile
            found = {name for _, name, *_ in store.execute(f"PRAGMA table_info({VIEW})")}
            if missing := [name for name in _COLUMNS if name not in found]:
                lacks = f"the columns {', '.join(missing)} in {VIEW}" if found else f"a view {VIEW}"
                raise UserError(
                    f"data.path={origin}: this database is not a preference store that is known here (it lacks "
                    f"{lacks}). Name the file in which python -m serve keeps its votes."
                )
            yield path, store
    except sqlite3.Error as error:
        raise UserError(f"data.path={origin}: {_reason(error)}") from error


def _reason(error: sqlite3.Error) -> str:
    """What went wrong with the file, and what to do."""
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF  # above are details of the same kind
    said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    if code in _BUSY:
        return f"the file is locked by another process ({said}, for {_PATIENCE:g} s). Try again when it has ended."
    if code in _NO_DATABASE:
        return (
            f"the file is not a whole SQLite database ({said}). Votes exported as JSONL are read with "
            "data=file data.path=FILE."
        )
    return f"the votes cannot be read ({said})."


def _rows(path: Path, store: sqlite3.Connection, query: str, values: Sequence[Any]) -> list[Row]:
    """The rows of a query that has some; all columns text."""
    from datasets import Dataset, Features, Value, are_progress_bars_disabled
    from datasets import disable_progress_bars as hide_bars
    from datasets import enable_progress_bars as show_bars

    shown = not are_progress_bars_disabled()
    hide_bars()
    # A folder of its own: the reader keeps what it read under a name in which the database's content has no part, and
    # would give it out again when votes have been added.
    with tempfile.TemporaryDirectory(prefix="lit_ft-") as cache:
        try:
            return Dataset.from_sql(
                query,
                store,
                features=Features({name: Value("string") for name in _READ}),
                cache_dir=cache,
                keep_in_memory=True,
                params=values,
            ).to_list()
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, sqlite3.Error):
                raise cause from error
            first = (str(cause).splitlines() or [type(cause).__name__])[0][:200]
            raise UserError(f"{path}: a vote's prompt or reply is not text ({first}).") from error
        finally:
            if shown:
                show_bars()


def _pairs(name: str, rows: Sequence[Row]) -> list[_Pair]:
    """The votes by prompt and by the two replies, in the order of each pair's first vote."""
    pairs: dict[tuple[str, frozenset[str]], _Pair] = {}
    for row in rows:
        where = _place(name, row["ballot"])
        try:
            prompt = json.loads(row["prompt"] or "")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: its prompt is not JSON ({error}). {_remove(row['ballot'])}") from error
        if not isinstance(prompt, list):
            kind = type(prompt).__name__
            raise UserError(f"{where}: its prompt is {kind}, not a list of messages. {_remove(row['ballot'])}")
        verdict = (row["chosen"] or "", row["rejected"] or "")
        key = json.dumps(prompt, sort_keys=True)
        pair = pairs.setdefault((key, frozenset(verdict)), _Pair(prompt, key))
        pair.ballots.setdefault(verdict, []).append(row["ballot"])
    return list(pairs.values())


def _held_out(keys: Sequence[str], val_split: float, origin: str) -> set[str]:
    """The prompts that are not trained on: those whose hash falls below `val_split`, as a share of all hashes.

    Where none does, the one with the least hash. As votes grow it may become a training prompt, never the reverse.
    """
    if not 0 <= val_split < 1:
        raise UserError(f"data.val_split={val_split} is not a share of the prompts: give a number from 0 to below 1.")
    if not val_split:
        return set()
    shares = {key: int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 for key in keys}
    if len(shares) > 1:
        held_out = {key for key, share in shares.items() if share < val_split} or {min(shares, key=shares.__getitem__)}
        if len(held_out) < len(shares):
            return held_out
        how = f"all {len(shares)} prompts fall among the held-out ones (data.val_split={val_split})"
    else:
        how = "all votes are on one prompt"
    raise UserError(
        f"data.path={origin} cannot be split into prompts to train on and prompts to hold out: {how}. Collect votes on "
        "other prompts, train on all of them with data.val_split=0, or hold out the rows of a file with "
        "data.val_path=FILE."
    )


def _place(name: str, ballot: str) -> str:
    return f"{name}: ballot {ballot}"


def _remove(ballot: str) -> str:
    return f"The server does not write such; take the vote away with: DELETE FROM votes WHERE ballot = '{ballot}'."


def _short(name: str) -> str:
    """A hash as far as people read it."""
    return name[: len("sha256:") + 8]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
