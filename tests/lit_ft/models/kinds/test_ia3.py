"""(IA)³: what it scales in which architecture, what it holds, and that it merges exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lit_ft.errors import UserError
from lit_ft.models.kinds.ia3 import IA3
from tests import tiny

IDS = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(5))


def base(name: str) -> Any:
    if name != "gpt_neox":
        return tiny.model(name)
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="gelu",
    )
    return GPTNeoXForCausalLM(config).float()


def moved(model: Any) -> Any:
    """Scales that are not 1."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


# Of one layer: whose outputs are scaled, whose inputs, and how many numbers that is. Where queries, keys and values are
# one product its outputs are scaled, queries among them, as PEFT does it; where they are three, queries are not.
SCALED: dict[str, tuple[list[str], list[str], int]] = {
    "llama": (["k_proj", "v_proj"], ["down_proj"], 16 + 16 + 64),
    "qwen2": (["k_proj", "v_proj"], ["down_proj"], 16 + 16 + 64),
    "opt": (["k_proj", "v_proj"], ["fc2"], 32 + 32 + 64),
    "gpt2": (["c_attn"], ["c_proj"], 96 + 128),
    "gpt_neox": (["query_key_value"], ["dense_4h_to_h"], 96 + 64),
}


@pytest.mark.parametrize("name", SCALED)
def test_what_is_scaled(name: str) -> None:
    outputs, inputs, numbers = SCALED[name]
    model = IA3().begin(base(name))
    layers = {key: m for key, m in model.get_base_model().named_modules() if hasattr(m, "ia3_l")}
    found = {(key.rsplit(".", 1)[-1], layer.is_feedforward) for key, layer in layers.items()}
    assert found == {(end, False) for end in outputs} | {(end, True) for end in inputs}
    assert len(layers) == 2 * (len(outputs) + len(inputs)), "of GPT-2's two c_proj one is the feed-forward layer's"
    assert not any("attn.c_proj" in key or "out_proj" in key for key in layers)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * numbers


@pytest.mark.parametrize("name", SCALED)
def test_merged_and_unmerged_agree(name: str) -> None:
    model = moved(IA3().begin(base(name)))
    with torch.no_grad():
        apart = model(input_ids=IDS).logits
        merged = copy.deepcopy(model).merge_and_unload()(input_ids=IDS).logits
        plain = base(name).eval()(input_ids=IDS).logits
    torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-5)
    assert float((apart - plain).abs().max()) > 0.01


def test_the_formula_by_hand() -> None:
    """Keys and values: l·(W·x); the feed-forward layer's last product: W·(l·x)."""
    plain = base("llama")
    model = moved(IA3().begin(base("llama")))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    ours, theirs = (one.model.layers[1] for one in (model.get_base_model(), plain))
    with torch.no_grad():
        down = ours.mlp.down_proj
        torch.testing.assert_close(down(x), (x * down.ia3_l["default"].flatten()) @ theirs.mlp.down_proj.weight.T)
        value = ours.self_attn.v_proj
        wanted = (x[:, :32] @ theirs.self_attn.v_proj.weight.T) * value.ia3_l["default"].flatten()
        torch.testing.assert_close(value(x[:, :32]), wanted)
        assert torch.equal(ours.self_attn.q_proj(x[:, :32]), theirs.self_attn.q_proj(x[:, :32]))


@pytest.mark.parametrize(
    ("targets", "inputs"),
    [
        (["v_proj", "mlp.down_proj"], {"down_proj"}),
        (r".*\.(v_proj|down_proj)", {"down_proj"}),
        ("all-linear", {"down_proj"}),
        (["v_proj", "q_proj"], set()),
        (r".*\.v_proj", set()),
    ],
)
def test_the_feed_forward_layer_is_found_among_given_targets(targets: Any, inputs: set[str]) -> None:
    model = IA3(target_modules=targets).begin(base("llama"))
    found = {k.rsplit(".", 1)[-1] for k, m in model.named_modules() if hasattr(m, "ia3_l") and m.is_feedforward}
    assert found == inputs


def test_feed_forward_layers_may_be_named() -> None:
    settings: dict[str, Any] = {"target_modules": ["v_proj", "up_proj"], "feedforward_modules": ["up_proj"]}
    model = IA3(**settings).begin(base("llama"))
    scaled = {k.rsplit(".", 1)[-1]: m.is_feedforward for k, m in model.named_modules() if hasattr(m, "ia3_l")}
    assert scaled == {"v_proj": False, "up_proj": True}
    none = IA3(target_modules=["v_proj", "down_proj"], feedforward_modules=[]).begin(base("llama"))
    assert not any(m.is_feedforward for m in none.modules() if hasattr(m, "ia3_l"))


@pytest.mark.parametrize("given", [["no_such"], ["up_proj"], "no_such", [3], 5])
def test_feed_forward_layers_that_are_not_among_the_targets(given: Any) -> None:
    with pytest.raises(UserError, match=r"peft\.feedforward_modules="):
        IA3(target_modules=["v_proj", "down_proj"], feedforward_modules=given).begin(base("llama"))
    with pytest.raises(UserError, match=r"peft\.feedforward_modules="):
        IA3(feedforward_modules=given).begin(base("llama"))


def test_a_model_whose_parts_have_other_names() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

    with pytest.raises(UserError, match=r"does not find keys and values in Other.*linear modules are mix"):
        IA3().begin(Other())


def test_the_file_is_below_1_mb_for_the_bundled_model(tmp_path: Path) -> None:
    """SmolLM2-135M: 30 layers of 192 keys, 192 values and 1536 inputs of the last product, four bytes each."""
    from peft import get_peft_model_state_dict
    from transformers import LlamaConfig, LlamaForCausalLM

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
        model = LlamaForCausalLM(config)
    state = get_peft_model_state_dict(IA3().begin(model), save_embedding_layers=False)
    save_file({key: torch.ones(value.shape) for key, value in state.items()}, tmp_path / "adapter_model.safetensors")
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 30 * (192 + 192 + 1536) * 4 == 230_400 <= size < 250_000
