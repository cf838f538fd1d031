"""Checks before a replica serves: the permissions of its NATS user, its streams, and sealed tokens."""

from __future__ import annotations

import asyncio

import structlog

from adapter.bindings.key_rotation import count_stored_tokens
from adapter.content import media
from adapter.errors import UNDECODABLE, Temporary
from adapter.jetstream import topology
from adapter.kit.timing import wait_any
from adapter.replica.wiring import Replica
from adapter.security.permissions import USER_INFO, required, user_of

log = structlog.get_logger()


async def run_preflight(replica: Replica, stop: asyncio.Event) -> bool:
    """Waits for the connection and verifies the streams. False: it was stopped meanwhile. Raises SettingsError."""
    if not media.HAS_VOICE:
        log.info("voice.not_converted", detail="Voice comes as SILK alone. For WAV, too: pip install silk-python.")
    replica.health.phase = "connecting to NATS"
    connection, epoch = replica.connections.connection, 0
    while True:
        await wait_any(replica.connections.wait_connected(), stop.wait())
        if stop.is_set():
            return False
        if epoch != connection.epoch:
            epoch = connection.epoch
            await _log_missing_permissions(replica)
        replica.health.phase = "verifying streams"
        try:
            await topology.ensure_topology(connection, replica.names, replica.settings)
            await _check_tokens(replica)
        except Temporary as exc:
            log.warning("streams.unverified", reason=exc.reason, detail=exc.detail)
            await replica.clock.sleep(0.5)
        else:
            return True


async def _log_missing_permissions(replica: Replica) -> None:
    """Logs the permissions that the server's answer lacks. A missing right to subscribe prevents the connection."""
    try:
        answer = await replica.connections.connection.request(USER_INFO, b"", timeout_s=2.0)
        may = user_of(answer.data).permissions
    except (Temporary, *UNDECODABLE):
        return  # not permitted to ask: missing permissions show when they are needed
    if lacks := may.missing(required(replica.names, replica.settings.nats_inbox_prefix)):
        names = ", ".join(lacks[:8])
        log.error("permissions.missing", lacks=names, count=len(lacks), detail="`wechat-nats doctor` lists them.")


async def _check_tokens(replica: Replica) -> None:
    """Logs tokens that the first key does not open. Raises Temporary."""
    found = await count_stored_tokens(replica.connections.history, replica.names, replica.sealer)
    if found["foreign"]:
        log.error("tokens.unopenable", tokens=found["foreign"], detail="Their key is not set.")
    if found["older"]:
        log.info("tokens.older_key", tokens=found["older"], detail="`wechat-nats doctor --fix` seals them anew.")
