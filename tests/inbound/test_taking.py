"""Whose a bot is: what is waited for before it is polled, and where its polls begin."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from adapter.bridge.poller import State
from adapter.ports import BusMessage
from adapter.tools.seal import Sealer, cursor_context
from tests.fakes import Bench, FakeTenure, batch, ready
from tests.inbound.pollers import BOT, Poller, Replica, polls, raw, start_poller, successor_of

VIRTUAL_TIME = True


# waiting -------------------------------------------------------------------------------------------------


async def test_a_bot_that_waits_for_a_former_owner_delays_no_other_bot() -> None:
    """Starts are bounded; one that waits for a replica elsewhere must not use up the bound."""
    bench = await ready()
    bench.partition(left=["other"])
    await bench.bind(sandbox="s2", bot="b2@im.bot", user="u2@im.wechat")
    takeovers = asyncio.Semaphore(1)
    sessions = [bench.new_poller(bot, takeovers=takeovers) for bot in (BOT, "b2@im.bot")]
    tasks = [asyncio.get_running_loop().create_task(session.run()) for session in sessions]
    await asyncio.sleep(5)
    assert [session.state for session in sessions] == [State.WAITING, State.POLLING]
    assert sessions[0].shown.why == "A former owner of its partition may still poll it."
    for session in sessions:
        session.stop(immediately=True)
    await asyncio.gather(*tasks)


async def test_a_poller_that_waits_for_the_lease_hardly_looks_at_it_and_leaves_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Thousands that look each second take an eighth of a core, where there may be no more than that."""
    bench, looks, is_valid = await ready(), 0, FakeTenure.is_valid.fget  # type: ignore[attr-defined]

    def counted(tenure: FakeTenure) -> bool:
        nonlocal looks
        looks += 1
        return bool(is_valid(tenure))

    monkeypatch.setattr(FakeTenure, "is_valid", property(counted))
    session, task = start_poller(bench)
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


async def test_a_poller_whose_partition_was_lost_polls_no_more(poller: Poller) -> None:
    """Another replica may own it before this one hears of it."""
    bench = await ready(None)
    session = poller(bench)
    await asyncio.sleep(1)
    bench.leases.owned.clear()
    await asyncio.sleep(120)
    assert (session.state, len(bench.chat.asked)) == (State.ENDED, 1)


async def test_a_bot_that_is_lost_while_it_waits_for_a_former_owner_is_not_polled(poller: Poller) -> None:
    bench = await ready()
    partition = bench.partition(left=["other"])
    session = poller(bench)
    await asyncio.sleep(5)
    bench.leases.owned.clear()
    partition.handover.changed.notify_all()
    await asyncio.sleep(1)
    assert (session.state, bench.chat.asked) == (State.ENDED, [])


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


async def test_who_cannot_open_the_token_does_not_poll_and_says_so() -> None:
    bench = await ready(token=Sealer((bytes(32),)).seal(BOT, "secret"))
    stranger = Bench(bench, instance="other", token_key=(b"\1" * 32,))
    session, task = start_poller(stranger)
    await asyncio.sleep(60)
    assert (session.state, session.shown.why[:10], bench.chat.asked) == (State.RETRYING, "token_key:", [])
    assert bench.bus.writes == []
    session.stop(immediately=True)
    await task


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
