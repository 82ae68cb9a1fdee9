"""Several adapters on one base: each computes as PEFT would let it, and none of the others notices."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_ft.models.adapt import save_trained
from lit_ft.models.kinds.base import adapted
from lit_ft.models.lora import use_fused_lora
from lit_ft.models.roles import POLICY, add_role, copy_role, leave_only, role_parameters, train_only, using
from tests import tiny

IDS = torch.arange(5, 29)[None] * 7 % 251
HOWS = ["lora", "fused", "dora", "ia3"]


def config(how: str = "lora", **more: Any) -> Any:
    if how == "ia3":
        return IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    own = {"use_dora": True} if how == "dora" else {}
    return LoraConfig(lora_alpha=4, **({"r": 2, "target_modules": ["q_proj", "down_proj"]} | own | more))


def stirred(model: Any, role: str, seed: int) -> None:
    """Give an adapter weights that do something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in role_parameters(model, role):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def policy(how: str = "lora", **more: Any) -> Any:
    model = adapted(tiny.model("llama"), config(how, **more))
    if how == "fused":
        assert use_fused_lora(model)
    stirred(model, POLICY, 1)
    return model.eval()


def roles(how: str = "lora") -> Any:
    """A policy with two more adapters, of which one lies on other modules too where that can be."""
    model = policy(how)
    add_role(model, "value")
    add_role(model, "judge", None if how == "ia3" else config(how, r=3, target_modules=["q_proj", "v_proj"]))
    stirred(model, "value", 2)
    stirred(model, "judge", 3)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def state(model: Any) -> dict[str, tuple[bool, Tensor, Tensor | None]]:
    return {
        name: (p.requires_grad, p.detach().clone(), None if p.grad is None else p.grad.clone())
        for name, p in model.named_parameters()
    }


def assert_untouched(model: Any, before: dict[str, tuple[bool, Tensor, Tensor | None]]) -> None:
    after = state(model)
    assert list(after) == list(before)
    for name, (trained, values, gradient) in before.items():
        assert after[name][0] == trained, name
        assert torch.equal(after[name][1], values), name
        now = after[name][2]
        assert (now is None) == (gradient is None) and (now is None or torch.equal(now, gradient)), name


@pytest.mark.parametrize("how", HOWS)
def test_using_computes_what_pefts_own_switches_would(how: str) -> None:
    """PEFT's `set_adapter` and `disable_adapter` on a deep copy of the model; nothing but the switch differs."""
    model = roles(how)
    found = {}
    for role in (POLICY, "value", "judge", None):
        with using(model, role):
            found[role] = logits(model)
        twin = copy.deepcopy(model)
        if role is None:
            with twin.disable_adapter():
                wanted = logits(twin)
        else:
            twin.set_adapter(role)
            wanted = logits(twin)
        torch.testing.assert_close(found[role], wanted, rtol=0, atol=0)
    torch.testing.assert_close(found[None], logits(tiny.model("llama").eval()), rtol=1e-6, atol=1e-5)
    values = list(found.values())
    assert min(float((a - b).abs().max()) for k, a in enumerate(values) for b in values[:k]) > 0.05


@pytest.mark.parametrize("how", HOWS)
def test_other_adapters_do_not_change_the_policy(how: str) -> None:
    """Not even those on modules that the policy leaves alone."""
    torch.testing.assert_close(logits(roles(how)), logits(policy(how)), rtol=0, atol=0)


@pytest.mark.parametrize("how", HOWS)
def test_using_leaves_training_alone(how: str) -> None:
    model = roles(how)
    model(input_ids=IDS).logits.square().mean().backward()
    before = state(model)
    assert {name for name, (trained, *_) in before.items() if trained} == {
        name for name, (_, _, gradient) in before.items() if gradient is not None
    }
    for role in ("value", None, POLICY):
        with using(model, role):
            assert_untouched(model, before)
            logits(model)
    assert_untouched(model, before)


def test_gradients_go_to_the_adapter_in_use_only() -> None:
    """Two forward passes before one backward, as PPO's policy and value have it."""
    model = roles("fused")
    train_only(model, [POLICY, "value"])
    of_policy = model(input_ids=IDS).logits.mean()
    with using(model, "value"):
        of_value = model(input_ids=IDS).logits.square().mean()
    (of_policy + of_value).backward()
    together = {role: [p.grad.clone() for p in role_parameters(model, role)] for role in (POLICY, "value")}
    assert all(p.grad is None for p in role_parameters(model, "judge"))
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)
    for role, of in ((POLICY, lambda out: out.mean()), ("value", lambda out: out.square().mean())):
        alone = roles("fused")
        alone.set_adapter(role)
        of(alone(input_ids=IDS).logits).backward()
        for found, parameter in zip(together[role], role_parameters(alone, role), strict=True):
            assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
            torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-7)


def test_using_nests_and_ends_with_an_exception() -> None:
    model = roles()
    wanted = {}
    for role in (POLICY, "value", "judge", None):
        with using(model, role):
            wanted[role] = logits(model)
    with using(model, "value"):
        with using(model, None):
            with using(model, "judge"):
                assert torch.equal(logits(model), wanted["judge"])
            assert torch.equal(logits(model), wanted[None])
        assert torch.equal(logits(model), wanted["value"])
    with pytest.raises(RuntimeError, match="an engine"), using(model, None), using(model, "judge"):
        raise RuntimeError("an engine")
    assert torch.equal(logits(model), wanted[POLICY])
    assert model.active_adapters == [POLICY]


@pytest.mark.parametrize("how", HOWS)
def test_the_base_is_there_once(how: str) -> None:
    """Three more adapters cost what their own weights take: every tensor of the base stays where it was."""
    model = policy(how)
    where = {p.data_ptr() for name, p in model.named_parameters() if not re.search("lora_|ia3_", name)}
    size = sum(p.numel() for p in model.parameters())
    add_role(model, "value")
    add_role(model, "judge", None if how == "ia3" else config(how, target_modules=["q_proj", "v_proj"]))
    copy_role(model, POLICY, "reference")
    assert {p.data_ptr() for name, p in model.named_parameters() if not re.search("lora_|ia3_", name)} == where
    added = [p for role in ("value", "judge", "reference") for p in role_parameters(model, role)]
    assert sum(p.numel() for p in model.parameters()) - size == sum(p.numel() for p in added) > 0
    assert len({p.data_ptr() for p in added}) == len(added)  # and a copy shares nothing with what it copies


@pytest.mark.parametrize("how", HOWS)
def test_a_new_adapter_changes_nothing_yet_and_is_not_trained(how: str) -> None:
    model = policy(how)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    add_role(model, "value")
    with using(model, "value"):
        torch.testing.assert_close(logits(model), logits(tiny.model("llama").eval()), rtol=1e-6, atol=1e-5)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    assert all(not p.requires_grad for p in role_parameters(model, "value"))
    assert all(p.dtype == torch.float32 for p in role_parameters(model, "value"))


@pytest.mark.parametrize("trained", [["value"], [POLICY, "value"], []])
def test_adding_an_adapter_changes_nothing_in_what_is_trained(trained: list[str], tmp_path: Path) -> None:
    """Whichever adapters are trained at the time, the policy's own or not."""
    model = roles()
    train_only(model, trained)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    add_role(model, "new")
    copy_role(model, POLICY, "reference")
    add_role(model, "published", config(), weights_of(policy(), tmp_path))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before


def test_adapters_on_a_base_in_half_precision_are_in_float32() -> None:
    model = adapted(tiny.model("llama").bfloat16(), config())
    add_role(model, "value")
    copy_role(model, POLICY, "reference")
    for role in (POLICY, "value", "reference"):
        assert role_parameters(model, role) and all(p.dtype == torch.float32 for p in role_parameters(model, role))


@pytest.mark.parametrize("beginning", ["pissa", "olora", False])
def test_no_beginning_takes_weights_out_of_the_base(beginning: Any) -> None:
    """PEFT would move a part of the base into the new adapter, and the policy would compute something else."""
    model = policy()
    model.peft_config[POLICY].init_lora_weights = beginning
    before = logits(model)
    add_role(model, "value")
    copy_role(model, POLICY, "reference")
    assert torch.equal(logits(model), before)
    with using(model, "value"):
        torch.testing.assert_close(logits(model), logits(tiny.model("llama").eval()), rtol=1e-6, atol=1e-5)
    with using(model, "reference"):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("how", HOWS)
def test_a_copy_is_equal_and_stays_as_it_was(how: str) -> None:
    model = roles(how)
    now = {}
    for role in (POLICY, "judge"):
        with using(model, role):
            now[role] = logits(model)
    copy_role(model, POLICY, "reference")
    copy_role(model, "judge", "begun")
    for source, role in ((POLICY, "reference"), ("judge", "begun")):
        with using(model, role):
            assert torch.equal(logits(model), now[source])
    assert all(not p.requires_grad for p in role_parameters(model, "reference"))
    stirred(model, POLICY, 9)
    assert not torch.allclose(logits(model), now[POLICY], atol=0.01)
    with using(model, "reference"):
        assert torch.equal(logits(model), now[POLICY])


@pytest.mark.parametrize("how", HOWS)
def test_train_only(how: str) -> None:
    model = roles(how)
    for wanted in (["value"], [POLICY, "value"], []):
        train_only(model, wanted)
        trained = [p for p in model.parameters() if p.requires_grad]
        expected = [p for role in wanted for p in role_parameters(model, role)]
        assert {id(p) for p in trained} == {id(p) for p in expected}


def test_an_adapter_may_be_called_as_a_module_is() -> None:
    """BERT has modules named `value`; that one belongs to the adapter of this name must not be read off there."""
    model = nn.Module()
    model.value = nn.Module()
    model.value.lora_A = nn.ModuleDict({"default": nn.Linear(1, 1), "value": nn.Linear(1, 1)})
    model.value.ia3_l = nn.ParameterDict({"default": nn.Parameter(torch.ones(1)), "value": nn.Parameter(torch.ones(1))})
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in role_parameters(model, "value")} == {
        "value.lora_A.value.weight",
        "value.lora_A.value.bias",
        "value.ia3_l.value",
    }
    assert len(role_parameters(model, "default")) == 3
    assert role_parameters(model, "val") == []


@pytest.mark.parametrize("how", HOWS)
def test_what_is_published_is_as_if_the_others_had_never_been(how: str, tmp_path: Path) -> None:
    model, alone = roles(how), policy(how)
    copy_role(model, POLICY, "reference")
    train_only(model, ["value"])
    leave_only(model)
    assert list(model.peft_config) == [POLICY]
    assert torch.equal(logits(model), logits(alone))
    for made, folder in ((model, tmp_path / "one"), (alone, tmp_path / "other")):
        save_trained(made, folder)
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in tmp_path.iterdir()]
    assert files[0] == files[1]
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "other"))
    assert list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)
    name = "adapter_config.json"
    assert (tmp_path / "one" / name).read_text() == (tmp_path / "other" / name).read_text()


def test_leave_only_takes_the_weights_of_the_others_away() -> None:
    model = roles()
    leave_only(model)
    assert not any(role_parameters(model, role) for role in ("value", "judge"))
    assert all(p.requires_grad for p in role_parameters(model, POLICY))
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == set()


# Weights of others.


def weights_of(model: Any, tmp_path: Path) -> dict[str, Tensor]:
    save_trained(model, tmp_path / "saved")
    return load_file(tmp_path / "saved" / "adapter_model.safetensors")


def test_published_weights(tmp_path: Path) -> None:
    other = adapted(tiny.model("llama"), config(r=5))
    stirred(other, POLICY, 7)
    wanted = logits(other.eval())
    model = policy()
    before = logits(model)
    add_role(model, "judge", config(r=5), weights_of(other, tmp_path))
    with using(model, "judge"):
        assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(model), before)
    assert all(not p.requires_grad for p in role_parameters(model, "judge"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda w: w | {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(2, 32)},
            "layers.7",
        ),
        (lambda w: dict(list(w.items())[1:]), "no weights for modules that the model has"),
        (lambda w: {}, "no weights for modules that the model has"),
        (lambda w: {key: value[:, :-1] for key, value in w.items()}, "size mismatch"),
    ],
    ids=["more", "one too few", "none", "smaller"],
)
def test_weights_that_do_not_belong_to_the_model(change: Any, reason: str, tmp_path: Path) -> None:
    weights = change(weights_of(policy(), tmp_path))
    with pytest.raises((ValueError, RuntimeError), match=reason):
        add_role(policy(), "judge", config(), weights)
