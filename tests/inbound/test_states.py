"""The states of a poller, in their order."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from adapter.bridge.poller import BotPoller, State
from adapter.bridge.refused_token import LOGIN_POLLS_S
from tests.fakes import Bench, batch, ready
from tests.inbound.pollers import BOT, STALE, raw

VIRTUAL_TIME = True


class Noted(BotPoller):
    """Notes the states that it takes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.taken = [self.state]

    def _enter(self, state: State, why: str = "") -> None:
        super()._enter(state, why)
        if self.taken[-1] is not state:
            self.taken.append(state)


async def run(bench: Bench) -> tuple[Noted, asyncio.Task[None]]:
    session = bench.poller_of(Noted, BOT)
    task = asyncio.get_running_loop().create_task(session.run())
    await asyncio.sleep(1)
    return session, task


async def end(session: Noted, task: asyncio.Task[None]) -> None:
    session.stop(immediately=True)
    await task
    assert session.state is State.ENDED


async def test_a_poller_waits_polls_and_stores() -> None:
    bench = await ready(batch(raw(), cursor="b"))
    session, task = await run(bench)
    began = session.shown.since
    assert session.taken == [State.WAITING, State.POLLING, State.STORING, State.POLLING]
    await asyncio.sleep(100)
    assert session.shown.since == began <= bench.clock.monotonic() - 100, "since when it is in its state"
    await end(session, task)


async def test_a_login_that_a_send_found_lost_ends_the_polls_at_the_boundary() -> None:
    bench = await ready()
    session, task = await run(bench)
    await bench.bind(state="needs_login")
    session.cancel_poll()
    await asyncio.sleep(5)
    assert session.taken[-2:] == [State.POLLING, State.NEEDS_LOGIN]
    await end(session, task)


async def test_a_bug_as_an_answer_is_stored_is_a_failure_that_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = await ready(batch(raw(), cursor="b"))

    async def fails(*_: object) -> None:
        raise RuntimeError("a bug")

    with capture_logs() as logs, monkeypatch.context() as patch:
        patch.setattr("adapter.bridge.receive.Receiver.receive", fails)
        session, task = await run(bench)
    assert session.taken[2:4] == [State.STORING, State.RETRYING]
    assert "poller.crashed" in [line["event"] for line in logs]
    await asyncio.sleep(5)
    bench.chat.polls.append(batch(raw(), cursor="b"))
    session.cancel_poll()
    await asyncio.sleep(5)
    assert len(bench.bus.inbound()) == 1
    await end(session, task)


async def test_a_bot_that_needs_a_login_is_paused_while_the_bus_is_away() -> None:
    bench = await ready(state="needs_login")
    session, task = await run(bench)
    bench.bus_up.clear()
    await asyncio.sleep(600)
    assert session.taken[-2:] == [State.NEEDS_LOGIN, State.PAUSED]
    bench.bus_up.set()
    await end(session, task)


async def test_a_lease_that_pauses_costs_a_bot_that_needs_a_login_no_poll() -> None:
    """The next one would be an hour later."""
    bench = await ready(state="needs_login")
    session, task = await run(bench)
    session.cancel_poll(for_lease=True)
    await asyncio.sleep(LOGIN_POLLS_S[0] + 10)
    assert bench.chat.polling == 1
    await end(session, task)


async def test_a_token_that_is_refused_after_a_new_login_is_tried_again() -> None:
    """The poll of the old login was out, and nobody cut it."""
    bench = await ready(state="needs_login")
    bench.chat.polls.append(STALE)
    session, task = await run(bench)
    while not bench.chat.polling:
        await asyncio.sleep(0.01)
    await bench.bind(token="new")
    await asyncio.sleep(1)
    assert session.taken[-2:] == [State.NEEDS_LOGIN, State.STALE]
    assert session.shown.why == "iLink answered -14"
    await end(session, task)
