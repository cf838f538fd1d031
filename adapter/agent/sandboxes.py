"""One agent for many people: all sandboxes of the bus, or those whose ids match a pattern, over one connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from fnmatch import fnmatchcase

import msgspec
import structlog
from nats.aio.msg import Msg

from adapter.agent.connection import ANSWER_S, Connection
from adapter.agent.reader import retry
from adapter.agent.sandbox import Sandbox
from adapter.contract.messages import BindingEvent, BindingsPage, BindingsQuery
from adapter.errors import UNDECODABLE, AdapterError
from adapter.settings import Settings, read_settings
from adapter.tools.timing import wait_event

log = structlog.get_logger()

LIST_S = 60.0
"""Time between two lists of all bindings: for missed events, and for sandboxes whose last binding is gone."""

Serve = Callable[[Sandbox], Awaitable[None]]


class Sandboxes:
    """The sandboxes that have a binding. Needs the rights of the role `agents`."""

    def __init__(self, pattern: str = "*", settings: Settings | None = None) -> None:
        """`pattern` is of ids, with `*` and `?`. Raises SettingsError."""
        self._pattern = pattern
        self._connection = Connection(settings or read_settings(os.environ))
        self._bound: set[str] = set()
        self._announced: set[str] = set()
        """Those bound since the last list, which may lack them: another replica has made it."""
        self._taken: set[str] = set()
        """Those that another agent reads. They are left to it while they are bound."""
        self._serving: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    async def run(self, serve: Serve) -> None:
        """Calls `serve` once with each sandbox, open, at once where one is bound later, until cancelled. Raises
        Refused("replaced") once other agents read the last one, Refused("forbidden"), NatsError, Temporary."""
        loop, names = asyncio.get_running_loop(), self._connection.names
        try:
            async with self._connection, asyncio.TaskGroup() as group:
                await self._connection.nc.subscribe(names.event("*", "binding"), cb=self._on_binding)
                await self._connection.nc.flush()
                due = loop.time()
                while True:
                    self._changed.clear()
                    if loop.time() >= due:
                        await self._list()
                        due = loop.time() + LIST_S
                    for name in self._bound - self._taken - self._serving.keys():
                        self._serving[name] = group.create_task(self._serve(name, serve))
                    await wait_event(self._changed, due - loop.time())
        except ExceptionGroup as several:
            raise several.exceptions[0] from None

    async def _serve(self, name: str, serve: Serve) -> None:
        try:
            async with Sandbox(name, connection=self._connection) as sandbox:
                await serve(sandbox)
        except AdapterError as exc:
            if exc.reason == "forbidden":
                raise
            self._serving.pop(name, None)
            if exc.reason == "replaced":
                self._taken.add(name)
            log.warning("agent.left", sandbox=name, reason=exc.reason, detail=exc.detail)
            if not self._serving:
                raise

    async def _on_binding(self, msg: Msg) -> None:
        with contextlib.suppress(*UNDECODABLE):  # of a later version: the next list has it
            event = msgspec.json.decode(msg.data, type=BindingEvent)
            if event.change == "bound" and fnmatchcase(event.sandbox, self._pattern):
                self._bound.add(event.sandbox)
                self._announced.add(event.sandbox)
                self._changed.set()

    async def _list(self) -> None:
        """Takes over which sandboxes are bound, and ends the others."""
        announced, self._announced = self._announced, set()
        listed, after, more = set[str](), "", True
        while more:
            query = msgspec.json.encode(BindingsQuery(after=after))
            data, _ = await retry(lambda: self._connection.request("bindings.list", query, {}, ANSWER_S))  # noqa: B023
            page = msgspec.json.decode(data, type=BindingsPage)
            listed |= {each.sandbox for each in page.bindings if fnmatchcase(each.sandbox, self._pattern)}
            after, more = page.next, bool(page.next)
        self._bound = listed | announced | self._announced
        self._taken &= self._bound
        for name in self._serving.keys() - self._bound:
            self._serving.pop(name).cancel()
