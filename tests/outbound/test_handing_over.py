"""Replicas that take a shard from each other by chance, with real lanes: killed, or stopped and going on as zombies.

Checked after each step is what the chaos run checks at its end: per user in order and one at a time, nothing shown
twice, no more sends than the window allows; and in the end exactly one final receipt per command.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapter import window
from adapter.contract import FINAL_OUTCOMES, Receipt
from adapter.errors import BusRefused, Temporary, Throttled, Uncertain
from adapter.outbound.shard import Shard
from adapter.ports import Accepted, Account, Content, Entry, Message, PubAck, Stored
from tests.fakes import (
    RULES,
    Bench,
    FakeBucket,
    FakeBus,
    FakeCdn,
    FakeChat,
    FakeClock,
    FakeDelivery,
    FakeObjects,
    Life,
    VirtualLoop,
)

SENDS = 4
LIMITED = RULES._replace(sends=SENDS)
USERS = [(f"b{number}@im.bot", f"u{number}@im.wechat") for number in range(2)]
ANSWERS = {
    "taken, and no answer": Uncertain("timeout", "no answer"),
    "busy": Temporary("http_5xx"),
    "throttled": Throttled("throttled", "iLink answered -2", ret=-2, errmsg="prepare failed"),
}


class MortalBus:
    """A bus as one replica reaches it."""

    def __init__(self, bus: FakeBus, life: Life) -> None:
        self._bus = bus
        self._life = life

    async def publish(self, message: Message) -> PubAck:
        (ack,) = await self.publish_all([message])
        if isinstance(ack, BusRefused):
            raise ack
        return ack

    async def publish_all(self, messages: Sequence[Message]) -> list[PubAck | BusRefused]:
        await self._life.goes_on()
        acks = await self._bus.publish_all(messages)
        await self._life.goes_on()
        return acks

    async def read(
        self, stream: str, subject: str, *, after: int = 0, since_ms: int | None = None, most: int | None = None
    ) -> AsyncIterator[Stored]:
        await self._life.goes_on()
        async for stored in self._bus.read(stream, subject, after=after, since_ms=since_ms, most=most):
            yield stored
        await self._life.goes_on()

    async def last(self, stream: str, subject: str) -> Stored | None:
        await self._life.goes_on()
        return await self._bus.last(stream, subject)

    async def counts(self, stream: str, subject: str) -> dict[str, int]:
        await self._life.goes_on()
        return await self._bus.counts(stream, subject)

    async def delete(self, stream: str, seq: int) -> None:
        await self._life.goes_on()
        await self._bus.delete(stream, seq)
        await self._life.goes_on()


class MortalBucket(FakeBucket):
    """A bucket as one replica reaches it."""

    def __init__(self, bucket: FakeBucket, life: Life) -> None:
        super().__init__()
        self.entries = bucket.entries
        self._bucket = bucket
        self._life = life

    async def get(self, key: str) -> Entry | None:
        await self._life.goes_on()
        return await self._bucket.get(key)

    async def update(self, key: str, value: bytes, revision: int) -> int:
        await self._life.goes_on()
        written = await self._bucket.update(key, value, revision)
        await self._life.goes_on()
        return written

    def put(self, key: str, value: bytes | None) -> int:
        return self._bucket.put(key, value)


class MortalChat(FakeChat):
    """iLink as one replica reaches it. A request that has left is answered whatever becomes of the replica."""

    def __init__(self, chat: FakeChat, clock: FakeClock, life: Life) -> None:
        super().__init__(clock)
        self._chat = chat
        self._life = life

    async def send(
        self,
        account: Account,
        *,
        user: str,
        client_id: str,
        context_token: str,
        content: Content,
        check: Callable[[], None] | None = None,
    ) -> Accepted:
        if check is not None:
            check()
        await self._life.goes_on()
        try:
            return await self._chat.send(
                account, user=user, client_id=client_id, context_token=context_token, content=content
            )
        finally:
            await self._life.goes_on()


class Command(FakeDelivery):
    """A delivery whose ack removes the command from the stream, whoever gives it."""

    def __init__(self, bus: FakeBus, of: FakeDelivery, *, suspect: bool, life: Life) -> None:
        super().__init__(of.subject, of.data, seq=of.seq, time_ms=of.time_ms, suspect=suspect)
        self._bus = bus
        self._life = life

    async def ack(self) -> None:
        await self._life.goes_on()
        await self._bus.delete(self._bus.stream_of(self.subject), self.seq)


class World(NamedTuple):
    """What a replica reaches, of which some is in its own way."""

    clock: FakeClock
    bus: FakeBus
    chat: FakeChat
    cursors: FakeBucket
    contexts_bucket: FakeBucket
    bindings_bucket: FakeBucket
    quotes: FakeBucket
    typing: FakeBucket
    claims_bucket: FakeBucket
    cdn: FakeCdn
    objects: FakeObjects
    numbers: Iterator[int]


def mortal(world: Bench, number: int, life: Life) -> Bench:
    """One of several replicas of a world, which reaches it as long as it lives."""
    reached = World(
        clock=world.clock,
        bus=MortalBus(world.bus, life),  # type: ignore[arg-type]
        chat=MortalChat(world.chat, world.clock, life),
        cursors=world.cursors,
        contexts_bucket=MortalBucket(world.contexts_bucket, life),
        bindings_bucket=world.bindings_bucket,
        quotes=world.quotes,
        typing=world.typing,
        claims_bucket=world.claims_bucket,
        cdn=world.cdn,
        objects=world.objects,
        numbers=world.numbers,
    )
    return Bench(reached, incarnation=f"r{number}", metrics=world.metrics)  # type: ignore[arg-type]


class Replica:
    """One that has the shard, or had it."""

    def __init__(self, world: Bench, number: int) -> None:
        self.life = Life()
        self.bench = mortal(world, number, self.life)
        self.shard: Shard = self.bench.shard(sending=self.bench.sending(rules=LIMITED), merge_chars=40)
        self.stolen: list[FakeDelivery] = []
        """What its old pulls took out of the stream; it reads them when it goes on."""

    def lose(self) -> None:
        """It has not renewed for too long."""
        self.bench.leases.is_valid = False
        self.bench.leases.owned.clear()


class Handing(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=VirtualLoop)
        self.run(self.begin())

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        self.runner.run(work)

    async def begin(self) -> None:
        self.world = Bench()
        self.world.chat.took_s = 0.3
        for bot, user in USERS:
            await self.world.bind(bot=bot, user=user)
        self.commands: dict[int, FakeDelivery] = {}
        """All that were ever stored; the bus has those that are not settled."""
        self.delivered_to = 0
        """The newest command that anybody got."""
        self.gap = False
        """A command went to a zombie: the owner sees it in the numbers, and gets nothing more before its reset."""
        self.sent: dict[str, list[str]] = {user: [] for _, user in USERS}
        self.wrote_at: dict[str, float] = {}
        self.words = 0
        self.owner = Replica(self.world, 0)
        self.frozen: list[Replica] = []
        self.replicas = 1
        await self.owner.shard.load()

    # the bus

    async def reset(self) -> None:
        """As the consumer's loop does it: what is parked is read, then all that is not settled comes, in order."""
        await self.owner.shard.load()
        self.gap = False
        for stored in self.world.bus.found("OUT"):
            self.deliver(self.commands[stored.seq])

    def deliver(self, command: FakeDelivery) -> None:
        suspect = command.seq <= self.delivered_to
        self.delivered_to = max(self.delivered_to, command.seq)
        self.owner.shard.on_delivery(Command(self.world.bus, command, suspect=suspect, life=self.owner.life))

    async def take_over(self) -> None:
        self.owner = Replica(self.world, self.replicas)
        self.replicas += 1
        await self.reset()

    # what happens

    def store(self, number: int, *, stolen: bool = False) -> None:
        bot, user = USERS[number]
        text = f"{number}.{len(self.sent[user])}"
        self.sent[user].append(text)
        command = self.world.command(text, id=text, bot=bot)
        self.commands[command.seq] = command
        if stolen:
            self.frozen[-1].stolen.append(command)
            self.delivered_to, self.gap = max(self.delivered_to, command.seq), True
        elif not self.gap:
            self.deliver(command)

    @rule(numbers=st.lists(st.integers(0, len(USERS) - 1), min_size=1, max_size=4))
    def commands_come(self, numbers: list[int]) -> None:
        async def happen() -> None:
            for number in numbers:
                self.store(number)

        self.run(happen())

    @rule(number=st.integers(0, len(USERS) - 1))
    def a_user_writes(self, number: int) -> None:
        self.run(self.write(number))

    async def write(self, number: int) -> None:
        bot, user = USERS[number]
        self.words += 1
        ident, replica = f"in:{self.words}", self.owner
        peer = await replica.bench.contexts.peer(bot, user)
        self.wrote_at[user] = self.world.clock.monotonic()
        now_ms = self.world.clock.now_ms()
        await replica.bench.contexts.save(
            peer,
            lambda context: window.heard(
                context, message=ident, token="AARz", now_ms=now_ms, written_ms=now_ms, in_flight=peer.in_flight
            ),
        )
        replica.shard.heard("s1", bot, user)

    @rule(answer=st.sampled_from(sorted(ANSWERS)))
    def ilink_will_answer(self, answer: str) -> None:
        self.world.chat.sends.append(ANSWERS[answer])

    @rule(seconds=st.sampled_from([0.1, 0.4, 1.6, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @rule()
    def a_connection_breaks_or_the_gap_is_noticed(self) -> None:
        self.run(self.reset())

    @rule(long=st.booleans())
    def the_owner_is_killed(self, long: bool) -> None:
        async def happen() -> None:
            await asyncio.sleep(0)
            dead = self.owner
            dead.life.stop()
            dead.lose()
            dead.shard.stop()
            await asyncio.sleep(2)  # its requests are over
            if long and not self.frozen:
                self.world.bus.forget_ids()
            await self.take_over()

        self.run(happen())

    @precondition(lambda self: len(self.frozen) < 2)
    @rule(meanwhile=st.lists(st.tuples(st.integers(0, len(USERS) - 1), st.booleans()), max_size=4))
    def the_owner_is_stopped_until_another_takes_over(self, meanwhile: list[tuple[int, bool]]) -> None:
        """Its pulls are still out, and take commands that come meanwhile."""

        async def happen() -> None:
            self.owner.life.stop()
            self.frozen.append(self.owner)
            await asyncio.sleep(4)  # by its own clock, too
            self.owner.lose()
            await self.take_over()
            for number, stolen in meanwhile:
                self.store(number, stolen=stolen)

        self.run(happen())

    @precondition(lambda self: self.frozen)
    @rule(notices_after_s=st.sampled_from([0.01, 0.3, 1.0, 5.0]))
    def one_that_was_stopped_goes_on(self, notices_after_s: float) -> None:
        """And does not know yet that it has lost everything, but for what its clock says."""

        async def happen() -> None:
            zombie = self.frozen.pop(0)
            for command in zombie.stolen:
                zombie.shard.on_delivery(Command(self.world.bus, command, suspect=False, life=zombie.life))
            zombie.life.go_on()
            asyncio.get_running_loop().call_later(notices_after_s, zombie.shard.stop)
            await asyncio.sleep(0.005)

        self.run(happen())

    # what must hold

    def shown(self, user: str) -> list[str]:
        taken = [sent for sent in self.world.chat.taken.values() if sent.user == user]
        return [text for sent in taken for text in sent.text.split("\n\n")]

    @invariant()
    def one_at_a_time(self) -> None:
        assert self.world.chat.overlaps == 0

    @invariant()
    def nothing_is_shown_twice_and_all_in_order(self) -> None:
        for _, user in USERS:
            shown = self.shown(user)
            assert [text for text, times in Counter(shown).items() if times > 1] == []
            numbers = [int(text.partition(".")[2]) for text in shown]
            assert all(earlier < later for earlier, later in pairwise(numbers)), shown

    @invariant()
    def no_more_sends_than_the_window_allows(self) -> None:
        for _, user in USERS:
            taken = [sent for sent in self.world.chat.taken.values() if sent.user == user]
            assert len([sent for sent in taken if sent.at_s >= self.wrote_at.get(user, 0.0)]) <= SENDS

    @invariant()
    def nobody_gets_two_receipts(self) -> None:
        times = Counter(receipt.command for receipt in self.finals())
        assert [ident for ident, count in times.items() if count > 1] == []

    def finals(self) -> list[Receipt]:
        return [receipt for receipt in self.world.bus.receipts() if receipt.outcome in FINAL_OUTCOMES]

    def teardown(self) -> None:
        self.run(self.settle())
        self.one_at_a_time()
        self.nothing_is_shown_twice_and_all_in_order()
        self.nobody_gets_two_receipts()
        self.runner.close()

    async def settle(self) -> None:
        """All is well again, and the users write until nothing waits."""
        self.world.chat.sends.clear()
        for zombie in self.frozen:
            zombie.shard.stop()
            zombie.life.go_on()
        await asyncio.sleep(10)
        await self.reset()
        for _ in range(100):
            await asyncio.sleep(60)
            if not self.world.bus.found("OUT") and not self.world.bus.found("PARKED"):
                break
            for number in range(len(USERS)):
                await self.write(number)
        told = {receipt.command: receipt for receipt in self.finals()}
        assert sorted(told) == sorted(text for texts in self.sent.values() for text in texts)
        for _, user in USERS:
            accepted = [text for text in self.sent[user] if told[text].outcome == "accepted"]
            shown = self.shown(user)
            assert [text for text in shown if text in accepted] == accepted
        assert self.world.bus.found("OUT") == []
        assert self.world.bus.found("PARKED") == []
        self.owner.shard.stop()
        await asyncio.sleep(60)


Handing.TestCase.settings = settings(max_examples=150, stateful_step_count=50)
TestHanding = Handing.TestCase


def test_an_answer_that_the_owner_before_hears_late_costs_no_send_too_many() -> None:
    """It heard -2 after its successor had read the record, and wrote that: the repeat waits for the user, too."""
    state = Handing()
    state.a_user_writes(number=0)
    state.the_owner_is_stopped_until_another_takes_over(meanwhile=[(0, False)] * 4)
    state.ilink_will_answer(answer="throttled")
    state.one_that_was_stopped_goes_on(notices_after_s=0.01)
    state.the_owner_is_stopped_until_another_takes_over(meanwhile=[])
    state.one_that_was_stopped_goes_on(notices_after_s=0.01)
    state.time_passes(seconds=1.6)
    state.commands_come(numbers=[0])
    state.time_passes(seconds=5.0)
    assert state.shown("u0@im.wechat") == []
    state.a_user_writes(number=0)
    state.time_passes(seconds=20.0)
    state.no_more_sends_than_the_window_allows()
    assert state.shown("u0@im.wechat")[:4] == ["0.0", "0.1", "0.2", "0.3"]
    state.teardown()
