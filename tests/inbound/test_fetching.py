"""Media from iLink to the bus: stored raw, fetched aside, told in order, each message once and in bounded time."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from structlog.testing import capture_logs

from adapter import contract
from adapter.contract import FileItem, ImageItem, VideoItem, VoiceItem
from adapter.errors import BusRefused, LeaseLost, Refused, Temporary
from adapter.names import H_MSG_ID, H_SANDBOX, H_TIME_MS, shard_of
from adapter.ports import Message
from adapter.simulator import samples
from adapter.slots import FairSlots
from tests.fakes import EPOCH_MS, batch, raw_message, ready
from tests.inbound.downloads import (
    BOT,
    PNG,
    USER,
    WAIT_S,
    heir_of,
    image,
    run,
    said,
    waiting,
    words,
)

VIRTUAL_TIME = True


# the way of a message ------------------------------------------------------------------------------------


async def test_a_picture_is_told_with_its_bytes_in_the_object_store() -> None:
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", PNG)
    replica = await run(bench)
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
    assert waiting(bench) == 0
    await replica.leave()


async def test_the_raw_message_is_stored_before_the_cursor_and_gone_after_it_is_told() -> None:
    bench = await ready(batch(image(1)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    replica = await run(bench)
    await asyncio.sleep(1)
    assert bench.bus.writes[-3:] == ["conversation", "raw", "cursor"]
    assert (said(bench), waiting(bench), bench.chat.asked) == ([], 1, ["", "b"])
    gate.set()
    await asyncio.sleep(1)
    assert bench.bus.writes[-2:] == ["object", "in"]
    assert (said(bench), waiting(bench)) == (["+"], 0)
    await replica.leave()


async def test_messages_without_media_wait_for_nothing_and_cost_no_more_than_before() -> None:
    bench = await ready(batch(words(1), words(2)))
    replica = await run(bench)
    await asyncio.sleep(1)
    assert bench.bus.writes[-4:] == ["conversation", "in", "in", "cursor"]
    assert "raw" not in bench.bus.writes
    await replica.leave()


async def test_what_comes_before_a_picture_is_told_at_once_and_what_comes_after_it_waits() -> None:
    bench = await ready(batch(words(1), image(2), words(3)), batch(words(4), cursor="c"))
    gate = asyncio.Event()
    bench.cdn.has("p2", gate, PNG)
    replica = await run(bench)
    await asyncio.sleep(5)
    assert (said(bench), waiting(bench), bench.chat.asked) == (["t1"], 3, ["", "b", "c"])
    gate.set()
    await asyncio.sleep(1)
    assert said(bench) == ["t1", "+", "t3", "t4"]
    await replica.leave()


async def test_once_nothing_waits_messages_go_the_short_way_again() -> None:
    bench = await ready(batch(image(1)), None, batch(words(2), cursor="c"))
    bench.cdn.has("p1", PNG)
    replica = await run(bench)
    await asyncio.sleep(100)
    assert said(bench) == ["+", "t2"]
    assert bench.bus.writes.count("raw") == 1
    await replica.leave()


async def test_token_and_window_are_there_while_the_picture_is_still_on_its_way() -> None:
    """So that the agent can go on talking, and commands that are parked may go."""
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", None)
    replica = await run(bench)
    await asyncio.sleep(1)
    assert (bench.record().token, bench.record().window.id) == ("token-1", f"in:{BOT}:m7497484083968569001")
    await replica.leave()


async def test_the_window_shown_is_that_of_the_time_of_telling() -> None:
    bench = await ready(batch(image(1)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    replica = await run(bench)
    await asyncio.sleep(1)
    bench.hears(sends_used=4)
    gate.set()
    await asyncio.sleep(1)
    (told,) = bench.bus.inbound()
    assert told.window.remaining == 6
    assert told.received_at_ms < EPOCH_MS + 900
    await replica.leave()


async def test_the_same_words_without_ids_and_times_wait_behind_a_picture_as_often_as_they_were_said() -> None:
    """Also where another replica tells them."""
    nothing = {"message_id": None, "client_id": None, "seq": None, "create_time_ms": None}
    bench = await ready(batch(image(1), words(2, **nothing), words(2, **nothing)))
    bench.cdn.has("p1", None)
    replica = await run(bench)
    await asyncio.sleep(1)
    assert waiting(bench) == 3
    await replica.die()
    bench.cdn.has("p1", PNG)
    heir = await heir_of(bench)
    await asyncio.sleep(1)
    assert said(bench) == ["+", "t2", "t2"]
    await heir.leave()


async def test_the_name_of_an_object_is_the_same_at_every_attempt() -> None:
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", PNG)
    failures = iter([Temporary("bus_timeout"), None])

    async def fails(name: str) -> None:
        if problem := next(failures):
            raise problem

    bench.objects.on_put = fails
    replica = await run(bench)
    await asyncio.sleep(5)
    assert said(bench) == ["+"]
    assert len(bench.objects.puts) == 2
    assert len(set(bench.objects.puts)) == 1
    await replica.leave()


# kinds ---------------------------------------------------------------------------------------------------


async def test_a_voice_message_is_told_as_recorded_and_as_wav() -> None:
    silk = samples.silk(2.0)
    voice = {"type": 3, "voice_item": {"media": {"encrypt_query_param": "v"}, "text": "hi", "playtime": 2000}}
    bench = await ready(batch(raw_message(1, voice)))
    bench.cdn.has("v", silk)
    replica = await run(bench)
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
    await replica.leave()


async def test_a_recording_that_cannot_be_converted_is_told_as_recorded() -> None:
    voice = {"type": 3, "voice_item": {"media": {"encrypt_query_param": "v"}}}
    bench = await ready(batch(raw_message(1, voice)))
    bench.cdn.has("v", b"\x02#!SILK_V3" + b"\xff" * 50)
    replica = await run(bench)
    await asyncio.sleep(1)
    (item,) = bench.bus.inbound()[0].items
    assert isinstance(item, VoiceItem)
    assert item.media is not None
    assert (item.wav, item.reason) == (None, "")
    await replica.leave()


async def test_a_file_keeps_the_senders_name_and_a_video_its_length() -> None:
    file = {"type": 4, "file_item": {"media": {"encrypt_query_param": "f"}, "file_name": "报告.pdf"}}
    video = {"type": 5, "video_item": {"media": {"encrypt_query_param": "v"}, "play_length": 1500}}
    bench = await ready(batch(raw_message(1, file, video)))
    bench.cdn.has("f", samples.pdf())
    bench.cdn.has("v", samples.mp4())
    replica = await run(bench)
    await asyncio.sleep(1)
    one, two = bench.bus.inbound()[0].items
    assert isinstance(one, FileItem)
    assert isinstance(two, VideoItem)
    assert one.media is not None
    assert two.media is not None
    assert (one.name, one.media.name, one.media.mime) == ("报告.pdf", "报告.pdf", "application/pdf")
    assert (two.media.name, two.media.mime, two.media.duration_ms) == ("video.mp4", "video/mp4", 1500)
    assert one.media.object != two.media.object
    await replica.leave()


async def test_an_empty_file_is_a_file() -> None:
    file = {"type": 4, "file_item": {"media": {"encrypt_query_param": "f"}, "file_name": "empty"}}
    bench = await ready(batch(raw_message(1, file)))
    bench.cdn.has("f", b"")
    replica = await run(bench)
    await asyncio.sleep(1)
    assert said(bench) == ["+"]
    assert list(bench.objects.stored.values()) == [b""]
    await replica.leave()


async def test_what_can_be_had_of_a_message_is_told() -> None:
    items = [{"type": 2, "image_item": {"media": {"encrypt_query_param": name}}} for name in "abc"]
    bench = await ready(batch(raw_message(1, {"type": 1, "text_item": {"text": "look"}}, *items)))
    bench.cdn.has("a", PNG)
    bench.cdn.has("b", Refused("corrupt"))
    bench.cdn.has("c", None)
    replica = await run(bench)
    await asyncio.sleep(WAIT_S + 1)
    assert said(bench) == ["look + corrupt timeout"]
    await replica.leave()


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
async def test_media_that_cannot_be_had_hold_no_message_back(failure: Exception, reason: str, attempts: int) -> None:
    """F25."""
    bench = await ready(batch(image(1), words(2)))
    bench.cdn.has("p1", failure)
    replica = await run(bench)
    await asyncio.sleep(10)
    assert said(bench) == [reason, "t2"]
    assert (len(bench.cdn.fetched), waiting(bench), bench.objects.stored) == (attempts, 0, {})
    await replica.leave()


async def test_a_download_that_fails_once_is_tried_again() -> None:
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", Temporary("network"), Refused("unavailable"), PNG)
    replica = await run(bench)
    await asyncio.sleep(10)
    assert said(bench) == ["+"]
    await replica.leave()


async def test_a_silent_cdn_holds_later_words_up_for_the_wait_and_no_longer() -> None:
    """F5."""
    bench = await ready(batch(image(1), words(2)))
    bench.cdn.has("p1", None)
    replica = await run(bench, wait_s=20)
    await asyncio.sleep(19)
    assert said(bench) == []
    await asyncio.sleep(2)
    assert said(bench) == ["timeout", "t2"]
    await replica.leave()


async def test_many_silent_pictures_hold_later_words_up_no_longer_than_one() -> None:
    bench = await ready(batch(*(image(number) for number in range(1, 10)), words(10)))
    for number in range(1, 10):
        bench.cdn.has(f"p{number}", None)
    replica = await run(bench, wait_s=20)
    await asyncio.sleep(21)
    assert said(bench) == ["timeout"] * 9 + ["t10"]
    assert bench.cdn.running == 0
    await replica.leave()


async def test_a_silent_download_holds_up_no_poll() -> None:
    bench = await ready(batch(image(1)), None, batch(words(2), cursor="c"), batch(words(3), cursor="d"))
    bench.cdn.has("p1", None)
    replica = await run(bench, wait_s=300)
    await asyncio.sleep(100)
    assert bench.chat.asked == ["", "b", "b", "c", "d"]
    assert (said(bench), waiting(bench)) == ([], 3)
    await asyncio.sleep(300)
    assert said(bench) == ["timeout", "t2", "t3"]
    await replica.leave()


async def test_a_silent_download_holds_up_no_other_bot() -> None:
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", None)
    replica = await run(bench)
    await asyncio.sleep(1)
    await bench.bind("s1", "b2@im.bot", "u2@im.wechat")
    subject = bench.names.raw(shard_of("s1"), "b2@im.bot")
    headers = {H_SANDBOX: "s1", H_TIME_MS: "5"}
    bench.bus.put(subject, words(7, from_user_id="u2@im.wechat"), headers)
    await replica.downloads._sweep()
    await asyncio.sleep(1)
    assert said(bench) == ["t7"]
    await replica.leave()


async def test_a_sandbox_whose_downloads_hang_holds_up_no_other() -> None:
    """Four pictures of one bot wait for a silent CDN: others are still fetched."""
    other = next(name for number in range(10_000) if shard_of(name := f"o{number}") == shard_of("s1"))
    bench = await ready(batch(*(image(number) for number in range(1, 5))))
    bench.transfers = FairSlots(4, share=2)
    for number in range(1, 5):
        bench.cdn.has(f"p{number}", None)
    bench.cdn.has("p7", PNG)
    replica = await run(bench)
    await asyncio.sleep(1)
    await bench.bind(other, "b2@im.bot", "u2@im.wechat")
    subject = bench.names.raw(shard_of(other), "b2@im.bot")
    bench.bus.put(subject, image(7, from_user_id="u2@im.wechat"), {H_SANDBOX: other, H_TIME_MS: "5"})
    await replica.downloads._sweep()
    await asyncio.sleep(1)
    assert said(bench) == ["+"]
    assert bench.cdn.fetched == ["p1", "p2", "p7"]
    await replica.leave()


async def test_pictures_are_fetched_four_at_a_time_and_told_in_order() -> None:
    bench = await ready(batch(*(image(number) for number in range(1, 10))))
    gates = [asyncio.Event() for _ in range(10)]
    for number in range(1, 10):
        bench.cdn.has(f"p{number}", gates[number], PNG)
    replica = await run(bench)
    await asyncio.sleep(1)
    assert bench.cdn.fetched == ["p1", "p2", "p3", "p4"]
    for number in range(9, 1, -1):
        gates[number].set()
    await asyncio.sleep(1)
    assert (said(bench), len(bench.cdn.fetched), bench.cdn.most) == ([], 9, 4)
    gates[1].set()
    await asyncio.sleep(1)
    assert said(bench) == ["+"] * 9
    ids = [inbound.id[-1] for inbound in bench.bus.inbound()]
    assert ids == list("123456789")
    await replica.leave()


# trouble with the bus ------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [BusRefused(10047, "no space"), Temporary("bus_timeout")], ids=["full", "busy"])
async def test_an_object_store_that_takes_nothing_holds_no_message_back(problem: Exception) -> None:
    bench = await ready(batch(image(1), words(2)))
    bench.cdn.has("p1", PNG)

    async def refuses(name: str) -> None:
        raise problem

    bench.objects.on_put = refuses
    replica = await run(bench)
    await asyncio.sleep(10)
    assert said(bench) == ["store", "t2"]
    await replica.leave()


async def test_the_time_without_a_bus_does_not_count() -> None:
    """Nobody could be told meanwhile: no reason to do without the picture."""
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", PNG)

    async def away(name: str) -> None:
        await bench.bus_up.wait()

    bench.objects.on_put = away
    bench.bus_up.set()
    replica = await run(bench, wait_s=20)
    await asyncio.sleep(0.051)
    bench.bus_up.clear()
    await asyncio.sleep(500)
    assert said(bench) == []
    bench.bus_up.set()
    await asyncio.sleep(1)
    assert said(bench) == ["+"]
    await replica.leave()


async def test_a_raw_message_that_the_bus_refuses_is_told_without_its_media_and_in_order() -> None:
    bench = await ready(batch(image(1), image(2), words(3)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    bench.cdn.has("p2", PNG)
    bench.bus.refuse = lambda message: (
        BusRefused(10047, "no space") if message.stream == "raw" and b'"p2"' in message.payload else None
    )
    replica = await run(bench)
    await asyncio.sleep(5)
    assert (said(bench), bench.chat.asked) == ([], [""])
    gate.set()
    await asyncio.sleep(1)
    assert said(bench) == ["+", "store", "t3"]
    assert bench.chat.asked == ["", "b"]
    await replica.leave()


async def test_a_message_that_the_inbox_refuses_is_told_without_its_content() -> None:
    bench = await ready(batch(image(1), words(2)))
    bench.cdn.has("p1", PNG)
    bench.bus.refuse = lambda message: (
        BusRefused(10054, "too large") if message.stream == "in" and b'"media"' in message.payload else None
    )
    replica = await run(bench)
    await asyncio.sleep(5)
    first, second = bench.bus.inbound()
    assert first.items == [contract.UnsupportedItem(type=0, reason="too_large")]
    assert second.text == "t2"
    assert len(bench.bus.found("DEAD")) == 1
    await replica.leave()


async def test_a_lease_that_pauses_tells_nothing_and_one_that_resumes_goes_on() -> None:
    bench = await ready(batch(image(1), words(2)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    replica = await run(bench)
    await asyncio.sleep(1)
    bench.leases.is_valid = False
    gate.set()
    await asyncio.sleep(20)
    assert said(bench) == []
    bench.leases.is_valid = True
    bench.leases.changed.notify()
    await asyncio.sleep(2)
    assert said(bench) == ["+", "t2"]
    await replica.leave()


async def test_what_is_being_told_when_the_shard_is_lost_is_refused_and_looked_for_before_it_is_told_again() -> None:
    """The owner of now may have told it, and the stream may have forgotten its id."""
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", PNG)

    async def cut_off(message: Message) -> None:
        if message.stream == "in":
            bench.leases.is_valid = False

    bench.bus.on_publish = cut_off
    replica = await run(bench)
    await asyncio.sleep(20)
    assert said(bench) == []
    bench.bus.on_publish, bench.leases.is_valid = None, True
    (stored,) = bench.bus.found("RAW")
    bench.bus.put(bench.names.inbox("s1"), b'{"id":"told"}', {H_MSG_ID: stored.headers[H_MSG_ID]})
    bench.bus.forget_ids()
    bench.leases.changed.notify()
    await asyncio.sleep(20)
    assert len(bench.bus.found("IN")) == 1
    assert waiting(bench) == 0
    await replica.leave()


async def test_a_shard_that_is_lost_while_the_lease_holds_holds_up_nobody() -> None:
    """Until the supervisor stops its downloads, for which it needs the event loop."""
    bench = await ready(batch(image(1)))
    bench.cdn.has("p1", asyncio.Event(), PNG)
    replica = await run(bench)
    await asyncio.sleep(1)
    assert waiting(bench) == 1
    await replica.leave()
    looks = 0

    def check(shard: int) -> None:
        nonlocal looks
        looks += 1
        raise LeaseLost("lease_lost") if looks < 1000 else AssertionError("nobody else gets a turn")

    bench.leases.owned.clear()
    bench.leases.check = check  # type: ignore[method-assign]
    downloads = await bench.downloads(wait_s=WAIT_S)
    await asyncio.sleep(30)
    assert 0 < looks < 100
    downloads.stop()


# repeats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, {"message_id": 99}, {"context_token": "other"}, {"message_id": 99, "client_id": "x", "seq": 99}],
    ids=["same-ids", "new-message-id", "new-token", "every-id-new"],
)
async def test_a_repeat_of_a_message_that_waits_is_told_once(fields: dict[str, Any]) -> None:
    """F16."""
    bench = await ready(batch(image(1)), batch(image(1, **fields), cursor="c"))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    replica = await run(bench)
    await asyncio.sleep(1)
    assert (waiting(bench), bench.chat.asked) == (1, ["", "b", "c"])
    gate.set()
    await asyncio.sleep(1)
    assert said(bench) == ["+"]
    await replica.leave()


# leaving -------------------------------------------------------------------------------------------------


async def test_draining_tells_what_is_quick_and_leaves_the_rest_in_the_stream() -> None:
    bench = await ready(batch(image(1), words(2), image(3), words(4)))
    bench.cdn.has("p1", PNG)
    bench.cdn.has("p3", None)
    replica = await run(bench)
    await asyncio.sleep(0.2)
    replica.session.leave(now=True)
    await replica.poller
    await replica.downloads.drain(1.0)
    assert (said(bench), waiting(bench), bench.cdn.running) == (["+", "t2"], 2, 0)
    bench.cdn.has("p3", PNG)
    heir = await heir_of(bench)
    await asyncio.sleep(5)
    assert said(bench) == ["+", "t2", "+", "t4"]
    await heir.leave()


async def test_a_lost_shard_stops_at_once() -> None:
    bench = await ready(batch(image(1)))
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    replica = await run(bench)
    await asyncio.sleep(1)
    behind = asyncio.create_task(replica.downloads.passed("s1", BOT))
    replica.downloads.stop()
    (stored,) = bench.bus.found("RAW")
    replica.downloads.add(stored._replace(seq=stored.seq + 1))  # by a poller that has yet to hear of it
    gate.set()
    await asyncio.sleep(100)
    assert (said(bench), waiting(bench), bench.cdn.running) == ([], 1, 0)
    assert behind.done()
    await replica.leave()


# metrics and secrets -------------------------------------------------------------------------------------


async def test_messages_are_counted_by_what_they_are_once_they_are_told() -> None:
    bench = await ready(batch(image(1), words(2)))
    bench.cdn.has("p1", None)
    replica = await run(bench, wait_s=20)
    await asyncio.sleep(10)
    assert bench.metrics.value("inbound_messages_total", kind="image", outcome="published") == 0
    await asyncio.sleep(15)
    for kind in ("image", "text"):
        assert bench.metrics.value("inbound_messages_total", kind=kind, outcome="published") == 1
    assert bench.metrics.value("inbound_age_seconds_count") == 2
    await replica.leave()


async def test_no_reference_key_or_text_reaches_the_log_or_the_sandbox() -> None:
    secret = {"encrypt_query_param": "SECRETREF", "aes_key": "ABEiM0RVZneImaq7zN3u/w==", "full_url": "https://SECRET"}
    item = {"type": 2, "image_item": {"media": secret}}
    bench = await ready(batch(raw_message(1, {"type": 1, "text_item": {"text": "my words"}}, item)))
    bench.cdn.has("SECRETREF", Temporary("network"), ZeroDivisionError())
    with capture_logs() as logs:
        replica = await run(bench)
        await asyncio.sleep(10)
    assert said(bench) == ["my words unavailable"]
    assert "SECRET" not in str(logs)
    assert "my words" not in str(logs)
    assert "ABEi" not in str(logs)
    assert b"SECRET" not in bench.bus.found("IN")[0].data
    await replica.leave()
