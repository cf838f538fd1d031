"""What is known of users goes with them: after any number of them every table is as long as before."""

from __future__ import annotations

import asyncio
import gc
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.contexts import Contexts
from adapter.contract import Options
from adapter.errors import Refused, SessionExpired
from adapter.ilink.budget import ByteBudget
from adapter.ilink.connection import Connection
from adapter.inbound.recall import quote_key
from adapter.inbound.sessions import Session
from adapter.names import escaped, text_of, token_of
from adapter.outbound.commands import MediaPart
from adapter.outbound.lane import Lane, Parked
from adapter.outbound.receipts import KNOWN_S
from adapter.outbound.shard import Shard
from adapter.outbound.typing_tickets import NO_TICKET_S, TICKET_S
from adapter.outbound.uploads import READY_S
from adapter.outbound.window_events import LEFT_OVER
from adapter.ports import Account
from adapter.replicas.membership import DEAD_KEPT
from tests.fakes import GAP_S, Bench, Wire
from tests.growth import tables
from tests.outbound.shards import BOT, USER, outcomes, user_writes
from tests.outbound.test_window_events import HOUR, watching
from tests.outbound.test_window_events import user_writes as user_writes_to_windows
from tests.replicas.cluster import LEASE_S, Cluster

VIRTUAL_TIME = True

USERS = 50
STALE = SessionExpired("needs_login", "iLink answered -14", errcode=-14)


async def talk(bench: Bench, shard: Shard, first: int, *, unbind: bool) -> None:
    """So many users write, are answered while the bot is shown typing, and perhaps are unbound."""
    for number in range(first, first + USERS):
        bot, user = f"b{number}@im.bot", f"u{number}@im.wechat"
        await bench.bind(bot=bot, user=user, options=Options(auto_typing=True))
        await user_writes(bench, shard, bot=bot, user=user)
        shard.on_delivery(bench.command(f"t{number}", bot=bot, id=f"c{number}"))
        await asyncio.sleep(5)
        if unbind:
            await bench.bindings.remove(bot)
    await asyncio.sleep(60)
    shard.tidy()
    bench.contexts.tidy(lambda bot: bench.bindings.get(bot) is not None)


# names ---------------------------------------------------------------------------------------------------


def test_a_name_of_a_bot_is_kept_and_that_of_a_message_is_not() -> None:
    """Ids of messages come once: kept, they grew for days, and drove out the bots."""
    quote_key(BOT, "first")
    kept = token_of.cache_info().currsize
    for number in range(USERS):
        quote_key(BOT, f"message/{number}")
        escaped(f"item/{number}")
    assert token_of.cache_info().currsize == kept


@given(st.text())
def test_every_text_has_a_name_of_its_own(text: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_=-]*", escaped(text))
    assert text_of(escaped(text)) == text


# lanes ---------------------------------------------------------------------------------------------------


async def test_users_who_were_unbound_leave_nothing_behind() -> None:
    bench = Bench()
    shard = bench.shard()
    await talk(bench, shard, 0, unbind=True)
    things = (shard, shard.typing, bench.contexts, bench.bindings)
    before = [tables(thing) for thing in things]
    await talk(bench, shard, USERS, unbind=True)
    after = [tables(thing) for thing in things]
    assert (before[0].pop("_settled"), after[0].pop("_settled")) == (USERS, 2 * USERS)  # of at most SETTLED_KEPT
    assert after == before
    assert outcomes(bench) == [(f"c{number}", "accepted", "") for number in range(2 * USERS)]
    assert [sum(call.on for call in bench.chat.typing), len(bench.chat.typing)] == [2 * USERS, 4 * USERS]


async def test_a_user_who_is_silent_costs_no_lane() -> None:
    bench = Bench()
    shard = bench.shard()
    await talk(bench, shard, 0, unbind=False)
    sizes = tables(shard)
    assert sizes.pop("_settled") == USERS
    assert set(sizes.values()) == {0}


async def test_a_lane_stays_as_long_as_something_waits_in_it() -> None:
    bench = Bench()
    await bench.bind()
    shard = bench.shard()
    shard.on_delivery(bench.command("later", id="c1"))
    await asyncio.sleep(60)
    shard.tidy()
    assert len(shard._lanes) == 1
    await user_writes(bench, shard)
    await asyncio.sleep(60)
    shard.tidy()
    assert (len(shard._lanes), bench.chat.texts) == (0, ["later"])


def test_a_lane_whose_work_was_cut_is_needed() -> None:
    """The lease paused, so that nobody works on it now."""
    lane = Lane("s1", BOT, USER)
    assert not lane.is_needed(0.0)
    lane.parked.append(Parked(1, "wechat.parked.1.b", "c1", "c1", 0, 0))
    assert lane.is_needed(0.0)


async def test_forgetting_a_lane_shortens_no_pause_between_two_sends() -> None:
    bench = Bench()
    await bench.bind()
    bench.hears()
    shard = bench.shard()
    for text in ("a", "b"):
        shard.on_delivery(bench.command(text))
        await asyncio.sleep(GAP_S / 10)
        shard.tidy()
    await asyncio.sleep(60)
    first, second = (sent.at_s for sent in bench.chat.sent)
    assert second - first == GAP_S


async def test_refusals_of_a_token_are_counted_on_until_it_is_another() -> None:
    bench = Bench()
    await bench.bind()
    bench.hears()
    shard = bench.shard()
    bench.chat.sends.extend([STALE] * 3)
    for number in range(3):
        shard.on_delivery(bench.command(f"t{number}", when_closed="refuse"))
        await asyncio.sleep(40)
        shard.tidy()
    assert bench.lost_logins == [BOT]
    assert len(shard._lanes) == 1
    await bench.bindings.remove(BOT)
    await asyncio.sleep(1)
    shard.tidy()
    assert len(shard._lanes) == 0
    shard.stop()


async def test_a_refusal_that_comes_after_the_end_of_the_binding_counts_for_nothing() -> None:
    bench = Bench()
    await bench.bind()
    bench.hears()
    shard = bench.shard()
    bench.chat.took_s = 5.0
    bench.chat.sends.append(STALE)
    shard.on_delivery(bench.command("hi", when_closed="refuse"))
    await asyncio.sleep(1)
    await bench.bindings.remove(BOT)
    await asyncio.sleep(60)
    shard.tidy()
    assert len(shard._lanes) == 0


async def test_any_users_that_a_sandbox_names_are_forgotten() -> None:
    """It may name whom it likes; nothing goes out, and nothing stays."""
    bench = Bench()
    await bench.bind()
    shard = bench.shard()
    for number in range(USERS):
        shard.on_delivery(bench.command("hi", user=f"stranger{number}@im.wechat", when_closed="refuse"))
    await asyncio.sleep(60)
    assert len(shard._lanes) == USERS
    shard.tidy()
    bench.contexts.tidy(lambda bot: True)
    assert (len(shard._lanes), tables(bench.contexts)["_peers"], bench.chat.sent) == (0, 0, [])


# contexts ------------------------------------------------------------------------------------------------


async def test_users_of_a_bot_that_is_somebody_elses_are_dropped_and_the_others_kept() -> None:
    bench = Bench()
    for number in range(2):
        bench.hears(f"b{number}@im.bot", USER)
    mine, theirs = [await bench.contexts.peer(f"b{number}@im.bot", USER) for number in range(2)]
    bench.contexts.tidy(lambda bot: bot == mine.bot)
    assert await bench.contexts.peer(mine.bot, USER) is mine
    assert await bench.contexts.peer(theirs.bot, USER) is not theirs


async def test_nobody_who_is_worked_with_is_dropped() -> None:
    """A second copy of the record beside the one in somebody's hands would know less."""
    bench = Bench()
    peer = await bench.contexts.peer(BOT, USER)
    for hold in (peer.lock, peer.sending):
        async with hold:
            bench.contexts.tidy(lambda bot: False)
            assert await bench.contexts.peer(BOT, USER) is peer
    peer.in_flight = 1
    bench.contexts.tidy(lambda bot: False)
    assert await bench.contexts.peer(BOT, USER) is peer


async def test_a_record_that_cannot_be_loaded_leaves_no_lock() -> None:
    class Away(Exception):
        pass

    class NoBucket:
        async def get(self, key: str) -> None:
            raise Away

    contexts = Contexts(NoBucket(), lambda bot: None)  # type: ignore[arg-type]
    for number in range(USERS):
        with pytest.raises(Away):
            await contexts.peer(f"b{number}@im.bot", USER)
    assert len(contexts._loading) == 0


# typing --------------------------------------------------------------------------------------------------


async def test_tickets_are_kept_as_long_as_they_are_good_or_say_when_to_ask_again() -> None:
    bench = Bench()
    await bench.bind()
    bench.hears()
    shard = bench.shard()
    shard.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(1)
    shard.on_delivery(bench.command(typing="off"))
    await asyncio.sleep(TICKET_S / 2)
    shard.tidy()
    assert len(shard.typing._tickets._known) == 1
    await asyncio.sleep(NO_TICKET_S[1] + TICKET_S)
    shard.tidy()
    assert len(shard.typing._tickets._known) == 0


async def test_a_row_of_refused_tickets_is_not_forgotten_while_it_counts() -> None:
    bench = Bench()
    await bench.bind()
    bench.hears()
    shard = bench.shard()
    bench.chat.tickets.extend([Refused("typing", "iLink answered -4", ret=-4)] * 2)
    shard.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(NO_TICKET_S[1] - 1)
    shard.tidy()
    ((_, ticket),) = shard.typing._tickets._known.items()
    assert ticket.failures == 1


# windows -------------------------------------------------------------------------------------------------


async def test_windows_of_the_unbound_are_not_watched() -> None:
    """A window is open for most of a day; users who come and go in between must not fill the memory until then."""
    bench = Bench()
    async with watching(bench) as windows:
        for bot, hours in ((BOT, 0), ("old@im.bot", 20)):
            await bench.bind("kept", bot=bot, user=USER)
            bench.hears(bot, USER, inbound_ms=bench.clock.now_ms() - int(hours * 3_600_000))
            windows.adopt(bot)
            await asyncio.sleep(1)
        for number in range(10 * USERS):
            bot, user = f"v{number}@im.bot", f"v{number}@im.wechat"
            await bench.bind(bot=bot, user=user)
            bench.hears(bot, user, blocked_ms=bench.clock.now_ms())
            windows.adopt(bot)
            await asyncio.sleep(1)
            assert windows.throttled(bot)
            await user_writes_to_windows(bench, bot=bot, user=user)
            await bench.bindings.remove(bot)
        sizes = tables(windows)
        assert sizes.pop("_due") <= 2 * 2 + LEFT_OVER + 1
        assert sizes == {"_tasks": 0, "_throttled": 0, "_unseen": 0, "_watched": 2}
        await asyncio.sleep(4 * HOUR)
        assert tables(windows)["_watched"] == 1  # the one that closed first was seen first
        await asyncio.sleep(24 * HOUR)
        assert tables(windows)["_due"] == 0


# leases --------------------------------------------------------------------------------------------------


async def test_replicas_of_the_past_are_forgotten() -> None:
    cluster = Cluster()
    first = cluster.start("first")
    await asyncio.sleep(2 * LEASE_S)
    for _ in range(20):
        other = cluster.start("other")
        await asyncio.sleep(3 * LEASE_S)
        await other.kill()
        await asyncio.sleep(4 * LEASE_S)
    assert {name: size for name, size in tables(first.leases).items() if name in ("_seen", "_since", "_live")} == {
        "_live": 1,
        "_seen": 1,
        "_since": 1,
    }
    assert len(first.leases._dead) == 20
    for number in range(DEAD_KEPT):
        assert not await first.leases.is_dead(f"past-{number}")
    await asyncio.sleep(LEASE_S)
    for number in range(DEAD_KEPT):
        assert await first.leases.is_dead(f"past-{number}")
    assert len(first.leases._dead) <= DEAD_KEPT
    for number in range(2 * DEAD_KEPT):
        assert not await first.leases.is_dead(f"lost-{number}")
    assert len(first.leases._absent) <= DEAD_KEPT + 1


# uploads -------------------------------------------------------------------------------------------------


async def test_uploads_are_kept_as_long_as_they_may_be_used_again() -> None:
    bench = Bench()
    account = Account(BOT, "secret", "")
    for number in range(USERS):
        await bench.uploads.bring(f"c-{number}", MediaPart("file", "a.txt", "", b"hello"), account, USER)
        await asyncio.sleep(READY_S / 10)
    assert len(bench.uploads._ready) == 10
    assert bench.cdn.asked == USERS


# receipts ------------------------------------------------------------------------------------------------


async def test_receipts_that_were_looked_up_are_kept_for_a_moment() -> None:
    """Thousands of a sandbox are read for one command that comes again; the next owner asks for many in a row."""
    bench = Bench()
    await bench.bind()
    bench.hears()
    shard = bench.shard()
    delivery = bench.command("hi", id="c1")
    shard.on_delivery(delivery)
    await asyncio.sleep(5)
    heir = bench.shard()
    heir.on_delivery(delivery.again())
    await asyncio.sleep(KNOWN_S / 2)
    bench.receipts.tidy()
    assert tables(bench.receipts)["_told"] == 1
    await asyncio.sleep(KNOWN_S)
    bench.receipts.tidy()
    assert tables(bench.receipts)["_told"] == 0
    assert len(bench.chat.sent) == 1


async def test_what_was_read_of_the_bots_of_a_sandbox_is_kept_for_a_moment() -> None:
    """Thousands of its users may have a bot each; nobody asks once all their lanes have looked back."""
    bench = Bench()
    await bench.bind()
    bench.hears()
    shard = bench.shard()
    shard.on_delivery(bench.command("hi"))
    await asyncio.sleep(KNOWN_S / 2)
    bench.former_bots.tidy()
    assert tables(bench.former_bots)["_known"] == 1
    await asyncio.sleep(KNOWN_S)
    bench.former_bots.tidy()
    assert tables(bench.former_bots)["_known"] == 0


# without the collector -----------------------------------------------------------------------------------


async def test_what_has_ended_goes_without_the_garbage_collector() -> None:
    """Which looks at what is old once in hours: what refers to itself is in memory until then."""

    def there() -> int:
        return sum(isinstance(thing, (Shard, Session, Connection)) for thing in gc.get_objects())

    bench = Bench()
    gc.collect()
    gc.disable()
    try:
        before = there()
        shard, session, connection = Shard(1, bench.outgoing()), Session(BOT), Connection(ByteBudget())
        await shard.load()
        session.fenced(bench.incoming(), "owner")
        connection.connection_made(Wire())
        assert there() == before + 3
        shard.stop()
        connection.connection_lost(None)
        await asyncio.sleep(1)
        del shard, session, connection
        assert there() == before
    finally:
        gc.enable()
