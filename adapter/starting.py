"""Checks before a replica serves: permissions of its NATS user, its streams, how tokens are stored."""

from __future__ import annotations

import asyncio

import structlog

from adapter.bindings.resealing import tokens_at_rest
from adapter.errors import UNDECODABLE, SettingsError, Temporary
from adapter.jetstream import topology
from adapter.parts import Parts
from adapter.permissions import USER_INFO, required, user_of

log = structlog.get_logger()


async def start(parts: Parts, stop: asyncio.Event) -> bool:
    """Waits for the connection and verifies the streams; False when told to stop meanwhile. Raises SettingsError."""
    parts.metrics.tokens_sealed.set(1 if parts.sealer.seals else 0)
    if not parts.sealer.seals:
        log.warning("tokens.unsealed", detail="Set WECHAT_NATS_TOKEN_KEY, so that bot tokens are sealed at rest.")
    parts.health.phase = "connecting to NATS"
    stopping = asyncio.ensure_future(stop.wait())
    epoch = 0
    try:
        while not stop.is_set():
            up = asyncio.ensure_future(parts.connections.up())
            await asyncio.wait([up, stopping], return_when=asyncio.FIRST_COMPLETED)
            up.cancel()
            if stop.is_set():
                break
            if epoch != parts.connections.link.epoch:
                epoch = parts.connections.link.epoch
                await _look_at_permissions(parts)
            parts.health.phase = "verifying streams"
            try:
                await topology.ensure(parts.connections.link, parts.names, parts.settings)
                await _check_tokens(parts)
            except Temporary as exc:
                log.warning("streams.unverified", reason=exc.reason, detail=exc.detail)
                await parts.clock.sleep(0.5)
            else:
                return True
        return False
    finally:
        stopping.cancel()


async def _look_at_permissions(parts: Parts) -> None:
    """Logs what the server says that this user lacks. A missing right to subscribe has held up the connection."""
    try:
        answer = await parts.connections.link.request(USER_INFO, b"", timeout_s=2.0)
        may = user_of(answer.data).may
    except (Temporary, *UNDECODABLE):
        return  # a user who may not ask: what is missing is told when it is tried
    if lacks := may.missing(required(parts.names, parts.settings.nats_inbox_prefix)):
        said = ", ".join(lacks[:8])
        log.error("permissions.missing", lacks=said, count=len(lacks), detail="`wechat-nats doctor` tells more.")


async def _check_tokens(parts: Parts) -> None:
    """Raises SettingsError where tokens lie open although there is a key, Temporary."""
    found = await tokens_at_rest(parts.connections.history, parts.names, parts.sealer)
    if found["open"] and parts.sealer.seals:
        raise SettingsError(
            "tokens_unsealed",
            f"{found['open']} bot tokens lie unsealed in {parts.names.bindings}, although WECHAT_NATS_TOKEN_KEY is"
            " set. `wechat-nats doctor --fix` seals them.",
        )
    if found["foreign"]:
        log.error("tokens.unopenable", tokens=found["foreign"], detail="They are sealed with a key that is not set.")
    if found["older"]:
        log.info("tokens.older_key", tokens=found["older"], detail="`wechat-nats doctor --fix` seals them anew.")
