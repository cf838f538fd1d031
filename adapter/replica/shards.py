"""The shards that work in this replica."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

import structlog

from adapter.contract.names import shard_of
from adapter.contract.records import Binding
from adapter.kit.timing import ChangeSignal
from adapter.outbound.shard import Shard

log = structlog.get_logger()


class ShardWork(Protocol):
    """What the composition root builds for an owned shard."""

    def new_shard(self, number: int) -> Shard: ...

    def on_failed(self, name: str, detail: str) -> None:
        """A required loop ended for good, so that only a restart of the process helps."""

    def consumer_loops(self, shard: Shard) -> list[Coroutine[Any, Any, None]]:
        """The pull loops of a shard."""


class OwnedShards(dict[int, Shard]):
    """The shards by number, and the tasks of their consumers."""

    def __init__(self, work: ShardWork) -> None:
        super().__init__()
        self.opened = ChangeSignal()
        self.in_flight = 0
        """Commands in flight at the last observation."""
        self._work = work
        self._consumers: dict[int, list[asyncio.Task[None]]] = {}

    def open(self, number: int) -> None:
        """Starts a shard and its consumers."""
        shard = self[number] = self._work.new_shard(number)
        loop = asyncio.get_running_loop()
        self._consumers[number] = [
            loop.create_task(work, name=f"shard.{number}") for work in self._work.consumer_loops(shard)
        ]
        for task in self._consumers[number]:
            task.add_done_callback(self.report)
        self.opened.notify_all()

    def stop_consumers(self, number: int) -> None:
        for task in self._consumers.pop(number, []):
            task.cancel()

    def drop(self, number: int) -> None:
        """Stops a shard at once."""
        self.stop_consumers(number)
        if shard := self.pop(number, None):
            shard.stop()

    async def drain(self, number: int, grace_s: float) -> None:
        """Ends the requests in flight of a shard. It works no more meanwhile."""
        if shard := self.pop(number, None):
            try:
                await shard.drain(grace_s)
            except asyncio.CancelledError:
                self[number] = shard  # another call ends its requests
                raise

    def on_binding(self, bot: str, before: Binding | None, after: Binding | None) -> None:
        """Tells the shards concerned of a changed binding."""
        sides = [binding for binding in (before, after) if binding is not None]
        users = {binding.user for binding in sides}
        for sandbox in {binding.sandbox for binding in sides}:
            if shard := self.get(shard_of(sandbox)):
                shard.on_binding(sandbox, bot, users)

    def on_session_changed(self, binding: Binding) -> None:
        """A refused token is retried, or no longer: the bot's conversations are notified."""
        if shard := self.get(shard_of(binding.sandbox)):
            shard.on_binding(binding.sandbox, binding.bot, {binding.user})

    def evict_idle(self) -> None:
        """Drops state that can be loaded again."""
        for shard in self.values():
            shard.evict_idle()

    def report(self, task: asyncio.Task[None]) -> None:
        """Reports a shard that cannot be worked or handed over: /livez fails, since only a restart helps."""
        if not task.cancelled() and (exc := task.exception()):
            log.error("task.crashed", task=task.get_name(), exc_info=exc)
            self._work.on_failed(task.get_name(), f"crashed: {type(exc).__name__}")
