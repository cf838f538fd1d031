"""Sending media, and texts that are merged into one message."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from adapter import window
from adapter.contract import Media, Outbound, OutImage
from adapter.errors import LeaseLost, Refused, SessionExpired, Temporary
from adapter.outbound.commands import Command, client_id, merge, read_command
from adapter.outbound.endings import Apart, Ending, Repeat, Wait
from adapter.ports import Accepted, Uploaded
from adapter.records import Merged
from tests.fakes import LIMITS, RULES, Bench, Sent
from tests.outbound.sends import BOT, PNG, TIMEOUT, USER, command, in_hand, ready, sent

VIRTUAL_TIME = True


# media ---------------------------------------------------------------------------------------------------


def picture(bench: Bench, *, ident: str = "c1", caption: str = "", **fields: Any) -> Command:
    """A command with a picture, and perhaps a caption."""
    body = Outbound(items=[OutImage(data=PNG, caption=caption)], **fields)
    return read_command(body, sandbox="s1", ident=ident, time_ms=bench.clock.now_ms(), limits=LIMITS)


async def test_media_are_brought_first_and_then_named_in_a_message() -> None:
    bench, peer = await ready()
    look = picture(bench, caption="look")
    assert await sent(bench, peer, look) == Ending("accepted", message_ids=("m1", "m2"), attempts=2, ret=0)
    caption, image = bench.chat.sent
    assert (caption.text, image.text) == ("look", "")
    assert image.media == Uploaded("image", "image.png", len(PNG), len(PNG) // 16 * 16 + 16, "ref1", b"k" * 16)
    assert [caption.client_id, image.client_id] == [client_id(look, 0), client_id(look, 1)]
    assert peer.context.used == 2


async def test_nothing_is_brought_into_a_closed_window() -> None:
    bench, peer = await ready(used=10)
    assert await sent(bench, peer, picture(bench)) == Wait("quota")
    assert bench.cdn.asked == 0


async def test_a_window_that_closes_meanwhile_keeps_the_media_for_the_next() -> None:
    bench, peer = await ready()
    bench.cdn.took_s = RULES.hours * 3600
    look = picture(bench)
    assert await sent(bench, peer, look) == Wait("window_closed")
    assert (bench.cdn.asked, bench.chat.sent) == (1, [])
    await bench.contexts.save(
        peer, lambda context: replace(context, inbound_id="in:2", inbound_ms=bench.clock.now_ms())
    )
    assert isinstance(await sent(bench, peer, look), Ending)
    assert (bench.cdn.asked, len(bench.chat.sent)) == (1, 1)


async def test_an_upload_that_outlasts_its_command_is_not_sent() -> None:
    bench, peer = await ready()
    bench.cdn.took_s = 100
    ending = await sent(bench, peer, picture(bench, expires_in_s=60.0))
    assert isinstance(ending, Ending)
    assert (ending.outcome, ending.reason) == ("refused", "expired")
    assert bench.chat.sent == []


async def test_an_upload_occupies_no_slot_of_the_sends() -> None:
    bench, peer = await ready()
    slots = asyncio.Semaphore(1)

    async def look() -> None:
        assert not slots.locked()

    bench.cdn.on_upload = look
    assert isinstance(await sent(bench, peer, picture(bench), slots=slots), Ending)
    assert bench.cdn.asked == 1


async def test_who_loses_the_shard_during_an_upload_sends_nothing() -> None:
    bench, peer = await ready()
    lost = False

    async def lose() -> None:
        nonlocal lost
        lost = True

    def check() -> None:
        if lost:
            raise LeaseLost("lease_lost")

    bench.cdn.on_upload = lose
    with pytest.raises(LeaseLost):
        await sent(bench, peer, picture(bench), check=check)
    assert (bench.cdn.asked, bench.chat.sent) == (1, [])


async def test_a_refused_upload_refuses_the_command_and_tells_what_went_before() -> None:
    bench, peer = await ready()
    bench.cdn.script.append(Refused("media", "The CDN refused: quota", ret=-7, errmsg="x"))
    ending = await sent(bench, peer, picture(bench, caption="look"))
    assert ending == Ending("refused", "media", "The CDN refused: quota", ("m1",), 1, -7, None, "x")
    assert bench.chat.texts == ["look"]


async def test_an_upload_never_counts() -> None:
    bench, peer = await ready()
    bench.cdn.script.append(Refused("media", "no"))
    await sent(bench, peer, picture(bench))
    assert peer.context.used == 0


async def test_minus_14_on_an_upload_waits_for_a_login() -> None:
    bench, peer = await ready()
    bench.cdn.script.append(SessionExpired("needs_login", "stale", errcode=-14, errmsg="session timeout"))
    bench.stale.add(BOT)
    look = picture(bench)
    assert await sent(bench, peer, look) == Wait("needs_login", "stale", 0, None, -14, "session timeout")
    assert isinstance(await sent(bench, peer, look), Ending)


async def test_minus_14_on_an_upload_while_the_session_lives_refuses_the_command() -> None:
    bench, peer = await ready()
    stale = SessionExpired("needs_login", "stale", errcode=-14, errmsg="session timeout")
    bench.cdn.script.extend([stale] * 3)
    refused = await sent(bench, peer, picture(bench))
    assert isinstance(refused, Ending)
    assert (refused.outcome, refused.reason, refused.errcode) == ("refused", "rejected", -14)
    assert bench.cdn.asked == 2
    assert isinstance(await sent(bench, peer, picture(bench, ident="c2")), Ending)
    assert (bench.cdn.asked, len(bench.chat.sent)) == (4, 1)


async def test_a_cdn_that_cannot_be_reached_is_waited_for() -> None:
    bench, peer = await ready()
    bench.cdn.script.extend([Temporary("network")] * 20)
    ending = await sent(bench, peer, picture(bench))
    assert ending == Ending("accepted", message_ids=("m1",), attempts=1, ret=0)
    assert bench.cdn.asked == 21


async def test_a_cdn_that_cannot_be_reached_is_waited_for_no_longer_than_the_command_lives() -> None:
    bench, peer = await ready()
    bench.cdn.script.extend([Temporary("network")] * 1000)
    ending = await sent(bench, peer, picture(bench, expires_in_s=100.0))
    assert isinstance(ending, Ending)
    assert (ending.outcome, ending.reason) == ("refused", "expired")
    assert bench.cdn.asked < 12


async def test_too_many_failures_of_an_upload_are_a_dead_letter() -> None:
    bench, peer = await ready()
    bench.cdn.script.extend([Temporary("http_5xx", "HTTP 500")] * 3)
    assert await sent(bench, peer, picture(bench)) == Ending("dead_lettered", "unreachable", "HTTP 500", (), 0)


async def test_a_bus_that_is_away_leaves_the_command_in_hand() -> None:
    bench, peer = await ready()
    bench.objects.away = 1
    body = Outbound(items=[OutImage(media=Media(object="s1/x"))])
    look = read_command(body, sandbox="s1", ident="c1", time_ms=bench.clock.now_ms(), limits=LIMITS)
    bench.objects.stored["s1/x"] = PNG
    with pytest.raises(Temporary):
        await sent(bench, peer, look)
    assert isinstance(await sent(bench, peer, look), Ending)


async def test_a_media_message_without_an_answer_is_repeated_as_it_was() -> None:
    bench, peer = await ready()
    bench.chat.sends.extend([TIMEOUT, Accepted("1", 0, None, "")])
    assert await sent(bench, peer, picture(bench)) == Ending("accepted", message_ids=("1",), attempts=2, ret=0)
    first, again = bench.chat.sent
    assert (first.client_id, first.media) == (again.client_id, again.media)
    assert bench.cdn.asked == 1


async def test_after_a_crash_media_are_brought_anew_under_the_same_client_id() -> None:
    bench, _ = await ready()
    look = picture(bench, caption="look")
    bench.hears(used=2, hand=in_hand(look, part=1, attempts=2, message_ids=["1"]))
    heir = Bench(bench)
    ending = await sent(heir, await heir.contexts.peer(BOT, USER), look)
    assert ending == Ending("accepted", message_ids=("1", "m1"), attempts=3, ret=0)
    assert (bench.cdn.asked, bench.chat.sent[0].client_id) == (1, client_id(look, 1))


async def test_media_that_may_have_been_sent_and_cannot_be_brought_again_are_uncertain() -> None:
    bench, _ = await ready()
    look = picture(bench)
    bench.hears(used=1, hand=in_hand(look))
    heir = Bench(bench)
    heir.cdn.script.append(Refused("media", "too old"))
    ending = await sent(heir, await heir.contexts.peer(BOT, USER), look)
    assert isinstance(ending, Ending)
    assert ending.outcome == "uncertain"


async def test_what_is_sent_is_kept_for_quotes_of_it() -> None:
    bench, peer = await ready()
    noted: list[tuple[str, ...]] = []
    await sent(bench, peer, picture(bench, caption="look"), note=lambda *words: noted.append(words))
    assert noted == [("s1", BOT, USER, "m1", "text", "look"), ("s1", BOT, USER, "m2", "image", "[image]")]


# merged texts --------------------------------------------------------------------------------------------


def merged(bench: Bench, *words: str, **fields: Any) -> Command:
    return merge([command(bench, word, ident=f"c{number}", **fields) for number, word in enumerate(words)])


async def test_merged_texts_are_one_request_and_one_send() -> None:
    bench, peer = await ready()
    assert await sent(bench, peer, merged(bench, "a", "b", "c")) == Ending(
        "accepted", message_ids=("m1",), attempts=1, ret=0
    )
    assert bench.chat.texts == ["a\n\nb\n\nc"]
    assert peer.context.used == 1


async def test_the_record_names_all_before_the_request_leaves() -> None:
    bench, peer = await ready()
    both = merged(bench, "a", "b")

    async def look(_: Sent) -> None:
        hand = bench.context().hand
        assert hand is not None
        assert [(one.command, one.client) for one in hand.all] == [
            ("c0", both.client),
            ("c1", both.merged[0].client),
        ]

    bench.chat.on_send = look
    await sent(bench, peer, both)
    assert window.settled(peer.context, both.client, sent=True).done == ["s1/c0", "s1/c1"]


async def test_merged_texts_without_an_answer_are_repeated_as_they_were() -> None:
    bench, peer = await ready()
    bench.chat.sends.append(TIMEOUT)
    both = merged(bench, "a", "b")
    await sent(bench, peer, both)
    assert [(request.text, request.client_id) for request in bench.chat.sent] == [
        ("a\n\nb", client_id(both, 0, 1))
    ] * 2


async def test_merged_texts_that_are_refused_go_apart() -> None:
    """One of them is at fault, and nobody knows which."""
    bench, peer = await ready()
    bench.chat.sends.append(Refused("rejected", "no"))
    both = merged(bench, "a", "b")
    assert await sent(bench, peer, both) == Apart()
    assert peer.context.used == 0
    alone = both._replace(parts=["a"], merged=())
    assert isinstance(await sent(bench, peer, alone), Ending)
    assert [request.client_id for request in bench.chat.sent] == [client_id(both, 0, 1), client_id(both, 0)]


async def test_merged_texts_that_are_refused_after_silence_are_uncertain_together() -> None:
    """They may have been sent: each alone would be seen twice."""
    bench, peer = await ready()
    bench.chat.sends.extend([TIMEOUT, Refused("rejected", "no")])
    ending = await sent(bench, peer, merged(bench, "a", "b"))
    assert isinstance(ending, Ending)
    assert (ending.outcome, ending.reason, ending.attempts) == ("uncertain", "", 2)


async def test_merged_texts_of_which_one_expires_while_nothing_is_taken_are_given_back() -> None:
    bench, peer = await ready()
    bench.chat.sends.extend([Temporary("network")] * 20)
    short = command(bench, "b", ident="c1", expires_in_s=10.0)
    both = merge([command(bench, "a", ident="c0"), short])
    with pytest.raises(Temporary, match="expired"):
        await sent(bench, peer, both)
    assert bench.clock.now_ms() >= short.expires_ms


async def test_what_expires_while_the_bus_hangs_is_not_sent_and_costs_no_send() -> None:
    """It was looked at before it was counted, which may take as long as the bus is away."""
    bench, peer = await ready()
    bench.contexts_bucket.on_write = hangs
    short = command(bench, "one", "two", expires_in_s=10.0)
    assert await sent(bench, peer, short) == Ending("refused", "expired", "It was not sent in time.")
    assert (bench.chat.sent, peer.context.used, peer.context.sent_ms) == ([], 0, [])
    late = command(bench, "late", ident="c2", expires_in_s=30.0)
    assert (await sent(bench, peer, late), peer.context.used) == (Ending("accepted", "", "", ("m1",), 1, 0), 1)


async def test_merged_texts_of_which_one_expires_while_the_bus_hangs_are_given_back() -> None:
    bench, peer = await ready()
    bench.contexts_bucket.on_write = hangs
    short = command(bench, "b", ident="c1", expires_in_s=10.0)
    with pytest.raises(Temporary, match="expired"):
        await sent(bench, peer, merge([command(bench, "a", ident="c0"), short]))
    assert (bench.chat.sent, peer.context.used) == ([], 0)


async def test_what_was_begun_in_time_is_sent_to_its_end() -> None:
    bench, peer = await ready()
    bench.chat.sends.append(TIMEOUT)
    asyncio.get_running_loop().call_later(0.5, setattr, bench.contexts_bucket, "on_write", hangs)
    await sent(bench, peer, command(bench, "one", "two", expires_in_s=10.0))
    assert bench.chat.texts == ["one", "one", "two"]


async def hangs(_: str) -> None:
    await asyncio.sleep(20)


async def test_what_may_have_been_sent_does_not_expire() -> None:
    bench, peer = await ready()
    bench.chat.sends.extend([TIMEOUT, *[Temporary("network")] * 20])
    short = command(bench, "b", ident="c1", expires_in_s=10.0)
    both = merge([command(bench, "a", ident="c0"), short])
    assert isinstance(await sent(bench, peer, both), Ending)
    assert len(bench.chat.sent) == 22
    assert len({request.client_id for request in bench.chat.sent}) == 1


async def test_what_may_have_been_sent_and_cannot_be_asked_again_in_time_is_uncertain() -> None:
    bench, peer = await ready()
    bench.chat.sends.extend([TIMEOUT, *[Temporary("network")] * 100])
    ending = await sent(bench, peer, command(bench, expires_in_s=10.0))
    assert isinstance(ending, Ending)
    assert ending.outcome == "uncertain"


async def test_a_merged_command_is_not_its_own_repeat_when_it_must_go_alone() -> None:
    """The first of the message expired, and what was in hand with it goes on by itself."""
    bench, _ = await ready()
    both = merged(bench, "a", "b")
    hand = in_hand(both, tried=0, merged=[Merged(command="c1", client=both.merged[0].client)])
    bench.hears(hand=hand)
    heir = Bench(bench)
    peer = await heir.contexts.peer(BOT, USER)
    assert isinstance(await sent(heir, peer, both.merged[0]), Ending)


async def test_a_second_publish_of_a_merged_command_sends_nothing() -> None:
    bench, _ = await ready()
    both = merged(bench, "a", "b")
    bench.hears(hand=in_hand(both, merged=[Merged(command="c1", client=both.merged[0].client)]))
    await bench.clock.sleep(1)
    heir = Bench(bench)
    peer = await heir.contexts.peer(BOT, USER)
    assert await sent(heir, peer, command(bench, "b", ident="c1")) == Repeat()
