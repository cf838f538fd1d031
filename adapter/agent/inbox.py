"""The deliveries of a sandbox's durable consumer, for a client that may only pull and acknowledge.

A delivery stays open until `finish` acknowledges it; meanwhile in-progress acks keep it alive. A redelivery of an
open or finished message is ignored. Deliveries are handed out in the order of the stream.

The server redelivers an unacknowledged message after ACK_WAIT_S, and delivers newer messages meanwhile. If there may
be such messages, because a connection broke or an earlier process died, nothing is handed out for that time (`hold`),
so that the order is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import msgspec
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import ConnectionClosedError
from nats.errors import Error as NatsError

from adapter.contract.messages import Inbound, InboundItem
from adapter.contract.names import Names
from adapter.errors import UNDECODABLE
from adapter.kit.timing import wait_event

log = structlog.get_logger()

ACK_WAIT_S = 30.0
"""Time after which the server redelivers a message without an ack."""
KEEP_ALIVE_S = 10.0
EXPIRES_S = 30.0
"""Time after which a pull ends."""
TICK_S = 1.0
IN_FLIGHT = 256
"""Most open messages of all users, who share the consumer."""
GATHER_S = 0.2
"""Time for which redeliveries are collected, because the server may give them out of order."""
PULL_BYTES = 8 * 1024 * 1024
FINISHED_KEPT = 4096
"""Finished messages that are remembered in case their acknowledgement is lost."""
KINDS = {str(kind.__struct_config__.tag) for kind in get_args(InboundItem)}
ACK = "$JS.ACK."
"""Prefix of the reply subject of a delivery. Other messages are status messages of the server."""


def read_inbound(data: bytes) -> Inbound:
    """The message, without items of kinds that are unknown to this version. Raises errors.UNDECODABLE."""
    try:
        return msgspec.json.decode(data, type=Inbound)
    except msgspec.ValidationError:
        fields = msgspec.json.decode(data, type=dict[str, Any])
        fields["items"] = [item for item in fields["items"] if item["kind"] in KINDS]
        return msgspec.convert(fields, Inbound)


@dataclass(slots=True)
class Delivery:
    """One open message."""

    inbound: Inbound
    seq: int
    ack_subject: str


class Inbox:
    """The deliveries of one sandbox. `run` must run while `next_delivery` is awaited."""

    def __init__(self, nc: Client, names: Names, sandbox: str, check: Callable[[], None]) -> None:
        """`check` raises if the server forbids a subject."""
        self._nc = nc
        self._pull_subject = f"$JS.API.CONSUMER.MSG.NEXT.{names.stream_in}.{sandbox}"
        self._check = check
        self._open: dict[int, Delivery] = {}
        self._finished: dict[int, None] = {}
        self._ready: list[int] = []
        """The open messages that are not handed out: a heap of sequences."""
        self._changed = asyncio.Event()
        self._last_number = 0
        """Consumer sequence of the last delivery."""
        self._reconnects = 0
        self._held_until = 0.0
        self._kept_alive_at = 0.0
        self._warned = False

    async def run(self) -> None:
        """Pulls until cancelled. Raises what `check` raises, and NatsError once the connection is closed for good."""
        inbox = self._nc.new_inbox()
        pulled: asyncio.Queue[Msg] = asyncio.Queue()  # unlike `next_msg`, it loses nothing when cancelled
        subscription = await self._nc.subscribe(f"{inbox}.*", cb=pulled.put)
        try:
            for number in itertools.count():
                await self._pull(pulled, f"{inbox}.{number}")
        finally:
            await self._receive_rest(subscription, pulled)

    async def _pull(self, pulled: asyncio.Queue[Msg], reply: str) -> None:
        """One pull request and its deliveries. It also ends with the connection: the server forgets it then."""
        loop = asyncio.get_running_loop()
        reconnects = self._nc.stats["reconnects"]
        # newer messages would take the room of those that are not due yet
        held = self._held_until - loop.time() > GATHER_S
        away = not (self._nc.is_connected or self._nc.is_closed)  # nats-py would keep the pull and send it later
        wanted = 0 if held or away else IN_FLIGHT - len(self._open)
        if wanted > 0:
            body = {"batch": wanted, "max_bytes": PULL_BYTES, "expires": int(EXPIRES_S * 1e9)}
            await self._nc.publish(self._pull_subject, msgspec.json.encode(body), reply=reply)
        until = loop.time() + (EXPIRES_S + TICK_S if wanted > 0 else 0)
        while True:
            self._check()
            await self._keep_alive()
            try:
                async with asyncio.timeout(TICK_S):
                    msg = await pulled.get()
            except TimeoutError:
                if self._nc.is_closed:
                    raise ConnectionClosedError from None
                if loop.time() > until or self._nc.stats["reconnects"] != reconnects:
                    return
                continue
            if msg.reply.startswith(ACK):
                await self._receive(msg)
                wanted -= 1
                if wanted == 0:
                    return
            elif msg.subject == reply and (status := (msg.headers or {}).get("Status")) != "100":
                if status == "503" and not self._warned:
                    log.warning("sandbox.no_consumer", detail="Is the sandbox bound, with the option `durable`?")
                    self._warned = True
                if status != "408":  # there is no consumer, or it was deleted
                    await asyncio.sleep(TICK_S)
                return

    async def _receive_rest(self, subscription: Subscription, pulled: asyncio.Queue[Msg]) -> None:
        """Takes the deliveries that are on their way, so that they are given back, too."""
        if self._nc.is_connected:
            with contextlib.suppress(NatsError, TimeoutError):
                await subscription.drain()  # type: ignore[no-untyped-call]
                while not pulled.empty():
                    if (msg := pulled.get_nowait()).reply.startswith(ACK):
                        await self._receive(msg)
                return
        self.hold("Deliveries on their way were lost with the connection.")

    async def _receive(self, msg: Msg) -> None:
        delivered = msg.metadata
        seq, number = delivered.sequence.stream, delivered.sequence.consumer
        if self._reconnects != self._nc.stats["reconnects"]:
            self._reconnects = self._nc.stats["reconnects"]
            if number > self._last_number + 1:
                self.hold("A delivery was lost with the connection.")
        if (delivered.num_delivered or 1) > 1:
            self._held_until = max(self._held_until, asyncio.get_running_loop().time() + GATHER_S)
        self._last_number = number
        if seq in self._finished:
            await self._nc.publish(msg.reply, b"+ACK")
        elif delivery := self._open.get(seq):
            delivery.ack_subject = msg.reply
        else:
            try:
                inbound = read_inbound(msg.data)
            except UNDECODABLE:
                log.error("sandbox.unreadable", sequence=seq, detail="A message of a later version is skipped.")
                await self._nc.publish(msg.reply, b"+TERM")
                return
            self._open[seq] = Delivery(inbound, seq, msg.reply)
            heapq.heappush(self._ready, seq)
            self._changed.set()

    async def _keep_alive(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._kept_alive_at < KEEP_ALIVE_S or not self._nc.is_connected:
            return
        self._kept_alive_at = now
        for seq in sorted(self._open):
            await self._nc.publish(self._open[seq].ack_subject, b"+WPI")

    async def next_delivery(self) -> Delivery:
        """The oldest message that was not handed out."""
        while True:
            held_s = self._held_until - asyncio.get_running_loop().time()
            if self._ready and held_s <= 0:
                return self._open[heapq.heappop(self._ready)]
            self._changed.clear()
            await wait_event(self._changed, held_s if held_s > 0 else TICK_S)

    def rewind(self) -> None:
        """Hands out the unfinished messages again."""
        self._ready = sorted(self._open)

    def hold(self, reason: str) -> None:
        """Hands out nothing until the unacknowledged messages of others are redelivered."""
        self._held_until = asyncio.get_running_loop().time() + ACK_WAIT_S + TICK_S
        log.info("sandbox.held", seconds=ACK_WAIT_S, detail=reason)

    async def finish(self, delivery: Delivery) -> None:
        """Acknowledges a message. If the ack is lost, the redelivery is acknowledged."""
        del self._open[delivery.seq]
        self._finished[delivery.seq] = None
        if len(self._finished) > FINISHED_KEPT:
            del self._finished[next(iter(self._finished))]
        await self._nc.publish(delivery.ack_subject, b"+ACK")

    async def give_back(self) -> bool:
        """Makes the server redeliver all open messages at once. Returns whether nothing else will be redelivered."""
        try:
            for seq in sorted(self._open):
                await self._nc.publish(self._open[seq].ack_subject, b"-NAK")
            await self._nc.flush(timeout=2)
            return asyncio.get_running_loop().time() >= self._held_until
        except (NatsError, TimeoutError) as exc:
            log.info("sandbox.not_given_back", messages=len(self._open), reason=type(exc).__name__)
            return False
