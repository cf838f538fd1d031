"""Renders texts that may take long in a process of its own, which is this module run as a script.

A call that does not return would block the event loop, and the renewal of every lease with it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from typing import BinaryIO

import msgspec
import structlog

from adapter.conversation.split import to_plain
from adapter.errors import Refused, Temporary

log = structlog.get_logger()

LIMIT_S = 10.0
"""Time for one job. All texts of a command take a second or two, and more on a busy machine."""
ATTEMPTS = 2
"""Attempts with a new process. One process may have been killed by accident; the text is at fault if two end."""
_SIZE = 4
"""Bytes of the length before each message."""


class _Failed(Exception):
    """The texts were not rendered in time, or ended the process."""


class TextWorker:
    """Implements ports.TextReader with one process, which takes one job at a time, first come, first served.

    The process starts with the first job. It is killed at the limit, and another one starts with the next job.
    """

    def __init__(self) -> None:
        self.limit_s = LIMIT_S
        self._turn = asyncio.Lock()
        self._process: Process | None = None

    async def render_plain(self, texts: Sequence[str]) -> list[str]:
        try:
            return await self._do(texts)
        except _Failed:
            detail = "The text takes too long to read as Markdown: send it with format markdown, or as a file."
            raise Refused("too_long", detail) from None

    async def close(self) -> None:
        """Ends the process."""
        if process := self._process:
            self._kill()
            await process.wait()

    async def _do(self, texts: Sequence[str]) -> list[str]:
        """Raises _Failed, Temporary."""
        message = msgspec.msgpack.encode(texts)
        async with self._turn:
            for _ in range(ATTEMPTS):
                try:
                    async with asyncio.timeout(self.limit_s):
                        return await self._exchange(message)
                except TimeoutError:
                    log.warning("text.timed_out", seconds=self.limit_s, bytes=len(message))
                    break
                except (EOFError, ConnectionError):
                    log.warning("text.worker_died", bytes=len(message))
        raise _Failed

    async def _exchange(self, message: bytes) -> list[str]:
        """Raises EOFError, ConnectionError (the process has ended), Temporary (it cannot be started)."""
        if self._process is None:
            self._process = await _started()
        try:
            source, sink = self._process.stdout, self._process.stdin
            assert source is not None
            assert sink is not None
            sink.write(len(message).to_bytes(_SIZE) + message)
            await sink.drain()
            size = int.from_bytes(await source.readexactly(_SIZE))
            return msgspec.msgpack.decode(await source.readexactly(size), type=list[str])
        except BaseException:  # it is in the midst of something
            self._kill()
            raise

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()


async def _started() -> Process:
    """Starts the process without the adapter's secrets and in a session of its own, so that ctrl-C does not reach it.
    It ends when its input is closed."""
    environ = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = (sys.executable, "-P", "-m", __name__)
    try:
        return await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environ, start_new_session=True
        )
    except OSError as exc:
        raise Temporary("text_worker", f"The process that reads texts cannot be started: {exc.strerror}") from exc


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Does jobs until the input ends."""
    while head := source.read(_SIZE):
        texts = msgspec.msgpack.decode(source.read(int.from_bytes(head)), type=list[str])
        message = msgspec.msgpack.encode([to_plain(text) for text in texts])
        sink.write(len(message).to_bytes(_SIZE) + message)
        sink.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
