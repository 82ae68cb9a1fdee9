"""What used the memory: estimates against what autograd really keeps, exact sizes, and real failures explained."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_ft.batches import Batch, Completion, Example, pack, pad
from lit_ft.models.kinds.full import train_all
from lit_ft.models.kinds.lora import apply_lora
from lit_ft.models.score import score, use_packed_attention
from lit_ft.modules import SFTModule
from lit_ft.resources.memory import Account, account, explain, is_out_of_memory, machine_memory
from tests import tiny
from tests.conftest import Outcome

GIB = 2**30


# Which errors these are.


def error_of(action: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as raised:
        action()
    return raised.value


@pytest.mark.parametrize("action", [lambda: torch.empty(1 << 60), lambda: bytearray(1 << 60)])
def test_real_failures_are_recognised(action: Callable[[], Any]) -> None:
    assert is_out_of_memory(error_of(action))


def test_those_of_gpu_and_system_are_recognised_and_others_are_not() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))
    assert not is_out_of_memory(error_of(lambda: torch.ones(2) @ torch.ones(3)))
    assert not is_out_of_memory(KeyboardInterrupt())


# The estimate of activations.


def batch_of(rows: int, tokens: int, *, padded: bool = False) -> Batch:
    """Rows of `tokens` tokens, the second half of which is predicted."""
    generator = torch.Generator().manual_seed(0)
    half = tokens // 2

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 260, (count,), generator=generator).tolist())

    examples = [Example(ids(tokens - half), (Completion(ids(half), (True,) * half),), k) for k in range(rows)]
    return pad(examples, 3) if padded else pack(examples)


def llama(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, attention: str | None = None) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=500,
        attn_implementation=attention,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def small() -> Any:
    return llama(128, 4, 4, 2, 352)


def medium() -> Any:
    return llama(512, 8, 8, 4, 1408)


def trained(model: Any, how: str) -> Any:
    """`how` in words: lora or full, and dropout, padded, bf16, checkpointing."""
    words = how.split()
    if "bf16" in words and "full" not in words:
        model = model.bfloat16()
    if "checkpointing" in words:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    targets = ["q_proj", "v_proj"] if "attention" in words else "all-linear"
    dropout = 0.1 if "dropout" in words else 0.0
    model = train_all(model) if "full" in words else apply_lora(model, r=8, dropout=dropout, target_modules=targets)
    if "padded" not in words:
        assert use_packed_attention(model) is None
    return model.train()


def saved_bytes(model: Any, batch: Batch, mixed: bool) -> int:
    """Bytes of distinct storages that autograd keeps of a forward pass, beside the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held = []  # so that no storage's address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        score(model, batch)
    return sum(kept.values())


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (small, "lora"),
        (medium, "lora"),
        (small, "lora attention"),
        (small, "lora dropout"),
        (medium, "lora dropout"),
        (small, "full"),
        (medium, "full"),
        (small, "lora padded"),
        (small, "lora bf16"),
        (small, "lora dropout bf16"),
        (small, "full bf16"),
        (lambda: llama(128, 4, 4, 2, 352, "eager"), "lora padded"),
        (lambda: tiny.model("qwen2"), "lora"),
        (lambda: tiny.model("opt"), "lora"),
        (lambda: tiny.model("opt"), "full"),
        (lambda: tiny.model("gpt2"), "lora"),
        (lambda: tiny.model("gpt2"), "full"),
    ],
)
def test_the_estimate_is_what_autograd_keeps(make: Callable[[], Any], how: str) -> None:
    model, mixed = trained(make(), how), "bf16" in how
    batch = batch_of(2, 64, padded="padded" in how)
    found = account(model, None, batch, mixed=torch.bfloat16 if mixed else None)
    # Copies of weights for mixed precision are kept like activations, but counted with the weights.
    copies = found.copies if "full" in how else 0
    assert found.activations + copies == pytest.approx(saved_bytes(model, batch, mixed), rel=0.2)


class Alive(TorchDispatchMode):
    """The most bytes that tensors made inside this mode had at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self._known.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not isinstance(tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
        return out


@pytest.mark.parametrize("make", [small, medium])
def test_with_checkpointing_the_estimate_is_the_peak_of_the_whole_step(make: Callable[[], Any]) -> None:
    """Hooks do not see what is computed again; here gradients are in the peak, too, and what an operation needs."""
    model, batch = trained(make(), "lora checkpointing"), batch_of(2, 64)
    with Alive() as alive:
        alive._known |= {p.untyped_storage()._cdata for p in model.parameters()}
        score(model, batch).logprobs.sum().backward()
    found = account(model, None, batch)
    assert found.activations == found.checkpointed
    assert found.activations + found.gradients + found.logits == pytest.approx(alive.peak, rel=0.3)


# Sizes that are exact.


def test_weights_gradients_and_states() -> None:
    model = trained(small(), "lora")
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    base = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = account(model, optimizer, None)
    assert (before.frozen, before.trained, before.gradients) == (4 * base, 4 * lora, 4 * lora)
    assert before.optimizer == 8 * lora, "what AdamW will take"
    assert (before.activations, before.logits, before.tokens, before.gathered, before.copies) == (0, 0, 0, 0, 0)
    score(model, batch_of(1, 20)).logprobs.sum().backward()
    optimizer.step()
    tensors = len(optimizer.state)
    assert account(model, optimizer, None).optimizer == 8 * lora + 4 * tensors, "a step counter for each"


def test_logits_are_a_block_at_most() -> None:
    model = trained(small(), "lora")
    assert account(model, None, batch_of(1, 20)).logits == 10 * 500 * 4
    many = batch_of(3, 1000)
    assert account(model, None, many).logits == 512 * 500 * 4


def test_sharded_weights_count_where_they_lie() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lit_ft.models.shard import shard

    model = trained(small(), "lora")
    whole = account(model, None, None)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        shard(model, mesh, lambda m, b: None)
        half = account(model, None, None)
        off = account(model, None, None, offloaded=True)
    finally:
        dist.destroy_process_group()
    assert (half.frozen, half.trained) == (whole.frozen // 2, whole.trained // 2)
    assert (half.gradients, half.optimizer) == (whole.gradients // 2, whole.optimizer // 2)
    # Beyond the half held: half of one layer of four, and of what lies outside the layers.
    outside = 2 * 500 * 128 * 4 + 128 * 4
    assert half.gathered == ((whole.frozen + whole.trained - outside) // 4 + outside) // 2
    assert (off.frozen, off.trained, off.gradients, off.optimizer) == (0, 0, 0, 0)
    assert off.gathered == 2 * half.gathered


def test_the_least_limit_of_main_memory_holds(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    assert machine_memory(proc, groups) is None
    (proc / "meminfo").write_text("MemTotal:       16384 kB\nMemFree: 12 kB\n")
    assert machine_memory(proc, groups) == 16384 * 1024
    (groups / "a" / "b").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    (groups / "a" / "memory.max").write_text("4194304\n")
    (groups / "a" / "b" / "memory.max").write_text("max\n")
    assert machine_memory(proc, groups) == 4194304
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("2097152\n")
    (proc / "self" / "cgroup").write_text("4:cpu:/x\n3:memory:/a\n")
    assert machine_memory(proc, groups) == 2097152
    (proc / "self" / "limits").write_text("Max address space         1048576     unlimited    bytes\n")
    assert machine_memory(proc, groups) == 1048576


# What a person is told.

NOTHING = Account(0, 0, 0, 0, 0, 0, 0, 0, 0, device="GPU (X)", tokens=4096, examples=8, total=24 * GIB)
USUAL: dict[str, Any] = {
    "max_tokens": 4096,
    "max_length": 1024,
    "gradient_checkpointing": False,
    "precision": "bf16-mixed",
    "peft": "lora",
    "r": 16,
    "strategy": "auto",
}


def advice(account: Account, **settings: Any) -> list[str]:
    text = explain(account, **{**USUAL, **settings})
    return text.split("helps most first: ")[1].removesuffix(".").split("; ")


def test_the_whole_paragraph() -> None:
    used = replace(
        NOTHING, frozen=6 * GIB, trained=GIB // 8, gradients=GIB // 8, optimizer=GIB // 4, activations=20 * GIB
    )
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of …")
    assert explain(replace(used, checkpointed=2 * GIB, logits=3 * 2**17, peak=23 * GIB), error, **USUAL) == (
        "Out of memory on the GPU (X), which has 24.0 GiB; 1.50 GiB more were asked for. "
        "A training step over 4,096 tokens holds about 26.5 GiB: activations 20.0 GiB, "
        "weights 6.1 GiB (frozen 6.0 GiB, trained 128 MiB), optimizer states 256 MiB, gradients 128 MiB, "
        "logits (one block) 0.4 MiB. PyTorch had allocated 23.0 GiB at most. "
        "Lower, what helps most first: data.max_tokens=2048 (now 4096, changes no result); "
        "model.gradient_checkpointing=true (about a third more time, 2.0 GiB of activations instead); "
        "strategy=fsdp and trainer.devices=2 or more; a smaller model (model.id)."
    )


def test_activations() -> None:
    used = replace(NOTHING, activations=10 * GIB)
    assert [line.split(" ")[0] for line in advice(used)] == [
        "data.max_tokens=2048",
        "model.gradient_checkpointing=true",
    ]
    assert len(advice(used, gradient_checkpointing=True)) == 1, "not advised where it is so already"
    assert advice(used, gradient_checkpointing=True, precision="32-true")[1] == "trainer.precision=bf16-mixed"
    # Half of a budget that no batch fills would change nothing.
    assert advice(used, max_tokens=1_000_000)[0].startswith("data.max_tokens=2048 (now 1000000")


def test_one_example_too_long_for_any_budget() -> None:
    alone = replace(NOTHING, activations=10 * GIB, examples=1, tokens=6000)
    said = advice(alone, max_length=8192)
    assert not any("max_tokens" in line for line in said)
    assert said[-1].startswith("data.max_length=3000 (now 8192)")


def test_weights() -> None:
    used = replace(NOTHING, frozen=30 * GIB, activations=GIB)
    assert advice(used) == ["strategy=fsdp and trainer.devices=2 or more", "a smaller model (model.id)"]
    assert advice(used, precision="32-true")[0].startswith("trainer.precision=bf16-mixed")
    assert advice(used, strategy="fsdp")[:2] == [
        "more devices (trainer.devices)",
        "strategy.cpu_offload=true (slower)",
    ]
    assert advice(used, strategy="fsdp", cpu_offload=True)[1] == "a smaller model (model.id)"
    assert advice(replace(used, device="CPU")) == ["a smaller model (model.id)"], "processes share a CPU's memory"


def test_optimizer_and_gradients() -> None:
    full = replace(NOTHING, trained=4 * GIB, gradients=4 * GIB, optimizer=8 * GIB)
    said = advice(full, peft="full", r=None)
    assert said[0] == "peft=lora instead of peft=full" and len(said) == len(set(said))
    assert not any("peft.r" in line or "precision" in line for line in said)
    assert advice(replace(full, trained=0))[0] == "a smaller peft.r (now 16)"


def test_before_the_first_batch_and_beside_others() -> None:
    early = replace(NOTHING, frozen=10 * GIB, tokens=0, examples=0, others=20 * GIB)
    text = explain(early, **USUAL)
    assert "what its first batch takes not counted" in text and "Other processes hold 20.0 GiB" in text
    assert "data.max_tokens=2048" in text and "a smaller model" in text


# Through the command line.


@pytest.fixture
def undone() -> Iterator[None]:
    """A run sets torch's number of threads for its whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    gc.collect()


def test_a_run_that_runs_out_says_what_used_the_memory(
    cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, undone: None
) -> None:
    """The third batch really asks the allocator for a pebibyte; nothing is published."""
    usual, steps = SFTModule.step, []

    def step(self: Any, batch: Batch, total: int) -> Any:
        steps.append(batch)
        if len(steps) == 3:
            torch.empty(1 << 50, dtype=torch.uint8)
        return usual(self, batch, total)

    monkeypatch.setattr(SFTModule, "step", step)
    outcome = cli(
        "+experiment=sft",
        f"model.id={llama_folder}",
        "data.max_rows=8",
        "data.max_val_rows=2",
        "data.batch_size=2",
        "trainer.max_steps=4",
        "trainer.progress=false",
        "logger=none",
    )
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    text = " ".join(outcome.err.split("error: ", 1)[1].split())
    assert (
        text.startswith("Out of main memory, of which a process may use ")
        and "1,048,576.0 GiB more were asked for" in text
    )
    assert "A training step over " in text and "activations " in text and "weights " in text
    assert "data.max_tokens=" in text or "data.max_length=" in text
    assert "model.gradient_checkpointing=true" in text and "strategy=fsdp" not in text
    assert not list(Path("adapters").glob("**/*"))
