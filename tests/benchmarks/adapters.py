"""Every kind of adapter beside the others: python -m tests.benchmarks.adapters

Each run is one of `python -m lit_ft` in a process of its own, on the first rows of a data set, with the same ranks for
every kind that has any. Of each: the loss on rows held out, and how much the loss on general instructions grew over the
base's (forgetting); trained parameters; the size of what is published, and whether vLLM serves it beside others. Tokens
per second and the peak of memory come from short runs that follow, one at a time and in turn. Last, how long a forward
pass and generation take with the adapter unmerged and merged, beside the base.

A table per data set, a plot of what was learned against what was forgotten, and the same as one line of JSON. Results
lie in `--out` as they come: started again with the same folder, what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_ft.models.kinds import KINDS
from lit_ft.progress import Progress
from tests.benchmarks.scatter import scatter

SHARED = Path(__file__).parents[3] / "shared" / "data"
# Rows, the length they may have, and the settings of each data set's runs.
DATA: dict[str, tuple[str, ...]] = {
    "gsm8k": (
        f"data.path={SHARED / 'gsm8k_train.jsonl'}",
        "data.columns={prompt: question, completion: answer}",
        "data.val_split=0.2",
        "data.max_length=256",
        "data.max_dropped=0.5",
    ),
    "support": ("data.max_val_rows=16",),
}
RANKED = ("lora", "rslora", "lora_plus", "dora", "pissa", "qlora")


@dataclass(frozen=True)
class Run:
    """What one run showed. Losses in nats per token; sizes in bytes; times in seconds."""

    data: str
    kind: str
    rate: float
    seed: int
    before: float
    loss: float
    general: float
    parameters: int
    size: int
    served: str

    @property
    def name(self) -> str:
        return self.kind if self.rate == 1 else f"{self.kind} ×{self.rate:g}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.child:
        from tests.benchmarks import adapters_run

        what, given = options.child
        print(json.dumps(getattr(adapters_run, what)(**json.loads(given))))
        return 0
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in options.kinds if usable(kind)]
    wanted = [
        (data, kind, rate, seed)
        for data in options.data
        for seed in range(options.seeds)
        for rate in options.rates
        for kind in kinds
    ]
    base = kept(out / "base.json", lambda: child("general_loss", options, **general(options), adapter=None))
    runs = trained(wanted, options, out)
    speeds = {kind: kept(out / f"speed-{kind}.json", lambda: []) for kind in kinds}
    for turn in range(options.rounds):
        for kind in kinds:
            if len(speeds[kind]) <= turn:
                overrides = settings("support", kind, 1.0, 0, options)
                overrides += [f"trainer.max_steps={options.speed_steps}", "data.max_val_rows=0", f"runs={out / 'logs'}"]
                speeds[kind].append(child("speed", options, overrides=overrides, adapters=str(out / "speed")))
                write(out / f"speed-{kind}.json", speeds[kind])
    latency: dict[str, Any] = {}
    if options.latency:
        newest = {run[1]: str(folder(out, *run)) for run in wanted if run[0] == "support" and run[1] != "qlora"}
        latency = kept(out / "latency.json", lambda: child("latency", options, model=options.model, folders=newest))
    for data in options.data:
        of_data = [run for run in runs if run.data == data]
        best = at_best_rate(of_data)
        for line in table(data, best, base["general"], speeds, latency):
            print(line)
        points = {
            name: [(run.before - run.loss, run.general - base["general"]) for run in group]
            for name, group in grouped(of_data).items()
        }
        picture = scatter(
            points,
            title=f"{data}: learning and forgetting, {options.seeds} seeds",
            x="learned: held-out loss before − after (nats per token)",
            y="forgotten: general loss after − before (nats per token)",
        )
        (out / f"{data}.svg").write_text(picture, encoding="utf-8")
        print(f"The plot is in {out / f'{data}.svg'}")
    lost = [data for data in options.data if adalora_loses([run for run in runs if run.data == data])]
    print(json.dumps({"base": base, "runs": [vars(r) for r in runs], "speeds": speeds, "latency": latency}))
    if lost:
        print(f"AdaLoRA learned less than LoRA at the same final budget on {', '.join(lost)}.", file=sys.stderr)
    return 1 if lost else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.adapters", description=__doc__)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--rank", type=int, default=16, help="of LoRA and its kin, and AdaLoRA's final one")
    parser.add_argument("--rows", type=int, default=80, help="of each data set, a fifth of gsm8k's held out")
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0], help="times the experiment's learning rate")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="short runs per kind for speed and memory")
    parser.add_argument("--speed-steps", type=int, default=6)
    parser.add_argument("--latency", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="runs at once")
    parser.add_argument("--model", default="bundled", help="a model's folder or Hub id")
    parser.add_argument("--general", default=str(SHARED / "alpaca_demo.json"), help="general instructions: a file")
    parser.add_argument("--general-rows", type=int, default=16)
    parser.add_argument("--out", default="benchmarks/adapters", help="where results are kept")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for path in [options.general, *(SHARED / "gsm8k_train.jsonl" for d in options.data if d == "gsm8k")]:
        if not Path(path).is_file() and not options.child:
            parser.error(f"there is no file {path}: give other data with --data and --general.")
    return options


def usable(kind: str) -> bool:
    """Whether the kind runs here; 4 bits need bitsandbytes."""
    if kind != "qlora":
        return True
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        print("qlora is left out: bitsandbytes is not installed.", file=sys.stderr)
        return False
    return True


def settings(data: str, kind: str, rate: float, seed: int, options: argparse.Namespace) -> list[str]:
    """The arguments of `python -m lit_ft` for one run."""
    ranks = []
    if kind in RANKED:
        ranks = [f"peft.r={options.rank}"]
        # The scaling of each kind's YAML, whatever the rank.
        scaling = {"pissa": 1.0, "qlora": 1.0, "rslora": 0.5}.get(kind, 2.0)
        ranks.append(f"peft.alpha={max(1, round(scaling * options.rank))}")
    elif kind == "adalora":
        ranks = [f"peft.target_r={options.rank}", f"peft.init_r={options.rank * 3 // 2}"]
    return [
        "+experiment=sft",
        f"model.id={options.model}",
        f"peft={kind}",
        *ranks,
        *DATA[data],
        f"algorithm.learning_rate={1e-3 * rate}",
        f"data.max_rows={options.rows}",
        "data.batch_size=2",
        f"trainer.max_epochs={options.epochs}",
        "trainer.progress=false",
        "start_from=none",
        f"seed={seed}",
        f"name={data}-{kind}-{rate:g}-{seed}",
    ]


def folder(out: Path, data: str, kind: str, rate: float, seed: int) -> Path:
    return out / "adapters" / f"{data}-{kind}-{rate:g}-{seed}" / "v1"


def general(options: argparse.Namespace) -> dict[str, Any]:
    return {"model": options.model, "rows": options.general, "count": options.general_rows}


def trained(wanted: Sequence[tuple[str, str, float, int]], options: argparse.Namespace, out: Path) -> list[Run]:
    """Every run, `--jobs` at once on as many threads each; what `out` has is taken from there."""
    progress = Progress("runs", len(wanted))
    first = wanted[0][1]

    def one(run: tuple[str, str, float, int]) -> dict[str, Any]:
        data, kind, rate, seed = run
        where = folder(out, *run)
        overrides = settings(*run, options)
        overrides += ["logger=none", f"adapters={out / 'adapters'}", f"runs={out / 'logs'}"]
        # The same for all kinds: every one begins with the base.
        overrides += [f"trainer.validate_first={str(kind == first).lower()}"]
        overrides += [f"trainer.threads={max(1, (os.cpu_count() or 1) // options.jobs)}"]
        found = kept(
            out / "runs" / f"{where.parent.name}.json",
            lambda: child("quality", options, overrides=overrides, adapter=str(where), **general(options)),
        )
        progress.advance(1)
        return {"data": data, "kind": kind, "rate": rate, "seed": seed, **found}

    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(one, wanted))
    progress.close()
    before = {(run["data"], run["seed"]): run["before"] for run in found if run["before"] is not None}
    return [Run(**{**run, "before": before[run["data"], run["seed"]]}) for run in found]


def child(what: str, options: argparse.Namespace, **given: Any) -> Any:
    """A function of `adapters_run` in a process of its own, so that memory is its own too."""
    command = [sys.executable, "-m", "tests.benchmarks.adapters", "--child", what, json.dumps(given)]
    jobs = 1 if what in ("speed", "latency") else options.jobs
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=share_of_cores(jobs))
    if done.returncode:
        raise SystemExit(f"{what} {given} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def share_of_cores(jobs: int) -> dict[str, str]:
    """The environment of a process, of which `jobs` run at once: more threads than cores wait for each other."""
    cores = os.cpu_count() or 1
    return {**os.environ, **({"OMP_NUM_THREADS": str(max(1, cores // jobs))} if jobs > 1 else {})}


def must_be_as_before(out: Path, options: argparse.Namespace, but: Iterable[str]) -> None:
    """Results in `out` are taken up again, so they must be of these options; those named `but` decide none of them.

    Raises:
        SystemExit: they are of others.
    """
    path = out / "options.json"
    given = {key: value for key, value in sorted(vars(options).items()) if key not in but}
    before = kept(path, lambda: given)
    changed = [key for key, value in json.loads(json.dumps(given)).items() if before.get(key) != value]
    if changed:
        name = changed[0]
        raise SystemExit(
            f"{out} holds results of --{name.replace('_', '-')} {before.get(name)}, and now it is {given[name]}: give "
            "another --out, or delete that folder."
        )


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `path` holds; made and written if it is not there."""
    if not path.is_file():
        write(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content), encoding="utf-8")
    beside.replace(path)


def grouped(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


def at_best_rate(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """By kind, the runs at the learning rate whose mean held-out loss is least."""
    found: dict[str, list[Run]] = {}
    for group in grouped(runs).values():
        kind = group[0].kind
        if kind not in found or mean(r.loss for r in group) < mean(r.loss for r in found[kind]):
            found[kind] = group
    return found


def adalora_loses(runs: Sequence[Run]) -> bool:
    """Whether AdaLoRA's mean held-out loss is above LoRA's by more than their spread over seeds."""
    best = at_best_rate(runs)
    if not {"lora", "adalora"} <= best.keys():
        return False
    ada, lora = ([run.loss for run in best[kind]] for kind in ("adalora", "lora"))
    return mean(ada) - mean(lora) > max(spread(ada), spread(lora))


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> float:
    """The standard deviation over seeds."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(
    data: str,
    groups: Mapping[str, Sequence[Run]],
    base: float,
    speeds: Mapping[str, Sequence[Mapping[str, float]]],
    latency: Mapping[str, Any],
) -> list[str]:
    """Lines for a person: means ± standard deviations over seeds."""
    before = next(iter(groups.values()))[0].before
    lines = [
        f"{data}: loss held out {before:.3f} before training; general loss of the base {base:.3f} (nats per token)",
        f"{'kind':12}{'held-out loss':>17}{'forgotten':>19}{'trained':>13}{'published':>12}{'tokens/s':>10}"
        f"{'memory':>10}{'unmerged':>10}{'merged':>9}  served",
    ]
    for kind, runs in groups.items():
        losses, drifts = [run.loss for run in runs], [run.general - base for run in runs]
        name = runs[0].name
        rate = f"{statistics.median(s['tokens_per_s'] for s in speeds[kind]):.0f}" if speeds.get(kind) else "-"
        peak = f"{max(s['peak'] for s in speeds[kind]) / 2**30:.2f} GiB" if speeds.get(kind) else "-"
        slower = [f"{latency[kind][form]:.3f}" if kind in latency else "-" for form in ("unmerged", "merged")]
        lines.append(
            f"{name:12}{mean(losses):>9.3f} ±{spread(losses):>6.3f}{mean(drifts):>+11.4f} ±{spread(drifts):>6.4f}"
            f"{runs[0].parameters:>13,}{runs[0].size / 1e6:>9.2f} MB{rate:>10}{peak:>10}"
            f"{slower[0]:>10}{slower[1]:>9}  {runs[0].served}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
