"""A bot's session with iLink is restarted, and when iLink accepts sends."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from adapter.bridge.pace import Successes
from adapter.bridge.sessions import BotSession, BotSessions
from adapter.errors import SessionExpired, Temporary
from adapter.ports import Account
from tests.capture import Capture
from tests.fakes import Bench, ready

VIRTUAL_TIME = True
BOT, OTHER = "b1@im.bot", "b2@im.bot"
HERE, ELSEWHERE = "https://a.weixin.qq.com", "https://b.weixin.qq.com"


def sessions_of(bench: Bench, *bots: str) -> BotSessions:
    """Those of a replica that polls these bots."""
    sessions = BotSessions(
        bench.bindings, bench.chat, bench.sealer, bench.clock, default_base_url="https://ilinkai.weixin.qq.com"
    )
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


async def test_a_request_is_answered_since_a_time_at_its_base_url_alone() -> None:
    bench = await ready()
    successes = Successes(bench.clock)
    assert not successes.since(HERE, 0.0, of_any=True)
    now = bench.clock.monotonic()
    successes.note(HERE, False, now - 7.0)
    assert [successes.since(HERE, when, of_any=True) for when in (6.0, 7.0, 7.1)] == [True, True, False]
    assert not successes.since(HERE, 6.0, of_any=False)
    successes.note(HERE, True, now - 8.0)
    successes.note(HERE, True, now - 5.0)  # the answer to an earlier one comes later
    assert [successes.since(HERE, when, of_any=False) for when in (7.0, 8.0, 8.1)] == [True, True, False]
    assert not successes.since(ELSEWHERE, 0.0, of_any=True)


async def test_ilink_is_asked_at_each_base_url_unless_others_send_there() -> None:
    bench = await ready()
    successes = Successes(bench.clock)
    here, elsewhere = Account(BOT, "t", HERE), Account(OTHER, "t", ELSEWHERE)
    successes.note_post(HERE, "me")
    ask = partial(successes.ask, bench.chat)
    assert [ask(here, "me"), ask(here, "me"), ask(elsewhere, "me")] == [10.0] * 3
    await asyncio.sleep(0.1)
    assert bench.chat.notified == [True, True]
    assert successes.since(HERE, bench.clock.monotonic() - 1, of_any=False)
    await asyncio.sleep(12)
    successes.note_post(HERE, "another")
    successes.note_post(HERE, "me")
    await asyncio.sleep(4)
    assert ask(here, "me") == pytest.approx(6.0)
    await asyncio.sleep(6)
    ask(here, "me")
    await asyncio.sleep(0.1)
    assert bench.chat.notified == [True] * 3


async def test_an_answer_to_a_poll_that_began_before_is_no_proof_that_the_session_lives() -> None:
    """It comes while iLink is asked by notifystart."""
    bench = await ready()
    bench.chat.notify_fails, bench.chat.notify_took_s = SessionExpired("needs_login"), 2.0
    sessions = sessions_of(bench, BOT)
    asked = asyncio.get_running_loop().create_task(sessions.is_alive(BOT, lambda: False))
    await asyncio.sleep(1)
    sessions.polled[BOT].polled_at = bench.clock.monotonic()
    sessions.changed.notify_all()
    await asyncio.sleep(10)
    assert not asked.done()
    sessions.polled[BOT].is_stale = True  # as the next poll finds
    sessions.changed.notify_all()
    assert not await asked
