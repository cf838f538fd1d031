"""`send`: one command to a sandbox's user, and what became of it; `media`: its bytes, and those of a message."""

from __future__ import annotations

import asyncio
import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cyclopts import App, Parameter
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from adapter.agent.media import get_media, put_media
from adapter.cli import output
from adapter.cli.bindings import TROUBLE, all_bindings
from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.exits import NO, OK, TIMEOUT, UNREACHABLE, USAGE, Failed
from adapter.cli.options import Json, RequestId, Sandbox, Timeout, flag, new_id
from adapter.cli.output import read_bytes, write_private
from adapter.contract.messages import (
    FINAL_OUTCOMES,
    SCHEMA_VERSION,
    Media,
    Outbound,
    OutFile,
    OutImage,
    OutItem,
    OutText,
    Receipt,
)
from adapter.contract.names import H_MSG_ID, H_SCHEMA, is_sandbox
from adapter.errors import UNDECODABLE
from adapter.ports import StoredMessage

media = App(name="media", help="Pictures, files and voice in the object store: fetch, bring.")

WAIT_S = 50.0
"""Seconds for which the adapter waits for media that it is fetching."""
PIECE_S = 60.0
"""Seconds for one piece. The first one of a message's media takes longest, and the last one of an upload: the adapter
reads it back for its digest."""
Attached = tuple[type[OutImage] | type[OutFile], str, bytes]
"""What is sent as what, its name, and its bytes."""
_OPTION = re.compile(r"--[a-z][a-z-]*")


async def send(
    sandbox: Sandbox,
    text: Annotated[
        str | None, Parameter(allow_leading_hyphen=True, help="What to send; `-`: all of standard input.")
    ] = None,
    /,
    *,
    file: Annotated[tuple[Path, ...], flag("Send this file after the text. May be repeated.", metavar="FILE")] = (),
    image: Annotated[
        tuple[Path, ...], flag("Send this picture after the text. May be repeated.", metavar="FILE")
    ] = (),
    user: Annotated[str | None, Parameter(metavar="USER", help="Recipient; default: the bot's user.")] = None,
    bot: Annotated[
        str | None, Parameter(metavar="BOT", help="Needed only where the sandbox has several bots.")
    ] = None,
    when_closed: Annotated[
        Literal["park", "refuse"], Parameter(help="While the user must write first: wait for it, or refuse.")
    ] = "park",
    expires_in: Annotated[
        float | None, Parameter(metavar="SECONDS", help="Seconds; unsent by then: refused.")
    ] = None,
    request_id: RequestId = None,
    no_wait: Annotated[bool, flag("End as soon as the command is stored.")] = False,
    wait_final: Annotated[bool, flag("Keep waiting when the command is parked.")] = False,
    timeout: Timeout = 60.0,
    json: Json = False,
) -> int:
    """Send a text, pictures or files to a sandbox's user and wait for the receipt.

    Exit code 0: accepted by WeChat, or parked until the user writes; 1: refused, uncertain, unconfirmed or
    dead-lettered; 4: stored, but no receipt in time.
    """
    command_id = request_id or new_id()
    sent = [(OutImage, path) for path in image] + [(OutFile, path) for path in file]
    if text is None and not sent:
        raise Failed(USAGE, "There is nothing to send: give a text, --image or --file.")
    said = None if text is None else _read_text(text)
    contents = [(kind, path.name, _read_media(path)) for kind, path in sent]
    command = Outbound(
        id=command_id,
        text=said,
        user=user,
        bot=bot,
        when_closed=when_closed,
        expires_in_s=expires_in,
    )
    try:
        msgspec.json.decode(msgspec.json.encode(command), type=Outbound)
    except msgspec.ValidationError as exc:  # an adapter would make a dead letter of it
        raise Failed(USAGE, f"{exc}.") from None
    async with connected_bus() as bus:
        subject = bus.names.receipt(sandbox, command_id)
        receipts = await bus.nc.subscribe(subject)
        await bus.check_subscribed(*() if no_wait else (subject,))  # before anything can happen to the command
        if contents:
            items: list[OutItem] = [] if said is None else [OutText(text=said)]
            for kind, name, data in contents:
                items.append(kind(media=await _upload(bus, sandbox, name, data), name=name))
            command = msgspec.structs.replace(command, text=None, items=items)
        headers = {H_MSG_ID: command_id, H_SCHEMA: SCHEMA_VERSION}
        ack = await bus.store(bus.names.out(sandbox), msgspec.json.encode(command), headers)
        if no_wait:
            output.tell({"command": command_id, "outcome": "stored"}, json, f"stored  (id {command_id})")
            return OK
        earlier = await bus.read_stored(bus.names.stream_event, subject, keep=_if_final) if ack.duplicate else []
        try:
            last = earlier[0] if earlier else await wait_outcome(receipts, command_id, timeout, wait_final)
        except Unanswered as exc:
            raise Failed(TIMEOUT, f"{exc} {await _why_unanswered(bus, sandbox)}") from None
    output.tell(last, json, describe(last))
    return OK if last.outcome in ("accepted", "parked") else NO


def _read_text(text: str) -> str:
    if _OPTION.fullmatch(text):
        raise Failed(USAGE, f"There is no option {text}; if that is the text, give it by standard input.")
    text = sys.stdin.read() if text == "-" else text
    if not text.strip():
        raise Failed(USAGE, "There is no text to send.")
    return text


class Unanswered(Failed):
    """No final receipt came in time."""


async def wait_outcome(receipts: Subscription, command_id: str, timeout_s: float, wait_final: bool) -> Receipt:
    """The final receipt, or `parked` where that ends the wait. Raises Failed, Unanswered among them."""
    state = "Stored"
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                receipt = _decode_receipt((await receipts.next_msg(timeout=None)).data)
                if receipt and (receipt.outcome in FINAL_OUTCOMES or not wait_final):
                    return receipt
                state = "Parked until the user writes" if receipt else state
    except TimeoutError:
        raise Unanswered(TIMEOUT, f"{state}; no final receipt within {timeout_s:g} s (id {command_id}).") from None
    except NatsError:
        raise Failed(UNREACHABLE, f"Stored (id {command_id}), but the connection broke before the receipt.") from None


async def _why_unanswered(bus: BusConnection, sandbox: str) -> str:
    """What its bots and the adapters tell of a command that waits."""
    try:
        every = await all_bindings(bus, sandbox, health=True)
    except Failed as exc:  # no adapter runs, or this user may not ask
        return str(exc)
    for info in every:
        if info.health is not None and info.health.status in TROUBLE:
            detail = info.health.detail.rstrip(".") or "`wechat-nats bindings` has more"
            return f"{info.bot} is {info.health.status}: {detail}."
    return "An adapter runs, and iLink has not taken it yet: it is tried until it is taken, or expires."


def _if_final(stored: StoredMessage) -> Receipt | None:
    receipt = _decode_receipt(stored.data)
    return receipt if receipt and receipt.outcome in FINAL_OUTCOMES else None


def _decode_receipt(data: bytes) -> Receipt | None:
    try:
        return msgspec.json.decode(data, type=Receipt)
    except UNDECODABLE:
        return None  # an event of a later version


def describe(receipt: Receipt) -> str:
    """A receipt in words. Those of others in it are not escaped."""
    raw = [f"{k} {v}" for k, v in (("ret", receipt.ret), ("errcode", receipt.errcode)) if v is not None]
    parts = (receipt.reason, receipt.detail.rstrip("."), *raw, receipt.errmsg)
    why = ", ".join(part for part in parts if part)
    match receipt.outcome:
        case "accepted":
            return f"accepted  (message id {', '.join(receipt.message_ids)})"
        case "parked":
            return f"parked  (not sent yet: {why or 'it waits for the user to write'})"
        case outcome:
            return f"{outcome}  ({why or 'no reason given'})"


@media.command
async def get(
    name: Annotated[str, Parameter(help="`media.object` of a message: <sandbox>/…")],
    to: Annotated[str, Parameter(allow_leading_hyphen=True, help="File to write; -: standard output.")],
    /,
    *,
    position: Annotated[
        str,
        Parameter(
            metavar="POSITION", help="The message's position in the inbox: waits for media that are not stored yet."
        ),
    ] = "",
    force: Annotated[bool, flag("Overwrite the file.")] = False,
) -> int:
    """Fetch an object and check its digest. The bytes are what a person sent: treat them as private."""
    sandbox = name.partition("/")[0]
    if not is_sandbox(sandbox):
        raise Failed(USAGE, "An object's name begins with its sandbox: <sandbox>/…")
    if to != "-" and not force and Path(to).exists():  # noqa: ASYNC240 -- nothing else runs in a command
        raise Failed(USAGE, f"{to} is there: give --force to overwrite it.")
    async with connected_bus() as bus:
        asking = partial(bus.ask, timeout_s=PIECE_S)
        data = await get_media(asking, sandbox, name, position=position, wait_s=WAIT_S if position else 0)
    if to == "-":
        sys.stdout.buffer.write(data)
        return OK
    write_private(to, data)
    output.say(f"{len(data):,} bytes are in {output.printable(to)}")
    return OK


@media.command
async def put(sandbox: Sandbox, file: Path, /, *, json: Json = False) -> int:
    """Bring a file, for commands of the sandbox to name. `send --file` does both."""
    data = _read_media(file)
    async with connected_bus() as bus:
        stored = await _upload(bus, sandbox, file.name, data)
    output.tell(stored, json, f"{stored.object}  {stored.mime}, {stored.size:,} bytes")
    return OK


def _read_media(file: Path) -> bytes:
    """Raises Failed."""
    data = read_bytes(file)
    if not data:
        raise Failed(USAGE, f"{file} is empty.")
    return data


async def _upload(bus: BusConnection, sandbox: str, name: str, data: bytes) -> Media:
    """Raises Failed."""
    return await put_media(partial(bus.ask, timeout_s=PIECE_S), sandbox, data, name)
