"""Several processes beside one: python -m tests.benchmarks.distributed [--rows N] [--rounds N] [--strategies ddp,fsdp]

On this machine, over its loopback interface, all with the same threads per process, rows, examples per step, adapter
and precision; one process and several take turns. Seconds per step, and the bytes that each process sends and receives
in one, counted collective by collective in a step that is not timed, beside the fewest that the strategy needs. The
last line printed is JSON. Exit code 1 if DDP communicates more than the adapters' gradients, or losses disagree.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.training import AGREEMENT, chosen_precision, default_max_tokens, machine, say
from tests.processes import free_ports

STRATEGIES = ("ddp", "fsdp", "fsdp_tp")
# DDP may send its minimum, and for metrics and the flag that ends a run this much more.
MORE, SMALL_BYTES = 1.01, 4096
# Seconds in which a process must have ended.
PATIENCE = 3600


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    precision = chosen_precision(options)
    # Ends by SIGTERM as by Ctrl-C: the processes that this one started are ended on the way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    say(f"machine    {machine('cpu')}, {os.cpu_count()} cores; {precision}, {options.threads} threads per process")
    say(f"load       {os.getloadavg()[0]:.1f} before this began")
    refused = {kind: reason for kind in options.strategies if (reason := why_not(kind, options))}
    for kind, reason in refused.items():
        say(f"left out   {kind}: {reason}")
    kinds = ["one", *[kind for kind in options.strategies if kind not in refused]]
    rounds: list[dict[str, list[dict[str, Any]]]] = []
    for number in range(options.rounds):
        rounds.append({})
        for kind in kinds:
            found = rounds[-1][kind] = run(options, precision, kind)
            say(f"round {number + 1}    {kind:<8} {max(p['s_per_step'] for p in found):8.3f} s per step")
    summary = summarize(rounds)
    wrong = complaints(rounds, precision)
    say(table(rounds, summary))
    for line in wrong:
        say(f"WRONG      {line}")
    print(json.dumps({**summary, **{kind: {"left_out": reason} for kind, reason in refused.items()}}))
    return 1 if wrong else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.distributed", description=__doc__)
    parser.add_argument("--model", default="bundled", help="bundled, a folder, or random weights: 135m, 1b, 8b, tiny")
    parser.add_argument("--rows", type=int, default=32, help="examples, gone through again when steps need more")
    parser.add_argument("--batch-size", type=int, help="examples per step, over all processes; default: 8, DPO 4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed ones, after one to warm up")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="of " + ", ".join(STRATEGIES))
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--algorithm", default="sft", choices=["sft", "dpo"])
    parser.add_argument("--data", default="support", help="a file of rows; support: those in examples/data")
    parser.add_argument("--max-length", type=int, default=1024, help="longer rows are left out")
    parser.add_argument("--max-tokens", type=int, help="per forward pass; default: as in training")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16-mixed", "32-true"])
    options = parser.parse_args(arguments)
    options.device = "cpu"
    options.strategies = [kind for kind in options.strategies.split(",") if kind]
    if unknown := sorted(set(options.strategies) - set(STRATEGIES)):
        parser.error(f"--strategies: {', '.join(unknown)} is none of {', '.join(STRATEGIES)}")
    if min(options.rows, options.rounds, options.steps, options.threads) < 1 or options.processes < 2:
        parser.error("at least one row, round, step and thread, and two processes")
    return options


def why_not(kind: str, options: argparse.Namespace) -> str | None:
    """None if the model can be trained under this strategy, else the reason."""
    from lit_ft.models.load import load_config
    from lit_ft.models.tensor_parallel import why_not_divisible
    from tests.benchmarks.shapes import SHAPES

    if kind != "fsdp_tp":
        return None
    if options.model not in SHAPES:
        return why_not_divisible(load_config(options.model), options.processes)
    from transformers import LlamaConfig

    hidden, intermediate, _, heads, kv_heads, *_ = SHAPES[options.model]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    return why_not_divisible(config, options.processes)


def run(options: argparse.Namespace, precision: str, kind: str) -> list[dict[str, Any]]:
    """One process, or several, to their end; returns what each of them saw.

    Raises:
        SystemExit: one failed; its last lines are shown.
    """
    from tests.benchmarks.shapes import SHAPES
    from tests.benchmarks.systems import BATCH

    data: str | None = options.data
    if data == "support":
        name = "support_sft" if options.algorithm == "sft" else "support_preferences"
        data = None if options.model in SHAPES else str(Path("examples/data") / name / "train.jsonl")
    processes = 1 if kind == "one" else options.processes
    settings = {
        "parent": os.getpid(),
        "strategy": kind,
        "processes": processes,
        "threads": options.threads,
        "algorithm": options.algorithm,
        "precision": precision,
        "model": options.model,
        "tokenizer": "bundled" if options.model in SHAPES else options.model,
        "data": data,
        "rows": options.rows,
        "batch_size": options.batch_size or BATCH[options.algorithm],
        "steps": options.steps,
        "max_length": options.max_length,
        "max_tokens": options.max_tokens or default_max_tokens("cpu"),
        "context": 0,
    }
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked, answered = folder / "settings.json", folder / "result.json"
        asked.write_text(json.dumps(settings))
        (port,) = free_ports(1)
        logs = [folder / f"{rank}.log" for rank in range(processes)]
        try:
            for rank, log in enumerate(logs):
                env = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
                for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                    env.pop(key, None)
                if processes > 1:
                    # Where the machine's own name resolves to would otherwise decide which interface is used.
                    env |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                    env |= {"GLOO_SOCKET_IFNAME": "lo"}
                command = [sys.executable, "-m", "tests.benchmarks.distributed_worker", str(asked), str(answered)]
                with log.open("wb") as out:
                    started.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
            failed = first_failure(started)
        finally:
            for process in started:
                process.kill()
                process.wait()
        if failed is not None or not answered.exists():
            said = logs[failed or 0].read_text(errors="replace").splitlines()[-15:]
            raise SystemExit(f"{kind}: process {(failed or 0) + 1} failed:\n" + "\n".join(said))
        return json.loads(answered.read_text())


def first_failure(started: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all to end well and return None, or for the first to fail and return its number."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        codes = [process.poll() for process in started]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            return failed[0]
        if None not in codes:
            return None
        time.sleep(0.05)
    return 0


def summarize(rounds: Sequence[dict[str, list[dict[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds; the slowest process and the one with the most memory count in each."""

    def median(kind: str, key: str, which: Any = max) -> float:
        return statistics.median(which(p[key] for p in one[kind]) for one in rounds)

    found: dict[str, dict[str, Any]] = {}
    for kind in rounds[0]:
        seconds = median(kind, "s_per_step")
        found[kind] = {
            "s_per_step": round(seconds, 4),
            "tokens_per_s": round(median(kind, "tokens_per_s", min), 1),
            "peak_mb": round(median(kind, "peak_bytes") / 1e6, 1),
            "weights_mb": round(median(kind, "bytes_held") / 1e6, 1),
        }
        if kind == "one":
            continue
        ratios = [max(p["s_per_step"] for p in one["one"]) / max(p["s_per_step"] for p in one[kind]) for one in rounds]
        busiest = max((p for one in rounds for p in one[kind]), key=lambda p: p["traffic"]["bytes"])
        traffic, least = busiest["traffic"], sum(busiest["minimum"].values())
        found[kind] |= {
            "speedup": round(statistics.median(ratios), 2),
            "bytes_per_step": traffic["bytes"],
            "minimum_bytes": round(least),
            "ratio": round(traffic["bytes"] / least, 4),
            "small_bytes": traffic["small_bytes"],
            "by_kind": traffic["by_kind"],
            "calls": traffic["calls"],
            "micro_batches": busiest["micro_batches"],
            # Others use this interface, too: the least that was seen.
            "loopback_bytes": round(min(one[kind][0]["loopback_bytes"] for one in rounds)),
        }
    return found


def complaints(rounds: Sequence[dict[str, list[dict[str, Any]]]], precision: str) -> list[str]:
    """What must not be: DDP that sends more than gradients of trained weights, and losses that differ."""
    found = []
    for number, one in enumerate(rounds, 1):
        for process in one.get("ddp", []):
            sent, least = process["traffic"]["bytes"], sum(process["minimum"].values())
            if sent > MORE * least + SMALL_BYTES:
                found.append(f"ddp: {sent:,} bytes in a step, where the adapters' gradients make {least:,.0f}")
            if set(process["traffic"]["by_kind"]) - {"all_reduce"}:
                found.append(f"ddp: {', '.join(process['traffic']['by_kind'])} in a step")
        expected = one["one"][0]["losses"]
        for kind, processes in one.items():
            for k, (a, b) in enumerate(zip(processes[0]["losses"], expected, strict=True), 1):
                if not abs(a - b) <= AGREEMENT[precision] * max(abs(b), 0.1):
                    found.append(f"{kind}: loss {a:.5f} at step {k} of round {number}, {b:.5f} in one process")
    return list(dict.fromkeys(found))


def table(rounds: Sequence[dict[str, list[dict[str, Any]]]], summary: dict[str, dict[str, Any]]) -> str:
    head = f"\n{'':<9}s/step  tokens/s  speed-up  peak MB  weights MB   MB/step  at least   ratio  loopback MB"
    lines = [head]
    for kind, of in summary.items():
        line = f"{kind:<8}{of['s_per_step']:7.3f}  {of['tokens_per_s']:8,.0f}"
        if kind == "one":
            lines.append(f"{line}  {'':>8}  {of['peak_mb']:7,.0f}  {of['weights_mb']:10,.1f}")
            continue
        lines.append(
            f"{line}  {of['speedup']:8.2f}  {of['peak_mb']:7,.0f}  {of['weights_mb']:10,.1f}"
            f"  {of['bytes_per_step'] / 1e6:8,.2f}  {of['minimum_bytes'] / 1e6:8,.2f}  {of['ratio']:6.3f}"
            f"  {of['loopback_bytes'] / 1e6:11,.2f}"
        )
    lines.append("\nper process and step, sent and received: MB by kind (calls)")
    for kind, of in summary.items():
        if kind == "one":
            continue
        busiest = max((p for one in rounds for p in one[kind]), key=lambda p: p["traffic"]["bytes"])
        parts = [
            f"{name} {n / 1e6:,.2f} ({of['calls'][name]}), at least {busiest['minimum'].get(name, 0) / 1e6:,.2f}"
            for name, n in of["by_kind"].items()
        ]
        parts.append(f"metrics, norms, stop flag {of['small_bytes']:,} bytes ({busiest['traffic']['small_calls']})")
        lines.append(f"{kind:<8} {of['micro_batches']} passes: " + "; ".join(parts))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
