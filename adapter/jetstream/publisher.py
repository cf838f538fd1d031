"""Publishing to streams: pipelined, acknowledged, and in order even when the connection breaks.

What is outstanding is kept by stream, in the order of the calls. Normally everything is written at once. After a
break, a missing ack or "no responders", the flow to that stream stops: its oldest outstanding message is sent alone
until it is answered, and only then the stream's others follow in order. So a message never overtakes an earlier one
for the same stream, the stream drops repeats by Nats-Msg-Id, and a stream that takes nothing holds up no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
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
from adapter.observability.fast_metrics import CounterValue, HistogramValue
from adapter.observability.metrics import Metrics
from adapter.ports import Message, PubAck

log = structlog.get_logger()

ACK_TIMEOUT_S = 1.0
"""Longer than any ack of a healthy server here, shorter than a leader election."""
STALLED_S = 2.0
"""A write that waits longer is said to wait, and the server is asked whether it is cut off from the others."""
WARN_AGAIN_S = 30.0
"""How often that is said again."""

DELAYED_PUBLISH_S = 240.0
"""A write that waits longer is late: less than a stream's window for ids (topology.DUPLICATE_WINDOW_NS)."""
NO_ACK = "no acknowledgement"
MAX_SUBJECT = 3072
"""A server ends the connection over a line of more than 4,096 bytes, and would do so at every repeat."""


class _PublishReply(PubAck):
    """JetStream's answer to a publish."""

    error: ApiError | None = None


class _Outstanding(msgspec.Struct):
    number: int
    message: Message
    stream: _StreamState
    future: asyncio.Future[PubAck]
    requested_at: float
    sent_at: float = 0.0
    first_sent_at: float = 0.0
    writes: int = 0


class _StreamState:
    """What is written to one stream and not answered yet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.outstanding: dict[int, _Outstanding] = {}
        """By number, which is the order of the calls."""
        self.last_error = NO_ACK
        """Why its oldest write waits, in words for an operator."""
        self.interruption = asyncio.Event()
        self.recovery: asyncio.Task[None] | None = None
        self.warned_at = 0.0
        """When the log last said that it waits; 0: not since it flowed."""


class Publisher:
    """Stores messages over one connection; waits, also for hours, until their streams have them."""

    def __init__(self, connection: ManagedConnection, clock: Clock, metrics: Metrics) -> None:
        self._connection = connection
        self._clock = clock
        self._metrics = metrics
        self._streams: dict[str, _StreamState] = {}
        """By the beginning of their subjects, see `_stream_of`."""
        self._outstanding: dict[int, _Outstanding] = {}
        """Those of all streams."""
        self._numbers = itertools.count()
        self._interrupted_streams: set[str] = set()
        """The streams to which `_recover` alone writes."""
        self._resumed = ChangeSignal()
        self._interrupted = asyncio.Event()
        self._decode = msgspec.json.Decoder(_PublishReply)
        self._nc: BusClient | None = None
        """Over which acknowledgements are heard."""
        self._prefix = ""
        self._stored: dict[str, tuple[CounterValue, HistogramValue]] = {}
        connection.on_connect(self._subscribe)

    @property
    def waiting_s(self) -> float:
        """How long the oldest write has been waiting for its acknowledgement; 0 where none waits."""
        return self._waited_s(self._outstanding)

    @property
    def last_error(self) -> str:
        """Which stream the oldest write waits for, and why, in words for an operator."""
        oldest = next(iter(self._outstanding.values()), None)
        return f"{oldest.stream.name}: {oldest.stream.last_error}" if oldest else ""

    async def wait_writable(self, streams: Iterable[str]) -> None:
        """Returns when these take what is written: at once, unless a write to one waits for longer than it should."""
        await self._resumed.wait_until(lambda: self._interrupted_streams.isdisjoint(streams))

    async def publish(self, message: Message) -> PubAck:
        """Returns once the stream has it, however long the bus is away. Raises Conflict, BusRefused, LeaseLost."""
        alone = not self._outstanding
        future, now = asyncio.get_running_loop().create_future(), self._clock.monotonic()
        entry = self._add_outstanding(message, self._stream_of(message.subject), future, now)
        try:
            await self._write_all([entry], alone=alone)
            return await entry.future
        finally:
            self._remove_outstanding(entry)

    async def publish_all(self, messages: Sequence[Message]) -> list[PubAck | BusRefused]:
        """Stores all of them, those of a stream in this order, pipelined; a refusal stands in the place of its ack.

        Raises LeaseLost.
        """
        loop, now, alone = asyncio.get_running_loop(), self._clock.monotonic(), not self._outstanding
        entries, subject = [], ""
        for message in messages:
            if message.subject != subject:  # those of a batch have mostly the same
                subject, stream = message.subject, self._stream_of(message.subject)
            entries.append(self._add_outstanding(message, stream, loop.create_future(), now))
        try:
            await self._write_all(entries, alone=alone)
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
        self, message: Message, stream: _StreamState, future: asyncio.Future[PubAck], now: float
    ) -> _Outstanding:
        """In the order of the calls; what can never be written is refused at once."""
        number = next(self._numbers)
        entry = _Outstanding(number, message, stream, future, now)
        self._outstanding[number] = stream.outstanding[number] = entry
        self._reject_oversized(entry)
        return entry

    def _stream_of(self, subject: str) -> _StreamState:
        """The stream of a subject, told by its first two tokens."""
        end = subject.find(".", subject.find(".") + 1)
        key = subject if end < 0 else subject[:end]
        found = self._streams.get(key)
        if found is None:
            found = self._streams[key] = _StreamState(stream_of(subject))
        return found

    def _remove_outstanding(self, entry: _Outstanding) -> None:
        """It has its answer, or nobody wants it any more."""
        if self._outstanding.pop(entry.number, None) is not None:
            del entry.stream.outstanding[entry.number]

    def _refuse(self, entry: _Outstanding, problem: AdapterError) -> None:
        self._remove_outstanding(entry)
        if not entry.future.done():  # else its caller was cancelled
            entry.future.set_exception(problem)

    def _waited_s(self, outstanding: dict[int, _Outstanding]) -> float:
        """How long the oldest has been waiting; 0 where there is none."""
        oldest = next(iter(outstanding.values()), None)
        return max(0.0, self._clock.monotonic() - oldest.requested_at) if oldest else 0.0

    def _reject_oversized(self, entry: _Outstanding) -> None:
        """Refuses what the server would end the connection for."""
        message, limit = entry.message, self._connection.max_payload
        if len(message.payload) > limit // 2 and len(message.payload) + _headers_size(message.headers) > limit:
            self._refuse(entry, BusRefused(0, f"{len(message.payload)} bytes exceed the server's max_payload"))
            self._connection.recheck_max_payload()
        elif len(message.subject) > MAX_SUBJECT // 4 and len(message.subject.encode()) > MAX_SUBJECT:
            self._refuse(entry, BusRefused(0, "The subject is too long."))

    async def run(self) -> None:
        """Watches the acks and mends the flow to each stream, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._warn_if_stalled_forever())
            while True:
                self._interrupted.clear()
                for stream in self._streams.values():
                    if self._is_ack_overdue(stream):
                        self._interrupted_streams.add(stream.name)
                    if stream.name in self._interrupted_streams and (
                        stream.recovery is None or stream.recovery.done()
                    ):
                        stream.recovery = group.create_task(self._recover(stream))
                await wait_event(self._interrupted, ACK_TIMEOUT_S / 2)

    def _is_ack_overdue(self, stream: _StreamState) -> bool:
        """Tells whether an ack is overdue: what has its ack is outstanding no more, so the oldest write shows it."""
        oldest = next((entry for entry in stream.outstanding.values() if entry.writes), None)
        return oldest is not None and self._clock.monotonic() - oldest.sent_at > ACK_TIMEOUT_S

    async def _recover(self, stream: _StreamState) -> None:
        """Sends the oldest message alone until it is answered, then all others in order."""
        while stream.name in self._interrupted_streams:
            await self._connection.wait_connected()
            stream.interruption.clear()
            oldest = next(iter(stream.outstanding.values()), None)
            if oldest is not None:
                await self._write(oldest)
                if not await self._wait_answered(oldest):
                    continue
            # what is added while this is written comes after it: written here too, so that numbers stay in order
            last = -1
            while fresh := [entry for number, entry in stream.outstanding.items() if number > last]:
                for entry in fresh:
                    await self._write(entry)
                last = fresh[-1].number
            if stream.interruption.is_set():
                continue
            self._interrupted_streams.discard(stream.name)
            self._resumed.notify_all()
            if stream.warned_at:
                stream.warned_at = 0.0
                log.info("publish.resumed", stream=stream.name)

    async def _warn_if_stalled_forever(self) -> None:
        """Says which streams take nothing, and looks whether another server would take it."""
        while True:
            await asyncio.sleep(ACK_TIMEOUT_S / 2)
            waiting = [s for s in self._streams.values() if self._waited_s(s.outstanding) >= STALLED_S]
            if not waiting or not self._connection.is_connected:
                continue
            with contextlib.suppress(Temporary, BusRefused):
                await self._connection.probe()
            now = self._clock.monotonic()
            for stream in waiting:
                if stream.name not in self._interrupted_streams or (
                    stream.warned_at and now - stream.warned_at < WARN_AGAIN_S
                ):
                    continue
                waited_s = round(self._waited_s(stream.outstanding), 1)
                log.warning("publish.retrying", stream=stream.name, waited_s=waited_s, detail=stream.last_error)
                stream.warned_at = now

    async def _wait_answered(self, entry: _Outstanding) -> bool:
        """Waits for the answer to a message that was sent alone; False where it does not come."""
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

    async def _write_all(self, entries: Sequence[_Outstanding], *, alone: bool) -> None:
        """Writes them in this order; where a stream's flow stops, its others follow once it is mended.

        `alone`: nothing else is on its way, so that there is nothing to wait for that could be written with them.
        """
        passed_check: Callable[[], None] | None = None
        """The fence that let the one before through, and nothing else has run since."""
        posted: BusClient | None = None
        for entry in entries:
            if entry.stream.name in self._interrupted_streams or entry.writes or entry.future.done():
                continue
            ensure_owner = entry.message.ensure_owner
            if not self._check_preconditions(entry, None if ensure_owner is passed_check else ensure_owner):
                continue
            passed_check, nc = ensure_owner, self._nc
            if (
                nc is not None
                and nc is self._connection.nc
                and nc.enqueue_publish(*_publish_arguments(entry.message, f"{self._prefix}{entry.number}"))
            ):
                posted = nc
            else:
                await self._publish(entry)
                passed_check = None
        if posted is not None and alone:
            posted.flush_now()
        elif posted is not None:
            posted.flush_soon()

    async def _write(self, entry: _Outstanding) -> None:
        """Writes one, also once more: this server may take less than the one before."""
        if not entry.future.done():
            self._reject_oversized(entry)
        if not entry.future.done() and self._check_preconditions(entry, entry.message.ensure_owner):
            await self._publish(entry)

    def _check_preconditions(self, entry: _Outstanding, ensure_owner: Callable[[], None] | None) -> bool:
        """Whether it may be written, which then counts as done."""
        now, ensure_owner_if_delayed = self._clock.monotonic(), entry.message.ensure_owner_if_delayed
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
            self._metrics.nats_publish.labels(stream=entry.message.stream, outcome="retried").inc()
        entry.writes += 1
        return True

    async def _publish(self, entry: _Outstanding) -> None:
        nc = self._connection.nc
        if nc is None:
            self._interrupt(entry.stream)
            return
        try:
            await nc.publish(*_publish_arguments(entry.message, f"{self._prefix}{entry.number}"))
        except (BadHeaderError, BadSubjectError, MaxPayloadError, UnicodeError) as exc:
            # It can never be written, and what waits behind it must not wait for ever.
            self._metrics.nats_publish.labels(stream=entry.message.stream, outcome="refused").inc()
            self._refuse(entry, BusRefused(0, f"The client refuses it: {type(exc).__name__}"))
        except NatsError as exc:
            log.warning("publish.interrupted", reason=type(exc).__name__)
            self._interrupt(entry.stream)

    def _interrupt(self, stream: _StreamState) -> None:
        self._interrupted_streams.add(stream.name)
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
        label = entry.message.stream
        if ack.error is not None:
            problem = write_error_of(ack.error)
            if isinstance(problem, Temporary):
                stream.last_error = problem.detail
                self._interrupt(stream)
                return
            self._metrics.nats_publish.labels(stream=label, outcome="refused").inc()
            self._refuse(entry, problem)
            return
        self._remove_outstanding(entry)
        entry.future.set_result(ack)
        ok, took = self._stored_metrics(label)
        ok.inc()
        took.observe(self._clock.monotonic() - entry.first_sent_at)

    def _stored_metrics(self, stream: str) -> tuple[CounterValue, HistogramValue]:
        """What is stored, and how long that took. Kept: to find them in the metrics takes longer than to count."""
        found = self._stored.get(stream)
        if found is None:
            ok = self._metrics.nats_publish.labels(stream=stream, outcome="ok")
            found = self._stored[stream] = ok, self._metrics.nats_publish_duration.labels(stream=stream)
        return found


def _publish_arguments(message: Message, reply: str) -> tuple[str, bytes, str, dict[str, str] | None]:
    """As nats-py's `publish` takes it."""
    return message.subject, message.payload, reply, message.headers or None


def _headers_size(headers: dict[str, str]) -> int:
    return 12 + sum(len(k) + len(v) * 4 + 4 for k, v in headers.items())
