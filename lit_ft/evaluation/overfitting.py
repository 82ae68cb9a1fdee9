"""Whether the fine-tune knows its training rows better than others: gap, curves, duplicates, memorised answers."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lit_ft.batches import Completion, Example
from lit_ft.errors import UserError
from lit_ft.evaluation.gain import interval_in_words, loss_change
from lit_ft.evaluation.paired import Change, figure, paired_rate, verdict
from lit_ft.evaluation.section import Curve, Figure, Section, Table, Verdict
from lit_ft.evaluation.subject import Subject

T = TypeVar("T")

# Nats per token by which the gap between held-out and training loss may grow.
THRESHOLD = 0.1
# By how much the share of memorised training answers may grow beyond that of held-out ones.
MEMORISED_THRESHOLD = 0.05
# Tokens of an answer that are given, and how many must follow verbatim.
GIVEN, FOLLOWING = 8, 16
# How much of an answer the table of memorised ones shows, in characters.
_SHOWN_OF_ANSWER = 80
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


@dataclass(frozen=True)
class Probe:
    """Which answers base and tuned complete verbatim; all of them `(N,)`, N being how many were probed."""

    places: tuple[int, ...]
    """Where each stands among the rows that it was taken from."""
    stretches: tuple[Example, ...]
    """What was given as the prompt, and what had to follow."""
    before: tuple[bool, ...]
    after: tuple[bool, ...]
    long: int
    """How many of those rows are long enough."""

    @property
    def change(self) -> Change:
        """Of the share that is completed verbatim."""
        return paired_rate(self.before, self.after)

    @property
    def new(self) -> list[int]:
        """Those that the tuned model completes and the base does not."""
        return [k for k, (base, tuned) in enumerate(zip(self.before, self.after, strict=True)) if tuned and not base]


def overfitting(
    base: Subject,
    tuned: Subject,
    train: Sequence[Example],
    held_out: Sequence[Example],
    *,
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    published: float | None = None,
    scored: int = 256,
    probed: int = 300,
    threshold: float = THRESHOLD,
) -> Section:
    """Base and tuned on training rows beside held-out ones.

    The verdict is `worse` if one of these holds:

    - the gap between held-out and training loss grew by more than the threshold, as a whole interval;
    - the published weights' held-out loss lies above that of the best step by more than the threshold;
    - training answers became completed verbatim beyond held-out ones by more than `MEMORISED_THRESHOLD`, as a whole
      interval;
    - a single training answer is known by heart (`by_heart`): no interval of a rate could show one among hundreds, and
      one is enough where it is somebody's address.

    It is `better` if the gap shrank by more than the threshold; else `unchanged`.

    Args:
        base, tuned: the models.
        train, held_out: rows; the first completion of each counts.
        curves: `(step, loss)` by name; of `held-out` the best step is compared with the last.
        published: the step whose weights were published; None where that is unknown: then the last one's count.
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
    notes, warnings, tables = [], [], []
    lines = {name: [p for p in points if math.isfinite(p[1])] for name, points in (curves or {}).items()}
    lines = {name: points for name, points in lines.items() if points}
    if "held-out" in lines:
        steps = _over_best(lines["held-out"], published, threshold)
        figures.extend(steps.figures)
        notes.extend(steps.notes)
        found.append(steps.verdict)
        said.append(steps.said)
    pairs, exact = near_duplicates(*_texts(tuned, seen, unseen)), exact_duplicates(seen, unseen)
    doubles = {pair.held_out for pair in pairs} | exact
    shares = len(doubles) / len(unseen)
    figures.append(
        Figure("duplicates", "held-out rows that are nearly in the training data", "%", None, 100 * shares, *[None] * 3)
    )
    if pairs:
        tables.append(_listed(pairs))
    if shares:
        warnings.append(
            f"{len(doubles)} of {len(unseen)} held-out rows are (nearly) training rows, {len(exact)} of "
            "them exactly: what is held out says too little about new rows. Take them out of one of the two."
        )
    own, others = memorised(base, tuned, seen, probed), memorised(base, tuned, unseen, probed)
    for name, label, one in (("train", "training", own), ("held_out", "held-out", others)):
        if one is not None:
            what = f"{label} answers completed verbatim"
            figures.append(figure(f"memorised_{name}", what, one.change, unit="%", times=100))
            notes.append(_counted(one, label))
    if own is None:
        notes.append(f"No training answer has {GIVEN + FOLLOWING} tokens: memorisation was not probed.")
    else:
        beyond = own.change if others is None else difference(own.change, others.change)
        known = by_heart(base, tuned, own, others, seen, doubles)
        found.append(verdict(beyond, threshold=MEMORISED_THRESHOLD, lower_is_better=True))
        found.append("worse" if known else "unchanged")
        figures.append(
            Figure(
                "by_heart", "training answers known by heart", "", None, len(known), None, None, None, len(own.after)
            )
        )
        said.append(f"{sum(own.after)} of {len(own.after)} training answers completed verbatim, {len(known)} by heart")
        if any(own.after):
            tables.append(_verbatim(tuned, own, known))
    # Fewer memorised answers than before are not in themselves better: only the gap says so.
    final: Verdict = "worse" if "worse" in found else found[0]
    limits = f"thresholds {threshold:g} and {100 * MEMORISED_THRESHOLD:g} points, and one answer known by heart"
    return Section(
        key="overfitting",
        title="Overfitting",
        verdict=final,
        sentence=f"{'; '.join(said).capitalize()} ({limits}).",
        figures=tuple(figures),
        tables=tuple(tables),
        curves=(Curve("Loss while training", "step", "loss, nats per token", lines),) if lines else (),
        notes=tuple(notes),
        warnings=tuple(warnings),
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


@dataclass(frozen=True)
class _Steps:
    """What the held-out curve says of the published weights."""

    figures: list[Figure]
    notes: list[str]
    verdict: Verdict
    said: str


def _over_best(points: Sequence[tuple[float, float]], published: float | None, threshold: float) -> _Steps:
    """Best step beside last, and what is judged: the step whose weights were published.

    That is the best one by what training compared steps with, which need not be the loss.
    """
    best, last = best_and_last(points)
    above = last[1] - best[1]
    label = f"held-out loss at the last step ({last[0]:g}) beside the best ({best[0]:g})"
    figures = [Figure("last_over_best", label, "nats per token", best[1], last[1], above, None, None)]
    said = f"last step {above:+.3f} over the best"
    notes: list[str] = []
    own = next((loss for step, loss in points if step == published), None)
    if published is None or published == last[0]:
        return _Steps(figures, notes, "worse" if above > threshold else "unchanged", said)
    if own is None:
        notes.append(
            f"The weights of step {published:g} were published, of which no held-out loss is known: steps are shown "
            "and not judged."
        )
        return _Steps(figures, notes, "unchanged", said)
    if published == best[0]:
        notes.append(
            f"The weights of the best step ({best[0]:g}) were published, so the last one's loss is shown and not "
            "judged. Where it lies far above, fewer steps would do."
        )
        return _Steps(figures, notes, "unchanged", f"{said}, which was published")
    over = own - best[1]
    label = f"held-out loss at the published step ({published:g}) beside the best ({best[0]:g})"
    figures.append(Figure("published_over_best", label, "nats per token", best[1], own, over, None, None))
    notes.append(f"The weights of step {published:g} were published, so the last one's loss is shown and not judged.")
    return _Steps(
        figures, notes, "worse" if over > threshold else "unchanged", f"published step {over:+.3f} over the best"
    )


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
) -> Probe | None:
    """Which answers base and tuned go on with verbatim when they decode greedily; None if none is long enough.

    After Carlini et al. 2023 (arXiv:2202.07646): an answer counts if the prompt and its first `given` tokens make the
    model say its next `following` tokens. A base that does so shows what is easy to say, and not what was memorised.

    Where there are more than `probed`, rows that the data repeat come first, most often ones before others: they are
    what a model learns by heart (Lee et al. 2022, arXiv:2107.06499). The others are spread over all.
    """
    long = [
        k
        for k, row in enumerate(rows)
        if len(row.completions[0].ids) >= given + following
        and tuned.fits(row.prompt + row.completions[0].ids[:given], following)
    ]
    places = _repeated_first(rows, long, probed)
    if not places:
        return None
    stretches = []
    for k in places:
        ids = rows[k].completions[0].ids
        answer = Completion(ids[given : given + following], (True,) * following)
        stretches.append(Example(rows[k].prompt + ids[:given], (answer,)))
    before, after = base.says(stretches), tuned.says(stretches)
    return Probe(tuple(places), tuple(stretches), tuple(before), tuple(after), len(long))


def by_heart(
    base: Subject,
    tuned: Subject,
    train: Probe,
    held_out: Probe | None,
    rows: Sequence[Example],
    doubles: Collection[int] = (),
) -> list[int]:
    """Which of the probed training answers were learnt as such, and not as a manner of speaking.

    They are completed verbatim by the tuned model alone; no other training answer has the same stretch, which would
    then be a turn of phrase; and their log-probability has grown beyond that of every held-out stretch, which shows
    what the fine-tune does to answers that it did not see (the base is the reference that tells what is easy to say, as
    in the membership inference of Watson et al. 2022, arXiv:2111.08440). Without held-out answers nothing shows that,
    and none is.

    Args:
        base, tuned: the models.
        train, held_out: what was probed.
        rows: the training rows that `train` was taken from.
        doubles: places of held-out rows that are training rows as well, and so show nothing.

    Returns:
        Their numbers within `train`.
    """
    if held_out is None or not train.new:
        return []
    others = [one for k, one in zip(held_out.places, held_out.stretches, strict=True) if k not in doubles]
    answers = {_as_text(row.completions[0].ids) for row in rows}
    alone = [
        k
        for k in train.new
        if sum(_as_text(train.stretches[k].completions[0].ids) in answer for answer in answers) == 1
    ]
    if not others or not alone:
        return []
    asked = [*(train.stretches[k] for k in alone), *others]
    scores = zip(base.token_logprobs(asked), tuned.token_logprobs(asked), strict=True)
    grown = [after[0][0] - before[0][0] for before, after in scores]
    most = max(grown[len(alone) :])
    return [k for k, by in zip(alone, grown, strict=False) if by > most]


def _as_text(ids: Sequence[int]) -> str:
    """Token ids such that a stretch of them is found with `in`."""
    return f" {' '.join(map(str, ids))} "


def _repeated_first(rows: Sequence[Example], places: Sequence[int], most: int) -> list[int]:
    """At most `most` of `places`, in their order."""
    if len(places) <= most:
        return list(places)
    first: dict[tuple[Any, ...], int] = {}
    times: Counter[tuple[Any, ...]] = Counter()
    for k in places:
        content = rows[k].prompt, rows[k].completions[0].ids
        first.setdefault(content, k)
        times[content] += 1
    repeated = [first[content] for content, count in times.most_common() if count > 1][:most]
    once = [first[content] for content, count in times.items() if count == 1]
    return sorted([*repeated, *_evenly(once, most - len(repeated))])


def _with_answer(rows: Sequence[Example], which: str) -> list[Example]:
    found = [replace(row, completions=row.completions[:1]) for row in rows if row.completions]
    if not found:
        raise UserError(
            f"There are no {which} rows with an answer, so overfitting cannot be measured: it is what training rows "
            "show beyond held-out ones. Give both, for instance with data.val_split above 0."
        )
    return found


def _evenly(rows: Sequence[T], most: int) -> list[T]:
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


def _counted(probe: Probe, which: str) -> str:
    """How many there are, in words."""
    every = f" (probed of {probe.long} that are long enough)" if probe.long > len(probe.after) else ""
    return (
        f"{sum(probe.after)} of {len(probe.after)} {which} answers{every} are completed verbatim, {FOLLOWING} tokens "
        f"after the first {GIVEN}; before, {sum(probe.before)}."
    )


def _verbatim(subject: Subject, probe: Probe, known: Sequence[int]) -> Table:
    """Those that the tuned model completes, the worst first, with the words that they begin with; rows from 1 on."""
    order = [*known, *(k for k in probe.new if k not in known)]
    order += [k for k, said in enumerate(probe.after) if said and probe.before[k]]
    rows = []
    for k in order[:_SHOWN]:
        given, following = probe.stretches[k].prompt[-GIVEN:], probe.stretches[k].completions[0].ids
        text = " ".join(subject.decode(given + following).split())
        words = text if len(text) <= _SHOWN_OF_ANSWER else f"{text[: _SHOWN_OF_ANSWER - 1]}…"
        why = "known by heart" if k in known else "the base says it too" if probe.before[k] else "may be usual"
        rows.append((str(probe.places[k] + 1), words, why))
    more = f" ({_SHOWN} of {len(order)})" if len(order) > _SHOWN else ""
    return Table(
        f"Training answers completed verbatim{more}", ("training row", "answer begins", "beside others"), tuple(rows)
    )
