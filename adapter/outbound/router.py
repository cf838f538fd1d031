"""Copies what services publish on plain `wechat.out` to `wechat.out.<sandbox>`, in order. Owned with shard 0."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakValueDictionary

import structlog

from adapter import contract
from adapter.errors import BusRefused, Refused, Temporary, Unreadable
from adapter.headers import passed_on
from adapter.metrics import Metrics
from adapter.names import H_COMMAND, H_MSG_ID, H_SEQUENCE, H_SINCE_MS, UNROUTED, Names
from adapter.outbound.commands import Command, Limits, command_id, peek, remains, sandbox_of, stand_in
from adapter.outbound.endings import Ending
from adapter.outbound.receipts import Receipts
from adapter.ports import Bus, Delivery, Message
from adapter.timing import Clock

log = structlog.get_logger()


PIECE, PIECE_BYTES = 32, 32 * 1024
"""Copies written in one piece, and bytes of them (one is taken, however large it is): what a server reads at once."""


class _Copy(NamedTuple):
    delivery: Delivery
    ident: str
    message: Message


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
        names: Names,
        limits: Limits,
        check: Callable[[], None],
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._bus = bus
        self._receipts = receipts
        self._names = names
        self._limits = limits
        self._check = check
        """Raises LeaseLost where another replica may route at this moment."""
        self._clock = clock
        self._metrics = metrics
        self._turns: WeakValueDictionary[str, _Turn] = WeakValueDictionary()
        """By sandbox."""

    async def route(self, delivery: Delivery) -> None:
        """Copies a command to its sandbox's subject, or ends it with a receipt; then settles it.

        Raises LeaseLost where that took so long that the stream may have forgotten the next owner's copy.

        The copy's Nats-Msg-Id is derived: ids are stream-wide, and a copy after a crash must not become a second
        command. It follows from the words, too: a sandbox that guessed it could use it first, and the copy would be
        dropped as a repeat. Nothing of the command stands in it: the server tells a stream's last id to every
        publisher who expects another (Nats-Expected-Last-Msg-Id).
        """
        body = contract.Outbound()
        try:
            body = peek(delivery.data, self._limits)
            sandbox = sandbox_of(body)
        except (Unreadable, Refused) as exc:
            self._metrics.schema_violations.labels(kind="out").inc()
            dead = isinstance(exc, Unreadable)
            body = remains(delivery.data, self._limits) if dead else body
            told_to = (body.sandbox if dead else None) or UNROUTED
            ending = Ending("dead_lettered" if dead else "refused", exc.reason, exc.detail)
            await self._end(delivery, told_to, _ident(delivery, body), ending)
            return
        ident = _ident(delivery, body)
        which = f"{delivery.seq}:{delivery.time_ms}:{ident}:".encode()
        words = hashlib.blake2b(which + delivery.data, digest_size=16).hexdigest()
        headers = passed_on(delivery.headers) | {
            H_MSG_ID: f"routed:{words}",
            H_COMMAND: ident,
            H_SINCE_MS: str(delivery.time_ms),
            H_SEQUENCE: str(delivery.seq),
        }
        message = Message("out", self._names.out(sandbox), delivery.data, headers, late=self._check)
        turn = self._turns.setdefault(sandbox, _Turn())
        turn.add(_Copy(delivery, ident, message))
        async with turn.lock:
            await self._copy(sandbox, turn.piece())

    async def _copy(self, sandbox: str, piece: list[_Copy]) -> None:
        new = []
        for copy in piece:
            if await self._has_ended(copy.delivery, sandbox, copy.ident):  # refused; now there may be room
                await copy.delivery.ack()
            else:
                new.append(copy)
        refused = []
        for copy, answer in zip(new, await self._bus.publish_all([copy.message for copy in new]), strict=True):
            if isinstance(answer, BusRefused):
                refused.append(self._refuse(copy, sandbox, answer))
            else:
                await copy.delivery.ack()
        await asyncio.gather(*refused)

    async def _refuse(self, copy: _Copy, sandbox: str, answer: BusRefused) -> None:
        detail = f"The sandbox's queue does not take it: {answer.detail}"
        await self._end(copy.delivery, sandbox, copy.ident, Ending("refused", "backlog", detail))

    async def _has_ended(self, delivery: Delivery, sandbox: str, ident: str) -> bool:
        """Whether a command that was delivered before has had its receipt from here."""
        while delivery.suspect:
            try:
                return await self._receipts.has_final(_named(delivery, sandbox, ident))
            except Temporary as exc:
                log.warning("router.waits", reason=exc.reason)
                await self._clock.sleep(0.5)
        return False

    async def _end(self, delivery: Delivery, sandbox: str, ident: str, ending: Ending) -> None:
        if await self._has_ended(delivery, sandbox, ident):
            await delivery.ack()
            return
        if not delivery.suspect:
            self._metrics.outbound_taken.inc()  # a copy is counted where it arrives, what ends here is here
        await self._receipts.final(
            _named(delivery, sandbox, ident),
            ending,
            bot="",
            user="",
            shown=contract.Window(),
            original=(delivery.data, delivery.headers, self._names.out_plain),
            late=self._check,
        )
        await delivery.ack()


def _ident(delivery: Delivery, body: contract.Outbound) -> str:
    return command_id(body.id, "", delivery.headers.get(H_MSG_ID, ""), delivery.seq)


def _named(delivery: Delivery, sandbox: str, ident: str) -> Command:
    """A command that ends here."""
    return stand_in(ident, f"routed-{delivery.seq}-{delivery.time_ms}", sandbox, delivery.time_ms)
