"""Every command of the README works as written: it is taken from there and run, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_ft import adapter
from lit_ft.models.resolve import model_fingerprint
from tests.conftest import Outcome
from tests.lit_ft.data.test_votes import questions, write_store
from tests.lit_ft.exporting import test_gguf
from tests.lit_ft.made import export, published
from tests.lit_ft.test_evaluate import FEW, evaluate
from tests.lit_ft.test_preview import preview

__all__ = ["evaluate", "export", "preview"]  # fixtures

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
TRAINING = [c.removeprefix("python -m lit_ft ") for c in COMMANDS if c.startswith("python -m lit_ft ")]
SERVING = [c.removeprefix("python -m serve").strip() for c in COMMANDS if re.match(r"python -m serve( |$)", c)]
ACCOUNTS = [c.removeprefix("python -m serve.accounts ") for c in COMMANDS if c.startswith("python -m serve.accounts ")]
PREVIEW = [c.removeprefix("python -m lit_ft.preview ") for c in COMMANDS if c.startswith("python -m lit_ft.preview ")]
EXPORT = [c.removeprefix("python -m lit_ft.export ") for c in COMMANDS if c.startswith("python -m lit_ft.export ")]
EVALUATE = [
    c.removeprefix("python -m lit_ft.evaluate ") for c in COMMANDS if c.startswith("python -m lit_ft.evaluate ")
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
TINY = ("data.max_length=2048", "data.max_dropped=1", "trainer.max_steps=1", "trainer.accelerator=cpu", "logger=none")


def write_files(folder: Path) -> None:
    """The files that the README's commands name, as a reader would have them."""
    chats = [{"messages": [{"role": "user", "content": f"{k}?"}, {"role": "assistant", "content": f"{k}."}]}
             for k in range(20)]  # fmt: skip
    for name in ("chats.jsonl", "general.jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, chats)))
    (folder / "rows.csv").write_text("question,answer\n" + "".join(f"{k}?,{k}.\n" for k in range(20)))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs = {key: [f"{key} {k}" for k in range(20)] for key in ("prompt", "chosen", "rejected")}
    pq.write_table(pa.table(pairs), folder / "pairs.parquet")


# Several processes, launchers of other programs: test_faults.py, test_strategies.py and test_sweep.py run such. Here
# the same commands run with one process; and what a cluster would run is composed.
def alone(command: str) -> str:
    # vLLM takes no model of this width; test_rollouts_vllm.py has the real one.
    return (
        command.replace("trainer.devices=2", "trainer.devices=1")
        .replace("strategy=fsdp_tp model=qwen2_5_0_5b", "strategy=fsdp")
        .replace("rollout=vllm", "rollout=transformers")
    )


@pytest.mark.parametrize(
    "command", [c for c in TRAINING if c not in {"--help"} and "resume=" not in c and not c.startswith("-m ")]
)
def test_training_command(
    cli: Callable[..., Outcome],
    own_cache: Path,
    llama_folder: Path,
    opt_folder: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_files(Path.cwd())
    model = opt_folder if "article" in command else llama_folder
    if "data=votes" in command:
        write_store(Path("votes.db"), questions(80), adapter.Base(model.name, model_fingerprint(str(model))))
    # Its data is on the Hub.
    local: tuple[str, ...] = ("data.path=chats.jsonl", "data.val_path=null") if "article" in command else ()
    if re.search(r"experiment=(ppo|grpo)", command):  # with the README's judge, and its functions from the checkout
        shutil.copytree(ROOT / "examples", "examples", ignore=shutil.ignore_patterns("*.png"))
        monkeypatch.syspath_prepend(".")
        judge = ("+experiment=reward", "name=judge", f"model.id={model}", "data.max_rows=8", "data.max_val_rows=2")
        assert cli(*judge, *TINY).code == 0
        local += ("algorithm.max_new_tokens=8",)
    few = () if "data=votes" in command else ("data.max_rows=40", "data.max_val_rows=8")  # of the bundled rows
    outcome = cli(*shlex.split(alone(command)), f"model.id={model}", *local, *few, *TINY)
    assert outcome.code == 0, outcome.err
    assert adapter.read(Path(outcome.out.strip())).card.metrics


def test_resume_command(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = [c for c in TRAINING if "resume=" in c]
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "publish", lambda *_: signal.raise_signal(signal.SIGINT))  # at the last moment
        assert cli("+experiment=sft", f"model.id={llama_folder}", *TINY).code == 130
    outcome = cli(*shlex.split(command), f"model.id={llama_folder}", *TINY)
    assert outcome.code == 0 and outcome.out == "adapters/support/v1\n", outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("command", PREVIEW)
def test_preview_command(preview: Callable[..., Outcome], llama_folder: Path, command: str) -> None:
    outcome = preview(*shlex.split(command), f"model.id={llama_folder}", *TINY)
    assert outcome.code == 0, outcome.err
    assert Path("preview.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.slow
def test_export_commands(export: Callable[..., Outcome], tmp_path: Path) -> None:
    base = tmp_path / "base"
    test_gguf.model("llama").save_pretrained(base)
    for folder in (base, published(Path("adapters"), base, "dora")[0].path):
        test_gguf.tokenizer().save_pretrained(folder)
    assert len(EXPORT) == 5
    for command in EXPORT:
        outcome = export(*shlex.split(command))
        assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in Path("exported").iterdir()) == ["gguf", "lora", "merged"]
    assert adapter.find(Path("adapters"), "support").ref == "support@v2"


def test_evaluate_commands(cli: Callable[..., Outcome], evaluate: Callable[..., Outcome], llama_folder: Path) -> None:
    assert (
        cli("+experiment=sft", f"model.id={llama_folder}", "data.max_rows=40", "data.max_val_rows=8", *TINY).code == 0
    )
    assert len(EVALUATE) == 2
    for command in EVALUATE:
        outcome = evaluate(*shlex.split(command), *FEW)
        assert outcome.code == 0, outcome.err
        assert Path(outcome.out.strip()).is_file()


def test_help(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "lit_ft", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "max_steps" in done.stdout and "experiment" in done.stdout


@pytest.mark.parametrize("command", SERVING)
def test_serving_command_composes(command: str) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    from lit_ft.cli import conf_folder
    from serve.config import ServeConfig

    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="serve_schema", node=ServeConfig)
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("serve", shlex.split(command))
    assert cfg.port == (8000 if "port=8000" in command else 7860)


def test_the_server_starts_with_the_accounts_that_the_commands_make(tmp_path: Path) -> None:
    from serve.access import check_access

    for command in ACCOUNTS:
        done = subprocess.run(
            [sys.executable, "-m", "serve.accounts", *shlex.split(command)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            input="correct horse\n",
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    found = check_access("0.0.0.0", users=tmp_path / "users.txt", api_keys=tmp_path / "keys.txt")
    assert found.users is not None and found.users.verify("ann", "correct horse")


@pytest.mark.slow
def test_the_lines_of_python_talk_to_a_server(tmp_path: Path) -> None:
    from tests.serve.published import adapter as made

    made(tmp_path / "adapters")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.stub_process", f"port={port}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None and server.stdout.readline() == f"http://127.0.0.1:{port}\n"
        (lines,) = PYTHON
        assert lines.count("127.0.0.1:7860") == 1
        known: dict[str, Any] = {}
        exec(lines.replace("7860", str(port)), known)
        assert {"support", "support@v1", "base"} <= {model.id for model in known["client"].models.list()}
    finally:
        server.terminate()
        assert server.wait(30) == 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m tests.benchmarks")])
def test_benchmark_command_is_understood(command: str) -> None:
    """Such commands are run whole, on a tiny model, in tests/benchmarks/."""
    from tests.benchmarks import distributed, serving, training

    module, *words = shlex.split(command)[2:]
    assert {made.__name__: made for made in (training, distributed, serving)}[module].parse(words)


@pytest.mark.parametrize("command", [c for c in TRAINING if c.startswith("-m ")])
def test_sweep_composes(command: str) -> None:
    """Such commands run, on a tiny model, in test_sweep.py; here every word of them is one that Hydra knows."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from lit_ft.cli import conf_folder
    from lit_ft.config import register_schemas

    GlobalHydra.instance().clear()
    register_schemas()
    words = [word for word in shlex.split(command)[1:] if not word.startswith("hydra.")]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        compose(
            "config", [word.split(",")[0] for word in words if not word.startswith("hydra.")], return_hydra_config=True
        )


def test_every_other_command_exists() -> None:
    clusters = ("NPROC=2 examples/torchrun/train.sh ", "sbatch examples/slurm/train.sbatch ")
    others = [c for c in COMMANDS if not c.startswith(("python -m", "source", *clusters))]
    scripts = [c for c in others if c.startswith("python ")]
    targets = [c.removeprefix("make ") for c in others if c.startswith("make ")]
    assert {*scripts, *(f"make {t}" for t in targets)} == set(others), "a kind of command that no test runs"
    for script in scripts:  # run by test_example_scripts.py
        assert (ROOT / script.split()[1]).is_file()
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_model_and_path_the_readme_names_is_there() -> None:
    named = re.search(r"\| `model=\.\.\.` \| (.*?);", README)
    assert named is not None
    assert set(re.findall(r"`(\w+)`", named[1])) == {p.stem for p in (ROOT / "conf" / "model").glob("*.yaml")}
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / target).is_file(), target
