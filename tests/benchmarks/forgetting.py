"""What a fine-tune gains and what it forgets, by method and with each remedy: python -m tests.benchmarks.forgetting

`methods`: supervised fine-tuning on the support desk's rows in full, by LoRA of several ranks, by AdaLoRA and (IA)³,
and by LoRA with each remedy. Each run is one of `python -m lit_ft`, and what it gained and forgot is what
`python -m lit_ft.evaluate` reports: the fall of the loss on held-out rows; the growth of the loss on general texts and
on general instructions; KL(base ‖ tuned) on the base's own answers. General instructions are rows of `--unfiltered`
that nothing is trained on: answers of another author, in another style than the desk's. (The report's own were written
by the desk's author, and training on the desk brings the model nearer to them.) Means and standard deviations over
seeds. The drift of a method is the larger growth of the two losses; the aim, at most 0.02 nats of it at 95% of the gain
without remedy.
`lima`: as many curated rows as unfiltered ones of the same source (`--unfiltered`), by the loss on general instructions
that were written by hand. Curated are those with the longest answers: of the simple rules the one that Zhao et al. 2024
(arXiv:2402.04833) found to do as LIMA's choice by hand does (Zhou et al. 2023, arXiv:2305.11206).

Tables, a plot of gain against drift, what of the literature's claims holds at this scale, and all of it as one line of
JSON. Results lie in `--out` as they come: started again with the same folder, what is there is not run again. DPO's
curve of reward against KL beside PPO's is `python -m tests.benchmarks.rlhf --only quality`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lit_ft.adapter import REPORT
from lit_ft.progress import Progress
from tests.benchmarks.adapters import SHARED, kept, mean, must_be_as_before, share_of_cores, spread
from tests.benchmarks.scatter import scatter

PLAIN = "LoRA r=16"
METHODS: dict[str, tuple[str, ...]] = {
    "full": ("peft=full",),
    "LoRA r=4": ("peft.r=4", "peft.alpha=8"),
    PLAIN: ("peft.r=16", "peft.alpha=32"),
    "LoRA r=64": ("peft.r=64", "peft.alpha=128"),
    "AdaLoRA": ("peft=adalora",),
    "(IA)³": ("peft=ia3",),
}
# Of LoRA r=16; `{unfiltered}` is the file of general rows that may be trained on. A part of the strength is that of the
# run without remedy.
REMEDIES: dict[str, tuple[str, ...]] = {
    "mix": ("data.mix=[{{path: {unfiltered}, weight: 0.5}}]",),
    "replay=self": ("replay=self",),
    "kl_coef=0.3": ("algorithm.kl_coef=0.3",),
    "kl_coef=0.6": ("algorithm.kl_coef=0.6",),
    "kl_coef=1": ("algorithm.kl_coef=1",),
    "kl_coef=3": ("algorithm.kl_coef=3",),
    "kl_weight=1": ("trainer.kl_weight=1", "trainer.val_check_interval=0.25", "trainer.early_stopping=1"),
    "ema_decay=0.9": ("trainer.ema_decay=0.9",),
    "scale=0.7": (),
    "kl_coef=1, scale=0.8": (),
}
SCALED = {"scale=0.7": (PLAIN, 0.7), "kl_coef=1, scale=0.8": ("kl_coef=1", 0.8)}
FIGURES = ("gain", "text", "instruction", "kl")
# Of general rows: their columns, the characters of a short one, and the files of those held out and of the others.
ALPACA = ("instruction", "input", "output")
SHORT = 500
HELD_OUT, TRAINED_ON = "general-heldout.jsonl", "general-train.json"
AIM, SHARE = 0.02, 0.95

# By method the figures of each seed.
Results = dict[str, list[dict[str, float]]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    must_be_as_before(out, options, but=("only", "methods", "seeds", "jobs", "out"))
    split_general(out, options)
    found: dict[str, Any] = {}
    reached = True
    if "methods" in options.only:
        results = found["methods"] = methods(out, options)
        for line in [*table(results), *claims(results)]:
            print(line)
        points = {name: [(one["gain"], drift(one)) for one in runs] for name, runs in results.items()}
        picture = scatter(
            points,
            title=f"What was gained against what was forgotten, {options.seeds} seeds",
            x="gain: held-out loss before − after (nats per token)",
            y="drift: general loss after − before (nats per token)",
        )
        (out / "forgetting.svg").write_text(picture, encoding="utf-8")
        print(f"The plot is in {out / 'forgetting.svg'}")
        reached = bool(within_aim(results))
    if "lima" in options.only:
        found["lima"] = lima(out, options)
        for line in lima_table(found["lima"]):
            print(line)
    print(json.dumps(found))
    if not reached:
        print("No remedy keeps 95% of the gain with at most 0.02 nats of drift.", file=sys.stderr)
    return 0 if reached else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.forgetting", description=__doc__)
    every = [*METHODS, *REMEDIES]
    parser.add_argument("--only", nargs="+", default=["methods", "lima"], choices=["methods", "lima"])
    parser.add_argument("--methods", nargs="+", default=every, choices=every, metavar="METHOD")
    parser.add_argument("--rows", type=int, default=300, help="of the support desk")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lima-rows", type=int, default=100, help="curated ones, and as many unfiltered ones")
    parser.add_argument("--lima-length", type=int, default=512, help="tokens that their prompt and answer may have")
    parser.add_argument("--unfiltered", default=str(SHARED / "alpaca_demo.json"), help="general rows: a file (Alpaca)")
    parser.add_argument("--general-rows", type=int, default=60, help="of them, held out to measure forgetting on")
    parser.add_argument("--model", default="bundled", help="a model's folder or Hub id")
    parser.add_argument("--set", nargs="*", default=[], help="further arguments of every run of python -m lit_ft")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="runs at once")
    parser.add_argument("--out", default="benchmarks/forgetting", help="where results are kept")
    options = parser.parse_args(arguments)
    for name in options.methods:
        if name in SCALED and SCALED[name][0] not in options.methods:
            parser.error(f"{name} is made of {SCALED[name][0]}: name both.")
    if not Path(options.unfiltered).is_file():
        parser.error(f"there is no file {options.unfiltered}: give another with --unfiltered.")
    return options


def split_general(out: Path, options: argparse.Namespace) -> None:
    """Short general rows to measure forgetting on, and all others to train on: two files that have no row in common."""
    rows = json.loads(Path(options.unfiltered).read_text(encoding="utf-8"))
    short = [k for k, row in enumerate(rows) if sum(len(row.get(key) or "") for key in ALPACA) <= SHORT]
    held = set(random.Random(0).sample(short, min(options.general_rows, len(short))))
    written = [
        {
            "category": "general",
            "prompt": "\n".join(row[key] for key in ALPACA[:2] if row.get(key)),
            "completion": row["output"],
        }
        for row in (rows[k] for k in sorted(held))
    ]
    (out / HELD_OUT).write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    (out / TRAINED_ON).write_text(json.dumps([row for k, row in enumerate(rows) if k not in held]), encoding="utf-8")


def methods(out: Path, options: argparse.Namespace) -> Results:
    """Every method and seed, `--jobs` at once."""
    wanted = [(name, seed) for seed in range(options.seeds) for name in options.methods]
    progress = Progress("runs", len(wanted))

    def one(run: tuple[str, int]) -> dict[str, float]:
        found = kept(out / "runs" / f"{slug(*run)}.json", lambda: measured(out, options, *run))
        progress.advance(1)
        return dict(found)

    # Those that are another run at a part of its strength come when that one is there.
    results: dict[tuple[str, int], dict[str, float]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for scaled in (False, True):
            batch = [run for run in wanted if (run[0] in SCALED) is scaled]
            results |= dict(zip(batch, pool.map(one, batch), strict=True))
    progress.close()
    return {name: [results[name, seed] for seed in range(options.seeds)] for name in options.methods}


def measured(out: Path, options: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    """Train, unless it is another run at a part of its strength, and what the report says of it."""
    target = out / "adapters" / slug(name, seed) / "v1"
    if name in SCALED:
        origin, scale = SCALED[name]
        given = [f"adapter={out / 'adapters' / slug(origin, seed) / 'v1'}", "to=lora", f"scale={scale}"]
        shutil.rmtree(target, ignore_errors=True)  # of a benchmark that was ended before it could measure it
        command("lit_ft.export", [*given, f"output={target}", f"model.id={options.model}"], options.jobs)
    else:
        target = Path(command("lit_ft", training(out, options, name, seed), options.jobs))
    data = Path(__file__).parents[2] / "examples" / "data" / "support_sft"
    given = [f"adapter={target}", "sections=[gain,forgetting]", "answered=0", f"model.id={options.model}"]
    given += [f"instructions={out / HELD_OUT}"]
    given += [f"data.path={data / 'train.jsonl'}", f"data.val_path={data / 'heldout.jsonl'}"]
    command("lit_ft.evaluate", given, options.jobs)
    found = figures(json.loads((target / REPORT / "report.json").read_text(encoding="utf-8")))
    for weights in target.glob("*.safetensors"):
        if weights.stat().st_size > 100 * 2**20:  # a whole model each is more than a disk need keep
            weights.unlink()
    return found


def training(out: Path, options: argparse.Namespace, name: str, seed: int) -> list[str]:
    """The arguments of `python -m lit_ft` for one run."""
    own = METHODS[name] if name in METHODS else (*METHODS[PLAIN], *REMEDIES[name])
    return [
        "+experiment=sft",
        *(one.format(unfiltered=out / TRAINED_ON) if "{unfiltered}" in one else one for one in own),
        f"model.id={options.model}",
        f"data.max_rows={options.rows}",
        f"trainer.max_epochs={options.epochs}",
        f"seed={seed}",
        *places(out, slug(name, seed)),
        *options.set,
    ]


def places(out: Path, name: str) -> list[str]:
    return [
        f"name={name}",
        f"adapters={out / 'adapters'}",
        f"runs={out / 'logs'}",
        "logger=none",
        "trainer.progress=false",
    ]


def slug(name: str, seed: int) -> str:
    """An adapter's name: letters, digits and dashes."""
    plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())
    return "-".join(part for part in f"{plain}-s{seed}".split("-") if part)


def command(module: str, arguments: Sequence[str], jobs: int) -> str:
    """Run `python -m module`; returns what it printed, which of training is the adapter's folder."""
    given = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(given, capture_output=True, text=True, check=False, env=share_of_cores(jobs))
    if done.returncode:
        raise SystemExit(f"{' '.join(given)} failed:\n{done.stderr[-3000:]}")
    return done.stdout.strip()


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """What is compared, of a report."""
    gain, forgetting = (report["sections"][key]["figures"] for key in ("gain", "forgetting"))
    return {
        "gain": -float(gain["loss"]["change"]),
        "text": float(forgetting["text_loss"]["change"]),
        "instruction": float(forgetting["instruction_loss"]["change"]),
        "kl": float(forgetting["kl"]["after"]),
    }


def drift(one: Mapping[str, float]) -> float:
    return max(one["text"], one["instruction"])


def within_aim(results: Results) -> list[str]:
    """The remedies that keep 95% of the mean gain without remedy with a mean drift of at most 0.02 nats."""
    if PLAIN not in results:
        return []
    gain = mean(one["gain"] for one in results[PLAIN])
    return [
        name
        for name, runs in results.items()
        if name in REMEDIES and mean(one["gain"] for one in runs) >= SHARE * gain and mean(map(drift, runs)) <= AIM
    ]


def table(results: Results) -> list[str]:
    """Lines for a person: means ± standard deviations over seeds, in nats per token."""
    plain = mean(one["gain"] for one in results[PLAIN]) if PLAIN in results else None
    lines = [f"{'method':22}{'gain':>16}{'of LoRA':>9}{'texts':>18}{'instructions':>18}{'KL':>17}"]
    for name, runs in results.items():
        cells = []
        for key in FIGURES:
            values = [one[key] for one in runs]
            cells.append(f"{mean(values):+.4f} ±{spread(values):.4f}")
        share = f"{mean(one['gain'] for one in runs) / plain:.0%}" if plain else "-"
        lines.append(f"{name:22}{cells[0]:>16}{share:>9}{cells[1]:>18}{cells[2]:>18}{cells[3]:>17}")
    return lines


def claims(results: Results) -> list[str]:
    """What of the literature holds here, with the numbers."""
    lines = []
    if {"full", PLAIN} <= results.keys():
        lines.append(f"LoRA forgets less than full fine-tuning: {_less(results, PLAIN, 'full')}")
    for name in results:
        if name in REMEDIES:
            lines.append(f"{name} forgets less than LoRA alone: {_less(results, name, PLAIN)}")
    found = within_aim(results)
    lines.append(f"At most {AIM} nats of drift at {SHARE:.0%} of the gain: {', '.join(found) or 'no remedy'}")
    return lines


def _less(results: Results, left: str, right: str) -> str:
    """Whether the drift of `left` is less, seed by seed."""
    if right not in results:
        return "not compared"
    differences = [drift(a) - drift(b) for a, b in zip(results[left], results[right], strict=True)]
    gains = [mean(one["gain"] for one in results[name]) for name in (left, right)]
    how = "yes" if max(differences) < 0 else "no" if min(differences) > 0 else "not with every seed"
    return f"{how} ({mean(differences):+.4f} nats, gain {gains[0]:.3f} against {gains[1]:.3f})"


def lima(out: Path, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Of curated and of unfiltered rows, by seed: loss on general instructions before and after, and tokens."""
    held_out = Path(__file__).parents[2] / "examples" / "data" / "general" / "instructions.jsonl"
    rows = json.loads((out / TRAINED_ON).read_text(encoding="utf-8"))
    wanted = [(kind, seed) for seed in range(options.seeds) for kind in ("curated", "unfiltered")]

    def one(run: tuple[str, int]) -> dict[str, float]:
        kind, seed = run
        name = f"lima-{kind}-s{seed}"

        def make() -> dict[str, float]:
            path = out / f"{name}.jsonl"
            chosen = (
                curated(rows, options.lima_rows) if kind == "curated" else unfiltered(rows, options.lima_rows, seed)
            )
            path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
            given = ["+experiment=sft", f"model.id={options.model}", f"seed={seed}", *places(out, name), *options.set]
            # A fifth of the rate of the desk's rows, whose answers are all of one kind.
            given += [f"data.path={path}", f"data.val_path={held_out}", "algorithm.learning_rate=2e-4"]
            given += [f"data.max_length={options.lima_length}", "data.overflow=truncate"]
            # What is compared here is the loss on all of these rows, before and after, whatever --set may say.
            given += ["data.max_val_rows=null", "trainer.validate_first=true"]
            folder = Path(command("lit_ft", given, options.jobs))
            metrics = json.loads((folder / "card.json").read_text(encoding="utf-8"))["metrics"]
            history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
            return {"before": metrics["before/loss"], "after": metrics["eval/loss"], "tokens": history["num_tokens"]}

        return dict(kept(out / "runs" / f"{name}.json", make))

    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(wanted, pool.map(one, wanted), strict=True))
    return {kind: [found[kind, seed] for seed in range(options.seeds)] for kind in ("curated", "unfiltered")}


def curated(rows: Sequence[Mapping[str, str]], count: int) -> list[Mapping[str, str]]:
    """The rows with the longest answers."""
    return sorted(rows, key=lambda row: -len(row["output"]))[:count]


def unfiltered(rows: Sequence[Mapping[str, str]], count: int, seed: int) -> list[Mapping[str, str]]:
    return random.Random(seed).sample(list(rows), count)


def lima_table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    lines = [f"{'rows':14}{'loss before':>13}{'after':>18}{'tokens trained on':>20}"]
    for kind, runs in found.items():
        after = [run["after"] for run in runs]
        tokens = statistics.fmean(run["tokens"] for run in runs)
        lines.append(
            f"{kind:14}{runs[0]['before']:>13.4f}{f'{mean(after):.4f} ±{spread(after):.4f}':>18}{tokens:>20,.0f}"
        )
    apart = [a["after"] - b["after"] for a, b in zip(found["curated"], found["unfiltered"], strict=True)]
    how = "yes" if max(apart) <= 0 else "no" if min(apart) > 0 else "not with every seed"
    lines.append(f"Curated rows do at least as well as as many unfiltered ones: {how} ({mean(apart):+.4f} nats)")
    return lines


if __name__ == "__main__":
    sys.exit(main())
