"""Bad input on the command line: one paragraph with what, where and what to do, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Outcome

ROWS = [{"prompt": f"question {k}", "completion": f"answer {k}"} for k in range(20)]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def refused(cli: Callable[..., Outcome], own_cache: Path) -> Callable[..., str]:
    """Run the command, expect it to be refused; returns its message."""

    def run(*args: str) -> str:
        outcome = cli(*args, "logger=none", "trainer.progress=false")
        assert outcome.code == 2, outcome.err
        assert "Traceback" not in outcome.err
        assert "error: " in outcome.err
        assert outcome.out == ""
        assert not list(Path("adapters").glob("**/*")), "nothing may be left behind"
        return " ".join(outcome.err.split("error: ", 1)[1].split())

    return run


def test_unknown_experiment(refused: Callable[..., str]) -> None:
    message = refused("+experiment=sfd")
    assert "experiment/sfd" in message and "dpo" in message and "sft" in message


def test_unknown_key(refused: Callable[..., str]) -> None:
    message = refused("trainer.max_stepz=3")
    assert "max_stepz" in message


def test_unknown_group_option(refused: Callable[..., str]) -> None:
    message = refused("model=gpt5")
    assert "model/gpt5" in message and "bundled" in message


def test_wrong_type(refused: Callable[..., str]) -> None:
    message = refused("trainer.max_steps=many")
    assert "many" in message and "max_steps" in message


def test_wrong_choice(refused: Callable[..., str]) -> None:
    message = refused("+experiment=dpo", "algorithm.loss_type=sigmund")
    assert "sigmund" in message and "ipo" in message


def test_malformed_override(refused: Callable[..., str]) -> None:
    assert "data.path" in refused("data.path={")


def test_missing_file(refused: Callable[..., str], llama_folder: Path) -> None:
    message = refused(f"model.id={llama_folder}", "data.path=nowhere/rows.jsonl")
    assert "nowhere/rows.jsonl" in message and "no such file" in message


def test_malformed_line_is_named(refused: Callable[..., str], llama_folder: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    path.write_text(path.read_text() + '{"prompt": "a", "completion": \n')
    message = refused(f"model.id={llama_folder}", f"data.path={path}")
    assert "rows.jsonl:21" in message


def test_missing_keys_say_what_was_found_and_what_is_accepted(
    refused: Callable[..., str], llama_folder: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"frage": "a", "antwort": "b"}] * 4)
    message = refused(f"model.id={llama_folder}", f"data.path={path}")
    assert "frage, antwort" in message and "prompt, completion" in message and "data.columns" in message


def test_no_rows(refused: Callable[..., str], llama_folder: Path, tmp_path: Path) -> None:
    message = refused(f"model.id={llama_folder}", f"data.path={write_rows(tmp_path / 'rows.jsonl', [])}")
    assert "no rows" in message


def test_too_many_dropped(refused: Callable[..., str], llama_folder: Path, tmp_path: Path) -> None:
    rows = [*ROWS, *[{"prompt": "x" * 600, "completion": "y"}] * 3]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    message = refused(f"model.id={llama_folder}", f"data.path={path}", "data.max_length=512")
    assert "3 of 23" in message and "512" in message and "data.max_dropped" in message


def test_no_chat_template(refused: Callable[..., str], opt_folder: Path) -> None:
    message = refused(f"model.id={opt_folder}", "data.max_length=2048")
    assert "no chat template" in message and "data.chat_template" in message


def test_unknown_chat_template(refused: Callable[..., str], llama_folder: Path) -> None:
    message = refused(f"model.id={llama_folder}", "data.chat_template=klingon")
    assert "klingon" in message and "chatml" in message


def test_unreachable_model_suggests_the_bundled_one(refused: Callable[..., str]) -> None:
    assert "model=bundled" in refused("model.id=nobody/no-such-model")


def test_model_folder_that_is_none(refused: Callable[..., str]) -> None:
    assert "config.json" in refused("model.id=./missing")


def test_context_beyond_the_model(refused: Callable[..., str], llama_folder: Path) -> None:
    message = refused(f"model.id={llama_folder}", "data.max_length=4096")
    assert "4096" in message and "2048" in message


def test_target_modules_that_match_nothing(refused: Callable[..., str], llama_folder: Path) -> None:
    message = refused(f"model.id={llama_folder}", "peft.target_modules=[query]", "data.max_length=2048")
    assert "query" in message and "q_proj" in message


def test_names_that_are_paths(refused: Callable[..., str]) -> None:
    assert "../evil" in refused("name=../evil")


def test_columns_that_are_no_mapping(refused: Callable[..., str], llama_folder: Path) -> None:
    assert "data.columns=prompt is not a mapping" in refused(f"model.id={llama_folder}", "data.columns=prompt")


def test_precisions_that_would_hurt(refused: Callable[..., str], llama_folder: Path) -> None:
    assert "bf16-mixed" in refused(f"model.id={llama_folder}", "trainer.precision=bf16-true")


@pytest.mark.parametrize("count", [0, -2])
def test_too_few_threads(refused: Callable[..., str], llama_folder: Path, count: int) -> None:
    before = torch.get_num_threads()
    message = refused(f"model.id={llama_folder}", f"trainer.threads={count}")
    assert message == f"trainer.threads={count} must be at least 1; null chooses by measuring."
    assert torch.get_num_threads() == before


def test_threads_that_are_no_number(refused: Callable[..., str], llama_folder: Path) -> None:
    message = refused(f"model.id={llama_folder}", "trainer.threads=all")
    assert "trainer.threads" in message and "all" in message


def test_accumulation_by_lightning(refused: Callable[..., str], llama_folder: Path) -> None:
    extra = "trainer.extra={accumulate_grad_batches: 4}"
    assert "data.batch_size" in refused(f"model.id={llama_folder}", "data.max_length=2048", extra)


def test_held_out_rows_that_are_the_training_rows(
    refused: Callable[..., str], llama_folder: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    message = refused(f"model.id={llama_folder}", f"data.path={path}", f"data.val_path={path}")
    assert "nothing would be held out" in message


def test_unknown_start(refused: Callable[..., str], llama_folder: Path) -> None:
    assert "'other@v3'" in refused(f"model.id={llama_folder}", "start_from=other@v3")


def test_nothing_to_resume(refused: Callable[..., str], llama_folder: Path) -> None:
    assert "no unfinished sft run" in refused(f"model.id={llama_folder}", "resume=last")
    assert "there is no checkpoint" in refused(f"model.id={llama_folder}", "resume=some.ckpt")


def test_truncated_checkpoint(refused: Callable[..., str], llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 half a file")
    assert "cut short" in refused(f"model.id={llama_folder}", f"resume={tmp_path / 'cut.ckpt'}")


def test_more_devices_than_there_are(refused: Callable[..., str], llama_folder: Path) -> None:
    message = refused(
        f"model.id={llama_folder}", "data.max_length=2048", "trainer.accelerator=gpu", "trainer.max_steps=1"
    )
    assert "gpu" in message.lower()


def test_full_disk_while_publishing(
    refused: Callable[..., str], llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_ft.models import adapt

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(adapt, "save_trained", no_space)
    message = refused(
        f"model.id={llama_folder}",
        "data.max_length=2048",
        "data.max_rows=8",
        "data.max_val_rows=2",
        "trainer.max_steps=1",
    )
    assert "No space left" in message and "adapters=" in message


def test_debug_shows_the_traceback(cli: Callable[..., Outcome], own_cache: Path) -> None:
    outcome = cli("name=../evil", "debug=true", "logger=none")
    assert outcome.code == 2 and "Traceback" in outcome.err


def test_a_real_process_exits_with_2_and_is_quick(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lit_ft", "+experiment=sfd"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
