"""Every setting of training, typed, on one page. For the wiring and what is above it; constructors take flat values."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING, OmegaConf


class Algorithm(Enum):
    sft = "sft"
    dpo = "dpo"
    reward = "reward"
    ppo = "ppo"
    grpo = "grpo"


class Peft(Enum):
    lora = "lora"
    rslora = "rslora"
    lora_plus = "lora_plus"
    dora = "dora"
    pissa = "pissa"
    qlora = "qlora"
    adalora = "adalora"
    ia3 = "ia3"
    full = "full"


class Packing(Enum):
    auto = "auto"
    on = "on"
    off = "off"


class Overflow(Enum):
    drop = "drop"
    truncate = "truncate"


class TrainOn(Enum):
    assistant = "assistant"
    all = "all"


class LossType(Enum):
    sigmoid = "sigmoid"
    ipo = "ipo"
    hinge = "hinge"


class Reference(Enum):
    initial = "initial"
    base = "base"


class Replay(Enum):
    none = "none"
    self = "self"


class Prompts(Enum):
    general = "general"
    task = "task"


class KLKind(Enum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class ValueFrom(Enum):
    zero = "zero"
    reward = "reward"


class GRPOLossType(Enum):
    grpo = "grpo"
    bnpo = "bnpo"
    dr_grpo = "dr_grpo"
    dapo = "dapo"


class ScaleRewards(Enum):
    group = "group"
    batch = "batch"
    none = "none"


class Rollout(Enum):
    transformers = "transformers"
    vllm = "vllm"


class Strategy(Enum):
    auto = "auto"
    ddp = "ddp"
    fsdp = "fsdp"
    fsdp_tp = "fsdp_tp"


class FloatFormat(Enum):
    bf16 = "bf16"
    fp32 = "fp32"


@dataclass
class ModelConfig:
    id: str = MISSING
    """`bundled`, a Hub id, or a model folder."""
    attention: str | None = None
    """transformers' attn_implementation where rows are padded; null lets it choose."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    tiny: bool = False
    """Two narrow layers with random weights: to try a configuration in seconds."""


@dataclass
class PeftConfig:
    kind: Peft = MISSING
    learning_rate_factor: float = 1.0
    """Times algorithm.learning_rate, which is meant for LoRA, is the learning rate of this kind."""


@dataclass
class LoraConfig(PeftConfig):
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Any = "all-linear"
    """`all-linear`, a regular expression, or a list of names' ends."""
    use_rslora: bool = False
    """Scale by alpha/√r instead of alpha/r."""


@dataclass
class LoraPlusConfig(LoraConfig):
    loraplus_lr_ratio: float = 16.0
    """The learning rate of B over that of A."""


@dataclass
class PissaConfig(LoraConfig):
    niter: int | None = 16
    """Iterations of the randomised singular value decomposition; null: the exact one, slow for large models."""


@dataclass
class AdaLoraConfig(PeftConfig):
    init_r: int = 24
    """Ranks per weight at the beginning."""
    target_r: int = 16
    """Ranks per weight, on average, at the end."""
    alpha: int = 64
    dropout: float = 0.0
    target_modules: Any = "all-linear"
    tinit: float = 0.1
    """Steps before the first rank is taken away; below 1: a share of the run's steps."""
    tfinal: float = 0.3
    """Steps after the last was taken; below 1: a share."""
    deltaT: int = 1  # noqa: N815 - PEFT's name
    """Steps between two allocations."""
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.1
    """How strongly singular vectors are held orthogonal."""


@dataclass
class IA3Config(PeftConfig):
    target_modules: Any = "auto"
    """`auto` (keys, values, the feed-forward layer's last product), a regular expression, or a list of ends."""
    feedforward_modules: Any = None
    """Those of them whose inputs are scaled; null finds them."""


@dataclass
class AlgorithmConfig:
    kind: Algorithm = MISSING
    learning_rate: float = MISSING
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass
class AnchoredConfig(AlgorithmConfig):
    """What SFT and DPO have in common: they can be held to the base by the KL on its own answers."""

    kl_coef: float = 0.0
    """Weight of KL(base ‖ policy) per token on the base's own answers; 0.1 to 1 hold a policy back."""
    kl_prompts: Prompts = Prompts.general
    """What the base answers for it: `general` prompts (replay.path), or those of the `task`'s training rows."""
    kl_batch_size: int = 4
    """Of those answers, per optimizer step."""


@dataclass
class SFTConfig(AnchoredConfig):
    kind: Algorithm = Algorithm.sft
    learning_rate: float = 2e-4


@dataclass
class DPOConfig(AnchoredConfig):
    kind: Algorithm = Algorithm.dpo
    learning_rate: float = 1e-5
    beta: float = 0.1
    loss_type: LossType = LossType.sigmoid
    label_smoothing: float = 0.0
    """Probability that a label is wrong (conservative DPO); with loss_type=sigmoid."""
    reference: Reference = Reference.initial
    """`initial`: the policy as it was loaded, adapter included. `base`: the model below every adapter."""


@dataclass
class RewardConfig(AlgorithmConfig):
    kind: Algorithm = Algorithm.reward
    learning_rate: float = 1e-4
    center_rewards_coefficient: float = 0.0
    """Weight of a term that keeps scores around 0 (Eisenstein et al. 2023, arXiv:2312.09244: 0.01)."""


@dataclass
class RolloutAlgorithmConfig(AlgorithmConfig):
    """What PPO and GRPO have in common: each step is an iteration of completions, scores and updates."""

    learning_rate: float = 1e-5
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.0
    max_new_tokens: int = 64
    """Tokens that a completion may have."""
    temperature: float = 1.0
    """Completions are drawn, and log-probabilities taken, at this temperature (Huang et al. 2024; TRL: 1)."""
    num_generations: int = 1
    """Completions per prompt."""
    num_epochs: int = 4
    """Times that each iteration's completions are trained on (PPO: 4 in InstructGPT's memory; GRPO: 1)."""
    num_mini_batches: int = 1
    """Optimizer steps per such epoch, on other prompts each, shuffled anew (Huang et al. 2024; TRL: 1)."""
    missing_eos_penalty: float | None = None
    """Taken from the score of a completion that does not end (TRL's name; Huang et al. 2024 give such a fixed one)."""
    reference: Reference = Reference.initial
    """What KL is measured to: `initial`, the policy as it was loaded; `base`, the model below every adapter."""
    ptx_coef: float = 0.0
    """Weight of the loss on `ptx_path` in every optimizer step (InstructGPT's pretraining mix)."""
    ptx_path: str | None = None
    """Rows with answers, in any of the formats for SFT."""
    ptx_batch_size: int = 4
    """Of those rows, per optimizer step."""


@dataclass
class PPOConfig(RolloutAlgorithmConfig):
    kind: Algorithm = Algorithm.ppo
    adam_epsilon: float = 1e-5
    """As PPO's first implementations had it (Huang et al. 2024)."""
    kl_coef: float = 0.05
    """Of the KL to the reference, per token (InstructGPT: 0.02; TRL: 0.05)."""
    kl_target: float | None = None
    """Nats of a completion's KL that the coefficient is adapted to (Ziegler et al. 2019: 6); null keeps it fixed."""
    kl_horizon: float = 10_000
    """Completions over which the adaptation takes effect."""
    kl_estimator: KLKind = KLKind.k1
    """Of each token's KL: `k1`, the difference of log-probabilities (InstructGPT), or Schulman's `k2`, `k3`."""
    gamma: float = 1.0
    """Discount from token to token (InstructGPT: 1)."""
    lam: float = 0.95
    """λ of generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438; InstructGPT: 0.95)."""
    cliprange: float = 0.2
    """How far the policy's ratio may leave 1 (Schulman et al. 2017: 0.2)."""
    cliprange_value: float = 0.2
    """How far a value may leave the one it had when the completion was made (InstructGPT: 0.2)."""
    vf_coef: float = 0.1
    """Weight of the value model's loss (Ziegler et al. 2019: 0.1)."""
    whiten_advantages: bool = True
    """To mean 0 and deviation 1 over an iteration's tokens, padding left out (Huang et al. 2024)."""
    whiten_rewards: bool = False
    """To deviation 1, without shifting their mean (Huang et al. 2024)."""
    value_at_end: bool = True
    """Values have one token more than the completion: the score is paid after the last one (Huang et al. 2024)."""
    value_from: ValueFrom = ValueFrom.zero
    """The value model begins at 0, or as the reward adapter (InstructGPT)."""


@dataclass
class GRPOConfig(RolloutAlgorithmConfig):
    kind: Algorithm = Algorithm.grpo
    num_generations: int = 8
    num_epochs: int = 1
    beta: float = 0.0
    """Of the KL to the reference, in the loss (DeepSeekMath: 0.04; TRL: 0)."""
    use_bias_correction_kl: bool = True
    """π/π_old weighs the KL's estimate, which makes it unbiased (DeepSeek-V3.2, arXiv:2512.02556; TRL's name)."""
    epsilon: float = 0.2
    """How far the ratio may leave 1 (DeepSeekMath, TRL: 0.2)."""
    epsilon_high: float | None = None
    """The upper end of the clip range; null: as the lower one (DAPO: 0.28)."""
    loss_type: GRPOLossType = GRPOLossType.dapo
    """What the sum over tokens is divided by: the tokens of the step (`dapo`, arXiv:2503.14476; here `bnpo` as well),
    each completion's own (`grpo`, DeepSeekMath), or max_new_tokens (`dr_grpo`, arXiv:2503.20783)."""
    scale_rewards: ScaleRewards = ScaleRewards.group
    """Advantages are divided by the deviation of the prompt's group (DeepSeekMath), of the batch, or not at all
    (Dr. GRPO)."""
    mask_truncated_completions: bool = False
    """Completions that did not end are left out of the loss (DAPO, TRL's name); their scores still count in the group's
    mean."""


@dataclass
class RolloutConfig:
    kind: Rollout = MISSING
    max_tokens: int | None = None
    """Tokens of the completions that are made at a time (transformers); null: 4096 on a CPU, 131072 on a GPU."""
    gpu_memory_utilization: float = 0.4
    """vLLM's share of the GPU, which training needs as well."""
    retries: int = 2
    """How often an engine that died is started again in one iteration."""
    start_timeout: float = 900.0
    """Seconds until a start of vLLM counts as failed."""
    request_timeout: float = 900.0
    """Seconds without an answer after which vLLM counts as dead."""


@dataclass
class MixConfig:
    path: str = MISSING
    weight: float = MISSING
    """Rows of this source per row of the main one."""
    split: str = "train"


@dataclass
class DataConfig:
    path: str = MISSING
    """A file, a folder with train.*, a Hub id, or `examples:NAME`."""
    split: str = "train"
    val_path: str | None = None
    """Held-out rows; null takes heldout.* or validation.* beside train.*, else `val_split` of the rows."""
    held_out_split: str = "validation"
    """The split of a Hub `val_path`."""
    val_split: float = 0.1
    max_val_rows: int | None = None
    max_rows: int | None = None
    columns: Any = None
    """For other names: {prompt: question, completion: answer}."""
    chat_template: str | None = None
    """null: the tokenizer's own; `chatml`, `plain`, or a Jinja file."""
    as_chat: bool | None = None
    """Whether plain strings are a user's and an assistant's turn; null: if there is a chat template."""
    train_on: TrainOn = TrainOn.assistant
    max_length: int = 1024
    """Tokens of a prompt with its answer."""
    overflow: Overflow = Overflow.drop
    max_dropped: float = 0.1
    """Share of rows that may be unusable before the run refuses."""
    batch_size: int = 8
    """Examples per optimizer step, over all devices."""
    max_tokens: int | None = None
    """Tokens per forward pass on one device: bounds memory, changes no result. null: 1024 on a CPU, 16384 on a GPU."""
    packing: Packing = Packing.auto
    shuffle: bool = True
    mix: list[MixConfig] = field(default_factory=list)
    """Other sources mixed in, e.g. general data against forgetting."""


@dataclass
class VotesConfig(DataConfig):
    path: str = "votes.db"
    """The SQLite file in which the server keeps votes."""
    val_split: float = 0.2
    """Share of prompts, not of rows, that is held out."""
    min_votes: int = 20
    """Different decisive pairs of the base that is trained, below which the run refuses."""


@dataclass
class ReplayConfig:
    kind: Replay = MISSING
    """`self`: the base answers general prompts once, and its answers are mixed into the training rows."""
    weight: float = 0.5
    """Rows of them per training row."""
    path: str = "examples:general_prompts"
    """The prompts, in any of the formats for SFT."""
    max_prompts: int = 96
    """Of them, at most. A quarter is left out of training: eval/kl is measured on it."""
    max_new_tokens: int = 96
    """Of an answer."""


@dataclass
class TrainerConfig:
    accelerator: str = "auto"
    devices: Any = 1
    """How many, `auto` for all GPUs, or which ones: [0, 2]. On a CPU: processes."""
    num_nodes: int = 1
    """Machines; above 1 torchrun or Slurm starts the processes (examples/torchrun, examples/slurm)."""
    precision: str = "auto"
    """`bf16-mixed`, `32-true`, or whichever this machine multiplies faster."""
    max_epochs: int = 1
    max_steps: int = -1
    val_check_interval: Any = 1.0
    """Steps (an integer) or share of an epoch between validations."""
    validate_first: bool = True
    """Measure the held-out loss before the first step, too."""
    log_every_n_steps: int = 1
    save_every_n_steps: int = 50
    """Steps between writings of last.ckpt."""
    kl_weight: float = 0.0
    """Compare steps by the held-out loss plus this times the KL to the base on its own answers to general prompts:
    which is the best, and when early_stopping ends the run."""
    early_stopping: int | None = None
    """Stop after this many validations without a better held-out loss."""
    ema_decay: float | None = None
    """Publish an exponential moving average of the trained weights, with this decay (0.99, say); held-out metrics are
    the average's. null: the weights themselves."""
    threads: int | None = None
    """Threads on a CPU; null measures which number is fastest (OMP_NUM_THREADS decides where it is set)."""
    profile: bool = False
    """Show where the time of three steps goes, and keep it in the run's folder (profile.txt, trace.json.gz)."""
    deterministic: bool = False
    progress: bool = True
    extra: Any = None
    """Further arguments of lightning.Trainer, as they are."""


@dataclass
class StrategyConfig:
    kind: Strategy = Strategy.auto
    """`auto`: one process, or `ddp` on several devices; `fsdp` shards weights; `fsdp_tp` splits layers, too."""
    tensor_parallel_size: int = 1
    """Devices that share each layer's tensors (fsdp_tp); FSDP shards over the rest."""
    cpu_offload: bool = False
    """Keep sharded weights in main memory and bring each layer to the GPU when it runs."""
    reshard_after_forward: bool = True
    """Give a layer's weights back after its forward pass; false is faster and takes more memory."""
    param_dtype: FloatFormat | None = None
    """Gather weights in this format; null: frozen ones as they are kept, trained ones in fp32."""
    reduce_dtype: FloatFormat | None = None
    """Sum gradients over devices in this format; null: fp32, as they are."""
    extra: Any = None
    """Further arguments of Lightning's strategy, as they are."""


@dataclass
class Config:
    name: str = "support"
    """The adapter's name."""
    adapters: str = "adapters"
    """The folder in which adapters are published."""
    runs: str = "runs"
    """The folder of logs and checkpoints."""
    seed: int = 0
    scale: float = 1.0
    """The part of its strength with which the adapter is published: 0.7 forgets less and knows less."""
    evaluate: Any = False
    """Write the report on the adapter once it is published, as `python -m lit_ft.evaluate` does by default; or with
    settings of that command, a mapping such as {against: support@v1, fail_if: "forgetting=worse"}, of which `fail_if`
    makes the run end with exit code 3."""
    debug: bool = False
    """Show tracebacks."""
    resume: str | None = None
    """`last`, a checkpoint, or a run's folder."""
    start_from: str = "auto"
    """`auto`: DPO goes on from the newest SFT adapter of the same name, and on votes from the newest adapter; `none`:
    the base; or NAME@vN."""
    objective: str = "eval/loss"
    """The held-out metric by which a sweep compares runs; -METRIC where more is better (-eval/rewards/accuracies)."""
    model: ModelConfig = MISSING
    peft: PeftConfig = MISSING
    algorithm: AlgorithmConfig = MISSING
    data: DataConfig = MISSING
    trainer: TrainerConfig = MISSING
    strategy: StrategyConfig = MISSING
    logger: Any = None
    replay: ReplayConfig = MISSING
    rollout: RolloutConfig | None = None
    """What makes completions for PPO and GRPO: `transformers`, or `vllm`, the engine of the server."""
    reward: Any = None
    """What scores them: a published judge (NAME or NAME@vN), a function (package.module:function), or a list of
    {reward: …, weight: …}."""
    judge: Any = None
    """Another such, which scores held-out completions only: what the policy was not trained for."""


def trains_on_votes(cfg: Config) -> bool:
    """Whether the rows are votes of a preference store (data=votes)."""
    return OmegaConf.get_type(cfg, "data") is VotesConfig


def register_schemas() -> None:
    """Tell Hydra the schemas, so that a wrong key or type in YAML or on the command line fails at composition."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="config_schema", node=Config)
    _register_groups()


@functools.cache
def _register_groups() -> None:
    """The schemas of the groups, which no command changes: once is enough."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group="model", name="model_schema", node=ModelConfig)
    store.store(group="peft", name="peft_schema", node=PeftConfig)
    store.store(group="peft", name="lora_schema", node=LoraConfig)
    store.store(group="peft", name="lora_plus_schema", node=LoraPlusConfig)
    store.store(group="peft", name="pissa_schema", node=PissaConfig)
    store.store(group="peft", name="adalora_schema", node=AdaLoraConfig)
    store.store(group="peft", name="ia3_schema", node=IA3Config)
    store.store(group="algorithm", name="sft_schema", node=SFTConfig)
    store.store(group="algorithm", name="dpo_schema", node=DPOConfig)
    store.store(group="algorithm", name="reward_schema", node=RewardConfig)
    store.store(group="algorithm", name="ppo_schema", node=PPOConfig)
    store.store(group="algorithm", name="grpo_schema", node=GRPOConfig)
    store.store(group="rollout", name="rollout_schema", node=RolloutConfig)
    store.store(group="replay", name="replay_schema", node=ReplayConfig)
    store.store(group="data", name="data_schema", node=DataConfig)
    store.store(group="data", name="votes_schema", node=VotesConfig)
    store.store(group="trainer", name="trainer_schema", node=TrainerConfig)
    store.store(group="strategy", name="strategy_schema", node=StrategyConfig)
