"""`trace`: what the bus knows of one message or command."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import msgspec
from cyclopts import Parameter

from adapter.bridge.commands import Limits, command_id, identity_of, salvage_ids
from adapter.bridge.entries import messages_of
from adapter.cli import output
from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.exits import NO, OK
from adapter.cli.options import Json, Sandbox, flag
from adapter.cli.send import describe
from adapter.contract.messages import Inbound, Receipt
from adapter.contract.names import (
    H_COMMAND,
    H_MSG_ID,
    H_REASON,
    H_SANDBOX,
    H_TRACEPARENT,
    Names,
    derive_traceparent,
    stream_of,
)
from adapter.contract.quotes import kind_of
from adapter.errors import UNDECODABLE
from adapter.ports import StoredMessage

TRACE_COLUMNS = ("time", "step", "id", "seq", "what", "text")


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a message, or to a command that answers it."""

    at_ms: int
    step: str
    """said, published, window, command, receipt or dead."""
    id: str
    """Of the message or command."""
    stream: str
    sequence: int
    what: str = ""
    traceparent: str = ""
    text: str | None = None
    """What was written, where that was asked for."""


class _Body(msgspec.Struct):
    """Fields that messages of several kinds have."""

    id: str | None = None
    command: str | None = None
    reply_to: str | None = None
    sandbox: str | None = None


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
        steps = await _find_steps(bus, sandbox, ident, texts=texts)
    if not steps:
        output.complain(f"The bus of {sandbox} has nothing of {ident}: the id is another one, or all is too old.")
        return NO
    columns = TRACE_COLUMNS if texts else TRACE_COLUMNS[:-1]

    def row(x: Step) -> tuple[object, ...]:
        return (output.clock(x.at_ms), x.step, x.id, x.sequence, x.what, x.text or "")[: len(columns)]

    output.listing(steps, json, columns, row)
    return OK


async def _find_steps(bus: BusConnection, sandbox: str, ident: str, *, texts: bool) -> list[Step]:
    """In order. Raises Failed."""
    names, trace_id = bus.names, derive_traceparent(ident)[:36]

    def if_part(stored: StoredMessage) -> StoredMessage | None:
        body, headers = _body(stored), stored.headers
        if sandbox != (headers.get(H_SANDBOX) or body.sandbox or sandbox):
            return None
        ids = {body.id, body.command, body.reply_to, headers.get(H_COMMAND), headers.get(H_MSG_ID)}
        if stored.subject.startswith(f"{names.prefix}.part."):
            ids.add(str(stored.seq))  # where a command has no other id
        return stored if ident in ids or headers.get(H_TRACEPARENT, "").startswith(trace_id) else None

    found: list[StoredMessage] = []
    for stream, subject in (
        (names.stream_event, names.receipts(sandbox)),
        (names.stream_out, names.out_of_sandbox(sandbox)),
        (names.stream_out, names.out_plain),
        (names.stream_dead, names.dead_letters("*")),
    ):
        found += await bus.read_stored(stream, subject, keep=if_part)
    idents = {ident, *(_body(stored).reply_to or ident for stored in found)}  # of a command, the message
    entries = await bus.read_stored(names.stream_in, names.inbox(sandbox), keep=lambda stored: stored)
    steps = [step for stored in entries for step in _said_in(stored, names.stream_in, idents, texts=texts)]
    steps += [step for stored in found for step in _steps_of(names, stored, ident, texts=texts)]
    once = {(step.step, step.id, step.stream, step.sequence): step for step in steps}  # each receipt has its command
    # a dead letter precedes its receipt
    return sorted(once.values(), key=lambda step: (step.at_ms, step.step == "receipt"))


def _said_in(stored: StoredMessage, stream: str, idents: Collection[str], *, texts: bool) -> list[Step]:
    """What an entry has of these messages."""
    steps = []
    for raw in messages_of(stored.data):
        try:
            inbound = msgspec.json.decode(raw, type=Inbound)
        except UNDECODABLE:
            continue
        if inbound.id in idents:
            said = Step(
                at_ms=min(inbound.sent_at_ms or inbound.received_at_ms, stored.time_ms),
                step="said",
                id=inbound.id,
                stream=stream,
                sequence=stored.seq,
                what=f"{', '.join(map(kind_of, inbound.items))} by {inbound.user} to {inbound.bot}",
                traceparent=derive_traceparent(inbound.id),
                text=inbound.text if texts else None,
            )
            stays = {"at_ms": stored.time_ms, "step": "published", "what": "in the inbox", "text": None}
            steps += [said, msgspec.structs.replace(said, **stays)]
    return steps


def _steps_of(names: Names, stored: StoredMessage, ident: str, *, texts: bool) -> list[Step]:
    stream = stream_of(stored.subject)
    this = Step(
        at_ms=stored.time_ms,
        step="unreadable",
        id=stored.headers.get(H_COMMAND, ident),
        stream=stream,
        sequence=stored.seq,
        traceparent=stored.headers.get(H_TRACEPARENT, ""),
    )
    replace = msgspec.structs.replace
    try:
        if stream == names.stream_dead:
            return [replace(this, step="dead", what=stored.headers.get(H_REASON, ""))]
        if stream == names.stream_out:
            body = stored.data.decode(errors="backslashreplace") if texts else None
            return [replace(this, step="command", id=_command_id(stored), what="waits", text=body)]
        receipt = msgspec.json.decode(stored.data, type=Receipt)
        told = replace(this, step="receipt", id=receipt.command, what=describe(receipt))
        sent = {"at_ms": receipt.received_at_ms, "stream": names.stream_out, "sequence": receipt.sequence}
        return [replace(told, step="command", what="stored", **sent), told]
    except UNDECODABLE:
        return [this]


def _command_id(stored: StoredMessage) -> str:
    body = salvage_ids(stored.data, Limits(park_ms=0, part_chars=0, part_bytes=0, command_bytes=len(stored.data)))
    original = identity_of(stored.headers, stored.seq, stored.time_ms)
    return command_id(body.id, original.id, stored.headers.get(H_MSG_ID, ""), stored.seq)


def _body(stored: StoredMessage) -> _Body:
    try:
        return msgspec.json.decode(stored.data, type=_Body)
    except UNDECODABLE:
        return _Body()
