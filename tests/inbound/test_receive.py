"""From an answer of iLink to the inbox and the person: each message once and in order, whoever dies or pauses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.bridge.entries import Entry, OpenedWindow, Secrets, encode_end, encode_entry, messages_of, read_entry
from adapter.contract import messages as contract
from adapter.contract.messages import ImageItem, Options, UnsupportedItem
from adapter.contract.names import H_BODY, H_EXPECTED, H_MSG_ID, H_POSITION, H_USER, person_token
from adapter.errors import BusRefused, Conflict, Refused, Temporary
from adapter.ilink.translate import read_message
from adapter.ports import BusMessage, InboundMessage, Polled, PubAck
from adapter.tools.timing import PerTickLimiter
from tests.fakes import EPOCH_MS, Bench, Failing, Rounds, batch, raw_message, ready
from tests.inbound.pollers import (
    BOT,
    NOTHING,
    USER,
    Poller,
    Replica,
    dead,
    opened,
    polls,
    raw,
    start_poller,
    successor_of,
    texts,
)

VIRTUAL_TIME = True

IMAGE = {
    "type": 2,
    "image_item": {"media": {"encrypt_query_param": "param-of-the-image", "aes_key": "MDAxMTIyMzM0NDU1NjY3Nw=="}},
}


SUBJECT = f"wechat.inbox.s1.{person_token('s1', USER)}"


def words(*numbers: int, cursor: str = "b") -> Polled:
    """An answer with the texts t1, t2 …"""
    return batch(*(raw(f"t{number}", number) for number in numbers), cursor=cursor)


# the message ---------------------------------------------------------------------------------------------


async def test_a_message_says_who_what_when_and_what_may_be_answered() -> None:
    bench = await ready(batch(raw("hello")))
    await polls(bench)
    (inbound,) = bench.bus.inbound()
    (stored,) = bench.bus.found("IN")
    assert stored.subject == SUBJECT
    assert inbound.id == f"in:{BOT}:m7497484083968569001"
    assert (inbound.sandbox, inbound.bot, inbound.user, inbound.text) == ("s1", BOT, USER, "hello")
    assert inbound.sent_at_ms == EPOCH_MS + 1
    assert inbound.window.remaining == 10
    assert inbound.window.closes_at_ms is not None
    person = await bench.person()
    assert inbound.window.closes_at_ms == person.state.window.opened_ms + 23 * 3_600_000


async def test_an_entry_says_what_another_owner_needs_and_seals_what_is_for_nobody_else() -> None:
    bench = await ready(batch(raw_message(1, IMAGE), cursor="b"))
    await polls(bench)
    (stored,), (inbound,) = bench.bus.found("IN"), bench.bus.inbound()
    assert (stored.headers[H_EXPECTED], H_MSG_ID in stored.headers) == ("0", False)
    read = read_message(raw_message(1, IMAGE))
    found = read_entry(stored, bench.sealer)
    assert found.secrets == Secrets("token-1", "b", (), ((0, tuple(read.fetches)),))
    assert (found.entry.user, found.entry.bot) == (USER, BOT)
    assert found.entry.seen == read.keys.fingerprint(inbound.received_at_ms)
    assert found.entry.window == OpenedWindow(inbound.id, inbound.sent_at_ms, inbound.received_at_ms)
    for secret in ("token-1", "param-of-the-image", "MDAxMTIyMzM0NDU1NjY3Nw=="):
        assert secret.encode() not in stored.data
    (item,) = inbound.items
    assert isinstance(item, ImageItem)
    assert item.media is not None


async def test_an_answer_is_one_entry_and_each_of_its_messages_is_rung_by_itself() -> None:
    bench = await ready(words(1, 2, 3))
    await polls(bench)
    (stored,) = bench.bus.found("IN")
    assert texts(bench) == ["t1", "t2", "t3"]
    rung = [(subject, payload, headers[H_POSITION]) for subject, payload, headers in bench.core.published]
    raws = [bytes(each) for each in messages_of(stored.data)]
    assert rung == [("wechat.in.s1", each, f"{stored.seq}.{number}") for number, each in enumerate(raws)]


async def test_a_long_answer_takes_several_entries_and_the_cursor_comes_with_the_last() -> None:
    """A part is asked for again as long as not all of it is stored."""
    bench = await ready(words(*range(250), cursor="b"))
    await polls(bench)
    entries = [read_entry(stored, bench.sealer) for stored in bench.bus.found("IN")]
    assert [len(each.entry.messages) for each in entries] == [100, 100, 50]
    assert [each.secrets and each.secrets.cursor for each in entries] == ["", "", "b"]
    assert texts(bench) == [f"t{number}" for number in range(250)]
    assert len(entries[-1].entry.seen) == 250 * 40, "parts of one answer are remembered whole"


async def test_the_order_in_an_answer_is_ilinks_whatever_seq_and_time_say() -> None:
    bench = await ready(words(3, 1, 2), words(0, cursor="c"))
    await polls(bench)
    assert texts(bench) == ["t3", "t1", "t2", "t0"]


async def test_a_huge_answer_is_translated_a_little_in_each_round_of_the_event_loop() -> None:
    """All at once would take longer than the lease."""
    rounds = Rounds()

    def read(message: bytes) -> InboundMessage:
        rounds.note("read")
        return read_message(message)

    bench = await ready(words(*range(1000)))
    await polls(bench, read_message=read, ticks=PerTickLimiter(1))
    assert rounds.seen["read"].total() == 1000
    assert max(rounds.seen["read"].values()) < 200


# sizes ---------------------------------------------------------------------------------------------------


async def test_a_message_larger_than_the_server_takes_leaves_a_stub_in_its_place() -> None:
    """What came before it and after it keeps its content."""
    large = raw("a" * 9000, 2)
    bench = await ready(batch(raw("a" * 5000, 1), large, raw("t3", 3)))
    bench.bus.refuse = lambda message: BusRefused(0, "max_payload") if len(message.payload) > 16_384 else None
    await polls(bench, max_payload=lambda: 16_384)  # a text is in a message twice
    assert texts(bench) == ["a" * 5000, "", "t3"]
    assert bench.bus.inbound()[1].items == [UnsupportedItem(type=0, reason="too_large")]
    assert (dead(bench), bench.chat.asked) == ([("too_large", large)], ["", "b"])


async def test_a_message_above_a_quarter_of_a_mebibyte_is_a_dead_letter() -> None:
    fits, large = raw("a" * (256 * 1024 - 500), 1), raw("b" * 256 * 1024, 2)
    bench = await ready(batch(fits, large, raw("t3", 3)))
    await polls(bench)
    assert [text[:1] for text in texts(bench)] == ["a", "t"]
    assert (dead(bench), bench.chat.asked) == ([("unreadable", large)], ["", "b"])


async def test_a_message_that_the_bus_refuses_all_the_same_leaves_a_stub_and_a_dead_letter() -> None:
    """As where an operator has bounded the stream. Each message then has an entry of its own."""
    large = raw("a" * 20_000, 2)
    bench = await ready(batch(raw("t1", 1), large, raw("t3", 3)))
    bench.bus.refuse = lambda message: (
        BusRefused(10054, "too large") if message.stream == "in" and len(message.payload) > 16_384 else None
    )
    await polls(bench)
    assert texts(bench) == ["t1", "", "t3"]
    assert (dead(bench), bench.chat.asked) == ([("too_large", large)], ["", "b"])
    assert bench.metrics.value("inbound_messages_total", kind="text", outcome="publish_failed") == 1


async def test_a_stub_that_the_bus_refuses_too_leaves_the_dead_letter_and_stops_nobody() -> None:
    bench = await ready(batch(raw("t1", 1), raw("bad", 2), raw("t3", 3)))

    def refuse(message: BusMessage) -> BusRefused | None:
        is_bad = message.stream == "in" and b"8569002" in message.payload
        return BusRefused(10054, "too large") if is_bad else None

    bench.bus.refuse = refuse
    await polls(bench)
    assert (texts(bench), dead(bench)) == (["t1", "t3"], [("too_large", raw("bad", 2))])


@pytest.mark.parametrize(("takes", "kept"), [(500_000, 400_003), (100_000, 64 * 1024)])
async def test_of_a_dead_letter_that_the_bus_refuses_the_beginning_is_kept(takes: int, kept: int) -> None:
    bench = await ready(batch(large := b"[" + b"1," * 200_000 + b"1]", raw("two", 2)))
    bench.bus.refuse = lambda message: (
        BusRefused(10054, "too large") if message.stream == "dead" and len(message.payload) > takes else None
    )
    await polls(bench)
    assert (dead(bench), texts(bench)) == ([("unreadable", large[:kept])], ["two"])
    (letter,) = bench.bus.found("DEAD")
    assert letter.headers[H_BODY] == ("sealed" if kept == len(large) else "sealed, cut")


async def test_a_dead_letter_is_sealed_for_its_bot() -> None:
    """iLink's message holds a token, and the keys of media."""
    secret = raw("private", 2, item_list="nothing", context_token="sesame")
    bench = await ready(batch(secret))
    await polls(bench)
    (letter,) = bench.bus.found("DEAD")
    assert b"sesame" not in letter.data
    assert not any(value in str(letter.headers) for value in ("private", "sesame"))
    moved = letter._replace(headers={H_MSG_ID: letter.headers[H_MSG_ID].replace(BOT, "b2@im.bot")})
    assert opened(bench, letter) == secret
    with pytest.raises(Refused, match="token_key"):
        opened(bench, moved)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (raw("x", item_list="nothing", from_user_id="stranger@im.wechat"), "stranger@im.wechat"),
        (raw("x", group_id="7@chatroom", from_user_id="member@im.wechat"), "member@im.wechat"),
        (b"[]", USER),
        (raw("x", item_list="nothing", from_user_id="u\r\nNats-Msg-Id: x"), None),
    ],
    ids=["author", "member of a group", "user of the bot", "no header can name it"],
)
async def test_a_dead_letter_names_its_person_for_an_erasure(message: bytes, named: str | None) -> None:
    bench = await ready(batch(message))
    await polls(bench)
    (letter,) = bench.bus.found("DEAD")
    assert letter.headers.get(H_USER) == named
    assert letter.headers[H_MSG_ID].startswith(f"dead:{BOT}:")


# repeats, echoes, strangers ------------------------------------------------------------------------------


REPEATS: dict[str, dict[str, Any]] = {
    "same ids": {},
    "empty message id": {"message_id": ""},
    "every id new": {"message_id": 99, "client_id": "wx-99", "seq": 99, "context_token": "other"},
}


@pytest.mark.parametrize("where", ["the same answer", "a long answer", "a later answer", "another owner"])
@pytest.mark.parametrize("fields", REPEATS.values(), ids=REPEATS)
async def test_a_repeat_is_known(fields: dict[str, Any], where: str) -> None:
    first, again, new = raw("ok"), raw("ok", **fields), raw("ok", 2)
    match where:
        case "the same answer":
            bench = await ready(batch(first, again, new))
        case "a long answer":  # which is stored in several parts
            others = [raw(f"other {number}", number) for number in range(100, 170)]
            bench = await ready(batch(first, *others, again, new))
        case "a later answer":
            bench = await ready(batch(first), batch(again, new, cursor="c"))
        case _:
            bench = await ready(batch(first))
            await polls(bench)
            bench = successor_of(bench)
            bench.chat.polls.append(batch(again, new, cursor="c"))
    bench.bus.forget_ids()
    await polls(bench)
    assert [one.sent_at_ms - EPOCH_MS for one in bench.bus.inbound() if one.text == "ok"] == [1, 2]
    assert bench.metrics.value("inbound_messages_total", kind="text", outcome="duplicate") == 1


async def test_the_same_words_without_ids_and_times_are_stored_as_often_as_sent() -> None:
    ok = raw("ok", **NOTHING)
    bench = await ready(batch(ok, ok), batch(ok, cursor="c"), batch(ok, cursor="c"))
    await polls(bench)
    assert texts(bench) == ["ok"] * 3, "the last answer is a repeat of the one before"
    assert len({inbound.id for inbound in bench.bus.inbound()}) == 3


async def test_a_message_that_was_under_way_shows_what_was_sent_since_it_was_written() -> None:
    """As the person's window has it, and as a reader of the inbox finds it."""
    bench = await ready(batch(raw("late", 4, create_time_ms=EPOCH_MS + 1000), cursor="b"))
    (binding,) = bench.bindings
    sent_at_ms = [EPOCH_MS + ms for ms in (500, 2000, 3000)]
    bench.hears(since=binding.since, opened_ms=EPOCH_MS, sends_used=3, sent_at_ms=sent_at_ms)
    await asyncio.sleep(5)
    await polls(bench)
    (inbound,) = bench.bus.inbound()
    assert (inbound.window.remaining, (await bench.person()).state.window.sends_used) == (8, 2)


async def test_a_repeat_renews_the_token_and_opens_no_new_window(poller: Poller) -> None:
    bench = await ready(batch(raw("ok")))
    session = poller(bench)
    await asyncio.sleep(600)
    person = await bench.person()
    opened = person.state.window
    partition = bench.partitions[bench.names.partition_of("s1")]
    for number in range(3):
        partition.on_delivery(bench.command(f"answer {number}", id=f"c{number}"))
    await asyncio.sleep(30)
    bench.chat.polls.append(batch(raw("ok", context_token="newer"), cursor="c"))
    session.cancel_poll()
    await asyncio.sleep(5)
    state = person.state
    assert (state.token, state.window.id, state.window.opened_ms) == ("newer", opened.id, opened.opened_ms)
    assert (state.window.sends_used, state.cursor) == (3, "c")
    (_, entry) = bench.bus.found("IN")
    assert messages_of(entry.data) == [], "a repeat with a new cursor is an entry without messages"


async def test_an_answer_of_nothing_but_repeats_without_a_new_cursor_is_no_entry_and_waits(poller: Poller) -> None:
    bench = await ready(words(1), *[words(1)] * 20)
    poller(bench)
    await asyncio.sleep(10)
    assert len(bench.bus.found("IN")) == 1
    assert len(bench.chat.asked) < 10


@pytest.mark.parametrize("message_type", [None, 2])
async def test_what_the_bot_itself_sent_is_an_echo_whatever_its_type(message_type: int | None) -> None:
    mine = raw("mine", from_user_id=BOT, message_type=message_type)
    bench = await ready(batch(mine, raw("its own", 2, message_type=2), raw("yours", 3)))
    await polls(bench)
    assert (texts(bench), dead(bench)) == (["yours"], [])
    assert bench.metrics.value("inbound_messages_total", kind="text", outcome="rejected") == 2


async def test_a_bots_user_is_learned_from_their_first_message_and_not_from_an_echo() -> None:
    bench = await ready(batch(raw("mine", from_user_id=BOT), raw("yours", 2)), user="")
    await polls(bench)
    assert texts(bench) == ["yours"]
    assert [binding.user for binding in bench.bindings] == [USER]


async def test_messages_of_anybody_but_the_bots_user_are_dead_letters_and_open_nothing() -> None:
    strange = [raw(f"t{number}", number, from_user_id=f"u{number}@im.wechat") for number in (2, 3)]
    bench = await ready(batch(raw("mine"), *strange, raw("mine too", 4)), user="")
    await polls(bench)
    assert texts(bench) == ["mine", "mine too"]
    assert dead(bench) == [("stranger", one) for one in strange]
    assert [letter.headers[H_USER] for letter in bench.bus.found("DEAD")] == ["u2@im.wechat", "u3@im.wechat"]
    assert [binding.user for binding in bench.bindings] == [USER]
    assert [one.user for one in bench.partitions[bench.names.partition_of("s1")]] == [USER]
    assert {stored.subject for stored in bench.bus.found("IN")} == {f"wechat.inbox.s1.{person_token('s1', BOT)}"}


async def test_whoever_answers_as_ilink_takes_no_bot_out_and_nobody_over() -> None:
    """It names the person of another bot of the sandbox, whose commands go on by that one: a bind has named them."""
    bench = await ready(batch(raw("one"), raw("two", 2)), user="")
    await bench.bind(bot="b0@im.bot")
    theirs = bench.bindings.get("b0@im.bot")
    await polls(bench)
    assert (texts(bench), dead(bench)) == (["one", "two"], [])
    assert bench.bindings.get("b0@im.bot") == theirs
    assert {stored.subject for stored in bench.bus.found("IN")} == {f"wechat.inbox.s1.{person_token('s1', BOT)}"}
    bench.hears(bot="b0@im.bot")
    bench.partitions[bench.names.partition_of("s1")].on_delivery(bench.command("answer", user=USER))
    await asyncio.sleep(5)
    assert [(sent.bot, sent.text) for sent in bench.chat.sent] == [("b0@im.bot", "answer")]


async def test_what_was_written_in_a_group_is_a_dead_letter_and_in_no_inbox() -> None:
    """An answer might be shown to the group, or to a stranger: who speaks there is not who scanned the code."""
    strange = raw("hello all", 1, group_id="7@chatroom", from_user_id="stranger@im.wechat")
    theirs = raw("to all", 2, group_id="7@chatroom")
    again = raw("to all", 2, group_id="7@chatroom", message_id=5)
    bench = await ready(batch(strange, theirs, raw("to you", 3)), batch(again, cursor="c"), user="")
    await polls(bench)
    assert texts(bench) == ["to you"]
    assert dead(bench) == [("group", strange), ("group", theirs), ("group", again)]
    assert [binding.user for binding in bench.bindings] == [USER]
    open_ones = list(bench.partitions[next(iter(bench.partitions))])
    assert [(one.user, one.state.token) for one in open_ones] == [(USER, "token-3")]
    assert bench.person_bucket.entries == {}


# what cannot be read -------------------------------------------------------------------------------------


async def test_a_broken_message_is_stored_as_unsupported_and_kept_whole() -> None:
    broken = raw("x", 2, item_list="nothing")
    bench = await ready(batch(raw("one", 1), broken, raw("three", 3)))
    await polls(bench)
    assert texts(bench) == ["one", "", "three"]
    assert bench.bus.inbound()[1].items == [UnsupportedItem(type=0, reason="malformed")]
    (letter,) = bench.bus.found("DEAD")
    assert (dead(bench), letter.subject) == ([("unreadable", broken)], "wechat.dead.WECHAT_IN")


async def test_a_dead_letter_that_cannot_be_kept_stops_nobody() -> None:
    bench = await ready(batch(b"[]", raw("two", 2)))
    bench.bus.refuse = lambda message: BusRefused(10047, "no space") if message.stream == "dead" else None
    with capture_logs() as logs:
        await polls(bench)
    assert texts(bench) == ["two"]
    assert "dead_letter.refused" in [line["event"] for line in logs]


# the person ----------------------------------------------------------------------------------------------


async def test_a_person_takes_the_last_message_once_all_are_stored() -> None:
    """With the newest token, which is not that of the last message where that has none."""
    bench = await ready(batch(raw(number=1), raw(number=2), raw(number=3, context_token=None)))
    known: list[str] = []

    async def look(message: BusMessage) -> None:
        if message.stream == "in":
            known.append((await bench.person()).state.token)

    bench.bus.on_publish = look
    await polls(bench)
    state = (await bench.person()).state
    assert known == [""], "a window must not open for a message that nobody has"
    assert (state.token, state.window.id) == ("token-2", f"in:{BOT}:m7497484083968569003")


async def test_a_person_whose_receipt_cannot_be_stored_delays_no_inbox(poller: Poller) -> None:
    bench = await ready()
    bench.hears()
    partition, gate = bench.partition(), asyncio.Event()

    async def away(message: BusMessage) -> None:
        if message.stream == "event":
            await gate.wait()

    bench.bus.on_publish = away
    partition.on_delivery(bench.command("one"))
    await asyncio.sleep(5)
    bench.chat.polls.extend([words(1), words(2, cursor="c")])
    poller(bench)
    await asyncio.sleep(3)
    assert texts(bench) == ["t1", "t2"]
    gate.set()
    await asyncio.sleep(2)
    assert (await bench.person()).state.token == "token-2"


@pytest.mark.parametrize("when_closed", ["refuse", "park"])
async def test_a_command_while_a_former_owner_polls_knows_what_that_one_brings(
    poller: Poller, when_closed: str
) -> None:
    """Its poll still waits, and brings the message after the partition was handed over."""
    bench = await ready()
    answer: asyncio.Future[Polled] = asyncio.get_running_loop().create_future()

    async def poll(account: Any, cursor: str, hold_ms: int) -> Polled:
        return await answer

    bench.chat.poll = poll  # type: ignore[method-assign]
    session = poller(bench)
    await asyncio.sleep(1)
    await bench.give(session)
    successor = Bench(bench, instance="next")
    successor.elsewhere.add(BOT)
    partition = successor.partition(left=[bench.presence.replica])
    waiting = asyncio.create_task(partition.handover.run())
    partition.on_delivery(successor.command("early", id="c1", when_closed="refuse"))
    await asyncio.sleep(5)
    answer.set_result(words(1))
    await asyncio.sleep(1)
    assert (texts(successor), successor.chat.sent, waiting.done()) == (["t1"], [], True)
    partition.on_delivery(successor.command("answer", id="c2", when_closed=when_closed))
    await asyncio.sleep(5)
    assert [(one.command, one.outcome) for one in successor.bus.receipts()] == [("c1", "refused"), ("c2", "accepted")]
    assert [sent.context_token for sent in successor.chat.sent] == ["token-1"]


async def test_a_command_is_decided_also_where_the_newest_entry_cannot_be_read_now() -> None:
    bench = await ready()
    bench.elsewhere.add(BOT)
    partition = bench.partition()
    partition.on_delivery(bench.command("one", id="c1", when_closed="refuse"))
    await asyncio.sleep(35)
    bench.bus.unreadable = 1
    partition.on_delivery(bench.command("two", id="c2", when_closed="refuse"))
    await asyncio.sleep(5)
    assert [(one.command, one.outcome) for one in bench.bus.receipts()] == [("c1", "refused"), ("c2", "refused")]
    assert bench.bus.unreadable == 0


# the binding ---------------------------------------------------------------------------------------------


async def test_a_message_for_a_bot_that_was_unbound_while_it_came_is_a_dead_letter() -> None:
    bench = await ready()

    def unbind_and_answer() -> Polled:
        bench.bindings_bucket.put(next(iter(bench.bindings_bucket.entries)), None)
        return batch(raw("too late"))

    bench.chat.polls.append(unbind_and_answer)
    _, task = start_poller(bench)
    await task
    assert texts(bench) == []
    (letter,) = bench.bus.found("DEAD")
    assert dead(bench) == [("not_bound", raw("too late"))]
    assert BOT in letter.headers["Wechat-Detail"], "nothing else names it"


async def test_a_message_for_a_bot_bound_again_is_stored_though_the_change_comes_late() -> None:
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
    session, task = start_poller(bench)
    await asyncio.sleep(5)
    assert (texts(bench), bench.bus.found("DEAD")) == (["in time"], [])
    session.stop(immediately=True)
    await task


# what the bus does not take ------------------------------------------------------------------------------


async def test_an_answer_in_hand_is_tried_again_until_it_is_stored(poller: Poller) -> None:
    bench = await ready(words(1, 2), words(3, cursor="c"))
    full = True
    bench.bus.refuse = lambda message: BusRefused(10077, "full") if full and message.stream == "in" else None
    with capture_logs() as logs:
        poller(bench)
        await asyncio.sleep(60)
    assert {line["bot"] for line in logs if line["event"] == "inbound.full"} == {BOT}
    assert (texts(bench), bench.chat.asked) == ([], [""])
    full = False
    await asyncio.sleep(20)
    assert texts(bench) == ["t1", "t2", "t3"]


async def test_a_dead_letter_is_tried_again_while_the_bus_is_away(poller: Poller) -> None:
    bench = await ready(batch(b"[]", raw("two", 2)))
    failing = Failing(20, Temporary("bus_down"))

    async def away(message: BusMessage) -> None:
        if message.stream == "dead":
            await failing()

    bench.bus.on_publish = away
    poller(bench)
    await asyncio.sleep(120)
    assert (failing.left, dead(bench), bench.chat.asked) == (0, [("unreadable", b"[]")], ["", "b"])


async def test_a_context_token_may_be_larger_than_the_headers_of_a_message(poller: Poller) -> None:
    bench = await ready(batch(raw(context_token="t" * 60_000)))
    poller(bench)
    await asyncio.sleep(5)
    assert (texts(bench), dead(bench)) == (["hello"], [])
    assert (await bench.person()).state.token == "t" * 60_000


# a refused write -----------------------------------------------------------------------------------------


def entry(bench: Bench, text: str, number: int, *, since: int = 0, bot: str = BOT, **fields: Any) -> bytes:
    """An entry as another owner stores it for a message that it got."""
    read = read_message(raw(text, number))
    ident, at = read.keys.id_for(bot), bench.clock.now_ms()
    inbound = contract.Inbound(
        id=ident, sandbox="s1", bot=bot, user=USER, sent_at_ms=at, received_at_ms=at, text=text, items=[]
    )
    made = Entry(
        since=since,
        nonce=f"n{number}",
        user=USER,
        bot=bot,
        seen=read.keys.fingerprint(at),
        window=OpenedWindow(ident, fields.get("written_ms", at), at),
        messages=[msgspec.Raw(msgspec.json.encode(inbound))],
    )
    secrets = Secrets(fields.get("token", "theirs"), fields.get("cursor", "theirs"))
    return encode_entry(made, secrets, SUBJECT, bench.sealer)


async def meanwhile(bench: Bench, poller: Poller, happens: Callable[[], object], *answers: Polled) -> None:
    """Something happens right before the first entry of the answers is stored, which the poller does not know."""

    async def first(message: BusMessage) -> None:
        if message.stream == "in":
            bench.bus.on_publish = None
            happens()

    bench.chat.polls.extend(answers)
    bench.bus.on_publish = first
    poller(bench)
    await asyncio.sleep(20)


async def test_an_entry_whose_ack_was_lost_is_not_stored_again(poller: Poller) -> None:
    bench = await ready()
    lost = True

    def refuse(message: BusMessage) -> BusRefused | None:
        """It is stored, and its repeat meets it."""
        nonlocal lost
        if message.stream != "in" or not lost:
            return None
        lost = False
        bench.bus.put(message.subject, message.payload, message.headers)
        return Conflict(10071, "wrong last sequence")

    bench.bus.refuse = refuse
    bench.chat.polls.extend([words(1, 2), words(3, cursor="c")])
    poller(bench)
    await asyncio.sleep(5)
    assert texts(bench) == ["t1", "t2", "t3"]
    assert len(bench.core.published) == 3


async def test_an_entry_that_the_person_has_read_since_is_not_stored_again(poller: Poller) -> None:
    """Its acknowledgement is lost, and before the repeat the sender looks at the newest entry."""
    bench = await ready(words(1, 2))
    store, lost = bench.bus.store, 1

    async def loses_the_ack(message: BusMessage) -> PubAck:
        nonlocal lost
        ack = await store(message)
        if message.stream == "in" and lost:
            lost -= 1
            await (await bench.person()).read_newest()
            raise Temporary("timeout")
        return ack

    bench.bus.store = loses_the_ack  # type: ignore[method-assign]
    poller(bench)
    await asyncio.sleep(5)
    assert (texts(bench), lost) == (["t1", "t2"], 0)
    assert len(bench.core.published) == 2
    assert (await bench.person()).state.token == "token-2"


async def test_what_a_former_bot_has_brought_leaves_the_new_bots_token_and_cursor(poller: Poller) -> None:
    """The login comes while the answer is being stored, or while the former bot's poll still waits."""
    bench = await ready(words(1, cursor="of the former bot"))
    store = bench.bus.store

    async def stores_and_logs_in(message: BusMessage) -> PubAck:
        ack = await store(message)
        if message.stream == "in":
            await bench.bind(bot="b2@im.bot")
        return ack

    bench.bus.store = stores_and_logs_in  # type: ignore[method-assign]
    poller(bench)
    await asyncio.sleep(2)
    person = await bench.person("b2@im.bot")
    person.on_cursor(BOT, "of the former bot, too")
    assert texts(bench) == ["t1"]
    assert (person.state.bot, person.state.token, person.state.cursor) == ("b2@im.bot", "", None)
    assert person.position == bench.bus.found("IN")[-1].seq


async def test_behind_another_owners_entry_its_repeats_are_dropped_and_its_cursor_stays(poller: Poller) -> None:
    bench = await ready()
    await meanwhile(
        bench, poller, lambda: bench.bus.put(SUBJECT, entry(bench, "t1", 1, written_ms=EPOCH_MS + 1), {}), words(1, 2)
    )
    assert texts(bench) == ["t1", "t2"]
    newest = read_entry(bench.bus.found("IN")[-1], bench.sealer)
    assert newest.secrets == Secrets("token-2", "theirs"), "the newer token, the other one's cursor"
    assert bench.chat.asked[-1] == "theirs"


async def test_a_late_answer_behind_a_newer_message_takes_neither_token_nor_window(poller: Poller) -> None:
    bench = await ready()
    newer = EPOCH_MS + 99_000_000
    put = lambda: bench.bus.put(SUBJECT, entry(bench, "newer", 9, written_ms=newer), {})  # noqa: E731
    await meanwhile(bench, poller, put, words(1))
    assert texts(bench) == ["newer", "t1"]
    newest = read_entry(bench.bus.found("IN")[-1], bench.sealer)
    assert (newest.secrets, newest.entry.window.id[-3:]) == (Secrets("theirs", "theirs"), "009")
    assert (await bench.person()).state.token == "theirs"


@pytest.mark.parametrize("since", [0, 7], ids=["own time", "another time"])
async def test_behind_the_end_of_a_persons_time_an_answer_is_dead_letters(since: int, poller: Poller) -> None:
    bench = await ready()
    await meanwhile(bench, poller, lambda: bench.bus.put(SUBJECT, encode_end(since), {}), words(1, 2))
    assert texts(bench) == []
    assert dead(bench) == [("not_bound", raw("t1", 1)), ("not_bound", raw("t2", 2))]
    if since == 0:
        assert bench.chat.polling == 0, "nobody polls until the unbind was applied"


async def test_behind_the_end_by_an_erasure_an_answer_is_dropped(poller: Poller) -> None:
    bench = await ready()
    with capture_logs() as logs:
        await meanwhile(bench, poller, lambda: bench.bus.put(SUBJECT, encode_end(0, erased=True), {}), words(1, 2))
    assert (texts(bench), dead(bench)) == ([], [])
    assert [line["messages"] for line in logs if line["event"] == "inbound.dropped"] == [2]


@pytest.mark.parametrize("left", [0, 1], ids=["all gone", "an older one is left"])
async def test_where_what_was_stored_is_gone_an_answer_is_stored_behind_what_is_there(
    left: int, poller: Poller
) -> None:
    """Aged, evicted, deleted by hand, or an old backup was restored."""
    bench = await ready(words(1), words(2, cursor="c"))
    session = poller(bench)
    await asyncio.sleep(5)

    def lose() -> None:
        bench.bus.kept = [kept for kept in bench.bus.kept if kept.stored.seq <= left or kept.stream != "WECHAT_IN"]

    lose()
    bench.chat.polls.append(words(3, cursor="d"))
    session.cancel_poll()
    await asyncio.sleep(60)
    assert texts(bench) == ["t1"] * left + ["t3"]
    assert bench.chat.asked[-1] == "d"


async def test_an_entry_that_cannot_be_read_counts_for_the_fence_alone(poller: Poller) -> None:
    bench = await ready()
    await meanwhile(bench, poller, lambda: bench.bus.put(SUBJECT, b"not of the adapter", {}), words(1))
    assert texts(bench) == ["t1"]


async def test_a_conflict_with_a_write_in_process_is_tried_again(poller: Poller) -> None:
    """10164: with several copies another write of the subject is not decided yet."""
    bench = await ready(words(1))
    refusals = [Conflict(10164, "in process")] * 3
    bench.bus.refuse = lambda message: refusals.pop() if refusals and message.stream == "in" else None
    poller(bench)
    await asyncio.sleep(5)
    assert (texts(bench), refusals) == (["t1"], [])


async def end(bench: Bench, *, erased: bool = False) -> None:
    """The end of the person's time is stored, as an unbind does it."""
    binding = bench.bindings.get(BOT)
    assert binding is not None
    await bench.persons.end(binding.key, lambda: None, erased=erased)


async def test_a_new_time_of_the_same_person_begins_behind_the_end(poller: Poller) -> None:
    bench = await ready(words(1))
    await polls(bench)
    await end(bench)
    assert texts(bench) == []
    await bench.bindings.remove(BOT)
    await bench.bind(since=7)
    bench.chat.polls.extend([words(1, cursor="z")])
    poller(bench)
    await asyncio.sleep(5)
    assert texts(bench) == ["t1"], "what was said in the former time is no repeat"
    ended, begun = bench.bus.found("IN")
    assert begun.headers[H_EXPECTED] == str(ended.seq)


# late answers --------------------------------------------------------------------------------------------


async def frozen_with(bench: Bench, *answers: Polled, meanwhile: Callable[[], Awaitable[None]]) -> None:
    """The replica is stopped with an answer in hand, loses its lease for good, and goes on long after `meanwhile`."""
    bench.chat.polls.extend(answers)
    session, task = start_poller(bench)
    frozen, thawed = asyncio.Event(), asyncio.Event()

    async def freeze(message: BusMessage) -> None:
        if message.stream == "in":
            bench.bus.on_publish, bench.leases.has_lease = None, False
            frozen.set()
            await thawed.wait()

    bench.bus.on_publish = freeze
    await frozen.wait()
    await asyncio.sleep(60)
    bench.chat.polls.clear()
    bench.bus.forget_ids()
    await meanwhile()
    bench.leases.owned.clear()
    for partition in bench.partitions.values():
        partition.stop()
    bench.leases.has_lease = True
    bench.leases.changed.notify_all()
    thawed.set()
    session.stop(immediately=True)
    await task
    await asyncio.sleep(1)  # the owner of now hears of it


@pytest.mark.parametrize("given", [(1, 2), (2,), ()], ids=["all again", "a part again", "nothing again"])
async def test_an_owner_frozen_with_an_answer_stores_what_the_new_owner_did_not_get(given: Sequence[int]) -> None:
    """The server's window against duplicates has passed by then."""
    bench = await ready()
    successor = successor_of(bench)
    heirs: list[Any] = []

    async def taken_over() -> None:
        successor.chat.polls.extend([words(*given) if given else batch(cursor="b"), None, None])
        heirs.extend(start_poller(successor))
        await asyncio.sleep(60)

    await frozen_with(bench, words(1, 2, cursor="zombie"), meanwhile=taken_over)
    assert sorted(texts(bench)) == ["t1", "t2"]
    assert texts(bench)[: len(given)] == [f"t{number}" for number in given]
    assert (await successor.person()).position == bench.bus.found("IN")[-1].seq, "it has read what came late"
    heirs[0].stop(immediately=True)
    await heirs[1]
    assert "zombie" not in bench.chat.asked if given else True


async def test_a_hundred_messages_of_two_owners_are_stored_once() -> None:
    """A former owner holds the answer while the next one gets it again."""
    bench = await ready()
    successor = successor_of(bench)
    heirs: list[Any] = []

    async def taken_over() -> None:
        successor.chat.polls.extend([words(*range(1, 101)), None, None])
        heirs.extend(start_poller(successor))
        await asyncio.sleep(60)

    await frozen_with(bench, words(*range(1, 101), cursor="zombie"), meanwhile=taken_over)
    assert texts(bench) == [f"t{number}" for number in range(1, 101)]
    assert len(bench.bus.found("IN")) == 1
    heirs[0].stop(immediately=True)
    await heirs[1]


async def test_the_present_owner_learns_of_a_late_message(poller: Poller) -> None:
    """The person gets the window, and iLink's repeats are known."""
    bench = await ready(None)
    successor = successor_of(bench)
    session = None

    async def taken_over() -> None:
        nonlocal session
        session = poller(successor)
        await asyncio.sleep(5)

    await frozen_with(bench, words(1, cursor="zombie"), meanwhile=taken_over)
    assert session is not None
    successor.bus.forget_ids()
    successor.chat.polls.append(batch(raw("t1", 1, message_id=99), raw("t2", 2), cursor="c"))
    session.cancel_poll()
    await asyncio.sleep(5)
    assert texts(successor) == ["t1", "t2"]
    assert (await successor.person()).state.window.id.endswith("002")


async def test_a_late_message_is_known_before_the_poll_that_waits_ends(poller: Poller) -> None:
    """A command that waits for it goes out at once."""
    bench = await ready(None)
    successor = successor_of(bench)
    asked = 0

    async def taken_over() -> None:
        nonlocal asked
        poller(successor)
        await asyncio.sleep(5)
        asked = len(successor.chat.asked)
        successor.partitions[bench.names.partition_of("s1")].on_delivery(successor.command("answer", id="c1"))
        await asyncio.sleep(5)
        assert [one.outcome for one in successor.bus.receipts()] == ["parked"]

    await frozen_with(bench, words(1, cursor="zombie"), meanwhile=taken_over)
    assert [one.outcome for one in successor.bus.receipts()] == ["parked", "accepted"]
    assert (len(successor.chat.asked), successor.chat.polling) == (asked, 1)


async def test_a_late_answer_for_an_erased_person_is_dropped() -> None:
    bench = await ready()

    async def erased() -> None:
        await end(bench, erased=True)

    with capture_logs() as logs:
        await frozen_with(bench, words(1, 2), meanwhile=erased)
    assert (texts(bench), bench.bus.found("DEAD")) == ([], [])
    assert [line["messages"] for line in logs if line["event"] == "inbound.dropped"] == [2]


@pytest.mark.parametrize("change", ["unbound", "another sandbox", "another person"])
async def test_a_late_answer_for_nobody_or_for_somebody_else_becomes_dead_letters(change: str) -> None:
    bench = await ready()

    async def changed() -> None:
        await end(bench)
        if change == "unbound":
            await bench.bindings.remove(BOT)
        elif change == "another sandbox":
            await bench.bind("s2")
        else:
            await bench.bind(user="u2@im.wechat", since=7)

    await frozen_with(bench, words(1, 2), meanwhile=changed)
    assert texts(bench) == []
    assert dead(bench) == [("not_bound", raw("t1", 1)), ("not_bound", raw("t2", 2))]


async def test_a_late_answer_looks_at_the_binding_at_the_leader() -> None:
    """The replica was cut off, and knows what was true before."""
    bench = await ready()
    bench.bindings_bucket.followers.clear()

    async def unbound() -> None:
        (key,) = bench.bindings_bucket.entries
        await end(bench)
        bench.bindings_bucket.put(key, None)
        assert bench.bindings.get(BOT) is not None

    await frozen_with(bench, words(1), meanwhile=unbound)
    assert (texts(bench), dead(bench)) == ([], [("not_bound", raw("t1", 1))])


# who ends ------------------------------------------------------------------------------------------------


async def test_an_answer_is_stored_before_the_poller_stops() -> None:
    """iLink may not say it again."""
    bench = await ready(words(1, 2))
    gate = asyncio.Event()

    async def slow(message: BusMessage) -> None:
        if message.stream == "in":
            await gate.wait()

    bench.bus.on_publish = slow
    session, task = start_poller(bench)
    await asyncio.sleep(1)
    session.stop(immediately=True)
    await asyncio.sleep(1)
    assert not task.done()
    gate.set()
    await task
    assert texts(bench) == ["t1", "t2"]


async def test_after_a_kill_a_window_is_open_and_typing_is_not_shown_again() -> None:
    bench = await ready(words(1), options=Options(auto_typing=True))
    replica = Replica(bench)
    await asyncio.sleep(0.3)
    assert (texts(bench), bench.person_bucket.entries) == (["t1"], {})
    opened_ms = bench.clock.now_ms()
    await replica.die()
    shown = len(bench.chat.typing)
    await asyncio.sleep(3600)
    successor = successor_of(bench)
    successor.partition().on_delivery(successor.command("answer", id="c1", when_closed="refuse"))
    await asyncio.sleep(5)
    assert [(one.outcome, one.reason) for one in successor.bus.receipts()] == [("accepted", "")]
    assert abs(successor.record().window.opened_ms - opened_ms) < 1000, "as iLink gave it, however late"
    replica = Replica(successor)
    await asyncio.sleep(5)
    assert len(successor.chat.typing) == shown
    await replica.leave()
