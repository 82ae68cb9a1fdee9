"""Settings that cannot work together are refused before anything is loaded, with the reason and the nearest that do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_ft.errors import UserError
from lit_ft.wiring.checks import device_number, devices_here
from tests import tiny
from tests.conftest import Outcome

Refused = Callable[..., str]


@pytest.fixture
def refused(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Run a command that must fail with exit code 2 before a model is loaded, and return its one paragraph."""
    from lit_ft import train

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("too late: the model is being loaded")

    monkeypatch.setattr(train, "make_model", loaded)

    def run(*args: str) -> str:
        outcome = cli("+experiment=sft", f"model.id={llama_folder}", "trainer.accelerator=cpu", *args)
        assert outcome.code == 2, outcome.err
        assert outcome.out == "" and outcome.err.startswith("\nerror: ")
        assert not Path("runs").exists() or not list(Path("runs").rglob("*.ckpt"))
        return " ".join(outcome.err.removeprefix("\nerror: ").split())

    return run


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["trainer.precision=bf16-true"], ["round the trained weights", "trainer.precision=bf16-mixed"]),
        (["trainer.precision=16-mixed"], ["not supported", "trainer.precision=bf16-mixed"]),
        (["trainer.precision=64-true"], ["trainer.precision=auto"]),
        (["strategy.tensor_parallel_size=2"], ["no effect with strategy=auto", "use strategy=fsdp_tp"]),
        (["strategy=fsdp_tp"], ["does not divide the 1 device ", "use strategy=fsdp, or more devices"]),
        (["strategy=fsdp_tp", "trainer.devices=3"], ["does not divide the 3 devices", "sizes that do: 3"]),
        (
            ["strategy=fsdp_tp", "trainer.devices=4", "strategy.tensor_parallel_size=4"],
            ["num_key_value_heads=2", "sizes that do: 2"],
        ),
        (["strategy=ddp", "strategy.cpu_offload=true"], ["cpu_offload has no effect", "use strategy=fsdp"]),
        (["strategy.param_dtype=bf16"], ["param_dtype has no effect with strategy=auto", "use strategy=fsdp"]),
        (["trainer.num_nodes=2"], ["torchrun", "--nnodes=2", "examples/slurm"]),
        (["trainer.num_nodes=0"], ["at least 1"]),
        (["trainer.devices=0"], ["no number of devices"]),
        (["trainer.devices=many"], ["no number of devices"]),
        (["strategy=fdsp"], ["fdsp", "fsdp"]),
        (["strategy.kind=zero"], ["zero", "fsdp_tp"]),
        (["strategy.kid=ddp"], ["kid"]),
    ],
)
def test_a_bad_combination_is_refused_with_the_nearest_good_one(
    refused: Refused, settings: list[str], words: list[str]
) -> None:
    said = refused(*settings)
    assert all(word in said for word in words), said


def test_quantized_weights_are_not_sharded(refused: Refused, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    said = refused(f"model.id={folder}", "strategy=fsdp", "trainer.devices=2")
    assert "quantized" in said and "strategy=ddp" in said


def test_models_without_a_plan_are_not_split(refused: Refused, opt_folder: Path) -> None:
    said = refused(f"model.id={opt_folder}", "data.chat_template=plain", "strategy=fsdp_tp", "trainer.devices=2")
    assert "no tensor-parallel plan for opt" in said and "use strategy=fsdp" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_gpus_that_are_not_there(refused: Refused) -> None:
    said = refused("trainer.accelerator=gpu", "trainer.devices=2")
    assert "asks for 2 GPU(s), and there is none: set trainer.accelerator=cpu" in said


def test_devices_by_number_list_and_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [devices_here("cpu", wanted) for wanted in (1, 4, "3", "auto", -1)] == [1, 4, 3, 1, 1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [devices_here("auto", wanted) for wanted in ("auto", -1, [0, 2], "1,3", 4)] == [4, 4, 2, 2, 4]
    for wanted, nearest in ((5, "trainer.devices=4"), ([0, 4], "trainer.devices=4")):
        with pytest.raises(UserError, match=f"there are 4: set {nearest}"):
            devices_here("auto", wanted)
    assert devices_here("cpu", 5) == 5


def test_which_gpu_is_a_processs_own() -> None:
    assert [device_number(2, rank) for rank in (0, 1)] == [0, 1]
    assert [device_number([0, 2], rank) for rank in (0, 1)] == [device_number("0,2", rank) for rank in (0, 1)] == [0, 2]


def test_a_refusal_is_quick(refused: Refused) -> None:
    refused("strategy=fsdp_tp")  # whatever must be imported once
    start = time.process_time()
    refused("strategy=fsdp_tp")
    assert time.process_time() - start < 2


def test_fsdp_on_one_device(cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path) -> None:
    """Nothing to share, but the same path: it is what a machine with one GPU and cpu_offload takes."""
    few = ["data.max_length=2048", "data.max_rows=8", "data.max_val_rows=2", "trainer.max_steps=2", "logger=none"]
    usual = [
        "+experiment=sft",
        f"model.id={llama_folder}",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        *few,
    ]
    losses = []
    for strategy in ("auto", "fsdp"):
        done = cli(*usual, f"strategy={strategy}")
        assert done.code == 0, done.err
        losses.append([line for line in done.err.splitlines() if line.startswith("held out")])
    assert len(losses[0]) == 3 and losses[0][1:] == losses[1][1:]
    assert not torch.distributed.is_initialized()
    # The next run of a sweep, in this process, is not one that a launcher started.
    refused = cli(*usual, "trainer.num_nodes=2")
    assert refused.code == 2 and "torchrun" in refused.err
