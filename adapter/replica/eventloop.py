"""Starts the event loop: uvloop's where it is installed, and a garbage collector that is run in small steps.

The state of thousands of waiting polls is half a million objects that live on; a full collection stops everything
for a tenth of a second or more (docs/decisions/0035-garbage-collector.md). Imports nothing of ours.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

YOUNG = 5_000
"""Growth, in objects since the last collection, at which the youngest are looked at."""
LOOK_S = 0.1
"""Between two looks at the youngest, in any case. What was made and outlives it is counted against what is freed, so
that the interpreter itself may look at a hundred thousand at once, for fifty milliseconds."""
GROWN = 16
"""Those that outlived a look are looked at again when more is allocated by one part in so many; by the interpreter
after ten looks."""
LOOKS = 10
"""Looks between two counts of what is allocated, each of which takes 0.1 ms per million objects."""
EVERYTHING = 10
"""Every tenth count that finds growth has all objects looked at, not only the younger ones."""
MIDDLE = not (3, 14) <= sys.version_info < (3, 14, 5)
"""Whether those that outlived a look have one of their own. Python 3.14.0 to 3.14.4 collect incrementally: asked for
it they take a step as large as what is new, which is nothing after a look; only a look at all finds more."""
SELDOM = 1_000
"""Looks after which the interpreter itself looks at older ones."""


def run_fast(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, on uvloop where there is one: less CPU per request, a fifth of the memory per TLS connection.

    What is there at the start stays: the garbage collector is told to leave it alone. Of what comes later the
    youngest are looked at often, and few at a time; the others seldom (GROWN).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, SELDOM)
    try:
        import uvloop  # noqa: PLC0415 -- optional: not on every platform
    except ModuleNotFoundError:
        return asyncio.run(_with_garbage_collection(main))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_with_garbage_collection(main))


async def _with_garbage_collection(main: Coroutine[Any, Any, T]) -> T:
    """`main`, while garbage is looked for in small pieces."""

    async def collect_garbage() -> None:
        least, times = sys.getallocatedblocks(), 0
        while True:
            for _ in range(LOOKS):
                await asyncio.sleep(LOOK_S)
                gc.collect(0)
            now = sys.getallocatedblocks()
            if now < least + least // GROWN:
                least = min(least, now)
            else:
                times += 1
                gc.collect(1 if MIDDLE and times % EVERYTHING else 2)
                least = sys.getallocatedblocks()

    looking = asyncio.create_task(collect_garbage(), name="garbage")
    try:
        return await main
    finally:
        looking.cancel()
