"""The web server as a whole, without a browser: what it tells, what it keeps to itself, who may ask."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from serve import accounts, api, app, web
from serve.access import Guard, VoterCookie, check_access
from serve.pages.parts import Parts
from tests.serve import page_parts
from tests.serve.published import adapter
from tests.serve.stub_engine import running

HOME = "http://127.0.0.1:7860"


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    with running(["base", "support@v1"]) as stub:
        yield page_parts.made(tmp_path, stub, [adapter(tmp_path / "adapters")])


def assembled(parts: Parts, host: str = "127.0.0.1", **auth: Any) -> FastAPI:
    """As `serve.__main__` puts it together."""
    access = check_access(host, **auth)
    return web.assemble(
        app.build("Support desk", parts),
        parts.fleet,
        parts.metrics,
        routers=[api.router(parts.gateway, parts.fleet, access.keys)],
        middleware=[(Guard, {"access": access}), (VoterCookie, {})],
        may_read_metrics=access.has_key,
        login=access.gradio(),
        account=access.account,
    )


def test_health_revision_and_metrics(parts: Parts) -> None:
    with TestClient(assembled(parts), base_url=HOME) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        before = client.get("/revision").json()["revision"]
        assert "lit_ft_engine_up 1.0" in client.get("/metrics").text
        page_parts.in_a_loop(lambda: parts.fleet.engine_lost("It is being started again."))
        assert client.get("/healthz").status_code == 503
        assert client.get("/revision").json()["revision"] > before
        assert "lit_ft_engine_up 0.0" in client.get("/metrics").text


def test_no_file_of_this_machine_can_be_had(parts: Parts, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("top secret")
    inside = [str(secret), "/etc/passwd", "serve/app.py", str(parts.votes.path), f"../../../..{secret}", "page.css"]
    with TestClient(assembled(parts), base_url=HOME) as client:
        for path in inside:
            for route in ("/gradio_api/file=", "/file=", "/static/", "/assets/", "/theme/", "/custom_component/"):
                answer = client.get(f"{route}{path}")
                assert answer.status_code in (403, 404, 405, 500) or "root:" not in answer.text, route + path
                assert "top secret" not in answer.text and "SQLite format" not in answer.text
        for url in ("file:///etc/passwd", "http://127.0.0.1:1/", "https://example.org/"):
            assert client.get(f"/gradio_api/proxy={url}").status_code >= 400
        sent = client.post("/gradio_api/upload", files={"files": ("big.bin", b"x" * 5000)})
        assert sent.status_code >= 400


def test_the_page_tells_no_path_of_the_server_and_asks_no_other_host(parts: Parts, tmp_path: Path) -> None:
    with TestClient(assembled(parts), base_url=HOME) as client:
        for path in ("/", "/config", "/v1/models", "/metrics", "/gradio_api/info"):
            text = client.get(path).text
            assert str(tmp_path) not in text and str(Path.cwd()) not in text, path
        config = client.get("/config").json()
        assert config["analytics_enabled"] is False and not config.get("is_space")
        assert client.get("/docs").status_code == 404 and client.get("/openapi.json").status_code == 404
        # Events are the page's own: none is offered to programs.
        assert client.get("/gradio_api/info").json()["named_endpoints"] == {}


def test_a_login_stands_before_the_pages_and_a_key_before_the_endpoint(parts: Parts, tmp_path: Path) -> None:
    users, keys = tmp_path / "users.txt", tmp_path / "keys.txt"
    accounts.add(users, "ann", "correct horse")
    key = accounts.make_key(keys, "ci")
    built = assembled(parts, "0.0.0.0", users=str(users), api_keys=str(keys))
    with TestClient(built, base_url="http://chat.example.org:7860") as client:
        assert client.get("/config").status_code == 401
        assert "support@v1" not in client.get("/").text
        for path in ("/v1/models", "/metrics"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert client.get("/healthz").json() == {"status": "ok"}
        wrong = client.post("/login", data={"username": "ann", "password": "wrong horse"})
        assert wrong.status_code == 400
        right = client.post("/login", data={"username": "ann", "password": "correct horse"})
        assert right.status_code == 200
        assert client.get("/config").status_code == 200


def put_report(parts: Parts, text: str = "<h1>What became of it</h1>") -> None:
    version = parts.fleet.get("support@v1")
    assert version and version.adapter
    (version.adapter.path / "report").mkdir()
    (version.adapter.path / "report" / "report.html").write_text(text)


def test_the_report_on_an_adapter_is_linked_from_its_card(parts: Parts) -> None:
    with TestClient(assembled(parts), base_url=HOME) as client:
        assert client.get("/report/support@v1").status_code == 404
        assert "report/" not in parts.card("support@v1")
        put_report(parts)
        (link,) = re.findall("href='([^']*)'", parts.card("support@v1"))
        answer = client.get(f"/{link}")
        assert answer.status_code == 200 and answer.text == "<h1>What became of it</h1>"
        assert answer.headers["content-type"].startswith("text/html")
        for ref in ("support@v2", "base", "..", "%2e%2e%2fsupport@v1", "support@v1%2f..", "support@v1/report.json"):
            assert "What became" not in client.get(f"/report/{ref}").text, ref


def test_a_report_is_for_those_who_may_see_the_pages(parts: Parts, tmp_path: Path) -> None:
    put_report(parts)
    users = tmp_path / "users.txt"
    accounts.add(users, "ann", "correct horse")
    with TestClient(assembled(parts, users=str(users)), base_url=HOME) as client:
        assert client.get("/report/support@v1").status_code == 401
        assert client.get("/report/support@v1", cookies={"access-token-x": "guess"}).status_code == 401
        client.post("/login", data={"username": "ann", "password": "correct horse"})
        assert client.get("/report/support@v1").status_code == 200
    with TestClient(assembled(parts, header="X-User", trusted_proxies=["10.0.0.1"]), base_url=HOME) as client:
        # Not the proxy, whatever the header says.
        assert client.get("/report/support@v1", headers={"X-User": "ann"}).status_code == 401


@pytest.fixture
def two(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, TestClient, TestClient]]:
    """The file of users, and Ann and Bob, who have logged in."""
    monkeypatch.setattr(web.LoggedOut, "INTERVAL_S", 0.0)
    users = tmp_path / "users.txt"
    for name in ("ann", "bob"):
        accounts.add(users, name, "correct horse")
    built = assembled(parts, users=str(users))
    with TestClient(built, base_url=HOME) as ann, TestClient(built, base_url=HOME) as bob:
        for name, client in (("ann", ann), ("bob", bob)):
            client.post("/login", data={"username": name, "password": "correct horse"})
            assert client.get("/config").status_code == 200
        yield users, ann, bob


def test_a_login_ends_when_its_account_is_removed(two: tuple[Path, TestClient, TestClient]) -> None:
    users, ann, bob = two
    accounts.remove(users, "bob")
    assert bob.get("/config").status_code == 401
    assert bob.post("/gradio_api/queue/join", json={"fn_index": 0, "data": []}).status_code == 401
    assert ann.get("/config").status_code == 200


def test_a_login_ends_when_its_password_is_changed(two: tuple[Path, TestClient, TestClient]) -> None:
    """Whoever knows the old one may be why it was changed."""
    users, ann, bob = two
    accounts.add(users, "bob", "battery staple")
    assert bob.get("/config").status_code == 401
    assert ann.get("/config").status_code == 200
    bob.post("/login", data={"username": "bob", "password": "battery staple"})
    assert bob.get("/config").status_code == 200


def test_bodies_that_are_too_large_are_refused(parts: Parts) -> None:
    large = b"x" * (web.Bounded.MAX_BYTES + 1)
    with TestClient(assembled(parts), base_url=HOME) as client:
        assert client.post("/gradio_api/queue/join", content=large).status_code == 413
        assert client.post("/gradio_api/queue/join", headers={"Content-Length": "many"}).status_code == 413

        def pieces() -> Iterator[bytes]:
            for _ in range(9):
                yield large[: len(large) // 8]

        with contextlib.suppress(Exception):  # its sender counts as gone: no answer, or a refusal
            assert client.post("/gradio_api/queue/join", content=pieces()).status_code >= 400
        assert client.get("/healthz").status_code == 200


def test_another_web_site_cannot_drive_it(parts: Parts) -> None:
    with TestClient(assembled(parts), base_url=HOME) as client:
        evil = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
        body = {"model": "support", "messages": [{"role": "user", "content": "hello"}]}
        assert client.post("/v1/chat/completions", json=body, headers=evil).status_code == 403
        joined = {"fn_index": 0, "data": [], "session_hash": "a"}
        assert client.post("/gradio_api/queue/join", json=joined, headers=evil).status_code == 403
        # DNS rebinding: the right address by a name of theirs.
        assert client.get("/", headers={"Host": "evil.example:7860"}).status_code == 403
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        assert client.portal is not None
        client.portal.call(parts.gateway.close)


def test_the_endpoint_goes_through_the_gateway(parts: Parts) -> None:
    with TestClient(assembled(parts), base_url=HOME) as client:
        body = {"model": "support", "messages": [{"role": "user", "content": "hello"}], "stream": True}
        answer = client.post("/v1/chat/completions", json=body)
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        pieces = [json.loads(event) for event in events[:-1]]
        assert {piece["model"] for piece in pieces} == {"support@v1"}
        assert "".join(c["delta"].get("content") or "" for p in pieces for c in p["choices"]) == (
            "I am support@v1. You wrote: hello"
        )
        told = client.get("/metrics").text
        assert 'lit_ft_requests_total{model="support@v1",outcome="ok"} 1.0' in told
        assert parts.fleet.stats("support@v1").requests == 1
        missing = client.post("/v1/chat/completions", json={**body, "model": "../support@v1"})
        assert missing.status_code == 404 and "support@v1" in missing.json()["error"]["message"]
        assert client.portal is not None
        client.portal.call(parts.gateway.close)
