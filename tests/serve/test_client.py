"""The engine's client against a stub of vLLM's server: streams, aborts, refusals, an engine that dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from lit_ft.errors import UserError
from serve.client import GONE, ChatError, Delta, EngineClient, RefusedError, Timing, Usage
from serve.errors import EngineGoneError, UnavailableError, UnknownModelError
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
    ("status", "said", "kind", "expected"),
    [
        (404, "The model `base` does not exist.", UnknownModelError, "does not serve 'base'"),
        (400, "temperature must be non-negative", RefusedError, "refused this request: temperature must be non-neg"),
        (500, "boom", ChatError, "failed on this request: boom"),
        (500, "EngineCore encountered an issue.", EngineGoneError, "engine .* stopped"),
        (503, "EngineCore died", EngineGoneError, "engine .* stopped"),
        (401, "Unauthorized", UnavailableError, "does not accept this server's key"),
    ],
)
def test_refusals_in_words(status: int, said: str, kind: type[UserError], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        serving([("/v1/chat/completions", refuse(said, status))], ask)
    assert type(caught.value) is kind


PIECE = (
    'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"base","choices":'
    '[{"index":0,"delta":{"content":"Hel"},"finish_reason":null}]}\n\n'
)


def broken_off(*rest: str) -> tuple[list[str], UserError]:
    """What is seen of a reply that begins with "Hel" and goes on with these lines, and the error at its end."""

    async def handler(request: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            for line in (PIECE, *rest):
                yield line

        return StreamingResponse(events(), media_type="text/event-stream")

    seen: list[str] = []

    async def action(client: EngineClient) -> None:
        async for delta in client.chat("base", HELLO, **SETTINGS):
            seen.append(delta.text)

    with pytest.raises(UserError) as caught:
        serving([("/v1/chat/completions", handler)], action)
    return seen, caught.value


def error_event(message: str) -> str:
    return f'data: {{"error": {{"message": "{message}", "type": "InternalServerError", "code": 500}}}}\n\n'


def test_an_error_inside_the_stream() -> None:
    seen, error = broken_off(error_event("something broke"))
    assert seen == ["Hel"] and type(error) is ChatError
    assert re.search("broke off: .*something broke", str(error))


def test_the_engines_death_told_inside_the_stream() -> None:
    """vLLM's server outlives its engine process for a moment, and says so as an event."""
    seen, error = broken_off(error_event("EngineCore encountered an issue. See stack trace."), "data: [DONE]\n\n")
    assert seen == ["Hel"] and type(error) is EngineGoneError and str(error) == GONE


@pytest.mark.parametrize("rest", [(), ("data: [DONE]\n\n",)])
def test_a_stream_that_just_ends_is_no_whole_reply(rest: tuple[str, ...]) -> None:
    """Without a finish reason it was cut: it must not pass for what the model said."""
    seen, error = broken_off(*rest)
    assert seen == ["Hel"] and type(error) is EngineGoneError


def test_an_engine_that_dies_in_mid_stream_and_stays_dead() -> None:
    with running(["base"], delay_s=0.1, reply="word " * 200) as slow:

        async def task() -> None:
            async with connected(slow.base_url) as client:
                seen = 0
                with pytest.raises(EngineGoneError, match=r"engine .* stopped"):
                    async for delta in client.chat("base", HELLO, **SETTINGS):
                        seen += bool(delta.text)
                        if seen == 2:
                            await asyncio.to_thread(slow.kill)
                assert seen >= 2
                with pytest.raises(EngineGoneError) as caught:
                    await ask(client)
                assert str(caught.value) == GONE
                for call in (
                    client.models(),
                    client.load("support@v1", Path("somewhere")),
                    client.unload("support@v1"),
                    client.logprobs("base", [1, 2]),
                ):
                    with pytest.raises(EngineGoneError):
                        await call
                with pytest.raises(EngineGoneError):
                    async with client.forward({"model": "base", "messages": HELLO}):
                        pass

        run(task())


def test_loading_and_unloading(tmp_path: Path) -> None:
    async def task(stub: Stub) -> None:
        async with connected(stub.base_url) as client:
            assert await client.models() == ["base"]
            await client.load("support@v2", tmp_path / "one")
            # Already there, since an unload got lost: never two contents under one name, nor a reload in place.
            await client.load("support@v2", tmp_path / "two")
            assert await client.models() == ["base", "support@v2"]
            assert stub.paths == {"support@v2": str(tmp_path / "two")}
            await client.unload("support@v2")
            await client.unload("support@v2")
            assert await client.models() == ["base"]
            await client.load("support@v2", tmp_path / "two")
            assert stub.paths == {"support@v2": str(tmp_path / "two")}

    with running(["base"]) as stub:
        run(task(stub))


def test_an_adapter_that_the_engine_refuses(tmp_path: Path) -> None:
    """In the engine's words, but where the adapter lies on the server is not for everybody who reads them."""
    refusal = refuse(f"Loading lora {tmp_path} failed: LoRA rank 64 is greater than max_lora_rank 16.", 500)
    with pytest.raises(ChatError, match=r"could not load support@v2: .*its folder .*LoRA rank 64 is greater") as caught:
        serving([("/v1/load_lora_adapter", refusal)], lambda client: client.load("support@v2", tmp_path))
    assert str(tmp_path) not in str(caught.value)


def test_an_adapter_that_the_engine_will_not_let_go() -> None:
    with pytest.raises(ChatError, match="could not unload support@v2: busy"):
        serving([("/v1/unload_lora_adapter", refuse("busy", 500))], lambda client: client.unload("support@v2"))


def test_a_text_is_scored_token_by_token(stub: Stub) -> None:
    """The first token has no log-probability, since nothing stands before it."""

    async def task() -> tuple[list[float], list[float]]:
        async with connected(stub.base_url) as client:
            return await client.logprobs("base", [7, 8, 7, 9]), await client.logprobs("support@v1", [7, 8])

    stub.logprobs = {"base": [-0.5, -1.25, -2.0]}
    found, other = run(task())
    assert found == [-0.5, -1.25, -2.0] and len(other) == 1 and other != [-1.0]


def test_scoring_asks_for_the_given_tokens_and_nothing_more() -> None:
    """vLLM names the likeliest token as well where that is another one: the one that stands there counts."""
    bodies: list[dict[str, Any]] = []

    async def completions(request: Request) -> dict[str, Any]:
        bodies.append(await request.json())
        scored = [None, {"8": {"logprob": -3.5, "rank": 4}, "5": {"logprob": -0.1, "rank": 1}}]
        return {"choices": [{"text": "x", "prompt_logprobs": scored}]}

    found = serving([("/v1/completions", completions)], lambda client: client.logprobs("support@v1", (7, 8)))
    assert found == [-3.5]
    [body] = bodies
    assert body["model"] == "support@v1" and body["prompt"] == [7, 8]
    assert body["max_tokens"] == 1 and body["prompt_logprobs"] == 0 and not body.get("stream")


def test_scoring_with_what_is_not_served(stub: Stub) -> None:
    async def task() -> None:
        async with connected(stub.base_url) as client:
            await client.logprobs("support@v9", [1, 2])

    with pytest.raises(ChatError, match=r"could not score a text with support@v9: .*does not exist"):
        run(task())


BODY = {"model": "support@v1", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}


def test_a_request_is_forwarded_as_it_is_and_its_answer_given_as_it_comes(stub: Stub) -> None:
    async def task() -> tuple[int, str, bytes]:
        async with connected(stub.base_url) as client, client.forward({**BODY, "unheard_of": [1]}) as response:
            return response.status, response.content_type, await response.read()

    status, kind, data = run(task())
    assert (status, kind) == (200, "text/event-stream")
    assert data.startswith(b"data: {") and data.endswith(b"data: [DONE]\n\n")
    texts = [json.loads(line[6:]) for line in data.split(b"\n\n") if line.startswith(b"data: {")]
    reply = "".join(choice["delta"]["content"] for event in texts for choice in event["choices"])
    assert reply == "I am support@v1. You wrote: hello there"
    assert stub.requests[-1] == {**BODY, "unheard_of": [1]}


def test_the_engines_refusal_of_a_forwarded_request_is_its_answer(stub: Stub) -> None:
    async def task() -> tuple[int, dict[str, Any]]:
        async with connected(stub.base_url) as client, client.forward({**BODY, "model": "x"}) as response:
            return response.status, await response.json()

    status, body = run(task())
    assert status == 404 and body["error"]["message"] == "The model `x` does not exist."


def test_leaving_a_forwarded_request_aborts_it() -> None:
    with running(["base"], delay_s=0.1, reply="word " * 200) as slow:

        async def task() -> None:
            async with connected(slow.base_url) as client:
                async with client.forward({**BODY, "model": "base"}) as response:
                    await response.content.readany()
                deadline = time.monotonic() + 5
                while not slow.aborted and time.monotonic() < deadline:
                    await asyncio.sleep(0.05)

        run(task())
        assert (slow.aborted, slow.finished) == (1, 0)


def test_an_engine_that_dies_in_the_middle_of_a_forwarded_answer() -> None:
    with running(["base"], delay_s=0.1, reply="word " * 200) as slow:

        async def task() -> None:
            async with connected(slow.base_url) as client:
                with pytest.raises(EngineGoneError):
                    async with client.forward({**BODY, "model": "base"}) as response:
                        await response.content.readany()
                        await asyncio.to_thread(slow.kill)
                        await response.read()

        run(task())


def test_the_engine_is_found_again_at_another_address(stub: Stub) -> None:
    """It was started again, on another port: what was in progress ends in words, what comes next is answered."""
    with running(["base"], delay_s=0.1, reply="word " * 200) as old:

        async def task() -> list[Delta]:
            async with connected(old.base_url) as client:
                talking, raw = asyncio.create_task(ask(client)), asyncio.create_task(forwarded(client))
                await asyncio.sleep(0.5)
                await client.connect(stub.base_url)
                for task in (talking, raw):
                    with pytest.raises(EngineGoneError):
                        await task
                async with client.forward({**BODY, "stream": True}) as response:
                    assert response.status == 200
                return await ask(client)

        async def forwarded(client: EngineClient) -> bytes:
            async with client.forward({**BODY, "model": "base"}) as response:
                return await response.read()

        deltas = run(task())
    assert "".join(delta.text for delta in deltas) == "I am base. You wrote: hello there"


def test_a_proxy_in_the_environment_is_not_used(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def task() -> list[str]:
        async with connected(stub.base_url) as client:
            async with client.forward(BODY) as response:
                assert response.status == 200
            return await client.models()

    assert run(task()) == ["base", "support@v1"]
