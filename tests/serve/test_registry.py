"""Which adapters a server can serve, and every reason for which it cannot serve one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_ft.adapter import read, scan
from serve.registry import ENGINE_MAX_RANK, MIN_RANK, Rules, newest_first, objection, rules_for, template_in
from tests.serve.published import BASE_HASH, adapter, folder

RULES = Rules(BASE_HASH, 32, None, "the base")


def rules(root: Path, base_template: str | None = None, max_rank: int | None = None) -> Rules:
    return rules_for(scan(root), root, BASE_HASH, base_template, max_rank)


def reason(root: Path, **changes: Any) -> str:
    return objection(adapter(root, **changes), root, RULES)


def test_a_good_one(tmp_path: Path) -> None:
    assert reason(tmp_path) == ""


def test_newest_is_by_the_instant_not_by_the_text(tmp_path: Path) -> None:
    made = [
        adapter(tmp_path, "a", 1, created="2026-03-01T09:00:00+09:00"),  # midnight UTC
        adapter(tmp_path, "b", 1, created="2026-03-01T08:00:00+00:00"),
        adapter(tmp_path, "c", 1, created="no date"),
        adapter(tmp_path, "b", 2, created="2026-03-01T08:00:00"),  # UTC where nothing is said
    ]
    assert [one.ref for one in sorted(made, key=newest_first)] == ["b@v2", "b@v1", "a@v1", "c@v1"]


# --- the base and the card -------------------------------------------------------------------------------------------


def test_another_base(tmp_path: Path) -> None:
    why = reason(tmp_path, base={"id": "facebook/opt-350m", "hash": "sha256:" + "0" * 64})
    assert "another base" in why and "model=facebook/opt-350m" in why


def test_not_servable_gives_the_cards_reason(tmp_path: Path) -> None:
    why = "DoRA: merge it with python -m lit_ft.export."
    assert reason(tmp_path / "a", servable=False, not_servable_reason=why) == why
    assert "cannot be served" in reason(tmp_path / "b", servable=False)


def test_names_that_mean_something_else_here(tmp_path: Path) -> None:
    for name, what in (("base", "the base itself"), ("human", "replies that people wrote")):
        why = objection(adapter(tmp_path, name), tmp_path, RULES)
        assert f"'{name}'" in why and what in why and "another name" in why
    assert objection(adapter(tmp_path, "opt"), tmp_path, replace(RULES, base_name="opt"))
    assert objection(read(tmp_path / "base" / "v1"), tmp_path, replace(RULES, base_name="opt")) == ""
    assert objection(adapter(tmp_path, "based"), tmp_path, RULES) == ""
    assert rules(tmp_path).max_rank == MIN_RANK


# --- what vLLM refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"init_lora_weights": "pissa"}, "change their base"),
        ({"init_lora_weights": "pissa_niter_4"}, "change their base"),
        ({"init_lora_weights": "olora"}, "change their base"),
        ({"init_lora_weights": "corda"}, "change their base"),
        ({"init_lora_weights": "loftq"}, "change their base"),
        ({"peft_type": "LOHA"}, "other than LoRA"),
        ({"peft_type": ["LORA"]}, "other than LoRA"),
    ],
)
def test_what_the_engine_refuses(tmp_path: Path, lora: dict[str, Any], named: str) -> None:
    why = reason(tmp_path, lora=lora)
    [key] = lora
    assert why.startswith("vLLM does not serve ") and named in why and f"({key}=" in why


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": False, "bias": "none", "modules_to_save": None, "alora_invocation_tokens": None},
        {"modules_to_save": [], "alora_invocation_tokens": []},
        *({"init_lora_weights": kind} for kind in (True, False, "gaussian", "eva", "orthogonal")),
        {"use_rslora": True},
    ],
)
def test_what_the_engine_serves(tmp_path: Path, lora: dict[str, Any]) -> None:
    assert reason(tmp_path, lora=lora) == ""


# --- rank ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [{"r": 64}, {"rank_pattern": {"q_proj": 64}}])
def test_rank_above_the_maximum(tmp_path: Path, lora: dict[str, object]) -> None:
    why = reason(tmp_path, lora=lora)
    assert "rank 64" in why and "maximum of 32" in why and "max_lora_rank=64" in why
    assert objection(adapter(tmp_path, "b", lora=lora), tmp_path, Rules(BASE_HASH, 64, None, "")) == ""


def test_rank_that_no_engine_takes(tmp_path: Path) -> None:
    made = adapter(tmp_path, lora={"r": 1024}, rank=1024)
    why = objection(made, tmp_path, Rules(BASE_HASH, 9999, None, ""))
    assert f"maximum of {ENGINE_MAX_RANK}" in why and "max_lora_rank" not in why


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"r": null}',
        '{"r": []}',
        '{"r": 1e999}',
        '{"r": NaN}',
        '{"r": 8, "rank_pattern": [1]}',
        "x",
        "\x00",
    ],
)
def test_rank_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    made = adapter(tmp_path)
    (made.path / "adapter_config.json").write_text(content)
    assert "no rank" in objection(made, tmp_path, RULES)


def test_room_is_made_for_the_ranks_that_are_there(tmp_path: Path) -> None:
    assert rules(tmp_path).max_rank == MIN_RANK
    folder(tmp_path, version=1, lora={"r": 4}, rank=4)
    assert rules(tmp_path).max_rank == MIN_RANK, "room for what is published later"
    folder(tmp_path, version=2, lora={"r": 40}, rank=40)
    folder(tmp_path, version=3, lora={"r": 400, "use_dora": True}, rank=400)
    folder(tmp_path, version=4, lora={"r": 4000}, rank=4000)
    folder(tmp_path, version=5, lora={"r": 64}, rank=64, base={"id": "x/y", "hash": "sha256:0"})
    assert rules(tmp_path).max_rank == 40, "of those that can be served"
    assert rules(tmp_path, max_rank=8).max_rank == 8
    assert "maximum of 8" in objection(read(tmp_path / "support" / "v2"), tmp_path, rules(tmp_path, max_rank=8))


# --- names and links -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "é", "-x", ".x", "<script>", "a\nb", "a@v1", "..b", "x" * 65, "a%2fb"])
def test_a_folder_with_an_odd_name(tmp_path: Path, name: str) -> None:
    assert "names are letters" in reason(tmp_path, name=name)


def test_a_card_that_names_another_folder(tmp_path: Path) -> None:
    made = adapter(tmp_path)
    made.path.rename(tmp_path / "support" / "v7")
    moved = type(made)(tmp_path / "support" / "v7", made.card)
    assert "'support@v1', but its folder is support/v7" in objection(moved, tmp_path, RULES)


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    outside = folder(tmp_path / "elsewhere")
    (tmp_path / "adapters" / "support").mkdir(parents=True)
    (tmp_path / "adapters" / "support" / "v1").symlink_to(outside)
    found = read(tmp_path / "adapters" / "support" / "v1")
    assert "leads out" in objection(found, tmp_path / "adapters", RULES)


@pytest.mark.parametrize("target", ["/etc/hostname", "../../../secret", "/nowhere"])
@pytest.mark.parametrize("name", ["adapter_config.json", "notes.txt"])
def test_a_file_that_is_a_link_out_of_the_folder(tmp_path: Path, target: str, name: str) -> None:
    root = tmp_path / "adapters"
    (tmp_path / "secret").write_text("{}")
    made = adapter(root)
    (made.path / name).unlink(missing_ok=True)
    (made.path / name).symlink_to(target)
    assert "leads out" in objection(made, root, RULES)


def test_links_that_stay_inside(tmp_path: Path) -> None:
    root = tmp_path / "real"
    made = adapter(root)
    (made.path / "same.json").symlink_to("card.json")
    (made.path / "circle").symlink_to("circle")
    (tmp_path / "link").symlink_to(root)
    assert objection(made, root, RULES) == ""
    assert objection(read(tmp_path / "link" / "support" / "v1"), tmp_path / "link", RULES) == ""


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    made = adapter(tmp_path)
    shutil.rmtree(made.path)
    assert "no rank" in objection(made, tmp_path, RULES)
    assert rules_for([made], tmp_path, BASE_HASH, None, None).template_of == "the base"


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = adapter(tmp_path)

    def denied(self: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    assert objection(made, tmp_path, RULES) == "Its folder cannot be read: Permission denied."


# --- chat templates --------------------------------------------------------------------------------------------------


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert template_in(tmp_path) is None and template_in(tmp_path / "none") is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "in the configuration"}))
    assert template_in(tmp_path) == "in the configuration"
    (tmp_path / "chat_template.jinja").write_text("in a file of its own")
    assert template_in(tmp_path) == "in a file of its own"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"chat_template": null}', '{"chat_template": [{"name": "x"}]}'])
def test_no_template_in_the_configuration(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    assert template_in(tmp_path) is None


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_adapters_template_against_the_bases_own(tmp_path: Path, file: str) -> None:
    def put(version: int, template: str) -> None:
        text = template if file.endswith("jinja") else json.dumps({"chat_template": template})
        (folder(tmp_path, version=version) / file).write_text(text)

    folder(tmp_path, version=1)
    assert rules(tmp_path, "B") == Rules(BASE_HASH, MIN_RANK, "B", "the base")
    put(2, "B")
    assert rules(tmp_path, "B") == Rules(BASE_HASH, MIN_RANK, "B", "support@v2")
    under_base = Rules(BASE_HASH, MIN_RANK, "B", "the base")
    assert objection(read(tmp_path / "support" / "v2"), tmp_path, under_base) == "", "the same one"
    put(3, "A")
    why = objection(read(tmp_path / "support" / "v3"), tmp_path, under_base)
    assert "another chat template than the base" in why and "adapters=FOLDER port=" in why
    assert "another chat template" in objection(
        read(tmp_path / "support" / "v3"), tmp_path, Rules(BASE_HASH, MIN_RANK, None, "the base")
    )
    assert rules(tmp_path, "B") == Rules(BASE_HASH, MIN_RANK, "A", "support@v3"), "the newest decides"
    why = objection(read(tmp_path / "support" / "v2"), tmp_path, rules(tmp_path, "B"))
    assert "another chat template than support@v3" in why
    assert objection(read(tmp_path / "support" / "v1"), tmp_path, rules(tmp_path, "B")) == "", "it brings none"


def test_one_that_cannot_be_served_decides_no_template(tmp_path: Path) -> None:
    (folder(tmp_path, version=1) / "chat_template.jinja").write_text("A")
    for version, changes in ((2, {"servable": False}), (3, {"lora": {"use_dora": True}}), (4, {"lora": {"r": 9999}})):
        (folder(tmp_path, version=version, **changes) / "chat_template.jinja").write_text("B")
    assert rules(tmp_path).template == "A"


def test_no_folder_and_broken_ones(tmp_path: Path) -> None:
    assert rules(tmp_path / "absent", "B") == Rules(BASE_HASH, MIN_RANK, "B", "the base")
    (folder(tmp_path) / "card.json").write_text("{")
    assert rules(tmp_path, "B").template_of == "the base"
