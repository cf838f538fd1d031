"""What is sent, and what the phone shows."""

import asyncio
from typing import Any

import pytest

from tests.simulator.client import Client
from tests.simulator.conftest import MakeClient

DAY_S = 24 * 3600


@pytest.fixture
async def talking(client: Client) -> Client:
    """A client whose user has just written."""
    client.sim.say(client.bot.user, "hello")
    return client


async def test_s10_an_accepted_send_has_a_large_id_as_string_and_number_by_turns(talking: Client) -> None:
    answers = [await talking.send() for _ in range(4)]

    assert {answer["ret"] for answer in answers} == {0}
    assert all(int(answer["message_id"]) > 2**53 for answer in answers)
    assert {type(answer["message_id"]) for answer in answers} == {int, str}
    assert len({str(answer["message_id"]) for answer in answers}) == 4
    assert talking.phone() == ["hi"] * 4


@pytest.mark.parametrize(
    ("changes", "ret", "errmsg"),
    [
        pytest.param({"item_list": []}, -2, "unknown error", id="no items"),
        pytest.param({"item_list": None}, -2, "unknown error", id="no item list"),
        pytest.param({"item_list": [{"type": 1}]}, -2, "unknown error", id="item without payload"),
        pytest.param(
            {"item_list": [{"type": True, "text_item": {"text": "x"}}]}, -2, "unknown error", id="type is no number"
        ),
        pytest.param(
            {"item_list": [{"type": 1, "text_item": {"text": "x" * 16_385}}]}, -2, "prepare failed", id="long"
        ),
        pytest.param(
            {"item_list": [{"type": 1, "text_item": {"text": "你" * 5_462}}]}, -2, "prepare failed", id="cjk"
        ),
        pytest.param({"to_user_id": "nobody"}, -3, None, id="no suffix"),
        pytest.param({"to_user_id": "o9cq80nobody@im.wechat"}, -3, None, id="nobody"),
        pytest.param({"to_user_id": None}, -3, None, id="no user"),
    ],
)
async def test_s10_refusals(talking: Client, changes: dict[str, Any], ret: int, errmsg: str | None) -> None:
    answer = await talking.send(**changes)

    assert (answer["ret"], answer.get("errmsg")) == (ret, errmsg)
    assert talking.phone() == []
    assert talking.sim.stats().refused == 1


async def test_s10_exactly_the_greatest_length_passes(talking: Client) -> None:
    assert (await talking.send("x" * 16_384))["ret"] == 0


async def test_the_phone_may_cut_what_the_answer_accepts(make: MakeClient) -> None:
    client = await make(cut_chars=2000)
    client.sim.say(client.bot.user, "hello")
    assert (await client.send("好" * 2001))["ret"] == 0
    client.sim.configure(cut_chars=0, cut_bytes=2048)
    assert (await client.send("好" * 2001))["ret"] == 0
    assert (await client.send("x" * 2048))["ret"] == 0

    assert client.phone() == ["好" * 2000, "好" * 682, "x" * 2048]
    assert [len(send.text) for send in client.sim.sends(client.bot.bot)] == [2001, 2001, 2048]


async def test_the_phone_takes_what_is_less_than_something_for_a_tag(talking: Client) -> None:
    shown = {
        "CPU<80% is **normal**\nnext > last": "CPU\nnext > last",
        "`a < b` ``c ` <`` < d": "`a < b` ``c ` <`` ",
        "1. ```\n   a < b\n   ```\n<b>c</b>\n~~~\nd < e": "1. ```\n   a < b\n   ```\n\n~~~\nd < e",
        "a ＜ b &lt; c": "a ＜ b &lt; c",
    }
    for text in shown:
        await talking.send(text)
    assert talking.phone() == list(shown.values())


async def test_s10_user_ids_are_case_sensitive(talking: Client) -> None:
    assert (await talking.send(to_user_id=talking.bot.user.lower()))["ret"] == -3


async def test_s10_nothing_can_be_sent_before_the_user_has_written(client: Client) -> None:
    answer = await client.send()

    assert answer == {"ret": -2, "errmsg": "prepare failed"}
    assert client.sim.sends(client.bot.bot)[0].why == "no_conversation"


async def test_s10_the_eleventh_send_is_refused_until_the_user_writes(talking: Client) -> None:
    answers = [(await talking.send())["ret"] for _ in range(11)]
    assert answers == [0] * 10 + [-2]
    assert talking.sim.stats().violations["quota_exceeded"] == 1

    talking.sim.say(talking.bot.user, "go on")
    assert (await talking.send())["ret"] == 0


async def test_s10_the_window_closes_after_24_hours(talking: Client) -> None:
    talking.sim.advance(DAY_S - 60)
    assert (await talking.send())["ret"] == 0

    talking.sim.advance(120)
    assert await talking.send() == {"ret": -2, "errmsg": "prepare failed"}

    talking.sim.say(talking.bot.user, "again")
    assert (await talking.send())["ret"] == 0


async def test_s10_sending_does_not_extend_the_window(talking: Client) -> None:
    talking.sim.advance(DAY_S / 2)
    await talking.send()
    talking.sim.advance(DAY_S / 2 + 1)

    assert (await talking.send())["ret"] == -2


async def test_s10_tool_call_items_get_an_empty_200_and_are_not_shown(talking: Client) -> None:
    item = {"type": 11, "is_completed": False, "tool_call_start_item": {"tool_name": "x", "tool_call_id": "1"}}
    response = await talking.post("sendmessage", {"msg": talking.message(item_list=[item])})

    assert (response.status_code, response.content) == (200, b"")
    assert talking.phone() == []


async def test_s11_a_repeated_client_id_succeeds_and_shows_nothing_new(make: MakeClient) -> None:
    client = await make(quota=1, id_style="string")
    client.sim.say(client.bot.user, "hello")

    first = await client.send("one", client_id="same")
    second = await client.send("two", client_id="same")

    assert first == second
    assert client.phone() == ["one"]
    assert [send.why for send in client.sim.sends(client.bot.bot)] == ["shown", "duplicate"]
    assert client.sim.stats().duplicates_suppressed == 1


async def test_s11_a_missing_client_id_is_accepted_and_noted(talking: Client) -> None:
    assert (await talking.send(client_id=None))["ret"] == 0
    assert (await talking.send())["ret"] == 0

    assert talking.phone() == ["hi", "hi"]
    assert talking.sim.stats().violations == {"missing_client_id": 1}


async def test_s11_in_strict_mode_it_makes_later_sends_under_the_same_token_disappear(
    make: MakeClient,
) -> None:
    client = await make(strict_client_id=True)
    client.sim.say(client.bot.user, "hello")
    await client.send("first", client_id=None)
    assert (await client.send("lost"))["ret"] == 0

    client.sim.say(client.bot.user, "new token")
    await client.send("seen")

    assert client.phone() == ["first", "seen"]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("window_only", {"earlier": 0, "latest": 0, "made up": 0, "ancient": 0}),
        ("must_match_any_issued_within_24h", {"earlier": 0, "latest": 0, "made up": -2, "ancient": -2}),
        ("must_be_latest", {"earlier": -2, "latest": 0, "made up": -2, "ancient": -2}),
        ("ignored", {"earlier": 0, "latest": 0, "made up": 0, "ancient": 0}),
    ],
)
async def test_s12_context_token_checks(make: MakeClient, mode: str, expected: dict[str, int]) -> None:
    client = await make(context_check=mode)
    tokens = {"made up": "made up", "ancient": client.sim.say(client.bot.user, "x").context_token}
    client.sim.advance(DAY_S + 1)
    tokens["earlier"] = client.sim.say(client.bot.user, "x").context_token
    tokens["latest"] = client.sim.say(client.bot.user, "x").context_token

    answers = {name: (await client.send(context_token=tokens[name]))["ret"] for name in expected}

    assert answers == expected


@pytest.mark.parametrize(
    ("mode", "answer", "shown"),
    [
        ("refuse", {"ret": -2, "errmsg": "prepare failed"}, []),
        ("drop", {}, []),
        ("deliver", None, ["hi"]),
    ],
)
async def test_s12_sends_without_a_context_token(
    make: MakeClient, mode: str, answer: dict[str, object] | None, shown: list[str]
) -> None:
    client = await make(tokenless=mode)
    client.sim.say(client.bot.user, "hello")

    got = await client.send(context_token=None)

    assert got == answer if answer is not None else got["message_id"]
    assert client.phone() == shown


async def test_s13_sends_that_overlap_are_noted(make: MakeClient) -> None:
    client = await make(send_latency_ms=50)
    client.sim.say(client.bot.user, "hello")

    await asyncio.gather(client.send(), client.send())

    await client.sim.until(lambda: client.sim.stats().send_overlaps == 1)
    first, second = sorted(client.sim.sends(client.bot.bot), key=lambda send: send.start_ms)
    assert second.start_ms < first.end_ms
    assert (first.overlapped, second.overlapped) == (False, True)


async def test_s14_getconfig_needs_the_user(client: Client) -> None:
    expected = {"ret": -2, "errmsg": "ilink_user_id required"}
    assert await client.call("getconfig") == expected
    assert await client.call("getconfig", {"user_id": client.bot.user}) == expected


async def test_s14_getconfig_before_any_inbound_is_minus_4(client: Client) -> None:
    answer = await client.call("getconfig", {"ilink_user_id": client.bot.user})

    assert answer == {"ret": -4, "errmsg": "GetTypingTicket rpc failed"}


async def ticket(client: Client) -> str:
    answer = await client.call("getconfig", {"ilink_user_id": client.bot.user})
    assert answer["ret"] == 0
    return str(answer["typing_ticket"])


async def typing(client: Client, ticket: str, status: int) -> int:
    body = {"ilink_user_id": client.bot.user, "typing_ticket": ticket, "status": status}
    return int((await client.call("sendtyping", body))["ret"])


async def test_s15_typing_stays_on_until_status_2(talking: Client) -> None:
    user, valid = talking.bot.user, await ticket(talking)
    assert await typing(talking, valid, 1) == 0
    assert await typing(talking, valid, 1) == 0
    assert talking.sim.typing(user).on

    assert await typing(talking, valid, 2) == 0
    view = talking.sim.typing(user)
    assert (view.on, view.on_calls, view.off_calls) == (False, 2, 1)


async def test_s15_typing_may_end_by_itself(make: MakeClient) -> None:
    client = await make(typing_timeout_s=10)
    client.sim.say(client.bot.user, "hello")
    await typing(client, await ticket(client), 1)
    client.sim.advance(9)
    assert client.sim.typing(client.bot.user).on

    client.sim.advance(2)
    assert not client.sim.typing(client.bot.user).on


async def test_s14_a_ticket_expires(make: MakeClient) -> None:
    client = await make(ticket_ttl_s=600)
    client.sim.say(client.bot.user, "hello")
    old = await ticket(client)
    client.sim.advance(601)

    assert await typing(client, old, 1) == -2
    assert await typing(client, "made up", 1) == -2
    assert await typing(client, await ticket(client), 1) == 0


async def test_s16_notifystart_and_notifystop_keep_a_timeline(client: Client) -> None:
    assert await client.call("msg/notifystart") == {"ret": 0}
    assert client.sim.online(client.bot.bot).online
    assert await client.call("msg/notifystop") == {"ret": 0}

    view = client.sim.online(client.bot.bot)
    assert not view.online
    assert [online for _, online in view.timeline] == [True, False]


async def test_s16_sends_may_require_notifystart(make: MakeClient) -> None:
    client = await make(require_notifystart=True)
    client.sim.say(client.bot.user, "hello")
    assert (await client.send())["ret"] == -2

    await client.call("msg/notifystart")
    assert (await client.send())["ret"] == 0
