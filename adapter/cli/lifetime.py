"""The adapter in this process, an embedded server beside it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from adapter.cli.embedded import EmbeddedNats
from adapter.cli.exits import NO, TIMEOUT, UNREACHABLE, Failed
from adapter.settings import Settings

T = TypeVar("T")

SERVER_END_S = 1.0
"""Time for the end of a server to show: what it served may fail sooner."""


@contextlib.asynccontextmanager
async def adapter_running(settings: Settings, *, start_s: float, drain_s: float) -> AsyncIterator[asyncio.Task[None]]:
    """The adapter in this process, ready; drained at the end of the block. Raises Failed if it does not start."""
    from adapter.replica import app  # noqa: PLC0415 -- other commands start faster without it

    stop, ready = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(app.run(settings, stop=stop, on_ready=ready.set))
    try:
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({task, waiting}, timeout=start_s, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            task.result()  # its own error says more
            raise Failed(NO, "The adapter ended at once.")
        if not ready.is_set():
            raise Failed(TIMEOUT, f"The adapter was not ready within {start_s:g} s.")
        yield task
    finally:
        stop.set()
        await asyncio.wait({task}, timeout=drain_s)
        task.cancel()
        await asyncio.wait({task})


async def while_alive(
    work: Coroutine[Any, Any, T], server: EmbeddedNats, adapter: asyncio.Task[None] | None = None
) -> T:
    """What `work` returns. Raises Failed if the server, or the adapter where it is not `work` itself, ends first."""
    task = asyncio.create_task(work)
    ended = asyncio.create_task(server.wait_ended())
    try:
        waits: set[asyncio.Task[Any]] = {task, ended} | ({adapter} if adapter else set())
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() or task.cancelled() or task.exception():
            await asyncio.wait({ended}, timeout=SERVER_END_S)
            if ended.done():
                where = "" if adapter else f": see {server.log_file}"  # the log of a demo goes with its server
                raise Failed(UNREACHABLE, f"The embedded NATS server ended by itself{where}.")
            if adapter is not None and adapter.done():
                adapter.result()  # its own error says more
                raise Failed(NO, "The adapter ended by itself.")
        return await task
    finally:
        ended.cancel()
        task.cancel()
        await asyncio.wait({task})
