"""What a training step holds in memory, and what to lower when it is too much."""

from __future__ import annotations

import errno
import os
import re
import resource
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_ft.batches import Batch
from lit_ft.losses.logprobs import BLOCK
from lit_ft.models.adapt import causal_lm
from lit_ft.models.shard import decoder_layers

# How allocators other than CUDA's say it, which has an error of its own: PyTorch's for the CPU (on Linux, on Windows),
# C++'s, CUDA's libraries, and the system's.
_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
    "out of memory",
    "STATUS_ALLOC_FAILED",
    "Cannot allocate memory",
)
# Linear layers that read what attention gives, which attention keeps anyway.
_AFTER_ATTENTION = ("o_proj", "out_proj", "c_proj", "dense", "wo")
# A part of this share of the whole is worth a setting.
_WORTH = 0.2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: the GPU's or the machine's, found by PyTorch, Python or the system."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@dataclass(frozen=True)
class Account:
    """What one training step holds on this process's device. All sizes in bytes.

    Attributes:
        frozen, trained: weights, of sharded ones the part that lies here.
        gathered: sharded weights that are whole for a while (one layer and what lies outside the layers).
        copies: of weights in the format of mixed precision, which autocast keeps.
        gradients: of the trained weights.
        optimizer: its states as they are, else what AdamW will take: two float32 numbers per trained weight.
        activations: what the backward pass needs of the forward pass, estimated (see `activation_bytes`).
        checkpointed: the same with gradient checkpointing.
        logits: the blocks of logits that exist at a time.
        device: in words, `CPU` or `GPU (…)`.
        tokens, examples: of the batch that activations and logits are for, padding included; 0: none was computed yet.
        total: memory that the device has, or None where that is not known.
        others: memory that other processes hold on the GPU.
        peak: what PyTorch had allocated at most, measured; None on a CPU, where it does not count.
    """

    frozen: int
    trained: int
    gathered: int
    copies: int
    gradients: int
    optimizer: int
    activations: int
    checkpointed: int
    logits: int
    device: str = "CPU"
    tokens: int = 0
    examples: int = 0
    total: int | None = None
    others: int = 0
    peak: int | None = None

    @property
    def weights(self) -> int:
        """Bytes of all weights, with what is made of them for a while."""
        return self.frozen + self.trained + self.gathered + self.copies

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what holds them, the largest first."""
        names = ("weights", "activations", "optimizer", "gradients", "logits")
        return dict(sorted(((name, getattr(self, name)) for name in names), key=lambda part: -part[1]))

    @property
    def sum(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def account(
    model: Any,
    optimizer: Any,
    batch: Batch | None,
    *,
    mixed: torch.dtype | None = None,
    device: torch.device | None = None,
    offloaded: bool = False,
) -> Account:
    """Count what a training step of `model` over `batch` holds.

    Args:
        model: the causal language model, with PEFT's adapters or without, whole or sharded.
        optimizer: what trains it (`.state` is read), or None.
        batch: the one with the most tokens that was tried; None: none was, and activations and logits are left out.
        mixed: the format of mixed precision, None without.
        device: what it trains on; None: where its weights are.
        offloaded: shards, their gradients and the optimizer lie in main memory (strategy.cpu_offload).
    """
    device = device or next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    here = 0 if offloaded else 1
    tokens = targets = width = 0
    if batch is not None:
        tokens, targets, width = batch.input_ids.numel(), len(batch.target_ids), batch.input_ids.shape[1]
    estimates = {
        how: activation_bytes(model, tokens, targets, width, mixed=mixed, device=device, checkpointing=how)
        for how in (False, True)
    }
    total, others, peak = _gpu_memory(device) if device.type == "cuda" else (machine_memory(), 0, None)
    return Account(
        frozen=here * _bytes_here(frozen),
        trained=here * _bytes_here(trained),
        gathered=_gathered_bytes(model, offloaded),
        copies=_copied_bytes(model, mixed) if mixed is not None else 0,
        gradients=here * _bytes_here(trained),
        optimizer=here * (_state_bytes(optimizer) or sum(2 * 4 * _local(p).numel() for p in trained)),
        activations=estimates[bool(getattr(causal_lm(model), "is_gradient_checkpointing", False))],
        checkpointed=estimates[True],
        logits=_logit_bytes(model, targets, mixed, device),
        device=f"GPU ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "CPU",
        tokens=tokens,
        examples=batch.num_examples if batch is not None else 0,
        total=total,
        others=others,
        peak=peak,
    )


def activation_bytes(
    model: Any,
    tokens: int,
    targets: int,
    width: int,
    *,
    mixed: torch.dtype | None = None,
    device: torch.device | None = None,
    checkpointing: bool = False,
) -> int:
    """Bytes that autograd keeps of a forward pass, an estimate.

    Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1) add up what each operation of a decoder layer keeps for its
    gradient; here the same for pre-normalised layers with gated MLPs, memory-efficient attention (Dao et al. 2022,
    arXiv:2205.14135: output and log-sum-exp, no scores) and weights that may be frozen, of which no gradient is wanted
    and whose inputs are not kept. With hidden size h, heads·head_dim q, kv_heads·head_dim k, MLP width f, and c bytes
    per number (2 in mixed precision), per token and layer:

    - each norm: its input in float32, 4·h, and where its weight is trained its normalised input as well;
    - attention: query, key, value and output, (2·q + 2·k)·c, and 4 per head; `eager` has scores, too;
    - MLP: 3·f·c if gated (before and after the activation, and what it is multiplied by), f·c if not;
    - the input of a linear layer that is trained or has a fused LoRA: h or f times c, once for those that share it.
      From float32 hidden states in mixed precision, each has a copy of its own;
    - LoRA of rank r: r·c per layer; with dropout each has its own dropped input and mask instead of the shared input
      (a mask is 4 bytes per number on a CPU, 1 on a GPU).

    So LoRA on every linear layer of a Llama keeps (2·4 + 2·c)·h + (2·q + 2·k + 4·f)·c + 4·heads, and c·r for each of
    seven. Outside the layers: the last norm, and the float32 gradient of each target's hidden state. With gradient
    checkpointing: each layer's input, and all of one layer while it is computed again.

    Tests compare it with what autograd really keeps. Not counted rightly: mixtures of experts, layers that are not
    attention and MLP, a model's own dropout; under tensor parallelism it is what one device without it would hold.

    Args:
        model: with PEFT's adapters or without.
        tokens: of the batch, padding included.
        targets: tokens that are predicted.
        width: tokens of a row.
        mixed: the format of mixed precision, None without.
        device: CPU or GPU; None: where the weights are.
        checkpointing: with gradient checkpointing, whatever the model is set to.
    """
    lm = causal_lm(model)
    kind = (device or next(model.parameters()).device).type
    shape = _Shape(lm, mixed)
    layers = [_layer_bytes(layer, shape, width, kind) for layer in decoder_layers(lm)]
    stream = shape.hidden * shape.stream
    of_layers = len(layers) * stream + max(layers) if checkpointing else sum(layers)
    return tokens * (of_layers + 4 * shape.hidden) + targets * 4 * shape.hidden


class _Shape:
    """Widths of a model's layers and bytes per number."""

    def __init__(self, lm: Any, mixed: torch.dtype | None) -> None:
        config = lm.config.get_text_config(decoder=True)
        self.hidden: int = config.hidden_size
        self.heads: int = config.num_attention_heads
        self.head_dim: int = getattr(config, "head_dim", None) or self.hidden // self.heads
        self.query = self.heads * self.head_dim
        self.key = (getattr(config, "num_key_value_heads", None) or self.heads) * self.head_dim
        wide = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
        self.mlp: int = next((size for size in wide if size), 4 * self.hidden)
        # Hidden states between the layers have the embeddings' format, products the weights' or mixed precision's.
        self.stream: int = lm.get_input_embeddings().weight.element_size()
        self.product = mixed.itemsize if mixed is not None else self.stream
        # What an activation keeps beside its result: GPT-2's is made of several operations.
        names = (getattr(config, name, None) for name in ("hidden_act", "activation_function"))
        self.around_activation = {"relu": 0, "gelu_new": 4}.get(str(next((name for name in names if name), "")), 1)
        self.eager = lm.config._attn_implementation == "eager"


def _layer_bytes(layer: nn.Module, shape: _Shape, width: int, kind: str) -> int:
    """Bytes per token that a decoder layer keeps (see `activation_bytes`)."""
    kept = 0
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(weight, Tensor):
            of_heads = weight.numel() == shape.head_dim != shape.hidden  # of each head's query or key
            size = (shape.query if "q" in name.rsplit(".", 1)[-1] else shape.key) if of_heads else weight.numel()
            kept += size * (4 + (shape.stream if weight.requires_grad else 0))
    if shape.eager:  # scores are a row's width, in float32 and then again if products are of another format
        scores = 4 + (shape.product if shape.product < 4 else 0)
        kept += 4 * shape.query * shape.product + shape.heads * width * scores
    else:
        kept += 2 * (shape.query + shape.key) * shape.product + 4 * shape.heads
    linear = dict(_linear_layers(layer))
    gated = any("gate" in name for name in linear)
    kept += (3 if gated else shape.around_activation) * shape.mlp * shape.product
    shared: set[tuple[str, int]] = set()
    for name, module in linear.items():
        parent, _, own = name.rpartition(".")
        base = getattr(module, "base_layer", module)
        size = base.in_features if isinstance(base, nn.Linear) else base.nx  # nx: GPT-2's
        ranks, dropout = _lora(module)
        kept += sum(ranks) * shape.product
        if ranks and dropout:
            kept += size * (shape.product + (1 if kind == "cuda" else 4))
        elif ranks or _weight(module).requires_grad:
            if "att" in parent and own in _AFTER_ATTENTION:
                continue
            if size == shape.hidden and shape.product < shape.stream:
                kept += size * shape.product
            elif (parent, size) not in shared:
                shared.add((parent, size))
                kept += size * shape.product
    return kept


def _linear_layers(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that multiply by a matrix, with their names; an adapted one counts once, as a whole."""
    from transformers.pytorch_utils import Conv1D

    adapted = tuple(f"{name}." for name, module in layer.named_modules() if hasattr(module, "lora_A"))
    for name, module in layer.named_modules():
        if isinstance(getattr(module, "base_layer", module), nn.Linear | Conv1D) and not name.startswith(adapted):
            yield name, module


def _weight(module: Any) -> Tensor:
    return getattr(module, "base_layer", module).weight


def _lora(module: Any) -> tuple[list[int], bool]:
    """Ranks of a layer's active adapters, and whether there is dropout before them."""
    if not hasattr(module, "lora_A") or module.disable_adapters:
        return [], False
    active = [name for name in module.active_adapters if name in module.lora_A]
    return [module.r[name] for name in active], any(getattr(module.lora_dropout[n], "p", 0.0) > 0 for n in active)


def _logit_bytes(model: Any, targets: int, mixed: torch.dtype | None, device: torch.device) -> int:
    """Bytes of the blocks of logits that exist at a time: in float32, and as they come from a product in less."""
    lm = causal_lm(model)
    weight = _weight(lm.get_output_embeddings())
    rows, entries = BLOCK.get(device.type, BLOCK["cuda"])
    product = (mixed or weight.dtype).itemsize
    blocks = 4 + (product if product < 4 else 0) + (8 if getattr(lm.config, "final_logit_softcapping", None) else 0)
    return min(targets, rows) * min(weight.shape[0], entries) * blocks


def _local(p: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return p.to_local() if isinstance(p, DTensor) else p


def _bytes_here(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, of sharded ones the part that this process has.

    Wherever they lie: Lightning moves all to main memory when a run fails.
    """
    return sum(local.numel() * local.element_size() for local in map(_local, tensors))


def _gathered_bytes(model: Any, offloaded: bool) -> int:
    """Bytes of sharded weights beyond this process's part while a layer runs: those outside the layers, and a layer."""

    def missing(weights: list[nn.Parameter]) -> int:
        return sum(map(_whole_bytes, weights)) - (0 if offloaded else _bytes_here(weights))

    if all(_local(p) is p for p in model.parameters()):
        return 0
    layers = [list(layer.parameters()) for layer in decoder_layers(causal_lm(model))]
    inside = {p for layer in layers for p in layer}
    return missing([p for p in model.parameters() if p not in inside]) + max(map(missing, layers))


def _whole_bytes(p: Any) -> int:
    """Bytes of a weight as this device computes with it: gathered over the data-parallel devices only."""
    local = _local(p)
    size = local.numel() * local.element_size()
    if local is p:
        return size
    names = p.device_mesh.mesh_dim_names or ()
    return size * (p.device_mesh.size(names.index("data_parallel")) if "data_parallel" in names else 1)


def _copied_bytes(model: Any, mixed: torch.dtype) -> int:
    """Bytes of the copies that autocast makes of weights in another format, and keeps until the step is over."""
    linear = {id(_weight(m)): _weight(m) for m in model.modules() if isinstance(m, nn.Linear)}
    head = _weight(causal_lm(model).get_output_embeddings())
    linear[id(head)] = head
    others = [w for w in linear.values() if w.is_floating_point() and w.dtype != mixed]
    return sum(_whole_bytes(w) // w.element_size() * mixed.itemsize for w in others)


def _state_bytes(optimizer: Any) -> int:
    """Bytes of what an optimizer has kept so far."""
    held = getattr(optimizer, "state", None) or {}
    return _bytes_here(value for state in held.values() for value in state.values() if isinstance(value, Tensor))


def _gpu_memory(device: torch.device) -> tuple[int | None, int, int | None]:
    """Bytes that the GPU has, that other processes hold of it, and that PyTorch had allocated at most."""
    try:
        free, total = torch.cuda.mem_get_info(device)
        return total, max(0, total - free - torch.cuda.memory_reserved(device)), torch.cuda.max_memory_allocated(device)
    except RuntimeError:  # even asking takes memory
        return None, 0, None


def resident_bytes() -> int | None:
    """Main memory that this process has now; None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on the GPU, or resident for this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def machine_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of main memory that this process may use, the least of what limits it; None where nothing says so.

    Read are the machine's memory, the control groups' limits (`memory.max` of version 2, `memory.limit_in_bytes` of
    version 1; https://docs.kernel.org/admin-guide/cgroup-v2.html) and the limit of `ulimit -v`.

    Args:
        proc, groups: where Linux says these.
    """
    limits: list[int] = []
    if (found := re.search(r"^MemTotal:\s+(\d+) kB", _read(proc / "meminfo"), re.MULTILINE)) is not None:
        limits.append(int(found[1]) * 1024)
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = groups / "memory" if controllers else groups
        group = mount / path.lstrip("/")
        # In a container the path may be the host's, which is not there; its top folder then is the container's own.
        for folder in (group, *group.parents):
            text = _read(folder / ("memory.limit_in_bytes" if controllers else "memory.max")).strip()
            if text.isdigit():
                limits.append(int(text))
            if folder == mount:
                break
    found = re.search(r"^Max address space\s+(\d+)", _read(proc / "self" / "limits"), re.MULTILINE)
    if found is not None:
        limits.append(int(found[1]))
    return min(limits, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def explain(
    account: Account,
    error: BaseException | None = None,
    *,
    max_tokens: int,
    max_length: int,
    gradient_checkpointing: bool,
    precision: str,
    peft: str,
    r: int | None,
    strategy: str,
    cpu_offload: bool = False,
) -> str:
    """One paragraph for a person: what holds how much, and which settings to lower, those that help most first.

    Args:
        account: of the step that failed.
        error: what was raised; it says how much was asked for.
        max_tokens, max_length: data.max_tokens, data.max_length.
        gradient_checkpointing: model.gradient_checkpointing.
        precision: `bf16-mixed` or `32-true`.
        peft, r: the kind, `lora` or `full`, and the adapter's rank.
        strategy: `auto`, `ddp`, `fsdp` or `fsdp_tp`.
        cpu_offload: strategy.cpu_offload.
    """
    gpu, fp32, full = account.device.startswith("GPU"), precision == "32-true", peft == "full"
    sharded = strategy.startswith("fsdp")
    if sharded:
        shard = ["more devices (trainer.devices)"]
        shard += [] if cpu_offload else ["strategy.cpu_offload=true (slower)"]
    else:
        shard = ["strategy=fsdp and trainer.devices=2 or more"]
    shard = shard if gpu else []  # a CPU's processes share its memory

    activations = []
    if account.examples != 1:
        lower = min(max_tokens, account.tokens or max_tokens) // 2
        activations.append(f"data.max_tokens={lower} (now {max_tokens}, changes no result)")
    if not gradient_checkpointing:
        saved = f", {size_in_words(account.checkpointed)} of activations instead" if account.tokens else ""
        activations.append(f"model.gradient_checkpointing=true (about a third more time{saved})")
    if account.examples == 1:
        lower = min(max_length, account.tokens) // 2
        activations.append(
            f"data.max_length={lower} (now {max_length}): one example alone has {account.tokens} tokens, longer ones "
            "are then dropped or truncated"
        )
    if fp32:
        activations.append("trainer.precision=bf16-mixed")
    trained = ["peft=lora instead of peft=full"] if full else [f"a smaller peft.r (now {r})"] if r else []
    weights = ["trainer.precision=bf16-mixed (now 32-true, halves the frozen weights)"] if fp32 and not full else []
    advice = {
        "activations": activations,
        "weights": [*weights, *(trained if full else []), *shard, "a smaller model (model.id)"],
        "optimizer": [*trained, *shard],
        "gradients": [*trained, *shard],
        "logits": activations,
    }
    parts = account.parts
    if not account.tokens:  # it failed before the first batch was through: what that takes is not known
        chosen = list(parts)[:1]
    else:
        chosen = [name for name, size in parts.items() if size >= _WORTH * account.sum]
    settings: list[str] = []
    for name in chosen:
        known = {setting.split(" (")[0] for setting in settings}
        settings += [setting for setting in advice[name] if setting.split(" (")[0] not in known]
    if not account.tokens and "activations" not in chosen:
        settings += activations[:1]
    where, has = (
        (f"memory on the {account.device}", "which has") if gpu else ("main memory", "of which a process may use")
    )
    has = f", {has} {size_in_words(account.total)}" if account.total is not None else ""
    asked = f"; {wanted} more were asked for" if (wanted := _asked(error)) else ""
    lines = [f"Out of {where}{has}{asked}."]
    of = f" over {account.tokens:,} tokens" if account.tokens else ", what its first batch takes not counted,"
    lines.append(f"A training step{of} holds about {size_in_words(account.sum)}: {_listed(account)}.")
    if account.peak:
        lines.append(f"PyTorch had allocated {size_in_words(account.peak)} at most.")
    if account.total is not None and account.others > account.total / 20:
        lines.append(f"Other processes hold {size_in_words(account.others)} of this GPU.")
    lines.append(f"Lower, what helps most first: {'; '.join(settings)}.")
    return " ".join(lines)


def _listed(account: Account) -> str:
    """The parts, the largest first, with what weights consist of."""
    names = {"logits": "logits (one block)", "optimizer": "optimizer states"}
    said = {name: f"{names.get(name, name)} {size_in_words(size)}" for name, size in account.parts.items() if size}
    if account.weights:
        kinds = {
            "frozen": account.frozen,
            "trained": account.trained,
            "gathered from other devices": account.gathered,
            "copies for mixed precision": account.copies,
        }
        said["weights"] += f" ({', '.join(f'{name} {size_in_words(size)}' for name, size in kinds.items() if size)})"
    return ", ".join(said.values())


def size_in_words(size: int) -> str:
    """Bytes in words: 1.5 GiB, 12 MiB, 0.3 MiB."""
    mib = size / 2**20
    if mib >= 1024:
        return f"{mib / 1024:,.1f} GiB"
    return f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def _asked(error: BaseException | None) -> str | None:
    """How much the failed allocation wanted, as the error has it."""
    text = str(error or "")
    if (found := re.search(r"tried to allocate (\d+) bytes", text)) is not None:
        return size_in_words(int(found[1]))
    found = re.search(r"Tried to allocate ([\d.]+ [KMGT]iB)", text)
    return found[1] if found else None
