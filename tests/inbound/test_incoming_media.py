"""Media of users: named at once, fetched behind their message by its owner, or by any replica that is asked."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.bridge.entries import Entry, Secrets, encode_entry
from adapter.bridge.media import (
    ATTEMPTS,
    FETCH_S,
    MAX_FETCHES,
    MAX_FETCHES_PER_SANDBOX,
    OWNER_S,
    WHY,
    MediaFetcher,
    name_media,
)
from adapter.contract import messages as contract
from adapter.contract.messages import FileItem, ImageItem, Inbound, InboundItem, Media, VideoItem, VoiceItem
from adapter.contract.names import person_token, position
from adapter.errors import BusRefused, Refused, Temporary
from adapter.ilink.translate import read_message
from adapter.ports import MediaRef
from adapter.simulator import samples
from adapter.tools import media_types
from adapter.tools.concurrency import FairSlots
from tests.fakes import Bench, raw_message

VIRTUAL_TIME = True
BOT, USER = "b1@im.bot", "u1@im.wechat"
PNG = samples.png()


def fetcher(bench: Bench, **changes: Any) -> MediaFetcher:
    """The fetcher of a replica of its own, as the production wiring makes it."""

    async def to_wav(silk: bytes) -> bytes | None:
        return media_types.silk_to_wav(silk)  # no thread: time must not jump meanwhile

    parts: dict[str, Any] = {
        "cdn": bench.cdn,
        "objects": bench.objects,
        "history": bench.bus,
        "names": bench.names,
        "sealer": bench.sealer,
        "to_wav": to_wav,
        "may_store": bench.replica.may_store,
        "transfers": FairSlots(8, share=4),
        "clock": bench.clock,
        "metrics": bench.metrics,
    }
    return MediaFetcher(**parts | changes)


class Published:
    """A message in its inbox, as `receive` publishes it."""

    def __init__(
        self, bench: Bench, *items: dict[str, Any], number: int = 1, sandbox: str = "s1", user: str = USER
    ) -> None:
        read = read_message(raw_message(number, *items))
        self.sandbox, self.user, self.id, self.fetches = sandbox, user, f"in:{BOT}:{sandbox}-{number}", read.fetches
        self.items = name_media(sandbox, user, self.id, read.items, read.fetches)
        window = contract.Window(remaining=9)
        inbound = Inbound(
            id=self.id, sandbox=sandbox, bot=BOT, user=user, sent_at_ms=1, received_at_ms=1, text="",
            items=self.items, window=window,
        )  # fmt: skip
        subject = bench.names.inbox(sandbox, person_token(sandbox, user))
        entry = Entry(since=1, messages=[msgspec.Raw(b"{}"), msgspec.Raw(msgspec.json.encode(inbound))])
        secrets = Secrets("token", media=((1, tuple(read.fetches)),))
        self.sequence = bench.bus.put(subject, encode_entry(entry, secrets, subject, bench.sealer), {}, "in")
        self.position = position(self.sequence, 1)

    def media(self, index: int = 0) -> Media:
        return media_of(self.items[index])

    def fetch_by(self, fetches: MediaFetcher) -> None:
        """What its owner does behind the publication."""
        fetches.fetch_soon(self.sandbox, self.user, self.id, self.items, self.fetches)

    async def ask(self, fetches: MediaFetcher, name: str = "") -> str:
        """Asks for the object, by default the first one. Returns the reason if it cannot be had, or ""."""
        try:
            await fetches.ensure(self.sandbox, self.position, name or self.media().object)
        except Refused as exc:
            return exc.reason if exc.detail == WHY[exc.reason] else f"{exc}, which is not told"
        return ""


def media_of(item: InboundItem) -> Media:
    assert isinstance(item, ImageItem | VoiceItem | FileItem | VideoItem)
    assert item.media is not None
    return item.media


def image(reference: str = "p1") -> dict[str, Any]:
    return {"type": 2, "image_item": {"media": {"encrypt_query_param": reference}}}


def voice(**fields: Any) -> dict[str, Any]:
    return {"type": 3, "voice_item": {"media": {"encrypt_query_param": "v"}, **fields}}


@pytest.fixture
async def bench() -> Bench:
    made = Bench()
    await made.bind()
    made.cdn.has("p1", PNG)
    return made


# names ---------------------------------------------------------------------------------------------------


async def test_an_item_names_its_object_with_what_ilink_says(bench: Bench) -> None:
    file = {"file_name": "报告.pdf", "len": "14", "media": {"encrypt_query_param": "f"}}
    video = {"video_size": 1008, "play_length": 1500, "media": {"encrypt_query_param": "v"}}
    text = {"type": 1, "text_item": {"text": "look"}}
    made = Published(bench, text, image(), {"type": 4, "file_item": file}, {"type": 5, "video_item": video})
    names = [made.media(index).object for index in (1, 2, 3)]
    assert made.items == [
        contract.TextItem(text="look"),
        ImageItem(media=Media(object=names[0])),
        FileItem(name="报告.pdf", media=Media(object=names[1], name="报告.pdf", size=14)),
        VideoItem(duration_ms=1500, media=Media(object=names[2], size=1008, duration_ms=1500)),
    ]
    assert len(set(names)) == 3
    assert all(name.startswith("s1/in/") for name in names)
    assert Published(bench, text, image()).media(1).object == names[0], "every replica gives the same name"
    assert Published(bench, text, image(), number=2).media(1).object != names[0]


@pytest.mark.parametrize("has_voice", [True, False])
async def test_a_recording_has_a_wav_where_it_can_be_converted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, has_voice: bool
) -> None:
    monkeypatch.setattr(media_types, "HAS_VOICE", has_voice)
    made = Published(bench, voice(playtime=2000))
    name = made.media().object
    wav = Media(object=f"{name}.wav", name="voice.wav", mime="audio/wav", duration_ms=2000)
    assert made.items == [
        VoiceItem(duration_ms=2000, media=Media(object=name, duration_ms=2000), wav=wav if has_voice else None)
    ]


async def test_media_that_are_off_have_no_object_and_are_not_fetched(bench: Bench) -> None:
    source = MediaRef(0, "", "p1", None, "")
    items = name_media("s1", USER, "in:1", [ImageItem(reason="off")], [source])
    assert items == [ImageItem(reason="off")]
    fetches = fetcher(bench)
    fetches.fetch_soon("s1", USER, "in:1", items, [source])
    await asyncio.sleep(10)
    assert bench.cdn.fetched == []


# behind the message --------------------------------------------------------------------------------------


async def test_the_owner_fetches_behind_the_message(bench: Bench) -> None:
    made, fetches = Published(bench, image()), fetcher(bench)
    made.fetch_by(fetches)
    await asyncio.sleep(1)
    assert bench.objects.stored == {made.media().object: PNG}
    assert bench.objects.described == {made.media().object: ("image/png", "image.png")}
    assert bench.metrics.value("media_fetches_total", outcome="stored") == 1


async def test_a_recording_is_stored_as_it_came_and_as_wav(bench: Bench) -> None:
    silk = samples.silk(2.0)
    bench.cdn.has("v", silk)
    made = Published(bench, voice())
    made.fetch_by(fetcher(bench))
    await asyncio.sleep(1)
    name = made.media().object
    assert bench.objects.stored.keys() == {name, f"{name}.wav"}
    assert bench.objects.stored[name] == silk
    assert media_types.wav_duration_ms(bench.objects.stored[f"{name}.wav"]) == 2000
    assert bench.objects.described[name] == ("audio/silk", "voice.silk")
    assert bench.objects.described[f"{name}.wav"] == ("audio/wav", "voice.wav")


async def test_a_wav_that_was_not_stored_is_made_on_demand_from_what_is_stored(bench: Bench) -> None:
    bench.cdn.has("v", samples.silk(2.0))
    made = Published(bench, voice())
    name = made.media().object
    assert await made.ask(fetcher(bench)) == ""
    del bench.objects.stored[f"{name}.wav"]
    assert await made.ask(fetcher(bench), f"{name}.wav") == ""
    assert bench.objects.stored.keys() == {name, f"{name}.wav"}
    assert bench.cdn.fetched == ["v"]


async def test_a_recording_that_cannot_be_converted_is_there_without_wav(bench: Bench) -> None:
    bench.cdn.has("v", b"\x02#!SILK_V3" + b"\xff" * 50)
    made, fetches = Published(bench, voice()), fetcher(bench)
    assert await made.ask(fetches) == ""
    assert await made.ask(fetches, f"{made.media().object}.wav") == "corrupt"
    assert bench.objects.stored.keys() == {made.media().object}


# on demand -----------------------------------------------------------------------------------------------


async def test_any_replica_fetches_a_day_later_from_what_the_message_carries(bench: Bench) -> None:
    made = Published(bench, image())
    await asyncio.sleep(24 * 3600)
    assert await made.ask(fetcher(bench)) == ""
    assert bench.objects.stored == {made.media().object: PNG}


async def test_all_who_ask_a_replica_at_once_share_one_fetch(bench: Bench) -> None:
    made, fetches = Published(bench, image()), fetcher(bench)
    assert await asyncio.gather(*(made.ask(fetches) for _ in range(5))) == [""] * 5
    made.fetch_by(fetches)
    made.fetch_by(fetches)
    await asyncio.sleep(1)
    assert bench.cdn.fetched == ["p1"]
    assert bench.metrics.value("media_fetches_total", outcome="stored") == 2


async def test_a_replica_that_is_asked_leaves_a_quick_fetch_to_the_owner(bench: Bench) -> None:
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    made = Published(bench, image())
    made.fetch_by(fetcher(bench))
    asked = asyncio.create_task(made.ask(fetcher(bench)))
    await asyncio.sleep(OWNER_S / 2)
    gate.set()
    assert await asked == ""
    assert bench.cdn.fetched == ["p1"]


async def test_who_stops_waiting_ends_no_fetch(bench: Bench) -> None:
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    made, fetches = Published(bench, image()), fetcher(bench)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5):
            await made.ask(fetches)
    gate.set()
    await asyncio.sleep(1)
    assert bench.objects.stored == {made.media().object: PNG}


@pytest.mark.parametrize("change", ["no-message", "other-sandbox", "other-message", "other-place", "no-references"])
async def test_only_the_object_of_that_message_is_fetched(bench: Bench, change: str) -> None:
    made, other = Published(bench, image()), Published(bench, image(), number=2)
    sandbox, place = "s1", made.position
    match change:
        case "no-message":
            place = position(10**6, 1)
        case "other-sandbox":
            sandbox = "s2"
        case "other-message":
            place = other.position
        case "other-place":
            place = position(made.sequence, 0)
        case "no-references":
            (kept,) = [kept for kept in bench.bus.kept if kept.stored.seq == made.sequence]
            entry = msgspec.json.decode(kept.stored.data, type=dict[str, Any])
            data = msgspec.json.encode({**entry, "sealed": ""})
            bench.bus.kept[:] = [kept._replace(stored=kept.stored._replace(data=data))]
    with pytest.raises(Refused, match="not_found"):
        await fetcher(bench).ensure(sandbox, place, made.media().object)
    assert bench.cdn.fetched == []


# trouble with the CDN ------------------------------------------------------------------------------------

FAILURES: list[tuple[str, Exception, str, int]] = [
    ("reference", Refused("reference"), "reference", 1),
    ("corrupt", Refused("corrupt"), "corrupt", 1),
    ("too-large", Refused("too_large"), "too_large", 1),
    ("404", Refused("unavailable", "HTTP 404"), "unavailable", ATTEMPTS),
    ("500", Temporary("http_5xx"), "unavailable", ATTEMPTS),
    ("network", Temporary("network"), "unavailable", ATTEMPTS),
    ("a-bug", ZeroDivisionError(), "unavailable", ATTEMPTS),
]


@pytest.mark.parametrize(
    ("failure", "reason", "attempts"), [row[1:] for row in FAILURES], ids=[row[0] for row in FAILURES]
)
async def test_a_failure_is_answered_counted_and_not_kept(
    bench: Bench, failure: Exception, reason: str, attempts: int
) -> None:
    bench.cdn.has("p1", failure)
    made, fetches = Published(bench, image()), fetcher(bench)
    with capture_logs() as logs:
        made.fetch_by(fetches)
        await asyncio.sleep(10)
    assert [line["reason"] for line in logs if line["event"] == "media.missing"] == [reason]
    assert bench.metrics.value("media_fetches_total", outcome=reason) == 1
    assert (len(bench.cdn.fetched), bench.objects.stored) == (attempts, {})
    assert await made.ask(fetches) == reason
    bench.cdn.has("p1", PNG)
    assert await made.ask(fetches) == "", "it is tried again for who asks again"


async def test_silent_downloads_of_one_sandbox_delay_no_other(bench: Bench) -> None:
    await bench.bind("s2", "b2@im.bot")
    fetches = fetcher(bench, transfers=FairSlots(4, share=2))
    for number in range(1, 11):
        bench.cdn.has(f"p{number}", None)
        Published(bench, image(f"p{number}"), number=number).fetch_by(fetches)
    bench.cdn.has("q", PNG)
    await asyncio.sleep(1)
    assert await Published(bench, image("q"), sandbox="s2").ask(fetches) == ""
    assert bench.cdn.fetched == ["p1", "p2", "q"]


async def test_what_waits_is_bounded_and_comes_on_demand(bench: Bench) -> None:
    """One sandbox cannot fill the whole bound."""
    bench.cdn.has("p1", None)
    fetches = fetcher(bench, transfers=FairSlots(10**6, share=10**6))
    many = [Published(bench, image(), number=number) for number in range(1, MAX_FETCHES_PER_SANDBOX + 2)]
    for made in many:
        made.fetch_by(fetches)
    await asyncio.sleep(1)
    assert bench.cdn.running == MAX_FETCHES_PER_SANDBOX
    assert bench.metrics.value("media_fetches_total", outcome="dropped") == 1
    with pytest.raises(Temporary, match="busy"):
        await many[-1].ask(fetches)
    for number in range(MAX_FETCHES // MAX_FETCHES_PER_SANDBOX + 1):
        for made in many[:-1]:
            fetches.fetch_soon(f"t{number}", USER, made.id, named_for(f"t{number}", made), made.fetches)
    await asyncio.sleep(1)
    assert bench.cdn.running == MAX_FETCHES
    bench.cdn.has("p1", PNG)
    await asyncio.sleep(FETCH_S)
    assert await many[-1].ask(fetches) == ""


def named_for(sandbox: str, made: Published) -> list[InboundItem]:
    return name_media(sandbox, USER, made.id, [ImageItem()], made.fetches)


# trouble with the bus ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "puts"),
    [(BusRefused(10047, "no space"), 1), (Temporary("bus_timeout"), ATTEMPTS)],
    ids=["full", "busy"],
)
async def test_a_store_that_takes_nothing_is_a_reason_and_not_a_hang(
    bench: Bench, problem: Exception, puts: int
) -> None:
    async def refuses(name: str) -> None:
        raise problem

    bench.objects.on_put = refuses
    made, fetches = Published(bench, image()), fetcher(bench)
    async with asyncio.timeout(10):
        assert await made.ask(fetches) == "store"
    assert len(bench.objects.puts) == puts
    bench.objects.on_put = None
    assert await made.ask(fetches) == ""


async def test_the_end_cancels_fetches_and_leaves_nothing_running(bench: Bench) -> None:
    bench.cdn.has("p1", None)
    made, fetches = Published(bench, image()), fetcher(bench)
    made.fetch_by(fetches)
    await asyncio.sleep(1)
    assert bench.cdn.running == 1
    await fetches.close()
    assert (bench.cdn.running, bench.objects.stored) == (0, {})


# who is served, and secrets ------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["unbound", "other-person"])
async def test_nothing_is_stored_of_a_person_who_has_left_meanwhile(bench: Bench, change: str) -> None:
    """An erasure finds what is there, and must not be followed by more."""
    gate = asyncio.Event()
    bench.cdn.has("p1", gate, PNG)
    made, fetches = Published(bench, image()), fetcher(bench)
    made.fetch_by(fetches)
    await asyncio.sleep(1)
    await bench.bindings.remove(BOT)
    if change == "other-person":
        await bench.bind(bot="b2@im.bot", user="u2@im.wechat")
    gate.set()
    assert await made.ask(fetches) == "unbound"
    assert bench.objects.stored == {}
    await bench.bind()
    assert await made.ask(fetches) == ""


async def test_media_of_a_bots_other_users_are_stored_as_long_as_the_bot_is_bound(bench: Bench) -> None:
    made = [Published(bench, image(), number=number, user="u2@im.wechat") for number in (1, 2, 3)]
    fetches = fetcher(bench)
    made[0].fetch_by(fetches)
    await asyncio.sleep(1)
    assert list(bench.objects.stored) == [made[0].media().object]
    assert await made[1].ask(fetches) == ""
    await bench.bindings.remove(BOT)
    assert await made[2].ask(fetches) == "unbound"
    assert list(bench.objects.stored) == [made[0].media().object, made[1].media().object]


async def test_no_reference_or_key_reaches_the_log_or_the_sandbox(bench: Bench) -> None:
    secret = {"encrypt_query_param": "SECRETREF", "aes_key": "ABEiM0RVZneImaq7zN3u/w==", "full_url": "https://SECRET"}
    bench.cdn.has("SECRETREF", Temporary("network"), ZeroDivisionError())
    with capture_logs() as logs:
        made = Published(bench, {"type": 2, "image_item": {"media": secret}})
        assert await made.ask(fetcher(bench)) == "unavailable"
    assert "SECRET" not in str(logs)
    assert "ABEi" not in str(logs)
    (stored,) = bench.bus.found("IN")
    assert b"SECRET" not in stored.data
    assert "SECRET" not in str(stored.headers)
