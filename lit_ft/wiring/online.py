"""The wiring of PPO and GRPO: which adapters stand on the base, what scores completions, what makes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_ft import adapter as folder
from lit_ft.adapter import Adapter, Base
from lit_ft.batches import Example
from lit_ft.config import Algorithm, Config, Reference, Rollout, ValueFrom
from lit_ft.data.chat import ChatEncoder
from lit_ft.data.datamodule import load_examples
from lit_ft.data.formats import to_record
from lit_ft.distributed.processes import size
from lit_ft.errors import UserError
from lit_ft.models import adapt
from lit_ft.models.judge import JudgeFiles, hidden_size, put_judge, read_judge, scalar_head
from lit_ft.models.load import context_length
from lit_ft.models.precision import Precision
from lit_ft.models.resolve import resolve_model
from lit_ft.models.roles import POLICY, add_role, copy_role, train_only
from lit_ft.modules.grpo import GRPOModule
from lit_ft.modules.ppo import PPOModule
from lit_ft.progress import say
from lit_ft.rewards.base import Reward, RewardSpec, parse_rewards
from lit_ft.rollouts.base import RolloutEngine, Sampling, stop_ids
from lit_ft.wiring.settings import mapping

# The engine may hold more tokens at a time than a training step: there are no gradients.
_ROLLOUT_TOKENS = {"cpu": 4096, "cuda": 131_072}


class Roles:
    """The adapters beside the policy's, as the settings ask for them.

    Attributes:
        reference: the adapter that KL is measured to, or None for the base.
        value_head: of the value model, with PPO.
        judges: by the name that was asked for, the role, the files and the head of each judge on the model.
        found: by that name, the published judge.
        identity: what a resumed run must have in common with this one.
    """

    def __init__(
        self, cfg: Config, model: Any, start: Adapter | None, base: Base, resumed: Mapping[str, str] | None = None
    ) -> None:
        """Put them on `model`.

        Args:
            cfg: says which.
            model: PEFT's, with the policy on it.
            start: the adapter that the policy begins as.
            base: what all stand on.
            resumed: the `identity` of the run that is gone on with, or None. Its judges are taken, even if newer ones
                were published meanwhile.

        Raises:
            UserError: a judge is not there, is none, or is for another model.
        """
        resumed = resumed or {}
        algorithm: Any = cfg.algorithm
        self.judges: dict[str, tuple[str, JudgeFiles, nn.Linear]] = {}
        self._adapters, self._base, self._tiny = Path(cfg.adapters), base, cfg.model.tiny
        specs = parse_rewards("reward", cfg.reward)
        judging = parse_rewards("judge", cfg.judge) if cfg.judge is not None else []
        begun_with = dict(pair.split("=", 1) for pair in resumed.get("judges", "").split(", ") if pair)
        found = {
            spec.name: self.find(replace(spec, name=begun_with.get(spec.name, spec.name)))
            for spec in [*specs, *judging]
            if spec.kind == "judge"
        }
        self.found = found
        self.identity = {
            "reward": _described(specs),
            "judge": _described(judging),
            "judges": ", ".join(f"{name}={one.ref}" for name, one in found.items()),
        }
        self.reference: str | None = None
        if algorithm.reference is Reference.initial and start is not None:
            # A new adapter changes nothing yet: its reference is the base.
            copy_role(model, POLICY, "reference")
            self.reference = "reference"
        self.value_head: nn.Linear | None = None
        if cfg.algorithm.kind is Algorithm.ppo:
            self.value_head = self._value(algorithm, model, specs, found)
        for number, (name, one) in enumerate(found.items()):
            files = read_judge(one.path, one.ref)
            self.judges[name] = (f"judge{number}", files, put_judge(model, f"judge{number}", files, one.ref))
            say(f"judge      {one.ref}")
        train_only(model, [POLICY, *(["value"] if self.value_head is not None else [])])

    def find(self, spec: RewardSpec) -> Adapter:
        """The published judge that `spec` names; raises UserError."""
        try:
            one = folder.find(self._adapters, spec.name)
        except UserError as error:
            raise UserError(
                f"{error} A judge is trained with python -m lit_ft +experiment=reward name={spec.name.split('@')[0]}; "
                "or give a function, reward=package.module:function."
            ) from error
        if one.card.algorithm != "reward":
            raise UserError(
                f"{one.ref} is no judge but an adapter made by {one.card.algorithm}: train one with python -m lit_ft "
                "+experiment=reward name=judge, and give its name."
            )
        if not self._tiny and one.card.base.hash != self._base.hash:
            raise UserError(
                f"The judge {one.ref} was trained on {one.card.base.id}, and the policy's base is {self._base.id}, "
                "another model: both stand on one base. Train a judge on this one, or choose model.id="
                f"{one.card.base.id}."
            )
        return one

    def _value(self, algorithm: Any, model: Any, specs: Sequence[RewardSpec], found: dict[str, Adapter]) -> nn.Linear:
        width = hidden_size(model)
        head = scalar_head(width, bias=True, zero=True)
        if algorithm.value_from is ValueFrom.zero:
            add_role(model, "value")
            return head
        first = next((spec for spec in specs if spec.kind == "judge"), None)
        if first is None:
            raise UserError("algorithm.value_from=reward needs a judge among reward=…; use value_from=zero.")
        one = found[first.name]
        files = read_judge(one.path, one.ref)
        put = put_judge(model, "value", files, one.ref)
        with torch.no_grad():
            # What its answers are worth: a negative weight makes a high score bad.
            head.weight.copy_(put.weight / files.std * first.weight)
            head.bias.fill_(-files.mean / files.std * first.weight)
        return head


def _described(specs: Sequence[RewardSpec]) -> str:
    return ", ".join(f"{spec.name}·{spec.weight:g}" for spec in specs)


def make_rewards(setting: str, value: Any, roles: Roles, model: Any, **batches: Any) -> Reward:
    """The rewards that `value` names, weighed if they are several."""
    from lit_ft.rewards.function import RewardFunction
    from lit_ft.rewards.judge import JudgeReward
    from lit_ft.rewards.weighted import WeightedReward

    parts: list[tuple[Reward, float]] = []
    for spec in parse_rewards(setting, value):
        if spec.kind == "function":
            parts.append((RewardFunction(spec.name), spec.weight))
            continue
        role, files, head = roles.judges[spec.name]
        judge = JudgeReward(spec.name, model, role, head, files.mean, files.std, **batches)
        parts.append((judge, spec.weight))
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1 else WeightedReward(parts)


def rollout_tokens(cfg: Config, device: str) -> int:
    """How many tokens `rollout=transformers` holds keys and values of at a time on `cpu` or `cuda`."""
    return (cfg.rollout.max_tokens if cfg.rollout else None) or _ROLLOUT_TOKENS[device]


def make_engine(
    cfg: Config,
    model: Any,
    tokenizer: Any,
    run: Path,
    device: torch.device,
    autocast: torch.dtype | None,
    **vllm: Any,
) -> RolloutEngine:
    """What makes completions; a vLLM is started now, one for all processes, and has its log and the policy in `run`.

    `vllm` are more arguments of `VllmRollouts`.
    """
    algorithm: Any = cfg.algorithm
    assert cfg.rollout is not None
    sampling = Sampling(algorithm.temperature, algorithm.max_new_tokens, stop_ids(model, tokenizer))
    if cfg.rollout.kind is Rollout.transformers:
        from lit_ft.rollouts.transformers import TransformersRollouts

        tokens = rollout_tokens(cfg, device.type)
        return TransformersRollouts(
            model, sampling, pad_id=tokenizer.pad_token_id, max_tokens=tokens, autocast=autocast
        )
    from lit_ft.rollouts.vllm import VllmRollouts

    if cfg.model.tiny:
        raise UserError(
            "rollout=vllm serves the model's own weights, and model.tiny has random ones: use transformers."
        )

    def write(target: Path) -> None:
        adapt.save_trained(model, target)

    settings = cfg.rollout

    def start() -> RolloutEngine:
        return VllmRollouts(
            resolve_model(cfg.model.id),
            write,
            sampling,
            folder=run / "rollouts",
            max_lora_rank=adapt.lora_rank(model) or 16,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            retries=settings.retries,
            start_timeout=settings.start_timeout,
            request_timeout=settings.request_timeout,
            max_model_len=min(cfg.data.max_length + 1, context_length(model) or cfg.data.max_length + 1),
            **vllm,
        )

    if size() == 1:
        return start()
    from lit_ft.rollouts.shared import SharedRollouts

    return SharedRollouts(start)


def online_module(
    cfg: Config,
    model: Any,
    roles: Roles,
    tokenizer: Any,
    encoder: ChatEncoder,
    *,
    run: Path,
    device: torch.device,
    precision: Precision,
    shared: dict[str, Any],
    vllm: Mapping[str, Any] | None = None,
    **batches: Any,
) -> Any:
    """The LightningModule of PPO or GRPO.

    Args:
        run: the run's folder.
        shared: arguments that every module takes.
        vllm: more arguments of `VllmRollouts`.
        batches: `layout`, `max_tokens`, `pad_id`.
    """
    algorithm: Any = cfg.algorithm
    columns = mapping("data.columns", cfg.data.columns) or None

    def ask(example: Example) -> Any:
        if example.row is None:
            return tokenizer.decode(example.prompt)
        record = to_record(example.row, "prompt", columns)
        assert record is not None  # its prompt was made from this row
        return record.prompt

    common: dict[str, Any] = {
        **shared,
        **batches,
        "engine": make_engine(cfg, model, tokenizer, run, device, precision.autocast, **(vllm or {})),
        "reward": make_rewards("reward", cfg.reward, roles, model, **batches, autocast=precision.autocast),
        "judge": make_rewards("judge", cfg.judge, roles, model, **batches, autocast=precision.autocast)
        if cfg.judge is not None
        else None,
        "decode": lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        "ask": ask,
        "reference": roles.reference,
        "num_generations": algorithm.num_generations,
        "num_epochs": algorithm.num_epochs,
        "num_mini_batches": algorithm.num_mini_batches,
        "temperature": algorithm.temperature,
        "missing_eos_penalty": algorithm.missing_eos_penalty,
        "ptx": _ptx_rows(cfg, encoder),
        "ptx_coef": algorithm.ptx_coef,
        "ptx_batch_size": algorithm.ptx_batch_size,
        "seed": cfg.seed,
        "show": partial(show_samples, keep=run / "samples.jsonl"),
    }
    if cfg.algorithm.kind is Algorithm.ppo:
        module: Any = PPOModule(
            model,
            value_head=roles.value_head,  # type: ignore[arg-type]
            kl_coef=algorithm.kl_coef,
            kl_target=algorithm.kl_target,
            kl_horizon=algorithm.kl_horizon,
            kl_estimator=algorithm.kl_estimator.value,
            gamma=algorithm.gamma,
            lam=algorithm.lam,
            cliprange=algorithm.cliprange,
            cliprange_value=algorithm.cliprange_value,
            vf_coef=algorithm.vf_coef,
            whiten_advantages=algorithm.whiten_advantages,
            whiten_rewards=algorithm.whiten_rewards,
            value_at_end=algorithm.value_at_end,
            **common,
        )
    else:
        module = GRPOModule(
            model,
            beta=algorithm.beta,
            epsilon=algorithm.epsilon,
            epsilon_high=algorithm.epsilon_high,
            loss_type=algorithm.loss_type.value,
            scale_rewards=algorithm.scale_rewards.value,
            use_bias_correction_kl=algorithm.use_bias_correction_kl,
            mask_truncated_completions=algorithm.mask_truncated_completions,
            max_new_tokens=algorithm.max_new_tokens,
            **common,
        )
    # Judges are no part of what is trained or saved, but move to the device with it.
    module.judge_heads = nn.ModuleList(head for _, _, head in roles.judges.values())
    return module


def _ptx_rows(cfg: Config, encoder: ChatEncoder) -> list[Example]:
    algorithm: Any = cfg.algorithm
    if not algorithm.ptx_coef:
        return []
    if not algorithm.ptx_path:
        raise UserError(f"algorithm.ptx_coef={algorithm.ptx_coef} needs rows with answers: algorithm.ptx_path=FILE.")
    prepared, _ = load_examples(
        algorithm.ptx_path,
        encoder,
        "sft",
        val_split=0.0,
        max_length=cfg.data.max_length,
        overflow=cfg.data.overflow.value,
        max_dropped=cfg.data.max_dropped,
    )
    return prepared.examples


def show_samples(
    samples: Sequence[tuple[str, str, float, bool]],
    step: int,
    most: int = 3,
    width: int = 200,
    keep: Path | None = None,
) -> None:
    """A table of held-out completions: score, whether it ended, the question's end, the answer's beginning.

    All of them are added to the file `keep`, a line each and in full, with the `step` that they were made after.
    """
    if not samples:
        return
    if keep is not None:
        names = ("prompt", "completion", "score", "ended")
        rows = [{"step": step, **dict(zip(names, sample, strict=True))} for sample in samples]
        with keep.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    say("samples    score  ended  completion")
    for prompt, completion, score, ended in samples[:most]:
        text = f"{_line(prompt, 60, tail=True)} ▸ {_line(completion, width)}"
        say(f"  {score:>+14.2f}  {'yes' if ended else 'no':5}  {text}")


def _line(text: str, width: int, tail: bool = False) -> str:
    flat = " ".join(text.split())
    if len(flat) <= width:
        return flat
    return "…" + flat[-width:] if tail else flat[:width] + "…"
