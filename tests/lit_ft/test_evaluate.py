"""`python -m lit_ft.evaluate`: the report of a real, tiny run; what is refused; what is still written then."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Outcome

FEW = ("rows=6", "own_answers=2", "probed=2", "answered=2", "max_new_tokens=4")


@pytest.fixture
def evaluate(cli: Callable[..., Outcome], in_process: Callable[..., Callable[..., Outcome]]) -> Callable[..., Outcome]:
    """`python -m lit_ft.evaluate ARGS`, in the folder of `cli`."""
    from lit_ft.evaluate import main

    return in_process(main, "lit_ft/evaluate.py")


@pytest.fixture
def trained(cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path) -> Callable[..., str]:
    """Publishes an adapter of a short run on a few rows; returns its name."""
    rows = [{"prompt": f"How many wheels have {k} bikes?", "completion": f"{k} bikes have {2 * k}."} for k in range(24)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def train(name: str = "desk", *words: str) -> str:
        done = cli(
            "+experiment=sft",
            f"model.id={llama_folder}",
            "data.path=rows.jsonl",
            "data.val_split=0.25",
            "trainer.accelerator=cpu",
            "trainer.max_steps=2",
            "logger=none",
            f"name={name}",
            "start_from=none",
            *words,
        )
        assert done.code == 0, done.err
        return name

    return train


class Numbers(HTMLParser):
    """Texts of the elements that have a `data-key`, by that key."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._key: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._key = dict(attrs).get("data-key")

    def handle_data(self, data: str) -> None:
        if self._key:
            self.found[self._key] = self.found.get(self._key, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._key = None


def said(outcome: Outcome) -> str:
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome.err
    return " ".join(outcome.err.split("error: ", 1)[1].split())


def report(folder: str = "adapters/desk/v1/report") -> dict[str, Any]:
    return dict(json.loads(Path(folder, "report.json").read_text()))


def test_a_whole_report(trained: Callable[..., str], evaluate: Callable[..., Outcome]) -> None:
    trained("desk", "trainer.max_steps=30", "algorithm.learning_rate=1e-2")
    done = evaluate("adapter=desk", *FEW)
    assert done.code == 0, done.err
    assert done.out == "adapters/desk/v1/report/report.html\n"
    found = report()
    sections = found["sections"]
    assert list(sections) == ["gain", "forgetting", "overfitting", "bias", "cost"]
    assert all(section["error"] is None for section in sections.values())
    loss = sections["gain"]["figures"]["loss"]
    assert loss["after"] < loss["before"] and sections["gain"]["verdict"] == "better"
    # The held-out loss that training itself published, of the same six rows.
    card = json.loads(Path("adapters/desk/v1/card.json").read_text())
    assert loss["after"] == pytest.approx(card["metrics"]["eval/loss"], abs=2e-3)
    shown = Numbers(Path(done.out.strip()).read_text()).found
    assert float(shown["gain.loss.after"].replace(",", "")) == pytest.approx(loss["after"], abs=1e-2)
    assert shown["gain.verdict"] == "better"


def test_the_report_at_the_end_of_training(trained: Callable[..., str]) -> None:
    """With what the run itself has measured: its curves, time and tokens."""
    trained("desk", "evaluate=true", "trainer.max_steps=4", "trainer.val_check_interval=1", "data.batch_size=4")
    sections = report()["sections"]
    assert all(section["error"] is None for section in sections.values())
    history = json.loads(Path("adapters/desk/v1/history.json").read_text())
    figures = sections["cost"]["figures"]
    assert figures["tokens"]["after"] == history["num_tokens"] > 0
    assert figures["seconds"]["after"] == pytest.approx(history["seconds"])
    assert figures["peak_memory"]["after"] == pytest.approx(history["peak_bytes"] / 2**20)
    (curve,) = sections["overfitting"]["curves"]
    assert [step for step, _ in curve["lines"]["held-out"]] == [0, 1, 2, 3, 4]
    last = sections["overfitting"]["figures"]["last_over_best"]
    losses = [loss for _, loss in history["curves"]["held-out"]]
    assert last["before"] == pytest.approx(min(losses)) and last["after"] == pytest.approx(losses[-1])


@pytest.mark.parametrize(
    ("words", "why"),
    [(["+experiment=reward"], "a judge answers nothing"), (["+experiment=sft", "model.tiny=true"], "random weights")],
)
def test_no_report_at_the_end_of(words: list[str], why: str, cli: Callable[..., Outcome]) -> None:
    done = cli(*words, "evaluate=true")
    assert done.code == 2 and why in said(done)
    assert not Path("adapters").exists() and not list(Path("runs").glob("*/*"))


def test_a_damaged_history_is_left_out(trained: Callable[..., str], evaluate: Callable[..., Outcome]) -> None:
    trained()
    for text in ("", "[1]", '{"seconds"'):
        Path("adapters/desk/v1/history.json").write_text(text)
        assert evaluate("adapter=desk", "sections=[cost]", *FEW).code == 0
        assert "seconds" not in report()["sections"]["cost"]["figures"]


def test_an_adapter_against_itself(trained: Callable[..., str], evaluate: Callable[..., Outcome]) -> None:
    trained()
    done = evaluate("adapter=desk@v1", "against=adapters/desk/v1", "sections=[gain,forgetting,bias]", *FEW)
    assert done.code == 0, done.err
    for key, section in report()["sections"].items():
        assert section["verdict"] == "unchanged", key
        for name, figure in section["figures"].items():
            if figure["low"] is not None:
                assert figure["change"] == pytest.approx(0, abs=1e-5), name
                assert figure["low"] <= 1e-5 and figure["high"] >= -1e-5, name


def test_a_gate(trained: Callable[..., str], evaluate: Callable[..., Outcome]) -> None:
    trained()
    done = evaluate("adapter=desk", "sections=[gain]", 'fail_if="gain.loss.after>0"', *FEW)
    assert done.code == 3 and "fail_if" in done.err
    assert done.out and report()["sections"]["gain"]["error"] is None
    assert evaluate("adapter=desk", "sections=[cost]", "fail_if=cost=unchanged", *FEW).code == 3
    assert evaluate("adapter=desk", "sections=[gain]", "fail_if=gain.loss.after<0", *FEW).code == 0


def test_what_cannot_be_made_is_said_and_the_rest_is_written(
    trained: Callable[..., str], evaluate: Callable[..., Outcome]
) -> None:
    trained()
    Path("pairs.csv").write_text("a,b\n1,2\n")
    done = evaluate("adapter=desk", "sections=[gain,bias,cost]", "pairs=pairs.csv", *FEW)
    assert "1 of 3 sections could not be made" in said(done) and "sent_more" in said(done)
    sections = report()["sections"]
    assert sections["bias"]["verdict"] == "unknown" and "sent_more" in sections["bias"]["error"]
    assert sections["gain"]["error"] is None and sections["cost"]["error"] is None
    assert "sent_more" in Path("adapters/desk/v1/report/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "adapter=FOLDER"),
        (("adapter=nobody",), "nobody"),
        (("adapter=desk", "sections=[gian]"), "no such section"),
        (("adapter=desk", "fail_if=gain=gone"), "gone"),
        (("adapter=desk", "sections=[gain]", "fail_if=bias=worse"), "needs the section bias"),
        (("adapter=desk", "metric=nowhere:nothing"), "cannot be imported"),
        (("adapter=desk", "rows=0"), "rows=0 must be at least 1"),
    ],
)
def test_refused_before_anything_is_measured(
    trained: Callable[..., str], evaluate: Callable[..., Outcome], words: tuple[str, ...], complaint: str
) -> None:
    trained()
    assert complaint in said(evaluate(*words))
    assert not Path("adapters/desk/v1/report").exists()


def test_bf16_says_the_same_to_its_rounding(trained: Callable[..., str], evaluate: Callable[..., Outcome]) -> None:
    trained("desk", "trainer.max_steps=30", "algorithm.learning_rate=1e-2")
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        assert evaluate("adapter=desk", "sections=[gain,forgetting]", f"precision={precision}", *FEW).code == 0
        found[precision] = report()
        assert found[precision]["versions"]["arithmetic"] == precision
    for key in ("gain", "forgetting"):
        exact, rounded = (one["sections"][key] for one in found.values())
        assert exact["verdict"] == rounded["verdict"]
        for name in ("loss", "text_loss", "instruction_loss", "kl"):
            if name in exact["figures"]:
                # Eight bits of mantissa: 2^-9 of a loss of some 5 nats.
                assert rounded["figures"][name]["change"] == pytest.approx(exact["figures"][name]["change"], abs=0.02)


def test_another_precision_is_refused(trained: Callable[..., str], evaluate: Callable[..., Outcome]) -> None:
    trained()
    assert "bf16-true" in said(evaluate("adapter=desk", "precision=bf16-true", *FEW))


def test_tasks_of_a_harness_that_is_not_there(
    trained: Callable[..., str], evaluate: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'lit_ft[lm_eval]'" in said(evaluate("adapter=desk", "lm_eval.tasks=[arc_easy]", *FEW))
    without = evaluate("adapter=desk", "sections=[cost]", "lm_eval.tasks=[arc_easy]", *FEW)
    assert "section gain" in said(without)
    assert "must be at least 1" in said(evaluate("adapter=desk", "lm_eval.tasks=[arc_easy]", "lm_eval.limit=0", *FEW))
    assert not Path("adapters/desk/v1/report").exists()
