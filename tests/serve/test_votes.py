"""The preference store: what counts as a vote, what can be wrong with the file; nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from serve import ranking
from serve.votes import (
    COMMENT_LIMIT,
    HUMAN,
    VERDICTS,
    VERSION,
    AlreadyVotedError,
    Ballot,
    Filters,
    InvalidVoteError,
    OtherVoterError,
    Revealed,
    Sampling,
    Side,
    StoreError,
    UnknownBallotError,
    VoteError,
    VoteStore,
)
from tests.processes import ROOT

LEFT = Side("support@v3", "sha256:3", "Restart the router.")
RIGHT = Side("support@v2", "sha256:2", "Buy a new one.")
PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "No internet?"}]
BALLOT = Ballot("ann", "smol", "sha256:b", PROMPT, LEFT, RIGHT, Sampling(0.7, 0.9, 256, 1), blind=True)
THUMBS = replace(BALLOT, right=None, blind=False)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 4, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[VoteStore]:
    made = VoteStore(tmp_path / "votes.db", clock=clock, patience=0.2)
    yield made
    made.close()


def cast(store: VoteStore, verdict: str, ballot: Ballot = BALLOT, comment: str = "") -> Revealed:
    return store.vote(store.issue(ballot), ballot.voter, verdict, comment)


def select(path: Path, query: str) -> list[dict[str, Any]]:
    """What another program reads."""
    db = sqlite3.connect(path)
    db.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in db.execute(query)]
    finally:
        db.close()


def lines(store: VoteStore, filters: Filters = Filters(), paired: bool = True) -> list[Any]:  # noqa: B008
    return [json.loads(line) for line in store.export_jsonl(filters, paired=paired)]


def test_a_vote_is_stored_with_all_that_was_shown(store: VoteStore, clock: Clock) -> None:
    ballot_id = store.issue(BALLOT)
    clock.now += timedelta(minutes=1)
    assert store.vote(ballot_id, "ann", "left", "Shorter.") == Revealed("support@v3", "support@v2", "left", False)
    [row] = store.rows()
    assert row.ballot == BALLOT
    assert (row.number, row.kind, row.verdict, row.comment, row.voted) == (1, "compare", "left", "Shorter.", clock.now)


def test_the_contract_with_training(store: VoteStore) -> None:
    """The views that `data=votes` reads."""
    for verdict in VERDICTS["compare"]:
        cast(store, verdict)
    store.improve(THUMBS, "Pull the plug, wait, plug it in.")
    cast(store, "up", THUMBS)
    cast(store, "down", THUMBS)
    base = {"base_id": "smol", "base_hash": "sha256:b", "voter": "ann", "prompt": json.dumps(PROMPT)}
    human = Side(HUMAN, "", "Pull the plug, wait, plug it in.")
    sides = [
        {f"{role}{suffix}": value for role, side in roles.items() for suffix, value in parts(side).items()}
        for roles in (
            {"chosen": LEFT, "rejected": RIGHT},
            {"chosen": RIGHT, "rejected": LEFT},
            {"chosen": human, "rejected": LEFT},
        )
    ]
    pairs = select(store.path, "SELECT * FROM preference_pairs")
    for pair, side, kind, number in zip(pairs, sides, ["compare", "compare", "edit"], [1, 2, 5], strict=True):
        assert pair.pop("ballot") and pair.pop("voted") == "2026-03-04T12:00:00.000+00:00"
        assert pair == {**base, **side, "kind": kind, "number": number}
    thumbs = select(store.path, "SELECT * FROM unpaired_preferences")
    reply = {"ref": LEFT.ref, "hash": LEFT.hash, "completion": LEFT.reply}
    for thumb, label in zip(thumbs, (1, 0), strict=True):
        assert thumb.pop("ballot") and thumb.pop("voted") and thumb.pop("number")
        assert thumb == {**base, **reply, "label": label}
    assert select(store.path, "PRAGMA user_version") == [{"user_version": VERSION}]
    assert select(store.path, "PRAGMA journal_mode") == [{"journal_mode": "wal"}]


def parts(side: Side) -> dict[str, str]:
    return {"_ref": side.ref, "_hash": side.hash, "": side.reply}


def test_a_vote_for_the_same_text_teaches_nothing(store: VoteStore) -> None:
    cast(store, "left", replace(BALLOT, right=replace(RIGHT, reply=LEFT.reply)))
    assert len(store.rows()) == 1 and lines(store) == []


def test_export_is_trls_format(store: VoteStore) -> None:
    cast(store, "right")
    cast(store, "tie")
    cast(store, "down", THUMBS)
    answer = {side: [{"role": "assistant", "content": side.reply}] for side in (LEFT, RIGHT)}
    assert lines(store) == [{"prompt": PROMPT, "chosen": answer[RIGHT], "rejected": answer[LEFT]}]
    assert lines(store, paired=False) == [{"prompt": PROMPT, "completion": answer[LEFT], "label": False}]
    from trl.data_utils import is_conversational

    assert is_conversational(lines(store)[0])


def test_export_has_each_vote_once_and_in_order(store: VoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.votes.PAGE", 3)
    for number in range(10):
        cast(store, "tie" if number == 4 else "left", replace(BALLOT, left=replace(LEFT, reply=str(number))))
    exported = store.export_jsonl()
    first = json.loads(next(exported))
    cast(store, "left", replace(BALLOT, left=replace(LEFT, reply="while it is read")))
    rest = [json.loads(line)["chosen"][0]["content"] for line in exported]
    assert [first["chosen"][0]["content"], *rest] == [*"012356789", "while it is read"]


@pytest.mark.parametrize("ballot_id", ["", "forged", "x' OR '1'='1", "\ud800", "\0", "é" * 5000])
def test_an_unknown_ballot(store: VoteStore, ballot_id: str) -> None:
    store.issue(BALLOT)
    with pytest.raises(UnknownBallotError, match="not counted"):
        store.vote(ballot_id, "ann", "left")
    assert store.rows() == []


def test_ids_are_long_and_never_the_same(store: VoteStore) -> None:
    ids = {store.issue(BALLOT) for _ in range(50)}
    assert len(ids) == 50 and all(re.fullmatch(r"[\w-]{24}", one) for one in ids)


def test_somebody_elses_ballot(store: VoteStore) -> None:
    ballot_id = store.issue(BALLOT)
    for voter in ("bob", "", "ANN", "ann\0"):
        with pytest.raises(OtherVoterError, match="somebody else"):
            store.vote(ballot_id, voter, "left")
    assert not store.vote(ballot_id, "ann", "left").repeated


def test_a_vote_counts_once_and_is_final(store: VoteStore) -> None:
    ballot_id = store.issue(BALLOT)
    first = store.vote(ballot_id, "ann", "both_bad", "first")
    assert store.vote(ballot_id, "ann", "both_bad", "second") == replace(first, repeated=True)
    with pytest.raises(AlreadyVotedError, match=r"already voted on these replies \(both bad\)"):
        store.vote(ballot_id, "ann", "left")
    with pytest.raises(OtherVoterError):
        store.vote(ballot_id, "bob", "both_bad")
    [row] = store.rows()
    assert (row.verdict, row.comment) == ("both_bad", "first")


@pytest.mark.parametrize(
    ("ballot", "verdict"),
    [(BALLOT, "up"), (BALLOT, ""), (BALLOT, "LEFT"), (BALLOT, None), (BALLOT, ["left"]), (THUMBS, "left")],
)
def test_a_verdict_of_another_kind(store: VoteStore, ballot: Ballot, verdict: Any) -> None:
    with pytest.raises(InvalidVoteError, match="is not one of"):
        cast(store, verdict, ballot)
    assert store.rows() == []


def test_a_comment_has_a_limit_and_the_ballot_stays_open(store: VoteStore) -> None:
    ballot_id = store.issue(BALLOT)
    with pytest.raises(InvalidVoteError, match="2,001 characters"):
        store.vote(ballot_id, "ann", "left", "x" * (COMMENT_LIMIT + 1))
    assert not store.vote(ballot_id, "ann", "left", "x" * COMMENT_LIMIT).repeated


def test_a_voter_has_one_better_answer_to_a_reply_the_last(store: VoteStore, clock: Clock) -> None:
    for number, repeated in enumerate([False, True]):
        found = store.improve(THUMBS, "Better.", f"comment {number}")
        assert found == Revealed("support@v3", HUMAN, "right", repeated)
    [row] = store.rows()
    assert (row.ballot.right, row.comment, row.voted) == (Side(HUMAN, "", "Better."), "comment 0", clock.now)
    clock.now += timedelta(minutes=1)
    assert store.improve(THUMBS, "Better still.", "again").repeated, "no vote more"
    store.improve(replace(THUMBS, voter="bob"), "Better.")
    store.improve(replace(THUMBS, left=replace(LEFT, reply="Another.")), "Better.")
    edits = [(row.number, row.ballot.voter, row.ballot.right, row.comment, row.voted) for row in store.rows()]
    assert edits[::-1] == [
        (1, "ann", Side(HUMAN, "", "Better still."), "again", clock.now),
        (2, "bob", Side(HUMAN, "", "Better."), "", clock.now),
        (3, "ann", Side(HUMAN, "", "Better."), "", clock.now),
    ]
    pairs = select(store.path, "SELECT * FROM preference_pairs")
    assert [(pair["chosen"], pair["rejected"], pair["voter"]) for pair in pairs] == [
        ("Better still.", LEFT.reply, "ann"),
        ("Better.", LEFT.reply, "bob"),
        ("Better.", "Another.", "ann"),
    ]
    assert store.counts()["edit"] == {"right": 3}


def test_a_hundred_edits_of_one_reply_are_one_pair(store: VoteStore) -> None:
    patient = VoteStore(store.path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: patient.improve(THUMBS, f"Better {number}."), range(100)))
    patient.close()
    assert sum(not one.repeated for one in found) == 1
    patient.improve(THUMBS, "Best.")
    patient.close()
    assert [pair["chosen"] for pair in select(store.path, "SELECT * FROM preference_pairs")] == ["Best."]


@pytest.mark.parametrize(("better", "comment"), [("", ""), (" \n", ""), (LEFT.reply, ""), ("Good.", "x" * 2001)])
def test_no_better_answer(store: VoteStore, better: str, comment: str) -> None:
    with pytest.raises(InvalidVoteError, match="Nothing was stored"):
        store.improve(THUMBS, better, comment)
    assert select(store.path, "SELECT * FROM ballots") == []


def test_an_edit_cannot_be_issued_nor_made_of_two_replies(store: VoteStore) -> None:
    with pytest.raises(ValueError, match="improve"):
        store.issue(replace(BALLOT, right=Side(HUMAN, "", "x")))
    with pytest.raises(ValueError, match="one reply"):
        store.improve(BALLOT, "x")


def test_counts(store: VoteStore) -> None:
    for verdict in ("left", "left", "tie"):
        cast(store, verdict)
    cast(store, "up", THUMBS)
    store.improve(THUMBS, "Better.")
    store.issue(BALLOT)
    assert store.counts() == {
        "compare": {"left": 2, "right": 0, "tie": 1, "both_bad": 0},
        "edit": {"right": 1},
        "thumbs": {"up": 1, "down": 0},
    }


def test_filters(store: VoteStore, clock: Clock) -> None:
    start = clock.now
    ballots = {
        1: BALLOT,
        2: replace(BALLOT, voter="bob", blind=False),
        3: replace(BALLOT, base_hash="sha256:other"),
        4: replace(BALLOT, right=Side("legal@v1", "sha256:l", "Sue.")),
        5: THUMBS,
    }
    for ballot in ballots.values():
        cast(store, "left" if ballot.right else "up", ballot)
        clock.now += timedelta(hours=1)
    store.improve(THUMBS, "Better.")

    def found(**given: Any) -> list[int]:
        return [row.number for row in store.rows(Filters(**given))]

    assert found() == [6, 5, 4, 3, 2, 1]
    assert [row.number for row in store.rows(limit=2)] == [6, 5]
    assert found(voter="bob") == [2]
    assert found(base_hash="sha256:other") == [3]
    assert found(kind="edit") == [6] == found(refs=[HUMAN])
    assert found(refs=["legal@v1", "nobody"]) == [4]
    assert found(refs=["support@v3"]) == [6, 5, 4, 3, 2, 1]
    assert found(blind_only=True) == [4, 3, 1]
    assert found(since=start + timedelta(hours=1), until=start + timedelta(hours=3)) == [3, 2]
    assert found(since=(start + timedelta(hours=4)).astimezone()) == [6, 5]
    assert found(voter="ann", kind="compare", blind_only=True, base_hash="sha256:b") == [4, 1]
    assert found(voter="' OR 1 --") == found(voter="\ud800") == []
    # The same filters for what is exported and ranked.
    assert len(lines(store, Filters(blind_only=True))) == 3
    assert len(lines(store, Filters(kind="thumbs"), paired=False)) == 1
    assert lines(store, Filters(voter="bob", kind="edit")) == []
    assert store.comparisons(Filters(refs=["legal@v1"])) == [
        ranking.Vote(
            ranking.Model("support@v3", "sha256:3"),
            ranking.Model("legal@v1", "sha256:l"),
            "left",
            "ann",
            json.dumps(PROMPT),
            start + timedelta(hours=3),
        )
    ]
    assert len(store.comparisons()) == 4


def test_prune_removes_only_old_ballots_without_a_vote(store: VoteStore, clock: Clock) -> None:
    old, voted = store.issue(BALLOT), store.issue(BALLOT)
    store.vote(voted, "ann", "tie")
    clock.now += timedelta(days=8)
    new = store.issue(BALLOT)
    assert store.prune(days=7) == 1
    with pytest.raises(UnknownBallotError, match="too long"):
        store.vote(old, "ann", "left")
    assert store.vote(voted, "ann", "tie").repeated
    assert not store.vote(new, "ann", "left").repeated
    assert store.prune(days=7) == 0


def test_a_clock_that_goes_back_neither_loses_nor_reorders(store: VoteStore, clock: Clock) -> None:
    ballot_ids = [store.issue(replace(BALLOT, left=replace(LEFT, reply=str(number)))) for number in range(4)]
    for ballot_id, days in zip(ballot_ids, (0, -400, 9000, -30_000), strict=True):
        clock.now += timedelta(days=days)
        store.vote(ballot_id, "ann", "left")
    assert [row.ballot.left.reply for row in store.rows()] == list("3210")
    assert [line["chosen"][0]["content"] for line in lines(store)] == list("0123")
    assert [pair["chosen"] for pair in select(store.path, "SELECT * FROM preference_pairs")] == list("0123")


# What a browser or a model can send: NUL, halves of a surrogate pair alone, together and swapped, lines that only
# some programs split, and markup.
HOSTILE = "a\0b \ud83d\ude00 \ud800 \udc00\ud800 \u2028\x85\x1b[31m </script> '; DROP TABLE votes; -- \ufffd\U0010ffff"
STORED = "a\0b 😀 \ufffd \ufffd\ufffd \u2028\x85\x1b[31m </script> '; DROP TABLE votes; -- \ufffd\U0010ffff"


def test_hostile_texts_come_back_as_they_were(store: VoteStore) -> None:
    ballot = replace(
        BALLOT,
        voter=HOSTILE,
        prompt=[{"role": "user", "content": HOSTILE}],
        left=replace(LEFT, reply=HOSTILE),
        right=replace(RIGHT, reply=HOSTILE + HOSTILE),
    )
    cast(store, "left", ballot, comment=HOSTILE)
    store.improve(replace(ballot, right=None), HOSTILE + "better")
    edit, vote = store.rows()
    assert vote.ballot.left.reply == vote.ballot.prompt[0]["content"] == vote.comment == vote.ballot.voter == STORED
    assert edit.ballot.right is not None and edit.ballot.right.reply == STORED + "better"
    [first, _] = lines(store)
    assert first["prompt"] == [{"role": "user", "content": STORED}]
    assert first["rejected"][0]["content"] == STORED + STORED
    assert all(line.count("\n") == 1 and line.endswith("\n") for line in store.export_jsonl())


def test_a_long_reply(store: VoteStore) -> None:
    reply = "x" * 3_000_000
    cast(store, "left", replace(BALLOT, left=replace(LEFT, reply=reply)))
    assert store.rows()[0].ballot.left.reply == reply


def test_closed_is_opened_again(store: VoteStore) -> None:
    cast(store, "left")
    store.close()
    cast(store, "right")
    assert len(store.rows()) == 2


def test_a_transaction_that_fails_in_the_middle_leaves_nothing_and_the_next_works(store: VoteStore) -> None:
    incomplete: Any = None
    with pytest.raises(StoreError, match="nothing was stored"):
        store.improve(replace(THUMBS, base_id=incomplete), "Better.")
    assert select(store.path, "SELECT * FROM ballots") == []
    store.improve(THUMBS, "Better.")
    assert len(store.rows()) == 1


# What a file can be, and what is said of it.
OTHERS: dict[str, str | bytes] = {
    "is no SQLite database": b"These are notes, and no database at all. " * 100,
    "is a database of something else": "CREATE TABLE notes (text)",
    "a newer version of this project wrote it": f"PRAGMA user_version = {VERSION + 1}",
}


@pytest.mark.parametrize("said", OTHERS)
def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path, said: str) -> None:
    path, content = tmp_path / "votes.db", OTHERS[said]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        if "newer" in said:
            VoteStore(path).close()
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute(content)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=said) as caught:
        VoteStore(path)
    assert f"votes={path}" in str(caught.value)
    assert path.read_bytes() == before


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "votes.db"):
        with pytest.raises(StoreError, match=re.escape(str(path))):
            VoteStore(path)
    VoteStore(tmp_path / "new" / "er" / "votes.db").close()


def test_an_empty_file_is_a_new_store(tmp_path: Path) -> None:
    (tmp_path / "votes.db").touch()
    store = VoteStore(tmp_path / "votes.db")
    cast(store, "left")
    store.close()


def test_a_file_locked_by_another_program(store: VoteStore) -> None:
    ballot_id = store.issue(BALLOT)
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        with pytest.raises(StoreError, match="Another program holds the file") as caught:
            store.vote(ballot_id, "ann", "left")
        assert time.monotonic() - began < 5
        assert str(store.path.parent) not in str(caught.value), "a path of the server"
        assert store.rows() == []  # readers go on
        other.execute("ROLLBACK")
    assert not store.vote(ballot_id, "ann", "left").repeated


def test_a_damaged_file(store: VoteStore) -> None:
    for _ in range(20):
        cast(store, "left")
    store.close()
    content = bytearray(store.path.read_bytes())
    content[4096:] = random.Random(0).randbytes(len(content) - 4096)
    store.path.write_bytes(content)
    for call in (lambda: cast(store, "left"), store.rows, store.counts, lambda: list(store.export_jsonl())):
        with pytest.raises(StoreError, match=r"votes\.db: nothing was stored\. The file is damaged"):
            call()
    store.path.rename(store.path.with_name("damaged.db"))
    cast(store, "left")
    assert len(store.rows()) == 1


def test_a_file_moved_away_keeps_its_votes_and_a_new_one_begins(store: VoteStore) -> None:
    """A store that wrote on into the moved file would acknowledge votes that nobody finds."""
    cast(store, "left")
    old = store.issue(BALLOT)
    store.path.rename(store.path.with_name("old.db"))
    with pytest.raises(UnknownBallotError):
        store.vote(old, "ann", "left")
    cast(store, "right")
    cast(store, "tie")
    assert [row.verdict for row in store.rows()] == ["tie", "right"]
    store.close()
    moved = VoteStore(store.path.with_name("old.db"))
    assert [row.verdict for row in moved.rows()] == ["left"]
    assert not moved.vote(old, "ann", "left").repeated
    moved.close()


# A process that votes: it opens the file in argv[1], then reads commands, and says what came of each.
VOTER = """
import sys
from pathlib import Path
from serve.votes import StoreError, VoteStore
from tests.serve.test_votes import BALLOT, replace, LEFT
store = VoteStore(Path(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    ballot = replace(BALLOT, left=replace(LEFT, reply=line * int(sys.argv[2])))
    try:
        ballot_id = store.issue(ballot)
        store.vote(ballot_id, "ann", "left")
        print("counted", ballot_id, flush=True)
    except StoreError as error:
        print("refused", error, flush=True)
"""


@contextlib.contextmanager
def voter(path: Path, length: int = 1) -> Iterator[subprocess.Popen[str]]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", VOTER, str(path), str(length)], cwd=ROOT, env=env, **pipes)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.communicate()


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("vote\n")
    process.stdin.flush()
    return process.stdout.readline()


def whole(path: Path) -> list[str]:
    """The ids of the votes in a file that is sound."""
    assert select(path, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert select(path, "PRAGMA foreign_key_check") == []
    return [row["ballot"] for row in select(path, "SELECT ballot FROM votes ORDER BY number")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits another process's file sizes")
def test_a_limit_on_file_sizes_is_told_and_voting_goes_on_after_it(tmp_path: Path) -> None:
    path = tmp_path / "votes.db"
    with voter(path, length=4000) as process:
        acknowledged = [ask(process).split()[1]]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        said = [ask(process) for _ in range(60)]
        refused = [one for one in said if one.startswith("refused")]
        assert len(refused) > 5 and all("votes.db: nothing was stored. The disk" in one for one in refused), said
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.append(ask(process))
        assert said[-1].startswith("counted"), said[-1]
    acknowledged += [one.split()[1] for one in said if one.startswith("counted")]
    assert whole(path) == acknowledged


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real small disk, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_voting_goes_on_after_it(disk: Path) -> None:
    store = VoteStore(disk / "votes.db")
    long = replace(BALLOT, left=replace(LEFT, reply="x" * 3000))
    acknowledged = []

    def attempt() -> None:
        ballot_id = store.issue(long)
        store.vote(ballot_id, "ann", "left")
        acknowledged.append(ballot_id)

    attempt()
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    for _ in range(5):
        with pytest.raises(StoreError, match="The disk") as caught:
            for _ in range(100):
                attempt()
        assert "nothing was stored" in str(caught.value) and str(disk) not in str(caught.value)
    filler.unlink()
    for _ in range(3):
        attempt()
    store.close()
    assert whole(disk / "votes.db") == acknowledged


def test_a_new_store_on_a_full_disk_leaves_nothing_half_made(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(StoreError, match="disk"):
        VoteStore(disk / "votes.db")
    (disk / "filler").unlink()
    store = VoteStore(disk / "votes.db")
    cast(store, "left")
    store.close()


def test_a_read_only_disk(disk: Path) -> None:
    store = VoteStore(disk / "votes.db")
    ballot_id = store.issue(BALLOT)
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for call in (lambda: store.vote(ballot_id, "ann", "left"), lambda: VoteStore(disk / "votes.db")):
        with pytest.raises(StoreError, match=r"read-only|cannot be opened"):
            call()
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert not store.vote(ballot_id, "ann", "left").repeated
    store.close()


def test_threads_on_one_ballot_count_one_vote(store: VoteStore) -> None:
    patient = VoteStore(store.path)
    ballot_id = patient.issue(BALLOT)
    barrier = threading.Barrier(8)

    def vote(number: int) -> str:
        barrier.wait()
        try:
            found = patient.vote(ballot_id, "ann", ("left", "right")[number % 2])
            return "repeated" if found.repeated else "counted"
        except VoteError as error:
            return type(error).__name__

    with ThreadPoolExecutor(8) as pool:
        outcomes = Counter(pool.map(vote, range(8)))
    patient.close()
    assert outcomes == {"counted": 1, "repeated": 3, "AlreadyVotedError": 4}
    assert len(whole(store.path)) == 1


@pytest.mark.slow
def test_threads_and_processes_voting_at_once(tmp_path: Path) -> None:
    """Eight threads here and two processes beside, on a file that all of them may be the first to make."""
    path = tmp_path / "votes.db"
    acknowledged: list[str] = []

    def by_process() -> None:
        with voter(path) as process:
            for _ in range(100):
                acknowledged.append(ask(process).removeprefix("counted ").strip())

    def by_thread(store: VoteStore) -> None:
        for number in range(50):
            ballot_id = store.issue(BALLOT)
            store.vote(ballot_id, "ann", VERDICTS["compare"][number % 4])
            acknowledged.append(ballot_id)

    with ThreadPoolExecutor(10) as pool:
        processes = [pool.submit(by_process) for _ in range(2)]
        while not path.exists():
            time.sleep(0.001)
        shared = VoteStore(path, patience=60)
        threads = [pool.submit(by_thread, shared) for _ in range(8)]
        for one in [*processes, *threads]:
            one.result()
    assert shared.counts()["compare"]["left"] == 200 + 8 * 13
    shared.close()
    assert len(acknowledged) == 600 and sorted(acknowledged) == sorted(whole(path))


def test_many_open_a_new_file_at_once(tmp_path: Path) -> None:
    for attempt in range(20):
        path = tmp_path / f"{attempt}.db"
        barrier = threading.Barrier(6)

        def make(path: Path = path, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            store = VoteStore(path)
            cast(store, "left")
            store.close()

        with ThreadPoolExecutor(6) as pool:
            for one in [pool.submit(make) for _ in range(6)]:
                one.result()
        assert len(whole(path)) == 6


@pytest.mark.slow
def test_kill_9_loses_and_doubles_nothing(tmp_path: Path) -> None:
    path, acknowledged = tmp_path / "votes.db", []
    seed = int(os.environ.get("FAULTS_SEED", time.time_ns() % 100_000))
    print(f"FAULTS_SEED={seed} repeats the moments of the kills")
    draw = random.Random(seed)
    for _ in range(6):
        with voter(path, length=draw.choice([1, 2000])) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("vote\n" * 2000)
            process.stdin.flush()
            said = process.stdout.readline()
            timer = threading.Timer(draw.uniform(0, 0.3), process.send_signal, [signal.SIGKILL])
            timer.start()
            while said.endswith("\n"):  # a part of a line is no acknowledgement
                assert said.startswith("counted "), said
                acknowledged.append(said.split()[1])
                said = process.stdout.readline()
            assert process.wait() == -signal.SIGKILL
            timer.cancel()
        stored = Counter(whole(path))
        assert set(stored.values()) == {1} and set(acknowledged) <= set(stored)
        # Of each process at most the last vote was on disk and not yet told.
        assert len(stored) - len(set(acknowledged)) <= 6
    assert len(acknowledged) >= 6 and len(acknowledged) == len(set(acknowledged))
