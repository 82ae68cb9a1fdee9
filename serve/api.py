"""The OpenAI-compatible endpoints: `/v1/models` and `/v1/chat/completions`, for programs.

What a request may say is listed here, field by field; all else is refused, since the engine behind takes many fields
that are not for everybody (templates, guided decoding, tensors, transfers between machines). What the engine answers
is passed on as it comes, without looking into it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, Literal, NoReturn, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from lit_ft.adapter import Card
from lit_ft.errors import UserError
from serve.cards import source_name
from serve.fleet import Listed
from serve.limits import TooMuch

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
MAX_MESSAGES = 1000
RETRY_ENGINE_S = 10
"""When to try again while the engine is being restarted."""

STALLED_S = 60.0
"""A client that takes nothing for so long has gone, even if its connection has not: its reply ends."""

MAX_ERROR_BYTES = 1 << 16

EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the events back
]

# The engine's refusals that are the client's to mend. Any other is between us and the engine.
CLIENT_STATUS = (400, 404, 413, 422)


class Fleet(Protocol):
    """What is served."""

    def listed(self) -> Sequence[Listed]:
        """Every model that can be asked for, in the order to show."""

    def resolve(self, model: str) -> str:
        """The version that answers for a model's name. Raises UserError if there is none."""


class Reply(Protocol):
    """An answer of the engine."""

    status: int
    """200; or the engine's refusal, whose JSON body `chunks` then are."""

    chunks: AsyncIterator[bytes]
    """The engine's bytes as they come: server-sent events if `stream` was asked for, else one JSON."""


class Gateway(Protocol):
    """The way to the engine."""

    def raw(self, user: str, body: dict[str, Any]) -> AbstractAsyncContextManager[Reply]:
        """Send a request, which is on its way for as long as the block runs; leaving it early aborts the request.

        Raises, on entering: TooMuch, or any other UserError where the engine cannot answer now.
        """


class Keys(Protocol):
    """API keys."""

    def owner(self, key: str) -> str | None:
        """Whose key it is; None if nobody's."""


class ApiError(UserError):
    """A refusal in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.headers = status, kind, param, code, headers

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The same as a response."""
        return JSONResponse(self.body(), self.status, dict(self.headers or {}))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class _Part(_Strict):
    type: Literal["text"]
    text: str


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(min_length=1)]
    name: Annotated[str, Field(max_length=64)] | None = None


class _StreamOptions(_Strict):
    include_usage: bool | None = None


class _ResponseFormat(_Strict):
    type: Literal["text"]  # the others are guided decoding, which a client could make arbitrarily dear


_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Body(_Strict):
    """What a request may say. Every optional field may be null, which is as good as not there."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[_Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    # More are more requests: whoever wants them sends them, and the limits count them.
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: _ResponseFormat | None = None
    # Taken since clients send them, and not passed on: they change no answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _together(self) -> _Body:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


_NOT_PASSED_ON = ("user", "metadata", "store", "service_tier", "n", "response_format")


def read_body(raw: bytes) -> dict[str, Any]:
    """The request in a body, with nothing in it but what may be passed on.

    Raises:
        ApiError: it is no JSON, or says something that is not in the list; names the parameter.
    """
    try:
        text = raw.decode("utf-8")
        # Python would take NaN, and half a character written as \ud800, which cannot be encoded again.
        given = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(given, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body of the request is not JSON: {_brief(error)}.", code="invalid_json") from error
    if not isinstance(given, dict):
        raise ApiError(400, "The body of the request must be a JSON object.", code="invalid_json")
    body = _without_nulls(given)
    if isinstance(body.get("messages"), list):
        body["messages"] = [_without_nulls(one) if isinstance(one, dict) else one for one in body["messages"]]
    try:
        _Body.model_validate(body)
    except ValidationError as error:
        raise _refusal(error, body) from error
    for name in _NOT_PASSED_ON:
        body.pop(name, None)
    for message in body["messages"]:
        if message["role"] == "developer":  # OpenAI's newer word, which no chat template here knows
            message["role"] = "system"
    return body


def model_object(listed: Listed) -> dict[str, Any]:
    """A model as `/v1/models` shows it: OpenAI's fields, and facts from its card without any path of this server."""
    return {
        "id": listed.id,
        "object": "model",
        "created": listed.created,
        "owned_by": "lit_ft",
        "root": listed.root,
        "parent": listed.parent,
        "card": facts(listed.card) if listed.card is not None else None,
    }


def facts(card: Card) -> dict[str, Any]:
    """What a card says to everybody."""
    return {
        "name": card.name,
        "version": card.version,
        "created": card.created,
        "base": source_name(card.base.id),
        "algorithm": card.algorithm,
        "peft": card.peft,
        "rank": card.rank,
        "parent": card.parent,
        "data": [{"source": source_name(part.source), "rows": part.rows} for part in card.data],
        # A metric that went wrong is no number, and JSON has no word for it.
        "metrics": {name: value if math.isfinite(value) else None for name, value in card.metrics.items()},
    }


def router(
    gateway: Gateway, fleet: Fleet, keys: Keys | None = None, *, max_body_bytes: int = MAX_BODY_BYTES
) -> APIRouter:
    """The endpoints. `keys` None asks for no key, and a user is then an address."""
    routes = APIRouter()

    def user_of(request: Request) -> str:
        if keys is None:
            return f"peer:{request.client.host if request.client else ''}"
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        owner = keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise ApiError(
                401,
                f"{'This API key is not known here' if key else 'No API key was sent'}: send one as 'Authorization: "
                "Bearer KEY'. Whoever runs this server makes them with python -m serve.accounts key NAME --file "
                "keys.txt, and gives it that file with auth.api_keys=keys.txt.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return f"key:{owner}"

    async def models(request: Request) -> Response:
        try:
            user_of(request)
        except ApiError as error:
            return error.response()
        return JSONResponse({"object": "list", "data": [model_object(one) for one in fleet.listed()]})

    async def model(request: Request) -> Response:
        try:
            user_of(request)
            wanted = request.path_params["model"]
            for one in fleet.listed():
                if one.id == wanted:
                    return JSONResponse(model_object(one))
            raise _unknown_model(fleet, wanted)
        except ApiError as error:
            return error.response()

    async def completions(request: Request) -> Response:
        try:
            user = user_of(request)
            body = read_body(await _received(request, max_body_bytes))
            _check_model(fleet, body["model"])
        except ApiError as error:
            return error.response()
        except ClientDisconnect:
            return Response(status_code=400)  # to nobody
        return _Relay(gateway, fleet, user, body)

    # Plain routes: FastAPI's own would read the body and describe it by themselves.
    routes.add_route("/v1/models", models, methods=["GET"])
    routes.add_route("/v1/models/{model:path}", model, methods=["GET"])
    routes.add_route("/v1/chat/completions", completions, methods=["POST"])
    return routes


class _Relay(Response):
    """Sends the engine's reply on, as it comes, and aborts it when the client goes away."""

    def __init__(self, gateway: Gateway, fleet: Fleet, user: str, body: dict[str, Any]) -> None:
        super().__init__()
        self._gateway, self._fleet, self._user, self._body_sent = gateway, fleet, user, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._work(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Also when this task is cancelled. Waited for: what the reply holds is free when this returns.
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled():
            work.result()

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        streamed = bool(self._body_sent.get("stream"))
        try:
            async with self._gateway.raw(self._user, self._body_sent) as reply:
                if reply.status != 200:
                    raise await _engines_refusal(reply, self._fleet, self._body_sent["model"])
                if streamed:
                    await _relay_events(reply.chunks, send)
                    return
                whole = b"".join([chunk async for chunk in reply.chunks])
            await Response(whole, media_type="application/json")(scope, receive, send)
        except UserError as error:  # before the first byte; after it events deal with their own
            await _as_api_error(error, self._fleet, self._body_sent["model"]).response()(scope, receive, send)


async def _relay_events(chunks: AsyncIterator[bytes], send: Send) -> None:
    """Headers with the first bytes, so that what goes wrong before them is still a proper refusal (UserError)."""
    started, last = False, b""
    try:
        async for chunk in chunks:
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
            if chunk:
                async with asyncio.timeout(STALLED_S):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                last = chunk if len(chunk) > 1 else last[-1:] + chunk
        if not started:
            raise UserError("The engine ended the reply before it began. Try again shortly.")
        end = b""
    except TimeoutError:
        log.info("A client has taken nothing for %.0f s; its reply is ended.", STALLED_S)
        return
    except UserError as error:
        if not started:
            raise
        if not last.endswith(b"\n\n"):
            return  # within an event nothing can be said: the connection breaks, which the client sees
        end = f"data: {json.dumps(_failed(str(error)).body())}\n\n".encode()
    await send({"type": "http.response.body", "body": end, "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _received(request: Request, limit: int) -> bytes:
    """The body, given up as soon as it is too large."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":  # also what keeps a form on another site from being a request here
        raise ApiError(415, f"The body must be sent as 'Content-Type: application/json', not {kind[:100]!r}.")
    too_large = ApiError(413, f"The request is larger than {limit:,} bytes.", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and len(length) < 20 and int(length) > limit:
        raise too_large
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise too_large
    return b"".join(pieces)


def _check_model(fleet: Fleet, model: str) -> None:
    try:
        fleet.resolve(model)
    except UserError as error:
        raise _unknown_model(fleet, model) from error


def _unknown_model(fleet: Fleet, model: str) -> ApiError:
    known = [one.id for one in fleet.listed()]
    shown = ", ".join(known[:50]) + (f" and {len(known) - 50} more" if len(known) > 50 else "")
    return ApiError(
        404,
        f"The model {model[:100]!r} is not served here. There is: {shown or 'nothing yet'}.",
        param="model",
        code="model_not_found",
    )


def _as_api_error(error: UserError, fleet: Fleet, model: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TooMuch):
        if error.retry_after_s is None:
            return ApiError(413, str(error), param="messages", code="request_too_large")
        seconds = max(1, math.ceil(error.retry_after_s))
        return ApiError(
            429, str(error), kind="rate_limit_error", code="rate_limit_exceeded", headers={"Retry-After": str(seconds)}
        )
    try:
        fleet.resolve(model)
    except UserError:  # it was there when the request came, and is retired by now
        return _unknown_model(fleet, model)
    return _failed(str(error))


def _failed(message: str) -> ApiError:
    return ApiError(
        503, message, kind="server_error", code="engine_unavailable", headers={"Retry-After": str(RETRY_ENGINE_S)}
    )


async def _engines_refusal(reply: Reply, fleet: Fleet, model: str) -> ApiError:
    """The engine's own refusal in OpenAI's shape. vLLM writes `code` as a number, and its 401 is not the client's."""
    body = b""
    async for chunk in reply.chunks:
        body += chunk
        if len(body) > MAX_ERROR_BYTES:
            break
    try:
        given = json.loads(body)
        inner = given.get("error", given)
        message, param = str(inner["message"]), inner.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, param = "", None
    if reply.status not in CLIENT_STATUS or not message:
        log.warning("The engine answered %d: %s", reply.status, body[:1000].decode("utf-8", "replace"))
        return _failed("The engine cannot answer at the moment. Try again shortly.")
    if reply.status == 404:
        return _unknown_model(fleet, model)
    code = "context_length_exceeded" if "maximum context length" in message else None
    return ApiError(reply.status, message, param=str(param) if param else None, code=code)


def _refusal(error: ValidationError, body: dict[str, Any]) -> ApiError:
    """The first thing wrong, as OpenAI says it."""
    # A union (text or list) fails in each branch: the deepest one got furthest, and says most.
    found = max(error.errors(include_url=False, include_input=False), key=lambda one: len(_place(one["loc"], body)))
    kind, place = found["type"], _place(found["loc"], body)
    param = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).lstrip(".")[:200]
    message = found["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return ApiError(400, f"Unsupported parameter: {param!r}.", param=param, code="unsupported_parameter")
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: {param!r}.", param=param, code="missing_required_parameter")
    if not place:
        return ApiError(400, f"{message}.", param=message.partition(" ")[0], code="invalid_value")
    return ApiError(400, f"Invalid value for {param!r}: {message}.", param=param, code="invalid_value")


def _place(loc: tuple[int | str, ...], body: Any) -> list[int | str]:
    """Where in the request. Pydantic puts the branches of unions between the keys: they are no keys of the request."""
    place: list[int | str] = []
    here = body
    for number, key in enumerate(loc):
        missing = number == len(loc) - 1 and isinstance(here, dict)
        if missing or (isinstance(here, dict) and key in here) or (isinstance(here, list) and isinstance(key, int)):
            place.append(key)
            here = here.get(key) if isinstance(here, dict) else here[int(key)]
    return place


def _without_nulls(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _brief(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
