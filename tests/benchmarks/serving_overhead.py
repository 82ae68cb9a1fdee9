"""What our layer costs: the same streams through our endpoint and straight to vLLM, taking turns.

vLLM runs as it does under `python -m serve`, our web app in a process of its own before it, and this process is the
client of both. No two prompts begin alike, so no cache helps. The ratios are medians of the rounds' own: in each the
two take turns, and who begins changes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.findings import Findings, spread
from tests.benchmarks.served import Process, app
from tests.benchmarks.serving_swap import NAME, prepare, publish
from tests.benchmarks.streams import Reply, ask
from tests.benchmarks.training import say
from tests.processes import free_ports

if TYPE_CHECKING:
    import aiohttp

TTFT_AT_MOST = 1.05
THROUGHPUT_AT_LEAST = 0.95
NEARLY_THE_BASE = 0.01
"""Of the adapter's random weights: its replies are text, and as long as they may be."""

PER_STREAM = 2
"""Requests of each stream in one turn, one after the other."""


@dataclass(frozen=True)
class Way:
    """One way to the engine."""

    url: str
    model: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Turn:
    """What one way gave in one round."""

    replies: list[Reply]
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens/s of all streams together."""
        return sum(reply.count for reply in self.replies) / self.seconds

    @property
    def ttft_s(self) -> float:
        """The median."""
        return statistics.median(reply.ttft_s for reply in self.replies)


def measure(options: argparse.Namespace) -> Findings:
    """The whole part, with a vLLM of its own."""
    from serve import base as bases
    from serve.engine import Engine

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (prepared,) = prepare(folder / "prepared", 1, NEARLY_THE_BASE)
        ref, _ = publish(folder / "adapters", prepared)
        base = bases.given("bundled")
        engine = Engine(
            base.place,
            served_name="base",
            max_loras=4,
            max_cpu_loras=32,
            max_lora_rank=16,
            max_model_len=1024,
            dtype="float32",
            log_path=folder / "engine.log",
            start_timeout=600,
        )
        (port,) = free_ports(1)
        try:
            engine.start(lambda stage, seconds: None)
            say("overhead   the engine is ready")
            with Process(app(engine.base_url, engine.api_key, port, vars(base)), folder) as url:
                direct = Way(engine.base_url, ref, {"Authorization": f"Bearer {engine.api_key}"})
                rounds = asyncio.run(alternate(direct, Way(f"{url}/v1", NAME, {}), options))
        finally:
            engine.stop()
    return judge(rounds)


async def alternate(direct: Way, ours: Way, options: argparse.Namespace) -> list[tuple[Turn, Turn]]:
    """All rounds: (direct, ours). One before them does not count."""
    import aiohttp

    prompts = (f"{number} is the number of this story. Write a long story about it." for number in itertools.count(1))
    rounds = []
    async with aiohttp.ClientSession(trust_env=False, connector=aiohttp.TCPConnector(limit=0)) as http:
        for number in range(options.rounds + 1):
            turns = {}
            for way in (direct, ours) if number % 2 else (ours, direct):
                turns[way.url] = await _turn(http, way, prompts, options.streams, options.reply_tokens)
            pair = turns[direct.url], turns[ours.url]
            rounds.append(pair)
            figures = [f"{turn.ttft_s:.3f} s, {turn.rate:.0f} tokens/s" for turn in pair if not _failed(turn)]
            say(f"overhead   round {number}: direct, ours: {'; '.join(figures)}")
    return rounds[1:]


async def _turn(http: aiohttp.ClientSession, way: Way, prompts: Iterator[str], streams: int, tokens: int) -> Turn:
    async def stream() -> list[Reply]:
        return [
            await ask(http, way.url, way.model, next(prompts), max_tokens=tokens, headers=way.headers)
            for _ in range(PER_STREAM)
        ]

    began = time.monotonic()
    found = await asyncio.gather(*(stream() for _ in range(streams)))
    return Turn(list(itertools.chain(*found)), time.monotonic() - began)


def judge(rounds: Sequence[tuple[Turn, Turn]]) -> Findings:
    """Ratios, ours over direct: what our layer costs is time to first token above 1, and tokens/s below 1."""
    failed = [reply for pair in rounds for turn in pair for reply in _failed(turn)]
    if failed:
        wrong = [f"overhead: a request failed: {reply.asked}: {reply.error}" for reply in failed[:5]]
        return Findings({"ttft": None, "throughput": None}, [f"{len(failed)} requests failed"], wrong)
    ttft = [ours.ttft_s / direct.ttft_s for direct, ours in rounds]
    rate = [ours.rate / direct.rate for direct, ours in rounds]
    summary = {"ttft": round(statistics.median(ttft), 3), "throughput": round(statistics.median(rate), 3)}
    sides = {"direct": [direct for direct, _ in rounds], "ours": [ours for _, ours in rounds]}
    replies = [reply for pair in rounds for turn in pair for reply in turn.replies]
    cut = sum(reply.finish == "length" for reply in replies) / len(replies)
    lines = [
        f"{side:<20}{statistics.median(turn.rate for turn in turns):.1f} tokens/s; to first token "
        + spread([reply.ttft_s for turn in turns for reply in turn.replies])
        for side, turns in sides.items()
    ]
    for key, values, cost in (("ttft", ttft, "above"), ("throughput", rate, "below")):
        lines.append(
            f"{key:<20}{summary[key]:.3f} of direct's (rounds: {min(values):.3f} to {max(values):.3f}); "
            f"{cost} 1 is cost"
        )
    length = statistics.mean(reply.count for reply in replies)
    lines.append(f"replies             {length:.1f} tokens on average; {cut:.0%} are as long as they may be")
    wrong = []
    if not summary["ttft"] <= TTFT_AT_MOST:
        wrong.append(f"overhead: ttft is {summary['ttft']:.3f} of direct's, at most {TTFT_AT_MOST} allowed")
    if not summary["throughput"] >= THROUGHPUT_AT_LEAST:
        wrong.append(
            f"overhead: throughput is {summary['throughput']:.3f} of direct's, at least {THROUGHPUT_AT_LEAST} wanted"
        )
    return Findings(summary, lines, wrong)


def _failed(turn: Turn) -> list[Reply]:
    return [reply for reply in turn.replies if reply.error]
