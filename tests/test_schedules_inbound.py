"""Random schedules of what users say: all of it is on the bus once, in order, in the sandbox that the bot served.

Made and run as those of test_schedules. iLink is a mailbox here: it answers from the cursor that it is shown, now and
then from an earlier one, with the same messages under other ids. A poll never shows a cursor that passes what is
stored nowhere.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from adapter.errors import SessionExpired, Temporary
from adapter.inbound.poller import BotPoller
from adapter.ports import Account, Polled
from adapter.simulator import samples
from tests.fakes import EPOCH_MS, Bench, FakeChat, VirtualLoop, settle
from tests.inbound.pollers import opened

SCHEDULES = int(os.environ.get("SCHEDULES", "15"))
BOT, USER = "b1@im.bot", "u1@im.wechat"
SANDBOXES = ["s1", "s2"]
PNG = samples.png()
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
        "say": 30, "sleep": 20, "replay": 8, "fail": 4, "lease": 3, "die": 3, "hand_over": 3, "bus": 4, "bind": 3,
        "unbind": 1, "forget_ids": 2,
    }  # fmt: skip
    steps: list[tuple[str, dict[str, Any]]] = []
    for _ in range(chance.randint(4, 35)):
        (kind,) = chance.choices(list(weights), list(weights.values()))
        match kind:
            case "say":
                kinds = chance.choices(["text", "ok", "image"], [6, 2, 2], k=chance.choice([1, 1, 2, 5]))
                arguments: dict[str, Any] = {"kinds": kinds}
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
                other = {key: value + number if isinstance(value, int) else value for key, value in how.items()}
                fields = message | (other if number < known else {})
                given.append(msgspec.json.encode({key: value for key, value in fields.items() if value is not None}))
            await asyncio.sleep(0.01)
            return Polled(given, str(first + len(given)), 35_000)
        finally:
            self.out -= 1


async def nothing(**_: int) -> None: ...


class Replica:
    """Polls the bot as the supervisor lets it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.session: BotPoller | None = None
        self.poller: asyncio.Task[None] | None = None
        self.goes_on = True
        bench.bindings.add_listener(self._changed)

    async def run(self) -> None:
        self.keeper = asyncio.get_running_loop().create_task(self._keep())

    async def _keep(self) -> None:
        while self.goes_on:
            if self.bench.bindings.get(BOT) is not None:
                self.session = self.bench.new_poller(BOT)
                self.poller = asyncio.get_running_loop().create_task(self.session.run())
                await asyncio.wait([self.poller])
            await asyncio.sleep(0.2)

    def _changed(self, bot: str, before: Any, after: Any) -> None:
        if self.session is not None and self.goes_on:
            if after is None:
                self.session.stop(immediately=True)
            elif before is not None and not self.bench.sealer.is_same_secret(bot, before.token, after.token):
                self.session.cancel_poll()

    async def leave(self) -> None:
        self.goes_on = False
        session = self.session
        for shard in self.bench.shards.values():
            await shard.drain(1.0)
        if session is not None and self.poller is not None:
            session.is_handed_over = True
            session.stop(immediately=False)
            await asyncio.wait([self.poller])
        self.bench.leases.owned.clear()

    async def die(self) -> None:
        self.goes_on = False
        if self.session is not None and self.session.checkpoint is not None:
            self.session.checkpoint.release = nothing  # type: ignore[method-assign] # what is killed releases nothing
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            if task.get_name() != "later":
                task.cancel()
        for shard in self.bench.shards.values():
            shard.stop()
        self.bench.leases.owned.clear()
        self.bench.leases.has_lease = False
        await settle()


class _Written(msgspec.Struct):
    sent_at_ms: int = 0
    create_time_ms: int = 0

    def ms(self) -> int:
        return self.sent_at_ms or self.create_time_ms


class Model:
    def __init__(self) -> None:
        self.world = Bench()
        self.box = Mailbox(self.world.clock, self.world.cdn)
        self.world.chat = self.box
        self.up = asyncio.Event()
        self.up.set()
        self.world.bus.on_publish = self._wait
        self.world.conversation_bucket.on_write = self._wait
        self.box.before_poll = self._check_cursor
        self.replicas = 0
        self.waits: list[asyncio.Task[None]] = []
        self.served: list[tuple[float, str]] = []
        self.passed: list[str] = []
        self.stored: set[int] = set()
        """When what is stored was written."""

    async def _wait(self, *_: object) -> None:
        await self.up.wait()

    async def begin(self) -> None:
        self.world.bindings.add_listener(
            lambda bot, before, after: self.served.append((self.now(), after.sandbox if after else ""))
        )
        await self.world.bind()
        await self.take_over()

    def now(self) -> float:
        return self.world.clock.monotonic()

    def _check_cursor(self, cursor: str) -> None:
        """What a cursor passes was stored: in an inbox or as a dead letter, where it may be gone by now."""
        for one in self.world.bus.kept:
            if one.stream in ("WECHAT_IN", "WECHAT_DEAD"):
                data = one.stored.data if one.stream == "WECHAT_IN" else opened(self.world, one.stored)
                self.stored.add(msgspec.json.decode(data, type=_Written).ms())
        if int(cursor or 0) > len(self.stored):
            self.passed.append(f"the cursor says {cursor}, and {len(self.stored)} are stored")

    async def take_over(self) -> None:
        self.replicas += 1
        before = {f"r{number}" for number in range(self.replicas)}
        bench = Bench(self.world, incarnation=f"r{self.replicas}")
        bench.bus_up = self.up
        bench.leases.proven_dead |= before
        self.owner = Replica(bench)
        await self.owner.run()

    def _later(self, seconds: float, then: Any) -> None:
        async def wait() -> None:
            await asyncio.sleep(seconds)
            then()

        self.waits.append(asyncio.get_running_loop().create_task(wait(), name="later"))

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
            leases.has_lease = bool(leases.owned)
            leases.changed.notify_all()

        self._later(seconds, back)

    async def bus(self, *, seconds: float) -> None:
        self.up.clear()
        self._later(seconds, self.up.set)

    async def die(self) -> None:
        await self.owner.die()
        await self.take_over()

    async def hand_over(self) -> None:
        if not self.owner.bench.leases.is_valid or not self.up.is_set():
            return
        await self.owner.leave()
        await self.take_over()

    async def bind(self, *, sandbox: str, token: int) -> None:
        await self.world.bind(sandbox, token=f"{BOT}:{token}")

    async def unbind(self) -> None:
        await self.world.bindings.remove(BOT)

    async def forget_ids(self) -> None:
        self.world.bus.forget_ids()

    async def settle(self) -> None:
        await asyncio.sleep(60)
        self.up.set()
        self.box.fails.clear()
        self.owner.bench.leases.has_lease = True
        self.owner.bench.leases.changed.notify_all()
        binding = self.world.bindings.get(BOT)
        await self.world.bind(binding.sandbox if binding else "s1", token=f"{BOT}:last")
        await asyncio.sleep(400)

    def problems(self) -> list[str]:
        wrong = list(dict.fromkeys(self.passed))
        inbound = self.world.bus.inbound()
        at = {said["create_time_ms"]: number for number, said in enumerate(self.box.said, 1)}  # ids may change
        numbers = [at[one.sent_at_ms] for one in inbound]
        times = Counter(numbers)
        dead = len(self.world.bus.found("DEAD"))
        missing = [n for n in range(1, len(self.box.said) + 1) if n not in times]
        if len(missing) > dead:
            wrong.append(f"missing: {missing}, {dead} dead letters")
        if twice := [n for n, count in times.items() if count > 1]:
            wrong.append(f"twice: {twice}")
        for name in SANDBOXES:
            own = [n for n, one in zip(numbers, inbound, strict=True) if one.sandbox == name]
            if any(a > b for a, b in pairwise(own)):
                wrong.append(f"order: {name} read {own}")
        spans = [(begin, end, name) for (begin, name), (end, _) in pairwise([*self.served, (float("inf"), "")])]
        kept = [one for one in self.world.bus.kept if one.stream == "WECHAT_IN"]
        for one, number, stored in zip(inbound, numbers, kept, strict=True):
            until = 1000 + (stored.time_ms - EPOCH_MS) / 1000
            during = [name for begin, end, name in spans if begin <= until + 1e-6 and end >= self.box.given[number]]
            if one.sandbox not in during:
                wrong.append(f"sandbox: {one.sandbox} got {number}; meanwhile {during} were served")
        return wrong


def run(steps: list[tuple[str, dict[str, Any]]]) -> list[str]:
    async def happen() -> list[str]:
        model = Model()
        await model.begin()
        for kind, arguments in steps:
            await getattr(model, kind)(**arguments)
        await model.settle()
        found = model.problems()
        await model.owner.die()
        return found

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(happen())


def test_schedules() -> None:
    for seed in range(SCHEDULES):
        if found := run(schedule(seed)):
            pytest.fail(f"seed {seed}:\n" + "\n".join([*found, *map(str, schedule(seed))]))
