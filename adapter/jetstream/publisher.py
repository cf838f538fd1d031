"""Publishes to streams: pipelined, acknowledged, and in order even when the connection breaks.

A call of `publish` or `publish_all` returns when the stream has acknowledged the messages, however long that takes.
Unacknowledged messages are kept by stream, in the order of the calls. A stream is in one of two states:

- Flowing: each message is written at once. Acknowledgements arrive in any order.
- Interrupted, after a broken connection, a missing acknowledgement or "no responders": `_recover` alone writes to the
  stream. It sends the oldest message alone until that is answered, then the others in order.

So a message never overtakes an earlier one of the same stream, the stream drops duplicates by Nats-Msg-Id, and one
stream that accepts nothing does not delay the others.

Before each write `ensure_owner` checks the lease; the publisher never retries without it. It gives up a message only
if it can never be written (too large, invalid subject) or the stream refuses it: BusRefused, Conflict.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec
import structlog
from nats.errors import BadHeaderError, BadSubjectError, MaxPayloadError
from nats.errors import Error as NatsError

from adapter.contract.names import stream_of
from adapter.errors import AdapterError, BusRefused, LeaseLost, Temporary
from adapter.jetstream.api_replies import ApiError, write_error_of
from adapter.jetstream.client import BusClient, has_no_responders
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.kit.timing import ChangeSignal, Clock, wait_event
from adapter.observability.metrics import Metrics
from adapter.ports import BusMessage, PubAck

log = structlog.get_logger()

ACK_TIMEOUT_S = 1.0
"""Longer than an acknowledgement of a healthy server, shorter than a leader election."""
STALLED_S = 2.0
"""Wait of a write after which the log reports it, and the server is probed for being cut off from the cluster."""
WARN_AGAIN_S = 30.0
"""Interval between two such log entries."""

DELAYED_PUBLISH_S = 240.0
"""Wait after which a write counts as delayed; shorter than the stream's duplicate window
(topology.DUPLICATE_WINDOW_NS)."""
NO_ACK = "no acknowledgement"
MAX_SUBJECT = 3072
"""Longest subject. A server closes the connection over a line of more than 4,096 bytes, at every retry."""


class _PublishReply(PubAck):
    """JetStream's answer to a publish."""

    error: ApiError | None = None


class _Outstanding(msgspec.Struct):
    number: int
    message: BusMessage
    stream: _Stream
    future: asyncio.Future[PubAck]
    requested_at: float
    sent_at: float = 0.0
    first_sent_at: float = 0.0
    writes: int = 0


class _Stream:
    """Unacknowledged messages of one stream. `label`: its label in the metrics."""

    def __init__(self, name: str, label: str, metrics: Metrics) -> None:
        self.name = name
        self.outstanding: dict[int, _Outstanding] = {}
        """By number, in the order of the calls."""
        self.last_error = NO_ACK
        """Why the oldest write waits, for operators."""
        self.is_interrupted = False
        self.interruption = asyncio.Event()
        """Set at each interruption, also during the recovery."""
        self.recovery: asyncio.Task[None] | None = None
        self.warned_at = 0.0
        """When the log last reported that the stream waits; 0: not since it was flowing."""
        outcomes = (metrics.nats_publish.labels(stream=label, outcome=each) for each in ("ok", "retried", "refused"))
        self.stored, self.retried, self.refused = outcomes
        self.took = metrics.nats_publish_duration.labels(stream=label)


class Publisher:
    """Publishes messages over one connection, and waits until their streams have them."""

    def __init__(self, connection: ManagedConnection, clock: Clock, metrics: Metrics) -> None:
        self._connection = connection
        self._clock = clock
        self._metrics = metrics
        self._streams: dict[str, _Stream] = {}
        """By the first two tokens of the subject (`_stream_of`)."""
        self._outstanding: dict[int, _Outstanding] = {}
        """Unacknowledged messages of all streams."""
        self._numbers = itertools.count()
        self._resumed = ChangeSignal()
        self._interrupted = asyncio.Event()
        self._decode = msgspec.json.Decoder(_PublishReply)
        self._nc: BusClient | None = None
        """The client that receives the acknowledgements."""
        self._prefix = ""
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

    async def publish(self, message: BusMessage) -> PubAck:
        """Returns when the stream has the message. Raises Conflict, BusRefused, LeaseLost."""
        alone = not self._outstanding
        future, now = asyncio.get_running_loop().create_future(), self._clock.monotonic()
        entry = self._add_outstanding(message, self._stream_of(message), future, now)
        try:
            await self._write_all([entry], now, alone=alone)
            return await entry.future
        finally:
            self._remove_outstanding(entry)

    async def publish_all(self, messages: Sequence[BusMessage]) -> list[PubAck | BusRefused]:
        """Publishes all messages, pipelined, those of one stream in this order. A refusal takes the place of an ack.

        Raises LeaseLost.
        """
        loop, now, alone = asyncio.get_running_loop(), self._clock.monotonic(), not self._outstanding
        entries, subject = [], ""
        for message in messages:
            if message.subject != subject:  # a batch usually has one subject
                subject, stream = message.subject, self._stream_of(message)
            entries.append(self._add_outstanding(message, stream, loop.create_future(), now))
        try:
            await self._write_all(entries, now, alone=alone)
            acks: list[PubAck | BusRefused] = []
            for entry in entries:
                try:
                    acks.append(await entry.future)
                except BusRefused as exc:
                    acks.append(exc)
            return acks
        finally:
            for entry in entries:
                if entry.number in self._outstanding:
                    self._remove_outstanding(entry)

    def _add_outstanding(
        self, message: BusMessage, stream: _Stream, future: asyncio.Future[PubAck], now: float
    ) -> _Outstanding:
        """Adds a message in the order of the calls. A message that can never be written is refused at once."""
        number = next(self._numbers)
        entry = _Outstanding(number, message, stream, future, now)
        self._outstanding[number] = stream.outstanding[number] = entry
        self._reject_oversized(entry)
        return entry

    def _stream_of(self, message: BusMessage) -> _Stream:
        """The stream of a message, by the first two tokens of its subject."""
        subject = message.subject
        end = subject.find(".", subject.find(".") + 1)
        key = subject if end < 0 else subject[:end]
        found = self._streams.get(key)
        if found is None:
            found = self._streams[key] = _Stream(stream_of(subject), message.stream, self._metrics)
        return found

    def _remove_outstanding(self, entry: _Outstanding) -> None:
        """Removes a message that is answered or not wanted any more."""
        if self._outstanding.pop(entry.number, None) is not None:
            del entry.stream.outstanding[entry.number]

    def _refuse(self, entry: _Outstanding, problem: AdapterError) -> None:
        self._remove_outstanding(entry)
        if not entry.future.done():  # otherwise the caller was cancelled
            entry.future.set_exception(problem)

    def _waited_s(self, outstanding: dict[int, _Outstanding]) -> float:
        """How long the oldest message has waited; 0: there is none."""
        oldest = next(iter(outstanding.values()), None)
        return max(0.0, self._clock.monotonic() - oldest.requested_at) if oldest else 0.0

    def _reject_oversized(self, entry: _Outstanding) -> None:
        """Refuses a message for which the server would close the connection."""
        message, limit = entry.message, self._connection.max_payload
        if len(message.payload) > limit // 2 and len(message.payload) + _headers_size(message.headers) > limit:
            self._refuse(entry, BusRefused(0, f"{len(message.payload)} bytes exceed the server's max_payload"))
        elif len(message.subject) > MAX_SUBJECT // 4 and len(message.subject.encode()) > MAX_SUBJECT:
            self._refuse(entry, BusRefused(0, "The subject is too long."))

    async def run(self) -> None:
        """Detects overdue acknowledgements and recovers interrupted streams, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._warn_if_stalled_forever())
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
        oldest = next((entry for entry in stream.outstanding.values() if entry.writes), None)
        return oldest is not None and self._clock.monotonic() - oldest.sent_at > ACK_TIMEOUT_S

    async def _recover(self, stream: _Stream) -> None:
        """Sends the oldest message alone until it is answered, then all others in order."""
        while stream.is_interrupted:
            await self._connection.wait_connected()
            stream.interruption.clear()
            oldest = next(iter(stream.outstanding.values()), None)
            if oldest is not None:
                await self._write(oldest)
                if not await self._wait_answered(oldest):
                    continue
            # messages added meanwhile are written here, too, so that the order is kept
            last = -1
            while fresh := [entry for number, entry in stream.outstanding.items() if number > last]:
                for entry in fresh:
                    await self._write(entry)
                last = fresh[-1].number
            if stream.interruption.is_set():
                continue
            stream.is_interrupted = False
            self._resumed.notify_all()
            if stream.warned_at:
                stream.warned_at = 0.0
                log.info("publish.resumed", stream=stream.name)

    async def _warn_if_stalled_forever(self) -> None:
        """Logs streams that accept nothing, and probes whether another server would accept."""
        while True:
            await asyncio.sleep(ACK_TIMEOUT_S / 2)
            waiting = [s for s in self._streams.values() if self._waited_s(s.outstanding) >= STALLED_S]
            if not waiting or not self._connection.is_connected:
                continue
            with contextlib.suppress(Temporary, BusRefused):
                await self._connection.api_request("INFO", timeout_s=1.0)  # its answer counts, if any
            now = self._clock.monotonic()
            for stream in waiting:
                if stream.is_interrupted and not (stream.warned_at and now - stream.warned_at < WARN_AGAIN_S):
                    waited_s = round(self._waited_s(stream.outstanding), 1)
                    log.warning("publish.retrying", stream=stream.name, waited_s=waited_s, detail=stream.last_error)
                    stream.warned_at = now

    async def _wait_answered(self, entry: _Outstanding) -> bool:
        """Waits for the answer to a message that was sent alone. False: none came."""
        stream = entry.stream
        stumble = asyncio.ensure_future(stream.interruption.wait())
        waiting: set[asyncio.Future[Any]] = {entry.future, stumble}
        try:
            await asyncio.wait(waiting, timeout=ACK_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stumble.cancel()
        if not entry.future.done():
            if not stream.interruption.is_set():
                stream.last_error = NO_ACK
            await self._clock.sleep(0.05)
        return entry.future.done()

    async def _write_all(self, entries: Sequence[_Outstanding], now: float, *, alone: bool) -> None:
        """Writes messages in this order. Those of an interrupted stream are left to `_recover`.

        `alone`: nothing else is outstanding, so the messages are flushed at once.
        """
        passed_check: Callable[[], None] | None = None
        """The `ensure_owner` that passed last; it and `now` are valid while no other code has run."""
        posted: BusClient | None = None
        for entry in entries:
            if entry.stream.is_interrupted or entry.writes or entry.future.done():
                continue
            message = entry.message
            ensure_owner, reply = message.ensure_owner, f"{self._prefix}{entry.number}"
            if not self._check_preconditions(entry, None if ensure_owner is passed_check else ensure_owner, now):
                continue
            passed_check, nc = ensure_owner, self._nc
            if (
                nc is not None
                and nc is self._connection.nc
                and nc.enqueue_publish(message.subject, message.payload, reply, message.headers or None)
            ):
                posted = nc
            else:
                await self._publish(entry)
                passed_check, now = None, self._clock.monotonic()
        if posted is not None and alone:
            posted.flush_now()
        elif posted is not None:
            posted.flush_soon()

    async def _write(self, entry: _Outstanding) -> None:
        """Writes one message, possibly again. The current server may have a smaller limit."""
        if not entry.future.done():
            self._reject_oversized(entry)
        now = self._clock.monotonic()
        if not entry.future.done() and self._check_preconditions(entry, entry.message.ensure_owner, now):
            await self._publish(entry)

    def _check_preconditions(self, entry: _Outstanding, ensure_owner: Callable[[], None] | None, now: float) -> bool:
        """Whether the message may be written; if so, counts it as written."""
        ensure_owner_if_delayed = entry.message.ensure_owner_if_delayed
        try:
            if ensure_owner is not None:
                ensure_owner()
            if ensure_owner_if_delayed is not None and now - entry.requested_at > DELAYED_PUBLISH_S:
                ensure_owner_if_delayed()
        except LeaseLost as exc:
            self._refuse(entry, exc)
            return False
        entry.sent_at = now
        if entry.writes == 0:
            entry.first_sent_at = entry.sent_at
        else:
            entry.stream.retried.inc()
        entry.writes += 1
        return True

    async def _publish(self, entry: _Outstanding) -> None:
        nc, message = self._connection.nc, entry.message
        if nc is None:
            self._interrupt(entry.stream)
            return
        try:
            reply = f"{self._prefix}{entry.number}"
            await nc.publish(message.subject, message.payload, reply, message.headers or None)
        except (BadHeaderError, BadSubjectError, MaxPayloadError, UnicodeError) as exc:
            # it can never be written, and must not block the messages behind it
            entry.stream.refused.inc()
            self._refuse(entry, BusRefused(0, f"The client refuses it: {type(exc).__name__}"))
        except NatsError as exc:
            log.warning("publish.interrupted", reason=type(exc).__name__)
            self._interrupt(entry.stream)

    def _interrupt(self, stream: _Stream) -> None:
        stream.is_interrupted = True
        stream.interruption.set()
        self._interrupted.set()

    async def _subscribe(self, nc: BusClient) -> None:
        for stream in self._streams.values():
            self._interrupt(stream)
        self._nc = nc
        self._prefix = nc.new_inbox() + "."
        await nc.subscribe_raw(self._prefix + "*", self._on_ack)

    def _on_ack(self, subject: str, data: bytes, headers: bytes) -> None:
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
            ack = self._decode.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            log.warning("publish.ack_unreadable", stream=stream.name)
            self._interrupt(stream)
            return
        if ack.error is not None:
            problem = write_error_of(ack.error)
            if isinstance(problem, Temporary):
                stream.last_error = problem.detail
                self._interrupt(stream)
                return
            stream.refused.inc()
            self._refuse(entry, problem)
            return
        self._remove_outstanding(entry)
        entry.future.set_result(ack)
        stream.stored.inc()
        stream.took.observe(self._clock.monotonic() - entry.first_sent_at)


def _headers_size(headers: dict[str, str]) -> int:
    return 12 + sum(len(k) + len(v) * 4 + 4 for k, v in headers.items())
