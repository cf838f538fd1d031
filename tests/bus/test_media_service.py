"""Media for sandboxes, on a server with permissions: each reaches its own by two subjects, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import random
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import msgspec
import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.object_store import ObjectStore as TheirStore
from structlog.testing import capture_logs

from adapter.cli.embedded import find_server
from adapter.content.media import silk_to_wav
from adapter.contract.messages import ImageItem, Inbound, Media, MediaQuery, Window
from adapter.contract.names import (
    H_BOT,
    H_DURATION_MS,
    H_ERROR,
    H_ERROR_CODE,
    H_HEIGHT,
    H_LAST,
    H_MIME,
    H_MSG_ID,
    H_NAME,
    H_NEXT,
    H_OFFSET,
    H_SEALED,
    H_SHA256,
    H_SIZE,
    H_UPLOAD,
    H_WIDTH,
    Names,
)
from adapter.errors import Refused
from adapter.inbound.media import MediaFetcher, name_media
from adapter.jetstream import topology
from adapter.jetstream.history import StreamHistory, direct_get_one
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.microservice import Services
from adapter.jetstream.objects import CHUNK, ObjectStore, _upload_ident
from adapter.jetstream.publisher import Publisher
from adapter.kit.slots import FairSlots
from adapter.kit.timing import SystemClock
from adapter.observability.metrics import Metrics
from adapter.outbound.inbox import Sealed, seal
from adapter.ports import MediaRef, Pieces, SandboxRequest
from adapter.security.seal import Sealer
from adapter.services.media import MAX_WAITS_PER_SANDBOX, PIECE_MAX, PIECE_MIN, Fetch, MediaService
from adapter.settings import Settings
from adapter.simulator import samples
from tests.bus.guarded import ports_of
from tests.bus.rig import PATIENCE_S
from tests.e2e.waiting import until
from tests.fakes import FakeCdn

NAMES = Names()
STREAM = f"OBJ_{NAMES.media}"
MAX_BYTES = 3_000_000
JPEG_SIZE = bytes.fromhex("ffc0 0011 08 01e0 0280 03 012200 021101 031101 ffd9")
"""The end of a picture of 640 by 480."""

CONFIG = """
listen: "127.0.0.1:-1"
ports_file_dir: "{folder}"
jetstream {{ store_dir: "{folder}/data" }}
authorization {{
  users: [
    {{ user: "adapter", password: "adapter" }}
    {users}
  ]
}}
"""
SANDBOX = """{{
  user: "{name}", password: "{name}"
  permissions: {{
    publish: {{ allow: [ "wechat.svc.media.get.{name}", "wechat.svc.media.put.{name}" ] }}
    subscribe: {{ allow: [ "_INBOX_{name}.>" ] }}
  }}
}}"""
"""The narrowest permissions that a sandbox can have and still read and bring media."""


ACCOUNTS = """
listen: "127.0.0.1:-1"
ports_file_dir: "{folder}"
jetstream {{ store_dir: "{folder}/data" }}
accounts {{
  WECHAT {{
    jetstream: enabled
    users: [ {{ user: "adapter", password: "adapter" }} ]
    exports: [ {{ service: "wechat.svc.media.get.*" }}, {{ service: "wechat.svc.media.put.*" }} ]
  }}
  SANDBOX {{
    users: [ {users} ]
    imports: [
      {{ service: {{ account: WECHAT, subject: "wechat.svc.media.get.*" }} }}
      {{ service: {{ account: WECHAT, subject: "wechat.svc.media.put.*" }} }}
    ]
  }}
}}
"""
"""The same with sandboxes in an account of their own."""


@contextlib.asynccontextmanager
async def server_with_users(folder: Path, accounts: bool) -> AsyncIterator[str]:
    """A nats-server for the adapter and the sandboxes s1, s10 and s2. Yields its URL."""
    users = "\n".join(SANDBOX.format(name=name) for name in ("s1", "s10", "s2"))
    config = folder / "server.conf"
    config.write_text((ACCOUNTS if accounts else CONFIG).format(folder=folder, users=users))
    process = await asyncio.create_subprocess_exec(find_server(), "-c", config, stderr=subprocess.DEVNULL)
    try:
        await until(lambda: any(ports_of(folder)), "the server listens")
        yield ports_of(folder)[0]
    finally:
        process.terminate()
        await process.wait()


class FakeFetcher:
    """What each object's fetch does."""

    def __init__(self) -> None:
        self.does: dict[str, Callable[[], Awaitable[object]]] = {}
        self.asked: list[tuple[str, int, str]] = []

    async def ensure(self, sandbox: str, sequence: int, name: str) -> None:
        self.asked.append((sandbox, sequence, name))
        await self.does[name]()


class Place(NamedTuple):
    """An adapter's part of the bus, and where it is."""

    url: str
    connection: ManagedConnection
    store: ObjectStore
    metrics: Metrics
    group: asyncio.TaskGroup
    accounts: bool
    """The sandboxes are in an account of their own."""
    fetcher: FakeFetcher


BOTH = pytest.mark.parametrize("place", [False, True], ids=["one_account", "two_accounts"], indirect=True)
"""For what the server's permissions decide."""


@pytest.fixture
async def place(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    accounts = getattr(request, "param", True)
    async with server_with_users(tmp_path, accounts) as url, asyncio.TaskGroup() as group:
        settings = Settings(nats_url=(url,), nats_user="adapter", nats_password="adapter")
        connection, metrics = ManagedConnection(settings, "test"), Metrics()
        publisher = Publisher(connection, SystemClock(), metrics)
        store = ObjectStore(connection, publisher, NAMES.media)
        fetcher = FakeFetcher()
        offer(connection, store, metrics, fetcher.ensure)
        tasks = [group.create_task(connection.run()), group.create_task(publisher.run())]
        await connection.wait_connected(PATIENCE_S)
        for wanted in topology.wanted_streams(NAMES, settings):
            await topology.create_stream(connection, wanted)
        yield Place(url, connection, store, metrics, group, accounts, fetcher)
        for task in tasks:
            task.cancel()


def offer(connection: ManagedConnection, store: ObjectStore, metrics: Metrics, fetch: Fetch | None = None) -> None:
    media = MediaService(store, fetch or FakeFetcher().ensure, metrics, max_bytes=MAX_BYTES)
    of_sandbox = {"media.get": media.get, "media.put": media.put}
    Services(connection, NAMES, {}, metrics, version="1.0.0", instance="i", of_sandbox=of_sandbox)


class Sandbox:
    """A program with the permissions of one sandbox; keeps what the server forbids it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.errors: list[str] = []
        self.nc = Client()

    async def connect(self, url: str) -> Sandbox:
        async def on_error(exc: Exception) -> None:
            self.errors.append(str(exc))

        await self.nc.connect(
            url, user=self.name, password=self.name, inbox_prefix=f"_INBOX_{self.name}".encode(), error_cb=on_error
        )
        return self

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

    async def forbidden(self, subject: str, payload: bytes = b"{}") -> None:
        """Publishes, with an inbox of its own for an answer; the server refuses, and nothing comes."""
        inbox = self.nc.new_inbox()
        answers = await self.nc.subscribe(inbox)
        self.errors.clear()
        await self.nc.publish(subject, payload, reply=inbox)
        await self.nc.flush()
        await until(lambda: bool(self.errors), f"{subject} is refused")
        assert "permissions violation for publish" in self.errors[0].lower()
        assert answers.pending_msgs == 0
        await answers.unsubscribe()


def media_of(msg: Msg) -> Media:
    assert H_ERROR_CODE not in (msg.headers or {}), msg.headers
    return msgspec.json.decode(msg.data, type=Media)


def code_of(msg: Msg) -> str:
    return str((msg.headers or {}).get(H_ERROR_CODE, ""))


@pytest.fixture
async def s1(place: Place) -> AsyncIterator[Sandbox]:
    made = await Sandbox("s1").connect(place.url)
    yield made
    await made.nc.close()


async def one(data: bytes) -> Pieces:
    yield data


BYTES = random.Random(1).randbytes(700_001)
SECRET = b"nobody's business" * 20_000


# reading -------------------------------------------------------------------------------------------------


@BOTH
async def test_a_sandbox_reads_its_own_media(place: Place, s1: Sandbox) -> None:
    for size in (0, 1, 131_072, 700_001):
        await place.store.put(f"s1/in/{size}", one(BYTES[:size]))
        assert await s1.get(f"s1/in/{size}") == BYTES[:size]
    assert s1.errors == []


@BOTH
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
    assert place.metrics.value("schema_violations_total", kind="svc") == len(asks)


async def test_a_sandbox_with_an_illegal_name_has_nothing(place: Place) -> None:
    await place.store.put("S1/x", one(SECRET))
    nc = await nats.connect(place.url, user="adapter", password="adapter")
    msg = await nc.request("wechat.svc.media.get.S1", b'{"object":"S1/x"}', timeout=10)
    assert (code_of(msg), msg.data) == ("400", b"")
    await nc.close()


async def test_a_piece_that_is_gone_is_absent(place: Place, s1: Sandbox) -> None:
    await place.store.put("s1/in/x", one(BYTES))
    await place.connection.api_request(f"STREAM.PURGE.{STREAM}", {"filter": f"$O.{NAMES.media}.C.>"})
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
    msg = await s1.ask_get("s1/in/x", sequence=7, wait_s=10)
    assert (msg.headers or {})[H_SHA256] == hashlib.sha256(BYTES).hexdigest()
    assert msg.data == BYTES[: len(msg.data)] != b""
    assert place.fetcher.asked == [("s1", 7, "s1/in/x")]
    await s1.ask_get("s1/in/x", sequence=7, wait_s=10)
    assert len(place.fetcher.asked) == 1, "what is there is not fetched"


async def test_who_names_no_message_or_does_not_wait_gets_only_what_is_stored(place: Place, s1: Sandbox) -> None:
    queries: list[dict[str, Any]] = [
        {},
        {"sequence": 7},
        {"wait_s": 10},
        {"sequence": 7, "wait_s": 10, "after": 5},
    ]
    answers = [await s1.ask_get("s1/in/x", **query) for query in queries]
    assert [code_of(msg) for msg in answers] == ["404"] * len(queries)
    assert place.fetcher.asked == []


async def test_a_fetch_of_others_media_is_not_begun(place: Place, s1: Sandbox) -> None:
    for name in ("s2/in/x", "s10/in/x", "s1", "/s2/in/x"):
        assert code_of(await s1.ask_get(name, sequence=7, wait_s=10)) == "404"
    assert place.fetcher.asked == []


async def test_media_that_cannot_be_had_are_told_with_the_reason(place: Place, s1: Sandbox) -> None:
    async def refuse() -> None:
        raise Refused("corrupt", "The media cannot be decrypted.")

    place.fetcher.does["s1/in/x"] = refuse
    msg = await s1.ask_get("s1/in/x", sequence=7, wait_s=10)
    assert (code_of(msg), (msg.headers or {})[H_ERROR]) == ("404", "The media cannot be decrypted.")


async def test_media_that_take_longer_than_the_wait_are_told_as_such(place: Place, s1: Sandbox) -> None:
    place.fetcher.does["s1/in/x"] = asyncio.Event().wait
    msg = await s1.ask_get("s1/in/x", sequence=7, wait_s=0.1)
    assert (code_of(msg), (msg.headers or {})[H_ERROR]) == ("503", "The media are still being fetched: ask again.")


async def test_who_waits_takes_nothing_from_other_requests(place: Place, s1: Sandbox) -> None:
    """Neither from their own nor from others', who may wait as well."""
    gate = asyncio.Event()
    for sandbox in ("s1", "s2"):
        place.fetcher.does[f"{sandbox}/in/x"] = gate.wait
        await place.store.put(f"{sandbox}/in/there", one(SECRET))
    s2 = await Sandbox("s2").connect(place.url)
    waiting = [
        asyncio.create_task(s1.ask_get("s1/in/x", sequence=7, wait_s=10)) for _ in range(MAX_WAITS_PER_SANDBOX)
    ]
    await until(lambda: len(place.fetcher.asked) == MAX_WAITS_PER_SANDBOX, "all of them wait")
    more = await s1.ask_get("s1/in/x", sequence=7, wait_s=10)
    assert (code_of(more), "ask again" in (more.headers or {})[H_ERROR]) == ("503", True)
    others = asyncio.create_task(s2.ask_get("s2/in/x", sequence=7, wait_s=10))
    await until(lambda: len(place.fetcher.asked) == MAX_WAITS_PER_SANDBOX + 1, "the other waits, too")
    for asks in (s1, s2):
        quick = await asyncio.gather(*(asks.get(f"{asks.name}/in/there") for _ in range(20)))
        assert quick == [SECRET] * 20
    gate.set()
    codes = [code_of(msg) for msg in await asyncio.gather(*waiting, others)]
    assert codes == ["404"] * (MAX_WAITS_PER_SANDBOX + 1)
    await s2.nc.close()


async def test_two_replicas_that_are_asked_at_once_give_the_same_and_leave_one_copy(place: Place) -> None:
    cdn, sealer, metrics = FakeCdn(), Sealer((bytes(32),)), place.metrics
    cdn.has("p1", BYTES)
    source = MediaRef(0, "", "p1", None, "")
    items = name_media("s1", "u1", "in:1", [ImageItem()], [source])
    inbound = Inbound(
        id="in:1", sandbox="s1", bot="b1", user="u1", sent_at_ms=1, received_at_ms=1, text="", items=items,
        window=Window(remaining=9),
    )  # fmt: skip
    headers = {H_MSG_ID: "in:1", H_BOT: "b1", H_SEALED: seal(sealer, "in:1", "b1", "s1", Sealed(media=(source,)))}
    assert place.connection.nc is not None
    js = place.connection.nc.jetstream()
    ack = await js.publish(NAMES.inbox("s1"), msgspec.json.encode(inbound), headers=headers)

    def replica() -> MediaService:
        async def to_wav(silk: bytes) -> bytes | None:
            return None

        fetches = MediaFetcher(
            cdn, place.store, StreamHistory(place.connection), NAMES, sealer, to_wav, lambda *_: True,
            FairSlots(8, share=4), SystemClock(), metrics,
        )  # fmt: skip
        return MediaService(place.store, fetches.ensure, metrics, max_bytes=MAX_BYTES)

    (item,) = items
    assert isinstance(item, ImageItem)
    assert item.media is not None
    ask = MediaQuery(object=item.media.object, sequence=ack.seq, wait_s=30)
    request = SandboxRequest("s1", {}, msgspec.json.encode(ask))
    one_of, other = await asyncio.gather(replica().get(request), replica().get(request))
    assert one_of == other
    assert one_of.data == BYTES[: len(one_of.data)] != b""
    assert cdn.fetched == ["p1", "p1"]
    stored = await place.connection.api_request(f"STREAM.INFO.{STREAM}", {"subjects_filter": ">"})
    assert sum(stored["state"]["subjects"].values()) == -(-len(BYTES) // CHUNK) + 1


# attacks on what others have -------------------------------------------------------------------------------


@BOTH
async def test_the_subjects_of_others_and_wildcards_are_closed(place: Place, s1: Sandbox) -> None:
    await place.store.put("s2/in/x", one(SECRET))
    ask = b'{"object":"s2/in/x"}'
    for verb in ("get", "put"):
        for token in ("s2", "s10", "*", ">", "s1.s2", "S1"):
            await s1.forbidden(f"wechat.svc.media.{verb}.{token}", ask)
    for subject in ("wechat.svc.bindings.list", "wechat.svc.replay", "$SRV.INFO.wechat-nats"):
        await s1.forbidden(subject, ask)


@BOTH
async def test_the_store_itself_is_closed(place: Place, s1: Sandbox) -> None:
    stored = await place.store.put("s2/in/x", one(SECRET))
    meta = base64.urlsafe_b64encode(b"s2/in/x").decode()
    chunks, named = f"$O.{NAMES.media}.C.{stored.ident}", f"$O.{NAMES.media}.M.{meta}"
    before = await place.connection.api_request(f"STREAM.INFO.{STREAM}")
    push = {"stream_name": STREAM, "config": {"deliver_subject": "_INBOX_s1.x", "ack_policy": "none"}}
    last = msgspec.json.encode({"last_by_subj": chunks})
    for subject, payload in [
        (f"$JS.API.DIRECT.GET.{STREAM}", last),
        (f"$JS.API.DIRECT.GET.{STREAM}.{chunks}", b""),
        (f"$JS.API.STREAM.MSG.GET.{STREAM}", last),
        (f"$JS.API.CONSUMER.CREATE.{STREAM}", msgspec.json.encode(push)),
        (f"$JS.API.CONSUMER.CREATE.{STREAM}.thief", msgspec.json.encode(push)),
        (f"$JS.API.CONSUMER.DURABLE.CREATE.{STREAM}.thief", msgspec.json.encode(push)),
        (f"$JS.API.STREAM.INFO.{STREAM}", b""),
        (f"$JS.API.STREAM.PURGE.{STREAM}", b""),
        (f"$JS.API.STREAM.MSG.DELETE.{STREAM}", b'{"seq":1}'),
        ("$JS.API.STREAM.NAMES", b""),
        (chunks, b"other bytes"),
        (named, b'{"deleted":true}'),
    ]:
        await s1.forbidden(subject, payload)
    assert (await place.connection.api_request(f"STREAM.INFO.{STREAM}"))["state"] == before["state"]
    assert await place.store.get_info("s2/in/x") == stored


@BOTH
async def test_the_object_store_of_nats_py_is_closed(place: Place, s1: Sandbox) -> None:
    await place.store.put("s2/in/x", one(SECRET))
    js = s1.nc.jetstream(timeout=0.5)
    with pytest.raises(NatsError):
        await js.object_store(NAMES.media)
    with pytest.raises(NatsError):
        await TheirStore(NAMES.media, STREAM, js).get("s2/in/x")


@BOTH
async def test_nobody_listens_to_the_requests_and_answers_of_others(place: Place, s1: Sandbox) -> None:
    await place.store.put("s2/in/x", one(SECRET))
    heard = []

    async def hear(msg: Msg) -> None:
        heard.append(msg.data)

    subjects = [
        "wechat.svc.media.get.s2", "wechat.svc.media.get.*", "wechat.svc.media.put.>", "wechat.>", ">",
        "_INBOX_s2.>", "*.x", "_INBOX.>", "*.>", f"$O.{NAMES.media}.>",
    ]  # fmt: skip
    for subject in subjects:
        await s1.nc.subscribe(subject, cb=hear)
    await s1.nc.flush()
    await until(lambda: len(s1.errors) == len(subjects), "all are refused")
    other = await Sandbox("s2").connect(place.url)
    assert await other.get("s2/in/x") == SECRET
    await other.nc.close()
    await s1.nc.flush()
    assert heard == []


@BOTH
async def test_the_adapter_writes_to_inboxes_only(place: Place, s1: Sandbox) -> None:
    """The server does not check a publisher's reply subject: the adapter must not be the hand of a sandbox.

    Between accounts the server puts an inbox of its own in the place of the reply.
    """
    await place.store.put("s1/in/x", one(b'{"text":"not mine"}'))
    meta = base64.urlsafe_b64encode(b"s2/in/x").decode()
    replies = [
        "wechat.out.s2", "wechat.in.s2", "wechat.ctl.bind", f"$O.{NAMES.media}.M.{meta}", f"$O.{NAMES.media}.C.x",
        f"$KV.{NAMES.bindings}.b1", "$JS.API.STREAM.DELETE." + STREAM, "wechat.svc.media.get.s2", "x_INBOX.x",
        "_INBOX", "_INBOXES", "_INBOX_s1." + "x" * 300, "_INBOX_s2.x",
    ]  # fmt: skip
    watch = await nats.connect(place.url, user="adapter", password="adapter")
    seen = []

    async def see(msg: Msg) -> None:
        seen.append(msg.subject)

    for reply in replies:
        await watch.subscribe(reply, cb=see)
    await watch.flush()
    with capture_logs() as logs:
        for reply in replies:
            ask = b'{"object":"s1/in/x"}'
            await s1.nc.publish("wechat.svc.media.get.s1", ask, reply=reply)
            headers = {H_UPLOAD: "x", H_LAST: "true"}
            await s1.nc.publish("wechat.svc.media.put.s1", b"", reply=reply, headers=headers)
        assert await s1.get("s1/in/x")
        if not place.accounts:
            refused = partial(place.metrics.value, "service_refusals_total", reason="reply")
            await until(lambda: refused() == 2 * len(replies), "all are seen")
    await watch.flush()
    assert [subject for subject in seen if subject != "wechat.svc.media.get.s2"] == []
    told = [(one["event"], one["sandbox"]) for one in logs]
    assert told == ([] if place.accounts else [("service.reply_refused", "s1")])
    await watch.close()


# bringing ------------------------------------------------------------------------------------------------


@BOTH
async def test_a_sandbox_brings_media(place: Place, s1: Sandbox) -> None:
    assert place.connection.nc is not None
    theirs = await place.connection.nc.jetstream().object_store(NAMES.media)
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
    tasks = []
    for _ in range(2):
        connection = ManagedConnection(
            Settings(nats_url=(place.url,), nats_user="adapter", nats_password="adapter"), "other"
        )
        publisher = Publisher(connection, SystemClock(), place.metrics)
        offer(connection, ObjectStore(connection, publisher, NAMES.media), place.metrics)
        tasks += [place.group.create_task(connection.run()), place.group.create_task(publisher.run())]
        await connection.wait_connected(PATIENCE_S)
    for offset in range(0, 400_000, 40_000):
        last = {"last": "true"} if offset == 360_000 else {}
        answers = await asyncio.gather(
            *(s1.ask_put("u", BYTES[offset : offset + 40_000], offset, **last) for _ in range(3))
        )
        assert [media_of(answer).size for answer in answers] == [offset + 40_000] * 3
    assert await s1.get("s1/out/u") == BYTES[:400_000]
    for task in tasks:
        task.cancel()


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
    await place.connection.api_request(f"STREAM.MSG.DELETE.{STREAM}", {"seq": second, "no_erase": True}, PATIENCE_S)
    again = await s1.ask_put("u", BYTES[262_144:300_000], 262_144, last="true", sha256=made.sha256)
    assert media_of(again) == made
    again = await s1.ask_put("u", BYTES[262_144:300_000], 262_144, last="true", name="other.bin")
    assert media_of(again) == made, "it is the object that is told"


async def sequence_after(place: Place, subject: str, after: int) -> int:
    """The sequence of the next piece."""
    found = await direct_get_one(place.connection, STREAM, {"seq": after + 1, "next_by_subj": subject, "batch": 1})
    assert found is not None
    return found.seq


async def test_a_repeated_picture_has_its_size_however_small_its_pieces_were(s1: Sandbox) -> None:
    """The size of a JPEG may stand behind its first piece."""
    jpeg = b"\xff\xd8\xff\xe1\xc3\x50" + bytes(49_998) + JPEG_SIZE
    made = await s1.put("u", jpeg, cut=PIECE_MIN)
    assert (made.width, made.height) == (640, 480)
    start = len(jpeg) // PIECE_MIN * PIECE_MIN
    assert media_of(await s1.ask_put("u", jpeg[start:], start, last="true")) == made


async def test_a_repeated_last_piece_with_another_digest_changes_nothing(s1: Sandbox) -> None:
    await s1.put("u", BYTES[:50_000])
    again = await s1.ask_put("u", BYTES[:50_000], last="true", sha256="0" * 64)
    assert code_of(again) == "400"
    assert await s1.get("s1/out/u") == BYTES[:50_000]


async def test_wrong_bytes_can_be_brought_again(s1: Sandbox) -> None:
    assert code_of(await s1.ask_put("u", b"wrong", last="true", sha256=hashlib.sha256(b"right").hexdigest())) == "400"
    right = await s1.ask_put("u", b"right", last="true", sha256=hashlib.sha256(b"right").hexdigest())
    assert media_of(right).size == 5


@BOTH
async def test_uploads_of_two_sandboxes_do_not_meet(place: Place, s1: Sandbox) -> None:
    other: Any = await Sandbox("s2").connect(place.url)
    made = await asyncio.gather(s1.put("u", BYTES[:300_000]), other.put("u", BYTES[300_000:650_000]))
    assert [media.object for media in made] == ["s1/out/u", "s2/out/u"]
    assert await s1.get("s1/out/u") == BYTES[:300_000]
    assert await other.get("s2/out/u") == BYTES[300_000:650_000]
    with pytest.raises(LookupError, match="404"):
        await s1.get("s2/out/u")
    await other.nc.close()
