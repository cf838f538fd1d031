"""What only a server can prove: order and loss across kills, compare-and-set, resets, and what the streams are."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from structlog.testing import capture_logs

from adapter.embedded import EmbeddedNats
from adapter.errors import BusRefused, Conflict, LeaseLost, Refused, SettingsError, Temporary
from adapter.jetstream import topology
from adapter.jetstream.answers import NO_STREAM, is_leaderless
from adapter.jetstream.buckets import KvBucket, LeaseRegister
from adapter.jetstream.consumer import Consumer, Delivery, all_settled
from adapter.jetstream.history import StreamHistory, direct_get
from adapter.jetstream.inspector import Inspector
from adapter.jetstream.link import Link
from adapter.jetstream.publisher import Publisher
from adapter.jetstream.questions import Answer
from adapter.jetstream.services import AT_ONCE, OF_ONE, BusTeller, Handler, Services
from adapter.metrics import Metrics
from adapter.names import H_COMMAND, H_ERROR, H_ERROR_CODE, H_MSG_ID, H_SCHEMA, SHARDS, Names, peer_key, shard_of
from adapter.ports import Answered, Asked, Entry, Message, PubAck, Stored
from adapter.settings import Settings
from adapter.timing import SystemClock
from tests.e2e.memory import in_memory
from tests.e2e.waiting import eventually, free_port, until
from tests.growth import census, growing

NAMES = Names()
PATIENCE_S = 30.0


class Bus:
    """A server on a folder, which can be killed and started again on the same port, and our edge to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = 0
        self.server = EmbeddedNats(folder)
        self.names = NAMES

    async def start(self) -> None:
        self.server = EmbeddedNats(self._folder, port=self._port)
        await self.server.start()
        self._port = int(self.server.url.rpartition(":")[2])
        self.settings = Settings(nats_url=(self.server.url,), in_max_bytes=1 << 30, media_store_bytes=1 << 30)

    def kill(self) -> None:
        self.server.kill()

    async def connected(self, group: asyncio.TaskGroup, name: str = "test") -> Link:
        """A link that lives as long as the group."""
        link = Link(self.settings, name)
        group.create_task(link.run())
        await link.wait_up(PATIENCE_S)
        return link

    async def client(self) -> Client:
        return await nats.connect(self.server.url)


class Rig:
    """A link with its publisher and history."""

    def __init__(self, bus: Bus, link: Link, group: asyncio.TaskGroup) -> None:
        self.bus = bus
        self.link = link
        self.metrics = Metrics()
        self.publisher = Publisher(link, SystemClock(), self.metrics)
        self.history = StreamHistory(link)
        self._group = group
        self._tasks: list[asyncio.Task[None]] = []

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Something that runs until the rig is taken down."""
        task = self._group.create_task(work)
        self._tasks.append(task)
        return task

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def bucket(self, name: str = NAMES.context) -> KvBucket:
        return KvBucket(self.link, self.publisher, name)

    async def first(self, stream: str) -> int:
        """The first sequence of a stream."""
        state: dict[str, int] = (await self.link.api(f"STREAM.INFO.{stream}"))["state"]
        return state["first_seq"]

    async def read(self, stream: str, subject: str, **where: Any) -> list[bytes]:
        return [stored.data async for stored in self.history.read(stream, subject, **where)]


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Bus]:
    with in_memory(tmp_path / "nats"):
        made = Bus(tmp_path / "nats")
        await made.start()
        yield made
        made.kill()


@contextlib.asynccontextmanager
async def rig_on(bus: Bus, *, streams: bool = True) -> AsyncIterator[Rig]:
    async with asyncio.TaskGroup() as group:
        link = Link(bus.settings, "test")
        rig = Rig(bus, link, group)
        rig.spawn(link.run())
        rig.spawn(rig.publisher.run())
        await link.wait_up(PATIENCE_S)
        if streams:
            await asyncio.gather(*(topology.create(link, wanted) for wanted in topology.streams(NAMES, bus.settings)))
        yield rig
        rig.stop()


@pytest.fixture
async def rig(bus: Bus) -> AsyncIterator[Rig]:
    async with rig_on(bus) as made:
        yield made


def event(number: int, sandbox: str = "s1") -> Message:
    return Message("event", NAMES.event(sandbox, "receipt"), str(number).encode(), {H_MSG_ID: f"e{number}"})


class Fence:
    """What the leases say: from the `lost_from`th question on, no."""

    def __init__(self, lost_from: float) -> None:
        self.lost_from = lost_from
        self.asked = 0

    def __call__(self) -> None:
        self.asked += 1
        if self.asked >= self.lost_from:
            raise LeaseLost("lease_lost")


# publishing ----------------------------------------------------------------------------------------------


async def test_messages_keep_the_order_of_their_calls(rig: Rig) -> None:
    acks = await asyncio.gather(*(rig.publisher.publish(event(number)) for number in range(500)))
    assert [ack.seq - acks[0].seq for ack in acks] == list(range(500))
    assert await rig.read(NAMES.stream_event, NAMES.event("s1", "receipt")) == [
        str(number).encode() for number in range(500)
    ]


async def test_a_repeat_is_acknowledged_as_one(rig: Rig) -> None:
    first = await rig.publisher.publish(event(1))
    again = await rig.publisher.publish(event(1))
    assert (first.duplicate, again.duplicate, again.seq) == (False, True, first.seq)


async def test_kills_of_the_server_cost_neither_a_message_nor_the_order(rig: Rig) -> None:
    """kill -9 three times while hundreds are on their way: each caller waits, and is answered once."""
    numbers = itertools.count()
    acks: dict[int, PubAck] = {}
    stop = False

    async def produce() -> None:
        while not stop:
            batch = [next(numbers) for _ in range(20)]
            for number, ack in zip(batch, await rig.publisher.publish_all([event(n) for n in batch]), strict=True):
                assert isinstance(ack, PubAck)
                acks[number] = ack

    producers = [asyncio.create_task(produce()) for _ in range(5)]
    for _ in range(3):
        reached = len(acks) + 100
        await until(lambda reached=reached: len(acks) > reached, "some are stored")  # type: ignore[misc]
        rig.bus.kill()
        await asyncio.sleep(0.2)
        await rig.bus.start()
    reached = len(acks) + 100
    await until(lambda: len(acks) > reached, "it goes on after the last kill")
    stop = True
    await asyncio.gather(*producers)

    stored = [int(data) for data in await rig.read(NAMES.stream_event, NAMES.event("s1", "receipt"))]
    assert stored == sorted(set(stored)), "in order, none twice"
    assert set(stored) == set(acks), "none lost"


async def test_one_too_large_is_refused_and_the_others_of_its_batch_are_stored(rig: Rig) -> None:
    large = Message("event", NAMES.event("s1", "receipt"), b"x" * (rig.link.max_payload + 1), {})
    acks = await rig.publisher.publish_all([event(0), large, event(1)])
    assert [isinstance(ack, BusRefused) for ack in acks] == [False, True, False]
    with pytest.raises(BusRefused):
        await rig.publisher.publish(large)
    assert rig.link.epoch == 1, "the connection was not spent on it"


async def test_a_subject_that_would_break_the_connection_is_refused(rig: Rig) -> None:
    with pytest.raises(BusRefused):
        await rig.publisher.publish(Message("event", NAMES.event("x" * 4000, "receipt"), b"x", {}))
    await rig.publisher.publish(Message("event", NAMES.event("x" * 3000, "receipt"), b"x", {}))
    assert rig.link.epoch == 1


@pytest.mark.parametrize("over", [-2000, -200, -20, 0, 20])
async def test_headers_count_against_the_largest_message(rig: Rig, over: int) -> None:
    """Refused here or stored there, never a connection broken by the server."""
    headers = {H_MSG_ID: "x" * 100, "traceparent": "é" * 50}
    message = Message("event", NAMES.event("s1", "receipt"), b"x" * (rig.link.max_payload + over), headers)
    (ack,) = await rig.publisher.publish_all([message])
    assert isinstance(ack, PubAck | BusRefused)
    await rig.publisher.publish(event(1))
    assert rig.link.epoch == 1


class Reloaded(EmbeddedNats):
    """A server whose limit for messages an operator changes while it runs, which it tells to new clients only."""

    async def limit(self, most: int) -> None:
        config = self.folder / "nats-server.conf"
        lines = [line for line in config.read_text().splitlines() if not line.startswith("max_payload")]
        config.write_text("\n".join([*lines, f"max_payload: {most}", ""]))
        os.kill(self.pid, signal.SIGHUP)

        async def told() -> bool:
            nc = await nats.connect(self.url)
            try:
                return nc.max_payload == most
            finally:
                await nc.close()

        await eventually(told, "new clients are told")


@pytest.fixture
async def reloaded(tmp_path: Path) -> AsyncIterator[Bus]:
    made = Bus(tmp_path)
    made.server = Reloaded(tmp_path, free_port())
    await made.server.start()
    made.settings = Settings(nats_url=(made.server.url,))
    yield made
    await made.server.stop()


async def test_a_limit_for_messages_that_is_lowered_holds_up_nothing_and_is_noticed_when_it_is_back(
    reloaded: Bus,
) -> None:
    assert isinstance(reloaded.server, Reloaded)
    async with rig_on(reloaded) as rig:
        largest = rig.link.max_payload
        message = Message("event", NAMES.event("s1", "receipt"), b"x" * 2000, {H_MSG_ID: "e0" * 100})
        await reloaded.server.limit(2048)  # with its headers it has more
        acks = await asyncio.wait_for(rig.publisher.publish_all([event(1), message, event(2)]), PATIENCE_S)
        assert [isinstance(ack, BusRefused) for ack in acks] == [False, True, False]
        assert rig.link.epoch == 2, "the server has ended the first connection, and no other"
        await reloaded.server.limit(largest)
        rig.link._doubt_s = 0.1  # the next test shows how long that is

        async def taken() -> bool:
            (ack,) = await rig.publisher.publish_all([message])
            return isinstance(ack, PubAck)

        await eventually(taken, "it is taken again")
        assert rig.link.epoch == 3


async def test_a_limit_for_messages_that_stays_low_is_doubted_less_and_less(
    reloaded: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too large may be tried for ever, and each new connection holds up everybody."""
    monkeypatch.setattr("adapter.jetstream.link.DOUBT_S", 0.1)
    assert isinstance(reloaded.server, Reloaded)
    async with rig_on(reloaded) as rig:
        await reloaded.server.limit(2048)
        message = Message("event", NAMES.event("s1", "receipt"), b"x" * 3000, {H_MSG_ID: "e0"})
        began = asyncio.get_running_loop().time()

        async def renewed() -> bool:
            await rig.publisher.publish_all([message])
            return rig.link.epoch >= 6

        await eventually(renewed, "the limit is doubted four times")
        assert asyncio.get_running_loop().time() - began > 0.1 + 0.2 + 0.4 + 0.8


async def test_what_the_client_will_not_write_is_refused_and_holds_up_nobody(rig: Rig) -> None:
    acks = await rig.publisher.publish_all(
        [event(0), msgspec.structs.replace(event(1), headers={"(odd)": "x"}), event(2)]
    )
    first = await rig.first(NAMES.stream_event)
    assert [ack.seq if isinstance(ack, PubAck) else type(ack) for ack in acks] == [first, BusRefused, first + 1]
    rig.publisher._stumble()  # as after a break: what is outstanding goes one by one
    acks = await rig.publisher.publish_all([msgspec.structs.replace(event(3), headers={"(odd)": "x"}), event(4)])
    assert [ack.seq if isinstance(ack, PubAck) else type(ack) for ack in acks] == [BusRefused, first + 2]


async def test_headers_that_speak_as_the_server_does_hide_nothing(rig: Rig) -> None:
    """Anybody may write a status into a message, and it must not end every reading of the stream."""
    nc, subject, stream = await rig.bus.client(), NAMES.event("s1", "receipt"), NAMES.stream_event
    for status in (b"503", b"404", b"204 EOB", b"100 Idle"):
        head = b"NATS/1.0 " + status + b"\r\n\r\n"
        await nc._send_command(b"HPUB %s %d %d\r\n%sx\r\n" % (subject.encode(), len(head), len(head) + 1, head))
    await nc.jetstream().publish(subject, b"the last")
    await nc.close()
    first = await rig.first(stream)
    assert await rig.read(stream, subject) == [b"x"] * 4 + [b"the last"]
    found = [await rig.history.get(stream, first + number) for number in range(5)]
    assert [stored and stored.data for stored in found] == [b"x"] * 4 + [b"the last"]


async def test_a_message_for_no_stream_waits_for_one(rig: Rig) -> None:
    """No responders: the stream is being made, or moves. Nothing is lost, and others follow."""
    waiting = asyncio.create_task(rig.publisher.publish(Message("event", "late.1", b"x", {})))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await rig.link.api("STREAM.CREATE.LATE", {"name": "LATE", "subjects": ["late.*"]})
    async with asyncio.timeout(PATIENCE_S):
        assert (await waiting).seq == 1


async def test_a_caller_who_is_cancelled_leaves_nothing_behind(rig: Rig) -> None:
    rig.bus.kill()
    await until(lambda: not rig.link.up, "the break is noticed")
    waiting = asyncio.create_task(rig.publisher.publish(event(1)))
    await asyncio.sleep(0.1)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert rig.publisher.outstanding == 0
    await rig.bus.start()
    async with asyncio.timeout(PATIENCE_S):
        await rig.publisher.publish(event(2))
    assert await rig.read(NAMES.stream_event, NAMES.event("s1", "receipt")) == [b"2"]


async def test_what_waits_for_the_bus_is_not_written_after_its_writer_lost_the_right(rig: Rig) -> None:
    """The fence is asked at each attempt: a writer that was frozen finds out before anything of its own leaves."""
    fence = Fence(lost_from=float("inf"))
    await rig.publisher.publish(msgspec.structs.replace(event(0), fence=fence))
    rig.bus.kill()
    await until(lambda: not rig.link.up, "the break is noticed")
    waiting = asyncio.create_task(
        rig.publisher.publish_all([msgspec.structs.replace(event(1), fence=fence), event(2)])
    )
    others = asyncio.create_task(rig.publisher.publish(event(3)))
    await asyncio.sleep(0.1)
    fence.lost_from = 0
    await rig.bus.start()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(LeaseLost):
            await waiting
        await others
    stored = await rig.read(NAMES.stream_event, NAMES.event("s1", "receipt"))
    assert stored[0] == b"0"
    assert b"1" not in stored
    assert stored[-1] == b"3"


# reading back --------------------------------------------------------------------------------------------


async def test_a_stream_is_read_from_a_sequence_or_a_time(rig: Rig) -> None:
    subject = NAMES.event("s1", "receipt")
    await rig.publisher.publish_all([event(number, f"s{number % 2}") for number in range(600)])
    odd = [str(number).encode() for number in range(1, 600, 2)]
    first = await rig.first(NAMES.stream_event)
    assert await rig.read(NAMES.stream_event, subject) == odd
    assert await rig.read(NAMES.stream_event, subject, after=first + 595) == odd[-2:]
    assert await rig.read(NAMES.stream_event, subject, after=first + 10_000) == []
    assert await rig.read(NAMES.stream_event, subject, since_ms=0) == odd
    assert await rig.read(NAMES.stream_event, subject, since_ms=SystemClock().now_ms() + 60_000) == []
    assert len(await rig.read(NAMES.stream_event, NAMES.event("*", "receipt"))) == 600
    last = await rig.history.last(NAMES.stream_event, subject)
    assert last is not None
    assert (last.data, last.seq) == (b"599", first + 599)
    assert await rig.history.last(NAMES.stream_event, NAMES.event("nobody", "receipt")) is None
    assert await rig.history.counts(NAMES.stream_event, NAMES.event("*", "receipt")) == {
        NAMES.event("s0", "receipt"): 300,
        subject: 300,
    }


async def test_what_is_large_is_read_whole_and_never_more_at_once_than_a_server_lets_wait(rig: Rig) -> None:
    """It cuts off who lets too much wait, and after the next connect all of it would come again."""
    large = [bytes([number]) * 700_000 for number in range(12)]
    large.append(b"x" * (rig.link.max_payload - 12))  # with what belongs to it more than a pull brings
    await rig.publisher.publish_all([Message("out", NAMES.out("s1"), data, {}) for data in large])
    asked: list[Msg] = []

    async def on_message(msg: Msg) -> None:
        asked.append(msg)

    async def nothing() -> None:
        return None

    assert rig.link.nc is not None
    for verb in (f"DIRECT.GET.{NAMES.stream_out}", f"CONSUMER.MSG.NEXT.{NAMES.stream_out}.*"):
        await rig.link.nc.subscribe(f"$JS.API.{verb}", cb=on_message)
    assert await rig.read(NAMES.stream_out, NAMES.out_shard(shard_of("s1"))) == large

    name = topology.out_consumer(shard_of("s1"))
    await topology.create(rig.link, topology.consumer_of(NAMES, name))
    consumer = Consumer(rig.link, topology.consumer_of(NAMES, name), room=512, until_acked=False)
    got: list[bytes] = []
    rig.spawn(consumer.run(lambda delivery: got.append(delivery.data), nothing))
    await until(lambda: len(got) == len(large), "all are delivered")
    assert got == large
    bounds = [msgspec.json.decode(msg.data)["max_bytes"] for msg in asked]
    assert len(bounds) >= len(large)
    assert (min(bounds), max(bounds)) == (1024 * 1024, 2 * 1024 * 1024)


async def test_a_message_is_deleted_once_and_deleting_it_again_is_no_error(rig: Rig) -> None:
    subject = NAMES.parked(3, peer_key("b1@im.bot", "u1@im.wechat"))
    acks = [await rig.publisher.publish(Message("parked", subject, str(n).encode(), {})) for n in range(3)]
    for _ in range(2):
        await rig.history.delete(NAMES.stream_parked, acks[1].seq)
    assert await rig.read(NAMES.stream_parked, NAMES.parked(3, "*")) == [b"0", b"2"]
    await rig.history.delete(NAMES.stream_parked, 999)


def on_disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*.blk"))


@pytest.mark.parametrize("erase", [True, False])
async def test_what_is_erased_is_not_on_the_disk_any_more(rig: Rig, erase: bool, tmp_path: Path) -> None:
    """As a bind with its token; a mere deletion leaves it there as long as a later message shares its block."""
    (ack, _) = await rig.publisher.publish_all([msgspec.structs.replace(event(number), payload=b"secret %d" % number)
                                                for number in range(2)])  # fmt: skip
    assert isinstance(ack, PubAck)
    await rig.history.delete(NAMES.stream_event, ack.seq, erase=erase)
    assert await rig.read(NAMES.stream_event, NAMES.event("s1", "*")) == [b"secret 1"]
    rig.bus.kill()
    disk = on_disk(tmp_path / "nats")
    assert b"secret 1" in disk
    assert (b"secret 0" in disk) is not erase
    await rig.bus.start()


# buckets -------------------------------------------------------------------------------------------------


KEY = peer_key("b1@im.bot", "u1@im.wechat")


STATUS = [
    {"Status": "404"},
    {"Status": "503", "Description": "no"},
    {"Status": "100", "Nats-Last-Consumer": "99"},
    {"Status": "408", "Nats-Pending-Messages": "many"},
    {"Nats-Sequence": "77", "Nats-Subject": "elsewhere"},
]
"""Headers of a message that look like the server's own words."""


async def test_a_stored_message_with_a_status_among_its_headers_is_read_as_any_other(rig: Rig) -> None:
    for number, headers in enumerate(STATUS):
        await rig.publisher.publish(msgspec.structs.replace(event(number), headers=headers))
    assert await rig.read(NAMES.stream_event, NAMES.event("s1", "*")) == [b"0", b"1", b"2", b"3", b"4"]


async def test_a_bucket_tells_what_is_there_below_a_token(rig: Rig) -> None:
    bucket = rig.bucket(NAMES.typing)
    assert await bucket.below("7") == []
    first = await bucket.update(f"7.{KEY}", b"1", 0)
    await bucket.update(f"7.{peer_key('gone@im.bot', 'u')}", b"2", 0)
    await bucket.delete(f"7.{peer_key('gone@im.bot', 'u')}")
    await bucket.update(f"77.{KEY}", b"3", 0)
    assert await bucket.below("7") == [Entry(f"7.{KEY}", b"1", first)]


async def test_a_bucket_compares_and_sets(rig: Rig) -> None:
    bucket = rig.bucket()
    assert await bucket.get(KEY) is None
    first = await bucket.update(KEY, b"1", 0)
    with pytest.raises(Conflict):
        await bucket.update(KEY, b"x", 0)
    second = await bucket.update(KEY, b"2", first)
    with pytest.raises(Conflict):
        await bucket.update(KEY, b"x", first)
    assert await bucket.get(KEY) == Entry(KEY, b"2", second)
    with pytest.raises(Conflict):
        await bucket.delete(KEY, first)
    gone = await bucket.delete(KEY, second)
    assert await bucket.get(KEY) == Entry(KEY, None, gone)
    assert await bucket.update(KEY, b"3", gone) > gone


class Twice:
    """A publisher that writes once more, as after an answer that got lost."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def publish(self, message: Message) -> PubAck:
        await self._publisher.publish(message)
        return await self._publisher.publish(message)


async def test_a_write_whose_answer_got_lost_is_known_again(rig: Rig) -> None:
    bucket = KvBucket(rig.link, Twice(rig.publisher), NAMES.context)  # type: ignore[arg-type]
    written = await bucket.update(KEY, b"1", 0)
    assert await bucket.get(KEY) == Entry(KEY, b"1", written)
    await rig.bucket().update(KEY, b"other", written)
    with pytest.raises(Conflict):
        await bucket.update(KEY, b"2", written)


async def test_of_many_who_write_at_once_one_wins(rig: Rig) -> None:
    bucket = rig.bucket()
    results = await asyncio.gather(
        *(bucket.update(KEY, str(number).encode(), 0) for number in range(20)), return_exceptions=True
    )
    assert [isinstance(result, Conflict) for result in results].count(False) == 1


async def test_a_follower_sees_what_is_stored_and_never_what_was_refused(rig: Rig) -> None:
    """A plain subscription to the bucket's subjects would show both."""
    bucket = rig.bucket(NAMES.bindings)
    revision = await bucket.update("a", b"1", 0)
    seen: list[Entry] = []
    loaded = asyncio.Event()
    rig.spawn(bucket.follow(seen.append, on_loaded=loaded.set))
    await loaded.wait()
    assert seen == [Entry("a", b"1", revision)]
    with contextlib.suppress(Conflict):
        await bucket.update("a", b"refused", 99)
    second = await bucket.update("a", b"2", revision)
    third = await bucket.delete("a")
    await until(lambda: len(seen) == 3, "both changes are seen")
    assert seen[1:] == [Entry("a", b"2", second), Entry("a", None, third)]


async def test_a_follower_misses_nothing_across_a_kill(rig: Rig) -> None:
    """It hears of what others wrote while it could not listen."""
    bucket = rig.bucket(NAMES.bindings)
    seen: dict[str, Entry] = {}
    order: list[int] = []

    def see(entry: Entry) -> None:
        seen[entry.key] = entry
        order.append(entry.revision)

    rig.spawn(bucket.follow(see))
    for number in range(50):
        await bucket.update(f"k{number}", b"before", 0)
    rig.bus.kill()
    await rig.bus.start()
    for number in range(50, 60):
        await bucket.update(f"k{number}", b"after", 0)
    await bucket.delete("k0")
    await until(lambda: len(seen) == 60 and seen["k0"].value is None, "everything is seen")
    assert len(order) == len(set(order)), "no entry twice, none older than one before"


async def looks(rig: Rig, bucket: KvBucket) -> Callable[[int], Awaitable[None]]:
    """Waits until a follower of the bucket has looked that often more whether something is missing."""
    found = 0

    async def on_message(_: Msg) -> None:
        nonlocal found
        found += 1

    assert rig.link.nc is not None
    await rig.link.nc.subscribe(f"$JS.API.STREAM.INFO.{bucket.stream}", cb=on_message)

    async def more(count: int) -> None:
        wanted = found + count
        await until(lambda: found >= wanted, "it looks again")

    return more


@pytest.mark.parametrize("lost", ["every news", "one in the middle", "the last"])
async def test_a_follower_finds_what_no_news_told_it(rig: Rig, lost: str) -> None:
    """News are at most once."""
    bucket = rig.bucket(NAMES.bindings)
    seen: dict[str, Entry] = {}
    loaded = asyncio.Event()
    news, bucket.news = bucket.news, "elsewhere" if lost == "every news" else bucket.news
    assert rig.link.nc is not None
    subscribe = rig.link.nc.subscribe

    async def but_some(subject: str, *, cb: Callable[[Msg], Awaitable[None]], **options: Any) -> Any:
        numbers = itertools.count(1)
        wanted = {"one in the middle": {3}, "the last": {4}}.get(lost, set())

        async def on_message(msg: Msg) -> None:
            if next(numbers) not in wanted:
                await cb(msg)

        return await subscribe(subject, cb=on_message if subject.startswith(news) else cb, **options)

    rig.link.nc.subscribe = but_some  # type: ignore[assignment,method-assign]
    rig.spawn(bucket.follow(lambda entry: seen.update({entry.key: entry}), on_loaded=loaded.set, reload_s=0.05))
    await until(loaded.is_set, "it has read")
    first = {key: await bucket.update(key, b"1", 0) for key in ("a", "b")}
    second = {key: await bucket.update(key, b"2", first[key]) for key in ("a", "b")}
    await until(lambda: seen == {key: Entry(key, b"2", second[key]) for key in second}, "all is seen")


async def test_a_follower_that_misses_nothing_does_not_read_again(rig: Rig) -> None:
    """Ten thousand bindings cost as much as that many messages, every half minute."""
    bucket = rig.bucket(NAMES.bindings)
    loads = 0

    def count() -> None:
        nonlocal loads
        loads += 1

    seen: list[Entry] = []
    more = await looks(rig, bucket)
    rig.spawn(bucket.follow(seen.append, on_loaded=count, reload_s=0.05))
    await until(lambda: loads == 1, "it has read")
    for number in range(20):
        await bucket.update(f"k{number}", b"x", 0)
    await bucket.delete("k0")
    await until(lambda: len(seen) == 21, "all is seen")
    await more(2)
    before = loads
    await more(5)
    assert loads == before
    await bucket.purge("k5", seen[5].revision)
    await until(lambda: loads > before, "a purge is noticed")


async def test_a_follower_reads_again_when_the_server_that_answered_lags(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has seen as many keys as there are, and one of them in an older value."""
    bucket = rig.bucket(NAMES.bindings)
    first = await bucket.update("k", b"1", 0)
    seen: list[bytes | None] = []
    loaded = asyncio.Event()

    async def lagging(*query: Any) -> AsyncIterator[Stored]:
        async for stored in direct_get(*query):
            yield stored if loaded.is_set() else Stored(stored.subject, first, stored.headers, b"1")

    monkeypatch.setattr("adapter.jetstream.history.direct_get", lagging)
    await bucket.update("k", b"2", first)
    rig.spawn(bucket.follow(lambda entry: seen.append(entry.value), on_loaded=loaded.set, reload_s=0.05))
    await until(lambda: seen == [b"1", b"2"], "it reads again")


async def test_a_follower_reads_again_what_it_could_not_read_to_the_end(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has heard of the newest sequence by then, and has as many keys as there are."""
    bucket = rig.bucket(NAMES.bindings)
    first = await bucket.update("k", b"1", 0)
    seen: list[bytes | None] = []
    failures = 0

    async def failing(*query: Any) -> AsyncIterator[Stored]:
        nonlocal failures
        if seen and not failures:
            failures += 1
            raise Temporary("bus_busy")
        async for stored in direct_get(*query):
            yield stored

    monkeypatch.setattr("adapter.jetstream.history.direct_get", failing)
    bucket.news = "elsewhere"
    rig.spawn(bucket.follow(lambda entry: seen.append(entry.value), reload_s=0.05))
    await until(lambda: seen == [b"1"], "it has read")
    await bucket.update("k", b"2", first)
    await until(lambda: seen == [b"1", b"2"], "it reads again")
    assert failures == 1


async def test_a_replicated_history_ends_where_the_leader_has_no_more(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that lags knows of the first message only."""
    await control(rig, "0", "1", "2")
    asked = 0

    async def lagging(*query: Any) -> AsyncIterator[Stored]:
        nonlocal asked
        asked += 1
        number = asked
        async for stored in direct_get(*query):
            yield stored
            if number == 1:
                return

    monkeypatch.setattr("adapter.jetstream.history.direct_get", lagging)
    asking = StreamHistory(rig.link, replicated=True)
    found = [stored.data async for stored in asking.read(NAMES.stream_ctl, NAMES.bind)]
    assert (found, asked) == ([b"0", b"1", b"2"], 2)


async def test_a_lease_register_answers_from_the_leader_and_fails_in_time(rig: Rig) -> None:
    register = LeaseRegister(rig.link, NAMES.members, ttl_s=60)
    assert await register.get("r1") is None
    first = await register.write("r1", b"1", 0)
    with pytest.raises(Conflict):
        await register.write("r1", b"x", 0)
    assert await register.get("r1") == Entry("r1", b"1", first)
    assert await register.entries() == [Entry("r1", b"1", first)]
    gone = await register.write("r1", None, first)
    assert await register.get("r1") == Entry("r1", None, gone)
    assert await register.entries() == [Entry("r1", None, gone)]
    with pytest.raises(Conflict):
        await register.write("r1", b"back", first)

    rig.bus.kill()
    began = asyncio.get_running_loop().time()
    with pytest.raises(Temporary):
        await register.write("r1", b"x", gone)
    assert asyncio.get_running_loop().time() - began < 2.0


async def test_many_members_are_read_whole(rig: Rig) -> None:
    register = LeaseRegister(rig.link, NAMES.claims)
    await asyncio.gather(*(register.write(str(number), b"x", 0) for number in range(SHARDS)))
    assert len(await register.entries()) == SHARDS


async def test_a_register_is_read_anew_when_it_has_changed_and_now_and_then(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    register, other = LeaseRegister(rig.link, NAMES.claims), LeaseRegister(rig.link, NAMES.claims)
    first = await other.write("1", b"x", 0)
    second = await other.write("2", b"y", 0)
    known = await register.entries()
    assert known == [Entry("1", b"x", first), Entry("2", b"y", second)]
    assert await register.entries() is known, "nothing has changed"
    third = await other.write("1", b"z", first)
    assert sorted(await register.entries()) == [Entry("1", b"z", third), Entry("2", b"y", second)]
    await rig.link.api(f"STREAM.PURGE.KV_{NAMES.claims}", {"filter": f"$KV.{NAMES.claims}.2"})
    monkeypatch.setattr("adapter.jetstream.buckets.READ_ANEW_S", 0.1)

    async def noticed() -> bool:
        return await register.entries() == [Entry("1", b"z", third)]

    await eventually(noticed, "the purge is seen")


async def test_a_history_that_asks_the_leader_ends_as_one_that_does_not(rig: Rig) -> None:
    asking = StreamHistory(rig.link, replicated=True)
    await control(rig, *(str(number) for number in range(450)))
    first = await rig.first(NAMES.stream_ctl)
    moment_ms = SystemClock().now_ms() + 1000
    for stream, subject, bounds in (
        (NAMES.stream_ctl, NAMES.bind, {}),
        (NAMES.stream_ctl, NAMES.bind, {"after": first + 448}),
        (NAMES.stream_ctl, NAMES.bind, {"after": first + 449}),
        (NAMES.stream_ctl, NAMES.bind, {"since_ms": 1}),
        (NAMES.stream_ctl, NAMES.bind, {"since_ms": moment_ms}),
        (NAMES.stream_ctl, NAMES.unbind, {}),
    ):
        found = [stored.seq async for stored in asking.read(stream, subject, **bounds)]
        assert found == [stored.seq async for stored in rig.history.read(stream, subject, **bounds)]
    last = await asking.last(NAMES.stream_ctl, NAMES.bind)
    assert last is not None
    assert (last.seq, last.data) == (first + 449, b"449")
    assert await asking.last(NAMES.stream_ctl, NAMES.unbind) is None


async def test_a_cancellation_that_is_swallowed_while_it_connects_still_ends_the_link(bus: Bus) -> None:
    """nats-py does so in places; the link ran on, and the process that should end waited for it."""
    link, connecting = Link(bus.settings, "test"), asyncio.Event()

    async def swallow(_: Client) -> None:
        connecting.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    link.on_up(swallow)
    running = asyncio.get_running_loop().create_task(link.run())
    await connecting.wait()
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=PATIENCE_S)
    assert done, "it ends"
    assert not link.up


# consumers -----------------------------------------------------------------------------------------------


class Reader:
    """What a shard's consumer delivers."""

    def __init__(
        self,
        rig: Rig,
        *,
        room: int = 8,
        name: str = topology.CONTROL,
        check: Callable[[], None] = lambda: None,
        turn: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.got: list[Delivery] = []
        self.resets = 0
        self.on_reset: Callable[[], None] = lambda: None
        self.consumer = Consumer(rig.link, topology.consumer_of(NAMES, name), room=room, check=check, turn=turn)
        self.task = rig.spawn(self.consumer.run(self.got.append, self._reset))

    async def _reset(self) -> None:
        self.resets += 1
        self.on_reset()

    @property
    def texts(self) -> list[str]:
        return [delivery.data.decode() for delivery in self.got]

    async def have(self, count: int) -> None:
        await until(lambda: len(self.got) >= count, f"{count} deliveries")


async def control(rig: Rig, *texts: str) -> None:
    for wanted in topology.consumers(NAMES):
        if wanted.name == topology.CONTROL:
            await topology.create(rig.link, wanted)
    for text in texts:
        await rig.publisher.publish(Message("ctl", NAMES.bind, text.encode(), {}))


@pytest.mark.parametrize("more", ["", "Unusual:  1\r\n"], ids=["short-way", "nats-pys-way"])
async def test_of_two_message_ids_the_one_by_which_the_server_drops_repeats_counts(rig: Rig, more: str) -> None:
    """Else a receipt would bear an id under which a repeat is another command."""
    await control(rig)
    nc = rig.link.client()
    for other in ("b", "c"):
        head = f"NATS/1.0\r\n{more}Nats-Msg-Id: a\r\nNats-Msg-Id: {other}\r\n\r\n".encode()
        await nc._send_command(b"HPUB %s %d %d\r\n%s\r\n" % (NAMES.bind.encode(), len(head), len(head), head))
    await control(rig, "the end")
    reader = Reader(rig)
    await reader.have(2)
    assert [delivery.headers.get(H_MSG_ID) for delivery in reader.got] == ["a", None]


async def test_a_consumer_delivers_in_order_and_no_more_than_there_is_room_for(rig: Rig) -> None:
    texts = [str(number) for number in range(30)]
    await control(rig, *texts)
    reader = Reader(rig, room=8)
    await reader.have(8)
    await asyncio.sleep(0.1)
    assert reader.texts == texts[:8]
    for number in range(30):
        await reader.have(number + 1)
        await reader.got[number].ack()
    assert reader.texts == texts
    assert not any(delivery.suspect for delivery in reader.got)


async def test_what_has_come_is_delivered_in_its_turn_and_not_after_the_pull_has_ended(rig: Rig) -> None:
    """All in one round of the event loop would hold it up. What waits as a pull ends comes again after the reset."""
    texts = [str(number) for number in range(8)]
    await control(rig, *texts)
    asked, turns = 0, asyncio.Semaphore(0)

    async def turn() -> None:
        nonlocal asked
        asked += 1
        await turns.acquire()

    reader = Reader(rig, room=8, turn=turn)
    await until(lambda: asked == 1, "one waits for its turn")
    turns.release()
    await reader.have(1)
    await until(lambda: asked == 2, "the next one waits")
    assert reader.texts == ["0"]
    rig.bus.kill()
    await until(lambda: not rig.link.up, "the break is noticed")
    await rig.bus.start()
    await until(lambda: asked == 3 and reader.resets == 2, "the next pull's first one waits, too")
    for _ in range(len(texts) + 1):
        turns.release()
    await reader.have(1 + len(texts))
    assert reader.texts == ["0", *texts]


async def test_all_is_settled_once_the_last_delivery_is_acknowledged(rig: Rig) -> None:
    await control(rig, "0", "1")
    clock = SystemClock()
    waiting = asyncio.create_task(all_settled(rig.link, NAMES.stream_ctl, topology.CONTROL, clock))
    reader = Reader(rig)
    await reader.have(2)
    await reader.got[0].ack()
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await reader.got[1].ack()
    await waiting
    with pytest.raises(Temporary, match="router_missing"):
        await all_settled(rig.link, NAMES.stream_out, topology.ROUTER, clock)


async def test_a_delivery_with_a_status_among_its_headers_is_one_as_any_other(rig: Rig) -> None:
    await control(rig)
    for number, headers in enumerate(STATUS):
        await rig.publisher.publish(Message("ctl", NAMES.bind, str(number).encode(), headers))
    reader = Reader(rig)
    await reader.have(len(STATUS))
    assert (reader.texts, reader.resets) == (["0", "1", "2", "3", "4"], 1)


async def test_a_delivery_knows_when_and_where_it_was_stored(rig: Rig) -> None:
    await control(rig, "x")
    reader = Reader(rig)
    await reader.have(1)
    (delivery,) = reader.got
    assert (delivery.subject, delivery.seq) == (NAMES.bind, await rig.first(NAMES.stream_ctl))
    assert abs(delivery.time_ms - SystemClock().now_ms()) < 10_000


async def test_the_next_owner_gets_what_is_unsettled_in_order_and_is_told_so(rig: Rig) -> None:
    texts = [str(number) for number in range(6)]
    await control(rig, *texts)
    first = Reader(rig)
    await first.have(6)
    for number in (0, 2):
        await first.got[number].ack()

    async def settled() -> bool:  # the server may answer others before it has looked at an acknowledgement
        return bool((await first.consumer.info())["num_ack_pending"] == 4)

    await eventually(settled, "both are acknowledged")
    first.task.cancel()
    await asyncio.wait([first.task])
    await rig.publisher.publish(Message("ctl", NAMES.bind, b"new", {}))

    heir = Reader(rig)
    await heir.have(5)
    assert heir.texts == ["1", "3", "4", "5", "new"]
    assert [delivery.suspect for delivery in heir.got] == [True] * 4 + [False]


async def test_an_owner_that_is_cut_off_before_it_reads_still_knows_what_was_in_hand_before(rig: Rig) -> None:
    """The reset takes the server's memory of what was delivered; ours must outlast it."""
    await control(rig, "0", "1")
    first = Reader(rig)
    await first.have(2)
    first.task.cancel()
    await asyncio.wait([first.task])

    heir = Reader(rig)

    def cut() -> None:
        if heir.resets == 1:
            rig.bus.kill()
            rig.spawn(rig.bus.start())

    heir.on_reset = cut
    await heir.have(2)
    assert heir.resets == 2
    assert [(delivery.data, delivery.suspect) for delivery in heir.got] == [(b"0", True), (b"1", True)]


async def test_a_kill_of_the_server_brings_what_is_unsettled_again_in_order(rig: Rig) -> None:
    """And what was acknowledged just before: the server writes that to its disk up to a tenth of a second later."""
    await control(rig, "0", "1", "2")
    reader = Reader(rig)
    await reader.have(3)
    await reader.got[0].ack()
    async with asyncio.timeout(60):
        while (await reader.consumer.info())["num_ack_pending"] != 2:  # the ack has no answer of its own
            await asyncio.sleep(0.01)
    rig.bus.kill()
    await rig.bus.start()
    await until(lambda: reader.texts[3:][-1:] == ["2"], "what is unsettled")
    assert reader.texts[3:] in (["1", "2"], ["0", "1", "2"])
    assert reader.resets == 2
    assert all(delivery.suspect for delivery in reader.got[3:])
    count = len(reader.got)
    await rig.publisher.publish(Message("ctl", NAMES.bind, b"3", {}))
    await reader.have(count + 1)
    assert reader.texts[count:] == ["3"]


@pytest.mark.parametrize("more", [True, False], ids=["seen at the next delivery", "seen at a heartbeat"])
async def test_a_delivery_that_got_lost_on_its_way_comes_again_before_what_is_after_it(
    rig: Rig, more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the consumer's leader dies with it: here somebody else gets it."""
    if not more:
        monkeypatch.setattr("adapter.jetstream.consumer.HEARTBEAT_S", 0.2)
    await control(rig, "0")
    reader = Reader(rig, room=1)
    await reader.have(1)
    stolen = rig.link.client().new_inbox()
    thief = await rig.link.client().subscribe(stolen)
    await rig.publisher.publish(Message("ctl", NAMES.bind, b"1", {}))
    await rig.link.publish(
        f"$JS.API.CONSUMER.MSG.NEXT.{NAMES.stream_ctl}.{topology.CONTROL}", b'{"batch":1}', reply=stolen
    )
    assert (await thief.next_msg(timeout=30)).data == b"1"
    if more:
        await rig.publisher.publish(Message("ctl", NAMES.bind, b"2", {}))
    await reader.got[0].ack()
    await reader.have(2)
    await reader.got[1].ack()
    assert reader.texts == ["0", "1"]
    assert reader.resets == 2
    if more:
        await reader.have(3)
        assert reader.texts == ["0", "1", "2"]


async def test_what_a_pull_of_another_takes_before_the_reset_is_answered_comes_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server under load delivers first, and then says in its answer how much it has delivered."""
    monkeypatch.setattr("adapter.jetstream.consumer.HEARTBEAT_S", 0.2)
    await control(rig, "0", "1")
    thief = await rig.link.client().subscribe(rig.link.client().new_inbox())
    pull = f"$JS.API.CONSUMER.MSG.NEXT.{NAMES.stream_ctl}.{topology.CONTROL}"
    api, resets = rig.link.api, 0

    async def slow(verb: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        nonlocal resets
        answer = await api(verb, *args, **kwargs)
        resets += verb.startswith("CONSUMER.RESET")
        if resets == 1 and verb.startswith("CONSUMER.RESET"):
            await rig.link.publish(pull, b'{"batch":2}', reply=thief.subject)
            assert [(await thief.next_msg(timeout=30)).data for _ in range(2)] == [b"0", b"1"]
            return await api(verb.replace("RESET", "INFO"))
        return answer

    monkeypatch.setattr(rig.link, "api", slow)
    reader = Reader(rig)
    await reader.have(2)
    assert reader.texts == ["0", "1"]
    assert resets == 2


async def test_an_owner_that_was_frozen_takes_nothing_from_the_one_after_it(rig: Rig) -> None:
    """It thaws, finds its consumer silent or its connection gone, and would reset it: what it then took would be
    missing for the new owner, and its numbers would fit, as it takes just as many as the new owner has had."""
    texts = [str(number) for number in range(8)]
    await control(rig, *texts)
    heir = Reader(rig, room=8)
    await heir.have(8)
    await heir.got[0].ack()
    await rig.publisher.publish(Message("ctl", NAMES.bind, b"8", {}))
    async with asyncio.timeout(PATIENCE_S):
        while (await heir.consumer.info())["num_ack_pending"] != 7:  # the ack has no answer of its own
            await asyncio.sleep(0.01)

    fence = Fence(lost_from=1)
    thawed = Reader(rig, room=8, check=fence)
    await until(lambda: fence.asked > 3 or len(thawed.got) == 8, "it tried")
    thawed.task.cancel()
    await asyncio.wait([thawed.task])
    await heir.got[1].ack()
    await rig.publisher.publish(Message("ctl", NAMES.bind, b"9", {}))
    await heir.have(10)
    assert heir.texts == [*texts, "8", "9"]
    assert thawed.got == []


@pytest.mark.parametrize("before", [1, 2, 3], ids=["before it looks", "before its reset", "before its pull"])
async def test_an_owner_that_loses_its_lease_on_the_way_stops_there(rig: Rig, before: int) -> None:
    await control(rig, "0")
    heir = Reader(rig)
    await heir.have(1)
    fence = Fence(lost_from=before)
    loser = Reader(rig, check=fence)
    await until(lambda: fence.asked > before + 2, "it tried again")
    assert loser.got == []
    assert loser.resets == (before == 3)
    fence.lost_from = float("inf")  # it was only paused
    await loser.have(1)
    assert loser.texts == ["0"]


async def test_what_happens_at_a_reset_is_over_before_the_first_delivery(rig: Rig) -> None:
    """What the owner before settled late is read then: it is not delivered any more."""
    await control(rig, "0")
    order: list[str] = []

    async def on_reset() -> None:
        order.append("reset")
        await asyncio.sleep(0.05)
        order.append("read")

    consumer = Consumer(rig.link, topology.consumer_of(NAMES, topology.CONTROL), room=8)
    rig.spawn(consumer.run(lambda delivery: order.append(delivery.data.decode()), on_reset))
    await until(lambda: len(order) == 3, "the delivery")
    assert order == ["reset", "read", "0"]


async def test_a_consumer_that_is_deleted_is_made_again_and_takes_nothing_for_new(rig: Rig) -> None:
    """The one before it may have delivered what is still there; what comes later is new."""
    await control(rig, "0", "1")
    first = Reader(rig)
    await first.have(2)
    await first.got[0].ack()
    while len(await rig.read(NAMES.stream_ctl, NAMES.bind)) > 1:
        await asyncio.sleep(0.01)
    first.task.cancel()
    await rig.link.api(f"CONSUMER.DELETE.{NAMES.stream_ctl}.{topology.CONTROL}")
    heir = Reader(rig)
    await heir.have(1)
    await control(rig, "2")
    await heir.have(2)
    assert [(delivery.data, delivery.suspect) for delivery in heir.got] == [(b"1", True), (b"2", False)]


async def test_a_consumer_that_is_paused_is_told_when_it_is_read(rig: Rig) -> None:
    await control(rig, "0")
    pause = f"CONSUMER.PAUSE.{NAMES.stream_ctl}.{topology.CONTROL}"
    await rig.link.api(pause, {"pause_until": "2999-01-01T00:00:00Z"})
    with capture_logs() as logs:
        reader = Reader(rig)
        await until(lambda: reader.resets > 0, "it is read")
    assert [line["event"] for line in logs] == ["consumer.paused"]
    await rig.link.api(pause, {})
    await reader.have(1)


async def test_a_stream_made_again_goes_on_above_its_old_sequences(rig: Rig) -> None:
    await control(rig, "0", "1")
    last = await rig.history.last(NAMES.stream_ctl, NAMES.bind)
    await rig.link.api(f"STREAM.DELETE.{NAMES.stream_ctl}")
    await topology.ensure(rig.link, NAMES, rig.bus.settings)
    assert last is not None
    assert await rig.first(NAMES.stream_ctl) > last.seq


async def test_an_inspector_names_streams_that_are_gone_and_buckets_that_were_emptied(rig: Rig) -> None:
    bucket, written = rig.bucket(NAMES.cursors), 0
    inspector = Inspector(NAMES, rig.bus.settings, rig.metrics, at_least={NAMES.cursors: lambda: written})
    for key in ("a", "b"):
        await bucket.update(key, b"x", 0)
        written += 1
    assert await inspector.look(rig.link) == []
    assert (inspector.purges(NAMES.cursors), inspector.messages(bucket.stream)) == (0, 2)
    await rig.link.api(f"STREAM.PURGE.{bucket.stream}")
    for _ in range(2):
        assert await inspector.look(rig.link) == []
    assert (inspector.purges(NAMES.cursors), rig.metrics.value("nats_purges_total")) == (1, 1)
    assert inspector.lacks(NAMES.cursors)
    for key in ("a", "b"):
        await bucket.update(key, b"x", 0)
    await inspector.look(rig.link)
    assert not inspector.lacks(NAMES.cursors)
    await rig.link.api(f"STREAM.DELETE.{NAMES.stream_dead}")
    assert await inspector.look(rig.link) == [NAMES.stream_dead]
    await topology.ensure(rig.link, NAMES, rig.bus.settings)
    assert await inspector.look(rig.link) == []


async def test_an_inspector_notices_a_bucket_that_was_set_back_with_all_its_keys(rig: Rig) -> None:
    """As after a restore, or on a disk that forgot: no key is missing, and whose bots are idle write none anew."""
    bucket = rig.bucket(NAMES.cursors)
    inspector = Inspector(NAMES, rig.bus.settings, rig.metrics, at_least={})
    revision = await bucket.update("a", b"old", 0)
    await bucket.update("a", b"new", revision)
    await inspector.look(rig.link)
    config = (await rig.link.api(f"STREAM.INFO.{bucket.stream}"))["config"]
    await rig.link.api(f"STREAM.DELETE.{bucket.stream}")
    await inspector.look(rig.link)
    assert inspector.purges(NAMES.cursors) == 0
    await rig.link.api(f"STREAM.CREATE.{bucket.stream}", config | {"first_seq": revision})
    await bucket.update("a", b"old", 0)
    for _ in range(2):
        await inspector.look(rig.link)
    assert (inspector.purges(NAMES.cursors), rig.metrics.value("nats_purges_total")) == (1, 1)
    assert not inspector.lacks(NAMES.cursors)


async def test_an_inspector_tells_what_was_changed_once_and_not_an_operators_own_limits(rig: Rig) -> None:
    inspector = Inspector(NAMES, rig.bus.settings, rig.metrics, at_least={})
    config = (await rig.link.api(f"STREAM.INFO.{NAMES.stream_out}"))["config"]
    changed = {key: value for key, value in config.items() if key != "subject_transform"}
    await rig.link.api(f"STREAM.UPDATE.{NAMES.stream_out}", changed | {"max_msgs_per_subject": 7})
    bucket = (await rig.link.api(f"STREAM.INFO.KV_{NAMES.bindings}"))["config"]
    await rig.link.api(f"STREAM.UPDATE.KV_{NAMES.bindings}", bucket | {"max_age": 3600 * topology.NS})
    with capture_logs() as logs:
        for _ in range(2):
            assert await inspector.look(rig.link) == []
    assert [(line["stream"], line["field"]) for line in logs if line["event"] == "stream.altered"] == [
        (NAMES.stream_out, "subject_transform"),
        (f"KV_{NAMES.bindings}", "max_age"),
    ]
    assert list(inspector.altered) == [NAMES.stream_out, f"KV_{NAMES.bindings}"]
    for name, before in ((NAMES.stream_out, config), (f"KV_{NAMES.bindings}", bucket)):
        await rig.link.api(f"STREAM.UPDATE.{name}", before)
    await inspector.look(rig.link)
    assert inspector.altered == {}


@pytest.mark.parametrize(
    ("answer", "leaderless"),
    [
        (b'{"error":{"code":503,"err_code":10008,"description":"JetStream system temporarily unavailable"}}', True),
        (b'{"error":{"code":404,"err_code":10059,"description":"stream not found"}}', False),
        (b'{"stream":"WECHAT_IN","seq":1}', False),
        (b"no JSON", False),
        (b"", False),
    ],
)
def test_a_server_that_knows_no_leader_counts_as_silent(answer: bytes, leaderless: bool) -> None:
    assert is_leaderless(answer) == leaderless


@pytest.mark.parametrize("said", [b"", b'{"config":', b"[]", b'{"error":5}', b"\xff"])
async def test_an_answer_that_nobody_can_read_is_an_outage_and_no_end(rig: Rig, said: bytes) -> None:
    """As a server gives it that cannot put what it knows into words: its clock stood at the year 10,000."""
    nc = await rig.bus.client()

    async def answer(msg: Msg) -> None:
        await msg.respond(said)

    await nc.subscribe("$JS.API.STRANGER", cb=answer)
    await nc.flush()
    with pytest.raises(Temporary, match="bus_unreadable"):
        await rig.link.api("STRANGER")
    await nc.close()


@pytest.mark.parametrize("said", [b"", b"[]", b"{}", b'{"error":5}', b"\xff"])
async def test_an_answer_about_a_lease_that_nobody_can_read_is_an_outage_and_no_end(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    async def request(*_: Any, **__: Any) -> Answer:
        return Answer(said, {})

    monkeypatch.setattr(rig.link, "request", request)
    register = LeaseRegister(rig.link, NAMES.members)
    with pytest.raises(Temporary):
        await register.get("me")
    if said != b"{}":
        with pytest.raises(Temporary):
            await register.write("me", b"x", 0)


# the streams ---------------------------------------------------------------------------------------------


async def test_what_is_missing_is_created_and_then_nothing_differs(bus: Bus) -> None:
    async with rig_on(bus, streams=False) as rig:
        assert await topology.ensure(rig.link, NAMES, bus.settings) == []
        missing, different = await topology.inspect(rig.link, NAMES, bus.settings)
        assert (missing, different) == ([], [])
        revision = await rig.link.api(f"STREAM.INFO.{NAMES.stream_out}")
        assert await topology.ensure(rig.link, NAMES, bus.settings) == []
        assert (await rig.link.api(f"STREAM.INFO.{NAMES.stream_out}"))["created"] == revision["created"]


async def test_replicas_that_start_at_once_do_not_hinder_each_other(bus: Bus) -> None:
    async with rig_on(bus, streams=False) as rig:
        results = await asyncio.gather(*(topology.ensure(rig.link, NAMES, bus.settings) for _ in range(3)))
        assert results == [[], [], []]


class TightNats(EmbeddedNats):
    """A server that has room for the two streams that reserve some, and no more."""

    def _write_config(self) -> Path:
        config = super()._write_config()
        config.write_text(config.read_text().replace("jetstream {", f"jetstream {{ max_file: {2 << 30}", 1))
        return config


async def test_a_stream_that_another_replica_was_faster_to_create_needs_no_room_of_its_own(tmp_path: Path) -> None:
    """Of replicas that started together some ended, and asked for more storage."""
    server = TightNats(tmp_path)
    await server.start()
    settings = Settings(nats_url=(server.url,), in_max_bytes=1 << 30, media_store_bytes=1 << 30)
    link = Link(settings, "test")
    running = asyncio.create_task(link.run())
    try:
        await link.wait_up(PATIENCE_S)
        await topology.ensure(link, NAMES, settings)
        for wanted in topology.streams(NAMES, settings):
            await topology.create(link, wanted)  # by whoever has looked before they were there
    finally:
        running.cancel()
        await asyncio.wait([running])
        server.kill()


class OldServer(Link):
    """A server that takes newer options without a word and ignores them."""

    def __init__(self, level: int | None) -> None:
        self.level = level

    async def api(self, verb: str, body: dict[str, Any] | None = None, timeout_s: float = 5.0) -> dict[str, Any]:
        assert verb == "INFO", "nothing is created on it"
        return {} if self.level is None else {"api": {"level": self.level}}


class NewServer(OldServer):
    """One that has nothing yet, takes some time for each wish, and refuses what it is told to."""

    def __init__(self, *refused: str) -> None:
        super().__init__(topology.API_LEVEL)
        self.refused = refused
        self.created: list[str] = []
        self.at_once = self.most = 0

    async def api(self, verb: str, body: dict[str, Any] | None = None, timeout_s: float = 5.0) -> dict[str, Any]:
        if verb == "INFO":
            return await super().api(verb)
        if ".CREATE." not in verb:
            raise BusRefused(NO_STREAM, "stream not found")
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        self.created.append(verb)
        if verb.rpartition(".")[2] in self.refused:
            raise BusRefused(10047, "insufficient storage resources available")
        return {}


async def test_what_is_missing_is_created_some_at_a_time_and_streams_first() -> None:
    """Each waits for a disk, in a cluster for those of a majority: one after the other took half a minute there."""
    server = NewServer()
    await topology.ensure(server, NAMES, Settings())
    streams, consumers = topology.streams(NAMES, Settings()), topology.consumers(NAMES)
    kinds = [verb.partition(".")[0] for verb in server.created]
    assert kinds == ["STREAM"] * len(streams) + ["CONSUMER"] * len(consumers)
    assert {verb.rpartition(".")[2] for verb in server.created} == {each.name for each in [*streams, *consumers]}
    assert server.most == topology.CREATED_AT_ONCE


async def test_the_first_that_cannot_be_created_is_named_and_none_is_left_on_its_way() -> None:
    media = f"OBJ_{NAMES.media}"
    server = NewServer(media, NAMES.stream_out)
    with pytest.raises(SettingsError, match=rf"stream {NAMES.stream_out} cannot be created: 10047 .*MAX_BYTES"):
        await topology.ensure(server, NAMES, Settings())
    assert server.at_once == 0
    assert not [verb for verb in server.created if verb.startswith("CONSUMER")]


async def test_a_stream_that_would_break_a_guarantee_stops_the_start_with_a_sentence(bus: Bus) -> None:
    async with rig_on(bus, streams=False) as rig:
        config = {"name": NAMES.stream_out, "subjects": ["wechat.out", "wechat.out.*"], "retention": "limits"}
        await rig.link.api(f"STREAM.CREATE.{NAMES.stream_out}", config)
        with pytest.raises(SettingsError) as caught:
            await topology.ensure(rig.link, NAMES, bus.settings)
        assert caught.value.reason == "stream_differs"
        for word in (NAMES.stream_out, "retention", "workqueue", "doctor --fix"):
            assert word in caught.value.detail
        assert (await rig.link.api(f"STREAM.INFO.{NAMES.stream_out}"))["config"]["retention"] == "limits"


async def test_an_operators_own_limits_are_only_told_and_never_changed(bus: Bus) -> None:
    async with rig_on(bus, streams=False) as rig:
        (wanted,) = [w for w in topology.streams(NAMES, bus.settings) if w.name == NAMES.stream_in]
        await rig.link.api(f"STREAM.CREATE.{wanted.name}", {**wanted.config, "max_msgs_per_subject": 7})
        with capture_logs() as logs:
            (difference,) = await topology.ensure(rig.link, NAMES, bus.settings)
        assert (difference.field, difference.found, difference.critical) == ("max_msgs_per_subject", 7, False)
        assert "stream.differs" in [line["event"] for line in logs]
        info = await rig.link.api(f"STREAM.INFO.{wanted.name}")
        assert info["config"]["max_msgs_per_subject"] == 7

        await topology.alter(rig.link, NAMES, bus.settings, difference)
        assert await topology.ensure(rig.link, NAMES, bus.settings) == []


@pytest.mark.parametrize("level", [None, 0, 3])
async def test_a_server_that_is_too_old_is_refused(level: int | None) -> None:
    with pytest.raises(SettingsError) as caught:
        await topology.ensure(OldServer(level), NAMES, Settings())
    assert caught.value.reason == "server_too_old"
    assert "2.14" in caught.value.detail


async def test_a_user_without_jetstream_is_told_so() -> None:
    class Forbidden(OldServer):
        async def api(self, verb: str, body: dict[str, Any] | None = None, timeout_s: float = 5.0) -> dict[str, Any]:
            raise BusRefused(10039, "jetstream not enabled for account")

    with pytest.raises(SettingsError, match="JetStream"):
        await topology.ensure(Forbidden(0), NAMES, Settings())


async def test_a_sandboxs_shard_is_the_servers(rig: Rig) -> None:
    """The transform's partition() and ours, for 300 names; and plain wechat.out stays as it is."""
    names = [f"sandbox-{number}" for number in range(290)]
    names += ["a", "_", "-", "0", "z" * 64, "a_b-c", "s1", "s2", "00000000", "x-y_z"]
    await rig.publisher.publish_all([Message("out", NAMES.out(name), name.encode(), {}) for name in names])
    await rig.publisher.publish(Message("out", NAMES.out_plain, b"plain", {}))
    nc = await rig.bus.client()
    stored = {}
    first = await rig.first(NAMES.stream_out)
    for seq in range(first, first + len(names) + 1):
        msg = await nc.jetstream().get_msg(NAMES.stream_out, seq)
        stored[(msg.data or b"").decode()] = msg.subject
    await nc.close()
    assert stored.pop("plain") == NAMES.out_plain
    assert stored == {name: f"wechat.out.{shard_of(name)}.{name}" for name in names}
    assert len({shard_of(name) for name in names}) > SHARDS / 2


async def test_what_is_stored_inbound_reaches_a_plain_subscriber_with_its_sequence(rig: Rig) -> None:
    nc = await rig.bus.client()
    heard = await nc.subscribe(NAMES.live("s1"))
    await nc.flush()
    for number in range(2):
        await rig.publisher.publish(Message("in", NAMES.inbox("s1"), str(number).encode(), {H_MSG_ID: f"i{number}"}))
    await rig.publisher.publish(Message("in", NAMES.inbox("s1"), b"1", {H_MSG_ID: "i1"}))
    first, second = await heard.next_msg(5), await heard.next_msg(5)
    assert (first.data, second.data) == (b"0", b"1")
    assert second.headers is not None
    seq = await rig.first(NAMES.stream_in)
    assert (second.headers["Nats-Sequence"], second.headers["Nats-Last-Sequence"]) == (str(seq + 1), str(seq))
    with pytest.raises(nats.errors.TimeoutError):
        await heard.next_msg(0.1)
    await nc.close()


async def test_a_sandbox_whose_queue_is_full_is_refused_and_others_are_not(bus: Bus) -> None:
    bus.settings = msgspec.structs.replace(bus.settings, out_max_per_sandbox=2)
    async with rig_on(bus) as rig:
        for _ in range(2):
            await rig.publisher.publish(Message("out", NAMES.out("s1"), b"x", {}))
        with pytest.raises(BusRefused):
            await rig.publisher.publish(Message("out", NAMES.out("s1"), b"x", {}))
        await rig.publisher.publish(Message("out", NAMES.out("s2"), b"x", {H_COMMAND: "c1"}))


# services ------------------------------------------------------------------------------------------------


async def answer_of(bus: Bus, verb: str, payload: bytes = b"") -> tuple[bytes, dict[str, str]]:
    nc = await bus.client()
    msg = await nc.request(NAMES.svc(verb), payload, timeout=5)
    await nc.close()
    return msg.data, msg.headers or {}


async def serve(bus: Bus, group: asyncio.TaskGroup) -> tuple[Link, asyncio.Task[None]]:
    async def echo(data: bytes) -> bytes:
        return data

    async def not_bound(data: bytes) -> bytes:
        raise Refused("not_bound", "Nothing is bound\nunder that näme.")

    async def invalid(data: bytes) -> bytes:
        raise Refused("invalid", "Name a `bot`.")

    async def away(data: bytes) -> bytes:
        raise Temporary("bus_down")

    async def bug(data: bytes) -> bytes:
        raise RuntimeError("SECRET")

    link = Link(bus.settings, "service")
    handlers: dict[str, Handler] = {
        "echo": echo,
        "not.bound": not_bound,
        "invalid": invalid,
        "away": away,
        "bug": bug,
    }
    Services(link, NAMES, handlers, version="1.2.3", instance="r1")
    task = group.create_task(link.run())
    await link.wait_up(PATIENCE_S)
    return link, task


async def test_services_answer_and_errors_say_what_to_do_in_headers(bus: Bus) -> None:
    async with asyncio.TaskGroup() as group:
        _, task = await serve(bus, group)
        data, headers = await answer_of(bus, "echo", b"hello")
        assert (data, headers[H_SCHEMA]) == (b"hello", "1")
        found = {}
        for verb in ("not.bound", "invalid", "away", "bug"):
            data, headers = await answer_of(bus, verb)
            found[verb] = headers[H_ERROR_CODE]
            assert headers[H_ERROR]
            assert "SECRET" not in str(headers) + data.decode()
        assert found == {"not.bound": "404", "invalid": "400", "away": "503", "bug": "500"}
        task.cancel()


async def test_services_are_there_again_after_a_kill(bus: Bus) -> None:
    async with asyncio.TaskGroup() as group:
        link, task = await serve(bus, group)
        bus.kill()
        await bus.start()
        await until(lambda: link.epoch == 2, "it is connected again")
        assert (await answer_of(bus, "echo", b"again"))[0] == b"again"
        task.cancel()


async def test_an_answer_that_comes_after_its_connection_is_no_crash(bus: Bus) -> None:
    held = asyncio.Event()

    async def slow(_: bytes) -> bytes:
        held.set()
        await gone.wait()
        return b"late"

    gone = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        link = Link(bus.settings, "service")
        Services(link, NAMES, {"slow": slow}, version="1.0.0", instance="r1")
        task = group.create_task(link.run())
        await link.wait_up(PATIENCE_S)
        nc = await bus.client()
        await nc.publish(NAMES.svc("slow"), b"", reply=nc.new_inbox())
        await held.wait()
        bus.kill()
        await bus.start()
        await until(lambda: link.epoch == 2, "it is connected again")
        with capture_logs() as logs:
            gone.set()
            await until(lambda: any(one["event"] == "service.unanswered" for one in logs), "it is said")
        assert not [one for one in logs if one["log_level"] == "error"]
        task.cancel()


async def test_of_two_replicas_one_answers(bus: Bus) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [(await serve(bus, group))[1] for _ in range(2)]
        nc = await bus.client()
        inbox = nc.new_inbox()
        answers = await nc.subscribe(inbox)
        await nc.publish(NAMES.svc("echo"), b"x", reply=inbox)
        await answers.next_msg(5)
        with pytest.raises(nats.errors.TimeoutError):
            await answers.next_msg(0.1)
        await nc.close()
        for task in tasks:
            task.cancel()


async def test_a_durable_is_made_once_and_left_as_its_reader_has_it(rig: Rig) -> None:
    teller = BusTeller(rig.link, NAMES)
    await teller.make_durable("s1")
    await teller.make_durable("s1")
    verb = f"CONSUMER.INFO.{NAMES.stream_in}.s1"
    info = await rig.link.api(verb)
    assert (info["config"]["filter_subject"], info["config"]["ack_policy"]) == (NAMES.inbox("s1"), "explicit")
    changed = {"stream_name": NAMES.stream_in, "action": "update", "config": {**info["config"], "max_ack_pending": 7}}
    await rig.link.api(f"CONSUMER.CREATE.{NAMES.stream_in}.s1.{NAMES.inbox('s1')}", changed)
    await teller.make_durable("s1")
    assert (await rig.link.api(verb))["config"]["max_ack_pending"] == 7


async def test_what_is_told_needs_no_stream(rig: Rig) -> None:
    nc = await rig.bus.client()
    inbox = nc.new_inbox()
    answers = await nc.subscribe(inbox)
    await nc.flush()
    await BusTeller(rig.link, NAMES).tell(inbox, msgspec.json.encode({"ok": True}), {H_SCHEMA: "1"})
    assert (await answers.next_msg(5)).data == b'{"ok":true}'
    await nc.close()


async def test_all_replicas_are_asked_at_once_and_waited_for_no_longer_than_needed(rig: Rig) -> None:
    """One that says nothing costs the time, not the answers of the others."""
    subject, teller = NAMES.roll(), BusTeller(rig.link, NAMES)
    assert await teller.gather(subject, b"?", count=1, within_s=PATIENCE_S) == []  # nobody listens
    async with asyncio.TaskGroup() as group:
        links = [Link(rig.bus.settings, f"replica {number}") for number in range(3)]
        for number, link in enumerate(links):
            answer = f"{number}".encode() if number < 2 else None
            BusTeller(link, NAMES).reply(subject, lambda data, answer=answer: answer and data + answer)  # type: ignore[misc]
        tasks = [group.create_task(link.run()) for link in links]
        for link in links:
            await link.wait_up(PATIENCE_S)
        assert sorted(await teller.gather(subject, b"?", count=2, within_s=PATIENCE_S)) == [b"?0", b"?1"]
        assert sorted(await teller.gather(subject, b"?", count=3, within_s=0.3)) == [b"?0", b"?1"]
        nc = await rig.bus.client()
        await nc.subscribe("elsewhere", cb=_forbidden)
        await nc.publish(subject, b"?", reply="elsewhere")  # only an inbox is answered
        assert sorted(await teller.gather(subject, b"?", count=2, within_s=PATIENCE_S)) == [b"?0", b"?1"]
        await nc.flush()
        await nc.close()
        for task in tasks:
            task.cancel()


async def _forbidden(msg: Any) -> None:
    raise AssertionError(msg)


async def test_the_newest_messages_are_found_behind_what_was_deleted(rig: Rig) -> None:
    stream, subject = NAMES.stream_dead, NAMES.dead("*")
    assert await rig.history.newest(stream, subject, count=3) == []
    for number in range(1, 41):
        await rig.publisher.publish(Message("dead", NAMES.dead(f"X{number % 2}"), b"%d" % number, {}))

    async def newest(**where: Any) -> list[int]:
        return [stored.seq for stored in await rig.history.newest(stream, subject, **where)]

    assert await newest(count=3) == [40, 39, 38]
    assert await newest(count=3, before=38) == [37, 36, 35]
    assert await newest(count=3, before=1) == []
    for seq in range(5, 39):
        await rig.history.delete(stream, seq)
    assert await newest(count=3) == [40, 39]
    assert await newest(count=3, before=39) == [4, 3, 2]
    assert await newest(count=3, before=2) == [1]
    found = await rig.history.get(stream, 40)
    assert found is not None
    assert (found.subject, found.data) == (NAMES.dead("X0"), b"40")
    assert await rig.history.get(stream, 20) is None
    assert await rig.history.get(stream, 99) is None


async def test_who_asks_for_a_connection_that_is_being_made_does_not_spoil_it(rig: Rig) -> None:
    rig.bus.kill()
    await until(lambda: not rig.link.up, "the connection is gone")

    async def ask() -> None:
        while True:
            with contextlib.suppress(Temporary):
                rig.link.client()
            await asyncio.sleep(0)

    rig.spawn(ask())
    await rig.bus.start()
    await rig.link.wait_up(PATIENCE_S)
    for _ in range(20):
        await rig.link.api("INFO")
    assert rig.link.epoch == 2


# clearing up ---------------------------------------------------------------------------------------------


async def test_a_key_can_be_removed_without_a_trace_unless_it_was_written_again(rig: Rig) -> None:
    bucket = rig.bucket()
    before_ms = SystemClock().now_ms()
    first = await bucket.update("a", b"1", 0)
    other = await bucket.update("b", b"1", 0)
    gone = await bucket.delete("b", other)
    assert sorted(await bucket.keys()) == ["a", "b"]
    found = {key: await bucket.written(key) for key in ("a", "b", "c")}
    assert found["c"] is None
    assert found["a"] is not None
    assert found["b"] is not None
    assert [(one.revision, one.deleted) for one in (found["a"], found["b"])] == [(first, False), (gone, True)]
    assert all(before_ms - 1000 <= one.time_ms <= SystemClock().now_ms() + 1000 for one in found.values() if one)
    second = await bucket.update("a", b"2", first)
    await bucket.purge("a", first)
    await bucket.purge("b", gone)
    assert await bucket.keys() == ["a"]
    assert await bucket.get("a") == Entry("a", b"2", second)
    assert await bucket.update("b", b"3", 0) > second  # as if it had never been


async def test_a_follower_forgets_what_is_there_no_more(rig: Rig) -> None:
    """Logins come and go, each under a name of its own."""
    bucket = rig.bucket(NAMES.logins)
    more = await looks(rig, bucket)
    rig.spawn(bucket.follow(lambda entry: None, reload_s=0.05))
    counts = []
    for round_ in range(3):
        keys = [f"k{round_}-{number}" for number in range(50)]
        revisions = await asyncio.gather(*(bucket.update(key, b"x", 0) for key in keys))
        for key, revision in zip(keys, revisions, strict=True):
            await bucket.purge(key, revision)
        await more(3)
        counts.append(census())
    assert growing(*counts, by=45) == []


async def test_a_sandbox_that_asks_without_end_leaves_room_for_the_others(bus: Bus) -> None:
    """It is told so at once; when its requests are answered it may ask again."""
    held = asyncio.Event()
    served: list[str] = []

    async def slow(asked: Asked) -> Answered:
        served.append(asked.sandbox)
        if asked.sandbox == "bad":
            await held.wait()
        return Answered(b"done", {})

    async with asyncio.TaskGroup() as group:
        link = Link(bus.settings, "service")
        Services(link, NAMES, {}, version="1.0.0", instance="r1", of_sandbox={"slow": slow})
        task = group.create_task(link.run())
        await link.wait_up(PATIENCE_S)
        nc = await bus.client()
        flood = [
            group.create_task(nc.request(f"{NAMES.svc('slow')}.bad", b"", timeout=PATIENCE_S))
            for _ in range(AT_ONCE + 100)
        ]
        answer = await nc.request(f"{NAMES.svc('slow')}.good", b"", timeout=PATIENCE_S)
        assert answer.data == b"done"
        await until(lambda: sum(one.done() for one in flood) == AT_ONCE + 100 - OF_ONE, "the others are refused")
        held.set()
        codes = Counter([((await one).headers or {}).get(H_ERROR_CODE, "") for one in flood])
        assert codes == {"": OF_ONE, "429": AT_ONCE + 100 - OF_ONE}
        assert (await nc.request(f"{NAMES.svc('slow')}.bad", b"", timeout=PATIENCE_S)).data == b"done"
        assert Counter(served) == {"bad": OF_ONE + 1, "good": 1}
        await nc.close()
        task.cancel()
