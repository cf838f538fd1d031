"""What the supervisor tells of ten thousand bindings: counts and worst cases, in a scrape of one size."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest

from adapter.bindings import Bindings
from adapter.contract import SHARDS, shard_of
from adapter.ports import Entry
from adapter.records import Binding
from adapter.sessions import Session, State
from adapter.supervisor import Supervisor
from tests.fakes import Bench, FakeLeases

VIRTUAL_TIME = True

BOTS = 10_000
STATES: tuple[State, ...] = get_args(State)


class NoWork:
    """Implements ShardWork: no shard is ever opened here."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is not asked for")


async def no_poll(session: Session) -> None:
    raise AssertionError(f"{session.bot} is not polled")


def supervisor(bench: Bench, *, throttled: int = 0, leases: FakeLeases | None = None) -> Supervisor:
    """The first so many bots are throttled."""
    return Supervisor(
        bindings=bench.bindings,
        leases=leases or bench.leases,
        tend=no_poll,
        work=NoWork(),
        throttled=lambda bot: int(bot.partition("@")[0]) < throttled,
        clock=bench.clock,
        metrics=bench.metrics,
        capacity=BOTS,
    )


def bind(bindings: Bindings, count: int) -> None:
    for number in range(count):
        binding = Binding(sandbox=f"s{number}", bot=f"{number:06}@im.bot", user=f"u{number}", token="t")
        bindings._see(Entry(f"{number:06}", msgspec.json.encode(binding), number + 1))


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bind(bench.bindings, BOTS)
    assert len(bench.bindings) == BOTS
    return bench


def poll(made: Supervisor, bench: Bench, *, every_state: bool = True) -> None:
    """Every binding has a poller; the states go round."""
    for number, binding in enumerate(bench.bindings):
        session = made.sessions[binding.bot] = Session(binding.bot)
        session.state = STATES[number % len(STATES)] if every_state else "polling"
        session.answered = bench.clock.monotonic() - (100.0 if number == 7 else 1.0)


async def test_ten_thousand_bindings_are_a_scrape_of_the_same_size(bench: Bench) -> None:
    made = supervisor(bench, throttled=60)
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


async def test_the_bot_that_was_answered_longest_ago_is_seen_among_ten_thousand(bench: Bench) -> None:
    made = supervisor(bench)
    poll(made, bench, every_state=False)
    made.observe(0)
    assert bench.metrics.value("oldest_poll_age_seconds") == pytest.approx(100.0)
    made.sessions["000007@im.bot"].state = "needs_login"  # it is not polled, and that is told elsewhere
    made.observe(0)
    assert bench.metrics.value("oldest_poll_age_seconds") == pytest.approx(1.0)


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
            made.sessions[binding.bot] = Session(binding.bot)
    made.observe(0)
    assert bench.metrics.value("bindings_unowned") == sum(shard in orphans for shard in shards)
    leases.orphans = set()
    made.observe(0)
    assert bench.metrics.value("bindings_unowned") == 0
