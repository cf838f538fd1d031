"""Free ports, and waiting for what has to come true."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def until(holds: Callable[[], bool], what: str, *, patience_s: float = 120.0) -> None:
    """Waits for a condition; the patience only ends a test that hangs."""
    try:
        async with asyncio.timeout(patience_s):
            while not holds():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"never came true: {what}") from None


async def eventually(holds: Callable[[], Awaitable[bool]], what: str, *, patience_s: float = 60.0) -> None:
    """Waits for a condition that has to be asked for; the patience only ends a test that hangs."""
    try:
        async with asyncio.timeout(patience_s):
            while not await holds():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"never came true: {what}") from None


async def call(*command: str) -> int:
    """The exit code of a program; what it says is not wanted."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    return await process.wait()
