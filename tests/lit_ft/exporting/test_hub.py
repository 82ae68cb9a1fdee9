"""`to=hub`: what would be sent is shown, and nothing is sent without being asked to."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_ft.adapter import Base
from lit_ft.errors import UserError
from lit_ft.exporting.hub import plan
from lit_ft.exporting.source import find_source
from tests.lit_ft.made import Export, adapter, bases, export, published, said

__all__ = ["bases", "export"]


class Hub:
    """Stands for `huggingface_hub.HfApi`, and keeps what it is asked for."""

    def __init__(self, token: str | None = "hf_secret", fails: Exception | None = None) -> None:
        self.token, self.fails = token, fails
        self.made: list[tuple[str, bool]] = []
        self.sent: dict[str, bytes] = {}

    def __call__(self) -> Hub:
        return self

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> Any:
        if self.fails:
            raise self.fails
        self.made.append((repo, private))
        return f"https://hub.test/{repo}"

    def create_commit(self, repo: str, *, operations: list[Any], commit_message: str) -> Any:
        assert self.made and commit_message
        for one in operations:
            content = one.path_or_fileobj
            self.sent[one.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()
        return SimpleNamespace()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", made)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: made.token)
    return made


def test_without_being_asked_to_nothing_is_sent(
    export: Export, hub: Hub, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection is opened, nothing is written, and the files are shown with their sizes."""
    made, _ = published(Path("adapters"), bases["llama"])
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}

    def refuse(*args: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    done = export("adapter=support", "to=hub", "repo=ann/support")
    assert done.code == 0, done.err
    assert done.out == "" and hub.made == [] and hub.sent == {}
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    assert "ann/support (private if it is new)" in done.err
    size = (made.path / "adapter_model.safetensors").stat().st_size
    shown = {line.split()[0]: line for line in done.err.splitlines() if line.endswith(("bytes", "Hub"))}
    assert f"{size:,} bytes" in shown["adapter_model.safetensors"]
    assert set(shown) == {path.name for path in made.path.iterdir()} - {"config.yaml"}
    assert "left out   config.yaml" in done.err and "upload=true" in done.err
    assert "# support@v1" in done.err, "the model card is shown"


def test_asked_to_it_sends_what_was_shown(export: Export, hub: Hub, bases: dict[str, Path]) -> None:
    made, _ = published(Path("adapters"), bases["llama"])
    done = export("adapter=support", "to=hub", "repo=ann/support", "upload=true", "private=false")
    assert done.code == 0, done.err
    assert done.out == "https://hub.test/ann/support\n"
    assert hub.made == [("ann/support", False)]
    assert "config.yaml" not in hub.sent and str(bases["llama"]) not in str(hub.sent)
    weights = "adapter_model.safetensors"
    assert hub.sent[weights] == (made.path / weights).read_bytes()


@pytest.mark.parametrize(
    ("base", "known"),
    [
        ("bundled", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("my-folder", None),
    ],
)
def test_the_base_is_named_as_the_hub_knows_it(
    base: str, known: str | None, export: Export, hub: Hub, bases: dict[str, Path]
) -> None:
    """Or not at all: somebody else's model may have a folder's name."""
    published(Path("adapters"), bases["llama"], base=Base(base, "sha256:0"))
    done = export("adapter=support", "to=hub", "repo=ann/support", "upload=true")
    assert done.code == 0, done.err
    assert json.loads(hub.sent["adapter_config.json"])["base_model_name_or_path"] == known
    card = hub.sent["README.md"].decode()
    assert [line for line in card.splitlines() if line.startswith("base_model")] == (
        [f"base_model: {known}"] if known else []
    )
    assert card.startswith("---\n") and card.count("\n---\n") == 1
    assert ("rounded to 4" in card) is (base == "bundled")


def test_others_adapters_and_exported_folders_go_too(
    export: Export, hub: Hub, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter(tmp_path / "a", bases["llama"])
    assert export(f"adapter={tmp_path / 'a'}", f"model={bases['llama']}", "to=merged", "output=out").code == 0
    assert export("adapter=./out", "to=hub", "repo=ann/out", "upload=true").code == 0
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(hub.sent)
    hub.sent.clear()
    assert export(f"adapter={tmp_path / 'a'}", "to=hub", "repo=ann/a", "upload=true").code == 0
    assert set(hub.sent) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert str(bases["llama"]).encode() not in hub.sent["adapter_config.json"] + hub.sent["README.md"]
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "m.gguf").write_bytes(b"GGUF")
    assert export(f"adapter={tmp_path / 'g'}", "to=hub", "repo=ann/g").code == 0


def test_without_a_token(export: Export, hub: Hub, bases: dict[str, Path]) -> None:
    published(Path("adapters"), bases["llama"])
    hub.token = None
    message = said(export("adapter=support", "to=hub", "repo=ann/support", "upload=true"))
    assert "hf auth login" in message and "HF_TOKEN" in message and "Nothing was sent" in message
    assert hub.made == []


def test_without_a_network(export: Export, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library, which this test's environment keeps off line."""
    published(Path("adapters"), bases["llama"])
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    message = said(export("adapter=support", "to=hub", "repo=ann/support", "upload=true"))
    assert "upload to ann/support failed" in message and "network" in message
    assert "hf_none" not in message


def test_without_the_right_to_write(export: Export, hub: Hub, bases: dict[str, Path]) -> None:
    published(Path("adapters"), bases["llama"])
    hub.fails = PermissionError("403 Forbidden: you have no rights to ann/support\nand more")
    message = said(export("adapter=support", "to=hub", "repo=ann/support", "upload=true"))
    assert "403 Forbidden" in message and "and more" not in message
    assert hub.sent == {}


@pytest.mark.parametrize("repo", ["support", "a/b/c", "ann/", "ann/sup port", "../x", "-a/b", "a/b--c"])
def test_names_that_are_no_repository(repo: str, bases: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="OWNER/NAME"):
        plan(find_source(str(bases["llama"]), Path("adapters")), repo)


def test_a_repository_must_be_named(export: Export, hub: Hub, bases: dict[str, Path]) -> None:
    published(Path("adapters"), bases["llama"])
    assert "repo=OWNER/NAME" in said(export("adapter=support", "to=hub"))
    assert "output=" in said(export("adapter=support", "to=hub", "repo=a/b", "output=out"))
    assert "model=" in said(export("adapter=support", "to=hub", "repo=a/b", "model=bundled"))


def test_a_card_that_peft_wrote_loses_the_place_of_the_base(
    export: Export, hub: Hub, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter(tmp_path / "a", bases["llama"])
    where = str(bases["llama"])
    text = f"---\nbase_model: {where}\ntags:\n- base_model:adapter:{where}\n---\n\nOn {where}.\n"
    (tmp_path / "a" / "README.md").write_text(text, encoding="utf-8")
    assert export(f"adapter={tmp_path / 'a'}", "to=hub", "repo=ann/a", "upload=true").code == 0
    card = hub.sent["README.md"].decode()
    assert card == "---\ntags:\n- base_model:adapter:tiny-llama\n---\n\nOn tiny-llama.\n"
