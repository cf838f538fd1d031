"""What `nats stream backup` and `nats stream restore` ask of a server, and the files that they keep: a folder for
each stream. `nats` itself is in no index that tests may use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client

CHUNK = 128 * 1024
META, DATA = "backup.json", "stream.tar.s2"
TRANSIENT = ("_leases", "_logins")
"""Buckets that only running adapters need: the documents leave them out."""


async def backup(url: str, folder: Path) -> list[str]:
    """Copies every stream and bucket into a folder of its own; returns their names."""
    nc = await nats.connect(url)
    try:
        found = (await _ask(nc, "STREAM.NAMES"))["streams"]
        names = [name for name in found if not name.endswith(TRANSIENT)]
        for name in names:
            await _save(nc, name, folder / name)
    finally:
        await nc.close()
    return names


async def restore(url: str, folders: Iterable[Path], *, replace: bool = False, replicas: int = 1) -> None:
    """Brings streams back from their folders; `replace`: deletes those that are there."""
    nc = await nats.connect(url)
    try:
        there = (await _ask(nc, "STREAM.NAMES"))["streams"] or []
        for folder in folders:
            if replace and folder.name in there:
                await _ask(nc, f"STREAM.DELETE.{folder.name}")
            await _load(nc, folder, replicas)
    finally:
        await nc.close()


async def _save(nc: Client, stream: str, folder: Path) -> None:
    inbox = nc.new_inbox()
    chunks = await nc.subscribe(inbox)
    body = {"deliver_subject": inbox, "no_consumers": False, "chunk_size": CHUNK}
    answer = await _ask(nc, f"STREAM.SNAPSHOT.{stream}", body)
    data = b""
    while (chunk := await chunks.next_msg(timeout=30)).data:
        data += chunk.data
        if chunk.reply:
            await nc.publish(chunk.reply)  # the server sends more once it hears this
    assert (chunk.headers or {}).get("Status", "204") in ("200", "204"), chunk.headers
    await chunks.unsubscribe()
    meta = {"config": answer["config"], "state": answer["state"]}

    def write() -> None:
        folder.mkdir(parents=True)
        (folder / DATA).write_bytes(data)
        (folder / META).write_text(json.dumps(meta))

    await asyncio.to_thread(write)


async def _load(nc: Client, folder: Path, replicas: int) -> None:
    meta = json.loads(await asyncio.to_thread((folder / META).read_text))
    data = await asyncio.to_thread((folder / DATA).read_bytes)
    asked = {"config": meta["config"] | {"num_replicas": replicas}, "state": meta["state"]}
    answer = await _ask(nc, f"STREAM.RESTORE.{folder.name}", asked)
    for first in range(0, len(data) + CHUNK, CHUNK):  # an empty one says that this was all
        said = await nc.request(answer["deliver_subject"], data[first : first + CHUNK], timeout=30)
    assert "error" not in json.loads(said.data), said.data


async def _ask(nc: Client, verb: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    said = await nc.request(f"$JS.API.{verb}", json.dumps(body).encode() if body else b"", timeout=30)
    answer: dict[str, Any] = json.loads(said.data)
    assert "error" not in answer, answer
    return answer
