"""What a run leaves about itself: its curves and what it took, also over an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from lit_ft import adapter
from lit_ft.callbacks.history import History
from tests.conftest import Outcome


def step(history: History, number: int, loss: float) -> None:
    trainer = SimpleNamespace(global_step=number, callback_metrics={"train/loss": torch.tensor(loss)})
    history.on_train_batch_end(trainer, None)


def test_a_long_run_keeps_an_even_part_of_its_steps() -> None:
    history = History()
    history.on_train_start(None, None)
    for number in range(1, 5001):
        step(history, number, float(number))
    points = history.curves["training"]
    assert 500 <= len(points) <= 1000 and points[-1] == (5000, 5000.0)
    assert {b[0] - a[0] for a, b in pairwise(points)} == {8}


def test_a_resumed_run_goes_on_counting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [100.0]
    monkeypatch.setattr("lit_ft.callbacks.history.time.monotonic", lambda: now[0])
    first, second = History(), History()
    for history in (first, second):
        history.on_train_start(None, None)
        now[0] += 2
        step(history, 1 if history is first else 2, 1.5)
        now[0] += 50  # is not counted: no step of this run ended
        if history is first:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.seconds == 4
    second.write(tmp_path, num_tokens=7, device=torch.device("cpu"))
    found = json.loads((tmp_path / "history.json").read_text())
    assert found["seconds"] == 4 and found["num_tokens"] == 7 and found["peak_bytes"] > 1 << 20
    assert found["curves"] == {"training": [[1, 1.5], [2, 1.5]], "held-out": []}


class Meter:
    """A stand-in for the machine's meters: a joule more each time it is read."""

    def __init__(self, *names: str) -> None:
        self.names, self.missing, self.joules = names, (), 0.0

    def read(self) -> float:
        self.joules += 1
        return self.joules


def test_energy_is_whole_or_not_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a run that was resumed, only if the same meters counted all of it."""
    asked: list[tuple[int, ...]] = []

    def part(before: History | None, *names: str) -> History:
        def meter(gpus: tuple[int, ...]) -> Meter:
            asked.append(gpus)
            return Meter(*names)

        monkeypatch.setattr("lit_ft.callbacks.history.EnergyMeter", meter)
        history = History(gpus=[1])
        if before is not None:
            history.load_state_dict(json.loads(json.dumps(before.state_dict())))
        history.on_train_start(None, None)
        step(history, 1, 1.0)
        step(history, 2, 1.0)
        return history

    whole = part(part(None, "a", "b"), "a", "b")
    assert (whole.joules, whole.meters) == (4, ("a", "b")) and set(asked) == {(1,)}
    assert part(part(None, "a", "b"), "a").joules is None
    assert part(part(part(None, "a"), "b"), "b").joules is None
    whole.write(tmp_path, num_tokens=7, device=torch.device("cpu"), estimated_bytes=5)
    found = json.loads((tmp_path / "history.json").read_text())
    assert (found["joules"], found["meters"], found["unmetered"], found["estimated_bytes"]) == (4, ["a", "b"], [], 5)


def test_a_run_leaves_its_curves_beside_the_adapter(cli: Callable[..., Outcome], llama_folder: Path) -> None:
    rows = [{"prompt": f"How many wheels have {k} bikes?", "completion": f"{k} bikes have {2 * k}."} for k in range(12)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = cli(
        "+experiment=sft",
        f"model.id={llama_folder}",
        "data.path=rows.jsonl",
        "data.val_split=0.25",
        "data.batch_size=3",
        "trainer.accelerator=cpu",
        "trainer.max_steps=3",
        "trainer.val_check_interval=1",
        "logger=none",
        "name=desk",
    )
    assert done.code == 0, done.err
    published = adapter.find(Path("adapters"), "desk")
    found = json.loads((published.path / "history.json").read_text())
    curves = found["curves"]
    assert [point[0] for point in curves["training"]] == [1, 2, 3]
    assert [point[0] for point in curves["held-out"]] == [0, 1, 2, 3]
    metrics = published.card.metrics
    assert curves["held-out"][0][1] == pytest.approx(metrics["before/loss"])
    assert min(loss for _, loss in curves["held-out"]) == pytest.approx(metrics["eval/loss"])
    assert found["seconds"] > 0 and found["num_tokens"] > 100
    assert found["estimated_bytes"] is None, "so short a run is not worth one"
    with safe_open(published.path / "adapter_model.safetensors", framework="pt") as weights:
        assert found["trainable"] == sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118


def test_a_long_run_keeps_its_estimate_of_memory(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_ft.wiring import publish

    monkeypatch.setattr(publish, "_LONG", 0)
    settings = ["data.max_rows=6", "data.max_val_rows=2", "trainer.max_steps=1", "logger=none", "name=desk"]
    done = cli("+experiment=sft", f"model.id={llama_folder}", "trainer.accelerator=cpu", *settings)
    assert done.code == 0, done.err
    found = json.loads((adapter.find(Path("adapters"), "desk").path / "history.json").read_text())
    # Of a process that has more in memory than a tiny model: the estimate is near what it really came to.
    assert found["estimated_bytes"] == pytest.approx(found["peak_bytes"], rel=0.5)
