"""Attention over packed rows: each way to compute it against dense attention in float64 under the definition's mask."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_ft.batches import Piece
from lit_ft.models.attention import Plan, backend, flash_cpu, interface, varlen_cuda
from lit_ft.models.attention.by_piece import attend_by_piece
from lit_ft.models.attention.flash_cpu import attend_flash_cpu
from lit_ft.models.attention.interface import packed_attention
from lit_ft.models.attention.varlen_cuda import attend_varlen

CPU = torch.device("cpu")
WIDTH = 8
# A piece as its length and the pieces that go on from it.
Tree = tuple[int, list[Any]]

FORESTS: dict[str, list[Tree]] = {
    "one piece": [(9, [])],
    "several single pieces": [(4, []), (7, []), (2, [])],
    "a prompt with three completions": [(6, [(3, []), (5, []), (2, [])])],
    "three levels": [(5, [(3, [(4, []), (2, [])]), (6, [])]), (3, [(2, [(1, [(3, [])])])])],
    "pieces of one token": [(1, [(1, []), (1, [(1, []), (1, [])])]), (1, []), (4, [(1, []), (1, [])])],
}
WAYS: dict[str, Callable[..., Tensor]] = {"flash": attend_flash_cpu, "by piece": attend_by_piece}


def lay_out(forest: Sequence[Tree], start: int = 0) -> list[Piece]:
    """The pieces of a forest in depth-first order."""
    pieces: list[Piece] = []
    for length, below in forest:
        end = start + length
        inner = lay_out(below, end)
        until = max((piece.until for piece in inner), default=end)
        pieces += [Piece(start, end, until), *inner]
        start = until
    return pieces


def random_forest(generator: random.Random, depth: int = 3) -> list[Tree]:
    """One to three pieces of up to six tokens, half of them with others that go on from them."""
    return [
        (generator.randint(1, 6), random_forest(generator, depth - 1) if depth and generator.random() < 0.5 else [])
        for _ in range(generator.randint(1, 3))
    ]


def sees(pieces: Sequence[Piece]) -> Tensor:
    """`(T, T)` by definition: s is no later than t, in the piece of t or in one that the piece of t goes on from."""
    lengths = torch.tensor([piece.end - piece.start for piece in pieces])
    start, end, until = torch.tensor([(p.start, p.end, p.until) for p in pieces]).repeat_interleave(lengths, 0).T
    t, s = torch.arange(len(start))[:, None], torch.arange(len(start))
    return (s <= t) & ((start == start[:, None]) | ((end <= start[:, None]) & (start[:, None] < until)))


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """`(1, T, heads, D)`: the formula itself, with each key head given to its group of query heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = (torch.stack([t[:, h // groups] for h in range(query.shape[1])], 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def inputs(tokens: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query, key, value, and the gradient that comes from above, laid out as the output."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, h, tokens, WIDTH) for h in (heads, kv_heads, kv_heads)] + [(1, tokens, heads, WIDTH)]
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def output_and_gradients(attend: Callable[..., Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given[:3]]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]


def assert_agrees(
    attend: Callable[..., Tensor],
    pieces: Sequence[Piece],
    given: Sequence[Tensor],
    scale: float | None = None,
    share: float = 1e-5,
) -> None:
    """Output and gradients of query, key and value, to `share` of each tensor's largest entry (or of 1).

    In float32 a sum of some tens of products is off by some units in the seventh digit: 1e-5 leaves room for ten such
    steps, and is far below the O(1) of a key seen wrongly.
    """
    plan, mask = Plan(pieces, torch.device("cpu")), sees(pieces)
    found = output_and_gradients(lambda q, k, v: attend(q, k, v, plan, scale=scale), given)
    wanted = output_and_gradients(lambda q, k, v: dense(q, k, v, mask, scale), [t.double() for t in given])
    for name, one, other in zip(("output", "query", "key", "value"), found, wanted, strict=True):
        assert one.shape == other.shape, name
        assert one.dtype == given[0].dtype, name
        largest = float(other.abs().max().clamp(min=1))
        assert float((one.double() - other).abs().max()) <= share * largest, name


# The reference's own arithmetic


def test_the_definition_by_hand() -> None:
    """A prompt of two tokens with completions of one and two; a row of its own after them."""
    pieces = lay_out([(2, [(1, []), (2, [])]), (1, [])])
    assert pieces == [Piece(0, 2, 5), Piece(2, 3, 3), Piece(3, 5, 5), Piece(5, 6, 6)]
    assert sees(pieces).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


# Every way on a CPU


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("forest", FORESTS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_dense_attention(way: str, forest: str, kv_heads: int) -> None:
    pieces = lay_out(FORESTS[forest])
    assert_agrees(WAYS[way], pieces, inputs(pieces[-1].until, kv_heads=kv_heads))


@pytest.mark.parametrize("way", WAYS)
def test_random_forests(way: str) -> None:
    generator = random.Random(0)
    depths = set()
    for _ in range(40):
        pieces = lay_out(random_forest(generator))
        depths.add(max(sum(a.start < p.start < a.until for a in pieces) for p in pieces))
        assert_agrees(WAYS[way], pieces, inputs(pieces[-1].until, kv_heads=generator.choice([1, 2, 4])))
    assert depths == {0, 1, 2, 3}  # the generator makes what the test is for


@pytest.mark.parametrize("way", WAYS)
def test_a_row_longer_than_the_kernel_s_blocks(way: str) -> None:
    """The CPU kernel goes by blocks of up to 256 queries and 512 keys; some lengths here are multiples, some not."""
    pieces = lay_out([(520, [(256, []), (33, [(65, []), (1, [])])])])
    assert_agrees(WAYS[way], pieces, inputs(pieces[-1].until, heads=2, kv_heads=1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [0.11, 1.0])
def test_explicit_scale(way: str, scale: float) -> None:
    pieces = lay_out(FORESTS["three levels"])
    assert_agrees(WAYS[way], pieces, inputs(pieces[-1].until), scale)


@pytest.mark.parametrize("way", WAYS)
def test_bf16(way: str) -> None:
    """bf16 keeps 8 bits: shares and outputs are rounded by 2⁻⁹ of their size, a handful of times on the way."""
    pieces = lay_out(FORESTS["three levels"])
    assert_agrees(WAYS[way], pieces, inputs(pieces[-1].until, dtype=torch.bfloat16), share=0.02)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factor", [30.0, 3000.0])
def test_large_scores_do_not_overflow(way: str, factor: float) -> None:
    """exp of a score of 100 is above float32's largest number, and one of −100 is 0: only differences may be formed.

    What multiplies a rounding error grows with the factor: scores of size L are off by L · 2⁻²⁴, and the gradient of a
    key is a difference of numbers near 1 times a query of that size; each comes from some tens of operations.
    """
    pieces = lay_out(FORESTS["three levels"])
    given = inputs(pieces[-1].until)
    given[0] *= factor
    scores = given[0] @ given[1].repeat_interleave(2, 1).transpose(-1, -2) / WIDTH**0.5
    assert scores.max() > 89  # log of float32's largest
    assert_agrees(WAYS[way], pieces, given, share=float(torch.cat([scores, given[0]], -1).abs().max()) * 2**-24 * 30)


@pytest.mark.parametrize("way", WAYS)
def test_strides_do_not_matter(way: str) -> None:
    """transformers hands over transposed views, and a sum's gradient is one number expanded: stride 0."""
    pieces = lay_out(FORESTS["three levels"])
    given = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs(pieces[-1].until)]
    assert not given[0].is_contiguous()
    given[3] = torch.ones(()).expand(given[3].shape)
    assert_agrees(WAYS[way], pieces, given)


def test_flash_gives_only_wanted_gradients() -> None:
    """Query alone requires one, as under an adapter on the query's projection in the first layer."""
    pieces = lay_out(FORESTS["a prompt with three completions"])
    query, key, value, above = inputs(pieces[-1].until)
    attend_flash_cpu(query.requires_grad_(), key, value, Plan(pieces, query.device), scale=None).backward(above)
    wanted = output_and_gradients(lambda q, k, v: dense(q, k, v, sees(pieces)), (query, key, value, above))[1]
    torch.testing.assert_close(query.grad, wanted, rtol=1e-5, atol=1e-5)
    assert key.grad is None
    assert value.grad is None


def test_flash_leaves_its_inputs_and_can_go_back_twice() -> None:
    """Partial outputs are merged in place; what is kept for the backward pass must not be among what is written."""
    pieces = lay_out(FORESTS["three levels"])
    *given, above = inputs(pieces[-1].until)
    leaves = [t.clone().requires_grad_() for t in given]
    out = attend_flash_cpu(*leaves, Plan(pieces, CPU), scale=None)
    first = torch.autograd.grad(out, leaves, above, retain_graph=True)
    again = torch.autograd.grad(out, leaves, above)
    for one, other in zip((*first, *leaves), (*again, *given), strict=True):
        assert torch.equal(one, other)


# What kernels are told


def test_ancestors_by_hand() -> None:
    """Ranges that touch are one; a sibling in between parts them; what has ended is not gone on from."""
    pieces = [
        Piece(0, 4, 13),
        Piece(4, 6, 10),  # goes on from [0, 4), next to it
        Piece(6, 7, 7),
        Piece(7, 10, 10),  # [0, 6) in one range
        Piece(10, 12, 13),  # [0, 4) again, its sibling apart
        Piece(12, 13, 13),  # [0, 4) and [10, 12): the sibling [4, 10) stands between them
        Piece(13, 15, 15),
    ]
    assert Plan(pieces, CPU).ancestors == [
        [],
        [(0, 4)],
        [(0, 6)],
        [(0, 6)],
        [(0, 4)],
        [(0, 4), (10, 12)],
        [],
    ]


def test_varlen_by_hand() -> None:
    pieces = [Piece(0, 2, 6), Piece(2, 3, 3), Piece(3, 4, 6), Piece(4, 6, 6), Piece(6, 9, 9)]
    index = Plan(pieces, CPU).varlen
    assert index.keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 0, 1, 3, 4, 5, 6, 7, 8]
    assert index.cu_queries.tolist() == [0, 2, 3, 4, 6, 9]
    assert index.cu_keys.tolist() == [0, 2, 5, 8, 13, 16]
    assert (index.max_queries, index.max_keys) == (3, 5)
    assert index.cu_queries.dtype == index.cu_keys.dtype == torch.int32


def test_keys_are_gathered_as_the_definition_has_it() -> None:
    """On random forests: for each piece, the keys are what its last token sees, in order."""
    generator = random.Random(1)
    for _ in range(20):
        pieces = lay_out(random_forest(generator))
        index, mask = Plan(pieces, CPU).varlen, sees(pieces)
        bounds = index.cu_keys.tolist()
        for k, piece in enumerate(pieces):
            wanted = mask[piece.end - 1].nonzero().flatten()
            assert index.keys[bounds[k] : bounds[k + 1]].tolist() == wanted.tolist()


# The variable-length kernel, which a CPU does not have


def kernel(aligned: str = "end") -> Callable[..., Tensor]:
    """`varlen_attn` in plain operations: causal with the last query at the last key, or wrongly first at first."""

    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        assert window_size == (-1, 0)
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise ValueError("Expect query and key/value to have the same number of heads")
        assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))
        assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
        out = []
        for q, k, v in zip(
            query.split(cu_seq_q.diff().tolist()),
            key.split(cu_seq_k.diff().tolist()),
            value.split(cu_seq_k.diff().tolist()),
            strict=True,
        ):
            offset = len(k) - len(q) if aligned == "end" else 0
            mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(offset)
            out.append(dense(*(t.transpose(0, 1)[None] for t in (q, k, v)), mask, scale)[0])
        return torch.cat(out)

    return varlen_attn


@pytest.fixture
def use_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], None]:
    module = pytest.importorskip("torch.nn.attention.varlen", reason="this PyTorch has no variable-length attention")
    return lambda function: monkeypatch.setattr(module, "varlen_attn", function)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("forest", FORESTS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_varlen_equals_dense_attention(use_kernel: Any, dtype: torch.dtype, forest: str, kv_heads: int) -> None:
    """In float64 the same to rounding, so that nothing but the gathering of keys is compared."""
    use_kernel(kernel())
    pieces = lay_out(FORESTS[forest])
    given = inputs(pieces[-1].until, kv_heads=kv_heads, dtype=dtype)
    for scale in (None, 0.3):
        assert_agrees(attend_varlen, pieces, given, scale, share=1e-13 if dtype == torch.float64 else 1e-5)


def test_varlen_on_random_forests(use_kernel: Any) -> None:
    use_kernel(kernel())
    generator = random.Random(2)
    for _ in range(20):
        pieces = lay_out(random_forest(generator))
        assert_agrees(attend_varlen, pieces, inputs(pieces[-1].until, dtype=torch.float64), share=1e-13)


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """The trial of the kernel, on the CPU: every device that it makes is one."""

    class Torch:
        """PyTorch without other devices."""

        def __getattr__(self, name: str) -> Any:
            return (lambda *_: torch.empty(0).device) if name == "device" else getattr(torch, name)

    monkeypatch.setattr(varlen_cuda, "torch", Torch())
    return lambda: varlen_cuda._tried.__wrapped__(0, torch.bfloat16, 64)


def test_the_trial_passes_a_right_kernel(use_kernel: Any, trial: Any, capsys: pytest.CaptureFixture[str]) -> None:
    use_kernel(kernel())
    assert trial()
    assert capsys.readouterr().err == ""


def test_the_trial_notices_another_alignment(use_kernel: Any, trial: Any, capsys: pytest.CaptureFixture[str]) -> None:
    use_kernel(kernel(aligned="start"))
    assert not trial()
    assert "disagrees with SDPA" in capsys.readouterr().err


FAILURES = [
    RuntimeError("no kernel for\nsm_70"),
    RuntimeError(),
    ValueError("bad heads"),
    TypeError("varlen_attn() got an unexpected keyword argument 'window_size'"),  # an older signature
]


@pytest.mark.parametrize("error", FAILURES)
def test_the_trial_survives_a_failing_kernel(
    use_kernel: Any, trial: Any, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Tensor:
        raise error

    use_kernel(fails)
    assert not trial()
    assert f"({(str(error) or 'RuntimeError').splitlines()[0]})" in capsys.readouterr().err


def test_the_trial_survives_a_pytorch_without_it(trial: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # importing it raises ImportError
    assert not trial()


def test_the_kernel_is_tried_on_the_query_s_device_only_where_it_may_work(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(varlen_cuda, "_tried", lambda *given: tried.append(given) or True)
    gpu = torch.device("cuda", 1)

    def query(device: torch.device, dtype: torch.dtype) -> Any:
        return SimpleNamespace(device=device, dtype=dtype, shape=(1, 4, 7, 64))

    assert not varlen_cuda.usable(query(gpu, torch.float32))
    assert not varlen_cuda.usable(query(CPU, torch.bfloat16))
    assert tried == []
    assert varlen_cuda.usable(query(gpu, torch.bfloat16))
    assert varlen_cuda.usable(query(gpu, torch.float16))
    assert tried == [(1, torch.bfloat16, 64), (1, torch.float16, 64)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the variable-length kernel exists on CUDA only")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("width", [64, 128])
def test_varlen_equals_by_piece_on_a_gpu(kv_heads: int, width: int) -> None:
    """The kernel itself, gradients included; both round to bf16 (2⁻⁹ of a value) a handful of times on the way."""
    device = torch.device("cuda")
    if not varlen_cuda.usable(torch.empty(1, 4, 1, width, dtype=torch.bfloat16, device=device)):
        pytest.skip("this GPU or PyTorch has no variable-length kernel that passes its trial")
    generator = torch.Generator(device).manual_seed(0)
    for forest in [*FORESTS.values(), [(200, [(130, []), (65, [(40, []), (1, [])])])]]:
        plan = Plan(lay_out(forest), device)
        tokens = plan.pieces[-1].until
        shapes = [(1, h, tokens, width) for h in (4, kv_heads, kv_heads)] + [(1, tokens, 4, width)]
        given = [torch.randn(*s, dtype=torch.bfloat16, device=device, generator=generator) for s in shapes]
        found, wanted = (
            output_and_gradients(lambda q, k, v, way=way, plan=plan: way(q, k, v, plan, scale=None), given)
            for way in (attend_varlen, attend_by_piece)
        )
        for name, one, other in zip(("output", "query", "key", "value"), found, wanted, strict=True):
            largest = float(other.float().abs().max().clamp(min=1))
            assert float((one.float() - other.float()).abs().max()) <= 0.03 * largest, name


# Which way is taken


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that `packed_attention` took, in order."""
    names: list[str] = []

    def watch(owner: Any, function: str, name: str) -> None:
        real = getattr(owner, function)

        def watched(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, function, watched)

    watch(flash_cpu, "attend_flash_cpu", "flash")
    watch(varlen_cuda, "attend_varlen", "varlen")
    watch(interface, "attend_by_piece", "by piece")
    return names


def attention_layer(training: bool) -> nn.Module:
    return nn.Module().train(training)


def test_flash_without_dropout_and_by_piece_with_it(taken: list[str]) -> None:
    pieces = lay_out(FORESTS["three levels"])
    query, key, value, _ = inputs(pieces[-1].until)
    plan, wanted = Plan(pieces, query.device), dense(query, key, value, sees(pieces))

    def attend(training: bool, dropout: float) -> Tensor:
        out, weights = packed_attention(
            attention_layer(training), query, key, value, None, plan=plan, dropout=dropout, scaling=None
        )
        assert weights is None
        return out

    close = {"rtol": 1e-5, "atol": 1e-5}  # float32 against float32
    torch.testing.assert_close(attend(True, 0.0), wanted, **close)
    torch.testing.assert_close(attend(False, 0.5), wanted, **close)  # not in training: none is dropped
    assert taken == ["flash", "flash"]
    torch.manual_seed(0)
    assert not torch.allclose(attend(True, 0.5), attend(True, 0.5), atol=0.1)
    assert taken[2:] == ["by piece", "by piece"]


def test_dropout_keeps_the_mean() -> None:
    """Dropped by halves and scaled up: the mean of many draws is what no dropout gives.

    One draw is off by about a value's size, 2, the mean of a thousand by 2/√1000 = 0.06; unscaled it would be half.
    """
    pieces = lay_out(FORESTS["a prompt with three completions"])
    query, key, value, _ = inputs(pieces[-1].until)
    plan = Plan(pieces, query.device)
    torch.manual_seed(0)
    with torch.no_grad():
        mean = sum(attend_by_piece(query, key, value, plan, scale=None, dropout=0.5) for _ in range(1000)) / 1000
    torch.testing.assert_close(mean, dense(query, key, value, sees(pieces)), rtol=0, atol=0.2)


def test_the_given_scale_reaches_the_kernel(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma and Granite set their own, both with a kernel and without one."""
    pieces = lay_out(FORESTS["three levels"])
    query, key, value, _ = inputs(pieces[-1].until)
    options: Any = {"plan": Plan(pieces, query.device), "scaling": 0.07}
    for _ in range(2):
        out, _ = packed_attention(attention_layer(True), query, key, value, None, **options)
        torch.testing.assert_close(out, dense(query, key, value, sees(pieces), 0.07), rtol=1e-5, atol=1e-5)
        monkeypatch.setattr(flash_cpu, "_forward", None)
    assert taken == ["flash", "by piece"]


def test_varlen_where_it_is_usable(taken: list[str], use_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernel(kernel())
    monkeypatch.setattr(flash_cpu, "usable", lambda query: False)
    monkeypatch.setattr(varlen_cuda, "usable", lambda query: True)
    pieces = lay_out(FORESTS["three levels"])
    query, key, value, _ = inputs(pieces[-1].until)
    options: Any = {"plan": Plan(pieces, query.device), "dropout": 0.5}
    out, _ = packed_attention(attention_layer(False), query, key, value, None, **options)
    torch.testing.assert_close(out, dense(query, key, value, sees(pieces)), rtol=1e-5, atol=1e-5)
    packed_attention(attention_layer(True), query, key, value, None, **options)
    assert taken == ["varlen", "by piece"]


@pytest.mark.parametrize("cached", [0, 5])
def test_without_a_plan_it_is_causal_attention(taken: list[str], cached: int) -> None:
    """Generation: the last query sees every key, cached ones included; or what a given mask says."""
    query, key, value, _ = inputs(9)
    query = query[:, :, cached:]
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[cached:]
    out, _ = packed_attention(attention_layer(True), query, key, value, None)
    torch.testing.assert_close(out, dense(query, key, value, causal), rtol=1e-5, atol=1e-5)
    padded = causal.clone()
    padded[:, 1] = False
    out, _ = packed_attention(attention_layer(True), query, key, value, padded[None, None])
    torch.testing.assert_close(out, dense(query, key, value, padded), rtol=1e-5, atol=1e-5)
    assert taken == []


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_autocast_takes_mixed_inputs(taken: list[str], dropout: float) -> None:
    """Rotary embeddings leave float32 queries and keys beside bf16 values; gradients go back in each one's format."""
    pieces = lay_out(FORESTS["three levels"])
    given = inputs(pieces[-1].until)
    query, key = (t.requires_grad_() for t in given[:2])
    value = given[2].bfloat16().requires_grad_()
    plan = Plan(pieces, query.device)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = packed_attention(attention_layer(True), query, key, value, None, plan=plan, dropout=dropout)
    assert out.dtype == torch.bfloat16
    assert taken == ["by piece" if dropout else "flash"]
    # Queries and keys are rounded once more than in `test_bf16`.
    wanted = dense(*(t.detach().double() for t in (query, key, value)), sees(pieces))
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=0.05)
    out.float().sum().backward()
    assert [t.grad.dtype for t in (query, key, value)] == [torch.float32, torch.float32, torch.bfloat16]


def test_backend_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend(CPU, torch.float32, 64) == "flash kernel, piece by piece"
    assert backend(CPU, torch.bfloat16, 64) == "flash kernel, piece by piece"
    assert backend(CPU, torch.float64, 64) == "SDPA, piece by piece"
    monkeypatch.setattr(flash_cpu, "_backward", None)
    assert backend(CPU, torch.float32, 64) == "SDPA, piece by piece"
    monkeypatch.setattr(varlen_cuda, "usable", lambda query: query.shape[-1] == 64)
    assert backend(CPU, torch.float32, 64) == "variable-length flash kernel"
    assert backend(CPU, torch.float32, 32) == "SDPA, piece by piece"


@pytest.mark.parametrize("asked", ["softcap", "s_aux", "sliding_window", "position_bias"])
def test_what_is_not_done_here_is_refused(asked: str) -> None:
    """Gemma's softcap, GPT-OSS's sinks and the like would be left out silently."""
    plan = Plan((Piece(0, 4, 4),), torch.device("cpu"))
    query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
    module = torch.nn.Module()
    with pytest.raises(ValueError, match=f"knows no {asked}"):
        packed_attention(module, query, key, value, None, plan=plan, **{asked: torch.ones(2)})
    out, _ = packed_attention(module, query, key, value, None, plan=plan, **{asked: None})
    assert out.shape == (1, 4, 2, 8)


def test_a_mask_of_the_model_is_refused_in_a_packed_row() -> None:
    plan = Plan((Piece(0, 4, 4),), torch.device("cpu"))
    query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
    with pytest.raises(ValueError, match="knows no mask of the model"):
        packed_attention(torch.nn.Module(), query, key, value, torch.ones(1, 1, 4, 4), plan=plan)


def test_values_of_another_width() -> None:
    """DeepSeek's values are narrower than its queries; the fast kernels want one width."""
    plan = Plan((Piece(0, 3, 7), Piece(3, 5, 5), Piece(5, 7, 7)), torch.device("cpu"))
    query, key, value = torch.randn(1, 4, 7, 16), torch.randn(1, 2, 7, 16), torch.randn(1, 2, 7, 8)
    out, _ = packed_attention(torch.nn.Module(), query, key, value, None, plan=plan)
    # Zeros beside the values add zeros beside the output and change nothing else.
    wide, _ = packed_attention(torch.nn.Module(), query, key, F.pad(value, (0, 8)), None, plan=plan)
    torch.testing.assert_close(out, wide[..., :8])
    assert not wide[..., 8:].any()
