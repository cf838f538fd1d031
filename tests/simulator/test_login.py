"""The QR login with its eight statuses, and the faults of logins."""

import asyncio
from typing import Any

import httpx
import pytest

from adapter.simulator import FaultRule, SimulatorError
from tests.simulator.client import LONG, Client, headers
from tests.simulator.conftest import MakeClient

Json = dict[str, Any]


async def qrcode(client: Client, tokens: list[str] | None = None) -> str:
    sent = {k: v for k, v in headers().items() if k != "Authorization"}
    response = await client.http.post(
        f"{client.sim.url}/ilink/bot/get_bot_qrcode?bot_type=3",
        json={"local_token_list": tokens or []},
        headers=sent,
    )
    answer = response.json()
    assert answer["qrcode"] in answer["qrcode_img_content"]
    return str(answer["qrcode"])


async def status(client: Client, code: str, url: str = "", **query: str) -> Json:
    response = await client.http.get(
        f"{url or client.sim.url}/ilink/bot/get_qrcode_status",
        params={"qrcode": code, **query},
        headers={"iLink-App-Id": "bot", "iLink-App-ClientVersion": "132105"},
    )
    answer = response.json()
    assert isinstance(answer, dict)
    return answer


async def test_s4_wait_scaned_confirmed(client: Client) -> None:
    code = await qrcode(client)
    assert await status(client, code) == {"ret": 0, "status": "wait"}

    client.sim.scan(code, "o9cq80Somebody@im.wechat")
    assert await status(client, code) == {"ret": 0, "status": "scaned"}

    confirmed = client.sim.confirm(code)
    answer = await status(client, code)
    assert answer == {
        "ret": 0,
        "status": "confirmed",
        "bot_token": answer["bot_token"],
        "ilink_bot_id": confirmed.bot,
        "ilink_user_id": "o9cq80Somebody@im.wechat",
        "baseurl": client.sim.url,
    }
    assert answer["bot_token"].startswith(f"{confirmed.bot}:")
    assert answer["bot_token"] in [bot.token for bot in client.sim.bots()]
    assert client.sim.violations() == []


@pytest.mark.parametrize(("oldest", "asks"), [("2.4.9", True), ("2.4.10", False), ("3.0.0", False)])
async def test_the_phone_refuses_the_code_of_an_old_client(make: MakeClient, oldest: str, asks: bool) -> None:
    client = await make(oldest_version=oldest, frozen_at_ms=1_789_000_000_000)
    code = await qrcode(client)
    shown = [client.sim.scan(code).phone, client.sim.confirm(code).phone]

    assert ["upgrade WeChat interface version" in phone for phone in shown] == [not asks] * 2
    assert (await status(client, code))["status"] == ("confirmed" if asks else "wait")
    client.sim.advance(120)
    assert (await status(client, code))["status"] == ("confirmed" if asks else "expired")


async def test_a_request_for_a_code_may_fail_for_the_tokens_in_it(make: MakeClient) -> None:
    client = await make(listed_tokens="refused")
    url = f"{client.sim.url}/ilink/bot/get_bot_qrcode?bot_type=3"
    answer = await client.http.post(url, json={"local_token_list": [client.bot.token]}, headers=headers())

    assert answer.json() == {"ret": -2}
    assert await qrcode(client)


async def test_s4_a_status_poll_is_held_until_something_happens(make: MakeClient) -> None:
    client = await make(LONG)
    code = await qrcode(client)
    poll = asyncio.create_task(status(client, code))
    await client.sim.until(lambda: client.sim.qrcodes()[0].polls)

    client.sim.scan(code)

    assert (await poll)["status"] == "scaned"


async def test_s4_an_answer_that_was_lost_is_given_again_after_the_hold(client: Client) -> None:
    code = await qrcode(client)
    client.sim.scan(code)

    assert [(await status(client, code))["status"] for _ in range(2)] == ["scaned", "scaned"]
    client.sim.confirm(code)
    assert [(await status(client, code))["status"] for _ in range(2)] == ["confirmed", "confirmed"]


@pytest.mark.parametrize("params", [{"when": "before"}, {"when": "after"}])
async def test_s4_an_answer_that_was_cut_is_given_again(make: MakeClient, params: Json) -> None:
    client = await make(LONG)
    code = await qrcode(client)
    client.sim.scan(code)
    client.sim.set_fault(FaultRule(fault="F6", endpoint="get_qrcode_status", count=1, params=params))
    with pytest.raises(httpx.TransportError):
        await status(client, code)

    assert (await asyncio.wait_for(status(client, code), 10))["status"] == "scaned"


async def test_s4_a_code_expires(make: MakeClient) -> None:
    ttl_s = 60
    client = await make(LONG, qr_ttl_s=ttl_s, qr_hold_ms=10**6)
    code = await qrcode(client)
    poll = asyncio.create_task(status(client, code))
    await client.sim.until(lambda: client.sim.qrcodes()[0].polls)
    client.sim.advance(ttl_s - 1)
    assert client.sim.qrcodes()[0].status == "wait"

    client.sim.advance(1)

    assert await poll == {"ret": 0, "status": "expired"}


async def test_s4_a_code_may_be_expired_by_hand(client: Client) -> None:
    code = await qrcode(client)
    client.sim.expire(code)

    assert (await status(client, code))["status"] == "expired"
    with pytest.raises(SimulatorError):
        client.sim.scan(code)


async def test_s4_only_who_has_scanned_can_confirm(client: Client) -> None:
    code = await qrcode(client)
    client.sim.scan(code, "o9cq80One@im.wechat")

    with pytest.raises(SimulatorError):
        client.sim.confirm(code, "o9cq80Other@im.wechat")

    assert (await status(client, code))["status"] == "scaned"
    assert client.sim.confirm(code, "o9cq80One@im.wechat").user == "o9cq80One@im.wechat"


async def test_s4_a_verify_code_is_asked_for_and_checked(client: Client) -> None:
    code = await qrcode(client)
    client.sim.require_verify(code, "1234")
    assert (await status(client, code))["status"] == "wait"
    client.sim.scan(code)
    assert (await status(client, code))["status"] == "need_verifycode"
    assert (await status(client, code, verify_code="9999"))["status"] == "need_verifycode"
    with pytest.raises(SimulatorError):
        client.sim.confirm(code)

    assert (await status(client, code, verify_code="1234"))["status"] == "scaned"
    client.sim.confirm(code)
    assert (await status(client, code))["status"] == "confirmed"


async def test_s4_too_many_wrong_codes_block(make: MakeClient) -> None:
    client = await make(verify_attempts=2)
    code = await qrcode(client)
    client.sim.scan(code)
    client.sim.require_verify(code, "1234")

    answers = [(await status(client, code, verify_code=wrong))["status"] for wrong in ("1", "2")]

    assert answers == ["need_verifycode", "verify_code_blocked"]
    assert (await status(client, code, verify_code="1234"))["status"] == "verify_code_blocked"


async def test_s4_a_login_is_redirected_to_a_second_host(client: Client) -> None:
    code = await qrcode(client)
    client.sim.scan(code)
    await client.sim.redirect(code)

    first = await status(client, code)
    assert first == {
        "ret": 0,
        "status": "scaned_but_redirect",
        "redirect_host": client.sim.second_url.removeprefix("http://"),
    }
    second = f"http://{first['redirect_host']}"
    assert (await status(client, code, second))["status"] == "scaned"
    assert client.sim.qrcodes()[-1].status == "scaned_but_redirect"
    assert client.sim.confirm(code).status == "confirmed"
    answer = await status(client, code, second)
    assert (answer["status"], answer["baseurl"]) == ("confirmed", second)

    poll = await client.http.post(
        f"{second}/ilink/bot/getupdates", json={"base_info": {}}, headers=headers(answer["bot_token"])
    )
    assert poll.json()["msgs"] == []


async def test_s4_a_user_who_is_bound_to_a_listed_token_needs_no_new_bot(client: Client) -> None:
    code = await qrcode(client, [client.bot.token])
    client.sim.scan(code, client.bot.user)

    assert await status(client, code) == {"ret": 0, "status": "binded_redirect"}
    assert [bot.bot for bot in client.sim.bots()] == [client.bot.bot]


async def test_s5_a_user_who_scans_again_elsewhere_gets_a_new_bot(client: Client) -> None:
    code = await qrcode(client)
    client.sim.confirm(code, client.bot.user)

    answer = await status(client, code)

    assert answer["ilink_user_id"] == client.bot.user
    assert answer["ilink_bot_id"] != client.bot.bot
    assert (await client.poll())["errcode"] == -14


async def test_f2_the_edge_cuts_a_status_poll(make: MakeClient) -> None:
    client = await make(LONG)
    client.sim.set_fault(FaultRule(fault="F2", endpoint="get_qrcode_status", count=1, params={"after_ms": 1}))
    code = await qrcode(client)

    response = await client.http.get(f"{client.sim.url}/ilink/bot/get_qrcode_status?qrcode={code}")

    assert response.status_code == 524


@pytest.mark.parametrize("host", ["evil.example", None])
async def test_f23_a_redirect_to_a_host_of_ones_own_choice(client: Client, host: str | None) -> None:
    client.sim.set_fault(FaultRule(fault="F23", params={"redirect_host": host, "baseurl": "http://evil.example"}))
    code = await qrcode(client)
    client.sim.scan(code)
    await client.sim.redirect(code)

    assert (await status(client, code)).get("redirect_host") == host
    client.sim.confirm(code)
    answer = await status(client, code, "" if host is None else client.sim.second_url)
    assert answer["baseurl"] == "http://evil.example"


async def test_faults_strike_the_logins_of_one_user(client: Client) -> None:
    client.sim.set_fault(FaultRule(fault="F1", endpoint="get_qrcode_status", user="o9cq80One@im.wechat"))
    statuses = []
    for user in ("o9cq80One@im.wechat", "o9cq80Other@im.wechat"):
        code = await qrcode(client)
        client.sim.scan(code, user)
        response = await client.http.get(f"{client.sim.url}/ilink/bot/get_qrcode_status?qrcode={code}")
        statuses.append(response.status_code)

    assert statuses[0] >= 500
    assert statuses[1] == 200


async def test_f27_expired_three_times(client: Client) -> None:
    client.sim.set_fault(FaultRule(fault="F27", count=3, params={"kind": "expired"}))

    answers = [(await status(client, await qrcode(client)))["status"] for _ in range(4)]

    assert answers == ["expired"] * 3 + ["wait"]


async def test_f27_a_right_code_is_called_wrong_and_then_blocked(client: Client) -> None:
    code = await qrcode(client)
    client.sim.scan(code)
    client.sim.require_verify(code, "1234")
    client.sim.set_fault(FaultRule(fault="F27", count=1, params={"kind": "wrong_code"}))
    assert (await status(client, code, verify_code="1234"))["status"] == "need_verifycode"

    client.sim.set_fault(FaultRule(fault="F27", count=1, params={"kind": "blocked"}))
    assert (await status(client, code, verify_code="1234"))["status"] == "verify_code_blocked"


async def test_f27_of_several_rules_each_strikes_where_it_can(client: Client) -> None:
    for kind in ("no_bot_id", "wrong_code"):
        client.sim.set_fault(FaultRule(fault="F27", count=1, params={"kind": kind}))
    code = await qrcode(client)
    client.sim.require_verify(code, "1234")
    client.sim.scan(code)

    assert (await status(client, code, verify_code="1234"))["status"] == "need_verifycode"
    assert (await status(client, code, verify_code="1234"))["status"] == "scaned"
    client.sim.confirm(code)
    assert "ilink_bot_id" not in await status(client, code)
    assert "ilink_bot_id" in await status(client, code)
