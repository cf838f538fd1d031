"""`backup` and `restore`: every stream and bucket as files, and back; also from one NATS to another.

By JetStream's own snapshots, since they keep the sequences: cursors and records name messages by them. The files are
those of `nats stream backup`, a folder per stream.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from nats.errors import Error as NatsError

from adapter.cli import output
from adapter.cli.bus import Bus, connected_bus
from adapter.cli.doctor import query_adapters, silent_adapters_advice
from adapter.cli.exit_codes import NO, OK, UNREACHABLE, USAGE, Failed
from adapter.cli.options import Json, flag

COLUMNS = ("stream", "messages", "bytes")
CHUNK = 128 * 1024
CHUNK_S = 30.0
"""Seconds that one chunk may take."""
LISTEN_S = 3.0
"""Seconds for adapters to answer. An adapter that is overlooked loses its streams while it runs."""
META, DATA = "backup.json", "stream.tar.s2"

Folder = Annotated[Path, Parameter(help="Folder of the backup, with a folder per stream.")]


class CopiedStream(msgspec.Struct, frozen=True):
    """One stream of a backup."""

    stream: str
    messages: int
    bytes: int
    """On disk, compressed."""


async def backup(folder: Folder, /, *, json: Json = False) -> int:
    """Copy every stream and bucket to files.

    Stop the adapters first if you mean to move: the copy may lack what they do meanwhile. The files hold messages of
    people and bot tokens (sealed, if the adapters have a key): guard them as such. Leases and logins, which only
    running adapters need, are left out.
    """
    if folder.exists() and any(folder.iterdir()):
        raise Failed(USAGE, f"{folder} is not empty.")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise _unwritten_streams(folder, exc) from None
    async with connected_bus() as bus:
        copied = [await _save(bus, stream, folder / stream) for stream in await _streams(bus)]
    if not copied:
        raise Failed(NO, "There is nothing of ours on this server.")
    _print(copied, json)
    return OK


async def restore(
    folder: Folder,
    /,
    *,
    replace: Annotated[bool, flag("Delete what is there, first.")] = False,
    json: Json = False,
) -> int:
    """Bring the streams and buckets of a backup back, with WECHAT_NATS_REPLICAS copies.

    Stop the adapters first. Streams and buckets that exist must be deleted before, since nothing is merged.
    """
    saved = sorted(place.parent for place in folder.glob(f"*/{META}"))
    if not saved:
        raise Failed(USAGE, f"{folder} holds no backup.")
    async with connected_bus() as bus:
        adapters = await query_adapters(bus, LISTEN_S)
        if adapters.ids:
            raise Failed(NO, f"{len(adapters.ids)} adapters are running on this bus: stop them first.")
        if adapters.silent:
            raise Failed(NO, silent_adapters_advice(bus))
        there = set(await _streams(bus)) & {place.name for place in saved}
        if there and not replace:
            raise Failed(NO, f"It is there already: {', '.join(sorted(there))}. With --replace it is deleted first.")
        for stream in sorted(there):
            await bus.api_request(f"STREAM.DELETE.{stream}")
        copied = [await _load(bus, place) for place in saved]
    _print(copied, json)
    return OK


async def _streams(bus: Bus) -> list[str]:
    """Our streams, without those that only running adapters need. Raises Failed."""
    names, offset = bus.names, 0
    found: list[str] = []
    while True:
        answer = await bus.api_request("STREAM.NAMES", {"offset": offset})
        page = answer.get("streams") or []
        found += page
        offset += len(page)
        if not page or offset >= answer.get("total", 0):
            break
    upper = f"{names.prefix.upper()}_"
    left_out = {f"KV_{bucket}" for bucket in (names.members, names.claims, names.logins)}
    ours = (upper, f"KV_{names.prefix}_", f"OBJ_{names.prefix}_")
    return sorted(name for name in found if name.startswith(ours) and name not in left_out)


def _unwritten_streams(folder: Path, exc: OSError) -> Failed:
    return Failed(NO, f"{folder} cannot be written: {exc.strerror}.")


async def _save(bus: Bus, stream: str, folder: Path) -> CopiedStream:
    inbox = bus.nc.new_inbox()
    chunks = await bus.nc.subscribe(inbox)
    try:
        body = {"deliver_subject": inbox, "no_consumers": False, "chunk_size": CHUNK}
        answer = await bus.api_request(f"STREAM.SNAPSHOT.{stream}", body)
        folder.mkdir(mode=0o700)  # noqa: ASYNC240  nothing else runs in a command
        with (folder / DATA).open("wb") as data:
            while (chunk := await chunks.next_msg(timeout=CHUNK_S)).data:
                data.write(chunk.data)
                if chunk.reply:
                    await bus.nc.publish(chunk.reply)  # the server sends more once it hears this
        if (chunk.headers or {}).get("Status", "204") not in ("200", "204"):
            raise Failed(UNREACHABLE, f"Copying {stream} stopped half-way: {chunk.headers}.")
        meta = {"config": answer["config"], "state": answer["state"]}
        (folder / META).write_bytes(msgspec.json.encode(meta))
    except (NatsError, TimeoutError):
        raise Failed(UNREACHABLE, f"Copying {stream} stopped half-way: try again.") from None
    except OSError as exc:
        raise _unwritten_streams(folder, exc) from None
    finally:
        await chunks.unsubscribe()
    return CopiedStream(stream, answer["state"]["messages"], (folder / DATA).stat().st_size)


async def _load(bus: Bus, folder: Path) -> CopiedStream:
    stream = folder.name
    meta: dict[str, Any] = msgspec.json.decode((folder / META).read_bytes())
    config = meta["config"] | {"num_replicas": bus.settings.replicas}
    answer = await bus.api_request(f"STREAM.RESTORE.{stream}", {"config": config, "state": meta["state"]})
    chunk: bytes | None = None
    try:
        with (folder / DATA).open("rb") as data:
            while chunk != b"":  # an empty one says that this was all
                chunk = data.read(CHUNK)
                said = await bus.nc.request(answer["deliver_subject"], chunk, timeout=CHUNK_S)
                if error := (msgspec.json.decode(said.data) if said.data else {}).get("error"):
                    raise Failed(NO, f"{stream} cannot be restored: {error}.")
    except (NatsError, TimeoutError):
        raise Failed(UNREACHABLE, f"Restoring {stream} stopped half-way: delete it, and try again.") from None
    return CopiedStream(stream, meta["state"]["messages"], (folder / DATA).stat().st_size)


def _print(copied: list[CopiedStream], json: bool) -> None:
    output.listing(copied, json, COLUMNS, lambda one: (one.stream, one.messages, one.bytes))
