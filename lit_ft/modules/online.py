"""What PPO and GRPO share: an iteration of completions, scores and updates as one training step."""

from __future__ import annotations

import contextlib
import random
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_ft.batches import Batch, Completion, Example, Prompts
from lit_ft.data.packing import Layout, divided, lay_out, share_by_tokens, split_by_tokens
from lit_ft.distributed.processes import gathered, size, together
from lit_ft.errors import UserError
from lit_ft.losses.logprobs import rows_by_completion
from lit_ft.losses.ppo import KLKind, kl_estimate, missing_end_penalty
from lit_ft.losses.sft import sft_loss
from lit_ft.models.adapt import without_dropout
from lit_ft.models.judge import head_values
from lit_ft.models.roles import using
from lit_ft.models.score import score_gathered, score_with_entropy
from lit_ft.modules.base import FineTuneModule, Step
from lit_ft.modules.experience import Experience, Rows, dealt, rows_of
from lit_ft.progress import Progress, say
from lit_ft.rewards.base import Reward, Sample
from lit_ft.rollouts.base import Rollout, RolloutEngine

Sums = dict[str, Tensor]

# Nats per token between the engine's log-probabilities and the trainer's that no rounding explains: bf16 beside float32
# is 0.01 to 0.05 away.
OTHER_POLICY = 0.2


class OnlineModule(FineTuneModule):
    """One training step is an iteration: completions are made, scored, and trained on `num_epochs` times.

    All details after Huang et al. 2024 ("The N+ implementation details", arXiv:2403.17031): dropout is off;
    completions end at, and include, their end of text, wherever padding has the same id; log-probabilities are taken
    at the temperature of sampling and by the trainer, never from the engine that sampled; examples are shuffled anew
    in each epoch; the first minibatch of an iteration must find a ratio of 1, or the run stops.

    An iteration counts as one step for Lightning, so that `max_steps`, checkpoints and schedules speak of iterations.
    A checkpoint lies between iterations, and a resumed run makes the same completions.

    Args:
        model: with the policy as PEFT's adapter `default`, beside it whichever other roles there are.
        engine: makes completions with the policy as it is now.
        reward: scores them.
        judge: scores held-out ones only, or None.
        decode: a completion's ids as text; and `ask`, a prompt as in the data, for rewards.
        reference: the adapter that KL is measured to; None for the base.
        num_generations: completions per prompt.
        num_epochs, num_mini_batches: how often an iteration's completions are trained on, in how many steps each time.
        temperature: of sampling.
        missing_eos_penalty: taken from the score of a completion without an end, or None.
        ptx: rows whose loss is added in every optimizer step, `ptx_batch_size` at a time, times `ptx_coef`
            (InstructGPT's eq. 2).
        max_tokens, layout, pad_id: how batches are made.
        seed: of sampling and shuffling.
        show: is given the held-out samples of every validation, and the step.
        optimizer: arguments of `FineTuneModule`.
    """

    monitor = "eval/objective/rlhf_reward"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"
    normalised_by: ClassVar[Literal["targets", "examples"]] = "examples"
    headline = ("objective/scores", "objective/kl", "judge/scores", "completions/mean_length")
    trains_values: ClassVar[bool] = False
    kl_estimator: KLKind = "k1"

    def __init__(
        self,
        model: nn.Module,
        *,
        engine: RolloutEngine,
        reward: Reward,
        judge: Reward | None = None,
        decode: Callable[[Sequence[int]], str],
        ask: Callable[[Example], Any],
        reference: str | None = None,
        num_generations: int = 1,
        num_epochs: int = 4,
        num_mini_batches: int = 1,
        temperature: float = 1.0,
        missing_eos_penalty: float | None = None,
        ptx: Sequence[Example] = (),
        ptx_coef: float = 0.0,
        ptx_batch_size: int = 4,
        max_tokens: int = 1024,
        layout: Layout = "packed",
        pad_id: int = 0,
        seed: int = 0,
        show: Callable[[Sequence[tuple[str, str, float, bool]], int], None] = lambda samples, step: None,
        **optimizer: Any,
    ) -> None:
        super().__init__(model, **optimizer)
        for key, value in (
            ("num_generations", num_generations),
            ("num_epochs", num_epochs),
            ("num_mini_batches", num_mini_batches),
        ):
            if value < 1:
                raise UserError(f"algorithm.{key}={value} must be at least 1.")
        if not temperature > 0:
            raise UserError(f"algorithm.temperature={temperature} must be above 0: completions have to differ.")
        if ptx_batch_size < 1:
            raise UserError(f"algorithm.ptx_batch_size={ptx_batch_size} must be at least 1; ptx_coef=0 leaves ptx out.")
        if missing_eos_penalty is not None and not missing_eos_penalty >= 0:
            raise UserError(
                f"algorithm.missing_eos_penalty={missing_eos_penalty} is taken from a score, so it must be at least 0."
            )
        if not ptx_coef >= 0 or (ptx_coef > 0 and not ptx):
            raise UserError(f"algorithm.ptx_coef={ptx_coef} needs rows in algorithm.ptx_path, and is not negative.")
        self.engine, self.reward, self.judge = engine, reward, judge
        self.decode, self.ask, self.show = decode, ask, show
        self.reference_role = reference
        self.num_generations, self.num_epochs, self.num_mini_batches = num_generations, num_epochs, num_mini_batches
        self.temperature, self.missing_eos_penalty = temperature, missing_eos_penalty
        self.ptx, self.ptx_coef, self.ptx_batch_size = list(ptx), ptx_coef, ptx_batch_size
        self.max_tokens, self.pad_id, self.seed = max_tokens, pad_id, seed
        self.layout: Layout = layout
        self.value_head: nn.Linear | None = None
        self._engine_has_policy = False
        self._held_out: list[Experience] = []
        self._judged: list[float] = []
        self._shown: list[tuple[str, str, float, bool]] = []
        # Of an iteration's tokens: how far the engine's log-probabilities are from the trainer's, in nats.
        self._from_engine: list[Tensor] = []
        # Seconds of the last iteration, by what they were spent on.
        self.seconds: dict[str, float] = {}

    # What differs between the algorithms.

    @abstractmethod
    def targets(self, rows: Rows) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What the loss needs of every completion, each `(C, …)`, and metrics of the iteration.

        A `mask` `(C, T)` among them says which tokens count; without one all do.
        """

    @abstractmethod
    def loss(
        self, logps: Tensor, values: Tensor | None, old: Mapping[str, Tensor], totals: Mapping[str, int]
    ) -> tuple[Tensor, Sums]:
        """The minibatch's share of the loss, and sums of metrics.

        Args:
            logps: `(C, T)` of a batch's completions under the policy, with gradient.
            values: `(C, T + 1)` with gradient, or None.
            old: of the same completions, what `targets` gave, and `mask` and `logps`.
            totals: `completions`, `tokens` of the whole minibatch over all processes.
        """

    def after_iteration(self, rows: Rows) -> None:
        """Adapt what depends on how the iteration went."""

    def step(self, batch: Batch, total: int) -> Step:
        """The loss on rows with answers (`ptx`)."""
        return Step(sft_loss(score_gathered(self.model, batch).logprobs, total), {})

    def configure_model(self) -> None:
        super().configure_model()
        without_dropout(self.model)

    # An iteration.

    def training_step(self, prompts: Prompts, _: int) -> None:  # type: ignore[override]
        """One iteration."""
        self.seconds, self._from_engine = {}, []
        mine = together(partial(self._collect, prompts, ("train", self.global_step), self.num_generations))
        experience = dealt(gathered(mine))
        rows = rows_of(experience)
        targets, metrics = self.targets(rows)
        targets = {"mask": rows.mask, "logps": rows.logps, **targets}
        with self._timed("updates"):
            metrics |= self._update(experience, rows, targets)
        self._engine_has_policy = False
        self.after_iteration(rows)
        metrics |= self._engine_metrics()
        metrics |= {**self.described(rows, experience, self.kl_weight), "num_tokens": float(self.num_tokens)}
        metrics |= {f"seconds/{key}": value for key, value in self.seconds.items()}
        self.log_dict({f"train/{key}": float(value) for key, value in metrics.items()})

    def _collect(self, prompts: Prompts, draw: tuple[Any, ...], n: int, judge: bool = False) -> list[Experience]:
        """Completions of this process's prompts, with all that is to be known of them."""
        engine, examples = self.engine, prompts.examples
        with self._timed("generation"):
            if not self._engine_has_policy:
                engine.update()
                self._engine_has_policy = True
            progress = Progress("completions", len(examples) * n)
            seed = random.Random(repr((self.seed, *draw))).getrandbits(48)
            places = range(self._rank(), self._rank() + len(examples) * size(), size())
            rollouts = engine.generate([e.prompt for e in examples], n, seed, progress.show, places)
            progress.close()
        flat = [(e, rollout) for e, several in zip(examples, rollouts, strict=True) for rollout in several]
        samples = [self._sample(example, rollout) for example, rollout in flat]
        with self._timed("rewards"):
            parts = self.reward.parts(samples)
            scores = self.reward(samples) if not parts else [sum(v) for v in zip(*parts.values(), strict=True)]
            if judge and self.judge is not None:
                self._judged.extend(self.judge(samples))
        if judge:
            texts = [(s.prompt_text, s.completion_text) for s in samples]
            self._shown.extend(
                (_as_text(prompt), text, score, rollout.ended)
                for (prompt, text), score, (_, rollout) in zip(texts, scores, flat, strict=True)
            )
        made = [
            Example(
                e.prompt,
                tuple(Completion(r.completion, (True,) * len(r.completion)) for r in several),
                index=k,
            )
            for k, (e, several) in enumerate(zip(examples, rollouts, strict=True))
        ]
        with self._timed("scoring"):
            known = self._score(made)
        for (_, rollout), (logps, *_) in zip(flat, known, strict=True):
            if rollout.logps is not None:
                self._from_engine.append((torch.tensor(rollout.logps) - logps).abs())
        found, at = [], 0
        for example in made:
            here = slice(at, at + len(example.completions))
            logps, reference, entropies, values = zip(*known[here], strict=True)
            found.append(
                Experience(
                    example,
                    tuple(scores[here]),
                    {name: tuple(given[here]) for name, given in parts.items()},
                    tuple(rollout.ended for _, rollout in flat[here]),
                    logps,
                    reference,
                    entropies,
                    values if self.trains_values else None,
                )
            )
            at = here.stop
        return found

    def _sample(self, example: Example, rollout: Rollout) -> Sample:
        return Sample(
            rollout.prompt,
            rollout.completion,
            rollout.ended,
            self.ask(example),
            self.decode(rollout.completion),
            example.row,
        )

    @torch.no_grad()
    def _score(self, examples: Sequence[Example]) -> list[tuple[Any, ...]]:
        """Per completion: log-probabilities, the reference's, entropies, and values or None."""
        was_training = self.model.training
        self.model.eval()
        parts, rows = divided(examples, self.max_tokens, self.layout)
        found: list[tuple[Any, ...]] = [()] * sum(map(len, rows))
        progress = Progress("scoring", len(parts))
        for group in split_by_tokens(parts, self.max_tokens, self.layout):
            batch = lay_out(group, self.layout, self.pad_id).to(self.device)
            self._note(batch)
            lengths = batch.completion_lengths.tolist()
            logps, entropies = score_with_entropy(self.model, batch, self.temperature)
            with using(self.model, self.reference_role):
                reference = score_gathered(self.model, batch, self.temperature).logprobs
            flat = [tensor.cpu().split(lengths) for tensor in (logps, reference, entropies)]
            values = self._values(batch)
            for k, row in enumerate(row for part in group for row in rows[part.index]):
                value = None if values is None else values[k, : lengths[k] + 1].cpu()
                found[row] = (*(several[k] for several in flat), value)
            progress.advance(len(group))
        progress.close()
        self.model.train(was_training)
        return found

    def _values(self, batch: Batch) -> Tensor | None:
        """`(C, T + 1)` the value of the state before each token and after the last; None without a value model."""
        if not self.trains_values:
            return None
        assert self.value_head is not None
        places = torch.cat([batch.target_sources, batch.completion_ends])
        with using(self.model, "value"):
            found = head_values(self.model, self.value_head, batch, places)
        before, after = found.split([len(batch.target_sources), batch.num_completions])
        rows = rows_by_completion(before, batch.target_completion, batch.completion_lengths)
        rows = torch.cat([rows, rows.new_zeros(len(rows), 1)], dim=1)
        return rows.scatter(1, batch.completion_lengths[:, None], after[:, None])

    def _update(self, experience: Sequence[Experience], rows: Rows, targets: dict[str, Tensor]) -> dict[str, float]:
        """All optimizer steps of the iteration; returns means of their metrics."""
        optimizer: Any = self.optimizers()
        rate = optimizer.param_groups[0]["lr"]
        wanted = min(self.num_mini_batches, len(experience))
        progress = Progress("updates", self.num_epochs * wanted)
        collected: dict[str, list[float]] = {}
        for epoch in range(self.num_epochs):
            order = list(range(len(experience)))
            random.Random(repr((self.seed, "order", self.global_step, epoch))).shuffle(order)
            for number in range(wanted):
                chosen = order[number::wanted]
                last = (epoch, number) == (self.num_epochs - 1, wanted - 1)
                found = self._minibatch(experience, chosen, rows, targets, optimizer, (epoch, number), last=last)
                for key, value in found.items():
                    collected.setdefault(key, []).append(value)
                progress.advance()
        progress.close()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        return {**{key: sum(v) / len(v) for key, v in collected.items()}, "learning_rate": rate}

    def _minibatch(
        self,
        experience: Sequence[Experience],
        chosen: Sequence[int],
        rows: Rows,
        targets: dict[str, Tensor],
        optimizer: Any,
        number: tuple[int, int],
        *,
        last: bool,
    ) -> dict[str, float]:
        """One optimizer step on the completions of the prompts `chosen`; `number` is (epoch, minibatch)."""
        optimizer.zero_grad()
        examples = [experience[k].example for k in chosen]
        every = [row for k in chosen for row in range(rows.first[k], rows.first[k] + len(experience[k].scores))]
        # Divided by, even if no token of any process counts.
        totals = {"completions": len(every), "tokens": max(1, int(targets["mask"][every].sum()))}
        parts, members = divided(examples, self.max_tokens, self.layout)
        mine = share_by_tokens(parts, self._replicas())[self._replica()]
        sums: dict[str, Tensor] = {}
        apart: list[Tensor] = []
        tokens = 0
        for group in split_by_tokens(mine, self.max_tokens, self.layout) if mine else []:
            batch = lay_out(group, self.layout, self.pad_id).to(self.device)
            self._note(batch)
            which = torch.tensor([every[member] for part in group for member in members[part.index]])
            width = int(batch.completion_lengths.max())
            beyond = width - rows.mask.shape[1]
            old = {key: _cut(value[which], beyond).to(self.device) for key, value in targets.items()}
            with self._alone():
                flat = score_gathered(self.model, batch, self.temperature).logprobs
                logps = rows_by_completion(flat, batch.target_completion, batch.completion_lengths)
                if number == (0, 0):
                    apart.append((logps.detach() - old["logps"]).abs()[old["mask"]].cpu())
                found = self._backward(batch, logps, old, totals)
            tokens += batch.tokens
            for key, value in found.items():
                sums[key] = sums.get(key, torch.zeros((), device=self.device)) + value.detach()
        if number == (0, 0):
            # Before anything has changed. In all processes at once: the others would wait for one that stops.
            together(lambda: self._must_be_on_policy(torch.cat(apart) if apart else torch.zeros(1)))
        if self.ptx_coef:
            sums["loss/ptx"] = self._ptx(number)
        self._exchange()
        norm = self._clip()
        if last:
            optimizer.step()  # Lightning counts this one as the iteration's
        else:
            optimizer.optimizer.step()
        self.num_tokens += sum(gathered(tokens))
        means = {key: float(value) for key, value in self._summed(sums).items()}
        return {**means, "grad_norm": float(norm)}

    def _backward(self, batch: Batch, logps: Tensor, old: Mapping[str, Tensor], totals: Mapping[str, int]) -> Sums:
        """Backpropagate a batch's share of the loss; returns its sums of metrics.

        Policy and value apart, each while its own adapter computes: with gradient checkpointing a backward pass runs
        the layers again, and those of the value model would run with the policy's adapter.
        """
        values = self._values(batch)
        loose = logps.detach().requires_grad_()
        loose_values = None if values is None else values.detach().requires_grad_()
        loss, found = self.loss(loose, loose_values, old, totals)
        loss.backward()
        self.manual_backward(logps, gradient=loose.grad)
        if values is not None and loose_values is not None:
            with using(self.model, "value"):
                self.manual_backward(values, gradient=loose_values.grad)
        return found

    def _ptx(self, number: tuple[int, int]) -> Tensor:
        """Backpropagate the loss of a few rows with answers, others in each optimizer step; returns it."""
        draw = random.Random(repr((self.seed, "ptx", self.global_step, number)))
        chosen = draw.sample(self.ptx, min(self.ptx_batch_size, len(self.ptx)))
        total = sum(example.targets for example in chosen)
        numbered = [replace(example, index=k) for k, example in enumerate(chosen)]
        mine = share_by_tokens(numbered, self._replicas())[self._replica()]
        loss = torch.zeros((), device=self.device)
        for group in split_by_tokens(mine, self.max_tokens, self.layout) if mine else []:
            batch = lay_out(group, self.layout, self.pad_id).to(self.device)
            self._note(batch)
            with self._alone():
                one = self.step(batch, total).loss
                self.manual_backward(self.ptx_coef * one)
            loss = loss + one.detach()
        return loss

    def _must_be_on_policy(self, apart: Tensor) -> None:
        """Raise UserError unless the policy still gives the log-probabilities that were taken when it sampled.

        `apart` `(N,)`: by how many nats each token's differs.
        """
        mixed = torch.is_autocast_enabled(self.device.type)
        # Rounding depends on how rows were grouped; bf16 keeps 8 bits of every hidden state. Of a trained policy rows
        # that had changed their batch were seen 0.05 away on average, single tokens 0.24.
        if not bool((apart <= (2.0 if mixed else 0.02)).all()) or float(apart.mean()) > (0.1 if mixed else 0.002):
            raise UserError(
                f"Before the first update of iteration {self.global_step + 1} the policy is not the one that its "
                f"log-probabilities were taken from: they differ by up to {float(apart.max()):.3g}, so the ratio is "
                "not 1. Something between the two passes is random or changes the weights: dropout, a layer that "
                "behaves differently in training, or a fault of lit_ft. data.packing=off is worth a try."
            )

    # Metrics.

    def _engine_metrics(self) -> dict[str, float]:
        """TRL's `sampling/sampling_logp_difference`, if the engine says what it drew with; a warning if it is large."""
        apart = torch.cat(self._from_engine) if self._from_engine else torch.zeros(0)
        parts = gathered((float(apart.sum()), len(apart), float(apart.max()) if len(apart) else 0.0))
        total, count, greatest = sum(p[0] for p in parts), sum(p[1] for p in parts), max(p[2] for p in parts)
        if not count:
            return {}
        mean = total / count
        if mean > OTHER_POLICY and self._rank() == 0:
            say(
                f"Iteration {self.global_step + 1}: completions were drawn from something {mean:.2f} nats a token away "
                "from the policy. Either the engine computes in a coarser precision, or it has not got the policy as "
                "it is now. rollout=transformers shows which."
            )
        return {"sampling/sampling_logp_difference/mean": mean, "sampling/sampling_logp_difference/max": greatest}

    def described(self, rows: Rows, experience: Sequence[Experience], beta: float) -> dict[str, float]:
        """Metrics of an iteration, or of held-out prompts, under TRL's names; `beta` is what a nat of KL costs."""
        lengths = rows.lengths.float()
        per_token = kl_estimate(rows.logps, rows.reference)
        kl = (per_token * rows.mask).sum(1)
        scores = missing_end_penalty(rows.scores, rows.ended, self.missing_eos_penalty)
        entropies = torch.cat([tensor for one in experience for tensor in one.entropies])
        found = {
            "objective/kl": kl.mean(),
            "objective/entropy": -(rows.logps * rows.mask).sum(1).mean(),
            "objective/scores": scores.mean(),
            "objective/scores_std": scores.std(correction=0),
            "policy/entropy": entropies.mean(),
            "completions/mean_length": lengths.mean(),
            "completions/ended": rows.ended.float().mean(),
        }
        names = list(experience[0].parts)
        if len(names) > 1:
            for name in names:
                given = [value for one in experience for value in one.parts[name]]
                found[f"rewards/{name}"] = torch.tensor(given).mean()
        estimate = kl_estimate(rows.logps, rows.reference, self.kl_estimator)
        penalty = beta * (estimate * rows.mask).sum(1).mean()
        found["objective/non_score_reward"] = -penalty
        found["objective/rlhf_reward"] = scores.mean() - penalty
        return {key: float(value) for key, value in found.items()}

    @property
    @abstractmethod
    def kl_weight(self) -> float:
        """β, as it is now: what a nat of a completion's KL takes from its score."""

    @property
    def first_kl_weight(self) -> float:
        """β, as it was set."""
        return self.kl_weight

    # Held-out prompts: always the same draws, so that validations differ by the policy alone.

    def on_validation_epoch_start(self) -> None:
        self._held_out, self._judged, self._shown = [], [], []

    def validation_step(self, prompts: Prompts, number: int) -> None:  # type: ignore[override]
        """Complete each held-out prompt once and score it."""
        # Without any prompts, too: the engine may be one for all processes.
        self._held_out.extend(together(partial(self._collect, prompts, ("eval", number), 1, judge=True)))

    def on_validation_epoch_end(self) -> None:
        """Log `eval/NAME`, and show samples."""
        experience = dealt(gathered(self._held_out))
        judged = [value for part in gathered(self._judged) for value in part]
        # With the β that the run began with: checkpoints are compared by this, and an adapted one would move meanwhile.
        found = self.described(rows_of(experience), experience, self.first_kl_weight)
        if judged:
            values = torch.tensor(judged)
            found["judge/scores"] = float(values.mean())
            found["judge/scores_sem"] = float(values.std() / len(judged) ** 0.5) if len(judged) > 1 else 0.0
        found["loss"] = -found["objective/rlhf_reward"]
        self.log_dict({f"eval/{key}": value for key, value in found.items()})
        self.show(self._shown, self.global_step)
        self._held_out, self._judged, self._shown = [], [], []
        self.validated_at = self.global_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._engine_has_policy = False

    # Several processes: gradients of the whole minibatch are added by hand, so that backward passes need no partner.

    def _rank(self) -> int:
        return int(self.trainer.global_rank)

    def _alone(self) -> Any:
        wrapped = self.trainer.strategy.model
        return (
            wrapped.no_sync() if isinstance(wrapped, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()
        )

    def _exchange(self) -> None:
        """Add up the gradients of all processes; each has divided by the totals of all."""
        if size() == 1:
            return
        import torch.distributed as dist

        trained = [p for p in self.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
        dist.all_reduce(flat)
        at = 0
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad.copy_(flat[at : at + parameter.numel()].view_as(parameter))
            at += parameter.numel()

    def _summed(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        if size() == 1:
            return sums
        parts = gathered({key: float(value) for key, value in sums.items()})
        return {key: torch.tensor(sum(part.get(key, 0.0) for part in parts)) for part in parts for key in part}

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - begun

    # The engine may be a process of its own.

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self.close()

    def close(self) -> None:
        """End what makes completions; it starts again if it is asked for more."""
        self.engine.close()
        self._engine_has_policy = False


def _cut(values: Tensor, beyond: int) -> Tensor:
    """Rows `(C, …)` without their last `-beyond` places, which no completion of the batch reaches; `(C,)` as it is."""
    return values[:, : values.shape[1] + beyond] if values.ndim > 1 else values


def _as_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
