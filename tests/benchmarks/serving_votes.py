"""Votes under kill -9: many voters at once, and the server killed in their midst.

The ballots are issued beforehand, by the store itself. Each vote is sent as the Compare page sends it, by a voter of
its own, and sent again until it is acknowledged; some are sent once more after that, and some then say something else,
which must be refused. The votes file is read at the end, by SQLite alone.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.findings import Findings, rounded, spread
from tests.benchmarks.page_client import Layout, Page, PageError
from tests.benchmarks.serving_page import serving_stub
from tests.benchmarks.training import say

if TYPE_CHECKING:
    import aiohttp

    from tests.benchmarks.served import Process

VERDICTS = ("left", "right", "tie", "both_bad")
REPEATED, CONTRADICTED = 20, 50
"""Every so many votes one is sent again when it was acknowledged, and one with another verdict."""

PATIENCE_S = 1800.0
"""For one vote, with all its attempts."""

ATTEMPT_S = 900.0
"""For one attempt: with thousands at once each waits for those before it."""

AGAIN_S = (1.0, 4.0)
"""Until a voter tries again, when the server is away."""


@dataclass(frozen=True)
class Cast:
    """A vote that somebody is about to cast."""

    ballot: str
    cookie: str
    verdict: str


@dataclass
class Outcome:
    """What the voters saw."""

    acknowledged: dict[str, str] = field(default_factory=dict)
    """Ballot: verdict."""

    waits_s: list[float] = field(default_factory=list)
    """From the first attempt to the acknowledgement."""

    attempts: int = 0
    kills: int = 0
    in_flight: list[int] = field(default_factory=list)
    """Votes that were under way at each kill."""

    refused: Counter[str] = field(default_factory=Counter)
    contradictions_taken: int = 0
    open: int = 0


@dataclass(frozen=True)
class Kept:
    """What the file says."""

    lost: int
    """Acknowledged, and not there with that verdict."""

    doubled: int
    rows: int
    sound: bool
    """By SQLite's own check."""


def measure(options: argparse.Namespace) -> Findings:
    """The whole part."""
    with tempfile.TemporaryDirectory() as name, serving_stub(Path(name)) as server:
        file = Path(name, "votes.db")
        began = time.monotonic()
        casts = issue(file, options.votes)
        say(f"votes      {len(casts):,} ballots issued in {time.monotonic() - began:.0f} s")
        began = time.monotonic()
        outcome = asyncio.run(poll(server, casts, options))
        seconds = time.monotonic() - began
        server.stop()
        kept = count(file, outcome.acknowledged)
    return judge(outcome, kept, options, seconds)


def issue(file: Path, votes: int) -> list[Cast]:
    """As many ballots, each to a voter of its own, with the verdict that this voter will give."""
    from serve.access import VOTER_COOKIE, Voters
    from serve.votes import Ballot, Sampling, Side, VoteStore

    voters = Voters(file.with_name(f"{file.name}.secret"))
    store = VoteStore(file)
    chance = random.Random(0)
    casts = []
    for number in range(votes):
        cookie = secrets.token_urlsafe(32)
        ballot = Ballot(
            voter=voters.voter_id(None, {VOTER_COOKIE: cookie}),
            base_id="bundled",
            base_hash="sha256:0",
            prompt=[{"role": "user", "content": f"Question {number}?"}],
            left=Side("base", "sha256:0", f"One answer to {number}."),
            right=Side("support@v1", "sha256:1", f"Another answer to {number}."),
            sampling=Sampling(0.7, 0.95, 256, None),
            blind=True,
        )
        casts.append(Cast(store.issue(ballot), f"{VOTER_COOKIE}={cookie}", chance.choice(VERDICTS)))
    store.close()
    return casts


async def poll(server: Process, casts: Sequence[Cast], options: argparse.Namespace) -> Outcome:
    """All voters at once, over `--at-once` connections, while the server is killed `--kills` times."""
    import aiohttp

    outcome = Outcome()
    url = await asyncio.to_thread(server.start)
    connector = aiohttp.TCPConnector(limit=options.at_once)
    async with aiohttp.ClientSession(trust_env=False, connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as http:
        async with http.get(f"{url}/config") as response:
            layout = Layout(await response.json())
        killing = asyncio.create_task(_kill(server, outcome, len(casts), options.kills))
        slots = asyncio.Semaphore(options.at_once)
        try:
            await asyncio.gather(*(_vote(http, url, layout, slots, *one, outcome) for one in enumerate(casts)))
            await killing
        finally:
            killing.cancel()
    return outcome


async def _kill(server: Process, outcome: Outcome, votes: int, kills: int) -> None:
    """Each time when another part of the votes is acknowledged, and others are under way."""
    for number in range(kills):
        while len(outcome.acknowledged) < votes * (number + 1) / (kills + 1):
            await asyncio.sleep(0.005)
        outcome.in_flight.append(outcome.open)
        killed = time.monotonic()
        await asyncio.to_thread(server.kill)
        outcome.kills += 1
        say(f"votes      killed at {len(outcome.acknowledged):,} acknowledged, {outcome.in_flight[-1]:,} under way")
        await asyncio.to_thread(server.start)
        say(f"votes      started again after {time.monotonic() - killed:.1f} s")


async def _vote(
    http: aiohttp.ClientSession,
    url: str,
    layout: Layout,
    slots: asyncio.Semaphore,
    number: int,
    cast: Cast,
    outcome: Outcome,
) -> None:
    page = Page(http, url, layout)
    async with slots:
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE_S:
            if await _attempt(page, cast, cast.verdict, outcome):
                outcome.acknowledged[cast.ballot] = cast.verdict
                outcome.waits_s.append(time.monotonic() - began)
                break
            await asyncio.sleep(random.uniform(*AGAIN_S))
        if number % REPEATED == 0:
            await _attempt(page, cast, cast.verdict, outcome)
        if number % CONTRADICTED == 0:
            other = VERDICTS[VERDICTS.index(cast.verdict) - 1]
            outcome.contradictions_taken += await _attempt(page, cast, other, outcome, expected=False)


async def _attempt(page: Page, cast: Cast, verdict: str, outcome: Outcome, *, expected: bool = True) -> bool:
    """Whether the page thanked for the vote."""
    import aiohttp

    assert page.layout is not None
    event = page.layout.event(f"vote-{verdict.replace('_', '-')}", "click")
    outcome.attempts += 1
    outcome.open += 1
    try:
        async with asyncio.timeout(ATTEMPT_S):
            shown = await page.call(event, {"ballot-id": cast.ballot, "comment": "It"}, {"Cookie": cast.cookie})
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False  # the server is away
    except PageError as error:
        outcome.refused[str(error)[:200]] += expected
        return False
    finally:
        outcome.open -= 1
    said = str((shown["duel-notice"] or {}).get("value"))
    if "Thank you: counted as" in said:
        return True
    outcome.refused[said[:200]] += expected
    return False


def count(file: Path, acknowledged: dict[str, str]) -> Kept:
    """Hold the file against what was acknowledged."""
    with sqlite3.connect(file) as db:
        rows = db.execute("SELECT ballot, verdict FROM votes").fetchall()
        sound = db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    db.close()
    times = Counter(ballot for ballot, _ in rows)
    kept = set(rows)
    lost = sum((ballot, verdict) not in kept for ballot, verdict in acknowledged.items())
    return Kept(lost, sum(number - 1 for number in times.values()), len(rows), sound)


def judge(outcome: Outcome, kept: Kept, options: argparse.Namespace, seconds: float) -> Findings:
    """The figures, and what should not have been."""
    summary = {"acknowledged": len(outcome.acknowledged), "lost": kept.lost, "doubled": kept.doubled}
    lines = [
        f"votes               {options.votes:,} at once over {min(options.at_once, options.votes):,} connections, "
        f"{outcome.attempts:,} attempts, {rounded(len(outcome.acknowledged) / seconds, 1)} acknowledged per s",
        f"kill -9             {outcome.kills} times, with {', '.join(map(str, outcome.in_flight)) or 'none'} under way",
        f"acknowledged after  {spread(outcome.waits_s)}, with the server away meanwhile",
        f"in the file         {kept.rows:,} votes, {kept.lost} lost, {kept.doubled} doubled",
    ]
    wrong = []
    if kept.lost or kept.doubled:
        wrong.append(f"votes: {kept.lost} acknowledged votes are lost, {kept.doubled} are there more than once")
    if not kept.sound:
        wrong.append("votes: SQLite finds the file damaged")
    if outcome.contradictions_taken:
        wrong.append(f"votes: {outcome.contradictions_taken} votes were acknowledged with a second verdict")
    if len(outcome.acknowledged) < options.votes:
        wrong.append(f"votes: {options.votes - len(outcome.acknowledged)} were never acknowledged")
    if outcome.kills < options.kills:
        wrong.append(f"votes: the server was killed {outcome.kills} times, {options.kills} wanted")
    wrong += [f"votes: {number} x refused: {words}" for words, number in outcome.refused.most_common(3) if number]
    return Findings(summary, lines, wrong)
