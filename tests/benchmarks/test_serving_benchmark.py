"""The serving benchmark: what it calls a broken promise, by hand, and each part at a small size."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import multi_lora, serving, serving_overhead, serving_page, serving_swap, serving_votes
from tests.benchmarks.findings import percentile, rounded
from tests.benchmarks.page_client import Event, Layout, PageError
from tests.benchmarks.serving_overhead import Turn
from tests.benchmarks.serving_swap import Load
from tests.benchmarks.serving_tab import Tab
from tests.benchmarks.streams import Reply, Token

ROOT = Path(__file__).parents[2]
PROMPT = "How long?"


def test_the_percentile_is_one_of_the_values() -> None:
    assert percentile([float(n) for n in range(1, 101)], 0.95) == 95
    assert percentile([3.0, 1.0, 2.0], 0.95) == 3
    assert percentile([7.0], 0.5) == 7
    assert math.isnan(percentile([], 0.95))
    assert rounded(math.nan) is None
    assert rounded(0.12345) == 0.123


def test_options() -> None:
    assert serving.parse([]).only == ["swap", "overhead", "page", "multi_lora", "votes"]
    assert serving.parse(["--only", "votes,page"]).only == ["votes", "page"]
    for bad in (["--only", "swap,pages"], ["--clients", "0"], ["--kills", "-1"], ["--votes", "0"]):
        with pytest.raises(SystemExit):
            serving.parse(bad)


# --- swap ---


def reply(model: str = "support@v1", words: str = "a b c", logprob: float = -0.5, **changes: Any) -> Reply:
    """Each word a token, and "-" a far second."""
    tokens = [Token(word, logprob, "-", -4.0) for word in words.split()]
    return replace(
        Reply(PROMPT, "support", 0.0, {model}, words, tokens, len(tokens), "stop", ttft_s=0.1, seconds=1.0), **changes
    )


def test_a_reply_is_its_versions() -> None:
    assert serving_swap.compare(reply(), reply()) == "same"
    assert serving_swap.compare(reply(logprob=-0.5001), reply()) == "same"


@pytest.mark.parametrize(
    "seen",
    [
        reply(models={"support@v1", "support@v2"}),
        reply(models=set()),
        reply(words="a b d"),
        reply(words="a b"),
        reply(words="a b c d"),
        # The same words, but by somebody who is less sure of them: another version that happens to say the same.
        reply(logprob=-0.6),
        reply(logprob=math.nan),
        # Begun by v1, and gone on with by another.
        reply(tokens=[*reply().tokens[:2], Token("c", -0.9, "-", -4.0)]),
    ],
)
def test_a_reply_that_is_not_its_versions_is_mixed(seen: Reply) -> None:
    assert serving_swap.compare(seen, reply()) not in ("same", "rounding")


def test_a_tie_may_go_the_other_way_once_seen() -> None:
    """Where the version's two best tokens are as good as equal either is right, and the rest is another text."""
    tied = reply(tokens=[Token("a", -0.5, "-", -4.0), Token("b", -0.700, "x", -0.705), Token("c", -0.5, "-", -4.0)])
    assert serving_swap.compare(reply(words="a x y z"), tied) == "rounding"
    assert serving_swap.compare(reply(words="a y z"), tied) not in ("same", "rounding")
    clear = reply(tokens=[Token("a", -0.5, "-", -4.0), Token("b", -0.7, "x", -0.8)])
    assert serving_swap.compare(reply(words="a x"), clear) not in ("same", "rounding")


def test_what_swapping_promises() -> None:
    alone = {("support@v1", PROMPT): reply(), ("support@v2", PROMPT): reply("support@v2", "d e f")}
    fine = Load([reply(), reply("support@v2", "d e f")], {"support@v2": 10.0}, {"support@v1": 0.0, "support@v2": 12.5})
    found = serving_swap.judge(fine, alone, versions=1)
    assert found.summary == {
        "requests": 2,
        "failed": 0,
        "publish_to_listed_p95_s": 2.5,
        "publish_to_page_p95_s": None,
        "ttft_during_swap": None,
        "mixed": 0,
    }
    assert found.wrong == []
    assert any("not looked at: no tab was opened" in line for line in found.lines)

    late = replace(fine, listed={"support@v2": 15.5})
    (wrong,) = serving_swap.judge(late, alone, versions=1).wrong
    assert "5.50 s" in wrong
    never = replace(fine, listed={})
    assert "never listed: support@v2" in serving_swap.judge(never, alone, versions=1).wrong[0]
    failing = replace(fine, replies=[reply(), reply(error="503: gone")])
    found = serving_swap.judge(failing, alone, versions=1)
    assert found.summary["failed"] == 1 and "503: gone" in found.wrong[0]
    mixing = replace(fine, replies=[reply(words="a e f")])
    found = serving_swap.judge(mixing, alone, versions=1)
    assert found.summary["mixed"] == 1 and "token 2 is 'e', alone 'b'" in found.wrong[0]


def test_what_the_page_promises() -> None:
    """v2 is never the first of the list, as v3 is there when the page is drawn: it came with that."""
    refs = ("support@v2", "support@v3")
    listed = dict.fromkeys(refs, 12.0)
    published = {"support@v2": 10.0, "support@v3": 11.0}
    tab = Tab("", {"support@v1": 0.0, "support@v3": 14.0}, ["support@v3 · SFT", "support@v2 · SFT (older)"])
    load = Load([reply()], published, listed, tab)
    alone = {("support@v1", PROMPT): reply()}
    found = serving_swap.judge(load, alone, versions=2)
    assert found.summary["publish_to_page_p95_s"] == 4.0 and found.wrong == [] and load.everywhere()

    for shown, words in (
        (replace(tab, offered={"support@v3": 15.5}), "publish to page takes 5.50 s"),
        (replace(tab, offered={"support@v2": 12.0}), "1 versions never appeared"),
        (replace(tab, options=["support@v3 · SFT"]), "lacks support@v2"),
        (replace(tab, trouble="TargetClosedError"), "TargetClosedError"),
    ):
        (wrong,) = serving_swap.judge(replace(load, tab=shown), alone, versions=2).wrong
        assert words in wrong
    assert not replace(load, tab=Tab("")).everywhere()


def test_delay_by_a_publication() -> None:
    """Sent 0, 2.9 and 3.1 s after it, and before it."""
    replies = [reply(sent=sent, ttft_s=ttft) for sent, ttft in ((10, 0.3), (12.9, 0.5), (13.1, 0.1), (9.9, 0.3))]
    load = Load([*replies, reply(sent=11, error="503")], {"support@v2": 10.0}, {"support@v2": 11.0})
    assert load.during() == ([0.3, 0.5], [0.1, 0.3])
    assert serving_swap.judge(load, {}, versions=1).summary["ttft_during_swap"] == 2.0


def test_versions_that_say_the_same_prove_nothing() -> None:
    alone = {("support@v1", PROMPT): reply(), ("support@v2", PROMPT): reply("support@v2")}
    load = Load([reply()], {"support@v2": 0.0}, {"support@v2": 1.0})
    (wrong,) = serving_swap.judge(load, alone, versions=1).wrong
    assert "cannot be told apart" in wrong


# --- overhead ---


def turn(ttft_s: float, seconds: float, tokens: int = 100) -> Turn:
    return Turn([reply(ttft_s=ttft_s, count=tokens)], seconds)


def test_the_overhead_by_hand() -> None:
    """Ours over direct within each round, then the median: 1.02, 1.5, 1.0 and 1/1.04, 1/1.01, 1/1.5."""
    rounds = [
        (turn(0.100, 1.0), turn(0.102, 1.04)),
        (turn(0.100, 1.0), turn(0.150, 1.01)),
        (turn(0.200, 2.0), turn(0.200, 3.0)),
    ]
    found = serving_overhead.judge(rounds)
    assert found.summary == {"ttft": 1.02, "throughput": 0.962}
    assert found.wrong == []
    found = serving_overhead.judge([(turn(0.1, 1.0), turn(0.11, 1.06))])
    assert found.summary == {"ttft": 1.1, "throughput": 0.943}
    assert len(found.wrong) == 2
    found = serving_overhead.judge([(turn(0.2, 2.0), turn(0.1, 1.0))])
    assert found.summary == {"ttft": 0.5, "throughput": 2.0} and found.wrong == [], "faster is no cost"


def test_an_overhead_of_failed_requests_is_none() -> None:
    failed = Turn([reply(error="503")], 1.0)
    found = serving_overhead.judge([(turn(0.1, 1.0), failed)])
    assert found.summary == {"ttft": None, "throughput": None} and found.wrong


# --- multi_lora ---


def test_what_our_lora_operators_promise() -> None:
    fine = {"ratio_one_adapter_1": 0.70, "ratio_four_mixed_32": 0.60, "different_replies": 0}
    assert multi_lora.judge({"ours": fine, "stock": {"different_replies": 3}}) == []
    assert set(multi_lora.AT_LEAST) <= {f"ratio_{case.key}" for case in multi_lora.CASES}
    for key, bad in (("ratio_one_adapter_1", 0.69), ("ratio_four_mixed_32", 0.59), ("different_replies", 1)):
        (wrong,) = multi_lora.judge({"ours": {**fine, key: bad}})
        assert wrong.startswith("multi_lora: ")
        assert len(multi_lora.judge({"ours": {k: v for k, v in fine.items() if k != key}})) == 1, "missing is wrong"
    assert len(multi_lora.judge({})) == 3


# --- page ---


def test_errors_of_sessions_count() -> None:
    options = serving.parse(["--sessions", "1", "--messages", "1"])
    event = Event("chat", 0.0, first_s=0.1, done_s=0.5)
    seen = serving_page.Seen([event], [event], [0.2], [0.01], redraws=[event], requests=100, resent=2, overtime_s=[0.1])
    found = serving_page.judge(seen, options)
    assert found.summary == {"sessions": 1, "errors": 0, "p95_s": 0.1, "resent": 2} and found.wrong == []
    assert "3 of 100 requests" in serving_page.judge(replace(seen, resent=3), options).wrong[0]
    assert "1 pages do not show" in serving_page.judge(replace(seen, stale=1), options).wrong[0]
    assert "0 redraw events" in serving_page.judge(replace(seen, redraws=[]), options).wrong[0]
    seen.errors["TimeoutError: "] += 2
    found = serving_page.judge(seen, options)
    assert found.summary["errors"] == 2 and "2 x TimeoutError" in found.wrong[0]
    assert serving_page.judge(serving_page.Seen([event]), options).wrong, "a session that never chatted"


@pytest.mark.parametrize(
    ("answers", "resent"),
    [
        (["whole", "nothing", "whole"], 1),
        # The first connection is new: nothing excuses its end.
        (["nothing"], None),
        (["whole", "half a head"], None),
    ],
)
def test_only_what_a_used_connection_did_not_answer_is_sent_again(answers: list[str], resent: int | None) -> None:
    import aiohttp

    left = iter(answers)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                kind = next(left)
                if kind == "whole":
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                    continue
                if kind == "half a head":
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Le")
                    await writer.drain()
                break
        writer.close()

    async def run(seen: serving_page.Seen) -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with (
            server,
            aiohttp.ClientSession(
                trust_env=False,
                middlewares=(serving_page._resending(seen),),
                trace_configs=[serving_page._noting_reuse()],
            ) as http,
        ):
            for _ in range(len(answers) - (resent or 0)):
                async with http.get(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/") as response:
                    assert await response.text() == "ok"

    seen = serving_page.Seen()
    if resent is None:
        with pytest.raises(PageError):
            asyncio.run(run(seen))
    else:
        asyncio.run(run(seen))
    assert seen.resent == (resent or 0)


def test_an_event_is_found_by_its_component() -> None:
    components = [{"id": 3, "type": "button", "props": {"elem_id": "send"}}, {"id": 4, "type": "state", "props": {}}]
    targets = {"inputs": [], "outputs": [3, 4], "backend_fn": True}
    events = [
        {"id": 7, "targets": [[0, "load"]], "trigger_after": None, **targets},
        {"id": 9, "targets": [[3, "click"]], "trigger_after": None, **targets},
        {"id": 10, "targets": [[3, "click"]], "trigger_after": None, **targets, "backend_fn": False},
        {"id": 11, "targets": [[None, "then"]], "trigger_after": 9, **targets},
    ]
    layout = Layout({"components": components, "dependencies": events})
    assert layout.event("send", "click") == 9
    assert layout.loads == [7]
    assert layout.clicked("send") == [9] and layout.after(9) == [11] and layout.after(7) == []
    assert layout.named(9, ["shown", None]) == {"send": "shown"}


# --- votes ---


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A votes file in which three ballots are voted on; it lets a ballot have several votes, so that some can."""
    with sqlite3.connect(tmp_path / "votes.db") as db:
        db.execute("CREATE TABLE votes (ballot TEXT, verdict TEXT)")
        db.executemany("INSERT INTO votes VALUES (?, ?)", [("a", "left"), ("b", "tie"), ("c", "right")])
    db.close()
    return tmp_path / "votes.db"


def test_what_was_acknowledged_is_there_once(file: Path) -> None:
    """An unacknowledged vote (c) may be there: it was stored, and the server killed before it could say so."""
    kept = serving_votes.count(file, {"a": "left", "b": "tie"})
    assert (kept.lost, kept.doubled, kept.rows, kept.sound) == (0, 0, 3, True)


def test_lost_turned_and_doubled_votes(file: Path) -> None:
    with sqlite3.connect(file) as db:
        db.execute("INSERT INTO votes VALUES ('b', 'tie')")
    db.close()
    kept = serving_votes.count(file, {"a": "right", "b": "tie", "d": "left"})
    assert (kept.lost, kept.doubled) == (2, 1), "a says something else, d is not there, b is there twice"


def test_what_votes_promise() -> None:
    options = serving.parse(["--votes", "2", "--kills", "1"])
    outcome = serving_votes.Outcome({"a": "left", "b": "tie"}, [0.1, 0.2], attempts=3, kills=1, in_flight=[1])
    kept = serving_votes.Kept(lost=0, doubled=0, rows=2, sound=True)
    found = serving_votes.judge(outcome, kept, options, 1.0)
    assert found.summary == {"acknowledged": 2, "lost": 0, "doubled": 0} and found.wrong == []
    for changed in (
        (outcome, replace(kept, lost=1)),
        (outcome, replace(kept, doubled=1)),
        (outcome, replace(kept, sound=False)),
        (replace(outcome, acknowledged={"a": "left"}), kept),
        (replace(outcome, contradictions_taken=1), kept),
        (replace(outcome, kills=0), kept),
    ):
        assert len(serving_votes.judge(*changed, options, 1.0).wrong) == 1


# --- whole runs ---


def benchmark(*arguments: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-m", "tests.benchmarks.serving", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_pages_and_votes_at_a_small_size() -> None:
    pages = ["--sessions", "5", "--messages", "2", "--pause", "0.5", "--ramp", "1"]
    found, said = benchmark("--only", "page,votes", *pages, "--votes", "120", "--kills", "1", "--at-once", "40")
    assert set(found) == {"page", "votes"}
    assert found["page"]["sessions"] == 5 and found["page"]["errors"] == 0 and found["page"]["p95_s"] > 0
    assert re.search(r"redraw events +median", said)
    assert found["votes"] == {"acknowledged": 120, "lost": 0, "doubled": 0}
    assert "kill -9             1 times" in said


@pytest.mark.engine
@pytest.mark.alone
def test_swapping_at_a_small_size() -> None:
    found, _ = benchmark("--only", "swap", "--seconds", "15", "--clients", "3", "--versions", "2", "--tokens", "12")
    assert found["swap"]["requests"] > 3
    assert found["swap"]["failed"] == found["swap"]["mixed"] == 0
    assert 0 < found["swap"]["publish_to_listed_p95_s"] <= 5
    if any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        assert 0 < found["swap"]["publish_to_page_p95_s"] <= 5


@pytest.mark.engine
def test_the_overhead_at_a_small_size() -> None:
    """So few requests say nothing about the cost: only that both ways answer, and what the last line holds."""
    command = ["--only", "overhead", "--streams", "2", "--rounds", "1", "--reply-tokens", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.serving", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["overhead"]["ttft"] > 0 and found["overhead"]["throughput"] > 0, done.stderr
