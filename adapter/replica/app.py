"""Runs one replica: starts every loop, and ends them in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import structlog

from adapter import __version__
from adapter.errors import UNDECODABLE, SettingsError, Temporary
from adapter.jetstream import topology
from adapter.replica.consumers import consume
from adapter.replica.probes import ProbeServer
from adapter.replica.wiring import Replica
from adapter.settings import Settings
from adapter.tools import media_types
from adapter.tools.permissions import USER_INFO, required, user_of
from adapter.tools.timing import wait_any

log = structlog.get_logger()

RELEASE_S = 5.0
"""Part of the drain time that is reserved for what comes after the polls."""


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

            start_loop(replica.health.heartbeat_forever(replica.partitions), "heartbeat")
            start_loop(replica.health.check_jetstream_forever(), "jetstream")
            for name, loop in replica.edges.loops():
                start_loop(loop, name)
            try:
                if await _prepare(replica, stop):
                    leasing = start_loop(replica.leases.run(replica.partitions.give), "leases")
                    start_loop(replica.bindings.run(), "bindings")
                    start_loop(replica.login_records.run(), "logins")
                    running_logins = start_loop(replica.logins.run(), "logins.run")
                    working = group.create_task(replica.partitions.run(partial(consume, replica)), name="partitions")
                    replica.health.on_started()
                    log.info("adapter.started", instance=replica.instance, version=__version__, http=probes.port)
                    _notify_service_manager("READY=1")
                    if on_ready is not None:
                        on_ready()
                    await stop.wait()
                    await _drain(replica, working, running_logins, leasing)
            finally:
                for task in background:
                    task.cancel()
                await replica.edges.close()
    log.info("adapter.stopped", instance=replica.instance)


async def _prepare(replica: Replica, stop: asyncio.Event) -> bool:
    """Waits for the connection and verifies the streams. False: it was stopped meanwhile. Raises SettingsError."""
    if not media_types.HAS_VOICE:
        log.info("voice.not_converted", detail="Voice comes as SILK alone. For WAV, too: pip install silk-python.")
    replica.health.phase = "connecting to NATS"
    connection, epoch = replica.edges.connection, 0
    while True:
        await wait_any(replica.edges.wait_connected(), stop.wait())
        if stop.is_set():
            return False
        if epoch != connection.epoch:
            epoch = connection.epoch
            await _log_missing_permissions(replica)
        replica.health.phase = "verifying streams"
        try:
            await topology.ensure_topology(connection, replica.names, replica.settings)
        except Temporary as exc:
            log.warning("streams.unverified", reason=exc.reason, detail=exc.detail)
            await replica.clock.sleep(0.5)
        else:
            return True


async def _log_missing_permissions(replica: Replica) -> None:
    """Logs the permissions that the server's answer lacks. A missing right to subscribe prevents the connection."""
    try:
        answer = await replica.edges.connection.request(USER_INFO, b"", timeout_s=2.0)
        may = user_of(answer.data).permissions
    except (Temporary, *UNDECODABLE):
        return  # not permitted to ask: missing permissions show when they are needed
    if lacks := may.missing(required(replica.names, replica.settings.nats_inbox_prefix)):
        names = ", ".join(lacks[:8])
        log.error("permissions.missing", lacks=names, count=len(lacks), detail="`wechat-nats doctor` lists them.")


async def _drain(
    replica: Replica, working: asyncio.Task[None], running_logins: asyncio.Task[None], leasing: asyncio.Task[None]
) -> None:
    replica.health.draining = True
    _notify_service_manager("STOPPING=1")
    log.info("adapter.draining", polls=len(replica.partitions.pollers))
    try:
        async with asyncio.timeout(max(1.0, replica.settings.drain_s - 1.0)):
            working.cancel()
            await replica.partitions.drain(max(0.5, replica.settings.drain_s - RELEASE_S))
            running_logins.cancel()
            await asyncio.wait([running_logins])
            leasing.cancel()
            await replica.media.close()
    except TimeoutError:
        log.warning("drain.timed_out", drain_s=replica.settings.drain_s)


def _notify_service_manager(state: str) -> None:
    """Tells systemd that the service is ready, or stops: `Type=notify` of helm/systemd/wechat-nats.service, by a
    datagram to the socket in NOTIFY_SOCKET, if there is one (sd_notify(3))."""
    if not (path := os.environ.get("NOTIFY_SOCKET")):
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.sendto(state.encode(), address)
    except OSError as exc:
        log.warning("service_manager.unreachable", state=state, detail=exc.strerror)


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
