"""Publishing to streams: pipelined, acknowledged, and in order even when the connection breaks.

What is outstanding is kept in the order of the calls. Normally everything is written at once and the acks
come back in any order. After a break, a missing ack or "no responders", the flow stops: the oldest
outstanding message is sent alone until it is acknowledged, and only then the others follow in order.
So a message never overtakes an earlier one of the same caller, and the stream drops repeats by Nats-Msg-Id.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import structlog
from nats.errors import BadHeaderError, BadSubjectError, MaxPayloadError
from nats.errors import Error as NatsError

from adapter.errors import BusRefused, LeaseLost, Temporary
from adapter.jetstream.answers import ApiError, write_refusal
from adapter.jetstream.client import BusClient, is_unheard
from adapter.jetstream.link import Link
from adapter.metrics import Metrics
from adapter.ports import Message, PubAck
from adapter.tallies import Count, Distribution
from adapter.timing import Clock, Condition, first_of

log = structlog.get_logger()

ACK_TIMEOUT_S = 1.0
"""Longer than any ack of a healthy server here, shorter than a leader election."""
WORRY_S = 2.0
"""A write that waits longer is said to wait, and the server is asked whether it is cut off from the others."""
REMIND_S = 30.0
"""How often that is said again."""

LATE_S = 240.0
"""A write that waits longer is late: less than a stream's window for ids (topology.DUPLICATE_WINDOW_NS)."""
MAX_SUBJECT = 3072
"""A server ends the connection over a line of more than 4,096 bytes, and would do so at every repeat."""


class _Answer(PubAck):
    """JetStream's answer to a publish."""

    error: ApiError | None = None


class _Outstanding(msgspec.Struct):
    message: Message
    future: asyncio.Future[PubAck]
    asked: float
    sent: float = 0.0
    first_sent: float = 0.0
    writes: int = 0


class Publisher:
    """Stores messages through one link; waits, also for hours, until the stream has them."""

    def __init__(self, link: Link, clock: Clock, metrics: Metrics) -> None:
        self._link = link
        self._clock = clock
        self._metrics = metrics
        self._outstanding: dict[int, _Outstanding] = {}
        self._numbers = itertools.count()
        self._flowing = False
        self._flows = Condition()
        self.hurdle = "no acknowledgement"
        """Why the oldest write waits, in words for an operator."""
        self._stumbled = asyncio.Event()
        self._decode = msgspec.json.Decoder(_Answer)
        self._nc: BusClient | None = None
        """Over which acknowledgements are heard."""
        self._prefix = ""
        self._stored: dict[str, tuple[Count, Distribution]] = {}
        link.on_up(self._subscribe)

    @property
    def waiting_s(self) -> float:
        """How long the oldest write has been waiting for its acknowledgement; 0 where none waits."""
        oldest = next((entry for entry in self._outstanding.values() if not entry.future.done()), None)
        return max(0.0, self._clock.monotonic() - oldest.asked) if oldest else 0.0

    async def writable(self) -> None:
        """Returns when the bus takes what is written: at once, unless a write waits for longer than it should."""
        await self._flows.until(lambda: self._flowing)

    async def publish(self, message: Message) -> PubAck:
        """Returns once the stream has it, however long the bus is away. Raises Conflict, BusRefused, LeaseLost."""
        alone = not self._outstanding
        taken = self._take(message, asyncio.get_running_loop().create_future(), self._clock.monotonic())
        number, entry = taken
        try:
            await self._write_all([taken], alone=alone)
            return await entry.future
        finally:
            del self._outstanding[number]

    async def publish_all(self, messages: Sequence[Message]) -> list[PubAck | BusRefused]:
        """Stores all of them in this order, pipelined; a refusal stands in the place of its ack. Raises LeaseLost."""
        loop, now, alone = asyncio.get_running_loop(), self._clock.monotonic(), not self._outstanding
        taken = [self._take(message, loop.create_future(), now) for message in messages]
        try:
            await self._write_all(taken, alone=alone)
            acks: list[PubAck | BusRefused] = []
            for _, entry in taken:
                try:
                    acks.append(await entry.future)
                except BusRefused as exc:
                    acks.append(exc)
            return acks
        finally:
            for number, _ in taken:
                del self._outstanding[number]

    def _take(self, message: Message, future: asyncio.Future[PubAck], now: float) -> tuple[int, _Outstanding]:
        """In the order of the calls; what can never be written is refused at once."""
        entry = _Outstanding(message, future, now)
        self._measure(entry)
        number = next(self._numbers)
        self._outstanding[number] = entry
        return number, entry

    def _measure(self, entry: _Outstanding) -> None:
        """Refuses what the server would end the connection for."""
        message, most = entry.message, self._link.max_payload
        if len(message.payload) > most // 2 and len(message.payload) + _size(message.headers) > most:
            entry.future.set_exception(BusRefused(0, f"{len(message.payload)} bytes exceed the server's max_payload"))
            self._link.doubt_limit()
        elif len(message.subject) > MAX_SUBJECT // 4 and len(message.subject.encode()) > MAX_SUBJECT:
            entry.future.set_exception(BusRefused(0, "The subject is too long."))

    async def run(self) -> None:
        """Watches the acks and mends the flow, until cancelled."""
        while True:
            self._stumbled.clear()
            if not self._flowing or self._is_late():
                self._flowing = False
                await self._recover()
            await first_of(self._stumbled, ACK_TIMEOUT_S / 2)

    def _is_late(self) -> bool:
        """Tells whether an ack is overdue: only the oldest message needs a look, acks come nearly in order."""
        for entry in itertools.islice(self._outstanding.values(), 1):
            if entry.writes and not entry.future.done():
                return self._clock.monotonic() - entry.sent > ACK_TIMEOUT_S
        return False

    async def _recover(self) -> None:
        """Sends the oldest message alone until it is acknowledged, then all others in order."""
        await self._link.wait_up()
        told = 0.0
        while True:
            pending = [(n, e) for n, e in self._outstanding.items() if not e.future.done()]
            if not pending:
                self._resume(told)
                return
            number, oldest = pending[0]
            oldest.sent = 0.0
            await self._write(number, oldest)
            if not await self._acked(oldest):
                told = await self._worry(oldest, told)
                await self._link.wait_up()
                continue
            for number, entry in pending[1:]:
                await self._write(number, entry)
            # what was added while we wrote comes after: written here too, so that numbers stay in order
            last = pending[-1][0]
            while fresh := [(n, e) for n, e in self._outstanding.items() if n > last and not e.writes]:
                for number, entry in fresh:
                    if not entry.future.done():
                        await self._write(number, entry)
                last = fresh[-1][0]
            self._resume(told)
            return

    def _resume(self, told: float) -> None:
        self._flowing = True
        self._flows.notify()
        if told:
            log.info("publish.resumed")

    async def _worry(self, oldest: _Outstanding, told: float) -> float:
        """Says that the bus takes nothing, and looks whether another server would. Returns when it was said last."""
        waited_s = self.waiting_s
        if waited_s < WORRY_S:
            return told
        with contextlib.suppress(Temporary, BusRefused):
            await self._link.probe()
        now = self._clock.monotonic()
        if told and now - told < REMIND_S:
            return told
        stream = oldest.message.stream
        log.warning("publish.waits", stream=stream, waited_s=round(waited_s, 1), detail=self.hurdle)
        return now

    async def _acked(self, entry: _Outstanding) -> bool:
        self._stumbled.clear()
        stumble = asyncio.ensure_future(self._stumbled.wait())
        waiting: set[asyncio.Future[Any]] = {entry.future, stumble}
        try:
            await asyncio.wait(waiting, timeout=ACK_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stumble.cancel()
        if not entry.future.done():
            if not self._stumbled.is_set():
                self.hurdle = "no acknowledgement"
            await self._clock.sleep(0.05)
        return entry.future.done()

    async def _write_all(self, taken: Sequence[tuple[int, _Outstanding]], *, alone: bool) -> None:
        """Writes them in this order; where the flow stops, they follow once it is mended.

        `alone`: nothing else is on its way, so that there is nothing to wait for that could be written with them.
        """
        passed: Callable[[], None] | None = None
        """The fence that let the one before through, and nothing else has run since."""
        posted: BusClient | None = None
        for number, entry in taken:
            if not self._flowing or entry.writes or entry.future.done():
                continue
            fence = entry.message.fence
            if not self._begin(entry, None if fence is passed else fence):
                continue
            passed, nc = fence, self._nc
            if (
                nc is not None
                and nc is self._link.nc
                and nc.post(*_as_sent(entry.message, f"{self._prefix}{number}"))
            ):
                posted = nc
            else:
                await self._publish(number, entry)
                passed = None
        if posted is not None and alone:
            posted.write_now()
        elif posted is not None:
            posted.write_soon()

    async def _write(self, number: int, entry: _Outstanding) -> None:
        """Writes one, also once more: this server may take less than the one before."""
        if not entry.future.done():
            self._measure(entry)
        if not entry.future.done() and self._begin(entry, entry.message.fence):
            await self._publish(number, entry)

    def _begin(self, entry: _Outstanding, fence: Callable[[], None] | None) -> bool:
        """Whether it may be written, which then counts as done."""
        now, late = self._clock.monotonic(), entry.message.late
        try:
            if fence is not None:
                fence()
            if late is not None and now - entry.asked > LATE_S:
                late()
        except LeaseLost as exc:
            entry.future.set_exception(exc)
            return False
        entry.sent = now
        if entry.writes == 0:
            entry.first_sent = entry.sent
        else:
            self._metrics.nats_publish.labels(stream=entry.message.stream, outcome="retried").inc()
        entry.writes += 1
        return True

    async def _publish(self, number: int, entry: _Outstanding) -> None:
        nc = self._link.nc
        if nc is None:
            self._stumble()
            return
        try:
            await nc.publish(*_as_sent(entry.message, f"{self._prefix}{number}"))
        except (BadHeaderError, BadSubjectError, MaxPayloadError, UnicodeError) as exc:
            # It can never be written, and what waits behind it must not wait for ever.
            self._metrics.nats_publish.labels(stream=entry.message.stream, outcome="refused").inc()
            entry.future.set_exception(BusRefused(0, f"The client refuses it: {type(exc).__name__}"))
        except NatsError as exc:
            log.warning("publish.interrupted", reason=type(exc).__name__)
            self._stumble()

    def _stumble(self) -> None:
        self._flowing = False
        self._stumbled.set()

    async def _subscribe(self, nc: BusClient) -> None:
        self._flowing = False
        self._nc = nc
        self._prefix = nc.new_inbox() + "."
        await nc.hear(self._prefix + "*", self._on_ack)
        self._stumbled.set()

    def _on_ack(self, subject: str, data: bytes, headers: bytes) -> None:
        number = subject[len(self._prefix) :]
        entry = self._outstanding.get(int(number)) if number.isdecimal() else None
        if entry is None or entry.future.done():
            return
        if headers and is_unheard(headers):
            self.hurdle = "no stream takes it, or none has a leader"
            self._stumble()
            return
        try:
            ack = self._decode.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            log.warning("publish.ack_unreadable", stream=entry.message.stream)
            self._stumble()
            return
        stream = entry.message.stream
        if ack.error is not None:
            problem = write_refusal(ack.error)
            if isinstance(problem, Temporary):
                self.hurdle = problem.detail
                self._stumble()
                return
            self._metrics.nats_publish.labels(stream=stream, outcome="refused").inc()
            entry.future.set_exception(problem)
            return
        entry.future.set_result(ack)
        ok, took = self._tallies(stream)
        ok.inc()
        took.observe(self._clock.monotonic() - entry.first_sent)

    def _tallies(self, stream: str) -> tuple[Count, Distribution]:
        """What is stored, and how long that took. Kept: to find them in the metrics takes longer than to count."""
        found = self._stored.get(stream)
        if found is None:
            ok = self._metrics.nats_publish.labels(stream=stream, outcome="ok")
            found = self._stored[stream] = ok, self._metrics.nats_publish_duration.labels(stream=stream)
        return found


def _as_sent(message: Message, reply: str) -> tuple[str, bytes, str, dict[str, str] | None]:
    """As nats-py's `publish` takes it."""
    return message.subject, message.payload, reply, message.headers or None


def _size(headers: dict[str, str]) -> int:
    return 12 + sum(len(k) + len(v) * 4 + 4 for k, v in headers.items())
