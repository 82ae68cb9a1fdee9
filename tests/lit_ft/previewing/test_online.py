"""The preflight of PPO, GRPO and judges: what the run then says of itself, refusals in the same words, no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_ft import adapter
from tests.conftest import Outcome
from tests.lit_ft import made
from tests.lit_ft.test_online_cli import FEW, HERE, LETTERS, publish_judge, write_rows
from tests.lit_ft.test_preview import everything, line_of, no_weights, same_words
from tests.lit_ft.test_preview import preview as preview

pytestmark = pytest.mark.slow

Command = Callable[..., Outcome]


@pytest.fixture
def usual(cli: Command, own_cache: Path, llama_folder: Path) -> tuple[str, ...]:
    write_rows(Path())
    return (f"model.id={llama_folder}", *FEW, "trainer.progress=false")


def counted(err: str) -> tuple[str, str]:
    """Parameters, and those that are trained, as a run says them."""
    found = re.search(r"([\d,]+) parameters, ([\d,]+) trained", line_of(err, "model"))
    assert found is not None
    return found[1], found[2]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_its_numbers_are_those_of_the_run(
    cli: Command, preview: Command, usual: tuple[str, ...], llama_folder: Path, algorithm: str
) -> None:
    """With an adapter to begin with, a judge to learn from and a function for held-out completions."""
    publish_judge(Path("adapters"), llama_folder)
    made.published(Path("adapters"), llama_folder)
    args = (f"+experiment={algorithm}", *usual, "reward=judge", f"judge={HERE}:letters", "trainer.max_steps=-1")
    args += ("algorithm.value_from=reward", "algorithm.num_mini_batches=2") if algorithm == "ppo" else ()
    args += ("algorithm.num_generations=3",) if algorithm == "grpo" else ()
    before = preview(*args)
    assert before.code == 0, before.err
    run = cli(*args)
    assert run.code == 0, run.err
    for name in ("training", "held out", "start"):
        assert line_of(run.err, name) in before.out
    every, trained = counted(run.err)
    assert line_of(before.out, "trained").startswith(f"{trained} of {every} ")
    assert line_of(before.out, "iterations") == "3 per epoch, 3 in all"
    assert adapter.find(Path("adapters"), "support").card.metrics["step"] <= 3
    completions = {"ppo": "4 prompts × 1 = 4", "grpo": "4 prompts × 3 = 12"}[algorithm]
    assert line_of(before.out, "each").startswith(f"{completions} completions of up to 4 tokens")
    assert line_of(before.out, "updates").startswith("1 × 2 of 2" if algorithm == "ppo" else "1 × 1 of 4")
    # Roles: of PPO two are trained; a reference, since training begins with an adapter; the judge.
    assert line_of(before.out, "policy").endswith("parameters, trained")
    assert ("and a head of 33, trained; begins as the first judge" in before.out) is (algorithm == "ppo")
    assert line_of(before.out, "reference").endswith("frozen: support@v1 as it is now")
    assert line_of(before.out, "judge").endswith("frozen: judge@v1")
    assert line_of(before.out, "reward") == "judge·1" and f"held out   {HERE}:letters·1" in before.out


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_what_is_shown(
    preview: Command, usual: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    """Three prompts, the parts of the memory, and that FSDP takes none of it; no weights, and nothing is left."""
    there = everything(Path.cwd())
    no_weights(monkeypatch)
    outcome = preview(f"+experiment={algorithm}", *usual, LETTERS)
    assert outcome.code == 0, outcome.err
    text = outcome.out
    assert text.count("tokens of prompt\n") == 3 and "0 wheels?" in text and "⟦" not in text
    own = text.split("estimated\n")[1].split("\n\n")[0]
    sizes = dict(re.findall(r"^  (\w[^\d\n]*?) {2,}([\d.,]+) MiB$", own, re.MULTILINE))
    assert {"weights", "adapters", "gradients", "optimizer states", "activations", "in all"} <= sizes.keys()
    parts = sum(float(size) for name, size in sizes.items() if name != "in all")
    assert parts == pytest.approx(float(sizes["in all"]), rel=0.05, abs=0.4)
    for line in re.findall(r"^  [CG]PU .*$", text, re.MULTILINE):
        assert re.search(r"[KMG]iB +- +- ", line), "FSDP is refused"
    assert everything(Path.cwd()) == there


def test_of_a_judge(cli: Command, preview: Command, usual: tuple[str, ...]) -> None:
    """What stands beside each other is scored, not predicted; and FSDP is refused for it, too."""
    args = ("+experiment=reward", *usual[:1], "data.max_rows=8", "data.max_val_rows=2", "trainer.precision=32-true")
    args += ("logger=none", "trainer.progress=false")
    before, run = preview(*args), cli(*args)
    assert before.code == run.code == 0, before.err + run.err
    every, trained = counted(run.err)
    assert line_of(before.out, "trained").startswith(f"{trained} of {every} ")
    assert re.search(r"[1-9]\d* completions to score$", line_of(before.out, "each pass"))
    assert "chosen then rejected" in before.out and re.search(r"CPU 32-true .*iB +- +- ", before.out)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["reward=judge"], "A judge is trained with python -m lit_ft +experiment=reward name=judge"),
        ([LETTERS, "judge=nobody@v2"], "+experiment=reward name=nobody"),
        ([f"reward={HERE}:nowhere"], "has no nowhere"),
        ([LETTERS, "algorithm.value_from=reward"], "value_from=reward needs a judge"),
        ([LETTERS, "rollout=vllm", "model.tiny=true"], "model.tiny has random ones"),
        ([LETTERS, "algorithm.ptx_coef=0.5"], "algorithm.ptx_path=FILE"),
        ([LETTERS, "algorithm.temperature=0"], "algorithm.temperature=0.0"),
        ([LETTERS, "algorithm.max_new_tokens=120"], "left for an answer"),
        ([LETTERS, "algorithm=grpo", "algorithm.num_generations=1"], "at least 2 of them"),
        ([LETTERS, "strategy=fsdp"], "use strategy=ddp"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(cli: Command, preview: Command, usual: tuple[str, ...], words: list[str], complaint: str) -> None:
    assert complaint in same_words(cli, preview, "+experiment=ppo", *usual, *words)


def test_a_damaged_judge(cli: Command, preview: Command, usual: tuple[str, ...], llama_folder: Path) -> None:
    judge = publish_judge(Path("adapters"), llama_folder)
    (judge.path / "judge.json").write_text('{"mean": 0.0, "std": 0.0}')
    assert "judge@v1" in same_words(cli, preview, "+experiment=ppo", *usual, "reward=judge")


def test_rows_with_answers_and_an_engine_of_its_own(preview: Command, usual: tuple[str, ...]) -> None:
    """Neither is asked for anything: a vLLM is not started."""
    Path("answers.jsonl").write_text(json.dumps({"prompt": "one?", "completion": "two three"}))
    ptx = ("algorithm.ptx_coef=0.5", "algorithm.ptx_path=answers.jsonl")
    shown = preview("+experiment=ppo", *usual, LETTERS, *ptx)
    assert shown.code == 0, shown.err
    assert line_of(shown.out, "ptx") == "4 rows of answers.jsonl beside each update" and "in all" in shown.out
    pytest.importorskip("vllm")
    engine = preview("+experiment=ppo", *usual, LETTERS, "rollout=vllm")
    assert engine.code == 0, engine.err
    assert "a vLLM that is started for it" in engine.out and "keys and values" not in engine.out
