"""Publishing: order and loss across kills, and what no stream will take."""

from __future__ import annotations

import asyncio
import itertools

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.contract.names import H_MSG_ID
from adapter.errors import BusRefused, LeaseLost
from adapter.jetstream import topology
from adapter.ports import BusMessage, PubAck
from tests.bus.rig import NAMES, PATIENCE_S, Fence, Rig, event, store_all
from tests.e2e.waiting import until


async def test_messages_keep_the_order_of_their_calls(rig: Rig) -> None:
    acks = await asyncio.gather(*(rig.publisher.store(event(number)) for number in range(500)))
    assert [ack.seq - acks[0].seq for ack in acks] == list(range(500))
    assert await rig.read(NAMES.stream_event, NAMES.event("s1", "receipt")) == [
        str(number).encode() for number in range(500)
    ]


async def test_a_repeat_is_acknowledged_as_one(rig: Rig) -> None:
    first = await rig.publisher.store(event(1))
    again = await rig.publisher.store(event(1))
    assert (first.duplicate, again.duplicate, again.seq) == (False, True, first.seq)


async def test_kills_of_the_server_cost_neither_a_message_nor_the_order(rig: Rig) -> None:
    """kill -9 three times while hundreds are on their way: each caller waits, and is answered once."""
    numbers = itertools.count()
    acks: dict[int, PubAck] = {}
    stop = False

    async def produce() -> None:
        while not stop:
            batch = [next(numbers) for _ in range(20)]
            for number, ack in zip(batch, await store_all(rig.publisher, [event(n) for n in batch]), strict=True):
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
    large = BusMessage("event", NAMES.event("s1", "receipt"), b"x" * (rig.connection.max_payload + 1), {})
    acks = await store_all(rig.publisher, [event(0), large, event(1)])
    assert [isinstance(ack, BusRefused) for ack in acks] == [False, True, False]
    with pytest.raises(BusRefused):
        await rig.publisher.store(large)
    assert rig.connection.epoch == 1, "the connection was not spent on it"


@pytest.mark.parametrize("over", [-2000, -200, -20, 0, 20])
async def test_headers_count_against_the_largest_message(rig: Rig, over: int) -> None:
    """Refused here or stored there, never a connection broken by the server."""
    headers = {H_MSG_ID: "x" * 100, "traceparent": "é" * 50}
    message = BusMessage("event", NAMES.event("s1", "receipt"), b"x" * (rig.connection.max_payload + over), headers)
    (ack,) = await store_all(rig.publisher, [message])
    assert isinstance(ack, PubAck | BusRefused)
    await rig.publisher.store(event(1))
    assert rig.connection.epoch == 1


async def test_what_the_client_will_not_write_is_refused_and_delays_nobody(rig: Rig) -> None:
    acks = await store_all(
        rig.publisher, [event(0), msgspec.structs.replace(event(1), headers={"(odd)": "x"}), event(2)]
    )
    first = await rig.first(NAMES.stream_event)
    assert [ack.seq if isinstance(ack, PubAck) else type(ack) for ack in acks] == [first, BusRefused, first + 1]


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
    waiting = asyncio.create_task(rig.publisher.store(BusMessage("event", "late.1", b"x", {})))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await rig.connection.api_request("STREAM.CREATE.LATE", {"name": "LATE", "subjects": ["late.*"]})
    async with asyncio.timeout(PATIENCE_S):
        assert (await waiting).seq == 1
    assert rig.metrics.value("nats_publish_total", stream="event", outcome="retried") >= 1
    assert rig.metrics.value("nats_publish_duration_seconds_sum", stream="event") > 0.2, "since it was first written"


OTHERS = (NAMES.stream_in, f"KV_{NAMES.persons}")


async def others_go_on(rig: Rig, first: int = 0) -> None:
    """What is written to other streams than that of events is stored, and who asks is told that it can be."""
    inbox, numbers = NAMES.inbox("s1", "p"), range(first, first + 20)
    async with asyncio.timeout(PATIENCE_S):
        await store_all(rig.publisher, [BusMessage("in", inbox, b"%d" % n, {H_MSG_ID: f"i{n}"}) for n in numbers])
        await asyncio.gather(*(rig.bucket().update(f"k{number}", b"1", 0) for number in numbers))
        await rig.publisher.wait_writable(OTHERS)
    assert await rig.read(NAMES.stream_in, inbox) == [b"%d" % number for number in range(first + 20)]


async def test_a_deleted_stream_delays_what_is_written_to_it_and_nothing_else(rig: Rig) -> None:
    (wanted,) = [w for w in topology.wanted_streams(NAMES, rig.bus.settings) if w.name == NAMES.stream_event]
    await others_go_on(rig)
    await rig.connection.api_request(f"STREAM.DELETE.{NAMES.stream_event}")
    waiting = asyncio.create_task(store_all(rig.publisher, [event(0), event(1)]))
    with capture_logs() as logs:
        await until(lambda: any(line["event"] == "publish.retrying" for line in logs), "it says that it waits")
        later = asyncio.create_task(rig.publisher.store(event(2)))
        writable = asyncio.create_task(rig.publisher.wait_writable([*OTHERS, NAMES.stream_event]))
        await others_go_on(rig, 20)
        assert [task.done() for task in (waiting, later, writable)] == [False] * 3
        assert rig.publisher.last_error == "WECHAT_EVENT: no stream takes it, or none has a leader"
        await topology.create_stream(rig.connection, wanted)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(waiting, later, writable)
    assert await rig.read(NAMES.stream_event, ">") == [b"0", b"1", b"2"]
    logged = [(line["event"], line["stream"]) for line in logs if line["event"].startswith("publish.")]
    assert logged == [("publish.retrying", "WECHAT_EVENT"), ("publish.resumed", "WECHAT_EVENT")]


async def test_a_stream_that_is_full_refuses_and_the_others_go_on(rig: Rig) -> None:
    config = (await rig.connection.api_request(f"STREAM.INFO.{NAMES.stream_event}"))["config"]
    await rig.publisher.store(event(0))
    await rig.connection.api_request(
        f"STREAM.UPDATE.{NAMES.stream_event}", config | {"discard": "new", "max_bytes": 200}
    )
    large = msgspec.structs.replace(event(1), payload=b"x" * 200)
    (refused,) = await store_all(rig.publisher, [large])
    assert isinstance(refused, BusRefused)
    assert refused.is_full
    await others_go_on(rig)
    await rig.connection.api_request(f"STREAM.UPDATE.{NAMES.stream_event}", config)
    await rig.publisher.store(large)


async def test_a_caller_who_is_cancelled_leaves_nothing_behind(rig: Rig) -> None:
    rig.bus.kill()
    await until(lambda: not rig.connection.is_connected, "the break is noticed")
    waiting = asyncio.create_task(rig.publisher.store(event(1)))
    await asyncio.sleep(0.1)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert not rig.publisher._outstanding
    await rig.bus.start()
    async with asyncio.timeout(PATIENCE_S):
        await rig.publisher.store(event(2))
    assert await rig.read(NAMES.stream_event, NAMES.event("s1", "receipt")) == [b"2"]


async def test_what_waits_for_the_bus_is_not_written_after_its_writer_lost_the_right(rig: Rig) -> None:
    """The fence is asked at each attempt: a writer that was frozen finds out before anything of its own leaves."""
    ensure_owner = Fence(lost_from=float("inf"))
    await rig.publisher.store(msgspec.structs.replace(event(0), ensure_owner=ensure_owner))
    rig.bus.kill()
    await until(lambda: not rig.connection.is_connected, "the break is noticed")
    waiting = asyncio.create_task(
        store_all(rig.publisher, [msgspec.structs.replace(event(1), ensure_owner=ensure_owner), event(2)])
    )
    others = asyncio.create_task(rig.publisher.store(event(3)))
    await asyncio.sleep(0.1)
    ensure_owner.lost_from = 0
    await rig.bus.start()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(LeaseLost):
            await waiting
        await others
    stored = await rig.read(NAMES.stream_event, NAMES.event("s1", "receipt"))
    assert stored[0] == b"0"
    assert b"1" not in stored
    assert b"3" in stored
