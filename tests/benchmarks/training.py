"""TRL beside lit_ft: python -m tests.benchmarks.training [--rows N] [--rounds N] [--data PATH] [--device cuda] …

Each run is a process of its own, and the two systems take turns, so that what else the machine does falls on both.
The same rows, model, adapter, examples per step, optimizer and precision; TRL in its fastest setting; reference passes
count. The last line printed is JSON. Exit code 1 if the two disagree on a loss, or a gradient is zero.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What TRL can do with these rows; the fastest counts. Its packed rows hold other examples together than ours, so
# its losses cannot be compared step by step. TRL 1.16 has switched padding_free off in DPO.
VARIANTS = {"sft": ("padded", "flat", "packed"), "dpo": ("padded",)}
SAME_BATCHES = ("padded", "flat")
# Of a loss's or gradient norm's size. Rounding differs with the layout; bf16 keeps 8 bits.
AGREEMENT = {"32-true": 1e-3, "bf16-mixed": 3e-2}


@dataclass(frozen=True)
class Result:
    """One process: what it ran and what its `Run` showed."""

    system: str
    variant: str
    round: int
    tokens: int
    seconds: float
    peak_bytes: int
    matrix_rate: float
    flops: float
    losses: list[float]
    grad_norms: list[float]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def label(self) -> str:
        return self.system if not self.variant else f"{self.system} {self.variant}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    precision = chosen_precision(options)
    say(f"machine    {machine(options.device)}; {precision}")
    summary: dict[str, Any] = {}
    wrong: list[str] = []
    if options.scale:
        summary["scale"] = scale(options, precision)
    for algorithm in options.algorithms if not options.scale else []:
        results = alternate(options, algorithm, precision)
        wrong += disagreements(results, algorithm, AGREEMENT[precision])
        summary[algorithm] = summarize(results)
        say(table(algorithm, results))
    for line in wrong:
        say(f"WRONG      {line}")
    print(json.dumps(summary))
    return 1 if wrong else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training", description=__doc__)
    parser.add_argument("--rows", type=int, default=32, help="examples per run (in steps of 8 in SFT, 4 in DPO)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--algorithms", nargs="+", default=["sft", "dpo"], choices=["sft", "dpo"])
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        help="files of rows; those with `chosen` are for DPO. Default: examples/data, or random rows for random models",
    )
    parser.add_argument("--model", default="bundled", help="bundled, a folder, or random weights: 135m, 1b, 8b, tiny")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16-mixed", "32-true"])
    parser.add_argument("--max-length", type=int, default=1024, help="longer rows are left out")
    parser.add_argument("--max-tokens", type=int, help="lit_ft's tokens per forward pass; default: as in training")
    parser.add_argument("--warmup-rows", type=int, help="the shortest rows, trained on before the clock runs")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS["sft"], help="TRL's settings to try in SFT")
    parser.add_argument("--scale", action="store_true", help="instead: lit_ft alone, rows of 256 to 4,096 tokens")
    options = parser.parse_args(arguments)
    options.files = {("dpo" if is_preference(path) else "sft"): path for path in options.data}
    if options.files:
        options.algorithms = [name for name in options.algorithms if name in options.files]
    if options.device == "cuda" and options.model == "bundled":
        options.model = "135m"
    return options


def is_preference(path: Path) -> bool:
    """Whether the first row of `path` has a chosen answer."""
    from lit_ft.data.files import open_source

    (_, row), *_ = open_source(str(path), "train").rows
    return "chosen" in row


def alternate(options: argparse.Namespace, algorithm: str, precision: str) -> list[Result]:
    """All rounds. In the first TRL runs in each of its settings, afterwards in the fastest of them."""
    variants: Sequence[str] = (options.variants if algorithm == "sft" else None) or VARIANTS[algorithm]
    results: list[Result] = []
    for number in range(options.rounds):
        for variant in variants:
            results.append(run(options, algorithm, precision, "TRL", variant, number))
        results.append(run(options, algorithm, precision, "lit_ft", "", number))
        variants = [max((r for r in results if r.system == "TRL"), key=lambda r: r.rate).variant]
    return results


def run(
    options: argparse.Namespace,
    algorithm: str,
    precision: str,
    system: str,
    variant: str,
    number: int,
    **changes: Any,
) -> Result:
    """One process, to its end.

    Raises:
        SystemExit: it failed; its last lines are shown.
    """
    from tests.benchmarks.shapes import SHAPES

    random_weights = options.model in SHAPES
    data = options.files.get(algorithm)
    if data is None and not random_weights:
        data = Path("examples/data") / ("support_sft" if algorithm == "sft" else "support_preferences") / "train.jsonl"
    settings = {
        "system": system,
        "variant": variant,
        "algorithm": algorithm,
        "precision": precision,
        "model": options.model,
        "tokenizer": "bundled" if random_weights else options.model,
        "data": None if data is None else str(data),
        "rows": options.rows,
        "max_length": options.max_length,
        "max_tokens": options.max_tokens or default_max_tokens(options.device),
        "device": options.device,
        "warmup_rows": 4 if options.warmup_rows is None else options.warmup_rows,
        "context": 0,
        "batch_size": None,
        **changes,
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "settings.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "tests.benchmarks.worker", str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not answered.exists():
            raise SystemExit(f"{system} {variant} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
        kept = json.loads(answered.read_text())
    keys = ("tokens", "seconds", "peak_bytes", "matrix_rate", "flops", "losses", "grad_norms")
    result = Result(system, variant, number, *(kept[key] for key in keys))
    say(f"round {number + 1}    {algorithm} {result.label:<12} {result.rate:8,.0f} tokens/s in {result.seconds:.1f} s")
    return result


def disagreements(results: Sequence[Result], algorithm: str, tolerance: float) -> list[str]:
    """Where losses differ by more than `tolerance` of their size, or a gradient is zero."""
    found = [
        f"{algorithm}: {r.label} has a gradient of {norm} at step {k + 1}"
        for r in results
        for k, norm in enumerate(r.grad_norms)
        if not norm > 0
    ]
    ours = [r for r in results if r.system == "lit_ft"]
    theirs = [r for r in results if r.variant in SAME_BATCHES]
    if not theirs:
        return [*found, f"{algorithm}: TRL ran in no setting with the same batches, so losses were not compared"]
    for other in theirs:
        for one in ours[:1]:
            if len(one.losses) != len(other.losses):
                found.append(f"{algorithm}: {len(one.losses)} steps beside {len(other.losses)} of {other.label}")
            for name in ("losses", "grad_norms"):
                for k, (a, b) in enumerate(zip(getattr(one, name), getattr(other, name), strict=False)):
                    if not abs(a - b) <= tolerance * max(abs(b), 0.1):
                        found.append(f"{algorithm}: {name} {a:.5f} at step {k + 1}, {b:.5f} in {other.label}")
    return found


def summarize(results: Sequence[Result]) -> dict[str, float]:
    """Medians over the rounds; the ratio is the median of each round's own."""
    fastest = fastest_trl(results)
    ours = [r for r in results if r.system == "lit_ft"]
    theirs = {r.round: r for r in results if r.label == fastest}
    return {
        "ratio": round(statistics.median(r.rate / theirs[r.round].rate for r in ours), 2),
        "tokens_per_s": round(statistics.median(r.rate for r in ours), 1),
        "trl_tokens_per_s": round(statistics.median(r.rate for r in theirs.values()), 1),
        "peak_ratio": round(statistics.median(r.peak_bytes / theirs[r.round].peak_bytes for r in ours), 3),
        "roofline": round(statistics.median(r.flops / r.seconds / r.matrix_rate for r in ours), 3),
    }


def fastest_trl(results: Sequence[Result]) -> str:
    return max((r for r in results if r.system == "TRL"), key=lambda r: (r.round, r.rate)).label


def table(algorithm: str, results: Sequence[Result]) -> str:
    """One line per system and setting, medians over its rounds."""
    lines = [f"\n{algorithm.upper():<14} tokens/s   peak memory   GFLOP/s of measured   rounds"]
    for label in dict.fromkeys(r.label for r in results):
        mine = [r for r in results if r.label == label]
        rate = statistics.median(r.rate for r in mine)
        peak = statistics.median(r.peak_bytes for r in mine) / 1e9
        achieved = statistics.median(r.flops / r.seconds for r in mine) / 1e9
        possible = statistics.median(r.matrix_rate for r in mine) / 1e9
        used = f"{achieved:8,.0f} of {possible:,.0f}" if achieved else "-"
        lines.append(f"{label:<14} {rate:8,.0f}   {peak:8.1f} GB   {used:>19}   {len(mine)}")
    return "\n".join(lines) + "\n"


def scale(options: argparse.Namespace, precision: str) -> dict[str, dict[str, float]]:
    """lit_ft alone on SFT rows of growing length, 4,096 tokens per step and pass each, after one step uncounted."""
    found = {}
    for context in (256, 512, 1024, 2048, 4096):
        batch = 4096 // context
        changes = {"context": context, "rows": 2 * batch, "batch_size": batch, "warmup_rows": batch}
        changes |= {"max_length": 4096, "max_tokens": 4096}
        result = run(options, "sft", precision, "lit_ft", "", 0, **changes)
        used = result.flops / result.seconds / result.matrix_rate
        found[str(context)] = {"tokens_per_s": round(result.rate, 1), "roofline": round(used, 3)}
        say(f"           {context:,} tokens of context: {used:.0%} of the matrix rate")
    return found


def chosen_precision(options: argparse.Namespace) -> str:
    import torch

    from lit_ft.models.precision import choose_precision

    return choose_precision(options.precision, torch.device(options.device)).trainer


def default_max_tokens(device: str) -> int:
    import torch

    from lit_ft.resources.machine import tokens_per_pass

    return tokens_per_pass(torch.device(device))


def machine(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
