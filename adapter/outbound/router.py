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

from adapter.contract import messages as contract
from adapter.contract.names import H_COMMAND, H_MSG_ID, UNROUTED, Names, author_traceparent, command_traceparent
from adapter.errors import BusRefused, Crashed, LeaseLost, Refused, Unreadable
from adapter.kit.persist import persist
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import Clock
from adapter.observability.events import Events
from adapter.observability.metrics import Metrics
from adapter.outbound.commands import Limits, command_id, copy_headers, decode_command, salvage_ids, sandbox_of
from adapter.outbound.receipts import Address, Receipts, is_final
from adapter.outbound.record import CommandRef
from adapter.outbound.sending import CommandResult
from adapter.ownership.tenure import Tenure
from adapter.ports import Bus, BusMessage, Delivery
from adapter.security.seal import Sealer

log = structlog.get_logger()

BATCH, BATCH_BYTES = 32, 32 * 1024
"""Most copies in one batch, and bytes of them; one copy is always taken. A server reads as much at once."""

_CRASHED = CommandResult("dead_lettered", "crashed", Crashed().detail)


class _Command(msgspec.Struct, eq=False):
    """A command in hand."""

    delivery: Delivery
    """The latest one, whose acknowledgement counts."""
    ref: CommandRef
    result: CommandResult | None = None
    """How it ends here; None: it is copied."""


_Queue: TypeAlias = dict[tuple[int, int], _Command]
"""The commands of one sandbox that are not settled, in order, by sequence and stored time."""


class Router:
    """Copies commands to the subjects of their sandboxes, during one tenure of shard 0."""

    def __init__(
        self,
        bus: Bus,
        events: Events,
        names: Names,
        receipts: Receipts,
        limits: Limits,
        sealer: Sealer,
        tenure: Tenure,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._bus = bus
        self._events = events
        self._names = names
        self._receipts = receipts
        self._limits = limits
        self._sealer = sealer
        self._tenure = tenure
        self._clock = clock
        self._metrics = metrics
        self._queues: dict[str, _Queue] = {}
        """By sandbox. Each has a task."""
        self._tasks = TaskSet(_report)

    def on_delivery(self, delivery: Delivery) -> None:
        """Takes a command. One that is in hand already is not taken again."""
        sandbox, command = self._read(delivery)
        queue = self._queues.get(sandbox)
        if queue is None:
            queue = self._queues[sandbox] = {}
            self._tasks.spawn(self._run(sandbox, queue))
        known = queue.setdefault((delivery.seq, delivery.time_ms), command)
        known.delivery = delivery
        if known is command and command.result not in (None, _CRASHED):
            self._metrics.schema_violations.labels(kind="out").inc()

    def stop(self) -> None:
        """Stops at once. What is not acknowledged is delivered to the next owner."""
        self._tasks.cancel_all()

    def _read(self, delivery: Delivery) -> tuple[str, _Command]:
        """A command and its sandbox, as far as they can be read."""
        result = _CRASHED
        try:
            body = decode_command(delivery.data, self._limits)
            return sandbox_of(body), _Command(delivery, _ref(delivery, body))
        except (Refused, Unreadable) as exc:
            result = CommandResult("refused" if isinstance(exc, Refused) else "dead_lettered", exc.reason, exc.detail)
        except Exception:
            log.exception("delivery.crashed", sequence=delivery.seq)
        try:
            body = salvage_ids(delivery.data, self._limits)
            return body.sandbox or UNROUTED, _Command(delivery, _ref(delivery, body), result)
        except Exception:
            log.exception("delivery.crashed", sequence=delivery.seq)
            body = contract.Outbound(id=str(delivery.seq))
            return UNROUTED, _Command(delivery, _ref(delivery, body), _CRASHED)

    async def _run(self, sandbox: str, queue: _Queue) -> None:
        """Works until the queue is empty. Ends early if another replica may route."""
        try:
            while queue:
                batch = _next_batch(queue.values())
                await self._route(sandbox, batch)
                for command in batch:
                    del queue[command.ref.sequence, command.ref.stored_ms]
        except LeaseLost as exc:
            log.info("routing.fenced", reason=exc.reason)
        finally:
            del self._queues[sandbox]

    async def _route(self, sandbox: str, batch: list[_Command]) -> None:
        """Copies or ends each command of a batch. If that raises, one by one: only the one at fault ends."""
        copy = partial(self._copy, sandbox, batch)
        try:
            ending = await persist(copy, self._tenure, self._clock, "routing", sandbox=sandbox)
        except Crashed:
            if len(batch) > 1:
                for command in batch:
                    await self._route(sandbox, [command])
                return
            batch[0].result = _CRASHED
            ending = batch
        # together: a flood that is refused must not hold up what is behind it for others
        await asyncio.gather(*(self._end_or_abandon(sandbox, command) for command in ending))

    async def _copy(self, sandbox: str, batch: list[_Command]) -> list[_Command]:
        """Copies what can be copied, and acknowledges it. Returns the commands that end here."""
        redelivered = [command.ref for command in batch if command.delivery.is_old]
        found = await self._receipts.find(sandbox, redelivered) if redelivered else {}
        # what has ended has a receipt: a copy now would be a second result
        ended = {sequence for sequence, stored in found.items() if is_final(stored.receipt)}
        going = [command for command in batch if command.ref.sequence not in ended]
        copies = [command for command in going if command.result is None]
        answers = await self._bus.publish_all([self._copy_of(sandbox, command) for command in copies])
        for command, answer in zip(copies, answers, strict=True):
            if isinstance(answer, BusRefused):
                detail = f"The sandbox's queue refuses it: {answer.detail}"
                command.result = CommandResult("refused", "backlog", detail)
        ending = [command for command in going if command.result is not None]
        for command in batch:
            if command not in ending:
                await command.delivery.ack()
        return ending

    def _copy_of(self, sandbox: str, command: _Command) -> BusMessage:
        """The copy of a command.

        Its Nats-Msg-Id is a digest of position and body. Ids are unique in the stream, so a sandbox that guessed the
        id could publish it first and have the copy dropped. The server shows a stream's last id to every publisher
        that expects another one (Nats-Expected-Last-Msg-Id), so the id must not reveal the command.
        """
        delivery, ref = command.delivery, command.ref
        position = f"{ref.sequence}:{ref.stored_ms}:".encode()
        words = hashlib.blake2b(position + delivery.data, digest_size=16).hexdigest()
        headers = copy_headers(ref, delivery.headers, delivery.data, sandbox, self._sealer)
        headers[H_MSG_ID] = f"routed:{words}"
        return BusMessage("out", self._names.out(sandbox), delivery.data, headers, ensure_owner=self._tenure.check)

    async def _end_or_abandon(self, sandbox: str, command: _Command) -> None:
        """Ends a command. If that raises in every attempt, the command stays unsettled and is redelivered."""
        work = partial(self._end, sandbox, command)
        try:
            await persist(work, self._tenure, self._clock, "routing", sandbox=sandbox)
        except Crashed:
            log.error("command.abandoned", sandbox=sandbox)

    async def _end(self, sandbox: str, command: _Command) -> None:
        """Publishes how a command ends, and acknowledges it."""
        self._tenure.check()
        ref, result, delivery = command.ref, command.result or _CRASHED, command.delivery
        if result.outcome == "dead_lettered":
            await self._events.publish_dead_letter(
                "OUT",
                delivery.data,
                subject=self._names.out_plain,
                headers=delivery.headers | {H_COMMAND: ref.id},
                reason=result.reason,
                detail=result.detail,
                msg_id=f"dead:routed-{ref.sequence}-{ref.stored_ms}",
                sandbox=sandbox,
            )
        trace = command_traceparent(author_traceparent(delivery.headers), sandbox, ref.sequence, ref.stored_ms, "")
        await self._receipts.publish(ref, result, Address(sandbox), contract.Window(), trace)
        self._metrics.outbound_received.inc()  # a copy is counted on its arrival
        self._metrics.outbound_messages.child("unreadable", result.outcome, result.reason or "none").inc()
        await command.delivery.ack()


def _next_batch(waiting: Iterable[_Command]) -> list[_Command]:
    batch: list[_Command] = []
    size = 0
    for command in islice(waiting, BATCH):
        size += len(command.delivery.data)
        if batch and size > BATCH_BYTES:
            break
        batch.append(command)
    return batch


def _ref(delivery: Delivery, body: contract.Outbound) -> CommandRef:
    ident = command_id(body.id, "", delivery.headers.get(H_MSG_ID, ""), delivery.seq)
    return CommandRef(sequence=delivery.seq, stored_ms=delivery.time_ms, id=ident)


def _report(exc: BaseException) -> None:
    log.error("task.crashed", task="routing", exc_info=exc)
