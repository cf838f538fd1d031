"""Which shards this replica owns: exactly one owner each, always (design 4; the nine traps of nats.md 4.3).

One renewed key per incarnation of a replica, one claim per shard that is written only when the owner changes.
No wall clocks are compared: an observer calls a member dead when its key kept one revision for `lease_s` seconds
on the observer's own monotonic clock while reads, and its own renewals, worked all along; it then revokes that key
by compare-and-set, and only then takes the shards. The holder stops on a timer of its own well before that, counted
from the time at which it *sent* its last good renewal.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import itertools
import secrets
from typing import NamedTuple

import msgspec
import structlog

from adapter.errors import Conflict, LeaseLost, Temporary
from adapter.metrics import Metrics
from adapter.names import SHARDS
from adapter.ports import Entry, Register
from adapter.records import Claim, Member
from adapter.timing import Clock, Latch, first_of, heed

log = structlog.get_logger()

DEAD_KEPT = 1000
"""Members known to be dead, and keys known to be absent, that are remembered."""
LOOK = 1 / 8
"""Pause between two looks at who lives, as a part of the lease."""
SHORTEST_S = 0.05
"""Shortest pause between two looks: clocks may differ by a hair over when a lease ends."""
CHANCES = 4
"""Whose key stood still while this replica renewed its own so often, as often as each does in a lease, could have
renewed too: a failure here is no reason to wait for them any longer than a lease."""
HOLD = 0.8
"""The holder stops after this part of the lease; the rest is for clocks that run apart and answers on their way."""


@functools.lru_cache(maxsize=8192)  # asked for all shards and members at each look
def rank(member: str, shard: int) -> bytes:
    """Rendezvous hashing: the live member with the highest rank should own the shard."""
    return hashlib.blake2b(f"{member}|{shard}".encode(), digest_size=8).digest()


class Seen(NamedTuple):
    """A member's key, as this replica observes it."""

    revision: int
    since: float
    """Monotonic time at which this revision was first seen, or the observation began again."""
    renewals: int
    """Of this replica's own key when the revision was first seen."""


NEVER = Seen(0, 0.0, 0)


class Leases:
    """The shards in `owned` are this replica's while `valid` is true."""

    def __init__(
        self, members: Register, claims: Register, clock: Clock, metrics: Metrics, *, instance: str, lease_s: float
    ) -> None:
        self.owned: set[int] = set()
        self.changed = Latch()
        """Notified when shards come or go, and when the lease pauses or resumes."""
        self.incarnation = ""
        self.departures = 0
        """Counts members that went or fell silent: who waits for something of theirs looks again."""
        self.draining = False
        self._members = members
        self._claims = claims
        self._clock = clock
        self._metrics = metrics
        self._instance = instance
        self._lease_s = lease_s
        self._revision = 0
        """Of this incarnation's key among the members."""
        self._renewing = asyncio.Lock()
        self._look = asyncio.Event()
        self._deadline = 0.0
        """Monotonic time up to which the lease is valid."""
        self._renewed = 0.0
        """When the last good renewal was answered."""
        self._renewals = 0
        """How many there were."""
        self.hurdle = "no answer yet"
        """Why the last renewal that failed did, in words for an operator."""
        self._paused = True
        self._claim_revisions: dict[int, int] = {}
        self._unsure: set[int] = set()
        """Released, but perhaps the write did not land, or lands late: only another write settles it."""
        self.surplus: set[int] = set()
        """Owned shards that another replica should have: to be handed over by `release`."""
        self._seen: dict[str, Seen] = {}
        """Of each member's key."""
        self._since: dict[str, float] = {}
        """When each living member was first seen."""
        self._live: dict[str, Member] = {}
        self._last_read = 0.0
        self._dead: set[str] = set()
        self.orphans: set[int] = set()
        """Shards that no living replica owned when this one last looked."""
        self._absent: dict[str, float] = {}
        """Members and claims without a trace, and since when: they may have been purged while their owner lives."""

    @property
    def valid(self) -> bool:
        """Whether what is owned may be used right now."""
        return self._clock.monotonic() < self._deadline

    def check(self, shard: int) -> None:
        """Raises LeaseLost unless this replica may poll and send for `shard` at this moment."""
        if shard not in self.owned or not self.valid:
            raise LeaseLost("lease_lost", f"shard {shard}")

    async def run(self) -> None:
        """Joins, renews, claims, until cancelled. Joins anew, as another incarnation, when it was revoked."""
        while True:
            await self._join()
            try:
                # a task of its own: before Python 3.13 a group that fails as it is cancelled forgets that it was
                await asyncio.get_running_loop().create_task(self._hold(), name="leases.hold")
            except* LeaseLost:
                log.error("lease.revoked", incarnation=self.incarnation, shards=len(self.owned))
                self._metrics.lease_changes.labels(reason="lost").inc(len(self.owned))
                self._forget_all()
            heed()

    async def _hold(self) -> None:
        """Renews and claims as one incarnation. Raises LeaseLost, in a group."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._renew_forever(), name="leases.renew")
            group.create_task(self._watch_forever(), name="leases.watch")
            group.create_task(self._claim_forever(), name="leases.claim")

    async def _join(self) -> None:
        self.incarnation = f"{self._instance}-{secrets.token_hex(4)}"
        self._revision = 0
        for failures in itertools.count(1):
            try:
                await self._renew()
                break
            except (Temporary, Conflict) as exc:
                self._failed(exc, failures)
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
                self._failed(exc, failures)
            await self._clock.sleep(self._lease_s / 4 if self.valid else 0.1)

    def _failed(self, exc: Temporary | Conflict, failures: int) -> None:
        self.hurdle = exc.detail or exc.reason
        if failures == 1:
            log.warning("lease.unrenewed", reason=exc.reason, detail=exc.detail[:200])

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
        ran_out = not self.valid  # on a busy loop also without a pause: this answer was read before the timer's turn
        self._renewed, self._deadline = self._clock.monotonic(), sent + self._lease_s * HOLD
        self._renewals += 1
        if (self._paused or ran_out) and self.valid:
            self._paused = False
            log.info("lease.valid", incarnation=self.incarnation, shards=len(self.owned))
            self.changed.notify()

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
                self.changed.notify()
            await self._clock.sleep(0.05)

    # the others -----------------------------------------------------------------------------------

    async def _claim_forever(self) -> None:
        while True:
            try:
                await self._observe()
                if self.valid and not self.draining:
                    self._find_surplus()
                    claims = {entry.key: entry for entry in await self._claims.entries()}
                    await self._check_claims(claims)
                    if len(self.owned) < SHARDS:
                        await self._claim_free(claims)
                    else:
                        self.orphans = set()
            except Temporary as exc:
                log.debug("lease.unread", reason=exc.reason)
            await first_of(self._look, self._rest_s())
            self._look.clear()

    def _rest_s(self) -> float:
        """Until the next look: at the latest when the lease of a member that keeps silent is over."""
        now = self._clock.monotonic()
        others = [self._seen[name].since + self._lease_s - now for name in self._live if name != self.incarnation]
        return max(SHORTEST_S, min([LOOK * self._lease_s, *(left_s for left_s in others if left_s > 0)]))

    def look(self) -> None:
        """Another replica says that it has given shards back: no need to wait for the next round."""
        self._look.set()

    async def _observe(self) -> None:
        """Reads who lives. Blind for a while, it starts every observation again, and so it does when it could not
        renew: of a bucket without a leader the others still read what nobody can write. That may happen time and
        again, so not for those who had their `CHANCES`."""
        entries = await self._members.entries()
        now = self._clock.monotonic()
        patience_s = self._lease_s / 4 + 1.0
        if now - self._last_read > patience_s:
            self._seen.clear()
        elif now - self._renewed > patience_s:
            for name, seen in self._seen.items():
                if self._renewals - seen.renewals < CHANCES:
                    self._seen[name] = seen._replace(since=now)
        self._last_read = now
        live = {}
        for entry in entries:
            if entry.value is None:
                continue
            if self._seen.get(entry.key, NEVER).revision != entry.revision:
                self._seen[entry.key] = Seen(entry.revision, now, self._renewals)
            if now - self._seen[entry.key].since < self._lease_s:
                with contextlib.suppress(msgspec.MsgspecError):  # somebody else's key is no member
                    live[entry.key] = msgspec.json.decode(entry.value, type=Member)
        if self._live.keys() - live.keys():
            self.departures += 1
            self.changed.notify()
        self._live = live
        self._seen = {
            entry.key: self._seen[entry.key] for entry in entries if entry.value and entry.key in self._seen
        }
        self._since = {name: self._since.get(name, now) for name in live}

    def _best(self, names: list[str], shard: int) -> str:
        return max(names, key=lambda name: rank(name, shard), default="")

    def _find_surplus(self) -> None:
        """What is owned and should be another's, who has lived for a lease: one that flaps moves nothing."""
        grown = [name for name in self._live if self._seen[name].since - self._since[name] >= self._lease_s]
        names = [*(name for name in grown if not self._live[name].draining), self.incarnation]
        surplus = {shard for shard in self.owned if self._best(names, shard) != self.incarnation}
        if surplus != self.surplus:
            self.surplus = surplus
            self.changed.notify()

    @property
    def _alone_so_far(self) -> bool:
        """Whether no other incarnation is known to live: nobody can own what is unclaimed."""
        return self._live.keys() <= {self.incarnation}

    @property
    def alone(self) -> bool:
        """Whether no other replica is there to take over."""
        return not any(name != self.incarnation and not member.draining for name, member in self._live.items())

    @property
    def living(self) -> int:
        """How many replicas live, this one included, as far as is known here."""
        return len(self._live.keys() | {self.incarnation})

    @property
    def others(self) -> set[str]:
        """The other incarnations that live, as far as is known here."""
        return self._live.keys() - {self.incarnation}

    async def is_dead(self, incarnation: str) -> bool:
        """Whether it is proven that `incarnation` does nothing any more. Revokes it if its lease ran out."""
        if incarnation in self._dead:
            return True
        if incarnation == self.incarnation or incarnation in self._live:
            return False
        try:
            entry = await self._members.get(incarnation)
            if entry is None and not self._long_absent(f"member {incarnation}"):
                return False  # purged, perhaps: it learns that at its next renewal, or stops at its timer
            if entry is not None and entry.value is not None:
                seen = self._seen.get(incarnation, NEVER)
                if seen.revision != entry.revision or self._clock.monotonic() - seen.since < self._lease_s:
                    return False
                await self._members.write(incarnation, None, entry.revision)
                log.warning("lease.expired", incarnation=incarnation)
        except (Temporary, Conflict):
            return False  # it renewed meanwhile, another one revoked it, or we do not know: look again later
        if len(self._dead) >= DEAD_KEPT:
            self._dead.clear()  # they are found dead again
        self._dead.add(incarnation)
        self._absent.pop(f"member {incarnation}", None)
        return True

    def _long_absent(self, what: str) -> bool:
        """Whether it has been absent for a lease, which is as long as an owner that lives may take to notice."""
        now = self._clock.monotonic()
        if len(self._absent) > DEAD_KEPT:
            self._absent.clear()  # they are missed again
        return now - self._absent.setdefault(what, now) >= self._lease_s

    async def _check_claims(self, claims: dict[str, Entry]) -> None:
        """An operator may purge or delete claims, or another hand change them: what is owned is put back, or given
        up."""
        gone = []
        for shard in sorted(self.owned):
            entry, revision = claims.get(str(shard)), self._claim_revisions[shard]
            if entry is not None and entry.revision == revision:
                continue
            if entry is None or _claim_in(entry) is None:
                gone.append(shard)
            elif entry.revision > revision and _owner(entry) != self.incarnation:
                self._lose(shard)
        await asyncio.gather(*(self._put_back(shard) for shard in gone))

    async def _put_back(self, shard: int) -> None:
        mine = msgspec.json.encode(Claim(owner=self.incarnation))
        try:
            entry = await self._claims.get(str(shard))  # the reading may be older than our claim
            if _claim_in(entry) is not None or shard not in self.owned:
                return
            revision = await self._claims.write(str(shard), mine, entry.revision if entry else 0)
        except (Temporary, Conflict):
            return  # the next round sees whose it is now
        log.error("claim.restored", shard=shard, detail="Its key was purged, deleted or overwritten.")
        if shard in self.owned:
            self._claim_revisions[shard] = revision
        else:  # given back meanwhile, at a revision that was no more
            self._unsure.add(shard)

    def _lose(self, shard: int) -> None:
        """Another replica has the claim: this one stops at once."""
        log.error("claim.lost", shard=shard)
        self._metrics.lease_changes.labels(reason="lost").inc()
        self.owned.discard(shard)
        self.surplus.discard(shard)
        self._claim_revisions.pop(shard, None)
        self._metrics.shards_owned.set(len(self.owned))
        self.changed.notify()

    async def _claim_free(self, claims: dict[str, Entry]) -> None:
        eligible = [name for name, member in self._live.items() if not member.draining]
        wanted, orphans = [], set()
        for shard in range(SHARDS):
            if shard in self.owned:
                continue
            entry = claims.get(str(shard))
            owner = _owner(entry)
            if owner not in self._live:
                orphans.add(shard)
            if _claim_in(entry) is not None:
                self._absent.pop(f"claim {shard}", None)
            elif not self._alone_so_far and not self._long_absent(f"claim {shard}"):
                continue  # purged or deleted, perhaps: its owner puts it back
            if self._best(eligible, shard) != self.incarnation:
                if entry is not None and owner == self.incarnation:  # of a claim, or a release, that landed late
                    await self._free(shard, entry.revision)
                continue
            if not owner or owner == self.incarnation or await self.is_dead(owner):
                wanted.append((shard, owner, entry.revision if entry else 0))
        results = await asyncio.gather(*(self._claim(*item) for item in wanted))
        self.orphans = orphans - self.owned
        if any(results):
            log.info("shards.claimed", claimed=sum(results), owned=len(self.owned))
            self._metrics.shards_owned.set(len(self.owned))
            self.changed.notify()

    async def _claim(self, shard: int, owner: str, revision: int) -> bool:
        if self.draining:
            return False
        mine = msgspec.json.encode(Claim(owner=self.incarnation))
        if owner == self.incarnation and shard not in self._unsure:
            self._claim_revisions[shard] = revision  # a claim of ours whose answer was lost
        else:
            try:
                self._claim_revisions[shard] = await self._claims.write(str(shard), mine, revision)
            except (Temporary, Conflict):
                return False  # somebody was faster, or the answer got lost: the next round sees which
        self.owned.add(shard)
        self._unsure.discard(shard)
        self._metrics.lease_changes.labels(
            reason="taken" if owner and owner != self.incarnation else "acquired"
        ).inc()
        return True

    # leaving --------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Tells the others that this replica claims nothing any more."""
        self.draining = True
        try:
            await self._renew()
        except (Temporary, Conflict, LeaseLost) as exc:
            log.warning("lease.unrenewed", reason=exc.reason)

    async def release(self, shard: int) -> None:
        """Gives one shard back, after nothing is sent for it any more; polls that wait end at their boundary."""
        if shard not in self.owned:
            return
        self.owned.discard(shard)
        self.surplus.discard(shard)
        self._unsure.add(shard)  # before the write leaves: until it has an answer the claim may still name us
        revision = self._claim_revisions.pop(shard)
        self._metrics.shards_owned.set(len(self.owned))
        self.changed.notify()
        await self._free(shard, revision)

    async def _free(self, shard: int, revision: int) -> None:
        try:
            await self._claims.write(str(shard), msgspec.json.encode(Claim()), revision)
        except Conflict:
            self._unsure.discard(shard)  # an earlier write of ours, or another owner: not ours in any case
        except Temporary as exc:
            log.warning("shard.unreleased", shard=shard, reason=exc.reason)
        else:
            self._unsure.discard(shard)
            self._metrics.lease_changes.labels(reason="released").inc()

    async def leave(self) -> None:
        """Gives the shards that are left and the membership back, after nothing is polled or sent any more."""
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
        self._unsure.clear()
        self._deadline = 0.0
        self._paused = True
        self._metrics.shards_owned.set(0)
        self.changed.notify()


def _claim_in(entry: Entry | None) -> Claim | None:
    """None where there is no claim, not even of nobody: this program deletes none, and writes nothing else there."""
    try:
        return msgspec.json.decode(entry.value, type=Claim) if entry and entry.value else None
    except msgspec.MsgspecError:
        return None


def _owner(entry: Entry | None) -> str:
    """The incarnation that a claim names, "" if none."""
    claim = _claim_in(entry)
    return claim.owner if claim else ""
