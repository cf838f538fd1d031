"""Moves what services publish on plain `wechat.out` to `wechat.out.<sandbox>`, in order. Owned with shard 0."""

from __future__ import annotations

import asyncio
import hashlib
from weakref import WeakValueDictionary

import structlog

from adapter import contract
from adapter.commands import Command, Limits, command_id, passed_on, peek, sandbox_of, stand_in
from adapter.errors import BusRefused, Refused, Temporary, Unreadable
from adapter.metrics import Metrics
from adapter.names import H_COMMAND, H_MSG_ID, UNROUTED, Names
from adapter.ports import Bus, Delivery, Message
from adapter.receipts import Receipts
from adapter.sending import Ending
from adapter.timing import Clock

log = structlog.get_logger()


class Router:
    """Handles one delivery. Of each sandbox one copy is out at a time: where the stream's leader goes, one may get
    lost on its way, and another that was written after it be stored by the next leader."""

    def __init__(
        self, bus: Bus, receipts: Receipts, names: Names, limits: Limits, clock: Clock, metrics: Metrics
    ) -> None:
        self._bus = bus
        self._receipts = receipts
        self._names = names
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By sandbox."""

    async def route(self, delivery: Delivery) -> None:
        """Copies a command to its sandbox's subject, or ends it with a receipt; then settles it.

        The copy's Nats-Msg-Id is derived: ids are stream-wide, and a copy after a crash must not become a second
        command. It follows from the words, too: a sandbox that guessed it could use it first, and the copy would be
        dropped as a repeat.
        """
        ident = ""
        try:
            body = peek(delivery.data, self._limits)
            ident = command_id(body.id, "", delivery.headers.get(H_MSG_ID, ""), delivery.seq)
            sandbox = sandbox_of(body)
        except (Unreadable, Refused) as exc:
            self._metrics.schema_violations.labels(kind="out").inc()
            ident = ident or command_id(None, "", delivery.headers.get(H_MSG_ID, ""), delivery.seq)
            dead = isinstance(exc, Unreadable)
            await self._end(
                delivery, UNROUTED, ident, Ending("dead_lettered" if dead else "refused", exc.reason, exc.detail)
            )
            return
        words = hashlib.blake2b(delivery.data, digest_size=12).hexdigest()
        headers = passed_on(delivery.headers) | {
            H_MSG_ID: f"routed:{delivery.seq}:{delivery.time_ms}:{words}:{ident}",
            H_COMMAND: ident,
        }
        async with self._turns.setdefault(sandbox, asyncio.Lock()):
            if await self._has_ended(delivery, sandbox, ident):  # it was refused, and now there may be room
                await delivery.ack()
                return
            try:
                await self._bus.publish(Message("out", self._names.out(sandbox), delivery.data, headers))
            except BusRefused as exc:
                detail = f"The sandbox's queue does not take it: {exc.detail}"
                await self._end(delivery, sandbox, ident, Ending("refused", "backlog", detail))
                return
        await delivery.ack()

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
        )
        await delivery.ack()


def _named(delivery: Delivery, sandbox: str, ident: str) -> Command:
    """A command that ends here."""
    return stand_in(ident, f"routed-{delivery.seq}-{delivery.time_ms}", sandbox, delivery.time_ms)
