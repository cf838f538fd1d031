"""How a command ends: exit codes that scripts can trust, the one sentence that goes with a failure, and signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

OK = 0
NO = 1
USAGE = 2
UNREACHABLE = 3
TIMEOUT = 4
UNSTORED = 5
INTERRUPTED = 130

EXIT_CODES = """\
Exit codes:

* 0 done
* 1 refused, not found, or not accepted
* 2 wrong usage or settings
* 3 NATS unreachable, or no adapter answered
* 4 the outcome did not come in time
* 5 `run` ended while answers of iLink were not stored
* 130 ctrl-C
"""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AT_ONCE_S = 0.3
"""An end that takes longer is explained to the person at the terminal."""
CLOSING_S = 10.0


class Failed(Exception):
    """A command ends with `code`. The text is one sentence that says what to do and never holds a secret."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


@contextlib.contextmanager
def on_signal(
    first: Callable[[], object], waits_for: str = "what is being closed", at_most_s: float = CLOSING_S
) -> Iterator[None]:
    """Calls `first` at the first signal, after which the process ends in `at_most_s` seconds, by force if need be.
    A second signal ends it at once. `waits_for`: what the person at the terminal is told."""
    loop = asyncio.get_running_loop()

    def explain() -> None:
        if sys.stderr.isatty():  # over the terminal's ^C
            sys.stderr.write(f"\rwechat-nats: waiting for {waits_for}.\n")
            sys.stderr.write(f"  {at_most_s:.0f} s at most; ctrl-C again ends it at once.\n")
            sys.stderr.flush()

    def at_once(number: int, _: object) -> None:
        os._exit(128 + number)

    def on_first(number: int) -> None:
        for each in SIGNALS:
            loop.remove_signal_handler(each)
            signal.signal(each, at_once)  # SIG_DFL does nothing in process 1
        loop.call_later(AT_ONCE_S, explain)
        loop.call_later(at_most_s + 1.0, os._exit, 128 + number)  # what has such a limit of its own comes first
        first()

    heard = SIGNALS if threading.current_thread() is threading.main_thread() else ()  # no other thread gets signals
    for number in heard:
        loop.add_signal_handler(number, on_first, number)
    try:
        yield
    finally:
        for number in heard:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def draining_on_signal(drain_s: float) -> Iterator[asyncio.Event]:
    """An event for `app.run`, which drains for at most `drain_s` seconds once a signal has set it."""
    stop = asyncio.Event()
    with on_signal(stop.set, "open polls and for answers to what is being sent", drain_s):
        yield stop


async def until_signalled(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. The first signal cancels it, unless `work` has an `on_signal` of its own."""
    task = asyncio.current_task()
    assert task is not None
    with on_signal(task.cancel):
        return await work
