"""How much memory a training step will take, found by rehearsing it with tensors that have sizes and no content.

The step is run as it is: the model's own code, the attention of `lit_ft.models.attention`, the loss, the backward pass;
and so is the making of completions, where an algorithm learns from its own.
Its tensors are PyTorch's fake ones (`torch._subclasses.fake_tensor`), and what is alive is counted operation by
operation, as `torch.distributed._tools.mem_tracker` does. So no formula has to know an architecture or an adapter.
What operations take inside themselves is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_ft.batches import Batch, Example
from lit_ft.losses.logprobs import BLOCK
from lit_ft.models.adapt import causal_lm
from lit_ft.models.attention import PACKED, Plan, register_packed_attention
from lit_ft.models.roles import POLICY, using
from lit_ft.models.score import score
from lit_ft.models.shard import decoder_layers

# The parts, in the order in which they are shown.
PARTS = (
    "weights",
    "adapters",
    "copies",
    "gathered",
    "gradients",
    "optimizer",
    "allocator of ranks",
    "activations",
    "holes",
    "log-probabilities",
    "backward pass",
    "keys and values",
    "reference",
    "rows",
    "tokenizer",
)
# Bytes to which each allocator rounds up.
_ROUNDED = {"cpu": 64, "cuda": 512}
# Bytes of holes per byte of activations without checkpointing, measured on a CPU with glibc 2.36: what an operation
# needed meanwhile and gave back is a hole that is not given to the next aligned block of the same size, for which
# `memalign` wants some bytes more. Later stages fill the holes. On a GPU see `_SPARE`.
_HOLES = {"cpu": 0.5, "cuda": 0.0}
_COMPLETIONS = "making completions"
_FILLED = ("backward pass of the middle layer", "backward pass of the first layer", "optimizer step", _COMPLETIONS)
# What CUDA itself takes on a GPU, and the share that its allocator should have to spare.
_OF_CUDA, _SPARE = 0.7 * 2**30, 0.08
# Bytes of a token id in Python's lists: a pointer and, above 256, an integer of its own; and of what its mask says.
_TOKEN, _MASK = 8 + 32, 8
# What a model hears that asks for a number where there is none: OPT, whether to leave out a layer.
_ANSWER = {True: 0.0, False: 0}


@dataclass(frozen=True)
class Setting:
    """Where and how a step would run.

    Attributes:
        device: `cpu` or `cuda`, whether there is one or not.
        mixed: bf16 mixed precision (frozen weights in bf16), else float32 throughout.
        checkpointing: gradient checkpointing.
    """

    device: str = "cpu"
    mixed: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a training step holds on one device at its fullest moment.

    Attributes:
        device: `cpu` or `cuda`.
        parts: bytes, by part (see `PARTS`).
        moment: which one it is.
    """

    device: str
    parts: dict[str, int]
    moment: str

    @property
    def sum(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def wanted(self) -> int:
        """Bytes that a device should have: on a GPU also what CUDA takes, and something to spare."""
        return self.sum if self.device == "cpu" else round(self.sum * (1 + _SPARE) + _OF_CUDA)

    def fits(self, size: int) -> bool:
        """Whether a device with so many bytes has room for it."""
        return self.wanted <= size


@dataclass(frozen=True)
class Rehearsal:
    """What a step of one model over one batch was found to hold.

    Attributes:
        setting: where and how it was rehearsed.
        moments: bytes by part at the fullest moment of each stage, beside weights and optimizer.
        frozen, adapters, whole: bytes of weights: frozen, trained beside them, or trained without any that are frozen.
        numbers, largest: how many numbers are trained, in all and in the largest weight.
        gathered: bytes of sharded weights that are whole at a time.
        allocator: bytes that AdaLoRA's allocator of ranks keeps.
        activations: bytes of activations at most, had nothing been checkpointed.
    """

    setting: Setting
    moments: dict[str, Counter[str]]
    frozen: int
    adapters: int
    whole: int
    numbers: int
    largest: int
    gathered: int
    allocator: int
    activations: int

    def estimate(
        self,
        shards: int = 1,
        *,
        offloaded: bool = False,
        rows: int = 0,
        reference: int = 0,
        tokenizer: int = 0,
        stored: int = 0,
    ) -> Estimate:
        """What one device holds.

        Args:
            shards: over how many devices weights, gradients and optimizer states are divided (FSDP).
            offloaded: the shards stay in main memory (strategy.cpu_offload).
            rows: bytes of the examples, which lie in main memory.
            reference, tokenizer: bytes of the reference's log-probabilities and of the tokenizer, which lie there, too.
            stored: bytes of the weights' files, where they are of another format than the model's.
        """
        device, share = self.setting.device, 0.0 if offloaded else 1 / shards
        always = {
            "weights": share * (self.frozen + self.whole),
            "adapters": share * self.adapters,
            "gathered": self.gathered * (1 - share) if shards > 1 else 0,
            "optimizer": share * 2 * 4 * self.numbers,
            "allocator of ranks": self.allocator,
            "reference": reference if device == "cpu" else 0,
            "rows": rows if device == "cpu" else 0,
            "tokenizer": tokenizer if device == "cpu" else 0,
        }
        # AdamW makes two numbers for each of one weight on a CPU; on a GPU one for each of all weights, at once.
        scratch = share * (2 * 4 * self.largest if device == "cpu" else 4 * self.numbers)
        copies = max(parts["copies"] for parts in self.moments.values())
        stages = {
            **self.moments,
            "optimizer step": Counter(
                {"gradients": 4 * self.numbers, "copies": copies, "backward pass": round(scratch)}
            ),
        }

        def held(stage: str, parts: Counter[str]) -> dict[str, int]:
            found = {part: always.get(part, 0) + parts[part] * (share if part == "gradients" else 1) for part in PARTS}
            found["holes"] = 0 if stage.startswith(_FILLED) else _HOLES[device] * self.activations
            return {part: round(size) for part, size in found.items()}

        by_stage = {stage: held(stage, parts) for stage, parts in stages.items()}
        if device == "cpu":  # all of a file is mapped while its weights are brought into another format
            early = {"weights": self.frozen + self.whole, "copies": stored, "rows": rows, "tokenizer": tokenizer}
            by_stage["loading the weights"] = {part: early.get(part, 0) for part in PARTS}
        fullest = max(by_stage, key=lambda stage: sum(by_stage[stage].values()))
        return Estimate(device, by_stage[fullest], fullest)


# What a pass computes: for each role on the base, in turn, the tensor that the loss reads. All are computed before the
# first is backpropagated, as PPO does.
Passes = Mapping[str, Callable[[Any, Batch], Tensor]]


def _logprobs(model: Any, batch: Batch) -> Tensor:
    return score(model, batch).logprobs


LOGPROBS: Passes = {POLICY: _logprobs}


def rehearse(
    model: Any,
    batch: Batch,
    setting: Setting,
    *,
    accumulates: bool = False,
    penalty: Callable[[Any], Tensor | None] | None = None,
    four_bits: bool = False,
    allocates_ranks: bool = False,
    passes: Passes = LOGPROBS,
    heads: nn.Module | None = None,
) -> Rehearsal:
    """Rehearse a training step of `model` over `batch`.

    Args:
        model: with its adapters, on the meta device; it is left as it was.
        batch: the largest that a pass gets.
        setting: where and how.
        accumulates: a step has several passes, so that gradients are there when the next one begins.
        penalty: of the model, added to the loss.
        four_bits: the frozen weights of linear layers are kept in 4 bits (QLoRA).
        allocates_ranks: AdaLoRA keeps two averages for each trained number.
        passes: what is computed and backpropagated.
        heads: what `passes` use beside the model, on the meta device, too.

    Raises:
        Exception: whatever the model's code says to tensors without content.
    """
    lm = causal_lm(model)

    def moments_in(setting: Setting) -> Moments:
        return _moments(lm, lambda: _rehearse(model, lm, batch, setting, accumulates, penalty, passes, heads))

    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = [size for size, grows in sizes if grows]
    full = len(trained) == len(sizes)
    with _cast(model, torch.bfloat16 if setting.mixed else torch.float32):
        moments = moments_in(setting)
        whole = moments
        if setting.checkpointing and setting.device == "cpu":
            whole = moments_in(replace(setting, checkpointing=False))
        if four_bits:
            _as_numbers(moments, model)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        frozen = 0 if full else weights - 4 * sum(trained) - (_saved_by_four_bits(model) if four_bits else 0)
        gathered = _gathered(model, lm)
    return Rehearsal(
        setting,
        moments,
        frozen=frozen,
        adapters=0 if full else 4 * sum(trained),
        whole=weights if full else 0,
        numbers=sum(trained),
        largest=max(trained),
        gathered=gathered,
        allocator=2 * 4 * sum(trained) if allocates_ranks else 0,
        activations=max(parts["activations"] for parts in whole.values()),
    )


def with_completions(
    rehearsal: Rehearsal,
    model: Any,
    *,
    rows: int,
    width: int,
    more: int,
    temperature: float = 1.0,
    four_bits: bool = False,
) -> Rehearsal:
    """`rehearsal` of an update, and before it the making of completions by the model itself (`rollout=transformers`).

    Args:
        model: as it was rehearsed.
        rows, width: of the largest batch of prompts.
        more: tokens that each row gets.
        temperature: of sampling.
        four_bits: as of `rehearse`.
    """
    lm, setting = causal_lm(model), rehearsal.setting
    with _cast(model, torch.bfloat16 if setting.mixed else torch.float32):
        moments = _moments(lm, lambda: _complete(model, lm, setting, rows, width, more, temperature))
    if four_bits:
        _as_numbers(moments, model)
    # Those of the last update are there until the next one begins.
    gradients = Counter({"gradients": 4 * rehearsal.numbers})
    made = {f"{_COMPLETIONS}: {stage}": parts + gradients for stage, parts in moments.items()}
    return replace(rehearsal, moments={**rehearsal.moments, **made})


def _complete(model: Any, lm: Any, setting: Setting, rows: int, width: int, more: int, temperature: float) -> Moments:
    """What is held while prompts are read, and while the last token is drawn: the caches are longest then."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import DynamicCache

    from lit_ft.rollouts.base import Sampling
    from lit_ft.rollouts.transformers import Drawn, generating

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    held = _Held(_ROUNDED[setting.device])
    drawn = Drawn([0] * rows, Sampling(temperature, 2), torch.device("cpu"))  # twice below

    class Cache(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            with held.making("keys and values"):
                return super().update(*args, **kwargs)

    def forward(tokens: int, cache: Any) -> Any:
        before = cache.get_seq_length()
        return lm(
            input_ids=torch.empty(rows, tokens, dtype=torch.long),
            attention_mask=torch.empty(rows, before + tokens, dtype=torch.long),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    with ExitStack() as stack:
        stack.enter_context(generating(model, lm.generation_config))
        stack.enter_context(_as_fake(model, mode))
        stack.enter_context(mode)
        held.weights = {id(p) for p in model.parameters()}
        held.known |= {p.untyped_storage()._cdata for p in model.parameters()}
        stack.enter_context(held)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=setting.mixed))
        for stage, read in (("reading prompts", 0), ("drawing the last token", width + more - 2)):
            cache = Cache()
            held.enter("between", "activations")
            if read:
                forward(read, cache)
            held.enter(stage, "activations")
            logits = forward(1 if read else width, cache)
            held.enter(f"{stage}, logits", "activations")
            drawn(torch.empty(0), logits.float())
            held.enter("between", "activations")
            del logits, cache
    return {stage: parts for stage, parts in held.fullest.items() if stage != "between"}


def bytes_of_rows(examples: Sequence[Example]) -> int:
    """Bytes of examples in main memory, as Python keeps them."""
    return sum(
        _TOKEN * (len(e.prompt) + sum(len(c.ids) for c in e.completions))
        + _MASK * sum(len(c.ids) for c in e.completions)
        for e in examples
    )


def _in_four_bits(model: Any) -> list[Tensor]:
    """The weights that QLoRA keeps in 4 bits: of all linear layers but adapters and that which makes logits."""
    from transformers.pytorch_utils import Conv1D

    head = causal_lm(model).get_output_embeddings()
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and ".lora_" not in name
    ]
    return [module.weight for module in linear if not module.weight.requires_grad]


def _saved_by_four_bits(model: Any) -> int:
    """Bytes less: NF4 has half a byte per number, and 0.127 bits for its constants (arXiv:2305.14314, section 3)."""
    return sum(round(w.numel() * (w.element_size() - (4 + 0.127) / 8)) for w in _in_four_bits(model))


def _as_numbers(moments: Moments, model: Any) -> None:
    """Add the largest weight in 4 bits, which are numbers one at a time, to the stages that multiply by them."""
    largest = max((w.numel() * w.element_size() for w in _in_four_bits(model)), default=0)
    for stage, parts in moments.items():
        if stage.startswith(("forward pass", "reading prompts", "drawing")):
            parts["activations"] += largest
        elif stage.startswith("backward pass"):
            parts["backward pass"] += largest


def _gathered(model: Any, lm: Any) -> int:
    """Bytes of the weights that are whole at a time: what lies outside the layers, the layer that runs, and the next,
    which is fetched meanwhile.
    """
    layers = [list(layer.parameters()) for layer in decoder_layers(lm)]
    inside = {id(p) for layer in layers for p in layer}
    outside = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside)
    return outside + 2 * max(sum(p.numel() * p.element_size() for p in layer) for layer in layers)


@contextmanager
def _cast(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """The base's frozen weights in `dtype` for a while; all else keeps its format."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = {
        id(p)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name, p in layer.named_parameters()  # type: ignore[attr-defined]
        if not name.startswith("base_layer.")
    }
    before = [(p, p.data) for p in model.parameters() if not p.requires_grad and id(p) not in adapters]
    try:
        for p, data in before:
            p.data = data.to(dtype)
        yield
    finally:
        for p, data in before:
            p.data = data


Moments = dict[str, Counter[str]]


def _moments(lm: Any, held: Callable[[], Moments]) -> Moments:
    """`held()`: what is held at the fullest moment of each stage of a pass, beside weights and optimizer.

    Layers that are alike need not all be rehearsed: what is held is then linear in their number, stage by stage.
    """
    layers = decoder_layers(lm)
    if len(layers) <= 3 or not _alike(layers):
        return held()
    few, more = (_with_layers(lm, count, held) for count in (2, 3))
    beyond = len(layers) - 2
    return {
        stage: Counter({part: few[stage][part] + beyond * (parts[part] - few[stage][part]) for part in PARTS})
        for stage, parts in more.items()
        if stage in few
    }


def _alike(layers: Sequence[nn.Module]) -> bool:
    def signature(layer: nn.Module) -> list[Any]:
        named = [(name, p.shape, p.requires_grad) for name, p in layer.named_parameters()]
        return [type(layer), named, getattr(layer, "attention_type", None)]

    return all(signature(layer) == signature(layers[0]) for layer in layers[1:])


def _with_layers(lm: Any, count: int, action: Callable[[], Any]) -> Any:
    """`action()` while the model has only its first `count` layers."""
    layers = decoder_layers(lm)
    for parent in lm.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == len(layers) and child[0] is layers[0]:
                setattr(parent, name, nn.ModuleList(layers[:count]))
                try:
                    return action()
                finally:
                    setattr(parent, name, child)
    raise ValueError(f"the layers of {type(lm).__name__} stand in no list")


def _rehearse(
    model: Any,
    lm: Any,
    batch: Batch,
    setting: Setting,
    accumulates: bool,
    penalty: Callable[[Any], Tensor | None] | None,
    passes: Passes = LOGPROBS,
    heads: nn.Module | None = None,
) -> Moments:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    held = _Held(_ROUNDED[setting.device])
    layers = decoder_layers(lm)
    with ExitStack() as stack:
        stack.enter_context(_as_fake(model, mode))
        if heads is not None:
            stack.enter_context(_as_fake(heads, mode))
        stack.enter_context(_trained_as(model, lm, setting))
        stack.enter_context(mode)
        fake = replace(batch, **{k: _fake(v, mode) for k, v in batch.__dict__.items() if isinstance(v, Tensor)})
        trained = [p for p in model.parameters() if p.requires_grad]
        held.weights = {id(p) for p in model.parameters()}
        held.known |= {p.untyped_storage()._cdata for p in model.parameters()}
        hooks = [p.register_post_accumulate_grad_hook(held.is_gradient) for p in trained]
        hooks += _marking(lm, layers, held)
        stack.callback(lambda: [hook.remove() for hook in hooks])
        stack.enter_context(held)
        if accumulates:
            for p in trained:
                p.grad = torch.empty_like(p)
                held.is_gradient(p)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.mixed):
            losses = {}
            for role, compute in passes.items():
                held.whose = "" if role == POLICY else f" of the {role} model"
                held.enter(f"forward pass{held.whose}", "activations")
                with using(model, role):
                    losses[role] = compute(model, fake).sum()
            for role, loss in losses.items():
                held.whose = "" if role == POLICY else f" of the {role} model"
                held.enter(f"log-probabilities backward{held.whose}", "log-probabilities")
                if role == POLICY and penalty is not None and (more := penalty(model)) is not None:
                    loss = loss + more
                with using(model, role):  # whose layers run again where they were checkpointed
                    loss.backward()
        held.enter("between", "backward pass")
        losses.clear()
        del loss
        for p in trained:
            p.grad = None
    held.fullest.pop("between", None)
    return held.fullest


class _Held(TorchDispatchMode):
    """Bytes of the tensors that are alive, by part; and the fullest moment of each stage.

    Attributes:
        fullest: what was held then, by stage.
        known: storages that are counted already or not to be counted.
        weights: ids of the parameters.
        whose: the pass that runs, where it is not the policy's; ends the names of stages.
    """

    def __init__(self, rounded: int) -> None:
        super().__init__()
        self.rounded = rounded
        self.fullest: dict[str, Counter[str]] = {}
        self.known: set[int] = set()
        self.weights: set[int] = set()
        self.whose = ""
        self._now: Counter[str] = Counter()
        self._part: dict[int, str] = {}
        self._all = self._most = 0
        self._stage, self._new = "between", "activations"

    def enter(self, stage: str, new: str) -> None:
        """Begin a stage, in which what is made belongs to the part `new`."""
        self._stage, self._new, self._most = stage, new, 0
        self._note()

    @contextmanager
    def making(self, part: str) -> Iterator[None]:
        """What is made within belongs to `part`, whatever the stage's is."""
        before, self._new = self._new, part
        try:
            yield
        finally:
            self._new = before

    def is_gradient(self, p: Tensor) -> None:
        """What was counted as something else is the gradient of a weight."""
        if p.grad is None:
            return
        storage = p.grad.untyped_storage()
        if (before := self._part.get(storage._cdata)) is not None:
            size = self._size(storage)
            self._now[before] -= size
            self._now["gradients"] += size
            self._part[storage._cdata] = "gradients"

    def _size(self, storage: Any) -> int:
        return -(-storage.nbytes() // self.rounded) * self.rounded

    def _note(self) -> None:
        if self._all >= self._most:
            self._most = self._all
            self.fullest[self._stage] = self._now.copy()

    def _gone(self, key: int, size: int) -> None:
        self._now[self._part.pop(key)] -= size
        self._all -= size
        self.known.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and type(args[0]) is not Tensor:
            return _ANSWER[args[0].dtype.is_floating_point]
        out = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten._to_copy.default and id(args[0]) in self.weights
        new = 0
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.known:
                size = self._size(storage)
                self.known.add(key)
                self._part[key] = "copies" if copied else self._new
                self._now[self._part[key]] += size
                new += size
                weakref.finalize(storage, self._gone, key, size)
        if new:
            self._all += new
            self._note()
        return out


def _marking(lm: Any, layers: Sequence[nn.Module], held: _Held) -> list[Any]:
    """Hooks that tell `held` which stage of a pass it is."""

    def ended(*_: Any) -> None:
        held.enter(f"log-probabilities{held.whose}", "log-probabilities")

    def marked(stage: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if hidden.requires_grad:
                whose = held.whose
                hidden.register_hook(lambda grad: held.enter(stage + whose, "backward pass"))

        return hook

    hooks = [lm.base_model.register_forward_hook(ended)]
    for number, layer in enumerate(layers):
        place = "last" if number == len(layers) - 1 else "first" if number == 0 else "middle"
        hooks.append(layer.register_forward_hook(marked(f"backward pass of the {place} layer")))
    return hooks


def _fake(tensor: Tensor, mode: Any) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensor

    return FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))


@contextmanager
def _as_fake(model: nn.Module, mode: Any) -> Iterator[None]:
    """Parameters and buffers that say they are on the CPU, and have no content; tied ones stay tied."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Any] = {}
    try:
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    if id(p) not in made:
                        made[id(p)] = nn.Parameter(_fake(p, mode), requires_grad=p.requires_grad)
                    before.append((module._parameters, name, p))
                    module._parameters[name] = made[id(p)]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    before.append((module._buffers, name, buffer))
                    module._buffers[name] = _fake(buffer, mode)
        yield
    finally:
        for where, name, tensor in reversed(before):
            where[name] = tensor


@contextmanager
def _trained_as(model: Any, lm: Any, setting: Setting) -> Iterator[None]:
    """The model in training, its checkpointing and its attention as `setting` has them."""
    from transformers import AttentionInterface

    was_training, was_checkpointing = model.training, bool(getattr(lm, "is_gradient_checkpointing", False))
    attention, block = lm.config._attn_implementation, BLOCK["cpu"]

    def checkpoint(on: bool) -> None:
        if on:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            lm.gradient_checkpointing_disable()

    try:
        model.train()
        if setting.checkpointing != was_checkpointing:
            checkpoint(setting.checkpointing)
        if setting.device == "cuda":
            BLOCK["cpu"] = BLOCK["cuda"]
            if attention == PACKED and setting.mixed:
                AttentionInterface.register(PACKED, _gpu_attention)
        yield
    finally:
        BLOCK["cpu"] = block
        if attention == PACKED:
            register_packed_attention()
        if setting.checkpointing != was_checkpointing:
            checkpoint(was_checkpointing)
        model.train(was_training)


def _gpu_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, plan: Plan, **others: Any
) -> tuple[Tensor, None]:
    """What `varlen_cuda` holds, without its kernel: query, gathered keys and values, output and log-sum-exp."""
    dtype = torch.get_autocast_dtype("cpu")
    queries, keys, values = (t.to(dtype)[0].transpose(0, 1).contiguous() for t in (query, key, value))
    seen = sum(end - start for ranges in plan.ancestors for start, end in ranges) + len(queries)
    if seen > len(queries):
        index = torch.empty(seen, dtype=torch.long)
        keys, values = keys.index_select(0, index), values.index_select(0, index)
    return _Kernel.apply(queries, keys, values)[None], None


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
