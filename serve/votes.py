"""The preference store: ballots that the server issues, and the votes cast on them, in one SQLite file.

What is acknowledged is on disk: WAL with `synchronous=FULL`, one transaction per vote. Several threads and processes
may write. Texts are kept as streamed, except that half of a surrogate pair, which UTF-8 has no bytes for, becomes
U+FFFD. Votes are ordered by their number, never by the clock.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from lit_ft.errors import UserError
from serve import ranking

Kind = Literal["compare", "edit", "thumbs"]

# What can be said of each kind; an edited reply is right by being written.
VERDICTS: dict[str, tuple[str, ...]] = {
    "compare": ("left", "right", "tie", "both_bad"),
    "edit": ("right",),
    "thumbs": ("up", "down"),
}

# The ref of the better answer that a person wrote.
HUMAN = "human"

# In characters.
COMMENT_LIMIT = 2000

# Of random bytes in a ballot's id: 144 bits.
ID_BYTES = 18

# What SQLite's errors mean, and what to do (https://www.sqlite.org/rescode.html).
WORDS = {
    sqlite3.SQLITE_FULL: "The disk is full: make room and try again.",
    sqlite3.SQLITE_IOERR: "The disk reports an error; it may be full. Make room, or look at the system's log.",
    sqlite3.SQLITE_READONLY: "The file or its folder is read-only: allow the server to write there.",
    sqlite3.SQLITE_CANTOPEN: "The file cannot be opened: allow the server to read and write it and its folder.",
    sqlite3.SQLITE_BUSY: "Another program holds the file: try again in a moment.",
    sqlite3.SQLITE_NOTADB: "The file is no SQLite database: name another, or restore it from a backup.",
    sqlite3.SQLITE_CORRUPT: "The file is damaged: restore it from a backup, or move it away to begin a new one.",
}

# Rows that an export reads at a time.
PAGE = 500

# The schema below; a file with a higher number was written by a newer version of this project.
VERSION = 1

SCHEMA = (
    """CREATE TABLE ballots (
        id TEXT PRIMARY KEY,
        kind TEXT NOT NULL CHECK (kind IN ('compare', 'edit', 'thumbs')),
        issued TEXT NOT NULL,
        voter TEXT NOT NULL,
        base_id TEXT NOT NULL, base_hash TEXT NOT NULL,
        left_ref TEXT NOT NULL, left_hash TEXT NOT NULL, right_ref TEXT, right_hash TEXT,
        prompt TEXT NOT NULL,
        left_reply TEXT NOT NULL, right_reply TEXT,
        sampling TEXT NOT NULL,
        blind INTEGER NOT NULL)""",
    # AUTOINCREMENT: a number is never given twice, and is the order in which votes were cast.
    """CREATE TABLE votes (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        ballot TEXT NOT NULL UNIQUE REFERENCES ballots (id),
        verdict TEXT NOT NULL CHECK (verdict IN ('left', 'right', 'tie', 'both_bad', 'up', 'down')),
        comment TEXT NOT NULL,
        voted TEXT NOT NULL)""",
    """CREATE VIEW preference_pairs AS
        SELECT ballot, voted, kind, base_id, base_hash,
            iif(verdict = 'left', left_ref, right_ref) AS chosen_ref,
            iif(verdict = 'left', left_hash, right_hash) AS chosen_hash,
            iif(verdict = 'left', right_ref, left_ref) AS rejected_ref,
            iif(verdict = 'left', right_hash, left_hash) AS rejected_hash,
            voter, prompt,
            iif(verdict = 'left', left_reply, right_reply) AS chosen,
            iif(verdict = 'left', right_reply, left_reply) AS rejected,
            number
        FROM votes JOIN ballots ON id = ballot
        WHERE verdict IN ('left', 'right') AND left_reply <> right_reply
        ORDER BY number""",
    """CREATE VIEW unpaired_preferences AS
        SELECT ballot, voted, base_id, base_hash, left_ref AS ref, left_hash AS hash,
            voter, prompt, left_reply AS completion, verdict = 'up' AS label, number
        FROM votes JOIN ballots ON id = ballot
        WHERE verdict IN ('up', 'down')
        ORDER BY number""",
)


class StoreError(UserError):
    """The file cannot be read or written; nothing of what was asked has been stored."""


class VoteError(UserError):
    """A vote that does not count; the text is for the voter."""


class UnknownBallotError(VoteError):
    """No ballot has this id: forged, from another server, or left open for too long."""


class OtherVoterError(VoteError):
    """The ballot was issued to somebody else."""


class AlreadyVotedError(VoteError):
    """The voter has said something else on this ballot."""


class InvalidVoteError(VoteError):
    """A verdict that this kind of ballot does not have, or a text that cannot be taken."""


@dataclass(frozen=True)
class Side:
    """A reply, verbatim, and who gave it."""

    ref: str
    """`support@v3`, or the base's name."""

    hash: str
    """Of the adapter's weights, or the base's."""

    reply: str


@dataclass(frozen=True)
class Sampling:
    """The settings that both replies were sampled with."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None


@dataclass(frozen=True)
class Ballot:
    """All that a voter was shown, and what was hidden from them."""

    voter: str
    """An opaque id."""

    base_id: str
    base_hash: str
    prompt: Sequence[Mapping[str, str]]
    """The messages (role, content) up to the question."""

    left: Side
    right: Side | None
    """None: one reply, for a thumb up or down."""

    sampling: Sampling
    blind: bool = False


@dataclass(frozen=True)
class Revealed:
    """A vote that counts, and whom it was about."""

    left: str
    right: str | None
    verdict: str

    repeated: bool
    """It had been counted before: no vote was added. Of a better answer the text may have been replaced."""


@dataclass(frozen=True)
class Row:
    """A vote with all that belongs to it."""

    number: int
    kind: str
    ballot: Ballot
    verdict: str
    comment: str
    voted: datetime


@dataclass(frozen=True)
class Filters:
    """Which votes: those that fit all that is given."""

    base_hash: str | None = None

    refs: Sequence[str] = ()
    """Any of these took part; empty: whoever did."""

    kind: Kind | None = None
    since: datetime | None = None
    until: datetime | None = None
    """Cast from `since` (inclusive) to `until` (exclusive)."""

    blind_only: bool = False
    voter: str | None = None

    def where(self) -> tuple[str, list[Any]]:
        """The condition in SQL, and its parameters."""
        marks = ", ".join("?" * len(self.refs))
        parts: list[tuple[str, Sequence[Any]]] = [("1", ())]
        if self.base_hash is not None:
            parts.append(("base_hash = ?", [self.base_hash]))
        if self.refs:
            parts.append((f"(left_ref IN ({marks}) OR right_ref IN ({marks}))", [*self.refs, *self.refs]))
        if self.kind is not None:
            parts.append(("kind = ?", [self.kind]))
        if self.since is not None:
            parts.append(("voted >= ?", [_stamp(self.since)]))
        if self.until is not None:
            parts.append(("voted < ?", [_stamp(self.until)]))
        if self.blind_only:
            parts.append(("blind", ()))
        if self.voter is not None:
            parts.append(("voter = ?", [self.voter]))
        return " AND ".join(text for text, _ in parts), [clean(value) for _, values in parts for value in values]


EVERYTHING = Filters()


class VoteStore:
    """The votes in one file, usable from several threads. Its methods block: call them with `asyncio.to_thread`."""

    def __init__(
        self, path: Path, *, patience: float = 10.0, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        """Open the file, or make it.

        Args:
            path: of the database; SQLite keeps two more files beside it.
            patience: seconds to wait for other writers.
            clock: the time, with its zone.

        Raises:
            StoreError: it cannot be opened, is no preference store, or is one of a newer version.
        """
        self.path = path.absolute()
        self._patience = patience
        self._clock = clock
        # One writer in this process: SQLite's own waiting is polling. Readers have connections of their own.
        self._lock = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._called = f"votes={self.path}"
        with self._telling():
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._writing():
            pass
        self._called = self.path.name  # voters read what is said from now on: no paths of the server

    def close(self) -> None:
        """Close the file; a later call opens it again."""
        with self._lock:
            self._drop()

    def issue(self, ballot: Ballot) -> str:
        """Store what was shown, and return the id with which its voter may vote once."""
        if ballot.right is not None and HUMAN in (ballot.left.ref, ballot.right.ref):
            raise ValueError("a person's answer is stored with improve()")
        kind: Kind = "compare" if ballot.right else "thumbs"
        ballot_id = secrets.token_urlsafe(ID_BYTES)
        with self._writing() as db:
            self._insert(db, ballot_id, kind, ballot)
        return ballot_id

    def vote(self, ballot_id: str, voter: str, verdict: str, comment: str = "") -> Revealed:
        """Count a vote. When this returns it is on disk; the same vote again is acknowledged and not counted twice.

        Raises:
            VoteError: it does not count, with the reason for the voter.
            StoreError: it could not be stored.
        """
        if len(comment) > COMMENT_LIMIT:
            raise InvalidVoteError(
                f"The comment has {len(comment):,} characters, and {COMMENT_LIMIT:,} are allowed. Your vote was not "
                "counted: shorten the comment and vote again."
            )
        query = """SELECT kind, voter, left_ref, right_ref, verdict FROM ballots
            LEFT JOIN votes ON ballot = id WHERE id = ?"""
        with self._writing() as db:
            found = db.execute(query, (clean(ballot_id),)).fetchone()
            if found is None:
                raise UnknownBallotError(
                    "This vote was not counted: the server does not know these replies, or has waited too long for a "
                    "vote on them. Send the prompt again and vote on the new replies."
                )
            kind, owner, left, right, before = found
            if clean(voter) != owner:
                raise OtherVoterError(
                    "This vote was not counted: these replies were shown to somebody else. Send the prompt yourself "
                    "and vote on the replies that you get."
                )
            if verdict not in VERDICTS[kind]:
                raise InvalidVoteError(
                    f"This vote was not counted: {verdict!r} is not one of {', '.join(VERDICTS[kind])}."
                )
            if before is not None and before != verdict:
                raise AlreadyVotedError(
                    f"You have already voted on these replies ({before.replace('_', ' ')}), and a vote is final. Send "
                    "another prompt to vote again."
                )
            if before is None:
                self._count(db, ballot_id, verdict, comment)
        return Revealed(left, right, verdict, repeated=before is not None)

    def improve(self, shown: Ballot, better: str, comment: str = "") -> Revealed:
        """Store a better answer to what was shown (one reply, on the left), as preferred over it.

        Of one reply a voter has one better answer, the last: another takes the place of the one before, with its
        comment and time, and the same again is acknowledged. Such a ballot is never open, so its id need not be secret:
        it is the hash of what was shown, and to whom.

        Raises:
            InvalidVoteError: the answer is empty or the same as the reply, or the comment too long.
            StoreError: it could not be stored.
        """
        if shown.right is not None:
            raise ValueError("an edit is of one reply")
        if not better.strip() or clean(better) == clean(shown.left.reply):
            raise InvalidVoteError("Nothing was stored: write an answer that differs from the reply.")
        if len(comment) > COMMENT_LIMIT:
            raise InvalidVoteError(f"Nothing was stored: shorten the comment to {COMMENT_LIMIT:,} characters.")
        said = json.dumps(asdict(shown), sort_keys=True, default=dict)
        ballot_id = "edit-" + hashlib.sha256(said.encode()).hexdigest()
        edit = replace(shown, right=Side(HUMAN, "", better))
        with self._writing() as db:
            before = db.execute("SELECT right_reply FROM ballots WHERE id = ?", (ballot_id,)).fetchone()
            if before is None:
                self._insert(db, ballot_id, "edit", edit)
                self._count(db, ballot_id, "right", comment)
            elif before["right_reply"] != clean(better):
                db.execute("UPDATE ballots SET right_reply = ? WHERE id = ?", (clean(better), ballot_id))
                values = (clean(comment), _stamp(self._clock()), ballot_id)
                db.execute("UPDATE votes SET comment = ?, voted = ? WHERE ballot = ?", values)
        return Revealed(shown.left.ref, HUMAN, "right", repeated=before is not None)

    def counts(self) -> dict[str, dict[str, int]]:
        """The number of votes by kind and verdict, those that nobody cast included."""
        counts = {kind: dict.fromkeys(verdicts, 0) for kind, verdicts in VERDICTS.items()}
        query = "SELECT kind, verdict, count(*) FROM votes JOIN ballots ON id = ballot GROUP BY kind, verdict"
        for kind, verdict, count in self._read(query):
            counts[kind][verdict] = count
        return counts

    def rows(self, filters: Filters = EVERYTHING, limit: int = -1) -> list[Row]:
        """The votes, the newest first; at most `limit` if that is not negative."""
        where, values = filters.where()
        query = f"""SELECT number, kind, verdict, comment, voted, voter, base_id, base_hash, prompt,
                left_ref, left_hash, left_reply, right_ref, right_hash, right_reply, sampling, blind
            FROM votes JOIN ballots ON id = ballot WHERE {where} ORDER BY number DESC LIMIT ?"""
        return [_row(row) for row in self._read(query, [*values, limit])]

    def comparisons(self, filters: Filters = EVERYTHING) -> list[ranking.Vote]:
        """The votes on two models, in the order cast, for `serve.ranking`.

        No edits: they always beat the reply that they were made from, which says nothing about models.
        """
        where, values = filters.where()
        query = f"""SELECT left_ref, left_hash, right_ref, right_hash, verdict, voter, prompt, voted
            FROM votes JOIN ballots ON id = ballot WHERE kind = 'compare' AND {where} ORDER BY number"""
        return [
            ranking.Vote(
                ranking.Model(row["left_ref"], row["left_hash"]),
                ranking.Model(row["right_ref"], row["right_hash"]),
                row["verdict"],
                row["voter"],
                row["prompt"],
                datetime.fromisoformat(row["voted"]),
            )
            for row in self._read(query, values)
        ]

    def export_jsonl(self, filters: Filters = EVERYTHING, *, paired: bool = True) -> Iterator[str]:
        """The votes as lines of JSON, in TRL's conversational format, in the order cast.

        Args:
            filters: which votes.
            paired: decisive votes and edits as prompt, chosen, rejected; else thumbs as prompt, completion, label.
        """
        view, columns = (
            ("preference_pairs", "chosen, rejected") if paired else ("unpaired_preferences", "completion, label")
        )
        where, values = filters.where()
        query = f"""SELECT number, prompt, {columns} FROM {view} AS one
            WHERE number > ? AND EXISTS (
                SELECT 1 FROM votes AS cast_here JOIN ballots ON id = ballot
                WHERE cast_here.number = one.number AND {where})
            ORDER BY number LIMIT {PAGE}"""
        last = 0
        # Page by page: a slow reader holds no connection, which would keep the write-ahead log from being folded in.
        while page := self._read(query, [last, *values]):
            for _, prompt, first, second in page:
                texts = (
                    {"chosen": _reply(first), "rejected": _reply(second)}
                    if paired
                    else {"completion": _reply(first), "label": bool(second)}
                )
                yield json.dumps({"prompt": json.loads(prompt), **texts}, ensure_ascii=False) + "\n"
            last = page[-1]["number"]

    def prune(self, days: float) -> int:
        """Remove ballots older than this that nobody voted on; returns how many."""
        limit = _stamp(self._clock() - timedelta(days=days))
        with self._writing() as db:
            query = "DELETE FROM ballots WHERE issued < ? AND id NOT IN (SELECT ballot FROM votes)"
            return db.execute(query, (limit,)).rowcount

    def _insert(self, db: sqlite3.Connection, ballot_id: str, kind: Kind, ballot: Ballot) -> None:
        left, right = ballot.left, ballot.right
        prompt = [{"role": clean(one["role"]), "content": clean(one["content"])} for one in ballot.prompt]
        row = {
            "id": ballot_id,
            "kind": kind,
            "issued": _stamp(self._clock()),
            "voter": ballot.voter,
            "base_id": ballot.base_id,
            "base_hash": ballot.base_hash,
            "left_ref": left.ref,
            "left_hash": left.hash,
            "right_ref": right and right.ref,
            "right_hash": right and right.hash,
            "prompt": json.dumps(prompt),
            "left_reply": left.reply,
            "right_reply": right and right.reply,
            "sampling": json.dumps(asdict(ballot.sampling)),
            "blind": ballot.blind,
        }
        values = {name: clean(value) if isinstance(value, str) else value for name, value in row.items()}
        db.execute(f"INSERT INTO ballots ({', '.join(row)}) VALUES ({', '.join(f':{name}' for name in row)})", values)

    def _count(self, db: sqlite3.Connection, ballot_id: str, verdict: str, comment: str) -> None:
        values = (ballot_id, verdict, clean(comment), _stamp(self._clock()))
        db.execute("INSERT INTO votes (ballot, verdict, comment, voted) VALUES (?, ?, ?, ?)", values)

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._telling():
            db = self._open()
            try:
                return db.execute(query, values).fetchall()
            finally:
                db.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is on disk at the end, or nothing of it."""
        if not self._lock.acquire(timeout=self._patience):
            raise StoreError(f"{self._called}: nothing was stored. {WORDS[sqlite3.SQLITE_BUSY]}")
        try:
            with self._telling():
                db = self._current()
                try:
                    db.execute("BEGIN IMMEDIATE")
                    yield db
                    db.execute("COMMIT")
                except sqlite3.Error:
                    self._drop()  # which rolls back; whatever state it is in, the next call starts afresh
                    raise
                except BaseException:
                    db.rollback()
                    raise
        finally:
            self._lock.release()

    def _current(self) -> sqlite3.Connection:
        """The writer. Opened again where the file was moved or replaced: votes would go into one that nobody finds."""
        if self._writer is not None and self._file != _identity(self.path):
            # The write-ahead log stays at the old place: what it holds goes into the moved file first.
            with suppress(sqlite3.Error):
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._drop()
        if self._writer is None:
            self._writer = self._open()
            self._file = _identity(self.path)
        return self._writer

    def _drop(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(sqlite3.Error):
                writer.close()

    def _open(self) -> sqlite3.Connection:
        """A connection to a file that is a store of this version."""
        db = sqlite3.connect(self.path, timeout=self._patience, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        try:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
            self._prepare(db)
            if db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                # Does not wait where another process is at the file; then that one switches, or the next to open it.
                # Without shared memory there is no WAL. A rollback journal is as safe, but readers hold up writers.
                with suppress(sqlite3.OperationalError):
                    db.execute("PRAGMA journal_mode = WAL")
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Refuse a file that is not ours; make the tables in a new one."""
        db.execute("BEGIN")  # one view of both: another process may be making the tables
        version, tables = _version(db), {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        db.execute("COMMIT")
        if not tables and version == 0:
            db.execute("BEGIN IMMEDIATE")
            if _version(db) == 0:  # else another process was faster
                for statement in SCHEMA:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
            db.execute("COMMIT")
        elif not {"ballots", "votes"} <= tables or version < 1:
            raise StoreError(f"{self._called}: this is a database of something else. Name another file.")
        elif version > VERSION:
            raise StoreError(
                f"{self._called}: a newer version of this project wrote it (format {version}; this one knows up to "
                f"{VERSION}). Update the project, or name another file."
            )

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Turn what SQLite and the disk report into words."""
        try:
            yield
        except sqlite3.Error as error:
            # The low byte is the primary code, the rest says where in SQLite it came up.
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            words = WORDS.get(code, f"SQLite reports: {error}.")
            raise StoreError(f"{self._called}: nothing was stored. {words}") from error
        except OSError as error:
            raise StoreError(f"{self._called}: nothing was stored. {error.strerror or error}.") from error


def _version(db: sqlite3.Connection) -> int:
    return db.execute("PRAGMA user_version").fetchone()[0]


def clean(text: str) -> str:
    """The text as UTF-8 can hold it: halves of surrogate pairs are joined, and U+FFFD where the other is missing."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _stamp(moment: datetime) -> str:
    """ISO 8601 in UTC, always of the same length: it sorts as text."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _row(row: sqlite3.Row) -> Row:
    right = Side(row["right_ref"], row["right_hash"], row["right_reply"]) if row["right_ref"] is not None else None
    ballot = Ballot(
        voter=row["voter"],
        base_id=row["base_id"],
        base_hash=row["base_hash"],
        prompt=json.loads(row["prompt"]),
        left=Side(row["left_ref"], row["left_hash"], row["left_reply"]),
        right=right,
        sampling=Sampling(**json.loads(row["sampling"])),
        blind=bool(row["blind"]),
    )
    voted = datetime.fromisoformat(row["voted"])
    return Row(row["number"], row["kind"], ballot, row["verdict"], row["comment"], voted)
