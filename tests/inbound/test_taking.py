"""Whose a bot is: it is taken, waited for, given back, taken over, and who lost it stores what it has late."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest
from structlog.testing import capture_logs

from adapter.errors import AdapterError, BusRefused, Temporary
from adapter.inbound.poller import BotPoller, State
from adapter.security.seal import Sealer, cursor_context
from tests.fakes import Bench, Failing, FakeLeases, batch, ready, settle
from tests.inbound.pollers import BOT, Poller, polls, raw, set_owner, start_poller, successor_of, texts

VIRTUAL_TIME = True


async def owner_of(bench: Bench) -> str:
    return (await bench.checkpoint()).owner


# waiting for another owner -------------------------------------------------------------------------------


async def test_a_new_owner_waits_until_the_old_one_has_stopped(poller: Poller) -> None:
    bench = await ready()
    await set_owner(bench, "other-1", cursor="b")
    session = poller(bench)
    await asyncio.sleep(30)
    assert bench.chat.asked == []
    await set_owner(bench, "", cursor="c")
    session.on_released()
    await asyncio.sleep(1)
    assert bench.chat.asked == ["c"]


async def test_a_new_owner_that_gets_no_notice_finds_out(poller: Poller) -> None:
    bench = await ready()
    await set_owner(bench, "other-1", cursor="b")
    poller(bench)
    await asyncio.sleep(30)
    await set_owner(bench, "", cursor="c")
    await asyncio.sleep(7)
    assert bench.chat.asked == ["c"]


async def test_a_new_owner_takes_over_from_one_that_is_proven_dead(poller: Poller) -> None:
    bench = await ready()
    await set_owner(bench, "other-1", cursor="b")
    session = poller(bench)
    await asyncio.sleep(5)
    bench.leases.proven_dead.add("other-1")
    session.on_released()
    await asyncio.sleep(1)
    assert (bench.chat.asked, await owner_of(bench)) == (["b"], "me-1")


async def test_a_new_owner_takes_a_bot_whose_checkpoint_names_one_that_has_no_poller_of_it(poller: Poller) -> None:
    """As after a restore: it lives, and would never give back what it does not have."""
    bench = await ready()
    await set_owner(bench, "other-1", cursor="b")
    session = poller(bench)
    await asyncio.sleep(60)
    assert (bench.chat.asked, session.state, session.why) == ([], State.WAITING, "other-1 has not released it")
    bench.idle.add(("other-1", BOT))
    await asyncio.sleep(60)
    assert (bench.chat.asked, await owner_of(bench), session.state) == (["b"], "me-1", State.POLLING)


async def test_an_owner_that_begins_to_poll_as_it_is_asked_keeps_its_bot(poller: Poller) -> None:
    bench = await ready()
    await set_owner(bench, "other-1", cursor="b")

    async def is_idle(incarnation: str, bot: str) -> bool:
        await set_owner(bench, incarnation)
        return True

    bench.is_idle = is_idle  # type: ignore[method-assign]
    poller(bench)
    await asyncio.sleep(120)
    assert (bench.chat.asked, await owner_of(bench)) == ([], "other-1")


async def test_a_bot_that_waits_for_an_owner_delays_no_other_bot() -> None:
    """Starts are bounded; one that waits for a replica elsewhere must not use up the bound."""
    bench = await ready()
    await set_owner(bench, "other-1", cursor="b")
    await bench.bind(sandbox="s2", bot="b2@im.bot", user="u2@im.wechat")
    deps = bench.poll_deps(takeovers=asyncio.Semaphore(1))
    sessions = [BotPoller(BOT, deps), BotPoller("b2@im.bot", deps)]
    tasks = [asyncio.get_running_loop().create_task(session.run()) for session in sessions]
    await asyncio.sleep(5)
    assert len(bench.chat.asked) == 1
    for session in sessions:
        session.stop(immediately=True)
    await asyncio.gather(*tasks)


async def test_a_poller_that_waits_for_the_lease_hardly_looks_at_it_and_leaves_at_once() -> None:
    """Thousands that look each second take an eighth of a core, where there may be no more than that."""
    bench, looks = await ready(), 0

    class Counted(FakeLeases):
        @property
        def is_valid(self) -> bool:
            nonlocal looks
            looks += 1
            return self.has_lease

    bench.leases = Counted()
    session = bench.new_poller(leases=bench.leases)
    task = asyncio.create_task(session.run())
    await asyncio.sleep(1)
    bench.leases.has_lease = False
    session.cancel_poll()
    await asyncio.sleep(1)
    assert session.state is State.PAUSED
    looks = 0
    await asyncio.sleep(60)
    assert looks < 15
    session.stop(immediately=False)
    before = bench.clock.monotonic()
    await asyncio.wait([task])
    assert bench.clock.monotonic() - before < 0.1


# losing it -----------------------------------------------------------------------------------------------


async def test_a_poller_whose_bot_another_took_ends_at_its_next_write(poller: Poller) -> None:
    """It could not renew its lease and does not know; what it stores meanwhile is found by its id or fingerprint."""
    bench = await ready(batch(raw(), cursor="zombie"), *[None, batch(cursor=None)] * 3)
    session = poller(bench)
    await asyncio.sleep(5)
    await set_owner(bench, "other-1", cursor="b")
    await asyncio.sleep(120)
    assert session.state is State.ENDED
    stored = await bench.checkpoint()
    assert (stored.owner, stored.position.cursor, bench.freed) == ("other-1", "b", [])


async def test_a_checkpoint_that_was_set_back_ends_the_poller_which_names_itself_anew() -> None:
    """Else whom the shard is handed to takes the bot from one that is dead, while this one's last poll waits."""
    bench = await ready(batch(cursor="b"), *[None, batch(cursor=None)] * 2)
    session, task = start_poller(bench)
    await asyncio.sleep(1)
    await set_owner(bench, "dead-1", cursor="old")
    bench.leases.proven_dead.add("dead-1")
    await asyncio.sleep(120)
    assert task.done(), "the supervisor begins another one, as long as the shard is its own"
    bench.chat.polls = deque([batch(raw(), cursor="c")])
    session, task = start_poller(bench)
    await asyncio.sleep(5)
    assert (await owner_of(bench), bench.chat.asked[-2:], texts(bench)) == ("me-1", ["old", "c"], ["hello"])
    session.stop(immediately=True)
    await task


# giving it back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [BusRefused(10054, "too large"), Temporary("bus_down")])
async def test_a_bot_is_given_back_also_where_the_bus_refuses_it_at_first(problem: AdapterError) -> None:
    """This replica lives on, so that nobody else could ever take the bot."""
    bench = await ready()
    session, task = start_poller(bench)
    await settle()
    bench.checkpoint_bucket.on_write = refuses = Failing(3, problem)
    session.stop(immediately=True)
    await task
    assert (refuses.left, await owner_of(bench)) == (0, "")


async def test_who_cannot_open_the_token_leaves_the_checkpoint_as_it_is() -> None:
    sealer = Sealer((bytes(32),))
    bench = await ready(token=sealer.seal(BOT, "secret"))
    await polls(bench)
    before = dict(bench.checkpoint_bucket.entries)
    stranger = Bench(bench, incarnation="other-1", token_key=(b"\1" * 32,))
    stranger.leases.proven_dead.add("me-1")
    session, task = start_poller(stranger)
    await asyncio.sleep(60)
    assert (session.state, session.why[:10]) == (State.RETRYING, "token_key:")
    assert bench.checkpoint_bucket.entries == before
    session.stop(immediately=True)
    await task


async def test_the_checkpoint_of_a_bot_that_is_unbound_goes_in_time() -> None:
    bench = await ready(batch(raw("one", 1)), batch(raw("two", 2), cursor="c"))
    session, task = start_poller(bench)
    await asyncio.sleep(5)
    assert bench.checkpoint_bucket.ttls == {}
    await bench.bindings.remove(BOT)
    session.stop(immediately=True)
    await task
    stored = await bench.checkpoint()
    assert (stored.owner, stored.position.cursor, stored.position.inbox_seq) == ("", "c", 2)
    assert list(bench.checkpoint_bucket.ttls.values()) == [3600]


@pytest.mark.parametrize("moved", [False, True], ids=["by the owner that told it", "by another owner"])
async def test_what_was_stored_before_a_bot_ended_is_a_repeat_for_its_next_sandbox(moved: bool) -> None:
    """iLink repeats for an hour, also where the inbox has let the message go."""
    bench = await ready(*[batch(raw(f"word {n}", n), cursor=f"c{n}") for n in range(40)])
    session, task = start_poller(bench)
    await asyncio.sleep(30)
    stored = len(texts(bench))
    if moved:
        session.stop(immediately=True)
        await task
        bench = successor_of(bench)
        session, task = start_poller(bench)
        await asyncio.sleep(5)
    await bench.bindings.remove(BOT)
    session.stop(immediately=True)
    await task
    bench.bus.forget_ids()
    stored_before, bench.bus.kept = bench.bus.inbound(), []
    await bench.bind("s2")
    bench.chat.polls.append(batch(raw("word 3", 3), raw("word 39", 99, create_time_ms=1789000000039), cursor="z"))
    session, task = start_poller(bench)
    await asyncio.sleep(5)
    assert (stored, len(stored_before), texts(bench)) == (40, 40, [])
    session.stop(immediately=True)
    await task


# where polling begins ------------------------------------------------------------------------------------


async def test_a_start_cursor_counts_once_however_often_it_is_sealed() -> None:
    """A bot that is bound anew with it, perhaps to another sandbox, told everything since to that one."""
    sealer = Sealer((bytes(32),))
    given = [sealer.seal(cursor_context(BOT), word) for word in ("given", "given", "another")]
    bench = await ready(batch(raw(), cursor="b"), start_cursor=given[0])
    await polls(bench)
    await bench.bindings.remove(BOT)
    await bench.bind("s2", start_cursor=given[1])
    await polls(bench)
    assert bench.chat.asked == ["given", "b", "b"]
    await bench.bind("s2", start_cursor=given[2])
    await polls(bench)
    assert bench.chat.asked[3:] == ["another"]


async def test_an_empty_start_cursor_is_none() -> None:
    bench = await ready(start_cursor="")
    with capture_logs() as logs:
        await polls(bench)
    assert (bench.chat.asked, [entry for entry in logs if entry["log_level"] == "error"]) == ([""], [])


async def test_a_start_cursor_of_which_the_key_is_gone_leaves_the_bot_where_it_is() -> None:
    bench = await ready(batch(raw(), cursor="b"))
    await polls(bench)
    await bench.bind(start_cursor=Sealer((b"\1" * 32,)).seal(cursor_context(BOT), "given"))
    with capture_logs() as logs:
        await polls(bench)
    assert bench.chat.asked == ["", "b", "b"]
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["cursor.unopenable"]


async def test_a_start_cursor_bound_while_the_bot_is_polled_is_used_once_and_at_once() -> None:
    bench = await ready(batch(raw("one"), cursor="b"))
    session, task = start_poller(bench)
    await asyncio.sleep(5)
    await bench.bind(start_cursor="given")
    bench.chat.polls.append(batch(raw("two", 2), cursor="c"))
    session.cancel_poll()
    await asyncio.sleep(5)
    session.stop(immediately=True)
    await task
    assert bench.chat.asked == ["", "b", "given", "c"]
    successor, task = start_poller(bench)
    await asyncio.sleep(5)
    successor.stop(immediately=True)
    await task
    assert bench.chat.asked[4:] == ["c"]


async def test_a_bot_is_given_back_also_while_the_lease_is_paused() -> None:
    """This replica lives, so that nobody would take it: it was not polled for half a minute."""
    bench = await ready(batch(raw()))
    session, task = start_poller(bench)
    await asyncio.sleep(2)
    bench.leases.has_lease = False
    bench.leases.changed.notify_all()
    session.stop(immediately=True)
    await asyncio.sleep(2)
    assert task.done()
    assert await owner_of(bench) == ""
