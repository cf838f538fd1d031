"""The delivered commands of one shard that have not ended: their bodies, receipts and acknowledgements.

A command stays unacknowledged in WECHAT_OUT until its final receipt is stored. Bodies are held up to a share for each
sandbox (`Backlog`). A parked command releases its body, which is read from the bus when its turn comes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import structlog

from adapter.contract import messages as contract
from adapter.contract.headers import author_traceparent, command_traceparent
from adapter.contract.names import H_COMMAND, H_TRACEPARENT, Names
from adapter.conversation.rules import CommandResult, QueuedCommand
from adapter.kit.timing import Clock
from adapter.observability.events import Events
from adapter.observability.metrics import Metrics
from adapter.outbound.backlog import Backlog
from adapter.outbound.receipts import Address, Receipts
from adapter.ports import Archive, Delivery

log = structlog.get_logger()

ENDED_KEPT = 256
"""Ended commands that are remembered, so that a redelivery shortly afterwards needs no search for the receipt."""


class _Entry:
    """A delivered command that has not ended."""

    __slots__ = ("delivery", "parked_at_ms", "parked_ms", "receipt", "traceparent")

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self.traceparent = author_traceparent(delivery.headers)
        """Its author's; kept after its body is released."""
        self.receipt = 0
        """Sequence of the newest receipt."""
        self.parked_at_ms = 0
        self.parked_ms = 0
        """Total time parked before the body was read again."""

    def end_parking(self, now_ms: int) -> int:
        """Ends the wait for the user. Returns the total time parked."""
        if self.parked_at_ms:
            self.parked_ms += max(0, now_ms - self.parked_at_ms)
            self.parked_at_ms = 0
        return self.parked_ms


class CommandLedger:
    """The commands in flight of one shard."""

    def __init__(
        self,
        receipts: Receipts,
        events: Events,
        history: Archive,
        names: Names,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.backlog = Backlog()
        self.on_room: Callable[[str], None] = lambda subject: None
        """Called with a subject whose backlog has room."""
        self._receipts = receipts
        self._events = events
        self._history = history
        self._names = names
        self._clock = clock
        self._metrics = metrics
        self._entries: dict[int, _Entry] = {}
        """By sequence."""
        self._ended: OrderedDict[int, int] = OrderedDict()
        """Sequence and stored time. The time distinguishes commands of a stream that was recreated."""

    def add(self, delivery: Delivery) -> None:
        """Adds a command that is being worked on."""
        self._entries[delivery.seq] = _Entry(delivery)

    def adopt_receipt(self, command: QueuedCommand, receipt: int) -> None:
        """Takes over the newest receipt that the previous owner stored, which is not final."""
        if entry := self._entries.get(command.sequence):
            entry.receipt = receipt

    def has_ended(self, delivery: Delivery) -> bool:
        """Whether the command ended a moment ago and only its acknowledgement was lost."""
        return self._ended.get(delivery.seq) == delivery.time_ms

    def renew(self, delivery: Delivery) -> bool:
        """Replaces the delivery of a known command by its redelivery. Returns whether the command is known."""
        if (entry := self._entries.get(delivery.seq)) is None:
            return False
        delivery.data, delivery.headers = entry.delivery.data, entry.delivery.headers
        entry.delivery = delivery
        return True

    async def acknowledge(self, command: QueuedCommand, *, is_duplicate: bool = False) -> None:
        """Removes an ended command from the bus. `is_duplicate`: it gets no receipt of its own."""
        entry = self._entries.pop(command.sequence, None)
        if is_duplicate:
            subject = entry.delivery.subject if entry else ""
            log.info("command.duplicate", subject=subject, command=command.ref.id, sequence=command.sequence)
            self._metrics.outbound_messages.child(command.kind, "duplicate", "none").inc()
        if entry is None:
            return
        self._ended[command.sequence] = entry.delivery.time_ms
        if len(self._ended) > ENDED_KEPT:
            self._ended.popitem(last=False)
        self._settle(command.sequence)
        await entry.delivery.ack()

    def release_body(self, command: QueuedCommand) -> None:
        """Drops the body of a command from memory."""
        if entry := self._entries.get(command.sequence):
            entry.delivery.data, entry.delivery.headers = b"", {}
            entry.parked_at_ms = entry.parked_at_ms or self._clock.now_ms()
        self._settle(command.sequence)

    def _settle(self, sequence: int) -> None:
        if subject := self.backlog.settle(sequence):
            self.on_room(subject)

    def end_parking(self, sequence: int) -> None:
        """Ends the wait for the user."""
        if entry := self._entries.get(sequence):
            entry.end_parking(self._clock.now_ms())

    async def publish_receipt(
        self,
        command: QueuedCommand,
        result: CommandResult,
        address: Address,
        shown: contract.Window,
    ) -> None:
        """Publishes a receipt, and before that the dead letter if it is one. Raises Temporary."""
        entry = self._entries.get(command.sequence)
        author, ref = entry.traceparent if entry else "", command.ref
        trace = command_traceparent(author, address.sandbox, ref.sequence, ref.stored_ms, command.reply_to)
        if result.outcome == "dead_lettered":
            await self._publish_dead_letter(command, result, address, entry, trace)
        receipt = await self._receipts.publish(
            ref, result, address, shown, trace, reply_to=command.reply_to, expected=entry.receipt if entry else 0
        )
        if result.outcome == "parked":
            if entry:
                entry.receipt = receipt
            return
        metrics = self._metrics
        metrics.outbound_messages.child(command.kind, result.outcome, result.reason or "none").inc()
        now_ms = self._clock.now_ms()
        parked_ms = entry.end_parking(now_ms) if entry else 0
        failed = result.outcome in ("dead_lettered", "uncertain")
        took_s = max(0, now_ms - command.ref.stored_ms - parked_ms) / 1000
        metrics.outbound_duration.child("failed" if failed else "settled").observe(took_s)

    async def _publish_dead_letter(
        self, command: QueuedCommand, result: CommandResult, address: Address, entry: _Entry | None, trace: str
    ) -> None:
        data, headers = (entry.delivery.data, entry.delivery.headers) if entry else (b"", {})
        if not data and (stored := await self._history.get(self._names.stream_out, command.sequence)):
            data, headers = stored.data, stored.headers
        await self._events.publish_dead_letter(
            "OUT",
            data,
            subject=self._names.out(address.sandbox),
            headers=headers | {H_COMMAND: command.ref.id, H_TRACEPARENT: trace},
            reason=result.reason,
            detail=result.detail,
            msg_id=f"dead:{command.client_id_base}",
            sandbox=address.sandbox,
            user=address.user,
        )

    def depth(self) -> tuple[int, int | None]:
        """Number of commands in flight, and when the oldest one that is not parked was stored."""
        stored_ms = [entry.delivery.time_ms for entry in self._entries.values() if not entry.parked_at_ms]
        if (waiting_ms := self.backlog.oldest_ms()) is not None:
            stored_ms.append(waiting_ms)
        return len(self._entries) + self.backlog.waiting, min(stored_ms, default=None)
