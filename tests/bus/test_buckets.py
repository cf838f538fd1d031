"""Buckets: compare-and-set, news and what they miss, and who may say what a lease is worth."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from nats.aio.msg import Msg

from adapter.errors import BusRefused, Conflict, Temporary
from adapter.jetstream import topology
from adapter.jetstream.buckets import KvBucket
from adapter.jetstream.client import BusClient
from adapter.jetstream.history import direct_get, direct_get_one
from adapter.ports import BucketEntry, BusMessage, StoredMessage
from tests.bus.rig import NAMES, Rig
from tests.e2e.waiting import eventually, until

KEY = "s1.0123456789abcdef"
Found = tuple[list[StoredMessage], dict[str, str]]


@pytest.mark.parametrize("replicated", [False, True])
async def test_a_bucket_gives_many_keys_at_once(rig: Rig, replicated: bool) -> None:
    bucket = KvBucket(rig.connection, NAMES.bindings, rig.publisher, replicated=replicated)
    assert await bucket.get_all([]) == []
    assert await bucket.get_all(["k1", "k2"]) == []
    written = [BucketEntry(f"k{i}", b"%d" % i, await bucket.update(f"k{i}", b"%d" % i, 0)) for i in range(600)]
    gone = BucketEntry("k7", None, await bucket.delete("k7"))
    found = await bucket.get_all(["never", *(entry.key for entry in written)])
    assert sorted(found, key=lambda entry: entry.revision) == [*written[:7], *written[8:], gone]
    assert await bucket.get_all(["k3"]) == [written[3]]


@pytest.mark.parametrize("replicated", [False, True])
async def test_a_bucket_is_read_to_its_end_though_its_last_mark_has_aged(rig: Rig, replicated: bool) -> None:
    """A replica that starts then begins its partitions: nobody waits for a sequence that is stored no more."""
    bucket = KvBucket(rig.connection, NAMES.bindings, rig.publisher, replicated=replicated)
    first = await bucket.update("k1", b"1", 0)
    mark = await bucket.delete("k2", await bucket.update("k2", b"2", 0), ttl_s=1)

    async def has_aged() -> bool:
        return await direct_get_one(rig.connection, bucket.stream, {"seq": mark}) is None

    await eventually(has_aged, "the mark has aged")
    info = await rig.connection.api_request(f"STREAM.INFO.{bucket.stream}")
    assert info["state"]["last_seq"] == mark
    assert await bucket.read_since(0) == [BucketEntry("k1", b"1", first)]
    assert await bucket.read_since(first) == []


async def test_a_bucket_compares_and_sets(rig: Rig) -> None:
    bucket = rig.bucket()
    assert await bucket.get(KEY) is None
    first = await bucket.update(KEY, b"1", 0)
    with pytest.raises(Conflict):
        await bucket.update(KEY, b"x", 0)
    second = await bucket.update(KEY, b"2", first)
    with pytest.raises(Conflict):
        await bucket.update(KEY, b"x", first)
    assert await bucket.get(KEY) == BucketEntry(KEY, b"2", second)
    with pytest.raises(Conflict):
        await bucket.delete(KEY, first)
    gone = await bucket.delete(KEY, second)
    assert await bucket.get(KEY) == BucketEntry(KEY, None, gone)
    assert await bucket.update(KEY, b"3", gone) > gone


async def test_a_follower_sees_what_is_stored_and_never_what_was_refused(rig: Rig) -> None:
    """A plain subscription to the bucket's subjects would show both."""
    bucket = rig.bucket(NAMES.bindings)
    revision = await bucket.update("a", b"1", 0)
    seen: list[BucketEntry] = []
    loaded = asyncio.Event()
    rig.spawn(bucket.watch(seen.append, on_loaded=loaded.set))
    await loaded.wait()
    assert seen == [BucketEntry("a", b"1", revision)]
    with contextlib.suppress(Conflict):
        await bucket.update("a", b"refused", 99)
    second = await bucket.update("a", b"2", revision)
    third = await bucket.delete("a")
    await until(lambda: len(seen) == 3, "both changes are seen")
    assert seen[1:] == [BucketEntry("a", b"2", second), BucketEntry("a", None, third)]


async def test_a_follower_misses_nothing_across_a_kill(rig: Rig) -> None:
    """It hears of what others wrote while it could not listen."""
    bucket = rig.bucket(NAMES.bindings)
    seen: dict[str, BucketEntry] = {}
    order: list[int] = []

    def see(entry: BucketEntry) -> None:
        seen[entry.key] = entry
        order.append(entry.revision)

    rig.spawn(bucket.watch(see))
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

    assert rig.connection.nc is not None
    await rig.connection.nc.subscribe(f"$JS.API.STREAM.INFO.{bucket.stream}", cb=on_message)

    async def more(count: int) -> None:
        wanted = found + count
        await until(lambda: found >= wanted, "it looks again")

    return more


@pytest.mark.parametrize("lost", ["every news", "one in the middle", "the last"])
async def test_a_follower_finds_changes_of_which_it_got_no_message(rig: Rig, lost: str) -> None:
    """News are at most once."""
    bucket = rig.bucket(NAMES.bindings)
    seen: dict[str, BucketEntry] = {}
    loaded = asyncio.Event()
    news, bucket.updates_subject = (
        bucket.updates_subject,
        "elsewhere" if lost == "every news" else bucket.updates_subject,
    )
    assert rig.connection.nc is not None
    subscribe = rig.connection.nc.subscribe

    async def but_some(subject: str, *, cb: Callable[[Msg], Awaitable[None]], **options: Any) -> Any:
        numbers = itertools.count(1)
        wanted = {"one in the middle": {3}, "the last": {4}}.get(lost, set())

        async def on_message(msg: Msg) -> None:
            if next(numbers) not in wanted:
                await cb(msg)

        return await subscribe(subject, cb=on_message if subject.startswith(news) else cb, **options)

    rig.connection.nc.subscribe = but_some  # type: ignore[assignment,method-assign]
    rig.spawn(bucket.watch(lambda entry: seen.update({entry.key: entry}), on_loaded=loaded.set, reload_s=0.05))
    await until(loaded.is_set, "it has read")
    first = {key: await bucket.update(key, b"1", 0) for key in ("a", "b")}
    second = {key: await bucket.update(key, b"2", first[key]) for key in ("a", "b")}
    await until(lambda: seen == {key: BucketEntry(key, b"2", second[key]) for key in second}, "all is seen")


async def test_a_follower_that_misses_nothing_does_not_read_again(rig: Rig) -> None:
    """Ten thousand bindings cost as much as that many messages, every half minute."""
    bucket = rig.bucket(NAMES.bindings)
    loads = 0

    def count() -> None:
        nonlocal loads
        loads += 1

    seen: list[BucketEntry] = []
    more = await looks(rig, bucket)
    rig.spawn(bucket.watch(seen.append, on_loaded=count, reload_s=0.05))
    await until(lambda: loads == 1, "it has read")
    for number in range(20):
        await bucket.update(f"k{number}", b"x", 0)
    await bucket.delete("k0")
    await until(lambda: len(seen) == 21, "all is seen")
    await more(2)
    before = loads
    await more(5)
    assert loads == before
    await bucket.write("k5", b"x", seen[5].revision, ttl_s=1)
    await until(lambda: loads > before, "its end is noticed")


async def test_a_follower_hears_changes_over_a_client_that_came_as_it_subscribed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, connection, subscribe = rig.bucket(NAMES.bindings), rig.connection, BusClient.subscribe
    loaded, seen, first = asyncio.Event(), list[bytes | None](), connection.epoch

    async def breaks(client: BusClient, subject: str, *args: Any, **options: Any) -> Any:
        subscription = await subscribe(client, subject, *args, **options)
        if subject.startswith(bucket.updates_subject) and connection.epoch == first:
            await client.close()
            await until(lambda: connection.epoch > first and connection.is_connected, "there is another client")
        return subscription

    monkeypatch.setattr(BusClient, "subscribe", breaks)
    rig.spawn(bucket.watch(lambda entry: seen.append(entry.value), on_loaded=loaded.set, reload_s=600.0))
    await loaded.wait()
    await bucket.update("k", b"1", 0)
    await until(lambda: seen == [b"1"], "it is heard")


async def test_a_follower_reads_again_when_the_server_that_answered_lags(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has seen as many keys as there are, and one of them in an older value."""
    bucket = KvBucket(rig.connection, NAMES.bindings, rig.publisher, replicated=True)
    first = await bucket.update("k", b"1", 0)
    seen: list[bytes | None] = []

    async def lagging(*query: Any) -> Found:
        found, end = await direct_get(*query)
        return [old._replace(seq=first, data=b"1") if not seen else old for old in found], end

    monkeypatch.setattr("adapter.jetstream.history.direct_get", lagging)
    await bucket.update("k", b"2", first)
    rig.spawn(bucket.watch(lambda entry: seen.append(entry.value), reload_s=0.05))
    await until(lambda: seen == [b"1", b"2"], "it reads again")


async def test_a_follower_reads_again_what_it_could_not_read_to_the_end(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has heard of the newest sequence by then, and has as many keys as there are."""
    bucket = rig.bucket(NAMES.bindings)
    first = await bucket.update("k", b"1", 0)
    seen: list[bytes | None] = []
    failures = 0

    async def failing(*query: Any) -> Found:
        nonlocal failures
        if seen and not failures:
            failures += 1
            raise Temporary("bus_busy")
        return await direct_get(*query)

    monkeypatch.setattr("adapter.jetstream.history.direct_get", failing)
    bucket.updates_subject = "elsewhere"
    rig.spawn(bucket.watch(lambda entry: seen.append(entry.value), reload_s=0.05))
    await until(lambda: seen == [b"1"], "it has read")
    await bucket.update("k", b"2", first)
    await until(lambda: seen == [b"1", b"2"], "it reads again")
    assert failures == 1


async def test_a_bucket_of_leases_answers_from_the_leader_and_fails_in_time(rig: Rig) -> None:
    bucket = KvBucket(rig.connection, NAMES.leases, ttl_s=60)
    assert await bucket.get("r1") is None
    first = await bucket.write("r1", b"1", 0)
    with pytest.raises(Conflict):
        await bucket.write("r1", b"x", 0)
    assert await bucket.get("r1") == BucketEntry("r1", b"1", first)
    assert await bucket.get_all(["r1"]) == [BucketEntry("r1", b"1", first)]
    gone = await bucket.write("r1", None, first)
    assert await bucket.get("r1") == BucketEntry("r1", None, gone)
    assert await bucket.get_all(["r1"]) == [BucketEntry("r1", None, gone)]
    with pytest.raises(Conflict):
        await bucket.write("r1", b"back", first)

    rig.bus.kill()
    began = asyncio.get_running_loop().time()
    with pytest.raises(Temporary):
        await bucket.write("r1", b"x", gone)
    assert asyncio.get_running_loop().time() - began < 2.0


@pytest.mark.parametrize("name", [NAMES.bindings, NAMES.persons, NAMES.leases, NAMES.logins])
async def test_nobody_empties_a_bucket(rig: Rig, name: str) -> None:
    """Nor takes a single key out of it without a mark: what is in there is nowhere else."""
    bucket = rig.bucket(name)
    kept = BucketEntry("a", b"1", await bucket.update("a", b"1", 0))
    for verb, body, code in (
        ("PURGE", {}, 10110),
        ("PURGE", {"filter": bucket.subject("a")}, 10110),
        ("MSG.DELETE", {"seq": kept.revision}, 10057),
    ):
        with pytest.raises(BusRefused) as refused:
            await rig.connection.api_request(f"STREAM.{verb}.{bucket.stream}", body)
        assert refused.value.code == code
    with pytest.raises(BusRefused, match="rollup not permitted"):  # as `nats kv purge` writes it
        await rig.publisher.store(
            BusMessage("kv", bucket.subject("a"), b"", {"KV-Operation": "PURGE", "Nats-Rollup": "sub"})
        )
    assert await bucket.get("a") == kept


async def test_what_is_written_for_a_time_goes_by_itself_unless_it_is_written_again(rig: Rig) -> None:
    bucket = rig.bucket(NAMES.bindings)
    first = {key: await bucket.write(key, b"1", 0, ttl_s=1) for key in ("value", "kept")}
    kept = await bucket.update("kept", b"2", first["kept"])
    deleted = await bucket.delete("mark", await bucket.update("mark", b"1", 0), ttl_s=1)

    async def gone() -> bool:
        return [await bucket.get(key) for key in ("value", "mark")] == [None, None]

    await eventually(gone, "the value and the mark are gone")
    assert await bucket.get("kept") == BucketEntry("kept", b"2", kept)
    assert await bucket.update("mark", b"3", 0) > deleted  # as if it had never been


async def test_a_follower_reports_no_deletion_of_keys_that_a_bucket_has_lost(rig: Rig) -> None:
    """Who knows them keeps them; what is written from then on is heard."""
    bucket = rig.bucket(NAMES.bindings)
    seen: list[BucketEntry] = []
    more = await looks(rig, bucket)

    def on_entry(entry: BucketEntry) -> None:
        if entry.key == "a":
            seen.append(entry)

    rig.spawn(bucket.watch(on_entry, reload_s=0.05))
    first = BucketEntry("a", b"1", await bucket.update("a", b"1", 0))
    await until(lambda: seen == [first], "it is seen")
    await rig.connection.api_request(f"STREAM.DELETE.{bucket.stream}")
    await topology.ensure_topology(rig.connection, NAMES, rig.bus.settings)
    await more(3)
    assert seen == [first]
    second = BucketEntry("a", b"2", await bucket.update("a", b"2", 0))
    await until(lambda: seen == [first, second], "the next is seen")
