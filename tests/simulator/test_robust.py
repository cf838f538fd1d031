"""Whatever a client sends, the simulator answers as iLink would, and goes on."""

import asyncio
from typing import Any

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter.simulator import Shown, Simulator
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
@settings(max_examples=40, deadline=None)
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


async def test_json_that_is_nested_too_deeply_is_malformed(client: Client) -> None:
    response = await client.http.post(
        f"{client.sim.url}/ilink/bot/sendmessage",
        content=b'{"msg":' + b"[" * 100_000,
        headers=headers(client.bot.token),
    )

    assert response.json()["ret"] == -2


async def test_listeners_hear_what_appears_on_a_phone(client: Client) -> None:
    heard: list[tuple[str, str]] = []

    def hear(user: str, shown: Shown) -> None:
        heard.append((user, shown.text))

    client.sim.listen(hear)
    client.sim.say(client.bot.user, "hello")

    await client.send("one")
    await client.send("two")

    assert heard == [(client.bot.user, "one"), (client.bot.user, "two")]


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


async def test_the_same_seed_makes_the_same_ids(make: MakeClient) -> None:
    first, second = await make(seed=3), await make(seed=3)
    assert first.bot == second.bot

    assert first.sim.say(first.bot.bot, "x").message_id == second.sim.say(second.bot.bot, "x").message_id
