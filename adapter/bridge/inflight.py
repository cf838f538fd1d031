"""The commands of a partition that are delivered and have no final receipt: the one place that ends them.

A command stays unacknowledged in `WECHAT_OUT` until its final receipt is stored. The body of one that waits for its
user, or for which there is no room, is dropped, and read again by its sequence when its turn comes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import msgspec
import structlog

from adapter.bridge import sending
from adapter.bridge.commands import Part, decode_command, read_command
from adapter.bridge.leases import Tenure
from adapter.bridge.parts import Parts
from adapter.bridge.receipts import Address, is_final, result_of
from adapter.bridge.record import CommandRef
from adapter.bridge.sending import CommandResult, QueuedCommand
from adapter.contract.messages import Window
from adapter.errors import Crashed, Refused, Temporary, Unreadable

log = structlog.get_logger()

T = TypeVar("T")

MISSING_CONFIRM_S = 10.0
"""Time after which a waiting command that the stream does not have is gone. A cluster that is losing its leaders may
not show all messages, and later commands overtake one that is taken for gone."""
NO_WINDOW = Window()


class InFlight:
    """The commands of one partition."""

    def __init__(self, parts: Parts, tenure: Tenure) -> None:
        self.commands: dict[int, QueuedCommand] = {}
        """By their own sequences."""
        self._by_identity: dict[tuple[str, CommandRef], QueuedCommand] = {}
        self._parts = parts
        self._tenure = tenure
        self._ended: dict[int, asyncio.Event] = {}
        """Of the commands whose ends somebody awaits."""
        self._missing = (-math.inf, -math.inf)
        """Span of monotonic time in which commands were missing on the bus, so that only the first of many missing
        ones takes long."""

    def add(self, command: QueuedCommand) -> bool:
        """Takes a command that was delivered, once its id is known. False: it is another copy of one that is here."""
        key = command.sandbox, command.ref
        if key in self._by_identity:
            return False
        self._by_identity[key] = self.commands[command.sequence] = command
        if not command.delivery.redelivered:
            self._parts.metrics.outbound_received.inc()
        return True

    # receipts ---------------------------------------------------------------------------------------

    async def tell(
        self, command: QueuedCommand, result: CommandResult, address: Address, shown: Window = NO_WINDOW
    ) -> None:
        """Publishes a receipt. Raises LeaseLost, Crashed; StaleRead if a command is parked that has ended."""
        work = partial(self._parts.receipts.tell, command, result, address, self._tenure.check, shown)
        await self._persist(work, "receipt", command)

    async def end(
        self,
        ends: Sequence[tuple[QueuedCommand, CommandResult]],
        address: Address,
        shown: Window = NO_WINDOW,
        *,
        on_told: Callable[[QueuedCommand, CommandResult], None] = lambda command, result: None,
    ) -> None:
        """Publishes final receipts, then acknowledges the commands. All receipts come first: a new owner that finds
        one of a merged message knows the result of the others. `on_told`: called for each of them in between. Raises
        LeaseLost."""
        told = await asyncio.gather(*(self.tell_final(*each, address, shown) for each in ends))
        for (command, result), is_told in zip(ends, told, strict=True):
            on_told(command, result)
            if is_told:
                await self.acknowledge(command)

    async def tell_final(
        self, command: QueuedCommand, result: CommandResult, address: Address, shown: Window = NO_WINDOW
    ) -> bool:
        """Publishes a final receipt. False: a bug prevents it, and the command comes again to the next owner. Raises
        LeaseLost."""
        try:
            await self.tell(command, result, address, shown)
        except Crashed as exc:
            bare = sending.crashed_result(exc)
            if result.may_be_sent:  # no dead letter, which somebody might send again
                bare = CommandResult(result.outcome, message_ids=result.message_ids, attempts=result.attempts)
            try:
                await self.tell(command, bare, address, shown)
            except Crashed:
                log.error("command.abandoned", sandbox=command.sandbox, sequence=command.sequence)
                self.release_body(command)
                return False
        return True

    async def find(self, sandbox: str, commands: Sequence[QueuedCommand]) -> dict[int, CommandResult]:
        """The results of commands that have a final receipt, by their own sequences. Those that were parked are
        marked. Raises LeaseLost, Crashed."""
        refs = [command.ref for command in commands]
        find = partial(self._parts.receipts.find, sandbox, refs, commands[0].verb)
        stored = await self._persist(find, "receipts", commands[0])
        found = {}
        for command in commands:
            if (last := stored.get(command.ref)) is None:
                continue
            if is_final(last.receipt):
                found[command.sequence] = result_of(last.receipt)
                if not command.delivery.redelivered:  # another copy of a command that has ended
                    self._parts.metrics.outbound_messages.labels(command.kind, "duplicate", "none").inc()
                continue
            command.receipt, command.parked_for = last.sequence, last.receipt.user
            command.parked = last.receipt.reason != sending.SCHEDULED.reason
            self.release_body(command)
        return found

    async def result_of_repeat(self, command: QueuedCommand, first: CommandRef) -> CommandResult | None:
        """The result of a command whose id an earlier one had; None: that one was refused after all. Raises
        LeaseLost, Crashed."""
        ask = partial(self._parts.receipts.last, command.sandbox, first.id, first.sequence)
        receipt = await self._persist(ask, "repeat", command)
        if receipt is None or not is_final(receipt):
            detail = "An earlier command with this id was sent, or may have been, and its receipt is gone."
            return CommandResult("uncertain", detail=detail, repeat_of=first.sequence)
        if receipt.outcome == "refused":  # its owner ended before it could store that
            return None
        return msgspec.structs.replace(result_of(receipt), repeat_of=first.sequence)

    async def acknowledge(self, command: QueuedCommand) -> None:
        """Removes an ended command from the bus."""
        self.release_body(command)
        if self.commands.pop(command.sequence, None) is not None:
            del self._by_identity[command.sandbox, command.ref]
            if (ended := self._ended.pop(command.sequence, None)) is not None:
                ended.set()
            await command.delivery.ack()

    async def wait_ended(self, command: QueuedCommand) -> None:
        """Returns when a command has ended."""
        if command.sequence in self.commands:
            await self._ended.setdefault(command.sequence, asyncio.Event()).wait()

    # bodies -----------------------------------------------------------------------------------------

    def release_body(self, command: QueuedCommand) -> None:
        """Drops the body of a command that waits for its user, or has ended."""
        self._parts.bodies.held -= command.size
        command.parts, command.size = None, 0

    async def read(self, commands: Sequence[QueuedCommand]) -> Mapping[int, list[Part] | CommandResult | None]:
        """The parts of commands; how a command ends that cannot be read; None: it is gone from the bus. Raises
        LeaseLost, Crashed."""
        return await self._persist(partial(self._read, commands), "bodies", commands[0])

    async def _read(self, commands: Sequence[QueuedCommand]) -> Mapping[int, list[Part] | CommandResult | None]:
        """Raises Temporary, also while a missing command may only be hidden."""
        parts, now = self._parts, self._parts.clock.monotonic()
        bodies: dict[int, list[Part] | CommandResult | None] = {}
        for command in commands:
            stored = await parts.history.get(parts.names.stream_out, command.sequence)
            bodies[command.sequence] = self._parts_of(command, stored.data) if stored else None
            if stored:
                parts.bodies.held += len(stored.data) - command.size
                command.size = len(stored.data)
        if None in bodies.values():
            since, last = self._missing
            self._missing = since if now - last < MISSING_CONFIRM_S else now, now
            if now - self._missing[0] < MISSING_CONFIRM_S:
                raise Temporary("command_missing")
        return bodies

    def _parts_of(self, command: QueuedCommand, data: bytes) -> list[Part] | CommandResult:
        """An adapter of another version, which parked the command, may have accepted what this one does not."""
        limits = self._parts.limits
        try:
            body, stored_ms = decode_command(data, limits), command.ref.stored_ms
            return read_command(body, sandbox=command.sandbox, stored_ms=stored_ms, limits=limits).parts
        except (Refused, Unreadable) as exc:
            return sending.unreadable_result(exc)

    def _persist(self, work: Callable[[], Awaitable[T]], name: str, command: QueuedCommand) -> Awaitable[T]:
        """Raises LeaseLost, Crashed, StaleRead."""
        return self._tenure.persist(work, name, sandbox=command.sandbox, sequence=command.sequence)
