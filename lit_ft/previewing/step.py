"""A step of SFT, DPO or a judge: the passes it is split into, and what one of them holds in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lit_ft.batches import Batch, Example
from lit_ft.config import Algorithm, Config
from lit_ft.data.datamodule import Prepared
from lit_ft.data.loader import WindowLoader
from lit_ft.data.packing import Layout, lay_out, share_by_tokens, split_by_tokens
from lit_ft.models.judge import completion_scores, hidden_size, scalar_head
from lit_ft.models.kinds import AdapterKind
from lit_ft.models.kinds.adalora import AdaLora
from lit_ft.models.load import load_config
from lit_ft.models.roles import POLICY
from lit_ft.resources.estimate import Rehearsal, Setting, bytes_of_rows, rehearse
from lit_ft.wiring.checks import SHARDED
from lit_ft.wiring.model import packed_on
from lit_ft.wiring.place import pass_tokens


@dataclass(eq=False)
class Step:
    """An optimizer step of a run whose model has no weights, on this device or on another.

    Attributes:
        cfg: the run's settings.
        kind, model: the kind of its adapter, and its model on the meta device.
        data, val: its training rows, and the held-out ones.
        layout: of rows on the device of the run.
        pad_id: the token that fills padded rows.
        processes: that share the work.
        tokenizer_bytes: of main memory, which the tokenizer takes.
    """

    cfg: Config
    kind: AdapterKind
    model: Any
    data: Prepared
    val: Prepared | None
    layout: Layout
    pad_id: int
    processes: int
    tokenizer_bytes: int = 0

    @property
    def shards(self) -> int:
        """Parts that the strategy cuts the model into."""
        return self.processes if self.cfg.strategy.kind in SHARDED else 1

    def layout_on(self, device: str) -> Layout:
        """How rows are laid out on `cpu` or `cuda`."""
        return "padded" if self.layout == "padded" else packed_on(device)

    def budget(self, device: str) -> int:
        """Tokens of a pass at most."""
        return pass_tokens(self.cfg, torch.device(device))

    def passes(self, device: str, *, later: bool = False) -> tuple[Batch, int, float]:
        """The largest batch that a pass gets on a device, how many passes a step has at most, and on average.

        With `later`, the largest one that is not the first of its step, if steps have more than one.
        """
        data, budget = self.cfg.data, self.budget(device)
        layout = self.layout_on(device)
        replicas = self.processes // self.cfg.strategy.tensor_parallel_size
        loader = WindowLoader(
            self.data.examples, batch_size=data.batch_size, max_tokens=budget, shuffle=data.shuffle, seed=self.cfg.seed
        )
        groups: list[list[Example]] = []
        counts = []
        for window in loader.windows(0):
            shares = share_by_tokens([self.data.examples[k] for k in window], replicas)
            split = [split_by_tokens(share, budget, layout) for share in shares]
            counts.append(max(map(len, split)))
            groups += [group for share in split for group in share[int(later) :]]

        def size(group: list[Example]) -> int:
            if layout != "padded":
                return sum(example.tokens for example in group)
            return sum(len(e.completions) for e in group) * max(e.longest for e in group)

        # What examples share is known only once they are laid out.
        likely = sorted(groups, key=size, reverse=True)[:3]
        batches = [lay_out(group, layout, self.pad_id) for group in likely]
        largest = max(batches, key=lambda batch: batch.input_ids.numel())
        return largest, max(counts), sum(counts) / len(counts)

    def main_memory(self, setting: Setting) -> dict[str, Any]:
        """Bytes beside the model's, as `Rehearsal.estimate` takes them."""
        examples = [example for part in (self.data, self.val) if part for example in part.examples]
        pairs = sum(len(example.completions) for example in examples) if self.cfg.algorithm.kind is Algorithm.dpo else 0
        kept = getattr(load_config(self.cfg.model.id), "dtype", None)
        kept = kept if isinstance(kept, torch.dtype) else torch.float32
        loaded = torch.bfloat16 if setting.mixed and not self.kind.whole_model else torch.float32
        base = [p for p in self.model.parameters() if p.requires_grad == self.kind.whole_model]
        numbers = 0 if self.cfg.model.tiny else sum(p.numel() for p in base)
        return {
            "rows": bytes_of_rows(examples),
            "reference": pairs * (24 + 8 + 56),  # a float of Python's, its place, and a tuple's own
            "tokenizer": self.tokenizer_bytes,
            "stored": numbers * kept.itemsize if kept != loaded or self.kind.quantized else 0,
        }

    def rehearsal(self, setting: Setting) -> Rehearsal:
        """A step of this run on the device and in the precision of `setting`."""
        batch, most, _ = self.passes(setting.device)

        def of(one: Batch, accumulates: bool) -> Rehearsal:
            return self.rehearsed(one, setting, accumulates)

        if most == 1 or not self.kind.whole_model:
            return of(batch, most > 1)
        # Gradients as large as the model are there from the second pass of a step on, and the first is the largest.
        later, _, _ = self.passes(setting.device, later=True)
        return max((of(batch, False), of(later, True)), key=lambda one: one.estimate().sum)

    def rehearsed(self, batch: Batch, setting: Setting, accumulates: bool, **what: Any) -> Rehearsal:
        """A pass over `batch`; `what` it computes, as `rehearse` takes it, if that is not the algorithm's."""
        return rehearse(
            self.model,
            batch,
            setting,
            accumulates=accumulates,
            penalty=self.kind.penalty,
            four_bits=self.kind.quantized,
            allocates_ranks=isinstance(self.kind, AdaLora),
            **(what or self.computed()),
        )

    def computed(self) -> dict[str, Any]:
        """What a pass of this algorithm computes, as arguments of `rehearse`."""
        if self.cfg.algorithm.kind is not Algorithm.reward:
            return {}
        with torch.device("meta"):
            heads = torch.nn.ModuleList([scalar_head(hidden_size(self.model))])
        return {"passes": {POLICY: lambda model, batch: completion_scores(model, heads[0], batch)}, "heads": heads}
