"""Commands as processes of their own, for what only a process shows: signals, pipes, terminals, what stays behind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import pty
import re
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from tests.forks import Forked, fork

Running = Process | Forked
TOKEN_KEY = base64.b64encode(bytes(32)).decode()
"""For an adapter: WECHAT_NATS_TOKEN_KEY."""
COMMAND = (sys.executable, "-c", "import sys, adapter.cli; sys.exit(adapter.cli.main())")
PATIENCE_S = 60.0
"""A test that hangs ends; nothing is measured by it."""


@contextlib.asynccontextmanager
async def started(
    *arguments: str, env: dict[str, str] | None = None, fresh: bool = False, **options: Any
) -> AsyncIterator[Running]:
    """A command that runs; killed at the end of the block if it still does. `fresh`: an interpreter of its own."""
    given: dict[str, Any] = {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE, "env": {**os.environ, **(env or {})}}
    process: Running
    if fresh:
        process = await asyncio.create_subprocess_exec(*COMMAND, *arguments, **given | options)
    else:
        process = await fork("adapter", *arguments, **given | options)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def on_terminal(*arguments: str) -> AsyncIterator[tuple[Running, int]]:
    """A command at a terminal of its own, and the descriptor by which a test types and reads there."""
    main, terminal = pty.openpty()
    given: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    try:
        async with started(*arguments, preexec_fn=lambda: os.login_tty(terminal), fresh=True, **given) as process:
            yield process, main
    finally:
        os.close(main)
        os.close(terminal)


async def printed(process: Running, words: bytes, *, errors: bool = False) -> bytes:
    """What is printed until `words` are."""
    stream = process.stderr if errors else process.stdout
    assert stream is not None
    found = b""
    while words not in found:
        block = await stream.read(4096)
        assert block, found
        found += block
    return found


async def seen(main: int, *words: bytes) -> bytes:
    """What the terminal shows until all the words are there, each after the one before."""
    found = b""
    while not re.search(b".*".join(re.escape(word) for word in words), found, re.DOTALL):
        found += await asyncio.to_thread(os.read, main, 4096)
    return found


async def until(condition: Callable[[], object]) -> None:
    """Waits until `condition()` holds. Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """Ids of the processes that `pid` has started."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
