"""`queue ls/drop`: commands that wait on the bus for an adapter, or for their turn."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from adapter.cli import output
from adapter.cli.bus import connected_bus
from adapter.cli.dead import drop_one, for_each
from adapter.cli.exits import OK
from adapter.cli.options import Json, MaybeSandbox, flag
from adapter.contract.names import H_COMMAND, H_MSG_ID, Names
from adapter.outbound.commands import Limits, command_id, salvage_ids
from adapter.ports import StoredMessage

app = App(name="queue", help="Commands that wait to be sent: list, delete.")

COLUMNS = ("seq", "sandbox", "id", "age", "size", "body")


class ListedCommand(msgspec.Struct, frozen=True, kw_only=True):
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
    found: list[ListedCommand] = []
    async with connected_bus() as bus:
        names = bus.names

        def to_command(stored: StoredMessage) -> ListedCommand | None:
            command = to_queued_command(names, stored, bodies=bodies)
            return command if sandbox in (None, command.sandbox) else None

        for subject in (">",) if sandbox is None else (names.out_of_sandbox(sandbox), names.out_plain):
            found += await bus.read_stored(names.stream_out, subject, keep=to_command)
    found.sort(key=lambda command: command.seq)
    columns = COLUMNS if bodies else COLUMNS[:-1]

    def row(x: ListedCommand) -> tuple[object, ...]:
        return (x.seq, x.sandbox, x.id, output.span(x.age_s * 1000), x.size, x.body)[: len(columns)]

    output.listing(found, json, columns, row, empty="No commands wait.")
    return OK


@app.command
async def drop(*seqs: Annotated[int, Parameter(help="Numbers, as `queue ls` shows them.")]) -> int:
    """Delete commands for good. They get no receipt: tell whoever waits for one.

    What an adapter has in hand already may still be sent, and gets its receipt then.
    """
    return await for_each(seqs, "queue", lambda bus, seq: drop_one(bus, bus.names.stream_out, seq, "waiting command"))


def to_queued_command(names: Names, stored: StoredMessage, *, bodies: bool) -> ListedCommand:
    body = salvage_ids(stored.data, Limits(command_bytes=len(stored.data), park_ms=0))
    routed, msg_id = stored.headers.get(H_COMMAND, ""), stored.headers.get(H_MSG_ID, "")
    plain = stored.subject == names.out_plain
    return ListedCommand(
        seq=stored.seq,
        sandbox=(body.sandbox or "") if plain else stored.subject.rpartition(".")[2],
        id=command_id(body.id, routed, msg_id, stored.seq),
        stored_ms=stored.time_ms,
        age_s=max(0, int(time.time() - stored.time_ms / 1000)),
        size=len(stored.data),
        body=stored.data.decode(errors="backslashreplace") if bodies else None,
    )
