"""The shapes of messages that users' phones produce."""

import hashlib
import json
from typing import Any

import pytest

from adapter.simulator import SimulatorError
from tests.simulator.client import Client

Json = dict[str, Any]


async def received(client: Client, kind: str, **how: Any) -> tuple[Json, str]:
    """The message as a client decodes it, and as it stood on the wire."""
    client.sim.say_kind(client.bot.user, kind, "words", **how)
    response = await client.post("getupdates", {"get_updates_buf": ""})
    (message,) = response.json()["msgs"]
    assert isinstance(message, dict)
    return message, response.text


async def test_s21_the_fields_that_make_each_kind(client: Client) -> None:
    async def message(kind: str) -> Json:
        return (await received(client, kind))[0]

    async def types(kind: str) -> list[int]:
        return [item["type"] for item in (await message(kind))["item_list"]]

    assert await types("multi_item") == [1, 1]
    assert [await types(kind) for kind in ("image", "voice", "file", "video")] == [[2], [3], [4], [5]]
    assert await types("text_and_image") == [1, 2]
    assert await types("image_and_text") == [2, 1]
    assert await types("text_and_file") == [1, 4]
    assert await types("several_images") == [2, 2, 2]
    assert await types("all_items") == [1, 2, 3, 4, 5]
    assert (await message("unknown_item"))["item_list"][0]["type"] == 99
    assert "context_token" not in await message("no_context_token")
    assert "message_id" not in await message("no_message_id")
    assert (await message("zero_message_id"))["message_id"] == 0
    assert (await message("empty_message_id"))["message_id"] == ""
    assert (await message("bot_echo"))["message_type"] == 2
    assert (await message("empty_text"))["item_list"][0]["text_item"]["text"] == ""
    assert "text" not in (await message("voice"))["item_list"][0]["voice_item"]
    nested = (await message("voice_nested_transcript"))["item_list"][0]["voice_item"]
    assert nested["text_item"]["text"] == "words"
    assert (await message("voice_transcript"))["item_list"][0]["voice_item"]["text"] == "words"
    assert "👩‍👩‍👧" in (await message("emoji"))["item_list"][0]["text_item"]["text"]
    assert (await message("no_items"))["item_list"] == []


async def test_s21_numeric_ids_above_2_to_the_53_stand_as_digits_on_the_wire(client: Client) -> None:
    _, text = await received(client, "big_id")

    assert '"message_id":18446744073709551615' in text


async def test_s21_ids_are_numbers_in_messages_and_quotes_unless_a_setting_says_otherwise(client: Client) -> None:
    """Clients that decode an int64 lose a message whose id is a string."""
    for style, expected in (("number", [int] * 4), ("string", [str] * 4), ("alternate", [str, int, str, int])):
        client.sim.configure(inbound_id_style=style)
        client.sim.add_bot(client.bot.user)
        said = [client.sim.say(client.bot.user, "hello") for _ in range(3)]
        client.sim.repeat(client.bot.user, said[0].message_id, "message_id")
        raw = [entry.raw for entry in client.sim.world.find(client.bot.user).log]
        assert [type(json.loads(message)["message_id"]) for message in raw] == expected

        client.sim.say_kind(client.bot.user, "quote_svr_id", of=said[0].message_id)
        (item,) = json.loads(client.sim.world.find(client.bot.user).log[-1].raw)["item_list"]
        assert isinstance(item["ref_msg"]["svr_id"], expected[0])


SAID_BY_BOT = "第一句。second sentence 😀, and ok ok ok at the end"


async def quotable(client: Client) -> tuple[str, str]:
    """Ids of a message of the user and of one that the bot has sent."""
    said = client.sim.say(client.bot.user, "hello world")
    await client.follow()
    return said.message_id, str((await client.send(SAID_BY_BOT))["message_id"])


async def quote(client: Client, kind: str, **how: Any) -> Json:
    client.sim.say_kind(client.bot.user, kind, "words", **how)
    (message,) = await client.follow()
    (item,) = message["item_list"]
    assert isinstance(item["ref_msg"], dict)
    return item["ref_msg"]


async def test_s21_a_quote_refers_to_a_message_of_the_user_or_of_the_bot(client: Client) -> None:
    for message_id, text in zip(await quotable(client), ("hello world", SAID_BY_BOT), strict=True):
        full = await quote(client, "quote_full", of=message_id)
        assert full["title"] == text
        assert full["message_item"]["text_item"]["text"] == text
        references = [full["message_item"]["msg_id"]]
        references += [
            (await quote(client, f"quote_type_{n}", of=message_id))["message_item"]["msg_id"] for n in (8, 0)
        ]
        references += [
            (await quote(client, kind, of=message_id))["svr_id"] for kind in ("quote_svr_id", "quote_partial")
        ]
        assert [str(reference) for reference in references] == [message_id] * 5


@pytest.mark.parametrize(
    ("part", "nth"),
    [
        ("第一句", 0),
        ("ok", 2),
        (SAID_BY_BOT, 0),
        ("e", 3),
    ],
)
async def test_s21_a_partial_quote_is_found_again_by_its_ends(client: Client, part: str, nth: int) -> None:
    _, message_id = await quotable(client)

    partial = (await quote(client, "quote_partial", of=message_id, part=part, nth=nth))["partial_text"]

    assert find_part(SAID_BY_BOT, partial) == part
    assert partial["quotemd5"] == hashlib.md5(part.encode()).hexdigest()


def find_part(text: str, partial: Json) -> str:
    """The reading of a quote's part that counts over the whole text."""
    start = nth_place(text, partial["start"], partial["startindex"])
    end = nth_place(text, partial["end"], partial["endindex"])
    return text[start : end + len(partial["end"])]


def nth_place(text: str, part: str, nth: int) -> int:
    place = text.index(part)
    for _ in range(nth):
        place = text.index(part, place + len(part))
    return place


async def test_s21_what_cannot_be_quoted_is_refused(client: Client) -> None:
    message_id, _ = await quotable(client)
    without_id = client.sim.say_kind(client.bot.user, "zero_message_id")
    impossible: list[Json] = [{"of": "0815"}, {"of": without_id.client_id}, {"of": message_id, "part": "absent"}]
    for how in impossible:
        with pytest.raises(SimulatorError):
            client.sim.say_kind(client.bot.user, "quote_partial", **how)


async def test_s21_one_call_over_http_makes_an_image_or_a_quote(client: Client) -> None:
    async def say_kind(**arguments: Any) -> Json:
        arguments["to"] = client.bot.user
        response = await client.http.post(f"{client.sim.admin_url}/say_kind", json=arguments)
        assert response.status_code == 200, response.text
        (message,) = await client.follow()
        assert isinstance(message, dict)
        return message

    image = await say_kind(kind="image")
    quoting = await say_kind(kind="quote_svr_id", of=str(image["message_id"]), text="this", on="file")

    assert image["item_list"][0]["image_item"]["media"]["full_url"].startswith(client.sim.cdn_url)
    assert str(quoting["item_list"][0]["ref_msg"]["svr_id"]) == str(image["message_id"])


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
    """The format allows it, whatever the product does."""
    other = "o9cq80Other@im.wechat"
    client.sim.say(client.bot.bot, "hello", from_user_id=other)

    assert (await client.poll())["msgs"][0]["from_user_id"] == other
    assert (await client.send("hi", to_user_id=other))["ret"] == 0
    assert [shown.text for shown in client.sim.phone(other)] == ["hi"]
