"""Child processes that do not outlive this one, and do not read what it knows."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

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
