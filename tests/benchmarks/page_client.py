"""A browser's side of our pages without a browser: Gradio's protocol over HTTP (sse_v3), as its client speaks it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp

PREFIX = "/gradio_api"
PATIENCE_S = 120.0


class PageError(Exception):
    """The server refused, failed or said nothing."""


@dataclass
class Event:
    """A page's event from joining the queue on."""

    name: str
    joined: float
    first_s: float = 0.0
    """To the first update of the page."""

    done_s: float = 0.0
    outputs: dict[str, Any] = field(default_factory=dict)
    """The last update: what it gives each component that has an elem_id."""


class Layout:
    """What `/config` says of components and events; the same for every session."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.components = {one["id"]: one for one in config["components"]}
        self.dependencies = {one["id"]: one for one in config["dependencies"]}
        self._by_elem = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
        self.loads = [
            number
            for number, one in self.dependencies.items()
            if one["backend_fn"] and any(kind == "load" for _, kind in one["targets"])
        ]

    def number(self, elem_id: str) -> int:
        """Of the component of that elem_id."""
        return int(self._by_elem[elem_id])

    def event(self, elem_id: str, kind: str) -> int:
        """The number of what happens at `kind` on the component of that elem_id."""
        target = [self._by_elem[elem_id], kind]
        return next(number for number, one in self.dependencies.items() if target in [list(t) for t in one["targets"]])

    def after(self, number: int) -> list[int]:
        """What happens on the server after an event, by `.then`."""
        return [
            other for other, one in self.dependencies.items() if one["backend_fn"] and one["trigger_after"] == number
        ]

    def clicked(self, elem_id: str) -> list[int]:
        """Every event of the server at a click on that component."""
        target = [self._by_elem[elem_id], "click"]
        return [
            number
            for number, one in self.dependencies.items()
            if one["backend_fn"] and target in [list(t) for t in one["targets"]]
        ]

    def named(self, number: int, data: list[Any]) -> dict[str, Any]:
        """An event's outputs by elem_id."""
        names = [self.components[output]["props"].get("elem_id") for output in self.dependencies[number]["outputs"]]
        return {name: value for name, value in zip(names, data, strict=True) if name}


class Page:
    """One session: a tab with our pages."""

    def __init__(self, http: aiohttp.ClientSession, url: str, layout: Layout | None = None) -> None:
        self._http, self._url = http, url
        self._session = secrets.token_hex(6)
        self.layout = layout
        self._values: dict[int, Any] = {}
        self._messages: defaultdict[str, asyncio.Queue[dict[str, Any]]] = defaultdict(asyncio.Queue)
        self._open = 0
        self._reader: asyncio.Task[None] | None = None
        self._heart: asyncio.Task[None] | None = None

    async def load(self) -> list[Event]:
        """Everything that a browser asks for before the page can be used (not the scripts, which are files)."""
        async with self._http.get(self._url, headers={"Accept": "text/html"}) as response:
            await self._whole(response)
        async with self._http.get(f"{self._url}/config") as response:
            config = json.loads(await self._whole(response))
        self.layout = Layout(config)
        self._heart = asyncio.create_task(self._beat())
        return await self._all(self.layout.loads, "load")

    async def redraw(self) -> list[Event]:
        """What a page does when `live.js` has seen another revision."""
        assert self.layout is not None
        return await self._all(self.layout.clicked("refresh"), "refresh")

    async def _all(self, numbers: Sequence[int], name: str) -> list[Event]:
        """Several events at once, each with what comes after it."""

        async def chain(number: int) -> list[Event]:
            assert self.layout is not None
            return [await self.fire(number, name), *await self._all(self.layout.after(number), name)]

        found = await asyncio.gather(*(chain(number) for number in numbers))
        return [event for events in found for event in events]

    async def fire(self, number: int, name: str, given: dict[str, Any] | None = None) -> Event:
        """Let an event happen, with `given` in components by elem_id; returns when it is over.

        Raises:
            PageError: it failed.
        """
        assert self.layout is not None
        event = Event(name, time.monotonic())
        body = {
            "data": self.inputs(number, given or {}),
            "event_data": None,
            "fn_index": number,
            "trigger_id": None,
            "session_hash": self._session,
        }
        async with asyncio.timeout(PATIENCE_S):
            async with self._http.post(f"{self._url}{PREFIX}/queue/join", json=body) as response:
                event_id = json.loads(await self._whole(response))["event_id"]
            self._open += 1
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._read())
            try:
                await self._follow(event, number, event_id)
            finally:
                self._open -= 1
                del self._messages[event_id]
        return event

    async def call(self, number: int, given: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        """An event that does not queue; returns what it gives each component by elem_id."""
        assert self.layout is not None
        data = self.inputs(number, given)
        body = {"data": data, "event_data": None, "fn_index": number, "session_hash": self._session}
        async with self._http.post(f"{self._url}{PREFIX}/run/predict", json=body, headers=headers) as response:
            return self.layout.named(number, json.loads(await self._whole(response))["data"])

    async def revision(self) -> tuple[str, float]:
        """Ask whether something changed, as `live.js` does; returns the revision, and the seconds that took."""
        began = time.monotonic()
        async with self._http.get(f"{self._url}/revision") as response:
            found = json.loads(await self._whole(response))["revision"]
        return str(found), time.monotonic() - began

    @property
    def drawn(self) -> str:
        """The revision that the page shows."""
        assert self.layout is not None
        found = re.search(r"data-revision='(\d+)'", str(self._values.get(self.layout.number("state"))))
        return found[1] if found else ""

    def inputs(self, number: int, given: dict[str, Any]) -> list[Any]:
        """The values that an event takes: those given, what the server has set, or what the page began with."""
        assert self.layout is not None
        found = []
        for one in self.layout.dependencies[number]["inputs"]:
            component = self.layout.components[one]
            props = component["props"]
            if (elem_id := props.get("elem_id")) in given and elem_id:
                found.append(given[elem_id])
            elif component["type"] == "state":  # lives on the server
                found.append(None)
            else:
                found.append(self._values.get(one, props.get("value")))
        return found

    async def close(self) -> None:
        """Close the tab."""
        for task in (self._reader, self._heart):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _follow(self, event: Event, number: int, event_id: str) -> None:
        assert self.layout is not None
        while True:
            message = await self._messages[event_id].get()
            kind = message["msg"]
            if kind in ("process_generating", "process_completed"):
                event.first_s = event.first_s or time.monotonic() - event.joined
                if not message["success"]:
                    raise PageError(f"{event.name}: {message['output']}")
            if kind == "process_completed":
                event.done_s = time.monotonic() - event.joined
                data = message["output"]["data"]
                event.outputs = self.layout.named(number, data)
                for one, value in zip(self.layout.dependencies[number]["outputs"], data, strict=True):
                    if not isinstance(value, dict) or value.get("__type__") != "update":
                        self._values[one] = value
                    elif "value" in value:
                        self._values[one] = value["value"]
                return
            if kind == "unexpected_error":
                raise PageError(f"{event.name}: {message['message']}")

    async def _read(self) -> None:
        """The one stream of a session's events, opened again for as long as any is under way."""
        try:
            while self._open:
                query = {"session_hash": self._session}
                async with self._http.get(f"{self._url}{PREFIX}/queue/data", params=query) as response:
                    if response.status != 200:
                        raise PageError(f"queue/data: {response.status}")
                    async for line in response.content:
                        if not line.startswith(b"data: "):
                            continue
                        message = json.loads(line[6:])
                        if message["msg"] == "close_stream":
                            break
                        if event_id := message.get("event_id"):
                            await self._messages[event_id].put(message)
                        elif message["msg"] == "unexpected_error":
                            raise PageError(message["message"])
                await asyncio.sleep(0)
        except Exception as error:
            for messages in self._messages.values():  # whoever waits learns why
                await messages.put({"msg": "unexpected_error", "message": f"{type(error).__name__}: {error}"})

    async def _beat(self) -> None:
        """A browser keeps this stream open for as long as the tab is."""
        with contextlib.suppress(Exception):
            async with self._http.get(f"{self._url}{PREFIX}/heartbeat/{self._session}") as response:
                async for _ in response.content:
                    pass

    async def _whole(self, response: aiohttp.ClientResponse) -> bytes:
        body = await response.read()
        if response.status != 200:
            raise PageError(f"{response.url.path}: {response.status}: {body[:200].decode('utf-8', 'replace')}")
        return body
