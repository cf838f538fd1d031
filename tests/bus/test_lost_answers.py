"""One acknowledgement or answer gets lost while the connection stays: nothing hangs, and nothing is stored twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest

from adapter.contract.names import H_MSG_ID
from adapter.errors import Temporary
from adapter.jetstream.buckets import KvBucket
from adapter.jetstream.objects import CHUNK, ObjectStore
from adapter.ports import BucketEntry, BusMessage, PubAck
from tests.bus.rig import NAMES, PATIENCE_S, Bus, Rig, control, event, rig_on, store_all
from tests.bus.test_consumer import Reader
from tests.bus.test_objects import content, count, pieces_of, whole
from tests.e2e.lossy import Loss, Lossy
from tests.e2e.waiting import until

BATCH = 3
SUBJECTS = {
    NAMES.stream_in: NAMES.inbox("s1", "p"),
    NAMES.stream_event: NAMES.event("s1", "receipt"),
    NAMES.stream_dead: NAMES.dead_letters(NAMES.stream_in),
    NAMES.stream_out: NAMES.out("s1"),
}
"""One of each stream that the adapter publishes to."""


@pytest.fixture
async def lossy(bus: Bus) -> AsyncIterator[Lossy]:
    async with Lossy(bus.server.url) as made:
        bus.settings = msgspec.structs.replace(bus.settings, nats_url=(made.url,))
        yield made


@pytest.fixture
async def rig(bus: Bus, lossy: Lossy) -> AsyncIterator[Rig]:
    async with rig_on(bus) as made:
        yield made


def lose_ack(lossy: Lossy, stream: str, *, skip: int = 0) -> Loss:
    """Loses one acknowledgement of a publish, behind so many others."""
    return lossy.lose(b"MSG", b'{"stream":"%b"' % stream.encode(), skip=skip)


@pytest.mark.parametrize("place", [0, BATCH // 2, BATCH - 1])
async def test_a_batch_is_stored_once_and_in_order(rig: Rig, lossy: Lossy, place: int) -> None:
    """Of every stream at once, at each place of the batch; and again, since the first must not hide the next."""
    for begin in (0, BATCH):
        losses = [lose_ack(lossy, stream, skip=place) for stream in SUBJECTS]
        batches = [
            [
                BusMessage("event", subject, b"%d" % n, {H_MSG_ID: f"{subject}.{n}"})
                for n in range(begin, begin + BATCH)
            ]
            for subject in SUBJECTS.values()
        ]
        async with asyncio.timeout(PATIENCE_S):
            answers = await asyncio.gather(*(store_all(rig.publisher, batch) for batch in batches))
        assert all(loss.has_happened for loss in losses)
        for acks in answers:
            assert all(isinstance(ack, PubAck) for ack in acks)
    for stream in SUBJECTS:
        stored = await rig.read(stream, ">")
        assert stored == [b"%d" % number for number in range(2 * BATCH)], stream
    assert rig.connection.epoch == 1


@pytest.mark.parametrize("place", [0, BATCH // 2, BATCH - 1])
async def test_a_key_is_made_changed_and_deleted_once(rig: Rig, lossy: Lossy, place: int) -> None:
    """Its repeat meets the first write."""
    bucket, keys = rig.bucket(), [f"k{number}" for number in range(BATCH)]
    async with asyncio.timeout(PATIENCE_S):
        losses = [lose_ack(lossy, bucket.stream, skip=place)]
        made = await asyncio.gather(*(bucket.update(key, b"1", 0) for key in keys))
        losses.append(lose_ack(lossy, bucket.stream, skip=place))
        changed = await asyncio.gather(*(bucket.update(k, b"2", at) for k, at in zip(keys, made, strict=True)))
        losses.append(lose_ack(lossy, bucket.stream, skip=place))
        await asyncio.gather(*(bucket.delete(key) for key in keys))
        assert [loss.has_happened for loss in losses] == [True] * 3
        assert changed == [revision + BATCH for revision in made], "none was written twice"
        assert [(await bucket.get(key) or BucketEntry(key, b"", 0)).value for key in keys] == [None] * BATCH


async def test_a_write_to_a_lease_fails_in_time_and_has_taken_place(rig: Rig, lossy: Lossy) -> None:
    bucket = KvBucket(rig.connection, NAMES.leases)
    loss = lose_ack(lossy, f"KV_{NAMES.leases}")
    with pytest.raises(Temporary):
        await bucket.write("1", b"me", 0)
    assert loss.has_happened
    found = await bucket.get("1")
    assert found is not None
    assert found.value == b"me"
    await bucket.write("1", b"me still", found.revision)


@pytest.mark.parametrize("place", [0, 5])
async def test_an_object_is_stored_once(rig: Rig, lossy: Lossy, place: int) -> None:
    """At a piece, and at its description, which comes last."""
    data, store = content(5 * CHUNK), ObjectStore(rig.connection, rig.publisher, NAMES.media)
    loss = lose_ack(lossy, f"OBJ_{NAMES.media}", skip=place)
    async with asyncio.timeout(PATIENCE_S):
        stored = await store.put("s1/in/a", pieces_of(data))
        assert await whole(store, stored) == data
    assert loss.has_happened
    assert await count(rig, f"$O.{NAMES.media}.C.>") == 5


async def test_a_pull_that_gets_lost_is_made_again(rig: Rig, lossy: Lossy) -> None:
    await control(rig, "first")
    loss = lossy.lose(b"PUB $JS.API.CONSUMER.MSG.NEXT.")
    reader = Reader(rig)
    await reader.have(1)
    assert (loss.has_happened, reader.texts) == (True, ["first"])


@pytest.mark.parametrize("skip", [0, 1])
async def test_a_delivery_that_gets_lost_comes_again_in_its_place(rig: Rig, lossy: Lossy, skip: int) -> None:
    await control(rig, "0", "1")
    loss = lossy.lose(b"MSG", b"$JS.ACK.", skip=skip)
    reader = Reader(rig)
    await until(lambda: reader.texts[-2:] == ["0", "1"], "both are delivered")
    assert loss.has_happened


@pytest.mark.parametrize("lost", [b"PUB $JS.API.", b"MSG _INBOX"], ids=["on-its-way", "its-answer"])
async def test_a_request_fails_in_time_and_the_next_is_answered(rig: Rig, lossy: Lossy, lost: bytes) -> None:
    bucket = rig.bucket()
    await bucket.update("k", b"1", 0)
    requests: tuple[Callable[[], Awaitable[object]], ...] = (
        lambda: bucket.get("k"),
        lambda: rig.history.delete(NAMES.stream_in, 1),
    )
    losses = [lossy.lose(lost) for _ in requests]
    async with asyncio.timeout(PATIENCE_S):
        failures = await asyncio.gather(*(request() for request in requests), return_exceptions=True)
        assert [type(failure) for failure in failures] == [Temporary] * len(requests)
        assert all(loss.has_happened for loss in losses)
        await asyncio.gather(*(request() for request in requests))
    assert rig.connection.epoch == 1


@pytest.mark.parametrize("place", [0, BATCH // 2, BATCH])
async def test_a_reading_with_a_gap_is_none(rig: Rig, lossy: Lossy, place: int) -> None:
    """What is read decides what was told before: a message that is passed over would be lost, or told twice."""
    await store_all(rig.publisher, [event(number) for number in range(BATCH)])
    subject = NAMES.event("s1", "receipt")
    loss = lossy.lose(b"HMSG", skip=place)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(Temporary):
            await rig.read(NAMES.stream_event, subject)
    assert loss.has_happened
    assert await rig.read(NAMES.stream_event, subject) == [b"%d" % number for number in range(BATCH)]


@pytest.mark.parametrize("place", [0, BATCH // 2, BATCH])
async def test_the_newest_of_several_subjects_are_all_read_or_none(rig: Rig, lossy: Lossy, place: int) -> None:
    """A receipt that is passed over would let its command be sent again."""
    sandboxes = [f"s{number}" for number in range(BATCH)]
    await store_all(rig.publisher, [event(number, sandbox) for number, sandbox in enumerate(sandboxes)])
    subjects = [NAMES.event(sandbox, "receipt") for sandbox in sandboxes]
    loss = lossy.lose(b"HMSG", skip=place)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(Temporary):
            await rig.history.read_last_of_each(NAMES.stream_event, subjects)
    assert loss.has_happened
    assert [found.subject for found in await rig.history.read_last_of_each(NAMES.stream_event, subjects)] == subjects
