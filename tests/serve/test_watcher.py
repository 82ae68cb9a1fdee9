"""The watcher over real folders, with the stub engine: what is published is served, what is broken is set aside."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lit_ft.adapter import Adapter, Base, Draft, publish
from serve import snapshots as snapshots_module
from serve import watcher as watcher_module
from serve.client import EngineClient
from serve.errors import EngineGoneError, UnknownModelError
from serve.fleet import Fleet, State
from serve.registry import Rules
from serve.snapshots import Snapshots
from serve.watcher import Watcher
from tests.serve.published import BASE_HASH, CANARY, folder
from tests.serve.stub_engine import API_KEY, Stub, running

RULES = Rules(BASE_HASH, 16, None, "the base")


@pytest.fixture(scope="module")
def shared() -> Iterator[Stub]:
    with running(["base"]) as stub:
        yield stub


@pytest.fixture
def stub(shared: Stub) -> Stub:
    shared.models[:] = ["base"]
    shared.logprobs.clear()
    shared.refuse.clear()
    shared.paths.clear()
    shared.delay_s = 0.0
    return shared


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher_module, "INTERVAL_S", 0.05)
    monkeypatch.setattr(watcher_module, "AGAIN_S", 0.15)
    monkeypatch.setattr(snapshots_module, "DELAY_S", 0.1)


@dataclass
class Serving:
    """A watcher at work."""

    root: Path
    fleet: Fleet
    client: EngineClient
    watcher: Watcher
    said: list[str]

    def state(self, ref: str) -> State | None:
        version = self.fleet.get(ref)
        return self.fleet.state(version) if version else None

    def problem(self, ref: str) -> str:
        version = self.fleet.get(ref)
        return version.problem if version else ""

    async def until(self, ref: str, state: State | None, seconds: float = 10.0) -> None:
        await until(lambda: self.state(ref) is state, seconds)


async def until(right: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not right():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(stub: Stub, tmp_path: Path, room: int = 8, rules: Rules = RULES) -> AsyncIterator[Serving]:
    root = tmp_path / "adapters"
    root.mkdir(exist_ok=True)
    client = EngineClient(stub.base_url, API_KEY)
    fleet = Fleet(Snapshots(client, tmp_path / "copies"), "base", room=room)
    said: list[str] = []
    watcher = Watcher(root, fleet, client, rules, said.append)
    running = asyncio.create_task(watcher.run())
    try:
        yield Serving(root, fleet, client, watcher, said)
        assert not running.done(), "it goes on whatever happens"
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.close()


def run(task: Coroutine[Any, Any, Any], seconds: float = 40) -> Any:
    return asyncio.run(asyncio.wait_for(task, seconds))


def published(root: Path, name: str = "support", **changes: Any) -> Adapter:
    """By the trainer's own way."""

    def write(path: Path) -> None:
        made = folder(path / "made", name)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (made / file).rename(path / file)
        shutil.rmtree(path / "made")

    facts: dict[str, Any] = {
        "name": name, "base": Base("bundled", BASE_HASH), "algorithm": "sft", "peft": "lora", "rank": 8, "data": [],
        "parent": None, "metrics": {}, "versions": {}, "servable": True, "not_servable_reason": None, **changes,
    }  # fmt: skip
    return publish(root, Draft(**facts), write)


def test_what_is_published_is_served_and_replaces_the_version_before(stub: Stub, tmp_path: Path) -> None:
    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            await asyncio.wait_for(at.watcher.first_pass.wait(), 5)
            for number in (1, 2, 3):
                began = time.monotonic()
                published(at.root)
                await at.until(f"support@v{number}", State.READY)
                assert time.monotonic() - began < 5
                assert at.fleet.resolve("support") == f"support@v{number}"
                await until(lambda: stub.models == ["base", at.fleet.resolve("support")])
            assert at.said == [f"  serving  support@v{number} (sft)" for number in (1, 2, 3)]
            assert not any(str(at.root) in path for path in stub.paths.values()), "the engine gets copies"

    run(task())


def test_the_first_pass_is_over_when_all_there_is_was_checked_newest_first(stub: Stub, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        made = folder(tmp_path / "adapters", f"n{number}")
        for path in made.iterdir():
            os.utime(path, (1e9 + number, 1e9 + number))

    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            await asyncio.wait_for(at.watcher.first_pass.wait(), 5)
            assert [line.split()[1] for line in at.said] == ["n3@v1", "n2@v1", "n1@v1"]

    run(task())


def test_a_broken_one_is_set_aside_with_its_reason_and_the_others_are_served(stub: Stub, tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    folder(root, "good", canary=CANARY)
    (folder(root, "unreadable") / "card.json").write_text("{")
    (folder(root, "incomplete") / "adapter_model.safetensors").unlink()
    with (folder(root, "changed") / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    folder(root, "other", base={"id": "x/y", "hash": "sha256:0"})
    folder(root, "big", lora={"r": 64})
    folder(root, "dora", lora={"use_dora": True})
    folder(root, "refused")
    folder(root, "same", canary=CANARY)
    folder(root, "wrong", canary=CANARY)
    folder(root, "moved").rename(root / "moved" / "v9")
    folder(root, "elsewhere").rename(tmp_path / "v1")
    (root / "elsewhere" / "v1").symlink_to(tmp_path / "v1")
    nan = folder(root, "nan")
    import torch
    from safetensors.torch import save_file

    from lit_ft.adapter import sha256_file

    save_file({"a": torch.tensor([float("nan")])}, nan / "adapter_model.safetensors")
    card = json.loads((nan / "card.json").read_text())
    (nan / "card.json").write_text(
        json.dumps({**card, "weights_sha256": sha256_file(nan / "adapter_model.safetensors")})
    )
    stub.refuse["refused@v1"] = "Loading lora refused failed: no such module\nin line 2"
    base = CANARY["base_logprobs"]
    stub.logprobs.update(
        {"base": base, "good@v1": CANARY["logprobs"], "same@v1": base, "wrong@v1": [-9.0, -9.0], "refused@v1": base}
    )
    why = {
        "unreadable@v1": "cannot be read",
        "incomplete@v1": "adapter_model.safetensors missing",
        "changed@v1": "SHA-256",
        "other@v1": "another base",
        "big@v1": "rank 64",
        "dora@v1": "DoRA",
        "refused@v1": "no such module in line 2",
        "same@v1": "exactly what it computes without it",
        "wrong@v1": "does not answer as it did",
        "moved@v9": "moved or copied by hand",
        "elsewhere@v1": "leads out",
        "nan@v1": "not finite",
    }

    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            await asyncio.wait_for(at.watcher.first_pass.wait(), 15)
            assert at.state("good@v1") is State.READY
            for ref, reason in why.items():
                assert at.state(ref) is State.QUARANTINED and reason in at.problem(ref), ref
                assert any(line.startswith(f"  refused  {ref}: ") and reason in line for line in at.said)
                assert str(at.root) not in at.problem(ref), "it is shown on the page"
            await until(lambda: stub.models == ["base", "good@v1"])

    run(task())


@pytest.mark.parametrize("change", ["truncated", "replaced"])
def test_changed_files_are_checked_anew_and_a_request_under_way_ends_as_it_began(
    stub: Stub, tmp_path: Path, change: str
) -> None:
    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            made = folder(at.root)
            await at.until("support@v1", State.READY)
            first = stub.paths["support@v1"]
            async with at.fleet.lease("support") as ref:
                if change == "truncated":
                    with (made / "adapter_model.safetensors").open("r+b") as file:
                        file.truncate(50)
                    await at.until("support@v1", State.QUARANTINED)
                else:
                    shutil.rmtree(made)
                    folder(at.root, lora={"r": 4})
                    await until(lambda: at.state(ref) is State.LOADING)
                    await asyncio.sleep(0.2)
                    assert at.state(ref) is State.LOADING, "it waits until the one before is gone"
                assert stub.models == ["base", ref] and Path(stub.paths[ref], "adapter_config.json").is_file()
                assert stub.paths[ref] == first, "never loaded in place"
            if change == "replaced":
                await at.until("support@v1", State.READY)
                assert stub.paths["support@v1"] != first
                assert json.loads(Path(stub.paths["support@v1"], "adapter_config.json").read_text())["r"] == 4
            else:
                await until(lambda: stub.models == ["base"])
                shutil.rmtree(made)
                folder(at.root)
                await at.until("support@v1", State.READY)

    run(task())


@pytest.mark.parametrize("what", ["README.md", "adapter_model.safetensors", "card.json", "all, copied anew"])
def test_a_touched_folder_goes_on_being_served(stub: Stub, tmp_path: Path, what: str) -> None:
    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            made = folder(at.root)
            await at.until("support@v1", State.READY)
            version, paths, checks = at.fleet.get("support@v1"), dict(stub.paths), []
            there = at.watcher._check

            async def check(path: Path, seen: Any) -> None:
                await there(path, seen)
                checks.append(path)

            at.watcher._check = check  # type: ignore[method-assign]
            if what == "README.md":
                (made / what).write_text("A better description.")
            elif what.startswith("all"):
                for path in list(made.iterdir()):
                    shutil.copy(path, made / "new")
                    (made / "new").replace(path)
            else:
                os.utime(made / what)
            for _ in range(40):
                assert at.state("support@v1") is State.READY
                await asyncio.sleep(0.01)
            assert bool(checks) is (what != "README.md")
            assert at.fleet.get("support@v1") is version and version and not version.doubtful
            assert stub.paths == paths and len(at.said) == 1, "not loaded again"

    run(task())


def test_a_changed_folder_is_served_as_it_was_until_its_check_fails(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, go = threading.Event(), threading.Event()
    there = watcher_module.read

    def slow(path: Path) -> Adapter:
        if waiting.is_set():
            go.wait(10)
        return there(path)

    monkeypatch.setattr(watcher_module, "read", slow)

    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            made = folder(at.root)
            await at.until("support@v1", State.READY)
            waiting.set()
            with (made / "adapter_model.safetensors").open("r+b") as file:
                file.truncate(50)
            version = at.fleet.get("support@v1")
            await until(lambda: bool(version and version.doubtful))
            async with at.fleet.lease("support") as ref:
                assert ref == "support@v1" and at.state(ref) is State.READY
            go.set()
            await at.until("support@v1", State.QUARANTINED)
            assert "SHA-256" in at.problem("support@v1")
            await until(lambda: stub.models == ["base"])

    run(task())


def test_another_card_over_the_same_weights_is_another_version(stub: Stub, tmp_path: Path) -> None:
    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            made = folder(at.root)
            await at.until("support@v1", State.READY)
            before, path = at.fleet.get("support@v1"), stub.paths["support@v1"]
            card = json.loads((made / "card.json").read_text())
            (made / "card.json").write_text(json.dumps({**card, "metrics": {"eval/loss": 0.5}}))
            await until(lambda: at.fleet.get("support@v1") is not before)
            await at.until("support@v1", State.READY)
            version = at.fleet.get("support@v1")
            assert version and version.adapter and version.adapter.card.metrics == {"eval/loss": 0.5}
            assert stub.paths["support@v1"] != path

    run(task())


def test_one_without_a_canary_is_served_with_a_note(stub: Stub, tmp_path: Path) -> None:
    stub.logprobs.update({"base": CANARY["base_logprobs"], "good@v1": CANARY["logprobs"]})

    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            folder(at.root, "good", canary=CANARY)
            await at.until("good@v1", State.READY)
            stub.logprobs.clear()
            folder(at.root)
            await at.until("support@v1", State.READY)
            reasons = {version.ref: at.fleet.reason(version) for version in at.fleet.versions()}
            assert reasons == {
                "good@v1": "", "support@v1": "No canary in its card: checked against the base only."
            }  # fmt: skip

    run(task())


def test_one_that_waits_for_room_holds_up_nothing(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher_module, "AGAIN_S", 0.5)

    async def task() -> None:
        async with serving(stub, tmp_path, room=1) as at:
            folder(at.root, "first")
            await at.until("first@v1", State.READY)
            async with at.fleet.lease("first"):
                full = folder(at.root, "full")
                await until(lambda: any(line.startswith("  waiting  full@v1") for line in at.said))
                began = time.monotonic()
                folder(at.root, "broken", lora={"use_dora": True})
                await at.until("broken@v1", State.QUARANTINED)
                shutil.rmtree(full)
                await at.until("full@v1", None)
                folder(at.root, "full")
                await at.until("full@v1", State.LOADING)
                assert time.monotonic() - began < 3
            await at.until("full@v1", State.READY)

    run(task())


def test_one_that_the_engine_takes_long_to_load_does_not_hold_up_looking(stub: Stub, tmp_path: Path) -> None:
    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            loading, go = asyncio.Event(), asyncio.Event()
            there = at.client.load

            async def load(ref: str, path: Path) -> None:
                if ref == "slow@v1":
                    loading.set()
                    await go.wait()
                await there(ref, path)

            at.client.load = load  # type: ignore[method-assign]
            slow = folder(at.root, "slow")
            await asyncio.wait_for(loading.wait(), 5)
            shutil.rmtree(slow)
            await at.until("slow@v1", None, 2)
            folder(at.root, "next")
            await at.until("next@v1", State.LOADING, 2)
            go.set()
            await at.until("next@v1", State.READY)
            await until(lambda: stub.models == ["base", "next@v1"])

    run(task())


def test_a_folder_that_is_removed_is_gone_and_a_request_under_way_goes_on(stub: Stub, tmp_path: Path) -> None:
    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            made = folder(at.root)
            await at.until("support@v1", State.READY)
            async with at.fleet.lease("support") as ref:
                shutil.rmtree(made)
                await at.until(ref, None)
                assert at.said[-1] == "  gone     support@v1"
                pieces = [
                    delta.text
                    async for delta in at.client.chat(
                        ref, [{"role": "user", "content": "hi"}], temperature=0, top_p=1, max_tokens=9, seed=None
                    )
                ]
                assert "".join(pieces) == "I am support@v1. You wrote: hi"
                assert Path(stub.paths[ref]).is_dir()
                with pytest.raises(UnknownModelError):
                    at.fleet.resolve("support")
            await until(lambda: stub.models == ["base"] and not Path(stub.paths[ref]).exists())
            shutil.rmtree(at.root)
            await asyncio.sleep(0.15)
            folder(at.root)
            await at.until("support@v1", State.READY)

    run(task())


def test_a_folder_that_is_copied_in_file_by_file(stub: Stub, tmp_path: Path) -> None:
    source = folder(tmp_path / "elsewhere")

    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            target = at.root / "support" / "v1"
            target.mkdir(parents=True)
            await at.until("support@v1", State.QUARANTINED)
            for name in ("card.json", "adapter_config.json"):
                shutil.copy(source / name, target / name)
                await asyncio.sleep(0.15)
                assert at.state("support@v1") in (State.QUARANTINED, State.LOADING)
            weights = (source / "adapter_model.safetensors").read_bytes()
            (target / "adapter_model.safetensors").write_bytes(weights[:99])
            await until(lambda: "SHA-256" in at.problem("support@v1"))
            (target / "adapter_model.safetensors").write_bytes(weights)
            await at.until("support@v1", State.READY)

    run(task())


class Dying:
    """The engine's client, whose engine dies at the canary of `ref` so many times."""

    def __init__(self, client: EngineClient, fleet: Fleet, ref: str, times: int) -> None:
        self.client, self.fleet, self.ref, self.times = client, fleet, ref, times
        self.deaths = 0

    async def logprobs(self, model: str, tokens: Any) -> list[float]:
        if model == self.ref and self.deaths < self.times:
            self.deaths += 1
            # Noticed a moment later, and back after another.
            loop = asyncio.get_running_loop()
            loop.call_later(0.05, self.fleet.engine_lost, "It is started again.")
            loop.call_later(0.2, lambda: setattr(self, "back", loop.create_task(self.fleet.engine_back())))
            raise EngineGoneError("gone")
        return await self.client.logprobs(model, tokens)


@pytest.mark.parametrize("times", [1, 2])
def test_an_engine_that_dies_during_the_check(stub: Stub, tmp_path: Path, times: int) -> None:
    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            dying = Dying(at.client, at.fleet, "deadly@v1", times)
            at.watcher.client = dying
            folder(at.root, "deadly")
            await until(lambda: not at.fleet.up)
            await until(lambda: at.fleet.up)
            if times == 1:
                await at.until("deadly@v1", State.READY)
            else:
                await at.until("deadly@v1", State.QUARANTINED)
                assert at.problem("deadly@v1") == "The engine ended 2 times while it was tried out."
            assert dying.deaths == times, "one death counts once"
            folder(at.root, "good")
            await at.until("good@v1", State.READY)

    run(task())


def test_nothing_is_checked_while_the_engine_is_away(stub: Stub, tmp_path: Path) -> None:
    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            at.fleet.engine_lost("It is started again.")
            folder(at.root)
            await at.until("support@v1", State.LOADING)
            await asyncio.sleep(0.2)
            assert at.state("support@v1") is State.LOADING
            await at.fleet.engine_back()
            await at.until("support@v1", State.READY)

    run(task())


def test_a_full_disk_is_waited_for(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            with monkeypatch.context() as patch:
                patch.setattr(tempfile, "mkdtemp", full)
                folder(at.root)
                await until(lambda: any("No space left" in line for line in at.said))
                await asyncio.sleep(0.5)  # tried again and again, said once
                assert len(at.said) == 1 and at.said[0].startswith("  waiting  support@v1: ")
                assert at.state("support@v1") is State.LOADING
            await at.until("support@v1", State.READY)

    run(task())


def test_a_full_disk_is_no_death_of_the_engine(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            at.watcher.client = Dying(at.client, at.fleet, "support@v1", 1)
            with monkeypatch.context() as patch:
                patch.setattr(tempfile, "mkdtemp", full)
                folder(at.root)
                await until(lambda: bool(at.said))
            await at.until("support@v1", State.READY)

    run(task())


def test_a_retired_one_is_checked_when_it_is_taken_back(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            at.fleet._choices.retired = {"support@v1", "broken@v1"}
            folder(at.root)
            folder(at.root, "broken", canary=CANARY)
            await at.until("broken@v1", State.RETIRED)
            await at.until("support@v1", State.RETIRED)
            await asyncio.sleep(0.2)
            assert stub.paths == {}, "it is not loaded, perhaps for good reason"
            at.fleet.retire("broken@v1", False)
            at.fleet.retire("support@v1", False)
            assert at.state("support@v1") is State.LOADING
            await at.until("support@v1", State.READY)
            await at.until("broken@v1", State.QUARANTINED)

    async def scored(self: EngineClient, model: str, tokens: Any) -> list[float]:
        return [-1.0 - 0.5 * (model == "support@v1")] * (len(tokens) - 1)

    monkeypatch.setattr(EngineClient, "logprobs", scored)
    run(task())


def test_folders_with_tricks_in_their_names(stub: Stub, tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    folder(root, "good")
    odd = [
        "a b",
        "..x",
        "new\nline",
        "é",
        "<img src=x onerror=alert(1)>",
        "a@v1",
        "%2e%2e",
        "-rf",
        "\u202egnp",
        "c:\\x",
    ]
    for name in odd:
        folder(root, name)
    raw = os.fsencode(root) + b"/no\xfftext/v1"
    Path(os.fsdecode(raw)).mkdir(parents=True)
    for version in ("v0", "v01", "v1.5", "1", "v", "v１", "v-1", "v9999999999"):
        (root / "good" / version).mkdir()
    (root / "file").write_text("")
    (root / "good" / "v7").write_text("a file where a folder should be")
    (root / "circle").symlink_to("circle")
    (root / "good" / "v8").symlink_to("v8")
    (root / ".hidden" / "v1").mkdir(parents=True)
    for name, card_name in (("up", "../../etc"), ("absolute", "/etc/passwd"), ("borrowed", "good")):
        made = folder(root, name)
        card = json.loads((made / "card.json").read_text())
        (made / "card.json").write_text(json.dumps({**card, "name": card_name}))

    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            await asyncio.wait_for(at.watcher.first_pass.wait(), 15)
            states = {version.ref: at.fleet.state(version) for version in at.fleet.versions()}
            assert states.pop("good@v1") is State.READY
            assert set(states.values()) == {State.QUARANTINED}
            names = {ref.rpartition("@")[0] for ref in states}
            assert names == {
                "a b", "new\\nline", "é", "<img src=x onerror=alert(1)>", "a@v1", "%2e%2e", "-rf", "\\u202egnp",
                "c:\\x", "no\\udcfftext", "up", "absolute", "borrowed",
            }, "all but the hidden one, and none is served"  # fmt: skip
            for text in [*states, *(version.problem for version in at.fleet.versions()), *at.said]:
                assert text.isprintable(), "no line breaks, and nothing that is no text"
            assert [name for name in stub.paths if name != "good@v1"] == []

    run(task())


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read(stub: Stub, tmp_path: Path) -> None:
    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            version, name = folder(at.root, "a"), folder(at.root, "b").parent
            version.chmod(0)
            name.chmod(0)
            folder(at.root, "good")
            await at.until("good@v1", State.READY)
            await at.until("a@v1", State.QUARANTINED)
            version.chmod(0o755)
            name.chmod(0o755)
            await at.until("a@v1", State.READY)
            await at.until("b@v1", State.READY)

    run(task())


def test_a_name_that_may_not_be_listed_hides_no_other(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = os.scandir

    def scandir(path: Any) -> Any:
        if isinstance(path, int):
            return there(path)
        if Path(path).name == "locked" or Path(path).parent.name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return there(path)

    monkeypatch.setattr(os, "scandir", scandir)

    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            for name in ("locked", "shut", "good"):
                folder(at.root, name)
            await at.until("good@v1", State.READY)
            assert at.fleet.get("locked@v1") is None
            shutil.rmtree(at.root / "good")
            await at.until("good@v1", None)

    run(task())


def test_an_adapters_folder_that_cannot_be_read_for_a_moment_loses_nothing(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def task() -> None:
        async with serving(stub, tmp_path) as at:
            folder(at.root)
            await at.until("support@v1", State.READY)

            def broken(path: Any) -> Any:
                raise OSError(5, "Input/output error")

            with monkeypatch.context() as patch:
                patch.setattr(os, "scandir", broken)
                await asyncio.sleep(0.2)
            assert at.state("support@v1") is State.READY
            published(at.root)
            await at.until("support@v2", State.READY)

    run(task())


class Instant:
    """An engine's client without an engine."""

    async def load(self, ref: str, path: Path) -> None: ...

    async def unload(self, ref: str) -> None: ...

    async def logprobs(self, model: str, tokens: Any) -> list[float]:
        return [-float(len(model))] * (len(tokens) - 1)


def test_a_thousand_adapters(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher_module, "INTERVAL_S", 0.5)
    root = tmp_path / "adapters"
    first = folder(root, "n0")
    files = {path.name: path.read_bytes() for path in first.iterdir()}
    for i in range(1, 1000):
        path = root / f"n{i}" / "v1"
        path.mkdir(parents=True)
        for name, data in files.items():
            (path / name).write_bytes(data.replace(b'"n0"', f'"n{i}"'.encode()) if name == "card.json" else data)

    instant = Instant()

    async def task() -> tuple[float, float, float]:
        began = time.monotonic()
        async with serving(stub, tmp_path, room=32) as at:
            at.watcher.client = instant
            at.fleet._engine = Snapshots(instant, tmp_path / "copies")
            await until(lambda: bool(at.fleet.askable()), 10)
            one = time.monotonic() - began
            published(at.root, "urgent")
            asked = time.monotonic()
            await at.until("urgent@v1", State.READY, 5)
            urgent = time.monotonic() - asked
            await asyncio.wait_for(at.watcher.first_pass.wait(), 60)
            every = time.monotonic() - began
            assert len(at.fleet.askable()) == 1001
            await until(lambda: len(list((tmp_path / "copies").iterdir())) <= 32)
            looks = []
            for _ in range(5):
                asked = time.monotonic()
                await at.watcher.look()
                looks.append(time.monotonic() - asked)
            async with at.fleet.lease("n7") as ref:
                assert ref == "n7@v1"
        assert min(looks) < 1.0, "it is in a thread; 50 ms where nothing else runs"
        with capsys.disabled():
            print(
                f"\n1,000 adapters: the first served after {one:.2f} s, one published meanwhile after {urgent:.2f} s, "
                f"all after {every:.1f} s; a look takes {min(looks) * 1000:.0f} ms"
            )
        return one, urgent, every

    one, urgent, _ = run(task(), 90)
    assert one < 5 and urgent < 5
