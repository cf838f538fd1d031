"""S21: the shapes of messages that users' phones produce."""

import hashlib
import json
from typing import Any

import pytest

from adapter.simulator import KINDS, SimulatorError
from tests.simulator.client import Client

Json = dict[str, Any]


async def received(client: Client, kind: str) -> tuple[Json, str]:
    """The message as a client decodes it, and as it stood on the wire."""
    client.sim.say_kind(client.bot.user, kind, "words")
    response = await client.post("getupdates", {"get_updates_buf": ""})
    (message,) = response.json()["msgs"]
    assert isinstance(message, dict)
    return message, response.text


@pytest.mark.parametrize("kind", sorted(KINDS))
async def test_s21_every_kind_is_delivered_as_json(client: Client, kind: str) -> None:
    message, _ = await received(client, kind)

    assert message["from_user_id"] == client.bot.user
    assert isinstance(message["item_list"], list)


async def test_s21_the_fields_that_make_each_kind(client: Client) -> None:
    async def message(kind: str) -> Json:
        return (await received(client, kind))[0]

    assert [item["type"] for item in (await message("multi_item"))["item_list"]] == [1, 1]
    assert (await message("unknown_item"))["item_list"][0]["type"] == 99
    assert "context_token" not in await message("no_context_token")
    assert "message_id" not in await message("no_message_id")
    assert (await message("zero_message_id"))["message_id"] == 0
    assert (await message("empty_message_id"))["message_id"] == ""
    assert (await message("bot_echo"))["message_type"] == 2
    assert (await message("empty_text"))["item_list"][0]["text_item"]["text"] == ""
    assert (await message("voice_transcript"))["item_list"][0]["voice_item"]["text"] == "words"
    assert "👩‍👩‍👧" in (await message("emoji"))["item_list"][0]["text_item"]["text"]
    assert (await message("no_items"))["item_list"] == []


async def test_s21_numeric_ids_above_2_to_the_53_stand_as_digits_on_the_wire(client: Client) -> None:
    _, text = await received(client, "big_id")

    assert '"message_id":18446744073709551615' in text


async def test_s21_four_byte_utf_8_is_not_escaped(client: Client) -> None:
    _, text = await received(client, "emoji")

    assert "😀" in text
    assert "𠮷" in text


async def test_s21_quotes_in_their_historical_shapes(client: Client) -> None:
    async def reference(kind: str) -> Json:
        message, _ = await received(client, kind)
        found = message["item_list"][0]["ref_msg"]
        assert isinstance(found, dict)
        return found

    assert (await reference("quote_full"))["message_item"]["text_item"]["text"] == "hello world"
    assert (await reference("quote_type_8"))["message_item"]["type"] == 8
    assert "text_item" not in (await reference("quote_type_0"))["message_item"]
    assert set(await reference("quote_svr_id")) == {"svr_id"}
    part = (await reference("quote_partial"))["partial_text"]
    assert part["quotemd5"] == hashlib.md5(b"world").hexdigest()


async def test_s21_a_message_without_a_context_token_still_opens_the_window(client: Client) -> None:
    earlier = client.sim.say(client.bot.user, "first").context_token
    client.sim.advance(23 * 3600)
    client.sim.say_kind(client.bot.user, "no_context_token")
    client.sim.advance(23 * 3600)

    assert (await client.send(context_token=earlier))["ret"] == 0


async def test_s21_an_echo_of_the_bot_does_not_open_the_window(client: Client) -> None:
    client.sim.say_kind(client.bot.user, "bot_echo")

    assert (await client.send(context_token="any"))["ret"] == -2


async def test_raw_messages_go_out_exactly_as_they_are(client: Client) -> None:
    raw = {"message_id": None, "surprise": [1, {"deep": True}], "from_user_id": client.bot.user}
    client.sim.inject(client.bot.bot, raw, fill=False)

    assert (await client.poll())["msgs"] == [raw]


async def test_messages_are_filled_up_and_null_leaves_a_field_out(client: Client) -> None:
    client.sim.inject(client.bot.bot, {"seq": 77, "session_id": None, "extra": json.loads("1e3")})

    (message,) = (await client.poll())["msgs"]
    assert message["seq"] == 77
    assert message["extra"] == 1000
    assert "session_id" not in message
    assert message["client_id"]


async def test_a_message_may_come_from_another_user(client: Client) -> None:
    """The format allows it, whatever the product does (1.3)."""
    other = "o9cq80Other@im.wechat"
    client.sim.say(client.bot.bot, "hello", from_user_id=other)

    assert (await client.poll())["msgs"][0]["from_user_id"] == other
    assert (await client.send("hi", to_user_id=other))["ret"] == 0
    assert [shown.text for shown in client.sim.phone(other)] == ["hi"]


def test_an_unknown_kind_is_refused(client: Client) -> None:
    with pytest.raises(SimulatorError):
        client.sim.say_kind(client.bot.bot, "nonsense")
