"""iLink refuses a bot's token (-14): the tries, the login that is lost, and the one that lives again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from adapter.bridge.bindings import mark_login, publish_login_event
from adapter.bridge.poller import BotPoller, State
from adapter.contract.messages import BindingEvent, BindingState
from adapter.contract.records import Binding
from adapter.errors import Temporary
from adapter.ilink.protocol import IlinkReply, read_sent, read_updates
from adapter.ports import Account, BusMessage, Polled
from tests.fakes import Bench, batch, ready
from tests.inbound.pollers import BOT, STALE, USER, Poller, raw, start_poller, texts

VIRTUAL_TIME = True


def changes(bench: Bench) -> list[str]:
    return [event.change for event in bench.bus.events()]


async def test_minus_14_for_ever_ends_in_needs_login_and_few_polls(poller: Poller) -> None:
    """-14 for ever: at once, after 5 s and 30 s, each with a notifystart before it; then the login is lost. It is
    tried all the same: after 5 minutes, every hour, and after three days every day."""
    bench = await ready(*[STALE] * 100)
    session = poller(bench)
    await asyncio.sleep(55)
    assert changes(bench) == ["stale", "needs_login"]
    lost = bench.bus.events()[1]
    assert (lost.reason, lost.user) == ("iLink answered -14", USER)
    assert "QR code" in lost.detail
    assert (bench.bus.events()[1].at_ms - bench.bus.events()[0].at_ms) < 55_000
    assert session.state is State.NEEDS_LOGIN
    await asyncio.sleep(6 * 86_400)
    at = [round(when - bench.chat.polled_at[0]) for when in bench.chat.polled_at]
    hours, days = [35 + 3600 * hour for hour in range(1, 73)], [35 + 86_400 * day for day in range(4, 7)]
    assert at == [0, 5, 35, 335, *hours, *days]
    assert bench.chat.notified == [True] * len(at)
    assert changes(bench) == ["stale", "needs_login"]
    binding = bench.bindings.get(BOT)
    assert binding is not None
    assert (binding.state, binding.reason, session.state) == ("needs_login", "stale_token", State.NEEDS_LOGIN)


async def test_a_token_that_lives_again_after_needs_login_is_active_again(poller: Poller) -> None:
    """What its poll brings is told, and what waited is sent."""
    bench = await ready(STALE, STALE, STALE, batch(raw()))
    session, partition = poller(bench), bench.partition()
    await asyncio.sleep(300)
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(20)
    assert changes(bench) == ["stale", "needs_login"]
    assert [(receipt.outcome, receipt.reason) for receipt in bench.bus.receipts()] == [("parked", "needs_login")]
    await asyncio.sleep(40)
    assert changes(bench) == ["stale", "needs_login", "recovered"]
    binding = bench.bindings.get(BOT)
    assert binding is not None
    assert (binding.state, binding.reason) == ("active", "")
    assert (texts(bench), bench.chat.texts, session.state) == (["hello"], ["hi"], State.POLLING)
    partition.stop()


async def test_only_a_poll_that_succeeds_undoes_the_verdict_and_any_owner_makes_it(poller: Poller) -> None:
    """A notifystart, an iLink that is away and a poll without an answer prove nothing."""
    bench = Bench()
    await bench.bind(state="needs_login", since_ms=bench.clock.now_ms() - 100 * 3_600_000)
    bench.chat.polls.extend([Temporary("http_5xx"), None, STALE, batch(raw())])
    session, began = poller(bench), bench.clock.monotonic()
    await asyncio.sleep(3 * 86_400)
    assert (bench.chat.notified, changes(bench)) == ([True] * 3, [])
    binding = bench.bindings.get(BOT)
    assert binding is not None
    assert (binding.state, session.state) == ("needs_login", State.NEEDS_LOGIN)
    await asyncio.sleep(86_400)
    assert [round((when - began) / 3600) for when in bench.chat.polled_at[:4]] == [20, 44, 68, 92]
    assert (changes(bench), texts(bench), session.state) == (["recovered"], ["hello"], State.POLLING)


@pytest.mark.parametrize("count", [0, 1, 4])
async def test_needs_login_is_published_when_the_last_retry_is_refused(poller: Poller, count: int) -> None:
    bench = await ready(*[STALE] * 100)
    poller(bench, stale_retry_s=[20.0] * count)
    await asyncio.sleep(250)
    assert [round(when - bench.chat.polled_at[0]) for when in bench.chat.polled_at] == [
        20 * number for number in range(count + 1)
    ]
    assert changes(bench) == ["stale", "needs_login"]
    stale, lost = bench.bus.events()
    assert round((lost.at_ms - stale.at_ms) / 1000) == 20 * count


async def test_minus_14_once_recovers_quickly(poller: Poller) -> None:
    """-14 once: nothing is lost and the lanes are woken."""
    bench = await ready(STALE, batch(raw()))
    session = poller(bench)
    await asyncio.sleep(1)
    assert session.session.is_stale
    await asyncio.sleep(10)
    assert not session.session.is_stale
    assert changes(bench) == ["stale", "recovered"]
    assert texts(bench) == ["hello"]
    assert bench.changed_sessions == ["s1", "s1"]  # tried again, alive


async def test_a_server_that_cannot_be_reached_proves_no_login_lost(poller: Poller) -> None:
    """Only -14 says so: a scan of a QR code is a lot to ask of a person for an outage."""
    bench = await ready(STALE, *[Temporary("network")] * 100, batch(raw()))
    poller(bench)
    await asyncio.sleep(24 * 3600)
    assert changes(bench) == ["stale", "recovered"]
    assert texts(bench) == ["hello"]


@pytest.mark.parametrize("status", [401, 403])
async def test_ten_minutes_of_a_firewall_cost_neither_a_login_nor_a_command(poller: Poller, status: int) -> None:
    """The poll whose answer it forbids is made again, and so is the send, until iLink is there."""
    bench = await ready()
    bench.hears()
    ends_at = bench.clock.monotonic() + 600

    def forbid(read: Callable[[], object]) -> None:
        if bench.clock.monotonic() < ends_at:
            read()

    def polled() -> Polled:
        forbid(lambda: read_updates(IlinkReply(status, {}, b"<html>no</html>"), polled_s=0.1))
        bench.chat.polls.clear()  # no other poll is answered
        return batch(raw())

    async def sent(_: object) -> None:
        forbid(lambda: read_sent(IlinkReply(status, {}, b"<html>no</html>")))

    bench.chat.polls.extend([polled] * 1000)
    bench.chat.on_send = sent
    session, partition = poller(bench), bench.partition()
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(1200)
    assert (changes(bench), session.state) == ([], State.POLLING)
    assert texts(bench) == ["hello"]
    assert [(receipt.command, receipt.outcome) for receipt in bench.bus.receipts()] == [("c1", "accepted")]
    partition.stop()


async def test_a_new_token_ends_the_recovery_of_the_old_one(poller: Poller) -> None:
    bench = await ready(STALE)
    session = poller(bench)
    await asyncio.sleep(1)
    await bench.bind(token="new")
    session.cancel_poll()
    await asyncio.sleep(1)
    assert bench.chat.tokens[-1] == "new"
    assert changes(bench) == ["stale"]
    assert not session.session.is_stale


async def test_a_token_bound_anew_polls_again_after_needs_login(poller: Poller) -> None:
    bench = await ready()
    await bench.bind(state="needs_login", since_ms=bench.clock.now_ms())
    poller(bench)
    await asyncio.sleep(200)
    assert bench.chat.asked == []
    await bench.bind(token="new")
    await asyncio.sleep(2)
    assert bench.chat.tokens == ["new"]


async def in_its_last_try(*script: Any) -> tuple[Bench, asyncio.Event, asyncio.Task[None], BotPoller]:
    """A bot that needs a login by our word, and whose last poll with the old token waits for what is set."""
    bench, answered = await ready(STALE, STALE, STALE), asyncio.Event()
    poll = bench.chat.poll

    async def asked(account: Account, cursor: str, hold_ms: int) -> Polled | None:
        if len(bench.chat.asked) == 3:
            bench.chat.asked.append(cursor)
            await answered.wait()
            return batch(raw("late"), cursor="c")
        return await poll(account, cursor, hold_ms)

    bench.chat.poll = asked  # type: ignore[method-assign]
    session, task = start_poller(bench)
    await asyncio.sleep(345)
    assert (len(bench.chat.asked), changes(bench)) == (4, ["stale", "needs_login"])
    return bench, answered, task, session


async def test_the_result_of_the_last_try_is_published_though_the_bot_was_bound_meanwhile() -> None:
    bench, answered, task, session = await in_its_last_try()
    await bench.bind()
    answered.set()
    await asyncio.sleep(5)
    session.stop(immediately=True)
    await task
    assert texts(bench) == ["late"]


def untellable(bench: Bench, change: str) -> None:
    """The bus is away as a change of a login is to be told for the first time."""
    publish, failures = bench.events.publish_binding_event, [Temporary("bus_timeout")]

    async def binding(event: BindingEvent, **more: Any) -> None:
        if failures and event.change == change:
            raise failures.pop()
        await publish(event, **more)

    bench.events.publish_binding_event = binding  # type: ignore[method-assign]


async def test_a_lost_login_is_published_and_tried_again_after_an_outage_of_the_bus() -> None:
    bench = await ready(STALE, STALE, STALE, batch(raw()))
    untellable(bench, "needs_login")
    session, task = start_poller(bench)
    await asyncio.sleep(360)
    session.stop(immediately=True)
    await task
    assert changes(bench) == ["stale", "needs_login", "recovered"]
    assert texts(bench) == ["hello"]


@pytest.mark.parametrize("away", ["binding", "event"])
async def test_a_login_that_cannot_be_stored_as_lost_does_not_delay_the_drain(away: str) -> None:
    """Nothing is in hand: the next owner hears of the dead token, too, or finds the mark."""
    bench = await ready(STALE, STALE, STALE)
    session, task = start_poller(bench)
    await asyncio.sleep(20)

    async def fail(*_: object) -> None:
        raise Temporary("bus_timeout")

    async def fail_events(message: BusMessage) -> None:
        if message.stream == "event":
            await fail()

    if away == "binding":
        bench.bindings_bucket.on_write = fail
    else:
        bench.bus.on_publish = fail_events
    await asyncio.sleep(100)
    session.stop(immediately=True)
    await asyncio.sleep(2)
    assert task.done()
    assert changes(bench) == ["stale"]


async def test_who_lost_the_bot_while_the_bus_was_away_does_not_end_its_login() -> None:
    bench = await ready(STALE, STALE, STALE)
    session, task = start_poller(bench)
    await asyncio.sleep(20)
    away = [True]

    async def write(key: str) -> None:
        if away:
            raise Temporary("bus_timeout")

    bench.bindings_bucket.on_write = write
    await asyncio.sleep(340)
    bench.leases.owned.clear()
    session.stop(immediately=True)
    successor = Bench(bench, instance="next-1")
    second, next_task = start_poller(successor)
    await asyncio.sleep(5)
    away.clear()
    await asyncio.sleep(5)
    assert (task.done(), second.state, changes(bench)) == (True, State.POLLING, ["stale"])
    second.stop(immediately=True)
    await next_task


@pytest.mark.parametrize(("state", "change"), [("needs_login", "needs_login"), ("active", "recovered")])
async def test_a_crash_between_a_login_and_its_event_leaves_the_event_to_the_next_owner(
    poller: Poller, state: BindingState, change: str
) -> None:
    bench = await ready(state=state, since_ms=7, event_pending=True)
    poller(bench)
    await asyncio.sleep(1)
    assert changes(bench) == [change]
    binding = bench.bindings.get(BOT)
    assert binding is not None
    assert not binding.event_pending


async def test_a_login_event_published_before_a_crash_is_not_published_again(poller: Poller) -> None:
    bench = await ready(state="needs_login", since_ms=7, event_pending=True)
    binding = bench.bindings.get(BOT)
    assert binding is not None
    await publish_login_event(bench.bindings, bench.events, binding)
    await bench.bind(state="needs_login", since_ms=7, event_pending=True)
    poller(bench)
    await asyncio.sleep(1)
    assert changes(bench) == ["needs_login"]


async def test_a_dead_login_that_a_send_could_not_publish_is_published_by_the_poller(poller: Poller) -> None:
    bench = await ready(state="needs_login")
    session = poller(bench)
    await asyncio.sleep(1)
    binding = bench.bindings.get(BOT)
    assert binding is not None
    assert await mark_login(bench.bindings, bench.clock, binding, "active") is not None
    await asyncio.sleep(1)
    assert (changes(bench), session.state) == (["recovered"], State.POLLING)


@pytest.mark.parametrize("end", ["bound anew", "moved", "lease lost"])
async def test_however_a_recovery_ends_the_conversations_check_again(end: str) -> None:
    """They slept for an hour where a new token was bound as a try's poll waited, the bot's next sandbox had sent
    while the old one was tried, or the lease paused."""
    bench, changes = await ready(STALE), list[tuple[str, bool]]()

    def session_changed(binding: Binding) -> None:
        changes.append((binding.sandbox, session.session.is_stale))

    session, task = start_poller(bench, on_session_changed=session_changed)
    await asyncio.sleep(6 if end == "bound anew" else 1)
    assert (session.session.is_stale, len(bench.chat.asked)) == (True, 2 if end == "bound anew" else 1)
    if end == "bound anew":
        await bench.bind(token="new")
        session.cancel_poll()
    elif end == "moved":
        await bench.bind("s2")
        session.stop(immediately=False)
    else:
        bench.leases.has_lease = False
    await asyncio.sleep(10)
    if end == "lease lost":  # nothing is sent meanwhile
        assert changes == [("s1", True)]
        session.stop(immediately=True)
        await task
    assert changes == [("s1", True), ("s2" if end == "moved" else "s1", False)]
    session.stop(immediately=True)
    await task
