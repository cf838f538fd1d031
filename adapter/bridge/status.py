"""Asks all replicas how they are and how they poll bots, since polls write no bucket."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from adapter.bridge.presence import Presence
from adapter.contract.names import Names
from adapter.errors import UNDECODABLE
from adapter.ports import CoreBus

QUERY_TIMEOUT_S = 0.7
"""A slower replica is left out; it may be dead without a sign of it yet."""


class PollerStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """State of a bot's poller (bridge.poller.State), for how long, and why. `ago_ms`: time since iLink's last
    answer. Both times are durations, so that no clocks are compared."""

    state: str
    since_ms: int = 0
    why: str = ""
    ago_ms: int | None = None


class StatusAsked(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="ask", tag="status"
):
    """Asks a replica how it is, and for the state of its pollers for these bots. Subject:
    `wechat.adapter.polls.<replica>`."""

    bots: list[str] = []


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A replica's answer. `polls`: pollers of the requested bots."""

    instance: str
    version: str
    partitions: dict[int, int] = {}
    """Owned partitions, and for how many milliseconds."""
    bots: int
    capacity: int = 0
    draining: bool = False
    polls: dict[str, PollerStatus] = {}


class Replicas:
    """This replica's queries to all."""

    def __init__(self, core: CoreBus, names: Names, presence: Presence) -> None:
        self._core = core
        self._names = names
        self._presence = presence

    async def query(self, bots: Sequence[str]) -> tuple[list[ReplicaStatus], int]:
        """The replicas that answer in time, this one included, by name; and how many are here. Raises Temporary."""
        payload = msgspec.json.encode(StatusAsked(bots=list(bots)))
        here = [self._presence.replica, *self._presence.others()]
        answers = await asyncio.gather(*(self._ask(replica, payload) for replica in here))
        found = [answer for answer in answers if answer is not None]
        return sorted(found, key=lambda one: one.instance), len(here)

    async def _ask(self, replica: str, payload: bytes) -> ReplicaStatus | None:
        subject = self._names.polls_of(replica)
        answer = await self._core.ask(subject, payload, within_s=QUERY_TIMEOUT_S)
        try:
            return msgspec.json.decode(answer, type=ReplicaStatus) if answer else None
        except UNDECODABLE:  # of another version
            return None
