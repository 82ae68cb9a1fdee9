"""Swapping under load: clients chat with `support` without a pause while new versions of it are published.

The server is the one that users start, `python -m serve`, with its real engine and the bundled model; only its limits
are off, since all clients come from one address. A browser tab stands open at the page meanwhile, where a Chromium is
on the PATH. Afterwards each version is asked alone for every prompt, and each reply that was given under load is held
against what its version says alone.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.findings import Findings, percentile, rounded, spread
from tests.benchmarks.served import NO_LIMITS
from tests.benchmarks.serving_tab import Tab, opened
from tests.benchmarks.streams import Reply, ask
from tests.benchmarks.training import say
from tests.e2e.server import served

if TYPE_CHECKING:
    import aiohttp

    from lit_ft.adapter import Draft

NAME = "support"
RANK = 8
SPREAD = 0.05  # of A and B: no two versions say the same, or are as sure of it
PROMPTS = (
    "How long does charging take?",
    "My parcel has not come. What now?",
    "Name three colours and say what each reminds you of.",
    "What is the difference between a lake and a sea?",
)
LISTED_WITHIN_S = 5.0
POLL_S = 0.05
LATE_S = 30.0
"""How long after the load a version may still come to be listed."""

AFTER_S = 3.0
"""How long after a publication a request counts as sent during it: it is loaded and checked within that time."""

# In float32, between a request alone and in a batch. Two versions differ in their log-probabilities by more than 0.1.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Prepared:
    """A version that needs only be published."""

    draft: Draft
    folder: Path


@dataclass
class Load:
    """What happened while the versions came."""

    replies: list[Reply] = field(default_factory=list)
    published: dict[str, float] = field(default_factory=dict)
    """When each version's files were whole: its rename came at most some hundredths of a second later."""

    listed: dict[str, float] = field(default_factory=dict)
    """When `/v1/models` first named each version."""

    tab: Tab = field(default_factory=Tab)
    """What the page showed, and when."""

    def during(self) -> tuple[list[float], list[float]]:
        """Seconds to the first token: of requests sent within `AFTER_S` of a publication, and of the others."""
        found: tuple[list[float], list[float]] = ([], [])
        for reply in self.replies:
            if not reply.error:
                soon = any(0 <= reply.sent - at <= AFTER_S for at in self.published.values())
                found[not soon].append(reply.ttft_s)
        return found

    def latencies(self) -> list[float]:
        """From publishing to being listed, of those that were."""
        return [self.listed[ref] - at for ref, at in self.published.items() if ref in self.listed]

    def to_page(self) -> dict[str, float]:
        """From publishing to being in the page, of those that came there."""
        shown = {ref: self.tab.shown(ref) for ref in self.published}
        return {ref: at - self.published[ref] for ref, at in shown.items() if at is not None}

    def everywhere(self) -> bool:
        """Whether every published version has been listed, and is in the page where that is looked at."""
        watched = not self.tab.why_not and not self.tab.trouble
        return self.published.keys() <= self.listed.keys() and (
            not watched or len(self.to_page()) == len(self.published)
        )


def measure(options: argparse.Namespace) -> Findings:
    """The whole part: prepare, serve, load, compare."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say(f"swap       making {options.versions + 1} versions")
        first, *rest = prepare(folder / "prepared", options.versions + 1)
        publish(folder / "adapters", first)
        no_limits = [f"limits.{key}={value}" for key, value in NO_LIMITS.items()]
        began = time.monotonic()
        with served(folder, "max_model_len=512", "dtype=float32", *no_limits) as server:
            say(f"swap       the server is ready after {time.monotonic() - began:.0f} s")
            load, alone = asyncio.run(_run(server.url, folder / "adapters", rest, options))
        return judge(load, alone, options.versions)


def prepare(root: Path, count: int, std: float = SPREAD) -> list[Prepared]:
    """Random adapters on every linear layer of the bundled model, each with its canary, in folders below `root`."""
    import torch

    from lit_ft.adapter import Base, DataSource, Draft
    from lit_ft.models.adapt import save_trained
    from lit_ft.models.canary import canary
    from lit_ft.models.kinds.lora import apply_lora
    from lit_ft.models.load import load_model, load_tokenizer
    from lit_ft.models.resolve import model_fingerprint

    model, tokenizer = apply_lora(load_model("bundled"), r=RANK, alpha=RANK, dropout=0.0), load_tokenizer("bundled")
    base = Base("bundled", model_fingerprint("bundled"))
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=std)
        folder = root / str(seed)
        folder.mkdir(parents=True)
        save_trained(model, folder)
        tokenizer.save_pretrained(str(folder))
        draft = Draft(
            NAME,
            base,
            "sft",
            "lora",
            RANK,
            [DataSource("random", 1, "sha256:0")],
            None,
            canary=canary(model, tokenizer),
        )
        made.append(Prepared(draft, folder))
    return made


def publish(root: Path, prepared: Prepared) -> tuple[str, float]:
    """As training does. Returns the version's full name, and when its files were whole."""
    from lit_ft.adapter import publish as publish_adapter

    whole = 0.0

    def write(folder: Path) -> None:
        nonlocal whole
        shutil.copytree(prepared.folder, folder, dirs_exist_ok=True)
        whole = time.monotonic()

    return publish_adapter(root, prepared.draft, write).ref, whole


async def _run(
    url: str, root: Path, versions: Sequence[Prepared], options: argparse.Namespace
) -> tuple[Load, dict[tuple[str, str], Reply]]:
    import aiohttp

    async with aiohttp.ClientSession(trust_env=False, connector=aiohttp.TCPConnector(limit=0)) as http:
        async with opened(url) as tab:
            if tab.why_not:
                say(f"swap       the page is not looked at: {tab.why_not}")
            load = await under_load(http, url, root, versions, options, tab)
        refs = sorted({reply.model for reply in load.replies if reply.model})
        say(f"swap       {len(load.replies)} replies by {', '.join(refs)}; now each of these alone")
        alone = {}
        for ref, prompt in itertools.product(refs, PROMPTS):
            alone[ref, prompt] = await ask(http, f"{url}/v1", ref, prompt, max_tokens=options.tokens, surely=True)
        return load, alone


async def under_load(
    http: aiohttp.ClientSession,
    url: str,
    root: Path,
    versions: Sequence[Prepared],
    options: argparse.Namespace,
    tab: Tab,
) -> Load:
    """`--clients` chat for `--seconds`; the versions come evenly spread over that time."""
    load = Load(tab=tab)
    end = time.monotonic() + options.seconds

    async def chat(number: int) -> None:
        for prompt in itertools.islice(itertools.cycle(PROMPTS), number, None):
            if time.monotonic() >= end:
                return
            load.replies.append(await ask(http, f"{url}/v1", NAME, prompt, max_tokens=options.tokens, surely=True))

    async def poll() -> None:
        while True:
            began = time.monotonic()
            try:
                async with http.get(f"{url}/v1/models") as response:
                    for model in (await response.json())["data"]:
                        load.listed.setdefault(model["id"], time.monotonic())
            except Exception as error:
                load.replies.append(Reply("", "/v1/models", began, error=f"{type(error).__name__}: {error}"))
            await asyncio.sleep(POLL_S)

    async def publish_all() -> None:
        begun = end - options.seconds
        for number, prepared in enumerate(versions):
            await asyncio.sleep(max(0.0, begun + (number + 0.5) * options.seconds / len(versions) - time.monotonic()))
            ref, at = await asyncio.to_thread(publish, root, prepared)
            load.published[ref] = at
        while not load.everywhere() and time.monotonic() < end + LATE_S:
            await asyncio.sleep(POLL_S)

    polling = asyncio.create_task(poll())
    try:
        await asyncio.gather(publish_all(), *(chat(number) for number in range(options.clients)))
    finally:
        polling.cancel()
    return load


def judge(load: Load, alone: Mapping[tuple[str, str], Reply], versions: int) -> Findings:
    """The figures, and what should not have been."""
    failed = [reply for reply in [*load.replies, *alone.values()] if reply.error]
    verdicts: Counter[str] = Counter()
    mixed = []
    for reply in load.replies:
        if reply.error:
            continue
        verdict = compare(reply, alone.get((reply.model, reply.prompt)))
        verdicts[verdict] += 1
        if verdict not in ("same", "rounding"):
            mixed.append(f"{', '.join(sorted(reply.models))}: {verdict}: {reply.text[:80]!r}")
    latencies = load.latencies()
    late = percentile(latencies, 0.95)
    wrong = [f"swap: a request failed: {reply.asked}: {reply.error}" for reply in failed[:5]]
    wrong += [f"swap: a reply mixes versions: {words}" for words in mixed[:5]]
    if len(latencies) < versions:
        missing = sorted(load.published.keys() - load.listed.keys())
        wrong.append(f"swap: {versions - len(latencies)} versions were never listed: {', '.join(missing)}")
    if not late <= LISTED_WITHIN_S:
        wrong.append(f"swap: publish to listed takes {late:.2f} s at the 95th percentile, {LISTED_WITHIN_S:g} allowed")
    page_late, page_line = math.nan, f"not looked at: {load.tab.why_not}"
    if not load.tab.why_not:
        to_page = load.to_page()
        page_late, page_line = percentile(to_page.values(), 0.95), spread(list(to_page.values()))
        wrong += _missing_in_page(load, versions)
        if to_page and not page_late <= LISTED_WITHIN_S:
            wrong.append(
                f"swap: publish to page takes {page_late:.2f} s at the 95th percentile, {LISTED_WITHIN_S:g} allowed"
            )
    wrong += [f"swap: {words}" for words in alike(alone)]
    served = {reply.model for reply in load.replies if reply.model}
    meanwhile, else_ = load.during()
    # Stated, not judged: on a machine that does other things too it says little.
    delay = statistics.median(meanwhile) / statistics.median(else_) if meanwhile and else_ else math.nan
    lines = [
        f"requests            {len(load.replies):,}, failed {len(failed):,}, answered by {len(served)} versions",
        f"publish to listed   {spread(latencies)}",
        f"publish to page     {page_line}",
        f"to first token      {spread(meanwhile)}, sent within {AFTER_S:g} s after a publication",
        f"                    {spread(else_)}, else; ratio of the medians {delay:.3f}",
        f"replies             {verdicts['same']:,} as their version's alone, {verdicts['rounding']:,} apart after a "
        f"tie (within {TOLERANCE} of the best token), {len(mixed):,} mixed",
    ]
    summary = {
        "requests": len(load.replies),
        "failed": len(failed),
        "publish_to_listed_p95_s": rounded(late),
        "publish_to_page_p95_s": rounded(page_late),
        "ttft_during_swap": rounded(delay),
        "mixed": len(mixed),
    }
    return Findings(summary, lines, wrong)


def _missing_in_page(load: Load, versions: int) -> list[str]:
    """Versions that the open tab never showed in time, or that its model list lacks at the end."""
    wrong = [f"swap: the page could not be looked at to the end: {load.tab.trouble}"] if load.tab.trouble else []
    if (count := len(load.to_page())) < versions:
        wrong.append(f"swap: {versions - count} versions never appeared in the page")
    held = {text.partition(" ")[0] for text in load.tab.options}
    if missing := sorted(load.published.keys() - held):
        wrong.append(f"swap: the page's model list lacks {', '.join(missing)} at the end")
    return wrong


def compare(reply: Reply, alone: Reply | None) -> str:
    """`same`, `rounding`, or what shows that the reply is not its version's.

    Token by token against what the version that the chunks name says alone to the same prompt: the same token with the
    same log-probability. A batch sums in another order, so where that version's two best tokens are as good as equal it
    may go on with the other one; what comes after such a tie has nothing to be compared with. A reply that another
    version went on with would show at once: versions agree neither on the tokens nor on how sure they are of them.
    """
    if len(reply.models) != 1:
        return f"its chunks name {len(reply.models)} models"
    if alone is None or alone.error:
        return "its version could not be asked alone"
    for number, (one, other) in enumerate(zip(reply.tokens, alone.tokens, strict=False)):
        if one.text == other.text:
            if not abs(one.logprob - other.logprob) <= TOLERANCE:
                return f"token {number + 1} has log-probability {one.logprob:.4f}, alone {other.logprob:.4f}"
            continue
        if one.text == other.second and other.logprob - other.second_logprob <= TOLERANCE:
            return "rounding"
        return f"token {number + 1} is {one.text!r}, alone {other.text!r}"
    if len(reply.tokens) != len(alone.tokens):
        return f"{len(reply.tokens)} tokens, alone {len(alone.tokens)}"
    return "same"


def alike(alone: Mapping[tuple[str, str], Reply]) -> list[str]:
    """Versions that a reply could not tell apart: then nothing mixed would be seen."""
    found = []
    for (ref, prompt), (other, same) in itertools.combinations(alone, 2):
        if prompt == same and ref != other:
            # As if one had been given under the name of the other.
            posing = Reply(prompt, ref, 0.0, {other}, tokens=alone[ref, prompt].tokens)
            if compare(posing, alone[other, prompt]) in ("same", "rounding"):
                found.append(f"{ref} and {other} cannot be told apart by {prompt!r}")
    return found
