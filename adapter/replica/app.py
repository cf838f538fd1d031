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
from adapter.replica import service_manager
from adapter.replica.preflight import run_preflight
from adapter.replica.probes import ProbeServer
from adapter.replica.wiring import RELEASE_S, Replica
from adapter.settings import Settings

log = structlog.get_logger()


async def run(
    settings: Settings, *, stop: asyncio.Event | None = None, on_ready: Callable[[], None] | None = None
) -> None:
    """Runs one replica until `stop` is set (or it is cancelled), then drains. Raises SettingsError."""
    _raise_file_limit(settings.capacity)
    try:
        await run_replica(Replica(settings), stop or asyncio.Event(), on_ready)
    except BaseExceptionGroup as group:
        wrong = group.subgroup(SettingsError)
        if wrong is not None:
            raise _first_settings_error(wrong) from None
        raise


async def run_replica(replica: Replica, stop: asyncio.Event, on_ready: Callable[[], None] | None = None) -> None:
    """As `run`. Raises SettingsError, in a group, too."""
    with ProbeServer(replica.settings.http_addr, replica.health, replica.metrics) as probes, replica.console():
        async with asyncio.TaskGroup() as group:
            background: list[asyncio.Task[None]] = []

            def start_loop(loop: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
                background.append(group.create_task(loop, name=name))
                return background[-1]

            start_loop(replica.health_monitor.heartbeat_forever(), "heartbeat")
            start_loop(replica.health_monitor.check_jetstream_forever(), "jetstream")
            for name, loop in replica.connections.loops():
                start_loop(loop, name)
            try:
                if await run_preflight(replica, stop):
                    leasing = start_loop(replica.leases.run(), "leases")
                    start_loop(replica.bindings.run(), "bindings")
                    start_loop(replica.logins.registry.run(), "logins")
                    running_logins = start_loop(replica.login_runner.run(), "logins.run")
                    following = group.create_task(replica.supervisor.run(), name="supervisor")
                    replica.health_monitor.on_started()
                    log.info("adapter.started", instance=replica.instance, version=__version__, http=probes.port)
                    service_manager.notify(service_manager.READY)
                    if on_ready is not None:
                        on_ready()
                    await stop.wait()
                    await _drain(replica, following, running_logins, leasing)
            finally:
                for task in background:
                    task.cancel()
                await replica.connections.close()
    log.info("adapter.stopped", instance=replica.instance)


async def _drain(
    replica: Replica, following: asyncio.Task[None], running_logins: asyncio.Task[None], leasing: asyncio.Task[None]
) -> None:
    replica.health.draining = True
    service_manager.notify(service_manager.STOPPING)
    log.info("adapter.draining", polls=len(replica.supervisor.pollers))
    try:
        async with asyncio.timeout(max(1.0, replica.settings.drain_s - 1.0)):
            following.cancel()
            await replica.supervisor.drain(max(0.5, replica.settings.drain_s - RELEASE_S))
            running_logins.cancel()
            await asyncio.wait([running_logins])
            leasing.cancel()  # a later renewal would write the deleted key again
            await asyncio.wait([leasing])
            if replica.leases.is_valid:
                await replica.leases.release_all()
            await replica.media.close()
    except TimeoutError:
        log.warning("drain.timed_out", drain_s=replica.settings.drain_s)


def _raise_file_limit(capacity: int) -> None:
    """Raises the limit of open files as far as possible: a bot needs one for its poll and one for a send."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # not permitted: the warning below shows the consequence
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft != resource.RLIM_INFINITY and soft < 2 * capacity + 100:
        log.warning(
            "process.file_limit_low",
            limit=soft,
            detail=f"Open files suffice for about {max(0, soft - 100) // 2} bots.",
        )


def _first_settings_error(group: BaseExceptionGroup[SettingsError]) -> SettingsError:
    exc: BaseException = group
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    assert isinstance(exc, SettingsError)
    return exc
