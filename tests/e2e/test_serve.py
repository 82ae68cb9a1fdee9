"""The whole server as a person meets it: `python -m serve`, real vLLM, two adapters, a real browser."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lit_ft.adapter import Base, DataSource, Draft, publish
from tests.e2e.visit import Visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [pytest.mark.engine, pytest.mark.browser]


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]
    log: Path

    def children(self) -> list[int]:
        """Every process below the server's, its own included."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except OSError:  # it ended meanwhile
                    continue
        found = [self.process.pid]
        for pid in found:
            found.extend(child for child, parent in parents.items() if parent == pid)
        return found


def publish_adapters(root: Path) -> None:
    """Two adapters that answer visibly otherwise than the base, one broken and one for another base."""
    import torch
    from safetensors.torch import load_file, save_file

    from lit_ft.models.adapt import apply_lora, save_trained
    from lit_ft.models.load import load_model, load_tokenizer
    from lit_ft.models.resolve import model_fingerprint

    base = Base("bundled", model_fingerprint("bundled"))
    tokenizer = load_tokenizer("bundled")

    def draft(algorithm: str, of: Base, rows: int, parent: str | None) -> Draft:
        source = DataSource("support.jsonl", rows, "sha256:0")
        return Draft("support", of, algorithm, "lora", 8, [source], parent, {"eval/loss": 1.25})

    for seed, (algorithm, of, rows, parent) in enumerate(
        [("sft", base, 301, None), ("dpo", base, 202, "support@v1"), ("sft", Base("other", "sha256:1"), 1, None)]
    ):
        torch.manual_seed(seed)
        model = apply_lora(load_model("bundled"), r=8, alpha=8, dropout=0.0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)

        def write(folder: Path, model: object = model) -> None:
            save_trained(model, folder)
            tokenizer.save_pretrained(str(folder))

        publish(root, draft(algorithm, of, rows, parent), write)
    broken = publish(root, draft("sft", base, 1, None), write).path / "adapter_model.safetensors"
    weights = {key: value + 1 for key, value in load_file(broken).items()}
    save_file(weights, broken)


@pytest.fixture(scope="module")
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    publish_adapters(folder / "adapters")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "serve.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", f"port={port}", "max_model_len=512", "title=Wren support"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    assert process.stdout is not None
    line = process.stdout.readline()  # printed when the page is there
    assert line == f"http://127.0.0.1:{port}\n", log.read_text()
    yield Server(line.strip(), process, log)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_a_person_asks_switches_the_adapter_and_asks_again(server: Server, browser: Browser) -> None:
    from playwright.sync_api import expect

    visit = Visit(browser, server.url)
    page = visit.page
    page.set_default_timeout(120_000)
    expect(page).to_have_title("Wren support")
    card = page.locator("#card")
    # The newest adapter is chosen; its card tells where it comes from.
    for part in ("support@v2", "DPO", "202 rows", "support@v1", "1.25"):
        expect(card).to_contain_text(part)
    # A short reply and no chance, so that answers can be compared.
    visit.open_settings()
    page.locator("#temperature input[type=number]").fill("0")
    page.locator("#max-tokens input[type=number]").fill("24")
    question = "How long does charging take?"
    answers = {}
    for label, ref in (("support@v2", "support@v2"), ("support@v1", "support@v1"), ("Base model", "Base model")):
        if ref != "support@v2":
            visit.choose(label)
        if ref == "support@v1":
            for part in ("SFT", "301 rows", "the base"):
                expect(card).to_contain_text(part)
        page.locator("#clear").click()
        expect(visit.messages).to_have_count(0)
        reply = visit.ask(question)
        assert ref in reply and "tokens/s" in reply
        answers[ref] = reply.splitlines()[0]
    assert len(set(answers.values())) == 3, answers
    # What cannot be served is listed with its reason, and stopped nothing.
    page.locator("#refused button").first.click()
    expect(page.locator("#refused")).to_contain_text("support@v3")
    expect(page.locator("#refused")).to_contain_text("another")
    expect(page.locator("#refused")).to_contain_text("SHA-256")
    # A message beyond the context is refused in words, and kept.
    visit.send("word " * 700)
    expect(visit.notice).to_contain_text("tokens long")
    assert visit.complaints == [] and visit.outside == []
    visit.context.close()


def test_sigterm_leaves_no_process(server: Server) -> None:
    children = server.children()
    assert len(children) >= 3, "the engine runs as processes of its own"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0, server.log.read_text()
    deadline = time.monotonic() + 20
    alive = children
    while alive and time.monotonic() < deadline:
        alive = [pid for pid in children if Path(f"/proc/{pid}").exists()]
        time.sleep(0.2)
    assert not alive
    assert "Traceback" not in server.log.read_text()
