"""Which base is served: given, of the newest adapter, or of a folder that only the training's configuration names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lit_ft.adapter import Adapter, Broken
from lit_ft.errors import UserError
from lit_ft.models.resolve import model_fingerprint
from serve import base as bases
from serve.base import Base
from serve.registry import objection, rules_for
from tests.serve.published import adapter

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def model(tmp_path: Path, llama_folder: Path) -> Path:
    """A local model of which a test may do away with."""
    return Path(shutil.copytree(llama_folder, tmp_path / "models" / "my-model"))


def trained(root: Path, model: Path, version: int = 1, *, config: str | None = None, **card: Any) -> Adapter:
    """An adapter as training publishes it on a local model: the card has its name, config.yaml its place."""
    made = adapter(root, version=version, **{"base": {"id": model.name, "hash": model_fingerprint(str(model))}, **card})
    (made.path / "config.yaml").write_text(f"model:\n  id: {model}\n" if config is None else config)
    return made


def test_the_folder_of_the_training_if_it_is_still_the_same(tmp_path: Path, model: Path) -> None:
    root = tmp_path / "adapters"
    found = [trained(root, model, 1), trained(root, model, 2, config="model: {id: /moved/my-model}")]
    base = bases.of_adapters(found)
    assert (base.id, base.place) == (str(model), str(model))
    rules = rules_for(found, root, base.hash, None, None)
    assert [objection(one, root, rules) for one in found] == ["", ""]


def test_a_folder_that_is_gone(tmp_path: Path, model: Path) -> None:
    made = trained(tmp_path / "adapters", model)
    shutil.rmtree(model)
    with pytest.raises(
        UserError, match=r"local model 'my-model' \(support@v1\).*no model now.*with model=FOLDER"
    ) as told:
        bases.of_adapters([made])
    assert "model.id" not in str(told.value)


def test_a_folder_that_holds_another_model_now(tmp_path: Path, model: Path) -> None:
    made = trained(tmp_path / "adapters", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    with pytest.raises(UserError, match=r"another model now.*model=FOLDER"):
        bases.of_adapters([made])


@pytest.mark.parametrize(
    "config", ["", "[", "model: 3", "- a", "model: {id: 7}", "model: {id: }", "\x00", "a: &a [*a]"]
)
def test_a_config_that_says_nothing(tmp_path: Path, model: Path, config: str) -> None:
    made = trained(tmp_path / "adapters", model, config=config)
    with pytest.raises(UserError, match=r"local model 'my-model'.*with model=FOLDER"):
        bases.of_adapters([made])


def test_an_id_of_the_hub_without_owner_is_not_taken_for_a_folder(tmp_path: Path, model: Path) -> None:
    made = trained(
        tmp_path, model, base={"id": "gpt2-of-nobody", "hash": "sha256:0"}, config="model: {id: gpt2-of-nobody}"
    )
    with pytest.raises(UserError, match=r"gpt2-of-nobody.*could not be loaded") as told:
        bases.of_adapters([made])
    assert "local model" not in str(told.value)
    reason = objection(made, tmp_path, rules_for([made], tmp_path, "sha256:1", None, None))
    assert "model=gpt2-of-nobody" in reason


def test_another_base_that_is_local_is_not_advised_by_its_bare_name(tmp_path: Path, model: Path) -> None:
    made = trained(tmp_path / "adapters", model)
    root = tmp_path / "adapters"
    reason = objection(made, root, rules_for([made], root, "sha256:1", None, None))
    assert "the local model 'my-model'" in reason and "model=FOLDER" in reason
    assert "model=my-model" not in reason
    assert str(model.parent) not in reason, "it is shown on the page"


def test_the_newest_servable_adapter_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "given", lambda model_id: Base(model_id, model_id, "sha256:0"))
    old = adapter(tmp_path, version=1, base={"id": "old/base", "hash": "sha256:0"})
    new = adapter(tmp_path, version=2, base={"id": "new/base", "hash": "sha256:1"})
    unservable = adapter(tmp_path, version=3, base={"id": "other/base", "hash": "sha256:2"}, servable=False)
    broken = Broken(tmp_path / "support" / "v4", "Broken.")
    assert bases.of_adapters([old, new, unservable, broken]).id == "new/base"
    assert bases.of_adapters([broken, unservable]).id == "bundled"


def test_a_base_that_is_lost_stops_no_other(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "adapters"
    lost = trained(root, model, 2, base={"id": "nobody/lost", "hash": "sha256:0"})
    assert bases.of_adapters([lost, trained(root, model, 1)]).id == str(model)
    assert "nobody/lost of support@v2 cannot be had" in capsys.readouterr().err
    with pytest.raises(UserError, match="nobody/lost"):
        bases.of_adapters([lost])


@pytest.mark.parametrize("model_id", ["nobody/nothing", "nothing", "./nothing", "/nothing/at/all", "empty"])
def test_errors_name_the_servers_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_id: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as told:
        bases.given(model_id)
    assert "model.id" not in str(told.value)
    if not model_id.startswith(("./", "/")):
        assert "model=FOLDER" in str(told.value)


def test_where_a_base_lies_stays_on_the_server(tmp_path: Path, model: Path) -> None:
    text = bases.describe(Base(str(model), str(model), "sha256:0123"), 2048)
    assert "my-model" in text and str(tmp_path) not in text and "2,048" in text
