"""Faults of requests, polls, sends and `getconfig`: each fault as a client meets it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter.simulator import FAULTS, FaultRule, SimulatorError, parameters
from tests.simulator.client import LONG, Client, ids, texts
from tests.simulator.conftest import MakeClient

STALE = {"errcode": -14, "errmsg": "session timeout"}


@pytest.fixture
async def talking(client: Client) -> Client:
    """A client whose user has just written, and that has read it."""
    client.sim.say(client.bot.user, "hello")
    await client.follow()
    return client


def strike(client: Client, fault: str, **rule: Any) -> FaultRule:
    """Sets a fault; what is no field of a rule is a parameter."""
    fields = {k: rule.pop(k) for k in list(rule) if k in FaultRule.__struct_fields__}
    return client.sim.set_fault(FaultRule(fault=fault, params=rule, **fields))


def whys(client: Client) -> list[str]:
    return [send.why for send in client.sim.sends(client.bot.bot)]


async def test_f1_an_error_page_and_nothing_processed(talking: Client) -> None:
    strike(talking, "F1", status=503, count=2)
    talking.sim.say(talking.bot.user, "waits")

    poll = await talking.post("getupdates", {"get_updates_buf": talking.cursor})
    send = await talking.post("sendmessage", {"msg": talking.message()})

    assert poll.status_code == send.status_code == 503
    assert send.headers["content-type"].startswith("text/html")
    assert talking.phone() == []
    assert whys(talking) == ["F1"]
    assert texts(await talking.follow()) == ["waits"]
    assert talking.sim.polls(talking.bot.bot).records[-2].outcome == "F1"


async def test_f2_524_while_a_poll_is_held(make: MakeClient) -> None:
    client = await make(LONG)
    strike(client, "F2", count=1)
    poll = asyncio.create_task(client.post("getupdates", {"get_updates_buf": ""}))
    await client.sim.until(lambda: client.sim.polls(client.bot.bot).now)

    client.sim.advance(16)

    assert (await poll).status_code == 524
    assert client.sim.polls(client.bot.bot).records[0].outcome == "F2"


async def test_f2_a_poll_that_has_messages_is_answered_in_time(make: MakeClient) -> None:
    """The edge cuts whoever waits; the bot is not deaf behind it."""
    client = await make(LONG)
    rule = strike(client, "F2", count=1)
    client.sim.say(client.bot.user, "before")
    assert texts(await client.follow()) == ["before"]

    poll = asyncio.create_task(client.follow())
    await client.sim.until(lambda: client.sim.polls(client.bot.bot).now)
    client.sim.advance(15)
    client.sim.say(client.bot.user, "during")

    assert texts(await poll) == ["during"]
    assert (rule.count, rule.struck) == (1, 0)


@pytest.mark.parametrize("kind", ["malformed", "truncated", "html", "empty", "wrong_type"])
async def test_f3_a_body_that_cannot_be_read(talking: Client, kind: str) -> None:
    strike(talking, "F3", kind=kind, count=2)
    talking.sim.say(talking.bot.user, "waits")

    bodies: dict[str, Any] = {
        "getupdates": {"get_updates_buf": talking.cursor},
        "sendmessage": {"msg": talking.message()},
    }
    for endpoint, body in bodies.items():
        response = await talking.post(endpoint, body)
        assert response.status_code == 200
        with pytest.raises(json.JSONDecodeError):
            json.loads(response.content)

    assert talking.phone() == []
    assert texts(await talking.follow()) == ["waits"]


async def test_f3_may_strike_after_the_send_was_processed(talking: Client) -> None:
    strike(talking, "F3", kind="empty", processed=True)

    response = await talking.post("sendmessage", {"msg": talking.message("seen")})

    assert response.content == b""
    assert talking.phone() == ["seen"]


async def test_f4_the_body_dribbles(talking: Client) -> None:
    strike(talking, "F4", chunk=8, pause_ms=1)
    said = talking.sim.say(talking.bot.user, "slow")

    pieces = []
    url = f"{talking.sim.url}/ilink/bot/getupdates"
    request = talking.http.build_request(
        "POST", url, json={"base_info": {}}, headers={"Authorization": f"Bearer {talking.bot.token}"}
    )
    request.headers["AuthorizationType"] = "ilink_bot_token"
    response = await talking.http.send(request, stream=True)
    async for piece in response.aiter_raw():
        pieces.append(piece)  # noqa: PERF401
    await response.aclose()

    assert len(pieces) > 1
    assert ids(json.loads(b"".join(pieces))["msgs"]) == [said.message_id]


async def test_f5_silence_until_the_client_gives_up(talking: Client) -> None:
    strike(talking, "F5", count=2)
    talking.sim.say(talking.bot.user, "waits")

    with pytest.raises(httpx.ReadTimeout):
        await talking.post("getupdates", {"get_updates_buf": ""}, timeout=0.1)
    with pytest.raises(httpx.ReadTimeout):
        await talking.post("sendmessage", {"msg": talking.message()}, timeout=0.1)
    await talking.sim.until(lambda: talking.sim.sends(talking.bot.bot)[0].end_ms)

    assert talking.phone() == []
    assert texts(await talking.follow()) == ["waits"]
    assert (await talking.send("again"))["ret"] == 0
    await asyncio.sleep(0.02)
    assert talking.sim.stats().send_overlaps == talking.sim.stats().poll_overlaps == 0


async def test_f5_processed_and_then_silence(talking: Client) -> None:
    strike(talking, "F5", processed=True, count=1)

    with pytest.raises(httpx.ReadTimeout):
        await talking.post("sendmessage", {"msg": talking.message("seen")}, timeout=0.1)

    assert talking.phone() == ["seen"]


@pytest.mark.parametrize(("when", "shown"), [("before", []), ("after", ["hi"])])
async def test_f6_a_send_is_reset(talking: Client, when: str, shown: list[str]) -> None:
    strike(talking, "F6", when=when, count=1)
    message = talking.message()

    with pytest.raises(httpx.TransportError):
        await talking.post("sendmessage", {"msg": message})
    assert talking.phone() == shown
    assert talking.sim.sends(talking.bot.bot)[0].status == 0

    assert (await talking.call("sendmessage", {"msg": message}))["ret"] == 0
    assert talking.phone() == ["hi"], "the same client_id is shown once"


@pytest.mark.parametrize(
    ("rule", "again"),
    [({"when": "before"}, ["x"]), ({"when": "after"}, ["x"]), ({"when": "after", "consumed": True}, [])],
)
async def test_f6_a_poll_is_reset(talking: Client, rule: dict[str, Any], again: list[str]) -> None:
    strike(talking, "F6", count=1, **rule)
    talking.sim.say(talking.bot.user, "x")

    with pytest.raises(httpx.TransportError):
        await talking.follow()

    assert texts(await talking.follow()) == again


async def test_f6_parked_polls_are_cut(patient: Client) -> None:
    poll = asyncio.create_task(patient.poll())
    await patient.sim.until(lambda: patient.sim.polls(patient.bot.bot).now)

    assert patient.sim.cut_polls() == 1

    with pytest.raises(httpx.TransportError):
        await poll
    patient.sim.say(patient.bot.user, "kept")
    assert texts(await patient.follow()) == ["kept"]


async def test_f8_minus_14_once(talking: Client) -> None:
    strike(talking, "F8")

    assert await talking.poll() == STALE
    assert (await talking.poll())["msgs"] == []


async def test_f9_minus_14_for_ever(talking: Client) -> None:
    strike(talking, "F9", bot=talking.bot.bot)
    other = Client(talking.sim, talking.sim.add_bot(), talking.http)

    answers = [await talking.poll(), await talking.send(), await talking.call("msg/notifystart")]

    assert answers == [STALE] * 3
    assert (await other.poll())["msgs"] == []
    talking.sim.clear_faults("F9")
    assert (await talking.poll())["msgs"] == []


async def test_f10_minus_14_on_sends_only(talking: Client) -> None:
    strike(talking, "F10")

    assert await talking.send() == STALE
    assert (await talking.poll())["msgs"] == []
    assert (whys(talking), talking.sim.sends(talking.bot.bot)[0].ret) == (["stale"], -14)


async def test_f10_minus_14_on_one_message_only(talking: Client) -> None:
    strike(talking, "F10", text="cursed")

    assert [await talking.send("cursed one") for _ in range(2)] == [STALE] * 2
    assert (await talking.send("fine"))["ret"] == 0
    assert [(await talking.poll())["msgs"], await talking.call("msg/notifystart")] == [[], {"ret": 0}]
    assert (whys(talking), talking.phone()) == (["stale", "stale", "shown"], ["fine"])


async def test_f11_minus_2_with_every_text_and_with_none(talking: Client) -> None:
    strike(talking, "F11", errmsgs=["prepare failed", "unknown error", "rate limited", "", None])

    answers = [await talking.send() for _ in range(5)]

    assert [answer["ret"] for answer in answers] == [-2] * 5
    assert [answer.get("errmsg") for answer in answers] == [
        "prepare failed",
        "unknown error",
        "rate limited",
        "",
        None,
    ]
    assert talking.phone() == []


async def test_f11_any_code_in_either_field(talking: Client) -> None:
    strike(talking, "F11", code=-12, field="errcode", errmsg=None)

    assert await talking.send() == {"errcode": -12}
    assert [(send.ret, send.why) for send in talking.sim.sends(talking.bot.bot)] == [(-12, "F11")]
    assert talking.sim.stats().refused == 1


async def test_f11_until_the_bot_says_that_it_starts(talking: Client) -> None:
    strike(talking, "F11", until_notifystart=True)
    refused = [await talking.send() for _ in range(2)]
    await talking.call("msg/notifystart")

    assert refused == [{"ret": -2, "errmsg": "prepare failed"}] * 2
    assert (await talking.send())["ret"] == 0


async def test_f12_every_attempt_extends_the_penalty(talking: Client) -> None:
    strike(talking, "F12", penalty_s=60)
    assert (await talking.send())["ret"] == -2
    for _ in range(3):
        talking.sim.advance(59)
        assert (await talking.send())["ret"] == -2

    talking.sim.advance(61)

    assert (await talking.send("quiet"))["ret"] == 0
    assert (await talking.send("again"))["ret"] == 0
    assert talking.phone() == ["quiet", "again"]


async def test_f12_a_burst_starts_the_penalty(make: MakeClient) -> None:
    client = await make(frozen_at_ms=1_789_000_000_000)
    client.sim.say(client.bot.user, "hello")
    strike(client, "F12", burst=2, burst_s=1, penalty_s=60)

    answers = []
    for pause_s in (2, 2, 0.3, 0.3, 59, 61):
        answers.append((await client.send())["ret"])
        client.sim.advance(pause_s)
    answers.append((await client.send())["ret"])

    assert answers == [0, 0, 0, 0, -2, -2, 0]


async def test_f13_success_without_an_id_for_one_user(talking: Client) -> None:
    other = Client(talking.sim, talking.sim.add_bot(), talking.http)
    other.sim.say(other.bot.user, "hello")
    strike(talking, "F13", user=talking.bot.user)

    assert await talking.send() == {"ret": 0}
    assert "message_id" in await other.send()
    assert (talking.phone(), other.phone()) == ([], ["hi"])
    assert talking.sim.stats().dropped == 1


@pytest.mark.parametrize(("body", "content"), [("object", b"{}"), ("empty", b"")])
@pytest.mark.parametrize("shown", [False, True])
async def test_f14_an_empty_success(talking: Client, body: str, content: bytes, shown: bool) -> None:
    strike(talking, "F14", body=body, shown=shown)

    response = await talking.post("sendmessage", {"msg": talking.message()})

    assert (response.status_code, response.content) == (200, content)
    assert talking.phone() == ["hi"] * shown


IDENTITY = ("message_id", "client_id", "seq", "context_token", "create_time_ms")


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ("same", set()),
        ("message_id", {"message_id"}),
        ("client_id", {"client_id"}),
        ("no_message_id", {"message_id"}),
        ("zero_message_id", {"message_id"}),
        ("empty_message_id", {"message_id"}),
        ("context_token", {"context_token"}),
        ("ids", {"message_id", "client_id", "seq", "context_token"}),
        ("all", set(IDENTITY)),
    ],
)
async def test_f16_a_message_is_repeated_with_some_of_its_ids_changed(
    make: MakeClient, change: str, differs: set[str]
) -> None:
    client = await make()
    said = client.sim.say(client.bot.user, "hello")
    (first,) = await client.follow()
    client.sim.advance(1)

    client.sim.repeat(client.bot.user, said.message_id, change)

    (second,) = await client.follow()
    assert {key for key in IDENTITY if first.get(key) != second.get(key)} == differs
    assert texts([first]) == texts([second])
    assert str(second.get("message_id", "")) == {
        "no_message_id": "",
        "zero_message_id": "0",
        "empty_message_id": "",
    }.get(change, str(second.get("message_id")))


async def test_f16_the_repetition_comes_later(make: MakeClient) -> None:
    client, delay_s = await make(), 40 * 60
    said = client.sim.say(client.bot.user, "hello")
    client.sim.repeat(client.bot.user, said.message_id, delay_s=delay_s)
    assert ids(await client.follow()) == [said.message_id]
    client.sim.advance(delay_s - 0.9)
    assert await client.follow() == []

    client.sim.advance(1)

    assert ids(await client.follow()) == [said.message_id]
    assert client.sim.stats().injected == 1


async def test_f16_as_a_rule_every_message_comes_twice(talking: Client) -> None:
    strike(talking, "F16", change="no_message_id")
    talking.sim.say(talking.bot.user, "x")

    messages = await talking.follow()

    assert texts(messages) == ["x", "x"]
    assert ["message_id" in message for message in messages] == [True, False]


@pytest.mark.parametrize("mode", ["ack_on_delivery", "cursor_replay"])
async def test_f18_messages_are_delivered_again_after_a_restart(make: MakeClient, mode: str) -> None:
    client = await make(cursor_mode=mode)
    for text in ("a", "b", "c"):
        client.sim.say(client.bot.user, text)
    first = await client.follow()
    assert await client.follow() == []

    assert client.sim.replay(client.bot.bot, last=2) == 2
    assert await client.follow() == first[1:]
    assert await client.follow() == []

    strike(client, "F18", last=3)
    assert await client.follow() == first
    assert await client.follow() == []
    assert client.sim.stats().redelivered == 5


@pytest.mark.parametrize("mode", ["ack_on_delivery", "cursor_replay"])
async def test_f18_a_replay_outlives_a_connection_that_breaks(make: MakeClient, mode: str) -> None:
    client = await make(cursor_mode=mode)
    client.sim.say(client.bot.user, "a")
    first = await client.follow()
    client.sim.replay(client.bot.bot)
    strike(client, "F6", when="after", count=1)
    with pytest.raises(httpx.TransportError):
        await client.follow()

    assert await client.follow() == first


@pytest.mark.parametrize("cursor", ["empty", "absent"])
async def test_f19_an_answer_with_messages_and_without_a_cursor(talking: Client, cursor: str) -> None:
    strike(talking, "F19", cursor=cursor)
    assert (await talking.poll(talking.cursor))["get_updates_buf"], "an idle answer has one"
    talking.sim.say(talking.bot.user, "x")

    answer = await talking.poll(talking.cursor)

    assert texts(answer["msgs"]) == ["x"]
    assert answer.get("get_updates_buf") == {"empty": "", "absent": None}[cursor]


@pytest.mark.parametrize(("order", "places"), [("reversed", [2, 1, 0]), ("same", [0, 0, 0])])
async def test_f20_seq_and_times_are_out_of_order(make: MakeClient, order: str, places: list[int]) -> None:
    client = await make(frozen_at_ms=1_789_000_000_000)
    strike(client, "F20", order=order)
    said = []
    for text in ("a", "b", "c"):
        said.append(client.sim.say(client.bot.user, text))
        client.sim.advance(1)

    messages = await client.follow()

    assert texts(messages) == ["a", "b", "c"]
    assert ids(messages) == [record.message_id for record in said]
    assert [m["seq"] for m in messages] == [said[place].seq for place in places]
    assert [m["create_time_ms"] for m in messages] == [said[place].create_time_ms for place in places]


@pytest.mark.parametrize("hint", [120_000, "35000", None])
async def test_f21_any_hint(talking: Client, hint: object) -> None:
    strike(talking, "F21", hint=hint)

    assert (await talking.poll())["longpolling_timeout_ms"] == hint


@pytest.mark.parametrize(
    ("ret", "errmsg"), [(-4, "GetTypingTicket rpc failed"), (-2, "ilink_user_id required"), (-1, None)]
)
async def test_f26_getconfig_fails(talking: Client, ret: int, errmsg: str | None) -> None:
    strike(talking, "F26", ret=ret)

    answer = await talking.call("getconfig", {"ilink_user_id": talking.bot.user})

    assert answer == {"ret": ret} | ({"errmsg": errmsg} if errmsg else {})
    assert (await talking.send())["ret"] == 0


async def test_f28_a_batch_of_a_thousand_messages_and_ten_megabytes(make: MakeClient) -> None:
    client = await make(batch_max=0)
    size = client.sim.flood(client.bot.user, messages=1000, size=10_000)

    response = await client.post("getupdates", {"get_updates_buf": ""})

    assert len(response.content) > size == 10_000_000
    assert len(response.json()["msgs"]) == 1000
    assert (await client.poll())["msgs"] == []


@pytest.mark.parametrize(
    "rule",
    [
        FaultRule(fault="F1", endpoint="getupdate"),
        FaultRule(fault="F1", bot="nobody"),
        FaultRule(fault="F1", endpoint="cdn/upload"),
        FaultRule(fault="F23", bot="b0f5860fdecb@im.bot"),
        FaultRule(fault="F1", endpoint="get_bot_qrcode", user="o9cq80Somebody@im.wechat"),
    ],
    ids=lambda rule: f"{rule.fault} {rule.endpoint or ''}",
)
async def test_a_rule_that_could_never_strike_is_refused(client: Client, rule: FaultRule) -> None:
    with pytest.raises(SimulatorError):
        client.sim.set_fault(rule)

    assert client.sim.faults() == []


def test_the_readme_names_each_fault_and_its_parameters() -> None:
    readme = (Path(parameters.__file__).parent / "README.md").read_text()
    rows = [line.split("|") for line in readme.splitlines() if line.startswith("| F")]
    written = {fault.strip(): row[2] for row in rows for fault in row[1].split(",")}

    assert written.keys() == FAULTS.keys()
    for fault, names in parameters.PARAMETERS.items():
        assert [name for name in names if f"`{name}`" not in written[fault]] == []


async def test_a_rule_strikes_so_many_times_and_is_counted(talking: Client) -> None:
    rule = strike(talking, "F11", count=2)

    assert [(await talking.send())["ret"] for _ in range(3)] == [-2, -2, 0]
    assert [(r.id, r.struck, r.count) for r in talking.sim.faults()] == [(rule.id, 2, 0)]
    assert talking.sim.clear_faults(rule_id=rule.id) == 1
    assert talking.sim.faults() == []


async def test_a_rule_strikes_by_chance_alike_for_the_same_seed(make: MakeClient) -> None:
    async def outcomes() -> list[int]:
        client = await make(seed=5, quota=0)
        client.sim.say(client.bot.user, "hello")
        strike(client, "F11", probability=0.5)
        return [(await client.send())["ret"] for _ in range(20)]

    first = await outcomes()

    assert set(first) == {0, -2}
    assert first == await outcomes()


@pytest.mark.parametrize("endpoint", ["sendmessage", "getconfig", "sendtyping", "getuploadurl"])
async def test_a_rule_strikes_what_is_meant_for_one_user(talking: Client, endpoint: str) -> None:
    other = "o9cq80Other@im.wechat"
    talking.sim.set_fault(FaultRule(fault="F1", endpoint=endpoint, user=other))

    async def status(user: str) -> int:
        named = {"msg": {"to_user_id": user}} if endpoint == "sendmessage" else {}
        name = "to_user_id" if endpoint == "getuploadurl" else "ilink_user_id"
        return (await talking.post(endpoint, named or {name: user})).status_code

    assert await status(talking.bot.user) == 200
    assert await status(other) >= 500
