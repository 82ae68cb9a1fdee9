"""One measured training run with TRL, or with lit_ft: the same examples, model, adapter, optimizer and precision."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lit_ft.batches import Example
from tests.benchmarks.rows import data_tokens

Algorithm = Literal["sft", "dpo"]

BATCH: dict[Algorithm, int] = {"sft": 8, "dpo": 4}  # examples per optimizer step
RANK, ALPHA, BETA = 16, 32, 0.1
SPREAD = 3e-3  # of B at the start: rewards then differ by about one between the pairs of real data
RATE: dict[Algorithm, float] = {"sft": 2e-4, "dpo": 5e-6}


@dataclass
class Run:
    """What a run showed. Seconds from the first step (or the reference pass before it) to the last step's end."""

    tokens: int
    seconds: float
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    flops: float = 0.0


def set_adapter(model: Any) -> None:
    """The same adapter for both systems, and not B = 0: policy and reference would be equal, and agree on anything."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / RANK)
        elif "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * SPREAD)


def run_trl(
    model: Any, algorithm: Algorithm, variant: str, examples: Sequence[Example], bf16: bool, max_length: int
) -> Run:
    """TRL's trainer on the same token ids.

    Variants: `padded`; `flat`, the batch's examples in one row (TRL's padding_free); `packed`, rows of `max_length`
    tokens filled by TRL's best-fit packing, as many in a batch as hold about as many examples.
    """
    from datasets import Dataset
    from peft import LoraConfig, TaskType
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from tests import tiny

    batch = BATCH[algorithm]
    if variant == "packed":
        batch = max(1, round(batch * data_tokens(examples) / len(examples) / max_length))
    peft_config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type=TaskType.CAUSAL_LM
    )

    class Watch(TrainerCallback):
        start = end = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            Watch.start = time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            Watch.end = time.perf_counter()

    class PreparedDPOTrainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # token ids already

    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "output_dir": folder,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
            "bf16": bf16,
            "gradient_checkpointing": False,
            "num_train_epochs": 1,
            "per_device_train_batch_size": batch,
            "train_sampling_strategy": "sequential",
            "learning_rate": RATE[algorithm],
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "logging_steps": 1,
            "max_length": max_length,
        }
        shared: dict[str, Any] = {
            "processing_class": tiny.tokenizer(),
            "peft_config": peft_config,
            "callbacks": [Watch()],
        }
        if algorithm == "sft":
            # TRL refuses to flatten rows that it would have to cut; these are short enough already.
            flat = {
                "flat": {"padding_free": True, "max_length": None},
                "packed": {"packing": True, "packing_strategy": "bfd"},
            }
            rows = [
                {
                    "input_ids": [*e.prompt, *e.completions[0].ids],
                    "completion_mask": [0] * len(e.prompt) + [int(m) for m in e.completions[0].mask],
                }
                for e in examples
            ]
            trainer: Any = SFTTrainer(
                model,
                args=SFTConfig(**{**arguments, "completion_only_loss": True, **flat.get(variant, {})}),
                train_dataset=Dataset.from_list(rows),
                **shared,
            )
        else:
            rows = [
                {
                    "prompt_ids": list(e.prompt),
                    "chosen_ids": list(e.completions[0].ids),
                    "rejected_ids": list(e.completions[1].ids),
                }
                for e in examples
            ]
            trainer = PreparedDPOTrainer(
                model,
                args=DPOConfig(**arguments, beta=BETA, disable_dropout=True),
                train_dataset=Dataset.from_list(rows),
                **shared,
            )
        set_adapter(trainer.model)
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Run(
        tokens=data_tokens(examples),
        seconds=Watch.end - Watch.start,
        losses=[entry["loss"] for entry in steps],
        grad_norms=[float(entry["grad_norm"]) for entry in steps],
    )


def run_lit_ft(
    model: Any,
    algorithm: Algorithm,
    examples: Sequence[Example],
    bf16: bool,
    max_tokens: int,
    device: torch.device,
    batch_size: int | None = None,
) -> Run:
    """The same with lit_ft's modules on Lightning's Trainer, without checkpoints, logs and held-out rows."""
    import lightning as L
    from lightning.pytorch.callbacks import Callback

    from lit_ft.data.datamodule import ExamplesDataModule
    from lit_ft.models.kinds.lora import apply_lora
    from lit_ft.models.score import use_packed_attention
    from lit_ft.modules import DPOModule, SFTModule
    from lit_ft.reference import attach, reference_logprobs
    from lit_ft.resources.flops import forward_flops, step_flops

    model = apply_lora(model, r=RANK, alpha=ALPHA, dropout=0.0)
    set_adapter(model)
    reason = use_packed_attention(model)
    if reason is not None:
        raise SystemExit(f"not packable: {reason}")
    optimizer: dict[str, Any] = {
        "learning_rate": RATE[algorithm],
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "max_grad_norm": 1.0,
    }
    run = Run(tokens=data_tokens(examples), seconds=0.0)

    class Watch(Callback):
        """Keeps metrics as tensors: reading them would wait for the device at every step."""

        def __init__(self) -> None:
            self.start = 0.0
            self.kept: list[tuple[Any, Any]] = []
            self.windows: list[Any] = []

        def on_train_start(self, *_: Any) -> None:
            synchronize()
            self.start = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, window: Any, index: int) -> None:
            metrics = trainer.callback_metrics
            self.kept.append((metrics["train/loss"], metrics["train/grad_norm"]))
            self.windows.append(window)

        def on_train_end(self, *_: Any) -> None:
            synchronize()
            run.seconds += time.perf_counter() - self.start

    watch = Watch()
    if algorithm == "dpo":
        model.to(device)
        synchronize()
        start = time.perf_counter()
        logps = reference_logprobs(
            model,
            examples,
            disable_adapter=True,
            max_tokens=max_tokens,
            layout="packed",
            autocast=torch.bfloat16 if bf16 else None,
        )
        examples = attach(examples, logps)
        synchronize()
        run.seconds += time.perf_counter() - start
        module: Any = DPOModule(model, beta=BETA, reference="base", **optimizer)
    else:
        module = SFTModule(model, **optimizer)
    data = ExamplesDataModule(examples, batch_size=batch_size or BATCH[algorithm], max_tokens=max_tokens, shuffle=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=device.type if device.type == "cpu" else "gpu",
            devices=1,
            precision="bf16-mixed" if bf16 else "32-true",
            max_epochs=1,
            callbacks=[watch],
            logger=False,
            default_root_dir=folder,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, data)
    run.losses = [float(loss) for loss, _ in watch.kept]
    run.grad_norms = [float(norm) for _, norm in watch.kept]
    for batch in (batch for window in watch.windows for batch in window.batches):
        run.flops += step_flops(model, batch)
        if algorithm == "dpo":  # the reference pass, over the same rows without the adapter
            with model.disable_adapter():
                run.flops += forward_flops(model, batch)
    return run


def synchronize() -> None:
    """Wait for the GPU, where there is one, before looking at the clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
