"""Free ports, and waiting for what has to come true."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
from collections.abc import Awaitable, Callable

_PORTS = range(20_000, 32_768)
"""Below those that Linux gives to connections, which else may take a port before who asked for it listens there."""
_first = random.randrange(len(_PORTS))
_next_ports = itertools.cycle(itertools.chain(_PORTS[_first:], _PORTS[:_first]))


def free_port() -> int:
    """A port that nobody uses now, and that this process has not been given in its last ten thousand calls."""
    for port in itertools.islice(_next_ports, len(_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("every port is in use")


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
