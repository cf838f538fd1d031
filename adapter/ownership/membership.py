"""Which replicas live: this one's key, which it renews, and the keys of the others, as they are observed from here.

No wall clocks are compared: an observer calls a member dead when its key kept one revision for `lease_s` seconds
on the observer's own monotonic clock while reads, and its own renewals, worked all along; it then revokes that key
by compare-and-set, and only then takes the shards (`leases`). The holder stops on a timer of its own well before
that, counted from the time at which it *sent* its last good renewal.
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
from adapter.errors import UNDECODABLE, Conflict, LeaseLost, Temporary
from adapter.kit.timing import ChangeSignal, Clock
from adapter.observability.metrics import Metrics
from adapter.ports import LeaderBucket

log = structlog.get_logger()

DEAD_KEPT = 1000
"""Members known to be dead, and keys known to be absent, that are remembered."""
OBSERVE_FRACTION = 1 / 8
"""Pause between two looks at who lives, as a part of the lease."""
SHORTEST_S = 0.05
"""Shortest pause between two looks: clocks may differ by a hair over when a lease ends."""
MIN_OWN_RENEWALS = 4
"""Whose key stood still while this replica renewed its own so often, as often as each does in a lease, could have
renewed too: a failure here is no reason to wait for them any longer than a lease."""
HOLDER_FRACTION = 0.8
"""The holder stops after this part of the lease; the rest is for clocks that run apart and answers on their way."""


class Sighting(NamedTuple):
    """A member's key, as this replica observes it."""

    revision: int
    since: float
    """Monotonic time at which this revision was first seen, or the observation began again."""
    renewals: int
    """Of this replica's own key when the revision was first seen."""


NEVER = Sighting(0, 0.0, 0)


class Membership:
    """This replica, one incarnation after the other, and what it knows of the others; `Leases` adds the shards."""

    def __init__(
        self, members: LeaderBucket, clock: Clock, metrics: Metrics, *, instance: str, lease_s: float
    ) -> None:
        self.owned: set[int] = set()
        """This replica's shards, as long as `is_valid`."""
        self.changed = ChangeSignal()
        """Notified when shards come or go, and when the lease pauses or resumes."""
        self.incarnation = ""
        self.membership_epoch = 0
        """Counts members that went or fell silent: who waits for something of theirs looks again."""
        self.draining = False
        self.last_error = "no answer yet"
        """Why the last renewal that failed did, in words for an operator."""
        self._members = members
        self._clock = clock
        self._metrics = metrics
        self._instance = instance
        self._lease_s = lease_s
        self._revision = 0
        """Of this incarnation's key among the members."""
        self._renewing = asyncio.Lock()
        self._deadline = 0.0
        """Monotonic time up to which the lease is valid."""
        self._renewed_at = 0.0
        """When the last good renewal was answered."""
        self._renewals = 0
        """How many there were."""
        self._paused = True
        self._sightings: dict[str, Sighting] = {}
        """Of each member's key."""
        self._first_seen_at: dict[str, float] = {}
        """When each living member was first seen."""
        self._live: dict[str, Member] = {}
        self._last_read_at = 0.0
        self._known_dead: set[str] = set()
        self._absent_since: dict[str, float] = {}
        """Members and claims without a trace, and since when: their bucket may be gone while their owner lives."""

    @property
    def is_valid(self) -> bool:
        """Whether what is owned may be used right now."""
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

    # my own key -----------------------------------------------------------------------------------

    async def _renew_forever(self) -> None:
        failures = 0
        while True:
            try:
                await self._renew()
                failures = 0
            except (Temporary, Conflict) as exc:  # Conflict: a write landed of which we did not hear in time
                failures += 1
                self._on_renewal_failed(exc, failures)
            await self._clock.sleep(self._lease_s / 4 if self.is_valid else 0.1)

    def _on_renewal_failed(self, exc: Temporary | Conflict, failures: int) -> None:
        self.last_error = exc.detail or exc.reason
        if failures == 1:
            log.warning("lease.unrenewed", reason=exc.reason, detail=exc.detail)

    async def _renew(self) -> None:
        """Raises Temporary, LeaseLost when another replica revoked this incarnation."""
        async with self._renewing:  # who leaves renews once more, perhaps as a renewal is out
            await self._renew_once()

    async def _renew_once(self) -> None:
        sent = self._clock.monotonic()
        value = msgspec.json.encode(Member(instance=self._instance, draining=self.draining))
        try:
            self._revision = await self._members.write(self.incarnation, value, self._revision)
        except (Temporary, Conflict):
            # A lost answer is ambiguous: the write may have landed. The key is ours alone, so its revision is
            # ours if it is still there; a tombstone means that we were revoked.
            entry = await self._members.get(self.incarnation)
            if self._revision and (entry is None or entry.value is None):
                raise LeaseLost("lease_revoked") from None
            self._revision = entry.revision if entry else 0
            raise
        ran_out = (
            not self.is_valid
        )  # on a busy loop also without a pause: this answer was read before the timer's turn
        self._renewed_at, self._deadline = self._clock.monotonic(), sent + self._lease_s * HOLDER_FRACTION
        self._renewals += 1
        if (self._paused or ran_out) and self.is_valid:
            self._paused = False
            log.info("lease.valid", incarnation=self.incarnation, shards=len(self.owned))
            self.changed.notify_all()

    async def _watch_forever(self) -> None:
        """Tells everybody at the moment when the lease runs out, on its own timer: a renewal may hang."""
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
        """Until the next look: at the latest when the lease of a member that keeps silent is over."""
        now = self._clock.monotonic()
        others = [
            self._sightings[name].since + self._lease_s - now for name in self._live if name != self.incarnation
        ]
        return max(SHORTEST_S, min([OBSERVE_FRACTION * self._lease_s, *(left_s for left_s in others if left_s > 0)]))

    async def _observe_members(self) -> None:
        """Reads who lives. Blind for a while, it starts every observation again, and so it does when it could not
        renew: of a bucket without a leader the others still read what nobody can write. That may happen time and
        again, so not for those who had their `MIN_OWN_RENEWALS`."""
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
                with contextlib.suppress(*UNDECODABLE):  # somebody else's key is no member
                    live[entry.key] = msgspec.json.decode(entry.value, type=Member)
        if self._live.keys() - live.keys():
            self.membership_epoch += 1
            self.changed.notify_all()
        self._live = live
        self._sightings = {
            entry.key: self._sightings[entry.key] for entry in entries if entry.value and entry.key in self._sightings
        }
        self._first_seen_at = {name: self._first_seen_at.get(name, now) for name in live}

    @property
    def is_alone(self) -> bool:
        """Whether no other replica is there to take over."""
        return not any(name != self.incarnation and not member.draining for name, member in self._live.items())

    @property
    def living_count(self) -> int:
        """How many replicas live, this one included, as far as is known here."""
        return len(self._live.keys() | {self.incarnation})

    @property
    def other_incarnations(self) -> set[str]:
        """The other incarnations that live, as far as is known here."""
        return self._live.keys() - {self.incarnation}

    async def revoke_if_expired(self, incarnation: str) -> bool:
        """Whether it is proven that `incarnation` does nothing any more. Revokes it if its lease ran out."""
        if incarnation in self._known_dead:
            return True
        if incarnation == self.incarnation or incarnation in self._live:
            return False
        try:
            entry = await self._members.get(incarnation)
            if entry is None and not self._is_long_absent(f"member {incarnation}"):
                return False  # its bucket is gone, perhaps: it learns that at its next renewal, or stops at its timer
            if entry is not None and entry.value is not None:
                seen = self._sightings.get(incarnation, NEVER)
                if seen.revision != entry.revision or self._clock.monotonic() - seen.since < self._lease_s:
                    return False
                await self._members.write(incarnation, None, entry.revision)
                log.warning("lease.expired", incarnation=incarnation)
        except (Temporary, Conflict):
            return False  # it renewed meanwhile, another one revoked it, or we do not know: look again later
        if len(self._known_dead) >= DEAD_KEPT:
            self._known_dead.clear()  # they are found dead again
        self._known_dead.add(incarnation)
        self._absent_since.pop(f"member {incarnation}", None)
        return True

    def _is_long_absent(self, what: str) -> bool:
        """Whether it has been absent for a lease, which is as long as an owner that lives may take to notice."""
        now = self._clock.monotonic()
        if len(self._absent_since) > DEAD_KEPT:
            self._absent_since.clear()  # they are missed again
        return now - self._absent_since.setdefault(what, now) >= self._lease_s
