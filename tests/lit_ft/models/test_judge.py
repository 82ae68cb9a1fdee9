"""A judge: its scores in every layout, its folder as PEFT and transformers read it, and folders that are none."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lit_ft.batches import Completion, Example, pack, pad
from lit_ft.errors import UserError
from lit_ft.models.judge import (
    HEAD,
    completion_scores,
    hidden_size,
    is_judge,
    normalisation,
    put_judge,
    read_judge,
    save_judge,
    scalar_head,
)
from lit_ft.models.kinds.ia3 import IA3
from lit_ft.models.kinds.lora import Dora, apply_lora
from lit_ft.models.roles import POLICY, role_parameters, using
from lit_ft.models.score import use_packed_attention
from tests import tiny

KINDS = ["llama", "qwen2", "gpt2", "opt"]
PAD = 3
WEIGHTS = "adapter_model.safetensors"


def ids(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, 260, (count,), generator=generator).tolist())


def completion(seed: int, *mask: bool) -> Completion:
    return Completion(ids(len(mask), seed), mask)


def examples() -> list[Example]:
    """Of one token, with an untrained beginning, gap and end, nothing trained at all, and nothing there."""
    yes, no = True, False
    return [
        Example(ids(9, 0), (completion(1, yes, yes, yes), completion(2, yes), completion(3, no, yes, no, yes)), 0),
        Example(ids(1, 4), (completion(5, yes), completion(6, yes, yes, no, no)), 1),
        Example(ids(9, 0), (completion(7, no, no), completion(8, yes, yes)), 2),
        Example(ids(5, 9), (completion(10), completion(11, yes)), 3),
        Example((), (completion(12, yes),), 4),
        Example(ids(4, 13), (completion(14, yes, no),), 5),
    ]


def stirred(model: Any, role: str = POLICY, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in role_parameters(model, role):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def judge(kind: str = "llama", seed: int = 1) -> tuple[Any, nn.Linear]:
    """A model with an adapter that does something, in evaluation mode, and a head."""
    model = stirred(apply_lora(tiny.model(kind), r=2), seed=seed)
    torch.manual_seed(seed)
    return model.eval(), scalar_head(hidden_size(model))


@torch.no_grad()
def one_by_one(model: Any, head: nn.Linear, rows: list[Example]) -> Tensor:
    """The head at the last token of each text, alone in its row, from the states that transformers returns."""
    found = []
    for row in rows:
        for answer in row.completions:
            whole = torch.tensor([[*row.prompt, *answer.ids]])
            found.append(head(model(input_ids=whole, output_hidden_states=True).hidden_states[-1][0, -1]))
    return torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_last_token_in_every_layout(kind: str) -> None:
    """Whatever is trained on: a judge reads all of a completion."""
    model, head = judge(kind)
    rows = examples()
    wanted = one_by_one(model, head, rows)
    with torch.no_grad():
        padded = completion_scores(model, head, pad(rows, PAD))
        more = completion_scores(model, head, pad(rows, PAD, extra=7))
        assert use_packed_attention(model) is None
        packed = completion_scores(model, head, pack(rows))
        apart = completion_scores(model, head, pack(rows, across=False))
    assert wanted.std() > 0.1  # a neighbouring token's score would be as far away
    for found in (padded, more, packed, apart):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_where_completions_end() -> None:
    """Prompt of 2 with answers of 3 and 1, of which the last tokens are not trained; then an empty one."""
    rows = [
        Example((4, 5), (Completion((6, 7, 8), (True, True, False)), Completion((9,), (False,))), 0),
        Example((10,), (Completion((), ()),), 1),
    ]
    packed, padded = pack(rows), pad(rows, PAD)
    assert packed.input_ids.flatten()[packed.completion_ends].tolist() == [8, 9, 10]
    assert packed.completion_ends.tolist() == [4, 5, 6]
    assert padded.input_ids.flatten()[padded.completion_ends].tolist() == [8, 9, 10]
    assert padded.completion_ends.tolist() == [4, 5 + 2, 10]


def test_gradients_reach_adapter_and_head() -> None:
    model, head = judge()
    packed_model, packed_head = judge()
    assert use_packed_attention(packed_model) is None
    rows = examples()
    completion_scores(model, head, pad(rows, PAD)).square().sum().backward()
    completion_scores(packed_model, packed_head, pack(rows)).square().sum().backward()
    pairs = zip(
        [*role_parameters(model, POLICY), head.weight],
        [*role_parameters(packed_model, POLICY), packed_head.weight],
        strict=True,
    )
    for one, other in pairs:
        assert one.grad is not None and one.grad.abs().max() > 0
        assert other.grad is not None and float((other.grad - one.grad).norm() / one.grad.norm()) < 1e-4


def test_heads() -> None:
    """Deviation 1/√(H+1), from which scores of states of deviation 1 have about deviation 1; or nothing but zeros."""
    torch.manual_seed(0)
    head = scalar_head(4095, bias=True)
    assert head.weight.shape == (1, 4095) and head.weight.dtype == torch.float32
    assert float(head.weight.detach().std()) == pytest.approx(1 / 64, rel=0.05)
    assert head.bias.tolist() == [0.0]
    assert not scalar_head(8, zero=True, bias=True).weight.any()
    assert scalar_head(8).bias is None


def test_scores_are_in_float32_under_mixed_precision() -> None:
    model, head = judge()
    batch = pad(examples(), PAD)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = completion_scores(model, head, batch)
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())  # the head itself is not rounded
    torch.testing.assert_close(found, one_by_one(model, head, examples()), rtol=0, atol=0.3)


def test_hidden_size_is_that_of_what_the_head_sees() -> None:
    assert [hidden_size(tiny.model(kind)) for kind in KINDS] == [32] * 4
    assert hidden_size(judge()[0]) == 32


# The folder.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, head = judge()
    save_judge(model, head, tmp_path / "judge", mean=0.5, std=2.0)
    return tmp_path / "judge"


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_and_peft_read_it(kind: str, tmp_path: Path) -> None:
    """As a sequence classifier of one class, which pools at the last token that is not the padding's."""
    tiny.folder(tmp_path / "base", kind)
    model, head = judge(kind)
    save_judge(model, head, tmp_path / "judge", mean=0.5, std=2.0)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, dtype=torch.float32
    )
    read = PeftModel.from_pretrained(classifier, str(tmp_path / "judge")).eval()
    read.config.pad_token_id = read.get_base_model().config.pad_token_id = 0  # occurs nowhere
    rows = [row for row in examples() if row.prompt]
    texts = [[*row.prompt, *answer.ids] for row in rows for answer in row.completions]
    assert all(0 not in text for text in texts)
    with torch.no_grad():
        wanted = torch.cat([read(input_ids=torch.tensor([text])).logits.flatten() for text in texts])
        # One pads and one does not, so their attention runs in different kernels; with AVX512 PyTorch's flash kernel
        # takes an exponential good to 20 units in the last place only (exp_u20), and 2e-5 was seen.
        torch.testing.assert_close(completion_scores(model, head, pad(rows, PAD)), wanted, rtol=1e-4, atol=1e-4)


def test_it_is_put_beside_a_policy(folder: Path) -> None:
    """The same scores on another model of the same base, whose policy neither notices nor trains it."""
    assert is_judge(folder)
    files = read_judge(folder, "judge@v1")
    assert (files.mean, files.std) == (0.5, 2.0)
    model = stirred(apply_lora(tiny.model(), r=3, target_modules=["q_proj"]), seed=8).eval()
    tokens = torch.tensor([ids(20, 3)])
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        head = put_judge(model, "judge", files, "judge@v1")
        assert torch.equal(model(input_ids=tokens).logits, before)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
        assert not head.weight.requires_grad
        with using(model, "judge"):
            found = completion_scores(model, head, pad(examples(), PAD))
        torch.testing.assert_close(found, completion_scores(*judge(), pad(examples(), PAD)), rtol=1e-6, atol=1e-6)


def test_two_judges_beside_one_policy(folder: Path, tmp_path: Path) -> None:
    other, other_head = judge(seed=2)
    save_judge(other, other_head, tmp_path / "other", mean=0.0, std=1.0)
    model = stirred(apply_lora(tiny.model(), r=3), seed=8).eval()
    heads = {name: put_judge(model, name, read_judge(tmp_path / name, name), name) for name in ("judge", "other")}
    batch = pad(examples(), PAD)
    with torch.no_grad():
        for name, (alone, head) in {"judge": judge(), "other": (other, other_head)}.items():
            with using(model, name):
                found = completion_scores(model, heads[name], batch)
            torch.testing.assert_close(found, completion_scores(alone, head, batch), rtol=1e-6, atol=1e-6)


def test_the_folder_says_what_it_is(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    assert json.loads((folder / "judge.json").read_text()) == {"mean": 0.5, "std": 2.0}
    assert load_file(folder / WEIGHTS)[HEAD].shape == (1, 32)


def test_other_folders_are_no_judges(tmp_path: Path) -> None:
    assert not is_judge(tmp_path)
    with pytest.raises(UserError, match=r"tone@v1 is no judge: it has no judge.json.*experiment=reward"):
        read_judge(tmp_path, "tone@v1")


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def rewrite(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return rewrite


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no weights": without(WEIGHTS),
    "no configuration": without("adapter_config.json"),
    "cut weights": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:500]),
    "weights of nothing": text(WEIGHTS, ""),
    "no head": weights(lambda held: held.pop(HEAD)),
    "a head of NaN": weights(lambda held: held[HEAD].fill_(math.nan)),
    "a flat head": weights(lambda held: held.update({HEAD: torch.zeros(32)})),
    "an adapter of NaN": weights(lambda held: next(iter(held.values())).fill_(math.nan)),
    "queries of NaN": weights(
        lambda held: [part.fill_(math.nan) for name, part in held.items() if "q_proj.lora_B" in name]
    ),
    "an infinite number": weights(lambda held: held[max(held)].view(-1)[-1:].fill_(math.inf)),
    "no JSON": text("judge.json", "{mean: 1"),
    "a list": text("judge.json", "[0, 1]"),
    "no deviation": text("judge.json", '{"mean": 0.5}'),
    "deviation 0": text("judge.json", '{"mean": 0.5, "std": 0}'),
    "a negative deviation": text("judge.json", '{"mean": 0.5, "std": -1}'),
    "mean NaN": text("judge.json", '{"mean": NaN, "std": 1}'),
    "deviation null": text("judge.json", '{"mean": 0, "std": null}'),
    "configuration of nothing": text("adapter_config.json", "{}"),
    "configuration that is no JSON": text("adapter_config.json", "{peft"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_judges(name: str, folder: Path) -> None:
    DAMAGE[name](folder)
    with pytest.raises(UserError, match=r"The judge tone@v1 in .* is damaged"):
        read_judge(folder, "tone@v1")


# Judges of other bases.


def other_llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**tiny.model().config.to_dict(), **changes}))


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "wider": (lambda: other_llama(hidden_size=64, head_dim=16), "a head of width 32, and this model's is 64"),
    "fewer layers": (lambda: other_llama(num_hidden_layers=1), "weights of modules that the model does not have"),
    "wider inside": (lambda: other_llama(intermediate_size=48), r"size mismatch for .*mlp"),
    "other names": (lambda: tiny.model("gpt2"), "Target modules .* not found"),
}


def test_a_judge_of_fewer_layers_under_the_same_names(tmp_path: Path) -> None:
    """Modules that are named by their ends are looked for in every layer; named in full, all are there."""
    model = stirred(apply_lora(tiny.model(), r=2, target_modules=["q_proj"]))
    save_judge(model, scalar_head(32), tmp_path / "judge", mean=0.0, std=1.0)
    deeper = apply_lora(other_llama(num_hidden_layers=3), r=2)
    with pytest.raises(
        UserError, match=r"no weights for modules that the model has, such as .*layers\.2.*another base"
    ):
        put_judge(deeper, "judge", read_judge(tmp_path / "judge", "tone@v1"), "tone@v1")


@pytest.mark.parametrize("name", OTHERS)
def test_judges_of_other_bases(name: str, folder: Path) -> None:
    make, reason = OTHERS[name]
    files = read_judge(folder, "tone@v1")
    with pytest.raises(UserError, match=f"{reason}.*: it was trained on another base"):
        put_judge(apply_lora(make(), r=2), "judge", files, "tone@v1")


def test_adapters_of_two_kinds(folder: Path) -> None:
    files = read_judge(folder, "tone@v1")
    with pytest.raises(UserError, match=r"tone@v1 is a LORA adapter and the model's own is IA3: .*peft=lora"):
        put_judge(IA3().begin(tiny.model()), "judge", files, "tone@v1")
    # A DoRA is a LoRA to PEFT.
    assert put_judge(Dora(r=2).begin(tiny.model()), "judge", files, "tone@v1").weight.shape == (1, 32)


def test_a_judge_that_was_trained_as_dora(tmp_path: Path) -> None:
    trained = stirred(Dora(r=2).begin(tiny.model())).eval()
    head = scalar_head(32)
    save_judge(trained, head, tmp_path / "judge", mean=0.0, std=1.0)
    batch = pad(examples(), PAD)
    with torch.no_grad():
        wanted = completion_scores(trained, head, batch)
        model = stirred(apply_lora(tiny.model(), r=2), seed=4).eval()
        read = put_judge(model, "judge", read_judge(tmp_path / "judge", "judge"), "judge")
        with using(model, "judge"):
            torch.testing.assert_close(completion_scores(model, read, batch), wanted, rtol=1e-6, atol=1e-6)


def test_a_judge_is_read_from_where_it_was_moved_to(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "elsewhere")
    assert read_judge(tmp_path / "elsewhere", "judge").head.shape == (1, 32)


# Normalisation.


def test_normalisation_by_hand() -> None:
    """1, 3, 8: mean 4, squares of the differences 9 + 1 + 16 = 26, deviation √(26/3)."""
    assert normalisation([1.0, 3.0, 8.0]) == pytest.approx((4.0, math.sqrt(26 / 3)))


def test_normalised_scores_have_mean_0_and_deviation_1() -> None:
    scores = (torch.randn(500, generator=torch.Generator().manual_seed(0)) * 7 + 100).tolist()
    mean, std = normalisation(scores)
    made = torch.tensor([(score - mean) / std for score in scores], dtype=torch.float64)
    assert float(made.mean()) == pytest.approx(0, abs=1e-9)
    assert float(made.std(correction=0)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("scores", [[0.1] * 3, [1 / 3] * 1001, [0.0, 0.0], [5.0], [1e6, 1e6 + 0.01]])
def test_equal_scores_are_not_divided_by_rounding(scores: list[float]) -> None:
    """The mean of three times 0.1 is not 0.1 in floating point; divided by what is left, scores would be noise."""
    mean, std = normalisation(scores)
    assert std == 1.0 and mean == pytest.approx(scores[0], rel=1e-7)
