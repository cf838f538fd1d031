"""Reads the commands of one shard: what they say, and how those end that nobody can carry out.

Text that takes its time is read in another process, and the other sandboxes do not wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog

from adapter.contract import messages as contract
from adapter.contract.names import H_COMMAND, H_COPIED_AGAIN, H_MSG_ID, UNROUTED, Names
from adapter.conversation.commands import (
    Command,
    Limits,
    Part,
    client_id_base,
    command_id,
    decode_command,
    is_slow,
    original_position,
    read_command,
    salvage_ids,
    texts_of,
    with_texts,
)
from adapter.conversation.record import CommandRef
from adapter.conversation.rules import CommandResult, QueuedCommand
from adapter.errors import Refused, Temporary, Unreadable
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import Clock, wait_event
from adapter.observability.metrics import Metrics
from adapter.outbound.receipts import Address
from adapter.ports import Archive, Delivery, TextReader

log = structlog.get_logger()

MAX_NAME = 64
"""Characters of a sandbox's name (names.SANDBOX_PATTERN)."""
MISSING_CONFIRM_S = 10.0
"""What waits on the bus and is missing there for so long is gone. A cluster that is losing its leaders may not show
all that it has, and what is taken for gone is overtaken."""


class ReadCommand(NamedTuple):
    """A command that can be carried out."""

    command: Command
    queued: QueuedCommand
    redelivered: bool
    """It, or another copy of it, was delivered before: somebody may have worked on it."""


class CommandReader:
    """Reads each command once, those of a sandbox in order."""

    def __init__(
        self,
        limits: Limits,
        metrics: Metrics,
        texts: TextReader,
        draining: asyncio.Event,
        tasks: TaskSet,
    ) -> None:
        self.on_command: Callable[[ReadCommand], None] = _ignore
        self.on_unreadable: Callable[[QueuedCommand, CommandResult, Address], None] = _ignore
        """Called with what cannot be carried out, and how it ends."""
        self._limits = limits
        self._metrics = metrics
        self._texts = texts
        self._unread: dict[str, deque[Delivery]] = {}
        """By subject, in order: commands of which one takes its time to be read, and those behind it."""
        self._draining = draining
        self._tasks = tasks

    def stop(self) -> None:
        """Hands on nothing any more."""
        self.on_command = self.on_unreadable = _ignore

    def put(self, delivery: Delivery) -> None:
        """Reads a command, behind those of its sandbox that are being read."""
        if delivery.subject in self._unread:
            self._read_later(delivery)
        else:
            self._read(delivery)

    def _read(self, delivery: Delivery, said: contract.Outbound | Refused | None = None) -> None:
        """Reads a command. What cannot be carried out ends, whatever reading it raises.

        `said`: the body with what its Markdown says, or why nobody can tell; None: that was not read yet.
        """
        sandbox = delivery.subject.rpartition(".")[2]
        sequence, stored_ms = original_position(delivery.headers, delivery.seq, delivery.time_ms)
        body = contract.Outbound()
        try:
            body = decode_command(delivery.data, self._limits)
            if isinstance(said, Refused):
                raise said
            if said is None and is_slow(body, self._limits):
                self._read_later(delivery)
                return
            command = read_command(
                said or body,
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
            redelivered = delivery.redelivered or H_COPIED_AGAIN in delivery.headers
            self.on_command(ReadCommand(command, _queued(command, delivery.seq), redelivered))
            return
        self._end_unread(delivery, body, result)

    def _end_unread(self, delivery: Delivery, body: contract.Outbound, result: CommandResult) -> None:
        """Ends what cannot be carried out. `body`: what is known of it."""
        sandbox = delivery.subject.rpartition(".")[2]
        sequence, stored_ms = original_position(delivery.headers, delivery.seq, delivery.time_ms)
        self._metrics.schema_violations.labels(kind="out").inc()
        ref = CommandRef(sequence=sequence, stored_ms=stored_ms, id=_command_id(delivery, body))
        placeholder = QueuedCommand(
            sequence=delivery.seq, ref=ref, client_id_base=client_id_base(sandbox, sequence, stored_ms)
        )
        # the subject of a receipt of a longer name would break the connection
        self.on_unreadable(placeholder, result, Address(sandbox if len(sandbox) <= MAX_NAME else UNROUTED))

    # what takes its time -------------------------------------------------------------------------------

    def _read_later(self, delivery: Delivery) -> None:
        if delivery.subject in self._unread:
            self._unread[delivery.subject].append(delivery)
            return
        self._unread[delivery.subject] = deque([delivery])
        self._tasks.spawn(self._read_in_order(delivery.subject))

    async def _read_in_order(self, subject: str) -> None:
        """Others do not wait for it."""
        unread = self._unread[subject]
        while unread and not self._draining.is_set():
            try:
                await self._read_slowly(unread)
            except Temporary as exc:
                log.warning("command.retrying", subject=subject, reason=exc.reason)
                await wait_event(self._draining, 0.5)
            except Exception as exc:  # a bug: the others go on
                log.exception("command.crashed", subject=subject, sequence=unread[0].seq)
                result = CommandResult("dead_lettered", "crashed", type(exc).__name__)
                self._end_unread(unread.popleft(), contract.Outbound(), result)
        del self._unread[subject]

    async def _read_slowly(self, unread: deque[Delivery]) -> None:
        """Reads the first one. Raises Temporary, as long as it is not read."""
        said: contract.Outbound | Refused | None = None
        with contextlib.suppress(Unreadable):  # which is told below
            body = decode_command(unread[0].data, self._limits)
            if is_slow(body, self._limits):
                try:
                    said = with_texts(body, await self._texts.render_plain(texts_of(body)))
                except Refused as exc:
                    said = exc
        self._read(unread[0], said)  # if it raises, it is the first one that is at fault
        unread.popleft()


class BodyLoader:
    """Reads the bodies of commands back that were not kept in memory."""

    def __init__(self, history: Archive, names: Names, limits: Limits, texts: TextReader, clock: Clock) -> None:
        self._history = history
        self._names = names
        self._limits = limits
        self._texts = texts
        self._clock = clock
        self._missing = (-math.inf, -math.inf)
        """Monotonic times between which commands were missing on the bus: of many that are gone only the first one
        takes long."""

    async def load(self, sandbox: str, sequences: Sequence[int]) -> dict[int, list[Part] | None]:
        """Parts of commands, read back from the bus; None: it has the command no more.

        Raises Temporary, also as long as one may only not be shown.
        """
        parts: dict[int, list[Part] | None] = {}
        now = self._clock.monotonic()
        for sequence in sequences:
            stored = await self._history.get(self._names.stream_out, sequence)
            if stored is None:
                parts[sequence] = None
                continue
            body = decode_command(stored.data, self._limits)
            if is_slow(body, self._limits):
                try:
                    body = with_texts(body, await self._texts.render_plain(texts_of(body)))
                except Refused:  # it was read once
                    parts[sequence] = None
                    continue
            command = read_command(body, sandbox=sandbox, ident="", sequence=0, time_ms=0, limits=self._limits)
            parts[sequence] = command.parts
        if None in parts.values():
            since, last = self._missing
            self._missing = since if now - last < MISSING_CONFIRM_S else now, now
            if now - self._missing[0] < MISSING_CONFIRM_S:
                raise Temporary("command_missing")
        return parts


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
