"""From iLink to the bus: token, then message, then cursor, then the next poll; nothing lost, nothing twice."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import uvloop
from msgspec.structs import replace
from structlog.testing import capture_logs

from adapter.batches import store
from adapter.contract import BindingEvent, BindingState, UnsupportedItem
from adapter.cursors import NEWEST, acquire, apart_key, give_back, put_back, write_cursor
from adapter.errors import AdapterError, BusRefused, LeaseLost, Refused, SessionExpired, Temporary
from adapter.ilink.translate import read_message
from adapter.inbound import AFTER_CUT_S, HOLD_MS, poll_forever, tend
from adapter.inbox import LARGE
from adapter.names import H_MSG_ID, H_SEEN, peer_key, token_of
from adapter.ports import Account, Entry, Message, Polled, Said
from adapter.records import Context, Cursor
from adapter.seal import Sealer, cursor_context
from adapter.sessions import HERE_S, Session
from adapter.stale_token import regain_login, tell_login
from adapter.timing import Pace, Turns
from tests.fakes import (
    EPOCH_MS,
    Bench,
    EndOfScript,
    Failing,
    FakeClock,
    FakeLeases,
    Rounds,
    batch,
    raw_message,
    ready,
    settle,
)

VIRTUAL_TIME = True

BOT, USER = "b1@im.bot", "u1@im.wechat"
KEY = token_of(BOT)
STALE = SessionExpired("needs_login", "iLink answered -14", errcode=-14, errmsg="session timeout")


def raw(text: str = "hello", number: int = 1, **fields: Any) -> bytes:
    """A message as iLink sends it."""
    return raw_message(number, {"type": 1, "text_item": {"text": text}}, **fields)


async def polls(bench: Bench, **changes: Any) -> Session:
    """Polls until the script ends."""
    bench.chat.script_ends = True
    session = Session(BOT)
    needs = bench.incoming(**changes)
    place = await acquire(session, needs)
    assert place is not None
    bench.bus.writes.clear()
    with pytest.raises(EndOfScript):
        await poll_forever(session, place, needs)
    return session


def tended(bench: Bench, **changes: Any) -> tuple[Session, asyncio.Task[None]]:
    """A poller as the supervisor runs it."""
    session = Session(BOT)
    return session, asyncio.get_running_loop().create_task(tend(session, bench.incoming(**changes)))


Poller = Callable[..., Session]


@pytest.fixture
async def poller() -> AsyncIterator[Poller]:
    """As `tended`, told to leave when the test is over."""
    begun: list[tuple[Session, asyncio.Task[None]]] = []

    def begin(bench: Bench, **changes: Any) -> Session:
        begun.append(tended(bench, **changes))
        return begun[-1][0]

    yield begin
    for session, task in begun:
        session.leave(now=True)
        await task


def texts(bench: Bench) -> list[str]:
    return [inbound.text for inbound in bench.bus.inbound()]


# the order of things -------------------------------------------------------------------------------------


async def test_a_batch_is_stored_in_order_before_the_next_poll() -> None:
    bench = await ready(batch(raw("one", 1), raw("two", 2), cursor="b"), batch(raw("three", 3), cursor="c"))
    await polls(bench)
    assert bench.bus.writes == ["token", "in", "in", "cursor", "token", "in", "cursor"]
    assert bench.chat.asked == ["", "b", "c"]
    assert texts(bench) == ["one", "two", "three"]


async def test_a_message_says_who_what_when_and_what_may_be_answered() -> None:
    bench = await ready(batch(raw("hello")))
    await polls(bench)
    (inbound,) = bench.bus.inbound()
    (stored,) = bench.bus.found("IN")
    assert stored.subject == "wechat.inbox.s1"
    assert inbound.id == stored.headers[H_MSG_ID] == f"in:{BOT}:m7497484083968569001"
    assert (inbound.sandbox, inbound.bot, inbound.user, inbound.text) == ("s1", BOT, USER, "hello")
    assert inbound.sent_at_ms == EPOCH_MS + 1
    assert inbound.window.remaining == 10
    assert inbound.window.closes_at_ms == bench.context().inbound_ms + 23 * 3_600_000


async def test_the_newest_token_is_there_before_the_sandbox_can_answer() -> None:
    bench = await ready(batch(raw(number=1), raw(number=2), raw(number=3, context_token=None)))

    async def look(message: Message) -> None:
        assert bench.context().token == "token-2"

    bench.bus.on_publish = look
    await polls(bench)
    assert len(bench.bus.inbound()) == 3


async def test_who_watches_the_windows_is_asked_to_look_once_the_window_is_stored() -> None:
    bench = await ready(batch(raw(), raw("more", 2)))
    seen: list[str] = []
    bench.look = lambda peer: seen.append(f"{peer.user} {bench.context().inbound_id == peer.context.inbound_id}")
    await polls(bench)
    assert seen == [f"{USER} True"]


async def test_a_bot_that_is_polled_from_now_on_is_announced(poller: Poller) -> None:
    bench = await ready()
    poller(bench)
    await asyncio.sleep(1)
    assert bench.adopted == [BOT]


async def test_the_lanes_are_told_after_the_cursor() -> None:
    bench = await ready(batch(raw()))
    heard: list[str] = []
    await polls(bench, heard=lambda *who: heard.append(bench.cursor().cursor))
    assert heard == ["b"]


async def test_an_empty_answer_with_a_new_cursor_moves_it() -> None:
    bench = await ready(batch(cursor="b"), batch(cursor="b"))
    await polls(bench)
    assert bench.chat.asked == ["", "b", "b"]
    assert bench.bus.writes == ["cursor"]


async def test_an_empty_cursor_keeps_the_old_one() -> None:
    """F19."""
    bench = await ready(batch(raw(number=1), cursor="b"), batch(raw(number=2), cursor=None), batch(cursor=None))
    await polls(bench)
    assert bench.chat.asked == ["", "b", "b", "b"]
    assert len(texts(bench)) == 2


async def test_the_order_in_a_batch_is_ilinks_whatever_seq_and_time_say() -> None:
    """F20."""
    bench = await ready(batch(raw("one", 3), raw("two", 1), raw("three", 2)))
    await polls(bench)
    assert texts(bench) == ["one", "two", "three"]


async def test_the_next_hold_is_the_one_that_ilink_named() -> None:
    bench = await ready(batch(hold_ms=20_000), batch(hold_ms=35_000))
    await polls(bench)
    assert bench.chat.holds == [35_000, 20_000, 35_000]


async def test_the_hold_that_ilink_named_is_also_that_of_a_dead_tokens_tries() -> None:
    """Shorter ones would end before iLink answers, and as long as nobody writes the token would stay dead."""
    bench = await ready(batch(hold_ms=60_000), STALE, batch(hold_ms=60_000))
    await polls(bench)
    assert bench.chat.holds == [35_000, 60_000, 60_000, 60_000]


async def test_the_time_to_the_stream_is_counted_for_each_message() -> None:
    """The objective is about messages; a batch of three is three."""
    bench = await ready(batch(raw("one"), raw("two", 2), raw("three", 3)))
    await polls(bench)
    assert bench.metrics.value("inbound_publish_duration_seconds_count") == 3


async def test_a_huge_batch_is_stored_whole() -> None:
    """F28."""
    bench = await ready(batch(*(raw(f"t{number}", number) for number in range(1000))))
    await polls(bench)
    assert texts(bench) == [f"t{number}" for number in range(1000)]


# trouble with iLink --------------------------------------------------------------------------------------


async def test_a_failed_poll_is_repeated_from_the_same_cursor() -> None:
    bench = await ready(batch(raw(), cursor="b"), Temporary("http_5xx"), Temporary("unreadable"), batch(cursor="c"))
    await polls(bench)
    assert bench.chat.asked == ["", "b", "b", "b", "c"]


async def test_ilinks_own_delay_wins_over_our_backoff() -> None:
    bench = await ready(Temporary("http_4xx", retry_after_s=90))
    await polls(bench)
    first, again = bench.chat.polled_at
    assert again - first >= 90


async def test_a_server_that_fails_is_not_hammered(poller: Poller) -> None:
    bench = await ready(*[Temporary("http_5xx")] * 100)
    session = poller(bench)
    await asyncio.sleep(600)
    assert len(bench.chat.asked) < 60
    assert session.state == "error"


MOVES = itertools.count()


@pytest.mark.parametrize(
    "answer",
    [
        lambda: Polled([], None, 35_000),
        lambda: Polled([], f"c{next(MOVES)}", 35_000),
        lambda: Polled([raw()], None, 35_000),
    ],
    ids=["empty", "moving", "repeated"],
)
async def test_a_server_that_does_not_hold_is_not_hammered(poller: Poller, answer: Callable[[], Polled]) -> None:
    """At once, for ever: an error code 0, a cursor that moves for nothing, or the same batch."""
    poller(bench := await ready(*[answer] * 1000))
    await asyncio.sleep(60)
    assert len(bench.chat.asked) <= 60 / 0.25


async def test_polls_without_an_answer_recycle_the_connection() -> None:
    """F5, a dead path: not at the first, which is only a lost race with the hold."""
    bench = await ready(None, None, None, None)
    await polls(bench)
    assert bench.chat.recycled == 2
    assert bench.chat.asked == [""] * 5


async def test_a_bot_on_a_dead_path_does_not_count_as_polled_until_ilink_answers(poller: Poller) -> None:
    """Only an answer proves that a poll lives: one that nobody ever answered looked healthy for ever."""
    bench = await ready(None, None, None, None, batch(cursor="b"))
    session = poller(bench)
    await asyncio.sleep(2.5 * HOLD_MS / 1000)
    assert (len(bench.chat.asked), session.state) == (3, "polling")
    await asyncio.sleep(HOLD_MS / 1000)
    assert (len(bench.chat.asked), session.state) == (4, "error")
    await asyncio.sleep(HOLD_MS / 1000)
    assert (len(bench.chat.asked), session.state) == (6, "polling")


async def test_an_answer_ends_the_count_of_polls_without_one() -> None:
    bench = await ready(None, None, batch(cursor="b"), None, None)
    await polls(bench)
    assert bench.chat.recycled == 0


# repeats -------------------------------------------------------------------------------------------------


REPEATS: list[tuple[str, dict[str, Any]]] = [
    ("same-ids", {}),
    ("new-message-id", {"message_id": 99}),
    ("empty-message-id", {"message_id": ""}),
    ("new-token", {"context_token": "other"}),
    ("every-id-new", {"message_id": 99, "client_id": "wx-99", "seq": 99, "context_token": "other"}),
]


@pytest.mark.parametrize("fields", [row[1] for row in REPEATS], ids=[row[0] for row in REPEATS])
async def test_a_repeat_is_told_once(fields: dict[str, Any]) -> None:
    """F16."""
    bench = await ready(batch(raw("ok"), cursor="b"), batch(raw("ok", **fields), cursor="c"))
    await polls(bench)
    assert texts(bench) == ["ok"]
    assert bench.chat.asked == ["", "b", "c"]


@pytest.mark.parametrize("fields", [row[1] for row in REPEATS], ids=[row[0] for row in REPEATS])
async def test_a_repeat_in_the_same_batch_is_told_once(fields: dict[str, Any]) -> None:
    bench = await ready(batch(raw("ok"), raw("ok", **fields)))
    await polls(bench)
    assert texts(bench) == ["ok"]


async def test_a_repeat_far_down_a_huge_batch_is_told_once() -> None:
    many = [raw(f"t{number}", number) for number in range(300)]
    bench = await ready(batch(*many, raw("t0", 0, message_id=99, client_id="wx-x", seq=999)))
    await polls(bench)
    assert len(texts(bench)) == 300


async def test_a_person_who_says_it_twice_is_heard_twice() -> None:
    """F17."""
    bench = await ready(batch(raw("ok", 1)), batch(raw("ok", 2), cursor="c"))
    await polls(bench)
    assert texts(bench) == ["ok", "ok"]


async def test_a_repeat_opens_no_new_window(poller: Poller) -> None:
    bench = await ready(batch(raw("ok")), batch(raw("ok", message_id=99), cursor="c"))
    poller(bench)
    await settle()
    await asyncio.sleep(0.01)
    peer = await bench.contexts.peer(BOT, USER)
    await asyncio.sleep(5)
    assert peer.context.inbound_id == f"in:{BOT}:m7497484083968569001"


async def test_the_bots_own_words_are_dropped() -> None:
    bench = await ready(batch(raw("mine", message_type=2), raw("yours", 2)))
    await polls(bench)
    assert texts(bench) == ["yours"]


@pytest.mark.parametrize("message_type", [None, 0, 1])
async def test_what_the_bot_itself_sent_is_dropped_also_where_its_type_does_not_say_so(
    message_type: int | None,
) -> None:
    mine = raw("mine", from_user_id=BOT, message_type=message_type)
    bench = await ready(batch(mine, raw("yours", 2)), user="")
    await polls(bench)
    assert texts(bench) == ["yours"]
    binding = bench.bindings.get(BOT)
    assert binding is not None
    assert binding.user == USER


# broken messages -----------------------------------------------------------------------------------------


async def test_a_broken_message_is_told_as_unsupported_and_kept_whole() -> None:
    broken = raw("x", 2, create_time_ms="yesterday")
    bench = await ready(batch(raw("one", 1), broken, raw("three", 3)))
    await polls(bench)
    assert texts(bench) == ["one", "", "three"]
    assert bench.bus.inbound()[1].items == [UnsupportedItem(type=0, reason="malformed")]
    (dead,) = bench.bus.found("DEAD")
    assert dead.data == broken
    assert (dead.subject, dead.headers["Wechat-Reason"]) == ("wechat.dead.WECHAT_IN", "unreadable")


async def test_what_was_written_in_a_group_is_kept_and_told_to_nobody() -> None:
    """An answer might be shown to the group, or to a stranger: who speaks there is not who scanned the code."""
    strange = raw("hello all", 1, group_id="7@chatroom", from_user_id="stranger@im.wechat")
    theirs = raw("to all", 2, group_id="7@chatroom")
    again = raw("to all", 2, group_id="7@chatroom", message_id=5)
    bench = await ready(batch(strange, theirs, raw("to you", 3)), batch(again, cursor="c"), user="")
    await polls(bench)
    assert texts(bench) == ["to you"]
    assert [dead.data for dead in bench.bus.found("DEAD")] == [strange, theirs]
    assert {dead.headers["Wechat-Reason"] for dead in bench.bus.found("DEAD")} == {"group"}
    assert [binding.user for binding in bench.bindings] == [USER]
    assert (bench.context().token, list(bench.contexts_bucket.entries)) == ("token-3", [peer_key(BOT, USER)])


async def test_what_was_written_in_a_group_is_told_where_a_setting_says_so() -> None:
    bench = await ready(batch(raw("to all", group_id="7@chatroom")))
    await polls(bench, groups_as_direct=True)
    assert texts(bench) == ["to all"]
    assert bench.bus.found("DEAD") == []


async def test_a_message_of_nobody_is_kept_and_the_others_go_on() -> None:
    bench = await ready(batch(raw("one", 1), b'{"message_id":5}', b"[]", raw("two", 2)))
    await polls(bench)
    assert texts(bench) == ["one", "two"]
    assert [dead.data for dead in bench.bus.found("DEAD")] == [b'{"message_id":5}', b"[]"]
    assert bench.chat.asked == ["", "b"]


async def test_a_dead_letter_that_cannot_be_kept_stops_nobody() -> None:
    bench = await ready(batch(b"[]", raw("two", 2)))
    bench.bus.refuse = lambda message: BusRefused(10047, "no space") if message.stream == "dead" else None
    with capture_logs() as logs:
        await polls(bench)
    assert texts(bench) == ["two"]
    assert "dead_letter.refused" in [line["event"] for line in logs]


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
    assert len(bench.bus.found("DEAD")) == 1
    assert bench.chat.asked == ["", "b"]


# the user ------------------------------------------------------------------------------------------------


async def test_a_bots_user_is_learned_from_their_first_message() -> None:
    bench = await ready(batch(raw()), user="")
    await polls(bench)
    binding = bench.bindings.get(BOT)
    assert binding is not None
    assert binding.user == USER
    assert bench.heard == [("s1", BOT, USER)]


async def test_two_users_of_a_bot_have_windows_of_their_own() -> None:
    bench = await ready(batch(raw(), raw("hi", 2, from_user_id="u2@im.wechat", context_token="theirs")))
    await polls(bench)
    assert (bench.context().token, bench.context(user="u2@im.wechat").token) == ("token-1", "theirs")
    assert bench.heard == [("s1", BOT, USER), ("s1", BOT, "u2@im.wechat")]


# crashes and other owners --------------------------------------------------------------------------------


async def test_a_replay_after_a_crash_before_the_cursor_is_told_once() -> None:
    """F18, and F16 at its worst: stored, not remembered, and repeated with other ids to the next owner."""
    bench = await ready(batch(raw("ok")))

    async def dies(key: str) -> None:
        if bench.bus.found("IN"):
            raise EndOfScript

    session = Session(BOT)
    needs = bench.incoming()
    place = await acquire(session, needs)
    assert place is not None
    bench.cursors.on_write = dies
    with pytest.raises(EndOfScript):
        await poll_forever(session, place, needs)
    assert bench.cursor().cursor == ""
    bench.cursors.on_write = None

    heir = Bench(bench, incarnation="heir-1")
    heir.leases.proven_dead.add("me-1")
    bench.chat.polls.append(batch(raw("ok", message_id=99, client_id="wx-99", seq=99)))
    await polls(heir)
    assert texts(bench) == ["ok"]
    assert bench.cursor().owner == "heir-1"


async def test_a_replay_after_a_crash_gives_no_sends_back() -> None:
    bench = await ready(batch(raw("ok")))
    await polls(bench)
    used = replace(bench.context(), used=7)
    bench.contexts_bucket.put(peer_key(BOT, USER), msgspec.json.encode(used))
    bench.cursors.put(KEY, msgspec.json.encode(Cursor()))

    heir = Bench(bench, incarnation="heir-1")
    bench.chat.polls.append(batch(raw("ok")))
    await polls(heir)
    assert heir.context().used == 7


async def test_a_new_owner_waits_until_the_old_one_has_stopped(poller: Poller) -> None:
    bench = await ready()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))
    session = poller(bench)
    await asyncio.sleep(30)
    assert bench.chat.asked == []
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="c")))
    session.freed.set()
    await asyncio.sleep(1)
    assert bench.chat.asked == ["c"]


async def test_a_new_owner_that_is_not_told_finds_out(poller: Poller) -> None:
    bench = await ready()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))
    poller(bench)
    await asyncio.sleep(30)
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="c")))
    await asyncio.sleep(7)
    assert bench.chat.asked == ["c"]


async def test_who_wrote_to_the_owner_before_may_be_answered_by_the_new_one(poller: Poller) -> None:
    """The lanes here looked at the user's window before the other replica stored the last words it waited for."""
    bench = await ready()
    peer = await bench.contexts.peer(BOT, USER)
    bench.contexts_bucket.put(
        peer_key(BOT, USER), msgspec.json.encode(Context(token="t", inbound_ms=5, inbound_id="in:1"))
    )
    poller(bench)
    await asyncio.sleep(1)
    assert bench.heard == [("s1", BOT, USER)]
    assert peer.context.token == "t"


async def test_a_new_owner_takes_over_from_one_that_is_proven_dead(poller: Poller) -> None:
    bench = await ready()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))
    session = poller(bench)
    await asyncio.sleep(5)
    bench.leases.proven_dead.add("other-1")
    session.freed.set()
    await asyncio.sleep(1)
    assert bench.chat.asked == ["b"]
    assert bench.cursor().owner == "me-1"


async def test_a_bot_that_is_bound_anew_while_another_has_it_is_not_asked_for_without_a_pause(poller: Poller) -> None:
    bench = await ready()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))
    session = poller(bench)
    await asyncio.sleep(5)
    asked = bench.leases.asked_dead
    session.cut_off()
    await asyncio.sleep(60)
    assert 5 < bench.leases.asked_dead - asked < 60


async def test_a_new_owner_takes_a_bot_whose_record_names_one_that_has_no_poller_of_it(poller: Poller) -> None:
    """As after a bucket was restored: it lives, and would never give back what it does not have."""
    bench = await ready()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))
    poller(bench)
    await asyncio.sleep(60)
    assert bench.chat.asked == []
    bench.idle.add(("other-1", BOT))
    await asyncio.sleep(60)
    assert bench.chat.asked == ["b"]
    assert bench.cursor().owner == "me-1"


async def test_an_owner_that_begins_to_poll_as_it_is_asked_keeps_its_bot(poller: Poller) -> None:
    bench = await ready()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))

    async def is_idle(owner: str, bot: str) -> bool:
        bench.cursors.put(token_of(bot), msgspec.json.encode(Cursor(cursor="b", owner=owner)))
        return True

    poller(bench, is_idle=is_idle)
    await asyncio.sleep(120)
    assert bench.chat.asked == []
    assert bench.cursor().owner == "other-1"


async def test_a_record_that_was_set_back_names_its_owner_again_with_the_next_poll() -> None:
    """Else whom the shard is handed to takes the bot from one that is dead, while this one's last poll waits."""
    bench = await ready(None)
    _, task = tended(bench)
    await asyncio.sleep(1)
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="old", owner="dead-1")))
    bench.leases.proven_dead.add("dead-1")
    bench.purges += 1
    await task  # the supervisor begins another one, as long as the shard is its own
    session, task = tended(bench)
    await asyncio.sleep(1)
    assert (bench.cursor().owner, bench.chat.asked) == ("me-1", ["", "old"])
    session.leave(now=True)
    await task


async def test_who_waits_for_an_owner_holds_up_no_other_bot() -> None:
    """Starts are bounded; one that waits for a replica elsewhere must not use up the bound."""
    bench = await ready()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(owner="other-1")))
    await bench.bind(sandbox="s2", bot="b2@im.bot", user="u2@im.wechat")
    needs = bench.incoming(starting=asyncio.Semaphore(1))
    sessions = [Session(BOT), Session("b2@im.bot")]
    tasks = [asyncio.get_running_loop().create_task(tend(session, needs)) for session in sessions]
    await asyncio.sleep(5)
    assert len(bench.chat.asked) == 1
    for session in sessions:
        session.leave(now=True)
    await asyncio.gather(*tasks)


async def test_a_poller_that_waits_for_the_lease_hardly_looks_at_it_and_leaves_at_once() -> None:
    """Thousands that look each second take an eighth of a core, where there may be no more than that."""
    bench, looks = await ready(), 0

    class Counted(FakeLeases):
        @property
        def valid(self) -> bool:
            nonlocal looks
            looks += 1
            return self.is_valid

    bench.leases = Counted()
    session = Session(BOT)
    task = asyncio.create_task(tend(session, bench.incoming()))
    await asyncio.sleep(1)
    bench.leases.is_valid = False
    session.cut_off()
    await asyncio.sleep(1)
    assert session.state == "paused"
    looks = 0
    await asyncio.sleep(60)
    assert looks < 15
    session.leave(now=False)
    before = bench.clock.monotonic()
    await asyncio.wait([task])
    assert bench.clock.monotonic() - before < 0.1


@pytest.mark.parametrize("pause_s", [5.0, HERE_S / 2], ids=["a pause", "over before the polls have ended"])
async def test_answers_that_come_at_once_are_stored_a_few_in_each_round_of_the_event_loop(pause_s: float) -> None:
    """Thousands in one would take longer than the lease, which is lost then. So would as many polls after a pause."""
    bench, bots = await ready(), [f"b{number}@im.bot" for number in range(20)]
    rounds, came = Rounds(), asyncio.Event()

    async def poll(account: Account, cursor: str, hold_ms: int) -> Polled | None:
        if cursor:
            await asyncio.sleep(hold_ms / 1000)
            return Polled([], cursor, hold_ms)
        rounds.note("polls")
        await came.wait()
        return batch(raw(from_user_id=account.bot.replace("bot", "wechat")))

    def read(message: bytes) -> Said:
        rounds.note("stored")
        return read_message(message)

    bench.chat.poll = poll  # type: ignore[method-assign]
    for number, bot in enumerate(bots):
        await bench.bind(f"s{number}", bot, bot.replace("bot", "wechat"))
    needs = bench.incoming(turns=Turns(3), read_message=read)
    sessions = [Session(bot) for bot in bots]
    tasks = [asyncio.create_task(tend(session, needs)) for session in sessions]
    await asyncio.sleep(5)
    bench.leases.is_valid = False
    for session in sessions:
        session.cut_off()
    rounds.seen["polls"].clear()
    await asyncio.sleep(pause_s)
    bench.leases.is_valid = True
    bench.leases.changed.notify()
    await asyncio.sleep(5)
    came.set()
    await asyncio.sleep(5)
    assert len(bench.bus.inbound()) == len(bots)
    for what in ("polls", "stored"):
        assert rounds.seen[what].total() == len(bots)
        assert max(rounds.seen[what].values()) <= 6  # two of those rounds may fall into one of these
    for session in sessions:
        session.leave(now=True)
    await asyncio.wait(tasks)


async def test_polls_that_fail_at_once_fail_and_begin_again_a_few_in_each_round_of_the_event_loop() -> None:
    """As where iLink closes all connections: thousands in one round cost the lease."""
    bench, bots = await ready(), [f"b{number}@im.bot" for number in range(20)]
    rounds, gone, polled = Rounds(), asyncio.Event(), Counter[str]()

    async def poll(account: Account, cursor: str, hold_ms: int) -> Polled | None:
        polled[account.bot] += 1
        if polled[account.bot] == 1:
            await gone.wait()
            raise Temporary("network", "closed")
        rounds.note("again")
        await asyncio.sleep(hold_ms / 1000)
        return Polled([], cursor, hold_ms)

    def jitter(_: float) -> float:
        """Drawn for each failure."""
        rounds.note("failed")
        return 0.0

    bench.chat.poll = poll  # type: ignore[method-assign]
    for number, bot in enumerate(bots):
        await bench.bind(f"s{number}", bot, bot.replace("bot", "wechat"))
    needs = bench.incoming(turns=Turns(3))
    sessions = [Session(bot) for bot in bots]
    tasks = [asyncio.create_task(tend(session, needs)) for session in sessions]
    await asyncio.sleep(5)
    bench.clock.jitter = jitter  # type: ignore[assignment, method-assign]
    gone.set()
    await asyncio.sleep(5)
    for what in ("failed", "again"):
        assert rounds.seen[what].total() == len(bots)
        assert max(rounds.seen[what].values()) <= 6  # two of those rounds may fall into one of these
    for session in sessions:
        session.leave(now=True)
    await asyncio.wait(tasks)


async def test_a_cursor_that_another_replica_took_ends_the_poller() -> None:
    """A zombie's batch may be on the bus (the stream drops repeats), but never its cursor."""
    bench = await ready(batch(raw(), cursor="zombie"))
    session = Session(BOT)
    needs = bench.incoming()
    place = await acquire(session, needs)
    assert place is not None
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))
    with pytest.raises(LeaseLost):
        await poll_forever(session, place, needs)
    assert bench.cursor() == Cursor(cursor="b", owner="other-1")


async def test_bots_for_which_nothing_came_poll_again_together() -> None:
    """Each alone wakes the process for itself."""
    bench = await ready()
    await bench.bind("s2", "b2@im.bot", "u2@im.wechat")
    needs = bench.incoming()
    asked: list[float] = []
    answers = {BOT: 30.0, "b2@im.bot": 30.04}

    async def poll(account: Account, cursor: str, hold_ms: int) -> Polled | None:
        asked.append(bench.clock.monotonic())
        await asyncio.sleep(answers[account.bot])
        return Polled([], cursor, hold_ms)

    bench.chat.poll = poll  # type: ignore[method-assign]
    sessions = [Session(BOT), Session("b2@im.bot")]
    tasks = [asyncio.create_task(tend(session, needs)) for session in sessions]
    await asyncio.sleep(45)
    assert len(asked) == 4
    assert asked[2] == asked[3]
    for session in sessions:
        session.leave(now=True)
    await asyncio.wait(tasks)


async def test_bots_that_start_together_are_polled_one_after_the_other_and_leave_at_once() -> None:
    bench = await ready()
    sessions = [Session(BOT)]
    for number in range(2, 6):
        await bench.bind(f"s{number}", f"b{number}@im.bot", f"u{number}@im.wechat")
        sessions.append(Session(f"b{number}@im.bot"))
    needs = bench.incoming(starts=Pace(0.1))
    asked: list[str] = []

    async def poll(account: Account, cursor: str, hold_ms: int) -> Polled | None:
        asked.append(account.bot)
        await asyncio.Event().wait()
        return None

    bench.chat.poll = poll  # type: ignore[method-assign]
    tasks = [asyncio.create_task(tend(session, needs)) for session in sessions]
    started = []
    for _ in range(3):
        await asyncio.sleep(9.9)
        started.append((len(bench.chat.notified), len(asked)))
        await asyncio.sleep(0.1)
    assert started == [(1, 1), (2, 2), (3, 3)]
    for session in sessions:
        session.leave(now=True)
    async with asyncio.timeout(1):
        await asyncio.wait(tasks)
    assert bench.chat.notified.count(True) == 4, "who had to wait is not said to have begun"


# what was seen -------------------------------------------------------------------------------------------


MANY = 3 * NEWEST + 5
EVERYTHING = [batch(raw(f"word {number}", number), cursor=f"c{number}") for number in range(MANY)]
"""More than a cursor's record holds."""


async def again(bench: Bench) -> list[str]:
    """Another replica takes the bot, and iLink says everything again, with what the server's window forgot."""
    bench.bus.forget_ids()
    bench.cursors.entries[KEY] = without_owner(bench.cursors.entries[KEY])
    bench.chat.polls.extend([batch(*(message for one in EVERYTHING for message in one.messages), cursor="z")])
    await polls(bench)
    return texts(bench)


def without_owner(entry: Entry) -> Entry:
    assert entry.value is not None
    record = msgspec.json.decode(entry.value, type=Cursor)
    return entry._replace(value=msgspec.json.encode(replace(record, owner="")))


async def test_a_message_costs_a_short_record_and_its_successor_remembers_them_all() -> None:
    bench = await ready(*EVERYTHING)
    sizes: list[int] = []

    async def measure(key: str) -> None:
        if key == KEY and KEY in bench.cursors.entries:
            sizes.append(len(bench.cursors.entries[KEY].value or b""))

    bench.cursors.on_write = measure
    await polls(bench)
    assert max(sizes) < 100 * NEWEST
    assert bench.bus.writes.count("cursor") == MANY + MANY // (NEWEST + 1)
    assert len(bench.cursor().seen) <= NEWEST
    assert await again(bench) == [f"word {number}" for number in range(MANY)]


async def test_a_crash_between_what_stands_apart_and_the_cursor_forgets_nothing() -> None:
    bench = await ready(*EVERYTHING)

    async def dies(key: str) -> None:
        if key == KEY and len(texts(bench)) == NEWEST + 1:
            raise RuntimeError("killed")

    bench.cursors.on_write = dies
    with pytest.raises(RuntimeError):
        await polls(bench)
    bench.cursors.on_write = None
    assert (bench.cursor().apart, len(bench.cursors.entries)) == (0, 2)
    bench.chat.polls.clear()
    assert await again(bench) == [
        *(f"word {number}" for number in range(NEWEST + 1)),
        *(f"word {number}" for number in range(NEWEST + 1, MANY)),
    ]


@pytest.mark.parametrize("loss", ["purged", "written by another hand", "answer lost"])
async def test_what_stands_apart_may_vanish_or_change_and_nothing_is_forgotten(loss: str) -> None:
    bench = await ready(*EVERYTHING)

    async def look(message: Message) -> None:
        if len(texts(bench)) == 2 * NEWEST:  # shortly before the next write apart
            bench.bus.on_publish = None
            match loss:
                case "purged":
                    del bench.cursors.entries[apart_key(BOT)]
                case "written by another hand":
                    bench.cursors.put(apart_key(BOT), b"[]")
                case _:
                    bench.cursors.on_write = lose

    async def lose(key: str) -> None:
        bench.cursors.answers_lost = int(key == apart_key(BOT))

    bench.bus.on_publish = look
    await polls(bench)
    bench.cursors.on_write = None
    assert await again(bench) == [f"word {number}" for number in range(MANY)]


@pytest.mark.parametrize("value", [b"\xff\xfe", b"garbage", b"[" * 5000], ids=["no text", "no JSON", "too deep"])
@pytest.mark.parametrize("when", ["before", "while it polls", "with an answer in hand"])
@pytest.mark.parametrize("what", ["cursor", "seen apart", "context"])
async def test_what_nobody_can_read_in_a_bot_s_records_is_written_over(what: str, when: str, value: bytes) -> None:
    """By another hand. It held the bot up for ever, and what had just come for it was dropped."""
    bench = await ready(*EVERYTHING)
    await give_back(await polls(bench), bench.incoming())
    bucket, key = {
        "cursor": (bench.cursors, KEY),
        "seen apart": (bench.cursors, apart_key(BOT)),
        "context": (bench.contexts_bucket, peer_key(BOT, USER)),
    }[what]

    async def spoil(message: Message) -> None:
        bench.bus.on_publish = None
        bucket.put(key, value)

    async def serve() -> None:
        """As the supervisor does."""
        while True:
            await tend(Session(BOT), bench.incoming())
            await asyncio.sleep(0.2)

    bench.chat.script_ends = False
    news = [batch(raw(f"word {number}", number), cursor=f"c{number}") for number in (MANY, MANY + 1)]
    bench.chat.polls.extend([None, news[0], None, news[1], None, *news])
    with capture_logs() as logs:
        if when == "before":
            bucket.put(key, value)
        task = asyncio.get_running_loop().create_task(serve())
        await asyncio.sleep(2)
        if when == "while it polls":
            bucket.put(key, value)
        if when == "with an answer in hand":
            bench.bus.on_publish = spoil
        await asyncio.sleep(300)
        task.cancel()
    assert texts(bench) == [f"word {number}" for number in range(MANY + 2)]
    assert [line["event"] for line in logs if "crashed" in line["event"]] == []
    assert what == "seen apart" or bucket.entries[key].value != value
    if when == "before" or what == "cursor":
        assert {line["event"] for line in logs} & {"cursor.unreadable", "context.unreadable"}


async def test_after_a_purge_everything_seen_is_in_the_record() -> None:
    bench = await ready(*EVERYTHING)
    session = Session(BOT)
    needs = bench.incoming()
    bench.chat.script_ends = True
    place = await acquire(session, needs)
    assert place is not None
    with pytest.raises(EndOfScript):
        await poll_forever(session, place, needs)
    assert session.apart
    place = await acquire(session, needs)
    assert place is not None
    bench.cursors.entries.clear()
    place = await put_back(session, place, needs)
    assert not session.apart
    assert len(bench.cursor().seen) == MANY
    assert await again(bench) == [f"word {number}" for number in range(MANY)]


async def test_who_was_stopped_before_it_wrote_what_it_had_seen_apart_does_not_write_it() -> None:
    bench = await ready(*EVERYTHING[:NEWEST])
    session = Session(BOT)
    needs = bench.incoming()
    place = await acquire(session, needs)
    assert place is not None
    bench.chat.script_ends = True
    for one in EVERYTHING[:NEWEST]:
        place = await store(session, one, place, needs)

    def lose(_: Message) -> None:  # as the last message is stored
        bench.leases.incarnation = "me-2"

    bench.bus.refuse = lose
    with pytest.raises(LeaseLost):
        await store(session, EVERYTHING[NEWEST], place, needs)
    assert list(bench.cursors.entries) == [KEY]


async def frozen_with(bench: Bench, *batches: Polled, other: Bench | None, given: tuple[bytes, ...] = ()) -> None:
    """The replica that polls is stopped with an answer in hand; it goes on long after `other` took the bot and stored
    the messages `given`, where iLink gave it any."""
    bench.chat.polls.extend(batches)
    session, task = tended(bench)

    async def freeze(_: Message) -> None:
        bench.bus.on_publish = None
        bench.leases.is_valid = False
        if other is not None:
            other.leases.proven_dead.add(bench.leases.incarnation)
            heir = Session(BOT)
            needs = other.incoming()
            place = await acquire(heir, needs)
            assert place is not None
            if given:
                await store(heir, batch(*given, cursor="b"), place, needs)
            bench.leases.incarnation = "me-2"  # it was revoked, and has joined anew
        bench.bus.forget_ids()
        asyncio.get_running_loop().call_later(60, resume)

    def resume() -> None:
        bench.leases.is_valid = True
        bench.leases.changed.notify()

    bench.bus.on_publish = freeze
    await asyncio.sleep(120)
    session.leave(now=True)
    await task


async def test_who_was_frozen_with_a_batch_in_hand_tells_nothing_twice_and_moves_no_cursor() -> None:
    """The server's window against duplicates has passed by then."""
    bench = await ready()
    other = Bench(bench, incarnation="other-1")
    words = raw("one", 1), raw("two", 2)
    await frozen_with(bench, batch(*words, cursor="zombie"), other=other, given=words)
    assert texts(bench) == ["one", "two"]
    assert bench.cursor().owner == "other-1"
    assert bench.cursor().cursor == "b"
    assert bench.chat.asked == [""]


async def test_what_ilink_gave_to_one_that_was_frozen_and_to_nobody_else_is_told_late() -> None:
    bench = await ready()
    other = Bench(bench, incarnation="other-1")
    await frozen_with(
        bench, batch(raw("one", 1), raw("two", 2), cursor="zombie"), other=other, given=(raw("two", 2),)
    )
    assert texts(bench) == ["two", "one"]
    assert (bench.cursor().owner, bench.cursor().cursor) == ("other-1", "b")


async def test_who_was_frozen_for_a_moment_goes_on_where_it_was() -> None:
    bench = await ready()
    await frozen_with(bench, batch(raw("one", 1), raw("two", 2), cursor="b"), other=None)
    assert texts(bench) == ["one", "two"]
    assert bench.cursor().cursor == "b"
    assert bench.chat.asked == ["", "b"]


async def test_a_fenced_poller_ends_quietly_and_gives_nothing_back() -> None:
    bench = await ready(batch(raw(), cursor="zombie"))
    _, task = tended(bench)
    await settle()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))
    await asyncio.sleep(5)
    assert task.done()
    assert bench.cursor().owner == "other-1"


async def test_nothing_is_polled_for_a_shard_that_is_not_ours() -> None:
    bench = await ready()
    bench.leases.owned.clear()
    _, task = tended(bench)
    await asyncio.sleep(5)
    assert task.done()
    assert bench.chat.asked == []


async def test_a_lease_that_pauses_cuts_the_poll_and_one_that_resumes_polls_on(poller: Poller) -> None:
    bench = await ready(batch(cursor="b"))
    session = poller(bench)
    await asyncio.sleep(1)
    assert bench.chat.polling == 1
    bench.leases.is_valid = False
    session.cut_off()
    await asyncio.sleep(20)
    assert (bench.chat.polling, session.state) == (0, "paused")
    bench.leases.is_valid = True
    bench.leases.changed.notify()
    await asyncio.sleep(1)
    assert bench.chat.polling == 1
    assert bench.chat.asked == ["", "b", "b"]


async def test_a_poll_that_was_cut_has_a_moment_to_end_at_ilink_before_the_next(poller: Poller) -> None:
    """Where the lease is back at once: a busy server would hear of it before it sees the old connection end."""
    bench = await ready()
    session = poller(bench)
    await asyncio.sleep(1)
    session.cut_off()
    cut = bench.clock.monotonic()
    await asyncio.sleep(1)
    assert bench.chat.polling == 1
    (_, again) = bench.chat.polled_at
    assert again - cut >= HERE_S + AFTER_CUT_S


async def test_after_an_outage_polls_start_spread_over_a_time_that_grows_with_their_number(poller: Poller) -> None:
    """All would start at the same moment: the lease is back for all bots at once."""

    class Chance(FakeClock):
        def jitter(self, seconds: float) -> float:
            return seconds * 0.7

    bench = await ready()
    session = poller(bench, clock=Chance(), spread_s=lambda: 10.0)
    await asyncio.sleep(5)
    before = len(bench.chat.polled_at)
    bench.leases.is_valid = False
    session.cut_off()
    await asyncio.sleep(8)
    bench.leases.is_valid = True
    back = bench.clock.monotonic()
    bench.leases.changed.notify()
    await asyncio.sleep(30)
    assert len(bench.chat.polled_at) == before + 1
    assert bench.chat.polled_at[-1] - back == pytest.approx(7.0, abs=0.01)


async def test_an_answer_that_has_arrived_when_its_poll_is_cut_is_stored() -> None:
    """As after a pause of the whole process: the timer of the lease and the answer are there at the same moment."""
    bench = await ready(batch(raw()))
    session, task = tended(bench)
    while not bench.chat.polling:
        await asyncio.sleep(0)
    session.leave(now=True)
    await task
    assert texts(bench) == ["hello"]
    assert bench.cursor().cursor == "b"


async def test_a_bot_that_waits_for_the_bus_does_not_count_as_polled(poller: Poller) -> None:
    """Through an outage of NATS every bot counted as polled, though nobody polled any: nothing looks at the lease
    before the bus is back.
    """
    bench = await ready(batch(cursor="b"))
    session = poller(bench)
    while not bench.chat.polling:
        await asyncio.sleep(0)
    bench.bus_up.clear()
    await asyncio.sleep(5)
    assert (bench.chat.asked, session.state) == ([""], "paused")
    bench.bus_up.set()
    await asyncio.sleep(1)
    assert (bench.chat.asked, session.state) == (["", "b"], "polling")


async def test_no_poll_starts_while_the_bus_is_away(poller: Poller) -> None:
    bench = await ready()
    bench.bus_up.clear()
    poller(bench)
    await asyncio.sleep(60)
    assert bench.chat.asked == []
    bench.bus_up.set()
    await asyncio.sleep(1)
    assert bench.chat.asked == [""]


@pytest.mark.parametrize("problem", [Temporary("bus_down"), BusRefused(10054, "too large")], ids=["away", "refuses"])
@pytest.mark.parametrize("bucket", ["contexts_bucket", "cursors"])
async def test_a_batch_in_hand_is_retried_until_the_bus_takes_it(
    poller: Poller, bucket: str, problem: AdapterError
) -> None:
    """Its user's record, or its cursor. iLink may count it as delivered, and give it nobody again."""
    bench = await ready(batch(raw()))
    poller(bench)
    failures = 20

    async def fails(_: str) -> None:
        nonlocal failures
        if failures and bench.chat.asked:
            failures -= 1
            raise problem

    getattr(bench, bucket).on_write = fails
    await asyncio.sleep(300)
    assert failures == 0
    assert texts(bench) == ["hello"]
    assert bench.chat.asked == ["", "b"]


async def test_a_cursor_is_given_back_also_where_the_bus_refuses_it_at_first() -> None:
    """This replica lives on, so that nobody else could ever take the bot."""
    bench = await ready()
    session, task = tended(bench)
    await settle()
    bench.cursors.on_write = refuses = Failing(3, BusRefused(10054, "too large"))
    session.leave(now=True)
    await task
    assert refuses.left == 0
    assert bench.cursor().owner == ""


@pytest.mark.parametrize("given", [None, "given"], ids=["polled", "bound"])
async def test_a_cursor_is_sealed_where_it_is_stored_since_the_token_stands_in_it(given: str | None) -> None:
    sealer = Sealer((bytes(32),))
    start = sealer.seal(cursor_context(BOT), given) if given else None
    bench = await ready(batch(cursor="b"), start_cursor=start)
    bench.sealer = sealer
    with capture_logs() as logs:
        await polls(bench)
        heir = Bench(bench, incarnation="heir-1")
        heir.sealer = Sealer((b"\1" * 32, bytes(32)))
        heir.leases.proven_dead.add("me-1")
        before = bench.cursor().cursor
        await polls(heir)
    assert bench.chat.asked == [given or "", "b", "b"]
    assert sealer.how(before) == "sealed"
    assert sealer.open(cursor_context(BOT), before) == "b"
    assert heir.sealer.how(bench.cursor().cursor) == "sealed", "it follows the first key"
    assert not [entry for entry in logs if entry["log_level"] == "error"]


async def test_a_cursor_of_which_the_key_is_gone_is_told_and_begun_anew() -> None:
    bench = await ready(batch(raw("one", 1), cursor="b"))
    bench.sealer = Sealer((bytes(32),))
    await polls(bench)
    heir = Bench(bench, incarnation="heir-1")
    heir.leases.proven_dead.add("me-1")
    heir.sealer = Sealer((b"\1" * 32,))
    bench.chat.polls.append(batch(raw("one", 1), cursor="b"))
    with capture_logs() as logs:
        await polls(heir)
    assert bench.chat.asked == ["", "b", "", "b"]
    assert texts(bench) == ["one"], "what was seen is still known"
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["cursor.unopenable"]


async def test_who_cannot_open_the_token_leaves_the_cursor_as_it_is() -> None:
    bench = await ready()
    bench.sealer = Sealer((bytes(32),))
    await bench.bind(token=bench.sealer.seal(BOT, "secret"))
    await polls(bench)
    before = bench.cursor()
    stranger = Bench(bench, incarnation="other-1")
    stranger.leases.proven_dead.add("me-1")
    stranger.sealer = Sealer((b"\1" * 32,))
    with pytest.raises(Refused):
        await acquire(Session(BOT), stranger.incoming())
    assert bench.cursor() == before


async def test_a_cursor_that_was_written_without_a_word_is_known_again_whatever_its_seal() -> None:
    """The answer was lost: the repeat meets the first, which is sealed in another way, and is no other replica's."""
    bench = await ready()
    bench.sealer = Sealer((bytes(32),))
    needs = bench.incoming()
    place = await acquire(Session(BOT), needs)
    assert place is not None
    record = msgspec.structs.replace(place.record, cursor="b")
    first = await write_cursor(BOT, record, place.revision, needs)
    assert await write_cursor(BOT, record, place.revision, needs) == first
    with pytest.raises(LeaseLost):
        await write_cursor(BOT, msgspec.structs.replace(record, cursor="c"), place.revision, needs)


# starting and stopping -----------------------------------------------------------------------------------


async def test_a_start_cursor_is_used_once() -> None:
    bench = await ready(batch(cursor="b"), start_cursor="given")
    await polls(bench)
    assert bench.chat.asked == ["given", "b"]
    heir = Bench(bench, incarnation="heir-1")
    heir.leases.proven_dead.add("me-1")
    await polls(heir)
    assert bench.chat.asked == ["given", "b", "b"]


async def test_a_start_cursor_counts_once_however_often_it_is_sealed() -> None:
    """A bot that is bound anew with it, perhaps to another sandbox, told everything since to that one."""
    sealer = Sealer((bytes(32),))
    bench = await ready(batch(cursor="b"), start_cursor=sealer.seal(cursor_context(BOT), "given"))
    bench.sealer = sealer
    await polls(bench)
    await bench.bindings.remove(BOT)
    await bench.bind("s2", start_cursor=sealer.seal(cursor_context(BOT), "given"))
    await polls(bench)
    assert bench.chat.asked == ["given", "b", "b"]
    await bench.bind("s2", start_cursor=sealer.seal(cursor_context(BOT), "another"))
    await polls(bench)
    assert bench.chat.asked[3:] == ["another"]


async def test_a_start_cursor_of_which_the_key_is_gone_leaves_the_bot_where_it_is() -> None:
    bench = await ready(batch(cursor="b"))
    await polls(bench)
    await bench.bind(start_cursor=Sealer((b"\1" * 32,)).seal(cursor_context(BOT), "given"))
    with capture_logs() as logs:
        await polls(bench)
    assert bench.chat.asked == ["", "b", "b"]
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["cursor.unopenable"]


async def test_a_start_cursor_that_is_bound_while_the_bot_is_polled_is_used_once_and_at_once() -> None:
    bench = await ready(batch(raw("one"), cursor="b"))
    session, task = tended(bench)
    await asyncio.sleep(5)
    await bench.bind(start_cursor="given")
    bench.chat.polls.append(batch(raw("two", 2), cursor="c"))
    session.cut_off()
    await asyncio.sleep(5)
    session.leave(now=True)
    await task
    assert bench.chat.asked == ["", "b", "given", "c"]
    heir, task = tended(bench)
    await asyncio.sleep(5)
    heir.leave(now=True)
    await task
    assert bench.chat.asked[4:] == ["c"]


async def test_a_notifystart_without_an_answer_holds_the_first_poll_up_for_a_moment_only(poller: Poller) -> None:
    bench = await ready()
    bench.chat.notify_took_s = 60.0
    began = bench.clock.monotonic()
    poller(bench)
    await asyncio.sleep(5)
    assert [at - began <= 2.0 for at in bench.chat.polled_at] == [True]


async def test_ilink_is_told_of_the_start_and_the_end_and_need_not_answer() -> None:
    bench = await ready()
    bench.chat.notify_fails = Temporary("timeout")
    session, task = tended(bench)
    await asyncio.sleep(1)
    assert bench.chat.notified == [True]
    assert bench.chat.asked == [""]
    session.lingering = True
    session.leave(now=True)
    await task
    assert bench.chat.notified == [True, False]
    assert bench.cursor().owner == ""


async def test_ilink_is_not_told_of_an_end_where_another_replica_goes_on() -> None:
    bench = await ready()
    bench.leases.is_alone = False
    session, task = tended(bench)
    await asyncio.sleep(1)
    session.lingering = True
    session.leave(now=True)
    await task
    assert bench.chat.notified == [True]
    assert bench.cursor().owner == ""
    assert bench.freed == ["b1@im.bot"]


async def test_leaving_at_a_boundary_lets_the_poll_deliver() -> None:
    bench = await ready(batch(raw("last words"), cursor="b"), batch(raw("never asked", 2)))
    session, task = tended(bench)
    await asyncio.sleep(0.01)
    assert bench.chat.polling == 1
    session.leave(now=False)
    await task
    assert texts(bench) == ["last words"]
    assert bench.cursor() == replace(bench.cursor(), cursor="b", owner="")
    assert bench.chat.polling == 0


async def test_stopping_stores_the_batch_in_hand() -> None:
    """iLink may not say it again (7.2)."""
    bench = await ready(batch(raw("in hand")))
    release = asyncio.Event()

    async def slow(message: Message) -> None:
        await release.wait()

    bench.bus.on_publish = slow
    session, task = tended(bench)
    await asyncio.sleep(1)
    session.leave(now=True)
    await asyncio.sleep(1)
    assert not task.done()
    release.set()
    await asyncio.sleep(1)
    assert task.done()
    assert texts(bench) == ["in hand"]
    assert bench.cursor() == replace(bench.cursor(), cursor="b", owner="")


async def test_unbinding_ends_the_poll_at_once_and_keeps_what_came_late() -> None:
    bench = await ready()
    session, task = tended(bench)
    await asyncio.sleep(1)
    await bench.bindings.remove(BOT)
    session.leave(now=True)
    await asyncio.sleep(5)
    assert task.done()
    assert bench.chat.polling == 0


async def test_a_message_for_a_bot_that_was_unbound_while_it_came_is_a_dead_letter() -> None:
    bench = await ready()
    session = Session(BOT)
    needs = bench.incoming()
    place = await acquire(session, needs)
    assert place is not None
    await bench.bindings.remove(BOT)
    await store(session, batch(raw("too late")), place, needs)
    assert texts(bench) == []
    (dead,) = bench.bus.found("DEAD")
    assert dead.headers["Wechat-Reason"] == "not_bound"
    assert BOT in dead.headers["Wechat-Detail"], "nothing else names it"
    assert dead.data == raw("too late")


async def test_what_came_for_an_unbound_bot_is_a_repeat_when_ilink_gives_it_again_to_its_next_sandbox() -> None:
    bench = await ready()
    needs, session = bench.incoming(), Session(BOT)
    place = await acquire(session, needs)
    assert place is not None
    await bench.bindings.remove(BOT)
    await store(session, batch(raw("to the first")), place, needs)
    await bench.bind("s2")
    bench.chat.polls.append(batch(raw("to the first", message_id=5, seq=5), raw("to the second", 2), cursor="c"))
    await polls(bench)
    assert texts(bench) == ["to the second"]
    assert len(bench.bus.found("DEAD")) == 1


async def test_a_message_for_a_bot_that_was_bound_anew_is_told_also_where_the_news_of_it_are_late() -> None:
    bench = await ready()
    session = Session(BOT)
    needs = bench.incoming()
    place = await acquire(session, needs)
    assert place is not None
    await bench.bindings.remove(BOT)
    platform = Bench(bench)
    bench.bindings_bucket._followers.clear()
    await platform.bind()
    await store(session, batch(raw("in time")), place, needs)
    assert texts(bench) == ["in time"]
    assert bench.bus.found("DEAD") == []


async def test_a_new_token_is_used_at_once(poller: Poller) -> None:
    bench = await ready()
    session = poller(bench)
    await asyncio.sleep(1)
    await bench.bind(token="new")
    session.cut_off()  # the supervisor does, when it sees the change
    await asyncio.sleep(1)
    assert bench.chat.tokens == [f"{BOT}:t", "new"]


async def test_polls_that_go_on_failing_are_told_less_and_less_often(poller: Poller) -> None:
    """Thousands fail together where iLink is away; the metric counts each."""
    bench = await ready(*[Temporary("network")] * 20)
    with capture_logs() as logs:
        poller(bench)
        await asyncio.sleep(1200)
    assert [entry["failures"] for entry in logs if entry["event"] == "poll.failed"] == [1, 2, 4, 8, 16]
    assert bench.metrics.value("polls_total", outcome="error") == 20


async def test_a_cursor_too_long_to_keep_is_told_once_until_one_is_kept(poller: Poller) -> None:
    """iLink gives the same again for the old one; told apart as repeats, nothing else would show it."""
    long = Polled([raw()], None, 35_000, overlong=70_000)
    idle = batch(cursor=None)
    bench = await ready(long, idle, long)
    with capture_logs() as logs:
        session = poller(bench)
        await asyncio.sleep(10)
        assert session.state == "error"
        bench.chat.polls.extend([batch(cursor="c"), long])
        session.cut_off()
        await asyncio.sleep(10)
    told = [entry for entry in logs if entry["event"] == "poll.cursor_too_long"]
    assert told == [{"event": "poll.cursor_too_long", "log_level": "error", "bot": BOT, "characters": 70_000}] * 2
    assert texts(bench) == ["hello"]


async def test_a_bot_polls_as_ever_once_its_cursor_is_kept_again(poller: Poller) -> None:
    bench = await ready(Polled([], None, 35_000, overlong=70_000), batch(cursor="c"))
    session = poller(bench)
    await asyncio.sleep(10)
    assert session.state == "polling"


async def test_a_url_that_may_not_be_called_is_tried_again_with_backoff_only(poller: Poller) -> None:
    bench = await ready(*[Refused("url", "not on the list")] * 100)
    poller(bench)
    await asyncio.sleep(600)
    assert len(bench.chat.asked) < 30


async def test_a_bug_ends_no_poller() -> None:
    bench = await ready(RuntimeError("a bug"), batch(raw()))
    with capture_logs() as logs:
        session, task = tended(bench)
        await asyncio.sleep(30)
    assert texts(bench) == ["hello"]
    assert "poller.crashed" in [line["event"] for line in logs]
    session.leave(now=True)
    await task


# -14 -----------------------------------------------------------------------------------------------------


def changes(bench: Bench) -> list[str]:
    return [event.change for event in bench.bus.events()]


async def test_minus_14_for_ever_ends_in_needs_login_after_four_polls(poller: Poller) -> None:
    """F9: at once, after 5 s, 30 s and 5 min, each with a notifystart before it; then silence.

    The login is told to be lost long before the last try: a person waits.
    """
    bench = await ready(*[STALE] * 100)
    session = poller(bench)
    await asyncio.sleep(55)
    assert changes(bench) == ["stale", "needs_login"]
    lost = bench.bus.events()[1]
    assert (lost.reason, lost.user) == ("iLink answered -14", USER)
    assert "QR code" in lost.detail
    assert (bench.bus.events()[1].at_ms - bench.bus.events()[0].at_ms) < 55_000
    assert session.state == "needs_login"
    await asyncio.sleep(3600)
    at = [when - bench.chat.polled_at[0] for when in bench.chat.polled_at]
    assert [round(when) for when in at] == [0, 5, 35, 335]
    assert bench.chat.notified == [True] * 4
    assert changes(bench) == ["stale", "needs_login"]
    binding = bench.bindings.get(BOT)
    assert binding is not None
    assert (binding.state, binding.reason, session.state) == ("needs_login", "stale_token", "needs_login")


async def test_two_events_at_once_are_two() -> None:
    bench = await ready()
    for _ in range(2):
        await bench.events.binding(BindingEvent(sandbox="s1", bot=BOT, change="stale"))
    assert changes(bench) == ["stale", "stale"]


async def test_an_event_of_a_request_is_told_once() -> None:
    bench = await ready()
    for _ in range(2):
        await bench.events.binding(BindingEvent(sandbox="s1", bot=BOT, change="bound", request="r1"))
    assert changes(bench) == ["bound"]


async def test_a_token_that_lives_again_after_needs_login_is_active_again(poller: Poller) -> None:
    """The last try of the schedule runs on quietly; what it brings is told, and the lanes are woken."""
    bench = await ready(STALE, STALE, STALE, batch(raw()))
    session = poller(bench)
    await asyncio.sleep(300)
    assert changes(bench) == ["stale", "needs_login"]
    assert bench.heard == []
    assert session.stale
    await asyncio.sleep(60)
    assert changes(bench) == ["stale", "needs_login", "recovered"]
    binding = bench.bindings.get(BOT)
    assert binding is not None
    assert (binding.state, binding.reason) == ("active", "")
    assert (texts(bench), bench.heard[0], session.stale) == (["hello"], ("s1", BOT, USER), False)
    assert session.state == "polling"


@pytest.mark.parametrize(
    ("schedule", "polls_at", "told_at"),
    [
        ((300.0,), [0, 300], 0),
        ((0.2, 0.4, 0.6), [0, 0, 1, 1], 1),
        ((20.0, 20.0, 20.0, 20.0), [0, 20, 40, 60, 80], 40),
        ((), [0], 0),
    ],
    ids=["one-late-try", "all-at-once", "many", "none"],
)
async def test_needs_login_is_told_within_a_minute_whatever_the_schedule(
    poller: Poller, schedule: tuple[float, ...], polls_at: list[int], told_at: int
) -> None:
    bench = await ready(*[STALE] * 100)
    poller(bench, stale_retry_s=schedule)
    await asyncio.sleep(3600)
    assert [round(when - bench.chat.polled_at[0]) for when in bench.chat.polled_at] == polls_at
    assert changes(bench) == ["stale", "needs_login"]
    stale, lost = bench.bus.events()
    assert round((lost.at_ms - stale.at_ms) / 1000) == told_at


async def test_a_bot_bound_anew_wins_over_the_last_tries(poller: Poller) -> None:
    bench = await ready(STALE, STALE, STALE)
    session = poller(bench)
    await asyncio.sleep(100)
    await bench.bind(token="new")
    await asyncio.sleep(2)
    assert bench.chat.tokens[3:] == ["new"]
    assert changes(bench) == ["stale", "needs_login"]
    assert (session.state, session.stale) == ("polling", False)


async def test_a_binding_that_a_send_found_dead_is_not_tried_by_the_poller_too(poller: Poller) -> None:
    """F10, and then the poll that was out ends with -14: the tries are the lane's."""
    bench = await ready(STALE)
    session = poller(bench)
    await bench.bind(state="needs_login")
    session.cut.clear()
    await asyncio.sleep(3600)
    assert len(bench.chat.asked) <= 1
    assert changes(bench) == []


async def test_minus_14_once_recovers_quickly(poller: Poller) -> None:
    """F8: nothing is lost and the lanes are woken."""
    bench = await ready(STALE, batch(raw()))
    session = poller(bench)
    await asyncio.sleep(1)
    assert session.stale
    await asyncio.sleep(10)
    assert not session.stale
    assert changes(bench) == ["stale", "recovered"]
    assert texts(bench) == ["hello"]
    assert ("s1", BOT, USER) in bench.heard


async def test_a_server_that_cannot_be_reached_proves_no_login_lost(poller: Poller) -> None:
    """Only -14 says so: a scan of a QR code is a lot to ask of a person for an outage."""
    bench = await ready(STALE, *[Temporary("network")] * 100, batch(raw()))
    poller(bench)
    await asyncio.sleep(24 * 3600)
    assert changes(bench) == ["stale", "recovered"]
    assert texts(bench) == ["hello"]


async def test_a_server_that_does_not_answer_proves_no_login_lost(poller: Poller) -> None:
    bench = await ready(STALE, *[None] * 10, batch(raw()))
    poller(bench)
    await asyncio.sleep(24 * 3600)
    assert changes(bench) == ["stale", "recovered"]


async def test_a_new_token_ends_the_recovery_of_the_old_one(poller: Poller) -> None:
    bench = await ready(STALE)
    session = poller(bench)
    await asyncio.sleep(1)
    await bench.bind(token="new")
    session.cut_off()
    await asyncio.sleep(1)
    assert bench.chat.tokens[-1] == "new"
    assert changes(bench) == ["stale"]
    assert not session.stale


async def test_a_token_bound_anew_polls_again_after_needs_login(poller: Poller) -> None:
    bench = await ready(state="needs_login")
    poller(bench)
    await asyncio.sleep(600)
    assert bench.chat.asked == []
    await bench.bind(token="new")
    await asyncio.sleep(2)
    assert bench.chat.tokens == ["new"]


async def in_its_last_try(*script: Any) -> tuple[Bench, asyncio.Event, asyncio.Task[None], Session]:
    """A bot that needs a login by our word, and whose last poll with the old token waits for what is set."""
    bench, answered = await ready(STALE, STALE, STALE), asyncio.Event()
    poll = bench.chat.poll

    async def asked(account: Account, cursor: str, hold_ms: int) -> Polled | None:
        if len(bench.chat.asked) == 3:
            bench.chat.asked.append(cursor)
            await answered.wait()
            return batch(raw("late"), cursor="c")
        return await poll(account, cursor, hold_ms)

    bench.chat.poll = asked  # type: ignore[method-assign]
    session, task = tended(bench)
    await asyncio.sleep(345)
    assert (len(bench.chat.asked), changes(bench)) == (4, ["stale", "needs_login"])
    return bench, answered, task, session


async def test_what_the_last_try_brings_is_told_also_where_the_bot_was_bound_anew_meanwhile() -> None:
    bench, answered, task, session = await in_its_last_try()
    await bench.bind()
    answered.set()
    await asyncio.sleep(5)
    session.leave(now=True)
    await task
    assert texts(bench) == ["late"]


async def test_what_the_last_try_brings_is_told_also_where_the_bus_is_away_for_a_moment() -> None:
    bench, answered, task, session = await in_its_last_try()
    get, failures = bench.bindings_bucket.get, [Temporary("bus_timeout")]

    async def read(key: str) -> Entry | None:
        if failures:
            raise failures.pop()
        return await get(key)

    bench.bindings_bucket.get = read  # type: ignore[method-assign]
    answered.set()
    await asyncio.sleep(5)
    session.leave(now=True)
    await task
    assert texts(bench) == ["late"]
    assert changes(bench)[2:] == ["recovered"]


def untellable(bench: Bench, change: str) -> None:
    """The bus is away as a change of a login is to be told for the first time."""
    tell, failures = bench.events.binding, [Temporary("bus_timeout")]

    async def binding(event: BindingEvent, *, cause: str = "") -> None:
        if failures and event.change == change:
            raise failures.pop()
        await tell(event, cause=cause)

    bench.events.binding = binding  # type: ignore[method-assign]


async def test_that_a_login_lives_again_is_told_also_where_the_bus_is_away_for_a_moment() -> None:
    bench, answered, task, session = await in_its_last_try()
    untellable(bench, "recovered")
    answered.set()
    await asyncio.sleep(5)
    session.leave(now=True)
    await task
    assert changes(bench)[2:] == ["recovered"]


async def test_that_a_login_is_lost_is_told_and_tried_on_also_where_the_bus_is_away_for_a_moment() -> None:
    bench = await ready(STALE, STALE, STALE, batch(raw()))
    untellable(bench, "needs_login")
    session, task = tended(bench)
    await asyncio.sleep(360)
    session.leave(now=True)
    await task
    assert changes(bench) == ["stale", "needs_login", "recovered"]
    assert texts(bench) == ["hello"]


@pytest.mark.parametrize("away", ["binding", "event"])
async def test_a_login_that_cannot_be_called_lost_does_not_hold_up_who_leaves(away: str) -> None:
    """Nothing is in hand: the next owner hears of the dead token, too, or finds the mark."""
    bench = await ready(STALE, STALE, STALE)
    session, task = tended(bench)
    await asyncio.sleep(20)

    async def fail(*_: object) -> None:
        raise Temporary("bus_timeout")

    if away == "binding":
        bench.bindings_bucket.on_write = fail
    else:
        bench.bus.on_publish = fail
    await asyncio.sleep(100)
    session.leave(now=True)
    await asyncio.sleep(2)
    assert task.done()
    assert changes(bench) == ["stale"]


async def test_who_lost_the_bot_while_the_bus_was_away_does_not_end_its_login() -> None:
    bench = await ready(STALE, STALE, STALE)
    session, task = tended(bench)
    await asyncio.sleep(20)
    away = [True]

    async def write(key: str) -> None:
        if away:
            raise Temporary("bus_timeout")

    bench.bindings_bucket.on_write = write
    await asyncio.sleep(340)
    bench.leases.owned.clear()
    session.leave(now=True)
    heir = Bench(bench, incarnation="heir-1")
    heir.leases.proven_dead.add("me-1")
    second, next_task = tended(heir)
    await asyncio.sleep(5)
    away.clear()
    await asyncio.sleep(5)
    assert (task.done(), second.state, changes(bench)) == (True, "polling", ["stale"])
    second.leave(now=True)
    await next_task


@pytest.mark.parametrize(("state", "change"), [("needs_login", "needs_login"), ("active", "recovered")])
async def test_a_crash_between_a_login_s_change_and_its_event_leaves_the_telling_to_the_next_owner(
    poller: Poller, state: BindingState, change: str
) -> None:
    bench = await ready(state=state, since_ms=7, untold=True)
    poller(bench)
    await asyncio.sleep(1)
    assert changes(bench) == [change]
    binding = bench.bindings.get(BOT)
    assert binding is not None
    assert not binding.untold


async def test_a_login_s_event_that_was_told_before_the_crash_is_one_event(poller: Poller) -> None:
    bench = await ready(state="needs_login", since_ms=7, untold=True)
    binding = bench.bindings.get(BOT)
    assert binding is not None
    await tell_login(bench.bindings, bench.events, binding)
    await bench.bind(state="needs_login", since_ms=7, untold=True)
    poller(bench)
    await asyncio.sleep(1)
    assert changes(bench) == ["needs_login"]


async def test_what_a_send_found_of_a_login_and_could_not_tell_is_told_by_who_polls(poller: Poller) -> None:
    bench = await ready(state="needs_login")
    session = poller(bench)
    await asyncio.sleep(1)
    binding = bench.bindings.get(BOT)
    assert binding is not None
    assert await regain_login(bench.bindings, bench.clock, binding) is not None
    await asyncio.sleep(1)
    assert (changes(bench), session.state) == (["recovered"], "polling")


async def test_no_try_begins_while_the_bus_takes_nothing(poller: Poller) -> None:
    bench = await ready(STALE, batch(raw()))
    poller(bench)
    await asyncio.sleep(1)
    bench.bus_up.clear()
    await asyncio.sleep(60)
    assert len(bench.chat.asked) == 1
    bench.bus_up.set()
    await asyncio.sleep(1)
    assert texts(bench) == ["hello"]


async def test_a_pause_after_a_failure_is_a_boundary() -> None:
    """Who hands the bot over, or stops, need not wait for it."""
    bench = await ready(Temporary("http_4xx", "HTTP 429", retry_after_s=300.0))
    session, task = tended(bench)
    await asyncio.sleep(60)
    session.lingering = True
    session.leave(now=False)
    began = bench.clock.monotonic()
    await task
    assert bench.clock.monotonic() - began < 1.0


async def test_an_answer_that_was_read_when_the_cut_is_due_is_kept() -> None:
    bench, answer = await ready(), asyncio.get_running_loop().create_future()

    async def poll(account: Account, cursor: str, hold_ms: int) -> Polled:
        return await answer  # type: ignore[no-any-return]

    bench.chat.poll = poll  # type: ignore[method-assign]
    session, task = tended(bench)
    await asyncio.sleep(5)
    loop = asyncio.get_running_loop()
    loop.call_later(HERE_S, answer.set_result, batch(raw("late")))
    session.leave(now=True)  # its time is over in the same turn of the loop
    await task
    assert texts(bench) == ["late"]


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_an_answer_that_came_while_the_loop_was_held_up_is_read_before_the_poll_is_cut(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """A busy machine holds a process up between two reads; uvloop calls what is due by then before it reads on."""
    session = Session("b1")
    (ours, ilink), (busy, waker) = socket.socketpair(), socket.socketpair()

    def hold_up() -> None:
        busy.recv(1)
        ilink.send(b"hi")
        time.sleep(HERE_S * 2)  # stands for the others, who have the processor

    async def poll() -> bytes:
        loop = asyncio.get_running_loop()
        reader, writer = await asyncio.open_connection(sock=ours)
        loop.add_reader(busy, hold_up)
        session.polling = asyncio.current_task()
        session.cut_off()
        waker.send(b"!")
        try:
            return await reader.readexactly(2)
        finally:
            loop.remove_reader(busy)
            writer.close()

    with ilink, busy, waker, asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(poll()) == b"hi"


async def test_what_nobody_polls_grows_old_while_its_poller_begins_again_and_again(poller: Poller) -> None:
    bench = await ready(*[Refused("url", "may not be called")] * 100)
    session = poller(bench)
    await asyncio.sleep(1)
    first = session.answered
    await asyncio.sleep(300)
    assert session.answered == first


async def test_leaving_cuts_a_recovery_short() -> None:
    bench = await ready(*[STALE] * 10)
    session, task = tended(bench)
    await asyncio.sleep(20)
    session.leave(now=True)
    await asyncio.sleep(5)
    assert task.done()
    assert changes(bench) == ["stale"]


async def test_no_secret_reaches_the_log_or_the_bus() -> None:
    bench = await ready(STALE, Temporary("network"), batch(raw("my secret text")), token="b1@im.bot:SECRET")
    with capture_logs() as logs:
        session, task = tended(bench)
        await asyncio.sleep(60)
        session.leave(now=True)
        await task
    assert "SECRET" not in str(logs)
    assert "my secret text" not in str(logs)
    assert "token-1" not in str(logs)
    stored = b"".join(kept.stored.data for kept in bench.bus.kept)
    assert b"SECRET" not in stored
    assert b"token-1" not in stored
    assert H_SEEN in bench.bus.found("IN")[0].headers
