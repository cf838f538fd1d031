"""Whatever a client sends, the simulator answers as iLink would, and goes on."""

import asyncio
import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter.simulator import FaultRule, Shown, Simulator
from tests.simulator.client import FAST, Client, headers, texts
from tests.simulator.conftest import MakeClient

ENDPOINTS = ("getupdates", "sendmessage", "getconfig", "sendtyping", "msg/notifystart", "get_bot_qrcode")
KEYS = st.sampled_from(
    [
        *("msg", "to_user_id", "item_list", "type", "text_item", "text", "client_id", "context_token"),
        *("message_type", "base_info", "get_updates_buf", "ilink_user_id", "typing_ticket", "status"),
        "local_token_list",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2**64 - 1) | st.text(max_size=5) | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


@given(st.lists(st.tuples(st.sampled_from(ENDPOINTS), st.dictionaries(KEYS, VALUES)), max_size=8))
@settings(max_examples=40)
def test_no_json_object_breaks_an_endpoint(calls: list[tuple[str, dict[str, Any]]]) -> None:
    async def run() -> None:
        async with Simulator(FAST) as sim, httpx.AsyncClient() as http:
            sim.configure(hold_ms=0)
            bot = sim.add_bot()
            sim.say(bot.user, "hello")
            for endpoint, body in calls:
                response = await http.post(f"{sim.url}/ilink/bot/{endpoint}", json=body, headers=headers(bot.token))
                assert response.status_code == 200
                assert isinstance(response.json(), dict)
            assert texts(await Client(sim, bot, http).follow()) in (["hello"], [])

    asyncio.run(run())


ODD: list[Any] = [None, True, -1, 2**64, 1e300, "", "\0", [[]], [{}], {"x": []}]
MEDIA = {"encrypt_query_param": "x", "aes_key": "MDAxMTIyMzM0NDU1NjY3Nzg4OTlhYWJiY2NkZGVlZmY=", "encrypt_type": 1}
ITEMS = [
    {"type": 1, "text_item": {"text": "hi"}},
    {"type": 2, "image_item": {"media": MEDIA, "mid_size": 16}},
    {"type": 3, "voice_item": {"media": MEDIA, "playtime": 1}},
    {"type": 4, "file_item": {"media": MEDIA, "file_name": "a.txt", "len": "14"}},
    {"type": 5, "video_item": {"media": MEDIA, "video_size": 16}},
    {"type": 11, "is_completed": False, "tool_call_start_item": {"tool_name": "x", "tool_call_id": "1"}},
]


def whole_bodies(user: str, token: str, ticket: str) -> list[tuple[str, dict[str, Any]]]:
    """A good request to every endpoint, with all the fields that there are."""
    message = {
        "from_user_id": "",
        "to_user_id": user,
        "client_id": "c1",
        "message_type": 2,
        "message_state": 2,
        "context_token": token,
        "run_id": "r1",
    }
    upload = {
        "filekey": "0f1e2d3c4b5a69788796a5b4c3d2e1f0",
        "media_type": 1,
        "to_user_id": user,
        "rawsize": 14,
        "rawfilemd5": "7d36e586ba5d45ede81619df48a3d898",
        "filesize": 16,
        "no_need_thumb": False,
        "thumb_rawsize": 14,
        "thumb_rawfilemd5": "7d36e586ba5d45ede81619df48a3d898",
        "thumb_filesize": 16,
        "aeskey": "00112233445566778899aabbccddeeff",
    }
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("getupdates", {"get_updates_buf": "", "sync_buf": "", "timeout": 0}),
        ("sendmessage", {"msg": message | {"item_list": ITEMS[:1]}}),
        *(("sendmessage", {"msg": {"to_user_id": user, "item_list": [item]}}) for item in ITEMS[1:]),
        ("getuploadurl", upload),
        ("getconfig", {"ilink_user_id": user, "context_token": token}),
        ("sendtyping", {"ilink_user_id": user, "typing_ticket": ticket, "status": 1}),
        ("msg/notifystart", {}),
        ("msg/notifystop", {}),
        ("get_bot_qrcode?bot_type=3", {"local_token_list": ["x"]}),
    ]
    base_info = {"channel_version": "2.4.9", "bot_agent": "OpenClaw"}
    return [(endpoint, body | {"base_info": base_info}) for endpoint, body in bodies]


def spoilt(value: Any) -> Iterator[Any]:
    """`value` with each of its parts, one at a time, missing or of every other type."""
    yield from ODD
    if isinstance(value, dict):
        for key, part in value.items():
            yield {name: other for name, other in value.items() if name != key}
            for odd in spoilt(part):
                yield value | {key: odd}
    if isinstance(value, list):
        for place, part in enumerate(value):
            for odd in spoilt(part):
                yield [*value[:place], odd, *value[place + 1 :]]


@pytest.mark.parametrize("endpoint", [f"{n}-{name}" for n, (name, _) in enumerate(whole_bodies("", "", ""))])
async def test_no_type_of_any_field_breaks_an_endpoint(make: MakeClient, endpoint: str) -> None:
    client = await make(hold_ms=0, quota=0)
    token = client.sim.say(client.bot.user, "hello").context_token
    await client.follow()
    ticket = (await client.call("getconfig", {"ilink_user_id": client.bot.user}))["typing_ticket"]
    name, body = whole_bodies(client.bot.user, token, ticket)[int(endpoint.partition("-")[0])]

    for sent in spoilt(body):
        response = await client.http.post(
            f"{client.sim.url}/ilink/bot/{name}", json=sent, headers=headers(client.bot.token)
        )
        assert response.status_code == 200, sent
        assert response.content == b"" or isinstance(response.json(), dict), sent


async def test_json_that_is_nested_too_deeply_is_malformed(client: Client) -> None:
    response = await client.http.post(
        f"{client.sim.url}/ilink/bot/sendmessage",
        content=b'{"msg":' + b"[" * 100_000,
        headers=headers(client.bot.token),
    )

    assert response.json()["ret"] == -2


def request(client: Client, body: bytes, *lines: str, version: str = "1.1") -> bytes:
    """A poll as it stands on the wire, with these header lines and those that are always there."""
    usual = [f"{name}: {value}" for name, value in headers(client.bot.token).items()]
    head = [f"POST /ilink/bot/getupdates HTTP/{version}", *usual, *lines]
    return "\r\n".join([*head, "", ""]).encode() + body


POLL = b'{"get_updates_buf":"","base_info":{"channel_version":"2.4.9"}}'
LENGTH = f"Content-Length: {len(POLL)}"
CHUNKED = f"{len(POLL):x}\r\n".encode() + POLL + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("version", "lines", "body"),
    [
        ("1.1", ["Host: x", LENGTH, "Connection: close"], POLL),
        ("1.0", [LENGTH], POLL),
        ("1.1", ["host: x", LENGTH.lower(), "connection: close"], POLL),
        ("1.1", ["Host: x", "Transfer-Encoding: chunked", "Connection: close"], CHUNKED),
        (
            "1.1",
            ["Host: x", "Content-Encoding: gzip", "Connection: close", f"Content-Length: {len(gzip.compress(POLL))}"],
            gzip.compress(POLL),
        ),
        ("1.1", ["Host: x", LENGTH, "Accept-Encoding: gzip, br", "Connection: close"], POLL),
    ],
    ids=["plain", "HTTP/1.0 without a host", "lower case", "chunked", "gzip", "accepts gzip"],
)
async def test_a_request_may_be_written_in_many_ways(
    client: Client, version: str, lines: list[str], body: bytes
) -> None:
    client.sim.say(client.bot.user, "hello")

    reader, writer = await asyncio.open_connection("127.0.0.1", client.sim.port)
    writer.write(request(client, body, *lines, version=version))
    head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()

    assert head.startswith(f"HTTP/{version} 200".encode())
    assert texts(json.loads(answer)["msgs"]) == ["hello"]
    assert client.sim.violations() == []


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 200), ("deflate", 200), ("br", 400)])
async def test_a_body_that_cannot_be_unpacked_is_malformed(
    client: Client, encoding: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told to its client, and leaves no traceback behind."""
    response = await client.http.post(
        f"{client.sim.url}/ilink/bot/getupdates",
        content=POLL,
        headers=headers(client.bot.token) | {"Content-Encoding": encoding},
    )
    await client.poll()  # what aiohttp says of a request, it says after its answer

    assert response.status_code == status
    assert status == 400 or response.json()["ret"] == -2
    assert [record for record in caplog.records if record.exc_info] == []


async def test_a_client_is_asked_to_go_on_with_its_body(client: Client) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.sim.port)
    writer.write(request(client, b"", "Host: x", LENGTH, "Expect: 100-continue", "Connection: close"))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"

    writer.write(POLL)

    assert (await reader.read()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_connection_is_kept_for_the_next_request(client: Client) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.sim.port)
    for text in ("one", "two", "three"):
        client.sim.say(client.bot.user, text)
        writer.write(request(client, POLL, "Host: x", LENGTH))
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        assert texts(json.loads(await reader.readexactly(length))["msgs"]) == [text]
    writer.close()


@pytest.mark.parametrize("junk", [b"", b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET", b"POST / HTTP/9.9\r\n\r\n"])
async def test_junk_on_a_connection_does_no_harm(client: Client, junk: bytes) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", client.sim.port)
    writer.write(junk)
    writer.close()
    client.sim.say(client.bot.user, "hello")

    assert texts(await client.follow()) == ["hello"]


async def test_a_download_that_is_given_up_does_no_harm(client: Client) -> None:
    client.sim.say_media(client.bot.user, "file", sample="blob", size=20 * 2**20)
    (message,) = await client.follow()
    url = message["item_list"][0]["file_item"]["media"]["full_url"]

    async with client.http.stream("GET", url) as response:
        async for _ in response.aiter_bytes(1000):
            break

    assert (await client.http.get(url)).status_code == 200


async def test_listeners_are_called_with_what_appears_on_a_phone(client: Client) -> None:
    shown_texts: list[tuple[str, str]] = []

    def on_shown(user: str, shown: Shown) -> None:
        shown_texts.append((user, shown.text))

    client.sim.listen(on_shown)
    client.sim.say(client.bot.user, "hello")

    await client.send("one")
    await client.send("two")

    assert shown_texts == [(client.bot.user, "one"), (client.bot.user, "two")]


async def test_records_are_bounded(make: MakeClient) -> None:
    client = await make(hold_ms=0, records_per_bot=20, sends_per_bot=200, quota=0, history=20, batch_max=10)
    client.sim.say(client.bot.user, "hello")
    for _ in range(60):
        client.sim.say(client.bot.user, "hello")
        await client.follow()
    for _ in range(205):
        await client.send()

    view = client.sim.polls(client.bot.bot)
    assert (len(view.records), view.total) == (20, 60)
    assert len(client.sim.calls(client.bot.bot, "getupdates")[0].times_ms) == 20
    assert len(client.sim.sends(client.bot.bot)) == len(client.sim.phone(client.bot.user)) == 200
    assert len(client.sim.inbound(client.bot.bot)) <= 21
    assert client.sim.stats().shown == 205


async def test_business_time_can_be_frozen(make: MakeClient) -> None:
    client = await make(frozen_at_ms=1_789_000_000_000)
    assert client.sim.say(client.bot.user, "hello").create_time_ms == 1_789_000_000_000

    client.sim.advance(1.5)

    assert client.sim.now_ms == 1_789_000_001_500


async def test_what_becomes_due_on_the_way_happens_at_its_own_time(make: MakeClient) -> None:
    client = await make(frozen_at_ms=1_789_000_000_000, token_death_delay_s=29)
    client.sim.say(client.bot.user, "hello")
    await client.call("msg/notifystart")
    for delay_s in (120, 60):
        client.sim.set_fault(FaultRule(fault="F15", count=1, params={"delay_s": delay_s}))
        await client.send(f"after {delay_s} s")
    client.sim.add_bot(client.bot.user)

    client.sim.advance(600)

    shown = [(shown.text, shown.at_ms) for shown in client.sim.phone(client.bot.user)]
    assert shown == [("after 60 s", 1_789_000_060_000), ("after 120 s", 1_789_000_120_000)]
    assert client.sim.online(client.bot.bot).timeline[-1] == (1_789_000_029_000, False)
    assert client.sim.now_ms == 1_789_000_600_000


async def test_with_frozen_time_lifetimes_end_by_advance_only(make: MakeClient) -> None:
    client = await make(frozen_at_ms=1_789_000_000_000, token_death_delay_s=0.03, qr_ttl_s=0.03)
    message = client.sim.say(client.bot.user, "hello")
    client.sim.repeat(client.bot.bot, message.message_id, delay_s=0.03)
    await client.call("get_bot_qrcode")
    client.sim.add_bot(client.bot.user)
    await asyncio.sleep(0.05)

    def states() -> tuple[int, int, str]:
        return client.sim.stats().dead, len(client.sim.inbound(client.bot.bot)), client.sim.qrcodes()[0].status

    assert states() == (0, 1, "wait")
    for _ in range(3):
        client.sim.advance(0.01)
    assert states() == (1, 2, "expired")


async def test_the_same_seed_makes_the_same_ids(make: MakeClient) -> None:
    first, second = await make(seed=3), await make(seed=3)
    assert first.bot == second.bot

    assert first.sim.say(first.bot.bot, "x").message_id == second.sim.say(second.bot.bot, "x").message_id
