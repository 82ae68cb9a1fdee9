"""`python -m lit_ft.evaluate`: the report of a real, tiny run; what is refused; what is still written then."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lit_ft.evaluation.gate import FIGURES
from tests import tiny
from tests.conftest import Outcome

FEW = ("rows=8", "own_answers=2", "probed=2", "answered=2", "max_new_tokens=4")
# The same for a report at the end of training.
FEW_AFTER = tuple(f"+evaluate.{word}" for word in FEW)


@pytest.fixture
def evaluate(cli: Callable[..., Outcome], in_process: Callable[..., Callable[..., Outcome]]) -> Callable[..., Outcome]:
    """`python -m lit_ft.evaluate ARGS`, in the folder of `cli`."""
    from lit_ft.evaluate import main

    return in_process(main, "lit_ft/evaluate.py")


@pytest.fixture
def training(cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path) -> Callable[..., Outcome]:
    """A short run on a few rows, of which eight are held out."""
    rows = [{"prompt": f"How many wheels have {k} bikes?", "completion": f"{k} bikes have {2 * k}."} for k in range(32)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def train(name: str, *words: str) -> Outcome:
        return cli(
            *(word for word in words if word == "-m"),  # before all others
            "+experiment=sft",
            f"model.id={llama_folder}",
            "data.path=rows.jsonl",
            "data.val_split=0.25",
            "trainer.accelerator=cpu",
            "trainer.max_steps=2",
            "logger=none",
            f"name={name}",
            "start_from=none",
            *(word for word in words if word != "-m"),
        )

    return train


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, ...], Path]:
    """What such runs published, by their words: each is run once, and its adapter copied for whoever asks again."""
    return {}


@pytest.fixture
def trained(
    training: Callable[..., Outcome], runs: dict[tuple[str, ...], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """Publishes an adapter of such a run; returns its name."""

    def train(name: str = "desk", *words: str) -> str:
        published = Path("adapters", name)
        anew = published.exists()  # it will be the next version
        if not anew and (name, *words) in runs:
            shutil.copytree(runs[name, *words], published)
            return name
        done = training(name, *words)
        assert done.code == 0, done.err
        if not anew:
            kept = tmp_path_factory.mktemp("published") / name
            shutil.copytree(published, kept)
            runs[name, *words] = kept
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
    # The held-out loss that training itself published, of the same eight rows.
    card = json.loads(Path("adapters/desk/v1/card.json").read_text())
    assert loss["after"] == pytest.approx(card["metrics"]["eval/loss"], abs=2e-3)
    shown = Numbers(Path(done.out.strip()).read_text()).found
    assert float(shown["gain.loss.after"].replace(",", "")) == pytest.approx(loss["after"], abs=1e-2)
    assert shown["gain.verdict"] == "better"
    # A gate could name any of these.
    assert all(set(section["figures"]) <= set(FIGURES[key]) for key, section in sections.items())
    assert sections["cost"]["verdict"] == "unjudged"


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


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("+evaluate.fail_if=gain.loss.after>0", "+evaluate.sections=[gain]"), 3),
        (("evaluate={fail_if: gain.loss.after>0, sections: [gain]}",), 3),
        (("evaluate={sections: [gain,cost], fail_if: gain.loss.after<0}",), 0),
        (("evaluate={sections: [gain], fail_if: ['gain.loss.after<0', 'gain.loss.rows<=8']}",), 3),
    ],
)
def test_the_gate_of_a_run(training: Callable[..., Outcome], words: tuple[str, ...], code: int) -> None:
    """Once the adapter is there, and its path is printed."""
    done = training("desk", *words, *FEW_AFTER)
    assert done.code == code, done.err
    assert done.out == "adapters/desk/v1\n"
    assert report()["sections"]["gain"]["error"] is None
    assert ("fail_if    gain.loss." in done.err) == (code == 3)


def test_what_a_run_is_compared_with_is_found_before_it(training: Callable[..., Outcome]) -> None:
    """Afterwards the newest of that name would be its own adapter."""
    assert training("desk").code == 0
    done = training("desk", "evaluate={against: desk, sections: [gain]}", *FEW_AFTER)
    assert done.code == 0, done.err
    found = report("adapters/desk/v2/report")
    assert (found["adapter"], found["against"]) == ("desk@v2", "desk@v1")


def test_a_section_that_fails_after_a_run(training: Callable[..., Outcome]) -> None:
    Path("empty.jsonl").touch()
    done = training("desk", "evaluate={texts: empty.jsonl, sections: [forgetting,cost]}", *FEW_AFTER)
    assert "1 of 2 sections could not be made" in said(done) and "texts=empty.jsonl holds no rows" in said(done)
    assert done.out == "adapters/desk/v1\n"
    assert report()["sections"]["cost"]["error"] is None


@pytest.mark.slow
def test_the_gate_of_a_sweep_s_run(training: Callable[..., Outcome]) -> None:
    """The run counts as failed, so that it is not the best; its adapter is there."""
    done = training("desk", "-m", "+evaluate.fail_if=gain.loss.after>0", "+evaluate.sections=[gain]", *FEW_AFTER)
    assert done.code == 2 and "evaluate.fail_if holds" in done.err
    assert report()["sections"]["gain"]["error"] is None


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("evaluate=perhaps",), "neither true nor false nor settings"),
        (("+evaluate.fial_if=gain=worse",), "fial_if"),
        (("evaluate={rows: many}",), "many"),
        (("evaluate={rows: 0}",), "rows=0 must be at least 1"),
        (("evaluate={fail_if: gain=gone}",), "'gone'"),
        (("evaluate={fail_if: gain.los.change>0}",), "gain can have loss,"),
        (("+evaluate.fail_if=gain.metric.after<1",), "there is no metric="),
        (("+evaluate.fail_if=bias=worse", "+evaluate.sections=[gain]"), "needs the section bias"),
        (("+evaluate.adapter=desk",), "evaluate.adapter is the run's own"),
        (("+evaluate.against=nobody",), "nobody"),
        (("+evaluate.metric=nowhere:nothing",), "cannot be imported"),
        (("+evaluate.texts=nowhere.jsonl",), "evaluate.texts=nowhere.jsonl: there is no such file"),
        (("+evaluate.precision=bf16-true",), "precision=bf16-true is not offered"),
    ],
)
def test_refused_before_training(training: Callable[..., Outcome], words: tuple[str, ...], complaint: str) -> None:
    done = training("desk", *words)
    assert complaint in said(done)
    assert not Path("adapters").exists() and not list(Path("runs").glob("*/*"))


def test_a_damaged_history_is_left_out(trained: Callable[..., str], evaluate: Callable[..., Outcome]) -> None:
    trained()
    for text in ("", "[1]", '{"seconds"'):
        Path("adapters/desk/v1/history.json").write_text(text)
        assert evaluate("adapter=desk", "sections=[cost]", *FEW).code == 0
        assert "seconds" not in report()["sections"]["cost"]["figures"]


@pytest.mark.parametrize("curves", [[1], {"held-out": [1, 2]}, {"held-out": [["a", 1.0]]}, "none", {"training": 5}])
def test_damaged_curves_are_said_and_left_out(
    curves: Any, trained: Callable[..., str], evaluate: Callable[..., Outcome]
) -> None:
    trained()
    path = Path("adapters/desk/v1/history.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "curves": curves}))
    done = evaluate("adapter=desk", "sections=[overfitting]", *FEW)
    assert done.code == 0 and "Traceback" not in done.err, done.err
    section = report()["sections"]["overfitting"]
    assert section["error"] is None and section["curves"] == [] and "gap" in section["figures"]
    assert "history.json are damaged" in done.err
    assert "history.json are damaged" in Path("adapters/desk/v1/report/report.html").read_text()


def test_rows_that_have_changed_since(trained: Callable[..., str], evaluate: Callable[..., Outcome]) -> None:
    """The file is another today: what is held out of it now may have been trained on, and nothing else is known."""
    trained()
    assert evaluate("adapter=desk", "sections=[gain,overfitting]", *FEW).code == 0
    assert "trained on" not in Path("adapters/desk/v1/report/report.html").read_text()
    rows = Path("rows.jsonl").read_text().splitlines()
    Path("rows.jsonl").write_text("\n".join([json.dumps({"prompt": "New?", "completion": "Yes."}), *rows]))
    done = evaluate("adapter=desk", "sections=[gain,overfitting,cost]", *FEW)
    assert "rows.jsonl is not what desk@v1 was trained on, or has changed since" in said(done)
    assert "warning    rows.jsonl is not what desk@v1 was trained on" in done.err
    sections = report()["sections"]
    assert "has changed since" in sections["overfitting"]["error"] and sections["overfitting"]["figures"] == {}
    assert sections["gain"]["error"] is None and sections["cost"]["error"] is None
    page = Path("adapters/desk/v1/report/report.html").read_text()
    assert "Rows that are held out here may have been trained on." in page
    # Rows of their own are no danger to what is gained.
    Path("new.jsonl").write_text("\n".join(rows[:4]))
    again = evaluate("adapter=desk", "sections=[gain]", "data.val_path=new.jsonl", *FEW)
    assert again.code == 0
    assert "may have been trained on" not in Path("adapters/desk/v1/report/report.html").read_text()


def test_the_same_rows_under_another_name(trained: Callable[..., str], evaluate: Callable[..., Outcome]) -> None:
    """They are divided as in training, so that the held-out loss is that of the card."""
    trained()
    Path("rows.jsonl").rename("moved.jsonl")
    assert evaluate("adapter=desk", "sections=[gain,overfitting]", "data.path=moved.jsonl", *FEW).code == 0
    card = json.loads(Path("adapters/desk/v1/card.json").read_text())
    loss = report()["sections"]["gain"]["figures"]["loss"]
    assert (loss["after"], loss["rows"]) == (pytest.approx(card["metrics"]["eval/loss"], abs=2e-3), 8)


def test_rows_divided_otherwise_than_in_training(trained: Callable[..., str], evaluate: Callable[..., Outcome]) -> None:
    trained()
    config = Path("adapters/desk/v1/config.yaml")
    config.write_text(config.read_text().replace("val_split: 0.25", "val_split: 0.5"))
    done = evaluate("adapter=desk", "sections=[overfitting]", *FEW)
    assert "16 rows would be trained on today, and desk@v1 was trained on 24" in said(done)


def test_a_file_of_the_folder_that_was_trained_on_is_known(
    trained: Callable[..., str], evaluate: Callable[..., Outcome]
) -> None:
    """Beside it lay the rows that were held out, so that all of its own were trained on; alone it would be divided."""
    rows = [{"prompt": f"How many legs have {k} cows?", "completion": f"{k} cows have {4 * k}."} for k in range(24)]
    Path("desk").mkdir()
    for name, part in (("train", rows[:16]), ("heldout", rows[16:])):
        Path("desk", f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    trained("desk", "data.path=desk", "data.max_rows=12")
    given = ("data.path=desk/train.jsonl", "data.val_path=desk/heldout.jsonl", "sections=[gain,overfitting]")
    few = [word for word in FEW if not word.startswith("rows=")]
    done = evaluate("adapter=desk", *given, "rows=40", *few)
    assert done.code == 0, done.err
    figures = report()["sections"]["overfitting"]["figures"]
    assert (figures["train_loss"]["rows"], figures["held_out_loss"]["rows"]) == (12, 8)
    assert "would be trained on today" not in done.err


def test_other_held_out_rows_are_no_reason_to_call_those_of_training_trained_on(
    trained: Callable[..., str], evaluate: Callable[..., Outcome]
) -> None:
    trained()
    rows = [{"prompt": f"And {k} cars?", "completion": f"{k} cars have {4 * k}."} for k in range(9)]
    Path("cars.jsonl").write_text("\n".join(map(json.dumps, rows)))
    few = [word for word in FEW if not word.startswith("rows=")]
    done = evaluate("adapter=desk", "sections=[overfitting]", "data.val_path=cars.jsonl", "rows=40", *few)
    assert done.code == 0, done.err
    figures = report()["sections"]["overfitting"]["figures"]
    assert (figures["train_loss"]["rows"], figures["held_out_loss"]["rows"]) == (24, 9)


def test_a_defect_of_one_section_loses_no_other(
    trained: Callable[..., str], evaluate: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("by nought")

    trained()
    monkeypatch.setattr("lit_ft.evaluation.compare.bias", broken)
    done = evaluate("adapter=desk", "sections=[gain,bias,cost]", *FEW)
    assert done.code == 2 and "Traceback" in done.err and "raise ZeroDivisionError" in done.err
    sections = report()["sections"]
    assert "ZeroDivisionError: by nought" in sections["bias"]["error"] and sections["bias"]["verdict"] == "unknown"
    assert sections["gain"]["error"] is None and sections["cost"]["error"] is None
    assert "ZeroDivisionError: by nought" in Path("adapters/desk/v1/report/report.html").read_text()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    Path("adapters/desk/v1/report/report.html").unlink()
    monkeypatch.setattr("lit_ft.evaluation.compare.bias", interrupted)
    assert evaluate("adapter=desk", "sections=[gain,bias,cost]", *FEW).code == 130
    assert not Path("adapters/desk/v1/report/report.html").exists()


def test_what_was_trained_is_counted_and_not_what_is_published(
    trained: Callable[..., str], evaluate: Callable[..., Outcome]
) -> None:
    """PiSSA of rank 4 is published as LoRA of rank 8; without the run's own count the files are all there is."""
    trained("desk", "peft=pissa", "peft.r=4")
    path = Path("adapters/desk/v1/history.json")
    history = json.loads(path.read_text())

    def counted() -> int:
        assert evaluate("adapter=desk", "sections=[cost]", *FEW).code == 0
        return int(report()["sections"]["cost"]["figures"]["trainable"]["after"])

    assert counted() == history["trainable"] > 0
    path.write_text(json.dumps({key: value for key, value in history.items() if key != "trainable"}))
    assert counted() == 2 * history["trainable"]


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
    assert evaluate("adapter=desk", "sections=[cost]", "fail_if=cost.tokens.after>0", *FEW).code == 3
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
        (("adapter=desk", "metric_rows=0"), "metric_rows=0 must be at least 1"),
        (("adapter=desk", "kl_threshold=-1"), "kl_threshold=-1.0 must be a number from 0 on"),
        (("adapter=desk", "fail_if=gain.los.change>0"), "gain can have loss,"),
        (("adapter=desk", "fail_if=gain.metric.after<1"), "there is no metric="),
        (("adapter=desk", "fail_if=gain.lm_eval.arc.acc.after<1"), "there are no lm_eval.tasks"),
        (("adapter=desk", "own_answers=0", "fail_if=forgetting.kl.after>1"), "own_answers=0"),
        (("adapter=desk", "probed=0", "fail_if=overfitting.memorised_train.after>1"), "probed=0"),
        (("adapter=desk", "fail_if=cost=worse"), "cost, which is not judged"),
    ],
)
def test_refused_before_anything_is_measured(
    trained: Callable[..., str], evaluate: Callable[..., Outcome], words: tuple[str, ...], complaint: str
) -> None:
    trained()
    assert complaint in said(evaluate(*words))
    assert not Path("adapters/desk/v1/report").exists()


@pytest.mark.slow
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


@pytest.fixture
def other_base(tmp_path: Path) -> Path:
    return tiny.folder(tmp_path / "other-llama", "qwen2")


def test_another_base(
    trained: Callable[..., str], training: Callable[..., Outcome], evaluate: Callable[..., Outcome], other_base: Path
) -> None:
    trained()
    trained("legal", f"model.id={other_base}")
    wrong = said(evaluate("adapter=desk", f"model={other_base}", *FEW))
    assert "was trained on" in wrong and "model=FOLDER" in wrong
    assert "made for different bases: give two of one base" in said(evaluate("adapter=desk", "against=legal", *FEW))
    assert not Path("adapters/desk/v1/report").exists()
    # Before a run that would be compared with it, too.
    assert "legal@v1 was trained on" in said(training("desk", "+evaluate.against=legal"))
    assert not Path("adapters/desk/v2").exists()


def test_a_metric_of_one_s_own(
    trained: Callable[..., str], evaluate: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What raises costs the verdict, and neither the loss nor the other sections."""
    trained()
    monkeypatch.syspath_prepend(Path.cwd())
    Path("marks_of_a_test.py").write_text(
        "def good(prompt, answer, row):\n    return len(row['wanted'])\n"
        "def bad(prompt, answer, row):\n    return row['label']\n"
    )
    done = evaluate("adapter=desk", "sections=[gain,cost]", "metric=marks_of_a_test:bad", *FEW)
    assert "1 of 2 sections could not be made, or not wholly" in said(done)
    assert "The metric bad raised KeyError: 'label' for held-out row 1" in said(done)
    gain, cost = report()["sections"].values()
    assert gain["figures"]["loss"]["rows"] == 8 and len(gain["samples"]) == 2 and "KeyError" in gain["error"]
    assert cost["error"] is None
    assert "Not all of this section could be made" in Path("adapters/desk/v1/report/report.html").read_text()
    done = evaluate(
        "adapter=desk", "sections=[gain]", "metric=marks_of_a_test:good", "metric_rows=7", *FEW, "answered=0"
    )
    assert done.code == 0, done.err
    gain = report()["sections"]["gain"]
    assert gain["figures"]["metric"]["rows"] == 7 and gain["samples"] == []


GOOD = [{"prompt": f"Say {k}.", "completion": f"{k}!"} for k in range(20)]


@pytest.mark.parametrize(
    ("setting", "rows", "why"),
    [
        ("texts", "", "holds no rows. Give a JSON object in each line, with text"),
        ("texts", "no json", "line 1 is no JSON"),
        ("texts", "[1]", "line 1 is no JSON object"),
        ("texts", '\n{"words": "a"}', "line 2 lacks text as a text; it has words"),
        ("instructions", "", "holds no rows. Give a JSON object in each line, with prompt and completion"),
        ("instructions", '{"prompt": "a", "answer": "b"}', "line 1 lacks completion as a text; it has prompt, answer"),
        ("instructions", '{"prompt": "", "completion": "b"}', "1 of 1 rows cannot be used (1 empty prompt)"),
        (
            "instructions",
            json.dumps({"prompt": "a" * 3000, "completion": "b"}),
            "1 of 1 rows cannot be used (1 with a prompt of 1024 tokens or more)",
        ),
    ],
)
def test_bad_files_for_forgetting(
    trained: Callable[..., str], evaluate: Callable[..., Outcome], setting: str, rows: str, why: str
) -> None:
    trained()
    Path("given.jsonl").write_text(rows)
    done = evaluate("adapter=desk", "sections=[forgetting,cost]", f"{setting}=given.jsonl", *FEW)
    assert f"{setting}=given.jsonl" in said(done) and why in said(done)
    # Those are settings of training, and not of this command.
    assert not any(name in said(done) for name in ("data.max_length", "data.overflow", "data.max_dropped"))
    sections = report()["sections"]
    assert sections["forgetting"]["verdict"] == "unknown" and sections["cost"]["error"] is None


def test_a_few_bad_instructions_are_left_out_and_said(
    trained: Callable[..., str], evaluate: Callable[..., Outcome]
) -> None:
    """Long answers are cut."""
    trained()
    rows = [*GOOD, {"prompt": " ", "completion": "b"}, {"prompt": "Long?", "completion": "b" * 3000}]
    Path("given.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = evaluate("adapter=desk", "sections=[forgetting]", "instructions=given.jsonl", *FEW)
    assert done.code == 0, done.err
    section = report()["sections"]["forgetting"]
    assert section["figures"]["instruction_loss"]["rows"] == 21
    assert section["warnings"] == [
        "1 of 22 rows of instructions=given.jsonl could not be used and were left out (1 empty prompt)."
    ]


def test_data_with_other_columns(trained: Callable[..., str], evaluate: Callable[..., Outcome]) -> None:
    trained()
    rows = [{"question": f"How many wheels have {k} bikes?", "reply": f"{k} have {2 * k}."} for k in range(40)]
    Path("other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ("sections=[gain,cost]", "data.path=other.jsonl")
    wrong = said(evaluate("adapter=desk", *given, *FEW))
    assert "the keys question, reply" in wrong and "data.columns" in wrong
    sections = report()["sections"]
    assert sections["gain"]["verdict"] == "unknown" and sections["cost"]["error"] is None
    done = evaluate("adapter=desk", *given, "data.columns={prompt: question, completion: reply}", *FEW)
    assert done.code == 0, done.err
    Path("empty.jsonl").touch()
    assert "empty.jsonl holds no rows" in said(
        evaluate("adapter=desk", "sections=[gain,cost]", "data.path=empty.jsonl", *FEW)
    )


def test_the_kl_is_judged_by_its_own_threshold(trained: Callable[..., str], evaluate: Callable[..., Outcome]) -> None:
    trained("desk", "trainer.max_steps=30", "algorithm.learning_rate=1e-2")
    few = (*FEW[:1], "own_answers=12", *FEW[2:])
    given = ("adapter=desk", "sections=[forgetting]", *few)
    assert evaluate(*given).code == 0
    found = report()["sections"]["forgetting"]
    assert found["figures"]["kl"]["low"] > 0 and "far from the base above 0.5" in found["sentence"]
    assert evaluate(*given, "kl_threshold=null").code == 0
    assert "shown and not judged" in report()["sections"]["forgetting"]["sentence"]
    assert evaluate(*given, "kl_threshold=0", "fail_if=forgetting=worse").code == 3
    assert evaluate(*given, "kl_threshold=null", "fail_if=forgetting.kl.after>0").code == 3
