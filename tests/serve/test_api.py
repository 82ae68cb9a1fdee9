"""The OpenAI endpoints with OpenAI's own client, over HTTP, against a gateway that is made up."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
import uvicorn
from fastapi import FastAPI

from lit_ft.adapter import Base, Card, DataSource
from lit_ft.errors import UserError
from serve import api
from serve.api import ApiError, facts, read_body, router
from serve.fleet import Listed, timestamp
from serve.limits import TooMuch

KEY = "litft-key"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
CARD = Card(
    name="support",
    version=3,
    created="2026-03-01T12:00:00+00:00",
    base=Base("/srv/models/smol", "sha256:1"),
    algorithm="sft",
    peft="lora",
    rank=8,
    data=[DataSource("/home/ann/secret/support.jsonl", 300, "sha256:2"), DataSource("org/set", 5, "sha256:3")],
    parent="support@v2",
    metrics={"eval/loss": 1.5, "train/loss": float("nan")},
    versions={"torch": "2.13"},
    weights_sha256="sha256:4",
    servable=True,
)


class Fleet:
    def __init__(self) -> None:
        self.models = [
            Listed("base", 1, "base", None, None),
            Listed("support", 2, "support@v3", "base", CARD),
            Listed("support@v3", 2, "support@v3", "base", CARD),
        ]

    def listed(self) -> list[Listed]:
        return self.models

    def resolve(self, model: str) -> str:
        for one in self.models:
            if one.id == model:
                return one.root
        raise UserError("no such model")


@dataclass
class FakeReply:
    status: int
    chunks: AsyncIterator[bytes]


@dataclass
class Gateway:
    """Answers with the chunks it was given; counts how requests end."""

    chunks: list[bytes] = field(default_factory=list)
    status: int = 200
    delay_s: float = 0.0
    before_s: float = 0.0
    refuses: Exception | None = None
    breaks: Exception | None = None
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    ended: int = 0
    aborted: int = 0

    @asynccontextmanager
    async def raw(self, user: str, body: dict[str, Any]) -> AsyncIterator[FakeReply]:
        self.seen.append((user, body))
        try:
            await asyncio.sleep(self.before_s)
            if self.refuses:
                raise self.refuses
            yield FakeReply(self.status, self._chunks())
            self.ended += 1
        except asyncio.CancelledError:
            self.aborted += 1
            raise

    async def _chunks(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield chunk
            await asyncio.sleep(self.delay_s)
        if self.breaks:
            raise self.breaks


class Keys:
    def owner(self, key: str) -> str | None:
        return "ci" if key == KEY else None


@dataclass
class Server:
    gateway: Gateway
    fleet: Fleet
    port: int

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=20)

    def post(self, body: bytes | Iterator[bytes], **headers: str) -> tuple[int, dict[str, Any], Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", "/v1/chat/completions", body, sent)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, dict(answer.headers), json.loads(text)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    gateway, fleet = Gateway(), Fleet()
    app = FastAPI()
    app.include_router(router(gateway, fleet, Keys(), max_body_bytes=50_000))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    yield Server(gateway, fleet, listener.getsockname()[1])
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def server(running: Server) -> Server:
    """The one server, as it was at first."""
    running.gateway.__dict__.update(Gateway().__dict__)
    running.fleet.__init__()  # type: ignore[misc]
    return running


def chunk(text: str | None = None, **extra: Any) -> bytes:
    delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
    choices = [{"index": 0, "delta": delta, "finish_reason": None}]
    common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "support@v3"}
    return f"data: {json.dumps({**common, 'choices': choices, **extra})}\n\n".encode()


DONE = b"data: [DONE]\n\n"
WHOLE = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "support@v3",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi there"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}


def until(condition: Any, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


def test_a_reply_in_one_piece(server: Server) -> None:
    text = json.dumps(WHOLE).encode()
    server.gateway.chunks = [text[:50], text[50:]]
    reply = server.client().chat.completions.create(
        model="support", messages=HELLO, temperature=0.5, max_tokens=9, stop=["END"], seed=3, user="somebody", n=1
    )
    assert reply.choices[0].message.content == "hi there" and reply.usage and reply.usage.total_tokens == 5
    assert reply.model == "support@v3"  # which version it was
    sent = {"model": "support", "messages": HELLO, "temperature": 0.5, "max_tokens": 9, "stop": ["END"], "seed": 3}
    assert server.gateway.seen == [("key:ci", sent)]
    assert server.gateway.ended == 1


def test_a_streamed_reply(server: Server) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    server.gateway.chunks = [chunk(), chunk("hi"), chunk(" there"), chunk("", choices=[], usage=usage), DONE]
    stream = server.client().chat.completions.create(
        model="base", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == "hi there"
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 2
    body = server.gateway.seen[0][1]
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}


def test_the_engines_bytes_come_through_unchanged_and_at_once(server: Server) -> None:
    # Cut anywhere, as a socket does, with odd bytes that no parser would give back so.
    pieces = [b"da", b'ta: {"x" :  1}\n', b"\n", b": comment\n\n", b"data: \xf0\x9f", b"\x98\x80\r\n\r\n", b"", DONE]
    server.gateway.chunks, server.gateway.delay_s = pieces, 0.15
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    body = json.dumps({"model": "base", "messages": HELLO, "stream": True})
    began = time.monotonic()
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}"})
    answer = connection.getresponse()
    assert answer.read(2) == b"da"
    assert time.monotonic() - began < 0.8  # all of it takes 1.2 s
    assert b"da" + answer.read() == b"".join(pieces)
    assert answer.getheader("content-type") == "text/event-stream; charset=utf-8"
    assert answer.getheader("cache-control") == "no-cache"
    connection.close()


def test_the_list_of_models_tells_no_paths(server: Server) -> None:
    models = server.client().models.list().data
    assert [one.id for one in models] == ["base", "support", "support@v3"]
    assert models[1].created == 2 and models[1].owned_by == "lit_ft"
    extra = models[1].model_extra or {}
    assert extra["root"] == "support@v3" and extra["parent"] == "base"
    assert extra["card"]["data"] == [{"source": "support.jsonl", "rows": 300}, {"source": "org/set", "rows": 5}]
    assert extra["card"]["base"] == "smol" and extra["card"]["metrics"] == {"eval/loss": 1.5, "train/loss": None}
    one = server.client().models.retrieve("support@v3")
    assert one.id == "support@v3"
    text = json.dumps([dict(found) for found in (*models, one)], default=str)
    assert "/srv" not in text and "/home" not in text and "sha256" not in text


def test_a_name_with_a_slash(server: Server) -> None:
    server.fleet.models = [Listed("HuggingFaceTB/SmolLM2", 1, "HuggingFaceTB/SmolLM2", None, None)]
    assert server.client().models.retrieve("HuggingFaceTB/SmolLM2").id == "HuggingFaceTB/SmolLM2"


def test_a_model_that_is_not_there(server: Server) -> None:
    client = server.client()
    for ask in (
        lambda: client.chat.completions.create(model="support@v9", messages=HELLO),  # type: ignore[arg-type]
        lambda: client.chat.completions.create(model="../etc", messages=HELLO, stream=True),  # type: ignore[arg-type]
        lambda: client.models.retrieve("support@v9"),
    ):
        with pytest.raises(openai.NotFoundError) as raised:
            ask()
        assert raised.value.code == "model_not_found" and "base, support, support@v3" in str(raised.value)
    assert server.gateway.seen == []


def test_a_model_that_goes_while_it_is_asked_for(server: Server) -> None:
    server.gateway.refuses, server.gateway.before_s = UserError("support@v3 is retired"), 0.3
    threading.Timer(0.1, lambda: setattr(server.fleet, "models", server.fleet.models[:1])).start()
    with pytest.raises(openai.NotFoundError, match="There is: base"):
        server.client().chat.completions.create(model="support", messages=HELLO)


@pytest.mark.parametrize("key", ["wrong", KEY + "x", KEY.upper()])
def test_a_wrong_key(server: Server, key: str) -> None:
    client = server.client(key)
    for ask in (
        client.models.list,
        lambda: client.models.retrieve("base"),
        lambda: client.chat.completions.create(model="base", messages=HELLO),  # type: ignore[arg-type]
    ):
        with pytest.raises(openai.AuthenticationError) as raised:
            ask()
        assert raised.value.code == "invalid_api_key" and key not in str(raised.value)
    assert server.gateway.seen == []


@pytest.mark.parametrize("header", ["", "Bearer", f"Basic {KEY}", KEY])
def test_no_key(server: Server, header: str) -> None:
    status, headers, answer = server.post(b"{}", Authorization=header)
    assert status == 401 and answer["error"]["code"] == "invalid_api_key"
    assert headers["www-authenticate"] == "Bearer"


def test_no_key_is_needed_where_there_are_none() -> None:
    from starlette.testclient import TestClient

    gateway = Gateway(chunks=[json.dumps(WHOLE).encode()])
    app = FastAPI()
    app.include_router(router(gateway, Fleet()))
    with TestClient(app, client=("127.0.0.1", 5)) as client:
        assert client.post("/v1/chat/completions", json={"model": "base", "messages": HELLO}).status_code == 200
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/chat/completions").status_code == 405
    assert gateway.seen[0][0] == "peer:127.0.0.1"


@pytest.mark.parametrize("stream", [False, True])
def test_over_a_limit(server: Server, stream: bool) -> None:
    server.gateway.refuses = TooMuch("Please try again in 3 seconds.", 2.2)
    with pytest.raises(openai.RateLimitError, match="try again in 3 seconds") as raised:
        server.client().chat.completions.create(model="base", messages=HELLO, stream=stream)  # type: ignore[call-overload]
    assert raised.value.response.headers["retry-after"] == "3"
    assert raised.value.code == "rate_limit_exceeded"
    server.gateway.refuses = TooMuch("too long", None)
    with pytest.raises(openai.APIStatusError, match="too long") as length:
        server.client().chat.completions.create(model="base", messages=HELLO, stream=stream)  # type: ignore[call-overload]
    assert length.value.status_code == 413 and "retry-after" not in length.value.response.headers


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_is_down(server: Server, stream: bool) -> None:
    server.gateway.refuses = UserError("The engine is being restarted.")
    with pytest.raises(openai.InternalServerError, match="being restarted") as raised:
        server.client().chat.completions.create(model="base", messages=HELLO, stream=stream)  # type: ignore[call-overload]
    assert raised.value.status_code == 503 and int(raised.value.response.headers["retry-after"]) > 0


def test_an_engine_that_dies_before_the_first_piece(server: Server) -> None:
    server.gateway.breaks = UserError("The engine has died.")
    with pytest.raises(openai.InternalServerError, match="has died"):
        server.client().chat.completions.create(model="base", messages=HELLO, stream=True)
    server.gateway.breaks = None
    with pytest.raises(openai.InternalServerError, match="before it began"):
        server.client().chat.completions.create(model="base", messages=HELLO, stream=True)


def test_an_engine_that_dies_between_two_pieces(server: Server) -> None:
    server.gateway.chunks, server.gateway.breaks = [chunk(), chunk("hi")], UserError("The engine has died.")
    got = []
    with pytest.raises(openai.APIError, match="has died"):
        for one in server.client().chat.completions.create(model="base", messages=HELLO, stream=True):
            got.append(one.choices[0].delta.content)
    assert got == ["", "hi"]


def test_an_engine_that_dies_within_a_piece(server: Server) -> None:
    """No message can follow half an event; but a reply that is cut must not look whole."""
    server.gateway.chunks, server.gateway.breaks = [chunk("hi"), b'data: {"id'], UserError("The engine has died.")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    body = json.dumps({"model": "base", "messages": HELLO, "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}"})
    answer = connection.getresponse()
    with pytest.raises(http.client.IncompleteRead) as raised:
        answer.read()
    assert raised.value.partial.endswith(b'data: {"id')


@pytest.mark.parametrize(
    ("status", "body", "expected", "says"),
    [
        (
            400,
            {"error": {"message": "maximum context length is 9", "param": "input_tokens", "code": 400}},
            400,
            "context length",
        ),
        (404, {"error": {"message": "gone: /srv/adapters/x", "code": 404}}, 404, "There is: base"),
        (401, {"error": "Unauthorized"}, 503, "cannot answer"),
        (500, {"error": {"message": "CUDA error at /opt/vllm/x.py"}}, 503, "cannot answer"),
        (400, [1, 2], 503, "cannot answer"),
    ],
)
def test_what_the_engine_refuses(server: Server, status: int, body: Any, expected: int, says: str) -> None:
    server.gateway.status, server.gateway.chunks = status, [json.dumps(body).encode()]
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError, match=says) as raised:
            server.client().chat.completions.create(model="base", messages=HELLO, stream=stream)  # type: ignore[call-overload]
        assert raised.value.status_code == expected
        assert "/srv" not in str(raised.value) and "/opt" not in str(raised.value)
        assert raised.value.code is None or isinstance(raised.value.code, str)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request(server: Server, stream: bool) -> None:
    server.gateway.chunks, server.gateway.delay_s = [chunk("x")] * 1000, 0.05
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    body = json.dumps({"model": "base", "messages": HELLO, "stream": stream})
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}"})
    if stream:
        answer = connection.getresponse()
        assert answer.read(4) == b"data"
        answer.close()
    assert until(lambda: server.gateway.seen)
    connection.close()
    assert until(lambda: server.gateway.aborted == 1, 2), "within 2 s"
    assert server.gateway.ended == 0


def test_a_client_that_goes_away_before_there_is_a_reply(server: Server) -> None:
    server.gateway.before_s = 60
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    body = json.dumps({"model": "base", "messages": HELLO, "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}"})
    assert until(lambda: server.gateway.seen)
    connection.close()
    assert until(lambda: server.gateway.aborted == 1, 2)


def test_openais_client_that_closes_its_stream(server: Server) -> None:
    server.gateway.chunks, server.gateway.delay_s = [chunk("x")] * 1000, 0.02
    stream = server.client().chat.completions.create(model="base", messages=HELLO, stream=True)
    next(iter(stream))
    stream.close()
    assert until(lambda: server.gateway.aborted == 1, 2)


def test_a_client_that_takes_nothing_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "STALLED_S", 0.5)
    server.gateway.chunks = [b": " + b"x" * 2**20 + b"\n\n"] * 64  # more than all buffers on the way
    body = json.dumps({"model": "base", "messages": HELLO, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as lazy:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        lazy.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert until(lambda: server.gateway.ended == 1, 10)  # while the connection is still there


def test_a_body_that_is_too_large(server: Server) -> None:
    big = json.dumps({"model": "base", "messages": [{"role": "user", "content": "x" * 60_000}]}).encode()
    status, _, answer = server.post(big)
    assert status == 413 and "50,000 bytes" in answer["error"]["message"]
    # Without a length beforehand it is found out while it comes.
    status, _, answer = server.post(iter([big[:30_000], big[30_000:]]))
    assert status == 413
    assert server.gateway.seen == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"model": "base", "temperature": NaN}',
        b'{"model": "base", "temperature": Infinity}',
        b'{"model": "\\ud800"}',
        b"[" * 20_000,
        b'{"a":' * 8_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_bodies_that_are_no_json(server: Server, body: bytes) -> None:
    status, _, answer = server.post(body)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    assert "JSON" in answer["error"]["message"] and len(answer["error"]["message"]) < 400


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_forms_of_other_sites_are_no_requests(server: Server, kind: str) -> None:
    status, _, answer = server.post(json.dumps({"model": "base", "messages": HELLO}).encode(), Content_Type=kind)
    assert status == 415 and "application/json" in answer["error"]["message"]
    assert server.gateway.seen == []


ENGINES_OWN = [
    "guided_json", "guided_regex", "structured_outputs", "chat_template", "chat_template_kwargs", "mm_processor_kwargs",
    "media_io_kwargs", "add_special_tokens", "add_generation_prompt", "continue_final_message", "echo", "documents",
    "prompt_embeds", "kv_transfer_params", "ec_transfer_params", "vllm_xargs", "logits_processors", "lora_path",
    "lora_request", "cache_salt", "priority", "request_id", "session_id", "use_beam_search", "top_k", "min_p",
    "repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids", "allowed_token_ids", "bad_words",
    "prompt_logprobs", "logprob_token_ids", "return_token_ids", "return_prompt_text", "truncate_prompt_tokens",
    "logit_bias", "tools", "tool_choice", "functions", "reasoning_effort", "stream_interval", "repetition_detection",
    "modalities", "audio", "str", "list[_Part]", "model_config", "", "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("name", ENGINES_OWN)
def test_what_is_not_in_the_list_does_not_pass(name: str) -> None:
    with pytest.raises(ApiError) as raised:
        read_body(json.dumps({"model": "base", "messages": HELLO, name: {"a": 1}}).encode())
    assert raised.value.status == 400 and raised.value.code == "unsupported_parameter"
    assert raised.value.param == name[:200] and len(str(raised.value)) < 300


def test_every_field_of_the_engine_is_either_listed_or_refused() -> None:
    """Against the installed vLLM's own request, so that a new version's new field cannot slip through."""
    protocol = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")
    passed = set()
    for name in protocol.ChatCompletionRequest.model_fields:
        try:
            read_body(json.dumps({"model": "base", "messages": HELLO, name: {"odd": 1}}).encode())
        except ApiError as error:
            if error.code == "unsupported_parameter" and error.param == name:
                continue
        passed.add(name)
    assert passed == {
        "messages", "model", "frequency_penalty", "logprobs", "top_logprobs", "max_tokens", "max_completion_tokens",
        "n", "presence_penalty", "response_format", "seed", "stop", "stream", "stream_options", "temperature", "top_p",
        "user",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": ["base"]}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [*HELLO, "x"]}, "messages[1]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image_url": "file:///etc"}]}]},
            "messages[0].content[0].image_url",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": HELLO * 1001}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": 1e999}, None),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": list("abcde")}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"store": True}, "store"),
    ],
)
def test_values_that_are_wrong(change: dict[str, Any], param: str | None) -> None:
    with pytest.raises(ApiError) as raised:
        read_body(json.dumps({"model": "base", "messages": HELLO, **change}).encode())
    assert raised.value.status == 400
    if param is not None:
        assert (raised.value.param or "").startswith(param), (raised.value.param, str(raised.value))
        assert param.split(".")[-1] in str(raised.value)
    assert "_Part" not in str(raised.value) and "[str]" not in str(raised.value)


def test_what_clients_send_passes() -> None:
    echoed = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "audio": None}
    given = {
        "model": "support@v2",
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "name": "ann", "content": [{"type": "text", "text": "é😀"}, {"type": "text", "text": ""}]},
            echoed,
            {"role": "user", "content": ""},
        ],
        "temperature": 0, "top_p": 1, "max_completion_tokens": 1, "n": 1, "stop": "x", "seed": -1, "stream": True,
        "stream_options": {"include_usage": False}, "presence_penalty": -2, "frequency_penalty": 2.0, "logprobs": True,
        "top_logprobs": 20, "response_format": {"type": "text"}, "user": "u", "metadata": {"a": "b"}, "store": False,
        "service_tier": "auto", "tools": None, "kv_transfer_params": None,
    }  # fmt: skip
    assert read_body(json.dumps(given).encode()) == {
        "model": "support@v2",
        "messages": [
            {"role": "system", "content": "be brief"},
            given["messages"][1],
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": ""},
        ],
        "temperature": 0, "top_p": 1, "max_completion_tokens": 1, "stop": "x", "seed": -1, "stream": True,
        "stream_options": {"include_usage": False}, "presence_penalty": -2, "frequency_penalty": 2.0, "logprobs": True,
        "top_logprobs": 20,
    }  # fmt: skip


def test_the_date_of_a_card() -> None:
    assert timestamp("1970-01-01T01:00:00+01:00") == 0 and timestamp("1970-01-02T00:00:00") == 86_400
    assert timestamp("yesterday") == 0 and timestamp("") == 0
    assert facts(CARD)["rank"] == 8


def test_reading_a_request_is_cheap() -> None:
    """It is part of the time to first token, of which ours may be a twentieth."""
    body = json.dumps({"model": "base", "messages": HELLO * 20, "stream": True, "max_tokens": 64}).encode()
    read_body(body)
    began = time.process_time()
    for _ in range(200):
        read_body(body)
    assert (time.process_time() - began) / 200 < 0.001
