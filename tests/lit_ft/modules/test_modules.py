"""The LightningModules: where they start, what accumulation may change (nothing), checkpoints, validation."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from torch import nn

from lit_ft.batches import Completion, Example, Window, pack
from lit_ft.data.datamodule import ExamplesDataModule
from lit_ft.data.packing import Layout
from lit_ft.errors import UserError
from lit_ft.models.adapt import causal_lm
from lit_ft.models.kinds.full import train_all
from lit_ft.models.kinds.lora import apply_lora
from lit_ft.models.score import use_packed_attention
from lit_ft.modules import DPOModule, SFTModule
from lit_ft.reference import attach, reference_logprobs
from tests import tiny

LN2 = math.log(2)
PAD = 3


def example(k: int, completions: int) -> Example:
    """Lengths differ, so that means over rows, over tokens and over micro-batches all differ."""
    generator = torch.Generator().manual_seed(k)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 260, (count,), generator=generator).tolist())

    answers = [ids(1 + (3 * k + 2 * n) % 9) for n in range(completions)]
    return Example(ids(1 + k % 6), tuple(Completion(a, (True,) * len(a)) for a in answers), index=k)


ANSWERS = [example(k, 1) for k in range(16)]
PAIRS = [example(k, 2) for k in range(16)]


def adapted(kind: str = "llama", *, trained: bool = False, packed: bool = True, **lora: Any) -> Any:
    """A tiny model with LoRA; `trained`: with a B that is not zero, as if it had been trained before."""
    torch.manual_seed(5)
    model = apply_lora(tiny.model(kind), **{"r": 4, "alpha": 8, "dropout": 0.0, **lora})
    if trained:
        torch.manual_seed(6)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    if packed:
        assert use_packed_attention(model) is None
    return model


def whole(packed: bool = True) -> Any:
    model = train_all(tiny.model())
    if packed:
        assert use_packed_attention(model) is None
    return model


def with_reference(
    model: Any, examples: list[Example] = PAIRS, *, base: bool = False, layout: Layout = "packed", **options: Any
) -> list[Example]:
    logps = reference_logprobs(
        model, examples, disable_adapter=base, max_tokens=200, layout=layout, pad_id=PAD, **options
    )
    return attach(examples, logps)


class Steps(L.Callback):
    """What was logged at each training step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.micro_batches: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Window, number: int) -> None:
        logged = trainer.callback_metrics
        self.logged.append({k.removeprefix("train/"): float(v) for k, v in logged.items() if k.startswith("train/")})
        self.micro_batches.append(len(batch.batches))


def trainer_for(steps: int, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": list(callbacks),
    }
    return L.Trainer(**{**defaults, **options})


def fit(
    module: Any,
    examples: list[Example],
    *,
    steps: int = 2,
    batch_size: int = 8,
    max_tokens: int = 4096,
    layout: Layout = "packed",
    **options: Any,
) -> Steps:
    seen = Steps()
    data = ExamplesDataModule(
        examples, batch_size=batch_size, max_tokens=max_tokens, layout=layout, pad_id=PAD, shuffle=False
    )
    trainer_for(steps, seen, **options).fit(module, data)
    return seen


# Where a DPO run starts.


@pytest.mark.parametrize("trained", [False, True], ids=["new adapter", "trained adapter"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_dpo_starts_at_ln_2(trained: bool, layout: Layout) -> None:
    """Also where rows are grouped otherwise than for the reference, and with dropout in the adapter's configuration."""
    model = adapted(trained=trained, packed=layout == "packed", dropout=0.5)
    module = DPOModule(model, learning_rate=1e-2)
    seen = fit(module, with_reference(model, layout=layout), layout=layout, max_tokens=30)
    assert seen.micro_batches[0] > 1
    first, second = seen.logged
    # Log-probabilities around −50 agree to 1e-5, times β = 0.1.
    assert first["loss"] == pytest.approx(LN2, abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert abs(second["loss"] - LN2) > 1e-3


def test_dpo_starts_at_ln_2_in_mixed_precision() -> None:
    model = adapted(trained=True)
    examples = with_reference(model, autocast=torch.bfloat16)
    first = fit(DPOModule(model), examples, steps=1, precision="bf16-mixed").logged[0]
    # Other groupings round otherwise: log-probabilities of 50 keep 8 bits, and β is 0.1.
    assert first["loss"] == pytest.approx(LN2, abs=0.02)


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2"])
def test_dpo_starts_at_ln_2_with_dropout_in_the_model(kind: str) -> None:
    """OPT drops hidden states and Llama attention by rates that are plain numbers, not modules."""
    model = adapted(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.3)
    seen = fit(DPOModule(model), with_reference(model), steps=1)
    assert seen.logged[0]["loss"] == pytest.approx(LN2, abs=1e-6)


def test_sft_keeps_dropout() -> None:
    """Only preference training turns it off."""
    examples, losses = ANSWERS[:8], set()
    for seed in (0, 1):
        module = SFTModule(adapted(trained=True, dropout=0.5))
        torch.manual_seed(seed)
        losses.add(fit(module, examples, steps=1).logged[0]["loss"])
    assert len(losses) == 2


def test_references_base_and_initial() -> None:
    """For a trained adapter they differ; with `base` rewards are not zero at the start, with `initial` they must be."""
    model = adapted(trained=True)
    initial, base = with_reference(model), with_reference(model, base=True)
    assert [e.reference for e in initial] != [e.reference for e in base]
    first = fit(DPOModule(model, reference="base"), base, steps=1).logged[0]
    assert abs(first["rewards/chosen"]) > 0.01
    assert abs(first["loss"] - LN2) > 1e-5
    with pytest.raises(UserError, match="Before the first step the policy differs from its reference"):
        fit(DPOModule(adapted(trained=True), reference="initial"), base, steps=1)


@pytest.mark.parametrize("wrong", [0.2, -0.2, math.nan])
def test_a_wrong_reference_is_refused(wrong: float) -> None:
    """One completion of sixteen pairs is off by a fifth of a nat, or is not a number: nothing is trained."""
    model = adapted(trained=True)
    examples = with_reference(model)
    chosen, rejected = examples[3].reference or (0.0, 0.0)
    examples[3] = attach([examples[3]], [(chosen, rejected + wrong)])[0]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="so the loss is not ln 2"):
        fit(DPOModule(model), examples, batch_size=16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_reference_is_needed() -> None:
    with pytest.raises(UserError, match=r"call lit_ft\.reference\.attach first"):
        fit(DPOModule(adapted()), PAIRS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "defined for loss_type=sigmoid, not for ipo"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 must be at least 0 and below 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1 must be at least 0"),
    ],
)
def test_label_smoothing_is_checked(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DPOModule(adapted(), **options)


def test_swapped_pairs_negate_margins() -> None:
    """With the base as reference, so that margins are not zero."""
    model = adapted(trained=True)
    margins = []
    for turn in (1, -1):
        pairs = [Example(e.prompt, e.completions[::turn], e.index) for e in PAIRS]
        module = DPOModule(copy.deepcopy(model), reference="base")
        margins.append(fit(module, with_reference(model, pairs, base=True), steps=1).logged[0])
    straight, swapped = margins
    assert straight["rewards/margins"] == pytest.approx(-swapped["rewards/margins"], abs=1e-6)
    assert straight["logps/chosen"] == pytest.approx(swapped["logps/rejected"], rel=1e-6)
    assert straight["rewards/accuracies"] == pytest.approx(1 - swapped["rewards/accuracies"])


# Accumulation.


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_micro_batches_change_nothing(algorithm: str, layout: Layout) -> None:
    """A window of 8 examples as one forward pass or as eight: the same loss, metrics, gradient norm and weights."""
    runs = []
    for max_tokens in (4096, 1):
        model = adapted(trained=True, packed=layout == "packed")
        # A large epsilon keeps Adam's first steps proportional to the gradient. By default they are its sign, and a
        # gradient that is rounding and nothing else decides between +lr and −lr.
        options: Any = {"learning_rate": 1e-2, "adam_epsilon": 1e-2, "max_grad_norm": 0.5, "weight_decay": 0.1}
        if algorithm == "sft":
            seen = fit(SFTModule(model, **options), ANSWERS, max_tokens=max_tokens, layout=layout)
        else:
            examples = with_reference(model, layout=layout)
            seen = fit(DPOModule(model, **options), examples, max_tokens=max_tokens, layout=layout)
        runs.append((seen, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}))
    (one, weights), (eight, other_weights) = runs
    assert (one.micro_batches, eight.micro_batches) == ([1, 1], [8, 8])
    for left, right in zip(one.logged, eight.logged, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            # Rewards are β times differences of log-probabilities around −50, so rounding is absolute.
            absolute = 1e-5 if name.startswith("rewards/") else 1e-7
            assert value == pytest.approx(right[name], rel=1e-5, abs=absolute), name
    start = dict(adapted(trained=True).named_parameters())
    moved = max(float((weights[name] - start[name]).detach().abs().max()) for name in weights)
    apart = max(float((weights[name] - other_weights[name]).abs().max()) for name in weights)
    assert moved > 1e-4
    assert apart < 1e-5 * moved + 1e-7


def test_the_loss_is_a_mean_over_tokens_of_the_window() -> None:
    """Not a mean of the micro-batches' means: by hand, from the model's own logits."""
    model = adapted(trained=True, packed=False)
    logps = by_hand(model, ANSWERS[:8])[0]
    seen = fit(SFTModule(model), ANSWERS[:8], steps=1, max_tokens=1, layout="padded")
    assert seen.logged[0]["loss"] == pytest.approx(-float(torch.cat(logps).mean()), rel=1e-5)
    assert seen.logged[0]["num_tokens"] == sum(e.tokens for e in ANSWERS[:8])


def test_gradients_are_clipped_after_their_norm_is_logged() -> None:
    """Adam's first moment after one step is (1 − β₁) times the clipped gradient."""
    model = adapted(trained=True)
    module = SFTModule(model, max_grad_norm=0.25)
    seen = fit(module, ANSWERS, steps=1)
    assert seen.logged[0]["grad_norm"] > 0.25
    state = module.optimizers().state  # type: ignore[union-attr]
    moments = torch.cat([value["exp_avg"].flatten() for value in state.values()])
    assert float(moments.norm()) == pytest.approx(0.1 * 0.25, rel=1e-4)


# Checkpoints.


def trained_names(model: Any) -> set[str]:
    return {f"model.{name}" for name, p in model.named_parameters() if p.requires_grad}


def test_checkpoints_hold_what_is_trained(tmp_path: Path) -> None:
    model = adapted()
    module = SFTModule(model)
    data = ExamplesDataModule(ANSWERS, shuffle=False)
    trainer = trainer_for(2)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    kept = torch.load(tmp_path / "c.ckpt", weights_only=True)
    assert set(kept["state_dict"]) == trained_names(model)
    assert all("lora_" in name for name in kept["state_dict"])
    numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(value.numel() for value in kept["state_dict"].values()) == numel
    assert kept["lit_ft"]["num_tokens"] == sum(e.tokens for e in ANSWERS)

    fresh = SFTModule(adapted())
    fresh.load_state_dict(kept["state_dict"])
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, module.state_dict()[name])


@pytest.mark.parametrize(
    "other",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"r": 8},
        {"kind": "qwen2", "target_modules": "all-linear", "r": 2},
        {"kind": "gpt2"},
    ],
    ids=["fewer modules", "another rank", "another rank and model", "another model"],
)
def test_a_checkpoint_of_another_model_is_refused(other: dict[str, Any]) -> None:
    """Other names, or the same names in other shapes; nothing is loaded."""
    module = SFTModule(adapted(trained=True))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    stranger = SFTModule(adapted(**other)).state_dict()
    with pytest.raises(UserError, match="The checkpoint does not fit this run"):
        module.load_state_dict(stranger)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_run_goes_on_as_if_not_interrupted(tmp_path: Path) -> None:
    """Two steps, a checkpoint, two more, against four: to the bit, dropout included."""
    results = []
    for interrupted in (False, True):
        options: Any = {"dropout": 0.3, "trained": True}
        torch.manual_seed(3)
        module, data = SFTModule(adapted(**options)), ExamplesDataModule(ANSWERS, batch_size=4)
        if interrupted:
            # The schedule must be that of the whole run, so the run is stopped, not shortened.
            trainer = trainer_for(4, StopAfter(2))
            torch.manual_seed(4)
            trainer.fit(module, data)
            trainer.save_checkpoint(tmp_path / "c.ckpt")
            torch.manual_seed(99)
            module, data = SFTModule(adapted(**options)), ExamplesDataModule(ANSWERS, batch_size=4)
            trainer_for(4).fit(module, data, ckpt_path=tmp_path / "c.ckpt", weights_only=True)
        else:
            torch.manual_seed(4)
            trainer_for(4).fit(module, data)
        results.append(module.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


class StopAfter(L.Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


# Validation.


def by_hand(model: Any, examples: list[Example]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per completion: log-probabilities of its tokens and whether each was the likeliest; one sequence at a time."""
    logps, top1 = [], []
    model.eval()
    with torch.no_grad():
        for row in examples:
            for answer in row.completions:
                logits = model(input_ids=torch.tensor([[*row.prompt, *answer.ids]])).logits[0]
                ahead = logits[len(row.prompt) - 1 : -1]
                targets = torch.tensor(answer.ids)
                logps.append(ahead.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1))
                top1.append(ahead.argmax(-1) == targets)
    model.train()
    return logps, top1


def validate(module: Any, examples: list[Example], **options: Any) -> dict[str, float]:
    data = ExamplesDataModule(
        examples, examples, **{"batch_size": 3, "max_tokens": 20, "layout": "padded", "pad_id": PAD, **options}
    )
    (found,) = trainer_for(1).validate(module, data, verbose=False)
    return {key.removeprefix("eval/"): value for key, value in found.items()}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_sft_validation_is_the_mean_over_all_tokens(batch_size: int) -> None:
    model = adapted(trained=True, packed=False)
    logps, top1 = by_hand(model, ANSWERS)
    found = validate(SFTModule(model), ANSWERS, batch_size=batch_size)
    assert found.keys() == {"loss", "mean_token_accuracy"}
    assert found["loss"] == pytest.approx(-float(torch.cat(logps).mean()), rel=1e-5)
    assert found["mean_token_accuracy"] == pytest.approx(float(torch.cat(top1).float().mean()), rel=1e-6)


def test_dpo_validation_is_the_mean_over_all_pairs() -> None:
    """Sixteen pairs in windows of three: the last window holds one, and weighs as one."""
    model = adapted(trained=True, packed=False)
    examples = with_reference(model, base=True, layout="padded")
    tokens, top1 = by_hand(model, PAIRS)
    sums = torch.stack([value.sum() for value in tokens]).view(-1, 2).double()
    reference = torch.tensor([e.reference for e in examples]).double()
    rewards = 0.1 * (sums - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    wanted = {
        "loss": float((-torch.nn.functional.logsigmoid(margins)).mean()),
        "rewards/chosen": float(rewards[:, 0].mean()),
        "rewards/rejected": float(rewards[:, 1].mean()),
        "rewards/margins": float(margins.mean()),
        "rewards/accuracies": float((margins > 0).double().mean()),
        "logps/chosen": float(sums[:, 0].mean()),
        "logps/rejected": float(sums[:, 1].mean()),
        "mean_token_accuracy": float(torch.cat(top1[::2]).double().mean()),
    }
    found = validate(DPOModule(model, reference="base"), examples)
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_validation_leaves_training_alone() -> None:
    """With validation between the steps or without: the same curve."""
    curves = []
    for val in (None, ANSWERS[8:]):
        seen, module = Steps(), SFTModule(adapted(trained=True))
        data = ExamplesDataModule(ANSWERS[:8], val, batch_size=4, shuffle=False)
        trainer_for(4, seen, val_check_interval=1, max_epochs=2).fit(module, data)
        assert module.model.training
        curves.append(seen.logged)
    assert curves[0] == curves[1]


# All weights trained, and activations recomputed.


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_full_fine_tuning(algorithm: str) -> None:
    """Every weight moves, is in the checkpoint, and the loss falls on rows seen over again."""
    model = whole()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    module: Any
    if algorithm == "sft":
        module, examples = SFTModule(model, learning_rate=1e-2), ANSWERS
    else:
        module, examples = DPOModule(model, learning_rate=1e-3), with_reference(model)
    seen = fit(module, examples, steps=6, batch_size=16)
    assert seen.logged[-1]["loss"] < 0.9 * seen.logged[0]["loss"]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert set(module.state_dict()) == {f"model.{name}" for name in before}


def test_full_fine_tuning_with_tied_embeddings(tmp_path: Path) -> None:
    """GPT-2's output layer is its input embedding: once in the checkpoint, and tied again after loading."""
    model = train_all(tiny.model("gpt2"))
    use_packed_attention(model)
    module = SFTModule(model, learning_rate=1e-2)
    fit(module, ANSWERS)
    kept = module.state_dict()
    assert "model.transformer.wte.weight" in kept
    assert "model.lm_head.weight" not in kept
    other = train_all(tiny.model("gpt2", seed=1))
    SFTModule(other).load_state_dict(kept)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert other.lm_head.weight is other.transformer.wte.weight


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("build", [lambda packed: adapted(trained=True, packed=packed), whole], ids=["lora", "full"])
def test_gradient_checkpointing_changes_nothing(build: Any, layout: Layout) -> None:
    """The same curve, with each layer run twice: once forward, once more for the backward pass."""
    curves, calls = [], []
    for recompute in (False, True):
        model = build(layout == "packed")
        if recompute:
            causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})
        ran: list[int] = []
        model.eval()  # as from_pretrained leaves it: the module must switch, or nothing would be recomputed
        for layer in causal_lm(model).model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        curves.append(fit(SFTModule(model), ANSWERS, layout=layout).logged)
        calls.append(len(ran))
    assert calls[1] == 2 * calls[0]
    for plain, recomputed in zip(*curves, strict=True):
        assert plain == pytest.approx(recomputed, rel=1e-6)


def test_the_model_can_be_built_late() -> None:
    """`configure_model` builds it once, however often Lightning asks."""
    built: list[Any] = []

    def build() -> Any:
        built.append(adapted())
        return built[-1]

    module = SFTModule(build)
    assert module.model is None
    late = fit(module, ANSWERS).logged
    module.configure_model()
    assert len(built) == 1
    assert late == fit(SFTModule(adapted()), ANSWERS).logged


def test_a_window_moves_with_all_its_tensors() -> None:
    window = Window((pack(ANSWERS[:2]), pack(ANSWERS[2:4])), targets=4, examples=4)
    moved = window.to("meta")
    for batch in moved.batches:
        tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) >= 8
        assert all(value.device.type == "meta" for value in tensors)


@pytest.mark.parametrize("states", [[], [{"cpu": torch.get_rng_state()}] * 2])
def test_random_numbers_belong_to_replicas(states: list[dict[str, Any]]) -> None:
    """Of four processes two share a model's tensors: they must draw the same, and other than the other two."""
    seeds = []
    for rank in range(4):
        module = SFTModule(tiny.model())
        ranks = {"num_replicas": 2, "rank": rank // 2}
        strategy = SimpleNamespace(distributed_sampler_kwargs=ranks, root_device=torch.device("cpu"))
        trainer = SimpleNamespace(
            world_size=4, global_rank=rank, global_step=5, strategy=strategy, enable_validation=False
        )
        module._trainer = cast(Any, trainer)
        torch.manual_seed(0)
        if states:  # written by two processes
            module.on_load_checkpoint({"lit_ft": {"rng": states, "replicas": 2}, "global_step": 5})
        module.on_train_start()
        assert module._rng is None
        seeds.append(torch.initial_seed())
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
