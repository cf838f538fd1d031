"""How commands end where something was tried of them before: what may be told, and what a second publish does."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from adapter import window
from adapter.contract import BindingEvent, Outbound
from adapter.errors import Refused, Temporary
from adapter.names import H_COMMAND, peer_key
from adapter.outbound.commands import read_command
from adapter.outbound.parked import item_of
from adapter.outbound.shard import Shard
from adapter.ports import Accepted, Message, Stored
from adapter.records import Hand
from tests.fakes import GAP_S, LIMITS, Bench, Sent
from tests.outbound.shards import (
    BOT,
    FIRST,
    STALE,
    THREE,
    THROTTLED,
    TIMEOUT,
    USER,
    finals,
    keeping_back,
    outcomes,
    parked,
    ready,
    user_writes,
)

VIRTUAL_TIME = True


# what can be told ----------------------------------------------------------------------------------------


async def test_what_was_half_sent_when_its_time_was_up_names_what_is_on_the_phone() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([FIRST, THROTTLED])
    shard.on_delivery(bench.command(THREE, expires_in_s=60))
    await asyncio.sleep(100)
    (receipt,) = finals(bench)
    assert (receipt.outcome, receipt.reason, receipt.message_ids) == ("refused", "expired", ["m1"])


async def test_what_was_half_sent_when_the_bot_was_unbound_names_what_is_on_the_phone() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([FIRST, THROTTLED])
    shard.on_delivery(bench.command(THREE))
    await asyncio.sleep(20)
    await bench.bindings.remove(BOT)
    shard.rebound("s1")
    await asyncio.sleep(20)
    (receipt,) = finals(bench)
    assert (receipt.outcome, receipt.reason, receipt.message_ids) == ("refused", "not_bound", ["m1"])


@pytest.mark.parametrize(
    ("answer", "told"), [(FIRST, ["accepted"]), (Refused("rejected", "no", ret=-3), [])], ids=str
)
async def test_who_loses_the_shard_meanwhile_tells_only_of_what_was_sent(
    answer: Accepted | Refused, told: list[str]
) -> None:
    """Of a refusal the next owner knows nothing, and may have more luck."""
    bench, shard = await ready()

    async def lose(_: Sent) -> None:
        bench.leases.owned.clear()

    bench.chat.on_send = lose
    bench.chat.sends.append(answer)
    delivery = bench.command("hi")
    shard.on_delivery(delivery)
    await asyncio.sleep(30)
    assert [receipt.outcome for receipt in finals(bench)] == told
    assert bool(delivery.acks) == bool(told)


@pytest.mark.parametrize("waits_s", [200.0, 400.0], ids=["in-time", "late"])
async def test_one_that_was_cut_off_for_long_tells_of_no_command_a_second_time(waits_s: float) -> None:
    """The next owner has told of it, and the stream does not know the receipt's id any more."""
    bench, shard = await ready()

    async def cut_off(message: Message) -> None:
        if message.stream == "event":
            bench.leases.is_valid = False
            await asyncio.sleep(waits_s)

    bench.bus.on_publish = cut_off
    delivery = bench.command("hi")
    shard.on_delivery(delivery)
    await asyncio.sleep(600)
    assert len(finals(bench)) == delivery.acks == (waits_s < 300)


async def test_what_had_no_answer_when_the_bot_was_unbound_is_uncertain() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([TIMEOUT, *[STALE] * 4])
    bench.chat.notify_fails = STALE
    shard.on_delivery(bench.command("pay"))
    await asyncio.sleep(8)
    await bench.bindings.remove(BOT)
    shard.rebound("s1")
    await asyncio.sleep(20)
    (receipt,) = finals(bench)
    assert receipt.outcome == "uncertain"
    assert receipt.detail.endswith("The bot was unbound.")


async def test_what_had_its_answer_when_the_bot_was_unbound_is_not_uncertain() -> None:
    """The record says that a request was to leave; what became of it, only the lane knows."""
    bench, shard = await ready()
    bench.chat.sends.extend([FIRST, *[Temporary("http_5xx")] * 8])
    shard.on_delivery(bench.command(THREE))
    await asyncio.sleep(8)

    async def forget() -> None:
        bench.contexts.forget(BOT)

    bench.bound_yet = forget  # asked once the request is over: the poller has ended, too
    await bench.bindings.remove(BOT)
    shard.rebound("s1")
    await asyncio.sleep(20)
    (receipt,) = finals(bench)
    assert (receipt.outcome, receipt.reason, receipt.message_ids) == ("refused", "not_bound", ["m1"])


AFTER_SILENCE = {
    "stale": STALE,
    "throttled": THROTTLED,
    "no-such-user": Refused("rejected", "iLink answered -3", ret=-3),
}


@pytest.mark.parametrize("second", AFTER_SILENCE.values(), ids=AFTER_SILENCE)
async def test_a_refusal_of_the_repeat_says_nothing_of_the_request_before(second: Refused) -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([TIMEOUT, second])
    bench.chat.notify_fails = STALE
    shard.on_delivery(bench.command("pay", when_closed="refuse"))
    await asyncio.sleep(20)
    (receipt,) = finals(bench)
    assert receipt.outcome == "uncertain"
    assert (receipt.ret, receipt.errcode) == (second.ret, second.errcode)


async def test_what_had_no_answer_before_ilink_went_away_is_uncertain_and_no_dead_letter() -> None:
    """Tried again under its id it might be seen twice."""
    bench, shard = await ready()
    bench.chat.sends.extend([TIMEOUT, *[Temporary("http_5xx")] * 5])
    for _ in range(2):
        shard.on_delivery(bench.command("pay", id="c"))
        await asyncio.sleep(300)
    assert outcomes(bench) == [("c", "uncertain", "")]
    assert len({sent.client_id for sent in bench.chat.sent}) == 1


async def test_a_word_that_is_only_typing_is_not_accepted_unasked() -> None:
    """Where sends are kept back for last words, and only those are left."""
    bench, shard = await ready()
    shard = keeping_back(bench)
    for number in range(10):
        shard.on_delivery(bench.command(f"t{number}"))
    await asyncio.sleep(60)
    shard.on_delivery(bench.command(typing="on", id="typing", final=True))
    await asyncio.sleep(30)
    assert outcomes(bench)[-1] == ("typing", "refused", "quota")
    assert bench.chat.typing == []


async def test_hiding_that_has_to_wait_for_a_login_is_told_so_at_once() -> None:
    bench, shard = await ready()
    shard.on_delivery(bench.command(typing="on", id="on"))
    await asyncio.sleep(3)
    bench.chat.typing_answers.extend([Temporary("timeout")] * 3)
    shard.on_delivery(bench.command(typing="off", id="off"))
    await asyncio.sleep(1)
    bench.stale.add(BOT)
    await asyncio.sleep(60)
    assert outcomes(bench) == [("on", "accepted", ""), ("off", "refused", "needs_login")]
    bench.stale.clear()
    await asyncio.sleep(60)
    assert not bench.chat.typing[-1].on, "it is hidden all the same"


# the same id again ---------------------------------------------------------------------------------------


async def test_a_dead_letter_may_be_tried_again_under_its_id() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([Temporary("http_5xx")] * bench.sending().attempts)
    shard.on_delivery(bench.command("hi", id="c"))
    await asyncio.sleep(300)
    assert outcomes(bench) == [("c", "dead_lettered", "unreachable")]
    shard.on_delivery(bench.command("hi", id="c"))
    await asyncio.sleep(20)
    assert outcomes(bench)[1:] == [("c", "accepted", "")]


async def test_what_ilink_refused_may_be_tried_again_under_its_id() -> None:
    bench, shard = await ready()
    bench.chat.sends.append(Refused("rejected", "no"))
    for _ in range(2):
        shard.on_delivery(bench.command("hi", id="c"))
        await asyncio.sleep(20)
    assert outcomes(bench) == [("c", "refused", "rejected"), ("c", "accepted", "")]


async def test_what_expired_leaves_nothing_behind_for_its_id_and_for_what_follows() -> None:
    bench, shard = await ready(merge_chars=3000)
    bench.chat.sends.extend([STALE] * 4)
    bench.chat.notify_fails = STALE
    shard.on_delivery(bench.command("a", id="a", expires_in_s=600))
    await asyncio.sleep(700)
    assert outcomes(bench)[-1] == ("a", "refused", "expired")
    for ident in ("a", "c", "d"):
        shard.on_delivery(bench.command(ident, id=ident))
    await asyncio.sleep(60)
    assert parked(bench) == ["a", "c", "d"]
    await bench.bind(token="new")
    shard.rebound("s1")
    await user_writes(bench, shard)
    await asyncio.sleep(60)
    assert outcomes(bench)[-3:] == [(ident, "accepted", "") for ident in ("a", "c", "d")]
    assert parked(bench) == []


async def test_an_id_is_one_of_its_sandbox() -> None:
    """A bot that serves another sandbox now takes the ids of the first one with it."""
    bench, shard = await ready()
    shard.on_delivery(bench.command("hi", id="welcome"))
    await asyncio.sleep(20)
    await bench.bind(sandbox="s9")
    shard.on_delivery(bench.command("hello", sandbox="s9", id="welcome"))
    await asyncio.sleep(20)
    assert bench.chat.texts == ["hi", "hello"]
    assert outcomes(bench) == [("welcome", "accepted", "")] * 2


async def goes_on_elsewhere(bench: Bench, shard: Shard) -> None:
    """Another replica hears the user; then come a second command, and the first one again."""
    heard = window.heard(bench.context(), message="in:2", token="AARz", now_ms=bench.clock.now_ms(), in_flight=0)
    bench.contexts_bucket.put(peer_key(BOT, USER), msgspec.json.encode(heard))
    for text, ident in (("two", "c2"), ("one", "c1")):
        shard.on_delivery(bench.command(text, id=ident))
        await asyncio.sleep(5)


async def test_a_record_that_another_replica_wrote_forgets_no_id() -> None:
    """The owner before us stores what its last poll brought while we send."""
    bench, shard = await ready()
    shard.on_delivery(bench.command("one", id="c1"))
    await asyncio.sleep(5)
    await goes_on_elsewhere(bench, shard)
    assert bench.chat.texts == ["one", "two"]


async def test_a_record_that_another_replica_wrote_brings_back_nothing_that_was_refused() -> None:
    """It holds what was in hand as it was last stored. iLink has refused that since, and it may be tried again."""
    bench, shard = await ready()
    bench.chat.sends.append(Refused("rejected", "no"))
    shard.on_delivery(bench.command("one", id="c1"))
    await asyncio.sleep(5)
    await goes_on_elsewhere(bench, shard)
    assert bench.chat.texts == ["one", "two", "one"]


async def test_what_is_parked_keeps_an_id_that_no_header_can_hold() -> None:
    bench, shard = await ready(is_open=False)
    shard.on_delivery(bench.command("hi", id=" job\n7 "))
    await asyncio.sleep(5)
    (stored,) = bench.bus.found("PARKED")
    as_nats_has_it = {**stored.headers, H_COMMAND: "job7"}
    item = item_of(Stored(stored.subject, 1, as_nats_has_it, stored.data), bench.outgoing())
    assert item.command.id == " job\n7 "


async def test_a_sandbox_that_lost_its_bot_gives_up_what_is_its_own_alone() -> None:
    """The bot's next sandbox has something half sent to the same user at that moment."""
    bench, old = await ready()
    new = bench.shard("s9")
    bench.chat.took_s = 3.0
    for ident in ("x1", "x2"):
        old.on_delivery(bench.command(ident, id=ident))
    await asyncio.sleep(1)

    async def slow() -> None:
        await asyncio.sleep(12)

    bench.bound_yet = slow
    await bench.bind(sandbox="s9")
    bench.chat.sends.extend([FIRST, FIRST, THROTTLED])
    new.on_delivery(bench.command(THREE, sandbox="s9", id="y"))
    await asyncio.sleep(60)
    assert ("x2", "refused", "not_bound") in outcomes(bench)
    await user_writes(bench, new, sandbox="s9")
    await asyncio.sleep(60)
    assert [sent.client_id[-2:] for sent in bench.chat.sent] == ["-0", "-0", "-1", "-1", "-2"]


async def test_what_had_no_answer_is_uncertain_also_after_a_command_of_the_bot_s_next_sandbox() -> None:
    bench, old = await ready()
    new = bench.shard("s9")
    bench.chat.sends.append(TIMEOUT)
    old.on_delivery(bench.command("pay", id="c1"))
    await asyncio.sleep(0.1)
    await bench.bind(sandbox="s9")
    new.on_delivery(bench.command("hi", sandbox="s9", id="c2"))
    await asyncio.sleep(30)
    assert sorted(outcomes(bench)) == [("c1", "uncertain", ""), ("c2", "accepted", "")]


async def test_what_was_half_sent_is_told_so_where_another_replica_sent_for_the_bot_s_next_sandbox_meanwhile() -> (
    None
):
    """Its next part waited for its upload, and its trace in the record was read back only behind the other's."""
    bench, old = await ready()
    other = Bench(bench, incarnation="me-2")
    new, uploaded = other.shard("s9"), bench.cdn.hold.setdefault(USER, asyncio.Event())
    bench.chat.sends.append(FIRST)
    picture = {"kind": "file", "name": "a.txt", "data": base64.b64encode(b"see").decode()}
    old.on_delivery(bench.command(id="c1", items=[{"kind": "text", "text": "see"}, picture]))
    await asyncio.sleep(2 * GAP_S)
    await bench.bind(sandbox="s9")
    new.on_delivery(other.command("hi", sandbox="s9", id="c2"))
    await asyncio.sleep(2 * GAP_S)
    bench.contexts.forget(BOT)  # its poll has ended here
    await bench.contexts.peer(BOT, USER)
    uploaded.set()
    await asyncio.sleep(30)
    assert sorted(outcomes(bench)) == [("c1", "refused", "not_bound"), ("c2", "accepted", "")]
    (refused,) = [receipt for receipt in bench.bus.receipts() if receipt.command == "c1"]
    assert (refused.message_ids, refused.attempts) == (["m1"], 1)


@pytest.mark.parametrize(
    ("text", "answer", "outcome", "over_b2"),
    [("pay", TIMEOUT, "uncertain", []), (THREE, FIRST, "accepted", ["-1", "-2"])],
)
async def test_a_command_goes_on_over_the_next_bot_also_where_the_one_before_works_for_another_sandbox(
    text: str, answer: Any, outcome: str, over_b2: list[str]
) -> None:
    bench, old = await ready()
    new = bench.shard("s9")
    bench.chat.sends.append(answer)
    old.on_delivery(bench.command(text, id="c1"))
    await asyncio.sleep(0.1)
    await bench.bind(sandbox="s9")
    await bench.bind(bot="b2@im.bot")
    bench.hears("b2@im.bot")
    new.on_delivery(bench.command("hi", sandbox="s9", id="c2"))
    await asyncio.sleep(30)
    assert sorted(outcomes(bench)) == [("c1", outcome, ""), ("c2", "accepted", "")]
    assert [sent.client_id[-2:] for sent in bench.chat.sent if sent.bot == "b2@im.bot"] == over_b2


@pytest.mark.parametrize(
    ("hand", "told"),
    [
        ({"tried": 1}, ("uncertain", "", [])),
        ({"part": 1, "message_ids": ["m1"]}, ("refused", "not_bound", ["m1"])),
        ({"part": 2, "message_ids": ["m1", "m2"]}, ("accepted", "", ["m1", "m2"])),
        ({"tried": 1, "sandbox": "s2"}, ("refused", "not_bound", [])),
    ],
    ids=["asked for", "begun", "all taken", "of the next sandbox"],
)
@pytest.mark.parametrize("bind_next", [False, True], ids=["unbound", "replaced"])
@pytest.mark.parametrize("user", [USER, ""], ids=["of a user", "of nobody known"])
async def test_what_the_owner_before_had_in_hand_is_not_called_unsent_where_its_bot_is_gone(
    user: str, hand: dict[str, Any], told: tuple[str, str, list[str]], bind_next: bool
) -> None:
    """It died, or was stopped, with a command half sent, and the bot was unbound before anybody took over."""
    bench = Bench()
    body: dict[str, Any] = {"id": "c1", "bot": BOT, "items": [{"kind": "text", "text": text} for text in "ab"]}
    body["user"] = USER
    delivery = bench.command(suspect=True, **body)
    read = msgspec.convert(body, Outbound)
    command = read_command(read, sandbox="s1", ident="c1", time_ms=delivery.time_ms, limits=LIMITS)
    bench.hears(hand=Hand(**{"command": "c1", "client": command.client, "sandbox": "s1", "attempts": 1, **hand}))
    event = BindingEvent(sandbox="s1", bot=BOT, user=user, change="replaced" if bind_next else "unbound")
    await bench.bus.publish(Message("event", bench.names.event("s1", "binding"), b"somebody else's", {}))
    await bench.events.binding(event)
    if bind_next:
        await bench.bind(bot="b2@im.bot")
    bench.shard().on_delivery(delivery)
    await asyncio.sleep(5)
    (receipt,) = finals(bench)
    assert (receipt.outcome, receipt.reason, receipt.message_ids) == told


async def test_all_that_was_taken_is_told_as_such_where_its_time_is_up_before_it_can_be_told() -> None:
    bench, shard = await ready()
    delivery = bench.command("hi", id="c", expires_in_s=5, suspect=True)
    told, failures = bench.bus.read, [Temporary("bus_down")] * 20

    def read(stream: str, subject: str, **where: Any) -> AsyncIterator[Stored]:
        if stream.endswith("EVENT") and bench.chat.sent and failures:
            raise failures.pop()
        return told(stream, subject, **where)

    bench.bus.read = read  # type: ignore[method-assign]
    shard.on_delivery(delivery)
    await asyncio.sleep(60)
    assert [(receipt.outcome, receipt.message_ids) for receipt in finals(bench)] == [("accepted", ["m1"])]


# whom it is for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["u2@im.wechat", ""], ids=["another-user", "nobody-knows-whose"])
async def test_a_lost_login_does_not_lead_its_users_answers_to_another(user: str) -> None:
    bench, shard = await ready()
    await bench.bind(bot="b2@im.bot", user=user)
    bench.hears("b2@im.bot", "u2@im.wechat")
    await bench.bind(state="needs_login")
    shard.on_delivery(bench.command("for the first one", id="c1"))
    await asyncio.sleep(10)
    assert outcomes(bench) == [("c1", "refused", "ambiguous_bot")]
    assert bench.chat.sent == []


async def test_where_a_user_has_logged_in_anew_their_answers_go_to_the_new_bot() -> None:
    bench, shard = await ready()
    await bench.bind(bot="b2@im.bot")
    bench.hears("b2@im.bot")
    await bench.bind(state="needs_login")
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(10)
    assert [(sent.bot, sent.text) for sent in bench.chat.sent] == [("b2@im.bot", "hi")]


async def test_nothing_goes_on_over_a_bot_that_serves_another_sandbox_by_now() -> None:
    """Also what is tried again and again, as iLink cannot be reached."""
    bench, shard = await ready()
    bench.chat.sends.extend([Temporary("network")] * 3)
    shard.on_delivery(bench.command("of the first sandbox", id="c"))
    await asyncio.sleep(1)
    await bench.bind(sandbox="s2")
    await asyncio.sleep(60)
    assert outcomes(bench) == [("c", "refused", "not_bound")]
    assert len(bench.chat.sent) == 1, "the first try"


async def test_a_user_who_logs_in_anew_is_answered_by_their_own_bot() -> None:
    """Their command came while only another user's bot was bound."""
    bench, shard = await ready()
    await bench.bind(bot="b2@im.bot", user="u2@im.wechat")
    await bench.bindings.remove(BOT)
    shard.on_delivery(bench.command("hi", id="c", user=USER))
    await asyncio.sleep(5)
    await bench.bind(bot="b3@im.bot")
    shard.rebound("s1")
    await user_writes(bench, shard, bot="b3@im.bot")
    await asyncio.sleep(20)
    assert [(sent.bot, sent.user) for sent in bench.chat.sent] == [("b3@im.bot", USER)]


async def test_a_command_that_comes_as_its_lane_stores_how_far_the_last_one_got_is_sent() -> None:
    """The bot went to another sandbox, and came back while the bus was slow: the lane took itself for at work, and
    the command lay there until the next one, or the user's next word."""
    bench, shard = await ready()
    answered, stored = bench.chat.hold_sends.setdefault(USER, asyncio.Event()), asyncio.Event()
    shard.on_delivery(bench.command("one", id="one"))
    await asyncio.sleep(1)
    await bench.bind("s2")

    async def slow(_: str) -> None:
        await stored.wait()

    bench.contexts_bucket.on_write = slow
    answered.set()
    await asyncio.sleep(1)
    bench.contexts_bucket.on_write = None
    await bench.bind("s1")
    shard.on_delivery(bench.command("two", id="two"))
    await asyncio.sleep(0.5)
    stored.set()
    await asyncio.sleep(30)
    assert outcomes(bench) == [("one", "accepted", ""), ("two", "accepted", "")]
    shard.stop()
