"""`send`: one command to a sandbox's user, and what became of it."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from adapter.cli import output
from adapter.cli.bus import Bus, connected_bus
from adapter.cli.exit_codes import NO, OK, TIMEOUT, UNREACHABLE, USAGE, Failed
from adapter.cli.media import read_media, upload
from adapter.cli.options import Json, RequestId, Sandbox, Timeout, flag, new_id, repeated
from adapter.contract.messages import (
    FINAL_OUTCOMES,
    SCHEMA_VERSION,
    Outbound,
    OutFile,
    OutImage,
    OutItem,
    OutText,
    Receipt,
)
from adapter.contract.names import H_MSG_ID, H_SCHEMA
from adapter.errors import UNDECODABLE
from adapter.ports import Stored

Content = tuple[type[OutImage] | type[OutFile], str, bytes]
"""What is sent as what, its name, and its bytes."""
_OPTION = re.compile(r"--[a-z][a-z-]*")


async def send(
    sandbox: Sandbox,
    text: Annotated[
        str | None, Parameter(allow_leading_hyphen=True, help="What to send; `-`: all of standard input.")
    ] = None,
    /,
    *,
    file: Annotated[tuple[Path, ...], repeated("Send this file after the text. May be repeated.")] = (),
    image: Annotated[tuple[Path, ...], repeated("Send this picture after the text. May be repeated.")] = (),
    user: Annotated[str | None, Parameter(help="Recipient; default: the bot's user.")] = None,
    bot: Annotated[str | None, Parameter(help="Needed only where the sandbox has several bots.")] = None,
    when_closed: Annotated[
        Literal["park", "refuse"], Parameter(help="While the user must write first: wait for it, or refuse.")
    ] = "park",
    format: Annotated[  # noqa: A002 -- the name of the option
        Literal["markdown", "plain"], Parameter(help="plain: Markdown is turned into plain text.")
    ] = "markdown",
    expires_in: Annotated[float | None, Parameter(help="Seconds; unsent by then: refused.")] = None,
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
    contents = [(kind, path.name, read_media(path)) for kind, path in sent]
    command = Outbound(
        id=command_id,
        text=said,
        user=user,
        bot=bot,
        when_closed=when_closed,
        format=format,
        expires_in_s=expires_in,
    )
    body = msgspec.json.encode(command)
    try:
        msgspec.json.decode(body, type=Outbound)
    except msgspec.ValidationError as exc:  # an adapter would make a dead letter of it
        raise Failed(USAGE, f"{exc}.") from None
    async with connected_bus() as bus:
        receipt_subject = bus.names.receipt(sandbox, command_id)
        receipts = await bus.nc.subscribe(receipt_subject)
        await bus.check_subscribed(
            *() if no_wait else (receipt_subject,)
        )  # before anything can happen to the command
        if contents:
            body = msgspec.json.encode(await _with_media(bus, sandbox, command, said, contents))
        before = await _store(bus, sandbox, command_id, body)
        if no_wait:
            return _print_stored(command, json)
        last = before or await _wait_outcome(receipts, command, timeout, wait_final)
    _print_receipt(last, json)
    return OK if last.outcome in ("accepted", "parked") else NO


async def _with_media(
    bus: Bus, sandbox: str, command: Outbound, said: str | None, contents: list[Content]
) -> Outbound:
    """The command with its media, which are brought first. Raises Failed."""
    items: list[OutItem] = [] if said is None else [OutText(text=said)]
    for kind, name, data in contents:
        items.append(kind(media=await upload(bus, sandbox, name, data), name=name))
    return msgspec.structs.replace(command, text=None, items=items)


def _read_text(text: str) -> str:
    if _OPTION.fullmatch(text):
        raise Failed(USAGE, f"There is no option {text}; if that is the text, give it by standard input.")
    text = sys.stdin.read() if text == "-" else text
    if not text.strip():
        raise Failed(USAGE, "There is no text to send.")
    return text


async def _store(bus: Bus, sandbox: str, command: str, body: bytes) -> Receipt | None:
    """Stores it under its id. Returns the final receipt of an earlier one with that id, where there is one."""
    headers = {H_MSG_ID: command, H_SCHEMA: SCHEMA_VERSION}
    ack = await bus.store(bus.names.out(sandbox), body, headers)
    if not ack.duplicate:
        return None

    def is_final(stored: Stored) -> Receipt | None:
        receipt = _decode_receipt(stored.data)
        return receipt if receipt and receipt.command == command and receipt.outcome in FINAL_OUTCOMES else None

    subject = bus.names.receipt(sandbox, command)
    return next(iter(await bus.read_stored(bus.names.stream_event, subject, keep=is_final)), None)


async def _wait_outcome(receipts: Subscription, command: Outbound, timeout_s: float, wait_final: bool) -> Receipt:
    """The final receipt, or `parked` where that ends the wait. Raises Failed."""
    parked = False
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                receipt = _decode_receipt((await receipts.next_msg(timeout=None)).data)
                if receipt is None or receipt.command != command.id:
                    continue
                if receipt.outcome in FINAL_OUTCOMES or not wait_final:
                    return receipt
                parked = True
    except TimeoutError:
        state = "Parked until the user writes" if parked else "Stored"
        raise Failed(
            TIMEOUT, f"{state}; no final receipt within {timeout_s:g} s (id {command.id}): is an adapter running?"
        ) from None
    except NatsError:
        raise Failed(UNREACHABLE, f"Stored (id {command.id}), but the connection broke before the receipt.") from None


def _decode_receipt(data: bytes) -> Receipt | None:
    try:
        return msgspec.json.decode(data, type=Receipt)
    except UNDECODABLE:
        return None  # an event of a later version


def _print_stored(command: Outbound, json: bool) -> int:
    if json:
        output.json_line({"command": command.id, "outcome": "stored"})
    else:
        output.say(output.printable(f"stored  (id {command.id})"))
    return OK


def _print_receipt(receipt: Receipt, json: bool) -> None:
    if json:
        output.json_line(receipt)
    else:
        output.say(describe(receipt))


def describe(receipt: Receipt) -> str:
    """A receipt on one line."""
    ids = ", ".join(receipt.message_ids)
    match receipt.outcome:
        case "accepted":
            said = f"accepted  (message id {ids})"
        case "parked":
            said = f"parked  (not sent yet: {_reason_text(receipt) or 'it waits for the user to write'})"
        case outcome:
            said = f"{outcome}  ({_reason_text(receipt) or 'no reason given'})"
    return output.printable(said)


def _reason_text(receipt: Receipt) -> str:
    raw = [f"{k} {v}" for k, v in (("ret", receipt.ret), ("errcode", receipt.errcode)) if v is not None]
    return ", ".join(part for part in (receipt.reason, receipt.detail.rstrip("."), *raw, receipt.errmsg) if part)
