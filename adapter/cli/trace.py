"""`trace`: everything that the bus knows of one message or one command, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated

import msgspec
from cyclopts import Parameter

from adapter.cli import output
from adapter.cli.bus import Bus, connected_bus, missing_stream_failure
from adapter.cli.exit_codes import NO, OK, UNREACHABLE, Failed
from adapter.cli.options import Json, Sandbox, flag
from adapter.cli.queued import to_queued_command
from adapter.cli.send import describe
from adapter.content.quotes import kind_of
from adapter.contract.headers import derive_traceparent
from adapter.contract.messages import Inbound, Receipt, WindowEvent
from adapter.contract.names import H_COMMAND, H_JOURNAL, H_MSG_ID, H_REASON, H_SANDBOX, H_TRACEPARENT, stream_of
from adapter.errors import UNDECODABLE, BusRefused, Temporary
from adapter.jetstream.api_replies import NO_STREAM
from adapter.jetstream.history import StreamHistory
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.ports import Stored

COLUMNS = ("time", "step", "id", "seq", "what")


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a message, or to a command that answers it."""

    at_ms: int
    step: str
    """said, published, window, command, receipt or dead."""
    id: str
    """Of the message or command."""
    stream: str = ""
    sequence: int = 0
    """In `stream`; 0: it is not stored as such."""
    what: str = ""
    traceparent: str = ""
    text: str | None = None
    """What was written, where that was asked for."""


class _Body(msgspec.Struct):
    """What a command says of the message that it answers."""

    reply_to: str | None = None


async def trace(
    sandbox: Sandbox,
    ident: Annotated[str, Parameter(name="id", help="Id of a message, or of a command.")],
    /,
    *,
    texts: Annotated[bool, flag("Show what was written, too.")] = False,
    json: Json = False,
) -> int:
    """Tell the story of one message or command: said, published, answered, parked, sent, dead.

    Of a message all commands are shown that name it as `reply_to`, or go on with its trace. Exit code 1: the bus
    knows nothing of it, or not any more.
    """
    async with connected_bus() as bus:
        steps = await _Story(bus, sandbox, texts=texts).tell(ident)
    for step in steps if json else ():
        output.json_line(step)
    if not steps:
        output.complain(f"The bus of {sandbox} has nothing of {ident}: the id is another one, or all is too old.")
    elif not json:
        columns = (*COLUMNS, "text") if texts else COLUMNS
        rows = [(output.clock(x.at_ms), x.step, x.id, x.sequence or "-", x.what, x.text or "") for x in steps]
        output.table(columns, [row[: len(columns)] for row in rows])
    return OK if steps else NO


class _Story:
    """Reads what there is of one message and the commands that answer it, or of one command."""

    def __init__(self, bus: Bus, sandbox: str, *, texts: bool) -> None:
        self._bus = bus
        self._names = bus.names
        self._sandbox = sandbox
        self._texts = texts

    async def tell(self, ident: str) -> list[Step]:
        """The steps, in order. Raises Failed."""
        names, sandbox = self._names, self._sandbox
        waiting = [
            stored
            for subject in (names.out_of_sandbox(sandbox), names.out_plain)
            for stored in await self._read(names.stream_out, subject, keep=self._is_ours)
        ]
        own = [stored for stored in waiting if to_queued_command(names, stored, bodies=False).id == ident]
        receipts = await self._read(names.stream_event, names.receipt(sandbox, ident))
        is_command = bool(own or receipts)
        answered = [message for message in map(_answered, (*own, *receipts)) if message]
        message = (answered or [""])[0] if is_command else ident
        said = await self._said(message) if message else []
        events: list[Stored] = []
        if not is_command:
            trace = derive_traceparent(message)

            def is_part(stored: Stored) -> bool:
                return _is_in(trace, stored) or _answered(stored) == message

            own = [stored for stored in waiting if is_part(stored)]
            subject, since_ms = names.event(sandbox, ">"), _begin(said)
            events = await self._read(names.stream_event, subject, since_ms=since_ms, keep=is_part)
        steps = [self._event(stored) for stored in (*receipts, *events)]
        steps += [self._waiting(stored) for stored in own]
        steps += _stored_commands(steps, {stored.seq for stored in own}, events=(*receipts, *events))
        commands = {step.id for step in steps if step.step != "window"}

        def is_about_it(stored: Stored) -> bool:
            if command := stored.headers.get(H_COMMAND, ""):
                return command in commands and stored.headers.get(H_SANDBOX) == sandbox
            return bool(message) and not is_command and _is_in(derive_traceparent(message), stored)

        letters = names.dead_letters("*")
        for stored in await self._read(names.stream_dead, letters, since_ms=_begin(said), keep=is_about_it):
            reason = stored.headers.get(H_REASON, "")
            steps.append(self._step(stored, "dead", stored.headers.get(H_COMMAND, message), reason))
        return said + sorted(steps, key=lambda step: step.at_ms)

    def _is_ours(self, stored: Stored) -> bool:
        return to_queued_command(self._names, stored, bodies=False).sandbox == self._sandbox

    async def _said(self, message: str) -> list[Step]:
        """A message, as it was said and as it was published."""
        names = self._names
        inbox, is_it = names.inbox(self._sandbox), lambda one: one.headers.get(H_MSG_ID) == message
        found = await self._read(names.stream_in, inbox, keep=is_it)
        if not found:
            return []
        stored = found[0]
        try:
            inbound = msgspec.json.decode(stored.data, type=Inbound)
        except UNDECODABLE:
            return [self._step(stored, "published", message, "unreadable")]
        kinds = ", ".join(kind_of(item) for item in inbound.items)
        said = Step(
            at_ms=inbound.sent_at_ms or inbound.received_at_ms,
            step="said",
            id=message,
            what=f"{kinds} by {inbound.user} to {inbound.bot}",
            text=inbound.text if self._texts else None,
        )
        place = stored.headers.get(H_JOURNAL, "")
        return [said, self._step(stored, "published", message, f"journal {place}" if place else "")]

    def _event(self, stored: Stored) -> Step:
        try:
            if ".receipt." in stored.subject:
                receipt = msgspec.json.decode(stored.data, type=Receipt)
                return self._step(stored, "receipt", receipt.command, describe(receipt))
            event = msgspec.json.decode(stored.data, type=WindowEvent)
            return self._step(stored, "window", "", f"{event.change}, {event.window.remaining} left")
        except UNDECODABLE:
            return self._step(stored, "event", "", "unreadable")

    def _waiting(self, stored: Stored) -> Step:
        command = to_queued_command(self._names, stored, bodies=self._texts)
        return self._step(stored, "command", command.id, "waits", text=command.body)

    def _step(self, stored: Stored, step: str, ident: str, what: str, text: str | None = None) -> Step:
        return Step(
            at_ms=stored.time_ms,
            step=step,
            id=ident,
            stream=stream_of(stored.subject),
            sequence=stored.seq,
            what=what,
            traceparent=stored.headers.get(H_TRACEPARENT, ""),
            text=text,
        )

    async def _read(
        self,
        stream: str,
        subject: str,
        *,
        since_ms: int | None = None,
        keep: Callable[[Stored], bool] = lambda stored: True,
    ) -> list[Stored]:
        """Raises Failed."""
        connection = ManagedConnection(self._bus.settings, "trace")
        await connection.adopt_client(self._bus.nc)

        async def read() -> list[Stored]:
            stored_messages = StreamHistory(connection).read(stream, subject, since_ms=since_ms)
            return [stored async for stored in stored_messages if keep(stored)]

        try:
            return await self._bus.unless_forbidden(f"$JS.API.DIRECT.GET.{stream}", read())
        except BusRefused as exc:
            why = missing_stream_failure(stream) if exc.code == NO_STREAM else exc.detail
            raise Failed(UNREACHABLE, why) from None
        except Temporary as exc:
            raise Failed(UNREACHABLE, f"Cannot read {stream}: {exc.detail or exc.reason}.") from None


def _stored_commands(steps: Iterable[Step], waiting: set[int], *, events: Iterable[Stored]) -> list[Step]:
    """When commands were stored that are on the bus no more: their receipts tell it."""
    found: dict[int, Step] = {}
    for step, stored in zip(steps, events, strict=False):
        if step.step == "receipt":
            receipt = msgspec.json.decode(stored.data, type=Receipt)
            if receipt.sequence not in waiting:
                found[receipt.sequence] = Step(at_ms=receipt.received_at_ms, step="command", id=receipt.command)
    return list(found.values())


def _answered(stored: Stored) -> str:
    """The message that a command, or the command of a receipt, names."""
    try:
        return msgspec.json.decode(stored.data, type=_Body).reply_to or ""
    except UNDECODABLE:
        return ""


def _is_in(trace: str, stored: Stored) -> bool:
    """Whether a message goes on with a trace, given as any traceparent of it."""
    return stored.headers.get(H_TRACEPARENT, "")[:36] == trace[:36]


def _begin(said: list[Step]) -> int | None:
    """When the message was published: nothing of it is older, but for the clocks of two servers."""
    return said[-1].at_ms - 60_000 if said else None
