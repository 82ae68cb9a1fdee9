"""A judge: an adapter with a scalar head that scores completions, and its folder, which is PEFT's for one class.

`AutoModelForSequenceClassification(base, num_labels=1)` with PEFT reads it as well: the head is the module `score`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_ft.adapter import ADAPTER_WEIGHTS
from lit_ft.batches import Batch
from lit_ft.errors import UserError
from lit_ft.models.adapt import causal_lm, is_adapted
from lit_ft.models.kinds.base import default_config
from lit_ft.models.score import hidden_states

HEAD = "base_model.model.score.weight"
NORMALISATION = "judge.json"


@dataclass(frozen=True)
class JudgeFiles:
    """What the folder of a published judge holds.

    Attributes:
        config: PEFT's configuration of the adapter, as for a causal language model.
        weights: of the adapter, under PEFT's names.
        head: `(1, H)`.
        mean, std: of its raw scores over the completions that it was trained on.
    """

    config: Any
    weights: dict[str, Tensor]
    head: Tensor
    mean: float
    std: float


def scalar_head(hidden_size: int, *, bias: bool = False, zero: bool = False) -> nn.Linear:
    """`(H,)` → one number, in fp32: drawn with deviation 1/√(H+1) (Stiennon et al. 2020; Huang et al. 2024), or 0."""
    head = nn.Linear(hidden_size, 1, bias=bias, dtype=torch.float32)
    with torch.no_grad():
        if zero:
            head.weight.zero_()
        else:
            head.weight.normal_(std=1 / math.sqrt(hidden_size + 1))
        if bias:
            head.bias.zero_()
    return head


def hidden_size(model: Any) -> int:
    """The width of the states that a head sees: the output embedding's, which may differ from the layers'."""
    return int(causal_lm(model).get_output_embeddings().weight.shape[1])


def head_values(model: Any, head: nn.Linear, batch: Batch, places: Tensor) -> Tensor:
    """`(M,)` what `head` says at `places` `(M,)` of the batch's flattened hidden states, in float32."""
    states = hidden_states(model, batch).index_select(0, places)
    with torch.autocast(states.device.type, enabled=False):
        return head(states.float()).squeeze(-1)


def completion_scores(model: Any, head: nn.Linear, batch: Batch) -> Tensor:
    """`(C,)` raw scores of the batch's completions: the head at each one's last token, which has seen it whole."""
    return head_values(model, head, batch, batch.completion_ends)


def save_judge(model: Any, head: nn.Linear, folder: Path, *, mean: float, std: float) -> None:
    """Write the adapter with its head and its normalisation into `folder`."""
    from safetensors.torch import load_file, save_file

    from lit_ft.models.adapt import save_trained

    save_trained(model, folder)
    weights = load_file(folder / ADAPTER_WEIGHTS)
    weights[HEAD] = head.weight.detach().float().cpu().contiguous()
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    kept = {"mean": mean, "std": std}
    (folder / NORMALISATION).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def is_judge(folder: Path) -> bool:
    """Whether `folder` holds a judge."""
    return (folder / NORMALISATION).is_file()


def read_judge(folder: Path, ref: str) -> JudgeFiles:
    """The judge in `folder`.

    Raises:
        UserError: it holds none, or a damaged one.
    """
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not is_judge(folder):
        raise UserError(
            f"{ref} is no judge: it has no {NORMALISATION}. Train one with python -m lit_ft +experiment=reward "
            "name=NAME."
        )
    try:
        weights = load_file(folder / ADAPTER_WEIGHTS)
        head = weights.pop(HEAD).float()
        kept = json.loads((folder / NORMALISATION).read_text(encoding="utf-8"))
        mean, std = float(kept["mean"]), float(kept["std"])
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"The judge {ref} in {folder} is damaged ({type(error).__name__}: {error}).") from error
    # Its scores would not always say so: with AVX512 PyTorch's flash attention makes finite outputs of NaN queries.
    finite = all(bool(torch.isfinite(part).all()) for part in (head, *weights.values()))
    if config.peft_type is None:
        raise UserError(f"The judge {ref} in {folder} is damaged: its adapter_config.json names no kind of adapter.")
    if not (finite and math.isfinite(mean) and math.isfinite(std) and std > 0) or head.ndim != 2:
        raise UserError(f"The judge {ref} in {folder} is damaged: its weights or normalisation are no usable numbers.")
    config.task_type, config.modules_to_save = "CAUSAL_LM", None
    return JudgeFiles(config, weights, head, mean, std)


def put_judge(model: Any, role: str, files: JudgeFiles, ref: str) -> nn.Linear:
    """Put the judge's adapter on `model` under the name `role` and return its head, which are not trained.

    Whether the weights of the base are those that it was trained on, its card says; here only what cannot fit is seen.

    Raises:
        UserError: it does not belong to this model.
    """
    from lit_ft.models.roles import add_role

    width = hidden_size(model)
    if files.head.shape != (1, width):
        raise UserError(
            f"The judge {ref} has a head of width {files.head.shape[-1]}, and this model's is {width}: it was trained "
            "on another base."
        )
    assert is_adapted(model)
    if files.config.peft_type != (ours := default_config(model).peft_type):
        raise UserError(
            f"The judge {ref} is a {files.config.peft_type.value} adapter and the model's own is {ours.value}: PEFT "
            "keeps adapters of one kind on a base. Train both with the same peft, such as peft=lora."
        )
    try:
        add_role(model, role, files.config, files.weights)
    except (ValueError, RuntimeError, KeyError) as error:
        # PyTorch says in the first line that something is wrong and in the second what.
        reason = " ".join(str(error).split("\n")[:2]).replace("\t", "")
        raise UserError(
            f"The judge {ref} does not fit the model ({reason}): it was trained on another base."
        ) from error
    head = scalar_head(width, zero=True)
    with torch.no_grad():
        head.weight.copy_(files.head)
    return head.requires_grad_(False)


def normalisation(scores: Sequence[float]) -> tuple[float, float]:
    """Mean and deviation of raw scores (population's); where they differ by no more than rounding, 1."""
    values = torch.tensor(scores, dtype=torch.float64)
    std = float(values.std(correction=0))
    rounding = torch.finfo(torch.float32).eps * float(values.abs().max())
    return float(values.mean()), std if std > rounding else 1.0
