"""Who is let in: starting, logins, proxies, other sites' requests and voters' ids; with Gradio's real routes."""

from __future__ import annotations

import asyncio
import logging
import re
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request
from starlette.testclient import TestClient

from lit_ft.errors import UserError
from serve import access, accounts
from serve.access import VOTER_COOKIE, Access, Guard, Login, NoKeys, VoterCookie, Voters, check_access, is_loopback

SECRET = "correct horse"
HOME = "http://127.0.0.1:7860"


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "users.txt"
    accounts.add(path, "ann", SECRET)
    return path


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.txt"
    accounts.make_key(path, "ci")
    return path


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing is tested elsewhere."""
    monkeypatch.setattr(accounts, "COST", (10, 8, 1))


# Starting


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_loopback_needs_nothing(host: str) -> None:
    found = check_access(host)
    assert found.mode == "open" and found.keys is None and found.gradio() == {}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org", "", "127.0.0.1.example.org", "127.1"])
def test_elsewhere_it_refuses_to_start_without_login_and_keys(host: str, users: Path, keys: Path) -> None:
    assert not is_loopback(host)
    with pytest.raises(UserError, match=r"no login.*accounts add"):
        check_access(host)
    with pytest.raises(UserError, match="no login"):
        check_access(host, api_keys=keys)
    with pytest.raises(UserError, match=r"no keys|has no keys"):
        check_access(host, users=users)
    with pytest.raises(UserError, match="has no keys"):
        check_access(host, header="X-User", trusted_proxies=["10.0.0.5"])
    found = check_access(host, users=users, api_keys=keys)
    assert found.mode == "users" and found.keys is not None and found.keys.owner("wrong") is None


def test_a_login_leaves_no_open_api_beside_it(users: Path) -> None:
    assert isinstance(check_access("127.0.0.1", users=users).keys, NoKeys)
    assert isinstance(check_access("127.0.0.1", header="X-User", trusted_proxies=["::1"]).keys, NoKeys)
    assert NoKeys().owner("") is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"users": "users.txt", "header": "X-User", "trusted_proxies": ["::1"]}, "one of them"),
        ({"users": "missing.txt"}, r"does not exist.*accounts"),
        ({"users": "empty.txt"}, r"no users.*accounts add"),
        ({"api_keys": "missing.txt"}, "does not exist"),
        ({"api_keys": "empty.txt"}, r"no keys.*accounts key"),
        ({"header": "X-User"}, "trusted_proxies"),
        ({"header": "X User:", "trusted_proxies": ["::1"]}, "not the name of a header"),
        ({"header": "X-User", "trusted_proxies": ["proxy"]}, "no address"),
        ({"header": "X-User", "trusted_proxies": ["10.0.0.1/8"]}, "no address"),
        ({"header": "X-User", "trusted_proxies": ["0.0.0.0/0"]}, "everybody"),
        ({"header": "X-User", "trusted_proxies": ["::/0"]}, "everybody"),
    ],
)
def test_settings_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, users: Path, settings: dict[str, Any], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("# nobody\n")
    with pytest.raises(UserError, match=says):
        check_access("127.0.0.1", **settings)


# The proxy's word


def request(peer: str | None, *headers: tuple[str, str]) -> Request:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    return Request({"type": "http", "headers": raw, "client": (peer, 5) if peer else None})


def test_only_a_trusted_proxy_says_who_it_is() -> None:
    found = check_access("127.0.0.1", header="X-User", trusted_proxies=["10.0.0.5", "192.168.7.0/24", "fd00::1"])
    name = ("X-User", "ann")
    for peer in ("10.0.0.5", "192.168.7.9", "fd00::1", "::ffff:10.0.0.5"):
        assert found.user_of_header(request(peer, name)) == "ann"
    for peer in ("10.0.0.6", "127.0.0.1", "192.168.8.1", "", None, "unix", "10.0.0.5x"):
        assert found.user_of_header(request(peer, name)) is None
    # That somebody else passed through a proxy changes nothing: the connection counts.
    assert found.user_of_header(request("10.0.0.6", name, ("X-Forwarded-For", "10.0.0.5"))) is None


@pytest.mark.parametrize("values", [[], [""], ["  "], ["ann", "root"], ["a\x00b"], ["x" * 257]])
def test_names_that_a_proxy_should_not_send(values: list[str]) -> None:
    found = check_access("127.0.0.1", header="X-User", trusted_proxies=["10.0.0.5"])
    assert found.user_of_header(request("10.0.0.5", *(("x-user", value) for value in values))) is None


def test_the_address_behind_a_proxy() -> None:
    found = check_access("127.0.0.1", header="X-User", trusted_proxies=["10.0.0.5"])

    def peer(direct: str, *forwarded: str) -> str:
        return found.peer(request(direct, *(("X-Forwarded-For", one) for one in forwarded)).scope)

    assert peer("10.0.0.5", "1.1.1.1, 2.2.2.2") == "2.2.2.2"  # the first is what the client claims
    assert peer("10.0.0.5", "1.1.1.1", "2.2.2.2") == "2.2.2.2"
    assert peer("10.0.0.5", "nonsense") == "10.0.0.5" and peer("10.0.0.5") == "10.0.0.5"
    assert peer("10.0.0.6", "1.1.1.1") == "10.0.0.6"


# Logins


class Clock:
    """Seconds, moved by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def attempt(login: Login, name: str, password: str, peer: str = "1.1.1.1") -> bool | int:
    """True or False, or the seconds to wait where it is refused."""
    token = access._peer.set(peer)
    try:
        return asyncio.run(login.check(name, password))
    except HTTPException as error:
        assert error.status_code == 400 and error.headers
        return int(error.headers["Retry-After"])
    finally:
        access._peer.reset(token)


@pytest.fixture
def login(users: Path, monkeypatch: pytest.MonkeyPatch) -> Login:
    monkeypatch.setattr(Login, "PATIENCE_S", 0.0)
    return Login(accounts.Users(users), Clock())


def test_guessing_a_password_is_slow_wherever_it_comes_from(login: Login) -> None:
    tried = [attempt(login, "ann", f"guess {number}", f"2.2.2.{number}") for number in range(11)]
    assert tried == [False] * 10 + [10]
    assert attempt(login, "ann", SECRET, "3.3.3.3") == 10  # a right guess is not told from a wrong one either
    login._by_name._clock.now += 10  # type: ignore[attr-defined]
    assert attempt(login, "ann", SECRET, "3.3.3.3") is True


def test_guessing_names_is_slow_from_one_address(login: Login, caplog: pytest.LogCaptureFixture) -> None:
    tried = [attempt(login, f"name{number}", "guess") for number in range(11)]
    assert tried == [False] * 10 + [10]
    assert attempt(login, "ann", SECRET, "3.3.3.3") is True  # elsewhere they notice nothing
    assert "1.1.1.1" in caplog.text and "guess" not in caplog.text


def test_one_household_is_one_address(login: Login) -> None:
    tried = [attempt(login, f"name{number}", "guess", f"2001:db8::{number + 1:x}") for number in range(11)]
    assert tried[-1] == 10


def test_right_logins_count_for_nothing(login: Login) -> None:
    assert all(attempt(login, "ann", SECRET) is True for _ in range(30))


def test_a_hundred_guesses_at_once_count_as_a_hundred(login: Login) -> None:
    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(login.check("ann", "guess") for _ in range(100)), return_exceptions=True)

    found = asyncio.run(all_at_once())
    assert sum(one is False for one in found) == 10
    assert sum(isinstance(one, HTTPException) for one in found) == 90


def test_a_short_wait_is_a_delay(users: Path) -> None:
    login = Login(accounts.Users(users))
    login._by_name._full_at["ann"] = time.monotonic() + 90.3  # 10 mistakes are 100 s: 0.3 s until the next
    began = time.monotonic()
    assert attempt(login, "ann", SECRET) is True
    assert 0.2 < time.monotonic() - began < 5


# Other sites' requests


@pytest.fixture(scope="module")
def page() -> gr.Blocks:
    with gr.Blocks(analytics_enabled=False) as page:
        box = gr.Textbox()
        box.submit(lambda text: text, box, box, api_name="say")
    return page


def served(page: gr.Blocks, found: Access) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def completions() -> str:
        return "done"

    @app.websocket("/socket")
    async def socket(socket: Any) -> None:
        await socket.accept()
        await socket.close()

    app.add_middleware(VoterCookie)
    app.add_middleware(Guard, access=found)
    return gr.mount_gradio_app(app, page, path="/", **found.gradio())


@pytest.fixture(scope="module")
def local(page: gr.Blocks) -> Iterator[TestClient]:
    with TestClient(served(page, check_access("127.0.0.1")), base_url=HOME, client=("127.0.0.1", 5)) as client:
        yield client


FORBIDDEN = 403
JOIN = "/gradio_api/queue/join"
EVIL = "https://evil.example"


@pytest.mark.parametrize(
    "host", ["127.0.0.1:7860", "localhost:8888", "LOCALHOST", "[::1]:7860", "127.0.0.9", "localhost."]
)
def test_its_own_names_pass(local: TestClient, host: str) -> None:
    assert local.get("/config", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.1.5:7860", "", "127.0.0.1@evil",
     "a b", "[::1", "0.0.0.0:7860", "127.0.0.1:7860, evil"],
)  # fmt: skip
def test_a_name_that_another_site_points_here_does_not(local: TestClient, host: str) -> None:
    """DNS rebinding: to the browser everything is the same origin, but for this name."""
    for method, path in (("GET", "/"), ("GET", "/config"), ("POST", JOIN), ("POST", "/v1/chat/completions")):
        sent = {"Host": host, "Sec-Fetch-Site": "same-origin", "Origin": f"http://{host}" if host.isalnum() else "null"}
        assert local.request(method, path, headers=sent).status_code == FORBIDDEN, (method, path)


def test_names_can_be_allowed() -> None:
    found = check_access("127.0.0.1", names=["Models.lan"])
    assert found.welcomes("models.lan:7860") and found.welcomes("localhost") and not found.welcomes("other.lan")


def test_with_a_login_any_name_will_do(users: Path) -> None:
    found = check_access("127.0.0.1", users=users)
    assert found.welcomes("models.lan") and found.welcomes("")
    assert not check_access("127.0.0.1", users=users, names=["models.lan"]).welcomes("other.lan")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": EVIL},
        {"Origin": "null"},
        {"Origin": "http://localhost:7860"},  # another host than 127.0.0.1 to the browser
        {"Origin": "http://127.0.0.1:3000"},  # another server on this machine
        {"Origin": "http://127.0.0.1"},
        {"Origin": "chrome-extension://127.0.0.1:7860"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},  # a form
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "anything", "Origin": HOME},
    ],
)
@pytest.mark.parametrize("path", [JOIN, "/v1/chat/completions", "/gradio_api/upload", "/login"])
def test_another_site_cannot_post(local: TestClient, path: str, headers: dict[str, str]) -> None:
    answer = local.post(path, headers=headers, json={})
    assert answer.status_code == FORBIDDEN and "Another web site" in answer.json()["error"]["message"]
    assert "access-control-allow-origin" not in answer.headers


def test_another_site_cannot_read(local: TestClient) -> None:
    assert local.get("/config", headers={"Origin": EVIL}).status_code == FORBIDDEN
    assert local.options(JOIN, headers={"Origin": EVIL, "Access-Control-Request-Method": "POST"}).status_code == 403
    for mode, dest in (("no-cors", "image"), ("no-cors", "script"), ("cors", "empty"), ("navigate", "iframe")):
        sent = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
        assert local.get("/", headers=sent).status_code == FORBIDDEN


def test_a_link_from_elsewhere_opens_the_page_but_no_frame_does(local: TestClient) -> None:
    sent = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    answer = local.get("/", headers=sent)
    assert answer.status_code == 200
    assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "headers",
    [
        {},  # curl, the openai library
        {"Origin": HOME},
        {"Origin": HOME, "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"},
        {"Sec-Fetch-Site": "none"},
    ],
)
def test_the_page_itself_and_programs_can(local: TestClient, headers: dict[str, str]) -> None:
    assert local.post("/v1/chat/completions", headers=headers).status_code == 200
    body = {"data": ["hello"], "fn_index": 0, "session_hash": "abc"}
    assert local.post(JOIN, headers=headers, json=body).status_code == 200


def test_default_ports_and_forwarded_names(keys: Path) -> None:
    found = check_access("0.0.0.0", header="X-User", trusted_proxies=["10.0.0.5"], api_keys=keys)

    def passes(peer: str, host: str, origin: str, forwarded: str = "") -> bool:
        sent = [("Host", host), ("Origin", origin)] + ([("X-Forwarded-Host", forwarded)] if forwarded else [])
        return Guard(_nothing, found)._problem({**request(peer, *sent).scope, "method": "POST"}) is None

    assert passes("9.9.9.9", "models.lan", "https://models.lan") and passes("9.9.9.9", "a.org:443", "https://A.org")
    assert not passes("9.9.9.9", "a.org:443", "http://a.org") and not passes("9.9.9.9", "a.org", "https://b.org")
    assert passes("10.0.0.5", "backend:7860", "https://a.org", "a.org")
    assert not passes("9.9.9.9", "backend:7860", "https://a.org", "a.org")  # not the proxy


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    return None


def test_sockets_of_other_sites_are_closed(local: TestClient) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect) as raised, local.websocket_connect("/socket", headers={"Origin": EVIL}):
        pass
    assert raised.value.code == 1008


# With Gradio's own login


def test_gradios_login_page_and_a_file_of_users(page: gr.Blocks, users: Path, keys: Path) -> None:
    found = check_access("0.0.0.0", users=users, api_keys=keys)
    with TestClient(served(page, found), base_url="http://models.lan:7860", client=("5.5.5.5", 5)) as client:
        assert client.get("/config").status_code == 401
        assert client.post(JOIN, json={}).status_code == 401
        for _ in range(2):
            wrong = client.post("/login", data={"username": "ann", "password": "wrong"})
            assert wrong.status_code == 400
        accounts.add(users, "bob", "battery staple")  # no restart
        assert client.post("/login", data={"username": "bob", "password": "battery staple"}).status_code == 200
        assert client.get("/config").status_code == 200
        assert client.get("/config").json()["username"] == "bob"
        assert client.get("/config", headers={"Origin": EVIL}).status_code == FORBIDDEN  # though Gradio would


def test_gradios_login_is_refused_after_many_mistakes(
    page: gr.Blocks, users: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Login, "PATIENCE_S", 0.0)
    found = check_access("0.0.0.0", users=users, api_keys=keys)
    with TestClient(served(page, found), base_url="http://models.lan", client=("5.5.5.5", 5)) as client:
        answers = [client.post("/login", data={"username": f"x{n}", "password": "wrong"}) for n in range(11)]
        assert [one.status_code for one in answers] == [400] * 11
        assert "Too many failed logins" in answers[-1].json()["detail"] and answers[-1].headers["retry-after"]
        assert "Too many" not in answers[9].text


def test_gradio_behind_a_proxy(page: gr.Blocks, keys: Path) -> None:
    found = check_access("0.0.0.0", header="X-User", trusted_proxies=["10.0.0.5"], api_keys=keys)
    app = served(page, found)
    with TestClient(app, base_url="http://a.org", client=("10.0.0.5", 5)) as proxy:
        assert proxy.get("/config").status_code == 401
        assert proxy.get("/config", headers={"X-User": "ann"}).json()["username"] == "ann"
    with TestClient(app, base_url="http://a.org", client=("10.0.0.6", 5)) as other:
        assert other.get("/config", headers={"X-User": "ann"}).status_code == 401
        assert other.post(JOIN, headers={"X-User": "ann"}, json={}).status_code == 401


# Voters


def cookies(answer: httpx.Response) -> list[str]:
    return [one for one in answer.headers.get_list("set-cookie") if one.startswith(VOTER_COOKIE)]


def test_a_page_load_brings_a_cookie_once(page: gr.Blocks) -> None:
    with TestClient(served(page, check_access("127.0.0.1")), base_url=HOME) as client:
        html = {"Accept": "text/html,*/*"}
        (cookie,) = cookies(client.get("/", headers=html))
        assert re.fullmatch(rf"{VOTER_COOKIE}=[\w-]{{43}}; Path=/; Max-Age=31536000; HttpOnly; SameSite=Strict", cookie)
        assert cookies(client.get("/", headers=html)) == []  # the client sends it back
        client.cookies.clear()
        assert cookies(client.get("/config")) == [] and cookies(client.post("/v1/chat/completions")) == []
        assert cookies(client.get("/", headers=html | {"Cookie": f"{VOTER_COOKIE}=forged"})) != []
        client.cookies.clear()
        assert cookies(client.get("/missing", headers=html)) == []
        (secure,) = cookies(client.get("https://127.0.0.1:7860/", headers=html))
        assert "; Secure" in secure


def test_a_link_from_elsewhere_makes_no_second_voter(page: gr.Blocks) -> None:
    """A browser keeps a strict cookie back then; it shows it with what the page itself asks for."""
    with TestClient(served(page, check_access("127.0.0.1")), base_url=HOME) as client:
        link = {"Accept": "text/html", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert cookies(client.get("/", headers=link)) == []
        own = {"Sec-Fetch-Site": "same-origin"}
        assert len(cookies(client.get("/theme.css?v=1", headers=own))) == 1
        assert cookies(client.get("/theme.css?v=1", headers=own)) == []


def test_voters_ids(tmp_path: Path) -> None:
    path = tmp_path / "votes.secret"
    voters = Voters(path)
    cookie = {VOTER_COOKIE: "a" * 43}
    ann, browser = voters.voter_id("ann", {}), voters.voter_id(None, cookie)
    assert re.fullmatch("[0-9a-f]{32}", ann) and ann != browser
    assert voters.voter_id("ann", cookie) == ann  # who has logged in is the same everywhere
    assert voters.voter_id("bob", {}) != ann and voters.voter_id("a" * 43, {}) != browser
    assert Voters(path).voter_id("ann", {}) == ann  # after a restart
    assert Voters(tmp_path / "other.secret").voter_id("ann", {}) != ann  # and nobody else can work it out
    for nothing in ({}, {VOTER_COOKIE: ""}, {VOTER_COOKIE: "x"}, {VOTER_COOKIE: "a" * 43 + "\n"}):
        with pytest.raises(UserError, match="Allow cookies"):
            voters.voter_id(None, nothing)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(one.name for one in tmp_path.iterdir()) == ["other.secret", "votes.secret"]


def test_servers_that_start_together_have_one_secret(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: Voters(tmp_path / "votes.secret").voter_id("ann", {}), range(16)))
    assert len(set(made)) == 1 and [one.name for one in tmp_path.iterdir()] == ["votes.secret"]


@pytest.mark.parametrize("content", [b"", b"abc\n", b"\xff" * 64, b"g" * 64])
def test_a_broken_secret_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "votes.secret"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"votes\.secret"):
        Voters(path)
    assert path.read_bytes() == content
    with pytest.raises(UserError, match="cannot be used"):
        Voters(tmp_path / "missing" / "votes.secret")


def test_nothing_secret_is_logged(login: Login, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        attempt(login, "ann\nforged line", SECRET)
    assert SECRET not in caplog.text and "\nforged line" not in caplog.text


# What the wiring asks


def asking(**headers: str) -> Request:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw, "client": ("127.0.0.1", 1)})


def test_metrics_need_a_key_where_the_api_does(users: Path, tmp_path: Path) -> None:
    key = accounts.make_key(tmp_path / "keys.txt", "prometheus")
    guarded = check_access("0.0.0.0", users=users, api_keys=tmp_path / "keys.txt")
    assert guarded.has_key(asking(authorization=f"Bearer {key}"))
    for header in ("", f"Basic {key}", "Bearer", f"Bearer {key}x", key):
        assert not guarded.has_key(asking(authorization=header))
    assert not check_access("127.0.0.1", users=users).has_key(asking(authorization=f"Bearer {key}"))
    assert check_access("127.0.0.1").has_key(asking())


def test_an_account_that_was_removed_is_no_longer_let_in(users: Path, keys: Path) -> None:
    guarded = check_access("0.0.0.0", users=users, api_keys=keys)
    accounts.add(users, "bob", SECRET)
    assert guarded.still("ann") and guarded.still("bob") and not guarded.still(None)
    accounts.remove(users, "bob")
    assert guarded.still("ann") and not guarded.still("bob")
    assert check_access("127.0.0.1").still(None)
