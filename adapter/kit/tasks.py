"""The background tasks of an owner."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

from adapter.errors import LeaseLost

log = structlog.get_logger()


class TaskSet:
    """The running tasks of one owner. asyncio holds tasks only weakly, and reports their failures late."""

    def __init__(self, name: str) -> None:
        """`name` tells in the log whose task has crashed. The end of a lease is no crash."""
        self._name = name
        self._running: dict[asyncio.Task[Any], None] = {}
        """A set would take 150 bytes more while it is empty, as it is for thousands of silent users."""

    def __len__(self) -> int:
        return len(self._running)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._running[task] = None
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
        self._running.pop(task, None)
        if task.cancelled() or (exc := task.exception()) is None or isinstance(exc, LeaseLost):
            return
        log.error("task.crashed", task=self._name, exc_info=exc)
