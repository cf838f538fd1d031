"""How a bot is polled: failures, silence, pauses, and the end; nothing lost, nothing twice."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
import uvloop
from structlog.testing import capture_logs

from adapter.bridge.poller import AFTER_CANCEL_S, ANSWER_GRACE_S, LONGEST_HOLD_MS, State
from adapter.bridge.presence import Here
from adapter.contract.messages import BindingEvent
from adapter.errors import Refused, Temporary
from adapter.ilink.translate import read_message
from adapter.ports import HOLD_MS, Account, BusMessage, InboundMessage, Polled
from adapter.tools.seal import Sealer
from adapter.tools.timing import PerTickLimiter, RateLimiter
from tests.fakes import Bench, Failing, Rounds, batch, ready
from tests.inbound.pollers import BOT, STALE, Poller, polls, raw, start_poller, texts

VIRTUAL_TIME = True


async def test_a_cursor_without_messages_is_used_at_once_and_written_once_a_day(poller: Poller) -> None:
    """A write for each empty poll of thousands of bots would be most of all writes."""
    bench = await ready(batch(cursor="b"), None, batch(cursor="c"), None, batch(cursor="d"))
    session = poller(bench)
    await asyncio.sleep(160)
    assert bench.chat.asked == ["", "b", "b", "c", "c", "d"]
    assert bench.bus.writes == []
    for cursor in ("e", "f"):
        bench.chat.polls.append(batch(cursor=cursor))
        session.cancel_poll()
        await asyncio.sleep(25 * 3600)
    assert bench.bus.writes.count("person") == 1


async def test_no_poll_starts_before_all_of_an_answer_is_stored(poller: Poller) -> None:
    """iLink forgets it with the next poll."""
    bench = await ready(batch(raw("one", 1), raw("two", 2), cursor="b"))
    gate = asyncio.Event()

    async def wait(message: BusMessage) -> None:
        if message.stream == "in":
            await gate.wait()

    bench.bus.on_publish = wait
    session = poller(bench)
    await asyncio.sleep(300)
    assert (texts(bench), bench.chat.asked, session.state) == ([], [""], State.STORING)
    assert session.has_answer
    gate.set()
    await asyncio.sleep(1)
    assert (texts(bench), bench.chat.asked, session.state) == (["one", "two"], ["", "b"], State.POLLING)


async def test_an_empty_cursor_keeps_the_old_one() -> None:
    bench = await ready(batch(raw(number=1), cursor="b"), batch(raw(number=2), cursor=None), batch(cursor=None))
    await polls(bench)
    assert bench.chat.asked == ["", "b", "b", "b"]
    assert len(texts(bench)) == 2


async def test_what_a_server_is_given_beyond_its_word_is_also_that_of_a_dead_tokens_tries() -> None:
    bench = await ready(batch(hold_ms=20_000), None, batch(raw(), hold_ms=20_000), STALE, batch(hold_ms=20_000))
    await polls(bench)
    assert bench.chat.holds == [35_000, 20_000, 40_000, 40_000, 40_000, 20_000]


async def test_ilinks_own_delay_wins_over_our_backoff() -> None:
    bench = await ready(Temporary("http_4xx", retry_after_s=90))
    await polls(bench)
    first, again = bench.chat.polled_at
    assert again - first >= 90


async def test_a_server_that_fails_is_not_hammered(poller: Poller) -> None:
    bench = await ready(*[Temporary("http_5xx")] * 100)
    session = poller(bench)
    await asyncio.sleep(600)
    assert len(bench.chat.asked) < 60
    assert session.state is State.RETRYING


async def test_a_bot_shows_why_its_polls_fail_until_one_is_answered(poller: Poller) -> None:
    refusal = Temporary("unreadable", "the answer exceeds 8388608 bytes")
    bench = await ready(refusal, refusal, batch(cursor="b"))
    session = poller(bench)
    await asyncio.sleep(0.3)
    assert session.shown.why == "unreadable: the answer exceeds 8388608 bytes"
    await asyncio.sleep(10)
    assert (session.state, session.shown.why) == (State.POLLING, "")


MOVES = itertools.count()


@pytest.mark.parametrize(
    "answer",
    [
        lambda: Polled([], None, 35_000),
        lambda: Polled([], f"c{next(MOVES)}", 35_000),
        lambda: Polled([raw()], None, 35_000),
    ],
    ids=["empty", "moving", "repeated"],
)
async def test_a_server_that_does_not_hold_is_not_hammered(poller: Poller, answer: Callable[[], Polled]) -> None:
    """At once, for ever: an error code 0, a cursor that moves for nothing, or the same batch."""
    poller(bench := await ready(*[answer] * 1000))
    await asyncio.sleep(60)
    assert len(bench.chat.asked) <= 60 / 0.25


async def test_pages_of_repeats_are_fetched_one_right_after_the_other(poller: Poller) -> None:
    """As iLink sends them after an outage of its own: what is new comes behind them."""
    poller(bench := await ready(*[lambda: Polled([raw()], f"c{next(MOVES)}", 35_000)] * 100))
    await asyncio.sleep(15)
    assert len(bench.chat.asked) > 100


async def test_a_bot_on_a_dead_path_does_not_count_as_polled_until_ilink_answers(poller: Poller) -> None:
    """Only an answer proves that a poll lives: one that nobody ever answered looked healthy for ever."""
    bench = await ready(None, None, None, None, batch(cursor="b"))
    session = poller(bench)
    await asyncio.sleep((HOLD_MS + 1.5 * LONGEST_HOLD_MS) / 1000)
    assert (len(bench.chat.asked), session.state) == (3, State.POLLING)
    await asyncio.sleep(LONGEST_HOLD_MS / 1000)
    assert (len(bench.chat.asked), session.state) == (4, State.RETRYING)
    await asyncio.sleep(LONGEST_HOLD_MS / 1000)
    assert (len(bench.chat.asked), session.state) == (6, State.POLLING)


async def test_a_server_that_holds_longer_than_it_says_is_waited_for(poller: Poller) -> None:
    """Its polls were all cut, and what it was writing into one may have been lost."""
    bench = await ready()

    async def poll(account: Account, cursor: str, hold_ms: int) -> Polled | None:
        bench.chat.holds.append(hold_ms)
        await asyncio.sleep(min(20, hold_ms / 1000 + 7))
        return Polled([], "a", 5_000) if hold_ms / 1000 + 7 > 20 else None

    bench.chat.poll = poll  # type: ignore[method-assign]
    poller(bench)
    await asyncio.sleep(100)
    assert bench.chat.holds == [HOLD_MS] * 5


async def test_a_server_that_keeps_its_hold_is_waited_for_no_longer_after_a_lost_poll() -> None:
    bench = await ready(Polled([], "a", 5_000), None, Polled([], "b", 5_000), Polled([], "c", 5_000))
    await polls(bench)
    assert bench.chat.holds == [HOLD_MS, 5_000, 10_000, 5_000, 5_000]


@pytest.mark.parametrize("pause_s", [5.0, ANSWER_GRACE_S / 2], ids=["a pause", "over before the polls have ended"])
async def test_answers_that_come_at_once_are_stored_a_few_in_each_round_of_the_event_loop(pause_s: float) -> None:
    """Thousands in one would take longer than the lease, which is lost then. So would as many polls after a pause."""
    bench, bots = await ready(), [f"b{number}@im.bot" for number in range(20)]
    rounds, came = Rounds(), asyncio.Event()

    async def poll(account: Account, cursor: str, hold_ms: int) -> Polled | None:
        if cursor:
            await asyncio.sleep(hold_ms / 1000)
            return Polled([], cursor, hold_ms)
        rounds.note("polls")
        await came.wait()
        return batch(raw(from_user_id=account.bot.replace("bot", "wechat")))

    def read(message: bytes) -> InboundMessage:
        rounds.note("stored")
        return read_message(message)

    bench.chat.poll = poll  # type: ignore[method-assign]
    for number, bot in enumerate(bots):
        await bench.bind(f"s{number}", bot, bot.replace("bot", "wechat"))
    deps: dict[str, Any] = {"ticks": PerTickLimiter(3), "read_message": read}
    sessions = [bench.new_poller(bot, **deps) for bot in bots]
    tasks = [asyncio.create_task(session.run()) for session in sessions]
    await asyncio.sleep(5)
    bench.leases.has_lease = False
    for session in sessions:
        session.cancel_poll()
    rounds.seen["polls"].clear()
    await asyncio.sleep(pause_s)
    bench.leases.has_lease = True
    bench.leases.changed.notify_all()
    await asyncio.sleep(5)
    came.set()
    await asyncio.sleep(5)
    assert len(bench.bus.inbound()) == len(bots)
    for what in ("polls", "stored"):
        assert rounds.seen[what].total() == len(bots)
        assert max(rounds.seen[what].values()) <= 6  # two of those rounds may fall into one of these
    for session in sessions:
        session.stop(immediately=True)
    await asyncio.wait(tasks)


async def test_bots_for_which_nothing_came_poll_again_together() -> None:
    """Each alone wakes the process for itself."""
    bench = await ready()
    await bench.bind("s2", "b2@im.bot", "u2@im.wechat")
    deps: dict[str, Any] = {}
    asked: list[float] = []
    answers = {BOT: 30.0, "b2@im.bot": 30.04}

    async def poll(account: Account, cursor: str, hold_ms: int) -> Polled | None:
        asked.append(bench.clock.monotonic())
        await asyncio.sleep(answers[account.bot])
        return Polled([], cursor, hold_ms)

    bench.chat.poll = poll  # type: ignore[method-assign]
    sessions = [bench.new_poller(bot, **deps) for bot in (BOT, "b2@im.bot")]
    tasks = [asyncio.create_task(session.run()) for session in sessions]
    await asyncio.sleep(45)
    assert len(asked) == 4
    assert asked[2] == asked[3]
    for session in sessions:
        session.stop(immediately=True)
    await asyncio.wait(tasks)


async def test_bots_that_start_together_are_polled_one_after_the_other_and_leave_at_once() -> None:
    bench = await ready()
    deps: dict[str, Any] = {"starts": RateLimiter(0.1)}
    sessions = [bench.new_poller(BOT, **deps)]
    for number in range(2, 6):
        await bench.bind(f"s{number}", f"b{number}@im.bot", f"u{number}@im.wechat")
        sessions.append(bench.new_poller(f"b{number}@im.bot", **deps))
    asked: list[str] = []

    async def poll(account: Account, cursor: str, hold_ms: int) -> Polled | None:
        asked.append(account.bot)
        await asyncio.Event().wait()
        return None

    bench.chat.poll = poll  # type: ignore[method-assign]
    tasks = [asyncio.create_task(session.run()) for session in sessions]
    started = []
    for _ in range(3):
        await asyncio.sleep(9.9)
        started.append((len(bench.chat.notified), len(asked)))
        await asyncio.sleep(0.1)
    assert started == [(1, 1), (2, 2), (3, 3)]
    for session in sessions:
        session.stop(immediately=True)
    async with asyncio.timeout(1):
        await asyncio.wait(tasks)
    assert bench.chat.notified.count(True) == 4, "who had to wait is not said to have begun"


async def test_a_lease_that_pauses_cuts_the_poll_and_one_that_resumes_polls_on(poller: Poller) -> None:
    bench = await ready(batch(cursor="b"))
    session = poller(bench)
    await asyncio.sleep(1)
    assert bench.chat.polling == 1
    bench.leases.has_lease = False
    session.cancel_poll()
    await asyncio.sleep(20)
    assert (bench.chat.polling, session.state) == (0, State.PAUSED)
    bench.leases.has_lease = True
    bench.leases.changed.notify_all()
    await asyncio.sleep(1)
    assert bench.chat.polling == 1
    assert bench.chat.asked == ["", "b", "b"]


async def test_a_poll_that_was_cut_has_a_moment_to_end_at_ilink_before_the_next(poller: Poller) -> None:
    """Where the lease is back at once: a busy server would hear of it before it sees the old connection end."""
    bench = await ready()
    session = poller(bench)
    await asyncio.sleep(1)
    session.cancel_poll()
    cut = bench.clock.monotonic()
    await asyncio.sleep(1)
    assert bench.chat.polling == 1
    (_, again) = bench.chat.polled_at
    assert again - cut >= ANSWER_GRACE_S + AFTER_CANCEL_S


async def test_after_an_outage_polls_start_at_the_rate_of_first_polls(poller: Poller) -> None:
    """All would start at the same moment: the lease is back for all bots at once."""

    bench = await ready()
    began = bench.clock.monotonic()
    session = poller(bench, starts=RateLimiter(1 / 20))
    await asyncio.sleep(5)
    before = len(bench.chat.polled_at)
    bench.leases.has_lease = False
    session.cancel_poll()
    await asyncio.sleep(8)
    bench.leases.has_lease = True
    bench.leases.changed.notify_all()
    await asyncio.sleep(30)
    assert len(bench.chat.polled_at) == before + 1
    assert bench.chat.polled_at[-1] - began == pytest.approx(20.0, abs=0.1)


async def test_an_answer_that_has_arrived_when_its_poll_is_cut_is_stored() -> None:
    """As after a pause of the whole process: the timer of the lease and the answer are there at the same moment."""
    bench = await ready(batch(raw()))
    session, task = start_poller(bench)
    while not bench.chat.polling:
        await asyncio.sleep(0)
    session.stop(immediately=True)
    await task
    assert texts(bench) == ["hello"]
    assert (await bench.person()).state.cursor == "b"


async def test_a_bot_that_waits_for_the_bus_does_not_count_as_polled(poller: Poller) -> None:
    """Through an outage of NATS every bot counted as polled, though nobody polled any: nothing looks at the lease
    before the bus is back.
    """
    bench = await ready(batch(cursor="b"))
    session = poller(bench)
    while not bench.chat.polling:
        await asyncio.sleep(0)
    bench.bus_up.clear()
    await asyncio.sleep(5)
    assert (bench.chat.asked, session.state) == ([""], State.PAUSED)
    bench.bus_up.set()
    await asyncio.sleep(1)
    assert (bench.chat.asked, session.state) == (["", "b"], State.POLLING)


async def test_a_bot_that_waits_for_the_bus_ends_when_it_is_told(poller: Poller) -> None:
    """A replica that stops while NATS is away has nothing to wait for."""
    bench = await ready(batch(cursor="b"))
    session = poller(bench)
    while not bench.chat.polling:
        await asyncio.sleep(0)
    bench.bus_up.clear()
    await asyncio.sleep(5)
    session.stop(immediately=False)
    await asyncio.sleep(2)
    assert (bench.chat.asked, session.state) == ([""], State.ENDED)


async def test_a_notifystart_without_an_answer_holds_the_first_poll_up_for_a_moment_only(poller: Poller) -> None:
    bench = await ready()
    bench.chat.notify_took_s = 60.0
    began = bench.clock.monotonic()
    poller(bench)
    await asyncio.sleep(5)
    assert [at - began <= 2.0 for at in bench.chat.polled_at] == [True]


async def test_ilink_is_told_of_the_start_after_each_idle_poll_until_it_answers() -> None:
    """Sends may be refused until it knows."""
    bench = await ready()
    bench.chat.notify_fails = Temporary("http_5xx")
    counts: list[int] = []

    def answered(number: int) -> Polled:
        counts.append(len(bench.chat.notified))
        if number == 3:
            bench.chat.notify_fails = None
        return Polled([raw(number=number)] if number == 2 else [], f"c{number}", 35_000)

    bench.chat.polls.extend([partial(answered, number) for number in range(1, 6)])
    await polls(bench)
    assert counts == [1, 2, 2, 3, 3]


async def test_notifystart_and_notifystop_are_sent_and_need_no_answer() -> None:
    bench = await ready()
    bench.chat.notify_fails = Temporary("timeout")
    session, task = start_poller(bench)
    await asyncio.sleep(1)
    assert bench.chat.notified == [True]
    assert bench.chat.asked == [""]
    await bench.give(session)
    session.stop(immediately=True)
    await task
    assert bench.chat.notified == [True, False]


async def test_no_notifystop_is_sent_where_another_replica_goes_on() -> None:
    bench = await ready()
    session, task = start_poller(bench)
    await asyncio.sleep(1)
    bench.presence.on_here(msgspec.json.encode(Here(replica="other", owned=3, counts=True)))
    await bench.give(session)
    session.stop(immediately=True)
    await task
    assert bench.chat.notified == [True]
    assert {*bench.freed} == {BOT}


async def test_leaving_at_a_boundary_lets_the_poll_deliver() -> None:
    bench = await ready(batch(raw("last words"), cursor="b"), batch(raw("never asked", 2)))
    session, task = start_poller(bench)
    await asyncio.sleep(0.01)
    assert bench.chat.polling == 1
    session.stop(immediately=False)
    await task
    assert texts(bench) == ["last words"]
    assert bench.chat.polling == 0


async def test_a_recovered_tokens_answer_is_stored_before_its_event() -> None:
    """A drain ends pollers outright unless they have an answer in hand; iLink may not deliver it again."""
    bench = await ready(STALE, batch(raw("in hand")))
    publish, away = bench.events.publish_binding_event, Failing(10**6, Temporary("bus_down"))

    async def recovered_late(event: BindingEvent, **options: Any) -> None:
        if event.change == "recovered":
            await away()
        await publish(event, **options)

    bench.events.publish_binding_event = recovered_late  # type: ignore[method-assign]
    session, task = start_poller(bench)
    await asyncio.sleep(60)
    assert (len(bench.chat.asked), texts(bench)) == (2, ["in hand"])
    session.stop(immediately=True)
    away.left = 0
    await asyncio.sleep(60)
    assert task.done()


async def test_stopping_ends_a_poller_that_reads_the_inbox_in_vain() -> None:
    """Unbinding, a move and a hand-over go on while `WECHAT_IN` has no leader."""
    bench = await ready()
    bench.bus.unreadable = 10**6
    session, task = start_poller(bench)
    await asyncio.sleep(5)
    assert session.state is State.RETRYING
    session.stop(immediately=True)
    await asyncio.sleep(30)
    assert task.done()


async def test_a_poller_cancelled_while_it_publishes_a_dead_token_tells_of_its_end() -> None:
    """As by a drain while the bus takes no events: the next owner waits for the word."""
    bench = await ready(STALE)

    async def never(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    bench.events.publish_binding_event = never  # type: ignore[method-assign]
    session, task = start_poller(bench)
    await asyncio.sleep(5)
    assert session.session.is_stale
    await bench.give(session)
    task.cancel()
    await asyncio.sleep(5)
    assert (task.cancelled(), {*bench.freed}) == (True, {BOT})


async def test_a_cursor_too_long_to_keep_is_a_failure_that_is_shown(poller: Poller) -> None:
    """iLink gives the same again for the old one; told apart as repeats, nothing else would show it."""
    long = Polled([raw()], None, 35_000, overlong=70_000)
    bench = await ready(long, long)
    with capture_logs() as logs:
        session = poller(bench)
        await asyncio.sleep(10)
    assert (session.state, session.shown.why[:16]) == (State.RETRYING, "cursor_too_long:")
    failures = [entry["failures"] for entry in logs if entry["event"] == "poll.failed"]
    assert failures == [1, 2]
    assert texts(bench) == ["hello"]


async def test_a_bug_ends_no_poller() -> None:
    bench = await ready(RuntimeError("a bug"), batch(raw()))
    with capture_logs() as logs:
        session, task = start_poller(bench)
        await asyncio.sleep(30)
    assert texts(bench) == ["hello"]
    assert "poller.crashed" in [line["event"] for line in logs]
    session.stop(immediately=True)
    await task


async def test_a_pause_after_a_failure_is_a_boundary() -> None:
    """Who gives the bot away, or stops, need not wait for it."""
    bench = await ready(Temporary("http_4xx", "HTTP 429", retry_after_s=300.0))
    session, task = start_poller(bench)
    await asyncio.sleep(60)
    session.stop(immediately=False)
    began = bench.clock.monotonic()
    await task
    assert bench.clock.monotonic() - began < 1.0


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_an_answer_that_came_while_the_loop_was_busy_is_read_before_the_poll_is_cut(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """A busy machine holds a process up between two reads; uvloop calls what is due by then before it reads on."""
    (ours, ilink), (busy, waker) = socket.socketpair(), socket.socketpair()

    def block() -> None:
        busy.recv(1)
        ilink.send(b"hi")
        time.sleep(ANSWER_GRACE_S * 2)  # stands for the others, who have the partition

    async def poll() -> bytes:
        loop, session = asyncio.get_running_loop(), Bench().new_poller("b1")
        reader, writer = await asyncio.open_connection(sock=ours)
        loop.add_reader(busy, block)
        session._waiting = asyncio.current_task()
        session.cancel_poll()
        waker.send(b"!")
        try:
            return await reader.readexactly(2)
        finally:
            loop.remove_reader(busy)
            writer.close()

    with ilink, busy, waker, asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(poll()) == b"hi"


async def test_what_nobody_polls_grows_old_while_its_poller_begins_again_and_again(poller: Poller) -> None:
    bench = await ready(*[Refused("url", "may not be called")] * 100)
    session = poller(bench)
    await asyncio.sleep(1)
    first = session.unanswered_since
    await asyncio.sleep(300)
    assert session.unanswered_since == first


async def test_no_secret_reaches_the_log_or_the_bus() -> None:
    sealer = Sealer((bytes(32),))
    script = STALE, Temporary("network"), batch(raw("my secret text"), cursor="SECRET")
    bench = await ready(*script, token=sealer.seal(BOT, "b1@im.bot:SECRET"))
    with capture_logs() as logs:
        session, task = start_poller(bench)
        await asyncio.sleep(60)
        session.stop(immediately=True)
        await task
    assert "SECRET" not in str(logs)
    assert "my secret text" not in str(logs)
    assert "token-1" not in str(logs)
    stored = b"".join(kept.stored.data for kept in bench.bus.kept)
    assert b"SECRET" not in stored
    assert b"token-1" not in stored
    assert texts(bench) == ["my secret text"]
