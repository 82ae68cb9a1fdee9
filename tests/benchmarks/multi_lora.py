"""One vLLM with many adapters: python -m tests.benchmarks.multi_lora [--tokens N] [--rounds N] [--servers …]

Three servers, one after another: without the LoRA flag, with it and vLLM's own operators, and with ours. On each the
cases take turns, so that what else the machine does falls on all of them; the ratios are medians of each round's own.
The adapters are random, of rank 16 on every linear layer. Prompts are never repeated, so no cache helps. After the
clock, the replies of mixed batches are compared with those of the same requests one at a time. The last line printed
is JSON. Exit code 1 if our operators' replies differ, or are slower than promised.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from lit_ft.adapter import Adapter

STREAMS = 32
MAX_LORAS = 4
ADAPTERS = 6
RANK = 16
SPREAD = 0.02  # of A and B: replies then differ between adapters and are still text
AT_LEAST = {"ratio_one_adapter_1": 0.70, f"ratio_four_mixed_{STREAMS}": 0.60}
"""Of our operators' tokens/s to those of the base with as many streams on the same server."""

SERVERS = {"no_lora_flag": "without --enable-lora", "stock": "vLLM's LoRA operators", "ours": "our LoRA operators"}


@dataclass(frozen=True)
class Case:
    """Requests sent at once: request i goes to `adapters[i % len]`; None is the base."""

    name: str
    streams: int
    adapters: tuple[int | None, ...]

    @property
    def key(self) -> str:
        return f"{self.name}_{self.streams}"


CASES = (
    Case("base", 1, (None,)),
    Case("one_adapter", 1, (0,)),
    Case("base", STREAMS, (None,)),
    Case("one_adapter", STREAMS, (0,)),
    Case("four_mixed", STREAMS, tuple(range(MAX_LORAS))),
    Case("more_than_max_loras", STREAMS, tuple(range(ADAPTERS))),
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    found = measure(options.tokens, options.rounds, options.servers)
    say(table(found))
    print(json.dumps({"multi_lora": found}))
    wrong = judge(found) if "ours" in options.servers else []
    for line in wrong:
        say(f"WRONG      {line}")
    return 1 if wrong else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.multi_lora", description=__doc__)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each reply")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=SERVERS)
    return parser.parse_args(arguments)


def measure(tokens: int = 64, rounds: int = 5, servers: Sequence[str] = tuple(SERVERS)) -> dict[str, dict[str, float]]:
    """Tokens/s by server and case ("four_mixed_32"), and the ratio of each case to the base with as many streams.

    Those with the flag also hold `different_replies`: replies of mixed batches that differ from one at a time, and
    `vs_no_lora_flag_…`: against the base of the server without the flag, which ran at another time.
    """
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(Path(folder, "adapters"))
        for server in servers:
            with serving(server, adapters, Path(folder)) as client:
                found[server] = asyncio.run(
                    run(client, adapters, tokens, rounds, with_adapters=server != "no_lora_flag")
                )
    flagless = found.get("no_lora_flag", {})
    for server in found.keys() - {"no_lora_flag"}:
        for case in CASES:
            if reference := flagless.get(f"base_{case.streams}"):
                found[server][f"vs_no_lora_flag_{case.key}"] = round(found[server][case.key] / reference, 3)
    return found


def make_adapters(root: Path) -> list[Adapter]:
    """Random adapters for the bundled model, as published."""
    import torch

    from lit_ft.adapter import Base, DataSource, Draft, publish
    from lit_ft.models.adapt import save_trained
    from lit_ft.models.kinds.lora import apply_lora
    from lit_ft.models.load import load_model
    from lit_ft.models.resolve import model_fingerprint

    model = apply_lora(load_model("bundled"), r=RANK, alpha=RANK)
    source = DataSource("random", 1, "sha256:0")
    draft = Draft("random", Base("bundled", model_fingerprint("bundled")), "sft", "lora", RANK, [source], None, {})
    made = []
    for seed in range(ADAPTERS):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=SPREAD)
        made.append(publish(root, draft, lambda folder: save_trained(model, folder)))
    return made


@contextlib.contextmanager
def serving(server: str, adapters: Sequence[Adapter], folder: Path) -> Iterator[Client]:
    """A vLLM of the given kind, until the block ends."""
    from lit_ft.models.resolve import resolve_model
    from serve import engine

    build, environment = engine.build_command, engine._environment

    def without_lora(*args: Any, **settings: Any) -> list[str]:
        command = build(*args, **settings)
        flag, after = command.index("--enable-lora"), command.index("--disable-uvicorn-access-log")
        return [*command[:flag], *command[after:]]

    def without_plugins(*args: Any) -> dict[str, str]:
        return {**environment(*args), "VLLM_PLUGINS": "none"}

    with contextlib.ExitStack() as changes:
        if server == "no_lora_flag":
            changes.enter_context(mock.patch.object(engine, "build_command", without_lora))
        elif server == "stock":
            changes.enter_context(mock.patch.object(engine, "_environment", without_plugins))
        vllm = engine.Engine(
            resolve_model("bundled"),
            served_name="base",
            max_loras=MAX_LORAS,
            max_cpu_loras=len(adapters),
            max_lora_rank=RANK,
            max_model_len=1024,
            dtype="float32" if engine.on_cpu() else "auto",
            log_path=folder / f"{server}.log",
            start_timeout=600,
        )
        try:
            vllm.start()
            client = Client(vllm.base_url, vllm.api_key)
            if server != "no_lora_flag":
                asyncio.run(client.load(adapters))
            yield client
        finally:
            vllm.stop()


class Client:
    """Asks for completions of a fixed length."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"}

    async def load(self, adapters: Sequence[Adapter]) -> None:
        from serve.client import EngineClient

        engine = EngineClient(self._url, self._headers["Authorization"].removeprefix("Bearer "))
        for adapter in adapters:
            await engine.load(adapter.ref, adapter.path)

    async def ask(self, requests: Sequence[tuple[str, str]], tokens: int) -> list[str]:
        """The replies to (model, prompt), sent all at once."""
        import httpx

        async with httpx.AsyncClient(headers=self._headers, timeout=600, trust_env=False) as http:

            async def one(model: str, prompt: str) -> str:
                body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
                answer = await http.post(f"{self._url}/completions", json=body)
                answer.raise_for_status()
                return str(answer.json()["choices"][0]["text"])

            return await asyncio.gather(*(one(*request) for request in requests))


async def run(
    client: Client, adapters: Sequence[Adapter], tokens: int, rounds: int, *, with_adapters: bool
) -> dict[str, float]:
    """All rounds on one server, after one that does not count."""
    cases = [case for case in CASES if with_adapters or case.name == "base"]
    numbers = itertools.count()

    def requests(case: Case) -> list[tuple[str, str]]:
        """The number comes first, so that no two prompts share a beginning."""
        models = ["base" if index is None else adapters[index].ref for index in case.adapters]
        prompts = (f"{next(numbers)} is the number of this question. How long does charging take?" for _ in range(99))
        return list(zip(itertools.islice(itertools.cycle(models), case.streams), prompts, strict=False))

    for case in cases:
        await client.ask(requests(case), 4)
    rates: dict[str, list[float]] = {case.key: [] for case in cases}
    for number in range(rounds):
        for case in cases:
            asked = requests(case)
            began = time.perf_counter()
            await client.ask(asked, tokens)
            rates[case.key].append(case.streams * tokens / (time.perf_counter() - began))
        say(f"round {number + 1}    " + "  ".join(f"{key} {values[-1]:.0f}" for key, values in rates.items()))
    found = {key: round(statistics.median(values), 1) for key, values in rates.items()}
    for case in cases:
        if case.name != "base":
            pairs = zip(rates[case.key], rates[f"base_{case.streams}"], strict=True)
            found[f"ratio_{case.key}"] = round(statistics.median(own / base for own, base in pairs), 3)
    if with_adapters:
        mixed = requests(Case("base_and_four", 10, (None, *range(MAX_LORAS))))
        together = await client.ask(mixed, min(tokens, 32))
        alone = [(await client.ask([one], min(tokens, 32)))[0] for one in mixed]
        found["different_replies"] = sum(a != b for a, b in zip(together, alone, strict=True))
        found["distinct_replies"] = len(set(alone))
    return found


def judge(found: dict[str, dict[str, float]]) -> list[str]:
    """What our operators promise and do not keep; a figure that is missing shows nothing, so it is wrong too."""
    ours, wrong = found.get("ours", {}), []
    for key, least in AT_LEAST.items():
        if not (value := ours.get(key, math.nan)) >= least:
            wrong.append(f"multi_lora: {key} is {value:.3f} with our operators, at least {least:.2f} wanted")
    if (different := ours.get("different_replies", math.nan)) != 0:
        wrong.append(f"multi_lora: {different:g} replies of mixed batches differ from one at a time")
    return wrong


def table(found: dict[str, dict[str, float]]) -> str:
    """Tokens/s by server and case, each with its ratio to the base with as many streams."""
    lines = [f"\n{'tokens/s':<24}" + "".join(f"{SERVERS[server]:>26}" for server in found)]
    for case in CASES:
        cells = []
        for values in found.values():
            rate, ratio = values.get(case.key), values.get(f"ratio_{case.key}")
            cells.append(("-" if rate is None else f"{rate:,.0f}") + ("" if ratio is None else f" ({ratio:.0%})"))
        lines.append(f"{case.name + f' x {case.streams}':<24}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
