"""The inputs of one conversation, processed in order by one task, which ends when no input is left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from adapter.conversation import rules
from adapter.errors import LeaseLost
from adapter.kit.timing import PerTickLimiter

log = structlog.get_logger()


class _Mail(msgspec.Struct, frozen=True):
    event: rules.Input
    done: asyncio.Future[None] | None
    is_wanted: Callable[[], bool] | None


class Mailbox:
    """Queues inputs and processes them. After `stop` it accepts no input: the waiter gets LeaseLost."""

    def __init__(self, sandbox: str, on_empty: Callable[[], None], turns: PerTickLimiter) -> None:
        """`on_empty`: called when the task ends because no input is left."""
        self.handle: Callable[[rules.Input], Awaitable[None]] = _ignore_input
        """Processes an input."""
        self._sandbox = sandbox
        self._on_empty = on_empty
        self._turns = turns
        self._mails: list[_Mail] = []
        """Few at a time. An empty deque takes 600 bytes, for each of thousands of users who are silent."""
        self._task: asyncio.Task[None] | None = None
        self.is_stopped = False

    @property
    def is_busy(self) -> bool:
        """An input is being processed or waits."""
        return self._task is not None

    def put(
        self,
        event: rules.Input,
        done: asyncio.Future[None] | None = None,
        is_wanted: Callable[[], bool] | None = None,
    ) -> None:
        """Queues an input. `done` is set once its effects are carried out, except for those that run in the
        background. `is_wanted`: checked when the input's turn comes; None: always wanted."""
        if self.is_stopped:
            _fail_waiter(done, self._sandbox)
            return
        self._mails.append(_Mail(event, done, is_wanted))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def wait_empty(self, timeout_s: float | None = None) -> None:
        """Returns once the task has ended, or after the timeout."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=timeout_s)

    def stop(self) -> None:
        """Drops waiting inputs, and cancels the task unless it is the caller."""
        self.is_stopped = True
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            self._task = None  # a task that has not begun never ends itself
        self.handle, self._on_empty = _ignore_input, _ignore  # no cycle is left for the garbage collector
        for mail in self._mails:
            _fail_waiter(mail.done, self._sandbox)
        self._mails.clear()

    async def _run(self) -> None:
        done: asyncio.Future[None] | None = None
        try:
            while self._mails:
                await self._turns.wait_turn()
                mail = self._mails.pop(0)
                done = mail.done
                try:
                    if mail.is_wanted is None or mail.is_wanted():
                        await self.handle(mail.event)
                except Exception as exc:  # the next inputs are processed
                    log.exception("conversation.crashed", sandbox=self._sandbox, input=type(mail.event).__name__)
                    if done is not None and not done.done():
                        done.set_exception(exc)
                if done is not None and not done.done():
                    done.set_result(None)
        finally:
            self._task = None
            _fail_waiter(done, self._sandbox)
        if not self.is_stopped:
            self._on_empty()


async def _ignore_input(_: rules.Input) -> None: ...


def _ignore() -> None: ...


def _fail_waiter(done: asyncio.Future[None] | None, sandbox: str) -> None:
    if done is not None and not done.done():
        done.set_exception(LeaseLost("shard_lost", sandbox))
