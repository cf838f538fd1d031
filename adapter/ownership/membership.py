"""Which replicas are alive: this replica's key, which it renews, and the other replicas' keys as observed here.

No wall clocks are compared. An observer calls a member dead when its key kept one revision for `lease_s` seconds on
the observer's own monotonic clock, while its own reads and renewals worked all along. It then revokes that key by
compare-and-set, and only then takes the shards (`leases`). The holder stops well before that on a timer of its own,
counted from the time at which it *sent* its last successful renewal.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from typing import NamedTuple

import msgspec
import structlog

from adapter.contract.records import Member
from adapter.errors import UNDECODABLE, Conflict, LeaseLost, RecordTooNew, Temporary
from adapter.kit.timing import ChangeSignal, Clock
from adapter.observability.metrics import Metrics
from adapter.observability.records import RecordDecoder
from adapter.ports import LeaderBucket

log = structlog.get_logger()

DEAD_KEPT = 1000
"""Most members known to be dead, and keys known to be absent, that are remembered."""
OBSERVE_FRACTION = 1 / 8
"""Interval between two observations, as a fraction of the lease."""
SHORTEST_S = 0.05
"""Shortest interval between two observations, since clocks may differ slightly about the end of a lease."""
MIN_OWN_RENEWALS = 4
"""Own renewals after which a silent member counts as able to renew: each member renews as often in a lease. Failures
of this replica then no longer extend the wait for that member."""
HOLDER_FRACTION = 0.8
"""Fraction of the lease after which the holder stops. The rest allows for clocks that differ and answers in
flight."""


class Sighting(NamedTuple):
    """A member's key as observed here."""

    revision: int
    since: float
    """Monotonic time at which this revision was first seen, or the observation restarted."""
    renewals: int
    """Own renewals when the revision was first seen."""


NEVER = Sighting(0, 0.0, 0)


class _Draining(msgspec.Struct):
    """What every version of a member has."""

    draining: bool = False


class Membership:
    """This replica's incarnations, and what it knows of the other replicas; `Leases` adds the shards."""

    def __init__(
        self, members: LeaderBucket, clock: Clock, metrics: Metrics, *, instance: str, lease_s: float
    ) -> None:
        self.owned: set[int] = set()
        """Shards of this replica while `is_valid`."""
        self.changed = ChangeSignal()
        """Notified when shards come or go, and when the lease pauses or resumes."""
        self.incarnation = ""
        self.membership_epoch = 0
        """Counts members that left or fell silent, after which waits for them are checked again."""
        self.draining = False
        self.last_error = "no answer yet"
        """Cause of the last failed renewal, for operators."""
        self._members = members
        self._member_decoder = RecordDecoder(Member)
        self._clock = clock
        self._metrics = metrics
        self._instance = instance
        self._lease_s = lease_s
        self._revision = 0
        """Revision of this incarnation's key."""
        self._renewing = asyncio.Lock()
        self._deadline = 0.0
        """Monotonic time at which the lease ends."""
        self._renewed_at = 0.0
        """When the last successful renewal was answered."""
        self._renewals = 0
        """Number of successful renewals."""
        self._paused = True
        self._sightings: dict[str, Sighting] = {}
        """By member."""
        self._first_seen_at: dict[str, float] = {}
        """When each living member was first seen."""
        self._live: dict[str, Member] = {}
        self._last_read_at = 0.0
        self._known_dead: set[str] = set()
        self._absent_since: dict[str, float] = {}
        """Members and claims without a key, and since when. The bucket may be gone while the owner is alive."""

    @property
    def is_valid(self) -> bool:
        """Whether the owned shards may be used now."""
        return self._clock.monotonic() < self._deadline

    async def _join(self) -> None:
        self.incarnation = f"{self._instance}-{secrets.token_hex(4)}"
        self._revision = 0
        for failures in itertools.count(1):
            try:
                await self._renew()
                break
            except (Temporary, Conflict) as exc:
                self._on_renewal_failed(exc, failures)
                await self._clock.sleep(0.2)
        log.info("lease.joined", incarnation=self.incarnation)

    # the own key -----------------------------------------------------------------------------------

    async def _renew_forever(self) -> None:
        failures = 0
        while True:
            try:
                await self._renew()
                failures = 0
            except (Temporary, Conflict) as exc:  # Conflict: an earlier write landed without an answer
                failures += 1
                self._on_renewal_failed(exc, failures)
            await self._clock.sleep(self._lease_s / 4 if self.is_valid else 0.1)

    def _on_renewal_failed(self, exc: Temporary | Conflict, failures: int) -> None:
        self.last_error = exc.detail or exc.reason
        if failures == 1:
            log.warning("lease.unrenewed", reason=exc.reason, detail=exc.detail)

    async def _renew(self) -> None:
        """Raises Temporary, and LeaseLost if another replica revoked this incarnation."""
        async with self._renewing:  # `drain` may renew while a renewal is in flight
            await self._renew_once()

    async def _renew_once(self) -> None:
        sent = self._clock.monotonic()
        value = msgspec.json.encode(Member(instance=self._instance, draining=self.draining))
        try:
            self._revision = await self._members.write(self.incarnation, value, self._revision)
        except (Temporary, Conflict):
            # After a lost answer the write may have landed. Only this replica writes the key, so its revision is
            # valid if the key exists; a tombstone means that the incarnation was revoked.
            entry = await self._members.get(self.incarnation)
            if self._revision and (entry is None or entry.value is None):
                raise LeaseLost("lease_revoked") from None
            self._revision = entry.revision if entry else 0
            raise
        ran_out = not self.is_valid  # also without a pause, if a busy loop reads this answer before the timer fires
        self._renewed_at, self._deadline = self._clock.monotonic(), sent + self._lease_s * HOLDER_FRACTION
        self._renewals += 1
        if (self._paused or ran_out) and self.is_valid:
            self._paused = False
            log.info("lease.valid", incarnation=self.incarnation, shards=len(self.owned))
            self.changed.notify_all()

    async def _watch_forever(self) -> None:
        """Announces the end of the lease at once, on a timer of its own, since a renewal may hang."""
        while True:
            left_s = self._deadline - self._clock.monotonic()
            if left_s > 0:
                await self._clock.sleep(left_s)
                continue
            if not self._paused:
                self._paused = True
                log.warning("lease.paused", incarnation=self.incarnation, shards=len(self.owned))
                self.changed.notify_all()
            await self._clock.sleep(0.05)

    # the others -----------------------------------------------------------------------------------

    def _next_look_s(self) -> float:
        """Seconds until the next observation: at the latest the end of a silent member's lease."""
        now = self._clock.monotonic()
        others = [
            self._sightings[name].since + self._lease_s - now for name in self._live if name != self.incarnation
        ]
        return max(SHORTEST_S, min([OBSERVE_FRACTION * self._lease_s, *(left_s for left_s in others if left_s > 0)]))

    async def _observe_members(self) -> None:
        """Reads which members are alive. After a gap in its reads, or in its own renewals, all observations restart,
        since others can still read a bucket without a leader, but not write it. Members for which `MIN_OWN_RENEWALS`
        have passed are not observed again, as such a gap may recur."""
        entries = await self._members.list_entries()
        now = self._clock.monotonic()
        patience_s = self._lease_s / 4 + 1.0
        if now - self._last_read_at > patience_s:
            self._sightings.clear()
        elif now - self._renewed_at > patience_s:
            for name, seen in self._sightings.items():
                if self._renewals - seen.renewals < MIN_OWN_RENEWALS:
                    self._sightings[name] = seen._replace(since=now)
        self._last_read_at = now
        live = {}
        for entry in entries:
            if entry.value is None:
                continue
            if self._sightings.get(entry.key, NEVER).revision != entry.revision:
                self._sightings[entry.key] = Sighting(entry.revision, now, self._renewals)
            if now - self._sightings[entry.key].since < self._lease_s:
                with contextlib.suppress(*UNDECODABLE):  # another program's key is no member
                    live[entry.key] = self._decode_member(entry.key, entry.value)
        if self._live.keys() - live.keys():
            self.membership_epoch += 1
            self.changed.notify_all()
        self._live = live
        self._sightings = {
            entry.key: self._sightings[entry.key] for entry in entries if entry.value and entry.key in self._sightings
        }
        self._first_seen_at = {name: self._first_seen_at.get(name, now) for name in live}

    def _decode_member(self, incarnation: str, value: bytes) -> Member:
        """A member of a newer version counts like any other. Raises UNDECODABLE."""
        try:
            return self._member_decoder.decode(value, incarnation=incarnation)
        except RecordTooNew:
            return Member(instance="", draining=msgspec.json.decode(value, type=_Draining).draining)

    @property
    def is_alone(self) -> bool:
        """Whether no other replica is there to take over."""
        return not any(name != self.incarnation and not member.draining for name, member in self._live.items())

    @property
    def living_count(self) -> int:
        """Number of living replicas as known here, including this one."""
        return len(self._live.keys() | {self.incarnation})

    @property
    def other_incarnations(self) -> set[str]:
        """Other living incarnations as known here."""
        return self._live.keys() - {self.incarnation}

    async def revoke_if_expired(self, incarnation: str) -> bool:
        """Whether `incarnation` is proven to do nothing more. Revokes it if its lease has expired."""
        if incarnation in self._known_dead:
            return True
        if incarnation == self.incarnation or incarnation in self._live:
            return False
        try:
            entry = await self._members.get(incarnation)
            if entry is None and not self._is_long_absent(f"member {incarnation}"):
                return False  # the bucket may be gone: the member notices at its next renewal, or stops by its timer
            if entry is not None and entry.value is not None:
                seen = self._sightings.get(incarnation, NEVER)
                if seen.revision != entry.revision or self._clock.monotonic() - seen.since < self._lease_s:
                    return False
                await self._members.write(incarnation, None, entry.revision)
                log.warning("lease.expired", incarnation=incarnation)
        except (Temporary, Conflict):
            return False  # renewed or revoked meanwhile, or unknown: the next round checks again
        if len(self._known_dead) >= DEAD_KEPT:
            self._known_dead.clear()  # found again when needed
        self._known_dead.add(incarnation)
        self._absent_since.pop(f"member {incarnation}", None)
        return True

    def _is_long_absent(self, key: str) -> bool:
        """Whether a key has been absent for a lease, in which a living owner notices that."""
        now = self._clock.monotonic()
        if len(self._absent_since) > DEAD_KEPT:
            self._absent_since.clear()  # found again when needed
        return now - self._absent_since.setdefault(key, now) >= self._lease_s
