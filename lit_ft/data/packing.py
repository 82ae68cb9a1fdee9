"""Dividing a window of examples into micro-batches within a token budget, and over processes by tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Literal

from lit_ft.batches import Batch, Example, pack, pad

# `apart` packs as `packed` does, but examples share nothing with each other: completions share their prompt only.
Layout = Literal["packed", "apart", "padded"]


def split_by_tokens(examples: Sequence[Example], max_tokens: int, layout: Layout) -> list[list[Example]]:
    """Micro-batches of at most `max_tokens` each; an example above that is a batch of its own.

    Packed: best fit, longest first. Padded: examples of like length together, counting the padding.
    """
    longest_first = sorted(examples, key=lambda e: (-(e.longest if layout == "padded" else e.tokens), e.index))
    if layout == "padded":
        groups: list[list[Example]] = []
        rows = width = 0
        for example in longest_first:
            rows += len(example.completions)
            if not groups or rows * width > max_tokens:
                groups.append([])
                rows, width = len(example.completions), example.longest
            groups[-1].append(example)
        return groups
    groups = []
    rooms: list[tuple[int, int]] = []  # (tokens free, group), sorted: data sets have 10⁵ examples
    for example in longest_first:
        place = bisect_left(rooms, (example.tokens, -1))
        if place < len(rooms):
            free, best = rooms.pop(place)
            groups[best].append(example)
        else:
            free, best = max_tokens, len(groups)
            groups.append([example])
        insort(rooms, (free - example.tokens, best))
    return groups


def share_by_tokens(examples: Sequence[Example], processes: int) -> list[list[Example]]:
    """Every example to exactly one process, the longest first to whichever has the fewest tokens."""
    shares: list[list[Example]] = [[] for _ in range(processes)]
    load = [0] * processes
    for example in sorted(examples, key=lambda e: (-e.tokens, e.index)):
        least = min(range(processes), key=lambda k: (load[k], len(shares[k]), k))
        shares[least].append(example)
        load[least] += example.tokens
    return shares


def lay_out(examples: Sequence[Example], layout: Layout, pad_id: int) -> Batch:
    """One batch of `examples` in the given layout."""
    return pad(examples, pad_id) if layout == "padded" else pack(examples, across=layout == "packed")
