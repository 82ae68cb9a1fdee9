"""The engine as the web page sees it: chat in a stream, load and unload adapters, errors in a person's words."""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_ft.errors import UserError
from serve.errors import EngineGoneError, UnavailableError, UnknownModelError

if TYPE_CHECKING:
    import aiohttp
    from openai import APIStatusError, AsyncOpenAI

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 300.0
"""Between two pieces of a reply; a request may wait its turn that long."""

GONE = (
    "The engine that runs the models stopped in the middle of this. It is started again by itself, which takes about a "
    "minute; then send your message once more."
)


class ChatError(UserError):
    """The engine failed on a request; the text is for the person at the page."""


class RefusedError(ChatError):
    """The engine does not take the request as it is: too long, most often."""


@dataclass(frozen=True)
class Usage:
    """How many tokens a request took, as the engine counted them."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timing:
    """How fast a reply came."""

    ttft_s: float
    """From sending the request to the first piece of text: waiting, reading the prompt, one token."""

    tokens: int
    tokens_per_s: float
    """After the first token; 0 where there was only one."""


@dataclass(frozen=True)
class Delta:
    """A piece of a reply. The last one has no text, and has the rest."""

    text: str
    usage: Usage | None = None
    finish_reason: str | None = None
    """"stop" (the model ended) or "length" (cut at max_tokens or at the context's end)."""

    timing: Timing | None = None


class EngineClient:
    """A client of one engine. Open connections are kept and shared; use it within one event loop."""

    def __init__(self, base_url: str, api_key: str) -> None:
        """Connects at the first request, not here."""
        self.base_url = base_url.rstrip("/")
        self._api_key = api_key
        self._made: AsyncOpenAI | None = None
        self._bytes: aiohttp.ClientSession | None = None
        self._forwarded: set[aiohttp.ClientResponse] = set()

    async def connect(self, base_url: str) -> None:
        """Talk to an engine elsewhere from now on: it was started again, on another port."""
        self.base_url = base_url.rstrip("/")  # first: whoever asks during the close is sent there already
        await self.close()

    @property
    def _client(self) -> AsyncOpenAI:
        if self._made is None:
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

            timeout = Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
            self._made = AsyncOpenAI(
                base_url=self.base_url,
                api_key=self._api_key,
                max_retries=0,  # a repeated request would run twice
                timeout=timeout,
                # The engine is on this machine: no proxy from the environment.
                http_client=DefaultAsyncHttpxClient(trust_env=False, timeout=timeout),
            )
        return self._made

    async def close(self) -> None:
        """Close all connections; requests in progress are aborted."""
        made, self._made = self._made, None
        bytes_, self._bytes = self._bytes, None
        if made is not None:
            await made.close()
        if bytes_ is not None:
            import aiohttp

            for response in self._forwarded:  # whoever reads them would wait for ever: closing does not wake readers
                response.content.set_exception(aiohttp.ServerDisconnectedError())
            await bytes_.close()

    async def chat(
        self,
        model: str,
        messages: Sequence[dict[str, str]],
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int | None,
    ) -> AsyncGenerator[Delta, None]:
        """The reply of `model` to the conversation, piece by piece.

        Close the iterator (`aclose`, `contextlib.aclosing`) to abort the request: the engine stops computing it.

        Raises:
            ChatError: the conversation is too long, or the model is not served.
            EngineGoneError: the engine ended, before or during the reply.
        """
        import openai

        began = time.perf_counter()
        first = last = 0.0
        usage: Usage | None = None
        reason: str | None = None
        pieces = 0
        try:
            stream: Any = await self._client.chat.completions.create(  # type: ignore[call-overload]
                model=model,
                messages=list(messages),
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_tokens,
                seed=seed,
                stream=True,
                stream_options={"include_usage": True},
            )
            async with stream:
                async for chunk in stream:
                    if chunk.usage is not None:
                        usage = Usage(chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
                    for choice in chunk.choices:
                        reason = choice.finish_reason or reason
                        if text := choice.delta.content:
                            last = time.perf_counter()
                            first = first or last
                            pieces += 1
                            yield Delta(text)
        except openai.APIStatusError as error:
            raise await self._refusal(error, model, messages) from error
        except openai.APIConnectionError as error:  # a time-out as well
            raise EngineGoneError(GONE) from error
        except openai.APIError as error:  # an error inside the stream
            raise _in_stream(error) from error
        except _transport().HTTPError as error:  # the connection was cut inside the stream
            raise EngineGoneError(GONE) from error
        except RuntimeError as error:  # this client was closed, as `connect` does, between two steps
            if "closed" not in str(error):
                raise
            raise EngineGoneError(GONE) from error
        if reason is None:  # the stream ended without its end
            raise EngineGoneError(GONE)
        tokens = usage.completion_tokens if usage else pieces
        rate = (tokens - 1) / (last - first) if tokens > 1 and last > first else 0.0
        timing = Timing(ttft_s=(first or time.perf_counter()) - began, tokens=tokens, tokens_per_s=rate)
        yield Delta("", usage, reason, timing)

    async def models(self) -> list[str]:
        """The names that `chat` takes: the base's first, then the adapters'."""
        import openai

        try:
            return [model.id for model in (await self._client.models.list()).data]
        except openai.APIStatusError as error:
            raise _plain(error) from error
        except openai.APIConnectionError as error:
            raise EngineGoneError(GONE) from error

    @asynccontextmanager
    async def forward(self, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a chat request as it is, and give the engine's answer as it comes. Leaving aborts the request.

        The endpoint's way: what passes through is neither parsed nor copied, so that it costs next to nothing.

        Raises:
            EngineGoneError: the engine cannot be reached, or ended during the answer.
        """
        import aiohttp

        if self._bytes is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
            self._bytes = aiohttp.ClientSession(
                timeout=timeout,
                connector=aiohttp.TCPConnector(limit=0),
                headers={"Authorization": f"Bearer {self._api_key}"},
                trust_env=False,
            )
        try:
            async with self._bytes.post(f"{self.base_url}/chat/completions", json=body) as response:
                self._forwarded.add(response)
                try:
                    yield response
                finally:
                    self._forwarded.discard(response)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineGoneError(GONE) from error

    async def logprobs(self, model: str, tokens: Sequence[int]) -> list[float]:
        """The log-probability of each token after the first, given those before it: [len(tokens) - 1], natural log.

        Raises:
            ChatError: the engine refused, with its reason.
            EngineGoneError: it ended.
        """
        body = {"model": model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        status, text = await self._post("/completions", body)
        if status != 200:
            raise ChatError(f"The engine could not score a text with {model}: {text}")
        found = json.loads(text)["choices"][0]["prompt_logprobs"]
        return [float(at[str(token)]["logprob"]) for at, token in zip(found[1:], tokens[1:], strict=True)]

    async def load(self, ref: str, path: Path) -> None:
        """Serve the adapter in `path` under `ref`, in the place of what is served under it.

        Raises:
            ChatError: the engine refused it, with its reason.
            EngineGoneError: it ended.
        """
        body = {"lora_name": ref, "lora_path": str(path)}
        status, text = await self._post("/load_lora_adapter", body)
        if status == 400 and "already" in text:  # an unload that got lost: what it holds may be something else
            await self.unload(ref)
            status, text = await self._post("/load_lora_adapter", body)
        if status != 200:
            raise ChatError(f"The engine could not load {ref}: {text.replace(str(path), 'its folder')}")

    async def unload(self, ref: str) -> None:
        """Stop serving an adapter; nothing happens if it is not served. Let its requests end first."""
        status, text = await self._post("/unload_lora_adapter", {"lora_name": ref})
        if status not in (200, 404):
            raise ChatError(f"The engine could not unload {ref}: {text}")

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        import openai

        try:
            return 200, await self._client.post(path, cast_to=str, body=body)
        except openai.APIStatusError as error:
            if error.status_code >= 500 and _dead(_message(error)):
                raise EngineGoneError(GONE) from error
            return error.status_code, _message(error)
        except openai.APIConnectionError as error:
            raise EngineGoneError(GONE) from error

    async def _refusal(self, error: APIStatusError, model: str, messages: Sequence[dict[str, str]]) -> UserError:
        text = _message(error)
        if error.status_code == 400 and (found := re.search(r"maximum context length is (\d+)", text)):
            limit = int(found[1])
            tokens, exact = await self._count(model, messages), True
            if tokens is None or tokens < limit:
                number = re.search(r"contains (at least )?(\d+) input tokens", text)
                tokens, exact = (int(number[2]), not number[1]) if number else (limit, False)
            length = f"{tokens} tokens" if exact else f"more than {limit} tokens"
            return RefusedError(
                f"This conversation is {length} long; the model reads at most {limit}. "
                "Clear the chat or shorten the message."
            )
        if error.status_code == 404:
            return UnknownModelError(f"The engine does not serve {model!r} (any more). Choose another model.")
        return _plain(error)

    async def _count(self, model: str, messages: Sequence[dict[str, str]]) -> int | None:
        """Tokens of a conversation; the engine's own refusal counts only up to its limit."""
        import openai

        try:
            # Outside /v1, beside it.
            url = self.base_url.removesuffix("/v1") + "/tokenize"
            body = {"model": model, "messages": list(messages), "add_generation_prompt": True}
            answer: Any = await self._client.post(url, cast_to=object, body=body)
            return int(answer["count"])
        except (openai.APIError, KeyError, TypeError, ValueError):
            return None


def _transport() -> Any:
    """The HTTP library below openai: httpx up to openai 2, httpx2 from 3 on. Its errors come through in a stream."""
    import openai

    base = next(cls for cls in openai.DefaultAsyncHttpxClient.__mro__ if cls.__name__ == "AsyncClient")
    return importlib.import_module(base.__module__.partition(".")[0])


def _message(error: APIStatusError) -> str:
    """The engine's own words out of an error's body, whatever its shape."""
    body = error.body
    if isinstance(body, dict):
        inner = body.get("error", body)
        if isinstance(inner, dict):
            return str(inner.get("message") or json.dumps(inner))
        return str(inner)
    return str(body or error.message)


def _plain(error: APIStatusError) -> UserError:
    if error.status_code == 401:
        return UnavailableError(
            "The engine does not accept this server's key. Another program may listen on its port: start it again."
        )
    if error.status_code == 503 or (error.status_code >= 500 and _dead(_message(error))):
        return EngineGoneError(GONE)
    if error.status_code >= 500:
        return ChatError(f"The engine failed on this request: {_message(error)}")
    return RefusedError(f"The engine refused this request: {_message(error)}")


def _dead(text: str) -> bool:
    """Whether vLLM's words mean that its engine process has ended."""
    return "EngineCore" in text or "EngineDead" in text


def _in_stream(error: Any) -> UserError:
    """vLLM reports what goes wrong after the first piece as an event of the stream."""
    text = str(getattr(error, "message", error))
    return EngineGoneError(GONE) if _dead(text) else ChatError(f"The reply broke off: {text}")
