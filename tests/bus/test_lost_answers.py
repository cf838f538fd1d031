"""One acknowledgement or answer gets lost while the connection stays: nothing hangs, and nothing is stored twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest

from adapter.errors import Temporary
from adapter.jetstream.buckets import LeaderKvBucket
from tests.bus.rig import NAMES, PATIENCE_S, Bus, Rig, event, rig_on
from tests.e2e.lossy import Loss, Lossy

BATCH = 5


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


async def test_a_write_to_a_lease_fails_in_time_and_has_taken_place(rig: Rig, lossy: Lossy) -> None:
    bucket = LeaderKvBucket(rig.link, NAMES.claims)
    loss = lose_ack(lossy, f"KV_{NAMES.claims}")
    with pytest.raises(Temporary):
        await bucket.write("1", b"me", 0)
    assert loss.has_happened
    found = await bucket.get("1")
    assert found is not None
    assert found.value == b"me"
    await bucket.write("1", b"me still", found.revision)


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
    assert rig.link.epoch == 1


@pytest.mark.parametrize("place", range(BATCH + 1))
async def test_a_reading_with_a_gap_is_none(rig: Rig, lossy: Lossy, place: int) -> None:
    """What is read decides what was told before: a message that is passed over would be lost, or told twice."""
    await rig.publisher.publish_all([event(number) for number in range(BATCH)])
    subject = NAMES.event("s1", "receipt")
    loss = lossy.lose(b"HMSG", skip=place)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(Temporary):
            await rig.read(NAMES.stream_event, subject)
    assert loss.has_happened
    assert await rig.read(NAMES.stream_event, subject) == [b"%d" % number for number in range(BATCH)]
