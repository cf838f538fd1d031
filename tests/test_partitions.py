"""What runs in a replica: partitions that begin, pause and end, their pollers, and what is told of ten thousand."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from adapter.bridge.leases import Tenure
from adapter.bridge.partition import Partition
from adapter.bridge.partitions import CUT_S, RESTART_S
from adapter.bridge.poller import ANSWER_GRACE_S, BotPoller, State
from adapter.bridge.presence import QUERY_TIMEOUT_S, Replicas
from adapter.contract.names import to_subject_token
from adapter.contract.records import Binding
from adapter.errors import Temporary
from adapter.replica.health import observe
from tests.fakes import Bench, batch, settle
from tests.inbound.pollers import raw
from tests.inbound.sharing import HOLD_S, Sharing, World, sandbox_of
from tests.newer import made_newer

VIRTUAL_TIME = True

BOTS = 10_000
STATES = [state for state in State if state is not State.ENDED]
B1, B2, B3 = "b1@im.bot", "b2@im.bot", "b3@im.bot"
MOVES = 31
SANDBOX = sandbox_of(MOVES)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    await made.close()


async def polling(world: World, **changes: int) -> Sharing:
    """A replica that polls one bot."""
    await world.bench.bind(SANDBOX, B1)
    replica = world.start("r0", **changes)
    await world.until(lambda: replica.polls(B1))
    await asyncio.sleep(1)
    return replica


def polled(world: World) -> list[str]:
    return [each.bot for each in world.phone.begun]


# beginning -----------------------------------------------------------------------------------------------


async def test_a_replica_that_starts_works_for_all_that_nobody_has_and_polls_their_bots(world: World) -> None:
    for number in range(20):
        await world.bench.bind(f"s{number}", f"b{number}@im.bot", f"u{number}@im.wechat")
    replica = world.start("r0")
    await world.until(lambda: len(world.phone.open) == 20, within_s=1.5)
    assert replica.consuming == {*replica.partitions.working} == set(range(32))


async def test_nothing_begins_before_the_bindings_were_read(world: World) -> None:
    await world.bench.bind(SANDBOX, B1)
    replica = world.start("r0")
    replica.bench.bindings.is_loaded = False
    await asyncio.sleep(5)
    assert (len(replica.owned), replica.consuming, polled(world)) == (32, set(), [])
    replica.bench.bindings.is_loaded = True
    replica.bench.bindings.changed.notify_all()
    await asyncio.sleep(1)
    assert replica.polls(B1)


async def test_a_partition_begins_with_bindings_as_new_as_its_taking(world: World) -> None:
    """Its new owner hears a second late of what was bound and unbound: nobody polls for one who is gone."""
    await polling(world)
    world.phone.answer(B1)
    second = world.start("r1")
    world.bench.bindings_bucket.followers.pop()
    await world.bench.bindings.remove(B1)
    await world.bench.bind(SANDBOX, B2, "u2@im.wechat")
    await world.until(lambda: MOVES in second.consuming)
    await world.until(lambda: second.polls(B2), within_s=HOLD_S + 1)
    assert B1 not in {each.bot for each in world.phone.begun if each.replica == "r1"}


async def test_one_who_starts_after_the_last_mark_of_a_deletion_is_gone_begins(world: World) -> None:
    """The bucket's last sequence is above that of any key."""
    bench = world.bench
    await bench.bind(SANDBOX, B2, "u2@im.wechat")
    await bench.bind(SANDBOX, B1)
    await bench.bindings.remove(B1)
    bench.bindings_bucket.expire(to_subject_token(B1))
    replica = world.start("r0")
    await asyncio.sleep(1)
    assert replica.consuming == set(range(32))
    assert polled(world) == [B2]


@pytest.mark.parametrize("what", ["bindings_bucket", "person_bucket"])
async def test_what_cannot_be_read_delays_the_beginning_of_its_partition(world: World, what: str) -> None:
    bucket = getattr(world.bench, what)
    read = {"bindings_bucket": "read_since", "person_bucket": "get_all"}[what]
    await world.bench.bind(SANDBOX, B1)
    works = getattr(bucket, read)

    async def fails(*_: object) -> None:
        raise Temporary("bus_down")

    setattr(bucket, read, fails)
    replica = world.start("r0")
    await asyncio.sleep(8)
    assert MOVES in replica.owned
    assert (MOVES in replica.consuming, polled(world)) == (False, [])
    setattr(bucket, read, works)
    await world.until(lambda: replica.polls(B1), within_s=6)
    assert MOVES in replica.consuming


async def test_one_that_is_lost_before_it_has_begun_never_begins(world: World) -> None:
    await world.bench.bind(SANDBOX, B1)
    bucket, held = world.bench.bindings_bucket, asyncio.Event()
    read = bucket.read_since

    async def slow(revision: int) -> Any:
        await held.wait()
        return await read(revision)

    bucket.read_since = slow  # type: ignore[method-assign]
    replica = world.start("r0")
    await world.until(lambda: MOVES in replica.owned)
    replica.leases.draining = True
    world.keys.store.write(str(MOVES), b'{"owner":"stranger"}', None)
    await world.until(lambda: MOVES not in replica.owned, within_s=2)
    held.set()
    await asyncio.sleep(3)
    assert replica.consuming == set(range(32)) - {MOVES}
    assert polled(world) == []


# what should run -----------------------------------------------------------------------------------------


async def test_a_bot_is_polled_from_its_bind_to_its_unbind(world: World) -> None:
    replica = await polling(world)
    await world.bench.bind("s7", B2, "u2@im.wechat")
    assert await world.until(lambda: replica.polls(B2)) < 0.1
    await world.bench.bindings.remove(B1)
    assert await world.until(lambda: world.phone.cut == [B1]) < ANSWER_GRACE_S + 0.1
    await asyncio.sleep(1)
    assert [*replica.partitions.pollers] == [B2]


async def test_a_bot_whose_binding_a_newer_version_wrote_is_polled_no_more(world: World) -> None:
    replica = await polling(world)
    bucket, key = world.bench.bindings_bucket, to_subject_token(B1)
    entry = await bucket.get(key)
    assert entry is not None
    assert entry.value is not None
    await bucket.update(key, made_newer(entry.value, token={"of": "another form"}), entry.revision)
    await asyncio.sleep(1)
    assert [*replica.partitions.pollers] == []


async def test_a_bot_that_found_no_room_is_polled_once_there_is_some(world: World) -> None:
    replica = await polling(world, capacity=1)
    for bot in (B2, B3):
        await world.bench.bind(SANDBOX, bot, f"u{bot}")
    await asyncio.sleep(1)
    assert [*world.phone.open] == [B1]
    await world.bench.bindings.remove(B1)
    await world.bench.bindings.remove(B2)
    await asyncio.sleep(1)
    assert [*replica.partitions.pollers] == [*world.phone.open] == [B3]


@pytest.mark.parametrize(
    ("fields", "is_cut"),
    [({"token": "new"}, True), ({"base_url": "https://ilinkai.wechat.com"}, True), ({"reason": "words"}, False)],
    ids=str,
)
async def test_who_is_polled_in_another_way_from_now_on_waits_for_no_poll(
    world: World, fields: dict[str, str], *, is_cut: bool
) -> None:
    replica = await polling(world)
    if "token" in fields:
        fields = {"token": world.bench.sealer.seal(B1, fields["token"])}
    await world.bench.bindings.update(B1, lambda now: replace(now, **fields))
    await asyncio.sleep(1)
    assert (world.phone.cut, replica.polls(B1)) == ([B1] if is_cut else [], True)


async def test_a_poller_that_crashes_is_started_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run, crashes = BotPoller.run, 2

    async def crash(poller: BotPoller) -> None:
        nonlocal crashes
        if crashes:
            crashes -= 1
            raise ValueError("a bug")
        await run(poller)

    monkeypatch.setattr(BotPoller, "run", crash)
    await world.bench.bind(SANDBOX, B1)
    with capture_logs() as logs:
        replica = world.start("r0")
        assert await world.until(lambda: replica.polls(B1)) < 2 * RESTART_S + 1
    assert [line["bot"] for line in logs if line["event"] == "poller.crashed"] == [B1, B1]


async def test_a_partition_that_cannot_be_worked_fails_the_probe(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(partition: Partition) -> None:
        if partition.number == MOVES:
            raise ValueError("a bug")
        await consume(partition)

    await world.bench.bind(SANDBOX, B1)
    replica = world.start("r0")
    consume = replica.consume
    monkeypatch.setattr(replica, "consume", crash)
    replica.working.cancel()
    replica.working = asyncio.create_task(replica.partitions.run(crash))
    await asyncio.sleep(2)
    assert world.failed == [f"partition.{MOVES}: crashed: ExceptionGroup"]
    world.failed.clear()
    assert len(replica.consuming) == 31


# pauses and losses ---------------------------------------------------------------------------------------


async def paused(replica: Sharing) -> None:
    """The lease of the partition has ended, just after a renewal, as after a pause of the process."""
    tenure = replica.leases.owned[MOVES]
    before = tenure.until
    await replica.world.until(lambda: tenure.until != before)
    tenure.until, tenure.is_paused = replica.world.now(), True
    tenure.changed.notify_all()
    replica.leases.changed.notify_all()


@pytest.mark.parametrize(("back_s", "begun"), [(ANSWER_GRACE_S / 2, 1), (ANSWER_GRACE_S * 2, 2)])
async def test_a_lease_that_is_back_before_its_polls_were_cut_costs_none(
    world: World, back_s: float, begun: int
) -> None:
    replica = await polling(world)
    await paused(replica)
    tenure = replica.leases.owned[MOVES]
    await asyncio.sleep(back_s)
    tenure.renewed(world.now() + 3.2, tenure.revision)
    await asyncio.sleep(2)
    assert (len(world.phone.begun), replica.polls(B1)) == (begun, True)
    assert MOVES in replica.consuming


async def test_one_that_was_lost_and_taken_again_is_another(world: World) -> None:
    """Somebody else may have had it in between: its poll is cut, and everything is read anew."""
    replica = await polling(world)
    before, leases = replica.partitions.working[MOVES], replica.leases
    before.tenure.end()
    leases.owned[MOVES] = again = Tenure(MOVES, (), replica.bench.clock, settle)
    again.renewed(world.now() + 60, 0)
    leases.changed.notify_all()
    await world.until(lambda: len(world.phone.begun) == 2, within_s=2)
    assert (world.phone.cut, replica.partitions.working[MOVES].tenure) == ([B1], again)
    await asyncio.sleep(3)
    assert (len(world.phone.begun), replica.polls(B1), MOVES in replica.consuming) == (2, True, True)


async def test_everything_stops_while_no_lease_can_be_renewed_and_goes_on(world: World) -> None:
    for number in range(2, 20):
        await world.bench.bind(f"s{number}", f"b{number}@im.bot", f"u{number}@im.wechat")
    replica = await polling(world)
    replica.line.down = True
    await world.until(lambda: not world.phone.open, within_s=3.2 + ANSWER_GRACE_S + 0.1)
    await asyncio.sleep(10)
    assert {poller.state for poller in replica.partitions.pollers.values()} == {State.PAUSED}
    replica.line.down = False
    await world.until(lambda: len(world.phone.open) == 19, within_s=3)
    assert len(replica.consuming) == 32


async def test_one_that_another_has_taken_is_dropped_at_once(world: World) -> None:
    """With the request that is out."""
    world.bench.hears(SANDBOX)
    world.phone.hold_sends["u1@im.wechat"] = asyncio.Event()
    first = await polling(world)
    second = world.start("r1")
    first.leases.draining = second.leases.draining = True  # nothing is given
    await asyncio.sleep(1)
    partition = first.partitions.working[MOVES]
    first.deliver("hangs", sandbox=SANDBOX)
    await asyncio.sleep(0.5)
    assert (world.phone.texts, len(partition.sending)) == (["hangs"], 1)
    first.life.stop()
    second.leases.draining = False
    await world.until(lambda: MOVES in second.owned, within_s=10)
    first.life.go_on()
    await world.until(lambda: MOVES not in first.owned, within_s=2)
    await asyncio.sleep(0.5)
    assert (partition.tenure.is_over, partition.sending, partition.tasks) == (True, [], 0)
    assert (first.consuming, first.partitions.pollers) == (set(), {})
    assert second.polls(B1)


# the end -------------------------------------------------------------------------------------------------


async def test_a_replica_that_stops_gives_everything_and_takes_nothing_more(world: World) -> None:
    replica = await polling(world)
    stopping = asyncio.create_task(replica.partitions.drain(60.0))
    await asyncio.sleep(2)
    assert (replica.owned, replica.consuming, replica.partitions.working) == (set(), set(), {})
    await world.bench.bind("s7", B2, "u2@im.wechat")
    await asyncio.sleep(5)
    assert (polled(world), stopping.done()) == ([B1], False)
    world.phone.answer(B1, raw("last"))
    await asyncio.sleep(1)
    assert stopping.done()
    assert [inbound.text for inbound in world.bench.bus.inbound()] == ["last"]
    assert all(not world.lease(number).owner and not world.lease(number).former for number in range(32))


async def test_what_is_being_taken_as_a_replica_stops_is_given_away_too(world: World) -> None:
    await world.bench.bind(SANDBOX, B1)
    replica = world.start("r0")
    replica.line.late_s = 0.9
    await world.until(replica.leases.taking.locked)
    await replica.partitions.drain(60.0)
    assert replica.owned == set()
    assert {world.lease(number).owner for number in range(32)} == {""}


async def test_a_drain_that_is_over_cuts_what_is_left(world: World) -> None:
    replica = await polling(world)
    began = world.now()
    await replica.partitions.drain(5.0)
    assert 5.0 <= world.now() - began <= 5.0 + CUT_S
    assert (world.phone.cut, replica.partitions.pollers) == ([B1], {})


async def test_a_drain_that_is_over_waits_for_an_answer_that_is_still_to_be_read(world: World) -> None:
    """The answers of its host that came before it are read first. iLink may count it as delivered."""
    replica = await polling(world)
    world.phone.reading.add(B1)
    leaving = asyncio.create_task(replica.partitions.drain(20.0))
    await asyncio.sleep(20.0 + CUT_S * 1.5)
    assert not leaving.done()
    world.phone.reading.clear()
    world.phone.open[B1].set_result(batch(raw("large"), cursor="b"))
    await leaving
    assert [inbound.text for inbound in world.bench.bus.inbound()] == ["large"]


async def test_a_drain_without_nats_ends(world: World) -> None:
    replica = await polling(world)
    replica.line.down = replica.core.is_cut = True
    began = world.now()
    await replica.partitions.drain(20.0)
    assert world.now() - began < 10.0
    assert world.phone.cut == [B1]


# how replicas are ----------------------------------------------------------------------------------------


async def test_replicas_say_how_they_are_and_how_many_are_here(world: World) -> None:
    first = await polling(world)
    second = world.start("r1")
    await asyncio.sleep(15)
    asks = Replicas(second.core, world.bench.names, second.bench.presence)
    found, here = await asks.query([B1])
    assert ([each.instance for each in found], here) == (["r0", "r1"], 2)
    assert [len(each.partitions) for each in found] == [16, 16]
    assert [each.polls[B1].state for each in found] == ["polling", "waiting"]
    first.core.is_cut = True
    began = world.now()
    found, here = await asks.query([B1])
    assert ([each.instance for each in found], here) == (["r1"], 2), "who does not answer in time may be dead"
    assert world.now() - began <= QUERY_TIMEOUT_S
    first.core.is_cut = False
    first.core.respond(world.bench.names.polls_of(first.leases.replica), lambda data: b"x")
    assert [each.instance for each in (await asks.query([]))[0]] == ["r1"]


class Idle:
    """In place of a partition that sends."""

    tasks = 0

    def __init__(self, throttled_bots: Iterable[str] = ()) -> None:
        self.throttled_bots = set(throttled_bots)

    def queue_depths(self, parked: Counter[str]) -> tuple[int, int | None]:
        return 0, None


def bound(count: int) -> Bench:
    """A replica that owns everything, with so many bindings."""
    bench = Bench()
    for number in range(count):
        binding = Binding(sandbox=f"s{number}", bot=f"{number:06}@im.bot", user=f"u{number}", token="t")
        bench.bindings_bucket.put(to_subject_token(binding.bot), msgspec.json.encode(binding))
    assert len(bench.bindings) == count
    return bench


def no_person(binding: Binding) -> None:
    raise AssertionError(f"{binding.bot} is not polled")


def poll(bench: Bench, *, every_state: bool = True) -> dict[str, BotPoller]:
    """Every binding has a poller; the states go round."""
    parts, pollers = bench.parts(), bench.replica.partitions.pollers
    for number, binding in enumerate(bench.bindings):
        poller = pollers[binding.bot] = BotPoller(binding.bot, parts, no_person, lambda _: None)
        poller.shown.state = STATES[number % len(STATES)] if every_state else State.POLLING
        poller.unanswered_since = bench.clock.monotonic() - (100.0 if number == 7 else 1.0)
    return pollers


def observed(bench: Bench, tasks: int = 0) -> None:
    observe(bench.replica.partitions, bench.clock, bench.metrics, tasks)


async def test_ten_thousand_bindings_are_a_scrape_of_the_same_size() -> None:
    bench = bound(BOTS)
    partitions: dict[int, Any] = bench.partitions
    partitions[0] = Idle(f"{number:06}@im.bot" for number in range(60))
    empty = bench.metrics.expose()[0]
    poll(bench)
    observed(bench, 30_000)
    body = bench.metrics.expose()[0]
    samples = [line for line in body.decode().splitlines() if not line.startswith("#")]
    assert len(samples) == sum(not line.startswith(b"#") for line in empty.splitlines()) <= 1_000
    assert len(body) <= 100_000
    states = {state: bench.metrics.value("bindings", state=state) for state in (*STATES, "throttled")}
    assert sum(states.values()) == BOTS
    assert states["throttled"] == len(range(STATES.index(State.POLLING), 60, len(STATES)))
    assert bench.metrics.value("tasks", kind="other") == 30_000 - BOTS


async def test_a_poll_of_a_partition_that_was_given_away_is_counted_by_its_new_owner_alone(world: World) -> None:
    first = await polling(world)
    await world.bench.bind(sandbox_of(0), B2, "u2@im.wechat")
    second = world.start("r1")
    await world.until(lambda: MOVES in second.consuming)
    await asyncio.sleep(1)
    assert first.polls(B1)
    for replica, states in ((first, {"polling": 1.0, "waiting": 0.0}), (second, {"polling": 0.0, "waiting": 1.0})):
        observe(replica.partitions, replica.bench.clock, replica.bench.metrics, 0)
        assert {state: replica.bench.metrics.value("bindings", state=state) for state in states} == states


async def test_the_bot_that_was_answered_longest_ago_is_seen_among_ten_thousand() -> None:
    bench = bound(BOTS)
    pollers = poll(bench, every_state=False)
    for state, oldest_s in (
        (State.POLLING, 100.0),
        (State.NEEDS_LOGIN, 1.0),  # it is not polled, and that is told elsewhere
        (State.PAUSED, 100.0),  # nobody else tells that it should be
    ):
        pollers["000007@im.bot"].shown.state = state
        observed(bench)
        assert bench.metrics.value("oldest_poll_age_seconds") == pytest.approx(oldest_s)


async def test_what_nobody_polls_is_counted() -> None:
    """Bindings of owned partitions without a poller, and all those of partitions that no replica owns."""
    bench = bound(500)
    mine, ownerless = set(range(0, 32, 4)), set(range(1, 32, 4))
    for number in set(range(32)) - mine:
        bench.leases.owned.discard(number)
    bench.leases.ownerless = ownerless
    numbers = [bench.names.partition_of(binding.sandbox) for binding in bench.bindings]
    observed(bench)
    assert bench.metrics.value("bindings_unowned") == sum(number in mine | ownerless for number in numbers)
    for binding, number in zip(bench.bindings, numbers, strict=True):
        if number in mine:
            bench.replica.partitions.pollers[binding.bot] = bench.new_poller(binding.bot)
    observed(bench)
    assert bench.metrics.value("bindings_unowned") == sum(number in ownerless for number in numbers) > 0
    bench.leases.ownerless = set()
    observed(bench)
    assert bench.metrics.value("bindings_unowned") == 0
    await settle()
