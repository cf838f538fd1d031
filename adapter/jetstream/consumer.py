"""The pull loop of a durable consumer that has one owner at a time.

At each start and after each connect the consumer is reset: all unacknowledged messages are redelivered at once, in
stream order, so that a lost delivery can neither be overtaken nor stay hidden. In a cluster a delivery can also be
lost when the consumer's leader dies. The sequence numbers of deliveries and heartbeats show the gap, and the consumer
is reset, too.

They do not show a reset by another replica that then takes as many messages as this one had. So a replica without a
valid lease neither resets nor pulls, and it checks again between the two: a late reset is then followed by no pull.
Pulls of a former owner that is frozen or cut off take deliveries until they expire, even after a reset.

A consumer that an operator has deleted, or that was in the memory of a server that was restarted, is created again.
Messages stored before that may have been delivered by the former one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.errors import BusRefused, LeaseLost, Temporary
from adapter.jetstream import topology
from adapter.jetstream.api_replies import NO_CONSUMER, unix_ms
from adapter.jetstream.managed_connection import ManagedConnection, temporary_inbox
from adapter.jetstream.topology import Wanted
from adapter.kit.timing import backoff, wait_event

log = structlog.get_logger()

EXPIRES_S = 10.0
"""Duration of a pull, and so the time for which the pulls of a frozen owner take deliveries. It is the shortest one
for these heartbeats."""
HEARTBEAT_S = 5.0
SILENT_S = 15.0
"""Time without a delivery or a heartbeat after which the server has forgotten the pull."""
PULL_BYTES = 1024 * 1024
"""Most bytes of a pull. A server closes the connection of a client with 64 MB pending; after the next connect all of
it would be redelivered, and the connection closed again."""
CONFIRM_S = 1.0
"""Time without a confirmation after which an acknowledgement is repeated."""
LOST = "a delivery got lost"
DELIVERED = "$JS.ACK."
"""Start of the reply subject of a delivery. Its headers are the author's, and may contain a `Status`."""


class Delivery:
    """Implements ports.Delivery."""

    __slots__ = (
        "_consumer",
        "_reply",
        "data",
        "headers",
        "is_old",
        "number",
        "redelivered",
        "seq",
        "subject",
        "time_ms",
    )

    def __init__(self, consumer: Consumer, msg: Msg, redelivered_to: int, made_ms: int, old_to: int) -> None:
        tokens = msg.reply.split(".")
        base = 2 if len(tokens) < 11 else 4  # newer servers may add domain and account hash
        self._consumer = consumer
        self._reply = msg.reply
        self.subject = msg.subject
        self.data = msg.data
        self.headers: dict[str, str] = msg.headers or {}
        self.seq = int(tokens[base + 3])
        self.number = int(tokens[base + 4])
        """Number of the delivery since the last reset of the consumer."""
        self.time_ms = int(tokens[base + 5]) // 1_000_000
        self.redelivered = self.seq <= redelivered_to or self.time_ms <= made_ms
        """It was delivered before, as far as the consumer knows."""
        self.is_old = self.redelivered or self.seq <= old_to

    async def ack(self) -> None:
        """Acknowledges the message. After a lost acknowledgement it is redelivered with the next connect."""
        self._consumer.on_acked()
        try:
            await self._consumer.acknowledge(self._reply)
        except Temporary:
            log.debug("ack.lost", consumer=self._consumer.name, seq=self.seq)


class Consumer:
    """The pull loop of one durable consumer. `room` bounds the deliveries that are not acknowledged. Without
    `until_acked` it bounds the requested ones, and the receiver bounds the others. `confirm_acks`: acknowledgements
    are repeated until the server confirms them, also after a lost connection, for those who rely on it that a settled
    message never comes again.

    `check` raises LeaseLost unless this replica may read now. `turn` is awaited before each delivery, since nats-py
    passes on everything that has arrived in one turn of the event loop.
    """

    def __init__(
        self,
        connection: ManagedConnection,
        wanted: Wanted,
        *,
        room: int,
        until_acked: bool = True,
        confirm_acks: bool = False,
        check: Callable[[], None] = lambda: None,
        turn: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.connection = connection
        self.name = wanted.name
        self._wanted = wanted
        self._stream = wanted.stream
        self._max_in_flight = room
        self._check = check
        self._wait_turn = turn
        self._until_acked = until_acked
        self._confirm_acks = confirm_acks
        self._in_flight = 0
        self._requested = 0
        self._pull_bytes = PULL_BYTES
        self._last_delivery = 0
        """Number of the last delivery."""
        self._redelivered_to = 0
        """Stream sequence up to which messages may have been delivered before. The server forgets it at a reset."""
        self._old_to = -1
        """Newest sequence of the stream when this process read from it first; -1: it has not. A consumer in memory
        forgets what it has delivered when its servers restart."""
        self._created_ms = 0
        """Creation time of the consumer. An earlier consumer may have delivered older messages."""
        self._wake = asyncio.Event()

    def on_acked(self) -> None:
        """One message is settled."""
        if self._until_acked:
            self._free_slot()

    async def acknowledge(self, reply: str) -> None:
        """Acknowledges a delivery. Raises Temporary, unless acknowledgements are confirmed."""
        if not self._confirm_acks:
            await self.connection.publish(reply, b"+ACK")
            return
        while True:
            try:
                await self.connection.request(reply, b"+ACK", CONFIRM_S)
            except Temporary as exc:
                if exc.reason != "bus_timeout":  # refused at once: no connection, or nobody who reads it
                    await asyncio.sleep(CONFIRM_S / 10)
            else:
                return

    def _free_slot(self) -> None:
        self._in_flight = max(0, self._in_flight - 1)
        if self._max_in_flight - self._in_flight - self._requested >= max(1, self._max_in_flight // 4):
            self._wake.set()

    async def get_info(self) -> dict[str, Any]:
        return await self.connection.api_request(f"CONSUMER.INFO.{self._stream}.{self.name}")

    async def run(self, on_delivery: Callable[[Delivery], None]) -> None:
        """Delivers until cancelled. After each reset all messages that are not acknowledged are delivered."""
        failures = 0
        while True:
            await self.connection.wait_connected()
            epoch = self.connection.epoch
            try:
                nc = self.connection.client()
                await self.reset()
                failures = 0
                await self._pull(nc, epoch, on_delivery)
            except LeaseLost:  # a paused lease may come back; if it is lost, the owner ends this loop
                log.debug("consumer.fenced", consumer=self.name)
                await asyncio.sleep(0.1)
            except (Temporary, BusRefused) as exc:
                failures += 1
                log.warning("consumer.interrupted", consumer=self.name, reason=exc.reason, detail=exc.detail)
                await asyncio.sleep(backoff(failures, first_s=0.2, longest_s=3.0))

    async def reset(self) -> None:
        """Has everything redelivered that is not acknowledged. Raises Temporary, BusRefused, LeaseLost."""
        self._check()
        info = await self._get_or_create()
        if self._old_to < 0:
            stream = await self.connection.api_request(f"STREAM.INFO.{self._stream}")
            self._old_to = int(stream["state"]["last_seq"])
        self._created_ms = unix_ms(info["created"])
        if info.get("paused"):
            log.error("consumer.paused", consumer=self.name, detail="It delivers nothing until it is resumed.")
        self._check()
        self._redelivered_to = max(self._redelivered_to, int(info["delivered"]["stream_seq"]))
        info = await self.connection.api_request(f"CONSUMER.RESET.{self._stream}.{self.name}")
        # not the delivered sequence: another replica's pull may have taken some messages meanwhile
        self._last_delivery = int(info["ack_floor"]["consumer_seq"])
        self._in_flight = self._requested = 0

    async def _get_or_create(self) -> dict[str, Any]:
        """The consumer's info. Creates the consumer if it is missing. Raises Temporary, BusRefused (no stream)."""
        try:
            return await self.get_info()
        except BusRefused as exc:
            if exc.code != NO_CONSUMER:
                raise
        await topology.create_resource(self.connection, self._wanted)
        was_in_memory = self._wanted.config.get("mem_storage")
        (log.info if was_in_memory else log.error)("consumer.recreated", consumer=self.name, stream=self._stream)
        return await self.get_info()

    async def _pull(self, nc: Client, epoch: int, on_delivery: Callable[[Delivery], None]) -> None:
        last_message_at = asyncio.get_running_loop().time()
        broken = ""

        async def on_message(msg: Msg) -> None:
            nonlocal last_message_at, broken
            last_message_at = asyncio.get_running_loop().time()
            if broken:  # later messages must not overtake the lost one
                return
            status = None if msg.reply.startswith(DELIVERED) else (msg.headers or {}).get("Status")
            if status is None and self._wait_turn is not None:
                await self._wait_turn()  # the end of the pull also ends the subscription and this task
            broken = self._deliver(msg, on_delivery) if status is None else self._on_status(status, msg.headers or {})
            if broken or status in ("408", "409"):
                self._wake.set()

        down = asyncio.get_running_loop().create_task(self.connection.wait_disconnected(epoch))
        down.add_done_callback(lambda _: self._wake.set())
        try:
            async with temporary_inbox(nc, on_message) as inbox:
                while self.connection.epoch == epoch and self.connection.nc is nc:
                    if broken:
                        raise Temporary("consumer_broken", broken)
                    left_s = last_message_at + SILENT_S - asyncio.get_running_loop().time()
                    if left_s <= 0:
                        raise Temporary("consumer_silent")
                    self._wake.clear()
                    missing = self._max_in_flight - self._in_flight - self._requested
                    if missing >= max(1, self._max_in_flight // 4):
                        await self._request_batch(inbox, missing)
                    if not down.done():
                        await wait_event(self._wake, left_s)
        finally:
            down.cancel()

    def _deliver(self, msg: Msg, on_delivery: Callable[[Delivery], None]) -> str:
        """Passes a delivery on. Returns why the pull is broken, or ""."""
        delivery = Delivery(self, msg, self._redelivered_to, self._created_ms, self._old_to)
        if delivery.number != self._last_delivery + 1:
            return LOST
        self._last_delivery = delivery.number
        self._requested = max(0, self._requested - 1)
        self._in_flight += 1
        self._redelivered_to = max(self._redelivered_to, delivery.seq)  # a killed server may forget it
        on_delivery(delivery)
        if not self._until_acked:
            self._free_slot()
        return ""

    def _on_status(self, status: str, headers: dict[str, str]) -> str:
        """Processes a status of the pull. Returns why the pull is broken, or ""."""
        if status == "100":  # a heartbeat
            return LOST if int(headers.get("Nats-Last-Consumer", "0")) > self._last_delivery else ""
        if status not in ("408", "409"):
            return status
        self._requested = max(0, self._requested - int(headers.get("Nats-Pending-Messages", "0")))
        description = headers.get("Description", "")
        if "Exceeds MaxBytes" in description:
            if int(headers.get("Nats-Pending-Bytes", "0")) >= self._pull_bytes:
                self._pull_bytes *= 2  # the first message did not fit
            return ""
        return description or status if status == "409" and "Batch Completed" not in description else ""

    async def _request_batch(self, inbox: str, batch: int) -> None:
        self._check()
        self._requested += batch
        body = {
            "batch": batch,
            "max_bytes": self._pull_bytes,
            "expires": int(EXPIRES_S * 1e9),
            "idle_heartbeat": int(HEARTBEAT_S * 1e9),
        }
        await self.connection.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self.name}", msgspec.json.encode(body), reply=inbox
        )
