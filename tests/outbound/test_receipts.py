"""Receipts that are looked up after a crash: found whoever told them, and each read once, however many ask."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import msgspec
import pytest

from adapter.contract import Outbound, Receipt, Window
from adapter.errors import Temporary
from adapter.names import H_TIME_MS
from adapter.outbound import receipts
from adapter.outbound.commands import Command, read_command
from adapter.outbound.endings import Ending
from adapter.outbound.receipts import KNOWN_S, Name
from adapter.ports import Message, Stored
from tests.fakes import EPOCH_MS, LIMITS, Bench

VIRTUAL_TIME = True


def command(bench: Bench, ident: str, sandbox: str = "s1") -> Command:
    body = Outbound(text="hi")
    return read_command(body, sandbox=sandbox, ident=ident, time_ms=bench.clock.now_ms(), limits=LIMITS)


async def tell(bench: Bench, ident: str, sandbox: str = "s1") -> None:
    await bench.receipts.final(
        command(bench, ident, sandbox),
        Ending("accepted"),
        bot="b",
        user="u",
        shown=Window(),
        original=(b"", {}, "out"),
    )


async def test_of_many_lookups_in_a_row_each_reads_only_what_is_new() -> None:
    """After a crash thousands may ask, and all receipts since may be as many."""
    bench = Bench()
    for number in range(100):
        await tell(bench, f"c{number}")
    read = 0
    history = bench.bus.read

    async def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal read
        async for stored in history(*args, **kwargs):
            read += 1
            yield stored

    bench.bus.read = counted  # type: ignore[method-assign]
    for number in range(100):
        assert await bench.receipts.has_final(command(bench, f"c{number}"))
        assert not await bench.receipts.has_final(command(bench, f"none{number}"))
    assert read == 100


async def test_what_was_told_since_the_last_look_is_found() -> None:
    bench = Bench()
    await tell(bench, "c1")
    assert not await bench.receipts.has_final(command(bench, "c2"))
    await tell(bench, "c2")
    assert await bench.receipts.has_final(command(bench, "c2"))
    bench.clock.set_back_ms = 60_000  # and one of an earlier command
    await tell(bench, "c0")
    assert await bench.receipts.has_final(command(bench, "c0"))


async def test_what_others_have_written_among_the_receipts_is_passed_over() -> None:
    bench = Bench()
    await tell(bench, "c1")
    await bench.bus.publish(Message("event", bench.names.event("s1", "receipt"), b"\xff", {}))
    await tell(bench, "c2")
    assert [await bench.receipts.has_final(command(bench, ident)) for ident in ("c1", "c2", "c3")] == [
        True,
        True,
        False,
    ]


async def test_an_older_command_is_found_although_only_newer_ones_were_asked_for() -> None:
    """Else it would be sent once more."""
    bench = Bench()
    older = command(bench, "c1")
    await tell(bench, "c1")
    await asyncio.sleep(600)
    assert not await bench.receipts.has_final(command(bench, "c2"))
    assert await bench.receipts.has_final(older)


async def test_several_are_found_at_once_and_a_later_one_of_the_same_id_is_another() -> None:
    bench = Bench()
    await tell(bench, "c1")
    first_ms = bench.clock.now_ms()
    await asyncio.sleep(5)
    names = {Name("c1", first_ms), Name("c1", bench.clock.now_ms())}
    assert set(await bench.receipts.find_finals("s1", names)) == {Name("c1", first_ms)}


async def test_what_is_known_of_sandboxes_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "KNOWN_SANDBOXES", 64)
    bench = Bench()
    for number in range(74):
        await tell(bench, "c1", sandbox=f"s{number}")
        assert await bench.receipts.has_final(command(bench, "c1", f"s{number}"))
    assert len(bench.receipts._told) == 64
    assert await bench.receipts.has_final(command(bench, "c1", "s0"))


async def test_those_who_asked_last_are_known_where_there_are_too_many_receipts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(receipts, "KNOWN_RECEIPTS", 5)
    bench = Bench()
    for name in ("s1", "s2", "s3"):
        for number in range(3):
            await tell(bench, f"c{number}", sandbox=name)
    for name in ("s1", "s2", "s3", "s1"):
        assert await bench.receipts.has_final(command(bench, "c1", name))
        assert list(bench.receipts._told) == [name]


# a take-over with many ------------------------------------------------------------------------------------

MANY = 30_000
WAITING = 100


class Reads(NamedTuple):
    """What was asked of the history, of receipts alone."""

    requests: list[dict[str, Any]]
    seqs: list[int]


def count_reads(bench: Bench) -> Reads:
    reads, read, subject = Reads([], []), bench.bus.read, bench.names.event("s1", "receipt")

    async def counted(stream: str, of: str, **where: Any) -> AsyncIterator[Stored]:
        if of == subject:
            reads.requests.append(where)
        async for stored in read(stream, of, **where):
            if of == subject:
                reads.seqs.append(stored.seq)
            yield stored

    bench.bus.read = counted  # type: ignore[method-assign, assignment]
    return reads


def fill(bench: Bench, count: int) -> None:
    """Final receipts of other commands of the sandbox, one each second."""
    for number in range(count):
        receipt = Receipt(command=f"other{number}", sandbox="s1", outcome="accepted", received_at_ms=EPOCH_MS)
        bench.bus.put(bench.names.event("s1", "receipt"), msgspec.json.encode(receipt), {})


async def test_many_who_ask_at_once_read_each_of_very_many_receipts_once() -> None:
    """Whoever asks first: the oldest of their commands may be asked for last."""
    bench = Bench()
    asked = []
    for number in range(WAITING):
        asked.append(command(bench, f"c{number}"))
        if number % 10 == 0:
            await tell(bench, f"c{number}")
        fill(bench, MANY // WAITING)
        await asyncio.sleep(60)
    reads = count_reads(bench)
    found = await asyncio.gather(*(bench.receipts.has_final(one) for one in reversed(asked)))
    assert found[::-1] == [number % 10 == 0 for number in range(WAITING)]
    assert len(reads.requests) <= 3, "for all of them"
    assert len(reads.seqs) - len(set(reads.seqs)) <= 1, "where the older ones end"
    for one in asked:
        await bench.receipts.has_final(one)
    assert len(reads.seqs) - len(set(reads.seqs)) <= 1


async def test_very_many_receipts_take_little_memory() -> None:
    bench = Bench()
    fill(bench, MANY)
    tracemalloc.start()
    try:
        assert not await bench.receipts.has_final(command(bench, "c1"))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < MANY * 32


async def test_the_reading_goes_on_where_the_bus_went_away() -> None:
    bench = Bench()
    older = command(bench, "c1")
    await tell(bench, "c1")
    await asyncio.sleep(60)
    assert not await bench.receipts.has_final(command(bench, "c2"))
    bench.bus.unreadable = 2
    for _ in range(2):
        with pytest.raises(Temporary):
            await bench.receipts.has_final(older)
    assert await bench.receipts.has_final(older)


async def test_a_take_over_reads_each_of_very_many_receipts_once_for_all_that_is_parked() -> None:
    bench = Bench()
    await bench.bind()
    first = bench.shard()
    for number in range(WAITING):
        first.on_delivery(bench.command("hi", id=f"c{number}", user=f"u{number}@im.wechat"))
        await asyncio.sleep(1)
    assert len(bench.bus.found("PARKED")) == WAITING
    fill(bench, MANY)
    ended = bench.bus.found("PARKED")[7]  # told by an owner who died before it was removed
    done = Receipt(command="c7", sandbox="s1", outcome="refused", received_at_ms=int(ended.headers[H_TIME_MS]))
    bench.bus.put(bench.names.event("s1", "receipt"), msgspec.json.encode(done), {})
    first.stop()
    heir = Bench(bench, incarnation="heir-1")
    reads = count_reads(bench)
    shard = heir.shard()
    await shard.load()
    await asyncio.sleep(60)
    assert len(bench.bus.found("PARKED")) == WAITING - 1
    assert len(set(reads.seqs)) >= MANY
    assert len(reads.seqs) - len(set(reads.seqs)) <= 2, "the one that was told is read for what it tells"
    assert len(reads.requests) <= 2 * WAITING
    shard.stop()


async def test_what_was_read_is_known_as_long_as_something_waits_that_may_ask() -> None:
    """A bot that needs a login has its commands looked up once it has had one."""
    bench = Bench()
    await bench.bind(state="needs_login")
    first = bench.shard()
    for number in range(2):
        first.on_delivery(bench.command("hi", id=f"c{number}", user=f"u{number}@im.wechat"))
    await asyncio.sleep(1)
    first.stop()
    heir = Bench(bench, incarnation="heir-1")
    shard = heir.shard()
    await shard.load()
    fill(bench, 100)
    reads = count_reads(bench)
    assert not await heir.receipts.has_final(command(heir, "c9"))
    for _ in range(5):
        await asyncio.sleep(KNOWN_S)
        shard.tidy()
        heir.receipts.tidy()
    await heir.bindings.change("b1@im.bot", lambda now: msgspec.structs.replace(now, state="active"))
    await asyncio.sleep(60)
    assert len(set(reads.seqs)) >= 100
    assert len(reads.seqs) - len(set(reads.seqs)) <= 2
    shard.stop()
