"""What one answer of iLink brings onto the bus: token, then message, then cursor; told once, in order."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from adapter.contract import UnsupportedItem
from adapter.errors import AdapterError, BusRefused, Temporary
from adapter.inbound.batches import store
from adapter.inbound.cursors import acquire
from adapter.inbound.inbox import LARGE
from adapter.inbound.sessions import Session
from adapter.names import H_MSG_ID, peer_key
from adapter.ports import Message, Polled, Share
from adapter.records import Hand
from tests.fakes import EPOCH_MS, Bench, batch, ready, settle
from tests.inbound.pollers import BOT, USER, Poller, polls, raw, tended, texts

VIRTUAL_TIME = True


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


async def test_the_lane_knows_that_the_user_wrote_before_the_sandbox_can_answer() -> None:
    """Else typing that begins with the message would be shown after an answer that came at once."""
    bench = await ready(batch(raw()))

    async def look(message: Message) -> None:
        assert bench.heard == [("s1", BOT, USER)]

    bench.bus.on_publish = look
    await polls(bench)
    assert texts(bench) == ["hello"]


async def test_who_watches_the_windows_is_asked_to_look_once_the_window_is_stored() -> None:
    bench = await ready(batch(raw(), raw("more", 2)))
    seen: list[str] = []
    bench.look = lambda peer: seen.append(f"{peer.user} {bench.context().inbound_id == peer.context.inbound_id}")
    await polls(bench)
    assert seen == [f"{USER} True"]


async def test_the_order_in_a_batch_is_ilinks_whatever_seq_and_time_say() -> None:
    """F20."""
    bench = await ready(batch(raw("one", 3), raw("two", 1), raw("three", 2)))
    await polls(bench)
    assert texts(bench) == ["one", "two", "three"]


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


def paged(*pages: list[bytes], cursor: str = "b", share: Share | None = None) -> Polled:
    """A large answer, as it is read: the first page, and the others to come."""
    first, *others = pages
    return Polled(first, cursor, 35_000, pages=iter(others), share=share)


async def test_a_large_answer_is_stored_a_page_at_a_time_and_its_cursor_with_the_last() -> None:
    bench = await ready()
    stored: list[tuple[int, str]] = []

    class Given:
        def shrink(self, size: int) -> None: ...

        def release(self) -> None:
            stored.append((len(texts(bench)), "released"))

    async def look(message: Message) -> None:
        stored.append((len(texts(bench)), bench.cursor().cursor))

    answer = paged(
        [raw("one", 1), raw("two", 2)], [raw("three", 3)], [raw("three", 3), raw("four", 4)], share=Given()
    )
    bench.chat.polls += [answer, batch(raw("five", 5), cursor="c")]
    bench.bus.on_publish = look
    await polls(bench)
    assert texts(bench) == ["one", "two", "three", "four", "five"]
    assert stored == [(0, ""), (1, ""), (2, ""), (3, ""), (4, "released"), (4, "b")]
    assert bench.chat.asked == ["", "b", "c"]


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


async def test_the_pages_to_come_of_what_ilink_gave_to_one_that_was_frozen_are_told_late() -> None:
    bench = await ready()
    other = Bench(bench, incarnation="other-1")
    answer = paged([raw("one", 1)], [raw("two", 2), raw("three", 3)], [raw("four", 4)], cursor="zombie")
    await frozen_with(bench, answer, other=other, given=(raw("two", 2),))
    assert sorted(texts(bench)) == ["four", "one", "three", "two"]
    assert (bench.cursor().owner, bench.cursor().cursor) == ("other-1", "b")


async def test_who_was_frozen_for_a_moment_goes_on_where_it_was() -> None:
    bench = await ready()
    await frozen_with(bench, batch(raw("one", 1), raw("two", 2), cursor="b"), other=None)
    assert texts(bench) == ["one", "two"]
    assert bench.cursor().cursor == "b"
    assert bench.chat.asked == ["", "b"]


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


@pytest.mark.parametrize(("lingering", "used"), [(True, 1), (False, 0)], ids=["given away", "own"])
async def test_a_request_that_a_shards_next_owner_may_have_out_counts_in_the_new_window(
    lingering: bool, used: int
) -> None:
    """Its last poll is told here, and its commands are sent there already: an eleventh would leave."""
    bench = await ready()
    bench.hears(used=3, hand=Hand(command="c1", client="c1", sandbox="s1", tried=1, counted_in="in:1"))
    session = Session(BOT)
    needs = bench.incoming()
    place = await acquire(session, needs)
    assert place is not None
    session.lingering = lingering
    await store(session, batch(raw("one more")), place, needs)
    assert bench.context().used == used


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
