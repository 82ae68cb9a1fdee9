"""Our modules on Lightning's trainer beside TRL's trainers: the same model, adapter and rows give the same curves.

Both start from the same weights (LoRA with a B that is not zero) and read the same texts, each through its own
tokenization and its own batches. Measured: losses and gradient norms agree to 2e-7 of their size for SFT, to 3e-6 for
DPO (whose loss is a function of differences of large log-probabilities), rewards to 3e-6, logps to 2e-7.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ft.batches import Example
from lit_ft.data.chat import ChatEncoder
from lit_ft.data.datamodule import ExamplesDataModule
from lit_ft.data.formats import Kind, Record, to_record
from lit_ft.data.packing import Layout
from lit_ft.models.kinds.lora import apply_lora
from lit_ft.models.score import use_packed_attention
from lit_ft.modules import DPOModule, SFTModule
from lit_ft.reference import attach, reference_logprobs
from tests import tiny

Curve = list[dict[str, float]]

STEPS, BATCH, RATE, CLIP, BETA = 3, 4, 1e-3, 0.5, 0.1

# What TRL logs and we do not, and why.
NOT_LOGGED = {
    "entropy": "needs a pass over the whole vocabulary",
    "logits/chosen": "needs a pass over the whole vocabulary",
    "logits/rejected": "needs a pass over the whole vocabulary",
    "epoch": "Lightning logs it itself, under the same name",
    "step": "the index of the curve, not a metric",
}
# In validation also:
NOT_LOGGED_IN_EVAL = {
    **NOT_LOGGED,
    "num_tokens": "the training counter, which validation does not move",
    "runtime": "wall time",
    "samples_per_second": "wall time",
    "steps_per_second": "wall time",
}

TEXT = "the parcel arrived late and we will refund your order today please write again thank you kindly"
WORDS = TEXT.split()


def sentence(start: int, count: int) -> str:
    return " ".join(WORDS[(start * 5 + k * 3) % len(WORDS)] for k in range(count))


# Lengths differ, so that means over rows, over tokens and over batches all differ.
PAIRS = [
    {
        "prompt": f"{k}. {sentence(k, 1 + k % 5)}? ",
        "chosen": sentence(k + 1, 1 + (k * 3) % 7),
        "rejected": sentence(k + 2, 1 + (k * 5) % 4),
    }
    for k in range(STEPS * BATCH + 5)
]
ANSWERS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
TRAIN = slice(0, STEPS * BATCH)
HELD_OUT = slice(STEPS * BATCH, None)


@pytest.fixture(scope="module")
def start() -> Any:
    """The model that every run here begins with a copy of."""
    model = apply_lora(tiny.model("llama"), r=4, alpha=8, dropout=0.0)
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def trl_arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": len(PAIRS),  # TRL averages over batches, we over tokens: one batch, one mean
        "train_sampling_strategy": "sequential",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": STEPS,
    }


def split_log(history: list[dict[str, float]]) -> tuple[Curve, dict[str, float]]:
    """The training steps, and the validation after the last of them without its prefix."""
    steps = [entry for entry in history if "loss" in entry]
    (held_out,) = [entry for entry in history if "eval_loss" in entry]
    return steps, {key.removeprefix("eval_"): value for key, value in held_out.items()}


def ours(module: Any, train: list[Example], val: list[Example], layout: Layout, max_tokens: int) -> Any:
    """The same steps with Lightning: what the module logs at each, and at the validation after the last."""
    import lightning as L
    from lightning.pytorch.loggers.logger import DummyLogger

    class Recorder(DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.logged: list[dict[str, float]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.logged.append(dict(metrics))

    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        logger=recorder,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = ExamplesDataModule(
        train, val, batch_size=BATCH, max_tokens=max_tokens, layout=layout, pad_id=3, shuffle=False
    )
    trainer.fit(module, data)
    steps = [entry for entry in recorder.logged if "train/loss" in entry]
    (held_out,) = [entry for entry in recorder.logged if "eval/loss" in entry]
    assert all("epoch" in entry for entry in steps)
    return (
        [{key.removeprefix("train/"): float(value) for key, value in entry.items()} for entry in steps],
        {key.removeprefix("eval/"): float(value) for key, value in held_out.items()},
    )


def encode(rows: list[dict[str, str]], kind: Kind) -> list[Example]:
    """As text, not as a chat: then TRL and we train on the same tokens.

    In a chat TRL trains on what the template writes after the end of an answer too (a line break); we do not.
    """
    encoder = ChatEncoder(tiny.tokenizer(), as_chat=False)
    records = [to_record(row, kind, None) for row in rows]
    return [encoder.encode(record, k) for k, record in enumerate(records) if isinstance(record, Record)]


def assert_same_curves(found: tuple[Curve, dict[str, float]], wanted: tuple[Curve, dict[str, float]]) -> None:
    assert len(found[0]) == len(wanted[0]) == STEPS
    for step, (one, other) in enumerate(zip(found[0], wanted[0], strict=True)):
        assert set(other) - set(one) <= set(NOT_LOGGED), "TRL logs a metric that we do not"
        assert_same_values(one, other, f"step {step + 1}")
    assert set(wanted[1]) - set(found[1]) <= set(NOT_LOGGED_IN_EVAL), "TRL validates a metric that we do not"
    assert_same_values(found[1], wanted[1], "validation")


def assert_same_values(found: dict[str, float], wanted: dict[str, float], where: str) -> None:
    for name in sorted((set(found) & set(wanted)) - {"epoch"}):
        # Rewards are β times differences of log-probabilities around −100, of which float32 keeps about 1e-5; a
        # relative bound has no meaning near zero.
        absolute = BETA * 1e-4 if name.startswith("rewards/") else 1e-7
        assert found[name] == pytest.approx(wanted[name], rel=1e-5, abs=absolute), f"{where}: {name}"


def prepared(start: Any, layout: Layout) -> Any:
    model = copy.deepcopy(start)
    if layout == "packed":
        assert use_packed_attention(model) is None
    return model


# All rows of a window in one batch; and so few tokens a batch that each window takes several.
LAYOUTS: list[tuple[Layout, int]] = [("packed", 4096), ("packed", 120), ("padded", 4096), ("padded", 120)]


@pytest.fixture(scope="module")
def trl_sft(start: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        copy.deepcopy(start),
        args=SFTConfig(**trl_arguments(tmp_path_factory.mktemp("trl"))),
        train_dataset=Dataset.from_list(ANSWERS[TRAIN]),
        eval_dataset=Dataset.from_list(ANSWERS[HELD_OUT]),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(("layout", "max_tokens"), LAYOUTS)
def test_sft(start: Any, trl_sft: Any, layout: Layout, max_tokens: int) -> None:
    module = SFTModule(
        prepared(start, layout), learning_rate=RATE, lr_scheduler_type="constant", warmup_ratio=0.0, max_grad_norm=CLIP
    )
    train, val = encode(ANSWERS[TRAIN], "sft"), encode(ANSWERS[HELD_OUT], "sft")
    assert_same_curves(ours(module, train, val, layout, max_tokens), split_log(trl_sft.state.log_history))


def test_sft_rows_are_the_same_tokens(trl_sft: Any) -> None:
    for example, row in zip(encode(ANSWERS[TRAIN], "sft"), trl_sft.train_dataset, strict=True):
        (completion,) = example.completions
        assert [*example.prompt, *completion.ids] == row["input_ids"]
        assert [-100] * len(example.prompt) + list(completion.ids) == row["labels"]


@pytest.fixture(scope="module")
def trl_dpo(start: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One TRL run per loss; its reference is a copy of the adapter it starts from, as `reference: initial` is."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    runs = {}
    for loss in ("sigmoid", "hinge", "ipo"):
        arguments = trl_arguments(tmp_path_factory.mktemp("trl"))
        runs[loss] = DPOTrainer(
            copy.deepcopy(start),
            args=DPOConfig(**arguments, beta=BETA, loss_type=[loss], disable_dropout=True),
            train_dataset=Dataset.from_list(PAIRS[TRAIN]),
            eval_dataset=Dataset.from_list(PAIRS[HELD_OUT]),
            processing_class=tiny.tokenizer(),
        )
        runs[loss].train()
    return runs


@pytest.mark.parametrize(("layout", "max_tokens"), LAYOUTS)
@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_dpo(start: Any, trl_dpo: dict[str, Any], loss: Any, layout: Layout, max_tokens: int) -> None:
    model = prepared(start, layout)
    splits = []
    for rows in (PAIRS[TRAIN], PAIRS[HELD_OUT]):
        examples = encode(rows, "preference")
        logps = reference_logprobs(model, examples, disable_adapter=False, max_tokens=4096, layout=layout, pad_id=3)
        splits.append(attach(examples, logps))
    module = DPOModule(
        model,
        beta=BETA,
        loss_type=loss,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        max_grad_norm=CLIP,
    )
    found = ours(module, splits[0], splits[1], layout, max_tokens)
    assert_same_curves(found, split_log(trl_dpo[loss].state.log_history))
    if loss == "sigmoid":
        assert found[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_dpo_rows_are_the_same_tokens(trl_dpo: dict[str, Any]) -> None:
    for example, row in zip(encode(PAIRS[TRAIN], "preference"), trl_dpo["sigmoid"].train_dataset, strict=True):
        assert list(example.prompt) == row["prompt_ids"]
        assert [list(c.ids) for c in example.completions] == [row["chosen_ids"], row["rejected_ids"]]
