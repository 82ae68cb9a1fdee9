"""The engine's client against a stub of vLLM's server: streams, aborts, refusals, an engine that dies."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from serve.client import GONE, ChatError, Delta, EngineClient, Timing, Usage
from tests.serve.stub_engine import API_KEY, Stub, running

SETTINGS: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 64, "seed": 7}
HELLO = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    with running(["base", "support@v1"]) as stub:
        yield stub


def run(task: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(task, 30))


@contextlib.asynccontextmanager
async def connected(base_url: str, key: str = API_KEY) -> AsyncIterator[EngineClient]:
    client = EngineClient(base_url, key)
    try:
        yield client
    finally:
        await client.close()


async def ask(client: EngineClient, model: str = "base", messages: Any = HELLO, **settings: Any) -> list[Delta]:
    return [delta async for delta in client.chat(model, messages, **{**SETTINGS, **settings})]


def test_a_reply_comes_in_pieces_and_ends_with_usage_and_timing(stub: Stub) -> None:
    async def task() -> list[Delta]:
        async with connected(stub.base_url) as client:
            return await ask(client, "support@v1")

    deltas = run(task())
    *pieces, end = deltas
    assert "".join(delta.text for delta in pieces) == "I am support@v1. You wrote: hello there"
    assert len(pieces) > 1
    assert all(delta.text and delta.usage is None and delta.timing is None for delta in pieces)
    assert end.text == "" and end.finish_reason == "stop"
    assert end.usage == Usage(prompt_tokens=2, completion_tokens=len(pieces))
    assert isinstance(end.timing, Timing)
    assert end.timing.tokens == len(pieces) and end.timing.ttft_s > 0 and end.timing.tokens_per_s > 0
    sent = stub.requests[-1]
    assert {key: sent[key] for key in SETTINGS} == SETTINGS
    assert sent["messages"] == HELLO and sent["stream_options"] == {"include_usage": True}


def test_timing_is_of_the_reply_not_of_the_wait() -> None:
    with running(["base"], delay_s=0.1, reply="one two three four five") as slow:

        async def task() -> list[Delta]:
            async with connected(slow.base_url) as client:
                return await ask(client)

        timing = run(task())[-1].timing
    assert timing is not None
    assert 0.1 <= timing.ttft_s < 2.0
    assert 3 < timing.tokens_per_s <= 10.5


def test_closing_the_iterator_aborts_the_request() -> None:
    with running(["base"], delay_s=0.1, reply="word " * 200) as slow:

        async def task() -> None:
            async with connected(slow.base_url) as client:
                stream = client.chat("base", HELLO, **SETTINGS)
                async with contextlib.aclosing(stream):
                    async for _ in stream:
                        break
                deadline = time.monotonic() + 5
                while not slow.aborted and time.monotonic() < deadline:
                    await asyncio.sleep(0.05)

        run(task())
        assert (slow.aborted, slow.finished) == (1, 0)


def test_cancelling_the_task_aborts_the_request() -> None:
    """What a closed browser tab does."""
    with running(["base"], delay_s=0.1, reply="word " * 200) as slow:

        async def task() -> None:
            async with connected(slow.base_url) as client:
                asking = asyncio.create_task(ask(client))
                await asyncio.sleep(0.5)
                asking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asking
                deadline = time.monotonic() + 5
                while not slow.aborted and time.monotonic() < deadline:
                    await asyncio.sleep(0.05)

        run(task())
        assert (slow.aborted, slow.finished) == (1, 0)


def test_many_at_once_do_not_mix(stub: Stub) -> None:
    async def task() -> list[list[Delta]]:
        async with connected(stub.base_url) as client:
            models = ["base", "support@v1"] * 8
            return await asyncio.gather(*(ask(client, model) for model in models))

    for i, deltas in enumerate(run(task())):
        assert "".join(d.text for d in deltas).startswith(f"I am {['base', 'support@v1'][i % 2]}.")


def test_a_conversation_that_is_too_long(stub: Stub) -> None:
    async def task() -> None:
        async with connected(stub.base_url) as client:
            await ask(client, messages=[{"role": "user", "content": "word " * 300}])

    with pytest.raises(ChatError) as caught:
        run(task())
    assert str(caught.value) == (
        "This conversation is 300 tokens long; the model reads at most 256. Clear the chat or shorten the message."
    )


def refuse(message: str, status: int = 400) -> Any:
    async def handler(request: Request) -> Response:
        return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)

    return handler


def serving(app_routes: list[tuple[str, Any]], action: Any) -> Any:
    """Run `action(client)` against a server with these routes."""
    app = FastAPI()
    for path, handler in app_routes:
        app.post(path)(handler)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()

    async def task() -> Any:
        async with connected(f"http://127.0.0.1:{listener.getsockname()[1]}/v1") as client:
            return await action(client)

    try:
        while not server.started:
            time.sleep(0.02)
        return run(task())
    finally:
        server.should_exit = True
        thread.join(10)


AT_LEAST = (
    "This model's maximum context length is 2048 tokens. However, your prompt contains at least 2049 input tokens, "
    "which exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
)
CHARACTERS = (
    "This model's maximum context length is 2048 tokens. However, your prompt contains 200120 characters (more than "
    "36846 characters, which is the upper bound for 2047 input tokens). Please reduce the length of the input prompt."
)


@pytest.mark.parametrize("message", [AT_LEAST, CHARACTERS])
def test_the_length_is_counted_where_the_engine_stopped_counting(message: str) -> None:
    """vLLM truncates before it counts, so its own number is only a lower bound; /tokenize knows."""

    async def tokenize(request: Request) -> dict[str, Any]:
        body = await request.json()
        return {"count": len(body["messages"][0]["content"].split()), "max_model_len": 2048}

    long = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(ChatError, match="is 3000 tokens long; the model reads at most 2048") as caught:
        serving([("/v1/chat/completions", refuse(message)), ("/tokenize", tokenize)], lambda c: ask(c, messages=long))
    assert "upper bound" not in str(caught.value)
    # Without /tokenize it says what is known.
    with pytest.raises(ChatError, match="is more than 2048 tokens long; the model reads at most 2048"):
        serving([("/v1/chat/completions", refuse(message))], lambda c: ask(c, messages=long))


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (404, "The model `base` does not exist.", "does not serve 'base'"),
        (400, "temperature must be non-negative", "refused this request: temperature must be non-negative"),
        (500, "boom", "failed on this request: boom"),
        (503, "EngineCore died", "stopped answering"),
        (401, "Unauthorized", "does not accept this server's key"),
    ],
)
def test_refusals_in_words(status: int, said: str, expected: str) -> None:
    with pytest.raises(ChatError, match=expected):
        serving([("/v1/chat/completions", refuse(said, status))], ask)


def test_an_error_inside_the_stream() -> None:
    async def handler(request: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            yield (
                'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"base","choices":'
                '[{"index":0,"delta":{"content":"Hel"},"finish_reason":null}]}\n\n'
            )
            yield 'data: {"error": {"message": "something broke", "type": "InternalServerError", "code": 500}}\n\n'

        return StreamingResponse(events(), media_type="text/event-stream")

    seen: list[str] = []

    async def action(client: EngineClient) -> None:
        async for delta in client.chat("base", HELLO, **SETTINGS):
            seen.append(delta.text)

    with pytest.raises(ChatError, match=r"broke off: .*something broke"):
        serving([("/v1/chat/completions", handler)], action)
    assert seen == ["Hel"]


def test_an_engine_that_dies_in_mid_stream_and_stays_dead() -> None:
    with running(["base"], delay_s=0.1, reply="word " * 200) as slow:

        async def task() -> None:
            async with connected(slow.base_url) as client:
                seen = 0
                with pytest.raises(ChatError, match="stopped answering"):
                    async for delta in client.chat("base", HELLO, **SETTINGS):
                        seen += bool(delta.text)
                        if seen == 2:
                            await asyncio.to_thread(slow.kill)
                assert seen >= 2
                with pytest.raises(ChatError) as caught:
                    await ask(client)
                assert str(caught.value) == GONE
                with pytest.raises(ChatError, match="stopped answering"):
                    await client.models()
                with pytest.raises(ChatError, match="stopped answering"):
                    await client.unload("support@v1")

        run(task())


def test_loading_and_unloading(tmp_path: Path) -> None:
    adapter: Any = SimpleNamespace(ref="support@v2", path=tmp_path)

    async def task(base_url: str) -> None:
        async with connected(base_url) as client:
            assert await client.models() == ["base"]
            await client.load(adapter)
            await client.load(adapter)  # already there: nothing to do
            assert await client.models() == ["base", "support@v2"]
            await client.unload("support@v2")
            await client.unload("support@v2")
            assert await client.models() == ["base"]

    with running(["base"]) as stub:
        run(task(stub.base_url))


def test_an_adapter_that_the_engine_refuses(tmp_path: Path) -> None:
    adapter: Any = SimpleNamespace(ref="support@v2", path=tmp_path)
    refusal = refuse("LoRA rank 64 is greater than max_lora_rank 16.", 500)
    with pytest.raises(ChatError, match=r"could not load support@v2 from .*: LoRA rank 64 is greater"):
        serving([("/v1/load_lora_adapter", refusal)], lambda client: client.load(adapter))


def test_a_proxy_in_the_environment_is_not_used(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def task() -> list[str]:
        async with connected(stub.base_url) as client:
            return await client.models()

    assert run(task()) == ["base", "support@v1"]
