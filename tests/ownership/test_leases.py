"""One owner for each partition, never two: replicas on one bucket, with everything that may go wrong between."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.bridge.leases import HOLDER_FRACTION, Tenure
from adapter.bridge.presence import GIVEN_S, LEFT_S
from adapter.contract.records import Lease
from adapter.errors import LeaseLost
from adapter.ports import BucketEntry
from adapter.tools.timing import SystemClock
from tests.fakes import FakeClock
from tests.newer import made_newer
from tests.ownership.cluster import LEASE_S, PARTITIONS, Cluster, Replica, Store

VIRTUAL_TIME = True

ALL = set(range(PARTITIONS))
HELD_S = HOLDER_FRACTION * LEASE_S
"""How long an owner acts after the start of a renewal."""
SETTLED_S = 15


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    made.stop()


async def settled(cluster: Cluster, count: int) -> list[Replica]:
    """So many replicas that have shared the partitions."""
    replicas = [cluster.start() for _ in range(count)]
    await cluster.run(SETTLED_S)
    assert (max(len(each.working) for each in replicas), cluster.worked_for) == (fair(count), PARTITIONS)
    return replicas


def fair(count: int) -> int:
    return math.ceil(PARTITIONS / count)


def owners(cluster: Cluster) -> list[set[int]]:
    return [replica.working for replica in cluster.replicas]


def lease(cluster: Cluster, number: int) -> Lease:
    value = cluster.store.entries[str(number)].value
    assert value is not None
    return msgspec.json.decode(value, type=Lease)


async def until(cluster: Cluster, holds: Callable[[], bool], within_s: float = 60.0) -> float:
    """Seconds until it holds."""
    began = asyncio.get_running_loop().time()
    while not holds():
        await cluster.run(0.02)
        assert asyncio.get_running_loop().time() - began < within_s
    return asyncio.get_running_loop().time() - began


# sharing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [1, 2, 3, 5])
async def test_those_who_start_together_share_what_nobody_has(cluster: Cluster, together: int) -> None:
    replicas = await settled(cluster, together)
    assert cluster.worked_for == PARTITIONS
    assert sum(len(replica.taken) for replica in replicas) <= PARTITIONS + together, "few were taken to be given away"


@pytest.mark.parametrize("before", [1, 2, 3, 4])
async def test_one_who_joins_gets_exactly_what_the_others_have_too_much(cluster: Cluster, before: int) -> None:
    replicas = await settled(cluster, before)
    owned = owners(cluster)
    surplus = sum(max(0, len(each) - fair(before + 1)) for each in owned)
    joined = cluster.start()
    for replica in replicas:
        replica.taken.clear()
    assert await until(cluster, lambda: len(joined.working) == surplus) < 3.0
    await cluster.run(SETTLED_S)
    assert (len(joined.taken), len(joined.working)) == (surplus, surplus)
    assert [replica.taken for replica in replicas] == [[]] * before
    assert all(replica.working <= had for replica, had in zip(replicas, owned, strict=True))
    assert cluster.worked_for == PARTITIONS


@pytest.mark.parametrize("alive", [2, 3, 5])
async def test_only_the_partitions_of_one_who_dies_move_and_each_once(cluster: Cluster, alive: int) -> None:
    replicas = await settled(cluster, alive)
    dead, *others = replicas
    lost = set(dead.owned)
    for replica in replicas:
        replica.taken.clear()
    await dead.kill()
    await cluster.run(SETTLED_S)
    assert sorted(number for replica in others for number in replica.taken) == sorted(lost)
    assert max(len(replica.working) for replica in others) <= fair(alive - 1)
    assert cluster.worked_for == PARTITIONS


async def test_one_who_comes_back_gets_its_share_again(cluster: Cluster) -> None:
    first, second, third = await settled(cluster, 3)
    await third.kill()
    await cluster.run(SETTLED_S)
    first.taken.clear()
    second.taken.clear()
    again = cluster.start("r2")
    await cluster.run(SETTLED_S)
    assert again.leases.replica != third.leases.replica
    assert (first.taken, second.taken, len(again.taken)) == ([], [], 10)
    assert cluster.worked_for == PARTITIONS


async def test_one_who_cannot_write_does_not_count_and_causes_no_move(cluster: Cluster) -> None:
    """Its account is full, or lacks the permission: it hears the others, and they hear it."""
    await settled(cluster, 2)
    before = owners(cluster)
    sick = cluster.start()
    sick.line.writes_fail = True
    await cluster.run(30)
    assert owners(cluster) == [*before, set()]
    assert set(cluster.replicas[0].presence.others()) == {replica.leases.replica for replica in cluster.replicas[1:]}
    sick.line.writes_fail = False
    await cluster.run(SETTLED_S)
    assert len(sick.working) == 10
    assert cluster.worked_for == PARTITIONS


async def test_an_owner_who_cannot_write_any_more_loses_what_it_has_and_gets_no_more(cluster: Cluster) -> None:
    first, second = await settled(cluster, 2)
    first.line.writes_fail = True
    await cluster.run(SETTLED_S)
    assert (first.owned, second.working) == (set(), ALL)
    second.taken.clear()
    await cluster.run(SETTLED_S)
    assert (second.taken, second.working) == ([], ALL)


async def test_what_is_told_decides_about_shares_alone(cluster: Cluster) -> None:
    """Two who do not hear each other both keep what they have, although each believes to be alone."""
    first, second = await settled(cluster, 2)
    before = owners(cluster)
    first.line.mute = second.line.mute = True
    first.taken.clear()
    second.taken.clear()
    await cluster.run(30)
    assert owners(cluster) == before
    assert (first.taken, second.taken) == ([], [])


# giving --------------------------------------------------------------------------------------------------


async def test_what_is_released_is_taken_at_once(cluster: Cluster) -> None:
    first, second = await settled(cluster, 2)
    leaving = asyncio.create_task(first.leave())
    await cluster.run(0.3)
    assert leaving.done()
    assert second.working == ALL
    assert first.metrics.value("lease_changes_total", reason="released") == PARTITIONS / 2
    assert second.metrics.value("lease_changes_total", reason="taken") == 0


@pytest.mark.parametrize("at_s", [0.0, 0.1, 0.2, 0.3, 0.4])
async def test_a_release_is_heard_and_waits_for_no_look(cluster: Cluster, at_s: float) -> None:
    first, second = await settled(cluster, 2)
    first.leases.draining = True
    await cluster.run(1.1 + at_s)
    number = max(first.owned)
    await first.leases.release(number)
    assert await until(cluster, lambda: number in second.owned) < 0.1


async def test_one_who_drains_takes_nothing_and_does_not_count(cluster: Cluster) -> None:
    first, second = await settled(cluster, 2)
    before = set(first.owned)
    first.leases.draining = True
    await second.kill()
    await cluster.run(10)
    assert first.working == before
    third = cluster.start()
    await cluster.run(10)
    assert (first.working, third.working) == (before, ALL - before)
    await first.leave()
    await cluster.run(1)
    assert third.working == ALL


async def test_what_is_taken_as_a_drain_begins_is_given_away_again(cluster: Cluster) -> None:
    """The write was on its way, and nobody would work for the partition until its lease is over."""
    first, second = await settled(cluster, 2)
    await second.kill()
    first.line.late_s = 0.9
    await until(cluster, first.leases.taking.locked)
    leaving = asyncio.ensure_future(first.leave())
    await cluster.run(3)
    assert leaving.done()
    assert first.metrics.value("lease_changes_total", reason="taken") > 0
    assert {lease(cluster, number).owner for number in ALL} <= {"", second.leases.replica}


async def test_who_gave_a_partition_away_takes_it_back_last(cluster: Cluster) -> None:
    """Who counts and cannot take would else get it again and again."""
    first, second = await settled(cluster, 2)
    second.line.reads_fail = True
    number = max(first.owned)
    await first.leases.release(number)
    assert await until(cluster, lambda: number in first.owned) == pytest.approx(GIVEN_S, abs=0.6)


async def test_what_is_free_for_a_while_is_taken_also_by_who_has_enough(cluster: Cluster) -> None:
    first, second = await settled(cluster, 2)
    number = max(first.owned)
    await first.leases.release(number)
    assert await until(cluster, lambda: number in second.owned) == pytest.approx(LEFT_S, abs=0.6)
    await cluster.run(SETTLED_S)
    assert [len(each) for each in owners(cluster)] == [PARTITIONS / 2, PARTITIONS / 2]


async def test_who_is_alone_takes_back_at_once_what_it_gave_away(cluster: Cluster) -> None:
    alone = (await settled(cluster, 1))[0]
    await alone.leases.release(7)
    await cluster.run(1)
    assert alone.working == ALL


async def test_a_key_keeps_who_may_still_poll_until_nobody_may(cluster: Cluster) -> None:
    first, second = await settled(cluster, 2)
    names = first.leases.replica, second.leases.replica
    number = max(first.owned)
    first.leases.draining = True
    await first.leases.release(number)
    await until(cluster, lambda: number in second.owned)
    await cluster.run(3)  # it was renewed
    assert lease(cluster, number) == Lease(owner=names[1], former=(names[0],))
    first.leases.draining, second.leases.draining = False, True
    await cluster.run(1.1)
    tenure = second.leases.owned.get(number)
    assert tenure is not None
    assert tenure.former == (names[0],)
    await second.leases.release(number)
    assert lease(cluster, number) == Lease(former=names)
    await until(cluster, lambda: number in first.owned)
    tenure = first.leases.owned.get(number)
    assert tenure is not None
    tenure.former = (names[1],)
    await cluster.run(2)
    assert lease(cluster, number) == Lease(owner=names[0], former=(names[1],))


async def test_who_has_nothing_open_any_more_leaves_the_list_of_a_key_that_nobody_took(cluster: Cluster) -> None:
    first, second = await settled(cluster, 2)
    names = first.leases.replica, second.leases.replica
    first.leases.draining = second.leases.draining = True
    number = max(first.owned)
    await first.leases.release(number)
    await second.leases.clear_former(number)
    assert lease(cluster, number) == Lease(former=names[:1])
    await first.leases.clear_former(number)
    assert lease(cluster, number) == Lease()
    number = max(first.owned)
    await first.leases.release(number)
    second.leases.draining = False
    await until(cluster, lambda: number in second.owned)
    await first.leases.clear_former(number)
    assert lease(cluster, number) == Lease(owner=names[1], former=names[:1]), "who has it asks"


# dying ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("later_s", [0.0, 0.27, 0.5])
async def test_a_dead_replica_is_replaced_in_six_seconds_and_not_before_its_lease_ends(
    cluster: Cluster, later_s: float
) -> None:
    first, second = await settled(cluster, 2)
    await cluster.run(later_s)
    rest = set(second.owned)
    await first.kill()
    await cluster.run(HELD_S - 1.0)
    assert second.working == rest
    await cluster.run(6.0 - HELD_S + 1.0)
    assert second.working == ALL
    assert second.metrics.value("lease_changes_total", reason="taken") == len(ALL - rest)


async def test_a_dead_replica_is_replaced_also_where_each_write_takes_long(cluster: Cluster) -> None:
    replicas = await settled(cluster, 3)
    for replica in replicas:
        replica.line.late_s = 0.9
    await cluster.run(5)
    await replicas[0].kill()
    await cluster.run(8)
    assert cluster.worked_for == PARTITIONS


async def test_a_dead_replica_is_replaced_also_where_every_other_renewal_fails(cluster: Cluster) -> None:
    replicas = await settled(cluster, 3)
    for replica in replicas:
        replica.line.unsteady = True
    before = [replica.owned for replica in replicas]
    await cluster.run(60)
    assert [replica.owned for replica in replicas] == before
    await replicas[0].kill()
    await cluster.run(22)
    assert cluster.worked_for == PARTITIONS


async def test_a_replica_that_cannot_renew_stops_before_another_takes_over(cluster: Cluster) -> None:
    first, second = await settled(cluster, 2)
    tenure = first.leases.owned[max(first.owned)]
    first.cut()
    with capture_logs() as logs:
        await cluster.run(HELD_S + 0.1)
    assert first.working == set()
    assert first.owned
    assert tenure.is_paused
    with pytest.raises(LeaseLost):
        tenure.check()
    assert "lease.paused" in [line["event"] for line in logs]
    waiting = asyncio.ensure_future(tenure.valid())
    await cluster.run(4)
    assert second.working == ALL
    assert not waiting.done(), "it does not know"
    first.cut(down=False)
    with capture_logs() as logs:
        await cluster.run(SETTLED_S)
    assert "lease.lost" in [line["event"] for line in logs]
    with pytest.raises(LeaseLost):
        await waiting
    assert [len(each) for each in owners(cluster)] == [PARTITIONS / 2, PARTITIONS / 2]


async def test_who_waits_since_a_pause_that_nobody_has_announced_goes_on_with_the_renewal() -> None:
    """As after a moment in which the process stood still: the answer to the renewal is read first."""
    clock, waiting = FakeClock(), asyncio.Event()

    async def tick() -> None:
        waiting.set()

    tenure = Tenure(0, (), clock, tick)
    tenure.renewed(clock.monotonic() + 1, 1)
    await asyncio.sleep(1.1)
    task = asyncio.create_task(tenure.valid())
    await asyncio.sleep(0)
    assert not waiting.is_set()
    tenure.renewed(clock.monotonic() + 1, 2)
    await asyncio.wait_for(task, 0.1)


async def test_a_pause_is_told_at_once_and_so_is_its_end(cluster: Cluster) -> None:
    """Although the renewal hangs: polls are cut, and whoever waits goes on."""
    (alone,) = await settled(cluster, 1)
    tenure = alone.leases.owned[7]
    alone.line.writes_fail = True
    told = asyncio.ensure_future(tenure.changed.wait_until(lambda: tenure.is_paused))
    await until(cluster, told.done)
    assert tenure.until <= alone.clock.monotonic() <= tenure.until + 0.05
    waiting = asyncio.ensure_future(tenure.valid())
    await cluster.run(2)
    assert not waiting.done()
    alone.line.writes_fail = False
    await cluster.run(1.2)
    assert (waiting.done(), tenure.is_valid, alone.leases.owned[7] is tenure) == (True, True, True)


async def test_a_lease_counts_from_the_time_at_which_its_renewal_was_sent(cluster: Cluster) -> None:
    """Its answer may wait for a process that is stopped: counted from then on, the lease would outlive itself."""
    first, second = await settled(cluster, 2)
    first.line.on_write = first.life.stop
    await cluster.run(LEASE_S + 2.0)
    first.line.on_write = lambda: None
    first.life.go_on()
    await cluster.run(LEASE_S)
    assert second.working
    assert cluster.worked_for == PARTITIONS


@pytest.mark.parametrize("stopped_s", [1.0, 3.0, 3.6, 3.9])
@pytest.mark.parametrize("at_s", [0.0, 0.3, 0.6])
async def test_one_who_is_stopped_for_less_than_a_lease_keeps_its_partitions(
    cluster: Cluster, stopped_s: float, at_s: float
) -> None:
    """All of them, unless the last renewal was a second before."""
    first, _ = await settled(cluster, 2)
    await cluster.run(at_s)
    before = owners(cluster)
    first.life.stop()
    await cluster.run(stopped_s)
    first.life.go_on()
    await cluster.run(LEASE_S)
    assert cluster.worked_for == PARTITIONS
    if stopped_s < LEASE_S - 1.0:
        assert owners(cluster) == before
    await cluster.run(SETTLED_S)
    assert {len(each) for each in owners(cluster)} == {PARTITIONS // 2}


@pytest.mark.parametrize("stopped_s", [4.3, 6.0, 30.0])
async def test_one_who_is_stopped_for_longer_loses_them_and_finds_out(cluster: Cluster, stopped_s: float) -> None:
    first, second = await settled(cluster, 2)
    tenures = [*first.leases.owned.values()]
    first.life.stop()
    await cluster.run(stopped_s)
    first.life.go_on()
    await cluster.run(0.5 + max(0.0, 6.0 - stopped_s))
    assert all(tenure.is_over for tenure in tenures)
    await cluster.run(SETTLED_S)
    assert {len(each) for each in owners(cluster)} == {PARTITIONS // 2}
    assert first.metrics.value("lease_changes_total", reason="lost") == len(tenures)
    assert second.metrics.value("lease_changes_total", reason="taken") == len(tenures)


async def test_a_holder_whose_machine_was_suspended_trusts_no_lease_of_before(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock that also advances while a machine is suspended has jumped; the others, and all timers, have not."""
    holder, monotonic = cluster.start(), SystemClock().monotonic
    assert getattr(monotonic, "args", None) == (time.CLOCK_BOOTTIME,)
    await cluster.run(1)
    tenure = holder.leases.owned[0]
    tenure.check()
    holder.clock.ahead_s += LEASE_S
    with pytest.raises(LeaseLost):
        tenure.check()
    assert not holder.working
    await cluster.run(LEASE_S)  # it renews, since nobody has taken it meanwhile
    tenure.check()


async def test_an_observer_whose_machine_was_suspended_has_not_looked_on(cluster: Cluster) -> None:
    """Its clock has jumped over the renewals of others."""
    first, second = await settled(cluster, 2)
    await cluster.run(0.7)
    second.taken.clear()
    second.clock.ahead_s += 10 * LEASE_S
    await cluster.run(2 * LEASE_S)
    assert not {*second.taken} & first.working
    assert [len(each) for each in owners(cluster)] == [PARTITIONS / 2, PARTITIONS / 2]


# what the bucket does ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["down", "writes_fail"])
@pytest.mark.parametrize("outage_s", [2.0, 8.0, 30.0])
async def test_an_outage_of_the_bucket_keeps_the_owners(cluster: Cluster, fault: str, outage_s: float) -> None:
    """That nobody renews where nobody can proves nothing of anybody. A bucket without a leader may still be read."""
    replicas = await settled(cluster, 3)
    before = owners(cluster)
    for replica in replicas:
        replica.taken.clear()
        setattr(replica.line, fault, True)
        await cluster.run(0.3)  # no two try again at the same moment
    await cluster.run(outage_s)
    assert outage_s < LEASE_S or cluster.worked_for == 0
    for replica in replicas:
        setattr(replica.line, fault, False)
    await cluster.run(3)
    assert owners(cluster) == before
    assert [replica.taken for replica in replicas] == [[], [], []]


@pytest.mark.parametrize("blind_s", [1.0, 10.0])
async def test_an_observer_to_whom_no_leader_answers_for_a_second_begins_anew(
    cluster: Cluster, blind_s: float
) -> None:
    """What it saw before proves nothing about the time since: owners who could not renew come first."""
    first, second = await settled(cluster, 2)
    rest = set(second.owned)
    await first.kill()
    await cluster.run(2.0)
    second.line.reads_fail = True
    await cluster.run(blind_s)
    second.line.reads_fail = False
    assert await until(cluster, lambda: second.owned != rest) >= LEASE_S


async def test_an_observer_to_whom_the_leader_answers_slowly_goes_on_counting(cluster: Cluster) -> None:
    first, second = await settled(cluster, 2)
    read = second.line.get_all

    async def slow(keys: list[str]) -> list[BucketEntry]:
        found = await read(keys)
        await asyncio.sleep(0.9)
        return found

    second.line.get_all = slow  # type: ignore[method-assign,assignment]
    await cluster.run(3)
    await first.kill()
    assert await until(cluster, lambda: second.working == ALL) < 2 * LEASE_S


async def test_an_observer_that_reads_what_is_old_takes_nothing(cluster: Cluster) -> None:
    """Its revision is, too."""
    _, second = await settled(cluster, 2)
    before, known = owners(cluster), [*cluster.store.entries.values()]
    second.taken.clear()

    async def stale(keys: list[str]) -> list[BucketEntry]:
        await asyncio.sleep(0.01)
        return known

    read, second.line.get_all = second.line.get_all, stale  # type: ignore[method-assign,assignment]
    await cluster.run(5 * LEASE_S)
    assert owners(cluster) == before
    assert second.taken == []
    second.line.get_all = read  # type: ignore[method-assign]
    await cluster.run(SETTLED_S)
    assert owners(cluster) == before


async def test_a_renewal_whose_answer_was_lost_is_known_again(cluster: Cluster) -> None:
    first, _ = await settled(cluster, 2)
    before = owners(cluster)
    for _ in range(5):
        first.line.deaf = True
        await cluster.run(1.5)
        first.line.deaf = False
        await cluster.run(2.5)
    assert owners(cluster) == before
    assert first.metrics.value("lease_changes_total", reason="lost") == 0


async def test_a_taking_whose_answer_was_lost_is_known_again(cluster: Cluster) -> None:
    alone = cluster.start()
    await cluster.run(0.2)
    alone.line.on_write = lambda: setattr(alone.line, "deaf", True)
    await cluster.run(2)
    assert {lease(cluster, number).owner for number in ALL} == {alone.leases.replica}
    assert alone.working == set()
    alone.line.deaf, alone.line.on_write = False, lambda: None
    await cluster.run(1.5)
    assert alone.working == ALL


async def test_a_release_whose_answer_was_lost_is_one(cluster: Cluster) -> None:
    first, second = await settled(cluster, 2)
    number = max(first.owned)
    first.leases.draining = True
    await cluster.run(1.1)
    first.line.deaf = True
    releasing = asyncio.ensure_future(first.leases.release(number))
    await cluster.run(1.0)
    assert number in second.working
    first.line.deaf = False
    await cluster.run(2)
    await releasing
    assert number in second.working
    assert lease(cluster, number).former == (first.leases.replica,)


async def test_a_release_that_never_arrives_costs_a_lease(cluster: Cluster) -> None:
    first, second = await settled(cluster, 2)
    number = max(first.owned)
    first.line.writes_fail = True
    releasing = asyncio.ensure_future(first.leases.release(number))
    await cluster.run(LEASE_S + 1.5)
    await releasing
    assert number in second.working
    first.line.writes_fail = False
    await cluster.run(SETTLED_S)
    assert [len(each) for each in owners(cluster)] == [PARTITIONS / 2, PARTITIONS / 2]


async def test_a_renewal_that_lands_late_takes_nothing_from_who_has_it(cluster: Cluster) -> None:
    first, second = await settled(cluster, 2)
    first.line.late_s = LEASE_S + 0.5
    await cluster.run(LEASE_S + 1.5)
    assert second.working == ALL
    await cluster.run(5)
    assert second.working == ALL
    first.line.late_s = 0.0
    await cluster.run(SETTLED_S)
    assert [len(each) for each in owners(cluster)] == [PARTITIONS / 2, PARTITIONS / 2]


async def test_a_release_that_lands_late_frees_nothing_that_was_taken_again(cluster: Cluster) -> None:
    alone = (await settled(cluster, 1))[0]
    alone.line.late_s = 3.0
    releasing = asyncio.ensure_future(alone.leases.release(7))
    await cluster.run(1.5)
    alone.line.late_s = 0.0
    with capture_logs() as logs:
        await cluster.run(10)
    await releasing
    assert "lease.lost" not in [line["event"] for line in logs]
    assert alone.working == ALL


async def test_a_taking_that_lands_late_is_worked_for_or_given_away(cluster: Cluster) -> None:
    first = cluster.start()
    await cluster.run(0.2)
    first.line.late_s = 3.0
    await cluster.run(0.8)
    second = cluster.start()
    second.line.down = True
    await cluster.run(3)
    assert {lease(cluster, number).owner for number in ALL} == {first.leases.replica}
    first.line.late_s, second.line.down = 0.0, False
    await cluster.run(SETTLED_S)
    assert [len(each) for each in owners(cluster)] == [PARTITIONS / 2, PARTITIONS / 2]


@pytest.mark.parametrize("count", [1, 3])
async def test_writes_are_one_a_second_for_each_partition(cluster: Cluster, count: int) -> None:
    """However many replicas there are, and however many bots."""
    await settled(cluster, count)
    before = cluster.store.writes
    await cluster.run(60)
    assert cluster.store.writes - before <= PARTITIONS * 61


async def test_who_owns_nothing_shows_that_it_can_write_by_a_key_that_goes(cluster: Cluster) -> None:
    (busy,) = await settled(cluster, 1)
    idle = cluster.start()
    busy.leases.draining = idle.leases.draining = True  # nothing is given or taken
    await cluster.run(10)
    assert (idle.owned, idle.leases.is_working) == (set(), True)
    keys = [cluster.store.entries[f"alive-{replica.leases.replica}"] for replica in cluster.replicas]
    assert keys[0].revision < 10, "who owns something need not show it"
    assert keys[1].revision > cluster.store.revision - 2 * PARTITIONS
    assert {entry.value for entry in keys} == {b""}


async def test_partitions_that_nobody_can_take_are_known_to_have_no_owner(cluster: Cluster) -> None:
    """Its alert must not need a bucket that can be written."""
    alone = cluster.start()
    alone.line.writes_fail = True
    await cluster.run(5)
    assert alone.leases.ownerless == ALL
    assert alone.leases.last_error == "bus_timeout"
    alone.line.writes_fail = False
    await cluster.run(2)
    assert (alone.leases.ownerless, alone.working) == (set(), ALL)


async def test_partitions_of_the_dead_have_no_owner_until_they_are_taken(cluster: Cluster) -> None:
    first, second = await settled(cluster, 2)
    theirs = set(first.owned)
    second.leases.draining = True
    await first.kill()
    await cluster.run(LEASE_S + 1)
    assert second.leases.ownerless == theirs


# keys that others meddle with ----------------------------------------------------------------------------


def purge(store: Store, numbers: set[int]) -> None:
    """As an operator does: nothing marks that anything was there, the revision goes on."""
    for number in numbers:
        del store.entries[str(number)]


def overwrite(store: Store, numbers: set[int], value: bytes | None) -> None:
    """By hand; None: deleted, which leaves a mark."""
    for number in numbers:
        store.write(str(number), value, None)


GONE: dict[str, Callable[[Store, set[int]], None]] = {
    "purged": purge,
    "deleted": partial(overwrite, value=None),
}
WRITTEN: dict[str, Callable[[Store, set[int]], None]] = {
    "nonsense": partial(overwrite, value=b"x"),
    "no-text": partial(overwrite, value=b'{"owner":"\xff"}'),
    "stranger": partial(overwrite, value=b'{"owner":"stranger-1"}'),
    "newer": partial(overwrite, value=made_newer(b'{"owner":"stranger-1"}')),
}


@pytest.mark.parametrize("numbers", [{7}, ALL], ids=["one", "all"])
@pytest.mark.parametrize("what", GONE)
@pytest.mark.parametrize("later_s", [0.0, 0.3, 0.6])
async def test_keys_that_are_gone_are_put_back_and_change_no_owner(
    cluster: Cluster, what: str, numbers: set[int], later_s: float
) -> None:
    await settled(cluster, 3)
    await cluster.run(later_s)
    before = owners(cluster)
    GONE[what](cluster.store, numbers)
    with capture_logs() as logs:
        await cluster.run(2.5)
    assert owners(cluster) == before
    assert {lease(cluster, number).owner for number in numbers} <= {
        replica.leases.replica for replica in cluster.replicas
    }
    assert len([line for line in logs if line["event"] == "lease.missing"]) >= len(numbers)
    await cluster.run(SETTLED_S)
    assert owners(cluster) == before


async def test_one_who_comes_as_keys_were_deleted_waits_for_owners_that_live(cluster: Cluster) -> None:
    await settled(cluster, 2)
    before = owners(cluster)
    GONE["deleted"](cluster.store, ALL)
    late = cluster.start()
    await cluster.run(1.0)
    assert [replica.working <= had for replica, had in zip(cluster.replicas, before, strict=False)] == [True, True]
    await cluster.run(SETTLED_S)
    assert len(late.working) == 10
    assert cluster.worked_for == PARTITIONS


@pytest.mark.parametrize("what", [*GONE, "nonsense", "no-text", "stranger"])
async def test_keys_that_are_gone_or_strange_are_taken_where_no_owner_is_left(cluster: Cluster, what: str) -> None:
    first, second = await settled(cluster, 2)
    theirs = set(first.owned)
    await first.kill()
    (GONE | WRITTEN)[what](cluster.store, theirs)
    await cluster.run(2 * LEASE_S)
    assert second.working == ALL
    third = cluster.start()
    await cluster.run(SETTLED_S)
    assert third.working


@pytest.mark.parametrize("what", WRITTEN)
async def test_a_key_that_somebody_else_has_written_is_lost_at_once_and_free_after_a_lease(
    cluster: Cluster, what: str
) -> None:
    first, second = await settled(cluster, 2)
    number = max(first.owned)
    tenure = first.leases.owned[number]
    WRITTEN[what](cluster.store, {number})
    await cluster.run(1.1)
    assert tenure.is_over
    assert number not in first.owned
    await cluster.run(LEASE_S - 1.2)
    assert number not in first.owned | second.owned
    await cluster.run(1.2 + LEFT_S)
    assert cluster.worked_for == PARTITIONS


@pytest.mark.parametrize("steps", range(0, 12, 3))
async def test_a_replica_stopped_at_the_moment_at_which_it_loses_a_key_ends(steps: int) -> None:
    """A process that was frozen learns both as it goes on."""
    cluster = Cluster()
    replica = cluster.start()
    await cluster.run(2)
    lost = asyncio.Event()
    WRITTEN["stranger"](cluster.store, {0})
    replica.line.on_get = lost.set
    await lost.wait()
    for _ in range(steps):
        await asyncio.sleep(0)
    replica.task.cancel()
    await asyncio.wait([replica.task], timeout=60)
    assert replica.task.cancelled()
