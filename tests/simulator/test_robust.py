"""Whatever a client sends, the simulator answers as iLink would, and goes on."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from adapter.simulator import FaultRule
from tests.simulator.client import Client, headers
from tests.simulator.conftest import MakeClient

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
