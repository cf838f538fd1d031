"""Copies what services publish on plain `wechat.out` to `wechat.out.<sandbox>`, in order. Owned with shard 0."""

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
from adapter.contract.headers import forwardable_headers
from adapter.contract.names import H_COMMAND, H_COPIED_AGAIN, H_MSG_ID, H_SEQUENCE, H_SINCE_MS, UNROUTED, Names
from adapter.conversation.commands import Limits, command_id, decode_command, salvage_ids, sandbox_of
from adapter.conversation.record import CommandRef
from adapter.conversation.rules import CommandResult
from adapter.errors import AdapterError, BusRefused, Crashed, LeaseLost, Refused, Temporary, Unreadable
from adapter.kit.crashes import ATTEMPTS, PAUSE_S, retry_on_bug, retry_on_bug_now
from adapter.kit.timing import Clock
from adapter.observability.events import Events
from adapter.observability.metrics import Metrics
from adapter.outbound.receipts import Address, Receipts, is_final
from adapter.ports import Bus, Delivery, Message

log = structlog.get_logger()

LEASE_LOOK_S = 0.2
PIECE, PIECE_BYTES = 32, 32 * 1024
"""Copies written in one piece, and bytes of them (one is taken, however large it is): what a server reads at once."""


_CRASHED = CommandResult("dead_lettered", "crashed", Crashed().detail)


class _Copy(NamedTuple):
    delivery: Delivery
    ident: str
    message: Message


class _Dead(NamedTuple):
    """How a command ends that is not copied."""

    sandbox: str
    ident: str
    result: CommandResult


class _Turn:
    """Whose turn it is to copy to a sandbox, and what waits for it, in order."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self._waiting: deque[_Copy] = deque()

    def add(self, copy: _Copy) -> None:
        self._waiting.append(copy)

    def piece(self) -> list[_Copy]:
        """The next copies; none where others have taken them along."""
        piece: list[_Copy] = []
        size = 0
        while self._waiting and len(piece) < PIECE:
            size += len(self._waiting[0].message.payload)
            if piece and size > PIECE_BYTES:
                break
            piece.append(self._waiting.popleft())
        return piece


class Router:
    """Handles one delivery. Of each sandbox one piece is out at a time: where the stream's leader goes, one copy may
    get lost on its way, and another that was written later be stored by the next leader."""

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
        """Raises LeaseLost where another replica may route at this moment."""
        self._owns = owns
        """Whether this replica may route again once its lease is valid."""
        self._clock = clock
        self._metrics = metrics
        self._turns: WeakValueDictionary[str, _Turn] = WeakValueDictionary()
        """By sandbox."""

    async def route(self, delivery: Delivery) -> None:
        """Copies a command to its sandbox's subject, or ends it with a receipt; then settles it.

        Raises LeaseLost where another replica has become the owner: the stream may have forgotten its copy.

        The copy's Nats-Msg-Id is derived: ids are stream-wide, and a copy after a crash must not become a second
        command. It follows from the words, too: a sandbox that guessed it could use it first, and the copy would be
        dropped as a repeat. Nothing of the command stands in it: the server tells a stream's last id to every
        publisher who expects another (Nats-Expected-Last-Msg-Id).
        """
        try:
            read = self._read(delivery)
        except Exception:
            log.exception("delivery.crashed", sequence=delivery.seq)
            read = self._read_again(delivery)
        if isinstance(read, _Dead):
            await self._end_surely(delivery, *read)
            return
        sandbox, copy = read
        turn = self._turns.setdefault(sandbox, _Turn())
        turn.add(copy)
        async with turn.lock:
            piece = turn.piece()
            try:
                await self._copy_in_turn(sandbox, piece)
            except AdapterError:
                raise
            except Exception:
                log.exception("routing.crashed", sandbox=sandbox)
                await self._copy_apart(sandbox, piece)

    def _read_again(self, delivery: Delivery) -> tuple[str, _Copy] | _Dead:
        """As `_read`, once that has raised; it ends a command on which it goes on raising, under the command's own id
        where that can be told."""
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
        return _Dead(body.sandbox or UNROUTED, ident, _CRASHED)

    def _read(self, delivery: Delivery) -> tuple[str, _Copy] | _Dead:
        """A command's sandbox and its copy, or how it ends."""
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
            return _Dead(told_to, _command_id(delivery, body), result)
        ident = _command_id(delivery, body)
        which = f"{delivery.seq}:{delivery.time_ms}:{ident}:".encode()
        words = hashlib.blake2b(which + delivery.data, digest_size=16).hexdigest()
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

    async def _copy_in_turn(self, sandbox: str, left: list[_Copy]) -> None:
        """Copies what is left, also after a pause of the lease, however long: given up, it would come again behind
        the next ones. Raises LeaseLost once another replica may route."""
        while True:
            try:
                return await self._copy(sandbox, left)
            except LeaseLost as exc:
                log.info("routing.fenced", reason=exc.reason)
                if not await self._is_lease_back():
                    raise
                for copy in left:
                    copy.message.headers[H_COPIED_AGAIN] = "1"  # the stream may have forgotten the first one's id

    async def _is_lease_back(self) -> bool:
        while self._owns():
            try:
                self._check()
            except LeaseLost:
                await self._clock.sleep(LEASE_LOOK_S)
            else:
                return True
        return False

    async def _copy_apart(self, sandbox: str, piece: list[_Copy]) -> None:
        """Copies what is left one after the other, since one of them made the code raise: one that does so at every
        try ends."""
        await self._clock.sleep(PAUSE_S)
        for copy in piece.copy():
            try:
                alone = partial(self._copy, sandbox, [copy])
                await retry_on_bug(alone, self._clock.sleep, "routing.crashed", tries=ATTEMPTS - 1, sandbox=sandbox)
            except Crashed:
                await self._end_surely(copy.delivery, sandbox, copy.ident, _CRASHED)

    async def _copy(self, sandbox: str, left: list[_Copy]) -> None:
        """Copies what is left, and takes out of it what need not be copied any more."""
        for copy in left.copy():
            if await self._has_ended(copy.delivery, sandbox, copy.ident):  # refused; now there may be room
                left.remove(copy)
                await copy.delivery.ack()
        answers = await self._bus.publish_all([copy.message for copy in left])
        refused = []
        for copy, answer in zip(left.copy(), answers, strict=True):
            if isinstance(answer, BusRefused):
                refused.append((copy, answer))
            else:
                left.remove(copy)
                await copy.delivery.ack()
        if refused:
            await asyncio.gather(*(self._refuse(copy, sandbox, answer, left) for copy, answer in refused))

    async def _refuse(self, copy: _Copy, sandbox: str, answer: BusRefused, left: list[_Copy]) -> None:
        left.remove(copy)
        detail = f"The sandbox's queue does not take it: {answer.detail}"
        await self._end_surely(copy.delivery, sandbox, copy.ident, CommandResult("refused", "backlog", detail))

    async def _has_ended(self, delivery: Delivery, sandbox: str, ident: str) -> bool:
        """Whether a command that was delivered before has had its receipt from here."""
        while delivery.redelivered:
            try:
                found = await self._receipts.find(sandbox, [_ref(delivery, ident)])
                return any(is_final(stored.receipt) for stored in found.values())
            except Temporary as exc:
                log.warning("router.retrying", reason=exc.reason)
                await self._clock.sleep(0.5)
        return False

    async def _end_surely(self, delivery: Delivery, sandbox: str, ident: str, result: CommandResult) -> None:
        """Ends a command. Where that raises at every try, it stays on the bus, unsettled, and comes again."""
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
            self._metrics.outbound_taken.inc()  # a copy is counted where it arrives, what ends here is here
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
        await self._receipts.publish(_ref(delivery, ident), result, address, contract.Window(), delivery.headers)
        self._metrics.outbound_messages.child("unreadable", result.outcome, result.reason or "none").inc()
        await delivery.ack()


def _ref(delivery: Delivery, ident: str) -> CommandRef:
    return CommandRef(sequence=delivery.seq, stored_ms=delivery.time_ms, id=ident)


def _command_id(delivery: Delivery, body: contract.Outbound) -> str:
    return command_id(body.id, "", delivery.headers.get(H_MSG_ID, ""), delivery.seq)
