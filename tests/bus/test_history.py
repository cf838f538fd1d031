"""Reading streams back, from any server and from the leader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.msg import Msg

from adapter.jetstream import topology
from adapter.jetstream.api_replies import is_only_leader
from adapter.jetstream.consumer import Consumer
from adapter.jetstream.history import StreamHistory, direct_get
from adapter.ports import BusMessage, Heads, PubAck, StoredMessage
from adapter.tools.timing import SystemClock
from tests.bus.rig import NAMES, Rig, control, event, store_all
from tests.e2e.waiting import until


async def test_a_stream_is_read_from_a_sequence_or_a_time(rig: Rig) -> None:
    subject = NAMES.event("s1", "receipt")
    await store_all(rig.publisher, [event(number, f"s{number % 2}") for number in range(600)])
    odd = [str(number).encode() for number in range(1, 600, 2)]
    first = await rig.first(NAMES.stream_event)
    assert await rig.read(NAMES.stream_event, subject) == odd
    assert await rig.read(NAMES.stream_event, subject, after=first + 595) == odd[-2:]
    assert await rig.read(NAMES.stream_event, subject, after=first + 10_000) == []
    assert await rig.read(NAMES.stream_event, subject, since_ms=0) == odd
    assert await rig.read(NAMES.stream_event, subject, since_ms=SystemClock().now_ms() + 60_000) == []
    assert len(await rig.read(NAMES.stream_event, NAMES.event("*", "receipt"))) == 600
    last = await rig.history.read_last(NAMES.stream_event, subject)
    assert last is not None
    assert (last.data, last.seq) == (b"599", first + 599)
    assert await rig.history.read_last(NAMES.stream_event, NAMES.event("nobody", "receipt")) is None
    assert await rig.history.count(NAMES.stream_event) == 600


async def test_a_purge_keeps_the_newest_over_all_subjects_of_a_wildcard(rig: Rig) -> None:
    """The receipts of one sandbox: of each command there may be one, and the subjects together are bounded."""
    sandboxes = ["s1", "s1", "s2"]
    receipts = [
        BusMessage("event", NAMES.receipt(sandboxes[number % 3], f"c{number}", number), str(number).encode(), {})
        for number in range(600)
    ]
    await store_all(rig.publisher, [*receipts, event(1, "s1")])
    everything = NAMES.receipts("s1")
    before = await rig.read(NAMES.stream_event, everything)
    for _ in range(2):
        await rig.history.purge(NAMES.stream_event, everything, keep=100)
        assert await rig.read(NAMES.stream_event, everything) == before[-100:]
    assert len(await rig.read(NAMES.stream_event, NAMES.receipts("s2"))) == 200
    assert await rig.read(NAMES.stream_event, NAMES.event("s1", "receipt")) == [b"1"]


async def test_what_is_large_is_read_whole_and_never_more_at_once_than_a_server_lets_wait(rig: Rig) -> None:
    """It cuts off who lets too much wait, and after the next connect all of it would come again."""
    config = (await rig.connection.api_request(f"STREAM.INFO.{NAMES.stream_out}"))["config"]
    await rig.connection.api_request(f"STREAM.UPDATE.{NAMES.stream_out}", config | {"max_msg_size": -1})
    large = [bytes([number]) * 700_000 for number in range(12)]
    await store_all(rig.publisher, [BusMessage("out", NAMES.out("s1"), data, {}) for data in large])
    asked: list[Msg] = []

    async def on_message(msg: Msg) -> None:
        asked.append(msg)

    assert rig.connection.nc is not None
    for verb in (f"DIRECT.GET.{NAMES.stream_out}", f"CONSUMER.MSG.NEXT.{NAMES.stream_out}.*"):
        await rig.connection.nc.subscribe(f"$JS.API.{verb}", cb=on_message)
    assert await rig.read(NAMES.stream_out, NAMES.out_of_sandbox("s1")) == large

    name = topology.partition_consumer(NAMES.partition_of("s1"))
    consumer = Consumer(rig.connection, *topology.consumer_config(NAMES, name))
    got: list[bytes] = []
    rig.spawn(consumer.run(lambda delivery: got.append(delivery.data)))
    await until(lambda: len(got) == len(large), "all are delivered")
    assert got == large
    bounds = [msgspec.json.decode(msg.data)["max_bytes"] for msg in asked]
    assert len(bounds) >= len(large)
    assert set(bounds) == {1024 * 1024}


async def test_a_message_is_deleted_once_and_deleting_it_again_is_no_error(rig: Rig) -> None:
    subject = NAMES.inbox("s1", "p")
    acks = [await rig.publisher.store(BusMessage("in", subject, str(n).encode(), {})) for n in range(3)]
    for _ in range(2):
        await rig.history.delete(NAMES.stream_in, acks[1].seq)
    assert await rig.read(NAMES.stream_in, subject) == [b"0", b"2"]
    await rig.history.delete(NAMES.stream_in, 999)


def on_disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*.blk"))


@pytest.mark.parametrize("erase", [True, False])
async def test_what_is_erased_is_not_on_the_disk_any_more(rig: Rig, erase: bool, tmp_path: Path) -> None:
    """As an erased person's words. A mere deletion leaves them there while a later message shares their block."""
    (ack, _) = await store_all(rig.publisher, [msgspec.structs.replace(event(number), payload=b"secret %d" % number)
                                                for number in range(2)])  # fmt: skip
    assert isinstance(ack, PubAck)
    await rig.history.delete(NAMES.stream_event, ack.seq, erase=erase)
    assert await rig.read(NAMES.stream_event, NAMES.event("s1", "*")) == [b"secret 1"]
    rig.bus.kill()
    disk = on_disk(tmp_path / "nats")
    assert b"secret 1" in disk
    assert (b"secret 0" in disk) is not erase
    await rig.bus.start()


async def test_a_replicated_history_ends_where_the_leader_has_no_more(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that lags knows of the first message only."""
    await control(rig, "0", "1", "2")
    asked = 0

    async def lagging(*query: Any) -> tuple[list[StoredMessage], dict[str, str]]:
        nonlocal asked
        asked += 1
        found, end = await direct_get(*query)
        return (found[:1] if asked == 1 else found), end

    monkeypatch.setattr("adapter.jetstream.history.direct_get", lagging)
    asking = StreamHistory(rig.connection, replicated=True)
    found = [stored.data async for stored in asking.read(NAMES.stream_out, NAMES.out_plain)]
    assert (found, asked) == ([b"0", b"1", b"2"], 2)


async def test_a_history_that_asks_the_leader_ends_as_one_that_does_not(rig: Rig) -> None:
    asking = StreamHistory(rig.connection, replicated=True)
    await control(rig, *(str(number) for number in range(450)))
    first = await rig.first(NAMES.stream_out)
    moment_ms = SystemClock().now_ms() + 1000
    for stream, subject, bounds in (
        (NAMES.stream_out, NAMES.out_plain, {}),
        (NAMES.stream_out, NAMES.out_plain, {"after": first + 448}),
        (NAMES.stream_out, NAMES.out_plain, {"after": first + 449}),
        (NAMES.stream_out, NAMES.out_plain, {"since_ms": 1}),
        (NAMES.stream_out, NAMES.out_plain, {"since_ms": moment_ms}),
        (NAMES.stream_out, NAMES.out_of_sandbox("s1"), {}),
    ):
        found = [stored.seq async for stored in asking.read(stream, subject, **bounds)]
        assert found == [stored.seq async for stored in rig.history.read(stream, subject, **bounds)]
    last = await asking.read_last(NAMES.stream_out, NAMES.out_plain)
    assert last is not None
    assert (last.seq, last.data) == (first + 449, b"449")
    assert await asking.read_last(NAMES.stream_out, NAMES.out_of_sandbox("s1")) is None


async def test_the_newest_messages_are_found_behind_what_was_deleted(rig: Rig) -> None:
    stream, subject = NAMES.stream_dead, NAMES.dead_letters("*")
    assert await rig.history.read_newest(stream, subject, count=3) == []
    for number in range(1, 41):
        await rig.publisher.store(BusMessage("dead", NAMES.dead_letters(f"X{number % 2}"), b"%d" % number, {}))

    async def newest(**where: Any) -> list[int]:
        return [stored.seq for stored in await rig.history.read_newest(stream, subject, **where)]

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
    assert (found.subject, found.data) == (NAMES.dead_letters("X0"), b"40")
    assert await rig.history.get(stream, 20) is None
    assert await rig.history.get(stream, 99) is None


@pytest.mark.parametrize(
    ("followers", "expected"),
    [
        (None, True),  # a server of its own
        ([{"active": 400_000_000}, {"active": 0}], True),
        ([{"active": 400_000_000}, {"active": 60_000_000_000}], True),
        ([{"active": 4_000_000_000}, {"active": 5_000_000_000}], False),
        ([{"active": 0}, {"active": 0}], False),  # it has never heard from one
        ([{"active": 1}, {"active": 0}, {"active": 0}, {"active": 0}], False),
        ([{"active": 1}, {"active": 1}, {"active": 0}, {"active": 0}], True),
    ],
)
def test_a_leader_that_has_heard_from_no_majority_may_be_none(
    followers: list[dict[str, int]] | None, *, expected: bool
) -> None:
    assert is_only_leader({"leader": "n0", "replicas": followers} if followers else None) == expected


async def test_the_heads_of_subjects_are_those_from_a_sequence_on(rig: Rig) -> None:
    def said(person: str, number: int) -> BusMessage:
        return BusMessage("in", NAMES.inbox("s1", person), str(number).encode(), {})

    stream, subject = NAMES.stream_in, NAMES.inbox("s1")
    assert await rig.history.read_heads(stream, subject, start=1) == Heads([], 0, is_cut=False)
    await store_all(rig.publisher, [said(person, number) for number, person in enumerate("abcabd")])
    await rig.publisher.store(BusMessage("in", NAMES.inbox("s2", "a"), b"another's", {}))
    first, last = await rig.history.first_and_last(stream)
    assert last == first + 6 == await rig.history.last_sequence(stream)
    for asking in (rig.history, StreamHistory(rig.connection, replicated=True)):
        for start, wanted in ((1, b"2345"), (first + 4, b"45"), (first + 5, b"5"), (last, b""), (last + 9, b"")):
            heads = await asking.read_heads(stream, subject, start=start)
            assert heads is not None
            assert (b"".join(stored.data for stored in heads.messages), heads.up_to) == (wanted, last)
        nobody = await asking.read_heads(stream, NAMES.inbox("s3"), start=1)
        assert nobody == Heads([], 0, is_cut=False)


async def test_heads_that_are_many_bytes_are_cut_and_of_too_many_subjects_there_are_none(rig: Rig) -> None:
    stream, subject = NAMES.stream_in, NAMES.inbox("s1")
    large = [BusMessage("in", NAMES.inbox("s1", f"p{number}"), bytes(400_000), {}) for number in range(5)]
    await store_all(rig.publisher, large)
    found, start, is_cut = [], 1, True
    while is_cut:
        heads = await rig.history.read_heads(stream, subject, start=start)
        assert heads is not None
        found += [stored.subject for stored in heads.messages]
        start, is_cut = heads.messages[-1].seq + 1, heads.is_cut
        assert len(heads.messages) < len(large)
    assert found == [message.subject for message in large]
    await store_all(rig.publisher, [BusMessage("in", NAMES.inbox("s1", f"q{n}"), b"", {}) for n in range(1020)])
    assert await rig.history.read_heads(stream, subject, start=1) is None


@pytest.mark.parametrize("known", [2, 0])
async def test_heads_are_as_new_as_the_leader(rig: Rig, monkeypatch: pytest.MonkeyPatch, known: int) -> None:
    """A server that lags knows of the first messages, or of none."""
    stream, subject = NAMES.stream_in, NAMES.inbox("s1")
    persons = "abca"
    await store_all(rig.publisher, [BusMessage("in", NAMES.inbox("s1", person), b"", {}) for person in persons])
    first, last = await rig.history.first_and_last(stream)
    asked = 0

    async def lagging(*query: Any) -> tuple[list[StoredMessage], dict[str, str]]:
        nonlocal asked
        asked += 1
        found, end = await direct_get(*query)
        if asked > 2:
            return found, end
        if not known:
            return [], {"Status": "404"}
        old = [stored._replace(headers={}) for stored in found if stored.seq < first + known]
        return old, {"Nats-UpTo-Sequence": str(first + known - 1)}

    monkeypatch.setattr("adapter.jetstream.history.direct_get", lagging)
    heads = await StreamHistory(rig.connection, replicated=True).read_heads(stream, subject, start=first)
    assert heads is not None
    assert ([stored.subject[-1] for stored in heads.messages], heads.up_to, asked) == (["b", "c", "a"], last, 3)
