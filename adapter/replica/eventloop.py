"""Starts the event loop: uvloop's where it is installed, and a garbage collector that runs only when memory grows.

The code makes no reference cycles where messages pass: reference counts free nearly everything. The polls of
thousands of bots are half a million objects that live on, and a collection that looks at them stops the process for a
tenth of a second or more (docs/decisions/0035-garbage-collector.md). This module imports nothing of the adapter.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

CHECK_S = 1.0
"""Pause between two counts of the allocated memory blocks, each of which takes 0.1 ms per million."""
GROWTH = 4
"""A collection runs when the blocks have grown by one part in so many since the last one."""
LEAST_GROWTH = 100_000
"""Least growth in blocks that starts a collection: some 10 MB. A small process grows by a quarter with each burst."""
LONGEST_S = 600.0
"""Longest time without a collection: large buffers are no blocks, and cycles may hold some."""


def run_fast(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` like asyncio.run, on uvloop where it is installed: less CPU per request, a fifth of the memory per
    TLS connection. Objects that exist at the start are never looked at again (gc.freeze)."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        import uvloop  # noqa: PLC0415 -- optional: not on every platform
    except ModuleNotFoundError:
        return asyncio.run(_with_garbage_collection(main))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_with_garbage_collection(main))


async def _with_garbage_collection(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main`, and a collection when the allocated blocks have grown, or after LONGEST_S."""

    async def collect_forever() -> None:
        loop = asyncio.get_running_loop()
        while True:
            collected, until = sys.getallocatedblocks(), loop.time() + LONGEST_S
            limit = collected + max(collected // GROWTH, LEAST_GROWTH)
            while sys.getallocatedblocks() <= limit and loop.time() < until:
                await asyncio.sleep(CHECK_S)
            gc.collect()

    collecting = asyncio.create_task(collect_forever(), name="garbage")
    try:
        return await main
    finally:
        collecting.cancel()
