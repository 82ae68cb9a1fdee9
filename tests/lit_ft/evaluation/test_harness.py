"""Tasks of lm-evaluation-harness in the report, against the harness run by itself; and what is said without it."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ft.errors import UserError
from lit_ft.evaluation import harness
from lit_ft.evaluation.harness import Tasks, add_tasks, check_tasks, measured
from lit_ft.evaluation.section import Section
from lit_ft.evaluation.subject import Kept, Subject
from tests import tiny
from tests.lit_ft.evaluation.test_subject import adapted

TOKENIZER = tiny.tokenizer()
ROWS = 24
# A group, since its rows are those of its tasks; generation, with a filter; and a metric that is no mean over rows.
FILES = {
    "wheels.yaml": """
task: tiny_wheels
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "said.yaml": """
task: tiny_said
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list: [{name: first, filter: [{function: take_first}]}]
""",
    "words.yaml": """
task: tiny_words
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "both.yaml": """
group: tiny_both
task: [tiny_wheels]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
""",
}


@pytest.fixture
def folder(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks over a file: nothing is fetched, nor are the thousands that come with the harness read each time."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    made = tmp_path / "tasks"
    made.mkdir()
    rows = [
        {"question": f"How many wheels have {k} bikes?", "choices": [f" {2 * k}", f" {k}", " none"], "label": k % 3}
        | {"answer": "x" * 3}
        for k in range(ROWS)
    ]
    (made / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {made / 'rows.jsonl'}}}}}\ntest_split: test\n"
    for name, text in FILES.items():
        (made / name).write_text(text + ("" if "group:" in text else data))
    harness._manager.cache_clear()
    return made


@pytest.fixture
def both(tmp_path: Path) -> tuple[Subject, Subject]:
    model = adapted(std=0.5)
    base = Subject("base", model, TOKENIZER, kept=Kept(tmp_path / "kept", {"weights": None}))
    return base, replace(base, name="tuned", role="default", kept=Kept(tmp_path / "kept", {"weights": "a"}))


def by_itself(model: Any, folder: Path, *tasks: str, **options: Any) -> dict[str, Any]:
    """The harness on a model that this project has not touched."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(model.eval(), tokenizer=tiny.tokenizer(), batch_size=1)
    found = simple_evaluate(
        lm, tasks=list(tasks), task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0, **options
    )
    assert found is not None
    return found


@pytest.mark.slow
def test_the_same_figures_as_the_harness_by_itself(folder: Path, both: tuple[Subject, Subject]) -> None:
    asked = Tasks(("tiny_both", "tiny_said", "tiny_words"), include_path=str(folder))
    found = {(one.task, one.metric): one for one in measured(*both, asked)}
    alone = by_itself(tiny.model(), folder, *asked.names), by_itself(adapted(std=0.5), folder, *asked.names)
    for task, metric in (("tiny_wheels", "acc"), ("tiny_both", "acc"), ("tiny_said", "exact_match")):
        key = f"{metric},{'first' if task == 'tiny_said' else 'none'}"
        change = found[task, metric if key.endswith("none") else f"{metric} (first)"].change
        assert change.before == pytest.approx(alone[0]["results"][task][key]), task
        assert change.after == pytest.approx(alone[1]["results"][task][key]), task
        assert change.rows == ROWS and change.low is not None and change.low <= change.change <= (change.high or 0)
    # The two models choose differently, or nothing would have been shown.
    wheels = [[one["acc"] for one in results["samples"]["tiny_wheels"]] for results in alone]
    assert wheels[0] != wheels[1]
    words = found["tiny_words", "word_perplexity"]
    assert words.change.after == pytest.approx(alone[1]["results"]["tiny_words"]["word_perplexity,none"], rel=1e-4)
    assert words.change.low is None and words.higher_is_better is False


def test_the_section_keeps_its_own_and_gets_the_tasks(folder: Path, both: tuple[Subject, Subject]) -> None:
    own = Section("gain", "Gain", "better", "Loss fell.")
    asked = Tasks(("tiny_wh*",), limit=5, num_fewshot=1, include_path=str(folder))
    states = random.getstate(), torch.get_rng_state().tolist()
    section = add_tasks(own, *both, asked)
    assert (random.getstate(), torch.get_rng_state().tolist()) == states
    assert (section.verdict, section.sentence, section.error) == ("better", "Loss fell.", None)
    (made,) = section.figures
    assert (made.name, made.rows) == ("lm_eval.tiny_wheels.acc", 5)
    assert section.tables[0].rows[0][:3] == ("tiny_wheels", "acc", "5")
    assert any("At most 5 rows" in note for note in section.notes)
    alone = by_itself(tiny.model(), folder, "tiny_wheels", limit=5, num_fewshot=1)
    assert made.before == pytest.approx(alone["results"]["tiny_wheels"]["acc,none"])


@pytest.mark.slow
def test_a_model_is_asked_once(folder: Path, both: tuple[Subject, Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the base answered is kept for the next adapter's report."""
    from lm_eval.models import huggingface

    asked = Tasks(("tiny_wheels",), include_path=str(folder))
    first = measured(*both, asked)
    monkeypatch.setattr(huggingface.HFLM, "_model_call", None)
    assert measured(*both, asked) == first


def test_a_task_that_fails_leaves_the_rest(folder: Path, both: tuple[Subject, Subject]) -> None:
    (folder / "rows.jsonl").unlink()
    own = Section("gain", "Gain", "better", "Loss fell.")
    section = add_tasks(own, *both, Tasks(("tiny_wheels",), include_path=str(folder)))
    assert section.verdict == "unknown" and section.sentence == "Loss fell."
    assert section.error is not None and "lm_eval.tasks=tiny_wheels could not be run on base" in section.error


def test_what_is_not_there(folder: Path) -> None:
    with pytest.raises(UserError, match=r"there is no task tiny_wheelz.*lm_eval\.include_path"):
        check_tasks(Tasks(("tiny_wheelz",), include_path=str(folder)))
    with pytest.raises(UserError, match=r"lm_eval\.include_path=.* is not a folder"):
        check_tasks(Tasks(("tiny_wheels",), include_path=str(folder / "rows.jsonl")))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'lit_ft\[lm_eval\]'"):
        check_tasks(Tasks(("arc_easy",)))


@pytest.mark.parametrize(
    ("before", "after", "old", "new", "interval"),
    [
        # Rates of yes and no, and other means, have an interval; what is no mean over the rows has none, and few have.
        ([0, 1] * 4, [1, 1] * 4, 0.5, 1.0, True),
        ([0.1, 0.3] * 4, [0.5, 0.7] * 4, 0.2, 0.6, True),
        ([0.1, 0.3] * 3, [0.5, 0.7] * 3, 0.2, 0.6, False),
        ([0.1, 0.3], [0.5, 0.7], 0.2, 0.9, False),
        ([(-3.0, 2), (-4.0, 1)], [(-3.0, 2), (-4.0, 1)], 10.3, 10.3, False),
        ([], [], 0.5, 0.75, False),
    ],
)
def test_pairing(before: list[Any], after: list[Any], old: float, new: float, interval: bool) -> None:
    change = harness._change(dict(enumerate(before)), dict(enumerate(after)), old, new)
    assert (change.before, change.after, change.rows) == (pytest.approx(old), pytest.approx(new), len(after))
    assert (change.low is not None) == interval


def test_other_rows_are_not_paired() -> None:
    """Of two data sets that a task drew differently there is nothing to pair."""
    change = harness._change({0: 1.0, 1: 0.0}, {0: 1.0, 2: 1.0}, 0.5, 1.0)
    assert change.low is None and change.change == 0.5
