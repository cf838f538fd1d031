"""Takes the commands of one shard off the bus and reads them.

All commands of the shard are delivered, so that none waits behind a sandbox that has sent thousands. Beyond a share
per sandbox only the sequence is kept; the command is read back when those before it have ended, or wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import structlog

from adapter import contract
from adapter.conversation.commands import (
    Command,
    Limits,
    client_id_base,
    command_id,
    decode_command,
    original,
    read_command,
    salvage_ids,
)
from adapter.conversation.record import CommandRef
from adapter.conversation.rules import CommandResult, QueuedCommand
from adapter.errors import Refused, Temporary, Unreadable
from adapter.metrics import Metrics
from adapter.names import H_COMMAND, H_MSG_ID, UNROUTED, Names
from adapter.outbound.backlog import PAGE
from adapter.outbound.ledger import MISSING_CONFIRM_S, CommandLedger
from adapter.outbound.receipts import Address
from adapter.ports import Archive, Delivery
from adapter.tasks import Tasks
from adapter.timing import Clock, first_of

log = structlog.get_logger()

MAX_NAME = 64
"""Characters of a sandbox's name (names.SANDBOX_PATTERN)."""


class ReadCommand(NamedTuple):
    """A command that can be carried out."""

    command: Command
    queued: QueuedCommand
    redelivered: bool
    """It was delivered before: somebody may have worked on it."""


class CommandIntake:
    """The deliveries of one shard."""

    def __init__(
        self,
        ledger: CommandLedger,
        history: Archive,
        names: Names,
        limits: Limits,
        clock: Clock,
        metrics: Metrics,
        draining: asyncio.Event,
        tasks: Tasks,
    ) -> None:
        self.on_command: Callable[[ReadCommand], None] = _ignore
        self.on_unreadable: Callable[[QueuedCommand, CommandResult, Address], None] = _ignore
        """Called with what cannot be carried out, and how it ends."""
        self._ledger = ledger
        self._history = history
        self._names = names
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._draining = draining
        self._tasks = tasks
        self._reading: set[str] = set()
        """Subjects of which commands are being read back."""
        ledger.on_room = self._read_on

    def stop(self) -> None:
        """Hands on nothing any more."""
        self.on_command = self.on_unreadable = self._ledger.on_room = _ignore

    def on_delivery(self, delivery: Delivery) -> None:
        """A command arrived, or arrived again."""
        if self._ledger.has_ended(delivery):
            self._tasks.spawn(delivery.ack())
        elif not (self._ledger.renew(delivery) or self._ledger.backlog.came_again(delivery)):
            if not delivery.suspect:
                self._metrics.outbound_taken.inc()
            if self._ledger.backlog.takes(delivery):
                self._accept(delivery)
            elif self._ledger.backlog.next(delivery.subject) is not None:
                self._read_on(delivery.subject)

    def _read_on(self, subject: str) -> None:
        if subject not in self._reading and not self._draining.is_set():
            self._reading.add(subject)
            self._tasks.spawn(self._read_backlog(subject))

    async def _read_backlog(self, subject: str) -> None:
        """Accepts what had to wait on the bus, in order, as far as there is room."""
        backlog, clock = self._ledger.backlog, self._clock
        missing_since: float | None = None
        try:
            while (first := backlog.next(subject)) and not self._draining.is_set():
                last = backlog.last(subject)
                try:
                    read = self._history.read(self._names.stream_out, subject, after=first - 1, most=PAGE)
                    page = [stored async for stored in read]
                except Temporary as exc:
                    log.warning("command.retrying", subject=subject, reason=exc.reason)
                    await first_of(self._draining, 0.5)
                    continue
                except Exception:  # a bug; what waits there is not left behind
                    log.exception("command.crashed", subject=subject)
                    await first_of(self._draining, 0.5)
                    continue
                up_to = page[-1].seq if len(page) == PAGE else last
                if gone := backlog.missing(subject, {stored.seq for stored in page}, up_to):
                    missing_since = clock.monotonic() if missing_since is None else missing_since
                    if clock.monotonic() - missing_since < MISSING_CONFIRM_S:
                        await first_of(self._draining, 0.5)
                        continue
                    backlog.forget(subject, gone)
                    log.warning("commands.gone", subject=subject, commands=len(gone), first=gone[0])
                missing_since = None
                for stored in page:
                    if self._draining.is_set() or not backlog.next(subject):
                        break
                    if delivery := backlog.take_back(subject, stored.seq, stored.data, stored.headers):
                        started = clock.monotonic()
                        self._accept(delivery)
                        # reading takes its time (Markdown above all), and all others live in the same loop
                        await asyncio.sleep(3 * (clock.monotonic() - started))
        finally:
            self._reading.discard(subject)

    def _accept(self, delivery: Delivery) -> None:
        """Reads a command. What cannot be carried out ends, whatever reading it raises."""
        self._ledger.add(delivery)
        sandbox = delivery.subject.rpartition(".")[2]
        sequence, stored_ms = original(delivery.headers, delivery.seq, delivery.time_ms)
        body = contract.Outbound()
        try:
            body = decode_command(delivery.data, self._limits)
            command = read_command(
                body,
                sandbox=sandbox,
                ident=_command_id(delivery, body),
                sequence=sequence,
                time_ms=stored_ms,
                limits=self._limits,
            )
        except Refused as exc:
            result = CommandResult("refused", exc.reason, exc.detail)
        except Unreadable as exc:
            body = salvage_ids(delivery.data, self._limits)
            result = CommandResult("dead_lettered", exc.reason, exc.detail)
        except Exception as exc:
            log.exception("command.crashed", subject=delivery.subject, sequence=delivery.seq)
            result = CommandResult("dead_lettered", "crashed", type(exc).__name__)
        else:
            self.on_command(ReadCommand(command, _queued(command, delivery.seq), delivery.suspect))
            return
        self._metrics.schema_violations.labels(kind="out").inc()
        ref = CommandRef(sequence=sequence, stored_ms=stored_ms, id=_command_id(delivery, body))
        placeholder = QueuedCommand(
            sequence=delivery.seq, ref=ref, client_id_base=client_id_base(sandbox, sequence, stored_ms)
        )
        # the subject of a receipt of a longer name would break the connection
        self.on_unreadable(placeholder, result, Address(sandbox if len(sandbox) <= MAX_NAME else UNROUTED))


def _ignore(*_: object) -> None: ...


def _queued(command: Command, sequence: int) -> QueuedCommand:
    only = command.parts[0] if len(command.parts) == 1 else None
    return QueuedCommand(
        sequence=sequence,
        ref=CommandRef(sequence=command.sequence, stored_ms=command.stored_ms, id=command.id),
        client_id_base=command.client,
        kind=command.kind,
        parts=command.parts,
        part_count=len(command.parts),
        chars=len(only) if isinstance(only, str) else 0,
        expires_ms=command.expires_ms,
        when_closed=command.when_closed,
        optional=command.optional,
        typing=command.typing,
    )


def _command_id(delivery: Delivery, body: contract.Outbound) -> str:
    routed, msg_id = delivery.headers.get(H_COMMAND, ""), delivery.headers.get(H_MSG_ID, "")
    return command_id(body.id, routed, msg_id, delivery.seq)
