"""Sharded models in two and four real processes: who holds what, when it is gathered, and that gradients are right.

    python -m tests.lit_ft.models.test_shard FOLDER

imports everything once and forks twice: two processes run every function of `PAIR`, four those of `QUAD`, in order.
Each returns a dict, and the dicts of all processes are written into FOLDER as JSON, which the tests below look at.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_ft.batches import Batch, Completion, Example, pack
from lit_ft.losses.sft import sft_loss
from lit_ft.models.adapt import causal_lm
from lit_ft.models.kinds.full import train_all
from lit_ft.models.kinds.lora import apply_lora
from lit_ft.models.score import score, score_gathered, use_packed_attention
from lit_ft.models.shard import bytes_held, clip_grad_norm, decoder_layers, shard, synchronising
from lit_ft.models.tensor_parallel import why_not_divisible
from tests import tiny

ROOT = Path(__file__).parents[3]
Found = dict[str, Any]
KINDS = ("llama", "qwen2", "opt", "gpt2")
PEFTS = ("lora", "full")
# Of the largest gradient's size. Tensor parallelism adds in another order, and float32's own gradients are 7e-7 from
# those of float64: where it is compared, models are in float64.
CLOSE = 1e-6


# What runs in the processes.


def built(kind: str = "llama", peft: str = "lora", double: bool = False, **changes: Any) -> Any:
    """The same model in every process; of its adapters B is not zero, so that A has gradients, too."""
    made = tiny.model(kind)
    if changes:
        config = type(made.config)(**{**made.config.to_dict(), **changes})
        torch.manual_seed(0)
        made = type(made)(config).float()
    model = apply_lora(made, r=4, alpha=8) if peft == "lora" else train_all(made)
    torch.manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert use_packed_attention(model) is None
    return (model.double() if double else model).train()


def batches(count: int) -> list[Batch]:
    """Packed batches of two rows each, of different lengths."""
    draw = random.Random(0)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, 260) for _ in range(draw.randint(4, most)))

    rows = [Example(ids(20), (Completion(a := ids(12), (True,) * len(a)),), k) for k in range(2 * count)]
    return [pack(rows[2 * k : 2 * k + 2]) for k in range(count)]


def mesh_of(data_parallel: int, tensor_parallel: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(
        "cpu", (data_parallel, tensor_parallel), mesh_dim_names=("data_parallel", "tensor_parallel")
    )


def backward(model: Any, mine: list[Batch], everything: list[Batch], replicas: int = 1) -> None:
    """What `FineTuneModule.training_step` does: gradients of the mean over all targets of all processes."""
    total = sum(len(batch.target_ids) for batch in everything)
    for number, batch in enumerate(mine):
        with synchronising(model, model, last=number == len(mine) - 1):
            (sft_loss(score(model, batch).logprobs, total) * replicas).backward()


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def apart(model: Any, expected: dict[str, Tensor]) -> Found:
    """How far the gradients of `model` are from `expected`, as a part of the largest of them."""
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    worst = {name: float((found[name] - expected[name]).abs().max()) / largest for name in expected}
    name = max(worst, key=lambda key: worst[key])
    return {"apart": worst[name], "where": name, "largest": largest, "count": len(found)}


def unsharded_gradients(model: Any, everything: list[Batch]) -> dict[str, Tensor]:
    backward(model, everything, everything)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def compare(
    kind: str, peft: str, parts: int = 1, prepare: Callable[[Any], Any] = lambda model: None, **changes: Any
) -> Found:
    """Gradients of a model sharded over all processes, `parts` of which share its tensors, beside an unsharded one."""
    import torch.distributed as dist

    replicas = dist.get_world_size() // parts
    everything = batches(2 * replicas)
    plain, model = (built(kind, peft, double=parts > 1, **changes) for _ in range(2))
    for one in (plain, model):
        prepare(one)
    expected = unsharded_gradients(plain, everything)
    mesh = mesh_of(replicas, parts)
    shard(model, mesh, score_gathered)
    mine = everything[mesh["data_parallel"].get_local_rank() :: replicas]
    backward(model, mine, everything, replicas)
    return apart(model, expected)


def fsdp_gradients() -> Found:
    return {f"{kind}-{peft}": compare(kind, peft) for kind in KINDS for peft in PEFTS}


def tp_gradients() -> Found:
    found = {f"{kind}-{peft}": compare(kind, peft, parts=2) for kind in ("llama", "qwen2") for peft in PEFTS}
    return found | {f"tied-{peft}": compare("llama", peft, parts=2, tie_word_embeddings=True) for peft in PEFTS}


def tied_gradients() -> Found:
    found = compare("llama", "full", tie_word_embeddings=True)
    model = built("llama", "full", tie_word_embeddings=True)
    shard(model, mesh_of(2, 1), score_gathered)
    backward(model, batches(1), batches(1))
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    found["tied"] = model.lm_head.weight is model.model.embed_tokens.weight
    twin = built("llama", "full", tie_word_embeddings=True)
    found["counted_once"] = bytes_held(model)[1] == sum(_bytes(p) for p in twin.parameters())
    return found


def checkpointed_gradients() -> Found:
    def checkpointing(model: Any) -> None:
        causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})

    return {peft: compare("llama", peft, prepare=checkpointing) for peft in PEFTS}


def shares() -> Found:
    """Bytes of every weight, gradient and optimizer state in this process and in whole, after a step."""
    found: Found = {}
    for kind, peft in (("llama", "lora"), ("llama", "full"), ("gpt2", "lora")):
        model = built(kind, peft)
        expected = sum(p.numel() * p.element_size() for p in model.parameters())
        shard(model, mesh_of(2, 1), score_gathered)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        backward(model, batches(1), batches(1))
        optimizer.step()
        tensors: dict[str, Any] = {}
        for name, p in model.named_parameters():
            tensors[f"weight {name}"] = p
            if p.requires_grad:
                tensors[f"gradient {name}"] = p.grad
                tensors |= {f"{key} {name}": value for key, value in optimizer.state[p].items() if value.ndim}
        found[f"{kind}-{peft}"] = {
            "tensors": {
                name: [_bytes(t.to_local()), _bytes(t), _bytes(t) // max(t.shape[0], 1)] for name, t in tensors.items()
            },
            "bytes_held": bytes_held(model),
            "expected": expected,
            "frozen": sum(1 for p in model.parameters() if not p.requires_grad),
        }
    return found


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def gathered_bytes(model: Any) -> dict[str, int]:
    """Memory of gathered weights: of the layers, and of what lies outside them."""
    lm = causal_lm(model)

    def of(module: Any) -> int:
        groups = module._get_fsdp_state()._fsdp_param_groups
        outputs = [t for group in groups for p in group.fsdp_params for t in p.all_gather_outputs]
        return sum(t.untyped_storage().size() for t in outputs)

    return {"layers": sum(of(layer) for layer in decoder_layers(lm)), "rest": of(lm)}


def resharding() -> Found:
    found: Found = {}
    for peft in PEFTS:
        model = built("llama", peft)
        shard(model, mesh_of(2, 1), score_gathered)
        loss = sft_loss(score(model, batches(1)[0]).logprobs, 1)
        found[f"{peft} after forward"] = gathered_bytes(model)
        loss.backward()
        found[f"{peft} after backward"] = gathered_bytes(model)
        with torch.no_grad():
            score(model, batches(1)[0])
        found[f"{peft} after scoring"] = gathered_bytes(model)
        if peft == "lora":
            found["all sharded"] = all(hasattr(p, "placements") for p in model.parameters())
    model = built()
    shard(model, mesh_of(2, 1), score_gathered, reshard_after_forward=False)
    score(model, batches(1)[0]).logprobs.sum().backward()
    found["kept after backward"] = gathered_bytes(model)
    return found


def traffic_of_a_step() -> Found:
    """What two micro-batches move, each; and their gradients beside those of one batch."""
    from tests.benchmarks.distributed_worker import Traffic

    found: Found = {}
    for peft in PEFTS:
        everything = batches(2)
        model = built("llama", peft)
        sizes = {"all": sum(4 * p.numel() for p in model.parameters())}
        sizes["layers"] = sum(4 * p.numel() for layer in decoder_layers(causal_lm(model)) for p in layer.parameters())
        sizes["trained"] = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
        expected = unsharded_gradients(built("llama", peft), everything)
        shard(model, mesh_of(2, 1), score_gathered)
        total = sum(len(batch.target_ids) for batch in everything)
        summaries = []
        for number, batch in enumerate(everything):
            with Traffic() as traffic, synchronising(model, model, last=number == 1):
                sft_loss(score(model, batch).logprobs, total).backward()
            summaries.append(traffic.summary())
        # Both processes had the same rows: their mean is one's.
        found[peft] = {**apart(model, expected), "summaries": summaries, "sizes": sizes}
    return found


def traffic_by_hand() -> Found:
    """Every collective once, on tensors of known size."""
    import torch.distributed as dist
    import torch.distributed._functional_collectives as functional

    from tests.benchmarks.distributed_worker import Traffic

    found = {}
    group = dist.group.WORLD
    parts = [torch.empty(256), torch.empty(256)]
    known: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(torch.ones(256)),
        "broadcast": lambda: dist.broadcast(torch.ones(256), 0),
        "all_gather list": lambda: dist.all_gather(parts, torch.ones(256)),
        "all_gather whole": lambda: dist.all_gather_into_tensor(torch.empty(512), torch.ones(256)),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.empty(256), torch.ones(512)),
        "functional all_reduce": lambda: functional.all_reduce(torch.ones(256), "sum", group).sum(),
        "functional all_gather": lambda: functional.all_gather_tensor(torch.ones(256), 0, group).sum(),
        "functional reduce_scatter": lambda: functional.reduce_scatter_tensor(torch.ones(512), "sum", 0, group).sum(),
        "barrier": dist.barrier,
    }
    for name, act in known.items():
        with Traffic() as traffic:
            act()
        found[name] = traffic.summary()["bytes"]
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64, bias=False), init_sync=False)
    for _ in range(2):  # it forms its buckets in the first pass
        with Traffic() as traffic:
            ddp(torch.ones(2, 64)).sum().backward()
        found["ddp"] = traffic.summary()["by_kind"]
    with Traffic() as traffic, ddp.no_sync():
        ddp(torch.ones(2, 64)).sum().backward()
    found["ddp not last"] = traffic.summary()["bytes"]
    return found


def tp_placements() -> Found:
    found = {}
    for kind in ("llama", "qwen2"):
        model = built(kind)
        shard(model, mesh_of(1, 2), score_gathered)
        found[kind] = {
            name: [list(p.shape), list(p.to_local().shape), [repr(one) for one in p.placements]]
            for name, p in model.named_parameters()
        }
    return found


def precisions() -> Found:
    """In which format weights are gathered and gradients kept, and how exact they are over many micro-batches."""
    found: Found = {}
    everything = batches(2)
    for name, formats in {
        "as kept": {},
        "bf16": {"param_dtype": torch.bfloat16},
        "bf16 both": {"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16},
    }.items():
        model = built("llama", "full")
        expected = unsharded_gradients(built("llama", "full"), everything)
        shard(model, mesh_of(2, 1), score_gathered, **formats)
        seen: list[str] = []
        layer = decoder_layers(model)[0]
        layer.register_forward_pre_hook(lambda m, _, seen=seen: seen.append(str(m.self_attn.q_proj.weight.dtype)))
        with _reduced() as formats_reduced:
            backward(model, everything, everything)
        found[name] = {
            **apart(model, expected),
            "gathered": sorted(set(seen)),
            "reduced": sorted(set(formats_reduced)),
            "gradients": sorted({str(p.grad.dtype) for p in model.parameters()}),
            "sharded": all(hasattr(p.grad, "placements") for p in model.parameters()),
        }
    return found


@contextmanager
def _reduced() -> Iterator[list[str]]:
    """The formats of what is reduced and scattered meanwhile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name == "c10d::_reduce_scatter_base_":
                seen.append(str(args[1].dtype))
            return func(*args, **(kwargs or {}))

    with Watch():
        yield seen


def offloaded() -> Found:
    """On a CPU there is nowhere to offload to: the setting must be harmless."""
    everything = batches(2)
    expected = unsharded_gradients(built(), everything)
    model = built()
    shard(model, mesh_of(2, 1), score_gathered, cpu_offload=True)
    backward(model, everything, everything)
    return {**apart(model, expected), "held": bytes_held(model)}


def norms() -> Found:
    """Clipped gradients and their norm, sharded in every way that this many processes allow, beside PyTorch's own."""
    import torch.distributed as dist

    size = dist.get_world_size()
    found: Found = {}
    for data_parallel, parts in [(size // n, n) for n in (1, 2) if size // n]:
        for peft in PEFTS:
            everything = batches(1)
            plain, model = (built("llama", peft, double=parts > 1) for _ in range(2))
            backward(plain, everything, everything)
            shard(model, mesh_of(data_parallel, parts), score_gathered)
            backward(model, everything, everything)
            trained = [p for p in plain.parameters() if p.requires_grad]
            limit = 0.5 * float(torch.nn.utils.get_total_norm([p.grad for p in trained]))
            expected = torch.nn.utils.clip_grad_norm_(trained, limit)
            norm = clip_grad_norm(model.parameters(), limit)
            clipped = apart(model, {n: p.grad for n, p in plain.named_parameters() if p.requires_grad})
            # A value that is no number, in one place that the first process alone holds.
            split = "q_proj.lora_B.default.weight" if peft == "lora" else "q_proj.weight"
            held = next(p for name, p in model.named_parameters() if name.endswith(split)).grad.to_local()
            if dist.get_rank() == 0:
                held[0, 0] = math.nan
            found[f"{data_parallel}x{parts}-{peft}"] = {
                "norm": float(norm),
                "expected": float(expected),
                "plain": not hasattr(norm, "placements") and norm.ndim == 0,
                "clipped": clipped["apart"],
                "nan": math.isnan(float(clip_grad_norm(model.parameters(), limit))),
            }
    return found


def mixed_gradients() -> Found:
    return {f"{kind}-{peft}": compare(kind, peft, parts=2) for kind in ("llama", "qwen2") for peft in PEFTS}


def mixed_shares() -> Found:
    model = built()
    shard(model, mesh_of(2, 2), score_gathered)
    return {name: [p.to_local().numel(), p.numel()] for name, p in model.named_parameters()}


PAIR = (
    fsdp_gradients,
    tp_gradients,
    tied_gradients,
    checkpointed_gradients,
    shares,
    resharding,
    traffic_of_a_step,
    traffic_by_hand,
    tp_placements,
    precisions,
    offloaded,
    norms,
)
QUAD = (mixed_gradients, mixed_shares, norms)


def main() -> None:
    """Run both groups, one after the other, in processes forked from this one, where everything is imported already."""
    import torch.distributed.tensor.parallel  # noqa: F401
    import torch.multiprocessing as multiprocessing

    import tests.benchmarks.distributed_worker  # noqa: F401

    built()  # which imports the rest
    folder = Path(sys.argv[1])
    for size, functions in ((2, PAIR), (4, QUAD)):
        arguments = (size, [function.__name__ for function in functions], str(folder))
        multiprocessing.start_processes(_process, arguments, nprocs=size, start_method="fork")


def _process(rank: int, size: int, names: list[str], folder: str) -> None:
    import warnings

    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = dist.FileStore(str(Path(folder, f"meeting-{size}")), size)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    found: Found = {}
    out = Path(folder, f"{size}-{rank}.json")
    for name in names:
        try:
            found[name] = globals()[name]()
        except Exception:  # the other process would wait for this one: both end, and the test shows why
            found["failed"] = f"{name} in process {rank}:\n{traceback.format_exc()}"
            out.write_text(json.dumps(found))
            raise
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


# What the tests look at.


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Found]]:
    """What every process found, by how many there were."""
    folder = tmp_path_factory.mktemp("shard")
    command = [sys.executable, "-m", "tests.lit_ft.models.test_shard", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    found = {size: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{size}-*.json"))] for size in (2, 4)}
    failures = [one["failed"] for group in found.values() for one in group if "failed" in one]
    assert not failures, "\n".join(failures)
    assert done.returncode == 0, done.stderr
    return found


def in_both(results: dict[int, list[Found]], name: str) -> list[Found]:
    return [process[name] for process in results[2]]


def assert_close(found: Found, tolerance: float = CLOSE) -> None:
    assert found["largest"] > 0.01, "the comparison would show nothing"
    assert found["apart"] < tolerance, found["where"]


@pytest.mark.slow
@pytest.mark.parametrize("peft", PEFTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_under_fsdp_are_those_of_the_unsharded_model(
    results: dict[int, list[Found]], kind: str, peft: str
) -> None:
    for found in in_both(results, "fsdp_gradients"):
        assert_close(found[f"{kind}-{peft}"])


@pytest.mark.slow
@pytest.mark.parametrize("peft", PEFTS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "tied"])
def test_gradients_under_tensor_parallelism_are_those_of_the_unsharded_model(
    results: dict[int, list[Found]], kind: str, peft: str
) -> None:
    for found in in_both(results, "tp_gradients"):
        assert_close(found[f"{kind}-{peft}"])


@pytest.mark.slow
@pytest.mark.parametrize("peft", PEFTS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gradients_under_both_are_those_of_the_unsharded_model(
    results: dict[int, list[Found]], kind: str, peft: str
) -> None:
    assert len(results[4]) == 4
    for process in results[4]:
        assert_close(process["mixed_gradients"][f"{kind}-{peft}"])


@pytest.mark.slow
def test_tied_embeddings_stay_tied(results: dict[int, list[Found]]) -> None:
    for found in in_both(results, "tied_gradients"):
        assert_close(found)
        assert found["tied"] and found["counted_once"]


@pytest.mark.slow
@pytest.mark.parametrize("peft", PEFTS)
def test_gradient_checkpointing_changes_nothing(results: dict[int, list[Found]], peft: str) -> None:
    for found in in_both(results, "checkpointed_gradients"):
        assert_close(found[peft])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama-lora", "llama-full", "gpt2-lora"])
def test_each_process_holds_only_its_share(results: dict[int, list[Found]], case: str) -> None:
    """Of weights (frozen ones too), gradients and optimizer states: half, and where that is uneven one row more."""
    one, other = (found[case] for found in in_both(results, "shares"))
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, (held, all_of_it, row) in one["tensors"].items():
        theirs = other["tensors"][name][0]
        assert held + theirs == all_of_it, name
        assert max(held, theirs) <= all_of_it // 2 + row, name
    kinds = {name.split()[0] for name in one["tensors"]}
    assert kinds == {"weight", "gradient", "exp_avg", "exp_avg_sq"}
    assert (one["frozen"] > 0) == case.endswith("lora")
    assert one["bytes_held"][1] == other["bytes_held"][1] == one["expected"]
    assert one["bytes_held"][0] + other["bytes_held"][0] == one["expected"]
    assert abs(one["bytes_held"][0] - one["expected"] / 2) < 0.02 * one["expected"]


@pytest.mark.slow
def test_nothing_stays_gathered_between_steps(results: dict[int, list[Found]]) -> None:
    for found in in_both(results, "resharding"):
        for peft in PEFTS:
            assert found[f"{peft} after forward"]["layers"] == 0
            # Embeddings and output layer: the backward pass would begin by gathering them again.
            assert found[f"{peft} after forward"]["rest"] > 0
            for moment in ("backward", "scoring"):
                assert found[f"{peft} after {moment}"] == {"layers": 0, "rest": 0}
        assert found["all sharded"]
        assert found["kept after backward"] == {"layers": 0, "rest": 0}


@pytest.mark.slow
@pytest.mark.parametrize("peft", PEFTS)
def test_gradients_of_adapters_travel_with_the_last_micro_batch_only(
    results: dict[int, list[Found]], peft: str
) -> None:
    """Those of all weights travel each time: until they have, every process holds a second model of them."""
    for found in in_both(results, "traffic_of_a_step"):
        case = found[peft]
        assert_close(case)
        first, last = case["summaries"]
        assert set(first["by_kind"]) == ({"all_gather"} if peft == "lora" else {"all_gather", "reduce_scatter"})
        assert set(last["by_kind"]) == {"all_gather", "reduce_scatter"}
        # Layers twice, the rest once, and nothing besides; between two processes each sends half and receives half.
        sizes = case["sizes"]
        for summary in (first, last):
            assert summary["by_kind"]["all_gather"] == pytest.approx(sizes["all"] + sizes["layers"], rel=0.01)
            assert summary["small_bytes"] < 4096
        assert last["by_kind"]["reduce_scatter"] == pytest.approx(sizes["trained"], rel=0.01)


@pytest.mark.slow
def test_the_count_of_bytes_by_hand(results: dict[int, list[Found]]) -> None:
    """256 numbers are 1,024 bytes: an all-reduce between two sends and receives them, twice that in all."""
    for found in in_both(results, "traffic_by_hand"):
        assert found["all_reduce"] == found["functional all_reduce"] == 2048
        assert found["broadcast"] == 1024
        # Of 2,048 bytes one half is there, or stays.
        for kind in ("all_gather list", "all_gather whole", "functional all_gather"):
            assert found[kind] == 2048, kind
        assert found["reduce_scatter"] == found["functional reduce_scatter"] == 2048
        assert found["barrier"] == 0
        # DDP's own exchange, in C++, is seen: 64 · 64 weights.
        assert found["ddp"] == {"all_reduce": 2 * 4 * 64 * 64}
        assert found["ddp not last"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_tensor_parallelism_splits(results: dict[int, list[Found]], kind: str) -> None:
    for found in in_both(results, "tp_placements"):
        split = {}
        for name, (shape, local, _) in found[kind].items():
            halves = [k for k, (a, b) in enumerate(zip(shape, local, strict=True)) if a == 2 * b]
            assert halves or shape == local, name
            split[name] = halves[0] if halves else None
        for name, dim in split.items():
            outputs = any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
            inputs = any(part in name for part in ("o_proj", "down_proj"))
            if outputs:  # B and what B is added to; A is whole
                assert dim == (None if "lora_A" in name else 0), name
            elif inputs:
                assert dim == (None if "lora_B" in name else 1), name
            else:
                assert dim is None, name
        assert len([dim for dim in split.values() if dim == 1]) == 2 * 2 * 2  # of o and down in two layers, and their A


@pytest.mark.slow
def test_both_at_once_split_in_two_dimensions(results: dict[int, list[Found]]) -> None:
    for name in results[4][0]["mixed_shares"]:
        per_process = [process["mixed_shares"][name] for process in results[4]]
        size = per_process[0][1]
        inputs = "o_proj" in name or "down_proj" in name
        # Of an adapter the half that touches the side along which its layer is split.
        split = "proj" in name and ("lora_B" if inputs else "lora_A") not in name
        assert [held for held, _ in per_process] == [size // (4 if split else 2)] * 4, name


@pytest.mark.slow
def test_formats_of_weights_and_gradients(results: dict[int, list[Found]]) -> None:
    for found in in_both(results, "precisions"):
        for case in found.values():
            assert case["gradients"] == ["torch.float32"] and case["sharded"]
        assert found["as kept"]["gathered"] == found["as kept"]["reduced"] == ["torch.float32"]
        assert_close(found["as kept"])
        assert found["bf16"]["gathered"] == ["torch.bfloat16"]
        assert found["bf16"]["reduced"] == ["torch.float32"], "gradients are float32 unless asked"
        assert found["bf16 both"]["gathered"] == found["bf16 both"]["reduced"] == ["torch.bfloat16"]
        for case in ("bf16", "bf16 both"):  # bf16 has three digits
            assert_close(found[case], 0.05)


@pytest.mark.slow
def test_offloading_on_a_cpu_is_harmless(results: dict[int, list[Found]]) -> None:
    for found in in_both(results, "offloaded"):
        assert_close(found)
        assert found["held"][0] < 0.52 * found["held"][1]


@pytest.mark.slow
@pytest.mark.parametrize("peft", PEFTS)
@pytest.mark.parametrize(("size", "mesh"), [(2, "2x1"), (2, "1x2"), (4, "4x1"), (4, "2x2")])
def test_clipping_is_that_of_the_unsharded_model(
    results: dict[int, list[Found]], size: int, mesh: str, peft: str
) -> None:
    cases = [process["norms"][f"{mesh}-{peft}"] for process in results[size]]
    for found in cases:
        assert found["norm"] == pytest.approx(found["expected"], rel=1e-5)
        assert found["clipped"] < CLOSE
        assert found["plain"]
        assert found["nan"], "a value that is no number must not go unseen, in any process"
    assert len({found["norm"] for found in cases}) == 1


# Without processes.


def llama_config(heads: int, kv_heads: int, intermediate: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=64 * heads, intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=kv_heads
    )


def test_models_that_cannot_be_split_say_why_and_what_would_do() -> None:
    smollm2 = llama_config(9, 3, 1536)
    reason = why_not_divisible(smollm2, 2)
    assert reason is not None
    assert "num_attention_heads=9" in reason and "num_key_value_heads=3" in reason
    assert "intermediate_size" not in reason  # 1,536 is even
    assert "sizes that do: 3;" in reason and "strategy=fsdp" in reason
    assert why_not_divisible(smollm2, 3) is None
    assert why_not_divisible(smollm2, 1) is None


def test_sizes_that_fit_are_all_named() -> None:
    assert "sizes that do: 2, 4, 8;" in str(why_not_divisible(llama_config(32, 8, 8192), 3))
    assert why_not_divisible(llama_config(32, 8, 8192), 8) is None
    # Heads, key-value heads and width that nothing divides.
    assert str(why_not_divisible(llama_config(7, 1, 100), 2)).endswith("(use strategy=fsdp)")


def test_tied_embeddings_are_no_obstacle() -> None:
    """transformers' plan then has a line for them; Llama 3.2, the smaller Qwen 2.5 and SmolLM2 have them."""
    config = llama_config(4, 2, 128)
    tied = type(config)(**{**config.to_dict(), "tie_word_embeddings": True})
    assert set(tied.base_model_tp_plan) - set(config.base_model_tp_plan) == {"embed_tokens"}
    assert why_not_divisible(tied, 2) is None


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_models_without_a_plan_say_so(kind: str) -> None:
    reason = why_not_divisible(tiny.model(kind).config, 2)
    assert reason is not None
    assert f"no tensor-parallel plan for {kind} models" in reason and "strategy=fsdp" in reason


if __name__ == "__main__":
    main()
