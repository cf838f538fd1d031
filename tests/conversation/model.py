"""A small world around `rules.step`: the bus, iLink's phone and crashes, as a state that can be explored.

The world holds what survives an owner (the stored record, the receipts, what is not acknowledged) and what does not
(the conversation in memory, the effects that are left to carry out). Its moves are everything that may happen next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import msgspec

from adapter.contract.messages import FINAL_OUTCOMES
from adapter.conversation import rules
from adapter.conversation.commands import MERGE_SEPARATOR, MediaPart, Part
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
from adapter.ports import Uploaded

HOUR_MS = 3_600_000
POLICY = SendPolicy(window=WindowPolicy(sends=2, hours=23.0, cooldown_s=1e9), gap_ms=0, attempts=2, merge_chars=100)
BOT = Bot("b1@im.bot", is_usable=True)
BOTS = {"b1": BOT, "dead": Bot(BOT.id, is_usable=False), "b2": Bot("b2@im.bot", is_usable=True), "none": None}
"""Who may serve the user: a bot, the same one without a login, the user's next one; or nobody, for ever or not."""
MEDIA = MediaPart("file", "f", "s1/f", b"")
REFUSED = CommandResult("refused", "rejected", "iLink's words", (), 1, 0, -5, "no")

ANSWERS = ("accepted", "unconfirmed", "lost", "unheard", "not_taken", "throttled", "rejected", "token")
"""What may come of a request: taken with and without an id; not taken, or taken, without an answer; and refusals."""
Move: TypeAlias = tuple[str, ...]
Course: TypeAlias = "tuple[Move, Course | None]"
"""How a world came about: its last move, and the course before."""


def command(sequence: int, *parts: Part, **fields: Any) -> QueuedCommand:
    """A command of so many parts."""
    texts: list[Part] = list(parts) or [f"t{sequence}"]
    known: dict[str, Any] = {
        "sequence": sequence,
        "ref": CommandRef(sequence=sequence, stored_ms=sequence, id=f"c{sequence}"),
        "client_id_base": f"k{sequence}",
        "kind": "text",
        "parts": texts,
        "part_count": len(texts),
        "chars": len(texts[0]) if len(texts) == 1 and isinstance(texts[0], str) else 0,
        "expires_ms": 72 * HOUR_MS,
    }
    return QueuedCommand(**known | fields)


def copy(sequence: int, of: QueuedCommand) -> QueuedCommand:
    """The router's second copy of a command."""
    return msgspec.structs.replace(of, sequence=sequence)


class Saved(NamedTuple):
    """A Save with the record of its step: an actor carries out a step before it takes the next input."""

    record: bytes


class World(NamedTuple):
    """All of it."""

    stored: bytes
    """The record, as the bucket has it."""
    receipts: tuple[tuple[int, CommandResult], ...]
    """The last receipt of each command, by the sequence that identifies it."""
    left: tuple[int, ...]
    """Sequences that are not acknowledged."""
    phone: tuple[str, ...]
    """What the user saw, in order: client_id, bot and text."""
    ids: tuple[tuple[str, str], ...]
    """What iLink answered last that it took: client_id and message id."""
    used: tuple[str, ...]
    """What iLink took since the user wrote last, by client_id."""
    memory: bytes
    """The conversation, as its owner knows it; empty: nobody owns it."""
    effects: tuple[rules.Effect | Saved, ...]
    """What is left to carry out."""
    out: rules.Post | None
    """The request that is out."""
    over: str
    """The bot over which it left."""
    waits: rules.Effect | None
    """What is out besides: a read-back, a slot, a question."""
    now_ms: int
    messages: int
    """How often the user may still write."""
    said: tuple[rules.InboundReceived, ...]
    """What the user wrote: the journal of the bot."""
    crashes: int
    """How often an owner may still die."""
    failures: int
    """How many more answers may be anything but `accepted`."""
    binds: int
    """How often the binding may still change."""
    bot: str
    """Of BOTS."""


class Explorer:
    """The moves of a world, and what must hold in each."""

    def __init__(
        self,
        commands: tuple[QueuedCommand, ...],
        *,
        policy: SendPolicy = POLICY,
        answers: tuple[str, ...] = ANSWERS,
        bots: tuple[str, ...] = tuple(BOTS),
    ) -> None:
        """`answers`: those that may come; `bots`: those that may be bound."""
        self.commands = {one.sequence: one for one in commands}
        self._parts = {_text(p): (one.ref.sequence, n) for one in commands for n, p in enumerate(one.parts or [])}
        self.policy = policy
        self.answers = answers
        self.bots = bots
        self.states = 0

    def begin(self, *, messages: int = 1, crashes: int = 1, failures: int = 2, binds: int = 0) -> World:
        world = World(
            stored=msgspec.msgpack.encode(ConversationRecord()),
            receipts=(),
            left=tuple(self.commands),
            phone=(),
            ids=(),
            used=(),
            memory=b"",
            effects=(),
            out=None,
            over="",
            waits=None,
            now_ms=1_000_000,
            messages=messages,
            said=(),
            crashes=crashes,
            failures=failures,
            binds=binds,
            bot="b1",
        )
        return self._take_over(world)

    # moves --------------------------------------------------------------------------------------------

    def moves(self, world: World) -> Iterator[Move]:
        """What may happen next; first what happens where nothing goes wrong."""
        if not world.memory:
            yield ("take_over",)
            return
        if world.effects:
            yield ("carry_out",)
        else:
            yield from self._inputs(world)
        if world.crashes:
            yield ("crash",)

    def _inputs(self, world: World) -> Iterator[Move]:
        if world.out is not None:
            for answer in self.answers if world.failures else self.answers[:1]:
                yield ("answer", answer)
        if world.waits is not None:
            yield ("wait_over",)
            if isinstance(world.waits, rules.CheckSession):
                yield ("session_dead",)
        if world.messages:
            yield ("hear",)
        if world.binds:
            yield from (("bind", bot) for bot in self.bots if bot != world.bot)
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
                world = world._replace(waits=None, bot="dead" if world.bot == "b1" else world.bot)
                return self._step(world, rules.SessionChecked(is_alive=False))
            case ("hear",):
                number, bot = world.messages, BOTS[world.bot] or BOT
                heard = rules.InboundReceived(f"in:{number}", f"token{number}", bot.id, 0, 1 + len(world.said))
                world = world._replace(messages=number - 1, used=(), said=(*world.said, heard))
                return self._step(world, heard)
            case ("bind", bot):
                return self._step(world._replace(binds=world.binds - 1, bot=bot), rules.Bound(BOTS[bot]))
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
        saved = Saved(msgspec.msgpack.encode(state.record))
        steps = [saved if isinstance(effect, rules.Save) else effect for effect in effects]
        return world._replace(memory=msgspec.msgpack.encode(state), effects=(*world.effects, *steps))

    def _take_over(self, world: World) -> World:
        """What the processor does: commands that have their final receipts are acknowledged, others come again."""
        record = msgspec.msgpack.decode(world.stored, type=ConversationRecord)
        state = Conversation(sandbox="s1", user="u1", record=record, bot=BOTS[world.bot])
        world = world._replace(memory=msgspec.msgpack.encode(state))
        for (
            heard
        ) in world.said:  # what the owner before may not have stored; all of it, since a repeat changes nothing
            world = self._step(world, heard)
        receipts = dict(world.receipts)
        finals = {sequence for sequence, result in world.receipts if result.outcome in FINAL_OUTCOMES}
        for ref in record.head.commands if record.head else ():
            if ref.sequence in finals:
                world = self._step(world, rules.Ended(ref.sequence, receipts[ref.sequence]))
        for sequence in world.left:
            one = self.commands[sequence]
            if one.ref.sequence in finals:
                world = world._replace(left=tuple(one for one in world.left if one != sequence))
            else:
                one = msgspec.structs.replace(one, parked=one.ref.sequence in receipts)
                world = self._step(world, rules.Stored((one,)))
        return world

    def _crash(self, world: World) -> World:
        """The owner dies. A request that is out may have left, and may have been taken: both worlds are explored,
        since `lost` and `unheard` are answers; here the one that has left is taken."""
        if world.out is not None:
            world = self._taken(world, world.out)
        return world._replace(memory=b"", effects=(), out=None, over="", waits=None, crashes=world.crashes - 1)

    def _taken(self, world: World, post: rules.Post) -> World:
        """iLink takes a request. WeChat shows the same client_id of the same bot once."""
        shown = f"{post.client_id}|{world.over}|{_text(post.content)}"
        phone = world.phone if shown in world.phone else (*world.phone, shown)
        return world._replace(phone=phone, used=tuple(sorted({*world.used, post.client_id})))

    def _carry_out(self, world: World) -> World:
        effect, world = world.effects[0], world._replace(effects=world.effects[1:])
        match effect:
            case Saved(record):
                return world._replace(stored=record)
            case rules.Post():
                assert world.out is None, "two requests to one user at once"
                bot = self._memory(world).bot
                assert bot is not None, "a request over no bot"
                assert bot.is_usable, "a request over a dead bot"
                return world._replace(out=effect, over=bot.id)
            case rules.PublishReceipt(one, result):
                return world._replace(receipts=self._with_receipt(world, one, result))
            case rules.Acknowledge(one, is_duplicate):
                self._check_gone(world, one, is_duplicate=is_duplicate)
                return world._replace(left=tuple(sequence for sequence in world.left if sequence != one.sequence))
            case rules.RequestSlot() | rules.Load() | rules.Upload() | rules.CheckSession():
                return world._replace(waits=effect)
            case _:
                return world

    def _with_receipt(
        self, world: World, one: QueuedCommand, result: CommandResult
    ) -> tuple[tuple[int, CommandResult], ...]:
        """By compare-and-set: a final receipt that is there stays."""
        receipts = dict(world.receipts)
        known = receipts.get(one.ref.sequence)
        if known is None or known.outcome not in FINAL_OUTCOMES:
            receipts[one.ref.sequence] = result
        return tuple(sorted(receipts.items(), key=lambda item: item[0]))

    def _answer(self, world: World, answer: str) -> World:
        assert world.out is not None
        ident, failures = world.out.client_id, world.failures - (answer != "accepted")
        if answer in ("accepted", "unconfirmed", "unheard"):
            world = self._taken(world, world.out)
        if answer in ("accepted", "unconfirmed"):
            ids = dict(world.ids) | {ident: f"m-{ident}" if answer == "accepted" else ""}
            world = world._replace(ids=tuple(sorted(ids.items())))
        world = world._replace(out=None, over="", failures=failures)
        replies: dict[str, rules.Answer] = {
            "accepted": rules.Accepted(f"m-{ident}"),
            "unconfirmed": rules.Accepted(""),
            "lost": rules.Unanswered(),
            "unheard": rules.Unanswered(),
            "not_taken": rules.NotTaken("away", 0),
            "throttled": rules.Throttled(msgspec.structs.replace(REFUSED, reason="throttled")),
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
            case rules.Upload():
                return self._step(world, rules.UploadDone(Uploaded("file", "f", 1, 1, "", b"")))
            case rules.CheckSession():
                return self._step(world, rules.SessionChecked(is_alive=True))
            case _:
                return self._step(world, rules.SlotGranted())

    # what must hold -----------------------------------------------------------------------------------

    def check(self, world: World) -> None:
        """In every state: no lie in a receipt, nothing shown twice or out of order, no window overdrawn."""
        shown = [part for message in world.phone for part in self._parts_of(message)]
        assert len(shown) == len(set(shown)), f"shown twice: {world.phone}"
        assert shown == sorted(shown), f"out of order: {world.phone}"
        assert len(world.used) <= self.policy.window.sends, f"more than a window has: {world.used}"
        ids = dict(world.ids)
        for sequence, result in world.receipts:
            parts = [(sequence, part) for part in range(self.commands[sequence].part_count)]
            seen = [part for part in parts if part in shown]
            if result.is_sent:
                assert seen == parts, f"{sequence} is called {result.outcome}, and {seen} was shown"
                holding = [message for message in world.phone if {*self._parts_of(message)} & {*parts}]
                named = [ids.get(message.partition("|")[0], "?") for message in holding]
                assert (result.outcome == "accepted") == all(named), f"{sequence} is called {result.outcome}: {named}"
                assert list(result.message_ids) == [*filter(None, named)], f"{sequence} is told as {result}: {named}"
            if result.outcome in ("refused", "dead_lettered"):
                # of several parts the first ones may have been taken, also without an id that could be told
                assert seen != parts, f"{sequence} is called {result.outcome}, and {seen} was shown"

    def _parts_of(self, message: str) -> list[tuple[int, int]]:
        """Commands and parts in a message."""
        return [self._parts[text] for text in message.split("|")[2].split(MERGE_SEPARATOR)]

    def explore(self, world: World, *, limit: int = 2_000_000) -> int:
        """Every state that can be reached; how many there are. Each of them can come to an end."""
        seen: set[bytes] = {_key(world)}
        todo: list[tuple[World, Course | None]] = [(world, None)]
        while todo:
            now, course = todo.pop()
            for move, after in self._step_all(now, course):
                if (key := _key(after)) not in seen:
                    assert len(seen) < limit, "the world is too large to be explored"
                    seen.add(key)
                    todo.append((after, (move, course)))
        return len(seen)

    def walk(self, world: World, choices: Iterable[int]) -> None:
        """One course: each choice is a move's number, or too large and the first move."""
        course: Course | None = None
        for choice in choices:
            found = self._step_all(world, course)
            if not found:
                return
            move, world = found[choice if choice < len(found) else 0]
            course = (move, course)

    def _step_all(self, world: World, course: Course | None) -> list[tuple[Move, World]]:
        """Checks a world; each move and the world after it. Raises AssertionError with its course."""
        try:
            self.check(world)
            moves = list(self.moves(world))
            if world.memory and not world.effects and all(move[0] in PATIENT for move in moves):
                self._check_quiet(world)
            return [(move, self.after(world, move)) for move in moves]
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{_told(course)}") from exc

    def _check_quiet(self, world: World) -> None:
        """Nothing is out: whatever is left waits for a reason that its sender was told."""
        state = self._memory(world)
        receipts = dict(world.receipts)
        queued = {one.sequence for one in state.queue}
        assert set(world.left) == queued, "what is not acknowledged is in the queue"
        assert not state.holds_slot
        for one in state.queue:
            assert state.reason, f"{one.sequence} waits for nothing: {state}"
            assert one.ref.sequence in receipts, f"{one.sequence} waits, and nobody was told"

    def _check_gone(self, world: World, one: QueuedCommand, *, is_duplicate: bool) -> None:
        """A command leaves the bus: it has its final receipt, or is one that was sent before, or waits besides."""
        receipts = dict(world.receipts)
        told = receipts.get(one.ref.sequence)
        if told is not None and told.outcome in FINAL_OUTCOMES:
            return
        assert is_duplicate, f"{one.sequence} is gone without a receipt"
        others = [other for other in self.commands.values() if other != one and other.ref.id == one.ref.id]
        assert any(
            (other.ref == one.ref and other.sequence in world.left)
            or (other.ref != one.ref and (result := receipts.get(other.ref.sequence)) and result.may_be_sent)
            for other in others
        ), f"{one.sequence} is gone as a repeat of nothing"


def _text(content: Part | Uploaded) -> str:
    return content if isinstance(content, str) else content.name


PATIENT = ("crash", "hear", "bind", "time")
"""Moves that nobody waits for."""
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
