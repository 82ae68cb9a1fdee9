"""The whole server as a person meets it: `python -m serve`, real vLLM, two adapters, a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lit_ft.adapter import Base, DataSource, Draft, publish
from tests.e2e.server import Server, served
from tests.e2e.visit import Visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [pytest.mark.engine, pytest.mark.browser]


def publish_adapters(root: Path) -> None:
    """Two adapters that answer visibly otherwise than the base, one broken and one for another base."""
    import torch
    from safetensors.torch import load_file, save_file

    from lit_ft.models.adapt import save_trained
    from lit_ft.models.kinds.lora import apply_lora
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
    with served(folder, "max_model_len=512", "title=Wren support") as server:
        yield server


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
    page.get_by_role("tab", name="Adapters").click()
    for part in ("support@v3", "another base", "support@v4", "SHA-256"):
        expect(page.locator("#versions")).to_contain_text(part)
    page.get_by_role("tab", name="Chat").click()
    # A message beyond the context is refused in words, and kept.
    visit.send("word " * 700)
    expect(visit.notice).to_contain_text("tokens long")
    assert visit.complaints == [] and visit.outside == []
    visit.context.close()
