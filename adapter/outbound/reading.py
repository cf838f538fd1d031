"""Reads the commands of one shard: decodes and validates them, and ends those that are invalid.

`CommandReader.put` gets each accepted delivery from the intake. A valid command goes to `on_command`, and an invalid
one to `on_unreadable` with the receipt that it ends with. The reader decides nothing about windows and publishes
nothing.

`BodyLoader` reads the bodies of parked commands again when their turn comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import structlog

from adapter.contract import messages as contract
from adapter.contract.names import H_COMMAND, H_COPIED_AGAIN, H_MSG_ID, UNROUTED, Names
from adapter.conversation.commands import (
    Command,
    Limits,
    client_id_base,
    command_id,
    decode_command,
    original_position,
    read_command,
    salvage_ids,
)
from adapter.conversation.record import CommandRef
from adapter.conversation.rules import Body, CommandResult, QueuedCommand
from adapter.errors import Refused, Temporary, Unreadable
from adapter.kit.timing import Clock
from adapter.observability.metrics import Metrics
from adapter.outbound.receipts import Address
from adapter.ports import Archive, Delivery

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
    """Reads each command once."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.on_command: Callable[[ReadCommand], None] = _ignore
        self.on_unreadable: Callable[[QueuedCommand, CommandResult, Address], None] = _ignore
        """Called with an invalid command and its result."""
        self._limits = limits
        self._metrics = metrics

    def stop(self) -> None:
        """Passes on no more commands."""
        self.on_command = self.on_unreadable = _ignore

    def put(self, delivery: Delivery) -> None:
        """Reads a command. A command that cannot be read ends here, whatever the error."""
        sandbox = delivery.subject.rpartition(".")[2]
        sequence, stored_ms = original_position(delivery.headers, delivery.seq, delivery.time_ms)
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
        except (Refused, Unreadable) as exc:
            result = _result_of(exc)
            if isinstance(exc, Unreadable):
                body = salvage_ids(delivery.data, self._limits)
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


class BodyLoader:
    """Reads bodies from the bus that are not in memory."""

    def __init__(self, history: Archive, names: Names, limits: Limits, clock: Clock) -> None:
        self._history = history
        self._names = names
        self._limits = limits
        self._clock = clock
        self._missing = (-math.inf, -math.inf)
        """Span of monotonic time in which commands were missing on the bus, so that only the first of many missing
        ones takes long."""

    async def load(self, sandbox: str, sequences: Sequence[int]) -> dict[int, Body]:
        """Reads the parts of commands from the bus. Raises Temporary, also while a missing command may only be
        hidden."""
        bodies: dict[int, Body] = {}
        now = self._clock.monotonic()
        for sequence in sequences:
            stored = await self._history.get(self._names.stream_out, sequence)
            bodies[sequence] = self._read(sandbox, stored.data) if stored else None
        if None in bodies.values():
            since, last = self._missing
            self._missing = since if now - last < MISSING_CONFIRM_S else now, now
            if now - self._missing[0] < MISSING_CONFIRM_S:
                raise Temporary("command_missing")
        return bodies

    def _read(self, sandbox: str, data: bytes) -> Body:
        """An adapter of another version, which parked the command, may have accepted what this one does not."""
        try:
            body = decode_command(data, self._limits)
            return read_command(body, sandbox=sandbox, ident="", sequence=0, time_ms=0, limits=self._limits).parts
        except (Refused, Unreadable) as exc:
            return _result_of(exc)


def _result_of(exc: Refused | Unreadable) -> CommandResult:
    """How a command ends that cannot be read."""
    return CommandResult("refused" if isinstance(exc, Refused) else "dead_lettered", exc.reason, exc.detail)


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
