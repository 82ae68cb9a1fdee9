"""Whether the fine-tune knows its training rows better than others: gap, curves, duplicates, memorised answers."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lit_ft.batches import Example
from lit_ft.errors import UserError
from lit_ft.evaluation.gain import interval_in_words, loss_change
from lit_ft.evaluation.paired import Change, figure, paired_rate, verdict
from lit_ft.evaluation.section import Curve, Figure, Section, Table, Verdict
from lit_ft.evaluation.subject import Subject

# Nats per token by which the gap between held-out and training loss may grow.
THRESHOLD = 0.1
# By how much the share of memorised training answers may grow beyond that of held-out ones.
MEMORISED_THRESHOLD = 0.05
# Tokens of an answer that are given, and how many must follow verbatim.
GIVEN, FOLLOWING = 8, 16
# Words in a shingle, and the Jaccard similarity from which on two rows are near-duplicates.
SHINGLE, SIMILAR = 5, 0.8
_SHOWN = 10


@dataclass(frozen=True)
class Duplicate:
    """A held-out row and the training row most like it."""

    held_out: int
    train: int
    similarity: float
    """1 for the same shingles; of exact duplicates the whole text is the same."""


def overfitting(
    base: Subject,
    tuned: Subject,
    train: Sequence[Example],
    held_out: Sequence[Example],
    *,
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    scored: int = 256,
    probed: int = 64,
    threshold: float = THRESHOLD,
) -> Section:
    """Base and tuned on training rows beside held-out ones.

    The verdict is `worse` if the gap between held-out and training loss grew by more than the threshold as a whole
    interval, or the held-out loss at the last step lies above that at the best one by more, or training answers became
    memorised beyond held-out ones by more than `MEMORISED_THRESHOLD` as a whole interval; `better` if the gap shrank by
    more than the threshold; else `unchanged`.

    Args:
        base, tuned: the models.
        train, held_out: rows; the first completion of each counts.
        curves: `(step, loss)` by name; of `held-out` the best step is compared with the last.
        scored: rows of each that are scored, evenly taken from all.
        probed: answers of each that are probed for memorisation.
        threshold: nats per token.

    Raises:
        UserError: no training or no held-out rows with an answer.
    """
    seen, unseen = _with_answer(train, "training"), _with_answer(held_out, "held-out")
    on_train = _losses(base, tuned, _evenly(seen, scored))
    on_held_out = _losses(base, tuned, _evenly(unseen, scored))
    gap = difference(on_held_out, on_train)
    found = [verdict(gap, threshold=threshold, lower_is_better=True)]
    said = [f"gap of held-out over training loss {gap.after:+.3f} nats per token ({interval_in_words(gap)})"]
    figures = [
        figure("train_loss", "loss on training rows", on_train, unit="nats per token"),
        figure("held_out_loss", "loss on held-out rows", on_held_out, unit="nats per token"),
        figure("gap", "held-out less training loss", gap, unit="nats per token"),
    ]
    notes, tables = [], []
    lines = {name: [p for p in points if math.isfinite(p[1])] for name, points in (curves or {}).items()}
    lines = {name: points for name, points in lines.items() if points}
    if "held-out" in lines:
        best, last = best_and_last(lines["held-out"])
        above = last[1] - best[1]
        label = f"held-out loss at the last step ({last[0]:g}) beside the best ({best[0]:g})"
        figures.append(Figure("last_over_best", label, "nats per token", best[1], last[1], above, None, None))
        found.append("worse" if above > threshold else "unchanged")
        said.append(f"last step {above:+.3f} over the best")
    pairs, exact = near_duplicates(*_texts(tuned, seen, unseen)), exact_duplicates(seen, unseen)
    shares = len({pair.held_out for pair in pairs} | exact) / len(unseen)
    figures.append(
        Figure("duplicates", "held-out rows that are nearly in the training data", "%", None, 100 * shares, *[None] * 3)
    )
    if pairs:
        tables.append(_listed(pairs))
    if shares:
        notes.append(
            f"{round(shares * len(unseen))} of {len(unseen)} held-out rows are (nearly) training rows, {len(exact)} of "
            "them exactly: what is held out says too little about new rows. Take them out of one of the two."
        )
    probes = memorised(base, tuned, seen, probed), memorised(base, tuned, unseen, probed)
    for name, label, change in zip(("train", "held_out"), ("training", "held-out"), probes, strict=True):
        if change is not None:
            what = f"{label} answers completed verbatim"
            figures.append(figure(f"memorised_{name}", what, change, unit="%", times=100))
    if probes[0] is None:
        notes.append(f"No training answer has {GIVEN + FOLLOWING} tokens: memorisation was not probed.")
    else:
        beyond = probes[0] if probes[1] is None else difference(probes[0], probes[1])
        found.append(verdict(beyond, threshold=MEMORISED_THRESHOLD, lower_is_better=True))
        said.append(f"{100 * probes[0].after:.0f} % of training answers completed verbatim")
    # Fewer memorised answers than before are not in themselves better: only the gap says so.
    final: Verdict = "worse" if "worse" in found else found[0]
    return Section(
        key="overfitting",
        title="Overfitting",
        verdict=final,
        sentence=f"{'; '.join(said).capitalize()} (thresholds {threshold:g} and {100 * MEMORISED_THRESHOLD:g} points).",
        figures=tuple(figures),
        tables=tuple(tables),
        curves=(Curve("Loss while training", "step", "loss, nats per token", lines),) if lines else (),
        notes=tuple(notes),
    )


def difference(one: Change, other: Change) -> Change:
    """`one` less `other`, of rows that have nothing to do with each other.

    The interval joins both by their distances from the change (MOVER: Zou & Donner 2008, "Construction of confidence
    limits about effect measures"), which needs no symmetry of either.
    """
    change = one.change - other.change
    low = high = None
    if one.low is not None and one.high is not None and other.low is not None and other.high is not None:
        low = change - math.hypot(one.change - one.low, other.high - other.change)
        high = change + math.hypot(one.high - one.change, other.change - other.low)
    before, after = one.before - other.before, one.after - other.after
    return Change(before, after, change, low, high, one.rows + other.rows)


def best_and_last(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The `(step, loss)` with the least loss, the first of equals, and that of the last step."""
    ordered = sorted(points)
    return min(ordered, key=lambda point: point[1]), ordered[-1]


def near_duplicates(
    train: Sequence[str], held_out: Sequence[str], *, size: int = SHINGLE, threshold: float = SIMILAR
) -> list[Duplicate]:
    """For each held-out text the training text most like it, where the two are at least `threshold` alike.

    Likeness is the Jaccard index |A ∩ B| / |A ∪ B| of the sets of `size` consecutive words, exactly and not by hashes;
    words are compared without case and punctuation, and a shorter text is one shingle. Not all pairs are compared: two
    sets that are `threshold` alike share one of the |A| − ⌈t·|A|⌉ + 1 rarest shingles of each (the prefix filter of
    Chaudhuri, Ganti & Kaushik 2006, "A Primitive Operator for Similarity Joins in Data Cleaning").

    Args:
        train, held_out: texts; those without a word are like nothing.
        size: words in a shingle.
        threshold: above 0.

    Returns:
        In the order of the held-out texts.
    """
    known, asked = [_shingles(text, size) for text in train], [_shingles(text, size) for text in held_out]
    common = Counter(shingle for row in (*known, *asked) for shingle in row)

    def rarest(row: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
        most = len(row) - math.ceil(threshold * len(row) - 1e-9) + 1
        return sorted(row, key=lambda shingle: (common[shingle], shingle))[:most] if row else []

    index: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for k, row in enumerate(known):
        for shingle in rarest(row):
            index[shingle].append(k)
    found = []
    for place, row in enumerate(asked):
        candidates = sorted({k for shingle in rarest(row) for k in index.get(shingle, ())})
        alike = [(len(row & known[k]) / len(row | known[k]), -k) for k in candidates]
        if alike and max(alike)[0] >= threshold:
            similarity, k = max(alike)
            found.append(Duplicate(place, -k, similarity))
    return found


def exact_duplicates(train: Sequence[Example], held_out: Sequence[Example]) -> set[int]:
    """Places of the held-out rows whose prompt and first completion are those of a training row."""
    known = {(row.prompt, row.completions[0].ids) for row in train}
    return {k for k, row in enumerate(held_out) if (row.prompt, row.completions[0].ids) in known}


def memorised(
    base: Subject,
    tuned: Subject,
    rows: Sequence[Example],
    probed: int,
    *,
    given: int = GIVEN,
    following: int = FOLLOWING,
) -> Change | None:
    """Share of answers whose greedy completion goes on verbatim, base and tuned; None if none is long enough.

    After Carlini et al. 2023 (arXiv:2202.07646): an answer counts if the prompt and its first `given` tokens make the
    model say its next `following` tokens. A base that does so shows what is easy to say, and not what was memorised.
    """
    long = [
        row
        for row in rows
        if len(row.completions[0].ids) >= given + following
        and tuned.fits(row.prompt + row.completions[0].ids[:given], following)
    ]
    chosen = _evenly(long, probed)
    if not chosen:
        return None
    prompts = [row.prompt + row.completions[0].ids[:given] for row in chosen]
    wanted = [row.completions[0].ids[given : given + following] for row in chosen]

    def said(subject: Subject) -> list[bool]:
        answers = subject.complete(prompts, max_new_tokens=following)
        return [rollouts[0].completion == ids for rollouts, ids in zip(answers, wanted, strict=True)]

    return paired_rate(said(base), said(tuned))


def _with_answer(rows: Sequence[Example], which: str) -> list[Example]:
    found = [replace(row, completions=row.completions[:1]) for row in rows if row.completions]
    if not found:
        raise UserError(
            f"There are no {which} rows with an answer, so overfitting cannot be measured: it is what training rows "
            "show beyond held-out ones. Give both, for instance with data.val_split above 0."
        )
    return found


def _evenly(rows: Sequence[Example], most: int) -> list[Example]:
    """At most `most` rows, spread over all of them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[k * len(rows) // most] for k in range(most)]


def _losses(base: Subject, tuned: Subject, rows: Sequence[Example]) -> Change:
    before, after = base.token_logprobs(rows), tuned.token_logprobs(rows)
    return loss_change([scores[0] for scores in before], [scores[0] for scores in after])


def _texts(subject: Subject, train: Sequence[Example], held_out: Sequence[Example]) -> tuple[list[str], list[str]]:
    """The rows as text, without what all prompts begin with: a long system prompt would make them all alike."""
    prompts = [row.prompt for row in (*train, *held_out)]
    first, last = min(prompts), max(prompts)
    shared = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))

    def texts(rows: Sequence[Example]) -> list[str]:
        return [subject.decode(row.prompt[shared:] + row.completions[0].ids) for row in rows]

    return texts(train), texts(held_out)


def _shingles(text: str, size: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[k : k + size]) for k in range(max(1, len(words) - size + 1))} if words else set()


def _listed(pairs: Sequence[Duplicate]) -> Table:
    """The likest of them, rows counted from 1."""
    likest = sorted(pairs, key=lambda pair: (-pair.similarity, pair.held_out))[:_SHOWN]
    rows = tuple((str(pair.held_out + 1), str(pair.train + 1), f"{pair.similarity:.2f}") for pair in likest)
    return Table("Near-duplicates", ("held-out row", "training row", "similarity"), rows)
