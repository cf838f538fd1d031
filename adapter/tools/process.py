"""What concerns the whole process: its event loop, its garbage collection, its children.

The code makes no reference cycles where messages pass: reference counts free nearly everything. The polls of
thousands of bots are half a million objects that live on, and each collection that looks at them stops the process
for a tenth of a second or more (docs/decisions/0035-garbage-collector.md).
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

YOUNG, MIDDLE, OLD = 50_000, 20, 20
"""Objects made since the last collection of the youngest ones that start the next; and how many of these come before
one of the middle, and of all. Python itself leaves out one of all until the objects have grown by a quarter."""


def run_fast(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` like asyncio.run, on uvloop where it is installed: less CPU per request, a fifth of the memory per
    TLS connection. Objects that exist at the start are never looked at again (gc.freeze)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, OLD)
    try:
        import uvloop  # noqa: PLC0415 -- optional: not on every platform
    except ModuleNotFoundError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4


def hide_secrets() -> None:
    """Makes this process undumpable for good (Linux only): no other process reads its environment and memory in /proc
    any more, but one with CAP_SYS_PTRACE, such as root's. A program that it starts is as dumpable as any."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent(parent: int) -> Callable[[], None] | None:
    """A function for the child to call before it executes its program: the child dies with `parent` (Linux only).

    Linux ends the child together with the *thread* that started it, so start it from the main thread.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork: the child may only make a bare call

    def set_death_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the call, so no signal will come
            os._exit(1)

    return set_death_signal
