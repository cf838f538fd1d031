"""How commands end that began elsewhere: with another replica, over another bot, or over one that moves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from adapter.contract import BindingEvent
from adapter.errors import Refused, Temporary
from adapter.names import shard_of
from adapter.outbound.shard import Shard
from adapter.ports import Accepted, Message
from tests.fakes import GAP_S, Bench
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
    ready,
    user_writes,
)

VIRTUAL_TIME = True


# what goes on elsewhere ----------------------------------------------------------------------------------


async def heir_of(bench: Bench, *, drained: Shard | None = None) -> tuple[Bench, Shard]:
    """The next owner of the shard; the one before it has died, unless it hands over."""
    if drained is not None:
        await drained.drain(20.0)
    bench.leases.owned.clear()
    heir = Bench(bench, incarnation="heir-1")
    return heir, heir.shard()


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "hands-over"])
async def test_a_part_that_ilink_has_answered_is_not_asked_for_again_after_a_restart(dies: bool) -> None:
    """Most of the time that several parts take is the pause between two of them."""
    bench, shard = await ready()
    delivery = bench.command(THREE, id="c")
    shard.on_delivery(delivery)
    await asyncio.sleep(1.0)
    assert len(bench.chat.sent) == 1
    if dies:
        shard.stop()
    heir, second = await heir_of(bench, drained=None if dies else shard)
    second.on_delivery(delivery.again())
    await asyncio.sleep(30)
    assert [sent.client_id[-2:] for sent in bench.chat.sent] == ["-0", "-1", "-2"]
    (receipt,) = finals(heir)
    assert (receipt.outcome, len(receipt.message_ids)) == ("accepted", 3)


async def test_who_takes_a_shard_over_knows_that_a_request_was_not_taken() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([Temporary("http_5xx")] * 2)
    delivery = bench.command("hi", id="c", expires_in_s=60)
    shard.on_delivery(delivery)
    await asyncio.sleep(2)
    heir, second = await heir_of(bench, drained=shard)
    await asyncio.sleep(100)
    second.on_delivery(delivery.again())
    await asyncio.sleep(5)
    assert outcomes(heir) == [("c", "refused", "expired")]


async def test_a_hand_over_stores_nothing_that_is_stored() -> None:
    """Thousands of users may be throttled, and the time to leave is short."""
    bench, shard = await ready()
    bench.chat.sends.append(THROTTLED)
    shard.on_delivery(bench.command("hi"))
    await asyncio.sleep(5)
    bench.bus.writes.clear()
    await shard.drain(20.0)
    assert bench.bus.writes == []


async def test_an_end_that_cannot_be_stored_ends_all_the_same() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([Temporary("http_5xx")] * 2)
    shard.on_delivery(bench.command("hi", id="c"))
    await asyncio.sleep(2)
    never = asyncio.Event()

    async def wait(*_: object) -> None:
        await never.wait()

    bench.contexts_bucket.on_write = wait
    with capture_logs() as logs:
        await shard.drain(20.0)
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["lane.unstored"]


async def test_the_last_id_of_the_owner_before_is_known_also_after_the_next_command() -> None:
    bench, shard = await ready()
    shard.on_delivery(bench.command("one", id="c1"))
    await asyncio.sleep(5)
    shard.stop()
    _, second = await heir_of(bench)
    for text, ident in (("two", "c2"), ("one", "c1")):
        second.on_delivery(bench.command(text, id=ident))
        await asyncio.sleep(5)
    assert bench.chat.texts == ["one", "two"]


async def test_a_last_word_goes_ahead_also_after_a_restart() -> None:
    """The record still names the command before, which was told."""
    bench, _ = await ready()
    shard = keeping_back(bench)
    for number in range(9):
        shard.on_delivery(bench.command(f"t{number}"))
    await asyncio.sleep(60)
    shard.stop()
    heir, _ = await heir_of(bench)
    second = keeping_back(heir)
    await second.load()
    second.on_delivery(bench.command("bye", final=True))
    await asyncio.sleep(10)
    assert bench.chat.texts[7:] == ["t7", "bye"]


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "lives"])
async def test_a_new_bot_of_the_user_goes_on_where_the_one_before_had_got_to(dies: bool) -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([FIRST, *[STALE] * 4])
    bench.chat.notify_fails = STALE
    shard.on_delivery(bench.command("before", id="c0"))
    await asyncio.sleep(2)
    bench.chat.sends.extendleft([FIRST])
    shard.on_delivery(bench.command(THREE, id="c"))
    await asyncio.sleep(10)
    await bench.bindings.remove(BOT)
    await bench.bind(bot="b2@im.bot")
    await asyncio.sleep(5)
    heir, second = bench, shard
    if dies:
        shard.stop()
        heir, second = await heir_of(bench)
        await second.load()
    bench.chat.sends.clear()
    await user_writes(heir, second, bot="b2@im.bot")
    await asyncio.sleep(30)
    taken = [(sent.bot[:2], sent.client_id[-2:]) for sent in bench.chat.taken.values()]
    assert taken == [("b1", "-0"), ("b1", "-0"), ("b2", "-1"), ("b2", "-2")]
    second.on_delivery(bench.command("before", id="c0"))
    await asyncio.sleep(5)
    assert bench.chat.texts.count("before") == 1


async def test_what_is_half_sent_is_not_overtaken_by_what_turns_out_to_be_for_the_same_user() -> None:
    bench = Bench()
    await bench.bind(user="")
    bench.hears()
    shard, failures = bench.shard(), [Temporary("bus_timeout")] * 5

    async def write(key: str) -> None:
        if bench.chat.sent and failures:
            raise failures.pop()

    bench.contexts_bucket.on_write = write
    shard.on_delivery(bench.command("for whom?", id="c1"))
    shard.on_delivery(bench.command(THREE, id="c2", user=USER))
    await asyncio.sleep(1)
    await bench.bind()
    shard.heard("s1", BOT, USER)
    await asyncio.sleep(30)
    assert [(one, outcome) for one, outcome, _ in outcomes(bench)[1:]] == [("c2", "accepted"), ("c1", "accepted")]


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "lives"])
@pytest.mark.parametrize(
    ("answers", "bots", "outcome"),
    [([TIMEOUT, STALE], [BOT, BOT], "uncertain"), ([STALE], [BOT, "b2@im.bot"], "accepted")],
    ids=["had no answer", "was not taken"],
)
async def test_only_what_surely_was_not_taken_goes_over_the_next_bot(
    answers: list[Any], bots: list[str], outcome: str, dies: bool
) -> None:
    """The other would be shown once more: iLink tells repeats by the client_id within a chat. What is known of it is
    stored: hours may pass until the user logs in, and the old bot's poller has ended."""
    bench, shard = await ready()
    bench.chat.sends.extend(answers)
    bench.chat.notify_fails = STALE
    shard.on_delivery(bench.command("hi", id="c"))
    await asyncio.sleep(4)
    if dies:
        shard.stop()
        bench, shard = await heir_of(bench)
        await shard.load()
    bench.contexts.forget(BOT)
    await bench.bindings.remove(BOT)
    bench.hears("b2@im.bot", inbound_id="in:2")
    await bench.bind(bot="b2@im.bot")
    shard.rebound("s1")
    await asyncio.sleep(30)
    assert [sent.bot for sent in bench.chat.sent] == bots
    assert outcomes(bench)[-1] == ("c", outcome, "")


@pytest.mark.parametrize(
    ("text", "over", "told"),
    [("pay", ["b1-0"], ("uncertain", 0)), (THREE, ["b1-0", "b2-1", "b2-2"], ("accepted", 3))],
    ids=["asked-for", "half-sent"],
)
@pytest.mark.parametrize("behind", [False, True], ids=["before-the-bind", "behind-another-after-it"])
async def test_what_the_owner_before_sent_over_the_user_s_last_bot_is_known_to_the_next_one(
    behind: bool, text: str, over: list[str], told: tuple[str, int]
) -> None:
    """It died with the command in hand, and the user has a new bot before anybody took over."""
    bench, shard = await ready()
    bench.chat.took_s = 3.0 if text == "pay" else 0.1
    delivery = bench.command(text, id="c", user=USER)
    shard.on_delivery(delivery)
    await asyncio.sleep(1.0)
    shard.stop()
    await bench.events.binding(BindingEvent(sandbox="s1", bot=BOT, user=USER, change="replaced"))
    await bench.bind(bot="b2@im.bot")
    await bench.bindings.remove(BOT)
    bench.hears("b2@im.bot", inbound_id="in:2")
    heir, second = await heir_of(bench)
    if behind:
        second.on_delivery(heir.command(typing="on", user=USER, id="t"))
        await asyncio.sleep(5)
    second.on_delivery(delivery.again())
    await asyncio.sleep(30)
    assert [sent.bot[:2] + sent.client_id[-2:] for sent in bench.chat.sent] == over
    receipt = finals(heir)[-1]
    assert (receipt.command, receipt.outcome, len(receipt.message_ids)) == ("c", *told)


@pytest.mark.parametrize("owner", ["the-same", "the-next"])
@pytest.mark.parametrize("since", ["", "sends-another-first"])
async def test_what_was_sent_over_the_user_s_last_bot_is_not_sent_again_over_the_next_one(
    owner: str, since: str
) -> None:
    """The user logged in anew, and the service publishes again what it does not remember having sent."""
    bench, shard = await ready()
    shard.on_delivery(bench.command("pay", id="c", user=USER))
    await asyncio.sleep(5)
    await bench.events.binding(BindingEvent(sandbox="s1", bot=BOT, user=USER, change="replaced"))
    await asyncio.sleep(1)
    await bench.bind(bot="b2@im.bot")
    await bench.bindings.remove(BOT)
    bench.hears("b2@im.bot", inbound_id="in:2")
    shard.stop()
    heir, second = (bench, bench.shard()) if owner == "the-same" else await heir_of(bench)
    if since:
        second.on_delivery(heir.command("hello", id="d", user=USER))
        await asyncio.sleep(5)
        third = heir.shard()
        second.stop()
        second = third
    second.on_delivery(heir.command("pay", id="c", user=USER))
    await asyncio.sleep(30)
    assert bench.chat.texts == (["pay", "hello"] if since else ["pay"])


async def test_what_was_sent_over_the_last_bot_is_known_over_one_that_was_another_sandbox_s_before() -> None:
    """Something is still parked there for the user, and is given up first."""
    bench, shard = await ready()
    shard.on_delivery(bench.command("pay", id="c", user=USER))
    await bench.bind("s2", bot="b2@im.bot")
    shard.on_delivery(bench.command("hello", sandbox="s2", user=USER))
    await asyncio.sleep(5)
    shard.stop()
    await bench.events.binding(BindingEvent(sandbox="s1", bot=BOT, user=USER, change="replaced"))
    await bench.bind(bot="b2@im.bot")
    await bench.bindings.remove(BOT)
    bench.hears("b2@im.bot", inbound_id="in:2")
    heir, second = await heir_of(bench)
    await second.load()
    await asyncio.sleep(5)
    assert outcomes(heir)[-1][1:] == ("refused", "not_bound")
    second.on_delivery(heir.command("pay", id="c", user=USER))
    await asyncio.sleep(5)
    assert bench.chat.texts == ["pay"]


@pytest.mark.parametrize("answer", [Refused("rejected", "no", ret=-3), FIRST], ids=["refused", "accepted"])
async def test_what_is_being_parked_when_its_user_becomes_known_is_sent_once_and_in_order(
    answer: Accepted | Refused,
) -> None:
    """What came for nobody known, and what came for the user, become one lane."""
    bench = Bench()
    await bench.bind(user="")
    shard, up = bench.shard(), asyncio.Event()

    async def wait(message: Message) -> None:
        if message.stream == "parked":
            await up.wait()

    bench.bus.on_publish = wait
    bench.chat.sends.append(answer)
    for number, user in enumerate((None, USER, None)):
        shard.on_delivery(bench.command(f"t{number}", id=f"c{number}", user=user))
        await asyncio.sleep(1)
    await bench.bind()
    await user_writes(bench, shard)
    await asyncio.sleep(1)
    up.set()
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t1", "t2"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1", "c2"]


# a bot that moves ----------------------------------------------------------------------------------------


async def two_owners(took_s: float = 3.0) -> tuple[Bench, Shard, Bench, Shard]:
    """Replicas that own a sandbox's shard each, and the bot of the first one's user."""
    first = Bench()
    await first.bind()
    first.hears()
    first.chat.took_s = took_s
    second = Bench(first, incarnation="me-2")
    for bench, sandbox in ((first, "s1"), (second, "s2")):
        bench.leases.owned = {shard_of(sandbox)}
    return first, first.shard("s1"), second, second.shard("s2")


async def move(bench: Bench) -> None:
    """To the second sandbox, as control does it."""
    await bench.bind(sandbox="s2")
    await bench.events.binding(BindingEvent(sandbox="s1", bot=BOT, user=USER, change="unbound", reason="moved"))


@pytest.mark.parametrize("writes", [False, True], ids=["", "and-the-user-writes"])
@pytest.mark.parametrize("wait_s", [0.5, 10.0], ids=["while-it-is-out", "after-its-answer"])
async def test_a_bot_that_moves_to_another_replica_sends_one_at_a_time(wait_s: float, *, writes: bool) -> None:
    """Its next sandbox waits until what the first one has out is answered, and not much longer."""
    first, old, second, new = await two_owners()
    old.on_delivery(first.command("hi", id="c1"))
    await asyncio.sleep(wait_s)
    await move(first)
    await asyncio.sleep(0.1)
    if writes:
        await user_writes(second, new, sandbox="s2")
    moved_at = first.clock.monotonic()
    new.on_delivery(second.command("hello", sandbox="s2", id="c2"))
    await asyncio.sleep(30)
    assert outcomes(first) == [("c1", "accepted", ""), ("c2", "accepted", "")]
    assert first.chat.overlaps == 0
    free_at = max(moved_at, first.chat.sent[0].at_s + first.chat.took_s)
    assert first.chat.sent[1].at_s - free_at < 2 * GAP_S


async def test_what_another_replica_has_sent_counts_when_the_bot_comes_back() -> None:
    """The first one has told what it knew of the window as the bot left, and knows nothing newer."""
    first, old, second, new = await two_owners(took_s=0.0)
    old.on_delivery(first.command("one", id="c0"))
    await asyncio.sleep(3)
    await move(first)
    for number in range(9):
        new.on_delivery(second.command(f"t{number}", sandbox="s2", id=f"c{number + 1}"))
    await asyncio.sleep(60)
    assert first.context().used == 10
    await first.bind(sandbox="s1")
    old.on_delivery(first.command("ten", id="c10"))
    await asyncio.sleep(30)
    assert len(first.chat.sent) == 10
    assert outcomes(first)[-1] == ("c10", "parked", "quota")
    await user_writes(first, old)
    await asyncio.sleep(30)
    assert outcomes(first)[-1] == ("c10", "accepted", "")


async def test_an_owner_who_does_not_know_yet_that_its_bot_has_moved_sends_nothing_beside_the_next_one() -> None:
    first, old, second, new = await two_owners()
    old.on_delivery(first.command("hi", id="c1"))
    await asyncio.sleep(10)
    first.bindings_bucket._followers.remove(first.bindings._see)
    await move(second)
    new.on_delivery(second.command("hello", sandbox="s2", id="c2"))
    await asyncio.sleep(17)
    assert first.chat.texts == ["hi", "hello"]
    old.on_delivery(first.command("late", id="c3"))
    await asyncio.sleep(1)
    first.bindings_bucket._followers.append(first.bindings._see)
    await move(second)
    await asyncio.sleep(30)
    assert first.chat.overlaps == 0
    assert first.chat.texts == ["hi", "hello"]
    assert outcomes(first)[-1] == ("c3", "refused", "not_bound")


@pytest.mark.parametrize(
    ("text", "outcome", "ids"), [("pay", "uncertain", 0), (THREE, "refused", 1)], ids=["asked-for", "half-sent"]
)
@pytest.mark.parametrize("dies", [True, False], ids=["dies", "drained"])
async def test_what_was_shown_before_a_bot_moved_is_told_also_where_its_owner_ends(
    dies: bool, text: str, outcome: str, ids: int
) -> None:
    """And where the bot's next sandbox has sent by then, so that the record speaks of what that sent."""
    first, old, second, new = await two_owners(took_s=0.1)
    if text == "pay":
        first.chat.sends.append(TIMEOUT)
    else:
        first.chat.sends.extend([FIRST, *[Temporary("network")] * 9])
    delivery = first.command(text, id="c1", user=USER)
    old.on_delivery(delivery)
    await asyncio.sleep(1.0 if text == "pay" else 4.0)
    if dies:
        old.stop()
        await move(first)
    else:
        first.leases.is_valid = False  # so that it cannot tell before it ends
        await move(first)
        await old.drain(20.0)
    first.chat.sends.clear()
    new.on_delivery(second.command("hello", sandbox="s2", id="c2"))
    await asyncio.sleep(30)
    assert outcomes(first) == [("c2", "accepted", "")]
    heir, third = await heir_of(first)
    third.on_delivery(delivery.again())
    await asyncio.sleep(30)
    receipt = finals(heir)[-1]
    assert (receipt.command, receipt.outcome, len(receipt.message_ids)) == ("c1", outcome, ids)
