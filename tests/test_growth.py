"""What is known of users goes with them: after any number of them every table is as long as before."""

from __future__ import annotations

import asyncio
import gc
import re

from hypothesis import given
from hypothesis import strategies as st

from adapter.bridge.partition import Partition
from adapter.bridge.poller import BotPoller
from adapter.bridge.presence import KEPT_S
from adapter.bridge.typing_indicator import TICKET_S
from adapter.contract.messages import Options
from adapter.contract.names import Names, escape_token, from_subject_token, to_subject_token
from adapter.ilink.connection import Connection
from tests.fakes import Bench, Wire
from tests.growth import tables
from tests.outbound.shards import BOT, outcomes, user_writes
from tests.ownership.cluster import LEASE_S, PARTITIONS, Cluster

VIRTUAL_TIME = True

USERS = 50


async def talk(bench: Bench, shard: Partition, first: int, *, unbind: bool) -> None:
    """So many users write, are answered while the bot is shown typing, and perhaps are unbound."""
    for number in range(first, first + USERS):
        bot, user = f"b{number}@im.bot", f"u{number}@im.wechat"
        await bench.bind(bot=bot, user=user, options=Options(auto_typing=True))
        await user_writes(bench, bot=bot, user=user)
        shard.on_delivery(bench.command(f"t{number}", bot=bot, id=f"c{number}"))
        await asyncio.sleep(5)
        if unbind:
            await bench.unbind(bot)
    bench.bindings._deleted.clear()  # bounded by their number
    for _ in range(2):  # what is not stored is, at first
        await asyncio.sleep(60)
        shard.evict_idle()


# names ---------------------------------------------------------------------------------------------------


def test_a_name_of_a_bot_is_kept_and_that_of_a_message_is_not() -> None:
    """Ids of messages come once: kept, they grew for days, and drove out the bots."""
    kept = to_subject_token.cache_info().currsize
    for number in range(USERS):
        Names().receipt("s1", f"command/{number}")
        escape_token(f"item/{number}")
    assert to_subject_token.cache_info().currsize == kept


@given(st.text())
def test_every_text_has_a_name_of_its_own(text: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_=-]*", escape_token(text))
    assert from_subject_token(escape_token(text)) == text


# users ---------------------------------------------------------------------------------------------------


async def test_users_who_were_unbound_leave_nothing_behind(bench: Bench) -> None:
    shard = bench.shard()
    await talk(bench, shard, 0, unbind=True)
    things = (shard, shard.typing, bench.bindings)
    before = [tables(thing) for thing in things]
    await talk(bench, shard, USERS, unbind=True)
    after = [tables(thing) for thing in things]
    assert after == before
    assert outcomes(bench) == [(f"c{number}", "accepted", "") for number in range(2 * USERS)]
    assert [sum(call.on for call in bench.chat.typing), len(bench.chat.typing)] == [2 * USERS, 4 * USERS]


# typing --------------------------------------------------------------------------------------------------


async def test_tickets_are_kept_as_long_as_they_are_good(bench: Bench) -> None:
    await bench.bind()
    bench.hears()
    shard = bench.shard()
    shard.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(1)
    shard.on_delivery(bench.command(typing="off"))
    await asyncio.sleep(TICKET_S / 2)
    shard.evict_idle()
    assert tables(shard.typing) == {"_shown": 0, "_tasks": 0, "_tickets": 1}
    await asyncio.sleep(TICKET_S)
    shard.evict_idle()
    assert tables(shard.typing) == {"_shown": 0, "_tasks": 0, "_tickets": 0}


# leases --------------------------------------------------------------------------------------------------


async def test_replicas_of_the_past_are_forgotten() -> None:
    cluster = Cluster()
    first = cluster.start("first")
    await asyncio.sleep(2 * LEASE_S)
    for _ in range(20):
        other = cluster.start("other")
        await asyncio.sleep(3 * LEASE_S)
        await other.kill()
        cluster.replicas.remove(other)
        await asyncio.sleep(4 * LEASE_S)
    assert len(first.owned) == PARTITIONS
    await asyncio.sleep(KEPT_S + 1)
    assert tables(first.presence)["_heard"] == 0
    sizes = tables(first.leases)
    assert sizes["_releasing"] == 0
    assert sizes["_free"] <= PARTITIONS
    assert sizes["_given"] <= PARTITIONS
    cluster.stop()


# without the collector -----------------------------------------------------------------------------------


async def test_what_has_ended_goes_without_the_garbage_collector() -> None:
    """Which looks at what is old once in hours: what refers to itself is in memory until then."""

    def there() -> int:
        return sum(isinstance(thing, (Partition, BotPoller, Connection)) for thing in gc.get_objects())

    bench = Bench()
    await bench.bind()
    bench.hears()
    gc.collect()
    gc.disable()
    try:
        before = there()
        shard, session = Partition(bench.leases.tenure_of(1), bench.parts()), bench.new_poller(BOT)
        connection = Connection()
        connection.connection_made(Wire())
        assert there() == before + 3
        shard.on_delivery(bench.command("hi"))
        await asyncio.sleep(1)
        assert bench.chat.texts == ["hi"]
        shard.stop()
        connection.connection_lost(None)
        await asyncio.sleep(1)
        del shard, session, connection
        assert there() == before
    finally:
        gc.enable()
