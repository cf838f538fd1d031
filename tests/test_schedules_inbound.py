"""Random schedules of what users say: all of it is stored once, in order, for the person whom the bot served, whether
the owner dies, gives its shards away, or is stopped with an answer in hand and goes on when another one has them.

Made and run as those of test_schedules. iLink is a mailbox here: it answers from the cursor that it is shown, now and
then from an earlier one, with the same messages under other ids. A poll never shows a cursor that passes what is
stored nowhere. What was said before a person's time began iLink may repeat to them. What comes for one whose time has
ended is a dead letter.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from adapter.bridge.poller import BotPoller
from adapter.bridge.receive import ANYBODY
from adapter.contract.messages import Bind, Unbind
from adapter.contract.names import H_REASON
from adapter.contract.records import Binding
from adapter.errors import SessionExpired, Temporary
from adapter.kit.persist import persist
from adapter.ports import Account, Polled, StoredMessage
from adapter.simulator import samples
from tests.fakes import Bench, FakeBus, FakeChat, Life, VirtualLoop
from tests.fakes.mortal import mortal
from tests.inbound.pollers import opened

SCHEDULES = int(os.environ.get("SCHEDULES", "15"))
BOT, USER = "b1@im.bot", "u1@im.wechat"
SANDBOXES = ["s1", "s2"]
PNG = samples.png()
TAKEN_OVER_S = 4.0
"""From the end of an owner until the next one has its shards."""
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
        "say": 30, "sleep": 20, "replay": 8, "fail": 4, "lease": 3, "die": 3, "freeze": 3, "hand_over": 3, "bus": 4,
        "bind": 3, "unbind": 1, "forget_ids": 2,
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
        assert not self.out, "two polls at once"
        self.before_poll(cursor)
        self.out += 1
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
    """Polls the bot as the supervisor lets it."""

    def __init__(self, bench: Bench, life: Stopping) -> None:
        self.bench = bench
        self.life = life
        self.session: BotPoller | None = None
        self.poller: asyncio.Task[None] | None = None
        self.goes_on = True
        self.supervisor = bench.replica.supervisor
        self.supervisor.shards = bench.shards
        self.supervisor._others = bench  # type: ignore[assignment]
        bench.bindings.add_listener(self._changed)
        for name in SANDBOXES:
            bench.shard(name)
        self.supervisor.close(BOT)
        self.keeper = asyncio.get_running_loop().create_task(self._keep())

    async def _keep(self) -> None:
        while self.goes_on:
            if self.bench.bindings.serving(BOT) is not None:
                self.session = self.supervisor.pollers[BOT] = self.bench.new_poller(BOT)
                self.poller = asyncio.get_running_loop().create_task(self.session.run())
                await asyncio.wait([self.poller])
                del self.supervisor.pollers[BOT]
            await asyncio.sleep(0.2)

    def _changed(self, bot: str, before: Any, after: Any) -> None:
        self.supervisor.close(bot)
        if self.session is not None and self.goes_on and (after is None or after.closing):
            self.session.stop(immediately=True)

    async def leave(self) -> None:
        """Gives its shards away; a poll that waits ends when it is answered."""
        self.goes_on = False
        for shard in self.bench.shards.values():
            await shard.drain(1.0)
        self.bench.shards.clear()
        if self.session is not None:
            self.session.is_handed_over = True
            self.session.stop(immediately=False)
        self.bench.leases.owned.clear()

    def die(self) -> None:
        self.life.stop()
        self.lose()
        self._drop_shards()
        if self.poller is not None:
            self.poller.cancel()  # its connections end

    def lose(self) -> None:
        """The lease and the shards are another's, and it hears of no binding."""
        self.goes_on = False
        self.bench.leases.owned.clear()
        self.bench.leases.has_lease = False
        self.bench.bindings_bucket.followers.remove(self.bench.bindings._apply_entry)

    def notice(self) -> None:
        """It was stopped, and joins anew."""
        leases = self.bench.leases
        leases.incarnation, leases.has_lease = f"{leases.incarnation}-again", True
        self._drop_shards()
        if self.session is not None:
            self.session.stop(immediately=True)
        leases.changed.notify_all()

    def _drop_shards(self) -> None:
        for shard in self.bench.shards.values():
            shard.stop()
        self.bench.shards.clear()


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


class Model:
    def __init__(self) -> None:
        self.world = Bench()
        self.world.bus = Bus(self.world.names, self.world.clock, on_put=self._on_put)
        self.box = Mailbox(self.world.clock, self.world.cdn)
        self.world.chat = self.box
        self.up = asyncio.Event()
        self.up.set()
        self.world.bus.on_publish = self._wait
        self.world.person_bucket.on_write = self._wait
        self.box.before_poll = self._check_cursor
        self.control = Bench(self.world, incarnation="control")
        self.binder = self.control.binder()
        self.controlling = asyncio.Lock()
        self.all: list[Replica] = []
        self.dead: set[str] = set()
        self.waits: set[asyncio.Task[None]] = set()
        self.wrong: list[str] = []
        self.commands = 0
        self.times: dict[tuple[str, int], Time] = {}
        """By subject and `since`."""
        self.letters: set[int] = set()
        """Messages in dead letters, by when they were written."""

    async def _wait(self, *_: object) -> None:
        await self.up.wait()

    async def begin(self) -> None:
        self.control.bindings.add_listener(self._on_binding)
        await self._bind("s1", 0)
        self.take_over()

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

    # replicas

    def take_over(self) -> None:
        life = Stopping()
        bench = mortal(self.world, len(self.all) + 1, life)
        bench.bus_up, bench.leases.proven_dead = self.up, self.dead
        bench.publish_polled, bench.is_idle = self._publish_polled, self._is_idle  # type: ignore[method-assign]
        self.owner = Replica(bench, life)
        self.all.append(self.owner)

    async def _publish_polled(self, bot: str = "") -> None:
        if self.up.is_set() and self.owner.life.is_going:
            self.owner.supervisor.on_polled(bot)

    async def _is_idle(self, incarnation: str, bot: str) -> bool:
        """What a replica says of which others believe that it polls a bot."""
        here = [each for each in self.all if each.bench.leases.incarnation == incarnation]
        return any(each.life.is_going and bot not in each.supervisor.pollers for each in here)

    def _later(self, seconds: float, then: Callable[[], object]) -> None:
        async def wait() -> None:
            await asyncio.sleep(seconds)
            if inspect.isawaitable(under_way := then()):
                await under_way

        self.waits.add(asyncio.get_running_loop().create_task(wait()))

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
        leases, session = self.owner.bench.leases, self.owner.session
        leases.has_lease = False
        leases.changed.notify_all()
        if session is not None:
            session.cancel_poll(for_lease=True)

        def back() -> None:
            if leases.owned:
                leases.has_lease = True
                leases.changed.notify_all()

        self._later(seconds, back)

    async def bus(self, *, seconds: float) -> None:
        self.up.clear()
        self._later(seconds, self.up.set)

    async def die(self) -> None:
        self.owner.die()
        self.dead.add(self.owner.bench.leases.incarnation)
        await asyncio.sleep(TAKEN_OVER_S)
        self.take_over()

    async def freeze(self, *, kinds: list[str], is_done: bool, seconds: float) -> None:
        """The owner stops as it stores something, and goes on when another one has its shards."""
        owner = self.owner
        owner.life.stops_at = is_done
        await self.say(kinds=kinds)
        for _ in range(600):
            if owner.life.stops_at is None:
                break
            await asyncio.sleep(0.1)
        else:
            owner.life.stops_at = None
            return
        owner.lose()
        self.dead.add(owner.bench.leases.incarnation)
        await asyncio.sleep(TAKEN_OVER_S)
        self.take_over()
        self._later(seconds, owner.life.go_on)
        self._later(seconds + NOTICED_S, owner.notice)

    async def hand_over(self) -> None:
        if not self.owner.bench.leases.is_valid or not self.up.is_set():
            return
        await self.owner.leave()
        self.take_over()

    async def bind(self, *, sandbox: str, token: int) -> None:
        self._later(0.0, partial(self._bind, sandbox, token))

    async def unbind(self) -> None:
        self._later(0.0, self._unbind)

    async def forget_ids(self) -> None:
        self.world.bus.forget_ids()

    # control

    async def _bind(self, sandbox: str, token: int | str) -> None:
        command = Bind(sandbox=sandbox, bot=BOT, bot_token=f"{BOT}:{token}", user=USER)
        await self._apply(partial(self.binder.bind, command))

    async def _unbind(self) -> None:
        if binding := self.control.bindings.get(BOT):
            await self._apply(partial(self.binder.unbind, Unbind(sandbox=binding.sandbox, bot=BOT)))

    async def _apply(self, work: Callable[[int], Awaitable[object]]) -> None:
        async with self.controlling:
            self.commands += 1
            number = self.commands
            await persist(lambda: work(number), ANYBODY, self.world.clock, "control")

    # the end

    async def settle(self) -> None:
        await asyncio.sleep(60)
        self.up.set()
        self.box.fails.clear()
        self.owner.bench.leases.has_lease = True
        self.owner.bench.leases.changed.notify_all()
        async with asyncio.timeout(600):
            await asyncio.gather(*self.waits)
        binding = self.control.bindings.get(BOT)
        await self._bind(binding.sandbox if binding else "s1", "last")
        await asyncio.sleep(400)

    def problems(self) -> list[str]:
        wrong = list(dict.fromkeys(self.wrong))
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
        binding = self.control.bindings.get(BOT)
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
