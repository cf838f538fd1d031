"""A small world around `rules.step`: the bus, iLink's phone and crashes, as a state that can be explored.

The world holds what survives an owner (the stored record, the receipts, what is not acknowledged) and what does not
(the conversation in memory, the effects that are left to carry out). Its moves are everything that may happen next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import msgspec

from adapter.contract import FINAL_OUTCOMES
from adapter.conversation import rules
from adapter.conversation.commands import Part
from adapter.conversation.record import CommandRef, ConversationRecord
from adapter.conversation.rules import (
    Activity,
    Bot,
    CommandResult,
    Conversation,
    QueuedCommand,
    SendPolicy,
)
from adapter.conversation.window import WindowPolicy

HOUR_MS = 3_600_000
POLICY = SendPolicy(
    window=WindowPolicy(sends=2, hours=23.0, cooldown_s=0.0, low=0), gap_ms=0, attempts=2, merge_chars=100
)
BOT = Bot("b1@im.bot", is_usable=True)
REFUSED = CommandResult("refused", "rejected", "iLink's words", (), 1, 0, -5, "no")

ANSWERS = ("accepted", "unconfirmed", "lost", "unheard", "not_taken", "throttled", "rejected", "token")
"""What may come of a request: taken with and without an id; not taken, or taken, without an answer; and refusals."""
Move: TypeAlias = tuple[str, ...]
Course: TypeAlias = "tuple[Move, Course | None]"
"""How a world came about: its last move, and the course before."""


def command(sequence: int, *parts: str, **fields: Any) -> QueuedCommand:
    """A command of so many texts."""
    texts: list[Part] = list(parts) or [f"t{sequence}"]
    known: dict[str, Any] = {
        "sequence": sequence,
        "ref": CommandRef(sequence=sequence, stored_ms=sequence, id=f"c{sequence}"),
        "client_id_base": f"k{sequence}",
        "kind": "text",
        "parts": texts,
        "part_count": len(texts),
        "chars": len(parts[0] if parts else f"t{sequence}") if len(texts) == 1 else 0,
        "expires_ms": 72 * HOUR_MS,
    }
    return QueuedCommand(**known | fields)


class World(NamedTuple):
    """All of it."""

    stored: bytes
    """The record, as the bucket has it."""
    receipts: tuple[tuple[int, CommandResult], ...]
    """The last receipt of each command."""
    left: tuple[int, ...]
    """Sequences that are not acknowledged."""
    phone: tuple[str, ...]
    """What iLink took, by client_id, in the order in which the user saw it first."""
    memory: bytes
    """The conversation, as its owner knows it; empty: nobody owns it."""
    effects: tuple[rules.Effect, ...]
    """What is left to carry out."""
    out: rules.Post | None
    """The request that is out."""
    waits: rules.Effect | None
    """What is out besides: a read-back, a slot, a question."""
    now_ms: int
    messages: int
    """How often the user may still write."""
    crashes: int
    """How often an owner may still die."""
    failures: int
    """How many more answers may be anything but `accepted`."""
    is_bound: bool
    """False: the bot was unbound."""


class Explorer:
    """The moves of a world, and what must hold in each."""

    def __init__(self, commands: tuple[QueuedCommand, ...], *, policy: SendPolicy = POLICY) -> None:
        self.commands = {one.sequence: one for one in commands}
        self.policy = policy
        self.states = 0

    def begin(self, *, messages: int = 1, crashes: int = 1, failures: int = 2) -> World:
        empty = msgspec.msgpack.encode(ConversationRecord())
        left = tuple(self.commands)
        world = World(empty, (), left, (), b"", (), None, None, 1_000_000, messages, crashes, failures, True)
        return self._take_over(world)

    # moves --------------------------------------------------------------------------------------------

    def moves(self, world: World) -> Iterator[Move]:
        if not world.memory:
            yield ("take_over",)
            return
        if world.crashes:
            yield ("crash",)
        if world.effects:
            yield ("carry_out",)
            return
        if world.out is not None:
            for answer in ANSWERS if world.failures else ANSWERS[:1]:
                yield ("answer", answer)
        if world.waits is not None:
            yield ("wait_over",)
            if isinstance(world.waits, rules.CheckSession):
                yield ("session_dead",)
        if world.messages:
            yield ("hear",)
        if world.is_bound and world.messages == 0 and world.failures:
            yield ("unbind",)
        state = self._memory(world)
        if world.out is None and world.waits is None and state.queue:
            yield ("pause_over",) if not state.reason else ("time",)

    def after(self, world: World, move: Move) -> World:
        self.states += 1
        match move:
            case ("take_over",):
                return self._take_over(world)
            case ("crash",):
                return self._crash(world)
            case ("carry_out",):
                return self._carry_out(world)
            case ("answer", answer):
                return self._answer(world, answer)
            case ("wait_over",):
                return self._wait_over(world)
            case ("session_dead",):
                world = world._replace(waits=None)
                return self._step(world, rules.SessionChecked(is_alive=False))
            case ("hear",):
                number = world.messages
                world = world._replace(messages=number - 1)
                return self._step(world, rules.Heard(f"in:{number}", f"token{number}", BOT.id, 0))
            case ("unbind",):
                return self._step(world._replace(is_bound=False), rules.Bound(None))
            case ("pause_over",):
                return self._step(self._later(world), rules.Deadline())
            case ("time",):
                world = world._replace(now_ms=world.now_ms + 73 * HOUR_MS)
                return self._step(world, rules.Deadline())
        raise AssertionError(move)

    def _memory(self, world: World) -> Conversation:
        return MEMORY.decode(world.memory)

    def _step(self, world: World, event: rules.Input) -> World:
        state, effects = rules.step(self._memory(world), event, world.now_ms, self.policy)
        if state.activity in (Activity.IDLE, Activity.SENDING):
            world = world._replace(waits=None)
        return world._replace(memory=msgspec.msgpack.encode(state), effects=(*world.effects, *effects))

    def _take_over(self, world: World) -> World:
        """What the processor does: commands that have their final receipts are acknowledged, others come again."""
        record = msgspec.msgpack.decode(world.stored, type=ConversationRecord)
        bot = BOT if world.is_bound else None
        state = Conversation(sandbox="s1", user="u1", record=record, bot=bot)
        world = world._replace(memory=msgspec.msgpack.encode(state))
        finals = {sequence: result for sequence, result in world.receipts if result.outcome in FINAL_OUTCOMES}
        for sequence in world.left:
            if sequence in finals:
                world = world._replace(left=tuple(one for one in world.left if one != sequence))
                if record.head is not None and record.head.has_command(sequence):
                    world = self._step(world, rules.Ended(sequence, finals[sequence]))
            else:
                world = self._step(world, rules.Stored((self.commands[sequence],)))
        return world

    def _crash(self, world: World) -> World:
        """The owner dies. A request that is out may have left, and may have been taken: both worlds are explored,
        since `lost` and `unheard` are answers; here the one that has left is taken."""
        phone = _shown(world.phone, world.out.client_id) if world.out else world.phone
        return world._replace(memory=b"", effects=(), out=None, waits=None, phone=phone, crashes=world.crashes - 1)

    def _carry_out(self, world: World) -> World:
        effect, world = world.effects[0], world._replace(effects=world.effects[1:])
        match effect:
            case rules.Save():
                # later effects may have changed the memory: what is stored is never older than what was decided
                return world._replace(stored=msgspec.msgpack.encode(self._memory(world).record))
            case rules.Post():
                assert world.out is None, "two requests to one user at once"
                return world._replace(out=effect)
            case rules.PublishReceipt(one, result):
                return world._replace(receipts=self._with_receipt(world, one, result))
            case rules.Acknowledge(one, is_duplicate):
                finals = [r for sequence, r in world.receipts if sequence == one.sequence]
                assert is_duplicate or any(r.outcome in FINAL_OUTCOMES for r in finals), "gone without a receipt"
                return world._replace(left=tuple(sequence for sequence in world.left if sequence != one.sequence))
            case rules.RequestSlot() | rules.Load() | rules.CheckSession():
                return world._replace(waits=effect)
            case _:
                return world

    def _with_receipt(
        self, world: World, one: QueuedCommand, result: CommandResult
    ) -> tuple[tuple[int, CommandResult], ...]:
        """By compare-and-set: a final receipt that is there stays."""
        receipts = dict(world.receipts)
        known = receipts.get(one.sequence)
        if known is None or known.outcome not in FINAL_OUTCOMES:
            receipts[one.sequence] = result
        return tuple(sorted(receipts.items(), key=lambda item: item[0]))

    def _answer(self, world: World, answer: str) -> World:
        assert world.out is not None
        ident, failures = world.out.client_id, world.failures - (answer != "accepted")
        phone = world.phone if answer not in ("accepted", "unconfirmed", "unheard") else _shown(world.phone, ident)
        world = world._replace(out=None, phone=phone, failures=failures)
        replies: dict[str, rules.Answer] = {
            "accepted": rules.Accepted(f"m-{ident}"),
            "unconfirmed": rules.Accepted(""),
            "lost": rules.Unanswered(),
            "unheard": rules.Unanswered(),
            "not_taken": rules.NotTaken("away", 0),
            "throttled": rules.Throttled(REFUSED._replace(reason="throttled")),
            "rejected": rules.Rejected(REFUSED),
            "token": rules.TokenRejected(REFUSED),
        }
        return self._step(world, replies[answer])

    def _later(self, world: World) -> World:
        """Pauses have passed by the next move."""
        return world._replace(now_ms=world.now_ms + rules.REPEAT_PAUSE_MS)

    def _wait_over(self, world: World) -> World:
        waits, world = world.waits, world._replace(waits=None)
        match waits:
            case rules.Load(sequences):
                return self._step(world, rules.Loaded({one: self.commands[one].parts for one in sequences}))
            case rules.CheckSession():
                return self._step(world, rules.SessionChecked(is_alive=True))
            case _:
                return self._step(world, rules.SlotGranted())

    # what must hold -----------------------------------------------------------------------------------

    def check(self, world: World) -> None:
        """In every state: no lie in a receipt, nothing shown twice, nothing out of order."""
        shown = [part for ident in world.phone for part in self._parts_of(ident)]
        assert len(shown) == len(set(shown)), f"shown twice: {world.phone}"
        assert shown == sorted(shown), f"out of order: {world.phone}"
        for sequence, result in world.receipts:
            parts = [(sequence, part) for part in range(self.commands[sequence].part_count)]
            seen = [part for part in parts if part in shown]
            if result.is_sent:
                assert seen == parts, f"{sequence} is called {result.outcome}, and {seen} was shown"
            if result.outcome in ("refused", "dead_lettered"):
                # of several parts the first ones may have been taken, also without an id that could be told
                assert seen != parts, f"{sequence} is called {result.outcome}, and {seen} was shown"

    def _parts_of(self, ident: str) -> list[tuple[int, int]]:
        """Commands and parts in a message, by its client_id."""
        base, _, rest = ident.removeprefix("wechat-nats:k").partition("-")
        part, _, merged = rest.partition("+")
        first = int(base)
        return [(first, int(part))] if not merged else [(first + n, 0) for n in range(int(merged) + 1)]

    def explore(self, world: World, *, most: int = 2_000_000) -> int:
        """Every state that can be reached; how many there are. Each of them can come to an end."""
        seen: set[bytes] = {_key(world)}
        todo: list[tuple[World, Course | None]] = [(world, None)]
        while todo:
            now, course = todo.pop()
            try:
                self.check(now)
            except AssertionError as exc:
                raise AssertionError(f"{exc}\n{_told(course)}") from exc
            quiet = True
            for move in self.moves(now):
                quiet = quiet and move[0] in ("crash", "hear", "unbind", "time")
                after = self.after(now, move)
                if (key := _key(after)) not in seen:
                    assert len(seen) < most, "the world is too large to be explored"
                    seen.add(key)
                    todo.append((after, (move, course)))
            if quiet and now.memory and not now.effects:
                try:
                    self._check_quiet(now)
                except AssertionError as exc:
                    raise AssertionError(f"{exc}\n{_told(course)}") from exc
        return len(seen)

    def _check_quiet(self, world: World) -> None:
        """Nothing is out: whatever is left waits for a reason that its sender was told."""
        state = self._memory(world)
        receipts = dict(world.receipts)
        queued = {one.sequence for one in state.queue}
        assert set(world.left) == queued, "what is not acknowledged is in the queue"
        for one in state.queue:
            assert state.reason, f"{one.sequence} waits for nothing: {state}"
            assert one.sequence in receipts, f"{one.sequence} waits, and nobody was told"
        for sequence in set(self.commands) - queued:
            assert receipts[sequence].outcome in FINAL_OUTCOMES


MEMORY = msgspec.msgpack.Decoder(Conversation)


def _told(course: Course | None) -> str:
    moves = []
    while course is not None:
        move, course = course
        moves.append(" ".join(move))
    return " > ".join(reversed(moves))


def _key(world: World) -> bytes:
    effects = [(type(effect).__name__, effect) for effect in (*world.effects, world.out, world.waits)]
    return msgspec.msgpack.encode((world, effects))


def _shown(phone: tuple[str, ...], ident: str) -> tuple[str, ...]:
    """WeChat shows a message once, whatever often the same client_id comes."""
    return phone if ident in phone else (*phone, ident)
