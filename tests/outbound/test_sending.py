"""One command to one user, request by request: counted before it leaves, repeated under the same id or not at all."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from adapter import window
from adapter.errors import LeaseLost, Refused, SessionExpired, Temporary, Throttled, Uncertain
from adapter.outbound.commands import client_id
from adapter.outbound.endings import Ending, Repeat, Wait
from adapter.ports import Accepted, Entry
from adapter.records import Hand
from tests.fakes import RULES, Bench, Sent
from tests.outbound.sends import ACCOUNT, BOT, NO_ID, TIMEOUT, USER, command, in_hand, ready, sent

VIRTUAL_TIME = True


# endings -------------------------------------------------------------------------------------------------


async def test_an_answer_with_an_id_is_accepted() -> None:
    bench, peer = await ready()
    bench.chat.sends.append(Accepted("7497484083968569736", 0, None, ""))
    assert await sent(bench, peer) == Ending("accepted", message_ids=("7497484083968569736",), attempts=1, ret=0)
    assert (bench.chat.texts, bench.chat.sent[0].context_token) == (["hi"], "AARz")


async def test_an_answer_without_an_id_is_unconfirmed_and_never_resent() -> None:
    bench, peer = await ready()
    bench.chat.sends.append(NO_ID)
    assert await sent(bench, peer) == Ending("accepted_unconfirmed", attempts=1, ret=0)
    assert len(bench.chat.sent) == 1


async def test_an_answer_without_an_id_counts_for_servers_older_than_ids() -> None:
    bench, peer = await ready()
    bench.chat.sends.append(NO_ID)
    assert (await sent(bench, peer, empty_is_success=True)) == Ending("accepted", attempts=1, ret=0)


async def test_parts_go_one_after_another_under_ids_of_their_own() -> None:
    bench, peer = await ready()
    three = command(bench, "one", "two", "three")
    assert await sent(bench, peer, three) == Ending("accepted", message_ids=("m1", "m2", "m3"), attempts=3, ret=0)
    assert bench.chat.texts == ["one", "two", "three"]
    assert [request.client_id for request in bench.chat.sent] == [client_id(three, part) for part in range(3)]


async def test_one_part_without_an_id_makes_the_command_unconfirmed() -> None:
    bench, peer = await ready()
    bench.chat.sends.extend([Accepted("1", 0, None, ""), NO_ID, Accepted("3", 0, None, "")])
    ending = await sent(bench, peer, command(bench, "one", "two", "three"))
    assert ending == Ending("accepted_unconfirmed", message_ids=("1", "3"), attempts=3, ret=0)


async def test_a_refusal_is_final_and_carries_what_ilink_said() -> None:
    bench, peer = await ready()
    bench.chat.sends.append(Refused("invalid", "no such user", ret=-3, errcode=0, errmsg="x"))
    ending = await sent(bench, peer, command(bench, "one", "two"))
    assert ending == Ending("refused", "invalid", "no such user", (), 1, -3, 0, "x")
    assert bench.chat.texts == ["one"]


async def test_a_refused_part_tells_of_the_parts_before() -> None:
    bench, peer = await ready()
    bench.chat.sends.extend([Accepted("1", 0, None, ""), Refused("rejected", "no")])
    assert await sent(bench, peer, command(bench, "one", "two")) == Ending("refused", "rejected", "no", ("1",), 2)


# no answer -----------------------------------------------------------------------------------------------


async def test_a_request_without_an_answer_is_repeated_once_with_the_same_client_id() -> None:
    bench, peer = await ready()
    bench.chat.sends.extend([TIMEOUT, Accepted("1", 0, None, "")])
    assert await sent(bench, peer) == Ending("accepted", message_ids=("1",), attempts=2, ret=0)
    first, again = bench.chat.sent
    assert first.client_id == again.client_id


@pytest.mark.parametrize(
    "silence", [TIMEOUT, Uncertain("http_5xx", "HTTP 524 from a gateway")], ids=["none", "no-use"]
)
async def test_a_repeat_without_an_answer_of_use_is_uncertain(silence: Uncertain) -> None:
    """Also what answered was told not to have."""
    bench, peer = await ready()
    bench.chat.sends.extend([silence, silence])
    ending = await sent(bench, peer, command(bench, "one", "two"))
    assert isinstance(ending, Ending)
    assert (ending.outcome, ending.attempts) == ("uncertain", 2)
    assert ending.detail.startswith("iLink gave no answer that can be read, and is not asked again")
    assert bench.chat.texts == ["one", "one"]


async def test_a_repeat_counts_once() -> None:
    bench, peer = await ready()
    bench.chat.sends.extend([TIMEOUT, Accepted("1", 0, None, "")])
    await sent(bench, peer)
    assert peer.context.used == 1


async def test_a_repeat_that_takes_nothing_leaves_the_first_one_counted() -> None:
    """The first may have been taken, so the budget must not get it back."""
    bench, peer = await ready()
    bench.chat.sends.extend([TIMEOUT, Temporary("http_5xx"), Accepted("1", 0, None, "")])
    assert await sent(bench, peer) == Ending("accepted", message_ids=("1",), attempts=3, ret=0)
    assert peer.context.used == 1
    assert len({request.client_id for request in bench.chat.sent}) == 1


async def test_a_repeat_in_another_window_needs_a_send_of_that_one() -> None:
    """The first one may have got lost; then it is the repeat that counts, and there may be no send left for it."""
    bench, peer = await ready(used=10)
    what = command(bench)
    hand = Hand(command=what.id, client=what.client, sandbox="s1", tried=1, attempts=1, counted_in="an older message")
    peer.context = replace(peer.context, hand=hand)
    assert await sent(bench, peer, what) == Wait("quota", attempts=1)
    peer.context = replace(peer.context, hand=replace(hand, counted_in=peer.context.inbound_id))
    assert await sent(bench, peer, what) == Ending("accepted", message_ids=("m1",), attempts=2, ret=0)
    assert peer.context.used == 10


async def test_a_request_that_was_stopped_as_it_was_about_to_leave_does_not_count() -> None:
    """The lease may only have paused: what goes on then is no repeat, and its user has all sends left."""
    bench, peer = await ready()
    looks = iter([None, LeaseLost("lease_lost")])

    def check() -> None:
        if problem := next(looks, None):
            raise problem

    with pytest.raises(LeaseLost):
        await sent(bench, peer, check=check)
    assert (bench.chat.sent, peer.context.used, peer.in_flight) == ([], 0, 0)
    bench.chat.sends.extend([TIMEOUT, Accepted("1", 0, None, "")])
    assert await sent(bench, peer) == Ending("accepted", message_ids=("1",), attempts=2, ret=0)
    assert peer.context.used == 1


# nothing was taken ---------------------------------------------------------------------------------------


async def test_what_took_nothing_is_tried_again_with_backoff() -> None:
    bench, peer = await ready()
    bench.chat.sends.extend([Temporary("http_5xx"), Temporary("http_5xx")])
    assert await sent(bench, peer) == Ending("accepted", message_ids=("m3",), attempts=3, ret=0)
    at = [request.at_s - bench.chat.sent[0].at_s for request in bench.chat.sent]
    assert at == [0, 1, 3]
    assert peer.context.used == 1


async def test_ilinks_own_delay_wins_over_our_backoff() -> None:
    bench, peer = await ready()
    bench.chat.sends.append(Temporary("http_4xx", retry_after_s=30))
    await sent(bench, peer)
    first, again = bench.chat.sent
    assert again.at_s - first.at_s == 30


async def test_too_many_failures_are_a_dead_letter() -> None:
    bench, peer = await ready()
    bench.chat.sends.extend([Temporary("http_5xx", "HTTP 500")] * 3)
    assert await sent(bench, peer) == Ending("dead_lettered", "unreachable", "HTTP 500", (), 3)
    assert peer.context.used == 0


async def test_what_never_left_waits_as_long_as_it_takes() -> None:
    """A network that is down costs no attempts."""
    bench, peer = await ready()
    bench.chat.sends.extend([Temporary("network")] * 50)
    ending = await sent(bench, peer)
    assert isinstance(ending, Ending)
    assert (ending.outcome, ending.attempts) == ("accepted", 51)


async def test_what_waits_for_the_network_expires() -> None:
    bench, peer = await ready()
    bench.chat.sends.extend([Temporary("network")] * 1000)
    ending = await sent(bench, peer, command(bench, "hi", expires_in_s=100.0))
    assert isinstance(ending, Ending)
    assert (ending.outcome, ending.reason) == ("refused", "expired")
    assert len(bench.chat.sent) < 12


# -2 and -14 ----------------------------------------------------------------------------------------------


THROTTLED = Throttled("throttled", "iLink answered -2", ret=-2, errmsg="prepare failed")


async def test_minus_2_waits_for_the_user_after_one_attempt() -> None:
    bench, peer = await ready()
    bench.chat.sends.append(THROTTLED)
    wait = await sent(bench, peer)
    assert wait == Wait("throttled", "iLink answered -2", 1, -2, None, "prepare failed")
    assert len(bench.chat.sent) == 1
    assert bench.context().blocked_ms == bench.clock.now_ms()
    assert bench.context().used == 0


async def test_minus_2_in_another_window_is_the_commands_own_fault() -> None:
    """It would block its user in every window to come."""
    bench, peer = await ready()
    one = command(bench, "one", "two")
    bench.chat.sends.extend([THROTTLED, THROTTLED])
    await sent(bench, peer, one)
    await bench.contexts.save(peer, lambda context: replace(context, inbound_id="in:2", blocked_ms=0))
    ending = await sent(bench, peer, one)
    assert ending == Ending("refused", "throttled", "iLink answered -2", (), 2, -2, None, "prepare failed")


async def test_a_user_who_writes_while_minus_2_is_on_its_way_is_not_blocked() -> None:
    """It speaks of the window before: the new one is open, and its message was the last to wake the lane."""
    bench, peer = await ready()
    bench.chat.sends.append(THROTTLED)

    async def user_writes(_: Sent) -> None:
        await bench.contexts.save(
            peer, lambda context: replace(context, inbound_id="in:2", used=peer.in_flight, blocked_ms=0)
        )

    bench.chat.on_send = user_writes
    assert isinstance(await sent(bench, peer), Wait)
    assert bench.context().blocked_ms == 0


@pytest.mark.parametrize(("answers", "ago_ms"), [([], 100), ([TIMEOUT] * 2, 1100)], ids=["answered", "unanswered"])
async def test_what_was_out_as_the_user_wrote_counts_against_their_new_window(
    answers: list[Exception], ago_ms: int
) -> None:
    """iLink may have counted it after their message, which is heard only once the answer is there."""
    bench, peer = await ready()
    bench.chat.took_s = 0.2
    bench.chat.sends.extend(answers)
    await sent(bench, peer)
    now_ms, written_ms = bench.clock.now_ms(), bench.clock.now_ms() - ago_ms
    opened = window.heard(peer.context, message="in:2", token="t", now_ms=now_ms, in_flight=0, written_ms=written_ms)
    assert opened.used == 1


async def test_minus_14_waits_for_a_login() -> None:
    bench, peer = await ready()
    bench.chat.sends.append(SessionExpired("needs_login", "stale", ret=None, errcode=-14, errmsg="session timeout"))
    bench.stale.add(BOT)
    assert await sent(bench, peer) == Wait("needs_login", "stale", 1, None, -14, "session timeout")
    assert peer.context.used == 0


# the window ----------------------------------------------------------------------------------------------


async def test_parts_start_only_if_all_fit() -> None:
    bench, peer = await ready(used=8)
    assert await sent(bench, peer, command(bench, "one", "two", "three")) == Wait("quota")
    assert bench.chat.sent == []


async def test_some_sends_are_kept_back_for_the_last_word() -> None:
    bench, peer = await ready(used=7)
    rules = RULES._replace(reserve=2)
    assert isinstance(await sent(bench, peer, command(bench, ident="a"), rules=rules), Ending)
    assert await sent(bench, peer, command(bench, ident="b"), rules=rules) == Wait("quota")
    assert await sent(bench, peer, command(bench, "x", "y", "z", ident="c", final=True), rules=rules) == Wait("quota")
    assert isinstance(await sent(bench, peer, command(bench, "x", "y", ident="d", final=True), rules=rules), Ending)
    assert bench.chat.texts == ["hi", "x", "y"]


# the last send of a window -------------------------------------------------------------------------------

MORE = "Reply to continue."


async def test_the_text_that_takes_the_last_send_says_how_to_go_on() -> None:
    bench, peer = await ready(used=7)
    await sent(bench, peer, command(bench, "a", "b", "c"), continue_text=MORE)
    assert bench.chat.texts == ["a", "b", "c\n\nReply to continue."]


async def test_nothing_is_appended_where_nothing_is_counted() -> None:
    bench, peer = await ready(used=100)
    await sent(bench, peer, continue_text=MORE, rules=RULES._replace(sends=0))
    assert bench.chat.texts == ["hi"]


@pytest.mark.parametrize(
    ("text", "chars", "fits"),
    [("x" * 80, 100, True), ("x" * 81, 100, False), ("字" * 5454, 16384, True), ("字" * 5455, 16384, False)],
    ids=["just", "too-many-characters", "just-by-bytes", "too-many-bytes"],
)
async def test_nothing_is_appended_where_it_does_not_fit(text: str, chars: int, fits: bool) -> None:
    bench, peer = await ready(used=9)
    body = command(bench)._replace(parts=[text])
    await sent(bench, peer, body, continue_text=MORE, text_chars=chars)
    assert bench.chat.texts == [text + "\n\nReply to continue." * fits if fits else text]


async def test_a_repeat_says_the_same() -> None:
    """Under the same client_id, whatever the window has become; and the next part is another matter."""
    bench, peer = await ready(used=8)
    bench.chat.sends.extend([Accepted("m1", 0, None, ""), TIMEOUT])

    async def write_again(what: Sent) -> None:
        if len(bench.chat.sent) == 2:
            now_ms = bench.clock.now_ms()
            await bench.contexts.save(
                peer, lambda context: window.heard(context, message="in:2", token="t", now_ms=now_ms, in_flight=1)
            )

    bench.chat.on_send = write_again
    await sent(bench, peer, command(bench, "a", "b"), continue_text=MORE)
    assert bench.chat.texts == ["a", "b\n\nReply to continue.", "b\n\nReply to continue."]
    assert bench.chat.sent[1].client_id == bench.chat.sent[2].client_id
    await sent(bench, peer, command(bench, "c", ident="c2"), continue_text=MORE)
    assert bench.chat.texts[3:] == ["c"]


@pytest.mark.parametrize(("tail", "text"), [("\n\nGo on?", "hi\n\nGo on?"), ("", "hi"), (None, "hi")])
async def test_after_a_crash_a_repeat_says_the_same(tail: str | None, text: str) -> None:
    bench, _ = await ready()
    one = command(bench)
    bench.hears(used=10, hand=in_hand(one, tail=tail))
    peer = await Bench(bench).contexts.peer(BOT, USER)
    await sent(bench, peer, one, continue_text=MORE)
    assert bench.chat.texts == [text]


async def test_who_watches_the_window_is_asked_to_look_once_it_is_known_what_counts() -> None:
    bench, peer = await ready()
    seen: list[int] = []
    bench.look = lambda peer: seen.append(peer.context.used)
    bench.chat.sends.extend([Accepted("m1", 0, None, ""), Temporary("http_5xx"), TIMEOUT, TIMEOUT])
    await sent(bench, peer, command(bench, "a", "b"))
    assert seen == [1, 1, 2]


# counted -------------------------------------------------------------------------------------------------


async def test_a_send_is_counted_before_it_leaves() -> None:
    """So that a crash errs on the safe side."""
    bench, peer = await ready()

    async def look(_: Sent) -> None:
        assert bench.context().used == 1
        hand = bench.context().hand
        assert hand is not None
        assert (hand.command, hand.part, hand.tried) == ("c1", 0, 1)

    bench.chat.on_send = look
    await sent(bench, peer)


# crashes, repeats and owners -----------------------------------------------------------------------------


async def test_after_a_crash_the_next_owner_resumes_at_the_part() -> None:
    bench, _ = await ready()
    three = command(bench, "one", "two", "three")
    bench.hears(used=2, hand=in_hand(three, part=1, attempts=2, message_ids=["1"]))
    peer = await Bench(bench).contexts.peer(BOT, USER)
    ending = await sent(bench, peer, three)
    assert bench.chat.texts == ["two", "three"]
    assert bench.chat.sent[0].client_id == client_id(three, 1)
    assert ending == Ending("accepted", message_ids=("1", "m1", "m2"), attempts=4, ret=0)
    assert peer.context.used == 3


async def test_after_a_crash_the_request_that_was_out_is_repeated_once() -> None:
    bench, _ = await ready()
    one = command(bench)
    bench.hears(used=1, hand=in_hand(one))
    bench.chat.sends.append(TIMEOUT)
    peer = await Bench(bench).contexts.peer(BOT, USER)
    ending = await sent(bench, peer, one)
    assert isinstance(ending, Ending)
    assert ending.outcome == "uncertain"
    assert len(bench.chat.sent) == 1


@pytest.mark.parametrize("where", ["done", "hand"])
async def test_an_id_that_was_sent_before_sends_nothing(where: str) -> None:
    """A second publish with the same id: its first receipt is the receipt."""
    bench, _ = await ready()
    earlier = command(bench)
    bench.hears(**({"done": ["s1/c1"]} if where == "done" else {"hand": in_hand(earlier)}))
    await bench.clock.sleep(1)
    peer = await Bench(bench).contexts.peer(BOT, USER)
    assert await sent(bench, peer, command(bench)) == Repeat()
    assert bench.chat.sent == []


async def test_who_lost_the_shard_sends_nothing() -> None:
    bench, peer = await ready()

    def check() -> None:
        raise LeaseLost("lease_lost")

    with pytest.raises(LeaseLost):
        await sent(bench, peer, check=check)
    assert bench.chat.sent == []


async def test_who_loses_the_shard_while_counting_sends_nothing() -> None:
    bench, peer = await ready()
    lost = False

    def check() -> None:
        if lost:
            raise LeaseLost("lease_lost")

    async def lose(_: str) -> None:
        nonlocal lost
        lost = True

    bench.contexts_bucket.on_write = lose
    with pytest.raises(LeaseLost):
        await sent(bench, peer, check=check)
    assert bench.chat.sent == []


async def test_a_zombie_is_stopped_by_the_record() -> None:
    """Another replica wrote since: the compare-and-set refuses, and the fence says why."""
    bench, peer = await ready()
    bench.hears(used=3)
    bench.leases.owned.clear()
    with pytest.raises(LeaseLost):
        await sent(bench, peer)
    assert bench.chat.sent == []


async def test_a_record_changed_by_an_operator_counts_and_the_send_goes_on() -> None:
    bench, peer = await ready()
    bench.hears(used=5, token="other")
    assert isinstance(await sent(bench, peer), Ending)
    assert bench.context().used == 6
    assert bench.chat.sent[0].context_token == "other"


@pytest.mark.parametrize(("used", "reason"), [(10, "quota"), (8, "quota"), (1, "throttled")])
async def test_a_window_that_another_replica_has_used_up_is_not_overdrawn(used: int, reason: str) -> None:
    """The bot served another sandbox in between, and what is known here is older than that."""
    bench, peer = await ready()
    bench.hears(used=used, blocked_ms=bench.clock.now_ms() if reason == "throttled" else 0)
    three = command(bench, "one", "two", "three")
    with pytest.raises(Temporary, match="window_changed"):
        await sent(bench, peer, three)
    assert await sent(bench, peer, three) == Wait(reason)
    assert bench.chat.sent == []
    assert bench.context().used == used


async def test_an_answer_that_comes_while_the_users_next_word_is_stored_is_not_forgotten() -> None:
    bench, peer = await ready()
    stored = asyncio.Event()

    async def slow(_: str) -> None:
        if bench.chat.sent:
            stored.set()
            await asyncio.sleep(5)

    bench.contexts_bucket.on_write = slow
    bench.chat.took_s = 2.0
    sending = asyncio.create_task(sent(bench, peer))
    await asyncio.sleep(1)
    await bench.wrote(BOT, USER, "in:2")
    assert stored.is_set()
    assert isinstance(await sending, Ending)
    hand = peer.context.hand
    assert hand is not None
    assert (peer.context.inbound_id, peer.context.used, hand.part, hand.tried) == ("in:2", 1, 1, 0)


async def test_an_answer_that_comes_while_the_record_is_read_anew_is_not_forgotten() -> None:
    """As it is when a bot begins to be polled here."""
    bench, peer = await ready()
    bucket = bench.contexts_bucket
    read = bucket.get

    async def slow(key: str) -> Entry | None:
        found = await read(key)
        await asyncio.sleep(5)
        return found

    bench.chat.took_s = 2.0
    sending = asyncio.create_task(sent(bench, peer))
    await asyncio.sleep(1)
    bucket.get = slow  # type: ignore[method-assign]
    await bench.contexts.refresh(BOT)
    assert isinstance(await sending, Ending)
    hand = peer.context.hand
    assert hand is not None
    assert (hand.part, hand.tried) == (1, 0)


async def test_one_that_was_cut_off_as_it_read_the_record_anew_writes_nothing() -> None:
    """What it asked is answered late, with what the bot's next owner has written."""
    bench, peer = await ready()
    bench.hears(used=3)
    bucket, looks = bench.contexts_bucket, 0
    read = bucket.get

    async def cut_off(key: str) -> Entry | None:
        nonlocal looks
        looks += 1
        if looks == 2:  # at the first the bucket asks whether it was its own write
            bench.leases.owned.clear()
            bench.hears(used=5)
        return await read(key)

    bucket.get = cut_off  # type: ignore[method-assign]
    with pytest.raises(LeaseLost):
        await sent(bench, peer)
    assert (bench.context().used, bench.chat.sent) == (5, [])


@pytest.mark.parametrize("answer", [SessionExpired("needs_login", "-14", errcode=-14), THROTTLED], ids=["-14", "-2"])
async def test_an_answer_that_cannot_be_stored_is_known_all_the_same(answer: Refused) -> None:
    """The bot's next owner has written. Nothing was taken: that is no uncertain ending."""
    bench, peer = await ready()

    async def move(_: Sent) -> None:
        bench.hears(used=3)
        bench.leases.owned.clear()

    bench.chat.on_send = move
    bench.chat.sends.append(answer)
    with pytest.raises(LeaseLost):
        await sent(bench, peer)
    assert peer.context.hand is not None
    assert (peer.context.hand.tried, peer.context.used) == (0, 0)


async def test_a_request_that_is_out_counts_though_its_bot_moves_meanwhile() -> None:
    """The poller of the sandbox before has ended, and that of the next one, here as well, hears the user."""
    bench, peer = await ready()
    bench.chat.took_s = 5.0
    sending = asyncio.create_task(sent(bench, peer))
    await asyncio.sleep(1)
    bench.contexts.forget(BOT)
    await bench.wrote(BOT, USER, "in:2")
    assert bench.context().used == 1
    await sending
    bench.contexts.forget(BOT)
    assert await bench.contexts.peer(BOT, USER) is not peer


async def test_a_second_publish_of_what_another_replica_has_sent_is_known_though_a_request_was_out_here() -> None:
    """The shard was lost and is ours again, and the one that is out belongs to the time before."""
    bench, peer = await ready()
    bench.chat.took_s = 5.0
    sending = asyncio.create_task(sent(bench, peer))
    await asyncio.sleep(1)
    bench.hears(used=3, done=["s1/c2"])
    bench.contexts.forget(BOT)
    assert await bench.contexts.peer(BOT, USER) is peer
    await sending
    assert await sent(bench, peer, command(bench, ident="c2")) == Repeat()
    assert len(bench.chat.sent) == 1


async def test_a_record_that_was_purged_is_written_anew() -> None:
    bench, peer = await ready()
    bench.contexts_bucket.entries.clear()
    assert isinstance(await sent(bench, peer), Ending)
    assert bench.context().used == 1


async def test_a_peer_is_loaded_once() -> None:
    bench, peer = await ready()
    assert await bench.contexts.peer(BOT, USER) is peer
    bench.contexts.forget(BOT)
    assert await bench.contexts.peer(BOT, USER) is not peer


async def test_neither_account_nor_record_shows_its_token() -> None:
    bench, peer = await ready(token="AARzSECRET")
    assert "secret" not in repr(ACCOUNT)
    assert "SECRET" not in repr(peer.context)
    assert "SECRET" not in repr(bench.context())
