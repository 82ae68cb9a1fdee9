"""What the benchmark of adapters measures, each function in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.memory import run, status


def quality(overrides: Sequence[str], adapter: str, model: str, rows: str, count: int) -> dict[str, Any]:
    """Train, then what was learned and what was forgotten."""
    from lit_ft import adapter as published

    run(overrides)
    card = published.read(Path(adapter)).card
    size = sum(path.stat().st_size for path in Path(adapter).glob("*.safetensors"))
    found = general_loss(model, rows, count, adapter)
    if card.servable:
        served = f"yes, {card.converted}" if card.converted else "yes"
    else:
        served = "as a base of its own" if card.peft == "full" else "merged"
    return {
        "before": card.metrics.get("before/loss"),
        "loss": card.metrics["eval/loss"],
        "general": found["general"],
        "parameters": trained_parameters(overrides, model),
        "size": size,
        "served": served,
    }


def trained_parameters(overrides: Sequence[str], model: str) -> int:
    """How many weights the run's kind trains, of the ranks it begins with."""
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from lit_ft.cli import conf_folder
    from lit_ft.models.adapt import parameter_counts
    from lit_ft.models.load import load_model
    from lit_ft.wiring.model import adapter_kind

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder().resolve()), version_base="1.3"):
        cfg: Any = compose("config", list(overrides))
    return parameter_counts(adapter_kind(cfg).begin(load_model(model, dtype=torch.float32)))[0]


def general_loss(model: str, rows: str, count: int, adapter: str | None) -> dict[str, float]:
    """Mean loss per token over general instructions, of the base or of what was published in `adapter`."""
    import torch

    from lit_ft.data.chat import ChatEncoder
    from lit_ft.data.datamodule import load_examples
    from lit_ft.models.load import load_model, load_tokenizer
    from lit_ft.models.score import use_packed_attention
    from lit_ft.reference import reference_logprobs

    whole = adapter is not None and not Path(adapter, "adapter_config.json").is_file()
    loaded = load_model(adapter if whole and adapter else model, dtype=torch.float32)
    if adapter is not None and not whole:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter)
    layout = "packed" if use_packed_attention(loaded) is None else "padded"
    encoder = ChatEncoder(load_tokenizer(model), "completion", True)
    prepared, _ = load_examples(rows, encoder, "sft", max_rows=count, max_length=512, max_dropped=0.9)
    logps = reference_logprobs(
        loaded, prepared.examples, disable_adapter=False, max_tokens=2048, layout=layout, pad_id=0
    )
    targets = sum(example.targets for example in prepared.examples)
    return {"general": -sum(sum(values) for values in logps) / targets, "targets": targets}


def speed(overrides: Sequence[str], adapters: str) -> dict[str, float]:
    """Tokens per second, and the peak of resident memory from loading to publishing, in bytes."""
    from tests.benchmarks.clock import tokens_per_second

    clock = ["logger=none", "logger._target_=tests.benchmarks.clock.Clock", "trainer.log_every_n_steps=1"]
    run([*overrides, *clock, f"adapters={adapters}"])
    return {"tokens_per_s": tokens_per_second(), "peak": status("VmHWM")}


def latency(model: str, folders: Mapping[str, str], rounds: int = 15) -> dict[str, dict[str, float]]:
    """Time of a prompt's pass with 16 generated tokens, over the base's: the least of each, taken in turn.

    What else a machine does only ever adds to a time, so that the least of many is nearest to the time itself.
    """
    import torch
    from peft import PeftModel

    from lit_ft.models.load import load_model

    base = load_model(model, dtype=torch.float32).eval()
    torch.manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (1, 128))

    @torch.no_grad()
    def seconds(one: Any) -> float:
        begun = time.perf_counter()
        one.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=16, max_new_tokens=16)
        return time.perf_counter() - begun

    def ratio(one: Any) -> float:
        seconds(one)
        times: dict[int, list[float]] = {id(base): [], id(one): []}
        for k in range(rounds):
            for each in (base, one) if k % 2 else (one, base):
                times[id(each)].append(seconds(each))
        return min(times[id(one)]) / min(times[id(base)])

    seconds(base)
    found = {"base": {"unmerged": ratio(load_model(model, dtype=torch.float32).eval()), "merged": 1.0}}
    for kind, path in folders.items():
        if not Path(path, "adapter_config.json").is_file():
            whole = ratio(load_model(path, dtype=torch.float32).eval())
            found[kind] = {"unmerged": whole, "merged": whole}
            continue
        adapted = PeftModel.from_pretrained(load_model(model, dtype=torch.float32), path).eval()
        unmerged = ratio(adapted)
        found[kind] = {"unmerged": unmerged, "merged": ratio(adapted.merge_and_unload().eval())}
    return found
