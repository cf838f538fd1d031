"""`media get/put`: bytes of a sandbox's object store, in pieces, by the adapter's service."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from adapter.agent.media import Request, get_media, put_media
from adapter.cli import output
from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.exits import OK, USAGE, Failed
from adapter.cli.files import read_bytes, write_private
from adapter.cli.options import Json, Sandbox, flag
from adapter.contract.messages import Media
from adapter.contract.names import is_sandbox

app = App(name="media", help="Pictures, files and voice in the object store: fetch, bring.")

WAIT_S = 50.0
"""Seconds for which the adapter waits for media that it is fetching."""
PIECE_S = 60.0
"""Seconds for one piece. The first one of a message's media takes longest, and the last one of an upload: the adapter
reads it back for its digest."""


@app.command
async def get(
    name: Annotated[str, Parameter(help="`media.object` of a message, as `tail` shows it: <sandbox>/…")],
    to: Annotated[str, Parameter(allow_leading_hyphen=True, help="File to write; -: standard output.")],
    /,
    *,
    sequence: Annotated[
        int, Parameter(help="Sequence of the message, as `tail` shows it: waits for media that are not stored yet.")
    ] = 0,
    force: Annotated[bool, flag("Overwrite the file.")] = False,
) -> int:
    """Fetch an object and check its digest. The bytes are what a person sent: treat them as private."""
    sandbox = name.partition("/")[0]
    if not is_sandbox(sandbox):
        raise Failed(USAGE, "An object's name begins with its sandbox: <sandbox>/…")
    if to != "-" and not force and Path(to).exists():  # noqa: ASYNC240 -- nothing else runs in a command
        raise Failed(USAGE, f"{to} is there: give --force to overwrite it.")
    async with connected_bus() as bus:
        data = await get_media(
            _requests_over(bus), sandbox, name, sequence=sequence, wait_s=WAIT_S if sequence else 0
        )
    if to == "-":
        sys.stdout.buffer.write(data)
        return OK
    write_private(to, data)
    output.say(f"{len(data):,} bytes are in {output.printable(to)}")
    return OK


@app.command
async def put(sandbox: Sandbox, file: Path, /, *, json: Json = False) -> int:
    """Bring a file, for commands of the sandbox to name. `send --file` does both."""
    data = read_media(file)
    async with connected_bus() as bus:
        media = await upload(bus, sandbox, file.name, data)
    output.tell(media, json, f"{media.object}  {media.mime}, {media.size:,} bytes")
    return OK


def read_media(file: Path) -> bytes:
    """Raises Failed."""
    data = read_bytes(file)
    if not data:
        raise Failed(USAGE, f"{file} is empty.")
    return data


async def upload(bus: BusConnection, sandbox: str, name: str, data: bytes) -> Media:
    """Raises Failed."""
    return await put_media(_requests_over(bus), sandbox, data, name)


def _requests_over(bus: BusConnection) -> Request:
    async def request(verb: str, payload: bytes, headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
        reply = await bus.service_reply(verb, payload, PIECE_S, headers)
        return reply.data, reply.headers or {}

    return request
