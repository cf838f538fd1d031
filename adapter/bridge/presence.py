"""Which replicas are here, and how they share the partitions: nothing of it is stored.

Each replica says once a second on plain NATS that it is here, how many partitions it owns, and whether it counts.
What was heard is good for HEARD_S. A replica does not count that drains, or has not written the bucket of leases for
some seconds: it causes no move.

Fair are partitions / counting replicas, rounded up. Who has less takes what is free, who has more gives away, one at
a time. What has been free for LEFT_S is taken by anybody who counts, by who has given it last after GIVEN_S.

`Replicas` asks all of them how they are and how they poll bots, since polls write no bucket.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from adapter.contract.names import Names, to_subject_token
from adapter.errors import UNDECODABLE, Temporary
from adapter.ports import CoreBus
from adapter.tools.timing import ChangeSignal, Clock

EVERY_S = 1.0
HEARD_S = 3.0
LEFT_S, GIVEN_S = 2.0, 10.0
DEAF_S = 1.7
"""Time without one's own word after which nothing is known of the others."""
QUERY_TIMEOUT_S = 0.7
"""A slower replica is left out of a query; it may be dead without a sign of it yet."""
KEPT_S = 600.0
"""Time for which a replica is remembered that is silent."""


class Here(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A replica is here. Subject: `wechat.adapter.here`."""

    replica: str
    owned: int
    counts: bool
    is_first: bool = False
    """It has just started: the others say at once that they are here."""
    has_released: bool = False
    """It has just given a partition away."""


class Free(NamedTuple):
    """A partition that another replica owns, or nobody."""

    revision: int
    """Of its key."""
    since: float
    """Monotonic time at which that revision was seen first, or the count began anew."""
    is_released: bool
    former: tuple[str, ...]
    """Replicas that may still poll or send there."""
    owner: str

    def free_since(self, lease_s: float) -> float:
        """Since when it is free, as it seems here."""
        return self.since if self.is_released else self.since + lease_s


class Step(NamedTuple):
    """What to do about the partitions."""

    fair: int
    take: Sequence[int] = ()
    give: int | None = None


def share(
    *,
    partitions: int,
    owned: Sequence[int],
    free: Mapping[int, float],
    given: Mapping[int, float],
    others: Mapping[str, int],
    replica: str,
) -> Step:
    """What a replica that counts takes or gives. `free`: seconds since which partitions are free; `given`: seconds
    since which this replica gave them away; `others`: how many partitions the others own that count."""
    fair = math.ceil(partitions / (len(others) + 1))

    def is_for_others(number: int) -> bool:
        return bool(others) and number in given and given[number] < GIVEN_S and free[number] < GIVEN_S

    mine = [number for number in free if not is_for_others(number)]
    # each begins with others, so that few want the same
    mine.sort(key=lambda number: hashlib.blake2b(f"{replica}|{number}".encode(), digest_size=8).digest())
    room = max(0, fair - len(owned))
    late = [number for number in mine[room:] if free[number] >= LEFT_S]
    take = [*mine[:room], *late]
    if not take and len(owned) > fair and min(others.values(), default=fair) < fair:
        return Step(fair, give=max(owned))
    return Step(fair, take)


class Presence:
    """What was heard of the replicas."""

    def __init__(self, core: CoreBus, names: Names, clock: Clock, instance: str) -> None:
        self.replica = f"{to_subject_token(instance)}-{secrets.token_hex(4)}"
        """The name of this replica, a token of subjects, which no other process has had."""
        self.on_released: Callable[[], None] = lambda: None
        """Called when another replica says that it has given a partition away."""
        self._core = core
        self._subject = names.here()
        self._clock = clock
        self._heard: dict[str, tuple[float, Here]] = {}
        """The last word of each, and when it came."""
        self._own_at = -math.inf
        """When the own word was heard last."""
        self._hearing_since = clock.monotonic()
        """Since when the own words have come without a gap."""
        self._about: Callable[[], tuple[int, bool]] = lambda: (0, False)
        self._asked = ChangeSignal()
        self._is_asked = False
        """Somebody has just started, and knows nobody yet."""
        core.subscribe(self._subject, self.on_here)

    async def run(self, about: Callable[[], tuple[int, bool]]) -> None:
        """Says that this replica is here until cancelled. `about`: how many partitions it owns, and whether it
        counts."""
        self._about = about
        await self._say(is_first=True)
        while True:
            await self._asked.wait_until(lambda: self._is_asked, EVERY_S)
            self._is_asked = False
            await self._say()
            now = self._clock.monotonic()
            self._heard = {name: said for name, said in self._heard.items() if now - said[0] < KEPT_S}

    async def tell_released(self) -> None:
        """Says that a partition is free."""
        await self._say(has_released=True)

    async def _say(self, *, is_first: bool = False, has_released: bool = False) -> None:
        owned, counts = self._about()
        here = Here(replica=self.replica, owned=owned, counts=counts, is_first=is_first, has_released=has_released)
        try:
            await self._core.publish(self._subject, msgspec.json.encode(here), {})
        except Temporary:
            return  # nobody hears this replica, which hears itself as little

    def on_here(self, data: bytes) -> None:
        """Takes a word. What does not decode strictly is ignored."""
        try:
            here = msgspec.json.decode(data, type=Here)
        except UNDECODABLE:
            return
        now = self._clock.monotonic()
        if here.replica == self.replica:
            if now - self._own_at > DEAF_S:
                self._hearing_since = now
            self._own_at = now
            return
        self._heard[here.replica] = now, here
        if here.has_released:
            self.on_released()
        if here.is_first:
            self._is_asked = True
            self._asked.notify_all()

    def counting(self) -> dict[str, int]:
        """The other replicas that count, and how many partitions each owns."""
        now = self._clock.monotonic()
        return {name: here.owned for name, (at, here) in self._heard.items() if here.counts and now - at < HEARD_S}

    def others(self) -> list[str]:
        """The other replicas that are here, whether they count or not."""
        now = self._clock.monotonic()
        return sorted(name for name, (at, _) in self._heard.items() if now - at < HEARD_S)

    def silent_s(self, replica: str, since: float) -> float:
        """Seconds for which nothing was heard of a replica while the own words were, from `since` on."""
        now = self._clock.monotonic()
        if now - self._own_at > DEAF_S or replica == self.replica:
            return 0.0
        at = self._heard[replica][0] if replica in self._heard else -math.inf
        return now - max(at, self._hearing_since, since)

    @property
    def deaf_s(self) -> float:
        """Seconds since the own word was heard."""
        return self._clock.monotonic() - self._own_at


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
