"""Objects on a real server: in the layout of nats-py's own store, both ways, whole or not at all."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from typing import Any

import msgspec
import pytest
from nats.js.object_store import ObjectStore as TheirStore

from adapter.errors import BusRefused, Conflict, LeaseLost, Refused, Temporary, Unreadable
from adapter.jetstream import topology
from adapter.jetstream.history import StreamHistory, direct_get
from adapter.jetstream.objects import CHUNK, ObjectStore
from adapter.ports import BusMessage, Objects, Pieces, PubAck, StoredMessage, StoredObject
from adapter.tools.media_types import HEAD
from tests.bus.rig import NAMES, Bus, Rig, rig_on
from tests.e2e.waiting import until

STREAM = f"OBJ_{NAMES.media}"


def content(size: int, seed: int = 7) -> bytes:
    return bytes((i * seed + i // 251) % 256 for i in range(size))


async def pieces_of(data: bytes, cut: int = 50_000) -> Pieces:
    for start in range(0, len(data), cut):
        yield data[start : start + cut]


async def whole(store: Objects, stored: StoredObject) -> bytes:
    return b"".join([piece async for piece in store.read(stored)])


@pytest.fixture
def store(rig: Rig) -> ObjectStore:
    return ObjectStore(rig.connection, rig.publisher, NAMES.media)


async def theirs(rig: Rig) -> TheirStore:
    client = rig.connection.nc
    assert client is not None
    return await client.jetstream().object_store(NAMES.media)


async def count(rig: Rig, subject: str) -> int:
    return len(await rig.read(STREAM, subject))


SIZES = [0, CHUNK, CHUNK + 1, 30 * CHUNK + 5]


@pytest.mark.parametrize("size", SIZES)
async def test_what_we_store_is_read_by_nats_py_and_by_us(rig: Rig, store: ObjectStore, size: int) -> None:
    data = content(size)

    def describe(head: bytes) -> tuple[str, str]:
        return "image/png", f"{len(head)} b.png"

    stored = await store.put("s1/in/a b.png", pieces_of(data), describe=describe)
    assert (stored.size, stored.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert await store.get_info("s1/in/a b.png") == stored
    assert await whole(store, stored) == await by_pieces(store, stored) == data

    other = await theirs(rig)
    result = await other.get("s1/in/a b.png")
    assert result.data == data
    assert (result.info.size, result.info.chunks) == (size, -(-size // CHUNK))
    assert result.info.description == f"{min(size, HEAD)} b.png"
    assert [entry.name for entry in await other.list(ignore_deletes=True)] == ["s1/in/a b.png"]
    assert rig.metrics.value("nats_publish_total", stream="media", outcome="ok") == -(-size // CHUNK) + 1


@pytest.mark.parametrize("size", SIZES)
async def test_what_nats_py_stores_is_read_by_us(rig: Rig, store: ObjectStore, size: int) -> None:
    data = content(size)
    await (await theirs(rig)).put("s1/x", data)
    stored = await store.get_info("s1/x")
    assert stored is not None
    assert (stored.size, stored.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert await whole(store, stored) == data
    assert await by_pieces(store, stored) == data


async def by_pieces(store: ObjectStore, stored: StoredObject) -> bytes:
    data, after = await store.read_piece(stored, 0)
    while after:
        piece, after = await store.read_piece(stored, after)
        data += piece
    return data


@pytest.mark.parametrize("chunks", [1, 3])
async def test_an_object_does_not_end_early_where_a_server_lags_behind(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    """The server that answers has not applied what comes behind the piece that it gives."""
    data = content(chunks * CHUNK)
    stored = await store.put("s1/x", pieces_of(data))

    async def lagging(*asked: Any) -> tuple[list[StoredMessage], dict[str, str]]:
        found, end = await direct_get(*asked)
        return [one._replace(headers=one.headers | {"Nats-Num-Pending": "0"}) for one in found], end

    monkeypatch.setattr("adapter.jetstream.history.direct_get", lagging)
    assert await by_pieces(store, stored) == data


async def test_an_object_stays_and_the_pieces_of_a_second_one_go(rig: Rig, store: ObjectStore) -> None:
    first = await store.put("s1/x", pieces_of(b"first"))
    assert await store.put("s1/x", pieces_of(content(300_000))) == first
    assert await whole(store, first) == b"first"
    assert await count(rig, f"$O.{NAMES.media}.C.>") == 1
    assert await count(rig, f"$O.{NAMES.media}.M.>") == 1


async def test_an_object_is_whole_where_only_the_answer_to_its_description_was_lost(
    rig: Rig, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The publisher sends it again, which is a conflict, and then the stream does not answer."""
    write, read_last = rig.publisher.store, StreamHistory.read_last

    async def answers_late(message: BusMessage) -> PubAck:
        ack = await write(message)
        if ".M." not in message.subject:
            return ack
        monkeypatch.setattr(StreamHistory, "read_last", is_away)
        raise Conflict(10071)

    async def is_away(*_: object) -> None:
        raise Temporary("bus_timeout")

    monkeypatch.setattr(rig.publisher, "store", answers_late)
    with pytest.raises(Temporary):
        await store.put("s1/x", pieces_of(content(300_000)))
    monkeypatch.setattr(StreamHistory, "read_last", read_last)
    stored = await store.get_info("s1/x")
    assert stored is not None
    assert await whole(store, stored) == content(300_000)


async def test_of_objects_that_are_stored_at_once_one_stays(rig: Rig, store: ObjectStore) -> None:
    """Whoever reads it meanwhile reads one of them to its end."""
    made = await asyncio.gather(*(store.put("s1/x", pieces_of(content(300_000, number))) for number in range(5)))
    assert len(set(made)) == 1
    assert await store.get_info("s1/x") == made[0]
    assert await whole(store, made[0]) in [content(300_000, number) for number in range(5)]
    assert await count(rig, f"$O.{NAMES.media}.C.>") == 3
    assert await count(rig, f"$O.{NAMES.media}.M.>") == 1


async def test_no_object_comes_into_being_without_its_owner(rig: Rig, store: ObjectStore) -> None:
    """He is asked when all its pieces are there."""
    pieces = []

    def ensure_owner() -> None:
        pieces.append(sum(len(piece) for piece in stored_pieces))
        raise LeaseLost("unbound")

    stored_pieces: list[bytes] = []

    async def source() -> Pieces:
        for number in range(3):
            stored_pieces.append(content(CHUNK, number))
            yield stored_pieces[-1]

    with pytest.raises(LeaseLost):
        await store.put("s1/x", source(), ensure_owner=ensure_owner)
    assert pieces == [3 * CHUNK]
    assert await store.get_info("s1/x") is None
    assert await count(rig, f"$O.{NAMES.media}.>") == 0


async def test_there_is_none_where_it_is_deleted_or_never_was(rig: Rig, store: ObjectStore) -> None:
    other = await theirs(rig)
    assert await store.get_info("s1/x") is None
    await store.put("s1/x", pieces_of(b"abc"))
    await other.delete("s1/x")
    assert await store.get_info("s1/x") is None
    await store.put("s1/x", pieces_of(b"again"))
    assert (await other.get("s1/x")).data == b"again"


async def test_a_link_to_elsewhere_is_no_object(rig: Rig, store: ObjectStore) -> None:
    """Others may make links in a store; who reads one by us must not get what it points to."""
    await store.put("s2/secret", pieces_of(b"abc"))
    assert rig.connection.nc is not None
    name = base64.urlsafe_b64encode(b"s1/x").decode()
    meta_options = {"link": {"bucket": NAMES.media, "name": "s2/secret"}}
    meta = msgspec.json.encode(
        {"name": "s1/x", "bucket": NAMES.media, "nuid": "", "size": 0, "options": meta_options}
    )
    await rig.connection.nc.jetstream().publish(f"$O.{NAMES.media}.M.{name}", meta)
    assert await store.get_info("s1/x") is None


@pytest.mark.parametrize("after", [0, 1, 20])
async def test_nothing_stays_where_the_source_fails(rig: Rig, store: ObjectStore, after: int) -> None:
    closed = False

    async def source() -> Pieces:
        nonlocal closed
        try:
            for _ in range(after):
                yield content(CHUNK)
            raise Refused("too_large", "it grows")
        finally:
            closed = True

    kept = await store.put("s1/x", pieces_of(b"before"))
    with pytest.raises(Refused):
        await store.put("s1/x", source())
    assert closed
    assert await store.get_info("s1/x") == kept
    assert await count(rig, f"$O.{NAMES.media}.C.>") == 1


async def test_nothing_stays_where_it_is_cancelled(rig: Rig, store: ObjectStore) -> None:
    reached, closed = asyncio.Event(), asyncio.Event()

    async def source() -> Pieces:
        try:
            for _ in range(5):
                yield content(CHUNK)
            reached.set()
            await asyncio.Event().wait()
        finally:
            closed.set()

    task = asyncio.create_task(store.put("s1/x", source()))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed.is_set()
    assert await store.get_info("s1/x") is None
    assert await count(rig, f"$O.{NAMES.media}.>") == 0


async def test_a_source_is_asked_no_faster_than_the_bus_takes(rig: Rig, store: ObjectStore) -> None:
    """While the bus is away, what is in memory is bounded; then it goes on, and nothing is there twice."""
    given = 0

    async def source() -> Pieces:
        nonlocal given
        for number in range(60):
            given += 1
            if number == 20:
                rig.bus.kill()
            yield content(CHUNK, number)

    task = asyncio.create_task(store.put("s1/x", source()))
    await until(lambda: not rig.connection.is_connected, "the bus is away")
    await until(lambda: len(rig.publisher._outstanding) == 1, "it waits")
    assert 20 < given <= 22
    await rig.bus.start()
    stored = await task
    assert await whole(store, stored) == b"".join(content(CHUNK, number) for number in range(60))
    assert await count(rig, f"$O.{NAMES.media}.C.>") == 60


async def test_missing_or_other_bytes_raise(rig: Rig, store: ObjectStore) -> None:
    empty = await store.put("s1/empty", pieces_of(b""))
    with pytest.raises(Unreadable):
        await whole(store, empty._replace(sha256="0" * 64))
    stored = await store.put("s1/x", pieces_of(content(3 * CHUNK)))
    with pytest.raises(Unreadable):
        await whole(store, stored._replace(sha256="0" * 64))
    with pytest.raises(Unreadable):
        await whole(store, stored._replace(sha256=""))
    with pytest.raises(Unreadable):
        await whole(store, stored._replace(size=stored.size - 1))
    with pytest.raises(Unreadable):
        await whole(store, stored._replace(size=stored.size + 1))
    await rig.history.delete(STREAM, await rig.first(STREAM) + 1)
    with pytest.raises(Unreadable):
        await whole(store, stored)


async def test_a_full_store_refuses_and_keeps_nothing(bus: Bus) -> None:
    async with rig_on(bus, streams=False) as rig:
        settings = bus.settings
        (wanted,) = [w for w in topology.wanted_streams(NAMES, settings) if w.name == STREAM]
        await topology.create_stream(rig.connection, wanted._replace(config=wanted.config | {"max_bytes": 5 * CHUNK}))
        store = ObjectStore(rig.connection, rig.publisher, NAMES.media)
        with pytest.raises(BusRefused):
            await store.put("s1/large", pieces_of(content(20 * CHUNK)))
        stored = await store.put("s1/x", pieces_of(content(CHUNK)))
        assert await whole(store, stored) == content(CHUNK)


async def test_a_bus_that_is_away_is_temporary_for_readers(rig: Rig, store: ObjectStore) -> None:
    stored = await store.put("s1/x", pieces_of(content(CHUNK)))
    rig.bus.kill()
    await until(lambda: not rig.connection.is_connected, "the bus is away")
    for work in (store.get_info("s1/x"), whole(store, stored), store.read_piece(stored, 0)):
        with pytest.raises(Temporary):
            await work
