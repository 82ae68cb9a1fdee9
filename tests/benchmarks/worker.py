"""One benchmark run in a process of its own: python -m tests.benchmarks.worker SETTINGS.json RESULT.json"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    settings, result = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    result.write_text(json.dumps(measure(settings)))


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Run what `settings` say and return a `Run` with the peak of memory and the machine's matrix rate."""
    import torch

    from lit_ft.resources.allocator import keep_freed_memory
    from lit_ft.resources.machine import matrix_rate
    from tests.benchmarks import systems

    for name in ("lightning.pytorch", "transformers", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import_all(settings["system"])
    device = torch.device(settings["device"])
    ours = settings["system"] == "lit_ft"
    if ours and device.type == "cpu":
        keep_freed_memory()
    bf16 = settings["precision"] == "bf16-mixed"
    dtype = torch.bfloat16 if bf16 else torch.float32
    large = (8192, 8192, 8192) if device.type == "cuda" else (2048, 2048, 2048)
    examples = load_rows(settings)

    def once(rows: list[Any]) -> systems.Run:
        model = load(settings, dtype, device)
        reset_peak(device)
        if ours:
            return systems.run_lit_ft(
                model, settings["algorithm"], rows, bf16, settings["max_tokens"], device, settings["batch_size"]
            )
        return systems.run_trl(
            model, settings["algorithm"], settings["variant"], rows, bf16, max_length=settings["max_length"]
        )

    if settings["warmup_rows"]:
        # What happens once in a process should not count; the shortest rows do for that.
        once(sorted(examples, key=lambda example: example.tokens)[: settings["warmup_rows"]])
    rate = matrix_rate(device, dtype, large, seconds=1.0)
    run = once(examples)
    peak = peak_bytes(device)
    rate = max(rate, matrix_rate(device, dtype, large, seconds=1.0))
    return {**vars(run), "peak_bytes": peak, "matrix_rate": rate}


def import_all(system: str) -> None:
    """What the run will import: its memory is not training's."""
    if system == "TRL":
        import trl

        _ = trl.SFTTrainer, trl.DPOTrainer
    else:
        import lit_ft.modules  # noqa: F401
    import peft  # noqa: F401


def load(settings: dict[str, Any], dtype: Any, device: Any) -> Any:
    from lit_ft.models.load import load_model
    from tests.benchmarks.shapes import SHAPES, random_model

    if settings["model"] in SHAPES:
        return random_model(settings["model"], dtype, device)
    return load_model(settings["model"], dtype=dtype).to(device)


def load_rows(settings: dict[str, Any]) -> list[Any]:
    from tests.benchmarks import rows
    from tests.benchmarks.shapes import SHAPES

    kind: Any = "sft" if settings["algorithm"] == "sft" else "preference"
    count, max_length = settings["rows"], settings["max_length"]
    if settings["context"]:
        return rows.rows_of_length(settings["context"], SHAPES["135m"][5], count)
    if settings["data"] is None:
        return rows.random_rows(kind, SHAPES[settings["model"]][5], count, max_length)
    from lit_ft.models.load import load_tokenizer

    return rows.real_rows(Path(settings["data"]), kind, load_tokenizer(settings["tokenizer"]), count, max_length)


def reset_peak(device: Any) -> None:
    """Forget the peak so far: loading and imports are not training."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: Any) -> int:
    """The largest memory since `reset_peak`: of the GPU, or resident in this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
