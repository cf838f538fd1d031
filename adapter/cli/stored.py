"""`queue` and `dead`: commands that wait to be sent, and what could not be handled and waits for a person."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
from cyclopts import App, Parameter

from adapter.bridge.persons import open_state
from adapter.cli import output
from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.exits import NO, OK, USAGE, Failed
from adapter.cli.options import Json
from adapter.contract.names import H_MSG_ID
from adapter.errors import UNDECODABLE, RecordTooNew, Refused
from adapter.ports import StoredMessage
from adapter.services.dead_letters import DeadLetter, dead_letter_of, retry_message
from adapter.tools.seal import Sealer, dead_context

queue = App(name="queue", help="Commands that wait to be sent: delete.")
dead = App(name="dead", help="Messages that could not be handled: list, show, try again, delete.")

_SECRET_NAME = re.compile(r"token|secret|authorization|aes_?key|cursor|sealed", re.IGNORECASE)
"""A cursor has the bot's token in it."""
MASK = "***"
DEAD_COLUMNS = ("seq", "time", "sandbox", "stream", "reason", "detail", "size")

Seqs = Annotated[int, Parameter(help="Numbers, as `dead ls` and `trace` show them.")]


@queue.command(name="drop")
async def drop_queued(*seqs: Seqs) -> int:
    """Delete commands for good. They get no receipt: tell whoever waits for one.

    What an adapter has in hand already may still be sent, and gets its receipt then.
    """
    return await _for_each(seqs, lambda bus, seq: _drop(bus, bus.names.stream_out, seq, "waiting command"))


@dead.command(name="ls")
async def list_dead_letters(
    *,
    stream: Annotated[str | None, Parameter(metavar="STREAM", help="Only of this stream: WECHAT_OUT …")] = None,
    json: Json = False,
) -> int:
    """List dead letters, oldest first. Bodies are not shown: they may hold message text."""

    def to_letter(one: StoredMessage) -> DeadLetter | None:
        letter = dead_letter_of(one.seq, one.subject, one.headers, size=len(one.data))
        return letter if stream in (None, letter.stream) else None

    async with connected_bus() as bus:
        letters = await bus.read_stored(bus.names.stream_dead, bus.names.dead_letters("*"), keep=to_letter)

    def row(x: DeadLetter) -> tuple[object, ...]:
        return x.seq, output.clock(x.time_ms), x.sandbox or "-", x.stream, x.reason, x.detail, x.size

    output.listing(letters, json, DEAD_COLUMNS, row, empty="No dead letters.")
    return OK


@dead.command
async def show(*seqs: Seqs, json: Json = False) -> int:
    """Show dead letters with headers and body.

    The body may hold what a person wrote: treat it as private. Tokens and keys in it are masked. That of an inbound
    dead letter is sealed: WECHAT_NATS_TOKEN_KEY opens it, as adapters have it.
    """

    async def show_one(bus: BusConnection, seq: int) -> bool:
        if (letter := await _letter(bus, seq)) is None:
            return False
        # without the headers that the server adds to its answer
        headers = {k: v for k, v in letter.headers.items() if k == H_MSG_ID or not k.startswith("Nats-")}
        body = readable_body(bus, letter)
        if json:
            output.json_line({"seq": letter.seq, "subject": letter.subject, "headers": headers, "body": body})
            return True
        head = [f"{letter.seq}  {letter.subject}", *(f"  {name}: {value}" for name, value in headers.items())]
        for line in (*head, f"  {len(letter.data)} bytes; may hold message text:", f"  {body}"):
            output.say(output.printable(line))
        return True

    return await _for_each(seqs, show_one)


@dead.command
async def retry(*seqs: Seqs) -> int:
    """Publish dead commands again, under a new message id, and delete them here.

    For commands and unbinds. Inbound dead letters cannot be retried: the user has to write again. Nor can a bind or
    an erase, of which nothing but the reason is kept.
    """

    async def retry_one(bus: BusConnection, seq: int) -> bool:
        if (letter := await _letter(bus, seq)) is None:
            return False
        try:
            message = retry_message(bus.names, letter.seq, letter.headers, letter.data)
        except Refused as exc:
            output.complain(f"{letter.seq} cannot be retried. {exc.detail}")
            return False
        await bus.store(message.subject, message.payload, message.headers)
        msg_id = message.headers[H_MSG_ID]
        output.say(f"{letter.seq}  stored again on {output.printable(message.subject)}  (id {msg_id})")
        await bus.delete_stored(bus.names.stream_dead, letter.seq)
        return True

    return await _for_each(seqs, retry_one)


@dead.command(name="drop")
async def drop_dead_letters(*seqs: Seqs) -> int:
    """Delete dead letters for good."""
    return await _for_each(seqs, lambda bus, seq: _drop(bus, bus.names.stream_dead, seq, "dead letter"))


async def _drop(bus: BusConnection, stream: str, seq: int, what: str) -> bool:
    """Deletes a message. False: it is not there. Raises Failed."""
    if not await bus.delete_stored(stream, seq):
        output.complain(f"There is no {what} {seq}.")
        return False
    output.say(f"{seq}  dropped")
    return True


async def _for_each(seqs: tuple[int, ...], work: Callable[[BusConnection, int], Awaitable[bool]]) -> int:
    """Does `work` with each; the exit code is NO if it failed with one. Raises Failed."""
    if not seqs:
        raise Failed(USAGE, "Which ones? Give numbers.")
    async with connected_bus() as bus:
        return OK if all([await work(bus, seq) for seq in seqs]) else NO


async def _letter(bus: BusConnection, seq: int) -> StoredMessage | None:
    """None, which is said: it is not there. Raises Failed."""
    letter = await bus.get_stored(bus.names.stream_dead, seq)
    if letter is None:
        output.complain(f"There is no dead letter {seq}.")
    return letter


def readable_body(bus: BusConnection, stored: StoredMessage) -> str:
    """The body of a message with its secrets masked. A sealed one is opened; a sentence says if that fails."""
    names, data, sealer = bus.names, stored.data, Sealer(bus.settings.token_key)
    persons = f"$KV.{names.persons}."
    try:
        if stored.subject == names.dead_letters(names.stream_in):
            data = sealer.open_bytes(dead_context(stored.headers.get(H_MSG_ID, "")), data)
        elif stored.subject.startswith(persons):
            _, state = open_state(stored.subject.removeprefix(persons), data, sealer)
            data = msgspec.json.encode(state)
    except Refused as exc:
        return f"(withheld: {exc.detail})"
    except (RecordTooNew, *UNDECODABLE):
        return "(withheld: a newer version wrote it, or it is damaged)"
    return mask_secrets(data)


def mask_secrets(data: bytes) -> str:
    """The body of a message with its secrets masked. A body that cannot be read, and names one, is withheld."""
    try:
        return msgspec.json.encode(_mask_value(msgspec.json.decode(data))).decode()
    except UNDECODABLE:
        text = data.decode(errors="backslashreplace")
    if _SECRET_NAME.search(text):
        return "(withheld: it cannot be read, and may hold a token)"
    return text


def _mask_value(value: Any) -> Any:
    match value:
        case dict():
            return {k: MASK if v and _SECRET_NAME.search(k) else _mask_value(v) for k, v in value.items()}
        case list():
            return [_mask_value(part) for part in value]
        case _:
            return value
