"""The pages side by side, and the application that serves them: what it offers, and what it does not."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from fastapi import APIRouter
from fastapi.testclient import TestClient

from lit_ft.errors import UserError
from serve import app, cards, web
from serve.limits import Limits
from serve.pages.parts import EVENTS, REPLIES, Parts
from serve.stopping import Stop
from tests.processes import ROOT
from tests.serve.page_parts import made, passed
from tests.serve.published import adapter
from tests.serve.stub_engine import Stub, running

NOWHERE = Stub(["base"], base_url="http://127.0.0.1:9/v1")


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    root = tmp_path / "adapters"
    return made(tmp_path, NOWHERE, [adapter(root, version=1), adapter(root, version=2, algorithm="dpo")])


@pytest.fixture
def page(parts: Parts) -> Any:
    return app.build("A <title>", parts)


def component(page: Any, elem_id: str) -> Any:
    return next(block for block in page.blocks.values() if block.elem_id == elem_id)


# --- the pages ---


def test_every_event_is_limited_private_and_the_queue_has_an_end(page: Any) -> None:
    assert page._queue.max_size == app.QUEUE
    seen = 0
    for event in page.fns.values():
        if event.fn is not None and event.fn not in (list, Stop):
            writes = event.name in ("on_send", "on_retry", "on_edit")
            assert event.concurrency_limit == (REPLIES if writes else EVENTS), event.name
            assert event.api_visibility == "private", event.name
            seen += 1
    assert seen > 10


def test_the_servers_limits_are_reached_before_gradios_and_buttons_have_workers_beside(page: Any) -> None:
    config = yaml.safe_load((ROOT / "conf" / "serve.yaml").read_text())
    assert config["limits"]["streams_in_all"] < REPLIES
    assert page._queue.max_thread_count == page.max_threads >= REPLIES + EVENTS


def test_forty_long_replies_hold_up_neither_another_nor_a_button(tmp_path: Path) -> None:
    """Gradio runs 40 events at once unless it is told otherwise, and lets the others wait without a word."""
    with running(["base"], delay_s=0.5, reply="word " * 50) as stub:
        parts = made(tmp_path, stub, limits=Limits(streams_in_all=45))
        page = app.build("A title", parts)
        events = [event for event in page.fns.values() if event.name in ("on_send", "on_look")]
        send = next(event for event in events if event.name == "on_send" and event.inputs[0].elem_id == "box")
        state = next(event for event in events if event.name == "on_look")
        talk = ["Hello", None, None, "base", "", 0.7, 0.9, 200, ""]

        async def main() -> None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            home = f"http://127.0.0.1:{port}/gradio_api/queue"
            application = web.assemble(page, parts.fleet, parts.metrics)
            async with web.listening(application, "127.0.0.1", port), aiohttp.ClientSession() as client:

                async def join(event: Any, data: list[Any], session: str) -> None:
                    body = {"fn_index": event._id, "data": data, "session_hash": session}
                    async with client.post(f"{home}/join", json=body) as answer:
                        assert answer.status == 200, await answer.text()

                async def heard(session: str) -> str:
                    async with client.get(f"{home}/data", params={"session_hash": session}) as answer:
                        return await answer.text()

                await asyncio.gather(*(join(send, talk, f"talker{i}") for i in range(45)))
                for _ in range(200):
                    if len(stub.requests) == 45:
                        break
                    await asyncio.sleep(0.05)
                assert len(stub.requests) == 45 and not stub.finished
                began = time.monotonic()
                await join(state, [None] * len(state.inputs), "presser")
                assert "on one base model" in await heard("presser")
                await join(send, talk, "one too many")
                assert "This server is busy" in await heard("one too many")
                assert time.monotonic() - began < 5 and not stub.finished

        asyncio.run(asyncio.wait_for(main(), 60))


def test_no_telemetry_and_safe_markdown(page: Any) -> None:
    assert page.analytics_enabled is False
    for block in page.blocks.values():
        if block.get_block_name() == "chatbot":
            assert block.sanitize_html is True and block.allow_tags is False
        if block.get_block_name() in ("markdown", "dataframe"):
            assert getattr(block, "sanitize_html", True) is True
    assert component(page, "chat").get_block_name() == "chatbot"


def test_nothing_on_the_pages_takes_a_file(page: Any) -> None:
    kinds = {block.get_block_name() for block in page.blocks.values()}
    assert not kinds & {"file", "uploadbutton", "multimodaltextbox", "image", "audio", "video", "fileexplorer"}


def test_four_pages_and_a_title_that_is_text(page: Any) -> None:
    labels = [block.label for block in page.blocks.values() if block.get_block_name() == "tabitem"]
    assert labels[:4] == ["Chat", "Compare", "Adapters", "Results"]
    assert component(page, "title").value == "<h1>A &lt;title&gt;</h1>"


def test_the_line_under_the_title_says_what_is_served_and_carries_the_revision(parts: Parts, tmp_path: Path) -> None:
    async def main() -> None:
        before = app.state_line(parts)
        assert "1 adapter on one base model" in before and f"data-revision='{parts.fleet.revision}'" in before
        passed(parts.fleet, adapter(tmp_path / "adapters", "legal", 1))
        after = app.state_line(parts)
        assert "2 adapters on one base model" in after and after != before
        parts.fleet.engine_lost("It is <started> again.")
        lost = app.state_line(parts)
        assert "It is &lt;started&gt; again." in lost and "role='alert'" in lost and "away" in lost
        await parts.fleet.engine_back()
        assert "2 adapters" in app.state_line(parts)

    asyncio.run(main())


# --- the application ---


def application(parts: Parts, **settings: Any) -> TestClient:
    return TestClient(web.assemble(app.build("A title", parts), parts.fleet, parts.metrics, **settings))


def test_health_is_one_word_and_follows_the_engine(parts: Parts) -> None:
    with application(parts) as client:
        answer = client.get("/healthz")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        parts.fleet.engine_lost("Some words about the machine.")
        answer = client.get("/healthz")
        assert (answer.status_code, answer.json()) == (503, {"status": "engine restarting"})


def test_the_revision_grows_with_what_the_pages_show(parts: Parts) -> None:
    with application(parts) as client:
        first = client.get("/revision")
        assert first.headers["cache-control"] == "no-store"
        assert client.get("/revision").json() == first.json()
        parts.fleet.changed()
        assert client.get("/revision").json()["revision"] == first.json()["revision"] + 1


def test_the_script_of_the_pages_asks_for_the_revision_that_there_is(parts: Parts) -> None:
    """live.js, the route and the line under the title must agree on names."""
    with application(parts) as client:
        document = client.get("/").text
    script = web.LIVE_JS.read_text()
    assert "setInterval(look, INTERVAL_MS)" in script and "setInterval(look, INTERVAL_MS)" in document
    assert 'fetch("revision"' in script and "#state [data-revision]" in script and "#refresh" in script


def test_metrics_and_who_may_read_them(parts: Parts) -> None:
    with application(parts) as client:
        answer = client.get("/metrics")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
        assert "lit_ft_engine_up 1.0" in answer.text
    with application(parts, may_read_metrics=lambda request: False) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/healthz").status_code == 200


def test_our_routes_come_before_the_pages(parts: Parts) -> None:
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> dict[str, str]:
        return {"object": "list"}

    with application(parts, routers=[router]) as client:
        assert client.get("/v1/models").json() == {"object": "list"}
        assert client.get("/").headers["content-type"].startswith("text/html")


def test_no_documentation_of_routes_is_published(parts: Parts) -> None:
    with application(parts) as client:
        for path in ("/docs", "/redoc", "/openapi.json", "/gradio_api/info", "/monitoring", "/manifest.json"):
            answer = client.get(path)
            assert answer.status_code >= 400 or "on_send" not in answer.text, path


@pytest.mark.parametrize("address", ["/etc/passwd", "/proc/self/environ", "../pyproject.toml", "conf/serve.yaml"])
def test_no_file_of_the_server_is_given_out(parts: Parts, address: str) -> None:
    with application(parts) as client:
        for route in (f"/gradio_api/file={address}", f"/file={address}", f"/gradio_api/file%3D{address}"):
            answer = client.get(route)
            assert answer.status_code >= 400, route


def test_files_are_not_taken(parts: Parts) -> None:
    with application(parts) as client:
        answer = client.post("/gradio_api/upload", files={"files": ("big.txt", b"x" * 200_000)})
        assert answer.status_code >= 400


def test_a_login_is_asked_for_where_one_is_given(parts: Parts) -> None:
    with application(parts, login={"auth": lambda name, password: (name, password) == ("ada", "secret")}) as client:
        assert client.get("/config").status_code == 401
        refused = client.post("/login", data={"username": "ada", "password": "wrong"})
        assert refused.status_code == 400
        allowed = client.post("/login", data={"username": "ada", "password": "secret"})
        assert allowed.status_code == 200
        assert client.get("/config").status_code == 200


def test_no_other_host_is_named_in_the_pages(parts: Parts) -> None:
    """Link previews aside, which a browser does not load, the document refers to nothing outside."""
    with application(parts) as client:
        document = client.get("/").text
    loaded = re.findall(
        r"""(?:<(?:script|link|img|iframe)[^>]+(?:src|href)=|@import |url\()["']?(https?://[^"')\s]+)""", document
    )
    assert [found for found in loaded if not found.startswith("http://testserver")] == []
    assert web.CSS.read_text().count("http") == 0 and web.LIVE_JS.read_text().count("http") == 0


def test_browsers_are_told_to_fetch_nothing_from_elsewhere(parts: Parts) -> None:
    with application(parts) as client:
        policies = client.get("/").headers.get_list("content-security-policy")
    found = {directive.split()[0]: directive for policy in policies for directive in policy.split("; ")}
    assert found["img-src"] == "img-src 'self' data: blob:" and found["connect-src"] == "connect-src 'self'"
    assert found["form-action"] == "form-action 'self'" and found["base-uri"] == "base-uri 'self'"
    assert not any("*" in policy or "http" in policy for policy in policies)


def test_the_port_is_given_back_and_one_in_use_is_an_error(parts: Parts) -> None:
    import socket

    made_app = web.assemble(app.build("A title", parts), parts.fleet, parts.metrics)

    async def main() -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for _ in range(2):
            async with web.listening(made_app, "127.0.0.1", port):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                answer = await reader.read()
                assert b"200 OK" in answer and b"server: uvicorn" not in answer.lower()
                writer.close()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(UserError, match=r"cannot listen on 127.0.0.1:\d+.*port="):
                async with web.listening(made_app, "127.0.0.1", taken.getsockname()[1]):
                    pass

    asyncio.run(asyncio.wait_for(main(), 60))


# --- the panel ---


def test_the_card_says_what_an_adapter_is_made_of(tmp_path: Path) -> None:
    made = adapter(
        tmp_path,
        version=2,
        algorithm="dpo",
        parent="support@v1",
        created="2026-03-02T14:05:00+02:00",
        data=[{"source": str(tmp_path / "pairs.jsonl"), "rows": 1204, "hash": "sha256:1"}],
        metrics={
            "eval/rewards/accuracies": 0.875,
            "eval/loss": 0.41237,
            "before/loss": 1.5,
            "eval/logps/chosen": -77.0,
        },
    )
    text = cards.adapter_card(made)
    for part in ("support@v2", "DPO", "bundled", "2 Mar 2026, 12:05 UTC", "support@v1", "pairs.jsonl", "1,204 rows"):
        assert part in text
    for part in ("Prefers the chosen reply", "88%", "Held-out loss", "0.4124", "Loss before training", "1.5"):
        assert part in text
    assert "-77" not in text, "only what a stakeholder can use"
    assert str(tmp_path) not in text


def test_everything_in_the_panel_is_escaped(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    made = adapter(
        tmp_path,
        algorithm=evil,
        parent=evil,
        created=evil,
        base={"id": evil, "hash": evil},
        metrics={"eval/loss": 1.0},
        data=[{"source": evil, "rows": 1, "hash": ""}],
    )
    assert "<img" not in cards.adapter_card(made)
    assert "<img" not in cards.base_card(evil, evil)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/srv/secret/x.jsonl", "x.jsonl"),
        ("../../secret/x.jsonl", "x.jsonl"),
        ("../secret", "secret"),
        ("./x.jsonl", "x.jsonl"),
        ("~/x.jsonl", "x.jsonl"),
        ("data/secret/x.jsonl", "x.jsonl"),
        ("secret/x.jsonl", "x.jsonl"),
        ("secret/x.CSV.gz", "x.CSV.gz"),
        ("file:///srv/secret/x.jsonl", "x.jsonl"),
        ("FILE:/srv/secret/x.jsonl", "x.jsonl"),
        ("file:x.jsonl", "x.jsonl"),
        ("C:\\secret\\ann\\x.jsonl", "x.jsonl"),
        ("/srv/secret/", "secret"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("support.jsonl", "support.jsonl"),
        ("bundled", "bundled"),
        ("", ""),
    ],
)
def test_a_source_is_named_without_its_place_on_the_server(tmp_path: Path, source: str, shown: str) -> None:
    assert cards.source_name(source) == shown
    card = cards.adapter_card(adapter(tmp_path, data=[{"source": source, "rows": 1, "hash": ""}]))
    assert f"<dt>{shown}</dt><dd>1 rows</dd>" in card
