"""Media for sandboxes: each reads its own and brings some, by two subjects. Permissions: `test_permissions.py`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.bridge.entries import Secrets
from adapter.bridge.media import MediaFetcher, name_media
from adapter.contract.messages import ImageItem, Inbound, Media, MediaQuery, Window
from adapter.contract.names import (
    H_DURATION_MS,
    H_ERROR,
    H_ERROR_CODE,
    H_HEIGHT,
    H_LAST,
    H_MIME,
    H_NAME,
    H_NEXT,
    H_OFFSET,
    H_SHA256,
    H_SIZE,
    H_UPLOAD,
    H_WIDTH,
    position,
)
from adapter.errors import Refused
from adapter.jetstream.history import StreamHistory, direct_get_one
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.microservice import Services
from adapter.jetstream.objects import CHUNK, ObjectStore, _upload_ident
from adapter.ports import MediaRef, Pieces, SandboxRequest
from adapter.services.media import MAX_WAITS_PER_SANDBOX, PIECE_MAX, PIECE_MIN, Fetch, MediaService
from adapter.simulator import samples
from adapter.tools.concurrency import FairSlots
from adapter.tools.media_types import silk_to_wav
from adapter.tools.timing import SystemClock
from tests.bus.inbox import SEALER, Inbox
from tests.bus.rig import NAMES, PATIENCE_S, Rig
from tests.e2e.waiting import until
from tests.fakes import FakeCdn

STREAM = f"OBJ_{NAMES.media}"
MAX_BYTES = 3_000_000
JPEG_SIZE = bytes.fromhex("ffc0 0011 08 01e0 0280 03 012200 021101 031101 ffd9")
"""The end of a picture of 640 by 480."""


class FakeFetcher:
    """What each object's fetch does."""

    def __init__(self) -> None:
        self.does: dict[str, Callable[[], Awaitable[object]]] = {}
        self.asked: list[tuple[str, str, str]] = []

    async def ensure(self, sandbox: str, position: str, name: str) -> None:
        self.asked.append((sandbox, position, name))
        await self.does[name]()


class Place(NamedTuple):
    """A server with an adapter's part of the bus."""

    rig: Rig
    store: ObjectStore
    fetcher: FakeFetcher


@pytest.fixture
async def place(rig: Rig) -> Place:
    fetcher = FakeFetcher()
    return Place(rig, await serve(rig, fetcher.ensure), fetcher)


async def serve(rig: Rig, fetch: Fetch) -> ObjectStore:
    """A replica's service; its store."""
    connection = ManagedConnection(rig.bus.settings, "service")
    store = ObjectStore(connection, rig.publisher, NAMES.media)
    media = MediaService(store, fetch, rig.metrics, max_bytes=MAX_BYTES)
    of_sandbox = {"media.get": media.get, "media.put": media.put}
    Services(connection, NAMES, {}, rig.metrics, version="1.0.0", instance="i", of_sandbox=of_sandbox)
    rig.spawn(connection.run())
    await connection.wait_connected(PATIENCE_S)
    return store


class Sandbox:
    """A program of one sandbox."""

    def __init__(self, name: str, nc: Client) -> None:
        self.name = name
        self.nc = nc

    async def get(self, name: str) -> bytes:
        """The loop that schemas/README.md shows."""
        data, after = b"", 0
        while True:
            ask = json.dumps({"object": name, "after": after}).encode()
            msg = await self.nc.request(f"wechat.svc.media.get.{self.name}", ask, timeout=10)
            headers = msg.headers or {}
            if H_ERROR_CODE in headers:
                raise LookupError(headers[H_ERROR_CODE])
            data += msg.data
            if H_NEXT not in headers:
                assert (len(data), hashlib.sha256(data).hexdigest()) == (int(headers[H_SIZE]), headers[H_SHA256])
                return data
            after = int(headers[H_NEXT])

    async def ask_get(self, name: str, **query: Any) -> Msg:
        ask = json.dumps({"object": name, **query}).encode()
        return await self.nc.request(f"wechat.svc.media.get.{self.name}", ask, timeout=20)

    async def ask_put(self, upload: str, piece: bytes, offset: int = 0, **headers: str) -> Msg:
        named = {H_UPLOAD: upload, H_OFFSET: str(offset)}
        named |= {{"last": H_LAST, "name": H_NAME, "sha256": H_SHA256}[key]: value for key, value in headers.items()}
        return await self.nc.request(f"wechat.svc.media.put.{self.name}", piece, timeout=10, headers=named)

    async def put(self, upload: str, data: bytes, *, cut: int = 128 * 1024, name: str = "") -> Media:
        for offset in range(0, len(data), cut):
            if offset + cut < len(data):
                await self.ask_put(upload, data[offset : offset + cut], offset)
        start = max(0, len(data) - 1) // cut * cut
        return media_of(await self.ask_put(upload, data[start:], start, last="true", name=quote(name)))


def media_of(msg: Msg) -> Media:
    assert H_ERROR_CODE not in (msg.headers or {}), msg.headers
    return msgspec.json.decode(msg.data, type=Media)


def code_of(msg: Msg) -> str:
    return str((msg.headers or {}).get(H_ERROR_CODE, ""))


@pytest.fixture
async def s1(place: Place) -> AsyncIterator[Sandbox]:
    nc = await place.rig.bus.client()
    yield Sandbox("s1", nc)
    await nc.close()


async def one(data: bytes) -> Pieces:
    yield data


BYTES = random.Random(1).randbytes(700_001)
SECRET = b"nobody's business" * 20_000


# reading -------------------------------------------------------------------------------------------------


async def test_a_sandbox_reads_its_own_media(place: Place, s1: Sandbox) -> None:
    for size in (0, 1, 131_072, 700_001):
        await place.store.put(f"s1/in/{size}", one(BYTES[:size]))
        assert await s1.get(f"s1/in/{size}") == BYTES[:size]


async def test_what_is_absent_and_what_is_others_look_the_same(place: Place, s1: Sandbox) -> None:
    for name in ("s2/in/x", "s10/in/x", "s1"):
        await place.store.put(name, one(SECRET))
    answers = []
    for name in [
        "s1/absent", "s2/in/x", "s10/in/x", "s1", "s1/", "s10", "s1/../s2/in/x", "s1/../../s2/in/x", "/s2/in/x",
        "./s2/in/x", "s1/./../s2/in/x", "S1/in/x", "s1\\..\\s2\\in\\x", "s2/in/x#s1/", " s1/x", "*", "s1/*", "s1/>",
        "s1/%2e%2e/s2/in/x", "s1/..\u2044s2/in/x", "s1\u0000/x", "s2/../s1/absent",
    ]:  # fmt: skip
        ask = msgspec.json.encode({"object": name})
        msg = await s1.nc.request("wechat.svc.media.get.s1", ask, timeout=10)
        answers.append((msg.data, msg.headers))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0] == b""
    assert (answers[0][1] or {})[H_ERROR_CODE] == "404"


async def test_a_request_that_cannot_be_read_is_refused(place: Place, s1: Sandbox) -> None:
    asks = [
        b"",
        b"null",
        b"{",
        b"\xff",
        b"[" * 10_000,
        b'{"object":""}',
        b'{"object":"s1/x","after":-1}',
        b'{"object":"s1/x","after":18446744073709551615}',
        b'{"object":7}',
    ]
    answers = [await s1.nc.request("wechat.svc.media.get.s1", ask, timeout=10) for ask in asks]
    assert [code_of(msg) for msg in answers] == ["400"] * len(asks)
    assert place.rig.metrics.value("schema_violations_total", kind="svc") == len(asks)
    illegal = await s1.nc.request("wechat.svc.media.get.S1", b'{"object":"S1/x"}', timeout=10)
    assert (code_of(illegal), illegal.data) == ("400", b"")


async def test_a_piece_that_is_gone_is_absent(place: Place, s1: Sandbox) -> None:
    await place.store.put("s1/in/x", one(BYTES))
    await place.rig.connection.api_request(f"STREAM.PURGE.{STREAM}", {"filter": f"$O.{NAMES.media}.C.>"})
    with pytest.raises(LookupError, match="404"):
        await s1.get("s1/in/x")


async def test_the_first_piece_says_what_it_is(place: Place, s1: Sandbox) -> None:
    """What nobody knows when the message comes."""
    voice = samples.silk(2.0)
    wav = silk_to_wav(voice)
    assert wav is not None
    for name, data, title, said in [
        ("p", samples.png(640, 480), "a b/报.png", ("image/png", "640", "480", None)),
        ("w", wav, "voice.wav", ("audio/wav", None, None, "2000")),
        ("s", voice, "voice.silk", ("audio/silk", None, None, "2000")),
        ("x", BYTES, "", ("application/octet-stream", None, None, None)),
    ]:
        await place.store.put(f"s1/in/{name}", one(data), describe=lambda _, title=title: ("", title))  # type: ignore[misc]
        headers = (await s1.ask_get(f"s1/in/{name}")).headers or {}
        shown = tuple(headers.get(header) for header in (H_MIME, H_WIDTH, H_HEIGHT, H_DURATION_MS))
        assert (unquote(headers[H_NAME]), shown) == (title or "file", said)
        assert headers[H_NAME].isascii()
    later = (await s1.ask_get("s1/in/x", after=int(headers[H_NEXT]))).headers or {}
    assert later.keys() & {H_NAME, H_MIME, H_WIDTH, H_HEIGHT, H_DURATION_MS} == set()


# waiting for what is fetched -----------------------------------------------------------------------------


async def test_who_waits_gets_what_is_fetched(place: Place, s1: Sandbox) -> None:
    place.fetcher.does["s1/in/x"] = lambda: place.store.put("s1/in/x", one(BYTES))
    msg = await s1.ask_get("s1/in/x", position="7.0", wait_s=10)
    assert (msg.headers or {})[H_SHA256] == hashlib.sha256(BYTES).hexdigest()
    assert msg.data == BYTES[: len(msg.data)] != b""
    assert place.fetcher.asked == [("s1", "7.0", "s1/in/x")]
    await s1.ask_get("s1/in/x", position="7.0", wait_s=10)
    assert len(place.fetcher.asked) == 1, "what is there is not fetched"


async def test_who_names_no_message_or_does_not_wait_gets_only_what_is_stored(place: Place, s1: Sandbox) -> None:
    queries: list[dict[str, Any]] = [
        {},
        {"position": "7.0"},
        {"wait_s": 10},
        {"position": "7.0", "wait_s": 10, "after": 5},
    ]
    answers = [await s1.ask_get("s1/in/x", **query) for query in queries]
    assert [code_of(msg) for msg in answers] == ["404"] * len(queries)
    assert place.fetcher.asked == []


async def test_a_fetch_of_others_media_is_not_begun(place: Place, s1: Sandbox) -> None:
    for name in ("s2/in/x", "s10/in/x", "s1", "/s2/in/x"):
        assert code_of(await s1.ask_get(name, position="7.0", wait_s=10)) == "404"
    assert place.fetcher.asked == []


async def test_media_that_cannot_be_had_are_told_with_the_reason(place: Place, s1: Sandbox) -> None:
    async def refuse() -> None:
        raise Refused("corrupt", "The media cannot be decrypted.")

    place.fetcher.does["s1/in/x"] = refuse
    msg = await s1.ask_get("s1/in/x", position="7.0", wait_s=10)
    assert (code_of(msg), (msg.headers or {})[H_ERROR]) == ("404", "The media cannot be decrypted.")


async def test_media_that_take_longer_than_the_wait_are_told_as_such(place: Place, s1: Sandbox) -> None:
    place.fetcher.does["s1/in/x"] = asyncio.Event().wait
    msg = await s1.ask_get("s1/in/x", position="7.0", wait_s=0.1)
    assert (code_of(msg), (msg.headers or {})[H_ERROR]) == ("503", "The media are still being fetched: ask again.")


async def test_who_waits_takes_nothing_from_other_requests(place: Place, s1: Sandbox) -> None:
    """Neither from their own nor from others', who may wait as well."""
    gate = asyncio.Event()
    for sandbox in ("s1", "s2"):
        place.fetcher.does[f"{sandbox}/in/x"] = gate.wait
        await place.store.put(f"{sandbox}/in/there", one(SECRET))
    s2 = Sandbox("s2", s1.nc)
    waiting = [
        asyncio.create_task(s1.ask_get("s1/in/x", position="7.0", wait_s=10)) for _ in range(MAX_WAITS_PER_SANDBOX)
    ]
    await until(lambda: len(place.fetcher.asked) == MAX_WAITS_PER_SANDBOX, "all of them wait")
    more = await s1.ask_get("s1/in/x", position="7.0", wait_s=10)
    assert (code_of(more), "ask again" in (more.headers or {})[H_ERROR]) == ("503", True)
    others = asyncio.create_task(s2.ask_get("s2/in/x", position="7.0", wait_s=10))
    await until(lambda: len(place.fetcher.asked) == MAX_WAITS_PER_SANDBOX + 1, "the other waits, too")
    for asks in (s1, s2):
        quick = await asyncio.gather(*(asks.get(f"{asks.name}/in/there") for _ in range(20)))
        assert quick == [SECRET] * 20
    gate.set()
    codes = [code_of(msg) for msg in await asyncio.gather(*waiting, others)]
    assert codes == ["404"] * (MAX_WAITS_PER_SANDBOX + 1)


async def test_two_replicas_that_are_asked_at_once_give_the_same_and_leave_one_copy(place: Place) -> None:
    cdn, metrics = FakeCdn(), place.rig.metrics
    cdn.has("p1", BYTES)
    source = MediaRef(0, "", "p1", None, "")
    items = name_media("s1", "u1", "in:1", [ImageItem()], [source])
    inbound = Inbound(
        id="in:1", sandbox="s1", bot="b1", user="u1", sent_at_ms=1, received_at_ms=1, text="", items=items,
        window=Window(remaining=9),
    )  # fmt: skip
    secrets = Secrets(media=((1, (source,)),))
    sequence = await Inbox(place.rig).store([{}, inbound], secrets=secrets)

    def replica() -> MediaService:
        async def to_wav(silk: bytes) -> bytes | None:
            return None

        fetches = MediaFetcher(
            cdn, place.store, StreamHistory(place.rig.connection), NAMES, SEALER, to_wav, lambda *_: True,
            FairSlots(8, share=4), SystemClock(), metrics,
        )  # fmt: skip
        return MediaService(place.store, fetches.ensure, metrics, max_bytes=MAX_BYTES)

    (item,) = items
    assert isinstance(item, ImageItem)
    assert item.media is not None
    ask = MediaQuery(object=item.media.object, position=position(sequence, 1), wait_s=30)
    request = SandboxRequest("s1", {}, msgspec.json.encode(ask))
    one_of, other = await asyncio.gather(replica().get(request), replica().get(request))
    assert one_of == other
    assert one_of.data == BYTES[: len(one_of.data)] != b""
    assert cdn.fetched == ["p1", "p1"]
    for missing in (position(sequence, 0), position(sequence, 2), position(sequence + 1, 0)):
        ask = MediaQuery(object=f"{item.media.object}x", position=missing, wait_s=30)
        with pytest.raises(Refused, match="no message with this object"):
            await replica().get(SandboxRequest("s1", {}, msgspec.json.encode(ask)))
    ask = MediaQuery(object=item.media.object, position="7", wait_s=30)
    with pytest.raises(Refused, match="A position is"):
        await replica().get(SandboxRequest("s1", {}, msgspec.json.encode(ask)))
    stored = await place.rig.connection.api_request(f"STREAM.INFO.{STREAM}", {"subjects_filter": ">"})
    assert sum(stored["state"]["subjects"].values()) == -(-len(BYTES) // CHUNK) + 1


# attacks on what others have -------------------------------------------------------------------------------


# bringing ------------------------------------------------------------------------------------------------


async def test_a_sandbox_brings_media(place: Place, s1: Sandbox) -> None:
    assert place.rig.connection.nc is not None
    theirs = await place.rig.connection.nc.jetstream().object_store(NAMES.media)
    for size in (0, 1, 131_072, 131_073, 700_001):
        name, data = f"s1/out/report-{size}", BYTES[:size]
        made = await s1.put(f"report-{size}", data, name="报告 1.bin")
        assert made == Media(
            object=name,
            name="报告 1.bin",
            mime="application/octet-stream",
            size=size,
            sha256=hashlib.sha256(data).hexdigest(),
        )
        stored = await place.store.get_info(name)
        assert stored is not None
        assert b"".join([piece async for piece in place.store.read(stored)]) == data
        assert await s1.get(name) == (await theirs.get(name)).data == data


async def test_media_without_a_name_get_one_and_a_picture_its_size(s1: Sandbox) -> None:
    made = await s1.put("p", samples.png(640, 480))
    assert (made.name, made.mime, made.width, made.height) == ("image.png", "image/png", 640, 480)


async def test_a_file_name_has_no_folders(s1: Sandbox) -> None:
    names = {"../../etc/passwd": "passwd", "C:\\x\\a.txt": "a.txt", "a\nb\x00": "ab"}
    names |= dict.fromkeys((".", "a/..", "..\u200b"), "file.txt")
    made = [await s1.put(f"p{number}", b"abc", name=given) for number, given in enumerate(names)]
    assert [media.name for media in made] == list(names.values())


async def test_pieces_may_be_repeated(place: Place, s1: Sandbox) -> None:
    pieces = [(BYTES[:20_000], 0), (BYTES[20_000:40_000], 20_000), (BYTES[40_000:60_000], 40_000)]
    for piece, offset in [pieces[0], pieces[0], pieces[1], pieces[0], pieces[1], pieces[2]]:
        assert media_of(await s1.ask_put("u", piece, offset)).object == "s1/out/u"
    for _ in range(3):
        made = media_of(await s1.ask_put("u", BYTES[60_000:70_000], 60_000, last="1"))
        assert made.sha256 == hashlib.sha256(BYTES[:70_000]).hexdigest()
    assert media_of(await s1.ask_put("u", *pieces[1])).size == 70_000
    assert await s1.get("s1/out/u") == BYTES[:70_000]


async def test_any_replica_takes_any_piece_even_at_once(place: Place, s1: Sandbox) -> None:
    """Two more replicas, and every piece is asked three times at the same moment."""
    for _ in range(2):
        await serve(place.rig, place.fetcher.ensure)
    for offset in range(0, 400_000, 40_000):
        last = {"last": "true"} if offset == 360_000 else {}
        answers = await asyncio.gather(
            *(s1.ask_put("u", BYTES[offset : offset + 40_000], offset, **last) for _ in range(3))
        )
        assert [media_of(answer).size for answer in answers] == [offset + 40_000] * 3
    assert await s1.get("s1/out/u") == BYTES[:400_000]


UNFIT: list[tuple[bytes, int, dict[str, str], str]] = [
    (BYTES[:20_000], 20_001, {}, "go on at 20000"),
    (BYTES[:20_000], 10_000, {}, "go on at 20000"),
    (b"", 0, {"last": "true"}, "take another one"),
    (BYTES[: PIECE_MIN - 1], 20_000, {}, "A piece has"),
    (BYTES[: PIECE_MAX + 1], 20_000, {}, "A piece has"),
    (b"x", MAX_BYTES, {"last": "true"}, "exceed"),
    (b"x", 20_000, {"last": "true", "sha256": "0" * 64}, "SHA-256"),
    (b"x", -1, {}, "Wechat-Offset"),
    (b"x", 20_000, {"last": "perhaps"}, "Wechat-Last"),
    (b"x", 20_000, {"sha256": "short"}, "Wechat-Sha256"),
]


async def test_a_piece_that_does_not_fit_is_refused(place: Place, s1: Sandbox) -> None:
    for number, (piece, offset, headers, says) in enumerate(UNFIT):
        media_of(await s1.ask_put(f"u{number}", BYTES[:20_000]))
        msg = await s1.ask_put(f"u{number}", piece, offset, **headers)
        assert code_of(msg) == "400"
        assert says in (msg.headers or {})["Nats-Service-Error"]
        assert await place.store.get_info(f"s1/out/u{number}") is None


async def test_an_upload_has_a_plain_name(s1: Sandbox) -> None:
    uploads = ["", "../x", "a/b", "a.b", "a b", "x" * 65, "é", "*"]
    answers = [await s1.ask_put(upload, b"x", last="true") for upload in uploads]
    assert [code_of(msg) for msg in answers] == ["400"] * len(uploads)


async def test_a_finished_upload_grows_no_more(place: Place, s1: Sandbox) -> None:
    await s1.put("u", BYTES[:50_000])
    assert code_of(await s1.ask_put("u", BYTES[:20_000], 50_000)) == "400"
    assert await s1.get("s1/out/u") == BYTES[:50_000]


async def test_an_upload_replaces_no_other_object(place: Place, s1: Sandbox) -> None:
    await place.store.put("s1/out/u", one(BYTES[:50_000]))
    msg = await s1.ask_put("u", b"other bytes", last="true")
    assert (code_of(msg), "another id" in (msg.headers or {})[H_ERROR]) == ("400", True)
    assert await s1.get("s1/out/u") == BYTES[:50_000]


async def test_a_repeated_last_piece_is_answered_without_reading_the_object(place: Place, s1: Sandbox) -> None:
    """Reading 100 MB for each repeat would be a cheap flood. The piece that is gone shows that nobody looks."""
    made = await s1.put("u", BYTES[:300_000], name="a.bin")
    subject = f"$O.{NAMES.media}.C.{_upload_ident('s1/out/u')}"
    first = await sequence_after(place, subject, 0)
    second = await sequence_after(place, subject, first)
    await place.rig.connection.api_request(
        f"STREAM.MSG.DELETE.{STREAM}", {"seq": second, "no_erase": True}, PATIENCE_S
    )
    again = await s1.ask_put("u", BYTES[262_144:300_000], 262_144, last="true", sha256=made.sha256)
    assert media_of(again) == made
    again = await s1.ask_put("u", BYTES[262_144:300_000], 262_144, last="true", name="other.bin")
    assert media_of(again) == made, "it is the object that is told"


async def sequence_after(place: Place, subject: str, after: int) -> int:
    """The sequence of the next piece."""
    found = await direct_get_one(
        place.rig.connection, STREAM, {"seq": after + 1, "next_by_subj": subject, "batch": 1}
    )
    assert found is not None
    return found.seq


async def test_a_repeated_picture_has_its_size_however_small_its_pieces_were(s1: Sandbox) -> None:
    """The size of a JPEG may stand behind its first piece."""
    jpeg = b"\xff\xd8\xff\xe1\xc3\x50" + bytes(49_998) + JPEG_SIZE
    made = await s1.put("u", jpeg, cut=PIECE_MIN)
    assert (made.width, made.height) == (640, 480)
    start = len(jpeg) // PIECE_MIN * PIECE_MIN
    assert media_of(await s1.ask_put("u", jpeg[start:], start, last="true")) == made


async def test_wrong_bytes_can_be_brought_again(s1: Sandbox) -> None:
    assert code_of(await s1.ask_put("u", b"wrong", last="true", sha256=hashlib.sha256(b"right").hexdigest())) == "400"
    right = await s1.ask_put("u", b"right", last="true", sha256=hashlib.sha256(b"right").hexdigest())
    assert media_of(right).size == 5


async def test_uploads_of_two_sandboxes_do_not_meet(place: Place, s1: Sandbox) -> None:
    other = Sandbox("s2", s1.nc)
    made = await asyncio.gather(s1.put("u", BYTES[:300_000]), other.put("u", BYTES[300_000:650_000]))
    assert [media.object for media in made] == ["s1/out/u", "s2/out/u"]
    assert await s1.get("s1/out/u") == BYTES[:300_000]
    assert await other.get("s2/out/u") == BYTES[300_000:650_000]
    with pytest.raises(LookupError, match="404"):
        await s1.get("s2/out/u")
