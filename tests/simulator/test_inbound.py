"""Long polls, cursors, concurrent polls."""

import asyncio
import base64
import re

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter.simulator import Simulator
from tests.simulator.client import FAST, Client, Json, ids, texts
from tests.simulator.conftest import MakeClient


async def test_s6_a_message_that_waits_is_answered_at_once(patient: Client) -> None:
    said = patient.sim.say(patient.bot.user, "hello")

    answer = await patient.poll()

    message = answer["msgs"][0]
    assert ids([message]) == [said.message_id]
    assert int(said.message_id) > 2**53
    assert message["from_user_id"] == patient.bot.user
    assert message["to_user_id"] == patient.bot.bot
    assert message["session_id"] == f"{patient.bot.user}#{patient.bot.bot}"
    assert (message["message_type"], message["message_state"]) == (1, 2)
    assert message["context_token"].startswith("AARzJW")
    times = {key: message[key] for key in ("create_time_ms", "update_time_ms")}
    assert {key: message[key] for key in ("delete_time_ms", "group_id", "root_id", "parent_id")} == {
        "delete_time_ms": 0,
        "group_id": "",
        "root_id": 0,
        "parent_id": 0,
    }
    assert re.fullmatch(r"mmassistant_bypmsg_inbox_[0-9a-f]{32}mm\S{28}@weclaw_1_\d{10}", message["client_id"])
    (item,) = message["item_list"]
    assert re.fullmatch(r"v1:\d{1,20}", item.pop("msg_id"))
    lists: Json = {"button_item_list": [], "at_bot_username_list": []}
    assert item == {"type": 1, **times, "is_completed": True, **lists, "text_item": {"text": "hello"}}


async def test_s6_the_hold_ends_with_an_empty_answer_and_a_hint(client: Client) -> None:
    answer = await client.poll()

    assert answer["msgs"] == []
    assert answer["longpolling_timeout_ms"] == 35_000
    assert answer["sync_buf"]
    assert client.bot.token.encode() in base64.b64decode(answer["get_updates_buf"])


@pytest.mark.parametrize(
    ("style", "expected"), [("absent", [None, None]), ("zero", [0, 0]), ("alternate", [0, None])]
)
async def test_s6_success_comes_with_and_without_ret(
    make: MakeClient, style: str, expected: list[int | None]
) -> None:
    client = await make(ret_style=style)

    assert [(await client.poll()).get("ret") for _ in range(2)] == expected


async def test_s6_messages_come_in_batches_in_their_order(make: MakeClient) -> None:
    client = await make(batch_max=3)
    for number in range(7):
        client.sim.say(client.bot.user, str(number))

    batches = [texts(await client.follow()) for _ in range(3)]

    assert batches == [["0", "1", "2"], ["3", "4", "5"], ["6"]]


async def test_s6_the_cursor_changes_with_messages_and_on_idle_if_so_set(make: MakeClient) -> None:
    client = await make()
    idle = await client.poll()
    again = await client.poll(idle["get_updates_buf"])
    client.sim.say(client.bot.user, "hello")
    news = await client.poll(again["get_updates_buf"])
    assert idle["get_updates_buf"] == again["get_updates_buf"] != news["get_updates_buf"]

    client.sim.configure(idle_cursor_changes=True)
    assert (await client.poll())["get_updates_buf"] != (await client.poll())["get_updates_buf"]


async def test_s7_ack_on_delivery_does_not_return_a_message_to_an_older_cursor(client: Client) -> None:
    client.sim.say(client.bot.user, "once")
    assert texts((await client.poll())["msgs"]) == ["once"]

    assert (await client.poll())["msgs"] == []
    assert client.sim.inbound(client.bot.bot)[0].deliveries == 1


async def test_s7_ack_on_delivery_keeps_what_a_vanished_client_never_got(patient: Client) -> None:
    """The poll is cut before the message arrives, so it was never written."""
    poll = asyncio.create_task(patient.poll())
    await parked(patient, 1)
    poll.cancel()
    await asyncio.gather(poll, return_exceptions=True)
    await parked(patient, 0)

    patient.sim.say(patient.bot.user, "kept")

    assert texts((await patient.poll())["msgs"]) == ["kept"]
    assert [poll.outcome for poll in patient.sim.polls(patient.bot.bot).records] == [
        "disconnected",
        "messages",
    ]


@given(cuts=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=25)
def test_s7_cursor_replay_loses_nothing_whatever_the_cuts(cuts: list[tuple[int, int, bool]]) -> None:
    """Each step says some messages, sets a batch size, polls, and keeps the new cursor or crashes first."""

    async def run() -> None:
        async with Simulator(FAST) as sim, httpx.AsyncClient() as http:
            sim.configure(cursor_mode="cursor_replay", hold_ms=1)
            client = Client(sim, sim.add_bot(), http)
            said: list[str] = []
            kept: list[str] = []
            for count, batch_max, stored in cuts:
                sim.configure(batch_max=batch_max)
                said += [sim.say(client.bot.user, "x").message_id for _ in range(count)]
                answer = await client.poll(client.cursor)
                if stored:
                    kept += ids(answer["msgs"])
                    client.cursor = answer["get_updates_buf"]
            while messages := await client.follow():
                kept += ids(messages)
            assert kept == said

    asyncio.run(run())


@pytest.mark.parametrize(("mode", "expected"), [("current", ["new"]), ("replay", ["old", "new"]), ("refuse", None)])
@pytest.mark.parametrize("cursor_mode", ["ack_on_delivery", "cursor_replay"])
async def test_s8_an_unknown_cursor(
    make: MakeClient, cursor_mode: str, mode: str, expected: list[str] | None
) -> None:
    client = await make(unknown_cursor=mode, cursor_mode=cursor_mode)
    client.sim.say(client.bot.user, "old")
    await client.poll()
    client.sim.say(client.bot.user, "new")

    answer = await client.poll("garbage")

    if expected is None:
        assert answer["ret"] == -2
    else:
        assert texts(answer["msgs"]) == expected


Polls = list[asyncio.Task[Json]]


async def parked(client: Client, count: int) -> None:
    await client.sim.until(lambda: client.sim.polls(client.bot.bot).now == count)


async def begun(client: Client, count: int) -> None:
    await client.sim.until(lambda: client.sim.polls(client.bot.bot).total == count)


async def two_polls(client: Client) -> Polls:
    """Two parked polls, the older one first."""
    polls: Polls = []
    for count in (1, 2):
        polls.append(asyncio.create_task(client.poll()))
        await begun(client, count)
    return polls


async def test_s9_two_polls_share_the_messages_at_random(patient: Client) -> None:
    winners = set()
    polls = await two_polls(patient)
    for number in range(20):
        patient.sim.say(patient.bot.user, str(number))
        done, _ = await asyncio.wait(polls, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1
        winner = next(index for index, poll in enumerate(polls) if poll in done)
        winners.add(winner)
        polls[winner] = asyncio.create_task(patient.poll())
        await parked(patient, 2)
    patient.sim.advance(60)
    await asyncio.gather(*polls)

    assert winners == {0, 1}
    assert patient.sim.stats().delivered == 20


async def test_s9_with_cursors_both_polls_get_a_message(patient: Client) -> None:
    patient.sim.configure(cursor_mode="cursor_replay")
    polls = await two_polls(patient)

    patient.sim.say(patient.bot.user, "hello")

    assert [texts((await poll)["msgs"]) for poll in polls] == [["hello"], ["hello"]]


async def test_s9_newest_wins_answers_the_older_poll_empty(patient: Client) -> None:
    patient.sim.configure(concurrent_polls="newest_wins")
    older, newer = await two_polls(patient)

    assert (await older)["msgs"] == []
    patient.sim.say(patient.bot.user, "hello")
    assert (await newer)["msgs"]


async def test_s9_the_loser_gets_minus_14(patient: Client) -> None:
    patient.sim.configure(concurrent_polls="loser_-14")
    older, newer = await two_polls(patient)

    assert (await older)["errcode"] == -14
    patient.sim.say(patient.bot.user, "hello")
    assert (await newer)["msgs"]


async def test_f22_two_polls_at_once_are_counted(patient: Client) -> None:
    polls = await two_polls(patient)
    await patient.sim.until(lambda: patient.sim.stats().poll_overlaps)
    patient.sim.advance(60)
    await asyncio.gather(*polls)

    view = patient.sim.polls(patient.bot.bot)
    assert (view.overlaps, view.most, view.now) == (1, 2, 0)
    assert [v.kind for v in patient.sim.violations()] == ["concurrent_polls"]
