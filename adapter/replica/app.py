"""Runs one replica: starts every loop, and ends them in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import structlog

from adapter import __version__
from adapter.errors import SettingsError, Temporary
from adapter.jetstream import topology
from adapter.replica.consumers import consume
from adapter.replica.probes import ProbeServer
from adapter.replica.wiring import Replica
from adapter.settings import Settings
from adapter.tools import media_types
from adapter.tools.timing import wait_any

log = structlog.get_logger()

START_RETRY_S = 1.0
"""Pause before what a start lacks is looked for again."""
RELEASE_S = 5.0
"""Part of the drain time that is reserved for what comes after the polls."""


async def run(
    settings: Settings, *, stop: asyncio.Event | None = None, on_ready: Callable[[], None] | None = None
) -> bool:
    """Runs one replica until `stop` is set (or it is cancelled), then drains. False: answers of iLink could not be
    stored. Raises SettingsError."""
    _raise_file_limit(settings.capacity)
    try:
        return await run_replica(Replica(settings), stop or asyncio.Event(), on_ready)
    except BaseExceptionGroup as group:
        wrong = group.subgroup(SettingsError)
        if wrong is not None:
            raise _first_settings_error(wrong) from None
        raise


async def run_replica(replica: Replica, stop: asyncio.Event, on_ready: Callable[[], None] | None = None) -> bool:
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
                if await _prepare(replica, stop, start_loop):
                    leasing = start_loop(replica.leases.run(replica.partitions.give), "leases")
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
    lost = replica.partitions.unstored
    if lost.bots:
        log.error("adapter.stopped", instance=replica.instance, lost_bots=lost.bots, lost_messages=lost.messages)
    else:
        log.info("adapter.stopped", instance=replica.instance)
    return not lost.bots


async def _prepare(
    replica: Replica, stop: asyncio.Event, start_loop: Callable[[Coroutine[Any, Any, None], str], object]
) -> bool:
    """Waits for the connection, the permissions, the streams, the bindings and their key: who lacks one of them
    takes nothing from other replicas, and /startupz and /readyz say what it is. False: it was stopped meanwhile.
    Raises SettingsError."""
    if not media_types.HAS_VOICE:
        log.info("voice.not_converted", detail="Voice comes as SILK alone. For WAV, too: pip install silk-python.")
    health, bindings = replica.health, replica.bindings

    async def wait_for(what: str, lacks: Callable[[Replica], Awaitable[str]]) -> None:
        """Returns when `lacks` finds nothing, or it was stopped."""
        health.phase = what
        while not stop.is_set() and (problem := await lacks(replica)):
            if health.phase != problem:
                health.phase = problem
                log.warning("start.waits", detail=problem)
            await wait_any(replica.clock.sleep(START_RETRY_S), stop.wait())

    health.phase = "connecting to NATS"
    await wait_any(replica.edges.wait_connected(), stop.wait())
    await wait_for("asking for permissions", _lacks_permissions)
    await wait_for("verifying streams", _lacks_streams)
    if not stop.is_set():
        start_loop(bindings.run(), "bindings")
        health.phase = "reading bindings"
        await wait_any(bindings.changed.wait_until(lambda: bindings.is_loaded), stop.wait())
    await wait_for("trying the key", _lacks_key)
    return not stop.is_set()


async def _lacks_permissions(replica: Replica) -> str:
    """Empty where none is known to be missing. A missing right to subscribe already prevents the connection."""
    await replica.health.check_permissions()
    return replica.health.lacks


async def _lacks_streams(replica: Replica) -> str:
    """Raises SettingsError."""
    try:
        await topology.ensure_topology(replica.edges.connection, replica.names, replica.settings)
    except Temporary as exc:
        return f"Streams cannot be verified: {exc.detail or exc.reason}"
    return ""


async def _lacks_key(replica: Replica) -> str:
    """A key that opens less than half of the tokens is not the one of this bus."""
    sealed = [replica.sealer.sealing_of(binding.token) for binding in replica.bindings]
    opens = len(sealed) - sealed.count("foreign")
    if 2 * opens >= len(sealed):
        return ""
    return f"WECHAT_NATS_TOKEN_KEY opens {opens} of {len(sealed)} bot tokens: it is not the key of this bus."


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
