"""What the benchmark of RLHF measures, each function in a process of its own."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.memory import run, status


def seconds(overrides: Sequence[str]) -> dict[str, float]:
    """Mean seconds of an iteration after the first, by what they were spent on."""
    from tests.benchmarks.clock import METRICS

    run([*overrides, "logger=none", "logger._target_=tests.benchmarks.clock.Clock", "trainer.log_every_n_steps=1"])
    later = METRICS[1:]
    return {
        part: statistics.fmean(row.get(f"train/seconds/{part}", 0.0) for row in later)
        for part in ("generation", "rewards", "scoring", "updates")
    }


def peak(overrides: Sequence[str]) -> dict[str, int]:
    """The peak of resident memory of a whole run, in bytes."""
    run(overrides)
    return {"peak": status("VmHWM")}


def separate(model: str, tokens: int) -> dict[str, int]:
    """The peak with four models in float32, as RLHF has them without adapters: two of them trained in full by Adam."""
    import torch

    from lit_ft.models.load import load_model

    four = [load_model(model, dtype=torch.float32) for _ in range(4)]
    ids = torch.arange(100, 100 + tokens)[None]
    with torch.no_grad():
        for frozen in four[2:]:
            frozen(input_ids=ids)
    for trained in four[:2]:
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-6)
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return {"peak": status("VmHWM")}


def judge_pairs(model: str, adapters: str, judge: str, pairs: str, max_length: int) -> dict[str, list[float]]:
    """Of every pair whether the judge, and whether the length in tokens and in characters, prefers the chosen answer.

    1, 0, or 0.5 where two are equal.
    """
    import torch
    from peft import get_peft_model

    from lit_ft import adapter as folder
    from lit_ft.data.chat import ChatEncoder
    from lit_ft.data.datamodule import load_examples
    from lit_ft.judging import raw_scores
    from lit_ft.models.judge import put_judge, read_judge
    from lit_ft.models.load import load_model, load_tokenizer
    from lit_ft.models.roles import using
    from lit_ft.models.score import use_packed_attention

    tokenizer = load_tokenizer(model)
    files = read_judge(folder.find(Path(adapters), judge).path, judge)
    adapted = get_peft_model(load_model(model, dtype=torch.float32), files.config).eval()
    head = put_judge(adapted, "judge", files, judge)
    layout: Any = "packed" if use_packed_attention(adapted) is None else "padded"
    encoder = ChatEncoder(tokenizer)
    rows, _ = load_examples(pairs, encoder, "ranked", val_split=0, max_length=max_length, max_dropped=1)
    with using(adapted, "judge"):
        scores = raw_scores(adapted, head, rows.examples, layout=layout, max_tokens=1024)
    answers = [[c.ids for c in e.completions] for e in rows.examples]
    characters = [[len(tokenizer.decode(ids, skip_special_tokens=True)) for ids in two] for two in answers]

    def wins(of: Sequence[Sequence[float]]) -> list[float]:
        return [float(first > second) + 0.5 * (first == second) for first, second in of]

    return {
        "right": wins(scores),
        "tokens": wins([[len(ids) for ids in two] for two in answers]),
        "characters": wins(characters),
    }


def judge(
    model: str,
    adapters: str,
    policy: str,
    reference: str,
    judges: Sequence[str],
    prompts: str,
    draws: int,
    max_new_tokens: int,
    temperature: float,
    max_length: int,
) -> dict[str, list[float]]:
    """Of every held-out prompt, means over its completions: each judge's score, KL to the reference, length, ends."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    from lit_ft import adapter as folder
    from lit_ft.adapter import ADAPTER_WEIGHTS
    from lit_ft.batches import Completion, Example
    from lit_ft.data.chat import ChatEncoder
    from lit_ft.data.datamodule import load_examples
    from lit_ft.data.packing import lay_out, split_by_tokens
    from lit_ft.judging import raw_scores
    from lit_ft.losses.logprobs import sum_by_completion
    from lit_ft.models.judge import put_judge, read_judge
    from lit_ft.models.kinds.base import config_in
    from lit_ft.models.load import load_model, load_tokenizer
    from lit_ft.models.roles import add_role, using
    from lit_ft.models.score import score_gathered, use_packed_attention
    from lit_ft.rollouts.base import Sampling, stop_ids
    from lit_ft.rollouts.transformers import TransformersRollouts

    tokenizer = load_tokenizer(model)
    root = Path(adapters)
    base = load_model(model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(folder.find(root, policy).path)).eval()
    other = folder.find(root, reference).path
    add_role(adapted, "reference", config_in(other), load_file(other / ADAPTER_WEIGHTS))
    heads = {}
    for number, name in enumerate(judges):
        files = read_judge(folder.find(root, name).path, name)
        heads[name] = (f"judge{number}", files, put_judge(adapted, f"judge{number}", files, name))
    layout: Any = "packed" if use_packed_attention(adapted) is None else "padded"
    rows, _ = load_examples(prompts, ChatEncoder(tokenizer), "prompt", val_split=0, max_length=max_length)
    sampling = Sampling(temperature, max_new_tokens, stop_ids(adapted, tokenizer))
    engine = TransformersRollouts(adapted, sampling, pad_id=tokenizer.pad_token_id, max_tokens=4096)
    rollouts = engine.generate([e.prompt for e in rows.examples], draws, seed=1)
    examples = [
        Example(e.prompt, tuple(Completion(r.completion, (True,) * len(r.completion)) for r in several), index=k)
        for k, (e, several) in enumerate(zip(rows.examples, rollouts, strict=True))
    ]
    found: dict[str, list[float]] = {}
    for name, (role, files, head) in heads.items():
        with using(adapted, role):
            raw = raw_scores(adapted, head, examples, layout=layout, max_tokens=1024)
        found[name] = [statistics.fmean((value - files.mean) / files.std for value in several) for several in raw]
    kl: dict[int, float] = {}
    with torch.no_grad():
        for group in split_by_tokens(examples, 1024, layout):
            batch = lay_out(group, layout, tokenizer.pad_token_id)
            ours = score_gathered(adapted, batch, temperature).logprobs
            with using(adapted, "reference"):
                theirs = score_gathered(adapted, batch, temperature).logprobs
            sums = sum_by_completion(ours - theirs, batch.target_completion, batch.num_completions).tolist()
            for example in group:
                kl[example.index], sums = statistics.fmean(sums[:draws]), sums[draws:]
    found["kl"] = [kl[k] for k in range(len(examples))]
    found["length"] = [statistics.fmean(len(r.completion) for r in several) for several in rollouts]
    found["ended"] = [statistics.fmean(float(r.ended) for r in several) for several in rollouts]
    Path(adapters, f"{policy}-samples.json").write_text(
        json.dumps([tokenizer.decode(several[0].completion) for several in rollouts], indent=1), encoding="utf-8"
    )
    return found
