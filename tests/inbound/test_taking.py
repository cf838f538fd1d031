"""Whose a bot is: it is taken, waited for, given back, taken over, and who lost it stores what it has late."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from adapter.errors import AdapterError, BusRefused, LeaseLost, Refused, Temporary
from adapter.inbound.bot_poller import BotPoller
from adapter.inbound.journal import JournalRecord
from adapter.inbound.poller import poll_forever, run_poller
from adapter.inbound.taking import take_bot
from adapter.ports import Message, Polled
from adapter.security.seal import Sealer, cursor_context
from tests.fakes import Bench, Failing, FakeLeases, batch, ready, settle
from tests.inbound.downloads import heir_to, image
from tests.inbound.pollers import BOT, Poller, polls, raw, tended, texts

VIRTUAL_TIME = True


async def writes(bench: Bench, owner: str, *messages: bytes, cursor: str = "b") -> None:
    """The journal gets a record, as from another replica; the bot was polled by nobody, or by that one."""
    last = await bench.journal.last(BOT)
    record = JournalRecord(cursor=cursor, messages=list(messages))
    await bench.journal.append(BOT, record, owner, last.sequence if last else 0)


async def owner_of(bench: Bench) -> str:
    return (await bench.written())[-1].owner


# waiting for another owner -------------------------------------------------------------------------------


async def test_a_new_owner_waits_until_the_old_one_has_stopped(poller: Poller) -> None:
    bench = await ready()
    await writes(bench, "other-1")
    session = poller(bench)
    await asyncio.sleep(30)
    assert bench.chat.asked == []
    await writes(bench, "", cursor="c")
    session.bot_released.set()
    await asyncio.sleep(1)
    assert bench.chat.asked == ["c"]


async def test_a_new_owner_that_is_not_told_finds_out(poller: Poller) -> None:
    bench = await ready()
    await writes(bench, "other-1")
    poller(bench)
    await asyncio.sleep(30)
    await writes(bench, "", cursor="c")
    await asyncio.sleep(7)
    assert bench.chat.asked == ["c"]


async def test_a_new_owner_takes_over_from_one_that_is_proven_dead(poller: Poller) -> None:
    bench = await ready()
    await writes(bench, "other-1")
    session = poller(bench)
    await asyncio.sleep(5)
    bench.leases.proven_dead.add("other-1")
    session.bot_released.set()
    await asyncio.sleep(1)
    assert (bench.chat.asked, await owner_of(bench)) == (["b"], "me-1")


async def test_a_bot_bound_anew_while_another_has_it_is_not_asked_for_without_a_pause(poller: Poller) -> None:
    bench = await ready()
    await writes(bench, "other-1")
    session = poller(bench)
    await asyncio.sleep(5)
    asked = bench.leases.asked_dead
    session.cancel_poll()
    await asyncio.sleep(60)
    assert 5 < bench.leases.asked_dead - asked < 60


async def test_a_new_owner_takes_a_bot_whose_record_names_one_that_has_no_poller_of_it(poller: Poller) -> None:
    """As after the journal was restored: it lives, and would never give back what it does not have."""
    bench = await ready()
    await writes(bench, "other-1", raw("left over"))
    poller(bench)
    await asyncio.sleep(60)
    assert bench.chat.asked == []
    bench.idle.add(("other-1", BOT))
    await asyncio.sleep(60)
    assert (bench.chat.asked, await owner_of(bench)) == (["b"], "me-1")
    assert texts(bench) == ["left over"]


async def test_an_owner_that_begins_to_poll_as_it_is_asked_keeps_its_bot(poller: Poller) -> None:
    bench = await ready()
    await writes(bench, "other-1")

    async def is_idle(owner: str, bot: str) -> bool:
        await writes(bench, owner)
        return True

    poller(bench, is_idle=is_idle)
    await asyncio.sleep(120)
    assert (bench.chat.asked, await owner_of(bench)) == ([], "other-1")


async def test_who_waits_for_an_owner_holds_up_no_other_bot() -> None:
    """Starts are bounded; one that waits for a replica elsewhere must not use up the bound."""
    bench = await ready()
    await writes(bench, "other-1")
    await bench.bind(sandbox="s2", bot="b2@im.bot", user="u2@im.wechat")
    deps = bench.inbound_deps(takeovers=asyncio.Semaphore(1))
    sessions = [BotPoller(BOT), BotPoller("b2@im.bot")]
    tasks = [asyncio.get_running_loop().create_task(run_poller(session, deps)) for session in sessions]
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
    session = BotPoller(BOT)
    task = asyncio.create_task(run_poller(session, bench.inbound_deps(leases=bench.leases)))
    await asyncio.sleep(1)
    bench.leases.has_lease = False
    session.cancel_poll()
    await asyncio.sleep(1)
    assert session.state == "paused"
    looks = 0
    await asyncio.sleep(60)
    assert looks < 15
    session.stop(immediately=False)
    before = bench.clock.monotonic()
    await asyncio.wait([task])
    assert bench.clock.monotonic() - before < 0.1


# catching up ---------------------------------------------------------------------------------------------


async def test_sends_wait_until_the_conversations_have_heard_what_was_left_over(poller: Poller) -> None:
    bench = await ready()
    await writes(bench, "", raw("left over"))
    gate = asyncio.Event()

    read = bench.conversation_bucket.get

    async def get(key: str) -> object:
        await gate.wait()
        return await read(key)

    bench.conversation_bucket.get = get  # type: ignore[method-assign,assignment]
    session = poller(bench)
    await asyncio.sleep(5)
    assert (session.is_catching_up, bench.changed_sessions, bench.chat.polling) == (True, [], 1)
    gate.set()
    await asyncio.sleep(2)
    assert (session.is_catching_up, bench.changed_sessions) == (False, ["s1"])
    assert bench.record().token == "token-1"


async def test_nothing_is_caught_up_with_where_nothing_is_left_over(poller: Poller) -> None:
    bench = await ready(batch(raw()))
    first, task = tended(bench)
    await asyncio.sleep(5)
    first.stop(immediately=True)
    await task
    session = poller(bench)
    await asyncio.sleep(1)
    assert (session.is_catching_up, session.dispatcher) == (False, None)


async def test_who_waits_for_an_owner_that_lives_sends_meanwhile(poller: Poller) -> None:
    bench = await ready()
    await writes(bench, "other-1", raw())
    session = poller(bench)
    await asyncio.sleep(1)
    assert (session.is_catching_up, bench.changed_sessions) == (False, ["s1"])


async def test_a_bot_that_is_bound_again_waits_for_no_media_of_before() -> None:
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", None)
    session, task = tended(bench)
    await asyncio.sleep(1)
    await bench.bindings.remove(BOT)
    session.stop(immediately=True)
    await asyncio.sleep(1)
    await bench.bind("s2")
    began = bench.clock.monotonic()
    await task
    assert bench.clock.monotonic() - began < 5


# losing it -----------------------------------------------------------------------------------------------


async def test_a_fenced_poller_ends_quietly_and_gives_nothing_back() -> None:
    bench = await ready(batch(raw(), cursor="zombie"))
    _, task = tended(bench)
    await settle()
    await writes(bench, "other-1")
    await asyncio.sleep(5)
    assert task.done()
    assert await owner_of(bench) == "other-1"


async def test_what_was_polled_for_a_bot_that_another_took_is_stored_for_that_one() -> None:
    """iLink may give it to nobody else; never the cursor."""
    bench = await ready(batch(raw("late"), cursor="zombie"))
    session, deps = BotPoller(BOT), bench.inbound_deps()
    journal = await take_bot(session, deps)
    assert journal is not None
    await writes(bench, "other-1")
    with pytest.raises(LeaseLost):
        await poll_forever(session, journal, deps)
    (*_, last) = await bench.written()
    assert (last.owner, last.record.cursor, last.record.messages) == ("other-1", "b", [raw("late")])
    assert bench.freed == [BOT]
    assert texts(bench) == [], "the owner of now tells it"


async def frozen_with(bench: Bench, *batches: Polled, heir: Bench | None, given: tuple[bytes, ...] = ()) -> None:
    """The replica that polls is stopped with an answer in hand; it goes on long after `heir` took the bot and polled
    the messages `given`, where iLink gave it any."""
    bench.chat.polls.extend(batches)
    session, task = tended(bench)

    async def freeze(message: Message) -> None:
        if message.stream != "journal" or not bench.chat.asked:
            return
        bench.bus.on_publish, bench.leases.has_lease = None, False
        asyncio.get_running_loop().call_later(60, resume)
        if heir is not None:
            bench.leases.incarnation = "me-2"  # it was revoked, and has joined anew

    def resume() -> None:
        bench.leases.has_lease = True
        bench.leases.changed.notify_all()

    bench.bus.on_publish = freeze
    await asyncio.sleep(5)
    heirs = None
    if heir is not None:
        bench.chat.polls.clear()
        heir.chat.polls.extend([batch(*given, cursor="b"), None, None])
        heirs = tended(heir)
        await asyncio.sleep(60)
        heirs[0].may_have_late_record = bench.freed == [BOT]  # as the supervisor says
    await asyncio.sleep(100)
    for one in (heirs, (session, task)):
        if one is not None:
            one[0].stop(immediately=True)
            await one[1]


async def test_who_was_frozen_with_a_batch_in_hand_tells_nothing_twice_and_moves_no_cursor() -> None:
    """The server's window against duplicates has passed by then."""
    bench = await ready()
    words = raw("one", 1), raw("two", 2)
    await frozen_with(bench, batch(*words, cursor="zombie"), heir=heir_to(bench), given=words)
    assert texts(bench) == ["one", "two"]
    assert (await bench.last_record()).cursor == "b"
    assert set(bench.chat.asked) == {"", "b"}


async def test_what_ilink_gave_to_one_that_was_frozen_and_to_nobody_else_is_told_late() -> None:
    bench, words = await ready(), (raw("one", 1), raw("two", 2))
    await frozen_with(bench, batch(*words, cursor="zombie"), heir=heir_to(bench), given=(words[1],))
    assert texts(bench) == ["two", "one"]
    assert (await bench.last_record()).cursor == "b"


async def test_a_late_record_is_told_by_the_owner_of_now_at_its_next_poll(poller: Poller) -> None:
    bench = await ready(None, batch(raw("three", 3), cursor="c"))
    session = poller(bench)
    await asyncio.sleep(1)
    await writes(bench, "me-1", raw("late"), cursor="")
    session.may_have_late_record = True
    session.cancel_poll()
    await asyncio.sleep(5)
    assert texts(bench) == ["late", "three"]


async def test_a_late_record_of_which_nobody_tells_is_found_with_the_next_write(poller: Poller) -> None:
    bench = await ready(None, batch(raw("three", 3), cursor="c"), batch(raw("four", 4), cursor="d"))
    poller(bench)
    await asyncio.sleep(1)
    await writes(bench, "me-1", raw("late"), cursor="")
    await asyncio.sleep(60)
    assert texts(bench) == ["late", "three", "four"]


async def test_a_late_record_that_nobody_owns_is_told_by_the_next_owner(poller: Poller) -> None:
    bench = await ready(batch(raw("one", 1)))
    await polls(bench)
    bench.chat.script_ends = False
    await writes(bench, "", raw("late", 2))
    poller(bench)
    await asyncio.sleep(1)
    assert texts(bench) == ["one", "late"]


async def test_a_lease_that_only_pauses_keeps_the_batch_in_hand() -> None:
    bench = await ready()
    await frozen_with(bench, batch(raw("one", 1), raw("two", 2), cursor="b"), heir=None)
    assert texts(bench) == ["one", "two"]
    assert (bench.chat.asked, await owner_of(bench)) == (["", "b"], "")


async def test_a_journal_that_was_set_back_ends_the_poller_which_names_itself_anew() -> None:
    """Else whom the shard is handed to takes the bot from one that is dead, while this one's last poll waits."""
    bench = await ready(batch(cursor="b"), None, batch(raw(), cursor="c"))
    session, task = tended(bench)
    await asyncio.sleep(1)
    bench.bus.kept.clear()
    await writes(bench, "dead-1", cursor="old")
    bench.leases.proven_dead.add("dead-1")
    await asyncio.sleep(60)
    assert task.done(), "the supervisor begins another one, as long as the shard is its own"
    session, task = tended(bench)
    await asyncio.sleep(1)
    assert (await owner_of(bench), bench.chat.asked[-1], texts(bench)) == ("me-1", "old", ["hello"])
    session.stop(immediately=True)
    await task


# giving it back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [BusRefused(10054, "too large"), Temporary("bus_down")])
async def test_a_bot_is_given_back_also_where_the_bus_refuses_it_at_first(problem: AdapterError) -> None:
    """This replica lives on, so that nobody else could ever take the bot."""
    bench = await ready()
    session, task = tended(bench)
    await settle()
    bench.bus.on_publish = refuses = Failing(3, problem)
    session.stop(immediately=True)
    await task
    assert (refuses.left, await owner_of(bench)) == (0, "")


async def test_who_cannot_open_the_token_leaves_the_journal_as_it_is() -> None:
    sealer = Sealer((bytes(32),))
    bench = await ready(token=sealer.seal(BOT, "secret"))
    await polls(bench)
    before = await bench.written()
    stranger = Bench(bench, incarnation="other-1", token_key=(b"\1" * 32,))
    stranger.leases.proven_dead.add("me-1")
    with pytest.raises(Refused):
        await take_bot(BotPoller(BOT), stranger.inbound_deps())
    assert await bench.written() == before


async def test_the_end_of_a_bot_leaves_one_record_that_goes_in_time() -> None:
    bench = await ready(batch(raw("one", 1)), batch(raw("two", 2), cursor="c"))
    session, task = tended(bench)
    await asyncio.sleep(5)
    await bench.bindings.remove(BOT)
    session.stop(immediately=True)
    await task
    (stored,) = bench.bus.found("JOURNAL")
    assert stored.headers["Nats-TTL"] == "3600s"
    (last,) = await bench.written()
    assert (last.owner, last.record.cursor, last.record.messages) == ("", "c", [])


@pytest.mark.parametrize("moved", [False, True], ids=["by the owner that told it", "by another owner"])
async def test_what_was_told_before_the_end_of_a_bot_is_a_repeat_for_its_next_sandbox(moved: bool) -> None:
    """iLink repeats for an hour, also where no record is left that had the message."""
    bench = await ready(*[batch(raw(f"word {n}", n), cursor=f"c{n}") for n in range(40)])
    session, task = tended(bench)
    await asyncio.sleep(30)
    told = len(texts(bench))
    if moved:
        session.stop(immediately=True)
        await task
        bench = heir_to(bench)
        session, task = tended(bench)
        await asyncio.sleep(5)
    await bench.bindings.remove(BOT)
    session.stop(immediately=True)
    await task
    bench.bus.forget_ids()
    await bench.bind("s2")
    bench.chat.polls.append(batch(raw("word 3", 3), raw("word 39", 99, create_time_ms=1789000000039), cursor="z"))
    session, task = tended(bench)
    await asyncio.sleep(5)
    assert (told, len(texts(bench))) == (40, 40)
    session.stop(immediately=True)
    await task


# where polling begins ------------------------------------------------------------------------------------


async def test_a_start_cursor_is_used_once() -> None:
    bench = await ready(batch(cursor="b"), batch(raw(), cursor="c"), start_cursor="given")
    await polls(bench)
    await polls(heir_to(bench))
    assert bench.chat.asked == ["given", "b", "c", "c"]


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
    session, task = tended(bench)
    await asyncio.sleep(5)
    await bench.bind(start_cursor="given")
    bench.chat.polls.append(batch(raw("two", 2), cursor="c"))
    session.cancel_poll()
    await asyncio.sleep(5)
    session.stop(immediately=True)
    await task
    assert bench.chat.asked == ["", "b", "given", "c"]
    heir, task = tended(bench)
    await asyncio.sleep(5)
    heir.stop(immediately=True)
    await task
    assert bench.chat.asked[4:] == ["c"]


async def test_a_bot_is_given_back_also_while_the_lease_is_paused() -> None:
    """This replica lives, so that nobody would take it: it was not polled for half a minute."""
    bench = await ready(batch(raw()))
    session, task = tended(bench)
    await asyncio.sleep(2)
    bench.leases.has_lease = False
    bench.leases.changed.notify_all()
    session.stop(immediately=True)
    await asyncio.sleep(2)
    assert task.done()
    assert (await bench.written())[-1].owner == ""
