"""A judge from the command line: how its scores are normalised, what a server says of it, and as a value model."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_ft import adapter
from lit_ft.config import register_schemas
from lit_ft.data.chat import ChatEncoder
from lit_ft.data.datamodule import load_examples
from lit_ft.models.judge import put_judge, read_judge
from lit_ft.rewards.base import Sample
from lit_ft.rewards.judge import JudgeReward
from lit_ft.wiring.online import Roles
from serve import registry
from tests.conftest import Outcome
from tests.lit_ft.test_online_cli import FEW, publish_judge
from tests.serve.test_gate import rules


@pytest.fixture
def published(cli: Callable[..., Outcome], own_cache: Path, llama_folder: Path) -> adapter.Adapter:
    """A judge of pairs whose chosen answers are kind ones."""
    rows = [
        {"prompt": f"{k} wheels?", "chosen": f"Yes, {k} of them.", "rejected": "No." if k % 2 else f"Never {k}, no!"}
        for k in range(12)
    ]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    few = [one for one in FEW if not one.startswith(("algorithm.max_new", "algorithm.num_e", "data.val", "data.path"))]
    args = ["data.path=pairs.jsonl", "data.val_split=0.25", "name=judge", f"model.id={llama_folder}"]
    done = cli("+experiment=reward", *args, *few)
    assert done.code == 0, done.err
    return adapter.read(Path(done.out.strip()))


def test_scores_are_normalised_over_what_it_was_trained_on(published: adapter.Adapter, llama_folder: Path) -> None:
    """Scored anew on a fresh base, answer by answer: mean 0, deviation 1; and neither of them was so to begin with."""
    files = read_judge(published.path, published.ref)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32), files.config).eval()
    head = put_judge(model, "judge0", files, published.ref)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    rows, _ = load_examples("pairs.jsonl", ChatEncoder(tokenizer), "ranked", val_split=0.25, max_length=128)
    scored = JudgeReward(
        "judge", model, "judge0", head, files.mean, files.std, layout="padded", max_tokens=512, pad_id=0
    )
    samples = [Sample(e.prompt, c.ids, True, "", "", None) for e in rows.examples for c in e.completions]
    assert len(samples) == 18, "nine of twelve pairs are trained on"
    scores = scored(samples)
    assert statistics.fmean(scores) == pytest.approx(0, abs=1e-3)
    assert statistics.pstdev(scores) == pytest.approx(1, abs=1e-3)
    assert abs(files.mean) > 1e-3 and abs(files.std - 1) > 1e-3, "or this would show nothing"
    metrics = published.card.metrics
    assert metrics["judge/mean"] == pytest.approx(files.mean) and metrics["judge/std"] == pytest.approx(files.std)
    chosen, rejected = scores[0::2], scores[1::2]
    assert statistics.fmean(chosen) > statistics.fmean(rejected)


def test_a_server_lists_it_as_what_it_is(published: adapter.Adapter) -> None:
    assert not published.card.servable and published.card.algorithm == "reward"
    reason = registry.objection(published, Path("adapters"), rules(published))
    assert reason == published.card.not_servable_reason
    assert "it is a judge of answers, not a chat model: train a policy with it, reward=judge" in str(reason)


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_a_value_model_that_begins_as_the_judge_expects_what_is_paid(
    own_cache: Path, llama_folder: Path, tmp_path: Path, weight: float
) -> None:
    """The value of a whole answer is the judge's score times its weight in `reward`: a negative one turns it round."""
    from hydra import compose, initialize_config_dir

    from lit_ft.cli import conf_folder
    from lit_ft.data.packing import lay_out
    from lit_ft.models.judge import completion_scores, head_values
    from lit_ft.models.kinds.lora import apply_lora
    from lit_ft.models.roles import using

    judge = publish_judge(tmp_path / "adapters", llama_folder)
    register_schemas()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg: Any = compose(
            "config",
            [
                "+experiment=ppo",
                f"model.id={llama_folder}",
                f"adapters={tmp_path / 'adapters'}",
                f"reward=[{{reward: judge, weight: {weight}}}]",
                "algorithm.value_from=reward",
            ],
        )
    model = apply_lora(AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32), r=4, alpha=8, dropout=0)
    roles = Roles(cfg, model, None, judge.card.base)
    (rows, _) = load_rows(llama_folder, tmp_path)
    batch = lay_out(rows.examples, "padded", 0)
    _, files, head = roles.judges["judge"]
    with torch.no_grad():
        with using(model, "judge0"):
            raw = completion_scores(model, head, batch)
        with using(model, "value"):
            values = head_values(model, roles.value_head, batch, batch.completion_ends)
    torch.testing.assert_close(values, weight * (raw - files.mean) / files.std)


def load_rows(folder: Path, at: Path) -> Any:
    (at / "two.jsonl").write_text("\n".join(json.dumps({"prompt": f"{k}?", "completion": f"{k}."}) for k in range(2)))
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder))
    return load_examples(str(at / "two.jsonl"), encoder, "sft", val_split=0, max_length=128)
