"""Settings that cannot work together, refused before anything is loaded, with the nearest that do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from lit_ft.config import Algorithm, Config, Peft, Replay, Rollout, Strategy, trains_on_votes
from lit_ft.distributed.processes import rank, started_by_others
from lit_ft.errors import UserError

SHARDED = frozenset({Strategy.fsdp, Strategy.fsdp_tp})
# Algorithms that make the completions they learn from.
ONLINE = frozenset({Algorithm.ppo, Algorithm.grpo})
# Algorithms that need the whole model on each device: several roles stand on it.
WHOLE = ONLINE | {Algorithm.reward}
# Algorithms that can be held to the base by the KL on its own answers; PPO and GRPO have a KL of their own.
ANCHORED = frozenset({Algorithm.sft, Algorithm.dpo})


def check_settings(cfg: Config) -> int:
    """How many processes the run has on this machine.

    Raises:
        UserError: the settings cannot work together.
    """
    devices = devices_here(cfg.trainer.accelerator, cfg.trainer.devices)
    _check_nodes(cfg, devices)
    _check_precision(cfg)
    if trains_on_votes(cfg):
        _check_votes(cfg)
    _check_kind(cfg)
    _check_anchor(cfg)
    _check_averaging(cfg)
    if cfg.scale != 1:
        _check_scale(cfg)
    if cfg.evaluate not in (None, False):
        _check_evaluate(cfg)
    _check_strategy(cfg, devices * cfg.trainer.num_nodes)
    if cfg.strategy.kind in SHARDED:
        _check_model(cfg)
    return devices


def _check_evaluate(cfg: Config) -> None:
    if cfg.algorithm.kind is Algorithm.reward:
        raise UserError("evaluate=true: a judge answers nothing; how often it is right, its card says.")
    if cfg.model.tiny:
        raise UserError("evaluate=true: model.tiny has random weights, which are gone when the run ends.")


def devices_here(accelerator: str, devices: Any) -> int:
    """How many devices of this machine `trainer.devices` speaks of: processes, where there is no GPU.

    Raises:
        UserError: it is no number of devices, or there are fewer.
    """
    import torch

    on_gpu = accelerator in {"gpu", "cuda"} or (accelerator == "auto" and torch.cuda.is_available())
    there = torch.cuda.device_count() if on_gpu else None
    if devices in ("auto", -1, "-1"):
        if there == 0:
            raise UserError(f"trainer.accelerator={accelerator}, and there is no GPU: set trainer.accelerator=cpu.")
        return there or 1
    try:
        which = _listed(devices)
        count = len(which) if which is not None else int(devices)
    except ValueError:
        which, count = None, 0
    if count < 1:
        raise UserError(f"trainer.devices={devices} is no number of devices: give 1 or more, auto, or a list [0,1].")
    if there is not None and (count > there or max(which or [0]) >= there):
        have = f"there {'is' if there == 1 else 'are'} {there}" if there else "there is none"
        nearest = f"set trainer.devices={there}" if there else "set trainer.accelerator=cpu"
        raise UserError(f"trainer.devices={devices} asks for {count} GPU(s), and {have}: {nearest}.")
    return count


def device_number(devices: Any, local_rank: int) -> int:
    """Which of the machine's GPUs is that of the process `local_rank`: trainer.devices may be a list of them."""
    which = _listed(devices)
    return local_rank if which is None else which[local_rank]


def _listed(devices: Any) -> list[int] | None:
    """The devices that a list names, which on the command line may be a text (`0,2`); None for a mere number."""
    if isinstance(devices, str):
        return [int(number) for number in devices.split(",") if number.strip()] if "," in devices else None
    return [int(number) for number in devices] if isinstance(devices, Sequence) else None


def _check_scale(cfg: Config) -> None:
    if not (math.isfinite(cfg.scale) and cfg.scale > 0):
        raise UserError(f"scale={cfg.scale:g} must be above 0: 1 is the adapter as it was trained, 0 its base.")
    if cfg.algorithm.kind not in ANCHORED:
        raise UserError(
            f"scale={cfg.scale:g} is for SFT and DPO; algorithm={cfg.algorithm.kind.value} publishes as it trained."
        )
    later = f"export it so when it is published: python -m lit_ft.export scale={cfg.scale:g}"
    if cfg.peft.kind in (Peft.dora, Peft.full):
        raise UserError(
            f"scale={cfg.scale:g} with peft={cfg.peft.kind.value} needs the base's weights beside the trained ones: "
            f"{later}."
        )
    if cfg.strategy.kind in SHARDED:
        raise UserError(f"scale={cfg.scale:g} has not been made for strategy={cfg.strategy.kind.value}: {later}.")


def _check_anchor(cfg: Config) -> None:
    """What holds a policy to its base: by the KL on the base's own answers, or by mixing them in."""
    from lit_ft.models.kinds import KINDS

    algorithm = cfg.algorithm.kind
    kl_coef = getattr(cfg.algorithm, "kl_coef", 0.0) if algorithm in ANCHORED else 0.0
    for key, number in (
        ("algorithm.kl_coef", kl_coef),
        ("trainer.kl_weight", cfg.trainer.kl_weight),
        ("replay.weight", cfg.replay.weight),
    ):
        if not (math.isfinite(number) and number >= 0):
            raise UserError(f"{key}={number} must be a number from 0 on.")
    for key, number, least in (
        ("replay.max_prompts", cfg.replay.max_prompts, 4),
        ("replay.max_new_tokens", cfg.replay.max_new_tokens, 1),
        ("algorithm.kl_batch_size", getattr(cfg.algorithm, "kl_batch_size", 1), 1),
    ):
        if number < least:
            raise UserError(f"{key}={number} must be at least {least}.")
    if cfg.replay.kind is Replay.self and algorithm is not Algorithm.sft:
        other = (
            "algorithm.kl_coef holds DPO to it" if algorithm is Algorithm.dpo else "the KL in its loss holds it to it"
        )
        raise UserError(
            f"replay=self mixes answers of the base into rows that have one answer each, and "
            f"algorithm={algorithm.value} trains on others: leave it out; {other}."
        )
    if cfg.trainer.kl_weight and algorithm not in ANCHORED:
        raise UserError(
            f"trainer.kl_weight compares the steps of SFT and DPO; leave it out with algorithm={algorithm.value}."
        )
    asked = [
        key for key, value in (("algorithm.kl_coef", kl_coef), ("trainer.kl_weight", cfg.trainer.kl_weight)) if value
    ]
    kind = KINDS[cfg.peft.kind.value]
    if asked and (kind.whole_model or kind.changes_base):
        raise UserError(
            f"{asked[0]} needs the base below the adapter, and with peft={cfg.peft.kind.value} there is none: use "
            "peft=lora, or replay=self, which needs it at the beginning only."
        )
    if cfg.replay.kind is Replay.self:
        asked.append("replay=self")
    if asked and cfg.strategy.kind in SHARDED:
        raise UserError(
            f"{asked[0]} has the base answer prompts, which needs the whole model on each device, and "
            f"strategy={cfg.strategy.kind.value} shards it: use strategy=ddp, or mix rows of your own in with data.mix."
        )


def _check_averaging(cfg: Config) -> None:
    """What an average of the weights asks of the rest."""
    from lit_ft.models.kinds import KINDS

    decay, name = cfg.trainer.ema_decay, cfg.peft.kind.value
    if decay is None:
        return
    if not 0 < decay < 1:
        raise UserError(
            f"trainer.ema_decay={decay} must be above 0 and below 1: of 0.99 about the last 100 steps count. Leave it "
            "out to publish the weights themselves."
        )
    if cfg.strategy.kind in SHARDED:
        raise UserError(
            f"trainer.ema_decay averages weights that are whole on each device, and strategy={cfg.strategy.kind.value} "
            "shards them: use strategy=ddp, or leave trainer.ema_decay out."
        )
    if KINDS[name].scheduled:
        raise UserError(
            f"trainer.ema_decay brings back what peft={name} takes away: in an average the ranks that it sets to zero "
            "are not zero. Use peft=lora, or leave trainer.ema_decay out."
        )
    if cfg.algorithm.kind in ONLINE and cfg.rollout is not None and cfg.rollout.kind is Rollout.vllm:
        raise UserError(
            "trainer.ema_decay measures the average, and the engine of rollout=vllm would complete held-out prompts "
            "with one policy and the next ones in training with the other: use rollout=transformers, or leave "
            "trainer.ema_decay out."
        )


def _check_nodes(cfg: Config, devices: int) -> None:
    nodes = cfg.trainer.num_nodes
    if nodes < 1:
        raise UserError(f"trainer.num_nodes={nodes} must be at least 1.")
    if nodes > 1 and not started_by_others():
        raise UserError(
            f"trainer.num_nodes={nodes}: processes on several machines are started by torchrun "
            f"(torchrun --nnodes={nodes} --nproc-per-node={devices} … -m lit_ft …, see examples/torchrun) or by Slurm "
            "(examples/slurm). On this machine alone, leave trainer.num_nodes at 1."
        )


def _check_precision(cfg: Config) -> None:
    from lit_ft.models.precision import check_precision

    check_precision(cfg.trainer.precision)


def _check_votes(cfg: Config) -> None:
    """What can be said of votes before it is known which model they must be on."""
    from lit_ft.data.votes import check_store

    if cfg.algorithm.kind is Algorithm.sft:
        raise UserError(
            f"data=votes holds preferences, which algorithm={cfg.algorithm.kind.value} cannot use: add +experiment=dpo "
            "(or algorithm=dpo)."
        )
    if not rank():  # which alone reads them
        check_store(cfg.data.path)


def _check_kind(cfg: Config) -> None:
    """What the adapter's kind asks of the rest."""
    from lit_ft.models.kinds import KINDS

    name, kind = cfg.peft.kind.value, KINDS[cfg.peft.kind.value]
    if cfg.strategy.kind in SHARDED and not kind.sharded:
        wanted = cfg.strategy.kind.value
        raise UserError(
            f"strategy={wanted} cannot shard peft={name}: use strategy=ddp, which keeps the whole model on every "
            f"device, or peft=lora with strategy={wanted}."
        )
    if cfg.strategy.kind is Strategy.fsdp_tp and not kind.split:
        raise UserError(
            f"strategy=fsdp_tp cannot split the layers that peft={name} goes on: use strategy=fsdp, or peft=lora with "
            "strategy=fsdp_tp."
        )
    _check_roles(cfg, name, kind)
    if kind.scheduled:
        ends = {"trainer.early_stopping": cfg.trainer.early_stopping}
        if OmegaConf.is_dict(cfg.trainer.extra):
            ends["trainer.extra.max_time"] = cfg.trainer.extra.get("max_time")
        for key, value in ends.items():
            if value is not None:
                raise UserError(
                    f"{key}={value} may end the run before peft={name} is done: its schedule of ranks needs the number "
                    f"of steps beforehand. Leave {key} out and set trainer.max_steps or trainer.max_epochs; the best "
                    "weights after the last rank was taken are published anyway. Or use peft=lora."
                )


def _check_roles(cfg: Config, name: str, kind: Any) -> None:
    """What judges and online algorithms ask: several adapters on one base, which is whole on every device."""
    algorithm = cfg.algorithm.kind
    if algorithm not in WHOLE:
        return
    if cfg.strategy.kind in SHARDED:
        raise UserError(
            f"strategy={cfg.strategy.kind.value} cannot shard algorithm={algorithm.value}, where states that scalar "
            "heads read, and completions that are made token by token, need the whole model: use strategy=ddp, which "
            "has the frozen base once on each device (peft=qlora keeps it in 4 bits)."
        )
    if not kind.lora:
        raise UserError(
            f"algorithm={algorithm.value} keeps its models as LoRA adapters on one base, and peft={name} is none: use "
            "peft=lora (or rslora, lora_plus, dora, qlora)."
        )
    if algorithm in ONLINE:
        if not kind.beside_others:
            raise UserError(
                f"algorithm={algorithm.value} trains the policy while its reference, its value model and its judge "
                f"stand on the same base, which peft={name} cannot: use peft=lora (or rslora, lora_plus, dora, qlora)."
            )
        _check_online(cfg)


def _check_online(cfg: Config) -> None:
    """Settings of PPO and GRPO that can be judged before anything is loaded."""
    from lit_ft.rewards.base import parse_rewards

    parse_rewards("reward", cfg.reward)
    if cfg.judge is not None:
        parse_rewards("judge", cfg.judge)
    if cfg.rollout is None:
        raise UserError("Nothing makes completions: add +rollout=transformers (or +rollout=vllm).")
    _check_horizon(cfg)
    room = cfg.data.max_length - cfg.algorithm.max_new_tokens  # type: ignore[attr-defined]
    if room < 1:
        raise UserError(
            f"algorithm.max_new_tokens={cfg.algorithm.max_new_tokens} leaves no room for prompts within "  # type: ignore[attr-defined]
            f"data.max_length={cfg.data.max_length}: lower the first or raise the second."
        )


def _check_horizon(cfg: Config) -> None:
    """An iteration must not be so long beside the horizon that the KL coefficient could change its sign."""
    from lit_ft.losses.ppo import MAX_PROPORTIONAL_ERROR

    algorithm: Any = cfg.algorithm
    if algorithm.kind is not Algorithm.ppo or algorithm.kl_target is None:
        return
    completions = cfg.data.batch_size * algorithm.num_generations
    if completions * MAX_PROPORTIONAL_ERROR >= algorithm.kl_horizon:
        raise UserError(
            f"algorithm.kl_horizon={algorithm.kl_horizon:g} is too short: an iteration has {completions} completions "
            "(data.batch_size × algorithm.num_generations), and the coefficient would change by more than itself. "
            f"Choose one above {completions * MAX_PROPORTIONAL_ERROR:g}; 10000 is usual."
        )


def _check_strategy(cfg: Config, processes: int) -> None:
    strategy = cfg.strategy
    kind, parts = strategy.kind, strategy.tensor_parallel_size
    if kind is not Strategy.fsdp_tp and parts != 1:
        raise UserError(
            f"strategy.tensor_parallel_size={parts} has no effect with strategy={kind.value}: use strategy=fsdp_tp."
        )
    if kind is Strategy.fsdp_tp and (parts < 1 or processes % parts):
        fitting = [n for n in range(2, processes + 1) if processes % n == 0]
        advice = f"sizes that do: {', '.join(map(str, fitting))}" if fitting else "use strategy=fsdp, or more devices"
        raise UserError(
            f"strategy.tensor_parallel_size={parts} does not divide the {processes} "
            f"device{'s' if processes > 1 else ''} of trainer.devices × trainer.num_nodes ({advice})."
        )
    if kind not in SHARDED:
        for key, value, default in (
            ("cpu_offload", strategy.cpu_offload, False),
            ("reshard_after_forward", strategy.reshard_after_forward, True),
            ("param_dtype", strategy.param_dtype, None),
            ("reduce_dtype", strategy.reduce_dtype, None),
        ):
            if value != default:
                raise UserError(f"strategy.{key} has no effect with strategy={kind.value}: use strategy=fsdp.")


def _check_model(cfg: Config) -> None:
    """What only the model's config says: that its weights can be sharded and its layers split."""
    from lit_ft.models.load import load_config
    from lit_ft.models.tensor_parallel import why_not_divisible

    config = load_config(cfg.model.id, cfg.model.tiny)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"The weights of {cfg.model.id} are quantized, and FSDP cannot shard those here: use strategy=ddp, or the "
            "model without quantization."
        )
    if reason := why_not_divisible(config, cfg.strategy.tensor_parallel_size):
        raise UserError(f"{reason}.")
