"""Which replicas live, and which shards this one owns: each has at most one owner (docs/explanation/ownership.md).

A replica has one key in `wechat_members`, which it renews, and each shard has one claim in `wechat_claims`, which is
written only when its owner changes. `run` renews, and repeats one round:

1. Observe which members are alive.
2. Find surplus shards: owned ones for which a living member has a higher rank. The supervisor hands them over and
   calls `release`.
3. Check the own claims. One that was deleted is restored; one that another replica has is given up at once.
4. Claim free shards with the highest rank here: without an owner, or with one whose lease is proven to be over
   (`revoke_if_expired`).

No wall clocks are compared. An observer calls a member dead when its key kept one revision for `lease_s` seconds on
the observer's own monotonic clock, while its own reads and renewals worked all along. It then revokes that key by
compare-and-set, and only then takes the shards. The holder stops well before that on a timer of its own, counted from
the time at which it *sent* its last successful renewal.

`ensure_owned` is called right before each poll, send and publish. It is true only while the lease is valid. A replica
whose key was revoked gives up all shards and joins again as another incarnation. Claims are written by
compare-and-set, so that only one of two replicas gets a shard.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import secrets

import msgspec
import structlog

from adapter.contract.records import Claim, Member
from adapter.errors import UNDECODABLE, Conflict, LeaseLost, RecordTooNew, Temporary
from adapter.kit.timing import ChangeSignal, Clock, raise_if_cancelled, wait_event
from adapter.observability.decoding import decode_record
from adapter.observability.metrics import Metrics
from adapter.ports import Entry, LeaderBucket

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


class _Sighting(msgspec.Struct):
    """A member's key as observed here. Times are monotonic."""

    revision: int = 0
    since: float = 0.0
    """When this revision was first seen, or the observation restarted."""
    renewals: int = 0
    """Own renewals when the revision was first seen."""
    alive_since: float = 0.0
    """When the member was first seen alive, while it is."""
    draining: bool = False


class _Draining(msgspec.Struct):
    """What every version of a member has."""

    draining: bool = False


_decode_member = msgspec.json.Decoder(_Draining).decode


@functools.lru_cache(maxsize=8192)  # called for all shards and members in each round
def rank(member: str, shard: int) -> bytes:
    """Rank for rendezvous hashing. The living member with the highest rank should own the shard."""
    return hashlib.blake2b(f"{member}|{shard}".encode(), digest_size=8).digest()


def highest_ranked(members: list[str], shard: int) -> str | None:
    """The member that should own the shard; None: there is none."""
    return max(members, key=lambda member: rank(member, shard), default=None)


class Leases:
    """The lease of this replica, and its shards: it owns those in `owned` while `is_valid`."""

    def __init__(
        self,
        members: LeaderBucket,
        claims: LeaderBucket,
        clock: Clock,
        metrics: Metrics,
        *,
        instance: str,
        lease_s: float,
        partitions: int,
    ) -> None:
        self.incarnation = ""
        self.owned: set[int] = set()
        self.surplus: set[int] = set()
        """Owned shards that another replica should own; `release` hands them over."""
        self.orphans: set[int] = set()
        """Shards without a living owner in the last round."""
        self.changed = ChangeSignal()
        """Notified when shards come or go, members leave, and when the lease pauses or resumes."""
        self.membership_epoch = 0
        """Counts members that left or fell silent, after which waits for them are checked again."""
        self.draining = False
        self.last_error = "no answer yet"
        """Cause of the last failed renewal, for operators."""
        self._members = members
        self._claims = claims
        self._clock = clock
        self._metrics = metrics
        self._instance = instance
        self._lease_s = lease_s
        self._partitions = partitions
        # the own key
        self._revision = 0
        self._renewing = asyncio.Lock()
        self._deadline = 0.0
        """Monotonic time at which the lease ends."""
        self._renewed_at = 0.0
        """When the last successful renewal was answered."""
        self._renewals = 0
        """Number of successful renewals."""
        self._paused = True
        # the others
        self._sightings: dict[str, _Sighting] = {}
        """By member."""
        self._live: dict[str, _Sighting] = {}
        """Those that were alive at the last observation."""
        self._last_read_at = 0.0
        self._known_dead: set[str] = set()
        self._absent_since: dict[str, float] = {}
        """Members and claims without a key, and since when. The bucket may be gone while the owner is alive."""
        # the claims
        self._claim_revisions: dict[int, int] = {}
        self._release_unconfirmed: set[int] = set()
        """Released shards whose write may have failed or may still land; only another write settles that."""
        self._claim_soon = asyncio.Event()

    @property
    def is_valid(self) -> bool:
        """Whether the owned shards may be used now."""
        return self._clock.monotonic() < self._deadline

    def ensure_owned(self, shard: int) -> None:
        """Raises LeaseLost unless this replica may poll and send for `shard` now."""
        if shard not in self.owned or not self.is_valid:
            raise LeaseLost("lease_lost", f"shard {shard}")

    async def wait_owned(self, shard: int, timeout_s: float | None = None) -> None:
        """Returns when `ensure_owned` would pass, or after `timeout_s` seconds."""
        await self.changed.wait_until(lambda: self.is_valid and shard in self.owned, timeout_s)

    def claim_now(self) -> None:
        """Starts the next round at once, since another replica has released shards."""
        self._claim_soon.set()

    async def run(self) -> None:
        """Renews and claims until cancelled. Joins again as another incarnation after a revocation."""
        while True:
            self.incarnation = f"{self._instance}-{secrets.token_hex(4)}"
            self._revision = 0
            try:
                # a separate task: before Python 3.13 a group that fails while it is cancelled forgets the
                # cancellation
                await asyncio.get_running_loop().create_task(self._hold_incarnation(), name="leases.hold")
            except* LeaseLost:
                log.error("lease.revoked", incarnation=self.incarnation, shards=len(self.owned))
                self._metrics.lease_changes.labels(reason="lost").inc(len(self.owned))
                self._forget_all()
            raise_if_cancelled()

    async def _hold_incarnation(self) -> None:
        """Renews and claims as one incarnation. Raises a group with LeaseLost."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._renew_forever(), name="leases.renew")
            group.create_task(self._watch_forever(), name="leases.watch")
            group.create_task(self._claim_forever(), name="leases.claim")

    # the own key -----------------------------------------------------------------------------------

    async def _renew_forever(self) -> None:
        failures = 0
        while True:
            try:
                await self._renew()
                failures = 0
            except (Temporary, Conflict) as exc:  # Conflict: an earlier write landed without an answer
                failures += 1
                self.last_error = exc.detail or exc.reason
                if failures == 1:
                    log.warning("lease.unrenewed", reason=exc.reason, detail=exc.detail)
            await self._clock.sleep(self._lease_s / 4 if self.is_valid else 0.1)

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
        ends = [seen.since + self._lease_s - now for name, seen in self._live.items() if name != self.incarnation]
        return max(SHORTEST_S, min([OBSERVE_FRACTION * self._lease_s, *(left_s for left_s in ends if left_s > 0)]))

    async def _observe_members(self) -> None:
        """Reads which members are alive. After a gap in its reads, or in its own renewals, all observations restart,
        since others can still read a bucket without a leader, but not write it. Members for which `MIN_OWN_RENEWALS`
        have passed are not observed again after a gap in renewals, as such a gap may recur."""
        entries = await self._members.list_entries()
        now, patience_s = self._clock.monotonic(), self._lease_s / 4 + 1.0
        was_blind, was_mute = now - self._last_read_at > patience_s, now - self._renewed_at > patience_s
        self._last_read_at = now
        sightings, live = dict[str, _Sighting](), dict[str, _Sighting]()
        for name, value, revision in entries:
            if value is None:
                continue
            seen = sightings[name] = self._sightings.get(name) or _Sighting()
            if was_blind or seen.revision != revision:
                seen.revision, seen.since, seen.renewals = revision, now, self._renewals
            elif was_mute and self._renewals - seen.renewals < MIN_OWN_RENEWALS:
                seen.since = now
            if now - seen.since < self._lease_s:
                with contextlib.suppress(*UNDECODABLE):  # another program's key is no member
                    seen.draining = _decode_member(value).draining
                    seen.alive_since = seen.alive_since if name in self._live else now
                    live[name] = seen
        if self._live.keys() - live.keys():
            self.membership_epoch += 1
            self.changed.notify_all()
        self._sightings, self._live = sightings, live

    @property
    def is_alone(self) -> bool:
        """Whether no other replica is there to take over."""
        return not any(name != self.incarnation and not member.draining for name, member in self._live.items())

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
                seen = self._sightings.get(incarnation) or _Sighting()
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

    # claims ---------------------------------------------------------------------------------------

    async def _claim_forever(self) -> None:
        await self.changed.wait_until(lambda: self.is_valid)  # the others must see it, too
        while True:
            try:
                await self._observe_members()
                if self.is_valid and not self.draining:
                    self._find_surplus()
                    claims = {entry.key: entry for entry in await self._claims.list_entries()}
                    await self._check_claims(claims)
                    await self._claim_free(claims)
            except Temporary as exc:
                log.debug("lease.unread", reason=exc.reason)
            await wait_event(self._claim_soon, self._next_look_s())
            self._claim_soon.clear()

    def _find_surplus(self) -> None:
        """Finds surplus shards. A member counts after it has lived for a lease, so that an unstable one moves
        nothing."""
        grown = [
            name
            for name, seen in self._live.items()
            if seen.since - seen.alive_since >= self._lease_s and not seen.draining
        ]
        names = [*grown, self.incarnation]
        surplus = {shard for shard in self.owned if highest_ranked(names, shard) != self.incarnation}
        if surplus != self.surplus:
            self.surplus = surplus
            self.changed.notify_all()

    async def _check_claims(self, claims: dict[str, Entry]) -> None:
        """Restores claims that were deleted or overwritten, and gives up those that another replica has."""
        deleted_shards = []
        for shard in sorted(self.owned):
            entry, revision = claims.get(str(shard)), self._claim_revisions[shard]
            if entry is not None and entry.revision == revision:
                continue
            try:
                claim = self._decode_claim(entry)
            except RecordTooNew:
                claim = Claim()  # a newer replica's
            if entry is None or claim is None:
                deleted_shards.append(shard)
            elif entry.revision > revision and claim.owner != self.incarnation:
                log.error("claim.lost", shard=shard)
                self._metrics.lease_changes.labels(reason="lost").inc()
                self._remove_owned(shard)
        await asyncio.gather(*(self._restore_claim(shard) for shard in deleted_shards))

    async def _restore_claim(self, shard: int) -> None:
        claim = msgspec.json.encode(Claim(owner=self.incarnation))
        try:
            entry = await self._claims.get(str(shard))  # the list may be older than the claim
            if self._decode_claim(entry) is not None or shard not in self.owned:
                return
            revision = await self._claims.write(str(shard), claim, entry.revision if entry else 0)
        except (Temporary, Conflict):
            return  # the next round finds the owner
        log.error("claim.restored", shard=shard, detail="The claim, or its bucket, was deleted or overwritten.")
        if shard in self.owned:
            self._claim_revisions[shard] = revision
        else:  # released meanwhile, with an outdated revision
            self._release_unconfirmed.add(shard)

    def _remove_owned(self, shard: int) -> int:
        """Removes a shard from the owned ones. Returns the revision of its claim."""
        self.owned.discard(shard)
        self.surplus.discard(shard)
        self._metrics.shards_owned.set(len(self.owned))
        self.changed.notify_all()
        return self._claim_revisions.pop(shard)

    async def _claim_free(self, claims: dict[str, Entry]) -> None:
        eligible = [name for name, seen in self._live.items() if not seen.draining]
        free_shards, orphans = [], set()
        for shard in range(self._partitions):
            if shard in self.owned:
                continue
            entry = claims.get(str(shard))
            try:
                claim, revision = self._decode_claim(entry), entry.revision if entry else 0
            except RecordTooNew:
                continue
            owner = claim.owner if claim else ""
            if owner not in self._live:
                orphans.add(shard)
            if claim is not None:
                self._absent_since.pop(f"claim {shard}", None)
            elif self.other_incarnations and not self._is_long_absent(f"claim {shard}"):
                continue  # it may have been deleted: its owner restores it
            if highest_ranked(eligible, shard) == self.incarnation:
                if not owner or owner == self.incarnation or await self.revoke_if_expired(owner):
                    free_shards.append((shard, owner, revision))
            elif owner == self.incarnation:  # a claim or a release landed late
                await self._write_released(shard, revision)
        results = await asyncio.gather(*(self._claim_shard(*item) for item in free_shards))
        self.orphans = orphans - self.owned
        if any(results):
            log.info("shards.claimed", claimed=sum(results), owned=len(self.owned))
            self._metrics.shards_owned.set(len(self.owned))
            self.changed.notify_all()

    async def _claim_shard(self, shard: int, owner: str, revision: int) -> bool:
        if self.draining:
            return False
        claim = msgspec.json.encode(Claim(owner=self.incarnation))
        if owner == self.incarnation and shard not in self._release_unconfirmed:
            self._claim_revisions[shard] = revision  # an own claim whose answer was lost
        else:
            try:
                self._claim_revisions[shard] = await self._claims.write(str(shard), claim, revision)
            except (Temporary, Conflict):
                return False  # another replica was faster, or the answer was lost: the next round finds out
        self.owned.add(shard)
        self._release_unconfirmed.discard(shard)
        reason = "taken" if owner and owner != self.incarnation else "acquired"
        self._metrics.lease_changes.labels(reason=reason).inc()
        return True

    def _decode_claim(self, entry: Entry | None) -> Claim | None:
        """None: there is no claim, not even an empty one. Only others delete claims or write anything else. Raises
        RecordTooNew."""
        try:
            return decode_record(entry.value, Claim, shard=entry.key) if entry and entry.value else None
        except UNDECODABLE:
            return None

    # release --------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Announces that this replica claims no more shards."""
        self.draining = True
        try:
            await self._renew()
        except (Temporary, Conflict, LeaseLost) as exc:
            log.warning("lease.unrenewed", reason=exc.reason)

    async def release(self, shard: int) -> None:
        """Releases a shard after its last send. Polls that wait end at their boundary."""
        if shard not in self.owned:
            return
        # before the write: until its answer the claim may still name this replica
        self._release_unconfirmed.add(shard)
        await self._write_released(shard, self._remove_owned(shard))

    async def _write_released(self, shard: int, revision: int) -> None:
        try:
            await self._claims.write(str(shard), msgspec.json.encode(Claim()), revision)
        except Conflict:
            self._release_unconfirmed.discard(shard)  # an earlier own write landed, or another owner claimed it
        except Temporary as exc:
            log.warning("shard.unreleased", shard=shard, reason=exc.reason)
        else:
            self._release_unconfirmed.discard(shard)
            self._metrics.lease_changes.labels(reason="released").inc()

    async def release_all(self) -> None:
        """Releases the remaining shards and the membership after the last poll and send."""
        await asyncio.gather(*(self.release(shard) for shard in sorted(self.owned)))
        self._forget_all()
        try:
            await self._members.write(self.incarnation, None, self._revision)
        except (Temporary, Conflict) as exc:
            log.warning("lease.unreleased", reason=exc.reason)

    def _forget_all(self) -> None:
        self.owned.clear()
        self.surplus.clear()
        self._claim_revisions.clear()
        self._release_unconfirmed.clear()
        self._deadline = 0.0
        self._paused = True
        self._metrics.shards_owned.set(0)
        self.changed.notify_all()
