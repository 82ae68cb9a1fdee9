"""Training on votes: which of them become pairs, how they are split, what is refused; the store stays as it was."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lit_ft import adapter
from lit_ft.adapter import Base
from lit_ft.data import votes as reader
from lit_ft.data.chat import ChatEncoder
from lit_ft.data.datamodule import load_examples, prepare
from lit_ft.data.files import open_source
from lit_ft.data.votes import Votes, read_votes
from lit_ft.errors import UserError
from lit_ft.models.resolve import model_fingerprint
from tests import tiny
from tests.conftest import Outcome

# The contract with the server: what the view is made of matters to nobody but the view.
SCHEMA = """
CREATE TABLE ballots(id TEXT PRIMARY KEY, kind TEXT, issued TEXT, voter TEXT, base_id TEXT, base_hash TEXT,
    left_ref TEXT, left_hash TEXT, right_ref TEXT, right_hash TEXT, prompt TEXT, left_reply TEXT, right_reply TEXT,
    sampling TEXT, blind INTEGER);
CREATE TABLE votes(number INTEGER PRIMARY KEY AUTOINCREMENT, ballot TEXT UNIQUE REFERENCES ballots(id), verdict TEXT,
    comment TEXT, voted TEXT);
CREATE VIEW preference_pairs AS
SELECT id AS ballot, voted, kind, base_id, base_hash,
    iif(verdict = 'left', left_ref, right_ref) AS chosen_ref,
    iif(verdict = 'left', left_hash, right_hash) AS chosen_hash,
    iif(verdict = 'left', right_ref, left_ref) AS rejected_ref,
    iif(verdict = 'left', right_hash, left_hash) AS rejected_hash, voter, prompt,
    iif(verdict = 'left', left_reply, right_reply) AS chosen,
    iif(verdict = 'left', right_reply, left_reply) AS rejected, number
FROM votes JOIN ballots ON ballot = id
WHERE kind IN ('compare', 'edit') AND verdict IN ('left', 'right') AND left_reply <> right_reply;
"""
OURS, OTHER = Base("desk/base", "sha256:" + "a" * 64), Base("desk/other", "sha256:" + "b" * 64)


@dataclass(frozen=True)
class Vote:
    """One vote: a question (or whole messages, or the prompt as it stands in the file), two replies, the verdict."""

    prompt: str | list[dict[str, str]] | bytes
    left: str = "yes"
    right: str = "no"
    verdict: str = "left"
    kind: str = "compare"


def write_store(path: Path, votes: Sequence[Vote], base: Base = OURS) -> Path:
    """Add votes to the store `path` as the server does; ballots are b1, b2, …, and the clock always goes back."""
    fresh = not path.exists()
    with closing(sqlite3.connect(path)) as store, store:
        if fresh:
            store.execute("PRAGMA journal_mode=WAL")
            store.executescript(SCHEMA)
        (there,) = store.execute("SELECT count(*) FROM votes").fetchone()
        for number, vote in enumerate(votes, there + 1):
            prompt = [{"role": "user", "content": vote.prompt}] if isinstance(vote.prompt, str) else vote.prompt
            text = prompt.decode() if isinstance(prompt, bytes) else json.dumps(prompt)
            voted = (datetime(2026, 7, 1, tzinfo=UTC) - timedelta(seconds=number)).isoformat()
            store.execute(
                f"INSERT INTO ballots VALUES ({', '.join('?' * 15)})",
                (
                    *(
                        f"b{number}",
                        vote.kind,
                        voted,
                        "voter",
                        base.id,
                        base.hash,
                        "support@v1",
                        "x",
                        "support@v2",
                        "y",
                    ),
                    *(text, vote.left, vote.right, "{}", 1),
                ),
            )
            store.execute("INSERT INTO votes VALUES (NULL, ?, ?, NULL, ?)", (f"b{number}", vote.verdict, voted))
    return path


def questions(count: int, first: int = 0) -> list[Vote]:
    return [Vote(f"question {k}?") for k in range(first, first + count)]


def told(votes: Votes) -> dict[str, tuple[str, str]]:
    """The chosen and the rejected reply by the last message of the prompt, of both sides."""
    rows = [row for side in (votes.train, votes.held_out) if side for _, row in side.rows]
    assert all(len(row["chosen"]) == len(row["rejected"]) == 1 for row in rows)
    return {row["prompt"][-1]["content"]: (row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows}


def prompts(side: Any) -> set[str]:
    return {row["prompt"][-1]["content"] for _, row in side.rows} if side else set()


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        read_votes(str(path), OURS, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_PATIENCE", 0.1)


# What becomes of votes


def test_votes_become_conversations_in_trls_preference_format(tmp_path: Path) -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Open?"},
    ]
    path = write_store(
        tmp_path / "votes.db",
        [
            Vote(history, "From nine.", "Dunno."),
            Vote("Why?", "Because.", "Therefore.", "right"),
            Vote("Thanks", "Bye.", "Goodbye!", "right", "edit"),
            Vote("undecided", verdict="tie"),
            Vote("undecided", verdict="both_bad"),
            Vote("liked", verdict="up", kind="thumbs"),
            Vote("equal", "same", "same"),
        ],
    )
    votes = read_votes(str(path), OURS, min_votes=3, val_split=0)
    assert votes.held_out is None
    assert votes.train.name == "votes.db"
    assert votes.train.rows == [
        (
            "votes.db: ballot b1",
            {
                "prompt": history,
                "chosen": [{"role": "assistant", "content": "From nine."}],
                "rejected": [{"role": "assistant", "content": "Dunno."}],
            },
        ),
        (
            "votes.db: ballot b2",
            {
                "prompt": [{"role": "user", "content": "Why?"}],
                "chosen": [{"role": "assistant", "content": "Therefore."}],
                "rejected": [{"role": "assistant", "content": "Because."}],
            },
        ),
        (
            "votes.db: ballot b3",
            {
                "prompt": [{"role": "user", "content": "Thanks"}],
                "chosen": [{"role": "assistant", "content": "Goodbye!"}],
                "rejected": [{"role": "assistant", "content": "Bye."}],
            },
        ),
    ]


def test_the_same_verdict_counts_once_and_contradictions_go_by_majority(tmp_path: Path) -> None:
    path = write_store(
        tmp_path / "votes.db",
        [
            Vote("often", "a", "b"),
            Vote("often", "b", "a", "right"),  # the same, shown on the other side
            Vote("most", "a", "b", "left"),
            Vote("most", "a", "b", "right"),
            Vote("most", "b", "a", "left"),
            Vote("even", "a", "b", "left"),
            Vote("even", "a", "b", "right"),
            Vote("two", "a", "b"),
            Vote("two", "a", "c"),  # another reply: another pair
        ],
    )
    votes = read_votes(str(path), OURS, min_votes=4, val_split=0)
    rows = [(where, row["prompt"][0]["content"], row["chosen"][0]["content"]) for where, row in votes.train.rows]
    assert rows == [
        ("votes.db: ballot b1", "often", "a"),
        ("votes.db: ballot b4", "most", "b"),  # the first ballot that says so
        ("votes.db: ballot b8", "two", "a"),
        ("votes.db: ballot b9", "two", "a"),
    ]
    assert "9 decisive votes of desk/base (sha256:aaaaaaaa): 4 different pairs, 1 more on which they" in votes.summary


def test_prompts_that_differ_in_their_system_message_are_two(tmp_path: Path) -> None:
    asked = {"role": "user", "content": "q"}
    path = write_store(
        tmp_path / "votes.db",
        [Vote([asked], "a", "b", "left"), Vote([{"role": "system", "content": "s"}, asked], "a", "b", "right")],
    )
    assert len(read_votes(str(path), OURS, min_votes=2, val_split=0).train.rows) == 2


def test_keys_of_a_message_may_stand_in_any_order(tmp_path: Path) -> None:
    path = write_store(
        tmp_path / "votes.db",
        [Vote(b'[{"role": "user", "content": "q"}]'), Vote(b'[{"content":"q","role":"user"}]', verdict="right")],
    )
    assert "1 more on which they are even" in refusal(path, min_votes=1)


def test_votes_on_other_bases_are_named_and_left_out(tmp_path: Path) -> None:
    path = write_store(tmp_path / "votes.db", questions(3))
    write_store(path, questions(5, first=100), OTHER)
    # The same name with other weights is another base.
    write_store(path, questions(2, first=200), Base(OURS.id, "sha256:" + "c" * 64))
    votes = read_votes(str(path), OURS, min_votes=3, val_split=0)
    assert set(told(votes)) == {"question 0?", "question 1?", "question 2?"}
    assert votes.summary.endswith(
        "left out, on other bases: 5 of desk/other (sha256:bbbbbbbb), 2 of desk/base (sha256:cccccccc)"
    )
    trial = read_votes(str(path), Base(OURS.id, "sha256:tiny"), min_votes=5, val_split=0, any_weights=True)
    assert len(trial.train.rows) == 5


STRANGE = ["a\0b", "line\r\nbreak", "\u2028\u0085", "🦊 e\u0301", '"; DROP TABLE votes; --', "\ufffe\x1b[31m", " "]


def test_replies_come_back_to_the_character(tmp_path: Path) -> None:
    path = write_store(tmp_path / "votes.db", [Vote(f"q{text}", text, f"not {text}") for text in STRANGE])
    votes = read_votes(str(path), OURS, min_votes=len(STRANGE), val_split=0)
    assert told(votes) == {f"q{text}": (text, f"not {text}") for text in STRANGE}


def test_more_votes_than_the_reader_takes_at_once(tmp_path: Path) -> None:
    path = write_store(tmp_path / "votes.db", questions(10_001))
    votes = read_votes(str(path), OURS, val_split=0.25)
    assert votes.held_out and len(votes.train.rows) + len(votes.held_out.rows) == 10_001
    assert abs(len(votes.held_out.rows) / 10_001 - 0.25) < 0.02


# The split


def test_no_prompt_stands_on_both_sides_and_each_stays_where_it_is(tmp_path: Path) -> None:
    several = [Vote(f"question {k}?", f"yes {n}", "no") for k in range(40) for n in range(3)]
    path = write_store(tmp_path / "votes.db", several)
    before = read_votes(str(path), OURS, val_split=0.3)
    assert before.held_out and not prompts(before.train) & prompts(before.held_out)
    assert len(before.train.rows) == 3 * len(prompts(before.train))
    assert prompts(before.train) | prompts(before.held_out) == {f"question {k}?" for k in range(40)}
    write_store(path, questions(60, first=30))
    after = read_votes(str(path), OURS, val_split=0.3)
    assert prompts(before.train) < prompts(after.train)
    assert prompts(before.held_out) < prompts(after.held_out)


def test_the_split_is_that_of_the_prompts_sha256(tmp_path: Path) -> None:
    """Derived apart: a change of it would move prompts that were trained on to the held-out side."""
    path = write_store(tmp_path / "votes.db", questions(30))
    votes = read_votes(str(path), OURS, val_split=0.5)

    def share(text: str) -> float:
        digest = hashlib.sha256(b'[{"content": "%s", "role": "user"}]' % text.encode()).hexdigest()
        return int(digest[:16], 16) / 16**16

    assert prompts(votes.held_out) == {text for text in told(votes) if share(text) < 0.5}


def test_what_was_trained_on_is_never_held_out_later(tmp_path: Path) -> None:
    """Also from so few prompts on that none of them would be held out by its hash."""
    path = write_store(tmp_path / "votes.db", questions(2))
    trained: set[str] = set()
    for count in range(2, 60):
        votes = read_votes(str(path), OURS, min_votes=2, val_split=0.05)
        assert votes.held_out and not trained & prompts(votes.held_out)
        trained |= prompts(votes.train)
        write_store(path, questions(1, first=count))


def test_votes_on_one_prompt_cannot_be_split(tmp_path: Path) -> None:
    path = write_store(tmp_path / "votes.db", [Vote("q", f"yes {n}", "no") for n in range(20)])
    text = refusal(path)
    assert "all votes are on one prompt" in text and "data.val_split=0" in text and "data.val_path" in text
    assert len(read_votes(str(path), OURS, val_split=0).train.rows) == 20


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    path = write_store(tmp_path / "votes.db", questions(3))
    assert "all 3 prompts fall among the held-out ones (data.val_split=0.999999)" in refusal(
        path, min_votes=3, val_split=0.999999
    )


@pytest.mark.parametrize("share", [-0.1, 1.0, 7, float("nan")])
def test_a_share_that_is_none(tmp_path: Path, share: float) -> None:
    path = write_store(tmp_path / "votes.db", questions(3))
    assert "data.val_split" in refusal(path, min_votes=3, val_split=share)


# What is refused


def test_no_file_or_a_folder(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "votes.db")
    assert "python -m serve" in refusal(tmp_path / "votes.db")
    assert "this is a folder" in refusal(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is made by looking"


@pytest.mark.parametrize(
    "content", [b"not a database, but long enough to be taken for one" * 100, b"SQLite format 3\0"]
)
def test_not_a_database(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "votes.db"
    path.write_bytes(content)
    text = refusal(path)
    assert "not a whole SQLite database" in text and "data=file" in text
    assert path.read_bytes() == content


def test_a_database_cut_short(tmp_path: Path) -> None:
    path = write_store(tmp_path / "votes.db", questions(500))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(path) in refusal(path)


def test_a_database_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "votes.db"
    path.touch()  # an empty file is an empty database
    assert "lacks a view preference_pairs" in refusal(path)
    with closing(sqlite3.connect(path)) as store:
        store.execute("CREATE TABLE preference_pairs(prompt, chosen, rejected)")
    assert "lacks the columns ballot, number, base_id, base_hash in preference_pairs" in refusal(path)


def test_locked_by_a_writer_that_shuts_readers_out(tmp_path: Path, few: None) -> None:
    path = write_store(tmp_path / "votes.db", questions(3))
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode=DELETE")
        writer.execute("BEGIN EXCLUSIVE")
        assert "locked by another process" in refusal(path, min_votes=3)
        writer.execute("ROLLBACK")
    assert read_votes(str(path), OURS, min_votes=3)


def test_too_few_votes_say_how_many_and_of_which_bases(tmp_path: Path) -> None:
    path = write_store(tmp_path / "votes.db", [*questions(12), Vote("question 0?")])
    write_store(path, questions(30), OTHER)
    text = refusal(path)
    assert "13 decisive votes of desk/base (sha256:aaaaaaaa): 12 different pairs; data.min_votes=20" in text
    assert "Votes of other bases: 30 of desk/other (sha256:bbbbbbbb)" in text
    assert "data.min_votes=12" in text and "model=" in text


def test_no_votes_at_all(tmp_path: Path) -> None:
    text = refusal(write_store(tmp_path / "votes.db", []), min_votes=0)
    assert "0 decisive votes of desk/base" in text and "other bases: none" in text
    assert "Collect more" in text and "train on these" not in text and "model=" not in text


def test_votes_on_another_base_only(tmp_path: Path) -> None:
    text = refusal(write_store(tmp_path / "votes.db", questions(30), OTHER))
    assert "0 decisive votes of desk/base" in text and "30 of desk/other" in text and "train on these" not in text


def test_everything_contradictory(tmp_path: Path) -> None:
    both = [Vote(f"q{k}", verdict=verdict) for k in range(30) for verdict in ("left", "right")]
    text = refusal(write_store(tmp_path / "votes.db", both))
    assert "60 decisive votes of desk/base (sha256:aaaaaaaa): 0 different pairs, 30 more on which they are even" in text


@pytest.mark.parametrize(
    "prompt",
    [b"[{", b"", b'"only text"', b"{}", b"null", b"[" * 100_000],
    ids=lambda text: text[:9].decode() or "empty",
)
def test_a_broken_prompt_names_its_ballot(tmp_path: Path, prompt: bytes) -> None:
    path = write_store(tmp_path / "votes.db", [*questions(3), Vote(prompt)])
    text = refusal(path, min_votes=3)
    assert text.startswith("votes.db: ballot b4: its prompt is ")
    assert "DELETE FROM votes WHERE ballot = 'b4'" in text


@pytest.mark.parametrize("prompt", [b"[]", b"[1]", b'[{"role": "user"}]', b'[{"role": "user", "content": "\\ud800"}]'])
def test_messages_that_are_none_are_dropped_by_ballot(tmp_path: Path, prompt: bytes) -> None:
    path = write_store(tmp_path / "votes.db", [*questions(3), Vote(prompt)])
    votes = read_votes(str(path), OURS, min_votes=3, val_split=0)
    encoder = ChatEncoder(tiny.tokenizer())
    made = prepare(votes.train, encoder, "preference", max_length=100, max_dropped=0.5)
    assert len(made.examples) == 3 and sum(made.dropped.values()) == 1
    with pytest.raises(UserError, match=r"first votes\.db: ballot b4\)"):
        prepare(votes.train, encoder, "preference", max_length=100)


def test_a_reply_that_is_no_text(tmp_path: Path) -> None:
    path = write_store(tmp_path / "votes.db", questions(3))
    with closing(sqlite3.connect(path)) as store, store:
        store.execute("UPDATE ballots SET left_reply = CAST(x'ff' AS TEXT) WHERE id = 'b2'")
    assert "cannot be read" in refusal(path, min_votes=3)
    with closing(sqlite3.connect(path)) as store, store:
        store.execute("UPDATE ballots SET left_reply = x'ff' WHERE id = 'b2'")
    assert "not text" in refusal(path, min_votes=3)


def test_a_store_is_not_taken_for_a_file_of_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'\.db' is none of .* data=votes data\.path=FILE"):
        open_source(str(write_store(tmp_path / "votes.db", questions(1))))


# The store


def test_a_store_that_grows_is_read_anew(tmp_path: Path) -> None:
    path = write_store(tmp_path / "votes.db", questions(3))
    for count in range(3, 6):
        assert len(read_votes(str(path), OURS, min_votes=3, val_split=0).train.rows) == count
        write_store(path, questions(1, first=count))


def test_it_is_read_while_the_server_writes(tmp_path: Path) -> None:
    """A vote that is not committed yet does not exist, and holds nobody up."""
    path = write_store(tmp_path / "votes.db", questions(3))
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM votes")
        assert len(read_votes(str(path), OURS, min_votes=3, val_split=0).train.rows) == 3
        writer.execute("COMMIT")
        assert "0 decisive votes" in refusal(path)


def test_votes_until_one_of_them_are_the_same_again(tmp_path: Path) -> None:
    path = write_store(tmp_path / "votes.db", questions(30))
    before = read_votes(str(path), OURS)
    # Those that come later decide nothing about those that were there.
    write_store(path, [*questions(5, first=50), *[Vote(f"question {k}?", verdict="right") for k in range(30)]])
    assert len(told(read_votes(str(path), OURS, min_votes=5))) == 5
    assert read_votes(str(path), OURS, until=before.newest) == before


def test_the_file_stays_as_it_was_and_nothing_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    path = write_store(tmp_path / "votes.db", questions(3))
    content = path.read_bytes()
    os.utime(path, (1, 1))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_votes(str(path), OURS, min_votes=3)
    assert (path.read_bytes(), path.stat().st_mtime) == (content, 1)
    assert {one.name for one in tmp_path.iterdir()} <= {"votes.db", "votes.db-wal", "votes.db-shm"}
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert not datasets.are_progress_bars_disabled(), "as it was before"


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no owner there")
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_store(tmp_path / "votes.db", questions(3))
    asked: list[Any] = []
    monkeypatch.setattr(os, "access", lambda *args: asked.append(args) or False)
    assert len(told(read_votes(str(path), OURS, min_votes=3))) == 3
    assert asked and {one.name for one in tmp_path.iterdir()} == {"votes.db"}
    # Where somebody writes, what is not in the file yet counts as well.
    with closing(sqlite3.connect(path)) as writer:
        write_store(path, questions(2, first=3))
        assert writer.execute("SELECT count(*) FROM votes").fetchone() == (5,)
        assert len(told(read_votes(str(path), OURS, min_votes=3))) == 5


def test_odd_names(tmp_path: Path) -> None:
    (folder := tmp_path / "a b?mode=rw#%41").mkdir()
    path = write_store(folder / "vötes?.db", questions(3))
    assert read_votes(str(path), OURS, min_votes=3).train.name == "vötes?.db"


def test_the_cards_hash_is_of_the_rows_that_were_kept(tmp_path: Path) -> None:
    path = write_store(tmp_path / "votes.db", questions(6))
    encoder = ChatEncoder(tiny.tokenizer())

    def source(**options: Any) -> Any:
        votes = read_votes(str(path), OURS, min_votes=3, val_split=0)
        train, val = load_examples(votes.train, encoder, "preference", max_length=200, **{"val_split": 0, **options})
        assert val is None
        return train.sources[0]

    before = source()
    assert before.rows == 6
    # Neither a vote too long to be trained on nor one on another base changes what was trained on.
    write_store(path, [Vote("q" * 1000)])
    write_store(path, questions(1, first=100), OTHER)
    assert source(max_dropped=0.5) == before
    assert source(max_rows=2).hash != before.hash
    write_store(path, questions(1, first=100))
    assert source(max_dropped=0.5).hash != before.hash


def test_the_servers_own_store(tmp_path: Path) -> None:
    """What the server writes, thumbs and ties beside it, and the same reply edited; read while its file is open."""
    from serve.votes import Ballot, Sampling, Side, VoteStore

    path = tmp_path / "votes.db"
    store = VoteStore(path)
    bad, good = Side("support@v1", "x", "no\0 \u2028🦊"), Side("support@v2", "y", "yes")

    def ballot(prompt: str, left: Side, right: Side | None = None, base: Base = OURS) -> Ballot:
        messages = [{"role": "user", "content": prompt}]
        return Ballot("ann", base.id, base.hash, messages, left, right, Sampling(1.0, 1.0, 64, None), blind=True)

    for asked, left, right, verdict, on in (
        ("left", good, bad, "left", OURS),
        ("right", bad, good, "right", OURS),
        ("tie", good, bad, "tie", OURS),
        ("neither", good, bad, "both_bad", OURS),
        ("thumb", good, None, "up", OURS),
        ("elsewhere", good, bad, "left", OTHER),
    ):
        store.vote(store.issue(ballot(asked, left, right, on)), "ann", verdict, "a comment")
    store.improve(ballot("edit", bad), "better")
    store.issue(ballot("open", good, bad))
    votes = read_votes(str(path), OURS, min_votes=3, val_split=0.4)
    assert told(votes) == {
        "left": ("yes", bad.reply),
        "right": ("yes", bad.reply),
        "edit": ("better", bad.reply),
    }
    assert "1 of desk/other" in votes.summary
    store.vote(store.issue(ballot("later", good, bad)), "ann", "right")
    assert len(told(read_votes(str(path), OURS, min_votes=3))) == 4
    assert read_votes(str(path), OURS, min_votes=3, val_split=0.4, until=votes.newest) == votes
    # As training reads it, so it is exported.
    rows = [row for _, row in read_votes(str(path), OURS, min_votes=3, val_split=0).train.rows]
    exported = [json.loads(line) for line in store.export_jsonl()]
    assert [row for row in exported if row["prompt"][0]["content"] != "elsewhere"] == rows
    store.close()


# The command


FEW = ("+experiment=dpo", "data=votes", "trainer.max_steps=2", "trainer.accelerator=cpu", "logger=none")


@pytest.fixture
def base(llama_folder: Path, own_cache: Path) -> Base:
    return Base(llama_folder.name, model_fingerprint(str(llama_folder)))


@pytest.fixture
def dpo(cli: Callable[..., Outcome], llama_folder: Path, base: Base) -> Callable[..., Outcome]:
    return lambda *args: cli(*FEW, f"model.id={llama_folder}", *args)


@pytest.mark.slow
def test_training_goes_on_from_the_newest_version(
    dpo: Callable[..., Outcome], cli: Callable[..., Outcome], base: Base, llama_folder: Path
) -> None:
    """From the base where there is none, then from what votes made, whatever algorithm made it."""
    path = write_store(Path("votes.db"), questions(30), base)
    write_store(path, questions(3), OTHER)
    first = dpo()
    assert first.code == 0, first.err
    assert first.out == "adapters/support/v1\n" and "start      the base model" in first.err
    assert f"votes      30 decisive votes of {base.id} (" in first.err
    assert "left out, on other bases: 3 of desk/other" in first.err
    assert "Generating" not in first.err and "Warning" not in first.err
    card = adapter.find(Path("adapters"), "support").card
    held_out = read_votes(str(path), base).held_out
    assert held_out and f"held out   {len(held_out.rows)} rows kept" in first.err
    assert [(one.source, one.rows) for one in card.data] == [("votes.db", 30 - len(held_out.rows))]
    assert card.algorithm == "dpo" and "eval/rewards/accuracies" in card.metrics

    # An SFT adapter below it is not what people voted on.
    sft = cli(f"model.id={llama_folder}", "data.max_rows=4", "data.max_length=2048", *FEW[2:])
    assert sft.code == 0, sft.err
    assert "start      adapter support@v2 (sft)" in dpo().err
    write_store(path, questions(10, first=50), base)
    again = dpo()
    assert "start      adapter support@v3 (dpo)" in again.err and "40 decisive votes" in again.err
    newest = adapter.find(Path("adapters"), "support").card
    assert (newest.ref, newest.parent) == ("support@v4", "support@v3")
    assert newest.data[0].hash != card.data[0].hash
    assert "start      adapter support@v1 (dpo)" in dpo("start_from=support@v1").err
    assert "start      the base model" in dpo("start_from=none").err


def test_a_store_elsewhere_and_a_held_out_file(
    dpo: Callable[..., Outcome], base: Base, tmp_path: Path, own_cache: Path
) -> None:
    path = write_store(tmp_path / "other.sqlite", questions(4), base)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}))
    done = dpo(f"data.path={path}", "data.min_votes=4", f"data.val_path={held_out}")
    assert done.code == 0, done.err
    assert "held out   1 rows kept" in done.err
    assert [one.rows for one in adapter.find(Path("adapters"), "support").card.data] == [4]


def test_a_trial_with_made_up_weights(dpo: Callable[..., Outcome], base: Base) -> None:
    write_store(Path("votes.db"), questions(30), base)
    done = dpo("model.tiny=true")
    assert done.code == 0, done.err


def test_too_few_are_refused_before_a_model_is_loaded(
    dpo: Callable[..., Outcome], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is loaded")

    monkeypatch.setattr("lit_ft.wiring.model.load_model", load)
    monkeypatch.setattr("lit_ft.train.load_tokenizer", load)
    write_store(Path("votes.db"), questions(19), base)
    done = dpo()
    assert (done.code, done.out) == (2, "")
    assert "19 different pairs" in done.err and "Traceback" not in done.err
    assert not Path("adapters").exists()


def test_what_is_wrong_with_the_store_is_said_before_the_model_is_even_looked_for(
    cli: Callable[..., Outcome], own_cache: Path
) -> None:
    done = cli(*FEW, "model.id=nobody/no-such-model")
    assert done.code == 2 and "votes.db: there is no such file" in " ".join(done.err.split())


def test_votes_are_for_preference_training(cli: Callable[..., Outcome], own_cache: Path) -> None:
    done = cli("data=votes")
    assert done.code == 2 and "+experiment=dpo" in done.err


def test_settings_of_votes_belong_to_votes(cli: Callable[..., Outcome]) -> None:
    done = cli("+experiment=dpo", "data.min_votes=3")
    assert done.code == 2 and "min_votes" in done.err


def test_a_resumed_run_trains_on_the_votes_it_began_with(
    dpo: Callable[..., Outcome], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server went on collecting meanwhile, and one of the old verdicts is contested by now."""
    from lit_ft.modules.base import FineTuneModule

    path = write_store(Path("votes.db"), questions(30), base)
    train_step = FineTuneModule.training_step

    def training_step(self: FineTuneModule, window: object, index: int) -> None:
        if self.global_step + 1 == 2:
            monkeypatch.setattr(FineTuneModule, "training_step", train_step)
            signal.raise_signal(signal.SIGINT)
        train_step(self, window, index)  # type: ignore[arg-type]

    monkeypatch.setattr(FineTuneModule, "training_step", training_step)
    assert dpo("trainer.max_steps=3").code == 130
    write_store(path, [*questions(10, first=50), Vote("question 0?", verdict="right")], base)
    done = dpo("trainer.max_steps=3", "resume=last")
    assert done.code == 0, done.err
    assert "30 decisive votes" in done.err
