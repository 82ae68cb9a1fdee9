"""Every kind of adapter: what it computes at first, what it publishes, what it goes on from, what it refuses."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import Tensor

from lit_ft import adapter
from lit_ft.errors import UserError
from lit_ft.models.adapt import save_trained
from lit_ft.models.canary import canary
from lit_ft.models.kinds import KINDS, AdapterKind
from lit_ft.models.kinds.adalora import AdaLora
from lit_ft.models.kinds.base import lora_layers
from lit_ft.models.kinds.full import Full
from lit_ft.models.kinds.ia3 import IA3
from lit_ft.models.kinds.lora import Dora, Lora, Pissa
from lit_ft.modules import SFTModule
from tests import tiny
from tests.conftest import Outcome
from tests.processes import run_together

ARCHITECTURES = ["llama", "gpt2", "opt"]
IDS = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(5))
# Every kind that needs nothing that may be missing (QLoRA's base is kept by bitsandbytes: see test_qlora.py).
SMALL: dict[str, list[str]] = {
    "lora": ["peft.r=4"],
    "rslora": ["peft.r=4"],
    "lora_plus": ["peft.r=4"],
    "dora": ["peft.r=4"],
    "pissa": ["peft.r=4"],
    "adalora": ["peft.init_r=4", "peft.target_r=2"],
    "ia3": [],
    "full": [],
}


def logits(model: Any) -> Tensor:
    """In double precision: what weights stand for, apart from the order in which this machine's kernels add up."""
    model.eval()
    with torch.no_grad():
        return copy.deepcopy(model).double()(input_ids=IDS).logits


def off(found: Tensor, wanted: Tensor) -> float:
    """The error as a share of the norm."""
    return float((found - wanted).norm() / wanted.norm())


def randomize(model: Any, seed: int = 1, std: float = 0.1) -> Any:
    """Trained weights as after some training: moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return model


def folder_of(kind: AdapterKind, path: Path, name: str = "llama", seed: int = 1) -> tuple[Path, Tensor]:
    """A published adapter of `kind`, and the logits of the model that was trained."""
    model = randomize(kind.begin(tiny.model(name)), seed)
    wanted = logits(model)
    save_trained(kind.published(model).model, path)
    return path, wanted


def by_peft(path: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """The base that everybody has under the adapter in `path`, put together by PEFT alone."""
    return PeftModel.from_pretrained(tiny.model(name).to(dtype), str(path))


MADE: dict[str, Callable[[], AdapterKind]] = {
    "lora": lambda: Lora(r=4),
    "rslora": lambda: Lora(r=4, use_rslora=True),
    "dora": lambda: Dora(r=4),
    "pissa": lambda: Pissa(r=4, alpha=4),
    "adalora": lambda: AdaLora(init_r=4, target_r=2),
    "ia3": lambda: IA3(),
    "full": lambda: Full(),
}


# Where each begins.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", MADE)
def test_a_new_adapter_changes_nothing(name: str, architecture: str) -> None:
    """PiSSA adds what it took from the weight: rounding is left."""
    base = logits(tiny.model(architecture))
    kind = MADE[name]()
    torch.manual_seed(0)
    model = kind.begin(tiny.model(architecture))
    assert off(logits(model), base) < 1e-5
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    assert off(logits(randomize(model)), base) > 1e-2, "what is trained has no effect"


def test_pissa_begins_with_the_largest_singular_values() -> None:
    """In full: B·A·s is the weight's best approximation of rank 4, and the base keeps the rest."""
    plain = tiny.model()
    model = Pissa(r=4, alpha=4, niter=None).begin(tiny.model())
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    weight = plain.model.layers[0].mlp.up_proj.weight.detach()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    best = (u[:, :4] * s[:4]) @ v[:4]
    taken = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    torch.testing.assert_close(taken, best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.get_base_layer().weight, weight - best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pissa_begins_as_peft_s(architecture: str) -> None:
    """The products, and what is left of the weights; the vectors' signs are nobody's."""
    config = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights="pissa", target_modules="all-linear", task_type="CAUSAL_LM"
    )
    ours = dict(Pissa(r=4, alpha=8, niter=None).begin(tiny.model(architecture)).get_base_model().named_modules())
    theirs = dict(get_peft_model(tiny.model(architecture), config).get_base_model().named_modules())
    fast = dict(Pissa(r=4, alpha=8, niter=16).begin(tiny.model(architecture)).get_base_model().named_modules())
    layers = [key for key, module in theirs.items() if hasattr(module, "lora_A")]
    assert len(layers) >= 8
    for key in layers:
        one, other = ours[key], theirs[key]
        taken, wanted = (layer.get_delta_weight("default") for layer in (one, other))
        torch.testing.assert_close(taken, wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.base_layer.weight, other.base_layer.weight, rtol=0, atol=1e-4)
        # The fast decomposition of a random matrix, whose singular values lie close, finds almost as much.
        assert float(fast[key].base_layer.weight.norm()) <= 1.02 * float(one.base_layer.weight.norm())


def test_pissa_begins_as_the_base_in_bf16() -> None:
    """To the rounding of what is left; PEFT, which rounds A and B as well, is twice as far off."""
    weight = tiny.model().bfloat16().model.layers[0].mlp.up_proj.weight.detach().float()
    errors = []
    config = LoraConfig(r=16, lora_alpha=16, init_lora_weights="pissa", target_modules="all-linear")
    for model in (
        Pissa(r=16, alpha=16, niter=None).begin(tiny.model().bfloat16()),
        get_peft_model(tiny.model().bfloat16(), config),
    ):
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        left = layer.base_layer.weight.detach().float()
        now = left + layer.get_delta_weight("default").detach().float()
        errors.append(off(now, weight))
        if len(errors) == 1:
            assert ((now - weight).abs() <= 2.0**-8 * left.abs() + 1e-6).all()
    assert errors[0] < 0.5 * errors[1], errors


# What is published.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", [name for name in MADE if name != "full"])
def test_what_is_published_is_what_was_trained(name: str, architecture: str, tmp_path: Path) -> None:
    """On a base that everybody has, put together by PEFT."""
    torch.manual_seed(0)
    folder, wanted = folder_of(MADE[name](), tmp_path / "one", architecture)
    assert off(logits(by_peft(folder, architecture)), wanted) <= 1e-6
    assert off(logits(tiny.model(architecture)), wanted) > 1e-2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == ("IA3" if name == "ia3" else "LORA")
    assert config.get("init_lora_weights", True) is True, "vLLM refuses PiSSA's"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("settings", [{"dropout": 0.3}, {"niter": None}, {"use_rslora": True}, {"alpha": 32}])
def test_pissa_s_conversion_is_exact_whatever_its_settings(architecture: str, settings: Any, tmp_path: Path) -> None:
    folder, wanted = folder_of(Pissa(**{"r": 4, "alpha": 4, **settings}), tmp_path / "one", architecture)
    assert off(logits(by_peft(folder, architecture)), wanted) <= 1e-6
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adalora_s_conversion_is_exact_with_ranks_taken(architecture: str, tmp_path: Path) -> None:
    """Unequal ranks, some of them 0."""
    kind = AdaLora(init_r=6, target_r=2, tinit=0, tfinal=1)
    model = randomize(kind.begin(tiny.model(architecture)))
    kind.schedule(2)
    generator = torch.Generator().manual_seed(3)
    for key, weight in model.named_parameters():
        if weight.requires_grad:
            weight.grad = torch.randn(weight.shape, generator=generator) * (0 if ".0." in key else 1)
    kind.after_step(model, 1)
    ranks = kind.ranks().values()
    assert min(ranks) == 0 and max(ranks) > 2
    wanted = logits(model)
    deltas = {key: layer.get_delta_weight("default").detach() for key, layer in lora_layers(model)}
    done = kind.published(model)
    save_trained(done.model, tmp_path / "one")
    again = by_peft(tmp_path / "one", architecture)
    assert off(logits(again), wanted) <= 1e-6
    # Weight by weight, too: PEFT's scaling of alpha / (r + 0.00001) is 2e-6 off alpha / r.
    for key, delta in deltas.items():
        found = again.get_base_model().get_submodule(key).get_delta_weight("default").detach()
        assert float((found - delta).norm()) <= 5e-7 * float(delta.norm()), key
    assert f"AdaLoRA with {sum(ranks)} ranks, 0 to {max(ranks)} per weight" in (done.converted or "")


def test_pissa_on_a_base_in_bf16(tmp_path: Path) -> None:
    """What PiSSA leaves of a weight is rounded to bf16, which keeps 2⁻⁸ of each number: the published adapter, on the
    base as everybody has it, differs from what was trained by that much of what was left, and by nothing else.
    """
    kind = Pissa(r=4, alpha=4)
    base = tiny.model().bfloat16()
    weight = base.model.layers[0].mlp.up_proj.weight.detach().float().clone()
    model = randomize(kind.begin(base), std=0.02)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    left = layer.get_base_layer().weight.detach().float()
    trained = left + layer.get_delta_weight("default").detach().float()
    done = kind.published(model)
    save_trained(done.model, tmp_path / "one")
    again = by_peft(tmp_path / "one").get_base_model().model.layers[0].mlp.up_proj
    published = weight + again.get_delta_weight("default").detach()
    assert ((published - trained).abs() <= 2.0**-8 * left.abs() + 1e-6).all()
    # The base below it, of which the canary is made, is rounded once more.
    restored = done.model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer().weight.detach().float()
    assert ((restored - weight).abs() <= 2.0**-8 * (left.abs() + restored.abs()) + 1e-6).all()


@pytest.mark.parametrize("name", ["pissa", "adalora"])
def test_the_canary_of_a_converted_adapter_is_that_of_peft(name: str, tmp_path: Path, tokenizer: Any) -> None:
    kind = MADE[name]()
    model = randomize(kind.begin(tiny.model()))
    done = kind.published(model)
    ours = canary(done.model, tokenizer)
    save_trained(done.model, tmp_path / "one")
    theirs = canary(by_peft(tmp_path / "one"), tokenizer)
    assert ours.tokens == theirs.tokens
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-5)
    assert ours.base_logprobs == pytest.approx(theirs.base_logprobs, abs=2e-5)
    assert max(abs(a - b) for a, b in zip(ours.logprobs, ours.base_logprobs, strict=True)) > 0.1


# What each goes on from.

FROM: dict[tuple[str, str], bool] = {
    **{("lora", one): one in ("lora", "rslora", "pissa", "adalora") for one in MADE},
    **{("dora", one): one in ("lora", "rslora", "pissa", "adalora", "dora") for one in MADE},
    **{("adalora", one): one in ("lora", "rslora", "adalora") for one in MADE},  # PiSSA's rank 8 is above init_r
    **{("ia3", one): one == "ia3" for one in MADE},
    **{("pissa", one): False for one in MADE},
    **{("full", one): False for one in MADE},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Of every kind one, and the logits of what was trained."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("published")
    return {name: folder_of(make(), root / name) for name, make in MADE.items()}


@pytest.mark.parametrize(("ours", "theirs"), FROM)
def test_what_a_kind_goes_on_from(published: Any, ours: str, theirs: str) -> None:
    folder, wanted = published[theirs]
    kind = MADE[ours]()
    reason = kind.why_not_from(folder)
    if not FROM[ours, theirs]:
        assert reason is not None and ("start_from=none" in reason or "model.id=" in reason)
        with pytest.raises(UserError, match=r"support@v1 (is|has) "):
            kind.go_on(tiny.model(), folder, "support@v1")
        return
    assert reason is None
    torch.manual_seed(0)
    model = kind.go_on(tiny.model(), folder, "support@v1")
    assert off(logits(model), wanted) <= 2e-6
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    assert off(logits(randomize(model)), wanted) > 1e-2, "what is trained has no effect"


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
@pytest.mark.parametrize("ours", ["dora", "adalora"])
def test_going_on_from_a_lora_is_exact_in_every_architecture(architecture: str, ours: str, tmp_path: Path) -> None:
    """Of its own scaling and targets, on a base whose weights lie the other way round (GPT-2)."""
    targets = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "fc1"]
    folder, wanted = folder_of(
        Lora(r=3, alpha=5, use_rslora=True, target_modules=targets), tmp_path / "one", architecture
    )
    torch.manual_seed(0)
    model = MADE[ours]().go_on(tiny.model(architecture), folder, "support@v1")
    assert off(logits(model), wanted) <= 2e-6
    done = MADE[ours]().published(randomize(model, seed=4)) if ours == "dora" else None
    assert done is None or off(logits(done.model), wanted) > 1e-2


def test_adalora_goes_on_and_is_published_exactly(published: Any, tmp_path: Path) -> None:
    """Triplets of the LoRA's own product, filled up to init_r; ranks above are refused with what to give."""
    folder, _ = published["lora"]
    with pytest.raises(UserError, match=r"support@v1 has rank 4, above peft.init_r=3: give peft.init_r=4"):
        AdaLora(init_r=3, target_r=2).go_on(tiny.model(), folder, "support@v1")
    kind = AdaLora(init_r=6, target_r=2)
    model = randomize(kind.go_on(tiny.model(), folder, "support@v1"))
    wanted = logits(model)
    save_trained(kind.published(model).model, tmp_path / "one")
    assert off(logits(by_peft(tmp_path / "one")), wanted) <= 1e-6


def test_a_damaged_configuration_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Lora().go_on(tiny.model(), tmp_path, "support@v1")


def stored(root: Path, published: Any, name: str) -> str:
    """One of `published` as the next version of `support`, an SFT adapter."""
    draft = adapter.Draft("support", adapter.Base("tiny", "sha256:tiny"), "sft", name, None, [], None)
    return adapter.publish(root, draft, lambda to: shutil.copytree(published[name][0], to, dirs_exist_ok=True)).card.ref


def test_auto_goes_on_from_the_newest_that_the_kind_can(
    published: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says what it passes over and why; the base is the last resort."""
    from lit_ft.wiring.start import newest

    for name in ("ia3", "lora", "dora", "full"):
        stored(tmp_path, published, name)
    expected = {"lora": "support@v2", "dora": "support@v3", "adalora": "support@v2", "ia3": "support@v1"}
    for name, make in MADE.items():
        found = newest(tmp_path, "support", ("sft",), make())
        assert (found.card.ref if found else None) == expected.get(name, expected["lora"] if name == "rslora" else None)
        said = capsys.readouterr().err
        assert said.startswith("left out   support@v4") and said.count("\n") == 1, said
    assert newest(tmp_path, "support", ("dpo",), Lora(r=4)) is None
    assert newest(tmp_path, "support", ("sft",), AdaLora(init_r=3, target_r=2)) is None
    assert "support@v4 (and support@v3, support@v2, support@v1) is a whole model" in capsys.readouterr().err


# Targets.


def settings_of(name: str, **more: Any) -> AdapterKind:
    small: dict[str, Any] = {"adalora": {"init_r": 4, "target_r": 2}, "ia3": {}}.get(name, {"r": 4})
    return KINDS[name](**{**small, **more})


TARGETED = [name for name in KINDS if name not in ("full", "qlora")]


@pytest.mark.parametrize("name", TARGETED)
@pytest.mark.parametrize(
    "targets", ["no_such", r".*\.nothing", ["no_such"], ["q_proj", "no_such"], "(q_proj", ["model"], [], "", [3], 5]
)
def test_targets_that_are_not_there_are_an_error(name: str, targets: Any) -> None:
    with pytest.raises(UserError, match=r"peft\.target_modules="):
        settings_of(name, target_modules=targets).begin(tiny.model())


@pytest.mark.parametrize("name", TARGETED)
def test_an_unknown_target_is_named_with_what_there_is(name: str) -> None:
    with pytest.raises(UserError) as refused:
        settings_of(name, target_modules=["q_proj", "qproj"]).begin(tiny.model())
    assert "has no module qproj" in str(refused.value)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(refused.value)


@pytest.mark.parametrize("name", TARGETED)
def test_ends_and_patterns(name: str) -> None:
    for targets in (["q_proj", "mlp.down_proj"], r"model\.layers\.\d\.(self_attn\.q_proj|mlp\.down_proj)"):
        model = settings_of(name, target_modules=targets).begin(tiny.model())
        assert sorted(model.base_model.targeted_module_names) == sorted(
            f"model.layers.{k}.{end}" for k in (0, 1) for end in ("self_attn.q_proj", "mlp.down_proj")
        )


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "rslora"])
@pytest.mark.parametrize("settings", [{"r": 0}, {"r": -4}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_numbers_out_of_range(name: str, settings: Any) -> None:
    ((key, value),) = settings.items()
    with pytest.raises(UserError, match=rf"peft\.{key}={value} must be"):
        KINDS[name](**settings)


@pytest.mark.parametrize("niter", [16, None])
def test_pissa_s_rank_is_at_most_a_weight_s_side(niter: int | None) -> None:
    """Keys of the tiny llama are 16 × 32."""
    assert Pissa(r=16, niter=niter).begin(tiny.model()) is not None
    with pytest.raises(UserError, match=r"peft\.r=17 is above the smaller side"):
        Pissa(r=17, niter=niter).begin(tiny.model())


def test_pissa_of_embeddings_is_refused() -> None:
    with pytest.raises(UserError, match="embeddings out of"):
        Pissa(r=4, target_modules=["q_proj", "embed_tokens"]).begin(tiny.model())


# LoRA+.


def groups_of(model: Any, ratio: float, steps: int = 0) -> Any:
    """The optimizer and schedule that a module makes for ten steps."""
    module = SFTModule(model, learning_rate=1e-3, loraplus_lr_ratio=ratio, weight_decay=0.1, warmup_ratio=0.2)
    module.trainer = type("Ten", (), {"estimated_stepping_batches": 10})()  # type: ignore[assignment]
    return module.configure_optimizers()


def test_lora_plus_s_groups_are_peft_s() -> None:
    model = randomize(Lora(r=4).begin(tiny.model()))
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = groups_of(model, 16.0)["optimizer"]
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )

    def rates(one: Any) -> dict[str, tuple[float, float]]:
        return {
            names[id(p)]: (g.get("initial_lr", g["lr"]), g["weight_decay"])
            for g in one.param_groups
            for p in g["params"]
        }

    assert rates(optimizer) == rates(theirs)
    found = rates(optimizer)
    assert len(found) == 28
    assert all(rate == ((16e-3 if ".lora_B." in name else 1e-3), 0.1) for name, rate in found.items())
    assert len(groups_of(model, 1.0)["optimizer"].param_groups) == 1


def test_the_schedule_scales_both_rates() -> None:
    """Two of ten steps of warm-up, then linearly to 0."""
    made = groups_of(Lora(r=4).begin(tiny.model()), 16.0)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    seen = []
    for _ in range(11):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    shares = [0.0, 0.5, *[1 - k / 8 for k in range(9)]]
    assert [rate for rate, _ in seen] == pytest.approx([1e-3 * share for share in shares], abs=1e-12)
    assert [rate for _, rate in seen] == pytest.approx([16e-3 * share for share in shares], abs=1e-12)


@pytest.mark.parametrize("ratio", [0.0, -2.0])
def test_a_ratio_that_is_no_ratio(ratio: float) -> None:
    with pytest.raises(UserError, match=r"peft\.loraplus_lr_ratio"):
        SFTModule(tiny.model(), loraplus_lr_ratio=ratio)


# Optimizer state.


def test_lora_s_optimizer_state_is_at_most_4_percent() -> None:
    """AdamW keeps two float32 numbers for each trained one; SmolLM2-135M's shapes, rank 16 on every linear layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def smollm2() -> Any:
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
        with torch.device("meta"):
            return LlamaForCausalLM(config)

    def state(model: Any) -> int:
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for p in trained)
        return sum(2 * 4 * p.numel() for p in trained)

    whole = smollm2()
    assert sum(p.numel() for p in whole.parameters()) == 134_515_008, "SmolLM2-135M's"
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(smollm2(), config, low_cpu_mem_usage=True)
    # q and o 576×576, k and v 576×192, gate, up and down 576×1536, each 16·(in + out), in 30 layers.
    assert state(adapted) == 8 * 30 * 16 * (2 * 1152 + 2 * 768 + 3 * 2112)
    share = state(adapted) / state(whole)
    assert share <= 0.04, share


# Whole runs.

Run = Callable[..., Outcome]


@pytest.fixture
def run(cli: Run, own_cache: Path, llama_folder: Path, tmp_path: Path) -> Run:
    words = ["wheel", "chain", "a bell", "two spokes", "brake pads", "oil", "light"]
    rows = [
        {
            "prompt": " ".join(words[: 1 + k % 5]),
            "completion": words[k % 7] + ".",
            "chosen": words[k % 7] + ".",
            "rejected": words[(k + 1) % 7],
        }
        for k in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        f"model.id={llama_folder}",
        f"data.path={tmp_path / 'rows.jsonl'}",
        "logger=none",
        "trainer.accelerator=cpu",
        "trainer.progress=false",
        "data.max_val_rows=1",
        "data.batch_size=2",
        "algorithm.learning_rate=1e-3",
    )
    return lambda *args: cli(*settings, *args)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The logits of the model that was trained, before it is made what is published."""
    from lit_ft import train

    caught: dict[str, Tensor] = {}
    make = train.adapter_kind

    def spied(cfg: Any) -> AdapterKind:
        kind = make(cfg)
        publish = kind.published

        def published(model: Any) -> Any:
            lm = model.get_base_model() if hasattr(model, "get_base_model") else model
            lm.set_attn_implementation("sdpa")
            caught["logits"] = logits(model)
            return publish(model)

        monkeypatch.setattr(kind, "published", published)
        return kind

    monkeypatch.setattr(train, "adapter_kind", spied)
    return caught


WHY_NOT = {"dora": "vLLM does not serve DoRA", "ia3": "vLLM serves LoRA only, this is IA3", "full": "a whole model"}


@pytest.mark.parametrize("name", SMALL)
def test_a_run_of_sft_and_one_of_dpo(name: str, run: Run, trained: dict[str, Tensor], llama_folder: Path) -> None:
    """What is published, on the base fresh from the disk, computes what was trained; DPO begins at ln 2."""
    from transformers import AutoModelForCausalLM

    sft = run(f"peft={name}", *SMALL[name], "trainer.max_steps=4", "trainer.validate_first=false")
    assert sft.code == 0, sft.err
    first = adapter.find(Path("adapters"), "support@v1")
    check_published(first, name, trained["logits"], llama_folder)
    size = sum(path.stat().st_size for path in first.path.glob("*.safetensors"))
    assert f"published support@v1 ({size:,} bytes of weights): eval/loss" in sft.err
    assert f"; {name}" in sft.err and " trained (" in sft.err

    dpo = run(f"peft={name}", *SMALL[name], "+experiment=dpo", "trainer.max_steps=4", "trainer.validate_first=true")
    assert dpo.code == 0, dpo.err
    before = dpo.err.split("held out before training: eval/loss ")[1].split(",")[0]
    assert before == "0.6931"
    second = adapter.find(Path("adapters"), "support@v2")
    check_published(second, name, trained["logits"], llama_folder)
    goes_on = name not in ("full", "pissa")
    assert second.card.parent == ("support@v1" if goes_on else None)
    assert ("left out   support@v1 is" in dpo.err) is not goes_on
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    assert off(trained["logits"], logits(base)) > 1e-4


def check_published(found: adapter.Adapter, name: str, wanted: Tensor, base_folder: Path) -> None:
    """Its card, and its logits on the base that everybody has."""
    from transformers import AutoModelForCausalLM

    card = found.card
    assert card.peft == name
    if name == "full":
        again = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
        assert off(logits(again), wanted) < 0.02, "weights are published in bf16"
    else:
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        untouched = logits(base)
        assert off(logits(PeftModel.from_pretrained(base, str(found.path))), wanted) <= 1e-6
        assert off(wanted, untouched) > 1e-4, "training changed nothing"
    reason = WHY_NOT.get(name)
    assert card.servable is (reason is None) and (card.canary is not None) is card.servable
    assert (reason or "None") in str(card.not_servable_reason)
    rank = {"pissa": 8, "ia3": None, "full": None}.get(name, 4)
    if name == "adalora":
        rank = max(json.loads((found.path / "ranks.json").read_text()).values())
        assert "to LoRA, exactly" in (card.converted or "")
    elif name == "pissa":
        assert card.converted == "PiSSA of rank 4 to LoRA of rank 8, exactly"
    else:
        assert card.converted is None
    assert card.rank == rank
    if card.canary is not None:
        tokens = torch.tensor([card.canary.tokens])
        model = PeftModel.from_pretrained(tiny.model(), str(found.path)).eval()
        with torch.no_grad():
            logprobs = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        found_by_peft = logprobs.gather(1, tokens[0, 1:, None])[:, 0].tolist()
        assert found_by_peft == pytest.approx(card.canary.logprobs, abs=2e-5)


@pytest.mark.slow
def test_dpo_goes_on_from_another_kind_s_sft(run: Run, trained: dict[str, Tensor], llama_folder: Path) -> None:
    """AdaLoRA and DoRA from a LoRA, a LoRA from what PiSSA published: each begins at ln 2, and no rank is lost."""
    few = ("trainer.max_steps=4", "trainer.validate_first=true")
    assert run("peft=lora", "peft.r=3", *few, "name=one").code == 0
    assert run("peft=pissa", "peft.r=4", *few, "name=two").code == 0
    for name, start, settings in (
        ("adalora", "one@v1", SMALL["adalora"]),
        ("dora", "one@v1", []),
        ("lora", "two@v1", ["peft.r=2"]),
    ):
        dpo = run(f"peft={name}", *settings, "+experiment=dpo", *few, f"start_from={start}", f"name={name}")
        assert dpo.code == 0, dpo.err
        assert f"start      adapter {start} (sft)" in dpo.err
        assert dpo.err.split("held out before training: eval/loss ")[1].startswith("0.6931")
        done = adapter.find(Path("adapters"), name)
        assert done.card.parent == start
        base = tiny.model()
        assert off(logits(PeftModel.from_pretrained(base, str(done.path))), trained["logits"]) <= 1e-6
        assert done.card.rank == {"dora": 3, "lora": 8}.get(name, done.card.rank)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora_plus", "pissa"])
def test_a_resume_is_exact(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA+'s two rates are in the optimizer's state; PiSSA begins as it did."""
    settings = (f"peft={name}", *SMALL[name], "trainer.max_steps=4", "trainer.validate_first=false")
    assert run(*settings, "name=whole").code == 0
    step = SFTModule.training_step

    def stopping(self: Any, window: Any, index: int) -> None:
        if self.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
        step(self, window, index)

    with monkeypatch.context() as patch:
        patch.setattr(SFTModule, "training_step", stopping)
        assert run(*settings, "name=cut").code == 143
    (path,) = Path("runs/cut").glob("*/checkpoints/last.ckpt")
    groups = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    # Half of LoRA's rate for PiSSA; a quarter, and 16 times that for B, in LoRA+.
    rates = {"lora_plus": [0.25e-3, 4e-3], "pissa": [0.5e-3]}[name]
    assert [group["initial_lr"] for group in groups] == pytest.approx(rates)
    resumed = run(*settings, "name=cut", "resume=last")
    assert resumed.code == 0, resumed.err
    first, second = (load_file(f"adapters/{one}/v1/adapter_model.safetensors") for one in ("whole", "cut"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_reference_is_that_of_what_a_run_begins_with(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """PiSSA's differs from the base's by rounding, QLoRA's to 4 bits: the cache must not mix them up.

    There is no base below PiSSA's adapter either.
    """
    from lit_ft.models import load

    settings = ("+experiment=dpo", "trainer.max_steps=1", "start_from=none")
    assert run("peft=lora", *settings).code == 0
    assert "read from the cache" in run("peft=dora", *settings).err
    assert "read from the cache" not in run("peft=pissa", "peft.r=4", *settings).err
    monkeypatch.setattr(load, "nf4", lambda dtype: None)  # the way is the same without bitsandbytes
    monkeypatch.setattr(load, "check_widths", lambda model, model_id: None)
    outcome = run("peft=qlora", "peft.r=4", *settings)
    assert outcome.code == 0 and "read from the cache" not in outcome.err
    refused = run("peft=pissa", "peft.r=4", *settings, "algorithm.reference=base")
    said = " ".join(refused.err.split())
    assert refused.code == 2 and "no base below the trained weights" in said and "algorithm.reference=initial" in said


@pytest.mark.parametrize(
    "settings",
    [[f"peft={name}", f"strategy={way}"] for name, way in [("dora", "fsdp"), ("pissa", "fsdp_tp"), ("qlora", "fsdp")]],
    ids=" ".join,
)
def test_kinds_that_cannot_be_sharded_are_refused_before_anything_is_loaded(
    run: Run, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_ft import train

    monkeypatch.setattr(train, "make_model", lambda *_: pytest.fail("too late: the model is being loaded"))
    outcome = run(*settings, "trainer.devices=2")
    name, way = (word.split("=")[1] for word in settings)
    said = " ".join(outcome.err.split())
    assert outcome.code == 2 and f"strategy={way} cannot shard peft={name}" in said
    assert "strategy=ddp" in said and f"peft=lora with strategy={way}" in said


def test_ia3_is_sharded_but_not_split(run: Run) -> None:
    outcome = run("peft=ia3", "strategy=fsdp_tp", "trainer.devices=2")
    said = " ".join(outcome.err.split())
    assert outcome.code == 2 and "cannot split the layers that peft=ia3 goes on: use strategy=fsdp," in said


def test_a_start_that_does_not_fit_is_an_error(run: Run, published: Any) -> None:
    """Asked for by name, it is not passed over."""
    stored(Path("adapters"), published, "lora")
    outcome = run("peft=ia3", "+experiment=dpo", "start_from=support@v1", "model.tiny=true")
    said = " ".join(outcome.err.split())
    assert outcome.code == 2 and "support@v1 is a LoRA adapter, and (IA)³ cannot go on from it" in said
    assert "peft=lora, or give start_from=none" in said


def test_qlora_without_bitsandbytes_says_what_to_do(run: Run, without_bitsandbytes: None) -> None:
    outcome = run("peft=qlora")
    said = " ".join(outcome.err.split())
    assert outcome.code == 2 and "pip install 'lit_ft[qlora]'" in said and "peft=lora" in said


# Several processes.

CASES = [(algorithm, name) for algorithm in ("sft", "dpo") for name in ("adalora", "ia3", "lora_plus")]
TOGETHER = [*((case, "ddp") for case in CASES), *((case, "fsdp") for case in CASES if case[1] != "adalora")]
# The tiny model has 14 weights: 56 ranks, of which 28 are left.
DDP: dict[str, list[str]] = {**SMALL, "adalora": [*SMALL["adalora"], "peft.tinit=1", "peft.tfinal=2"]}


def noting_masks(**_: Any) -> Any:
    """In place of a logger, in each process: note which triplets it kept."""
    from lightning.pytorch.loggers.logger import DummyLogger

    from lit_ft.distributed.processes import rank
    from lit_ft.models.kinds import adalora

    keep = adalora.keep_most_important

    def noting(scores: Any, budget: int) -> Any:
        kept = keep(scores, budget)
        with Path("masks.txt").open("a") as file:
            flat = [int(one) for mask in kept.values() for one in mask.tolist()]
            file.write(f"{rank()} {budget} {flat}\n")
        return kept

    if keep.__name__ != "noting":  # runs follow each other in one process
        adalora.keep_most_important = noting
    return DummyLogger()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every case was trained by one process and by two."""
    root = tmp_path_factory.mktemp("together")
    model = tiny.folder(tmp_path_factory.mktemp("models") / "llama")
    words = ["wheel", "chain", "a bell", "two spokes", "the frame", "brake pads", "oil", "light"]
    rows = [
        {
            "prompt": " ".join(words[: 1 + k % 5]),
            "completion": " ".join(words[k % 4 : k % 4 + 3]),
            "chosen": words[k % 7],
            "rejected": words[(k + 1) % 7],
        }
        for k in range(12)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(algorithm: str, name: str, way: str = "one") -> list[str]:
        return [
            f"+experiment={algorithm}",
            f"peft={name}",
            *DDP[name],
            f"model.id={model}",
            f"name={algorithm}-{name}-{way}",
            f"cache=cache-{way}",
            "start_from=none",
            "logger=none",
            f"logger._target_={__name__}.noting_masks",
            "trainer.accelerator=cpu",
            "trainer.progress=false",
            "trainer.precision=32-true",
            "trainer.max_epochs=2",
            "data.path=rows.jsonl",
            "data.max_val_rows=3",
            "data.batch_size=4",
            "data.max_tokens=150",
            "algorithm.learning_rate=1e-3",
            "algorithm.lr_scheduler_type=constant",
            "algorithm.warmup_ratio=0",
            *(["trainer.devices=2", f"strategy={way}"] if way != "one" else []),
        ]

    found = run_together(root, [command(*case) for case in CASES], processes=1)
    (root / "masks.txt").rename(root / "masks-one.txt")
    found += run_together(root, [command(*case, way) for case, way in TOGETHER])
    assert [one.code for one in found] == [0] * len(found), "\n".join(one.err for one in found if one.code)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("case", "strategy"), TOGETHER)
def test_two_processes_train_what_one_does(together: Path, case: tuple[str, str], strategy: str) -> None:
    algorithm, name = case
    one, two = (together / "adapters" / f"{algorithm}-{name}-{way}" / "v1" for way in ("one", strategy))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    for key, value in first.items():
        # Sums in another order: float32 rounds at 1e-7 of a weight, and the steps add up (AdaLoRA has weights of 4.5).
        torch.testing.assert_close(second[key], value, rtol=1e-5, atol=1e-5)
    moved = [value for key, value in first.items() if "lora_A" not in key]
    assert all(float((value - (1.0 if name == "ia3" else 0.0)).abs().max()) > 1e-4 for value in moved if value.any())
    if name == "adalora":
        assert (one / "ranks.json").read_text() == (two / "ranks.json").read_text()


@pytest.mark.slow
def test_both_processes_keep_the_same_ranks(together: Path) -> None:
    def noted(name: str) -> list[list[str]]:
        return [line.split(" ", 1) for line in (together / name).read_text().splitlines()]

    alone, both = noted("masks-one.txt"), noted("masks.txt")
    first, second = ([masks for rank, masks in both if rank == number] for number in "01")
    # Two runs of six steps, of which the second, third and fourth take ranks.
    assert len(first) == 6 and first == second == [masks for _, masks in alone]
