"""Reads the commands of one shard: decodes and validates them, and ends those that are invalid.

`CommandReader.put` gets each accepted delivery from the intake. A valid command goes to `on_command`, and an invalid
one to `on_unreadable` with the receipt that it ends with. Commands of a sandbox keep their order. A long Markdown
text is rendered in another process (TextReader); only later commands of the same sandbox wait for it. The reader
decides nothing about windows and publishes nothing.

`BodyLoader` reads the bodies of parked commands again when their turn comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
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
"""Most characters of a sandbox's name (names.SANDBOX_PATTERN)."""
MAX_REPLY_TO = 256
"""Most characters of an inbound message's id: a bot's name, and iLink's id of it or a digest."""
MISSING_CONFIRM_S = 10.0
"""Time after which a waiting command that the stream does not have is gone. A cluster that is losing its leaders may
not show all messages, and later commands overtake one that is taken for gone."""


class ReadCommand(msgspec.Struct, frozen=True):
    """A valid command."""

    command: Command
    queued: QueuedCommand
    redelivered: bool
    """The command or another copy of it was delivered before, so a previous owner may have worked on it."""


class CommandReader:
    """Reads each command once, and those of a sandbox in order."""

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
        """Called with an invalid command and its result."""
        self._limits = limits
        self._metrics = metrics
        self._texts = texts
        self._unread: dict[str, deque[Delivery]] = {}
        """By subject, in order: commands whose text takes time to render, and those behind them."""
        self._draining = draining
        self._tasks = tasks

    def stop(self) -> None:
        """Passes on no more commands."""
        self.on_command = self.on_unreadable = _ignore

    def put(self, delivery: Delivery) -> None:
        """Reads a command, after those of its sandbox that are being read."""
        if delivery.subject in self._unread:
            self._read_later(delivery)
        else:
            self._read(delivery)

    def _read(self, delivery: Delivery, rendering: contract.Outbound | Refused | None = None) -> None:
        """Reads a command. A command that cannot be read ends here, whatever the error.

        `rendering`: the body with plain texts, or the error of the conversion; None: not converted yet.
        """
        sandbox = delivery.subject.rpartition(".")[2]
        sequence, stored_ms = original_position(delivery.headers, delivery.seq, delivery.time_ms)
        body = contract.Outbound()
        try:
            body = decode_command(delivery.data, self._limits)
            if isinstance(rendering, Refused):
                raise rendering
            if rendering is None and is_slow(body, self._limits):
                self._read_later(delivery)
                return
            command = read_command(
                rendering or body,
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
        """Ends an invalid command. `body`: the fields that could be read."""
        sandbox = delivery.subject.rpartition(".")[2]
        sequence, stored_ms = original_position(delivery.headers, delivery.seq, delivery.time_ms)
        self._metrics.schema_violations.labels(kind="out").inc()
        ref = CommandRef(sequence=sequence, stored_ms=stored_ms, id=_command_id(delivery, body))
        placeholder = QueuedCommand(
            sequence=delivery.seq,
            ref=ref,
            client_id_base=client_id_base(sandbox, sequence, stored_ms),
            reply_to=_bounded(body.reply_to or ""),
        )
        # a longer name in the subject of a receipt would break the connection
        self.on_unreadable(placeholder, result, Address(sandbox if len(sandbox) <= MAX_NAME else UNROUTED))

    # slow texts ----------------------------------------------------------------------------------------

    def _read_later(self, delivery: Delivery) -> None:
        if delivery.subject in self._unread:
            self._unread[delivery.subject].append(delivery)
            return
        self._unread[delivery.subject] = deque([delivery])
        self._tasks.spawn(self._read_in_order(delivery.subject))

    async def _read_in_order(self, subject: str) -> None:
        """Reads the queued commands of a subject without delaying other subjects."""
        unread = self._unread[subject]
        while unread and not self._draining.is_set():
            try:
                await self._read_slowly(unread)
            except Temporary as exc:
                log.warning("command.retrying", subject=subject, reason=exc.reason)
                await wait_event(self._draining, 0.5)
            except Exception as exc:  # a bug: the next commands are read
                log.exception("command.crashed", subject=subject, sequence=unread[0].seq)
                result = CommandResult("dead_lettered", "crashed", type(exc).__name__)
                self._end_unread(unread.popleft(), contract.Outbound(), result)
        del self._unread[subject]

    async def _read_slowly(self, unread: deque[Delivery]) -> None:
        """Reads the first command of the queue. Raises Temporary if it has to be tried again."""
        rendering: contract.Outbound | Refused | None = None
        with contextlib.suppress(Unreadable):  # `_read` handles it
            body = decode_command(unread[0].data, self._limits)
            if is_slow(body, self._limits):
                try:
                    rendering = with_texts(body, await self._texts.render_plain(texts_of(body)))
                except Refused as exc:
                    rendering = Refused(exc.reason, exc.detail)  # `exc` has frames that hold it
        self._read(unread[0], rendering)  # an error here belongs to the first command
        unread.popleft()


class BodyLoader:
    """Reads bodies from the bus that are not in memory."""

    def __init__(self, history: Archive, names: Names, limits: Limits, texts: TextReader, clock: Clock) -> None:
        self._history = history
        self._names = names
        self._limits = limits
        self._texts = texts
        self._clock = clock
        self._missing = (-math.inf, -math.inf)
        """Span of monotonic time in which commands were missing on the bus, so that only the first of many missing
        ones takes long."""

    async def load(self, sandbox: str, sequences: Sequence[int]) -> dict[int, list[Part] | None]:
        """Reads the parts of commands from the bus; None: the bus does not have the command any more.

        Raises Temporary, also while a missing command may only be hidden.
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
                except Refused:  # it was readable before
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


def _bounded(reply_to: str) -> str:
    return reply_to if len(reply_to) <= MAX_REPLY_TO else ""


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
        reply_to=_bounded(command.reply_to),
    )


def _command_id(delivery: Delivery, body: contract.Outbound) -> str:
    routed, msg_id = delivery.headers.get(H_COMMAND, ""), delivery.headers.get(H_MSG_ID, "")
    return command_id(body.id, routed, msg_id, delivery.seq)
