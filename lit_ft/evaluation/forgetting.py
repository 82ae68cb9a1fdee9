"""What the fine-tune forgot: loss on general texts and instructions, and its distance from the base's own answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lit_ft.batches import Completion, Example
from lit_ft.errors import UserError
from lit_ft.evaluation.gain import interval_in_words, loss_change
from lit_ft.evaluation.paired import Change, few_rows, figure, paired_change, verdict
from lit_ft.evaluation.section import Figure, Section, Table, Verdict
from lit_ft.evaluation.subject import Scored, Subject

# Nats per token by which a loss may change.
THRESHOLD = 0.02
# Nats per token of KL from which on a model counts as far from its base. A loss can stay, a distance cannot: whatever
# is trained moves it from 0. On the bundled model useful adapters lie at 0.16 to 0.57, full fine-tuning at 0.24, those
# held back by a remedy at 0.09 to 0.27 (the README's table); above 0.5 are those that forgot most by the losses, too.
KL_THRESHOLD = 0.5


def forgetting(
    base: Subject,
    tuned: Subject,
    *,
    texts: Mapping[str, Sequence[str]] | None = None,
    instructions: Mapping[str, Sequence[Example]] | None = None,
    prompts: Sequence[Sequence[int]] = (),
    categories: Sequence[str] = (),
    answers: int = 1,
    max_new_tokens: int = 64,
    seed: int = 0,
    threshold: float = THRESHOLD,
    kl_threshold: float | None = KL_THRESHOLD,
) -> Section:
    """Base beside tuned on what the fine-tune was not about.

    The distance needs no data but prompts: the base answers them, drawn at temperature 1, and KL(base ‖ tuned) over the
    vocabulary is averaged over the tokens of its answers. It is 0 only if the tuned model would still say the same, and
    it grows where a loss on given texts may not, so it can call forgetting what is but another style. Therefore it has
    a threshold of its own, far above that of the losses.

    The verdict is `worse` if a loss or the distance has its whole interval above its threshold, else `better` if a loss
    fell by more than its threshold as a whole interval, else `unchanged`; with the distance alone, and no threshold for
    it, `unjudged`. A category that is worse by itself does not decide, and is named where the mean over all is not.

    Args:
        base, tuned: the models.
        texts: plain texts, by category.
        instructions: prompts with an answer each (the first completion counts), by category.
        prompts: token ids of general prompts, which the base answers.
        categories: of the prompts, one each; without them the distance is given for all prompts together only.
        answers: drawn for each prompt; a prompt is one row, however many.
        max_new_tokens: of an answer.
        seed: of the draws.
        threshold: nats per token, for both losses.
        kl_threshold: nats per token, for the distance; None: it is shown and not judged.

    Raises:
        UserError: there is nothing to measure it on.
    """
    figures: list[Figure] = []
    found: list[Verdict] = []
    notes: list[str | None] = []
    said, rows, hidden = [], [], []
    for name, label, scores in (
        ("text_loss", "loss on general texts", _texts(base, tuned, texts or {})),
        ("instruction_loss", "loss on general instructions", _instructions(base, tuned, instructions or {})),
    ):
        if not scores:
            continue
        overall = loss_change(*_joined(scores.values()))
        by_category = {key: loss_change(*pair) for key, pair in sorted(scores.items())}
        figures.append(figure(name, label, overall, unit="nats per token"))
        found.append(verdict(overall, threshold=threshold, lower_is_better=True))
        said.append(f"{label} {interval_in_words(overall)}")
        what = label.rpartition(" ")[2]
        rows += [_row(what, key, change) for key, change in by_category.items()]
        hidden += _hidden(what, overall, by_category, threshold)
        notes.append(few_rows(overall.rows, f"general {what}"))
    if said:
        said[-1] += f" (threshold {threshold:g})"
    room = [k for k, p in enumerate(prompts) if base.fits(p, max_new_tokens) and tuned.fits(p, max_new_tokens)]
    fitting = [tuple(prompts[k]) for k in room]
    if len(fitting) < len(prompts):
        notes.append(f"{len(prompts) - len(fitting)} prompts leave no room for an answer and were left out.")
    if fitting:
        apart = tuned.kl_from(base, own_answers(base, fitting, answers, max_new_tokens, seed))
        distance = kl_change(apart)
        label = "KL(base ‖ tuned) on the base's own answers"
        if categories:
            own = [categories[k] for k in room]
            by_category = {
                key: kl_change([a for a, one in zip(apart, own, strict=True) if one == key]) for key in sorted(set(own))
            }
            rows += [_row("own answers, KL", key, change) for key, change in by_category.items()]
            if kl_threshold is not None:
                hidden += _hidden("the base's own answers", distance, by_category, kl_threshold)
        figures.append(figure("kl", label, distance, unit="nats per token"))
        notes.append(few_rows(distance.rows, "prompts that the base answered itself"))
        if kl_threshold is None:
            found.append("unjudged")
            how = "shown and not judged"
        else:
            found.append(verdict(distance, threshold=kl_threshold, lower_is_better=True))
            how = f"far from the base above {kl_threshold:g}"
        said.append(f"{label} {interval_in_words(distance)} ({how})")
        notes.append(
            "KL is a distance: all training moves a model away from its base, also where no loss on general texts or "
            "instructions grew. Less is nearer to the base; more is not by itself forgetting."
        )
    if not figures:
        raise UserError(
            "There are no general texts, instructions or prompts to measure forgetting on. Leave evaluate's sources at "
            "their defaults, or give sources that have rows."
        )
    header = ("set", "category", "rows", "before", "after", "change", "95% interval")
    return Section(
        key="forgetting",
        title="Forgetting",
        verdict=_worst(found),
        sentence=" ".join((f"In nats per token: {'; '.join(said)}.", *hidden)),
        figures=tuple(figures),
        tables=(Table("Loss and KL by category, nats per token", header, tuple(rows)),) if rows else (),
        notes=(
            *filter(None, notes),
            "Small sets of general texts show large losses of ability, not the loss of single facts.",
        ),
    )


def own_answers(
    base: Subject, prompts: Sequence[tuple[int, ...]], answers: int, max_new_tokens: int, seed: int
) -> list[Example]:
    """The base's answers to each prompt, drawn at temperature 1, with the token that ended them: all are targets."""
    drawn = base.complete(prompts, answers, max_new_tokens=max_new_tokens, temperature=1.0, seed=seed)
    return [
        Example(prompt, tuple(Completion(r.completion, (True,) * len(r.completion)) for r in rollouts))
        for prompt, rollouts in zip(prompts, drawn, strict=True)
    ]


def kl_change(found: Sequence[Scored]) -> Change:
    """Mean KL per token as a change from 0, which a model is from itself."""
    per_token = [total / count if count else 0.0 for total, count in found]
    return paired_change([0.0] * len(found), per_token, [float(count) for _, count in found])


# By category: per row, what both models give it.
_Scores = dict[str, tuple[list[Scored], list[Scored]]]


def _texts(base: Subject, tuned: Subject, texts: Mapping[str, Sequence[str]]) -> _Scores:
    flat = [text for group in texts.values() for text in group]
    return _divided(texts, base.text_logprobs(flat), tuned.text_logprobs(flat)) if flat else {}


def _instructions(base: Subject, tuned: Subject, instructions: Mapping[str, Sequence[Example]]) -> _Scores:
    flat = [replace(e, completions=e.completions[:1]) for group in instructions.values() for e in group]
    if not flat:
        return {}
    if without := sum(not example.targets for example in flat):
        raise UserError(
            f"{without} of {len(flat)} general instructions have no answer to score: give rows with answers."
        )
    before, after = base.token_logprobs(flat), tuned.token_logprobs(flat)
    return _divided(instructions, [scores[0] for scores in before], [scores[0] for scores in after])


def _divided(groups: Mapping[str, Sequence[object]], before: Sequence[Scored], after: Sequence[Scored]) -> _Scores:
    """The scores of all rows by category again; without categories in which nothing was scored."""
    found: _Scores = {}
    start = 0
    for key, group in groups.items():
        own = slice(start, start := start + len(group))
        if any(count for _, count in before[own]):
            found[key] = list(before[own]), list(after[own])
    return found


def _joined(pairs: Iterable[tuple[list[Scored], list[Scored]]]) -> tuple[list[Scored], list[Scored]]:
    listed = list(pairs)
    return [s for before, _ in listed for s in before], [s for _, after in listed for s in after]


def _row(which: str, category: str, change: Change) -> tuple[str, ...]:
    interval = "too few rows" if change.low is None else f"{change.low:+.3f} to {change.high:+.3f}"
    return (
        which,
        category,
        str(change.rows),
        f"{change.before:.3f}",
        f"{change.after:.3f}",
        f"{change.change:+.3f}",
        interval,
    )


def _hidden(what: str, overall: Change, by_category: Mapping[str, Change], threshold: float) -> list[str]:
    """The category that is worst, in words, if it is worse by itself and the mean over all categories is not."""

    def worse(change: Change) -> bool:
        return verdict(change, threshold=threshold, lower_is_better=True) == "worse"

    found = [(key, change) for key, change in by_category.items() if worse(change)]
    if worse(overall) or not found:
        return []
    key, change = max(found, key=lambda one: one[1].change)
    return [
        f"Worse by itself, of {len(by_category)} categories of {what}: {key} ({interval_in_words(change)}; threshold "
        f"{threshold:g})."
    ]


def _worst(found: Sequence[Verdict]) -> Verdict:
    order: tuple[Verdict, ...] = ("worse", "better", "unchanged", "unjudged", "unknown")
    return next(verdict for verdict in order if verdict in found)
