"""Lines of standard input for a program that must neither block nor be kept from ending by it.

A thread reads, since the loop cannot wait for a regular file. It reads the descriptor, not `sys.stdin`: a
daemon thread inside Python's buffered reader aborts the interpreter when that shuts down.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import termios
import threading
from collections.abc import AsyncIterator
from queue import SimpleQueue

BLOCK = 65536
AHEAD = 1000
"""Lines read before somebody takes them."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


async def lines(fd: int = 0) -> AsyncIterator[str]:
    """Each line without its end, as it comes; ends at the end of the input. Bytes that are no UTF-8 become �."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[str | None] = asyncio.Queue()
    room = threading.Semaphore(AHEAD)
    threading.Thread(target=_read, args=(fd, loop, queue, room), name="stdin", daemon=True).start()
    while (line := await queue.get()) is not None:
        room.release()
        yield line


class LineEditor:
    """Lines that a person types at a terminal, one for each prompt, with readline's keys and history."""

    def __init__(self) -> None:
        import readline  # noqa: PLC0415 -- it may write to the terminal when it is imported

        self._buffer = readline.get_line_buffer
        self._asked: SimpleQueue[str] = SimpleQueue()
        self._is_reading = False

    def prompt(self, label: str) -> str:
        """Reads a line behind `label`. Where one is being read, what has to be written to show it again."""
        if self._is_reading:
            return label + self._buffer()
        self._is_reading = True
        self._asked.put(COLOURS.sub("\001\\g<0>\002", label))  # readline counts no column for what is so marked
        return ""

    async def lines(self) -> AsyncIterator[str]:
        """Each line that was asked for; ends at the end of the input."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        before = termios.tcgetattr(0)
        threading.Thread(target=self._read, args=(loop, queue), name="stdin", daemon=True).start()
        try:
            while (line := await queue.get()) is not None:
                self._is_reading = False
                yield line
        finally:  # readline may still wait in its thread
            termios.tcsetattr(0, termios.TCSADRAIN, before)

    def _read(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[str | None]) -> None:
        line: str | None = ""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants more
            while line is not None:
                try:
                    line = input(self._asked.get())
                except (EOFError, OSError, UnicodeDecodeError):
                    line = None
                loop.call_soon_threadsafe(queue.put_nowait, line)


def _read(
    fd: int, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[str | None], room: threading.Semaphore
) -> None:
    def hand_over(line: str | None) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, line)

    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants more
        rest = b""
        while block := _read_block(fd):
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                room.acquire()
                hand_over(_decode_line(line))
        if rest:
            hand_over(_decode_line(rest))
        hand_over(None)


def _read_block(fd: int) -> bytes:
    """What there is; b"" at the end, which a terminal that has gone away is too."""
    try:
        return os.read(fd, BLOCK)
    except OSError:
        return b""


def _decode_line(line: bytes) -> str:
    return line.removesuffix(b"\r").decode(errors="replace")
