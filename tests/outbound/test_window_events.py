"""What sandboxes are told of their users' windows: each change once, also after a crash, and time by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from adapter import window
from adapter.contract import Outbound, OutText, WindowEvent
from adapter.errors import BusRefused, Temporary, Throttled, Uncertain
from adapter.outbound.commands import read_command
from adapter.outbound.window_events import LOOKS_PER_S, WindowEvents
from adapter.ports import Message
from adapter.records import Context
from tests.fakes import LIMITS, RULES, Bench, settle

VIRTUAL_TIME = True

BOT, USER = "b1@im.bot", "u1@im.wechat"
THROTTLED = Throttled("throttled", "iLink answered -2", ret=-2, errmsg="prepare failed")
HOUR = 3600.0
LOW = RULES._replace(low=3)


@asynccontextmanager
async def watching(bench: Bench, rules: window.Rules = LOW) -> AsyncIterator[WindowEvents]:
    """One replica's windows, until it dies."""
    windows = WindowEvents(
        contexts=bench.contexts,
        bindings=bench.bindings,
        leases=bench.leases,
        events=bench.events,
        history=bench.bus,
        names=bench.names,
        clock=bench.clock,
        rules=rules,
    )
    bench.look = windows.look
    running = asyncio.get_running_loop().create_task(windows.run())
    try:
        yield windows
    finally:
        running.cancel()
        await asyncio.wait([running])


async def ready() -> Bench:
    bench = Bench()
    await bench.bind()
    bench.bus.writes.clear()
    return bench


async def user_writes(bench: Bench, *, bot: str = BOT, user: str = USER) -> None:
    """What a poller does with a message."""
    await bench.wrote(bot, user, f"in:{next(bench.numbers)}")
    bench.look(await bench.contexts.peer(bot, user))
    await settle()


async def sends(bench: Bench, count: int = 1, rules: window.Rules = LOW, **body: Any) -> None:
    """What a lane does with commands."""
    peer = await bench.contexts.peer(BOT, USER)
    for _ in range(count):
        ident = str(next(bench.numbers))
        command = read_command(
            Outbound(text="hi", **body), sandbox="s1", ident=ident, time_ms=bench.clock.now_ms(), limits=LIMITS
        )
        await bench.send(command, peer, rules=rules).run()
        peer.context = window.settled(peer.context, command.client, sent=True)
        await settle()


def told(bench: Bench) -> list[tuple[str, str, int | None]]:
    return [(event.change, event.reason, event.window.remaining) for event in events(bench)]


def events(bench: Bench) -> list[WindowEvent]:
    return [
        msgspec.json.decode(stored.data, type=WindowEvent)
        for stored in bench.bus.found("EVENT")
        if stored.subject == "wechat.event.s1.window"
    ]


# one window after another --------------------------------------------------------------------------------


async def test_a_window_opens_runs_low_and_is_used_up() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
        await sends(bench, 12)
        assert told(bench) == [("opened", "", 10), ("low", "", 3), ("closed", "quota", 0)]
        (opened, *_) = events(bench)
        assert (opened.sandbox, opened.bot, opened.user) == ("s1", BOT, USER)
        assert opened.window.closes_at_ms == window.closes_at_ms(bench.context(), RULES)
        await user_writes(bench)
        assert told(bench)[3:] == [("opened", "", 10)]


async def test_a_user_who_writes_into_an_open_window_opens_nothing() -> None:
    """And low may come again, since it is another window."""
    bench = await ready()
    async with watching(bench):
        for _ in range(2):
            await user_writes(bench)
            await sends(bench, 8)
            await asyncio.sleep(60)
        assert [change for change, *_ in told(bench)] == ["opened", "low", "low"]


async def test_minus_2_closes_and_the_users_word_opens() -> None:
    bench = await ready()
    async with watching(bench) as windows:
        await user_writes(bench)
        bench.chat.sends.append(THROTTLED)
        await sends(bench)
        assert told(bench)[1:] == [("closed", "throttled", 0)]
        assert windows.throttled(BOT)
        await user_writes(bench)
        assert told(bench)[2:] == [("opened", "", 10)]
        assert not windows.throttled(BOT)


async def test_a_probe_that_goes_through_opens_too() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
        bench.chat.sends.append(THROTTLED)
        await sends(bench)
        await asyncio.sleep(RULES.cooldown_s + 1)
        assert len(told(bench)) == 2
        await sends(bench)
        assert [change for change, *_ in told(bench)] == ["opened", "closed", "opened"]
        bench.chat.sends.append(THROTTLED)
        await sends(bench)
        assert told(bench)[3:] == [("closed", "throttled", 0)]


async def test_a_last_send_that_may_have_arrived_closes() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
        await sends(bench, 9)
        bench.chat.sends.extend([Uncertain("timeout")] * 2)
        await sends(bench)
        assert told(bench)[2:] == [("closed", "quota", 0)]


async def test_a_last_send_is_not_told_before_it_counts() -> None:
    """Counted before it leaves, it may come back; while it is out, nothing is told."""
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
        await sends(bench, 9)
        bench.chat.sends.append(Temporary("http_5xx"))
        await sends(bench)
        assert told(bench)[2:] == [("closed", "quota", 0)]
        assert bench.chat.texts == ["hi"] * 11


async def test_each_part_of_a_long_answer_is_told() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
        peer = await bench.contexts.peer(BOT, USER)
        body = Outbound(items=[OutText(text="part")] * 10)
        command = read_command(body, sandbox="s1", ident="c", time_ms=bench.clock.now_ms(), limits=LIMITS)
        await bench.send(command, peer).run()
        await settle()
        assert [change for change, *_ in told(bench)] == ["opened", "low", "closed"]


async def test_what_is_kept_back_is_no_reason_to_call_it_open() -> None:
    bench = await ready()
    reserved = LOW._replace(reserve=2)
    async with watching(bench, reserved):
        await user_writes(bench)
        await sends(bench, 9, rules=reserved)
        assert told(bench) == [("opened", "", 8), ("low", "", 3), ("closed", "quota", 0)]
        assert [event.window.reserved for event in events(bench)] == [2, 2, 2]
        await sends(bench, 3, rules=reserved, final=True)
        assert len(bench.chat.sent) == 10
        assert len(told(bench)) == 3


# time ----------------------------------------------------------------------------------------------------


async def test_time_closes_while_nothing_happens() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
        await asyncio.sleep(23 * HOUR - 1)
        assert told(bench)[1:] == []
        await asyncio.sleep(2)
        assert told(bench)[1:] == [("closed", "window_closed", 0)]
        assert events(bench)[1].window.closes_at_ms is None
        assert bench.context().told == "closed"
        await asyncio.sleep(48 * HOUR)
        assert len(told(bench)) == 2


async def test_a_message_puts_the_closing_off() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
        await asyncio.sleep(20 * HOUR)
        await user_writes(bench)
        await asyncio.sleep(22 * HOUR)
        assert len(told(bench)) == 1
        await asyncio.sleep(2 * HOUR)
        assert told(bench)[1:] == [("closed", "window_closed", 0)]


async def test_a_clock_that_is_set_back_closes_nothing_too_early() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
        bench.clock.set_back_ms = 2 * 3_600_000
        await asyncio.sleep(24 * HOUR)
        assert len(told(bench)) == 1
        await asyncio.sleep(2 * HOUR)
        assert len(told(bench)) == 2


async def test_what_is_closed_already_is_not_closed_by_time_again() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
        await sends(bench, 10)
        await asyncio.sleep(24 * HOUR)
        assert [change for change, *_ in told(bench)] == ["opened", "low", "closed"]


async def test_a_bot_of_another_replica_is_left_to_it() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
        bench.leases.owned.clear()
        await asyncio.sleep(24 * HOUR)
        assert len(told(bench)) == 1


async def test_an_unbound_bot_is_told_of_no_more() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
        await bench.bindings.remove(BOT)
        await asyncio.sleep(24 * HOUR)
        assert len(told(bench)) == 1


# the cost ------------------------------------------------------------------------------------------------


async def test_telling_writes_no_record_of_its_own_but_for_time() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
        await sends(bench, 10)
        assert bench.bus.writes.count("token") == 11
        assert bench.bus.writes.count("event") == 3
        await user_writes(bench)
        bench.bus.writes.clear()
        await asyncio.sleep(24 * HOUR)
        assert bench.bus.writes == ["event", "token"]


async def test_no_send_waits_for_an_event() -> None:
    bench = await ready()
    gate = asyncio.Event()

    async def hold(message: Any) -> None:
        if message.subject.endswith(".window"):
            await gate.wait()

    bench.bus.on_publish = hold
    async with watching(bench) as windows:
        await user_writes(bench)
        await sends(bench, 12)
        assert len(bench.chat.sent) == 10
        assert told(bench) == []
        gate.set()
        await windows.flush()
        assert [change for change, *_ in told(bench)] == ["opened", "low", "closed"]


async def test_thousands_of_bots_are_looked_at_gently() -> None:
    bench = Bench()
    for number in range(1000):
        await bench.bind(f"s{number}", f"b{number}@im.bot", f"u{number}@im.wechat")
        bench.hears(f"b{number}@im.bot", f"u{number}@im.wechat")
    async with watching(bench) as windows:
        for number in range(1000):
            windows.adopt(f"b{number}@im.bot")
            windows.adopt(f"b{number}@im.bot")
        await asyncio.sleep(500 / LOOKS_PER_S)
        assert 490 <= len(bench.bus.found("EVENT")) <= 510
        await asyncio.sleep(510 / LOOKS_PER_S)
        assert len(bench.bus.found("EVENT")) == 1000


# crashes -------------------------------------------------------------------------------------------------


async def taken_over(bench: Bench) -> Bench:
    """The replica that comes after a kill -9: it knows what is on the bus."""
    return Bench(bench, incarnation="me-2")


async def test_after_a_crash_nothing_is_told_again() -> None:
    """Whatever the record says: the last events came after its last write, and the stream's memory is short."""
    for count in (0, 1, 7, 9, 10):
        bench = await ready()
        async with watching(bench):
            await user_writes(bench)
            await sends(bench, count)
        before = told(bench)
        bench.bus._ids.clear()
        after = await taken_over(bench)
        async with watching(after) as windows:
            windows.adopt(BOT)
            await asyncio.sleep(60)
            assert told(after) == before
            await sends(after, 10 - count)
            await user_writes(after)
            assert [change for change, *_ in told(after)] == ["opened", "low", "closed", "opened"]


async def test_what_others_have_written_among_the_events_is_passed_over_after_a_crash() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
        await sends(bench, 10)
    before = told(bench)
    foreign = Message("event", bench.names.event("s1", "window"), b"\xff", {})
    await bench.bus.publish(foreign)
    after = await taken_over(bench)
    async with watching(after) as windows:
        windows.adopt(BOT)
        await asyncio.sleep(60)
        await user_writes(after)
    bench.bus.kept = [kept for kept in bench.bus.kept if kept.stored.data != foreign.payload]
    assert told(bench) == [*before, ("opened", "", 10)]


async def test_after_a_crash_what_was_not_told_is_told() -> None:
    bench = await ready()
    bench.bus.refuse = lambda message: BusRefused(0, "dies") if message.stream == "event" else None
    async with watching(bench):
        await user_writes(bench)
        await sends(bench, 10)
    bench.bus.refuse = lambda message: None
    after = await taken_over(bench)
    bench.contexts_bucket.put(*_forgetful(after))
    async with watching(after) as windows:
        windows.adopt(BOT)
        await asyncio.sleep(1)
        assert told(after) == []  # it closed before anybody was told that it was open
        await user_writes(after)
        assert told(after) == [("opened", "", 10)]


def _forgetful(bench: Bench) -> tuple[str, bytes]:
    ((key, entry),) = bench.contexts_bucket.entries.items()
    assert entry.value is not None
    context = msgspec.json.decode(entry.value, type=Context)
    return key, msgspec.json.encode(msgspec.structs.replace(context, told="", told_in=""))


async def test_time_that_passed_while_nobody_ran_is_told() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
    await asyncio.sleep(30 * HOUR)
    after = await taken_over(bench)
    async with watching(after) as windows:
        windows.adopt(BOT)
        await asyncio.sleep(1)
        assert told(after)[1:] == [("closed", "window_closed", 0)]
    third = await taken_over(after)
    third.bus._ids.clear()
    async with watching(third) as windows:
        windows.adopt(BOT)
        await asyncio.sleep(24 * HOUR)
        assert len(told(third)) == 2


async def test_time_that_runs_out_after_a_take_over_is_told() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
    after = await taken_over(bench)
    async with watching(after) as windows:
        windows.adopt(BOT)
        await asyncio.sleep(24 * HOUR)
        assert told(after)[1:] == [("closed", "window_closed", 0)]


async def test_a_user_who_writes_before_their_turn_is_told_of_rightly() -> None:
    """Thousands of others come first, and the record is older than the bus."""
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
    await asyncio.sleep(600)
    after = await taken_over(bench)
    async with watching(after):
        await user_writes(after)
        assert [change for change, *_ in told(after)] == ["opened"]
        await sends(after, 10)
        assert [change for change, *_ in told(after)] == ["opened", "low", "closed"]


async def test_another_user_of_the_sandbox_is_not_mistaken() -> None:
    bench = await ready()
    await bench.bind("s1", "b2@im.bot", "u2@im.wechat")
    async with watching(bench):
        await user_writes(bench)
        await sends(bench, 10)
        await user_writes(bench, bot="b2@im.bot", user="u2@im.wechat")
    bench.bus._ids.clear()
    before = len(told(bench))
    after = await taken_over(bench)
    async with watching(after) as windows:
        windows.adopt(BOT)
        windows.adopt("b2@im.bot")
        await asyncio.sleep(1)
        assert len(told(after)) == before


async def test_a_bus_that_is_away_delays_only() -> None:
    bench = await ready()
    async with watching(bench):
        await user_writes(bench)
    after = await taken_over(bench)
    after.bus.unreadable = 5
    async with watching(after) as windows:
        windows.adopt(BOT)
        await sends(after, 10)
        await asyncio.sleep(10)
        assert [change for change, *_ in told(after)] == ["opened", "low", "closed"]
