"""Background tasks of an owner, and work that has to succeed, however long that takes, while its owner may do it.

An exception that is no AdapterError is a bug. The message or command that triggers it ends after a few attempts, with
tracebacks in the log, and the next one goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

import structlog

from adapter.errors import AdapterError, Crashed, LeaseLost, PersonGone, RecordTooNew, StaleRead
from adapter.tools.timing import Clock, backoff

log = structlog.get_logger()

T = TypeVar("T")

ATTEMPTS = 3
"""Crashes of the same work after which it ends."""


class TaskSet:
    """The running tasks of one owner. asyncio holds tasks only weakly, and reports their failures late."""

    def __init__(self, name: str) -> None:
        """`name` tells in the log whose task has crashed. The end of a lease is no crash."""
        self._name = name
        self._running: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._running)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    async def wait_ended(self, within_s: float | None = None) -> bool:
        """Waits until all tasks have ended, including new ones. Returns whether they have within `within_s`
        seconds."""
        loop = asyncio.get_running_loop()
        deadline = None if within_s is None else loop.time() + within_s
        while self._running:
            left_s = None if deadline is None else deadline - loop.time()
            if left_s is not None and left_s <= 0:
                return False
            await asyncio.wait(list(self._running), timeout=left_s)
        return True

    def cancel_all(self) -> None:
        for task in list(self._running):
            task.cancel()

    def _on_task_done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if task.cancelled() or (exc := task.exception()) is None or isinstance(exc, LeaseLost):
            return
        log.error("task.crashed", task=self._name, exc_info=exc)


class Owner(Protocol):
    """A right to act that may pause, and that ends for good."""

    def check(self) -> None:
        """Raises LeaseLost unless the right holds now."""

    async def valid(self) -> None:
        """Waits out a pause. Raises LeaseLost once the right is over."""


async def persist(work: Callable[[], Awaitable[T]], owner: Owner, clock: Clock, name: str, **fields: Any) -> T:
    """The result of `work`, which is tried again after a failure of the bus and after a pause of the lease.

    `name` and `fields` are logged. `owner` is asked only after a LeaseLost: `work` checks the right itself, right
    before it acts. Raises LeaseLost once the right is over; Crashed for a bug, which raises in every attempt;
    PersonGone; RecordTooNew; StaleRead.
    """
    failures = crashes = pauses = 0
    while True:
        try:
            return await work()
        except LeaseLost:
            await owner.valid()
            pauses += 1  # the work may see a pause that is over for its owner
            await clock.sleep(backoff(pauses, first_s=0.02, longest_s=1.0))
        except (Crashed, PersonGone, RecordTooNew, StaleRead):
            raise
        except AdapterError as exc:
            failures += 1
            log.warning("work.retrying", work=name, reason=exc.reason, detail=exc.detail, failures=failures, **fields)
            await clock.sleep(backoff(failures, first_s=0.2, longest_s=5.0))
        except Exception as exc:
            crashes += 1
            log.exception("work.crashed", work=name, crashes=crashes, **fields)
            if crashes == ATTEMPTS:
                raise Crashed from exc
            await clock.sleep(backoff(crashes, first_s=0.5))
