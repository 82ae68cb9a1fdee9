"""The one way of every request to the engine: within the limits, to a version held in use, counted at its end."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_ft.errors import UserError
from serve.client import Delta, EngineClient, RefusedError
from serve.errors import UnknownModelError
from serve.fleet import Fleet
from serve.limits import Limits, TooMuch, characters_of
from serve.metrics import Metrics, Outcome

if TYPE_CHECKING:
    import aiohttp


TEXT_EVENT = b'"delta":{"content":'
"""Begins the text of each event but the first, which gives the role."""

DONE = b"\ndata: [DONE]"
"""The line break is what a reply's own text cannot hold."""

BROKEN = b'\ndata: {"error"'
"""vLLM reports what goes wrong inside a stream so, and then ends it as ever."""

LOOK_BACK = 512
"""Bytes kept of what went before: the usage at the end of a reply that is not streamed stands in them."""


@dataclass
class Tally:
    """What one request came to; whoever runs it writes here."""

    began: float
    outcome: Outcome = "aborted"
    """`ok`, `failed`, `refused` by the engine, or `aborted`: the one who asked went away before any of these."""

    ttft_s: float | None = None
    tokens: int = 0
    tokens_per_s: float = 0.0


class Gateway:
    """Sends requests of the pages and of the endpoint to the engine."""

    def __init__(self, client: EngineClient, fleet: Fleet, limits: Limits, metrics: Metrics) -> None:
        self.fleet = fleet
        self._client = client
        self._limits = limits
        self._metrics = metrics

    async def close(self) -> None:
        """Close all connections to the engine."""
        await self._client.close()

    async def chat(
        self,
        user: str,
        model: str,
        messages: Sequence[dict[str, str]],
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int | None,
    ) -> AsyncGenerator[Delta, None]:
        """The reply of `model`, piece by piece, as `EngineClient.chat`. Close the iterator to abort the request.

        Raises:
            UserError: a limit is reached, the model is not served, the conversation is too long, the engine is gone.
        """
        with self._admitted(user, model, messages):
            async with self._leased(model) as ref:
                with self._counted(ref) as tally:
                    stream = self._client.chat(
                        ref, messages, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed
                    )
                    async with aclosing(stream) as deltas:
                        async for delta in deltas:
                            if delta.text and tally.ttft_s is None:
                                tally.ttft_s = time.perf_counter() - tally.began
                            tally.tokens += bool(delta.text)
                            if delta.timing is not None:
                                tally.outcome, tally.tokens = "ok", delta.timing.tokens
                                tally.tokens_per_s = delta.timing.tokens_per_s
                            yield delta

    @asynccontextmanager
    async def raw(self, user: str, body: dict[str, Any]) -> AsyncIterator[Raw]:
        """Send an OpenAI chat request as it is, under the full name of its model; gives the engine's own answer.

        Raises:
            UserError: as `chat`.
        """
        with self._admitted(user, body["model"], body["messages"]):
            async with self._leased(body["model"]) as ref:
                with self._counted(ref) as tally:
                    async with self._client.forward({**body, "model": ref}) as response:
                        yield Raw(response, tally)

    @contextmanager
    def _admitted(self, user: str, model: str, messages: Sequence[dict[str, Any]]) -> Iterator[None]:
        try:
            with self._limits.admit(user, characters_of(messages)):
                yield
        except TooMuch:
            self._metrics.finished(model, "refused", 0.0)
            raise

    @asynccontextmanager
    async def _leased(self, model: str) -> AsyncIterator[str]:
        began = time.perf_counter()
        async with AsyncExitStack() as stack:
            try:
                ref = await stack.enter_async_context(self.fleet.lease(model))
            except UserError as error:
                refused = isinstance(error, UnknownModelError)
                self._metrics.finished(model, "refused" if refused else "failed", time.perf_counter() - began)
                raise
            yield ref

    @contextmanager
    def _counted(self, ref: str) -> Iterator[Tally]:
        tally = Tally(time.perf_counter())
        self._metrics.know([ref])
        try:
            with self._metrics.stream():
                yield tally
        except RefusedError:
            tally.outcome = "refused"
            raise
        except Exception:
            tally.outcome = "failed"
            raise
        finally:
            seconds = time.perf_counter() - tally.began
            self._metrics.finished(ref, tally.outcome, seconds, tally.ttft_s, tally.tokens)
            self.fleet.stats(ref).add(tally.outcome == "failed", tally.ttft_s, tally.tokens_per_s)


class Raw:
    """The engine's answer to one request, as bytes; see `serve.api.Reply`."""

    def __init__(self, response: aiohttp.ClientResponse, tally: Tally) -> None:
        self.status = response.status
        self.chunks: AsyncIterator[bytes] = self._counting(response, tally)

    async def _counting(self, response: aiohttp.ClientResponse, tally: Tally) -> AsyncGenerator[bytes, None]:
        """The bytes unchanged. A piece of text is an event of its own, so tokens are counted without parsing them."""
        streamed = response.content_type == "text/event-stream"
        last, end, broken = 0.0, b"", False
        async for chunk in response.content.iter_any():
            if events := _events(end, chunk, TEXT_EVENT):
                last = time.perf_counter()
                if tally.ttft_s is None:
                    tally.ttft_s = last - tally.began
                tally.tokens += events
            broken = broken or bool(_events(end, chunk, BROKEN))
            if _events(end, chunk, DONE):  # before it goes out: who has read this may be gone then
                tally.outcome = "failed" if broken else "ok"
                if tally.ttft_s is not None and tally.tokens > 1 and (spent := last - tally.began - tally.ttft_s) > 0:
                    tally.tokens_per_s = (tally.tokens - 1) / spent
            end = (end + chunk)[-LOOK_BACK:]
            yield chunk
        if not streamed:
            tally.outcome = "ok" if self.status == 200 else "refused" if self.status < 500 else "failed"
            if found := re.search(rb'"completion_tokens": ?(\d+)', end):
                tally.tokens = int(found[1])


def _events(before: bytes, chunk: bytes, mark: bytes) -> int:
    """How often `mark` ends in this chunk, where it may begin in the one before."""
    seam = before[-(len(mark) - 1) :] + chunk[: len(mark) - 1]
    return chunk.count(mark) + seam.count(mark)
