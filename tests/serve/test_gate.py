"""The gate: what publishing calls servable, a real vLLM answers as it was trained; what it does not, vLLM refuses.

Nothing is trained here: the weights that would be are moved by a fixed noise, as far as some training moves them.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lit_ft.adapter import Adapter, Base, Draft, publish
from lit_ft.errors import UserError
from lit_ft.models import adapt
from lit_ft.models.kinds import KINDS, AdapterKind
from serve import canary as canary_module
from serve import registry
from serve.client import ChatError, EngineClient
from serve.engine import RANKS, Engine
from tests import tiny
from tests.serve.test_engine import (
    ENGINE,
    FLOAT32,
    PROMPTS,
    TOKENS,
    Served,
    greedy_of_engine,
    loaded,
    said,
    with_client,
)

# PiSSA of the default rank, 16, is published with twice that.
SERVER_RANK = 32
ASKED = 4
"""How many of PROMPTS are asked: writing an answer with transformers takes more than a second on a slow core."""

FOUR_BITS = importlib.util.find_spec("bitsandbytes") is not None
"""Where it is missing QLoRA begins on the base itself: what is published, served and compared is of the same form."""

Begun = tuple[AdapterKind, Any]
"""A kind, and a model that it made trainable, its trained weights moved."""


def base(quantized: bool = False) -> Any:
    import torch

    from lit_ft.models.load import load_model

    return load_model("bundled", dtype=torch.float32, four_bits=quantized)


def move(model: Any, std: float) -> Any:
    """Add noise to what is trained: so much that it says other things than the base, and not only gibberish."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return model


def begun(name: str, std: float, **settings: Any) -> Begun:
    import torch

    torch.manual_seed(0)
    kind = KINDS[name](**settings)
    return kind, move(kind.begin(base(kind.quantized and FOUR_BITS)), std)


def adalora() -> Begun:
    """After its schedule took ranks: most weights have another number of them, and one has none."""
    import torch

    from lit_ft.models.kinds.adalora import AdaLora

    kind, model = begun("adalora", 0.1, init_r=6, target_r=3, tinit=0, tfinal=1)
    assert isinstance(kind, AdaLora)
    kind.schedule(2)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if weight.requires_grad:  # as if nothing hung on the last layer's queries
            weight.grad = torch.randn(weight.shape, generator=generator) * (".29.self_attn.q_proj." not in name)
    kind.after_step(model, 1)
    ranks = kind.ranks().values()
    assert min(ranks) == 0 and max(ranks) > 3 and sum(ranks) == 3 * len(ranks)
    return kind, model


def by_hand(model: Any = None, std: float = 0.03, **settings: Any) -> Begun:
    """A LoRA with what no kind's settings give, but an adapter may have that training goes on from."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = LoraConfig(**{**plain, **settings})
    return KINDS["lora"](), move(get_peft_model(base() if model is None else model, config), std)


ONE = r"model\.layers\.0\.self_attn\.q_proj"
"""A single weight, for ranks that would be large on all of them."""

PASSED: dict[str, Callable[[], Begun]] = {
    "lora": lambda: begun("lora", 0.02),
    "rslora": lambda: begun("rslora", 0.01, use_rslora=True),
    "lora_plus": lambda: begun("lora_plus", 0.02),
    "pissa": lambda: begun("pissa", 0.005),
    "adalora": adalora,
    "qlora": lambda: begun("qlora", 0.02),
    "patterns": lambda: by_hand(rank_pattern={"q_proj": 4, "down_proj": 32}, alpha_pattern={"v_proj": 32}),
    "embeddings": lambda: begun("lora", 0.004, target_modules=["q_proj", "v_proj", "embed_tokens"]),
}
"""What the gate passes: by kind, and what else an adapter that training goes on from may be."""


@dataclass(frozen=True)
class Refusal:
    """What the gate says, and what vLLM 0.32 says: regular expressions."""

    make: Callable[[], Begun]
    gate: str
    vllm: str


def held_by_hand(gate: str, vllm: str, **settings: Any) -> Refusal:
    return Refusal(lambda: by_hand(**settings), gate, vllm)


BY_HAND: dict[str, tuple[dict[str, Any], str, str]] = {
    "bias": ({"bias": "lora_only"}, r"trained biases: merge it, .* to=merged$", "Adapter bias"),
    "modules_to_save": ({"modules_to_save": ["norm"]}, r"whole modules .* to=merged$", r"modules_to_save: \['norm'\]"),
    "lora_bias": ({"lora_bias": True}, r"biases of its own \(lora_bias\)", "lora_bias"),
    "olora": ({"init_lora_weights": "olora"}, r"=olora\): .* to=lora$", "'olora'"),
    "pissa by chance": ({"init_lora_weights": "pissa_niter_4"}, r"=pissa_niter_4\): train without$", "'pissa_niter_4'"),
    "single tokens": (
        {"trainable_token_indices": {"embed_tokens": [5, 6]}},
        r"single tokens \(trainable_token_indices\)",
        "token_adapter",
    ),
    "activated": ({"alora_invocation_tokens": [5]}, r"alone it acts \(alora_invocation_tokens\)", "Activated LoRA"),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, r"times \(layer_replication\)", "layer_replication"),
}
"""Settings of PEFT's LoRA, what the gate says, and what vLLM 0.32 says: regular expressions."""

REFUSED: dict[str, Refusal] = {
    "dora": Refusal(lambda: begun("dora", 0.02), r"DoRA: .* to=lora .* to=merged", "does not yet support DoRA"),
    "ia3": Refusal(lambda: begun("ia3", 0.15), r"LoRA only, this is IA3: .* to=merged$", "Missing required config"),
    "full": Refusal(lambda: begun("full", 0.001), r"a whole model.* \(model=FOLDER\)$", "No adapter found"),
    "rank 513": Refusal(
        lambda: begun("lora", 0.02, r=513, target_modules=ONE),
        r"rank 513 is above vLLM's maximum of 512: .* to=lora rank=512 .* to=merged",
        "LoRA rank 513 is greater",
    ),
    **{name: held_by_hand(gate, vllm, **settings) for name, (settings, gate, vllm) in BY_HAND.items()},
}


def publish_as_training_does(root: Path, name: str, kind: AdapterKind, model: Any) -> Adapter:
    """As `lit_ft.train` does it, whose own tests show that it does."""
    from lit_ft.models.canary import canary
    from lit_ft.models.load import load_tokenizer
    from lit_ft.models.resolve import model_fingerprint

    tokenizer = load_tokenizer("bundled")
    done = kind.published(model)
    reason = adapt.why_not_servable(done.model)
    draft = Draft(
        name=name,
        base=Base("bundled", model_fingerprint("bundled")),
        algorithm="sft",
        peft=name if name in KINDS else "lora",
        rank=adapt.lora_rank(done.model),
        data=[],
        parent=None,
        servable=reason is None,
        not_servable_reason=reason,
        canary=canary(done.model, tokenizer) if reason is None else None,
        converted=done.converted,
    )

    def write(folder: Path) -> None:
        adapt.save_trained(done.model, folder)
        tokenizer.save_pretrained(str(folder))

    return publish(root, draft, write)


def greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What the model answers, the token that ends a turn included."""
    import torch

    model.eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
            )
        answers.append(made[0, len(prompt) :].tolist())
    return answers


def logprobs(model: Any, tokens: list[int]) -> Any:
    """What the model gives each token after the first: [len(tokens) - 1]."""
    import torch

    model.eval()
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


def rules(adapter: Adapter) -> registry.Rules:
    """Those of the server below, had it the adapter's template."""
    return registry.Rules(adapter.card.base.hash, SERVER_RANK, registry.chat_template(adapter), "the base")


async def answers_of_engine(served: Served, model: str) -> list[list[int]]:
    """At once: in one batch, as a server has them."""
    from openai import AsyncOpenAI

    key = {"base_url": served.engine.base_url, "api_key": served.engine.api_key}
    async with AsyncOpenAI(**key, max_retries=0, timeout=300) as client:
        return list(await asyncio.gather(*(greedy_of_engine(served, model, i, client) for i in range(ASKED))))


# --- without vLLM ----------------------------------------------------------------------------------------------------


def test_every_kind_has_its_verdict_here() -> None:
    """Whoever adds a kind says here what vLLM makes of it."""
    verdicts = [name for name in (*PASSED, *REFUSED) if name in KINDS]
    assert sorted(verdicts) == sorted(KINDS)


def test_one_maximum_of_ranks() -> None:
    assert adapt.MAX_SERVABLE_RANK == RANKS[-1] == registry.ENGINE_MAX_RANK


@pytest.mark.parametrize("name", BY_HAND)
def test_the_gate_says_what_and_what_helps(name: str) -> None:
    settings, gate, _ = BY_HAND[name]
    _, model = by_hand(tiny.model(), **settings)
    assert re.search(gate, adapt.why_not_servable(model) or "")


@pytest.mark.parametrize(
    "settings",
    [{}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}, {"init_lora_weights": False}],
)
def test_the_gate_passes_beginnings_that_leave_the_base_alone(settings: dict[str, Any]) -> None:
    assert adapt.why_not_servable(by_hand(tiny.model(), **settings)[1]) is None


@pytest.mark.parametrize(("rank", "passes"), [(512, True), (513, False)])
@pytest.mark.parametrize("key", ["r", "rank_pattern"])
def test_the_gate_s_largest_rank(rank: int, passes: bool, key: str) -> None:
    settings = {"r": rank} if key == "r" else {"rank_pattern": {"up_proj": rank}}
    _, model = by_hand(tiny.model(), target_modules=["up_proj"], **settings)
    assert (adapt.why_not_servable(model) is None) is passes


# --- a real vLLM -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompt_ids() -> list[list[int]]:
    from lit_ft.models.load import load_tokenizer

    tokenizer = load_tokenizer("bundled")
    chats = [[{"role": "user", "content": text}] for text in PROMPTS[:ASKED]]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Several threads that wait for each other on cores that the engine also uses are far slower than one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_merged_it_is_served_as_a_base_of_its_own(tmp_path: Path, prompt_ids: Any, one_thread: None) -> None:
    """(IA)³, by the command that its card names. The first test here: it has its engine to itself."""
    pytest.importorskip("vllm")
    import torch

    kind, model = REFUSED["ia3"].make()
    expected, scores = greedy(model, prompt_ids), logprobs(model, prompt_ids[0])
    assert all(one != other for one, other in zip(expected, greedy(base(), prompt_ids), strict=True))
    adapter = publish_as_training_does(tmp_path / "adapters", "ia3", kind, model)
    assert "python -m lit_ft.export to=merged" in (adapter.card.not_servable_reason or "")
    del model
    merged = tmp_path / "merged"
    command = [f"adapter={adapter.path}", "to=merged", "dtype=float32", f"output={merged}"]
    subprocess.run([sys.executable, "-m", "lit_ft.export", *command], check=True, cwd=tmp_path)

    subject = Engine(str(merged), served_name="base", log_path=tmp_path / "vllm.log", **ENGINE)
    try:
        subject.start()
        served = Served(subject, [], prompt_ids, None)

        async def task(client: EngineClient) -> None:
            assert await answers_of_engine(served, "base") == expected
            found = await client.logprobs("base", prompt_ids[0])
            torch.testing.assert_close(torch.tensor(found), scores, atol=FLOAT32, rtol=0)

        with_client(served, task)
    finally:
        subject.stop()


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_no_vllm_has_room_for_a_rank_above_the_gate_s_maximum(tmp_path: Path) -> None:
    """The installed one says which ranks it takes, at once."""
    pytest.importorskip("vllm")
    from lit_ft.models.resolve import resolve_model

    subject = Engine(resolve_model("bundled"), served_name="base", log_path=tmp_path / "vllm.log", **ENGINE)
    subject.max_lora_rank = adapt.MAX_SERVABLE_RANK + 1  # what Engine itself would not take
    with pytest.raises(UserError, match=r"max-lora-rank: invalid choice: '?513'? \(choose from .*512\)"):
        subject.start()
    assert not subject.alive()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, prompt_ids: list[list[int]], one_thread: None) -> Iterator[Served]:
    """A running engine with one sound adapter."""
    pytest.importorskip("vllm")
    from lit_ft.models.resolve import resolve_model

    root = tmp_path_factory.mktemp("gate")
    sound = publish_as_training_does(root / "adapters", "sound", *begun("lora", 0.02, r=4))
    settings = {**ENGINE, "max_lora_rank": SERVER_RANK, "max_cpu_loras": 3}
    subject = Engine(resolve_model("bundled"), served_name="base", log_path=root / "vllm.log", **settings)
    try:
        subject.start()
        loaded(subject, [sound])
        yield Served(subject, [sound], prompt_ids, None)
    finally:
        subject.stop()


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PASSED)
def test_what_the_gate_passes_answers_as_it_was_trained(served: Served, tmp_path: Path, name: str) -> None:
    """Token by token like transformers and PEFT before anything was converted."""
    import torch
    from peft import PeftModel

    kind, model = PASSED[name]()
    if not kind.quantized:
        expected, scores = greedy(model, served.prompt_ids), logprobs(model, served.prompt_ids[0])
    adapter = publish_as_training_does(tmp_path, name, kind, model)
    if kind.quantized:  # the server's base is not rounded to 4 bits, which the adapter was trained on
        model = PeftModel.from_pretrained(base(), str(adapter.path))
        expected, scores = greedy(model, served.prompt_ids), logprobs(model, served.prompt_ids[0])

    card = adapter.card
    assert card.servable and card.not_servable_reason is None
    assert registry.objection(adapter, tmp_path, rules(adapter)) == ""
    words = {"adalora": r"AdaLoRA with 630 ranks, 0 to 6 per weight, to LoRA", "pissa": r"PiSSA .* of rank 32, exactly"}
    check_converted(card.converted, words.get(name))

    async def task(client: EngineClient) -> None:
        without = await answers_of_engine(served, "base")
        plain = await client.logprobs("base", served.prompt_ids[0])
        await client.load(adapter.ref, adapter.path)
        try:
            answers = await answers_of_engine(served, adapter.ref)
            found = await client.logprobs(adapter.ref, served.prompt_ids[0])
            assert await canary_module.objection(client, adapter, "base", {}) == ""
        finally:
            await client.unload(adapter.ref)
        assert answers == expected
        torch.testing.assert_close(torch.tensor(found), scores, atol=FLOAT32, rtol=0)
        assert (torch.tensor(found) - torch.tensor(plain)).abs().mean() > 0.05  # the adapter does something
        assert answers != without

    with_client(served, task)


def check_converted(converted: str | None, words: str | None) -> None:
    """The card says what was done to it, and nothing where nothing was."""
    assert converted is None if words is None else re.search(words, converted or "")


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_gate_does_not_pass_vllm_refuses(served: Served, tmp_path: Path, name: str) -> None:
    """For the reason that the gate gives; whoever is being served notices nothing."""
    refusal = REFUSED[name]
    adapter = publish_as_training_does(tmp_path, name.replace(" ", "-"), *refusal.make())
    card = adapter.card
    assert not card.servable and re.search(refusal.gate, card.not_servable_reason or "")
    assert registry.objection(adapter, tmp_path, rules(adapter)) == card.not_servable_reason
    refused_and_alive(served, adapter, refusal.vllm)


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_rank_above_this_server_s_is_refused_though_vllm_could_serve_it(served: Served, tmp_path: Path) -> None:
    """By the server before it asks the engine, with what to do; and by the engine."""
    adapter = publish_as_training_does(tmp_path, "high", *begun("lora", 0.02, r=SERVER_RANK + 1, target_modules=ONE))
    assert adapter.card.servable and adapter.card.rank == 33
    says = registry.objection(adapter, tmp_path, rules(adapter))
    assert says == "Its rank 33 is above the maximum of 32. Start with max_lora_rank=33."
    refused_and_alive(served, adapter, "LoRA rank 33 is greater than max_lora_rank 32")


def refused_and_alive(served: Served, adapter: Adapter, words: str) -> None:
    """The engine does not load it, says `words`, and answers as before, with the base and with a sound adapter."""
    known = ["base", served.adapters[0].ref]

    async def task(client: EngineClient) -> None:
        before = await asyncio.gather(*(said(client, model) for model in known))
        assert before[0] != before[1]
        talking = asyncio.create_task(said(client, known[1]))  # one in progress is not disturbed
        with pytest.raises(ChatError, match=rf"could not load {adapter.ref}: .*{words}"):
            await client.load(adapter.ref, adapter.path)
        assert await talking == before[1]
        assert await client.models() == known
        assert await asyncio.gather(*(said(client, model) for model in known)) == before

    with_client(served, task)
    assert served.engine.alive() and served.engine.healthy()
