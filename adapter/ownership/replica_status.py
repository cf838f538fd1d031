"""Asks all replicas for their identity and their pollers, since polls write no bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import structlog

from adapter.contract.names import Names
from adapter.errors import UNDECODABLE, Temporary
from adapter.ownership.leases import Leases
from adapter.ports import CoreBus

log = structlog.get_logger()

QUERY_TIMEOUT_S = 0.7
"""A slower replica is left out; it may be dead without a sign of it yet."""


class StatusRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asks every replica for its identity and the state of its pollers for these bots."""

    bots: list[str] = []


class PollerStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """State of a bot's poller (bridge.poller.State), for how long, and why. `ago_ms`: time since iLink's last
    answer. Both times are durations, so that no clocks are compared."""

    state: str
    since_ms: int = 0
    why: str = ""
    ago_ms: int | None = None


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A replica's answer. `polls`: pollers of the requested bots, including those that have yet to release the
    bot."""

    instance: str
    incarnation: str = ""
    version: str
    shards: int
    bots: int
    capacity: int = 0
    draining: bool = False
    polls: dict[str, PollerStatus] = {}


class PollEnded(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A poll of a bot has ended at a replica; "": a shard is free. Subject: `wechat.adapter.polled`."""

    bot: str


def status_reply(data: bytes, about: Callable[[Sequence[str]], ReplicaStatus]) -> bytes | None:
    """A replica's answer to a request; None: the request is unreadable."""
    try:
        request = msgspec.json.decode(data, type=StatusRequest)
    except UNDECODABLE as exc:
        log.info("replica_status.unreadable", detail=str(exc))
        return None
    return msgspec.json.encode(about(request.bots))


class OtherReplicas:
    """This replica's queries and announcements to all replicas."""

    def __init__(self, core: CoreBus, names: Names, leases: Leases) -> None:
        self._core = core
        self._names = names
        self._leases = leases

    async def query(self, bots: Sequence[str]) -> tuple[list[ReplicaStatus], int]:
        """The replicas that answer in time, this one included, by name; and how many live. Raises Temporary."""
        payload = msgspec.json.encode(StatusRequest(bots=list(bots)))
        living = len(self._leases.other_incarnations) + 1
        answers = await self._core.query_replicas(
            self._names.replica_status(), payload, count=living, within_s=QUERY_TIMEOUT_S
        )
        found = [msgspec.json.decode(data, type=ReplicaStatus) for data in answers]
        return sorted(found, key=lambda present: present.instance), living

    async def is_idle(self, incarnation: str, bot: str) -> bool:
        """Whether a replica and all other living ones report that they have no poller of a bot: one that its record
        does not name may still have a poll. A version that does not report its incarnation proves nothing. Raises
        Temporary."""
        answers, _ = await self.query([bot])
        idle = {present.incarnation for present in answers if bot not in present.polls}
        return {incarnation, *self._leases.other_incarnations} <= idle

    async def publish_polled(self, bot: str = "") -> None:
        """Tells every replica, at most once, that a poll of a bot has ended here, perhaps with an entry; without a
        bot: that a shard is free."""
        try:
            await self._core.publish(self._names.polled(), msgspec.json.encode(PollEnded(bot=bot)), {})
        except Temporary as exc:
            log.info("polled.skipped", bot=bot, reason=exc.reason)


def bot_polled(data: bytes) -> str | None:
    """The bot of an announcement; None: it is none, and is ignored."""
    try:
        return msgspec.json.decode(data, type=PollEnded).bot
    except UNDECODABLE:
        return None
