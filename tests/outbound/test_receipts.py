"""Receipts that are looked up after a crash: found whoever told them, and each read once, however many ask."""

from __future__ import annotations

import asyncio

import pytest

from adapter.contract import Outbound, Window
from adapter.outbound import receipts
from adapter.outbound.commands import Command, read_command
from adapter.outbound.endings import Ending
from adapter.outbound.receipts import KNOWN_SANDBOXES, Name
from adapter.ports import Message
from tests.fakes import LIMITS, Bench

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


async def test_what_is_known_of_sandboxes_does_not_grow_without_end() -> None:
    bench = Bench()
    for number in range(KNOWN_SANDBOXES + 10):
        await tell(bench, "c1", sandbox=f"s{number}")
        assert await bench.receipts.has_final(command(bench, "c1", f"s{number}"))
    assert len(bench.receipts._told) == KNOWN_SANDBOXES
    assert await bench.receipts.has_final(command(bench, "c1", "s0"))


async def test_a_sandbox_with_more_receipts_than_are_kept_is_read_anew_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(receipts, "KNOWN_RECEIPTS", 2)
    bench = Bench()
    for number in range(3):
        await tell(bench, f"c{number}")
        assert await bench.receipts.has_final(command(bench, f"c{number}"))
        assert len(bench.receipts._told) == (number < 2)
