"""What the fine-tune gained on its own task: loss, preferences and answers on rows that it did not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_ft.batches import Example
from lit_ft.errors import UserError
from lit_ft.evaluation.paired import Change, few_rows, figure, paired_change, paired_rate, verdict
from lit_ft.evaluation.section import Figure, Sample, Section
from lit_ft.evaluation.subject import Subject

# Of a prompt, an answer to it and the data's row: how good the answer is.
MetricFunction = Callable[[str, str, Mapping[str, Any]], float]


@dataclass(frozen=True)
class Metric:
    """A score of answers; higher is better.

    Attributes:
        name: for the reader, such as `exact match`.
        function: called with prompt, answer (both without special tokens) and the data's row, to which
            the answer in the data is added as `wanted`; gives a finite number.
        threshold: a change of its mean by this much does not matter.
    """

    name: str
    function: MetricFunction
    threshold: float = 0.0


def exact_match(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
    """1 where the answer is the wanted one (`row["wanted"]`, which `gain` puts there), but for spaces around it."""
    return float(answer.strip() == str(row["wanted"]).strip())


def gain(
    base: Subject,
    tuned: Subject,
    held_out: Sequence[Example],
    *,
    metric: Metric | None = None,
    scored: int | None = None,
    metric_rows: int = 48,
    max_new_tokens: int = 128,
    answered: int = 6,
    threshold: float = 0.0,
) -> Section:
    """Base beside tuned on held-out rows.

    Loss and perplexity are of each row's preferred (or only) completion, over tokens. Of pairs there are also: how
    often each model finds the chosen completion likelier than the rejected one; how often the tuned model has moved
    towards it, which is DPO's accuracy, the margin being log π(chosen)/π_ref(chosen) − log π(rejected)/π_ref(rejected)
    with `base` as the reference (Rafailov et al. 2023, arXiv:2305.18290); and that margin's mean. The base's own
    margins are all 0, so that its accuracy by them is nothing to compare with.

    The verdict is the metric's where one is given, of pairs that of their accuracy, and else that of the loss. Where
    the metric fails there is no verdict: `error` says why, and the section keeps what was measured without it.

    Args:
        base, tuned: the models.
        held_out: with one completion each, or with the preferred one first.
        metric: scores greedy answers to the first `metric_rows` rows that leave room to answer.
        scored: rows of which the loss is taken, from the first on; None: all.
        metric_rows: rows that the metric is taken of, at least 1; where there are fewer, all of them.
        max_new_tokens: of an answer.
        answered: rows whose answers are shown side by side, from the first on; 0: none.
        threshold: nats per token (or share of pairs) that a change must exceed as a whole interval.

    Raises:
        UserError: no rows with a completion.
    """
    there = [example for example in held_out if example.completions]
    rows = there[:scored]
    if not rows:
        raise UserError(
            "There are no held-out rows with an answer, so what was gained cannot be said. Give data.val_path, or "
            "train with data.val_split above 0."
        )
    before, after = base.token_logprobs(rows), tuned.token_logprobs(rows)
    loss = loss_change([scores[0] for scores in before], [scores[0] for scores in after])
    figures = [figure("loss", "loss on held-out rows", loss, unit="nats per token"), perplexity(loss)]
    found, sentence = verdict(loss, threshold=threshold, lower_is_better=True), loss_sentence(loss, threshold)
    notes: list[str | None] = []
    few = few_rows(loss.rows)
    error = None
    pairs = [k for k, example in enumerate(rows) if len(example.completions) > 1]
    if pairs:
        made, likely = _preferences([before[k] for k in pairs], [after[k] for k in pairs])
        figures.extend(made)
        found = verdict(likely, threshold=threshold, lower_is_better=False)
        few = few_rows(likely.rows, "held-out pairs")
        sentence = (
            f"The chosen answer is the likelier one in {_percent(likely.after)} of {likely.rows} held-out pairs, "
            f"before in {_percent(likely.before)} ({interval_in_words(likely, 100, ' points')}; "
            f"threshold {100 * threshold:g})."
        )
        notes.append("Likelihoods are sums over an answer's tokens, which favour the shorter of two answers.")
    preferred = [replace(example, completions=example.completions[:1]) for example in there]
    answers = [example for example in preferred if tuned.fits(example.prompt, max_new_tokens)]
    answers = [example for example in answers if base.fits(example.prompt, max_new_tokens)]
    answers = answers[: answered if metric is None else max(answered, metric_rows)]
    samples = _answers(base, tuned, answers, max_new_tokens)
    if metric is not None and not answers:
        notes.append(f"No prompt leaves room for an answer of {max_new_tokens} tokens: {metric.name} was not measured.")
    elif metric is not None:
        try:
            measured = _measured(metric, samples[:metric_rows], answers[:metric_rows])
        except UserError as failed:
            found, error = "unknown", str(failed)
            sentence = f"{metric.name} could not be measured, so there is no verdict. {sentence}"
        else:
            figures.append(figure("metric", f"{metric.name} of greedy answers", measured))
            found = verdict(measured, threshold=metric.threshold, lower_is_better=False)
            few = few_rows(measured.rows, "answered rows")
            sentence = (
                f"{metric.name} of greedy answers is {measured.after:.3f}, before {measured.before:.3f} "
                f"({interval_in_words(measured)}; threshold {metric.threshold:g}), on {measured.rows} held-out rows; "
                f"loss {loss.after:.3f} nats per token, before {loss.before:.3f} ({interval_in_words(loss)}), does not "
                "count for the verdict."
            )
    return Section(
        key="gain",
        title="Gain",
        verdict=found,
        sentence=sentence,
        figures=tuple(figures),
        samples=tuple(samples[:answered]),
        notes=tuple(filter(None, (few, *notes))),
        error=error,
    )


def loss_change(before: Sequence[tuple[float, int]], after: Sequence[tuple[float, int]]) -> Change:
    """Change of the mean negative log-probability per token, in nats, paired by row.

    Args:
        before, after: of each row the sum of log-probabilities and the number of tokens; the same numbers in both.
            Rows without tokens do not count.
    """
    tokens = [count for _, count in before]
    if tokens != [count for _, count in after]:
        raise ValueError("the two models scored different tokens")
    return paired_change(_losses(before), _losses(after), [float(count) for count in tokens])


def perplexity(loss: Change, name: str = "perplexity", label: str = "perplexity on held-out rows") -> Figure:
    """exp(loss) of both models.

    Its change has no interval of its own: exp(after) − exp(before) is not determined by the interval of the change of
    the loss, and the ratio of the perplexities, which is, would not be in its place here.
    """
    before, after = _exp(loss.before), _exp(loss.after)
    change = None if before is None or after is None else after - before
    return Figure(name, label, "", before, after, change, None, None, loss.rows)


def loss_sentence(loss: Change, threshold: float, what: str = "held-out rows") -> str:
    """A loss in one line, with its interval and the threshold used."""
    return (
        f"Loss on {what} is {loss.after:.3f} nats per token, before {loss.before:.3f} ({interval_in_words(loss)}; "
        f"threshold {threshold:g}), on {loss.rows} rows."
    )


def interval_in_words(change: Change, times: float = 1.0, unit: str = "") -> str:
    """A change with its 95% interval; every value `times` as large, the change followed by `unit`."""
    if change.low is None or change.high is None:
        return f"change {times * change.change:+.3g}{unit}, too few rows for an interval"
    low, high = times * change.low, times * change.high
    return f"change {times * change.change:+.3g}{unit}, 95% interval {low:+.3g} to {high:+.3g}"


def _losses(scores: Sequence[tuple[float, int]]) -> list[float]:
    return [-total / count if count else 0.0 for total, count in scores]


def _exp(value: float) -> float | None:
    """None above what a float, and JSON, can hold."""
    return math.exp(value) if value < 700 else None


def _preferences(
    before: Sequence[Sequence[tuple[float, int]]], after: Sequence[Sequence[tuple[float, int]]]
) -> tuple[list[Figure], Change]:
    """The figures of pairs, and the change of how often the chosen completion is the likelier one."""
    old = [scores[0][0] - scores[1][0] for scores in before]
    new = [scores[0][0] - scores[1][0] for scores in after]
    moved = [b - a for a, b in zip(old, new, strict=True)]
    likely = paired_rate([value > 0 for value in old], [value > 0 for value in new])
    won = 100 * sum(value > 0 for value in moved) / len(moved)
    won_label = "moved towards the chosen answer (margin of log-ratios above 0)"
    margin = paired_change([0.0] * len(moved), moved)
    made = [
        figure("accuracy", "chosen answer likelier than the rejected one", likely, unit="%", times=100),
        figure("margin", "log-probability of chosen less rejected answer", paired_change(old, new), unit="nats"),
        Figure("reward_accuracy", won_label, "%", None, won, None, None, None, len(moved)),
        figure("reward_margin", "margin of log-ratios, chosen less rejected", margin, unit="nats"),
    ]
    return made, likely


def _answers(base: Subject, tuned: Subject, examples: Sequence[Example], max_new_tokens: int) -> list[Sample]:
    """Greedy answers of both models to each prompt, beside the data's."""
    prompts = [example.prompt for example in examples]
    if not prompts:
        return []
    before = base.complete(prompts, max_new_tokens=max_new_tokens)
    after = tuned.complete(prompts, max_new_tokens=max_new_tokens)
    return [
        Sample(
            prompt=tuned.decode(example.prompt),
            before=base.decode(old[0].completion),
            after=tuned.decode(new[0].completion),
            wanted=tuned.decode(example.completions[0].ids),
        )
        for example, old, new in zip(examples, before, after, strict=True)
    ]


def _measured(metric: Metric, samples: Sequence[Sample], examples: Sequence[Example]) -> Change:
    def scores(answers: Sequence[str]) -> list[float]:
        found = []
        for k, (answer, sample, example) in enumerate(zip(answers, samples, examples, strict=True)):
            row = {**(example.row or {}), "wanted": sample.wanted}
            try:
                value = float(metric.function(sample.prompt, answer, row))
            except Exception as error:
                raise UserError(
                    f"The metric {metric.name} raised {type(error).__name__}: {error} for held-out row {k + 1}, answer "
                    f"{answer[:60]!r}. It is called with prompt, answer and row, and is to return a number."
                ) from error
            if not math.isfinite(value):
                raise UserError(
                    f"The metric {metric.name} gives {value} for held-out row {k + 1}, answer {answer[:60]!r}: it is "
                    "to return a finite number."
                )
            found.append(value)
        return found

    before, after = scores([s.before for s in samples]), scores([s.after for s in samples])
    if set(before) | set(after) <= {0.0, 1.0}:
        return paired_rate([value == 1 for value in before], [value == 1 for value in after])
    return paired_change(before, after)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
