"""Publishes receipts, and looks final ones up where a crash may have come after them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import NamedTuple

import msgspec

from adapter import contract
from adapter.contract import Receipt
from adapter.errors import UNDECODABLE
from adapter.events import Events
from adapter.metrics import Metrics
from adapter.names import H_COMMAND, Names
from adapter.outbound.commands import Command
from adapter.outbound.endings import Ending, Wait
from adapter.ports import History, Stored
from adapter.timing import Clock

KNOWN_SANDBOXES = 4096
"""Whose receipts are kept in mind once they were read back: after a crash many commands ask for them in a row."""
KNOWN_RECEIPTS = 2_000_000
"""Receipts kept in mind of all sandboxes together, 16 bytes each; a sandbox has at most 100,000 in the stream. Beyond
that, those of whoever has not asked for the longest time are read again."""
KNOWN_S = 60.0
"""Seconds for which they are kept after the last question."""
PARTS = 256
"""Of what is known of a sandbox: a search goes through one of them."""


class Name(NamedTuple):
    """Identifies a command, also among later ones with the same id."""

    id: str
    stored_ms: int


class _Told:
    """Which commands of a sandbox have their final receipts, as far as those were read: packed, since the objects of
    thousands of receipts would take a hundred times as much."""

    def __init__(self, since_ms: int) -> None:
        self.since_ms = since_ms
        """All that was stored since is read, up to `last`."""
        self.asked_ms = since_ms
        """Since when the oldest command of which anybody has asked could have its receipt."""
        self.asked = 0.0
        """Monotonic time of the last question."""
        self.first = self.last = 0
        """The oldest and the newest sequence in WECHAT_EVENT that was read; 0: none yet."""
        self.reading = asyncio.Lock()
        self.begun = self.done = 0
        """Counts the readings; the last one that was completed."""
        self.count = 0
        self._parts: dict[int, bytearray] = {}
        """By the hash of the command: that, and the sequence of its receipt, eight bytes each."""

    def add(self, name: Name, seq: int) -> None:
        self._parts.setdefault(hash(name) % PARTS, bytearray()).extend(_hashed(name) + seq.to_bytes(8, "little"))
        self.count += 1

    def add_all(self, other: _Told) -> None:
        for number, part in other._parts.items():
            self._parts.setdefault(number, bytearray()).extend(part)
        self.count += other.count

    def seq_of(self, name: Name) -> int:
        """The sequence of its receipt; 0 for one without."""
        part, hashed, at = self._parts.get(hash(name) % PARTS, b""), _hashed(name), -1
        while (at := part.find(hashed, at + 1)) >= 0:
            if at % 16 == 0:
                return int.from_bytes(part[at + 8 : at + 16], "little")
        return 0


def _hashed(name: Name) -> bytes:
    return hash(name).to_bytes(8, "little", signed=True)


class Receipts:
    """Publishes receipts through Events and reads them back from WECHAT_EVENT."""

    def __init__(self, events: Events, history: History, names: Names, clock: Clock, metrics: Metrics) -> None:
        self._events = events
        self._history = history
        self._names = names
        self._clock = clock
        self._metrics = metrics
        self._told: OrderedDict[str, _Told] = OrderedDict()

    async def has_final(self, command: Command) -> bool:
        """Whether this very command has its final receipt. Raises Temporary."""
        return bool(await self._find(command.sandbox, {Name(command.id, command.stored_ms)}))

    async def find_finals(self, sandbox: str, wanted: Collection[Name]) -> dict[Name, Receipt]:
        """The final receipts of those commands of one sandbox that have one. Raises Temporary."""
        found: dict[Name, Receipt] = {}
        for name, seq in (await self._find(sandbox, wanted)).items():
            async for stored in self._read(sandbox, after=seq - 1, most=1):
                if (receipt := _final_in(stored)) and _name_of(receipt) == name:
                    found[name] = receipt
        return found

    def keep(self, sandbox: str) -> None:
        """More questions will come: what was read is not forgotten, so that it is read once."""
        if told := self._told.get(sandbox):
            told.asked = self._clock.monotonic()
            self._told.move_to_end(sandbox)

    def tidy(self) -> None:
        """Forgets what nobody has asked for lately: the questions of a take-over come in a row."""
        horizon = self._clock.monotonic() - KNOWN_S
        while self._told and (oldest := next(iter(self._told.items())))[1].asked <= horizon:
            del self._told[oldest[0]]

    async def _find(self, sandbox: str, wanted: Collection[Name]) -> dict[Name, int]:
        """Where the final receipts of those commands lie that have one. Raises Temporary."""
        since_ms = min(name.stored_ms for name in wanted) - 1000
        told = self._told.setdefault(sandbox, _Told(since_ms))
        self.keep(sandbox)
        if not all(map(told.seq_of, wanted)):
            await self._read_up(sandbox, told, since_ms)
        return {name: seq for name in wanted if (seq := told.seq_of(name))}

    async def _read_up(self, sandbox: str, told: _Told, since_ms: int) -> None:
        """Reads what was stored since a time and until this call, unless it is read already. Raises Temporary."""
        begun, told.asked_ms = told.begun, min(told.asked_ms, since_ms)
        async with told.reading:
            if told.done > begun and told.since_ms <= since_ms:
                return  # for somebody else
            told.begun += 1
            if told.since_ms > (since_ms := told.asked_ms):  # of all who wait for this reading
                if told.first:
                    await self._read_before(sandbox, told, since_ms)
                told.since_ms = since_ms
            where = {"after": told.last} if told.last else {"since_ms": told.since_ms}
            async for stored in self._read(sandbox, **where):
                told.first, told.last = told.first or stored.seq, stored.seq
                if receipt := _final_in(stored):
                    told.add(_name_of(receipt), stored.seq)
            told.done = told.begun
        self._forget_some()

    async def _read_before(self, sandbox: str, told: _Told, since_ms: int) -> None:
        """Reads what was stored since a time and before what is read already. Raises Temporary."""
        older = _Told(since_ms)
        async for stored in self._read(sandbox, since_ms=since_ms):
            if stored.seq >= told.first:
                break
            older.first = older.first or stored.seq
            if receipt := _final_in(stored):
                older.add(_name_of(receipt), stored.seq)
        told.first = older.first or told.first
        told.add_all(older)

    def _read(self, sandbox: str, **where: int) -> AsyncIterator[Stored]:
        return self._history.read(self._names.stream_event, self._names.event(sandbox, "receipt"), **where)

    def _forget_some(self) -> None:
        """Forgets whose receipts nobody has asked for the longest time, where there are too many."""
        kept = sum(told.count for told in self._told.values())
        while len(self._told) > 1 and (kept > KNOWN_RECEIPTS or len(self._told) > KNOWN_SANDBOXES):
            kept -= self._told.popitem(last=False)[1].count

    async def parked(
        self, command: Command, wait: Wait, bot: str, user: str, shown: contract.Window, headers: Mapping[str, str]
    ) -> None:
        """Not final: the command waits. `headers`: its own."""
        receipt = _receipt(command, wait.as_ending("parked"), bot, user, shown)
        await self._events.receipt(receipt, msg_id=f"parked:{command.client}", headers=headers)

    async def final(
        self,
        command: Command,
        ending: Ending,
        *,
        bot: str,
        user: str,
        shown: contract.Window,
        original: tuple[bytes, dict[str, str], str],
        parked_ms: int = 0,
        late: Callable[[], None] | None = None,
    ) -> None:
        """The last word on a command. A dead letter is stored before its receipt. `late`: see Message; the next owner
        tells of the command, too, if this takes long.

        `parked_ms`: how long it was parked, which the metrics do not count as our delay.
        """
        if ending.outcome == "dead_lettered":
            data, headers, subject = original
            await self._events.dead_letter(
                "OUT",
                data,
                subject=subject,
                headers=headers | {H_COMMAND: command.id},
                reason=ending.reason,
                detail=ending.detail,
                msg_id=f"dead:{command.client}",
                sandbox=command.sandbox,
            )
        receipt = _receipt(command, ending, bot, user, shown)
        await self._events.receipt(receipt, msg_id=f"final:{command.client}", headers=original[1], late=late)
        self._metrics.outbound_messages.of(command.kind, ending.outcome, ending.reason or "none").inc()
        took_s = max(0, self._clock.now_ms() - command.stored_ms - parked_ms) / 1000
        failed = ending.outcome in ("dead_lettered", "uncertain")
        self._metrics.outbound_duration.of("failed" if failed else "settled").observe(took_s)


def _final_in(stored: Stored) -> Receipt | None:
    """A final receipt; None for any other message."""
    try:
        receipt = msgspec.json.decode(stored.data, type=Receipt)
    except UNDECODABLE:  # somebody else's
        return None
    return receipt if receipt.outcome in contract.FINAL_OUTCOMES else None


def _name_of(receipt: Receipt) -> Name:
    return Name(receipt.command, receipt.received_at_ms)


def _receipt(command: Command, ending: Ending, bot: str, user: str, shown: contract.Window) -> Receipt:
    return Receipt(
        command=command.id,
        sandbox=command.sandbox,
        outcome=ending.outcome,
        reason=ending.reason,
        detail=ending.detail or _ADVICE.get(ending.reason, ""),
        bot=bot,
        user=user,
        message_ids=list(ending.message_ids),
        ret=ending.ret,
        errcode=ending.errcode,
        errmsg=ending.errmsg,
        window=shown,
        attempts=ending.attempts,
        received_at_ms=command.stored_ms,
    )


def ending_of(receipt: Receipt) -> Ending:
    """What a final receipt tells, as the ending of others that shared its message."""
    return Ending(
        receipt.outcome,
        receipt.reason,
        receipt.detail,
        tuple(receipt.message_ids),
        receipt.attempts,
        receipt.ret,
        receipt.errcode,
        receipt.errmsg,
    )


_ADVICE = {
    "window_closed": "The user must write first; WeChat lets a bot speak only for a day after that.",
    "quota": "It needs more sends than are left after the user's last message; they must write again.",
    "throttled": "iLink refuses more messages to this user until they write.",
    "needs_login": "The bot's token is dead; have the user scan a new QR code and bind the new bot.",
}
