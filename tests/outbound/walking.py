"""Small stories about one partition, in which its owner is killed at a point of its own: each call of bus, bucket,
iLink and CDN has two, one before it has any effect and one after, when the answer is not heard.

Time is virtual, and every run is the same up to its first kill. So a story is told once to count the points, then
once for each of them; the next owner takes over a few seconds later.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import msgspec
import structlog

from adapter.bridge.entries import Clear, Entry, OpenedWindow, Secrets, clear_of, encode_entry
from adapter.contract.messages import FINAL_OUTCOMES, Receipt
from adapter.contract.names import H_MSG_ID, H_ORIGINAL, Names, stream_of
from adapter.contract.records import Binding
from adapter.errors import Temporary, Uncertain
from adapter.ports import Accepted
from tests.fakes import WINDOW, Bench, FakeBus, FakeChat, FakeClock, FakeDelivery, Life, Sent, VirtualLoop
from tests.fakes.mortal import Command, mortal
from tests.outbound.partitions import BOT, USER, free_slots
from tests.outbound.test_router import router

SANDBOX = "s1"
TAKEN_OVER_S = 4.0
"""From the death of an owner until the next one has its partitions."""
RESET_S = 5.0
"""From a failure of the bus until the consumers are reset."""
THAWED_S = 10.0
"""From the moment at which a replica is stopped until it goes on, its partitions being another's."""
NOTICED_S = 0.5
"""Until it has noticed that."""
MOST_REQUESTS = 20
"""More no story takes, however its owners end."""
PATIENCE_S = 80 * 3600
"""No command waits so long."""
ERASED = "erased"
"""Instead of an outcome: nothing is left of the command."""
PIECE = re.compile(r"@(\w+)\.(\d+)")
"""A part of a command in what iLink gets: the command's name and the part's number."""

Step: TypeAlias = Callable[["Walk"], Awaitable[object]]


class Story(NamedTuple):
    """What happens, and how its commands end."""

    steps: Sequence[Step]
    ends: Mapping[str, str]
    """The final outcome of each command, by its name, where nobody is killed; with its reason, where that matters."""
    killed: Mapping[str, str] = {}
    """What else it may be where somebody is: several outcomes by spaces."""
    given: Mapping[str, str] = {}
    """What else it may be where the partition is given away meanwhile."""
    settings: Mapping[str, Any] = {}
    """Of sending."""
    unreadable: int = 0
    """So many reads fail when an owner takes over."""
    bound: Sequence[str] | None = None
    """The bots that are bound at the end; None: it does not matter."""
    is_erased: bool = False
    """Nothing tells of USER any more."""


class Point(NamedTuple):
    """Where the owners of a story end: the n-th owner at its `at[n]`-th point, those behind them never."""

    at: tuple[int, ...] = ()
    is_frozen: bool = False
    """The first one is only stopped, and goes on after the next one has taken over."""
    is_failing: bool = False
    """Nobody ends: that call fails, before it has any effect, or after it, when its answer gets lost."""
    is_giving: bool = False
    """The owner gives its partition away then, and what is out goes on."""


class Mark(Life):
    """A life that ends at a point of its own."""

    def __init__(self, at: int, on_point: Callable[[str, bool], None]) -> None:
        super().__init__()
        self.passed = 0
        self._at = at
        self._on_point = on_point

    async def passes(self, call: str, *, is_done: bool) -> None:
        self.passed += 1
        if self.passed == self._at:
            self._on_point(call, is_done)
        await self.goes_on()


class Phone(FakeChat):
    """iLink, which remembers its answers by client_id."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.answered: dict[str, list[str | None]] = defaultdict(list)
        """The message ids that it has answered."""
        self.arrived: Counter[str] = Counter()
        """Requests that it took, or may have taken."""
        self.accepted_at: dict[str, float] = {}
        """When the first request that it accepted began."""
        self.scripts: dict[str, list[Accepted | Exception]] = defaultdict(list)
        """Answers to the next requests that begin with a part of a command."""

    async def _send(self, sent: Sent) -> Accepted:
        first = PIECE.search(sent.text)
        if first and (script := self.scripts[first[0]]):
            self.sends.append(script.pop(0))
        elif self.notify_fails is not None:
            self.sends.append(self.notify_fails)
        try:
            answer = await super()._send(sent)
        except (Uncertain, asyncio.CancelledError):
            self.arrived[sent.client_id] += 1
            raise
        self.arrived[sent.client_id] += 1
        self.answered[sent.client_id].append(answer.message_id)
        self.accepted_at.setdefault(sent.client_id, sent.at_s)
        return answer


class Bus(FakeBus):
    """The streams. Owners are told of each command."""

    def __init__(self, names: Names, clock: FakeClock, on_command: Callable[[], None]) -> None:
        super().__init__(names, clock)
        self._on_command = on_command

    def put(self, subject: str, payload: bytes, headers: dict[str, str], label: str = "") -> int:
        seq = super().put(subject, payload, headers, label)
        if stream_of(subject) == self._names.stream_out:
            asyncio.get_running_loop().call_soon(self._on_command)
        return seq


class Owner:
    """A replica that owns the partitions from now on."""

    def __init__(self, walk: Walk, number: int, at: int, left: Sequence[Owner]) -> None:
        """`left`: who may still send."""
        self._walk = walk
        self.life = Mark(at, self._on_point)
        self.bench = mortal(walk.world, number, self.life)
        names = [owner.bench.presence.replica for owner in left]
        self.partition = self.bench.partition(SANDBOX, names, **walk.story.settings)
        self._router = router(self.bench)
        self.began_at = walk.world.clock.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._look_after_shard()
        self._seen = 0
        self._is_open = False
        self._old_to = max((stored.seq for stored in walk.world.bus.found("OUT")), default=0)
        self.spawn(self._open())
        if left:
            self.spawn(self._wait_for(left))

    async def _wait_for(self, left: Sequence[Owner]) -> None:
        await self.bench.speak()
        await self.partition.handover.run()
        for owner in (self, *left):
            owner.bench.rest()

    async def _open(self) -> None:
        """As before the consumers start: what comes again may belong to whom a record names."""
        while True:
            try:
                await self.partition.open()
                break
            except Temporary:
                await asyncio.sleep(0.2)
        self._is_open = True
        self.deliver()

    def _look_after_shard(self) -> None:
        """As the health monitor does."""
        if self.life.is_going and not self.partition.is_draining:
            self.partition.evict_idle()
            asyncio.get_running_loop().call_later(30, self._look_after_shard)

    def deliver(self, *, again: bool = False) -> None:
        """What the consumers bring: what they have not brought yet, or all that is not acknowledged."""
        if not (self.life.is_going and self._is_open):
            return
        for stored in self._walk.world.bus.found("OUT"):
            if stored.seq > self._seen or again:
                self._seen = max(self._seen, stored.seq)
                self._deliver(
                    FakeDelivery(
                        stored.subject,
                        stored.data,
                        seq=stored.seq,
                        time_ms=stored.time_ms,
                        headers=dict(stored.headers),
                    )
                )

    def _deliver(self, stored: FakeDelivery) -> None:
        known = stored.seq in self._walk.delivered or stored.seq <= self._old_to
        self._walk.delivered.add(stored.seq)
        command = Command(self._walk.world.bus, stored, redelivered=known, life=self.life)
        if stored.subject == "wechat.out":
            self._router.on_delivery(command)
        else:
            self.bench.deliver(command)

    async def hears(self, bot: str) -> None:
        """What its poller does once the message is in the inbox."""
        while self.bench.bindings.get(bot):
            try:
                return await (await self.bench.person(bot)).read_newest()
            except Temporary:
                await asyncio.sleep(1)

    def spawn(self, work: Any) -> None:
        self._tasks.add(asyncio.get_running_loop().create_task(work))

    async def give(self) -> None:
        self._is_open = False
        self._router.stop()
        self.bench.leases.on_released = lambda _: self._walk.take_over(self)
        await self.bench.give(sandbox=SANDBOX)

    def _on_point(self, call: str, is_done: bool) -> None:
        """A call begins, or is done, and is the one: raises, ends the replica, or has it give its partition away."""
        if self._walk.point.is_giving:
            return self.spawn(self.give())
        if not self._walk.point.is_failing:
            self.life.stop()
            asyncio.get_running_loop().call_soon(self._walk.on_death, self)
            return
        self._walk.call_later(RESET_S, lambda: self.deliver(again=True))
        if call == "send" and is_done:
            self._walk.phone.accepted_at.clear()
            raise Uncertain("timeout", "no answer")
        raise Temporary("network" if call in ("send", "upload", "notify") else "bus_down")

    def lose(self) -> None:
        """The lease is another's."""
        self.bench.leases.has_lease = False
        self.bench.leases.owned.clear()

    def end(self) -> None:
        self.partition.stop()
        self._router.stop()
        for task in self._tasks:
            task.cancel()


class Told(NamedTuple):
    """A command, as it was stored."""

    name: str
    seq: int
    user: str
    """Whom it is for."""
    parts: int


class Walked(NamedTuple):
    """What a run has come to."""

    passed: list[int]
    """How many points each owner passed."""
    faults: list[str]
    """What does not hold at the end."""
    changes: Sequence[tuple[str, str]]
    """The events about bindings, in order: bot and change."""


class Walk:
    """One run of a story."""

    def __init__(self, story: Story, point: Point) -> None:
        self.story = story
        self.point = point
        self.world = Bench()
        self.world.bus = Bus(self.world.names, self.world.clock, self.on_command)
        self.world.chat = self.phone = Phone(self.world.clock)
        self.told: list[Told] = []
        self.delivered: set[int] = set()
        self.numbers = 0
        self.owners: list[Owner] = []
        self.wrote: dict[str, list[int]] = defaultdict(list)
        """How many requests there had been when a user wrote."""
        self.controls: dict[int, str] = {}
        """Binds and unbinds: the verb, by sequence."""
        self.closed_at: dict[str, float] = {}
        """When a bot was unbound."""
        self.persons: set[str] = set()
        """All who were bound, by the keys of their records."""
        self.world.bindings.add_listener(self._on_binding)
        self._later: set[asyncio.Task[None]] = set()

    @property
    def owner(self) -> Owner | None:
        """Who owns the partitions now."""
        return self.owners[-1] if self.owners and self.owners[-1].life.is_going else None

    def _on_binding(self, bot: str, before: Binding | None, after: Binding | None) -> None:
        if after is None:
            self.closed_at[bot] = self.world.clock.monotonic()
        else:
            self.closed_at.pop(bot, None)
            self.persons.add(after.key.key)

    async def run(self) -> None:
        await self.world.bind()
        self.take_over()
        for step in self.story.steps:
            await step(self)
        waited_s = pause_s = 5.0
        while (self.world.bus.found("OUT") or self.owner is None) and waited_s < PATIENCE_S:
            await asyncio.sleep(pause_s)
            waited_s += pause_s
            pause_s *= 1.3
        await asyncio.sleep(400)  # what should not happen has time to
        for done in self._later:
            done.result()

    # owners

    def take_over(self, *left: Owner) -> None:
        number = len(self.owners)
        self.world.bus.unreadable = self.story.unreadable if number else 0
        at = self.point.at[number] if number < len(self.point.at) else 0
        self.owners.append(Owner(self, number + 1, at, left))

    def on_death(self, owner: Owner) -> None:
        owner.lose()
        if self.point.is_frozen:
            self.call_later(THAWED_S, owner.life.go_on)
            self.call_later(THAWED_S + NOTICED_S, owner.end)
        else:
            owner.end()
        self.call_later(TAKEN_OVER_S, self.take_over)

    def call_later(self, seconds: float, then: Callable[[], object]) -> None:
        async def wait() -> None:
            await asyncio.sleep(seconds)
            then()

        self._later.add(asyncio.get_running_loop().create_task(wait()))

    # the bus

    def store(self, name: str, subject: str, body: Mapping[str, Any], *, user: str, parts: int) -> None:
        seq = self.world.bus.put(subject, msgspec.json.encode(body), {})
        self.told.append(Told(name, seq, user, parts))

    async def control(self, verb: str, **body: Any) -> None:
        """Says a bind, unbind or erase, and waits until it is done."""
        seq = self.world.bus.put(f"wechat.{verb}.{SANDBOX}", msgspec.json.encode(body), {})
        self.controls[seq] = verb
        while any(stored.seq == seq for stored in self.world.bus.found("OUT")):
            await asyncio.sleep(0.1)

    def on_command(self) -> None:
        if owner := self.owner:
            owner.deliver()

    def say(self, bot: str, user: str) -> None:
        """A message of the user is in the inbox, and the owner, if there is one, has it from its poller."""
        self.numbers += 1
        self.wrote[user].append(len(self.phone.sent))
        now_ms, ident = self.world.clock.now_ms(), f"in:{self.numbers}"
        binding = self.world.bindings.get(bot)
        if binding is None:
            return
        subject = self.world.names.inbox(SANDBOX, binding.person)
        entry = Entry(since=binding.since, user=user, bot=bot, window=OpenedWindow(ident, now_ms, now_ms))
        self.world.bus.put(subject, encode_entry(entry, Secrets("AARz"), subject, self.world.sealer), {})
        if owner := self.owner:
            owner.spawn(owner.hears(bot))


# steps ---------------------------------------------------------------------------------------------------


def command(name: str, *, to: str = USER, parts: int = 1, **fields: Any) -> Step:
    """A command; bare unless `fields` name somebody. `to`: whom it is for."""

    async def step(walk: Walk) -> None:
        text = "\n\n".join(f"@{name}.{part}" + " x" * 700 * (parts > 1) for part in range(parts))
        body = {"id": name, **fields} if {"items", "typing"} & set(fields) else {"id": name, "text": text, **fields}
        count = 0 if "typing" in fields else 2 if "items" in fields else parts
        walk.store(name, f"wechat.out.{SANDBOX}", body, user=to, parts=count)

    return step


def media(name: str, **fields: Any) -> Step:
    """A file with a caption: two parts."""
    data = base64.b64encode(f"bytes of {name}".encode()).decode()
    return command(
        name, items=[{"kind": "file", "name": f"@{name}.1.bin", "data": data, "caption": f"@{name}.0"}], **fields
    )


def plain(name: str) -> Step:
    """A command on plain wechat.out."""

    async def step(walk: Walk) -> None:
        walk.store(name, "wechat.out", {"id": name, "sandbox": SANDBOX, "text": f"@{name}.0"}, user=USER, parts=1)

    return step


def pause(seconds: float) -> Step:
    return lambda _: asyncio.sleep(seconds)


def writes(*, bot: str = BOT, user: str = USER) -> Step:
    """The user writes to the bot, which tells who they are."""

    async def step(walk: Walk) -> None:
        binding = walk.world.bindings.get(bot)
        if binding and not binding.user:
            await walk.world.bindings.update(bot, lambda now: msgspec.structs.replace(now, user=user))
        walk.say(bot, user)

    return step


def bind(bot: str = BOT, user: str = USER) -> Step:
    """A bind with another token; the user's former bot goes."""

    async def step(walk: Walk) -> None:
        walk.numbers += 1
        walk.phone.notify_fails, walk.phone.poll_is_stale = None, False
        if walk.owner:
            walk.owner.bench.stale.discard(bot)
        await walk.control("bind", bot=bot, bot_token=f"{bot}:{walk.numbers}", user=user)

    return step


def unbind(bot: str = BOT) -> Step:
    return lambda walk: walk.control("unbind", bot=bot)


def erase(user: str = USER) -> Step:
    return lambda walk: walk.control("erase", user=user)


def together(*steps: Step) -> Step:
    """They are said at once, before the first one is applied."""

    async def step(walk: Walk) -> None:
        await asyncio.gather(*(each(walk) for each in steps))

    return step


def answers(name: str, *script: Accepted | Exception, part: int = 0) -> Step:
    """What iLink answers to the next requests that begin with this part of a command."""

    async def step(walk: Walk) -> None:
        walk.phone.scripts[f"@{name}.{part}"].extend(script)

    return step


def session(dead: Exception | None) -> Step:
    """What `notifystart` and polls say of the token."""

    async def step(walk: Walk) -> None:
        walk.phone.notify_fails, walk.phone.poll_is_stale = dead, dead is not None

    return step


def slow(seconds: float) -> Step:
    """How long each send takes from now on."""

    async def step(walk: Walk) -> None:
        walk.phone.took_s = seconds

    return step


def slow_store(seconds: float) -> Step:
    """How long each write of a record takes from now on."""

    async def step(walk: Walk) -> None:
        walk.world.person_bucket.on_write = lambda _: asyncio.sleep(seconds)

    return step


def again() -> Step:
    """The consumer is reset: what is not acknowledged comes once more."""

    async def step(walk: Walk) -> None:
        if walk.owner:
            walk.owner.deliver(again=True)

    return step


def copy_again() -> Step:
    """The router ended before it acknowledged the originals, and the server has forgotten the ids of the copies."""

    async def step(walk: Walk) -> None:
        for stored in walk.world.bus.found("OUT"):
            if H_ORIGINAL in stored.headers:
                headers = {name: value for name, value in stored.headers.items() if name != H_MSG_ID}
                walk.world.bus.put(stored.subject, stored.data, headers)

    return step


# what must hold ------------------------------------------------------------------------------------------


def pieces(walk: Walk, sent: Sent) -> list[tuple[str, int]]:
    """What a request holds: names of commands and numbers of their parts."""
    text = sent.text
    if sent.media is not None:
        text = walk.world.cdn.uploads[int(sent.media.reference.removeprefix("ref")) - 1].name
    return [(name, int(part)) for name, part in PIECE.findall(text)]


def finals(walk: Walk) -> dict[str, list[Receipt]]:
    """The final receipts of each command."""
    names = {told.seq: told.name for told in walk.told}
    found: dict[str, list[Receipt]] = {told.name: [] for told in walk.told}
    for receipt in walk.world.bus.receipts():
        if receipt.outcome in FINAL_OUTCOMES:
            found[names[receipt.sequence]].append(receipt)
    return found


def faults(walk: Walk) -> Iterator[str]:
    """What does not hold at the end of a run."""
    story, phone = walk.story, walk.phone
    is_given = walk.point.is_giving
    is_killed = not is_given and (len(walk.owners) > 1 or walk.point.is_failing)
    is_killed_again = len(walk.owners) > 2
    shown: dict[tuple[str, int], set[str]] = defaultdict(set)
    asked: dict[tuple[str, int], set[str]] = defaultdict(set)
    for sent in phone.sent:
        for piece in pieces(walk, sent):
            asked[piece].add(sent.client_id)
    for sent in phone.taken.values():
        for piece in pieces(walk, sent):
            shown[piece].add(sent.client_id)
    person = {told.name: told.user for told in walk.told}

    if left := walk.world.bus.found("OUT"):
        yield f"{[stored.seq for stored in left]} are left unacknowledged"
    if phone.overlaps:
        yield f"{phone.overlaps} requests of one user at once"
    assert walk.owner is not None
    if (slots := free_slots(walk.owner.bench)) != 8:
        yield f"{slots} slots of 8 are free"
    for piece, clients in shown.items():
        if len(clients) > 1:
            yield f"{piece} was taken under {len(clients)} client_ids"
    for client, times in phone.arrived.items():
        if times > 2:
            yield f"{client} was asked {times} times"
    for sent in phone.sent:
        since = phone.accepted_at.get(sent.client_id, sent.at_s)
        if sent.at_s > since and not any(since < owner.began_at <= sent.at_s for owner in walk.owners):
            yield f"{sent.client_id} was asked again by who had an answer"
        yield from (f"{piece} went to {sent.user}" for piece in pieces(walk, sent) if person[piece[0]] != sent.user)
        if sent.at_s > walk.closed_at.get(sent.bot, sent.at_s):
            yield f"{sent.text[:8]!r} left after its bot was closed"
    if len(phone.sent) > MOST_REQUESTS:
        yield f"{len(phone.sent)} requests"
    order = [told.name for told in walk.told]
    for user in set(person.values()):
        got = [
            (order.index(name), part)
            for sent in phone.taken.values()
            if sent.user == user
            for name, part in pieces(walk, sent)
        ]
        if any(before > after for before, after in pairwise(got)):
            yield f"{user} got {got}"
        at = [number for number, sent in enumerate(phone.sent) if phone.taken.get(sent.client_id) is sent]
        for begin, end in pairwise([*walk.wrote[user], len(phone.sent)]):
            count = sum(begin <= one < end and phone.sent[one].user == user for one in at)
            if count > story.settings.get("sends", WINDOW.sends):
                yield f"{user} got {count} messages in one window"

    bound = sorted(binding.bot for binding in walk.world.bindings)
    if story.bound is not None and bound != sorted(story.bound):
        yield f"{bound} are bound"
    for seq, verb in walk.controls.items():
        outcomes = [each.outcome for each in walk.world.bus.receipts(verb) if each.sequence == seq]
        if outcomes != ["applied"]:
            yield f"{verb} {seq} has the receipts {outcomes}"
    yield from _left(walk)
    ended = finals(walk)
    for told in walk.told:
        if story.ends[told.name] == ERASED and not ended[told.name]:
            continue
        if len(found := ended[told.name]) != 1:
            yield f"{told.name} has {len(found)} final receipts: {[one.outcome for one in found]}"
            continue
        (receipt,) = found
        of_subject = [one.outcome for one in walk.world.bus.receipts() if one.sequence == told.seq]
        if of_subject[-1] == "parked":
            yield f"{told.name} is parked after its end"
        if of_subject.count("parked") > len(walk.owners):
            yield f"{told.name} is told as parked {of_subject.count('parked')} times"
        allowed = [story.ends[told.name]]
        allowed += story.killed.get(told.name, "").split() if is_killed else []
        allowed += story.given.get(told.name, "").split() if is_given else []
        allowed += ["uncertain"] if is_killed_again or (is_killed and walk.point.is_frozen) else []
        if not {receipt.outcome, f"{receipt.outcome}/{receipt.reason}"} & set(allowed):
            yield f"{told.name} is {receipt.outcome} {receipt.reason} ({receipt.detail}), not {allowed}"
        yield from _lies(walk, told, receipt, shown, asked, ended)


def _left(walk: Walk) -> Iterator[str]:
    """What is left of persons whose time has ended, and should not be."""
    world = walk.world
    served = {binding.key.key: binding.since for binding in world.bindings}
    newest: dict[str, Clear] = {}
    for stored in world.bus.found("IN"):
        key, about = stored.subject.split(".", 2)[2], clear_of(stored.data)
        newest[key] = about
        if not about.ended and about.since != served.get(key):
            yield f"an entry of {key} since {about.since} is left"
    for key in sorted(walk.persons - served.keys()):
        if not newest.get(key, Clear()).ended:
            yield f"nothing keeps late entries of {key} out"
    for key, entry in world.person_bucket.entries.items():
        if entry.value is not None and clear_of(entry.value).since != served.get(key):
            yield f"the record of {key} is left"
    if walk.story.is_erased:
        for kept in world.bus.kept:
            if USER.encode() in kept.stored.data + str(kept.stored.headers).encode():
                yield f"{kept.stored.subject} tells of who was erased"


def _lies(
    walk: Walk,
    told: Told,
    receipt: Receipt,
    shown: Mapping[tuple[str, int], set[str]],
    asked: Mapping[tuple[str, int], set[str]],
    ended: Mapping[str, list[Receipt]],
) -> Iterator[str]:
    """What a receipt says that is not so."""
    parts = [(told.name, part) for part in range(told.parts)]
    if receipt.repeat_of:
        first = ended[next(one.name for one in walk.told if one.seq == receipt.repeat_of)]
        if [(one.outcome, one.message_ids) for one in first] != [(receipt.outcome, receipt.message_ids)]:
            yield f"{told.name} has another end than what it repeats"
        if any(asked[piece] for piece in parts):
            yield f"{told.name} repeats another one, and was sent"
        return
    on_phone = [piece for piece in parts if shown[piece]]
    match receipt.outcome:
        case "accepted" | "accepted_unconfirmed" if len(on_phone) < told.parts:
            yield f"{told.name} is accepted, and iLink has {on_phone}"
        case "refused" | "dead_lettered" if parts and len(on_phone) == told.parts:
            yield f"{told.name} is {receipt.outcome} ({receipt.reason}), and iLink has it"
        case "uncertain" if len(walk.owners) == 1 and not any(asked[piece] for piece in parts):
            yield f"{told.name} is uncertain, and nobody asked iLink"
    answered = [{ident for client in shown[piece] for ident in walk.phone.answered[client]} for piece in parts]
    if receipt.outcome == "accepted" and len(receipt.message_ids) != told.parts:
        yield f"{told.name} has {told.parts} parts, and message ids {receipt.message_ids}"
    for ident, of_part in zip(receipt.message_ids, answered, strict=False):
        if ident not in of_part:
            yield f"{told.name} names {ident}, and iLink said {of_part}"


@contextmanager
def crashes() -> Iterator[list[str]]:
    """What the code says of bugs; nothing else that it logs is written, which would take half of the time."""
    found: list[str] = []

    def keep(_: object, __: str, line: MutableMapping[str, Any]) -> Any:
        found.append(f"logged: {line['event']} {sys.exc_info()[1]!r}")
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[keep], wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield found
    structlog.configure(**before)


def walk_to(story: Story, point: Point) -> Walked:
    """One run of a story, up to its end."""

    async def happen() -> Walked:
        walk = Walk(story, point)
        await walk.run()
        changes = [(event.bot, event.change) for event in walk.world.bus.events()]
        return Walked([owner.life.passed for owner in walk.owners], list(faults(walk)), changes)

    with crashes() as logged, asyncio.Runner(loop_factory=VirtualLoop) as runner:
        walked = runner.run(happen())
    return walked._replace(faults=walked.faults + logged)
