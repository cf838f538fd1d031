"""`queue ls/drop`: commands that wait on the bus for an adapter, or for their turn."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
from cyclopts import App, Parameter
from nats.errors import Error as NatsError
from nats.js.errors import APIError

from adapter.cli import output
from adapter.cli.bus import Bus, JetStreamGone, connected_bus, missing_stream_failure
from adapter.cli.exit_codes import NO, OK, UNREACHABLE, USAGE, Failed
from adapter.cli.options import Json, MaybeSandbox, flag
from adapter.contract.names import H_COMMAND, H_MSG_ID, Names
from adapter.conversation.commands import Limits, command_id, salvage_ids
from adapter.jetstream.api_replies import NO_STREAM
from adapter.ports import Stored

app = App(name="queue", help="Commands that wait to be sent: list, delete.")

COLUMNS = ("seq", "sandbox", "id", "age", "size")


class QueuedCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command as it is listed."""

    seq: int
    sandbox: str
    id: str
    stored_ms: int
    age_s: int
    size: int
    body: str | None = None


@app.command(name="ls")
async def list_queued(
    *,
    sandbox: MaybeSandbox = None,
    bodies: Annotated[bool, flag("Show bodies, too: they hold message text.")] = False,
    json: Json = False,
) -> int:
    """List commands that have no final receipt yet, oldest first."""
    async with connected_bus() as bus:
        found = [to_queued_command(bus.names, stored, bodies=bodies) for stored in await _read(bus, sandbox)]
    rows = [one for one in found if sandbox in (None, one.sandbox)]
    if json:
        for one in rows:
            output.json_line(one)
    else:
        columns = (*COLUMNS, "body") if bodies else COLUMNS
        cells = [(x.seq, x.sandbox, x.id, _format_age(x.age_s), x.size, x.body)[: len(columns)] for x in rows]
        output.table(columns, cells, empty="No commands wait.")
    return OK


@app.command
async def drop(*seqs: Annotated[int, Parameter(help="Numbers, as `queue ls` shows them.")]) -> int:
    """Delete commands for good. They get no receipt: tell whoever waits for one.

    What an adapter has in hand already may still be sent, and gets its receipt then.
    """
    if not seqs:
        raise Failed(USAGE, "Which ones? Give numbers as `wechat-nats queue ls` shows them.")
    async with connected_bus() as bus:
        done = [await _drop_command(bus, seq) for seq in seqs]
    return OK if all(done) else NO


def to_queued_command(names: Names, stored: Stored, *, bodies: bool) -> QueuedCommand:
    body = salvage_ids(stored.data, Limits(command_bytes=len(stored.data), park_ms=0))
    routed, msg_id = stored.headers.get(H_COMMAND, ""), stored.headers.get(H_MSG_ID, "")
    plain = stored.subject == names.out_plain
    return QueuedCommand(
        seq=stored.seq,
        sandbox=(body.sandbox or "") if plain else stored.subject.rpartition(".")[2],
        id=command_id(body.id, routed, msg_id, stored.seq),
        stored_ms=stored.time_ms,
        age_s=max(0, int(time.time() - stored.time_ms / 1000)),
        size=len(stored.data),
        body=stored.data.decode(errors="backslashreplace") if bodies else None,
    )


async def _read(bus: Bus, sandbox: str | None) -> list[Stored]:
    """What may be of the sandbox, or all, oldest first. Raises Failed."""
    names = bus.names
    mine = f"{names.out_plain}.>" if sandbox is None else names.out_of_sandbox(sandbox)
    found = [await bus.read_stored(names.stream_out, subject) for subject in (mine, names.out_plain)]
    return sorted((stored for some in found for stored in some), key=lambda stored: stored.seq)


async def _drop_command(bus: Bus, seq: int) -> bool:
    """False, and a complaint, where there is no such command. Raises Failed."""
    stream = bus.names.stream_out
    try:
        await bus.unless_forbidden(f"$JS.API.STREAM.MSG.DELETE.{stream}", bus.js.delete_msg(stream, seq))
    except JetStreamGone:
        raise
    except APIError as exc:
        if exc.err_code == NO_STREAM:
            raise Failed(UNREACHABLE, missing_stream_failure(stream)) from None
        output.complain(f"No command {seq} waits.")
        return False
    except (NatsError, TimeoutError):
        raise Failed(UNREACHABLE, f"Cannot delete command {seq}: {stream} did not answer.") from None
    output.say(f"{seq}  dropped")
    return True


def _format_age(seconds: int) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
