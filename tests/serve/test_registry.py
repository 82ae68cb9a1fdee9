"""Which adapters are served, and every reason for which one is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lit_ft.adapter import Adapter, read, scan
from serve.registry import Survey, judge
from tests.serve.published import BASE_HASH, folder


def look(root: Path, max_rank: int | None = None) -> Survey:
    return judge(scan(root), root, BASE_HASH, max_rank)


def refusal(root: Path, max_rank: int | None = None) -> tuple[str, str]:
    """The one refused adapter, beside a good one that must be served all the same."""
    folder(root, "good")
    found = look(root, max_rank)
    assert [one.ref for one in found.served] == ["good@v1"]
    [refused] = found.refused
    return refused.ref_or_path, refused.reason


def test_served_newest_first(tmp_path: Path) -> None:
    folder(tmp_path, "support", 1)
    folder(tmp_path, "support", 3)
    folder(tmp_path, "legal", 2)
    found = look(tmp_path)
    assert [one.ref for one in found.served] == ["support@v3", "legal@v2", "support@v1"]
    assert found.refused == []


def test_newest_is_by_the_instant_not_by_the_text(tmp_path: Path) -> None:
    folder(tmp_path, "a", 1, created="2026-03-01T09:00:00+09:00")  # midnight UTC
    folder(tmp_path, "b", 1, created="2026-03-01T08:00:00+00:00")
    folder(tmp_path, "c", 1, created="no date")
    assert [one.ref for one in look(tmp_path).served] == ["b@v1", "a@v1", "c@v1"]


def test_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    assert look(tmp_path / "absent") == look(tmp_path) == Survey([], [])


def test_half_written_folders_are_not_seen(tmp_path: Path) -> None:
    folder(tmp_path, ".support-0123")
    assert look(tmp_path) == Survey([], [])


def test_another_base(tmp_path: Path) -> None:
    folder(tmp_path, base={"id": "facebook/opt-350m", "hash": "sha256:" + "0" * 64})
    ref, reason = refusal(tmp_path)
    assert ref == "support@v1"
    assert "another base" in reason and "model=facebook/opt-350m" in reason


def test_not_servable_gives_the_cards_reason(tmp_path: Path) -> None:
    folder(tmp_path, servable=False, not_servable_reason="DoRA: merge it with python -m lit_ft.export.")
    assert refusal(tmp_path) == ("support@v1", "DoRA: merge it with python -m lit_ft.export.")


def test_not_servable_without_a_reason(tmp_path: Path) -> None:
    folder(tmp_path, servable=False)
    assert "cannot be served" in refusal(tmp_path)[1]


@pytest.mark.parametrize("lora", [{"r": 64}, {"rank_pattern": {"q_proj": 64}}])
def test_rank_above_the_maximum(tmp_path: Path, lora: dict[str, object]) -> None:
    folder(tmp_path, lora=lora)
    ref, reason = refusal(tmp_path, max_rank=32)
    assert ref == "support@v1"
    assert "rank 64" in reason and "maximum of 32" in reason and "max_lora_rank=64" in reason


def test_rank_that_no_engine_takes(tmp_path: Path) -> None:
    folder(tmp_path, lora={"r": 1024}, rank=1024)
    reason = refusal(tmp_path)[1]
    assert "maximum of 512" in reason and "max_lora_rank" not in reason


@pytest.mark.parametrize("content", ["{}", "[]", '{"r": null}', "not json"])
def test_rank_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (folder(tmp_path) / "adapter_config.json").write_text(content)
    assert "no rank" in refusal(tmp_path)[1]


@pytest.mark.parametrize("name", ["card.json", "adapter_config.json", "adapter_model.safetensors"])
def test_incomplete_folder(tmp_path: Path, name: str) -> None:
    (folder(tmp_path) / name).unlink()
    assert refusal(tmp_path)[0] == "support/v1"


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]", '{"name": "support"}'])
def test_unreadable_card(tmp_path: Path, content: str) -> None:
    (folder(tmp_path) / "card.json").write_text(content)
    assert refusal(tmp_path)[0] == "support/v1"


def test_weights_that_are_not_the_cards(tmp_path: Path) -> None:
    with (folder(tmp_path) / "adapter_model.safetensors").open("ab") as stream:
        stream.write(b"x")
    assert "SHA-256" in refusal(tmp_path)[1]


def test_moved_by_hand(tmp_path: Path) -> None:
    folder(tmp_path, "support", 1).rename(tmp_path / "support" / "v7")
    assert refusal(tmp_path)[0] == "support/v7"


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "a/b", ""])
def test_a_card_whose_name_is_a_path(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path) / "card.json"
    path.write_text(path.read_text().replace('"name": "support"', f'"name": "{name}"'))
    assert refusal(tmp_path)[0] == "support/v1"


@pytest.mark.parametrize("name", ["a b", "é", "-x", "<script>"])
def test_a_folder_with_an_odd_name(tmp_path: Path, name: str) -> None:
    folder(tmp_path, name)
    ref, reason = refusal(tmp_path)
    assert ref == f"{name}/v1" or ref == f"{name}@v1"
    assert "names are letters" in reason


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    outside = folder(tmp_path / "elsewhere", "support")
    (tmp_path / "adapters" / "support").mkdir(parents=True)
    (tmp_path / "adapters" / "support" / "v1").symlink_to(outside)
    ref, reason = refusal(tmp_path / "adapters")
    assert ref == "support@v1" and "leads out" in reason


def test_another_chat_template_than_the_newest(tmp_path: Path) -> None:
    for version, template in ((1, "A"), (2, None), (3, "B"), (4, "A")):
        made = folder(tmp_path, version=version)
        if template:
            (made / "chat_template.jinja").write_text(template)
    folder(tmp_path, "newer", 5, servable=False)  # not served, so it decides nothing
    found = look(tmp_path)
    assert [one.ref for one in found.served] == ["support@v4", "support@v1"]
    reasons = {one.ref_or_path: one.reason for one in found.refused}
    assert set(reasons) == {"newer@v5", "support@v3", "support@v2"}
    for ref in ("support@v3", "support@v2"):
        for part in ("another chat template than support@v4", "adapters=FOLDER port="):
            assert part in reasons[ref]


def test_judging_does_not_scan_again(tmp_path: Path) -> None:
    found: list[Adapter] = [read(folder(tmp_path))]
    shutil.rmtree(tmp_path / "support" / "v1")
    # Its rank is read from the folder, which is gone: refused, and still no exception.
    assert [one.ref_or_path for one in judge(found, tmp_path, BASE_HASH, None).refused] == ["support@v1"]
