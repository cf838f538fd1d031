"""Where media are: iLink's CDN by scripts, and the object store in memory."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeAlias

from adapter.errors import Temporary
from adapter.ports import Account, MediaKind, MediaRef, Pieces, StoredObject, Uploaded

Piece: TypeAlias = bytes | Exception | asyncio.Event | None


class Carried(NamedTuple):
    """An upload that the CDN took."""

    bot: str
    user: str
    kind: MediaKind
    name: str
    data: bytes
    md5: str


class FakeCdn:
    """Implements Cdn by scripts. Uploads are taken without one; what can be downloaded has to be said."""

    def __init__(self) -> None:
        self.uploads: list[Carried] = []
        self.asked = 0
        self.script: deque[Exception | None] = deque()
        self.on_upload: Callable[[], Awaitable[None]] | None = None
        """Awaited before an upload."""
        self.took_s = 0.0
        self.hold: dict[str, asyncio.Event] = {}
        """Uploads for these users take until the event."""
        self.answers: dict[str, deque[Piece]] = {}
        """Downloads by reference, the last one of each stays: bytes; an error, or an event to wait for before the
        next one; None: silence for ever."""
        self.fetched: list[str] = []
        """The references of all downloads."""
        self.running = 0
        """Downloads at once, now and at most."""
        self.limit = 0

    def has(self, reference: str, *answers: Piece) -> None:
        self.answers[reference] = deque(answers)

    async def download(self, fetch: MediaRef) -> Pieces:
        self.fetched.append(fetch.reference)
        self.running += 1
        self.limit = max(self.limit, self.running)
        try:
            await asyncio.sleep(0.01)
            script = self.answers[fetch.reference]
            while True:
                answer = script.popleft() if len(script) > 1 else script[0]
                if answer is None:
                    await asyncio.Event().wait()
                elif isinstance(answer, asyncio.Event):
                    await answer.wait()
                elif isinstance(answer, Exception):
                    raise answer
                else:
                    break
            for start in range(0, len(answer), 1000):
                await asyncio.sleep(0)
                yield answer[start : start + 1000]
        finally:
            self.running -= 1

    async def upload(
        self,
        account: Account,
        *,
        user: str,
        kind: MediaKind,
        name: str,
        size: int,
        md5: str,
        read: Callable[[], Pieces],
    ) -> Uploaded:
        self.asked += 1
        if self.on_upload is not None:
            await self.on_upload()
        await asyncio.sleep(self.took_s)
        if hold := self.hold.get(user):
            await hold.wait()
        answer = self.script.popleft() if self.script else None
        if answer is not None:
            raise answer
        data = b"".join([piece async for piece in read()])
        assert len(data) == size
        self.uploads.append(Carried(account.bot, user, kind, name, data, md5))
        return Uploaded(kind, name, size, size // 16 * 16 + 16, f"ref{len(self.uploads)}", b"k" * 16)


class FakeObjects:
    """Implements Objects. `journal` is told of what is stored."""

    def __init__(self, journal: list[str]) -> None:
        self.stored: dict[str, bytes] = {}
        self.unreadable: deque[Exception | None] = deque()
        """What the next reads fail with, half way."""
        self.away = 0
        """So many more questions fail."""
        self.reads = 0
        self.piece_bytes = 1000
        self.described: dict[str, tuple[str, str]] = {}
        """Type and title of what was put."""
        self.puts: list[str] = []
        self.on_put: Callable[[str], Awaitable[None]] | None = None
        """Awaited when all bytes are there: to fail, or to let something happen."""
        self._journal = journal

    async def get_info(self, name: str) -> StoredObject | None:
        await asyncio.sleep(0)
        if self.away:
            self.away -= 1
            raise Temporary("bus_down")
        data = self.stored.get(name)
        return None if data is None else StoredObject(name, "chunks", len(data), hashlib.sha256(data).hexdigest())

    async def read(self, stored: StoredObject) -> Pieces:
        self.reads += 1
        data = self.stored[stored.name]
        problem = self.unreadable.popleft() if self.unreadable else None
        for start in range(0, len(data), self.piece_bytes):
            await asyncio.sleep(0)
            if problem is not None and start >= len(data) // 2:
                raise problem
            yield data[start : start + self.piece_bytes]

    async def put(
        self,
        name: str,
        pieces: Pieces,
        *,
        describe: Callable[[bytes], tuple[str, str]] = lambda head: ("", ""),
        ensure_owner: Callable[[], None] | None = None,
    ) -> StoredObject:
        data = b"".join([piece async for piece in pieces])
        self.puts.append(name)
        if self.on_put is not None:
            await self.on_put(name)
        if name not in self.stored:
            if ensure_owner is not None:
                ensure_owner()
            self.stored[name], self.described[name] = data, describe(data)
            self._journal.append("object")
        data = self.stored[name]
        return StoredObject(name, "chunks", len(data), hashlib.sha256(data).hexdigest())

    async def read_piece(self, stored: StoredObject, after: int) -> tuple[bytes, int]:
        raise AssertionError("this half of the store is not there")
