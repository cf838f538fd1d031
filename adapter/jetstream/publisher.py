"""Stores messages in streams: written at once, acknowledged, and written again where no acknowledgement comes.

A call of `store` returns when the stream has acknowledged the message, however long that takes. Each message is a
compare-and-set or has an id, so that it may be written again. A stream is in one of two states:

- Flowing: each message is written at once. Acknowledgements arrive in any order.
- Interrupted, after a broken connection, a missing acknowledgement or "no responders": `_recover` writes the oldest
  message alone until that is answered, then all others.

So one stream that accepts nothing does not delay the others, and is not flooded. The order of two messages is only
certain where the second is stored after the first call has returned.

Before each write `ensure_owner` checks the lease; the publisher never retries without it. It gives up a message only
if it can never be written (too large, an invalid header) or the stream refuses it: BusRefused, Conflict.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Collection

import msgspec
import structlog
from nats.errors import BadHeaderError, BadSubjectError, MaxPayloadError
from nats.errors import Error as NatsError

from adapter.contract.names import stream_of
from adapter.errors import AdapterError, BusRefused, Conflict, LeaseLost, Temporary
from adapter.jetstream.api_replies import decode_ack
from adapter.jetstream.client import BusClient, has_no_responders
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.ports import BusMessage, PubAck
from adapter.tools.metrics import Metrics
from adapter.tools.timing import ChangeSignal, Clock, wait_event

log = structlog.get_logger()

ACK_TIMEOUT_S = 1.0
"""Longer than an acknowledgement of a healthy server, shorter than a leader election."""
RETRY_S = 0.05
"""Pause after an attempt without an acknowledgement."""
STALLED_S = 2.0
"""Wait of a write after which the log reports it, and JetStream is asked whether it answers through this server."""
WARN_AGAIN_S = 30.0
"""Interval between two such log entries."""
NO_ACK = "no acknowledgement"


class _Outstanding(msgspec.Struct):
    number: int
    message: BusMessage
    stream: _Stream
    future: asyncio.Future[PubAck]
    requested_at: float
    sent_at: float | None = None
    """When it was written last."""


class _Stream:
    """Unacknowledged messages of one stream. `label`: its label in the metrics."""

    def __init__(self, name: str, label: str, metrics: Metrics) -> None:
        self.name = name
        self.outstanding: dict[int, _Outstanding] = {}
        """By number, in the order of the calls."""
        self.last_error = NO_ACK
        """Why the oldest write waits, for operators."""
        self.is_interrupted = False
        self.has_failed = False
        """During a recovery: the write failed."""
        self.changed = ChangeSignal()
        """Notified of answers and failures during a recovery."""
        self.recovery: asyncio.Task[None] | None = None
        self.warned_at: float | None = None
        """When the log last reported that the stream waits; None: not since it was flowing."""
        outcomes = (metrics.nats_publish.labels(stream=label, outcome=each) for each in ("ok", "retried", "refused"))
        self.stored, self.retried, self.refused = outcomes
        self.took = metrics.nats_publish_duration.labels(stream=label)


class Publisher:
    """Stores messages over one connection, and waits until their streams have them."""

    def __init__(self, connection: ManagedConnection, clock: Clock, metrics: Metrics) -> None:
        self._connection = connection
        self._clock = clock
        self._metrics = metrics
        self._streams: dict[str, _Stream] = {}
        """By name."""
        self._outstanding: dict[int, _Outstanding] = {}
        """Unacknowledged messages of all streams."""
        self._numbers = itertools.count()
        self._resumed = ChangeSignal()
        self._interrupted = asyncio.Event()
        self._prefix = ""
        """Start of the subjects of acknowledgements; the number follows."""
        connection.on_connect(self._subscribe)

    @property
    def waiting_s(self) -> float:
        """How long the oldest write has waited for its acknowledgement; 0: none waits."""
        return self._waited_s(self._outstanding)

    @property
    def last_error(self) -> str:
        """The stream of the oldest write, and why it waits, for operators."""
        oldest = next(iter(self._outstanding.values()), None)
        return f"{oldest.stream.name}: {oldest.stream.last_error}" if oldest else ""

    async def wait_writable(self, streams: Collection[str]) -> None:
        """Returns when none of these streams is interrupted."""
        await self._resumed.wait_until(lambda: self.is_writable(streams))

    def is_writable(self, streams: Collection[str]) -> bool:
        """Whether `wait_writable` would return at once."""
        return not any(stream.is_interrupted and stream.name in streams for stream in self._streams.values())

    async def store(self, message: BusMessage) -> PubAck:
        """Returns when the stream has the message. Raises Conflict, BusRefused, LeaseLost."""
        now, stream = self._clock.monotonic(), self._stream_of(message)
        entry = _Outstanding(next(self._numbers), message, stream, asyncio.get_running_loop().create_future(), now)
        self._outstanding[entry.number] = stream.outstanding[entry.number] = entry
        try:
            if not stream.is_interrupted:  # else it is left to `_recover`
                await self._write(entry, now)
            return await entry.future
        finally:
            self._remove_outstanding(entry)

    def _stream_of(self, message: BusMessage) -> _Stream:
        name = stream_of(message.subject)
        found = self._streams.get(name)
        if found is None:
            found = self._streams[name] = _Stream(name, message.stream, self._metrics)
        return found

    def _remove_outstanding(self, entry: _Outstanding) -> None:
        """Removes a message that is answered or not wanted any more."""
        if self._outstanding.pop(entry.number, None) is not None:
            del entry.stream.outstanding[entry.number]
            if entry.stream.is_interrupted:
                entry.stream.changed.notify_all()

    def _refuse(self, entry: _Outstanding, problem: AdapterError) -> None:
        self._remove_outstanding(entry)
        if not entry.future.done():  # otherwise the caller was cancelled
            entry.future.set_exception(problem)

    def _waited_s(self, outstanding: dict[int, _Outstanding]) -> float:
        """How long the oldest message has waited; 0: there is none."""
        oldest = next(iter(outstanding.values()), None)
        return max(0.0, self._clock.monotonic() - oldest.requested_at) if oldest else 0.0

    async def run(self) -> None:
        """Detects overdue acknowledgements and recovers interrupted streams, until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._interrupted.clear()
                for stream in self._streams.values():
                    if self._is_ack_overdue(stream):
                        stream.is_interrupted = True
                    if stream.is_interrupted and (stream.recovery is None or stream.recovery.done()):
                        stream.recovery = group.create_task(self._recover(stream))
                await wait_event(self._interrupted, ACK_TIMEOUT_S / 2)

    def _is_ack_overdue(self, stream: _Stream) -> bool:
        """Whether the oldest written message waits too long for its acknowledgement."""
        written = (entry.sent_at for entry in stream.outstanding.values() if entry.sent_at is not None)
        sent_at = next(written, None)
        return sent_at is not None and self._clock.monotonic() - sent_at > ACK_TIMEOUT_S

    async def _recover(self, stream: _Stream) -> None:
        """Writes the oldest message alone until one is answered, then all others."""
        while oldest := next(iter(stream.outstanding.values()), None):
            await self._connection.wait_connected()
            if await self._write_alone(oldest):
                break
            await self._report_stalled(stream)
            await self._clock.sleep(RETRY_S)
        stream.is_interrupted = False
        for entry in [*stream.outstanding.values()]:
            await self._write(entry, self._clock.monotonic())
        self._resumed.notify_all()
        if stream.warned_at is not None and not stream.is_interrupted:
            stream.warned_at = None
            log.info("publish.resumed", stream=stream.name)

    async def _write_alone(self, entry: _Outstanding) -> bool:
        """Writes a message, and waits until it is answered. False: that failed, or no answer came."""
        stream = entry.stream
        stream.has_failed = False
        await self._write(entry, self._clock.monotonic())
        if not await stream.changed.wait_until(lambda: entry.future.done() or stream.has_failed, ACK_TIMEOUT_S):
            stream.last_error = NO_ACK
            self._connection.record_answered(False)
        return entry.future.done()

    async def _report_stalled(self, stream: _Stream) -> None:
        """Logs a stream that has accepted nothing for long, and asks JetStream, so that a server that is cut off from
        the cluster is left."""
        waited_s, now = self._waited_s(stream.outstanding), self._clock.monotonic()
        if waited_s < STALLED_S or not self._connection.is_connected:
            return
        if stream.warned_at is None or now - stream.warned_at >= WARN_AGAIN_S:
            log.warning("publish.retrying", stream=stream.name, waited_s=round(waited_s, 1), detail=stream.last_error)
            stream.warned_at = now
        with contextlib.suppress(Temporary, BusRefused):
            await self._connection.api_request("INFO", timeout_s=ACK_TIMEOUT_S)  # its answer counts, if any

    async def _write(self, entry: _Outstanding, now: float) -> None:
        """Writes a message, perhaps again, if its caller still waits and may still write it."""
        message, stream = entry.message, entry.stream
        if entry.future.done():
            return
        limit = self._connection.max_payload  # the server closes the connection over a message that is longer
        if len(message.payload) > limit // 2 and len(message.payload) + _headers_size(message.headers) > limit:
            self._refuse(entry, BusRefused(0, f"{len(message.payload)} bytes exceed the server's max_payload"))
            return
        try:
            if message.ensure_owner is not None:
                message.ensure_owner()
        except LeaseLost as exc:
            self._refuse(entry, exc)
            return
        if entry.sent_at is not None:
            stream.retried.inc()
        entry.sent_at = now
        if (nc := self._connection.nc) is None:
            self._interrupt(stream)
            return
        try:
            reply = f"{self._prefix}{entry.number}"
            await nc.publish(message.subject, message.payload, reply, message.headers or None)
        except (BadHeaderError, BadSubjectError, MaxPayloadError, UnicodeError) as exc:
            # it can never be written, and must not block the messages behind it
            stream.refused.inc()
            self._refuse(entry, BusRefused(0, f"The client refuses it: {type(exc).__name__}"))
        except NatsError as exc:
            log.warning("publish.interrupted", reason=type(exc).__name__)
            self._interrupt(stream)

    def _interrupt(self, stream: _Stream) -> None:
        stream.is_interrupted = stream.has_failed = True
        stream.changed.notify_all()
        self._interrupted.set()

    async def _subscribe(self, nc: BusClient) -> None:
        for stream in self._streams.values():
            self._interrupt(stream)
        self._prefix = nc.new_inbox() + "."
        await nc.subscribe_raw(self._prefix + "*", self._on_ack)

    def _on_ack(self, subject: str, _: bytes, data: bytes, headers: bytes) -> None:
        number = subject[len(self._prefix) :]
        entry = self._outstanding.get(int(number)) if number.isdecimal() else None
        if entry is None or entry.future.done():
            return
        stream = entry.stream
        if headers and has_no_responders(headers):
            stream.last_error = "no stream takes it, or none has a leader"
            self._interrupt(stream)
            return
        try:
            ack = decode_ack(data)
        except Temporary as exc:
            stream.last_error = exc.detail
            self._interrupt(stream)
            return
        except BusRefused as exc:
            stream.refused.inc()
            self._refuse(entry, exc)
            return
        self._remove_outstanding(entry)
        entry.future.set_result(ack)
        stream.stored.inc()
        stream.took.observe(self._clock.monotonic() - entry.requested_at)


class SingleWrites:
    """Implements ports.Bus by one attempt, of at most a second: for who decides by the time that it takes, or has no
    publisher. Raises Conflict and Temporary: the message may be stored."""

    def __init__(self, connection: ManagedConnection) -> None:
        self._connection = connection

    async def store(self, message: BusMessage) -> PubAck:
        subject, payload, headers = message.subject, message.payload, message.headers
        if message.ensure_owner is not None:
            message.ensure_owner()
        reply = await self._connection.request(subject, payload, ACK_TIMEOUT_S, headers)
        try:
            return decode_ack(reply.data)
        except Conflict:
            raise
        except BusRefused as exc:
            raise Temporary(exc.reason, exc.detail) from exc


def _headers_size(headers: dict[str, str]) -> int:
    return 12 + sum(len(k) + len(v) * 4 + 4 for k, v in headers.items())
