"""From the journal to conversations and inboxes: each message once and in order, whoever dies, pauses, takes over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.contract.messages import Options, UnsupportedItem
from adapter.contract.names import H_JOURNAL, H_MSG_ID, H_REASON, conversation_key, shard_of
from adapter.errors import BusRefused, LeaseLost, Temporary
from adapter.inbound.bot_journal import SNAPSHOT_AFTER_NEW, SNAPSHOT_AFTER_RECORDS
from adapter.inbound.dispatcher import MAX_BACKLOG, MAX_BACKLOG_BYTES
from adapter.inbound.inbox import LARGE
from adapter.inbound.journal import JournalRecord
from adapter.ports import Message, Polled, Stored
from tests.fakes import EPOCH_MS, Bench, Failing, batch, ready, settle
from tests.growth import tables
from tests.inbound.downloads import NOTHING, PNG, heir_to, image, run, said, words
from tests.inbound.pollers import BOT, USER, Poller, polls, raw, tended, texts

VIRTUAL_TIME = True


# what a message becomes ----------------------------------------------------------------------------------


async def test_a_message_says_who_what_when_and_what_may_be_answered() -> None:
    bench = await ready(batch(raw("hello")))
    await polls(bench)
    (inbound,) = bench.bus.inbound()
    (stored,) = bench.bus.found("IN")
    assert stored.subject == "wechat.inbox.s1"
    assert inbound.id == stored.headers[H_MSG_ID] == f"in:{BOT}:m7497484083968569001"
    assert stored.headers[H_JOURNAL] == f"{(await bench.written())[-1].sequence}.0"
    assert (inbound.sandbox, inbound.bot, inbound.user, inbound.text) == ("s1", BOT, USER, "hello")
    assert inbound.sent_at_ms == EPOCH_MS + 1
    assert inbound.window.remaining == 10
    assert inbound.window.closes_at_ms is not None
    await asyncio.sleep(1)
    assert inbound.window.closes_at_ms == bench.record().window.opened_ms + 23 * 3_600_000


async def test_the_order_in_an_answer_is_ilinks_whatever_seq_and_time_say() -> None:
    bench = await ready(batch(raw("one", 3), raw("two", 1), raw("three", 2)), batch(raw("four", 0), cursor="c"))
    await polls(bench)
    assert texts(bench) == ["one", "two", "three", "four"]


async def test_the_time_to_the_stream_is_counted_for_each_message() -> None:
    """The objective is about messages; an answer of three is three."""
    bench = await ready(batch(raw("one"), raw("two", 2), raw("three", 3)))
    await polls(bench)
    assert bench.metrics.value("inbound_publish_duration_seconds_count") == 3


async def test_a_huge_answer_is_told_whole() -> None:
    bench = await ready(batch(*(raw(f"t{number}", number) for number in range(1000))))
    await polls(bench)
    assert texts(bench) == [f"t{number}" for number in range(1000)]


async def test_a_message_larger_than_the_bus_takes_is_told_without_its_content() -> None:
    """In its place: what came before it and after it keep theirs."""
    bench = await ready(batch(raw("one", 1), raw("a" * 2 * LARGE, 2), raw("two", 3)))
    bench.bus.refuse = lambda message: (
        BusRefused(10054, "too large") if message.stream == "in" and len(message.payload) > LARGE else None
    )
    await polls(bench)
    assert texts(bench) == ["one", "", "two"]
    stub = next(inbound for inbound in bench.bus.inbound() if not inbound.text)
    assert stub.items == [UnsupportedItem(type=0, reason="too_large")]
    assert (len(bench.bus.found("DEAD")), bench.chat.asked) == (1, ["", "b"])


# conversations -------------------------------------------------------------------------------------------


async def test_the_newest_token_is_known_before_the_sandbox_can_answer() -> None:
    bench = await ready(batch(raw(number=1), raw(number=2), raw(number=3, context_token=None)))
    known: list[str] = []

    async def look(message: Message) -> None:
        if message.stream == "in":
            record = bench.processors[shard_of("s1")].record_in_memory("s1", USER)
            known.append(record.token if record else "")

    bench.bus.on_publish = look
    await polls(bench)
    assert known == ["token-2"] * 3


async def test_a_conversation_that_is_held_up_is_told_in_its_turn_and_holds_up_no_inbox(poller: Poller) -> None:
    """As one that waits for a receipt that cannot be stored."""
    bench = await ready()
    bench.hears()
    processor, gate = bench.processor(), asyncio.Event()

    async def away(message: Message) -> None:
        if message.stream == "event":
            await gate.wait()

    bench.bus.on_publish = away
    processor.intake.on_delivery(bench.command("one"))
    await asyncio.sleep(5)
    bench.chat.polls.append(batch(raw("hello")))
    poller(bench)
    await asyncio.sleep(3)
    assert texts(bench) == ["hello"]
    gate.set()
    await asyncio.sleep(2)
    assert bench.record().token == "token-1"


async def test_what_the_user_said_is_stored_within_a_second_once_for_many_messages(poller: Poller) -> None:
    bench = await ready(*[batch(raw(f"t{number}", number), cursor=f"c{number}") for number in range(1, 11)])
    poller(bench)
    await asyncio.sleep(2)
    assert bench.bus.writes.count("conversation") <= 2
    assert (bench.record().token, bench.record().dispatched_to) == (
        "token-10",
        {BOT: (await bench.written())[-1].sequence},
    )


async def test_a_repeat_opens_no_new_window(poller: Poller) -> None:
    bench = await ready(batch(raw("ok")), batch(raw("ok", message_id=99), cursor="c"))
    poller(bench)
    await asyncio.sleep(5)
    assert bench.record().window.id == f"in:{BOT}:m7497484083968569001"


async def test_what_is_read_back_gives_no_sends_back() -> None:
    bench = await ready(batch(raw("ok")))
    replica = run(bench)
    await asyncio.sleep(2)
    await replica.die()
    record = bench.record()
    spent = msgspec.structs.replace(
        record, window=msgspec.structs.replace(record.window, sends_used=7), dispatched_to={}
    )
    bench.conversation_bucket.put(conversation_key("s1", USER), msgspec.json.encode(spent))
    heir = run(heir_to(bench))
    await asyncio.sleep(5)
    assert (texts(bench), bench.record().window.sends_used) == (["ok"], 7)
    await heir.leave()


async def test_a_window_opens_when_ilink_handed_the_message_over_however_late_it_is_told() -> None:
    heir = await crashed(once_the_record_is_stored, batch(words(1)))
    received_ms = max(one.record.received_ms for one in await heir.written())
    await asyncio.sleep(10 * 3600)
    replica = run(heir)
    await asyncio.sleep(5)
    assert heir.record().window.opened_ms == received_ms
    await replica.leave()


async def test_what_was_answered_before_a_crash_shows_no_typing_after_it() -> None:
    bench = await ready(batch(words(1)), options=Options(auto_typing=True))
    replica = run(bench)
    await asyncio.sleep(5)
    bench.processors[shard_of("s1")].intake.on_delivery(bench.command("answer", id="c1"))
    await asyncio.sleep(5)
    assert [shown.on for shown in bench.chat.typing] == [True, False]
    await replica.die()
    await asyncio.sleep(3600)
    heir = heir_to(bench)
    replica = run(heir)
    await asyncio.sleep(60)
    assert [shown.on for shown in heir.chat.typing] == [True, False]
    await replica.leave()


async def test_an_answer_waits_until_its_conversation_knows_what_the_owner_before_told() -> None:
    """Else it is refused, since the window that the user's words opened was not stored yet."""
    bench = await ready(batch(words(1)))
    replica = run(bench)
    await asyncio.sleep(0.3)
    assert (said(bench), bench.conversation_bucket.entries) == (["t1"], {})
    await replica.die()
    heir = heir_to(bench)
    heir.behind.add(BOT)
    heir.processor().intake.on_delivery(heir.command("answer", id="c1", when_closed="refuse"))
    await asyncio.sleep(1)
    assert heir.bus.receipts() == []
    replica = run(heir)
    await asyncio.sleep(2)
    heir.behind.clear()
    await asyncio.sleep(5)
    assert [(one.outcome, one.reason) for one in heir.bus.receipts()] == [("accepted", "")]
    await replica.leave()


async def test_an_answer_for_a_bot_that_nobody_can_take_reaches_its_end() -> None:
    bench = await ready()
    bench.behind.add(BOT)
    shard = bench.processor()
    shard.intake.on_delivery(bench.command("answer", id="c1", when_closed="refuse"))
    await asyncio.sleep(60)
    assert [(one.outcome, one.reason) for one in bench.bus.receipts()] == [("refused", "window_closed")]
    shard.stop()


async def test_a_new_users_first_words_are_stored_as_the_shard_is_given_away(poller: Poller) -> None:
    bench = await ready(batch(words(1)))
    poller(bench)
    await asyncio.sleep(0.2)
    assert (said(bench), bench.conversation_bucket.entries) == (["t1"], {})
    await bench.processors[shard_of("s1")].drain(1.0)
    assert bench.record().token == "token-1"


async def test_two_users_of_a_bot_have_windows_of_their_own() -> None:
    bench = await ready(batch(raw(), raw("hi", 2, from_user_id="u2@im.wechat", context_token="theirs")))
    await polls(bench)
    await asyncio.sleep(1)
    assert (bench.record().token, bench.record(user="u2@im.wechat").token) == ("token-1", "theirs")


async def test_messages_of_more_than_eight_other_users_of_a_bot_become_dead_letters() -> None:
    """Each user costs a conversation."""
    users = [f"u{number}@im.wechat" for number in range(2, 12)]
    words = [raw(user, number, from_user_id=user) for number, user in enumerate(users, 2)]
    bench = await ready(batch(*words, raw("own", 1)))
    await polls(bench)
    assert texts(bench) == [*users[:8], "own"]
    assert [letter.headers[H_REASON] for letter in bench.bus.found("DEAD")] == ["unreadable"] * 2


async def test_a_new_bot_whose_user_becomes_known_goes_on_where_their_old_one_was() -> None:
    bench = await ready(batch(raw()), user="", out_after=8)
    await bench.bind(bot="b0@im.bot", out_after=2)
    await polls(bench)
    binding = bench.bindings.get(BOT)
    assert binding is not None
    assert (binding.user, binding.out_after) == (USER, 2)
    assert bench.bindings.get("b0@im.bot") is None
    assert [event.change for event in bench.bus.events() if event.bot == "b0@im.bot"] == ["replaced"]


async def test_a_conversation_is_not_let_go_while_its_message_waits_for_media(poller: Poller) -> None:
    bench = await ready(batch(image(1)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    poller(bench, media_wait_s=10**6)
    await asyncio.sleep(30 * 3600)
    processor = bench.processors[shard_of("s1")]
    for is_known in (True, False):
        for _ in range(2):
            processor.evict_idle()
            await asyncio.sleep(1)
        assert (processor.record_in_memory("s1", USER) is not None) is is_known
        gate.set()
        await asyncio.sleep(5)
    assert bench.record().dispatched_to == {BOT: (await bench.written())[-1].sequence}


# the binding ---------------------------------------------------------------------------------------------


async def test_a_message_for_a_bot_that_was_unbound_while_it_came_is_a_dead_letter() -> None:
    bench = await ready()

    def unbind_and_answer() -> Polled:
        bench.bindings_bucket.put(next(iter(bench.bindings_bucket.entries)), None)
        return batch(raw("too late"))

    bench.chat.polls.append(unbind_and_answer)
    _, task = tended(bench)
    await task
    assert texts(bench) == []
    (dead,) = bench.bus.found("DEAD")
    assert (dead.headers["Wechat-Reason"], dead.data) == ("not_bound", raw("too late"))
    assert BOT in dead.headers["Wechat-Detail"], "nothing else names it"
    await bench.bind("s2")
    bench.chat.polls.append(batch(raw("too late", message_id=5, seq=5), raw("to the second", 2), cursor="c"))
    await polls(bench)
    assert texts(bench) == ["to the second"]
    assert len(bench.bus.found("DEAD")) == 1, "a repeat is for none of its next sandboxes"


async def test_a_message_for_a_bot_that_was_bound_anew_is_told_though_the_news_are_late() -> None:
    bench = await ready()
    platform = Bench(bench)

    def rebound() -> Polled:
        (key,) = bench.bindings_bucket.entries
        value = bench.bindings_bucket.entries[key].value
        bench.bindings_bucket.put(key, None)
        platform.bindings_bucket.followers.clear()
        bench.bindings_bucket.put(key, value)
        return batch(raw("in time"))

    bench.chat.polls.append(rebound)
    session, task = tended(bench)
    await asyncio.sleep(5)
    assert (texts(bench), bench.bus.found("DEAD")) == (["in time"], [])
    session.stop(immediately=True)
    await task


async def test_what_a_poll_brings_after_the_bot_was_bound_elsewhere_is_for_that_sandbox() -> None:
    bench = await ready()

    def moved() -> Polled:
        (key,) = bench.bindings_bucket.entries
        binding = bench.bindings.get(BOT)
        assert binding is not None
        bench.bindings_bucket.put(key, msgspec.json.encode(msgspec.structs.replace(binding, sandbox="s2")))
        return batch(raw("to the second"))

    bench.chat.polls.append(moved)
    await polls(bench)
    assert [inbound.sandbox for inbound in bench.bus.inbound()] == ["s2"]


async def test_what_was_said_before_the_bot_moved_opens_no_window_in_its_new_sandbox() -> None:
    bench = await ready(batch(words(1)))
    replica = run(bench)
    await asyncio.sleep(5)
    await bench.bind("s2")
    await asyncio.sleep(5)
    await replica.die()
    await asyncio.sleep(30 * 3600)
    heir = heir_to(bench)
    replica = run(heir)
    await asyncio.sleep(30)
    heir.processor("s2").intake.on_delivery(heir.command("hi", id="c1", sandbox="s2"))
    await asyncio.sleep(5)
    assert [(one.outcome, one.reason) for one in heir.bus.receipts()] == [("parked", "window_closed")]
    assert [inbound.sandbox for inbound in heir.bus.inbound()] == ["s1"]
    await replica.leave()


async def test_what_waited_while_its_sandbox_went_to_somebody_else_is_not_told_there() -> None:
    bench = await ready(batch(image(1), words(2)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    session, task = tended(bench)
    await asyncio.sleep(1)
    await bench.bindings.remove(BOT)
    session.stop(immediately=True)
    await asyncio.sleep(1)
    await bench.bind("s1", bot="b2@im.bot", user="u2@im.wechat")
    gate.set()
    await task
    assert (said(bench), len(bench.bus.found("DEAD"))) == ([], 2)


# leases --------------------------------------------------------------------------------------------------


async def test_a_lease_that_pauses_tells_nothing_and_one_that_resumes_goes_on(poller: Poller) -> None:
    bench = await ready(batch(image(1), words(2)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    poller(bench)
    await asyncio.sleep(1)
    bench.leases.has_lease = False
    gate.set()
    await asyncio.sleep(20)
    assert said(bench) == []
    bench.leases.has_lease = True
    bench.leases.changed.notify_all()
    await asyncio.sleep(2)
    assert said(bench) == ["+", "t2"]


async def test_what_is_being_told_when_the_lease_pauses_is_looked_for_before_the_next_try(poller: Poller) -> None:
    """It may have been stored without an answer, and the stream may have forgotten its id."""
    bench = await ready(batch(words(1), words(2), words(3)))

    async def pause(message: Message) -> None:
        if message.stream == "in" and len(bench.bus.found("IN")) == 2:
            bench.leases.has_lease = False

    bench.bus.on_publish = pause
    poller(bench)
    await asyncio.sleep(20)
    assert said(bench) == ["t1", "t2"]
    bench.bus.on_publish, bench.leases.has_lease = None, True
    bench.bus.forget_ids()
    bench.leases.changed.notify_all()
    await asyncio.sleep(5)
    assert said(bench) == ["t1", "t2", "t3"]


async def test_a_bot_that_is_lost_is_told_nothing_any_more_and_leaves_nothing_behind() -> None:
    bench = await ready(batch(image(1), words(2)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    tasks = len(asyncio.all_tasks())
    session, task = tended(bench)
    await asyncio.sleep(1)
    dispatcher = session.dispatcher
    assert dispatcher is not None
    bench.leases.has_lease, bench.leases.incarnation = False, "me-2"
    session.stop(immediately=True)
    await asyncio.sleep(5)
    gate.set()
    await asyncio.sleep(100)
    assert task.done()
    assert (said(bench), bench.cdn.running, dispatcher.is_done) == ([], 0, False)
    for processor in bench.processors.values():
        processor.stop()
    await settle()
    assert len(asyncio.all_tasks()) == tasks


async def test_a_bot_that_another_took_is_told_nothing_any_more(poller: Poller) -> None:
    """Its messages are the next owner's, who would tell them twice."""
    bench = await ready(batch(image(1)), None, batch(words(2), cursor="c"))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    _, task = tended(bench)
    await asyncio.sleep(1)
    sequence = (await bench.written())[-1].sequence
    await bench.journal.append(BOT, JournalRecord(cursor="b", last_heard=sequence), "other-1", sequence)
    await asyncio.sleep(36)
    gate.set()
    await asyncio.sleep(5)
    assert (task.done(), said(bench)) == (True, [])


# back-pressure -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "characters", "polled"),
    [(MAX_BACKLOG + 9, 1, MAX_BACKLOG), (9, MAX_BACKLOG_BYTES // 2, 2)],
    ids=["records", "bytes"],
)
async def test_the_poller_stops_at_so_much_that_is_not_dispatched(
    poller: Poller, answers: int, characters: int, polled: int
) -> None:
    script = [batch(raw("x" * characters, number), cursor=f"c{number}") for number in range(1, answers + 1)]
    bench = await ready(batch(image(0), cursor="c0"), *script)
    gate = asyncio.Event()
    bench.cdn.has("p0", gate, PNG)
    poller(bench, media_wait_s=1000, record_bytes=4 * MAX_BACKLOG_BYTES)
    await asyncio.sleep(200)
    stored = sum(1 for one in await bench.written() if one.record.messages)
    assert (stored in (polled, polled + 1), said(bench)) == (True, [])
    gate.set()
    await asyncio.sleep(30)
    assert len(bench.bus.inbound()) + len(bench.bus.found("DEAD")) == answers + 1  # half a MiB is not read


@pytest.mark.parametrize("now", [False, True], ids=["at a boundary", "at once"])
async def test_a_poller_that_waits_for_room_leaves_all_the_same(now: bool) -> None:
    """As where its bot was moved to a shard of another replica, where nothing of it can be told here any more."""
    bench = await ready(*[batch(raw("x", number), cursor=f"c{number}") for number in range(MAX_BACKLOG + 9)])
    bench.leases.owned.discard(shard_of("s2"))
    gate = asyncio.Event()
    hear = bench.conversations.on_inbound

    async def waits(*args: Any, **heard: Any) -> Any:
        await gate.wait()
        return await hear(*args, **heard)

    bench.conversations.on_inbound = waits  # type: ignore[method-assign]
    session, task = tended(bench)
    await asyncio.sleep(100)
    assert (len(bench.chat.asked), bench.chat.polling) == (MAX_BACKLOG, 0)
    await bench.bind("s2")
    gate.set()
    session.stop(immediately=now)
    await asyncio.sleep(5)
    assert task.done()
    assert (await bench.written())[-1].owner == ""


# read back -----------------------------------------------------------------------------------------------


Crash = Callable[[Bench], None]


def before_the_record(bench: Bench) -> None:
    async def dies(message: Message) -> None:
        if message.stream == "journal" and bench.chat.asked:
            await asyncio.Event().wait()

    bench.bus.on_publish = dies


def once_the_record_is_stored(bench: Bench) -> None:
    async def dies(*_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    bench.conversations.on_inbound = dies  # type: ignore[method-assign]


def with_a_download_under_way(bench: Bench) -> None:
    bench.cdn.has("p2", None)


def with_an_object_half_stored(bench: Bench) -> None:
    async def dies(_: str) -> None:
        await asyncio.Event().wait()

    bench.objects.on_put = dies


def before_anything_is_in_the_inbox(bench: Bench) -> None:
    async def dies(message: Message) -> None:
        if message.stream == "in":
            await asyncio.Event().wait()

    bench.bus.on_publish = dies


def with_a_part_in_the_inbox(bench: Bench) -> None:
    async def dies(message: Message) -> None:
        if message.stream == "in" and len(bench.bus.found("IN")) == 2:
            await asyncio.Event().wait()

    bench.bus.on_publish = dies


def with_all_in_the_inbox(bench: Bench) -> None:
    async def dies(_: str) -> None:
        await asyncio.Event().wait()

    bench.conversation_bucket.on_write = dies


def once_the_conversation_is_stored(bench: Bench) -> None:
    """And the journal does not say so."""


CRASHES: list[Crash] = [
    before_the_record,
    once_the_record_is_stored,
    with_a_download_under_way,
    with_an_object_half_stored,
    before_anything_is_in_the_inbox,
    with_a_part_in_the_inbox,
    with_all_in_the_inbox,
    once_the_conversation_is_stored,
]


async def crashed(crash: Crash, *script: Any) -> Bench:
    """The replica that takes over, long after the one before was killed."""
    bench = await ready(*script)
    bench.cdn.has("p2", PNG)
    crash(bench)
    replica = run(bench)
    await asyncio.sleep(5)
    await replica.die()
    await asyncio.sleep(600)
    bench.bus.on_publish = bench.objects.on_put = bench.conversation_bucket.on_write = None
    bench.cdn.has("p2", PNG)
    return heir_to(bench)


@pytest.mark.parametrize("again", ["never", "the same", "with other ids"])
@pytest.mark.parametrize("crash", CRASHES, ids=lambda crash: crash.__name__)
async def test_after_a_crash_each_message_is_told_once_and_in_order(crash: Crash, again: str) -> None:
    """A replay, and repeats at their worst: whether iLink gives it again to the next owner or not."""
    answer = batch(words(1), image(2), words(3), words(4, **NOTHING), words(4, **NOTHING))
    heir = await crashed(crash, answer)
    if again == "with other ids":
        changed = [{"message_id": 90 + number, "client_id": f"x{number}", "seq": 90 + number} for number in range(4)]
        news = [words(1, **changed[1]), image(2, **changed[2]), words(3, **changed[3])]
        heir.chat.polls.append(batch(*news, *answer.messages[3:]))
    elif again == "the same" or crash is before_the_record:
        heir.chat.polls.append(answer)
    heir.chat.polls.append(batch(words(5), cursor="c"))
    replica = run(heir)
    await asyncio.sleep(30)
    assert said(heir) == ["t1", "+", "t3", "t4", "t4", "t5"]
    assert heir.record().token == "token-5"
    await replica.leave()


@pytest.mark.parametrize("crash", CRASHES[1:], ids=lambda crash: crash.__name__)
async def test_what_a_second_owner_left_over_is_told_once_by_the_third(crash: Crash) -> None:
    """It is killed as it catches up, and iLink gives nothing again."""
    heir = await crashed(crash, batch(words(1), image(2), words(3)))
    crash(heir)
    replica = run(heir)
    await asyncio.sleep(5)
    await replica.die()
    heir.bus.on_publish = heir.objects.on_put = heir.conversation_bucket.on_write = None
    heir.cdn.has("p2", PNG)
    last = run(heir_to(heir, "last-1"))
    await asyncio.sleep(30)
    assert said(heir) == ["t1", "+", "t3"]
    await last.leave()


def slow_reads(bench: Bench) -> None:
    """A poll brings something before what is left over was read."""
    read = bench.bus.read

    async def slow(stream: str, subject: str, **where: Any) -> AsyncIterator[Stored]:
        await asyncio.sleep(1)
        async for stored in read(stream, subject, **where):
            yield stored

    bench.bus.read = slow  # type: ignore[method-assign]


async def test_what_is_left_over_is_told_before_what_comes_after_the_take_over() -> None:
    heir = await crashed(with_a_download_under_way, batch(image(2), words(3)))
    gate = asyncio.Event()
    heir.cdn.has("p2", gate, PNG)
    heir.chat.polls.append(batch(words(4), cursor="c"))
    slow_reads(heir)
    replica = run(heir)
    await asyncio.sleep(15)
    assert (said(heir), heir.chat.asked[-1]) == ([], "c")
    gate.set()
    await asyncio.sleep(5)
    assert said(heir) == ["+", "t3", "t4"]
    await replica.leave()


async def test_what_the_inbox_had_and_let_go_is_not_told_again() -> None:
    """However many records that are; the conversation knows that the inbox had them."""
    script = [batch(words(number), cursor=f"c{number}") for number in range(1, 9)]
    heir = await crashed(once_the_conversation_is_stored, *script)
    heir.bus.kept = [kept for kept in heir.bus.kept if not kept.stream.endswith("_IN")]
    heir.chat.polls.append(batch(words(9), cursor="d"))
    replica = run(heir)
    await asyncio.sleep(30)
    assert said(heir) == ["t9"]
    assert heir.record().dispatched_to == {BOT: (await heir.written())[-1].sequence}
    await replica.leave()


async def test_a_read_that_fails_while_a_new_owner_catches_up_is_made_again() -> None:
    heir = await crashed(once_the_record_is_stored, batch(raw("a" * 3000, 1), words(2)))
    read, failures = heir.bus.read, 3

    def fails(stream: str, subject: str, **where: Any) -> Any:
        async def found() -> Any:
            nonlocal failures
            async for stored in read(stream, subject, **where):
                yield stored
                if failures and "JOURNAL" in stream and not where.get("limit") and len(heir.chat.asked) > 1:
                    failures -= 1
                    raise Temporary("bus_down")

        return found()

    heir.bus.read = fails  # type: ignore[method-assign]
    replica = run(heir)
    await asyncio.sleep(30)
    assert (failures, said(heir)) == (0, ["a" * 3000, "t2"])
    await replica.leave()


async def test_the_journal_says_how_far_all_is_done_once_the_conversations_are_stored(poller: Poller) -> None:
    bench = await ready(batch(words(1), cursor="b"), None, batch(words(2), cursor="c"))
    hold = asyncio.Event()
    bench.conversation_bucket.on_write = lambda _: hold.wait()  # type: ignore[assignment,return-value]
    session = poller(bench)
    await asyncio.sleep(5)
    await asyncio.sleep(35)
    assert [one.record.done_to for one in await bench.written()] == [0, 0, 0]
    hold.set()
    await asyncio.sleep(5)
    session.stop(immediately=True)
    await asyncio.sleep(5)
    last = (await bench.written())[-1]
    assert (last.owner, last.record.done_to, last.record.last_heard) == ("", last.sequence - 1, last.sequence - 1)


# what was seen -------------------------------------------------------------------------------------------


MANY = 3 * SNAPSHOT_AFTER_NEW + 5


async def test_what_was_seen_is_written_once_for_many_messages_and_remembered_by_an_heir() -> None:
    """iLink says everything again to the next owner, with other ids; the server forgot the old ones."""
    script = [batch(words(number), cursor=f"c{number}") for number in range(MANY)]
    bench = await ready(*script)
    replica = run(bench)
    await asyncio.sleep(60)
    records = [one.record for one in await bench.written()]
    assert 2 <= sum(1 for record in records if record.seen is not None) <= 3
    await replica.die()
    heir = heir_to(bench)
    heir.bus.kept = [kept for kept in heir.bus.kept if not kept.stream.endswith("_IN")]
    heir.chat.polls.append(
        batch(*(words(number, message_id=number + 1, client_id=f"x{number}") for number in range(MANY)), words(MANY))
    )
    replica = run(heir)
    await asyncio.sleep(30)
    assert said(heir) == [f"t{MANY}"]
    await replica.leave()


async def test_what_was_seen_is_written_again_before_the_stream_lets_it_go() -> None:
    """An idle bot's cursors are records, too, and the bus may refuse to delete them."""
    bench = await ready(batch(words(1)), *(batch(cursor=f"c{number}") for number in range(600)))
    bench.bus.on_delete = Failing(1000, Temporary("bus_timeout"))
    replica = run(bench)
    await asyncio.sleep(600 * 35)
    written = await bench.written()
    seen = [number for number, one in enumerate(written) if one.record.seen is not None]
    assert len(written) > 2 * SNAPSHOT_AFTER_RECORDS
    assert len(written) - seen[-1] <= SNAPSHOT_AFTER_RECORDS
    await replica.leave()


async def test_what_waits_as_what_was_seen_is_written_does_not_count_as_seen() -> None:
    many = [words(number) for number in range(10, 10 + 2 * SNAPSHOT_AFTER_NEW)]
    failures = [Temporary("network")] * 2
    bench = await ready(batch(*many), batch(image(1), words(2), cursor="c"), *failures, batch(words(3), cursor="d"))
    bench.cdn.has("p1", None)
    replica = run(bench)
    await asyncio.sleep(10)
    assert len((await bench.last_record()).seen or ()) == len(many)
    await replica.die()
    bench.cdn.has("p1", PNG)
    heir = run(heir_to(bench))
    await asyncio.sleep(5)
    assert said(bench)[len(many) :] == ["+", "t2", "t3"]
    await heir.leave()


async def test_of_a_huge_record_that_is_not_dispatched_nothing_counts_as_told() -> None:
    """More than are remembered: those of the records before are forgotten, and none of its own is one of those."""
    many = [words(number, client_id=f"c{number}") for number in range(2, 1500)]
    bench = await ready(
        batch(*[words(n) for n in range(1600, 1650)], cursor="a"),
        batch(image(1), *many),
        batch(words(1501), cursor="c"),
    )
    bench.cdn.has("p1", None)
    replica = run(bench, record_bytes=10**7)
    await asyncio.sleep(10)
    await replica.die()
    bench.cdn.has("p1", PNG)
    heir = run(heir_to(bench))
    await asyncio.sleep(100)
    assert said(bench)[50:] == ["+", *(f"t{number}" for number in range(2, 1500)), "t1501"]
    await heir.leave()


# leaving -------------------------------------------------------------------------------------------------


async def test_leaving_tells_what_is_quick_and_leaves_the_rest_in_the_journal() -> None:
    bench = await ready(batch(image(1), words(2), image(3), words(4)))
    bench.cdn.has("p1", PNG)
    bench.cdn.has("p3", None)
    replica = run(bench)
    await asyncio.sleep(0.2)
    await replica.leave()
    assert (said(bench), bench.cdn.running) == (["+", "t2"], 0)
    bench.cdn.has("p3", PNG)
    heir = run(heir_to(bench))
    await asyncio.sleep(5)
    assert said(bench) == ["+", "t2", "+", "t4"]
    await heir.leave()


async def test_what_a_poll_brings_after_the_hand_over_is_the_next_owners_to_tell() -> None:
    bench = await ready(batch(words(1), cursor="b"))

    def handed_over() -> Polled:
        session.is_handed_over = session.draining_after_handover = True
        session.stop(immediately=False)
        return batch(words(2), cursor="c")

    bench.chat.polls.append(handed_over)
    session, task = tended(bench)
    await task
    assert (said(bench), (await bench.written())[-1].owner) == (["t1"], "")
    replica = run(heir_to(bench))
    await asyncio.sleep(5)
    assert said(bench) == ["t1", "t2"]
    await replica.leave()


async def test_a_stream_that_is_full_holds_the_inbox_up_and_no_poll(poller: Poller) -> None:
    bench = await ready(batch(words(1), cursor="b"), batch(words(2), cursor="c"))
    full = True
    bench.bus.refuse = lambda message: BusRefused(10077, "full") if full and message.stream == "in" else None
    with capture_logs() as logs:
        poller(bench)
        await asyncio.sleep(60)
    assert {line["bot"] for line in logs if line["event"] == "inbound.full"} == {"b1@im.bot"}
    assert (said(bench), bench.chat.asked) == ([], ["", "b", "c"])
    full = False
    await asyncio.sleep(20)
    assert said(bench) == ["t1", "t2"]


async def test_a_bug_ends_no_bots_messages(poller: Poller) -> None:
    bench = await ready(batch(image(1), words(2)))
    bench.cdn.has("p1", PNG)
    failures = iter([RuntimeError("a bug"), Temporary("bus_down"), LeaseLost("lease_lost")])

    async def fails(message: Message) -> None:
        if message.stream == "in" and (problem := next(failures, None)):
            raise problem

    bench.bus.on_publish = fails
    with capture_logs() as logs:
        poller(bench)
        await asyncio.sleep(10)
    assert said(bench) == ["+", "t2"]
    assert {"dispatch.crashed", "dispatch.retrying"} <= {line["event"] for line in logs}


async def test_a_silent_bot_leaves_nothing_to_replay_and_no_conversation_in_memory() -> None:
    bench = await ready(batch(words(1), cursor="c"), *[batch(cursor="c")] * 2000)
    replica = run(bench)
    await asyncio.sleep(300)
    last = (await bench.written())[-1].record
    assert (last.messages, last.done_to) == ([], last.last_heard)
    assert replica.session.dispatcher is not None
    assert tables(replica.session.dispatcher)["_unsaved"] == 0
    written = len(await bench.written())
    await asyncio.sleep(300)
    assert len(await bench.written()) == written
    await replica.die()
    replica = run(heir_to(bench))
    await asyncio.sleep(5)
    assert replica.session.dispatcher is None
    await replica.leave()
