"""`tail` and `trace`: messages as they come, and what the bus knows of one of them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, NamedTuple

import msgspec
from cyclopts import Parameter
from nats.aio.msg import Msg

from adapter.cli import output
from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.exits import NO, OK, TIMEOUT, USAGE, Failed
from adapter.cli.options import Age, Json, MaybeSandbox, Sandbox, flag, moment
from adapter.cli.send import describe
from adapter.cli.stored import listed_command_of
from adapter.content.quotes import kind_of
from adapter.contract.messages import Inbound, Outbound, OutText, Receipt
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
from adapter.errors import UNDECODABLE
from adapter.ports import StoredMessage

AHEAD = 10_000
"""Live messages that may wait until what is stored is printed."""
TRACE_COLUMNS = ("time", "step", "id", "seq", "what", "text")


class _Arrival(NamedTuple):
    """A message, live or stored."""

    subject: str
    data: bytes
    sequence: int
    """Of an inbound message in its stream; 0: it was never stored."""


async def tail(
    sandbox: MaybeSandbox = None,
    /,
    *,
    events: Annotated[bool, flag("Show receipts and other events too.")] = False,
    commands: Annotated[bool, flag("Show commands, with their texts, too, as they come.")] = False,
    since: Age = None,
    from_start: Annotated[bool, flag("Start with all that is stored.", name="--all")] = False,
    follow: Annotated[
        bool, flag("With --since or --all: go on with what comes. Else it always does.", name=["--follow", "-f"])
    ] = False,
    count: Annotated[
        int | None, Parameter(metavar="NUMBER", help="End after so many messages (exit code 0).")
    ] = None,
    timeout: Annotated[
        float | None, Parameter(metavar="SECONDS", help="With --count: give up after so many seconds.")
    ] = None,
    json: Json = False,
) -> int:
    """Print messages as they come: time, sandbox, user, text.

    The sandbox still gets every message. Ids of users are shortened. With --json each line is the message as it is on
    the bus: there are whole ids, and the `id` that `trace` takes. With --since or
    --all it prints what is stored, in order, and ends, unless --follow or --count is given. Otherwise it ends by
    ctrl-C (exit code 130), or with --count.
    """
    if since and from_start:
        raise Failed(USAGE, "Give --since or --all, not both.")
    since_ms = moment(since) if since else 0 if from_start else None
    goes_on = follow or count is not None or since_ms is None
    if commands and not goes_on:
        raise Failed(USAGE, "Commands are shown as they come: give --follow.")
    async with connected_bus(lasting=True) as bus:
        names, who, live = bus.names, sandbox or "*", asyncio.Queue[Msg](AHEAD)
        stored, subjects = [(names.stream_in, names.inbox(who))], [names.live(who)]
        if events:
            stored.append((names.stream_event, names.event(who, ">")))
            subjects.append(names.event(who, ">"))
        if commands:
            subjects += [names.out(who)] if sandbox else [names.out(who), names.out_plain]
        for subject in subjects if goes_on else ():
            await bus.nc.subscribe(subject, cb=live.put)
        await bus.check_subscribed(*subjects)
        for stream, _ in stored if since_ms is not None else ():  # without a stream, a direct get has no answer
            await bus.api_request(f"STREAM.INFO.{stream}")

        async def arrivals() -> AsyncIterator[_Arrival]:
            recent: deque[bytes] = deque(maxlen=AHEAD)
            if since_ms is not None:
                async for one in _merge([bus.history.read(*place, since_ms=since_ms) for place in stored]):
                    recent.append(one.data)
                    yield _Arrival(one.subject, one.data, one.seq)
            known = set(recent)  # some of them came live meanwhile, too
            while goes_on:
                msg = await live.get()
                if msg.data not in known:
                    yield _Arrival(msg.subject, msg.data, int((msg.headers or {}).get("Nats-Sequence", 0)))

        async def show() -> None:
            shown = 0
            async for arrival in arrivals():
                if json:
                    output.json_line(arrival.data)
                else:
                    output.say_wrapped(_format_line(arrival))
                shown += 1
                if shown == count:
                    return

        try:
            async with asyncio.timeout(timeout if count else None):
                await bus.ask_jetstream(f"DIRECT.GET.{names.stream_in}", show())
        except TimeoutError:
            raise Failed(TIMEOUT, f"Fewer than {count} messages within {timeout:g} s.") from None
    return OK


async def _merge(readers: list[AsyncGenerator[StoredMessage, None]]) -> AsyncIterator[StoredMessage]:
    """What the readers yield, each in the order of storing, all in that order."""
    heads = {reader: await anext(reader, None) for reader in readers}
    while found := {reader: head for reader, head in heads.items() if head is not None}:
        reader = min(found, key=lambda reader: found[reader].headers["Nats-Time-Stamp"].rstrip("Z"))
        yield found[reader]
        heads[reader] = await anext(reader, None)


def _format_line(arrival: _Arrival) -> str:
    """One message for people; what cannot be read is named, not hidden."""
    subject, data, sequence = arrival
    try:
        match subject.split("."):
            case [_, "event", sandbox, kind, *_]:
                return _format_event(sandbox, kind, data)
            case [_, "out", *_]:
                return _format_command(subject, data)
            case _:
                return _format_inbound(data, sequence)
    except UNDECODABLE:
        return f"unreadable: {len(data)} bytes on {subject}"


def _format_inbound(data: bytes, sequence: int) -> str:
    message = msgspec.json.decode(data, type=Inbound)
    said = [message.text] if message.text else []
    for item in message.items:
        if (media := getattr(item, "media", None)) is not None:  # what `media get` takes
            said.append(f"[{kind_of(item)} {media.object}, sequence {sequence}]")
        elif kind_of(item) != "text":
            said.append(f"[{kind_of(item)}]")
    return _line(message.received_at_ms, message.sandbox, message.user, " ".join(said))


def _format_event(sandbox: str, kind: str, data: bytes) -> str:
    if kind == "receipt":
        receipt = msgspec.json.decode(data, type=Receipt)
        return _line(receipt.at_ms, sandbox, receipt.user, f"receipt: {receipt.command}: {describe(receipt)}")
    fields = msgspec.json.decode(data, type=dict[str, object])
    at_ms = at if isinstance(at := fields.get("at_ms"), int) else 0
    told = {name: value for name, value in fields.items() if name not in ("sandbox", "user", "at_ms")}
    said = ", ".join(_words(name, value) for name, value in told.items() if value not in ("", None, False))
    return _line(at_ms, sandbox, str(fields.get("user") or ""), f"{kind}: {said}")


def _format_command(subject: str, data: bytes) -> str:
    command = msgspec.json.decode(data, type=Outbound)
    said = [command.text] if command.text else [f"typing {command.typing}"] if command.typing else []
    for item in command.items or ():
        kind = item.__struct_config__.tag
        said.append(item.text if isinstance(item, OutText) else f"{item.caption} [{kind} {item.name}]".strip())
    sandbox = command.sandbox or subject.rpartition(".")[2]
    return _line(int(time.time() * 1000), sandbox, command.user or "-", f"→ {' '.join(said)}")


def _words(name: str, value: object) -> str:
    """A field of an event in words."""
    if isinstance(value, int) and name.endswith("_ms"):
        return f"{name.removesuffix('_ms').replace('_', ' ')} {output.clock(value)}"
    said = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return name.replace("_", " ") + (f" {said}" if value is not True else "")


def _line(at_ms: int, sandbox: str, user: str, said: str) -> str:
    """With enough of the user's id to tell two apart."""
    name = user.partition("@")[0]
    name = name if len(name) <= 12 else f"{name[:6]}…{name[-4:]}"
    return f"{output.clock(at_ms)}  {sandbox}  {name or '-'}  {said}"


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
        if stored.subject.startswith(f"{names.out_plain}."):
            ids.add(str(stored.seq))  # where a command has no other id
        return stored if ident in ids or headers.get(H_TRACEPARENT, "").startswith(trace_id) else None

    inbox = names.stream_in, names.inbox(sandbox)
    found: list[StoredMessage] = []
    for stream, subject in (
        inbox,
        (names.stream_event, names.receipts(sandbox)),
        (names.stream_out, names.out_of_sandbox(sandbox)),
        (names.stream_out, names.out_plain),
        (names.stream_dead, names.dead_letters("*")),
    ):
        found += await bus.read_stored(stream, subject, keep=if_part)
    answered = {_body(stored).reply_to for stored in found} - {ident, None, ""}
    if answered:  # of a command, the message
        found += await bus.read_stored(
            *inbox, keep=lambda stored: stored if stored.headers.get(H_MSG_ID) in answered else None
        )
    steps = [step for stored in found for step in _steps_of(names, stored, ident, texts=texts)]
    once = {(step.step, step.id, step.stream, step.sequence): step for step in steps}  # each receipt has its command
    # a dead letter precedes its receipt
    return sorted(once.values(), key=lambda step: (step.at_ms, step.step == "receipt"))


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
            command = listed_command_of(names, stored, bodies=texts)
            return [replace(this, step="command", id=command.id, what="waits", text=command.body)]
        if stream == names.stream_in:
            inbound = msgspec.json.decode(stored.data, type=Inbound)
            what = f"{', '.join(map(kind_of, inbound.items))} by {inbound.user} to {inbound.bot}"
            text = inbound.text if texts else None
            said_ms = min(inbound.sent_at_ms or inbound.received_at_ms, stored.time_ms)
            said = replace(this, at_ms=said_ms, step="said", id=inbound.id, what=what, text=text)
            return [said, replace(this, step="published", id=inbound.id, what="in the inbox")]
        receipt = msgspec.json.decode(stored.data, type=Receipt)
        told = replace(this, step="receipt", id=receipt.command, what=describe(receipt))
        sent = {"at_ms": receipt.received_at_ms, "stream": names.stream_out, "sequence": receipt.sequence}
        return [replace(told, step="command", what="stored", **sent), told]
    except UNDECODABLE:
        return [this]


def _body(stored: StoredMessage) -> _Body:
    try:
        return msgspec.json.decode(stored.data, type=_Body)
    except UNDECODABLE:
        return _Body()
