"""Everything that is shipped in conf/ composes, and every experiment runs two steps through the real command line."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lit_ft import adapter
from lit_ft.cli import conf_folder
from lit_ft.models.resolve import model_fingerprint
from tests.conftest import Outcome
from tests.lit_ft.data.test_votes import questions, write_store
from tests.lit_ft.test_online_cli import publish_judge

GROUPS = ("model", "peft", "algorithm", "data", "trainer", "strategy", "logger", "rollout")
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((conf_folder() / group).glob("*.yaml"))]
EXPERIMENTS = sorted(path.stem for path in (conf_folder() / "experiment").glob("*.yaml"))
TINY = ("data.max_length=2048", "data.max_dropped=1", "trainer.max_steps=2", "trainer.accelerator=cpu")


FEW = ("data.max_rows=8", "data.max_val_rows=2", "logger=none", *TINY)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A run sets torch's number of threads for its whole process; the next test gets the old one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compose() -> Iterator[Callable[..., object]]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from lit_ft.config import register_schemas

    GlobalHydra.instance().clear()
    register_schemas()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield lambda *overrides: hydra_compose("config", list(overrides))


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_passes_the_schema(compose: Callable[..., object], group: str, choice: str) -> None:
    from omegaconf import OmegaConf

    extra = ["data.path=x.jsonl"] if (group, choice) == ("data", "file") else []
    added = "+" if group == "rollout" else ""  # only experiments that make completions have one
    cfg = compose(f"{added}{group}={choice}", *extra)
    content = OmegaConf.to_container(cfg, resolve=False, throw_on_missing=True)  # type: ignore[arg-type]
    assert isinstance(content, dict) and group in content


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_runs_two_steps(
    cli: Callable[..., Outcome], own_cache: Path, experiment: str, llama_folder: Path, opt_folder: Path
) -> None:
    overrides = [f"model.id={llama_folder}", "data.max_rows=40", "data.max_val_rows=8"]
    if experiment == "article":
        rows = [{"messages": [{"role": "user", "content": f"{k}?"}, {"role": "assistant", "content": f"{k}."}]}
                for k in range(16)]  # fmt: skip
        Path("chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
        overrides = [f"model.id={opt_folder}", "data.path=chat.jsonl", "data.val_path=null", "data.val_split=0.25"]
    online = experiment in ("ppo", "grpo")
    if online:  # by the newest judge, as the experiments have it
        publish_judge(Path("adapters"), llama_folder)
        overrides = [f"model.id={llama_folder}", "data.max_rows=8", "data.max_val_rows=2", "data.batch_size=4"]
        overrides += ["algorithm.max_new_tokens=4", "algorithm.num_generations=2"]
    done = cli(f"+experiment={experiment}", *overrides, *TINY)
    assert done.code == 0, done.err
    last = done.out.splitlines()[-1]
    published = adapter.read(Path(last))
    assert published.card.algorithm == (experiment if online or experiment in ("dpo", "reward") else "sft")
    if online:
        assert math.isfinite(published.card.metrics["eval/objective/rlhf_reward"])
        assert "samples    score" in done.err
    else:
        assert published.card.metrics["eval/loss"] > 0
    # Logs and bars belong to standard error: standard output is the folder's path alone.
    assert done.out == last + "\n"
    assert "tokens/s" in done.err and ("⟦" in done.err) != online and "rows kept" in done.err
    (run,) = Path("runs", published.name).iterdir()
    assert list(run.glob("tensorboard/events.*")) and list(run.glob("csv/metrics.csv"))


@pytest.mark.parametrize(
    ("experiment", "more"),
    [
        ("dpo", ()),
        ("reward", ()),
        ("grpo", ("reward=examples.rewards:brief", "algorithm.max_new_tokens=4", "algorithm.num_generations=2")),
    ],
)
def test_two_steps_on_votes(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path, experiment: str, more: tuple[str, ...]
) -> None:
    base = adapter.Base(llama_folder.name, model_fingerprint(str(llama_folder)))
    write_store(Path("votes.db"), questions(30), base)
    done = cli(f"+experiment={experiment}", "data=votes", f"model.id={llama_folder}", *TINY, *more)
    assert done.code == 0, done.err
    card = adapter.read(Path(done.out.strip())).card
    assert card.algorithm == experiment and math.isfinite(card.metrics["eval/loss"])
    assert "votes.db" in str(card.data)


@pytest.mark.slow
def test_a_real_process_says_the_folder_and_nothing_else(tmp_path: Path, llama_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lit_ft", "+experiment=quickstart", f"model.id={llama_folder}", *TINY],
        cwd=tmp_path,
        env={**os.environ, "LIT_FT_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "adapters/quickstart/v1\n"
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr


def test_the_article_goes_on_with_dpo_on_its_three_rows(
    cli: Callable[..., Outcome], own_cache: Path, opt_folder: Path
) -> None:
    rows = [{"prompt": f"{k}?", "completion": f"{k}."} for k in range(16)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = f"model.id={opt_folder}"
    sft = cli("+experiment=article", model, "data.path=rows.jsonl", "data.val_path=null", *TINY)
    assert sft.code == 0, sft.err
    dpo = cli("+experiment=article", "algorithm=dpo", "data=article_preferences", model, *TINY)
    assert dpo.code == 0, dpo.err
    assert "start      adapter article@v1 (sft)" in dpo.err
    card = adapter.find(Path("adapters"), "article").card
    assert (card.ref, card.parent, card.algorithm) == ("article@v2", "article@v1", "dpo")
    assert card.data[0].rows == 2, "three rows, one of them held out"
    # Padded rows: FlashAttention is asked for, and absent here.
    assert "rows       padded (as asked), up to 1,024 tokens a pass" in dpo.err
    # The template that training used travels with the adapter.
    assert "Assistant: " in Path("adapters/article/v2/chat_template.jinja").read_text()


@pytest.mark.slow
def test_dpo_says_what_it_starts_from(cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path) -> None:
    sft = cli("+experiment=sft", f"model.id={llama_folder}", *FEW)
    assert sft.code == 0 and sft.out == "adapters/support/v1\n"
    after = cli("+experiment=dpo", f"model.id={llama_folder}", *FEW)
    assert "start      adapter support@v1 (sft)" in after.err
    assert adapter.find(Path("adapters"), "support@v2").card.parent == "support@v1"
    base = cli("+experiment=dpo", f"model.id={llama_folder}", "start_from=none", *FEW)
    assert "start      the base model" in base.err


@pytest.mark.slow
def test_reference_logprobs_are_reused_across_runs(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path
) -> None:
    first = cli("+experiment=dpo", f"model.id={llama_folder}", *FEW)
    second = cli("+experiment=dpo", f"model.id={llama_folder}", "algorithm.beta=0.3", *FEW)
    assert "read from the cache" not in first.err and "8 pairs read from the cache" in second.err
    other = cli("+experiment=dpo", f"model.id={llama_folder}", "data.chat_template=plain", *FEW)
    assert "read from the cache" not in other.err


def test_a_warm_cache_gives_the_losses_of_a_cold_one(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path
) -> None:
    """To the bit, step by step and held out."""
    logged = []
    for name in ("cold", "warm"):
        done = cli("+experiment=dpo", f"model.id={llama_folder}", f"name={name}", *FEW[:2], *TINY)
        assert ("read from the cache" in done.err) == (name == "warm"), done.err
        (metrics,) = Path("runs", name).rglob("metrics.csv")
        logged.append([row for row in csv.DictReader(metrics.open()) if row.pop("epoch") is not None])
    assert any(row["train/loss"] for row in logged[0]) and any(row["eval/loss"] for row in logged[0])
    assert logged[0] == logged[1]


@pytest.mark.slow
def test_whatever_a_reference_depends_on_makes_it_anew(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, template, the adapter that training starts from, which reference, and the arithmetic."""
    model = f"model.id={llama_folder}"
    assert cli("+experiment=sft", model, "peft.r=4", *FEW).code == 0
    usual = ("+experiment=dpo", model, "trainer.precision=32-true", "name=other", *FEW)
    sft = "start_from=support@v1"
    assert "read from the cache" not in cli(*usual, sft).err
    assert "8 pairs read from the cache" in cli(*usual, sft).err
    for change in (
        "data.path=examples:article_preferences",
        "data.chat_template=plain",
        "start_from=none",
        "algorithm.reference=base",
        "trainer.precision=bf16-mixed",
    ):
        key = change.partition("=")[0]
        kept = [argument for argument in (*usual, sft) if argument.partition("=")[0] != key]
        # Of another folder than the others: what one change left there must not be what the next one finds.
        shutil.copytree(own_cache, other := own_cache.with_name(key))
        monkeypatch.setenv("LIT_FT_CACHE", str(other))
        changed = cli(*kept, change)
        assert changed.code == 0 and "read from the cache" not in changed.err, changed.err
        monkeypatch.setenv("LIT_FT_CACHE", str(own_cache))


@pytest.mark.slow
def test_an_adapter_scaled_otherwise_is_another_reference(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path
) -> None:
    """The same weights with another lora_alpha do not say the same."""
    model = f"model.id={llama_folder}"
    assert cli("+experiment=sft", model, *FEW).code == 0
    dpo = ("+experiment=dpo", model, "name=other", "start_from=support@v1", *FEW)
    assert "read from the cache" not in cli(*dpo).err
    config = Path("adapters/support/v1/adapter_config.json")
    config.write_text(config.read_text().replace('"lora_alpha": 32', '"lora_alpha": 64'))
    assert "read from the cache" not in cli(*dpo).err
    assert "read from the cache" in cli(*dpo).err


def first_lines(outcome: Outcome) -> dict[str, str]:
    """What a run says before it trains: `threads    2 (as asked)` and the like."""
    assert outcome.code == 0, outcome.err
    before, trained, _ = outcome.err.partition("held out before training")
    assert trained
    return {line[:10].rstrip(): line[11:] for line in before.splitlines() if re.match(r"[a-z ]{10} \S", line)}


def test_the_first_lines_say_how_and_why(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lines = first_lines(cli(f"model.id={llama_folder}", *FEW))
    assert lines["threads"] == f"{torch.get_num_threads()} (OMP_NUM_THREADS)"
    arithmetic = r"(bf16-mixed|32-true) \(measured \d+ GFLOP/s in bf16, \d+ in fp32\)"
    assert re.fullmatch(arithmetic, lines["arithmetic"])
    assert re.fullmatch(r"packed, attention by [^,]*(, piece by piece)?, up to 1,024 tokens a pass", lines["rows"])


def test_settings_show_in_the_first_lines_and_are_kept(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path
) -> None:
    """One thread although torch had two; fp32; padded rows of a budget of one's own."""
    torch.set_num_threads(2)
    settings = ("trainer.threads=1", "trainer.precision=32-true", "data.packing=off", "data.max_tokens=3000")
    lines = first_lines(cli(f"model.id={llama_folder}", *settings, *FEW))
    assert lines["threads"] == "1 (as asked)"
    assert torch.get_num_threads() == 1
    assert lines["arithmetic"] == "32-true (as asked)"
    assert lines["rows"] == "padded (as asked), up to 3,000 tokens a pass"
    # Nobody asked for a profile.
    (run,) = Path("runs", "support").iterdir()
    assert not {"profile.txt", "trace.json.gz"} & {path.name for path in run.iterdir()}


def test_a_profile_is_printed_and_left_in_the_runs_folder(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_ft.callbacks import profile

    monkeypatch.setattr(profile, "_CPU_PRODUCT", (64, 64, 64))  # a large product would take half a second
    # Three steps of 8 rows; the first is not profiled.
    three_steps = ("data.max_rows=24", "data.batch_size=8", "trainer.max_steps=3")
    asked = cli(f"model.id={llama_folder}", "trainer.profile=true", *FEW, *three_steps)
    assert asked.code == 0, asked.err
    assert asked.out == "adapters/support/v1\n", "the table belongs to standard error"
    (run,) = Path("runs", "support").iterdir()
    text = (run / "profile.txt").read_text(encoding="utf-8")
    assert "Where the time of training steps 2 to 3 went" in text
    assert all(re.search(rf"^{re.escape(row)} +[\d,.]+ +[\d.]+%$", text, re.MULTILINE) for row in profile.ROWS)
    assert text in asked.err
    assert f"Events of these steps: {run.resolve() / 'trace.json.gz'}" in asked.err
    events = json.loads(gzip.decompress((run / "trace.json.gz").read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "lit_ft: step" and event.get("ph") == "X" for event in events) >= 2


def test_full_fine_tuning_publishes_a_whole_model(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    outcome = cli("peft=full", f"model.id={llama_folder}", "data.max_rows=8", "logger=none", "name=whole", *TINY)
    assert outcome.code == 0, outcome.err
    published = adapter.find(Path("adapters"), "whole")
    assert not published.card.servable and "whole model" in (published.card.not_servable_reason or "")
    AutoModelForCausalLM.from_pretrained(published.path)


def test_early_stopping(cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path) -> None:
    outcome = cli(
        f"model.id={llama_folder}",
        "data.max_length=2048",
        "data.max_rows=16",
        "data.max_val_rows=4",
        "trainer.max_epochs=50",
        "trainer.early_stopping=2",
        "algorithm.learning_rate=0",
        "logger=none",
    )
    assert outcome.code == 0, outcome.err
    # Nothing is learnt, so the third validation is the second without a better loss: 3 epochs of 2 steps.
    assert outcome.err.count("held out at step") == 3
