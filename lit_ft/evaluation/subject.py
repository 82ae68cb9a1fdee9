"""One of the two models that a report compares, in the form in which the sections ask it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lit_ft.batches import Batch, Completion, Example
from lit_ft.data.packing import Layout, lay_out, split_by_tokens
from lit_ft.errors import UserError
from lit_ft.losses.divergence import token_kl
from lit_ft.losses.logprobs import likeliest_tokens, sum_by_completion
from lit_ft.models.adapt import causal_lm, is_adapted
from lit_ft.models.attention import PACKED
from lit_ft.models.load import context_length
from lit_ft.models.roles import using
from lit_ft.models.score import completion_logprobs, predictions, use_packed_attention
from lit_ft.progress import Progress, say
from lit_ft.reference import read_cached, reference_key, write_cached
from lit_ft.rollouts import Rollout, Sampling
from lit_ft.rollouts.base import stop_ids
from lit_ft.rollouts.kept import read_kept, write_kept
from lit_ft.rollouts.transformers import TransformersRollouts

# A sum of log-probabilities in nats, and over how many tokens.
Scored = tuple[float, int]
# Of a model and a batch: a value for each completion, `(C,)`.
_Measure = Callable[[Any, Batch], torch.Tensor]


@dataclass(frozen=True)
class Kept:
    """Where a subject's scores are kept on disk for the next report, and what they depend on.

    Attributes:
        folder: of the cache; made when something is written.
        depends_on: all that makes the model what it is, such as the hash of its files and that of its adapter. What the
            subject knows itself (the rows, its arithmetic, the libraries' versions) it adds.
    """

    folder: Path
    depends_on: Mapping[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model that can be asked for log-probabilities, answers and its distance from another one.

    Base and tuned model are two subjects over one PEFT model: `role=None` switches its adapters off. A fine-tune of all
    weights is a subject over a model of its own. Asking changes nothing: neither which adapter computes afterwards, nor
    what is trained, nor the random state.

    Attributes:
        name: for progress and errors, such as `base`.
        model: a causal language model, with PEFT adapters or without. Its attention is switched to packed if it can be.
        tokenizer: of the model.
        role: the adapter that computes; None: the base alone.
        max_tokens: per forward pass; a longer row is a pass of its own. It changes no score but by rounding.
        layout: `packed`, which becomes `padded` where the model cannot pack, or `padded`.
        autocast: dtype of mixed precision, or None.
        kept: where scores and answers are kept, or None.

    Raises:
        UserError: the base that is asked for is not below the adapter any more, or there is no such adapter.
    """

    name: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    role: str | None = None
    max_tokens: int = 4096
    layout: Layout = "packed"
    autocast: torch.dtype | None = None
    kept: Kept | None = None

    def __post_init__(self) -> None:
        _check_role(self.model, self.role)
        if self.layout != "padded":
            packed = causal_lm(self.model).config._attn_implementation == PACKED
            reason = None if packed else use_packed_attention(self.model)
            object.__setattr__(self, "layout", "packed" if reason is None else "padded")

    def token_logprobs(self, examples: Sequence[Example]) -> list[list[Scored]]:
        """Of each example's completions: the sum of its targets' log-probabilities, and how many they are.

        Raises:
            UserError: an example is longer than the model's context.
        """
        for place, example in enumerate(examples):
            self._check_length(example.longest, f"Row {place + 1} of {len(examples)}")
        counts = [[replace(e, completions=(c,)).targets for c in e.completions] for e in examples]
        sums = self._by_completion(examples, "sums", f"log-probabilities of {self.name}", completion_logprobs)
        return [list(zip(own, many, strict=True)) for own, many in zip(sums, counts, strict=True)]

    def text_logprobs(self, texts: Sequence[str], *, whole: bool = False) -> list[Scored]:
        """Of plain texts, without a chat template: the sum of their tokens' log-probabilities, and how many they are.

        Where the tokenizer begins every text with a token of its own, all tokens after it are counted; else all but the
        first, which nothing precedes. A text longer than the context is scored up to there.

        Args:
            texts: any; one without a token to score gives `(0.0, 0)`.
            whole: count the first token, too: where the tokenizer writes nothing before it, the token that begins
                texts stands there, or else the one that ends them.
        """
        examples = [self._as_example(text, whole) for text in texts]
        asked = [example for example in examples if example.targets]
        found = iter(self.token_logprobs(asked))
        return [next(found)[0] if example.targets else (0.0, 0) for example in examples]

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        n: int = 1,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[Rollout]]:
        """`n` answers to each prompt.

        Args:
            prompts: token ids.
            n: answers to each; all the same at temperature 0.
            max_new_tokens: after so many an answer is cut.
            temperature: 0 for the likeliest token each time; else answers are drawn.
            seed: of the draws.

        Raises:
            UserError: a prompt is empty or leaves no room to answer (see `fits`), or the temperature is below 0.
        """
        greedy = temperature == 0
        stops = stop_ids(causal_lm(self.model), self.tokenizer)
        sampling = Sampling(1.0 if greedy else temperature, max_new_tokens, stops)
        asked = [tuple(prompt) for prompt in prompts]
        key = self.key_of(
            [Example(prompt, ()) for prompt in asked],
            answers={"n": 1 if greedy else n, "temperature": temperature, "seed": None if greedy else seed},
            sampling=[max_new_tokens, *stops],
        )
        found = read_kept(self.kept.folder, key, asked) if self.kept else None
        if found is None:
            engine = _Greedy if greedy else TransformersRollouts
            rollouts = engine(self.model, sampling, self._pad_id, self.max_tokens, autocast=self.autocast)
            progress = Progress(f"answers of {self.name}", len(asked) * (1 if greedy else n))
            with using(self.model, self.role):
                found = rollouts.generate(asked, 1 if greedy else n, seed, progress=progress.show)
            progress.close()
            if self.kept:
                with _optional(self.kept.folder):
                    write_kept(self.kept.folder, key, found)
        return [rows * n for rows in found] if greedy else found

    def says(self, examples: Sequence[Example]) -> list[bool]:
        """Whether each example's first completion is word for word what `complete` says to its prompt at temperature 0.

        Nothing is generated. Greedy decoding adds the likeliest token each time, so it says a completion exactly if
        each of its tokens is the likeliest after the prompt and the tokens before it, and none but the last ends an
        answer: one forward pass tells, of as many examples as fit into it. Logits that are apart by no more than
        rounding may fall out one way here and the other there.

        Args:
            examples: with a prompt; every token of the completion counts, also one that is not trained on.

        Raises:
            UserError: an example is longer than the model's context.
        """
        asked = []
        for place, example in enumerate(examples):
            self._check_length(example.longest, f"Row {place + 1} of {len(examples)}")
            ids = example.completions[0].ids
            asked.append(Example(example.prompt, (Completion(ids, (True,) * len(ids)),)))
        misses = self._by_completion(asked, "misses", f"words of {self.name}", _misses)
        stops = set(stop_ids(causal_lm(self.model), self.tokenizer))
        found = []
        for example, (missed,) in zip(asked, misses, strict=True):
            ids = example.completions[0].ids
            found.append(bool(example.prompt and ids) and not missed and stops.isdisjoint(ids[:-1]))
        return found

    @torch.no_grad()
    def kl_from(self, other: Subject, examples: Sequence[Example]) -> list[Scored]:
        """How far this model is from `other` on each example: Σ_t KL(other ‖ self) over its targets, and how many.

        Exact over the vocabulary (`lit_ft.losses.divergence`).

        Args:
            other: a model with the same vocabulary, such as the base that wrote the completions.
            examples: prompts with completions.

        Raises:
            UserError: the vocabularies differ, or an example is longer than a model's context.
        """
        sizes = [len(causal_lm(subject.model).get_output_embeddings().weight) for subject in (other, self)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{other.name} knows {sizes[0]} tokens and {self.name} {sizes[1]}: their distributions cannot be "
                "compared. Compare an adapter with the base that it was made for."
            )
        for place, example in enumerate(examples):
            for subject in (other, self):
                subject._check_length(example.longest, f"Row {place + 1} of {len(examples)}")
        # One layout that both understand, so that both see the same batches.
        layout: Layout = "packed" if self.layout == other.layout == "packed" else "padded"
        found: dict[int, Scored] = dict.fromkeys(range(len(examples)), (0.0, 0))
        progress = Progress(f"distance of {self.name} from {other.name}", len(examples))
        for group in self._groups(examples, layout):
            with other.computing():
                before = predictions(other.model, batch := other._batch(group, layout))
            with self.computing():
                after = predictions(self.model, self._batch(group, layout))
            apart = token_kl(before, after)
            targets = batch.target_completion.to(apart.device)
            sums = iter(sum_by_completion(apart, targets, batch.num_completions).tolist())
            for example in group:
                found[example.index] = sum(next(sums) for _ in example.completions) + 0.0, example.targets
            progress.advance(len(group))
        progress.close()
        return [found[k] for k in range(len(examples))]

    def fits(self, prompt: Sequence[int], max_new_tokens: int) -> bool:
        """Whether an answer of `max_new_tokens` to `prompt` fits into the context."""
        context = context_length(causal_lm(self.model))
        return bool(prompt) and (context is None or len(prompt) + max_new_tokens <= context)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def _by_completion(
        self, examples: Sequence[Example], what: str, label: str, measure: _Measure
    ) -> list[tuple[float, ...]]:
        """A value for each completion, from the cache where it has them under `what`."""
        key = self.key_of(examples, scores=what)
        known = read_cached(self.kept.folder, key) if self.kept else None
        if known is not None and [len(values) for values in known] == [len(e.completions) for e in examples]:
            return known
        found: dict[int, tuple[float, ...]] = dict.fromkeys(range(len(examples)), ())
        progress = Progress(label, len(examples))
        with torch.no_grad(), self.computing():
            for group in self._groups(examples, self.layout):
                measured = iter(measure(self.model, self._batch(group, self.layout)).tolist())
                for example in group:
                    found[example.index] = tuple(next(measured) for _ in example.completions)
                progress.advance(len(group))
        progress.close()
        made = [found[k] for k in range(len(examples))]
        if self.kept:
            with _optional(self.kept.folder):
                write_cached(self.kept.folder, key, made)
        return made

    def _groups(self, examples: Sequence[Example], layout: Layout) -> list[list[Example]]:
        """The examples that have completions, numbered by their places and put together as they are to be scored."""
        numbered = [replace(e, index=k, reference=None, margin=None) for k, e in enumerate(examples)]
        return split_by_tokens([e for e in numbered if e.completions], self.max_tokens, layout)

    def _batch(self, group: Sequence[Example], layout: Layout) -> Batch:
        return lay_out(group, layout, self._pad_id).to(next(self.model.parameters()).device)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """The model in eval mode with this subject's adapter, in its arithmetic; all put back at the end."""
        device = next(self.model.parameters()).device
        mixed = torch.autocast(device.type, self.autocast) if self.autocast is not None else contextlib.nullcontext()
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            with using(self.model, self.role), mixed:
                yield
        finally:
            for module, training in modes:  # one by one: a part may be in eval mode for good
                module.training = training

    def _as_example(self, text: str, whole: bool) -> Example:
        """A text as the completion of nothing, or of the tokens that the tokenizer begins every text with."""
        plain = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        first = self.tokenizer.bos_token_id
        start: tuple[int, ...] = tuple(self.tokenizer(text)["input_ids"][:1])
        if first is None or start != (first,) or plain[:1] == start:  # not the tokenizer's, but the text's
            start = ((self.tokenizer.eos_token_id if first is None else first),) if whole else ()
        if (context := context_length(causal_lm(self.model))) is not None:
            plain = plain[: context - len(start)]
        return Example(start if plain else (), (Completion(plain, (True,) * len(plain)),))

    def _check_length(self, tokens: int, what: str) -> None:
        context = context_length(causal_lm(self.model))
        if context is not None and tokens > context:
            raise UserError(
                f"{what} has {tokens} tokens, and the context of {self.name} holds {context}. Shorten it, or lower "
                "data.max_length so that longer rows are left out."
            )

    def key_of(self, examples: Sequence[Example], **what: Any) -> str:
        """Of all that a score or an answer of this subject depends on."""
        parameter = next(self.model.parameters())
        arithmetic = [self.max_tokens, self.layout, str(self.autocast), str(parameter.dtype), parameter.device.type]
        return reference_key(
            examples,
            subject=None if self.kept is None else dict(self.kept.depends_on),
            arithmetic=arithmetic,
            versions=_versions(),
            what=what,
        )


class _Greedy(TransformersRollouts):
    """The likeliest token each time: `Sampling` has no temperature 0, since nothing can be drawn at it."""

    def _processors(self, seeds: list[int], device: torch.device) -> list[Any]:
        return []


def _misses(model: Any, batch: Batch) -> torch.Tensor:
    """`(C,)` how many targets of each completion are not the likeliest token in their place."""
    missed = likeliest_tokens(*predictions(model, batch)) != batch.target_ids
    return sum_by_completion(missed.float(), batch.target_completion, batch.num_completions)


def _check_role(model: Any, role: str | None) -> None:
    if not is_adapted(model):
        if role is not None:
            raise UserError(f"There is no adapter called {role} on this model: it has none.")
        return
    if role is not None and role not in model.peft_config:
        raise UserError(f"There is no adapter called {role} on this model: it has {', '.join(model.peft_config)}.")
    for config in model.peft_config.values():
        # Whole modules and biases stay when the layers of an adapter are switched.
        if getattr(config, "modules_to_save", None) or getattr(config, "bias", "none") != "none":
            raise UserError(
                "This adapter holds whole modules or biases of the base (modules_to_save, bias), so its base is not "
                "below it any more: merge it (python -m lit_ft.export to=merged) and compare the two models."
            )


def _versions() -> dict[str, str]:
    """Of what computes the scores."""
    found = {}
    for name in ("lit_ft", "torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source"
    return found


@contextlib.contextmanager
def _optional(folder: Path) -> Iterator[None]:
    """A cache saves time; without it the report goes on."""
    try:
        yield
    except OSError as error:
        say(f"report     scores could not be kept in {folder}: {error.strerror or error}")
