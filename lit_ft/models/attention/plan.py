"""What the pieces of one packed row mean to attention: which queries look at which keys; made once per batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lit_ft.batches import Piece


class VarlenIndex(NamedTuple):
    """Pieces as sequences of a variable-length kernel: each piece's queries, and keys gathered for it.

    Attributes:
        keys: `(K,)` int64: for each piece, everything it goes on from and then itself, as places in the row.
        cu_queries, cu_keys: `(P + 1,)` int32 where the sequences begin among queries and gathered keys.
        max_queries, max_keys: the longest of each.
    """

    keys: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int


class Plan:
    """The pieces of a row, and index tensors for kernels that want them."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        self.pieces = tuple(pieces)
        self.device = device

    @cached_property
    def ancestors(self) -> list[list[tuple[int, int]]]:
        """For each piece the ranges that it goes on from, outermost first; ranges that touch are one."""
        found: list[list[tuple[int, int]]] = []
        open_pieces: list[Piece] = []
        for piece in self.pieces:
            while open_pieces and open_pieces[-1].until <= piece.start:
                open_pieces.pop()
            ranges: list[tuple[int, int]] = []
            for above in open_pieces:
                if ranges and ranges[-1][1] == above.start:
                    ranges[-1] = (ranges[-1][0], above.end)
                else:
                    ranges.append((above.start, above.end))
            found.append(ranges)
            open_pieces.append(piece)
        return found

    @cached_property
    def varlen(self) -> VarlenIndex:
        keys: list[Tensor] = []
        queries, gathered = [0], [0]
        for piece, ranges in zip(self.pieces, self.ancestors, strict=True):
            parts = [torch.arange(*bounds) for bounds in (*ranges, (piece.start, piece.end))]
            keys += parts
            queries.append(piece.end)
            gathered.append(gathered[-1] + sum(len(part) for part in parts))
        return VarlenIndex(
            torch.cat(keys).to(self.device),
            torch.tensor(queries, dtype=torch.int32, device=self.device),
            torch.tensor(gathered, dtype=torch.int32, device=self.device),
            max(b - a for a, b in pairwise(queries)),
            max(b - a for a, b in pairwise(gathered)),
        )
