"""The pull loop of a durable consumer that has one owner at a time.

At each start and after each connect the consumer is reset: all unacknowledged messages are redelivered at once, in
stream order, so that a lost delivery can neither be overtaken nor stay hidden. In a cluster a delivery can also be
lost when the consumer's leader dies. The sequence numbers of deliveries and heartbeats show the gap, and the consumer
is reset, too.

They do not show a reset by another replica that then takes as many messages as this one had. So a replica without a
valid lease neither resets nor pulls, and it checks again between the two: a late reset is then followed by no pull.
Pulls of a former owner that is frozen or cut off take deliveries until they expire, even after a reset.

The owner creates a consumer that does not exist: at the first start, after an operator has deleted it, and after a
restart of the server that had it in its memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
from nats.errors import Error as NatsError

from adapter.errors import BusRefused, LeaseLost, Temporary
from adapter.jetstream.api_replies import NO_CONSUMER
from adapter.jetstream.client import BusClient, parse_headers
from adapter.jetstream.history import read_leader_info
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.tools.timing import ChangeSignal, backoff

log = structlog.get_logger()

BATCH, REQUEST_AT = 512, 384
"""Messages that are requested at most, and the number of those at which more are requested."""
CREATE_S = 15.0
"""Longest wait for a new consumer; in a cluster each takes a tenth of a second, and a start makes 33."""
EXPIRES_S = 10.0
"""Duration of a pull, and so the time for which the pulls of a frozen owner take deliveries. It is the shortest one
for these heartbeats."""
HEARTBEAT_S = 5.0
SILENT_S = 15.0
"""Time without a delivery or a heartbeat after which the server has forgotten the pull."""
PULL_BYTES = 1024 * 1024
"""Most bytes of a pull, more than a message of these streams has. A server closes the connection of a client with
64 MB pending; after the next connect all of it would be redelivered, and the connection closed again."""
LOST = "a delivery got lost"
PER_TURN = 64
"""Deliveries of a consumer in one turn of the event loop, which a backlog would hold up for a tenth of a second. They
wait outside the client, so that acknowledgements behind them are read at once."""
DELIVERED = b"$JS.ACK."
"""Start of the reply subject of a delivery. Its headers are the author's, and may contain a `Status`."""


class Delivery:
    """Implements ports.Delivery."""

    __slots__ = (
        "_consumer",
        "data",
        "headers",
        "is_old",
        "number",
        "redelivered",
        "reply",
        "seq",
        "subject",
        "time_ms",
    )

    def __init__(self, consumer: Consumer, subject: str, reply: str, data: bytes, headers: dict[str, str]) -> None:
        tokens = reply.split(".")
        base = 2 if len(tokens) < 11 else 4  # newer servers may add domain and account hash
        self._consumer = consumer
        self.reply = reply
        self.subject = subject
        self.data = data
        self.headers = headers
        self.seq = int(tokens[base + 3])
        self.number = int(tokens[base + 4])
        """Number of the delivery since the last reset of the consumer."""
        self.time_ms = int(tokens[base + 5]) // 1_000_000
        self.redelivered = self.seq <= consumer.redelivered_to
        self.is_old = self.redelivered or self.seq <= (consumer.old_to or 0)

    async def ack(self) -> None:
        """Acknowledges the message. After a lost acknowledgement it is redelivered with the next connect."""
        try:
            await self._consumer.connection.publish(self.reply, b"+ACK")
        except Temporary:
            log.debug("ack.lost", consumer=self._consumer.name, seq=self.seq)


class Consumer:
    """The pull loop of one durable consumer.

    `check` raises LeaseLost unless this replica may read now.
    """

    def __init__(
        self,
        connection: ManagedConnection,
        stream: str,
        config: dict[str, Any],
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.connection = connection
        self.name: str = config["name"]
        self._stream = stream
        self._config = config
        self._check = check
        self._requested = 0
        """Messages that are requested and have not come."""
        self._last_delivery = 0
        """Number of the last delivery."""
        self.redelivered_to = 0
        """Sequence of the stream up to which messages were delivered before, as far as known. The server forgets it
        at a reset, and with a consumer in its memory."""
        self.old_to: int | None = None
        """Newest sequence of the stream when this owner read from it first; None: it has not."""
        self._changed = ChangeSignal()

    async def run(self, on_delivery: Callable[[Delivery], None]) -> None:
        """Delivers until cancelled. After each reset all messages that are not acknowledged are delivered."""
        failures = 0
        while True:
            nc = await self.connection.wait_connected()
            try:
                await self.reset()
                failures = 0
                await self._pull(nc, on_delivery)
            except LeaseLost:  # a paused lease may come back; if it is lost, the owner ends this loop
                log.debug("consumer.fenced", consumer=self.name)
                await asyncio.sleep(0.1)
            except (Temporary, BusRefused) as exc:
                failures += 1
                log.warning("consumer.interrupted", consumer=self.name, reason=exc.reason, detail=exc.detail)
                await asyncio.sleep(backoff(failures, first_s=0.2, longest_s=3.0))

    async def reset(self) -> None:
        """Has everything redelivered that is not acknowledged. Creates the consumer if it is missing. Raises
        Temporary, BusRefused (no stream), LeaseLost."""
        self._check()
        request, path = self.connection.api_request, f"{self._stream}.{self.name}"
        try:
            info = await request(f"CONSUMER.INFO.{path}")
        except BusRefused as exc:
            if exc.code != NO_CONSUMER:
                raise
            create = {"stream_name": self._stream, "config": self._config, "action": "create"}
            info = await request(f"CONSUMER.CREATE.{path}", create, timeout_s=CREATE_S)
            log.info("consumer.created", consumer=self.name, stream=self._stream)
        if self.old_to is None:
            self.old_to = int((await read_leader_info(self.connection, self._stream))["state"]["last_seq"])
        if info.get("paused"):
            log.error("consumer.paused", consumer=self.name, detail="It delivers nothing until it is resumed.")
        self._check()
        self.redelivered_to = max(self.redelivered_to, int(info["delivered"]["stream_seq"]))
        info = await request(f"CONSUMER.RESET.{path}")
        # not the delivered sequence: another replica's pull may have taken some messages meanwhile
        self._last_delivery = int(info["ack_floor"]["consumer_seq"])
        self._requested = 0

    async def _pull(self, nc: BusClient, on_delivery: Callable[[Delivery], None]) -> None:
        """Delivers until the connection is lost. Raises Temporary after a lost delivery or without heartbeats,
        LeaseLost."""
        loop = asyncio.get_running_loop()
        last_message_at, broken = loop.time(), ""
        arrived = deque[tuple[str, bytes, bytes, bytes]]()

        def on_message(*message: Any) -> None:
            nonlocal last_message_at
            last_message_at = loop.time()
            arrived.append(message)
            if len(arrived) == 1:
                loop.call_soon(pass_on)

        def pass_on() -> None:
            try:
                for _ in range(min(PER_TURN, len(arrived))):
                    process(*arrived.popleft())
            finally:
                if arrived:
                    loop.call_soon(pass_on)

        def process(subject: str, reply: bytes, data: bytes, raw_headers: bytes) -> None:
            nonlocal broken
            if broken:  # later messages must not overtake the lost one
                return
            headers = parse_headers(raw_headers) if raw_headers else {}
            if reply.startswith(DELIVERED):
                broken = self._deliver(Delivery(self, subject, reply.decode(), data, headers), on_delivery)
            else:
                broken = self._on_status(headers.get("Status", ""), headers)
            if broken or self._requested <= REQUEST_AT:
                self._changed.notify_all()

        def must_act() -> bool:
            return bool(broken) or self._requested <= REQUEST_AT or self.connection.nc is not nc

        inbox = nc.new_inbox()
        try:
            subscription = await nc.subscribe_raw(inbox, on_message)
        except NatsError as exc:
            raise Temporary("bus_down", type(exc).__name__) from exc
        try:
            while self.connection.nc is nc:
                if broken:
                    raise Temporary("consumer_broken", broken)
                left_s = last_message_at + SILENT_S - loop.time()
                if left_s <= 0:
                    raise Temporary("consumer_silent")
                if self._requested <= REQUEST_AT:
                    await self._request_batch(inbox, BATCH - self._requested)
                await self._changed.wait_until(must_act, left_s, also=self.connection.changed)
        finally:
            arrived.clear()
            with contextlib.suppress(NatsError):  # a closed client has no subscriptions
                await subscription.unsubscribe()

    def _deliver(self, delivery: Delivery, on_delivery: Callable[[Delivery], None]) -> str:
        """Passes a delivery on. Returns why the pull is broken, or ""."""
        if delivery.number != self._last_delivery + 1:
            return LOST
        self._last_delivery = delivery.number
        self._requested -= 1
        self.redelivered_to = max(self.redelivered_to, delivery.seq)
        on_delivery(delivery)
        return ""

    def _on_status(self, status: str, headers: dict[str, str]) -> str:
        """Processes a status of the pull. Returns why the pull is broken, or ""."""
        if status == "100":  # a heartbeat
            return LOST if int(headers.get("Nats-Last-Consumer", "0")) > self._last_delivery else ""
        if status not in ("408", "409"):
            return status
        self._requested -= int(headers.get("Nats-Pending-Messages", "0"))
        description = headers.get("Description", "")
        is_end = status == "408" or any(words in description for words in ("Batch Completed", "Exceeds MaxBytes"))
        return "" if is_end else description or status

    async def _request_batch(self, inbox: str, batch: int) -> None:
        self._check()
        self._requested += batch
        body = {
            "batch": batch,
            "max_bytes": PULL_BYTES,
            "expires": int(EXPIRES_S * 1e9),
            "idle_heartbeat": int(HEARTBEAT_S * 1e9),
        }
        await self.connection.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self.name}", msgspec.json.encode(body), reply=inbox
        )
