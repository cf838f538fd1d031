"""What the supervisor tells of ten thousand bindings, in a scrape of one size; room for bots, shards given away."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from adapter.bridge import partition as outbound
from adapter.bridge.poller import ANSWER_GRACE_S, BotPoller, State
from adapter.contract.names import Names, to_subject_token
from adapter.contract.records import Binding
from adapter.ports import Account, Polled
from adapter.replica.health import observe
from adapter.replica.supervisor import CUT_S, HANDED_AT_ONCE, Supervisor
from tests.fakes import Bench, FakeLeases, batch, ready, settle
from tests.inbound.pollers import BOT, raw, texts

VIRTUAL_TIME = True

BOTS = 10_000
STATES = [state for state in State if state is not State.ENDED]


class Partition:
    """In place of a shard that sends: what it is told of changes nothing, and its requests have ended at once."""

    tasks = 0

    def __init__(self, throttled_bots: Iterable[str] = ()) -> None:
        self.throttled_bots = set(throttled_bots)
        self.answered = asyncio.Event()
        self.answered.set()

    def queue_depths(self, parked: Counter[str]) -> tuple[int, int | None]:
        return 0, None

    async def drain(self, grace_s: float) -> None:
        await self.answered.wait()

    def on_binding(self, before: Binding | None, after: Binding | None) -> None: ...

    def stop(self) -> None: ...


class Supervised(Supervisor):
    """With one object for all shards, which consume nothing."""

    new_poller: Callable[[str], BotPoller]
    shard: Any

    async def follow(self) -> None:
        await self.run(lambda number: self.shard, _consume, self.new_poller)


async def _consume(shard: outbound.Partition) -> None: ...


def fails(name: str, detail: str) -> None:
    raise AssertionError(f"{name} failed: {detail}")


def no_poller(bot: str) -> BotPoller:
    raise AssertionError(f"{bot} is not polled")


async def no_person(binding: Binding) -> None:
    raise AssertionError(f"{binding.bot} is not polled")


def ignored(binding: Binding) -> None: ...


def supervisor(
    bench: Bench,
    *,
    leases: FakeLeases | None = None,
    new_poller: Callable[[str], BotPoller] = no_poller,
    capacity: int = BOTS,
    shard: Partition | None = None,
) -> Supervised:
    others: Any = bench
    made = Supervised(
        bench.bindings,
        leases or bench.leases,
        bench.polls,
        others,
        bench.chat,
        bench.clock,
        capacity=capacity,
        on_failed=fails,
    )
    made.shard, made.new_poller = shard or Partition(), new_poller
    return made


@pytest.fixture
async def following() -> AsyncIterator[Callable[[Supervised], Awaitable[asyncio.Task[None]]]]:
    """Has a supervisor follow leases and bindings until the test is over."""
    begun: list[asyncio.Task[None]] = []

    async def begin(made: Supervised) -> asyncio.Task[None]:
        begun.append(asyncio.create_task(made.follow()))
        await settle()
        return begun[-1]

    yield begin
    for task in begun:
        task.cancel()
    await asyncio.gather(*begun, return_exceptions=True)


Following = Callable[[Supervised], Awaitable[asyncio.Task[None]]]


def bound(count: int) -> Bench:
    """A bench with so many bindings."""
    bench = Bench()
    for number in range(count):
        binding = Binding(sandbox=f"s{number}", bot=f"{number:06}@im.bot", user=f"u{number}", token="t")
        bench.bindings_bucket.put(to_subject_token(binding.bot), msgspec.json.encode(binding))
    assert len(bench.bindings) == count
    return bench


def poll(made: Supervisor, bench: Bench, *, every_state: bool = True) -> None:
    """Every binding has a poller; the states go round."""
    deps = bench.parts()
    for number, binding in enumerate(bench.bindings):
        session = made.pollers[binding.bot] = BotPoller(binding.bot, deps, no_person, ignored)
        session.shown.state = STATES[number % len(STATES)] if every_state else State.POLLING
        session.unanswered_since = bench.clock.monotonic() - (100.0 if number == 7 else 1.0)


async def test_ten_thousand_bindings_are_a_scrape_of_the_same_size(following: Following) -> None:
    bench = bound(BOTS)
    made = supervisor(bench, shard=Partition(f"{number:06}@im.bot" for number in range(60)))
    empty = bench.metrics.expose()[0]
    poll(made, bench)
    await following(made)
    observe(made, bench.clock, bench.metrics, 30_000)
    body = bench.metrics.expose()[0]
    samples = [line for line in body.decode().splitlines() if not line.startswith("#")]
    assert len(samples) == sum(not line.startswith(b"#") for line in empty.splitlines()) <= 1_000
    assert len(body) <= 100_000
    names = [state.value for state in STATES]
    states = {state: bench.metrics.value("bindings", state=state) for state in (*names, "throttled")}
    assert sum(states.values()) == BOTS
    assert states["throttled"] == len(range(STATES.index(State.POLLING), 60, len(STATES)))
    assert bench.metrics.value("tasks", kind="other") == 30_000 - BOTS


async def test_a_poll_that_ends_after_a_handover_is_counted_by_the_new_owner_alone() -> None:
    bench = bound(BOTS)
    made = supervisor(bench)
    poll(made, bench, every_state=False)
    mine = sorted(made.leases.owned)
    given = {mine[0], mine[1]}
    for session in made.pollers.values():
        session.is_handed_over = True  # also those of shards that are still to be given away
    made.leases.owned -= given
    observe(made, bench.clock, bench.metrics, 0)
    left = sum(Names().partition_of(binding.sandbox) not in given for binding in bench.bindings)
    assert bench.metrics.value("bindings", state="polling") == left < BOTS


async def test_the_bot_that_was_answered_longest_ago_is_seen_among_ten_thousand() -> None:
    bench = bound(BOTS)
    made = supervisor(bench)
    poll(made, bench, every_state=False)
    observe(made, bench.clock, bench.metrics, 0)
    assert bench.metrics.value("oldest_poll_age_seconds") == pytest.approx(100.0)
    made.pollers["000007@im.bot"].shown.state = State.NEEDS_LOGIN  # it is not polled, and that is told elsewhere
    observe(made, bench.clock, bench.metrics, 0)
    assert bench.metrics.value("oldest_poll_age_seconds") == pytest.approx(1.0)
    made.pollers["000007@im.bot"].shown.state = State.PAUSED  # nobody else tells that it should be
    observe(made, bench.clock, bench.metrics, 0)
    assert bench.metrics.value("oldest_poll_age_seconds") == pytest.approx(100.0)


async def test_a_bot_that_found_no_room_is_polled_once_there_is_some(following: Following, bench: Bench) -> None:
    first, second, third = ("b1@im.bot", "b2@im.bot", "b3@im.bot")
    for bot in (first, second, third):
        await bench.bind(bot=bot)
    over = {bot: asyncio.Event() for bot in (first, second, third)}

    class Waits(BotPoller):
        async def run(self) -> None:
            await over[self.bot].wait()

    made = supervisor(bench, new_poller=lambda bot: Waits(bot, bench.parts(), no_person, ignored), capacity=1)
    await following(made)
    assert set(made.pollers) == {first}
    for gone in (first, second):
        await bench.bindings.remove(gone)
        over[gone].set()
        await settle()
    assert set(made.pollers) == {third}


async def test_a_change_of_a_binding_cuts_no_poll_of_a_shard_that_is_to_be_given(following: Following) -> None:
    bench, cut = bound(HANDED_AT_ONCE + 40), list[str]()

    class Waits(BotPoller):
        async def run(self) -> None:
            await asyncio.Event().wait()

        def stop(self, *, immediately: bool) -> None:
            cut.append(self.bot)

    shard = Partition()
    made = supervisor(bench, shard=shard, new_poller=lambda bot: Waits(bot, bench.parts(), no_person, ignored))
    await following(made)
    shard.answered.clear()  # those whose turn it is wait for their requests
    bench.leases.surplus = {Names().partition_of(binding.sandbox) for binding in bench.bindings}
    bench.leases.changed.notify_all()
    await settle()
    assert len(bench.leases.surplus) > HANDED_AT_ONCE
    for binding in bench.bindings:
        await bench.bindings.update(binding.bot, lambda now: replace(now, user=f"{now.user}@im.wechat"))
    await settle()
    assert cut == []
    assert len(made.pollers) == HANDED_AT_ONCE + 40


async def test_what_nobody_polls_is_counted(following: Following) -> None:
    """Bindings of owned shards without a poller, and all those of shards that no replica owns."""
    bench = bound(500)
    mine, orphans = set(range(0, Names().partitions, 4)), set(range(1, Names().partitions, 4))
    leases = FakeLeases(owned=mine)
    leases.orphans = orphans
    made = supervisor(bench, leases=leases, capacity=0)
    await following(made)
    shards = [Names().partition_of(binding.sandbox) for binding in bench.bindings]
    observe(made, bench.clock, bench.metrics, 0)
    assert bench.metrics.value("bindings_unowned") == sum(shard in mine | orphans for shard in shards)
    for binding in bench.bindings:
        if Names().partition_of(binding.sandbox) in mine:
            made.pollers[binding.bot] = bench.new_poller(binding.bot)
    observe(made, bench.clock, bench.metrics, 0)
    assert bench.metrics.value("bindings_unowned") == sum(shard in orphans for shard in shards) > 0
    leases.orphans = set()
    observe(made, bench.clock, bench.metrics, 0)
    assert bench.metrics.value("bindings_unowned") == 0


@pytest.mark.parametrize("fields", [{"token": "new"}, {"base_url": "https://ilinkai.wechat.com"}], ids=str)
async def test_who_is_polled_elsewhere_from_now_on_waits_for_no_pause(fields: dict[str, str], bench: Bench) -> None:
    await bench.bind()
    made = supervisor(bench)
    session = made.pollers["b1@im.bot"] = bench.new_poller("b1@im.bot")
    await bench.bind(**fields)
    assert session._is_cut


@pytest.mark.parametrize(
    ("lost", "seen_s"),
    [({"has_lease": False}, 0.0), ({"incarnation": "me-2"}, 1.1)],
    ids=["run-out", "anothers-since"],
)
async def test_every_poll_is_cut_when_the_lease_is_lost(
    lost: dict[str, Any], seen_s: float, following: Following
) -> None:
    """Somebody else may poll a moment later. Another incarnation's lease tells that the one before was revoked while
    the loop was held up."""
    bench = bound(50)
    made = supervisor(bench)
    poll(made, bench)
    await following(made)
    assert not any(session._is_cut for session in made.pollers.values())
    for name, value in lost.items():
        setattr(bench.leases, name, value)
    bench.leases.changed.notify_all()
    await settle()
    await asyncio.sleep(seen_s)
    assert all(session._is_cut for session in made.pollers.values())


@pytest.mark.parametrize(
    ("back_s", "incarnation", "asked"),
    [
        pytest.param(ANSWER_GRACE_S / 2, "me-1", 1, id="at-once"),
        pytest.param(ANSWER_GRACE_S * 2, "me-1", 2, id="later"),
        pytest.param(ANSWER_GRACE_S / 2, "me-2", 2, id="as-another"),
    ],
)
async def test_a_lease_that_is_back_before_its_polls_were_cut_costs_none(
    back_s: float, incarnation: str, asked: int, following: Following, bench: Bench
) -> None:
    """As where a process was held up for longer than its lease, and the answer to its renewal lay there. Another
    incarnation's is not the one that was lost, which was revoked."""
    await bench.bind()
    leases = bench.leases
    made = supervisor(bench, new_poller=bench.new_poller)
    await following(made)
    await asyncio.sleep(5)
    leases.has_lease = False
    leases.changed.notify_all()
    await asyncio.sleep(back_s)
    leases.has_lease, leases.incarnation = True, incarnation
    leases.changed.notify_all()
    await asyncio.sleep(5)
    assert len(bench.chat.asked) == asked
    made.pollers[BOT].cancel_poll()
    await asyncio.sleep(5)
    assert len(bench.chat.asked) == asked + 1
    await bench.bindings.remove(BOT)
    await asyncio.sleep(5)
    assert not made.pollers


async def test_polls_are_cut_when_the_lease_runs_out_also_while_the_replica_leaves(
    following: Following, bench: Bench
) -> None:
    """They may wait for half a minute, and who takes over a dead replica's bots waits for none of them."""
    await bench.bind()
    leases = bench.leases
    made = supervisor(bench, new_poller=bench.new_poller)
    run = await following(made)
    await asyncio.sleep(1)
    run.cancel()
    await asyncio.wait([run])
    leases.owned.clear()
    leaving = asyncio.create_task(made.drain(60.0))
    await asyncio.sleep(5)
    assert bench.chat.polling == 1
    leases.has_lease = False
    leases.changed.notify_all()
    await asyncio.sleep(ANSWER_GRACE_S * 2)
    assert bench.chat.polling == 0
    await leaving


async def test_a_drain_that_is_over_waits_for_an_answer_that_is_still_to_be_read(following: Following) -> None:
    """The answers of its host that came before it are read first. iLink may count it as delivered."""
    bench, read = await ready(), asyncio.Event()

    async def ask(account: Account, cursor: str, hold_ms: int) -> Polled:
        bench.chat.reading.add(account.bot)
        await read.wait()
        bench.chat.reading.clear()
        return batch(raw("large"), cursor="b")

    bench.chat.poll = ask  # type: ignore[method-assign]
    made = supervisor(bench, leases=Giving(), new_poller=bench.new_poller)
    run = await following(made)
    await asyncio.sleep(1)
    run.cancel()
    leaving = asyncio.create_task(made.drain(20.0))
    await asyncio.sleep(20.0 + CUT_S * 1.5)
    read.set()
    await leaving
    assert texts(bench) == ["large"]


# shards that are given away ------------------------------------------------------------------------------


class Giving(FakeLeases):
    """Owns the shard of s1 until it is released."""

    released = False

    def __init__(self) -> None:
        super().__init__(owned={Names().partition_of("s1")})

    def rebalance(self) -> None:
        """Another replica should have the shard."""
        self.surplus = set(self.owned)
        self.changed.notify_all()

    async def release(self, shard: int) -> None:
        self.released = True
        self.owned.discard(shard)
        self.surplus = set()


async def handing_over(following: Following) -> tuple[Supervised, Giving, Partition, asyncio.Task[None]]:
    """A replica whose only shard goes to another one, which waits for a request that is out."""
    shard, leases = Partition(), Giving()
    made = supervisor(Bench(), leases=leases, shard=shard)
    run = await following(made)
    shard.answered.clear()
    leases.rebalance()
    await settle()
    assert not leases.released
    return made, leases, shard, run


async def test_a_shard_is_given_away_after_its_requests_have_ended_also_by_who_stops(following: Following) -> None:
    made, leases, shard, run = await handing_over(following)
    run.cancel()
    stopping = asyncio.create_task(made.drain(60.0))
    await asyncio.sleep(30)
    assert not leases.released
    shard.answered.set()
    await stopping
    assert leases.released


async def test_messages_need_not_wait_for_the_requests_of_a_shard_that_is_given_away(following: Following) -> None:
    made, _, shard, _ = await handing_over(following)
    async with asyncio.timeout(1.0):
        assert await made.open_shard("s1") is None
    shard.answered.set()
    await settle()


async def test_a_shard_that_is_claimed_again_before_its_release_is_noticed_works_again(following: Following) -> None:
    """As when the replica that should have it stops in the same moment."""
    made, leases, _, _ = await handing_over(following)
    release = leases.release

    async def release_and_claim(shard: int) -> None:
        await release(shard)
        leases.owned.add(shard)

    leases.release = release_and_claim  # type: ignore[method-assign]
    made.shard.answered.set()
    await asyncio.sleep(2.0)
    async with asyncio.timeout(1.0):
        assert await made.open_shard("s1") is made.shard


async def test_what_is_stored_as_a_shard_is_given_away_waits_for_no_long_poll(following: Following) -> None:
    bench = await ready(None, batch(raw("meanwhile"), cursor="b"), None, None)
    shard, leases = Partition(), Giving()
    made = supervisor(bench, leases=leases, shard=shard, new_poller=bench.new_poller)
    await following(made)
    shard.answered.clear()
    await asyncio.sleep(34.5)
    leases.rebalance()
    await asyncio.sleep(1.0)
    assert (texts(bench), bench.chat.polling) == (["meanwhile"], 1)
    shard.answered.set()
    await asyncio.sleep(1.0)
    assert (leases.released, bench.chat.polling) == (True, 1), "its answer is not lost"
    await asyncio.sleep(70.0)
    assert (await bench.owner(), bench.chat.polling) == ("", 0)
