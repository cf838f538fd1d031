"""Which shards this replica owns. Each shard has at most one owner (docs/explanation/ownership.md).

A replica has one key in `wechat_members`, which it renews (`membership`), and each shard has one claim in
`wechat_claims`, which is written only when its owner changes. `run` repeats one round:

1. Observe which members are alive.
2. Find surplus shards: owned ones for which a living member has a higher rank. The supervisor hands them over and
   calls `release`.
3. Check the own claims. One that was deleted is restored; one that another replica has is given up at once.
4. Claim free shards with the highest rank here: without an owner, or with one whose lease is proven to be over
   (`revoke_if_expired`).

`ensure_owned` is called right before each poll, send and publish. It is true only while the lease is valid. A replica
whose key was revoked gives up all shards and joins again as another incarnation. Claims are written by
compare-and-set, so that only one of two replicas gets a shard. No clock of another machine is used.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib

import msgspec
import structlog

from adapter.contract.names import SHARDS
from adapter.contract.records import Claim
from adapter.errors import UNDECODABLE, Conflict, LeaseLost, RecordTooNew, Temporary
from adapter.kit.timing import Clock, raise_if_cancelled, wait_event
from adapter.observability.metrics import Metrics
from adapter.observability.records import RecordDecoder
from adapter.ownership.membership import Membership
from adapter.ports import Entry, LeaderBucket

log = structlog.get_logger()


@functools.lru_cache(maxsize=8192)  # called for all shards and members in each round
def rank(member: str, shard: int) -> bytes:
    """Rank for rendezvous hashing. The living member with the highest rank should own the shard."""
    return hashlib.blake2b(f"{member}|{shard}".encode(), digest_size=8).digest()


def highest_ranked(members: list[str], shard: int) -> str:
    """The member that should own the shard; "": there is none."""
    return max(members, key=lambda member: rank(member, shard), default="")


class Leases(Membership):
    """The claims of shards. This replica owns the shards in `owned` while `is_valid`."""

    def __init__(
        self,
        members: LeaderBucket,
        claims: LeaderBucket,
        clock: Clock,
        metrics: Metrics,
        *,
        instance: str,
        lease_s: float,
    ) -> None:
        super().__init__(members, clock, metrics, instance=instance, lease_s=lease_s)
        self.surplus: set[int] = set()
        """Owned shards that another replica should own; `release` hands them over."""
        self.orphans: set[int] = set()
        """Shards without a living owner in the last round."""
        self._claims = claims
        self._claim_decoder = RecordDecoder(Claim)
        self._claim_revisions: dict[int, int] = {}
        self._release_unconfirmed: set[int] = set()
        """Released shards whose write may have failed or may still land; only another write settles that."""
        self._claim_soon = asyncio.Event()

    def ensure_owned(self, shard: int) -> None:
        """Raises LeaseLost unless this replica may poll and send for `shard` now."""
        if shard not in self.owned or not self.is_valid:
            raise LeaseLost("lease_lost", f"shard {shard}")

    async def wait_owned(self, shard: int, timeout_s: float | None = None) -> None:
        """Returns when `ensure_owned` would pass, or after `timeout_s` seconds."""
        await self.changed.wait_until(lambda: self.is_valid and shard in self.owned, timeout_s)

    async def run(self) -> None:
        """Joins, renews and claims until cancelled. Joins again as another incarnation after a revocation."""
        while True:
            await self._join()
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

    def claim_now(self) -> None:
        """Starts the next round at once, since another replica has released shards."""
        self._claim_soon.set()

    async def _claim_forever(self) -> None:
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
            name for name in self._live if self._sightings[name].since - self._first_seen_at[name] >= self._lease_s
        ]
        names = [*(name for name in grown if not self._live[name].draining), self.incarnation]
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
        eligible = [name for name, member in self._live.items() if not member.draining]
        free_shards, orphans = [], set()
        for shard in range(SHARDS):
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
            return self._claim_decoder.decode(entry.value, shard=entry.key) if entry and entry.value else None
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
