"""Sweeps: every launcher and Optuna for real on a tiny model, failed runs among good ones, and the table at the end."""

from __future__ import annotations

import csv
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_ft import sweep
from lit_ft.cli import conf_folder
from lit_ft.errors import UserError
from tests.conftest import Outcome

ROOT = Path(__file__).parents[2]
FEW = (
    *("data.max_rows=8", "data.max_val_rows=2", "data.max_length=2048", "logger=none", "trainer.max_steps=1"),
    # No measuring of the arithmetic, no validation before: most of the time of so small a run.
    *("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.validate_first=false", "trainer.progress=false"),
)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A run sets torch's number of threads for its whole process; the next test gets the old one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def command(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lit_ft", *args],
        cwd=folder,
        env={**os.environ, "LIT_FT_CACHE": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


def the_sweep(folder: Path, name: str = "support") -> Path:
    (found,) = (folder / "runs" / name).glob("sweep_*")
    return found


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "runs.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def leave(sweep_folder: Path, number: int, overrides: list[str], result: dict[str, Any] | None) -> Path:
    """A run's folder as a run leaves it."""
    run = sweep_folder / str(number)
    (run / "hydra").mkdir(parents=True)
    (run / "hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    if result is not None:
        (run / "result.json").write_text(json.dumps(result))
    return run


def made(number: int, **metrics: float) -> dict[str, Any]:
    return {"adapter": f"support@v{number}", "path": f"adapters/support/v{number}", "metrics": metrics}


def test_the_table_is_made_of_what_runs_left(tmp_path: Path) -> None:
    leave(tmp_path, 0, ["+experiment=sft", "peft.r=4", r"data.path=examples\:a"], made(1, **{"eval/loss": 2.5}))
    leave(tmp_path, 2, ["+experiment=sft", "peft.r=8", "data.path='b c'"], made(2, **{"eval/loss": 1.25}))
    leave(tmp_path, 10, ["+experiment=sft", "peft.r=16"], {"error": "no such " + "word " * 40})
    leave(tmp_path, 3, ["+experiment=sft", "peft.r=32"], None)
    leave(tmp_path, 4, ["+experiment=sft", "peft.r=64"], made(3, **{"eval/loss": float("nan")}))
    rows = sweep.read_rows(tmp_path, "eval/loss")
    assert [row.run for row in rows] == ["0", "2", "3", "4", "10"]
    assert sweep.differing(rows) == ["peft.r", "data.path"], "experiment is the same in all"
    lines = sweep.table(rows, "eval/loss").splitlines()
    assert lines[0].split() == ["run", "peft.r", "data.path", "eval/loss", "adapter"]
    assert lines[1].split() == ["0", "4", "examples:a", "2.5000", "support@v1"]
    assert lines[2].split() == ["2", "8", "b", "c", "1.2500", "support@v2", "best"]
    assert "killed" in lines[3] and "nan" in lines[4]
    assert lines[5].startswith("10 ") and lines[5].endswith(" …")
    sweep.write_csv(tmp_path / "runs.csv", rows, "eval/loss")
    written = rows_of(tmp_path)
    assert [row["best"] for row in written] == ["", "True", "", "", ""]
    assert written[1]["path"] == "adapters/support/v2" and len(written[4]["error"]) > 200


def test_a_leading_minus_turns_the_objective(tmp_path: Path) -> None:
    low = leave(tmp_path, 0, ["peft.r=4"], made(1, **{"eval/loss": 1.0, "eval/rewards/accuracies": 0.25}))
    high = leave(tmp_path, 1, ["peft.r=8"], made(2, **{"eval/loss": 2.0, "eval/rewards/accuracies": 0.75}))
    for objective, best in (("eval/loss", "0"), ("-eval/rewards/accuracies", "1")):
        found = sweep.best_of(sweep.read_rows(tmp_path, objective), objective)
        assert found is not None and found.run == best
    assert (sweep.score(low, "eval/loss"), sweep.score(high, "-eval/rewards/accuracies")) == (1.0, -0.75)
    with pytest.raises(UserError, match="eval/los: this run measured eval/loss, eval/rewards/accuracies"):
        sweep.score(low, "eval/los")
    diverged = leave(tmp_path, 2, [], made(3, **{"eval/loss": float("nan")}))
    assert sweep.score(diverged, "eval/loss") is None, "Optuna would stop at a NaN"


def test_a_failure_is_kept_where_the_runs_folder_went(tmp_path: Path) -> None:
    sweep.write_failure(tmp_path / "1", "no rows", ["peft.r=4"])
    run = leave(tmp_path, 2, ["peft.r=8"], made(1, **{"eval/loss": 1.0}))
    sweep.write_failure(run, "objective=x", ["peft.r=8"])
    first, second = sweep.read_rows(tmp_path, "eval/loss")
    assert (first.error, first.overrides) == ("no rows", {"peft.r": "4"})
    assert (second.error, second.adapter) == ("objective=x", "support@v1"), "what it made is not forgotten"
    sweep.forget(run)
    assert sweep.read_result(run) == {}


@pytest.mark.slow
def test_values_one_after_another_and_a_bad_one_among_them(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path
) -> None:
    paths = "data.path=examples:support_sft,nowhere.jsonl"
    done = cli("-m", f"model.id={llama_folder}", *FEW, paths, "algorithm.learning_rate=1e-4,1e-2")
    assert done.code == 2
    assert done.out == "adapters/support/v1\nadapters/support/v2\n"
    assert "Traceback" not in done.err and done.err.count("error: data.path=nowhere.jsonl: there is no such") == 2
    folder = the_sweep(Path())
    rows = rows_of(folder)
    assert [(row["data.path"], row["algorithm.learning_rate"]) for row in rows] == [
        ("examples:support_sft", "0.0001"),
        ("examples:support_sft", "0.01"),
        ("nowhere.jsonl", "0.0001"),
        ("nowhere.jsonl", "0.01"),
    ]
    assert [row["adapter"] for row in rows] == ["support@v1", "support@v2", "", ""]
    assert [row["best"] for row in rows] == ["", "True", "", ""] and float(rows[1]["eval/loss"]) > 0
    assert [bool(row["error"]) for row in rows] == [False, False, True, True]
    # Each run has a folder of its own; the table ends what is printed.
    assert all(next((folder / str(k) / "checkpoints").iterdir()) for k in (0, 1))
    shown = done.err.split("lower eval/loss is better:")[1].strip().splitlines()
    assert len(shown) == 5 and shown[2].endswith("best") and "no such file" in shown[3]


def test_an_objective_that_is_not_measured(cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path) -> None:
    done = cli("-m", f"model.id={llama_folder}", *FEW, "objective=-eval/acuracy")
    assert done.code == 2 and "objective=-eval/acuracy: this run measured eval/loss" in " ".join(done.err.split())
    assert rows_of(the_sweep(Path()))[0]["adapter"] == "support@v1", "the run itself ended well"


def test_a_bad_value_is_refused_before_the_first_run(cli: Callable[..., Outcome]) -> None:
    done = cli("-m", "trainer.max_steps=1,many")
    assert done.code == 2 and "many" in done.err and "Traceback" not in done.err
    assert not list(Path("runs").rglob("runs.csv")) and not Path("adapters").exists()


@pytest.mark.slow
def test_a_defect_does_not_end_the_others(
    cli: Callable[..., Outcome], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lit_ft.train

    def broken(cfg: Any) -> Any:
        if cfg.peft.r == 8:
            raise SystemExit(2)  # what several processes leave that found a mistake
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(lit_ft.train, "train", broken)
    done = cli("-m", "peft.r=4,8,16")
    assert done.code == 2 and done.err.count("Traceback") == 2
    errors = [row["error"] for row in rows_of(the_sweep(Path()))]
    assert errors[1] == "ended with exit code 2"
    assert all("ZeroDivisionError: by zero (a defect" in error for error in (errors[0], errors[2]))


@pytest.mark.slow
@pytest.mark.parametrize(("code", "name"), [(130, "SIGINT"), (143, "SIGTERM")])
def test_a_signal_ends_the_sweep_and_the_table_is_shown(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, code: int, name: str
) -> None:
    import lit_ft.train

    def stopped(cfg: Any) -> Any:
        raise SystemExit(code)

    monkeypatch.setattr(lit_ft.train, "train", stopped)
    done = cli("-m", "peft.r=4,8")
    assert done.code == code
    (row,) = rows_of(the_sweep(Path()))
    assert row["error"] == f"stopped by {name}"


@pytest.mark.slow
@pytest.mark.parametrize("code", [-1, 144])
def test_what_submitit_queues_again_goes_on_from_its_checkpoint(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    import lit_ft.train

    run = Path("runs/here/0")
    resumed: list[str | None] = []

    def train(cfg: Any) -> Any:
        resumed.append(cfg.resume)
        (run / "checkpoints").mkdir(exist_ok=True)
        (run / "checkpoints" / "last.ckpt").touch()
        raise SystemExit(code)

    monkeypatch.setattr(lit_ft.train, "train", train)
    for _ in range(2):
        cli("-m", "peft.r=4", "hydra.sweep.dir=runs/here")
    assert not (run / "result.json").exists(), "it is not over yet"
    assert resumed == [None, str(run.resolve())]


@pytest.fixture
def formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training replaced by a formula of rank and learning rate: Optuna is what is tried here."""
    import optuna

    import lit_ft.train

    optuna.logging.disable_default_handler()  # it holds the standard error of the test that imported Optuna

    def train(cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig

        if cfg.peft.r == 4:
            raise UserError("four is not liked here")
        metrics = {"eval/loss": (cfg.algorithm.learning_rate - 1e-3) ** 2, "eval/rewards/accuracies": cfg.peft.r / 32}
        run = Path(HydraConfig.get().runtime.output_dir)
        sweep._write(run, made(1, **metrics))
        return SimpleNamespace(path="adapters/support/v1")

    monkeypatch.setattr(lit_ft.train, "train", train)


def optimum(folder: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(OmegaConf.load(folder / "optimization_results.yaml"))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


@pytest.mark.slow
@pytest.mark.usefixtures("formula")
def test_optuna_survives_failed_trials_and_minimises(cli: Callable[..., Outcome]) -> None:
    done = cli("-m", "hydra/sweeper=optuna_lora", "hydra.sweeper.n_trials=5")
    rows = rows_of(the_sweep(Path()))
    assert done.code == 2 and len(rows) == 5, done.err
    assert {row["peft.r"] for row in rows if row["error"]} == {"4"}
    rates = [float(row["algorithm.learning_rate"]) for row in rows]
    assert len(set(rates)) == 5 and all(1e-4 <= rate <= 5e-3 for rate in rates)
    (best,) = (row for row in rows if row["best"])
    assert optimum(the_sweep(Path()))["best_value"] == pytest.approx(float(best["eval/loss"]))


@pytest.mark.slow
@pytest.mark.usefixtures("formula")
def test_optuna_maximises_with_a_minus_and_takes_other_values(cli: Callable[..., Outcome]) -> None:
    values = ("peft.r=choice(8,16,32)", "algorithm.learning_rate=1e-3", "objective=-eval/rewards/accuracies")
    done = cli("-m", "hydra/sweeper=optuna_lora", "hydra.sweeper.n_trials=4", *values)
    assert done.code == 0 and "higher eval/rewards/accuracies is better" in done.err, done.err
    found = optimum(the_sweep(Path()))
    assert (found["best_params"], found["best_value"]) == ({"peft.r": 32}, -1.0)
    assert "alembic" not in done.err


@pytest.mark.slow
@pytest.mark.usefixtures("formula")
def test_optuna_where_every_trial_fails(cli: Callable[..., Outcome]) -> None:
    done = cli("-m", "hydra/sweeper=optuna_lora", "hydra.sweeper.n_trials=2", "peft.r=4")
    assert done.code == 2 and "Traceback" not in done.err and "ended early" not in done.err
    assert [row["error"] for row in rows_of(the_sweep(Path()))] == ["four is not liked here"] * 2


def test_slurm_where_there_is_none(cli: Callable[..., Outcome]) -> None:
    if shutil.which("srun"):
        pytest.skip("a Slurm cluster")
    done = cli("-m", "hydra/launcher=slurm", "peft.r=4,8")
    assert done.code == 2 and "Traceback" not in done.err
    assert "The sweep ended early" in done.err and "srun" in done.err


def launcher_settings(*overrides: str) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from lit_ft.config import register_schemas

    GlobalHydra.instance().clear()
    register_schemas()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("config", list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        found = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def test_what_slurm_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch file that submitit writes of our settings: it refuses words that it does not know."""
    import submitit

    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text("#!/bin/sh\n")
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{srun.parent}:{os.environ['PATH']}")
    settings = launcher_settings(
        "hydra/launcher=slurm", "trainer.devices=4", "trainer.num_nodes=2", "hydra.launcher.partition=gpu"
    )
    common = {"timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name"}
    known = common | {"stderr_to_stdout"}
    given = {key if key in known else f"slurm_{key}": value for key, value in settings.items()}
    for key in ("slurm__target_", "slurm_submitit_folder", "slurm_max_num_timeout"):
        given.pop(key)
    given["name"] = "lit_ft"  # Hydra's own is known in a run only
    executor: Any = submitit.AutoExecutor(tmp_path / "logs", cluster="slurm", slurm_max_num_timeout=0)
    executor.update_parameters(**given)
    text = executor._executor._make_submission_file_text("command", "id")
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "time=240", "mem=64GB", "partition=gpu"):
        assert f"#SBATCH --{line}\n" in text, text
    assert "@120\n" in text, "a warning before the limit"


@pytest.mark.parametrize("script", ["slurm/train.sbatch", "torchrun/train.sh"])
def test_example_scripts_are_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n", ROOT / "examples" / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SRUN = """#!/bin/sh
echo "$@" >> srun.txt
test -e fail && mkdir -p runs/slurm/7/checkpoints && touch runs/slurm/7/checkpoints/last.ckpt && exit 143
mkdir -p runs/slurm/7 && echo {} > runs/slurm/7/result.json
"""


def test_the_batch_file_goes_on_after_the_time_limit(tmp_path: Path) -> None:
    """With srun and scontrol that only note what they were asked."""
    for name, text in {"srun": SRUN, "scontrol": '#!/bin/sh\necho "$@" >> scontrol.txt\n'}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    told = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    environment = {**os.environ, **told, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def submit() -> int:
        script = ["bash", str(ROOT / "examples/slurm/train.sbatch"), "+experiment=sft"]
        return subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True).returncode

    (tmp_path / "fail").touch()
    assert submit() == 143
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"
    (tmp_path / "fail").unlink()
    assert submit() == 0 and submit() == 0
    first, second = (tmp_path / "srun.txt").read_text().splitlines()  # the third time it was done
    run = tmp_path / "runs" / "slurm" / "7"
    assert f"trainer.num_nodes=2 trainer.devices=4 hydra.run.dir='{run}' +experiment=sft" in first
    assert "resume" not in first and second.endswith(f"resume='{run}'")


def test_the_message_where_the_plugins_are_missing(tmp_path: Path) -> None:
    """A package `hydra_plugins` that comes first hides those that are installed."""
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    for choice in ("hydra/sweeper=optuna_lora", "hydra/launcher=local"):
        done = command(tmp_path, "-m", choice, PYTHONPATH=path)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "pip install 'lit_ft[sweep]'" in " ".join(done.stderr.split()), done.stderr


@pytest.mark.slow
def test_optuna_trains(cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path) -> None:
    few = (*FEW, f"model.id={llama_folder}", "hydra.sweeper.n_trials=2")
    done = cli("-m", "hydra/sweeper=optuna_lora", "+experiment=quickstart", *few)
    assert done.code == 0, done.err
    rows = rows_of(the_sweep(Path(), "quickstart"))
    assert [row["adapter"] for row in rows] == ["quickstart@v1", "quickstart@v2"]
    losses = [float(row["eval/loss"]) for row in rows]
    assert optimum(the_sweep(Path(), "quickstart"))["best_value"] == pytest.approx(min(losses))


@pytest.mark.slow
def test_the_local_submitit_launcher(tmp_path: Path, llama_folder: Path) -> None:
    """Every run in a process of its own, at the same time; one of them fails."""
    assert launcher_settings("hydra/launcher=local")["_target_"].endswith(".submitit_launcher.LocalLauncher")
    paths = "data.path=examples:support_sft,nowhere.jsonl"
    done = command(tmp_path, "-m", "hydra/launcher=local", f"model.id={llama_folder}", *FEW, paths)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    good, bad = rows_of(the_sweep(tmp_path))
    assert good["adapter"] == "support@v1" and good["best"] == "True" and not good["error"]
    assert "no such file" in bad["error"] and not bad["adapter"]
    assert "support@v1" in done.stderr.split("lower eval/loss is better:")[1]


@pytest.mark.slow
def test_two_processes_for_each_run(tmp_path: Path, llama_folder: Path) -> None:
    """Each run of the sweep starts processes of its own, and these do not repeat the sweep."""
    paths = "data.path=examples:support_sft,nowhere.jsonl"
    done = command(tmp_path, "-m", f"model.id={llama_folder}", *FEW, "trainer.devices=2", paths)
    assert done.returncode == 2, done.stderr
    good, bad = rows_of(the_sweep(tmp_path))
    assert good["adapter"] == "support@v1" and not good["error"]
    assert "no such file" in bad["error"], "the processes' own words"
    assert sorted(path.name for path in (tmp_path / "adapters" / "support").iterdir()) == ["v1"]
