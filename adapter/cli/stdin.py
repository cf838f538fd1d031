"""Lines of standard input, read without blocking the event loop or the end of the program.

A thread reads, since the loop cannot wait for a regular file. It has a reader of its own on the descriptor, since a
daemon thread inside `sys.stdin` aborts the interpreter at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import termios
import threading
from collections.abc import AsyncIterator, Callable
from queue import SimpleQueue

from rich.cells import cell_len

AHEAD = 1000
"""Lines that are read in advance."""
PROMPT_S = 1.0
"""Longest wait for readline, which takes a millisecond."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


async def lines(fd: int = 0) -> AsyncIterator[str]:
    """Each line without its end, as it comes; ends at the end of the input. Bytes that are no UTF-8 become �."""
    try:
        source = open(fd, encoding="utf-8", errors="replace", closefd=False)  # noqa: ASYNC230, SIM115
    except OSError:  # it was closed
        return

    def read() -> str | None:
        line = source.readline()
        return line.removesuffix("\n") if line else None

    async for line in _read_in_thread(read):
        yield line


class LineEditor:
    """Lines that a person types at a terminal, one for each prompt, with readline's keys and history."""

    def __init__(self) -> None:
        import readline  # noqa: PLC0415 -- it may write to the terminal when it is imported

        self._buffer = readline.get_line_buffer
        self._asked: SimpleQueue[str] = SimpleQueue()
        self._is_reading = False
        self._shown = threading.Event()
        readline.set_pre_input_hook(self._shown.set)

    def prompt(self, label: str) -> str:
        """Reads a line behind `label`. If one is being read, returns what has to be printed to show it again."""
        if self._is_reading:
            return label + self._buffer()
        self._is_reading = True
        self._shown.clear()
        self._asked.put(COLOURS.sub("\001\\g<0>\002", label))  # readline counts no column for what is so marked
        return ""

    def clear(self, columns: int, width: int) -> str:
        """What has to be printed to wipe the prompt of so many columns with the line behind it, once readline has
        shown it."""
        self._shown.wait(PROMPT_S)
        rows = (columns + cell_len(self._buffer())) // width
        return (f"\x1b[{rows}A" if rows else "") + "\r\x1b[J"

    async def lines(self) -> AsyncIterator[str]:
        """Each line that was asked for; ends at the end of the input."""
        before = termios.tcgetattr(0)
        try:
            async for line in _read_in_thread(lambda: input(self._asked.get())):
                self._is_reading = False
                yield line
        finally:  # readline may still wait in its thread
            termios.tcsetattr(0, termios.TCSADRAIN, before)


async def _read_in_thread(read: Callable[[], str | None]) -> AsyncIterator[str]:
    """Yields what `read` returns, until it returns None or meets the end of the input, such as a terminal that is
    gone."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[str | None] = asyncio.Queue(AHEAD)

    def run() -> None:
        line: str | None = ""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants more
            while line is not None:
                try:
                    line = read()
                except (EOFError, OSError, UnicodeDecodeError):
                    line = None
                asyncio.run_coroutine_threadsafe(queue.put(line), loop).result()

    threading.Thread(target=run, name="stdin", daemon=True).start()
    while (line := await queue.get()) is not None:
        yield line
