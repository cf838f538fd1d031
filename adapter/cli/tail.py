"""`tail`: what users write and, on request, what happens, as it comes."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, NamedTuple

import msgspec
from cyclopts import Parameter
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from adapter.cli import output
from adapter.cli.bus import Bus, connected_bus, replay
from adapter.cli.exit_codes import OK, TIMEOUT, USAGE, Failed
from adapter.cli.options import Age, Json, MaybeSandbox, flag, moment
from adapter.cli.send import describe
from adapter.content.quotes import kind_of
from adapter.contract.messages import Inbound, Receipt
from adapter.errors import UNDECODABLE

MessageQueue = asyncio.Queue[tuple[str, Msg]]
INBOUND, EVENT = "inbound", "event"


class Source(NamedTuple):
    """Where messages of one kind come from: as they are published, or out of their stream."""

    kind: str
    live: str
    stream: str
    stored: str


async def tail(
    sandbox: MaybeSandbox = None,
    /,
    *,
    events: Annotated[bool, flag("Show receipts and other events too.")] = False,
    since: Age = None,
    from_start: Annotated[bool, flag("Start with all that is stored.", name="--all")] = False,
    count: Annotated[int | None, Parameter(help="End after so many messages (exit code 0).")] = None,
    timeout: Annotated[float | None, Parameter(help="With --count: give up after so many seconds.")] = None,
    json: Json = False,
) -> int:
    """Print messages as they come: time, sandbox, user, text.

    It reads beside the sandbox and takes nothing from it. With --json each line is the message as it is on the bus.
    It ends by ctrl-C (exit code 130), or with --count.
    """
    if since and from_start:
        raise Failed(USAGE, "Give --since or --all, not both.")
    since_ms = moment(since) if since else 0 if from_start else None
    async with connected_bus(lasting=True) as bus:
        arrivals: MessageQueue = asyncio.Queue(maxsize=10_000)
        await _listen(bus, arrivals, sandbox or "*", events, since_ms)
        try:
            async with asyncio.timeout(timeout if count else None):
                await _print_forever(arrivals, count, json)
        except TimeoutError:
            raise Failed(TIMEOUT, f"Fewer than {count} messages within {timeout:g} s.") from None
    return OK


async def _listen(bus: Bus, arrivals: MessageQueue, sandbox: str, events: bool, since_ms: int | None) -> None:
    """Subscribes, live or from the streams. Returns once nothing can be missed. Raises Failed."""
    names = bus.names
    sources = [Source(INBOUND, names.live(sandbox), names.stream_in, names.inbox(sandbox))]
    if events:
        subject = names.event(sandbox, ">")
        sources.append(Source(EVENT, subject, names.stream_event, subject))
    for source in sources:
        if since_ms is None:
            await _subscribe_live(bus, arrivals, source)
        else:
            await _replay_stored(bus, arrivals, source, since_ms)
    await bus.check_subscribed(*(source.live for source in sources))


async def _subscribe_live(bus: Bus, arrivals: MessageQueue, source: Source) -> None:
    async def on_message(msg: Msg) -> None:
        await arrivals.put((source.kind, msg))

    await bus.nc.subscribe(source.live, cb=on_message)


async def _replay_stored(bus: Bus, arrivals: MessageQueue, source: Source, since_ms: int) -> None:
    subscription = await replay(bus, source.stream, source.stored, since_ms=since_ms or None)

    async def hand_on() -> None:
        with contextlib.suppress(NatsError):  # closed: the command ends
            while True:
                await arrivals.put((source.kind, await subscription.next_msg(timeout=None)))

    task = asyncio.create_task(hand_on())
    _TASKS.add(task)
    task.add_done_callback(_TASKS.discard)


_TASKS: set[asyncio.Task[None]] = set()
"""Held here, since the loop itself holds tasks only weakly."""


async def _print_forever(arrivals: MessageQueue, count: int | None, json: bool) -> None:
    """Runs until cancelled, or until `count` messages are printed."""
    printed = 0
    while count is None or printed < count:
        kind, msg = await arrivals.get()
        if json:
            output.json_line(msg.data)
        else:
            output.say(_format_line(kind, msg))
        printed += 1


def _format_line(kind: str, msg: Msg) -> str:
    """One message for people; what cannot be read is named, not hidden."""
    try:
        return _format_inbound(msg.data) if kind == INBOUND else _format_event(msg.subject, msg.data)
    except UNDECODABLE:
        return f"unreadable: {len(msg.data)} bytes on {output.printable(msg.subject)}"


def _format_inbound(data: bytes) -> str:
    message = msgspec.json.decode(data, type=Inbound)
    said = message.text or "[" + ", ".join(kind_of(item) for item in message.items) + "]"
    head = f"{output.clock(message.received_at_ms)}  {message.sandbox}  {_short_user(message.user)}  "
    return head + output.printable(said)


def _format_event(subject: str, data: bytes) -> str:
    sandbox, kind = subject.partition(".event.")[2].split(".")[:2]
    if kind == "receipt":
        receipt = msgspec.json.decode(data, type=Receipt)
        said, at_ms, user = f"{receipt.command}: {describe(receipt)}", receipt.at_ms, receipt.user
    else:
        fields = msgspec.json.decode(data, type=dict[str, object])
        at_ms = at if isinstance(at := fields.get("at_ms"), int) else 0
        user = str(fields.get("user") or "")
        rest = (
            f"{k}={v}" for k, v in fields.items() if k not in ("sandbox", "user", "at_ms") and v not in ("", None)
        )
        said = " ".join(rest)
    return f"{output.clock(at_ms)}  {sandbox}  {_short_user(user)}  {kind}: {output.printable(said)}"


def _short_user(user: str) -> str:
    """Enough of a user id to tell two apart."""
    name = output.printable(user.partition("@")[0])
    return name if len(name) <= 12 else f"{name[:6]}…{name[-4:]}"
