"""Paths, authentication, headers, rebinding; requests that cannot be read."""

import asyncio
from typing import Any

import pytest

from tests.simulator.client import BASE_INFO, LONG, Client, headers
from tests.simulator.conftest import MakeClient

STALE = {"errcode": -14, "errmsg": "session timeout"}


async def raw(client: Client, sent: dict[str, str], endpoint: str = "getupdates") -> dict[str, Any]:
    response = await client.http.post(
        f"{client.sim.url}/ilink/bot/{endpoint}", json={"base_info": BASE_INFO}, headers=sent
    )
    assert response.status_code == 200
    answer = response.json()
    assert isinstance(answer, dict)
    return answer


@pytest.mark.parametrize(
    "path", ["/ilink/bot/getupdates", "//ilink/bot/getupdates", "/ilink/bot/getupdates/", "/ilink//bot/getupdates"]
)
async def test_s1_slashes_may_be_too_many(client: Client, path: str) -> None:
    response = await client.http.post(
        client.sim.url + path, json={"base_info": BASE_INFO}, headers=headers(client.bot.token)
    )

    assert response.json()["msgs"] == []


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_s1_a_qr_code_comes_by_get_and_by_post(client: Client, method: str) -> None:
    response = await client.http.request(method, f"{client.sim.url}/ilink/bot/get_bot_qrcode?bot_type=3")

    answer = response.json()
    assert answer["ret"] == 0
    assert answer["qrcode_img_content"].startswith("https://")


async def test_s1_other_paths_are_404(client: Client) -> None:
    for path in ("/", "/ilink/bot/nonsense", "/ilink/bot", "/getupdates"):
        assert (await client.http.post(client.sim.url + path, json={})).status_code == 404


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"Authorization": "Bearer nonsense"}, id="unknown"),
        pytest.param({"Authorization": None}, id="missing"),
        pytest.param({"Authorization": "Basic nonsense"}, id="scheme"),
        pytest.param({"AuthorizationType": None}, id="no type"),
        pytest.param({"AuthorizationType": "other"}, id="other type"),
    ],
)
@pytest.mark.parametrize("endpoint", ["getupdates", "sendmessage"])
async def test_s2_without_authentication_the_answer_is_minus_14_at_once(
    make: MakeClient, endpoint: str, changes: dict[str, str | None]
) -> None:
    client = await make(LONG)
    sent = {k: v for k, v in {**headers(client.bot.token), **changes}.items() if v is not None}

    assert await raw(client, sent, endpoint) == STALE


@pytest.mark.parametrize(
    ("style", "codes"),
    [("errcode", {"errcode": -14}), ("ret", {"ret": -14}), ("both", {"ret": -14, "errcode": -14})],
)
async def test_s2_the_code_is_in_either_field(make: MakeClient, style: str, codes: dict[str, int]) -> None:
    client = await make(stale_style=style)

    assert await raw(client, headers("nonsense")) == {**codes, "errmsg": "session timeout"}


@pytest.mark.parametrize("missing", ["iLink-App-Id", "iLink-App-ClientVersion"])
async def test_s2_strict_headers(make: MakeClient, missing: str) -> None:
    client = await make()
    sent = headers(client.bot.token)
    del sent[missing]
    assert (await raw(client, sent))["msgs"] == []

    client.sim.configure(strict_headers=True)
    assert await raw(client, sent) == STALE


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"X-WECHAT-UIN": "EjRWeA=="}, "wrong_uin"),
        ({"X-WECHAT-UIN": None}, "missing_uin"),
        ({"iLink-App-ClientVersion": "0"}, "wrong_version"),
        ({"iLink-App-ClientVersion": None}, "missing_version"),
        ({"iLink-App-Id": ""}, "wrong_app_id"),
        ({"iLink-App-Id": None}, "missing_app_id"),
        ({"Content-Type": "text/plain"}, "wrong_content_type"),
    ],
)
async def test_s3_wrong_headers_are_noted_and_the_request_is_served(
    client: Client, changes: dict[str, str | None], kind: str
) -> None:
    sent = {k: v for k, v in {**headers(client.bot.token), **changes}.items() if v is not None}

    assert (await raw(client, sent))["msgs"] == []
    assert [violation.kind for violation in client.sim.violations(bot=client.bot.bot)] == [kind]


async def test_s3_the_uin_must_change(client: Client) -> None:
    sent = headers(client.bot.token)
    await raw(client, sent)
    assert client.sim.violations() == []

    await raw(client, sent)
    assert [violation.kind for violation in client.sim.violations()] == ["uin_unchanged"]


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        ({}, ["missing_base_info"]),
        ({"base_info": {}}, ["missing_channel_version"]),
        ({"base_info": BASE_INFO | {"bot_agent": "OpenClaw"}}, []),
        ({"base_info": BASE_INFO | {"bot_agent": "openclaw"}}, ["wrong_bot_agent"]),
        ({"base_info": BASE_INFO | {"bot_agent": "a/1 (two words) b/2"}}, []),
        ({"base_info": BASE_INFO | {"bot_agent": "a/1 (x) (y)"}}, ["wrong_bot_agent"]),
        ({"base_info": BASE_INFO, "sync_buf": ""}, ["deprecated_sync_buf"]),
    ],
)
async def test_s3_what_the_body_of_a_poll_should_not_be_is_noted(
    client: Client, body: dict[str, Any], kinds: list[str]
) -> None:
    await client.http.post(f"{client.sim.url}/ilink/bot/getupdates", json=body, headers=headers(client.bot.token))

    assert [violation.kind for violation in client.sim.violations()] == kinds


@pytest.mark.parametrize(
    ("path", "kind"), [("get_bot_qrcode", "wrong_bot_type"), ("get_qrcode_status?qrcode=x", None)]
)
async def test_s3_bad_manners_at_a_login_are_noted(client: Client, path: str, kind: str | None) -> None:
    sent = {key: value for key, value in headers(client.bot.token).items() if key != "Content-Type"}

    await client.http.get(f"{client.sim.url}/ilink/bot/{path}", headers=sent)

    kinds = [violation.kind for violation in client.sim.violations()]
    assert kinds == ["token_on_qrcode", *([kind] if kind else [])]


async def test_s3_fields_that_no_sent_message_has_are_noted(client: Client) -> None:
    client.sim.say(client.bot.user, "hello")

    await client.send(create_time_ms=1)

    assert [violation.kind for violation in client.sim.violations()] == ["message_fields"]


async def test_s3_headers_are_recorded_without_the_token(client: Client) -> None:
    await client.poll()

    (request,) = client.sim.requests("getupdates")
    assert request.headers["AuthorizationType"] == "ilink_bot_token"
    assert client.bot.token not in str(request)


async def test_s5_a_new_scan_supersedes_the_bot_and_its_token_dies_after_29_seconds(patient: Client) -> None:
    patient.sim.configure(token_death_delay_s=29)
    poll = asyncio.create_task(patient.poll())
    await patient.sim.until(lambda: patient.sim.polls(patient.bot.bot).now)

    new = patient.sim.add_bot(patient.bot.user)
    assert new.bot != patient.bot.bot
    assert new.token != patient.bot.token
    patient.sim.advance(28)
    await asyncio.sleep(0)
    assert not poll.done()

    patient.sim.advance(1)
    assert await poll == STALE
    assert await patient.poll() == STALE
    assert await patient.send() == STALE


@pytest.mark.parametrize("check", ["window_only", "must_match_any_issued_within_24h", "must_be_latest"])
async def test_s5_context_tokens_of_the_old_bot_are_void(make: MakeClient, check: str) -> None:
    client = await make(token_death_delay_s=29, context_check=check)
    old = [client.sim.say(client.bot.user, "hello").context_token]
    new = Client(client.sim, client.sim.add_bot(client.bot.user), client.http)
    late = client.sim.say(client.bot.bot, "to the bot that is going")
    client.sim.repeat(client.bot.bot, late.message_id, "context_token")
    old += [entry.context_token for entry in client.sim.inbound(client.bot.bot)[1:]]

    assert (await client.send(context_token=old[0]))["ret"] == -2
    assert (await new.send(context_token=old[0]))["ret"] == -2
    client.sim.say(new.bot.user, "hello again")
    assert [(await new.send(context_token=token))["ret"] for token in old] == [-2, -2, -2]
    assert (await new.send())["ret"] == 0


async def test_s5_a_client_that_goes_on_with_a_dead_token_is_noted(client: Client) -> None:
    client.sim.kill_token(client.bot.bot)
    await client.poll()
    assert client.sim.violations() == []

    await client.poll()
    assert [violation.kind for violation in client.sim.violations()] == ["call_after_minus_14"]


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"], ids=["cut", "array", "bytes"])
@pytest.mark.parametrize(("mode", "status"), [("ret", 200), ("http400", 400)])
async def test_f29_a_body_that_is_no_object(make: MakeClient, content: bytes, mode: str, status: int) -> None:
    client = await make(malformed=mode)
    for endpoint in ("sendmessage", "getupdates", "get_bot_qrcode"):
        response = await client.http.post(
            f"{client.sim.url}/ilink/bot/{endpoint}", content=content, headers=headers(client.bot.token)
        )
        assert (response.status_code, response.json()) == (status, {"ret": -2})


@pytest.mark.parametrize(("mode", "status"), [("ret", 200), ("http400", 400)])
async def test_f29_what_cannot_be_read_is_among_the_attempts(make: MakeClient, mode: str, status: int) -> None:
    client = await make(malformed=mode, unknown_cursor="refuse")
    for endpoint in ("sendmessage", "getupdates"):
        await client.http.post(
            f"{client.sim.url}/ilink/bot/{endpoint}", content=b"{", headers=headers(client.bot.token)
        )
    await client.post("sendmessage", {"message": {}})
    await client.post("getupdates", {"get_updates_buf": 1})
    await client.post("getupdates", {"get_updates_buf": "unknown"})

    sends = client.sim.sends(client.bot.bot)
    assert [(send.why, send.ret, send.errmsg, send.status) for send in sends] == [
        ("malformed", -2, None, status),
        ("malformed", -2, None, status),
    ]
    assert [violation.detail for violation in client.sim.violations("malformed")] == [
        "invalid json",
        "invalid json",
        "msg required",
        "get_updates_buf must be a string",
    ]
    assert all(send.end_ms for send in sends)
    polls = client.sim.polls(client.bot.bot).records
    assert [poll.outcome for poll in polls] == ["malformed", "malformed", "refused"]
    assert client.sim.stats().sends == 2


async def test_f29_a_wrong_method(make: MakeClient) -> None:
    client = await make()
    url = f"{client.sim.url}/ilink/bot/sendmessage"
    assert (await client.http.get(url)).json()["ret"] == -2

    client.sim.configure(malformed="http400")
    assert (await client.http.get(url)).status_code == 405


async def test_calls_are_counted(client: Client) -> None:
    await client.poll()
    await client.poll()
    await client.call("msg/notifystart")

    views = {view.endpoint: view for view in client.sim.calls(client.bot.bot)}
    assert {name: view.count for name, view in views.items()} == {"getupdates": 2, "msg/notifystart": 1}
    assert len(views["getupdates"].times_ms) == 2
    assert client.sim.calls(endpoint="msg/notifystart")[0].bot == client.bot.bot


async def test_tokens_and_texts_are_in_no_log(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    client.sim.say(client.bot.user, "a secret text")
    await client.poll()
    await client.send("another secret text")
    await client.http.post(f"{client.sim.url}/ilink/bot/sendmessage", content=b"secret text")

    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]
    assert not [line for line in ours if "secret text" in line or client.bot.token in line]
