"""Copies commands from plain `wechat.out` to `wechat.out.<sandbox>`, in order.

The owner of shard 0 runs the router. Each sandbox has a queue of its commands, and a task while something is in it.
The task takes a batch, publishes the copies, waits until they are stored, and acknowledges the originals. One batch
is in flight for each sandbox: if the stream's leader fails, a copy may be lost while the new leader stores a later
one. A command without a valid sandbox, one that is unreadable, and one whose copy is refused, end with a receipt.

A copy that is repeated soon has the same Nats-Msg-Id, and the stream drops it. A later one becomes a second copy with
the same identity (`commands.copy_headers`), which its shard or conversation drops. The router never splits or sends.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import TypeAlias

import msgspec
import structlog

from adapter.bridge.commands import Limits, command_id, copy_headers, decode_command, salvage_ids, sandbox_of
from adapter.bridge.receipts import Address, Receipts, is_final
from adapter.bridge.record import CommandRef
from adapter.bridge.sending import CommandResult, QueuedCommand, unread, unreadable_result
from adapter.contract import messages as contract
from adapter.contract.names import H_MSG_ID, UNROUTED, Names
from adapter.errors import BusRefused, Crashed, LeaseLost, Refused, Unreadable
from adapter.kit.persist import persist
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import Clock
from adapter.observability.metrics import Metrics
from adapter.ownership.tenure import Tenure
from adapter.ports import Bus, BusMessage, Delivery
from adapter.security.seal import Sealer

log = structlog.get_logger()

BATCH, BATCH_BYTES = 32, 32 * 1024
"""Most copies in one batch, and bytes of them; one copy is always taken. A server reads as much at once."""


class _Routed(msgspec.Struct, eq=False):
    """A command in hand. The acknowledgement of its latest delivery counts."""

    command: QueuedCommand
    result: CommandResult | None = None
    """How it ends here; None: it is copied."""


_Queue: TypeAlias = dict[tuple[int, int], _Routed]
"""The commands of one sandbox that are not settled, in order, by sequence and stored time."""


class Router:
    """Copies commands to the subjects of their sandboxes, during one tenure of shard 0."""

    def __init__(
        self,
        bus: Bus,
        names: Names,
        receipts: Receipts,
        limits: Limits,
        sealer: Sealer,
        tenure: Tenure,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._bus = bus
        self._names = names
        self._receipts = receipts
        self._limits = limits
        self._sealer = sealer
        self._tenure = tenure
        self._clock = clock
        self._metrics = metrics
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
            self._metrics.schema_violations.labels(kind="out").inc()

    def stop(self) -> None:
        """Stops at once. What is not acknowledged is delivered to the next owner."""
        self._tasks.cancel_all()

    def _read(self, delivery: Delivery) -> _Routed:
        """A command with its sandbox and how it ends, as far as it can be read."""
        ref = CommandRef(sequence=delivery.seq, stored_ms=delivery.time_ms, id="")
        sandbox, body, result = UNROUTED, contract.Outbound(), None
        try:
            try:
                body = decode_command(delivery.data, self._limits)
                sandbox = sandbox_of(body)
            except (Refused, Unreadable) as exc:
                result, body = unreadable_result(exc), salvage_ids(delivery.data, self._limits)
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
                batch = _next_batch(queue.values())
                await self._route(sandbox, batch)
                for routed in batch:
                    del queue[routed.command.sequence, routed.command.ref.stored_ms]
        except LeaseLost as exc:
            log.info("routing.fenced", reason=exc.reason)
        finally:
            del self._queues[sandbox]

    async def _route(self, sandbox: str, batch: list[_Routed]) -> None:
        """Copies or ends each command of a batch. If that raises, one by one: only the one at fault ends."""
        copy = partial(self._copy, sandbox, batch)
        try:
            ending = await persist(copy, self._tenure, self._clock, "routing", sandbox=sandbox)
        except Crashed as exc:
            if len(batch) > 1:
                for routed in batch:
                    await self._route(sandbox, [routed])
                return
            ending = [(batch[0].command, CommandResult("dead_lettered", exc.reason, exc.detail))]
        # together: a flood that is refused must not hold up what is behind it for others
        await asyncio.gather(*(self._end(command, result) for command, result in ending))

    async def _copy(self, sandbox: str, batch: list[_Routed]) -> list[tuple[QueuedCommand, CommandResult]]:
        """Copies what can be copied, and acknowledges it. Returns the commands that end here."""
        redelivered = [routed.command.ref for routed in batch if routed.command.delivery.is_old]
        found = await self._receipts.find(sandbox, redelivered) if redelivered else {}
        # what has ended has a receipt: a copy now would be a second result
        ended = {sequence for sequence, stored in found.items() if is_final(stored.receipt)}
        going = [routed for routed in batch if routed.command.sequence not in ended]
        copies = [routed for routed in going if routed.result is None]
        answers = await self._bus.publish_all([self._copy_of(routed.command) for routed in copies])
        for routed, answer in zip(copies, answers, strict=True):
            if isinstance(answer, BusRefused):
                detail = f"The sandbox's queue refuses it: {answer.detail}"
                routed.result = CommandResult("refused", "backlog", detail)
        ending = [(routed.command, routed.result) for routed in going if routed.result is not None]
        for routed in batch:
            if routed.result is None or routed.command.sequence in ended:
                await routed.command.delivery.ack()
        return ending

    def _copy_of(self, command: QueuedCommand) -> BusMessage:
        """The copy of a command.

        Its Nats-Msg-Id is a digest of position and body. Ids are unique in the stream, so a sandbox that guessed the
        id could publish it first and have the copy dropped. The server shows a stream's last id to every publisher
        that expects another one (Nats-Expected-Last-Msg-Id), so the id must not reveal the command.
        """
        delivery, ref, sandbox = command.delivery, command.ref, command.sandbox
        position = f"{ref.sequence}:{ref.stored_ms}:".encode()
        words = hashlib.blake2b(position + delivery.data, digest_size=16).hexdigest()
        headers = copy_headers(ref, delivery.headers, delivery.data, sandbox, self._sealer)
        headers[H_MSG_ID] = f"routed:{words}"
        return BusMessage("out", self._names.out(sandbox), delivery.data, headers, ensure_owner=self._tenure.check)

    async def _end(self, command: QueuedCommand, result: CommandResult) -> None:
        """Ends a command. If that raises in every attempt, the command stays unsettled and is redelivered."""
        tell = partial(self._receipts.tell, command, result, Address(command.sandbox), self._tenure.check)
        try:
            await persist(tell, self._tenure, self._clock, "routing", sandbox=command.sandbox)
        except Crashed:
            log.error("command.abandoned", sandbox=command.sandbox)
            return
        self._metrics.outbound_received.inc()  # a copy is counted on its arrival
        await command.delivery.ack()


def _next_batch(waiting: Iterable[_Routed]) -> list[_Routed]:
    batch: list[_Routed] = []
    size = 0
    for routed in islice(waiting, BATCH):
        size += len(routed.command.delivery.data)
        if batch and size > BATCH_BYTES:
            break
        batch.append(routed)
    return batch
