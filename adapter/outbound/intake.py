"""Takes the commands of one shard from their consumer.

Commands without room in memory (`Backlog`) wait as sequences, and are read from the bus in order as others end.
"""

from __future__ import annotations

import asyncio

import structlog

from adapter.contract.names import Names
from adapter.errors import Temporary
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import Clock, wait_event
from adapter.observability.metrics import Metrics
from adapter.outbound.backlog import PAGE
from adapter.outbound.ledger import CommandLedger
from adapter.outbound.reading import MISSING_CONFIRM_S, CommandReader
from adapter.ports import Archive, Delivery

log = structlog.get_logger()


class CommandIntake:
    """Processes the deliveries of one shard."""

    def __init__(
        self,
        ledger: CommandLedger,
        reader: CommandReader,
        history: Archive,
        names: Names,
        clock: Clock,
        metrics: Metrics,
        draining: asyncio.Event,
        tasks: TaskSet,
    ) -> None:
        self._ledger = ledger
        self._reader = reader
        self._history = history
        self._names = names
        self._clock = clock
        self._metrics = metrics
        self._draining = draining
        self._tasks = tasks
        self._reading: set[str] = set()
        """Subjects whose backlog is being read."""
        ledger.on_room = self._read_backlog_soon

    def stop(self) -> None:
        """Passes on no more commands."""
        self._reader.stop()
        self._ledger.on_room = _ignore

    def on_delivery(self, delivery: Delivery) -> None:
        """Processes a delivery or redelivery."""
        if self._ledger.has_ended(delivery):
            self._tasks.spawn(delivery.ack())
        elif not (self._ledger.renew(delivery) or self._ledger.backlog.renew(delivery)):
            if not delivery.redelivered:
                self._metrics.outbound_received.inc()
            if self._ledger.backlog.admit(delivery):
                self._accept(delivery)
            elif self._ledger.backlog.next(delivery.subject) is not None:
                self._read_backlog_soon(delivery.subject)

    def _read_backlog_soon(self, subject: str) -> None:
        if subject not in self._reading and not self._draining.is_set():
            self._reading.add(subject)
            self._tasks.spawn(self._read_backlog(subject))

    async def _read_backlog(self, subject: str) -> None:
        """Accepts the waiting commands of a subject in order, as far as there is room."""
        backlog, clock = self._ledger.backlog, self._clock
        missing_since: float | None = None
        try:
            while (first := backlog.next(subject)) and not self._draining.is_set():
                last = backlog.last(subject)
                try:
                    read = self._history.read(self._names.stream_out, subject, after=first - 1, limit=PAGE)
                    page = [stored async for stored in read]
                except Temporary as exc:
                    log.warning("command.retrying", subject=subject, reason=exc.reason)
                    await wait_event(self._draining, 0.5)
                    continue
                except Exception:  # a bug; the backlog must not be left behind
                    log.exception("command.crashed", subject=subject)
                    await wait_event(self._draining, 0.5)
                    continue
                up_to = page[-1].seq if len(page) == PAGE else last
                if gone := backlog.missing(subject, {stored.seq for stored in page}, up_to):
                    missing_since = clock.monotonic() if missing_since is None else missing_since
                    if clock.monotonic() - missing_since < MISSING_CONFIRM_S:
                        await wait_event(self._draining, 0.5)
                        continue
                    backlog.forget(subject, gone)
                    log.warning("commands.gone", subject=subject, commands=len(gone), first=gone[0])
                missing_since = None
                for stored in page:
                    if self._draining.is_set() or not backlog.next(subject):
                        break
                    if delivery := backlog.reload(subject, stored.seq, stored.data, stored.headers):
                        started = clock.monotonic()
                        self._accept(delivery)
                        # reading takes time, and the event loop is shared
                        await asyncio.sleep(3 * (clock.monotonic() - started))
        finally:
            self._reading.discard(subject)

    def _accept(self, delivery: Delivery) -> None:
        self._ledger.add(delivery)
        self._reader.put(delivery)


def _ignore(*_: object) -> None: ...
