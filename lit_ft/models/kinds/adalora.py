"""AdaLoRA: a budget of ranks that moves to the weights that need it while training goes on."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_ft.errors import UserError
from lit_ft.models.convert import adalora_factors, as_plain_lora, singular
from lit_ft.models.kinds.base import (
    AdapterKind,
    Published,
    Report,
    adapted,
    as_targets,
    check_numbers,
    config_in,
    default_config,
    loaded,
    lora_layers,
    why_not_among,
)

PARTS = ("lora_A", "lora_B", "lora_E")
# PEFT divides by the rank plus this.
_EPSILON = 1e-5


class Schedule(NamedTuple):
    """When how many ranks are left (Zhang et al. 2023, arXiv:2303.10512, equation 12). Steps count from 1.

    Attributes:
        first: ranks of all weights at the beginning.
        last: at the end.
        tinit: steps before the first is taken.
        tfinal: steps after the last was taken.
        total: steps of the run.
        every: steps between two allocations.
    """

    first: int
    last: int
    tinit: int
    tfinal: int
    total: int
    every: int = 1

    @property
    def settled(self) -> int:
        """The step from which on the ranks stay as they are."""
        return self.total - self.tfinal

    def at(self, step: int) -> int | None:
        """The budget that is enforced after `step`; None where nothing changes."""
        if step >= self.settled:
            return self.last
        if step <= self.tinit or step % self.every:
            return None
        rest = 1 - (step - self.tinit) / (self.settled - self.tinit)
        return int((self.first - self.last) * rest**3 + self.last)


class AdaLora(AdapterKind):
    """AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) on PEFT's layers, with an allocator of its own.

    Each weight's update is P·Λ·Q. After each step the importance of every triplet (a singular value and its two
    vectors) is brought up to date, and on schedule the least important of all weights together get the value 0, so
    that exactly the budget is left. PEFT's allocator does the same, but masks too few or too many where importances
    are equal, and forgets its averages when a run is resumed.

    P and Q begin orthonormal, which is what the penalty asks of them. (In the authors' code, and in PEFT, they begin as
    small random numbers, with products of which a short run moves nothing.)

    Published is a plain LoRA: P·Λ·Q is a product of two factors.

    Args:
        init_r, target_r: ranks per weight, on average, at the beginning and at the end.
        alpha: the product is scaled by alpha/init_r.
        dropout: of the adapter's input, while training.
        target_modules: see `Lora`.
        tinit, tfinal: steps before the first rank is taken and after the last; below 1 a share of the run's steps.
        deltaT: steps between two allocations.
        beta1, beta2: of the moving averages of importance and of its uncertainty.
        orth_reg_weight: how much P and Q are held orthogonal.
    """

    sharded = False
    lora = True
    scheduled = True

    def __init__(
        self,
        *,
        init_r: int = 24,
        target_r: int = 16,
        alpha: int = 64,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
        tinit: float = 0.1,
        tfinal: float = 0.3,
        deltaT: int = 1,  # noqa: N803 - PEFT's name, and the paper's
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.1,
    ) -> None:
        check_numbers(init_r=init_r, target_r=target_r, alpha=alpha, dropout=dropout)
        if target_r >= init_r:
            raise UserError(
                f"peft.init_r={init_r} must be above peft.target_r={target_r}: AdaLoRA takes ranks away. With equal "
                "ranks use peft=lora."
            )
        if not (0 < beta1 < 1 and 0 < beta2 < 1):
            raise UserError(f"peft.beta1={beta1} and peft.beta2={beta2} must lie between 0 and 1.")
        if deltaT < 1 or tinit < 0 or tfinal < 0 or orth_reg_weight < 0:
            raise UserError("peft.deltaT is at least 1; peft.tinit, tfinal and orth_reg_weight are not below 0.")
        self.init_r, self.target_r, self.alpha, self.dropout = init_r, target_r, alpha, dropout
        self.target_modules = target_modules
        self.tinit, self.tfinal, self.every = tinit, tfinal, deltaT
        self.beta1, self.beta2, self.orth_reg_weight = beta1, beta2, orth_reg_weight
        self.steps: Schedule | None = None
        self._weights = 0
        self._importance: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}

    def config(self) -> Any:
        """PEFT's configuration. Its own allocator is not used, and its steps mean nothing."""
        from peft import AdaLoraConfig, TaskType

        return AdaLoraConfig(
            init_r=self.init_r,
            target_r=self.target_r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=as_targets(self.target_modules),
            orth_reg_weight=self.orth_reg_weight,
            total_step=1,
            task_type=TaskType.CAUSAL_LM,
        )

    def begin(self, model: Any) -> Any:
        made = adapted(model, self.config())
        layers = lora_layers(made)
        for _, layer in layers:  # PEFT makes it trainable where it casts it, as above a base in half precision
            layer.ranknum["default"].requires_grad_(False)
            for vectors in (layer.lora_A["default"], layer.lora_B["default"]):
                if not vectors.is_meta:  # as for a preview, which has no weights
                    torch.nn.init.orthogonal_(vectors)
        self._weights = len(layers)
        return made

    def why_not_from(self, folder: Path) -> str | None:
        if reason := why_not_among(folder, ["lora"], "AdaLoRA"):
            return reason
        config = config_in(folder)
        rank = max(config.r, *(config.rank_pattern or {}).values(), 0)
        if rank > self.init_r:
            return f"has rank {rank}, above peft.init_r={self.init_r}: give peft.init_r={rank} or start_from=none."
        return None

    def go_on(self, model: Any, folder: Path, ref: str) -> Any:
        """From a plain LoRA, exactly: its product's singular value decomposition is such triplets."""
        self.check_goes_on(folder, ref)
        config = config_in(folder)
        plain = loaded(model, folder, config)
        triplets = {}
        for name, layer in lora_layers(plain):
            a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
            triplets[name] = (*singular(a, b), layer.scaling["default"])
        targets = config.target_modules
        self.target_modules = targets if isinstance(targets, str) else sorted(targets)
        made = self.begin(plain.unload())
        with torch.no_grad():
            for name, layer in lora_layers(made):
                p, s, q, scaling = triplets[name]
                rank = len(s)
                layer.lora_B["default"][:, :rank] = p
                layer.lora_A["default"][:rank] = q
                layer.lora_E["default"][:rank, 0] = s * scaling / _scaling(layer)
        return made

    def schedule(self, steps: int) -> None:
        def count(value: float) -> int:
            return int(value) if value >= 1 else round(value * steps)

        tinit, tfinal = count(self.tinit), count(self.tfinal)
        if tinit + tfinal >= steps:
            raise UserError(
                f"The run has {steps} optimizer steps, of which peft.tinit={self.tinit} and peft.tfinal={self.tfinal} "
                f"leave none for AdaLoRA to take ranks away. Train longer, or lower them."
            )
        first, last = self.init_r * self._weights, self.target_r * self._weights
        self.steps = Schedule(first, last, tinit, tfinal, steps, self.every)

    def penalty(self, model: Any) -> Tensor | None:
        """The mean of ‖P·Pᵀ − 1‖ and ‖Q·Qᵀ − 1‖ over all weights, times `orth_reg_weight`.

        The norms are not squared, as in the authors' code (and PEFT's) and unlike equation 4 of the paper.
        """
        if not self.orth_reg_weight:
            return None
        layers = lora_layers(model)
        vectors = [one for _, layer in layers for one in (layer.lora_A["default"], layer.lora_B["default"].T)]
        device = vectors[0].device.type
        # Mixed precision would round what is to be 0 or 1 to three digits.
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            strays = [torch.linalg.norm(v @ v.T - torch.eye(len(v), device=v.device, dtype=v.dtype)) for v in vectors]
        return torch.stack(strays).mean() * self.orth_reg_weight

    def after_step(self, model: Any, step: int) -> None:
        if self.steps is None:
            raise RuntimeError("the run's number of steps is not known yet")
        layers = lora_layers(model)
        budget = self.steps.at(step)
        settled = step > self.steps.settled and sum(self.ranks().values()) == budget
        if step < self.steps.settled or not (settled or self._importance):
            self._look(layers)
        if budget is None:
            return
        if not settled:  # also where a resumed run is shorter than it was to be
            self._kept = keep_most_important(self._triplets(layers), budget)
        if step >= self.steps.settled:
            self._importance, self._uncertainty = {}, {}  # nothing is decided by them any more
        with torch.no_grad():
            for name, layer in layers:
                values = layer.lora_E["default"]
                values.masked_fill_(~self._kept[name].to(values.device)[:, None], 0.0)

    def _look(self, layers: Sequence[tuple[str, Any]]) -> None:
        """Equations 9 and 10: the moving averages of |w·∂L/∂w| and of how far it strays from its average."""
        for name, layer in layers:
            for part in PARTS:
                weight = getattr(layer, part)["default"]
                key = f"{name}.{part}"
                # No gradient: no token came by, as by some of a mixture's experts.
                now = torch.zeros_like(weight) if weight.grad is None else (weight * weight.grad).abs().detach()
                mean = self._importance.get(key, torch.zeros_like(now)).to(now)
                unsure = self._uncertainty.get(key, torch.zeros_like(now)).to(now)
                self._importance[key] = mean = self.beta1 * mean + (1 - self.beta1) * now
                self._uncertainty[key] = self.beta2 * unsure + (1 - self.beta2) * (now - mean).abs()

    def _triplets(self, layers: Sequence[tuple[str, Any]]) -> dict[str, Tensor]:
        """Equation 8: of each singular value, with the mean of each of its vectors."""
        found = {}
        for name, _ in layers:
            a, b, e = (self._importance[f"{name}.{part}"] * self._uncertainty[f"{name}.{part}"] for part in PARTS)
            found[name] = e[:, 0] + a.mean(dim=1) + b.mean(dim=0)
        return found

    def may_be_published(self, step: int) -> bool:
        return self.steps is None or step >= self.steps.settled

    def published(self, model: Any) -> Published:
        factors = {}
        for name, layer in lora_layers(model):
            a, e, b = (getattr(layer, part)["default"].detach().cpu() for part in ("lora_A", "lora_E", "lora_B"))
            kept = self._kept[name].cpu() if self._kept else torch.ones(len(a), dtype=torch.bool)
            factors[name] = adalora_factors(a, e, b, kept, _scaling(layer))
        made = as_plain_lora(model.unload(), factors, default_config(model))
        ranks = [len(a) for a, _ in factors.values()]
        words = f"AdaLoRA with {sum(ranks)} ranks, {min(ranks)} to {max(ranks)} per weight, to LoRA, exactly"
        return Published(made, words)

    def ranks(self) -> dict[str, int]:
        """By module, as they are now."""
        return {name: int(kept.sum()) for name, kept in self._kept.items()}

    def report(self) -> Report | None:
        ranks = self.ranks()
        return Report("ranks", table(ranks), heatmap(ranks, self.init_r), ranks) if ranks else None

    def state_dict(self) -> dict[str, Any]:
        return {"importance": self._importance, "uncertainty": self._uncertainty, "kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._importance, self._uncertainty = dict(state["importance"]), dict(state["uncertainty"])
        self._kept = dict(state["kept"])


def keep_most_important(scores: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Which of each weight's triplets are among the `budget` most important of all; among equals the first ones.

    Args:
        scores: by weight, `(r,)` each.
        budget: how many are kept, exactly.
    """
    flat = torch.cat(list(scores.values()))
    kept = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    kept[torch.argsort(flat, descending=True, stable=True)[:budget]] = True
    return dict(zip(scores, kept.split([len(one) for one in scores.values()]), strict=True))


def _scaling(layer: Any) -> float:
    return float(layer.scaling["default"] / (layer.ranknum["default"] + _EPSILON))


def _grid(ranks: Mapping[str, int]) -> tuple[list[str], list[str], dict[tuple[str, str], int]]:
    """Layers, kinds of weight, and the rank of each: `model.layers.3.mlp.up_proj` is row 3, column `up_proj`.

    Where two weights of a layer end alike (GPT-2's `c_proj`), more of their names stands above the column.
    """
    places = {}
    for name in ranks:
        parts = name.split(".")
        at = next((k for k, part in enumerate(parts) if part.isdigit()), None)
        places[name] = ("-", name) if at is None else (parts[at], ".".join(parts[at + 1 :]))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    ends = [kind.rsplit(".", 1)[-1] for kind in kinds]
    shown = {kind: end if ends.count(end) == 1 else kind for kind, end in zip(kinds, ends, strict=True)}
    cells = {(row, shown[kind]): ranks[name] for name, (row, kind) in places.items()}
    return list(dict.fromkeys(row for row, _ in cells)), [shown[kind] for kind in kinds], cells


def table(ranks: Mapping[str, int]) -> str:
    """Ranks by layer and kind of weight, with sums, as text."""
    rows, columns, cells = _grid(ranks)

    def line(head: str, values: Sequence[Any], last: Any) -> str:
        middle = "  ".join(f"{value:>{max(5, len(name))}}" for value, name in zip(values, columns, strict=True))
        return f"{head:>5}  {middle}  {last:>5}"

    lines = [line("layer", columns, "sum")]
    for row in rows:
        values: list[Any] = [cells.get((row, column), "") for column in columns]
        lines.append(line(row, values, sum(value for value in values if value != "")))
    sums = [sum(cells.get((row, column), 0) for row in rows) for column in columns]
    return "\n".join([*lines, line("sum", sums, sum(sums))])


def heatmap(ranks: Mapping[str, int], most: int) -> str:
    """Ranks by layer (down) and kind of weight (across) as an SVG; darker is more.

    Args:
        most: the rank that each weight had at first.
    """
    rows, columns, cells = _grid(ranks)
    left, top, high = 52, 46, 20
    wide = max(56, *(7 * len(column) + 10 for column in columns))
    title = f"Ranks that AdaLoRA left: {sum(ranks.values())} in all; each weight began with {most}"
    width, height = max(left + wide * len(columns) + 10, 7 * len(title)), top + high * len(rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/><text x="8" y="18">{title}</text>'
        f'<text x="{left - 8}" y="{top - 6}" text-anchor="end">layer</text>'
    ]
    for x, column in enumerate(columns):
        middle = left + wide * x + wide / 2 - 1
        parts.append(f'<text x="{middle}" y="{top - 6}" text-anchor="middle">{html.escape(column)}</text>')
    for y, row in enumerate(rows):
        parts.append(f'<text x="{left - 8}" y="{top + high * y + 13}" text-anchor="end">{html.escape(row)}</text>')
        for x, column in enumerate(columns):
            rank = cells.get((row, column))
            if rank is None:
                continue
            share = rank / most
            ink = "white" if share > 0.55 else "#222"
            parts.append(
                f'<rect x="{left + wide * x}" y="{top + high * y}" width="{wide - 2}" height="{high - 2}" '
                f'fill="#1f4e79" fill-opacity="{0.05 + 0.95 * share:.2f}"/>'
                f'<text x="{left + wide * x + wide / 2 - 1}" y="{top + high * y + 13}" text-anchor="middle" '
                f'fill="{ink}">{rank}</text>'
            )
    return "".join([*parts, "</svg>\n"])
