"""The way of every request: limits, a version held in use, counted at its end; against the stub engine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from serve.client import ChatError, EngineClient
from serve.errors import EngineGoneError, UnavailableError, UnknownModelError
from serve.fleet import Fleet
from serve.gateway import Gateway, Raw, Tally
from serve.limits import Limits, TooMuch
from serve.metrics import Metrics
from serve.snapshots import Snapshots
from tests.serve.published import adapter
from tests.serve.stub_engine import API_KEY, Stub, running

SETTINGS: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 64, "seed": 7}
HELLO = [{"role": "user", "content": "hello there my friend"}]  # the reply has 8 words


@pytest.fixture(scope="module")
def shared() -> Iterator[Stub]:
    with running(["base"]) as stub:
        yield stub


@pytest.fixture
def stub(shared: Stub) -> Stub:
    shared.models[:] = ["base"]
    shared.delay_s, shared.reply, shared.finished, shared.aborted = 0.0, None, 0, 0
    shared.requests.clear()
    return shared


@asynccontextmanager
async def parts(stub: Stub, tmp_path: Any, limits: Limits | None = None) -> AsyncIterator[Gateway]:
    """A gateway to the stub in which support@v1 and v2 are served."""
    client = EngineClient(stub.base_url, API_KEY)
    fleet = Fleet(Snapshots(client, tmp_path / "copies"), "base", room=8)
    for number in (1, 2):
        version = fleet.found(f"support@v{number}", adapter(tmp_path / "adapters", version=number))
        await fleet.try_out(version)
        fleet.passed(version)
    try:
        yield Gateway(client, fleet, limits or Limits(), Metrics())
    finally:
        await client.close()


def run(task: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(task, 20))


async def ask(gateway: Gateway, model: str = "support", messages: Any = HELLO, user: str = "ann") -> str:
    return "".join([delta.text async for delta in gateway.chat(user, model, messages, **SETTINGS)])


def counted(gateway: Gateway, model: str) -> dict[str, int]:
    """Requests by outcome."""
    lines = gateway._metrics.text().decode().splitlines()
    mark = 'lit_ft_requests_total{model="' + model + '",outcome="'
    found = {line[len(mark) :].split('"')[0]: int(float(line.split()[-1])) for line in lines if line.startswith(mark)}
    return {outcome: number for outcome, number in found.items() if number}


def value(gateway: Gateway, name: str) -> float:
    lines = gateway._metrics.text().decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)


async def until(right: Callable[[], bool], seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while not right():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_reply_is_of_the_newest_version_and_is_counted(stub: Stub, tmp_path: Any) -> None:
    stub.delay_s = 0.01

    async def task() -> None:
        async with parts(stub, tmp_path) as gateway:
            assert await ask(gateway) == "I am support@v2. You wrote: hello there my friend"
            assert stub.requests[-1]["model"] == "support@v2"
            assert counted(gateway, "support@v2") == {"ok": 1}
            served = gateway.fleet.stats("support@v2")
            assert (served.requests, served.failed) == (1, 0)
            # 9 words, 10 ms before each.
            assert 0.01 <= served.median_ttft_s < 1 and 10 < served.median_tokens_per_s < 105
            assert value(gateway, 'lit_ft_tokens_total{model="support@v2"}') == 9
            assert value(gateway, "lit_ft_open_streams") == 0
            assert await ask(gateway, "base") == "I am base. You wrote: hello there my friend"
            assert counted(gateway, "base") == {"ok": 1} and gateway.fleet.base_served.requests == 1

    run(task())


def test_a_closed_iterator_aborts_the_request(stub: Stub, tmp_path: Any) -> None:
    stub.delay_s = 0.05

    async def task() -> None:
        async with parts(stub, tmp_path, Limits(streams=1)) as gateway:
            async with aclosing(gateway.chat("ann", "support", HELLO, **SETTINGS)) as deltas:
                async for _ in deltas:
                    version = gateway.fleet.get("support@v2")
                    assert version and version.leases == 1 and value(gateway, "lit_ft_open_streams") == 1
                    break
            assert version.leases == 0
            await until(lambda: stub.aborted == 1, 2.0)
            assert counted(gateway, "support@v2") == {"aborted": 1}
            assert gateway.fleet.stats("support@v2").failed == 0
            stub.delay_s = 0.0
            await ask(gateway)  # its stream was given back

    run(task())


def test_a_cancelled_task_aborts_the_request(stub: Stub, tmp_path: Any) -> None:
    stub.delay_s = 0.05

    async def task() -> None:
        async with parts(stub, tmp_path) as gateway:
            asking = asyncio.create_task(ask(gateway))
            await until(lambda: bool(stub.requests))
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await until(lambda: stub.aborted == 1, 2.0)
            assert counted(gateway, "support@v2") == {"aborted": 1}

    run(task())


def test_what_the_engine_does_not_take_is_refused_and_no_failure(stub: Stub, tmp_path: Any) -> None:
    async def task() -> None:
        async with parts(stub, tmp_path) as gateway:
            with pytest.raises(ChatError, match="tokens long; the model reads at most 256"):
                await ask(gateway, messages=[{"role": "user", "content": "word " * 300}])
            assert counted(gateway, "support@v2") == {"refused": 1}
            assert gateway.fleet.stats("support@v2").failed == 0

    run(task())


def test_limits(stub: Stub, tmp_path: Any) -> None:
    stub.delay_s = 0.02

    async def task() -> None:
        async with parts(stub, tmp_path, Limits(streams=1, characters=100)) as gateway:
            asking = asyncio.create_task(ask(gateway))
            await until(lambda: bool(stub.requests))
            with pytest.raises(TooMuch, match="being written for you already"):
                await ask(gateway)
            with pytest.raises(TooMuch):
                async with gateway.raw("ann", {"model": "support@v2", "messages": HELLO}):
                    pass
            assert "friend" in await ask(gateway, user="ben")
            with pytest.raises(TooMuch, match="101 characters"):
                await ask(gateway, messages=[{"role": "user", "content": "x" * 101}], user="cat")
            await asking
            assert len(stub.requests) == 2
            assert counted(gateway, "support@v2") == {"ok": 2, "refused": 1}
            assert counted(gateway, "other") == {"refused": 2}, "what clients write makes no labels"

    run(task())


def test_what_cannot_be_lent_is_counted(stub: Stub, tmp_path: Any) -> None:
    async def task() -> None:
        async with parts(stub, tmp_path) as gateway:
            with pytest.raises(UnknownModelError, match="There are: base, support"):
                await ask(gateway, "nobody")
            assert counted(gateway, "other") == {"refused": 1}
            gateway.fleet.engine_lost("It is started again.")
            for _ in range(2):
                with pytest.raises(UnavailableError, match="started again"):
                    await ask(gateway, "base")
            assert counted(gateway, "other") == {"refused": 1, "failed": 2}
            assert stub.requests == []

    run(task())


def test_an_engine_that_is_killed_in_the_middle(tmp_path: Any) -> None:
    async def task() -> None:
        async with parts(stub, tmp_path) as gateway:
            got: list[str] = []

            async def chat() -> None:
                async for delta in gateway.chat("ann", "support", HELLO, **SETTINGS):
                    got.append(delta.text)

            async def raw() -> None:
                body = {"model": "support", "messages": HELLO, "stream": True}
                async with gateway.raw("ben", body) as reply:
                    async for chunk in reply.chunks:
                        got.append(chunk.decode())

            asking = [asyncio.create_task(chat()), asyncio.create_task(raw())]
            await until(lambda: len(got) >= 4)
            await asyncio.to_thread(stub.kill)
            for one in asking:
                with pytest.raises(EngineGoneError, match=r"stopped in the middle of this\. It is started again"):
                    await one
            assert counted(gateway, "support@v2") == {"failed": 2}
            with pytest.raises(EngineGoneError):
                await ask(gateway)
            version = gateway.fleet.get("support@v2")
            assert version and version.leases == 0 and gateway.fleet.stats("support@v2").failed == 3

    with running(["base"], delay_s=0.2) as stub:
        run(task())


# --- the endpoint's way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply", [None, 'data: [DONE] "delta":{"content": \n\ndata: {"error" é 中 \x00', "one"])
def test_bytes_pass_unchanged(stub: Stub, tmp_path: Any, reply: str | None) -> None:
    stub.reply = reply
    body = {"model": "support", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}

    async def task() -> None:
        async with parts(stub, tmp_path) as gateway:
            async with gateway.raw("ann", body) as answer:
                through = b"".join([chunk async for chunk in answer.chunks])
                assert answer.status == 200
            headers = {"Authorization": f"Bearer {API_KEY}"}
            async with (
                aiohttp.ClientSession(headers=headers) as session,
                session.post(f"{stub.base_url}/chat/completions", json={**body, "model": "support@v2"}) as direct,
            ):
                assert through == await direct.read()
            assert through.endswith(b"data: [DONE]\n\n")
            assert counted(gateway, "support@v2") == {"ok": 1}
            assert stub.requests[0] == stub.requests[1] == {**body, "model": "support@v2"}, "nothing else is changed"

    run(task())


def test_raw_left_early_aborts_the_request(stub: Stub, tmp_path: Any) -> None:
    stub.delay_s = 0.05

    async def task() -> None:
        async with parts(stub, tmp_path) as gateway:
            async with gateway.raw("ann", {"model": "support", "messages": HELLO, "stream": True}) as answer:
                async for _ in answer.chunks:
                    break
            await until(lambda: stub.aborted == 1, 2.0)
            assert counted(gateway, "support@v2") == {"aborted": 1}
            version = gateway.fleet.get("support@v2")
            assert version and version.leases == 0

    run(task())


def test_raw_passes_the_engines_refusal_on(stub: Stub, tmp_path: Any) -> None:
    async def task() -> None:
        async with parts(stub, tmp_path) as gateway:
            body = {"model": "support", "messages": [{"role": "user", "content": "word " * 300}]}
            async with gateway.raw("ann", body) as answer:
                text = b"".join([chunk async for chunk in answer.chunks])
            assert answer.status == 400 and "maximum context length" in json.loads(text)["error"]["message"]
            assert counted(gateway, "support@v2") == {"refused": 1}

    run(task())


def vllm_stream(words: list[str], problem: bool = False) -> bytes:
    """As vLLM 0.32 writes it: no spaces, the role first, the number of tokens not said."""

    def event(body: Any) -> bytes:
        return b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"

    deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in words)]
    events = [event({"id": "x", "choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
    if problem:
        events.append(b'data: {"error": {"message": "EngineCore died"}}\n\n')
    return b"".join(events) + b"data: [DONE]\n\n"


async def through(pieces: list[bytes], kind: str = "text/event-stream", status: int = 200) -> tuple[bytes, Tally]:
    async def iter_any() -> AsyncIterator[bytes]:
        for piece in pieces:
            await asyncio.sleep(0)
            yield piece

    response: Any = SimpleNamespace(status=status, content_type=kind, content=SimpleNamespace(iter_any=iter_any))
    tally = Tally(time.perf_counter())
    return b"".join([chunk async for chunk in Raw(response, tally).chunks]), tally


@pytest.mark.parametrize("size", [1, 2, 3, 7, 17, 18, 19, 40, 64, 100_000])
def test_tokens_are_counted_however_the_stream_is_cut(size: int) -> None:
    tricks = ['"delta":{"content":', "data: [DONE]", "\n\ndata: [DONE]\n\n", '\ndata: {"error"', "é", "", "<b>", "\\"]
    stream = vllm_stream(tricks * 3)
    got, tally = run(through([stream[i : i + size] for i in range(0, len(stream), size)]))
    assert got == stream
    assert (tally.tokens, tally.outcome) == (24, "ok")
    assert tally.ttft_s is not None and tally.ttft_s < 1
    assert (tally.tokens_per_s > 0) == (size < 100_000), "all at once is no rate"


@pytest.mark.parametrize("size", [1, 5, 100_000])
def test_an_error_inside_of_the_stream_is_a_failure(size: int) -> None:
    stream = vllm_stream(["a", "b"], problem=True)
    _, tally = run(through([stream[i : i + size] for i in range(0, len(stream), size)]))
    assert (tally.tokens, tally.outcome) == (2, "failed")


def test_a_stream_without_its_end_is_no_success() -> None:
    stream = vllm_stream(["data: [DONE]", "b"]).removesuffix(b"data: [DONE]\n\n")
    _, tally = run(through([stream]))
    assert tally.outcome != "ok"


@pytest.mark.parametrize("spaces", [(",", ":"), (", ", ": ")])
def test_a_reply_at_once_is_counted_by_its_usage(spaces: tuple[str, str]) -> None:
    text = json.dumps({"choices": [{"message": {"content": "x" * 9999}}], "usage": {"completion_tokens": 42}})
    body = json.dumps(json.loads(text), separators=spaces).encode()
    got, tally = run(through([body[:5000], body[5000:]], "application/json"))
    assert got == body and (tally.tokens, tally.outcome) == (42, "ok")
