"""Processes of the adapter that need not import it: one process per pytest worker has, and forks them.

To import it takes more CPU than most tests take for all else. `python -m tests.forks` is the process that forks. What
only a start of its own shows (imports, arguments, ctrl-C at once) needs asyncio.create_subprocess_exec.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Mapping
from typing import IO, Any

PRELOADED = (
    "adapter.cli.agent",
    "adapter.cli.demo",
    "adapter.cli.run",
    "adapter.cli.start",
    "adapter.replica.app",
    "uvloop",
)
ORDER_BYTES = 1 << 18
Given = int | IO[Any] | None
"""A standard stream, as asyncio.create_subprocess_exec takes it."""


class Forked:
    """A process that runs; what tests need of asyncio.subprocess.Process."""

    stdin: asyncio.StreamWriter | None = None
    stdout: asyncio.StreamReader | None = None
    stderr: asyncio.StreamReader | None = None
    pid: int
    _ending: asyncio.Task[int]

    async def start(self, order: dict[str, Any], given: list[Given]) -> None:
        here, there = socket.socketpair()
        inner, outer = zip(*(_ends(number, each) for number, each in enumerate(given)), strict=True)
        socket.send_fds(_source(), [json.dumps(order).encode()], [*inner, there.fileno()])
        for number, stream in enumerate(inner):
            if stream not in (number, given[number]):
                os.close(stream)
        there.close()
        told, closing = await asyncio.open_unix_connection(sock=here)
        if outer[0] is not None:
            self.stdin = await _writing(outer[0])
        self.stdout, self.stderr = [None if stream is None else await _reading(stream) for stream in outer[1:]]
        self.pid = int(await told.readline())

        async def end() -> int:
            try:
                return int(await told.read())
            finally:
                closing.close()

        self._ending = asyncio.create_task(end())

    @property
    def returncode(self) -> int | None:
        return self._ending.result() if self._ending.done() else None

    async def wait(self) -> int:
        return await asyncio.shield(self._ending)

    async def communicate(self, said: bytes = b"") -> tuple[bytes, bytes]:
        async def say() -> None:
            if self.stdin is not None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.stdin.write(said)
                    await self.stdin.drain()
                self.stdin.close()

        async def read(stream: asyncio.StreamReader | None) -> bytes:
            return b"" if stream is None else await stream.read()

        out, err, _ = await asyncio.gather(read(self.stdout), read(self.stderr), say())
        await self.wait()
        return out, err

    def send_signal(self, number: int) -> None:
        if not self._ending.done():
            with contextlib.suppress(ProcessLookupError):  # it has ended, and that is not told yet
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


async def fork(
    module: str,
    *arguments: str,
    env: Mapping[str, str],
    stdin: Given = DEVNULL,
    stdout: Given = None,
    stderr: Given = None,
) -> Forked:
    """`python -m module arguments`."""
    forked = Forked()
    order = {"argv": [module, *arguments], "environ": dict(env), "folder": os.getcwd()}
    await forked.start(order, [stdin, stdout, stderr])
    return forked


def _ends(number: int, given: Given) -> tuple[int, int | None]:
    """What the process gets as its standard stream, and what is left here of a pipe."""
    if given is None:
        return number, None
    if given == DEVNULL:
        return os.open(os.devnull, os.O_RDWR), None
    if given != PIPE:
        return (given if isinstance(given, int) else os.dup(given.fileno())), None
    reading, writing = os.pipe()
    return (writing, reading) if number else (reading, writing)


async def _reading(end: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(end, "rb", 0))
    return reader


async def _writing(end: int) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())
    transport, _ = await loop.connect_write_pipe(lambda: protocol, os.fdopen(end, "wb", 0))
    return asyncio.StreamWriter(transport, protocol, None, loop)


@functools.cache
def _source() -> socket.socket:
    """Where orders are taken, until this process ends."""
    here, there = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with there:
        subprocess.Popen([sys.executable, "-m", __name__], stdin=there.fileno())
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * ORDER_BYTES)
    return here


def serve() -> dict[str, Any]:
    """Forks until nobody orders any more. Returns in each process that is to run something, with what."""
    control = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        order, files, _, _ = socket.recv_fds(control, ORDER_BYTES, 4)
        if not order:
            os._exit(0)
        if not os.fork():
            break
        for file in files:
            os.close(file)
    control.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, told = files
    if pid := os.fork():  # this is its keeper
        for number in (0, 1, 2, *streams):
            os.close(number)
        os.write(told, b"%d\n" % pid)
        os.write(told, b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.close(told)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # those that are there think that they can seek, or that they are no terminal, as the first ones were
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    found: dict[str, Any] = json.loads(order)
    return found


if __name__ == "__main__":
    for module in PRELOADED:
        __import__(module)
    gc.collect()
    gc.freeze()
    given = serve()
    os.chdir(given["folder"])
    os.environ.clear()
    os.environ.update(given["environ"])
    sys.argv = given["argv"]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
