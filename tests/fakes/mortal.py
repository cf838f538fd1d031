"""One of several replicas of a world of fakes: it reaches the world as long as it lives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import NamedTuple

from adapter.errors import BusRefused
from adapter.ports import Accepted, Account, Content, Entry, Message, PubAck, Stored
from tests.fakes import Bench, FakeBucket, FakeBus, FakeCdn, FakeChat, FakeClock, FakeDelivery, FakeObjects, Life


class MortalBus:
    """A bus as one replica reaches it."""

    def __init__(self, bus: FakeBus, life: Life) -> None:
        self._bus = bus
        self._life = life

    async def publish(self, message: Message) -> PubAck:
        (ack,) = await self.publish_all([message])
        if isinstance(ack, BusRefused):
            raise ack
        return ack

    async def publish_all(self, messages: Sequence[Message]) -> list[PubAck | BusRefused]:
        await self._life.goes_on()
        acks = await self._bus.publish_all(messages)
        await self._life.goes_on()
        return acks

    async def read(
        self, stream: str, subject: str, *, after: int = 0, since_ms: int | None = None, limit: int | None = None
    ) -> AsyncIterator[Stored]:
        await self._life.goes_on()
        async for stored in self._bus.read(stream, subject, after=after, since_ms=since_ms, limit=limit):
            yield stored
        await self._life.goes_on()

    async def read_last(self, stream: str, subject: str) -> Stored | None:
        await self._life.goes_on()
        return await self._bus.read_last(stream, subject)

    async def read_last_of_each(self, stream: str, subjects: Sequence[str]) -> list[Stored]:
        await self._life.goes_on()
        found = await self._bus.read_last_of_each(stream, subjects)
        await self._life.goes_on()
        return found

    async def get(self, stream: str, seq: int) -> Stored | None:
        await self._life.goes_on()
        return await self._bus.get(stream, seq)

    async def count_by_subject(self, stream: str, subject: str) -> dict[str, int]:
        await self._life.goes_on()
        return await self._bus.count_by_subject(stream, subject)

    async def delete(self, stream: str, seq: int, *, erase: bool = False) -> None:
        await self._life.goes_on()
        await self._bus.delete(stream, seq, erase=erase)
        await self._life.goes_on()

    async def purge(self, stream: str, subject: str, *, keep: int = 0, up_to: int = 0) -> None:
        await self._life.goes_on()
        await self._bus.purge(stream, subject, keep=keep, up_to=up_to)


class MortalBucket(FakeBucket):
    """A bucket as one replica reaches it."""

    def __init__(self, bucket: FakeBucket, life: Life) -> None:
        super().__init__()
        self.entries = bucket.entries
        self._bucket = bucket
        self._life = life

    async def get(self, key: str) -> Entry | None:
        await self._life.goes_on()
        return await self._bucket.get(key)

    async def list_prefix(self, first: str = "") -> list[Entry]:
        await self._life.goes_on()
        found = await self._bucket.list_prefix(first)
        await self._life.goes_on()
        return found

    async def update(
        self, key: str, value: bytes, revision: int, *, ttl_s: int = 0, ensure_owner: Callable[[], None] | None = None
    ) -> int:
        await self._life.goes_on()
        written = await self._bucket.update(key, value, revision, ttl_s=ttl_s, ensure_owner=ensure_owner)
        await self._life.goes_on()
        return written

    def put(self, key: str, value: bytes | None) -> int:
        return self._bucket.put(key, value)


class MortalChat(FakeChat):
    """iLink as one replica reaches it. A request that has left is answered whatever becomes of the replica."""

    def __init__(self, chat: FakeChat, clock: FakeClock, life: Life) -> None:
        super().__init__(clock)
        self._chat = chat
        self._life = life

    async def send(
        self,
        account: Account,
        *,
        user: str,
        client_id: str,
        context_token: str,
        content: Content,
        check: Callable[[], None] | None = None,
    ) -> Accepted:
        if check is not None:
            check()
        await self._life.goes_on()
        try:
            return await self._chat.send(
                account, user=user, client_id=client_id, context_token=context_token, content=content
            )
        finally:
            await self._life.goes_on()


class Command(FakeDelivery):
    """A delivery whose ack removes the command from the stream, whoever gives it."""

    def __init__(self, bus: FakeBus, of: FakeDelivery, *, redelivered: bool, life: Life) -> None:
        super().__init__(of.subject, of.data, seq=of.seq, time_ms=of.time_ms, redelivered=redelivered)
        self._bus = bus
        self._life = life

    async def ack(self) -> None:
        await self._life.goes_on()
        await self._bus.delete(self._bus.stream_of(self.subject), self.seq)


class World(NamedTuple):
    """What a replica reaches, of which some is in its own way."""

    clock: FakeClock
    bus: FakeBus
    chat: FakeChat
    conversation_bucket: FakeBucket
    checkpoint_bucket: FakeBucket
    bindings_bucket: FakeBucket
    cdn: FakeCdn
    objects: FakeObjects
    numbers: Iterator[int]
    deliveries: list[FakeDelivery]
    claims_bucket: FakeBucket
    readers_bucket: FakeBucket


def mortal(world: Bench, number: int, life: Life) -> Bench:
    """One of several replicas of a world, which reaches it as long as it lives."""
    reached = World(
        clock=world.clock,
        bus=MortalBus(world.bus, life),  # type: ignore[arg-type]
        chat=MortalChat(world.chat, world.clock, life),
        conversation_bucket=MortalBucket(world.conversation_bucket, life),
        checkpoint_bucket=MortalBucket(world.checkpoint_bucket, life),
        bindings_bucket=world.bindings_bucket,
        cdn=world.cdn,
        objects=world.objects,
        numbers=world.numbers,
        deliveries=world.deliveries,
        claims_bucket=world.claims_bucket,
        readers_bucket=world.readers_bucket,
    )
    return Bench(reached, incarnation=f"r{number}", metrics=world.metrics)  # type: ignore[arg-type]
