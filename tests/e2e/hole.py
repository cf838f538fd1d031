"""A way to a server that can become a black hole."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


class Hole:
    """`async with Hole(url) as hole`: what comes to `hole.url` goes there and back, until `swallow`."""

    def __init__(self, url: str) -> None:
        self._there = urlsplit(url)
        self._swallows = False
        self.swallowed = b""
        """What was to get through since."""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"{self._there.scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def swallow(self) -> None:
        """From now on nothing gets through, and nobody is told."""
        self._swallows = True

    def mend(self) -> None:
        """From now on new connections get through; those of before are over."""
        self._swallows = False
        for task in self._tasks:
            task.cancel()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(self._there.hostname, self._there.port)
        except OSError:  # nobody listens there now
            writer.close()
            return
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(sink):  # either side may be gone
            while data := await source.read(65536):
                if self._swallows:
                    self.swallowed += data
                    continue
                sink.write(data)
                await sink.drain()
