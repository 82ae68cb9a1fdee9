"""Reference log-probabilities of preference data: computed once, kept on disk under a key of all they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lit_ft.batches import Example
from lit_ft.data.packing import Layout, lay_out, split_by_tokens
from lit_ft.distributed.processes import gathered
from lit_ft.models.adapt import is_adapted
from lit_ft.models.score import completion_logprobs
from lit_ft.progress import Progress


def reference_key(examples: Sequence[Example], **depends_on: Any) -> str:
    """A hash of the examples' ids and masks and of everything else that the log-probabilities depend on."""
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode())
    for example in examples:
        digest.update(repr((example.prompt, [(c.ids, c.mask) for c in example.completions])).encode())
    return digest.hexdigest()


@torch.no_grad()
def reference_logprobs(
    model: Any,
    examples: Sequence[Example],
    *,
    disable_adapter: bool,
    max_tokens: int,
    layout: Layout,
    pad_id: int = 0,
    autocast: torch.dtype | None = None,
    device: torch.device | None = None,
    rank: int = 0,
    processes: int = 1,
) -> list[tuple[float, ...]]:
    """Summed log-probabilities of every completion, in the examples' order, under `model` as it is now.

    The batches are the same for any number of processes, which divide them and tell each other what they found.

    Args:
        disable_adapter: score with the adapters switched off (`reference: base`).
        max_tokens, layout, pad_id: how examples are put into batches.
        autocast: dtype of mixed precision, or None.
        device: where the model computes; None: where its weights are.
        rank, processes: this process among those that divide the examples.
    """
    device = device or next(model.parameters()).device
    was_training = model.training
    model.eval()
    off = model.disable_adapter() if disable_adapter and is_adapted(model) else contextlib.nullcontext()
    mixed = torch.autocast(device.type, autocast) if autocast is not None else contextlib.nullcontext()
    numbered = [replace(example, index=k) for k, example in enumerate(examples)]
    groups = split_by_tokens(numbered, max_tokens, layout)
    # A sharded model runs in step on all processes: each takes equally many groups, the last ones perhaps twice.
    mine = [groups[min(k + rank, len(groups) - 1)] for k in range(0, len(groups), processes)]
    found: dict[int, tuple[float, ...]] = {}
    progress = Progress("reference log-probabilities", len(examples))
    with off, mixed:
        for group in mine:
            logps = completion_logprobs(model, lay_out(group, layout, pad_id).to(device)).tolist()
            for example in group:
                count = len(example.completions)
                found[example.index], logps = tuple(logps[:count]), logps[count:]
            progress.advance(len(group) * processes)
    progress.close()
    model.train(was_training)
    if processes > 1:
        found = {key: value for part in gathered(found) for key, value in part.items()}
    return [found[k] for k in range(len(examples))]


def attach(examples: Sequence[Example], logprobs: Sequence[tuple[float, ...]]) -> list[Example]:
    """The examples with their reference log-probabilities."""
    return [replace(example, reference=values) for example, values in zip(examples, logprobs, strict=True)]


def read_cached(folder: Path, key: str) -> list[tuple[float, ...]] | None:
    """Log-probabilities kept under `key`, or None."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / f"{key}.safetensors"
    try:
        kept = load_file(path)
    except (OSError, SafetensorError):
        return None
    values = iter(kept["logprobs"].tolist())
    return [tuple(islice(values, count)) for count in kept["completions"].tolist()]


def write_cached(folder: Path, key: str, logprobs: Sequence[tuple[float, ...]]) -> None:
    """Keep log-probabilities under `key`; written beside and renamed."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{key}-{uuid.uuid4().hex[:8]}"
    flat = torch.tensor([value for values in logprobs for value in values])
    try:
        save_file({"logprobs": flat, "completions": torch.tensor([len(values) for values in logprobs])}, beside)
        beside.replace(folder / f"{key}.safetensors")
    finally:
        beside.unlink(missing_ok=True)
