"""`tail`: what users write and, on request, what happens, as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, datetime
from typing import Annotated

import msgspec
from cyclopts import Parameter
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NotJSMessageError
from nats.js import JetStreamContext, api

from adapter.cli import output
from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.exits import OK, TIMEOUT, UNREACHABLE, USAGE, Failed
from adapter.cli.options import Age, Json, MaybeSandbox, flag, moment
from adapter.cli.send import describe
from adapter.content.quotes import kind_of
from adapter.contract.messages import Inbound, InboundItem, Outbound, OutText, Receipt
from adapter.errors import UNDECODABLE

PushSubscription = JetStreamContext.PushSubscription
Arrivals = asyncio.Queue[Msg | None]
"""Messages; None: that was all."""


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
    count: Annotated[int | None, Parameter(help="End after so many messages (exit code 0).")] = None,
    timeout: Annotated[float | None, Parameter(help="With --count: give up after so many seconds.")] = None,
    json: Json = False,
) -> int:
    """Print messages as they come: time, sandbox, user, text.

    The sandbox still gets every message. With --json each line is the message as it is on the bus. With --since or
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
        names, who, arrivals = bus.names, sandbox or "*", Arrivals(maxsize=10_000)
        stored, live = [(names.stream_in, names.inbox(who))], [names.live(who)]
        if events:
            stored.append((names.stream_event, names.event(who, ">")))
            live.append(names.event(who, ">"))
        live = live if since_ms is None else []
        if commands:
            live += [names.out(who)] if sandbox else [names.out(who), names.out_plain]
        for subject in live:
            await bus.nc.subscribe(subject, cb=arrivals.put)
        await bus.check_subscribed(*live)
        replaying = asyncio.create_task(_replay(bus, arrivals, stored, since_ms, follow=goes_on))
        printing = asyncio.create_task(_print_until_end(arrivals, count, json))
        try:
            async with asyncio.timeout(timeout if count else None):
                await asyncio.wait({replaying, printing}, return_when=asyncio.FIRST_COMPLETED)
                if replaying.done():
                    await replaying
                await printing
        except TimeoutError:
            raise Failed(TIMEOUT, f"Fewer than {count} messages within {timeout:g} s.") from None
        finally:
            replaying.cancel()
            printing.cancel()
    return OK


async def _replay(
    bus: BusConnection, arrivals: Arrivals, stored: list[tuple[str, str]], since_ms: int | None, *, follow: bool
) -> None:
    """Forwards what streams hold under subjects, in the order in which it was stored; then what comes, or None as the
    end. `since_ms` None: nothing; 0: all. Raises Failed."""
    if since_ms is None:
        return
    readers: list[PushSubscription] = []
    heads: dict[PushSubscription, Msg] = {}
    for stream, subject in stored:
        reader = await _open(bus, stream, subject, since_ms)
        readers.append(reader)
        info = await reader.consumer_info()
        if info.num_pending or (info.delivered and info.delivered.consumer_seq):
            heads[reader] = await reader.next_msg(timeout=None)
    while heads:
        reader, head = min(heads.items(), key=lambda item: item[1].metadata.timestamp)
        await arrivals.put(heads.pop(reader))
        if head.metadata.num_pending:
            heads[reader] = await reader.next_msg(timeout=None)
    if not follow:
        await arrivals.put(None)
    await asyncio.gather(*(_forward(reader, arrivals) for reader in readers if follow))


async def _open(bus: BusConnection, stream: str, subject: str, since_ms: int) -> PushSubscription:
    """Raises Failed."""
    await bus.api_request(f"STREAM.INFO.{stream}")
    config = api.ConsumerConfig(inactive_threshold=30.0)
    if since_ms:
        config.deliver_policy = api.DeliverPolicy.BY_START_TIME
        config.opt_start_time = datetime.fromtimestamp(since_ms / 1000, UTC)
    try:
        reading = bus.js.subscribe(subject, stream=stream, ordered_consumer=True, config=config)
        return await bus.unless_forbidden(f"$JS.API.CONSUMER.CREATE.{stream}", reading)
    except (NatsError, TimeoutError) as exc:
        raise Failed(UNREACHABLE, f"Cannot read {stream}: {exc}.") from None


async def _forward(reader: PushSubscription, arrivals: Arrivals) -> None:
    with contextlib.suppress(NatsError):  # closed: the command ends
        while True:
            await arrivals.put(await reader.next_msg(timeout=None))


async def _print_until_end(arrivals: Arrivals, count: int | None, json: bool) -> None:
    """Runs until that was all, or until `count` messages are printed."""
    printed = 0
    while (count is None or printed < count) and (msg := await arrivals.get()) is not None:
        if json:
            output.json_line(msg.data)
        else:
            output.say(output.printable(_format_line(msg)))
        printed += 1


def _format_line(msg: Msg) -> str:
    """One message for people; what cannot be read is named, not hidden."""
    subject, data = msg.subject, msg.data
    try:
        match subject.split("."):
            case [_, "event", sandbox, kind, *_]:
                return _format_event(sandbox, kind, data)
            case [_, "out", *_]:
                return _format_command(subject, data)
            case _:
                return _format_inbound(data, _sequence_of(msg))
    except UNDECODABLE:
        return f"unreadable: {len(data)} bytes on {subject}"


def _sequence_of(msg: Msg) -> int:
    """The sequence of an inbound message, live or stored; 0: it was never stored."""
    try:
        return int((msg.headers or {}).get("Nats-Sequence") or msg.metadata.sequence.stream)
    except (ValueError, NotJSMessageError):
        return 0


def _format_inbound(data: bytes, sequence: int) -> str:
    message = msgspec.json.decode(data, type=Inbound)
    media = [_format_item(item, sequence) for item in message.items if kind_of(item) != "text"]
    said = " ".join(filter(None, (message.text, *media)))
    return _line(message.received_at_ms, message.sandbox, message.user, said)


def _format_event(sandbox: str, kind: str, data: bytes) -> str:
    if kind == "receipt":
        receipt = msgspec.json.decode(data, type=Receipt)
        return _line(receipt.at_ms, sandbox, receipt.user, f"receipt: {receipt.command}: {describe(receipt)}")
    fields = msgspec.json.decode(data, type=dict[str, object])
    at_ms = at if isinstance(at := fields.get("at_ms"), int) else 0
    told = {name: value for name, value in fields.items() if name not in ("sandbox", "user", "at_ms")}
    said = ", ".join(_words(name, value) for name, value in told.items() if value not in ("", None, False))
    return _line(at_ms, sandbox, str(fields.get("user") or ""), f"{kind}: {said}")


def _format_item(item: InboundItem, sequence: int) -> str:
    """The kind of an item, and the object and the message that `media get` takes."""
    media = getattr(item, "media", None)
    return f"[{kind_of(item)} {media.object}, sequence {sequence}]" if media is not None else f"[{kind_of(item)}]"


def _format_command(subject: str, data: bytes) -> str:
    command = msgspec.json.decode(data, type=Outbound)
    sandbox = command.sandbox or subject.rpartition(".")[2]
    parts = [command.text or ""] + [
        item.text
        if isinstance(item, OutText)
        else f"{item.caption} [{item.__struct_config__.tag} {item.name}]".strip()
        for item in command.items or ()
    ]
    said = " ".join(filter(None, parts)) or f"typing {command.typing}"
    return _line(int(time.time() * 1000), sandbox, command.user or "-", f"→ {said}")


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
    return f"{output.clock(at_ms)}  {sandbox}  {name}  {said}"
