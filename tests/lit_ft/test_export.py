"""`python -m lit_ft.export`: what it finds, what it refuses, and that nothing is left where it fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.lit_ft.made import Export, adapter, bases, export, left, published, said

pytestmark = pytest.mark.slow

__all__ = ["bases", "export"]

TARGETS = ("lora", "merged", "gguf")


@pytest.fixture
def lora(bases: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter that others made."""
    adapter(tmp_path / "lora", bases["llama"], "dora")
    return tmp_path / "lora"


# What is missing or mistaken on the command line


def test_nothing_given(export: Export) -> None:
    message = said(export())
    assert "adapter=FOLDER" in message and "lora|merged|gguf|hub" in message


def test_no_output(export: Export, lora: Path) -> None:
    for to in TARGETS:
        assert "output=FOLDER" in said(export(f"adapter={lora}", f"to={to}"))


def test_unknown_target(export: Export, lora: Path) -> None:
    message = said(export(f"adapter={lora}", "to=onnx", "output=out"))
    assert "onnx" in message and all(to in message for to in TARGETS)


def test_unknown_key_and_wrong_type(export: Export, lora: Path) -> None:
    assert "ranks" in said(export(f"adapter={lora}", "to=lora", "output=out", "ranks=3"))
    assert "many" in said(export(f"adapter={lora}", "to=lora", "output=out", "rank=many"))
    assert "q4_0" in said(export(f"adapter={lora}", "to=gguf", "output=out", "quantization=q4_0"))


@pytest.mark.parametrize(
    ("to", "setting"),
    [
        ("merged", "rank=4"),
        ("lora", "dtype=float16"),
        ("merged", "quantization=f16"),
        ("lora", "repo=a/b"),
        ("gguf", "upload=true"),
    ],
)
def test_settings_without_effect(to: str, setting: str, export: Export, lora: Path) -> None:
    message = said(export(f"adapter={lora}", f"to={to}", "output=out", setting))
    assert "no effect" in message and setting.split("=")[0] in message


def test_no_adapter_there(export: Export, bases: dict[str, Path], lora: Path) -> None:
    assert "not a folder" in said(export("adapter=./nothing", "to=lora", "output=out"))
    assert "none yet" in said(export("adapter=nothing", "to=lora", "output=out"))
    file = lora / "adapter_model.safetensors"
    assert "the folder it lies in" in said(export(f"adapter={file}", "to=lora", "output=out"))
    published(Path("adapters"), bases["llama"])
    assert "support" in said(export("adapter=suport", "to=lora", "output=out"))
    assert "support@v7" in said(export("adapter=support@v7", "to=lora", "output=out"))
    Path("empty").mkdir()
    message = said(export("adapter=./empty", "to=lora", "output=out"))
    assert "adapter_config.json" in message and "config.json" in message


# Its base


def test_a_base_must_be_named_where_no_card_does(export: Export, lora: Path, bases: dict[str, Path]) -> None:
    for to in TARGETS:
        message = said(export(f"adapter={lora}", f"to={to}", "output=out"))
        assert "model=FOLDER" in message and str(bases["llama"]) in message, "what its configuration names"
    assert left(Path()) == []


def test_model_and_model_id_are_the_same(export: Export, lora: Path, bases: dict[str, Path]) -> None:
    """`model=` alone would be taken for a group of training's settings."""
    for k, key in enumerate(("model", "model.id")):
        assert export(f"adapter={lora}", f"{key}={bases['llama']}", "to=lora", f"output=o{k}").code == 0


@pytest.mark.parametrize("to", TARGETS)
def test_another_base_is_refused_with_both_names(
    to: str, export: Export, bases: dict[str, Path], tmp_path: Path
) -> None:
    """The same architecture with other weights would go through silently."""
    published(Path("adapters"), bases["llama"], "dora")
    other = tmp_path / "other-llama"
    tiny.model(seed=7).save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    message = said(export("adapter=support", f"model={other}", f"to={to}", "output=out"))
    assert "tiny-llama" in message and "other-llama" in message and "sha256:" in message
    assert not Path("out").exists()


def test_a_copy_is_checked_against_the_base_that_is_given(
    export: Export, bases: dict[str, Path], tmp_path: Path
) -> None:
    published(Path("adapters"), bases["llama"])
    assert "tiny-qwen2" in said(export("adapter=support", f"model={bases['qwen2']}", "to=lora", "output=out"))
    assert not Path("out").exists()


def test_a_base_that_was_changed_or_is_gone(export: Export, tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "mine")
    published(Path("adapters"), base, "dora")
    tiny.model(seed=3).save_pretrained(base)
    assert "mine" in said(export("adapter=support", "to=merged", "output=out"))
    shutil.rmtree(base)
    message = said(export("adapter=support", "to=merged", "output=out"))
    assert "no model now" in message and "model=FOLDER" in message


def test_a_base_of_another_shape(export: Export, lora: Path, bases: dict[str, Path]) -> None:
    """Of an adapter without a card nothing else can tell."""
    for other, to in (("gpt2", "merged"), ("qwen2", "lora")):
        if other == "qwen2":
            from transformers import Qwen2Config, Qwen2ForCausalLM

            wide = Qwen2Config(vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                               num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
            Qwen2ForCausalLM(wide).save_pretrained("wide")
            tiny.tokenizer().save_pretrained("wide")
        place = bases["gpt2"] if other == "gpt2" else Path("wide")
        assert "does not fit" in said(export(f"adapter={lora}", f"model={place}", f"to={to}", "output=out"))
    assert not Path("out").exists()


def test_half_of_an_adapter(export: Export, lora: Path, bases: dict[str, Path]) -> None:
    """PEFT only warns where weights are missing, and leaves what it made up."""
    from safetensors.torch import load_file, save_file

    path = lora / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: weight for name, weight in weights.items() if "layers.1" not in name}, path)
    message = said(export(f"adapter={lora}", f"model={bases['llama']}", "to=merged", "output=out"))
    assert "does not fit" in message and "layers.1" in message


def test_no_model_there(export: Export, lora: Path) -> None:
    Path("empty").mkdir()
    for place in ("./nothing", "empty", "no-such-owner/no-such-model"):
        message = said(export(f"adapter={lora}", f"model={place}", "to=merged", "output=out"))
        assert place.removeprefix("./") in message
    assert left(Path()) == ["empty"]


# Damaged files


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_weights(damage: str, export: Export, lora: Path, bases: dict[str, Path]) -> None:
    path = lora / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-100], "garbage": b"\xff" * 4096, "empty": b""}[damage])
    for to in TARGETS:
        message = said(export(f"adapter={lora}", f"model={bases['llama']}", f"to={to}", "output=out"))
        assert "damaged" in message and "adapter_model.safetensors" in message
    assert left(Path()) == []


def test_weights_that_are_not_those_of_the_card(export: Export, bases: dict[str, Path]) -> None:
    """One bit, which the file's form does not show."""
    made, _ = published(Path("adapters"), bases["llama"])
    path = made.path / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for to in (*TARGETS, "hub"):
        place = "repo=a/b" if to == "hub" else "output=out"
        assert "SHA-256" in said(export("adapter=support", f"to={to}", place))
    assert not Path("out").exists()


@pytest.mark.parametrize("lost", ["adapter_model.safetensors", "adapter_config.json", "card.json"])
def test_missing_files(lost: str, export: Export, bases: dict[str, Path]) -> None:
    """Without a card it is an adapter as others have them, and its base must be given."""
    made, _ = published(Path("adapters"), bases["llama"], "dora")
    (made.path / lost).unlink()
    message = said(export(f"adapter={made.path}", "to=merged", "output=out"))
    assert ("model=FOLDER" if lost == "card.json" else lost) in message


def test_a_pickle_is_not_read(export: Export, lora: Path, bases: dict[str, Path]) -> None:
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    message = said(export(f"adapter={lora}", f"model={bases['llama']}", "to=lora", "output=out"))
    assert "pickle" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"peft_type": 3}', "\xff"])
def test_a_damaged_configuration(text: str, export: Export, lora: Path, bases: dict[str, Path]) -> None:
    (lora / "adapter_config.json").write_bytes(text.encode("latin-1"))
    message = said(export(f"adapter={lora}", f"model={bases['llama']}", "to=lora", "output=out"))
    assert "adapter_config.json" in message


def test_a_damaged_base(export: Export, lora: Path, tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "cut")
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = said(export(f"adapter={lora}", f"model={base}", "to=merged", "output=out"))
    assert "damaged" in message and "cut" in message
    assert left(Path()) == []


# Where it is written


@pytest.mark.parametrize(("what", "to"), [("folder", "lora"), ("empty", "merged"), ("file", "gguf"), ("link", "lora")])
def test_what_is_there_stays(what: str, to: str, export: Export, lora: Path, bases: dict[str, Path]) -> None:
    if what == "file":
        Path("out").write_text("mine", encoding="utf-8")
    elif what == "link":
        Path("out").symlink_to("nowhere")
    else:
        Path("out").mkdir()
        if what == "folder":
            Path("out/mine").write_text("mine", encoding="utf-8")
    before = left(Path())
    message = said(export(f"adapter={lora}", f"model={bases['llama']}", f"to={to}", "output=out"))
    assert "exists already" in message and "output=out" in message
    assert left(Path()) == before


@pytest.mark.parametrize("to", ["lora", "merged"])
@pytest.mark.parametrize("where", ["copyfile", "rename", "safetensors"])
def test_no_space_leaves_nothing(
    where: str, to: str, export: Export, lora: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the tokenizer's files, at the last step, and inside the library that writes weights."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args: object, **more: object) -> None:
        raise full

    if where == "copyfile":
        monkeypatch.setattr(shutil, "copyfile", fail)
    elif where == "rename":
        monkeypatch.setattr(Path, "rename", fail)
    else:
        from safetensors import SafetensorError

        def quoting(*args: object, **more: object) -> None:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("peft.peft_model.safe_save_file", quoting)
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", quoting)
    message = said(export(f"adapter={lora}", f"model={bases['llama']}", f"to={to}", "output=deep/er/out"))
    assert "No space left on device" in message and "output=FOLDER" in message
    assert left(Path()) == [], "not even the folders on the way"


def test_no_space_for_a_gguf_file(export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its weights are written, after the file was begun."""
    from gguf import GGUFWriter

    from tests.lit_ft.exporting.test_gguf import model, tokenizer

    model("llama").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")

    def fail(*args: object, **more: object) -> None:
        assert list(Path().glob(".out-*/*.gguf"))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", fail)
    message = said(export(f"adapter={tmp_path / 'base'}", "to=gguf", "output=out"))
    assert "No space left on device" in message
    assert left(Path()) == []


def test_a_place_that_cannot_be_written(export: Export, lora: Path, bases: dict[str, Path]) -> None:
    Path("file").write_text("", encoding="utf-8")
    message = said(export(f"adapter={lora}", f"model={bases['llama']}", "to=merged", "output=file/out"))
    assert "could not be written" in message
    assert left(Path()) == ["file"]


def test_only_the_output_is_left_behind(export: Export, lora: Path, bases: dict[str, Path]) -> None:
    """No folder of the command line's own, and standard output holds one line."""
    done = export(f"adapter={lora}", f"model={bases['llama']}", "to=lora", "output=made/out")
    assert done.code == 0, done.err
    assert done.out == "made/out\n"
    assert [path.name for path in Path().iterdir()] == ["made"]
    assert [path.name for path in Path("made").iterdir()] == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert Path("made/out").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("args", [["to=onnx"], ["adapter=./nothing", "to=merged", "output=out"], []])
def test_a_mistake_is_told_at_once(args: list[str], tmp_path: Path) -> None:
    """Before torch is loaded, of which Python would tell."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lit_ft.export", *args],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert time.monotonic() - began < 5
    assert done.returncode == 2 and "error: " in done.stderr and done.stdout == ""
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "lit_ft.cli" in loaded and not loaded & {"torch", "transformers", "peft"}
    assert left(tmp_path) == []


def test_the_command_as_it_is_started(bases: dict[str, Path], lora: Path, tmp_path: Path) -> None:
    """In a process of its own, from a folder without the project."""
    (work := tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "lit_ft.export", f"adapter={lora}", f"model={bases['llama']}", "to=merged", "output=o"],
        cwd=work, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "o\n" and [path.name for path in work.iterdir()] == ["o"]
    assert json.loads((work / "o" / "config.json").read_text(encoding="utf-8"))["model_type"] == "llama"
