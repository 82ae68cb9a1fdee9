"""AdaLoRA: its schedule, importance and masks against PEFT's allocator, what PEFT gets wrong, and whole runs."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import lightning as L
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import load_file
from torch import Tensor

from lit_ft import adapter
from lit_ft.batches import Completion, Example
from lit_ft.callbacks.adapter_kind import FollowKind
from lit_ft.data.datamodule import ExamplesDataModule
from lit_ft.errors import UserError
from lit_ft.models import adapt
from lit_ft.models.kinds.adalora import AdaLora, Schedule, heatmap, keep_most_important, table
from lit_ft.models.kinds.base import lora_layers
from lit_ft.models.score import use_packed_attention
from lit_ft.modules import DPOModule, SFTModule
from lit_ft.modules.base import FineTuneModule
from lit_ft.reference import attach, reference_logprobs
from tests import tiny
from tests.conftest import Outcome

TARGETS = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(5))
# q, k, v, o, gate, up and down in two layers; q, k, v, out, fc1, fc2; one for q, k and v, and three more.
WEIGHTS = {"llama": 14, "opt": 12, "gpt2": 8}


def adapted(name: str = "llama", seed: int = 0, **settings: Any) -> tuple[AdaLora, Any]:
    kind = AdaLora(**{"init_r": 4, "target_r": 2, "alpha": 8, **settings})
    torch.manual_seed(seed)
    return kind, kind.begin(tiny.model(name))


def grown(model: Any, seed: int = 1) -> Any:
    """Singular values that are not 0, and vectors that are nowhere near orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0.0, 0.3, generator=generator)
    return model


def trained_weights(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# The schedule.


def test_the_budget_by_hand() -> None:
    """48 ranks to 16 between steps 2 and 8 of 12: 16 + 32·(1 − (t−2)/6)³, rounded down."""
    schedule = Schedule(first=48, last=16, tinit=2, tfinal=4, total=12)
    # (5/6)³ = 0.5787, (4/6)³ = 0.2963, (1/2)³, (2/6)³ = 0.0370, (1/6)³ = 0.0046, each times 32
    assert [schedule.at(step) for step in range(1, 13)] == [None, None, 34, 25, 20, 17, 16, 16, 16, 16, 16, 16]
    second = schedule._replace(every=2)
    assert [second.at(step) for step in range(1, 10)] == [None, None, None, 25, None, 17, None, 16, 16]


@pytest.mark.parametrize(
    ("tinit", "tfinal", "total", "every"), [(0, 0, 7, 1), (2, 4, 12, 1), (3, 5, 40, 3), (1, 1, 3, 1)]
)
def test_the_budget_is_peft_s(tinit: int, tfinal: int, total: int, every: int) -> None:
    config = SimpleNamespace(tinit=tinit, tfinal=tfinal, total_step=total, deltaT=every)
    theirs: Any = SimpleNamespace(peft_config=config, init_bgt=336, target_bgt=224)
    schedule = Schedule(336, 224, tinit, tfinal, total, every)
    for step in range(1, total + 1):
        budget, now = RankAllocator.budget_schedule(theirs, step)
        # PEFT allocates for the last time at this step whatever `deltaT` says (`force_mask`).
        assert schedule.at(step) == (budget if now or step == total - tfinal else None), step


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        ({"tinit": 0.1, "tfinal": 0.3}, 100, (10, 30)),
        ({"tinit": 5, "tfinal": 0.5}, 20, (5, 10)),
        ({"tinit": 0, "tfinal": 0}, 2, (0, 0)),
    ],
)
def test_shares_and_numbers_of_steps(settings: Any, steps: int, expected: tuple[int, int]) -> None:
    kind, _ = adapted(**settings)
    kind.schedule(steps)
    assert kind.steps == Schedule(4 * 14, 2 * 14, *expected, steps)


@pytest.mark.parametrize(("settings", "steps"), [({"tinit": 8, "tfinal": 2}, 10), ({"tfinal": 1.0}, 1)])
def test_too_few_steps_are_refused(settings: Any, steps: int) -> None:
    kind, _ = adapted(**settings)
    with pytest.raises(UserError, match=f"The run has {steps} optimizer steps.*Train longer"):
        kind.schedule(steps)


# Importance and masks.


@pytest.mark.parametrize("name", WEIGHTS)
def test_training_is_peft_s(name: str) -> None:
    """Twelve steps beside PEFT's model with PEFT's allocator and PEFT's orthogonality term, weight by weight."""
    steps, settings = 12, {"tinit": 2, "tfinal": 4, "deltaT": 2, "beta1": 0.85, "beta2": 0.7, "orth_reg_weight": 0.5}
    kind, model = adapted(name, **settings)
    kind.schedule(steps)
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=8,
        target_modules="all-linear",
        total_step=steps,
        task_type="CAUSAL_LM",
        **settings,
    )
    twin = get_peft_model(tiny.model(name), config)
    ours, theirs = trained_weights(model), trained_weights(twin)
    assert ours.keys() == theirs.keys()
    with torch.no_grad():  # PEFT begins with other random numbers
        for key, value in theirs.items():
            value.copy_(ours[key])
    both = [torch.optim.AdamW(one.values(), lr=1e-2, eps=1e-3) for one in (ours, theirs)]
    budgets = []
    for step in range(1, steps + 1):
        for optimizer in both:
            optimizer.zero_grad()
        ids = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(step))
        penalty = kind.penalty(model)
        assert penalty is not None
        (model.get_base_model()(input_ids=ids, labels=ids).loss + penalty).backward()
        twin(input_ids=ids, labels=ids).loss.backward()
        for optimizer in both:
            optimizer.step()
        kind.after_step(model, step)
        twin.base_model.update_and_allocate(step)
        budgets.append(sum(kind.ranks().values()))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-5, msg=f"{step} {key}")
        allocator = twin.base_model.rankallocator
        assert len(kind._importance) == len(allocator.exp_avg_ipt) == (3 * WEIGHTS[name] if step < 8 else 0)
        for key, value in allocator.exp_avg_ipt.items():
            mine = key.removesuffix(".default")
            torch.testing.assert_close(kind._importance[mine], value, rtol=1e-2, atol=1e-8)
            torch.testing.assert_close(kind._uncertainty[mine], allocator.exp_avg_unc[key], rtol=1e-2, atol=1e-8)
        for key, kept in (config.rank_pattern or {}).items():
            assert kind._kept[key.removesuffix(".lora_E.default")].tolist() == kept
    first, last = 4 * WEIGHTS[name], 2 * WEIGHTS[name]
    # Every second step, and always at the end: (1 − 2/6)³, (1 − 4/6)³ and 0 of what is taken.
    taken = first - last
    middle = [int(taken * (4 / 6) ** 3 + last), int(taken * (2 / 6) ** 3 + last)]
    assert budgets == [0, 0, 0, middle[0], middle[0], middle[1], middle[1], *[last] * 5]


@pytest.mark.parametrize("budget", [0, 1, 5, 9])
def test_equals_are_kept_exactly_to_the_budget(budget: int) -> None:
    """PEFT takes all that are equal to the least, or none: here all nine would go."""
    scores = {"a": torch.full((4,), 0.5), "b": torch.full((5,), 0.5)}
    kept = keep_most_important(scores, budget)
    flat = torch.cat([kept["a"], kept["b"]]).tolist()
    assert flat == [True] * budget + [False] * (9 - budget)


def test_the_most_important_are_kept_wherever_they_are() -> None:
    kept = keep_most_important({"a": torch.tensor([0.1, 0.9]), "b": torch.tensor([0.5, 0.0, 0.7])}, 3)
    assert {name: value.tolist() for name, value in kept.items()} == {"a": [False, True], "b": [True, False, True]}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(("init_r", "target_r", "seed"), [(3, 1, 0), (4, 3, 1), (12, 8, 2), (24, 16, 3)])
def test_the_ranks_left_are_the_budget(name: str, init_r: int, target_r: int, seed: int) -> None:
    """Also where a rank is above a weight's side (keys and values of the tiny llama have 16 outputs)."""
    kind, model = adapted(name, seed, init_r=init_r, target_r=target_r, tinit=1, tfinal=2)
    kind.schedule(6)
    generator = torch.Generator().manual_seed(seed)
    grown(model, seed)
    for step in range(1, 7):
        for weight in trained_weights(model).values():
            # As if a step had been taken. Some steps have no gradient: many equal importances.
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
            weight.grad = torch.randn(weight.shape, generator=generator) if step > 2 else torch.zeros_like(weight)
        kind.after_step(model, step)
    assert sum(kind.ranks().values()) == target_r * WEIGHTS[name] and len(kind.ranks()) == WEIGHTS[name]
    for module, layer in lora_layers(model):
        values = layer.lora_E["default"][:, 0]
        assert int((values != 0).sum()) == kind.ranks()[module]


def test_weights_without_a_gradient_have_no_importance() -> None:
    """Experts of a mixture that no token came by."""
    kind, model = adapted(tinit=0, tfinal=1)
    kind.schedule(2)
    for key, weight in trained_weights(grown(model)).items():
        weight.grad = None if ".layers.0." in key else torch.ones_like(weight)
    kind.after_step(model, 1)
    assert {key: rank for key, rank in kind.ranks().items() if ".layers.0." in key}.keys() == {
        key for key in kind.ranks() if ".layers.0." in key
    }
    assert sum(rank for key, rank in kind.ranks().items() if ".layers.1." in key) == 28


@pytest.mark.parametrize("stopped_at", [3, 5, 7])
def test_a_shorter_run_after_a_resume_still_ends_at_the_budget(stopped_at: int) -> None:
    """Its ranks settle before the step at which it goes on."""
    kind, model = adapted(tinit=1, tfinal=2)
    kind.schedule(20)

    def step(number: int) -> None:
        for key, weight in trained_weights(model).items():
            generator = torch.Generator().manual_seed(number + len(key))
            weight.grad = torch.randn(weight.shape, generator=generator)
        kind.after_step(model, number)

    grown(model)
    for number in range(1, stopped_at + 1):
        step(number)
    again = AdaLora(init_r=4, target_r=2, tinit=1, tfinal=2)
    again._weights = 14
    again.load_state_dict(copy.deepcopy(kind.state_dict()))
    again.schedule(stopped_at + 1)
    kind = again
    assert sum(kind.ranks().values()) != 28
    step(stopped_at + 1)
    assert sum(kind.ranks().values()) == 28


# The orthogonality term.


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_penalty_is_peft_s(name: str) -> None:
    """What PEFT's forward pass adds to its loss."""
    kind, model = adapted(name, orth_reg_weight=0.3)
    grown(model)
    model.peft_config["default"].orth_reg_weight = 0.0
    plain = model(input_ids=TARGETS, labels=TARGETS).loss
    model.peft_config["default"].orth_reg_weight = 0.3
    added = model(input_ids=TARGETS, labels=TARGETS).loss - plain
    penalty = kind.penalty(model)
    assert penalty is not None and float(added) > 0.1
    assert float(penalty) == pytest.approx(float(added), abs=1e-5)
    found = torch.autograd.grad(penalty, [w for key, w in trained_weights(model).items() if "lora_E" not in key])
    wanted = torch.autograd.grad(added, [w for key, w in trained_weights(model).items() if "lora_E" not in key])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_penalty_by_hand() -> None:
    """One weight of rank 2: Q's rows of lengths 1 and 2 give ‖diag(0, 3)‖ = 3, P's columns (1,1), (1,1) √(1+4+4+1)."""
    kind, model = adapted(
        init_r=2, target_r=1, target_modules=r"model\.layers\.0\.self_attn\.q_proj", orth_reg_weight=0.5
    )
    ((_, layer),) = lora_layers(model)
    for part in (layer.lora_A["default"], layer.lora_B["default"]):
        part.data.zero_()
    layer.lora_A["default"].data[0, 0], layer.lora_A["default"].data[1, 3] = 1.0, 2.0
    layer.lora_B["default"].data[:2] = 1.0
    expected = 0.5 * (3 + 10**0.5) / 2
    assert float(kind.penalty(model)) == pytest.approx(expected, rel=1e-6)  # type: ignore[arg-type]
    assert AdaLora(orth_reg_weight=0.0).penalty(model) is None


def test_mixed_precision_does_not_round_the_penalty() -> None:
    """bf16 would keep three digits of products that are to be 0 or 1."""
    kind, model = adapted()
    grown(model)
    plain = kind.penalty(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = kind.penalty(model)
    assert plain is not None and mixed is not None and torch.equal(mixed, plain)


def examples(completions: int) -> list[Example]:
    """Eight of unlike lengths."""

    def ids(count: int, seed: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 260, (count,), generator=torch.Generator().manual_seed(seed)).tolist())

    def answer(k: int, n: int) -> Completion:
        tokens = ids(1 + (3 * k + 2 * n) % 9, 100 * k + n)
        return Completion(tokens, (True,) * len(tokens))

    return [Example(ids(1 + k % 6, k), tuple(answer(k, n) for n in range(completions)), k) for k in range(8)]


class Gradients(L.Callback):
    """Those of the last step: Lightning drops them when it ends."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.kept = {key: value.grad.clone() for key, value in trained_weights(module.model).items()}  # type: ignore[union-attr]


def fit(
    algorithm: str, kind: AdaLora, model: Any, *, steps: int = 1, max_tokens: int = 4096, **module: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train on the examples, all of them a step; returns what was logged at last and the last gradients."""
    assert use_packed_attention(model) is None
    settings: dict[str, Any] = {"learning_rate": 1e-2, "max_grad_norm": 0.0, "penalty": kind.penalty, **module}
    rows = examples(2 if algorithm == "dpo" else 1)
    if algorithm == "dpo":
        rows = attach(rows, reference_logprobs(model, rows, disable_adapter=False, max_tokens=200, layout="packed"))
    made = (DPOModule if algorithm == "dpo" else SFTModule)(model, **settings)
    data = ExamplesDataModule(rows, batch_size=8, max_tokens=max_tokens, layout="packed", pad_id=3, shuffle=False)
    gradients = Gradients()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FollowKind(kind), gradients],
    )
    trainer.fit(made, data)
    return dict(trainer.callback_metrics), gradients.kept


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
@pytest.mark.parametrize("max_tokens", [4096, 40], ids=["one batch", "accumulated"])
def test_the_penalty_is_in_every_algorithm_s_gradient_once_a_step(algorithm: str, max_tokens: int) -> None:
    grads: list[dict[str, Tensor]] = []
    for weight in (0.0, 0.4):
        kind, model = adapted(tinit=0, tfinal=0, orth_reg_weight=weight)
        grown(model)
        kind.after_step = lambda model, step: None  # type: ignore[method-assign]
        logged, gradients = fit(algorithm, kind, model, learning_rate=0.0, max_tokens=max_tokens)
        grads.append(gradients)
        assert ("train/penalty" in logged) is bool(weight)
    penalty = kind.penalty(model)
    assert penalty is not None and float(logged["train/penalty"]) == pytest.approx(float(penalty), rel=1e-6)
    alone = {key: value for key, value in trained_weights(model).items() if "lora_E" not in key}
    wanted = dict(zip(alone, torch.autograd.grad(penalty, list(alone.values())), strict=True))
    for key in grads[0]:
        expected = wanted.get(key, torch.zeros_like(grads[0][key]))
        torch.testing.assert_close(grads[1][key] - grads[0][key], expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_accumulation_does_not_change_importance(algorithm: str) -> None:
    found = []
    for max_tokens in (4096, 40):
        kind, model = adapted(tinit=1, tfinal=1)
        grown(model)
        fit(algorithm, kind, model, steps=4, max_tokens=max_tokens, adam_epsilon=1e-3)
        # Cleared at the end: what is compared are the ranks, and the importance before.
        found.append((kind.ranks(), {key: value.detach().clone() for key, value in trained_weights(model).items()}))
    assert found[0][0] == found[1][0] and sum(found[0][0].values()) == 28
    for key, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], value, rtol=1e-3, atol=1e-5)


def test_one_step_s_importance_is_that_of_the_whole_window() -> None:
    """After the first step: 0.15·|w·g| and 0.85·0.15·|w·g| of what the step left, whatever the micro-batches were."""
    found = []
    for max_tokens in (4096, 40):
        kind, model = adapted(tinit=1, tfinal=0)
        grown(model)
        kind.schedule(4)
        kind.schedule = lambda steps: None  # type: ignore[method-assign]
        _, gradients = fit("sft", kind, model, steps=1, max_tokens=max_tokens)
        for key, value in trained_weights(model).items():
            mine = key.removeprefix("base_model.model.").removesuffix(".default")
            now = (value * gradients[key]).abs()
            torch.testing.assert_close(kind._importance[mine], 0.15 * now)
            torch.testing.assert_close(kind._uncertainty[mine], 0.15 * (0.85 * now))
        found.append(dict(kind._importance))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-7)


# The report.


def test_the_table_by_hand() -> None:
    ranks = {"model.layers.0.self_attn.q_proj": 3, "model.layers.0.mlp.up_proj": 0, "model.layers.1.mlp.up_proj": 12}
    assert table(ranks).splitlines() == [
        "layer  q_proj  up_proj    sum",
        "    0       3        0      3",
        "    1               12     12",
        "  sum       3       12     15",
    ]


def test_weights_whose_names_end_alike_have_columns_of_their_own() -> None:
    """GPT-2 has a `c_proj` in its attention and one in its MLP."""
    _, model = adapted("gpt2")
    ranks = {name: k for k, (name, _) in enumerate(lora_layers(model))}
    head, *rows, last = table(ranks).splitlines()
    assert head.split() == ["layer", "c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "sum"]
    assert [row.split() for row in rows] == [["0", "0", "1", "2", "3", "6"], ["1", "4", "5", "6", "7", "22"]]
    assert last.split() == ["sum", "4", "6", "8", "10", "28"]


def test_the_picture_shows_every_rank_in_its_place() -> None:
    _, model = adapted("gpt2")
    ranks = {name: k for k, (name, _) in enumerate(lora_layers(model))}
    root = ElementTree.fromstring(heatmap(ranks, 8))
    width = float(root.attrib["width"])
    texts = [one for one in root.iter() if one.tag.endswith("text")]
    numbers = {
        (float(one.attrib["y"]), float(one.attrib["x"])): int(one.text or "")
        for one in texts[7:]
        if one.attrib["text-anchor"] == "middle"
    }
    assert [numbers[place] for place in sorted(numbers)] == list(range(8)), "rows are layers, from above"
    assert all(0 < float(one.attrib["x"]) < width for one in texts)
    shades = [float(one.attrib["fill-opacity"]) for one in root.iter() if "fill-opacity" in one.attrib]
    assert shades == sorted(shades) and len(set(shades)) == 8, "more is darker"


# Whole runs.

Run = Callable[..., Outcome]
SMALL = ("peft=adalora", "peft.init_r=4", "peft.target_r=2", "peft.tinit=3", "peft.tfinal=3")


@pytest.fixture
def run(cli: Run, own_cache: Path, llama_folder: Path, tmp_path: Path) -> Run:
    words = ["wheel", "chain", "a bell", "two spokes", "brake pads", "oil", "light"]
    rows = [{"prompt": " ".join(words[: 1 + k % 5]), "completion": words[k % 7] + "."} for k in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        f"model.id={llama_folder}",
        f"data.path={tmp_path / 'rows.jsonl'}",
        "logger=none",
        "trainer.accelerator=cpu",
        "trainer.progress=false",
        "data.max_val_rows=2",
        "data.batch_size=5",
        "algorithm.learning_rate=2e-3",
    )
    return lambda *args: cli(*settings, *SMALL, *args)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Make the next run receive SIGTERM in the step given."""
    train_step = FineTuneModule.training_step

    def at(step: int) -> None:
        def training_step(self: FineTuneModule, window: Any, index: int) -> None:
            if self.global_step + 1 == step:
                monkeypatch.setattr(FineTuneModule, "training_step", train_step)
                signal.raise_signal(signal.SIGTERM)
            train_step(self, window, index)

        monkeypatch.setattr(FineTuneModule, "training_step", training_step)

    yield at


def tensor_bytes(of: Any) -> int:
    if isinstance(of, Tensor):
        return of.numel() * of.element_size()
    values = of.values() if isinstance(of, dict) else of if isinstance(of, (list, tuple)) else ()
    return sum(map(tensor_bytes, values))


@pytest.mark.slow
def test_a_resume_is_exact(run: Run, interrupted: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, before, while and after ranks are taken: the allocator's averages and masks are in the checkpoint."""
    assert run("name=whole", "trainer.max_steps=10").code == 0
    whole = adapter.find(Path("adapters"), "whole").path
    expected = load_file(whole / "adapter_model.safetensors")
    for stopped_at in (2, 5, 8):  # they are taken in steps 4 to 7
        name = f"cut-{stopped_at}"
        interrupted(stopped_at)
        stopped = run(f"name={name}", "trainer.max_steps=10")
        assert stopped.code == 143, stopped.err
        (path,) = Path("runs", name).glob("*/checkpoints/last.ckpt")
        kept = torch.load(path, weights_only=True)
        assert kept["global_step"] == stopped_at
        # Two numbers per weight as long as ranks are taken, beside Adam's two: up to 5.2 times the weights' bytes in
        # all, and 3.2 times after, as of every kind. A rank's mask is a byte.
        weights, adam = tensor_bytes(kept["state_dict"]), tensor_bytes(kept["optimizer_states"])
        own = tensor_bytes(kept["callbacks"]["FollowKind"])
        masks = 4 * 14 if stopped_at > 3 else 0
        assert own == (2 * weights if stopped_at < 7 else 0) + masks
        assert weights + adam + own <= (5.2 if stopped_at < 7 else 3.2) * weights
        resumed = run(f"name={name}", "trainer.max_steps=10", "resume=last")
        assert resumed.code == 0, resumed.err
        cut = adapter.find(Path("adapters"), name).path
        found = load_file(cut / "adapter_model.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        assert (cut / "ranks.json").read_text() == (whole / "ranks.json").read_text()
    # After a full disk nothing is trained any more, so that nobody tells the allocator of steps.
    with monkeypatch.context() as patch:
        patch.setattr(adapt, "save_trained", no_space)
        assert run("name=full", "trainer.max_steps=10").code == 2
    assert run("name=full", "trainer.max_steps=10", "resume=last").code == 0
    found = load_file(adapter.find(Path("adapters"), "full").path / "adapter_model.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_a_run_leaves(run: Run) -> None:
    outcome = run("trainer.max_steps=10")
    assert outcome.code == 0, outcome.err
    (picture,) = Path("runs/support").glob("*/ranks.svg")
    said = picture.with_name("ranks.txt").read_text()
    assert said.strip() in outcome.err
    assert said.split()[-1] == "28" and said.splitlines()[0].split()[1] == "q_proj"
    ElementTree.parse(picture)
    published = adapter.find(Path("adapters"), "support")
    ranks = json.loads((published.path / "ranks.json").read_text())
    assert len(ranks) == 14 and sum(ranks.values()) == 28
    assert published.card.converted == (
        f"AdaLoRA with 28 ranks, {min(ranks.values())} to {max(ranks.values())} per weight, to LoRA, exactly"
    )
    assert published.card.rank == max(ranks.values())
    state = load_file(published.path / "adapter_model.safetensors")
    for module, rank in ranks.items():
        rows = state[f"base_model.model.{module}.lora_A.weight"]
        assert int(rows.any(dim=1).sum()) == rank, module
    assert "rate       0.02: 10 times algorithm.learning_rate=0.002, for peft=adalora" in outcome.err


def test_the_best_weights_are_never_from_before_the_last_rank_was_taken(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse_each_time(self: FineTuneModule, *_: object) -> None:
        self._eval, self._eval_total = {"loss": (torch.tensor(float(self.global_step)), 0)}, 1

    monkeypatch.setattr(FineTuneModule, "validation_step", worse_each_time)
    outcome = run("trainer.max_epochs=5")  # of three steps each: ranks settle in step 12
    assert outcome.code == 0, outcome.err
    published = adapter.find(Path("adapters"), "support")
    assert published.card.metrics["step"] == published.card.metrics["eval/loss"] == 12
    (best,) = Path("runs").glob("**/best.ckpt")
    assert torch.load(best, weights_only=True)["global_step"] == 12
    assert sum(json.loads((published.path / "ranks.json").read_text()).values()) == 28


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["trainer.early_stopping=2"], ["needs the number of steps", "Leave trainer.early_stopping out"]),
        (["trainer.extra={max_time: '00:01:00:00'}"], ["trainer.extra.max_time", "needs the number of steps"]),
        (["strategy=fsdp", "trainer.devices=2"], ["strategy=fsdp cannot shard peft=adalora", "strategy=ddp"]),
        (["strategy=fsdp_tp", "trainer.devices=2"], ["cannot shard peft=adalora", "strategy=ddp"]),
        (["peft.target_r=4"], ["peft.init_r=4 must be above peft.target_r=4", "peft=lora"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, settings: list[str], words: list[str]
) -> None:
    from lit_ft import train

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("too late: the model is being loaded")

    monkeypatch.setattr(train, "make_model", loaded)
    outcome = run("trainer.max_steps=10", *settings)
    said = " ".join(outcome.err.split())
    assert outcome.code == 2 and all(word in said for word in words), outcome.err
    assert not Path("adapters").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_r": 4, "target_r": 5}, r"peft\.init_r=4 must be above peft\.target_r=5"),
        ({"target_r": 0}, r"peft\.target_r=0 must be at least 1"),
        ({"alpha": 0}, r"peft\.alpha=0 must be at least 1"),
        ({"dropout": 1.0}, r"peft\.dropout=1\.0"),
        ({"beta1": 1.0}, "between 0 and 1"),
        ({"beta2": 0.0}, "between 0 and 1"),
        ({"deltaT": 0}, "at least 1"),
        ({"tinit": -1}, "not below 0"),
        ({"orth_reg_weight": -0.1}, "not below 0"),
    ],
)
def test_numbers_out_of_range(settings: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        AdaLora(**settings)


def test_too_few_steps_for_the_schedule(run: Run) -> None:
    outcome = run("trainer.max_steps=6")
    said = " ".join(outcome.err.split())
    assert outcome.code == 2 and "The run has 6 optimizer steps" in said and "Traceback" not in said
    assert not Path("adapters").exists() and not list(Path("runs").rglob("*.ckpt"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_triplets_are_trained_whatever_the_base_is_kept_in(dtype: torch.dtype) -> None:
    model = AdaLora(init_r=6, target_r=4).begin(tiny.model("llama").to(dtype))
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_E"}
