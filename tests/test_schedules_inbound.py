"""Random schedules of what users say: all of it is stored once, in order, for the person whom the bot served, whether
an owner dies, gives a partition away while its poll is open, hears nobody, or is stopped with an answer in hand and
goes on when another one has its partitions. No bot is polled twice at once.

Made and run as those of test_schedules. iLink is a mailbox here: it answers from the cursor that it is shown, now and
then from an earlier one, with the same messages under other ids. A poll never shows a cursor that passes what is
stored nowhere. What was said before a person's time began iLink may repeat to them. What comes for one whose time has
ended is a dead letter.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from adapter.bridge.partition import Partition
from adapter.contract.names import H_REASON
from adapter.contract.records import Binding
from adapter.errors import SessionExpired, Temporary
from adapter.ports import Account, Polled, StoredMessage
from adapter.simulator import samples
from tests.fakes import Bench, FakeBus, FakeChat, FakeDelivery, Life, VirtualLoop
from tests.fakes.mortal import Command, mortal
from tests.fakes.succession import Succession
from tests.inbound.pollers import opened

SCHEDULES = int(os.environ.get("SCHEDULES", "40"))
BOT, USER = "b1@im.bot", "u1@im.wechat"
SANDBOXES = ["s1", "s2"]
PNG = samples.png()
NOTICED_S = 0.5
"""From when a replica goes on that was stopped until it has noticed that."""
AGAIN: dict[str, dict[str, Any]] = {
    "as it was": {},
    "another id": {"message_id": 5_000_000},
    "no id": {"message_id": None},
    "other numbers": {"message_id": 6_000_000, "seq": 6_000_000},
    "another token": {"context_token": "again"},
}


def schedule(seed: int) -> list[tuple[str, dict[str, Any]]]:
    """The steps of a seed."""
    chance = random.Random(seed)
    weights = {
        "say": 30, "sleep": 20, "replay": 8, "fail": 4, "lease": 3, "die": 3, "freeze": 4, "give": 6, "leave": 3,
        "deaf": 3, "bus": 4, "bind": 3, "unbind": 1, "forget_ids": 2,
    }  # fmt: skip
    steps: list[tuple[str, dict[str, Any]]] = []
    for _ in range(chance.randint(4, 35)):
        (kind,) = chance.choices(list(weights), list(weights.values()))
        kinds = chance.choices(["text", "ok", "image"], [6, 2, 2], k=chance.choice([1, 1, 2, 5]))
        match kind:
            case "say":
                arguments: dict[str, Any] = {"kinds": kinds}
            case "freeze":
                seconds = chance.choice([0.01, 1.0, 20.0, 60.0])
                arguments = {"kinds": kinds, "is_done": chance.random() < 0.5, "seconds": seconds}
                arguments |= {"heir": chance.randrange(3)}
            case "give":
                arguments = {"sandbox": chance.choice(SANDBOXES), "heir": chance.randrange(4)}
                arguments |= {"after_s": chance.choice([0.0, 0.005, 0.3, 3.0])}
                arguments |= {"deaf_s": chance.choice([0.0, 0.0, 0.0, 7.0, 40.0])}
            case "leave":
                arguments = {"seconds": chance.choice([0.3, 5.0, 60.0]), "heir": chance.randrange(3)}
            case "die":
                arguments = {
                    "who": chance.choice(["owner", "owner", "poller", "anybody"]),
                    "heir": chance.randrange(3),
                }
            case "deaf":
                arguments = {"who": chance.choice(["owner", "poller"]), "seconds": chance.choice([1.0, 5.0, 40.0])}
            case "sleep" | "lease" | "bus":
                arguments = {"seconds": chance.choice([0.01, 0.06, 0.3, 1.0, 5.0, 40.0])}
            case "replay":
                arguments = {"back": chance.randint(1, 6), "how": chance.choice(list(AGAIN))}
            case "fail":
                arguments = {"stale": chance.random() < 0.3}
            case "bind":
                arguments = {"sandbox": chance.choice(SANDBOXES), "token": chance.randint(1, 3)}
            case _:
                arguments = {}
        steps.append((kind, arguments))
    return steps


class Mailbox(FakeChat):
    """iLink's side of one bot: a cursor is the number of messages that were given."""

    def __init__(self, clock: Any, cdn: Any) -> None:
        super().__init__(clock)
        self.said: list[dict[str, Any]] = []
        self.back = 0
        self.how: dict[str, Any] = {}
        self.given: dict[int, float] = {}
        """When each message was given first."""
        self.asked_at: dict[int, float] = {}
        """When the poll began that has brought each message last."""
        self.fails: list[Exception] = []
        self.out = 0
        self.most_out = 0
        self.before_poll: Callable[[str], None] = lambda _: None
        self._cdn = cdn

    def say(self, kind: str) -> None:
        number = len(self.said) + 1
        item: dict[str, Any] = {"type": 1, "text_item": {"text": "ok" if kind == "ok" else f"t{number}"}}
        if kind == "image":
            item = {"type": 2, "image_item": {"media": {"encrypt_query_param": f"p{number}"}}}
            late = Temporary("http_5xx")
            self._cdn.has(f"p{number}", *([late] if number % 3 else []), PNG if number % 5 else late)
        self.said.append(
            {
                "message_id": 7497484083968569000 + number,
                "client_id": f"wx-{number}",
                "seq": number,
                "from_user_id": USER,
                "create_time_ms": self._clock.now_ms(),
                "message_type": 1,
                "context_token": f"token-{number}",
                "item_list": [item],
            }
        )

    async def poll(self, account: Account, cursor: str, hold_ms: int) -> Polled | None:
        self.before_poll(cursor)
        self.out += 1
        self.most_out = max(self.most_out, self.out)
        began = self._clock.monotonic()
        try:
            await asyncio.sleep(0.05)
            if self.fails:
                raise self.fails.pop(0)
            begin, end = int(cursor or 0), self._clock.monotonic() + hold_ms / 1000
            while begin >= len(self.said) and not self.back and self._clock.monotonic() < end:
                await asyncio.sleep(0.1)
            first, known, how = max(0, begin - self.back), begin, self.how
            self.back, self.how = 0, {}
            given = []
            for number, message in enumerate(self.said[first:], first):
                self.given.setdefault(number + 1, self._clock.monotonic())
                self.asked_at[number + 1] = began
                other = {key: value + number if isinstance(value, int) else value for key, value in how.items()}
                fields = message | (other if number < known else {})
                given.append(msgspec.json.encode({key: value for key, value in fields.items() if value is not None}))
            await asyncio.sleep(0.01)
            return Polled(given, str(first + len(given)), 35_000)
        finally:
            self.out -= 1


class Stopping(Life):
    """A life that may stop at the next publish, before it or when the answer is on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.stops_at: bool | None = None
        """Whether the publish is done by then; None: it does not stop."""

    async def passes(self, call: str, *, is_done: bool) -> None:
        if call == "store" and is_done is self.stops_at:
            self.stops_at = None
            self.stop()
        await self.goes_on()


class Replica:
    """Runs as the service does, with the partitions that the model gives it."""

    def __init__(self, model: Model, bench: Bench, life: Stopping) -> None:
        self._model = model
        self.bench = bench
        self.life = life
        self.is_well = True
        """It may be given partitions."""
        self.is_dead = False
        self.is_stopped = False
        """Until it has noticed that it was."""
        self.cuts = 0
        """Reasons for which it hears nobody, and nobody hears it."""

    async def begin(self) -> None:
        await self.bench.run(partial(self._model.consume, self))

    def take(self, number: int) -> None:
        if self.is_well:
            self.bench.leases.take(number)

    @property
    def polls(self) -> bool:
        """A poll of the bot is out here, or its answer is not stored."""
        poller = self.bench.replica.partitions.pollers.get(BOT)
        return not self.is_dead and poller is not None and poller.is_out

    def cut(self, by: int) -> None:
        self.cuts += by
        self.bench.core.is_cut = self.is_dead or self.cuts > 0

    async def leave(self, seconds: float) -> None:
        """As at SIGTERM: gives all away; polls that wait end when they are answered, if there is time."""
        self.is_well = False
        await self.bench.drain(seconds)
        self.die()

    def die(self) -> None:
        self.is_well, self.is_dead = False, True
        self.life.stop()
        self.bench.kill()

    def stop(self) -> None:
        """As SIGSTOP: its tenures are not valid when it goes on, and it knows the bindings of before."""
        self.is_well, self.is_stopped = False, True
        self.cut(1)
        self.bench.leases.has_lease = False
        self.bench.bindings_bucket.followers.remove(self.bench.bindings._apply_entry)

    def go_on(self) -> None:
        self.life.go_on()
        self.cut(-1)

    def notice(self) -> None:
        """It has lost what it owned, and hears of bindings again."""
        if self.is_dead:
            return
        bench = self.bench
        bench.leases.lose()
        bench.leases.has_lease = True
        bench.bindings_bucket.followers.append(bench.bindings._apply_entry)
        for entry in [*bench.bindings_bucket.entries.values()]:
            bench.bindings._apply_entry(entry)
        self.is_well, self.is_stopped = not bench.leases.draining, False


class _Written(msgspec.Struct):
    sent_at_ms: int = 0
    create_time_ms: int = 0

    def ms(self) -> int:
        return self.sent_at_ms or self.create_time_ms


class _Entry(msgspec.Struct):
    since: int
    ended: bool = False
    messages: list[_Written] = []


class Time:
    """The time of a person: from a bind until the end is stored."""

    def __init__(self, begin: float) -> None:
        self.begin = begin
        self.is_over = False
        self.got: list[int] = []
        """Messages by when they were written."""


class Bus(FakeBus):
    """Tells what is stored."""

    def __init__(self, *parts: Any, on_put: Callable[[StoredMessage], None]) -> None:
        super().__init__(*parts)
        self._on_put = on_put

    def put(self, subject: str, payload: bytes, headers: dict[str, str], label: str = "") -> int:
        seq = super().put(subject, payload, headers, label)
        self._on_put(self.kept[-1].stored)
        return seq


class Model(Succession[Replica]):
    def __init__(self) -> None:
        super().__init__()
        self.world = Bench()
        self.world.bus = Bus(self.world.names, self.world.clock, on_put=self._on_put)
        self.box = Mailbox(self.world.clock, self.world.cdn)
        self.world.chat = self.box
        self.up = asyncio.Event()
        self.up.set()
        self.world.bus.on_publish = self._wait
        self.world.person_bucket.on_write = self._wait
        self.box.before_poll = self._check_cursor
        self.controlling = asyncio.Lock()
        self.consumers: dict[int, tuple[Replica, Partition]] = {}
        self.wrong: list[str] = []
        self.commands: dict[int, FakeDelivery] = {}
        """Binds and unbinds, by sequence."""
        self.times: dict[tuple[str, int], Time] = {}
        """By subject and `since`."""
        self.letters: set[int] = set()
        """Messages in dead letters, by when they were written."""

    async def _wait(self, *_: object) -> None:
        await self.up.wait()

    async def begin(self) -> None:
        self.world.bindings.add_listener(self._on_binding)
        first = await self.start()
        for name in SANDBOXES:
            self.pass_on(self.world.names.partition_of(name), first)
        await self._bind("s1", 0)

    def now(self) -> float:
        return self.world.clock.monotonic()

    # what is stored

    def _on_binding(self, _: str, before: Binding | None, after: Binding | None) -> None:
        if after is not None:
            subject = self.world.names.inbox(after.sandbox, after.person)
            self.times.setdefault((subject, after.since), Time(self.now()))

    def _on_put(self, stored: StoredMessage) -> None:
        if stored.subject == self.world.names.dead_letters("WECHAT_IN"):
            assert stored.headers[H_REASON] == "not_bound", stored.headers
            self.letters.add(msgspec.json.decode(opened(self.world, stored), type=_Written).ms())
        elif stored.subject.startswith("wechat.inbox."):
            entry = msgspec.json.decode(stored.data, type=_Entry)
            time = self.times[stored.subject, entry.since]
            if time.is_over:
                self.wrong.append(f"over: {stored.subject} got an entry behind the end of {entry.since}")
            time.is_over = entry.ended
            time.got += [one.ms() for one in entry.messages]

    def _check_cursor(self, cursor: str) -> None:
        """What a cursor passes was stored: in an inbox or as a dead letter, where it may be gone by now."""
        kept = self.letters.union(*(time.got for time in self.times.values()))
        passed = [said["create_time_ms"] for said in self.box.said[: int(cursor or 0)]]
        if not kept.issuperset(passed):
            self.wrong.append(f"the cursor says {cursor}, and {len(kept)} are stored")

    async def start(self) -> Replica:
        life = Stopping()
        bench = mortal(self.world, len(self.replicas) + 1, life)
        bench.bus_up = self.up
        replica = Replica(self, bench, life)
        bench.leases.on_released = self.on_released
        self.replicas.append(replica)
        await replica.begin()
        return replica

    # the bus

    async def consume(self, replica: Replica, partition: Partition) -> None:
        """All that is not acknowledged comes when a consumer begins, in order."""
        self.consumers[partition.number] = replica, partition
        for stored in self.world.bus.found("OUT"):
            self._deliver(self.commands[stored.seq], redelivered=True)
        try:
            await asyncio.Event().wait()
        finally:
            if self.consumers.get(partition.number) == (replica, partition):
                del self.consumers[partition.number]

    def _deliver(self, said: FakeDelivery, *, redelivered: bool) -> None:
        if consumer := self.consumers.get(int(said.subject.split(".")[2])):
            replica, partition = consumer
            partition.on_delivery(Command(self.world.bus, said, redelivered=redelivered, life=replica.life))

    # replicas

    def _who(self, who: str) -> Replica | None:
        """None: there is nobody."""
        binding = self.world.bindings.get(BOT)
        owner = self.homes[self.world.names.partition_of(binding.sandbox if binding else "s1")]
        poller = next((each for each in self.replicas if each.polls), None)
        living = [each for each in self.replicas if not each.is_dead and each.life.is_going]
        found = {"owner": owner, "poller": poller, "anybody": living[0] if living else None}[who]
        return found if found in living else None

    # steps

    async def say(self, *, kinds: list[str]) -> None:
        for kind in kinds:
            self.box.say(kind)
            await asyncio.sleep(0.002)

    async def sleep(self, *, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def replay(self, *, back: int, how: str) -> None:
        self.box.back, self.box.how = back, AGAIN[how]

    async def fail(self, *, stale: bool) -> None:
        stale_error = SessionExpired("needs_login", "iLink answered -14", errcode=-14)
        self.box.fails.append(stale_error if stale else Temporary("http_5xx"))

    async def lease(self, *, seconds: float) -> None:
        """The owner cannot renew, and nobody takes what it has."""
        owner = self._who("owner")
        if owner is None or not owner.is_well:
            return
        leases = owner.bench.leases
        leases.has_lease = False

        def back() -> None:
            if owner.is_well:
                leases.has_lease = True

        self.later(seconds, back)

    async def bus(self, *, seconds: float) -> None:
        self.up.clear()
        self.later(seconds, self.up.set)

    async def deaf(self, *, who: str, seconds: float) -> None:
        """It hears nobody on plain NATS, and nobody hears it."""
        if (replica := self._who(who)) is not None:
            replica.cut(1)
            self.later(seconds, lambda: replica.cut(-1))

    async def die(self, *, who: str, heir: int) -> None:
        if (dead := self._who(who)) is not None:
            dead.die()
            await self.inherit(dead, heir)

    async def freeze(self, *, kinds: list[str], is_done: bool, seconds: float, heir: int) -> None:
        """Who polls stops as it stores something, and goes on when another one has its partitions."""
        if (stopped := self._who("poller")) is None or stopped.is_stopped:
            return
        stopped.life.stops_at = is_done
        await self.say(kinds=kinds)
        for _ in range(600):
            if not stopped.life.is_going:
                break
            await asyncio.sleep(0.1)
        if stopped.life.is_going or stopped.is_dead:
            stopped.life.stops_at = None
            return
        stopped.stop()
        await self.inherit(stopped, heir)
        self.later(seconds, stopped.go_on)
        self.later(seconds + NOTICED_S, stopped.notice)

    async def give(self, *, sandbox: str, heir: int, after_s: float, deaf_s: float) -> None:
        """As one who has too many does; at times it gets the partition back, or hears nobody from then on."""
        number = self.world.names.partition_of(sandbox)
        giver = self.homes[number]
        if giver.is_well and number in giver.bench.leases.owned and number not in self.heirs:
            taker = giver if heir == 3 else await self.heir(heir, giver)
            self.heirs[number] = taker, after_s
            await giver.bench.replica.partitions.give(number)
            if deaf_s:
                giver.cut(1)
                await asyncio.sleep(deaf_s)
                giver.cut(-1)

    async def leave(self, *, seconds: float, heir: int) -> None:
        leaving = self._who("owner")
        if leaving is None or not leaving.is_well:
            return
        taker = await self.heir(heir, leaving)
        for number in leaving.bench.leases.owned:
            self.heirs.setdefault(number, (taker, 0.0))
        self.later(0.0, partial(self._leave, leaving, seconds))

    async def _leave(self, leaving: Replica, seconds: float) -> None:
        await leaving.leave(seconds)
        await self.inherit(leaving, 0)

    async def bind(self, *, sandbox: str, token: int) -> None:
        self.later(0.0, partial(self._bind, sandbox, token))

    async def unbind(self) -> None:
        self.later(0.0, self._unbind)

    async def forget_ids(self) -> None:
        self.world.bus.forget_ids()

    # control

    async def _bind(self, sandbox: str, token: int | str) -> None:
        binding = self.world.bindings.get(BOT)
        if binding is not None and binding.sandbox != sandbox:
            await self._unbind()
        await self._say("bind", sandbox, bot=BOT, bot_token=f"{BOT}:{token}", user=USER)

    async def _unbind(self) -> None:
        if binding := self.world.bindings.get(BOT):
            await self._say("unbind", binding.sandbox, bot=BOT)

    async def _say(self, verb: str, sandbox: str, **body: Any) -> None:
        """Says a bind or unbind, and waits until it is done."""
        async with self.controlling:
            said = self.world.command(verb=verb, sandbox=sandbox, **body)
            self.commands[said.seq] = said
            self._deliver(said, redelivered=False)
            while any(stored.seq == said.seq for stored in self.world.bus.found("OUT")):
                await asyncio.sleep(0.1)

    # the end

    async def settle(self) -> None:
        await asyncio.sleep(60)
        self.up.set()
        self.box.fails.clear()
        async with asyncio.timeout(600):
            while waits := [each for each in self.waits if not each.done()]:
                await asyncio.gather(*waits)
        binding = self.world.bindings.get(BOT)
        await self._bind(binding.sandbox if binding else "s1", "last")
        await asyncio.sleep(400)

    def problems(self) -> list[str]:
        wrong = list(dict.fromkeys(self.wrong))
        if self.box.most_out > 1:
            wrong.append(f"polls: {self.box.most_out} at once")
        if (out := [each.polls for each in self.replicas].count(True)) != 1:
            wrong.append(f"polls: {out} at the end")
        if left := {number: key.former for number, key in self.world.keys.items() if key.former}:
            wrong.append(f"left: {left}")
        wrong += [f"failed: {each.bench.failed}" for each in self.replicas if each.bench.failed]
        number_of = {said["create_time_ms"]: number for number, said in enumerate(self.box.said, 1)}
        kept = self.letters.union(*(time.got for time in self.times.values()))
        if missing := [number for ms, number in number_of.items() if ms not in kept]:
            wrong.append(f"missing: {missing}")
        for (subject, since), time in self.times.items():
            got = [number_of[ms] for ms in time.got]
            if twice := [n for n, count in Counter(got).items() if count > 1]:
                wrong.append(f"twice: {subject} {since} got {twice}")
            if others := [n for n in got if self.box.asked_at[n] < time.begin]:
                wrong.append(f"others: {subject} {since} got {others}, which was given before it was bound only")
            own = [n for n in got if self.box.given[n] >= time.begin]
            if any(a > b for a, b in pairwise(own)):
                wrong.append(f"order: {subject} {since} got {own}")
        binding = self.world.bindings.get(BOT)
        assert binding is not None
        now = self.times[self.world.names.inbox(binding.sandbox, binding.person), binding.since].got
        if now != (there := [one.sent_at_ms for one in self.world.bus.inbound()]):
            wrong.append(f"there: {len(now)} were stored, and {len(there)} are there")
        return wrong


def run(steps: list[tuple[str, dict[str, Any]]]) -> list[str]:
    async def happen() -> list[str]:
        model = Model()
        await model.begin()
        for kind, arguments in steps:
            await getattr(model, kind)(**arguments)
        await model.settle()
        return model.problems()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(happen())


def test_schedules() -> None:
    for seed in range(SCHEDULES):
        if found := run(schedule(seed)):
            pytest.fail(f"seed {seed}:\n" + "\n".join([*found, *map(str, schedule(seed))]))
