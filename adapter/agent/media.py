"""Media of a sandbox, in pieces, by the adapter's services `media.get` and `media.put`; and media as files."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias
from urllib.parse import quote
from uuid import uuid4

import msgspec

from adapter.contract.messages import Media, MediaQuery
from adapter.contract.names import H_LAST, H_NAME, H_NEXT, H_OFFSET, H_SHA256, H_UPLOAD
from adapter.errors import Refused, Unreadable
from adapter.tools.media_types import clean_file_name

PIECE_BYTES = 256 * 1024
NAME_CHARS = 60
"""Most characters of the name of a file that is saved. File systems allow 255 bytes."""

Request: TypeAlias = Callable[[str, bytes, dict[str, str]], Awaitable[tuple[bytes, Mapping[str, str]]]]
"""Sends a verb of `wechat.svc`, a payload and headers; returns payload and headers of the answer."""
File: TypeAlias = Path | str | bytes
"""A file of a reply: its path, or its bytes."""


class MediaFile(NamedTuple):
    """The bytes of an item of a message."""

    kind: str
    """The item's."""
    name: str
    """The sender's file name, or one for kind and type."""
    data: bytes
    """Empty: they cannot be had."""


def read(file: File, most: int) -> bytes:
    """The bytes of a file of a reply. Raises Refused if there are none, or more than `most`; OSError."""
    if not isinstance(file, bytes):
        with Path(file).open("rb") as source:
            file = source.read(most + 1)
    if not 0 < len(file) <= most:
        raise Refused("media", f"A file is empty, or has more than {most} bytes.")
    return file


def save(folder: Path, file: MediaFile) -> Path:
    """Writes a file into a folder, and over no other one: `name.ext`, `name-2.ext` and so on. Raises OSError."""
    path = first = folder / (clean_file_name(file.name, NAME_CHARS) or file.kind)
    number = 1
    while True:
        try:
            with path.open("xb") as new:
                new.write(file.data)
            return path
        except FileExistsError:
            number += 1
            path = first.with_stem(f"{first.stem}-{number}")


async def get_media(request: Request, sandbox: str, name: str, *, position: str = "", wait_s: float = 0) -> bytes:
    """The bytes of an object. `position` and `wait_s`: as in MediaQuery. Raises Unreadable if the bytes are not those
    that were stored, and what `request` raises."""
    data, after = bytearray(), 0
    while True:
        query = MediaQuery(object=name, after=after, position=position, wait_s=wait_s)
        piece, headers = await request(f"media.get.{sandbox}", msgspec.json.encode(query), {})
        data += piece
        if H_NEXT not in headers:
            break
        after = int(headers[H_NEXT])
    if hashlib.sha256(data).hexdigest() != headers.get(H_SHA256):
        raise Unreadable("corrupt", "The bytes of the object are not those that were stored.")
    return bytes(data)


async def put_media(request: Request, sandbox: str, data: bytes, name: str) -> Media:
    """Stores an object. Raises what `request` raises."""
    upload, stored = uuid4().hex, b""
    for offset in range(0, max(len(data), 1), PIECE_BYTES):
        headers = {H_UPLOAD: upload, H_OFFSET: str(offset)}
        if offset + PIECE_BYTES >= len(data):
            digest = hashlib.sha256(data).hexdigest()
            headers |= {H_LAST: "true", H_NAME: quote(name, safe=""), H_SHA256: digest}
        stored, _ = await request(f"media.put.{sandbox}", data[offset : offset + PIECE_BYTES], headers)
    return msgspec.json.decode(stored, type=Media)
