"""The preflight: the numbers of the run it precedes, its refusals in the same words, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ft.batches import Completion, Example
from lit_ft.data.chat import show
from lit_ft.models.adapt import parameter_counts, save_trained
from lit_ft.models.kinds import KINDS
from lit_ft.previewing.offline import decoded
from lit_ft.previewing.page import Piece, Section, as_html, as_text, visible
from lit_ft.previewing.settings import settings
from lit_ft.previewing.weightless import published_bytes, target_modules, weightless
from tests import tiny
from tests.conftest import Outcome
from tests.lit_ft.data.test_votes import Vote, write_store

pytestmark = pytest.mark.slow

Command = Callable[..., Outcome]
FEW = ("data.max_rows=12", "data.max_val_rows=2", "data.batch_size=4", "logger=none", "trainer.precision=32-true")


@pytest.fixture
def preview(cli: Command, in_process: Callable[..., Command]) -> Iterator[Command]:
    """`python -m lit_ft.preview ARGS`, in the folder of `cli`."""
    from lit_ft.preview import main

    threads = torch.get_num_threads()
    yield in_process(main, "lit_ft")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("models")
    return {family: tiny.folder(where / family, family) for family in ("llama", "opt", "gpt2")}


def line_of(text: str, name: str) -> str:
    found = re.search(rf"^ *{name} +(.*)$", text, re.MULTILINE)
    assert found, f"no line {name} in:\n{text}"
    return found[1]


def composed(*overrides: str) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    from lit_ft.cli import conf_folder
    from lit_ft.config import Config, register_schemas

    register_schemas()
    ConfigStore.instance().store(name="config_schema", node=Config)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder().resolve()), version_base="1.3"):
        return compose("config", list(overrides))


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever loads a model's weights raises."""
    import safetensors
    import safetensors.torch
    import transformers
    from transformers import AutoModelForCausalLM, PreTrainedModel

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights were to be loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.modeling_utils, "load_state_dict", refuse)
    monkeypatch.setattr("lit_ft.wiring.model.load_model", refuse)
    monkeypatch.setattr("lit_ft.models.load.load_model", refuse)
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    known = safetensors.torch.load_file
    monkeypatch.setattr(
        safetensors.torch,
        "load_file",
        lambda path, *args: known(path, *args) if "reference" in str(path) else refuse(),  # log-probabilities
    )
    monkeypatch.setattr(torch, "load", refuse)


# What it says is what the run then does.


@pytest.mark.parametrize("experiment", ["sft", "dpo"])
def test_its_numbers_are_those_of_the_run(
    cli: Command, preview: Command, own_cache: Path, llama_folder: Path, experiment: str
) -> None:
    args = (f"+experiment={experiment}", f"model.id={llama_folder}", *FEW, "trainer.progress=false")
    before = preview(*args)
    assert before.code == 0, before.err
    run = cli(*args)
    assert run.code == 0, run.err
    for name in ("training", "held out", "start"):
        assert line_of(before.out, name) == line_of(run.err, name)
    counts = re.search(r"([\d,]+) parameters, ([\d,]+) trained \(([\d.]+%)", line_of(run.err, "model"))
    assert counts is not None
    assert line_of(before.out, "trained") == f"{counts[2]} of {counts[1]} parameters ({counts[3]})"
    assert line_of(before.out, "steps").startswith("3 per epoch, 3 in all")
    published = next(Path("adapters").glob("*/v1"))
    assert json.loads((published / "card.json").read_text())["metrics"]["step"] <= 3
    rows = re.findall(r"^  \| ?(.*)$", run.err, re.MULTILINE)
    assert "⟦" in "".join(rows)
    assert "\n".join(rows) in re.sub(r"\n  ", "\n", before.out), "the same row, with the same part marked"


def test_a_second_round_goes_on_from_the_first_ones_adapter(
    cli: Command, preview: Command, own_cache: Path, llama_folder: Path
) -> None:
    usual = (f"model.id={llama_folder}", *FEW, "trainer.progress=false")
    assert cli("+experiment=sft", *usual, "trainer.max_steps=1").code == 0
    for kind in ("lora", "dora"):
        args = ("+experiment=dpo", *usual, f"peft={kind}", "algorithm.learning_rate=1e-6")
        before = preview(*args)
        assert before.code == 0, before.err
        assert line_of(before.out, "start") == "adapter support@v1 (sft)"
        run = cli(*args, "trainer.max_steps=1", f"name={kind}", "start_from=support@v1")
        assert run.code == 0, run.err
        counts = re.search(r"([\d,]+) parameters, ([\d,]+) trained", line_of(run.err, "model"))
        assert counts is not None
        assert line_of(before.out, "trained").startswith(f"{counts[2]} of {counts[1]} ")


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "lora_plus", "dora", "pissa", "adalora", "ia3", "full"])
def test_every_kind_on_every_family(folders: dict[str, Path], tmp_path: Path, family: str, kind: str) -> None:
    from lit_ft.models.precision import choose_precision
    from lit_ft.wiring.model import adapter_kind, make_model

    small = {"ia3": [], "full": [], "adalora": ["peft.init_r=6", "peft.target_r=4"]}.get(kind, ["peft.r=4"])
    cfg = composed(
        "+experiment=sft", f"peft={kind}", f"model.id={folders[family]}", "trainer.precision=32-true", *small
    )

    precision = choose_precision("32-true", torch.device("cpu"))
    found = weightless(cfg, adapter_kind(cfg), None, precision)
    assert {p.device.type for p in found.parameters()} == {"meta"}
    real = make_model(cfg, adapter_kind(cfg), None, precision)
    assert parameter_counts(found) == parameter_counts(real)
    assert target_modules(found) == target_modules(real)
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in found.named_parameters()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in real.named_parameters()
    }
    size, what = published_bytes(found, cfg)
    if kind in ("pissa", "adalora"):
        assert "LoRA" in what  # converted when it is published
        return
    save_trained(real, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert size == pytest.approx(file.stat().st_size, rel=0.03)


def test_qlora_is_refused_as_training_refuses_it(
    cli: Command, preview: Command, llama_folder: Path, without_bitsandbytes: None
) -> None:
    words = same_words(cli, preview, "+experiment=sft", "peft=qlora", f"model.id={llama_folder}", *FEW)
    assert "pip install 'lit_ft[qlora]'" in words


def test_what_is_shown(preview: Command, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every section, without any weights; the estimate's parts add up to its sum."""
    no_weights(monkeypatch)
    outcome = preview("+experiment=sft", f"model.id={llama_folder}", *FEW, "peft.r=4")
    assert outcome.code == 0, outcome.err
    text = outcome.out
    assert "    r: 4  # default: 16\n" in text and "    alpha: 32\n" in text
    assert line_of(text, "targets").startswith("14 modules: down_proj 2, gate_proj 2, k_proj 2, ")
    assert text.count("⟦") == 3 == text.count("⟧"), "three rows, each with one trained part"
    assert "row 3: " in text and "row 4: " not in text
    own = text.split("estimated\n")[1].split("\n\n")[0]
    sizes = {name.strip(): size for name, size in re.findall(r"^  (\w[^\d\n]*?) {2,}([\d.,]+ \w+)$", own, re.MULTILINE)}
    assert {"weights", "adapters", "gradients", "optimizer states", "activations", "in all"} <= sizes.keys()
    mib = {name: float(size.split()[0].replace(",", "")) for name, size in sizes.items()}
    assert sum(size for name, size in mib.items() if name != "in all") == pytest.approx(
        mib["in all"], rel=0.05, abs=0.4
    )
    assert "GPU bf16-mixed, gradient checkpointing" in text and "8 16 24 48 80 GB" in text
    assert "\x1b" not in text, "no colours where nobody watches"


def test_the_terminal_shows_colours_instead(
    preview: Command, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_ft.preview._colours", lambda: True)
    outcome = preview("+experiment=sft", f"model.id={llama_folder}", *FEW)
    assert outcome.code == 0 and "⟦" not in outcome.out and "\x1b[1;32m" in outcome.out


# Nothing is left, and nothing is started.


def everything(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def test_nothing_is_left_and_no_processes_start(
    preview: Command, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a process was to be started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "fork", refuse)
    two = ("trainer.devices=2", "trainer.accelerator=cpu", "strategy=fsdp")
    environment = dict(os.environ)
    outcome = preview("+experiment=sft", f"model.id={llama_folder}", *FEW, *two)
    assert outcome.code == 0, outcome.err
    assert line_of(outcome.out, "devices").startswith("2, ")
    assert "weights gathered from other devices" in outcome.out
    assert everything(Path.cwd()) == {}
    assert set(os.environ) <= {*environment, "HYDRA_FULL_ERROR"}


def test_votes_are_read_and_left_as_they_are(
    preview: Command, own_cache: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_ft.adapter import Base
    from lit_ft.models.resolve import model_fingerprint

    base = Base(llama_folder.name, model_fingerprint(str(llama_folder)))
    store = write_store(Path("votes.db"), [Vote(f"question {k}?", "good", "bad") for k in range(25)], base)
    before = everything(Path.cwd())
    no_weights(monkeypatch)
    outcome = preview("+experiment=dpo", "data=votes", f"model.id={llama_folder}", "data.batch_size=5", "logger=none")
    assert outcome.code == 0, outcome.err
    assert "25 decisive votes of" in outcome.err
    assert re.search(r"votes\.db: \d+ rows kept, 0 dropped", line_of(outcome.out, "training"))
    assert "chosen then rejected" in outcome.out
    after = everything(Path.cwd())
    assert after[store.name] == before[store.name]
    assert set(after) - set(before) <= {f"{store.name}-wal", f"{store.name}-shm"}, "a reader's, in WAL mode"


# Refused as training refuses it.


def same_words(cli: Command, preview: Command, *args: str) -> str:
    def said(outcome: Outcome) -> str:
        assert outcome.code == 2, outcome.err
        return " ".join(outcome.err.split("error: ", 1)[1].split())

    there = everything(Path.cwd())
    before = said(preview(*args))
    assert everything(Path.cwd()) == there
    # Where a key is unknown, the schema's name is said: that of a run's settings and `html`.
    assert before.replace("PreviewConfig", "Config") == said(cli(*args))
    return before


@pytest.mark.parametrize(
    "mistake",
    [
        "peft.target_modules=[nothing]",
        "data.path=nowhere.jsonl",
        "data.path=examples:nothing",
        "data.max_length=5000",
        "data.max_length=20",
        "data.chat_template=nowhere",
        "trainer.precision=bf16-true",
        "trainer.devices=0",
        "trainer.threads=0",
        "strategy.tensor_parallel_size=3",
        "name=../out",
        "start_from=support@v7",
        "resume=last",
        "model.id=./nowhere",
        "trainer.extra={nonsense: 1}",
        "trainer.extra={accumulate_grad_batches: 2}",
        "peft.r=0",
        "nonsense=1",
        "data.batch_size=many",
        "data.columns=3",
    ],
)
def test_mistakes(cli: Command, preview: Command, own_cache: Path, llama_folder: Path, mistake: str) -> None:
    same_words(cli, preview, "+experiment=sft", f"model.id={llama_folder}", *FEW, "trainer.progress=false", mistake)


def test_mistakes_of_some_kinds(cli: Command, preview: Command, own_cache: Path, llama_folder: Path) -> None:
    usual = (f"model.id={llama_folder}", *FEW, "trainer.progress=false")
    full = same_words(cli, preview, "+experiment=dpo", *usual, "peft=full", "algorithm.reference=base")
    assert "no base below" in full
    short = same_words(cli, preview, "+experiment=sft", *usual, "peft=adalora", "peft.tinit=200", "peft.tfinal=0")
    assert "AdaLoRA" in short
    same_words(cli, preview, "+experiment=sft", *usual, "data=votes")
    same_words(cli, preview, "+experiment=dpo", *usual, "algorithm.loss_type=ipo", "algorithm.label_smoothing=0.1")
    early = ("data.val_split=0", "data.max_val_rows=0", "trainer.early_stopping=2")
    same_words(cli, preview, "+experiment=sft", *usual, *early)


@pytest.mark.parametrize("how", ["-m", "hydra.mode=MULTIRUN"])
def test_several_runs_are_refused(preview: Command, how: str) -> None:
    outcome = preview(how, "+experiment=sft", "peft.r=4,8")
    assert outcome.code == 2 and "A preview is of one run" in outcome.err
    assert everything(Path.cwd()) == {}


@pytest.mark.parametrize(("given", "words"), [(".", "is a folder"), ("nowhere/p.html", "there is no folder nowhere")])
def test_pages_that_cannot_be_written(preview: Command, llama_folder: Path, given: str, words: str) -> None:
    outcome = preview("+experiment=sft", f"model.id={llama_folder}", *FEW, f"html={given}")
    assert outcome.code == 2 and words in outcome.err
    assert outcome.out == "" and everything(Path.cwd()) == {}


# The page and the text.


class Reader(HTMLParser):
    """All tags with their attributes, and the text within marks."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.marked: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "!doctype"):
            self._open.append(tag)
        if tag == "mark":
            self.marked.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "mark" in self._open:
            self.marked[-1] += data


def test_the_page_is_whole_escaped_and_fetches_nothing(preview: Command, llama_folder: Path) -> None:
    evil = '</mark></pre><script>alert(1)</script><img src="https://evil.example/x" onerror=alert(1)> & \x1b[2J\u202e'
    rows = [{"prompt": f"{evil} {k}", "completion": f"{evil} answer {k}"} for k in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = preview(
        "+experiment=sft",
        "data=file",
        "data.path=rows.jsonl",
        f"model.id={llama_folder}",
        "html=page.html",
        "logger=none",
    )
    assert outcome.code == 0, outcome.err
    assert "\x1b" not in outcome.out and "\u202e" not in outcome.out and "<U+001B>[2J<U+202E>" in outcome.out
    page = Path("page.html").read_text(encoding="utf-8")
    read = Reader()
    read.feed(page)
    assert not read._open, "every tag is closed"
    assert {tag for tag, _ in read.tags} == {
        *("html", "head", "meta", "title", "style", "body", "h1", "section", "h2", "pre", "span", "mark")
    }
    assert not any(name in attributes for _, attributes in read.tags for name in ("src", "href", "onerror", "style"))
    policy = next(a["content"] for _, a in read.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy
    assert "url(" not in page and "@import" not in page
    assert len(read.marked) == 3
    assert read.marked[0].startswith("</mark></pre><script>alert(1)</script>") and "answer" in read.marked[0]
    assert "\x1b" not in page and "\u202e" not in page
    # The same as on the terminal.
    for line in ("rows kept", "trained on", "in all", "GPU bf16-mixed"):
        assert line in outcome.out and line in "".join(read.text)
    assert sorted(path.name for path in Path().iterdir()) == ["page.html", "rows.jsonl"]


def test_the_marked_part_is_what_is_trained(tokenizer: Any) -> None:
    """In a conversation, too, where it is several parts; and it reads as the run's own line does."""
    ids = tokenizer("user asks bot answers user thanks bot greets", add_special_tokens=False)["input_ids"]
    mask = [9 < k < 21 or k > 33 for k in range(len(ids) - 3)]
    example = Example(
        tuple(ids[:3]), (Completion(tuple(ids[3:]), tuple(mask)), Completion(tuple(ids[:4]), (True,) * 4))
    )
    pieces = decoded(tokenizer, example)
    wanted = [
        tokenizer.decode([i for k, i in enumerate(ids[3:]) if 9 < k < 21]),
        tokenizer.decode(ids[3:][34:]),
        tokenizer.decode(ids[:4]),
    ]
    assert [piece.text for piece in pieces if piece.style == "trained"] == wanted
    text = as_text([Section("t", [pieces])], colours=False)
    assert text == "t\n  " + show(tokenizer, example) + "\n"
    trained = sum(len(tokenizer(p.text, add_special_tokens=False)["input_ids"]) for p in pieces if p.style)
    assert trained == example.targets


def test_text_with_colours_ends_them_on_each_line() -> None:
    text = as_text([Section("t", [[Piece("a"), Piece("b\nc", "trained")]])], colours=True)
    assert text == "\x1b[1mt\x1b[0m\n  a\x1b[1;32mb\x1b[0m\n  \x1b[1;32mc\x1b[0m\n"


def test_control_characters_are_spelled_out() -> None:
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x1b]0;x\x07\r\x9b\u202e\u2066") == "<U+001B>]0;x<U+0007><U+000D><U+009B><U+202E><U+2066>"
    assert visible("ß 語 🙂") == "ß 語 🙂"


def test_a_page_of_nothing_dangerous() -> None:
    page = as_html("<b>", [Section('"&', [[Piece("<i>", "changed")]])])
    assert "<title>&lt;b&gt;</title>" in page and '<span class="changed">&lt;i&gt;</span>' in page
    assert "<h2>&quot;&amp;</h2>" in page


def test_settings_are_yaml_with_the_defaults_beside() -> None:
    import yaml
    from hydra import initialize_config_dir

    from lit_ft.cli import conf_folder

    cfg = composed("+experiment=dpo", "peft=adalora", "data.columns={prompt: 'a: #b'}", "name='no'", "logger=none")
    with initialize_config_dir(str(conf_folder().resolve()), version_base="1.3"):
        lines = settings(cfg)
    text = "\n".join("".join(piece.text for piece in line) for line in lines)
    back = yaml.safe_load(text)
    assert back["data"]["columns"] == {"prompt": "a: #b"} and back["name"] == "no"
    assert back["algorithm"]["kind"] == "dpo" and back["peft"]["target_r"] == 16
    changed = {line[0].text.strip() for line in lines if line[0].style == "changed"}
    assert "name: 'no'" in changed and "target_r: 16" in changed and "seed: 0" not in changed
    assert any(line[1].text == "  # default: support" for line in lines if len(line) > 1)


def test_every_kind_is_known_here() -> None:
    """A new kind has to say what it publishes."""
    assert set(KINDS) == {"lora", "rslora", "lora_plus", "dora", "pissa", "qlora", "adalora", "ia3", "full"}


def test_the_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--tiny", "--cases", "SFT, LoRA, 2 rows"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["estimated"] == sum(row["parts"].values()) and row["measured"] > 0
