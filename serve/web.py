"""The web server: the pages, the OpenAI-compatible endpoint, health and metrics on one port, in this event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_ft.adapter import REPORT
from lit_ft.errors import UserError
from serve.fleet import Fleet
from serve.metrics import Metrics
from serve.theme import CSS, theme

LIVE_JS = Path(__file__).with_name("live.js")

GRACE_S = 3
"""How long open connections have to end when the server stops: a page keeps one open for ever."""


POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "worker-src 'self' blob:; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""Nothing is fetched from, or sent to, another host, whatever a reply makes of the page (Mermaid draws pictures)."""


class Inside:
    """ASGI middleware that tells browsers the policy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), policy]}
            await send(message)

        await self._app(scope, receive, tell if scope["type"] == "http" else send)


class LoggedOut:
    """ASGI middleware that ends the logins of accounts that are gone or have another password since.

    Gradio's own last until the server ends.
    """

    INTERVAL_S = 1.0

    def __init__(
        self, app: ASGIApp, logins: Callable[[], dict[str, str]], account: Callable[[str], object | None]
    ) -> None:
        self._app, self._logins, self._account = app, logins, account
        self._looked = -self.INTERVAL_S
        self._seen: dict[str, object] = {}
        """The account behind each login, as it was when the login was first seen."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if time.monotonic() - self._looked >= self.INTERVAL_S:
            self._looked = time.monotonic()
            self._end()
        await self._app(scope, receive, send)

    def _end(self) -> None:
        logins = self._logins()
        now = {user: self._account(user) for user in set(logins.values())}
        self._seen = {token: self._seen.get(token, now[user]) for token, user in logins.items()}
        for token in [token for token, user in logins.items() if now[user] is None or now[user] != self._seen[token]]:
            del logins[token], self._seen[token]


class Bounded:
    """ASGI middleware that refuses bodies which nothing here would take."""

    MAX_BYTES = 4 << 20

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.MAX_BYTES:
            return await Response("The request is too large.", 413)(scope, receive, send)
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            # One without a length, sent in chunks: to those who read it, its sender has gone.
            return {"type": "http.disconnect"} if size > self.MAX_BYTES else message

        await self._app(scope, counted, send)


def assemble(
    page: gr.Blocks,
    fleet: Fleet,
    metrics: Metrics,
    *,
    routers: Sequence[APIRouter] = (),
    may_read_metrics: Callable[[Request], bool] = lambda request: True,
    middleware: Sequence[tuple[type, dict[str, Any]]] = (),
    login: Mapping[str, Any] | None = None,
    account: Callable[[str], object | None] = lambda user: user,
) -> FastAPI:
    """All of it as one application.

    Args:
        page: the Gradio pages, mounted at `/`.
        fleet: for health and the revision.
        metrics: for `/metrics`.
        routers: come before the pages.
        may_read_metrics: whether a request may see `/metrics`.
        middleware: ASGI middleware and its arguments, the outermost first.
        login: Gradio's arguments for it (`Access.gradio`); None asks for none.
        account: what is known of a user who has logged in; when it changes, or is None, their logins end.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def health() -> Response:
        """Open to all, so it says no more than this."""
        return JSONResponse({"status": "ok" if fleet.up else "engine restarting"}, 200 if fleet.up else 503)

    @app.get("/revision")
    async def revision() -> Response:
        """Grows with each change that the pages show; `live.js` asks for it every second."""
        return JSONResponse({"revision": fleet.revision}, headers={"Cache-Control": "no-store"})

    @app.get("/metrics")
    async def prometheus(request: Request) -> Response:
        if not may_read_metrics(request):
            return Response("An API key is needed: Authorization: Bearer KEY\n", 401, {"WWW-Authenticate": "Bearer"})
        metrics.engine_up(fleet.up)
        return Response(metrics.text(), media_type=metrics.content_type)

    @app.get("/report/{ref}")
    async def report(ref: str, request: Request) -> Response:
        """The report on an adapter, for whoever may see the pages: it quotes its data."""
        if not _may_see_pages(request, login or {}, gradio.tokens):
            return Response("Log in first.\n", 401)
        version = fleet.get(ref)
        page = version.adapter.path / REPORT / "report.html" if version and version.adapter else None
        if page is None or not page.is_file():
            return Response("There is no report on that version.\n", 404)
        return FileResponse(page, media_type="text/html", headers={"Cache-Control": "no-store"})

    for router in routers:
        app.include_router(router)
    script = LIVE_JS.read_text(encoding="utf-8")
    app = gr.mount_gradio_app(
        app,
        page,
        path="/",
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        **(login or {}),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        allowed_paths=[],
        show_error=False,
        max_file_size="1kb",  # nothing here takes a file
        theme=theme(),
        css_paths=[CSS],
        head=f"<script>{script}</script>",
    )
    gradio: Any = next(route.app for route in app.routes if isinstance(route, Mount))
    if (login or {}).get("auth"):
        app.add_middleware(LoggedOut, logins=lambda: gradio.tokens, account=account)
    app.add_middleware(Bounded)
    app.add_middleware(Inside)
    for kind, arguments in reversed(middleware):
        app.add_middleware(kind, **arguments)
    return app


def _may_see_pages(request: Request, login: Mapping[str, Any], tokens: Mapping[str, str]) -> bool:
    """As Gradio decides it: `tokens` are its logins, whose cookies are named `access-token…`."""
    if "auth_dependency" in login:
        return login["auth_dependency"](request) is not None
    if not login.get("auth"):
        return True
    return any(name.startswith("access-token") and value in tokens for name, value in request.cookies.items())


class Server(uvicorn.Server):
    """Uvicorn without its signal handlers: `serve.__main__` has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them as they are."""
        yield


@contextlib.asynccontextmanager
async def listening(app: FastAPI, host: str, port: int) -> AsyncIterator[None]:
    """Serve until the block ends.

    Raises:
        UserError: the port cannot be had.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        # Longer than pages and clients wait between two requests: what is sent on a connection that is being closed
        # would have to be sent again, and may have been heard the first time.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=GRACE_S,
        # The proxy of `auth.header` is judged by the address of the connection itself.
        proxy_headers=False,
        server_header=False,
    )
    server = Server(config)

    async def serve() -> None:
        try:
            await server.serve()
        except SystemExit as error:  # so uvicorn says that it cannot listen; its log says why
            raise UserError(
                f"The web server cannot listen on {host}:{port}; another program may use it. Give another: port=7861."
            ) from error

    serving = asyncio.create_task(serve())
    try:
        while not server.started:
            if serving.done():
                serving.result()
                raise UserError(f"The web server did not start on {host}:{port}; the log says why.")
            await asyncio.sleep(0.02)
        yield
    finally:
        # What is cut off now was told so; its traceback would tell nobody anything.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        server.should_exit = True
        with contextlib.suppress(Exception):
            await serving
