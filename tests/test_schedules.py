"""Random schedules against the promises of the contract: whatever happens, each command ends once and as it was told.

A schedule is a list of steps, made from a seed and the same in every run; time is virtual. `SCHEDULES=10000` makes
more of them, `SEED=7` only that one. Checked when everything has settled: one final receipt per command, which says
what iLink did; per user in order, one request at a time, in no more sends than a window has; nothing reaches another
user, or goes out over a bot that serves another sandbox by then; and nothing is left anywhere.

Replicas run as the service runs them, but for pollers: what users write the model stores.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import msgspec
import pytest

from adapter.bridge import entries
from adapter.bridge.handover import SILENT_S
from adapter.bridge.partition import Partition
from adapter.contract.messages import FINAL_OUTCOMES, Receipt
from adapter.contract.records import Binding
from adapter.errors import Refused, SessionExpired, Temporary, Throttled, Uncertain
from adapter.ports import Accepted, BucketEntry
from adapter.tools.timing import ChangeSignal
from tests.fakes import LIMITS, Bench, FakeBucket, FakeChat, FakeDelivery, Life, Sent, VirtualLoop
from tests.fakes.mortal import Command, mortal
from tests.fakes.succession import Succession

SCHEDULES = int(os.environ.get("SCHEDULES", "50"))
SANDBOXES = ["s1", "s2"]
USERS = ["u1", "u2"]
SETTLED_S = 100.0
"""In which all that moves has moved."""
STALE = SessionExpired("needs_login", "iLink answered -14", errcode=-14)


class Lost(Uncertain):
    """No answer, and iLink never saw the request."""


class Dead(SessionExpired):
    """iLink refuses the token at notifystart, too, until it takes a send."""


ANSWERS: dict[str, Callable[[int], Accepted | Exception]] = {
    "ok": lambda number: Accepted(f"m{number}", 0, None, ""),
    "no id": lambda number: Accepted(None, 0, None, ""),
    "throttled": lambda number: Throttled("throttled", "iLink answered -2", ret=-2),
    "stale": lambda number: (Dead if number % 2 else SessionExpired)(
        "needs_login", "iLink answered -14", errcode=-14
    ),
    "refused": lambda number: Refused("rejected", "iLink answered -3", ret=-3),
    "busy": lambda number: Temporary("http_5xx"),
    "unreachable": lambda number: Temporary("network"),
    "silent": lambda number: Uncertain("timeout", "no answer"),
    "lost": lambda number: Lost("timeout", "no answer"),
}
Step: TypeAlias = tuple[str, dict[str, Any]]


class Script(NamedTuple):
    """A schedule, and the settings under which it runs."""

    settings: dict[str, int]
    steps: list[Step]


def schedule(seed: int) -> Script:
    """The schedule of a seed."""
    chance = random.Random(seed)
    calm = chance.random() < 0.3
    settings = {
        "merge_chars": chance.choice([0, 40, 3000]),
        "sends": chance.choice([3, 4, 10]),
        "took_ms": chance.choice([0, 300, 6000]),
        "split": chance.choice([0, 0, 1]),
    }
    weights = {
        "command": 30, "typing": 3, "write": 14, "answers": 12, "sleep": 22, "reset": 2, "bind": 4, "unbind": 2,
        "login": 0 if calm else 3, "stale": 0 if calm else 2, "lease": 0 if calm else 3, "die": 0 if calm else 3,
        "leave": 0 if calm else 2, "give": 0 if calm else 4, "bus": 0 if calm else 2, "reads": 0 if calm else 2,
        "late_ack": 0 if calm else 1,
    }  # fmt: skip
    steps: list[Step] = []
    for number in range(chance.randint(5, 45)):
        (kind,) = chance.choices(list(weights), list(weights.values()))
        steps.append((kind, _arguments(kind, 10 * number, chance)))
    return Script(settings, steps)


def _arguments(kind: str, number: int, chance: random.Random) -> dict[str, Any]:
    user, sandbox = chance.choice(USERS), chance.choice(["s1", "s1", "s1", "s2"])
    match kind:
        case "command":
            return {
                "number": number,
                "ident": number if chance.random() < 0.85 else 10 * chance.randint(0, number // 10),
                "sandbox": sandbox,
                "user": user,
                "to": chance.choice(["user", "bot", "nobody"]),
                "parts": chance.choice([1, 1, 1, 1, 2, 3]),
                "when_closed": chance.choice(["park", "park", "park", "refuse"]),
                "expires_in_s": chance.choice([None, None, None, 5, 60, 700]),
            }
        case "typing":
            return {"number": number, "sandbox": sandbox, "user": user, "typing": chance.choice(["on", "off"])}
        case "write":
            return {"user": user}
        case "answers":
            return {"user": user, "answers": chance.choices(list(ANSWERS), k=chance.randint(1, 3))}
        case "sleep":
            return {"seconds": chance.choice([0.001, 0.1, 0.4, 1.0, 1.6, 5.0, 20.0, 70.0, 700.0, 4000.0])}
        case "bind":
            return {"user": user, "sandbox": sandbox, "anew": chance.random() < 0.4, "named": chance.random() < 0.8}
        case "unbind":
            return {"user": user}
        case "login":
            return {"user": user, "alive": chance.random() < 0.5}
        case "stale":
            return {"user": user, "seconds": chance.choice([0.5, 3.0, 30.0])}
        case "lease":
            return {"sandbox": sandbox, "seconds": chance.choice([0.5, 3.0, 30.0])}
        case "bus":
            return {"seconds": chance.choice([0.2, 3.0, 30.0])}
        case "reads":
            return {"times": chance.randint(1, 3)}
        case "die":
            return {"sandbox": sandbox, "heir": chance.randrange(2)}
        case "leave":
            return {"sandbox": sandbox, "heir": chance.randrange(2), "seconds": chance.choice([1.0, 20.0])}
        case "give":
            arguments = {"number": number, "sandbox": sandbox, "heir": chance.randrange(4)}
            arguments |= {"busy": chance.random() < 0.8}
            after_s, deaf_s = chance.choice([0.0, 0.005, 0.3, 3.0]), chance.choice([0.0, 0.0, 0.0, 7.0])
            return arguments | {"after_s": after_s, "deaf_s": deaf_s}
        case _:
            return {}


class Phone(FakeChat):
    """iLink, which remembers what it answered to whom."""

    def __init__(self, clock: Any) -> None:
        super().__init__(clock)
        self.unanswered: set[str] = set()
        """The client_ids of requests that got no answer, or whose asker did not live to hear it."""
        self.answers: list[tuple[Sent, object]] = []
        self.bound: Callable[[str], Binding | None] = lambda bot: None
        self.strays: list[str] = []
        """What went out over a bot that did not serve its sandbox any more."""
        self.shown: list[Sent] = []
        self.out: Counter[str] = Counter()
        """The client_ids of requests that are out."""
        self.begins = ChangeSignal()
        self.dead: set[str] = set()
        """Bots whose token is refused."""
        self._seen: set[tuple[str, str]] = set()

    def conversation_of(self, sent: Sent) -> tuple[str, ...]:
        """A bot that moves while a request is out is in two conversations for as long."""
        return *super().conversation_of(sent), *(piece.split(".")[0] for piece in pieces(sent)[:1])

    async def _send(self, sent: Sent) -> Accepted:
        binding = self.bound(sent.bot)
        served = binding.sandbox if binding else "nobody"
        if any(f"@{served}." not in piece for piece in pieces(sent)):
            self.strays.append(f"{sent.text!r} over {sent.bot}, which serves {served}")
        known = sent.client_id in self.taken
        self.out[sent.client_id] += 1
        self.begins.notify_all()
        try:
            answer = await super()._send(sent)
        except Dead:
            self.dead.add(sent.bot)
            raise
        except Lost:
            if not known:
                del self.taken[sent.client_id]
            self.unanswered.add(sent.client_id)
            raise
        except (asyncio.CancelledError, Uncertain):
            self.unanswered.add(sent.client_id)
            raise
        finally:
            self.out -= Counter([sent.client_id])
            if sent.client_id in self.taken and (sent.bot, sent.client_id) not in self._seen:
                self._seen.add((sent.bot, sent.client_id))
                self.shown.append(sent)
        self.dead.discard(sent.bot)
        self.answers.append((sent, answer))
        return answer


def pieces(sent: Sent) -> list[str]:
    """What a message holds: a piece for each part of a command."""
    return [piece for piece in sent.text.split("\n\n") if piece.startswith("@")]


class Told(NamedTuple):
    """A command, as it was stored."""

    ident: str
    sequence: int
    pieces: list[str]
    user: str
    fields: dict[str, Any]


class Hold:
    """The bus, which may be away: what is written waits, and what is asked gets no answer."""

    def __init__(self) -> None:
        self.up = asyncio.Event()
        self.up.set()

    async def wait(self, *_: object) -> None:
        await self.up.wait()


class Bucket(FakeBucket):
    def __init__(self, hold: Hold) -> None:
        super().__init__()
        self._hold = hold
        self.on_write = hold.wait

    async def get(self, key: str) -> BucketEntry | None:
        if not self._hold.up.is_set():
            raise Temporary("bus_down")
        return await super().get(key)


class Replica:
    """Runs as the service does, with the partitions that the model gives it."""

    def __init__(self, model: Model, number: int) -> None:
        self.life = Life()
        self.bench = mortal(model.world, number, self.life)
        self.bench.leases.on_released = model.on_released
        self.is_well = True
        """It may be given partitions."""
        self._model = model

    async def begin(self) -> None:
        rules = {name: self._model.settings[name] for name in ("sends", "merge_chars")}
        await self.bench.run(self._consume, capacity=0, **rules)

    async def _consume(self, partition: Partition) -> None:
        consumers = self._model.consumers
        consumers[partition.number] = self, partition
        self._model.deliver_all(partition.number)
        try:
            await asyncio.Event().wait()
        finally:
            if consumers.get(partition.number) == (self, partition):
                del consumers[partition.number]

    def take(self, number: int) -> None:
        if self.is_well:
            self.bench.leases.take(number)

    async def leave(self, seconds: float) -> None:
        """As at SIGTERM."""
        await self.bench.drain(seconds)
        self.die()

    def die(self) -> None:
        self.is_well = False
        self.life.stop()
        self.bench.kill()


class Model(Succession[Replica]):
    """The world of one schedule."""

    def __init__(self, settings: dict[str, int]) -> None:
        super().__init__()
        self.settings = settings
        self.world = Bench()
        self.world.chat = self.chat = Phone(self.world.clock)
        self.chat.took_s = settings["took_ms"] / 1000
        self.chat.bound = self.world.bindings.get

        def on_binding(bot: str, before: Binding | None, after: Binding | None) -> None:
            if after is not None:
                self.persons[after.sandbox, bot[:2]].add(after.since)

        self.world.bindings.add_listener(on_binding)
        self.hold = Hold()
        self.world.person_bucket = Bucket(self.hold)
        self.world.bus.on_publish = self.hold.wait
        self.told: list[Told] = []
        self.commands: dict[int, FakeDelivery] = {}
        self.delivered: set[int] = set()
        self.controls: dict[int, str] = {}
        """Binds and unbinds: the verb, by sequence."""
        self.binding = asyncio.Lock()
        self.bots = {user: f"{user}b0@im.bot" for user in USERS}
        self.tokens = 0
        self.wrote: dict[str, list[int]] = defaultdict(list)
        self.deaths = 0
        self.unsaved = 0
        """How often a replica ended while nobody could write down what it knew."""
        self.persons: dict[tuple[str, str], set[int]] = defaultdict(set)
        """Since when, by sandbox and user: an id is forgotten with its person."""
        self.consumers: dict[int, tuple[Replica, Partition]] = {}

    async def begin(self) -> None:
        first = await self.start()
        second = await self.start() if self.settings["split"] else first
        for name, owner in zip(SANDBOXES, (first, second), strict=True):
            self.pass_on(self.number(name), owner)
        for user in USERS:
            await self._bind("s1", self.bots[user], f"{user}@im.wechat")

    def number(self, sandbox: str) -> int:
        return self.world.names.partition_of(sandbox)

    async def start(self) -> Replica:
        replica = Replica(self, len(self.replicas) + 1)
        self.replicas.append(replica)
        await replica.begin()
        return replica

    # the bus

    async def reset(self) -> None:
        for number in [*self.consumers]:
            self.deliver_all(number)

    def deliver_all(self, number: int) -> None:
        """As a consumer does when it begins: all that is not acknowledged comes, in order."""
        for stored in self.world.bus.found("OUT"):
            if self.number(stored.subject.rpartition(".")[2]) == number:
                self._deliver(self.commands[stored.seq])

    def _deliver(self, command: FakeDelivery) -> None:
        number = self.number(command.subject.rpartition(".")[2])
        if number not in self.consumers:
            return
        replica, partition = self.consumers[number]
        redelivered = command.seq in self.delivered
        self.delivered.add(command.seq)
        partition.on_delivery(Command(self.world.bus, command, redelivered=redelivered, life=replica.life))

    def _store(self, told: Callable[[int], Told], sandbox: str, **body: Any) -> None:
        fields = {name: value for name, value in body.items() if value is not None}
        command = self.world.command(sandbox=sandbox, **fields)
        self.told.append(told(command.seq))
        self.commands[command.seq] = command
        self._deliver(command)

    # steps

    async def command(
        self, *, number: int, ident: int, sandbox: str, user: str, to: str, parts: int, **fields: Any
    ) -> None:
        await asyncio.sleep(0.001)  # an id is one at a time
        texts = [f"@{sandbox}.{user}.{number}.{part}" for part in range(parts)]
        body = {"text": texts[0]} if parts == 1 else {"items": [{"kind": "text", "text": text} for text in texts]}
        name = f"c{sandbox}{user}{ident}"
        whom = {"user": f"{user}@im.wechat"} if to == "user" else {"bot": self.bots[user]} if to == "bot" else {}
        alone = [binding.user for binding in self.world.bindings.of_sandbox(sandbox)]
        is_changing = any(stored.seq in self.controls for stored in self.world.bus.found("OUT"))
        meant = f"{user}@im.wechat" if whom else alone[0] if len(alone) == 1 and not is_changing else ""
        self._store(
            lambda sequence: Told(name, sequence, texts, meant, fields), sandbox, id=name, **body, **whom, **fields
        )

    async def typing(self, *, number: int, sandbox: str, user: str, typing: str) -> None:
        await asyncio.sleep(0.001)
        name = f"t{number}"
        self._store(
            lambda sequence: Told(name, sequence, [], "", {}),
            sandbox, id=name, user=f"{user}@im.wechat", typing=typing,
        )  # fmt: skip

    async def write(self, *, user: str) -> None:
        """What a poller does with a message."""
        bot, name = self.bots[user], f"{user}@im.wechat"
        if (binding := self.world.bindings.get(bot)) is None or not self.hold.up.is_set():
            return
        polling = self.consumers.get(self.number(binding.sandbox))
        if polling is None or not polling[0].bench.leases.has_lease:
            return
        await asyncio.sleep(0.001)
        await self.world.bindings.update(
            bot, lambda now: None if now.user else msgspec.structs.replace(now, user=name)
        )
        if binding := self.world.bindings.get(bot):
            self.wrote[bot].append(len(self.chat.sent))
            self._publish(binding, name)
            await self._look(bot)

    def _publish(self, binding: Binding, user: str) -> None:
        """An entry with a message of the user."""
        now_ms, subject = self.world.clock.now_ms(), self.world.names.inbox(binding.sandbox, binding.person)
        opened = entries.OpenedWindow(f"in:{now_ms}", now_ms, now_ms)
        entry = entries.Entry(since=binding.since, user=user, bot=binding.bot, window=opened)
        payload = entries.encode_entry(entry, entries.Secrets("AARz"), subject, self.world.sealer)
        self.world.bus.put(subject, payload, {})

    async def _look(self, bot: str) -> None:
        """The person has the message from their poller."""
        while (binding := self.world.bindings.get(bot)) and self.number(binding.sandbox) in self.consumers:
            _, partition = self.consumers[self.number(binding.sandbox)]
            try:
                person = partition.person(binding)
                await person.open()
                return await person.read_newest()
            except Temporary:
                await asyncio.sleep(1.0)

    async def answers(self, *, user: str, answers: Sequence[str]) -> None:
        script = self.chat.sends_to.setdefault(f"{user}@im.wechat", deque())
        script.extend(ANSWERS[answer](self.world.clock.now_ms() + n) for n, answer in enumerate(answers))

    async def sleep(self, *, seconds: float) -> None:
        await asyncio.sleep(min(seconds, SETTLED_S))
        if seconds > SETTLED_S:
            self._rest()
            await asyncio.sleep(seconds - SETTLED_S)
            for each in self.replicas:
                if each.is_well:
                    await each.bench.wake()

    def _rest(self) -> None:
        """No partition moves, so that nobody needs to look each second."""
        for each in self.replicas:
            each.bench.rest()

    async def bind(self, *, user: str, sandbox: str, anew: bool, named: bool) -> None:
        """With a new token, or a new bot of the user; here or in another sandbox."""
        self.later(0.0, partial(self._bind_user, user, sandbox, anew=anew, named=named))

    async def _bind_user(self, user: str, sandbox: str, *, anew: bool, named: bool) -> None:
        async with self.binding:
            bot, name = self.bots[user], f"{user}@im.wechat"
            before = self.world.bindings.get(bot)
            if before is not None and before.sandbox != sandbox:
                await self._unbind(before.bot)  # it serves one sandbox at a time
            if anew:
                bot = self.bots[user] = f"{user}b{self.tokens}@im.bot"
            others = [one for one in self.world.bindings.of_sandbox(sandbox) if one.bot != bot]
            named = named or any(one.user == name for one in others)
            for one in others:
                if not one.user and one.bot.startswith(user):
                    await self._unbind(one.bot)  # whom two binds have not named is two persons
            await self._bind(sandbox, bot, name if named else "")

    async def _bind(self, sandbox: str, bot: str, user: str) -> None:
        self.tokens += 1
        await self._say("bind", sandbox, bot=bot, bot_token=f"{bot}:{self.tokens}", user=user)

    async def _unbind(self, bot: str) -> None:
        if binding := self.world.bindings.get(bot):
            await self._say("unbind", binding.sandbox, bot=bot)

    async def _say(self, verb: str, sandbox: str, **body: Any) -> None:
        """Says a bind or unbind, and waits until it is done."""
        said = self.world.command(verb=verb, sandbox=sandbox, **body)
        self.commands[said.seq], self.controls[said.seq] = said, verb
        self._deliver(said)
        while any(stored.seq == said.seq for stored in self.world.bus.found("OUT")):
            await asyncio.sleep(0.1)

    async def unbind(self, *, user: str) -> None:
        self.later(0.0, partial(self._unbind_user, user))

    async def _unbind_user(self, user: str) -> None:
        async with self.binding:
            await self._unbind(self.bots[user])

    async def login(self, *, user: str, alive: bool) -> None:
        state: Any = "active" if alive else "needs_login"
        await self.world.bindings.update(self.bots[user], lambda now: msgspec.structs.replace(now, state=state))

    async def stale(self, *, user: str, seconds: float) -> None:
        bot, replicas = self.bots[user], [*self.replicas]
        for each in replicas:
            each.bench.stale.add(bot)
            each.bench.replica.parts.sessions.changed.notify_all()

        def over() -> None:
            for each in replicas:
                each.bench.stale.discard(bot)
            if (binding := self.world.bindings.get(bot)) and self.number(binding.sandbox) in self.consumers:
                self.consumers[self.number(binding.sandbox)][1].on_binding(None, binding)

        self.later(seconds, over)

    async def lease(self, *, sandbox: str, seconds: float) -> None:
        """The owner cannot renew, and nobody takes what it has."""
        leases = self.homes[self.number(sandbox)].bench.leases
        leases.has_lease = False

        def back() -> None:
            leases.has_lease = True

        self.later(seconds, back)

    async def bus(self, *, seconds: float) -> None:
        self.hold.up.clear()
        self.later(seconds, self.hold.up.set)

    async def reads(self, *, times: int) -> None:
        self.world.bus.unreadable += times

    async def late_ack(self) -> None:
        self.world.person_bucket.answers_lost += 1

    async def die(self, *, sandbox: str, heir: int) -> None:
        dead = self.homes[self.number(sandbox)]
        if not dead.is_well:
            return
        dead.die()
        self.deaths += 1
        # what was asked and not heard, or heard and not written down
        self.chat.unanswered |= {sent.client_id for sent in self.chat.sent if sent.at_s > self._now() - 120}
        await self.inherit(dead, heir)

    async def leave(self, *, sandbox: str, heir: int, seconds: float) -> None:
        leaving = self.homes[self.number(sandbox)]
        if not leaving.is_well:
            return
        taker = await self.heir(heir, leaving)
        leaving.is_well = False
        for number in leaving.bench.leases.owned:
            self.heirs.setdefault(number, (taker, 0.0))
        self._gives(leaving)
        self.later(0.0, partial(self._leave, leaving, seconds))

    async def _leave(self, leaving: Replica, seconds: float) -> None:
        await leaving.leave(seconds)
        await self.inherit(leaving, 0)

    async def give(self, *, number: int, sandbox: str, heir: int, busy: bool, after_s: float, deaf_s: float) -> None:
        """As one who has too many does, perhaps while a request is out; at times it gets the partition back, or hears
        nobody from then on."""
        if busy:
            await self._busy(sandbox, number)
        number = self.number(sandbox)
        giver = self.homes[number]
        if not giver.is_well or number not in giver.bench.leases.owned or number in self.heirs:
            return
        self.heirs[number] = (giver if heir == 3 else await self.heir(heir, giver)), after_s
        self._gives(giver)
        await giver.bench.replica.partitions.give(number)
        if deaf_s and giver.life.is_going and self.chat.took_s < SILENT_S:  # nobody waits longer for who is cut off
            giver.bench.core.is_cut = True
            await asyncio.sleep(deaf_s)
            giver.bench.core.is_cut = not giver.life.is_going

    async def _busy(self, sandbox: str, number: int) -> None:
        """The users write, and get two answers. Returns while the first is out, if that lasts."""
        for user in [user for user in USERS if any(self.bots[user] == one.bot for one in self.world.bindings)]:
            await self.write(user=user)
            for _ in range(2):
                number += 1
                await self.command(number=number, ident=number, sandbox=sandbox, user=user, to="user", parts=1)
        await self.chat.begins.wait_until(lambda: bool(self.chat.out), 3.0)

    def _gives(self, giver: Replica) -> None:
        """The next owner does not hear what is answered from now on, unless it is in a receipt."""
        self.chat.unanswered |= {*self.chat.out}
        began = self._now()

        def had_begun() -> None:
            """A request whose record was being stored."""
            late = [sent for sent in self.chat.sent if began <= sent.at_s <= began + 0.1]
            self.chat.unanswered |= {sent.client_id for sent in late}

        self.later(1.0, had_begun)
        if not giver.bench.leases.has_lease or not self.hold.up.is_set():  # nobody can write down what was heard
            self.unsaved += 1
            self.chat.unanswered |= {sent.client_id for sent in self.chat.sent if sent.at_s > self._now() - 60}

    def _now(self) -> float:
        return self.world.clock.monotonic()

    # the end

    async def settle(self) -> None:
        """All is well again, and the users write until nothing waits."""
        await asyncio.sleep(SETTLED_S)
        self.hold.up.set()
        self.world.bus.unreadable = self.world.person_bucket.answers_lost = 0
        self.chat.sends_to.clear()
        for each in self.replicas:
            each.bench.leases.has_lease = True
            each.bench.stale.clear()
        async with asyncio.timeout(3600):
            while later := [each for each in self.waits if not each.done()]:
                await asyncio.gather(*later)
        await asyncio.sleep(SETTLED_S)
        self._rest()
        for binding in list(self.world.bindings):
            if binding.state != "active":
                await self._bind(binding.sandbox, binding.bot, binding.user)
        await self.reset()
        for _ in range(40):
            for user in USERS:
                await self.write(user=user)
            await asyncio.sleep(60)
            if not self.world.bus.found("OUT"):
                return
        await asyncio.sleep(LIMITS.park_ms / 1000)  # for users whom nobody serves any more

    def problems(self) -> list[str]:
        """What does not hold."""
        return [f"{check.__name__}: {found}" for check in CHECKS for found in check(self)]

    def finals(self) -> dict[int, list[Receipt]]:
        """By the sequences of the commands."""
        found: dict[int, list[Receipt]] = defaultdict(list)
        for receipt in self.world.bus.receipts():
            if receipt.outcome in FINAL_OUTCOMES:
                found[receipt.sequence].append(receipt)
        return found


# what must hold ------------------------------------------------------------------------------------------


def nothing_is_left(model: Model) -> list[str]:
    found = model.world.bus.found("OUT")
    left = [f"OUT holds {len(found)}"] if found else []
    left += [f"failed: {each.bench.failed}" for each in model.replicas if each.bench.failed]
    left += [f"left: {number} {key.former}" for number, key in model.world.keys.items() if key.former]
    for number, (_, partition) in model.consumers.items():
        if depth := partition.queue_depths(Counter())[0]:
            left.append(f"partition {number} has {depth} in flight")
        left += [f"{each.person.key}: {len(each.queue)} queued" for each in partition.senders if each.queue]
        if partition.tasks:
            left.append(f"partition {number} has {partition.tasks} tasks")
    return left


def each_bind_and_unbind_is_applied_once(model: Model) -> list[str]:
    found: dict[int, list[str]] = defaultdict(list)
    for verb in ("bind", "unbind"):
        for receipt in model.world.bus.receipts(verb):
            found[receipt.sequence].append(receipt.outcome)
    return [f"{verb} {seq}: {found[seq]}" for seq, verb in model.controls.items() if found[seq] != ["applied"]]


def each_has_one_final_receipt(model: Model) -> list[str]:
    finals = model.finals()
    return [
        f"{one.ident} ({one.sequence}) has {len(finals[one.sequence])}"
        for one in model.told
        if len(finals[one.sequence]) != 1
    ]


def receipts_are_true(model: Model) -> list[str]:
    wrong, finals = [], model.finals()
    shown: dict[str, list[Sent]] = defaultdict(list)
    for sent in model.chat.shown:
        for piece in pieces(sent):
            shown[piece].append(sent)
    ids: dict[str, set[str | None]] = defaultdict(set)
    idless: set[str] = set()
    for sent, answer in model.chat.answers:
        assert isinstance(answer, Accepted)
        for piece in pieces(sent):
            ids[piece].add(answer.message_id)
            if not answer.message_id:
                idless.add(piece)
    asked: dict[str, set[str]] = defaultdict(set)
    for sent in model.chat.sent:
        for piece in pieces(sent):
            asked[piece].add(sent.client_id)
    for one in model.told:
        if not one.pieces:
            continue
        times = [len(shown[piece]) for piece in one.pieces]
        if max(times) > 1:
            wrong.append(f"{one.ident} {one.pieces} was shown {times} times")
        for receipt in finals[one.sequence]:
            if receipt.repeat_of:
                firsts = [(first.outcome, first.message_ids) for first in finals[receipt.repeat_of]]
                if (receipt.outcome, receipt.message_ids) not in firsts or any(times):
                    wrong.append(f"{one.ident} repeats {firsts}, is {receipt.outcome}, and was shown {times} times")
                continue
            silent = any(asked[piece] & model.chat.unanswered for piece in one.pieces)
            match receipt.outcome:
                case "accepted" | "accepted_unconfirmed":
                    if min(times) < 1:
                        wrong.append(f"{one.ident} is accepted, and was shown {times} times")
                    if not silent and (receipt.outcome == "accepted") != idless.isdisjoint(one.pieces):
                        wrong.append(f"{one.ident} is {receipt.outcome}: {[ids[piece] for piece in one.pieces]}")
                case "uncertain":
                    if not silent and not model.deaths and not model.unsaved:
                        wrong.append(f"{one.ident} is uncertain, and each request had its answer")
                case _:
                    if min(times) > 0:
                        wrong.append(f"{one.ident} is {receipt.outcome} ({receipt.reason}), and was shown {times}")
            known = {ident for piece in one.pieces for ident in ids[piece]} - {None}
            if not silent and set(receipt.message_ids) != known:
                wrong.append(f"{one.ident} is {receipt.outcome} and names {receipt.message_ids} of {known}")
    return wrong


def an_id_is_sent_once(model: Model) -> list[str]:
    times: Counter[tuple[str, str, str]] = Counter()
    for receipt in [receipt for found in model.finals().values() for receipt in found]:
        if receipt.outcome in ("accepted", "accepted_unconfirmed") and not receipt.repeat_of:
            times[receipt.command, receipt.sandbox, receipt.bot[:2]] += 1
    names = {one.ident for one in model.told if one.pieces}
    return [
        f"{ident} was accepted {count} times for {user}"
        for (ident, sandbox, user), count in times.items()
        if count > len(model.persons[sandbox, user]) and ident in names
    ]


def what_was_answered_is_not_asked_again(model: Model) -> list[str]:
    times = Counter(sent.client_id for sent, answer in model.chat.answers if isinstance(answer, Accepted))
    return [f"{one} was asked {n} times" for one, n in times.items() if n > 1 and one not in model.chat.unanswered]


def one_at_a_time_and_in_order(model: Model) -> list[str]:
    wrong = [f"{model.chat.overlaps} overlaps"] if model.chat.overlaps else []
    for user in USERS:
        for sandbox in SANDBOXES:
            found = [
                tuple(map(int, piece.split(".")[2:]))
                for sent in model.chat.shown
                if sent.user == f"{user}@im.wechat"
                for piece in pieces(sent)
                if piece.startswith(f"@{sandbox}.")
            ]
            mixed = any(earlier > later for earlier, later in pairwise(found))
            if mixed:
                wrong.append(f"{user} got {found} of {sandbox}")
    return wrong


def nothing_goes_astray(model: Model) -> list[str]:
    wrong = list(dict.fromkeys(model.chat.strays))
    meant = {piece: one.user for one in model.told if one.user for piece in one.pieces}
    for sent in model.chat.sent:
        astray = [piece for piece in pieces(sent) if meant.get(piece, sent.user) != sent.user]
        wrong += [f"{piece} went to {sent.user}" for piece in astray]
    return wrong


def windows_are_kept(model: Model) -> list[str]:
    wrong, number = [], {id(sent): number for number, sent in enumerate(model.chat.sent)}
    for bot, wrote in model.wrote.items():
        at = [number[id(sent)] for sent in model.chat.shown if sent.bot == bot]
        for begin, end in pairwise([*wrote, len(number)]):
            if (count := len([one for one in at if begin <= one < end])) > model.settings["sends"]:
                wrong.append(f"{bot} sent {count} in one window")
    return wrong


CHECKS: list[Callable[[Model], list[str]]] = [
    nothing_is_left,
    each_bind_and_unbind_is_applied_once,
    each_has_one_final_receipt,
    receipts_are_true,
    an_id_is_sent_once,
    what_was_answered_is_not_asked_again,
    one_at_a_time_and_in_order,
    nothing_goes_astray,
    windows_are_kept,
]


def run(script: Script) -> list[str]:
    """What does not hold at the end of a schedule."""

    async def happen() -> list[str]:
        model = Model(script.settings)
        await model.begin()
        for kind, arguments in script.steps:
            step: Callable[..., Awaitable[None]] = getattr(model, kind)
            await step(**arguments)
        await model.settle()
        return model.problems()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(happen())


def shrunk(script: Script, like: str) -> Script:
    """As short as it gets while the same check fails: for people."""
    steps, width = list(script.steps), max(1, len(script.steps) // 2)

    def fails(steps: list[Step]) -> bool:
        return any(found.startswith(like) for found in run(script._replace(steps=steps)))

    while width:
        start = 0
        while start < len(steps):
            fewer = steps[:start] + steps[start + width :]
            if fails(fewer):
                steps = fewer
            else:
                start += width
        width //= 2
    return script._replace(steps=steps)


SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else range(SCHEDULES)


def test_schedules() -> None:
    for seed in SEEDS:
        script = schedule(seed)
        if found := run(script):
            least = shrunk(script, found[0].partition(":")[0])
            steps = "\n".join(map(str, least.steps))
            pytest.fail(f"seed {seed}, {script.settings}:\n" + "\n".join([*found, "", steps]))
