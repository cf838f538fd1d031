"""A way to a server on which single messages of the NATS protocol get lost, while the connection stays."""

from __future__ import annotations

import asyncio
import contextlib

from tests.e2e.hole import Hole

CARRIERS = (b"PUB", b"HPUB", b"MSG", b"HMSG")
"""Their lines end with the number of bytes that follow."""


class Loss:
    """One message that is to get lost: of those that hold all `parts`, the one behind `skip` others."""

    def __init__(self, parts: tuple[bytes, ...], skip: int, *, is_last: bool) -> None:
        self.has_happened = False
        self.is_last = is_last
        """All that comes behind it gets lost, too."""
        self._parts = parts
        self._skip = skip
        self._lost: list[tuple[bytes, asyncio.StreamWriter]] = []

    def matches(self, message: bytes) -> bool:
        if self.has_happened or not all(part in message for part in self._parts):
            return False
        self.has_happened = self._skip == 0
        self._skip -= 1
        return self.has_happened

    def keep(self, message: bytes, sink: asyncio.StreamWriter) -> None:
        self._lost.append((message, sink))

    async def arrive(self) -> None:
        """What got lost was only late: it comes now, on the connection it was sent on."""
        for message, sink in self._lost:
            sink.write(message)
            await sink.drain()
        self._lost.clear()


class Lossy(Hole):
    """`async with Lossy(url) as lossy`: what comes to `lossy.url` goes there and back, but for what `lose` names."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._losses: list[Loss] = []

    def lose(self, *parts: bytes, skip: int = 0, is_last: bool = False) -> Loss:
        """Loses one message to come, in either direction: line and payload hold all `parts`; with `is_last` all that
        comes behind it, too."""
        loss = Loss(parts, skip, is_last=is_last)
        self._losses.append(loss)
        return loss

    def mend(self) -> None:
        """Loses nothing more."""
        self._losses.clear()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError), contextlib.closing(sink):
            while line := await source.readline():
                verb, *rest = line.split()
                message = line
                if verb in CARRIERS:
                    message += await source.readexactly(int(rest[-1]) + 2)
                lost = (one for one in self._losses if one.matches(message) or (one.is_last and one.has_happened))
                if (loss := next(lost, None)) is not None:
                    loss.keep(message, sink)
                    continue
                sink.write(message)
                await sink.drain()
