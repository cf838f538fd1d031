"""`dead ls/show/retry/drop`: what could not be handled and waits for a person."""

from __future__ import annotations

import base64
import re
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Annotated, Any

import msgspec
from cyclopts import App, Parameter
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import api
from nats.js.errors import APIError, NotFoundError

from adapter.cli import output
from adapter.cli.bus import Bus, JetStreamGone, connected_bus, missing_stream_failure, sequence_from
from adapter.cli.exit_codes import NO, OK, UNREACHABLE, USAGE, Failed
from adapter.cli.options import Json
from adapter.contract.names import H_MSG_ID, Names
from adapter.errors import UNDECODABLE
from adapter.jetstream.api_replies import NO_STREAM
from adapter.services.dead_letters import DeadLetter, dead_letter_of, retry_message

app = App(name="dead", help="Messages that could not be handled: list, show, try again, delete.")

COLUMNS = ("seq", "time", "sandbox", "stream", "reason", "detail", "size")
_SECRET_NAME = re.compile(r"token|secret|authorization|aes_?key", re.IGNORECASE)
_QUOTE = re.compile("[\"']")
MASK = "***"

Seqs = Annotated[int, Parameter(help="Numbers, as `dead ls` shows them.")]


@app.command(name="ls")
async def list_dead_letters(
    *, stream: Annotated[str | None, Parameter(help="Only of this stream: WECHAT_OUT …")] = None, json: Json = False
) -> int:
    """List dead letters, oldest first. Bodies are not shown: they may hold message text."""
    async with connected_bus() as bus:
        letters = [letter for letter in await dead_letters(bus) if stream in (None, letter.stream)]
    if json:
        for letter in letters:
            output.json_line(letter)
    else:
        rows = [
            (x.seq, output.clock(x.time_ms), x.sandbox or "-", x.stream, x.reason, x.detail, x.size) for x in letters
        ]
        output.table(COLUMNS, rows, empty="No dead letters.")
    return OK


@app.command
async def show(*seqs: Seqs, json: Json = False) -> int:
    """Show dead letters with headers and body.

    The body may hold what a person wrote: treat it as private. Tokens and keys in it are masked.
    """

    async def shown(bus: Bus, seq: int) -> bool:
        if (raw := await _fetch_stored(bus, seq)) is None:
            return False
        if json:
            output.json_line(_as_json(bus.names, raw))
        else:
            _print(bus.names, raw)
        return True

    return await _for_each(seqs, shown)


@app.command
async def retry(*seqs: Seqs) -> int:
    """Publish dead commands again, under a new message id, and delete them here.

    For what came from WECHAT_OUT and WECHAT_CTL. Inbound dead letters cannot be retried: the user has to write again.
    """
    return await _for_each(seqs, _retry)


@app.command
async def drop(*seqs: Seqs) -> int:
    """Delete dead letters for good."""

    async def dropped(bus: Bus, seq: int) -> bool:
        if gone := await _delete(bus, seq):
            output.say(f"{seq}  dropped")
        return gone

    return await _for_each(seqs, dropped)


async def _for_each(seqs: tuple[int, ...], work: Callable[[Bus, int], Awaitable[bool]]) -> int:
    """Does `work` with each letter; NO if it failed with one. Raises Failed."""
    if not seqs:
        raise Failed(USAGE, "Which ones? Give numbers as `wechat-nats dead ls` shows them.")
    async with connected_bus() as bus:
        done = [await work(bus, seq) for seq in seqs]
    return OK if all(done) else NO


async def dead_letters(bus: Bus) -> list[DeadLetter]:
    """All of them, without bodies. Raises Failed."""
    heads = sequence_from(bus, bus.names.stream_dead, bus.names.dead_letters("*"), headers_only=True)
    return [_read_dead_letter(msg) async for msg in heads]


def _read_dead_letter(msg: Msg) -> DeadLetter:
    headers = msg.headers or {}
    size = headers.get("Nats-Msg-Size", "")
    return dead_letter_of(
        msg.metadata.sequence.stream,
        msg.subject,
        headers,
        size=int(size) if size.isdigit() else 0,
        stored_ms=int(msg.metadata.timestamp.timestamp() * 1000),
    )


async def _fetch_stored(bus: Bus, seq: int) -> api.RawStreamMsg | None:
    """None, and a complaint, where there is no such letter. Raises Failed."""
    stream = bus.names.stream_dead
    try:
        raw = await bus.unless_forbidden(f"$JS.API.STREAM.MSG.GET.{stream}", bus.js.get_msg(stream, seq))
        # nats-py makes an object of a value that is not ASCII, here alone
        raw.headers = await bus.nc.parse_headers(base64.b64decode(raw.hdrs or ""))
        return raw
    except JetStreamGone:
        raise
    except NotFoundError as exc:
        if exc.err_code == NO_STREAM:
            raise Failed(UNREACHABLE, missing_stream_failure(stream)) from None
        output.complain(f"There is no dead letter {seq}.")
        return None
    except (NatsError, TimeoutError):
        raise Failed(UNREACHABLE, f"Cannot read the dead letters: {stream} did not answer.") from None


async def _delete(bus: Bus, seq: int) -> bool:
    """False, and a complaint, where there is no such letter. Raises Failed."""
    stream = bus.names.stream_dead
    try:
        await bus.unless_forbidden(f"$JS.API.STREAM.MSG.DELETE.{stream}", bus.js.delete_msg(stream, seq))
    except JetStreamGone:
        raise
    except APIError as exc:
        if exc.err_code == NO_STREAM:
            raise Failed(UNREACHABLE, missing_stream_failure(stream)) from None
        output.complain(f"There is no dead letter {seq}.")
        return False
    except (NatsError, TimeoutError):
        raise Failed(UNREACHABLE, f"Cannot delete dead letter {seq}: {stream} did not answer.") from None
    return True


async def _retry(bus: Bus, seq: int) -> bool:
    """Publishes, then deletes; False, and a complaint, where there is nothing to publish. Raises Failed."""
    if (raw := await _fetch_stored(bus, seq)) is None:
        return False
    message = retry_message(bus.names, seq, raw.headers or {}, raw.data or b"")
    if message is None:
        output.complain(f"{seq} cannot be retried: it is no command; the user has to write again.")
        return False
    await bus.store(message.subject, message.payload, message.headers)
    msg_id = message.headers[H_MSG_ID]
    output.say(f"{seq}  stored again on {output.printable(message.subject)}  (id {msg_id})")
    return await _delete(bus, seq)


def _print(names: Names, raw: api.RawStreamMsg) -> None:
    output.say(f"{raw.seq}  {output.printable(raw.subject or '')}")
    for name, value in (raw.headers or {}).items():
        output.say(f"  {output.printable(name)}: {output.printable(value)}")
    output.say(f"  {len(raw.data or b'')} bytes; may hold message text:")
    output.say(f"  {output.printable(mask_secrets(names, raw))}")


def _as_json(names: Names, raw: api.RawStreamMsg) -> dict[str, Any]:
    return {"seq": raw.seq, "subject": raw.subject, "headers": raw.headers or {}, "body": mask_secrets(names, raw)}


def mask_secrets(names: Names, raw: api.RawStreamMsg) -> str:
    """The body without what opens something; of one that cannot be read nothing after the name of a secret."""
    data = raw.data or b""
    try:
        return msgspec.json.encode(_mask_value(msgspec.json.decode(data))).decode()
    except UNDECODABLE:
        pass
    if (raw.subject or "").endswith(f".{names.stream_ctl}"):
        return "(withheld: a control message that cannot be read may hold a token anywhere)"
    return _up_to_secret(data.decode(errors="backslashreplace"))


def _up_to_secret(text: str) -> str:
    """`text` as far as the first name of a secret. Piece by piece: a search for one would begin anew at each word
    that may be one, of which a sandbox can write thousands."""
    end = 0
    for piece, behind in pairwise(_QUOTE.split(text)):
        end += len(piece) + 1
        if _SECRET_NAME.search(piece) and (value := behind.lstrip()).startswith(":"):
            return f"{text[: end + len(behind) - len(value) + 1]}{MASK}"
    return text


def _mask_value(value: Any) -> Any:
    match value:
        case dict():
            return {k: MASK if v and _SECRET_NAME.search(k) else _mask_value(v) for k, v in value.items()}
        case list():
            return [_mask_value(part) for part in value]
        case _:
            return value
