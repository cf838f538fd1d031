"""A bot's session with iLink is restarted, and when iLink accepts sends."""

from __future__ import annotations

import asyncio

import pytest

from adapter.errors import SessionExpired, Temporary
from adapter.outbound.sessions import AcceptedSends, BotSession, BotSessions
from tests.capture import Capture
from tests.fakes import Bench, ready

VIRTUAL_TIME = True
BOT, OTHER = "b1@im.bot", "b2@im.bot"
HERE, ELSEWHERE = "https://a.weixin.qq.com", "https://b.weixin.qq.com"


def sessions_of(bench: Bench, *bots: str) -> BotSessions:
    """Those of a replica that polls these bots."""
    sessions = BotSessions(bench.bindings, bench.chat, bench.sealer, bench.clock)
    sessions.polled.update({bot: BotSession() for bot in bots})
    return sessions


async def test_a_session_is_restarted_at_most_once_a_minute() -> None:
    bench = await ready()
    sessions = sessions_of(bench, BOT)
    for _ in range(120):
        await sessions.restart(BOT)
        await asyncio.sleep(1)
    assert bench.chat.notified == [True, True]
    await sessions.restart(BOT)
    assert bench.chat.notified == [True, True, True]


async def test_each_bot_has_a_minute_of_its_own_and_one_that_serves_nobody_is_left_alone() -> None:
    bench = await ready()
    await bench.bind("s2", OTHER, "u2@im.wechat")
    sessions = sessions_of(bench, BOT, OTHER, "unbound@im.bot")
    for bot in (BOT, OTHER, BOT, "unbound@im.bot", OTHER):
        await sessions.restart(bot)
    assert bench.chat.notified == [True, True]


@pytest.mark.parametrize("problem", [Temporary("network"), SessionExpired("needs_login")], ids=["away", "-14"])
async def test_a_restart_that_fails_is_no_alarm_and_is_tried_after_a_minute(
    problem: Exception, captured: Capture
) -> None:
    bench = await ready()
    bench.chat.notify_fails = problem
    sessions = sessions_of(bench, BOT)
    await sessions.restart(BOT)
    await asyncio.sleep(60)
    await sessions.restart(BOT)
    assert bench.chat.notified == [True, True]
    said = [(line["body"], line["severity_text"]) for line in captured.lines()]
    assert said == [("restart.failed", "DEBUG")] * 2


async def test_a_send_is_accepted_since_a_time_at_its_base_url_alone() -> None:
    bench = await ready()
    accepted = AcceptedSends(bench.clock)
    before = bench.clock.monotonic()
    assert not accepted.since(HERE, before)
    await asyncio.sleep(1)
    accepted.note(HERE)
    at = bench.clock.monotonic()
    assert [accepted.since(HERE, when) for when in (before, at, at + 0.001)] == [True, True, False]
    assert not accepted.since(ELSEWHERE, before)


async def test_an_answer_to_a_poll_that_began_before_is_no_proof_that_the_session_lives() -> None:
    """It comes while iLink is asked by notifystart."""
    bench = await ready()
    bench.chat.notify_fails, bench.chat.notify_took_s = SessionExpired("needs_login"), 2.0
    sessions = sessions_of(bench, BOT)
    asked = asyncio.get_running_loop().create_task(sessions.is_alive(BOT))
    await asyncio.sleep(1)
    sessions.polled[BOT].polled_at = bench.clock.monotonic()
    sessions.changed.notify_all()
    await asyncio.sleep(10)
    assert not asked.done()
    sessions.polled[BOT].is_stale = True  # as the next poll finds
    sessions.changed.notify_all()
    assert not await asked
