"""What the supervisor tells of ten thousand bindings, in a scrape of one size; room for bots, shards given away."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, get_args

import msgspec
import pytest

from adapter.bindings.registry import Bindings
from adapter.contract.names import SHARDS, shard_of
from adapter.contract.records import Binding
from adapter.inbound.bot_poller import ANSWER_GRACE_S, BotPoller, State
from adapter.inbound.poller import run_poller
from adapter.ports import Entry
from adapter.replica.supervisor import Supervisor
from tests.fakes import Bench, FakeLeases, batch, ready, settle
from tests.inbound.pollers import BOT, raw

VIRTUAL_TIME = True

BOTS = 10_000
STATES: tuple[State, ...] = get_args(State)


class NoWork:
    """Implements ShardWork: no shard is ever opened here."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is not asked for")


async def no_poll(session: BotPoller) -> None:
    raise AssertionError(f"{session.bot} is not polled")


def supervisor(
    bench: Bench,
    *,
    leases: FakeLeases | None = None,
    run_poller: Callable[[BotPoller], Coroutine[Any, Any, None]] = no_poll,
    capacity: int = BOTS,
) -> Supervisor:
    async def publish_released() -> None: ...

    return Supervisor(
        bindings=bench.bindings,
        leases=leases or bench.leases,
        run_poller=run_poller,
        work=NoWork(),
        publish_released=publish_released,
        clock=bench.clock,
        metrics=bench.metrics,
        capacity=capacity,
    )


class Throttled(NamedTuple):
    """A shard of which the metrics ask."""

    throttled_bots: set[str]
    tasks: int = 0

    def queue_depths(self, parked: Counter[str]) -> tuple[int, int | None]:
        return 0, None


def bind(bindings: Bindings, count: int) -> None:
    for number in range(count):
        binding = Binding(sandbox=f"s{number}", bot=f"{number:06}@im.bot", user=f"u{number}", token="t")
        bindings._apply_entry(Entry(f"{number:06}", msgspec.json.encode(binding), number + 1))


@pytest.fixture
async def bench() -> Bench:
    bench = Bench()
    bind(bench.bindings, BOTS)
    assert len(bench.bindings) == BOTS
    return bench


def poll(made: Supervisor, bench: Bench, *, every_state: bool = True) -> None:
    """Every binding has a poller; the states go round."""
    for number, binding in enumerate(bench.bindings):
        session = made.pollers[binding.bot] = BotPoller(binding.bot)
        session.state = STATES[number % len(STATES)] if every_state else "polling"
        session.unanswered_since = bench.clock.monotonic() - (100.0 if number == 7 else 1.0)


async def test_ten_thousand_bindings_are_a_scrape_of_the_same_size(bench: Bench) -> None:
    made = supervisor(bench)
    made._shards[0] = Throttled({f"{number:06}@im.bot" for number in range(60)})  # type: ignore[assignment]
    empty = bench.metrics.expose()[0]
    poll(made, bench)
    made.observe(30_000)
    body = bench.metrics.expose()[0]
    samples = [line for line in body.decode().splitlines() if not line.startswith("#")]
    assert len(samples) == sum(not line.startswith(b"#") for line in empty.splitlines()) <= 1_000
    assert len(body) <= 100_000
    states = {state: bench.metrics.value("bindings", state=state) for state in (*STATES, "throttled")}
    assert sum(states.values()) == BOTS
    assert states["throttled"] == 60 // len(STATES)
    assert bench.metrics.value("tasks", kind="other") == 30_000


async def test_what_the_polls_of_a_bot_show_of_its_token(bench: Bench) -> None:
    """Only what was answered since counts."""
    made = supervisor(bench)
    binding = next(iter(bench.bindings))
    assert not made.has_polled_since(binding.bot, 0.0)
    session = made.pollers[binding.bot] = BotPoller(binding.bot)
    session.polled_at = 10.0
    assert [made.has_polled_since(binding.bot, since) for since in (5.0, 10.0, 15.0)] == [True, False, False]
    session.stale = True
    assert not made.has_polled_since(binding.bot, 5.0)


async def test_the_bot_that_was_answered_longest_ago_is_seen_among_ten_thousand(bench: Bench) -> None:
    made = supervisor(bench)
    poll(made, bench, every_state=False)
    made.observe(0)
    assert bench.metrics.value("oldest_poll_age_seconds") == pytest.approx(100.0)
    made.pollers["000007@im.bot"].state = "needs_login"  # it is not polled, and that is told elsewhere
    made.observe(0)
    assert bench.metrics.value("oldest_poll_age_seconds") == pytest.approx(1.0)
    made.pollers["000007@im.bot"].state = "paused"  # nobody else tells that it should be
    made.observe(0)
    assert bench.metrics.value("oldest_poll_age_seconds") == pytest.approx(100.0)


async def test_a_bot_that_found_no_room_is_polled_once_there_is_some() -> None:
    bench = Bench()
    first, second, third = ("b1@im.bot", "b2@im.bot", "b3@im.bot")
    for bot in (first, second, third):
        await bench.bind(bot=bot)
    over = {bot: asyncio.Event() for bot in (first, second, third)}

    async def run_poller(session: BotPoller) -> None:
        await over[session.bot].wait()

    made = supervisor(bench, run_poller=run_poller, capacity=1)
    made._owned = set(range(SHARDS))
    for bot in (first, second, third):
        made._follow(bot)
    assert set(made.pollers) == {first}
    for gone in (first, second):
        await bench.bindings.remove(gone)
        over[gone].set()
        await settle()
        for bot in made._dirty:
            made._follow(bot)
    await settle()
    assert set(made.pollers) == {third}
    over[third].set()
    await settle()


async def test_what_nobody_polls_is_counted(bench: Bench) -> None:
    """Bindings of owned shards without a poller, and all those of shards that no replica owns."""
    mine, orphans = set(range(0, SHARDS, 4)), set(range(1, SHARDS, 4))
    leases = FakeLeases(owned=mine)
    leases.orphans = orphans
    made = supervisor(bench, leases=leases)
    made._owned = mine
    shards = [shard_of(binding.sandbox) for binding in bench.bindings]
    made.observe(0)
    assert bench.metrics.value("bindings_unowned") == sum(shard in mine | orphans for shard in shards)
    for binding in bench.bindings:
        if shard_of(binding.sandbox) in mine:
            made.pollers[binding.bot] = BotPoller(binding.bot)
    made.observe(0)
    assert bench.metrics.value("bindings_unowned") == sum(shard in orphans for shard in shards)
    leases.orphans = set()
    made.observe(0)
    assert bench.metrics.value("bindings_unowned") == 0


@pytest.mark.parametrize("fields", [{"token": "new"}, {"base_url": "https://ilinkai.wechat.com"}], ids=str)
async def test_who_is_polled_elsewhere_from_now_on_waits_for_no_pause(fields: dict[str, str]) -> None:
    bench = Bench()
    await bench.bind()
    made = supervisor(bench)
    session = made.pollers["b1@im.bot"] = BotPoller("b1@im.bot")
    await bench.bind(**fields)
    assert session.poll_cancel.is_set()


async def test_every_poll_is_cut_when_the_lease_runs_out(bench: Bench) -> None:
    """Somebody else may poll a moment later."""
    leases = FakeLeases(owned=())
    made = supervisor(bench, leases=leases)
    poll(made, bench)
    made._follow_leases()
    assert not any(session.poll_cancel.is_set() for session in made.pollers.values())
    leases.has_lease = False
    made._follow_leases()
    assert all(session.poll_cancel.is_set() for session in made.pollers.values())


@pytest.mark.parametrize(
    ("back_s", "incarnation", "asked"),
    [
        pytest.param(ANSWER_GRACE_S / 2, "me-1", 1, id="at-once"),
        pytest.param(ANSWER_GRACE_S * 2, "me-1", 2, id="later"),
        pytest.param(ANSWER_GRACE_S / 2, "me-2", 2, id="as-another"),
    ],
)
async def test_a_lease_that_is_back_before_its_polls_were_cut_costs_none(
    back_s: float, incarnation: str, asked: int
) -> None:
    """As where a process was held up for longer than its lease, and the answer to its renewal lay there. Another
    incarnation's is not the one that was lost, which was revoked."""
    bench = Bench()
    await bench.bind()
    leases = bench.leases
    made = supervisor(bench, leases=leases)
    made._owned = set(leases.owned)
    made._follow_leases()
    session = made.pollers["b1@im.bot"] = BotPoller("b1@im.bot")
    task = asyncio.create_task(run_poller(session, bench.inbound_deps()))
    await asyncio.sleep(5)
    leases.has_lease = False
    made._follow_leases()
    await asyncio.sleep(back_s)
    leases.has_lease, leases.incarnation = True, incarnation
    leases.changed.notify_all()
    made._follow_leases()
    await asyncio.sleep(5)
    assert len(bench.chat.asked) == asked
    session.cancel_poll()
    await asyncio.sleep(5)
    assert len(bench.chat.asked) == asked + 1
    session.stop(immediately=True)
    await task


async def test_polls_that_still_wait_are_cut_when_the_lease_runs_out_also_while_the_replica_leaves() -> None:
    """They may wait for half a minute, and who takes over a dead replica's bots waits for none of them."""
    bench = Bench()
    await bench.bind()
    leases = bench.leases
    made = supervisor(bench, leases=leases)
    made._owned = set(leases.owned)
    made._follow_leases()
    session = made.pollers["b1@im.bot"] = BotPoller("b1@im.bot")
    made._poller_tasks["b1@im.bot"] = asyncio.create_task(run_poller(session, bench.inbound_deps()))
    await asyncio.sleep(1)
    leases.owned.clear()
    leaving = asyncio.create_task(made.drain(60.0))
    await asyncio.sleep(5)
    assert bench.chat.polling == 1
    leases.has_lease = False
    leases.changed.notify_all()
    await asyncio.sleep(ANSWER_GRACE_S * 2)
    assert bench.chat.polling == 0
    await leaving


async def test_every_poll_is_cut_where_the_lease_is_another_incarnations_since(bench: Bench) -> None:
    """It was revoked, and the loop was held up meanwhile: others may poll."""
    leases = FakeLeases(owned=())
    made = supervisor(bench, leases=leases)
    poll(made, bench)
    made._follow_leases()
    leases.incarnation = "me-2"
    made._follow_leases()
    assert all(session.poll_cancel.is_set() for session in made.pollers.values())


# shards that are given away ------------------------------------------------------------------------------


class Sending:
    """In place of a shard's sender: one request is out until `answered`."""

    def __init__(self) -> None:
        self.answered = asyncio.Event()

    async def drain(self, grace_s: float) -> None:
        await self.answered.wait()

    def rebound(self, sandbox: str, *, anew: bool) -> None: ...


class Giving(FakeLeases):
    """Owns one shard until it is released."""

    released = False

    async def release(self, shard: int) -> None:
        self.released = True
        self.owned.discard(shard)


async def handing_over(bench: Bench) -> tuple[Supervisor, Giving, Sending, int]:
    """A replica whose only shard goes to another one, which waits for a request that is out."""
    shard, sending = shard_of("s1"), Sending()
    leases = Giving(owned={shard})
    made = supervisor(bench, leases=leases)
    made._owned = {shard}
    made._shards[shard] = sending  # type: ignore[assignment]
    leases.surplus = {shard}
    made._follow_leases()
    await settle()
    assert not leases.released
    return made, leases, sending, shard


async def test_who_stops_while_it_gives_a_shard_away_gives_it_only_once_its_requests_have_ended() -> None:
    made, leases, sending, _ = await handing_over(Bench())
    stopping = asyncio.create_task(made.drain(60.0))
    await asyncio.sleep(30)
    assert not leases.released
    sending.answered.set()
    await stopping
    assert leases.released


async def test_messages_need_not_wait_for_the_requests_of_a_shard_that_is_given_away() -> None:
    made, _, sending, _ = await handing_over(Bench())
    async with asyncio.timeout(1.0):
        assert await made.open_shard("s1") is None
    sending.answered.set()
    await settle()


async def test_what_is_stored_as_a_shard_is_given_away_waits_for_no_long_poll() -> None:
    bench = await ready(None, batch(raw("meanwhile"), cursor="b"), None, None)
    shard, sending = shard_of("s1"), Sending()
    leases = bench.leases = Giving(owned={shard})
    made = supervisor(bench, leases=leases, run_poller=lambda session: run_poller(session, bench.inbound_deps()))
    made._owned = {shard}
    made._shards[shard] = sending  # type: ignore[assignment]
    made._start(BOT)
    await asyncio.sleep(34.5)
    leases.surplus = {shard}
    made._follow_leases()
    await asyncio.sleep(1.0)
    assert ((await bench.written())[-1].record.messages, bench.chat.polling) == ([raw("meanwhile")], 1)
    sending.answered.set()
    await asyncio.sleep(1.0)
    assert ((await bench.written())[-1].owner, bench.chat.polling) == ("", 0)


async def test_a_bot_whose_poller_has_not_begun_may_have_something_to_catch_up_with() -> None:
    bench = await ready()
    made = supervisor(bench)
    assert not made.is_catching_up(BOT)  # another replica's
    made._owned = {shard_of("s1")}
    assert made.is_catching_up(BOT)
    made._crowded.add(BOT)
    assert not made.is_catching_up(BOT)
