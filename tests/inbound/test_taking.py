"""Whose a bot is: it is taken, waited for, given back, taken over, and who lost it stores what it has late."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.bridge.poller import State
from adapter.contract.names import to_subject_token
from adapter.contract.records import PollRecord
from adapter.errors import AdapterError, BusRefused, Temporary
from adapter.ports import BusMessage
from adapter.security.seal import Sealer, cursor_context
from tests.fakes import Bench, Failing, FakeLeases, batch, ready, settle
from tests.inbound.pollers import BOT, Poller, Replica, polls, raw, set_owner, start_poller, successor_of

VIRTUAL_TIME = True


# waiting for another owner -------------------------------------------------------------------------------


async def test_a_new_owner_waits_until_the_old_one_has_stopped(poller: Poller) -> None:
    bench = await ready()
    await set_owner(bench, "other-1")
    session = poller(bench)
    await asyncio.sleep(30)
    assert bench.chat.asked == []
    await set_owner(bench, "")
    session.on_polled()
    await asyncio.sleep(1)
    assert bench.chat.asked == [""]


async def test_a_new_owner_that_gets_no_notice_finds_out(poller: Poller) -> None:
    bench = await ready()
    await set_owner(bench, "other-1")
    poller(bench)
    await asyncio.sleep(30)
    await set_owner(bench, "")
    await asyncio.sleep(7)
    assert bench.chat.asked == [""]


async def test_a_new_owner_takes_over_from_one_that_is_proven_dead(poller: Poller) -> None:
    bench = await ready()
    await set_owner(bench, "other-1")
    session = poller(bench)
    await asyncio.sleep(5)
    bench.leases.proven_dead.add("other-1")
    session.on_polled()
    await asyncio.sleep(1)
    assert (bench.chat.asked, await bench.owner()) == ([""], "me-1")


async def test_a_new_owner_takes_a_bot_whose_key_names_one_that_has_no_poller_of_it(poller: Poller) -> None:
    """As after a restore: it lives, and would never give back what it does not have."""
    bench = await ready()
    await set_owner(bench, "other-1")
    session = poller(bench)
    await asyncio.sleep(60)
    assert (bench.chat.asked, session.state, session.shown.why) == ([], State.WAITING, "other-1 has not released it")
    bench.idle.add(("other-1", BOT))
    await asyncio.sleep(60)
    assert (bench.chat.asked, await bench.owner(), session.state) == ([""], "me-1", State.POLLING)


async def test_an_owner_that_begins_to_poll_as_it_is_asked_keeps_its_bot(poller: Poller) -> None:
    bench = await ready()
    await set_owner(bench, "other-1")

    async def is_idle(incarnation: str, bot: str) -> bool:
        await set_owner(bench, incarnation)
        return True

    bench.is_idle = is_idle  # type: ignore[method-assign]
    poller(bench)
    await asyncio.sleep(120)
    assert (bench.chat.asked, await bench.owner()) == ([], "other-1")


async def test_a_bot_that_waits_for_an_owner_delays_no_other_bot() -> None:
    """Starts are bounded; one that waits for a replica elsewhere must not use up the bound."""
    bench = await ready()
    await set_owner(bench, "other-1")
    await bench.bind(sandbox="s2", bot="b2@im.bot", user="u2@im.wechat")
    takeovers = asyncio.Semaphore(1)
    sessions = [bench.new_poller(bot, takeovers=takeovers) for bot in (BOT, "b2@im.bot")]
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


async def test_a_poller_whose_replica_joined_anew_polls_no_more(poller: Poller) -> None:
    """It could not renew its lease, another one has the bot by now, and its key is left alone."""
    bench = await ready(None)
    session = poller(bench)
    await asyncio.sleep(1)
    bench.leases.incarnation = "me-2"
    await set_owner(bench, "other-1")
    await asyncio.sleep(120)
    assert (session.state, await bench.owner(), bench.freed) == (State.ENDED, "other-1", [])


async def test_a_person_whose_entries_have_all_aged_goes_on_by_their_record() -> None:
    """The same where a full stream has evicted them."""
    bench = await ready(batch(raw(), cursor="b"))
    await polls(bench)
    person = await bench.person()
    await person.save()
    bench.bus.kept = [kept for kept in bench.bus.kept if kept.stream != "WECHAT_IN"]
    successor = successor_of(bench)
    successor.chat.polls.append(batch(raw("later", 2, context_token=None), cursor="c"))
    await polls(successor)
    assert bench.chat.asked[-2:] == ["b", "c"]
    assert [inbound.text for inbound in bench.bus.inbound()] == ["later"]
    assert (await successor.person()).state.token == person.state.token != ""


# giving it back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [BusRefused(10054, "too large"), Temporary("bus_down")])
async def test_a_bot_is_given_back_also_where_the_bus_refuses_it_at_first(problem: AdapterError) -> None:
    """This replica lives on, so that nobody else could ever take the bot."""
    bench = await ready()
    session, task = start_poller(bench)
    await settle()
    bench.poll_bucket.on_write = refuses = Failing(3, problem)
    session.stop(immediately=True)
    await task
    assert (refuses.left, await bench.owner()) == (0, "")


async def test_who_cannot_open_the_token_leaves_the_poll_key_as_it_is() -> None:
    sealer = Sealer((bytes(32),))
    bench = await ready(token=sealer.seal(BOT, "secret"))
    await polls(bench)
    before = dict(bench.poll_bucket.entries)
    stranger = Bench(bench, incarnation="other-1", token_key=(b"\1" * 32,))
    stranger.leases.proven_dead.add("me-1")
    session, task = start_poller(stranger)
    await asyncio.sleep(60)
    assert (session.state, session.shown.why[:10]) == (State.RETRYING, "token_key:")
    assert bench.poll_bucket.entries == before
    session.stop(immediately=True)
    await task


async def test_the_poll_key_of_a_bot_that_is_unbound_goes_in_time() -> None:
    bench = await ready()
    session, task = start_poller(bench)
    await asyncio.sleep(5)
    assert bench.poll_bucket.ttls == {}
    await bench.bindings.remove(BOT)
    session.stop(immediately=True)
    await task
    assert (await bench.owner(), list(bench.poll_bucket.ttls.values())) == ("", [3600])


# where polling begins ------------------------------------------------------------------------------------


async def test_a_start_cursor_counts_until_the_person_has_one_of_their_own() -> None:
    sealer = Sealer((bytes(32),))
    bench = await ready(batch(raw(), cursor="b"), start_cursor=sealer.seal(cursor_context(BOT), "given"))
    await polls(bench)
    await bench.bind(start_cursor=sealer.seal(cursor_context(BOT), "another"))
    await polls(bench)
    assert bench.chat.asked == ["given", "b", "b"]


async def test_a_start_cursor_counts_until_all_parts_of_the_first_answer_are_stored() -> None:
    """iLink gives the answer again to who takes the bot after a death between two of its parts."""
    answer = batch(*(raw(f"t{number}", number) for number in range(1, 151)), cursor="b")
    bench = await ready(answer, start_cursor="given")
    parts = 0

    async def only_the_first(message: BusMessage) -> None:
        nonlocal parts
        parts += message.stream == "in"
        if parts > 1:
            await asyncio.Event().wait()

    bench.bus.on_publish = only_the_first
    replica = Replica(bench)
    await asyncio.sleep(2)
    await replica.die()
    bench.bus.on_publish = None
    successor = successor_of(bench)
    successor.chat.polls.append(answer)
    await polls(successor)
    assert bench.chat.asked == ["given", "given", "b"]
    assert [inbound.text for inbound in bench.bus.inbound()] == [f"t{number}" for number in range(1, 151)]


async def test_a_bot_that_is_given_back_keeps_no_cursor_of_another_bot() -> None:
    bench = await ready(batch(raw(), cursor="b"))
    session, task = start_poller(bench)
    await asyncio.sleep(2)
    person = await bench.person()
    await bench.bind(bot="b2@im.bot")
    person.on_cursor("b2@im.bot", "of b2")
    await bench.bindings.remove(BOT)
    session.stop(immediately=True)
    await task
    record = msgspec.json.decode(bench.poll_bucket.entries[to_subject_token(BOT)].value or b"", type=PollRecord)
    assert (record.owner, record.sealed) == ("", b"")


async def test_a_bot_that_somebody_has_taken_meanwhile_is_given_back_no_more() -> None:
    """Somebody has written its poll key by hand."""
    bench = await ready(batch(raw()))
    session, task = start_poller(bench)
    await asyncio.sleep(2)
    await set_owner(bench, "other-1")
    session.stop(immediately=True)
    await asyncio.sleep(2)
    assert task.done()
    assert await bench.owner() == "other-1"


async def test_an_empty_start_cursor_is_none() -> None:
    bench = await ready(start_cursor="")
    with capture_logs() as logs:
        await polls(bench)
    assert (bench.chat.asked, [entry for entry in logs if entry["log_level"] == "error"]) == ([""], [])


async def test_a_start_cursor_of_which_the_key_is_gone_is_none() -> None:
    bench = await ready(start_cursor=Sealer((b"\1" * 32,)).seal(cursor_context(BOT), "given"))
    with capture_logs() as logs:
        await polls(bench)
    assert bench.chat.asked == [""]
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["cursor.unopenable"]


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
    assert await bench.owner() == ""
