"""What a subject answers, against torch's own over whole logits; and the same from the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ft.batches import Completion, Example
from lit_ft.errors import UserError
from lit_ft.evaluation import subject as module
from lit_ft.evaluation.subject import Kept, Subject
from lit_ft.models.kinds.lora import apply_lora
from tests import tiny

TOKENIZER = tiny.tokenizer()


def example(k: int, completions: int = 1) -> Example:
    generator = torch.Generator().manual_seed(k)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 260, (count,), generator=generator).tolist())

    answers = [ids(2 + (k + n) % 5) for n in range(completions)]
    # The first token of every second answer is not trained on.
    return Example(ids(1 + k % 6), tuple(Completion(a, (k % 2 == 0,) + (True,) * (len(a) - 1)) for a in answers))


EXAMPLES = [example(k, 1 + k % 3) for k in range(7)]


def adapted(seed: int = 1, std: float = 0.1) -> Any:
    """A tiny Llama whose adapter changes its output; with dropout, which must not reach a score."""
    model = apply_lora(tiny.model(), r=4, alpha=8, dropout=0.5)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model.train()


@pytest.fixture(scope="module")
def model() -> Any:
    return adapted()


@pytest.fixture(scope="module")
def base(model: Any) -> Subject:
    return Subject("base", model, TOKENIZER, max_tokens=60)


@pytest.fixture(scope="module")
def tuned(model: Any) -> Subject:
    return Subject("tuned", model, TOKENIZER, role="default", max_tokens=60)


def plainly(role: str | None, ids: tuple[int, ...]) -> torch.Tensor:
    """`(T, V)` log-probabilities after each token, by an ordinary forward pass of a model of its own."""
    lm = adapted().eval() if role else tiny.model().eval()
    with torch.no_grad():
        logprobs: torch.Tensor = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return logprobs


def sums_by_hand(role: str | None, example: Example) -> list[tuple[float, int]]:
    found = []
    for completion in example.completions:
        ids = example.prompt + completion.ids
        logprobs = plainly(role, ids)
        places = [len(example.prompt) + k for k, trained in enumerate(completion.mask) if trained]
        chosen = [float(logprobs[place - 1, ids[place]]) for place in places if place]
        found.append((sum(chosen), len(chosen)))
    return found


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_sums_are_those_of_a_plain_forward_pass(model: Any, layout: Any) -> None:
    for role in (None, "default"):
        subject = Subject("one", model, TOKENIZER, role=role, max_tokens=60, layout=layout)
        for found, one in zip(subject.token_logprobs(EXAMPLES), EXAMPLES, strict=True):
            by_hand = sums_by_hand(role, one)
            assert [count for _, count in found] == [count for _, count in by_hand]
            assert [value for value, _ in found] == pytest.approx([value for value, _ in by_hand], rel=1e-5)


def test_it_packs_where_the_model_can(base: Subject) -> None:
    assert base.layout == "packed"


def test_asking_changes_nothing(model: Any, base: Subject, tuned: Subject) -> None:
    """Modes, trained parameters, the computing adapter and the random state are as before."""
    trained = [p.requires_grad for p in model.parameters()]
    before = torch.get_rng_state()
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    tuned.kl_from(base, EXAMPLES)
    base.text_logprobs(["Rain."])
    for temperature in (0.0, 1.0):
        base.complete([(5, 6)], 1, max_new_tokens=2, temperature=temperature)
    assert [p.requires_grad for p in model.parameters()] == trained and any(trained)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    model.eval()
    with torch.no_grad():  # the adapter computes again
        ids = (*EXAMPLES[0].prompt, 7)
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    torch.testing.assert_close(logits, plainly("default", ids), rtol=1e-4, atol=1e-4)
    model.train()


def test_text_counts_all_tokens_but_the_first(base: Subject) -> None:
    """The tiny tokenizer is one token a byte and begins texts with nothing."""
    text = "Rain fell."
    ids = tuple(TOKENIZER(text)["input_ids"])
    logprobs = plainly(None, ids)
    by_hand = sum(float(logprobs[k - 1, ids[k]]) for k in range(1, len(ids)))
    assert base.text_logprobs([text, "", "a"])[1:] == [(0.0, 0), (0.0, 0)]
    [(found, count)] = base.text_logprobs([text])
    assert (found, count) == (pytest.approx(by_hand, rel=1e-5), len(text) - 1)


def test_whole_text_begins_after_a_token_that_begins_texts(base: Subject) -> None:
    text = "Rain fell."
    ids = (TOKENIZER.eos_token_id, *TOKENIZER(text)["input_ids"])
    logprobs = plainly(None, ids)
    by_hand = sum(float(logprobs[k - 1, ids[k]]) for k in range(1, len(ids)))
    assert base.text_logprobs([text], whole=True) == [(pytest.approx(by_hand, rel=1e-5), len(text))]


def test_text_after_the_tokenizers_own_beginning(model: Any) -> None:
    """A tokenizer that begins every text with a token: it is not scored, and the first of the text is."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    start = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    ids = tuple(tokenizer("Rain")["input_ids"])
    assert ids[0] == start and len(ids) == 5
    logprobs = plainly(None, ids)
    by_hand = sum(float(logprobs[k - 1, ids[k]]) for k in range(1, 5))
    subject = Subject("base", model, tokenizer)
    assert subject.text_logprobs(["Rain"]) == [(pytest.approx(by_hand, rel=1e-5), 4)]
    assert subject.text_logprobs(["Rain"], whole=True) == subject.text_logprobs(["Rain"])


def test_kl_is_torchs_own_over_the_whole_vocabulary(base: Subject, tuned: Subject) -> None:
    found = tuned.kl_from(base, EXAMPLES)
    for (value, count), one in zip(found, EXAMPLES, strict=True):
        by_hand, tokens = 0.0, 0
        for completion in one.completions:
            ids = one.prompt + completion.ids
            before, after = plainly(None, ids), plainly("default", ids)
            places = [len(one.prompt) + k - 1 for k, trained in enumerate(completion.mask) if trained]
            by_hand += float(
                torch.nn.functional.kl_div(after[places], before[places], reduction="sum", log_target=True)
            )
            tokens += len(places)
        assert value == pytest.approx(by_hand, rel=1e-4) and value > 0.01
        assert count == tokens
    # It is not symmetric: the direction matters.
    assert base.kl_from(tuned, EXAMPLES)[0][0] != pytest.approx(found[0][0], rel=1e-3)


@pytest.mark.parametrize("role", [None, "default"])
def test_kl_from_itself_is_exactly_zero(base: Subject, role: str | None) -> None:
    one = replace(base, role=role)
    assert [value for value, _ in one.kl_from(one, EXAMPLES)] == [0.0] * len(EXAMPLES)


def test_kl_of_a_model_of_its_own(base: Subject) -> None:
    """A full fine-tune is another model; the same weights are at distance 0."""
    same = Subject("full", tiny.model(), TOKENIZER, max_tokens=60)
    assert [value for value, _ in same.kl_from(base, EXAMPLES)] == pytest.approx([0.0] * len(EXAMPLES), abs=1e-6)
    other = Subject("full", tiny.model(seed=1), TOKENIZER)
    assert min(value for value, _ in other.kl_from(base, EXAMPLES)) > 0.1


def test_vocabularies_must_agree(base: Subject) -> None:
    wide = Subject("wide", tiny.model(vocab_size=300), TOKENIZER)
    with pytest.raises(UserError, match="base knows 260 tokens and wide 300"):
        wide.kl_from(base, EXAMPLES)


def test_greedy_takes_the_likeliest_token(base: Subject, tuned: Subject) -> None:
    """Step by step with plain forward passes, for prompts of several lengths at once, n times the same."""
    prompts = [(5, 6, 7), (9,), (40, 41, 42, 43, 44)]
    for subject, role in ((base, None), (tuned, "default")):
        for prompt, rollouts in zip(prompts, subject.complete(prompts, 2, max_new_tokens=5), strict=True):
            ids = prompt
            while len(ids) < len(prompt) + 5 and ids[-1] != TOKENIZER.eos_token_id:
                ids = (*ids, int(plainly(role, ids)[-1].argmax()))
            assert [r.completion for r in rollouts] == [ids[len(prompt) :]] * 2
    assert base.complete(prompts, max_new_tokens=5) != tuned.complete(prompts, max_new_tokens=5)


def test_drawn_answers_follow_the_seed(base: Subject) -> None:
    def drawn(seed: int) -> Any:
        return base.complete([(5, 6, 7)], 3, max_new_tokens=6, temperature=1.0, seed=seed)

    assert drawn(0) == drawn(0) != drawn(1)
    assert len({rollout.completion for rollout in drawn(0)[0]}) == 3


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what really computes, as it does."""
    asked: list[str] = []
    logprobs, misses, generate = module.completion_logprobs, module._misses, module.TransformersRollouts.generate

    def score(*args: Any) -> Any:
        asked.append("score")
        return logprobs(*args)

    def miss(*args: Any) -> Any:
        asked.append("miss")
        return misses(*args)

    def answer(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append("answer")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(module, "completion_logprobs", score)
    monkeypatch.setattr(module, "_misses", miss)
    monkeypatch.setattr(module.TransformersRollouts, "generate", answer)
    return asked


def test_from_the_cache_to_the_bit(base: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counting(monkeypatch)
    kept = replace(base, kept=Kept(tmp_path / "new", {"base": "sha256:a"}))

    def ask(subject: Subject, **drawn: Any) -> Any:
        answers = [subject.complete([(5, 6)], 2, max_new_tokens=4, temperature=t, **drawn) for t in (0.0, 1.0)]
        said = [Example((5, 6), (Completion(answers[0][0][0].completion, (True,) * 4),)), EXAMPLES[0]]
        return subject.token_logprobs(EXAMPLES), subject.text_logprobs(["Rain."]), answers, subject.says(said)

    plain = ask(base)
    assert plain[-1] == [True, False]
    first = ask(kept)
    made = len(asked)
    assert first == plain
    assert ask(kept) == first and len(asked) == made
    # Another base, another seed, other rows: all asked anew.
    ask(replace(base, kept=Kept(tmp_path / "new", {"base": "sha256:b"})))
    assert len(asked) == made + made // 2
    kept.complete([(5, 6)], 2, max_new_tokens=4, temperature=1.0, seed=9)
    kept.token_logprobs(EXAMPLES[1:])
    assert len(asked) > made + made // 2 + 1
    for path in (tmp_path / "new").iterdir():  # rubbish is made anew
        path.write_bytes(b"\x10\x00")
    assert ask(kept) == first


def test_a_cache_that_cannot_be_written_is_said(
    base: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    kept = replace(base, kept=Kept(tmp_path / "file" / "cache", {}))
    assert kept.token_logprobs(EXAMPLES) == base.token_logprobs(EXAMPLES)
    kept.complete([(5, 6)], max_new_tokens=2)
    assert capsys.readouterr().err.count("could not be kept") == 2


def test_nothing_to_score(base: Subject) -> None:
    assert base.token_logprobs([]) == [] == base.text_logprobs([]) == base.says([])
    assert base.says([Example((5,), (Completion((), ()),))]) == [False], "an answer has a token"
    assert base.token_logprobs([Example((5,), ())]) == [[]]
    assert base.kl_from(base, [Example((5,), ())]) == [(0.0, 0)]


def test_what_does_not_fit(base: Subject) -> None:
    long = Example((5,) * 2000, (Completion((6,) * 49, (True,) * 49),))
    with pytest.raises(UserError, match="Row 2 of 2 has 2049 tokens, and the context of base holds 2048"):
        base.token_logprobs([EXAMPLES[0], long])
    with pytest.raises(UserError, match="Row 1 of 1 has 2049 tokens"):
        base.says([long])
    assert base.fits((5,) * 2000, 48) and not base.fits((5,) * 2000, 49) and not base.fits((), 1)
    [(_, count)] = base.text_logprobs(["a" * 3000])
    assert count == 2047


def test_an_adapter_that_is_not_there(model: Any) -> None:
    with pytest.raises(UserError, match="no adapter called other on this model: it has default"):
        Subject("x", model, TOKENIZER, role="other")
    with pytest.raises(UserError, match="it has none"):
        Subject("x", tiny.model(), TOKENIZER, role="default")


def test_a_base_that_is_not_below_its_adapter() -> None:
    made = adapted()
    made.peft_config["default"].modules_to_save = ["lm_head"]
    with pytest.raises(UserError, match="merge it"):
        Subject("base", made, TOKENIZER)
