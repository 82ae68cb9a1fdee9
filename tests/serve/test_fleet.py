"""Which version a name means, and that the engine holds what it must: by hand, and by hundreds of random steps."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

import pytest

from lit_ft.adapter import Adapter, Base, Card
from lit_ft.errors import UserError
from serve import fleet as fleet_module
from serve.choices import Choices
from serve.errors import EngineGoneError, UnavailableError, UnknownModelError
from serve.fleet import Fleet, State, Version


class Engine:
    """Holds adapters as vLLM does, slowly, and protests against what would break vLLM."""

    def __init__(self, room: int = 99, delay_s: float = 0.0) -> None:
        self.room = room
        self.delay_s = delay_s
        self.held: dict[str, Adapter] = {}
        self.in_use: dict[str, int] = {}
        self.log: list[str] = []
        self.broken: list[str] = []
        self.problem: dict[str, UserError] = {}
        self._changing: set[str] = set()

    def must(self, right: bool, what: str) -> None:
        if not right:
            self.broken.append(what)  # not raised here: somebody might catch it

    async def load(self, adapter: Adapter) -> None:
        ref = adapter.ref
        self.must(ref not in self.held and ref not in self._changing, f"{ref} loaded twice")
        self._changing.add(ref)
        self.must(len(self.held.keys() | self._changing) <= self.room, f"no room for {ref}")
        try:
            await asyncio.sleep(self.delay_s)
            self.log.append(f"+{ref}")
            if problem := self.problem.get(ref):
                raise problem
            self.held[ref] = adapter
        finally:
            self._changing.discard(ref)

    async def unload(self, ref: str) -> None:
        self.must(ref in self.held and ref not in self._changing, f"{ref} unloaded, but not loaded")
        self.must(not self.in_use.get(ref), f"{ref} unloaded in use")
        self._changing.add(ref)
        await asyncio.sleep(self.delay_s)
        self.log.append(f"-{ref}")
        self.held.pop(ref, None)
        self._changing.discard(ref)

    def die(self) -> None:
        self.held.clear()
        self.log.append("died")

    @contextlib.asynccontextmanager
    async def use(self, fleet: Fleet, model: str) -> Any:
        """A request."""
        async with fleet.lease(model) as ref:
            self.must(ref == fleet.base_name or ref in self.held, f"{ref} lent out, but not loaded")
            self.in_use[ref] = self.in_use.get(ref, 0) + 1
            try:
                yield ref
            finally:
                self.in_use[ref] -= 1


def card(ref: str, created: str = "2026-03-01T12:00:00+00:00") -> Adapter:
    name, _, number = ref.partition("@v")
    return Adapter(
        Path("/nowhere", name, f"v{number}"),
        Card(name, int(number), created, Base("b", "h"), "sft", "lora", 8, [], None, {}, {}, "", True),
    )


def make(engine: Engine | None = None, **options: Any) -> tuple[Fleet, Engine]:
    engine = engine or Engine()
    engine.room = options.setdefault("room", 99)
    return Fleet(engine, "base", **options), engine


async def publish(fleet: Fleet, *refs: str, created: str = "2026-03-01T12:00:00+00:00") -> None:
    """As the watcher does it."""
    for ref in refs:
        version = fleet.found(ref, card(ref, created))
        await fleet.try_out(version)
        fleet.passed(version)
    await settled()


async def settled() -> None:
    """What was set going has come to an end, with an engine that takes no time."""
    for _ in range(30):
        await asyncio.sleep(0)


def run(task: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(task, 20))


def held(engine: Engine) -> set[str]:
    assert engine.broken == []
    return set(engine.held)


# --- names -----------------------------------------------------------------------------------------------------------


def test_what_a_name_means() -> None:
    async def task() -> None:
        fleet, _ = make()
        await publish(fleet, "support@v2", "support@v10", "support@v9", "legal@v1")
        found = {name: fleet.resolve(name) for name in ("base", "support", "support@v2", "legal", "legal@v1")}
        assert found == {
            "base": "base", "support": "support@v10", "support@v2": "support@v2", "legal": "legal@v1",
            "legal@v1": "legal@v1",
        }  # fmt: skip

    run(task())


@pytest.mark.parametrize(
    "model", ["", "@", "support@", "support@v3", "support@v01", "SUPPORT", "base@v1", "../support", "x" * 9999, "a\nb"]
)
def test_no_such_model(model: str) -> None:
    async def task() -> None:
        fleet, _ = make()
        await publish(fleet, "support@v1", *(f"n{i}@v1" for i in range(10)))
        with pytest.raises(UnknownModelError, match=r"There is no model.*There are: base, .*n0, .*…") as told:
            fleet.resolve(model)
        assert len(str(told.value)) < 400
        with pytest.raises(UnknownModelError):
            async with fleet.lease(model):
                pass

    run(task())


def test_versions_are_ordered_by_number_though_the_clock_went_back() -> None:
    async def task() -> None:
        fleet, engine = make()
        await publish(fleet, "support@v1", created="2031-01-01T00:00:00+00:00")
        await publish(fleet, "support@v2", created="2020-01-01T00:00:00+00:00")
        assert fleet.resolve("support") == "support@v2" and fleet.newer("support@v1") == "support@v2"
        assert [v.ref for v in fleet.versions()] == ["support@v2", "support@v1"]
        assert [v.ref for v in fleet.askable()] == ["support@v2", "support@v1"]
        assert fleet.default == "support@v2"
        assert held(engine) == {"support@v2"}

    run(task())


def test_the_newest_of_each_name_is_offered_before_older_versions() -> None:
    async def task() -> None:
        fleet, _ = make()
        await publish(fleet, "a@v1", created="2026-03-03T00:00:00+00:00")
        await publish(fleet, "a@v2", created="2026-03-04T00:00:00+00:00")
        await publish(fleet, "b@v1", created="2026-03-01T00:00:00+00:00")
        assert [v.ref for v in fleet.askable()] == ["a@v2", "b@v1", "a@v1"]
        assert [one.id for one in fleet.listed()] == ["base", "a", "b", "a@v2", "b@v1", "a@v1"]

    run(task())


def test_newer() -> None:
    async def task() -> None:
        fleet, _ = make()
        await publish(fleet, "support@v1", "support@v3", "legal@v1")
        assert fleet.newer("support@v1") == "support@v3"
        assert fleet.newer("support@v2") == "support@v3", "gone, but a chat may be of it"
        for ref in ("support@v3", "support@v4", "legal@v1", "base", "nobody@v1", "support", "support@vx"):
            assert fleet.newer(ref) is None
        fleet.retire("support@v3")
        assert fleet.newer("support@v1") is None

    run(task())


def test_what_may_not_be_asked_says_why() -> None:
    async def task() -> None:
        fleet, _ = make()
        await publish(fleet, "good@v1", "support@v1")
        fleet.retire("support@v1")
        fleet.quarantine(fleet.found("broken@v1", None), "Its weights are broken.")
        fleet.found("fresh@v1", card("fresh@v1"))
        for names, why in (
            (("broken@v1", "broken"), "Its weights are broken."),
            (("support@v1", "support"), "Retired by hand."),
            (("fresh@v1", "fresh"), "It is being checked"),
        ):
            for name in names:
                with pytest.raises(
                    UnknownModelError, match=rf"@v1 cannot be asked now. {why}.*There are: base, good\."
                ):
                    async with fleet.lease(name):
                        pass
        states = {v.ref: fleet.state(v) for v in fleet.versions()}
        assert states == {
            "good@v1": State.READY, "support@v1": State.RETIRED, "broken@v1": State.QUARANTINED,
            "fresh@v1": State.LOADING,
        }  # fmt: skip
        await publish(fleet, "support@v2")
        assert fleet.resolve("support") == "support@v2"

    run(task())


# --- what people choose ----------------------------------------------------------------------------------------------


def test_the_default() -> None:
    async def task() -> None:
        fleet, engine = make()
        assert fleet.default == "base"
        await publish(fleet, "support@v1", created="2026-03-01T00:00:00+00:00")
        await publish(fleet, "legal@v1", created="2026-03-02T00:00:00+00:00")
        assert fleet.default == "legal@v1"
        fleet.set_default("support")
        await publish(fleet, "support@v2", created="2026-03-03T00:00:00+00:00")
        assert fleet.default == "support@v1" and fleet.default_is_set, "one version was chosen, not a name"
        assert "support@v1" in held(engine), "the default stays loaded"
        fleet.set_default("base")
        assert fleet.default == "base"
        fleet.set_default("support@v1")
        fleet.retire("support@v1")
        assert fleet.default == "support@v2" and not fleet.default_is_set
        fleet.retire("support@v1", False)
        assert fleet.default == "support@v2", "restoring it does not make it the default again"
        fleet.set_default(None)
        with pytest.raises(UnknownModelError):
            fleet.set_default("nobody")
        await settled()
        assert held(engine) == {"support@v2", "legal@v1"}

    run(task())


def test_choices_are_kept_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "choices.json"

    async def first() -> None:
        fleet, _ = make(choices=Choices.read(path))
        await publish(fleet, "a@v1", "a@v2", "b@v1", "c@v1", "c@v2")
        fleet.pin("a@v1", True)
        fleet.pin("c@v1", True)
        fleet.pin("c@v1", False)
        fleet.retire("b@v1")
        fleet.retire("c@v2")
        fleet.retire("c@v2", False)
        fleet.set_default("c@v1")

    async def second() -> None:
        fleet, engine = make(choices=Choices.read(path))
        assert fleet.default == "base", "not yet found"
        await publish(fleet, "a@v1", "a@v2", "b@v1", "c@v1", "c@v2")
        assert fleet.default == "c@v1"
        assert {v.ref for v in fleet.versions() if v.pinned} == {"a@v1"}
        assert {v.ref for v in fleet.versions() if v.withdrawn} == {"b@v1"}
        assert held(engine) == {"a@v1", "a@v2", "c@v1", "c@v2"}

    run(first())
    run(second())


def test_choices_that_cannot_be_kept_still_hold(tmp_path: Path) -> None:
    async def task() -> None:
        (tmp_path / "file").write_text("")
        fleet, engine = make(choices=Choices.read(tmp_path / "file" / "choices.json"))
        await publish(fleet, "a@v1")
        fleet.pin("a@v1", True)
        fleet.set_default("a@v1")
        await publish(fleet, "a@v2")
        assert held(engine) == {"a@v1", "a@v2"} and fleet.default == "a@v1"

    run(task())


def test_choices_about_what_is_not_there_do_nothing() -> None:
    async def task() -> None:
        fleet, _ = make()
        before = fleet.revision
        fleet.pin("nobody@v1", True)
        fleet.retire("nobody@v1")
        assert fleet.revision == before and fleet.versions() == []

    run(task())


def test_retired_by_hand_it_ends_its_requests_and_is_unloaded() -> None:
    async def task() -> None:
        fleet, engine = make()
        await publish(fleet, "a@v1")
        async with engine.use(fleet, "a@v1"):
            fleet.retire("a@v1")
            await settled()
            assert held(engine) == {"a@v1"}
            with pytest.raises(UnknownModelError):
                fleet.resolve("a")
        await settled()
        assert held(engine) == set()
        fleet.retire("a@v1", False)
        async with engine.use(fleet, "a") as ref:
            assert ref == "a@v1"

    run(task())


# --- what the engine holds -------------------------------------------------------------------------------------------


def test_a_superseded_version_is_unloaded_when_its_last_lease_ends_and_loaded_again_by_its_full_name() -> None:
    async def task() -> None:
        fleet, engine = make()
        await publish(fleet, "a@v1")
        async with engine.use(fleet, "a") as first:
            async with engine.use(fleet, "a@v1"):
                await publish(fleet, "a@v2")
                async with engine.use(fleet, "a") as second:
                    assert (first, second) == ("a@v1", "a@v2")
            await settled()
            assert held(engine) == {"a@v1", "a@v2"}, "one lease is left"
        await settled()
        assert held(engine) == {"a@v2"}
        old = fleet.get("a@v1")
        assert old and fleet.state(old) is State.RETIRED and "a@v2 took its place" in fleet.reason(old)
        async with engine.use(fleet, "a@v1") as ref:
            # It serves this request, and no new chat: nothing that the pages would show differently.
            assert ref == "a@v1" and fleet.state(old) is State.RETIRED and held(engine) == {"a@v1", "a@v2"}
        await settled()
        assert held(engine) == {"a@v2"}
        assert engine.log == ["+a@v1", "+a@v2", "-a@v1", "+a@v1", "-a@v1"]

    run(task())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_versions_of_each_name_are_kept(keep: int) -> None:
    async def task() -> None:
        fleet, engine = make(keep_versions=keep)
        await publish(fleet, "a@v1", "b@v7", "a@v2", "a@v3", "a@v4")
        assert held(engine) == {"b@v7", *["a@v4", "a@v3", "a@v2"][:keep]}
        fleet.pin("a@v1", True)
        async with engine.use(fleet, "a@v1"):
            pass
        await settled()
        assert "a@v1" in held(engine), "pinned, so it stays"
        fleet.pin("a@v1", False)
        await settled()
        assert "a@v1" not in held(engine)

    run(task())


def test_what_ends_while_another_is_unloaded_is_unloaded_too() -> None:
    async def task() -> None:
        fleet, engine = make(Engine(delay_s=0.02))
        await publish(fleet, "a@v1", "b@v1")
        async with engine.use(fleet, "a@v1"):
            async with engine.use(fleet, "b@v1"):
                await publish(fleet, "a@v2", "b@v2")
            await asyncio.sleep(0.005)  # b@v1 is being unloaded, and a@v1 has been passed over
        await asyncio.sleep(0.1)
        assert held(engine) == {"a@v2", "b@v2"}

    run(task())


def test_more_than_there_is_room_for_goes_least_recently_used_first() -> None:
    async def task() -> None:
        fleet, engine = make(room=3)
        await publish(fleet, "a@v1", "b@v1", "c@v1")
        for name in ("a", "c", "b"):
            async with engine.use(fleet, name):
                await asyncio.sleep(0.002)
        await publish(fleet, "d@v1")
        assert held(engine) == {"b@v1", "c@v1", "d@v1"}
        async with engine.use(fleet, "c"), engine.use(fleet, "a"):
            assert held(engine) == {"a@v1", "c@v1", "d@v1"}
            async with engine.use(fleet, "b"):
                assert held(engine) == {"a@v1", "b@v1", "c@v1"}, "never one in use, though used longer ago"

    run(task())


def test_pinned_ones_go_last() -> None:
    async def task() -> None:
        fleet, engine = make(room=2)
        await publish(fleet, "a@v1")
        fleet.pin("a@v1", True)
        await publish(fleet, "b@v1", "c@v1")
        assert held(engine) == {"a@v1", "c@v1"}

    run(task())


def test_all_in_use_waits_and_then_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def task() -> None:
        fleet, engine = make(room=1)
        await publish(fleet, "a@v1")
        await publish(fleet, "b@v1")
        async with engine.use(fleet, "a"):
            monkeypatch.setattr(fleet_module, "WAIT_FOR_ROOM_S", 0.05)
            with pytest.raises(UnavailableError, match="1 other adapters are in use"):
                async with engine.use(fleet, "b"):
                    pass
            monkeypatch.setattr(fleet_module, "WAIT_FOR_ROOM_S", 10.0)
            waiting = [asyncio.create_task(ask(fleet, engine, "b")) for _ in range(3)]
            await settled()
            assert not any(one.done() for one in waiting)
        assert await asyncio.gather(*waiting) == ["b@v1"] * 3
        assert held(engine) == {"b@v1"}

    run(task())


async def ask(fleet: Fleet, engine: Engine, model: str, seconds: float = 0.0) -> str:
    async with engine.use(fleet, model) as ref:
        await asyncio.sleep(seconds)
        return str(ref)


def test_two_leases_of_an_unloaded_version_load_it_once() -> None:
    async def task() -> None:
        fleet, engine = make(Engine(delay_s=0.01))
        await publish(fleet, "a@v1", "a@v2")
        await asyncio.sleep(0.05)
        engine.log.clear()
        assert await asyncio.gather(*(ask(fleet, engine, "a@v1", 0.01) for _ in range(5))) == ["a@v1"] * 5
        await asyncio.sleep(0.05)
        assert engine.log == ["+a@v1", "-a@v1"] and engine.broken == []

    run(task())


@pytest.mark.parametrize("problem", [UserError("refused"), EngineGoneError("gone"), UnavailableError("disk full")])
def test_an_error_while_loading_leaves_it_loadable(problem: UserError) -> None:
    async def task() -> None:
        fleet, engine = make(room=1)
        await publish(fleet, "a@v1", "a@v2")
        engine.problem["a@v1"] = problem
        for _ in range(3):
            with pytest.raises(type(problem), match=str(problem)):
                await ask(fleet, engine, "a@v1")
        assert held(engine) == set(), "room was made for it"
        del engine.problem["a@v1"]
        assert await ask(fleet, engine, "a@v1") == "a@v1"

    run(task())


def test_a_lease_that_comes_while_it_is_unloaded_loads_it_again() -> None:
    async def task() -> None:
        fleet, engine = make(Engine(delay_s=0.02))
        await publish(fleet, "a@v1")
        fleet.found("a@v2", card("a@v2"))
        version = fleet.get("a@v2")
        assert version
        await fleet.try_out(version)
        fleet.passed(version)
        await asyncio.sleep(0.01)  # a@v1 is on its way out
        assert engine.log == ["+a@v1", "+a@v2"] and "a@v1" in engine._changing
        assert await ask(fleet, engine, "a@v1") == "a@v1"
        assert engine.log == ["+a@v1", "+a@v2", "-a@v1", "+a@v1"] and engine.broken == []

    run(task())


@pytest.mark.parametrize("during", ["load", "unload"])
def test_whoever_goes_away_while_adapters_are_swapped_leaves_no_doubt_about_what_is_loaded(during: str) -> None:
    async def task() -> None:
        fleet, engine = make(Engine(delay_s=0.03), room=1)
        await publish(fleet, "a@v1")
        await publish(fleet, "b@v1")
        gone = asyncio.create_task(ask(fleet, engine, "a"))
        await asyncio.sleep(0.045 if during == "load" else 0.015)
        assert engine._changing == {"a@v1" if during == "load" else "b@v1"}
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        for name in ("b", "a", "b"):
            assert await ask(fleet, engine, name) == f"{name}@v1"
        assert held(engine) == {"b@v1"}

    run(task())


def test_what_is_being_checked_makes_no_room() -> None:
    async def task() -> None:
        fleet, engine = make(room=2)
        await publish(fleet, "a@v1", "b@v1")
        version = fleet.found("new@v1", card("new@v1"))
        await fleet.try_out(version)
        for name in ("a", "b", "a", "b"):
            await ask(fleet, engine, name)
            assert "new@v1" in held(engine), "its canary is under way"
        fleet.quarantine(version, "It failed.")
        await settled()
        assert "new@v1" not in held(engine)

    run(task())


# --- folders that go and change --------------------------------------------------------------------------------------


def test_a_folder_that_is_gone_ends_no_request() -> None:
    async def task() -> None:
        fleet, engine = make()
        await publish(fleet, "a@v1")
        version = fleet.get("a@v1")
        assert version
        async with engine.use(fleet, "a"):
            await fleet.forget(version)
            assert fleet.versions() == [] and held(engine) == {"a@v1"}
            fleet.stats("a@v1").add(failed=False)
            with pytest.raises(UnknownModelError):
                fleet.resolve("a@v1")
        await settled()
        assert held(engine) == set()
        assert version.served.requests == 1 and fleet.base_served.requests == 0

    run(task())


def test_a_folder_that_changed_is_never_loaded_in_place() -> None:
    async def task() -> None:
        fleet, engine = make()
        await publish(fleet, "a@v1")
        old = fleet.get("a@v1")
        assert old
        async with engine.use(fleet, "a"):
            await fleet.forget(old)
            new = fleet.found("a@v1", card("a@v1", "2027-01-01T00:00:00+00:00"))
            for _ in range(2):
                with pytest.raises(UnavailableError, match="a@v1 is in use at this moment as it was before"):
                    await asyncio.wait_for(fleet.try_out(new), 1.0)
            assert engine.held["a@v1"] is old.adapter
        await fleet.try_out(new)
        fleet.passed(new)
        assert engine.held["a@v1"] is new.adapter and engine.broken == []
        assert engine.log == ["+a@v1", "-a@v1", "+a@v1"]

    run(task())


def test_what_was_forgotten_meanwhile_is_not_loaded() -> None:
    async def task() -> None:
        fleet, engine = make(Engine(delay_s=0.02))
        version = fleet.found("a@v1", card("a@v1"))
        await fleet.forget(version)
        with pytest.raises(UnknownModelError, match="not here any more"):
            await fleet.try_out(version)
        version = fleet.found("a@v1", card("a@v1"))
        trying = asyncio.create_task(fleet.try_out(version))
        await asyncio.sleep(0.01)
        await fleet.forget(version)
        await asyncio.gather(trying, return_exceptions=True)
        assert held(engine) == set()
        version = fleet.found("a@v1", card("a@v1"))
        engine.problem["a@v1"] = UserError("refused")
        trying = asyncio.create_task(fleet.try_out(version))
        await asyncio.sleep(0.01)
        await fleet.forget(version)
        await asyncio.gather(trying, return_exceptions=True)
        engine.problem.clear()
        await publish(fleet, "a@v1")
        assert held(engine) == {"a@v1"}

    run(task())


def test_a_check_does_not_wait_for_room_but_for_what_is_just_being_unloaded() -> None:
    async def task() -> None:
        fleet, engine = make(Engine(delay_s=0.03), room=1)
        await publish(fleet, "a@v1")
        new = fleet.found("b@v1", card("b@v1"))
        async with engine.use(fleet, "a"):
            with pytest.raises(UnavailableError, match="1 other adapters are in use"):
                await asyncio.wait_for(fleet.try_out(new), 1.0)
        version = fleet.get("a@v1")
        assert version
        unloading = fleet.forget(version)
        await asyncio.sleep(0.01)
        assert engine._changing == {"a@v1"}
        await fleet.try_out(new)
        assert unloading.done() and held(engine) == {"b@v1"}

    run(task())


def test_forgetting_waits_for_nothing_and_wakes_who_waits_for_room() -> None:
    async def task() -> None:
        fleet, engine = make(room=1)
        await publish(fleet, "a@v1")
        await publish(fleet, "b@v1")
        async with engine.use(fleet, "a"):
            waiting = asyncio.create_task(ask(fleet, engine, "b"))
            await settled()
            version = fleet.get("b@v1")
            assert version and version.lock.locked()
            fleet.forget(version)
            with pytest.raises(UnknownModelError, match="b@v1 is not here any more"):
                await asyncio.wait_for(waiting, 1.0)
        assert held(engine) == {"a@v1"}
        # The same while it is being loaded, however long the engine takes for that.
        engine.delay_s = 0.1
        version = fleet.found("c@v1", card("c@v1"))
        trying = asyncio.create_task(fleet.try_out(version))
        await asyncio.sleep(0.15)
        assert engine._changing == {"c@v1"}
        began = asyncio.get_running_loop().time()
        unloading = fleet.forget(version)
        assert asyncio.get_running_loop().time() - began < 0.05 and fleet.get("c@v1") is None
        await asyncio.gather(trying, unloading)
        assert held(engine) == set() and not fleet._leaving

    run(task())


def test_what_the_engine_refuses_to_unload_still_takes_room_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def task() -> None:
        monkeypatch.setattr(fleet_module, "AGAIN_S", 0.1)
        monkeypatch.setattr(fleet_module, "WAIT_FOR_ROOM_S", 0.03)
        fleet, engine = make(room=2)
        await publish(fleet, "a@v1")
        there, tries = engine.unload, []

        async def refuse(ref: str) -> None:
            tries.append(ref)
            raise UserError("The engine could not unload it.")

        engine.unload = refuse  # type: ignore[method-assign]
        await publish(fleet, "a@v2")
        old = fleet.get("a@v1")
        assert old and old.resident and held(engine) == {"a@v1", "a@v2"} and tries == ["a@v1"]
        await fleet.forget(old)
        assert tries == ["a@v1"] * 2
        again = fleet.found("a@v1", card("a@v1"))
        with pytest.raises(UnavailableError):  # not in place
            await fleet.try_out(again)
        async with engine.use(fleet, "a@v2"):
            with pytest.raises(UnavailableError):  # and no more than there is room for
                await fleet.try_out(fleet.found("b@v1", card("b@v1")))
        assert tries == ["a@v1"] * 2, "not asked all the time"
        engine.unload = there  # type: ignore[method-assign]
        await asyncio.sleep(0.25)
        assert held(engine) == {"a@v2"} and not fleet._leaving
        await fleet.try_out(again)
        assert held(engine) == {"a@v1", "a@v2"}

    run(task())


def test_an_engine_that_ends_while_it_unloads_holds_nothing() -> None:
    async def task() -> None:
        fleet, engine = make()
        await publish(fleet, "a@v1")

        async def gone(ref: str) -> None:
            engine.die()
            raise EngineGoneError("gone")

        engine.unload = gone  # type: ignore[method-assign]
        await publish(fleet, "a@v2")
        version = fleet.get("a@v1")
        assert version and not version.resident

    run(task())


def test_what_is_being_checked_again_serves_on_but_is_not_loaded_from_its_folder() -> None:
    async def task() -> None:
        fleet, engine = make(room=1)
        await publish(fleet, "a@v1")
        version = fleet.get("a@v1")
        assert version
        version.doubtful = True
        assert await ask(fleet, engine, "a") == "a@v1"
        await publish(fleet, "b@v1")
        with pytest.raises(UnavailableError, match="a@v1 is being checked again"):
            await ask(fleet, engine, "a")
        version.doubtful = False
        assert await ask(fleet, engine, "a") == "a@v1"

    run(task())


def test_a_note_is_told_of_what_is_ready() -> None:
    async def task() -> None:
        fleet, _ = make()
        await publish(fleet, "a@v1")
        version = fleet.get("a@v1")
        assert version and fleet.reason(version) == ""
        version.note = "No canary."
        assert fleet.reason(version) == "No canary."
        fleet.retire("a@v1")
        assert fleet.reason(version) == "Retired by hand."
        fleet.retire("a@v1", False)
        await publish(fleet, "a@v2")
        assert fleet.reason(version).startswith("a@v2 took its place.")

    run(task())


# --- the engine's end ------------------------------------------------------------------------------------------------


def test_an_engine_that_is_lost_and_comes_back() -> None:
    async def task() -> None:
        fleet, engine = make()
        await publish(fleet, "a@v1", "a@v2", "b@v1")
        async with engine.use(fleet, "a"):
            engine.die()
            fleet.engine_lost("It is started again.")
            assert not fleet.up and fleet.down_reason == "It is started again."
            for model in ("base", "a", "b@v1"):
                with pytest.raises(UnavailableError, match="It is started again"):
                    await ask(fleet, engine, model)
        await settled()
        engine.log.clear()
        await fleet.engine_back()
        assert fleet.up and fleet.down_reason == ""
        assert sorted(engine.log) == ["+a@v2", "+b@v1"]
        assert [await ask(fleet, engine, name) for name in ("base", "a", "a@v1")] == ["base", "a@v2", "a@v1"]
        assert engine.broken == []

    run(task())


def test_no_more_than_there_is_room_for_is_loaded_into_an_engine_that_is_back() -> None:
    async def task() -> None:
        fleet, engine = make(room=2)
        await publish(fleet, "a@v1", "b@v1", "c@v1", "d@v1")
        engine.die()
        fleet.engine_lost("")
        await fleet.engine_back()
        assert len(held(engine)) == 2

    run(task())


def test_one_that_cannot_be_loaded_again_keeps_no_other_away() -> None:
    async def task() -> None:
        fleet, engine = make()
        await publish(fleet, "a@v1", "b@v1", "c@v1")
        engine.die()
        fleet.engine_lost("")
        engine.problem = {"a@v1": UserError("Its weights changed."), "b@v1": UnavailableError("The disk is full.")}
        await fleet.engine_back()
        assert held(engine) == {"c@v1"}
        with pytest.raises(UnknownModelError, match="Its weights changed"):
            fleet.resolve("a")
        del engine.problem["b@v1"]
        assert await ask(fleet, engine, "b") == "b@v1", "a full disk passes"

    run(task())


def test_an_engine_that_ends_while_it_is_given_its_adapters() -> None:
    async def task() -> None:
        fleet, engine = make()
        await publish(fleet, "a@v1")
        engine.die()
        fleet.engine_lost("")
        engine.problem["a@v1"] = EngineGoneError("gone")
        with pytest.raises(EngineGoneError):
            await fleet.engine_back()
        assert fleet.resolve("a") == "a@v1", "not its fault, for all we know"

    run(task())


def test_a_version_that_ends_the_engine_twice_in_a_row_is_quarantined() -> None:
    async def task() -> None:
        fleet, engine = make()
        await publish(fleet, "a@v1", "b@v1")

        async def back() -> None:
            engine.die()
            fleet.engine_lost("")
            await fleet.engine_back()

        gone = {"b@v1": EngineGoneError("gone")}
        for _ in range(3):  # it went well between them: an accident each
            engine.problem = dict(gone)
            with pytest.raises(EngineGoneError):
                await back()
            engine.problem = {}
            await back()
        assert fleet.blamed == 0
        engine.problem = dict(gone)
        for _ in range(2):
            with pytest.raises(EngineGoneError):
                await back()
        version = fleet.get("b@v1")
        assert version and fleet.state(version) is State.QUARANTINED and "ended 2 times" in version.problem
        await back()
        assert held(engine) == {"a@v1"} and fleet.blamed == 1

    run(task())


def test_a_version_is_not_blamed_for_the_engines_end_while_another_was_loaded() -> None:
    async def task() -> None:
        fleet, engine = make(Engine(delay_s=0.01))
        await publish(fleet, "a@v1", "b@v1", "b@v2")
        await asyncio.sleep(0.05)
        engine.problem = {"a@v1": EngineGoneError("gone"), "b@v1": EngineGoneError("gone")}
        for _ in range(3):
            engine.die()
            fleet.engine_lost("")
            loading = asyncio.create_task(fleet.engine_back())
            await asyncio.sleep(0.002)
            with pytest.raises(EngineGoneError):
                await ask(fleet, engine, "b@v1")
            with pytest.raises(EngineGoneError):
                await loading
        assert fleet.resolve("a") == "a@v1"

    run(task())


def test_lost_while_loading() -> None:
    async def task() -> None:
        fleet, engine = make(Engine(delay_s=0.02))
        await publish(fleet, "a@v1", "a@v2")
        await asyncio.sleep(0.05)
        asking = asyncio.create_task(ask(fleet, engine, "a@v1"))
        await asyncio.sleep(0.01)
        engine.die()
        fleet.engine_lost("It is started again.")
        with pytest.raises(UnavailableError, match="started again"):
            await asking
        assert not any(v.resident for v in fleet.versions())

    run(task())


def test_the_revision_grows_with_each_visible_change() -> None:
    async def task() -> None:
        fleet, _ = make()
        seen = [fleet.revision]

        async def grown(work: Any) -> None:
            if asyncio.iscoroutine(work):
                await work
            await settled()
            assert fleet.revision > seen[-1]
            seen.append(fleet.revision)

        version = fleet.found("a@v1", card("a@v1"))
        await grown(None)
        await fleet.try_out(version)
        assert fleet.revision == seen[-1], "loaded for its canary, it is not listed yet"
        await grown(fleet.passed(version))
        await grown(fleet.pin("a@v1", True))
        await grown(fleet.retire("a@v1"))
        await grown(fleet.retire("a@v1", False))
        await grown(fleet.set_default("a@v1"))
        await grown(fleet.engine_lost(""))
        await grown(fleet.engine_back())
        await grown(fleet.quarantine(version, "broken"))
        await grown(fleet.forget(version))
        async with fleet.lease("base"):
            await settled()
        assert fleet.revision == seen[-1], "a request is no change"

    run(task())


def test_statistics() -> None:
    async def task() -> None:
        fleet, _ = make()
        await publish(fleet, "a@v1")
        served = fleet.stats("a@v1")
        assert (served.median_ttft_s, served.median_tokens_per_s) == (None, None)
        for ttft, rate in ((0.1, 10.0), (0.5, 30.0), (0.3, 0.0)):
            served.add(False, ttft, rate)
        served.add(True)
        assert (served.requests, served.failed) == (4, 1)
        assert (served.median_ttft_s, served.median_tokens_per_s) == (0.3, 20.0), "a rate of 0 is none"
        assert fleet.stats("base") is fleet.base_served

    run(task())


def test_a_thousand_versions_take_no_time_to_list() -> None:
    async def task() -> None:
        fleet, _ = make(room=32)
        for i in range(1000):
            version = fleet.found(f"n{i}@v1", card(f"n{i}@v1"))
            fleet.passed(version)
        began = asyncio.get_running_loop().time()
        for _ in range(5):
            fleet.changed()
            assert len(fleet.askable()) == len(fleet.versions()) == 1000
            assert len(fleet.listed()) == 2001
            assert [fleet.state(version) for version in fleet.versions()] == [State.READY] * 1000
        assert asyncio.get_running_loop().time() - began < 1.0  # 5 times; it was 2 s each when names were compared

    run(task())


# --- at random -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_at_random(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens, in whatever order: the engine double's rules are kept, and it ends as it should."""
    monkeypatch.setattr(fleet_module, "WAIT_FOR_ROOM_S", 0.05)
    draw = random.Random(seed)
    kept: list[Version] = []
    fine = (UnknownModelError, UnavailableError, UserError, asyncio.CancelledError)

    async def request(fleet: Fleet, engine: Engine, model: str) -> None:
        with contextlib.suppress(UserError):
            async with engine.use(fleet, model):
                await asyncio.sleep(draw.random() * 0.004)

    async def arrive(fleet: Fleet, ref: str) -> None:
        version = fleet.found(ref, card(ref))
        kept.append(version)
        try:
            await fleet.try_out(version)
            await asyncio.sleep(0.001)
        except UserError:
            if fleet.get(ref) is version:
                fleet.quarantine(version, "It could not be loaded.")
            return
        if fleet.get(ref) is version:
            fleet.passed(version) if draw.random() < 0.9 else fleet.quarantine(version, "It failed.")

    async def change(fleet: Fleet, version: Version) -> None:
        await fleet.forget(version)
        if draw.random() < 0.6:
            await arrive(fleet, version.ref)

    async def restart(fleet: Fleet, engine: Engine) -> None:
        engine.die()
        fleet.engine_lost("restarting")
        await asyncio.sleep(0.003)
        engine.die()  # what was loaded into the old one meanwhile
        await fleet.engine_back()

    async def task() -> None:
        room = draw.choice([1, 2, 4])
        fleet, engine = make(Engine(delay_s=0.0005), room=room, keep_versions=draw.choice([1, 2]))
        tasks: list[asyncio.Task[Any]] = []
        numbers: dict[str, int] = {}
        restarting: asyncio.Task[Any] | None = None

        def begin(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
            tasks.append(asyncio.get_running_loop().create_task(work))
            return tasks[-1]

        for _ in range(400):
            there: Iterable[Version] = fleet.versions()
            refs = [version.ref for version in there] or ["nobody@v1"]
            ref, dice = draw.choice(refs), draw.random()
            if dice < 0.55:
                begin(request(fleet, engine, draw.choice([ref, ref.partition("@")[0], "base"])))
            elif dice < 0.65:
                name = draw.choice("abc")
                numbers[name] = numbers.get(name, 0) + 1
                begin(arrive(fleet, f"{name}@v{numbers[name]}"))
            elif dice < 0.72:
                fleet.pin(ref, draw.random() < 0.4)
            elif dice < 0.79:
                fleet.retire(ref, draw.random() < 0.4)
            elif dice < 0.82:
                with contextlib.suppress(UserError):
                    fleet.set_default(draw.choice([None, ref, "base"]))
            elif dice < 0.88 and (version := fleet.get(ref)):
                begin(change(fleet, version))
            elif dice < 0.92 and tasks:
                # A closed tab; a check that is under way is not broken off.
                if (gone := draw.choice(tasks)).get_coro().__name__ == "request":  # type: ignore[union-attr]
                    gone.cancel()
            elif dice < 0.94 and (restarting is None or restarting.done()):
                restarting = begin(restart(fleet, engine))
            elif dice < 0.96:
                engine.problem = {ref: UserError("refused")} if draw.random() < 0.5 else {}
            await asyncio.sleep(draw.random() * 0.002)
            assert engine.broken == []
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [error for error in found if error is not None and not isinstance(error, fine)] == []
        fleet.tidy()
        await asyncio.sleep(0.05)
        assert engine.broken == []
        assert all(version.leases == 0 for version in kept) and not any(engine.in_use.values())
        assert set(engine.held) == {version.ref for version in fleet.versions() if version.resident}
        assert not fleet._leaving and not fleet._tasks
        loaded = [fleet.get(ref) for ref in engine.held]
        assert all(version and fleet._wanted(version) for version in loaded), "what is not wanted is not kept"

    run(task())
