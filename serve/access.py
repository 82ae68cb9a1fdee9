"""Who is asking, and whether they may: logins, the proxy's word, voters' ids, and requests that other pages make."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from lit_ft.errors import UserError
from serve.accounts import ApiKeys, Users
from serve.limits import Rate

if TYPE_CHECKING:
    from fastapi import Request

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_USER = 256
VOTER_COOKIE = "lit_ft_voter"
VOTER_COOKIE_S = 365 * 24 * 3600
_VOTER = re.compile(r"[A-Za-z0-9_-]{43}")
_HEADER = re.compile(r"[A-Za-z0-9-]+")

_peer: ContextVar[str] = ContextVar("peer", default="")
"""Where the request comes from that is being answered: Gradio tells a login nothing but name and password."""


class NoKeys:
    """Accepts no key: the API of a server that has a login, and no file of keys."""

    def owner(self, key: str) -> str | None:
        """Nobody's."""
        return None


@dataclass(frozen=True)
class Access:
    """Who may come in, as decided by `check_access` at the start."""

    mode: Literal["open", "users", "header"]
    """Open (loopback without a login), a file of users, or a name from a trusted proxy."""

    keys: ApiKeys | NoKeys | None
    """What the API asks for; None is nothing."""

    users: Users | None = None
    header: str = ""
    trusted_proxies: tuple[Network, ...] = ()
    names: frozenset[str] | None = None
    """Host names that requests may use; None is any."""

    def gradio(self) -> dict[str, Any]:
        """Arguments for `gr.mount_gradio_app`."""
        if self.users is not None:
            return {"auth": Login(self.users).check}
        if self.mode == "header":
            return {"auth_dependency": self.user_of_header}
        return {}

    def user_of_header(self, request: Request) -> str | None:
        """Whom the proxy says it is; None where anybody else says so.

        The connection's own address counts, so uvicorn must run with `proxy_headers=False`: by default it puts what
        X-Forwarded-For says in its place.
        """
        if not self.trusts(request.client.host if request.client else ""):
            return None
        given = request.headers.getlist(self.header)
        if len(given) != 1:  # none; or the client's own beside the proxy's
            return None
        user = given[0].strip()
        return user if 0 < len(user) <= MAX_USER and user.isprintable() else None

    def has_key(self, request: Request) -> bool:
        """Whether it brings an API key, or none is asked for."""
        if self.keys is None:
            return True
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self.keys.owner(key.strip()) is not None

    def still(self, user: str | None) -> bool:
        """Whether who logged in once still has an account: Gradio's logins last until the server ends."""
        return self.users is None or (user is not None and user in self.users)

    def account(self, user: str) -> object | None:
        """Changes with the user's password; None where there is no account (any more)."""
        return user if self.users is None else self.users.get(user)

    def trusts(self, peer: str) -> bool:
        """Whether this address is a trusted proxy's."""
        address = _address(peer)
        return address is not None and any(address in network for network in self.trusted_proxies)

    def peer(self, scope: Scope) -> str:
        """The address of the client: the connection's, or what a trusted proxy says last."""
        direct = scope["client"][0] if scope.get("client") else ""
        if self.trusts(direct):
            forwarded = _headers(scope, b"x-forwarded-for")[-1:]
            last = forwarded[0].rpartition(",")[2].strip() if forwarded else ""  # what is before may be the client's
            if _address(last) is not None:
                return last
        return direct

    def welcomes(self, host: str) -> bool:
        """Whether a request may name this server so, in its Host header."""
        if self.names is None:
            return True
        name = _host_name(host)
        return name is not None and (name in self.names or is_loopback(name))


def is_loopback(host: str) -> bool:
    """Whether it is this machine talking to itself."""
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def check_access(
    host: str,
    *,
    users: str | Path | None = None,
    header: str | None = None,
    trusted_proxies: Sequence[str] = (),
    api_keys: str | Path | None = None,
    names: Sequence[str] = (),
) -> Access:
    """Who may come in where the server listens on `host`.

    Args:
        host: the address to listen on.
        users: file of hashed passwords: people log in on a page.
        header: name of the header in which a proxy puts the name of whoever has logged in there.
        trusted_proxies: addresses or networks (`10.0.0.5`, `10.0.0.0/24`) whose header is believed.
        api_keys: file of hashed API keys.
        names: names that the server is reached by; on loopback its own are always among them, elsewhere none given
            means any.

    Raises:
        UserError: others could reach it and there is no login or no keys, or a setting cannot be used.
    """
    local = is_loopback(host)
    if users and header:
        raise UserError("auth.users and auth.header are two ways to log in: give one of them.")
    if not local and not users and not header:
        raise UserError(
            f"host={host} is not a loopback address, so others could reach the page, and there is no login yet. Make a "
            "file of users (python -m serve.accounts add NAME --file users.txt) and give it with auth.users=users.txt, "
            "or use host=127.0.0.1, and from elsewhere an SSH tunnel (ssh -L 7860:127.0.0.1:7860 MACHINE)."
        )
    if not local and not api_keys:
        raise UserError(
            f"host={host} is not a loopback address, so others could reach the API, and it has no keys. Make one "
            "(python -m serve.accounts key NAME --file keys.txt) and give the file with auth.api_keys=keys.txt."
        )
    proxies = tuple(_network(text) for text in trusted_proxies)
    if header:
        if not _HEADER.fullmatch(header):
            raise UserError(f"auth.header={header!r} is not the name of a header, such as X-Forwarded-User.")
        if not proxies:
            raise UserError(
                f"auth.header={header}: anybody could send that header. Say whose is believed: "
                "auth.trusted_proxies=[ADDRESS], the proxy's address as this machine sees it."
            )
    known = Users(Path(users)) if users else None
    if known is not None and not known:
        raise UserError(f"{users} holds no users. Add one: python -m serve.accounts add NAME --file {users}")
    keys: ApiKeys | NoKeys | None = ApiKeys(Path(api_keys)) if api_keys else None
    if isinstance(keys, ApiKeys) and not keys:
        raise UserError(f"{api_keys} holds no keys. Make one: python -m serve.accounts key NAME --file {api_keys}")
    if keys is None and (users or header):
        keys = NoKeys()  # an open API would be a way around the login
    return Access(
        mode="users" if users else "header" if header else "open",
        keys=keys,
        users=known,
        header=header or "",
        trusted_proxies=proxies,
        # With a login another name gains nothing, since the cookie of the login is not sent to it.
        names=frozenset(name.lower() for name in names) if names or not (users or header) else None,
    )


class Login:
    """Checks a name and a password for Gradio's login page, and makes guessing slow."""

    AT_ONCE = 2
    """Passwords hashed at the same time: each takes 16 MiB and a processor."""

    PATIENCE_S = 5.0
    """A login that has to wait no longer than this is delayed, else refused."""

    def __init__(self, users: Users, clock: Callable[[], float] = time.monotonic) -> None:
        self._users = users
        # Ten mistakes are forgiven, then one for each 10 s. By name: some thousands of guesses a day at most, from
        # wherever they come. By address: the names are many, and so is the work of hashing.
        self._by_name = Rate(6, burst=10, clock=clock)
        self._by_peer = Rate(6, burst=10, clock=clock)
        self._turn = asyncio.Semaphore(self.AT_ONCE)

    async def check(self, name: str, password: str) -> bool:
        """Whether they may come in.

        Raises:
            HTTPException: too many mistakes by this name or from this address. Status 400, the only one of which
                Gradio's login page shows anything.
        """
        # The length is anybody's choice, and the tables keep 100,000 of them.
        name, peer = name[: MAX_USER + 1], _household(_peer.get())
        wait = max(self._by_name.wait_s(name), self._by_peer.wait_s(peer))
        if wait > self.PATIENCE_S:
            from fastapi import HTTPException

            log.warning("Login of %r from %s refused: too many mistakes.", name, peer or "?")
            seconds = math.ceil(wait)
            raise HTTPException(
                400, f"Too many failed logins. Try again in {seconds} seconds.", {"Retry-After": str(seconds)}
            )
        # Counted beforehand and given back when it was right: a hundred guesses at once must count as a hundred.
        self._by_name.count(name)
        self._by_peer.count(peer)
        if wait:
            await asyncio.sleep(wait)
        async with self._turn:
            right = await asyncio.to_thread(self._users.verify, name, password)
        if right:
            self._by_name.refund(name)
            self._by_peer.refund(peer)
        else:
            log.warning("Failed login of %r from %s.", name, peer or "?")
        return right


class Guard:
    """ASGI middleware: refuses what a page elsewhere makes a browser send, and remembers where a request is from.

    A server on loopback has no login, but every web page that its user opens can send requests to it: directly
    (cross-site), or by a name of its own that resolves to 127.0.0.1 (DNS rebinding). Browsers say so in headers that a
    page cannot change, Origin, Sec-Fetch-* and Host; programs send neither of the first two, and pass.
    """

    def __init__(self, app: App, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        problem = self._problem(scope)
        if problem is not None:
            await _refuse(scope, receive, send, problem)
            return
        token = _peer.set(self._access.peer(scope))
        try:
            await self._app(scope, receive, _unframed(send))
        finally:
            _peer.reset(token)

    def _problem(self, scope: Scope) -> str | None:
        host = _header(scope, b"host")
        if not self._access.welcomes(host):
            return (
                f"This server does not go by the name {host[:100]!r}. On its own machine open it as localhost or "
                "127.0.0.1; whoever started it can allow other names (auth.names)."
            )
        if self._foreign(scope, host):
            return "Another web site made this request; this server answers its own page, and programs, only."
        return None

    def _foreign(self, scope: Scope, host: str) -> bool:
        site = _header(scope, b"sec-fetch-site")
        if site in ("same-origin", "none"):  # none: typed, or a bookmark
            return False
        if site:
            # A link to the page is fine; a frame around it is not, nor a script's, image's or form's request.
            return not (
                scope.get("method") in ("GET", "HEAD")
                and _header(scope, b"sec-fetch-mode") == "navigate"
                and _header(scope, b"sec-fetch-dest") in ("document", "")
            )
        origin = _header(scope, b"origin")
        if not origin:
            return False
        hosts = {host}
        if self._access.trusts(scope["client"][0] if scope.get("client") else ""):
            hosts.add(_header(scope, b"x-forwarded-host"))  # a proxy may put its own name into Host
        return not any(_same(origin, name) for name in hosts if name)


class Voters:
    """Opaque ids of whoever votes: the same for the same person, and nobody's name."""

    def __init__(self, secret_path: Path) -> None:
        """Makes the secret at its first use, beside the votes: with another one, old votes are strangers'.

        Raises:
            UserError: it cannot be read or written.
        """
        self._secret = _secret(Path(secret_path))

    def voter_id(self, user: str | None, cookies: Mapping[str, str]) -> str:
        """Of a logged-in user by the name, else of a browser by its cookie (see `VoterCookie`).

        Raises:
            UserError: there is neither.
        """
        if user:
            return self._digest("user", user)
        cookie = cookies.get(VOTER_COOKIE, "")
        if not _VOTER.fullmatch(cookie):
            raise UserError(
                "Your browser does not keep this page's cookie, so your vote could not be told from those of others. "
                "Allow cookies for this page, and load it again."
            )
        return self._digest("cookie", cookie)

    def _digest(self, kind: str, value: str) -> str:
        return hmac.new(self._secret, f"{kind}\0{value}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:32]


class VoterCookie:
    """ASGI middleware for the open mode: gives each browser a random cookie when it loads the page."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or not _loads_page(scope) or _has_cookie(scope):
            await self._app(scope, receive, send)
            return
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookie = (
            f"{VOTER_COOKIE}={secrets.token_urlsafe(32)}; Path=/; Max-Age={VOTER_COOKIE_S}; "
            f"HttpOnly; SameSite=Strict{secure}"
        )

        async def send_with_cookie(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                headers = [*message.get("headers", []), (b"set-cookie", cookie.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_with_cookie)


def _loads_page(scope: Scope) -> bool:
    site = _header(scope, b"sec-fetch-site")
    if scope["path"].endswith("/theme.css"):
        # Gradio asks for it once for each load. By then a browser that came by a link from elsewhere shows its cookie,
        # which with SameSite=Strict it does not when it asks for the page: a new one would be another voter.
        return site in ("", "same-origin")
    return "text/html" in _header(scope, b"accept") and site in ("", "same-origin", "none")


def _has_cookie(scope: Scope) -> bool:
    try:
        morsel = SimpleCookie(_header(scope, b"cookie")).get(VOTER_COOKIE)
    except CookieError:
        return False
    return morsel is not None and _VOTER.fullmatch(morsel.value) is not None


def _secret(path: Path) -> bytes:
    try:
        if not path.exists():
            # Whole before it has its name, and the first one stays: two servers may start on one votes file.
            beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write(secrets.token_hex(32) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):
                    os.link(beside, path)
            finally:
                beside.unlink()
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, the secret behind the voters' ids, cannot be used: {error}.") from error
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise UserError(
            f"{path} should hold the secret behind the voters' ids, 64 hexadecimal digits. Put the file back from a "
            "backup; or delete it, and everybody who has voted counts as a new voter."
        )
    return bytes.fromhex(text)


def _unframed(send: Send) -> Send:
    async def send_unframed(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            # A page elsewhere that shows ours in a frame could make people click on what they do not see.
            headers = [*message.get("headers", []), (b"content-security-policy", b"frame-ancestors 'self'")]
            message = {**message, "headers": headers}
        await send(message)

    return send_unframed


async def _refuse(scope: Scope, receive: Receive, send: Send, problem: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": problem[:100]})
        return
    error = {"message": problem, "type": "invalid_request_error", "param": None, "code": "forbidden"}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _headers(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _header(scope: Scope, name: bytes) -> str:
    """The header's value, the first one's if there are several; "" if none."""
    return next(iter(_headers(scope, name)), "")


def _household(peer: str) -> str:
    """The address, of IPv6 its network: one customer has all addresses of a /64."""
    address = _address(peer)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(address), 64), strict=False))
    return peer


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    # What listens on :: sees IPv4 clients so.
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise UserError(f"auth.trusted_proxies: {text!r} is no address or network: {error}.") from error
    if network.prefixlen == 0:
        raise UserError(f"auth.trusted_proxies: with {text} everybody is trusted to be anybody. Name the proxy.")
    return network


def _host_name(host: str) -> str | None:
    """`localhost:7860` -> `localhost`; None where it is no name of a host."""
    try:
        name = urlsplit(f"//{host}").hostname if re.fullmatch(r"[A-Za-z0-9.:\[\]_-]+", host) else None
    except ValueError:
        return None
    return name.removesuffix(".") if name else None


def _same(origin: str, host: str) -> bool:
    """Whether a page of that origin is this host's own. The scheme is not known here, as a proxy may do the TLS."""
    scheme, _, netloc = origin.lower().partition("://")
    if scheme not in ("http", "https") or not netloc:
        return False  # null: a page in a sandbox, or a file
    host = host.lower()
    return netloc == host or f"{netloc}:{443 if scheme == 'https' else 80}" == host
