"""The estimate of memory beside what real steps take: python -m tests.benchmarks.memory

Each case is a run of `python -m lit_ft`, from loading to publishing, in a process of its own; beside it the preview's
estimate of the same settings. On a CPU what counts is the process's peak of resident memory above its baseline: what it
has once everything is imported and a model of two narrow layers has been trained and published. On a GPU it is what
PyTorch had allocated at most. A table, and the same as one line of JSON; the exit code is 1 if an estimate is further
off than `--within`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_ft.progress import say

# Completions are about as long as they may be: few of the bundled model's end within 32 tokens.
_ONLINE = ("reward=tests.benchmarks.memory:brevity", "algorithm.max_new_tokens=32", "algorithm.num_epochs=2")
# Settings of each case. Runs are of two steps, over as many rows.
CASES: dict[str, tuple[str, ...]] = {
    "SFT, LoRA, 2 rows": ("+experiment=sft", "data.batch_size=2", "data.max_rows=6"),
    "SFT, LoRA, 6 rows": ("+experiment=sft", "data.batch_size=6", "data.max_rows=14"),
    "SFT, LoRA, 2 passes of 512": ("+experiment=sft", "data.batch_size=6", "data.max_rows=14", "data.max_tokens=512"),
    "SFT, LoRA, checkpointing": (
        "+experiment=sft",
        "data.batch_size=6",
        "data.max_rows=14",
        "model.gradient_checkpointing=true",
    ),
    "SFT, QLoRA, 2 rows": ("+experiment=sft", "peft=qlora", "peft.r=16", "data.batch_size=2", "data.max_rows=6"),
    "DPO, LoRA, 3 pairs": ("+experiment=dpo", "data.batch_size=3", "data.max_rows=8"),
    "PPO, 4 prompts": (*_ONLINE, "+experiment=ppo", "data.batch_size=4", "data.max_rows=10"),
    "PPO, checkpointing": (
        *_ONLINE,
        "+experiment=ppo",
        "data.batch_size=4",
        "data.max_rows=10",
        "model.gradient_checkpointing=true",
    ),
    "PPO, 12 prompts": (*_ONLINE, "+experiment=ppo", "data.batch_size=12", "data.max_rows=26"),
    "GRPO, 2 prompts of 4": (
        *_ONLINE,
        "+experiment=grpo",
        "algorithm.num_generations=4",
        "data.batch_size=2",
        "data.max_rows=6",
    ),
    "SFT, full, 2 rows": ("+experiment=sft", "peft=full", "data.batch_size=2", "data.max_rows=6"),
    "SFT, full, 6 rows": ("+experiment=sft", "peft=full", "data.batch_size=6", "data.max_rows=14"),
}
USUAL = (
    "data.max_val_rows=2",
    "trainer.max_steps=2",
    "trainer.progress=false",
    "trainer.validate_first=false",
    "start_from=none",
    "logger=none",
)


@dataclass(frozen=True)
class Row:
    """One case: bytes estimated, by part, and measured; the fullest moment; the tokens of the largest pass."""

    case: str
    precision: str
    tokens: int
    estimated: int
    measured: int
    baseline: int
    moment: str
    parts: dict[str, int]

    @property
    def off(self) -> float:
        """By which share of what was measured the estimate is too high."""
        return self.estimated / self.measured - 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.child is not None:
        what, *given = options.child
        found = estimate(given, options.device) if what == "estimate" else measured(given, options.device)
        print(json.dumps(found))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="lit_ft-memory-") as folder:
        model = tiny_folder(Path(folder, "tiny"))
        for case in options.cases:
            fixed = [*CASES[case], *USUAL, f"trainer.precision={options.precision}"]
            fixed += ["trainer.accelerator=cpu"] if options.device == "cpu" else []
            fixed += [f"model.id={model}"] if options.tiny else [f"model.id={options.model}"] if options.model else []
            rows.append(one(case, fixed, options, Path(folder)))
            say(f"{case}: {rows[-1].off:+.1%}")
    for line in table(rows):
        print(line)
    wrong = [row.case for row in rows if abs(row.off) > options.within]
    summary = {"device": options.device, "within": options.within, "wrong": wrong, "rows": [asdict(r) for r in rows]}
    print(json.dumps(summary))
    return 1 if wrong else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", help="a model's folder or Hub id instead of the bundled one")
    parser.add_argument("--within", type=float, default=0.15, help="how far an estimate may be off, as a share")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, to try the benchmark")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.tiny:  # what a process happens to do then weighs more than the model
        options.within = 100.0
    return options


def one(case: str, fixed: Sequence[str], options: argparse.Namespace, folder: Path) -> Row:
    """Estimate and measure one case, each in a process of its own."""
    warm = str(tiny_folder(folder / "tiny"))

    def child(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "tests.benchmarks.memory", "--device", options.device, "--child", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{case} failed:\n{done.stderr[-3000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))

    asked, found = child("estimate", *fixed), child("measure", warm, *fixed)
    return Row(case, options.precision, measured=found["peak"], baseline=found["baseline"], **asked)


def estimate(overrides: Sequence[str], device: str) -> dict[str, Any]:
    """What the preview says of these settings."""
    from hydra import compose, initialize_config_dir

    from lit_ft.cli import conf_folder
    from lit_ft.config import register_schemas
    from lit_ft.preview import preview_of, register_preview
    from lit_ft.resources.estimate import Setting
    from lit_ft.wiring.announce import quiet

    quiet()
    register_schemas()
    register_preview()
    with initialize_config_dir(str(conf_folder().resolve()), version_base="1.3"):
        cfg: Any = compose("config", list(overrides))
    looked = preview_of(cfg, 1)
    setting = Setting(device, cfg.trainer.precision == "bf16-mixed", cfg.model.gradient_checkpointing)
    found = looked.step.rehearsal(setting).estimate(**looked.step.main_memory(setting))
    tokens = looked.step.passes(device)[0].input_ids.numel()
    return {"tokens": tokens, "estimated": found.sum, "moment": found.moment, "parts": found.parts}


def measured(arguments: Sequence[str], device: str) -> dict[str, int]:
    """Train a tiny model, note the baseline, train what is to be measured, and return both peaks."""
    warm, *overrides = arguments
    with tempfile.TemporaryDirectory(prefix="lit_ft-memory-") as folder:
        os.chdir(folder)
        small = [argument for argument in overrides if not argument.startswith("model.id=")]
        run([*small, f"model.id={warm}", "adapters=warm"])
        gc.collect()
        if device == "cpu":
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
        baseline = 0 if device == "cuda" else status("VmRSS")
        reset(device)
        run([*overrides, "adapters=measured"])
        return {"baseline": baseline, "peak": peak(device) - baseline}


def run(overrides: Sequence[str]) -> None:
    """`python -m lit_ft` in this process."""
    from hydra.core.global_hydra import GlobalHydra

    from lit_ft import cli

    GlobalHydra.instance().clear()
    sys.argv = ["lit_ft", *overrides]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"lit_ft {' '.join(overrides)} ended with exit code {ended.code}") from None


def brevity(completions: Sequence[str], **_: Any) -> list[float]:
    """The reward of PPO's and GRPO's cases."""
    return [-float(len(completion)) for completion in completions]


def reset(device: str) -> None:
    """Forget the peak so far; where the system does not let it, the warm-up's counts, which is far below."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return status("VmHWM")


def status(name: str) -> int:
    """Bytes that Linux has under `name` for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def tiny_folder(path: Path) -> Path:
    """Of a model whose rows have a multiple of 64 numbers, which QLoRA wants on a CPU."""
    from lit_ft.models.load import shrink
    from tests import tiny

    if not path.is_dir():
        small = tiny.model()
        type(small)(shrink(small.config)).float().save_pretrained(path)
        tiny.tokenizer().save_pretrained(path)
    return path


def table(rows: Sequence[Row]) -> list[str]:
    """Lines for a person, sizes in MiB."""
    lines = [
        f"{'case':28}{'precision':>11}{'tokens':>8}{'measured':>10}{'estimated':>10}{'off':>8}{'baseline':>10}  moment"
    ]
    for row in rows:
        sizes = [f"{size / 2**20:>10,.0f}" for size in (row.measured, row.estimated)]
        lines.append(
            f"{row.case:28}{row.precision:>11}{row.tokens:>8,}{''.join(sizes)}{row.off:>+8.1%}"
            f"{row.baseline / 2**20:>10,.0f}  {row.moment}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
