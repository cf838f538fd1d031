"""Handles bugs that one message or command triggers: a few attempts, tracebacks in the log, then `Crashed`.

An exception that is no AdapterError is a bug. The message that triggers it must end, and the next one must go on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog

from adapter.errors import AdapterError, Crashed

log = structlog.get_logger()

T = TypeVar("T")

ATTEMPTS = 3
PAUSE_S = 1.0
"""Pause between two attempts."""


async def retry_on_bug(
    work: Callable[[], Awaitable[T]],
    sleep: Callable[[float], Awaitable[None]],
    event: str,
    *,
    tries: int = ATTEMPTS,
    **fields: Any,
) -> T:
    """The result of `work`. Raises Crashed, and the AdapterErrors of `work`. `event` and `fields` are logged."""
    for tried in range(1, tries + 1):
        try:
            return await work()
        except AdapterError:
            raise
        except Exception:
            log.exception(event, **fields)
        if tried < tries:
            await sleep(PAUSE_S)
    raise Crashed


def retry_on_bug_now(work: Callable[[], T], event: str, *, tries: int = ATTEMPTS, **fields: Any) -> T:
    """As `retry_on_bug`, without a pause, so that later messages cannot overtake."""
    for _ in range(tries):
        try:
            return work()
        except AdapterError:
            raise
        except Exception:
            log.exception(event, **fields)
    raise Crashed
