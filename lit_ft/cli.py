"""The command line: composes the configuration with Hydra and turns mistakes into one paragraph and exit code 2.

The only place that knows Hydra.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from lit_ft.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
# What submitit has a job exit with, under Slurm and locally, that it queued again before the time limit.
_QUEUED_AGAIN = (-1, 144)
# A file in which a run's processes leave the mistake they found, for the sweep that the run belongs to.
_SAID = "LIT_FT_SAID"


def conf_folder() -> Path:
    """The YAML folder: inside the installed package, or beside it in a checkout."""
    inside = _PACKAGE / "conf"
    return inside if inside.is_dir() else _PACKAGE.parent / "conf"


def launch(task: Callable[[Any], int | None], config_name: str, schema: type) -> NoReturn:
    """Compose `config_name` from the YAML folder over `schema`, run `task(cfg)` and exit.

    In a sweep (`-m`) that is done for each combination of values; a table of the runs follows the last.

    Exit codes: what `task` returns (None is 0), 2 for a mistake that the user can mend and for a sweep of which a run
    failed, 130 for Ctrl-C.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from lit_ft import sweep

    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    # Hydra would print its own abridged traceback and exit with 1; with this it raises, and we say it below.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    debug = any(argument.removeprefix("+") in {"debug=true", "debug=True"} for argument in sys.argv[1:])
    outcome: list[int] = []
    mistakes: list[UserError] = []

    def job(cfg: Any) -> float | None:
        settings = HydraConfig.get()
        if settings.mode is RunMode.MULTIRUN and "sweep" in settings.callbacks:
            return _run_of_sweep(task, cfg, debug)
        try:
            outcome.append(task(cfg) or 0)
        except UserError as error:  # kept from Hydra, which would print lines of its own before ours
            mistakes.append(error)
        return None

    sweep.Begun.config = None
    failed = 0
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)(job)()
        if mistakes:
            raise mistakes[0]
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if debug:
            traceback.print_exc()
        _complain(_first_words(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if sweep.Begun.config is not None and not debug:  # not a run's, which keeps its own, but the launcher's
            if "No trials are completed" not in str(error):  # Optuna where every run failed, as the table shows
                _complain(f"The sweep ended early: {str(error) or type(error).__name__} (debug=true shows where)")
            sys.exit(2)
        if not debug:
            logging.getLogger(__name__).error("This is a defect of lit_ft, not of your input; please report it.")
        raise
    finally:
        failed = sweep.finish()
    sys.exit(2 if failed else max(outcome, default=0))


def model_is_no_group() -> None:
    """Let `model=FOLDER` mean `model.id=FOLDER` for a command whose own YAML has no model to choose.

    Hydra would look for it in the group conf/model, which is training's.
    """
    sys.argv[1:] = [re.sub(r"^model=", "model.id=", argument) for argument in sys.argv[1:]]


def quote_conditions() -> None:
    """Let `fail_if=a=b` be written without quotes: Hydra's grammar wants some around a value with `=`, `<` or `>`.

    So too `evaluate.fail_if=a=b`, and `evaluate={fail_if: a=b}` of a run.
    """

    def quoted(argument: str) -> str:
        if found := re.fullmatch(r"(\+{0,2}(?:evaluate\.)?fail_if=)([^\[\"'].*)", argument, re.DOTALL):
            return f'{found[1]}"{found[2]}"'
        if argument.lstrip("+").startswith("evaluate={"):
            return re.sub(r"(fail_if\s*:\s*)([^\s\[\"'{,}][^,}]*)", r'\1"\2"', argument)
        return argument

    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]


def _run_of_sweep(task: Callable[[Any], int | None], cfg: Any, debug: bool) -> float | None:
    """Run one job of a sweep; returns what the sweeper minimises, or None if there is nothing.

    A failure is written into the run's folder and not raised: Hydra's own sweeper would end with the batch, Optuna
    with the first one. What submitit queued again before a time limit goes on from its checkpoint.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from lit_ft import sweep
    from lit_ft.distributed.launched import LOST_ANOTHER

    settings = HydraConfig.get()
    run = Path(settings.runtime.output_dir)
    sweep.forget(run)
    stopped: SystemExit | None = None
    said = Path(tempfile.mkdtemp(prefix="lit_ft-")) / "said.txt"
    os.environ[_SAID] = str(said)
    queued_again = run / "queued_again"
    if cfg.resume is None and queued_again.exists() and list(run.glob("checkpoints/last*.ckpt")):
        cfg.resume = str(run)
    try:
        if not task(cfg):
            return sweep.score(run, cfg.objective)
        reason = "evaluate.fail_if holds, as its report says"
    except SystemExit as ended:  # train() ends so in, or after, several processes
        if not ended.code:
            return None  # not the first of them, which has the result
        if ended.code in _QUEUED_AGAIN:
            run.mkdir(parents=True, exist_ok=True)
            queued_again.touch()
            raise
        if ended.code == LOST_ANOTHER and sweep.failed(run):
            return None  # of several processes, another one has said why
        reason = said.read_text(encoding="utf-8") if said.exists() else f"ended with exit code {ended.code}"
        for number in (signal.SIGINT, signal.SIGTERM):  # somebody stops the whole sweep
            if ended.code == 128 + number:
                reason, stopped = f"stopped by {number.name}", ended
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if debug:
            traceback.print_exc()
        reason = _first_words(error)
        _complain(reason)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        if not type(error).__module__.startswith("submitit"):  # which so ends what reached the time limit too often
            reason += " (a defect of lit_ft, not of your input; please report it)"
    finally:
        del os.environ[_SAID]
        shutil.rmtree(said.parent, ignore_errors=True)
        gc.collect()  # the next run in this process needs the memory
    # Only now, when nothing of the run is left that could still remove its folder.
    sweep.write_failure(run, " ".join(reason.split()), list(settings.overrides.task))
    if stopped is not None:
        raise stopped
    return None


def _first_words(error: Exception) -> str:
    """One paragraph for `error`; Hydra's and OmegaConf's messages are joined and shortened to what helps."""
    if isinstance(error, UserError):
        return str(error)
    causes: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        # OmegaConf appends the place as indented lines: `full_key: …` names the key, the rest is for its developers.
        lines = [line.strip() for line in str(seen).splitlines() if line.strip()]
        for line in lines:
            if line.startswith(("object_type=", "reference_type=", "full_key:")):
                continue
            if line not in causes and not any(line in cause for cause in causes):
                causes.append(line)
        seen = seen.__cause__
    text = " ".join(causes)
    if override := getattr(error, "override", None):
        text = f"{override!r} cannot be read: {text}"
    if re.search(r"ould not \w+ 'hydra/(sweeper/(sampler/|optuna)|launcher/submitit)", text):
        return f"{text} Optuna and submitit come with: pip install 'lit_ft[sweep]'"
    key = getattr(error, "full_key", None)
    place = f" (key: {key})" if key and key not in text else ""
    return f"{text}{place} See `python -m {_command()} --help` for what there is."


def _command() -> str:
    """The command that was started: `lit_ft`, `lit_ft.export` or `serve`."""
    started = Path(sys.argv[0])
    if started.parent.name == "serve":
        return "serve"
    return "lit_ft" if started.stem in ("__main__", "lit_ft") else f"lit_ft.{started.stem}"


def _complain(text: str) -> None:
    if said := os.environ.get(_SAID):
        Path(said).write_text(text, encoding="utf-8")
    paragraph = text if "\n" in text else textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)
    print(f"\nerror: {paragraph}", file=sys.stderr)  # noqa: T201


def main() -> NoReturn:
    """Train: `python -m lit_ft +experiment=sft`."""
    from lit_ft.config import Config, register_schemas

    def task(cfg: Any) -> int:
        from hydra.core.hydra_config import HydraConfig

        from lit_ft.distributed.processes import started_by_others
        from lit_ft.evaluate import after_training, outcome, write_about
        from lit_ft.progress import say
        from lit_ft.sweep import remove_if_unused
        from lit_ft.wiring.checks import check_settings

        try:
            processes = check_settings(cfg)
            report_on = after_training(cfg.evaluate, adapters=cfg.adapters, model=cfg.model.id)
        except UserError:
            run = Path(HydraConfig.get().runtime.output_dir)
            remove_if_unused(run)
            raise
        if processes > 1 and not started_by_others():
            from lit_ft.distributed.launch import train_in_processes

            adapter = train_in_processes(processes, Path(cfg.runs, cfg.name))
        else:
            from lit_ft.train import train

            adapter = train(cfg)
        print(adapter.path)  # noqa: T201
        if report_on is None:
            return 0
        gc.collect()  # the model that was trained
        asked, conditions = report_on
        asked.adapter = str(adapter.path)
        report, page = write_about(asked)
        say(f"report     {page}")
        return 0 if conditions is None else outcome(conditions, report, page)

    quote_conditions()
    register_schemas()
    launch(task, "config", Config)
