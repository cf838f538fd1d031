"""Copies commands from plain `wechat.out` to `wechat.out.<sandbox>`, in order.

The owner of partition 0 runs the router. Each sandbox has a queue of its commands, and a task while something is in
it. The task takes a batch, stores one copy after the other, and acknowledges the originals. One copy is in flight for
each sandbox: if the stream's leader fails, a copy may be lost while the new leader stores a later one. A command
without a valid sandbox, one that is unreadable, and one whose copy is refused, end with a receipt.

A copy that is repeated soon has the same Nats-Msg-Id, and the stream drops it. A later one becomes a second copy with
the same identity (`commands.copy_headers`), which its partition drops. The router never splits or sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import islice
from typing import TypeAlias, TypeVar

import msgspec
import structlog

from adapter.bridge.commands import command_id, copy_headers, decode_command, salvage_ids, sandbox_of
from adapter.bridge.parts import Parts
from adapter.bridge.receipts import Address, is_final
from adapter.bridge.record import CommandRef
from adapter.bridge.sending import CommandResult, QueuedCommand, unread, unreadable_result
from adapter.contract import messages as contract
from adapter.contract.names import H_MSG_ID, UNROUTED
from adapter.errors import BusRefused, Crashed, LeaseLost, Refused, Unreadable
from adapter.kit.persist import persist
from adapter.kit.tasks import TaskSet
from adapter.ownership.tenure import Tenure
from adapter.ports import BusMessage, Delivery

log = structlog.get_logger()

T = TypeVar("T")

BATCH = 32
"""Most commands whose receipts are asked for together."""


class _Routed(msgspec.Struct, eq=False):
    """A command in hand. The acknowledgement of its latest delivery counts."""

    command: QueuedCommand
    result: CommandResult | None = None
    """How it ends here; None: it is copied."""


_Queue: TypeAlias = dict[tuple[int, int], _Routed]
"""The commands of one sandbox that are not settled, in order, by sequence and stored time."""


class Router:
    """Copies commands to the subjects of their sandboxes, during one tenure of partition 0."""

    def __init__(self, parts: Parts, tenure: Tenure) -> None:
        self._parts = parts
        self._tenure = tenure
        self._queues: dict[str, _Queue] = {}
        """By sandbox. Each has a task."""
        self._tasks = TaskSet("routing")

    def on_delivery(self, delivery: Delivery) -> None:
        """Takes a command. One that is in hand already is not taken again."""
        routed = self._read(delivery)
        queue, command = self._queues.get(routed.command.sandbox), routed.command
        if queue is None:
            queue = self._queues[command.sandbox] = {}
            self._tasks.spawn(self._run(command.sandbox, queue))
        known = queue.setdefault((delivery.seq, delivery.time_ms), routed)
        known.command.delivery = delivery
        if known is routed and routed.result is not None:
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
            result = CommandResult("dead_lettered", "crashed", Crashed().detail)
        command = unread(delivery, ref, sandbox)
        ident = command_id(body.id, "", delivery.headers.get(H_MSG_ID, ""), delivery.seq)
        command.ref = msgspec.structs.replace(ref, id=ident)
        return _Routed(command, result)

    async def _run(self, sandbox: str, queue: _Queue) -> None:
        """Works until the queue is empty. Ends early if another replica may route."""
        try:
            while queue:
                batch = [*islice(queue.values(), BATCH)]
                ended, ending = set[int](), list[tuple[QueuedCommand, CommandResult]]()
                with contextlib.suppress(Crashed):  # the owner of the copies asks, too
                    ended = await self._persist(partial(self._ended, sandbox, batch), sandbox)
                for routed in batch:
                    if routed.command.sequence in ended:
                        await routed.command.delivery.ack()
                    elif (result := await self._route(routed)) is not None:
                        ending.append((routed.command, result))
                # together: a flood that is refused must not hold up what is behind it for others
                await asyncio.gather(*(self._end(*each) for each in ending))
                for routed in batch:
                    del queue[routed.command.sequence, routed.command.ref.stored_ms]
        except LeaseLost as exc:  # what is not acknowledged is delivered again
            log.info("routing.fenced", reason=exc.reason)
        finally:
            del self._queues[sandbox]

    async def _ended(self, sandbox: str, batch: list[_Routed]) -> set[int]:
        """The sequences of commands that were delivered before and have ended: a copy would be a second result."""
        redelivered = [routed.command.ref for routed in batch if routed.command.delivery.is_old]
        found = await self._parts.receipts.find(sandbox, redelivered) if redelivered else {}
        return {sequence for sequence, stored in found.items() if is_final(stored.receipt)}

    async def _route(self, routed: _Routed) -> CommandResult | None:
        """Copies a command, or returns how it ends."""
        command = routed.command
        try:
            return routed.result or await self._persist(partial(self._copy, command), command.sandbox)
        except Crashed as exc:
            return CommandResult("dead_lettered", exc.reason, exc.detail)

    async def _copy(self, command: QueuedCommand) -> CommandResult | None:
        """Copies and acknowledges a command. Returns how it ends if the copy is refused."""
        try:
            await self._parts.bus.store(self._copy_of(command))
        except BusRefused as exc:
            return CommandResult("refused", "backlog", f"The sandbox's queue refuses it: {exc.detail}")
        await command.delivery.ack()
        return None

    def _copy_of(self, command: QueuedCommand) -> BusMessage:
        """The copy of a command.

        Its Nats-Msg-Id is a digest of position and body. Ids are unique in the stream, so a sandbox that guessed the
        id could publish it first and have the copy dropped. The server shows a stream's last id to every publisher
        that expects another one (Nats-Expected-Last-Msg-Id), so the id must not reveal the command.
        """
        delivery, ref, sandbox = command.delivery, command.ref, command.sandbox
        position = f"{ref.sequence}:{ref.stored_ms}:".encode()
        words = hashlib.blake2b(position + delivery.data, digest_size=16).hexdigest()
        headers = copy_headers(ref, delivery.headers, delivery.data, sandbox, self._parts.sealer)
        headers[H_MSG_ID] = f"routed:{words}"
        subject = self._parts.names.out(sandbox)
        return BusMessage("out", subject, delivery.data, headers, ensure_owner=self._tenure.check)

    async def _end(self, command: QueuedCommand, result: CommandResult) -> None:
        """Ends a command. If that raises in every attempt, the command stays unsettled and is redelivered."""
        tell = partial(self._parts.receipts.tell, command, result, Address(command.sandbox), self._tenure.check)
        try:
            await self._persist(tell, command.sandbox)
        except Crashed:
            log.error("command.abandoned", sandbox=command.sandbox)
            return
        self._parts.metrics.outbound_received.inc()  # a copy is counted on its arrival
        await command.delivery.ack()

    def _persist(self, work: Callable[[], Awaitable[T]], sandbox: str) -> Awaitable[T]:
        """Raises LeaseLost, Crashed."""
        return persist(work, self._tenure, self._parts.clock, "routing", sandbox=sandbox)
