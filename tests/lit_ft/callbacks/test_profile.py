"""The profile of training steps: time is attributed once and adds up, and a run says what it found."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_ft.batches import Completion, Example
from lit_ft.callbacks import profile
from lit_ft.callbacks.profile import (
    ATTENTION,
    BETWEEN,
    COPIES,
    ELEMENTWISE,
    MATRIX,
    MEMORY,
    OPTIMIZER,
    REST,
    ROWS,
    VOCABULARY,
    Event,
    ProfileSteps,
    attribute,
)
from lit_ft.data.datamodule import ExamplesDataModule
from lit_ft.losses.logprobs import PROFILED
from lit_ft.models.kinds.lora import apply_lora
from lit_ft.models.score import use_packed_attention
from lit_ft.modules import SFTModule
from lit_ft.resources.flops import computed_tokens, step_flops
from lit_ft.resources.machine import matrix_rate
from tests import tiny

# Attribution of made-up events.


def rows(**found: float) -> dict[str, float]:
    names = {
        "matrix": MATRIX,
        "attention": ATTENTION,
        "vocabulary": VOCABULARY,
        "elementwise": ELEMENTWISE,
        "copies": COPIES,
        "memory": MEMORY,
        "optimizer": OPTIMIZER,
        "rest": REST,
    }
    return {**dict.fromkeys(ROWS, 0.0), **{names[key]: value for key, value in found.items()}}


def test_an_instant_belongs_to_the_innermost_operation() -> None:
    """linear 10-40 around addmm 15-30 (with a copy 20-25), then silu 50-60, in a step of 100."""
    events = [
        Event("lit_ft: step", 1, 0, 100),
        Event("aten::linear", 1, 10, 40),
        Event("aten::t", 1, 10, 12),
        Event("aten::addmm", 1, 15, 30),
        Event("aten::copy_", 1, 20, 25),
        Event("aten::silu", 1, 50, 60),
    ]
    wanted = rows(matrix=23, copies=5, elementwise=10, rest=62)
    assert attribute(events, [(0, 100)], thread=1, on_gpu=False) == wanted
    assert attribute(events[::-1], [(0, 100)], thread=1, on_gpu=False) == wanted


def test_what_runs_inside_a_whole_belongs_to_it() -> None:
    events = [
        Event("lit_ft: step", 1, 0, 100),
        Event(PROFILED, 1, 0, 30),
        Event("aten::mm", 1, 5, 25),
        Event("autograd::engine::evaluate_function: ScaledDotProductAttentionBackward0", 1, 40, 60),
        Event("aten::bmm", 1, 42, 52),
        Event("Optimizer.step#AdamW.step", 1, 70, 95),
        Event("aten::_foreach_add_", 1, 75, 80),
    ]
    wanted = rows(vocabulary=30, attention=20, optimizer=25, rest=25)
    assert attribute(events, [(0, 100)], thread=1, on_gpu=False) == wanted


def test_only_steps_count() -> None:
    """Two steps with a product across the first's end, and one between them; times in sum."""
    events = [Event("aten::mm", 1, 5, 15), Event("aten::add", 1, 16, 18), Event("aten::mul", 1, 22, 28)]
    steps = [(0.0, 10.0), (20.0, 30.0)]
    assert attribute(events, steps, thread=1, on_gpu=False) == rows(matrix=5, elementwise=6, rest=9)
    assert attribute([], steps, thread=1, on_gpu=False) == rows(rest=20)
    across = [Event("aten::mm", 1, -5, 35)]
    assert attribute(across, steps, thread=1, on_gpu=False) == rows(matrix=20)


def test_another_thread_counts_while_the_first_only_waits() -> None:
    """The backward pass may run in a thread of its own: 20-60 there, of which the first one computes in 30-40."""
    events = [
        Event("lit_ft: step", 1, 0, 100),
        Event("aten::mm", 1, 30, 40),
        Event("aten::add", 2, 20, 60),
        Event("aten::copy_", 3, 50, 70),
    ]
    wanted = rows(matrix=10, elementwise=30, copies=10, rest=50)
    assert attribute(events, [(0, 100)], thread=1, on_gpu=False) == wanted


def test_on_a_gpu_kernels_count() -> None:
    """By the operation that launched them; those of compiled code by their names; and rest is when none ran."""
    events = [
        Event("lit_ft: step", 1, 0, 100),
        Event("aten::mm", 1, 0, 2, (("nvjet_tst", 30.0),)),
        Event(PROFILED, 1, 3, 9),
        Event("aten::mm", 1, 4, 5, (("nvjet_tst", 10.0), ("splitKreduce", 1.0))),
        Event("CompiledFunctionBackward", 2, 10, 20, (("triton_poi_fused_add", 4.0), ("cutlass_gemm", 5.0))),
        Event("aten::copy_", 1, 150, 160, (("Memcpy DtoH", 10.0),)),
    ]
    wanted = rows(matrix=35, vocabulary=11, elementwise=4, rest=50)
    assert attribute(events, [(0, 100)], thread=1, on_gpu=True) == wanted
    # Two streams side by side: 50 µs of kernels in a step of 40 are scaled to it.
    side_by_side = attribute(events, [(0, 40)], thread=1, on_gpu=True)
    assert side_by_side == pytest.approx(rows(matrix=28, vocabulary=8.8, elementwise=3.2))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("aten::_scaled_mm", MATRIX),
        ("mkldnn::_linear_pointwise", MATRIX),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("flash_attn::_flash_attn_varlen_forward", ATTENTION),
        ("aten::_to_copy", COPIES),
        ("aten::index_select", COPIES),
        ("aten::embedding_dense_backward", COPIES),
        ("aten::zero_", MEMORY),
        ("aten::empty_strided", MEMORY),
        ("aten::silu_backward", ELEMENTWISE),
        ("aten::mul_", ELEMENTWISE),
        ("aten::logsumexp", ELEMENTWISE),
        ("lit_ft::rms_norm", ELEMENTWISE),
        ("aten::transpose", REST),
        ("MmBackward0", REST),
        ("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", REST),
        ("torch::autograd::AccumulateGrad", REST),
    ],
)
def test_row_of_an_operation(name: str, row: str) -> None:
    assert attribute([Event(name, 1, 0, 1)], [(0, 1)], thread=1, on_gpu=False)[row] == 1


# A real run.


def answer(k: int) -> Example:
    return Example((5 + k,) * 20, (Completion((9,) * 30, (True,) * 30),), index=k)


class Clocked(SFTModule):
    """Counts the seconds in its own training step."""

    seconds: tuple[float, ...] = ()

    def training_step(self, window: Any, number: int) -> None:
        start = time.perf_counter()
        super().training_step(window, number)
        self.seconds += (time.perf_counter() - start,)


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """A small product instead of a large one, tried for a moment instead of half a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "_CPU_PRODUCT", (64, 64, 64))
        patch.setattr(profile, "matrix_rate", lambda *given, seconds=0.0: matrix_rate(*given, seconds=0.01))
        yield


def run(callback: ProfileSteps, steps: int, *, validate: bool = False, layout: Any = "packed") -> Clocked:
    torch.manual_seed(0)
    model = apply_lora(tiny.model(), r=4)
    if layout == "packed":
        assert use_packed_attention(model) is None
    module = Clocked(model)
    held_out = [answer(k) for k in range(2)] if validate else None
    data = ExamplesDataModule([answer(k) for k in range(24)], held_out, batch_size=4, layout=layout, pad_id=3)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=2 if validate else None,
        callbacks=[callback],
    )
    trainer.fit(module, data)
    return module


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_profile_adds_up(tmp_path: Path, capfd: pytest.CaptureFixture[str], layout: Any) -> None:
    callback = ProfileSteps(tmp_path / "new", skip=1, steps=2)
    module = run(callback, 4, layout=layout)
    report = callback.report
    assert report is not None
    assert (report.first, report.steps) == (2, 2)
    assert sum(report.rows.values()) == pytest.approx(report.wall, rel=1e-6)
    # Without what lies between steps it is the time in the training step, and the hooks around it.
    inside, measured = report.wall - report.rows[BETWEEN], sum(module.seconds[1:3]) / 2
    assert 0.98 * measured <= inside <= measured + 0.1
    for row in (MATRIX, ATTENTION, VOCABULARY, ELEMENTWISE, COPIES, MEMORY, OPTIMIZER, BETWEEN, REST):
        assert report.rows[row] > 0, row
    # Windows of 4 examples of 50 tokens, all alike.
    assert (report.tokens, report.computed) == (200, 200)
    window = next(iter(module.trainer.train_dataloader))
    assert report.flops == sum(step_flops(module.model, batch) for batch in window.batches)
    assert report.computed == sum(computed_tokens(batch) for batch in window.batches)
    assert report.dtype == torch.float32
    assert report.product_rate is not None and report.product_rate > 0
    assert report.peak_memory > 2**20

    text = (tmp_path / "new" / "profile.txt").read_text(encoding="utf-8")
    assert all(row in text for row in ROWS)
    assert "steps 2 to 3" in text and "200 per step" in text and "GFLOP/s" in text
    table = [line for line in text.splitlines() if line.endswith("%")]
    assert len({len(line) for line in table}) == 1, "columns do not align"
    shares = [float(line.split()[-1].rstrip("%")) for line in table]
    assert sum(shares[:-1]) == pytest.approx(shares[-1], abs=1.0)
    trace = json.loads(gzip.decompress((tmp_path / "new" / "trace.json.gz").read_bytes()))
    assert any(event.get("name") == "lit_ft: step" for event in trace["traceEvents"])
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"profile.txt", "trace.json.gz"}
    printed = capfd.readouterr()
    assert text in printed.err + "\n" and f"{tmp_path / 'new' / 'trace.json.gz'}\n" in printed.err
    assert not printed.out


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProfileSteps, Clocked]:
    """A run of three steps, of which the second and the third are profiled; a fourth would be."""
    callback = ProfileSteps(tmp_path_factory.mktemp("profile"), skip=1, steps=3)
    return callback, run(callback, 3)


def test_a_short_run_is_profiled_as_far_as_it_goes(short: tuple[ProfileSteps, Clocked]) -> None:
    callback, _ = short
    assert callback.report is not None
    assert (callback.report.first, callback.report.steps) == (2, 2)
    assert "steps 2 to 3" in (callback.folder / "profile.txt").read_text(encoding="utf-8")


def test_validation_ends_a_profile(tmp_path: Path) -> None:
    """It comes after the second step; what it takes is in no row."""
    callback = ProfileSteps(tmp_path, skip=1, steps=3)
    run(callback, 4, validate=True)
    assert callback.report is not None
    assert (callback.report.first, callback.report.steps) == (2, 1)


def test_a_run_shorter_than_the_warm_up_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    callback = ProfileSteps(tmp_path, skip=2, steps=1)
    run(callback, 2)
    assert callback.report is None
    assert "No step was profiled: the run had 2, and the first 2 are left out." in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_profiled_step_leaves_no_profiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in the step")

    callback = ProfileSteps(tmp_path, skip=0, steps=1)
    with monkeypatch.context() as broken:
        broken.setattr(SFTModule, "step", fail)
        with pytest.raises(RuntimeError, match="in the step"):
            run(callback, 1)
    assert callback.report is None
    assert not torch.autograd._profiler_enabled()
    again = ProfileSteps(tmp_path, skip=0, steps=1)
    run(again, 1)
    assert again.report is not None


def test_a_trace_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """Half of a large file would be worse than none; and one of an earlier profile stays."""

    class Full:
        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text("half", encoding="utf-8")
            raise OSError("no space")

    (tmp_path / "trace.json.gz").write_bytes(b"before")
    with pytest.raises(OSError, match="no space"):
        profile._write_trace(Full(), tmp_path / "trace.json.gz")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_profiling_does_not_change_training(tmp_path: Path, short: tuple[ProfileSteps, Clocked]) -> None:
    profiled, plain = short[1], run(ProfileSteps(tmp_path, skip=100), 3)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, profiled.state_dict()[name]), name
