"""Random schedules against the promises of the contract: whatever happens, each command ends once and as it was told.

A schedule is a list of steps, made from a seed and the same in every run; time is virtual. `SCHEDULES=10000` makes
more of them, `SEED=7` only that one. Checked when everything has settled: one final receipt per command, which says
what iLink did; per user in order, one request at a time, in no more sends than a window has; nothing reaches another
user, or goes out over a bot that serves another sandbox by then; and nothing is left anywhere.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import random
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import msgspec
import pytest

from adapter.contract.messages import FINAL_OUTCOMES, BindingEvent, Receipt
from adapter.contract.names import H_BOT, H_MSG_ID, H_SEALED, shard_of
from adapter.contract.records import Binding
from adapter.errors import Refused, SessionExpired, Temporary, Throttled, Uncertain
from adapter.outbound.inbox import Sealed, seal
from adapter.outbound.shard import Shard
from adapter.ports import Accepted, Entry
from tests.fakes import LIMITS, Bench, FakeBucket, FakeChat, FakeDelivery, Life, Sent, VirtualLoop
from tests.fakes.mortal import Command, mortal

SCHEDULES = int(os.environ.get("SCHEDULES", "50"))
SANDBOXES = ["s1", "s2"]
USERS = ["u1", "u2"]
STALE = SessionExpired("needs_login", "iLink answered -14", errcode=-14)


LATE_S = 0.0 if "ALL" in os.environ else 2.0
"""A request that was about to leave when its bot was unbound or moved may leave all the same."""
KNOWN = "ALL" not in os.environ
"""Gaps that are known are not looked for: who is meant by a command without an address, or by one for a user whom no
binding names, is found out late. `ALL=1` looks for them, too."""


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
        "took_ms": chance.choice([0, 300, 3000]),
        "split": chance.choice([0, 0, 1]),
    }
    weights = {
        "command": 30, "typing": 3, "write": 14, "answers": 12, "sleep": 22, "reset": 2, "bind": 4, "unbind": 2,
        "login": 0 if calm else 3, "stale": 0 if calm else 2, "lease": 0 if calm else 3, "die": 0 if calm else 3,
        "drain": 0 if calm else 2, "bus": 0 if calm else 2, "reads": 0 if calm else 2, "late_ack": 0 if calm else 1,
    }  # fmt: skip
    steps: list[Step] = []
    for number in range(chance.randint(5, 45)):
        (kind,) = chance.choices(list(weights), list(weights.values()))
        steps.append((kind, _arguments(kind, number, chance)))
    return Script(settings, steps)


def _arguments(kind: str, number: int, chance: random.Random) -> dict[str, Any]:
    user, sandbox = chance.choice(USERS), chance.choice(["s1", "s1", "s1", "s2"])
    match kind:
        case "command":
            return {
                "number": number,
                "ident": number if chance.random() < 0.85 else chance.randint(0, number),
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
        case "stale" | "lease":
            return {"user": user, "seconds": chance.choice([0.5, 3.0, 30.0])}
        case "bus":
            return {"seconds": chance.choice([0.2, 3.0, 30.0])}
        case "reads":
            return {"times": chance.randint(1, 3)}
        case "drain":
            return {"again": chance.random() < 0.5}
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
        self.moved_at: dict[str, float] = {}
        self.dead: set[str] = set()
        """Bots whose token is refused."""
        self._seen: set[tuple[str, str]] = set()

    def conversation_of(self, sent: Sent) -> tuple[str, ...]:
        """A bot that moves while a request is out is in two conversations for as long."""
        return *super().conversation_of(sent), *(piece.split(".")[0] for piece in pieces(sent)[:1])

    async def _send(self, sent: Sent) -> Accepted:
        binding = self.bound(sent.bot)
        served = binding.sandbox if binding else "nobody"
        ago_s = sent.at_s - self.moved_at.get(sent.bot, 0.0)
        if any(f"@{served}." not in piece for piece in pieces(sent)) and ago_s > LATE_S:
            self.strays.append(f"{sent.text!r} over {sent.bot}, which serves {served}")
        known = sent.client_id in self.taken
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

    async def get(self, key: str) -> Entry | None:
        if not self._hold.up.is_set():
            raise Temporary("bus_down")
        return await super().get(key)


class Replica:
    """One that owns all shards, or owned them; or, "split", one for each sandbox, which fare alike."""

    def __init__(self, model: Model, number: int) -> None:
        self.life, world = Life(), model.world
        self._model = model
        parts = [mortal(world, number, self.life) for _ in range(len(SANDBOXES) if model.settings["split"] else 1)]
        self.benches = {name: parts[at % len(parts)] for at, name in enumerate(SANDBOXES)}
        self.open()

    def open(self) -> None:
        """Owns all shards from now on, perhaps again."""
        settings = self._model.settings
        rules = {name: settings[name] for name in ("sends", "merge_chars")}
        self.shards: dict[int, Shard] = {}
        for bench in self.benches.values():
            bench.leases.has_lease = True
            bench.leases.owned = {shard_of(name) for name, one in self.benches.items() if one is bench}
        for name, bench in self.benches.items():
            self.shards[shard_of(name)] = bench.shard(name, **rules)

    def lose(self) -> None:
        for bench in self.benches.values():
            bench.leases.has_lease = False
            bench.leases.owned.clear()
        for shard in self.shards.values():
            shard.stop()


class Model:
    """The world of one schedule."""

    def __init__(self, settings: dict[str, int]) -> None:
        self.settings = settings
        self.world = Bench()
        self.world.chat = self.chat = Phone(self.world.clock)
        self.chat.took_s = settings["took_ms"] / 1000
        self.chat.bound = self.world.bindings.get

        def moved(bot: str, before: Binding | None, after: Binding | None) -> None:
            if before is None or after is None or before.sandbox != after.sandbox:
                self.chat.moved_at[bot] = self._now()

        self.world.bindings.add_listener(moved)
        self.hold = Hold()
        self.world.conversation_bucket = Bucket(self.hold)
        self.world.bus.on_publish = self.hold.wait
        self.told: list[Told] = []
        self.commands: dict[int, FakeDelivery] = {}
        self.delivered: set[int] = set()
        self.binding = asyncio.Lock()
        self.bots = {user: f"{user}b0@im.bot" for user in USERS}
        self.tokens = 0
        self.wrote: dict[str, list[int]] = defaultdict(list)
        self.deaths = 0
        self.unsaved = 0
        """How often a replica ended while nobody could write down what it knew."""
        self.ever = set(self.bots.values())
        """Bots that were bound at some time."""
        self.forgot = 0
        """How often a bot was bound again whose user nobody knew any more."""
        self.replicas = 0
        self.retired: list[Replica] = []
        self.later: set[asyncio.Task[None]] = set()
        self.owner = self._replica()

    def _replica(self) -> Replica:
        self.replicas += 1
        return Replica(self, self.replicas)

    async def begin(self) -> None:
        for user in USERS:
            await self.world.bind(bot=self.bots[user], user=f"{user}@im.wechat")
        await self.take_over(self.owner)

    def call_later(self, seconds: float, then: Callable[[], object]) -> None:
        async def wait() -> None:
            await asyncio.sleep(seconds)
            if inspect.isawaitable(under_way := then()):
                await under_way

        self.later.add(asyncio.get_running_loop().create_task(wait()))

    # the bus

    async def take_over(self, owner: Replica) -> None:
        self.owner = owner
        for sandbox in SANDBOXES:
            self.call_later(0.0, partial(self._fold, sandbox))
        await self.reset()

    async def reset(self) -> None:
        """As the consumers do it: all that is not acknowledged comes, in order."""
        for stored in self.world.bus.found("OUT"):
            self._deliver(self.commands[stored.seq])

    def _deliver(self, command: FakeDelivery) -> None:
        redelivered = command.seq in self.delivered
        self.delivered.add(command.seq)
        again = Command(self.world.bus, command, redelivered=redelivered, life=self.owner.life)
        self.owner.shards[int(command.subject.split(".")[2])].on_delivery(again)

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
        bound = self.world.bindings.of_sandbox(sandbox)
        if to == "user" and KNOWN and not any(one.user == f"{user}@im.wechat" for one in bound):
            to = "bot"
        if to == "nobody" and KNOWN and not (len(bound) == 1 and bound[0].bot == self.bots[user]):
            to = "bot"
        texts = [f"@{sandbox}.{user}.{number}.{part}" for part in range(parts)]
        body = {"text": texts[0]} if parts == 1 else {"items": [{"kind": "text", "text": text} for text in texts]}
        name = f"c{sandbox}{user}{ident}"
        whom = {"user": f"{user}@im.wechat"} if to == "user" else {"bot": self.bots[user]} if to == "bot" else {}
        alone = [binding.user for binding in self.world.bindings.of_sandbox(sandbox)]
        meant = f"{user}@im.wechat" if whom else alone[0] if len(alone) == 1 and not KNOWN else ""
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
        bot, replica = self.bots[user], self.owner
        binding = self.world.bindings.get(bot)
        if binding is None:
            return
        bench = replica.benches[binding.sandbox]
        if not bench.leases.is_valid or not self.hold.up.is_set():
            return
        await asyncio.sleep(0.001)
        name = f"{user}@im.wechat"
        async with self.binding:
            if not binding.user:
                await self._replace(binding.sandbox, bot, name)
                await self.world.bindings.update(bot, lambda now: msgspec.structs.replace(now, user=name))
        self.wrote[bot].append(len(self.chat.sent))
        self._publish(binding, name)
        await self._fold(binding.sandbox)

    def _publish(self, binding: Binding, user: str) -> None:
        """A message of the user in the inbox of their sandbox."""
        now_ms, bot, sandbox = self.world.clock.now_ms(), binding.bot, binding.sandbox
        ident = f"{sandbox}.in:{now_ms}"
        head = {"id": f"in:{now_ms}", "user": user, "sent_at_ms": now_ms, "received_at_ms": now_ms}
        sealed = seal(self.world.sealer, ident, bot, sandbox, Sealed("AARz"))
        headers = {H_MSG_ID: ident, H_BOT: bot, H_SEALED: sealed}
        self.world.bus.put(self.world.names.inbox(sandbox), msgspec.json.encode(head), headers)

    async def _fold(self, sandbox: str) -> None:
        """What a poller does that takes its bot: open conversations get what the inbox has. The others fold for
        themselves."""
        owner = self.owner
        while owner is self.owner:
            try:
                await owner.shards[shard_of(sandbox)].folds.prints_of(sandbox, "", 0)
            except Temporary:
                await asyncio.sleep(1.0)
            else:
                return

    async def answers(self, *, user: str, answers: Sequence[str]) -> None:
        script = self.chat.sends_to.setdefault(f"{user}@im.wechat", deque())
        script.extend(ANSWERS[answer](self.world.clock.now_ms() + n) for n, answer in enumerate(answers))

    async def sleep(self, *, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def bind(self, *, user: str, sandbox: str, anew: bool, named: bool) -> None:
        """As control does it: with a new token, or a new bot of the user; here or in another sandbox."""
        self.tokens += 1
        async with self.binding:
            bot, name = self.bots[user], f"{user}@im.wechat"
            before = self.world.bindings.get(bot)
            if KNOWN and before is not None and before.sandbox != sandbox and self._sending():
                anew = False  # of the first sandbox something may be out
            if anew:
                bot = self.bots[user] = f"{user}b{self.tokens}@im.bot"
                if before is not None and before.sandbox != sandbox:
                    await self._remove(before.bot)  # the platform cleans up: WeChat has killed it
            if KNOWN:
                bound = list(self.world.bindings)
                named = named or any((one.user, one.sandbox) == (name, sandbox) and one.bot != bot for one in bound)
                for one in bound:
                    if not one.user and one.bot.startswith(user):
                        await self._remove(one.bot)
            known = name if named or (before and before.sandbox == sandbox and not anew) else ""
            self.forgot += not known and bot in self.ever
            self.ever.add(bot)
            await self.world.bind(sandbox, bot, known, token=f"{bot}:{self.tokens}")
            if before is not None and before.bot == bot and before.sandbox != sandbox:
                await self._publish_unbound(before)
            if known:
                await self._replace(sandbox, bot, name)

    def _sending(self) -> bool:
        """Whether something is half sent, or may have been."""
        return any(record.head is not None for record in self.world.records().values())

    async def _replace(self, sandbox: str, bot: str, user: str) -> None:
        for other in self.world.bindings.of_sandbox(sandbox):
            if other.user == user and other.bot != bot:
                await self._remove(other.bot)

    async def _remove(self, bot: str) -> None:
        if binding := self.world.bindings.get(bot):
            await self._publish_unbound(binding)
            await self.world.bindings.remove(bot)

    async def _publish_unbound(self, binding: Binding) -> None:
        event = BindingEvent(sandbox=binding.sandbox, bot=binding.bot, user=binding.user, change="unbound")
        await self.world.events.publish_binding_event(event)

    async def unbind(self, *, user: str) -> None:
        async with self.binding:
            await self._remove(self.bots[user])

    async def login(self, *, user: str, alive: bool) -> None:
        state: Any = "active" if alive else "needs_login"
        await self.world.bindings.update(self.bots[user], lambda now: msgspec.structs.replace(now, state=state))

    async def stale(self, *, user: str, seconds: float) -> None:
        bot, replica = self.bots[user], self.owner
        for bench in replica.benches.values():
            bench.stale.add(bot)
            bench.replica.sessions.changed.notify_all()

        def over() -> None:
            for bench in replica.benches.values():
                bench.stale.discard(bot)
            binding = self.world.bindings.get(bot)
            if binding is not None and replica is self.owner:
                replica.shards[shard_of(binding.sandbox)].on_binding(binding.sandbox, bot, {binding.user})

        self.call_later(seconds, over)

    async def lease(self, *, user: str, seconds: float) -> None:
        benches = self.owner.benches.values()
        for bench in benches:
            bench.leases.has_lease = False

        def back() -> None:
            for bench in benches:
                bench.leases.has_lease = bool(bench.leases.owned)

        self.call_later(seconds, back)

    async def bus(self, *, seconds: float) -> None:
        self.hold.up.clear()
        self.call_later(seconds, self.hold.up.set)

    async def reads(self, *, times: int) -> None:
        self.world.bus.unreadable += times

    async def late_ack(self) -> None:
        self.world.conversation_bucket.answers_lost += 1

    async def die(self) -> None:
        dead = self.owner
        dead.life.stop()
        dead.lose()
        self.deaths += 1
        # what was asked and not heard, or heard and not written down
        self.chat.unanswered |= {sent.client_id for sent in self.chat.sent if sent.at_s > self._now() - 120}
        await asyncio.sleep(4)
        await self.take_over(self._replica())

    async def drain(self, *, again: bool) -> None:
        before, was_away = self.owner, not self.hold.up.is_set()
        was_away |= not all(bench.leases.is_valid for bench in before.benches.values())
        await asyncio.gather(*(shard.drain(20.0) for shard in before.shards.values()))
        if was_away or not self.hold.up.is_set():  # nobody could write down what was heard
            self.unsaved += 1
            self.chat.unanswered |= {sent.client_id for sent in self.chat.sent if sent.at_s > self._now() - 60}
        before.lose()
        if again and self.retired:
            heir = self.retired.pop()
            heir.open()
        else:
            heir = self._replica()
        self.retired.append(before)
        await self.take_over(heir)

    def _now(self) -> float:
        return self.world.clock.monotonic()

    # the end

    async def settle(self) -> None:
        """All is well again, and the users write until nothing waits."""
        await asyncio.sleep(60)
        self.hold.up.set()
        self.world.bus.unreadable = self.world.conversation_bucket.answers_lost = 0
        self.chat.sends_to.clear()
        for bench in self.owner.benches.values():
            bench.leases.has_lease = True
            bench.stale.clear()
        for binding in list(self.world.bindings):
            if binding.state != "active":
                await self.world.bind(binding.sandbox, binding.bot, binding.user, token=f"{binding.bot}:last")
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
    for number, shard in model.owner.shards.items():
        if depth := shard.queue_depths(Counter())[0]:
            left.append(f"shard {number} has {depth} in flight")
        left += [f"{each.sandbox} {each.user}: {len(each.queue)} queued" for each in shard if each.queue]
        if shard.tasks:
            left.append(f"shard {number} has {shard.tasks} tasks")
    return left


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
        to_both = KNOWN and model.deaths and not one.user  # it has no address, and the sandbox another user by then
        if max(times) > 1 and not to_both:
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
                    if min(times) > 0 and not to_both:
                        wrong.append(f"{one.ident} is {receipt.outcome} ({receipt.reason}), and was shown {times}")
            known = {ident for piece in one.pieces for ident in ids[piece]} - {None}
            waited = KNOWN and receipt.bot and one.user and receipt.bot[:2] != one.user[:2]  # at another user's bot
            if not silent and not waited and set(receipt.message_ids) != known:
                wrong.append(f"{one.ident} is {receipt.outcome} and names {receipt.message_ids} of {known}")
    return wrong


def an_id_is_sent_once(model: Model) -> list[str]:
    finals = model.finals()
    times: Counter[str] = Counter()
    for found in finals.values():
        sent = ("accepted", "accepted_unconfirmed")
        times.update(receipt.command for receipt in found if receipt.outcome in sent and not receipt.repeat_of)
    names = {one.ident for one in model.told if one.pieces}
    return [f"{ident} was accepted {count} times" for ident, count in times.items() if count > 1 and ident in names]


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
            if mixed and not (KNOWN and model.forgot):
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
