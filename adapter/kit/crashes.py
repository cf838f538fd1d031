"""Handles bugs that one message or command triggers: a few attempts, tracebacks in the log, then `Crashed`.

An exception that is no AdapterError is a bug. The message that triggers it must end, and the next one must go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import structlog

from adapter.errors import AdapterError, Crashed

log = structlog.get_logger()

T = TypeVar("T")

ATTEMPTS = 3


def retry_on_bug_now(work: Callable[[], T], event: str, *, tries: int = ATTEMPTS, **fields: Any) -> T:
    """The result of `work`, tried again without a pause, so that later messages cannot overtake.

    `event` and `fields` are logged. Raises Crashed, and the AdapterErrors of `work`.
    """
    for _ in range(tries):
        try:
            return work()
        except AdapterError:
            raise
        except Exception:
            log.exception(event, **fields)
    raise Crashed
