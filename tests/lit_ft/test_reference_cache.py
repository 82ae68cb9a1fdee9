"""Reference log-probabilities: the same from the cache to the bit, and a key that nothing they depend on escapes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ft.batches import Completion, Example
from lit_ft.data.packing import Layout
from lit_ft.models.kinds.lora import apply_lora
from lit_ft.models.score import use_packed_attention
from lit_ft.reference import attach, read_cached, reference_key, reference_logprobs, write_cached
from tests import tiny


def example(k: int, completions: int = 2) -> Example:
    generator = torch.Generator().manual_seed(k)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 260, (count,), generator=generator).tolist())

    answers = tuple(ids(1 + (k + n) % 5) for n in range(completions))
    return Example(ids(1 + k % 6), tuple(Completion(a, (True,) * len(a)) for a in answers), index=k)


EXAMPLES = [example(k) for k in range(7)]


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny Llama with a trained adapter, and dropout that must not reach the reference."""
    model = apply_lora(tiny.model(), r=4, alpha=8, dropout=0.5)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert use_packed_attention(model) is None
    return model.train()


def reference(model: Any, examples: list[Example] = EXAMPLES, **options: Any) -> list[tuple[float, ...]]:
    defaults: dict[str, Any] = {"disable_adapter": False, "max_tokens": 40, "layout": "packed", "pad_id": 3}
    return reference_logprobs(model, examples, **{**defaults, **options})


def test_equal_to_the_bit_from_the_cache(model: Any, tmp_path: Path) -> None:
    """All the way: float32 → file → Python's floats → the batch's float32."""
    ragged = [*EXAMPLES, example(8, completions=1), example(9, completions=3)]
    found = reference(model, ragged)
    write_cached(tmp_path / "new", "key", found)
    assert read_cached(tmp_path / "new", "key") == found
    assert [len(values) for values in found] == [len(e.completions) for e in ragged]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["key.safetensors"]
    values = torch.tensor([value for pair in found for value in pair])
    assert [value for pair in found for value in pair] == values.tolist()


def test_nothing_or_rubbish_in_the_cache_is_none(tmp_path: Path) -> None:
    assert read_cached(tmp_path, "absent") is None
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00\x00")
    assert read_cached(tmp_path, "short") is None
    write_cached(tmp_path, "cut", [(1.0, 2.0)])
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-4])
    assert read_cached(tmp_path, "cut") is None


def test_twice_is_the_same(model: Any) -> None:
    """No dropout, and the model is left in the mode it was in."""
    assert reference(model) == reference(model)
    assert model.training
    model.eval()
    reference(model)
    assert not model.training
    model.train()


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("max_tokens", [1, 25, 10_000])
def test_in_the_examples_order_however_grouped(model: Any, layout: Layout, max_tokens: int) -> None:
    """One example at a time against any grouping; an example that comes twice gets its values twice."""
    twice = [*EXAMPLES, EXAMPLES[2], EXAMPLES[0]]
    alone = [reference(model, [e])[0] for e in twice]
    grouped = reference(model, twice, layout=layout, max_tokens=max_tokens)
    for one, other in zip(grouped, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_base_and_initial_differ_for_a_trained_adapter(model: Any) -> None:
    initial, base = reference(model), reference(model, disable_adapter=True)
    assert all(
        math.fabs(one - other) > 0.01
        for pairs in zip(initial, base, strict=True)
        for one, other in zip(*pairs, strict=True)
    )
    # The base below the adapter is the model as it was before one was put on.
    bare = tiny.model()
    use_packed_attention(bare)
    assert reference(bare) == base
    assert reference(bare, disable_adapter=True) == base
    # And the adapter is on again.
    assert reference(model) == initial


def test_mixed_precision(model: Any) -> None:
    """bf16 keeps 8 bits; over at most 5 tokens of log-probabilities around −10 that is well below 2%."""
    exact, mixed = reference(model), reference(model, autocast=torch.bfloat16)
    assert exact != mixed
    for one, other in zip(mixed, exact, strict=True):
        assert one == pytest.approx(other, rel=0.02)


def test_attach() -> None:
    values = [(float(k), -float(k)) for k in range(len(EXAMPLES))]
    attached = attach(EXAMPLES, values)
    assert [e.reference for e in attached] == values
    assert [replace(e, reference=None) for e in attached] == EXAMPLES
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        attach(EXAMPLES, values[:-1])


DEPENDS_ON = {"base": "sha256:a", "adapter": None, "precision": "32-true", "weights": "torch.float32"}


@pytest.mark.parametrize(
    "change",
    [
        {"base": "sha256:b"},
        {"adapter": "sha256:c"},
        {"precision": "bf16-mixed"},
        {"weights": "torch.bfloat16"},
        {"seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_key_changes_with_what_it_depends_on(change: dict[str, Any]) -> None:
    assert reference_key(EXAMPLES, **{**DEPENDS_ON, **change}) != reference_key(EXAMPLES, **DEPENDS_ON)


def test_the_key_changes_with_the_data() -> None:
    first, *rest = EXAMPLES
    chosen, rejected = first.completions
    unmasked = Completion(chosen.ids, (False, *chosen.mask[1:]))
    others = {
        "prompt": [replace(first, prompt=(*first.prompt, 9)), *rest],
        "ids": [replace(first, completions=(Completion((*chosen.ids, 9), (*chosen.mask, True)), rejected)), *rest],
        "mask": [replace(first, completions=(unmasked, rejected)), *rest],
        "swapped": [replace(first, completions=(rejected, chosen)), *rest],
        "order": [*rest, first],
        "fewer": rest,
        # The same completions of the same prompt, but not one example.
        "apart": [replace(first, completions=(chosen,)), replace(first, completions=(rejected,)), *rest],
    }
    keys = {name: reference_key(examples, **DEPENDS_ON) for name, examples in others.items()}
    keys["as it was"] = reference_key(EXAMPLES, **DEPENDS_ON)
    assert len(set(keys.values())) == len(keys), keys


def test_the_key_stays_with_what_does_not_matter() -> None:
    """A place in the data set or an earlier reference changes no log-probability."""
    same = [replace(e, index=e.index + 100, reference=(0.0, 0.0)) for e in EXAMPLES]
    assert reference_key(same, **DEPENDS_ON) == reference_key(EXAMPLES, **DEPENDS_ON)
    turned = dict(reversed(DEPENDS_ON.items()))
    assert reference_key(EXAMPLES, **turned) == reference_key(EXAMPLES, **DEPENDS_ON)
