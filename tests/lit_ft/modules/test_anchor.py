"""KL to the base on its own answers: values by hand, what accumulation may change (nothing), its pull in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lit_ft.batches import Completion, Example, pack, pad
from lit_ft.data.datamodule import ExamplesDataModule
from lit_ft.data.packing import Layout
from lit_ft.models.score import kl_from_base
from lit_ft.modules import DPOModule, SFTModule
from lit_ft.modules.anchor import Anchor
from tests.lit_ft.modules.test_modules import ANSWERS, PAD, adapted, example, trainer_for, with_reference

OWN = [example(100 + k, 1) for k in range(10)]
OTHERS = [example(200 + k, 1) for k in range(3)]


def anchor(**settings: Any) -> Anchor:
    return Anchor(**{"trained": OWN, "held_out": OTHERS, "kl_coef": 0.5, "max_tokens": 40, "pad_id": PAD, **settings})


def by_hand(model: Any, examples: list[Example]) -> tuple[float, int]:
    """Σ KL(base ‖ model) over the targets and how many there are, from plain forward passes of single rows."""
    total, count = 0.0, 0
    with torch.no_grad():
        for one in examples:
            ids = torch.tensor([one.prompt + one.completions[0].ids])
            places = [len(one.prompt) + k - 1 for k, trained in enumerate(one.completions[0].mask) if trained]
            plain = model.get_base_model()
            after = plain(ids).logits[0, places].log_softmax(-1)
            with model.disable_adapter():
                before = plain(ids).logits[0, places].log_softmax(-1)
            total += float((before.exp() * (before - after)).sum())
            count += len(places)
    return total, count


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_kl_from_base_is_what_plain_passes_give(layout: str) -> None:
    model = adapted(trained=True, packed=False)
    expected, count = by_hand(copy.deepcopy(model), OWN)
    if layout == "packed":
        model = adapted(trained=True)
    found = kl_from_base(model, pack(OWN) if layout == "packed" else pad(OWN, PAD))
    assert float(found.detach().sum()) == pytest.approx(expected, rel=1e-4) and expected > 0.1
    assert len(found) == count
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    found.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained, "or the base got a gradient"


def test_a_new_adapter_is_at_no_distance() -> None:
    assert float(kl_from_base(adapted(), pack(OWN)).detach().abs().max()) < 1e-6


def test_every_row_comes_once_before_any_comes_again() -> None:
    one = anchor(batch_size=5)  # of ten rows: two steps to a round
    steps = [_rows_of(one, number) for number in range(6)]
    for first in (0, 2, 4):
        assert sorted(steps[first] + steps[first + 1]) == sorted(e.completions[0].ids for e in OWN)
    assert steps[:2] != steps[2:4], "each round has an order of its own"
    assert steps == [_rows_of(anchor(batch_size=5), number) for number in range(6)], "a resume would see other rows"


def test_no_row_is_passed_over_where_the_batch_does_not_divide_the_rows() -> None:
    """Ten rows by four: the third step ends the first round with two rows and begins the second with two."""
    one = anchor(batch_size=4)
    everything = sorted(e.completions[0].ids for e in OWN)
    rows = [ids for number in range(5) for ids in one_by_one(one, number)]
    assert sorted(rows[:10]) == everything == sorted(rows[10:]) and rows[:10] != rows[10:]
    assert len(one_by_one(anchor(batch_size=16), 3)) == 10, "more than there are: all of them"


def one_by_one(held: Anchor, number: int) -> list[tuple[int, ...]]:
    """The rows of a step in their order, which batches do not keep."""
    caught: list[tuple[int, ...]] = []

    class Catching(Anchor):
        def _laid_out(self, examples: Any, replica: int, replicas: int) -> list[Any]:
            caught.extend(e.completions[0].ids for e in examples)
            return []

    assert Catching(**vars(held)).step(number, 0, 1)[0] == []
    return caught


def test_processes_divide_a_step() -> None:
    one = anchor(batch_size=5)
    (alone, total), *parts = one.step(3, 0, 1), one.step(3, 0, 2), one.step(3, 1, 2)
    assert [part[1] for part in parts] == [total, total], "each divides by the totals of all"
    targets = [sum(len(batch.target_ids) for batch in part[0]) for part in parts]
    assert sum(targets) == total == sum(len(batch.target_ids) for batch in alone)
    assert one.step(0, 7, 8)[0] == [], "five rows for eight processes"


def train(module: Any, examples: list[Example], steps: int, *, val: list[Example] | None = None, **data: Any) -> Any:
    settings: dict[str, Any] = {"batch_size": 4, "max_tokens": 4096, "pad_id": PAD, "shuffle": False, **data}
    trainer = trainer_for(steps)
    trainer.fit(module, ExamplesDataModule(examples, val, **settings))
    return trainer


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def test_the_step_is_that_of_both_terms() -> None:
    """Gradient of −Σ log p / targets + kl_coef · mean KL, by plain autograd. Adam's first step knows little but
    signs, so the gradients themselves are compared."""
    model, twin = adapted(trained=True), adapted(trained=True, packed=False)
    caught: dict[str, torch.Tensor] = {}

    class Catching(SFTModule):
        def _clip(self) -> torch.Tensor:
            caught.update({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
            return super()._clip()

    held = anchor(kl_coef=0.7, batch_size=3)
    train(Catching(model, anchor=held), ANSWERS[:4], 1)
    rows = _rows_of(held, 0)
    plain = twin.get_base_model()

    def logits(ids: tuple[int, ...]) -> torch.Tensor:
        return plain(torch.tensor([ids])).logits[0].log_softmax(-1)

    nll, targets = torch.zeros(()), 0
    for one in ANSWERS[:4]:
        ids = one.prompt + one.completions[0].ids
        places = range(len(one.prompt), len(ids))
        logps = logits(ids)
        nll = nll - sum(logps[k - 1, ids[k]] for k in places)
        targets += len(places)
    kl, count = torch.zeros(()), 0
    for one in OWN:
        if one.completions[0].ids not in rows:
            continue
        ids = one.prompt + one.completions[0].ids
        places = [k - 1 for k in range(len(one.prompt), len(ids))]
        with torch.no_grad(), twin.disable_adapter():
            before = logits(ids)[places]
        kl = kl + (before.exp() * (before - logits(ids)[places])).sum()
        count += len(places)
    (nll / targets + 0.7 * kl / count).backward()
    expected = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert caught.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(caught[name], grad, rtol=1e-3, atol=1e-6, msg=name)


def _rows_of(one: Anchor, step: int) -> list[tuple[int, ...]]:
    """The completions of a step, whose tokens are all targets."""
    found: list[tuple[int, ...]] = []
    for batch in one.step(step, 0, 1)[0]:
        found += [tuple(ids.tolist()) for ids in batch.target_ids.split(batch.completion_lengths.tolist())]
    return found


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_accumulation_changes_nothing(layout: Layout) -> None:
    found = []
    for budget in (30, 4096):
        model = adapted(trained=True, packed=layout == "packed")
        module = SFTModule(model, learning_rate=1e-3, anchor=anchor(max_tokens=budget, layout=layout))
        train(module, ANSWERS, 3, max_tokens=budget, layout=layout)
        found.append(weights(module))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_with_a_huge_coefficient_nothing_moves(algorithm: str) -> None:
    def distance(kl_coef: float) -> float:
        model = adapted()
        settings: dict[str, Any] = {"learning_rate": 3e-3, "anchor": anchor(kl_coef=kl_coef, batch_size=10)}
        if algorithm == "sft":
            train(SFTModule(model, **settings), ANSWERS, 25, batch_size=16)
        else:
            train(DPOModule(model, **settings), with_reference(model), 25, batch_size=16)
        total, count = by_hand(_plain(model), OWN)
        return total / count

    free, held = distance(0.0), distance(1000.0)
    assert free > 0.01 and held < 0.05 * free


def _plain(model: Any) -> Any:
    model.eval()
    model.get_base_model().set_attn_implementation("sdpa")
    return model


def test_held_out_rows_are_measured_and_weighed() -> None:
    model = adapted(trained=True)
    module = SFTModule(model, anchor=anchor(kl_coef=0.0, weight=2.0))
    assert module.monitor == "eval/combined"
    trainer = trainer_for(1)
    data = ExamplesDataModule(ANSWERS[4:], ANSWERS[:4], batch_size=4, max_tokens=40, pad_id=PAD)
    (found,) = trainer.validate(module, data, verbose=False)
    total, count = by_hand(_plain(model), OTHERS)
    assert found["eval/kl"] == pytest.approx(total / count, rel=1e-4)
    assert found["eval/combined"] == pytest.approx(found["eval/loss"] + 2 * found["eval/kl"])


def test_without_weight_steps_are_compared_by_the_loss_alone() -> None:
    module = SFTModule(adapted(), anchor=anchor())
    assert module.monitor == "eval/loss" == SFTModule(adapted()).monitor


def test_completions_that_were_cut_at_nothing() -> None:
    """An answer that is nothing but its end has one target; it counts as one."""
    one = Example((5, 6), (Completion((2,), (True,)),))
    batches, total = anchor(trained=[one]).step(0, 0, 1)
    assert total == 1 and len(batches) == 1
