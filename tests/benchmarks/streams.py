"""A client of OpenAI-compatible endpoints that notes of each streamed reply who gave it, when, and how surely."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp

PATIENCE_S = 300.0


@dataclass(frozen=True)
class Token:
    """A token of a reply, with the natural logarithm of its probability, and the one that came second."""

    text: str
    logprob: float
    second: str | None
    second_logprob: float


@dataclass
class Reply:
    """One request and what came of it."""

    prompt: str
    asked: str
    """The model that the request named."""

    sent: float
    models: set[str] = field(default_factory=set)
    """Those that the chunks name."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    count: int = 0
    """Of tokens, as the engine counts them."""

    finish: str = ""
    error: str = ""
    ttft_s: float = 0.0
    seconds: float = 0.0

    @property
    def model(self) -> str:
        """Who gave it, where that is one."""
        return next(iter(self.models)) if len(self.models) == 1 else ""


async def ask(
    http: aiohttp.ClientSession,
    url: str,
    model: str,
    prompt: str,
    *,
    max_tokens: int,
    headers: Mapping[str, str] | None = None,
    surely: bool = False,
) -> Reply:
    """Ask `url` (which ends in /v1) greedily. What goes wrong stands in the reply's `error`.

    `surely` also asks for the log-probabilities of each token and of the one that came second.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if surely:
        body |= {"logprobs": True, "top_logprobs": 2}
    reply = Reply(prompt, model, time.monotonic())
    try:
        async with asyncio.timeout(PATIENCE_S):
            async with http.post(f"{url}/chat/completions", json=body, headers=headers) as response:
                if response.status != 200:
                    reply.error = f"{response.status}: {(await response.text())[:300]}"
                else:
                    await _read(response, reply)
    except Exception as error:
        reply.error = f"{type(error).__name__}: {error}"
    reply.seconds = time.monotonic() - reply.sent
    return reply


async def _read(response: aiohttp.ClientResponse, reply: Reply) -> None:
    done = False
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            done = True
            continue
        event = json.loads(line[6:])
        if "error" in event:
            reply.error = str(event["error"])[:300]
            return
        reply.models.add(event["model"])
        if event.get("usage"):
            reply.count = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            if choice["delta"].get("content"):
                if not reply.ttft_s:
                    reply.ttft_s = time.monotonic() - reply.sent
                reply.text += choice["delta"]["content"]
            reply.tokens += [_token(one) for one in (choice.get("logprobs") or {}).get("content") or ()]
            reply.finish = choice.get("finish_reason") or reply.finish
    if not done or not reply.finish:
        reply.error = "the stream ended before its end"


def _token(given: dict[str, Any]) -> Token:
    others = [one for one in given["top_logprobs"] if one["token"] != given["token"]]
    second = others[0] if others else {"token": None, "logprob": float("-inf")}
    return Token(given["token"], given["logprob"], second["token"], second["logprob"])
