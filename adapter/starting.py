"""What a replica looks at before it serves: what its NATS user may do, its streams, how tokens are stored."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import msgspec
import structlog

from adapter.bindings.resealing import tokens_at_rest
from adapter.errors import SettingsError, Temporary
from adapter.jetstream import topology
from adapter.jetstream.link import Link
from adapter.metrics import Metrics
from adapter.names import Names
from adapter.permissions import USER_INFO, required, user_of
from adapter.ports import History
from adapter.probes import Health
from adapter.seal import Sealer
from adapter.settings import Settings
from adapter.timing import Clock

log = structlog.get_logger()


class Starting(NamedTuple):
    """What the start needs."""

    settings: Settings
    link: Link
    history: History
    names: Names
    sealer: Sealer
    health: Health
    clock: Clock
    metrics: Metrics


async def start(needs: Starting, stop: asyncio.Event) -> bool:
    """Waits for the connection and verifies the streams; False when told to stop meanwhile. Raises SettingsError."""
    needs.metrics.tokens_sealed.set(1 if needs.sealer.seals else 0)
    if not needs.sealer.seals:
        log.warning("tokens.unsealed", detail="Set WECHAT_NATS_TOKEN_KEY, so that bot tokens are sealed at rest.")
    needs.health.phase = "connecting to NATS"
    stopping = asyncio.ensure_future(stop.wait())
    epoch = 0
    try:
        while not stop.is_set():
            up = asyncio.ensure_future(needs.link.wait_up())
            await asyncio.wait([up, stopping], return_when=asyncio.FIRST_COMPLETED)
            up.cancel()
            if stop.is_set():
                break
            if epoch != needs.link.epoch:
                epoch = needs.link.epoch
                await _look_at_permissions(needs)
            needs.health.phase = "verifying streams"
            try:
                await topology.ensure(needs.link, needs.names, needs.settings)
                await _check_tokens(needs)
            except Temporary as exc:
                log.warning("streams.unverified", reason=exc.reason, detail=exc.detail[:200])
                await needs.clock.sleep(0.5)
            else:
                return True
        return False
    finally:
        stopping.cancel()


async def _look_at_permissions(needs: Starting) -> None:
    """Logs what the server says that this user lacks. A missing right to subscribe has held up the connection."""
    try:
        answer = await needs.link.request(USER_INFO, b"", timeout_s=2.0)
        may = user_of(answer.data).may
    except (Temporary, msgspec.DecodeError):
        return  # a user who may not ask: what is missing is told when it is tried
    if lacks := may.missing(required(needs.names, needs.settings.nats_inbox_prefix)):
        said = ", ".join(lacks[:8])
        log.error("permissions.missing", lacks=said, count=len(lacks), detail="`wechat-nats doctor` tells more.")


async def _check_tokens(needs: Starting) -> None:
    """Raises SettingsError where tokens lie open although there is a key, Temporary."""
    found = await tokens_at_rest(needs.history, needs.names, needs.sealer)
    if found["open"] and needs.sealer.seals and not needs.settings.allow_unsealed:
        raise SettingsError(
            "tokens_unsealed",
            f"{found['open']} bot tokens lie unsealed in {needs.names.bindings}, although WECHAT_NATS_TOKEN_KEY is"
            " set. `wechat-nats doctor --fix` seals them; WECHAT_NATS_ALLOW_UNSEALED=true starts all the same.",
        )
    if found["foreign"]:
        log.error("tokens.unopenable", tokens=found["foreign"], detail="They are sealed with a key that is not set.")
    if found["older"]:
        log.info("tokens.older_key", tokens=found["older"], detail="`wechat-nats doctor --fix` seals them anew.")
