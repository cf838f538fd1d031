"""Media from iLink to the bus: fetched aside, and their messages told in order, once, and in bounded time."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.contract import messages as contract
from adapter.contract.messages import FileItem, ImageItem, VideoItem, VoiceItem
from adapter.contract.names import H_REASON
from adapter.errors import BusRefused, Refused, Temporary
from adapter.kit.slots import FairSlots
from adapter.simulator import samples
from tests.fakes import EPOCH_MS, FakeChat, batch, raw_message, ready
from tests.inbound.downloads import BOT, PNG, USER, WAIT_S, heir_to, image, run, said, words
from tests.inbound.pollers import Poller, tended

VIRTUAL_TIME = True


# the way of a message ------------------------------------------------------------------------------------


async def test_a_picture_is_told_with_its_bytes_in_the_object_store(poller: Poller) -> None:
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", PNG)
    poller(bench)
    await asyncio.sleep(1)
    (told,) = bench.bus.inbound()
    (item,) = told.items
    assert isinstance(item, ImageItem)
    assert item.media is not None
    assert item.media == contract.Media(
        object=item.media.object,
        name="image.png",
        mime="image/png",
        size=len(PNG),
        sha256=hashlib.sha256(PNG).hexdigest(),
        width=64,
        height=48,
    )
    assert item.media.object.startswith("s1/in/")
    assert bench.objects.stored == {item.media.object: PNG}
    assert bench.objects.told == {item.media.object: ("image/png", "image.png")}
    assert (told.id, told.user, told.sent_at_ms, told.text) == (
        f"in:{BOT}:m7497484083968569001",
        USER,
        EPOCH_MS + 1,
        "",
    )


async def test_what_comes_before_a_picture_is_told_at_once_and_what_comes_after_it_waits(poller: Poller) -> None:
    bench = await ready(batch(words(1), image(2), words(3)), batch(words(4), cursor="c"))
    gate = asyncio.Event()
    bench.cdn.has("p2", gate, PNG)
    poller(bench)
    await asyncio.sleep(5)
    assert (said(bench), bench.chat.asked) == (["t1"], ["", "b", "c"])
    gate.set()
    await asyncio.sleep(1)
    assert said(bench) == ["t1", "+", "t3", "t4"]


async def test_token_and_window_are_there_while_the_picture_is_still_on_its_way(poller: Poller) -> None:
    """So that the agent can go on talking, and commands that are parked may go."""
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", None)
    poller(bench)
    await asyncio.sleep(2)
    assert (bench.record().token, bench.record().window.id) == ("token-1", f"in:{BOT}:m7497484083968569001")


async def test_the_window_shown_is_that_of_the_time_of_telling(poller: Poller) -> None:
    bench = await ready(batch(image(1)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    poller(bench)
    await asyncio.sleep(1)
    (processor,) = bench.processors.values()
    for text in ("one", "two"):
        processor.intake.on_delivery(bench.command(text))
    await asyncio.sleep(5)
    gate.set()
    await asyncio.sleep(1)
    (told,) = bench.bus.inbound()
    assert told.window.remaining == 8
    assert told.received_at_ms < EPOCH_MS + 900


async def test_the_name_of_an_object_is_the_same_at_every_attempt(poller: Poller) -> None:
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", PNG)
    failures = iter([Temporary("bus_timeout"), None])

    async def fails(name: str) -> None:
        if problem := next(failures):
            raise problem

    bench.objects.on_put = fails
    poller(bench)
    await asyncio.sleep(5)
    assert said(bench) == ["+"]
    assert len(bench.objects.puts) == 2
    assert len(set(bench.objects.puts)) == 1


# kinds ---------------------------------------------------------------------------------------------------


async def test_a_voice_message_is_told_as_recorded_and_as_wav(poller: Poller) -> None:
    silk = samples.silk(2.0)
    voice = {"type": 3, "voice_item": {"media": {"encrypt_query_param": "v"}, "text": "hi", "playtime": 2000}}
    bench = await ready(batch(raw_message(1, voice)))
    bench.cdn.has("v", silk)
    poller(bench)
    await asyncio.sleep(1)
    (told,) = bench.bus.inbound()
    (item,) = told.items
    assert isinstance(item, VoiceItem)
    assert item.media is not None
    assert item.wav is not None
    assert (told.text, item.transcript, item.duration_ms) == ("hi", "hi", 2000)
    assert (item.media.mime, item.media.duration_ms, item.media.name) == ("audio/silk", 2000, "voice.silk")
    assert bench.objects.stored[item.media.object] == silk
    assert item.wav.object == f"{item.media.object}.wav"
    assert bench.objects.stored[item.wav.object][:4] == b"RIFF"
    assert item.wav.size == len(bench.objects.stored[item.wav.object])
    assert item.wav.duration_ms == 2000


async def test_a_recording_that_cannot_be_converted_is_told_as_recorded(poller: Poller) -> None:
    voice = {"type": 3, "voice_item": {"media": {"encrypt_query_param": "v"}}}
    bench = await ready(batch(raw_message(1, voice)))
    bench.cdn.has("v", b"\x02#!SILK_V3" + b"\xff" * 50)
    poller(bench)
    await asyncio.sleep(1)
    (item,) = bench.bus.inbound()[0].items
    assert isinstance(item, VoiceItem)
    assert item.media is not None
    assert (item.wav, item.reason) == (None, "")


async def test_a_file_keeps_the_senders_name_and_a_video_its_length(poller: Poller) -> None:
    file = {"type": 4, "file_item": {"media": {"encrypt_query_param": "f"}, "file_name": "报告.pdf"}}
    video = {"type": 5, "video_item": {"media": {"encrypt_query_param": "v"}, "play_length": 1500}}
    bench = await ready(batch(raw_message(1, file, video)))
    bench.cdn.has("f", samples.pdf())
    bench.cdn.has("v", samples.mp4())
    poller(bench)
    await asyncio.sleep(1)
    one, two = bench.bus.inbound()[0].items
    assert isinstance(one, FileItem)
    assert isinstance(two, VideoItem)
    assert one.media is not None
    assert two.media is not None
    assert (one.name, one.media.name, one.media.mime) == ("报告.pdf", "报告.pdf", "application/pdf")
    assert (two.media.name, two.media.mime, two.media.duration_ms) == ("video.mp4", "video/mp4", 1500)
    assert one.media.object != two.media.object


async def test_an_empty_file_is_a_file(poller: Poller) -> None:
    file = {"type": 4, "file_item": {"media": {"encrypt_query_param": "f"}, "file_name": "empty"}}
    bench = await ready(batch(raw_message(1, file)))
    bench.cdn.has("f", b"")
    poller(bench)
    await asyncio.sleep(1)
    assert said(bench) == ["+"]
    assert list(bench.objects.stored.values()) == [b""]


async def test_what_can_be_had_of_a_message_is_told(poller: Poller) -> None:
    items = [{"type": 2, "image_item": {"media": {"encrypt_query_param": name}}} for name in "abc"]
    bench = await ready(batch(raw_message(1, {"type": 1, "text_item": {"text": "look"}}, *items)))
    bench.cdn.has("a", PNG)
    bench.cdn.has("b", Refused("corrupt"))
    bench.cdn.has("c", None)
    poller(bench)
    await asyncio.sleep(WAIT_S + 1)
    assert said(bench) == ["look + corrupt timeout"]


# trouble with the CDN ------------------------------------------------------------------------------------


FAILURES: list[tuple[str, Exception, str, int]] = [
    ("reference", Refused("reference"), "reference", 1),
    ("corrupt", Refused("corrupt"), "corrupt", 1),
    ("too-large", Refused("too_large"), "too_large", 1),
    ("404", Refused("unavailable", "HTTP 404"), "unavailable", 3),
    ("500", Temporary("http_5xx"), "unavailable", 3),
    ("network", Temporary("network"), "unavailable", 3),
    ("a-bug", ZeroDivisionError(), "unavailable", 3),
]


@pytest.mark.parametrize(
    ("failure", "reason", "attempts"), [row[1:] for row in FAILURES], ids=[row[0] for row in FAILURES]
)
async def test_media_that_cannot_be_had_hold_no_message_back(
    failure: Exception, reason: str, attempts: int, poller: Poller
) -> None:
    bench = await ready(batch(image(1), words(2)))
    bench.cdn.has("p1", failure)
    poller(bench)
    await asyncio.sleep(10)
    assert said(bench) == [reason, "t2"]
    assert (len(bench.cdn.fetched), bench.objects.stored) == (attempts, {})


async def test_a_download_that_fails_once_is_tried_again(poller: Poller) -> None:
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", Temporary("network"), Refused("unavailable"), PNG)
    poller(bench)
    await asyncio.sleep(10)
    assert said(bench) == ["+"]


async def test_a_silent_cdn_holds_later_words_up_for_the_wait_and_no_longer(poller: Poller) -> None:
    bench = await ready(batch(image(1), words(2)))
    bench.cdn.has("p1", None)
    poller(bench, media_wait_s=20)
    await asyncio.sleep(19)
    assert said(bench) == []
    await asyncio.sleep(2)
    assert said(bench) == ["timeout", "t2"]


async def test_many_silent_pictures_hold_later_words_up_no_longer_than_one(poller: Poller) -> None:
    bench = await ready(batch(*(image(number) for number in range(1, 10)), words(10)))
    for number in range(1, 10):
        bench.cdn.has(f"p{number}", None)
    poller(bench, media_wait_s=20)
    await asyncio.sleep(21)
    assert said(bench) == ["timeout"] * 9 + ["t10"]
    assert bench.cdn.running == 0


async def test_a_silent_download_holds_up_no_poll(poller: Poller) -> None:
    bench = await ready(batch(image(1)), None, batch(words(2), cursor="c"), batch(words(3), cursor="d"))
    bench.cdn.has("p1", None)
    poller(bench, media_wait_s=300)
    await asyncio.sleep(100)
    assert bench.chat.asked == ["", "b", "b", "c", "d"]
    assert said(bench) == []
    await asyncio.sleep(300)
    assert said(bench) == ["timeout", "t2", "t3"]


async def test_pictures_are_fetched_four_at_a_time_and_told_in_order(poller: Poller) -> None:
    bench = await ready(batch(*(image(number) for number in range(1, 10))))
    gates = [asyncio.Event() for _ in range(10)]
    for number in range(1, 10):
        bench.cdn.has(f"p{number}", gates[number], PNG)
    poller(bench)
    await asyncio.sleep(1)
    assert bench.cdn.fetched == ["p1", "p2", "p3", "p4"]
    for number in range(9, 1, -1):
        gates[number].set()
    await asyncio.sleep(1)
    assert (said(bench), len(bench.cdn.fetched), bench.cdn.limit) == ([], 9, 4)
    gates[1].set()
    await asyncio.sleep(1)
    assert said(bench) == ["+"] * 9
    ids = [inbound.id[-1] for inbound in bench.bus.inbound()]
    assert ids == list("123456789")


# trouble with the bus ------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [BusRefused(10047, "no space"), Temporary("bus_timeout")], ids=["full", "busy"])
async def test_an_object_store_that_takes_nothing_holds_no_message_back(problem: Exception, poller: Poller) -> None:
    bench = await ready(batch(image(1), words(2)))
    bench.cdn.has("p1", PNG)

    async def refuses(name: str) -> None:
        raise problem

    bench.objects.on_put = refuses
    poller(bench)
    await asyncio.sleep(10)
    assert said(bench) == ["store", "t2"]


async def test_the_time_without_a_bus_does_not_count(poller: Poller) -> None:
    """Nobody could be told meanwhile: no reason to do without the picture."""
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", PNG)

    async def away(name: str) -> None:
        await bench.bus_up.wait()

    bench.objects.on_put = away
    bench.bus_up.set()
    poller(bench, media_wait_s=20)
    await asyncio.sleep(0.051)
    bench.bus_up.clear()
    await asyncio.sleep(500)
    assert said(bench) == []
    bench.bus_up.set()
    await asyncio.sleep(1)
    assert said(bench) == ["+"]


# repeats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, {"message_id": 99}, {"context_token": "other"}, {"message_id": 99, "client_id": "x", "seq": 99}],
    ids=["same-ids", "new-message-id", "new-token", "every-id-new"],
)
async def test_a_repeat_of_a_message_that_waits_is_told_once(fields: dict[str, Any], poller: Poller) -> None:
    bench = await ready(batch(image(1)), batch(image(1, **fields), cursor="c"))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    poller(bench)
    await asyncio.sleep(1)
    assert (said(bench), bench.chat.asked) == ([], ["", "b", "c"])
    gate.set()
    await asyncio.sleep(1)
    assert said(bench) == ["+"]


# other bots, changed bindings ----------------------------------------------------------------------------


async def test_a_silent_download_holds_up_no_other_bot(poller: Poller) -> None:
    """Also where all that a sandbox may fetch at once hangs."""
    bench = await ready(batch(*(image(number) for number in range(1, 5))))
    await bench.bind("s2", "b2@im.bot", "u2@im.wechat")
    transfers = FairSlots(4, share=2)
    for number in range(1, 5):
        bench.cdn.has(f"p{number}", None)
    bench.cdn.has("p7", PNG)
    poller(bench, transfers=transfers)
    await asyncio.sleep(1)
    chat = FakeChat(bench.clock)
    chat.polls.append(batch(image(7, from_user_id="u2@im.wechat")))
    other = run(bench, bot="b2@im.bot", chat=chat, transfers=transfers)
    await asyncio.sleep(1)
    assert said(bench) == ["+"]
    assert bench.cdn.fetched == ["p1", "p2", "p7"]
    await other.leave()


OFF = contract.Options(media=False)


async def test_a_binding_that_wants_no_media_gets_its_messages_at_once(poller: Poller) -> None:
    bench = await ready(batch(image(1), words(2)), options=OFF)
    poller(bench)
    await asyncio.sleep(1)
    assert (said(bench), bench.cdn.fetched) == (["off", "t2"], [])


async def test_while_a_binding_is_closing_its_last_messages_come() -> None:
    """Also where their media come late, and the poller has to end. The inbox is emptied after that, if it is."""
    bench = await ready(batch(image(1), words(2)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    session, task = tended(bench)
    await asyncio.sleep(1)
    await bench.bindings.update(BOT, lambda now: msgspec.structs.replace(now, closing=1))
    session.stop(immediately=True)
    await asyncio.sleep(20)
    gate.set()
    await asyncio.sleep(1)
    assert said(bench) == ["+", "t2"]
    assert [inbound.sandbox for inbound in bench.bus.inbound()] == ["s1", "s1"]
    await task


@pytest.mark.parametrize("change", ["unbound", "moved"])
async def test_a_message_that_comes_after_its_bot_has_left_the_sandbox_is_a_dead_letter(change: str) -> None:
    """The inbox may be the next person's."""
    bench = await ready(batch(image(1), words(2)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    session, task = tended(bench)
    await asyncio.sleep(1)
    if change == "moved":
        await bench.bind("s2")
    else:
        await bench.bindings.remove(BOT)
        session.stop(immediately=True)
    gate.set()
    await asyncio.sleep(5)
    assert said(bench) == []
    assert [stored.headers[H_REASON] for stored in bench.bus.found("DEAD")] == ["not_bound", "not_bound"]
    session.stop(immediately=True)
    await task


async def test_a_new_login_of_the_same_person_loses_nothing_that_is_still_to_come(poller: Poller) -> None:
    bench = await ready(batch(image(1), words(2)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    session, task = tended(bench)
    await asyncio.sleep(1)
    await bench.bind(bot="b2@im.bot")
    await bench.bindings.remove(BOT)
    session.stop(immediately=True)
    await asyncio.sleep(5)
    gate.set()
    await asyncio.sleep(5)
    assert (said(bench), bench.bus.found("DEAD")) == (["+", "t2"], [])
    await task


@pytest.mark.parametrize("next_person", [None, "u2@im.wechat", ""], ids=["nobody", "known", "unknown"])
async def test_after_a_crash_and_a_move_nothing_comes_into_the_inbox_that_was_emptied(
    next_person: str | None,
) -> None:
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", None)
    replica = run(bench)
    await asyncio.sleep(1)
    await replica.die()
    heir_bench = heir_to(bench)
    await heir_bench.close()
    await heir_bench.bind("s2")
    if next_person is not None:
        await heir_bench.bind(bot="b2@im.bot", user=next_person)
    bench.cdn.has("p1", PNG)
    heir = run(heir_bench)
    await asyncio.sleep(5)
    assert (said(bench), len(bench.bus.found("DEAD"))) == ([], 1)
    await heir.leave()


async def test_media_that_are_not_wanted_any_more_are_not_fetched(poller: Poller) -> None:
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", asyncio.Event(), PNG)
    session = poller(bench)
    await asyncio.sleep(1)
    await bench.bind(options=OFF)
    bench.chat.polls.append(batch(image(2), cursor="c"))
    session.cancel_poll()
    await asyncio.sleep(WAIT_S)
    assert (said(bench), bench.cdn.fetched) == (["timeout", "off"], ["p1"])


async def test_media_get_their_time_although_the_bot_s_polls_are_refused_again_and_again(poller: Poller) -> None:
    """And not a new time with each poller: the message would be told never."""
    bench = await ready(batch(image(1), words(2)), *[Refused("url", "may not be called")] * 1000)
    bench.cdn.has("p1", None)
    poller(bench)
    await asyncio.sleep(2 * WAIT_S)
    assert said(bench) == ["timeout", "t2"]


# metrics and secrets -------------------------------------------------------------------------------------


async def test_messages_are_counted_by_what_they_are_once_they_are_told(poller: Poller) -> None:
    bench = await ready(batch(image(1), words(2)))
    bench.cdn.has("p1", None)
    poller(bench, media_wait_s=20)
    await asyncio.sleep(10)
    assert bench.metrics.value("inbound_messages_total", kind="image", outcome="published") == 0
    await asyncio.sleep(15)
    for kind in ("image", "text"):
        assert bench.metrics.value("inbound_messages_total", kind=kind, outcome="published") == 1
    assert bench.metrics.value("inbound_age_seconds_count") == 2


async def test_no_reference_key_or_text_reaches_the_log_or_the_sandbox(poller: Poller) -> None:
    secret = {"encrypt_query_param": "SECRETREF", "aes_key": "ABEiM0RVZneImaq7zN3u/w==", "full_url": "https://SECRET"}
    item = {"type": 2, "image_item": {"media": secret}}
    bench = await ready(batch(raw_message(1, {"type": 1, "text_item": {"text": "my words"}}, item)))
    bench.cdn.has("SECRETREF", Temporary("network"), ZeroDivisionError())
    with capture_logs() as logs:
        poller(bench)
        await asyncio.sleep(10)
    assert said(bench) == ["my words unavailable"]
    assert "SECRET" not in str(logs)
    assert "my words" not in str(logs)
    assert "ABEi" not in str(logs)
    assert b"SECRET" not in bench.bus.found("IN")[0].data
