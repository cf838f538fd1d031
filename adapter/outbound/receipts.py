"""Publishes receipts, and looks final ones up where a crash may have come after them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
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
from adapter.ports import History
from adapter.timing import Clock

KNOWN_SANDBOXES = 64
"""Whose receipts are kept in memory once they were read back: after a crash many commands ask for them in a row."""
KNOWN_RECEIPTS = 20_000
"""Most receipts kept of one sandbox; of one that has more they are read again each time."""
KNOWN_S = 60.0
"""Seconds for which they are kept after the last question."""


class Name(NamedTuple):
    """Identifies a command, also among later ones with the same id."""

    id: str
    stored_ms: int


class _Told:
    """The final receipts of a sandbox since a time, as far as they were read."""

    def __init__(self, since_ms: int) -> None:
        self.since_ms = since_ms
        self.asked = 0.0
        """Monotonic time of the last question."""
        self.seq = 0
        """The newest sequence in WECHAT_EVENT that was read; 0: none yet."""
        self.found: dict[Name, Receipt] = {}


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
        return bool(await self.find_finals(command.sandbox, {Name(command.id, command.stored_ms)}))

    async def find_finals(self, sandbox: str, wanted: Collection[Name]) -> dict[Name, Receipt]:
        """The final receipts of those commands of one sandbox that have one. Raises Temporary."""
        told, since_ms = self._told.get(sandbox), min(name.stored_ms for name in wanted) - 1000
        if told is None or told.since_ms > since_ms:
            told = self._told[sandbox] = _Told(since_ms)
        told.asked = self._clock.monotonic()
        self._told.move_to_end(sandbox)
        if len(self._told) > KNOWN_SANDBOXES:
            self._told.popitem(last=False)
        if any(name not in told.found for name in wanted):
            await self._read_on(sandbox, told)
        return {name: told.found[name] for name in wanted if name in told.found}

    def tidy(self) -> None:
        """Forgets what nobody has asked for lately: the questions of a take-over come in a row."""
        horizon = self._clock.monotonic() - KNOWN_S
        while self._told and (oldest := next(iter(self._told.items())))[1].asked <= horizon:
            del self._told[oldest[0]]

    async def _read_on(self, sandbox: str, told: _Told) -> None:
        stream, subject = self._names.stream_event, self._names.event(sandbox, "receipt")
        if told.seq:
            read = self._history.read(stream, subject, after=told.seq)
        else:
            read = self._history.read(stream, subject, since_ms=told.since_ms)
        async for stored in read:
            told.seq = max(told.seq, stored.seq)
            try:
                receipt = msgspec.json.decode(stored.data, type=Receipt)
            except UNDECODABLE:  # somebody else's
                continue
            if receipt.outcome in contract.FINAL_OUTCOMES:
                told.found.setdefault(Name(receipt.command, receipt.received_at_ms), receipt)
        if len(told.found) > KNOWN_RECEIPTS and self._told.get(sandbox) is told:
            del self._told[sandbox]

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
