"""Exactly one owner per shard, always: replicas on one bucket, with everything that may go wrong between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.errors import LeaseLost
from adapter.kit.timing import SystemClock
from adapter.ownership.leases import HOLDER_FRACTION
from adapter.ports import Entry
from tests.newer import made_newer
from tests.ownership.cluster import LEASE_S, SHARDS, Cluster, Store

VIRTUAL_TIME = True


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    made.stop()


async def test_shards_that_nobody_could_claim_are_orphans_until_somebody_can(cluster: Cluster) -> None:
    alone = cluster.start()
    alone.claims.writes_fail = True
    await cluster.run(5)
    assert alone.leases.orphans == set(range(SHARDS))
    alone.claims.writes_fail = False
    await cluster.run(3)
    assert alone.leases.orphans == set()


async def test_a_word_of_another_replica_makes_it_look_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = cluster.start()
    await cluster.run(5)
    looks, entries = 0, alone.claims.list_entries

    async def counted() -> list[Entry]:
        nonlocal looks
        looks += 1
        return await entries()

    monkeypatch.setattr(alone.claims, "list_entries", counted)
    alone.leases.claim_now()
    await cluster.run(1)
    assert looks <= 4


async def test_a_claim_that_an_answer_lacks_since_it_is_older_is_not_written_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any server of a cluster may answer, also one that is behind."""
    alone = cluster.start()
    await cluster.run(5)
    written = cluster.claims.writes

    async def behind() -> list[Entry]:
        return []

    monkeypatch.setattr(alone.claims, "list_entries", behind)
    await cluster.run(2)
    assert alone.working == set(range(SHARDS))
    assert cluster.claims.writes == written


async def test_a_replica_that_comes_later_gets_its_share_and_nobody_elses(cluster: Cluster) -> None:
    first, second = cluster.start(), cluster.start()
    await cluster.run(5)
    before = set(first.working), set(second.working)
    third = cluster.start()
    await cluster.run(12)
    assert cluster.worked_for == SHARDS
    assert len(third.working) > SHARDS / 6
    assert first.working <= before[0]
    assert second.working <= before[1]


async def test_a_replica_that_flaps_moves_nothing(cluster: Cluster) -> None:
    first = cluster.start()
    await cluster.run(5)
    for _ in range(3):
        flapping = cluster.start()
        await cluster.run(LEASE_S / 2)
        await flapping.kill()
        await cluster.run(LEASE_S * 2)
    assert first.working == set(range(SHARDS))
    assert first.metrics.value("lease_changes_total", reason="released") == 0


async def test_a_release_that_lands_late_frees_nothing_that_was_claimed_again(cluster: Cluster) -> None:
    first = cluster.start()
    await cluster.run(5)
    first.claims.late_s = 3.0
    await first.leases.release(7)
    first.claims.late_s = 0.0
    with capture_logs() as logs:
        await cluster.run(10)
    assert "claim.lost" not in [line["event"] for line in logs]
    assert first.working == set(range(SHARDS))
    second = cluster.start()
    await cluster.run(12)
    assert cluster.worked_for == SHARDS
    assert second.working


async def test_a_release_that_never_landed_is_made_up_for(cluster: Cluster) -> None:
    first, second = cluster.start(), cluster.start()
    await cluster.run(5)
    theirs = next(iter(second.working))
    await second.leases.release(theirs)
    await cluster.run(3)
    first.cut()
    await asyncio.gather(*(first.leases.release(shard) for shard in sorted(first.working)[:3]))
    first.cut(down=False)
    await cluster.run(12)
    assert cluster.worked_for == SHARDS


async def test_writes_grow_with_the_number_of_replicas_and_not_with_their_shards(cluster: Cluster) -> None:
    """Nor with the bots: a bot is written when something is said, never to be kept."""
    for _ in range(3):
        cluster.start()
    await cluster.run(12)
    before = cluster.members.writes, cluster.claims.writes
    await cluster.run(60)
    assert cluster.members.writes - before[0] <= 3 * 60
    assert cluster.claims.writes == before[1]


async def test_a_dead_replica_is_replaced_in_six_seconds_and_not_before_its_lease_ends(
    cluster: Cluster,
) -> None:
    first = cluster.start()
    await cluster.run(3)
    successor = cluster.start()
    await cluster.run(3)
    owned = set(first.working)
    await first.kill()
    await cluster.run(HOLDER_FRACTION * LEASE_S - 1.0)
    assert successor.working == set(range(SHARDS)) - owned
    await cluster.run(6.0 - HOLDER_FRACTION * LEASE_S + 1.0)
    assert successor.working == set(range(SHARDS))


@pytest.mark.parametrize("write_s", [0.9])
async def test_a_dead_replica_is_replaced_also_where_each_write_takes_long(cluster: Cluster, write_s: float) -> None:
    """A renewal that takes its time was no time in which nobody could renew."""
    replicas = [cluster.start() for _ in range(3)]
    await cluster.run(8)
    for replica in replicas:
        replica.members.late_s = replica.claims.late_s = write_s
    await cluster.run(5)
    await replicas[0].kill()
    await cluster.run(8)
    assert cluster.worked_for == SHARDS


async def test_a_dead_replica_is_replaced_also_where_every_other_renewal_fails(cluster: Cluster) -> None:
    """Each time it cannot be told whether others could renew; but those who live did, between two failures."""
    replicas = [cluster.start() for _ in range(3)]
    await cluster.run(8)
    for replica in replicas:
        replica.members.unsteady = True
    owned = [set(replica.leases.owned) for replica in replicas]
    await cluster.run(60)
    assert [replica.leases.owned for replica in replicas] == owned
    await replicas[0].kill()
    await cluster.run(22)
    assert cluster.worked_for == SHARDS


@pytest.mark.parametrize("later_s", [0.0, 0.27])
async def test_a_dead_replica_is_found_out_at_the_end_of_its_lease_and_not_a_look_later(
    cluster: Cluster, later_s: float
) -> None:
    first = cluster.start()
    await cluster.run(3)
    successor = cluster.start()
    await cluster.run(6 + later_s)
    await first.kill()
    await cluster.run(1.0)
    seen = successor.leases._sightings[first.leases.incarnation].since
    while successor.leases.membership_epoch == 0:
        await cluster.run(0.02)
    passed_s = asyncio.get_running_loop().time() - seen
    assert LEASE_S <= passed_s < LEASE_S + 0.1


async def test_a_replica_that_cannot_renew_stops_before_another_takes_over(cluster: Cluster) -> None:
    first = cluster.start()
    await cluster.run(3)
    successor = cluster.start()
    await cluster.run(1)
    first.cut()
    with capture_logs() as logs:
        await cluster.run(HOLDER_FRACTION * LEASE_S + 0.1)
    assert first.working == set()
    assert first.leases.owned
    with pytest.raises(LeaseLost):
        first.leases.ensure_owned(next(iter(first.leases.owned)))
    assert "lease.paused" in [line["event"] for line in logs]
    await cluster.run(4)
    assert successor.working == set(range(SHARDS))


async def test_a_lease_counts_from_the_time_at_which_its_renewal_was_sent(cluster: Cluster) -> None:
    """Its answer may wait for a process that is stopped: counted from then on, the lease would outlive itself."""
    first = cluster.start()
    await cluster.run(3)
    successor = cluster.start()
    await cluster.run(1)
    first.members.on_write = first.life.stop
    await cluster.run(LEASE_S)
    first.members.on_write = lambda: None
    first.life.go_on()
    await cluster.run(LEASE_S)
    assert successor.working
    assert cluster.worked_for == SHARDS


async def test_a_holder_whose_machine_was_suspended_trusts_no_lease_of_before(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock that also advances while a machine is suspended has jumped; the others, and all timers, have not."""
    holder, monotonic = cluster.start(), SystemClock().monotonic
    assert getattr(monotonic, "args", None) == (time.CLOCK_BOOTTIME,)
    monkeypatch.setattr(holder.clock, "monotonic", monotonic)
    await cluster.run(1)
    holder.leases.ensure_owned(0)
    monkeypatch.setattr(holder.clock, "monotonic", lambda: monotonic() + LEASE_S)
    with pytest.raises(LeaseLost):
        holder.leases.ensure_owned(0)
    assert not holder.working
    await cluster.run(LEASE_S)  # it renews, since nobody has revoked it meanwhile
    holder.leases.ensure_owned(0)


async def test_a_caller_that_finds_the_lease_ended_before_its_timer_sees_its_renewal(cluster: Cluster) -> None:
    """On a busy loop the answer is read before the timer has its turn, and what came before it has seen the gap."""
    replica = cluster.start()
    await cluster.run(2)

    def block() -> None:
        replica.members.on_write = lambda: None
        replica.clock.ahead_s += (
            LEASE_S * HOLDER_FRACTION - 0.5
        )  # past the old deadline, before the new one; no timer has run
        replica.life.stop()

    replica.members.on_write = block
    await cluster.run(1)
    assert not replica.leases.is_valid
    waiting = asyncio.ensure_future(replica.leases.changed.wait_until(lambda: replica.leases.is_valid))
    await asyncio.sleep(0)
    replica.life.go_on()
    await cluster.run(LEASE_S)
    assert replica.leases.is_valid
    assert waiting.done()


async def test_a_revoked_holder_finds_out_and_joins_as_somebody_new(cluster: Cluster) -> None:
    first = cluster.start()
    await cluster.run(3)
    successor = cluster.start()
    incarnation = first.leases.incarnation
    first.cut()
    await cluster.run(10)
    first.cut(down=False)
    with capture_logs() as logs:
        await cluster.run(8)
    assert "lease.revoked" in [line["event"] for line in logs]
    assert first.leases.incarnation != incarnation
    assert await successor.leases.revoke_if_expired(incarnation)
    assert not await successor.leases.revoke_if_expired(first.leases.incarnation)
    assert cluster.worked_for == SHARDS


async def test_eight_seconds_in_which_nobody_can_write_keep_the_owners(cluster: Cluster) -> None:
    """A bucket without a leader can still be read: that nobody renews there proves nothing of anybody."""
    replicas = [cluster.start() for _ in range(3)]
    await cluster.run(5)
    before = [set(replica.working) for replica in replicas]
    for replica in replicas:
        replica.members.writes_fail = replica.claims.writes_fail = True
        await cluster.run(0.3)  # no two try again at the same moment
    await cluster.run(8)
    assert cluster.worked_for == 0
    for replica in replicas:
        replica.members.writes_fail = replica.claims.writes_fail = False
    await cluster.run(3)
    assert [set(replica.working) for replica in replicas] == before


async def test_a_blind_observer_starts_its_observation_again(cluster: Cluster) -> None:
    """What it saw before it was blind proves nothing about the time since."""
    first = cluster.start()
    await cluster.run(3)
    observer = cluster.start()
    await cluster.run(1)
    observer.members.reads_fail = True
    first.members.down = True
    await cluster.run(10)
    observer.members.reads_fail = False
    await cluster.run(LEASE_S - 0.5)
    assert observer.working == set()
    assert not await observer.leases.revoke_if_expired(first.leases.incarnation)
    await cluster.run(3)
    assert observer.working == set(range(SHARDS))


async def test_a_renewal_whose_answer_got_lost_is_adopted(cluster: Cluster) -> None:
    alone = cluster.start()
    await cluster.run(3)
    incarnation = alone.leases.incarnation
    for _ in range(5):
        alone.members.deaf = True
        await cluster.run(1.5)
        alone.members.deaf = False
        await cluster.run(2.5)
    assert alone.leases.incarnation == incarnation
    assert alone.working == set(range(SHARDS))


async def test_a_claim_whose_answer_got_lost_is_adopted(cluster: Cluster) -> None:
    alone = cluster.start()
    alone.claims.deaf = True
    await cluster.run(5)
    assert alone.working == set()
    assert len(cluster.claims.entries) <= SHARDS
    alone.claims.deaf = False
    await cluster.run(3)
    assert alone.working == set(range(SHARDS))


async def test_a_claim_that_lands_late_is_given_back_where_the_shard_should_be_another_s(cluster: Cluster) -> None:
    first = cluster.start()
    first.claims.late_s = 3.0
    await cluster.run(1)
    second = cluster.start()
    second.claims.down = True
    await cluster.run(3)
    assert len(cluster.claims.entries) == SHARDS
    first.claims.late_s, second.claims.down = 0.0, False
    await cluster.run(10)
    assert cluster.worked_for == SHARDS
    assert second.working


async def test_one_who_drains_claims_nothing_and_hands_over_at_once(cluster: Cluster) -> None:
    first = cluster.start()
    await cluster.run(3)
    successor = cluster.start()
    await cluster.run(1)
    leaving = asyncio.get_running_loop().create_task(first.leave())
    await cluster.run(2.0)
    await leaving
    assert successor.working == set(range(SHARDS))
    assert first.leases.owned == set()


async def test_one_who_drains_does_not_take_the_shards_of_one_who_dies(cluster: Cluster) -> None:
    first, second = cluster.start(), cluster.start()
    await cluster.run(5)
    owned = set(first.working)
    await first.leases.drain()
    await second.kill()
    await cluster.run(10)
    assert first.working == owned


async def test_nobody_is_dead_who_renews(cluster: Cluster) -> None:
    first, second = cluster.start(), cluster.start()
    await cluster.run(30)
    assert not await first.leases.revoke_if_expired(second.leases.incarnation)
    assert not await first.leases.revoke_if_expired(first.leases.incarnation)
    assert not await first.leases.revoke_if_expired("never-was-1"), "it may have been purged, and live"
    await cluster.run(LEASE_S)
    assert await first.leases.revoke_if_expired("never-was-1")


async def test_who_renews_as_its_lease_is_looked_at_once_more_is_not_revoked(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would work on until its next renewal, beside whoever takes its shards."""
    first, second = cluster.start(), cluster.start()
    await cluster.run(10)
    name, get = second.leases.incarnation, first.members.get

    async def renewed(key: str) -> Entry | None:
        if key == name:
            known = cluster.members.entries[name]
            cluster.members.write(name, known.value, known.revision)
        return await get(key)

    monkeypatch.setattr(first.members, "get", renewed)
    second.life.stop()
    departed = first.leases.membership_epoch
    await cluster.run(2 * LEASE_S)
    assert first.leases.membership_epoch > departed
    assert cluster.members.entries[name].value


def purge(store: Store) -> None:
    """As an operator does: the stream is emptied, nothing marks that anything was there, the revision goes on."""
    store.entries.clear()


def overwrite(store: Store, value: bytes | None) -> None:
    """As an operator does by hand, key by key; None: deleted, which leaves a mark."""
    for known in list(store.entries.values()):
        store.write(known.key, value, known.revision)


@pytest.mark.parametrize(
    "meddle",
    [
        purge,
        partial(overwrite, value=None),
        *(partial(overwrite, value=text) for text in (b"x", b'{"owner":"\xff"}')),
    ],
    ids=["purged", "deleted", "overwritten", "no-text"],
)
async def test_claims_that_are_gone_are_put_back_and_change_no_owner(
    cluster: Cluster, meddle: Callable[[Store], None]
) -> None:
    replicas = [cluster.start() for _ in range(3)]
    await cluster.run(10)
    before = [set(replica.working) for replica in replicas]
    meddle(cluster.claims)
    late = cluster.start()
    await cluster.run(1.5)
    assert [set(replica.working) for replica in replicas] == before
    assert not late.working, "one that finds no claim waits for an owner that lives"
    assert len(cluster.claims.entries) == SHARDS
    await cluster.run(30)
    assert cluster.worked_for == SHARDS
    assert late.working


@pytest.mark.parametrize("value", [None, b"x", b'{"owner":"\xff"}'], ids=["deleted", "overwritten", "no-text"])
async def test_claims_that_are_gone_are_claimed_anew_where_no_owner_is_left(
    cluster: Cluster, value: bytes | None
) -> None:
    replica = cluster.start()
    await cluster.run(5)
    await replica.kill()
    overwrite(cluster.claims, value)
    successor = cluster.start()
    await cluster.run(3 * LEASE_S)
    assert successor.working == set(range(SHARDS))


async def test_a_claim_of_a_newer_version_is_nobody_elses(cluster: Cluster) -> None:
    """Not even where its owner is gone: only a newer replica can tell what it means."""
    newer = made_newer(b'{"owner":"r9-abc"}')
    cluster.claims.write("7", newer, 0)
    replica = cluster.start()
    with capture_logs() as logs:
        await cluster.run(3 * LEASE_S)
    assert replica.working == set(range(SHARDS)) - {7}
    assert cluster.claims.entries["7"].value == newer
    assert [line["shard"] for line in logs if line["event"] == "record.too_new"] == ["7"]
    cluster.claims.write("8", newer, cluster.claims.entries["8"].revision)
    await cluster.run(LEASE_S)
    assert 8 not in replica.working
    assert cluster.claims.entries["8"].value == newer


@pytest.mark.parametrize("draining", [True, False])
async def test_a_member_of_a_newer_version_counts_like_any_other(cluster: Cluster, *, draining: bool) -> None:
    replica = cluster.start()
    await cluster.run(10)
    member = made_newer(msgspec.json.encode({"instance": ["of another form"], "draining": draining}))
    for _ in range(16):  # it renews
        last = cluster.members.entries.get("r9-abc")
        cluster.members.write("r9-abc", member, last.revision if last else 0)
        await cluster.run(0.5)
    assert len(replica.leases.other_incarnations) == 1
    assert (len(replica.leases.surplus) + SHARDS - len(replica.working) > 0) is not draining


async def test_a_key_that_is_no_member_stops_nobody(cluster: Cluster) -> None:
    for name, text in (("stranger", b"x"), ("another", b'{"instance":"\xff"}')):
        cluster.members.write(name, text, 0)
    replica = cluster.start()
    await cluster.run(5)
    assert replica.working == set(range(SHARDS))


async def test_purged_members_cost_a_lease_and_no_shard_has_two_owners(cluster: Cluster) -> None:
    replicas = [cluster.start() for _ in range(3)]
    await cluster.run(10)
    before = {replica.leases.incarnation for replica in replicas}
    purge(cluster.members)
    await cluster.run(3 * LEASE_S)
    assert cluster.worked_for == SHARDS
    assert not before & {replica.leases.incarnation for replica in replicas}


@pytest.mark.parametrize("steps", range(0, 12, 2))
async def test_a_replica_stopped_at_the_moment_of_its_revocation_ends(steps: int) -> None:
    """A process that was frozen learns both as it goes on."""
    cluster = Cluster()
    replica = cluster.start()
    await cluster.run(2)
    revoked = asyncio.Event()
    member = replica.leases.incarnation
    cluster.members.write(member, None, cluster.members.entries[member].revision)
    replica.members.on_get = revoked.set
    await revoked.wait()
    for _ in range(steps):
        await asyncio.sleep(0)
    replica.task.cancel()
    await asyncio.wait([replica.task], timeout=60)
    assert replica.task.cancelled()
