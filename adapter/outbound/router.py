"""Copies commands from plain `wechat.out` to `wechat.out.<sandbox>`, in order.

The owner of shard 0 runs the router; the wiring calls `route` for each delivery. A delivery takes these steps:

1. Its sandbox and id are read. A command without a valid sandbox, or that is unreadable, ends here with a receipt or
   a dead letter.
2. It waits for its turn in its sandbox. One batch of copies is in flight for each sandbox: if the stream's leader
   fails, a copy may be lost while the new leader stores a later one.
3. The copy is published with the original's sequence, time and id in its headers, and the original is acknowledged.

A copy gets its Nats-Msg-Id from the original, so that a copy after a crash is dropped as a duplicate. The stream may
have forgotten that id after a pause of the lease. Such a copy is marked (H_COPIED_AGAIN), and its conversation drops
it if it is one. The router never splits, merges or sends commands.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from weakref import WeakValueDictionary

import structlog

from adapter.contract import messages as contract
from adapter.contract.headers import author_traceparent, command_traceparent, forwardable_headers
from adapter.contract.names import H_COMMAND, H_COPIED_AGAIN, H_MSG_ID, H_SEQUENCE, H_SINCE_MS, UNROUTED, Names
from adapter.conversation.commands import Limits, command_id, decode_command, salvage_ids, sandbox_of
from adapter.conversation.record import CommandRef
from adapter.conversation.rules import CommandResult
from adapter.errors import AdapterError, BusRefused, Crashed, LeaseLost, Refused, Temporary, Unreadable
from adapter.kit.crashes import ATTEMPTS, PAUSE_S, retry_on_bug, retry_on_bug_now
from adapter.kit.timing import LEASE_RETRY_S, Clock
from adapter.observability.events import Events
from adapter.observability.metrics import Metrics
from adapter.outbound.receipts import Address, Receipts, is_final
from adapter.ports import Bus, Delivery, Message

log = structlog.get_logger()

BATCH, BATCH_BYTES = 32, 32 * 1024
"""Most copies in one batch, and bytes of them; one copy is always taken. A server reads as much at once."""


_CRASHED = CommandResult("dead_lettered", "crashed", Crashed().detail)


class _Copy(NamedTuple):
    delivery: Delivery
    ident: str
    message: Message


class _Ending(NamedTuple):
    """The end of a command that is not copied."""

    sandbox: str
    ident: str
    result: CommandResult


class _SandboxQueue:
    """The queue of one sandbox, and the lock of its batch in flight."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self._waiting: deque[_Copy] = deque()

    def add(self, copy: _Copy) -> None:
        self._waiting.append(copy)

    def batch(self) -> list[_Copy]:
        """The next batch; empty: other deliveries have taken the copies along."""
        batch: list[_Copy] = []
        size = 0
        while self._waiting and len(batch) < BATCH:
            size += len(self._waiting[0].message.payload)
            if batch and size > BATCH_BYTES:
                break
            batch.append(self._waiting.popleft())
        return batch


class Router:
    """Copies commands to the subjects of their sandboxes."""

    def __init__(
        self,
        bus: Bus,
        receipts: Receipts,
        events: Events,
        names: Names,
        limits: Limits,
        check: Callable[[], None],
        owns: Callable[[], bool],
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._bus = bus
        self._receipts = receipts
        self._events = events
        self._names = names
        self._limits = limits
        self._check = check
        """Raises LeaseLost if another replica may route now."""
        self._owns = owns
        """Whether this replica may route again once its lease is valid."""
        self._clock = clock
        self._metrics = metrics
        self._queues: WeakValueDictionary[str, _SandboxQueue] = WeakValueDictionary()
        """By sandbox."""

    async def route(self, delivery: Delivery) -> None:
        """Copies a command to its sandbox's subject, or ends it with a receipt; then settles it.

        Raises LeaseLost if another replica has become the owner.

        The copy's Nats-Msg-Id is a digest of position, id and body. Ids are unique in the stream, so a sandbox that
        guessed the id could publish it first and have the copy dropped. The server shows a stream's last id to every
        publisher that expects another one (Nats-Expected-Last-Msg-Id), so the id must not reveal the command.
        """
        try:
            read = self._read(delivery)
        except Exception:
            log.exception("delivery.crashed", sequence=delivery.seq)
            read = self._retry_read(delivery)
        if isinstance(read, _Ending):
            await self._end_or_abandon(delivery, *read)
            return
        sandbox, copy = read
        queue = self._queues.setdefault(sandbox, _SandboxQueue())
        queue.add(copy)
        async with queue.lock:
            batch = queue.batch()
            try:
                await self._copy_batch(sandbox, batch)
            except AdapterError:
                raise
            except Exception:
                log.exception("routing.crashed", sandbox=sandbox)
                await self._copy_one_by_one(sandbox, batch)

    def _retry_read(self, delivery: Delivery) -> tuple[str, _Copy] | _Ending:
        """Retries `_read` after it raised. A command on which it raises in every attempt ends, under its own id if
        that can be read."""
        try:
            read = partial(self._read, delivery)
            return retry_on_bug_now(read, "delivery.crashed", tries=ATTEMPTS - 1, sequence=delivery.seq)
        except Crashed:
            pass  # logged
        body = contract.Outbound()
        try:
            body = salvage_ids(delivery.data, self._limits)
            ident = _command_id(delivery, body)
        except Exception:
            log.exception("delivery.crashed", sequence=delivery.seq)
            ident = body.id or str(delivery.seq)
        return _Ending(body.sandbox or UNROUTED, ident, _CRASHED)

    def _read(self, delivery: Delivery) -> tuple[str, _Copy] | _Ending:
        """The sandbox and copy of a command, or its end."""
        body = contract.Outbound()
        try:
            body = decode_command(delivery.data, self._limits)
            sandbox = sandbox_of(body)
        except (Unreadable, Refused) as exc:
            self._metrics.schema_violations.labels(kind="out").inc()
            dead = isinstance(exc, Unreadable)
            body = salvage_ids(delivery.data, self._limits) if dead else body
            told_to = (body.sandbox if dead else None) or UNROUTED
            result = CommandResult("dead_lettered" if dead else "refused", exc.reason, exc.detail)
            return _Ending(told_to, _command_id(delivery, body), result)
        ident = _command_id(delivery, body)
        identity = f"{delivery.seq}:{delivery.time_ms}:{ident}:".encode()
        words = hashlib.blake2b(identity + delivery.data, digest_size=16).hexdigest()
        headers = forwardable_headers(delivery.headers) | {
            H_MSG_ID: f"routed:{words}",
            H_COMMAND: ident,
            H_SEQUENCE: str(delivery.seq),
            H_SINCE_MS: str(delivery.time_ms),
        }
        if delivery.redelivered:
            headers[H_COPIED_AGAIN] = "1"
        message = Message("out", self._names.out(sandbox), delivery.data, headers, ensure_owner=self._check)
        return sandbox, _Copy(delivery, ident, message)

    async def _copy_batch(self, sandbox: str, copies: list[_Copy]) -> None:
        """Copies a batch, even after a long pause of the lease: later commands must not overtake it. Raises LeaseLost
        if another replica may route."""
        while True:
            try:
                return await self._copy(sandbox, copies)
            except LeaseLost as exc:
                log.info("routing.fenced", reason=exc.reason)
                if not await self._is_lease_back():
                    raise
                for copy in copies:
                    # the stream may have forgotten the id of the first copy
                    copy.message.headers[H_COPIED_AGAIN] = "1"

    async def _is_lease_back(self) -> bool:
        while self._owns():
            try:
                self._check()
            except LeaseLost:
                await self._clock.sleep(LEASE_RETRY_S)
            else:
                return True
        return False

    async def _copy_one_by_one(self, sandbox: str, batch: list[_Copy]) -> None:
        """Copies a batch one by one after it raised. A command that raises in every attempt ends."""
        await self._clock.sleep(PAUSE_S)
        for copy in batch.copy():
            try:
                alone = partial(self._copy, sandbox, [copy])
                await retry_on_bug(alone, self._clock.sleep, "routing.crashed", tries=ATTEMPTS - 1, sandbox=sandbox)
            except Crashed:
                await self._end_or_abandon(copy.delivery, sandbox, copy.ident, _CRASHED)

    async def _copy(self, sandbox: str, copies: list[_Copy]) -> None:
        """Copies a batch, and removes the finished copies from it."""
        for copy in copies.copy():
            # it was refused before; a copy now would be a second result
            if await self._has_ended(copy.delivery, sandbox, copy.ident):
                copies.remove(copy)
                await copy.delivery.ack()
        answers = await self._bus.publish_all([copy.message for copy in copies])
        refused = []
        for copy, answer in zip(copies.copy(), answers, strict=True):
            if isinstance(answer, BusRefused):
                refused.append((copy, answer))
            else:
                copies.remove(copy)
                await copy.delivery.ack()
        if refused:
            await asyncio.gather(*(self._refuse(copy, sandbox, answer, copies) for copy, answer in refused))

    async def _refuse(self, copy: _Copy, sandbox: str, answer: BusRefused, copies: list[_Copy]) -> None:
        copies.remove(copy)
        detail = f"The sandbox's queue refuses it: {answer.detail}"
        await self._end_or_abandon(copy.delivery, sandbox, copy.ident, CommandResult("refused", "backlog", detail))

    async def _has_ended(self, delivery: Delivery, sandbox: str, ident: str) -> bool:
        """Whether a redelivered command has a final receipt from the router."""
        while delivery.redelivered:
            try:
                found = await self._receipts.find(sandbox, [_ref(delivery, ident)])
                return any(is_final(stored.receipt) for stored in found.values())
            except Temporary as exc:
                log.warning("router.retrying", reason=exc.reason)
                await self._clock.sleep(0.5)
        return False

    async def _end_or_abandon(self, delivery: Delivery, sandbox: str, ident: str, result: CommandResult) -> None:
        """Ends a command. If that raises in every attempt, the command stays unsettled and is redelivered."""
        work = partial(self._end, delivery, sandbox, ident, result)
        try:
            await retry_on_bug(work, self._clock.sleep, "routing.crashed", sandbox=sandbox)
        except Crashed:
            log.error("command.abandoned", sandbox=sandbox)

    async def _end(self, delivery: Delivery, sandbox: str, ident: str, result: CommandResult) -> None:
        if await self._has_ended(delivery, sandbox, ident):
            await delivery.ack()
            return
        if not delivery.redelivered:
            self._metrics.outbound_received.inc()  # a copy is counted on its arrival
        if result.outcome == "dead_lettered":
            await self._events.publish_dead_letter(
                "OUT",
                delivery.data,
                subject=self._names.out_plain,
                headers=delivery.headers | {H_COMMAND: ident},
                reason=result.reason,
                detail=result.detail,
                msg_id=f"dead:routed-{delivery.seq}-{delivery.time_ms}",
                sandbox=sandbox,
            )
        address = Address(sandbox)
        author = author_traceparent(delivery.headers)
        trace = command_traceparent(author, sandbox, delivery.seq, delivery.time_ms, "")
        await self._receipts.publish(_ref(delivery, ident), result, address, contract.Window(), trace)
        self._metrics.outbound_messages.child("unreadable", result.outcome, result.reason or "none").inc()
        await delivery.ack()


def _ref(delivery: Delivery, ident: str) -> CommandRef:
    return CommandRef(sequence=delivery.seq, stored_ms=delivery.time_ms, id=ident)


def _command_id(delivery: Delivery, body: contract.Outbound) -> str:
    return command_id(body.id, "", delivery.headers.get(H_MSG_ID, ""), delivery.seq)
