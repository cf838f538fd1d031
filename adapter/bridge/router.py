"""Copies commands from plain `wechat.out` to `wechat.out.<sandbox>`, in order.

The owner of partition 0 runs the router. Each sandbox has a queue of its commands, and a task while something is in
it. The task takes a batch, stores one copy after the other, and acknowledges the originals. One copy is in flight for
each sandbox: if the stream's leader fails, a copy may be lost while the new leader stores a later one. A command
without a valid sandbox, one that is unreadable, and one whose copy is refused, end with a receipt.

A copy names its original (`Wechat-Original`), which is the command's identity (`commands.identity_of`). What was
copied and comes again is copied again: the owner of the copies acknowledges the second one, or finds the receipt of
the first. The router never splits or sends.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from functools import partial
from itertools import islice
from typing import TypeAlias, TypeVar

import msgspec
import structlog

from adapter.bridge.commands import command_id, decode_command, salvage_ids, sandbox_of
from adapter.bridge.leases import Tenure
from adapter.bridge.parts import Parts
from adapter.bridge.receipts import Address
from adapter.bridge.record import CommandRef
from adapter.bridge.sending import CommandResult, QueuedCommand, crashed_result, unread, unreadable_result
from adapter.contract import messages as contract
from adapter.contract.names import H_COMMAND, H_MSG_ID, H_ORIGINAL, UNROUTED, forwardable_headers
from adapter.errors import BusRefused, Crashed, LeaseLost, Refused, Unreadable
from adapter.ports import BusMessage, Delivery
from adapter.tools.tasks import TaskSet

log = structlog.get_logger()

T = TypeVar("T")

BATCH = 32
"""Most commands that end together."""


_Routed: TypeAlias = tuple[QueuedCommand, CommandResult | None]
"""A command in hand, and how it ends here; None: it is copied."""
_Queue: TypeAlias = dict[int, _Routed]
"""The commands of one sandbox that are not settled, in order, by sequence."""


class Router:
    """Copies commands to the subjects of their sandboxes, during one tenure of partition 0."""

    def __init__(self, parts: Parts, tenure: Tenure) -> None:
        self._parts = parts
        self._tenure = tenure
        self._queues: dict[str, _Queue] = {}
        """By sandbox. Each has a task."""
        self._tasks = TaskSet("routing")
        self._key = secrets.token_bytes(32)

    def on_delivery(self, delivery: Delivery) -> None:
        """Takes a command. One that is in hand already is not taken again."""
        command, result = self._read(delivery)
        if (queue := self._queues.get(command.sandbox)) is None:
            queue = self._queues[command.sandbox] = {}
            self._tasks.spawn(self._run(command.sandbox, queue))
        known, _ = queue.setdefault(delivery.seq, (command, result))
        known.delivery = delivery  # the acknowledgement of the latest one counts
        if known is command and result is not None:
            self._parts.metrics.schema_violations.labels(kind="out").inc()

    def stop(self) -> None:
        """Stops at once. What is not acknowledged is delivered to the next owner."""
        self._tasks.cancel_all()

    def _read(self, delivery: Delivery) -> _Routed:
        """A command with its sandbox and how it ends, as far as it can be read."""
        ref = CommandRef(sequence=delivery.seq, stored_ms=delivery.time_ms, id="")
        sandbox, body, result = UNROUTED, contract.Outbound(), None
        try:
            try:
                body = decode_command(delivery.data, self._parts.limits)
                sandbox = sandbox_of(body)
            except (Refused, Unreadable) as exc:
                result, body = unreadable_result(exc), salvage_ids(delivery.data, self._parts.limits)
                sandbox = body.sandbox or UNROUTED
        except Exception:
            log.exception("delivery.crashed", sequence=delivery.seq)
            result = crashed_result(Crashed())
        command = unread(delivery, ref, sandbox)
        ident = command_id(body.id, "", delivery.headers.get(H_MSG_ID, ""), delivery.seq)
        command.ref = msgspec.structs.replace(ref, id=ident)
        return command, result

    async def _run(self, sandbox: str, queue: _Queue) -> None:
        """Works until the queue is empty. Ends early if another replica may route."""
        try:
            while queue:
                batch = [*islice(queue.values(), BATCH)]
                results = [(command, await self._route(command, result)) for command, result in batch]
                # together: a flood that is refused must not hold up what is behind it for others
                await asyncio.gather(*(self._end(command, result) for command, result in results if result))
                for command, _ in batch:
                    del queue[command.sequence]
        except LeaseLost as exc:  # what is not acknowledged is delivered again
            log.info("routing.fenced", reason=exc.reason)
        finally:
            del self._queues[sandbox]

    async def _route(self, command: QueuedCommand, result: CommandResult | None) -> CommandResult | None:
        """Copies a command, or returns how it ends."""
        try:
            copy = partial(self._copy, command)
            return result or await self._tenure.persist(copy, "routing", sandbox=command.sandbox)
        except Crashed as exc:
            return crashed_result(exc)

    async def _copy(self, command: QueuedCommand) -> CommandResult | None:
        """Copies and acknowledges a command. Returns how it ends if the copy is refused."""
        try:
            await self._parts.bus.store(self._copy_of(command))
        except BusRefused as exc:
            return CommandResult("refused", "quota", f"The sandbox's queue refuses it: {exc.detail}")
        await command.delivery.ack()
        return None

    def _copy_of(self, command: QueuedCommand) -> BusMessage:
        """The copy of a command.

        Its Nats-Msg-Id is a secret of this router until it is stored. Ids are unique in the stream, so who foretold
        one could publish it first and have the copy dropped. The server shows a stream's last id to every publisher
        that expects another one (Nats-Expected-Last-Msg-Id), so an id must not reveal the next.
        """
        ref, delivery = command.ref, command.delivery
        ident = hashlib.blake2b(str(ref.sequence).encode(), key=self._key, digest_size=16).hexdigest()
        own = {
            H_COMMAND: ref.id,
            H_ORIGINAL: f"{ref.sequence}.{ref.stored_ms}",
            H_MSG_ID: f"routed:{ident}",
        }
        headers = forwardable_headers(delivery.headers) | own
        subject = self._parts.names.out(command.sandbox)
        return BusMessage("out", subject, delivery.data, headers, ensure_owner=self._tenure.check)

    async def _end(self, command: QueuedCommand, result: CommandResult) -> None:
        """Ends a command. If that raises in every attempt, the command stays unsettled and is redelivered."""
        tell = partial(self._parts.receipts.tell, command, result, Address(command.sandbox), self._tenure.check)
        try:
            await self._tenure.persist(tell, "routing", sandbox=command.sandbox)
        except Crashed:
            log.error("command.abandoned", sandbox=command.sandbox)
            return
        self._parts.metrics.outbound_received.inc()  # a copy is counted on its arrival
        await command.delivery.ack()
