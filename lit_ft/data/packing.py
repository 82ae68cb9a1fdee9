"""Dividing a window of examples into micro-batches within a token budget, and over processes by tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from lit_ft.batches import Batch, Completion, Example, pack, pad

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


def divided(examples: Sequence[Example], max_tokens: int, layout: Layout) -> tuple[list[Example], list[list[int]]]:
    """The examples, those with more completions than fit into `max_tokens` in several parts, each with the prompt.

    A completion that is too long with its prompt is a part of its own.

    Returns:
        The parts, whose `index` is their place here; and for each the numbers of its completions, counted over all
        examples in their order.
    """
    parts: list[Example] = []
    members: list[list[int]] = []
    number = 0
    for example in examples:
        taken: list[Completion] = []
        for completion in example.completions:
            wider = replace(example, completions=(*taken, completion))
            needs = wider.longest * len(wider.completions) if layout == "padded" else wider.tokens
            if not taken or needs > max_tokens:
                members.append([])
                parts.append(example)
                taken = []
            taken.append(completion)
            members[-1].append(number)
            parts[-1] = replace(example, completions=tuple(taken), index=len(parts) - 1)
            number += 1
    return parts, members


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
