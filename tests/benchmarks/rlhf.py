"""RLHF on one base: where an iteration's time goes, what it holds in memory, and what it does to a policy.

    python -m tests.benchmarks.rlhf [--only time|memory|judges|quality]

`time`: iterations of PPO and GRPO with completions made by transformers and by vLLM, split into generation, rewards,
scoring and updates. `memory`: PPO's peak beside four separate models with a step's gradients on two. `judges`: how
often judges are right on held-out pairs, beside "the longer answer wins", for the project's pairs and those of
`--preferences`. `quality`: from one SFT adapter, DPO with several β, PPO and GRPO; PPO and GRPO are trained on judge A
and everything is scored by judge B, which was trained on other pairs, on prompts that nobody was trained on; intervals
by bootstrap, paired by prompt; a plot of B's score against the KL to the SFT adapter. Scores are rewards as in
training: less `--missing-eos-penalty` for each completion that does not end, since a judge has only seen answers that
do; beside it, what judge B alone says of them.

Runs are those of `python -m lit_ft`, each in a process of its own. What lies in `--out` is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lit_ft.progress import say
from tests.benchmarks.adapters import SHARED, kept, must_be_as_before, share_of_cores
from tests.benchmarks.scatter import scatter

DATA = Path(__file__).parents[2] / "examples" / "data" / "support_preferences"
PARTS = ("generation", "rewards", "scoring", "updates")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.child:
        from tests.benchmarks import rlhf_run

        what, given = options.child
        print(json.dumps(getattr(rlhf_run, what)(**json.loads(given))))
        return 0
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    must_be_as_before(out, options, but=("only", "out", "jobs", "child", "rollouts", "betas"))
    make_halves(out, options.pairs)
    found: dict[str, Any] = {}
    judges(out, options)
    if "time" in options.only:
        found["time"] = times(out, options)
        for line in time_table(found["time"]):
            print(line)
    if "memory" in options.only:
        found["memory"] = kept(
            out / "memory.json",
            lambda: {
                "ppo": child("peak", overrides=time_run(out, options, "ppo", "transformers", 1)),
                "separate": child("separate", model=options.model, tokens=options.max_new_tokens + 128),
            },
        )
        ppo, separate = (found["memory"][key]["peak"] / 2**30 for key in ("ppo", "separate"))
        print(f"peak of memory: PPO on one base {ppo:.2f} GiB, four separate models {separate:.2f} GiB")
    wrong = False
    if "judges" in options.only:
        found["judges"] = accuracies(out, options)
        for line in judges_table(found["judges"]):
            print(line)
    if "quality" in options.only:
        found["quality"] = quality(out, options)
        for line in quality_table(found["quality"]):
            print(line)
        points = {name: [(row["kl"], row["score"])] for name, row in found["quality"].items()}
        picture = scatter(
            points,
            title="Another judge's score against the distance from the SFT policy",
            x="KL to the SFT policy (nats per completion)",
            y="score of the judge that nobody was trained on",
        )
        (out / "reward_kl.svg").write_text(picture, encoding="utf-8")
        print(f"The plot is in {out / 'reward_kl.svg'}")
        wrong = any(found["quality"][name]["gain"][0] <= 0 for name in ("PPO", "GRPO") if name in found["quality"])
    print(json.dumps(found))
    if wrong:
        print("The interval of PPO's or GRPO's gain holds zero.", file=sys.stderr)
    return 1 if wrong else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.rlhf", description=__doc__)
    every = ("time", "memory", "judges", "quality")
    parser.add_argument("--only", nargs="+", default=list(every), choices=every)
    parser.add_argument("--model", default="bundled", help="a model's folder or Hub id")
    parser.add_argument("--pairs", type=int, default=100, help="preference pairs for each judge")
    parser.add_argument("--sft-rows", type=int, default=160)
    parser.add_argument("--iterations", type=int, default=10, help="of PPO and of GRPO")
    parser.add_argument(
        "--prompts", type=int, default=16, help="of an iteration of PPO; GRPO has a quarter, four times"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="nine answers in ten of the data are shorter")
    parser.add_argument("--missing-eos-penalty", type=float, default=1.0, help="in deviations of a judge's scores")
    parser.add_argument("--temperature", type=float, default=0.7, help="of completions, in training and when judged")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a prompt with its answer")
    parser.add_argument("--betas", nargs="+", type=float, default=[0.05, 0.2])
    parser.add_argument("--rollouts", nargs="+", default=["transformers", "vllm"], choices=["transformers", "vllm"])
    parser.add_argument(
        "--preferences",
        default=str(SHARED / "preference_alpacaeval.jsonl"),
        help="pairs of another source; left out if the file is not there",
    )
    parser.add_argument("--folds", type=int, default=3, help="judges of that source, each on what it was not shown")
    parser.add_argument("--preference-length", type=int, default=512, help="longer ones of these are dropped")
    parser.add_argument("--judge-rate", type=float, default=2e-4)
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of PPO and GRPO")
    parser.add_argument("--ppo", nargs="*", default=["algorithm.num_epochs=2"], help="further arguments of PPO's runs")
    parser.add_argument("--grpo", nargs="*", default=[], help="further arguments of GRPO's runs")
    parser.add_argument("--dpo-rate", type=float, default=5e-5, help="learning rate of DPO")
    parser.add_argument(
        "--draws", type=int, default=2, help="completions per held-out prompt, when policies are judged"
    )
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="policies at once, for quality")
    parser.add_argument("--out", default="benchmarks/rlhf", help="where results are kept")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_halves(out: Path, pairs: int) -> None:
    """Two files of pairs that have no row in common, one for each judge."""
    rows = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(rows)
    for name, part in (("a", rows[0::2]), ("b", rows[1::2])):
        (out / f"{name}.jsonl").write_text("\n".join(part[:pairs]) + "\n", encoding="utf-8")


def common(out: Path, options: argparse.Namespace, name: str, seed: int = 0) -> list[str]:
    return [
        f"model.id={options.model}",
        f"adapters={out / 'adapters'}",
        f"runs={out / 'runs'}",
        f"name={name}",
        f"seed={seed}",
        f"data.max_length={options.max_length}",
        "trainer.progress=false",
    ]


def judges(out: Path, options: argparse.Namespace) -> None:
    """Judge A, which policies are trained on, and B, which only looks at them."""
    for seed, letter in enumerate("ab"):
        one = [
            "+experiment=reward",
            *common(out, options, f"judge-{letter}", seed),
            f"data.path={out / f'{letter}.jsonl'}",
            f"data.val_path={DATA / 'heldout.jsonl'}",
            f"algorithm.learning_rate={options.judge_rate}",
        ]
        card = published(out, f"judge-{letter}", one)
        accuracy, longer = card["metrics"]["eval/accuracy"], card["metrics"]["eval/accuracy/longer"]
        say(f"judge {letter.upper()}: accuracy {accuracy:.3f} held out; the longer answer wins {longer:.3f}")


def accuracies(out: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Per source of pairs: how often a judge is right on held-out ones, and how often the longer answer wins.

    The desk's held-out pairs are judged by A. Those of `--preferences` are dealt into `--folds` parts, and each part is
    judged by a judge that was trained on the others, so that every pair is held out once.
    """
    sources = {"the desk's": [("judge-a", DATA / "heldout.jsonl", options.max_length)]}
    if Path(options.preferences).is_file():
        rows = Path(options.preferences).read_text(encoding="utf-8").splitlines()
        random.Random(0).shuffle(rows)
        folds = []
        for fold in range(options.folds):
            name = f"judge-preferences-{fold}"
            train, held = (out / f"preferences-{part}-{fold}.jsonl" for part in ("train", "heldout"))
            for path, chosen in ((train, False), (held, True)):
                part = [row for k, row in enumerate(rows) if (k % options.folds == fold) is chosen]
                path.write_text("\n".join(part) + "\n", encoding="utf-8")
            one = [
                "+experiment=reward",
                *common(out, options, name),
                f"data.max_length={options.preference_length}",
                "data.max_dropped=1",
                f"data.path={train}",
                f"data.val_path={held}",
                f"algorithm.learning_rate={options.judge_rate}",
            ]
            folds.append((name, one))
            sources.setdefault(Path(options.preferences).stem, []).append((name, held, options.preference_length))
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda fold: published(out, *fold, options.jobs), folds))
    found: dict[str, dict[str, Any]] = {}
    for source, judged in sources.items():
        pairs: dict[str, list[float]] = {}
        for name, path, length in judged:
            one_fold = kept(
                out / f"pairs-{name}.json",
                lambda given=(name, path, length): child(  # type: ignore[misc]
                    "judge_pairs",
                    model=options.model,
                    adapters=str(out / "adapters"),
                    judge=f"{given[0]}@v1",
                    pairs=str(given[1]),
                    max_length=given[2],
                ),
            )
            for key, values in one_fold.items():
                pairs.setdefault(key, []).extend(values)
        found[source] = {"pairs": len(pairs["right"])} | {
            key: statistics.fmean(pairs[key]) for key in ("right", "tokens", "characters")
        }
        for key in ("tokens", "characters"):
            found[source][f"over_{key}"] = interval([a - b for a, b in zip(pairs["right"], pairs[key], strict=True)])
        # Where as many longer answers win as lose, length says nothing.
        shorter = [r for r, tokens in zip(pairs["right"], pairs["tokens"], strict=True) if tokens == 0]
        longer = [r for r, tokens in zip(pairs["right"], pairs["tokens"], strict=True) if tokens == 1]
        halves = [statistics.fmean(half) for half in (shorter, longer) if half]
        found[source] |= {"balanced": statistics.fmean(halves), "shorter_wins": len(shorter)}
    return found


def judges_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        f"{'held-out pairs':28}{'number':>8}{'judge':>8}{'longer wins, by tokens (judge over it)':>44}"
        f"{'by characters':>34}{'judge, lengths balanced':>26}"
    ]
    for source, row in rows.items():
        cells = []
        for key in ("tokens", "characters"):
            low, high = row[f"over_{key}"]
            cells.append(f"{row[key]:.3f} ({row['right'] - row[key]:+.3f}: {low:+.3f} … {high:+.3f})")
        lines.append(
            f"{source:28}{row['pairs']:>8}{row['right']:>8.3f}{cells[0]:>44}{cells[1]:>34}{row['balanced']:>26.3f}"
        )
    return lines


def published(out: Path, name: str, overrides: Sequence[str], jobs: int = 1) -> dict[str, Any]:
    """The card of an adapter, which is trained if it is not there."""
    path = out / "adapters" / name / "v1" / "card.json"
    if not path.is_file():
        say(f"training {name}")
        lit_ft(overrides, jobs)
    return dict(json.loads(path.read_text(encoding="utf-8")))


def lit_ft(overrides: Sequence[str], jobs: int = 1) -> None:
    command = [sys.executable, "-m", "lit_ft", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=share_of_cores(jobs))
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def child(what: str, jobs: int = 1, **given: Any) -> Any:
    """A function of `rlhf_run` in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.rlhf", "--child", what, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=share_of_cores(jobs))
    if done.returncode:
        raise SystemExit(f"{what} {given} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def online(out: Path, options: argparse.Namespace, algorithm: str, name: str) -> list[str]:
    """The arguments of a run of PPO or GRPO on judge A."""
    each = {"ppo": (options.prompts, 1), "grpo": (max(1, options.prompts // 4), 4)}[algorithm]
    return [
        f"+experiment={algorithm}",
        *common(out, options, name),
        f"data.path={out / 'a.jsonl'}",
        f"data.val_path={DATA / 'heldout.jsonl'}",
        "reward=judge-a@v1",
        f"algorithm.max_new_tokens={options.max_new_tokens}",
        f"algorithm.temperature={options.temperature}",
        f"algorithm.missing_eos_penalty={options.missing_eos_penalty}",
        f"algorithm.num_generations={each[1]}",
        f"data.batch_size={each[0]}",
        f"algorithm.learning_rate={options.rate}",
    ]


def time_run(out: Path, options: argparse.Namespace, algorithm: str, rollout: str, steps: int) -> list[str]:
    return [
        *online(out, options, algorithm, f"time-{algorithm}-{rollout}"),
        *getattr(options, algorithm),
        f"rollout={rollout}",
        "start_from=none",
        "data.max_val_rows=0",
        f"trainer.max_steps={steps}",
        "trainer.max_epochs=-1",
        "trainer.validate_first=false",
    ]


def times(out: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Mean seconds of the second iteration and those after it, by what they were spent on."""
    found = []
    for algorithm in ("ppo", "grpo"):
        for rollout in options.rollouts:
            overrides = time_run(out, options, algorithm, rollout, 3)
            path = out / f"time-{algorithm}-{rollout}.json"
            found.append(kept(path, lambda given=overrides: child("seconds", overrides=given)))  # type: ignore[misc]
            found[-1] |= {"algorithm": algorithm, "rollout": rollout}
    return found


def time_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"{'algorithm':10}{'rollout':14}" + "".join(f"{part:>12}" for part in PARTS) + f"{'s/iteration':>13}"]
    for row in rows:
        whole = sum(row[part] for part in PARTS)
        cells = "".join(f"{row[part]:>12.1f}" for part in PARTS)
        lines.append(f"{row['algorithm']:10}{row['rollout']:14}{cells}{whole:>13.1f}")
    return lines


def quality(out: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of each policy its KL to the SFT policy, judge B's mean score, and its gain over SFT with a 95% interval.

    Policies are trained and judged `--jobs` at a time, once there is the SFT policy that all begin with.
    """
    sft = ["+experiment=sft", *common(out, options, "policy"), f"data.max_rows={options.sft_rows}"]
    sft += ["data.max_val_rows=16"]
    published(out, "policy", sft)
    from_sft = "start_from=policy@v1"
    runs = {"SFT": ("policy", sft)}
    for beta in options.betas:
        name = f"dpo-{beta:g}"
        given = ["+experiment=dpo", *common(out, options, name), from_sft, f"data.path={out / 'a.jsonl'}"]
        given += [f"data.val_path={DATA / 'heldout.jsonl'}", "data.max_val_rows=16", f"algorithm.beta={beta}"]
        runs[f"DPO β={beta:g}"] = (name, [*given, f"algorithm.learning_rate={options.dpo_rate}"])
    for algorithm in ("ppo", "grpo"):
        given = [*online(out, options, algorithm, algorithm), from_sft, f"trainer.max_steps={options.iterations}"]
        given += ["trainer.max_epochs=-1", "data.max_val_rows=0", "trainer.validate_first=false"]
        given += getattr(options, algorithm)
        runs[algorithm.upper()] = (algorithm, given)

    def judged_policy(run: tuple[str, list[str]]) -> dict[str, Any]:
        published(out, *run, options.jobs)
        return kept(
            out / f"judged-{run[0]}.json",
            lambda: child(
                "judge",
                options.jobs,
                model=options.model,
                adapters=str(out / "adapters"),
                policy=f"{run[0]}@v1",
                reference="policy@v1",
                judges=["judge-a@v1", "judge-b@v1"],
                prompts=str(DATA / "heldout.jsonl"),
                draws=options.draws,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                max_length=options.max_length,
            ),
        )

    with ThreadPoolExecutor(options.jobs) as pool:
        judged = dict(zip(runs, pool.map(judged_policy, runs.values()), strict=True))
    penalty = options.missing_eos_penalty
    before = rewards(judged["SFT"], "judge-b@v1", penalty)
    return {
        label: {
            "kl": statistics.fmean(one["kl"]),
            "score": statistics.fmean(rewards(one, "judge-b@v1", penalty)),
            "trained_on": statistics.fmean(rewards(one, "judge-a@v1", penalty)),
            "gain": interval([a - b for a, b in zip(rewards(one, "judge-b@v1", penalty), before, strict=True)]),
            "alone": interval([a - b for a, b in zip(one["judge-b@v1"], judged["SFT"]["judge-b@v1"], strict=True)]),
            "length": statistics.fmean(one["length"]),
            "ended": statistics.fmean(one["ended"]),
        }
        for label, one in judged.items()
    }


def rewards(judged: Mapping[str, Sequence[float]], judge: str, penalty: float) -> list[float]:
    """By prompt: the judge's mean score, less the penalty for the share of completions that do not end."""
    return [score - penalty * (1 - ended) for score, ended in zip(judged[judge], judged["ended"], strict=True)]


def interval(differences: Sequence[float], draws: int = 4000) -> tuple[float, float]:
    """The 95% interval of a mean, by bootstrap over prompts (percentiles; Efron 1979)."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(differences, k=len(differences))) for _ in range(draws))
    return means[round(0.025 * draws)], means[round(0.975 * draws) - 1]


def quality_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        f"{'policy':12}{'KL':>9}{'judge A':>10}{'judge B':>10}{'B over SFT (95%)':>22}{'B alone (95%)':>22}"
        f"{'tokens':>9}{'ended':>8}"
    ]
    for label, row in rows.items():
        gain, alone = (f"{low:+.3f} … {high:+.3f}" for low, high in (row["gain"], row["alone"]))
        lines.append(
            f"{label:12}{row['kl']:>9.2f}{row['trained_on']:>10.3f}{row['score']:>10.3f}"
            f"{gain:>22}{alone:>22}{row['length']:>9.1f}{row['ended']:>8.0%}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
