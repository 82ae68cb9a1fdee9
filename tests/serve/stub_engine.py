"""A stand-in for vLLM's OpenAI server: deterministic streamed replies, vLLM's own error bodies, a slow mode."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

API_KEY = "stub-key"


@dataclass
class Stub:
    """What the running stub does, and what it has seen; a test may change the first and read the second."""

    models: list[str]
    max_model_len: int = 256
    delay_s: float = 0.0
    reply: str | None = None
    """Answer exactly this; else name the model and echo the question."""

    logprobs: dict[str, list[float]] = field(default_factory=dict)
    """What a model scores a text with; else -1 per token for the base, and something of its own for an adapter."""

    refuse: dict[str, str] = field(default_factory=dict)
    """Adapters that cannot be loaded, with vLLM's words."""

    paths: dict[str, str] = field(default_factory=dict)
    """Where each adapter that was ever loaded lay."""

    requests: list[dict[str, Any]] = field(default_factory=list)
    finished: int = 0
    aborted: int = 0
    base_url: str = ""
    server: uvicorn.Server | None = None
    thread: threading.Thread | None = None

    def kill(self) -> None:
        """Die as a crashed engine does: connections cut, port closed."""
        assert self.server and self.thread
        self.server.should_exit = True
        self.thread.join(10)


def error(status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> JSONResponse:
    """vLLM's error body."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": status}}, status)


def reply_text(model: str, messages: list[dict[str, str]]) -> str:
    """Deterministic: who was asked, and a piece of what."""
    return f"I am {model}. You wrote: {messages[-1]['content'][:40]}"


def build(stub: Stub) -> FastAPI:
    """The endpoints that serve.client uses."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in stub.models]}

    @app.post("/v1/load_lora_adapter")
    async def load(body: dict[str, Any]) -> Response:
        if body["lora_name"] in stub.models:
            return error(400, f"The lora adapter '{body['lora_name']}' has already been loaded.", "InvalidUserInput")
        if words := stub.refuse.get(body["lora_name"]):
            return error(500, words, "InternalServerError")
        stub.paths[body["lora_name"]] = body["lora_path"]
        stub.models.append(body["lora_name"])
        return Response(f"Success: LoRA adapter '{body['lora_name']}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: dict[str, Any]) -> Response:
        if body["lora_name"] not in stub.models:
            return error(404, f"The lora adapter '{body['lora_name']}' cannot be found.", "NotFoundError")
        stub.models.remove(body["lora_name"])
        return Response(f"Success: LoRA adapter '{body['lora_name']}' removed successfully.")

    @app.post("/v1/completions")
    async def score(body: dict[str, Any]) -> Response:
        if body["model"] not in stub.models:
            return error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        tokens = body["prompt"]
        own = stub.logprobs.get(body["model"]) or [-1.0 - 0.01 * (len(body["model"]) - 4)] * (len(tokens) - 1)
        scored = [{str(token): {"logprob": value, "rank": 1}} for token, value in zip(tokens[1:], own, strict=True)]
        return JSONResponse({"choices": [{"text": "", "prompt_logprobs": [None, *scored]}]})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {API_KEY}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        body = await request.json()
        stub.requests.append(body)
        if body["model"] not in stub.models:
            return error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        # A word is a token here, which is close enough to count with.
        prompt = sum(len(message["content"].split()) for message in body["messages"])
        if prompt > stub.max_model_len - 1:
            return error(
                400,
                f"This model's maximum context length is {stub.max_model_len} tokens. However, your prompt contains "
                f"{prompt} input tokens, which exceeds this limit even without any output tokens. "
                "Please reduce the length of the input prompt.",
                param="input_tokens",
            )
        text = stub.reply if stub.reply is not None else reply_text(body["model"], body["messages"])
        pieces = [word if i == 0 else " " + word for i, word in enumerate(text.split(" "))]
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or len(pieces)
        if not body.get("stream"):
            await asyncio.sleep(stub.delay_s * len(pieces[:limit]))
            stub.finished += 1
            message = {"role": "assistant", "content": "".join(pieces[:limit])}
            usage = {"prompt_tokens": prompt, "completion_tokens": len(pieces[:limit]), "total_tokens": 0}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            common = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"]}
            return JSONResponse({**common, "choices": [choice], "usage": usage})
        return StreamingResponse(stream(stub, body, pieces[:limit], prompt), media_type="text/event-stream")

    return app


async def stream(stub: Stub, body: dict[str, Any], pieces: list[str], prompt: int) -> AsyncIterator[str]:
    """Server-sent events as vLLM writes them: role first, text, finish reason, usage, [DONE]."""
    common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}

    def event(choices: Iterable[dict[str, Any]], **extra: Any) -> str:
        return f"data: {json.dumps({**common, 'choices': list(choices), **extra})}\n\n"

    done = False
    try:
        yield event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        for piece in pieces:
            await asyncio.sleep(stub.delay_s)
            yield event([{"index": 0, "delta": {"content": piece}, "finish_reason": None}])
        yield event([{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}])
        if (body.get("stream_options") or {}).get("include_usage"):
            total = prompt + len(pieces)
            usage = {"prompt_tokens": prompt, "completion_tokens": len(pieces), "total_tokens": total}
            yield event([], usage=usage)
        yield "data: [DONE]\n\n"
        done = True
    finally:
        if done:
            stub.finished += 1
        else:
            stub.aborted += 1


@contextmanager
def running(models: list[str], *, port: int = 0, **behaviour: Any) -> Iterator[Stub]:
    """A stub on a loopback port (0: a free one), in a thread of this process."""
    stub = Stub(models=list(models), **behaviour)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    stub.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    stub.server = uvicorn.Server(uvicorn.Config(build(stub), log_level="warning", timeout_graceful_shutdown=1))
    stub.thread = threading.Thread(target=stub.server.run, kwargs={"sockets": [listener]}, daemon=True)
    stub.thread.start()
    deadline = time.monotonic() + 20
    while not stub.server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield stub
    finally:
        stub.kill()
