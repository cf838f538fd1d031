"""Runs one replica: starts every loop, and ends them in order."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from adapter import __version__
from adapter.errors import SettingsError
from adapter.parts import RELEASE_S, Parts
from adapter.probes import ProbeServer
from adapter.settings import Settings
from adapter.starting import Starting, start

log = structlog.get_logger()


class Adapter(Parts):
    """One replica. `run` is all that there is to do with it."""

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None] | None = None) -> None:
        """Runs until `stop` is set, then drains. Raises SettingsError when it cannot start."""
        starting = Starting(
            settings=self.settings,
            link=self.edges.link,
            history=self.edges.history,
            names=self.names,
            sealer=self.sealer,
            health=self.health,
            clock=self.clock,
            metrics=self.metrics,
        )
        with (
            ProbeServer(self.settings.http_addr, self.health, self.metrics) as probes,
            self._console(),
        ):
            async with asyncio.TaskGroup() as group:
                self.group = group
                background: list[asyncio.Task[None]] = []

                def begin(loop: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
                    background.append(group.create_task(loop, name=name))
                    return background[-1]

                begin(self.watch.beat(), "heartbeat")
                begin(self.watch.ask(), "jetstream")
                for name, loop in self.edges.loops():
                    begin(loop, name)
                try:
                    if await start(starting, stop):
                        leasing = begin(self.leases.run(), "leases")
                        begin(self.bindings.run(), "bindings")
                        begin(self.book.run(), "logins")
                        scanning = begin(self.scanner.run(), "scanning")
                        begin(self.window_events.run(), "windows")
                        following = group.create_task(self.supervisor.run(), name="supervisor")
                        self.watch.begin()
                        log.info("adapter.started", instance=self.instance, version=__version__, http=probes.port)
                        if on_ready is not None:
                            on_ready()
                        await stop.wait()
                        await self._drain(following, scanning, leasing)
                finally:
                    for task in background:
                        task.cancel()
                    await self.edges.close()
        log.info("adapter.stopped", instance=self.instance)

    async def _drain(
        self, following: asyncio.Task[None], scanning: asyncio.Task[None], leasing: asyncio.Task[None]
    ) -> None:
        self.health.draining = True
        log.info("adapter.draining", polls=len(self.supervisor.sessions))
        try:
            async with asyncio.timeout(max(1.0, self.settings.drain_s - 1.0)):
                try:
                    await self.leases.drain()  # the lease may run out meanwhile, and polls are cut then
                finally:
                    following.cancel()
                await self.supervisor.drain(max(0.5, self.settings.drain_s - RELEASE_S))
                scanning.cancel()  # logins go on until another replica may take them
                await asyncio.wait([scanning])
                await self._flush_windows()
                leasing.cancel()  # a renewal after this would write the key that is given back
                await asyncio.wait([leasing])
                await self.leases.leave()
        except TimeoutError:
            log.warning("drain.late", drain_s=self.settings.drain_s)

    async def _flush_windows(self) -> None:
        try:
            async with asyncio.timeout(1.0):
                await self.window_events.flush()
        except TimeoutError:
            log.warning("windows.untold", detail="The next owner tells what changed.")


def _raise_file_limit(capacity: int) -> None:
    """Each bot needs a connection for its poll, now and then one for a send: as many files as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # not ours to raise: the warning below says what that means
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft != resource.RLIM_INFINITY and soft < 2 * capacity + 100:
        log.warning("files.few", limit=soft, detail=f"Open files suffice for about {max(0, soft - 100) // 2} bots.")


async def run(
    settings: Settings, *, stop: asyncio.Event | None = None, on_ready: Callable[[], None] | None = None
) -> None:
    """Runs one replica until `stop` is set (or it is cancelled), then drains. Raises SettingsError."""
    _raise_file_limit(settings.capacity)
    adapter = Adapter(settings)
    try:
        await adapter.run(stop or asyncio.Event(), on_ready)
    except BaseExceptionGroup as group:
        wrong = group.subgroup(SettingsError)
        if wrong is not None:
            raise _first(wrong) from None
        raise


def _first(group: BaseExceptionGroup[SettingsError]) -> SettingsError:
    exc: BaseException = group
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    assert isinstance(exc, SettingsError)
    return exc
