"""Child processes that do not outlive this one."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> Callable[[], None] | None:
    """What a child does before it becomes another program: tie its life to `parent` (Linux only).

    Linux ends the child together with the *thread* that made it: start it from the main thread.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here: after the fork only a bare call is safe

    def set_death_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between, and no signal will come
            os._exit(1)

    return set_death_signal
