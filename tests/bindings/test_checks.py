"""What a bind is looked at for before it changes anything: ids, whose token it is, and whether iLink takes it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from adapter.errors import SessionExpired, Temporary
from adapter.ports import BusMessage
from tests.bindings.test_control import BOT, TOKEN, USER, Platform
from tests.fakes import FakeDelivery

VIRTUAL_TIME = True

STALE, SILENT = SessionExpired("stale_token", "-14"), Temporary("ilink_unavailable", "no way to ilink")
OTHER = Temporary("ret_other", "iLink answered -2")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bot": USER}, "@im.bot"),
        ({"bot": "b1"}, "@im.bot"),
        ({"user": BOT}, "@im.wechat"),
        ({"user": "u1"}, "@im.wechat"),
        ({"bot_token": "b2@im.bot:x"}, "another bot's"),
    ],
)
async def test_an_impossible_bot_user_or_token_is_refused_unless_it_is_bound_unchecked(
    fields: dict[str, str], said: str, platform: Platform
) -> None:
    fields = {"bot": BOT, "bot_token": TOKEN, **fields}
    refused = await platform.bind(**fields)
    assert (refused.ok, said in refused.error, platform.bound) == (False, True, {})
    assert "SECRET" not in refused.error
    assert (await platform.bind(**fields, check=False)).ok


async def test_a_new_bot_is_not_asked_for_unless_the_bind_says_so(platform: Platform) -> None:
    answer = await platform.bind()
    assert (answer.ok, answer.checked, platform.bench.chat.notified) == (True, False, [])
    answer = await platform.bind(bot="b2@im.bot", user="u2@im.wechat", check=True)
    assert (answer.ok, answer.checked, platform.bench.chat.notified) == (True, True, [True])


async def test_a_dead_token_is_not_bound_where_the_bind_has_it_checked(platform: Platform) -> None:
    platform.bench.chat.notify_fails = STALE
    answer = await platform.bind(check=True)
    assert (answer.ok, "-14" in answer.error, platform.bound) == (False, True, {})
    assert [(event.change, event.reason) for event in platform.bench.bus.events()] == [("refused", "stale_token")]


@pytest.mark.parametrize("problem", [STALE, SILENT])
@pytest.mark.parametrize(
    "fields",
    [
        {"bot_token": f"{TOKEN}2"},
        {"bot_token": f"{TOKEN}2", "sandbox": "s2"},
        {"bot": "b2@im.bot"},
        {"base_url": "https://elsewhere.weixin.qq.com", "sandbox": "s2"},
    ],
)
async def test_a_working_bot_is_not_taken_out_by_a_token_that_ilink_does_not_take(
    fields: dict[str, Any], problem: Exception, platform: Platform
) -> None:
    """Neither its token, nor by another bot of its user, nor by a base URL that leads nowhere."""
    await platform.bind()
    before, platform.bench.chat.notify_fails = platform.binding(), problem
    refused = await platform.bind(**fields)
    assert (refused.ok, "no way to ilink" in refused.error) == (False, problem is SILENT)
    assert (platform.binding(), platform.bound) == (before, {BOT: "s1"})
    assert (await platform.bind(**fields, check=False)).ok


async def test_a_bot_that_moves_without_naming_its_user_keeps_it(platform: Platform) -> None:
    await platform.bind()
    assert (await platform.bind(sandbox="s2", user=None)).moved_from == "s1"
    assert platform.binding().user == USER


async def test_an_ilink_that_is_slow_about_one_token_delays_no_other_sandbox_or_bot(platform: Platform) -> None:
    """But those stored later for the same sandbox or bot wait, also where the bot is to leave the sandbox."""
    await platform.bind(bot="b2@im.bot", sandbox="s2", user="u2@im.wechat", id="r0")
    platform.bench.chat.notify_took_s = 3.0

    def bind(sandbox: str, bot: str, **fields: object) -> FakeDelivery:
        body = {"sandbox": sandbox, "bot": bot, "bot_token": f"{bot}:x", **fields}
        return platform.publish("bind", msgspec.json.encode(body))

    slow = bind("s1", "b2@im.bot", check=True)
    left, joined = bind("s2", "b3@im.bot"), platform.publish("unbind", b'{"sandbox":"s1"}')
    other = bind("s4", "b4@im.bot")
    await asyncio.sleep(2)
    assert [each.acks for each in (slow, left, joined, other)] == [0, 0, 0, 1]
    await asyncio.sleep(2)
    assert [each.acks for each in (slow, left, joined, other)] == [1, 1, 1, 1]
    assert platform.bound == {"b3@im.bot": "s2", "b4@im.bot": "s4"}


async def test_an_ilink_that_hangs_delays_the_next_command_for_seconds_only(platform: Platform) -> None:
    await platform.bind()
    platform.bench.chat.notify_took_s = 3600.0
    started = platform.bench.clock.monotonic()
    platform.publish_bind("b2@im.bot")
    delivery = platform.publish("bind", b'{"sandbox":"s1","bot":"b1@im.bot","bot_token":"t2"}')
    while not delivery.acks:
        await platform.bench.clock.sleep(0.1)
    assert platform.bench.clock.monotonic() - started < 10
    assert platform.token() == TOKEN


@pytest.mark.parametrize("problem", [STALE, SILENT])
async def test_a_bind_that_has_begun_is_not_refused_when_it_goes_on(problem: Exception, platform: Platform) -> None:
    """The bus was away after the binding was written, and then iLink."""
    await platform.bind()
    failures = [Temporary("bus_down")]

    async def on_publish(message: BusMessage) -> None:
        if message.stream == "event" and failures:
            platform.bench.chat.notify_fails = problem
            raise failures.pop()

    platform.bench.bus.on_publish = on_publish
    answer = await platform.bind(bot="b2@im.bot", id="r2")
    assert (answer.ok, answer.replaced, platform.bound) == (True, [BOT], {"b2@im.bot": "s1"})
    assert [change for *_, change in platform.changes] == ["bound", "bound", "replaced"]


@pytest.mark.parametrize("problem", [STALE, SILENT])
async def test_where_nothing_works_the_bind_is_not_asked_for(problem: Exception, platform: Platform) -> None:
    """The login of the bot is lost, or the same token is bound again."""
    await platform.bench.bind(token=TOKEN, state="needs_login", reason="stale_token")
    platform.bench.chat.notify_fails = problem
    assert (await platform.bind(bot_token=f"{TOKEN}2")).ok
    assert (await platform.bind(bot_token=f"{TOKEN}2", sandbox="s2")).ok


@pytest.mark.parametrize(("problem", "checked"), [(SILENT, False), (OTHER, True)])
async def test_another_answer_than_14_binds_and_no_answer_is_said(
    problem: Exception, checked: bool, platform: Platform
) -> None:
    platform.bench.chat.notify_fails = problem
    answer = await platform.bind(check=True)
    assert (answer.ok, answer.checked) == (True, checked)


async def test_a_bind_says_from_where_it_has_moved_the_bot(platform: Platform) -> None:
    assert (await platform.bind()).moved_from == ""
    assert (await platform.bind(sandbox="s2")).moved_from == "s1"
    assert (await platform.bind(sandbox="s2", id="again")).moved_from == ""
