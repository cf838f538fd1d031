"""Media of a command on their way to the CDN: measured, named, once per request, and never too much of them."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Literal

import pytest

from adapter.bridge.commands import MediaPart
from adapter.bridge.media import StoreAway
from adapter.errors import Refused, Temporary, Unreadable
from adapter.ports import Account
from adapter.replica.wiring import TRANSFERS_PER_SANDBOX
from tests.fakes import MEDIA_BYTES, Bench, Carried

VIRTUAL_TIME = True

BOT, USER = "b1@im.bot", "u1@im.wechat"
ACCOUNT = Account(BOT, "secret", "")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(5000)
MP4 = b"\x00\x00\x00\x18ftypmp42" + bytes(5000)
PDF = b"%PDF-1.7" + bytes(5000)
MP3 = b"ID3\x03" + bytes(5000)

Kind = Literal["image", "video", "file"]


def part(data: bytes = b"hello", *, kind: Kind = "file", name: str = "a.txt", stored: str = "") -> MediaPart:
    return MediaPart(kind, name, stored, b"" if stored else data)


async def carried(bench: Bench, what: MediaPart) -> Carried:
    await bench.uploads.upload_media(what, ACCOUNT, "s1", USER)
    return bench.cdn.uploads[-1]


async def test_bytes_are_measured_and_brought_as_they_are(bench: Bench) -> None:
    data = PNG * 7
    brought = await carried(bench, part(data, kind="image"))
    assert brought == Carried(BOT, USER, "image", "a.txt", data, hashlib.md5(data).hexdigest())


async def test_an_object_is_read_piece_by_piece_twice(bench: Bench) -> None:
    """Once to measure it and once to send it: it is never whole in memory."""
    bench.objects.stored["s1/x"] = PDF * 3
    brought = await carried(bench, part(stored="s1/x"))
    assert (brought.data, brought.md5) == (PDF * 3, hashlib.md5(PDF * 3).hexdigest())
    assert bench.objects.reads == 2


KINDS: list[tuple[str, Kind, bytes, Kind]] = [
    ("picture", "image", PNG, "image"),
    ("video", "video", MP4, "video"),
    ("file", "file", PDF, "file"),
    ("picture-as-file", "file", PNG, "file"),
    ("document-as-picture", "image", PDF, "file"),
    ("audio-as-video", "video", MP3, "file"),
    ("text-as-picture", "image", b"hello", "file"),
    ("who-knows-as-picture", "image", b"\x00\x01\x02", "file"),
    ("nothing-as-picture", "image", b"", "file"),
]


@pytest.mark.parametrize(("kind", "data", "sent"), [row[1:] for row in KINDS], ids=[row[0] for row in KINDS])
async def test_only_pictures_and_videos_are_sent_as_such(kind: Kind, data: bytes, sent: Kind) -> None:
    """A phone shows a grey box for what it cannot decode; a file can at least be saved."""
    assert (await carried(Bench(), part(data, kind=kind))).kind == sent


@pytest.mark.parametrize(
    ("kind", "data", "name"),
    [
        ("image", PNG, "image.png"),
        ("video", MP4, "video.mp4"),
        ("file", PDF, "file.pdf"),
        ("file", MP3, "audio.mp3"),
        ("file", b"hello", "file.txt"),
        ("file", b"\x00\x01", "file"),
    ],
    ids=["png", "mp4", "pdf", "mp3", "text", "unknown"],
)
async def test_what_has_no_name_gets_one_for_its_type(kind: Kind, data: bytes, name: str) -> None:
    assert (await carried(Bench(), part(data, kind=kind, name=""))).name == name


async def test_an_absent_object_is_refused(bench: Bench) -> None:
    with pytest.raises(Refused) as caught:
        await carried(bench, part(stored="s1/none"))
    assert caught.value.reason == "media"
    assert bench.cdn.asked == 0


@pytest.mark.parametrize("stored", ["", "s1/x"], ids=["bytes", "object"])
async def test_what_is_too_large_is_refused_unread(stored: str, bench: Bench) -> None:
    data = bytes(MEDIA_BYTES + 1)
    bench.objects.stored["s1/x"] = data
    with pytest.raises(Refused, match="too_large") as caught:
        await carried(bench, part(data, stored=stored))
    assert caught.value.reason == "media"
    assert (bench.objects.reads, bench.cdn.asked) == (0, 0)


@pytest.mark.parametrize("when", ["asked", "measured", "brought"])
async def test_a_bus_that_is_away_is_told_apart_from_a_cdn_that_is(when: str, bench: Bench) -> None:
    bench.objects.stored["s1/x"] = PDF
    if when == "asked":
        bench.objects.away = 1
    else:
        bench.objects.unreadable.extend(
            [Temporary("bus_down")] if when == "measured" else [None, Temporary("bus_down")]
        )
    with pytest.raises(StoreAway, match="bus_down"):
        await carried(bench, part(stored="s1/x"))
    assert (await carried(bench, part(stored="s1/x"))).data == PDF


@pytest.mark.parametrize("when", ["measured", "brought"])
async def test_a_damaged_object_is_refused(when: str, bench: Bench) -> None:
    bench.objects.stored["s1/x"] = PDF
    bench.objects.unreadable.extend([Unreadable("gone")] if when == "measured" else [None, Unreadable("gone")])
    with pytest.raises(Refused) as caught:
        await carried(bench, part(stored="s1/x"))
    assert caught.value.reason == "media"


async def test_a_sandbox_whose_uploads_hang_delays_no_other(bench: Bench) -> None:
    hanging = asyncio.Event()
    bench.cdn.hold["hanging"] = hanging
    uploads = [
        asyncio.create_task(bench.uploads.upload_media(part(), ACCOUNT, "bad", "hanging"))
        for number in range(TRANSFERS_PER_SANDBOX + 4)
    ]
    await asyncio.sleep(1)
    async with asyncio.timeout(1):
        await bench.uploads.upload_media(part(), ACCOUNT._replace(bot="b2@im.bot"), "good", USER)
    assert bench.cdn.asked == TRANSFERS_PER_SANDBOX + 1
    hanging.set()
    await asyncio.gather(*uploads)
    assert len(bench.cdn.uploads) == TRANSFERS_PER_SANDBOX + 5
